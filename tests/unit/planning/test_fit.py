"""Steps that do not fit the devices at hand, told before anything is loaded or compiled."""

import dataclasses
import re

import pytest

from dpo_jax import config_files
from dpo_jax.models import loading
from dpo_jax.parallel import hardware, sharding
from dpo_jax.planning import fit, planner, rehearsal
from tests.helpers.tiny_runs import dpo_config, on_devices, run, scratch_config

GIB = 2**30


@pytest.fixture
def capacity(monkeypatch):
    """Return a function that sets the bytes which a device has."""

    def set_to(size):
        monkeypatch.setattr(hardware, "memory_limit", lambda mesh: size)

    return set_to


def large_config(**fields):
    """Return the config of a run whose weights take far more than its activations."""
    config = scratch_config(batch_size=8, optimizer="rmsprop", **fields)
    config.model.scratch.update(num_hidden_layers=16, hidden_size=512, intermediate_size=2048)
    return config


def check(config):
    fit.check(config, "dpo", planner.model_config(config, "dpo"))


def with_flags(config, message):
    """Return the config with the flags that a message names."""
    changed = config.copy_and_resolve_references()
    flags = re.findall(r"--config\.(\S+?)=(\w+)", message)
    assert flags
    config_files.override(changed, dict(flags))
    return changed


def refusal(config):
    with pytest.raises(ValueError, match="dpo does not fit: weights, gradients") as refused:
        check(config)
    return str(refused.value)


def test_flags_that_are_named_make_it_fit(capacity, capsys):
    """On one device, and on eight; and nothing is said of what fits."""
    with on_devices(1):
        model = planner.model_config(large_config(), "dpo")
        found = fit.estimate(large_config(), "dpo", model, 1)
        # An eighth of it is what a reference of 16 bits saves.
        capacity(int(0.95 * found.least_gib * GIB))
        # In LD-DPO each step needs the reference, so it can only be held in fewer bits.
        config = large_config(ld_alpha=0.5)
        message = refusal(config)
        assert "frozen_dtype=bfloat16" in message and "cache_reference" not in message
        check(with_flags(config, message))
        message = refusal(large_config())
        assert "dpo.cache_reference=True" in message and "frozen_dtype" not in message
        check(with_flags(large_config(), message))
    capacity(int(0.5 * found.least_gib * GIB))
    message = refusal(large_config())
    assert "--config.mesh.data=1 --config.mesh.fsdp=8" in message
    check(with_flags(large_config(), message))
    assert not capsys.readouterr().out


def test_estimate_that_does_not_fit_is_a_warning(capacity, capsys):
    """Arguments and gradients fit; the activations of long rows may not."""
    config = large_config()
    config.model.scratch.max_position_embeddings = 4096
    config.data.update(max_length=4096, max_prompt_length=2048)
    with on_devices(1):
        model = planner.model_config(config, "dpo")
        found = fit.estimate(config, "dpo", model, 1)
        capacity(int((found.least_gib + found.hbm_gib_per_chip) / 2 * GIB))
        check(config)
        text = capsys.readouterr().out
        assert "warning: dpo may not fit" in text and "remat=full" in text
        check(with_flags(config, text))
        assert not capsys.readouterr().out


def test_nothing_helps(capacity):
    capacity(2**20)
    with on_devices(1):
        assert re.search(
            r"Even with --config\.model\.remat.* it takes more or larger devices\.$",
            refusal(large_config()),
        )


def test_initial_weights_beside_a_moving_reference_are_counted():
    config = large_config(reference_every=2)
    config.stages = ("dpo", "evaluate")
    with on_devices(1):
        model = planner.model_config(config, "dpo")
        found = fit.estimate(config, "dpo", model, 1)
        assert found.hbm_gib["initial"] == found.hbm_gib["params"]
        config.stages = ("dpo",)
        alone = fit.estimate(config, "dpo", model, 1)
        assert alone.least_gib == pytest.approx(found.least_gib - found.hbm_gib["initial"])


def test_mesh_that_splits_no_experts_is_refused(capacity):
    capacity(2**40)
    config = large_config()
    config.mesh.update(data=4, expert=2)
    for refuse in (check, lambda config: rehearsal.rehearse(config, "dpo")):
        with pytest.raises(ValueError, match="mesh.expert = 2: this model has no experts"):
            refuse(config)


def test_run_that_does_not_fit_loads_nothing(capacity, model, pairs, tmp_path, monkeypatch):
    opened, loaded = [], []
    open_checkpoint = loading.open_checkpoint

    def without_weights(*arguments, **options):
        opened.append(1)
        checkpoint = open_checkpoint(*arguments, **options)
        return dataclasses.replace(checkpoint, load_params=lambda *_: loaded.append(1))

    monkeypatch.setattr(loading, "open_checkpoint", without_weights)
    capacity(2**10)
    with on_devices(1), pytest.raises(ValueError, match="dpo does not fit: weights, gradients"):
        run(dpo_config(model, pairs), tmp_path)
    assert opened and not loaded and not (tmp_path / "dpo" / "metrics.jsonl").exists()


def test_memory_limit_of_cpus_is_not_told():
    assert hardware.memory_limit(sharding.make_mesh()) is None
