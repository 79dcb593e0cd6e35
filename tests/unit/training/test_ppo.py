"""PPO's arithmetic against plain loops; its runs are in runs/test_baselines.py."""

import dataclasses

import jax
import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax.data import packing
from dpo_jax.data.examples import Example
from dpo_jax.models import transformer
from dpo_jax.parallel import sharding
from dpo_jax.sampling.prompts import Prompts
from dpo_jax.sampling.sampler import Sampling
from dpo_jax.training import objectives, ppo
from dpo_jax.training.loop import Job
from tests.helpers.tiny import random_pairs

RNG = np.random.default_rng(0)


def rollout(counts=(4, 1, 3)):
    per_token = [[RNG.normal(size=count).astype(np.float32) for count in counts] for _ in range(4)]
    return ppo.Rollout([], RNG.normal(size=len(counts)), np.ones(len(counts), bool), *per_token)


def test_targets_equal_plain_loop():
    """Reward to go of -kl_coef log-ratio, the normalised reward at the end, less the value; then
    normalised.
    """
    found, kl_coef, lam = rollout(), 0.3, 0.9
    targets = ppo.targets(found, ppo.Controls(kl_coef, reward_mean=0.5, reward_std=2.0), lam)
    expected = []
    for row, whole in enumerate((found.rewards - 0.5) / 2):
        reward = -kl_coef * (found.log_probs[row] - found.reference_log_probs[row])
        reward[-1] += whole
        value = np.append(found.values[row], 0)
        advantage, later = [], 0.0
        for t in reversed(range(len(reward))):
            later = reward[t] + value[t + 1] - value[t] + lam * later
            advantage.insert(0, later)
        expected.append(np.array(advantage))
    for row, advantage in enumerate(expected):
        np.testing.assert_allclose(
            targets.value_targets[row], advantage + found.values[row], atol=1e-5
        )
    flat = np.concatenate(expected)
    np.testing.assert_allclose(
        np.concatenate(targets.advantages), (flat - flat.mean()) / flat.std(), atol=1e-4
    )
    assert [len(row) for row in targets.advantages] == [4, 1, 3]


@pytest.mark.parametrize("kl, factor", [(6.0, 1.0), (6.3, 1.05), (60.0, 1.2), (0.0, 0.8)])
def test_adapted_kl_coef_follows_target(kl, factor):
    """At most a fifth of the way per horizon; a horizon of completions here."""
    assert ppo.adapted_kl_coef(0.5, kl, 6.0, 1000, 1000.0) == pytest.approx(0.5 * factor)
    assert ppo.adapted_kl_coef(0.5, kl, 6.0, 100, 1000.0) == pytest.approx(
        0.5 * (1 + (factor - 1) / 10)
    )


@pytest.mark.parametrize("moved", [0.0, 0.3])
def test_ppo_objective_equals_plain_loop(tiny, moved):
    """Token by token over separate sequences in numpy: ratio, clip, value loss, and padding that
    counts for nothing.

    moved: how far the policy has come since it sampled; at 0 nothing is clipped, and it has no
    distance to the sampler.
    """
    config, params = tiny
    config = dataclasses.replace(config, head="lm_value")
    params = params | {
        "head": params["head"] | {"scalar": RNG.normal(size=config.width).astype(np.float32)}
    }
    rows = [Example(pair.prompt, pair.responses[:1]) for pair in random_pairs(5)]
    batch = jax.tree.map(lambda x: x[None], packing.pack(rows, packing.shape_of([*rows, rows[0]])))
    hyper = dict(clip=0.2, value_clip=0.2, value_coef=0.1)

    log_probs, values = [], []
    for row in rows:
        prompt, (response,) = row.prompt, row.responses
        whole = np.concatenate([prompt, response])[None]
        hidden = transformer.hidden(config, params, whole, np.arange(whole.shape[1])[None])
        logits = np.asarray(transformer.unembed(config, params, hidden), np.float64)[0]
        at = len(prompt) - 1 + np.arange(len(response))
        log_probs.append(
            (logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))[at, response]
        )
        values.append(np.asarray(hidden, np.float64)[0, at] @ params["head"]["scalar"])
    log_probs, values = np.concatenate(log_probs), np.concatenate(values)
    old_log_probs, old_values = (
        log_probs - moved * RNG.normal(size=len(log_probs)),
        values - moved * RNG.normal(size=len(log_probs)),
    )
    advantages, targets = RNG.normal(size=(2, len(log_probs)))
    total = clipped = distance = 0.0
    for log_prob, value, old_log_prob, old_value, advantage, target in zip(
        log_probs, values, old_log_probs, old_values, advantages, targets, strict=True
    ):
        ratio, near = (
            np.exp(log_prob - old_log_prob),
            old_value + np.clip(value - old_value, -0.2, 0.2),
        )
        total += max(-advantage * ratio, -advantage * np.clip(ratio, 0.8, 1.2))
        total += 0.1 * 0.5 * max((value - target) ** 2, (near - target) ** 2)
        clipped, distance = clipped + (abs(ratio - 1) > 0.2), distance + ratio - 1 - np.log(ratio)

    room = batch.targets.shape[1] - len(log_probs)
    assert room
    given = dict(
        sampled_log_probs=old_log_probs,
        sampled_values=old_values,
        advantages=advantages,
        value_targets=targets,
    )
    for name, values_M in given.items():
        given[name] = np.pad(values_M, (0, room), constant_values=9).astype(np.float32)[None]
    batch.rollout = packing.RolloutTargets(**given)
    (found, count), metrics = jax.jit(objectives.make("ppo", config))(params, None, hyper, batch)
    assert count == len(log_probs)
    np.testing.assert_allclose(found, total, rtol=1e-4, atol=1e-4)
    assert metrics["ppo/clipped"] == (clipped, len(log_probs)) and (clipped > 0) == (moved > 0)
    np.testing.assert_allclose(metrics["ppo/kl_to_sampler"][0], distance, rtol=1e-3, atol=1e-5)


def test_devices_along_context_share_the_tokens_of_minibatches(tiny):
    mesh = sharding.make_mesh(data=2, context=4)
    block = configs.default(("rm", "ppo")).ppo
    block.update(batch_size=8, minibatch_size=8, steps=1)
    job = Job("ppo", None, block, tiny[0], mesh, None, None, None, {})
    prompts = Prompts([np.arange(3, dtype=np.int32)] * 8, [""] * 8)
    feed = ppo.RolloutFeed(
        job, prompts, None, tokenizer=None, eos_id=None, sampling=Sampling(max_new_tokens=2)
    )
    completion = np.array([4, 5], np.int32)
    made = dataclasses.replace(
        rollout(counts=[2] * 8), examples=[Example(ids, (completion,)) for ids in prompts.ids]
    )
    batch = feed._minibatches(made, ppo.Controls(kl_coef=0.1), 0)[0]
    assert batch.stripes == 4
    assert batch.tokens.shape[-1] % 4 == 0
