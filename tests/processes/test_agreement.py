"""Two processes whose settings or files differ stop before the first step, and say in what."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from dpo_jax.workdir import read_lines
from tests.helpers.paths import ROOT
from tests.helpers.tiny_runs import (
    environment,
    free_port,
    score_file,
    write_model,
    write_pairs,
)


@pytest.fixture(scope="module")
def said(model, tmp_path_factory):
    """Case of `differing.py` -> what the two processes raise."""
    folder = tmp_path_factory.mktemp("hosts")
    for number in range(2):
        host = folder / str(number)
        host.mkdir()
        shutil.copytree(model, host / "equal")
        write_model(host / "model", scale=4 + number)
        write_pairs(host / "same.jsonl")
        write_pairs(host / "pairs.jsonl", seed=number)
    address = f"localhost:{free_port()}"
    command = [sys.executable, "-m", "tests.helpers.differing", str(folder), address]
    both = [
        subprocess.Popen([*command, str(number)], cwd=ROOT, env=environment(), text=True)
        for number in range(2)
    ]
    assert [process.wait(timeout=200) for process in both] == [0, 0]
    first, second = (json.loads((folder / f"{number}.json").read_text()) for number in range(2))
    # Process 0 speaks for both.
    caches = first.pop("caches")
    assert second.pop("caches") == ""
    assert first == second
    assert_scores(folder / "scored.jsonl", model, folder / "0" / "same.jsonl")
    return first | dict(caches=caches)


def assert_scores(found, model, data):
    """Of two processes as of one."""
    wanted = found.with_name("alone.jsonl")
    score_file(model, data, wanted)
    for row, want in zip(read_lines(found), read_lines(wanted), strict=True):
        assert row.keys() == want.keys()
        for name in ("logp_chosen", "logp_rejected"):
            assert row[name] == pytest.approx(want[name], rel=1e-5)


@pytest.mark.parametrize(
    "case, expected",
    [
        ("config", r"config.dpo.lr: 0.2 in process 1 on \S+, but 0.1 in process 0 on \S+\. "),
        ("config", "Also different: config.mesh.tensor. All processes must have the same. Start"),
        (
            "rows",
            r"config.data: pairs.jsonl, train: '49 rows, tokens of sha256 \w{16}' in process 1 on "
            r"\S+, but '44 rows, tokens of sha256 \w{16}' in process 0 on ",
        ),
        ("weights", r"model: model.safetensors: 'sha256 \w{16}' in process 1 on \S+, but 'sha256 "),
        ("prompts", "config.data: pairs.jsonl, train: '"),
        ("sample", "--prompts=pairs.jsonl: '60 rows, sha256 "),
        ("score", "--data=pairs.jsonl, pairs: '60 pairs, tokens of sha256 "),
        ("copies", "^$"),
        ("scores", "^$"),
        (
            "caches",
            r"^warning: compiled programs are kept by process 0 alone, in its own \S+/0, so ",
        ),
        ("one cache", "^$"),
        ("no cache", "^$"),
    ],
)
def test_what_differs_is_named(said, case, expected):
    assert re.search(expected, said[case]), said[case]
