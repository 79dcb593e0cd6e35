"""A judge in processes of its own: killed, and two at once."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dpo_jax.evaluation.judge import compare
from tests.helpers.comparisons import LONGER_WINS, a_judge, asked, comparisons, kept, quiet
from tests.helpers.judge_server import (
    KEY,
    Hang,
    JudgeServer,
    Status,
    longer,
    prefers,
)
from tests.helpers.paths import ROOT

PROGRAM = """
import signal, sys
from dpo_jax.evaluation.judge import Judge, compare
from tests.helpers.comparisons import comparisons
# A shell starts jobs in the background without this handler.
signal.signal(signal.SIGINT, signal.default_int_handler)
folder, count, concurrency, model = sys.argv[1:]
assert not {"jax", "transformers", "datasets"} & sys.modules.keys()
judge = Judge(model=model, template="summary_concise", concurrency=int(concurrency))
print(compare(judge, comparisons(int(count)), folder))
"""


def python_compare(server, folder, count, concurrency, model="judge", **env) -> subprocess.Popen:
    """The evaluation in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, folder, str(count), str(concurrency), model],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | server.variables() | env,
    )


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_compare_after_kill_pays_nothing_twice(how, tmp_path):
    """Twenty answers are given, then none; what was answered before the kill is not asked again."""
    answered, lock = [], threading.Lock()
    path = tmp_path / "judgements.jsonl"

    def behave(prompt, times):
        with lock:
            if len(answered) == 20:
                return Hang()
            answered.append(prompt)
        return prefers(longer)(prompt, times)

    with JudgeServer(behave) as server:
        process = python_compare(server, tmp_path, 40, concurrency=4)
        wait_for(
            lambda: (
                path.exists()
                and path.read_bytes().count(b"\n") == 20
                and len(server.requests) == 24
            )
        )
        process.send_signal(how)
        assert process.wait(60) != 0
    with path.open("ab") as file:  # what a kill in the middle of a write leaves
        file.write(path.read_bytes().splitlines()[3][:100])
    with JudgeServer(prefers(longer)) as server, server.environment():
        assert compare(a_judge(), comparisons(40), tmp_path, quiet) == LONGER_WINS * 10
    assert (
        sorted(answered + server.prompts) == sorted(set(answered + server.prompts))
        and len(server.prompts) == 20
    )
    rows = kept(tmp_path)
    assert len(rows) == len({row["key"] for row in rows}) == 40


def test_compare_locks_its_file(tmp_path):
    with (tmp_path / "judgements.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process is writing to .*judgements.jsonl"):
            compare(a_judge(), comparisons(1), tmp_path, quiet)


def test_key_is_written_nowhere(tmp_path):
    """Not even where the judge repeats it: in its answers, its name, or a refusal, with the
    client's log turned on.
    """

    def behave(prompt, times):
        if asked(prompt) == 7:
            return Status(401, dict(error=dict(message=f"bad key {KEY}")))
        return f"Your key is {KEY}.\n" + prefers(longer)(prompt, times)

    with JudgeServer(behave) as server:
        process = python_compare(
            server, tmp_path, 8, concurrency=1, model=f"judge-{KEY}", OPENAI_LOG="debug"
        )
        written = "".join(process.communicate(timeout=60))
    assert process.returncode == 1
    assert (
        "check OPENAI_API_KEY" in written and "HTTP Request" in written and "Traceback" in written
    )
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files[0].splitlines()) == 7 and "Your key is [OPENAI_API_KEY]" in files[0]
    assert KEY not in written and all(KEY not in text for text in files)
