"""Measure our training step beside a peer's: same weights, rows, batch size and optimiser.

    python -m experiments.benchmark --shape=tldr --model=gpt2-tiny --peer=trl --peer_python=PATH
    [--pairs_per_prompt=4 --responses=5] [--cached] [--plain] [--compiled]

PATH is a Python that has the peer. For TRL, pip install -r requirements-dev.txt into any Python;
the default is this one. For Tunix (--peer=tunix --model=llama-tiny), pip install google-tunix into
a fresh one, as it wants older packages than ours; Tunix trains no GPT-2 and cannot cache the
reference's log-probs.

Pairs come in groups: each prompt has as many responses and pairs as asked for, as sampled and
labelled sets have. The best response is paired with each of the others, then the second, and so on.
All sides read the same rows in the same order, and a step has whole groups.

The sides are processes that take turns: each waits while the others work. Their losses must first
agree on steps that are not timed. A step's time includes forward, backward, optimiser and input.
Tokens and FLOPs are those that the rows need, with each prompt and response of a step counted once,
and are the same for all sides. The ceiling is the fastest square matrix product that any side's
library makes here (2048 wide on a CPU, 8192 on a GPU). Peak memory is the process's on a CPU
(VmHWM) and the device's on a GPU. With bfloat16, the default on a GPU, all sides compute in
bfloat16 on float32 weights. All use huge pages.
"""

import json
import os
import pathlib
import sys
import tempfile
import time

from absl import flags

from dpo_jax import command_line
from experiments.benchmark import report, work
from experiments.benchmark.worker import Worker
from experiments.commands import machine, refuse_flags

