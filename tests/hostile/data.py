"""Hostile data files: every format, with every kind of damage, at several places of the file.

`cases()` makes them all from three lists, and `judge` runs one as a run reads its data. Each is
either taken, with counts that add up, or refused in one paragraph that names the file.
"""

import bz2
import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import lzma
import pathlib
import zipfile
from collections.abc import Callable, Iterator

import pyarrow
import pyarrow.parquet

from dpo_jax import config as configs
from dpo_jax.data import dataset
from tests.hostile import judging
from tests.hostile.judging import Verdict

ROWS = 12  # of a file before it is damaged
COLUMNS = ("prompt", "chosen", "rejected")


def good_rows() -> list[dict]:
    return [
        {"prompt": f"Once there was {i} cat.", "chosen": f" It was {i}.", "rejected": f" No {i}."}
        for i in range(ROWS)
    ]


# ---- how rows are written

Write = Callable[[list], bytes]


def _jsonl(rows: list) -> bytes:
    return "".join(f"{_json(row)}\n" for row in rows).encode("utf-8", "surrogatepass")


def _json(row) -> str:
    return row if isinstance(row, str) else json.dumps(row)


def _array(rows: list) -> bytes:
    text = "[" + ",\n".join(map(_json, rows)) + "]"
    return text.encode("utf-8", "surrogatepass")


def _table(separator: str) -> Write:
    def write(rows: list) -> bytes:
        lines = [separator.join(COLUMNS)]
        for row in rows:
            cells = [str(row[name]) for name in COLUMNS] if isinstance(row, dict) else [row]
            lines.append(separator.join(cells))
        return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")

    return write


def _columns(rows: list) -> pyarrow.Table:
    return pyarrow.Table.from_pylist([row for row in rows if isinstance(row, dict)])


def _parquet(rows: list) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(_columns(rows), sink)
    return sink.getvalue().to_pybytes()


def _arrow(rows: list) -> bytes:
    sink = pyarrow.BufferOutputStream()
    table = _columns(rows)
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _compressed(compress: Callable[[bytes], bytes], write: Write) -> Write:
    return lambda rows: compress(write(rows))


FORMATS: dict[str, Write] = {
    ".jsonl": _jsonl,
    ".json": _array,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".jsonl.gz": _compressed(gzip.compress, _jsonl),
    ".csv.bz2": _compressed(bz2.compress, _table(",")),
    ".json.xz": _compressed(lzma.compress, _array),
}

# ---- damage to a file's bytes, whatever its format

PLACES = {"start": 0.0, "middle": 0.5, "end": 0.98}


def _cut(content: bytes, place: float) -> bytes:
    return content[: max(int(len(content) * place), 1)]


def _flipped(content: bytes, place: float) -> bytes:
    damaged = bytearray(content)
    start = int(len(content) * place)
    for position in range(start, min(start + 8, len(content))):
        damaged[position] ^= 0xC0
    return bytes(damaged)


def _zeroed(content: bytes, place: float) -> bytes:
    start = int(len(content) * place)
    return content[:start] + bytes(len(content[start : start + 16])) + content[start + 16 :]


def _with_bytes(inserted: bytes) -> Callable[[bytes, float], bytes]:
    def insert(content: bytes, place: float) -> bytes:
        start = int(len(content) * place)
        return content[:start] + inserted + content[start:]

    return insert


BYTES = {
    "cut": _cut,
    "flipped": _flipped,
    "zeroed": _zeroed,
    "other bytes put in": _with_bytes(b"\xff\xfe\x80"),
    "brackets put in": _with_bytes(b"[{" * 5_000),
    "a quote put in": _with_bytes(b'"'),
}
WHOLE = {  # damage that has no place
    "nothing": lambda _: b"",
    "one byte": lambda _: b"\x00",
    "blank lines": lambda _: b"\n \n" * 50,
    "the start of a gzip file": lambda _: b"\x1f\x8b\x08\x00" + b"\x00" * 50,
    "the start of a Parquet file": lambda _: b"PAR1" + b"\x00" * 50 + b"PAR1",
    "UTF-16": lambda _: '{"prompt": "a"}\n'.encode("utf-16"),
    "a web page": lambda _: b"<!doctype html><html><body>404</body></html>\n",
    "a Git LFS pointer": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "twice": lambda content: content * 2,
}

# ---- rows that no file should have

