"""Which rows are drawn: strata in their shares, prompts together, and never the file's order."""

import collections
import json
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.data import dataset, draws, splits
from dpo_jax.data.examples import Examples
from tests.helpers.letters import letters_tokenizer
from tests.helpers.rows import data_config, pairs, read, write_jsonl

HH = {"harmless-base": 400, "helpful-base": 400, "helpful-online": 150, "helpful-rejected": 50}


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    most=st.integers(1, 300),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("held_out", [False, True])
def test_strata_have_their_shares(held_out, counts, most, seed):
    rng = np.random.default_rng(seed)
    strata = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    rows = rng.integers(0, 2**62, len(strata)).astype(np.uint64)
    prompts = rng.integers(0, 20, len(strata)).astype(np.uint64)  # with several rows each
    sizes = np.ones(len(strata), int)
    order = draws.order(prompts, rows, strata, held_out=held_out)
    is_drawn = draws.drawn(order, sizes, most)
    assert is_drawn.sum() == min(most, len(strata))
    shares = np.array(counts) / sum(counts)
    missed = np.bincount(strata[is_drawn], minlength=len(counts)) - shares * is_drawn.sum()
    # A stratum is rounded to a row. That all of them are, moves where the draw is cut by as much as
    # half a row each.
    assert (np.abs(missed) <= 0.5 + len(counts) / 2 * shares + 1e-9).all()
    # A larger draw has all of a smaller one, and the order of the rows is no matter.
    assert (draws.drawn(order, sizes, most + 7) >= is_drawn).all()
    shuffled = rng.permutation(len(strata))
    columns = (column[shuffled] for column in (prompts, rows, strata))
    again = draws.order(*columns, held_out=held_out)
    assert (shuffled[again] == order).all()


