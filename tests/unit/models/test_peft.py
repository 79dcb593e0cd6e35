"""Adapters in PEFT's format, written and read."""

import json
import re
import shlex
import shutil
import subprocess

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from dpo_jax.models import families, hf, loading, lora, peft
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


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_pack_is_same_update(variant):
    hf_config = tiny_models.hf_config(variant)
    config, adapters = families.from_hf(hf_config), Lora(3, 12.0)
    params, seen = flat(random_adapters(config, adapters)), set()
    for tensor in families.tensors(hf_config.model_type, config):
        pieces = {
            number: path.removesuffix("kernel")
            for number, path in enumerate(tensor.paths)
            if path.removesuffix("kernel") + "lora_a" in params
        }
        # Where q, k, v are one tensor: of all, of v alone.
        for kept in [pieces, dict(list(pieces.items())[-1:])]:
            if not kept:
                continue
            a, b = (
                {number: params[path + name][1] for number, path in kept.items()}
                for name in ("lora_a", "lora_b")
            )
            stored_a, stored_b = peft.pack(config, tensor, a, b)
            update = stored_b @ stored_a
            found = tensor.unpack(config, update.T if hf_config.model_type == "gpt2" else update)
            for number, value in enumerate(found):
                expected = (
                    np.tensordot(a[number], b[number], 1)
                    if number in kept
                    else np.zeros(value.shape)
                )
                np.testing.assert_allclose(value, expected, atol=1e-5)
            seen |= set(kept.values())
    assert seen == {path.removesuffix("lora_a") for path in params if path.endswith("lora_a")}


# adapters as models


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with a tokenizer, under the adapters."""
    return tiny_runs.write_model(tmp_path_factory.mktemp("base") / "model")


def write_adapter(folder, base, targets=(), rank=3, alpha=12.0, **fields):
    """Write random adapters of a base in our own way; return the folder.

    fields: of adapter_config.json, changed afterwards.
    """
    checkpoint = loading.open_checkpoint(str(base))
    adapters = Lora(rank, alpha, targets)
    params = jax.device_put(random_adapters(checkpoint.config, adapters))
    peft.save(
        folder, checkpoint.config, checkpoint.hf_config, adapters, params, base=checkpoint.path
    )
    change(folder, **fields)
    return folder


def change(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields, indent=2))


@pytest.fixture
def adapter(base, tmp_path):
    return write_adapter(tmp_path / "adapter", base)


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_adapter_is_merged_as_it_was_trained(variant, tmp_path):
    """By the maths of training: W + scale * A B on our own parameters."""
    theirs, config, params = model = tiny_models.random_model(variant)
    folder = tiny_models.save_model(model, tmp_path / "base")
    adapters = Lora(3, 12.0)
    trained = jax.device_put(random_adapters(config, adapters))
    peft.save(tmp_path / "adapter", config, theirs, adapters, trained, base=str(folder))
    expected = lora.merge(params, trained, adapters)
    found_folder, found = loading.find(str(tmp_path / "adapter"))
    assert found_folder == folder
    merged = hf.load(folder, config, tiny_models.placed(config), found)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), merged, expected)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), merged, params)
    assert max(jax.tree.leaves(moved)) > 0.1


def stored_weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "fields, scale",
    [
        (dict(), 4.0),
        (dict(use_rslora=True), 12 / 3**0.5),
        (dict(alpha_pattern={"q_proj": 6}), 2.0),
        (dict(alpha_pattern={r"model\\.layers\\.1\\..*": 6}), 4.0),
        (dict(alpha_pattern={"layers.0.self_attn.q_proj": 30}), 10.0),
    ],
)
def test_adapter_scale(fields, scale, base, tmp_path):
    folder = write_adapter(tmp_path / "adapter", base, targets=("q",), **fields)
    factors = load_file(folder / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    checkpoint = loading.open_checkpoint(str(folder))
    found = np.asarray(
        checkpoint.load_params(one_device())["layers"]["attention"]["q"]["kernel"][0]
    )
    expected = stored_weights(base)[f"{name}.weight"] + scale * (b @ a)
    np.testing.assert_allclose(found.reshape(16, 16), expected.T, atol=1e-5)


def test_adapter_brings_whole_tensors(base, adapter):
    """modules_to_save: they stand in the place of the base's."""
    file = adapter / "adapter_model.safetensors"
    head = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    save_file(load_file(file) | {"base_model.model.lm_head.weight": head}, file)
    params = loading.open_checkpoint(str(adapter)).load_params(one_device())
    np.testing.assert_array_equal(params["head"]["kernel"], head.T)


