"""The sweep command: one run for each value of a field."""

import collections
import csv
import json
import subprocess
import sys

import jax
import pytest
from matplotlib import axes as axes_class

from configs import toy
from dpo_jax import report, sweep
from dpo_jax.evaluation import plots
from dpo_jax.training.metrics import read_rows
from tests.faults import files
from tests.helpers.paths import ROOT
from tests.helpers.tiny_runs import dpo_config, environment, on_devices


@pytest.fixture
def traces():
    """How often each function is traced, by name, from here to the end of the test."""
    found = collections.Counter()

    def count(event, _seconds, fun_name="", **_labels):
        if event == "/jax/core/compile/jaxpr_trace_duration":
            found[fun_name] += 1

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(count)
    yield found
    jax.monitoring.unregister_event_duration_listener(count)


def test_sweep_shares_reference_and_program(model, pairs, tmp_path, capsys, traces):
    config = dpo_config(model, pairs)
    with on_devices(1):
        made = sweep.run(config, str(tmp_path), ["dpo.beta=0.1,1"])
    out = capsys.readouterr().out
    runs = {point.values["dpo.beta"]: rows for point, rows in made}
    assert runs.keys() == {"0.1", "1"} and runs["1"] == read_rows(
        tmp_path / "dpo-beta1" / "metrics.jsonl"
    )
    assert runs["0.1"][-1]["loss/eval"] != runs["1"][-1]["loss/eval"]
    assert out.count("train rows to compute") == 1 and out.count("train rows are in") == 1
    assert traces["train_step"] == 1, "the second run has the first one's program"
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("dpo.beta "))
    assert lines[head].split("  ")[-3:] == ["eval loss", "eval accuracy", "eval margin"] and [
        line.split()[0] for line in lines[head + 1 : head + 3]
    ] == ["0.1", "1"]
    assert (tmp_path / "sweep_dpo.beta.png").read_bytes().startswith(b"\x89PNG")
    file = tmp_path / "config.py"
    file.write_text(
        f"from tests.helpers.tiny_runs import dpo_config\ndef get_config():\n"
        f"    return dpo_config({str(model)!r}, {str(pairs)!r})\n"
    )
    again = subprocess.run(
        [
            sys.executable,
            "-m",
            "dpo_jax.sweep",
            f"--config={file}",
            f"--workdir={tmp_path}",
            "--sweep=dpo.beta=0.1,1",
        ],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=environment(1),
    )
    assert (again.returncode, again.stderr) == (0, "") and again.stdout.count("already done") == 2


def evaluated(step, loss, **more):
    """Return a row of an evaluation."""
    return {"step": step, "loss/eval": loss, "rewards_eval/accuracies": 0.75} | more


def test_table_shows_labelled_metrics_of_last_evaluation():
    first, last = evaluated(0, 0.6931), evaluated(9, 0.5, **{"frontier/reward": 1.25})
    training = {"step": 9, "loss/train": 0.4, "lr": 1e-6}
    point = sweep.Point({"dpo.beta": "0.1"}, config=None)
    found = sweep.summaries([(point, [first, last | training, training])])
    text = sweep.table(found, sweep.columns(found, ["dpo.beta"]))
    assert text.splitlines() == [
        "dpo.beta  step  eval loss  eval accuracy  eval reward",
        "0.1          9        0.5           0.75         1.25",
    ]


def test_table_has_means_over_seeds():
    """With Student's interval: 12.71 standard errors of two."""
    runs = []
    for beta, losses in (("0.1", (0.4, 0.6)), ("1", (0.3, 0.3))):
        for seed, loss in enumerate(losses):
            values = {"dpo.beta": beta, "seed": str(seed)}
            runs.append((sweep.Point(values, config=None), [evaluated(9, loss)]))
    found = sweep.summaries(runs)
    assert [(row["dpo.beta"], row["seeds"], row["loss/eval"]) for row in found] == [
        ("0.1", 2, 0.5),
        ("1", 2, 0.3),
    ]
    assert found[0]["loss/eval_high"] == pytest.approx(0.5 + 12.706 * 0.1, abs=1e-3)
    text = sweep.table(found, sweep.columns(found, ["dpo.beta", "seed"]))
    assert text.splitlines()[1].split("  ")[0] == "0.1" and "0.5 [" in text


