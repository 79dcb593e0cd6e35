"""Flags of commands that read data without a config: each is a field of config.data by its name."""

import contextlib
import datetime
import re
from collections.abc import Callable, Iterator, Sequence

from absl import flags

from dpo_jax import config as configs
from dpo_jax.config_checks import ALLOWED
from dpo_jax.config_files import parse_options

# A field of config.data as messages name it, or an option of data.template; not a file such as
# "my.data.path", nor what a row says in quotes.
FIELD = re.compile(
    r"(?<![\w./'\"-])(?:--)?(?:config\.)?data\.(?P<name>[a-z_]+)\b(?:\.(?P<option>[a-z_]+)(?==))?"
)


class _OptionsParser(flags.ArgumentParser):
    """Reads options as --config.data.template does."""

    syntactic_help = "NAME=VALUE, several with commas between them, or a dict"

    def parse(self, argument: str | dict) -> dict:
        return argument if isinstance(argument, dict) else parse_options(argument)


class _DateParser(flags.ArgumentParser):
    """Reads a day."""

    syntactic_help = "a day such as 2026-11-26"

    def parse(self, argument: str) -> datetime.date:
        return datetime.date.fromisoformat(argument)


def define(*names: str, **defaults) -> Callable[[], dict]:
    """Define --NAME for some fields of config.data; return a function that gives their values.

    Call it once the flags are parsed. defaults: of fields whose default differs from the config's.
    """
    block = configs.default(()).data
    holders = {}
    for name in (*names, *defaults):
        default = defaults.get(name, block[name])
        holders[name] = _define(name, default, configs.DATA[name])

    def values() -> dict:
        found = {}
        for name, holder in holders.items():
            is_list = isinstance(holder.value, list)
            found[name] = tuple(holder.value) if is_list else holder.value
        return found

    return values


@contextlib.contextmanager
def named(names: Sequence[str], path: str) -> Iterator[None]:
    """Make the errors of a command name the flags that it has, instead of fields of a config.

    names: the fields of config.data that are flags. path: the flag that stands for data.path.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        text = in_flags(str(error), names, path)
        if text == str(error):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(text) from error


def in_flags(text: str, names: Sequence[str], path: str) -> str:
    """Return a text in which fields of config.data are called by their flags, as in `named`."""
    flag_of = dict(zip(names, names, strict=True)) | {"path": path}

    def flag(found: re.Match) -> str:
        name = found["name"]
        if name not in flag_of:
            return found[0]
        option = found["option"]
        return f"--{flag_of[name]}={option}" if option else f"--{flag_of[name]}"

    return FIELD.sub(flag, text)


def define_date() -> flags.FlagHolder:
    """Define --date, which chat templates take for today."""
    return flags.DEFINE(
        _DateParser(), "date", None, "The day that chat templates take for today. Default: today."
    )


def define_split() -> flags.FlagHolder:
    """Define --split, of data that has several."""
    return flags.DEFINE_string(
        "split", "", "The split to read. Default: train, or the only one that there is."
    )


def _define(name: str, default, field: configs.Field) -> flags.FlagHolder:
    """Define a flag of the type that the default has, in the range of the field."""
    allowed = ALLOWED.get(f"data.{name}")
    help_text = f"As config.data.{name}: {field.meaning}."
    limits = dict(lower_bound=field.least, upper_bound=field.most)
    if allowed:
        return flags.DEFINE_enum(name, default, allowed, help_text)
    if isinstance(default, bool):
        return flags.DEFINE_bool(name, default, help_text)
    if isinstance(default, int):
        return flags.DEFINE_integer(name, default, help_text, **limits)
    if isinstance(default, float):
        return flags.DEFINE_float(name, default, help_text, **limits)
    if isinstance(default, str):
        return flags.DEFINE_string(name, default, help_text)
    if isinstance(default, tuple):
        return flags.DEFINE_list(name, list(default), help_text)
    return flags.DEFINE(_OptionsParser(), name, default.to_dict(), help_text)
