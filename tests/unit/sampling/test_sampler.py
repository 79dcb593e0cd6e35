"""Sampling against the training path's log-probs and exact distributions."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data import packing
from dpo_jax.data.examples import Example
from dpo_jax.models import families, hf, transformer
from dpo_jax.models.loading import Model
from dpo_jax.models.log_probs import token_log_probs
from dpo_jax.models.transformer import LayerKind
from dpo_jax.parallel import sharding
from dpo_jax.sampling import sampler
from dpo_jax.sampling.sampler import Sampling, sample
from tests.helpers import tiny_models
from tests.helpers.paths import STORIES
from tests.helpers.tiny import random_pairs, tiny_config

PROMPTS = [pair.prompt for pair in random_pairs(5)]  # of 1 to 11 tokens
TEN = Sampling(10)


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def draw(tiny, prompts=PROMPTS, sampling=TEN, mesh=None, **options):
    """Three completions of each prompt: most tests ask for the same shapes, so that one program
    serves them.
    """
    config, params = tiny
    ends = options.pop("eos_id", 1), options.pop("other_eos_ids", ())
    model = Model(config, params, None, mesh or one_device(), *ends)
    first = options.pop("first", 0)
    sampling = dataclasses.replace(sampling, **dict(n=3) | options)
    return sample(model, prompts, sampling, first=first)


def tokens(completions):
    return [[one.tokens.tolist() for one in row] for row in completions]


def assert_same(found, expected):
    """The same tokens, and log-probs but for rounding."""
    assert tokens(found) == tokens(expected)
    for row, expected_row in zip(found, expected, strict=True):
        for one, expected_one in zip(row, expected_row, strict=True):
            np.testing.assert_allclose(one.log_probs, expected_one.log_probs, atol=1e-4)


# against transformers


def test_sample_greedy_text_of_trained_model():
    folder, mesh = STORIES, one_device()
    golden = json.loads((folder / "golden_greedy.json").read_text())["tokens"]
    config = families.from_hf(hf.read_config(folder))
    params = hf.load(folder, config, sharding.param_shardings(mesh, transformer.abstract(config)))
    ((one,),) = sample(
        Model(config, params, None, mesh, 2),
        [np.array(golden[:1])],
        Sampling(len(golden) - 1, temperature=0),
    )
    assert golden[:1] + one.tokens.tolist() == golden


# against the training path


def test_sample_log_probs_equal_training(tiny):
    # The log-probs do not depend on the temperature.
    drawn = draw(tiny, sampling=Sampling(10, temperature=1.3, top_k=30))
    examples = [
        Example(prompt, tuple(one.tokens for one in row))
        for prompt, row in zip(PROMPTS, drawn, strict=True)
    ]
    batch = jax.tree.map(lambda x: x[None], packing.pack(examples, packing.shape_of(examples)))
    expected = jax.jit(token_log_probs, static_argnums=0)(*tiny, batch)[0]
    found = np.concatenate([one.log_probs for row in drawn for one in row])
    assert found.min() < -3
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("length", [1, 5])
def test_cache_is_in_compute_dtype(tiny, length):
    config = dataclasses.replace(tiny[0], dtype="bfloat16")
    tokens_SN = jnp.zeros((3, length), jnp.int32)

    def step(params):
        return transformer.step(
            config, params, tokens_SN, tokens_SN, transformer.empty_cache(config, 3, 9)
        )

    x_SND, cache = jax.eval_shape(step, tiny[1])
    assert {x.dtype for x in (x_SND, *cache.values())} == {jnp.dtype("bfloat16")}
    assert {x.shape for x in cache.values()} == {(2, 3, 2, 9, 4)}


# what a completion depends on


@pytest.fixture(scope="module")
def drawn(tiny):
    return draw(tiny)


def test_sample_ignores_neighbours_and_padding(tiny, drawn):
    # Short prompts by themselves, so with less padding.
    assert_same(draw(tiny, batch_size=4), drawn)
    assert_same(draw(tiny, PROMPTS[1:], first=1), drawn[1:])
    assert_same(draw(tiny, n=2), [row[:2] for row in drawn])


def test_sample_differs_by_index_and_seed(tiny):
    same_prompt = [max(PROMPTS, key=len)] * 5
    found = {
        tuple(one.tokens)
        for seed in (0, 1)
        for row in draw(
            tiny, same_prompt, seed=seed, eos_id=None, sampling=Sampling(10, temperature=3)
        )
        for one in row
    }
    assert len(found) == 30


@pytest.mark.parametrize(
    "axes",
    [
        dict(data=2, fsdp=2, tensor=2),
        pytest.param(dict(fsdp=2, context=4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sample_is_equal_on_meshes(tiny, drawn, axes):
    """Rows, weights, heads and vocabulary are split; cuts look at the whole vocabulary."""
    config, params = tiny
    mesh = sharding.make_mesh(**axes)
    placed = jax.device_put(params, sharding.param_shardings(mesh, params))
    assert_same(draw((config, placed), mesh=mesh), drawn)
    for sampling in (
        Sampling(10, temperature=0),
        Sampling(10, temperature=0.8, top_k=12, top_p=0.7),
    ):
        assert_same(
            draw((config, placed), mesh=mesh, sampling=sampling), draw(tiny, sampling=sampling)
        )


def test_sample_settings_compile_nothing(tiny, drawn):
    before = sampler._generate._cache_size()
    for sampling in (Sampling(10, temperature=0.5), Sampling(10, top_k=3), Sampling(10, top_p=0.5)):
        draw(tiny, sampling=sampling, seed=2**40, eos_id=None, first=7)
    assert sampler._generate._cache_size() == before


@pytest.mark.parametrize(
    "prompts, n, batch_size, shards, expected",
    [
        (100, 1, 64, 1, (64, 1)),
        (100, 4, 64, 1, (16, 4)),
        (100, 6, 64, 1, (10, 6)),
        (3, 4, 64, 1, (4, 4)),  # a power of 2
        (100, 10, 4, 1, (1, 4)),  # in three parts, of 4, 4 and 2
        (100, 4, 64, 8, (16, 4)),
        (100, 4, 8, 8, (8, 1)),  # one row in each shard
        (1, 8, 64, 4, (4, 2)),  # four shards share out the completions of one prompt
        (2, 1, 64, 4, (4, 1)),
    ],
)
def test_batch_sizes(prompts, n, batch_size, shards, expected):
    sampling = Sampling(10, n=n, batch_size=batch_size)
    assert sampler._batch_sizes(prompts, sampling, shards) == expected


@pytest.mark.parametrize("batch_size, expected", [(64, 1), (12, 1), (4, 2)])
def test_prompt_is_read_once_for_its_completions(tiny, monkeypatch, batch_size, expected):
    """With room for four completions of the six, it is read twice."""
    read = []
    generate = sampler._generate

    def recorded(config, max_new_tokens, params, batch, settings):
        read.extend(np.asarray(batch["rows"]).tolist())
        return generate(config, max_new_tokens, params, batch, settings)

    monkeypatch.setattr(sampler, "_generate", recorded)
    found = draw(tiny, PROMPTS[:4], n=6, batch_size=batch_size)
    assert sorted(read) == sorted([0, 1, 2, 3] * expected)
    # As in batches of one row, where nothing is shared.
    alone = draw(tiny, PROMPTS[:4], n=6, batch_size=1)
    assert_same(found, alone)


# how tokens are drawn


@pytest.fixture(scope="module")
def six():
    """A model of six tokens, and its exact log-probs of the first two after a prompt: [6], [6,
    6].
    """
    config = tiny_config(vocab=6)
    params = jax.tree.map(lambda x: x * 3, tiny_models.random_params(config))
    sequences = np.array([[4, 2, first] for first in range(6)])
    logits = np.asarray(
        jax.jit(transformer.logits, static_argnums=0)(config, params, sequences), np.float64
    )
    return config, params, logits[0, 1], logits[:, 2]


def exact(logits, sampling):
    """Probabilities by the definition, one token at a time."""
    scaled = logits / sampling.temperature
    order = np.argsort(-scaled)[: sampling.top_k or None]
    probs = np.zeros(len(logits))
    probs[order] = np.exp(scaled[order] - scaled.max())
    probs /= probs.sum()
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += probs[token]
        if mass >= sampling.top_p:
            break
    return (
        np.array([probs[token] if token in kept else 0 for token in range(len(logits))])
        / probs[kept].sum()
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(temperature=2.5),
        dict(temperature=0.6),
        dict(top_k=2),
        dict(top_p=0.6),
        dict(top_p=1e-6),
        dict(temperature=2.5, top_k=4, top_p=0.8),
    ],
)
def test_sample_frequencies_are_exact(six, fields):
    """Of both tokens together, so that a step that used another's randomness would show."""
    config, params, first_logits, second_logits = six
    sampling, count = Sampling(2, **fields), 8192
    (drawn,) = draw(
        (config, params), [np.array([4, 2])], sampling, n=count, eos_id=None, batch_size=count
    )
    joint = exact(first_logits, sampling)[:, None] * np.array(
        [exact(row, sampling) for row in second_logits]
    )
    found = np.zeros((6, 6))
    np.add.at(found, tuple(np.array([one.tokens for one in drawn]).T), 1)
    assert not found[joint == 0].any()
    common = joint * count > 5
    square = ((found - joint * count) ** 2 / (joint * count + 1e-30))[common].sum()
    freedom = common.sum() - 1
    assert square <= freedom + 4 * np.sqrt(2 * freedom)  # chi-square: mean + 4 deviations


