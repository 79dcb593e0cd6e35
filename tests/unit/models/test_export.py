"""What an export has beside its weights: names of config.json, tokenizer, generation config."""

import json
import os
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from dpo_jax.data import toy
from dpo_jax.models import export, families, hf, loading, safetensors_io
from dpo_jax.models.export import Options, Source
from dpo_jax.parallel import sharding
from tests.helpers import chat_model, tiny_models, tiny_runs
from tests.helpers.tiny_models import random_model, save_model


def read(file):
    return json.loads(file.read_text())


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A chat model as it is found on the hub."""
    return chat_model.write(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def opened(source):
    return loading.open_checkpoint(str(source))


def write(checkpoint, path, tokenizer=None, source=None, dtype="float32"):
    """Export a checkpoint as it is; return the folder."""
    hf.save(
        path,
        checkpoint.config,
        checkpoint.hf_config,
        checkpoint.load_params(one_device()),
        tokenizer or checkpoint.tokenizer,
        source or checkpoint.source,
        Options(dtype),
    )
    return path


@pytest.fixture(scope="module")
def exported(opened, tmp_path_factory):
    return write(opened, tmp_path_factory.mktemp("exported") / "hf", dtype="bfloat16")


# config.json


def test_config_has_rope_of_both_versions(exported):
    found = read(exported / "config.json")
    for name in ("rope_theta", "rope_scaling", "eos_token_id", "torch_dtype", "head_dim"):
        assert found[name] == chat_model.CONFIG[name], name
    assert found["dtype"] == "bfloat16"
    assert found["rope_parameters"] == chat_model.ROPE | dict(rope_theta=500_000.0)


SCALED = ("llama3", "qwen2-yarn", "phi3", "olmo3", "gemma3")


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_config_reads_back_the_same(variant, tmp_path):
    theirs, config, _ = model = random_model(variant)
    folder = save_model(model, tmp_path / "hf")
    again = hf.read_config(folder)
    assert families.from_hf(again) == config
    rope = getattr(theirs, "rope_parameters", None)
    assert getattr(again, "rope_parameters", None) == rope
    stored = read(folder / "config.json")
    # Only of a kind that says something; "default" is no scaling to transformers 4.
    assert bool(stored.get("rope_scaling")) == (variant in SCALED)
    of_full_layers = (rope or {}).get("full_attention", rope or {})
    assert stored.get("rope_theta") == of_full_layers.get("rope_theta")
    has_two = stored["model_type"] == "gemma3_text"
    assert stored.get("rope_local_base_freq") == (100.0 if has_two else None)


def test_config_of_neox_has_names_of_its_own(tmp_path):
    """transformers 4 rotates a quarter of each head unless rotary_pct says otherwise."""
    folder = save_model(random_model("neox-sequential"), tmp_path / "hf")
    found = read(folder / "config.json")
    assert (found["rotary_pct"], found["rotary_emb_base"]) == (1.0, 500.0)


# generation_config.json


def test_generation_config_is_the_source_s(source, exported):
    name = "generation_config.json"
    assert (exported / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    "in_config, in_generation, expected",
    [
        (1, None, None),  # `generate` reads config.json
        (2, None, [2, 1]),
        (None, None, [1]),
        ([7, 1], None, None),
        (2, 7, [7, 1]),
        (2, [7, 9], [7, 9, 1]),
    ],
)
def test_generation_config_stops_at_eos(in_config, in_generation, expected, opened, tmp_path):
    """Completions end in the tokenizer's EOS, 1: `generate` would never stop without it."""
    place = tmp_path / "source"
    place.mkdir()
    if in_generation is not None:
        # transformers marks so what it made of config.json, and would make it again.
        fields = dict(eos_token_id=in_generation, temperature=0.6, _from_model_config=True)
        (place / "generation_config.json").write_text(json.dumps(fields))
    config = tiny_models.hf_config("llama2", eos_token_id=in_config)
    export.write_generation_config(tmp_path, Source(place), config, opened.tokenizer)
    file = tmp_path / "generation_config.json"
    if expected is None:
        assert not file.exists()
        return
    found = read(file)
    assert found["eos_token_id"] == expected
    assert found.get("temperature") == (0.6 if in_generation is not None else None)
    assert "_from_model_config" not in found


def test_generation_config_of_reward_model_is_left_out(opened, tmp_path):
    config = families.from_hf(opened.hf_config, head="reward")
    params = jax.device_put(tiny_models.random_params(config))
    hf.save(tmp_path / "hf", config, opened.hf_config, params, opened.tokenizer, opened.source)
    assert not (tmp_path / "hf" / "generation_config.json").exists()


def test_generation_config_that_is_no_json(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=f"{tmp_path}/generation_config.json is not JSON"):
        export.read_generation_config(tmp_path)


@pytest.mark.parametrize("written", ['"3"', '["3", 1]', "true", "2.0", '{"a": 1}', "[[1]]"])
def test_eos_that_is_no_id_is_refused(written, source, tmp_path):
    """On opening: an export would hold it, and `generate` stumble over it."""
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    file = folder / "generation_config.json"
    file.write_text(f'{{"eos_token_id": {written}}}')
    with pytest.raises(ValueError, match=re.escape(f"eos_token_id in {file} is {written}; exp")):
        loading.open_checkpoint(str(folder))
    # A reward model generates nothing.
    loading.open_checkpoint(str(folder), head="reward")


def test_model_stops_where_the_source_does(opened):
    model = opened.load(one_device())
    assert model.stop_ids == (chat_model.EOT, chat_model.END)
    assert opened.load(one_device(), append_eos=False).stop_ids == ()


