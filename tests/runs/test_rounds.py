"""Rounds: the stages from pairs on, run again from the policy of the round before."""

import json
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

import dpo_jax
from configs import toy
from dpo_jax import check, runs
from dpo_jax.config import default
from dpo_jax.evaluation.chat_api import BudgetExhausted
from dpo_jax.training.metrics import read_rows
from dpo_jax.workdir import StageChanged, read_weights
from tests.helpers import bucket_folders
from tests.helpers.judge_server import JudgeServer, longer, prefers
from tests.helpers.paths import ROOT
from tests.helpers.tiny_runs import (
    environment,
    on_devices,
    rows_without_timings,
    run,
    sigterm_at,
    weights,
    write_model,
    write_pairs,
)

PROMPTS = 12


def config_of(rounds: int = 1, method: str = "dpo", **fields):
    """Return the config of a short toy run; fields: of the stage that trains the policy."""
    config = toy.get_config(method)
    config.rounds = rounds
    config.pairs.prompts = PROMPTS
    short = dict(batch_size=16, eval_every=3, save_every=2, warmup_steps=0)
    config.sft.update(steps=2, **short)
    if method == "ppo":  # on a reward model, which is trained first
        config.rm.update(steps=4, **short)
    # Few rows to sample from, so that rounds use them up.
    config.data.max_rows = 30
    config.data.max_eval_rows = 20
    config[method].update(steps=6, **short | fields)
    return config


def run_here(config, workdir, **options) -> pathlib.Path:
    with on_devices(1):
        return run(config, workdir, **options)


