"""The runs of the IMDb frontier with their seeds, and what is reported of those that are done."""

import csv
import json

import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax import costs
from dpo_jax.training.metrics import read_rows
from dpo_jax.workdir import write_json, write_lines
from experiments import comparisons, cost_table, frontier_file, imdb_frontier
from experiments.imdb_frontier import Run
from tests.helpers.paths import ROOT
from tests.helpers.tiny_runs import experiment_configs

PROMPTS = 64


def test_seeds_are_of_the_runs_that_are_picked():
    names = [run.name for run in imdb_frontier.chosen(["dpo_*"], seeds=2)]
    assert names == [
        f"dpo_{beta}{end}" for beta in ("0.05", "0.1", "1", "5") for end in ("", "_seed1")
    ]
    assert [run.name for run in imdb_frontier.chosen(["ppo_3", "best_of_n"], seeds=1)] == ["ppo_3"]
    assert [run.name for run in imdb_frontier.chosen(["dpo_1_seed2"], seeds=3)] == ["dpo_1_seed2"]
    # The paper has two seeds of Preferred-FT.
    names = [run.name for run in imdb_frontier.chosen(["preferred_ft_*"], seeds=1)]
    assert names == ["preferred_ft_0", "preferred_ft_1"]
    assert len(imdb_frontier.chosen(["*"], seeds=1)) == 22
    with pytest.raises(ValueError, match="--run=dpo_1_seed2 matches no run"):
        imdb_frontier.chosen(["dpo_1_seed2"], seeds=2)


def test_a_seed_trains_one_stage_anew():
    make_config = experiment_configs(str(ROOT / "configs" / "imdb.py"), ["--config.seed=5"])
    config = imdb_frontier.config_of(make_config, Run("ppo", 3.0, 2))
    assert (config.run, config.seed, config.ppo.seed, config.rm.seed) == ("ppo_3_seed2", 5, 2, 0)


def begin(stage_folder, config, stage: str):
    """Write what a stage is made with."""
    fields = configs.dependencies(config, stage)
    begun = dict(stage=stage, depends_on=fields, config=config.to_dict())
    write_json(stage_folder / "config.json", begun)


def plant(folder, make_config, run: Run, kl: float, reward: float, steps=(0, 4, 8)):
    """Make a run done without training: what it measured, and what it took."""
    rng = np.random.default_rng([run.seed, int(100 * kl)])
    noise_U = np.random.default_rng(0).normal(size=PROMPTS) * 0.1  # what prompts have in common
    rewards_U = reward + noise_U + 0.02 * rng.normal(size=PROMPTS)
    kls_U = kl * rng.uniform(0.8, 1.2, PROMPTS)
    values = {f"frontier/{name}": 0.1 for name in imdb_frontier.MEASURED}
    values |= {"frontier/reward": float(rewards_U.mean()), "frontier/kl": float(kls_U.mean())}
    rows = [{"step": step} | values for step in steps]
    if run.stage == "ppo":
        rows += [{"step": 9 + step, "ppo_train/kl": kl * step / 32} for step in range(33)]
    trained, evaluated = folder / run.name, folder / f"evaluate-{run.name}"
    config = imdb_frontier.config_of(make_config, run)
    for made, stage in ((trained, run.stage), (evaluated, "evaluate")):
        made.mkdir(parents=True)
        write_json(made / "done.json", dict(evaluation=values))
        begin(made, config, stage)
    write_lines(trained / "metrics.jsonl", rows)
    costs.write(trained, seconds=60.0, flops=10**12, examples=8, peak_memory=2**30)
    write_json(evaluated / "evaluate.json", values)
    for name, of_prompts in (("", rewards_U), ("reference_", 0.5 + noise_U)):
        lines = [
            dict(
                prompt=f"prompt {u}",
                completion=f"{name}`{run.name}`\n{u}",
                reward=float(value),
                kl=float(kls_U[u]),
            )
            for u, value in enumerate(of_prompts)
        ]
        write_lines(evaluated / f"{name}completions.jsonl", lines)


@pytest.fixture
def make_config():
    return experiment_configs(str(ROOT / "configs" / "imdb.py"), ["--config.seed=5"])


