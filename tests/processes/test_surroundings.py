"""Commands without what a process usually has, and commands that are told to stop."""

import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import poor
from tests.helpers.paths import ROOT, STORIES
from tests.helpers.rows import write_jsonl
from tests.helpers.tiny_runs import environment


@pytest.fixture
def train(tmp_path):
    """The command line of a short training run."""
    rows = [dict(prompt="Once", completion=" upon a time"), dict(prompt="Tom", completion=" ran")]
    data = write_jsonl(tmp_path / "sft.jsonl", rows * 2)
    flags = dict(
        path=STORIES, eval_fraction=0.0, batch_size=2, steps=3, warmup_steps=1, show=1, run="sft-a"
    )
    blocks = dict(path="model", eval_fraction="data", show="data", run="")
    command = [sys.executable, "-m", "dpo_jax", "train", "--config=sft"]
    for name, value in flags.items():
        block = blocks.get(name, "sft")
        command.append(f"--config.{block}{'.' * bool(block)}{name}={value}")
    return [*command, f"--config.data.path={data}", f"--workdir={tmp_path / 'run'}"]


def test_training_needs_no_home_no_locks_no_utf8_and_no_reader(train, tmp_path):
    env = poor.environment(tmp_path) | dict(JAX_COMPILATION_CACHE_DIR="/proc/1/nowhere")
    process = subprocess.Popen(
        train, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    shown = ""
    while "\\u27e6" not in shown:  # a row with marks that ASCII lacks
        line = process.stdout.readline()
        assert line, process.stderr.read()
        shown += line
    process.stdout.close()  # as `| head` does
    said = process.stderr.read()
    assert process.wait() == 0, said
    assert "cannot be locked (No locks available)" in shown
    assert said.count("compiled programs are not kept, as /proc/1/nowhere") == 1
    assert "Traceback" not in said and "Error" not in said
    assert (tmp_path / "run" / "sft-a" / "done.json").exists()
    assert not (ROOT / "~").exists()


def test_training_needs_no_streams(train, tmp_path):
    line = " ".join(train) + " >&- 2>&-"
    done = subprocess.run(line, shell=True, cwd=ROOT, env=environment())
    assert done.returncode == 0
    assert (tmp_path / "run" / "sft-a" / "done.json").exists()


def stop_when(command, is_time, how, env=None):
    """Start a command, and send it a signal when it is time; return status, stdout and stderr."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env or environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # pytest may itself have been started in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    is_time(process)
    began = time.monotonic()
    process.send_signal(how)
    out, err = process.communicate()
    assert time.monotonic() - began < 10
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("how", "said"), [(signal.SIGTERM, "stopped by SIGTERM\n"), (signal.SIGINT, "interrupted\n")]
)
@pytest.mark.parametrize("module", ["dpo_jax", "dpo_jax.train"])
def test_a_signal_ends_an_import_with_one_line(module, how, said):
    command = [sys.executable, "-X", "importtime", "-m", module]
    command += ["train"] if module == "dpo_jax" else []

    def imports(process):
        # A line for each module; the package itself is at its end.
        for line in process.stderr:
            if line.endswith(" absl\n"):
                return

    status, out, err = stop_when(command, imports, how)
    assert (status, out) == (128 + how, "")
    assert [line for line in err.splitlines(True) if not line.startswith("import time:")] == [said]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_reading_of_data_with_one_line(train, tmp_path, how):
    pipe = tmp_path / "endless.jsonl"
    row = '{"prompt": "Once", "completion": " upon a time"}\n'
    pipe.write_text(row * 400_000)
    command = [*train, f"--config.data.path={pipe}"]

    def reads(process):
        assert process.stdout.readline().startswith("WORKDIR is")
        time.sleep(1)

    status, out, err = stop_when(command, reads, how)
    said = "interrupted\n" if how == signal.SIGINT else "stopped by SIGTERM\n"
    assert (status, err) == (128 + how, said), out


def test_signal_while_python_ends_changes_no_status():
    """All is done by then, but Python has taken away the handlers of its own."""
    program = """
import os
from dpo_jax import stopping
stopping.end_at_once()
class Late:
    def __del__(self, kill=os.kill, me=os.getpid()):
        kill(me, 15)
late = Late()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert done.returncode == 0
