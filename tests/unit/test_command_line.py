"""The command line of every command: flags, overrides, and how mistakes and bugs end it."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from dpo_jax import __main__ as dpo_jax_main
from dpo_jax import command_line, device_command
from dpo_jax.command_line import split_overrides
from tests.helpers.paths import ROOT


def dpo_jax(*arguments, cwd=ROOT):
    """Run `python -m dpo_jax ARGUMENTS`."""
    return subprocess.run(
        [sys.executable, "-m", "dpo_jax", *arguments], cwd=cwd, text=True, capture_output=True
    )


def program(body: str, *arguments, config=False):
    """Run a command of the project whose body is given, in a process of its own."""
    source = f"""
import sys
from dpo_jax import command_line, device_command
__package__ = "experiments"
config = command_line.define_config() if {config} else None
def body():
{chr(10).join("    " + line for line in body.splitlines())}
sys.argv[0] = "program"
command_line.run(body, "A program.", config=config)
"""
    return subprocess.run(
        [sys.executable, "-c", source, *arguments], cwd=ROOT, text=True, capture_output=True
    )


def assert_refused(done, *said):
    """One paragraph on stderr, exit status 2, no traceback and no usage text."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    for words in said:
        assert words in done.stderr


@pytest.mark.parametrize(
    ("arguments", "others", "texts"),
    [
        (["--config.dpo.beta=0.5", "--workdir=x"], ["--workdir=x"], {"dpo.beta": "0.5"}),
        (["--config.dpo.beta", "0.5", "--json"], ["--json"], {"dpo.beta": "0.5"}),
        (["-config.data.path=a=b"], [], {"data.path": "a=b"}),
        (["--config.mesh.data", "-1"], [], {"mesh.data": "-1"}),
        (["--config.data.shuffle", "--json"], ["--json"], {"data.shuffle": "True"}),
        (["--noconfig.data.shuffle"], [], {"data.shuffle": "False"}),
        (["--config.run="], [], {"run": ""}),
        (["--config.dpo.beta=1", "--config.dpo.beta=2"], [], {"dpo.beta": "2"}),
        (["--config=toy", "config.x=1"], ["--config=toy", "config.x=1"], {}),
    ],
)
def test_overrides_are_taken_out(arguments, others, texts):
    assert split_overrides(arguments) == (others, texts)


def test_config_is_loaded_with_overrides():
    body = "print(config.load().dpo.beta, config.choice)"
    done = program(body, "--config.dpo.beta=0.5", "--config=toy", config=True)
    assert (done.returncode, done.stdout) == (0, "0.5 toy\n"), done.stderr


@pytest.mark.parametrize(
    ("choice", "folder"),
    [
        ("imdb", "runs/imdb"),
        ("configs/imdb.py", "runs/imdb"),
        ("imdb:ppo", "runs/imdb-ppo"),
        ("/some/where/mine.py:a,b", "runs/mine-a-b"),
    ],
)
def test_the_default_workdir_is_the_configs_name(choice, folder):
    done = program("print(config.default_workdir())", f"--config={choice}", config=True)
    assert done.stdout == f"{folder}\n", done.stderr


@pytest.mark.parametrize(
    "error",
    [
        "ValueError('row 3 is wrong')",
        "RuntimeError('row 3 is wrong')",
        "FileNotFoundError('row 3 is wrong')",
        "FloatingPointError('row 3 is wrong')",
        "ImportError('row 3 is wrong')",
    ],
)
def test_error_for_people(error):
    assert_refused(program(f"raise {error}"), "error: row 3 is wrong\n")
    shown = program(f"raise {error}", "--debug")
    assert shown.returncode == 2 and "Traceback" in shown.stderr
    assert shown.stderr.endswith("error: row 3 is wrong\n")


def test_missing_file():
    assert_refused(program("open('/nowhere/at/all')"), "/nowhere/at/all")


@pytest.mark.parametrize(
    "bug",
    [
        "{}['key']",
        "None.name",
        "int('x')",
        "list(zip([1], [], strict=True))",
        "import numpy as np; np.zeros(2) + np.zeros(3)",
        "assert False",
    ],
)
def test_bug_keeps_traceback(bug):
    done = program(bug)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "This is a bug in dpo_jax" in done.stderr


