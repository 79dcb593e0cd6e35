"""`dpo-jax data` as a user runs it: in a process of its own, on files, with a real tokenizer."""

import json
import os
import random
import re
import shlex
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT, STORIES, python_path
from tests.helpers.rows import write_jsonl

NAMES = ["Lily", "Tom", "Mia", "Ben", "Sue", "Max"]
THINGS = ["a red ball", "a big dog", "a small boat", "her old hat", "the blue bird"]
DEEDS = ["smiled and ran home", "was very happy", "gave it to a friend", "went to the park to play"]
FIRST = dict(
    prompt="Once upon a time, there was a girl named Lily. She",
    chosen=" loved to play outside in the park.",
    rejected=" loved to eat cars and stones.",
)


def stories(count: int, seed: int) -> list[dict]:
    """Return pairs: beginnings of stories of a few to many sentences, and how they go on."""
    rng = random.Random(seed)

    def sentence(name):
        return f" {name} saw {rng.choice(THINGS)} and {rng.choice(DEEDS)}."

    rows = []
    for _ in range(count):
        name = rng.choice(NAMES)
        prompt = f"Once upon a time, there was a child named {name}."
        for _ in range(1 + int(rng.expovariate(0.2))):
            prompt += sentence(name)
        chosen = "".join(sentence(name) for _ in range(rng.randint(1, 5)))
        rejected = "".join(sentence(name) for _ in range(rng.randint(1, 4)))
        rows.append(dict(prompt=prompt, chosen=chosen, rejected=rejected))
    return rows


def run(folder, *arguments) -> subprocess.CompletedProcess:
    """Run `python -m dpo_jax.data ARGUMENTS` in a folder, where MODEL is a model."""
    return subprocess.run(
        [sys.executable, "-m", "dpo_jax.data", *arguments],
        cwd=folder,
        text=True,
        capture_output=True,
        # A program that is on no terminal, and no accelerator: a look needs neither.
        env=os.environ | dict(PYTHONPATH=python_path(ROOT), JAX_PLATFORMS="nonesuch"),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model and with pairs in two splits, of which some are bad."""
    folder = tmp_path_factory.mktemp("look")
    (folder / "MODEL").symlink_to(STORIES)
    train = [FIRST, *stories(600, seed=0)]
    train[41]["rejected"] = train[41]["chosen"]
    train[97]["chosen"] = " "
    train += train[:12]
    write_jsonl(folder / "PAIRS" / "train.jsonl", train)
    write_jsonl(folder / "PAIRS" / "test.jsonl", stories(40, seed=1))
    return folder


def test_page_shows_what_the_command_prints(folder):
    page = (ROOT / "docs" / "data.md").read_text()
    section = re.search(r"^## Look at it first\n(.*?)^## ", page, re.M | re.S)[1]
    command, output = re.findall(r"^```\n(.*?)^```$", section, re.M | re.S)
    program, name, *arguments = shlex.split(command)
    assert (program, name) == ("dpo-jax", "data")
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == output


def test_recommended_command_runs(folder):
    """It needs nothing else, and its run counts what the look has counted."""
    write_jsonl(folder / "FEW.jsonl", stories(20, seed=2))
    limits = ("--max_length=128", "--max_prompt_length=64")
    looked = run(folder, "FEW.jsonl", "--model=MODEL", *limits, "--json=found.json")
    assert looked.returncode == 0, looked.stderr
    found = json.loads((folder / "found.json").read_text())
    assert found["ledger"]["train"]["prompts_truncated"]
    assert found["command"] in " ".join(looked.stdout.replace("\\\n", " ").split())
    python, *words = shlex.split(found["command"])
    assert python == "python"
    trained = subprocess.run(
        [sys.executable, *words, "--workdir=run"],
        cwd=folder,
        text=True,
        capture_output=True,
        env=os.environ | dict(PYTHONPATH=python_path(ROOT)),
    )
    assert trained.returncode == 0, trained.stderr
    (kept,) = folder.glob("run/*/ledger.json")
    ledger = json.loads(kept.read_text())
    assert {split: ledger[split] for split in ("train", "eval")} == {
        split: found["ledger"][split] for split in ("train", "eval")
    }


def test_bad_rows_may_be_dropped(folder):
    """With the flag that `score` has, too."""
    write_jsonl(folder / "BAD.jsonl", [*stories(20, seed=3), dict(prompt="Once", chosen=3)])
    done = run(folder, "BAD.jsonl", "--on_bad_row=drop", "--config.data.max_dropped=0.1")
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.replace("\\\n", " ").split())
    assert "--config.data.on_bad_row=drop" in told and "training would stop" not in told


def test_errors_are_a_paragraph(folder):
    for arguments, said in [
        (("nosuch.jsonl",), "nosuch.jsonl"),
        ((), "give the PATH"),
        (("PAIRS", "--model=PAIRS"), "tokenizer"),
        (("PAIRS", "--source=hhh"), "data.source"),
        (("PAIRS", "--max_rows=many"), "data.max_rows=many"),
        (("PAIRS", "--config.data.colour=red"), "data.colour"),
        (("PAIRS", "--columns=prompt=question"), "question"),
    ]:
        done = run(folder, *arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
        assert said in done.stderr, arguments


def test_look_at_texts_loads_no_jax(folder):
    code = (
        "import sys\nsys.argv = ['dpo-jax', 'data', 'PAIRS']\nfrom dpo_jax import __main__\n"
        "try:\n    __main__.main()\nexcept SystemExit:\n    sys.exit('jax' in sys.modules)"
    )
    env = os.environ | dict(PYTHONPATH=python_path(ROOT))
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
