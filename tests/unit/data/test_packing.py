"""The flat layout against the definition: each sequence on its own."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data import packing
from dpo_jax.models import transformer
from dpo_jax.models.log_probs import response_logprobs, token_logprobs
from tests.helpers.tiny import random_pairs, tiny_config

LOGITS = jax.jit(transformer.logits, static_argnums=0)
LOGPROBS = jax.jit(response_logprobs, static_argnums=0)


def plain_logprobs(config, params, prompt, response):
    """Log-probs of a response's tokens, from the full logits of its own sequence, in float64."""
    tokens = np.concatenate([prompt, response])
    padded = np.pad(
        tokens, (0, 32 - len(tokens))
    )  # one shape, compiled once; causal, so it changes nothing
    logits = np.asarray(LOGITS(config, params, padded[None])[0, : len(tokens)], np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logp[np.arange(len(prompt) - 1, len(tokens) - 1), response]


def expected_logprobs(config, params, examples):
    return [
        plain_logprobs(config, params, p, r).sum() for p, responses in examples for r in responses
    ]


def flat(examples, share_prompt=True, buckets=packing.BUCKETS, shape=None):
    shape = shape or packing.shape_of(examples, share_prompt=share_prompt, buckets=buckets)
    return jax.tree.map(lambda x: x[None], packing.pack(examples, shape, share_prompt=share_prompt))


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("buckets", [1, 3])
def test_flat_batch_equals_each_sequence_alone(tiny, share_prompt, buckets):
    config, params = tiny
    examples = random_pairs(5)
    found = LOGPROBS(config, params, flat(examples, share_prompt, buckets))[0]
    np.testing.assert_allclose(found, expected_logprobs(config, params, examples), atol=2e-4)


def test_shared_prompt_and_separate_rows_have_equal_gradients(tiny):
    config, params = tiny
    examples = random_pairs(4, seed=1)

    def loss(params, batch):
        return (response_logprobs(config, params, batch)[0] * jnp.arange(1.0, 9)).sum()

    shared, apart = (
        jax.jit(jax.grad(loss))(params, flat(examples, share, buckets))
        for share, buckets in ((True, 4), (False, 1))
    )
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(apart))
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * largest)


def test_padding_changes_nothing_even_in_the_gradient(tiny):
    config, params = tiny
    examples = random_pairs(3, seed=2)
    small = packing.shape_of(examples)
    large = packing.Shape(
        small.tokens + 37, tuple((r, t + 11) for r, t in small.rows), small.scored + 29
    )

    value_and_grad = jax.jit(
        jax.value_and_grad(lambda params, batch: response_logprobs(config, params, batch).sum())
    )
    found, wanted = (
        value_and_grad(params, flat(examples, shape=shape)) for shape in (large, small)
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(wanted[1]))
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(
            a, b, atol=3e-5 * largest
        )  # float32's own error against float64 here: 2.3e-5


def test_learned_positions_restart_at_the_end_of_the_prompt():
    config = tiny_config(learned_positions=True, rope_width=0, kv_heads=4, norm="layer")
    params = jax.jit(lambda key: jax.tree.map(lambda x: x * 8, transformer.init(config, key)))(
        jax.random.key(3)
    )
    examples = random_pairs(3, seed=4)
    found = LOGPROBS(config, params, flat(examples))[0]
    np.testing.assert_allclose(found, expected_logprobs(config, params, examples), atol=2e-4)


def test_every_response_token_is_scored_once_and_no_prompt_token(tiny):
    examples = [(np.array([1, 2, 3]), (np.array([4, 5]), np.array([6])))]
    batch = packing.pack(examples, packing.shape_of(examples))
    assert batch["tokens"].tolist() == [1, 2, 3, 4, 5, 6]
    assert batch["positions"].tolist() == [0, 1, 2, 3, 4, 3]
    assert batch["predict"].tolist() == [
        2,
        3,
        2,
    ]  # the prompt's last token predicts both first ones
    assert batch["targets"].tolist() == [4, 5, 6]
    assert batch["owner"].tolist() == [0, 0, 1]
    assert batch["counts"].tolist() == [2, 1]


def needs_of(batches):
    return packing.needs_of_lengths(
        *map(np.stack, zip(*map(packing.lengths_of, batches), strict=True))
    )


def test_shapes_cover_what_they_were_chosen_for():
    batches = [random_pairs(6, seed=s) for s in range(400)]
    needs = needs_of(batches)
    chosen = packing.choose(needs, 3)
    assert len(chosen) == 3 and all(len(shape.lengths) == 12 for shape in chosen)
    met_by = np.array([needs.met_by(shape) for shape in chosen])
    assert met_by.any(axis=0).all() and not met_by[0].all()
    for step, batch in enumerate(batches[:40]):
        packing.pack(batch, chosen[met_by[:, step].argmax()])  # raises where it does not fit
    padded = [shape.tokens for shape in chosen]
    assert padded == sorted(set(padded)) and padded[-1] < 1.04 * needs.tokens.max()


def test_a_short_run_compiles_one_program():
    assert len(packing.choose(needs_of([random_pairs(6, seed=s) for s in range(6)]), 6)) == 1


def test_partition_is_the_cheapest_of_all():
    rng = np.random.default_rng(0)
    for limit, price in ((1, 0), (2, 0), (3, 40.0), (8, 200.0)):
        sizes = rng.integers(1, 30, 9)
        levels = np.unique(sizes)

        def cost(ends, sizes=sizes, price=price):
            ends = np.array(sorted(ends))
            return (ends[np.searchsorted(ends, sizes)] ** 2).sum() + price * len(ends)

        every = [
            (*some, levels[-1])
            for count in range(limit)
            for some in itertools.combinations(levels[:-1], count)
        ]
        assert cost(packing._partition(sizes, 2, price, limit)) == min(map(cost, every))


def test_equal_rows_need_one_bucket():
    assert packing.shape_of([(np.arange(8), (np.arange(8), np.arange(8)))] * 4) == packing.Shape(
        96, ((8, 16),), 64
    )


def test_chunked_head_equals_whole_head(tiny, monkeypatch):
    config, params = tiny
    batch = flat(random_pairs(40, seed=5))

    def value_and_grad():
        return jax.jit(jax.value_and_grad(lambda p: token_logprobs(config, p, batch).sum()))(params)

    whole = value_and_grad()
    monkeypatch.setattr("dpo_jax.models.log_probs.CHUNK_LOGITS", 128 * config.vocab)
    assert batch["targets"].shape[1] > 128  # more than one chunk
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(value_and_grad()), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3)


def test_full_logits_are_never_made(tiny, monkeypatch):
    config, params = tiny
    monkeypatch.setattr("dpo_jax.models.log_probs.CHUNK_LOGITS", 128 * config.vocab)
    batch = flat(random_pairs(60, seed=6))
    scored = batch["targets"].shape[1]
    grad = jax.grad(lambda p: token_logprobs(config, p, batch).sum())
    jaxpr = str(jax.make_jaxpr(grad)(params))
    chunk = -(-scored // -(-scored // 128))
    assert (
        scored > 256
        and f"{scored},{config.vocab}]" not in jaxpr
        and f"{chunk},{config.vocab}]" in jaxpr
    )
