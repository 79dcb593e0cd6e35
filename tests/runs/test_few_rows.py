"""With fewer rows than devices every command works, and finds the same as on one device."""

import json

import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax.pipeline.stages import run_stages
from tests.helpers.rows import write_jsonl
from tests.helpers.tiny_runs import (
    dpo_config,
    on_devices,
    rows_without_timings,
    run,
    sample_file,
    score_file,
    weights,
    write_pairs,
)

DEVICES = (1, 8)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A file of seven pairs."""
    return write_pairs(tmp_path_factory.mktemp("few") / "few.jsonl", count=7)


def test_train_on_few_rows(model, few, tmp_path, capsys):
    fields = dict(steps=3, batch_size=6, microbatch_size=2, data__eval_fraction=0.4)
    found = []
    for devices in DEVICES:
        with on_devices(devices):
            config = dpo_config(model, few, **fields)
            found.append(run(config, tmp_path / str(devices)))
    expected, folder = found
    said = capsys.readouterr().out
    assert "dpo: the 6 rows of an update go to 8 cells (1 x 8, microbatches x data" in said
    assert "so 2 have none and are padded" in said
    for name, value in weights(expected).items():
        np.testing.assert_allclose(weights(folder)[name], value, atol=1e-5)
    rows = rows_without_timings(folder)
    assert "loss/eval" in rows[0] and len(rows) == 4
    for row, other in zip(rows, rows_without_timings(expected), strict=True):
        for name in row:
            np.testing.assert_allclose(row[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_score_and_sample_few_rows(model, few, tmp_path):
    rows = lines(few)[:3]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [dict(prompt=row["prompt"]) for row in rows])
    for devices in DEVICES:
        with on_devices(devices):
            score_file(model, pairs, tmp_path / f"scores{devices}.jsonl", batch_size=2)
            sample_file(model, prompts, tmp_path / f"samples{devices}.jsonl")
    one, eight = (lines(tmp_path / f"scores{devices}.jsonl") for devices in DEVICES)
    for row, other in zip(eight, one, strict=True):
        numbers = [name for name, value in row.items() if isinstance(value, float)]
        assert len(numbers) >= 2
        for name in numbers:
            np.testing.assert_allclose(row[name], other[name], atol=1e-4)
    one, eight = (lines(tmp_path / f"samples{devices}.jsonl") for devices in DEVICES)
    assert len(one) == 3
    for row, other in zip(eight, one, strict=True):
        np.testing.assert_allclose(row.pop("logp"), other.pop("logp"), atol=1e-4)
        assert row == other


def test_pairs_and_evaluation_of_few_prompts(model, few, tmp_path):
    """Sampled, rewarded, trained on and measured."""
    measured = []
    for devices in DEVICES:
        config = configs.default(("pairs", "dpo", "evaluate"))
        config.update(dpo_config(model, few, steps=2, batch_size=3, data__eval_fraction=0.4))
        config.stages = ("pairs", "dpo", "evaluate")
        config.pairs.update(prompts=3, completions=2)
        config.evaluate.prompts = 2
        config.sampling.update(max_new_tokens=4, batch_size=4)
        with on_devices(devices):
            folder = tmp_path / str(devices)
            run_stages(config, str(folder), reward=lambda _, texts: [len(text) for text in texts])
        measured.append(json.loads((folder / "evaluate" / "evaluate.json").read_text()))
    one, eight = measured
    for name in ("frontier/reward", "frontier/kl"):
        np.testing.assert_allclose(eight[name], one[name], atol=1e-4)
