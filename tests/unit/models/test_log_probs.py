"""Log-probs of responses against each sequence alone; per-token KLs against float64."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data import packing
from dpo_jax.data.batches import FILLER, Batches, evaluation_order
from dpo_jax.data.examples import Example
from dpo_jax.models import log_probs, transformer
from dpo_jax.models.log_probs import (
    by_example,
    example_log_probs,
    likeliest_tokens,
    response_log_probs,
    token_kls,
    token_log_probs,
)
from dpo_jax.models.transformer import LayerKind
from tests.helpers.tiny import random_pairs, tiny_config
from tests.helpers.tiny_models import random_params

LOGITS = jax.jit(transformer.logits, static_argnums=0)
LOG_PROBS = jax.jit(response_log_probs, static_argnums=0)
SUMS = jax.jit(example_log_probs, static_argnums=0, static_argnames=("squares", "shared"))
PAIRS = random_pairs(60, seed=5)
SHARDS = 2


@pytest.fixture
def small_chunks(monkeypatch):
    """So small that the completion tokens of a shard need several."""
    monkeypatch.setattr("dpo_jax.models.log_probs.CHUNK_LOGITS", 1)


@pytest.fixture(scope="module")
def batches():
    order = evaluation_order(len(PAIRS), len(PAIRS))
    return Batches(PAIRS, order, shards=SHARDS, share=False)


@pytest.fixture(scope="module")
def batch(batches):
    return jax.tree.map(lambda x: x[0], batches[0])


@pytest.mark.usefixtures("small_chunks")
def test_token_kls_equal_float64(tiny, batches, batch):
    config, policy = tiny
    reference = random_params(config)
    ratio_SM, kl_SM = jax.jit(token_kls, static_argnums=0)(config, policy, reference, batch)
    assert ratio_SM.shape == kl_SM.shape == batch.targets.shape
    rows = [
        np.concatenate([pair.prompt, response]) for pair in PAIRS for response in pair.responses
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
    ratios, kls = (batches.per_example(0, batch, np.asarray(x)) for x in (ratio_SM, kl_SM))
    for row, (prompt, responses) in enumerate((pair.prompt, pair.responses) for pair in PAIRS):
        steps = [
            (2 * row + side, len(prompt) - 1 + t, token)
            for side, response in enumerate(responses)
            for t, token in enumerate(response)
        ]
        np.testing.assert_allclose(ratios[row], [ratio_BTV[step] for step in steps], atol=2e-4)
        np.testing.assert_allclose(kls[row], [kl_BT[step[:2]] for step in steps], atol=2e-4)


@pytest.mark.usefixtures("small_chunks")
def test_token_kls_to_itself_are_0(tiny, batch):
    config, policy = tiny
    for x_SM in jax.jit(token_kls, static_argnums=0)(config, policy, policy, batch):
        np.testing.assert_array_equal(x_SM, 0)


@pytest.mark.usefixtures("small_chunks")
def test_token_kls_never_make_full_logits(tiny, batch):
    config, policy = tiny
    positions = batch.targets.shape[1]
    jaxpr = str(jax.make_jaxpr(lambda params: token_kls(config, params, params, batch))(policy))
    chunk = -(-positions // -(-positions // 128))
    assert (
        positions > 256
        and f"{positions},{config.vocab}]" not in jaxpr
        and f"{chunk},{config.vocab}]" in jaxpr
    )


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("share", [False, True])
def test_sums_of_examples_equal_float64(tiny, share):
    """Sums of squared probabilities, and of the first tokens, against each sequence alone."""
    config, params = tiny
    # Each response is in two pairs, which cut it to different lengths.
    pairs = []
    for pair, other in zip(PAIRS, PAIRS[1:], strict=False):
        chosen, _ = pair.responses
        pairs += [pair, Example(pair.prompt, (chosen, other.responses[1]))]
    order = evaluation_order(len(pairs), len(pairs))
    batches = Batches(pairs, order, shards=SHARDS, share=share)
    batch = jax.tree.map(lambda x: x[0], batches[0])
    sums = jax.device_get(SUMS(config, params, batch, squares=True, shared=True)._asdict())
    indices = batches.indices(0).reshape(batch.weights.shape)
    for place in np.ndindex(indices.shape):
        if indices[place] == FILLER:
            continue
        pair = pairs[indices[place]]
        shorter = min(map(len, pair.responses))
        for side, response in enumerate(pair.responses):
            ids = np.concatenate([pair.prompt, response])
            tokens_BT = np.pad(ids, (0, 24 - len(ids)))[None]
            logits_TV = np.asarray(LOGITS(config, params, tokens_BT)[0], np.float64)
            logits_TV = logits_TV[len(pair.prompt) - 1 :][: len(response)]
            log_probs_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)
            log_probs_T = log_probs_TV[np.arange(len(response)), response]
            squares_T = np.logaddexp.reduce(2 * log_probs_TV, axis=-1)
            for name, expected in (
                ("log_probs", log_probs_T.sum()),
                ("log_sum_squares", squares_T.sum()),
                ("shared_log_probs", log_probs_T[:shorter].sum()),
            ):
                found = sums[name][place][side]
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-4)


def test_what_is_not_asked_for_is_not_made(tiny, batch):
    config, params = tiny
    sums = SUMS(config, params, batch)
    assert sums.log_sum_squares is None and sums.shared_log_probs is None
    plain = by_example(LOG_PROBS(config, params, batch), batch)
    np.testing.assert_array_equal(sums.log_probs, plain)


def test_squares_have_no_gradient(tiny, batch):
    config, params = tiny
    gradient = jax.jit(
        jax.grad(
            lambda params: example_log_probs(
                config, params, batch, squares=True
            ).log_sum_squares.sum()
        )
    )(params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


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
def test_chunk_size_by_chip_memory(tiny, monkeypatch, kind, gib):
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
    jaxpr = jax.make_jaxpr(lambda *arrays: log_probs.target_log_probs(config, *arrays))(
        params, x_SMD, targets_SM
    )
    assert [
        equation.params["length"] for equation in jaxpr.eqns if equation.primitive.name == "scan"
    ] == ([] if gib is None else [4])


def plain_log_probs(config, params, prompt, response):
    """Log-probs of a response's tokens, from the full logits of its own sequence, in float64."""
    tokens = np.concatenate([prompt, response])
    # One shape, compiled once; causal, so it changes nothing.
    padded = np.pad(tokens, (0, 32 - len(tokens)))
    logits = np.asarray(LOGITS(config, params, padded[None])[0, : len(tokens)], np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_probs[np.arange(len(prompt) - 1, len(tokens) - 1), response]


def expected_log_probs(config, params, examples):
    return [
        plain_log_probs(config, params, example.prompt, r).sum()
        for example in examples
        for r in example.responses
    ]


def flat(examples, share=True, buckets=packing.BUCKETS, shape=None):
    limits = packing.RowLimits(buckets=buckets)
    shape = shape or packing.shape_of(examples, share=share, limits=limits)
    return jax.tree.map(lambda x: x[None], packing.pack(examples, shape, share=share))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("buckets", [1, 3])
def test_response_log_probs_equal_sequences_alone(tiny, share, buckets):
    config, params = tiny
    examples = random_pairs(5)
    found = LOG_PROBS(config, params, flat(examples, share, buckets))[0]
    np.testing.assert_allclose(found, expected_log_probs(config, params, examples), atol=2e-4)


def test_pack_shared_equals_separate_in_gradient(tiny):
    config, params = tiny
    examples = random_pairs(4, seed=1)

    def loss(params, batch):
        return (response_log_probs(config, params, batch)[0] * jnp.arange(1.0, 9)).sum()

    shared, apart = (
        jax.jit(jax.grad(loss))(params, flat(examples, share, buckets))
        for share, buckets in ((True, 4), (False, 1))
    )
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(apart))
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * largest)


