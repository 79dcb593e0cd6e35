"""From files to token ids: the ledger, its limits, and the decoded view."""

import json
import os
import subprocess
import sys

import pytest

from dpo_jax.data import dataset
from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.data.ledger import Counts, Ledger
from tests.helpers import rows
from tests.helpers.letters import letters_tokenizer
from tests.helpers.paths import ROOT, SHARED, STORIES, needs_shared

# What tokenising reads of the data block, besides what reading rows does.
ENCODING = dict(max_length=40, max_prompt_length=20, truncate="auto", append_eos=True, show=0)


def data_config(**changes):
    return rows.data_config(**ENCODING | changes)


@pytest.fixture(scope="module")
def letters():
    """A tokenizer whose tokens are letters."""
    return letters_tokenizer()


def write(path, records):
    path.write_text("".join(json.dumps(row) + "\n" for row in records))
    return str(path)


def pairs(n):
    return [{"prompt": f"prompt {i}", "chosen": "good", "rejected": "evil"} for i in range(n)]


def test_load_accounts_for_every_row(tmp_path, letters):
    bad = [{"prompt": "p", "chosen": chosen, "rejected": "r"} for chosen in ("", "é", 3)]
    path = write(tmp_path / "rows.jsonl", [*pairs(100), *pairs(2), *bad])
    data = dataset.load(
        data_config(path=path, eval_fraction=0.1, on_bad_row="drop"), letters, "pairs"
    )
    train, evals = data.ledger.train, data.ledger.eval
    assert train.dropped == {
        "empty response": 1,
        "field 'chosen' is not text": 1,
        "response without tokens": 1,
    }
    assert train.examples["response without tokens"] == ["rows.jsonl row 104"]
    assert (
        train.read == 105
        and train.kept == len(data.train)
        and evals.kept == len(data.eval) == evals.read
    )
    for counts in (train, evals):
        left_out = sum(counts.filtered.values()) + sum(counts.dropped.values()) + counts.held_out
        assert counts.read == left_out + counts.kept
    assert train.held_out == evals.read > 0


def test_distinct_takes_each_response_to_a_prompt_once(tmp_path, letters):
    """Rows are equal that are equal once cut, and both sets of a mixture count."""
    rows = []
    for prompt, chosen in (("p", "c"), ("p", "c"), ("q", "c"), ("p", "d"), ("p", "ce")):
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": "r" * (len(rows) + 1)})
    write(tmp_path / "one.jsonl", rows)
    write(tmp_path / "two.jsonl", [*rows[2:], rows[0] | {"prompt": "s"}])
    mix = f"{tmp_path}/one.jsonl,{tmp_path}/two.jsonl"
    data = data_config(mix=mix, eval_fraction=0.0, append_eos=False)
    data.update(max_length=2, max_prompt_length=1)
    every = dataset.load(data, letters, "sft")
    assert len(every.train) == 9
    found = dataset.load(data, letters, "sft", distinct=True)
    numbers = [where.rpartition("/")[2] for where in found.train.where]
    assert numbers == ["one.jsonl row 1", "one.jsonl row 3", "one.jsonl row 4", "two.jsonl row 4"]
    first, second = (part.train for part in found.ledger.parts.values())
    reason = "an earlier row has this response"
    assert (first.read, first.kept, first.filtered) == (5, 3, {reason: 2})
    assert (second.read, second.kept, second.filtered) == (4, 1, {reason: 3})


