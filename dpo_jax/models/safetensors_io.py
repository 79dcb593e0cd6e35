"""Folders of safetensors: one file, or shards with an index. Knows names and shapes, not models."""

import itertools
import json
import math
import pathlib
from collections.abc import Iterator

import numpy as np
import safetensors
import safetensors.numpy

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONVERT = """On the hub, a pull request of such a model often has
safetensors: name it, as OWNER/NAME@refs/pr/N. Or convert it once, with transformers and torch, a classifier by
AutoModelForSequenceClassification:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)
    AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"""


def read(folder: pathlib.Path) -> Iterator[tuple[str, str, object]]:
    """(file name, tensor name, slice) of every stored tensor; only headers are read until a slice
    is indexed.

    Raises FileNotFoundError when a file is missing and ValueError when one is damaged.
    """
    for file in files(folder):
        try:
            opened = safetensors.safe_open(file, framework="numpy")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); fetch or write it again.") from error
        yield from ((file.name, name, opened.get_slice(name)) for name in sorted(opened.keys()))


def write(
    folder: pathlib.Path,
    shapes: dict[str, tuple[int, ...]],
    tensors: Iterator[tuple[str, np.ndarray]],
    *,
    max_shard_bytes: int,
):
    """Writes float32 tensors that come in the order of their shapes, holding one shard of them at a
    time.
    """
    shards = _shards(shapes, max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = (
            SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        safetensors.numpy.save_file(
            dict(itertools.islice(tensors, len(names))), folder / file, metadata={"format": "pt"}
        )  # transformers insists
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(_bytes, shapes.values()))},
            "weight_map": weight_map,
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The one file of the folder, or the shards that its index lists; FileNotFoundError where these
    are not there.
    """
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        pickles = (
            ", ".join(file.name for file in sorted(folder.glob("*.bin"))) or "pytorch_model.bin"
        )
        raise FileNotFoundError(
            f"{folder} holds neither {SINGLE} nor {INDEX}. Loading {pickles} would run code "
            f"from a pickle. {CONVERT}"
        )
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    if absent := [file.name for file in shards if not file.exists()]:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(absent)}, which its index lists; fetch it again."
        )
    return shards


def _shards(shapes: dict[str, tuple[int, ...]], max_bytes: int) -> list[list[str]]:
    """The names in order, cut wherever the next tensor would make a shard too large."""
    shards, filled = [[]], 0
    for name, shape in shapes.items():
        if shards[-1] and filled + _bytes(shape) > max_bytes:
            shards, filled = [*shards, []], 0
        shards[-1].append(name)
        filled += _bytes(shape)
    return shards


def _bytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(np.float32).itemsize
