"""The README is a contract: its commands and its table hold."""

import re
import shlex

import pytest

from experiments.commands import load_module, parsed
from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text()
LAUNCH = (ROOT / "launch.sh").read_text()
CONFIG = (ROOT / "dpo_jax" / "config.py").read_text()


def test_the_two_commands_are_there():
    assert (
        "pip install -r requirements.txt && python -m dpo_jax.train --config=configs/toy.py --workdir=runs/toy\n"
        in README
    )
    assert "pip install -r requirements.txt -r requirements-dev.txt && python -m pytest\n" in README


def test_the_config_table_says_what_the_config_does():
    fields = re.findall(r"^ {4,8}(?:config\.)?(\w+) ?= ?(.+?),?  # (.+)$", CONFIG, re.M)
    assert len(fields) > 45
    for name, default, comment in fields:
        rows = [line for line in README.splitlines() if re.match(rf"\| `(\w+\.)*{name}`", line)]
        row = next((line for line in rows if comment in line), "")
        assert row, f"{name}: {comment}"
        assert default in row or name == "stages", f"{name} = {default}: {row}"


def test_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.+?)\)", README):
        assert (ROOT / path).exists(), path


def commands() -> list[str]:
    """Every line of the README's code blocks that starts one of the project's commands, continued
    lines joined.
    """
    blocks = re.findall(r"^```\n(.*?)^```$", README, re.M | re.S)
    lines = [line for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    return [
        line
        for line in lines
        if "python -m dpo_jax" in line or "python -m exp" in line or "launch.sh" in line
    ]


@pytest.mark.parametrize("line", commands())
def test_a_command_has_the_flags_and_the_fields_that_it_is_shown_with(line):
    words = shlex.split(line.rpartition("&& ")[2], comments=True)
    launched = "experiments.sweep" if "sweep" in words else "dpo_jax.train"
    module = words[words.index("-m") + 1] if "-m" in words else launched
    path = ROOT / module.replace(".", "/")
    source = (
        path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__main__.py"
    ).read_text()
    for name in (
        "experiments/winrate",
        "dpo_jax/evaluation/judge",
        "dpo_jax/parallel/processes",
        "dpo_jax/parallel/sharding",
    ):
        if re.search(rf"import .*\b{name.rpartition('/')[2]}\b", source):  # whose flags it has too
            source += (ROOT / f"{name}.py").read_text()
    config = next(
        (load_config(word.partition("=")[2]) for word in words if word.startswith("--config=")),
        None,
    )
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if name.startswith("config."):
            config.update_from_flattened_dict(
                {name.removeprefix("config."): parsed(value)}
            )  # KeyError: no such field
        elif word.startswith("--") and not (
            "launch.sh" in line and re.search(rf" --{name}(=\*)?\)", LAUNCH)
        ):
            assert f'"{name}"' in source, f"{module} has no --{name}"


def load_config(path: str):
    file, _, choice = path.partition(":")
    module = load_module(str(ROOT / file))
    return module.get_config(*filter(None, [choice])).lock()
