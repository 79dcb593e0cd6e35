"""The harness itself: how ends are judged, moments drawn and counts written."""

import pathlib

import pytest

from tests.faults import files, jobs, kills, outcomes, report, signals
from tests.faults.load import Result
from tests.faults.outcomes import CLEAR, DEEP, HANGING, SAME, SILENT, TOLD, Try
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
        Try("kills", "dpo", SILENT, 12.0, "dpo/metrics.jsonl: `differs` in /tmp/a1/b/dpo"),
        Try("kills", "dpo", TOLD, 11.0, "metrics.jsonl emptied"),
        Try("surroundings", "| head", CLEAR, 9.0),
    ]
    parts = {
        part: report.record([one for one in tries if one.part == part], 2, "COMMAND", 3.0)
        for part in ("kills", "surroundings")
    }
    lines = report.text(parts).splitlines()
    assert "| kills | dpo | 3 | 1 | 1 | 0 | 1 | 0 | 0 |" in lines
    assert "| surroundings | \\| head | 1 | 0 | 0 | 1 | 0 | 0 | 0 |" in lines
    assert "| all |  | 4 | 1 | 1 | 1 | 1 | 0 | 0 |" in lines
    # No folder of this machine.
    assert lines[-1] == "- kills, dpo: silent. `dpo/metrics.jsonl: 'differs' in .../dpo`"


def test_record_keeps_only_what_is_bad(tmp_path):
    tries = [Try("hostile", "data .csv", CLEAR, 0.0, f"cut {i}") for i in range(100)]
    tries.append(Try("hostile", "data .csv", DEEP, 0.0, "flipped"))
    report.write(tmp_path, {"hostile": report.record(tries, 101, "COMMAND", 1.0)})
    lines = (tmp_path / report.RECORD).read_text().splitlines()
    assert len(lines) == 3 and "flipped" in lines[2]
    assert "| hostile | data .csv | 101 | 0 | 0 | 100 | 0 | 1 | 0 |" in report.text(
        report.write(tmp_path, {})
    )


def test_report_shows_load():
    measured = [Result("1,000 steps", "5 MiB more", "100 MiB more", True)]
    page = report.text({"load": report.record([], 4, "COMMAND", 9.0, measured)})
    assert "| 1,000 steps | 5 MiB more | 100 MiB more | yes |" in page
    assert "| load | 1 of 4 | 9 |" in page


@pytest.mark.parametrize(
    ("name", "refusal", "expected"),
    [
        ("sft/hf/a.json", "W/sft/hf/a.json is gone. Put it back from a copy.", True),
        ("sft/hf/a.json", "W/sft/hf/b.json is gone. Put it back from a copy.", False),
        ("sft/hf/a.json", "W/sft/hf/a.json is gone.", False),
        ("sft/hf/a.json", "W/sft/hf/a.json is gone in the background.", False),
        ("sft/hf/a.json", "W/sft/hf/a.json is gone.\n\nRemove it.", False),
        ("sft/config.json", "W/sft has no config.json. Remove the folder.", True),
        ("sft/checkpoints/2/d/x", "W/sft/checkpoints/2 cannot be read. Remove it.", True),
        ("sft/checkpoints/2/d/x", "W/sft/checkpoints/20 cannot be read. Remove it.", False),
        ("sft/checkpoints/2/d/x", "W/sft/checkpoints has none. Remove it.", False),
    ],
)
def test_refusal_must_name_the_file_and_a_remedy(name, refusal, expected):
    assert files.names_damage(refusal, pathlib.Path("W"), name) == expected


def test_damage_that_check_takes_for_whole_is_silent(tmp_path, monkeypatch):
    """Each end has the line of its own damage."""
    (tmp_path / "source" / "sft").mkdir(parents=True)
    (tmp_path / "source" / "sft" / "done.json").write_text("{}")
    ends = {"cut": (SAME, ""), "emptied": (CLEAR, "it is empty"), "flipped": (DEEP, "KeyError")}

    def end(config, workdir, wanted, name):
        held = (workdir / name).read_bytes() if (workdir / name).exists() else None
        how = next(how for how, data in files.damages(b"{}") if data == held)
        return ends.get(how, (SAME, ""))

    monkeypatch.setattr(files, "_outcome", end)
    monkeypatch.setattr(files.check, "check", lambda folder: [files.check.Finding("sft/done.json")])
    tries = files.try_all(None, tmp_path / "source", {}, what="a run")
    found = {one.detail.split(":")[0]: one.outcome for one in tries}
    assert found == {
        "sft/done.json cut": SILENT,
        "sft/done.json emptied": SILENT,
        "sft/done.json flipped": DEEP,
        "sft/done.json removed": SAME,
    }
    assert "KeyError" in tries[2].detail


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
    assert "| all |  | 2 | 2 | 0 | 0 | 0 | 0 | 0 |" in page
    assert "| kills | 1 of 5 | 1 | " in page  # a part that was stopped does not pass for whole
