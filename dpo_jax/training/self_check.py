"""The check of a real batch before the first step: cheap, and it would have caught half of DPO's
known bugs.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data import packing
from dpo_jax.models.log_probs import response_logprobs
from dpo_jax.parallel import sharding
from dpo_jax.training.objectives import response_rewards

CHECKED = 8  # examples that are run through the model


class SelfCheckFailed(RuntimeError):
    """The first batch is not what training takes it to be."""


def self_check(
    model,
    block,
    mesh,
    params,
    reference,
    data,
    rows,
    measured,
    *,
    eos_id: int | None,
    exact: bool,
    show_row,
    reference_logps=None,
) -> str:
    """Checks the first batch; returns a line to show, or raises SelfCheckFailed that shows the row
    that fails.

    block: the stage's config. rows: the batch's, as indices into `data`. reference: its weights or
    None. measured: the stage's own metrics of the batch, before any update. eos_id: what responses
    end in, or None. exact: the reference is the initial policy, so every log-ratio must be 0, and
    DPO's loss log 2; with the reference's kept log-probs of all rows, `reference_logps`, up to
    rounding. Also checked: every response has a scored token; the flat batch gives the log-probs of
    separate rows.
    """
    try:
        found = [f"{len(rows)} rows", _check_tokens(data, rows, eos_id)]
        few = rows[:CHECKED]
        flat = _measure(model, mesh, params, data, few, share_prompt=True)
        _check_finite(flat, few)
        if reference is not None and exact:
            _check_ratios(
                flat - _measure(model, mesh, reference, data, few, share_prompt=True), few
            )
            rounding = (
                block.beta * float(_tolerance(model, flat).max()) / 100
            )  # the same layout, fused otherwise
            found.append(_check_loss(measured, block.loss, rounding))
        if reference_logps is not None and exact:
            found.append(_check_kept(flat, reference_logps[few], model, few))
        if model.head == "score":
            found.append(_check_loss(measured, "sigmoid", 0))  # its head starts from 0
        gap = _check_layout(
            flat, _measure(model, mesh, params, data, few, share_prompt=False), model, few
        )
    except _RowFails as failure:
        text, row = failure.args
        raise SelfCheckFailed(f"{data.where[row]} {text}\n{show_row(row)}") from None
    found.append(f"flat batch = separate rows to {gap:.1g} nats")
    return "self-check passed: " + ", ".join(found)


class _RowFails(Exception):
    """(what is wrong, row)."""


def _check_tokens(data, rows, eos_id) -> str:
    """Every response must have a token to score, and one at least must end in EOS."""
    with_eos = count = 0
    for row in rows:
        if len(data.prompts[row]) == 0 or min(map(len, data.responses[row])) == 0:
            raise _RowFails("has an empty prompt or no scored token in a response.", row)
        count += len(data.responses[row])
        with_eos += sum(int(response[-1]) == eos_id for response in data.responses[row])
    if eos_id is None:
        return "no EOS"
    if not with_eos:
        raise _RowFails(
            f"and all others of the first batch have no response that ends in EOS (id {eos_id}). "
            "Raise config.data.max_length, or set config.data.append_eos.",
            rows[0],
        )
    return f"EOS ends {with_eos} of {count} responses"


def _check_finite(logps, rows):
    bad = ~np.isfinite(logps).all(axis=1)
    if bad.any():
        raise _RowFails(
            "has a log-prob that is not finite under this model.", rows[int(bad.argmax())]
        )


def _check_ratios(ratios, rows):
    if ratios.any():
        row = rows[int(np.abs(ratios).max(axis=1).argmax())]
        raise _RowFails(
            f"has a log-ratio of {np.abs(ratios).max():.3g} nats, not 0, though policy and reference are "
            "the same weights.",
            row,
        )


def _check_kept(flat, kept, model, rows) -> str:
    """The reference's kept log-probs are those of the initial weights."""
    gap = np.abs(flat - kept)
    if not (gap <= _tolerance(model, flat)).all():
        raise _RowFails(
            f"has kept reference log-probs that are {gap.max():.3g} nats from those of the weights that "
            "this run starts from: remove WORKDIR/reference to have them computed again.",
            rows[int(gap.max(axis=1).argmax())],
        )
    return f"kept reference = initial weights to {gap.max():.1g} nats"


def _tolerance(model, logps) -> np.ndarray:
    """What sums of log-probs may differ by when they are computed in another layout."""
    return (1e-4 if model.dtype == "float32" else 2e-2) * (1 + np.abs(logps))


def _check_loss(measured, name: str, rounding: float) -> str:
    """The objective's own margin is 0 at equal weights, and DPO's loss log 2.

    Up to rounding: inside one program, XLA may fuse the policy's pass and the reference's in
    different ways.
    """
    loss, margin = measured["loss/train"], measured["rewards_train/margins"]
    expected = math.log(2) if name in ("sigmoid", "sigmoid_norm", "robust") else loss
    if abs(margin) > rounding or abs(loss - expected) > 1e-6 + rounding:
        raise SelfCheckFailed(
            f"at equal policy and reference the first batch has a loss of {loss:.6f} and a margin of "
            f"{margin:.3g}; expected {expected:.6f} and 0."
        )
    return f"log-ratios 0, loss {loss:.4f}" + (" = log 2" if expected == math.log(2) else "")


def _check_layout(flat, apart, model, rows) -> float:
    """The largest difference between the shared-prompt layout and a row per response, nats."""
    gap = np.abs(flat - apart)
    excess = gap - _tolerance(model, apart)
    if (excess > 0).any():
        raise _RowFails(
            f"differs by {gap.max():.3g} nats between the flat batch and separate padded rows: the "
            "attention layout is wrong.",
            rows[int(excess.max(axis=1).argmax())],
        )
    return float(gap.max())


@functools.partial(jax.jit, static_argnums=0)
def _values(model, params, batch):
    """Log-probs of the responses; of a reward model, which has none and starts from 0, sums of what
    its head reads.
    """
    if model.head == "score":
        return response_rewards(model, params | {"head": {"scalar": jnp.ones(model.width)}}, batch)
    return response_logprobs(model, params, batch)


def _measure(model, mesh, params, data, rows, *, share_prompt: bool) -> np.ndarray:
    """A value of each of the rows' responses, [rows, responses], each shard of the mesh holding all
    of them.
    """
    examples = [(data.prompts[row], data.responses[row]) for row in rows]
    shape = packing.shape_of(examples, share_prompt=share_prompt, buckets=2 if share_prompt else 1)
    batch = packing.pack(examples, shape, share_prompt=share_prompt)
    shards = sharding.batch_shards(mesh)
    batch = jax.tree.map(lambda x: np.broadcast_to(x, (shards, *x.shape)), batch)
    with jax.set_mesh(mesh):
        value_SQ = _values(model, params, sharding.shard_batch(mesh, batch, axis=0))
    local = np.asarray(value_SQ.addressable_shards[0].data)[0]
    return local.reshape(len(rows), -1)
