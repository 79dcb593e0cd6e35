"""Model folders with damage of every kind, at each of their files."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dpo_jax.models import loading, safetensors_io
from dpo_jax.parallel import sharding
from tests.helpers.paths import STORIES
from tests.hostile.judging import refusal_of

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
WEIGHTS = safetensors.numpy.load_file(STORIES / "model.safetensors")


def open_and_load(folder):
    """Open a model and load its weights, as every command does."""
    checkpoint = loading.open_checkpoint(str(folder))
    return checkpoint.load(sharding.make_mesh())


@pytest.fixture
def model(tmp_path):
    """A model's folder that may be damaged."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in FILES:
        shutil.copy(STORIES / name, folder / name)
    return folder


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    for position in range(0, min(len(content), 64), 7):
        content[position] ^= 0x40
    path.write_bytes(content)


def make_a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "removed": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": halve,
    "flipped": flip,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a list": lambda path: path.write_text("[]"),
    "an empty object": lambda path: path.write_text("{}"),
    "a number": lambda path: path.write_text("3"),
    "null": lambda path: path.write_text("null"),
    "other bytes": lambda path: path.write_bytes(b"\xff\xfe" * 100),
    "brackets": lambda path: path.write_text("[" * 100_000),
    "a folder": make_a_folder,
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named(model, file, damage):
    DAMAGES[damage](model / file)
    refusal = refusal_of(lambda: open_and_load(model))
    # The tokenizer says all in tokenizer.json: without the other file it is the same, but for EOS.
    if file != "tokenizer_config.json":
        assert refusal, "the damage was not seen"
        assert str(model) in refusal


FIELDS = [  # of config.json, and values that no model has
    *(
        (field, value)
        for field in (
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "intermediate_size", "max_position_embeddings"),
        )
        for value in (0, -1, 10**12, 1.5, float("nan"), "64", [], None, True)
    ),
    *(
        (field, value)
        for field in ("rms_norm_eps", "rope_theta")
        for value in (0, -1.0, float("nan"), float("inf"), "x", [], 1e308)
    ),
    *(("rope_scaling", value) for value in (3, "llama3", {"rope_type": "llama3"})),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
    ("rope_parameters", []),
    ("rope_parameters", "default"),
    *(("head_dim", value) for value in (0, -8, 3, "8")),
    *(("hidden_act", value) for value in ("", "swish2", 3, [])),
    *(("model_type", value) for value in (None, 3, [], {}, "novel", "bert")),
    *(("tie_word_embeddings", value) for value in (False, "yes", 3)),
    ("quantization_config", {"quant_method": "awq"}),
]


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_configs_that_no_model_has_are_refused(model, field, value):
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(fields | {field: value}))
    refusal = refusal_of(lambda: open_and_load(model))
    assert refusal, "the field was taken"
    assert "config.json" in refusal or str(model) in refusal


