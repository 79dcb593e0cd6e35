"""Per-token KLs against the whole distribution of each step in float64; log-probs have tests in
test_layout.py.
"""

import types

import jax
import numpy as np
import pytest

from dpo_jax.data.batches import Batches, evaluation_order
from dpo_jax.models import log_probs, transformer
from dpo_jax.models.log_probs import token_kls
from tests.helpers.tiny import random_pairs
from tests.helpers.tiny_models import random_params

PAIRS = random_pairs(60, seed=5)
SHARDS = 2


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So small that the scored tokens of a shard need several."""
    monkeypatch.setattr("dpo_jax.models.log_probs.CHUNK_LOGITS", 1)


@pytest.fixture(scope="module")
def batches():
    return Batches(PAIRS, evaluation_order(len(PAIRS), len(PAIRS)), shards=SHARDS)


@pytest.fixture(scope="module")
def batch(batches):
    return jax.tree.map(lambda x: x[0], batches[0])


def test_ratios_and_kls_equal_float64(tiny, batches, batch):
    config, policy = tiny
    reference = random_params(config)
    ratio_SM, kl_SM = jax.jit(token_kls, static_argnums=0)(config, policy, reference, batch)
    assert ratio_SM.shape == kl_SM.shape == batch["targets"].shape
    rows = [
        np.concatenate([prompt, response]) for prompt, responses in PAIRS for response in responses
    ]
    tokens_BT = np.array([np.pad(row, (0, 24 - len(row))) for row in rows])
    logits = jax.jit(transformer.logits, static_argnums=0)
    policy_BTV, reference_BTV = (
        x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
        for x in (
            np.asarray(logits(config, params, tokens_BT), np.float64)
            for params in (policy, reference)
        )
    )
    ratio_BTV = policy_BTV - reference_BTV
    kl_BT = (np.exp(policy_BTV) * ratio_BTV).sum(-1)
    assert kl_BT.min() > 0 and np.ptp(kl_BT) > 1
    ratios, kls = (batches.per_row(0, np.asarray(x)[None]) for x in (ratio_SM, kl_SM))
    for row, (prompt, responses) in enumerate(PAIRS):
        steps = [
            (2 * row + side, len(prompt) - 1 + t, token)
            for side, response in enumerate(responses)
            for t, token in enumerate(response)
        ]
        np.testing.assert_allclose(ratios[row], [ratio_BTV[step] for step in steps], atol=2e-4)
        np.testing.assert_allclose(kls[row], [kl_BT[step[:2]] for step in steps], atol=2e-4)


def test_a_models_kl_to_itself_is_nothing(tiny, batch):
    config, policy = tiny
    for x_SM in jax.jit(token_kls, static_argnums=0)(config, policy, policy, batch):
        np.testing.assert_array_equal(x_SM, 0)


def test_the_distributions_of_all_steps_are_never_in_memory(tiny, batch):
    config, policy = tiny
    scored = batch["targets"].shape[1]
    jaxpr = str(jax.make_jaxpr(lambda params: token_kls(config, params, params, batch))(policy))
    chunk = -(-scored // -(-scored // 128))
    assert (
        scored > 256
        and f"{scored},{config.vocab}]" not in jaxpr
        and f"{chunk},{config.vocab}]" in jaxpr
    )


@pytest.mark.parametrize(
    "kind, gib",
    [
        ("TPU v4", 30.75),
        ("TPU v5 lite", 15.75),
        ("TPU v5p", 95.74),
        ("NVIDIA H200", 141e9 / 2**30),
        ("cpu", None),
        ("NVIDIA L4", None),
    ],
)
def test_a_chunk_takes_its_share_of_the_chips_memory(tiny, monkeypatch, kind, gib):
    """The share is made so small that 128 positions fill it; unknown chips and CPUs go by a number
    of their own.
    """
    config, params = tiny
    monkeypatch.setattr(
        log_probs, "device", lambda: types.SimpleNamespace(platform="tpu", device_kind=kind)
    )
    monkeypatch.setattr(log_probs, "CHUNK_SHARE", 4 * 128 * config.vocab / ((gib or 1) * 2**30))
    monkeypatch.setattr(log_probs, "CHUNK_LOGITS", 64 * 128 * config.vocab)
    x_SMD = np.zeros((SHARDS, 500, config.width), np.float32)
    targets_SM = np.zeros((SHARDS, 500), np.int32)
    jaxpr = jax.make_jaxpr(lambda *arrays: log_probs.target_logprobs(config, *arrays))(
        params, x_SMD, targets_SM
    )
    assert [
        equation.params["length"] for equation in jaxpr.eqns if equation.primitive.name == "scan"
    ] == ([] if gib is None else [4])
