"""Exported LoRA adapters in PEFT."""

import functools
import json
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from dpo_jax.data import toy
from dpo_jax.models import families, hf, loading, lora, peft, transformer
from dpo_jax.models.lora import Lora
from dpo_jax.parallel import sharding
from tests.helpers import tiny_models, tiny_runs


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def random_adapters(config, adapters, seed=0):
    """Adapters of which neither factor is 0, on the host."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32),
        lora.abstract(config, adapters),
    )


def loaded(folder, config):
    """A folder's weights on one device."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return hf.load(folder, config, sharding.param_shardings(mesh, transformer.abstract(config)))


@pytest.mark.parametrize(
    "variant, targets",
    [
        ("gpt2", ("v", "q", "down")),
        ("neox-parallel", ()),
        ("llama2", ()),
        # q and v of the one tensor, up of gate and up.
        ("phi3", ("v", "q", "up", "out")),
        ("gemma3", ()),
    ],
)
def test_peft_loads_adapter(variant, targets, tmp_path):
    """And what it merges is what we export."""
    torch = pytest.importorskip("torch", reason="the independent reference is peft with torch")
    theirs = pytest.importorskip("peft", reason="the independent reference is peft")
    import transformers

    tiny_models.write(variant, tmp_path / "base")
    hf_config = tiny_models.hf_config(variant)
    config, adapters = families.from_hf(hf_config), Lora(3, 12.0, targets)
    base, params = (
        loaded(tmp_path / "base", config),
        jax.device_put(random_adapters(config, adapters)),
    )
    peft.save(
        tmp_path / "adapter", config, hf_config, adapters, params, base=str(tmp_path / "base")
    )
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    model = theirs.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(stored["base_model_name_or_path"]),
        tmp_path / "adapter",
    )
    ids = np.random.default_rng(0).integers(0, 96, (2, 12))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    joined = lora.join(base, params, adapters.scale)
    np.testing.assert_allclose(
        jax.jit(functools.partial(transformer.logits, config))(joined, ids), expected, atol=1e-4
    )
    hf.save(tmp_path / "hf", config, hf_config, lora.merge(base, params, adapters))
    before, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "hf"))
    their_weights = model.merge_and_unload().state_dict()
    # transformers names NeoX's head one way in the model and another in the file.
    for name in merged.keys() & their_weights.keys():
        np.testing.assert_allclose(merged[name], their_weights[name], atol=1e-5, err_msg=name)
    changed = {name for name in merged if np.abs(merged[name] - before[name]).max() > 1e-3}
    assert {name.rpartition(".")[0] for name in changed} == {
        name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    }


def test_peft_loads_reward_model_adapter(tmp_path):
    torch = pytest.importorskip("torch", reason="the independent reference is peft with torch")
    theirs = pytest.importorskip("peft", reason="the independent reference is peft")
    from transformers import AutoModelForSequenceClassification

    tiny_models.write("llama2", tmp_path / "base")
    hf_config = tiny_models.hf_config("llama2")
    config, adapters = families.from_hf(hf_config, head="reward"), Lora(3, 12.0, ("v", "out"))
    params = jax.device_put(random_adapters(config, adapters))
    base = loaded(tmp_path / "base", families.from_hf(hf_config)) | {"head": {}}
    hf.save(tmp_path / "hf", config, hf_config, lora.merge(base, params, adapters))
    peft.save(
        tmp_path / "adapter", config, hf_config, adapters, params, base=str(tmp_path / "base")
    )

    ids = np.random.default_rng(0).integers(2, 96, (1, 12))

    def open_model(name):
        return AutoModelForSequenceClassification.from_pretrained(
            tmp_path / name, num_labels=1, pad_token_id=1
        ).eval()

    with torch.no_grad():
        expected = open_model("hf")(torch.tensor(ids)).logits.numpy()
        found = theirs.PeftModel.from_pretrained(open_model("base"), tmp_path / "adapter")(
            torch.tensor(ids)
        ).logits
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    assert np.abs(expected).max() > 0.1


