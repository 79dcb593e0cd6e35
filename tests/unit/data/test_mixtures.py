"""Mixtures: what data.mix says, which rows are drawn, and that no prompt crosses over."""

import collections
import random

import pytest

from dpo_jax.data import dataset, mixtures, splits
from dpo_jax.data.ledger import Counts, Ledger
from dpo_jax.data.sources import SOURCES
from tests.helpers.letters import letters_tokenizer
from tests.helpers.rows import data_config, pairs, user, write_jsonl, write_parquet


def rows(count, prefix, shared=()):
    """Return pairs with prompts of their own, and pairs with these prompts."""
    found = pairs(count, prefix)
    for number, prompt in enumerate(shared):
        found.append({"prompt": prompt, "chosen": f"yes {prefix}{number}", "rejected": "no"})
    return found


def read(mix, **changes):
    """Return the examples of each split, and the ledger."""
    return splits.read(data_config(mix=mix, **{"eval_fraction": 0.1} | changes), "pairs")


def said(examples):
    return collections.Counter((example.prompt, *example.responses) for example in examples)


@pytest.mark.parametrize(
    "entry, expected",
    [
        ("a/b.jsonl", mixtures.Ingredient("a/b.jsonl", "", "a/b.jsonl", "")),
        (" a.jsonl = 1000 ", mixtures.Ingredient("a.jsonl", "", "a.jsonl", "", rows=1000)),
        (
            "hh@Anthropic/hh-rlhf=50%",
            mixtures.Ingredient("hh@Anthropic/hh-rlhf", "hh", "Anthropic/hh-rlhf", "", share=0.5),
        ),
        (
            "own/name:small[train_prefs]=12.5 %",
            mixtures.Ingredient(
                "own/name:small[train_prefs]", "", "own/name:small", "train_prefs", share=0.125
            ),
        ),
        ("my data/x", mixtures.Ingredient("my data/x", "", "my data/x", "")),
        ("/home/me@here/x.csv", mixtures.Ingredient(*["/home/me@here/x.csv", ""] * 2)),
    ],
)
def test_entry(entry, expected):
    assert mixtures.parse(f"{entry}, other.jsonl", SOURCES)[0] == expected


@pytest.mark.parametrize(
    "mix, reason",
    [
        ("a.jsonl=some", "the amount is a number of rows"),
        ("a.jsonl=-3", "the amount is a number of rows"),
        ("a.jsonl=0.5", "the amount is a number of rows"),
        ("a.jsonl=0", "0 rows are none"),
        ("a.jsonl=0%", "a share is more than 0% and at most 100%"),
        ("a.jsonl=150%", "a share is more than 0% and at most 100%"),
        ("a=b.jsonl=10", "the amount is a number of rows"),
        ("a.jsonl,,b.jsonl", "a path with none of"),
        ("=10", "a path with none of"),
        ("a[train", "a path with none of"),
        ("hhh@a.jsonl", "'hhh' is none of the sources local, hh"),
        ("a.jsonl=1, a.jsonl=2", "this set is named twice"),
        ("owner/name[train], owner/name", "this set is named twice, also as 'owner/name[train]'"),
        ("owner/name[test+train], owner/name[train]", "this set is named twice, also as"),
        ("a.jsonl=1,000", "write the number without commas: a.jsonl=1000."),
        ("a.jsonl=1, 000, b.jsonl", "write the number without commas: a.jsonl=1000."),
        ("my rows/a.jsonl=1,000,000", "without commas: my rows/a.jsonl=1000000."),
        ("a.jsonl=12,5%, b.jsonl", "write the share with a point: a.jsonl=12.5%."),
        ("a.jsonl=1_000", "in digits alone"),
        ("a.jsonl=5k", "in digits alone"),
    ],
)
def test_wrong_mixture(mix, reason):
    with pytest.raises(ValueError, match="data.mix: ") as error:
        mixtures.parse(mix, SOURCES)
    assert reason in str(error.value) and mixtures.GRAMMAR in str(error.value)


