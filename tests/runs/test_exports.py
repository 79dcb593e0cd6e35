"""Exports of whole runs: what they keep of the source, their type, and what later stages read."""

import json
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from dpo_jax import config as configs
from dpo_jax.models import loading
from dpo_jax.workdir import StageChanged
from tests.helpers import chat_model
from tests.helpers.paths import ROOT
from tests.helpers.tiny_runs import (
    dpo_config,
    environment,
    on_devices,
    rows_without_timings,
    run,
    weights,
)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """An export is the same from any mesh (test_training.py), and one device compiles faster."""
    with on_devices(1):
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A chat model in bfloat16, which stops at two tokens."""
    return chat_model.write(tmp_path_factory.mktemp("source") / "model")


def config_of(stages, source, pairs, **export):
    """Return the config of a short run from the source."""
    config = configs.default(stages)
    small = dpo_config(source, pairs)
    config.model.update(small.model)
    config.data.update(small.data)
    for stage in stages:
        config[stage].update(
            batch_size=8,
            steps=3,
            optimizer="sgd",
            lr=0.05,
            warmup_steps=2,
            eval_every=3,
            save_every=2,
        )
    config.export.update(export)
    return config


def dtypes(folder) -> set[str]:
    """Return the types of a stage's exported tensors, and the one that config.json names."""
    named = json.loads((folder / "hf" / "config.json").read_text())["dtype"]
    return {str(value.dtype) for value in weights(folder).values()} | {named}


@pytest.fixture(scope="module")
def exact(source, pairs, tmp_path_factory):
    """A run of two stages: (config, workdir)."""
    config = config_of(("sft", "dpo"), source, pairs)
    workdir = tmp_path_factory.mktemp("exact")
    run(config, workdir)
    return config, workdir


def test_export_keeps_what_the_source_had(source, exact):
    _, workdir = exact
    folder = workdir / "dpo" / "hf"
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    assert dtypes(workdir / "dpo") == {"bfloat16"}
    modes = {path.stat().st_mode for path in folder.iterdir()}
    modes |= {(workdir / "dpo" / name).stat().st_mode for name in ("ledger.json", "done.json")}
    assert len(modes) == 1
    opened = loading.open_checkpoint(str(folder))
    assert opened.other_eos_ids == (chat_model.END,)


def test_only_the_last_stage_is_rounded(exact):
    """So that dpo starts from the very weights that sft ended with."""
    _, workdir = exact
    assert dtypes(workdir / "sft") == {"float32"}
    kept = weights(workdir / "sft")
    rounded = [value.astype(jnp.bfloat16).astype(np.float32) for value in kept.values()]
    assert any((value != near).any() for value, near in zip(kept.values(), rounded, strict=True))


def test_stage_that_was_last_is_exported_again(exact, source, pairs, tmp_path, capsys):
    """sft alone rounds; dpo after it has the same bits as where sft was never the last stage."""
    config, workdir = exact
    run(config_of(("sft",), source, pairs), tmp_path)
    assert dtypes(tmp_path / "sft") == {"bfloat16"}
    trained = (tmp_path / "sft" / "metrics.jsonl").read_bytes()
    run(config, tmp_path)
    assert "already done; its hf/ is written again" in capsys.readouterr().out
    assert (tmp_path / "sft" / "metrics.jsonl").read_bytes() == trained
    assert rows_without_timings(tmp_path / "dpo") == rows_without_timings(workdir / "dpo")
    for stage in ("sft", "dpo"):
        for name, value in weights(workdir / stage).items():
            np.testing.assert_array_equal(weights(tmp_path / stage)[name], value, strict=True)
    # And nothing that is exact is rounded by a run that ends earlier.
    run(config_of(("sft",), source, pairs), tmp_path)
    assert dtypes(tmp_path / "sft") == {"float32"}


def test_a_model_that_is_gone_is_written_again(exact, tmp_path, capsys):
    config, workdir = exact
    copy = shutil.copytree(workdir, tmp_path / "copy")
    shutil.rmtree(copy / "sft" / "hf")
    run(config, copy)
    assert "sft: already done; its hf/ is gone, and written again" in capsys.readouterr().out
    for name, value in weights(workdir / "sft").items():
        np.testing.assert_array_equal(weights(copy / "sft")[name], value, strict=True)
    (copy / "sft" / "hf" / "config.json").unlink()
    with pytest.raises(ValueError, match="sft/hf/config.json is gone. Put it back .* or remove"):
        run(config, copy)
    shutil.rmtree(copy / "sft" / "checkpoints")
    (copy / "sft" / "hf" / "model.safetensors").unlink()
    with pytest.raises(StageChanged, match="sft/hf, the model that .* is gone or lacks files"):
        run(config, copy)


