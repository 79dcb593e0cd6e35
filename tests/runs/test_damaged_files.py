"""Files of a WORKDIR are damaged in turn: the same command ends with the same bits, or says so."""

import zlib

import pytest

from dpo_jax import check
from tests.faults import files, outcomes

PART = 10  # one in so many damages is tried here; python -m tests.faults tries all


def is_tried(name: str) -> bool:
    """Choose a part of all damages by their names, less those that hold a random number."""
    *folders, last = name.split("/")
    stable = name if len(last) < 32 else "/".join(folders)
    return zlib.crc32(stable.encode()) % PART == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


def test_damaged_files_are_never_used(folder):
    tries = files.count("dpo", folder, is_tried=is_tried, with_check=False)
    assert len(tries) > 20
    assert [one for one in tries if one.outcome in outcomes.BAD] == []


@pytest.mark.slow
def test_best_checkpoint_without_its_metric_is_named(tmp_path):
    tries = files.count("keep_best", tmp_path, is_tried=lambda name: "metrics/metrics" in name)
    refused = [one.detail for one in tries if one.outcome == outcomes.CLEAR]
    assert [one for one in tries if one.outcome in outcomes.BAD] == []
    assert refused and all("the best logps_eval/chosen" in words for words in refused)


def test_check_reports_each_part(folder, capsys):
    workdir = folder / "finished"
    assert check.report(workdir) == 0
    lines = capsys.readouterr().out.splitlines()
    parts = [line.split()[0] for line in lines[:-1]]
    assert {"sft/checkpoints/4", "dpo/hf", "pairs/pairs.jsonl", "evaluate/toy.json"} <= {*parts}
    assert lines[-1] == f"{len(parts)} of {len(parts)} are whole"

    path = workdir / "pairs" / "pairs.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[: len(rows) // 2]))
    assert check.report(workdir) == 1
    said = f"it has {len(rows) // 2} rows, and {len(rows)} were written"
    assert said in capsys.readouterr().out
    path.write_text("".join(rows))


def test_check_refuses_folder_without_runs(tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path} holds nothing that a run has left"):
        check.report(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", files.KINDS)
def test_every_damage_of_every_file(kind, tmp_path):
    tries = files.count(kind, tmp_path)
    assert [one for one in tries if one.outcome in outcomes.BAD] == []
