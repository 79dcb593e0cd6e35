"""Optimisers and clipping against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.training import optim

TORCH = {
    "rmsprop": lambda torch, p: torch.optim.RMSprop(p, lr=0.01),
    "adamw": lambda torch, p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda torch, p: torch.optim.SGD(p, lr=0.01),
}


@pytest.mark.parametrize("name", TORCH)
def test_optimizers_equal_torch(name):
    torch = pytest.importorskip("torch", reason="the independent reference is torch.optim")
    rng = np.random.default_rng(0)
    start, grads = (
        rng.normal(size=(5,)).astype(np.float32),
        rng.normal(size=(20, 5)).astype(np.float32),
    )
    parameter = torch.nn.Parameter(torch.tensor(start))
    theirs = TORCH[name](torch, [parameter])
    ours = optim.make(name, 0.1 if name == "adamw" else 0.0)
    params, state = {"w": jnp.asarray(start)}, ours.init({"w": jnp.asarray(start)})
    for grad in grads:
        parameter.grad = torch.tensor(grad)
        theirs.step()
        direction, state = ours.update({"w": jnp.asarray(grad)}, state, params)
        params = jax.tree.map(lambda p, d: p - 0.01 * d, params, direction)
    np.testing.assert_allclose(params["w"], parameter.detach(), rtol=2e-5, atol=1e-6)


def test_clip_equals_torch():
    torch = pytest.importorskip(
        "torch", reason="the independent reference is torch's clip_grad_norm_"
    )
    grads = {"a": np.array([3.0, 4.0], np.float32), "b": np.array([12.0], np.float32)}
    for max_norm in (1.0, 13.0, 50.0):
        parameters = [torch.nn.Parameter(torch.zeros(len(g))) for g in grads.values()]
        for parameter, grad in zip(parameters, grads.values(), strict=True):
            parameter.grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        clipped = optim.clip(grads, jnp.float32(13.0), max_norm)
        for parameter, ours in zip(parameters, clipped.values(), strict=True):
            np.testing.assert_allclose(ours, parameter.grad, rtol=1e-6)
    np.testing.assert_array_equal(optim.clip(grads, jnp.float32(13.0), 0.0)["b"], grads["b"])
