"""Objectives: what a training stage minimises, on one microbatch.

An objective returns (total, count), metrics: the loss summed over what it is a mean of, and that
count, so that microbatches, shards and evaluation batches add up exactly; metrics are {name: (sum,
count)} likewise. `hyper` holds the stage's numbers, traced, so that a sweep never recompiles;
`loss` is its config's choice by name. A new loss is a function in `losses.py` and a line in its
table, or an objective here and a line in OBJECTIVES.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.log_probs import response_log_probs
from dpo_jax.models.values import response_rewards, token_values
from dpo_jax.training import losses


def sft(model, loss, params, _reference, _hyper, batch):
    """Negative log-likelihood of completions: summed over tokens, mean over examples; or mean over
    all tokens.
    """
    log_probs_SP, weight_SP = response_log_probs(model, params, batch), batch.weights
    tokens_SP = weight_SP * batch.response_lengths
    total, examples, tokens = (-log_probs_SP * weight_SP).sum(), weight_SP.sum(), tokens_SP.sum()
    metrics = {
        "loss": (total, tokens if loss == "token_mean" else examples),
        "nll_per_token": (total, tokens),
        "logps/chosen": (-total, examples),
        "lengths/chosen": (tokens, examples),
    }
    return metrics["loss"], metrics


def dpo(model, loss, params, reference, hyper, batch):
    """A preference loss on pairs, mean over pairs (Rafailov et al. 2023, eq. 7).

    reference: the reference's weights; None where the batch has its log-probs, or where the loss is
    reference-free.
    """
    counts_SP2, log_probs_SP2 = (
        _paired(batch.response_lengths),
        _paired(response_log_probs(model, params, batch)),
    )
    logratio_SP2 = log_probs_SP2
    if reference is not None:
        logratio_SP2 -= jax.lax.stop_gradient(_paired(response_log_probs(model, reference, batch)))
    elif batch.reference_log_probs is not None:
        logratio_SP2 -= _paired(batch.reference_log_probs)
    loss_SP = losses.preference(
        loss, *_sides(logratio_SP2), *_sides(counts_SP2), hyper["beta"], hyper["label_smoothing"]
    )
    return _pair_metrics(
        batch, loss_SP, rewards=hyper["beta"] * logratio_SP2, log_probs=log_probs_SP2
    )


def unlikelihood(model, _loss, params, _reference, hyper, batch):
    """Likelihood of the chosen and unlikelihood of the rejected response, mean over pairs (the
    paper's baseline).
    """
    log_probs_SP2 = _paired(response_log_probs(model, params, batch))
    return _pair_metrics(
        batch, losses.unlikelihood(*_sides(log_probs_SP2), hyper["alpha"]), log_probs=log_probs_SP2
    )


def rm(model, _loss, params, _reference, _hyper, batch):
    """A reward model's Bradley-Terry loss, mean over pairs (eq. 2)."""
    rewards_SP2 = _paired(response_rewards(model, params, batch))
    return _pair_metrics(batch, losses.bradley_terry(*_sides(rewards_SP2)), rewards=rewards_SP2)


def ppo(model, _loss, params, _reference, hyper, batch):
    """PPO's clipped policy and value losses, mean over tokens (Schulman et al. 2017).

    batch.rollout holds what the loss needs of each completion token.
    """
    log_probs_SM, value_SM = token_values(model, params, batch)
    real_SM = (batch.segment_ids < batch.response_lengths.shape[-1]).astype(jnp.float32)
    logratio_SM = log_probs_SM - batch.rollout.sampled_log_probs
    policy_SM = losses.ppo_policy(logratio_SM, batch.rollout.advantages, hyper["clip"])
    value_loss_SM = losses.ppo_value(
        value_SM, batch.rollout.sampled_values, batch.rollout.value_targets, hyper["value_clip"]
    )
    per_token = {
        "loss": policy_SM + hyper["value_coef"] * value_loss_SM,
        "ppo/policy_loss": policy_SM,
        "ppo/value_loss": value_loss_SM,
        "ppo/clipped": jnp.abs(jnp.exp(logratio_SM) - 1) > hyper["clip"],
        "ppo/kl_to_sampler": jnp.exp(logratio_SM)
        - 1
        - logratio_SM,  # never negative; Schulman's k3
    }
    metrics = {
        name: ((value_SM * real_SM).sum(), real_SM.sum()) for name, value_SM in per_token.items()
    }
    return metrics["loss"], metrics


OBJECTIVES = {
    "sft": sft,
    "preferred_ft": sft,
    "unlikelihood": unlikelihood,
    "rm": rm,
    "dpo": dpo,
    "ppo": ppo,
}
OBJECTIVE_NUMBERS = (
    "beta",
    "label_smoothing",
    "alpha",
    "clip",
    "value_clip",
    "value_coef",
)  # of the config's blocks


def numbers(block, steps: int) -> dict:
    """The numbers of a stage that are traced, not compiled in: `hyper`."""
    found = dict(
        lr=block.lr, warmup_steps=block.warmup_steps, steps=steps, max_grad_norm=block.max_grad_norm
    )
    found |= {name: block[name] for name in OBJECTIVE_NUMBERS if name in block}
    return {name: np.float32(value) for name, value in found.items()}


def _pair_metrics(batch, loss_SP, *, rewards=None, log_probs=None):
    """(total, count) of the loss, and the metrics of pairs by the reference code's names."""
    per_pair = {
        "loss": loss_SP,
        "lengths/chosen": _paired(batch.response_lengths)[..., 0],
        "lengths/rejected": _paired(batch.response_lengths)[..., 1],
    }
    if rewards is not None:
        chosen_SP, rejected_SP = _sides(jax.lax.stop_gradient(rewards))
        per_pair |= {
            "rewards/chosen": chosen_SP,
            "rewards/rejected": rejected_SP,
            "rewards/accuracies": chosen_SP > rejected_SP,  # strict: a tie is no success
            "rewards/margins": chosen_SP - rejected_SP,
        }
    if log_probs is not None:
        per_pair |= {"logps/chosen": log_probs[..., 0], "logps/rejected": log_probs[..., 1]}
    weight_SP = batch.weights
    metrics = {
        name: ((value_SP * weight_SP).sum(), weight_SP.sum()) for name, value_SP in per_pair.items()
    }
    return metrics["loss"], metrics


def _paired(x_SQ):
    """[S, Q] with chosen and rejected in turn -> [S, P, 2]."""
    return x_SQ.reshape(x_SQ.shape[0], -1, 2)


def _sides(x_SP2):
    return x_SP2[..., 0], x_SP2[..., 1]
