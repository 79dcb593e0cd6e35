"""Whole runs on pairs with weights and margins."""

import json

import numpy as np
import pytest

from dpo_jax.workdir import StageChanged
from tests.helpers.rows import write_jsonl
from tests.helpers.tiny_runs import dpo_config, on_devices, rows_without_timings, run, weights


@pytest.fixture
def weighted(pairs, tmp_path):
    """The pairs with weights, of which a few are 0, and margins."""
    rows = []
    for number, line in enumerate(pairs.read_text().splitlines()):
        rows.append(json.loads(line) | dict(votes=number % 4, gap=str(number % 3 - 1)))
    return write_jsonl(tmp_path / "weighted.jsonl", rows)


def test_run_with_weights_and_margins(model, weighted, tmp_path, capsys):
    fields = dict(data__weight="votes", data__margin="gap", data__show=1, steps=2, save_every=1)
    config = dpo_config(model, weighted, **fields)
    folders = []
    for devices, microbatch_size in ((1, 0), (8, 4)):
        config.dpo.microbatch_size = microbatch_size
        with on_devices(devices):
            folders.append(run(config, tmp_path / f"{devices}_{microbatch_size}"))
    assert ", weight " in capsys.readouterr().out
    for folder in folders[1:]:
        for name, value in weights(folders[0]).items():
            np.testing.assert_allclose(weights(folder)[name], value, atol=1e-5)
        both = zip(rows_without_timings(folder), rows_without_timings(folders[0]), strict=True)
        for row, expected in both:
            for name, value in expected.items():
                np.testing.assert_allclose(row[name], value, rtol=2e-4, atol=1e-5, err_msg=name)
    ledger = json.loads((folders[0] / "ledger.json").read_text())
    assert ledger["train"]["weights"]["most"] == 3 and ledger["train"]["margins"]["least"] == -1

    # The tokens stay, and one weight is another: the data has changed.
    lines = weighted.read_text().splitlines()
    weighted.write_text("\n".join([*lines[:-1], lines[-1].replace('"votes": 3', '"votes": 2')]))
    config.dpo.steps = 4
    with on_devices(1), pytest.raises(StageChanged, match="the data of .* has changed"):
        run(config, folders[1].parent)
