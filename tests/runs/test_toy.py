"""The README's first command: all stages of configs/toy.py reach the analytic optimum."""

import json

import pytest

from configs import toy
from dpo_jax.pipeline.stages import run_stages
from tests.helpers.tiny_runs import command


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    done = command("train", "--config=configs/toy.py", f"--workdir={folder}", fast=True)
    assert done.returncode == 0, done.stderr
    assert "optimum at beta 2" in done.stdout
    return folder


def test_toy_reaches_analytic_optimum(workdir):
    found = json.loads((workdir / "evaluate" / "toy.json").read_text())
    assert found.keys() == {
        "beta",
        "reward",
        "kl",
        "analytic_reward",
        "analytic_kl",
        "bound_reward",
        "gap",
    }
    assert found["beta"] == 2
    assert abs(found["reward"] - found["analytic_reward"]) < 0.03
    assert abs(found["kl"] - found["analytic_kl"]) < 0.02
    assert -1e-4 <= found["gap"] < 0.03
    assert found["bound_reward"] - found["reward"] == pytest.approx(found["gap"])


def test_toy_stage_folders(workdir):
    for stage, files in {
        "sft": ["metrics.jsonl", "ledger.json", "hf"],
        "pairs": ["pairs.jsonl", "ledger.json"],
        "dpo": ["metrics.jsonl", "ledger.json", "hf"],
        "evaluate": ["toy.json", "toy.png"],
    }.items():
        assert all(
            (workdir / stage / name).exists() for name in [*files, "config.json", "done.json"]
        ), stage
    assert (workdir / "evaluate" / "toy.png").read_bytes().startswith(b"\x89PNG")


def test_toy_labels_by_bradley_terry(workdir):
    rows = [
        json.loads(line) for line in (workdir / "pairs" / "pairs.jsonl").read_text().splitlines()
    ]
    ledger = json.loads((workdir / "pairs" / "ledger.json").read_text())["train"]
    assert len(rows) == ledger["pairs"] == 6 * ledger["prompts"] - sum(ledger["left_out"].values())
    agreeing = sum(row["reward_chosen"] > row["reward_rejected"] for row in rows) / len(rows)
    assert 0.6 < agreeing < 0.9  # not always: the labels are sampled


def test_toy_second_start_reuses_all(workdir, capsys):
    before = {path: path.stat().st_mtime for path in workdir.rglob("done.json")}
    run_stages(toy.get_config(), str(workdir))
    assert capsys.readouterr().out.count("already done") == 4
    assert before == {path: path.stat().st_mtime for path in workdir.rglob("done.json")}
