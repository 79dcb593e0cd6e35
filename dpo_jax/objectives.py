"""Objectives: what a training stage minimises, on one microbatch.

An objective returns (total, count), metrics: the loss summed over what it is a mean of, and that count, so
that microbatches, shards and evaluation batches add up exactly; metrics are {name: (sum, count)} likewise.
A new loss is a function in `losses.py` and a line in its table, or an objective here and a line in OBJECTIVES.
"""

import jax
import jax.numpy as jnp

from dpo_jax import losses
from dpo_jax.logprobs import response_logprobs


def sft(model, block, params, _reference, _hyper, batch):
    """Negative log-likelihood of completions: summed over tokens, mean over examples; or mean over all tokens."""
    logp_SP, weight_SP = response_logprobs(model, params, batch), batch["weights"]
    tokens_SP = weight_SP * batch["counts"]
    per_token = block.loss == "token_mean"
    total, examples, tokens = (-logp_SP * weight_SP).sum(), weight_SP.sum(), tokens_SP.sum()
    metrics = {
        "loss": (total, tokens if per_token else examples),
        "nll_per_token": (total, tokens),
        "logps/chosen": (-total, examples),
        "lengths/chosen": (tokens, examples),
    }
    return metrics["loss"], metrics


def dpo(model, block, params, reference, hyper, batch):
    """A preference loss on pairs, mean over pairs (Rafailov et al. 2023, eq. 7).

    reference: the reference's weights, or None for a reference-free loss.
    hyper: traced `beta` and `label_smoothing`, so that a sweep never recompiles.
    """
    weight_SP, counts_SP2 = batch["weights"], _paired(batch["counts"])
    logp_SP2 = _paired(response_logprobs(model, params, batch))
    reference_SP2 = jnp.zeros_like(logp_SP2)
    if reference is not None:
        reference_SP2 = jax.lax.stop_gradient(_paired(response_logprobs(model, reference, batch)))
    logratio_SP2 = logp_SP2 - reference_SP2
    loss_SP = losses.preference(block.loss, *_sides(logratio_SP2), *_sides(counts_SP2),
                                hyper["beta"], hyper["label_smoothing"])
    chosen_SP, rejected_SP = _sides(jax.lax.stop_gradient(hyper["beta"] * logratio_SP2))
    per_pair = {
        "loss": loss_SP,
        "rewards/chosen": chosen_SP,
        "rewards/rejected": rejected_SP,
        "rewards/accuracies": chosen_SP > rejected_SP,  # strict: a tie is no success
        "rewards/margins": chosen_SP - rejected_SP,
        "logps/chosen": logp_SP2[..., 0],
        "logps/rejected": logp_SP2[..., 1],
        "lengths/chosen": counts_SP2[..., 0],
        "lengths/rejected": counts_SP2[..., 1],
    }
    metrics = {name: ((value_SP * weight_SP).sum(), weight_SP.sum()) for name, value_SP in per_pair.items()}
    return metrics["loss"], metrics


OBJECTIVES = {"sft": sft, "dpo": dpo}


def _paired(x_SQ):
    """[S, Q] with chosen and rejected in turn -> [S, P, 2]."""
    return x_SQ.reshape(x_SQ.shape[0], -1, 2)


def _sides(x_SP2):
    return x_SP2[..., 0], x_SP2[..., 1]