def test_interrupt_exit_code():
    done = program("raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert program("raise SystemExit(143)").returncode == 143


def test_usage_errors():
    assert_refused(dpo_jax("trian"), "Did you mean dpo-jax train?", "sweep, runs")
    assert_refused(dpo_jax("runs", "a", "b"), "b: expected only flags")
    assert_refused(dpo_jax("runs", "--debg"), "--debg: there is no such flag. Did you mean --debug")
    assert_refused(dpo_jax("runs", "--debug=x"), "--debug=x: expected")
    assert_refused(dpo_jax("runs", "--flagfile=/no/such"), "Unable to open flagfile", "/no/such")
    assert_refused(program("pass", "--conifg=toy", config=True), "Did you mean --config?")
    assert_refused(program("pass", config=True), "--config is required: The config")
    assert_refused(
        program("pass", "--config", config=True), "--config needs a value: --config=VALUE"
    )
    assert_refused(
        dpo_jax("train", "--config=toy", "--workdir"), "--workdir needs a value: --workdir=VALUE"
    )
    assert_refused(
        program("pass", "--config=toy", "config.dpo.beta=0.5", config=True),
        "a flag begins with two dashes. Write --config.dpo.beta=0.5",
    )
    assert_refused(program("pass", "--config.dpo.beta=1"), "this command takes no config")
    load = "config.load()"
    assert_refused(program(load, "--config=tyo", config=True), "toy")
    assert_refused(program(load, "--config=toy", "--config.beta=1", config=True), "dpo.beta")


@pytest.mark.parametrize(
    ("command", "stages", "said"),
    [
        (["train"], "('dpo','foo')", "config.stages = 'foo': expected one of sft, pairs"),
        (
            ["sweep", "--sweep=dpo.beta=1,2"],
            "('sft','dpo')",
            "config.stages = 'sft': expected a stage that this config file has",
        ),
    ],
)
def test_wrong_stages_are_refused(command, stages, said):
    flags = ["--config=dpo", f"--config.stages={stages}", "--workdir=/nowhere/at/all"]
    assert_refused(dpo_jax(*command, *flags), said)


def test_wrong_flags_say_what_is_expected():
    flags = (
        "from absl import flags\n"
        "flags.DEFINE_string('out', None, 'Where the rows go.', required=True)\n"
        "flags.DEFINE_enum('dtype', 'a', ['a', 'b'], 'Kind.')\n"
        "flags.DEFINE_integer('n', None, 'Count.', lower_bound=1)\n"
    )
    source = f"{flags}from dpo_jax import command_line\ncommand_line.run(lambda: None, 'Doc.')"

    def start(*arguments):
        return subprocess.run(
            [sys.executable, "-c", source, *arguments], cwd=ROOT, text=True, capture_output=True
        )

    missing = start()
    assert_refused(missing, "--out is required: Where the rows go.")
    assert "--n" not in missing.stderr
    assert_refused(start("--out=x", "--dtype=c"), "--dtype=c: expected one of a, b")
    assert_refused(start("--out=x", "--n=0"), "--n=0: expected a positive integer")
    assert start("--out=x").returncode == 0


def test_help_lists_commands_and_flags(tmp_path):
    listed = dpo_jax("--help")
    assert listed.returncode == 0
    lines = listed.stdout.splitlines()
    for name in dpo_jax_main.COMMANDS:
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1
    assert dpo_jax().stdout == listed.stdout
    shown = dpo_jax("runs", "--help").stdout
    assert "[WORKDIR]" in shown and "--debug" in shown


def test_help_shows_no_flags_of_libraries():
    shown = dpo_jax("train", "--help").stdout
    found = set(re.findall(r"^  --(\w+)", shown, re.MULTILINE))
    processes = {"coordinator", "num_processes", "process_id"}
    assert found == {"config", "workdir", "push", "allow_change", "rehearse", "debug", *processes}


@pytest.mark.parametrize("command", ["--help", "runs --help"])
def test_a_reader_that_leaves_is_no_error(command):
    line = f"{sys.executable} -m dpo_jax {command} | true"
    for _ in range(3):  # who is first is a matter of chance
        done = subprocess.run(line, shell=True, cwd=ROOT, text=True, capture_output=True)
        assert done.stderr == ""


@pytest.mark.parametrize("name", dpo_jax_main.COMMANDS)
def test_commands_are_modules_with_docstring(name):
    module = dpo_jax_main.MODULES.get(name, name)
    source = pathlib.Path(ROOT / "dpo_jax" / f"{module}.py").read_text()
    assert f"dpo-jax {name}" in source.splitlines()[0]


def test_help_loads_no_jax():
    code = (
        "import sys\nsys.argv = ['dpo-jax', '--help']\nfrom dpo_jax import __main__\n"
        "try:\n    __main__.main()\nexcept SystemExit:\n    sys.exit('jax' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert found.returncode == 0


def test_is_for_people():
    try:
        json.loads("{")
    except ValueError as error:
        assert not command_line.is_for_people(error)
    assert not command_line.is_for_people(ValueError("never raised"))


def test_full_memory_is_explained():
    full = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\n at layer 3"
    message = r"is full \(RESOURCE_EXHAUSTED: .* 9 bytes.\)\. In"
    with pytest.raises(MemoryError, match=message), device_command.explain_full_memory():
        raise jax.errors.JaxRuntimeError(full)
    unknown = pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL")
    with unknown, device_command.explain_full_memory():
        raise jax.errors.JaxRuntimeError("INTERNAL: RESOURCE_EXHAUSTED elsewhere")


def test_full_disk_says_what_to_do():
    done = program("raise OSError(28, 'No space left on device', 'a.jsonl')")
    assert_refused(done, "a.jsonl", "Make room", "run the same command again")


def test_read_only_disk_says_what_to_do():
    done = program("raise OSError(30, 'Read-only file system', 'run/sft')")
    assert_refused(done, "run/sft", "Mount it for writing, or give another folder")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TimeoutError("process 1 did not come"), command_line.TRY_AGAIN),
        (ConnectionRefusedError("no"), command_line.MISTAKE),
        (FileNotFoundError("no"), command_line.MISTAKE),
    ],
)
def test_wait_in_vain_has_a_status_of_its_own(capsys, error, status):
    """75, after which launch files start the command again, as they do not after 2."""
    try:
        raise error
    except OSError as raised:
        assert command_line.report(raised) == (f"error: {error}", status)
    assert capsys.readouterr().err == f"error: {error}\n"
