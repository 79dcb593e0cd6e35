"""One update as one jitted function over the mesh, and the evaluation of a batch beside it.

    programs = make_programs(objective, model, mesh, optimizer="adamw")
    state = programs.init_state(params)
    state, metrics = programs.update(state, Frozen(hyper, reference), batch)
    metrics = programs.measure(state.params, Frozen(hyper, reference), batch)

An update donates the state: its arrays are deleted as the new ones are made, so that a device holds
them once. Read the weights from the state that the last update returned, and give a reference
arrays of its own (`copy_params`); what reads a deleted array is refused (`require_alive`).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.data.packing import Batch
from dpo_jax.models import lora as lora_lib
from dpo_jax.models import transformer
from dpo_jax.models.lora import Lora
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import sharding
from dpo_jax.training import optim
from dpo_jax.training.metric_names import BY_SUBSET


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """All that training changes, which is all that a checkpoint holds."""

    # Updates done, int32; the schedule of the learning rate counts by it.
    step: jax.Array
    # What is trained: the weights, or adapters over frozen ones.
    params: dict
    opt_state: optax.OptState
    # Scalars that a stage adapts as it goes: PPO's kl_coef.
    controls: dict = dataclasses.field(default_factory=dict)
    # The reference, where it moves in training; None: `Frozen` has it, or there is none. Updates
    # leave it as it is.
    reference: dict | None = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The inputs that updates read and never change."""

    # Scalars, traced: lr, warmup_steps, steps, max_grad_norm, lora_scale, the objective's own.
    hyper: dict
    # Weights, or adapters over `base`. None: there is no reference, or its log-probs are kept, or
    # it moves, and the state holds it.
    reference: dict | None = None
    # Weights under the adapters. None: all weights are trained.
    base: dict | None = None

    def full(self, params: dict) -> dict:
        """Return the weights to run for `params`, the trained ones or the reference's."""
        return full_params(self.base, params, self.hyper)

    def beside(self, state: TrainState) -> "Frozen":
        """Return the inputs of an update or evaluation, with the reference that the state holds."""
        if state.reference is None:
            return self
        return dataclasses.replace(self, reference=state.reference)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled functions that train one objective, and the layout of their state."""

    optimizer: optax.GradientTransformation
    trained: dict  # shapes and dtypes of what is trained
    shardings: TrainState
    train_step: Callable  # see make_train_step
    eval_step: Callable  # see make_eval_step
    # (params, reference, hyper, batch) -> sums of the objective's first pass over mismatched rows
    # of one microbatch, jitted; None where it has none.
    first_pass: Callable | None = None
    move: Callable | None = None  # see make_move; None: the reference stays

    def init_state(
        self, params: dict, controls: dict | None = None, reference: dict | None = None
    ) -> TrainState:
        """Return the state before the first update.

        It takes `params` over, as updates delete them, and a `reference` that moves.
        """
        state = init_state(self.optimizer, params, controls or {}, self.shardings)
        return dataclasses.replace(state, reference=reference)

    def abstract_state(self, controls: dict) -> TrainState:
        """Return the shapes and dtypes of the state."""
        shapes = abstract_state(self.optimizer, self.trained, controls)
        return dataclasses.replace(shapes, reference=self.trained if self.move else None)

    def update(self, state: TrainState, frozen: Frozen, batch) -> tuple[TrainState, dict]:
        """Return the state after one update, and metrics {name: (sum, count)} before it.

        batch: on the mesh, with two leading axes, microbatches and shards. Deletes `state`.
        """
        # jax would name a deleted buffer here, and not what deleted it.
        require_alive(state.params, "the state")
        frozen = frozen.beside(state)
        require_apart(state.params, frozen.reference)
        # A reference that the state holds is read alone, and not donated with the rest.
        kept = state.reference
        state = dataclasses.replace(state, reference=None)
        state, metrics = self.train_step(state, frozen.reference, frozen.hyper, batch, frozen.base)
        return dataclasses.replace(state, reference=kept), metrics

    def move_reference(self, state: TrainState, mix: float) -> TrainState:
        """Return the state with its reference moved to the policy; deletes the old reference.

        TR-DPO (Gorbatovski et al. 2024): mix * policy + (1 - mix) * reference.
        """
        moved = self.move(state.params, state.reference, np.float32(mix))
        return dataclasses.replace(state, reference=moved)

    def measure(self, params: dict, frozen: Frozen, batch) -> dict:
        """Return metrics {name: (sum, count)} of a batch of one microbatch; changes nothing.

        frozen: `beside` the state, where the reference moves.
        """
        require_alive(params, "what is measured")
        reference = frozen.full(frozen.reference)
        full = frozen.full(params)
        hyper = frozen.hyper
        if self.first_pass is not None:
            hyper = hyper | means(self.first_pass(full, reference, hyper, batch.mismatched))
            batch = dataclasses.replace(batch, mismatched=None)
        metrics, _ = self.eval_step(full, reference, hyper, batch)
        return metrics


def make_programs(
    objective: Callable,
    model: TransformerConfig,
    mesh: jax.sharding.Mesh,
    *,
    first_pass: Callable | None = None,
    routing_pass: Callable | None = None,
    optimizer: str = "rmsprop",
    weight_decay: float = 0.0,
    schedule: str = "constant",
    lora: Lora | None = None,
    moves_reference: bool = False,
) -> Programs:
    """Return what trains an objective on a mesh; nothing is compiled before the first call.

    objective: (params, reference, hyper, microbatch) -> ((total, count), metrics), as in
    objectives.py with model and loss filled in. first_pass, routing_pass: as
    `objectives.make_first_pass` and `make_routing_pass` give them. optimizer, schedule: names from
    optim.py. lora: the adapters that are trained instead of the weights. moves_reference: whether
    the state holds the reference.
    """
    # The optimiser without its learning rate, which is an input of the program.
    direction = optim.make(optimizer, weight_decay)
    # Under adapters the optimiser keeps moments of the adapters alone.
    trained = lora_lib.abstract(model, lora) if lora else transformer.abstract(model)
    shardings = state_shardings(mesh, direction, trained)
    train_step = make_train_step(
        objective, direction, schedule, shardings, first_pass, routing_pass
    )
    eval_step = make_eval_step(objective)
    of_one = None
    if first_pass is not None:
        of_one = jax.jit(functools.partial(sum_over_microbatches, first_pass))
    move = None
    if moves_reference:
        move = make_move(shardings)
        shardings = dataclasses.replace(shardings, reference=shardings.params)
    return Programs(direction, trained, shardings, train_step, eval_step, of_one, move)


def state_shardings(mesh, optimizer, params) -> TrainState:
    """Return a NamedSharding for each leaf of the state, one for all controls.

    params: weights, or their shapes.
    """
    placed = sharding.param_shardings(mesh, params)
    return TrainState(
        step=sharding.replicated(mesh),
        params=placed,
        opt_state=optim.state_shardings(mesh, optimizer, params, placed),
        controls=sharding.replicated(mesh),
    )


def init_state(optimizer, params, controls: dict, shardings: TrainState) -> TrainState:
    """Return the state before the first update, for weights that are on the mesh already."""
    # Each device makes its own part of the moments: they are as large as the weights, or twice so.
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    return TrainState(step, params, opt_state, place_controls(controls, shardings))


def place_controls(controls: dict, shardings: TrainState) -> dict:
    """Return the controls as float32 scalars on the mesh."""
    return {
        name: jax.device_put(jnp.float32(value), shardings.controls)
        for name, value in controls.items()
    }


def abstract_state(optimizer, params, controls: dict) -> TrainState:
    """Return the shapes and dtypes of the state, from those of the weights."""

    def init(params):
        scalars = jax.tree.map(jnp.float32, controls)
        return TrainState(jnp.int32(0), params, optimizer.init(params), scalars)

    return jax.eval_shape(init, params)


def make_train_step(
    objective,
    optimizer,
    schedule: str,
    shardings: TrainState,
    first_pass: Callable | None = None,
    routing_pass: Callable | None = None,
):
    """Return train_step(state, reference, hyper, batch, base=None) -> (state, metrics), jitted.

    The state is donated. objective: (params, reference, hyper, microbatch) -> ((total, count),
    metrics). hyper: scalars, all of them traced: lr, warmup_steps, steps, max_grad_norm and the
    objective's own. base: the frozen weights under the state's and the reference's, where those are
    adapters. first_pass: measures batch.mismatched before the first gradient. routing_pass:
    measures where the tokens of all microbatches go. metrics: {name: (sum, count)}, with grad_norm,
    param_norm, update_norm and lr.
    """

    def train_step(state: TrainState, reference, hyper, batch, base=None):
        is_balanced = routing_pass is not None and "router_aux_loss_coef" in hyper
        # A single microbatch sees by itself where all tokens go.
        if is_balanced and len(batch.tokens) > 1:
            full = full_params(base, state.params, hyper)
            sums = sum_over_microbatches(routing_pass, full, reference, hyper, batch)
            hyper = hyper | means(sums)
        if first_pass is not None:
            # Over all microbatches and shards: the gradient of each needs the mean of all.
            full = full_params(base, state.params, hyper)
            full_reference = full_params(base, reference, hyper)
            sums = sum_over_microbatches(first_pass, full, full_reference, hyper, batch.mismatched)
            hyper = hyper | means(sums)
            batch = dataclasses.replace(batch, mismatched=None)

        # Adapters are laid over their base inside what is differentiated, so the gradient is of
        # the adapters, and of nothing below them.
        def objective_of_trained(trained, reference, hyper, microbatch):
            params = full_params(base, trained, hyper)
            return objective(params, full_params(base, reference, hyper), hyper, microbatch)

        grads, metrics = accumulate(objective_of_trained, state.params, reference, hyper, batch)
        with jax.named_scope("optimizer"):
            # Measured before clipping: it is what clipping is judged by.
            grad_norm = optax.tree.norm(grads)
            grads = optim.clip(grads, grad_norm, hyper["max_grad_norm"])
            direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
            # The rate is applied here, not in the optimiser, so that it can be traced.
            lr = optim.learning_rate(
                schedule,
                state.step,
                lr=hyper["lr"],
                warmup_steps=hyper["warmup_steps"],
                steps=hyper["steps"],
            )
            updates = jax.tree.map(lambda d: -lr * d, direction)
            params = optax.apply_updates(state.params, updates)
            # Of the update as a whole, so each is a sum of one.
            metrics |= {
                "grad_norm": (grad_norm, 1.0),
                "param_norm": (optax.tree.norm(params), 1.0),
                "update_norm": (optax.tree.norm(updates), 1.0),
                "lr": (lr, 1.0),
            }
        return TrainState(state.step + 1, params, opt_state, state.controls), metrics

    # The new state takes the memory of the old one. Where metrics lie is left to the compiler.
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def make_eval_step(objective):
    """Return eval_step(params, reference, hyper, batch) -> (metrics, of_each), jitted.

    batch: of one microbatch; params, reference: full weights. of_each: {name: (value, count)} of
    each example, [S, P], that the metrics BY_SUBSET are the sums of; {} where batches have no
    weights, as those of an objective from elsewhere.
    """

    def eval_step(params, reference, hyper, batch):
        # The axis of microbatches is there, with one of them: nothing is accumulated here.
        microbatch = jax.tree.map(lambda x: x[0], batch)

        if not isinstance(microbatch, Batch):
            _, metrics = objective(params, reference, hyper, microbatch)
            return metrics, {}

        def measure(weights_SP):
            weighted = dataclasses.replace(microbatch, weights=weights_SP)
            _, metrics = objective(params, reference, hyper, weighted)
            return {name: metrics[name] for name in BY_SUBSET if name in metrics}, metrics

        # They are sums of weights times values, so the derivative by a weight is the value of that
        # example. The weights come in last, and nothing else is differentiated.
        values_SP, metrics = jax.jacrev(measure, has_aux=True)(microbatch.weights)
        of_each = jax.tree.map(lambda x: sharding.constrain(x * microbatch.weights), values_SP)
        return metrics, of_each

    return jax.jit(eval_step)


def sum_over_microbatches(first_pass: Callable, params, reference, hyper, batch) -> dict:
    """Return {name: (sum, count)} of a first pass over all microbatches.

    params, reference: full weights.
    """

    def add(sums, microbatch):
        found = first_pass(params, reference, hyper, microbatch)
        return jax.tree.map(jnp.add, sums, found), None

    first = jax.tree.map(lambda x: x[0], batch)
    shapes = jax.eval_shape(first_pass, params, reference, hyper, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, _ = jax.lax.scan(add, zeros, batch)
    return sums


def means(sums: dict) -> dict:
    """Return {name: mean} from {name: (sum, count)}, with 0 where nothing counts."""
    return {name: total / jnp.maximum(count, 1) for name, (total, count) in sums.items()}


def make_move(shardings: TrainState):
    """Return move(params, reference, mix) -> the moved reference, jitted; it is donated."""

    def move(params, reference, mix):
        # With a mix of 1 exactly the policy, whatever the reference was.
        return jax.tree.map(lambda new, old: mix * new + (1 - mix) * old, params, reference)

    return jax.jit(move, donate_argnums=1, out_shardings=shardings.params)


def full_params(base, params, hyper):
    """Return the weights to run: `params` themselves, or adapters laid over a frozen base."""
    # None: there is no reference to lay over the base.
    if base is None or params is None:
        return params
    return lora_lib.join(base, params, hyper["lora_scale"])


def accumulate(objective, params, reference, hyper, batch):
    """Return the gradient of the mean loss over all microbatches, and the metrics.

    Totals and counts are added up and divided once, at the end: a batch has the same gradient
    however many microbatches it comes in.
    """

    # The total is differentiated, not the mean: microbatches may count differently (tokens, or
    # pairs that only fill up), and only the sum of all counts is what the loss is a mean over.
    def total_loss(params, microbatch):
        # The count depends on the data alone, so it needs no gradient.
        (total, count), metrics = objective(params, reference, hyper, microbatch)
        return total, (count, metrics)

    def add(carry, microbatch):
        grads, (count, metrics) = jax.grad(total_loss, has_aux=True)(params, microbatch)
        # Metrics are (sum, count) too, so they add up in the same way.
        return jax.tree.map(jnp.add, carry, (grads, count, metrics)), None

    first = jax.tree.map(lambda x: x[0], batch)
    microbatches = len(jax.tree.leaves(batch)[0])
    if microbatches == 1:
        # No loop, so no second copy of the gradient to add to.
        grads, (count, metrics) = jax.grad(total_loss, has_aux=True)(params, first)
    else:
        # A scan compiles one microbatch, and holds the activations of one at a time. Its carry
        # starts from zeros, whose shapes are known without running anything.
        _, (count, metrics) = jax.eval_shape(total_loss, params, first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, count, metrics))
        (grads, count, metrics), _ = jax.lax.scan(add, zeros, batch)
    # The gradient of total / count, since the count is a constant. It is 0 where a batch has
    # examples of weight 0 alone: then so is the total.
    count = jnp.where(count == 0, 1, count)
    return jax.tree.map(lambda g: g / count, grads), metrics


def copy_params(params: dict) -> dict:
    """Return the weights in arrays of their own, for what must outlive an update of `params`."""
    return jax.tree.map(jnp.copy, params)


def require_alive(params, name: str) -> None:
    """Raise RuntimeError where an update has deleted arrays of `params`, called `name`."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise RuntimeError(
                f"{name} went into an update, which deletes its arrays as it makes new ones. "
                "Use what the last update returned, or copy the weights before it "
                "(dpo_jax.training.step.copy_params)."
            )


def require_apart(params, reference) -> None:
    """Raise ValueError where policy and reference share arrays, which an update would delete."""
    # By identity, which is cheap: it is asked before every update.
    trained = {id(leaf) for leaf in jax.tree.leaves(params)}
    if any(id(leaf) in trained for leaf in jax.tree.leaves(reference)):
        raise ValueError(
            "the reference shares arrays with the policy, and an update deletes the policy's. Give "
            "the reference a copy of its own (dpo_jax.training.step.copy_params)."
        )
