"""Collectives and memory traffic of a compiled step on one device, read from XLA's text of it.

The compiler's own cost analysis counts the body of a loop once. Here it counts as often as it runs.
"""

import math
import re
from typing import NamedTuple

import numpy as np

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
# Devices in order as an array, whose axes may be transposed: [64,2]T(1,0).
IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
# A part of a mesh's axis: its name, the product of the parts before it, and its size.
PART_OF_AXIS = re.compile(r"'(\w+)':\((\d+)\)(\d+)")
# Collective -> bytes that each of g devices receives per byte of its operands.
RECEIVED = {
    "all-gather": lambda g: g - 1,
    "reduce-scatter": lambda g: (g - 1) / g,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "collective-permute": lambda g: 1,
}
# Opcodes that move nothing, or next to nothing.
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
}
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")
SLICES = ("dynamic-slice", "slice", "gather")  # they read their result's size, not their operand's


class Instruction(NamedTuple):
    """One line of HLO: %name = type opcode(inside), attributes."""

    name: str
    type: str
    opcode: str
    inside: str  # operands, a constant's value or a parameter's number
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.-]+)", self.inside)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Return the instructions of each computation, and the name of the entry computation."""
    # A computation is a header that ends in {, then a line for each instruction.
    found = {}
    entry = ""
    current = None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif body := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)", line):
            current.append(_instruction(body[1], body[2]))
    return found, entry


def trips(computations, entry: str) -> dict[str, float]:
    """Count how often each computation runs in one call of the program, fusions left out."""
    found = {}

    def visit(name, times):
        found[name] = found.get(name, 0) + times
        for instruction in computations[name]:
            for called, count in _calls(computations, instruction):
                visit(called, times * count)

    # A computation called from several places runs as often as all of them together. Fusions are
    # left out: their instructions move nothing by themselves, only the fusion does.
    visit(entry, 1)
    return found


class Collective(NamedTuple):
    """A collective of the program."""

    kind: str  # a key of RECEIVED
    times: float  # that one call of the program runs it
    received: float  # bytes that a device receives each time
    attributes: str  # of its instruction


def collectives(text: str) -> dict[str, tuple[int, float]]:
    """Count the collectives of one call of the program: kind -> (how many, bytes received)."""
    totals = {}
    for found in list_collectives(text):
        count, size = totals.get(found.kind, (0, 0.0))
        totals[found.kind] = count + found.times, size + found.times * found.received
    return totals


def bytes_between_machines(text: str, gpus: int) -> float:
    """Return the bytes that a GPU's network card receives in one call of the program.

    gpus: in each machine; devices are numbered through all machines. What several GPUs of a machine
    receive in the same collective comes to the machine once, over the cards of all of them. That is
    the least: a plain ring over all GPUs brings more.
    """
    total = 0.0
    for found in list_collectives(text):
        total += found.times * found.received * _share_between_machines(found, gpus)
    return total


