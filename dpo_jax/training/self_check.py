"""A check of the real first batch, before the first update.

It is cheap, and would have caught half of the known bugs of DPO implementations.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data import packing
from dpo_jax.data.examples import Examples
from dpo_jax.models import transformer
from dpo_jax.models.log_probs import by_example, response_log_probs
from dpo_jax.models.values import response_rewards
from dpo_jax.parallel import sharding

CHECKED = 8  # examples that are run through the model
# A margin is of two log-ratios, and other examples may have larger ones than those.
MOST_ROUNDING = 4
LOG_2 = math.log(2)
KTO_METRICS = ("loss/train", "kto_train/kl", "kto_train/desirable")


class SelfCheckFailed(RuntimeError):
    """The first batch is not what training takes it to be."""


@dataclasses.dataclass(frozen=True)
class FirstBatch:
    """The first batch of a stage, and what should hold of it."""

    examples: Examples  # the whole split
    indices: np.ndarray  # which of them the batch holds
    metrics: dict[str, float]  # what the stage's own objective measures of it before any update
    eos_id: int | None  # what responses end in
    # So every log-ratio must be 0, and DPO's loss log 2, but for the rounding to reference_dtype.
    reference_is_init: bool
    reference_log_probs: np.ndarray | None  # those kept, of the whole split [examples, responses]
    show: Callable[[int], str]  # index of an example -> its text, for an error message
    reference_dtype: str = "float32"  # that the reference holds the kernels and embeddings in


def self_check(model, block, mesh, params, reference, batch: FirstBatch) -> str:
    """Check the first batch; return a line to show, or raise SelfCheckFailed showing the example.

    Every response has a token to train on, and at least one ends in EOS; log-probs are finite; the
    packed batch gives those of separate rows; and where policy and reference start equal, they are
    equal in both and the loss is what it must be. A reference that is held in fewer bits is
    compared with the policy rounded to them. block: the stage's config block. params, reference:
    full weights; the reference may be None.
    """
    found = [f"{len(batch.indices)} rows"]
    few = batch.indices[:CHECKED]
    try:
        found.append(_check_tokens(batch))
        # Packed as in training, with each prompt once for all its responses.
        packed = _measure(model, mesh, params, batch.examples, few, share=True)
        _check_finite(packed, few)
        start = packed  # of what the reference holds
        if batch.reference_is_init and batch.reference_dtype != "float32":
            rounded = transformer.held(params, batch.reference_dtype)
            start = _measure(model, mesh, rounded, batch.examples, few, share=True)
            del rounded
        if batch.reference_is_init and reference is not None:
            of_reference = _measure(model, mesh, reference, batch.examples, few, share=True)
            # Exactly 0: the same program has run on the same numbers.
            _check_ratios(start - of_reference, few)
            # Inside one program XLA may fuse the two passes in different ways.
            rounding = block.beta * float(_tolerance(model, packed).max()) / 100
            ratios = "log-ratios 0"
            moved = float(np.abs(packed - start).max())
            if moved:
                rounding += MOST_ROUNDING * block.beta * moved
                ratios += (
                    f" but for a reference in {batch.reference_dtype} (up to {moved:.1g} nats)"
                )
            found.append(ratios)
            if "desirable_weight" in block:
                found.append(_check_kto(batch.metrics, block, rounding))
            else:
                # The weights of WPO may be any, and so may its loss.
                loss_name = block.loss if block.weighting == "none" else ""
                found.append(_check_loss(batch, loss_name, rounding))
        if batch.reference_is_init and batch.reference_log_probs is not None:
            found.append(_check_kept(start, batch.reference_log_probs[few], model, few))
        if model.head == "reward":
            # A reward model's head starts from 0, so all rewards are equal.
            found.append(_check_loss(batch, "sigmoid", 0))
        # A row for each response, with its own copy of the prompt: the plain layout.
        apart = _measure(model, mesh, params, batch.examples, few, share=False)
        gap = _check_packing(packed, apart, model, few)
    except _ExampleFails as failure:
        # Shown with its tokens: most mistakes are seen at a glance.
        where = batch.examples.where[failure.index]
        shown = batch.show(failure.index)
        raise SelfCheckFailed(f"{where} {failure.problem}\n{shown}") from None
    found.append(f"packed batch matches separate rows (largest difference {gap:.1g} nats)")
    return "self-check passed: " + ", ".join(found)


class _ExampleFails(Exception):
    """An example is not as it should be."""

    def __init__(self, problem: str, index: int):
        super().__init__(problem, index)
        self.problem = problem
        self.index = index


def _check_tokens(batch: FirstBatch) -> str:
    """Check that every response has a token to train on, and at least one ends in EOS."""
    examples = batch.examples
    responses_read = 0
    with_eos = 0
    # All of the batch: reading tokens costs nothing.
    for index in batch.indices:
        example = examples[index]
        responses = example.responses
        if len(example.prompt) == 0 or min(example.completion_lengths()) == 0:
            raise _ExampleFails("has an empty prompt, or a response without a token.", index)
        responses_read += len(responses)
        for response in responses:
            with_eos += int(response[-1]) == batch.eos_id
    if batch.eos_id is None:
        return "no EOS"
    # A response that was cut ends without EOS. All of them doing so is a mistake.
    if not with_eos:
        raise _ExampleFails(
            "and all others of the first batch have no response that ends in EOS (id "
            f"{batch.eos_id}). Raise config.data.max_length, or set config.data.append_eos.",
            batch.indices[0],
        )
    return f"EOS ends {with_eos} of {responses_read} responses"


def _check_finite(values, indices) -> None:
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise _ExampleFails(
            "has a log-prob that is not finite under this model.", indices[int(bad.argmax())]
        )


def _check_ratios(ratios, indices) -> None:
    if ratios.any():
        sizes = np.abs(ratios)
        worst = int(sizes.max(axis=1).argmax())
        raise _ExampleFails(
            f"has a log-ratio of {sizes.max():.3g} nats, not 0, though policy and reference are "
            "the same weights.",
            indices[worst],
        )


def _check_kept(values, kept, model, indices) -> str:
    """Check that the reference's kept log-probs are those of the initial weights."""
    gap = np.abs(values - kept)
    if not (gap <= _tolerance(model, values)).all():
        raise _ExampleFails(
            f"has kept reference log-probs that are {gap.max():.3g} nats from those of the weights "
            "that this run starts from: remove WORKDIR/reference to have them computed again.",
            indices[int(gap.max(axis=1).argmax())],
        )
    return f"kept reference = initial weights to {gap.max():.1g} nats"


