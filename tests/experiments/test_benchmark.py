"""The benchmark: equal inputs for both sides, checks and reports; slow: real runs of it."""

import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.benchmark import growth, ours, report, side_by_side, work
from experiments.benchmark.worker import Worker, peak_resident_bytes
from tests.helpers.paths import ROOT

TUNIX_LACKS = "without --cached; it computes in its weights' own dtype"


@pytest.mark.parametrize(
    "shape, prompt, response",
    [
        ("tldr", (380, 100, 512), (50, 10, 100)),
        ("imdb", (6, 4, 8), (60, 60, 60)),
        ("hh", (112, 12, 384), (43, 2, 128)),
    ],
)
def test_rows_have_stated_lengths(shape, prompt, response):
    for lengths, (mean, least, most) in zip(
        work.lengths(shape, 4000, 3), (prompt, response), strict=True
    ):
        assert abs(lengths.mean() - mean) < 0.05 * mean
        assert least <= lengths.min() and lengths.max() <= most
    prompt_G, response_GR = work.lengths(shape, 40, 3)
    assert prompt_G.shape == (40,) and response_GR.shape == (40, 3)
    np.testing.assert_array_equal(response_GR, work.lengths(shape, 40, 3)[1])


def test_sides_read_equal_tokens():
    words = work._tokenizer(300)
    prompt_G, response_G3 = np.array([5, 1]), np.array([[3, 9, 7], [2, 4, 8]])
    lines = work._rows(np.random.default_rng(0), prompt_G, response_G3, 2, 300)
    # The best response, the first, is preferred to both others.
    expected = [(5, 3, 9), (5, 3, 7), (1, 2, 4), (1, 2, 8)]
    for line, (prompt, *responses) in zip(lines, expected, strict=True):
        row = json.loads(line)
        assert len(words(row["prompt"]).input_ids) == prompt
        for side, count in zip(("chosen", "rejected"), responses, strict=True):
            # END as the peer adds it: glued to the end.
            ids = words(row["prompt"] + row[side] + work.END).input_ids
            assert len(ids) == prompt + count and ids[-1] == 0 and 0 not in ids[:-1]


def test_pairs_of_a_prompt():
    assert work.pairs_of_prompt(2, 1) == [(0, 1)]
    assert work.pairs_of_prompt(5, 4) == [(0, 1), (0, 2), (0, 3), (0, 4)]
    assert work.pairs_of_prompt(4, 6) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    with pytest.raises(ValueError, match="4 responses make at most 6 pairs, and 3 are needed"):
        work.pairs_of_prompt(4, 7)
    with pytest.raises(ValueError, match="and 4 are needed so that each response is in one"):
        work.pairs_of_prompt(5, 3)


def test_pairs_of_a_prompt_share_it(tmp_path):
    told = work.Work(pairs=12, steps=1, cached=False, dtype="float32")
    prompt_G, response_GR = work.lengths("imdb", 2, 4)
    work.write(tmp_path, told, work.MODELS["smoke"], prompt_G, response_GR, pairs_per_prompt=6)
    rows = work.read_rows(tmp_path, told)
    assert len({row["prompt"] for row in rows[:6]}) == 1
    assert len({row[side] for row in rows[:6] for side in ("chosen", "rejected")}) == 4

    shared = ours.Trainer(tmp_path, told)
    plain = ours.Trainer(tmp_path, told, share=False)
    assert shared.batches.tokens(0) == prompt_G.sum() + 8 * 60
    assert plain.batches.tokens(0) == 12 * prompt_G.sum() + 24 * 60
    assert shared.steps(1)["losses"] == pytest.approx(plain.steps(1)["losses"], abs=1e-6)
    for of_shared, of_plain in zip(
        jax.tree.leaves(shared.state.params), jax.tree.leaves(plain.state.params), strict=True
    ):
        np.testing.assert_allclose(of_shared, of_plain, atol=1e-5)


def test_losses_must_agree():
    moved = [report.START, 0.71, 0.68]
    assert "1.0e-04 apart" in report.check_losses(
        dict(ours=moved, trl=[report.START, 0.71, 0.6801]), "float32"
    )
    for other in ([report.START, 0.71, 0.69], [report.START, 0.71, math.nan]):
        with pytest.raises(
            ValueError, match="do not do the same work: losses of ours: .*; of trl: "
        ):
            report.check_losses(dict(ours=moved, trl=other), "float32")
    with pytest.raises(ValueError, match="stay at log 2"):
        report.check_losses(dict(ours=[report.START] * 3, trl=[report.START] * 3), "float32")


