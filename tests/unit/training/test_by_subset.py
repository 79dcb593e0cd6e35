"""Evaluations by subset, and the errors of their accuracies."""

import numpy as np
import pytest

from dpo_jax.data.grouping import clustered_error
from dpo_jax.training import metrics
from dpo_jax.training.metric_names import describe, is_evaluation, of_subset

SUBSETS = (["harmless", "helpful"], np.array([0, 0, 1, 1, 1]))
PROMPTS = np.array([7, 7, 8, 9, 9])


def evaluation(weights):
    """Return what `detailed` gives for five pairs of three prompts."""
    right = np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    of_each = {
        "loss": (weights * np.arange(5), weights),
        "rewards/accuracies": (weights * right, weights),
    }
    return metrics.detailed(of_each, SUBSETS, PROMPTS)


def test_means_by_subset():
    found = evaluation(np.ones(5))
    assert found["loss/eval/harmless"] == 0.5 and found["loss/eval/helpful"] == 3
    assert found["rewards_eval/accuracies/helpful"] == pytest.approx(2 / 3)
    # Those of all are the evaluation's own.
    assert "loss/eval" not in found and "rewards_eval/accuracies" not in found
    expected = clustered_error(np.array([1.0, 0, 1, 1, 0]), PROMPTS)
    assert found["rewards_eval/accuracies_se"] == pytest.approx(expected)
    # One prompt has no error.
    assert "rewards_eval/accuracies_se/harmless" not in found
    assert "rewards_eval/accuracies_se/helpful" in found


def test_weights_count_as_copies():
    """A pair of weight 2 is as two of the same prompt, and one of weight 0 as none."""
    weighted = evaluation(np.array([1.0, 0, 2, 1, 1]))
    values = np.array([1.0, 1, 1, 1, 0])
    prompts = np.array([7, 8, 8, 9, 9])
    assert weighted["rewards_eval/accuracies_se"] == pytest.approx(clustered_error(values, prompts))
    assert weighted["rewards_eval/accuracies/helpful"] == pytest.approx(3 / 4)


def test_names_of_subsets():
    assert of_subset("rewards_eval/accuracies/a/b") == ("rewards_eval/accuracies", "a/b")
    assert of_subset("rewards_eval/accuracies_se/a") == ("rewards_eval/accuracies_se", "a")
    for name in ("loss/eval", "rewards_eval/accuracies_se", "rewards_eval/chosen", "loss/train"):
        assert of_subset(name) == (name, "")
    assert is_evaluation("loss/eval/a") and describe("loss/eval/a").lower_is_better


def test_table_by_subset():
    found = evaluation(np.ones(5)) | {"loss/eval": 2.0, "rewards_eval/accuracies": 0.6}
    lines = [line.split() for line in metrics.table_by_subset(found).splitlines()]
    assert [line[0] for line in lines] == ["held", "all", "harmless", "helpful"]
    assert lines[1][1:3] == ["2", "0.6"] and lines[1][3].startswith("±")
    assert lines[2][1:] == ["0.5", "0.5"]
    assert metrics.table_by_subset({"loss/eval": 2.0, "rewards_eval/accuracies_se": 0.1}) == ""
