"""Examples with masks: what users and tools say within an answer is read, and never trained on."""

import dataclasses

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dpo_jax.data.batches import Batches, evaluation_order, training_order
from dpo_jax.data.examples import Example, Examples
from dpo_jax.data.packing import RolloutTargets
from dpo_jax.models import transformer
from dpo_jax.parallel import sharding
from dpo_jax.training import losses, objectives, self_check, step
from tests.helpers.tiny import HYPER, first_responses, masked_pairs

LOGITS = jax.jit(transformer.logits, static_argnums=0)
PAIRS = masked_pairs(12, longest=8)
BETA = 0.3  # of HYPER


@pytest.fixture
def models(tiny):
    """The shape, a policy and a reference."""
    config, params = tiny
    params = jax.tree.map(lambda x: x / 2, params)  # less steep: little rounding
    return config, params, jax.tree.map(lambda x: x * 1.05, params)


def by_hand(config, params, example) -> list[np.ndarray]:
    """Return the log-prob of each token trained on, for each response in a sequence of its own."""
    found = []
    for response, mask in zip(example.responses, example.completion_masks, strict=True):
        tokens = np.concatenate([example.prompt, response])
        padded = np.pad(tokens, (0, 32 - len(tokens)))  # one shape for all
        logits = np.asarray(LOGITS(config, params, padded[None])[0], np.float64)
        every = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        of_token = []
        for place, token in enumerate(response):
            if mask[place]:
                of_token.append(every[len(example.prompt) + place - 1, token])
        found.append(np.array(of_token))
    return found


def measured(name, loss, model, examples, reference=None, head="lm"):
    """Return the metrics of an objective on one batch, as means."""
    config, params = model
    batch = jax.tree.map(lambda x: x[0], Batches(examples, np.arange(len(examples))[None])[0])
    objective = objectives.make(name, dataclasses.replace(config, head=head), loss)
    _, metrics = jax.jit(objective)(params, reference, HYPER, batch)
    return {key: float(total) / float(count) for key, (total, count) in metrics.items()}


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "ipo", "ipo_sum", "hinge"])
def test_dpo_by_hand(models, loss):
    config, params, reference = models
    expected = []
    for example in PAIRS:
        policy_chosen, policy_rejected = by_hand(config, params, example)
        reference_chosen, reference_rejected = by_hand(config, reference, example)
        chosen = policy_chosen - reference_chosen
        rejected = policy_rejected - reference_rejected
        margin = chosen.sum() - rejected.sum()
        per_token = chosen.mean() - rejected.mean()
        expected.append(
            dict(
                sigmoid=np.log1p(np.exp(-BETA * margin)),
                sigmoid_norm=np.log1p(np.exp(-BETA * per_token)),
                ipo=(per_token - 1 / (2 * BETA)) ** 2,
                ipo_sum=(margin - 1 / (2 * BETA)) ** 2,
                hinge=max(1 - BETA * margin, 0),
            )[loss]
        )
    found = measured("dpo", loss, (config, params), PAIRS, reference)
    assert found["loss"] == pytest.approx(np.mean(expected), rel=1e-4)
    lengths = np.mean([[mask.sum() for mask in pair.completion_masks] for pair in PAIRS], axis=0)
    assert found["lengths/chosen"] == pytest.approx(lengths[0])
    assert found["lengths/rejected"] == pytest.approx(lengths[1])


