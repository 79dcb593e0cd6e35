"""PPO (Ziegler et al. 2019; Schulman et al. 2017) as a feed of the same training loop and the same
step.

A step samples completions from the policy, scores them, spreads a KL penalty against the reference
over their tokens, estimates advantages, and makes several updates on minibatches of them. The
penalty's weight adapts to a target KL; it is kept in the state, so a resumed run goes on as one
that was never stopped.

Letters: B completions of a step, T their tokens; else as in transformer.py.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.console import say
from dpo_jax.data import packing
from dpo_jax.data.batches import Batches, evaluation_order, training_order
from dpo_jax.models.log_probs import token_logprobs
from dpo_jax.parallel import sharding
from dpo_jax.parallel.sharding import constrain
from dpo_jax.sampling import rollouts, sampler
from dpo_jax.sampling.prompts import Prompts
from dpo_jax.training import losses
from dpo_jax.training import metrics as metrics_lib
from dpo_jax.training.loop import Job, programs
from dpo_jax.training.objectives import token_values
from dpo_jax.training.self_check import SelfCheckFailed
from dpo_jax.training.step import TrainState, whole

EPSILON = 1e-8  # beside deviations that are divided by
CHECK_TOLERANCE = 1e-3  # nats per token, between what sampled and what trains

_advantages = jax.jit(losses.advantages)


@dataclasses.dataclass
class Rollout:
    """A step's completions, one row each, and what was measured on them; per-token lists hold
    arrays [tokens].
    """

    examples: list  # (prompt, (completion,))
    scores: np.ndarray  # [B], the reward that is maximised
    ended: np.ndarray  # [B], by EOS
    sampler_logps: list[np.ndarray]
    logps: list[np.ndarray]
    reference_logps: list[np.ndarray]
    values: list[np.ndarray]


class RolloutFeed:
    """Steps on the policy's own completions: each is several updates."""

    def __init__(
        self,
        job: Job,
        prompts: Prompts,
        reward: Callable,
        *,
        tokenizer,
        eos_id: int | None,
        sampling,
        seed: int,
    ):
        """reward: (prompts, completions, tokens) -> scores; sampling: the config's block."""
        block, size = job.block, len(prompts)
        self.total = block.steps or int(block.epochs * size / block.batch_size)
        if not self.total or not size:
            raise ValueError(
                f"ppo: {size} prompts make no step of config.ppo.batch_size = {block.batch_size} in "
                f"{block.epochs} epochs; lower it, or set config.ppo.steps."
            )
        sampler.check(job.model, prompts.ids, sampler.Sampling(sampling.max_new_tokens))
        self.updates = self.total * block.inner_epochs * (block.batch_size // block.minibatch_size)
        self.controls = dict(kl_coef=block.init_kl_coef, score_mean=0.0, score_std=1.0)
        self._job, self._prompts, self._reward, self._tokenizer = job, prompts, reward, tokenizer
        self._eos_id, self._sampling, self._seed = eos_id, sampling, seed
        self._order = training_order(size, block.batch_size, self.total, seed)
        self._sampled = {}  # step -> tokens
        self._splits = dict(
            microbatches=block.minibatch_size // (block.microbatch_size or block.minibatch_size),
            shards=sharding.batch_shards(job.mesh),
        )
        longest = (
            np.zeros(max(map(len, prompts.ids)), np.int32),
            (np.zeros(sampling.max_new_tokens, np.int32),),
        )
        cell = block.minibatch_size // (self._splits["microbatches"] * self._splits["shards"])
        self._shape = packing.shape_of([longest] * max(cell, 1))
        say(
            f"ppo: {self.total} steps of {block.batch_size} completions from {size} prompts, "
            f"{self.updates} updates of {block.minibatch_size}"
        )

    def check(self, params, reference, hyper) -> str:
        """What samples is what trains, and policy and reference start equal."""
        rollout = self._collect(
            params, reference, 0, self._order[0][: self._job.block.minibatch_size]
        )
        gap = max(
            np.abs(a - b).max() for a, b in zip(rollout.logps, rollout.sampler_logps, strict=True)
        )
        ratio = max(
            np.abs(a - b).max() for a, b in zip(rollout.logps, rollout.reference_logps, strict=True)
        )
        tolerance = CHECK_TOLERANCE if self._job.model.dtype == "float32" else 50 * CHECK_TOLERANCE
        if gap > tolerance or ratio > tolerance:
            raise SelfCheckFailed(
                f"before any update the log-probs of sampled tokens differ by {gap:.2g} nats between sampler and "
                f"trainer, and by {ratio:.2g} between policy and reference; expected less than {tolerance:g}."
            )
        return (
            f"self-check passed: {len(rollout.scores)} completions, sampler = trainer to {gap:.1g} nats a token, "
            f"mean reward {rollout.scores.mean():.4g}"
        )

    def steps(self, start: int, reference, hyper, base):
        for step in range(start, self.total):
            yield (
                step,
                functools.partial(
                    self._update, step=step, reference=reference, hyper=hyper, base=base
                ),
            )

    def evaluate(self, params, reference, hyper) -> dict[str, float]:
        return {}  # a policy has no held-out loss; the job's probe samples from it

    def tokens(self, step: int) -> int:
        return self._sampled[step]

    def flops(self, step: int) -> None:
        return None  # most of a step is sampling

    def rows(self, step: int) -> list[str]:
        return [f"prompt {row}" for row in self._order[step]]

    def _update(
        self, state: TrainState, *, step: int, reference, hyper, base
    ) -> tuple[TrainState, dict]:
        block = self._job.block
        params, reference = whole(base, state.params, hyper), whole(base, reference, hyper)
        rollout = self._collect(params, reference, step, self._order[step])
        self._sampled[step] = sum(map(len, rollout.logps))
        controls = {name: float(value) for name, value in state.controls.items()}
        if step == 0:
            controls |= dict(
                score_mean=rollout.scores.mean(), score_std=rollout.scores.std() + EPSILON
            )
        kl = float(
            np.mean(
                [(a - b).sum() for a, b in zip(rollout.logps, rollout.reference_logps, strict=True)]
            )
        )
        rng = np.random.default_rng([self._seed, step])
        order = np.concatenate(
            [rng.permutation(block.batch_size) for _ in range(block.inner_epochs)]
        )
        batches = Batches(
            rollout.examples,
            order.reshape(-1, block.minibatch_size),
            **self._splits,
            shape=self._shape,
            scored=targets(rollout, **controls, gae_lambda=block.gae_lambda),
        )
        total = None
        for number in range(len(batches)):
            batch = sharding.shard_batch(self._job.mesh, batches[number], axis=1)
            state, metrics = programs(self._job).train_step(state, None, hyper, batch, base)
            total = metrics_lib.add(total, metrics)
        measured = {
            "ppo/reward": (rollout.scores.sum(), block.batch_size),
            "ppo/kl": (kl, 1),
            "ppo/kl_coef": (controls["kl_coef"], 1),
            "ppo/length": (self._sampled[step], block.batch_size),
            "ppo/eos_rate": (rollout.ended.sum(), block.batch_size),
        }
        controls["kl_coef"] = adapted_kl_coef(
            controls["kl_coef"], kl, block.target_kl, block.batch_size, block.kl_horizon
        )
        placed = jax.device_put(
            jax.tree.map(jnp.float32, controls), programs(self._job).shardings.controls
        )
        return dataclasses.replace(state, controls=placed), total | measured

    def _collect(self, params, reference, step: int, rows: np.ndarray) -> Rollout:
        """Samples a completion for each prompt, scores it, and measures both models on it."""
        job, prompts = self._job, self._prompts.take(rows)
        drawn = sampler.sample(
            job.model,
            job.mesh,
            params,
            prompts.ids,
            sampler.Sampling(self._sampling.max_new_tokens),
            seed=self._seed,
            eos_id=self._eos_id,
            first=step * len(self._order[0]),
            batch_size=self._sampling.batch_size,
        )
        scored = rollouts.score(prompts, drawn, self._tokenizer, self._reward)
        completions = [completion for (completion,) in drawn]
        examples = [
            (prompt, (completion.tokens,))
            for prompt, completion in zip(prompts.ids, completions, strict=True)
        ]
        measured = self._measure(params, reference, examples)
        return Rollout(
            examples,
            np.array([row["completions"][0]["reward"] for row in scored]),
            np.array([completion.ended for completion in completions]),
            [completion.logps for completion in completions],
            *measured,
        )

    def _measure(self, params, reference, examples) -> list[list[np.ndarray]]:
        """Log-probs under policy and reference, and values, of each example's tokens."""
        batches = Batches(
            examples,
            evaluation_order(len(examples), self._job.block.minibatch_size),
            **self._splits,
            shape=self._shape,
        )
        found = [{}, {}, {}]
        for step in range(len(batches)):
            batch = sharding.shard_batch(self._job.mesh, batches[step], axis=1)
            for rows, values_ASM in zip(
                found, _measure(self._job.model, params, reference, batch), strict=True
            ):
                rows |= batches.per_row(step, np.asarray(values_ASM))
        return [[rows[row] for row in range(len(examples))] for rows in found]


@functools.partial(jax.jit, static_argnums=0)
def _measure(model, params, reference, batch):
    """Log-probs under policy and reference, and values, float32 [A, S, M] each."""

    def one(microbatch):
        logp_SM, value_SM = token_values(model, params, microbatch)
        reference_SM = token_logprobs(dataclasses.replace(model, head="lm"), reference, microbatch)
        return tuple(constrain(x_SM) for x_SM in (logp_SM, reference_SM, value_SM))

    return jax.lax.map(one, batch)


def targets(
    rollout: Rollout, *, kl_coef: float, score_mean: float, score_std: float, gae_lambda: float
) -> dict[str, list[np.ndarray]]:
    """What the objective needs for each token of each completion.

    The reward of a token is minus kl_coef times its log-ratio to the reference; the last one gets
    the completion's score besides, brought to mean 0 and deviation 1 of the first step's, the
    reference's own (Ziegler et al. 2019). Advantages are brought to mean 0 and deviation 1 over all
    tokens of the step.
    """
    counts_B = np.array([len(logps) for logps in rollout.logps])
    logps_BT, reference_BT, values_BT = map(
        _padded, (rollout.logps, rollout.reference_logps, rollout.values)
    )
    rewards_BT = -kl_coef * (logps_BT - reference_BT)
    rewards_BT[np.arange(len(counts_B)), counts_B - 1] += (rollout.scores - score_mean) / score_std
    advantages_BT = np.asarray(_advantages(rewards_BT, values_BT, counts_B, gae_lambda))
    advantages = [row[:count] for row, count in zip(advantages_BT, counts_B, strict=True)]
    value_targets = [
        advantage + values for advantage, values in zip(advantages, rollout.values, strict=True)
    ]
    flat = np.concatenate(advantages)
    flat = (flat - flat.mean()) / (flat.std() + EPSILON)
    return dict(
        sampled_logps=rollout.logps,
        sampled_values=rollout.values,
        value_targets=value_targets,
        advantages=np.split(flat.astype(np.float32), np.cumsum(counts_B)[:-1]),
    )


def adapted_kl_coef(
    kl_coef: float, kl: float, target: float, completions: int, horizon: float
) -> float:
    """The penalty's next weight: more where the KL was above its target, at most 20 % of the way to
    the horizon (Ziegler et al. 2019, section 2.2).
    """
    error = np.clip(kl / target - 1, -0.2, 0.2)
    return kl_coef * (1 + error * completions / horizon)


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of different lengths as one array [B, T], zeros behind."""
    out = np.zeros((len(rows), max(map(len, rows))), np.float32)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out
