"""Checkpoints: which is the best, who handles preemption, and what many saves leave open."""

import os
import threading

import jax.numpy as jnp
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