def rows_of(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def frontier_of(row: dict) -> tuple[float, float]:
    return row["frontier/reward"], row["frontier/kl"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """WORKDIR of a run without rounds."""
    workdir = tmp_path_factory.mktemp("plain")
    run_here(config_of(), workdir)
    return workdir


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """WORKDIR of a run of three rounds."""
    workdir = tmp_path_factory.mktemp("three")
    run_here(config_of(rounds=3), workdir)
    return workdir


def assert_equal_stages(folder: pathlib.Path, other: pathlib.Path):
    """Compare the weights, metrics, pairs and results of the stages in two folders."""
    for name in ("pairs/pairs.jsonl", "pairs/pairs_eval.jsonl", "evaluate/toy.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    assert rows_without_timings(folder / "dpo") == rows_without_timings(other / "dpo")
    for name, value in weights(other / "dpo").items():
        np.testing.assert_array_equal(weights(folder / "dpo")[name], value, err_msg=name)


def test_round_1_is_the_run_without_rounds(plain, three):
    assert_equal_stages(three, plain)
    for stage in ("sft", "pairs", "dpo", "evaluate"):
        ours, theirs = (json.loads((w / stage / "config.json").read_text()) for w in (three, plain))
        # The records differ in nothing but where the run is and when.
        assert ours["depends_on"] == theirs["depends_on"]
        assert ours["config"] == theirs["config"]
    assert sorted(path.name for path in plain.iterdir()) == ["dpo", "evaluate", "pairs", "sft"]


def test_each_round_starts_from_the_one_before(three):
    """And measures its KL to the first policy."""
    folders = [three, three / "round_2", three / "round_3"]
    for before, now in zip(folders, folders[1:], strict=False):
        result = dpo_jax.load(before / "dpo" / "hf").checkpoint.fingerprint()
        assert read_weights(now / "pairs")["policy"]["fingerprint"] == result
        found = read_weights(now / "dpo")
        assert found["policy"]["fingerprint"] == found["reference"]["fingerprint"] == result
        first = dpo_jax.load(three / "sft" / "hf").checkpoint.fingerprint()
        assert found["start"]["fingerprint"] == first
        assert not (now / "sft").exists()

        end = read_rows(before / "dpo" / "metrics.jsonl")[-1]
        start = read_rows(now / "dpo" / "metrics.jsonl")[0]
        assert frontier_of(start) == pytest.approx(frontier_of(end), abs=1e-6)
        assert frontier_of(start)[1] > 1e-3


def test_rounds_have_prompts_of_their_own(three):
    """The next ones in the order of round 1, from its start again where they are used up."""
    order = np.random.default_rng(0).permutation(30)
    prompts = [row["prompt"] for row in rows_of(three / "pairs" / "completions.jsonl")]
    known = dict(zip(order[:PROMPTS], prompts, strict=False))
    drawn = []
    for number in (1, 2, 3):
        folder = three / f"round_{number}" if number > 1 else three
        sampled = rows_of(folder / "pairs" / "completions.jsonl")
        expected = [order[(PROMPTS * (number - 1) + i) % 30] for i in range(PROMPTS)]
        for index, row in zip(expected, sampled, strict=False):
            assert known.setdefault(index, row["prompt"]) == row["prompt"]
        drawn.append([row["completions"] for row in sampled])
    # Round 3 has the first prompts of round 1 again, and other completions of them.
    assert drawn[2][6:] != drawn[0][:6]


# A run of three rounds in a process of its own, for a kill that can tidy up nothing.
IN_A_PROCESS = """
import sys
from dpo_jax.pipeline.stages import run_stages
from tests.runs.test_rounds import config_of

run_stages(config_of(rounds=3), sys.argv[1])
"""


@pytest.mark.slow
def test_killed_in_every_stage_of_every_round(three, tmp_path):
    """One run, killed in each of its ten stages in turn and started again: the same bits."""
    of_round = ("pairs", "dpo", "evaluate")
    stages = ["sft", *of_round]
    stages += [f"round_{number}/{stage}" for number in (2, 3) for stage in of_round]
    for stage in stages:
        process = subprocess.Popen(
            [sys.executable, "-c", IN_A_PROCESS, str(tmp_path)],
            cwd=ROOT,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        while not (tmp_path / stage / "config.json").exists():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert process.returncode == -9
        assert not (tmp_path / stage / "done.json").exists(), f"{stage} was over before the kill"
    run_here(config_of(rounds=3), tmp_path)
    assert_equal_stages(tmp_path, three)
    for number in (2, 3):
        assert_equal_stages(tmp_path / f"round_{number}", three / f"round_{number}")


def test_a_longer_run_reuses_its_rounds_and_resumes(three, tmp_path, capsys):
    """Interrupted in a step of the last round: all bits are those of an uninterrupted run."""
    run_here(config_of(rounds=2), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")}
    with sigterm_at(3):
        run_here(config_of(rounds=3), tmp_path)
    assert (tmp_path / "round_3" / "dpo" / "checkpoints" / "3").exists()
    assert not (tmp_path / "round_3" / "dpo" / "done.json").exists()
    capsys.readouterr()

    run_here(config_of(rounds=3), tmp_path)
    said = capsys.readouterr().out
    assert said.count("already done") == 8 and "--- round 3 of 3" in said
    assert "dpo: resuming after step 3" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name in ("", "round_2", "round_3"):
        assert_equal_stages(tmp_path / name, three / name)
    assert (tmp_path / "round_3" / "evaluate" / "toy.png").exists()


def test_fixed_reference_is_the_first_policy(plain, tmp_path):
    run_here(config_of(rounds=2, reference="first"), tmp_path)
    first = dpo_jax.load(tmp_path / "sft" / "hf").checkpoint.fingerprint()
    assert_equal_stages(tmp_path, plain)  # where the first policy is the initial one
    found = read_weights(tmp_path / "round_2" / "dpo")
    assert found["reference"]["fingerprint"] == first != found["policy"]["fingerprint"]
    start, *_ = rows_without_timings(tmp_path / "round_2" / "dpo")
    assert start["loss/eval"] != pytest.approx(np.log(2), abs=1e-4)


def test_changed_field_of_an_earlier_round_is_refused(three):
    """Before anything is trained, by the first stage that it changes."""
    with pytest.raises(StageChanged, match=r"three\d*/dpo holds the dpo stage of another config"):
        run_here(config_of(rounds=4, beta=1.0, reference="init"), three)
    assert not (three / "round_4").exists()


def test_runs_and_check_list_rounds(three, capsys):
    lines = runs.table(three).splitlines()
    rows = [line.split() for line in lines if " finished " in line]
    names = [row[0] for row in rows]
    assert names == [
        *("sft", "pairs", "dpo", "evaluate"),
        *("round_2/pairs", "round_2/dpo", "round_2/evaluate"),
        *("round_3/pairs", "round_3/dpo", "round_3/evaluate"),
    ]
    assert rows[2][-1] == rows[5][-1]  # what is changed is the same in all rounds
    assert not any("other folders" in line for line in lines)
    assert f"{three.name}" in runs.overview(three.parent)
    assert check.report(three) == 0
    said = capsys.readouterr().out
    assert "round_2/dpo/checkpoints/6" in said and "round_3/pairs/pairs.jsonl" in said


def test_check_finds_damage_in_a_later_round(three, tmp_path, capsys):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    pairs = tmp_path / "round_2" / "pairs" / "pairs.jsonl"
    pairs.write_bytes(pairs.read_bytes()[:-10])
    assert check.report(tmp_path) == 1
    assert "round_2/pairs/pairs.jsonl" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"round_2/pairs/pairs.jsonl is not what was written"):
        run_here(config_of(rounds=3), tmp_path)


@pytest.mark.parametrize(
    "method, fields",
    [
        ("dpo", dict(loss="simpo", beta=2.0)),  # without a reference
        pytest.param(
            "dpo", dict(loss="ipo", reference="first", cache_reference=True), marks=pytest.mark.slow
        ),
        pytest.param("dpo", dict(loss="orpo", beta=0.1), marks=pytest.mark.slow),
        pytest.param("unlikelihood", {}, marks=pytest.mark.slow),
        pytest.param("preferred_ft", {}, marks=pytest.mark.slow),
        pytest.param("kto", {}, marks=pytest.mark.slow),
        pytest.param("kto", dict(reference="first"), marks=pytest.mark.slow),
        pytest.param("ppo", dict(minibatch_size=8), marks=pytest.mark.slow),
    ],
)
def test_rounds_of_other_objectives(tmp_path, method, fields):
    run_here(config_of(rounds=2, method=method, **fields), tmp_path)
    first, second = (
        rows_without_timings(folder / method) for folder in (tmp_path, tmp_path / "round_2")
    )
    assert frontier_of(second[0]) == pytest.approx(frontier_of(first[-1]), abs=1e-6)
    assert frontier_of(second[-1]) != frontier_of(second[0])
    assert (tmp_path / "round_2" / "evaluate" / "toy.json").exists()
    # Kept log-probs are of the reference and the pairs, so of both rounds in one place.
    kept = list((tmp_path / "reference").glob("*/train.npy"))
    assert len(kept) == (2 if fields.get("cache_reference") else 0)


@pytest.mark.slow
def test_rounds_in_a_bucket_go_on_on_another_machine(three, tmp_path, monkeypatch):
    bucket = tmp_path / "buckets" / "bucket" / "run"
    bucket_folders.use(monkeypatch, tmp_path / "buckets", tmp_path / "first")
    run_here(config_of(rounds=2), "s3://bucket/run")
    bucket_folders.use(monkeypatch, tmp_path / "buckets", tmp_path / "second")
    with sigterm_at(3):
        run_here(config_of(rounds=3), "s3://bucket/run")
    assert not (bucket / "round_3" / "dpo" / "done.json").exists()
    bucket_folders.use(monkeypatch, tmp_path / "buckets", tmp_path / "third")
    run_here(config_of(rounds=3), "s3://bucket/run")
    for name in ("", "round_2", "round_3"):
        assert_equal_stages(bucket / name, three / name)


def longest(prompts, completions):
    """How long the words of a completion are, in letters."""
    return [len(text) for text in completions]


def config_of_model(model, tmp_path, rounds: int):
    """Return the config of a short run of a model; its pairs are written first."""
    config = default(("pairs", "dpo", "evaluate"))
    config.rounds = rounds
    config.model.path = str(model)
    config.data.path = str(write_pairs(tmp_path / "pairs.jsonl", count=40))
    config.data.eval_fraction = 0.2
    config.sampling.update(max_new_tokens=4, batch_size=32)
    config.pairs.update(prompts=8, completions=2)
    config.dpo.update(batch_size=4, steps=3, lr=0.01, eval_every=3, save_every=3, warmup_steps=0)
    config.evaluate.prompts = 8
    return config


@pytest.mark.slow
def test_round_1_of_a_bfloat16_model_is_measured_as_the_run_without_rounds(tmp_path):
    """Though the weights of the one are exported in bfloat16, and those of the other are exact."""
    model = write_model(tmp_path / "model", dtype="bfloat16")
    run_here(config_of_model(model, tmp_path, 1), tmp_path / "one", reward=longest)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "evaluate")
    with sigterm_at(2):  # of the next thing that is trained: round 2
        run_here(config_of_model(model, tmp_path, 2), tmp_path / "two", reward=longest)
    stored = [weights(tmp_path / name / "dpo") for name in ("one", "two")]
    assert [{str(x.dtype) for x in values.values()} for values in stored] == [
        {"bfloat16"},
        {"float32"},
    ]
    for name in ("evaluate.json", "completions.jsonl", "reference_completions.jsonl"):
        one, two = (tmp_path / folder / "evaluate" / name for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), name


@pytest.mark.slow
def test_rounds_of_a_model_and_a_python_reward(model, tmp_path):
    """Sampled rewards and KLs; adapters, which later rounds have over merged weights; a name."""
    config = config_of_model(model, tmp_path, 2)
    config.run = "mine"
    config.model.lora.rank = 2
    with on_devices(1):
        folders = dpo_jax.run(config, tmp_path / "run", reward=longest)
    later = tmp_path / "run" / "round_2"
    assert folders == dict(
        pairs=later / "pairs-mine", dpo=later / "mine", evaluate=later / "evaluate-mine"
    )
    before = tmp_path / "run" / "mine"
    for pair in rows_of(folders["pairs"] / "pairs.jsonl"):
        assert pair["reward_chosen"] == len(pair["chosen"]) > pair["reward_rejected"]
    weights_then = read_weights(folders["dpo"])
    result = dpo_jax.load(before / "hf").checkpoint.fingerprint()
    first = dpo_jax.load(model).checkpoint.fingerprint()
    assert weights_then["base"]["fingerprint"] == result != first
    assert weights_then["start"]["fingerprint"] == first
    # The KL is to the first model, under which the policy of round 1 has moved already.
    start, *_ = read_rows(folders["dpo"] / "metrics.jsonl")
    assert start["frontier/kl"] != 0
    evaluated = json.loads((folders["evaluate"] / "evaluate.json").read_text())
    assert evaluated["policy"] == "dpo" and evaluated["frontier/kl"] != 0
    card = (folders["dpo"] / "adapter" / "README.md").read_text()
    assert "round 2" in card and str(before / "hf") in card


@pytest.mark.slow
def test_rounds_of_a_judge_resume_and_pay_no_call_twice(model, tmp_path):
    """Stopped by its cap, which counts the answers of one round."""
    config = config_of_model(model, tmp_path, 2)
    config.stages = ("pairs", "dpo")
    config.pairs.labels = "judge"
    config.pairs.judge.update(model="m", max_calls=5)
    workdir = tmp_path / "run"
    folders = (workdir / "pairs", workdir / "round_2" / "pairs")
    with JudgeServer(prefers(longer)) as server, server.environment():
        with pytest.raises(BudgetExhausted):
            run_here(config, workdir)
        assert len(server.requests) == 5
        # Enough for the pairs of one round, of the prompts to train on and of those held out.
        config.pairs.judge.max_calls = cap = 24
        run_here(config, workdir)
        asked = len(server.requests)
        run_here(config, workdir)
        assert len(server.requests) == asked
    kept = [rows_of(folder / "judgements.jsonl") for folder in folders]
    assert max(map(len, kept)) <= cap < len(kept[0]) + len(kept[1]) == asked
    for folder in folders:
        assert rows_of(folder / "pairs.jsonl")
    assert (workdir / "round_2" / "dpo" / "hf").exists()
