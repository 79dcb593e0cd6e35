"""What a compiled step does on one device, read from the text that XLA prints of it.

The compiler's own cost analysis counts the body of a loop once; here it counts as often as it runs.
"""

import math
import re
from typing import NamedTuple

BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
# Received by each of g devices, of operands of one byte.
RECEIVED = {
    "all-gather": lambda g: g - 1,
    "reduce-scatter": lambda g: (g - 1) / g,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "collective-permute": lambda g: 1,
}
FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "opt-barrier",
    "iota",
    "partition-id",
}  # these move nothing, or next to it
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")  # nor do these
SLICES = ("dynamic-slice", "slice", "gather")  # these read what they give, not their whole operand


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    inside: str  # the parentheses: operands, or a constant's value, or a parameter's number
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.inside)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the entry."""
    found, entry, current = {}, "", None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif body := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)", line):
            current.append(_instruction(body[1], body[2]))
    return found, entry


def trips(computations, entry: str) -> dict[str, int]:
    """How often each computation that is run, and not part of a fusion, runs in one call of the
    program.
    """
    found = {}

    def visit(name, times):
        found[name] = found.get(name, 0) + times
        for instruction in computations[name]:
            for called, count in _calls(computations, instruction):
                visit(called, times * count)

    visit(entry, 1)
    return found


def collectives(text: str) -> dict[str, tuple[int, float]]:
    """Kind -> (how many are run, bytes that a device receives through them), in one call of the
    program.
    """
    computations, entry = parse(text)
    parts = {}
    for name, times in trips(computations, entry).items():
        for inner in [name, *_fused(computations, name)]:
            types = {instruction.name: instruction.type for instruction in computations[inner]}
            for instruction in computations[inner]:
                kind = instruction.opcode.removesuffix("-start")
                if kind not in RECEIVED:
                    continue
                if (
                    kind == "all-reduce" and "scatter" in inner
                ):  # so the TPU compiler prints a reduce-scatter
                    kind = "reduce-scatter"
                size = sum(_size(types[operand]) for operand in instruction.operands)
                received = size * RECEIVED[kind](_group(instruction.attributes))
                channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                parts.setdefault(channel[1] if channel else instruction.name, []).append(
                    (times, received, kind)
                )
    totals = {}
    for found in parts.values():
        # The parts of an asynchronous collective are printed each, with the whole's bytes and
        # channel. It may go on during a loop, but it starts and ends outside.
        times, (_, received, kind) = (
            min(times for times, _, _ in found),
            max(found, key=lambda part: part[1:]),
        )
        count, size = totals.get(kind, (0, 0.0))
        totals[kind] = count + times, size + times * received
    return totals


def memory_traffic(text: str) -> float:
    """Bytes that a device reads from and writes to its main memory in one call of the program.

    Every instruction reads its operands and writes its result, except those in on-chip memory; a
    slice counts as what is sliced.
    """
    computations, entry = parse(text)
    total = 0
    for name, times in trips(computations, entry).items():
        types = {instruction.name: instruction.type for instruction in computations[name]}
        total += times * sum(
            _moved(computations, instruction, types) for instruction in computations[name]
        )
    return total


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest) if rest.startswith("(") else rest.index(" ") - 1
    kind, rest = rest[: end + 1], rest[end + 1 :].strip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    return Instruction(name, kind, opcode, rest[:end], rest[end + 1 :])


def _closing(text: str) -> int:
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    raise ValueError(f"an HLO instruction without an end: {text[:200]}")


def _calls(computations, instruction: Instruction):
    """The computations that an instruction runs as they are, each with how often; of a conditional,
    all branches.
    """
    if instruction.opcode == "while":
        body, condition = (
            re.search(rf"{part}=%?([\w.-]+)", instruction.attributes)[1]
            for part in ("body", "condition")
        )
        known = re.search(r"known_trip_count\D*(\d+)", instruction.attributes)
        yield (
            body,
            int(known[1]) if known else _trip_count(computations[body], computations[condition]),
        )
    elif instruction.opcode in ("call", "conditional", "async-start"):
        part = re.search(
            r"(?:to_apply|calls)=%?([\w.-]+)|branch_computations=\{([^}]*)\}",
            instruction.attributes,
        )
        for called in re.findall(r"[\w.-]+", part[1] or part[2]) if part else ():
            yield called, 1


def _trip_count(body: list[Instruction], condition: list[Instruction]) -> int:
    """How often a loop runs whose counter starts at 0: its bound over what each round adds to it.

    A loop over a ring of devices is unrolled by two: its counter goes up by 2.
    """
    counter = next(
        int(number[1])
        for instruction in condition
        if (number := re.search(r"index=(\d+)", instruction.attributes))
    )
    bound = max(_constants(condition).values())
    by_name = {instruction.name: instruction for instruction in body}
    update = by_name[body[-1].operands[counter]]
    steps = [
        _constants(body)[operand] for operand in update.operands if operand in _constants(body)
    ]
    return -(-bound // (steps[0] if update.opcode == "add" and steps else 1))


def _constants(computation: list[Instruction]) -> dict[str, int]:
    return {
        instruction.name: int(instruction.inside)
        for instruction in computation
        if instruction.opcode == "constant" and instruction.inside.isdigit()
    }


def _fused(computations, name: str) -> list[str]:
    """The computations of a computation's fusions, and of theirs."""
    found = []
    for instruction in computations[name]:
        if instruction.opcode == "fusion":
            called = _callee(instruction)
            found += [called, *_fused(computations, called)]
    return found


