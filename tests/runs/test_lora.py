"""Runs that train adapters: what is trained, kept and exported, and on which mesh."""

import functools
import json
import re
import signal

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_jax.data import dataset
from dpo_jax.models import hf, inference, loading
from dpo_jax.parallel import sharding
from dpo_jax.training import data_feed, metrics
from dpo_jax.training.loop import Interrupted
from dpo_jax.workdir import StageChanged
from tests.helpers.tiny_runs import (
    MAKE_MESH,
    dpo_config,
    on_devices,
    rows_without_timings,
    run,
    weights,
    write_model,
)


def lora_config(model, pairs, **fields):
    """Six steps of DPO, twice on the same 24 rows; `fields` are of model.lora."""
    config = dpo_config(
        model, pairs, optimizer="adamw", lr=3e-3, data__shuffle=False, data__max_rows=24
    )
    config.model.lora.update(dict(rank=2, alpha=4.0, targets=("q", "v", "down")) | fields)
    return config


@pytest.fixture(scope="module")
def whole(model, pairs, tmp_path_factory):
    """An uninterrupted run on one device."""
    with on_devices(1):
        return run(lora_config(model, pairs), tmp_path_factory.mktemp("whole"))


def test_lora_starts_at_log_2_and_learns(whole):
    rows = rows_without_timings(whole)
    assert rows[0]["loss/eval"] == rows[1]["loss/train"] == np.float32(np.log(2))
    assert rows[1]["rewards_train/margins"] == 0
    assert (
        rows[-1]["loss/eval"] < rows[0]["loss/eval"] - 0.01
        and rows[-1]["rewards_eval/margins"] > 0.01
    )


def test_lora_trains_only_adapters(whole, model):
    saved = json.loads(next((whole / "checkpoints").glob("6/**/_METADATA")).read_text())[
        "tree_metadata"
    ]
    names = {name.split("'")[-2] for name in saved if "'params'" in name}
    assert names == {"lora_a", "lora_b"}
    before, after = load_file(model / "model.safetensors"), weights(whole)
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {name for name in before if re.search("[qv]_proj|down_proj", name)}


def test_lora_exports_what_was_evaluated(whole, model, pairs):
    """hf/ holds the merged weights: a plain model, as `score`, `sample` and the next stage read
    it.
    """
    merged, mesh = (
        loading.open_checkpoint(str(whole / "hf")),
        sharding.make_mesh(devices=jax.devices()[:1]),
    )
    held_out = dataset.load(lora_config(model, pairs).data, merged.tokenizer, "pairs").eval
    log_probs = inference.log_probs("score", merged.load(mesh), held_out, 8)
    last = rows_without_timings(whole)[-1]
    np.testing.assert_allclose(
        log_probs.mean(axis=0), [last["logps_eval/chosen"], last["logps_eval/rejected"]], atol=1e-4
    )


def test_lora_next_run_starts_merged(whole, pairs, tmp_path, capsys):
    with on_devices(1):
        following = run(lora_config(whole / "hf", pairs, alpha=8.0, init="a_zero"), tmp_path)
    assert rows_without_timings(following)[0]["logps_eval/chosen"] == pytest.approx(
        rows_without_timings(whole)[-1]["logps_eval/chosen"], abs=1e-3
    )
    assert rows_without_timings(following)[1]["loss/train"] == np.float32(np.log(2))
    record = json.loads((following / "weights.json").read_text())
    base = record["base"]
    assert (
        record["reference"]
        == base
        == dict(path=str(whole / "hf"), fingerprint=hf.fingerprint(whole / "hf"))
    )
    assert f"of {whole / 'hf'} (sha256 {base['fingerprint'][:16]})" in capsys.readouterr().out
    adapter = json.loads((following / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == base["path"]
    stored = load_file(following / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 2 * 3 * 2  # both factors of three layers in two blocks


def test_lora_resumes_exactly(whole, pairs, tmp_path, monkeypatch):
    write, folder = metrics.Writer.write, write_model(tmp_path / "model")

    def stop(self, step, values):
        write(self, step, values)
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    with on_devices(1):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(metrics.Writer, "write", stop)
            run(lora_config(folder, pairs), tmp_path)
        write_model(folder, scale=5)
        with pytest.raises(StageChanged, match=f"config.model.path: '{folder}' .it does not hold"):
            run(lora_config(folder, pairs), tmp_path)
        write_model(folder)
        resumed = run(lora_config(folder, pairs), tmp_path)
    assert rows_without_timings(resumed) == rows_without_timings(whole)
    for name, value in weights(whole).items():
        np.testing.assert_array_equal(weights(resumed)[name], value)


@pytest.fixture(scope="module")
def of_inits(whole, model, pairs, tmp_path_factory):
    """The run on one device from each initialisation."""
    folder = tmp_path_factory.mktemp("a_zero")
    with on_devices(1):
        return dict(b_zero=whole, a_zero=run(lora_config(model, pairs, init="a_zero"), folder))


@pytest.mark.parametrize("sizes", [dict(data=1, fsdp=2, tensor=2), dict(data=4)], ids=str)
@pytest.mark.parametrize(
    "order",
    [
        (2, 0, 3, 1),
        pytest.param((0, 1, 2, 3), marks=pytest.mark.slow),
        pytest.param((3, 1, 0, 2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_lora_is_equal_on_meshes(of_inits, model, pairs, sizes, order, tmp_path, monkeypatch):
    """Nor on their order; with Adam, which makes a whole step even of a gradient that is rounding
    noise.
    """
    devices = [jax.devices()[number] for number in order]
    monkeypatch.setattr(sharding, "make_mesh", functools.partial(MAKE_MESH, devices=devices))
    # Their programs take long to compile.
    for name, found in dict(check="not checked", evaluate={}).items():
        monkeypatch.setattr(data_feed.DataFeed, name, lambda *_, found=found: found)
    for init, alone in of_inits.items():
        config = lora_config(model, pairs, init=init)
        config.mesh.update(sizes)
        folder = run(config, tmp_path / init)
        for row, expected in zip(
            rows_without_timings(folder)[1:], rows_without_timings(alone)[1:], strict=True
        ):
            for name in ("loss/train", "rewards_train/margins", "grad_norm", "update_norm"):
                np.testing.assert_allclose(
                    row[name], expected[name], atol=1e-5, rtol=1e-4, err_msg=name
                )
        for name, value in weights(alone).items():
            np.testing.assert_allclose(weights(folder)[name], value, atol=1e-5)