def test_sft_by_hand(models):
    config, params, _ = models
    singles = first_responses(PAIRS)
    per_token = [by_hand(config, params, example)[0] for example in singles]
    total = -sum(values.sum() for values in per_token)
    tokens = sum(map(len, per_token))
    of_sum = measured("sft", "sum", (config, params), singles)
    assert of_sum["loss"] == pytest.approx(total / len(singles), rel=1e-5)
    assert of_sum["nll_per_token"] == pytest.approx(total / tokens, rel=1e-5)
    of_mean = measured("sft", "token_mean", (config, params), singles)
    assert of_mean["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_unlikelihood_by_hand(models):
    config, params, _ = models
    expected = []
    for example in PAIRS:
        chosen, rejected = by_hand(config, params, example)
        expected.append(-chosen.sum() + 0.5 * rejected.sum())
    found = measured("unlikelihood", "", (config, params), PAIRS)
    assert found["loss"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_reward_is_read_at_the_last_token(models):
    """Of the whole response, whatever of it is trained on."""
    config, params, _ = models
    params = params | {"head": {"scalar": np.linspace(-1, 1, config.width, dtype=np.float32)}}
    unmasked = [Example(pair.prompt, pair.responses) for pair in PAIRS]
    found = measured("rm", "", (config, params), PAIRS, head="reward")
    expected = measured("rm", "", (config, params), unmasked, head="reward")
    for name in ("loss", "rewards/chosen", "rewards/rejected"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    assert abs(found["rewards/margins"]) > 1e-3


@pytest.mark.parametrize(
    "name, loss",
    [
        ("dpo", "sigmoid_norm"),
        pytest.param("sft", "sum", marks=pytest.mark.slow),
        ("sft", "token_mean"),
    ],
)
def test_microbatches_add_up(models, name, loss):
    config, params, reference = models
    examples = PAIRS if name == "dpo" else first_responses(PAIRS)
    objective = objectives.make(name, config, loss)
    gradient = jax.jit(
        lambda params, batch: step.accumulate(objective, params, reference, HYPER, batch)
    )
    order = training_order(12, 12, 1, 0)
    whole, metrics = gradient(params, Batches(examples, order)[0])
    parts, part_metrics = gradient(params, Batches(examples, order, microbatches=4)[0])
    largest = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(whole))
    for of_whole, of_parts in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(of_parts, of_whole, atol=1e-5 * largest)
    for key, (total, count) in metrics.items():
        part_total, part_count = part_metrics[key]
        np.testing.assert_allclose(
            part_total / part_count, total / count, rtol=2e-5, atol=1e-5, err_msg=key
        )


def test_masked_tokens_get_no_gradient(models):
    """Nor do they move anything else where nothing that counts follows them."""
    config, params, _ = models
    prompt = np.array([3, 4], np.int32)
    response = np.array([5, 6, 7], np.int32)
    mask = np.array([True, False, False])  # nothing that counts comes after the masked tokens
    found = []
    for masked_tokens in ([6, 7], [30, 31]):
        answer = np.concatenate([response[:1], masked_tokens]).astype(np.int32)
        example = Example(prompt, (answer,), (mask,))
        batch = Batches([example], np.zeros((1, 1), int))[0]
        grads, _ = step.accumulate(
            objectives.make("sft", config, "sum"), params, None, HYPER, batch
        )
        found.append(grads)
    for first, second in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(first, second, atol=1e-6)


def test_values_of_completion_tokens_find_their_examples(models):
    """PPO's targets are laid out, and measured values given back, by completion tokens."""
    singles = first_responses(PAIRS)
    rng = np.random.default_rng(0)
    targets = {}
    for field in dataclasses.fields(RolloutTargets):
        drawn = []
        for example in singles:
            drawn.append(rng.normal(size=example.completion_lengths()[0]).astype(np.float32))
        targets[field.name] = drawn
    batches = Batches(
        singles,
        evaluation_order(12, 16),
        shards=2,
        share=False,
        rollout=RolloutTargets(**targets),
    )
    batch = batches[0]
    for name, expected in targets.items():
        found = batches.per_example(0, batch, getattr(batch.rollout, name))
        for index, values in enumerate(expected):
            np.testing.assert_array_equal(found[index], values)
    ids = batches.per_example(0, batch, batch.targets)
    for index, example in enumerate(singles):
        expected = example.responses[0][example.completion_masks[0]]
        np.testing.assert_array_equal(ids[index], expected)


def test_self_check_passes_masks(models):
    config, params, _ = models
    data = Examples()
    for number, pair in enumerate(PAIRS, 1):
        data.append(pair.prompt, pair.responses, f"rows row {number}", pair.completion_masks)
    first_batch = self_check.FirstBatch(
        examples=data,
        indices=np.arange(12),
        metrics={"loss/train": np.log(2), "rewards_train/margins": 0.0},
        eos_id=None,
        reference_is_init=True,
        reference_log_probs=None,
        show=str,
    )
    block = ConfigDict(dict(loss="sigmoid", beta=0.1, weighting="none"))
    mesh = sharding.make_mesh(data=4, tensor=2)
    line = self_check.self_check(config, block, mesh, params, params, first_batch)
    assert "packed batch matches separate rows" in line


def test_losses_divide_by_completion_tokens():
    """Which masks leave out: the lengths of a pair are not those of its texts."""
    pairs = losses.Pairs(
        chosen_log_ratios=np.array([4.0]),
        rejected_log_ratios=np.array([3.0]),
        chosen_log_probs=np.array([0.0]),
        rejected_log_probs=np.array([0.0]),
        chosen_lengths=np.array([2]),
        rejected_lengths=np.array([1]),
    )
    assert pairs.margin_per_token[0] == -1 and pairs.margin[0] == 1
