"""Folders of stages: who works on one, and which is refused."""

import errno
import json
import pathlib
import threading

import pytest

from dpo_jax import check, workdir
from dpo_jax import config as configs
from dpo_jax.workdir import (
    StageChanged,
    check_files,
    completions,
    finish_stage,
    lock_folder,
    make_workdir,
    read_config,
    read_done,
    read_ledger,
    read_weights,
    start_date,
    start_stage,
    write_lines,
)
from tests.helpers import limits
from tests.helpers.clock import set_today
from tests.helpers.rows import change_record

VERSIONS = dict(tokenization=1, data_order=1, forward=1)


def test_make_workdir(tmp_path):
    make_workdir(tmp_path / "runs" / "mine")
    make_workdir(tmp_path / "runs" / "mine")
    assert (tmp_path / "runs" / "mine").is_dir()


@pytest.mark.parametrize("below", ["", "/mine"])
def test_make_workdir_refuses_a_file(tmp_path, below):
    (tmp_path / "FILE").write_text("")
    workdir = f"{tmp_path}/FILE{below}"
    with pytest.raises(NotADirectoryError, match=f"^--workdir={workdir}: expected a folder"):
        make_workdir(workdir)


def test_make_workdir_refuses_storage_that_renames_no_folder(tmp_path, monkeypatch):
    def rename(self, target):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(pathlib.Path, "rename", rename)
    with pytest.raises(OSError, match="cannot be renamed here .Operation not supported.*gs://"):
        make_workdir(tmp_path / "mounted")
    assert list((tmp_path / "mounted").iterdir()) == []


def test_make_workdir_says_what_the_system_refused():
    with pytest.raises(OSError, match=r"^--workdir=/proc/x: this folder cannot be made \(No such"):
        make_workdir("/proc/x")


def test_lock_folder_waits_a_moment(tmp_path):
    held, release = threading.Event(), threading.Event()

    def hold():
        with lock_folder(tmp_path):
            held.set()
            release.wait()

    threading.Thread(target=hold).start()
    held.wait()
    threading.Timer(0.3, release.set).start()
    with lock_folder(tmp_path):
        assert release.is_set()


def begin(workdir, versions=VERSIONS):
    """Start the dpo stage, and make a checkpoint in it; its folder."""
    folder, status = start_stage(workdir, configs.default(("dpo",)), "dpo", versions)
    assert status == "new"
    (folder / "checkpoints" / "40").mkdir(parents=True)
    return folder


def status(workdir, **versions):
    return start_stage(workdir, configs.default(("dpo",)), "dpo", VERSIONS | versions)[1]


def test_start_stage_resumes_same_version(tmp_path):
    begin(tmp_path)
    assert status(tmp_path) == "unfinished"


@pytest.mark.parametrize("name", VERSIONS)
def test_start_stage_refuses_other_version(tmp_path, name):
    folder = begin(tmp_path)
    with pytest.raises(StageChanged, match=f"unfinished dpo .*: {name} 1 in the folder, 2 now"):
        status(tmp_path, **{name: 2})
    assert (folder / "checkpoints" / "40").exists()


def test_start_stage_without_its_seed_is_0(tmp_path):
    """As in folders from before stages had seeds."""
    path = begin(tmp_path) / "config.json"
    change_record(path, lambda record: record["depends_on"].pop("dpo.seed"))
    assert status(tmp_path) == "unfinished"
    config = configs.default(("dpo",))
    config.dpo.seed = 1
    with pytest.raises(StageChanged, match=r"config.dpo.seed: 0 in the folder, 1 now"):
        start_stage(tmp_path, config, "dpo", VERSIONS)


@pytest.mark.parametrize("name", VERSIONS)
def test_start_stage_reuses_finished_version(tmp_path, name):
    finish_stage(begin(tmp_path))
    assert status(tmp_path, **{name: 2}) == "done"


