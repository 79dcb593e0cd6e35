"""KTO as a run: whatever the microbatches, the devices and the interruptions, it is one result."""

import json

import numpy as np
import pytest

import dpo_jax
from dpo_jax import config as configs
from dpo_jax.pipeline.run import Run
from dpo_jax.training.metrics import read_rows
from tests.helpers.tiny_runs import (
    on_devices,
    rows_without_timings,
    run,
    sigterm_at,
    tokenizer,
    weights,
    write_pairs,
)

COUNT, BATCH = 96, 16
LENGTHS = dict(max_length=14, max_prompt_length=9)  # all prompts whole, many mismatched rows cut


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A file of unpaired rows, of which the first batch is all desirable."""
    folder = tmp_path_factory.mktemp("labelled")
    pairs = write_pairs(folder / "pairs.jsonl", count=COUNT)
    lines = []
    for number, line in enumerate(pairs.read_text().splitlines()):
        pair = json.loads(line)
        label = number < BATCH or number % 2 == 0
        completion = " " + pair["chosen" if label else "rejected"]
        row = dict(prompt=pair["prompt"], completion=completion, label=label)
        lines.append(json.dumps(row) + "\n")
    pairs.unlink()
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "test.jsonl").write_text("".join(lines[-10:]))
    return folder


def kto_config(model, data, **fields):
    """Return the config of a short run, whose updates follow the gradient."""
    config = configs.default(("kto",))
    config.model.path, config.data.path, config.data.shuffle = str(model), str(data), False
    config.data.update(LENGTHS)
    config.kto.update(
        batch_size=BATCH, steps=6, optimizer="sgd", lr=0.3, warmup_steps=0, eval_every=3
    )
    config.kto.update(save_every=2, desirable_weight=1.5)
    config.update_from_flattened_dict(fields)
    return config


@pytest.fixture(scope="module")
def whole(model, labelled, tmp_path_factory):
    """The run on one device, each batch as one."""
    with on_devices(1):
        return run(kto_config(model, labelled), tmp_path_factory.mktemp("whole"))


def test_first_batch_has_one_kind_alone(whole):
    rows = {row["step"]: row for row in read_rows(whole / "metrics.jsonl")}
    assert rows[0]["loss/eval"] == pytest.approx((1.5 + 1) / 4)  # half the weights
    assert rows[1]["kto_train/desirable"] == 1 and rows[1]["loss/train"] == pytest.approx(0.75)
    assert "rewards_train/rejected" not in rows[1] and "rewards_train/margins" not in rows[1]
    assert rows[2]["kto_train/desirable"] == 0.5
    margin = rows[2]["rewards_train/chosen"] - rows[2]["rewards_train/rejected"]
    assert rows[2]["rewards_train/margins"] == margin
    assert rows[6]["loss/eval"] < rows[0]["loss/eval"] - 0.01
    # At the start policy and reference are equal; then a gradient goes through the KL's term.
    assert rows[1]["kto_train/kl"] == pytest.approx(0, abs=1e-5)
    assert max(row.get("kto_train/kl", 0) for row in rows.values()) > 0.1


def assert_equal_metrics(folder, expected):
    """Compare all rows; rounding alone may differ."""
    found, wanted = rows_without_timings(folder), rows_without_timings(expected)
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        for name, value in other.items():
            np.testing.assert_allclose(row[name], value, rtol=2e-4, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_parts_are_equal_to_the_whole(model, labelled, whole, tmp_path):
    """The KL is of the whole batch, and that of an evaluation of all held-out rows."""
    config = kto_config(model, labelled, **{"kto.microbatch_size": BATCH // 2})
    with on_devices(BATCH // 2):
        folder = run(config, tmp_path)
    assert_equal_metrics(folder, whole)


def test_interrupted_run_resumes_exactly(model, labelled, whole, tmp_path):
    with on_devices(1):
        with sigterm_at(3):
            run(kto_config(model, labelled), tmp_path)
        folder = run(kto_config(model, labelled), tmp_path)
    assert rows_without_timings(folder) == rows_without_timings(whole)
    for name, value in weights(whole).items():
        np.testing.assert_array_equal(weights(folder)[name], value)


@pytest.mark.slow
def test_adapters_start_as_the_reference(model, labelled, tmp_path):
    config = kto_config(model, labelled, **{"model.lora.rank": 2, "kto.lr": 0.03})
    with on_devices(1):
        folder = run(config, tmp_path)
    rows = read_rows(folder / "metrics.jsonl")
    assert rows[0]["kto_eval/kl"] == 0
    assert rows[-1]["rewards_eval/margins"] > 0.01
    assert (folder / "adapter").exists()


@pytest.mark.slow
def test_trainer_makes_the_same_steps(model, labelled, whole):
    lines = (labelled / "train.jsonl").read_text().splitlines()
    with on_devices(1):
        loaded = dpo_jax.load(model)
        rows = loaded.encode(map(json.loads, lines), kind="unpaired", **LENGTHS)
        trainer = dpo_jax.Trainer(
            loaded, "kto", optimizer="sgd", lr=0.3, warmup_steps=0, desirable_weight=1.5
        )
        found = trainer.fit(rows, batch_size=BATCH, steps=6, seed=None)
        wanted = [row for row in read_rows(whole / "metrics.jsonl") if row["step"]]
        for row, other in zip(found, wanted, strict=True):
            for name, value in row.items():
                assert value == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
        held_out = trainer.evaluate(rows[-10:], batch_size=BATCH)
        assert held_out["loss/eval"] == pytest.approx(wanted[-1]["loss/eval"], rel=1e-5)
        with pytest.raises(ValueError, match="sft takes rows without labels"):
            dpo_jax.Trainer(loaded, "sft").step(rows[:4])
        with pytest.raises(ValueError, match="kto takes completions with labels"):
            trainer.step(loaded.encode(map(json.loads, lines[:4]), kind="sft"))


def test_a_held_out_row_alone_is_refused(model, labelled, tmp_path):
    for split, count in (("train", 4), ("test", 1)):
        lines = (labelled / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{split}.jsonl").write_text("".join(lines[:count]))
    config = kto_config(model, tmp_path)
    (tmp_path / "kto").mkdir()
    with pytest.raises(ValueError, match="there is 1 held-out row .*test.jsonl row 1.* at least 2"):
        Run(config, tmp_path, mesh=None).load_data("kto", tokenizer())


def test_pairs_are_read_one_by_one(model, pairs, tmp_path, capsys):
    """Two rows of each pair, whose weights are 1.5 to 1."""
    config = kto_config(model, pairs, **{"data.eval_fraction": 0.2})
    (tmp_path / "kto").mkdir()
    data = Run(config, tmp_path, mesh=None).load_data("kto", tokenizer())
    assert data.train.labels.mean() == 0.5
    said = capsys.readouterr().out
    assert "kto: each pair counts as two rows" in said
    assert "undesirable, which the weights make 1.5 to 1" in said
    assert "config.kto.undesirable_weight between 1.12 and 1.5" in said