@pytest.mark.parametrize(
    "fields", [dict(temperature=0), dict(temperature=1e-30), dict(top_k=1), dict(top_p=1e-30)]
)
def test_sample_likeliest_token_alone(tiny, fields):
    greedy = draw(tiny, sampling=Sampling(10, temperature=0), seed=5)
    assert_same(draw(tiny, sampling=Sampling(10, **fields)), greedy)


def test_top_p_1_keeps_all():
    scores = np.array([[0, -30.0, -80, -1e4]], np.float32)
    np.testing.assert_array_equal(sampler._cut(scores, 0, 1.0), scores)
    np.testing.assert_array_equal(sampler._cut(scores, 3, 1.0), [[0, -30, -80, -np.inf]])


def test_top_k_keeps_equal_logits():
    scores = np.array([[-1, 0, -1, -2.0]], np.float32)
    np.testing.assert_array_equal(sampler._cut(scores, 2, 1.0), [[-1, 0, -1, -np.inf]])


# where completions end


def test_sample_ends_by_eos_or_length(tiny):
    endless = draw(tiny, eos_id=None)
    assert all(len(one.tokens) == 10 and not one.ended for row in endless for one in row)
    eos = next(
        token
        for token in range(40)
        if 4 < sum(token in one.tokens for row in endless for one in row) < 11
    )
    ended = 0
    for row, endless_row in zip(draw(tiny, eos_id=eos), endless, strict=True):
        for one, whole in zip(row, endless_row, strict=True):
            at = np.flatnonzero(whole.tokens == eos)
            count = at[0] + 1 if len(at) else 10
            assert (
                one.ended == bool(len(at)) and one.tokens.tolist() == whole.tokens[:count].tolist()
            )
            np.testing.assert_allclose(one.log_probs, whole.log_probs[:count], atol=1e-5)
            assert one.tokens.dtype == np.int32 and one.log_probs.dtype == np.float32
            ended += one.ended
    assert 0 < ended < 15