def test_padding_changes_no_gradient(tiny):
    config, params = tiny
    examples = random_pairs(3, seed=2)
    small = packing.shape_of(examples)
    large = dataclasses.replace(
        small,
        tokens=small.tokens + 37,
        rows=tuple(
            bucket._replace(
                prompt=bucket.prompt and bucket.prompt + 5, response=bucket.response + 11
            )
            for bucket in small.rows
        ),
        completion_tokens=small.completion_tokens + 29,
    )

    value_and_grad = jax.jit(
        jax.value_and_grad(lambda params, batch: response_log_probs(config, params, batch).sum())
    )
    found, wanted = (
        value_and_grad(params, flat(examples, shape=shape)) for shape in (large, small)
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(wanted[1]))
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        # Float32's own error against float64 here: 2.3e-5.
        np.testing.assert_allclose(a, b, atol=3e-5 * largest)


def test_learned_positions_restart_after_prompt():
    config = tiny_config(learned_positions=True, pattern=(LayerKind(),), kv_heads=4, norm="layer")
    params = jax.jit(lambda key: jax.tree.map(lambda x: x * 8, transformer.init(config, key)))(
        jax.random.key(3)
    )
    examples = random_pairs(3, seed=4)
    found = LOG_PROBS(config, params, flat(examples))[0]
    np.testing.assert_allclose(found, expected_log_probs(config, params, examples), atol=2e-4)


