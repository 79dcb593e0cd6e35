"""How an evaluation of several processes ends by a signal."""

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
