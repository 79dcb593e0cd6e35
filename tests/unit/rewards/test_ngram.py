"""The n-gram sentiment classifier: labels, windows, and what it learns."""

import json

import numpy as np
import pytest

from dpo_jax.rewards import ngram
from tests.helpers.paths import SHARED, needs_shared

FILLER = [f"w{i}" for i in range(30)]


def write(folder, **splits):
    """A labelled data set of JSON lines, a file for each split."""
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def reviews(count, seed=0):
    """Texts that differ in the order of the same words only, so that nothing but a word pair tells
    their label.
    """
    rng = np.random.default_rng(seed)
    labels = rng.random(count) < 0.5
    texts = [
        " ".join(
            [
                *rng.choice(FILLER, 3),
                "good not bad" if label else "bad not good",
                *rng.choice(FILLER, 3),
            ]
        )
        for label in labels
    ]
    return texts, labels


def test_labelled_leaves_out_unlabelled(tmp_path):
    path = write(
        tmp_path,
        train=[
            dict(text="so<br /><br />good", label=1),
            dict(text="?", label=-1),
            dict(text="bad", label=0),
        ],
    )
    texts, labels = ngram.labelled(path, "train")
    assert [text.split() for text in texts] == [["so", "good"], ["bad"]]
    np.testing.assert_array_equal(labels, [True, False])


@pytest.mark.parametrize(
    "split, rows, message",
    [
        ("test", [dict(text="good", label=1)], "no split 'test' of labelled texts; it has train"),
        (
            "train",
            [dict(text="good", label=1), dict(text="bad", label=7)],
            "label 7; expected 'text' and 'label'",
        ),
        ("train", [dict(review="good", label=1)], "has the fields review, label"),
        (
            "train",
            [dict(text="good", label=1), dict(text="?", label=-1)],
            "all alike; both kinds are needed",
        ),
    ],
)
def test_labelled_refuses_other_data(tmp_path, split, rows, message):
    with pytest.raises(ValueError, match=message):
        ngram.labelled(write(tmp_path, train=rows), split)


@pytest.mark.parametrize(
    "words, sizes",
    [(0, [0]), (59, [59]), (60, [60]), (119, [119]), (120, [60, 60]), (200, [60, 60, 80])],
)
def test_windows_part_text(words, sizes):
    """Every word is in one window, in order, and each has the text's label."""
    text = " ".join(str(i) for i in range(words))
    pieces, labels = ngram.windows([text, "other"], np.array([True, False]))
    assert [len(piece.split()) for piece in pieces] == [*sizes, 1]
    assert " ".join(pieces[:-1]) == text
    np.testing.assert_array_equal(labels, [True] * len(sizes) + [False])


def test_fit_learns_word_pairs():
    predict, (texts, labels) = ngram.fit(*reviews(300)), reviews(100, seed=1)
    together = predict(texts)
    assert together.dtype == np.float64
    assert (
        ngram.accuracy(predict, texts, labels) == 1 and ngram.accuracy(predict, texts, ~labels) == 0
    )
    np.testing.assert_array_equal(predict(texts[::-1])[::-1], together)
    assert [predict([text])[0] for text in texts[:5]] == together[:5].tolist()
    np.testing.assert_array_equal(
        predict([text.replace(" ", "<br />") for text in texts]), together
    )
    assert predict([]).shape == (0,)


def test_fit_is_deterministic():
    texts, _ = reviews(50, seed=1)
    np.testing.assert_array_equal(ngram.fit(*reviews(300))(texts), ngram.fit(*reviews(300))(texts))


def test_fitted_once_with_accuracy(tmp_path, capsys):
    def rows(seed):
        return [
            dict(text=text, label=int(label))
            for text, label in zip(*reviews(200, seed), strict=True)
        ]

    path = write(tmp_path, train=rows(0), test=rows(1))
    predict = ngram.fitted(path)
    assert "test accuracy 1.000 on whole texts, 1.000 on 60-word windows" in capsys.readouterr().out
    assert ngram.fitted(path) is predict and capsys.readouterr().out == ""
    texts, _ = reviews(20, seed=2)
    np.testing.assert_array_equal(predict(texts), ngram.fit(*reviews(200))(texts))


@needs_shared
def test_fit_real_reviews():
    """Fitted to 1,500 reviews, and tested on other 1,000."""
    texts, labels = ngram.labelled(str(SHARED / "imdb" / "plain_text"), "train")
    assert len(texts) == 25_000 and labels.mean() == 0.5
    picked = np.random.default_rng(0).permutation(len(texts))[:2500]
    train, test = (
        ([texts[row] for row in rows], labels[rows]) for rows in (picked[:1500], picked[1500:])
    )
    predict = ngram.fit(*train)
    assert ngram.accuracy(predict, *test) > 0.8
    assert ngram.accuracy(predict, *ngram.windows(*test)) > 0.68
