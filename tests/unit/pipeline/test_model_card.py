"""Model cards: what the hub reads of them, and what a person does."""

import json

import pytest
import yaml

from dpo_jax import config as configs
from dpo_jax.pipeline.model_card import ModelCard

LEDGER = dict(
    train=dict(kept=1200),
    eval=dict(kept=30),
    fingerprint=["a" * 64, "b" * 64],
)


def card(tmp_path, stages=("dpo",), stage="dpo", adapter=False, start="", **fields) -> str:
    """Return a card. fields: of the config, with two underscores for dots."""
    config = configs.default(stages)
    values = dict(model__path="owner/base-7b", data__path="org/pairs:subset") | fields
    for name, value in values.items():
        *blocks, field = name.split("__")
        block = config
        for part in blocks:
            block = block[part]
        block[field] = value
    (tmp_path / "ledger.json").write_text(json.dumps(LEDGER))
    (tmp_path / "config.json").write_text(json.dumps(dict(date="2026-11-26")))
    made = ModelCard(
        config, stage, tmp_path, "f" * 64, {"loss/eval": 0.512345678}, "bfloat16", start
    )
    return made.adapter_text() if adapter else made.text()


def head(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_head_names_what_the_hub_knows(tmp_path):
    assert head(card(tmp_path)) == dict(
        base_model="owner/base-7b",
        base_model_relation="finetune",
        datasets=["org/pairs"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dpo_jax", "dpo"],
    )


def test_head_of_an_adapter(tmp_path):
    found = head(card(tmp_path, adapter=True, model__lora__rank=8))
    assert found["base_model_relation"] == "adapter" and found["library_name"] == "peft"
    assert found["tags"] == ["dpo_jax", "dpo", "lora"]


@pytest.mark.parametrize("start", ["runs/mine/dpo/hf", "runs/mine/sft/hf"])
def test_head_of_an_adapter_over_other_weights_than_the_hubs(start, tmp_path):
    """An earlier round's, or the sft stage's: over those of the hub it would be another model."""
    text = card(tmp_path, adapter=True, start=start, model__lora__rank=8)
    assert "base_model" not in head(text) and "base_model_relation" not in head(text)
    assert f'from_pretrained("{start}")' in text
    same = card(tmp_path, adapter=True, start="owner/base-7b", model__lora__rank=8)
    assert head(same)["base_model"] == "owner/base-7b"
    # The whole model comes from the hub's, on whatever way.
    whole = head(card(tmp_path, start=start, model__lora__rank=8))
    assert (whole["base_model"], whole["base_model_relation"]) == ("owner/base-7b", "finetune")


@pytest.mark.parametrize(
    "path", ["/data/model", "./model", "runs/mine/sft/hf", "~/model", "", "C:\\model"]
)
def test_head_leaves_out_folders(path, tmp_path):
    """The hub would refuse them: a base_model is a name on it."""
    assert "base_model" not in head(card(tmp_path, model__path=path))


def test_head_leaves_out_a_folder_that_looks_like_a_name(tmp_path, monkeypatch):
    (tmp_path / "owner" / "base-7b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in head(card(tmp_path))


def test_head_leaves_out_the_revision(tmp_path):
    found = head(card(tmp_path, model__path="owner/base-7b@v1.0"))
    assert found["base_model"] == "owner/base-7b"


def test_card_tells_data_recipe_and_results(tmp_path):
    text = card(
        tmp_path,
        ("sft", "dpo"),
        dpo__beta=0.25,
        sft__lr=3e-6,
        data__sft_path="texts.jsonl",
        data__columns="prompt=a|b",
    )
    for told in (
        "# base-7b, Direct Preference Optimization (DPO)",
        "(`dpo` after sft)",
        "| fingerprint of the sft stage's weights | sha256 ffff",
        "| stored in | bfloat16 |",
        "| data.path | org/pairs:subset |",
        "| data.sft_path | texts.jsonl |",
        r"| data.columns | prompt=a\|b |",
        "| examples (train) | 1,200 |",
        f"| fingerprint of the tokens (eval) | sha256 {'b' * 64} |",
        "| dpo.beta | 0.25 |",
        "| sft.lr | 3e-06 |",
        "| loss/eval | 0.512346 |",
    ):
        assert told in text, told
    assert "eval_every" not in text


def test_card_has_what_the_tokens_depend_on(tmp_path):
    text = card(
        tmp_path,
        data__template=dict(enable_thinking=False),
        data__ignore=("images",),
        data__turns="last",
        data__append_eos=False,
        data__max_length=640,
    )
    for told in (
        '| data.template | {"enable_thinking": false} |',
        "| data.ignore | images |",
        "| data.turns | last |",
        "| data.append_eos | False |",
        "| data.max_length | 640 |",
        "| data.eval_fraction | 0.02 |",
        "| date for chat templates | 2026-11-26 |",
    ):
        assert told in text, told
    assert "data.columns" not in text  # empty


def test_card_of_a_mixture(tmp_path):
    mix = "local.jsonl=10, hh@org/helpful=50%, org/pairs:a[train]=5, org/pairs:b"
    text = card(tmp_path, data__path="", data__mix=mix)
    assert head(text)["datasets"] == ["org/helpful", "org/pairs"]
    assert f"| data.mix | {mix} |" in text


def test_card_of_reward_model(tmp_path):
    text = card(tmp_path, ("sft", "rm"), "rm")
    assert head(text)["pipeline_tag"] == "text-classification"
    assert "AutoModelForSequenceClassification" in text and "vllm" not in text


def test_card_of_a_moved_reference(tmp_path):
    told = "against the reference as it had moved by then"
    assert told in card(tmp_path, dpo__reference_every=9) and told not in card(tmp_path)


def test_card_of_random_weights(tmp_path):
    text = card(tmp_path, model__path="", model__scratch={"model_type": "gpt2"})
    assert "| model | random weights |" in text


def test_card_of_policy_does_not_tell_of_its_reward_model(tmp_path):
    """ppo's policy starts from sft; rm trains the reward."""
    text = card(tmp_path, ("sft", "pairs", "rm", "ppo", "evaluate"), "ppo")
    assert "| ppo.target_kl |" in text and "| sft.lr |" in text and "| rm.lr |" not in text