def test_table_of_seeds_that_end_at_other_steps():
    """A row has all of their steps; an accuracy's interval ends at 1."""
    runs = []
    for seed, (step, accuracy) in enumerate(((6, 0.6), (9, 0.9))):
        row = evaluated(step, 0.5) | {"rewards_eval/accuracies": accuracy}
        runs.append((sweep.Point({"seed": str(seed)}, config=None), [row]))
    found = sweep.summaries(runs)
    text = sweep.table(found, sweep.columns(found, ["seed"]))
    assert text.splitlines() == [
        "seeds  steps        eval loss  eval accuracy",
        "    2  6 to 9  0.5 [0.5, 0.5]    0.75 [0, 1]",
    ]


@pytest.mark.parametrize(
    "text, said",
    [
        ("dpo.gamma=1,2", "a field of the config, such as dpo.lr=1e-6,1e-5"),
        ("beta=1", "a field of the config"),
        ("sft.lr=1,2", "this config runs no stage sft"),
        ("dpo.beta", "expected FIELD=V1,V2"),
        ("dpo.beta=", "expected FIELD=V1,V2"),
        ("run=a,b", "run cannot be swept"),
        ("stages=sft,dpo", "stages cannot be swept"),
    ],
)
def test_points_refuses_what_is_no_sweep(model, pairs, text, said):
    with pytest.raises(ValueError, match=f"^--sweep={text}: .*{said}"):
        sweep.points(dpo_config(model, pairs), [text])


def test_seeds_are_those_of_the_last_training_stage(model, pairs):
    config = dpo_config(model, pairs)
    assert sweep.with_seeds(config, ["dpo.beta=1,2"], 1) == ["dpo.beta=1,2"]
    swept = sweep.with_seeds(config, ["dpo.beta=1,2"], 3)
    assert swept == ["dpo.beta=1,2", "dpo.seed=0,1,2"] and len(sweep.points(config, swept)) == 6
    config.dpo.seed = 7
    assert sweep.with_seeds(config, [], 2) == ["dpo.seed=7,8"]
    assert sweep.points(config, ["dpo.seed=7,8"])[0].config.run == ""
    with pytest.raises(ValueError, match="nothing is swept: give --sweep=FIELD=V1,V2"):
        sweep.with_seeds(config, [], 1)


def test_points_refuses_a_field_twice(model, pairs):
    with pytest.raises(ValueError, match="--sweep=dpo.beta=3: dpo.beta is swept twice"):
        sweep.points(dpo_config(model, pairs), ["dpo.beta=1,2", "dpo.beta=3"])


@pytest.mark.parametrize(
    "sweeps, said",
    [
        (["dpo.seed=0,0"], "0 and 0 are the same value of dpo.seed"),
        (["dpo.beta=1,2,1.0"], "1 and 1.0 are the same value of dpo.beta"),
        (["seed=0,1", "dpo.seed=0,1"], "seed is swept too, and a table takes"),
    ],
)
def test_points_refuses_runs_that_are_no_others(model, pairs, sweeps, said):
    with pytest.raises(ValueError, match=f"^--sweep={sweeps[-1]}: {said}"):
        sweep.points(dpo_config(model, pairs), sweeps)


def test_seeds_of_evaluation_are_no_seeds_of_training():
    """A table is of what training measured: the same run counts once, for each other value."""
    swept = sweep.points(toy.get_config(), ["dpo.beta=1,2", "evaluate.seed=0,1"])
    runs = [(point, [evaluated(9, 0.5)]) for point in swept]
    kept = [point.values for point, _ in sweep.trained_once(runs)]
    assert kept == [
        {"dpo.beta": "1", "evaluate.seed": "0"},
        {"dpo.beta": "2", "evaluate.seed": "0"},
    ]
    swept = sweep.points(toy.get_config(), ["dpo.seed=0,1"])
    assert len(sweep.trained_once([(point, []) for point in swept])) == 2


