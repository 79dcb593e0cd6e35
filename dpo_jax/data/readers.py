"""Records from a file, a folder of files, or a data set of the Hugging Face hub.

Text formats are parsed here, from the lines that `datasets` reads. Its own JSON and CSV builders
guess one type for a column, which can turn 3 into "3" and an answer "NA" into nothing, and they
leave no line number to name in an error.
"""

import csv
import functools
import glob
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dpo_jax.data.ledger import Malformed

Record = dict | str  # the fields, or a line of JSON that holds them
# name -> a function that reads (where, record) of each row
Splits = dict[str, Callable[[], Iterator[tuple[str, Record]]]]

# A word in the name of a file or folder -> the split it stands for.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(-\w+)?")  # how the hub names the files of a split
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
BATCH = 1000


def read_jsonl(path) -> Iterator[tuple[int, dict]]:
    """Yield the objects of a JSON lines file (.gz too) with their line numbers, from 1.

    Blank lines are skipped. Raises FileNotFoundError without a file, and ValueError naming the line
    that is not a JSON object.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{str(path)!r}: no such file.")
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            yield number, fields_of(line)
        except Malformed as error:
            raise ValueError(f"{path} line {number}: {error}.") from None


def fields_of(record: Record) -> dict:
    """Return the fields of a record.

    Raises Malformed where its line is not a JSON object, or a text has half a surrogate pair.
    """
    # Encoding every text takes time, so a line is first searched for the escapes of surrogates.
    may_have_surrogates = not isinstance(record, str) or SURROGATE.search(record)
    if isinstance(record, str):
        record = _parsed(record)
    if not isinstance(record, dict):
        raise Malformed("a row is an object, {...}", repr(record)[:80])
    if may_have_surrogates:
        for text in _texts_of(record):
            _check_surrogates(text)
    return record


def _check_surrogates(text: str) -> None:
    """Raise Malformed for half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Malformed(
            "half of a surrogate pair is no character", repr(error.object[error.start])
        ) from None


def _texts_of(value) -> Iterator[str]:
    """Yield all texts in a value, but not the names of fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts_of(part)


def _parsed(line: str):
    """Return what a line of JSON holds."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise Malformed(
            "the line is not JSON", f"{error.msg} at character {error.pos + 1}"
        ) from None


def find_splits(path: str) -> Splits:
    """Return the splits of a file, a folder or a hub data set.

    Raises FileNotFoundError where there is none of these.
    """
    if not path:
        raise FileNotFoundError(
            "data.path is empty; pass a file, a folder, or the name of a hub data set."
        )
    local = Path(path).expanduser()
    if local.is_file():
        return {"train": functools.partial(_records, [local], local.parent)}
    if local.is_dir():
        files = _split_files(local)
        return {name: functools.partial(_records, files[name], local) for name in files}
    if path[0] in "/.~" or path.count("/") > 1 or _format(local) in READERS:
        raise FileNotFoundError(f"data.path={path!r}: no such file or folder.")
    return _hub_splits(path)


