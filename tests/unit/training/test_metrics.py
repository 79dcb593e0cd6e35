"""Names, files and the progress line."""

import json
import sys
import types

import pytest

from dpo_jax import console
from dpo_jax.training import metrics


def test_names_are_the_reference_codes():
    given = {
        "loss": (6.0, 3),
        "rewards/margins": (1.0, 4),
        "logps/chosen": (-8.0, 2),
        "nll_per_token": (5.0, 5),
    }
    assert metrics.named(given, "eval") == {
        "loss/eval": 2.0,
        "rewards_eval/margins": 0.25,
        "logps_eval/chosen": -4.0,
        "nll_per_token/eval": 1.0,
    }
    assert metrics.named({"grad_norm": (3.0, 1)}, "train") == {"grad_norm": 3.0}


def test_batches_of_unequal_size_are_weighted_by_rows():
    total = metrics.add(metrics.add(None, {"loss": (8.0, 8)}), {"loss": (4.0, 1)})
    assert metrics.named(total, "eval") == {"loss/eval": 12 / 9}


def test_rewind_drops_later_rows_and_a_torn_line(tmp_path):
    writer = metrics.Writer(tmp_path)
    for step in range(5):
        writer.write(step, {"loss/train": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss/tr')
    writer.rewind(2)
    writer.write(3, {"loss/train": 30.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss/train"]) for row in rows] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]


def test_tensorboard_events_hold_the_values(tmp_path):
    pytest.importorskip("tensorboardX", reason="TensorBoard needs tensorboardX")
    with metrics.Writer(tmp_path, tensorboard=True) as writer:
        writer.write(7, {"rewards_train/margins": 0.5})
    events = next(tmp_path.glob("events.out.tfevents*")).read_bytes()
    assert b"rewards_train/margins" in events


def test_wandb_gets_the_rows_and_the_config(tmp_path, monkeypatch):
    logged, started, finished = [], {}, []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: finished.append(True)
    )

    def init(**options):
        started.update(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with metrics.Writer(tmp_path, wandb="project", config={"seed": 3}) as writer:
        writer.write(1, {"loss/train": 2.0})
    assert finished and logged == [(1, {"loss/train": 2.0})]
    assert (
        started["project"] == "project"
        and started["config"] == {"seed": 3}
        and started["resume"] == "allow"
    )


@pytest.mark.parametrize(
    "library, option", [("tensorboardX", dict(tensorboard=True)), ("wandb", dict(wandb="p"))]
)
def test_a_missing_library_is_named_at_the_start(tmp_path, monkeypatch, library, option):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"pip install {library}"):
        metrics.Writer(tmp_path, **option)


def test_off_a_terminal_progress_is_plain_lines_with_the_time_left(capsys):
    progress = console.Progress("dpo", 0, 10, seconds=0)
    progress.update(
        5,
        {
            "loss/train": 0.69314,
            "rewards_train/accuracies": 0.5,
            "rewards_train/margins": 0.01,
            "examples_per_second": 12.0,
        },
    )
    out = capsys.readouterr().out
    assert out.startswith("dpo 5/10  loss 0.6931  accuracy 0.5  margin 0.01  rows/s 12  00:00 left")
    quiet = console.Progress("dpo", 0, 10, seconds=1000)
    quiet.update(1, {})
    quiet.update(2, {})
    quiet.update(10, {})
    assert len(capsys.readouterr().out.splitlines()) == 2  # the first, and the last always
