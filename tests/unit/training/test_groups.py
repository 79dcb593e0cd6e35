"""Pairs that share prompts and responses give what the same pairs give laid down apart."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import loss_table
from dpo_jax.data import packing
from dpo_jax.data.batches import FILLER, Batches, training_order
from dpo_jax.data.examples import Example, Examples
from dpo_jax.models.log_probs import by_example, response_log_probs
from dpo_jax.training import losses, objectives, step
from tests.helpers.tiny import HYPER, random_pairs


def groups(prompts: int = 3, completions: int = 4, seed: int = 0) -> list[Example]:
    """Return all pairs of some completions of each prompt, the prompts one after the other."""
    drawn = random_pairs(prompts * completions, seed=seed, longest=8)
    pairs = []
    for first in range(0, len(drawn), completions):
        prompt = np.concatenate([[first], drawn[first].prompt]).astype(np.int32)
        answers = []
        for number in range(completions):
            # A number of its own makes each differ.
            answers.append(np.r_[drawn[first + number].responses[0], number].astype(np.int32))
        for chosen, rejected in itertools.combinations(answers, 2):
            pairs.append(Example(prompt, (chosen, rejected)))
    return pairs


def test_pack_lays_down_each_part_once():
    pairs = groups(2, 3)
    shape = packing.shape_of(pairs)
    batch = packing.pack(pairs, shape)
    prompts = {pair.prompt.tobytes(): pair.prompt for pair in pairs}
    answers = {}
    for pair in pairs:
        for answer in pair.responses:
            answers[pair.prompt.tobytes(), answer.tobytes()] = answer
    tokens = sum(map(len, prompts.values())) + sum(map(len, answers.values()))
    laid_down = (batch.token_slots[:, 0] >= 0).sum()
    assert len(prompts) == 2 and len(answers) == shape.responses == 6 and laid_down == tokens
    assert shape.slots_per_token == (1 if shape.responses_per_row else 3)
    # The run: each prompt, then its answers in the order in which pairs name them.
    laid_out = []
    for key, prompt in prompts.items():
        laid_out.append((prompt, np.arange(len(prompt))))
        for (of_prompt, _), answer in answers.items():
            if of_prompt == key:
                laid_out.append((answer, len(prompt) + np.arange(len(answer))))
    run = np.concatenate([part for part, _ in laid_out])
    np.testing.assert_array_equal(batch.tokens[:tokens], run)
    np.testing.assert_array_equal(
        batch.positions[:tokens], np.concatenate([positions for _, positions in laid_out])
    )
    assert not batch.tokens[tokens:].any()
    starts = np.cumsum([0] + [len(part) for part, _ in laid_out])
    first_of_prompt = {number: starts[4 * number] for number in range(2)}
    for number, pair in enumerate(pairs):
        for side, answer in enumerate(pair.responses):
            segment = batch.response_index[number, side]
            of_answer = batch.segment_ids == segment
            np.testing.assert_array_equal(batch.targets[of_answer], answer)
            # After its prompt's last token, each is predicted by the one before it.
            predicted_from = batch.logit_positions[of_answer]
            last_of_prompt = first_of_prompt[number // 3] + len(pair.prompt) - 1
            assert predicted_from[0] == last_of_prompt
            own = batch.last_token[segment] - len(answer) + 1 + np.arange(len(answer))
            np.testing.assert_array_equal(predicted_from[1:], own[:-1])
            np.testing.assert_array_equal(batch.tokens[own], answer)
    # The rows: each slot shows the token that is said to be in it.
    slots = np.concatenate([part.ravel() for rows in batch.rows for part in (rows[0], rows[2])])
    for token in range(tokens):
        of_token = batch.token_slots[token]
        assert (slots[of_token[of_token >= 0]] == token).all()


def objectives_and_splits():
    """Return each objective with each split; the batch is split the same way for all of them."""
    names = [
        ("dpo", "sigmoid"),
        ("dpo", "ipo"),
        ("dpo", "kept"),
        ("sft", "sum"),
        ("sft", "token_mean"),
        ("unlikelihood", ""),
        ("rm", ""),
    ]
    for (name, loss), splits in itertools.product(names, [(1, 1), (2, 1), (1, 3), (2, 3)]):
        is_slow = loss != "sigmoid" and splits != (2, 3)
        marks = [pytest.mark.slow] if is_slow else []
        yield pytest.param(name, loss, splits, marks=marks)


@pytest.mark.parametrize("name, loss, splits", objectives_and_splits())
def test_shared_equals_apart(tiny, name, loss, splits):
    config, params = tiny
    params = jax.tree.map(lambda x: x / 2, params)  # less steep, so that rounding stays small
    reference = jax.tree.map(lambda x: x * 1.05, params)
    pairs = groups()
    kept = None
    if name == "rm":
        config = dataclasses.replace(config, head="reward")
        params = params | {"head": {"scalar": np.ones(16)}}
    if name == "sft":
        pairs = [Example(pair.prompt, pair.responses[:1]) for pair in pairs]
    if loss == "kept":
        reference, loss = None, "sigmoid"
        kept = np.random.default_rng(0).normal(-20, 1, (len(pairs), 2)).astype(np.float32)
    objective = objectives.make(name, config, loss)
    gradient = jax.jit(
        lambda params, batch: step.accumulate(objective, params, reference, HYPER, batch)
    )
    order = training_order(len(pairs), len(pairs), 1, 0)
    apart = Batches(pairs, order, share=False, reference_log_probs=kept)
    microbatches, shards = splits
    shared = Batches(
        pairs, order, microbatches=microbatches, shards=shards, reference_log_probs=kept
    )
    placed = shared.indices(0)
    assert sorted(placed[placed != FILLER]) == list(range(len(pairs)))
    reading = shared.reading()
    assert reading.examples == len(pairs)
    assert shared.tokens(0) == reading.tokens < 0.8 * reading.tokens_one_at_a_time
    # Apart, both responses of a pair have the prompt to themselves.
    if len(pairs[0].responses) == 1:
        assert reading.tokens_one_at_a_time == apart.tokens(0)
    else:
        assert reading.tokens_one_at_a_time < apart.tokens(0)

    wanted, expected = gradient(params, apart[0])
    found, metrics = gradient(params, shared[0])
    largest = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    for of_apart, of_shared in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(of_shared, of_apart, atol=1e-5 * largest)
    for key, (total, count) in expected.items():
        assert float(metrics[key][1]) == float(count), key
        np.testing.assert_allclose(metrics[key][0], total, rtol=2e-5, atol=1e-5, err_msg=key)


def odd_groups(completions: int) -> list[Example]:
    """Return pairs with masks of a prompt with many responses, and of one whose two are equal."""
    rng = np.random.default_rng(3)

    def response(number: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.r_[rng.integers(0, 40, rng.integers(1, 8)), number].astype(np.int32)
        mask = rng.random(len(ids)) < 0.6
        mask[-1] = True
        return ids, mask

    prompt = np.array([7, 3, 9, 1, 2, 30, 4, 4, 8], np.int32)
    drawn = [response(number) for number in range(completions)]
    pairs = []
    for (chosen, chosen_mask), (rejected, rejected_mask) in itertools.pairwise(drawn):
        pairs.append(Example(prompt, (chosen, rejected), (chosen_mask, rejected_mask)))
    ids, mask = drawn[0]
    # Chosen is rejected; and once more with another mask, which makes it another response.
    pairs.append(Example(prompt, (ids, ids), (mask, mask)))
    pairs.append(Example(prompt[:4], (ids, ids), (mask, np.ones_like(mask))))
    pairs.append(pairs[0])  # and the same pair again
    return pairs


def every_loss(pairs, beta, label_smoothing):
    """All preference losses in one, each with a weight of its own: there is one program."""
    numbers = dict(beta=beta, label_smoothing=label_smoothing)
    for name in loss_table.numbers():
        numbers.setdefault(name, 0.5)
    total = 0.0
    for number, name in enumerate(sorted(losses.PREFERENCE), 1):
        total += number * losses.preference(name)(pairs, numbers)
    return total


@pytest.mark.parametrize(
    "dtype, choices",
    [
        ("float32", losses.PLAIN),
        ("bfloat16", losses.PLAIN),
        ("float32", losses.Choices(weighting="wpo", is_length_desensitized=True)),
    ],
)
def test_shared_equals_apart_with_masks_and_many_responses(tiny, dtype, choices):
    """More responses to a prompt than a row or a token's slots hold, and pairs of equal ones."""
    config, params = tiny
    config = dataclasses.replace(config, dtype=dtype)
    # Less steep: sums in another order stay close, and bfloat16 means something.
    params = jax.tree.map(lambda x: x / 4, params)
    reference = jax.tree.map(lambda x: x * 1.05, params)
    pairs = odd_groups(completions=35)
    objective = objectives.make("dpo", config, every_loss, choices)
    hyper = HYPER | dict(label_smoothing=np.float32(0.1), ld_alpha=np.float32(0.4))
    gradient = jax.jit(
        lambda params, batch: step.accumulate(objective, params, reference, hyper, batch)
    )
    order = np.arange(len(pairs))[None]
    shared = Batches(pairs, order)
    assert shared.shapes[0].responses >= 35 + 1 and packing.MOST_RESPONSES < 35
    wanted, expected = gradient(params, Batches(pairs, order, share=False)[0])
    found, metrics = gradient(params, shared[0])
    # bfloat16 has 8 bits.
    tolerance = 1e-5 if dtype == "float32" else 0.03
    largest = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    for of_apart, of_shared in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(of_shared, of_apart, atol=tolerance * largest)
    for key, (total, count) in expected.items():
        assert float(metrics[key][1]) == float(count), key
        if key != "rewards/accuracies":  # equal log-probs of both may round either way
            np.testing.assert_allclose(
                metrics[key][0], total, rtol=2 * tolerance, atol=tolerance, err_msg=key
            )


