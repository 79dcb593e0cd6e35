"""Objectives: what a training stage minimises, on one microbatch.

An objective is a function (model, loss, params, reference, hyper, batch) -> (total, count),
metrics. The loss is total / count: a sum and what it is a mean over, so that microbatches, shards
and evaluation batches add up exactly. Metrics are {name: (sum, count)}, for the same reason.

model: a TransformerConfig. loss: which of the objective's losses, where it has several. params,
reference: weights. hyper: the stage's numbers, traced, so that a sweep over them compiles nothing.
batch: a `packing.Batch` with a leading axis of shards S.

A new preference loss is a function in losses.py and a line in loss_table.py. A new objective is a
function here and its line in OBJECTIVES.

Letters: S shards, P examples of a shard, Q responses, M completion tokens; 2: chosen, rejected.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import loss_table
from dpo_jax.data.packing import Batch
from dpo_jax.models.experts import Routing
from dpo_jax.models.log_probs import (
    batch_hidden_and_routing,
    by_example,
    example_log_probs,
    response_log_probs,
)
from dpo_jax.models.values import response_rewards, token_values
from dpo_jax.training import losses

# A log-prob where there is no pair: any that losses of log-probs are finite at.
NO_PAIR = -1.0


def sft(model, loss, params, _reference, hyper, batch: Batch):
    """Negative log-likelihood of completions.

    loss: "sum", over the tokens of each example, mean over examples; or "token_mean", the mean over
    all tokens.
    """
    sums = example_log_probs(model, params, batch, routing="router_aux_loss_coef" in hyper)
    log_probs_SP = sums.log_probs[..., 0]
    lengths_SP = by_example(batch.response_lengths, batch)[..., 0]
    total = (-log_probs_SP * batch.weights).sum()
    examples = batch.weights.sum()
    tokens = (batch.weights * lengths_SP).sum()
    metrics = {
        "loss": (total, tokens if loss == "token_mean" else examples),
        "nll_per_token": (total, tokens),
        "logps/chosen": (-total, examples),
        "lengths/chosen": (tokens, examples),
    }
    return _balanced(metrics["loss"], metrics, sums.routing, hyper)


def dpo(model, loss, params, reference, hyper, batch: Batch):
    """A preference loss on pairs, mean over pairs (Rafailov et al. 2023, eq. 7).

    loss: a `losses.Preference`. reference: None where the batch has its log-probs, or where there
    is no reference. Raises ValueError where the loss has another shape than the pairs.
    """
    choices = loss.choices
    is_weighted = choices.weighting == "wpo"
    sums_of = functools.partial(
        example_log_probs, model, batch=batch, shared=choices.is_length_desensitized
    )
    sums = sums_of(params, squares=is_weighted, routing="router_aux_loss_coef" in hyper)
    log_probs_SP2 = sums.log_probs
    # Without a reference the log-ratio is the log-prob itself.
    log_ratios_SP2 = loss.compared(sums, hyper)
    if reference is not None:
        # The name is for profiles, as is the optimiser's in step.py and the head's in log_probs.py.
        with jax.named_scope("reference"):
            reference_SP2 = loss.compared(sums_of(reference, gradient=False), hyper)
        log_ratios_SP2 = log_ratios_SP2 - jax.lax.stop_gradient(reference_SP2)
    elif batch.reference_log_probs is not None:
        log_ratios_SP2 = log_ratios_SP2 - batch.reference_log_probs
    log_probs_SP2 = _of_pairs(log_probs_SP2, batch, NO_PAIR)
    log_ratios_SP2 = _of_pairs(log_ratios_SP2, batch, 0.0)
    scores_SP2 = loss.scores(log_ratios_SP2, hyper)

    lengths_SP2 = by_example(batch.response_lengths, batch)
    pairs = losses.Pairs(
        chosen_log_ratios=scores_SP2[..., 0],
        rejected_log_ratios=scores_SP2[..., 1],
        chosen_log_probs=log_probs_SP2[..., 0],
        rejected_log_probs=log_probs_SP2[..., 1],
        chosen_lengths=lengths_SP2[..., 0],
        rejected_lengths=lengths_SP2[..., 1],
        target_margins=batch.target_margins,
    )
    loss_SP = loss(pairs, hyper)
    weight_SP = loss.gradient_weight(pairs, hyper)
    if is_weighted:
        wpo_SP = losses.wpo_weights(log_probs_SP2, sums.log_sum_squares, lengths_SP2)
        loss_SP *= wpo_SP
        weight_SP = None if weight_SP is None else weight_SP * wpo_SP
    # The implicit rewards of eq. 5, for the metrics alone.
    rewards_SP2 = hyper["beta"] * scores_SP2
    total, metrics = _pair_metrics(
        batch, loss_SP, rewards_SP2=rewards_SP2, log_probs_SP2=log_probs_SP2
    )
    if weight_SP is not None:
        metrics |= _sums({"dpo/gradient_weight": jax.lax.stop_gradient(weight_SP)}, batch.weights)
    return _balanced(total, metrics, sums.routing, hyper)


def unlikelihood(model, _loss, params, _reference, hyper, batch: Batch):
    """Likelihood of the chosen and unlikelihood of the rejected response, mean over pairs.

    A baseline of the paper.
    """
    sums = example_log_probs(model, params, batch, routing="router_aux_loss_coef" in hyper)
    log_probs_SP2 = _of_pairs(sums.log_probs, batch, NO_PAIR)
    loss_SP = losses.unlikelihood(log_probs_SP2[..., 0], log_probs_SP2[..., 1], hyper["alpha"])
    total, metrics = _pair_metrics(batch, loss_SP, log_probs_SP2=log_probs_SP2)
    return _balanced(total, metrics, sums.routing, hyper)


def kto(model, _loss, params, reference, hyper, batch: Batch):
    """KTO on unpaired rows, mean over rows (Ethayarajh et al. 2024, eq. 8).

    hyper["mismatched_log_ratio"]: as `kto_first_pass` measures it.
    """
    sums = example_log_probs(model, params, batch, routing="router_aux_loss_coef" in hyper)
    log_probs_SP = sums.log_probs[..., 0]
    with jax.named_scope("reference"):
        reference_SQ = response_log_probs(model, reference, batch, gradient=False)
        reference_SP = by_example(reference_SQ, batch)[..., 0]
    log_ratios_SP = log_probs_SP - jax.lax.stop_gradient(reference_SP)
    kl = jnp.maximum(hyper["mismatched_log_ratio"], 0.0)
    loss_SP = losses.kto(
        log_ratios_SP,
        batch.labels,
        kl,
        hyper["beta"],
        hyper["desirable_weight"],
        hyper["undesirable_weight"],
    )
    ones_SP = jnp.ones_like(loss_SP)
    loss, metrics = _weighted(
        {"loss": loss_SP, "kto/kl": kl * ones_SP, "kto/desirable": batch.labels}, batch.weights
    )
    of_row = {
        "rewards": jax.lax.stop_gradient(hyper["beta"] * log_ratios_SP),
        "logps": log_probs_SP,
        "lengths": by_example(batch.response_lengths, batch)[..., 0],
    }
    for kind, is_kind in (("chosen", batch.labels), ("rejected", ~batch.labels)):
        named = {f"{name}/{kind}": value for name, value in of_row.items()}
        metrics |= _sums(named, batch.weights * is_kind)
    return _balanced(loss, metrics, sums.routing, hyper)


def kto_first_pass(model, params, reference, _hyper, batch: Batch):
    """Measure what KTO's KL is estimated from, without a gradient: {name: (sum, count)}.

    batch: of mismatched rows.
    """
    with jax.named_scope("mismatched"):
        log_ratios_SQ = response_log_probs(model, params, batch, gradient=False)
        log_ratios_SQ -= response_log_probs(model, reference, batch, gradient=False)
        log_ratios_SP = by_example(log_ratios_SQ, batch)[..., 0]
    # A cut may leave of a completion only what is not trained on.
    has_tokens_SP = by_example(batch.response_lengths, batch)[..., 0] > 0
    return _sums({"mismatched_log_ratio": log_ratios_SP}, batch.weights * has_tokens_SP)


def routing_pass(model, loss, params, _reference, _hyper, batch: Batch):
    """Measure where the tokens of a microbatch go, without a gradient: {name: (sum, count)}.

    The load-balancing loss is a product of two sums over the whole batch. With one of them known
    beforehand, and by how much the loss of all tokens counts, it adds up over microbatches.
    """
    _, routing = batch_hidden_and_routing(model, params, batch)
    count_SP = batch.weights
    if loss == "token_mean":
        count_SP = count_SP * by_example(batch.response_lengths, batch)[..., 0]
    return {
        "expert_shares": (routing.chosen_E, routing.tokens),
        "counted_per_token": (count_SP.sum(), routing.tokens),
    }


def _balanced(loss: tuple, metrics: dict, routing: Routing | None, hyper: dict):
    """Return (total, count) with the load-balancing loss added, and the metrics with it.

    hyper: as `routing_pass` measures it, or without that where the batch is all there is.
    """
    if routing is None:
        return loss, metrics
    total, count = loss
    imbalance = routing.imbalance(hyper.get("expert_shares", routing.shares_E))
    metrics |= {"router/imbalance": (jax.lax.stop_gradient(imbalance), routing.tokens)}
    # The mean over tokens, for a total that is to be divided by the count of the whole batch.
    counted_per_token = hyper.get("counted_per_token", count / jnp.maximum(routing.tokens, 1))
    total += hyper["router_aux_loss_coef"] * imbalance * counted_per_token
    return (total, count), metrics


def rm(model, _loss, params, _reference, _hyper, batch: Batch):
    """A reward model's Bradley-Terry loss, mean over pairs (eq. 2)."""
    rewards_SP2 = by_example(response_rewards(model, params, batch), batch)
    loss_SP = losses.bradley_terry(rewards_SP2[..., 0], rewards_SP2[..., 1], batch.target_margins)
    return _pair_metrics(batch, loss_SP, rewards_SP2=rewards_SP2)


