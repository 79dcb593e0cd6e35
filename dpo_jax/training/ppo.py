"""PPO (Ziegler et al. 2019; Schulman et al. 2017) as a feed of the same loop and the same update.

A step samples completions from the policy, rewards them, spreads a KL penalty against the reference
over their tokens, estimates advantages, and makes several updates on minibatches of them. The
weight of the penalty adapts to a target KL. It is kept in the state, so that a resumed run equals
one that was never stopped.

Letters: B completions of a step, T their tokens; otherwise as in transformer.py.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from dpo_jax import costs
from dpo_jax.console import say
from dpo_jax.data import packing
from dpo_jax.data.batches import (
    Batches,
    microbatch_size_of,
    microbatches_of,
    steps_of,
    training_order,
)
from dpo_jax.data.examples import Example
from dpo_jax.models import flops
from dpo_jax.models.inference import limits_of, map_tokens
from dpo_jax.models.loading import Model
from dpo_jax.models.log_probs import token_log_probs
from dpo_jax.models.values import token_values
from dpo_jax.parallel import sharding
from dpo_jax.parallel.sharding import constrain
from dpo_jax.sampling import rollouts, sampler
from dpo_jax.sampling.prompts import Prompts
from dpo_jax.sampling.sampler import Sampling
from dpo_jax.training import losses
from dpo_jax.training import metrics as metrics_lib
from dpo_jax.training.data_feed import say_uneven_shards, say_unfinished_warmup
from dpo_jax.training.loop import Job
from dpo_jax.training.self_check import SelfCheckFailed
from dpo_jax.training.step import Frozen, TrainState, place_controls

EPSILON = 1e-8  # added to deviations that are divided by
CHECK_TOLERANCE = 1e-3  # nats per token, between the program that samples and the one that trains

_advantages = jax.jit(losses.advantages)


@dataclasses.dataclass
class Rollout:
    """A step's completions and what was measured on them; per-token lists hold arrays [tokens]."""

    examples: list[Example]  # prompt and completion
    rewards: np.ndarray  # [B], what is maximised
    ended: np.ndarray  # [B], by EOS rather than by length
    sampler_log_probs: list[np.ndarray]  # under the policy, by the program that sampled
    log_probs: list[np.ndarray]  # under the policy, by the program that trains
    reference_log_probs: list[np.ndarray]
    values: list[np.ndarray]

    @property
    def tokens(self) -> int:
        """Return the number of sampled tokens."""
        return sum(map(len, self.log_probs))

    def kl(self) -> float:
        """Return the mean over completions of the summed log-ratio to the reference, in nats."""
        log_ratios = []
        for policy, reference in zip(self.log_probs, self.reference_log_probs, strict=True):
            log_ratios.append((policy - reference).sum())
        return float(np.mean(log_ratios))


@dataclasses.dataclass(frozen=True)
class Controls:
    """The scalars that PPO adapts, kept in the state's `controls`.

    Checkpoints call the mean and the deviation score_mean and score_std.
    """

    kl_coef: float  # the weight of the KL penalty
    # Of the first step's rewards, the reference's own; 0 and 1 where rewards are taken as they are.
    reward_mean: float = 0.0
    reward_std: float = 1.0

    @classmethod
    def of_state(cls, state: TrainState) -> "Controls":
        """Read them from a state."""
        saved = {name: float(value) for name, value in state.controls.items()}
        return cls(saved["kl_coef"], saved["score_mean"], saved["score_std"])

    def to_dict(self) -> dict[str, float]:
        """Return them by the names they have in a state."""
        return dict(kl_coef=self.kl_coef, score_mean=self.reward_mean, score_std=self.reward_std)


