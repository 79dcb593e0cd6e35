"""The Python interface gives the numbers of the commands, bit for bit."""

import json

import jax
import numpy as np
import pytest

import dpo_jax
from dpo_jax.config import default
from dpo_jax.parallel import sharding
from dpo_jax.training.metrics import read_rows
from dpo_jax.workdir import StageChanged
from tests.helpers.tiny_runs import (
    dpo_config,
    on_devices,
    run,
    sample_file,
    score_file,
    weights,
    write_pairs,
)

STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of 20 pairs to train on and 12 to evaluate on."""
    folder = tmp_path_factory.mktemp("data")
    write_pairs(folder / "train.jsonl", count=20)
    write_pairs(folder / "test.jsonl", count=12, seed=1)
    return folder


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def mesh_of(devices: int, **sizes):
    return sharding.make_mesh(**sizes, devices=jax.devices()[:devices])


@pytest.mark.parametrize(
    ("objective", "settings", "lora", "devices", "sizes"),
    [
        # Slow, as these take what the others do: DPO's steps, and the data of pairs.
        pytest.param("dpo", {}, None, 1, {}, marks=pytest.mark.slow),
        pytest.param(
            "dpo",
            dict(loss="ipo", microbatch_size=4, optimizer="adamw"),
            None,
            1,
            {},
            marks=pytest.mark.slow,
        ),
        ("dpo", {}, dict(rank=2), 1, {}),
        ("dpo", dict(microbatch_size=4), None, 4, dict(fsdp=2, tensor=2)),
        ("sft", dict(schedule="cosine"), None, 1, {}),
        pytest.param("unlikelihood", dict(alpha=0.2), None, 1, {}, marks=pytest.mark.slow),
        pytest.param("rm", {}, None, 1, {}, marks=pytest.mark.slow),
    ],
    ids=["dpo", "microbatches", "lora", "mesh", "sft", "unlikelihood", "rm"],
)
def test_trainer_equals_train_command(
    model, data, tmp_path, objective, settings, lora, devices, sizes
):
    """Metrics of each step, the evaluations, and the exported weights."""
    config = dpo_config(model, data)
    if objective != "dpo":
        config = default((objective,))
        config.model.path, config.data.path = str(model), str(data)
    common = dict(optimizer="sgd", lr=0.05, warmup_steps=1) | settings
    config[objective].update(
        steps=STEPS, batch_size=8, eval_every=STEPS, save_every=STEPS, keep_best="", **common
    )
    config.model.lora.update(lora or {})
    config.mesh.update(sizes)
    with on_devices(devices):
        folder = run(config, tmp_path)
    first, *rows = read_rows(folder / "metrics.jsonl")

    loaded = dpo_jax.load(model, mesh=mesh_of(devices, **sizes))
    kind = "sft" if objective == "sft" else "pairs"
    train = loaded.encode(rows_of(data / "train.jsonl"), kind=kind)
    test = loaded.encode(rows_of(data / "test.jsonl"), kind=kind)
    trainer = dpo_jax.Trainer(loaded, objective, lora=lora, steps=STEPS, **common)
    size = settings.get("microbatch_size", 8)
    before = trainer.evaluate(test, batch_size=size)
    found = [trainer.step(batch) for batch in dpo_jax.batches(train, batch_size=8, steps=STEPS)]
    after = trainer.evaluate(test, batch_size=size)
    assert before.items() <= first.items()
    for mine, its in zip(found, rows, strict=True):
        assert mine.items() <= its.items()
    assert after.items() <= rows[-1].items()
    trainer.model.save(tmp_path / "mine" / "hf")
    for name, value in weights(folder).items():
        np.testing.assert_array_equal(weights(tmp_path / "mine")[name], value, err_msg=name)


def test_log_probs_equal_score_command(model, data, tmp_path):
    score_file(model, data / "train.jsonl", tmp_path / "scores.jsonl")
    scores = rows_of(tmp_path / "scores.jsonl")
    loaded = dpo_jax.load(model)
    pairs = loaded.encode(rows_of(data / "train.jsonl"))
    chosen, rejected = loaded.log_probs(pairs, batch_size=4)
    assert [row["logp_chosen"] for row in scores] == chosen.tolist()
    assert [row["logp_rejected"] for row in scores] == rejected.tolist()


@pytest.mark.parametrize("n", [1, 3])
def test_generate_equals_sample_command(model, data, tmp_path, n):
    settings = dict(max_new_tokens=6, temperature=0.9, n=n, seed=3, batch_size=8)
    sample_file(model, data / "train.jsonl", tmp_path / "samples.jsonl", **settings)
    sampled = rows_of(tmp_path / "samples.jsonl")
    prompts = [row["prompt"] for row in sampled]
    texts = dpo_jax.load(model).generate(prompts, **settings)
    assert texts == [row["completion" if n == 1 else "completions"] for row in sampled]


def count_w30(prompts, completions):
    """How often a completion says w30."""
    return [text.split().count("w30") for text in completions]


def test_a_reward_of_your_own(model, data, tmp_path, capfd):
    """It labels the pairs, is what PPO maximises, and what evaluate reports; all is silent."""
    config = default(("pairs", "ppo", "evaluate"))
    config.model.path, config.data.path = str(model), str(data)
    config.sampling.update(max_new_tokens=6, batch_size=32)
    config.pairs.update(prompts=8)
    config.ppo.update(
        reward="true", steps=2, batch_size=16, minibatch_size=8, eval_every=2, inner_epochs=1
    )
    config.evaluate.update(prompts=8)
    folders = dpo_jax.run(config, tmp_path, reward=count_w30)
    assert capfd.readouterr() == ("", "")
    pairs = rows_of(folders["pairs"] / "pairs.jsonl")
    assert pairs
    for pair in pairs:
        assert pair["reward_chosen"] == pair["chosen"].split().count("w30")
        assert pair["reward_chosen"] > pair["reward_rejected"]
    evaluated = rows_of(folders["evaluate"] / "completions.jsonl")
    for row in evaluated:
        assert row["reward"] == row["completion"].split().count("w30")
    with pytest.raises(StageChanged, match="config.reward"):
        dpo_jax.run(config, tmp_path, reward=lambda prompts, completions: [0.0] * len(prompts))
    assert config.reward.kind == "classifier"  # the caller's config is left alone


def test_a_reward_that_nothing_asks_for_is_refused(tmp_path):
    config = default(("dpo",))
    config.model.path = config.data.path = "PATH"
    with pytest.raises(ValueError, match="has no use for a reward"):
        dpo_jax.run(config, tmp_path, reward=count_w30)
