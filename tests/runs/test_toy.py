"""The README's first command: all stages of configs/toy.py reach the analytic optimum."""

import json
import re

import pytest

from configs import toy
from dpo_jax import report
from dpo_jax.pipeline.stages import run_stages
from dpo_jax.reporting.remarks import remarks
from tests.helpers.html_pages import Page
from tests.helpers.paths import ROOT
from tests.helpers.tiny_runs import command, on_devices

FOLDERS = ["sft", "pairs", "dpo", "evaluate"]


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


def test_toy_report_has_nothing_to_remark(workdir):
    page = Page((workdir / "report.html").read_text())
    assert "What a careful friend would say Nothing to remark." in page.text
    assert page.ids == ["friend", "runs", "stage-dpo", "stage-sft", "ledger", "config"]
    assert [record.name for record in report.records_of(workdir)] == FOLDERS


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


@pytest.mark.slow
def test_toy_with_a_hundredfold_learning_rate_is_called_broken(workdir):
    """Its report's remarks are those of docs/reports.md, but for numbers."""
    config = toy.get_config()
    config.dpo.lr *= 100
    config.run = "broken"
    with on_devices(1):
        run_stages(config, str(workdir))
    (record,) = [record for record in report.records_of(workdir) if record.name == "broken"]
    said = [remark for found in remarks(record).values() for remark in found or []]
    warnings = [remark.text for remark in said if remark.level == "warning"]
    assert any(text.startswith("The weights' norm went from") for text in warnings)
    assert any(text.startswith("The loss on held-out examples is") for text in warnings)

    def without_numbers(text: str) -> str:
        return re.sub(r"\d[\d.]*\d|\d", "#", " ".join(text.split()))

    documented = without_numbers((ROOT / "docs" / "reports.md").read_text())
    for remark in said:
        assert without_numbers(f"**{remark.level}**: {remark.text}") in documented
