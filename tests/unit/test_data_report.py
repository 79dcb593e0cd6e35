"""What `dpo-jax data` finds in small files, against counts by hand, and how it says so."""

import json
import re

import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax import config_files, data_report
from dpo_jax.data import dataset, survey
from dpo_jax.data.ledger import Counts, Ledger
from dpo_jax.data.survey import Cut, Repeats, Survey
from tests.helpers.rows import assistant, pairs, user, write_jsonl
from tests.helpers.tiny_runs import tokenizer

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ ' w1 ' + m.content + (' ' + eos_token if m.role == "
    "'assistant' else '') }}{% endfor %}{% if add_generation_prompt %}{{ ' w1 ' }}{% endif %}"
)


def words(count: int, first: int = 0) -> str:
    """Return so many words of the tiny tokenizer, a token each."""
    return " ".join(f"w{(first + i) % 37}" for i in range(count))


def row(prompt: str, chosen: str, rejected: str) -> dict:
    return dict(prompt=prompt, chosen=chosen, rejected=rejected)


def word_pairs(count: int) -> list[dict]:
    """Return so many different pairs of 1, 2 and 2 words."""
    return [row(f"w{i % 37}", f"w1 w{i % 36}", f"w2 w{i % 35}") for i in range(count)]


def settings(path, **changes):
    """Return the data block of a run on a file, with nothing held out."""
    data = configs.default(()).data
    data.update(dict(path=str(path), eval_fraction=0.0) | changes)
    return data


def look(path, model=None, kind="pairs", shown=3, **changes) -> Survey:
    return survey.take(settings(path, **changes), kind, model, shown=shown)


def setup(choice="", positions=0, dpo=(), **data) -> data_report.Setup:
    """Return what a user has set: fields of config.data and of config.dpo, as texts by name."""
    texts = {f"data.{name}": text for name, text in data.items()}
    texts |= {f"dpo.{name}": text for name, text in dict(dpo).items()}
    config = config_files.load(choice or "dpo")
    config_files.override(config, texts)
    return data_report.Setup(choice, config, texts, positions)


def lines_of(found: Survey, **options) -> list[str]:
    advice = data_report.advise(found, setup(**options))
    return data_report.report(found, "title", advice, data_report.Style(False)).splitlines()


# ---- what is found


def test_lengths_are_those_of_training(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [row(words(3), words(5, first=9), words(2)), *word_pairs(4)]
    )
    model = tokenizer()
    found = look(path, model)
    loaded = dataset.load(settings(path), model, "pairs")
    # BOS before a prompt, EOS behind a response.
    assert [found.lengths[part][0] for part in ("prompt", "chosen", "rejected")] == [4, 6, 3]
    prompt_P, response_PK, _ = loaded.train.lengths()
    assert found.lengths["prompt"].tolist() == prompt_P.tolist()
    assert np.stack([found.lengths["chosen"], found.lengths["rejected"]], 1).tolist() == (
        response_PK.tolist()
    )
    assert found.unit == "tokens"


@pytest.mark.parametrize("max_length", [8, 12, 1000])
def test_ledger_is_that_of_training(tmp_path, max_length):
    rows = [row(words(6), words(n), words(n - 1, first=n % 2)) for n in range(2, 12)]
    rows += [row(words(2), words(2), words(2)), row(words(9), words(9), words(9) + " w30")]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", [row(words(6), words(9), words(8))])
    limits = dict(max_length=max_length, max_prompt_length=4, max_dropped=1.0)
    found = look(tmp_path, tokenizer(), **limits)
    loaded = dataset.load(settings(tmp_path, **limits), tokenizer(), "pairs")
    assert found.ledger == loaded.ledger
    assert found.uses == {"train": "train", "test": "eval"}


def test_lengths_in_characters(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [row("abc", "four", "sixsix")])
    found = look(path)
    assert {part: lengths.tolist() for part, lengths in found.lengths.items()} == {
        "prompt": [3],
        "chosen": [4],
        "rejected": [6],
    }
    assert found.unit == "characters" and found.cuts == []
    assert found.ledger.train.kept == 1


