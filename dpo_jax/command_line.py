"""The command line that all commands share: flags, config, help, and how a command ends.

    --config=NAME[:METHOD] --config.FIELD=VALUE --FLAG=VALUE --debug --help

A user's mistake ends a command with one paragraph on stderr and exit status 2; `--debug` adds the
traceback. So does a wait that was in vain, with status 75: the same command may go through later. A
bug keeps its traceback and exits with 1. Interrupted, a command exits with 128 + the signal's
number. Imports no jax, so that help and listings are quick.
"""

import dataclasses
import dis
import errno
import math
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from dpo_jax import config_files, stopping, surroundings
from dpo_jax.config import DATA
from dpo_jax.storage.addresses import shown

MISTAKE = 2  # exit status
BUG = 1  # exit status
TRY_AGAIN = 75  # exit status, EX_TEMPFAIL of sysexits.h: what restarts jobs may start it again
BROKEN_PIPE = 128 + 13  # exit status, the shell's code for SIGPIPE

# What our code raises for a person to read.
_FOR_PEOPLE = (
    ValueError,
    RuntimeError,
    ArithmeticError,
    ImportError,
    MemoryError,
    flags.Error,
)
_BUG_NOTE = (
    "This is a bug in dpo_jax, not a mistake of yours. Please report it, with the command and the "
    "lines above."
)
_OURS = ("dpo_jax", "experiments")
# Flags that may differ between the processes of one command. Whether they mean the same folder is
# checked there, whatever each host calls it.
_OF_A_HOST = ("coordinator", "num_processes", "process_id", "debug", "workdir", "out")
# A full disk, a full share of it, and a limit of a file's size.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass
class ConfigFlags:
    """A command's --config and the overrides --config.FIELD=VALUE, once they are parsed."""

    flag: flags.FlagHolder
    overrides: dict[str, str] = dataclasses.field(default_factory=dict)  # field -> text

    @property
    def choice(self) -> str:
        """NAME or FILE, with :METHOD if one was given."""
        return self.flag.value

    def load(self) -> ConfigDict:
        """Return the config with the overrides, locked against fields that it does not have."""
        config = config_files.load(self.choice)
        config_files.override(config, self.overrides)
        return config.lock()

    def default_workdir(self) -> str:
        """Return runs/NAME, with the method after a dash: runs/imdb, runs/imdb-ppo."""
        name, _, method = self.choice.partition(":")
        words = [pathlib.PurePath(name).stem, *method.split(",")]
        return "runs/" + "-".join(word for word in words if word)


def define_config(default: str | None = None) -> ConfigFlags:
    """Define --config, and allow --config.FIELD=VALUE, for the command that is being defined."""
    holder = flags.DEFINE_string(
        "config",
        default,
        "The config: the NAME of one that comes with dpo_jax, or a FILE; then :METHOD if it has "
        "several. --config.FIELD=VALUE changes a field.",
    )
    if default is None:
        flags.mark_flag_as_required("config")
    return ConfigFlags(holder)


def define_workdir() -> flags.FlagHolder:
    """Define --workdir for a command that trains; left empty, the config names the folder."""
    return flags.DEFINE_string(
        "workdir", None, "The folder of the runs. Default: runs/NAME, after the config's name."
    )


def run(
    command: Callable[..., None],
    description: str,
    *,
    config: ConfigFlags | None = None,
    positional: str = "",
    several: bool = False,
) -> None:
    """Parse the command line, run a command, and end the program.

    description: the module's docstring, shown by --help. config: what define_config returned, in a
    command that has it. positional: name of the one argument without dashes that the command takes
    and may be given, such as WORKDIR; it is passed to the command, "" if absent. several: more than
    one of it may be given, each an argument of the command's.
    """
    surroundings.prepare()
    stopping.end_by_exception()
    flags.DEFINE_bool("debug", False, "Show the traceback of every error.")
    absl_logging.use_absl_handler()
    try:
        if {"--help", "-h", "--helpfull", "--helpshort"} & set(sys.argv[1:]):
            print(_help(description, positional), flush=True)
            sys.exit(0)
        rest = _parse(sys.argv, config, positional, several)
        command(*rest)
        sys.stdout.flush()
    except BrokenPipeError:
        end_by_broken_pipe()
    except (Exception, KeyboardInterrupt) as error:
        _, status = report(error)
        sys.exit(status)
    stopping.end_at_once()
    sys.exit(0)


def end_by_broken_pipe() -> None:
    """End the program quietly: who reads its output has gone, as in `dpo-jax runs | head -1`."""
    surroundings.drop_output(sys.stdout)
    sys.exit(BROKEN_PIPE)


