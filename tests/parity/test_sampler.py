"""Greedy sampling and beam search against transformers' generate."""

import jax
import numpy as np
import pytest

from dpo_jax.models import families, hf, transformer
from dpo_jax.models.loading import Model
from dpo_jax.parallel import sharding
from dpo_jax.sampling.beam import search
from dpo_jax.sampling.sampler import Sampling, sample
from tests.helpers import tiny_models
from tests.helpers.tiny import random_pairs

PROMPTS = [pair.prompt for pair in random_pairs(5)]  # of 1 to 11 tokens


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def tokens(completions):
    return [[one.tokens.tolist() for one in row] for row in completions]


# Every family, and what differs in its cache.
@pytest.mark.parametrize(
    "variant",
    [
        "gpt2",
        "gptj",
        "neox-parallel",
        "neox-sequential",
        "llama3",
        "mistral-window",
        "qwen2",
        "qwen3",
        pytest.param("qwen3-mixed", marks=pytest.mark.slow),
        "smollm3",
        pytest.param("olmo3", marks=pytest.mark.slow),
        "gemma2",
        "gemma3",
        "qwen2-yarn",
        "phi3",
        "phi3-window",
        "qwen3-moe",
        "mixtral",
    ],
)
def test_sample_greedy_equals_generate(variant, tmp_path):
    """A batch of prompts of 1 to 11 tokens, so that padding, positions, windows and EOS all
    matter.
    """
    torch = pytest.importorskip("torch", reason="compares with transformers' torch models")
    folder, mesh = tiny_models.write(variant, tmp_path), one_device()
    config = families.from_hf(hf.read_config(folder))
    params = hf.load(folder, config, sharding.param_shardings(mesh, transformer.abstract(config)))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 96, length).astype(np.int32) for length in (3, 11, 1, 7)]
    ours = sample(Model(config, params, None, mesh, 1), prompts, Sampling(12, temperature=0))
    for prompt, (one,) in zip(prompts, ours, strict=True):
        model = tiny_models.torch_model(variant)
        with torch.no_grad():
            whole = model.generate(
                torch.tensor(prompt[None].astype(int)),
                do_sample=False,
                max_new_tokens=12,
                pad_token_id=0,
            )
            log_probs = model(whole).logits[0].double().log_softmax(-1)
        assert one.tokens.tolist() == whole[0, len(prompt) :].tolist()
        expected = log_probs[len(prompt) - 1 : -1].gather(1, whole[0, len(prompt) :, None])[:, 0]
        np.testing.assert_allclose(one.log_probs, expected, atol=1e-4)


def test_sample_greedy_equals_generate_past_longrope_s_original_length(tmp_path):
    """Prompts of more than its 24 tokens, for which both have the long factors."""
    torch = pytest.importorskip("torch", reason="compares with transformers' torch models")
    folder, mesh = tiny_models.write("phi3", tmp_path), one_device()
    config = families.from_hf(families.at_length(hf.read_config(folder), 48))
    params = hf.load(folder, config, sharding.param_shardings(mesh, transformer.abstract(config)))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 96, length).astype(np.int32) for length in (25, 36)]
    ours = sample(Model(config, params, None, mesh, 1), prompts, Sampling(12, temperature=0))
    for prompt, (one,) in zip(prompts, ours, strict=True):
        with torch.no_grad():
            whole = tiny_models.torch_model("phi3").generate(
                torch.tensor(prompt[None].astype(int)), do_sample=False, max_new_tokens=12
            )
        assert one.tokens.tolist() == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("variant", "beams"), [("gpt2", 2), ("mistral-window", 5)])
def test_beam_search_equals_generate(variant, beams, tmp_path):
    """Prompts of several lengths, in more than one batch; some completions end by EOS."""
    torch = pytest.importorskip("torch", reason="compares with transformers' torch models")
    folder, mesh = tiny_models.write(variant, tmp_path), one_device()
    config = families.from_hf(hf.read_config(folder))
    params = hf.load(folder, config, sharding.param_shardings(mesh, transformer.abstract(config)))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 96, length).astype(np.int32) for length in (3, 11, 1, 7, 5)]
    sampling = Sampling(8, beams=beams, batch_size=2 * beams)
    model = tiny_models.torch_model(variant)
    # More tokens end a completion, so that some do early.
    stop_ids = tuple(range(1, 25))
    ours = search(Model(config, params, None, mesh, 1, stop_ids[1:]), prompts, sampling)
    ended = 0
    for prompt, (one,) in zip(prompts, ours, strict=True):
        with torch.no_grad():
            whole = model.generate(
                torch.tensor(prompt[None].astype(int)),
                do_sample=False,
                num_beams=beams,
                length_penalty=0.0,
                max_new_tokens=8,
                pad_token_id=0,
                eos_token_id=list(stop_ids),
            )
            log_probs = model(whole).logits[0].double().log_softmax(-1)
        theirs = whole[0, len(prompt) :].tolist()
        assert one.tokens.tolist() == theirs
        expected = [
            float(log_probs[len(prompt) - 1 + place, token]) for place, token in enumerate(theirs)
        ]
        np.testing.assert_allclose(one.log_probs, expected, atol=1e-4)
        ended += one.ended
    assert ended
