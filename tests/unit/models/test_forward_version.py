"""FORWARD_VERSION is raised whenever the forward pass gives other numbers.

forward_golden.json holds summed log-probs that this version gives, for every family and variant. To
record those of a new family, or all of them again, once FORWARD_VERSION is raised:

    python -m tests.unit.models.test_forward_version
"""

import json
import pathlib

import jax
import numpy as np
import pytest

from dpo_jax.data import packing
from dpo_jax.data.examples import Example
from dpo_jax.models import families, hf, transformer
from dpo_jax.models.log_probs import FORWARD_VERSION, response_log_probs
from dpo_jax.parallel import sharding
from tests.helpers import tiny_models
from tests.helpers.paths import STORIES

GOLDEN = pathlib.Path(__file__).with_name("forward_golden.json")
PAIRS = 3
CHUNKED = "llama2, logits in chunks"
CASES = [*tiny_models.VARIANTS, CHUNKED]
CHANGED = (
    f"the forward pass gives other log-probs than those of FORWARD_VERSION = {FORWARD_VERSION} "
    "(dpo_jax/models/log_probs.py). If that is not meant, mend it. If it is, raise "
    "FORWARD_VERSION, so that kept reference log-probs are computed again and no unfinished "
    "stage is resumed on other numbers, and record the golden ones again (see this file's top)."
)


def case_config(case: str) -> transformer.TransformerConfig:
    """Return the model of a case; with 2**14 tokens, logits come in chunks of 512 positions."""
    if case == CHUNKED:
        return families.from_hf(tiny_models.hf_config("llama2", vocab_size=2**14))
    return families.from_hf(tiny_models.hf_config(case))


def case_examples(case: str, vocab: int) -> list:
    """Return pairs with a shared prompt, all longer than the window of the variant that has one."""
    rng = np.random.RandomState(0)  # whose numbers are the same in every version of numpy
    longest = 250 if case == CHUNKED else 12

    def tokens():
        return rng.randint(0, vocab, rng.randint(longest // 2, longest + 1)).astype(np.int32)

    return [Example(tokens(), (tokens(), tokens())) for _ in range(PAIRS)]


def case_params(config: transformer.TransformerConfig) -> dict:
    """Return weights that no library's random numbers, and no order of a tree, can change."""

    def draw(path, leaf):
        seed = list(sharding.path_name(path).encode())
        values = np.random.RandomState(seed).standard_normal(leaf.shape)
        is_scale = path[-1].key == "scale"
        return (is_scale + 0.3 * values).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, transformer.abstract(config))


def log_probs_of(config, params, examples) -> np.ndarray:
    """Return the summed log-prob of each response, [pairs, 2]."""
    limits = packing.RowLimits(config.narrowest_window)
    batch = packing.pack(examples, packing.shape_of(examples, limits=limits))
    batch = jax.tree.map(lambda x: x[None], batch)
    log_probs_SQ = jax.jit(lambda params: response_log_probs(config, params, batch))(params)
    return np.asarray(log_probs_SQ).reshape(-1, 2)


def measured(case: str) -> np.ndarray:
    config = case_config(case)
    return log_probs_of(config, case_params(config), case_examples(case, config.vocab))


def test_goldens_are_of_this_version():
    assert json.loads(GOLDEN.read_text())["version"] == FORWARD_VERSION, CHANGED


# Whose arithmetic another case has as well.
ALIKE = ("gpt2-untied", "llama-biased", "mistral", "qwen2", "qwen3-mixed", "phi3-window")


def cases():
    for case in CASES:
        marks = [pytest.mark.slow] if case in ALIKE else []
        yield pytest.param(case, marks=marks)


@pytest.mark.parametrize("case", cases())
def test_forward_version_by_goldens(case):
    golden = json.loads(GOLDEN.read_text())["log_probs"][case]
    np.testing.assert_allclose(measured(case), golden, rtol=1e-5, err_msg=CHANGED)


def test_forward_version_by_published_log_probs():
    """The log-probs that transformers gives a greedy completion of stories260k."""
    golden = json.loads((STORIES / "golden_greedy.json").read_text())
    config = families.from_hf(hf.read_config(STORIES))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    placed = sharding.param_shardings(mesh, transformer.abstract(config))
    params = hf.load(STORIES, config, placed)
    tokens = np.array(golden["tokens"], np.int32)
    example = Example(tokens[:1], (tokens[1:], tokens[1:9]))
    found = log_probs_of(config, params, [example])
    of_next = golden["logprob_of_next"]
    expected = [[sum(of_next), sum(of_next[:8])]]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4, err_msg=CHANGED)


if __name__ == "__main__":
    golden = json.loads(GOLDEN.read_text())
    log_probs = golden["log_probs"] if golden["version"] == FORWARD_VERSION else {}
    for case in CASES:
        if case not in log_probs:
            log_probs[case] = measured(case).astype(float).round(6).tolist()
    GOLDEN.write_text(json.dumps(dict(version=FORWARD_VERSION, log_probs=log_probs)) + "\n")
