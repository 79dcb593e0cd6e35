"""Runs whose frozen weights are held in bfloat16: what stays exact, and what is rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_jax import config as configs
from dpo_jax.data import dataset
from dpo_jax.models import loading
from dpo_jax.parallel import sharding
from dpo_jax.planning.program import make_program
from dpo_jax.training.data_feed import DataFeed
from dpo_jax.training.reference_cache import ReferenceCache
from tests.helpers.tiny_runs import (
    dpo_config,
    on_devices,
    rows_without_timings,
    run,
    sigterm_at,
    weights,
    write_model,
)

LOG_2 = np.float32(np.log(2))
RANK = dict(rank=2, alpha=4.0)


def config_of(model, pairs, frozen="bfloat16", dtype="float32", adapters=False, **fields):
    """Six steps of DPO, from weights or with adapters over them."""
    config = dpo_config(model, pairs, data__max_rows=24, **fields)
    config.model.update(dtype=dtype, frozen_dtype=frozen)
    if adapters:
        config.dpo.update(optimizer="adamw", lr=3e-3)
        config.model.lora.update(RANK)
    return config


@pytest.fixture(scope="module")
def base(model):
    """What the run starts from, in float32 on a device."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return loading.open_checkpoint(str(model)), mesh


@pytest.fixture(scope="module")
def with_adapters(model, pairs, tmp_path_factory):
    """A run of adapters that computes in float32, over weights that bfloat16 rounds."""
    with on_devices(1):
        return run(config_of(model, pairs, adapters=True), tmp_path_factory.mktemp("lora"))


@pytest.mark.parametrize("adapters", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_frozen_dtype_moves_no_bit_of_16_bit_products(model, pairs, adapters, tmp_path):
    """Kernels and embeddings are rounded to the compute dtype anyway, norms and biases never."""
    found = {}
    with on_devices(1):
        for frozen in ("float32", "bfloat16"):
            config = config_of(model, pairs, frozen, dtype="bfloat16", adapters=adapters, steps=2)
            found[frozen] = run(config, tmp_path / frozen)
    narrow, wide = found["bfloat16"], found["float32"]
    assert rows_without_timings(narrow) == rows_without_timings(wide)
    file = "adapter/adapter_model.safetensors" if adapters else "hf/model.safetensors"
    expected = load_file(wide / file)
    for name, value in load_file(narrow / file).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.slow
def test_frozen_dtype_moves_no_bit_of_16_bit_models(pairs, tmp_path):
    """The reference holds what is stored: so all is exact that was, in float32 products too."""
    folder = write_model(tmp_path / "model", dtype="bfloat16")
    with on_devices(1):
        wide, narrow = (
            run(config_of(folder, pairs, frozen, steps=2), tmp_path / frozen)
            for frozen in ("float32", "bfloat16")
        )
    assert rows_without_timings(narrow)[1]["loss/train"] == LOG_2
    assert rows_without_timings(narrow) == rows_without_timings(wide)


def test_frozen_base_starts_at_log_2(with_adapters):
    """Policy and reference are over the same base, so its rounding is in both."""
    rows = rows_without_timings(with_adapters)
    assert rows[0]["loss/eval"] == rows[1]["loss/train"] == LOG_2
    assert rows[1]["rewards_train/margins"] == 0
    assert rows[-1]["loss/eval"] < rows[0]["loss/eval"] - 0.01


def test_frozen_base_exports_what_was_trained(with_adapters, base):
    """The merge is in float32, over the base as it was held: nothing else is rounded."""
    checkpoint, mesh = base
    merged = loading.open_checkpoint(str(with_adapters / "hf")).load_params(mesh)
    # The adapter over the source in full: what differs is the rounding of the source.
    full = loading.open_checkpoint(str(with_adapters / "adapter")).load_params(mesh)
    held = checkpoint.load_params(mesh, "bfloat16")

    source = checkpoint.load_params(mesh)
    for of_weight in zip(*map(jax.tree.leaves, (merged, full, held, source)), strict=True):
        found, expected, rounded, stored = (np.asarray(x, np.float32) for x in of_weight)
        np.testing.assert_allclose(found - expected, rounded - stored, atol=1e-6)
        np.testing.assert_allclose(rounded, stored, rtol=2**-8)


def test_frozen_base_resumes_exactly(with_adapters, model, pairs, tmp_path):
    with on_devices(1):
        with sigterm_at(3):
            run(config_of(model, pairs, adapters=True), tmp_path)
        resumed = run(config_of(model, pairs, adapters=True), tmp_path)
    assert rows_without_timings(resumed) == rows_without_timings(with_adapters)
    for name, value in weights(with_adapters).items():
        np.testing.assert_array_equal(weights(resumed)[name], value)


@pytest.mark.slow
def test_frozen_base_is_equal_on_a_mesh(with_adapters, model, pairs, tmp_path):
    config = config_of(model, pairs, adapters=True)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    folder = run(config, tmp_path)
    for row, expected in zip(*map(rows_without_timings, (folder, with_adapters)), strict=True):
        for name in ("loss/train", "rewards_train/margins", "grad_norm"):
            if name in row:
                np.testing.assert_allclose(row[name], expected[name], atol=1e-5, rtol=1e-4)
    for name, value in weights(with_adapters).items():
        np.testing.assert_allclose(weights(folder)[name], value, atol=1e-5)


def test_rounded_reference_is_told_and_kept(model, pairs, tmp_path, capsys):
    """Float32 products of rounded weights: log 2 but for the rounding, and the same if kept."""
    found = {}
    with on_devices(1):
        for cached in (False, True):
            config = config_of(model, pairs, cache_reference=cached, steps=2)
            found[cached] = run(config, tmp_path / f"cached_{cached}")
            text = capsys.readouterr().out
            told = "kept reference = initial" if cached else "but for a reference in bfloat16 (up"
            assert told in text
    live, kept = (rows_without_timings(found[cached]) for cached in (False, True))
    assert 0 < abs(live[1]["loss/train"] - LOG_2) < 5e-3
    for row, expected in zip(kept, live, strict=True):
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, abs=1e-5, rel=1e-4), name