def _share_between_machines(collective: Collective, gpus: int) -> float:
    """Return the share of what a GPU receives that its own network card has to bring."""
    machines = []
    for members in _members(collective.attributes):
        machines.append({device // gpus for device in members})
    if all(len(found) == 1 for found in machines):
        return 0.0
    if collective.kind == "collective-permute":  # each device receives from one other
        return 1.0
    together = len(_members(collective.attributes)[0])
    if collective.kind == "all-to-all":  # what each receives is its own
        here = together / len(machines[0])
        return (together - here) / (together - 1)
    return (len(machines[0]) - 1) / (together - 1)


def list_collectives(text: str) -> list[Collective]:
    """Return the collectives of one call of the program."""
    computations, entry = parse(text)
    # An asynchronous collective is printed in parts (start, done, fused pieces), each with the
    # whole's bytes and the same channel. Group the parts by channel to count each once.
    parts = {}
    for name, times in trips(computations, entry).items():
        for inner in [name, *_fused(computations, name)]:
            types = {instruction.name: instruction.type for instruction in computations[inner]}
            for instruction in computations[inner]:
                kind = _collective_kind(instruction, inner)
                if kind is None:
                    continue
                size = sum(_size(types[operand]) for operand in instruction.operands)
                received = size * RECEIVED[kind](_group(instruction.attributes))
                channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                key = channel[1] if channel else instruction.name
                part = Collective(kind, times, received, instruction.attributes)
                parts.setdefault(key, []).append(part)
    found = []
    for same in parts.values():
        # A part inside a loop would count the collective once a round, but the collective starts
        # and ends outside of the loop: take the smallest count.
        times = min(part.times for part in same)
        largest = max(same, key=lambda part: (part.received, part.kind))
        found.append(largest._replace(times=times))
    return found


def _collective_kind(instruction: Instruction, computation: str) -> str | None:
    """The key of RECEIVED of a collective; None for any other instruction."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in RECEIVED:
        return None
    # The TPU compiler prints a reduce-scatter as an all-reduce inside a computation of that name.
    if kind == "all-reduce" and "scatter" in computation:
        return "reduce-scatter"
    return kind


def memory_traffic(text: str) -> float:
    """Return the bytes read from and written to main memory in one call of the program.

    Every instruction reads its operands and writes its result, except those in on-chip memory. A
    slice reads only what it slices.
    """
    computations, entry = parse(text)
    total = 0
    for name, times in trips(computations, entry).items():
        types = {instruction.name: instruction.type for instruction in computations[name]}
        for instruction in computations[name]:
            total += times * _moved(computations, instruction, types)
    return total


def _instruction(name: str, rest: str) -> Instruction:
    # A tuple's type is in parentheses and has blanks inside; any other ends at the first blank.
    end = _closing(rest) if rest.startswith("(") else rest.index(" ") - 1
    kind = rest[: end + 1]
    rest = rest[end + 1 :].strip()
    opcode, _, rest = rest.partition("(")
    # Operands may have parentheses of their own, in their types.
    end = _closing("(" + rest) - 1
    return Instruction(name, kind, opcode, rest[:end], rest[end + 1 :])


def _closing(text: str) -> int:
    """The index of the parenthesis that closes the first one."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    raise ValueError(f"this HLO instruction has no closing parenthesis: {text[:200]}")


def _calls(computations, instruction: Instruction):
    """Yield (computation, times) of each call.

    Of a conditional each branch counts in part, as if all were taken equally often.
    """
    if instruction.opcode == "while":
        body = re.search(r"body=%?([\w.-]+)", instruction.attributes)[1]
        condition = re.search(r"condition=%?([\w.-]+)", instruction.attributes)[1]
        # Where the compiler has worked out the count, it writes it down.
        known = re.search(r"known_trip_count\D*(\d+)", instruction.attributes)
        if known:
            yield body, int(known[1])
        else:
            yield body, _trip_count(computations[body], computations[condition])
    elif instruction.opcode in ("call", "conditional", "async-start"):
        part = re.search(
            r"(?:to_apply|calls)=%?([\w.-]+)|branch_computations=\{([^}]*)\}",
            instruction.attributes,
        )
        called = re.findall(r"[\w.-]+", part[1] or part[2]) if part else []
        for computation in called:
            yield computation, 1 / len(called)


def _trip_count(body: list[Instruction], condition: list[Instruction]) -> int:
    """Rounds of a loop whose counter starts at 0: its bound over what each round adds.

    A loop over a ring of devices is unrolled by two, so its counter goes up by 2.
    """
    # The condition reads the counter out of the loop's tuple of state, at this index.
    indices = (re.search(r"index=(\d+)", instruction.attributes) for instruction in condition)
    counter = next(int(index[1]) for index in indices if index)
    # The condition compares the counter with the bound, which is taken to be its largest constant.
    bound = max(_constants(condition).values())
    by_name = {instruction.name: instruction for instruction in body}
    update = by_name[body[-1].operands[counter]]
    constants = _constants(body)
    steps = [constants[operand] for operand in update.operands if operand in constants]
    step = steps[0] if update.opcode == "add" and steps else 1
    return -(-bound // step)


def _constants(computation: list[Instruction]) -> dict[str, int]:
    """Integer constants of a computation, by name."""
    return {
        instruction.name: int(instruction.inside)
        for instruction in computation
        if instruction.opcode == "constant" and instruction.inside.isdigit()
    }


def _fused(computations, name: str) -> list[str]:
    """Names of the computations fused into this one, at any depth."""
    found = []
    for instruction in computations[name]:
        if instruction.opcode == "fusion":
            called = _callee(instruction)
            found += [called, *_fused(computations, called)]
    return found


def _moved(computations, instruction: Instruction, types: dict[str, str]) -> int:
    """Bytes that an instruction reads from main memory and writes to it."""
    kind = instruction.type
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith(("-done", "-update")):
        return 0
    # These calls reserve or rename memory, or are promises to the compiler.
    if any(f'custom_call_target="{call}"' in instruction.attributes for call in FREE_CALLS):
        return 0
    read = [_size(types[operand], memory=True) for operand in instruction.operands]
    written = _sizes(kind, memory=True)
    # Asynchronous instructions come as a -start and a -done. All traffic is counted at the start.
    if opcode == "slice-start":
        # Its type lists the operands, then the slice, then what else it needs.
        place = len(read)
        return min(sum(read), _sizes(kind)[place]) + written[place]
    if opcode.endswith("-start") and kind.startswith("("):
        return sum(written)  # its type holds both operand and result
    if opcode in SLICES:
        read = [min(read[0], _size(kind))]
    elif opcode == "dynamic-update-slice":
        # It writes into its operand in place: only the update moves.
        updated = _size(types[instruction.operands[1]])
        read = [read[1]]
        written = [min(updated, written[0])]
    elif opcode == "fusion":
        # A fusion's inner values stay in registers; only operands and results move, and of those
        # maybe only slices.
        read, written = _moved_by_fusion(computations, instruction, read, written)
    return sum(read) + sum(written)


def _moved_by_fusion(computations, fusion: Instruction, read: list[int], written: list[int]):
    """Bytes of each operand that a fusion reads, and of each result that it writes."""
    body = _called(computations, fusion)
    parameters = _parameters(body)
    root = body[-1]
    # A fusion of several results ends in a tuple of them.
    results = root.operands if root.opcode == "tuple" else [root.name] * len(written)
    # The smaller of two bounds: an operand in on-chip memory counts as 0, a sliced one as its
    # slices.
    read = [
        min(size, _read(computations, body, name))
        for size, name in zip(read, parameters, strict=True)
    ]
    written = [
        min(size, _written(computations, body, name))
        for size, name in zip(written, results, strict=True)
    ]
    return _without_carried(fusion, body, read, written)


def _read(computations, body: list[Instruction], name: str) -> float:
    """Bytes of a fusion's value that are read: the slices if it is only sliced, else inf (all)."""
    total = 0
    for use in body:
        if name not in use.operands:
            continue
        places = [place for place, operand in enumerate(use.operands) if operand == name]
        if use.opcode in SLICES and places == [0]:
            total += _size(use.type)
        elif use.opcode == "bitcast" and use is not body[-1]:
            # The same bytes under another shape: look at who reads them.
            total += _read(computations, body, use.name)
        elif use.opcode == "fusion":
            inner = _called(computations, use)
            for place in places:
                total += _read(computations, inner, _parameters(inner)[place])
        elif use.opcode == "dynamic-update-slice" and places == [0]:
            continue  # updated in place: it is written elsewhere, and not read
        else:
            # Anything else reads all of it. The caller takes the operand's size.
            return math.inf
    return total


def _written(computations, body: list[Instruction], name: str) -> int:
    """Bytes of a fusion's result that are written: only the update if it is updated in place."""
    by_name = {instruction.name: instruction for instruction in body}
    made = by_name[name]
    if made.opcode == "bitcast":
        return _written(computations, body, made.operands[0])
    if made.opcode == "dynamic-update-slice":
        return _size(by_name[made.operands[1]].type)
    # A nested fusion of one result: what it writes is what its own root writes.
    if made.opcode == "fusion" and not made.type.startswith("("):
        inner = _called(computations, made)
        return _written(computations, inner, inner[-1].name)
    return _size(made.type)


def _without_carried(
    fusion: Instruction, body: list[Instruction], read: list[int], written: list[int]
) -> tuple[list[int], list[int]]:
    """Leave out the buffers of a collective that runs during the fusion or ends in it.

    Such buffers pass through the fusion as operands and results, but it does not touch them.
    """
    root = body[-1]
    idle = {instruction.name for instruction in body if instruction.opcode in RECEIVED}
    idle.add(root.name)
    # An operand is such a buffer if nothing but collectives and the root uses it.
    buffers = set()
    if root.opcode in ("tuple", "custom-call"):
        for place, name in enumerate(_parameters(body)):
            users = {instruction.name for instruction in body if name in instruction.operands}
            if users <= idle:
                buffers.add(place)
    # The fusion says which results are its operands' memory: a buffer among them is handed on
    # unwritten.
    aliases = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", fusion.attributes)
    handed_on = {int(result or 0) for result, operand in aliases if int(operand) in buffers}
    written = [0 if place in handed_on else size for place, size in enumerate(written)]
    # Where the collective starts here, it does read what it will send.
    if "AsyncCollectiveStart" not in root.attributes:
        read = [0 if place in buffers else size for place, size in enumerate(read)]
    return read, written


def _callee(fusion: Instruction) -> str:
    """The name of the computation that a fusion runs."""
    return re.search(r"calls=%?([\w.-]+)", fusion.attributes)[1]


def _called(computations, fusion: Instruction) -> list[Instruction]:
    return computations[_callee(fusion)]


def _parameters(body: list[Instruction]) -> list[str]:
    """Names of a computation's parameters, in order."""
    found = {}
    for instruction in body:
        if instruction.opcode == "parameter":
            found[int(instruction.inside)] = instruction.name
    return [found[place] for place in range(len(found))]


def _size(kind: str, memory: bool = False) -> int:
    """Bytes of a type. memory: count only the arrays in main memory."""
    return sum(_sizes(kind, memory))


def _sizes(kind: str, memory: bool = False) -> list[int]:
    """Bytes of each array of a type."""
    sizes = []
    for dtype, dims, layout in ARRAY.findall(kind):
        elements = math.prod(int(n) for n in dims.split(",") if n)
        on_chip = "S(" in layout  # a memory space other than the main memory
        sizes.append(0 if memory and on_chip else BYTES.get(dtype, 0) * elements)
    return sizes


def _members(attributes: str) -> list[list[int]]:
    """Return the groups of a collective, as numbers of devices; a permute's pairs are groups.

    Raises ValueError if they cannot be read.
    """
    # XLA writes groups in three ways: as lists {{0,1},{2,3}}, as [groups,size], or as axes of a
    # mesh.
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes)
    lists = re.search(r"replica_groups=\{(\{.*?\})\}", attributes) or pairs
    if lists:
        groups = re.findall(r"\{([\d,]+)\}", lists[1])
        return [[int(device) for device in group.split(",")] for group in groups]
    iota = re.search(rf"replica_groups=\[(\d+),(\d+)\]<={IOTA}", attributes)
    if iota:
        groups, size, axes, order = iota.groups()
        return _iota(axes, order).reshape(int(groups), int(size)).tolist()
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? ?\{([^}]*)\}", attributes
    )
    if mesh:
        return _members_of_mesh(*mesh.groups())
    raise ValueError(f"the devices of this collective cannot be read: {attributes[:200]}")


