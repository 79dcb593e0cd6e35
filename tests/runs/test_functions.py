"""A reward and a loss of one's own, as functions, through the stages of a run."""

import json
import shutil

import pytest

from configs import toy
from dpo_jax.config import default
from dpo_jax.pipeline.stages import run_stages
from dpo_jax.training.losses import PREFERENCE
from dpo_jax.training.metrics import read_rows
from dpo_jax.workdir import StageChanged, read_lines
from tests.helpers.tiny_runs import dpo_config, on_devices, rows_without_timings, run


def distinct_words(prompts, completions):
    """More distinct words are better."""
    return [len(set(completion.split())) for completion in completions]


def as_many_words(prompts, completions):
    return [1.0] * len(completions)


def short(method: str):
    """The toy, a few steps of each stage."""
    config = toy.get_config(method)
    for stage, fields in dict(
        sft=dict(steps=2, save_every=2, eval_every=2),
        pairs=dict(prompts=40, labels="deterministic"),
        dpo=dict(steps=2, batch_size=32, save_every=2, eval_every=2),
        ppo=dict(steps=1, batch_size=64, minibatch_size=32, save_every=1, eval_every=1),
        evaluate=dict(prompts=8),
    ).items():
        if stage in config.stages:
            config[stage].update(fields)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    with on_devices(1):
        run_stages(short("dpo"), str(folder), reward=distinct_words)
    return folder


def test_reward_function_labels_and_measures(workdir):
    pairs = read_lines(workdir / "pairs" / "pairs.jsonl")
    assert pairs
    for pair in pairs:
        texts = [pair["chosen"], pair["rejected"]]
        assert [pair["reward_chosen"], pair["reward_rejected"]] == distinct_words(None, texts)
        assert pair["reward_chosen"] > pair["reward_rejected"]
    for row in read_lines(workdir / "evaluate" / "completions.jsonl"):
        assert [row["reward"]] == distinct_words(None, [row["completion"]])
    values = json.loads((workdir / "evaluate" / "evaluate.json").read_text())
    assert 1 <= values["frontier/reward"] <= 5
    assert "frontier/reward" in read_rows(workdir / "dpo" / "metrics.jsonl")[-1]


@pytest.mark.parametrize("first", ["sft", "pairs"])
def test_too_few_held_out_prompts_are_refused_before_training(workdir, tmp_path, first):
    if first == "pairs":
        shutil.copytree(workdir / "sft", tmp_path / "sft")
    config = short("dpo")
    config.evaluate.prompts = 100_000
    with (
        on_devices(1),
        pytest.raises(ValueError, match=r"evaluate.prompts = 100000, but there are only \d+ held"),
    ):
        run_stages(config, str(tmp_path), reward=distinct_words)
    assert (tmp_path / "sft" / "checkpoints").exists() == (first == "pairs")
    assert not (tmp_path / "pairs" / "pairs.jsonl").exists()
    assert not (tmp_path / "dpo").exists()


def test_ppo_maximises_reward_function(workdir):
    config = short("ppo_gt")
    config.run = "ppo_f"
    with on_devices(1):
        run_stages(config, str(workdir), reward=distinct_words)
    assert 1 <= read_rows(workdir / "ppo_f" / "metrics.jsonl")[-1]["ppo_train/reward"] <= 5


@pytest.mark.parametrize("reward", [None, as_many_words])
def test_another_reward_is_refused(workdir, reward):
    with on_devices(1), pytest.raises(StageChanged, match="config.reward.* in the folder, .* now"):
        run_stages(short("dpo"), str(workdir), reward=reward)


def one_minus_margin(pairs, beta, _label_smoothing):
    return 1.0 - beta * pairs.margin


@pytest.mark.parametrize("other", [PREFERENCE["ipo"], None])
@pytest.mark.parametrize("is_finished", [True, False])
def test_another_loss_is_refused(model, pairs, tmp_path, other, is_finished):
    """By name, whether the stage is done or would be resumed."""
    config = dpo_config(model, pairs, steps=2)
    done = tmp_path / "dpo" / "done.json"
    with on_devices(1):
        run_stages(config, str(tmp_path), loss=one_minus_margin)
        if not is_finished:
            done.unlink()
        with pytest.raises(StageChanged, match=r"config\.dpo\.loss: 'function:one_minus_margin' i"):
            run_stages(config, str(tmp_path), loss=other)
        run_stages(config, str(tmp_path), loss=one_minus_margin)
    assert done.exists()
    assert config.dpo.loss == "sigmoid"  # the caller's config is left alone


def test_recorded_loss_is_no_value_of_a_config(model, pairs, tmp_path):
    config = dpo_config(model, pairs, steps=2)
    config.dpo.loss = "function:one_minus_margin"
    with pytest.raises(ValueError, match=r"dpo.loss = 'function.*given by dpo_jax.run\(.*loss="):
        run_stages(config, str(tmp_path))


def test_loss_that_no_stage_uses_is_refused(tmp_path):
    config = default(("sft",))
    config.model.path = config.data.path = "PATH"
    with pytest.raises(ValueError, match="has no use for a loss"):
        run_stages(config, str(tmp_path), loss=one_minus_margin)


def test_loss_function(model, pairs, tmp_path):
    """It replaces config.dpo.loss, in training and in evaluation."""
    config = dpo_config(model, pairs, steps=2)
    with on_devices(1):
        for name in ("hinge", "ipo"):
            run_stages(config, str(tmp_path / name), loss=PREFERENCE[name])
        config.dpo.loss = "hinge"
        by_name = run(config, tmp_path / "name")
    rows = rows_without_timings(by_name)
    assert rows_without_timings(tmp_path / "hinge" / "dpo") == rows
    assert rows_without_timings(tmp_path / "ipo" / "dpo")[1]["loss/train"] != rows[1]["loss/train"]
