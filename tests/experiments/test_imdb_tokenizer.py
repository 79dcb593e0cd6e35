"""The tokenizer of the small IMDb run: its training reviews, size and format."""

import json
import subprocess
import sys

import pytest

from configs import imdb_small
from dpo_jax.data import tokenizer as tokenizers
from experiments import imdb_tokenizer
from tests.helpers.paths import ROOT, SHARED, needs_shared

REVIEWS = {
    "train": [
        "A splendid film.<br /><br />Truly splendid acting, I'd say.",
        " It's 10/10: splendid!\n",
    ],
    "unsupervised": ["The plot was splendid nonsense<br>and the acting was not."],
    "test": ["Zebra zebra zebra zebra zebra zebra zebra zebra."],
}
CLEAN = [
    "A splendid film.\n\nTruly splendid acting, I'd say.",
    "It's 10/10: splendid!",
    "The plot was splendid nonsense\nand the acting was not.",
]
HARD = ["", " two  spaces\n\n\tand a tab ", "naïve café 電影 😀 \x00", "I'd've 1990s ...!?"]
PIECES = 280  # the end, 256 bytes, 23 merges
FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reviews")
    for split, texts in REVIEWS.items():
        rows = [json.dumps(dict(text=text, label=-1)) + "\n" for text in texts]
        (folder / f"{split}.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a tokenizer trained on CLEAN."""
    folder = tmp_path_factory.mktemp("tokenizer")
    imdb_tokenizer.train(CLEAN, PIECES).save_pretrained(folder)
    return folder


def run_command(*args):
    return subprocess.run(
        [sys.executable, "-m", "experiments.imdb_tokenizer", *args],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )


def test_reviews_of_train_and_unsupervised(reviews):
    assert list(imdb_tokenizer.reviews(str(reviews))) == CLEAN


def test_command_is_deterministic(reviews, saved, tmp_path):
    out = tmp_path / "out"
    args = f"--data={reviews}", f"--out={out}", f"--pieces={PIECES}"
    ran = run_command(*args)
    assert ran.stdout == f"{PIECES} pieces in {out}\n", ran.stderr
    written = {name: (out / name).read_bytes() for name in FILES}
    assert written == {name: (saved / name).read_bytes() for name in FILES}
    again = run_command(*args)
    assert again.returncode and "exists: give another name, or remove it" in again.stderr


def test_tokenizer_size_and_special_tokens(saved):
    tokenizer = tokenizers.load(saved)
    scratch = imdb_small.get_config().model.scratch
    assert len(tokenizer) == PIECES
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert (
        (tokenizer.bos_token_id, tokenizer.eos_token_id)
        == (scratch.bos_token_id, scratch.eos_token_id)
        == (0, 0)
    )
    assert tokenizer("It's").input_ids[0] != 0  # no BOS before a text, as GPT-2's
    assert tokenizer("It's<|endoftext|>").input_ids == [*tokenizer("It's").input_ids, 0]


def test_tokenizer_round_trip(saved):
    tokenizer = tokenizers.load(saved)
    for text in (*CLEAN, *HARD, *REVIEWS["test"]):
        ids = tokenizer(text).input_ids
        assert 0 not in ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer(" splendid").input_ids) == 1  # five times in CLEAN, so merged whole
    assert len(tokenizer(" zebra").input_ids) > 3  # in the test split alone


@needs_shared
def test_tokenizer_splits_as_gpt2():
    ours, gpt2 = imdb_tokenizer.train(CLEAN, PIECES), tokenizers.load(SHARED / "gpt2-tokenizer")
    for text in (*CLEAN, *HARD):
        assert ours.backend_tokenizer.pre_tokenizer.pre_tokenize_str(
            text
        ) == gpt2.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
