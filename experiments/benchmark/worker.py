"""Let processes take turns: the benchmark asks by a line of JSON, and a worker answers by one.

Questions come on the worker's stdin and answers go to its stdout. Between its turns a worker waits
for a line, so it takes no time from the other. Imports the standard library only, as the peer's
Python need not have our packages.
"""

import json
import os
import pathlib
import subprocess
import sys


class Worker:
    """A worker's process, as the benchmark sees it. What it prints goes to FOLDER/NAME.log."""

    def __init__(self, name: str, python: str, folder: pathlib.Path, **environment: str):
        self.name = name
        self._log = folder / f"{name}.log"
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
        """Ask the worker to do something, and return its answer.

        Raises RuntimeError, with the last lines that the worker printed, if it ended instead.
        """
        question = json.dumps(dict(do=do, **fields))
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            last_lines = self._log.read_text(errors="replace").splitlines()[-20:]
            printed = "\n".join(last_lines)
            raise RuntimeError(
                f"the worker {self.name!r} ended with code {code}, asked for {do!r}:\n{printed}"
            )
        return json.loads(answer)

    def close(self) -> None:
        """End the process, which stops at the end of its input."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Turns:
    """The benchmark, as a worker sees it. Whatever else the worker prints goes to stderr."""

    def __init__(self, **answers):
        """answers: what may be asked -> a function of the question's fields that answers a dict."""
        self.answers = answers
        # Libraries print to stdout too, so the answers keep it and everything else gets stderr.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> int:
        """Answer until steps are asked for, and return how many.

        Ends the process when the benchmark has ended.
        """
        for line in sys.stdin:
            fields = json.loads(line)
            do = fields.pop("do")
            if do == "steps":
                return fields["count"]
            found = self.answers[do](**fields)
            self.answer(found)
        sys.stderr.flush()
        os._exit(0)  # at once: a library's threads and exit handlers have nothing left to do

    def answer(self, found: dict) -> None:
        """Send an answer to the benchmark."""
        self._out.write(json.dumps(found) + "\n")
        self._out.flush()


def peak_resident_bytes() -> int:
    """Return the most memory that this process has held (VmHWM on Linux)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: peak memory is measured on Linux only.")
