"""What score reports: errors clustered by prompt, perplexities, texts of tokens."""

import math

import numpy as np
import pytest

from dpo_jax.evaluation import scores


def test_clustered_error_of_single_values():
    """Where each value is a cluster, it is the ordinary error of a mean."""
    values = np.random.default_rng(0).normal(size=30)
    error = scores.clustered_error(values, np.arange(30))
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(30), rel=1e-12)


def test_clustered_error_of_repeated_values():
    """Values that are all there three times say no more than once each."""
    values = np.random.default_rng(1).normal(size=20)
    once = scores.clustered_error(values, np.arange(20))
    thrice = scores.clustered_error(np.repeat(values, 3), np.repeat(np.arange(20), 3))
    assert thrice == pytest.approx(once, rel=1e-12)


def test_clustered_error_covers_the_mean():
    """About 95 % of means lie within two errors of the truth, where clusters are unequal."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        sizes = rng.integers(1, 6, 60)
        clusters = np.repeat(np.arange(60), sizes)
        values = rng.normal(size=60)[clusters] + 0.3 * rng.normal(size=len(clusters))
        covered += abs(values.mean()) < 1.96 * scores.clustered_error(values, clusters)
    assert 0.91 < covered / 400 < 0.98


def test_clustered_error_of_one_cluster_is_unknown():
    assert scores.clustered_error(np.array([1.0, 2.0]), np.array([7, 7])) is None


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
