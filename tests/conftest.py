"""Eight fake CPU devices for every test, and the small things that several tests share."""

import os
import pathlib
import tempfile

# Less work for the compiler, whose time is most of the tests'; commands that tests start inherit
# it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also where a TPU's or a GPU's library is installed
if (
    "PYTEST_XDIST_WORKER" not in os.environ
):  # runs share what they compile, in a cache that goes when the tests end
    CACHE = tempfile.TemporaryDirectory()
    os.environ |= dict(
        JAX_COMPILATION_CACHE_DIR=CACHE.name, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"
    )

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

from dpo_jax.models.transformer import (
    TransformerConfig,
    init,  # noqa: E402   devices are counted at import
)

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"

needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason="needs the real data in ../shared/data"
)


def tiny_config(**fields) -> TransformerConfig:
    """A two-layer rotary decoder with 40 tokens."""
    return TransformerConfig(
        **dict(
            vocab=40,
            width=16,
            layers=2,
            heads=4,
            kv_heads=2,
            head_width=4,
            mlp_width=32,
            max_positions=64,
            rope_width=4,
        )
        | fields
    )


LONGEST = (
    "test_toy_run.py",
    "test_baselines.py",
    "test_fit.py",
    "test_resume.py",
    "test_step.py",
    "test_reference.py",
)


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left alone with one at the end."""
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
        )
    )


@pytest.fixture(scope="session")
def tiny():
    """A tiny model: (config, weights large enough that its log-probs are far from uniform)."""
    config = tiny_config()
    return config, jax.jit(lambda key: jax.tree.map(lambda x: x * 8, init(config, key)))(
        jax.random.key(0)
    )


def random_pairs(count, seed=0, vocab=40, longest=12) -> list:
    """(prompt, (chosen, rejected)) of random lengths, 1 to `longest` tokens each."""
    rng = np.random.default_rng(seed)

    def tokens():
        return rng.integers(0, vocab, rng.integers(1, longest + 1)).astype(np.int32)

    return [(tokens(), (tokens(), tokens())) for _ in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama in Hugging Face format."""
    from tiny_runs import write_model

    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file of sixty pairs."""
    from tiny_runs import write_pairs

    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")