def test_points_of_several_fields_are_all_combinations(model, pairs):
    """The last training stage's are in the run's name, others in the folder's."""
    config = toy.get_config()
    swept = sweep.points(config, ["pairs.prompts=10300,50", "dpo.beta=2,1", "seed=0,3"])
    assert [(point.folder, point.config.run) for point in swept] == [
        ("", ""),
        ("seed3", ""),
        ("", "dpo-beta1"),
        ("seed3", "dpo-beta1"),
        ("pairs.prompts50", ""),
        ("pairs.prompts50-seed3", ""),
        ("pairs.prompts50", "dpo-beta1"),
        ("pairs.prompts50-seed3", "dpo-beta1"),
    ]
    last = swept[-1].config
    assert (last.pairs.prompts, last.dpo.beta, last.seed) == (50, 1, 3)
    ranks = sweep.points(dpo_config(model, pairs), ["model.lora.rank=2,4"])
    assert [point.folder for point in ranks] == ["model.lora.rank2", "model.lora.rank4"]


def test_runs_share_the_stages_that_depend_on_no_swept_field(tmp_path):
    config = toy.get_config()
    swept = sweep.points(config, ["pairs.prompts=50,60", "seed=0,3"])
    for _ in range(2):  # again, with the links there
        sweep.share_stages(tmp_path, config, swept)
    links = {}
    for path in sorted(tmp_path.glob("*/*")):
        if path.is_symlink():
            links[str(path.relative_to(tmp_path))] = str(path.resolve().relative_to(tmp_path))
    folders = (
        "pairs.prompts50",
        "pairs.prompts50-seed3",
        "pairs.prompts60",
        "pairs.prompts60-seed3",
    )
    expected = {f"{folder}/reference": "reference" for folder in folders}
    expected |= {
        "pairs.prompts50/sft": "sft",
        "pairs.prompts60/sft": "sft",
        "pairs.prompts60-seed3/sft": "pairs.prompts50-seed3/sft",
    }
    assert links == expected


def test_runs_that_train_alike_share_the_last_stage_too(tmp_path):
    config = toy.get_config()
    config.rounds = 2
    swept = sweep.points(config, ["dpo.beta=1,2", "evaluate.seed=0,1"])
    sweep.share_stages(tmp_path, config, swept)
    names = ["sft", "pairs", "dpo", "dpo-beta1", "round_2/dpo", "round_2/dpo-beta1"]
    for name in names:
        path = tmp_path / "evaluate.seed1" / name
        assert path.is_symlink() and path.resolve() == tmp_path / name
    assert not (tmp_path / "evaluate.seed1" / "evaluate").exists()


