"""Model folders with damage of every kind, at each of their files."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import safetensors_io
from tests.hostile import models
from tests.hostile.judging import refusal_of
from tests.hostile.models import ENDS, WEIGHTS, open_and_load, rewrite, shard

CASES = list(models.cases())


@pytest.fixture
def model(tmp_path):
    """A model's folder that may be damaged."""
    return models.write(tmp_path / "model")


@pytest.mark.parametrize("case", CASES, ids=[f"{case.kind}, {case.name}" for case in CASES])
def test_hostile_models_are_named(case, tmp_path):
    verdict = models.judge_case(case, tmp_path)
    assert verdict.is_right, verdict


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_not_finite_in_every_stored_type(model, dtype):
    tensors = {name: values.astype(jnp.dtype(dtype)) for name, values in WEIGHTS.items()}
    rewrite(model, **tensors)
    assert not refusal_of(lambda: open_and_load(model))
    tensors["model.norm.weight"][3] = np.nan
    rewrite(model, **tensors)
    assert "model.norm.weight" in refusal_of(lambda: open_and_load(model))


@pytest.mark.parametrize("end", ENDS)
def test_zeros_of_one_layer_are_said(model, end, capsys):
    name = next(name for name in WEIGHTS if end in name and ".2." in name)
    rewrite(model, **{name: np.zeros_like(WEIGHTS[name])})
    assert not refusal_of(lambda: open_and_load(model))
    said = capsys.readouterr().out
    words = f"all weights of {name} in {model}/model.safetensors are zero"
    assert said.startswith("warning: ") and words in said


def test_an_index_has_every_tensor_where_it_is(model):
    index = shard(model)
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


def test_an_eos_outside_of_the_vocabulary_blames_the_tokenizer(model):
    models.set_strange_eos(model)
    refusal = refusal_of(lambda: open_and_load(model))
    assert f"{model}: its EOS '<|new|>' is token 512, but" in refusal
