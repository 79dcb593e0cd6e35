"""What score reports: perplexities, texts of tokens."""

import math

import pytest

from dpo_jax.evaluation import scores


def test_perplexity_of_extremes():
    assert scores.perplexity(-3 * math.log(7), 3) == pytest.approx(7)
    assert scores.perplexity(0.0, 0) is None
    assert scores.perplexity(-1e6, 1) is None


def test_report_weights_perplexity_by_tokens():
    rows = [
        dict(logp=-2.0, tokens=1, prompt=1),
        dict(logp=-9.0, tokens=10, prompt=2),
    ]
    (line,) = scores.report([], rows, 0.1).splitlines()
    assert line == f"perplexity per token, completions: {math.exp(1):.4g} (11 tokens)"


def test_report_of_nothing():
    assert scores.report([], [], 0.1) == ""
