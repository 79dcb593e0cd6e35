"""Where a step's time goes: its parts compiled apart and timed on one batch, the least of three
runs each.

Apart they do not add up to the step: what XLA fuses or keeps between them differs.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpo_jax.models import log_probs

REPEATS = 3


def measure(trainer) -> dict[str, float]:
    """Seconds of each part of a step of `ours.Trainer`."""
    model, params, batch = trainer.model.config, trainer.state.params, trainer.load(0)
    first = jax.tree.map(lambda x: x[0], batch)
    optimizer = trainer.programs.optimizer

    def trunk(params):
        return log_probs.batch_hidden(model, params, first).astype(jnp.float32).sum()

    def head(params, x_SMD):
        return log_probs.target_log_probs(model, params, x_SMD, first.targets).sum()

    with jax.set_mesh(trainer.mesh):
        hidden_SMD = jax.jit(lambda params: log_probs.completion_hidden(model, params, first))(
            params
        )
        whole = _time(jax.jit(jax.grad(trunk)), params)
        forward = _time(jax.jit(trunk), params)
        found = dict(
            trunk_forward=forward,
            trunk_backward=whole - forward,
            logprobs=_time(jax.jit(jax.grad(head, argnums=(0, 1))), params, hidden_SMD),
        )
        if trainer.reference is not None:
            found["reference"] = _time(
                jax.jit(lambda reference: log_probs.response_log_probs(model, reference, first)),
                trainer.reference,
            )
        gradients = jax.tree.map(jnp.ones_like, params)
        found["optimizer"] = _time(
            jax.jit(optimizer.update), gradients, trainer.state.opt_state, params
        )
    return found | dict(input=_time(trainer.load, 0))


def _time(function: Callable, *arguments) -> float:
    """Seconds of the fastest call after the first, which compiles."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - began)
    return min(seconds)
