"""Longrope: what a model is opened for, by the lengths that are asked of it."""

import numpy as np
import pytest

import dpo_jax
from dpo_jax.data.examples import Examples
from dpo_jax.models import hf, loading
from dpo_jax.pipeline.run import Run
from dpo_jax.sampling import sampler
from tests.helpers import tiny_models, tiny_runs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Phi-3 that was first made for 24 tokens, and has longrope's factors for 64."""
    theirs, config, params = tiny_models.random_model("phi3")
    folder = tmp_path_factory.mktemp("longrope") / "model"
    hf.save(folder, config, theirs, params, tiny_runs.tokenizer())
    return folder


def positions(checkpoint) -> int:
    return checkpoint.config.max_positions


def test_open_checkpoint_for_a_length(model, capsys):
    short = loading.open_checkpoint(str(model), max_length=24)
    assert positions(short) == positions(loading.open_checkpoint(str(model))) == 24
    assert "longrope" not in capsys.readouterr().out
    long = loading.open_checkpoint(str(model), max_length=25)
    assert positions(long) == 64
    assert "longrope's long factors, as max_length = 25" in capsys.readouterr().out

    examples = Examples()
    examples.append(np.arange(20), (np.arange(5), np.arange(4)), "row 7")
    long.check(examples)
    with pytest.raises(
        ValueError, match="row 7 has 25 tokens, but the model has 24 positions .longrope"
    ):
        short.check(examples)
    sampler.check(long.config, [np.arange(20)], sampler.Sampling(5))
    with pytest.raises(
        ValueError, match="prompt 0 has 20 tokens, .* the model's 24 positions .longrope"
    ):
        sampler.check(short.config, [np.arange(20)], sampler.Sampling(5))


def test_scratch_is_made_for_a_length():
    rope = tiny_models.hf_config("phi3").rope_parameters
    fields = tiny_models.PHI3 | dict(model_type="phi3", rope_parameters=rope)
    made = loading.from_scratch(
        fields | dict(original_max_position_embeddings=24), seed=0, max_length=25
    )
    assert positions(made) == 64


@pytest.mark.parametrize("length", [24, 25])
def test_run_opens_models_for_data_max_length(length, model, tmp_path):
    config = tiny_runs.dpo_config(model, "PAIRS", data__max_length=length)
    assert positions(Run(config, tmp_path, mesh=None).initial("dpo")) == (
        24 if length == 24 else 64
    )


def test_load_opens_for_max_length(model):
    assert dpo_jax.load(model).config.max_positions == 24
    assert dpo_jax.load(model, max_length=25).config.max_positions == 64
    with pytest.raises(ValueError, match="load: max_length=-1: expected at least 0"):
        dpo_jax.load(model, max_length=-1)


def test_commands_open_for_the_lengths_they_read(model, tmp_path, monkeypatch):
    opened = []

    def stop(*_, **options):
        opened.append(options["max_length"])
        raise InterruptedError

    monkeypatch.setattr(loading, "open_checkpoint", stop)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "w1", "chosen": "w2", "rejected": "w3"}\n')
    for options in ({}, dict(max_length=25)):
        with pytest.raises(InterruptedError):
            tiny_runs.score_file(model, rows, tmp_path / "scored", settings=options)
    for prompt in (0, 20):
        with pytest.raises(InterruptedError):
            settings = dict(max_prompt_length=prompt)
            tiny_runs.sample_file(model, rows, tmp_path / f"sampled{prompt}", settings)
    assert opened == [512, 25, 0, 26]
