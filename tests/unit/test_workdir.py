"""Folders of stages: who works on one, and which is refused."""

import json
import threading

import pytest

from dpo_jax import config as configs
from dpo_jax.workdir import StageChanged, finish_stage, lock_folder, start_stage

VERSIONS = dict(tokenization=1, data_order=1, forward=1)


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
    with pytest.raises(StageChanged, match=f"unfinished dpo stage .*: {name} 1 there, 2 now"):
        status(tmp_path, **{name: 2})
    assert (folder / "checkpoints" / "40").exists()


@pytest.mark.parametrize("name", VERSIONS)
def test_start_stage_reuses_finished_version(tmp_path, name):
    finish_stage(begin(tmp_path))
    assert status(tmp_path, **{name: 2}) == "done"


def test_start_stage_without_version_is_1(tmp_path):
    path = begin(tmp_path) / "config.json"
    record = json.loads(path.read_text())
    del record["versions"]
    path.write_text(json.dumps(record))
    assert status(tmp_path) == "unfinished"
    with pytest.raises(StageChanged, match="forward 1 there, 2 now"):
        status(tmp_path, forward=2)


def test_start_stage_restarts_without_checkpoint(tmp_path):
    folder = begin(tmp_path)
    (folder / "checkpoints" / "40").rmdir()
    assert status(tmp_path, forward=2) == "new"
    assert json.loads((folder / "config.json").read_text())["versions"]["forward"] == 2
