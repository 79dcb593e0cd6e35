"""The step: microbatches, donation, traced numbers, float32 sums."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data.batches import Batches, training_order
from dpo_jax.data.examples import Example
from dpo_jax.models import transformer
from dpo_jax.models.log_probs import by_example, example_log_probs, response_log_probs
from dpo_jax.models.transformer import LayerKind
from dpo_jax.parallel import sharding
from dpo_jax.training import objectives, optim, step
from dpo_jax.training.losses import PLAIN, Choices
from tests.helpers.tiny import HYPER, random_pairs

# WPO and LD-DPO at once, and the number that LD-DPO takes.
WEIGHTED = Choices(weighting="wpo", is_length_desensitized=True)
LD_ALPHA = dict(ld_alpha=np.float32(0.4))


def objective_of(name, loss, config, choices=PLAIN):
    return objectives.make(name, config, loss, choices)


def rows(name, count=12):
    pairs = random_pairs(count, longest=8)
    return pairs if name != "sft" else [Example(pair.prompt, pair.responses[:1]) for pair in pairs]


@pytest.mark.parametrize(
    "name, loss, choices",
    [
        ("dpo", "sigmoid", PLAIN),
        ("dpo", "sigmoid=1,nll=0.5", WEIGHTED),
        pytest.param("sft", "sum", PLAIN, marks=pytest.mark.slow),
        ("sft", "token_mean", PLAIN),
        pytest.param("unlikelihood", "", PLAIN, marks=pytest.mark.slow),
        ("rm", "", PLAIN),
    ],
)
def test_accumulate_any_number_of_microbatches(tiny, name, loss, choices):
    config, params = tiny
    params = jax.tree.map(lambda x: x / 2, params)  # less steep, so that rounding stays small
    if name == "rm":
        config, params = (
            dataclasses.replace(config, head="reward"),
            params | {"head": {"scalar": np.ones(16)}},
        )
    reference = jax.tree.map(lambda x: x * 1.05, params)
    hyper = HYPER | LD_ALPHA | dict(loss_weights=np.float32([1, 0.5]))
    examples, order = rows(name), training_order(12, 12, 1, 0)
    gradient = jax.jit(
        lambda params, batch: step.accumulate(
            objective_of(name, loss, config, choices), params, reference, hyper, batch
        )
    )
    grads, metrics = gradient(params, Batches(examples, order)[0])
    parts, part_metrics = gradient(params, Batches(examples, order, microbatches=4)[0])
    largest = max(float(abs(g).max()) for g in jax.tree.leaves(grads))
    for whole, part in zip(jax.tree.leaves(grads), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(part, whole, atol=1e-5 * largest)
    for key in metrics:
        np.testing.assert_allclose(
            part_metrics[key][0] / part_metrics[key][1],
            metrics[key][0] / metrics[key][1],
            rtol=2e-5,
            atol=1e-5,
            err_msg=key,
        )


def make_step(config, params, optimizer="rmsprop"):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    direction = optim.make(optimizer, 0.0)
    shardings = step.state_shardings(mesh, direction, params)
    state = step.init_state(direction, jax.device_put(params, shardings.params), {}, shardings)
    return (
        mesh,
        state,
        step.make_train_step(
            objective_of("dpo", "sigmoid", config), direction, "constant", shardings
        ),
    )


def test_train_step_donates_state_and_traces_numbers(tiny):
    config, params = tiny
    mesh, state, train_step = make_step(config, jax.tree.map(np.asarray, params))
    reference = jax.device_put(params, sharding.param_shardings(mesh, params))
    batch = sharding.shard_batch(
        mesh, Batches(rows("dpo"), training_order(12, 12, 1, 0))[0], axis=1
    )
    with jax.set_mesh(mesh):
        after, _ = train_step(state, reference, HYPER, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(reference))
        for name in HYPER:  # a sweep over any of them compiles nothing
            after, metrics = train_step(
                after, reference, HYPER | {name: HYPER[name] * np.float32(0.5)}, batch
            )
        assert train_step._cache_size() == 1
        assert int(after.step) == 1 + len(HYPER)
        with jax.transfer_guard("disallow"):  # no host sync in the step
            train_step(after, reference, jax.device_put(HYPER, sharding.replicated(mesh)), batch)
    assert metrics["grad_norm"][0] > 0


def test_reference_gets_no_gradient(tiny):
    config, params = tiny
    objective = objective_of("dpo", "sigmoid", config)
    batch = jax.tree.map(lambda x: x[0], Batches(rows("dpo"), training_order(12, 12, 1, 0))[0])
    gradient = jax.jit(
        jax.grad(lambda reference: objective(params, reference, HYPER, batch)[0][0])
    )(params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("choices", [PLAIN, Choices(weighting="wpo")])
def test_dpo_gradient_is_the_weight_times_that_of_unlikelihood(tiny, choices):
    """Without the weight, DPO's gradient is beta times that of unlikelihood with alpha 1."""
    config, params = tiny
    batch = jax.tree.map(lambda x: x[0], Batches(rows("dpo"), training_order(12, 12, 1, 0))[0])
    reference = jax.tree.map(lambda x: x * 1.05, params)
    hyper = HYPER | dict(alpha=np.float32(1))

    def gradient_of(objective):
        def total(params, batch):
            (total, _), metrics = objective(params, reference, hyper, batch)
            return total, metrics

        return jax.jit(jax.grad(total, has_aux=True))

    weighted = gradient_of(objective_of("dpo", "sigmoid", config, choices))
    plain = gradient_of(objective_of("unlikelihood", "", config))
    weights = []
    for pair in range(3):
        one = dataclasses.replace(batch, weights=batch.weights * (np.arange(12) == pair))
        gradient, metrics = weighted(params, one)
        other, _ = plain(params, one)
        weight, count = metrics["dpo/gradient_weight"]
        assert count == 1
        weights.append(float(weight))
        scale = float(hyper["beta"] * weight)
        largest = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
        for found, unweighted in zip(
            jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True
        ):
            np.testing.assert_allclose(found, scale * unweighted, atol=1e-4 * largest)
    assert len(set(weights)) == 3


