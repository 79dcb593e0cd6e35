"""The sweep command: one run for each value of a field."""

import collections
import subprocess
import sys

import jax
import pytest

from dpo_jax import sweep
from dpo_jax.training.metrics import read_rows
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
        runs = sweep.run(config, str(tmp_path), "dpo.beta=0.1,1")
    out = capsys.readouterr().out
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


def test_table_shows_labelled_metrics_of_last_evaluation():
    first = {"step": 0, "loss/eval": 0.6931, "rewards_eval/accuracies": 0.0}
    last = {"step": 9, "loss/eval": 0.5, "rewards_eval/accuracies": 0.75, "logps_eval/chosen": -9.0}
    frontier = {"frontier/reward": 1.25, "frontier/kl": 3.0, "frontier/reward_se": 0.1}
    training = {"step": 9, "loss/train": 0.4, "lr": 1e-6}
    text = sweep.table("dpo.beta", {"0.1": [first, last | frontier | training, training]})
    assert text.splitlines() == [
        "dpo.beta           step  eval loss  eval accuracy  eval reward   eval KL",
        "0.1                   9        0.5           0.75         1.25         3",
    ]


@pytest.mark.parametrize(
    "text", ["dpo.gamma=1,2", "data.max_length=1,2", "dpo.beta", "beta=1", "sft.lr=1,2"]
)
def test_points_refuses_what_is_no_sweep(model, pairs, text):
    with pytest.raises(ValueError, match="a field of the last training stage, such as dpo.lr"):
        sweep.points(dpo_config(model, pairs), text)


def test_points_of_names_and_wrong_values(model, pairs):
    (first, config), (second, changed) = sweep.points(
        dpo_config(model, pairs), "dpo.loss=sigmoid,ipo"
    )
    assert (first, second) == ("sigmoid", "ipo")
    assert (config.run, changed.run) == ("", "dpo-lossipo")  # sigmoid is the config's own
    assert config.dpo.cache_reference and changed.dpo.cache_reference
    with pytest.raises(ValueError, match="config.dpo.beta = -1"):
        sweep.points(dpo_config(model, pairs), "dpo.beta=0.1,-1")
    none = dpo_config(model, pairs, reference="none")
    assert not sweep.points(none, "dpo.beta=0.1")[0][1].dpo.cache_reference
    assert not sweep.points(dpo_config(model, pairs), "dpo.loss=orpo")[0][1].dpo.cache_reference


def test_points_of_mixtures_are_separated_by_semicolons(model, pairs):
    config = dpo_config(model, pairs)
    points = sweep.points(config, "dpo.loss=sigmoid;sigmoid=1,nll=0.2;simpo,nll=1")
    assert [value for value, _ in points] == ["sigmoid", "sigmoid=1,nll=0.2", "simpo,nll=1"]
    runs = [point.run for _, point in points]
    assert runs == ["", "dpo-losssigmoid-1-nll-0.2", "dpo-losssimpo-nll-1"]
    assert [point.dpo.cache_reference for _, point in points] == [True, True, False]
    ((value, _),) = sweep.points(config, "dpo.loss=sigmoid=1,nll=0.2;")
    assert value == "sigmoid=1,nll=0.2"
    with pytest.raises(ValueError, match="expected a semicolon after each value"):
        sweep.points(config, "dpo.loss=sigmoid=1,nll=0.2")


@pytest.mark.parametrize("swept", ["dpo.ld_alpha=0.5,1", "dpo.reference_every=4,0"])
def test_points_keep_no_reference_that_moves_or_is_asked_for_parts(model, pairs, swept):
    points = sweep.points(dpo_config(model, pairs), swept)
    assert [point.dpo.cache_reference for _, point in points] == [False, True]