@pytest.mark.parametrize("loss", ["sum", "token_mean"])
def test_distinct_chosen_responses_count_once(tiny, loss):
    """Of 4 completions 3 are chosen, in 3, 2 and 1 pairs; each is one row, as if laid apart."""
    config, params = tiny
    chosen = Examples(distinct=True)
    for pair in groups():
        chosen.append(pair.prompt, pair.responses[:1], "here")
    by_hand = [Example(pair.prompt, pair.responses[:1]) for pair in groups()]
    by_hand = [row for number, row in enumerate(by_hand) if number % 6 in (0, 3, 5)]
    assert len(chosen) == len(by_hand) == 9

    objective = objectives.make("preferred_ft", config, loss)
    gradient = jax.jit(lambda batch: step.accumulate(objective, params, None, HYPER, batch))
    order = training_order(9, 9, 1, 0)
    wanted, expected = gradient(Batches(by_hand, order, share=False)[0])
    found, metrics = gradient(Batches(chosen, order, microbatches=3)[0])
    largest = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    for of_apart, of_shared in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(of_shared, of_apart, atol=1e-5 * largest)
    for key, (total, count) in expected.items():
        assert float(metrics[key][1]) == float(count), key
        np.testing.assert_allclose(metrics[key][0], total, rtol=2e-5, err_msg=key)


