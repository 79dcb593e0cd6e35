"""Hostile data files: each is taken with counts that add up, or refused by name."""

import os
import pathlib

import pytest

from dpo_jax.data import tokenizer as tokenizers
from tests.helpers.paths import STORIES
from tests.helpers.rows import read
from tests.hostile import data
from tests.hostile.judging import refusal_of


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    return list(data.verdicts(folder, tokenizers.load(STORIES)))


def test_every_case_is_taken_or_refused(found):
    assert len({case.content for case, _ in found}) >= 300
    wrong = []
    for case, verdict in found:
        if not verdict.is_right:
            wrong.append(f"{case.name}: {verdict.verdict}: {verdict.words}")
    assert not wrong, "\n".join(wrong)


# What is wrong with these is no matter of one row, so nothing is dropped.
@pytest.mark.parametrize(
    "damage",
    [
        "nothing",
        "a quote without an end",
        "a quote that ends within",
        "a long cell",
        "header: a column twice",
        "more cells in every row",
        "header: blank names",
        "UTF-16",
        "the start of a gzip file",
        "a format that is not read",
    ],
)
def test_files_that_are_refused_whole(found, damage):
    verdicts = {verdict.verdict for case, verdict in found if case.damage == damage}
    assert verdicts == {"refused"}


@pytest.mark.parametrize(
    "damage",
    ["5,000 digits", "nesting", "a key twice", "half a surrogate", "a long line", "more cells",
     "fewer cells", "the header again"],
)  # fmt: skip
def test_bad_rows_stop_or_are_dropped(found, damage):
    for case, verdict in found:
        # A JSON array cannot be read on behind what is no JSON.
        if case.damage != damage or case.suffix == ".json":
            continue
        if case.place.endswith("drop"):
            expected = f"{data.ROWS + 1} read, {data.ROWS - 1} kept, 1 held out"
            assert (verdict.verdict, verdict.words) == ("taken", expected), case.name
        else:
            assert verdict.verdict == "refused" and " row " in verdict.words, case.name


def test_a_reader_that_shifts_columns_is_found(tmp_path, monkeypatch):
    """The counts add up, but the texts are those of other columns."""
    case = next(case for case in data.cases() if case.damage == "more cells in every row")
    load = data.dataset.load

    def shifted(settings, *rest):
        path = pathlib.Path(settings.path)
        lines = path.read_text().splitlines()
        path.write_text("".join(",".join(line.split(",")[:3]) + "\n" for line in lines))
        return load(settings, *rest)

    monkeypatch.setattr(data.dataset, "load", shifted)
    verdict = data.judge(case, tmp_path, tokenizers.load(STORIES))
    assert verdict.verdict == "silent" and "which no row has" in verdict.words


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_files_that_may_not_be_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(data.FORMATS[".jsonl"](data.good_rows()))
    file.chmod(0)
    assert str(file) in refusal_of(lambda: read(file))