def test_ledger_json_and_table(tmp_path, letters):
    write(
        tmp_path / "train.jsonl",
        [
            *pairs(30),
            {"prompt": "p", "chosen": "", "rejected": "r"},
            {"prompt": "p" * 50, "chosen": "c", "rejected": "r" * 50},
        ],
    )
    write(tmp_path / "test.jsonl", pairs(2))
    data = dataset.load(data_config(path=str(tmp_path)), letters, "pairs")
    assert json.loads(json.dumps(data.ledger.to_dict())) == {
        "train": {
            "read": 32,
            "shapes": {"TRL pairs, text": 32},
            "filtered": {},
            "dropped": {"empty response": 1},
            "examples": {"empty response": ["train.jsonl row 31"]},
            "further_pairs": 0,
            "held_out": 0,
            "not_drawn": 0,
            "kept": 31,
            "prompts": 31,
            "subsets": {},
            "labels": {},
            "prompts_truncated": 1,
            "responses_truncated": 1,
            "eos_lost": 1,
            "boundaries": 62,
            "boundary_merges": 0,
            **NO_CHAT,
            "mean_tokens": {
                "prompt": pytest.approx((10 * 8 + 20 * 9 + 20) / 31),
                "chosen": pytest.approx((30 * 5 + 2) / 31),
                "rejected": pytest.approx((30 * 5 + 20) / 31),
                "chosen minus rejected": pytest.approx(-18 / 31),
            },
        },
        "eval": {
            "read": 2,
            "shapes": {"TRL pairs, text": 2},
            "filtered": {},
            "dropped": {},
            "examples": {},
            "further_pairs": 0,
            "held_out": 0,
            "not_drawn": 0,
            "kept": 2,
            "prompts": 2,
            "subsets": {},
            "labels": {},
            "prompts_truncated": 0,
            "responses_truncated": 0,
            "eos_lost": 0,
            "boundaries": 4,
            "boundary_merges": 0,
            **NO_CHAT,
            "mean_tokens": {"prompt": 8, "chosen": 5, "rejected": 5, "chosen minus rejected": 0},
        },
        "test": {
            "read": 0,
            "shapes": {},
            "filtered": {},
            "dropped": {},
            "examples": {},
            "further_pairs": 0,
            "held_out": 0,
            "not_drawn": 0,
            "kept": 0,
            "prompts": 0,
            "subsets": {},
            "labels": {},
            "prompts_truncated": 0,
            "responses_truncated": 0,
            "eos_lost": 0,
            "boundaries": 0,
            "boundary_merges": 0,
            **NO_CHAT,
            "mean_tokens": {},
        },
        "shared_prompts": 2,
        "shared_test_prompts": 0,
    }
    assert data.ledger.table() == TABLE


NO_CHAT = {
    "doubts": {},
    "flags": {},
    "merge_example": "",
    "laid_behind": 0,
    "without_cue": 0,
    "inside_thinking": 0,
    "developer_is_system": 0,
    "other_turns": 0,
    "reasoning_left_out": 0,
    "warnings": [],
}
TABLE = """\
                                           train    validation          test
rows                                          32             2             0
  recognised as: TRL pairs, text              32             2             0
  dropped: empty response                      1             0             0
  held out                                     0
kept                                          31             2             0
prompts                                       31             2             0
prompts cut                                    1             0             0
responses cut                                  1             0             0
  EOS lost                                     1             0             0
boundary merges                          0 of 62        0 of 4        0 of 0
mean tokens, prompt                          9.0           8.0           0.0
mean tokens, chosen                          4.9           5.0           0.0
mean tokens, rejected                        5.5           5.0           0.0
mean tokens, chosen minus rejected          -0.6           0.0           0.0
rows whose prompt is trained on                              2             0
dropped from train: 1 x empty response (train.jsonl row 31)"""


def test_load_stops_at_max_dropped(tmp_path, letters):
    empty, broken = ({"prompt": "p", "chosen": chosen, "rejected": "r"} for chosen in ("", "é"))
    path = write(tmp_path / "rows.jsonl", [*pairs(95), empty, empty, empty, empty, broken])
    assert len(dataset.load(data_config(path=path, max_dropped=0.05), letters, "pairs").train) == 95
    with pytest.raises(ValueError) as error:
        dataset.load(data_config(path=path, max_dropped=0.04), letters, "pairs")
    assert str(error.value) == (
        "5 of 100 train rows (5.0%) had to be dropped; data.max_dropped allows 4.0%:\n"
        "  4 x empty response (rows.jsonl row 96, rows.jsonl row 97, rows.jsonl row 98, ...)\n"
        "  1 x response without tokens (rows.jsonl row 100)\n"
        "Fix these rows, or raise data.max_dropped if losing them is right."
    )