def test_groups_stay_together_where_cells_are_full():
    pairs = groups(6, 4)
    batches = Batches(pairs, training_order(36, 36, 1, 0), shards=3)
    for cell in batches.indices(0).reshape(3, -1):
        prompts = {pairs[index].prompt.tobytes() for index in cell[cell != FILLER]}
        assert len(prompts) == 2
    # One group for four cells: each has some of it.
    batches = Batches(groups(1, 4), training_order(6, 4, 1, None), shards=4)
    held = (batches.indices(0).reshape(4, -1) != FILLER).sum(axis=1)
    assert held.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("kept", [False, True])
def test_cells_without_a_pair_are_finite(tiny, kept):
    """A loss that is infinite where there is no pair counts the pairs alone."""
    config, params = tiny

    def odds_ratio(pairs, beta, label_smoothing):
        chosen = pairs.chosen_log_probs / pairs.chosen_lengths
        total = jnp.log1p(-jnp.exp(chosen)) + jnp.exp(-pairs.chosen_log_ratios)
        numbers = dict(beta=beta, simpo_gamma=1.0, orpo_lambda=0.1, cpo_alpha=1.0)
        for name in ("simpo", "orpo", "cpo"):
            total += losses.preference(name)(pairs, numbers)
        return total

    pairs = groups(2, 3)[:4]
    order = np.array([[0, 1, 2, 3, FILLER, FILLER, FILLER, FILLER]])
    reference_log_probs = None
    if kept:
        one = Batches(pairs, np.arange(4)[None])
        reference_log_probs = np.asarray(
            by_example(response_log_probs(config, params, at(one[0], 0)), at(one[0], 0))
        )[0]
    found = []
    for shards in (1, 8):
        batches = Batches(pairs, order, shards=shards, reference_log_probs=reference_log_probs)
        reference = None if kept else jax.tree.map(lambda x: x * 1.01, params)
        objective = objectives.make("dpo", config, odds_ratio)
        grads, metrics = jax.jit(step.accumulate, static_argnums=0)(
            objective, params, reference, HYPER, batches[0]
        )
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
        found.append((grads, metrics["loss"]))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found[0][0]))
    for one, several in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(several, one, rtol=1e-5, atol=1e-5 * largest)


def at(batch, microbatch):
    return jax.tree.map(lambda x: x[microbatch], batch)
