"""An upload after a run of two processes: one does it, and the other need not wait."""

import subprocess
import sys

from tests.helpers.paths import ROOT
from tests.helpers.tiny_runs import environment, free_port

# `train` with the hub's client replaced; the upload takes longer than the other process lives.
PROGRAM = """
import time
import huggingface_hub
from dpo_jax import train
class FakeHub:
    def create_repo(self, repo_id, **_):
        time.sleep(3)
    def upload_folder(self, *, repo_id, folder_path, **_):
        print("sent", folder_path, "to", repo_id, flush=True)
huggingface_hub.HfApi = FakeHub
train.main()
"""


def test_first_process_uploads(model, pairs, tmp_path):
    port = free_port()
    flags = [
        "--config=dpo",
        f"--config.model.path={model}",
        f"--config.data.path={pairs}",
        "--config.dpo.steps=1",
        "--config.dpo.batch_size=8",
        "--config.run=mine",
        f"--workdir={tmp_path}",
        "--push=me/tiny",
        f"--coordinator=localhost:{port}",
        "--num_processes=2",
    ]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *flags, f"--process_id={index}"],
            cwd=ROOT,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    assert not any(process.returncode for process in started), outputs
    assert f"sent {tmp_path / 'mine' / 'hf'} to me/tiny" in outputs[0][0]
    assert "sent" not in outputs[1][0] and "uploading" not in outputs[1][0]
