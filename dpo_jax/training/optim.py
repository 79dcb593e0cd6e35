"""Optimisers, schedules and clipping, with the learning rate and every other number traced.

`DIRECTIONS` are optax transformations without the learning rate; the step multiplies by it, so that
runs with different rates share one compiled program.
"""

import jax
import jax.numpy as jnp
import optax

from dpo_jax.parallel import sharding

DIRECTIONS = {
    # torch's defaults, which the paper's code uses; optax's own are 0.9 and eps inside the root.
    "rmsprop": lambda decay: optax.scale_by_rms(decay=0.99, eps=1e-8, eps_in_sqrt=False),
    "adamw": lambda decay: optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(decay)),
    "adafactor": lambda decay: optax.chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
    ),
    "lion": lambda decay: optax.chain(optax.scale_by_lion(), optax.add_decayed_weights(decay)),
    "sgd": lambda decay: optax.identity(),
}


def make(name: str, weight_decay: float) -> optax.GradientTransformation:
    """The named optimiser's update direction."""
    return DIRECTIONS[name](weight_decay)


def learning_rate(schedule: str, step, *, lr, warmup_steps, steps) -> jax.Array:
    """The rate of update `step` (from 0): linear warm-up as in the reference code, then constant or
    down to 0.

    The last update of a run, step = steps - 1, still has a rate above 0.
    """
    warmup = jnp.minimum(1.0, (step + 1) / (warmup_steps + 1))
    progress = jnp.clip((step - warmup_steps) / jnp.maximum(steps - warmup_steps, 1), 0, 1)
    decay = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + jnp.cos(jnp.pi * progress)) / 2,
    }[schedule]
    return lr * warmup * decay


def clip(grads, norm, max_norm):
    """Gradients scaled down to `max_norm` as torch's clip_grad_norm_ does; 0 leaves them."""
    scale = jnp.where(max_norm > 0, jnp.minimum(1.0, max_norm / (norm + 1e-6)), 1.0)
    return jax.tree.map(lambda g: g * scale, grads)


def state_shardings(mesh, optimizer, params, param_shardings):
    """Where the optimiser's state lives: moments with their weights, anything of another shape
    everywhere.

    Spelt out because jit of `optimizer.init` alone would leave every moment whole on every device.
    """

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
