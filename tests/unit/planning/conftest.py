"""A machine without the GPU compiler, whether or not it is installed."""

import pytest

from dpo_jax.planning import topologies


@pytest.fixture
def without_gpu_compiler(monkeypatch):
    """Make plans for GPUs estimates, as where the compiler is not installed."""

    def missing():
        raise topologies.MissingCompiler("pip install the GPU compiler")

    monkeypatch.setattr(topologies, "check_gpu_compiler", missing)