def ppo(model, _loss, params, _reference, hyper, batch: Batch):
    """PPO's clipped policy and value losses, mean over tokens (Schulman et al. 2017).

    batch.rollout holds what was measured when the completions were sampled.
    """
    # Fixed numbers of the sampling policy, through which no gradient goes.
    rollout = batch.rollout
    log_probs_SM, values_SM = token_values(model, params, batch)
    log_ratio_SM = log_probs_SM - rollout.sampled_log_probs
    policy_loss_SM = losses.ppo_policy(log_ratio_SM, rollout.advantages, hyper["clip"])
    value_loss_SM = losses.ppo_value(
        values_SM, rollout.sampled_values, rollout.value_targets, hyper["value_clip"]
    )
    per_token = {
        "loss": policy_loss_SM + hyper["value_coef"] * value_loss_SM,
        "ppo/policy_loss": policy_loss_SM,
        "ppo/value_loss": value_loss_SM,
        "ppo/clipped": jnp.abs(jnp.exp(log_ratio_SM) - 1) > hyper["clip"],
        # Schulman's k3 estimate, which is never negative.
        "ppo/kl_to_sampler": jnp.exp(log_ratio_SM) - 1 - log_ratio_SM,
    }
    responses = batch.response_lengths.shape[-1]
    # Padding has a segment past the last response.
    completion_mask_SM = (batch.segment_ids < responses).astype(jnp.float32)
    return _weighted(per_token, completion_mask_SM)