def test_cost_of_a_cut(tmp_path):
    # With BOS and EOS: 601 + 101 tokens, 101 + 601, 11 + 6, and 6 tokens of the other responses.
    rows = [
        row(words(600), words(100), words(5)),
        row(words(100), words(600, first=9), words(5)),
        row(words(10), words(5), words(5, first=9)),
    ]
    found = look(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer())
    cut = found.cut_at(512)
    # The first prompt is cut to 256 tokens; the second row's chosen response to 512 - 101.
    assert (cut.rows, cut.prompts, cut.responses, cut.dropped) == (2, 1, 1, 0)
    assert cut.tokens == (601 - 256) + (601 - (512 - 101))
    total = (601 + 101 + 6) + (101 + 601 + 6) + (11 + 6 + 6)
    assert cut.share_of_tokens == pytest.approx(cut.tokens / total)
    assert cut.share_of_rows == pytest.approx(2 / 3)
    assert cut.share_of_responses == pytest.approx(1 / 6)
    assert [(cut.max_length, cut.rows) for cut in found.cuts] == [(512, 2), (1024, 0), (2048, 0)]
    assert found.cut_at(1024).max_prompt_length == 512


def test_rows_that_are_equal_once_cut(tmp_path):
    rows = [row(words(1), words(600), words(600) + " w3"), *word_pairs(3)]
    found = look(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer(), max_dropped=1.0)
    cut = found.cut_at(512)
    assert (cut.rows, cut.dropped) == (1, 1)
    # All tokens of the row are lost.
    assert cut.tokens == 2 + 601 + 602
    assert found.ledger.train.kept == 3


def test_own_length_is_measured_too(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [row(words(6), words(5), words(3))])
    found = look(path, tokenizer(), max_length=10, max_prompt_length=5)
    assert [cut.max_length for cut in found.cuts] == [10, 512, 1024, 2048]
    # 7 + 6 tokens: the prompt loses 2, and the chosen response has room for 5 after it.
    assert (found.cut_at(10).tokens, found.cut_at(10).max_prompt_length) == (3, 5)


@pytest.mark.parametrize("has_model", [False, True])
def test_weights_and_margins_are_shown(tmp_path, has_model):
    rows = [pair | dict(votes=i % 3, gap=-i) for i, pair in enumerate(word_pairs(6))]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = look(
        path, tokenizer() if has_model else None, weight="votes", margin="gap", eval_fraction=0
    )
    lines = [" ".join(line.split()) for line in lines_of(found)]
    # Rows are cut to several lengths, and counted once.
    assert "weights, sum 6 0 0" in lines and "target margins, least -5 0 0" in lines
    assert "rows.jsonl row 1, weight 0, target margin 0" in lines
    with pytest.raises(
        ValueError, match="config.data.weight = 'votes': expected empty, as the row"
    ):
        data_report.look(setup(weight="votes", path=str(path)), "sft", None, shown=0)


def test_rows_of_a_prompt(tmp_path):
    rows = []
    for prompt, count in (("a", 1), ("b", 2), ("c", 2), ("d", 4), ("e", 7)):
        rows += [row(prompt, f"good {i}", f"bad {i}") for i in range(count)]
    found = look(write_jsonl(tmp_path / "a.jsonl", rows))
    assert sorted(found.rows_per_prompt) == [1, 2, 2, 4, 7]
    table = [line.split() for line in lines_of(found)]
    start = table.index(["Pairs", "of", "a", "prompt", "prompts"])
    found_groups = [(line[:-2], line[-2]) for line in table[start + 1 : start + 5]]
    assert found_groups == [
        (["1"], "1"),
        (["2"], "2"),
        (["3", "to", "5"], "1"),
        (["6", "or", "more"], "1"),
    ]
    assert "5 prompts have 16 pairs, 7 at most" in lines_of(found)


