"""Metrics: names, descriptions, files and the progress line."""

import dataclasses
import json
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest

from dpo_jax import console
from dpo_jax.data.batches import Batches
from dpo_jax.data.examples import Examples
from dpo_jax.data.packing import RolloutTargets
from dpo_jax.evaluation import plots
from dpo_jax.models import transformer
from dpo_jax.training import metric_names, metrics, objectives
from dpo_jax.training.objectives import OBJECTIVE_NUMBERS, OBJECTIVES
from tests.helpers.tiny import random_pairs


def test_named_as_reference_code():
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


@pytest.mark.parametrize("split", ["train", "eval"])
def test_describe_metrics_of_objectives(tiny, split):
    config, params = tiny
    of_head = dict(rm="reward", ppo="lm_value")
    for name in OBJECTIVES:
        model = dataclasses.replace(config, head=of_head.get(name, "lm"))
        measured = metrics_of(name, model)
        for full_name in metrics.named(dict.fromkeys(measured, (0.0, 1)), split):
            if not (name == "ppo" and split == "eval"):  # it samples, and holds nothing out
                assert metric_names.describe(full_name).meaning, full_name


def metrics_of(name, model) -> list[str]:
    """Return the names of an objective's metrics, without running it."""
    responses = 1 if name in ("sft", "preferred_ft", "kto") else 2
    examples = Examples()
    for number, pair in enumerate(random_pairs(2)):
        label = number == 0 if name == "kto" else None
        examples.append(pair.prompt, pair.responses[:responses], "a row", label=label)
    sizes = [sum(example.completion_lengths()) for example in examples]
    of_examples = [np.zeros(size, np.float32) for size in sizes]
    rollout = RolloutTargets(of_examples, of_examples, of_examples, of_examples)
    batches = Batches(examples, np.array([[0, 1]]), share=False, rollout=rollout)
    microbatch = jax.tree.map(lambda x: x[0], batches[0])
    hyper = dict.fromkeys((*OBJECTIVE_NUMBERS, "mismatched_log_ratio"), np.float32(0.5))
    abstract = transformer.abstract(model)
    measure = objectives.make(name, model, "sigmoid")
    reference = abstract if name == "kto" else None
    _, found = jax.eval_shape(measure, abstract, reference, hyper, microbatch)
    return list(found)


def test_describe_what_is_shown():
    for name in (*console.SHOWN, *plots.CURVES, *metric_names.TIMINGS, *metric_names.OF_UPDATE):
        assert metric_names.describe(name).meaning
    with pytest.raises(KeyError):
        metric_names.describe("loss/test")


def test_add_weights_by_rows():
    total = metrics.add(metrics.add(None, {"loss": (8.0, 8)}), {"loss": (4.0, 1)})
    assert metrics.named(total, "eval") == {"loss/eval": 12 / 9}