def test_start_stage_without_version_is_1(tmp_path):
    path = begin(tmp_path) / "config.json"
    change_record(path, lambda record: record.pop("versions"))
    assert status(tmp_path) == "unfinished"
    with pytest.raises(StageChanged, match="forward 1 in the folder, 2 now"):
        status(tmp_path, forward=2)


def test_start_stage_resumes_a_folder_from_before_a_field(tmp_path):
    """Where the field has its default, as the folder's stage had no other behaviour."""
    folder = begin(tmp_path)
    change_record(folder / "config.json", lambda record: record["depends_on"].pop("dpo.patience"))
    assert status(tmp_path) == "unfinished"
    config = configs.default(("dpo",))
    config.dpo.update(patience=3, keep_best="loss/eval")
    with pytest.raises(StageChanged, match="config.dpo.patience: 0 in the folder, 3 now"):
        start_stage(tmp_path, config, "dpo", VERSIONS)


def test_start_stage_restarts_without_checkpoint(tmp_path):
    folder = begin(tmp_path)
    (folder / "checkpoints" / "40").rmdir()
    assert status(tmp_path, forward=2) == "new"
    assert json.loads((folder / "config.json").read_text())["versions"]["forward"] == 2


def test_start_stage_suggests_another_name(tmp_path):
    begin(tmp_path)
    config = configs.default(("dpo",))
    config.dpo.steps = 20
    with pytest.raises(StageChanged) as error:
        start_stage(tmp_path, config, "dpo", VERSIONS)
    assert "config.dpo.steps: 0 in the folder, 20 now" in str(error.value)
    assert "another --workdir or another name, such as --config.run=dpo-steps20." in str(
        error.value
    )
    config.seed = 1
    (tmp_path / "dpo-2").mkdir()
    with pytest.raises(StageChanged, match="--config.run=dpo-3[.]"):
        start_stage(tmp_path, config, "dpo", VERSIONS)


def test_start_stage_suggests_no_useless_name(tmp_path):
    """The folder of a stage before the last training stage has no other name."""
    config = configs.default(("sft", "dpo"))
    folder, _ = start_stage(tmp_path, config, "sft", VERSIONS)
    finish_stage(folder)
    config.sft.lr = 1.0
    with pytest.raises(StageChanged, match="or give another --workdir[.] Or remove"):
        start_stage(tmp_path, config, "sft", VERSIONS)


def test_start_stage_ignores_a_field_that_was_not_free_before(tmp_path):
    folder = begin(tmp_path)
    change_record(
        folder / "config.json",
        lambda record: record["depends_on"].update({"dpo.cache_reference": True}),
    )
    assert status(tmp_path) == "unfinished"


def test_start_stage_knows_defaults_of_newer_fields(tmp_path):
    """A folder of an earlier version lacks fields; it has their defaults, and refuses others."""
    names = ("data.weight", "data.margin", "dpo.reference_every", "dpo.reference_mix")

    def forget(record):
        for name in names:
            del record["depends_on"][name]

    change_record(begin(tmp_path) / "config.json", forget)
    assert status(tmp_path) == "unfinished"
    config = configs.default(("dpo",))
    config.data.weight, config.dpo.reference_every = "votes", 9
    with pytest.raises(StageChanged) as error:
        start_stage(tmp_path, config, "dpo", VERSIONS)
    assert "config.data.weight: '' in the folder, 'votes' now" in str(error.value)
    assert "config.dpo.reference_every: 0 in the folder, 9 now" in str(error.value)


# files that are not what was written


def finish(folder):
    """Finish a stage that left ten rows and a model."""
    write_lines(folder / "pairs.jsonl", [dict(number=number) for number in range(10)])
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    finish_stage(folder, pairs=10)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[: text.index("5") + 3], "it has 6 rows, and 10 were written"),
        (lambda text: text + '{"number": 10}\n', "it has 11 rows, and 10 were written"),
        (lambda text: text.replace("3", "4"), "its sha256 is not that of what was written"),
    ],
)
def test_check_files_counts_rows(tmp_path, change, said):
    folder = finish(begin(tmp_path))
    check_files(folder)
    path = folder / "pairs.jsonl"
    path.write_text(change(path.read_text()))
    with pytest.raises(
        ValueError, match=f"^{path} is not what was written there: {said}[.]"
    ) as error:
        check_files(folder)
    removed = f"{path} and {folder / 'done.json'}"
    assert f"or remove {removed} and run the stage's command again" in str(error.value)