def test_one_file_by_several_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", rows(30, "a"))
    write_jsonl(tmp_path / "sub" / "train.jsonl", rows(30, "a"))
    write_jsonl(tmp_path / "sub" / "test.jsonl", rows(30, "b"))
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    for other in ("./a.jsonl", str(tmp_path / "a.jsonl"), "sub/../a.jsonl", "link.jsonl"):
        with pytest.raises(ValueError, match="named twice, also as 'a.jsonl=5'|also as 'a.jsonl'"):
            read(f"a.jsonl=5, {other}=5")
    with pytest.raises(ValueError, match="named twice, also as 'a.jsonl'"):
        read("a.jsonl, a.jsonl[train]")
    with pytest.raises(ValueError, match="named twice, also as 'sub'"):
        read("sub, ./sub[train]")
    # Two splits of one set are two sets.
    assert len(mixtures.parse("sub[train], sub[test]", SOURCES)) == 2


def test_share_without_a_row(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows(20, "a"))
    with pytest.raises(ValueError, match=r"0.001000% of .*a.jsonl are none of its 20 rows"):
        read(f"{tmp_path}/a.jsonl=0.001%", eval_fraction=0.0)


def test_counts_and_shares(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows(500, "a"))
    write_parquet(tmp_path / "b.parquet", rows(1000, "b"))
    write_jsonl(tmp_path / "c.jsonl", rows(50, "c"))
    mix = f"{tmp_path}/a.jsonl=100, {tmp_path}/b.parquet=30%, {tmp_path}/c.jsonl"
    examples, ledger = read(mix)
    of_set = collections.Counter(example.prompt[0] for example in examples["train"])
    held_out = ledger.train.held_out
    assert of_set["a"] == 100
    assert 200 < of_set["b"] < 340  # of about 900
    assert of_set["c"] == 50 - ledger.parts[f"{tmp_path}/c.jsonl"].train.held_out
    assert len(examples["eval"]) == ledger.eval.read and len(examples["test"]) == ledger.test.read
    assert held_out == ledger.eval.read + ledger.test.read and 100 < held_out < 210
    # Every row of every set is somewhere.
    read_of = [part.train.read for part in ledger.parts.values()]
    assert read_of == [500, 1000, 50] and ledger.train.read == 1550
    assert len(examples["train"]) + held_out + ledger.train.not_drawn == 1550
    wheres = {example.where.rpartition(" row ")[0] for example in examples["train"]}
    assert wheres == {f"{tmp_path}/{name}" for name in ("a.jsonl", "b.parquet", "c.jsonl")}


def test_draw_ignores_order_and_grows(tmp_path):
    of_a, of_b = rows(300, "a"), rows(300, "b")
    write_jsonl(tmp_path / "a.jsonl", of_a)
    write_jsonl(tmp_path / "b.jsonl", of_b)
    first, _ = read(f"{tmp_path}/a.jsonl=50, {tmp_path}/b.jsonl=20%", max_eval_rows=20)
    # The files the other way round, in another format, their fields too; the sets the other way.
    random.Random(0).shuffle(of_a)
    turned = [dict(reversed(row.items())) | {"note": None} for row in of_a]
    write_parquet(tmp_path / "a.parquet", turned)
    write_jsonl(tmp_path / "b.jsonl", of_b[::-1])
    second, _ = read(f"{tmp_path}/b.jsonl=20%, {tmp_path}/a.parquet=50", max_eval_rows=20)
    for split in ("train", "eval"):
        assert said(first[split]) == said(second[split])
    assert len(first["eval"]) == 20
    more, _ = read(f"{tmp_path}/a.jsonl=80, {tmp_path}/b.jsonl=40%", max_eval_rows=20)
    assert said(first["train"]) < said(more["train"])