def test_writer_rewind(tmp_path):
    writer = metrics.Writer(tmp_path)
    for step in range(5):
        writer.write(step, {"loss/train": float(step)})
        if step == 2:
            written = writer.written
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss/tr')
    writer.rewind(2, written)
    writer.write(3, {"loss/train": 30.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss/train"]) for row in rows] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda lines: [*lines[:1], "{garbage", *lines[2:]], [0, 2]),
        (lambda lines: lines[1:], [1, 2]),
        (lambda lines: [lines[0].replace("0.0", "9.0"), *lines[1:]], [0, 1, 2]),
        (lambda lines: [], []),
    ],
)
def test_writer_rewind_keeps_damaged_file(tmp_path, capsys, change, left):
    """Rows that are missing, changed or no rows are told of, and nothing is deleted."""
    writer = metrics.Writer(tmp_path)
    for step in range(3):
        writer.write(step, {"loss/train": float(step)})
    written = writer.written
    path = tmp_path / "metrics.jsonl"
    damaged = "".join(line + "\n" for line in change(path.read_text().splitlines()))
    path.write_text(damaged)
    assert not metrics.holds(path, written)

    metrics.Writer(tmp_path).rewind(2, written)
    assert [row["step"] for row in metrics.read_rows(path)] == left
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == damaged
    said = capsys.readouterr().out
    assert "no longer holds the 3 rows that were written up to step 2" in said
    assert f"{len(left)} rows of the file can be read and are kept" in said


@pytest.mark.parametrize(
    "rows", [[dict(step=2, loss=0.5)], []], ids=["evaluation lost", "row lost"]
)
def test_writer_amend_leaves_one_row_of_a_step(tmp_path, rows):
    writer = metrics.Writer(tmp_path)
    for row in [dict(step=1, loss=0.7), *rows, dict(step=3, loss=0.4)]:
        writer.write(row["step"], {"loss": row["loss"]})
    writer.amend(2, {"loss/eval": 0.6})
    found = metrics.read_rows(tmp_path / "metrics.jsonl")
    row = (rows[0] if rows else dict(step=2)) | {"loss/eval": 0.6}
    assert [row["step"] for row in found] == [1, 2, 3] and found[1] == row
    # A checkpoint that is saved next knows the file as it is now.
    writer.write(4, dict(loss=0.3))
    assert metrics.holds(tmp_path / "metrics.jsonl", writer.written) and writer.written["rows"] == 4


@pytest.mark.parametrize("line", ['{"step": 1, "loss": "0.7"}', '{"step": 1, "loss": [0.7]}'])
def test_read_rows_names_what_is_no_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n')
    with pytest.raises(ValueError, match="metrics.jsonl line 2 is not a row of metrics"):
        metrics.read_rows(path)


def test_read_rows_names_damaged_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\n{"step": 3}\n{"st')
    with pytest.raises(ValueError, match=f"^{path} line 2 is not a row of metrics"):
        metrics.read_rows(path)


def test_writer_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX", reason="TensorBoard needs tensorboardX")
    with metrics.Writer(tmp_path, tensorboard=True) as writer:
        writer.write(7, {"rewards_train/margins": 0.5})
    events = next(tmp_path.glob("events.out.tfevents*")).read_bytes()
    assert b"rewards_train/margins" in events


def test_tensorboard_drops_steps_that_are_written_again(tmp_path):
    pytest.importorskip("tensorboardX", reason="TensorBoard needs tensorboardX")
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    with metrics.Writer(tmp_path, tensorboard=True) as writer:
        for step in (0, 1, 2, 3):
            writer.write(step, {"loss/train": 1.0})
    (first,) = tmp_path.glob("events.out.tfevents*")
    # Files are named after the second in which they are made.
    first.rename(tmp_path / "first")
    with metrics.Writer(tmp_path, tensorboard=True) as writer:
        writer.write(2, {"loss/train": 2.0})
    (second,) = tmp_path.glob("events.out.tfevents*")
    starts = []
    data = second.read_bytes()
    while data:  # a length of 8 bytes, its checksum of 4, the event, its checksum of 4
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        if event.session_log.status == SessionLog.START:
            starts.append(event.step)
        data = data[16 + length :]
    assert starts == [2]


def test_writer_wandb(tmp_path, monkeypatch):
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


COMPLETIONS = [
    dict(prompt="2 + 2 =", completion=" 4\n<b>", reward=0.5),
    dict(prompt="a\nb", completion="", reward=-1.0),
]


def test_completions_as_text():
    assert metrics.completions_text(COMPLETIONS).splitlines() == [
        "--- '2 + 2 ='",
        "(0.500) ' 4\\n<b>'",
        "--- 'a\\nb'",
        "(-1.000) ''",
    ]
    assert metrics.completions_text([dict(prompt="p", completion="c")]) == "--- 'p'\n'c'"


def test_completions_go_to_tensorboard_and_no_file(tmp_path):
    pytest.importorskip("tensorboardX", reason="TensorBoard needs tensorboardX")
    with metrics.Writer(tmp_path, tensorboard=True) as writer:
        writer.show(0, COMPLETIONS)
        writer.write(0, {"loss/eval": 0.5})
    events = next(tmp_path.glob("events.out.tfevents*")).read_bytes()
    assert b"    --- '2 + 2 ='\n    (0.500) ' 4\\n<b>'" in events
    assert metrics.read_rows(tmp_path / "metrics.jsonl") == [{"step": 0, "loss/eval": 0.5}]


def test_completions_go_to_wandb(tmp_path, monkeypatch):
    logged = []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: None
    )
    fake = types.SimpleNamespace(init=lambda **_: run, Table=lambda columns, data: (columns, data))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with metrics.Writer(tmp_path, wandb="project") as writer:
        writer.show(3, COMPLETIONS)
        writer.write(3, {"loss/eval": 0.5})
    table = (["prompt", "completion", "reward"], [list(row.values()) for row in COMPLETIONS])
    assert logged == [(3, {"completions": table}), (3, {"loss/eval": 0.5})]


def test_wandb_that_does_not_answer_holds_nothing(tmp_path, monkeypatch, capsys):
    answers = threading.Event()

    def init(**_):
        answers.wait()
        return types.SimpleNamespace(log=lambda values, step: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setattr(metrics, "SENDING", 0.1)
    began = time.monotonic()
    with metrics.Writer(tmp_path, wandb="project") as writer:
        writer.write(1, {"loss/train": 2.0})
    assert time.monotonic() - began < 10
    answers.set()
    assert metrics.read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss/train": 2.0}]
    assert "Weights & Biases has not taken all rows 0.1 s after the last" in capsys.readouterr().out


def test_wandb_that_refuses_stops_no_run(tmp_path, monkeypatch, capsys):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty)\nmore")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with metrics.Writer(tmp_path, wandb="project") as writer:
        writer.write(1, {"loss/train": 2.0})
    assert len(metrics.read_rows(tmp_path / "metrics.jsonl")) == 1
    said = capsys.readouterr().out
    assert "takes nothing more (RuntimeError: api_key not configured (no-tty)). Training" in said


@pytest.mark.parametrize(
    "library, option", [("tensorboardX", dict(tensorboard=True)), ("wandb", dict(wandb="p"))]
)
def test_writer_names_missing_library(tmp_path, monkeypatch, library, option):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"pip install {library}"):
        metrics.Writer(tmp_path, **option)


def test_progress_off_a_terminal(capsys):
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
