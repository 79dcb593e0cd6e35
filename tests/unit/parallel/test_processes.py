"""What process 0 tells the others."""

import json
import signal

import jax
import numpy as np
import pytest
from jax._src import compiler
from jax.experimental import multihost_utils

from dpo_jax.parallel import processes
from dpo_jax.workdir import StageChanged


@pytest.mark.parametrize(
    "error, kind",
    [
        (StageChanged("--config.seed differs"), StageChanged),
        (FileNotFoundError("no such file"), FileNotFoundError),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), RuntimeError),  # needs five arguments
    ],
)
def test_errors_travel_as_text(error, kind):
    header = json.loads(json.dumps(processes._header(None, error)))
    made = processes._error(**header["error"])
    assert type(made) is kind and str(error) in str(made)


def test_results_travel_as_json():
    assert processes._header({"rows": [1, None]}, None) == dict(value={"rows": [1, None]})
    header = json.loads(json.dumps(processes._header(np.zeros((2, 3), np.float32), None)))
    assert header == dict(array=dict(dtype="<f4", shape=[2, 3]))


def test_an_empty_variable_keeps_no_compiled_programs(monkeypatch):
    folder = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        processes.keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)


def test_compiled_programs_in_a_bucket_are_kept_by_jax_alone(monkeypatch):
    """XLA's cache for GPUs would be beside jax's, where XLA cannot write."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_enable_xla_caches")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setattr(processes, "_problem_of_bucket", lambda folder: "")
    try:
        jax.config.update("jax_compilation_cache_dir", "gs://bucket/compiled")
        processes.keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir == "gs://bucket/compiled"
        options = compiler.get_compile_options(1, 1)  # held, as its parts refer to it
        assert (
            not options.executable_build_options.debug_options.xla_gpu_per_fusion_autotune_cache_dir
        )
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


class Others:
    """A company, as a process sees it that all others have let go."""

    def has_left(self):
        return True

    def stop(self, text, status):
        raise AssertionError("nobody is there to be told")


def test_an_error_after_all_have_left_is_a_process_s_own(monkeypatch, capsys):
    """As of an upload, which process 0 makes at the end."""
    monkeypatch.setattr(processes._State, "company", Others())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(OSError, match="no network"), processes.together(lambda error: 1 / 0):
        raise OSError("no network")
    assert "stop" not in capsys.readouterr().err


def test_all_end_by_the_signal_that_came_to_one(monkeypatch):
    reached = iter([False, True, True])
    gathered = [np.array([0, signal.SIGINT]), np.array([0, 0])]
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda number: next(reached)
    )
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: gathered.pop(0))
    assert processes.asked_to_stop(None) is None
    assert processes.asked_to_stop(None) == signal.SIGINT
    assert processes.asked_to_stop(None) == signal.SIGTERM