def test_moving_reference_is_as_exact_as_the_policy(model, pairs, tmp_path, monkeypatch):
    """It becomes the policy, so it is held in float32; what the KL of evaluations is to is not."""

    class Checked(Exception):
        pass

    def check_and_stop(self, state):
        raise Checked(check(self, state))

    check = DataFeed.check
    monkeypatch.setattr(DataFeed, "check", check_and_stop)
    config = configs.default(("dpo", "evaluate"))
    config.update(config_of(model, pairs, reference_every=1))
    config.stages = ("dpo", "evaluate")
    config.evaluate.prompts = 8
    with on_devices(1), pytest.raises(Checked) as found:
        run(config, tmp_path, reward=lambda prompts, texts: [len(text) for text in texts])
    assert "log-ratios 0, loss 0.6931 = log 2" in str(found.value)


@pytest.mark.slow
def test_kept_log_probs_have_a_key_of_their_rounding(model, pairs, tmp_path):
    """One of their own for a rounded reference, but where products are of as few bits anyway."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    def key(frozen, dtype):
        checkpoint = loading.open_checkpoint(str(model), dtype=dtype)
        block = config_of(model, pairs).data
        examples = dataset.load(block, checkpoint.tokenizer, "pairs").train
        return ReferenceCache(tmp_path, checkpoint, mesh, 8, frozen).key(examples)

    assert key("float32", "float32") != key("bfloat16", "float32")
    assert key("float32", "bfloat16") == key("bfloat16", "bfloat16")


@pytest.mark.parametrize("adapters", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_plan_counts_frozen_weights_exactly(model, pairs, adapters, tmp_path, monkeypatch):
    """Bytes of what the run hands to its step, on a device of a mesh, are those of the plan."""

    class Found(Exception):
        pass

    def stop(self, state):
        raise Found(self._frozen, state, self._batches)

    monkeypatch.setattr(DataFeed, "check", stop)
    config = config_of(model, pairs, adapters=adapters)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    with pytest.raises(Found) as found:
        run(config, tmp_path)
    frozen, state, batches = found.value.args

    def on_a_device(*trees):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(trees))

    mesh = sharding.make_mesh(2, 2, 2)
    checkpoint = loading.open_checkpoint(str(model))
    planned = make_program(config, "dpo", checkpoint.config, mesh, batches[0]).argument_bytes()
    assert planned["params"] == on_a_device(state.params, frozen.base)
    assert planned["reference"] == on_a_device(frozen.reference)
    assert planned["optimizer"] == on_a_device(state.opt_state)
    held = frozen.base if adapters else frozen.reference
    is_half = [leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(held)]
    assert any(is_half) and not all(is_half)
