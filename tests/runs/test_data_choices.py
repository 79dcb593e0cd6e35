"""Whole runs on data chosen in other ways: nothing held out, and mixtures of sets."""

import json

import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax.data import dataset
from dpo_jax.training.metric_names import is_evaluation
from tests.helpers.rows import write_jsonl
from tests.helpers.tiny_runs import (
    dpo_config,
    on_devices,
    rows_without_timings,
    run,
    score_file,
    tokenizer,
    write_pairs,
)


@pytest.mark.parametrize(
    "stages",
    [
        ("sft",),
        ("dpo",),
        ("rm", "ppo"),
        pytest.param(("preferred_ft",), marks=pytest.mark.slow),
        pytest.param(("unlikelihood",), marks=pytest.mark.slow),
    ],
    ids="_".join,
)
def test_training_without_held_out_rows(model, pairs, tmp_path, stages, capsys):
    config = configs.default(stages)
    config.model.path, config.data.path = str(model), str(pairs)
    config.data.eval_fraction = 0.0
    for stage in stages:
        config[stage].update(batch_size=8, steps=2, warmup_steps=0, eval_every=1, save_every=2)
    if "ppo" in stages:
        config.ppo.minibatch_size = 8
        config.reward.update(kind="rm", path="")
        config.sampling.max_new_tokens = 4
    if "dpo" in stages:
        config.dpo.update(keep_best="loss/eval", patience=3)
    with on_devices(1):
        folder = run(config, tmp_path)
    told = " ".join(capsys.readouterr().out.split())
    assert ("and config.dpo.patience = 3 never ends the stage" in told) == ("dpo" in stages)
    rows = rows_without_timings(folder)
    assert [row["step"] for row in rows][-1] == 2
    assert not any(is_evaluation(name) for row in rows for name in row)
    ledger = json.loads((folder / "ledger.json").read_text())
    if "train" in ledger:  # of rows, not of prompts alone
        assert ledger["train"]["kept"] == ledger["train"]["read"] == 60
        assert ledger["eval"]["kept"] == ledger["train"]["held_out"] == 0


def test_run_on_mixture(model, pairs, tmp_path):
    other = write_pairs(tmp_path / "other.jsonl", seed=1)
    config = dpo_config(model, "", data__mix=f"{pairs}=20, {other}=50%", steps=4)
    # Four devices, whose last batch of an evaluation has fillers.
    with on_devices(4):
        folder = run(config, tmp_path / "run")
    ledger = json.loads((folder / "ledger.json").read_text())
    parts = [ledger["parts"][name] for name in (str(pairs), str(other))]
    assert parts[0]["train"]["kept"] == 20 and 10 < parts[1]["train"]["kept"] < 40
    kept = sum(part["train"]["kept"] for part in parts)
    assert ledger["train"]["kept"] == kept and ledger["shared_prompts"] == 0
    assert rows_without_timings(folder)[0]["loss/eval"] == pytest.approx(0.6931, abs=1e-4)
    # Each set is a subset, and they add up to the whole.
    last = rows_without_timings(folder)[-1]
    subsets = ledger["eval"]["subsets"]
    assert set(subsets) == {"pairs", "other"} and sum(subsets.values()) == ledger["eval"]["kept"]
    for name in ("loss/eval", "rewards_eval/accuracies", "rewards_eval/margins"):
        of_subsets = sum(last[f"{name}/{subset}"] * count for subset, count in subsets.items())
        assert of_subsets == pytest.approx(last[name] * ledger["eval"]["kept"], rel=1e-4)
    assert 0 <= last["rewards_eval/accuracies_se"] < 0.6

    # The rows of one set alone, read from its file and scored by the command.
    assert ledger["eval"]["kept"] % 4
    held_out = dataset.load(config.data, tokenizer(), "pairs").eval
    lines = other.read_text().splitlines()
    own = [where for where in held_out.where if where.startswith(str(other))]
    assert len(own) == subsets["other"]
    rows = [json.loads(lines[int(where.split()[-1]) - 1]) for where in own]
    alone = write_jsonl(tmp_path / "alone.jsonl", rows)
    scores = tmp_path / "scores.jsonl"
    with on_devices(1):
        score_file(folder / "hf", alone, scores, reference=str(model), beta=config.dpo.beta)
    scored = [json.loads(line) for line in scores.read_text().splitlines()]
    margins = np.array([row["implicit_margin"] for row in scored])
    assert last["rewards_eval/margins/other"] == pytest.approx(margins.mean(), abs=1e-5)
    assert last["rewards_eval/accuracies/other"] == pytest.approx((margins > 0).mean())
    assert last["loss/eval/other"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-5)
    # Far from the other set's, so that a row of the wrong set would show.
    assert abs(last["rewards_eval/margins/other"] - last["rewards_eval/margins/pairs"]) > 1e-3
