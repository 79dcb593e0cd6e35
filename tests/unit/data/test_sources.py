"""Every source's quirks, and what a person is told when a row is wrong."""

import json

import pytest

from dpo_jax.data import sources
from dpo_jax.data.ledger import Filtered, Malformed, Unusable
from dpo_jax.data.rows import TextExample
from dpo_jax.data.splits import SPLITS, hash64
from tests.helpers.paths import SHARED, needs_shared
from tests.helpers.rows import PAIR, pairs, read, user, write_jsonl, write_parquet


def parts(row):
    return row.prompt, row.responses


@pytest.mark.parametrize(
    "chosen, rejected, prompt, responses",
    [
        (
            "\n\nHuman: q\n\nAssistant: a",
            "\n\nHuman: q\n\nAssistant: b",
            "\n\nHuman: q\n\nAssistant:",
            (" a", " b"),
        ),
        (
            "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: a",
            "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: b",
            "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant:",
            (" a", " b"),
        ),
        # differs before the last turn: what is left of each side after the last shared one
        (
            "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: a",
            "\n\nHuman: q\n\nAssistant: b",
            "\n\nHuman: q\n\nAssistant:",
            (" x\n\nHuman: r\n\nAssistant: a", " b"),
        ),
        # one side is the beginning of the other
        (
            "\n\nHuman: q\n\nAssistant: a",
            "\n\nHuman: q\n\nAssistant: a b",
            "\n\nHuman: q\n\nAssistant:",
            (" a", " a b"),
        ),
        # a cue inside one answer only is not a turn of both
        (
            "\n\nHuman: q\n\nAssistant: a\n\nAssistant:",
            "\n\nHuman: q\n\nAssistant: a\n\nAss",
            "\n\nHuman: q\n\nAssistant:",
            (" a\n\nAssistant:", " a\n\nAss"),
        ),
    ],
)
def test_hh_splits_after_last_shared_turn(chosen, rejected, prompt, responses):
    assert parts(sources.hh({"chosen": chosen, "rejected": rejected})) == (prompt, responses)


def test_hh_without_shared_turn():
    with pytest.raises(Unusable, match="no shared assistant turn"):
        sources.hh(
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: z\n\nAssistant: a"}
        )


@needs_shared
def test_hh_real_rows():
    rows, ledger = read(SHARED / "hh-rlhf", source="hh")
    assert ledger.train.read == 2312 and len(rows["train"]) == 2308 and rows["eval"] == []
    assert ledger.train.dropped == {"empty response": 4}
    assert ledger.train.examples == {
        "empty response": [f"harmless-base/test.jsonl.gz row {number}" for number in (87, 517, 926)]
    }
    assert all(row.prompt.endswith("\n\nAssistant:") for row in rows["train"])
    by_number = {int(row.where.split()[-1]): row for row in rows["train"]}
    for number in (1255, 1689, 1951, 1953, 2037):  # the pairs that differ before the last turn
        chosen, rejected = by_number[number].responses
        assert ("\n\nAssistant:" in chosen) != ("\n\nAssistant:" in rejected)
    assert (
        by_number[1255].responses[0].endswith("\n\nAssistant:  I think they call them that because")
    )
    assert by_number[1255].responses[1].startswith(" A drag king is the opposite")
    several_turns = [
        number
        for number, row in by_number.items()
        if any("\n\nAssistant:" in response for response in row.responses)
    ]
    assert several_turns == [1255, 1689, 1951, 1953, 2037]


SHP = {
    "history": "Why?",
    "human_ref_A": "Because. ",
    "human_ref_B": "No idea.",
    "labels": 1,
    "score_ratio": 2.0,
}


