"""Our training step beside a peer's on the same weights, rows, batch size and optimiser, in turns,
in one run.

    python -m experiments.benchmark --shape=tldr --model=gpt2-tiny --peer=trl --peer_python=PATH
    [--cached]

PATH is a Python with the peer: TRL (pip install -r requirements-dev.txt into any; the default is
this one), or Tunix, which trains no GPT-2 and keeps no reference's log-probs (--peer=tunix
--model=llama-tiny; pip install google-tunix into a fresh one, as it wants older packages than
ours). Each side is a process of its own that waits while the other works. First their losses must
agree on CHECKED steps, which are not timed. A step's time holds forward, backward, optimiser and
input. Tokens and FLOPs are those that the rows need, a prompt counted once per pair, for both sides
alike; the ceiling is the fastest square matrix product that either side's library makes here (2048
wide on a CPU, 8192 on a GPU). Peak memory is the process's on a CPU (VmHWM), the device's on a GPU.
With bfloat16, the default on a GPU, both sides compute in it on float32 weights. Both have huge
pages.
"""

import json
import os
import pathlib
import sys
import tempfile

from absl import flags

from dpo_jax import command_line
from experiments.benchmark import report, work
from experiments.benchmark.worker import Worker

CHECKED = 3  # steps whose losses are compared
PROFILED = 2  # steps in a profile
PEERS = ("trl", "tunix", "none")


def run(options, folder: pathlib.Path) -> dict:
    """The report."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # this process only makes weights
    steps = CHECKED + options.rounds * options.steps + (PROFILED if options.profile else 0)
    told = work.Work(pairs=options.pairs, steps=steps, cached=options.cached, dtype=options.dtype)
    work.write(folder, told, work.MODELS[options.model], *work.lengths(options.shape))
    print(
        "weights and rows are written; the sides load them, and ours compiles a program for each shape",
        flush=True,
    )
    sides = start(options, folder)
    try:
        return measure(options, told, sides)
    finally:
        for side in sides:
            side.close()


def start(options, folder) -> list[Worker]:
    """The workers, ours first."""
    threads = len(os.sched_getaffinity(0))
    environment = dict(
        OMP_NUM_THREADS=str(threads),
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
        HF_DATASETS_CACHE=str(folder / "cache"),
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        GLIBC_TUNABLES="glibc.malloc.hugetlb=1",
    )  # fewer page faults for whoever allocates much
    sides = [Worker("ours", sys.executable, folder, **environment)]
    if options.peer != "none":
        sides.append(Worker(options.peer, options.peer_python, folder, **environment))
    return sides


def measure(options, told, sides) -> dict:
    found = {side.name: side.ask("about") for side in sides}
    for side in sides:
        print(f"{side.name}: {found[side.name]}", flush=True)
    check = report.check_losses(
        {side.name: side.ask("steps", count=CHECKED)["losses"] for side in sides}, told.dtype
    )
    print(check, flush=True)
    rounds, needed, ceilings = {side.name: [] for side in sides}, [], []
    for number in range(options.rounds):
        for side in sides if number % 2 == 0 else reversed(sides):  # who goes first takes turns too
            ceilings.append(side.ask("ceiling")["flops_per_second"])
            answer = side.ask("steps", count=options.steps)
            rounds[side.name].append(answer["seconds"])
            needed += [answer] if side.name == "ours" else []
            print(
                f"round {number + 1}/{options.rounds}  {side.name}  {answer['seconds']:.2f} s",
                flush=True,
            )
    result = report.summary(
        rounds,
        pairs=options.pairs * options.steps,
        tokens=[answer["tokens"] for answer in needed],
        flops=[answer["flops"] for answer in needed],
        ceiling=max(ceilings),
        peak_bytes={side.name: side.ask("peak")["bytes"] for side in sides},
    )
    print(report.table(result, [side.name for side in sides]))
    print(f"ceiling {max(ceilings) / 1e9:.0f} GFLOP/s ({min(ceilings) / 1e9:.0f} at the slowest)")
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    if load > 1.5 * cores:
        print(
            f"the machine is busy (load {load:.1f} on {cores} cores), which slows the sides unequally: measure again"
        )
    result |= dict(
        about=found,
        load=load,
        losses=check,
        ceiling_flops_per_second=max(ceilings),
        rounds_seconds=rounds,
    )
    if options.stages:
        result["stages"] = sides[0].ask("stages")
        print(
            "\n".join(f"{name:<16}{seconds:>10.4f} s" for name, seconds in result["stages"].items())
        )
    if options.profile:
        sides[0].ask("profile", folder=os.path.abspath(options.profile), count=PROFILED)
        print(f"profile of {PROFILED} steps in {options.profile}")
    return result


def main():
    options = flags.FLAGS
    if options.json and pathlib.Path(options.json).exists():
        raise ValueError(f"--json={options.json} exists; give a new name.")
    if options.peer == "tunix" and (
        options.cached
        or options.dtype != "float32"
        or work.MODELS[options.model]["model_type"] != "llama"
    ):
        raise ValueError(
            "--peer=tunix: it keeps no reference's log-probs, so without --cached; it computes in its "
            "weights' own dtype, so --dtype=float32; and of these models it has the Llamas, as "
            "--model=llama-tiny."
        )
    with tempfile.TemporaryDirectory(prefix="dpo_jax_benchmark_") as folder:
        result = run(options, pathlib.Path(folder))
    asked = ("shape", "model", "peer", "dtype", "pairs", "rounds", "steps", "cached")
    result |= dict(asked={name: options[name].value for name in asked})
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    flags.DEFINE_enum("shape", "tldr", list(work.SHAPES), "Whose lengths the rows have.")
    flags.DEFINE_enum(
        "model", "gpt2-tiny", list(work.MODELS), "The sizes of the model, which is random."
    )
    flags.DEFINE_enum("peer", "trl", PEERS, "Who is measured beside us; none: nobody.")
    flags.DEFINE_string("peer_python", sys.executable, "The Python that has the peer.")
    flags.DEFINE_integer("pairs", 8, "Pairs of a step.", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "How often the sides take turns.", lower_bound=1)
    flags.DEFINE_integer("steps", 2, "Steps of a round.", lower_bound=1)
    flags.DEFINE_boolean(
        "cached", False, "Both sides compute the reference's log-probs before the first step."
    )
    flags.DEFINE_enum(
        "dtype",
        "bfloat16" if pathlib.Path("/dev/nvidia0").exists() else "float32",
        list(report.TOLERANCE),
        "What both compute in.",
    )
    flags.DEFINE_string("json", "", "Where the report goes.")
    flags.DEFINE_string("profile", "", "Where a profile of two of our steps goes (a folder).")
    flags.DEFINE_boolean("stages", False, "Time the parts of our step, too.")
    command_line.run(main, __doc__)
