"""Optimisers, schedules and clipping, with the learning rate and the like traced.

`DIRECTIONS` are optax transformations without the learning rate. The step multiplies by it, so that
runs with different rates share one compiled program.
"""

import jax
import jax.numpy as jnp
import optax

from dpo_jax.parallel import sharding

DIRECTIONS = {
    # The paper's code uses torch's defaults. optax's differ twice: its decay is 0.9, and it divides
    # by sqrt(mean + eps) where torch divides by sqrt(mean) + eps, which matters while gradients are
    # tiny.
    # Weight decay is not part of it: torch's default is 0.
    "rmsprop": lambda decay: optax.scale_by_rms(decay=0.99, eps=1e-8, eps_in_sqrt=False),
    "adamw": lambda decay: optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(decay)),
    # Its usual clipping of each weight's update to a root mean square of 1 belongs to it.
    "adafactor": lambda decay: optax.chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
    ),
    "lion": lambda decay: optax.chain(optax.scale_by_lion(), optax.add_decayed_weights(decay)),
    "sgd": lambda decay: optax.identity(),
}


def make(name: str, weight_decay: float) -> optax.GradientTransformation:
    """Return an optimiser's update direction, by its name in DIRECTIONS."""
    return DIRECTIONS[name](weight_decay)


def learning_rate(schedule: str, step, *, lr, warmup_steps, steps) -> jax.Array:
    """Return the rate of update `step`, counted from 0.

    It rises linearly over warmup_steps, as in the paper's code, then stays ("constant") or falls to
    0 at `steps` ("linear", "cosine"). The last update, step = steps - 1, has a rate above 0.
    """
    # Never 0: the first update of a warm-up of n steps has 1 / (n + 1) of the rate.
    warmup = jnp.minimum(1.0, (step + 1) / (warmup_steps + 1))
    # All of these are traced, so that runs of other lengths and rates share the program.
    progress = jnp.clip((step - warmup_steps) / jnp.maximum(steps - warmup_steps, 1), 0, 1)
    decay = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + jnp.cos(jnp.pi * progress)) / 2,
    }[schedule]
    return lr * warmup * decay


def clip(grads, norm, max_norm):
    """Return gradients scaled down to `max_norm`, as by torch's clip_grad_norm_; 0 leaves them.

    norm: the gradients' own.
    """
    # The 1e-6 is torch's. max_norm is traced, so no Python `if`.
    scale = jnp.where(max_norm > 0, jnp.minimum(1.0, max_norm / (norm + 1e-6)), 1.0)
    return jax.tree.map(lambda g: g * scale, grads)


def state_shardings(mesh, optimizer, params, param_shardings):
    """Return the sharding of each leaf of the optimiser's state.

    Moments lie where their weights do, and what has another shape lies on every device. Without
    this, jit of `optimizer.init` would put every moment whole on every device.
    """

    # Adafactor's factored moments are rows and columns: they have another shape than the weight.
    def place(moment, weight, placed):
        return placed if moment.shape == weight.shape else sharding.replicated(mesh)

    return optax.tree_utils.tree_map_params(
        optimizer,
        place,
        jax.eval_shape(optimizer.init, params),
        params,
        param_shardings,
        transform_non_params=lambda _: sharding.replicated(mesh),
    )