def _parse(
    argv: list[str], config: ConfigFlags | None, positional: str, several: bool
) -> list[str]:
    """Parse the flags; return the arguments for the command: [] or the positional ones."""
    try:
        # Files of flags, --flagfile=FILE, may hold overrides too.
        argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
        if config is not None:
            argv, texts = split_overrides(argv)
            config.overrides.update(texts)
        _, *extra = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_unknown_flag(error)) from None
    except flags.IllegalFlagValueError as error:
        raise ValueError(_wrong_value(error) or _say_missing()) from None
    except flags.Error as error:
        # What is left is a file of flags that cannot be read, or a flag without its value: absl has
        # no type of its own for the latter.
        raise ValueError(_no_value(argv[-1], error)) from None
    strays = [argument for argument in extra if not positional or _looks_like_flag(argument)]
    # A folder may bear the name of a flag, but a second one is too many whatever its name.
    if not several:
        strays += extra[1:]
    if strays:
        raise ValueError(_stray_argument(strays[0]))
    _check_values()
    if positional:
        return extra or [""]
    return []


def _check_values() -> None:
    """Raise ValueError for a flag whose value could be read, but cannot be meant."""
    for flag in _own_flags().values():
        if not flag.present:
            continue
        # Of a shell variable that was never set, perhaps. A field of the data may be emptied.
        if isinstance(flag.value, str) and not flag.value.strip() and flag.name not in DATA:
            raise ValueError(
                f"--{flag.name}=: expected a value. Leave the flag out for its default. "
                f"{_see_help()}"
            )
        if isinstance(flag.value, float) and not math.isfinite(flag.value):
            raise ValueError(f"--{flag.name}={flag.value}: expected a finite number.")


def shared_flags() -> dict[str, object]:
    """Return the flags that all processes of a command must be given alike, "--NAME" -> value."""
    values = {f"--{name}": flag.value for name, flag in _own_flags().items()}
    return {name: value for name, value in values.items() if name[2:] not in _OF_A_HOST}


def _looks_like_flag(argument: str) -> bool:
    """Return whether an argument without dashes was meant as a flag or an override."""
    if pathlib.Path(argument).exists():
        return False
    name, equals, _ = argument.partition("=")
    return argument.startswith("config.") or (equals and name in _own_flags())


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take the overrides out of a command line; return the other arguments, and field -> text.

    The forms are --config.FIELD=VALUE and --config.FIELD VALUE; for a field that is True or False
    also --config.FIELD and --noconfig.FIELD.
    """
    others = []
    texts = {}
    position = 0
    while position < len(argv):
        argument = argv[position]
        following = argv[position + 1] if position + 1 < len(argv) else None
        position += 1
        match = re.fullmatch(r"--?(no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            others.append(argument)
            continue
        negated, field, text = match.groups()
        if negated:
            text = "False"
        elif text is None and following is not None and _is_value(following):
            text = following
            position += 1
        elif text is None:
            text = "True"
        # The last one counts, and stands where it was given.
        texts.pop(field, None)
        texts[field] = text
    return others, texts


def _is_value(argument: str) -> bool:
    """Return True if an argument is a value (a negative number is one) rather than a flag."""
    return not argument.startswith("-") or re.match(r"-\.?\d", argument) is not None


def report(error: BaseException) -> tuple[str, int]:
    """Print on stderr why a command ends; return the reason in one paragraph, and the exit status.

    A paragraph for a user's mistake, with --debug after the traceback; a traceback for a bug.
    """
    stopping.end_at_once()  # a second signal may come on the way out
    debug = "--debug" in sys.argv  # the flags may not have been parsed
    interrupted = isinstance(error, KeyboardInterrupt)
    mistake = is_for_people(error)
    if debug or not (mistake or interrupted):
        traceback.print_exception(error)
    if interrupted:
        signum = getattr(error, "signum", signal.SIGINT)
        text, status = stopping.words(signum), 128 + signum
    elif mistake:
        text = f"error: {shown(str(error)) or type(error).__name__}"
        # A host that did not come in time may come the next time.
        status = TRY_AGAIN if isinstance(error, TimeoutError) else MISTAKE
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            text += ". Make room or raise the limit, and run the same command again."
        elif isinstance(error, OSError) and error.errno == errno.EROFS:
            text += ". Mount it for writing, or give another folder."
    else:
        text, status = _BUG_NOTE, BUG
    stopping.said()
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # nobody reads it; the status remains
        surroundings.drop_output(sys.stderr)
    if status == BUG:
        return f"{type(error).__name__}: {error}", status
    return text, status


def is_for_people(error: BaseException) -> bool:
    """Return whether an error's own words tell the user what to do.

    They do where a `raise` statement in dpo_jax made it, and where the machine refused something:
    no such file, no permission, a full disk, no network. The same types from anywhere else, such as
    a ValueError of jax's or of a zip() in our own code, are bugs.
    """
    if isinstance(error, OSError):
        return True
    return isinstance(error, _FOR_PEOPLE) and _raised_by_us(error)


def _raised_by_us(error: BaseException) -> bool:
    """Return whether an exception comes from a `raise` statement in the project's own code."""
    innermost = error.__traceback__
    if innermost is None:
        return False
    while innermost.tb_next is not None:
        innermost = innermost.tb_next
    frame = innermost.tb_frame
    # __package__ rather than __name__, which is __main__ in a module started by python -m.
    package = (frame.f_globals.get("__package__") or "").partition(".")[0]
    instruction = dis.opname[frame.f_code.co_code[innermost.tb_lasti]]
    return package in _OURS and instruction in ("RAISE_VARARGS", "RERAISE")


