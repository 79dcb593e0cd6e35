"""SIGTERM and Ctrl-C at random moments: one line, the right status, and the same bits after."""

import functools
import pathlib
import random
import signal
import time

from tests.faults import jobs, kills, outcomes

PART = "signals"
SIGNALS = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
# Seconds to end in on an idle machine: 5, and what a step, a batch or a compile may take.
PATIENCE = 8.0
# Processor seconds in which Python itself starts, before anything of ours can catch a signal.
PYTHON_STARTS = 0.2
# Rows of the table: a job, and the shares of its time that moments are drawn from.
ROWS = {
    "import": ("dpo", (0.0, 0.25)),
    "reading and compiling": ("dpo", (0.25, 0.6)),
    "training and export, DPO": ("dpo", (0.6, 1.0)),
    "training and export, LoRA": ("lora", (0.5, 1.0)),
    "all stages of the toy with PPO": ("toy ppo", (0.0, 1.0)),
    "all stages of the toy with DPO": ("toy dpo", (0.0, 1.0)),
    "sampling": ("sample", (0.3, 1.0)),
    "judging": ("judge", (0.3, 1.0)),
}
JOBS = sorted({name for name, _ in ROWS.values()})


def plan(wholes: dict[str, jobs.Whole], count: int, seed: int):
    """Yield (row of the table, function of a folder) for so many signals of each row."""
    rng = random.Random(f"signals {seed}")
    for what, (name, (low, high)) in ROWS.items():
        if name not in wholes:
            continue
        for number in range(count):
            kind = list(SIGNALS)[number % len(SIGNALS)]
            share = rng.uniform(low, high)
            yield (
                f"{kind} in {what}",
                functools.partial(signal_and_repeat, wholes[name], kind=kind, share=share),
            )


def signal_and_repeat(
    whole: jobs.Whole, folder: pathlib.Path, *, kind: str, share: float
) -> tuple[str, str]:
    """Signal a job once, judge its end, run it to its end and judge that; return the outcome."""
    job = whole.job
    number = SIGNALS[kind]
    for attempt in range(kills.MOST_TRIES):
        here = jobs.prepare(job, folder / str(attempt), whole.cache)
        moment = max(whole.cpu_seconds * share * 0.9**attempt, PYTHON_STARTS)
        started = jobs.start(job, here, log="stopped")
        if kills.strike(started, here, moment, "", (0,), number):
            break
        jobs.wait(started, here, "stopped")
    else:
        return outcomes.SILENT, "it was always too late for the signal"
    sent = time.monotonic()
    stopped = jobs.wait(started, here, "stopped", limit=60.0)
    took = time.monotonic() - sent
    words = f"at {moment:.2f} CPU s, ended after {took:.1f} s"
    if stopped.hanging:
        return outcomes.HANGING, f"{words}: {outcomes.last_lines(stopped.text)}"
    wrong = wrong_end(stopped, number)
    if outcomes.has_traceback(stopped.text):
        return outcomes.DEEP, f"{words}: {outcomes.last_lines(stopped.text)}"
    if wrong:
        return outcomes.SILENT, f"{words}: {wrong}"
    # A machine that does other work too takes longer for everything.
    limit = PATIENCE * max(1.0, whole.seconds / whole.cpu_seconds)
    if took > limit:
        return outcomes.HANGING, f"{words}, expected at most {limit:.0f} s"
    ended = jobs.run(job, here, log="again")
    outcome, wrong = outcomes.judge(ended, jobs.result(here), whole.result)
    return outcome, f"{words} {wrong}".strip()


def wrong_end(ended: jobs.Ended, number: signal.Signals) -> str:
    """Return what is wrong with how a signalled command ended; "" if nothing is."""
    status = ended.statuses[0]
    if status == 0:
        return ""  # it had done its work, and its result is judged
    if status != 128 + number:
        return f"status {status}, expected {128 + number}: {outcomes.last_lines(ended.text)}"
    last = ended.text.strip().rpartition("\n")[2]
    words = ("interrupted", "stopped", signal.Signals(number).name)
    if not any(word in last for word in words):
        return f"no line says that it was stopped: {outcomes.last_lines(ended.text)}"
    return ""