class RolloutFeed:
    """The `loop.Feed` of the policy's own completions: each step is several updates."""

    def __init__(
        self,
        job: Job,
        prompts: Prompts,
        reward: Callable,
        *,
        tokenizer,
        eos_id: int | None,
        other_eos_ids: tuple[int, ...] = (),
        sampling: Sampling,
    ):
        """Lay out the prompts of the whole stage.

        reward: (prompts, completions, tokens) -> rewards. eos_id, other_eos_ids: the tokens that
        end a completion, as in `Model`. sampling: one completion of each prompt, at temperature 1.
        """
        block = job.block
        size = len(prompts)
        self.total = steps_of(size, block.batch_size, steps=block.steps, epochs=block.epochs)
        if not self.total or not size:
            raise ValueError(
                f"ppo: {size} prompts make no step of config.ppo.batch_size = {block.batch_size} "
                f"in {block.epochs} epochs. Lower it, or set config.ppo.steps."
            )
        sampler.check(job.model, prompts.ids, sampling)
        minibatches = block.batch_size // block.minibatch_size
        self.updates_per_step = block.inner_epochs * minibatches
        self.waits = True  # for the samples, which it rewards
        self.controls = Controls(kl_coef=block.init_kl_coef).to_dict()
        self._job = job
        self._prompts = prompts
        self._reward = reward
        self._tokenizer = tokenizer
        self._eos_id = eos_id
        self._other_eos_ids = other_eos_ids
        self._sampling = sampling
        self._order = training_order(size, block.batch_size, self.total, sampling.seed)
        self._tokens_of_step = {}
        self._work_of_step = {}
        shards = sharding.batch_shards(job.mesh)
        self._splits = dict(microbatches=microbatches_of(block, shards), shards=shards)
        self._shape = self._largest_shape()
        say(
            f"ppo: {self.total} steps of {block.batch_size} completions from {size} prompts, "
            f"{self.total * self.updates_per_step} updates of {block.minibatch_size}"
        )
        say_uneven_shards("ppo", block, shards)
        say_unfinished_warmup("ppo", block, self.total)

    def start(self, frozen: Frozen, first_step: int) -> None:
        # A step depends on its number and the state alone, so nothing is prepared.
        self._frozen = frozen

    def check(self, state: TrainState) -> str:
        """Check that what samples is what trains, and that policy and reference start equal."""
        few = self._order[0][: self._job.block.minibatch_size]
        rollout = self._collect(state.params, 0, few)
        gap = _largest_gap(rollout.log_probs, rollout.sampler_log_probs)
        ratio = _largest_gap(rollout.log_probs, rollout.reference_log_probs)
        rounded = 50 * CHECK_TOLERANCE
        tolerance = CHECK_TOLERANCE if self._job.model.dtype == "float32" else rounded
        # A reference that is held in fewer bits than the policy is not quite the policy.
        is_same = _dtypes(self._frozen.reference) == _dtypes(state.params)
        if gap > tolerance or ratio > (tolerance if is_same else rounded):
            raise SelfCheckFailed(
                f"before any update the log-probs of sampled tokens differ by {gap:.2g} nats "
                f"between sampler and trainer, and by {ratio:.2g} between policy and reference; "
                f"expected less than {tolerance:g}."
            )
        return (
            f"self-check passed: {len(rollout.rewards)} completions, sampler = trainer to "
            f"{gap:.1g} nats a token, mean reward {rollout.rewards.mean():.4g}"
        )

    def run(self, state: TrainState, step: int) -> tuple[TrainState, dict]:
        block = self._job.block
        rollout = self._collect(state.params, step, self._order[step])
        self._tokens_of_step[step] = rollout.tokens
        self._work_of_step[step] = self._work_of(rollout)
        controls = Controls.of_state(state)
        # The policy is still the reference, so these rewards are the reference's own.
        if step == 0 and block.normalize_rewards:
            controls = dataclasses.replace(
                controls,
                reward_mean=rollout.rewards.mean(),
                reward_std=rollout.rewards.std() + EPSILON,
            )

        batches = self._minibatches(rollout, controls, step)
        # The rollout holds the reference's log-probs already, so the updates need no reference.
        frozen = dataclasses.replace(self._frozen, reference=None)
        metrics = None
        for number in range(len(batches)):
            batch = sharding.shard_batch(self._job.mesh, batches[number], axis=1)
            state, of_update = self._job.programs.update(state, frozen, batch)
            metrics = metrics_lib.add(metrics, of_update)

        kl = rollout.kl()
        metrics |= {
            "ppo/reward": (rollout.rewards.sum(), block.batch_size),
            "ppo/kl": (kl, 1),
            "ppo/kl_coef": (controls.kl_coef, 1),
            "ppo/length": (rollout.tokens, block.batch_size),
            "ppo/eos_rate": (rollout.ended.sum(), block.batch_size),
        }
        # For the next step: this one was made with the weight that its row shows.
        kl_coef = adapted_kl_coef(
            controls.kl_coef, kl, block.target_kl, block.batch_size, block.kl_horizon
        )
        controls = dataclasses.replace(controls, kl_coef=kl_coef)
        placed = place_controls(controls.to_dict(), self._job.programs.shardings)
        return dataclasses.replace(state, controls=placed), metrics

    def evaluate(self, state: TrainState) -> dict[str, float]:
        # A policy has no held-out loss. The job's probe samples from it.
        return {}

    def tokens(self, step: int) -> int:
        return self._tokens_of_step[step]

    def flops(self, step: int) -> None:
        # Most of a step is sampling, which is bound by memory.
        return None

    def work(self, step: int) -> costs.Work:
        return self._work_of_step[step]

    def _work_of(self, rollout: Rollout) -> costs.Work:
        """Return what a step takes, all models together; a true reward's own work is left out."""
        block, model = self._job.block, self._job.model
        contents = flops.contents_of(rollout.examples)
        once = sum(flops.forward(model, contents).values())
        # To sample, then to measure policy and reference.
        needed = 3 * once
        if block.reward == "rm":  # a model of the same size
            rewarding = flops.forward(dataclasses.replace(model, head="reward"), contents)
            needed += sum(rewarding.values())
        update = flops.of_step(model, contents, frozen=self._job.lora is not None)
        return costs.Work(
            samples=block.batch_size,
            sampled_tokens=rollout.tokens,
            examples=block.inner_epochs * block.batch_size,
            read_tokens=block.inner_epochs * contents.tokens,
            flops=needed + block.inner_epochs * update,
        )

    def examples(self, step: int) -> list[str]:
        return [f"prompt {index}" for index in self._order[step]]

    def close(self) -> None:
        """Do nothing: this feed holds neither threads nor files."""

    def _largest_shape(self) -> packing.Shape:
        """Return a shape that any minibatch fits: completions are not known when it is compiled."""
        prompt = np.zeros(max(map(len, self._prompts.ids)), np.int32)
        completion = np.zeros(self._sampling.max_new_tokens, np.int32)
        cells = self._splits["microbatches"] * self._splits["shards"]
        # Some cells have one more than others, where they cannot all have as many.
        examples_in_cell = -(-self._job.block.minibatch_size // cells)
        examples = [Example(prompt, (completion,))] * examples_in_cell
        # A step has one completion of each prompt, so there is nothing to share.
        limits = limits_of(self._job.model, self._job.mesh)
        return packing.shape_of(examples, share=False, limits=limits)

    def _minibatches(self, rollout: Rollout, controls: Controls, step: int) -> Batches:
        """Return each completion once per inner epoch, in an order of its own."""
        block = self._job.block
        rng = np.random.default_rng([self._sampling.seed, step])
        epochs = [rng.permutation(block.batch_size) for _ in range(block.inner_epochs)]
        order = np.concatenate(epochs).reshape(-1, block.minibatch_size)
        return Batches(
            rollout.examples,
            order,
            **self._splits,
            share=False,
            shape=self._shape,
            rollout=targets(rollout, controls, block.gae_lambda),
        )

    def _collect(self, trained: dict, step: int, indices: np.ndarray) -> Rollout:
        """Sample a completion for each prompt, reward it, and measure both models on it."""
        frozen = self._frozen
        params = frozen.full(trained)
        prompts = self._prompts.take(indices)
        model = Model(
            self._job.model,
            params,
            self._tokenizer,
            self._job.mesh,
            self._eos_id,
            self._other_eos_ids,
        )
        # A draw depends on the prompt's number in the whole run, so a resumed run draws the same.
        first = step * len(self._order[0])
        drawn = sampler.sample(model, prompts.ids, self._sampling, first=first)
        rows = rollouts.with_rewards(prompts, drawn, self._tokenizer, self._reward)
        completions = [completion for (completion,) in drawn]
        examples = []
        for prompt, completion in zip(prompts.ids, completions, strict=True):
            examples.append(Example(prompt, (completion.tokens,)))
        log_probs, reference_log_probs, values = self._measure(
            params, frozen.full(frozen.reference), examples
        )
        return Rollout(
            examples=examples,
            rewards=np.array([row["completions"][0]["reward"] for row in rows]),
            ended=np.array([completion.ended for completion in completions]),
            sampler_log_probs=[completion.log_probs for completion in completions],
            log_probs=log_probs,
            reference_log_probs=reference_log_probs,
            values=values,
        )

    def _measure(self, params, reference, examples) -> list[list[np.ndarray]]:
        """Return log-probs under policy and reference, and values, of each example's tokens."""
        job = self._job
        return map_tokens(
            functools.partial(_measure, job.model, params, reference),
            examples,
            job.mesh,
            batch_size=microbatch_size_of(job.block),
            shape=self._shape,
        )


@functools.partial(jax.jit, static_argnums=0)
def _measure(config, params, reference, batch):
    """Return log-probs under policy and reference, and values, float32 [S, M] each."""
    log_probs_SM, values_SM = token_values(config, params, batch)
    reference_config = dataclasses.replace(config, head="lm")
    reference_SM = token_log_probs(reference_config, reference, batch)
    return tuple(constrain(x_SM) for x_SM in (log_probs_SM, reference_SM, values_SM))


def targets(rollout: Rollout, controls: Controls, gae_lambda: float) -> packing.RolloutTargets:
    """Return what the objective needs for each token of each completion, in lists of arrays.

    The reward of a token is minus kl_coef times its log-ratio to the reference. The last token also
    gets the completion's reward, brought to mean 0 and deviation 1 of the first step's, which are
    the reference's own (Ziegler et al. 2019), or as it is, by the controls. Advantages are brought
    to mean 0 and deviation 1 over all tokens of the step.
    """
    lengths_B = np.array([len(log_probs) for log_probs in rollout.log_probs])
    longest = lengths_B.max()
    log_probs_BT = packing.pad_right(rollout.log_probs, longest, dtype=np.float32)
    reference_BT = packing.pad_right(rollout.reference_log_probs, longest, dtype=np.float32)
    values_BT = packing.pad_right(rollout.values, longest, dtype=np.float32)

    # The KL penalty is paid where it arises, the reward when the completion is whole.
    rewards_BT = -controls.kl_coef * (log_probs_BT - reference_BT)
    last_token_B = lengths_B - 1
    normalised_B = (rollout.rewards - controls.reward_mean) / controls.reward_std
    rewards_BT[np.arange(len(lengths_B)), last_token_B] += normalised_B

    advantages_BT = np.asarray(_advantages(rewards_BT, values_BT, lengths_B, gae_lambda))
    advantages = []
    value_targets = []
    for advantages_T, length, values_T in zip(
        advantages_BT, lengths_B, rollout.values, strict=True
    ):
        advantages.append(advantages_T[:length])
        value_targets.append(advantages_T[:length] + values_T)

    # Over tokens, so that long completions weigh more, as in the loss.
    flat = np.concatenate(advantages)
    flat = (flat - flat.mean()) / (flat.std() + EPSILON)
    starts_of_others = np.cumsum(lengths_B)[:-1]
    return packing.RolloutTargets(
        sampled_log_probs=rollout.log_probs,
        sampled_values=rollout.values,
        value_targets=value_targets,
        advantages=np.split(flat.astype(np.float32), starts_of_others),
    )


def adapted_kl_coef(
    kl_coef: float, kl: float, target: float, completions: int, horizon: float
) -> float:
    """Return the next weight of the KL penalty: more where the KL was above its target.

    It moves at most 20 % of the way to the horizon, which is in completions (Ziegler et al. 2019,
    section 2.2). A weight of 0 stays 0.
    """
    error = np.clip(kl / target - 1, -0.2, 0.2)
    return kl_coef * (1 + error * completions / horizon)


def _dtypes(params: dict) -> list:
    return [leaf.dtype for leaf in jax.tree.leaves(params)]


def _largest_gap(some: list[np.ndarray], others: list[np.ndarray]) -> float:
    """Return the largest difference between two lists of arrays."""
    return max(np.abs(a - b).max() for a, b in zip(some, others, strict=True))
