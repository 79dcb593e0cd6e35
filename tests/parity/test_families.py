"""Every family against transformers' own torch model, in both directions."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import traverse_util
from safetensors.numpy import load_file

from dpo_jax.models import families, hf, transformer
from dpo_jax.parallel import sharding
from tests.helpers import tiny_models

# The first families, and variants whose arithmetic another has as well.
ALIKE = (
    "gpt2",
    "llama2",
    "llama3",
    "mistral-window",
    "qwen3",
    "gpt2-untied",
    "neox-sequential",
    "llama-biased",
    "mistral",
    "qwen2",
    "qwen3-mixed",
    "qwen2-yarn",
    "phi3-window",
)
GRADIENTS = []
for variant in tiny_models.VARIANTS:
    marks = [pytest.mark.slow] if variant in ALIKE else []
    GRADIENTS.append(pytest.param(variant, marks=marks))

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 24))


def one_device(config):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return sharding.param_shardings(mesh, transformer.abstract(config))


@pytest.fixture(scope="module", params=tiny_models.VARIANTS)
def case(request, tmp_path_factory):
    """A variant's folder as transformers writes it, its torch logits, and our config and
    weights.
    """
    torch = pytest.importorskip("torch", reason="compares with transformers' torch models")
    folder = tiny_models.write(request.param, tmp_path_factory.mktemp(request.param))
    with torch.no_grad():
        expected = tiny_models.torch_model(request.param)(torch.tensor(TOKENS)).logits.numpy()
    hf_config = hf.read_config(folder)
    config = families.from_hf(hf_config)
    return folder, expected, hf_config, config, hf.load(folder, config, one_device(config))


def test_logits_equal_torch(case):
    _, expected, _, config, params = case
    logits = jax.jit(transformer.logits, static_argnums=0)(config, params, TOKENS)
    assert logits.dtype == jnp.float32
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", GRADIENTS, indirect=True)
def test_gradient_equals_torch(case, tmp_path):
    """That of the mean log-prob of each next token, tensor by tensor."""
    import torch

    folder, _, hf_config, config, params = case
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    # torch gives the token that is used for padding no gradient.
    model.get_input_embeddings().padding_idx = None
    tokens = torch.tensor(TOKENS)
    model(tokens, labels=tokens).loss.backward()
    # Gradients in the place of the weights are written under a checkpoint's names.
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.grad)
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")

    def loss(params):
        log_probs_BTV = jax.nn.log_softmax(transformer.logits(config, params, TOKENS[:, :-1]))
        return -jnp.take_along_axis(log_probs_BTV, TOKENS[:, 1:, None], axis=2).mean()

    gradient = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(params), sep="/")
    compared = set()
    for tensor in families.tensors(hf_config.model_type, config):
        for name, place in tensor.names(config):
            held = [gradient[path] for path in tensor.paths]
            found = tensor.pack([np.asarray(x[place]) for x in held])
            largest = np.abs(expected[name]).max()
            np.testing.assert_allclose(
                found, expected[name], rtol=0, atol=1e-3 * largest, err_msg=name
            )
            compared.add(name)
    assert compared == expected.keys()


def test_save_gives_torch_model_back(case, tmp_path):
    import torch

    folder, expected, hf_config, config, params = case
    hf.save(tmp_path / "hf", config, hf_config, params)
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "hf" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name, strict=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    with torch.no_grad():
        np.testing.assert_array_equal(model(torch.tensor(TOKENS)).logits.numpy(), expected)


def test_text_part_of_a_model_with_images_is_read(tmp_path, capsys):
    """Gemma 3 of 4B and above: what transformers makes of the same tokens, without an image."""
    torch = pytest.importorskip("torch", reason="compares with transformers' torch models")
    text = tiny_models.hf_config("gemma3").to_dict()
    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    fields = dict(
        image_token_index=95, boi_token_index=94, eoi_token_index=93, mm_tokens_per_image=4
    )
    both = transformers.Gemma3Config(text_config=text, vision_config=vision, **fields)
    model = transformers.AutoModelForImageTextToText.from_config(both, attn_implementation="eager")
    tokens = TOKENS % 90
    with torch.no_grad():
        expected = model.eval()(torch.tensor(tokens)).logits.numpy()
    model.save_pretrained(tmp_path)
    hf_config = hf.read_config(tmp_path)
    assert "its text part alone is read, trained and exported" in capsys.readouterr().out
    config = families.from_hf(hf_config)
    params = hf.load(tmp_path, config, one_device(config))
    found = transformer.logits(config, params, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    # What is written is the text part alone.
    hf.save(tmp_path / "hf", config, hf_config, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(again).__name__ == "Gemma3ForCausalLM"
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.tensor(tokens)).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [24, 25])  # longrope's original length, and a token more
def test_longrope_takes_factors_of_its_length(length, tmp_path):
    """Logits, gradients, and an export that transformers computes alike at every length."""
    torch = pytest.importorskip("torch", reason="compares with transformers' torch models")
    folder = tiny_models.write("phi3", tmp_path / "source")
    hf_config = families.at_length(hf.read_config(folder), length)
    config = families.from_hf(hf_config)
    params = hf.load(folder, config, one_device(config))
    # Without the token of padding, whose embedding has no gradient in torch.
    tokens = np.random.default_rng(0).integers(1, 96, (2, length))

    def loss(params):
        logits = transformer.logits(config, params, tokens)
        return (jax.nn.log_softmax(logits)[..., 0]).sum(), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    theirs = copy.deepcopy(tiny_models.torch_model("phi3"))
    expected = theirs(torch.tensor(tokens)).logits
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-4, rtol=0)
    expected.log_softmax(-1)[..., 0].sum().backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "gradient")
    expected = hf.load(tmp_path / "gradient", config, one_device(config))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).mean()),
        gradient,
        expected,
    )

    # What was trained with the long factors has them at every length, in transformers too.
    hf.save(tmp_path / "hf", config, hf_config, params)
    assert families.from_hf(hf.read_config(tmp_path / "hf")) == config
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        of_start = exported(torch.tensor(tokens[:, :10])).logits.numpy()
    np.testing.assert_allclose(of_start, logits[:, :10], atol=1e-4, rtol=0)
