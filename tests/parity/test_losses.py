"""Losses and their gradients against the same formulas written with torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.config import PREFERENCE_LOSSES, SMOOTHED_LOSSES
from dpo_jax.training import losses

RNG = np.random.default_rng(0)


CHOSEN, REJECTED = RNG.normal(0, 3, (2, 50))  # log-ratios


COUNTS = RNG.integers(1, 20, (2, 50))


BETA = 0.3


def loss(name, chosen=CHOSEN, rejected=REJECTED, counts=COUNTS, beta=BETA, eps=0.0):
    nothing = jnp.zeros(len(chosen))
    pairs = losses.Pairs(chosen, rejected, nothing, nothing, *counts)
    return losses.PREFERENCE[name](pairs, beta, eps)


def torch_loss(name, chosen, rejected, counts, beta, eps):
    """The formulas of TRL 1.16's DPOTrainer, written with torch."""
    torch = pytest.importorskip("torch", reason="the independent reference is torch autograd")
    F = torch.nn.functional
    delta = chosen - rejected
    per_token = chosen / counts[0] - rejected / counts[1]
    return {
        "sigmoid": lambda: (
            -F.logsigmoid(beta * delta) * (1 - eps) - F.logsigmoid(-beta * delta) * eps
        ),
        "sigmoid_norm": lambda: -F.logsigmoid(beta * per_token),
        "hinge": lambda: torch.relu(1 - beta * delta),
        "ipo": lambda: (per_token - 1 / (2 * beta)) ** 2,
        "ipo_sum": lambda: (delta - 1 / (2 * beta)) ** 2,
        "robust": lambda: (
            (-F.logsigmoid(beta * delta) * (1 - eps) + F.logsigmoid(-beta * delta) * eps)
            / (1 - 2 * eps)
        ),
    }[name]()


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_preference_equals_torch(name, eps):
    if eps and name not in SMOOTHED_LOSSES:
        eps = 0.0
    torch = pytest.importorskip("torch", reason="the independent reference is torch autograd")
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in (CHOSEN, REJECTED))
    expected = torch_loss(name, chosen, rejected, torch.tensor(COUNTS), BETA, eps)
    expected.sum().backward()
    with jax.enable_x64(True):
        found = loss(name, eps=eps)
        grads = jax.grad(lambda c, r: loss(name, c, r, eps=eps).sum(), argnums=(0, 1))(
            CHOSEN, REJECTED
        )
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-9)
    np.testing.assert_allclose(grads[0], chosen.grad, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(grads[1], rejected.grad, rtol=1e-9, atol=1e-12)


def torch_gradient(function, *inputs):
    """Values of a loss written in torch, and their gradient with respect to the first input."""
    torch = pytest.importorskip("torch", reason="the independent reference is torch autograd")
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs]
    value = function(torch, *tensors)
    value.sum().backward()
    return value.detach().numpy(), tensors[0].grad.numpy()


@pytest.mark.parametrize(
    "ours, theirs, inputs",
    [
        (
            lambda a, b: losses.unlikelihood(a, b, 0.3),
            lambda torch, a, b: -a + 0.3 * b,
            (CHOSEN, REJECTED),
        ),
        (
            losses.bradley_terry,
            lambda torch, a, b: -torch.log(torch.sigmoid(a - b)),
            (CHOSEN, REJECTED),
        ),
        (
            lambda a, b: losses.ppo_policy(a, b, 0.2),
            lambda torch, a, b: torch.max(-b * a.exp(), -b * a.exp().clamp(0.8, 1.2)),
            (CHOSEN / 10, REJECTED),
        ),
        (
            lambda a, b, c: losses.ppo_value(a, b, c, 0.5),
            lambda torch, a, b, c: (
                0.5 * torch.max((a - c) ** 2, (b + (a - b).clamp(-0.5, 0.5) - c) ** 2)
            ),
            (CHOSEN, REJECTED, CHOSEN[::-1].copy()),
        ),
    ],
)
def test_other_losses_equal_torch(ours, theirs, inputs):
    value, gradient = torch_gradient(theirs, *inputs)
    np.testing.assert_allclose(ours(*map(jnp.asarray, inputs)), value, rtol=2e-5, atol=1e-6)
    found = jax.grad(lambda first: ours(first, *map(jnp.asarray, inputs[1:])).sum())(
        jnp.asarray(inputs[0])
    )
    np.testing.assert_allclose(found, gradient, rtol=2e-4, atol=1e-5)