def _hub_splits(path: str) -> Splits:
    """Return the splits of a hub data set, NAME or NAME:SUBSET."""
    import datasets
    from huggingface_hub import HfApi

    name, _, subset = path.partition(":")
    try:
        if not datasets.config.HF_HUB_OFFLINE:
            # Asks once, where load_dataset alone retries for half a minute.
            HfApi().dataset_info(name, timeout=10)
        try:
            splits = datasets.load_dataset(name, subset or None)
        except RuntimeError:
            # The set is made by a script, which is never run; the hub has it as parquet too.
            splits = datasets.load_dataset(
                name, data_dir=subset or None, revision="refs/convert/parquet"
            )
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileNotFoundError(
            f"data.path={path!r}: no such file or folder here, and it could not be "
            f"fetched from the hub ({reason}). Without a network, download it elsewhere and pass "
            "the folder as --config.data.path=FOLDER; HF_HUB_OFFLINE=1 takes it from the hub's "
            "cache here."
        ) from error
    found = {}
    for name, split in splits.items():
        read = functools.partial(_batched, split)
        found[name] = functools.partial(_numbered, f"{path}[{name}]", read)
    return found


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of a folder and the folders in it, by split."""
    inside = []
    for file in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and not is_hidden:
            inside.append(file)
    formats_inside = {_format(file) for file in inside}
    formats = [suffix for suffix in READERS if suffix in formats_inside]
    if len(formats) > 1 and ".json" in formats:
        formats.remove(".json")  # settings and notes beside the data
    if len(formats) != 1:
        raise FileNotFoundError(
            f"data.path={str(folder)!r} holds {' and '.join(formats) or 'no'} files; expected one "
            f"kind of {', '.join(READERS)} (.gz too). Pass the folder or the file with the data."
        )
    names = {}
    for file in inside:
        if _format(file) == formats[0]:
            names[file] = _split_name(file, folder)
    # Where no name says anything, all files are for training. Beside files that are named, one that
    # is not is a split of its own, which has to be asked for.
    nothing_is_named = not any(names.values())
    splits: dict[str, list[Path]] = {}
    for file, name in names.items():
        if not name:
            name = "train" if nothing_is_named else _stem(file)
        splits.setdefault(name, []).append(file)
    return splits


def _split_name(file: Path, folder: Path) -> str:
    """Return the split that a file's name stands for, or else a folder around it, or else ""."""
    shard = SHARD.fullmatch(_stem(file))
    if shard:
        return shard[1]
    for part in (_stem(file), *reversed(file.relative_to(folder).parts[:-1])):
        for word in re.split(r"[^a-z0-9]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return ""


def _stem(file: Path) -> str:
    """Return the name of a file without its suffixes."""
    return file.name.split(".")[0]


def _format(file: Path) -> str:
    """Return the suffix of a file that says its format, below .gz."""
    return Path(file.name.removesuffix(".gz")).suffix


def _records(files: list[Path], folder: Path) -> Iterator[tuple[str, Record]]:
    """Yield (where, record) of each row of some files, named by their place in the folder."""
    for file in files:
        if _format(file) not in READERS:
            raise ValueError(f"data.path={str(file)!r} is none of {', '.join(READERS)} (.gz too).")
        read = functools.partial(READERS[_format(file)], file)
        yield from _numbered(str(file.relative_to(folder)), read)


def _numbered(label: str, values: Callable[[], Iterable[Record]]) -> Iterator[tuple[str, Record]]:
    """Yield (where, record) of each record; blank lines are skipped, but counted."""
    for number, record in enumerate(values(), 1):
        if not isinstance(record, str) or record.strip():
            yield f"{label} row {number}", record


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines of a text file, plain or gzip, with their line ends."""
    try:
        for fields in _batched(_stream("text", file, keep_linebreaks=True, encoding="utf-8-sig")):
            yield fields["text"]
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{file} is not UTF-8 text: {error.reason}, {byte:#x}. Save it as UTF-8."
        ) from None


def _json_records(file: Path) -> Iterable[Record]:
    """Return a JSON array of records, or JSON lines under the name .json."""
    lines = list(_lines(file))
    try:
        content = json.loads("".join(lines))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":  # that is, more than one value: JSON lines
            raise ValueError(f"{file} is not JSON: {error.msg} at line {error.lineno}.") from None
        return lines
    return content if isinstance(content, list) else [content]


def _csv_records(file: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    return csv.DictReader(_lines(file))


def _parquet_records(file: Path) -> Iterator[Record]:
    return _batched(_stream("parquet", file))


def _stream(builder: str, file: Path, **settings):
    """Return one file through a builder of `datasets`, read as it comes, without a copy of it."""
    import datasets

    return datasets.load_dataset(
        builder, data_files=glob.escape(str(file)), split="train", streaming=True, **settings
    )


def _batched(dataset) -> Iterator[Record]:
    """Yield the rows of a `datasets` split."""
    # Several times faster by batches than row by row.
    for batch in dataset.iter(batch_size=BATCH):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


# The suffix of a file -> the function that reads its records.
READERS = {
    ".jsonl": _lines,
    ".json": _json_records,
    ".csv": _csv_records,
    ".parquet": _parquet_records,
}
