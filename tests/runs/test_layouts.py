"""Runs that share prompts and responses follow those that lay every response down by itself."""

import functools
import json

import pytest

from configs import toy
from dpo_jax import config as configs
from dpo_jax.data.batches import Batches
from dpo_jax.training import data_feed
from tests.helpers.paths import SHARED, STORIES
from tests.helpers.tiny_runs import on_devices, rows_without_timings, run

STEPS = 20
STORY = "Once upon a time there was a little "
COMPLETIONS = [
    "girl. She liked to play in the park.",
    "dog. He ran and ran.",
    "cat who sat.",
    "red ball. It rolled away down the hill and nobody saw it again.",
]


def toy_config():
    config = toy.get_config()
    config.sft.update(steps=20, eval_every=20, save_every=20)
    config.pairs.prompts = 200
    config.dpo.update(batch_size=48, warmup_steps=2)
    return config


def small_config(path, source: str = "local"):
    config = configs.default(("dpo",))
    config.model.path = str(STORIES)
    config.data.update(path=str(path), source=source, max_length=256, max_prompt_length=128)
    config.dpo.update(batch_size=12, warmup_steps=2)
    return config


def hh_config():
    return small_config(SHARED / "hh-rlhf", "hh")


def stories_config(folder):
    """All six pairs of four completions of each of 40 prompts."""
    rows = []
    for number in range(40):
        prompt = STORY + ("happy " * (number % 7)) + str(number)
        for better in range(4):
            for worse in range(better + 1, 4):
                row = dict(prompt=prompt, chosen=" " + COMPLETIONS[better])
                rows.append(row | dict(rejected=" " + COMPLETIONS[worse]))
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return small_config(path)


def check_sharing(name, readings):
    """Check that one arm shares what its pairs have in common, and that the other shares nothing.

    readings: the tokens that each layout read, as ledger.json has them.
    """
    shared, separate = readings["shared"], readings["separate"]
    assert shared["examples"] == separate["examples"]
    assert shared["tokens_one_at_a_time"] == separate["tokens_one_at_a_time"]
    # A prompt stands before each of its responses, where even a pair alone reads it once.
    assert separate["tokens"] > separate["tokens_one_at_a_time"]
    if name != "hh":  # whose prompts may all be different
        assert shared["tokens"] < 0.9 * shared["tokens_one_at_a_time"]


@pytest.mark.parametrize(
    "name",
    [
        "toy",
        pytest.param("hh", marks=pytest.mark.slow),
        pytest.param("stories260k", marks=pytest.mark.slow),
    ],
)
def test_shared_runs_equal_separate_ones(name, tmp_path, monkeypatch):
    if name == "toy":
        config = toy_config()
    elif name == "stories260k":
        config = stories_config(tmp_path)
    elif (SHARED / "hh-rlhf").exists():
        config = hh_config()
    else:
        pytest.skip("needs ../shared/data/hh-rlhf")
    config.data.order = "prompts"
    config.dpo.update(steps=STEPS, microbatch_size=config.dpo.batch_size // 2)
    config.dpo.update(eval_every=STEPS, save_every=STEPS)
    # SGD, whose updates follow the gradient: RMSprop makes even rounding noise a real step.
    config.dpo.update(optimizer="sgd", lr=0.05 if name == "toy" else 1e-3)
    rows = {}
    readings = {}
    for layout in ("shared", "separate"):
        if layout == "separate":
            separate = functools.partial(Batches, share=False)
            monkeypatch.setattr(data_feed, "Batches", separate)
        with on_devices(2):
            folder = run(config, tmp_path / layout)
        rows[layout] = rows_without_timings(folder)
        readings[layout] = json.loads((folder / "ledger.json").read_text())["reading"]
    check_sharing(name, readings)
    assert len(rows["shared"]) > STEPS
    for shared, separate in zip(rows["shared"], rows["separate"], strict=True):
        assert shared.keys() == separate.keys()
        # Where policy and reference are equal, rounding decides the signs that an accuracy counts.
        is_start = abs(separate.get("rewards_train/margins", 1.0)) < 1e-6
        for metric, value in separate.items():
            if is_start and metric == "rewards_train/accuracies":
                continue
            assert shared[metric] == pytest.approx(value, rel=1e-5, abs=1e-5), metric