def test_sample_ends_by_any_of_several_tokens(tiny):
    endless = draw(tiny, eos_id=None)
    drawn = [token for row in endless for one in row for token in one.tokens.tolist()]
    # The three that come most often: each ends some completion first.
    stops = sorted(set(drawn), key=drawn.count)[-3:]
    ended_by = set()
    found = draw(tiny, eos_id=stops[0], other_eos_ids=tuple(stops[1:]))
    for row, endless_row in zip(found, endless, strict=True):
        for one, whole in zip(row, endless_row, strict=True):
            at = np.flatnonzero(np.isin(whole.tokens, stops))
            count = at[0] + 1 if len(at) else 10
            assert one.ended == bool(len(at))
            assert one.tokens.tolist() == whole.tokens[:count].tolist()
            if one.ended:
                ended_by.add(int(one.tokens[-1]))
    assert ended_by == set(stops)


def test_sample_without_eos_ends_by_length_alone(tiny):
    assert tokens(draw(tiny, eos_id=None, other_eos_ids=(3,))) == tokens(draw(tiny, eos_id=None))


def test_sample_stops_when_all_ended(tiny):
    """Were it run to its limit, it would take minutes."""
    config, params = tiny
    # All logits are equal, so the likeliest token is 0.
    silent = params | {"head": {"kernel": np.zeros((16, 40), np.float32)}}
    found = draw((config, silent), PROMPTS[:1], Sampling(50_000, temperature=0), eos_id=0)
    assert tokens(found) == [[[0]] * 3]


# what is refused


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prompts=[PROMPTS[0], np.array([], np.int32)]), "prompt 1 is empty: it needs a token"),
        (
            dict(prompts=[np.array([3, 40])]),
            "prompt 0 has tokens from 3 to 40, but the model's vocabulary is 0 to 39",
        ),
        (dict(prompts=[np.array([-1])], first=6), "prompt 6 has tokens from -1"),
        (dict(sampling=Sampling(0)), "max_new_tokens=0: expected 1 or more"),
        (dict(sampling=Sampling(1, temperature=-0.1)), "temperature=-0.1: expected 0 or more"),
        (
            dict(sampling=Sampling(1, temperature=float("nan"))),
            "temperature=nan: expected 0 or more",
        ),
        (dict(sampling=Sampling(1, top_k=-1)), "top_k=-1: expected 0 or more"),
        (dict(sampling=Sampling(1, top_p=0.0)), "top_p=0.0: expected more than 0, and at most 1"),
        (dict(sampling=Sampling(1, top_p=1.1)), "top_p=1.1: expected more than 0"),
        (dict(n=0), "n=0: expected 1 or more"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(first=-1), "first=-1"),
    ],
)
def test_sampling_refuses_wrong_values(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny, **change)


def test_sample_ends_with_learned_positions():
    config = tiny_config(learned_positions=True, pattern=(LayerKind(),), max_positions=12)
    params = tiny_models.random_params(config)
    # Padded to more than 12.
    (full,) = draw((config, params), [np.arange(9)], Sampling(3), eos_id=None)
    assert all(len(one.tokens) == 3 and np.isfinite(one.log_probs).all() for one in full)
    with pytest.raises(
        ValueError,
        match="prompt 0 has 9 tokens, and with max_new_tokens=4 it passes the model's 12",
    ):
        draw((config, params), [np.arange(9)], Sampling(4))


def test_sample_without_prompts(tiny):
    assert draw(tiny, []) == []