def test_accumulate_ignores_filler_rows(tiny):
    config, params = tiny
    objective = jax.jit(objective_of("dpo", "sigmoid", config))
    examples = rows("dpo")
    batch = jax.tree.map(lambda x: x[0], Batches(examples, training_order(12, 12, 1, None))[0])
    short = dataclasses.replace(batch, weights=batch.weights * (np.arange(12) % 2))
    reference = jax.tree.map(lambda x: x * 1.05, params)
    (whole, count), _ = objective(params, reference, HYPER, batch)
    (half, half_count), metrics = objective(params, reference, HYPER, short)
    rest = dataclasses.replace(batch, weights=batch.weights - short.weights)
    (other, _), _ = objective(params, reference, HYPER, rest)
    assert (count, half_count) == (12, 6) and metrics["rewards/margins"][1] == 6
    np.testing.assert_allclose(half + other, whole, rtol=1e-5)


def test_train_step_bfloat16_on_float32(tiny):
    """Weights, moments and updates stay float32, and the gradient is float32's up to the rounding
    of 8 bits.
    """
    config, params = tiny
    params = jax.tree.map(lambda x: np.asarray(x) / 2, params)
    reference, batch = (
        jax.tree.map(lambda x: x * 1.05, params),
        Batches(rows("dpo"), training_order(12, 12, 1, 0), microbatches=2)[0],
    )
    flat = {}
    for dtype in ("float32", "bfloat16"):
        model = dataclasses.replace(config, dtype=dtype)
        grads, _ = jax.jit(
            functools.partial(step.accumulate, objective_of("dpo", "sigmoid", model))
        )(params, reference, HYPER, batch)
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype("float32")}
        flat[dtype] = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])
    mesh, state, train_step = make_step(model, params, "adamw")  # the model is bfloat16's
    with jax.set_mesh(mesh):
        after, _ = train_step(state, reference, HYPER, batch)
    kept = jax.tree.leaves((after.params, after.opt_state))
    assert {leaf.dtype for leaf in kept if leaf.ndim} == {np.dtype("float32")}
    norms = [np.linalg.norm(grad) for grad in flat.values()]
    assert flat["float32"] @ flat["bfloat16"] / np.prod(norms) > 0.99


