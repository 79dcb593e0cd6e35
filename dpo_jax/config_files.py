"""Config files: finding one by its name, loading it, and changing fields from the command line.

    toy                  a config that comes with the package
    configs/toy.py:ppo   a file; what follows the colon is passed to its get_config
    --config.FIELD=VALUE an override: the text is read as the type that the field has

Fields of OPEN_BLOCKS are not ours, so any name may be set: --config.data.template.date_string=...

Every mistake is a ValueError or FileNotFoundError that names the file or the field, says what was
expected, and lists the nearest names.
"""

import ast
import difflib
import importlib.util
import inspect
import json
import pathlib
import re
import traceback
import types
from collections.abc import Iterable

from ml_collections import ConfigDict

from dpo_jax.config import OPEN_BLOCKS, flat_fields
from dpo_jax.stage_table import STAGES

# In an installed package the configs lie inside it; in a checkout, at the top of the repository.
_INSTALLED = pathlib.Path(__file__).parent / "configs"
_CHECKOUT = pathlib.Path(__file__).parent.parent / "configs"
SHIPPED = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT

TRUE_WORDS = ("true", "t", "1", "yes")
FALSE_WORDS = ("false", "f", "0", "no")
# What Python raises for a text that is no literal; the last two for brackets beyond reason.
NO_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


def load(choice: str) -> ConfigDict:
    """Return the config that NAME, FILE, NAME:METHOD or FILE:METHOD stands for."""
    name, colon, method = choice.partition(":")
    path = find(name)
    module = load_module(path)
    if not hasattr(module, "get_config"):
        raise ValueError(
            f"--config={choice}: {path} has no function get_config(). A config file defines one, "
            "which returns a config; see configs/dpo.py."
        )
    if not callable(module.get_config):
        raise ValueError(f"--config={choice}: get_config in {path} is not a function.")
    parameters = inspect.signature(module.get_config).parameters.values()
    takes_method = bool(parameters)
    needs_method = any(parameter.default is inspect.Parameter.empty for parameter in parameters)
    if needs_method and not colon:
        methods = ", ".join(getattr(module, "METHODS", {}))
        raise ValueError(
            f"--config={choice}: {path} has several configs. Write --config={name}:METHOD, with "
            f"one of {methods or 'what its get_config takes'}."
        )
    if colon and not takes_method:
        raise ValueError(
            f"--config={choice}: {path} has only one config, so nothing may follow the colon. "
            f"Write --config={name}."
        )
    try:
        config = module.get_config(*([method] if colon else []))
    # A config file that calls sys.exit would end the command without a word.
    except (Exception, SystemExit) as error:
        raise _explain_get_config(error, choice, path, module) from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"--config={choice}: get_config() in {path} returned {type(config).__name__}, expected "
            "a ConfigDict; is a `return config` missing?"
        )
    return config


def find(name: str) -> pathlib.Path:
    """Return the path of a config file given by path or by bare name.

    A file of the user's own goes first. `NAME` and `configs/NAME.py` otherwise mean the config of
    that name that comes with the package, so that both work from any folder.
    """
    path = pathlib.Path(name)
    if path.is_file():
        return path
    bare = re.fullmatch(r"(?:configs/)?(\w+)(?:\.py)?", name)
    if bare and (SHIPPED / f"{bare[1]}.py").is_file():
        return SHIPPED / f"{bare[1]}.py"
    known = shipped_names()
    similar = nearest(path.stem, known)
    hint = f"Did you mean --config={similar[0]}? " if similar else ""
    raise FileNotFoundError(
        f"--config={name}: there is no such file or config. {hint}The configs that come with "
        f"dpo_jax are {', '.join(known)}; for your own, give the path of its file."
    )


