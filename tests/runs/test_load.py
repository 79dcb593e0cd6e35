"""Load in small: the measurements of tests/faults/load.py, and a run with many saves."""

import os
import threading

import pytest

from tests.faults import load
from tests.helpers import tiny_runs


@pytest.mark.parametrize("measure, count", [(load.judged, 300), (load.rows, 2000), (load.runs, 20)])
def test_measurement_holds(measure, count, tmp_path):
    result = measure(tmp_path, count)
    assert result.is_good, result


@pytest.mark.parametrize("field", ["memory_mib", "open_files", "files"])
def test_result_of_steps_finds_growth(field):
    samples = [load.Sample(step, 500 + step % 3, 12, 40) for step in range(0, 1000, 10)]
    flat = load.result_of_steps(1000, samples, 60.0, 0)
    assert flat.is_good and "open files: 12 to 12 early, 12 to 12 late" in flat.measured
    grown = []
    for sample in samples:
        numbers = vars(sample) | {field: getattr(sample, field) + sample.step // 5}
        grown.append(load.Sample(**numbers))
    assert not load.result_of_steps(1000, grown, 60.0, 0).is_good
    assert not load.result_of_steps(1000, samples, 60.0, 1).is_good  # the run's exit status
    assert not load.result_of_steps(1000, samples[:50], 60.0, 0).is_good


def test_long_run_leaves_nothing_open(tmp_path):
    """Twice as many steps, evaluations and saves: as many files in WORKDIR, open files, threads."""
    model = tiny_runs.write_model(tmp_path / "model")
    pairs = tiny_runs.write_pairs(tmp_path / "pairs.jsonl")
    left = []
    for steps in (12, 12, 24):
        workdir = tmp_path / f"run{len(left)}"
        config = tiny_runs.dpo_config(model, pairs, steps=steps, eval_every=2, save_every=1)
        config.log.tensorboard = True
        tiny_runs.run(config, workdir)
        files = sum(len(names) for _, _, names in os.walk(workdir))
        left.append((files, len(os.listdir("/proc/self/fd")), threading.active_count()))
    # The first run opens what stays open for all.
    assert left[2][0] == left[1][0]
    assert left[2][1] <= left[1][1] + 3 and left[2][2] <= left[1][2] + 3, left