def save_random_adapter(model, folder):
    """Give all that an adapter of peft trains random values, and save it."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    "variant, fields",
    [
        ("gpt2", dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
        ("neox-parallel", dict(target_modules=["query_key_value"], use_rslora=True)),
        (
            "llama3",
            dict(
                target_modules="all-linear",
                rank_pattern={"q_proj": 2, "model.layers.1.mlp.up_proj": 5},
                alpha_pattern={"q_proj": 32},
            ),
        ),
        ("phi3", dict(target_modules=["qkv_proj", "gate_up_proj"])),
        ("llama2", dict(target_modules=["v_proj"], modules_to_save=["lm_head", "embed_tokens"])),
        ("qwen3", dict(target_modules=["q_proj", "o_proj"], layers_to_transform=[1])),
    ],
)
def test_adapter_of_peft_is_merged_as_peft_does(variant, fields, tmp_path):
    torch = pytest.importorskip("torch", reason="the independent reference is peft with torch")
    theirs = pytest.importorskip("peft", reason="the independent reference is peft")
    import transformers

    base = tiny_models.write(variant, tmp_path / "base")
    model = theirs.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        theirs.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, **fields),
    )
    save_random_adapter(model, tmp_path / "adapter")
    ids = np.random.default_rng(0).integers(0, 96, (2, 12))
    with torch.no_grad():
        expected = model.eval()(torch.tensor(ids)).logits.numpy()
        before = transformers.AutoModelForCausalLM.from_pretrained(base)(torch.tensor(ids)).logits

    folder, adapters = loading.find(str(tmp_path / "adapter"))
    assert folder == base
    config = families.from_hf(hf.read_config(folder))
    params = hf.load(folder, config, tiny_models.placed(config), adapters)
    found = jax.jit(functools.partial(transformer.logits, config))(params, ids)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert np.abs(expected - before.numpy()).max() > 0.01


EMBEDDING = {"llama2": "embed_tokens", "qwen3": "embed_tokens", "gpt2": "wte"}


@pytest.mark.filterwarnings("ignore")  # peft warns of tied modules
@pytest.mark.parametrize("variant", ["qwen3", "gpt2", "llama2"])  # the last one is not tied
@pytest.mark.parametrize(
    "saved, targets, tied_by_peft",
    [
        ("E", "", False),
        ("H", "", False),
        ("EH", "", False),
        ("E", "", True),
        ("", "H", False),
        ("", "E", False),
        ("", "EH", False),
        ("E", "H", False),
    ],
)
def test_embedding_and_head_are_parted_as_peft_does(
    saved, targets, tied_by_peft, variant, tmp_path
):
    """Of a tied base peft changes the one that is named, and so do we; E and H stand for the two.

    What is exported then is what peft has in memory.
    """
    torch = pytest.importorskip("torch", reason="the independent reference is peft with torch")
    theirs = pytest.importorskip("peft", reason="the independent reference is peft")
    import transformers

    modules = {"E": EMBEDDING[variant], "H": "lm_head"}
    base = tiny_models.write(variant, tmp_path / "base")
    projection = "c_attn" if variant == "gpt2" else "q_proj"
    model = theirs.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        theirs.LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=12,
            target_modules=[projection, *(modules[letter] for letter in targets)],
            modules_to_save=[modules[letter] for letter in saved] or None,
            ensure_weight_tying=tied_by_peft,
        ),
    )
    save_random_adapter(model, tmp_path / "adapter")
    # As it is loaded again, which is not always as it was in training.
    loaded = theirs.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    ).eval()
    ids = np.random.default_rng(0).integers(0, 96, (2, 12))
    with torch.no_grad():
        expected = loaded(torch.tensor(ids)).logits.numpy()

    checkpoint = loading.open_checkpoint(str(tmp_path / "adapter"), tokenizer=toy.tokenizer())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params = checkpoint.load_params(mesh)
    found = jax.jit(functools.partial(transformer.logits, checkpoint.config))(params, ids)
    np.testing.assert_allclose(found, expected, atol=2e-4)

    hf.save(tmp_path / "hf", checkpoint.config, checkpoint.hf_config, params)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        np.testing.assert_allclose(exported(torch.tensor(ids)).logits, expected, atol=2e-4)
    stays_tied = tied_by_peft and variant == "qwen3"  # peft ties modules of few names
    assert checkpoint.config.tied == stays_tied
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["tie_word_embeddings"] == stays_tied


def test_adapter_beside_its_base_is_read_as_transformers_does(tmp_path):
    torch = pytest.importorskip("torch", reason="the independent reference is transformers")
    theirs = pytest.importorskip("peft", reason="the independent reference is peft")
    import transformers

    folder = tiny_models.write("llama2", tmp_path / "model")
    model = theirs.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        theirs.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False),
    )
    model.save_pretrained(folder)  # beside the base, whose config.json and weights stay
    ids = np.random.default_rng(0).integers(0, 96, (2, 12))
    with torch.no_grad():
        both = transformers.AutoModelForCausalLM.from_pretrained(folder)
        expected = both(torch.tensor(ids)).logits.numpy()
        alone = tiny_models.torch_model("llama2")(torch.tensor(ids)).logits.numpy()
    assert np.abs(expected - alone).max() > 0.01

    found_folder, adapters = loading.find(str(folder))
    assert found_folder == folder
    config = families.from_hf(hf.read_config(folder))
    params = hf.load(folder, config, tiny_models.placed(config), adapters)
    found = jax.jit(functools.partial(transformer.logits, config))(params, ids)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_lines_of_advice_write_a_folder_that_loads(tmp_path):
    """Of an adapter that we do not merge: peft does, and the tokenizer comes with it."""
    torch = pytest.importorskip("torch", reason="the independent reference is peft with torch")
    theirs = pytest.importorskip("peft", reason="the independent reference is peft")
    import transformers

    base = tiny_runs.write_model(tmp_path / "base")
    model = theirs.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        theirs.LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True, init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    ids = np.random.default_rng(0).integers(0, 40, (2, 12))
    with torch.no_grad():
        expected = model.eval()(torch.tensor(ids)).logits.numpy()
    with pytest.raises(ValueError, match="use_dora = True") as raised:
        loading.open_checkpoint(str(tmp_path / "adapter"))
    lines = [line for line in str(raised.value).splitlines() if line.startswith("    python -c")]
    assert len(lines) == 2
    for line in lines:
        _, *arguments = shlex.split(line)
        subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True)

    checkpoint = loading.open_checkpoint(str(tmp_path / "MERGED"))
    params = checkpoint.load_params(sharding.make_mesh(devices=jax.devices()[:1]))
    found = jax.jit(functools.partial(transformer.logits, checkpoint.config))(params, ids)
    np.testing.assert_allclose(found, expected, atol=2e-4)
