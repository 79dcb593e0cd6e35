"""Eight fake CPU devices, quick compiles and a shared compile cache for every test."""

import gc
import os
import tempfile

from tests.helpers.quick_compiles import QUICK_COMPILES

# Commands that tests start inherit it.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILES}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also where a TPU's or a GPU's library is installed
# Programs need not say which line of Python each operation comes from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# The data sets library would tell the hub of every file that it opens, and wait for an answer.
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
if "PYTEST_XDIST_WORKER" not in os.environ:
    # Workers and runs share what they compile, in a cache that goes when the tests end; .ci/run
    # names one that its groups share.
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        CACHE = tempfile.TemporaryDirectory()
        os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402
import pytest  # noqa: E402

# Before anything counts the devices: importing a module of the project may.
jax.config.update("jax_num_cpu_devices", 8)

from dpo_jax.models.transformer import init  # noqa: E402
from tests.helpers.tiny import tiny_config  # noqa: E402

# Those that take longest come first, so that no worker is left alone with one at the end.
LONGEST = (
    "runs/test_python_page.py",
    "runs/test_toy.py",
    "runs/test_baselines.py",
    "runs/test_meshes.py",
    "runs/test_quickstart.py",
    "runs/test_sweep.py",
    "runs/test_damaged_files.py",
    "runs/test_training.py",
    "runs/test_api.py",
    "runs/test_rounds.py",
    "runs/test_resume.py",
    "runs/test_exports.py",
    "runs/test_frozen_dtype.py",
    "runs/test_functions.py",
    "experiments/test_tldr_winrate.py",
    "processes/test_processes.py",
    "processes/test_buckets.py",
    "parity/test_families.py",
    "unit/training/test_step.py",
    "unit/training/test_groups.py",
    "unit/models/test_attention.py",
    "unit/test_api.py",
    "unit/test_command_line.py",
    "unit/evaluation/test_judge.py",
    "unit/planning/test_rehearsal.py",
)


def pytest_collection_modifyitems(items):
    """Order the files: the longest first, then the others as they were found."""

    def place(item):
        found = (n for n, name in enumerate(LONGEST) if item.path.as_posix().endswith(name))
        return next(found, len(LONGEST))

    items.sort(key=place)


def pytest_collection_finish():
    """Collect garbage less often, and only among what the tests make.

    Tracing makes many objects, and each full collection would visit those of every library.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True)
def _signals():
    """Commands that a test runs in this process handle signals; the next test's are not theirs."""
    from tests.helpers.signals import signals_as_before

    with signals_as_before():
        yield


@pytest.fixture(scope="session")
def tiny():
    """A tiny model: (config, weights large enough that log-probs are far from uniform)."""
    config = tiny_config()

    @jax.jit
    def make(key):
        return jax.tree.map(lambda x: x * 8, init(config, key))

    return config, make(jax.random.key(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama in Hugging Face format."""
    from tests.helpers.tiny_runs import write_model

    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file of sixty pairs."""
    from tests.helpers.tiny_runs import write_pairs

    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")