@pytest.mark.parametrize("variant", ["llama2", "llama3", "gpt2"])
def test_adapter_of_reward_model(variant, tmp_path):
    """Its head comes with it; the base is a language model, tied or not."""
    theirs, _, params = model = tiny_models.random_model(variant)
    folder = tiny_models.save_model(model, tmp_path / "base")
    config = families.from_hf(theirs, head="reward")
    adapters = Lora(3, 12.0)
    trained = jax.device_put(random_adapters(config, adapters))
    peft.save(tmp_path / "adapter", config, theirs, adapters, trained, base=str(folder))
    _, found = loading.find(str(tmp_path / "adapter"))
    merged = hf.load(folder, config, tiny_models.placed(config), found)
    body = {name: value for name, value in params.items() if name != "head"}
    expected = lora.merge(body, trained, adapters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), merged, expected)
    assert np.abs(merged["head"]["scalar"]).max() > 0.1


def test_adapter_over_an_adapter(base, adapter, tmp_path):
    second = write_adapter(tmp_path / "second", adapter, targets=("q",))
    assert json.loads((second / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(adapter)
    first_params = loading.open_checkpoint(str(adapter)).load_params(one_device())
    params = loading.open_checkpoint(str(second)).load_params(one_device())
    weights = {name: params["layers"]["attention"][name]["kernel"] for name in "qkv"}
    before = {name: first_params["layers"]["attention"][name]["kernel"] for name in "qkv"}
    assert np.abs(weights["q"] - before["q"]).max() > 0.1
    np.testing.assert_array_equal(weights["k"], before["k"])


def test_adapter_of_itself_is_refused(adapter):
    change(adapter, base_model_name_or_path=str(adapter))
    with pytest.raises(ValueError, match="is its own base"):
        loading.find(str(adapter))


def test_adapter_fingerprint_covers_all_files(base, tmp_path):
    def fingerprint(folder):
        return loading.open_checkpoint(str(folder)).fingerprint()

    folder = write_adapter(tmp_path / "adapter", base)
    first = fingerprint(folder)
    assert first == fingerprint(folder) != fingerprint(base)
    change(folder, lora_alpha=24.0)
    second = fingerprint(folder)
    file = folder / "adapter_model.safetensors"
    save_file({name: value * 2 for name, value in load_file(file).items()}, file)
    third = fingerprint(folder)
    other = tiny_runs.write_model(tmp_path / "other", scale=3)
    change(folder, base_model_name_or_path=str(other))
    assert len({first, second, third, fingerprint(folder)}) == 4


def test_adapter_s_own_tokenizer_comes_first(base, adapter):
    assert loading.open_checkpoint(str(adapter)).source.tokenizer_folder == base
    tokenizer = tiny_runs.tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(adapter)
    opened = loading.open_checkpoint(str(adapter))
    assert opened.source.tokenizer_folder == adapter
    assert opened.tokenizer.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(peft_type="IA3"), "peft_type is 'IA3'"),
        (dict(use_dora=True), "use_dora = True"),
        (dict(bias="lora_only"), "bias = 'lora_only'"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights = 'pissa_niter_4'"),
        (dict(trainable_token_indices=[1]), r"trainable_token_indices = \[1\]"),
    ],
)
def test_adapter_of_another_kind_is_refused(fields, message, base, adapter):
    change(adapter, **fields)
    with pytest.raises(ValueError, match=message) as raised:
        loading.open_checkpoint(str(adapter))
    lines = str(raised.value).splitlines()[1:]
    assert f"M.from_pretrained('{adapter}').merge_and_unload().save_pretrained('ME" in lines[0]
    assert f"T.from_pretrained('{base}').save_pretrained('MERGED')" in lines[1]


def test_advice_names_the_tokenizer_that_is_used(adapter):
    """The adapter's own comes before its base's; a name on the hub has its revision."""
    change(adapter, base_model_name_or_path="owner/base", revision="v2", peft_type="IA3")
    expected = "T.from_pretrained('owner/base', revision='v2').save_pretrained('MERGED')"
    with pytest.raises(ValueError, match=re.escape(expected)):
        peft.read(adapter)
    tiny_runs.tokenizer().save_pretrained(adapter)
    expected = f"T.from_pretrained('{adapter}').save_pretrained('MERGED')"
    with pytest.raises(ValueError, match=re.escape(expected)):
        peft.read(adapter)


def test_advice_for_a_classifier(adapter):
    change(adapter, use_dora=True, task_type="SEQ_CLS")
    expected = f"M.from_pretrained('{adapter}', num_labels=1).merge_and_unload()"
    with pytest.raises(ValueError, match=re.escape(expected)) as raised:
        peft.read(adapter)
    assert "AutoPeftModelForSequenceClassification as M" in str(raised.value)


def test_adapter_with_other_tensors_is_refused(adapter):
    file = adapter / "adapter_model.safetensors"
    stored = load_file(file)
    stored["base_model.model.model.vision.q_proj.lora_A.weight"] = np.ones((2, 2), np.float32)
    save_file(stored, file)
    with pytest.raises(ValueError, match="changes model.vision.q_proj.lora_A.weight, which"):
        loading.open_checkpoint(str(adapter)).load_params(one_device())