def test_pairs_of_a_prompt_go_together():
    prompts = np.repeat(np.arange(100, dtype=np.uint64) * 2**50, 5)
    rows = np.arange(500, dtype=np.uint64)
    is_drawn = draws.drawn(draws.order(prompts, rows, np.zeros(500)), np.ones(500, int), 33)
    pairs_of_prompt = np.bincount(np.flatnonzero(is_drawn) // 5)
    assert sorted(pairs_of_prompt[pairs_of_prompt > 0]) == [3, 5, 5, 5, 5, 5, 5]


def test_held_out_prompts_come_once_each_first():
    """As many posts with 20 pairs each as there are: 256 of their pairs are not those of 13."""
    prompts = np.repeat(np.arange(200, dtype=np.uint64) * 2**50, 20)
    strata = np.repeat([0, 1], 2000)
    order = draws.order(prompts, np.arange(4000, dtype=np.uint64), strata, held_out=True)
    is_drawn = draws.drawn(order, np.ones(4000, int), 256)
    pairs_of_prompt = np.bincount(np.flatnonzero(is_drawn) // 20)
    assert sorted(pairs_of_prompt) == [1] * 144 + [2] * 56
    assert is_drawn[:2000].sum() == 128


@pytest.mark.parametrize("mixed", [False, True])
def test_evaluation_is_of_as_many_prompts_as_there_are(tmp_path, mixed):
    rows = []
    for post in range(120):
        rows += [
            dict(prompt=f"Post {post}?", chosen=f"yes {pair}", rejected="no") for pair in range(20)
        ]
    folder = tmp_path / "posts"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", rows[:40])
    write_jsonl(folder / "test.jsonl", rows[40:])
    where = dict(path=str(folder))
    if mixed:
        other = write_jsonl(tmp_path / "other.jsonl", pairs(40))
        where = dict(mix=f"{folder}, {other}")
    found, _ = splits.read(data_config(**where, max_eval_rows=50), "pairs")
    posts = [example.prompt for example in found["test"] if example.prompt.startswith("Post")]
    assert len(set(posts)) == len(posts) > 30


def test_prompts_are_spread():
    """Different prompts come before a second row of one, in the shares of their subsets."""
    prompts = np.array([7, 7, 7, 5, 3, 9, 1, 11], np.uint64)
    strata = np.array([0, 0, 0, 0, 0, 1, 1, 1])
    assert draws.spread(prompts, strata, 2).tolist() in ([4, 6], [3, 6])
    found = draws.spread(prompts, strata, 6)
    assert sorted(prompts[found]) == [1, 3, 5, 7, 9, 11]
    assert set(draws.spread(prompts, strata, 4)) < set(found)
    assert draws.spread(prompts, strata, 8).tolist() == list(range(8))


def hh_folder(folder, seed=0):
    """Write a folder of four subsets, as HH has them: some prompts have several pairs."""
    order = random.Random(seed)
    for subset, count in HH.items():
        for split, rows in (("train", count), ("test", count // 2)):
            records = []
            for number in range(rows):
                prompt = f"{subset} {split} {number * 2 // 3}"
                records.append({"prompt": prompt, "chosen": f"a{number}", "rejected": "b"})
            order.shuffle(records)
            write_jsonl(folder / subset / f"{split}.jsonl", records)
    return folder


def said(examples):
    return collections.Counter((example.prompt, *example.responses) for example in examples)


def test_folder_of_four_subsets(tmp_path):
    settings = dict(max_rows=300, max_eval_rows=60)
    found, ledger = read(hh_folder(tmp_path / "a"), **settings)
    everything, _ = read(tmp_path / "a")
    for split, most in (("train", 300), ("eval", 60), ("test", 60)):
        of_subset = collections.Counter(example.subset for example in found[split])
        of_all = collections.Counter(example.subset for example in everything[split])
        assert len(found[split]) == most and set(of_subset) == set(HH)
        for subset, count in of_subset.items():
            assert abs(count - most * of_all[subset] / of_all.total()) <= 1
    prompts = {split: {example.prompt for example in found[split]} for split in splits.SPLITS}
    assert not prompts["eval"] & prompts["test"] and not prompts["train"] & prompts["test"]
    # Nothing is lost: what is not drawn is counted.
    for counts in (ledger.train, ledger.eval, ledger.test):
        drawn = counts.read - counts.held_out - counts.not_drawn
        assert drawn == {1000: 300, 500: 60}.get(counts.read, 60)
    # The order of the files' rows changes nothing, and nor does what else is drawn.
    again, _ = read(hh_folder(tmp_path / "b", seed=1), max_rows=30, max_eval_rows=60)
    for split in ("eval", "test"):
        assert said(again[split]) == said(found[split])
    assert said(again["train"]) < said(found["train"])


def test_subsets_in_the_ledger(tmp_path):
    data = data_config(
        path=str(hh_folder(tmp_path)),
        max_eval_rows=60,
        max_length=60,
        max_prompt_length=40,
        truncate="keep_end",
        append_eos=True,
    )
    loaded = dataset.load(data, letters_tokenizer(), "pairs")
    names, number_P = loaded.eval.subsets
    assert names == sorted(HH)
    counts = loaded.ledger.eval
    assert counts.subsets == dict(zip(names, np.bincount(number_P).tolist(), strict=True))
    assert counts.kept == counts.prompts == 60  # of two rows each
    lines = [line.split() for line in loaded.ledger.table().splitlines()]
    assert ["subset", "helpful-base", "400", str(counts.subsets["helpful-base"])] in [
        line[:4] for line in lines
    ]
    assert ["kept", "1000", "60", "60"] in lines
    # Those of a part are its own, under the same names.
    part = loaded.eval[number_P == 1]
    assert part.subsets[0] == [] and part.subset(0) == names[1]


@pytest.mark.parametrize(
    "fields, file, subset",
    [
        ({"subset": "Focus"}, "a/train.jsonl", "Focus"),
        ({"domain": "askacademia_train"}, "train.jsonl", "askacademia"),
        ({"subset": 3}, "helpful-base/train.jsonl.gz", "helpful-base"),
        ({}, "plain_text/train/0.jsonl", "plain_text"),
        ({}, "train.jsonl", ""),
        ({"subset": "(none)"}, "train.jsonl", ""),  # as rows of no subset are called
        ({"subset": "other"}, "train.jsonl", "other"),
        ({}, "owner/name[train]", ""),  # of the hub
    ],
)
def test_subset_of_a_row(fields, file, subset):
    assert splits.subset_of(fields, file) == subset


def test_rows_of_no_subset_have_a_name_of_their_own():
    """A subset may be called "other"."""
    examples = Examples()
    for number, subset in enumerate(["other", "", "other", "a"]):
        examples.append([1], ([2], [3]), f"row {number}", subset=subset)
    names, number_P = examples.subsets
    assert [names[number] for number in number_P] == ["other", "(none)", "other", "a"]


def test_many_names_are_no_subsets(tmp_path):
    rows = [row | {"subset": f"s{number}"} for number, row in enumerate(pairs(100))]
    found, _ = read(write_jsonl(tmp_path / "rows.jsonl", rows), max_rows=50)
    assert len(found["train"]) == 50
    data = data_config(
        path=str(tmp_path / "rows.jsonl"),
        max_length=60,
        max_prompt_length=40,
        truncate="keep_end",
        append_eos=True,
    )
    loaded = dataset.load(data, letters_tokenizer(), "pairs")
    assert loaded.train.subsets[0] == [] and loaded.ledger.train.subsets == {}


def test_splits_of_their_own_share_no_prompt(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", pairs(50))
    write_jsonl(tmp_path / "validation.jsonl", [*pairs(30, "v"), *pairs(5, "t")])
    write_jsonl(tmp_path / "test.jsonl", pairs(20, "t"))
    found, ledger = read(tmp_path)
    assert [len(found[split]) for split in splits.SPLITS] == [50, 30, 20]
    assert ledger.eval.filtered == {"its prompt is tested on": 5}


def test_few_prompts_are_not_divided(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(40))
    found, _ = read(path, eval_fraction=0.3)
    assert len(found["eval"]) > 8 and not found["test"]
    path = write_jsonl(tmp_path / "more.jsonl", pairs(200))
    found, _ = read(path, eval_fraction=0.3)
    assert min(len(found["eval"]), len(found["test"])) >= draws.FEWEST_IN_HALF


def test_only_what_is_wanted_is_read(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ["not JSON"])
    write_jsonl(tmp_path / "test.jsonl", pairs(60))
    found, ledger = splits.read(data_config(path=str(tmp_path)), "pairs", wanted=("eval", "test"))
    assert len(found["eval"]) + len(found["test"]) == 60 and not ledger.train.read


def test_a_draw_keeps_few_bytes_of_a_row(tmp_path):
    count = 8_000
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(count):
            row = {"prompt": f"{number} " + "long " * 100, "chosen": "a", "rejected": "b"}
            file.write(json.dumps(row) + "\n")
    data = data_config(path=str(tmp_path / "rows.jsonl"), eval_fraction=0.05, max_rows=100)
    data.max_eval_rows = 50
    (part,) = splits.parts(data, "pairs")
    tracemalloc.start()
    found = sum(1 for _ in part.examples())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == 200
    # A few copies of 20 bytes, and nothing of the 500 that a text has.
    assert peak < 400 * count / 2
