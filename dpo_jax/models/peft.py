"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

Where a family stores q, k and v as one tensor, PEFT has one adapter for it. Ours become one of the
summed rank: the A's under each other, and the B's in blocks, each in the rows of its own outputs
and the columns of its own A.
"""

import json
import pathlib
import re

import einops
import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util
from jax.experimental import multihost_utils

from dpo_jax.models import families
from dpo_jax.models.families import Tensor
from dpo_jax.models.hf import gathered
from dpo_jax.models.lora import Lora
from dpo_jax.models.transformer import TransformerConfig

# head -> PEFT's task; PPO's value head is left out
TASKS = {"lm": "CAUSAL_LM", "lm_value": "CAUSAL_LM", "reward": "SEQ_CLS"}


def save(
    folder, config: TransformerConfig, hf_config, lora: Lora, params: dict, *, base: str
) -> None:
    """Write the two files, float32. Every process must call it; the first one writes.

    params: what was trained. base: the model that they were trained over, a hub name or a folder.
    """
    params = {
        path: gathered(value) for path, value in traverse_util.flatten_dict(params, sep="/").items()
    }
    stored = {}
    ranks = {}
    fan_in_fan_out = False
    for tensor in families.tensors(hf_config.model_type, config):
        # Which of the tensor's parameters have an adapter: q and v of q, k, v, perhaps.
        pieces = {
            number: path.removesuffix("kernel")
            for number, path in enumerate(tensor.paths)
            if path.removesuffix("kernel") + "lora_a" in params
        }
        if not pieces:
            continue
        # PEFT has one adapter here, of the summed rank.
        ranks[_module(tensor)] = len(pieces) * lora.rank
        fan_in_fan_out = _inputs_first(tensor)  # of all alike
        for name, layer in tensor.names(config):
            a = {number: params[path + "lora_a"][layer] for number, path in pieces.items()}
            b = {number: params[path + "lora_b"][layer] for number, path in pieces.items()}
            of_inputs, of_outputs = pack(tensor, a, b)
            prefix = "base_model.model." + name.removesuffix(".weight")
            stored[f"{prefix}.lora_A.weight"] = of_inputs
            stored[f"{prefix}.lora_B.weight"] = of_outputs
    if config.head == "reward":
        head = families.family(hf_config.model_type).name_of("head/scalar")
        stored[f"base_model.model.{head}"] = params["head/scalar"][None]
    if jax.process_index() == 0:
        folder = pathlib.Path(folder)
        folder.mkdir(exist_ok=True)
        safetensors.numpy.save_file(
            stored, folder / "adapter_model.safetensors", metadata={"format": "pt"}
        )
        fields = _config(config, lora, ranks, base) | dict(fan_in_fan_out=fan_in_fan_out)
        (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n")
    multihost_utils.sync_global_devices("peft.save")


def pack(
    tensor: Tensor, a: dict[int, np.ndarray], b: dict[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return PEFT's lora_A [rank, inputs] and lora_B [outputs, rank] of a tensor in one layer.

    a, b: the factors of those of the tensor's parameters that have an adapter, by their place among
    its paths.
    """
    left, right = tensor.pattern.split(" -> ")
    letters = right.removeprefix("p ").split()
    # Input axes of the parameter: all of A's but the rank, which is its last.
    count = next(iter(a.values())).ndim - 1
    inputs, outputs = " ".join(letters[:count]), " ".join(letters[count:])
    # The output axes as the checkpoint stores them: p may stand before or among them.
    stored_outputs = next(
        group for group in re.findall(r"\(.+?\)|\w", left) if letters[-1] in group
    ).strip("()")
    # All A's under each other, [n * rank, inputs].
    of_inputs = einops.rearrange(list(a.values()), f"n {inputs} r -> (n r) ({inputs})")
    # Each B only in the columns of its own A. Parameters without an adapter have rows of zeros.
    blocks = np.zeros((len(tensor.paths), len(b), *next(iter(b.values())).shape), np.float32)
    for column, (row, factor) in enumerate(b.items()):
        blocks[row, column] = factor
    stored_outputs = stored_outputs if "p" in stored_outputs.split() else f"p {stored_outputs}"
    of_outputs = einops.rearrange(blocks, f"p n r {outputs} -> ({stored_outputs}) (n r)")
    return np.ascontiguousarray(of_inputs), np.ascontiguousarray(of_outputs)


def _module(tensor: Tensor) -> str:
    """Return the end of its module's name, which is its own in the layer: attn.c_proj."""
    return ".".join(tensor.name.removesuffix(".weight").split("{}.")[1:])


def _inputs_first(tensor: Tensor) -> bool:
    """Return whether it is stored [inputs, outputs], as GPT-2's are."""
    left, right = tensor.pattern.split(" -> ")
    first, *_, last = right.removeprefix("p ").split()
    return left.index(first) < left.index(last)


def _config(config: TransformerConfig, lora: Lora, ranks: dict[str, int], base: str) -> dict:
    """Return the fields of adapter_config.json; ranks: module -> rank of its adapter."""
    folder = pathlib.Path(base).expanduser()
    # PEFT scales by alpha / rank, so a module of another rank needs an alpha of its own for the
    # same scale.
    fused = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    return dict(
        peft_type="LORA",
        task_type=TASKS[config.head],
        inference_mode=True,
        base_model_name_or_path=str(folder.absolute() if folder.is_dir() else base),
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted(ranks),
        rank_pattern=fused,
        alpha_pattern={module: rank * lora.scale for module, rank in fused.items()},
        modules_to_save=["score"] if config.head == "reward" else None,
    )
