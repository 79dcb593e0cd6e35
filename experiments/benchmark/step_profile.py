"""Say where the time of our training step goes, by kind of work.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m experiments.benchmark.step_profile \
        --shape=imdb --pairs_per_prompt=6 --responses=4 --pairs=24 [--cached] [--json=FILE]

Makes steps of the benchmark on a CPU under jax's profiler, and adds up what each instruction of the
compiled program took. At a moment when two threads are at work on two instructions, each gets half
of it; a moment when none is at work counts for the product that was begun last, as some of XLA's
products run on threads that the profile does not name. Products are told from the rest by the
program's text, and parts of the step by the names that the code gives them: flax's modules, and
jax.named_scope in the head, reference and optimiser.
"""

import collections
import dataclasses
import json
import pathlib
import re
import tempfile

import jax

STEPS = 3  # under the profiler, after the warm-up
MODULE = "jit_train_step"  # the program's name in a profile

# Part of the step -> what the name of one of its operations has; the first that fits counts.
PARTS = {
    "optimizer": r"/optimizer/",
    "head": r"\bhead\b",
    "attention, its linear layers": r"/attention/(q|k|v|out)/",
    "attention": r"/attention/",
    "MLP": r"/mlp/",
    "norms": r"/norm_\w+/",
    "embeddings": r"/embed/",
}
# The program's text: a computation's first line, an instruction, and what that one calls.
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(")
OP_NAME = re.compile(r'op_name="([^"]*)"')
OPERANDS = re.compile(r"%([\w.\-]+)")
CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
# Their time is that of the instructions in them.
CONTAINERS = ("while", "call", "conditional")
PRODUCTS = ("dot", "convolution")
FAR = 4  # steps from an instruction without a name to those that it comes from


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a compiled program."""

    opcode: str
    op_name: str  # the path of jax's operation, "" where XLA gives none
    operands: tuple[str, ...]
    computation: str  # the computation that it calls, or ""


@dataclasses.dataclass(frozen=True)
class Event:
    """A time in which a thread is at work on an instruction, in nanoseconds."""

    thread: str
    instruction: str
    start: float
    end: float


def read_program(text: str) -> dict[str, dict[str, Instruction]]:
    """Return the instructions of each computation of a compiled program, by name."""
    computations = {}
    found = {}
    for line in text.splitlines():
        header = COMPUTATION.match(line)
        if header:
            found = computations.setdefault(header[1], {})
            continue
        match = INSTRUCTION.match(line)
        if match:
            op_name, calls = OP_NAME.search(line), CALLS.search(line)
            operands = line[match.end() :].partition(")")[0]
            found[match[1]] = Instruction(
                opcode=match[2],
                op_name=op_name[1] if op_name else "",
                operands=tuple(OPERANDS.findall(operands)),
                computation=calls[1] if calls else "",
            )
    return computations


def kinds(computations: dict[str, dict[str, Instruction]]) -> dict[str, str]:
    """Return the kind of work of each instruction: its part of the step, and what it does."""
    found = {}
    for instructions in computations.values():
        # The body of a loop is all of one part: that of an instruction that nothing else tells.
        everywhere = [x.op_name for x in instructions.values() if x.op_name]
        for name, instruction in instructions.items():
            if instruction.opcode in CONTAINERS:
                continue
            inner = list(_within(computations, instruction))
            names = _names(inner) or _names_before(computations, instructions, instruction)
            found[name] = _kind([x.opcode for x in inner], names or everywhere)
    return found


def _within(computations, instruction: Instruction):
    """Yield the instruction, and those of the computation that it calls, at any depth."""
    yield instruction
    for called in computations.get(instruction.computation, {}).values():
        yield from _within(computations, called)


def _names(instructions: list[Instruction]) -> list[str]:
    """Return the names in a fusion that tell its part of the step."""
    # A fused product gives its name to the whole: it is what takes the time.
    products = [x for x in instructions if x.opcode in PRODUCTS and x.op_name]
    names = [x.op_name for x in products or instructions]
    return [name for name in names if _part(name) != "other"]


def _names_before(computations, instructions, instruction: Instruction) -> list[str]:
    """Return the names of what the operands come from, the nearest that have any."""
    # XLA drops the names of some products.
    nearest = [instruction]
    for _ in range(FAR):
        operands = [name for x in nearest for name in x.operands if name in instructions]
        nearest = [instructions[name] for name in operands]
        inner = [y for x in nearest for y in _within(computations, x)]
        names = _names(inner)
        if names:
            return names
    return []


def _kind(opcodes: list[str], names: list[str]) -> str:
    """Return the kind of work of a fusion with these operations, by names that tell its part."""
    parts = collections.Counter(map(_part, names))
    part = parts.most_common(1)[0][0] if parts else "other"
    work = ""
    if any(opcode in PRODUCTS for opcode in opcodes):
        work = ", products"
    elif "gather" in opcodes or "scatter" in opcodes:
        work = ", gathers"
    of_reference = sum("/reference/" in _plain(name) for name in names)
    owner = "reference: " if 2 * of_reference > len(names) else ""
    return owner + part + work


def _part(op_name: str) -> str:
    for part, pattern in PARTS.items():
        if re.search(pattern, _plain(op_name)):
            return part
    return "other"


def _plain(op_name: str) -> str:
    """Return a path without the transformations around its parts: jvp(head) is /head/."""
    return "/" + re.sub(r"\w*\(|\)", "/", op_name) + "/"


def times(events: list[Event], kind_of: dict[str, str]) -> dict[str, float]:
    """Return the seconds of each kind of work, each moment split among the threads at work.

    An instruction without a kind waits for others.
    """
    marks = []
    for number, event in enumerate(events):
        marks += [(event.start, 1, number), (event.end, 0, number)]
    marks.sort()
    at_work = collections.defaultdict(list)  # thread -> events, the innermost last
    seconds = collections.Counter()
    last_product = "other"
    before = marks[0][0]
    for now, begins, number in marks:
        innermost = [stack[-1] for stack in at_work.values() if stack]
        busy = [kind_of[events[i].instruction] for i in innermost if _has_kind(events[i], kind_of)]
        # Between two steps nothing is open.
        if innermost and not busy:
            busy = [last_product]
        for kind in busy if now > before else []:
            seconds[kind] += (now - before) / len(busy) / 1e9
        stack = at_work[events[number].thread]
        if begins:
            stack.append(number)
            kind = kind_of.get(events[number].instruction, "")
            if kind.endswith("products"):
                last_product = kind
        else:
            stack.remove(number)
        before = now
    return dict(seconds)


def _has_kind(event: Event, kind_of: dict[str, str]) -> bool:
    return event.instruction in kind_of


def read_events(folder: pathlib.Path) -> list[Event]:
    """Return what the threads did of the train step, from a profile's folder."""
    (path,) = folder.glob("plugins/profile/*/*.xplane.pb")
    events = []
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if stats.get("hlo_module") == MODULE:
                    events.append(Event(line.name, stats["hlo_op"], event.start_ns, event.end_ns))
    return events


def measure(folder: pathlib.Path, told) -> dict[str, float]:
    """Return the seconds of a step by kind of work, for a benchmark's folder."""
    from experiments.benchmark import ours

    trainer = ours.Trainer(folder, told)
    shapes = len(trainer.batches.shapes)
    if shapes > 1:
        raise ValueError(
            f"these rows make {shapes} programs, whose instructions have the same names in a "
            "profile: give another --pairs."
        )
    state, reference, hyper = trainer.state, trainer.reference, trainer.hyper
    with jax.set_mesh(trainer.mesh):
        lowered = trainer.programs.train_step.lower(state, reference, hyper, trainer.load(0), None)
    kind_of = kinds(read_program(lowered.compile().as_text()))
    ours.profile(trainer, str(folder / "profile"), STEPS)
    in_all = times(read_events(folder / "profile"), kind_of)
    return {kind: seconds / STEPS for kind, seconds in in_all.items()}


def table(by_kind: dict[str, float]) -> str:
    """Return the seconds as text, the most first."""
    total = sum(by_kind.values())
    lines = []
    for kind, seconds in sorted(by_kind.items(), key=lambda item: -item[1]):
        lines.append(f"{kind:<50}{seconds:>8.3f} s{seconds / total:>7.1%}")
    return "\n".join([*lines, f"{'all':<50}{total:>8.3f} s"])


def main():
    from absl import flags

    from experiments.benchmark import work

    options = flags.FLAGS
    told = work.Work(pairs=options.pairs, steps=STEPS, cached=options.cached, dtype="float32")
    prompts = options.pairs // options.pairs_per_prompt * STEPS
    lengths = work.lengths(options.shape, prompts, options.responses)
    with tempfile.TemporaryDirectory(prefix="dpo_jax_profile_") as folder:
        folder = pathlib.Path(folder)
        work.write(folder, told, work.MODELS[options.model], *lengths, options.pairs_per_prompt)
        by_kind = measure(folder, told)
    print(table(by_kind))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(by_kind, indent=1) + "\n")


if __name__ == "__main__":
    from absl import flags

    from dpo_jax import command_line
    from dpo_jax.parallel import processes
    from experiments.benchmark import work

    flags.DEFINE_enum("shape", "imdb", list(work.SHAPES), "The data set whose lengths rows have.")
    flags.DEFINE_enum("model", "gpt2-tiny", list(work.MODELS), "The model's sizes.")
    flags.DEFINE_integer("responses", 2, "Responses to each prompt.", lower_bound=2)
    flags.DEFINE_integer("pairs_per_prompt", 1, "Pairs of its responses.", lower_bound=1)
    flags.DEFINE_integer("pairs", 8, "Pairs per step.", lower_bound=1)
    flags.DEFINE_boolean("cached", False, "Compute the reference's log-probs before the steps.")
    flags.DEFINE_string("json", "", "File for the seconds. Default: none.")
    processes.start()
    command_line.run(main, __doc__)
