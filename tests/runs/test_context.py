"""Runs whose rows are split over the devices of mesh.context equal those on one device."""

import numpy as np
import pytest

from tests.helpers.tiny_runs import (
    dpo_config,
    on_devices,
    rows_without_timings,
    run,
    sigterm_at,
    weights,
)


@pytest.fixture(scope="module")
def config(model, pairs):
    return dpo_config(model, pairs, data__max_rows=24, steps=4, cache_reference=True)


@pytest.fixture(scope="module")
def of_one_device(config, tmp_path_factory):
    with on_devices(1):
        return run(config, tmp_path_factory.mktemp("one"))


def with_context(config):
    changed = config.copy_and_resolve_references()
    changed.mesh.update(data=1, fsdp=2, context=4)
    return changed


def check(folder, expected):
    for row, wanted in zip(*map(rows_without_timings, (folder, expected)), strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(row[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    for name, value in weights(expected).items():
        np.testing.assert_allclose(weights(folder)[name], value, atol=1e-5, err_msg=name)


def test_run_with_kept_log_probs_is_equal(config, of_one_device, tmp_path):
    check(run(with_context(config), tmp_path), of_one_device)


@pytest.mark.slow
def test_run_resumes_with_context(config, of_one_device, tmp_path, capsys):
    with on_devices(1), sigterm_at(1):
        run(config, tmp_path)
    folder = run(with_context(config), tmp_path)
    assert "resuming after step 2" in capsys.readouterr().out
    check(folder, of_one_device)