def _moved(computations, instruction: Instruction, types: dict[str, str]) -> int:
    """Bytes that an instruction reads from main memory and writes to it."""
    kind, opcode = instruction.type, instruction.opcode
    if (
        opcode in FREE
        or opcode.endswith(("-done", "-update"))
        or any(f'custom_call_target="{target}"' in instruction.attributes for target in FREE_CALLS)
    ):
        return 0
    read, written = (
        [_size(types[operand], memory=True) for operand in instruction.operands],
        _sizes(kind, memory=True),
    )
    if opcode == "slice-start":  # its type: the operands', the slice's, and what else it needs
        place = len(read)
        return min(sum(read), _sizes(kind)[place]) + written[place]
    if opcode.endswith("-start") and kind.startswith(
        "("
    ):  # operand and result are both in its type
        return sum(written)
    if opcode in SLICES:
        read = [min(read[0], _size(kind))]
    elif opcode == "dynamic-update-slice":
        updated = _size(types[instruction.operands[1]])
        read, written = [read[1]], [min(updated, written[0])]
    elif opcode == "fusion":
        body = _called(computations, instruction)
        read = [
            min(size, _read(computations, body, name))
            for size, name in zip(read, _parameters(body), strict=True)
        ]
        results = (
            body[-1].operands if body[-1].opcode == "tuple" else [body[-1].name] * len(written)
        )
        written = [
            min(size, _written(computations, body, name))
            for size, name in zip(written, results, strict=True)
        ]
        read, written = _carried(instruction, body, read, written)
    return sum(read) + sum(written)


def _read(computations, body: list[Instruction], name: str) -> float:
    """Bytes of a fusion's value that are read: of what is only sliced, the slices; inf for the
    whole.
    """
    total = 0
    for use in (instruction for instruction in body if name in instruction.operands):
        places = [place for place, operand in enumerate(use.operands) if operand == name]
        if use.opcode in SLICES and places == [0]:
            total += _size(use.type)
        elif use.opcode == "bitcast" and use is not body[-1]:
            total += _read(computations, body, use.name)
        elif use.opcode == "fusion":
            inner = _called(computations, use)
            total += sum(_read(computations, inner, _parameters(inner)[place]) for place in places)
        elif use.opcode != "dynamic-update-slice" or places != [
            0
        ]:  # of which only another part is written
            return math.inf
    return total


def _written(computations, body: list[Instruction], name: str) -> int:
    """Bytes of a fusion's result that are written: of what is updated in place, the update."""
    by_name = {instruction.name: instruction for instruction in body}
    made = by_name[name]
    if made.opcode == "bitcast":
        return _written(computations, body, made.operands[0])
    if made.opcode == "dynamic-update-slice":
        return _size(by_name[made.operands[1]].type)
    if made.opcode == "fusion" and not made.type.startswith("("):
        inner = _called(computations, made)
        return _written(computations, inner, inner[-1].name)
    return _size(made.type)


def _carried(
    fusion: Instruction, body: list[Instruction], read: list[int], written: list[int]
) -> tuple[list[int], list[int]]:
    """What a fusion reads and writes besides the buffers of a collective that goes on meanwhile, or
    ends there.
    """
    root = body[-1]
    idle = {instruction.name for instruction in body if instruction.opcode in RECEIVED} | {
        root.name
    }
    buffers = {
        place
        for place, name in enumerate(_parameters(body))
        if root.opcode in ("tuple", "custom-call")
        and {instruction.name for instruction in body if name in instruction.operands} <= idle
    }
    handed_on = {
        int(result or 0)
        for result, operand in re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", fusion.attributes)
        if int(operand) in buffers
    }
    written = [0 if place in handed_on else size for place, size in enumerate(written)]
    if "AsyncCollectiveStart" not in root.attributes:
        read = [0 if place in buffers else size for place, size in enumerate(read)]
    return read, written


def _callee(fusion: Instruction) -> str:
    return re.search(r"calls=%?([\w.-]+)", fusion.attributes)[1]


def _called(computations, fusion: Instruction) -> list[Instruction]:
    return computations[_callee(fusion)]


def _parameters(body: list[Instruction]) -> list[str]:
    """Names, in order."""
    found = {
        int(instruction.inside): instruction.name
        for instruction in body
        if instruction.opcode == "parameter"
    }
    return [found[place] for place in range(len(found))]


def _size(kind: str, memory: bool = False) -> int:
    """Bytes of a type; memory: only of the arrays that are in main memory."""
    return sum(_sizes(kind, memory))


def _sizes(kind: str, memory: bool = False) -> list[int]:
    """Likewise of each of its arrays."""
    return [
        0
        if memory and "S(" in where
        else BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims, where in ARRAY.findall(kind)
    ]


def _group(attributes: str) -> int:
    """How many devices take part in a collective with each other; 1 where it names pairs
    instead.
    """
    if lists := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(lists[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if "source_target_pairs" in attributes:
        return 1
    raise ValueError(f"a collective between devices that cannot be read: {attributes[:200]}")
