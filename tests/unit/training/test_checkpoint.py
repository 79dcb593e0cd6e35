"""Checkpoints: which is the best, who handles preemption, and what many saves leave open."""

import os
import resource
import threading

import jax.numpy as jnp
import pytest
from jax.experimental import multihost_utils

from dpo_jax.training import step
from dpo_jax.training.checkpoint import Checkpoints


def test_best_of_equal_checkpoints_is_latest(tmp_path):
    state = step.TrainState(jnp.int32(0), {"w": jnp.zeros(2)}, ())
    for keep, all_saved in ((1, False), (1, True), (3, True)):
        with Checkpoints(
            tmp_path / f"{keep}{all_saved}", keep=keep, best_metric="rewards_eval/accuracies"
        ) as saved:
            for number, accuracy in enumerate((0.6, 0.7, 0.7, 0.6), 1):
                better = saved.is_better(accuracy)
                assert better == (number < 4)
                if better or all_saved:
                    saved.save(number, state, {"rewards_eval/accuracies": accuracy})
            assert saved.best() == (3, 0.7)


def test_save_leaves_preemption_to_loop(tmp_path, monkeypatch):
    """orbax would ask jax with the step, and so move the number at which processes stop
    together.
    """
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    with Checkpoints(tmp_path, keep=1) as saved:
        saved.save(1, step.TrainState(jnp.int32(1), {"w": jnp.zeros(2)}, ()))
    assert not asked


def test_saves_leave_nothing_open(tmp_path):
    """Each save of orbax's opens three files and a thread; a day's run has hundreds of saves."""
    state = step.TrainState(jnp.int32(1), {"w": jnp.zeros(2)}, ())
    opened, threads = [], []
    with Checkpoints(tmp_path, keep=1) as saved:
        for number in range(1, 6):
            saved.save(number, state)
            saved._checkpointer.wait()
            opened.append(len(os.listdir("/proc/self/fd")))
            threads.append(threading.active_count())
    assert opened[-1] <= opened[1], opened
    assert threads[-1] <= threads[1], threads


def test_save_that_fails_is_told_once(tmp_path, capfd):
    """On a full disk; here by a limit of a file's size, which any user may set."""
    state = step.TrainState(jnp.int32(1), {"w": jnp.arange(5000.0)}, ())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError) as failed, Checkpoints(tmp_path, keep=1) as saved:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            saved.save(1, state)
            saved.save(2, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path}: a checkpoint could not be written" in str(failed.value)
    assert "run the same command again" in str(failed.value)
    assert "Traceback" not in capfd.readouterr().err
    with Checkpoints(tmp_path, keep=1) as saved:
        assert saved.latest() is None