def shipped_names() -> list[str]:
    """Return the names of the configs that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.py") if path.stem != "__init__")


def load_module(path: str | pathlib.Path) -> types.ModuleType:
    """Return a config file as a module; ValueError with the line where it fails."""
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None:
        raise ValueError(f"--config={path}: expected a Python file, whose name ends in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(_in_file(error, pathlib.Path(path))) from error
    return module


def _explain_get_config(
    error: BaseException, choice: str, path: pathlib.Path, module
) -> ValueError:
    """Return the error to show instead of one that get_config raised."""
    method = choice.partition(":")[2]
    methods = list(getattr(module, "METHODS", {}))
    if isinstance(error, KeyError) and error.args == (method,):
        similar = nearest(method, methods)
        hint = f" Did you mean {similar[0]}?" if similar else ""
        return ValueError(
            f"--config={choice}: {path.stem} has no method {method!r}; it has "
            f"{', '.join(methods) or 'none'}.{hint}"
        )
    # The config file's own check of what follows the colon, already in words for a person.
    raised_at = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, ValueError) and raised_at.filename == str(path):
        return ValueError(f"--config={choice}: {error} ({path} line {raised_at.lineno})")
    return ValueError(_in_file(error, path))


def _in_file(error: BaseException, path: pathlib.Path) -> str:
    """Say where in a config file an exception comes from: FILE line N: NameError: ..."""
    where = str(path)
    if isinstance(error, SyntaxError):
        where = f"{error.filename or path} line {error.lineno or 1}"
    else:
        for frame in traceback.extract_tb(error.__traceback__):
            if pathlib.Path(frame.filename) == path.absolute() or frame.filename == str(path):
                where = f"{path} line {frame.lineno}"
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{where}: {type(error).__name__}: {shortened(message)}"


def override(config: ConfigDict, texts: dict[str, str]) -> dict[str, object]:
    """Set fields of a config from texts (dotted field -> text); return the values that were set.

    Raises ValueError for a field that the config has not, or a text that is no value of its type.
    """
    values = {}
    for field, text in texts.items():
        if is_new_option(config, field):
            values[field] = parse_option(text)
        else:
            current = value_of(config, field)
            if isinstance(current, ConfigDict) and field not in OPEN_BLOCKS:
                raise ValueError(
                    f"--config.{field}={shortened(text)}: expected one of its fields, "
                    f"--config.{field}.NAME=VALUE. It has {', '.join(current)}."
                )
            values[field] = parse_value(field, text, current)
        _set(config, field, values[field])
    return values


def is_new_option(config: ConfigDict, field: str) -> bool:
    """Return whether a field (dotted name) is one that an open block does not have yet."""
    block, _, name = field.rpartition(".")
    return block in OPEN_BLOCKS and name.isidentifier() and not has_field(config, field)


def value_of(config: ConfigDict, field: str):
    """Return the value of a dotted field; ValueError names the nearest fields if there is none."""
    value = _find(config, field)
    if value is _ABSENT:
        raise ValueError(unknown_field(config, field))
    return value


def has_field(config: ConfigDict, field: str) -> bool:
    """Return whether a config has a dotted field."""
    return _find(config, field) is not _ABSENT


_ABSENT = object()  # None may be a field's value


def _find(config: ConfigDict, field: str):
    """Return the value of a dotted field, or _ABSENT."""
    value = config
    for part in field.split("."):
        if not isinstance(value, ConfigDict) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def unknown_field(config: ConfigDict, field: str) -> str:
    """Say that a config has no such field, why, and which fields come nearest."""
    block = field.partition(".")[0]
    if block in STAGES and block not in config:
        return (
            f"--config.{field}: this config runs no stage {block}, so the field would do nothing. "
            f"Its stages are {', '.join(config.stages)}."
        )
    similar = nearest_fields(config, field)
    if similar:
        hint = f"Did you mean {' or '.join(similar)}?"
    elif isinstance(config.get(block), ConfigDict):
        hint = f"config.{block} has {', '.join(config[block])}."
    else:
        hint = f"The config has {', '.join(config)}."
    return f"--config.{field}: there is no such field. {hint}"


def nearest_fields(config: ConfigDict, field: str) -> list[str]:
    """Return up to three fields of a config that someone may have meant, the likeliest first."""
    block, _, word = field.rpartition(".")
    known = list(flat_fields("", config.to_dict()))
    # An option of a block whose name is not quite right.
    found = [f"{name}.{word}" for name in nearest(block, OPEN_BLOCKS)]
    known += [name for name in OPEN_BLOCKS if name not in known]
    last_words = {name: name.rpartition(".")[2] for name in known}
    # The same name in another block first: dpo.beta for beta.
    found += [name for name in known if last_words[name] == word]
    # Then names that look like it, in the block that was given if there is one.
    near = [name for name in known if name.startswith(f"{block}.")] or known
    for last_word in nearest(word, {last_words[name] for name in near}):
        found += [name for name in near if last_words[name] == last_word and name not in found]
    return found[:3]


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Return up to three known words that look like a word, the most similar first."""
    return difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)


def parse_value(field: str, text: str, current):
    """Return the text as a value of the type that the field has now."""
    if isinstance(current, str):
        return text
    try:
        if isinstance(current, bool):
            return _parse_bool(text)
        if isinstance(current, int):
            return int(text)
        if isinstance(current, float):
            return float(text)
        if isinstance(current, tuple):
            return _parse_tuple(text)
        return ConfigDict(parse_options(text))
    except (ValueError, SyntaxError):
        raise ValueError(
            f"--config.{field}={shortened(text)}: expected {_EXPECTED[_kind(current)]}. "
            f"Its value is {_shown(current)} now."
        ) from None


_EXPECTED = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    tuple: "values with commas between them",
    ConfigDict: "one of its fields, --config.BLOCK.FIELD=VALUE, or FIELD=VALUE,..., or a dict",
}


def _kind(value) -> type:
    return next(kind for kind in _EXPECTED if isinstance(value, kind))


def _shown(value) -> str:
    return "a block of fields" if isinstance(value, ConfigDict) else repr(value)


def _parse_bool(text: str) -> bool:
    if text.lower() in TRUE_WORDS:
        return True
    if text.lower() in FALSE_WORDS:
        return False
    raise ValueError(text)


def _parse_tuple(text: str) -> tuple:
    """Read `(1, 4)`, `1,4`, `q,v` or a single value as a tuple."""
    try:
        value = ast.literal_eval(text)
    except NO_LITERAL:
        # Words without quotes.
        return tuple(word.strip() for word in text.split(","))
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def parse_options(text: str) -> dict:
    """Read options from `NAME=VALUE,NAME=VALUE`, or from a dict as Python or JSON writes one.

    Raises ValueError where the text is neither.
    """
    if not text.strip():
        return {}
    if text.lstrip().startswith("{"):
        options = parse_option(text)
        if not isinstance(options, dict):
            raise ValueError(text)
        return options
    options = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ValueError(text)
        options[name.strip()] = parse_option(value)
    return options


def parse_option(text: str):
    """Read a value of no known type: a Python or JSON literal, true or false, else plain text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for parse in (ast.literal_eval, json.loads):
        try:
            value = parse(text)
            json.dumps(value)  # a config is kept as JSON, which has no sets and no bytes
            return value
        except NO_LITERAL:
            continue
    return text


def shortened(text: str, length: int = 300) -> str:
    """Return a text for a message, on one line and not longer than a person reads."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else f"{line[:length]} ... ({len(line):,} characters)"


def _set(config: ConfigDict, field: str, value) -> None:
    *blocks, name = field.split(".")
    for block in blocks:
        config = config[block]
    config[name] = value
