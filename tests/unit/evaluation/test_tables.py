"""Tables: what stands in them, and what Markdown and LaTeX would read as their own."""

import csv
import io

import numpy as np

from dpo_jax.evaluation import tables

COLUMNS = [
    tables.Column("method", "method"),
    tables.Column("reward", "reward", ".3f", interval=("reward_low", "reward_high")),
    tables.Column("KL, nats", "kl", ".2f", error="kl_se"),
]
ROWS = [
    dict(
        method="dpo_run|β=2 & 50%",
        reward=-0.12345,
        reward_low=-0.2,
        reward_high=-0.1,
        kl=np.float64(1) / 3,
        kl_se=0.011,
        unused=1,
    ),
    dict(method="reference", reward=-1.0, reward_low=None, reward_high=None, kl=0),
]


def test_csv_holds_all_digits():
    found = list(csv.DictReader(io.StringIO(tables.to_csv(ROWS, COLUMNS))))
    assert list(found[0]) == ["method", "reward", "reward_low", "reward_high", "kl", "kl_se"]
    assert found[0]["method"] == ROWS[0]["method"]
    assert float(found[0]["kl"]) == 1 / 3
    assert found[1]["reward_low"] == found[1]["kl_se"] == ""


def test_markdown():
    assert tables.to_markdown(ROWS, COLUMNS).splitlines() == [
        "| method | reward | KL, nats |",
        "| --- | ---: | ---: |",
        r"| dpo_run\|β=2 & 50% | −0.123 [−0.200, −0.100] | 0.33 ± 0.01 |",
        "| reference | −1.000 | 0.00 |",
    ]


def test_latex():
    assert tables.to_latex(ROWS, COLUMNS).splitlines() == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"method & reward & KL, nats \\",
        r"\midrule",
        r"dpo\_run\textbar{}$\beta$=2 \& 50\% & $-$0.123 [$-$0.200, $-$0.100] & 0.33 $\pm$ 0.01 \\",
        r"reference & $-$1.000 & 0.00 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert tables.latex_text("a_b^c\\{}~#$") == (
        r"a\_b\textasciicircum{}c\textbackslash{}\{\}\textasciitilde{}\#\$"
    )


def test_write(tmp_path):
    tables.write(tmp_path / "results", ROWS, COLUMNS)
    assert (tmp_path / "results.csv").read_text() == tables.to_csv(ROWS, COLUMNS)
    assert (tmp_path / "results.md").read_text().startswith("| method |")
    assert (tmp_path / "results.tex").read_text().endswith("\\end{tabular}\n")