def rewrite(model, **tensors):
    safetensors.numpy.save_file(WEIGHTS | tensors, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", sorted(WEIGHTS)[::6])
def test_weights_that_are_not_finite_are_named(model, name, number):
    values = WEIGHTS[name].copy()
    values.flat[-1] = number
    rewrite(model, **{name: values})
    refusal = refusal_of(lambda: open_and_load(model))
    assert f"model.safetensors: the tensor {name} has numbers that are not finite" in refusal


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_not_finite_in_every_stored_type(model, dtype):
    tensors = {name: values.astype(jnp.dtype(dtype)) for name, values in WEIGHTS.items()}
    rewrite(model, **tensors)
    assert not refusal_of(lambda: open_and_load(model))
    tensors["model.norm.weight"][3] = np.nan
    rewrite(model, **tensors)
    assert "model.norm.weight" in refusal_of(lambda: open_and_load(model))


ENDS = ("o_proj", "down_proj")


@pytest.mark.parametrize("name", [name for name in WEIGHTS if not re.search(r"\.[0134]\.", name)])
def test_weights_of_zeros_are_named(model, name, capsys):
    rewrite(model, **{name: np.zeros_like(WEIGHTS[name])})
    refusal = refusal_of(lambda: open_and_load(model))
    if any(end in name for end in ENDS):
        assert not refusal
        refusal = capsys.readouterr().out
        assert refusal.startswith("warning: ")
    assert f"all weights of {name} in {model}/model.safetensors are zero" in refusal


def test_a_file_of_zeros_is_named(model):
    rewrite(model, **{name: np.zeros_like(values) for name, values in WEIGHTS.items()})
    refusal = refusal_of(lambda: open_and_load(model))
    assert "all weights of model.embed_tokens.weight" in refusal


@pytest.mark.parametrize("end", ENDS)
def test_zeros_in_all_layers_are_no_new_layers(model, end):
    zeros = {name: np.zeros_like(WEIGHTS[name]) for name in WEIGHTS if end in name}
    rewrite(model, **zeros)
    assert "(and 4 more)" in refusal_of(lambda: open_and_load(model))


def shard(model):
    """Put the weights into two shards; return their index."""
    (model / "model.safetensors").unlink()
    names = sorted(WEIGHTS)
    parts = {"model-00001-of-00002.safetensors": names[:20]}
    parts["model-00002-of-00002.safetensors"] = names[20:]
    weight_map = {}
    for file, held in parts.items():
        tensors = {name: WEIGHTS[name] for name in held}
        safetensors.numpy.save_file(tensors, model / file, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (model / safetensors_io.INDEX).write_text(json.dumps(index))
    return index


INDEXES = {
    "empty": "",
    "an empty object": "{}",
    "a list": "[]",
    "null": "null",
    "cut": '{"weight_map": {"a": ',
    "brackets": "[" * 100_000,
    "an empty map": '{"weight_map": {}}',
    "a list for a map": '{"weight_map": ["a"]}',
    "numbers for files": '{"weight_map": {"model.norm.weight": 3}}',
    "no file": '{"weight_map": {"model.norm.weight": null}}',
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_is_none_is_named(model, name):
    shard(model)
    (model / safetensors_io.INDEX).write_text(INDEXES[name])
    assert str(model / safetensors_io.INDEX) in refusal_of(lambda: open_and_load(model))


@pytest.mark.parametrize(
    "path",
    [
        *("../evil.safetensors", "/tmp/evil.safetensors", "sub/evil.safetensors", "..", "."),
        *("", "~/evil.safetensors", "..\\evil.safetensors", "evil.bin", "a\x00.safetensors"),
        *("missing.safetensors", "http://evil/x.safetensors"),
    ],
)
def test_an_index_does_not_lead_out_of_its_folder(model, path):
    index = shard(model)
    evil = model.parent / "evil.safetensors"
    shutil.copy(model / "model-00002-of-00002.safetensors", evil)
    (model / "sub").mkdir()
    shutil.copy(evil, model / "sub" / "evil.safetensors")
    index["weight_map"]["model.norm.weight"] = path
    (model / safetensors_io.INDEX).write_text(json.dumps(index))
    assert str(model) in refusal_of(lambda: open_and_load(model))


def test_an_index_has_every_tensor_where_it_is(model):
    index = shard(model)
    assert not refusal_of(lambda: open_and_load(model))
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    (model / safetensors_io.INDEX).write_text(json.dumps(index))
    refusal = refusal_of(lambda: open_and_load(model))
    assert "has model.norm.weight in model-00001-of-00002.safetensors, which does not" in refusal


def test_links_lead_to_the_hubs_cache_alone(model):
    """The cache keeps a model's files as links to blobs/; other links lead out of the folder."""
    shard(model)
    cache = model.parent / "models--owner--name"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.move(file, cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert not refusal_of(lambda: open_and_load(snapshot))
    evil = model.parent / "evil.safetensors"
    link = snapshot / "model-00002-of-00002.safetensors"
    shutil.copy(link, evil)
    link.unlink()
    link.symlink_to(evil)
    assert "is a link out of the folder" in refusal_of(lambda: open_and_load(snapshot))


def test_a_file_for_a_model_is_named(model):
    refusal = refusal_of(lambda: open_and_load(model / "model.safetensors"))
    assert f"{model}/model.safetensors is a file" in refusal
    assert f"Is {model} meant?" in refusal


ADAPTERS = {
    "a list": "[]",
    "empty": "",
    "no base": "{}",
    "a number for a base": '{"base_model_name_or_path": 3}',
    "no rank": '{"peft_type": "LORA", "base_model_name_or_path": "BASE"}',
    "alpha nan": '{"peft_type": "LORA", "r": 2, "lora_alpha": NaN, '
    '"base_model_name_or_path": "BASE"}',
    "alpha text": '{"peft_type": "LORA", "r": 2, "lora_alpha": "x", '
    '"base_model_name_or_path": "BASE"}',
    "its own base": '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, '
    '"base_model_name_or_path": "SELF"}',
}


def write_adapter(model, text, **tensors):
    folder = model.parent / "adapter"
    folder.mkdir()
    text = text.replace("BASE", str(model)).replace("SELF", str(folder))
    (folder / "adapter_config.json").write_text(text)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    found = {
        f"{name}A.weight": np.ones((2, 64), np.float32),
        f"{name}B.weight": np.zeros((64, 2), np.float32),  # as a fresh one
    }
    safetensors.numpy.save_file(found | tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_that_are_none_are_named(model, name):
    folder = write_adapter(model, ADAPTERS[name])
    assert str(folder) in refusal_of(lambda: open_and_load(folder))


GOOD_ADAPTER = '{"peft_type": "LORA", "r": 2, "lora_alpha": 2.0, "base_model_name_or_path": "BASE"}'


def test_a_fresh_adapter_is_taken_and_a_damaged_one_named(model):
    folder = write_adapter(model, GOOD_ADAPTER)
    assert not refusal_of(lambda: open_and_load(folder))
    shutil.rmtree(folder)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    folder = write_adapter(model, GOOD_ADAPTER, **{name: np.full((64, 2), np.nan, np.float32)})
    refusal = refusal_of(lambda: open_and_load(folder))
    assert f"adapter_model.safetensors: the tensor {name} has numbers" in refusal


def test_an_eos_outside_of_the_vocabulary_blames_the_tokenizer(model):
    fields = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(fields | {"eos_token": "<|new|>"}))
    refusal = refusal_of(lambda: open_and_load(model))
    assert f"{model}: its EOS '<|new|>' is token 512, but" in refusal
