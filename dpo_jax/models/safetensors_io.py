"""Folders of safetensors: one file, or shards with an index.

Nothing here knows what a model is: tensors have names and shapes.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import re
from collections.abc import Collection, Iterator

import numpy as np
import safetensors
import safetensors.numpy

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")  # stored types that are read, all as float32
SHOWN_PROBLEMS = 20  # lines of an error
CONVERT = """On the hub, a pull request of such a model often has
safetensors: name it, as OWNER/NAME@refs/pr/N. Or convert it once, with transformers and torch (a
classifier with AutoModelForSequenceClassification):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    model.save_pretrained(NEW_FOLDER, safe_serialization=True)
    AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file, of which only the header has been read."""

    file: pathlib.Path
    name: str  # in the file
    _slice: object  # safetensors' own

    @property
    def shape(self) -> list[int]:
        """Its shape."""
        return self._slice.get_shape()

    @property
    def dtype(self) -> str:
        """Its type as safetensors calls it, such as BF16."""
        return self._slice.get_dtype()

    def __getitem__(self, index) -> np.ndarray:
        return self._slice[index]

    def read(self) -> np.ndarray:
        """Return all of it; ValueError where one of its numbers is not finite."""
        values = self._slice[:]
        infinity = _magnitude_bits(np.array([np.inf], values.dtype))
        if _magnitude_bits(values) >= infinity:
            raise ValueError(
                f"{self.file}: the tensor {self.name} has numbers that are not finite (nan or "
                "inf). The file is damaged, or the training that wrote it had failed: fetch it "
                "again, or take an earlier model."
            )
        return values


def is_zero(values: np.ndarray) -> bool:
    """Return whether all numbers of an array are 0; False where there are none."""
    return values.size > 0 and _magnitude_bits(values) == 0


def _magnitude_bits(values: np.ndarray, block: int = 1 << 22) -> int:
    """Return the bits of the largest magnitude in an array, nan above infinity.

    Without the sign, floats are in the order of their bits: integers are compared, which is quick
    for bfloat16 too, and in blocks, so that an embedding of gigabytes is not copied.
    """
    unsigned = np.dtype(f"uint{8 * values.dtype.itemsize}")
    bits = np.ascontiguousarray(values).reshape(-1).view(unsigned)
    sign = unsigned.type(1 << (8 * unsigned.itemsize - 1))
    largest = 0
    for start in range(0, bits.size, block):
        part = bits[start : start + block] & ~sign
        largest = max(largest, int(part.max()))
    return largest


def read(folder: pathlib.Path) -> Iterator[Stored]:
    """Yield every stored tensor; only headers are read.

    Raises FileNotFoundError when a file is missing, and ValueError when one is damaged or lacks a
    tensor that the index has in it.
    """
    stored_in = files(folder)
    listed = _weight_map(folder) if stored_in != [folder / SINGLE] else {}
    for file in stored_in:
        tensors = open_file(file)
        absent = [name for name, held in listed.items() if held == file.name]
        absent = sorted(set(absent) - tensors.keys())
        if absent:
            raise ValueError(
                f"{folder / INDEX} has {_first_few(absent)} in {file.name}, which does not hold "
                "it: the two are not of one model. Fetch both again."
            )
        yield from tensors.values()


def open_file(file: pathlib.Path) -> dict[str, Stored]:
    """Return the tensors of a safetensors file by name.

    Raises ValueError where the file is damaged, and OSError where it cannot be read.
    """
    try:
        opened = safetensors.safe_open(file, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); fetch or write it again.") from error
    except OSError as error:
        # Such as no permission, or a disk that fails: the content may be whole.
        raise OSError(
            f"{file} cannot be read ({error}). Make it a file that you may read, on a disk that "
            "works, and run the command again."
        ) from error
    return {name: Stored(file, name, opened.get_slice(name)) for name in sorted(opened.keys())}


def match(
    folder: pathlib.Path,
    model: str,
    shapes: dict[str, list[int]],
    *,
    base: str,
    text_part: str = "",
    ignored: re.Pattern,
    optional: Collection[str] = (),
) -> dict[str, Stored]:
    """Return the stored tensor of each name of a model.

    model: what the tensors should make up, for the error. shapes: name -> expected shape. base: a
    prefix of names, which a checkpoint may leave out. text_part: what names hold besides in a model
    of text and images. ignored: names, without the prefix, that are skipped. optional: names that
    may be missing.

    Raises ValueError with the name of every tensor that is unknown, missing, set twice, wrongly
    shaped or not a float.
    """
    # Checkpoints of a model without its head leave the prefix out. Names are compared without it.
    full_names = {name.removeprefix(base): name for name in shapes}
    found = {}
    problems = []
    for tensor in read(folder):
        file = tensor.file.name
        stored_name = tensor.name
        short_name = stored_name.replace(text_part, "", 1).removeprefix(base)
        if ignored.search(short_name):
            continue
        name = full_names.get(short_name)
        shape = tensor.shape
        dtype = tensor.dtype
        stored = f"{stored_name} {shape} in {file}"
        if name is None:
            problems.append(f"unknown: {stored}")
            continue
        # Once with the prefix and once without, or in two shards.
        if name in found:
            problems.append(f"set twice: {name}, again as {stored_name} in {file}")
        if shape != shapes[name]:
            problems.append(f"wrong shape: {stored}, expected {shapes[name]}")
        if dtype not in FLOATS:
            problems.append(
                f"wrong type: {stored_name} {dtype} in {file}, expected one of {', '.join(FLOATS)}"
            )
        found[name] = tensor
    # Everything is checked before the error, which then names all that is wrong at once.
    for name, shape in shapes.items():
        if name not in found and name not in optional:
            problems.append(f"missing: {name} {shape}")
    if problems:
        raise mismatch(folder, model, problems)
    return found


def mismatch(folder: pathlib.Path, model: str, problems: list[str]) -> ValueError:
    """Return the error that tensors are not those of a model, with everything that does not fit."""
    if len(problems) > SHOWN_PROBLEMS:
        more = len(problems) - SHOWN_PROBLEMS
        problems = [*problems[:SHOWN_PROBLEMS], f"and {more:,} more"]
    summary = f"the tensors in {folder} are not those of the {model} in its config.json:"
    advice = "Check that config.json belongs to these weights and that all files are there."
    return ValueError("\n  ".join([summary, *problems]) + f"\n{advice}")


def write(
    folder: pathlib.Path,
    shapes: dict[str, tuple[int, ...]],
    tensors: Iterator[tuple[str, np.ndarray]],
    *,
    itemsize: int,
    max_shard_bytes: int,
):
    """Write tensors, holding one shard of them at a time.

    tensors: in the order of their shapes. itemsize: bytes of each of their numbers.
    """
    sizes = {name: math.prod(shape) * itemsize for name, shape in shapes.items()}
    shards = _shards(sizes, max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # Only these are taken from the iterator, so only one shard is in memory.
        shard = dict(itertools.islice(tensors, len(names)))
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        metadata = {"total_size": sum(sizes.values())}
        index = {"metadata": metadata, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def save_file(tensors: dict[str, np.ndarray], file: pathlib.Path) -> None:
    """Write one safetensors file, with the permissions that any new file gets."""
    # The library makes its files readable by their owner alone, whatever the umask says.
    file.touch()
    mode = file.stat().st_mode
    # transformers refuses a file without this metadata.
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)


def differ(a: Stored, b: Stored, rows: int = 4096) -> bool:
    """Return whether two stored matrices differ, comparing some rows at a time."""
    if a.shape != b.shape:
        return True
    count = a.shape[0]
    # In blocks, since an embedding may be gigabytes.
    blocks = (slice(start, min(start + rows, count)) for start in range(0, count, rows))
    return any((a[block] != b[block]).any() for block in blocks)


def stored_dtype(folder: pathlib.Path) -> str:
    """Return the type that most numbers of a folder's tensors are stored in, F32 for one."""
    counts = dict.fromkeys(FLOATS, 0)
    for tensor in read(folder):
        if tensor.dtype in counts:
            counts[tensor.dtype] += math.prod(tensor.shape)
    return max(counts, key=counts.get)


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the one file of the folder, or the shards that its index lists.

    Raises FileNotFoundError when there are none, or some are missing, and ValueError where the
    index cannot be read or leads out of the folder.
    """
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        pickles = ", ".join(file.name for file in sorted(folder.glob("*.bin")))
        raise FileNotFoundError(
            f"{folder} holds neither {SINGLE} nor {INDEX}. Loading "
            f"{pickles or 'pytorch_model.bin'} would run code from a pickle. {CONVERT}"
        )
    # Not every *.safetensors file there: a folder may hold the remains of other exports.
    shards = [folder / name for name in sorted(set(_weight_map(folder).values()))]
    absent = [file.name for file in shards if not file.exists()]
    if absent:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(absent)}, which its index lists; fetch it again."
        )
    strangers = [file.name for file in shards if not _is_confined(file)]
    if strangers:
        raise ValueError(
            f"{_first_few(strangers)} in {folder} is a link out of the folder. Put the file itself "
            "there; only the hub's own cache has such links."
        )
    return shards


def _weight_map(folder: pathlib.Path) -> dict[str, str]:
    """Return the index of a folder's shards, tensor -> name of the file that holds it."""
    path = folder / INDEX
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch or write it again.") from error
    weight_map = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f'{path}: expected {{"weight_map": {{TENSOR: FILE, ...}}}}, with an entry for each '
            "tensor; fetch or write it again."
        )
    for tensor, name in weight_map.items():
        is_name = isinstance(name, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", name)
        if not is_name:
            raise ValueError(
                f"{path} has {tensor!r} in {str(name)[:200]!r}: expected the name of a safetensors "
                "file in the same folder."
            )
    return weight_map


def _is_confined(file: pathlib.Path) -> bool:
    """Return whether a file lies in its folder, or where the hub's cache keeps its files."""
    folder = file.parent.resolve()
    target = file.resolve()
    # models--OWNER--NAME/snapshots/REVISION/FILE is a link to models--OWNER--NAME/blobs/HASH.
    is_snapshot = folder.parent.name == "snapshots"
    is_blob = is_snapshot and target.parent == folder.parent.parent / "blobs"
    return target.parent == folder or is_blob


def _first_few(names: list[str], count: int = 3) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _shards(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Return the names in order, cut wherever the next tensor would make a shard too large."""
    shards = [[]]
    filled = 0
    for name, size in sizes.items():
        # A tensor larger than a shard gets one of its own.
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
