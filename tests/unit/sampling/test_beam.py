"""Beam search against enumeration: with a beam for each prefix it finds the likeliest of all."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sample as command
from dpo_jax.models import transformer
from dpo_jax.models.loading import Model
from dpo_jax.parallel import sharding
from dpo_jax.sampling import beam, generation, sampler
from dpo_jax.sampling.sampler import Sampling, sample
from tests.helpers.tiny import tiny_config

VOCAB = 5
EOS = 1
LONGEST = 3
PROMPTS = [np.array(prompt, np.int32) for prompt in ([2], [3, 0, 4], [4, 4])]


@pytest.fixture(scope="module")
def model():
    """A model of five tokens, steep enough that the greedy completion is not the likeliest."""
    config = dataclasses.replace(tiny_config(), vocab=VOCAB)
    params = transformer.init(config, jax.random.key(3))
    params = jax.tree.map(lambda x: x * 20 if x.ndim > 1 else x, params)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return Model(config, params, None, mesh, EOS)


def completions() -> list[tuple[int, ...]]:
    """Every completion: up to LONGEST tokens, of which EOS is the last if there is one."""
    found = []
    for length in range(1, LONGEST + 1):
        for tokens in itertools.product(range(VOCAB), repeat=length):
            is_whole = length == LONGEST or tokens[-1] == EOS
            if is_whole and EOS not in tokens[:-1]:
                found.append(tokens)
    return found


def log_probs_of(model, prompt) -> dict[tuple[int, ...], float]:
    """Return the log-prob of every completion of a prompt."""
    every = completions()
    whole_BT = np.zeros((len(every), len(prompt) + LONGEST), np.int32)
    for row, tokens in zip(whole_BT, every, strict=True):
        row[: len(prompt) + len(tokens)] = [*prompt, *tokens]
    logits_BTV = transformer.logits(model.config, model.params, jnp.asarray(whole_BT))
    log_probs_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
    found = {}
    for row_TV, tokens in zip(log_probs_BTV, every, strict=True):
        places = len(prompt) - 1 + np.arange(len(tokens))
        found[tokens] = float(row_TV[places, list(tokens)].sum())
    return found


def test_beam_search_finds_the_likeliest_of_all_completions(model):
    found = beam.search(model, PROMPTS, Sampling(LONGEST, beams=VOCAB**2))
    greedy = sample(model, PROMPTS, Sampling(LONGEST, temperature=0))
    is_other = []
    for prompt, (one,), (first,) in zip(PROMPTS, found, greedy, strict=True):
        by_tokens = log_probs_of(model, prompt)
        likeliest = max(by_tokens, key=by_tokens.get)
        assert tuple(one.tokens.tolist()) == likeliest
        assert one.log_probs.sum() == pytest.approx(by_tokens[likeliest], abs=1e-4)
        assert one.ended == (likeliest[-1] == EOS)
        is_other.append(one.tokens.tolist() != first.tokens.tolist())
    assert any(is_other)


def test_one_beam_is_greedy(model):
    """Prompts in batches of two give the same as alone."""
    found = beam.search(model, PROMPTS, Sampling(LONGEST, beams=1, batch_size=2))
    greedy = sample(model, PROMPTS, Sampling(LONGEST, temperature=0))
    for (one,), (other,) in zip(found, greedy, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
        assert one.ended == other.ended


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (dict(temperature=0.7), "temperature=0.7 with beams=4: expected 1.0, its default"),
        (dict(n=2), "n=2 with beams=4: expected 1"),
        (dict(seed=3), "seed=3 with beams=4: expected 0"),
        (dict(batch_size=3), "beams=4: expected at most batch_size=3"),
        (dict(beams=-1), "beams=-1: expected 0 or more"),
    ],
)
def test_check_refuses_what_beam_search_has_no_use_for(fields, expected):
    with pytest.raises(ValueError, match=expected):
        sampler.check(tiny_config(), PROMPTS, Sampling(LONGEST, **dict(beams=4) | fields))


def test_batches_of_prompts_have_room_for_their_beams():
    assert generation.prompts_at_a_time(Sampling(LONGEST, beams=16, batch_size=64)) == 4


def test_what_the_command_says_of_beams():
    """Nothing is drawn."""
    told = command._of_each(Sampling(LONGEST, beams=3))
    assert told == "the likeliest completion that 3 beams found for each"
    assert command._of_each(Sampling(LONGEST, n=2)) == "2 sampled for each"
