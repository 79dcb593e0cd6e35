"""Sampled reward and KL against enumeration, float64 and values by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from dpo_jax.data import toy
from dpo_jax.data.leaks import Hashes
from dpo_jax.evaluation import exact, reward_kl
from dpo_jax.models import inference, transformer
from dpo_jax.models.loading import Model
from dpo_jax.parallel import sharding
from dpo_jax.rewards import make
from dpo_jax.sampling import sampler
from dpo_jax.sampling.prompts import Prompts
from dpo_jax.sampling.sampler import Completion
from dpo_jax.training import metric_names
from tests.helpers.tiny import random_pairs, tiny_config
from tests.helpers.tiny_models import random_params

CONFIG = tiny_config(vocab=len(toy.WORDS))
LENGTH = 3
COUNT = 512  # of each prompt
REFERENCE = random_params(CONFIG, seed=0)
POLICY = jax.tree.map(lambda x, y: x + 0.6 * y, REFERENCE, random_params(CONFIG, seed=1))
ONE_DEVICE = sharding.make_mesh(devices=jax.devices()[:1])
MESH = sharding.make_mesh(data=2, fsdp=2, tensor=2)
CONTEXT = sharding.make_mesh(data=2, context=4)
LOGITS = jax.jit(transformer.logits, static_argnums=0)


@pytest.fixture(scope="module")
def prompts():
    ids = [np.array([prompt], np.int32) for prompt in np.repeat(toy.PROMPTS, COUNT)]
    return Prompts(ids, toy.tokenizer().batch_decode(ids))


@pytest.fixture(scope="module")
def evaluated(prompts):
    reward = make.make_reward("toy", "", 64, ONE_DEVICE)
    model = Model(CONFIG, POLICY, toy.tokenizer(), ONE_DEVICE)
    sampling = sampler.Sampling(LENGTH, batch_size=512)
    return reward_kl.evaluate(model, REFERENCE, prompts, reward, sampling)


def test_evaluate_is_near_exact(evaluated):
    values, _ = evaluated
    completions_CT = np.indices((CONFIG.vocab,) * LENGTH).reshape(LENGTH, -1).T
    policy_PC, reference_PC = (
        exact.enumerate_log_probs(CONFIG, params, toy.PROMPTS, LENGTH)
        for params in (POLICY, REFERENCE)
    )
    reward, kl = exact.reward_and_kl(
        policy_PC, reference_PC, toy.rewards(toy.PROMPTS, completions_CT)
    )
    assert kl > 0.2  # there is something to estimate
    for name, truth in (("reward", reward), ("kl", kl), ("kl_sampled", kl)):
        error = values[f"frontier/{name}_se"]
        assert 0 < error < 0.05
        assert abs(values[f"frontier/{name}"] - truth) < 3 * error, name
    assert all(metric_names.describe(name).meaning for name in values)
    assert values["frontier/kl_se"] < 0.5 * values["frontier/kl_sampled_se"]


def test_evaluate_rows_in_order(evaluated, prompts):
    values, rows = evaluated
    assert [row["prompt"] for row in rows] == prompts.texts
    for name in ("reward", "kl", "length"):
        assert np.mean([row[name] for row in rows]) == pytest.approx(values[f"frontier/{name}"])
    words = list(toy.WORDS)
    for row in rows[::100]:
        ids = [words.index(word) for word in row["completion"].split()]
        assert len(ids) == LENGTH
        assert (
            row["reward"]
            == toy.rewards(np.array([words.index(row["prompt"])]), np.array([ids]))[0, 0]
        )


def float64_kls(pairs) -> tuple[np.ndarray, np.ndarray]:
    """Log-ratios and KLs of the steps, summed over each completion, from the whole distribution at
    every step.
    """
    tokens_BT = np.zeros((len(pairs), 30), np.int32)
    for row, pair in zip(tokens_BT, pairs, strict=True):
        whole = np.concatenate(pair)
        row[: len(whole)] = whole
    policy_BTV, reference_BTV = (
        log_probs - np.logaddexp.reduce(log_probs, axis=-1, keepdims=True)
        for log_probs in (
            np.asarray(LOGITS(CONFIG, params, tokens_BT), np.float64)
            for params in (POLICY, REFERENCE)
        )
    )
    ratio_BTV = policy_BTV - reference_BTV
    kl_BT = (np.exp(policy_BTV) * ratio_BTV).sum(-1)
    steps = [np.arange(len(prompt) - 1, len(prompt) + len(tokens) - 1) for prompt, tokens in pairs]
    sampled = [
        ratio_TV[at, tokens].sum()
        for ratio_TV, at, (_, tokens) in zip(ratio_BTV, steps, pairs, strict=True)
    ]
    return np.array(sampled), np.array(
        [kl_T[at].sum() for kl_T, at in zip(kl_BT, steps, strict=True)]
    )


@pytest.mark.parametrize(
    "mesh, max_new_tokens, batch_size",
    [(ONE_DEVICE, 12, 4), (MESH, 18, 256), (CONTEXT, 18, 256)],
    ids=["one device", "mesh", "context"],
)
def test_sequence_kls_equal_float64(mesh, max_new_tokens, batch_size, monkeypatch):
    """Whatever the shards, the padding and the batch size, of which ten rows are no multiple."""
    shapes = []

    def map_tokens(*args, shape, **options):
        shapes.append(shape)
        return inference.map_tokens(*args, shape=shape, **options)

    monkeypatch.setattr(reward_kl, "map_tokens", map_tokens)
    pairs = [(pair.prompt, pair.responses[0]) for pair in random_pairs(10, vocab=CONFIG.vocab)]
    model = Model(CONFIG, POLICY, None, mesh)
    found = reward_kl.sequence_kls(model, REFERENCE, pairs, max_new_tokens, batch_size)
    for values, expected in zip(found, float64_kls(pairs), strict=True):
        assert np.ptp(expected) > 0.5
        np.testing.assert_allclose(values, expected, atol=1e-4)
    # The devices along `context` share the tokens.
    assert [shape.stripes for shape in shapes] == [mesh.shape["context"]]


def test_sequence_kls_of_reference_are_0():
    pairs = [(pair.prompt, pair.responses[0]) for pair in random_pairs(10, vocab=CONFIG.vocab)]
    model = Model(CONFIG, POLICY, None, ONE_DEVICE)
    for values in reward_kl.sequence_kls(model, POLICY, pairs, 12, 4):
        np.testing.assert_array_equal(values, 0)


def test_evaluate_by_hand(monkeypatch):
    words = list(toy.WORDS)
    asked = Prompts([np.array([5], np.int32), np.array([1, 6], np.int32)], ["film", "good plot"])

    def measure(*completions, prompts=asked):
        drawn = [
            [Completion(np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), ended)]
            for tokens, ended in completions
        ]
        monkeypatch.setattr(sampler, "sample", lambda *_, **__: drawn)
        model = Model(CONFIG, POLICY, toy.tokenizer(), ONE_DEVICE, eos_id=7)
        sampling = sampler.Sampling(12, batch_size=4)
        return reward_kl.evaluate(model, REFERENCE, prompts, reward, sampling)

    def reward(prompts, completions, tokens, conversations=None):
        assert prompts == asked.texts
        assert [[*prompt, *completion] for prompt, completion in tokens] == [
            [words.index(word) for word in (prompt + completion).split()]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return np.array([len(completion.split()) for completion in completions], float)

    values, rows = measure(([0, 1, 2, 0, 1, 2], False), ([3, 7], True))
    expected = dict(reward=4, reward_se=2, length=4, eos_rate=0.5, repetition=0.125)
    assert {name: values[f"frontier/{name}"] for name in expected} == expected
    assert rows[1] | dict(kl=0) == dict(
        prompt="good plot", completion=" bad acting", reward=2.0, length=2, kl=0
    )

    # Both rows have one prompt of the data, so nothing is known of others.
    one = np.array([7, 7], np.uint64)
    shared = dataclasses.replace(asked, hashes=Hashes(one, one))
    values, _ = measure(([0, 1, 2, 0, 1, 2], False), ([3, 7], True), prompts=shared)
    assert values["frontier/reward"] == 4 and "frontier/reward_se" not in values

    compiled = reward_kl._token_kls._cache_size()
    measure(([3], False), ([3, 7], True))
    measure(([1] * 12, False), ([2] * 12, False))
    assert reward_kl._token_kls._cache_size() == compiled


@pytest.mark.parametrize(
    "tokens, share",
    [
        ([], 0),
        ([1, 1], 0),
        ([1, 2, 3, 4], 0),
        ([1, 1, 1, 1, 1], 2 / 3),
        ([1, 2, 3, 1, 2, 3], 1 / 4),
    ],
)
def test_repetition_by_hand(tokens, share):
    assert reward_kl.repetition(np.array(tokens)) == pytest.approx(share)


def test_evaluate_log(evaluated):
    values, rows = evaluated
    shown = reward_kl.table(values)
    assert f"{values['frontier/kl']:.4f} ± {values['frontier/kl_se']:.4f} nats" in shown
    policys, references = (
        [
            dict(prompt="a", completion=text, reward=reward),
            dict(prompt="b", completion="", reward=0),
        ]
        for text, reward in ((" good", 0.75), (" bad", 0.25))
    )
    assert reward_kl.side_by_side(policys[:1], references).splitlines() == [
        "--- 'a'",
        "policy    (0.750) ' good'",
        "reference (0.250) ' bad'",
    ]
