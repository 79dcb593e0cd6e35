"""The zoo of losses on the toy: its grids, its runs, and the arithmetic of its table."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import config_checks, loss_table
from dpo_jax.parallel import sharding
from dpo_jax.pipeline.run import Run
from dpo_jax.training import losses
from experiments import loss_zoo
from tests.helpers.paths import ROOT
from tests.helpers.tiny_runs import on_devices, plant

RESULTS = ROOT / "experiments" / "results" / "loss_zoo"


def test_zoo_has_every_loss():
    drawn = set()
    for name, line in loss_zoo.LINES.items():
        for value in line.values:
            config, stage = loss_zoo.config_of(name, value, 0, "bradley_terry")
            config_checks.validate(config)
            assert config[stage][line.strength] == value
        if stage == "dpo":
            drawn |= {*loss_table.names(config.dpo.loss), config.dpo.divergence}
    left_out = {"sigmoid_norm", "ipo"}  # see the test below
    assert drawn == (loss_table.LOSSES.keys() | loss_table.DIVERGENCES.keys()) - left_out


def test_losses_left_out_are_others_on_the_toy():
    """All responses have five tokens, so a mean over tokens is a fifth of the sum."""
    chosen, rejected = jnp.array([2.0, -1.0, 0.3]), jnp.array([-1.5, 3.0, 0.2])
    lengths = jnp.full(3, 5.0)
    pairs = losses.Pairs(chosen, rejected, chosen, rejected, lengths, lengths)
    np.testing.assert_allclose(
        losses.sigmoid_norm(pairs, 5 * 0.7), losses.sigmoid(pairs, 0.7), rtol=1e-6
    )
    np.testing.assert_allclose(
        25 * losses.ipo(pairs, 5 * 0.7), losses.ipo_sum(pairs, 0.7), rtol=1e-6
    )


def test_zoo_resumes(tmp_path, monkeypatch, capsys):
    """Two losses, one without a reference; the runs that have rows are not made again."""
    make = loss_zoo.config_of

    def small(*args):
        config, stage = make(*args)
        config.data.update(max_rows=64, max_eval_rows=16)
        config.pairs.prompts = 32
        config.sampling.batch_size = 64
        config.dpo.batch_size = 64
        return config, stage

    lines = {
        "sigmoid": loss_zoo.Line("sigmoid", {}, "beta", (2, 0.5)),
        "orpo": loss_zoo.Line("orpo", dict(loss="orpo"), "orpo_lambda", (1, 3), "λ "),
    }
    monkeypatch.setattr(loss_zoo, "config_of", small)
    monkeypatch.setattr(loss_zoo, "LINES", lines)
    config, _ = small("sigmoid", 2, 0, "bradley_terry", 4)
    config.stages, config.run = ("sft", "pairs"), ""
    options = dict(seeds=1, steps=4, processes=1)
    with on_devices(1):
        plant(Run(config, tmp_path / "bradley_terry-0", sharding.make_mesh()), "sft")
        first = loss_zoo.run(str(tmp_path), ["sigmoid"], ["bradley_terry"], **options)
        result = loss_zoo.run(str(tmp_path), list(lines), ["bradley_terry"], **options)

    assert json.loads((tmp_path / "loss_zoo.json").read_text()) == json.loads(json.dumps(result))
    rows = result["rows"]
    assert [(row["loss"], row["value"]) for row in rows] == [
        ("sigmoid", 2),
        ("sigmoid", 0.5),
        ("orpo", 1),
        ("orpo", 3),
    ]
    assert rows[:2] == first["rows"]
    assert all(row["kl"] > 0 and row["gap"] > -1e-6 for row in rows)
    assert len({row["kl"] for row in rows}) == 4
    assert (tmp_path / "bradley_terry.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "bradley_terry-0" / "orpo_3" / "hf").exists()
    # Of finished runs nothing is left to do, and their folders are not asked for.
    monkeypatch.setattr(loss_zoo, "run_line", None)
    monkeypatch.setattr(loss_zoo, "prepare", None)
    again = loss_zoo.run(str(tmp_path), list(lines), ["bradley_terry"], **options)
    assert again["rows"] == rows
    assert "| orpo | λ 1 to 3 |" in capsys.readouterr().out


def test_gap_is_interpolated_along_the_root_of_kl():
    rows = [
        dict(kl=4.0, gap=0.5, chosen=-3.0),
        dict(kl=1.0, gap=0.1, chosen=1.0),
        dict(kl=None, gap=None),
    ]
    assert loss_zoo.at_kl(rows, 1.0) == pytest.approx(0.1)
    assert loss_zoo.at_kl(rows, 2.25) == pytest.approx(0.3)  # the root is half way
    assert loss_zoo.at_kl(rows, 2.25, "chosen") == pytest.approx(-1)
    assert loss_zoo.at_kl(rows, 0.9) is None and loss_zoo.at_kl(rows, 4.1) is None
    assert loss_zoo.at_kl(rows[2:], 1.0) is None


def test_interval_is_students():
    """The half width of three values: t(0.975, 2) standard errors."""
    mean, half = loss_zoo.interval([1.0, 2.0, 6.0])
    assert mean == 3 and half == pytest.approx(4.30265 * np.sqrt(7 / 3), rel=1e-5)


def zoo_rows(loss, gaps, kls=(0.25, 5.0), value=1.0):
    """Return rows of three seeds, whose gap is the same at both KLs."""
    rows = []
    for seed, gap in enumerate(gaps):
        for place, kl in enumerate(kls):
            row = dict(labels="bradley_terry", loss=loss, value=value / (1 + place), seed=seed)
            rows.append(row | dict(step=240, reward=0.0, kl=kl, gap=gap, chosen=-1.0))
    return rows


def test_summary_compares_seed_by_seed():
    rows = zoo_rows("sigmoid", (0.1, 0.2, 0.6)) + zoo_rows("hinge", (0.2, 0.3, 0.7), (0.25, 2.5))
    rows += [dict(rows[0], loss="hinge", value=0.1, kl=None, gap=None, reward=None)]
    sigmoid, hinge = loss_zoo.summary(rows)
    assert sigmoid["gaps"]["2"] == pytest.approx(loss_zoo.interval([0.1, 0.2, 0.6]))
    assert sigmoid["diverged"] == 0
    assert sigmoid["gaps"].keys() == {"0.5", "1", "2", "4"}
    assert hinge["gaps"].keys() == {"0.5", "1", "2"}  # 4 is beyond its runs
    mean, half = hinge["difference"]
    assert mean == pytest.approx(0.1) and half == pytest.approx(0, abs=1e-9)
    assert hinge["kl"] == [0.25, 2.5] and hinge["diverged"] == 1
    text = loss_zoo.table([sigmoid, hinge], "bradley_terry")
    assert "| – | +0.100 ± 0.000 | -1.00 | 0.25 to 2.5 |" in text.splitlines()[-1]


def test_committed_summary_follows_from_its_rows():
    result = json.loads((RESULTS / "loss_zoo.json").read_text())
    rows = result["rows"]
    assert json.loads(json.dumps(loss_zoo.summary(rows))) == result["summary"]
    # Every run of every line is there, and none is above the bound.
    found = {(row["labels"], row["loss"], row["value"], row["seed"]) for row in rows}
    for name, line in loss_zoo.LINES.items():
        for value in line.values:
            for seed in range(loss_zoo.SEEDS):
                assert ("bradley_terry", name, value, seed) in found
    assert len(found) == len(rows)
    assert min(row["gap"] for row in rows if row["gap"] is not None) > -1e-4