def test_load_filtered_is_not_dropped(tmp_path, letters):
    row = {
        "history": "why",
        "human_ref_A": "so",
        "human_ref_B": "no",
        "labels": 1,
        "score_ratio": 3.0,
    }
    path = write(tmp_path / "shp.jsonl", [row, *[row | {"score_ratio": 1.0}] * 99])
    data = dataset.load(data_config(source="shp", path=path, max_dropped=0.0), letters, "pairs")
    assert len(data.train) == 1 and data.ledger.train.filtered == {"score ratio below 2": 99}
    assert "  filtered: score ratio below 2               99             0" in data.ledger.table()


def test_counts_add_up():
    source = Counts(read=9, filtered={"f": 2}, dropped={"r": 2}, examples={"r": ["a", "b"]})
    tokens = Counts(
        kept=3, dropped={"r": 2, "s": 1}, examples={"r": ["c", "d"], "s": ["e"]}, eos_lost=1
    )
    assert source.plus(tokens) == Counts(
        read=9,
        filtered={"f": 2},
        dropped={"r": 4, "s": 1},
        examples={"r": ["a", "b", "c"], "s": ["e"]},
        kept=3,
        eos_lost=1,
    )
    assert source.dropped == {"r": 2} and source.examples == {"r": ["a", "b"]}


def test_ledger_checks_eval_split():
    ledger = Ledger(
        Counts(read=9, kept=9), Counts(read=4, kept=2, dropped={"r": 2}, examples={"r": ["a"]})
    )
    with pytest.raises(ValueError, match=r"2 of 4 validation rows \(50.0%\) had to be dropped"):
        ledger.check(0.05, "rows.jsonl")
    ledger.check(0.5, "rows.jsonl")


def test_ledger_dropped_share_without_filtered():
    ledger = Ledger(
        Counts(read=100, filtered={"f": 90}, kept=9, dropped={"r": 1}, examples={"r": ["a"]})
    )
    with pytest.raises(ValueError, match=r"1 of 10 train rows \(10.0%\) had to be dropped"):
        ledger.check(0.09, "rows.jsonl")
    ledger.check(0.1, "rows.jsonl")


def test_load_refuses_no_training_rows(tmp_path, letters):
    path = write(tmp_path / "rows.jsonl", [])
    with pytest.raises(ValueError, match=f"^{path} has no rows"):
        dataset.load(data_config(path=path), letters, "pairs")


def test_load_refuses_when_no_training_row_is_left(tmp_path, letters):
    path = write(tmp_path / "rows.jsonl", pairs(2))
    with pytest.raises(
        ValueError, match="no row is left to train on: 2 read, 0 filtered, 0 dropped, 2 held"
    ):
        dataset.load(data_config(path=path, eval_fraction=0.999), letters, "pairs")


@pytest.mark.parametrize(
    "source, asked, expected",
    [
        ("local", "auto", "keep_end"),
        ("hh", "auto", "keep_end"),
        ("shp", "auto", "keep_end"),
        ("tldr", "auto", "keep_end"),
        ("cnn_dailymail", "auto", "keep_cue"),
        ("imdb", "auto", "keep_start"),
        ("toy", "auto", "keep_start"),
        ("hh", "keep_start", "keep_start"),
        ("local", "keep_start", "keep_start"),
    ],
)
def test_truncation_auto_follows_source(source, asked, expected):
    assert dataset.truncation(data_config(source=source, truncate=asked)) == expected


