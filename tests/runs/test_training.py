"""Whole DPO and SFT runs on a tiny model: learning, rows, reuse, refusal, stopping."""

import dataclasses
import json
import re
import signal
import threading

import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax import report
from dpo_jax.data import batches, tokenizer
from dpo_jax.models import log_probs
from dpo_jax.parallel import sharding
from dpo_jax.pipeline import run as pipeline_run
from dpo_jax.training import loop, metric_names, metrics
from dpo_jax.training.checkpoint import Checkpoints
from dpo_jax.training.loop import Interrupted
from dpo_jax.training.metrics import read_rows
from dpo_jax.workdir import StageChanged, lock_folder, read_done
from tests.helpers.rows import change_record
from tests.helpers.tiny_runs import (
    dpo_config,
    on_devices,
    rows_without_timings,
    run,
    weights,
    write_model,
    write_pairs,
)


@pytest.fixture(scope="module")
def whole(model, pairs, tmp_path_factory):
    """An uninterrupted run over 8 devices: (config, folder)."""
    config = dpo_config(model, pairs)
    return config, run(config, tmp_path_factory.mktemp("whole"))


def test_run_leaves_its_files(whole):
    _, folder = whole
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json",
        "ledger.json",
        "metrics.jsonl",
        "checkpoints",
        "hf",
        "done.json",
    }
    rows = rows_without_timings(folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert {
        "loss/train",
        "rewards_train/chosen",
        "rewards_train/rejected",
        "rewards_train/accuracies",
        "rewards_train/margins",
        "logps_train/chosen",
        "logps_train/rejected",
        "lengths_train/chosen",
        "grad_norm",
        "param_norm",
        "update_norm",
        "lr",
        "counters/examples",
        "counters/updates",
    } <= rows[1].keys()
    assert {"loss/eval", "rewards_eval/accuracies", "logps_eval/chosen"} <= rows[0].keys() & rows[
        3
    ].keys()
    assert "loss/eval" not in rows[1]
    assert rows[6]["counters/examples"] == 48
    for name in set().union(*read_rows(folder / "metrics.jsonl")) - {"step"}:
        assert metric_names.describe(name).meaning
    assert all(
        0 < row["model_flops_utilization"] < 1 for row in read_rows(folder / "metrics.jsonl")[1:]
    )


def test_dpo_starts_at_log_2_and_learns(whole):
    _, folder = whole
    rows = rows_without_timings(folder)
    assert abs(rows[0]["loss/eval"] - np.log(2)) < 1e-6
    assert rows[0]["rewards_eval/accuracies"] == 0  # a tie is no success
    assert rows[6]["loss/eval"] < rows[0]["loss/eval"] - 0.01
    assert rows[6]["rewards_eval/margins"] > 0.01


def test_finished_run_is_reused(whole, capsys):
    config, folder = whole
    before = (folder / "done.json").read_text()
    run(config, folder.parent)
    assert "dpo: already done" in capsys.readouterr().out
    assert (folder / "done.json").read_text() == before


@pytest.mark.parametrize(
    "field, value",
    [("beta", 0.5), ("steps", 5), ("data__max_prompt_length", 40), ("model__dtype", "bfloat16")],
)
def test_changed_config_is_refused(whole, field, value):
    config, folder = whole
    changed = config.copy_and_resolve_references()
    block, _, name = field.rpartition("__")
    changed[block or "dpo"][name] = value
    with pytest.raises(StageChanged) as error:
        run(changed, folder.parent)
    text = str(error.value)
    assert (
        re.search(rf"config\.{block or 'dpo'}\.{name}: .* in the folder, .*{value}.* now", text)
        and "--config.run=" in text
    )


def test_newer_field_counts_as_default(whole):
    config, folder = whole
    path = folder / "config.json"
    written = change_record(path, lambda record: record["depends_on"].pop("data.truncate"))
    run(config, folder.parent)
    changed = config.copy_and_resolve_references()
    changed.data.truncate = "keep_end"
    with pytest.raises(
        StageChanged, match="config.data.truncate: 'auto' in the folder, 'keep_end' now"
    ):
        run(changed, folder.parent)
    change_record(path, lambda record: record.update(written))


def test_harmless_field_may_change(whole):
    config, folder = whole
    changed = config.copy_and_resolve_references()
    changed.dpo.save_every, changed.data.show, changed.mesh.fsdp, changed.log.wandb = (
        100,
        2,
        2,
        "project",
    )
    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    run(changed, folder.parent)
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before, "the finished run is reused"


def test_profile_changes_no_result(whole, model, pairs, tmp_path):
    """Steps 5 and 6 are traced, as there is no seventh; a finished stage takes any log.profile."""
    config, folder = whole
    traced = config.copy_and_resolve_references()
    traced.log.profile = 5
    there = run(traced, tmp_path)
    assert rows_without_timings(there) == rows_without_timings(folder)
    # By jax, and named after the time and the host.
    (trace,) = (there / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
    recorded = read_done(there)["files"]
    assert "metrics.jsonl" in recorded
    assert not any(name.startswith("profile/") for name in recorded)
    assert recorded["hf/model.safetensors"] == read_done(folder)["files"]["hf/model.safetensors"]


def test_run_name_shares_workdir(whole, model, pairs):
    config, folder = whole
    swept = config.copy_and_resolve_references()
    swept.run, swept.dpo.beta = "beta05", 0.5
    other = run(swept, folder.parent)
    assert other == folder.parent / "beta05"
    assert (
        rows_without_timings(other)[6]["loss/eval"] != rows_without_timings(folder)[6]["loss/eval"]
    )


@pytest.mark.parametrize("mesh", [dict(data=1), dict(data=2, fsdp=2, tensor=2)])
def test_dpo_is_equal_on_meshes(whole, model, pairs, tmp_path, mesh):
    with on_devices(np.prod(list(mesh.values()))):
        folder = run(
            dpo_config(model, pairs, **{f"mesh__{k}": v for k, v in mesh.items()}), tmp_path
        )
    expected = rows_without_timings(whole[1])
    for row, other in zip(rows_without_timings(folder), expected, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            np.testing.assert_allclose(row[name], other[name], rtol=1e-3, atol=1e-5, err_msg=name)
    for name, value in weights(folder).items():
        np.testing.assert_allclose(value, weights(whole[1])[name], atol=1e-5)


def test_sft_learns(model, pairs, tmp_path):
    config = configs.default(("sft",))
    config.model.path, config.data.path = str(model), str(pairs)
    config.sft.update(
        batch_size=8, steps=4, lr=1e-3, warmup_steps=0, optimizer="adamw", eval_every=4
    )
    rows = rows_without_timings(run(config, tmp_path))
    assert rows[-1]["nll_per_token/eval"] < rows[0]["nll_per_token/eval"] - 0.05
    assert rows[1]["loss/train"] == pytest.approx(-rows[1]["logps_train/chosen"])


def test_changed_data_is_refused(model, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    folder = run(dpo_config(model, pairs, steps=2), tmp_path / "run")
    (folder / "done.json").unlink()
    write_pairs(tmp_path / "pairs.jsonl", seed=1)
    with pytest.raises(StageChanged, match="data .* has changed since the stage began"):
        run(dpo_config(model, pairs, steps=2), tmp_path / "run")


@pytest.mark.parametrize("cached", [False, True])
def test_changed_reference_is_refused(pairs, tmp_path, cached, monkeypatch):
    """Even where only the reference would be read again: the policy goes on from its checkpoint."""
    # As of a name on the hub, whose files are not looked into when the stage begins.
    monkeypatch.setattr("dpo_jax.workdir.contents_of", lambda *_: "")
    model = write_model(tmp_path / "model")
    config = dpo_config(model, pairs, steps=2, cache_reference=cached)
    with on_devices(1):
        folder = run(config, tmp_path / "run")
        assert json.loads((folder / "weights.json").read_text())["reference"]["path"] == str(model)
        (folder / "done.json").unlink()
        write_model(model, scale=5)
        with pytest.raises(
            StageChanged, match=f"the weights at {model} have changed since .*as its reference"
        ):
            run(config, tmp_path / "run")
        write_model(model)
        run(config, tmp_path / "run")


def test_run_of_other_version_is_refused(model, pairs, tmp_path, monkeypatch):
    config = dpo_config(model, pairs, steps=2)
    homes = dict(
        tokenization=(tokenizer, "TOKENIZATION_VERSION"),
        data_order=(batches, "DATA_ORDER_VERSION"),
        forward=(log_probs, "FORWARD_VERSION"),
        checkpoint=(pipeline_run, "CHECKPOINT_VERSION"),
    )
    with on_devices(1):
        folder = run(config, tmp_path)
        versions = json.loads((folder / "config.json").read_text())["versions"]
        assert versions == {name: getattr(*home) for name, home in homes.items()}
        done = (folder / "done.json").read_text()
        for name, (module, constant) in homes.items():
            with monkeypatch.context() as patch:
                patch.setattr(module, constant, versions[name] + 1)
                (folder / "done.json").write_text(done)
                run(config, tmp_path)
                (folder / "done.json").unlink()
                found = f"{name} {versions[name]} in the folder, {versions[name] + 1} now"
                with pytest.raises(StageChanged, match=found):
                    run(config, tmp_path)


def test_failed_attempt_binds_nobody(model, pairs, tmp_path):
    with pytest.raises(FileNotFoundError, match="nope.jsonl"):
        run(dpo_config(model, "nope.jsonl", steps=1), tmp_path)
    with pytest.raises(ValueError, match="expected a metric of the evaluation"):
        run(dpo_config(model, pairs, steps=1, keep_best="kto_eval/kl"), tmp_path)
    (tmp_path / "dpo" / "config.draft").write_text("killed while writing")
    run(dpo_config(model, pairs, steps=1), tmp_path)


def test_other_tokens_and_lengths_are_refused(model, pairs, tmp_path):
    config = dpo_config("", pairs, model__tokenizer=str(model))
    config.model.scratch = dict(
        model_type="gpt2", vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=64
    )
    with pytest.raises(
        ValueError,
        match=r"pairs.jsonl row \d+ has token \d+, but the model's vocabulary ends at 19",
    ):
        run(config, tmp_path / "words")
    config.model.scratch.update(vocab_size=40, n_positions=8)
    with pytest.raises(
        ValueError, match=r"pairs.jsonl row \d+ has \d+ tokens, but the model has 8 positions"
    ):
        run(config, tmp_path / "positions")


def test_nan_loss_stops_run(model, pairs, tmp_path):
    config = dpo_config(
        model, pairs, lr=1e12, max_grad_norm=0.0, optimizer="sgd", save_every=1, warmup_steps=0
    )
    with pytest.raises(FloatingPointError) as error:
        run(config, tmp_path)
    text = str(error.value)
    step = int(re.search(r"dpo stopped at step (\d+)", text)[1])
    assert text.count("pairs.jsonl row") == 3 and " and 5 more. " in text
    with Checkpoints(tmp_path / "dpo" / "checkpoints", keep=1) as saved:
        assert (saved.latest() or 0) == step - 1
    assert not (tmp_path / "dpo" / "done.json").exists()


def test_overflowing_update_is_not_saved(model, pairs, tmp_path):
    """Loss and gradient of the step are finite; the weights after it are not."""
    with pytest.raises(FloatingPointError, match="step 1: param_norm is (inf|nan)"):
        run(dpo_config(model, pairs, lr=1e38, max_grad_norm=0.0, warmup_steps=0, steps=1), tmp_path)
    assert not (tmp_path / "dpo" / "done.json").exists() and not (tmp_path / "dpo" / "hf").exists()
    report.write([tmp_path], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert re.search(r"dpo stopped at step 1: param_norm is (inf|nan), on the batch of", text)
    # The next attempt ends otherwise.
    run(dpo_config(model, pairs, steps=1), tmp_path)
    report.write([tmp_path], tmp_path / "report.html")
    assert "param_norm is" not in (tmp_path / "report.html").read_text()


def test_keep_best_exports_best(model, pairs, tmp_path):
    config = dpo_config(
        model,
        pairs,
        steps=8,
        eval_every=2,
        save_every=8,
        keep_best="loss/eval",
        lr=3.0,
        warmup_steps=0,
        max_grad_norm=0.0,
    )
    folder = run(config, tmp_path)
    losses = {
        row["step"]: row["loss/eval"]
        for row in read_rows(folder / "metrics.jsonl")
        if "loss/eval" in row and row["step"]
    }
    with Checkpoints(folder / "checkpoints", keep=1, best_metric="loss/eval") as saved:
        best, value = saved.best()
        assert best == min(losses, key=losses.get) and value == losses[best]
        assert saved.latest() == 8
    assert json.loads((folder / "done.json").read_text())["evaluation"]["loss/eval"] == losses[best]


@pytest.mark.parametrize(
    "name",
    ["accuracy", "rewards_evl/accuracies", "rewards_train/margins", "rewards_eval/accuracies_se"],
)
def test_keep_best_refuses_unknown_metric(tmp_path, name):
    """At once, before anything is read or compiled; so it does a standard error."""
    wanted = f"keep_best = '{name}': expected a metric of the evaluation, .*loss/eval"
    with pytest.raises(ValueError, match=wanted):
        run(dpo_config("MODEL", "PAIRS", keep_best=name), tmp_path)
    assert not (tmp_path / "dpo").exists()
    known = metric_names.kept_by()
    assert {"loss/eval", "rewards_eval/accuracies", "frontier/reward"} <= set(known)


def test_workdir_may_be_relative(model, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (run(dpo_config(model, pairs, steps=1), "runs/mine") / "done.json").exists()


def test_locked_stage_is_refused(whole):
    config, folder = whole
    with lock_folder(folder), pytest.raises(RuntimeError, match="another process is at work"):
        run(config, folder.parent)


def test_other_folder_is_not_touched(model, pairs, tmp_path):
    (tmp_path / "dpo").mkdir()
    (tmp_path / "dpo" / "thesis.tex").write_text("chapter 1")
    with pytest.raises(StageChanged, match="has files but no config.json"):
        run(dpo_config(model, pairs), tmp_path)


def test_too_few_rows_for_a_step(model, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", count=10)
    config = dpo_config(model, pairs, steps=0, batch_size=64)
    with pytest.raises(
        ValueError, match="training rows make no step of config.dpo.batch_size = 64"
    ):
        run(config, tmp_path)


def test_signal_in_last_step(model, pairs, tmp_path, whole, monkeypatch):
    write = metrics.Writer.write

    def stop(self, step, values):
        write(self, step, values)
        if step == 6:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(metrics.Writer, "write", stop)
        run(dpo_config(model, pairs), tmp_path)
    assert not (tmp_path / "dpo" / "hf").exists()
    for name, value in weights(run(dpo_config(model, pairs), tmp_path)).items():
        np.testing.assert_array_equal(value, weights(whole[1])[name])


def test_reference_by_path_and_none(model, pairs, tmp_path, whole):
    same = run(dpo_config(model, pairs, reference=str(model)), tmp_path / "path")
    for name, value in weights(same).items():
        np.testing.assert_array_equal(value, weights(whole[1])[name])
    free = run(dpo_config(model, pairs, reference="none"), tmp_path / "free")
    row = rows_without_timings(free)[0]
    np.testing.assert_allclose(
        row["rewards_eval/chosen"], 0.1 * row["logps_eval/chosen"], rtol=1e-4
    )


def test_loss_without_reference_loads_none(model, pairs, tmp_path):
    """Though dpo.reference is `init`: the run is that of `none`, bit for bit."""
    found = []
    for reference in ("init", "none"):
        config = dpo_config(model, pairs, loss="simpo", reference=reference, steps=2)
        folder = run(config, tmp_path / reference)
        assert not (folder / "weights.json").exists()  # it would have the reference
        found.append(rows_without_timings(folder))
    assert found[0] == found[1]


def test_ledger_and_shown_rows(model, pairs, tmp_path, capsys):
    folder = run(dpo_config(model, pairs, data__show=2, steps=1), tmp_path)
    ledger = json.loads((folder / "ledger.json").read_text())
    assert ledger["train"]["read"] == 60 and len(ledger["fingerprint"]) == 2
    out = capsys.readouterr().out
    assert out.count("⟦") == 4 and "</s>⟧" in out and "self-check passed" in out


def test_device_never_waits_for_host(model, pairs, tmp_path, monkeypatch):
    """A step's metrics are fetched when the next is on its way, and batches are made beside the
    loop.
    """
    events, made_by = [], []
    programs, named, shard_batch = loop.Job.programs, metrics.named, sharding.shard_batch

    def watched(job):
        made = programs.fget(job)

        def train_step(*arguments):
            events.append("step")
            return made.train_step(*arguments)

        return dataclasses.replace(made, train_step=train_step)

    monkeypatch.setattr(loop.Job, "programs", property(watched))
    monkeypatch.setattr(
        metrics, "named", lambda *arguments: events.append("fetch") or named(*arguments)
    )
    monkeypatch.setattr(
        sharding,
        "shard_batch",
        lambda *arguments, **options: (
            made_by.append(threading.current_thread()) or shard_batch(*arguments, **options)
        ),
    )
    run(dpo_config(model, pairs, steps=5, eval_every=100, save_every=100), tmp_path)
    first = events.index("step")
    assert events[first : first + 10] == ["step", *["step", "fetch"] * 4, "fetch"]
    assert sum(thread is not threading.main_thread() for thread in made_by) == 5


def test_a_mesh_axis_that_splits_nothing_is_said_once(model, pairs, tmp_path, capsys):
    with on_devices(3):
        run(dpo_config(model, pairs, steps=1, batch_size=3, mesh__fsdp=3), tmp_path)
    assert capsys.readouterr().out.count("mesh.fsdp = 3 splits no weight") == 1
