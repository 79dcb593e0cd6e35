"""Folders of safetensors: one file, or shards with an index.

Nothing here knows what a model is: tensors have names and shapes.
"""

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
CONVERT = """On the hub, a pull request of such a model often has
safetensors: name it, as OWNER/NAME@refs/pr/N. Or convert it once, with transformers and torch (a
classifier with AutoModelForSequenceClassification):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    model.save_pretrained(NEW_FOLDER, safe_serialization=True)
    AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"""


def read(folder: pathlib.Path) -> Iterator[tuple[str, str, object]]:
    """Yield (file name, tensor name, slice) of every stored tensor.

    Only headers are read until a slice is indexed. Raises FileNotFoundError when a file is missing
    and ValueError when one is damaged.
    """
    for file in files(folder):
        try:
            opened = safetensors.safe_open(file, framework="numpy")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); fetch or write it again.") from error
        for name in sorted(opened.keys()):
            yield file.name, name, opened.get_slice(name)


def match(
    folder: pathlib.Path,
    model: str,
    shapes: dict[str, list[int]],
    *,
    base: str,
    ignored: re.Pattern,
    optional: Collection[str] = (),
) -> dict[str, object]:
    """Return the stored slice of each tensor of a model.

    model: what the tensors should make up, for the error. shapes: name -> expected shape. base: a
    prefix of names, which a checkpoint may leave out. ignored: names, without the prefix, that are
    skipped. optional: names that may be missing.

    Raises ValueError with the name of every tensor that is unknown, missing, set twice, wrongly
    shaped or not a float.
    """
    # Checkpoints of a model without its head leave the prefix out. Names are compared without it.
    full_names = {name.removeprefix(base): name for name in shapes}
    found = {}
    problems = []
    for file, stored_name, values in read(folder):
        short_name = stored_name.removeprefix(base)
        if ignored.search(short_name):
            continue
        name = full_names.get(short_name)
        shape = values.get_shape()
        dtype = values.get_dtype()
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
        found[name] = values
    # Everything is checked before the error, which then names all that is wrong at once.
    for name, shape in shapes.items():
        if name not in found and name not in optional:
            problems.append(f"missing: {name} {shape}")
    if problems:
        raise mismatch(folder, model, problems)
    return found


def mismatch(folder: pathlib.Path, model: str, problems: list[str]) -> ValueError:
    """Return the error that tensors are not those of a model, with everything that does not fit."""
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


def differ(a, b, rows: int = 4096) -> bool:
    """Return whether two stored matrices differ, comparing some rows at a time."""
    if a.get_shape() != b.get_shape():
        return True
    count = a.get_shape()[0]
    # In blocks, since an embedding may be gigabytes.
    blocks = (slice(start, min(start + rows, count)) for start in range(0, count, rows))
    return any((a[block] != b[block]).any() for block in blocks)


def stored_dtype(folder: pathlib.Path) -> str:
    """Return the type that most numbers of a folder's tensors are stored in, F32 for one."""
    counts = dict.fromkeys(FLOATS, 0)
    for _, _, values in read(folder):
        dtype = values.get_dtype()
        if dtype in counts:
            counts[dtype] += math.prod(values.get_shape())
    return max(counts, key=counts.get)


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the one file of the folder, or the shards that its index lists.

    Raises FileNotFoundError when there are none, or some are missing.
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
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    absent = [file.name for file in shards if not file.exists()]
    if absent:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(absent)}, which its index lists; fetch it again."
        )
    return shards


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