def test_shp_row():
    prompt = "\n\nHuman: Why?\n\nAssistant:"
    assert parts(sources.shp(SHP)) == (prompt, (" Because.", " No idea."))
    assert parts(sources.shp(SHP | {"labels": 0})) == (prompt, (" No idea.", " Because."))
    with pytest.raises(Filtered, match="score ratio below 2"):
        sources.shp(SHP | {"score_ratio": 1.99})
    with pytest.raises(Malformed, match="field 'labels' is neither 1 .* nor 0 .*; found 2"):
        sources.shp(SHP | {"labels": 2})
    with pytest.raises(
        Malformed, match="field 'score_ratio' is missing or not a number; found 'three'"
    ):
        sources.shp(SHP | {"score_ratio": "three"})
    # tables of text have numbers as text
    assert sources.shp(SHP | {"score_ratio": "2.0", "labels": "1"}) == sources.shp(SHP)


def test_imdb_row():
    text = "  Good.<br /><br />Really <br /> good. <br/>Yes."
    assert parts(sources.imdb({"text": text, "label": 1})) == (
        "",
        ("Good.\n\nReally\ngood.\nYes.",),
    )


@pytest.mark.parametrize(
    "fields, prompt, responses",
    [
        # CarperAI/openai_summarize_tldr
        ({"prompt": "POST: x\nTL;DR:", "label": "sum"}, "POST: x\nTL;DR:", (" sum",)),
        ({"prompt": "POST: x\nTL;DR: ", "label": "TL;DR: sum"}, "POST: x\nTL;DR:", (" sum",)),
        # CarperAI/openai_summarize_comparisons
        (
            {"prompt": "POST: x", "chosen": "TL;DR: a b c d e", "rejected": "TL;DR: f g h i j"},
            "POST: x\nTL;DR:",
            (" a b c d e", " f g h i j"),
        ),
        # trl-lib/tldr and trl-lib/tldr-preference
        ({"prompt": "POST: x\n\nTL;DR:", "completion": " sum "}, "POST: x\n\nTL;DR:", (" sum",)),
        (
            {"prompt": "POST: x\n\nTL;DR:", "chosen": " a b c d e", "rejected": "f g h i j"},
            "POST: x\n\nTL;DR:",
            (" a b c d e", " f g h i j"),
        ),
        # a cue in the post is the author's; a doubled one at the end is not
        (
            {"prompt": "POST: TL;DR: no\n\nTL;DR: TL;DR:\n", "label": "sum"},
            "POST: TL;DR: no\n\nTL;DR:",
            (" sum",),
        ),
    ],
)
def test_tldr_rows(fields, prompt, responses):
    assert parts(sources.tldr(fields)) == (prompt, responses)


@pytest.mark.parametrize(
    "chosen, rejected, reason",
    [
        ("TL;DR: a b c d e", " a b c d e", "summaries are equal"),
        ("a b c d e", "a b c d", "a summary has fewer than 5 words"),
    ],
)
def test_tldr_filters(chosen, rejected, reason):
    with pytest.raises(Filtered, match=reason):
        sources.tldr({"prompt": "p", "chosen": chosen, "rejected": rejected})


@pytest.mark.parametrize(
    "prompt", ["Article:\nLONDON -- x\n\nTL;DR:", "TITLE: x\n\nLONDON -- x\n\nTL;DR:"]
)
def test_tldr_filters_news(prompt):
    """trl-lib/tldr-preference and its forerunner have CNN/DailyMail articles among the posts of
    their validation.
    """
    with pytest.raises(Filtered, match="news article"):
        sources.tldr({"prompt": prompt, "chosen": " a b c d e", "rejected": " f g h i j"})


def test_tldr_without_summary():
    with pytest.raises(Malformed, match="field 'label' is missing"):
        sources.tldr({"prompt": "p"})


POST = {
    "id": "t3_1",
    "post": "I lost my cat.",
    "title": "My cat",
    "subreddit": "cats",
    "site": None,
    "article": None,
}
COMPARED = {  # a row of openai/summarize_from_feedback, comparisons
    "info": POST,
    "choice": 1,
    "worker": "w",
    "batch": "batch3",
    "split": "train",
    "extra": {"confidence": None},
    "summaries": [
        {"text": " cat is still at home", "policy": "sup1", "note": None},
        {"text": " cat is gone, help me", "policy": "ref", "note": None},
    ],
}


