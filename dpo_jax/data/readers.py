"""Records from a file, a folder of files, or a data set of the Hugging Face hub.

Every reader streams: it holds a few hundred rows at a time, however large the file is. Text formats
are parsed here: the JSON and CSV builders of `datasets` guess one type for a column, which can turn
3 into "3" and an answer "NA" into nothing, and they leave no line number to name in an error.
Parquet and Arrow files go through `datasets`, which knows the column types it has written.
"""

import ast
import bz2
import codecs
import contextlib
import csv
import functools
import gzip
import hashlib
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TextIO

from dpo_jax.data.conversations import is_role
from dpo_jax.data.ledger import Malformed
from dpo_jax.storage import shadow
from dpo_jax.storage.addresses import is_address, repository_of

# The fields, a line of JSON that holds them, or what is wrong with a row that cannot be read.
Record = dict | str | Malformed
# name -> a function that reads (where, record) of each row
Splits = dict[str, Callable[[], Iterator[tuple[str, Record]]]]

# A word in the name of a file or folder -> the split it stands for, as `datasets` has them.
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
# How the hub names the files of a split.
SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(-\w+)?")
# How it names them in the branch of its own Parquet files: CONFIG/SPLIT/0000.parquet.
CONVERTED = re.compile(r"\d{4,}\.parquet")
SPLIT_NAME = re.compile(r"\w+(\.\w+)*")
# Files that describe a data set and hold none of its rows.
DESCRIPTIONS = {
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
}
# What the shards of a set with one split are called.
SHARD_WORDS = {"data", "part", "shard", "chunk", "file", "dataset"}
# What the files of a saved set list, by the field.
LISTINGS = {"splits": '["train", ...]', "_data_files": '[{"filename": "NAME.arrow"}, ...]'}
# What `datasets` writes beside a saved set: what `map` and `filter` have cached.
CACHE = re.compile(r"(cache-|tmp).*\.arrow")
# Names that tell of a split, but in no word of their own: testset, my_valdata, traindata.
EVALUATION = "testing|test|validation|valid|val|dev|evaluation|eval|holdout|heldout"
JOINED_EVALUATION = re.compile(
    rf"(my|our|the|all|full)?({EVALUATION}|tst|unseen|held)"
    r"(sets?|data|dataset|split|part|files?|pairs|prefs|rows|examples|samples)?"
)
ENDS_OF_EVALUATION = re.compile(rf"({EVALUATION}).*|.*({EVALUATION})")
ENDS_OF_TRAINING = re.compile(r"train.*|(?!pre|post).*train(ing)?")
HELD_OUT = re.compile(r"h(o|e)ld[-_. ]?out")
ORDINARY_WORDS = {"latest", "contest"}
# How chat messages (or one message) start when they are written as text, in JSON or Python.
MESSAGES = re.compile(r"""\s*\[?\s*\{\s*['"]\w+['"]\s*:""")
MESSAGE_KEYS = (
    re.compile(r"""['"](role|from)['"]\s*:"""),
    re.compile(r"""['"](content|value|tool_calls)['"]\s*:"""),
)
# Compressed text that is read as it is: the suffix -> its name, and what opens it.
COMPRESSIONS = {
    ".gz": ("gzip", gzip.open),
    ".bz2": ("bzip2", bz2.open),
    ".xz": ("xz", lzma.open),
}
# Suffixes of files that have to be unpacked first.
PACKED = {".zst", ".zip", ".lz4", ".tar", ".tgz", ".7z", ".rar"}
TABLES = {".parquet", ".arrow"}
SPACE = re.compile(r"\s*")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
BATCH = 1000  # rows of a table read at a time
CHUNK = 1 << 20  # characters of a JSON array read at a time
# Characters of a row: tokenising a text of a few million takes seconds and a GB of memory.
LONGEST_ROW = 1 << 22
DEEPEST = 200  # lists and objects inside each other in a row
# What the first bytes of a file say that it is, whatever its name says.
SIGNATURES = {
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ\x00": "an xz file",
    b"PK\x03\x04": "a zip file",
    b"\x28\xb5\x2f\xfd": "a Zstandard file",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


def read_jsonl(path) -> Iterator[tuple[int, dict]]:
    """Yield the objects of a JSON lines file (.gz too) with their line numbers, from 1.

    Blank lines are skipped. Raises FileNotFoundError without a file, and ValueError naming the line
    that is not a JSON object.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{str(path)!r}: no such file.")
    for number, line in enumerate(_lines(file), 1):
        if isinstance(line, str) and not line.strip():
            continue
        try:
            yield number, fields_of(line)
        except Malformed as error:
            raise ValueError(f"{path} line {number}: {error}.") from None


def fields_of(record: Record) -> dict:
    """Return the fields of a record; chat messages that are written as text become a list.

    Raises Malformed where its line is not a JSON object, a text has half a surrogate pair, a text
    is a list of messages that cannot be read, or the row is longer or deeper than any should be.
    """
    if isinstance(record, Malformed):
        raise record
    # Encoding every text takes time, so a line is first searched for the escapes of surrogates.
    is_line = isinstance(record, str)
    may_have_surrogates = not is_line or SURROGATE.search(record)
    may_be_deep = not is_line or record.count("[") + record.count("{") > DEEPEST
    if is_line:
        record = _parsed(record)
    if not isinstance(record, dict):
        raise Malformed("a row is an object, {...}", repr(record)[:80])
    if may_be_deep:
        _check_depth(record)
    if len(record) > 1 and all(name == value for name, value in record.items()):
        raise Malformed("the row repeats the names of the columns; remove it from the file")
    if may_have_surrogates:
        length = 0
        for text in _texts_of(record):
            length += len(text)
            _check_surrogates(text)
        # The length of a line is known before it is parsed.
        if not is_line and length > LONGEST_ROW:
            raise _too_long(f"{length:,} characters")
    for name, value in record.items():
        if isinstance(value, str) and MESSAGES.match(value):
            record[name] = _messages(name, value)
    return record


def _messages(name: str, text: str) -> str | list | dict:
    """Return the chat messages that a field holds as text, or the text if it is something else.

    Tables such as CSV have no lists: they hold them as JSON, or as Python writes them. Trained on
    as it stands, such text teaches a model to write brackets and roles.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _python_value(text)
    if value is None:
        if not all(key.search(text) for key in MESSAGE_KEYS):
            return text
        shown = text if len(text) < 80 else text[:77] + "..."
        raise Malformed(
            f"field {name!r} holds chat messages as text that is neither JSON nor a Python list; "
            "save the rows as JSON lines or Parquet",
            shown,
        )
    messages = value if isinstance(value, list) else [value]
    for message in messages:
        if not isinstance(message, dict):
            return text
        is_openai = "role" in message and ("content" in message or "tool_calls" in message)
        if not is_openai and not ("from" in message and "value" in message):
            return text
        role = message.get("role") or message.get("from")
        # A list that is not read stops the run; one object may be anything that has a role.
        if isinstance(value, dict) and not is_role(role):
            return text
    return value


def _python_value(text: str):
    """Return the value of a Python literal, or None."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


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


def _check_depth(value) -> None:
    """Raise Malformed where lists and objects lie deeper inside each other than DEEPEST."""
    level = [value]
    for _ in range(DEEPEST):
        inside = []
        for outer in level:
            parts = outer.values() if isinstance(outer, dict) else outer
            inside += [part for part in parts if isinstance(part, dict | list)]
        if not inside:
            return
        level = inside
    raise _too_deep()


def _too_deep() -> Malformed:
    return Malformed(f"lists and objects lie more than {DEEPEST} deep inside each other")


def _too_long(found: str) -> Malformed:
    return Malformed(
        f"the row is longer than {LONGEST_ROW:,} characters",
        found,
        "no model reads as much at once; remove the row or part its text",
    )


def _parsed(line: str):
    """Return what a line of JSON holds."""
    try:
        return json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise Malformed(
            "the line is not JSON", f"{error.msg} at character {error.pos + 1}"
        ) from None
    except Malformed:
        raise
    except ValueError:  # Python's own limit
        raise _too_many_digits() from None
    except RecursionError:
        raise _too_deep() from None


def _too_many_digits() -> Malformed:
    most = sys.get_int_max_str_digits()
    return Malformed(f"a whole number has more than {most:,} digits", advice="write it as a text")


def _object(pairs: list[tuple[str, object]]) -> dict:
    """Return a JSON object; raise Malformed where a key is there twice: one would be lost."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Malformed("a key is twice in one object", repr(twice))
    return value


def find_splits(path: str) -> Splits:
    """Return the splits of a file, a folder or a hub data set.

    Raises FileNotFoundError where there is none of these.
    """
    if not path:
        raise FileNotFoundError(
            "data.path is empty; pass a file, a folder, or the name of a hub data set."
        )
    if is_address(path):
        return _bucket_splits(path)
    local = Path(path).expanduser()
    if local.exists():
        return local_splits(local)
    folder, _, subset = path.rpartition(":")
    if folder and Path(folder).expanduser().is_dir():
        return local_splits(Path(folder).expanduser(), subset)
    of_hub, _, _ = path.partition("@")  # a revision such as refs/pr/1 has slashes of its own
    if path[0] in "/.~" or of_hub.count("/") > 1 or _format(local) in READERS:
        raise FileNotFoundError(f"data.path={path!r}: no such file or folder.")
    return _hub_splits(path)


def _bucket_splits(path: str) -> Splits:
    """Return the splits of an address, which may end in :SUBSET, and is copied here."""
    address, _, subset = path.rpartition(":")
    if not is_address(address):  # the only colon is the scheme's
        address, subset = path, ""
    repository = repository_of(address)
    if repository:
        return _hub_splits(f"{repository}:{subset}" if subset else repository)
    return local_splits(shadow.fetch(address), subset)


def local_splits(path: Path, subset: str = "") -> Splits:
    """Return the splits of a file or a folder, which may have been made by `save_to_disk`.

    subset: one of those that the folder has, as sets of the hub do: they are declared in its
    README.md, or are the CONFIG of files that are laid out as CONFIG/SPLIT/0000.parquet.
    """
    if path.is_file():
        return {"train": functools.partial(_records, [path], path.parent)}
    declared = _declared_subsets(path / "README.md")
    if declared:
        chosen = _choose_subset(list(declared), path, subset, _defaults(declared))
        files = _declared_files(path, chosen, declared[chosen])
        if files:
            return _reads(files, path, [_check_copies])
        if subset or len(declared) > 1:
            raise FileNotFoundError(
                f"data.path='{path}:{chosen}': none of the files that README.md declares for this "
                "subset are in the folder. Download them too."
            )
        subset = ""
    if (path / "dataset_dict.json").is_file():
        listing = path / "dataset_dict.json"
        names = _listed(listing, "splits")
        if not all(isinstance(name, str) for name in names):
            raise _damaged_listing(listing, "splits")
        files = {name: _saved_files(_inside(path, name, "dataset_dict.json")) for name in names}
    elif (path / "state.json").is_file():
        files = {"train": _saved_files(path)}
    else:
        return _reads(_split_files(path, subset), path, [_check_shards, _check_copies])
    if subset:
        _choose_subset([], path, subset)
    return _reads(files, path)


def _reads(files: dict[str, list[Path]], folder: Path, checks: Iterable[Callable] = ()) -> Splits:
    """Return the function that reads the files of each split, once they pass the checks."""
    return {name: functools.partial(_records, files[name], folder, checks) for name in files}


def _choose_subset(
    names: list[str], folder: Path, subset: str, defaults: Iterable[str] = ()
) -> str:
    """Return the subset to read: the one asked for, the default, or the only one.

    Raises FileNotFoundError where there are several and none was asked for, or another one.
    """
    listed = ", ".join(names)
    if subset and subset not in names:
        raise FileNotFoundError(
            f"data.path='{folder}:{subset}': the folder has no such subset; it has "
            f"{listed or 'none, and README.md in it declares none'}."
        )
    chosen = subset or next(iter(defaults), names[0])
    if len(names) > 1 and not subset and chosen not in defaults:
        raise FileNotFoundError(
            f"data.path={str(folder)!r} holds the subsets {listed}: pass the one to read, "
            f"such as {folder}:{chosen}."
        )
    return chosen


def _defaults(declared: dict[str, dict]) -> list[str]:
    return [name for name in declared if declared[name].get("default") or name == "default"]


def _declared_files(folder: Path, subset: str, settings: dict) -> dict[str, list[Path]]:
    """Return the files of each split of a subset, as a folder's README.md declares them."""
    from datasets.data_files import DataFilesDict, sanitize_patterns

    base = (folder / settings.get("data_dir", "")).resolve()
    if not base.is_relative_to(folder.resolve()) or not base.is_dir():
        raise FileNotFoundError(
            f"data.path='{folder}:{subset}': README.md declares this subset in the folder "
            f"{settings['data_dir']!r}, which is not in {folder}."
        )
    if "data_files" not in settings:
        # By the names of the files in its folder.
        found = _split_files(folder / base.relative_to(folder.resolve()))
        for files in found.values():
            _check_shards(files, folder)
        return found
    files = {}
    for split, patterns in sanitize_patterns(settings["data_files"]).items():
        for pattern in patterns:
            _inside(folder, pattern, "README.md")
        try:
            found = DataFilesDict.from_patterns({split: patterns}, str(base))
        except FileNotFoundError:
            continue  # a split that was not downloaded
        inside = [folder / Path(file).relative_to(folder.resolve()) for file in found[split]]
        if inside:
            files[split] = inside
    return files


def _declared_subsets(readme: Path) -> dict[str, dict]:
    """Return what the metadata of a README.md, as the hub has it, says of each subset's files."""
    if not readme.is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        card = metadata_load(readme) or {}
    except Exception:  # a README.md that is not in the hub's form declares nothing
        return {}
    declared = {}
    for settings in card.get("configs") or []:
        if "data_files" in settings or settings.get("data_dir"):
            declared[settings.get("config_name", "default")] = settings
    return declared


def _saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a folder that `Dataset.save_to_disk` has written, in order."""
    # The folder may hold more Arrow files than these: what `map` and `filter` have cached.
    listing = folder / "state.json"
    files = []
    for entry in _listed(listing, "_data_files"):
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise _damaged_listing(listing, "_data_files")
        files.append(_inside(folder, name, listing.name))
    return files


def _inside(folder: Path, name: str, listing: str) -> Path:
    """Return a path in a folder by the name that a file there, the listing, has for it.

    Raises ValueError for a name that leads out of the folder, or to another machine.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "://" in name or "::" in name:
        raise ValueError(
            f"{folder / listing} names {name!r}, which is not in its folder, so it is not read. "
            "Put the file into the folder, or pass the one with the data as data.path."
        )
    return folder / path


def _listed(listing: Path, field: str) -> list:
    """Return what a file of a saved set lists; ValueError where it is not as it was written."""
    try:
        content = json.loads(listing.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    names = content.get(field) if isinstance(content, dict) else None
    if not isinstance(names, list) or not names:
        raise _damaged_listing(listing, field)
    return names


def _damaged_listing(listing: Path, field: str) -> ValueError:
    expected = LISTINGS[field]
    return ValueError(
        f'{listing} is damaged: expected {{"{field}": {expected}, ...}}, as `save_to_disk` '
        "writes it. Save the set again, or pass its Arrow files as data.path."
    )


def _hub_splits(path: str) -> Splits:
    """Return the splits of a hub data set: NAME, NAME:SUBSET, or either with NAME@REVISION."""
    import datasets
    from huggingface_hub import HfApi

    name, _, subset = path.partition(":")
    name, _, revision = name.partition("@")
    pinned = dict(revision=revision) if revision else {}
    try:
        if not datasets.config.HF_HUB_OFFLINE:
            # Asks once, where load_dataset alone retries for half a minute.
            HfApi().dataset_info(name, timeout=10, **pinned)
        try:
            splits = datasets.load_dataset(name, subset or None, **pinned)
        except RuntimeError:
            # The set is made by a script, which is never run; the hub has its newest revision as
            # parquet too.
            if pinned:
                raise
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


def _split_files(folder: Path, subset: str = "") -> dict[str, list[Path]]:
    """Return the data files of a folder and the folders in it, by split.

    Raises FileNotFoundError where it has none, or it is not clear which splits they are of.
    """
    files = _data_files(folder)
    if all(CONVERTED.fullmatch(file.name) for file in files):
        converted = _converted_files(files, folder, subset)
        if converted:
            return converted
    if subset:
        _choose_subset([], folder, subset)
    names = {file: _split_name(file, folder) for file in files}
    # Where no name says anything, all files are for training. Beside files that are named, one that
    # is not is a split of its own, which has to be asked for.
    nothing_is_named = not any(names.values())
    if nothing_is_named and len(files) > 1:
        _refuse_joined_names(files, folder)
    splits: dict[str, list[Path]] = {}
    for file, name in names.items():
        if not name:
            name = "train" if nothing_is_named else _stem(file)
        splits.setdefault(name, []).append(file)
    return splits


def _data_files(folder: Path) -> list[Path]:
    """Return the files with rows in a folder and the folders in it, which are of one format."""
    inside = []
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        # The names that `datasets` passes over too.
        is_hidden = any(part.startswith(".") for part in parts)
        is_hidden |= any(part.startswith("__") for part in parts[:-1])
        if is_hidden or not file.is_file() or file.name in DESCRIPTIONS or _is_cache(file):
            continue
        inside.append(file)
    packed = [file for file in inside if _is_packed(file)]
    formats_inside = {_format(file) for file in inside if file not in packed}
    formats = [suffix for suffix in READERS if suffix in formats_inside]
    for file in packed:
        # What has been unpacked already is there without its last suffix.
        has_rows = Path(file.stem).suffix.lower() in READERS
        if not formats or (has_rows and not file.with_suffix("").exists()):
            raise FileNotFoundError(_unpack(file))
    if len(formats) > 1 and ".json" in formats:
        formats.remove(".json")  # settings and notes beside the data
    if len(formats) != 1:
        raise FileNotFoundError(
            f"data.path={str(folder)!r} holds {' and '.join(formats) or 'no'} files; expected one "
            f"kind of {', '.join(READERS)} (text also as {', '.join(COMPRESSIONS)}). Pass the "
            "folder or the file with the data."
        )
    return [file for file in inside if _format(file) == formats[0] and file not in packed]


def _is_cache(file: Path) -> bool:
    """Return whether an Arrow file is no data: a cache, or not of the set saved in its folder."""
    if file.suffix != ".arrow":
        return False
    if CACHE.fullmatch(file.name):
        return True
    is_saved = (file.parent / "state.json").is_file()
    return is_saved and file not in _saved_files(file.parent)


def _is_packed(file: Path) -> bool:
    """Return whether a file has to be unpacked first."""
    if _format(file) in PACKED:
        return True
    return _format(file) in TABLES and file.suffix.lower() in COMPRESSIONS


def _unpack(file: Path) -> str:
    return (
        f"{file} is a packed file, which is not read as it is. Unpack it, and pass the file or the "
        f"folder that comes out; text files may be compressed as {', '.join(COMPRESSIONS)}."
    )


def _converted_files(files: list[Path], folder: Path, subset: str) -> dict[str, list[Path]]:
    """Return the files of each split in the layout of the hub's branch refs/convert/parquet.

    It is CONFIG/SPLIT/0000.parquet, or SPLIT/0000.parquet where `folder` is that of a CONFIG.
    Returns {} for files in another layout.
    """
    places = {file: file.relative_to(folder).parts for file in files}
    depths = {len(parts) for parts in places.values()}
    # A large set is converted in part, into partial-SPLIT.
    names = {file: file.parent.name.removeprefix("partial-") for file in files}
    if not all(SPLIT_NAME.fullmatch(name) for name in names.values()):
        return {}
    if depths not in ({2}, {3}) or not any(_splits_in(name) for name in names.values()):
        return {}
    if depths == {3} or subset:
        configs = sorted({parts[0] for parts in places.values()}) if depths == {3} else []
        chosen = _choose_subset(configs, folder, subset, {"default"} & set(configs))
        files = [file for file in files if places[file][0] == chosen]
    splits: dict[str, list[Path]] = {}
    for file in files:
        name = SPLIT_WORDS.get(names[file], names[file])
        splits.setdefault(name, []).append(file)
    return splits


def _refuse_joined_names(files: list[Path], folder: Path) -> None:
    """Raise FileNotFoundError for names that look like splits', of files with no split's name.

    `datasets` would train on all of them: testset.jsonl and data_holdout.jsonl too.
    """
    of_training = []
    of_evaluation = []  # surely
    may_be_of_evaluation = []
    for file in files:
        place = file.relative_to(folder).with_name(_stem(file))
        words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", str(place))]
        words = [word for word in words if word not in ORDINARY_WORDS]
        if HELD_OUT.search(str(place).lower()) or any(map(JOINED_EVALUATION.fullmatch, words)):
            of_evaluation.append(file)
        elif any(map(ENDS_OF_EVALUATION.fullmatch, words)):
            may_be_of_evaluation.append(file)
        if any(map(ENDS_OF_TRAINING.fullmatch, words)):
            of_training.append(file)
    # Words such as "values" alone say little: they do beside a name with "train".
    if of_training:
        of_evaluation += [file for file in may_be_of_evaluation if file not in of_training]
    if of_evaluation:
        raise FileNotFoundError(
            f"data.path={str(folder)!r}: {of_evaluation[0].relative_to(folder)} looks like a file "
            "to evaluate on, but no file here has the name of a split as a word of its own, so "
            "all would be trained on. Name the files train and test, such as my_train.jsonl and "
            "my_test.jsonl, or pass the one to train on as data.path."
        )


def _check_shards(files: list[Path], folder: Path) -> None:
    """Raise FileNotFoundError where shards of a split are missing, or rows are there twice.

    Twice means by their names: as train.jsonl and train.jsonl.gz, or whole and in shards.
    """
    sets: dict[tuple[Path, str], dict[tuple[int, int], Path]] = {}
    for file in files:
        shard = SHARD.fullmatch(_stem(file))
        name = shard["split"] if shard else _stem(file)
        # A file that is no shard counts as the only one of a set of its own.
        place = (int(shard["number"]), int(shard["total"])) if shard else (0, 0)
        found = sets.setdefault((file.parent, name), {})
        others = [found[other] for other in found if other == place or other[1] != place[1]]
        if others:
            raise FileNotFoundError(
                f"{others[0].relative_to(folder)} and {file.relative_to(folder)} in {folder} hold "
                "the same rows by their names, which would be read twice. Remove one of the two, "
                "or rename it if it holds other rows."
            )
        found[place] = file
    for found in sets.values():
        total = max(total for _, total in found)
        missing = [number for number in range(total) if (number, total) not in found]
        if missing:
            first = next(iter(found.values())).relative_to(folder)
            numbers = ", ".join(f"{number:05}" for number in missing[:5])
            more = ", ..." if len(missing) > 5 else ""
            raise FileNotFoundError(
                f"{folder}: of the {total} files that {first} is one of, {len(missing)} are "
                f"missing ({numbers}{more}). Download them too; to use these alone, rename them "
                f"without -of-{total:05}."
            )


def _check_copies(files: list[Path], folder: Path) -> None:
    """Raise ValueError where two files are equal: their rows would be read twice."""
    of_size: dict[int, list[Path]] = {}
    for file in files:
        of_size.setdefault(file.stat().st_size, []).append(file)
    for size, alike in of_size.items():
        if len(alike) < 2 or not size:
            continue
        # Most files differ early, and then need not be read whole.
        for length in (CHUNK, size):
            of_digest: dict[bytes, list[Path]] = {}
            for file in alike:
                of_digest.setdefault(_digest(file, length), []).append(file)
            alike = [file for same in of_digest.values() if len(same) > 1 for file in same]
        if alike:
            first, second = next(same for same in of_digest.values() if len(same) > 1)[:2]
            raise ValueError(
                f"{first.relative_to(folder)} and {second.relative_to(folder)} in {folder} are "
                "the same file twice. Remove one of the two: its rows would count double."
            )


def _digest(file: Path, length: int) -> bytes:
    """Return a digest of the first `length` bytes of a file."""
    digest = hashlib.sha256()
    left = length
    with file.open("rb") as opened:
        while left > 0:
            piece = opened.read(min(CHUNK, left))
            if not piece:
                break
            digest.update(piece)
            left -= len(piece)
    return digest.digest()


def _split_name(file: Path, folder: Path) -> str:
    """Return the split that a file's name stands for, or else a folder around it, or else "".

    Raises FileNotFoundError where the file's own name stands for several.
    """
    shard = SHARD.fullmatch(_stem(file))
    stem = shard["split"] if shard else _stem(file)
    own = _splits_in(stem)
    # The hub's shards say their split in full: train_sft, train_prefs, unsupervised.
    if shard and SPLIT_NAME.fullmatch(stem):
        if file.parent.name == "data":
            return stem
        if own:
            return SPLIT_WORDS.get(stem, stem)
    if len(own) > 1:
        raise FileNotFoundError(
            f"{file}: its name says {' and '.join(own)}, so it is not clear to which split its "
            "rows belong. Rename it, or pass the file alone as data.path."
        )
    if own:
        return own[0]
    for part in reversed(file.relative_to(folder).parts[:-1]):
        named = _splits_in(part)
        if len(named) == 1:
            return named[0]
    # A shard of no known split is one of its own. "data", "part" and the like are no names.
    return stem if shard and stem.lower() not in SHARD_WORDS else ""


def names_split(name: str) -> bool:
    """Return whether a word in the name of a file or folder stands for a split."""
    return bool(_splits_in(name))


def _splits_in(name: str) -> list[str]:
    """Return the splits that the words of a name stand for, each once."""
    splits = []
    # Digits part words too: v1.0-train, valid1.
    for word in re.split(r"[^a-z]+", name.lower()):
        split = SPLIT_WORDS.get(word)
        if split and split not in splits:
            splits.append(split)
    return splits


def _stem(file: Path) -> str:
    """Return the name of a file without the suffixes that say its format."""
    return Path(_uncompressed(file)).stem


def _format(file: Path) -> str:
    """Return the suffix of a file that says its format, below .gz, in lower case."""
    return Path(_uncompressed(file)).suffix.lower()


def _uncompressed(file: Path) -> str:
    """Return the name of a file without .gz and the like."""
    return file.stem if file.suffix.lower() in COMPRESSIONS else file.name


def _records(
    files: list[Path], folder: Path, checks: Iterable[Callable] = ()
) -> Iterator[tuple[str, Record]]:
    """Yield (where, record) of each row of some files, named by their place in the folder.

    checks: of the files, before the first is read. Raises ValueError for a file that is no data
    file or is empty, and where there is no row in any.
    """
    for check in checks:
        check(files, folder)
    is_any_row = False
    for file in files:
        if _is_packed(file):
            raise ValueError(_unpack(file))
        if _format(file) not in READERS:
            raise ValueError(
                f"data.path={str(file)!r} is none of {', '.join(READERS)} (text also as "
                f"{', '.join(COMPRESSIONS)})."
            )
        if not file.stat().st_size:
            raise _no_rows(file)
        read = functools.partial(READERS[_format(file)], file)
        for row in _numbered(str(file.relative_to(folder)), read):
            is_any_row = True
            yield row
    if not is_any_row:
        raise _no_rows(files[0] if files else folder)


def _no_rows(file: Path) -> ValueError:
    row = {"prompt": "Name a colour.", "chosen": " Blue.", "rejected": " Seven."}
    return ValueError(f"{file} has no rows; expected rows such as {json.dumps(row)}.")


def _numbered(label: str, values: Callable[[], Iterable[Record]]) -> Iterator[tuple[str, Record]]:
    """Yield (where, record) of each record; blank lines are skipped, but counted."""
    for number, record in enumerate(values(), 1):
        if not isinstance(record, str) or record.strip():
            yield f"{label} row {number}", record


def _lines(file: Path) -> Iterator[str | Malformed]:
    """Yield the lines of a text file, plain or gzip, with their line ends.

    One that is too long is not held in memory: in its place comes the error that says so.
    """
    with _opened(file) as text:
        while line := text.readline(LONGEST_ROW + 1):
            if len(line) <= LONGEST_ROW:
                yield line
                continue
            length = 0
            while line:
                length += len(line)
                line = "" if line.endswith("\n") else text.readline(CHUNK)
            yield _too_long(f"a line of {length:,} characters")


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[TextIO]:
    """Open a text file, plain or gzip; a byte order mark is passed over, all line ends are \\n.

    Raises ValueError where what is read is not UTF-8, or not what its suffix says (.gz and others).
    """
    compression, opener = COMPRESSIONS.get(file.suffix.lower(), ("", open))
    try:
        with opener(file, "rt", encoding="utf-8-sig") as text:
            yield text
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        with opener(file, "rb") as content:
            line, signature = _first_bad_line(content)
        advice = f"It looks like {signature}" if signature else "Save it as UTF-8"
        raise ValueError(
            f"{file} is not UTF-8 text: {error.reason}, {byte:#x}, in line {line:,}. {advice}."
        ) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        # Of a file that cannot be opened, the system says why, and has a number for it.
        if not compression or getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"{file} is not a whole {compression} file: {error}.") from None


def _first_bad_line(content: BinaryIO) -> tuple[int, str]:
    """Return which line is not UTF-8, and what the file looks like instead; "" if like nothing."""
    start = content.peek(8)[:8]
    signature = next((SIGNATURES[mark] for mark in SIGNATURES if start.startswith(mark)), "")
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    while piece := content.readline(CHUNK):
        try:
            decoder.decode(piece)
        except UnicodeDecodeError:
            break
        line += piece.endswith(b"\n")
    return line, signature


def _json_records(file: Path) -> Iterator[Record]:
    """Yield the records of a JSON array, of JSON lines under the name .json, or of one object.

    An object is one row, or it holds the rows in its one list of objects, beside a version and the
    like. Raises ValueError naming the line where the text is not JSON.
    """
    window = _Window(file)
    mark = window.mark()
    if mark == "{" and _is_json_lines(file):
        yield from _lines(file)
        return
    if mark == "{":
        yield from _records_of_object(file)
        return
    yield from _elements(window)
    _check_end(window)


def _is_json_lines(file: Path) -> bool:
    """Return whether the first line is an object of its own, and there is more than this line."""
    with _opened(file) as text:
        first = ""
        while not first.strip():
            # An object in one line may be the whole file; no row is as long as this.
            first = text.readline(LONGEST_ROW)
        try:
            _, end = json.JSONDecoder().raw_decode(first.lstrip())
        except (ValueError, RecursionError):
            return False
        if first.lstrip()[end:].strip():
            return True  # a line with something wrong behind its object
        return any(line.strip() for line in text)


def _records_of_object(file: Path) -> Iterator[Record]:
    """Yield the rows in the one list of objects of an object, or else the object as one row.

    Raises ValueError where it has several such lists: {"train": [...], "test": [...]}.
    """
    firsts: dict[str, object] = {}  # the first element of each list
    no_rows = set()  # lists that hold something else than rows
    for name, is_element, value in _walk_object(file):
        if is_element:
            firsts.setdefault(name, value)
            if not isinstance(value, dict):
                no_rows.add(name)
    names = []
    for name, first in firsts.items():
        # Messages and tools are lists of objects in a row.
        if name not in no_rows and not any(key in first for key in ("role", "from", "function")):
            names.append(name)
    if len(names) > 1:
        raise ValueError(
            f"{file} holds several lists of rows, {', '.join(names)}: save each as a file of its "
            f"own, such as {names[0]}.json."
        )
    if not names:
        yield _Window(file).element()
        return
    for name, is_element, value in _walk_object(file):
        if is_element and name == names[0]:
            yield value


def _walk_object(file: Path) -> Iterator[tuple[str, bool, object]]:
    """Yield (name, False, value) of each value in an object, (name, True, element) of its lists."""
    window = _Window(file)
    window.skip("{")
    while window.mark() != "}":
        name = window.element()
        window.skip(":")
        if window.mark() == "[":
            for element in _elements(window):
                yield name, True, element
        else:
            yield name, False, window.element()
        window.skip_comma("}")
    window.skip("}")
    _check_end(window)


def _elements(window: "_Window") -> Iterator:
    """Yield the elements of a JSON array, of which a few at a time are in memory."""
    window.skip("[")
    while window.mark() != "]":
        yield window.element()
        window.skip_comma("]")
    window.skip("]")


def _check_end(window: "_Window") -> None:
    if window.mark():
        raise window.error("text after the end")


class _Window:
    """The part of a JSON text that is in memory: taken from its start, grown at its end."""

    def __init__(self, file: Path):
        self._file = file
        self._pieces = _pieces(file)
        self._text = ""
        self._start = 0  # of what is still to be taken from the text
        self._line = 1  # on which the text starts
        self._decoder = json.JSONDecoder(object_pairs_hook=_object)

    def mark(self) -> str:
        """Return the next character that is no white space, or "" at the end of the file."""
        while True:
            self._start = SPACE.match(self._text, self._start).end()
            if self._start < len(self._text):
                return self._text[self._start]
            if not self._grow():
                return ""

    def skip(self, mark: str) -> None:
        if self.mark() != mark:
            raise self.error(f"Expecting {mark!r} delimiter")
        self._start += 1

    def skip_comma(self, end: str) -> None:
        """Take a comma, unless the array or object ends here; none may stand before its end."""
        if self.mark() == end:
            return
        self.skip(",")
        if self.mark() == end:
            raise self.error("a comma before the end")

    def element(self):
        """Return the next value."""
        self.mark()
        while True:
            try:
                element, self._start = self._decoder.raw_decode(self._text, self._start)
                return element
            except Malformed as error:
                raise self.error(str(error)) from None
            except json.JSONDecodeError as error:
                # Either it is not JSON, or its end is not in memory yet.
                length = len(self._text) - self._start
                if length > LONGEST_ROW:
                    # The start of the row that is too long, or of what is no JSON.
                    raise self._no_end(length) from None
                if not self._grow():
                    raise self.error(error.msg, error.pos) from None
            except ValueError:  # Python's own limit
                raise self.error(str(_too_many_digits())) from None
            except RecursionError:
                raise self.error(str(_too_deep())) from None

    def error(self, reason: str, position: int | None = None) -> ValueError:
        position = self._start if position is None else position
        line = self._line + self._text.count("\n", 0, position)
        return ValueError(f"{self._file} is not JSON: {reason} at line {line}.")

    def _no_end(self, length: int) -> ValueError:
        line = self._line + self._text.count("\n", 0, self._start)
        return ValueError(
            f"{self._file}: the value that begins at line {line:,} has not ended after {length:,} "
            f"characters; a row has at most {LONGEST_ROW:,}. A quote or a bracket may lack its "
            "end; otherwise remove the row or part its text."
        )

    def _grow(self) -> bool:
        """Let go of what has been taken, and read on; return False at the end of the file."""
        self._line += self._text.count("\n", 0, self._start)
        parts = [self._text[self._start :]]
        self._start = 0
        # At least as much again: a long element would else be parsed once for each piece of it.
        wanted = max(len(parts[0]), 1)
        while wanted > 0:
            piece = next(self._pieces, "")
            if not piece:
                break
            parts.append(piece)
            wanted -= len(piece)
        self._text = "".join(parts)
        return len(parts) > 1


def _pieces(file: Path) -> Iterator[str]:
    """Yield a text file in pieces of CHUNK characters."""
    with _opened(file) as text:
        while piece := text.read(CHUNK):
            yield piece


def _csv_records(file: Path, delimiter: str = ",") -> Iterator[Record]:
    """Yield the rows of a table of text; a row that does not fit its columns comes as an error.

    Raises ValueError, with the line, where it cannot be told where a row ends: a quote lacks its
    end, or ends within a cell.
    """
    csv.field_size_limit(sys.maxsize)
    text = _CsvText(file)
    # Not strict, it takes all that follows a quote without an end for one cell.
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    kind = "TSV" if delimiter == "\t" else "CSV"
    names = None
    try:
        for cells in reader:
            if names is None:
                names = cells
                if not any(names):
                    raise ValueError(
                        f"{file} has no names of columns in line 1; expected a line such as "
                        f"{delimiter.join(('prompt', 'chosen', 'rejected'))!r}."
                    )
                _check_columns(file, names)
            elif cells:
                yield _csv_row(names, cells)
            text.begin_row()
    except csv.Error as error:
        raise ValueError(
            f"{file} is not {kind}: the row that begins in line {text.row_start:,} "
            f"{_csv_fault(error, text)}. A cell that has quotes, separators or line ends in it "
            'stands in quotes, and its own quotes are doubled: "He said ""no"", twice".'
        ) from None


def _csv_fault(error: csv.Error, text: "_CsvText") -> str:
    """Say what is wrong with the row that the csv module refuses."""
    if text.is_at_end:
        return "has a quote without an end, so that the rest of the file would be in one cell"
    if "expected after" in str(error):
        return f"has a quote that ends within a cell, in line {text.line:,}"
    return f"cannot be read ({error})"


def _csv_row(names: list[str], cells: list[str]) -> Record:
    """Return the fields of a row, or the error that says that it has other cells than columns."""
    if len(cells) > len(names):
        # An answer would lose its end.
        return Malformed(
            "the row has more cells than the first line has names; quote texts with commas",
            repr(cells[len(names) :])[:80],
        )
    # Columns without a name, which spreadsheets leave behind the last one, may be left out.
    missing = [name for name in names[len(cells) :] if name]
    if missing:
        # One cell that is left out shifts all those behind it to other columns.
        return Malformed(
            "the row has fewer cells than the first line has names",
            f"{len(cells)} cells, nothing for {', '.join(map(repr, missing))}"[:80],
            "write a separator for an empty cell too",
        )
    return dict(zip(names, cells, strict=False))


class _CsvText:
    """The lines of a table of text, with the line in which the row begins that is being read."""

    def __init__(self, file: Path):
        self._file = file
        self._lines = _lines(file)
        self._length = 0  # characters of the row so far
        self.line = 0  # number of the line that was read last
        self.row_start = 1  # number of the line in which the row begins
        self.is_at_end = False

    def begin_row(self) -> None:
        self.row_start = self.line + 1
        self._length = 0

    def __iter__(self) -> "_CsvText":
        return self

    def __next__(self) -> str:
        line = next(self._lines, None)
        if line is None:
            self.is_at_end = True
            raise StopIteration
        self.line += 1
        # A line that is too long comes as an error.
        self._length += len(line) if isinstance(line, str) else LONGEST_ROW + 1
        if self._length > LONGEST_ROW:
            raise ValueError(
                f"{self._file}: the row that begins in line {self.row_start:,} is longer than "
                f"{LONGEST_ROW:,} characters in line {self.line:,}. A quote in it may lack its "
                "end; otherwise remove the row or part its text."
            )
        return line


def _check_columns(file: Path, names: Iterable[str]) -> None:
    """Raise ValueError where two columns have one name: only one of them would be read."""
    seen = set()
    for name in names:
        # Spreadsheets leave empty columns behind the last one.
        if name and name in seen:
            raise ValueError(f"{file} has two columns named {name!r}. Rename or remove one.")
        seen.add(name)


def _parquet_records(file: Path) -> Iterator[Record]:
    import pyarrow.parquet

    with _naming_damage(file, "Parquet"):
        # Without the buffers, a whole row group would be read, which may be the whole file.
        table = pyarrow.parquet.ParquetFile(
            file, pre_buffer=False, buffer_size=CHUNK, page_checksum_verification=True
        )
        batches = table.iter_batches(batch_size=BATCH)
    _check_columns(file, table.schema_arrow.names)
    yield from _table_rows(file, "Parquet", table.schema_arrow, batches)


def _arrow_records(file: Path) -> Iterator[Record]:
    """Yield the rows of an Arrow file of either kind: streams (as `datasets` writes) and files."""
    import pyarrow

    with _naming_damage(file, "Arrow"):
        opened = pyarrow.OSFile(str(file))
    with opened:
        with _naming_damage(file, "Arrow"):
            try:
                stream = pyarrow.ipc.open_stream(opened)
                batches = iter(stream)
                is_stream = True
            except pyarrow.ArrowInvalid:
                stream = pyarrow.ipc.open_file(opened)
                batches = (stream.get_batch(i) for i in range(stream.num_record_batches))
                is_stream = False
        _check_columns(file, stream.schema.names)
        yield from _table_rows(file, "Arrow", stream.schema, batches)
        # A second stream behind the first, as two files that were joined have, would be lost.
        if is_stream and opened.tell() < opened.size():
            raise ValueError(
                f"{file} has {opened.size() - opened.tell():,} bytes behind the end of its Arrow "
                "stream, which are not read. Files cannot be joined: put them into one folder."
            )


@contextlib.contextmanager
def _naming_damage(file: Path, kind: str) -> Iterator[None]:
    """Raise ValueError that names the file where its content is not of this kind, or damaged."""
    try:
        yield
    except Exception as error:  # a library raises whatever damage makes it stumble over
        # Of a file that cannot be opened, the system says why, and has a number for it.
        if getattr(error, "errno", None) is not None:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")[:300]
        raise ValueError(
            f"{file} is no whole {kind} file: {reason}. Download or write it again."
        ) from None


def _table_rows(file: Path, kind: str, schema, batches: Iterable) -> Iterator[Record]:
    """Yield the rows of Arrow batches, as `datasets` decodes the types it has written."""
    import datasets

    try:
        features = datasets.Features.from_arrow_schema(schema)
    except Exception as error:  # what a schema says is the file's
        reason = f"{error}".partition("\n")[0][:300]
        raise ValueError(
            f"{file} has a column of a type that is not read: {reason}. Save it as text, numbers, "
            "lists or structs."
        ) from None
    batches = iter(batches)
    while True:
        with _naming_damage(file, kind):
            batch = next(batches, None)
        if batch is None:
            return
        for start in range(0, batch.num_rows, BATCH):
            with _naming_damage(file, kind):
                columns = features.decode_batch(batch.slice(start, BATCH).to_pydict())
            yield from _rows_of(columns)


def _batched(dataset) -> Iterator[Record]:
    """Yield the rows of a `datasets` split."""
    # Several times faster by batches than row by row.
    for columns in dataset.iter(batch_size=BATCH):
        yield from _rows_of(columns)


def _rows_of(columns: dict[str, list]) -> Iterator[Record]:
    """Yield the rows of a table's columns, without the nulls that a table puts into structs.

    All structs of a column have the same keys, so the arguments of every tool call have those of
    all tools, null where a call does not use them. A null that a row had itself looks the same.
    """
    for values in zip(*columns.values(), strict=True):
        row = {}
        for name, value in zip(columns, values, strict=True):
            row[name] = _without_nulls(value)
        yield row


def _without_nulls(value):
    """Return a value of a table without the empty keys of its structs, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        # All have one type, and lists of numbers may be long.
        first = next((part for part in value if part is not None), None)
        if isinstance(first, dict | list):
            return [_without_nulls(part) for part in value]
    return value


# The suffix of a file -> the function that reads its records.
READERS = {
    ".jsonl": _lines,
    ".json": _json_records,
    ".csv": _csv_records,
    ".parquet": _parquet_records,
    ".arrow": _arrow_records,
    ".ndjson": _lines,
    ".tsv": functools.partial(_csv_records, delimiter="\t"),
}