def test_scratch_model_has_its_tokenizer_s_eos(source):
    """And not that of transformers' class, which is some word here."""
    made = loading.from_scratch(tiny_runs.SCRATCH, 0, tokenizer_path=str(source))
    assert (made.hf_config.bos_token_id, made.hf_config.eos_token_id) == (0, 1)
    asked = dict(tiny_runs.SCRATCH, eos_token_id=9)
    assert loading.from_scratch(asked, 0, tokenizer_path=str(source)).hf_config.eos_token_id == 9


# tokenizer


def test_tokenizer_files_are_copied(source, exported):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (exported / name).read_bytes() == (source / name).read_bytes(), name
    assert not (exported / "chat_template.jinja").exists()  # it is in tokenizer_config.json


def test_tokenizer_of_new_class_gets_the_old_name(source, tmp_path):
    """As transformers 5 writes them, which transformers 4 does not know."""
    place = tmp_path / "source"
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(place)
    fields = read(place / "tokenizer_config.json")
    assert fields["tokenizer_class"] == "TokenizersBackend"
    fields["extra_special_tokens"] = chat_model.HEADERS
    (place / "tokenizer_config.json").write_text(json.dumps(fields))
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    export.write_tokenizer(tmp_path, Source(place, place), tokenizer)
    found = read(tmp_path / "tokenizer_config.json")
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert found["additional_special_tokens"] == chat_model.HEADERS
    assert "extra_special_tokens" not in found
    template = "chat_template.jinja"
    assert (tmp_path / template).read_text() == (place / template).read_text()
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert set(chat_model.HEADERS) <= set(again.all_special_tokens)


def test_tokenizer_that_was_changed_is_saved(source, opened, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{{ messages[0].content }}"
    export.write_tokenizer(tmp_path, opened.source, tokenizer)
    found = read(tmp_path / "tokenizer_config.json")
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == "{{ messages[0].content }}"
    text = "<|begin_of_text|> w3 w50 <|eot_id|>"
    assert again(text).input_ids == opened.tokenizer(text).input_ids


def test_tokenizer_made_in_code_is_saved(tmp_path):
    for name, tokenizer in (("toy", toy.tokenizer()), ("words", tiny_runs.tokenizer())):
        (tmp_path / name).mkdir()
        export.write_tokenizer(tmp_path / name, Source(), tokenizer)
        found = read(tmp_path / name / "tokenizer_config.json")
        assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        words = "film good plot" if name == "toy" else "w1 w2"
        assert again(words).input_ids == tokenizer(words).input_ids


def test_tokenizer_of_another_model_names_its_class(tmp_path, opened):
    """Without a class the folder's config.json would choose one: Llama's over GPT-2's files."""
    place = tmp_path / "gpt2"
    place.mkdir()
    (place / "config.json").write_text('{"model_type": "gpt2"}')
    words = {"a": 0, "b": 1, "Ġ": 2, "Ġb": 3, "<|endoftext|>": 4}
    (place / "vocab.json").write_text(json.dumps(words))
    (place / "merges.txt").write_text("#version: 0.2\nĠ b\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    export.write_tokenizer(tmp_path, Source(opened.source.folder, place), tokenizer)
    found = read(tmp_path / "tokenizer_config.json")
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("a b").input_ids == tokenizer("a b").input_ids == [0, 3]


# the weights' type, and the files' mode


def test_stored_dtype_of_most_numbers(source, tmp_path):
    assert safetensors_io.stored_dtype(source) == "BF16"
    save_file(
        dict(norm=np.ones(3, np.float32), kernel=np.ones((3, 3), np.float16)),
        tmp_path / "model.safetensors",
    )
    assert safetensors_io.stored_dtype(tmp_path) == "F16"


def test_export_in_the_source_s_type_is_exact(source, opened, exported):
    assert opened.source.dtype == "bfloat16"
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(exported / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert after[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(after[name], values)


def test_export_rounds_to_nearest(tmp_path):
    hf_config, config, params = random_model("llama2")
    for dtype in ("float32", "bfloat16", "float16"):
        hf.save(tmp_path / dtype, config, hf_config, params, options=Options(dtype))
    exact = load_file(tmp_path / "float32" / "model.safetensors")
    for dtype in ("bfloat16", "float16"):
        found = load_file(tmp_path / dtype / "model.safetensors")
        for name, values in exact.items():
            np.testing.assert_array_equal(found[name], values.astype(jax.numpy.dtype(dtype)))
        assert read(tmp_path / dtype / "config.json")["dtype"] == dtype


def test_export_refuses_what_float16_cannot_hold(tmp_path):
    hf_config, config, params = random_model("llama2")
    large = jax.tree.map(lambda leaf: leaf * 1e6, params)
    with pytest.raises(ValueError, match=r"embed_tokens.weight has numbers up to .*float16"):
        hf.save(tmp_path / "hf", config, hf_config, large, options=Options("float16"))
    assert not (tmp_path / "hf").exists()


def test_bytes_of_a_shard_are_those_of_the_type(tmp_path):
    model = random_model("llama2")
    whole = save_model(model, tmp_path / "whole", dtype="bfloat16")
    size = sum(values.nbytes for values in load_file(whole / "model.safetensors").values())
    save_model(model, tmp_path / "cut", dtype="bfloat16", max_shard_bytes=size // 2 + 1)
    index = read(tmp_path / "cut" / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == size
    assert len(set(index["weight_map"].values())) in (2, 3)


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_umask_s_mode(mask, mode, opened, tmp_path):
    before = os.umask(mask)
    try:
        folder = write(opened, tmp_path / "hf")
    finally:
        os.umask(before)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 5
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {
        path.name: mode for path in files
    }