def test_sweep_of_an_earlier_stage_and_of_seeds(tmp_path, capsys):
    """One SFT model and two sets of pairs, each with two seeds of training."""
    config = files.small_config("dpo")
    config.evaluate.show = 0
    with on_devices(1):
        made = sweep.run(config, str(tmp_path), ["pairs.prompts=20,24", "dpo.seed=0,1"])
    out = capsys.readouterr().out
    assert out.count("sft: exported") == 1 and out.count("dpo: exported") == 4
    assert len({json.dumps(rows[-1]["loss/train"]) for _, rows in made}) == 4
    assert (tmp_path / "pairs.prompts20" / "dpo-seed1" / "done.json").exists()
    with open(tmp_path / "sweep_pairs.prompts-dpo.seed.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["pairs.prompts"], row["seeds"]) for row in rows] == [("20", "2"), ("24", "2")]
    low, mean, high = (float(rows[0][f"loss/eval{end}"]) for end in ("_low", "", "_high"))
    assert low < mean < high
    for suffix in (".png", ".pdf", ".md", ".tex"):
        assert (tmp_path / f"sweep_pairs.prompts-dpo.seed{suffix}").stat().st_size > 100
    # WORKDIR's page has all runs, and what they share once.
    names = [record.name for record in report.records_of(tmp_path)]
    assert [name for name in names if name.endswith("sft")] == ["sft"]
    assert {"dpo", "dpo-seed1", "pairs.prompts20/dpo", "pairs.prompts20/dpo-seed1"} < {*names}
    assert "pairs.prompts20/dpo-seed1" in (tmp_path / "report.html").read_text()


def test_a_run_that_diverges_is_left_out(model, pairs, tmp_path, capsys):
    config = dpo_config(model, pairs, max_grad_norm=0.0, optimizer="sgd", warmup_steps=0)
    with on_devices(1):
        made = sweep.run(config, str(tmp_path), ["dpo.lr=1e38,1e-3"])
    assert [point.values for point, _ in made] == [{"dpo.lr": "1e-3"}]
    with open(tmp_path / "sweep_dpo.lr.csv") as file:
        assert [row["dpo.lr"] for row in csv.DictReader(file)] == ["1e-3"]
    out = capsys.readouterr().out
    assert "dpo stopped at step 1" in out and "dpo.lr = 1e38 diverged, and is left out." in out
    with on_devices(1), pytest.raises(FloatingPointError, match="dpo stopped at step 1"):
        sweep.run(config, str(tmp_path / "all"), ["dpo.lr=1e38,9e37"])


def test_a_shared_stage_that_diverges_is_tried_once(tmp_path, capsys):
    config = files.small_config("dpo")
    config.sft.update(lr=1e38, max_grad_norm=0.0, optimizer="sgd", warmup_steps=0)
    with on_devices(1), pytest.raises(FloatingPointError, match="sft stopped at step"):
        sweep.run(config, str(tmp_path), ["dpo.beta=0.1,1", "dpo.seed=0,1"])
    out = capsys.readouterr().out
    assert out.count("sft: self-check") == 1 and out.count("---") == 4


def test_sweep_with_nothing_held_out(model, pairs, tmp_path, capsys):
    config = dpo_config(model, pairs)
    config.data.eval_fraction = 0.0
    with on_devices(1):
        sweep.run(config, str(tmp_path), ["dpo.beta=0.1,1"])
    assert "No run was evaluated while it trained" in capsys.readouterr().out
    assert not list(tmp_path.glob("sweep_*"))


def test_curves_of_seeds_end_with_the_first(tmp_path, monkeypatch):
    drawn = []

    def kept(axes, x, y, *args, **options):
        drawn.append((list(x), list(y)))
        return errorbar(axes, x, y, *args, **options)

    errorbar = axes_class.Axes.errorbar
    monkeypatch.setattr(axes_class.Axes, "errorbar", kept)
    seeds = [[evaluated(4, 0.6), evaluated(2, 0.5)], [evaluated(2, 0.7)]]
    plots.curves(tmp_path / "curves.png", {"0.1": seeds}, "dpo.beta")
    assert drawn[0] == ([2], [pytest.approx(0.6)])


def test_points_of_names_and_wrong_values(model, pairs):
    swept = sweep.points(dpo_config(model, pairs), ["dpo.loss=sigmoid,ipo"])
    assert [point.values["dpo.loss"] for point in swept] == ["sigmoid", "ipo"]
    config, changed = (point.config for point in swept)
    assert (config.run, changed.run) == ("", "dpo-lossipo")  # sigmoid is the config's own
    assert config.dpo.cache_reference and changed.dpo.cache_reference
    with pytest.raises(ValueError, match="config.dpo.beta = -1"):
        sweep.points(dpo_config(model, pairs), ["dpo.beta=0.1,-1"])
    none = dpo_config(model, pairs, reference="none")
    assert not sweep.points(none, ["dpo.beta=0.1"])[0].config.dpo.cache_reference
    assert not sweep.points(dpo_config(model, pairs), ["dpo.loss=orpo"])[
        0
    ].config.dpo.cache_reference


def test_points_of_mixtures_are_separated_by_semicolons(model, pairs):
    config = dpo_config(model, pairs)
    points = sweep.points(config, ["dpo.loss=sigmoid;sigmoid=1,nll=0.2;simpo,nll=1"])
    assert [point.values["dpo.loss"] for point in points] == [
        "sigmoid",
        "sigmoid=1,nll=0.2",
        "simpo,nll=1",
    ]
    runs = [point.config.run for point in points]
    assert runs == ["", "dpo-losssigmoid-1-nll-0.2", "dpo-losssimpo-nll-1"]
    assert [point.config.dpo.cache_reference for point in points] == [True, True, False]
    (point,) = sweep.points(config, ["dpo.loss=sigmoid=1,nll=0.2;"])
    assert point.values["dpo.loss"] == "sigmoid=1,nll=0.2"
    with pytest.raises(ValueError, match="expected a semicolon after each value"):
        sweep.points(config, ["dpo.loss=sigmoid=1,nll=0.2"])


@pytest.mark.parametrize("swept", ["dpo.ld_alpha=0.5,1", "dpo.reference_every=4,0"])
def test_points_keep_no_reference_that_moves_or_is_asked_for_parts(model, pairs, swept):
    points = sweep.points(dpo_config(model, pairs), [swept])
    assert [point.config.dpo.cache_reference for point in points] == [False, True]