def _unknown_flag(error: flags.UnrecognizedFlagError) -> str:
    name = error.flagname
    if name.startswith(("config.", "noconfig.")):
        return f"--{name}: this command takes no config."
    similar = config_files.nearest(name, _own_flags())
    hint = f"Did you mean --{similar[0]}? " if similar else ""
    return f"--{name}: there is no such flag. {hint}{_see_help()}"


def _wrong_value(error: flags.IllegalFlagValueError) -> str:
    """Say what a flag expects instead of the value it was given; "" if its value is missing."""
    match = re.match(r"flag --(\w+)=(.*?): ", str(error), re.DOTALL)
    if match is None:
        return str(error)
    name, text = match.groups()
    if text == "None":
        return ""
    parser = flags.FLAGS[name].parser
    if isinstance(parser, flags.EnumParser):
        expected = "one of " + ", ".join(parser.enum_values)
    else:
        expected = parser.syntactic_help or parser.flag_type()
    return f"--{name}={text}: expected {expected}. {_see_help()}"


def _no_value(last: str, error: flags.Error) -> str:
    """Say that the last argument is a flag without its value; absl's own words for the rest."""
    name = last.lstrip("-")
    if not last.startswith("-") or name not in flags.FLAGS:
        return str(error)
    return f"--{name} needs a value: --{name}=VALUE. {_see_help()}"


def _say_missing() -> str:
    """Say which required flags have no value, and what each is for."""
    missing = [flag for flag in _own_flags().values() if flag.value is None and _required(flag)]
    lines = [f"--{flag.name} is required: {flag.help}" for flag in missing]
    return "\n".join([*lines, _see_help()])


def _required(flag: flags.Flag) -> bool:
    return any(not validator.checker(None) for validator in flag.validators)


def _stray_argument(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if argument.startswith("config.") or name in flags.FLAGS:
        return f"{argument}: a flag begins with two dashes. Write --{argument}."
    similar = config_files.nearest(name, _own_flags()) if equals else []
    if similar:
        return f"{argument}: expected only flags. Did you mean --{similar[0]}={value}?"
    return (
        f"{argument}: expected only flags, --NAME=VALUE; a value with a space in it needs quotes. "
        f"{_see_help()}"
    )


def _see_help() -> str:
    return f"{_program()} --help lists the flags."


def _program() -> str:
    """Return how this command is started: `dpo-jax train`, or `python -m dpo_jax.train`."""
    started = sys.modules["__main__"]
    spec = getattr(started, "__spec__", None)
    if spec is None or spec.name == "dpo_jax.__main__":
        return sys.argv[0]
    return f"python -m {spec.name.removesuffix('.__main__')}"


def _own_flags() -> dict[str, flags.Flag]:
    """Return the flags that the project defines, name -> flag, in the order of definition."""
    found = {}
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        # A module started by python -m has the program's name here. Libraries define flags too.
        if module == sys.argv[0] or module.partition(".")[0] in _OURS:
            found |= {flag.name: flag for flag in defined}
    return found


def _help(description: str, positional: str) -> str:
    """Return the text of --help: what the command does, and its flags."""
    # A module's docstring is wrapped at 100 columns already.
    lines = [description.strip(), "", "Flags:"]
    if positional:
        lines.insert(0, f"{_program()} [{positional}]\n")
    for name, flag in _own_flags().items():
        lines.append(f"  --{name}: {flag.help}{_default_of(flag)}")
    return "\n".join(lines)


def _default_of(flag: flags.Flag) -> str:
    if _required(flag):
        return " (required)"
    if flag.default in (None, "", False, []):
        return ""
    return f" (default: {flag.default_as_str.strip(chr(39))})"
