"""Gradients of models with experts against torch's, with the load-balancing loss."""

import copy

import jax
import numpy as np
import pytest

from dpo_jax.data.batches import Batches
from dpo_jax.data.examples import Example
from dpo_jax.data.packing import RowLimits
from dpo_jax.models import families, hf
from dpo_jax.training import objectives
from tests.helpers import tiny_models

torch = pytest.importorskip("torch", reason="the independent reference is torch autograd")

COEF = 2.0
PROMPT, RESPONSES = 15, (24, 11, 1, 14)  # tokens: enough for every expert to have some


def torch_gradients(variant, examples, folder):
    """Return the gradients of a torch model by our names; the model on padded rows."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = copy.deepcopy(tiny_models.torch_model(variant))
    length = max(len(row.prompt) + len(row.responses[0]) for row in examples)
    ids, mask, is_trained = torch.zeros((3, len(examples), length), dtype=torch.long)
    for row, example in enumerate(examples):
        tokens = np.concatenate([example.prompt, example.responses[0]])
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        is_trained[row, len(example.prompt) : len(tokens)] = 1
    found = model(ids, attention_mask=mask, output_router_logits=True)
    log_probs = found.logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    nll = -(log_probs * is_trained[:, 1:]).sum() / len(examples)
    config = model.config
    balance = load_balancing_loss_func(
        found.router_logits, config.num_local_experts, config.num_experts_per_tok, mask
    )
    (nll + COEF * balance).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(folder)  # by the names of checkpoints
    return nll.item(), balance.item()


@pytest.mark.parametrize("variant", ["qwen3-moe", "mixtral"])
def test_gradient_with_the_router_loss_equals_torch(variant, tmp_path):
    rng = np.random.default_rng(0)
    prompt, *responses = [rng.integers(2, 96, n).astype(np.int32) for n in (PROMPT, *RESPONSES)]
    # Shared prompts, which padded rows do not know.
    examples = [Example(prompt, (response,)) for response in responses]
    nll, balance = torch_gradients(variant, examples, tmp_path / "gradients")

    folder = tiny_models.write(variant, tmp_path / "model")
    config = families.from_hf(hf.read_config(folder))
    placed = tiny_models.placed(config)
    params = hf.load(folder, config, placed)
    expected = hf.load(tmp_path / "gradients", config, placed)
    limits = RowLimits(config.narrowest_window)
    batch = jax.tree.map(lambda x: x[0], Batches(examples, np.arange(4)[None], limits=limits)[0])
    objective = objectives.make("sft", config, "sum")
    hyper = {"router_aux_loss_coef": np.float32(COEF)}

    def loss(params):
        (total, count), metrics = objective(params, None, hyper, batch)
        return total / count, metrics

    found, metrics = jax.jit(jax.grad(loss, has_aux=True))(params)
    for name, value in {"loss": nll, "router/imbalance": balance}.items():
        total, count = metrics[name]
        np.testing.assert_allclose(total / count, value, rtol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())
