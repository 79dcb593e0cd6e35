"""The families' parity: one variant measured, errors by hand, and the committed figures."""

import json

import numpy as np
import pytest

from experiments import family_parity
from tests.helpers import tiny_models
from tests.helpers.paths import ROOT

RESULTS = ROOT / "experiments" / "results"
COMMITTED = json.loads((RESULTS / "family_parity.json").read_text())["rows"]


def check(row):
    assert row["export"] and row["greedy"] == [4, 4] and row["largest_logit"] > 1
    assert row["logits"] < 1e-4 and row["logits_back"] < 1e-4 and row["lora"] < 1e-4
    assert row["gradients"] < 1e-3


def test_variant_is_measured():
    pytest.importorskip("peft", reason="the independent references are peft, and torch under it")
    row = family_parity.measure("mistral-window")
    assert row["family"] == "mistral"
    check(row)


def test_export_of_other_weights_differs(tmp_path):
    pytest.importorskip("torch", reason="the models are torch's")
    case = family_parity.open_case("llama3", tmp_path / "theirs")
    assert family_parity.is_exported_alike(case, tmp_path / "again")
    case.params["norm_final"]["scale"] = case.params["norm_final"]["scale"].at[3].add(1e-6)
    assert not family_parity.is_exported_alike(case, tmp_path / "other")


def test_relative_error_by_hand():
    theirs = dict(a=np.array([3.0, 4.0]), b=np.array([1e-9]))
    ours = dict(a=np.array([3.0, 4.1]), b=np.array([2e-9]))
    # b is noise beside a: its error counts against 1% of the whole norm, 0.05.
    assert family_parity.relative_error(ours, theirs) == pytest.approx(0.1 / 5)
    ours["b"] = np.array([0.01])
    assert family_parity.relative_error(ours, theirs) == pytest.approx(0.01 / 0.05)
    with pytest.raises(ValueError, match=r"\['c'\]"):
        family_parity.relative_error(ours | dict(c=np.zeros(1)), theirs)


def test_family_has_the_largest_figures_of_its_variants():
    row = dict(family="llama", logits_back=1e-6, gradients=1e-6, lora=1e-6, export=True)
    rows = [
        row | dict(variant="one", logits=1e-6, greedy=[4, 4]),
        row | dict(variant="other", logits=3e-6, greedy=[3, 4], export=False),
    ]
    (merged,) = family_parity.by_family(rows)
    assert merged["logits"] == 3e-6 and merged["greedy"] == [7, 8] and not merged["export"]
    shown = family_parity.table([merged], "family").splitlines()[-1]
    assert shown == "| `llama` | 3.0e-06 | 1.0e-06 | **differs** | 7 of 8 | 1.0e-06 | 1.0e-06 |"


def test_committed_rows_are_of_all_variants():
    assert [row["variant"] for row in COMMITTED] == list(tiny_models.VARIANTS), (
        "run: python -m experiments.family_parity --variants=NAME"
    )
    for row in COMMITTED:
        check(row)


def test_pages_have_the_committed_figures():
    assert (RESULTS / "family_parity.md").read_text() == family_parity.results_page(COMMITTED)
    page = (ROOT / "docs" / "models.md").read_text()
    new = family_parity.table(family_parity.by_family(COMMITTED), "family")
    assert family_parity.with_table(page, new) == page, "run: python -m experiments.family_parity"
