"""Two processes that take turns: the benchmark asks by a line of JSON on stdin, a worker answers by
one on stdout.

Between its turns a worker waits for a line, and so takes nothing from the other. Standard library
only: the peer's Python need have none of ours.
"""

import json
import os
import pathlib
import subprocess
import sys


class Worker:
    """A worker's process, as the benchmark sees it. What it prints is in FOLDER/NAME.log."""

    def __init__(self, name: str, python: str, folder: pathlib.Path, **environment: str):
        self.name, self._log = name, folder / f"{name}.log"
        root = pathlib.Path(__file__).parents[2]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, "-m", f"experiments.benchmark.{name}", str(folder)],
                cwd=root,
                text=True,
                stderr=log,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | environment,
            )

    def ask(self, do: str, **fields) -> dict:
        """The answer; RuntimeError with the last lines that the worker printed, where it has ended
        instead.
        """
        try:
            self._process.stdin.write(json.dumps(dict(do=do, **fields)) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            printed = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(
                f"the worker {self.name!r} ended with code {code}, asked for {do!r}:\n{printed}"
            )
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process; an end of its input is what it stops at."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Turns:
    """The benchmark, as a worker sees it. Whatever else the worker prints goes to stderr."""

    def __init__(self, **answers):
        """answers: what is asked -> function of its fields -> answer, a dict."""
        self._answers = answers
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> int:
        """Answers until steps are asked for; how many. Ends the process where the benchmark has."""
        for line in sys.stdin:
            asked = json.loads(line)
            if asked["do"] == "steps":
                return asked["count"]
            self.answer(self._answers[asked.pop("do")](**asked))
        sys.stderr.flush()
        os._exit(0)  # at once: a library's threads and exit handlers have nothing left to do

    def answer(self, found: dict) -> None:
        self._out.write(json.dumps(found) + "\n")
        self._out.flush()


def peak_resident_bytes() -> int:
    """The most memory that this process has held (VmHWM of Linux)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: peak memory is measured on Linux only.")