def test_question_at_the_end_is_kept(tmp_path, letters):
    rows = [
        {"prompt": "context " * 20 + question, "chosen": "yes", "rejected": "no"}
        for question in ("is it so", "or not so")
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    data = dataset.load(data_config(path=path), letters, "pairs")
    assert [letters.decode(prompt)[-9:] for prompt in data.train.prompts] == [
        " is it so",
        "or not so",
    ]


@needs_shared
@pytest.mark.parametrize("words", ["gpt2-tokenizer", "pythia-tokenizer"])
@pytest.mark.parametrize(
    "source, fields, start",
    [
        (
            "tldr",
            {
                "prompt": "SUBREDDIT: r/cats\nTITLE: My cat\nPOST: {}\nTL;DR:",
                "label": "It is gone.",
            },
            "",
        ),
        (
            "tldr",
            {
                "prompt": "SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: {}",
                "chosen": "TL;DR: It is gone, help me.",
            },
            "",
        ),
        (
            "cnn_dailymail",
            {"article": "LONDON -- {}", "highlights": "It rained ."},
            "Article:\n\nLONDON -- It is",
        ),
    ],
)
def test_load_keeps_cue_of_cut_prompt(tmp_path, words, source, fields, start):
    """To the last token, and news their lead besides; a setting that would cut it off is
    refused.
    """
    tokenizer = tokenizers.load(SHARED / words)
    long, short = (
        {name: text.format(middle) for name, text in fields.items()}
        for middle in ("It is. " * 200, "So.")
    )
    settings = dict(
        source=source,
        path=write(tmp_path / "rows.jsonl", [long, short]),
        max_length=96,
        max_prompt_length=64,
    )
    data = dataset.load(data_config(**settings), tokenizer, "sft")
    cut, whole = data.train.prompts
    assert len(cut) == 64 and len(whole) < 64 and data.ledger.train.prompts_truncated == 1
    for prompt in (cut, whole):
        assert tokenizer.decode(prompt).endswith("TL;DR:")
    assert tokenizer.decode(cut).startswith(start) and "SUBREDDIT" not in tokenizer.decode(cut)
    with pytest.raises(
        ValueError,
        match=r"1 prompts \(rows.jsonl row 1 is .* lost their end, 'TL;DR:', by "
        "data.truncate='keep_start'",
    ):
        dataset.load(data_config(**settings, truncate="keep_start"), tokenizer, "sft")


def test_load_holds_out_same_prompts(tmp_path, letters):
    path = write(tmp_path / "rows.jsonl", pairs(200))
    config = data_config(path=path, eval_fraction=0.1)
    sft, dpo = (dataset.load(config, letters, kind) for kind in ("sft", "pairs"))
    assert sft.eval.where == dpo.eval.where and len(dpo.eval) > 5
    assert [len(example.responses) for example in sft.eval] == [1] * len(sft.eval)
    assert sft.train.fingerprint != dpo.train.fingerprint


def test_load_is_deterministic(tmp_path, letters):
    config = data_config(path=write(tmp_path / "rows.jsonl", pairs(200)), eval_fraction=0.1)
    first, second = (dataset.load(config, letters, "pairs") for _ in range(2))
    assert first.train.fingerprint == second.train.fingerprint != first.eval.fingerprint
    assert first.ledger == second.ledger and first.train.where == second.train.where


def test_show_marks_completion_tokens(tmp_path, letters):
    path = write(tmp_path / "rows.jsonl", pairs(3))
    shown = dataset.show(
        dataset.load(data_config(path=path), letters, "pairs").train, letters, range(2)
    )
    assert shown == (
        "--- rows.jsonl row 1: prompt, 8 tokens\nprompt 0\n"
        "--- chosen, 5 tokens trained on\n⟦good<eos>⟧\n"
        "--- rejected, 5 tokens trained on\n⟦evil<eos>⟧\n\n"
        "--- rows.jsonl row 2: prompt, 8 tokens\nprompt 1\n"
        "--- chosen, 5 tokens trained on\n⟦good<eos>⟧\n"
        "--- rejected, 5 tokens trained on\n⟦evil<eos>⟧"
    )
    sft = dataset.load(data_config(path=path), letters, "sft").train
    assert dataset.show(sft, letters, range(1)).endswith(
        "--- completion, 5 tokens trained on\n⟦good<eos>⟧"
    )


@needs_shared
def test_load_real_hh_pairs():
    tokenizer = tokenizers.load(STORIES)
    config = data_config(
        source="hh",
        path=str(SHARED / "hh-rlhf"),
        eval_fraction=0.02,
        max_length=512,
        max_prompt_length=256,
        max_eval_rows=256,
    )
    data = dataset.load(config, tokenizer, "pairs")
    train, evals = data.ledger.train, data.ledger.eval
    test = data.ledger.test
    assert (train.read, train.held_out, train.kept) == (2312, 56, 2252)
    assert (evals.kept, test.kept) == (28, 28)
    assert (train.prompts_truncated, train.responses_truncated, train.eos_lost) == (636, 295, 295)
    assert train.mean_tokens["chosen"] == pytest.approx(90.9, abs=0.05)
    lengths = [len(pair.prompt) + max(map(len, pair.responses)) for pair in data.train]
    assert max(lengths) == 512
    for pair in data.train:
        prompt, responses = pair.prompt, pair.responses
        assert prompt[0] == 1 and not any(1 in response for response in responses)
        assert all((response == 2).sum() <= 1 and 2 not in response[:-1] for response in responses)
    # auto keeps the end, where the cue is: no prompt has lost it
    for prompt in data.train.prompts:
        assert tokenizer.decode(prompt[-40:]).endswith("Assistant:")


@needs_shared
def test_load_real_imdb_reviews():
    tokenizer = tokenizers.load(SHARED / "gpt2-tokenizer")
    config = data_config(
        source="imdb",
        path=str(SHARED / "imdb"),
        max_rows=50,
        max_eval_rows=10,
        max_length=64,
        max_prompt_length=8,
    )
    data = dataset.load(config, tokenizer, "sft")
    assert (len(data.train), len(data.eval)) == (50, 10)
    assert all(prompt.tolist() == [50256] for prompt in data.train.prompts)
    assert max(len(review) for (review,) in data.train.responses) == 63
    assert data.ledger.shared_prompts == 0


PEAK_MEMORY = """if True:
    import re, sys
    from dpo_jax.data import dataset, examples
    from tests.helpers.letters import letters_tokenizer
    from tests.unit.data.test_dataset import data_config
    examples.IN_MEMORY = 1 << 18
    data = data_config(path=sys.argv[1], eval_fraction=0.05, max_length=600, max_prompt_length=400)
    loaded = dataset.load(data, letters_tokenizer(), "pairs")
    loaded.train.fingerprint
    # Not ru_maxrss, which starts at what the parent process had.
    peak = re.search("VmHWM: *([0-9]+) kB", open("/proc/self/status").read().replace("\\t", " "))
    print(sum(map(len, (loaded.train, loaded.eval, loaded.test))), int(peak[1]) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    "suffix",
    [
        ".jsonl",
        pytest.param(".parquet", marks=pytest.mark.slow),
        pytest.param(".json", marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_with_rows(tmp_path, suffix):
    """12,000 rows more, which as text and ids take about 60 MB."""
    peaks = []
    for count in (4_000, 16_000):
        records = []
        for number in range(count):
            prompt = f"{number} is a long question with many words " * 8
            records.append({"prompt": prompt, "chosen": "yes it is " * 9, "rejected": "no " * 40})
        path = tmp_path / f"rows{count}{suffix}"
        if suffix == ".parquet":
            rows.write_parquet(path, records)
        elif suffix == ".json":
            path.write_text(json.dumps({"version": 1, "data": records}))
        else:
            rows.write_jsonl(path, records)
        done = subprocess.run(
            [sys.executable, "-c", PEAK_MEMORY, str(path)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            # One heap, given back at once: peaks then vary by 1 MB, and not by 20.
            env=os.environ | dict(MALLOC_ARENA_MAX="1", MALLOC_TRIM_THRESHOLD_="0"),
        )
        assert done.returncode == 0, done.stderr
        kept, peak = map(int, done.stdout.split())
        assert kept == count
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 30, peaks