def test_tldr_openai_comparisons():
    prompt = "SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: I lost my cat.\n\nTL;DR:"
    summaries = (" cat is gone, help me", " cat is still at home")
    assert parts(sources.tldr(COMPARED)) == (prompt, summaries)
    assert parts(sources.tldr(COMPARED | {"choice": 0})) == (prompt, summaries[::-1])
    article = POST | {"post": None, "subreddit": None, "article": "LONDON -- x"}
    with pytest.raises(Filtered, match="news article"):
        sources.tldr(COMPARED | {"info": article, "batch": "batch0_cnndm"})
    with pytest.raises(Filtered, match="fewer than 5 words"):
        sources.tldr(COMPARED | {"summaries": [COMPARED["summaries"][0], {"text": " cat gone"}]})


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"choice": 2}, "'choice', 0 or 1"),
        ({"choice": None}, "'choice', 0 or 1"),
        ({"summaries": COMPARED["summaries"][:1]}, "two 'summaries'"),
        ({"info": POST | {"title": None}}, "field 'title' is missing"),
        ({"summaries": [{"note": ""}, COMPARED["summaries"][1]]}, "field 'text' is missing"),
    ],
)
def test_tldr_openai_malformed(change, reason):
    with pytest.raises(Malformed, match=reason):
        sources.tldr(COMPARED | change)


def test_tldr_openai_parquet(tmp_path):
    """The folders that the hub makes of it; what is left out is counted, and adds up."""
    news = COMPARED | {"batch": "cnndm0", "info": POST | {"post": None, "article": "LONDON -- x"}}
    short = COMPARED | {
        "summaries": [{"text": " yes", "policy": "p", "note": None}, COMPARED["summaries"][1]]
    }
    write_parquet(
        tmp_path / "comparisons" / "train" / "0000.parquet",
        [COMPARED, COMPARED | {"choice": 0}, short],
    )
    write_parquet(tmp_path / "comparisons" / "validation" / "0000.parquet", [news, COMPARED, news])
    rows, ledger = read(tmp_path / "comparisons", source="tldr")
    assert [row.responses[0] for row in rows["train"]] == [
        " cat is gone, help me",
        " cat is still at home",
    ]
    assert len(rows["eval"]) == 1
    assert ledger.train.filtered == {"a summary has fewer than 5 words": 1}
    assert ledger.eval.filtered == {"news article, not a Reddit post": 2} and ledger.eval.read == 3


def test_cnn_dailymail_row(tmp_path):
    row = {
        "id": "1",
        "article": "LONDON, England (Reuters) -- It rained. \n",
        "highlights": "It rained in London , again .\nU.S. envoy: 3.5 inches .\nNo end in sight",
    }
    prompt = "Article:\n\nLONDON, England (Reuters) -- It rained.\n\nTL;DR:"
    summary = " It rained in London, again. U.S. envoy: 3.5 inches. No end in sight"
    assert parts(sources.cnn_dailymail(row)) == (prompt, (summary,))
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_parquet(tmp_path / "3.0.0" / f"{name}.parquet", [row | {"id": name}])
    rows, _ = read(tmp_path / "3.0.0", "sft", source="cnn_dailymail")
    assert [len(side) for side in rows.values()] == [2, 1, 0]
    with pytest.raises(ValueError, match="'cnn_dailymail' has no pairs"):
        read(tmp_path / "3.0.0", source="cnn_dailymail")


# read: splits, limits, bad rows


def test_read_kinds(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [PAIR])
    assert read(path)[0]["train"] == [
        TextExample("Name a colour.", (" Blue.", " Seven."), "rows.jsonl row 1")
    ]
    assert read(path, "sft")[0]["train"] == [
        TextExample("Name a colour.", (" Blue.",), "rows.jsonl row 1")
    ]
    with pytest.raises(
        ValueError, match="data.source='imdb' has no pairs.*`pairs` stage.*data.source=local"
    ):
        read(path, source="imdb")
    with pytest.raises(
        ValueError, match="data.source='reddit' is not one of local, hh, shp, imdb, tldr, "
    ):
        read(path, source="reddit")