def test_other_type_exports_a_finished_run_again(exact, source, pairs, tmp_path, capsys):
    run(config_of(("sft",), source, pairs, dtype="float32"), tmp_path)
    whole = weights(tmp_path / "sft")
    capsys.readouterr()
    run(config_of(("sft",), source, pairs, dtype="bfloat16"), tmp_path)
    assert dtypes(tmp_path / "sft") == {"bfloat16"}
    for name, value in weights(tmp_path / "sft").items():
        np.testing.assert_array_equal(value, whole[name].astype(jnp.bfloat16))
    assert "step" not in capsys.readouterr().out.split("written again")[0]
    before = (tmp_path / "sft" / "done.json").read_text()
    run(config_of(("sft",), source, pairs), tmp_path)  # "source" is bfloat16 as well
    assert (tmp_path / "sft" / "done.json").read_text() == before


def test_export_again_needs_a_checkpoint(source, pairs, tmp_path):
    run(config_of(("sft",), source, pairs), tmp_path)
    (tmp_path / "sft" / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(StageChanged, match="stored in bfloat16, and this run needs it in float32"):
        run(config_of(("sft", "dpo"), source, pairs), tmp_path)


def front_matter(card: str) -> dict:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_model_card(exact, source, pairs):
    _, workdir = exact
    card = (workdir / "dpo" / "hf" / "README.md").read_text()
    head = front_matter(card)
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-generation"
    assert set(head["tags"]) >= {"dpo_jax", "dpo"}
    assert "base_model" not in head  # the hub knows no folders
    ledger = json.loads((workdir / "dpo" / "ledger.json").read_text())
    done = json.loads((workdir / "dpo" / "done.json").read_text())
    sft = loading.open_checkpoint(str(workdir / "sft" / "hf")).fingerprint()
    told = [str(source), str(pairs), sft, *ledger["fingerprint"]]
    told += [f"{value:.6g}" for value in done["evaluation"].values()]
    for text in [*told, "| dpo.beta | 0.1 |", "| sft.lr | 0.05 |", "| stored in | bfloat16 |"]:
        assert text in card, text
    for command in ("AutoModelForCausalLM.from_pretrained", "vllm serve", "dpo_jax.sample"):
        assert command in card


def test_adapter_has_a_card_and_is_a_model(source, pairs, tmp_path):
    config = config_of(("dpo",), source, pairs, dtype="float32")
    config.model.lora.rank = 4
    folder = run(config, tmp_path)
    card = (folder / "adapter" / "README.md").read_text()
    assert front_matter(card)["library_name"] == "peft"
    assert "lora" in front_matter(card)["tags"]
    assert "PeftModel.from_pretrained" in card and str(source) in card
    modes = {path.stat().st_mode for path in (folder / "adapter").iterdir()}
    assert modes == {(folder / "done.json").stat().st_mode}
    # The adapter as model.path is what hf/ holds.
    config = config_of(("dpo",), folder / "adapter", pairs, dtype="float32")
    config.dpo.update(steps=1, lr=1e-30)
    again = run(config, tmp_path / "again")
    for name, value in weights(folder).items():
        np.testing.assert_allclose(weights(again)[name], value, atol=1e-6)


# `train` with the hub's client replaced: what it is asked to do is printed.
FAKE_HUB = """
import huggingface_hub
from dpo_jax import train
class FakeHub:
    def create_repo(self, repo_id, **_):
        print("made", repo_id)
    def upload_folder(self, *, repo_id, folder_path, **_):
        print("sent", folder_path, *sorted(path.name for path in folder_path.iterdir()))
huggingface_hub.HfApi = FakeHub
train.main()
"""


def test_push_uploads_after_the_run_and_again(source, pairs, tmp_path):
    flags = [
        "--config=dpo",
        f"--config.model.path={source}",
        f"--config.data.path={pairs}",
        "--config.dpo.steps=2",
        "--config.dpo.batch_size=8",
        "--config.run=mine",
        f"--workdir={tmp_path}",
        "--push=me/tiny",
    ]

    def start(*program, **variables):
        return subprocess.run(
            [sys.executable, *program, *flags],
            cwd=ROOT,
            text=True,
            capture_output=True,
            env=environment() | variables,
        )

    # The first time nothing is reached: the run is finished all the same.
    failed = start("-m", "dpo_jax.train", HF_HUB_OFFLINE="1", HF_TOKEN="")
    assert failed.returncode == 2, failed.stderr
    assert "nobody is logged in to the hub on this machine" in failed.stdout + failed.stderr
    assert "the same command uploads it again" in failed.stderr
    assert (tmp_path / "mine" / "done.json").exists()

    done = start("-c", FAKE_HUB)
    assert done.returncode == 0, done.stderr
    assert "dpo: already done" in done.stdout
    made, sent = [line for line in done.stdout.splitlines() if line.startswith(("made", "sent"))]
    assert made == "made me/tiny"
    _, folder, *names = sent.split()
    assert folder == str(tmp_path / "mine" / "hf")
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors"} <= set(names)