def test_report_of_the_runs_that_are_done(tmp_path, make_config):
    """Without best of N, and with several seeds of some runs: rows, tables and a figure."""
    for seed in (0, 1):
        plant(tmp_path, make_config, Run("dpo", 0.1, seed), 2.0, 0.8)
    plant(tmp_path, make_config, Run("dpo", 1.0), 0.5, 0.6)
    plant(tmp_path, make_config, Run("ppo", 6.0), 0.75, 0.55)
    plant(tmp_path, make_config, Run("ppo", 3.0), 1.25, 0.6)
    plant(tmp_path, make_config, Run("preferred_ft", None), 0.1, 0.52)
    imdb_frontier.report(make_config, tmp_path)

    rows, curves = frontier_file.read(tmp_path / "frontier.json")
    found = {(row["method"], row["value"], row["seed"]) for row in rows}
    assert found == {
        ("reference", None, None),
        ("dpo", 0.1, 5),
        ("dpo", 0.1, 6),
        ("dpo", 1.0, 5),
        ("ppo", 6.0, 5),
        ("ppo", 3.0, 5),
        ("preferred_ft", None, 5),
    }
    of_dpo = [row for row in rows if (row["method"], row["value"]) == ("dpo", 1.0)]
    walk = [(row["step"], row["prompts"]) for row in of_dpo]
    assert walk == [(4, "validation"), (8, "test")]
    (start,) = [row for row in rows if row["method"] == "reference"]
    assert start["kl"] == 0 and start["reward"] == pytest.approx(0.5, abs=0.05)
    assert list(curves["imdb"].rewards) == [start["reward"]]
    for name in ("frontier.png", "frontier.pdf", "frontier.tex", "comparisons.md", "costs.csv"):
        assert (tmp_path / name).stat().st_size > 100

    with open(tmp_path / "comparisons.csv") as file:
        table = {(row["method"], row["parameter"]): row for row in csv.DictReader(file)}
    ppo = table["ppo", "target 3"]
    # Between DPO's runs, at 0.5 and 2 nats, and over the roots of the KL.
    near, far = (table["dpo", parameter] for parameter in ("β=1", "β=0.1"))
    roots = [float(row["kl"]) ** 0.5 for row in (near, ppo, far)]
    share = (roots[1] - roots[0]) / (roots[2] - roots[0])
    low, high = float(near["reward"]), float(far["reward"])
    assert float(ppo["dpo_at_kl"]) == pytest.approx(low + share * (high - low), abs=1e-9)
    assert 0.7 < float(ppo["dpo_at_kl"]) < 0.74
    below = float(ppo["dpo_at_kl"]) - float(ppo["reward"])
    assert float(ppo["below"]) == pytest.approx(below)
    assert float(ppo["below_low"]) < below < float(ppo["below_high"])
    assert (
        float(ppo["behind"]) == pytest.approx(0.2, abs=0.02) and float(ppo["behind_p_holm"]) < 1e-6
    )
    assert ppo["settled"] == "no" and float(ppo["kl_change"]) == pytest.approx(0.25, abs=0.05)
    assert table["dpo", "β=0.1"]["seeds"] == "2" and table["dpo", "β=0.1"]["behind"] == ""

    with open(tmp_path / "prompts.csv") as file:
        of_prompts = list(csv.DictReader(file))
    assert len(of_prompts) == 7 * PROMPTS  # the reference and six runs
    of_ppo = [float(row["reward"]) for row in of_prompts if row["run"] == "ppo_3"]
    assert np.mean(of_ppo) == pytest.approx(float(ppo["reward"]), abs=1e-12)

    page = (tmp_path / "completions.md").read_text()
    assert page.count("\n## ") == imdb_frontier.SHOWN
    first = page.partition("\n## `prompt 0`\n")[2].partition("\n## ")[0].split()
    assert [word for word in first if word.startswith("**")] == [
        "**reference**",
        "**dpo_0.1**",
        "**dpo_1**",
        "**ppo_3**",
        "**ppo_6**",
        "**preferred_ft_0**",
    ]
    assert r"`'ppo_3'\n0`" in first  # one line, without the marks that would end it

    # Methods are there at equal KL though they have other seeds than others.
    with open(tmp_path / "matched_kl.csv") as file:
        matched = {(row["kl"], row["method"]): row for row in csv.DictReader(file)}
    assert matched["1.0", "dpo"]["seeds"] == matched["1.0", "ppo"]["seeds"] == "1"
    assert float(matched["1.0", "ppo"]["behind"]) > 0.05
    with open(tmp_path / "frontier.csv") as file:
        ends = list(csv.DictReader(file))
    assert {row["interval_unit"] for row in ends} == {"prompts"}
    with_seeds = [row["parameter"] for row in ends if row["reward_sd"]]
    assert with_seeds == ["β=0.1"]