def test_read_names_bad_row(tmp_path):
    path = write_jsonl(
        tmp_path / "rows.jsonl", [PAIR, "", {"prompt": "p", "chosen": "c", "rejected": 3}]
    )
    with pytest.raises(ValueError) as error:
        read(path)
    message = str(error.value)
    # row 2 is a blank line: skipped, but counted as an editor counts
    assert message.startswith("rows.jsonl row 3: field 'rejected' is not text; found 3 (int).\n")
    for part in (
        f"data.path: {path}",
        "fields found: prompt, chosen, rejected",
        'a right row for TRL pairs: {"prompt":',
        "--config.data.on_bad_row=drop",
    ):
        assert part in message


def test_read_counts_known_defects(tmp_path):
    empty, equal = PAIR | {"chosen": " "}, PAIR | {"chosen": "Seven. "}
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        [
            PAIR,
            empty,
            empty,
            empty,
            empty,
            equal,
            {"prompt": [user("q")], "chosen": "", "rejected": "b"},
        ],
    )
    rows, ledger = read(path)
    assert len(rows["train"]) == 1
    assert ledger.train.dropped == {"empty response": 5, "chosen and rejected are equal": 1}
    assert ledger.train.examples["empty response"] == [f"rows.jsonl row {n}" for n in (2, 3, 4)]
    assert len(read(path, "sft")[0]["train"]) == 2  # equal pairs are no matter to SFT


def test_read_filtered_apart_from_dropped(tmp_path):
    path = write_jsonl(
        tmp_path / "shp.jsonl", [SHP, SHP | {"score_ratio": 1.5}, SHP | {"human_ref_A": ""}]
    )
    rows, ledger = read(path, source="shp")
    assert len(rows["train"]) == 1
    assert ledger.train.filtered == {"score ratio below 2": 1}
    assert ledger.train.dropped == {"empty response": 1}


def test_read_choice_of_splits(tmp_path):
    for name, n in (("train", 4), ("extra", 3), ("validation", 2), ("test", 1)):
        write_jsonl(tmp_path / f"{name}-00000-of-00001.jsonl", pairs(n, name))

    def sizes(**changes):
        rows, _ = read(tmp_path, **changes)
        return tuple(len(rows[split]) for split in SPLITS)

    # Where there are both, neither is divided.
    assert sizes() == (4, 2, 1)
    assert sizes(eval_split="validation") == (4, 2, 1)
    assert sizes(train_split="train+extra") == (7, 2, 1)
    assert sizes(eval_split="test") == (4, 1, 0)
    assert sizes(eval_split="extra") == (4, 3, 0)
    # Test is trained on, so validation is what is left.
    assert sizes(train_split="train+test") == (5, 2, 0)
    assert sizes(train_split="train+validation") == (6, 1, 0)
    assert sizes(max_rows=2, eval_split="validation", max_eval_rows=1) == (2, 1, 1)
    with pytest.raises(
        ValueError,
        match=r"has no split 'tests'; it has extra, test, train, validation. "
        r"See data.train_split='train' and data.eval_split='tests'",
    ):
        sizes(eval_split="tests")
    with pytest.raises(ValueError, match="has no split 'dev'"):
        sizes(train_split="train+dev")
    with pytest.raises(
        ValueError, match=r"data.eval_split='test' is trained on \(data.train_split='train\+"
    ):
        sizes(train_split="train+test", eval_split="test")