def _tolerance(model, log_probs) -> np.ndarray:
    """Return how far sums of log-probs may differ when they are computed in another layout."""
    # Sums grow with the number of tokens, and so does their rounding.
    relative = 1e-4 if model.dtype == "float32" else 2e-2
    return relative * (1 + np.abs(log_probs))


def _check_loss(batch: FirstBatch, loss_name: str, rounding: float) -> str:
    """Check that at equal weights the objective's margin is 0, and DPO's loss log 2."""
    loss = batch.metrics["loss/train"]
    margin = batch.metrics["rewards_train/margins"]
    # Other losses start at a value that depends on beta, and all of them at one that depends on
    # columns of the data: it is shown, not checked.
    examples = batch.examples
    has_numbers = examples.weights is not None or examples.target_margins is not None
    is_known = loss_name in ("sigmoid", "sigmoid_norm", "robust") and not has_numbers
    expected = LOG_2 if is_known else loss
    if abs(margin) > rounding or abs(loss - expected) > 1e-6 + rounding:
        raise SelfCheckFailed(
            f"at equal policy and reference the first batch has a loss of {loss:.6f} and a margin "
            f"of {margin:.3g}; expected {expected:.6f} and 0."
        )
    is_exact = batch.reference_dtype == "float32"
    equals = " = log 2" if expected == LOG_2 and is_exact else ""
    return f"loss {loss:.4f}{equals}"


def _check_kto(metrics, block, rounding: float) -> str:
    """Check that at equal weights KTO's KL is 0, and each row's loss half its weight."""
    loss, kl, desirable = (metrics[name] for name in KTO_METRICS)
    weight = desirable * block.desirable_weight + (1 - desirable) * block.undesirable_weight
    largest = max(block.desirable_weight, block.undesirable_weight)
    if block.beta * kl > rounding or abs(loss - weight / 2) > largest * (1e-6 + rounding):
        raise SelfCheckFailed(
            f"at equal policy and reference the first batch has a loss of {loss:.6f} and a KL of "
            f"{kl:.3g}; expected {weight / 2:.6f} and 0."
        )
    return f"loss {loss:.4f}, {desirable:.0%} of the rows desirable"


def _check_packing(packed, apart, model, indices) -> float:
    """Return the largest difference between packed responses and a row for each, in nats."""
    gap = np.abs(packed - apart)
    excess = gap - _tolerance(model, apart)
    if (excess > 0).any():
        raise _ExampleFails(
            f"differs by {gap.max():.3g} nats between the packed batch and separate padded rows: "
            "the attention layout is wrong.",
            indices[int(excess.max(axis=1).argmax())],
        )
    return float(gap.max())


@functools.partial(jax.jit, static_argnums=0)
def _values(model, params, batch):
    """Return the log-probs of each example's responses [S, P, K].

    A reward model has none, and its rewards start from 0: sums of what its head reads instead.
    """
    if model.head == "reward":
        ones = {"scalar": jnp.ones(model.width)}
        values_SQ = response_rewards(model, params | {"head": ones}, batch)
    else:
        values_SQ = response_log_probs(model, params, batch)
    return by_example(values_SQ, batch)


def _measure(model, mesh, params, data: Examples, indices, *, share: bool) -> np.ndarray:
    """Return a value of each response of the examples, [examples, responses].

    Each shard of the mesh holds all of them, so any number of examples will do.
    """
    examples = [data[index] for index in indices]
    limits = packing.RowLimits(
        model.narrowest_window, buckets=2 if share else 1, stripes=mesh.shape["context"]
    )
    shape = packing.shape_of(examples, share=share, limits=limits)
    batch = packing.pack(examples, shape, share=share)
    shards = sharding.batch_shards(mesh)
    batch = jax.tree.map(lambda x: np.broadcast_to(x, (shards, *x.shape)), batch)
    with jax.set_mesh(mesh):
        value_SPK = _values(model, params, sharding.shard_batch(mesh, batch, axis=0))
    # All shards hold the same examples, so this process's first one has every value.
    return np.asarray(value_SPK.addressable_shards[0].data)[0]
