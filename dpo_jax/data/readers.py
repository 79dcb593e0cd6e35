"""Where records lie: a file, a folder of files, or a data set of the Hugging Face hub.

Text formats are parsed here, from the lines that `datasets` reads: its own JSON and CSV builders
guess one type for a column, which can turn 3 into "3" and an answer "NA" into nothing, and then no
line number is left to name in an error.
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
Splits = dict[
    str, Callable[[], Iterator[tuple[str, Record]]]
]  # name -> (where, record) of each row

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
    """The objects of a JSON lines file (.gz too) with their line numbers, from 1; blank lines are
    skipped.

    Raises FileNotFoundError without a file, ValueError naming the line that is not a JSON object.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{str(path)!r}: no such file.")
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            try:
                yield number, fields_of(line)
            except Malformed as error:
                raise ValueError(f"{path} line {number}: {error}.") from None


def fields_of(record: Record) -> dict:
    """The fields of a record; Malformed when its line is not a JSON object."""
    doubtful = not isinstance(record, str) or SURROGATE.search(record)
    if isinstance(record, str):
        record = _parsed(record)
    if not isinstance(record, dict):
        raise Malformed("a row is an object, {...}", repr(record)[:80])
    try:
        for text in _texts_of(record) if doubtful else ():
            text.encode()  # no tokenizer takes one half of a pair alone
    except UnicodeEncodeError as error:
        raise Malformed(
            "half of a surrogate pair is no character", repr(error.object[error.start])
        ) from None
    return record


def _texts_of(value) -> Iterator[str]:
    """All texts in a value, names of fields apart."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts_of(part)


def _parsed(line: str):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise Malformed(
            "the line is not JSON", f"{error.msg} at character {error.pos + 1}"
        ) from None


def find_splits(path: str) -> Splits:
    """The splits of a file, a folder or a hub data set.

    Raises FileNotFoundError when there is none of these.
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
    """The splits of a hub data set, NAME or NAME:SUBSET."""
    import datasets
    from huggingface_hub import HfApi

    name, _, subset = path.partition(":")
    try:
        if not datasets.config.HF_HUB_OFFLINE:
            HfApi().dataset_info(
                name, timeout=10
            )  # asks once; load_dataset alone retries for half a minute
        try:
            splits = datasets.load_dataset(name, subset or None)
        except (
            RuntimeError
        ):  # made by a script, which is never run; the hub keeps such sets as parquet beside it
            splits = datasets.load_dataset(
                name, data_dir=subset or None, revision="refs/convert/parquet"
            )
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileNotFoundError(
            f"data.path={path!r}: no such file or folder here, and the Hugging Face hub does not give such a "
            f"data set ({reason}). Without a network, download it elsewhere and pass the folder as "
            f"--config.data.path=FOLDER; HF_HUB_OFFLINE=1 takes it from the hub's cache here."
        ) from error
    return {
        name: functools.partial(_numbered, f"{path}[{name}]", lambda split=split: _batched(split))
        for name, split in splits.items()
    }


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """The data files of a folder and the folders in it, by split."""
    inside = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    formats = [suffix for suffix in READERS if any(_format(file) == suffix for file in inside)]
    if len(formats) > 1 and ".json" in formats:
        formats.remove(".json")  # settings and notes beside the data
    if len(formats) != 1:
        raise FileNotFoundError(
            f"data.path={str(folder)!r} holds {' and '.join(formats) or 'no'} files; expected one kind of "
            f"{', '.join(READERS)} (.gz too). Pass the folder or the file with the data."
        )
    named = {file: _split_name(file, folder) for file in inside if _format(file) == formats[0]}
    unnamed = "train" if not any(named.values()) else None
    splits: dict[str, list[Path]] = {}
    for file, name in named.items():
        splits.setdefault(name or unnamed or _stem(file), []).append(file)
    return splits


def _split_name(file: Path, folder: Path) -> str:
    """The split that a file's name, or else a folder around it, stands for; "" when they say
    nothing.
    """
    if shard := SHARD.fullmatch(_stem(file)):
        return shard[1]
    for part in (_stem(file), *reversed(file.relative_to(folder).parts[:-1])):
        for word in re.split(r"[^a-z0-9]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return ""


def _stem(file: Path) -> str:
    return file.name.split(".")[0]


def _format(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix


def _records(files: list[Path], folder: Path) -> Iterator[tuple[str, Record]]:
    for file in files:
        if _format(file) not in READERS:
            raise ValueError(f"data.path={str(file)!r} is none of {', '.join(READERS)} (.gz too).")
        yield from _numbered(
            str(file.relative_to(folder)), functools.partial(READERS[_format(file)], file)
        )


def _numbered(label: str, values: Callable[[], Iterable[Record]]) -> Iterator[tuple[str, Record]]:
    """(where, record) of each record; blank lines keep their number and are skipped."""
    for number, record in enumerate(values(), 1):
        if not isinstance(record, str) or record.strip():
            yield f"{label} row {number}", record


def _lines(file: Path) -> Iterator[str]:
    """The lines of a text file, plain or gzip, with their ends."""
    try:
        for fields in _batched(_stream("text", file, keep_linebreaks=True, encoding="utf-8-sig")):
            yield fields["text"]
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{file} is not UTF-8 text: {error.reason}, {byte:#x}. Save it as UTF-8."
        ) from None


def _json_records(file: Path) -> Iterable[Record]:
    """A JSON array of records, or JSON lines under the name .json."""
    lines = list(_lines(file))
    try:
        content = json.loads("".join(lines))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise ValueError(f"{file} is not JSON: {error.msg} at line {error.lineno}.") from None
        return lines
    return content if isinstance(content, list) else [content]


def _csv_records(file: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    return csv.DictReader(_lines(file))


def _parquet_records(file: Path) -> Iterator[Record]:
    return _batched(_stream("parquet", file))


def _stream(builder: str, file: Path, **settings):
    """One file through a builder of `datasets`, read as it comes, with no copy of it made."""
    import datasets

    return datasets.load_dataset(
        builder, data_files=glob.escape(str(file)), split="train", streaming=True, **settings
    )


def _batched(dataset) -> Iterator[Record]:
    """The rows of a `datasets` split; by batches, which is several times faster than row by row."""
    for batch in dataset.iter(batch_size=BATCH):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


READERS = {
    ".jsonl": _lines,
    ".json": _json_records,
    ".csv": _csv_records,
    ".parquet": _parquet_records,
}