def _members_of_mesh(axes: str, device_ids: str | None, together: str) -> list[list[int]]:
    """Return the groups over some axes of a mesh.

    axes: 'x'=4,'y'=2. device_ids: the devices of the mesh, as a list or an array of its own, if
    they are not in order. together: the axes of a group, as 'y', or a part of one, as 'x':(1)2: its
    outer half.
    """
    shape = []
    names = []
    parts = {
        name: (int(before), int(size)) for name, before, size in PART_OF_AXIS.findall(together)
    }
    for name, size in re.findall(r"'(\w+)'=(\d+)", axes):
        before, part = parts.get(name, (1, int(size)))
        # A whole axis is a part with nothing before or after it.
        shape += [before, part, int(size) // (before * part)]
        names += [f"{name} before", name, f"{name} after"]
    if device_ids is None:
        devices = np.arange(math.prod(shape))
    elif found := re.fullmatch(IOTA, device_ids):
        devices = _iota(*found.groups())
    else:
        devices = np.array([int(device) for device in device_ids.split(",")])
    inner = [names.index(name) for name in re.findall(r"'(\w+)'", together)]
    last = np.moveaxis(devices.reshape(shape), inner, range(-len(inner), 0))
    return last.reshape(-1, math.prod(shape[place] for place in inner)).tolist()


def _iota(axes: str, order: str | None) -> np.ndarray:
    """Return the devices in order, as an array of these axes, with the axes in another order."""
    sizes = [int(n) for n in axes.split(",")]
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return devices.transpose([int(n) for n in order.split(",")]) if order else devices


def _group(attributes: str) -> int:
    """Return how many devices take part in a collective together; 1 if it names pairs instead."""
    if "source_target_pairs" in attributes:
        return 1
    return len(_members(attributes)[0])
