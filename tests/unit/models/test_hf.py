"""Model folders in Hugging Face format: finding, reading, loading, writing, errors."""

import fnmatch
import json
import re
import socket
import time

import huggingface_hub.constants
import jax
import ml_dtypes
import numpy as np
import pytest
import transformers
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from dpo_jax.models import families, hf, safetensors_io, transformer
from tests.helpers import tiny_models
from tests.helpers.paths import STORIES
from tests.helpers.tiny_models import placed, random_model, save_model

FILE = "model.safetensors"


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def assert_same(params, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), params, expected)


@pytest.fixture(scope="module")
def tied():
    """A tied GPT-2: its Hugging Face config, our config and random weights."""
    return random_model("gpt2")


@pytest.fixture(scope="module")
def untied():
    """The same of an untied Llama with grouped heads."""
    return random_model("llama2")


@pytest.fixture
def folder(tied, tmp_path):
    """The tied model in a folder that the test may change."""
    return save_model(tied, tmp_path / "model")


def change(folder, edit):
    """Rewrites the folder's tensors by a function of their dict."""
    stored = load_file(folder / FILE)
    save_file(edit(stored) or stored, folder / FILE)


def load(folder, model):
    return hf.load(folder, model[1], placed(model[1]))


# fetch, read_config, make_config


def test_fetch_local_folder(tmp_path):
    assert hf.fetch(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./runs/sft/hf", "~/none", "runs/sft/hf", "runs/sft/"]
)
def test_fetch_names_missing_folder(path):
    with pytest.raises(
        FileNotFoundError, match=f"the model folder {re.escape(path)} does not exist. Pass"
    ):
        hf.fetch(path)