def test_check_files_names_what_is_gone(tmp_path):
    folder = finish(begin(tmp_path))
    (folder / "hf" / "config.json").unlink()
    with pytest.raises(
        ValueError, match=f"^{folder}/hf/config.json is gone[.].*remove {folder}/hf"
    ):
        check_files(folder)


def test_check_files_names_a_folder_in_place_of_a_file(tmp_path):
    folder = finish(begin(tmp_path))
    (folder / "pairs.jsonl").unlink()
    (folder / "pairs.jsonl").mkdir()
    with pytest.raises(ValueError, match=f"^{folder}/pairs.jsonl is no file[.] Put it back"):
        check_files(folder)


@pytest.mark.parametrize(
    ("name", "read", "record"),
    [
        ("config.json", read_config, dict(date="soon")),
        ("config.json", read_config, dict(depends_on=[1])),
        ("done.json", workdir.read_done, dict(export=["float32"])),
        ("done.json", workdir.read_done, dict(export=dict(asked="float32"))),
        ("ledger.json", workdir.read_ledger, dict(prompts="7")),
        ("ledger.json", workdir.read_ledger, dict(fingerprint=7)),
        ("weights.json", workdir.read_weights, dict(reference="models/mine")),
        ("weights.json", workdir.read_weights, dict(reference=dict(path="models/mine"))),
    ],
)
def test_records_with_fields_of_other_types(tmp_path, name, read, record):
    """As an editor leaves them, without the sha256: one paragraph, not a TypeError."""
    (tmp_path / name).write_text(json.dumps(record))
    (field,) = record
    said = f"^{tmp_path / name} is not what was written there: .*its '{field}'.*(Put|Remove)"
    with pytest.raises(ValueError, match=said):
        read(tmp_path)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], "its 'files' is list in place of dict"),
        ({"pairs.jsonl": {}}, "does not say the bytes and the sha256 of pairs.jsonl"),
        ({"pairs.jsonl": dict(bytes=3)}, "does not say the bytes"),
        ({"pairs.jsonl": None}, "does not say the bytes"),
        ({"pairs.jsonl": dict(bytes="3", sha256="0")}, "does not say the bytes"),
        ({"pairs.jsonl": dict(bytes=3, sha256=["0"])}, "does not say the bytes"),
        ({"pairs.jsonl": dict(bytes=3, sha256="0", rows="x")}, "does not say the bytes"),
    ],
)
def test_check_files_refuses_an_edited_record(tmp_path, files, found):
    folder = finish(begin(tmp_path))
    (folder / "done.json").write_text(json.dumps(dict(files=files)))
    with pytest.raises(ValueError, match=f"{found}.* the stage's command again"):
        check_files(folder)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "it is empty"),
        (b"{", "its 1 bytes are not JSON"),
        (b"\xff\xfe", "its 2 bytes are not JSON"),
        (b"[1]", "it holds list in place of an object"),
        (b'{"a": 1, "sha256": "0"}', "its content is not that of its sha256"),
    ],
)
@pytest.mark.parametrize("read", [read_config, read_done, read_ledger, read_weights])
def test_records_that_are_damaged(tmp_path, read, data, found):
    name = read.__name__.removeprefix("read_") + ".json"
    (tmp_path / name).write_bytes(data)
    with pytest.raises(
        ValueError, match=f"^{tmp_path / name} is not what was .*: {found}[.] .*emove"
    ):
        read(tmp_path)


ROWS = [dict(tokens=[number]) for number in range(6)]