def test_copies_of_a_row_are_counted(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows(5, "a") * 10)
    for count in (1, 7, 23):
        examples, _ = read(f"{tmp_path}/a.jsonl={count}", eval_fraction=0.0)
        assert len(examples["train"]) == count


def test_no_prompt_crosses(tmp_path):
    """What one set evaluates on, another does not train on, whichever way they hold out."""
    prompts = [f"s{i}" for i in range(200)]
    write_jsonl(tmp_path / "x" / "train.jsonl", rows(100, "x", prompts))
    write_jsonl(tmp_path / "x" / "test.jsonl", rows(20, "t", prompts[:40]))
    write_jsonl(tmp_path / "y.jsonl", rows(100, "y", prompts))
    for mix in (f"{tmp_path}/x, {tmp_path}/y.jsonl", f"{tmp_path}/y.jsonl=60%, {tmp_path}/x=80"):
        examples, ledger = read(mix)
        train = {example.prompt for example in examples["train"]}
        held_out = {example.prompt for example in examples["eval"]}
        assert not train & held_out and not train & set(prompts[:40])
        assert {prompt[0] for prompt in held_out} == {"s", "t", "y"}
        assert ledger.shared_prompts == 0
        [x] = [part for name, part in ledger.parts.items() if name.endswith("/x")]
        # Its own 40, and what is held out of y.
        reason = "its prompt is evaluated on"
        assert x.train.filtered[reason] > 40


def test_no_prompt_crosses_between_forms(tmp_path):
    """A question is the same as text, as a user's turn, and with a system text before it."""
    answers = {"chosen": "yes", "rejected": "no"}
    forms = {
        "texts": lambda asked: {"prompt": asked},
        "replies": lambda asked: {"question": asked},
        "with_system": lambda asked: {"system": "Be brief.", "question": asked},
        "chats": lambda asked: {"prompt": [user(asked)]},
    }
    for name, form in forms.items():
        rows_of_form = [form(f"q{number}") | answers for number in range(200)]
        write_jsonl(tmp_path / name / "train.jsonl", rows_of_form)
    # One has a split to evaluate on; the others hold out a part of theirs.
    test = [{"prompt": f"q{number}", **answers} for number in range(30)]
    write_jsonl(tmp_path / "texts" / "test.jsonl", test)
    examples, ledger = read(",".join(str(tmp_path / name) for name in forms))
    train, validation, test = (
        {splits.question(example) for example in examples[split]} for split in splits.SPLITS
    )
    held_out = validation | test
    assert not train & held_out and not validation & test and len(train | held_out) == 200
    assert {f"q{number}" for number in range(30)} < held_out
    assert ledger.shared_prompts == 0


def test_evaluation_is_drawn_by_share(tmp_path):
    for name in "ab":
        write_jsonl(tmp_path / name / "train.jsonl", rows(100, name))
        write_jsonl(tmp_path / name / "test.jsonl", rows(400, f"{name}t"))
    examples, ledger = read(f"{tmp_path}/a, {tmp_path}/b=25%", max_eval_rows=100)
    everything, _ = read(f"{tmp_path}/a, {tmp_path}/b=25%")
    assert len(everything["eval"]) + len(everything["test"]) == 800
    for split in ("eval", "test"):
        of_set = collections.Counter(example.prompt[0] for example in examples[split])
        of_all = collections.Counter(example.prompt[0] for example in everything[split])
        share = of_all["a"] / (of_all["a"] + 0.25 * of_all["b"])
        assert len(examples[split]) == 100 and abs(of_set["a"] - 100 * share) <= 1
        assert {example.subset for example in examples[split]} == {"a", "b"}
    assert ledger.eval.read == 800 and ledger.eval.held_out == ledger.test.read
    assert ledger.eval.not_drawn + ledger.test.not_drawn == 600


