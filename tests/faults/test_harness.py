"""The harness itself: how ends are judged, moments drawn and counts written."""

import pytest

from tests.faults import jobs, kills, outcomes, report, signals
from tests.faults.outcomes import CLEAR, DEEP, HANGING, SAME, SILENT, Try
from tests.helpers.rows import write_jsonl

LEFT = {"dpo/hf/model.safetensors": "abc", "dpo/metrics.jsonl": ["1", "2"]}
TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1\nKeyError: 1'
REFUSAL = "WORKDIR is run\nerror: run/dpo/done.json: expected JSON. Remove the folder.\n"


def ended(*statuses, text="") -> jobs.Ended:
    return jobs.Ended(statuses, text, 1.0)


@pytest.mark.parametrize(
    ("end", "left", "expected"),
    [
        (ended(0), LEFT, SAME),
        (ended(0, 0), LEFT, SAME),
        (ended(0), LEFT | {"dpo/metrics.jsonl": ["1"]}, SILENT),
        (ended(0), {}, SILENT),
        (ended(2, text=REFUSAL), {}, CLEAR),
        (ended(2, text="usage: ..."), {}, SILENT),
        (ended(2, text=REFUSAL * 2), {}, SILENT),
        (ended(1), LEFT, SILENT),
        (ended(-11), LEFT, SILENT),
        (ended(1, text=TRACEBACK), {}, DEEP),
        (ended(0, text=TRACEBACK), LEFT, DEEP),
        (ended(2, text=TRACEBACK + "\n" + REFUSAL), {}, DEEP),
        (ended(0, None, text=TRACEBACK), {}, HANGING),
    ],
)
def test_judge_ends(end, left, expected):
    assert outcomes.judge(end, left, LEFT)[0] == expected


def test_result_leaves_out_times(tmp_path):
    """Two runs at different times of day are equal; another loss is not."""
    rows = [{"step": 1, "loss/train": 0.5, "seconds": 1.0}]
    found = []
    for name, loss, seconds in (("a", 0.5, 1.0), ("b", 0.5, 2.0), ("c", 0.25, 1.0)):
        folder = tmp_path / name / jobs.RUN / "dpo"
        rows = [{"step": 1, "loss/train": loss, "examples_per_second": seconds}]
        write_jsonl(folder / "metrics.jsonl", rows)
        (folder / "done.json.12.draft").write_text("cut")
        found.append(jobs.result(tmp_path / name))
    assert found[0] == found[1] != found[2]
    assert list(found[0]) == ["dpo/metrics.jsonl"]


def whole(name: str, processes: int = 1) -> jobs.Whole:
    return jobs.Whole(jobs.Job(name, "none", (), processes), {}, 10.0, 8.0, None, 0)


def test_kills_are_seeded_and_of_all_jobs():
    names = {"toy dpo": 1, "sample": 1, "dpo, 2 processes": 2}
    wholes = {name: whole(name, processes) for name, processes in names.items()}

    def drawn(seed):
        return [(what, one.keywords) for what, one in kills.plan(wholes, 18, seed)]

    assert drawn(0) == drawn(0) != drawn(1)
    rows = [what for what, _ in drawn(0)]
    assert {rows.count(name) for name in ("toy dpo", "sample")} == {6}
    # One of two processes twice as often as both.
    assert rows.count("dpo, 2 processes, one killed") == 4
    assert rows.count("dpo, 2 processes, both killed") == 2


@pytest.mark.parametrize(
    ("status", "text", "right"),
    [
        (143, "dpo: stopped by SIGTERM after step 3, which is saved", True),
        (143, "stopped by SIGTERM", True),
        (0, "all stages done", True),
        (143, "dpo 3/20", False),
        (130, "interrupted", False),
        (-15, "", False),
    ],
)
def test_end_after_sigterm(status, text, right):
    assert (not signals.wrong_end(ended(status, text=text), 15)) == right


def test_report_counts_and_names_bad_ends():
    tries = [
        Try("kills", "dpo", SAME, 10.0, "at 3 s"),
        Try("kills", "dpo", SILENT, 12.0, "dpo/metrics.jsonl: `differs`"),
        Try("surroundings", "| head", CLEAR, 9.0),
    ]
    parts = {
        part: report.record([one for one in tries if one.part == part], 2, "COMMAND", 3.0)
        for part in ("kills", "surroundings")
    }
    lines = report.text(parts).splitlines()
    assert "| kills | dpo | 2 | 1 | 0 | 1 | 0 | 0 |" in lines
    assert "| surroundings | \\| head | 1 | 0 | 1 | 0 | 0 | 0 |" in lines
    assert "| all |  | 3 | 1 | 1 | 1 | 0 | 0 |" in lines
    assert lines[-1] == "- kills, dpo: silent. `dpo/metrics.jsonl: 'differs'`"


@pytest.mark.slow
def test_a_few_real_faults(tmp_path):
    """A kill, a Ctrl-C and a closed stdout of the command sample."""
    from tests.faults import surroundings

    jobs.write_inputs(tmp_path / "inputs")
    job = jobs.make_jobs(tmp_path / "inputs")["sample"]
    uninterrupted = jobs.run_whole(job, tmp_path / "whole")
    tries = outcomes.Tries(tmp_path / "tries", workers=2)
    tries.run("kills", kills.plan({"sample": uninterrupted}, 2, seed=1))
    tries.run("signals", signals.plan({"sample": uninterrupted}, 2, seed=1))
    closed = surroundings.shell("exec >&-")
    tries.run(
        "closed", [("stdout", lambda at: surroundings.attempt(uninterrupted, at, wrapped=closed))]
    )
    assert [(one.outcome, one.detail) for one in tries.done if one.outcome in outcomes.BAD] == []
    assert len(tries.done) == 5


def test_parts_are_measured_one_by_one(tmp_path):
    """What is not measured again stays in the table."""
    for part, outcome in (("kills", SILENT), ("signals", SAME), ("kills", SAME)):
        tries = [Try(part, "dpo", outcome, 1.0)]
        report.write(tmp_path, {part: report.record(tries, 5, "COMMAND", 1.0)})
    page = (tmp_path / report.PAGE).read_text()
    assert "| kills | dpo | 1 | 1 |" in page and "| signals | dpo | 1 | 1 |" in page
    assert "| all |  | 2 | 2 | 0 | 0 | 0 | 0 |" in page
    assert "| kills | 1 of 5 | 1 | " in page  # a part that was stopped does not pass for whole