def sample_twice(folder):
    """Append the rows in two parts."""
    kept = completions(folder)
    assert kept.read() == []
    kept.append(ROWS[:4])
    kept.append(ROWS[4:])


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda data: data.replace(b"1", b"7"), 0),  # in the first part
        (lambda data: data.replace(b"5", b"7"), 4),
        (lambda data: data[:-20], 4),
        (lambda data: b"", 0),
    ],
)
def test_completions_that_changed_are_made_again(tmp_path, capsys, change, left):
    sample_twice(tmp_path)
    assert completions(tmp_path).read() == ROWS and not completions(tmp_path).problem()
    path = tmp_path / "completions.jsonl"
    path.write_bytes(change(path.read_bytes()))
    assert completions(tmp_path).problem()

    again = completions(tmp_path)
    assert again.read() == ROWS[:left]
    assert f"is not what was written there from row {left + 1} on" in capsys.readouterr().out
    assert (tmp_path / "completions.jsonl.damaged").exists()
    again.append(ROWS[left:])
    assert completions(tmp_path).read() == ROWS


def test_completions_after_a_kill(tmp_path, capsys):
    """Rows that were written before their sums are made again, without a word."""
    sample_twice(tmp_path)
    with (tmp_path / "completions.jsonl").open("a") as file:
        file.write(json.dumps(ROWS[0]) + '\n{"tok')
    assert completions(tmp_path).read() == ROWS
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "at_once", "left"),
    [
        (0, 0, 0),  # emptied
        (0, 4, 0),  # it begins with a line even where no rows are left
        (1, 1, 0),  # cut to the line of no rows
        (2, 1, 1),
        (3, 1, 2),
        (3, 0, 2),  # each write was of one row
    ],
)
def test_rows_whose_sums_were_cut_are_kept_aside(tmp_path, capsys, lines, at_once, left):
    """A kill leaves one write uncounted; more rows would be removed without a word."""
    kept = completions(tmp_path)
    assert kept.read() == []
    for row in ROWS[:4]:
        kept.append([row])
    path, sums = tmp_path / "completions.jsonl", tmp_path / "completions.sums"
    before = path.read_bytes()
    whole_sums = sums.read_text()
    sums.write_text("".join(whole_sums.splitlines(keepends=True)[:lines]))
    count = 4 - left
    found = f"{path} has {count} rows that completions.sums does not count"
    assert workdir.SealedRows(path, sums, at_once).problem() == found

    again = completions(tmp_path, at_once)
    assert again.read() == ROWS[:left]
    assert f"{found}, and is now completions.jsonl.damaged. Those" in capsys.readouterr().out
    assert (tmp_path / "completions.jsonl.damaged").read_bytes() == before
    for row in ROWS[left:4]:
        again.append([row])
    assert path.read_bytes() == before and sums.read_text() == whole_sums


def test_kill_in_the_first_write_and_after_a_cut(tmp_path, capsys):
    """No alarm: rows of one write are not counted."""
    kept = completions(tmp_path, at_once=4)
    assert kept.read() == []
    path = tmp_path / "completions.jsonl"
    rows = "".join(json.dumps(row) + "\n" for row in ROWS[:4])
    path.write_text(rows)
    assert not completions(tmp_path).problem()
    assert completions(tmp_path, at_once=4).read() == []

    kept = completions(tmp_path, at_once=4)
    assert kept.read() == []
    kept.append(ROWS[:4])
    kept.cut(0)
    path.write_text(rows)
    assert not completions(tmp_path).problem()
    assert completions(tmp_path, at_once=4).read() == []
    assert not capsys.readouterr().out and not path.with_name(f"{path.name}.damaged").exists()