def test_sources_and_splits(tmp_path):
    transcripts = []
    for number in range(40):
        prompt = f"\n\nHuman: {number}\n\nAssistant:"
        transcripts.append({"chosen": f"{prompt} yes", "rejected": f"{prompt} no"})
    write_jsonl(tmp_path / "hh" / "train_prefs.jsonl", transcripts)
    write_jsonl(tmp_path / "hh" / "extra.jsonl", transcripts[:5])
    write_jsonl(tmp_path / "own.jsonl", rows(40, "p"))
    mix = f"hh@{tmp_path}/hh[extra]=3, {tmp_path}/own.jsonl=50%"
    examples, _ = read(mix, eval_fraction=0.0)
    of_source = [example.prompt.startswith("\n\nHuman: ") for example in examples["train"]]
    assert sum(of_source) == 3 and of_source[:3] == [True] * 3 and 10 < len(of_source) < 33
    assert examples["train"][0].responses == (" yes", " no")
    assert not examples["eval"]
    with pytest.raises(ValueError, match="has no split 'other'; it has extra, train"):
        read(f"{tmp_path}/hh[other]")


@pytest.mark.parametrize("mixed", [False, True])
def test_rows_of_several_pairs(tmp_path, mixed):
    """A row is drawn, or held out, with all its pairs; the ledger still adds up."""
    scored = []
    for number in range(60):
        completions = []
        for score in range(1 + number % 4):
            completions.append({"response": f"a{score} of {number}", "overall_score": score})
        scored.append({"instruction": f"q{number}", "completions": completions})
    path = write_jsonl(tmp_path / "scored.jsonl", scored)
    where = dict(mix=f"{path}=20") if mixed else dict(path=str(path))
    settings = dict(max_length=40, max_prompt_length=20, truncate="auto", append_eos=True)
    data = data_config(**where, eval_fraction=0.2, on_bad_row="drop", max_dropped=0.5, **settings)
    tokenizer = letters_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    loaded = dataset.load(data, tokenizer, "pairs")
    pairs_of_row = collections.Counter(loaded.train.where)
    assert set(pairs_of_row.values()) <= {1, 3, 6} and 6 in pairs_of_row.values()
    if mixed:
        assert len(pairs_of_row) == 20
    assert not set(loaded.train.where) & set(loaded.eval.where)
    for counts in (loaded.ledger.train, loaded.ledger.eval):
        left_out = sum(counts.filtered.values()) + sum(counts.dropped.values())
        left_out += counts.held_out + counts.not_drawn
        assert counts.read + counts.further_pairs == left_out + counts.kept


def test_too_few_rows(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [*rows(9, "a"), {"prompt": "", "chosen": "", "rejected": ""}])
    with pytest.raises(ValueError, match="a.jsonl has 9 rows to train on, .*; 10 were asked for"):
        read(f"{tmp_path}/a.jsonl=10", eval_fraction=0.0)


def test_path_beside_mixture(tmp_path):
    with pytest.raises(ValueError, match="data.mix and data.path='b.jsonl' cannot both be set"):
        read("a.jsonl", path="b.jsonl")
    with pytest.raises(ValueError, match="the toy makes its own data"):
        read("toy@a.jsonl")
    with pytest.raises(ValueError, match="'imdb' has no pairs"):
        read("imdb@a.jsonl")