OBJECTIVES = {
    "sft": sft,
    "preferred_ft": sft,
    "unlikelihood": unlikelihood,
    "rm": rm,
    "dpo": dpo,
    "kto": kto,
    "ppo": ppo,
}
# What is measured of a whole batch before its first gradient, and is a number of `hyper` then.
FIRST_PASSES = {"kto": kto_first_pass}
# Those whose loss may have the load-balancing loss of experts beside it.
BALANCED = ("sft", "preferred_ft", "unlikelihood", "dpo", "kto")
# The fields of the stages' config blocks that are in `hyper`.
OBJECTIVE_NUMBERS = (
    *loss_table.numbers(),
    *("ld_alpha", "alpha", "desirable_weight", "undesirable_weight"),
    *("clip", "value_clip", "value_coef"),
)


def make(
    name: str,
    model,
    loss: str | tuple[str, ...] | Callable = "",
    choices: losses.Choices = losses.PLAIN,
) -> Callable:
    """Return (params, reference, hyper, batch) -> (total, count), metrics.

    name: a key of OBJECTIVES. loss: the config's choice by name; for dpo also the names in a
    mixture, or a function of pairs, beta and label_smoothing. choices: of dpo.
    """
    if name == "dpo":
        loss = losses.preference(loss, choices)
    return functools.partial(OBJECTIVES[name], model, loss)