def test_sums_that_a_kill_cut_short(tmp_path, capsys):
    """Though there is no row beyond them: the next sum must not be added to the torn one."""
    sample_twice(tmp_path)
    with (tmp_path / "completions.sums").open("a") as file:
        file.write("8 0123")
    kept = completions(tmp_path)
    assert kept.read() == ROWS
    kept.append(ROWS[:1])
    assert completions(tmp_path).read() == [*ROWS, ROWS[0]]
    assert not capsys.readouterr().out and not (tmp_path / "completions.jsonl.damaged").exists()


@pytest.mark.parametrize("full", ["completions.jsonl", "completions.sums"])
def test_completions_on_a_full_disk(tmp_path, capsys, full):
    (tmp_path / "whole").mkdir()
    sample_twice(tmp_path / "whole")
    kept = completions(tmp_path)
    assert kept.read() == []
    kept.append(ROWS[:4])
    # The row is shorter than its sum.
    size = (tmp_path / full).stat().st_size + 5
    rows = ROWS[4:] if full == "completions.jsonl" else []
    with limits.file_size(size), pytest.raises(OSError, match=f"{tmp_path / full}'$"):
        kept.append(rows)
    # With more room, the same command goes on.
    again = completions(tmp_path)
    assert again.read() == ROWS[:4] and not capsys.readouterr().out
    again.append(ROWS[4:])
    for name in ("completions.jsonl", "completions.sums"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# the date that chat templates take for today


def date_of(workdir, run="", stage="dpo"):
    """Start a stage of a run, or start it again; return its date."""
    config = configs.default(("sft", "dpo"))
    config.run = run
    folder, _ = start_stage(workdir, config, stage, VERSIONS)
    return start_date(folder).isoformat()


def test_date_is_that_of_the_start(tmp_path, monkeypatch):
    set_today(monkeypatch, "2026-11-26")
    assert date_of(tmp_path) == "2026-11-26"
    (tmp_path / "dpo" / "checkpoints" / "40").mkdir(parents=True)
    set_today(monkeypatch, "2026-11-27")
    assert date_of(tmp_path) == "2026-11-26"
    # A stage that has nothing to resume from starts anew.
    (tmp_path / "dpo" / "checkpoints" / "40").rmdir()
    assert date_of(tmp_path) == "2026-11-27"


def test_date_of_a_later_stage_is_its_own(tmp_path, monkeypatch):
    set_today(monkeypatch, "2026-11-26")
    assert date_of(tmp_path, stage="sft") == "2026-11-26"
    finish_stage(tmp_path / "sft")
    set_today(monkeypatch, "2026-11-27")
    assert date_of(tmp_path) == "2026-11-27"


def test_date_is_shared_by_runs_of_a_stage(tmp_path, monkeypatch):
    """A sweep's runs read the same tokens, on whichever days they are started."""
    set_today(monkeypatch, "2026-11-26")
    assert date_of(tmp_path, run="failed") == "2026-11-26"  # and has made nothing
    set_today(monkeypatch, "2026-11-27")
    assert date_of(tmp_path, run="first") == "2026-11-27"
    finish_stage(tmp_path / "first")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").write_text("mine")
    (tmp_path / "notes" / "done.json").write_text("mine")
    set_today(monkeypatch, "2026-11-28")
    assert date_of(tmp_path, run="second") == "2026-11-27"
    assert date_of(tmp_path, stage="sft") == "2026-11-28"


def test_date_of_a_folder_without_one(tmp_path, monkeypatch):
    path = begin(tmp_path) / "config.json"
    change_record(path, lambda record: record.pop("date"))
    today = set_today(monkeypatch, "2026-11-26")
    assert start_date(path.parent) == today
    assert date_of(tmp_path, run="second") == "2026-11-26"


def test_check_tells_all_that_was_set_aside(tmp_path, capsys):
    """Also what was damaged a second time."""
    folder = tmp_path / "dpo"
    for name in ("3.damaged", "3.damaged2"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    workdir.write_record(folder / "config.json", {})
    assert check.report(tmp_path) == 0
    told = capsys.readouterr().out
    assert "dpo/checkpoints/3.damaged, dpo/checkpoints/3.damaged2\n" in told