def test_committed_comparisons_are_those_of_the_rows():
    """SmolLM2's table by its own rewards and KLs at each prompt, resampled anew."""
    folder = ROOT / "experiments" / "results" / "imdb_smollm2"
    with open(folder / "prompts.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {name: float(row[name]) for name in ("reward", "kl") if row[name]}
    ends, reference_U, prompts = imdb_frontier.ends_of(rows)
    found = comparisons.compare(ends, reference_U, ("dpo", "β=0.1"), prompts)
    with open(folder / "comparisons.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(found) == 8
    for row, of_rows in zip(table, found, strict=True):
        for name, cell in row.items():
            if name.startswith("kl_change") or name == "settled":  # of PPO's steps
                continue
            value = of_rows.get(name)
            if value is None:
                assert cell == "", name
            elif isinstance(value, str):
                assert cell == value, name
            else:
                assert float(cell) == pytest.approx(value), name


def test_report_of_runs_that_have_just_begun(tmp_path, make_config):
    imdb_frontier.report(make_config, tmp_path)
    assert not list(tmp_path.iterdir())
    folder = tmp_path / "dpo_1"
    folder.mkdir()
    begin(folder, imdb_frontier.config_of(make_config, Run("dpo", 1.0)), "dpo")
    values = {f"frontier/{name}": 0.1 for name in imdb_frontier.MEASURED}
    write_lines(folder / "metrics.jsonl", [{"step": 0} | values, {"step": 2} | values])
    imdb_frontier.report(make_config, tmp_path)
    rows, _ = frontier_file.read(tmp_path / "frontier.json")
    assert [row["method"] for row in rows] == ["reference", "dpo"]


@pytest.mark.parametrize("samples", [16, 4])
def test_best_of_n_alone_has_its_results(samples, tmp_path, make_config):
    """Best of 1 is the reference. Few samples tell nothing of the optimum."""
    folder = tmp_path / "best_of_n"
    folder.mkdir()
    (folder / "done.json").write_text("{}")
    rewards = np.random.default_rng(0).uniform(size=(20, samples))
    lines = [
        dict(prompt=f"prompt {u}", completions=[dict(reward=value) for value in row])
        for u, row in enumerate(rewards.tolist())
    ]
    write_lines(folder / "completions.jsonl", lines)
    made = [
        dict(n=1, reward=0.5, reward_se=0.1, kl=0.0),
        dict(n=4, reward=0.8, reward_se=0.1, kl=0.6),
    ]
    write_json(folder / "best_of_n.json", made)
    imdb_frontier.report(make_config, tmp_path)
    rows, curves = frontier_file.read(tmp_path / "frontier.json")
    assert [(row["method"], row["reward"]) for row in rows] == [
        ("reference", 0.5),
        ("best_of_n", 0.5),
        ("best_of_n", 0.8),
    ]
    assert (len(curves["imdb"].kls) > 1) == (samples == 16)


def test_evaluations_of_one_prompt_have_no_error(tmp_path, make_config):
    folder = tmp_path / "dpo_1"
    folder.mkdir()
    begin(folder, imdb_frontier.config_of(make_config, Run("dpo", 1.0)), "dpo")
    values = {
        f"frontier/{name}": 0.1 for name in imdb_frontier.MEASURED if not name.endswith("_se")
    }
    write_lines(folder / "metrics.jsonl", [{"step": 0} | values, {"step": 2} | values])
    imdb_frontier.report(make_config, tmp_path)
    assert "NaN" not in (tmp_path / "frontier.json").read_text()
    rows, _ = frontier_file.read(tmp_path / "frontier.json")
    assert rows[0]["reward_se"] is None and "reward_se" not in rows[1]


def test_runs_on_other_prompts_are_not_compared(tmp_path, make_config):
    plant(tmp_path, make_config, Run("dpo", 1.0), 0.5, 0.6)
    plant(tmp_path, make_config, Run("ppo", 3.0), 1.0, 0.6)
    path = tmp_path / "evaluate-ppo_3" / "completions.jsonl"
    path.write_text(path.read_text().replace("prompt 7", "another"))
    with pytest.raises(ValueError, match="evaluate-ppo_3 has other prompts than the runs before"):
        imdb_frontier.report(make_config, tmp_path)


def test_other_prompts_are_refused_before_training(tmp_path, make_config):
    plant(tmp_path, make_config, Run("dpo", 1.0), 0.5, 0.6)
    other = experiment_configs(
        str(ROOT / "configs" / "imdb.py"), ["--config.seed=5", "--config.evaluate.prompts=64"]
    )
    said = "config.evaluate.prompts = 64, and .*evaluate-dpo_1 has 256: expected the same"
    with pytest.raises(ValueError, match=said):
        imdb_frontier.run(other, str(tmp_path), ["ppo_3"])
    assert not (tmp_path / "sft").exists()


def test_rows_are_of_the_run_and_its_kept_policy(tmp_path, make_config):
    """Whatever seed a later command has; and up to the checkpoint that keep_best chose."""
    run = Run("dpo", 1.0, 1)
    plant(tmp_path, make_config, run, 0.5, 0.6)
    folder = tmp_path / run.name
    values = json.loads((folder / "done.json").read_text())["evaluation"]
    later = values | {"frontier/kl": 9.0}
    write_lines(folder / "metrics.jsonl", [{"step": 4} | values, {"step": 8} | later])
    later_command = experiment_configs(str(ROOT / "configs" / "imdb.py"), [])
    config = imdb_frontier.config_of(later_command, run)
    rows = imdb_frontier.rows_of(tmp_path, config, run)
    assert [(row["step"], row["prompts"], row["seed"]) for row in rows] == [(4, "test", 6)]


def test_settling_is_of_finished_seeds(tmp_path, make_config):
    plant(tmp_path, make_config, Run("dpo", 0.1), 2.0, 0.8)
    for seed in (0, 1):
        plant(tmp_path, make_config, Run("ppo", 3.0, seed), 1.0, 0.6)
    # The first seed stays where it is; the second moves, but has not finished.
    still = [{"step": 9 + step, "ppo_train/kl": 1 + 0.01 * (step % 2)} for step in range(33)]
    path = tmp_path / "ppo_3" / "metrics.jsonl"
    write_lines(path, [*read_rows(path)[:3], *still])
    (tmp_path / "evaluate-ppo_3_seed1" / "done.json").unlink()
    imdb_frontier.report(make_config, tmp_path)
    with open(tmp_path / "comparisons.csv") as file:
        (row,) = [row for row in csv.DictReader(file) if row["method"] == "ppo"]
    assert (row["seeds"], row["settled"]) == ("1", "yes")


def test_below_a_path_says_nothing_beyond_its_end():
    ones_U = np.ones(50)
    noise_U = np.random.default_rng(0).normal(size=50)
    dpo = comparisons.End("dpo", "", 2 * ones_U + noise_U, ones_U)
    path = comparisons.path_of([dpo], ones_U + noise_U)
    near = comparisons.End("ppo", "", 1.25 * ones_U + noise_U, 0.25 * ones_U)
    found = comparisons.below_path(path, near, np.arange(50))
    assert found["difference"] == pytest.approx(0.25) and found["low"] == pytest.approx(0.25)
    assert found["p"] == pytest.approx(2 / 2000)
    beyond = comparisons.End("ppo", "", ones_U, 2 * ones_U)
    found = comparisons.below_path(path, beyond, np.arange(50))
    assert found == dict(difference=None, low=None, high=None, p=None)


def test_few_prompts_have_no_interval():
    """All resamples of one prompt are the same, however many rows it has."""
    ones_U = np.ones(50)
    path = comparisons.path_of([comparisons.End("dpo", "", 2 * ones_U, ones_U)], ones_U)
    near = comparisons.End("ppo", "", 1.25 * ones_U, 0.25 * ones_U)
    found = comparisons.below_path(path, near, np.zeros(50))
    assert found == dict(difference=pytest.approx(0.25), low=None, high=None, p=None)


def test_rows_of_one_prompt_count_as_one():
    """Each prompt's rows alike, four times: the interval is that of a fourth as many rows."""
    rng = np.random.default_rng(0)
    once, start = rng.normal(size=(2, 16))
    tables = []
    for times in (1, 4):
        rewards_U, reference_U = np.repeat(once, times), np.repeat(start, times)
        ends = [
            comparisons.End("dpo", "β=1", rewards_U, np.ones(16 * times)),
            comparisons.End("ppo", "", reference_U + 0.1, np.full(16 * times, 0.5)),
        ]
        prompts_U = np.repeat([f"prompt {number}" for number in range(16)], times)
        tables.append(comparisons.compare(ends, reference_U, ("dpo", "β=1"), prompts_U))
    for name in ("reward_low", "behind_low", "behind_p", "below_low", "below_p"):
        for row, other in zip(*tables, strict=True):
            assert row.get(name) == (pytest.approx(other[name]) if name in row else None)


def test_settling():
    """A KL that moves either way has not settled, nor a run of which one seed has not."""
    still, rising = [5.0] * 40, list(np.linspace(0, 6, 40))
    falling = list(np.linspace(9, 3, 40))
    assert comparisons.settling([[1.0] * 7]) == comparisons.settling([still, [1.0]]) == {}
    assert comparisons.settling([still, still]) == pytest.approx(
        dict(kl_change=0.0, kl_change_low=0.0, kl_change_high=0.0, settled="yes")
    )
    # On a straight line the slope is exact: 10 steps of 6/39, beside a mean of the last ten.
    assert comparisons.settling([rising]) == pytest.approx(
        dict.fromkeys(
            ["kl_change", "kl_change_low", "kl_change_high"], 60 / 39 / (6 - 4.5 * 6 / 39)
        )
        | dict(settled="no")
    )
    found = comparisons.settling([still, falling, still])
    assert found["settled"] == "no" and found["kl_change"] < -0.3


@pytest.mark.parametrize(("steps", "noise"), [(24, 0.08), (400, 0.05), (24, 0.02)])
def test_noise_alone_is_not_called_movement(steps, noise):
    """Of runs whose KL stands still, few are said to move; where noise hides it, none can tell."""
    rng = np.random.default_rng(0)
    said = []
    for _ in range(400):
        kls = 2.3 * (1 + noise * rng.normal(size=steps))
        found = comparisons.settling([kls.tolist()])
        assert found["kl_change_low"] < found["kl_change"] < found["kl_change_high"]
        said.append(found["settled"])
    assert said.count("no") / len(said) < 0.03
    if (steps, noise) == (24, 0.08):
        assert said.count("cannot tell") > 300
    else:
        assert said.count("yes") > 300


@pytest.mark.parametrize(
    ("field", "values"), [("dpo.beta", "0.05, 0.1, 1, 5"), ("ppo.target_kl", "3, 6, 9, 12")]
)
def test_swept_fields_are_not_overridden(field, values):
    with pytest.raises(ValueError, match=f"--config.{field} would do nothing.* to {values}, one"):
        imdb_frontier.refuse_swept({"dpo.steps": "7", field: "0.2"})
    imdb_frontier.refuse_swept({"dpo.steps": "7", "unlikelihood.lr": "0.2"})


def test_costs_are_sums_over_the_stages_of_a_method(tmp_path, make_config):
    """Without SFT, which all share; means over the runs of a method."""
    for name, seconds, samples in (("sft", 900, 0), ("pairs", 60, 400), ("rm", 30, 0)):
        (tmp_path / name).mkdir()
        costs.write(tmp_path / name, seconds=seconds, samples=samples, peak_memory=2**30)
    for name, seconds in (("ppo_3", 600), ("ppo_6", 1200)):
        (tmp_path / name).mkdir()
        costs.write(
            tmp_path / name, seconds=seconds, samples=1000, peak_memory=2**31, flops=3 * 10**12
        )
    runs = [imdb_frontier.config_of(make_config, Run("ppo", value)) for value in (3.0, 6.0)]
    (row,) = cost_table.rows_of(tmp_path, dict(ppo=runs))
    assert (row["stages"], row["runs"], row["samples"]) == ("pairs, rm, ppo", 2, 1400)
    assert (row["minutes"], row["gib"], row["teraflops"]) == (16.5, 2, 3)
    (tmp_path / "rm" / "cost.json").unlink()  # as of an earlier version
    (row,) = cost_table.rows_of(tmp_path, dict(ppo=runs))
    assert (row["minutes"], row["gib"], row["samples"]) == (None, None, None)
