"""Tables and pages of win rates, by hand."""

import numpy as np
import pytest

from dpo_jax.evaluation import statistics, winrate_stats
from dpo_jax.evaluation.judge import Vote
from experiments import winrate_report


def a_row(verdicts, **fields):
    """A row as winrate.judge_all makes it, of answers that are all of one length."""
    pairs = [dict(prompt="post", ours="two words", other="the other") for _ in verdicts]
    votes = [[dict(order="", verdict=verdict, answer="")] for verdict in verdicts]
    about = dict(method="dpo", temperature=1.0, best_of=1, step=None, seed=0, draw=0, words=2.0)
    row = about | winrate_stats.win_rate(verdicts)
    return row | dict(verdicts=verdicts, compared=pairs, votes=votes) | fields


def test_seeds_have_an_interval_of_their_own():
    """Student's over the rates of seeds, beside that over prompts; the whole one has both."""
    runs = [["win", "win", "loss", "loss"], ["win", "win", "win", "loss"], ["win"] * 3 + ["tie"]]
    (group,) = winrate_report.grouped(
        [a_row(verdicts, seed=seed) for seed, verdicts in enumerate(runs)]
    )
    expected = statistics.mean_interval([0.5, 0.75, 0.875])
    assert (group["rate"], group["seeds_low"]) == (expected["mean"], expected["low"])
    assert group["high"] == 1 and group["seeds"] == 3
    pooled = winrate_stats.win_rate(sum(runs, []), [*range(4)] * 3)
    assert (group["prompts_low"], group["prompts_high"]) == (pooled["low"], pooled["high"])
    reach = np.hypot(expected["mean"] - expected["low"], pooled["rate"] - pooled["low"])
    assert group["low"] == pytest.approx(expected["mean"] - reach)
    np.testing.assert_allclose(group["points"], [1, 1, 2 / 3, 0.5 / 3])
    # Seeds that agree say nothing of other prompts.
    alike = [a_row(["win", "loss"] * 8, seed=seed) for seed in range(3)]
    (group,) = winrate_report.grouped(alike)
    assert group["seeds_low"] == group["seeds_high"] == 0.5
    ends = [group["low"], group["high"]]
    assert ends == pytest.approx([group["prompts_low"], group["prompts_high"]])
    # As the usual error of a mean has n - 1.
    assert ends == pytest.approx(list(winrate_stats.wilson(7.5, 15)))
    table = winrate_report.table([group], [])
    assert "Means of up to 3 seeds of training" in table


def test_seeds_count_at_equal_length_and_in_subsets():
    """They are as far apart there, so that these intervals are no narrower."""
    rows = []
    for seed, wins in enumerate((30, 50, 70)):
        row = a_row(["win"] * wins + ["loss"] * (100 - wins), seed=seed)
        for number, pair in enumerate(row["compared"]):
            pair["subset"] = ("helpful", "harmless")[number % 2]
        rows.append(row)
    (group,) = winrate_report.grouped(rows)
    assert (group["rate"], group["low"], group["high"]) == (pytest.approx(0.5), 0, 1)
    found = [group[f"equal_length_{name}"] for name in ("rate", "low", "high")]
    assert found == [pytest.approx(0.5), 0, 1]
    for of_subset in group["by_subset"].values():
        found = [of_subset[name] for name in ("rate", "low", "high")]
        assert found == [pytest.approx(0.5), 0, 1]
    # A seed that wins always has no rate at equal length.
    rows[2] |= dict(verdicts=["win"] * 100)
    (group,) = winrate_report.grouped(rows)
    assert group["equal_length_rate"] > 0.5 and group["equal_length_low"] is None


def test_subsets_have_rates_of_their_own():
    row = a_row(["win", "win", "loss", None])
    for pair, subset in zip(row["compared"], ("helpful", "harmless", "harmless", ""), strict=True):
        pair["subset"] = subset
    (group,) = winrate_report.grouped([row])
    assert {name: found["rate"] for name, found in group["by_subset"].items()} == {
        "": None,
        "harmless": 0.5,
        "helpful": 1,
    }
    assert "| by subset | T | none | harmless | helpful |" in winrate_report.table([group], [])