PROFILED = 2  # steps in a profile
PEERS = ("trl", "tunix", "none")
ASKED = (
    "shape",
    "pairs_per_prompt",
    "responses",
    "model",
    "peer",
    "dtype",
    "cached",
    "compiled",
    "pairs",
    "checked",
    "rounds",
    "steps",
)
LEAST_PAIRS = 8  # of a step, unless asked otherwise
# Above this load per core, other programs slow the sides unequally.
BUSY = 1.5
# They save page faults to the side that allocates much. All sides have them, as a user should.
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def run(options, folder: pathlib.Path) -> dict:
    """Write the inputs to a folder, measure all sides and return the report."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # this process only makes weights
    steps = options.checked + options.rounds * options.steps
    if options.profile:
        steps += PROFILED
    told = work.Work(
        pairs=options.pairs,
        steps=steps,
        cached=options.cached,
        dtype=options.dtype,
        compiled=options.compiled,
    )
    prompts = -(-work.ROWS // options.pairs_per_prompt)
    prompt_G, response_GR = work.lengths(options.shape, prompts, options.responses)
    model = work.MODELS[options.model]
    work.write(folder, told, model, prompt_G, response_GR, options.pairs_per_prompt)
    print(
        "weights and rows are written; the sides load them, and ours compiles a program for each "
        "shape",
        flush=True,
    )
    sides = start(options, folder)
    try:
        return measure(options, told, sides)
    finally:
        for side in sides:
            side.close()


def start(options, folder: pathlib.Path) -> list[Worker]:
    """Start the workers and return them, ours first."""
    threads = len(os.sched_getaffinity(0))
    environment = dict(
        OMP_NUM_THREADS=str(threads),
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
        HF_DATASETS_CACHE=str(folder / "cache"),
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        GLIBC_TUNABLES=HUGE_PAGES,
    )
    sides = [Worker("ours", sys.executable, folder, **environment)]
    if options.plain:
        sides.append(Worker("plain", sys.executable, folder, **environment))
    if options.peer != "none":
        sides.append(Worker(options.peer, options.peer_python, folder, **environment))
    return sides


def measure(options, told: work.Work, sides: list[Worker]) -> dict:
    """Check that the sides agree, time them in turns, and return the report."""
    here = machine()
    print(f"machine: {here}", flush=True)
    about, ready = {}, {}
    for side in sides:
        # One after another; ours compiles here.
        began = time.perf_counter()
        about[side.name] = side.ask("about")
        ready[side.name] = round(time.perf_counter() - began, 1)
        print(f"{side.name}: ready after {ready[side.name]} s, {about[side.name]}", flush=True)

    losses = {side.name: side.ask("steps", count=options.checked)["losses"] for side in sides}
    check = report.check_losses(losses, told.dtype)
    print(check, flush=True)

    seconds = {side.name: [] for side in sides}
    ours, ceilings = [], []
    for number in range(options.rounds):
        # The sides also take turns in going first.
        order = sides if number % 2 == 0 else reversed(sides)
        for side in order:
            ceilings.append(side.ask("ceiling")["flops_per_second"])
            answer = side.ask("steps", count=options.steps)
            seconds[side.name].append(answer["seconds"])
            if side.name == "ours":
                ours.append(answer)
            print(
                f"round {number + 1}/{options.rounds}  {side.name}  {answer['seconds']:.2f} s",
                flush=True,
            )

    result = report.summary(
        seconds,
        pairs=options.pairs * options.steps,
        tokens=[answer["tokens"] for answer in ours],
        flops=[answer["flops"] for answer in ours],
        ceiling=max(ceilings),
        peak_bytes={side.name: side.ask("peak")["bytes"] for side in sides},
    )
    print(report.table(result, [side.name for side in sides]))
    print(f"ceiling {max(ceilings) / 1e9:.0f} GFLOP/s ({min(ceilings) / 1e9:.0f} at the slowest)")
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    if load > BUSY * cores:
        print(
            f"the machine is busy (load {load:.1f} on {cores} cores), which slows the sides "
            "unequally: measure again"
        )
    result |= dict(
        machine=here,
        glibc_tunables=HUGE_PAGES,
        about=about,
        ready_seconds=ready,
        load=load,
        losses=check,
        ceiling_flops_per_second=max(ceilings),
        rounds_seconds=seconds,
    )
    if options.stages:
        result["stages"] = sides[0].ask("stages")
        for name, stage_seconds in result["stages"].items():
            print(f"{name:<16}{stage_seconds:>10.4f} s")
    if options.profile:
        sides[0].ask("profile", folder=os.path.abspath(options.profile), count=PROFILED)
        print(f"profile of {PROFILED} steps in {options.profile}")
    return result


def check_pairs(options) -> None:
    """Fill in the pairs of a step, and raise ValueError for pairs that cannot be made."""
    work.pairs_of_prompt(options.responses, options.pairs_per_prompt)
    if options.pairs is None:
        prompts = -(-LEAST_PAIRS // options.pairs_per_prompt)
        options.pairs = prompts * options.pairs_per_prompt
    if options.pairs % options.pairs_per_prompt:
        raise ValueError(
            f"--pairs={options.pairs}: a step has whole groups, so it takes a multiple of "
            f"--pairs_per_prompt={options.pairs_per_prompt}."
        )


def check_tunix(options) -> None:
    """Raise ValueError for flags that Tunix cannot serve."""
    family = work.MODELS[options.model]["model_type"]
    if options.cached or options.dtype != "float32" or family != "llama":
        raise ValueError(
            "--peer=tunix: it cannot cache the reference's log-probs, so run it without --cached; "
            "it computes in its weights' own dtype, so use --dtype=float32; and of these models it "
            "has only the Llamas, such as --model=llama-tiny."
        )


def main():
    options = flags.FLAGS
    if options.json and pathlib.Path(options.json).exists():
        raise ValueError(f"--json={options.json} exists; give a new name.")
    check_pairs(options)
    if options.compiled and options.peer != "trl":
        raise ValueError(f"--compiled is for --peer=trl, not for {options.peer}: leave it out.")
    if options.peer == "none":
        refuse_flags("with --peer=none", "peer_python")
    if options.peer == "tunix":
        check_tunix(options)
    with tempfile.TemporaryDirectory(prefix="dpo_jax_benchmark_") as folder:
        result = run(options, pathlib.Path(folder))
    result["asked"] = {name: options[name].value for name in ASKED}
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


def define_flags():
    on_gpu = pathlib.Path("/dev/nvidia0").exists()  # asked without jax, which would hold the device
    flags.DEFINE_enum("shape", "tldr", list(work.SHAPES), "The data set whose lengths rows have.")
    flags.DEFINE_enum(
        "model", "gpt2-tiny", list(work.MODELS), "The model's sizes; its weights are random."
    )
    flags.DEFINE_enum("peer", "trl", PEERS, "The peer to measure beside us; none: ours alone.")
    flags.DEFINE_string("peer_python", sys.executable, "The Python that has the peer.")
    flags.DEFINE_integer("responses", 2, "Responses to each prompt.", lower_bound=2)
    flags.DEFINE_integer("pairs_per_prompt", 1, "Pairs of its responses.", lower_bound=1)
    flags.DEFINE_integer(
        "pairs",
        None,
        "Pairs per step, a multiple of --pairs_per_prompt. Default: the smallest that is at least "
        f"{LEAST_PAIRS}.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "checked", 3, "Steps whose losses are compared before any is timed.", lower_bound=2
    )
    flags.DEFINE_integer("rounds", 3, "How often the sides take turns.", lower_bound=1)
    flags.DEFINE_integer("steps", 2, "Steps per round.", lower_bound=1)
    flags.DEFINE_boolean(
        "cached", False, "All sides compute the reference's log-probs before the first step."
    )
    flags.DEFINE_boolean(
        "plain", False, "Also measure ours with separate rows, which share no prompt or response."
    )
    flags.DEFINE_boolean("compiled", False, "TRL runs its model under torch.compile.")
    flags.DEFINE_enum(
        "dtype",
        "bfloat16" if on_gpu else "float32",
        list(report.TOLERANCE),
        "The dtype that all sides compute in.",
    )
    flags.DEFINE_string("json", "", "File for the report; it must not exist. Default: none.")
    flags.DEFINE_string("profile", "", "Folder for a profile of two of our steps. Default: none.")
    flags.DEFINE_boolean("stages", False, "Also time the parts of our step.")


if __name__ == "__main__":
    define_flags()
    command_line.run(main, __doc__)