def test_max_rows_are_of_good_rows(tmp_path):
    rows = [*pairs(2), PAIR | {"chosen": ""}, *pairs(1, "q")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    # Where nothing is cut, all rows stay in their order.
    for max_rows in (0, 3, 4):
        rows, ledger = read(path, max_rows=max_rows)
        assert [row.where for row in rows["train"]] == [f"rows.jsonl row {n}" for n in (1, 2, 4)]
    rows, ledger = read(path, max_rows=2)
    assert ledger.train.read == 4 and ledger.train.dropped == {"empty response": 1}
    assert len(rows["train"]) == 2 and ledger.train.not_drawn == 1


def test_read_holds_out_of_only_split(tmp_path):
    rows = [row for i in range(300) for row in pairs(1, f"{i}:") * 3]  # three pairs for each prompt
    write_jsonl(tmp_path / "test.jsonl", rows)
    out, ledger = read(tmp_path, eval_fraction=0.1)
    train, evals, tests = ({row.prompt for row in out[side]} for side in SPLITS)
    assert not train & (evals | tests) and not evals & tests
    assert len(train) + len(evals) + len(tests) == 300
    assert 8 <= len(evals) <= 23 and len(out["eval"]) == 3 * len(evals)
    assert 8 <= len(tests) <= 23 and len(out["test"]) == 3 * len(tests)
    assert ledger.shared_prompts == ledger.shared_test_prompts == 0
    assert ledger.eval.read == len(out["eval"]) and ledger.test.read == len(out["test"])
    assert ledger.train.held_out == ledger.eval.read + ledger.test.read
    assert ledger.train.read == 900 == sum(map(len, out.values()))
    # the side of a prompt depends on nothing but its text: not on other rows, their order, or the
    # kind
    write_jsonl(tmp_path / "test.jsonl", rows[:150:-1])
    again, _ = read(tmp_path, "sft", eval_fraction=0.1)
    left = {row["prompt"] for row in rows[151:]}
    assert {row.prompt for row in again["eval"]} == evals & left
    assert {row.prompt for row in again["test"]} == tests & left
    with pytest.raises(ValueError, match="has no split 'train'; it has test"):
        read(tmp_path, eval_split="test")


# Of p0 to p39, those whose sha256 is in the first tenth.
HELD_OUT = ["p3", "p10", "p12", "p21", "p28", "p37"]


def test_held_out_prompts_are_pinned(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(40))
    assert [row.prompt for row in read(path, eval_fraction=0.1)[0]["eval"]] == HELD_OUT
    few = write_jsonl(tmp_path / "few.jsonl", pairs(3))
    assert [row.prompt for row in read(few, eval_fraction=0.001)[0]["eval"]] == ["p2"]  # the least
    assert [len(side) for side in read(few, eval_fraction=0.0)[0].values()] == [3, 0, 0]
    # One of them is drawn by its hash, and all are kept from training.
    rows, ledger = read(path, eval_fraction=0.1, max_eval_rows=1)
    first = min(HELD_OUT, key=lambda prompt: hash64(json.dumps(prompt)))
    assert [row.prompt for row in rows["eval"]] == [first] != HELD_OUT[:1]
    assert ledger.eval.read == ledger.train.held_out == len(HELD_OUT)
    assert ledger.eval.not_drawn == len(HELD_OUT) - 1


def test_held_out_by_text_without_prompt(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"text {i}"} for i in range(100)])
    rows, ledger = read(path, "sft", eval_fraction=0.2)
    assert sum(map(len, rows.values())) == 100
    assert 5 < len(rows["eval"]) + len(rows["test"]) < 40
    assert ledger.shared_prompts == 0


def test_read_counts_prompts_on_both_sides(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", pairs(4))
    write_jsonl(tmp_path / "test.jsonl", [*pairs(2), *pairs(2), *pairs(3, "new")])
    assert read(tmp_path)[1].shared_prompts == 4


def test_imdb_is_shuffled(tmp_path):
    reviews = [{"text": f"review {i}", "label": int(i >= 50)} for i in range(100)]
    write_parquet(tmp_path / "train-00000-of-00001.parquet", reviews)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", reviews)
    rows, _ = read(tmp_path, "sft", source="imdb", max_rows=20, max_eval_rows=20)
    numbers = [int(row.responses[0].split()[1]) for row in rows["train"]]
    assert numbers != sorted(numbers) and 4 <= sum(number >= 50 for number in numbers) <= 16
    assert rows["train"] == read(tmp_path, "sft", source="imdb", max_rows=20)[0]["train"]
    assert len(rows["eval"]) == len(rows["test"]) == 20


# the hub


# JSON lines for other commands
