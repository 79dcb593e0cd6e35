"""How training ends early: by a signal in an evaluation, or by its patience."""

import json
import operator
import signal
import types

import jax
import pytest

from dpo_jax import stopping
from dpo_jax.training import loop


def after_an_evaluation_that(raises: BaseException, monkeypatch) -> list[int]:
    """Call _Recorder.after with an evaluation that is stopped; return the steps that are saved."""
    saved = []
    recorder = object.__new__(loop._Recorder)
    recorder._pending = None
    recorder._job = types.SimpleNamespace(block=types.SimpleNamespace(eval_every=1, save_every=9))
    recorder._feed = types.SimpleNamespace(total=9)
    recorder.signals = stopping.Signals()

    def evaluate(*_):
        raise raises

    def interrupt(step, *_):
        saved.append(step)
        raise loop.Interrupted(143)

    monkeypatch.setattr(recorder, "_fetch_pending", dict)
    monkeypatch.setattr(recorder, "_evaluate", evaluate)
    monkeypatch.setattr(recorder, "interrupt", interrupt)
    with pytest.raises((loop.Interrupted, type(raises))):
        recorder.after(1, None, {})
    return saved


@pytest.mark.parametrize(
    "count, error, saved",
    [
        (1, stopping.Stopped, [1]),
        (2, stopping.StoppedTogether, [1]),
        (2, stopping.Stopped, []),  # a second Ctrl-C, to one of them: the others still evaluate
    ],
)
def test_only_what_stops_all_processes_is_saved(count, error, saved, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    assert after_an_evaluation_that(error(signal.SIGINT), monkeypatch) == saved


@pytest.mark.parametrize(
    "limit, is_worse, values, over_at",
    [
        (2, operator.lt, [1, 2, 2, 1.5], 4),  # an equal value is no better one
        (2, operator.lt, [1, 0, 1.1, 1, 1], 5),  # a better one begins the wait anew
        (2, operator.gt, [1, 2, 3], 3),  # of a loss
        (1, operator.lt, [1, 1], 2),
        (3, operator.lt, [1, 0, 0], None),
        (0, operator.lt, [1, 0, 0, 0, 0], None),
    ],
)
def test_patience_ends_after_evaluations_without_a_better_one(limit, is_worse, values, over_at):
    """As it does when it is saved and resumed after every evaluation."""
    patience = loop.Patience(limit, is_worse)
    ended = None
    for step, value in enumerate(values, 1):
        resumed = loop.Patience(limit, is_worse)
        resumed.resume(json.loads(json.dumps(patience.kept)))
        patience = resumed
        patience.add(step, value)
        if patience.is_over and ended is None:
            ended = step
    assert ended == over_at


def test_processes_wait_by_the_first_ones_evaluation(monkeypatch):
    """One whose own value differs in its last bit would end, or go on, alone."""
    recorder = object.__new__(loop._Recorder)
    recorder._job = types.SimpleNamespace(block=types.SimpleNamespace(keep_best="loss/eval"))
    recorder.patience = loop.Patience(1, operator.gt)
    monkeypatch.setattr(loop.processes, "from_first", lambda _: 0.5)
    for step in (1, 2):
        recorder.evaluation = {"loss/eval": 0.5 - step / 1e6}
        recorder._wait(step)
    assert recorder.patience.is_over and recorder.patience.best == 0.5


def test_one_evaluation_is_told_in_the_singular(capsys):
    recorder = object.__new__(loop._Recorder)
    block = types.SimpleNamespace(keep_best="loss/eval")
    recorder._job = types.SimpleNamespace(name="dpo", block=block)
    recorder._feed = types.SimpleNamespace(total=9)
    recorder._step = 2
    recorder.patience = loop.Patience(1, operator.gt, best=0.5, best_step=1, waited=1)
    assert recorder.early_stop()["best_step"] == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "at step 2 of 9: 1 evaluation since step 1 brought no better loss/eval" in told
