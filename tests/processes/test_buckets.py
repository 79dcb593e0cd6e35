"""WORKDIR in a bucket that an emulator serves: machines are lost, and the bits stay the same."""

import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from dpo_jax.storage import buckets, shadow
from tests.faults import files, jobs
from tests.helpers import bucket_servers
from tests.helpers.tiny_runs import free_port

CONFIG = files.small_config("dpo")
CONFIG.run = "trained"  # the folder, which would follow from the flags
FLAGS = (
    "--config=toy",
    f"--config.run={CONFIG.run}",
    *(
        f"--config.{block}.{field}={CONFIG[block][field]}"
        for block, fields in files.SMALL.items()
        if block in CONFIG
        for field in fields
    ),
)
SLOW = 240.0  # seconds, of which a run takes about 20 on two idle cores


class Machines:
    """Machines that hold nothing at first: a process each, with a copy of the bucket of its own."""

    def __init__(self, folder: pathlib.Path, workdir: str, variables: dict, count: int):
        self.folder = folder
        self._logs = [folder / f"{index}.log" for index in range(count)]
        joined = []
        if count > 1:
            joined = [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
        job = jobs.Job("toy", "dpo_jax.train", FLAGS)
        # What is compiled is shared: only the time depends on it.
        (folder.parent / "programs").mkdir(parents=True, exist_ok=True)
        self._processes = []
        for index, log in enumerate(self._logs):
            self.copy(index).mkdir(parents=True)
            environment = jobs.environment(
                job,
                folder,
                **variables,
                DPO_JAX_SHADOW=str(self.copy(index)),
                JAX_COMPILATION_CACHE_DIR=str(folder.parent / "programs"),
            )
            own = [*joined, f"--process_id={index}"] if joined else []
            command = [sys.executable, "-m", job.module, *job.flags, f"--workdir={workdir}", *own]
            with log.open("wb") as file:
                self._processes.append(
                    subprocess.Popen(command, env=environment, cwd=folder, stdout=file, stderr=file)
                )

    def copy(self, index: int) -> pathlib.Path:
        """Return the folder of a machine's copy."""
        return self.folder / f"machine{index}"

    def kill(self, victims: tuple[int, ...], moment: Callable[[], bool]) -> None:
        """Send SIGKILL to some at a moment, and wait until all have ended."""
        while not moment():
            assert all(process.poll() is None for process in self._processes), self.shown()
            time.sleep(0.002)
        for index in victims:
            self._processes[index].kill()
        for process in self._processes:
            process.wait(SLOW)
        assert all(process.returncode for process in self._processes), self.shown()

    def end(self) -> str:
        """Wait until all have ended well; return what they printed."""
        for process in self._processes:
            process.wait(SLOW)
        assert not any(process.returncode for process in self._processes), self.shown()
        return self.shown()

    def shown(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self._logs)


def result_in_bucket(address: str, copy: pathlib.Path, monkeypatch, variables: dict) -> dict:
    """Return the result of a run, as a machine finds it that comes later."""
    for name, value in (variables | {"DPO_JAX_SHADOW": str(copy)}).items():
        monkeypatch.setenv(name, value)
    buckets._files.cache_clear()
    try:
        shadow.pull(shadow.place(address))
        return files.result_without_paths(shadow.place(address))
    finally:
        buckets._files.cache_clear()


def local_result(folder: pathlib.Path, devices: int) -> dict:
    """Return the result of a run in a folder, by one process."""
    files.run(CONFIG, folder, devices=devices)
    return files.result_without_paths(folder)


def is_saving(checkpoints: pathlib.Path) -> bool:
    """Return whether a checkpoint is there in part."""
    steps = checkpoints.glob("[0-9]*")
    return any(not (step / shadow.COMMITTED).exists() for step in steps)


def test_two_machines_lost_in_a_save_and_an_export(tmp_path, monkeypatch):
    with bucket_servers.gcs(tmp_path / "buckets") as variables:
        address = "gs://bucket/run"
        there = tmp_path / "buckets" / "bucket" / "run"
        first = Machines(tmp_path / "first", address, variables, 2)
        first.kill((1,), lambda: is_saving(there / CONFIG.run / "checkpoints"))
        second = Machines(tmp_path / "second", address, variables, 2)
        second.kill((0, 1), lambda: any(second.copy(0).glob(f"**/{CONFIG.run}/hf.partial")))
        third = Machines(tmp_path / "third", address, variables, 2)
        shown = third.end()
        assert "dpo: resuming after step" in shown
        found = result_in_bucket(address, tmp_path / "later", monkeypatch, variables)
    assert found == local_result(tmp_path / "local", devices=2)


@pytest.mark.slow
def test_one_machine_lost_on_s3(tmp_path, monkeypatch):
    with bucket_servers.s3() as variables:
        address = "s3://bucket/run"
        first = Machines(tmp_path / "first", address, variables, 1)
        checkpoints = first.copy(0) / "s3" / "bucket" / "run" / CONFIG.run / "checkpoints"
        first.kill((0,), lambda: (checkpoints / "2").exists())
        second = Machines(tmp_path / "second", address, variables, 1)
        second.kill((0,), lambda: any(second.copy(0).glob(f"**/{CONFIG.run}/hf.partial")))
        Machines(tmp_path / "third", address, variables, 1).end()
        found = result_in_bucket(address, tmp_path / "later", monkeypatch, variables)
    assert found == local_result(tmp_path / "local", devices=1)