def test_embedding_gradient_adds_in_float32(tiny):
    """In bfloat16 a sum of ones stops at 256."""
    config, params = tiny
    model = dataclasses.replace(
        config, dtype="bfloat16", learned_positions=True, pattern=(LayerKind(),)
    )
    params = transformer.init(model, jax.random.key(0))["embed"]
    ids = np.full((1, 1000), 3)

    def total(params):
        return (
            transformer.Embed(model).apply({"params": params}, ids, ids).astype(jnp.float32).sum()
        )

    grads = jax.grad(total)(params)
    assert (grads["tokens"][3] == 1000).all() and (grads["positions"][3] == 1000).all()


def test_dpo_under_another_divergence(tiny):
    """Loss and rewards are of the scores 1 - 1/u, not of log u."""
    config, params = tiny
    batch = jax.tree.map(lambda x: x[0], Batches(rows("dpo"), np.arange(12)[None])[0])
    reference = jax.tree.map(lambda x: x * 1.05, params)
    objective = jax.jit(objectives.make("dpo", config, "sigmoid", Choices("forward_kl")))
    (total, count), metrics = objective(params, reference, HYPER, batch)
    log_probs = jax.jit(functools.partial(response_log_probs, config))
    of_policy = log_probs(params, batch)[0]
    of_reference = log_probs(reference, batch)[0]
    rewards = 0.3 * (1 - np.exp(np.asarray(of_reference - of_policy)))[: 2 * 12].reshape(12, 2)
    expected = np.log1p(np.exp(rewards[:, 1] - rewards[:, 0])).sum()
    assert count == 12 and float(total) == pytest.approx(expected, rel=1e-4)
    for side, name in enumerate(("chosen", "rejected")):
        found = float(metrics[f"rewards/{name}"][0])
        assert found == pytest.approx(rewards[:, side].sum(), rel=1e-4, abs=1e-4)


def test_dpo_takes_a_function_of_pairs(tiny):
    """What a function of one's own is given: the sums over tokens, their log-ratios, lengths."""
    config, params = tiny
    examples = rows("dpo")
    batch = jax.tree.map(lambda x: x[0], Batches(examples, training_order(12, 12, 1, None))[0])
    reference = jax.tree.map(lambda x: x * 1.05, params)
    seen = {}

    def hinge_per_token(pairs, beta, label_smoothing):
        seen.update(vars(pairs))
        return jax.nn.relu(1 - beta * pairs.margin_per_token)

    own = objectives.make("dpo", config, hinge_per_token)
    (total, count), metrics = own(params, reference, HYPER, batch)
    assert count == 12 and metrics["loss"][0] == total
    sides = dict(chosen=slice(0, None, 2), rejected=slice(1, None, 2))
    of_policy = response_log_probs(config, params, batch)[0]
    of_reference = response_log_probs(config, reference, batch)[0]
    expected = []
    for side, of_side in sides.items():
        log_ratios = of_policy[of_side] - of_reference[of_side]
        lengths = batch.response_lengths[0][of_side]
        np.testing.assert_allclose(seen[f"{side}_log_probs"][0], of_policy[of_side], rtol=1e-5)
        np.testing.assert_allclose(seen[f"{side}_log_ratios"][0], log_ratios, atol=1e-4)
        np.testing.assert_array_equal(seen[f"{side}_lengths"][0], lengths)
        expected.append(log_ratios / lengths)
    by_hand = np.maximum(1 - 0.3 * (expected[0] - expected[1]), 0).sum()
    assert float(total) == pytest.approx(float(by_hand), rel=1e-4)


