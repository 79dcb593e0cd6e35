"""Fields of config.data as flags, and --date: parsed as the config parses them."""

import datetime
import subprocess
import sys

import pytest

from dpo_jax import data_flags
from tests.helpers.paths import ROOT

PROGRAM = """
import sys
from dpo_jax import command_line, data_flags
__package__ = "experiments"
settings = data_flags.define("max_length", "template", "ignore", "append_eos", truncate="keep_end")
date, split = data_flags.define_date(), data_flags.define_split()
sys.argv[0] = "program"
command_line.run(lambda: print([settings(), date.value, split.value]), "A program.")
"""


def program(*arguments):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, text=True, capture_output=True
    )


def values(*arguments):
    done = program(*arguments)
    assert done.returncode == 0, done.stderr
    return eval(done.stdout, dict(datetime=datetime))


def test_flags_have_the_defaults_of_the_config():
    settings, date, split = values()
    assert settings == dict(
        max_length=512, template={}, ignore=(), append_eos=True, truncate="keep_end"
    )
    assert date is None and split == ""


def test_flags_take_the_types_of_the_config():
    settings, date, split = values(
        "--max_length=64",
        "--template=enable_thinking=False,date_string=26 Jul 2024",
        "--ignore=name,tools",
        "--noappend_eos",
        "--truncate=keep_start",
        "--date=2026-11-26",
        "--split=raw",
    )
    assert settings == dict(
        max_length=64,
        template=dict(enable_thinking=False, date_string="26 Jul 2024"),
        ignore=("name", "tools"),
        append_eos=False,
        truncate="keep_start",
    )
    assert date == datetime.date(2026, 11, 26) and split == "raw"


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--template=loud", "expected NAME=VALUE, several with commas between them, or a dict"),
        ("--date=tomorrow", "expected a day such as 2026-11-26"),
        ("--truncate=middle", "expected one of auto, keep_start, keep_end, keep_cue"),
        ("--max_length=long", "expected an integer"),
    ],
)
def test_flags_refuse_other_types(flag, said):
    done = program(flag)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {flag}: {said}"), done.stderr


def test_options_of_the_template_are_named_as_the_flag_takes_them():
    names = ["template", "ignore"]
    advice = "pass --config.data.template.enable_thinking=True, or --config.data.ignore=tools"
    expected = "pass --template=enable_thinking=True, or --ignore=tools"
    assert data_flags.in_flags(advice, names, "data") == expected
    # What a row says stays.
    assert data_flags.in_flags("found {'data.path': 1}", names, "data") == "found {'data.path': 1}"