def make_first_pass(name: str, model) -> Callable | None:
    """Return (params, reference, hyper, batch.mismatched) -> sums, or None where it has none."""
    return functools.partial(FIRST_PASSES[name], model) if name in FIRST_PASSES else None


def check_balance(name: str, block, model) -> None:
    """Raise ValueError where a stage is to balance the experts of a model that has none."""
    coef = block.get("router_aux_loss_coef", 0)
    if coef and not model.experts:
        raise ValueError(
            f"config.{name}.router_aux_loss_coef = {coef}: this model has no experts to balance; "
            "expected 0."
        )


def make_routing_pass(name: str, model, loss="") -> Callable | None:
    """Return (params, reference, hyper, batch) -> sums; None where there are no experts."""
    if not model.experts or name not in BALANCED:
        return None
    return functools.partial(routing_pass, model, loss)


def numbers(block, steps: int, updates_per_step: int = 1) -> dict:
    """Return `hyper`: the numbers of a stage that are traced, not compiled in.

    The learning rate goes by updates, of which PPO makes several a step, so both lengths of its
    schedule are in updates here.
    """
    found = dict(
        lr=block.lr,
        warmup_steps=block.warmup_steps * updates_per_step,
        steps=steps * updates_per_step,
        max_grad_norm=block.max_grad_norm,
    )
    for name in OBJECTIVE_NUMBERS:
        if name in block:
            found[name] = block[name]
    # Left out at 0, where nothing is to be measured.
    if block.get("router_aux_loss_coef"):
        found["router_aux_loss_coef"] = block["router_aux_loss_coef"]
    loss = block.get("loss", "")
    if loss_table.is_mixture(loss):
        found["loss_weights"] = list(loss_table.weights(loss).values())
    return {name: np.float32(value) for name, value in found.items()}


def _pair_metrics(batch: Batch, loss_SP, *, rewards_SP2=None, log_probs_SP2=None):
    """Return (total, count) of the loss, and metrics of pairs by the reference code's names."""
    lengths_SP2 = by_example(batch.response_lengths, batch)
    per_pair = {
        "loss": loss_SP,
        "lengths/chosen": lengths_SP2[..., 0],
        "lengths/rejected": lengths_SP2[..., 1],
    }
    if rewards_SP2 is not None:
        rewards_SP2 = jax.lax.stop_gradient(rewards_SP2)
        chosen_SP, rejected_SP = rewards_SP2[..., 0], rewards_SP2[..., 1]
        per_pair |= {
            "rewards/chosen": chosen_SP,
            "rewards/rejected": rejected_SP,
            "rewards/accuracies": chosen_SP > rejected_SP,  # strict: a tie is no success
            "rewards/margins": chosen_SP - rejected_SP,
        }
    if log_probs_SP2 is not None:
        per_pair |= {
            "logps/chosen": log_probs_SP2[..., 0],
            "logps/rejected": log_probs_SP2[..., 1],
        }
    return _weighted(per_pair, batch.weights)


def _of_pairs(values_SP2: jax.Array, batch: Batch, otherwise: float) -> jax.Array:
    """Return the values of pairs, and another where there is no pair.

    What stands there otherwise may make a loss infinite, and 0 times that, or times its gradient,
    is not a number.
    """
    return jnp.where(batch.weights[..., None] > 0, values_SP2, otherwise)


def _weighted(values: dict[str, jax.Array], weights: jax.Array):
    """Return (total, count) of the loss, and all values as metrics {name: (sum, count)}."""
    metrics = _sums(values, weights)
    return metrics["loss"], metrics


def _sums(values: dict[str, jax.Array], weights: jax.Array) -> dict:
    """Return {name: (sum, count)} of values."""
    sums = {}
    for name, value in values.items():
        sums[name] = (jnp.where(weights > 0, value * weights, 0).sum(), weights.sum())
    return sums
