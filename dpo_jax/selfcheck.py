"""The check of a real batch before the first step: cheap, and it would have caught half of DPO's known bugs."""

import math

import jax
import numpy as np

from dpo_jax import losses, sharding
from dpo_jax.data import layout
from dpo_jax.logprobs import response_logprobs

CHECKED = 8  # examples that are run through the model


class SelfCheckFailed(RuntimeError):
    """The first batch is not what training takes it to be."""


def self_check(model, block, mesh, params, reference, data, rows, *, eos_id: int | None, exact: bool) -> str:
    """Checks the first batch; returns a line to show, or raises SelfCheckFailed with the row that fails.

    block: the stage's config. rows: the batch's, as indices into `data`. reference: its weights or None.
    eos_id: what responses end in, or None where they do not. exact: the reference is the initial policy, so
    every log-ratio must be 0, and DPO's loss log 2. Also checked: every response has a scored token; the flat
    batch gives the log-probs of separate rows.
    """
    with_eos = _check_tokens(data, rows, eos_id)
    responses = sum(len(data.responses[row]) for row in rows)
    found = [f"{len(rows)} rows", f"EOS ends {with_eos} of {responses} responses" if eos_id is not None else "no EOS"]
    few = rows[:CHECKED]
    logprobs = jax.jit(lambda params, batch: response_logprobs(model, params, batch))
    flat = _logprobs(logprobs, mesh, params, data, few, share_prompt=True)
    _check_finite(flat, data, few)
    if reference is not None and exact:
        ratios = flat - _logprobs(logprobs, mesh, reference, data, few, share_prompt=True)
        found.append(_check_ratios(ratios, block, data, few))
    gap = _check_layout(flat, _logprobs(logprobs, mesh, params, data, few, share_prompt=False), model, data, few)
    found.append(f"flat batch = separate rows to {gap:.1g} nats")
    return "self-check passed: " + ", ".join(found)


def _check_tokens(data, rows, eos_id) -> int:
    """How many responses end in EOS; every one must have a token to score, and one at least must end."""
    with_eos = 0
    for row in rows:
        if len(data.prompts[row]) == 0 or min(map(len, data.responses[row])) == 0:
            raise SelfCheckFailed(f"{data.where[row]} has an empty prompt or no scored token in a response.")
        with_eos += sum(int(response[-1]) == eos_id for response in data.responses[row])
    if eos_id is not None and not with_eos:
        raise SelfCheckFailed(f"no response of the first batch ends in EOS (id {eos_id}); the first is "
                              f"{data.where[rows[0]]}. Raise data.max_length, or set data.append_eos.")
    return with_eos


def _check_finite(logps, data, rows):
    bad = ~np.isfinite(logps).all(axis=1)
    if bad.any():
        raise SelfCheckFailed(f"the model gives {data.where[rows[int(bad.argmax())]]} a log-prob that is not finite.")


def _check_ratios(ratios, block, data, rows) -> str:
    """Policy and reference are the same weights: all log-ratios are exactly 0, and DPO's loss is log 2."""
    if ratios.any():
        row = rows[int(np.abs(ratios).max(axis=1).argmax())]
        raise SelfCheckFailed(f"policy and reference start from the same weights, yet the log-ratio of "
                              f"{data.where[row]} is {np.abs(ratios).max():.3g} nats, not 0.")
    counts = np.ones_like(ratios)
    loss = float(losses.preference(block.loss, *ratios.T, *counts.T, block.beta, block.label_smoothing).mean())
    if block.loss in ("sigmoid", "sigmoid_norm") and abs(loss - math.log(2)) > 1e-6:
        raise SelfCheckFailed(f"the loss at equal policy and reference is {loss:.6f}, not log 2.")
    return f"log-ratios 0, loss {loss:.4f}" + (" = log 2" if abs(loss - math.log(2)) < 1e-6 else "")


def _check_layout(flat, apart, model, data, rows) -> float:
    """The largest difference between the shared-prompt layout and a row per response, nats."""
    gap = np.abs(flat - apart)
    excess = gap - (1e-4 if model.dtype == "float32" else 2e-2) * (1 + np.abs(apart))
    if (excess > 0).any():
        raise SelfCheckFailed(f"the flat batch and separate padded rows differ by {gap.max():.3g} nats on "
                              f"{data.where[rows[int(excess.max(axis=1).argmax())]]}: the attention layout is wrong.")
    return float(gap.max())


def _logprobs(logprobs, mesh, params, data, rows, *, share_prompt: bool) -> np.ndarray:
    """Log-probs of the rows' responses, [rows, responses], each shard of the mesh holding all of them."""
    examples = [(data.prompts[row], data.responses[row]) for row in rows]
    shape = layout.union([layout.shape_of(examples, share_prompt=share_prompt,
                                          buckets=layout.BUCKETS if share_prompt else 1)])
    batch = layout.pack(examples, shape, share_prompt=share_prompt)
    shards = sharding.batch_shards(mesh)
    batch = jax.tree.map(lambda x: np.broadcast_to(x, (shards, *x.shape)), batch)
    with jax.set_mesh(mesh):
        logp_SQ = logprobs(params, sharding.shard_batch(mesh, batch, axis=0))
    local = np.asarray(logp_SQ.addressable_shards[0].data)[0]
    return local.reshape(len(rows), -1)
