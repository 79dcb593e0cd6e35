"""The two frontier experiments: their runs, and what the toy's finds."""

import json

import jax
import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax import config_checks
from dpo_jax.data import toy
from dpo_jax.evaluation import reward_kl
from dpo_jax.models import loading
from dpo_jax.parallel import sharding
from dpo_jax.pipeline.run import Run
from dpo_jax.rewards import make
from dpo_jax.sampling import prompts
from dpo_jax.sampling.sampler import Sampling
from experiments import imdb_frontier, toy_frontier
from tests.helpers.paths import ROOT
from tests.helpers.tiny_runs import experiment_configs, plant


@pytest.mark.parametrize("config", ["imdb", "imdb_small"])
def test_imdb_frontier_dry_run(config, tmp_path, capsys):
    make_config = experiment_configs(
        str(ROOT / "configs" / f"{config}.py"), ["--config.dpo.steps=7"]
    )
    imdb_frontier.run(make_config, str(tmp_path), ["*"], dry_run=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if " steps: " in line]
    assert sum(" 7 steps: " in line for line in lines) == 4
    assert len(lines) == 22 == len({line.split()[0] for line in lines})
    assert not list(tmp_path.iterdir())


def test_imdb_frontier_runs_by_name(tmp_path, capsys):
    make_config = experiment_configs(str(ROOT / "configs" / "imdb.py"), [])
    imdb_frontier.run(make_config, str(tmp_path), ["dpo_0.1", "ppo_1*"], dry_run=True)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "dpo_0.1",
        "ppo_12",
    ]
    with pytest.raises(ValueError, match="--run=dpo_7 matches no run. The runs are: dpo_0.05, "):
        imdb_frontier.run(make_config, str(tmp_path), ["dpo_7"], dry_run=True)


@pytest.mark.parametrize("module", ["imdb", "imdb_small"])
def test_frontier_runs_share_stages(module):
    """So one SFT model, one set of pairs and one reward model serve them all."""
    make_config = experiment_configs(str(ROOT / "configs" / f"{module}.py"), [])
    shared = {}
    for method, (_, values, _) in imdb_frontier.SWEEP.items():
        for value in values:
            config, stage = imdb_frontier.config_of(make_config, method, value)
            config_checks.validate(config)
            names = configs.folder_names(config)
            assert names[stage] == config.run
            for before in config.stages[: config.stages.index(stage)]:
                fields = configs.dependencies(config, before)
                assert shared.setdefault(names[before], fields) == fields
    assert shared.keys() == {"sft", "pairs", "rm"}


def test_toy_frontier_runs_are_valid():
    for panel in toy_frontier.PANELS:
        runs = [
            toy_frontier.config_of(panel, method, value, 0)
            for method, (_, values, _) in toy_frontier.SWEEPS.items()
            for value in values
        ]
        for config, stage in runs:
            config_checks.validate(config)
            assert configs.folder_names(config)[stage] == config.run
        assert len({config.run for config, _ in runs}) == 20


def sampled(folder, run) -> dict[str, float]:
    """What `evaluate` measures of a run's policy from samples, as it would where nothing can be
    enumerated.
    """
    mesh = sharding.make_mesh()
    start, end = (loading.open_checkpoint(str(folder / name / "hf")) for name in ("sft", run))
    ids = [np.array([prompt], np.int32) for prompt in np.resize(toy.PROMPTS, 8192)]
    found = prompts.Prompts(ids, start.tokenizer.batch_decode(ids))
    values, _ = reward_kl.evaluate(
        end.load(mesh, append_eos=False),
        start.load_params(mesh),
        found,
        make.make_reward("toy", "", 64, mesh),
        Sampling(toy.LENGTH, batch_size=4096),
    )
    return values


def test_frontier_points_are_inside_bound(tmp_path):
    """Of a random reference and a random reward model: best of one is the reference, and nothing
    beats the bound.
    """
    config, _ = toy_frontier.config_of("a", "ppo", 3.0, 0)
    run = Run(config, tmp_path, sharding.make_mesh(devices=jax.devices()[:1]))
    plant(run, "sft")
    plant(run, "rm", head="reward")
    rows = toy_frontier.exact_rows(tmp_path, "a", 0, [])
    assert {row["method"] for row in rows} == {
        "best_of_n",
        "rm_optimum",
        "preferred_ft_closed_form",
    }
    assert min(row["gap"] for row in rows) >= -1e-4
    best = {row["parameter"]: row for row in rows if row["method"] == "best_of_n"}
    assert best["N=1"]["kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < best["N=4"]["kl"] < np.log(4) and best["N=4"]["reward"] > best["N=1"]["reward"]
    optima = [row for row in rows if row["method"] == "rm_optimum"]
    # Beta falls from one optimum to the next.
    assert all(a["kl"] < b["kl"] for a, b in zip(optima, optima[1:], strict=False))


@pytest.mark.slow
def test_toy_frontier_equals_theory(tmp_path):
    """Panel (a), two seeds: exact facts only; which method is ahead is reported, not asserted."""
    rows = toy_frontier.run(str(tmp_path), ["a"], jobs=2)
    assert json.loads((tmp_path / "frontier.json").read_text()) == rows
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert min(row["gap"] for row in rows) >= -1e-4  # the bound is never crossed
    last = {(row["method"], row["parameter"], row["seed"]): row for row in rows}
    for seed in (0, 1):
        for beta in ("β=5", "β=2"):
            row = last["dpo", beta, seed]
            assert abs(row["reward"] - row["analytic_reward"]) < 0.03, (beta, seed)
            assert abs(row["kl"] - row["analytic_kl"]) < 0.02, (beta, seed)
        closed = last["preferred_ft_closed_form", "", seed]
        assert abs(last["preferred_ft", "", seed]["reward"] - closed["reward"]) < 0.03
        assert abs(last["preferred_ft", "", seed]["kl"] - closed["kl"]) < 0.03
    for run, row in (
        ("dpo_2", last["dpo", "β=2", 0]),
        ("dpo_0.5", last["dpo", "β=0.5", 0]),
        ("ppo_gt_1", last["ppo_gt", "target 1", 0]),
    ):
        values = sampled(tmp_path / "a-0", run)
        for name, exact in (
            ("reward", row["reward"]),
            ("kl", row["kl"]),
            ("kl_sampled", row["kl"]),
        ):
            error = values[f"frontier/{name}_se"]
            assert abs(values[f"frontier/{name}"] - exact) < 3 * error, (run, name)
            assert error < 0.1
        assert np.isfinite([row["kl"] for row in rows]).all()
