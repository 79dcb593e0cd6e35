"""The GPU's checks and measurements: packages, limits and reports; slow: a rehearsal on the CPU."""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from dpo_jax.parallel.hardware import CHIPS
from experiments.benchmark import gpu, gpu_checks
from tests.helpers.paths import ROOT


def test_missing_packages_and_their_wheels(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ALSO_NEEDED", ("numpy>=999", "no-such-package", "packaging>=20"))
    found = gpu.missing_packages()
    assert found.pop("numpy>=999") == np.__version__
    assert found.pop("no-such-package") == "nothing"
    assert not any("packaging" in line for line in found)
    monkeypatch.setattr(gpu, "VERSIONS", {"no-such-package": "1.2"})
    shown = gpu.how_to_bring({"no-such-package": "nothing", "numpy>=999": "2.0"}, tmp_path)
    assert "numpy>=999 (found 2.0)" in shown
    assert f"--dest={tmp_path} 'no-such-package==1.2' 'numpy>=999'" in shown


def test_wheels_go_to_their_own_folder(tmp_path):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    assert gpu.install(wheels, str(site)) == "" and not site.exists()
    wheels.mkdir()
    (wheels / "broken-1.0-py3-none-any.whl").write_text("no zip file")
    assert "pip install failed" in gpu.install(wheels, str(site))


def test_process_ends_at_its_limit_with_its_children(tmp_path):
    pid_file = tmp_path / "pid"
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid))\n"
        "print('child started', flush=True)\n"
        "time.sleep(100)\n"
    )
    process = gpu.Process([sys.executable, "-c", code], tmp_path / "log", 5)
    found = process.finish()
    assert found["ended"] == "stopped at its limit of 5 s" and found["seconds"] < 20
    assert "child started" in found["last_lines"][0]
    # The child was in the same session, so it is gone too, or waits to be reaped.
    stat = pathlib.Path(f"/proc/{pid_file.read_text()}/stat")
    for _ in range(100):
        if not stat.exists() or " Z " in stat.read_text():
            return
        time.sleep(0.05)
    raise AssertionError("the child still runs")


def test_failed_process_says_why(tmp_path):
    process = gpu.Process(
        [sys.executable, "-c", "raise SystemExit('no GPU')"], tmp_path / "log", 60
    )
    found = process.finish()
    assert found["ended"] == "failed with exit status 1" and found["last_lines"] == ["no GPU"]


def test_cases_go_on_after_a_failure(tmp_path, monkeypatch):
    options = gpu.parse([f"--out={tmp_path}", "--models=gpt2,pythia-1b"])
    day = gpu.Day(options, dict(os.environ))
    assert {case.model for case in day.cases} == {"gpt2", "pythia-1b"}

    def run_case(case):
        ended = "failed with exit status 1" if case.model == "gpt2" else "done"
        monkeypatch.setattr(day, "left", lambda: 59.0)
        return dict(ended=ended, seconds=60.0 if case.model == "pythia-1b" else 1.0)

    monkeypatch.setattr(day, "_run_case", run_case)
    day._run_benchmark()
    ends = [case["ended"] for case in json.loads((tmp_path / "benchmark.json").read_text())]
    # After a case of 60 s the 59 that are left are too few.
    assert ends[:2] == ["failed with exit status 1", "done"]
    assert all("too little time" in end for end in ends[2:]) and len(ends) == 8


def test_pytest_output_is_read():
    log = "....F\nFAILED tests/a.py::test_b - AssertionError\n"
    log += "1 failed, 410 passed, 2 skipped in 63.05s (0:01:03)\n"
    found = gpu.read_pytest(log)
    assert found["counts"] == dict(failed=1, passed=410, skipped=2)
    assert found["failed"] == ["FAILED tests/a.py::test_b - AssertionError"]
    assert gpu.read_pytest("interrupted before any result")["counts"] == {}


def test_mfu_by_hand():
    sides = dict(ours=dict(model_flops_per_second=CHIPS["h100"].flops / 2))
    report = dict(
        about=dict(ours=dict(device="NVIDIA H100 80GB HBM3")), asked=dict(dtype="bfloat16"), **sides
    )
    assert gpu.mfu(report) == dict(ours=0.5)
    report["about"]["ours"]["device"] = "cpu"
    assert gpu.mfu(report) is None


def test_unknown_parts_and_full_folders_are_refused(tmp_path, capsys):
    (tmp_path / "summary.json").write_text("{}")
    for arguments, message in (
        (["--parts=tests,sweep"], "unknown: sweep"),
        (["--models=gpt5"], "unknown: gpt5"),
        ([f"--out={tmp_path}"], "has a summary.json already"),
    ):
        with pytest.raises(SystemExit):
            gpu.parse(arguments)
        assert message in capsys.readouterr().err


def test_relative_error_by_hand():
    expected = [np.array([3.0, 0.0]), np.array([4.0])]
    assert gpu_checks.relative_error(expected, expected) == 0
    found = [np.array([3.0, 0.3]), np.array([4.4])]
    assert gpu_checks.relative_error(found, expected) == pytest.approx(0.1)


def test_comparisons_are_kept_one_by_one(tmp_path):
    report = gpu_checks.Report(tmp_path / "checks.json")
    side = gpu_checks.Side(None, "bfloat16", "cudnn")
    report.add("a", side, errors=dict(output=0.01))
    report.add("b", side, errors=dict(output=float("nan")))
    report.add("c", side, failed="NotImplementedError: Unsupported sequence length")
    assert report.count() == (1, 3)
    lines = json.loads((tmp_path / "checks.json").read_text())
    assert [line["ok"] for line in lines] == [True, False, False]


@pytest.mark.slow
def test_rehearsal(tmp_path):
    pytest.importorskip("trl", reason="the peer is TRL")
    out = tmp_path / "out"
    shown = subprocess.run(
        ["experiments/benchmark/gpu.sh", "--rehearse", f"--out={out}"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=os.environ | dict(PYTHON=sys.executable, JAX_PLATFORMS="cpu"),
    )
    assert shown.returncode == 0, shown.stderr
    parts = json.loads((out / "summary.json").read_text())["parts"]
    assert parts.keys() == {"tests", "checks", "benchmark"}, shown.stdout
    assert parts["tests"]["counts"].keys() == {"passed"}
    assert parts["checks"]["agree"] == parts["checks"]["compared"] == 4
    (case,) = json.loads((out / "benchmark.json").read_text())
    assert case["report"]["ratios"]["trl"]["pairs_per_second"] > 0 and case["mfu"] is None
    assert "times trl's" in shown.stdout