def test_report_of_medians_and_ratios():
    found = report.summary(
        dict(ours=[2.0, 4.0, 1.0], plain=[4.0, 12.0, 1.5], trl=[8.0, 40.0, 6.0]),
        pairs=16,
        tokens=[400, 800, 100],
        flops=[10, 20, 30],
        ceiling=100.0,
        peak_bytes=dict(ours=1 << 30, plain=2 << 30, trl=4 << 30),
    )
    assert found["ours"]["pairs_per_second"] == 8 and found["trl"]["pairs_per_second"] == 2
    assert found["ours"]["tokens_per_second"] == 200  # of 200, 200 and 100
    assert found["ours"]["ceiling_share"] == 0.05 and found["ours"]["spread"]["ceiling_share"] == [
        0.05,
        0.3,
    ]
    assert found["ratios"] == dict(
        plain=dict(pairs_per_second=2, spread=[1.5, 3], peak_bytes=0.5),
        trl=dict(pairs_per_second=6, spread=[4, 10], peak_bytes=0.25),
    )
    assert found["ours"].keys() >= {
        "pairs_per_second",
        "tokens_per_second",
        "peak_bytes",
        "ceiling_share",
    }
    table = report.table(found, ["ours", "plain", "trl"])
    assert (
        "8 (4 to 16)" in table
        and "6.00 (4.00 to 10.00) times the pairs of trl with 0.25 of its memory" in table
    )
    alone = report.summary(
        dict(ours=[2.0]), pairs=1, tokens=[1], flops=[1], peak_bytes=dict(ours=1), ceiling=1.0
    )
    assert alone["ratios"] == {} and len(report.table(alone, ["ours"]).splitlines()) == 2


def test_failed_worker_is_reported(tmp_path):
    worker = Worker("nobody", sys.executable, tmp_path)
    with pytest.raises(
        RuntimeError, match="'nobody' ended with code 1, asked for 'about':\n.*nobody"
    ):
        worker.ask("about")


def test_peak_memory_by_hand():
    before = peak_resident_bytes()
    held = np.ones(max(before, 100 << 20) // 8)
    assert peak_resident_bytes() > before + held.nbytes // 4
    del held
    assert peak_resident_bytes() > before


def test_growth_is_measured_and_drawn(tmp_path):
    assert {pairs * length for line, pairs, length in growth.points() if line == "length"} == {4096}
    row = growth.measure(work.MODELS["smoke"], 2, 64, "float32")
    assert row["tokens"] == 2 * (48 + 2 * 16) and row["least"] <= row["seconds"] <= row["most"]
    rows = [
        dict(row, line=line, pairs=pairs, length=length) for line, pairs, length in growth.points()
    ]
    assert [line.split()[:3] for line in growth.table(rows).splitlines()[1:]] == [
        [line, str(pairs), str(length)] for line, pairs, length in growth.points()
    ]
    growth.draw(tmp_path / "growth.png", rows, "a step")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_side_by_side_equals_in_turn():
    found = side_by_side.measure(work.MODELS["smoke"], "imdb", rounds=1, steps=2)
    assert found["largest_difference"] < 1e-4 and len(found["ratio"]) == 1
    assert found["temporary_bytes"]["side_by_side"] > found["temporary_bytes"]["in_turn"]
    assert side_by_side.table(found).splitlines()[0].startswith("4 policies")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--peer=tunix", "--cached", "--model=llama-tiny"], TUNIX_LACKS),
        (["--peer=tunix", "--model=gpt2-tiny"], TUNIX_LACKS),
        (["--peer=tunix", "--model=llama-tiny", "--dtype=bfloat16"], TUNIX_LACKS),
        (["--peer=none", "--compiled"], "--compiled is for --peer=trl"),
        (["--pairs_per_prompt=6", "--responses=3"], "3 responses make at most 3 pairs"),
        (["--pairs_per_prompt=6", "--responses=4", "--pairs=8"], "takes a multiple of"),
    ],
)
def test_flags_that_are_refused(flags, message):
    shown = subprocess.run(
        [sys.executable, "-m", "experiments.benchmark", *flags],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert shown.returncode and message in shown.stdout + shown.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    "TUNIX_PYTHON" not in os.environ,
    reason="needs a Python with Tunix, whose path is in TUNIX_PYTHON",
)
def test_tunix_agrees(tmp_path):
    file = tmp_path / "report.json"
    shown = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.benchmark",
            "--peer=tunix",
            "--model=smoke-llama",
            f"--peer_python={os.environ['TUNIX_PYTHON']}",
            "--shape=hh",
            "--pairs=3",
            "--rounds=1",
            "--steps=2",
            f"--json={file}",
        ],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert (
        json.loads(file.read_text())["ratios"]["tunix"]["pairs_per_second"] > 0
        and "of tunix: 0.69315" in shown.stdout
    )


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_trl_agrees(tmp_path, cached):
    pytest.importorskip("trl", reason="the peer is TRL")
    file = tmp_path / "report.json"
    command = [
        sys.executable,
        "-m",
        "experiments.benchmark",
        "--model=smoke",
        "--shape=hh",
        "--pairs=6",
        "--pairs_per_prompt=3",
        "--responses=3",
        "--rounds=1",
        "--steps=2",
        "--plain",
        f"--cached={cached}",
        f"--json={file}",
        "--stages",
    ]
    shown = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(file.read_text())
    assert all(
        found[side][name] > 0
        for side in ("ours", "plain", "trl")
        for name in ("pairs_per_second", "tokens_per_second", "peak_bytes", "ceiling_share")
    )
    for side in ("plain", "trl"):
        assert found["ratios"][side]["pairs_per_second"] == pytest.approx(
            found["ours"]["pairs_per_second"] / found[side]["pairs_per_second"]
        )
    tokens, apart = (
        found["about"]["ours"][name] for name in ("tokens_per_step", "tokens_per_step_apart")
    )
    assert tokens < apart
    assert ("reference" in found["stages"]) is not cached
    assert "tolerance" in found["losses"] and "times the pairs of trl" in shown.stdout
    again = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert (
        again.returncode
        and "exists" in again.stderr + again.stdout
        and json.loads(file.read_text()) == found
    )
