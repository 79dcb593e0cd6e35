"""What is refused before the first stage runs, and which weights are evaluated."""

import collections
import contextlib

import jax
import numpy as np
import pytest

from configs import imdb_small
from dpo_jax import config as configs
from dpo_jax.data import leaks
from dpo_jax.parallel import sharding
from dpo_jax.pipeline import exports, stages
from dpo_jax.pipeline.run import Run, versions
from dpo_jax.pipeline.stages import run_stages
from dpo_jax.sampling import rollouts
from dpo_jax.sampling.prompts import Prompts
from dpo_jax.sampling.sampler import Sampling
from dpo_jax.workdir import (
    EXPORT,
    StageChanged,
    finish_stage,
    read_ledger,
    start_stage,
    write_lines,
    write_record,
)
from tests.helpers.rows import change_record
from tests.helpers.tiny_runs import dpo_config, tokenizer, write_model, write_pairs


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


def test_balance_without_experts_is_refused_by_the_first_stage(tmp_path):
    """Before it reads its data, although a later stage asks for it."""
    config = configs.default(("sft", "dpo"))
    config.model.path = str(write_model(tmp_path / "model"))
    config.data.path = str(write_pairs(tmp_path / "pairs.jsonl"))
    config.dpo.router_aux_loss_coef = 0.01
    with pytest.raises(ValueError, match="dpo.router_aux_loss_coef = 0.01: .* has no experts"):
        run_stages(config, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "sft" / "ledger.json").exists()


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
    path = run.folder("dpo") / "ledger.json"
    write_record(path, before)
    with pytest.raises(StageChanged, match="begun by an earlier version, which read other rows"):
        run.record("dpo", dict(train={}, eval={}, test={}), ["a", "c"])
    run.record("dpo", dict(train={}, eval={}, test={}), ["a", "b"])
    with pytest.raises(StageChanged, match="has changed since the stage began"):
        run.record("dpo", dict(train={}, eval={}, test={}), ["a", "c"])
    # Ledgers of prompts, as those of ppo, had nothing but their number.
    write_record(path, dict(prompts=4, fingerprint="a"))
    with pytest.raises(StageChanged, match="begun by an earlier version, which read other rows"):
        run.record("dpo", dict(prompts=4, leaks={}), "c")
    assert "leaks" not in read_ledger(path.parent)
    run.record("dpo", dict(prompts=4, leaks={}), "a")
    with pytest.raises(StageChanged, match="has changed since the stage began"):
        run.record("dpo", dict(prompts=4, leaks={}), "c")


def of_earlier_version(folder):
    """Make a stage's record one of the versions that had no data.on_leak, and drew other rows."""
    change_record(folder / "config.json", lambda record: record["config"]["data"].pop("on_leak"))


def test_completions_of_other_prompts(tmp_path):
    """Of an earlier version they were of other rows; else the data has changed."""
    config = configs.default(("pairs", "dpo"))
    folder, _ = start_stage(tmp_path, config, "pairs", {})
    write_lines(folder / "completions.jsonl", [dict(tokens=[1, 2])])
    sampling = Sampling(max_new_tokens=4)
    rollouts.so_far(Prompts([np.array([1, 2])], ["a"]), sampling, folder)
    others = Prompts([np.array([1, 3])], ["b"])
    with pytest.raises(StageChanged, match="the prompts of .* have changed"):
        rollouts.so_far(others, sampling, folder)
    of_earlier_version(folder)
    with pytest.raises(StageChanged, match="begun by an earlier version, which read other rows"):
        rollouts.so_far(others, sampling, folder)


def test_refused_stage_keeps_its_prompts(tmp_path):
    """prompts.safetensors stays what the stage has trained on, by which leaks are found."""
    config = dpo_config("MODEL", write_pairs(tmp_path / "pairs.jsonl"))
    run = Run(config, tmp_path / "run", mesh=None)
    run.load_data("dpo", tokenizer())
    before = (run.folder("dpo") / leaks.FILE).read_bytes()
    write_pairs(tmp_path / "pairs.jsonl", seed=1)
    with pytest.raises(StageChanged, match="has changed since the stage began"):
        run.load_data("dpo", tokenizer())
    assert (run.folder("dpo") / leaks.FILE).read_bytes() == before


@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_warmup_of_an_earlier_version(tmp_path, warmup_steps):
    """It counted updates, of which a step has several."""
    config = configs.default(("rm", "ppo"))
    config.ppo.warmup_steps = warmup_steps
    folder, _ = start_stage(tmp_path, config, "ppo", versions())
    (folder / "checkpoints" / "4").mkdir(parents=True)
    run = Run(config, tmp_path, mesh=None)
    stages._check_stages([run], frozenset())
    of_earlier_version(folder)
    refusal = contextlib.nullcontext()
    if warmup_steps:
        refusal = pytest.raises(StageChanged, match="config.ppo.warmup_steps = 2 in updates")
    with refusal:
        stages._check_stages([run], frozenset())


def test_runs_of_other_rows_are_told(tmp_path, capsys):
    """A new run beside those of an earlier version, and a stage of one that it reuses."""
    config = dpo_config("MODEL", "PAIRS")
    folder, _ = start_stage(tmp_path, config, "dpo", versions())
    finish_stage(folder)
    config.run = "dpo-beta0.5"
    beside = Run(config, tmp_path, mesh=None)
    stages._say_of_other_rows(beside, "dpo", is_done=False)
    assert not capsys.readouterr().out
    of_earlier_version(folder)
    stages._say_of_other_rows(beside, "dpo", is_done=False)
    told = "dpo: an earlier version, which chose other rows of the data to train"
    assert told in " ".join(capsys.readouterr().out.split())
    config.run = ""
    stages._say_of_other_rows(Run(config, tmp_path, mesh=None), "dpo", is_done=True)
    assert "made dpo: those numbers are not comparable" in " ".join(capsys.readouterr().out.split())