def test_load_mixture(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows(60, "a"))
    bad = {"prompt": "p", "chosen": "same", "rejected": "same"}
    write_jsonl(tmp_path / "b.jsonl", [*rows(60, "b"), bad])
    mix = f"{tmp_path}/a.jsonl=20, {tmp_path}/b.jsonl"
    settings = dict(max_length=40, max_prompt_length=20, truncate="auto", append_eos=True)
    data = data_config(mix=mix, eval_fraction=0.2, **settings)
    loaded = dataset.load(data, letters_tokenizer(), "pairs")
    assert len(loaded.train) == loaded.ledger.train.kept
    a, b = loaded.ledger.parts.values()
    assert a.train.kept == 20 and b.train.dropped == {"chosen and rejected are equal": 1}
    assert a.eval.kept + b.eval.kept == len(loaded.eval) == loaded.ledger.eval.kept
    for counts in (a.train, b.train, a.eval, b.eval, loaded.ledger.train, loaded.ledger.eval):
        left_out = sum(counts.filtered.values()) + sum(counts.dropped.values())
        left_out += counts.held_out + counts.not_drawn
        assert counts.read + counts.further_pairs == left_out + counts.kept
    prompt, _, _ = loaded.train.lengths()
    assert loaded.ledger.train.mean_tokens["prompt"] == pytest.approx(prompt.mean())
    table = loaded.ledger.table()
    lines = table.splitlines()
    assert lines[0].split() == ["train", "validation", "test", "[1]", "[2]"]
    kept = [loaded.ledger.train.kept, loaded.ledger.eval.kept, loaded.ledger.test.kept]
    kept += [20, b.train.kept]
    assert ["kept", *map(str, kept)] in [line.split() for line in lines]
    # A count that one set alone has
    label = "  dropped: chosen and rejected are equal"
    [dropped] = [line.removeprefix(label) for line in lines if line.startswith(label)]
    assert dropped.split() == ["1", "0", "0", "0", "1"]
    assert f"[1] training rows of {tmp_path}/a.jsonl" in lines
    assert max(map(len, lines[: lines.index(f"[1] training rows of {tmp_path}/a.jsonl")])) <= 100
    assert set(loaded.ledger.to_dict()["parts"]) == {f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"}


def test_prompts_of_two_sets_are_two_groups(tmp_path):
    for name in ("a", "b"):
        answers = [f"good {name}{number}" for number in range(3)]
        records = []
        for prompt in ("one", "two"):
            for answer in answers:
                records.append({"prompt": prompt, "chosen": answer, "rejected": "no"})
        write_jsonl(tmp_path / f"{name}.jsonl", records)
    settings = dict(max_length=40, max_prompt_length=20, truncate="auto", append_eos=True)
    mix = f"{tmp_path}/a.jsonl, {tmp_path}/b.jsonl"
    data = data_config(mix=mix, eval_fraction=0.0, **settings)
    train = dataset.load(data, letters_tokenizer(), "pairs").train
    found = collections.defaultdict(set)
    for number, group in enumerate(train.groups(32).tolist()):
        file, _, _ = train.where[number].rpartition(" row ")
        found[file, train.prompts[number].tobytes()].add(group)
    # Four groups of three pairs: two prompts of two files.
    assert len(found) == 4 and all(len(groups) == 1 for groups in found.values())
    assert len(set.union(*found.values())) == 4
    alone = dataset.load(
        data_config(path=f"{tmp_path}/a.jsonl", **settings, eval_fraction=0.0),
        letters_tokenizer(),
        "pairs",
    ).train
    assert alone.groups(32).tolist() == [0, 0, 0, 1, 1, 1]


def test_table_of_many_sets():
    """Sets whose columns do not fit have a table each."""
    parts = {f"{number}.jsonl": Ledger(Counts(read=number)) for number in range(20)}
    lines = Ledger.of_parts(parts).table().splitlines()
    assert lines[0].split() == ["train", "validation", "test"]
    assert lines[1].split() == ["rows", "190", "0", "0"]
    own = lines.index("of these, 7.jsonl")
    assert lines[own + 2].split() == ["rows", "7", "0", "0"]


def test_mostly_bad_set_of_a_large_mixture(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows(500, "a"))
    bad = {"prompt": "p", "chosen": "same", "rejected": "same"}
    write_jsonl(tmp_path / "b.jsonl", [*rows(2, "b"), bad])
    settings = dict(max_length=40, max_prompt_length=20, truncate="auto", append_eos=True)
    data = data_config(mix=f"{tmp_path}/a.jsonl, {tmp_path}/b.jsonl", **settings)
    with pytest.raises(ValueError, match="data.mix: .*b.jsonl: 1 of 3 train rows"):
        dataset.load(data, letters_tokenizer(), "pairs")