@pytest.fixture
def silent_hub(monkeypatch, tmp_path):
    """A hub that takes connections and never answers, and an empty cache."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hf, "HUB_TIMEOUT", 0.2)
    yield tmp_path
    listener.close()


def test_fetch_from_silent_network(silent_hub):
    start = time.monotonic()
    with pytest.raises(
        FileNotFoundError, match="the model org/name is not a local folder.* Pass a local"
    ):
        hf.fetch("org/name")
    assert time.monotonic() - start < 10


def test_fetch_cached_model(silent_hub):
    cached = silent_hub / "models--org--name"
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    assert hf.fetch("org/name") == snapshot


def test_fetch_revision(silent_hub):
    cached = silent_hub / "models--org--name"
    for commit, branch in (("0" * 40, "main"), ("1" * 40, "refs/pr/5")):
        (cached / "snapshots" / commit).mkdir(parents=True)
        (cached / "refs" / branch).parent.mkdir(parents=True, exist_ok=True)
        (cached / "refs" / branch).write_text(commit)
    assert hf.fetch("org/name@refs/pr/5") == cached / "snapshots" / ("1" * 40)
    assert hf.fetch("org/name@" + "0" * 40) == cached / "snapshots" / ("0" * 40)
    with pytest.raises(FileNotFoundError, match="the model org/name@v2 is not a local folder"):
        hf.fetch("org/name@v2")


def test_fetch_only_what_is_read():
    def wanted(name):
        return any(fnmatch.fnmatch(name, pattern) for pattern in hf.WEIGHT_FILES + hf.OTHER_FILES)

    assert all(
        map(
            wanted,
            [
                "config.json",
                "model.safetensors",
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "merges.txt",
                "tokenizer.model",
                "chat_template.jinja",
            ],
        )
    )
    assert not any(
        map(
            wanted,
            [
                "pytorch_model.bin",
                "model.pt",
                "x.pkl",
                "flax_model.msgpack",
                "modeling_x.py",
                "tf_model.h5",
                "consolidated.safetensors",
                "README.md",
            ],
        )
    )


def test_read_config_without_file(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"{tmp_path}/config.json does not exist. A model folder"
    ):
        hf.read_config(tmp_path)


def test_read_config_names_the_resolved_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path}/config.json does not exist"):
        hf.read_config(".")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "Expecting"),
        ("{}", "model_type is None"),
        (
            '{"model_type": "new", "auto_map": {"AutoConfig": "novel.Config"}}',
            "model_type is 'new', which transformers .* install a newer",
        ),
        ('{"model_type": "gpt2", "n_embd": "wide"}', "n_embd.* Correct the field"),
    ],
)
def test_read_config_names_bad_file(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"(?s){tmp_path}/config.json.*{message}"):
        hf.read_config(tmp_path)


def test_make_config_from_fields():
    hf_config = hf.make_config({"model_type": "gpt2", "n_layer": 3, "n_embd": 24, "n_head": 2})
    assert families.from_hf(hf_config).layers == 3
    with pytest.raises(ValueError, match="transformers.GPT2Config has no field layers, width"):
        hf.make_config({"model_type": "gpt2", "layers": 3, "width": 8})
    with pytest.raises(ValueError, match="model_type None is not supported; supported are gpt2"):
        hf.make_config({"n_layer": 3})


# load


@pytest.mark.parametrize("axes", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2), dict(data=8)])
def test_load_sharded_equals_whole(untied, tmp_path, axes):
    folder, config = save_model(untied, tmp_path / "model"), untied[1]
    shardings = placed(config, devices=8, **axes)
    params = hf.load(folder, config, shardings)
    assert_same(params, untied[2])
    for path, param in flat(params).items():
        assert param.sharding == flat(shardings)[path]
        slice_shape = param.sharding.shard_shape(param.shape)
        assert {shard.data.shape for shard in param.addressable_shards} == {slice_shape}
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    parts = axes.get("fsdp", 1) * axes.get("tensor", 1)
    assert kernel.addressable_shards[0].data.size == kernel.size // parts


def test_load_shares_buffers(untied):
    for axes in (dict(fsdp=8), dict(data=8), dict(data=2, fsdp=4)):
        kernel = placed(untied[1], devices=8, **axes)["layers"]["mlp"]["up"]["kernel"]
        leaf = jax.ShapeDtypeStruct((2, 32, 48), np.float32)
        buffers = hf.Pieces(leaf, kernel).buffers.values()
        assert sum(buffer.size for buffer in buffers) == 2 * 32 * 48


def test_load_shards_with_index(untied, tmp_path):
    folder = save_model(untied, tmp_path / "model", max_shard_bytes=30_000)
    index = json.loads((folder / f"{FILE}.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert len(files) > 2 and all(
        sum(x.nbytes for x in load_file(file).values()) <= 30_000 for file in files
    )
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(untied[2]))
    assert_same(load(folder, untied), untied[2])
    files[1].unlink()
    with pytest.raises(
        FileNotFoundError, match=f"{folder} lacks {files[1].name}, which its index lists"
    ):
        load(folder, untied)


def test_load_into_16_bits(untied, tmp_path, monkeypatch):
    """Kernels and embeddings are rounded as they are read: the host holds no wide copy of them."""
    folder, config = save_model(untied, tmp_path / "model"), untied[1]
    held = []
    array = hf.Pieces.array

    def watched(self):
        held.extend((self.shape, buffer.dtype) for buffer in self.buffers.values())
        return array(self)

    monkeypatch.setattr(hf.Pieces, "array", watched)
    shardings = placed(config, devices=8, fsdp=2, tensor=2, data=2)
    params = hf.load(folder, config, shardings, dtype="bfloat16")
    expected = transformer.held(untied[2], "bfloat16")
    for path, param in flat(params).items():
        np.testing.assert_array_equal(param, flat(expected)[path], err_msg=path)
        assert param.dtype == flat(expected)[path].dtype
        is_wide = param.dtype == np.float32
        assert is_wide == path.endswith(("scale", "bias")), path
        assert {dtype for shape, dtype in held if shape == param.shape} == {param.dtype}


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_load_half_precision(tied, folder, dtype):
    change(folder, lambda stored: {name: x.astype(dtype) for name, x in stored.items()})
    expected = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), tied[2])
    assert_same(load(folder, tied), expected)


def test_load_base_model_with_buffers(tied, folder):
    def as_on_the_hub(stored):
        stored = {name.removeprefix("transformer."): x for name, x in stored.items()}
        return stored | {
            "h.0.attn.bias": np.ones((1, 1, 4, 4), np.uint8),
            "h.1.attn.masked_bias": np.float32([-1e4]),
            "lm_head.weight": stored["wte.weight"],
        }

    change(folder, as_on_the_hub)
    assert_same(load(folder, tied), tied[2])


def test_load_refuses_different_tied_head(tied, folder):
    change(folder, lambda stored: stored | {"lm_head.weight": stored["transformer.wte.weight"] + 1})
    with pytest.raises(
        ValueError, match="lm_head.weight differs from transformer.wte.weight, though"
    ):
        load(folder, tied)


def test_load_names_everything_wrong(tied, folder):
    def spoil(stored):
        del stored["transformer.h.1.mlp.c_fc.bias"]
        stored["transformer.wpe.weight"] = stored["transformer.wpe.weight"][:-1]
        stored["transformer.h.2.ln_1.weight"] = stored["transformer.h.0.ln_1.weight"]
        stored["ln_f.bias"] = stored["transformer.ln_f.bias"]
        stored["transformer.ln_f.weight"] = stored["transformer.ln_f.weight"].astype(np.int32)

    change(folder, spoil)
    with pytest.raises(ValueError) as raised:
        load(folder, tied)
    lines = str(raised.value).splitlines()
    assert (
        lines[0] == f"the tensors in {folder} are not those of the gpt2 model in its config.json:"
    )
    assert sorted(line.strip() for line in lines[1:-1]) == [
        "missing: transformer.h.1.mlp.c_fc.bias [128]",
        "set twice: transformer.ln_f.bias, again as transformer.ln_f.bias in model.safetensors",
        "unknown: transformer.h.2.ln_1.weight [32] in model.safetensors",
        "wrong shape: transformer.wpe.weight [63, 32] in model.safetensors, expected [64, 32]",
        "wrong type: transformer.ln_f.weight I32 in model.safetensors, "
        "expected one of F64, F32, F16, BF16",
    ]


def test_load_refuses_tensor_in_two_shards(untied, tmp_path):
    folder = save_model(untied, tmp_path / "model", max_shard_bytes=30_000)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name = "model.embed_tokens.weight"
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    with pytest.raises(ValueError, match=f"set twice: {name}, .* in {second.name}"):
        load(folder, untied)


def test_load_refuses_pickle(tied, folder):
    (folder / FILE).rename(folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"(?s)pytorch_model.bin would run .*safe_serialization=True"
    ):
        load(folder, tied)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(
        FileNotFoundError, match=f"{folder} holds neither model.safetensors nor model"
    ):
        load(folder, tied)


def test_load_blames_no_damage_where_a_file_cannot_be_read(tied, folder):
    (folder / FILE).unlink()
    (folder / FILE).mkdir()
    with pytest.raises(OSError, match=f"{folder}/model.safetensors cannot be read"):
        load(folder, tied)


def test_load_names_damaged_file(tied, folder):
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{folder}/model.safetensors is damaged"):
        load(folder, tied)


# save


def test_save_config(untied, tmp_path):
    # transformers' save_pretrained would refuse to write it.
    hf_config = tiny_models.hf_config(
        "llama2", dtype="bfloat16", architectures=["LlamaModel"], temperature=0.5
    )
    folder = save_model((hf_config, *untied[1:]), tmp_path / "model")
    stored = json.loads((folder / "config.json").read_text())
    assert (stored["architectures"], stored["dtype"]) == (["LlamaForCausalLM"], "float32")
    assert families.from_hf(hf.read_config(folder)) == untied[1]
    assert hf_config.architectures == ["LlamaModel"]


def test_save_sharded_parameters(untied, tmp_path):
    hf_config, config, params = untied
    folder = save_model(untied, tmp_path / "whole")
    params = jax.device_put(params, placed(config, devices=8, data=2, fsdp=2, tensor=2))
    hf.save(tmp_path / "sharded", config, hf_config, params)
    assert (folder / FILE).read_bytes() == (tmp_path / "sharded" / FILE).read_bytes()


def test_save_failed_leaves_old_export(tied, folder, monkeypatch):
    before = (folder / FILE).read_bytes()
    other = (*tied[:2], jax.tree.map(lambda x: x + 1, tied[2]))
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_io.safetensors.numpy, "save_file", lambda *_, **__: 1 / 0)
        for path in (folder, folder.parent / "new"):
            with pytest.raises(ZeroDivisionError):
                save_model(other, path)
    assert (folder / FILE).read_bytes() == before
    assert not (folder.parent / "new").exists()
    assert_same(load(save_model(other, folder), tied), other[2])
    assert save_model(other, folder.parent / "new").exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model", "new"]


def test_save_refuses_other_folder(tied, tmp_path):
    (tmp_path / "thesis.txt").write_text("dear to me")
    with pytest.raises(FileExistsError, match=f"{tmp_path} exists and is not a model folder"):
        save_model(tied, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_save_refuses_other_parameters(tied, tmp_path):
    hf_config, config, params = tied
    with pytest.raises(
        ValueError, match="with no place in a Hugging Face checkpoint: lora/a. Merge"
    ):
        hf.save(
            tmp_path / "x", config, hf_config, params | {"lora": {"a": params["embed"]["tokens"]}}
        )
    with pytest.raises(ValueError, match="to export are missing: embed/positions, embed/tokens"):
        hf.save(tmp_path / "x", config, hf_config, params | {"embed": {}})
    assert not list(tmp_path.iterdir())


def test_save_tokenizer(tmp_path):
    source = STORIES
    hf_config = hf.read_config(source)
    config = families.from_hf(hf_config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    hf.save(tmp_path / "hf", config, hf_config, hf.load(source, config, placed(config)), tokenizer)
    assert load_file(tmp_path / "hf" / FILE).keys() == load_file(source / FILE).keys()
    text = "Once upon a time"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")(text) == tokenizer(text)
