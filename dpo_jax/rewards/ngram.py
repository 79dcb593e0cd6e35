"""A sentiment classifier of word n-grams: a reward where no trained one can be downloaded.

It is TF-IDF of words and word pairs with a logistic regression, fitted to labelled texts. It is
asked about the starts of texts, so it is fitted to windows of WINDOW words as well as to whole
texts. Fitting takes about a minute for IMDb's 25,000 reviews and gives the same model each time, so
nothing is stored.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable

import numpy as np

from dpo_jax.console import say
from dpo_jax.data import readers
from dpo_jax.parallel import agreement

WINDOW = 60  # words
TRAIN = "train"
TEST = "test"


def labelled(path: str, split: str) -> tuple[list[str], np.ndarray]:
    """Return the texts of a split and whether each is positive, without unlabelled rows (-1).

    Raises ValueError with what was found where there is no such split, or no label of either kind.
    """
    splits = readers.find_splits(path)
    if split not in splits:
        raise ValueError(
            f"{path} has no split {split!r} of labelled texts; it has {', '.join(splits)}."
        )
    rows = [readers.fields_of(record) for _, record in splits[split]()]
    for row in rows:
        if "text" not in row or row.get("label") not in (-1, 0, 1):
            raise ValueError(
                f"{path}: a row of {split!r} has the fields {', '.join(row)} and label "
                f"{row.get('label')!r}; expected 'text' and 'label', 1 (positive), 0 or -1 (none)."
            )
    # IMDb has unlabelled reviews too, marked -1.
    kept = [row for row in rows if row["label"] >= 0]
    labels = np.array([row["label"] for row in kept], bool)
    if not labels.any() or labels.all():
        raise ValueError(f"{path}: the labels of {split!r} are all alike; both kinds are needed.")
    return [clean(row["text"]) for row in kept], labels


def clean(text: str) -> str:
    """Return the text without the line breaks of HTML, which IMDb's reviews have."""
    return re.sub(r"<br\s*/?>", " ", text)


def windows(texts: list[str], labels: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return pieces of WINDOW words of each text, with its label; the last may be longer."""
    pieces = []
    of_pieces = []
    for text, label in zip(texts, labels, strict=True):
        words = text.split()
        starts = range(0, max(len(words) - WINDOW, 0) + 1, WINDOW)
        for start in starts:
            # The last takes what is left: a few words alone would say little.
            end = len(words) if start == starts[-1] else start + WINDOW
            pieces.append(" ".join(words[start:end]))
            of_pieces.append(label)
    return pieces, np.array(of_pieces)


def fit(texts: list[str], labels: np.ndarray) -> Callable:
    """Return a function from texts to the probability that each is positive, float64 [n]."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            "config.reward.kind='ngram' needs scikit-learn, which is an extra: "
            'pip install "dpo_jax[ngram]" (or pip install scikit-learn).'
        ) from error

    pieces, of_pieces = windows(texts, labels)
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2),
        min_df=5,
        sublinear_tf=True,
        dtype=np.float32,
        token_pattern=r"\b\w[\w']*\b",
    )
    features = vectorizer.fit_transform([*texts, *pieces])
    classifier = LogisticRegression(C=4.0, max_iter=200).fit(features, [*labels, *of_pieces])
    positive = list(classifier.classes_).index(True)

    def predict(texts: list[str]) -> np.ndarray:
        if not texts:
            return np.zeros(0)
        found = classifier.predict_proba(vectorizer.transform([clean(text) for text in texts]))
        return found[:, positive].astype(np.float64)

    return predict


def accuracy(predict: Callable, texts: list[str], labels: np.ndarray) -> float:
    """Return the share of texts that a threshold of 1/2 classifies as their label says."""
    return float(((predict(texts) > 0.5) == labels).mean())


@functools.cache
def fitted(path: str) -> Callable:
    """Return the classifier of a labelled data set, a folder or hub name; show its test accuracy.

    It is fitted once in a process.
    """
    texts, labels = labelled(path, TRAIN)

    def fingerprint():
        digest = hashlib.sha256(json.dumps([texts, labels.tolist()]).encode()).hexdigest()
        counted = f"{len(texts):,} texts, sha256 {digest[:16]}"
        return {f"config.reward.path={path}, {TRAIN}": counted}

    agreement.check_same(fingerprint, agreement.SAME_FILES)
    predict = fit(texts, labels)
    if TEST in readers.find_splits(path):
        whole = labelled(path, TEST)
        say(
            f"ngram reward: test accuracy {accuracy(predict, *whole):.3f} on whole texts, "
            f"{accuracy(predict, *windows(*whole)):.3f} on {WINDOW}-word windows"
        )
    return predict
