"""The score command: what it adds to each row."""

import datetime
import json
import re
from unittest import mock

import jax
import numpy as np
import pyarrow.parquet
import pytest

from dpo_jax import score
from dpo_jax.models import families, hf
from dpo_jax.training.metrics import read_rows
from tests.helpers.rows import write_jsonl
from tests.helpers.tiny_models import random_params
from tests.helpers.tiny_runs import (
    dpo_config,
    on_devices,
    run,
    sample_file,
    score_file,
    scratch_config,
    write_model,
    write_pairs,
)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    model, pairs = write_model(folder / "model"), write_pairs(folder / "pairs.jsonl", count=21)
    score_file(model, pairs, folder / "out.jsonl")
    return folder, [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_score_rows_in_order(scored):
    folder, rows = scored
    given = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    added = {"logp_chosen", "logp_rejected", "tokens_chosen", "tokens_rejected"}
    assert [{k: v for k, v in row.items() if k not in added} for row in rows] == given
    # EOS included.
    assert all(row["tokens_chosen"] == len(row["chosen"].split()) + 1 for row in rows)


def test_score_equals_training_log(scored, tmp_path):
    """The first batch's log-probs, before any update, are the scores' means over the same rows."""
    folder, rows = scored
    config = dpo_config(
        folder / "model",
        folder / "pairs.jsonl",
        steps=1,
        batch_size=8,
        data__shuffle=False,
        data__eval_fraction=1e-9,
    )
    row = read_rows(run(config, tmp_path) / "metrics.jsonl")[1]
    held_out = json.loads((tmp_path / "dpo" / "ledger.json").read_text())["train"]["held_out"]
    assert held_out == 1  # one prompt at least is held out: find which, and leave it out here too
    candidates = [[r for r in rows if r["prompt"] != out["prompt"]][:8] for out in rows]
    means = [
        (np.mean([r["logp_chosen"] for r in c]), np.mean([r["logp_rejected"] for r in c]))
        for c in candidates
    ]
    found = (row["logps_train/chosen"], row["logps_train/rejected"])
    assert min(np.abs(np.array(means) - found).max(axis=1)) < 1e-3


def test_score_writes_other_types_as_text(scored, tmp_path):
    folder, _ = scored
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    table = {name: [row[name] for row in rows] for name in rows[0]} | {
        "when": [datetime.datetime(2024, 2, 29)] * 21
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "pairs.parquet")
    score_file(folder / "model", tmp_path / "pairs.parquet", tmp_path / "out.jsonl")
    assert (
        json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["when"]
        == "2024-02-29 00:00:00"
    )


def test_score_refuses_existing_file(scored):
    folder, _ = scored
    before = (folder / "out.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="the file exists. Give another name"):
        score_file(folder / "model", folder / "pairs.jsonl", folder / "out.jsonl")
    assert (folder / "out.jsonl").read_bytes() == before


def test_score_folder_with_other_split(scored, tmp_path):
    folder, rows = scored
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text((folder / "pairs.jsonl").read_text())
    score_file(folder / "model", tmp_path / "data", tmp_path / "out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == rows


def test_score_names_bad_row(scored, tmp_path):
    folder, _ = scored
    good, bad = (
        '{"prompt": "w1", "chosen": "w2", "rejected": "w3"}',
        '{"prompt": "w1", "chosen": 3}',
    )
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{bad}\n")
    with pytest.raises(ValueError, match="bad.jsonl row 2"):
        score_file(folder / "model", tmp_path / "bad.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


# every row is kept


def score_rows(folder, tmp_path, rows, **options):
    """Score rows; return the lines written."""
    write_jsonl(tmp_path / "rows.jsonl", rows)
    score_file(folder / "model", tmp_path / "rows.jsonl", tmp_path / "out.jsonl", **options)
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_score_equal_and_empty_answers(scored, tmp_path):
    """They teach nothing, and have log-probs like any other."""
    folder, _ = scored
    rows = [
        dict(prompt="w1", chosen="w2 w3", rejected="w2 w3"),
        dict(prompt="w1", chosen="w2 w3", rejected=""),
        dict(prompt="w1", chosen="", rejected=""),
    ]
    equal, half, empty = score_rows(folder, tmp_path, rows)
    assert equal["logp_chosen"] == equal["logp_rejected"] == pytest.approx(half["logp_chosen"])
    assert equal["tokens_chosen"] == 3 and half["tokens_rejected"] == 1  # EOS alone
    assert empty["logp_chosen"] == pytest.approx(half["logp_rejected"], abs=1e-4)


def test_score_completions(scored, tmp_path, capsys):
    """Rows of one completion, liked or not, beside pairs."""
    folder, _ = scored
    rows = [
        dict(prompt="w1", completion="w2 w3"),
        dict(prompt="w1", chosen="w2 w3", rejected="w4"),
        dict(prompt="w1", completion="w4", label=False),
    ]
    liked, pair, other = score_rows(folder, tmp_path, rows)
    assert liked["logp"] == pytest.approx(pair["logp_chosen"], abs=1e-4) and liked["tokens"] == 3
    assert other["logp"] == pytest.approx(pair["logp_rejected"], abs=1e-4)
    assert "scored 1 pairs and 2 completions" in capsys.readouterr().out


def test_score_several_pairs_of_a_row(scored, tmp_path):
    """A line for each, with the pair's own answers."""
    folder, _ = scored
    answers = [dict(answer="w3", rank=2), dict(answer="w2", rank=1), dict(answer="w4", rank=3)]
    rows = [dict(prompt="w1", answers=answers, id=7), dict(prompt="w1", chosen="w2", rejected="w3")]
    *lines, pair = score_rows(folder, tmp_path, rows)
    said = [(line["chosen"], line["rejected"]) for line in lines]
    assert len(lines) == 3 and all(line["id"] == 7 for line in lines)
    assert [tuple(map(str.strip, texts)) for texts in said] == [
        ("w2", "w3"),
        ("w2", "w4"),
        ("w3", "w4"),
    ]
    assert lines[0]["logp_chosen"] == lines[1]["logp_chosen"]
    assert lines[0]["logp_chosen"] == pytest.approx(pair["logp_chosen"], abs=1e-4)


def test_score_says_why_a_row_is_unscored(scored, tmp_path, capsys):
    folder, _ = scored
    rows = [
        dict(prompt="w1", chosen="w2", rejected="w3"),
        dict(prompt="w1", chosen="w2", rejected=4),
        dict(prompt="w1", answers=[dict(answer="w3", rank=1), dict(answer="w4", rank=1)]),
    ]
    with pytest.raises(ValueError, match="rows.jsonl row 2: .*\n.*\n.*\n.*--on_bad_row=drop"):
        score_rows(folder, tmp_path, rows)
    settings = dict(on_bad_row="drop")  # whatever their share is
    good, bad, *tie = score_rows(folder, tmp_path, rows, settings=settings)
    assert "unscored" not in good and good["logp_chosen"] < 0
    assert "'rejected' is not text" in bad["unscored"] and bad["rejected"] == 4
    # No answer is better, so there is no pair: each is a completion.
    assert [line["completion"].strip() for line in tie] == ["w3", "w4"]
    assert tie[0]["logp"] == pytest.approx(good["logp_rejected"], abs=1e-4)
    assert all(line["answers"] == rows[2]["answers"] for line in tie)
    told = capsys.readouterr().out
    assert "scored 1 pairs and 2 completions into" in told
    assert "not to be scored: 1 x field 'rejected' is not text (rows.jsonl row 2)" in told
    # There is one split, and nothing is held out.
    assert re.search(r"^rows +3$", told, re.M) and "eval" not in told


def test_score_keeps_all_rows_however_many_are_bad(scored, tmp_path, capsys):
    folder, _ = scored
    rows = [dict(prompt="w1", chosen="w2", rejected=number) for number in range(3)]
    lines = score_rows(folder, tmp_path, rows, settings=dict(on_bad_row="drop"))
    assert [line["rejected"] for line in lines] == [0, 1, 2]
    assert all("'rejected' is not text" in line["unscored"] for line in lines)
    assert "scored nothing into" in capsys.readouterr().out


def test_score_names_its_own_flags(scored, tmp_path):
    """A message for training names fields of a config, which these commands do not have."""
    folder, _ = scored
    row = dict(prompt="w1", chosen="w2", rejected="w3", images=["a"])
    with pytest.raises(ValueError, match="with --ignore=images") as told:
        score_rows(folder, tmp_path, [row])
    assert "data." not in str(told.value)
    with pytest.raises(FileNotFoundError, match="^--data='.*missing"):
        score_file(folder / "model", tmp_path / "missing", tmp_path / "out.jsonl")


def test_score_reports_accuracy(scored, tmp_path, capsys):
    """In all pairs and in each subset, in sum, per token and against a reference."""
    folder, _ = scored
    rows = []
    for number, subset in enumerate(["easy", "hard", "easy", "hard", "hard", "easy"]):
        chosen, rejected = f"w{number} w{number + 9}", f"w{30 - number}"
        rows.append(dict(prompt="w1", chosen=chosen, rejected=rejected, subset=subset))
    other = write_model(tmp_path / "other", scale=5)
    capsys.readouterr()
    lines = score_rows(folder, tmp_path, rows, reference=str(other))
    told = capsys.readouterr().out.splitlines()

    def rates(some):
        sums = np.array([[line["logp_chosen"], line["logp_rejected"]] for line in some])
        lengths = np.array([[line["tokens_chosen"], line["tokens_rejected"]] for line in some])
        theirs = np.array(
            [[line["reference_logp_chosen"], line["reference_logp_rejected"]] for line in some]
        )
        compared = (sums, sums / lengths, sums - theirs, (sums - theirs) / lengths)
        return [f"{(values[:, 0] > values[:, 1]).mean():.1%}" for values in compared]

    heads = "chosen more likely than rejected, by pairs prompts log-prob per token log-ratio"
    title = told.index(next(line for line in told if line.split()[:2] == ["chosen", "more"]))
    assert " ".join(told[title].split()).startswith(heads)
    subsets = dict(all=lines)
    for name in ("easy", "hard"):
        subsets[name] = [line for line in lines if line["subset"] == name]
    for row, (name, some) in zip(told[title + 1 : -1], subsets.items(), strict=True):
        # All have one prompt, so that nothing is known of the error.
        assert row.split() == [name, str(len(some)), "1", *rates(some)]
    # The other model is a model of its own.
    score_file(other, tmp_path / "rows.jsonl", tmp_path / "other.jsonl")
    its = [json.loads(line) for line in (tmp_path / "other.jsonl").read_text().splitlines()]
    assert [line["logp_chosen"] for line in its] == [
        line["reference_logp_chosen"] for line in lines
    ]


def test_score_refuses_reference_of_another_vocabulary(scored, tmp_path):
    folder, _ = scored
    shape, other = scratch_config().model.scratch.to_dict(), tmp_path / "other"
    config = families.from_hf(hf.make_config(shape))
    hf.save(other, config, hf.make_config(shape), jax.device_put(random_params(config)))
    with pytest.raises(ValueError, match="other has a vocabulary of 128, .*one of 40"):
        score_file(
            folder / "model", folder / "pairs.jsonl", tmp_path / "out.jsonl", reference=str(other)
        )
    assert not (tmp_path / "out.jsonl").exists()


def test_score_of_one_split(scored, tmp_path):
    folder, rows = scored
    text = (folder / "pairs.jsonl").read_text()
    (tmp_path / "data").mkdir()
    for name in ("filtered", "raw"):
        (tmp_path / "data" / f"{name}-00000-of-00001.jsonl").write_text(text)
    with pytest.raises(ValueError, match="has the splits filtered, raw: choose one by --split"):
        score_file(folder / "model", tmp_path / "data", tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="--split=test: .* has no such split; it has filtered"):
        score_file(folder / "model", tmp_path / "data", tmp_path / "out.jsonl", split="test")
    score_file(folder / "model", tmp_path / "data", tmp_path / "out.jsonl", split="raw")
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == rows


# implicit rewards, single tokens, next tokens


@pytest.fixture(scope="module")
def compared(scored, tmp_path_factory):
    """Return the lines of pairs and completions under two models, and what was said of them."""
    folder, _ = scored
    work = tmp_path_factory.mktemp("compared")
    other = write_model(work / "other", scale=5)
    rows = []
    for number in range(12):
        prompt = f"w{number // 3}"
        rows.append(dict(prompt=prompt, chosen=f"w{number} w3", rejected=f"w{30 - number} w1 w2"))
    rows += [dict(prompt="w5 w6", completion="w7 w8"), dict(prompt="w5 w6", completion="")]
    path = write_jsonl(work / "rows.jsonl", rows)
    options = dict(reference=str(other), per_token=True, top=3)
    with mock.patch.object(score, "say") as say:
        score_file(folder / "model", path, work / "out.jsonl", beta=0.5, **options)
    told = "\n".join(call.args[0] for call in say.call_args_list)
    lines = [json.loads(line) for line in (work / "out.jsonl").read_text().splitlines()]
    return folder, work, options, lines, told


def test_score_implicit_rewards(compared):
    _, _, _, lines, told = compared
    margins = []
    for line in lines[:12]:
        rewards = []
        for side in ("chosen", "rejected"):
            log_ratio = line[f"logp_{side}"] - line[f"reference_logp_{side}"]
            rewards.append(0.5 * log_ratio)
            assert line[f"implicit_reward_{side}"] == pytest.approx(rewards[-1], rel=1e-12)
            ratios = line[f"token_log_ratios_{side}"]
            assert sum(ratios) == pytest.approx(log_ratio, abs=1e-4)
        margins.append(rewards[0] - rewards[1])
        assert line["implicit_margin"] == pytest.approx(margins[-1], rel=1e-12)
    # Of four prompts with three pairs each, a prompt's mean is one observation.
    means = np.array(margins).reshape(4, 3).mean(axis=1)
    error = means.std(ddof=1) / 2
    assert f"{np.mean(margins):.4g} ±{error:.4g}" in told
    successes = (np.array(margins) > 0).reshape(4, 3).mean(axis=1)
    assert f"{successes.mean():.1%} ±{successes.std(ddof=1) / 2:.1%}" in told
    assert "implicit reward, beta 0.5" in told


def test_score_token_log_probs_sum_to_the_rows(compared):
    _, _, _, lines, _ = compared
    for line in lines:
        for side in ("_chosen", "_rejected") if "chosen" in line else ("",):
            for model in ("", "reference_"):
                log_probs = line[f"{model}token_logps{side}"]
                assert len(log_probs) == line[f"tokens{side}"] == len(line[f"token_ids{side}"])
                total = np.sum(np.float32(log_probs), dtype=np.float32)
                np.testing.assert_allclose(total, line[f"{model}logp{side}"], rtol=1e-6, atol=1e-5)


def test_score_perplexity_of_completions(compared):
    _, _, _, lines, told = compared
    *_, one, empty = lines
    for model in ("", "reference_"):
        assert one[f"{model}perplexity"] == pytest.approx(np.exp(-one[f"{model}logp"] / 3))
        assert empty[f"{model}perplexity"] == pytest.approx(np.exp(-empty[f"{model}logp"]))
    log_probs = [one["logp"] + empty["logp"], one["reference_logp"] + empty["reference_logp"]]
    shown = ", reference ".join(f"{np.exp(-log_prob / 4):.4g}" for log_prob in log_probs)
    assert f"perplexity per token, completions: {shown} (4 tokens)" in told


@pytest.mark.parametrize(
    "left_out, kept",
    [(("per_token", "top"), ()), (("top",), ("token_",)), (("per_token",), ("top_",))],
)
def test_score_is_the_same_without_token_fields(left_out, kept, compared, tmp_path):
    """What is asked for besides changes no number."""
    folder, work, options, lines, _ = compared
    fewer = {name: value for name, value in options.items() if name not in left_out}
    score_file(folder / "model", work / "rows.jsonl", tmp_path / "fewer.jsonl", beta=0.5, **fewer)
    text = (tmp_path / "fewer.jsonl").read_text()
    for line, row in zip(lines, map(json.loads, text.splitlines()), strict=True):
        assert row == {name: line[name] for name in row}
        for beginning in ("token_", "top_"):
            has_any = any(name.startswith(beginning) for name in row)
            assert has_any == (beginning in kept), beginning


def test_score_tokens_on_one_device_as_on_eight(compared, tmp_path):
    folder, work, options, lines, _ = compared
    with on_devices(1):
        score_file(folder / "model", work / "rows.jsonl", tmp_path / "one.jsonl", **options)
    for line, text in zip(lines, (tmp_path / "one.jsonl").read_text().splitlines(), strict=True):
        row = json.loads(text)
        for name, value in row.items():
            if "logp" in name:
                np.testing.assert_allclose(value, line[name], atol=1e-5)
            elif "ids" in name or "texts" in name:
                assert value == line[name]


def test_score_next_tokens_are_those_after_the_prompt(compared, tmp_path):
    """Those of an empty completion, of the model and its reference."""
    folder, work, options, lines, _ = compared
    wanted = dict(prompts=str(work / "rows.jsonl"), top=3, reference=options["reference"])
    score_file(folder / "model", "", tmp_path / "next.jsonl", **wanted)
    rows = [json.loads(text) for text in (tmp_path / "next.jsonl").read_text().splitlines()]
    given = [json.loads(text) for text in (work / "rows.jsonl").read_text().splitlines()]
    assert [
        {name: row[name] for name in there} for row, there in zip(rows, given, strict=True)
    ] == (given)
    for line, row in zip(lines, rows, strict=True):
        side = "_chosen" if "chosen" in line else ""
        for model in ("", "reference_"):
            assert row[f"{model}top_ids"] == line[f"{model}top_ids{side}"][:1]
            found = row[f"{model}top_logps"]
            np.testing.assert_allclose(found, line[f"{model}top_logps{side}"][:1], atol=1e-5)
    assert not rows[0].keys() & {"logp", "tokens", "logp_chosen", "token_ids"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(data="a", prompts="b", top=2), "found both"),
        (dict(data=""), "found neither"),
        (dict(data="", prompts="b"), "Expected --top=K"),
        (dict(data="", prompts="b", top=2, per_token=True), "no --per_token"),
        (
            dict(data="", prompts="b", top=2, settings=dict(on_bad_row="drop")),
            "--on_bad_row=drop is about rows with responses",
        ),
        (dict(data="a", beta=0.2), "--beta=0.2 is the factor"),
        (dict(data="", prompts="b", top=2, beta=0.2, reference="r"), "--beta=0.2 is the factor"),
    ],
)
def test_score_refuses_flags_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        score.Options(model="m", out="o", **options)


def test_score_names_the_row_without_a_prompt(scored, tmp_path):
    folder, _ = scored
    path = write_jsonl(tmp_path / "rows.jsonl", [dict(prompt="w1"), dict(text=3)])
    wanted = dict(prompts=str(path), top=2)
    with pytest.raises(ValueError, match=r"rows.jsonl row 2: "):
        score_file(folder / "model", "", tmp_path / "out.jsonl", **wanted)
    wanted["prompts"] = str(tmp_path / "missing.jsonl")
    with pytest.raises(FileNotFoundError, match="^--prompts='.*missing"):
        score_file(folder / "model", "", tmp_path / "out.jsonl", **wanted)
    assert not (tmp_path / "out.jsonl").exists()


def test_score_refuses_more_tokens_than_there_are(scored, tmp_path):
    folder, _ = scored
    with pytest.raises(ValueError, match="--top=41: .* has 40 tokens"):
        score_file(folder / "model", folder / "pairs.jsonl", tmp_path / "out.jsonl", top=41)
    assert not (tmp_path / "out.jsonl").exists()


def test_score_completions_that_were_sampled(scored, tmp_path):
    """Each of several is a line of its own, with the log-prob that it was sampled with."""
    folder, _ = scored
    write_jsonl(tmp_path / "prompts.jsonl", [dict(prompt="w1 w2", id=3), dict(prompt="w4", id=4)])
    sample_file(folder / "model", tmp_path / "prompts.jsonl", tmp_path / "rows.jsonl")
    sampled = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    settings = dict(append_eos=False)  # most are cut before it
    lines_at = tmp_path / "out.jsonl"
    score_file(folder / "model", tmp_path / "rows.jsonl", lines_at, settings=settings)
    lines = [json.loads(line) for line in lines_at.read_text().splitlines()]
    assert [line["id"] for line in lines] == [3, 3, 4, 4]
    compared = 0
    for number, line in enumerate(lines):
        row = sampled[number // 2]
        assert line["completion"].split() == row["completions"][number % 2].split()
        if line["tokens"] == row["tokens"][number % 2]:
            assert line["logp"] == pytest.approx(row["logp"][number % 2], abs=1e-4)
            compared += 1
    assert compared
