"""Exports in transformers 4 and 5: equal logits, and answers that end where the source's end.

TRANSFORMERS4_PYTHON is the path of a Python that has transformers 4.57 and torch:

    python -m venv /tmp/transformers4
    /tmp/transformers4/bin/pip install "transformers==4.57.*" torch
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from dpo_jax.models import hf, loading
from dpo_jax.models.export import Options
from dpo_jax.parallel import sharding
from dpo_jax.sampling.sampler import Sampling, sample
from tests.helpers import chat_model, tiny_models

pytest.importorskip("torch", reason="the independent reference is transformers with torch")
OTHER = "TRANSFORMERS4_PYTHON"
pytestmark = pytest.mark.skipif(
    OTHER not in os.environ,
    reason=f"needs a Python with transformers 4.57 and torch, whose path is in {OTHER}",
)
NEW_TOKENS = 12
CHAT = [{"role": "user", "content": "w14 w25"}]

# Run by either Python: what each folder's model and tokenizer do, in JSON.
LOOK = """
import json, sys
import torch, transformers

def look(folder, ids, chat, new_tokens):
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0]
    found = dict(
        version=transformers.__version__,
        logits=logits.tolist(),
        told={name: sorted(map(str, value)) for name, value in told.items()},
        config_dtype=str(transformers.AutoConfig.from_pretrained(folder).dtype),
    )
    if not chat:
        return found
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    answer = model.generate(torch.tensor([ids]), max_new_tokens=new_tokens)[0, len(ids):]
    return found | dict(
        answer=answer.tolist(),
        stops=model.generation_config.eos_token_id,
        tokenizer_class=type(tokenizer).__name__,
        special=sorted(tokenizer.all_special_tokens),
        rendered=tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
        ids=tokenizer("<|begin_of_text|> w1 w57 <|eot_id|> <|assistant|> ??").input_ids,
    )

print(json.dumps([look(*asked) for asked in json.loads(sys.argv[1])]))
"""


def look(python: str, folders, ids, chat=None) -> list[dict]:
    """Return what a version of transformers finds in each folder."""
    ids = list(map(int, ids))
    asked = json.dumps([[str(folder), ids, chat, NEW_TOKENS] for folder in folders])
    done = subprocess.run([python, "-c", LOOK, asked], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def in_both(folders, ids, chat=None) -> list[tuple[dict, dict]]:
    """Return what transformers 4 and 5 find in each folder."""
    found = []
    for four, five in zip(
        look(os.environ[OTHER], folders, ids, chat),
        look(sys.executable, folders, ids, chat),
        strict=True,
    ):
        assert four["version"].startswith("4.57") and five["version"].startswith("5.")
        found.append((four, five))
    return found


def assert_same_model(four: dict, five: dict) -> None:
    np.testing.assert_allclose(four["logits"], five["logits"], atol=1e-5)
    assert np.abs(five["logits"]).max() > 0.5
    for found in (four, five):
        assert not any(found["told"].values()), found["told"]  # keys missing, unexpected, ...


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """Variant -> what the two versions find in its export."""
    place = tmp_path_factory.mktemp("variants")
    folders = [
        tiny_models.save_model(tiny_models.random_model(variant), place / variant)
        for variant in tiny_models.VARIANTS
    ]
    # Long enough that rotations of another base, or another window, would show.
    ids = np.random.default_rng(0).integers(2, 96, 40)
    return dict(zip(tiny_models.VARIANTS, in_both(folders, ids), strict=True))


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_logits_are_equal(variant, variants):
    assert_same_model(*variants[variant])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return chat_model.write(tmp_path_factory.mktemp("source") / "model")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_chat_model_stops_where_its_source_does(dtype, source, tmp_path):
    opened = loading.open_checkpoint(str(source))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = opened.load(mesh)
    hf.save(
        tmp_path / "hf",
        opened.config,
        opened.hf_config,
        model.params,
        opened.tokenizer,
        opened.source,
        Options(dtype),
    )
    (before,) = look(os.environ[OTHER], [source], chat_model.PROMPT, CHAT)
    ((four, five),) = in_both([tmp_path / "hf"], chat_model.PROMPT, CHAT)
    assert_same_model(four, five)
    np.testing.assert_allclose(four["logits"], before["logits"], atol=1e-5)
    for name in ("stops", "answer", "rendered", "ids"):
        assert four[name] == five[name] == before[name], name
    assert five["answer"][-1] == chat_model.END and len(five["answer"]) < NEW_TOKENS
    assert four["tokenizer_class"] == before["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert set(chat_model.HEADERS) <= set(four["special"]) == set(five["special"])
    assert four["config_dtype"] == five["config_dtype"] == f"torch.{dtype}"
    # And so does our own sampler.
    ((drawn,),) = sample(model, [np.array(chat_model.PROMPT)], Sampling(NEW_TOKENS, temperature=0))
    assert drawn.tokens.tolist() == five["answer"] and drawn.ended


def test_tokenizer_that_transformers_5_saved(source, tmp_path):
    """One that was changed in code: transformers 4 finds its class and its special tokens."""
    opened = loading.open_checkpoint(str(source))
    opened.tokenizer.chat_template = chat_model.TEMPLATE + "w0"
    params = opened.load_params(sharding.make_mesh(devices=jax.devices()[:1]))
    hf.save(
        tmp_path / "hf",
        opened.config,
        opened.hf_config,
        params,
        opened.tokenizer,
        opened.source,
    )
    ((four, five),) = in_both([tmp_path / "hf"], chat_model.PROMPT, CHAT)
    assert four["rendered"] == five["rendered"] and five["rendered"].endswith("w0")
    assert four["ids"] == five["ids"]
    assert set(chat_model.HEADERS) <= set(four["special"])
