"""What is refused before the first stage runs, and which weights are evaluated."""

import collections

import jax
import numpy as np
import pytest

from configs import imdb_small
from dpo_jax import config as configs
from dpo_jax.parallel import sharding
from dpo_jax.pipeline import exports, stages
from dpo_jax.pipeline.run import Run
from dpo_jax.pipeline.stages import run_stages
from dpo_jax.workdir import EXPORT, StageChanged, finish_stage, start_stage, write_record
from tests.helpers.tiny_runs import write_model


def test_run_stages_refuses_unreadable_reward(tmp_path):
    folder = tmp_path / "classifier"
    folder.mkdir()
    (folder / "pytorch_model.bin").touch()
    config = imdb_small.get_config()
    config.reward.update(kind="classifier", path=str(folder))
    with pytest.raises(
        FileNotFoundError, match="pytorch_model.bin would run code(.|\n)*OWNER/NAME@refs/pr/N"
    ):
        run_stages(config, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "sft").exists()


def test_evaluate_measures_weights_as_the_run_without_rounds_exports_them(tmp_path, monkeypatch):
    """A round that others follow has kept them exact, where that run has rounded them."""
    measured = []

    def measure(params, reference):
        measured.append(params)
        return collections.defaultdict(float), []

    monkeypatch.setattr(stages, "judged_prompts", lambda run, stage, tokenizer: None)
    monkeypatch.setattr(stages, "policy_measure", lambda *_: measure)
    config = configs.default(("pairs", "dpo", "evaluate"))
    config.model.path = str(write_model(tmp_path / "model", dtype="bfloat16"))
    config.data.path = "PAIRS"
    for rounds in (1, 2):
        run = Run(config, tmp_path / f"of_{rounds}", sharding.make_mesh(), rounds)
        record = exports.record(config, run.is_last("dpo"), "bfloat16")
        folder, _ = start_stage(run.workdir, config, "dpo", {})
        write_model(folder / "hf", scale=3, dtype=record["dtype"])
        finish_stage(folder, **{EXPORT: record})
        run.folder("evaluate").mkdir()
        stages.evaluate_stage(run, "evaluate")
    rounded, _, exact, _ = map(jax.tree.leaves, measured)
    for one, other in zip(rounded, exact, strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_that_an_earlier_version_held_out(tmp_path):
    """Its ledgers have no test split; a stage that reads what it read goes on."""
    run = Run(configs.default(("dpo",)), tmp_path, mesh=None)
    run.folder("dpo").mkdir()
    before = dict(train={}, eval={}, fingerprint=["a", "b"])
    write_record(run.folder("dpo") / "ledger.json", before)
    with pytest.raises(StageChanged, match="begun by an earlier version, which read other rows"):
        run.record("dpo", dict(train={}, eval={}, test={}), ["a", "c"])
    run.record("dpo", dict(train={}, eval={}, test={}), ["a", "b"])
    with pytest.raises(StageChanged, match="has changed since the stage began"):
        run.record("dpo", dict(train={}, eval={}, test={}), ["a", "c"])
