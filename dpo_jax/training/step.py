"""The train step: one jit over the mesh, from a batch to the next state; and its like for
evaluation.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from dpo_jax.models import lora
from dpo_jax.parallel import sharding
from dpo_jax.training import optim


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """All that training changes, so all that a checkpoint holds."""

    step: jax.Array  # updates done
    params: dict
    opt_state: optax.OptState
    controls: dict = dataclasses.field(
        default_factory=dict
    )  # scalars that a stage adapts (PPO's kl_coef)


def state_shardings(mesh, optimizer, params) -> TrainState:
    """The NamedSharding of every leaf of the state, one for all controls; `params` may be
    abstract.
    """
    placed = sharding.param_shardings(mesh, params)
    return TrainState(
        sharding.replicated(mesh),
        placed,
        optim.state_shardings(mesh, optimizer, params, placed),
        sharding.replicated(mesh),
    )


def init_state(optimizer, params, controls: dict, shardings: TrainState) -> TrainState:
    """The state before the first update, of weights already on the mesh."""
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    controls = {
        name: jax.device_put(jnp.float32(value), shardings.controls)
        for name, value in controls.items()
    }
    return TrainState(
        jax.device_put(jnp.zeros((), jnp.int32), shardings.step), params, opt_state, controls
    )


def abstract_state(optimizer, params, controls: dict) -> TrainState:
    """The shapes and dtypes of the state, from those of the weights."""
    return jax.eval_shape(
        lambda params: TrainState(
            jnp.int32(0), params, optimizer.init(params), jax.tree.map(jnp.float32, controls)
        ),
        params,
    )


def make_train_step(objective, optimizer, schedule: str, shardings: TrainState):
    """train_step(state, reference, hyper, batch, base=None) -> (state, metrics), jitted, with the
    state donated.

    objective: (params, reference, hyper, microbatch) -> ((total, count), metrics). hyper: dict of
    scalars, all traced: lr, warmup_steps, steps, max_grad_norm and the objective's own. base: the
    frozen weights under those of the state and of the reference, where these are adapters. metrics:
    {name: (sum, count)}, with grad_norm, param_norm, update_norm and lr.
    """

    def train_step(state: TrainState, reference, hyper, batch, base=None):
        def of_trained(params, reference, hyper, microbatch):
            return objective(
                whole(base, params, hyper), whole(base, reference, hyper), hyper, microbatch
            )

        grads, metrics = accumulate(of_trained, state.params, reference, hyper, batch)
        grad_norm = optax.tree.norm(grads)
        grads = optim.clip(grads, grad_norm, hyper["max_grad_norm"])
        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        lr = optim.learning_rate(
            schedule,
            state.step,
            lr=hyper["lr"],
            warmup_steps=hyper["warmup_steps"],
            steps=hyper["steps"],
        )
        updates = jax.tree.map(lambda d: -lr * d, direction)
        params = optax.apply_updates(state.params, updates)
        metrics |= {
            name: (value, 1.0)
            for name, value in dict(
                grad_norm=grad_norm,
                param_norm=optax.tree.norm(params),
                update_norm=optax.tree.norm(updates),
                lr=lr,
            ).items()
        }
        return TrainState(state.step + 1, params, opt_state, state.controls), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def whole(base, params, hyper):
    """The weights to run: as they are, or laid over a frozen base (LoRA)."""
    return (
        params if base is None or params is None else lora.join(base, params, hyper["lora_scale"])
    )


def accumulate(objective, params, reference, hyper, batch):
    """Gradient of the mean loss over all microbatches, and metrics.

    Totals and counts are added up and divided once, at the end, so that a batch's gradient is the
    same in however many microbatches it comes.
    """

    def total_loss(params, microbatch):
        (total, count), metrics = objective(params, reference, hyper, microbatch)
        return total, (count, metrics)

    def add(carry, microbatch):
        grads, (count, metrics) = jax.grad(total_loss, has_aux=True)(params, microbatch)
        return jax.tree.map(jnp.add, carry, (grads, count, metrics)), None

    first = jax.tree.map(lambda x: x[0], batch)
    microbatches = len(batch["tokens"])
    if microbatches == 1:
        grads, (count, metrics) = jax.grad(total_loss, has_aux=True)(params, first)
    else:
        _, (count, metrics) = jax.eval_shape(total_loss, params, first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, count, metrics))
        (grads, count, metrics), _ = jax.lax.scan(add, zeros, batch)
    return jax.tree.map(lambda g: g / count, grads), metrics


def make_eval_step(objective):
    """eval_step(params, reference, hyper, batch) -> metrics of a batch of one microbatch,
    jitted.
    """

    def eval_step(params, reference, hyper, batch):
        return objective(params, reference, hyper, jax.tree.map(lambda x: x[0], batch))[1]

    return jax.jit(eval_step)
