"""kill -9 at random moments: the same command, given again, ends with the same bits."""

import functools
import pathlib
import random
import signal
import subprocess
import time

from dpo_jax.parallel import meeting
from tests.faults import jobs, outcomes

PART = "kills"
JOBS = (
    "toy dpo",
    "toy ppo",
    "rounds",
    "dpo",
    "lora",
    "sample",
    "dpo, 2 processes",
    "sample, 2 processes",
    "judge",
)
# Files of a checkpoint or an export that is being written, and the first answer of a judge.
AIMED = {
    "in a save": "run/**/*.orbax-checkpoint-tmp*",
    "in an export": "run/**/*partial*",
    "in judging": "run/**/judgements.jsonl",
}
# Job -> the aims that it may have.
TRAINING = ("in a save", "in an export")
AIMS_OF = {
    "toy dpo": TRAINING,
    "toy ppo": TRAINING,
    "rounds": TRAINING,
    "dpo": TRAINING,
    "lora": TRAINING,
    "judge": ("in judging",),
}
AIMED_SHARE = 0.4  # of the kills of a job that may be aimed
# Who is killed of two processes.
VICTIMS = ((0,), (1,), (0, 1))
# Every so often the compile cache is empty at the start, so that a kill may fall into a compile.
COLD = 6
MOST_TRIES = 5  # of a moment that comes too late, as the command has ended
POLL = 0.002  # seconds
# Seconds in which a process must see that the other has gone: it waits long for one to come.
MEETING = meeting.PATIENCE + 180.0


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
        if name in AIMS_OF and rng.random() < AIMED_SHARE:
            aim = rng.choice(AIMS_OF[name])
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

    share: of the uninterrupted run's time at which the kill comes. aim: what it waits for, from
    half of that moment on; a file that is gone too fast is aimed at once.
    """
    job = whole.job
    for attempt in range(MOST_TRIES):
        here = jobs.prepare(job, folder / str(attempt), None if cold else whole.cache)
        moment = whole.cpu_seconds * share * 0.8**attempt
        if attempt:
            aim = ""
        started = jobs.start(job, here, log="killed")
        if strike(started, here, moment, AIMED.get(aim, ""), victims):
            break
        jobs.wait(started, here, "killed")
    else:
        return outcomes.SILENT, "it was always too late for the kill"
    words = f"{aim or 'at'} {moment:.2f} CPU s" + (", cold cache" if cold else "")
    # Of two, the other one must find out by itself that one has gone.
    if jobs.wait(started, here, "killed", limit=MEETING).hanging:
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
    """Send a signal at a moment, or from half of it on once a file of a pattern is there.

    moment: seconds of processor time. Returns False where the processes had ended before.
    """
    due = moment * 0.5 if pattern else moment
    while jobs.cpu_seconds(started[0]) < due:
        time.sleep(POLL)
        if any(process.poll() is not None for process in started):
            return False
    while pattern and not is_there(folder, pattern):
        time.sleep(POLL)
        if any(process.poll() is not None for process in started):
            return False
    for index in victims:
        started[index].send_signal(how)
    return True


def is_there(folder: pathlib.Path, pattern: str) -> bool:
    """Return whether a folder that is being written to has a file of a pattern."""
    try:
        return any(folder.glob(pattern))
    except FileNotFoundError:  # a folder went while it was looked through
        return False
