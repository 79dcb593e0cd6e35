"""Time the parts of our training step, each compiled alone, on one batch.

The parts do not add up to the step, because XLA fuses and keeps other values between them when it
compiles the whole.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpo_jax.models import log_probs

REPEATS = 3  # the fastest counts


def measure(trainer) -> dict[str, float]:
    """Return the seconds of each part of a step of `ours.Trainer`."""
    model, params = trainer.model.config, trainer.state.params
    first = jax.tree.map(lambda x: x[0], trainer.load(0))  # its one microbatch

    # Each part ends in a sum, so that it can be differentiated.
    def trunk(params):
        return log_probs.batch_hidden(model, params, first).astype(jnp.float32).sum()

    def head(params, x_SMD):
        return log_probs.target_log_probs(model, params, x_SMD, first.targets).sum()

    def hidden(params):
        return log_probs.completion_hidden(model, params, first)

    def reference_log_probs(reference):
        return log_probs.response_log_probs(model, reference, first)

    with jax.set_mesh(trainer.mesh):
        hidden_SMD = jax.jit(hidden)(params)
        forward_and_backward = _time(jax.jit(jax.grad(trunk)), params)
        forward = _time(jax.jit(trunk), params)
        found = dict(trunk_forward=forward, trunk_backward=forward_and_backward - forward)
        head_gradients = jax.jit(jax.grad(head, argnums=(0, 1)))
        found["logprobs"] = _time(head_gradients, params, hidden_SMD)
        if trainer.reference is not None:
            found["reference"] = _time(jax.jit(reference_log_probs), trainer.reference)
        gradients = jax.tree.map(jnp.ones_like, params)
        optimizer_update = jax.jit(trainer.programs.optimizer.update)
        opt_state = trainer.state.opt_state
        found["optimizer"] = _time(optimizer_update, gradients, opt_state, params)
    found["input"] = _time(trainer.load, 0)
    return found


def _time(function: Callable, *arguments) -> float:
    """Return the seconds of the fastest call after the first, which compiles."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - began)
    return min(seconds)