def test_one_seed_has_the_interval_of_its_prompts():
    draws = [["win", "loss", None], ["win", "tie", "loss"]]
    (group,) = winrate_report.grouped(
        [a_row(verdicts, draw=draw) for draw, verdicts in enumerate(draws)]
    )
    pooled = winrate_stats.win_rate(sum(draws, []), [0, 1, 2] * 2)
    assert {name: group[name] for name in pooled} == pooled and group["draws"] == 2
    (alone,) = winrate_report.grouped([a_row(draws[1])])
    assert alone["equal_length_rate"] == pytest.approx(alone["rate"])  # all lengths are alike


def test_comparisons_are_adjusted_for_their_number():
    rows = [a_row(["win"] * 12)]
    for number, method in enumerate(("ppo", "sft", "base"), 6):
        rows.append(a_row(["loss"] * number + ["win"] * (12 - number), method=method))
    paired = winrate_report.compared_with(winrate_report.grouped(rows), "dpo")
    assert [pair["p"] for pair in paired] == [2 / 2**6, 2 / 2**7, 2 / 2**8]
    assert [pair["p_holm"] for pair in paired] == statistics.holm([2 / 2**6, 2 / 2**7, 2 / 2**8])
    table = winrate_report.table(winrate_report.grouped(rows), paired)
    assert "| p over prompts | p by Holm |" in table
    assert "p are over prompts, for these very trainings" in table


def test_training_table_has_a_column_for_each_temperature():
    rows = []
    for step in (0, 300):
        for temperature in (0.7, 1.0):
            rows.append(a_row(["win", "loss"], step=step, temperature=temperature))
    groups = winrate_report.grouped(rows)
    cell = winrate_report.cell(groups[0])
    table = winrate_report.table(groups, [])
    assert f"| step | T=0.7 | T=1 |\n|---|---|---|\n| 0 | {cell} | {cell} |" in table
    (_, drawn), *_ = winrate_report.panels(groups).values()
    assert {row["label"] for row in drawn} == {"dpo, T=0.7", "dpo, T=1"}


HOSTILE = [
    "# heading",
    "- list\n+ list\n= underlined\n---\n1. one\n2) two\n12-3",
    "*bold* _so_ `code` ~~gone~~ | a | b |\n|---|---|",
    "<script>alert(1)</script> &amp; [link](http://x) ![image](http://x)",
    "> quoted\n\nanother paragraph\n    indented\n\ttab",
    "```\nfence\n```\n$x^2$ https://example.org www.example.org someone@example.org",
    "back\\slash at the end\\\n\\",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_quotation_shows_text_as_it_is(text):
    """Rendered, it is one quotation of plain paragraphs whose text is the text."""
    markdown_it = pytest.importorskip("markdown_it")
    tokens = (
        markdown_it.MarkdownIt("commonmark")
        .enable(["table", "strikethrough"])
        .parse(winrate_report.quoted(text))
    )
    kinds = {token.type for token in tokens}
    assert kinds == {
        "blockquote_open",
        "blockquote_close",
        "paragraph_open",
        "paragraph_close",
        "inline",
    }
    shown = []
    for token in tokens:
        parts = token.children or []
        assert {part.type for part in parts} <= {"text", "text_special", "hardbreak"}
        if parts:
            words = ("\n" if part.type == "hardbreak" else part.content for part in parts)
            shown.append("".join(words))
    lines = [line.replace("\t", " ") for line in text.split("\n") if line]
    assert "\n".join(shown).replace("\u00a0", " ").split("\n") == lines


def test_examples_page(tmp_path):
    row = a_row(["win", "loss", "tie"])
    vote = Vote("other, ours", "win", "Comparison: *better*.\nBetter: B", 1)
    row["votes"] = winrate_report.as_records([(vote,), (vote, vote), (Vote("", "tie"),)])
    path = tmp_path / "examples" / "one.md"
    winrate_report.write_examples(path, "dpo, T=1", "the data's response", row, 2)
    text = path.read_text()
    assert "Win rate 0.500 [" in text and ", the first 2 of 3 comparisons." in text
    assert "## 1. dpo, T=1 wins\n\n**Prompt**\n\n> post\n" in text
    assert "## 2. the data's response wins" in text and "## 3." not in text
    assert text.count("who saw the data's response as A: dpo, T=1 wins\n\n> Comparison: ") == 3
    assert text.endswith("Better: B\n")