def test_token_log_probs_in_chunks(tiny, monkeypatch):
    config, params = tiny
    batch = flat(random_pairs(40, seed=5))

    def value_and_grad():
        return jax.jit(jax.value_and_grad(lambda p: token_log_probs(config, p, batch).sum()))(
            params
        )

    whole = value_and_grad()
    monkeypatch.setattr("dpo_jax.models.log_probs.CHUNK_LOGITS", 128 * config.vocab)
    assert batch.targets.shape[1] > 128  # more than one chunk
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(value_and_grad()), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3)


def test_token_log_probs_never_make_full_logits(tiny, monkeypatch):
    config, params = tiny
    monkeypatch.setattr("dpo_jax.models.log_probs.CHUNK_LOGITS", 128 * config.vocab)
    batch = flat(random_pairs(60, seed=6))
    positions = batch.targets.shape[1]
    grad = jax.grad(lambda p: token_log_probs(config, p, batch).sum())
    jaxpr = str(jax.make_jaxpr(grad)(params))
    chunk = -(-positions // -(-positions // 128))
    assert (
        positions > 256
        and f"{positions},{config.vocab}]" not in jaxpr
        and f"{chunk},{config.vocab}]" in jaxpr
    )


def test_likeliest_tokens_equal_sorted_float64(tiny, monkeypatch):
    """In chunks and in one piece, without logits of all positions."""
    config, params = tiny
    batch = flat(random_pairs(60, seed=6))

    @jax.jit
    def all_logits(params):
        hidden = log_probs.completion_hidden(config, params, batch)
        return transformer.unembed(config, params, hidden)

    logits = np.asarray(all_logits(params), np.float64)
    expected = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    monkeypatch.setattr("dpo_jax.models.log_probs.CHUNK_LOGITS", 128 * config.vocab)
    found = jax.jit(likeliest_tokens, static_argnums=(0, 3))(config, params, batch, 3)
    of_target_SM, ids_SMk, of_top_SMk = (np.asarray(x) for x in found)
    np.testing.assert_array_equal(ids_SMk, np.argsort(-expected, axis=-1)[..., :3])
    np.testing.assert_allclose(of_top_SMk, -np.sort(-expected, axis=-1)[..., :3], atol=1e-5)
    of_target = np.take_along_axis(expected, batch.targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(of_target_SM, of_target, atol=1e-5)

    positions = batch.targets.shape[1]
    jaxpr = str(jax.make_jaxpr(lambda p: likeliest_tokens(config, p, batch, 3))(params))
    assert positions > 256 and f"{positions},{config.vocab}]" not in jaxpr
