"""Unpaired rows, KTO's: a completion and whether it is desirable."""

import csv
import hashlib
import json

import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax.data import dataset
from dpo_jax.data.examples import Examples
from dpo_jax.data.ledger import Counts
from tests.helpers.chat_tokenizers import make_tokenizer
from tests.helpers.rows import assistant, user, write_jsonl

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LABELS = [True, 1, "true", "1.0", "yes", "False", 0, 0.0, "0"]


def chatml():
    return make_tokenizer(CHATML, "<|im_end|>")


def load(path, tokenizer, kind, **changes):
    """Read, tokenise and check a data set as a run does."""
    data = configs.default(("kto",)).data
    data.update({"path": str(path), "max_length": 4000, "eval_fraction": 0.0} | changes)
    return dataset.load(data, tokenizer, kind)


def shown(example, tokenizer):
    """The prompt, and the completion with what is trained on between marks."""
    found = []
    for runs in dataset.decoded(example, tokenizer):
        found.append("".join(f"⟦{text}⟧" if marked else text for text, marked in runs))
    return tuple(found)


def row(label, number=0):
    return {"prompt": f"Q{number}:", "completion": f" A{number}.", "label": label}


def test_labels_are_truths_numbers_or_their_texts(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", map(row, LABELS, range(len(LABELS))))
    data = load(path, chatml(), "unpaired")
    assert data.train.labels.tolist() == [True] * 5 + [False] * 4
    assert data.train[4].label is True and data.train[-1:][0].label is False
    assert data.ledger.train.labels == {"desirable": 5, "undesirable": 4}
    table = data.ledger.table()
    assert "  desirable" in table and "  undesirable" in table
    # As CSV has them.
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion", "label"])
        writer.writeheader()
        writer.writerows([row(True), row(False, 1)])
    assert load(tmp_path / "rows.csv", chatml(), "unpaired").train.labels.tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize("label", [-1, 2, 0.5, "maybe", "", [True], None])
def test_other_labels_are_refused(tmp_path, label):
    path = write_jsonl(tmp_path / "rows.jsonl", [row(True), row(label, 1)])
    with pytest.raises(ValueError, match="rows.jsonl row 2: .*'label'") as refused:
        load(path, chatml(), "unpaired")
    if label is not None and label != "":
        assert repr(label) in str(refused.value)


def test_rows_without_a_label_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Q:", "completion": " A."}])
    with pytest.raises(ValueError, match="row 1: an unpaired row needs a field 'label'.*COLUMN"):
        load(path, chatml(), "unpaired")
    # Another column may have it.
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Q:", "completion": "A", "ok": False}])
    data = load(path, chatml(), "unpaired", columns="label=ok")
    assert data.train.labels.tolist() == [False]


def test_chat_rows(tmp_path):
    """The label is that of the last answer, which alone is the completion."""
    turns = [user("Why?"), assistant("So."), user("How?"), assistant("Thus.")]
    asked = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    asked += "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
    rows = [
        {"prompt": turns[:3], "completion": turns[3:], "label": False},
        {"messages": turns, "label": False},
        {"conversations": turns, "liked": "no"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = load(path, chatml(), "unpaired")
    assert {shown(example, chatml()) for example in data.train} == {(asked, "⟦Thus.<|im_end|>⟧")}
    assert data.train.labels.tolist() == [False] * 3


def test_pairs_are_two_rows_each(tmp_path):
    rows = [
        {"prompt": "Q:", "chosen": " Blue.", "rejected": " Seven."},
        {"prompt": "R:", "chosen": " Red.", "rejected": " Red."},
        row(False, 3),
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = load(path, chatml(), "unpaired", max_dropped=0.5)
    texts = [shown(example, chatml())[1] for example in data.train]
    assert texts == ["⟦ Blue.<|im_end|>⟧", "⟦ Seven.<|im_end|>⟧", "⟦ A3.<|im_end|>⟧"]
    assert data.train.labels.tolist() == [True, False, False]
    counts = data.ledger.train
    assert (counts.read, counts.further_pairs, counts.kept) == (3, 1, 3)
    assert counts.dropped == {"chosen and rejected are equal": 1}
    assert "further completions of the same pairs" in data.ledger.table()


def test_a_changed_label_is_another_data_set():
    """The fingerprint of plain examples is as it was: kept log-probs are found by it."""
    found = []
    for label in (None, True, False):
        examples = Examples()
        examples.append([1, 2], ([3],), "here", label=label)
        found.append(examples.fingerprint)
    assert len(set(found)) == 3
    lengths_and_ids = np.array([2, 2, 1, 1, 2, 3], "<i4")
    assert found[0] == hashlib.sha256(lengths_and_ids.tobytes()).hexdigest()
    assert Examples().labels is None


@pytest.mark.parametrize(
    "desirable, undesirable, weights, said",
    [
        (100, 100, (1.0, 1.0), ""),
        (100, 300, (4.0, 1.0), ""),
        (400, 300, (1.0, 1.0), ""),
        (100, 300, (1.0, 1.0), "0.333 to 1.*desirable_weight between 3 and 4"),
        (100, 300, (1.0, 2.0), "0.167 to 1.*desirable_weight between 6 and 8"),
        (300, 100, (1.0, 1.0), "3 to 1.*undesirable_weight between 2.25 and 3"),
        (300, 100, (2.0, 1.0), "6 to 1.*undesirable_weight between 4.5 and 6"),
        (0, 7, (1.0, 1.0), "needs rows of both kinds"),
    ],
)
def test_imbalance_names_the_weights_that_balance(desirable, undesirable, weights, said):
    counts = Counts(labels={"desirable": desirable, "undesirable": undesirable})
    found = counts.imbalance(*weights)
    assert bool(found) == bool(said)
    if said:
        assert np.all([part in found for part in said.split(".*")]), found


def test_labels_are_in_the_ledgers_json(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [row(True), row(False, 1)])
    ledger = load(path, chatml(), "unpaired").ledger
    saved = json.loads(json.dumps(ledger.to_dict()))
    assert saved["train"]["labels"] == {"desirable": 1, "undesirable": 1}
