"""A run whose true reward is a classifier that others trained, with a tokenizer of its own."""

import json

import pytest

from dpo_jax import config as configs
from dpo_jax.pipeline.stages import run_stages
from tests.helpers import tiny_reward_models
from tests.helpers.tiny_runs import write_model

torch = pytest.importorskip("torch", reason="the independent reference is transformers with torch")

TEMPLATE = (
    "{% for message in messages %}{{ message.role + ' ' + message.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def test_pairs_by_classifier(tmp_path):
    """The policy's samples are read as conversations, by the messages that the rows hold."""
    policy = write_model(tmp_path / "policy", chat_template=TEMPLATE)
    folder, model = tiny_reward_models.write(tmp_path / "reward", "qwen2")
    rows = []
    for number in range(8):
        messages = [
            dict(role="user", content=f"w{number} w{number + 1}"),
            dict(role="assistant", content="w9 w8"),
        ]
        rows.append(json.dumps(dict(messages=messages)) + "\n")
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(rows))
    config = configs.default(("pairs",))
    config.model.path, config.data.path = str(policy), str(data)
    config.data.update(eval_fraction=0.3, max_length=32, max_prompt_length=16)
    config.reward.update(kind="model", path=str(folder), batch_size=8)
    config.sampling.update(max_new_tokens=6, batch_size=16)
    config.pairs.update(prompts=4, completions=3, choose="best_worst")
    run_stages(config, str(tmp_path / "run"))

    words = tiny_reward_models.tokenizer("qwen2")
    made = (tmp_path / "run" / "pairs" / "completions.jsonl").read_text().splitlines()
    count = 0
    for line in made:
        row = json.loads(line)
        # The policy knows forty words, and a role is none of them.
        asked = dict(role="user", content=row["prompt"].strip())
        for completion in row["completions"]:
            answer = dict(role="assistant", content=completion["text"])
            ids = words.apply_chat_template([asked, answer], tokenize=True).input_ids
            with torch.no_grad():
                expected = model(torch.tensor([ids])).logits.item()
            assert completion["reward"] == pytest.approx(expected, abs=1e-4)
            count += 1
    assert count >= 15
    pairs = [
        json.loads(line)
        for line in (tmp_path / "run" / "pairs" / "pairs.jsonl").read_text().splitlines()
    ]
    assert 1 <= len(pairs) <= 4
    assert all(pair["reward_chosen"] > pair["reward_rejected"] for pair in pairs)
