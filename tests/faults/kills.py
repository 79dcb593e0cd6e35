"""kill -9 at random moments: the same command, given again, ends with the same bits."""

import functools
import pathlib
import random
import signal
import subprocess
import time

from tests.faults import jobs, outcomes

PART = "kills"
JOBS = (
    "toy dpo",
    "toy ppo",
    "dpo",
    "lora",
    "sample",
    "dpo, 2 processes",
    "sample, 2 processes",
    "judge",
)
# Files that are there for a moment only: a checkpoint, an export and a small file being written.
AIMED = {
    "in a save": "run/**/*.orbax-checkpoint-tmp*",
    "in an export": "run/**/*partial*",
    "in a small file": "run/**/*.draft",
}
WITH_EXPORTS = ("toy dpo", "toy ppo", "dpo", "lora")  # jobs that save and export
# Who is killed of two processes.
VICTIMS = ((0,), (1,), (0, 1))
# Every so often the compile cache is empty at the start, so that a kill may fall into a compile.
COLD = 6
MOST_TRIES = 5  # of a moment that comes too late, as the command has ended
POLL = 0.001  # seconds


def plan(wholes: dict[str, jobs.Whole], count: int, seed: int):
    """Yield (row of the table, function of a folder) for so many kills, all jobs in turn."""
    rng = random.Random(f"kills {seed}")
    names = list(wholes)
    for number in range(count):
        name = names[number % len(names)]
        whole = wholes[name]
        victims = tuple(range(whole.job.processes))
        if whole.job.processes > 1:
            victims = VICTIMS[number // len(names) % len(VICTIMS)]
        aim = ""
        if name in WITH_EXPORTS and rng.random() < 0.4:
            aim = rng.choice(list(AIMED))
        share = rng.random()
        cold = number % COLD == COLD - 1
        function = functools.partial(
            kill_and_repeat, whole, victims=victims, share=share, aim=aim, cold=cold
        )
        who = ""
        if whole.job.processes > 1:
            who = ", both killed" if len(victims) > 1 else ", one killed"
        yield name + who, function


def kill_and_repeat(
    whole: jobs.Whole,
    folder: pathlib.Path,
    *,
    victims: tuple[int, ...],
    share: float,
    aim: str,
    cold: bool,
) -> tuple[str, str]:
    """Kill a job once, run it to its end, and judge; return the outcome and the moment.

    share: of the uninterrupted run's time at which the kill comes. aim: what it waits for instead,
    from that moment on if it comes more than once.
    """
    job = whole.job
    for attempt in range(MOST_TRIES):
        here = jobs.prepare(job, folder / str(attempt), None if cold else whole.cache)
        moment = whole.seconds * share * 0.8**attempt
        started = jobs.start(job, here, log="killed")
        if strike(started, here, moment, AIMED.get(aim, ""), victims):
            break
        jobs.wait(started, here, "killed")
    else:
        return outcomes.SILENT, "it was always too late for the kill"
    words = f"{aim or 'at'} {moment:.2f} s" + (", cold cache" if cold else "")
    if len(victims) > 1 and len(victims) == job.processes or job.processes == 1:
        jobs.wait(started, here, "killed")
    else:
        # The others must find out by themselves that one has gone.
        others = jobs.wait(started, here, "killed")
        if others.hanging:
            return outcomes.HANGING, f"{words}: the other process did not end"
    ended = jobs.run(job, here, log="again")
    outcome, wrong = outcomes.judge(ended, jobs.result(here), whole.result)
    return outcome, f"{words} {wrong}".strip()


def strike(
    started: list[subprocess.Popen],
    folder: pathlib.Path,
    moment: float,
    pattern: str,
    victims: tuple[int, ...],
    how: signal.Signals = signal.SIGKILL,
) -> bool:
    """Send a signal at a moment, or after it once a file of a pattern is there.

    Returns False where the processes had ended before.
    """
    due = time.monotonic() + (moment * 0.5 if pattern else moment)
    while time.monotonic() < due:
        time.sleep(POLL)
        if any(process.poll() is not None for process in started):
            return False
    while pattern and not any(folder.glob(pattern)):
        time.sleep(POLL)
        if any(process.poll() is not None for process in started):
            return False
    for index in victims:
        started[index].send_signal(how)
    return True
