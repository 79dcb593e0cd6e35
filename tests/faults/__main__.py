"""Try faults on small runs, and write experiments/results/reliability.md.

    python -m tests.faults [--parts=kills,signals,surroundings,files,hostile,load] [--kills=50]
        [--seed=0] [--workers=2]

Takes an hour and a half on two idle cores. As root on Linux it also fills small disks. The exit
status is 1 if any try ended silently wrong, with a traceback or not at all, or if load is above a
limit.
"""

import argparse
import concurrent.futures
import os
import pathlib
import signal
import sys
import tempfile
import time

from tests.faults import (
    files,
    jobs,
    kills,
    load,
    others,
    outcomes,
    report,
    signals,
    surroundings,
)
from tests.helpers.judge_server import JudgeServer, prefers
from tests.helpers.paths import ROOT

RESULTS = ROOT / "experiments" / "results"
ANSWER_TIME = 0.05  # seconds that the fake judge takes for an answer
SIGNALS_OF_A_ROW = 2


def run_kills(tries: outcomes.Tries, run: "Harness") -> None:
    wholes = {name: run.wholes[name] for name in kills.JOBS}
    tries.run(kills.PART, kills.plan(wholes, run.asked.kills, run.asked.seed))


def run_signals(tries: outcomes.Tries, run: "Harness") -> None:
    tries.run(signals.PART, signals.plan(run.wholes, SIGNALS_OF_A_ROW, run.asked.seed))


def run_surroundings(tries: outcomes.Tries, run: "Harness") -> None:
    tries.run(surroundings.PART, surroundings.plan(run.wholes, run.folder))


def run_files(tries: outcomes.Tries, run: "Harness") -> None:
    kinds = files.count_all(run.folder / "files", run.asked.workers)
    tries.add(files.PART, kinds)


def run_hostile(tries: outcomes.Tries, run: "Harness") -> None:
    from tests.hostile import commands

    tries.run(others.PART, commands.plan())
    tries.add(others.PART, [others.hostile(run.folder / "hostile")])


def run_load(tries: outcomes.Tries, run: "Harness") -> None:
    for result in load.measure_all(run.folder / "load"):
        print("\n".join(load.Result.table([result])[2:]), flush=True)
        tries.measured.append(result)
        tries.keep(load.PART, planned=len(load.MEASUREMENTS))


# Part -> what runs it, and the jobs that it needs. Others are added here.
PARTS = {
    kills.PART: (run_kills, kills.JOBS),
    signals.PART: (run_signals, signals.JOBS),
    surroundings.PART: (run_surroundings, surroundings.JOBS),
    files.PART: (run_files, ()),
    others.PART: (run_hostile, ()),
    load.PART: (run_load, ()),
}


class Harness:
    """What the parts share: the folder, the uninterrupted runs, and what was asked."""

    def __init__(self, folder: pathlib.Path, asked: argparse.Namespace):
        self.folder = folder
        self.asked = asked
        self.wholes: dict[str, jobs.Whole] = {}

    def run_wholes(self, names: set[str], server: JudgeServer) -> None:
        """Run these jobs without interruption."""
        inputs = self.folder / "inputs"
        jobs.write_inputs(inputs)
        made = jobs.make_jobs(inputs)
        if "judge" in names:
            made["judge"] = jobs.judge_job(inputs, self.folder / "judged", server.variables())
        made = {name: job for name, job in made.items() if name in names}
        folders = [self.folder / "whole" / name.replace(" ", "-") for name in made]
        # As many at once as later, so that the time of each is what it will be then.
        with concurrent.futures.ThreadPoolExecutor(self.asked.workers) as pool:
            wholes = pool.map(jobs.run_whole, made.values(), folders)
            for name, whole in zip(made, wholes, strict=True):
                self.wholes[name] = whole
                print(f"uninterrupted: {name}, {whole.seconds:.1f} s", flush=True)


def answer_slowly(prompt: str, times: int):
    """Answer as a judge that prefers the longer text, and needs a moment for it."""
    time.sleep(ANSWER_TIME)
    return prefers(len)(prompt, times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="which, with commas")
    parser.add_argument("--kills", type=int, default=50, help="how many kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workers", type=int, default=2, help="how many tries at once")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the table")
    asked = parser.parse_args()
    parts = asked.parts.split(",")
    if unknown := set(parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}; have {', '.join(PARTS)}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # A shell that starts this in the background ignores Ctrl-C, and so would all commands here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    shown = [argument for argument in sys.argv[1:] if not argument.startswith("--out")]
    command = " ".join(["python -m tests.faults", *shown])
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faults-"))
    print(f"folders of bad tries stay in {folder}", flush=True)
    began = dict.fromkeys(parts, 0.0)

    def keep(part: str, made: list[outcomes.Try], planned: int) -> None:
        """Write the tables again after each try, as the next one may be stopped."""
        minutes = (time.monotonic() - began[part]) / 60
        measured = tries.measured if part == load.PART else []
        kept = report.record(made, planned, command, minutes, measured)
        report.write(asked.out, {part: kept})

    tries = outcomes.Tries(folder / "tries", asked.workers, keep)
    with JudgeServer(answer_slowly) as server:
        run = Harness(folder, asked)
        run.run_wholes({name for part in parts for name in PARTS[part][1]}, server)
        for part in parts:
            began[part] = time.monotonic()
            run_part, _ = PARTS[part]
            run_part(tries, run)
    bad = [one for one in tries.done if one.outcome in outcomes.BAD]
    bad += [one for one in tries.measured if not one.is_good]
    count = len(tries.done) + len(tries.measured)
    print(f"{count} tries, {len(bad)} of them bad: {asked.out / report.PAGE}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