def test_dpo_with_wpo_weights(tiny):
    """The loss of each pair by its weight, whose gradient is that of the losses alone."""
    config, params = tiny
    batch = jax.tree.map(lambda x: x[0], Batches(rows("dpo"), np.arange(12)[None])[0])
    reference = jax.tree.map(lambda x: x * 1.05, params)
    sums = jax.jit(lambda: example_log_probs(config, params, batch, squares=True))()
    lengths = by_example(batch.response_lengths, batch)
    exponents = ((sums.log_probs - sums.log_sum_squares) / lengths).sum(-1)
    weights = np.exp(exponents)
    assert 0 < weights.min() < weights.max()

    # A weight of the data acts as this one does, but for the count that the mean is over.
    by_hand = dataclasses.replace(batch, weights=batch.weights * weights)

    def evaluated(choices, batch):
        objective = objective_of("dpo", "sigmoid", config, choices)

        def total(params):
            (total, count), metrics = objective(params, reference, HYPER, batch)
            return total, (count, metrics)

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    (total, (count, metrics)), gradient = evaluated(Choices(weighting="wpo"), batch)
    (expected, (_, of_weights)), wanted = evaluated(PLAIN, by_hand)
    assert count == 12 and float(total) == pytest.approx(float(expected), rel=1e-5)
    assert float(of_weights["loss"][1]) == pytest.approx(float(weights.sum()), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    # Nothing is weighted but the loss, and with it what a pair weighs in the gradient.
    weight = "dpo/gradient_weight"
    np.testing.assert_allclose(metrics[weight][0], of_weights[weight][0], rtol=1e-4)
    (_, (_, unweighted)), _ = evaluated(PLAIN, batch)
    for name in metrics.keys() - {"loss", weight}:
        np.testing.assert_allclose(metrics[name], unweighted[name], rtol=1e-5, err_msg=name)


def test_length_desensitized_at_the_ends_of_alpha(tiny):
    """1 is DPO, and 0 is DPO on responses that are cut to the shorter one of their pair."""
    config, params = tiny
    examples = rows("dpo")
    cut = []
    for pair in examples:
        shorter = min(map(len, pair.responses))
        cut.append(Example(pair.prompt, tuple(ids[:shorter] for ids in pair.responses)))
    lengths = [pair.completion_lengths() for pair in examples]
    assert [pair.completion_lengths() for pair in cut] != lengths
    reference = jax.tree.map(lambda x: x * 1.05, params)

    def total(pairs, choices, ld_alpha):
        batch = jax.tree.map(lambda x: x[0], Batches(pairs, np.arange(12)[None])[0])
        objective = objective_of("dpo", "sigmoid", config, choices)
        hyper = HYPER | dict(ld_alpha=np.float32(ld_alpha))
        return jax.jit(objective)(params, reference, hyper, batch)

    desensitized = Choices(is_length_desensitized=True)
    for ld_alpha, pairs in ((1.0, examples), (0.0, cut)):
        (found, _), metrics = total(examples, desensitized, ld_alpha)
        (expected, _), plain = total(pairs, PLAIN, 1.0)
        assert float(found) == pytest.approx(float(expected), rel=1e-5)
        margins = float(plain["rewards/margins"][0])
        assert float(metrics["rewards/margins"][0]) == pytest.approx(margins, rel=1e-4)
    # Log-probs of whole responses stay a metric.
    _, plain = total(examples, PLAIN, 1.0)
    np.testing.assert_array_equal(metrics["logps/chosen"], plain["logps/chosen"])