def test_adapter_with_another_base_layer_is_refused(base, adapter):
    """peft stores the head's matrix beside a LoRA of it, which is the base's but for rounding."""
    file = adapter / "adapter_model.safetensors"
    plain = load_file(file)
    name = "lm_head.base_layer.weight"
    head = stored_weights(base)["lm_head.weight"]
    save_file(plain | {f"base_model.model.{name}": head.astype(np.float16)}, file)
    params = loading.open_checkpoint(str(adapter)).load_params(one_device())
    np.testing.assert_allclose(params["head"]["kernel"], head.T, rtol=1e-3, atol=1e-6)
    save_file(plain | {f"base_model.model.{name}": 2 * head}, file)
    with pytest.raises(ValueError, match=f"{name} differs from lm_head.weight of the base"):
        loading.open_checkpoint(str(adapter)).load_params(one_device())


def test_adapter_config_that_is_no_json(adapter):
    file = adapter / "adapter_config.json"
    for text, problem in (("{", "is not JSON"), ("[]", "is not a JSON object")):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"{re.escape(str(file))} {problem}"):
            loading.find(str(adapter))


def test_adapter_of_another_shape_is_refused(adapter, tmp_path):
    theirs, config, _ = model = tiny_models.random_model("llama2")
    wider = tiny_models.save_model(model, tmp_path / "wider")
    change(adapter, base_model_name_or_path=str(wider))
    folder, adapters = loading.find(str(adapter))
    with pytest.raises(
        ValueError, match=r"has the shape \[16, 16\], and the base's has \[32, 32\]"
    ):
        hf.load(folder, config, tiny_models.placed(config), adapters)


def test_adapter_without_weights_is_refused(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="adapter_model.bin would run code from a pickle"):
        loading.open_checkpoint(str(adapter))
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="but no adapter_model.safetensors; fetch"):
        loading.open_checkpoint(str(adapter))


@pytest.mark.parametrize(
    "written, problem",
    [
        ("../base", "the relative path ../base"),
        ("owner/base", "the relative path owner/base"),  # a folder, not a name on the hub
        ("/no/such/folder", "the folder /no/such/folder, which does not exist"),
        (None, "is not given"),
        ("a/b/c", "the relative path a/b/c"),
    ],
)
def test_adapter_without_base_names_line_to_type(
    written, problem, base, adapter, tmp_path, monkeypatch
):
    """And the line, with the base's path in it, is all that it takes."""
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "base").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    change(adapter, base_model_name_or_path=written)
    with pytest.raises(ValueError, match=re.escape(problem)) as raised:
        loading.open_checkpoint(str(adapter))
    line = str(raised.value).splitlines()[-1]
    found = problem.startswith("the relative") and written != "a/b/c"
    assert (str(base.resolve()) in line) == found
    command = shlex.split(line.replace("/PATH/TO/BASE", str(base)))
    subprocess.run(command, check=True)
    assert loading.find(str(adapter))[0] == base.resolve()


def test_adapter_over_a_model_on_the_hub(adapter, monkeypatch):
    change(adapter, base_model_name_or_path="owner/base-7b", revision="v2")
    assert peft.read(adapter).base == "owner/base-7b@v2"


# an adapter beside a whole model


@pytest.fixture
def both(base, adapter, tmp_path):
    """A folder with a whole model and an adapter of another one."""
    folder = tmp_path / "both"
    shutil.copytree(base, folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, folder)
    return folder


def test_adapter_beside_its_base_is_merged(base, adapter, both):
    change(both, base_model_name_or_path=str(both))
    folder, adapters = loading.find(str(both))
    assert (folder, [found.folder for found in adapters]) == (both, [both])
    expected = loading.open_checkpoint(str(adapter)).load_params(one_device())
    found = loading.open_checkpoint(str(both))
    jax.tree.map(np.testing.assert_array_equal, found.load_params(one_device()), expected)
    # The base's files are the same in both folders, and so is what the adapter does.
    assert found.fingerprint() != loading.open_checkpoint(str(base)).fingerprint()


def test_adapter_beside_another_model_is_refused(base, both):
    with pytest.raises(ValueError, match="it is not clear which is meant") as raised:
        loading.open_checkpoint(str(both))
    message = str(raised.value)
    assert f"an adapter (adapter_config.json) of {base}: " in message
    # Each reading by its line: the adapter beside, and the model alone.
    change(both, base_model_name_or_path=message.rpartition(" to ")[2])
    assert len(loading.find(str(both))[1]) == 1
    (both / "adapter_config.json").unlink()
    assert loading.find(str(both)) == (both, ())


def test_adapter_of_another_kind_beside_its_base_is_refused(both):
    """peft would load the adapter along with the base, and then once more."""
    change(both, base_model_name_or_path=str(both), use_dora=True)
    with pytest.raises(ValueError, match="use_dora = True. Move its two files, adapter_config"):
        loading.open_checkpoint(str(both))