LONG = "x" * (5 << 20)
DEEP = "[" * 20_000 + "]" * 20_000
JSON_ROWS = {
    "5,000 digits": '{"prompt": "p", "chosen": "a", "rejected": "b", "n": ' + "1" * 5_000 + "}",
    "400 digits as a score": '{"prompt": "p", "responses": ["a", "b"], "scores": [1'
    + "0" * 400
    + ", 2]}",
    "nesting": '{"prompt": "p", "chosen": "a", "rejected": "b", "n": ' + DEEP + "}",
    "messages as text, nested": json.dumps(
        {"prompt": '[{"role": "user", "content": ' + DEEP, "chosen": "a", "rejected": "b"}
    ),
    "a key twice": '{"prompt": "p", "chosen": "a", "chosen": "c", "rejected": "b"}',
    "half a surrogate": '{"prompt": "p", "chosen": "\\ud83d", "rejected": "b"}',
    "half a surrogate in a name": '{"prompt": "p", "chosen": "a", "rejected": "b", "\\ud83d": 1}',
    "a long line": json.dumps({"prompt": LONG, "chosen": "a", "rejected": "b"}),
    "many names": json.dumps({f"column {i}": i for i in range(20_000)}),
    "names with line ends": '{"a\\n\\nb": 1, "c": "d"}',
    "NaN": '{"prompt": NaN, "chosen": Infinity, "rejected": -Infinity}',
    "a list": "[1, 2]",
    "a number": "3",
    "null": "null",
    "an empty object": "{}",
    "nulls": '{"prompt": null, "chosen": null, "rejected": null}',
    "numbers": '{"prompt": 1, "chosen": 2, "rejected": 3}',
    "objects": '{"prompt": {}, "chosen": {"a": {}}, "rejected": []}',
    "roles that none are": '{"prompt": [{"role": {}, "content": 3}], "chosen": [], "rejected": 0}',
    "no end": '{"prompt": "p", "chosen": "a',
    "two objects": '{"prompt": "p"}{"prompt": "q"}',
    "Python": "{'prompt': 'p', 'chosen': 'a', 'rejected': 'b'}",
}
CELL_ROWS = {
    "more cells": "p{0}a{0}b{0}c",
    "fewer cells": "p{0}a",
    "one cell": "p",
    "the header again": "prompt{0}chosen{0}rejected",
    "a quote without an end": '"p{0}a{0}b',
    "a quote that ends within": '"p" q{0}a{0}b',
    "no texts": "{0}{0}",
    "a long cell": LONG + "{0}a{0}b",
    "messages that are none": '"[{{""role"": ""user"", ""content"": "{0}a{0}b',
}
ROW_PLACES = {"first": 0, "middle": ROWS // 2, "last": ROWS}
HEADERS = {
    "a column twice": "prompt{0}chosen{0}chosen{0}rejected",
    "no header": "",
    "other names": "x{0}y{0}z",
    "one name": "prompt",
    "blank names": "{0}{0}",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A hostile file: what is wrong with it, and where."""

    suffix: str
    damage: str
    place: str
    content: bytes
    own_rows: tuple[tuple[str, str, str], ...] = ()  # that the damage itself makes, as it should

    @property
    def kind(self) -> str:
        return f"data {self.suffix}"

    @property
    def name(self) -> str:
        return f"{self.suffix} {self.damage} {self.place}".strip()


def cases() -> Iterator[Case]:
    """Yield every format with every damage at every place."""
    rows = good_rows()
    for suffix, write in FORMATS.items():
        whole = write(rows)
        for (damage, change), place in itertools.product(BYTES.items(), PLACES):
            content = change(whole, PLACES[place])
            yield Case(suffix, damage, place, content, _texts_in(suffix, content))
        for damage, change in WHOLE.items():
            yield Case(suffix, damage, "", change(whole))
    for suffix in (".jsonl", ".json", ".jsonl.gz"):
        for (damage, row), place in itertools.product(JSON_ROWS.items(), ROW_PLACES):
            case = _with_row(suffix, damage, place, row)
            # Its texts are right: the damage is in the name of a field beside them.
            is_usable = damage == "half a surrogate in a name"
            yield dataclasses.replace(case, own_rows=(("p", "a", "b"),) if is_usable else ())
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        for (damage, form), place in itertools.product(CELL_ROWS.items(), ROW_PLACES):
            yield _with_row(suffix, damage, place, form.format(separator))
        yield Case(suffix, "more cells in every row", "", ragged(separator))
        for damage, form in HEADERS.items():
            body = _table(separator)(rows).split(b"\n", 1)[1]
            content = form.format(separator).encode() + b"\n" + body
            yield Case(suffix, f"header: {damage}", "", content)
    for suffix in (".jsonl.zip", ".jsonl.zst", ".txt", ".pkl"):
        yield Case(suffix, "a format that is not read", "", _zip(_jsonl(rows)))


def _texts_in(suffix: str, content: bytes) -> tuple[tuple[str, ...], ...]:
    """Return the texts of a damaged file, where its format cannot know that they were others.

    Tables of text and Arrow have no sums: bytes within a cell are its text. No reader of ours is
    asked: a line of a table has a cell for each column, or counts for nothing.
    """
    separator = {".csv": ",", ".tsv": "\t"}.get(suffix)
    rows = []
    if separator:
        lines = content.decode("utf-8", "replace").split("\n")
        rows = [line.split(separator) for line in lines]
    if suffix == ".arrow":
        with contextlib.suppress(pyarrow.ArrowInvalid, OSError, UnicodeDecodeError):
            table = pyarrow.ipc.open_stream(content).read_all()
            rows = [[row.get(name) or "" for name in COLUMNS] for row in table.to_pylist()]
    return tuple(tuple(text.strip() for text in row) for row in rows if len(row) == len(COLUMNS))


def ragged(separator: str) -> bytes:
    """Return a table whose prompts hold the separator, without quotes."""
    prompt = f"Once{separator} there was a cat."
    rows = [separator.join([prompt, f" It was {i}.", f" No {i}."]) for i in range(ROWS)]
    return _table(separator)(rows)


def _with_row(suffix: str, damage: str, place: str, row: str) -> Case:
    rows = good_rows()
    rows.insert(ROW_PLACES[place], row)
    return Case(suffix, damage, place, FORMATS[suffix](rows))


def _zip(content: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("rows.jsonl", content)
    return packed.getvalue()


def judge(case: Case, folder: pathlib.Path, tokenizer, on_bad_row: str = "error") -> Verdict:
    """Read a case as a run does, and judge what comes of it."""
    file = folder / f"hostile{case.suffix}"
    file.write_bytes(case.content)
    data = configs.default(("dpo",)).data
    data.update(source="local", path=str(file), on_bad_row=on_bad_row, max_dropped=1.0)
    data.max_length = 1 << 15  # tokens: nothing is cut, as texts are compared
    read = []
    verdict = judging.judge(
        lambda: read.append(dataset.load(data, tokenizer, "pairs")), names=(file.name,)
    )
    if verdict.verdict != "taken":
        return verdict
    strange = _strange_texts(read[0], tokenizer, case.own_rows)
    if strange:
        return Verdict("silent", f"trains on {strange[0]!r}, which no row has")
    return Verdict(*_judge_counts(read[0]))


def _judge_counts(read: dataset.Dataset) -> tuple[str, str]:
    """Return "taken" where the ledger's counts add up to what is there to train on."""
    train, evals = read.ledger.train, read.ledger.eval
    left = train.read + train.further_pairs - sum(train.dropped.values())
    left -= sum(train.filtered.values()) + train.held_out
    counts = f"{train.read} read, {train.kept} kept, {evals.kept} held out"
    is_right = left == train.kept == len(read.train) and evals.kept == len(read.eval)
    return ("taken" if is_right else "silent"), counts


def _strange_texts(read: dataset.Dataset, tokenizer, own_rows: tuple) -> list[tuple[str, ...]]:
    """Return the texts of the examples that are neither a good row nor one of `own_rows`.

    Counts add up also where a reader has put cells into the wrong columns; the texts tell.
    """
    # Decoding leaves out a space at the start.
    right = {tuple(row[name].strip() for name in COLUMNS) for row in good_rows()} | set(own_rows)
    strange = []
    for example in [*read.train, *read.eval]:
        parts = (example.prompt, *example.responses)
        decoded = [tokenizer.decode(ids, skip_special_tokens=True) for ids in parts]
        texts = tuple(text.strip() for text in decoded)
        if texts not in right:
            strange.append(texts)
    return strange


def verdicts(folder: pathlib.Path, tokenizer) -> Iterator[tuple[Case, Verdict]]:
    """Yield each case with its verdict, those with bad rows both stopped at and dropped."""
    for case in cases():
        for on_bad_row in ("error", "drop"):
            verdict = judge(case, folder, tokenizer, on_bad_row)
            yield dataclasses.replace(case, place=f"{case.place} {on_bad_row}".strip()), verdict