def test_rows_without_prompts(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    found = look(path, kind="sft")
    assert not len(found.rows_per_prompt)
    assert "the rows have no prompts" in lines_of(found)


def test_repeats(tmp_path):
    train = [
        row("A prompt.", "x", "y"),
        row("A prompt.", "x", "y"),  # the same again
        row("A prompt.", "y", "x"),  # the other way round, to both
        row("Another  one.", "x", "y"),
    ]
    evals = [row("A prompt.", "x", "z"), row("another one. ", "x", "z"), row("New.", "x", "z")]
    write_jsonl(tmp_path / "train.jsonl", train)
    write_jsonl(tmp_path / "validation.jsonl", evals)
    tests = [row("Another  one.", "x", "z"), row("ANOTHER one.", "x", "z"), row("Other.", "x", "z")]
    write_jsonl(tmp_path / "test.jsonl", [*tests, row("One more.", "x", "z")])
    found = look(tmp_path)
    assert found.repeats == Repeats(
        eval_prompts_in_train=1,
        eval_prompts_nearly_in_train=2,
        test_prompts_in_train=1,
        test_prompts_nearly_in_train=2,
        train_rows_repeated=1,
        train_pairs_reversed=3,
    )
    assert found.repeats.eval_prompts_in_train == found.ledger.shared_prompts
    assert found.repeats.test_prompts_in_train == found.ledger.shared_test_prompts
    said = [" ".join(line.split()) for line in lines_of(found)]
    assert "validation rows whose prompt is trained on 1 of 3 (33 %)" in said
    assert "test rows whose prompt is trained on 1 of 4 (25 %)" in said
    assert "training pairs that are there the other way round, too 3 of 4 (75 %)" in said
    assert sum(line.startswith("warning: some p") for line in said) == 2


def test_kind_is_found(tmp_path):
    def kind_of(*rows, **changes):
        return survey.find_kind(settings(write_jsonl(tmp_path / "a.jsonl", rows), **changes))

    pair, completion = row("a", "b", "c"), {"prompt": "a", "completion": "b"}
    assert kind_of(pair) == "pairs"
    assert kind_of(completion) == "sft"
    assert kind_of(completion | {"label": False}) == "unpaired"
    assert kind_of({"prompt": "a"}, pair) == "pairs"  # the first row is broken
    assert kind_of(row("a", "b", "b"), pair) == "pairs"
    assert kind_of({"text": "a"}, source="imdb") == "sft"
    completions = write_jsonl(tmp_path / "b.jsonl", [completion])
    both = write_jsonl(tmp_path / "c.jsonl", [pair])
    for mix, kind in ((f"{both}=1,{completions}", "pairs"), (f"{completions},{both}", "sft")):
        assert survey.find_kind(settings("", mix=mix)) == kind


def test_labelled_rows_that_do_not_balance(tmp_path):
    rows = [dict(prompt=f"p{i}", completion="c", label=i % 4 == 0) for i in range(80)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", rows[:2])
    found = look(tmp_path, kind="unpaired")
    said = [" ".join(line.split()) for line in lines_of(found)]
    assert "desirable 20 1 0" in said and "undesirable 60 1 0" in said
    assert "--- desirable completion" in said and "--- completion" not in said
    advice = data_report.advise(found, setup(path=str(tmp_path)))
    assert "--config=kto" in advice.command
    assert "config.kto.desirable_weight between 3 and 4" in " ".join(advice.warnings)


def test_mixture(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", word_pairs(20))
    write_jsonl(tmp_path / "b.jsonl", [row(f"w3 w{i}", "w1", "w2") for i in range(10)])
    mix = f"{tmp_path}/a.jsonl=8,{tmp_path}/b.jsonl"
    found = look("", tokenizer(), mix=mix)
    loaded = dataset.load(settings("", mix=mix), tokenizer(), "pairs")
    assert found.ledger == loaded.ledger
    assert found.lengths["prompt"].tolist() == loaded.train.lengths()[0].tolist()
    lines = [line.split() for line in lines_of(found)]
    start = next(i for i, line in enumerate(lines) if line[:1] == ["Sets"])
    assert lines[start + 1 : start + 3] == [
        [f"{tmp_path}/a.jsonl", "8", "12", "0", "0"],
        [f"{tmp_path}/b.jsonl", "10", "0", "0", "0"],
    ]


def test_cuts_of_a_mixture_are_each_set_s_own(tmp_path):
    article = dict(article=words(700), highlights="w1")
    write_jsonl(tmp_path / "a.jsonl", [article])
    write_jsonl(tmp_path / "b.jsonl", [dict(prompt=words(700), completion="w1")])
    mix = f"cnn_dailymail@{tmp_path}/a.jsonl,{tmp_path}/b.jsonl"
    found = look("", tokenizer(), kind="sft", mix=mix)
    assert found.truncate == ("keep_cue", "keep_end")
    assert (found.cut_at(512).rows, found.cut_at(512).prompts) == (2, 2)
    text = " ".join(" ".join(lines_of(found)).split())
    assert "or the end of the prompt stays (data.truncate=keep_end)" in text


def test_progress_is_said_row_by_row(tmp_path):
    said = []
    path = write_jsonl(tmp_path / "a.jsonl", pairs(3))
    survey.take(settings(path), "pairs", progress=said.append)
    assert said == [1, 2, 3]


def test_bad_rows_are_counted_with_the_words_of_training(tmp_path):
    rows = [*pairs(3), {"prompt": "a", "chosen": 3, "rejected": "b"}, *pairs(3, prefix="q")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    found = look(path)
    assert found.ledger.train.kept == 6 and sum(found.ledger.train.dropped.values()) == 1
    with pytest.raises(ValueError, match="row 4") as stopped:
        dataset.load(settings(path), tokenizer(), "pairs")
    assert found.refusal == str(stopped.value)
    advice = data_report.advise(found, setup(path=str(path)))
    assert "--config.data.on_bad_row=drop" in advice.command
    assert "--config.data.max_dropped=0.15" in advice.command  # one of seven rows
    assert any("training would stop" in warning for warning in advice.warnings)


def test_too_many_rows_that_are_dropped_anyway(tmp_path):
    """Equal answers never stop training by themselves: on_bad_row=drop would change nothing."""
    same = {"prompt": "a", "chosen": "w1", "rejected": "w1"}
    path = write_jsonl(tmp_path / "a.jsonl", [*pairs(3), same, *pairs(3, prefix="q")])
    advice = data_report.advise(look(path), setup(path=str(path)))
    assert "on_bad_row" not in advice.command
    assert "--config.data.max_dropped=0.15" in advice.command
    assert not any("on_bad_row" in reason for reason in advice.reasons)


def test_data_without_a_good_row_is_refused_in_the_words_of_training(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"colour": "red"}, {"colour": "blue"}])
    with pytest.raises(ValueError, match="a.jsonl row 1"):
        look(path)


def test_a_cue_that_is_cut_off_is_a_refusal(tmp_path):
    post = row("POST: " + words(30) + "\n\nTL;DR:", words(6), words(7))
    path = write_jsonl(tmp_path / "a.jsonl", [post] * 2)
    limits = dict(source="tldr", max_length=20, max_prompt_length=10, truncate="keep_start")
    model = tokenizer()
    model.add_tokens(["TL;DR:"])
    found = look(path, model, **limits)
    assert "have lost their end" in found.refusal


def test_shown_rows_have_marks_and_special_tokens(tmp_path):
    model = tokenizer()
    model.chat_template = CHAT
    messages = [user("w2"), assistant("w3 w4"), user("w5"), assistant("w6")]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    found = look(path, model, kind="sft")
    lines = lines_of(found)
    start = lines.index("a.jsonl row 1")
    assert lines[start + 1] == "--- prompt, 4 tokens"
    assert lines[start + 2].split() == ["<s>", "w1", "w2", "w1"]
    assert lines[start + 3] == "--- completion, 5 tokens trained on"
    marked = re.findall("⟦(.*?)⟧", lines[start + 4])
    assert [text.split() for text in marked] == [["w3", "w4", "</s>"], ["w6", "</s>"]]
    (unmarked,) = re.findall("⟧(.*?)⟦", lines[start + 4])
    assert unmarked.split() == ["w1", "w5", "w1"]
    assert (found.trained_on["completion"].tolist(), found.lengths["completion"].tolist()) == (
        [5],
        [8],
    )
    assert any("62 % of the tokens of the responses are trained on" in line for line in lines)


def test_chat_rows_without_a_tokenizer(tmp_path):
    given = {"prompt": [user("Hi")], "chosen": [assistant("Yes")], "rejected": [assistant("No")]}
    lines = lines_of(look(write_jsonl(tmp_path / "a.jsonl", [given])))
    start = lines.index("a.jsonl row 1")
    assert lines[start + 1 : start + 7] == [
        "--- prompt",
        "user: Hi",
        "--- chosen",
        "assistant: ⟦Yes⟧",
        "--- rejected",
        "assistant: ⟦No⟧",
    ]
    assert any("Pass --model=DIR_OR_HUB_NAME" in line for line in lines)


def test_rows_to_show_are_from_all_over(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", word_pairs(100))
    for model in (None, tokenizer()):
        numbers = [int(row.where.split()[-1]) for row in look(path, model, shown=3).rows]
        assert len(numbers) == 3 and numbers[0] == 1 and numbers[1] > 30 and numbers[2] > 60
        assert look(path, model, shown=0).rows == []


def test_long_texts_are_shortened():
    piece = survey.Piece("a" * 300 + "b" * 1234 + "c" * 200, True)
    shown = data_report._piece(piece, data_report.Style(False))
    assert shown == "⟦" + "a" * 300 + " [... 1,234 characters ...] " + "c" * 200 + "⟧"


# ---- how it is said


def test_histogram():
    lengths = np.array([0, 1, 2, 2, 63, 64, 900])
    assert data_report.histogram(lengths, 64) == "▆▆" + " " * 29 + "█"
    one_of_eight = np.array([0] * 8 + [63])
    assert data_report.histogram(one_of_eight, 64) == "█" + " " * 30 + "▁"


@pytest.mark.parametrize(
    ("length", "end"), [(1, 32), (32, 32), (33, 48), (48, 48), (49, 64), (100, 128), (400, 512)]
)
def test_axis_ends_at_a_round_number(length, end):
    assert data_report._axis_end(length) == end


def a_survey(*, lengths=((4, 5),), cuts=(), kept=20_000, unit="tokens", **fields) -> Survey:
    """Return a survey of pairs, with numbers as given; cuts: (max_length, share of rows cut)."""
    measured = []
    for max_length, share in cuts:
        rows = round(share * kept)
        numbers = dict(rows=rows, prompts=rows, responses=0, dropped=0, tokens=rows)
        shares = dict(share_of_rows=share, share_of_responses=0.0, share_of_tokens=share)
        measured.append(Cut(max_length, max_length // 2, **numbers, **shares))
    chosen, rejected = np.array(lengths).T
    return Survey(
        kind="pairs",
        unit=unit,
        truncate=("keep_end",),
        uses={"train": "train"},
        ledger=Ledger(train=Counts(read=kept, kept=kept)),
        lengths={"prompt": np.array([3]), "chosen": chosen, "rejected": rejected},
        trained_on={"chosen": chosen, "rejected": rejected},
        rows_per_prompt=np.ones(1, int),
        repeats=Repeats(0, 0, 0, 0, 0, 0),
        cuts=measured,
        rows=[],
        **fields,
    )


def test_cut_chat_prompts(tmp_path):
    """They are told in training's words, with the lengths that the command then has."""
    rows = []
    for number in range(20):
        asked = user(words(600, first=number))
        rows.append(dict(prompt=[asked], chosen=[assistant("w1")], rejected=[assistant("w2")]))
    path = write_jsonl(tmp_path / "chats.jsonl", rows)
    model = tokenizer()
    model.chat_template = CHAT
    found = look(path, model)
    assert found.ledger == dataset.load(settings(path), model, "pairs").ledger
    advice = data_report.advise(found, setup(path=str(path)))
    assert advice.warnings[0] == (
        "20 of 20 chat prompts are cut to 256 tokens, and lose the start: system text and tool "
        "definitions. Pass --config.data.max_length=704 --config.data.max_prompt_length=640."
    )
    text = " ".join(advice.command)
    assert "--config.data.max_length=704 --config.data.max_prompt_length=640" in text
    longer = dict(max_length=704, max_prompt_length=640)
    found = look(path, model, **longer)
    assert not found.ledger.train.prompts_truncated and not found.ledger.train.warnings


def test_length_bias_is_said():
    found = a_survey(lengths=[(10, 5), (8, 8), (3, 4), (9, 1)])
    (line,) = [line for line in lines_of(found) if line.startswith("chosen minus rejected")]
    assert line.startswith(
        "chosen minus rejected: +3.0 tokens trained on, on average; chosen is the longer"
    )
    text = " ".join(lines_of(found))
    assert "in 50 % of the pairs, the shorter one in 25 %" in " ".join(text.split())
    assert "warning: chosen responses are 67 % longer than rejected ones" in text


@pytest.mark.parametrize(
    ("shares", "positions", "added"),
    [
        ((0.01, 0.0, 0.0), 0, None),
        ((0.2, 0.03, 0.0), 0, (1024, 512)),
        ((0.9, 0.3, 0.02), 0, (2048, 1024)),
        ((0.9, 0.8, 0.7), 0, (2048, 1024)),  # as good as it gets
        ((0.9, 0.3, 0.02), 1024, (1024, 512)),  # all that the model has
        ((0.9, 0.3, 0.02), 512, None),
        ((0.9, 0.3, 0.02), 400, (400, 200)),
    ],
)
def test_recommended_length(shares, positions, added):
    found = a_survey(cuts=zip((512, 1024, 2048), shares, strict=True))
    advice = data_report.advise(found, setup(positions=positions, path="P"))
    flags = [word for word in advice.command if "length" in word]
    if added is None:
        assert flags == []
    else:
        assert flags == [
            f"--config.data.max_length={added[0]}",
            f"--config.data.max_prompt_length={added[1]}",
        ]
    # Who has chosen a length keeps it.
    kept = data_report.advise(found, setup(positions=positions, max_length="512"))
    assert [word for word in kept.command if "length" in word] == ["--config.data.max_length=512"]
    text = " ".join(kept.warnings)
    assert ("90 % of the rows are cut at data.max_length=512" in text) == (shares[0] == 0.9)
    assert ("but the model has 400 positions" in text) == (positions == 400)
    assert not any("positions" in warning for warning in advice.warnings)


@pytest.mark.parametrize("rows", [1, 7, 63, 64, 2000, 9600, 9664, 30_000])
def test_recommended_steps_fit_the_data(rows):
    command = data_report.advise(a_survey(kept=rows), setup(path="P")).command
    texts = dict(word.removeprefix("--config.").split("=", 1) for word in command[3:])
    texts.pop("--config", None)
    config = config_files.load("dpo")
    config_files.override(config, {field: texts[field] for field in texts if "." in field})
    steps = rows // config.dpo.batch_size
    assert steps >= 1
    assert config.dpo.warmup_steps < steps
    assert config.dpo.eval_every < max(steps, 2)
    is_default = config.dpo.to_dict() == config_files.load("dpo").dpo.to_dict()
    assert is_default == (rows > 312 * 64)


def test_steps_that_the_user_set_stay():
    def flags_of(choice="", **texts):
        command = data_report.advise(a_survey(kept=1000), setup(choice, dpo=texts)).command
        return [word.removeprefix("--config.dpo.") for word in command if "dpo." in word]

    assert flags_of() == ["warmup_steps=1", "eval_every=3"]
    assert flags_of(warmup_steps="2") == ["warmup_steps=2", "eval_every=3"]
    # 1000 steps, longer than warm-up and eval_every.
    assert flags_of(batch_size="1") == ["batch_size=1"]
    assert flags_of(choice="dpo", steps="400") == ["steps=400"]


def test_control_characters_are_visible():
    style = data_report.Style(True)
    assert data_report._piece(survey.Piece("a\x1b[2J\r\n\tb\ud800", False), style) == "a␛[2J␍\n\tb?"


def test_command_has_what_the_user_set():
    found = a_survey()
    given = setup(path="my file.jsonl", columns="prompt=question,chosen=good")
    assert data_report.advise(found, given).command == [
        *("python", "-m", "dpo_jax.train", "--config=dpo", "--config.model.path=MODEL"),
        "'--config.data.path=my file.jsonl'",
        "--config.data.columns=prompt=question,chosen=good",
        *("--config.dpo.eval_every=78",),
    ]
    assert "--config=hh" in data_report.advise(found, setup(choice="hh")).command


def test_colours_only_where_they_are_wanted(tmp_path):
    found = look(write_jsonl(tmp_path / "a.jsonl", pairs(3)))
    advice = data_report.advise(found, setup())
    plain = data_report.report(found, "title", advice, data_report.Style(False))
    coloured = data_report.report(found, "title", advice, data_report.Style(True))
    assert "\033" not in plain
    assert f"{data_report.GREEN}⟦good 0⟧{data_report.PLAIN}" in coloured
    assert re.sub("\033\\[\\d+m", "", coloured) == plain


def test_numbers_as_json(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*word_pairs(4), row("w0", "w3", "w4")])
    found = look(path, tokenizer())
    advice = data_report.advise(found, setup(path=str(path)))
    numbers = json.loads(json.dumps(data_report.to_dict(found, advice)))
    assert numbers["prompts_by_rows"] == {"1": 3, "2": 1}
    assert numbers["ledger"]["train"]["kept"] == 5
    assert numbers["lengths"]["chosen"]["longest"] == 3
    assert [cut["max_length"] for cut in numbers["cuts"]] == [512, 1024, 2048]
    assert numbers["command"].startswith("python -m dpo_jax.train --config=dpo ")
