"""The implicit reward beside the true one: closed forms, and the committed numbers."""

import json

import numpy as np
import pytest

from dpo_jax.data import toy
from experiments import implicit_reward
from tests.helpers.paths import ROOT

RESULTS = ROOT / "experiments" / "results" / "implicit_reward"


def random_rewards(seed=0, prompts=3, completions=50):
    """Return (true rewards, weights that sum to 1), each [P, C]."""
    rng = np.random.default_rng(seed)
    weights_PC = rng.random((prompts, completions))
    true_PC = rng.normal(size=(prompts, completions))
    return true_PC, weights_PC / weights_PC.sum(axis=-1, keepdims=True)


def test_agreement_ignores_functions_of_the_prompt():
    true_PC, weights_PC = random_rewards()
    shifted_PC = true_PC + np.array([[3.0], [-7.0], [0.5]])
    found = implicit_reward.agreement(true_PC, shifted_PC, weights_PC)
    assert found == pytest.approx(dict(slope=1, correlation=1, rms=0), abs=1e-12)
    halved = implicit_reward.agreement(true_PC, 0.5 * shifted_PC, weights_PC)
    assert halved["slope"] == pytest.approx(0.5) and halved["correlation"] == pytest.approx(1)


def test_agreement_equals_weighted_regression():
    """Least squares with an intercept for each prompt, solved in one system."""
    true_PC, weights_PC = random_rewards(1)
    implicit_PC = 0.8 * true_PC + np.random.default_rng(2).normal(size=true_PC.shape)
    found = implicit_reward.agreement(true_PC, implicit_PC, weights_PC)
    dummies = np.repeat(np.eye(len(true_PC)), true_PC.shape[1], axis=0)
    roots = np.sqrt(weights_PC.ravel())
    columns = np.column_stack([true_PC.ravel(), dummies]) * roots[:, None]
    slope, *_ = np.linalg.lstsq(columns, implicit_PC.ravel() * roots, rcond=None)[0]
    assert found["slope"] == pytest.approx(slope, rel=1e-10)
    back = implicit_reward.agreement(implicit_PC, true_PC, weights_PC)
    # Both slopes together make the squared correlation.
    assert found["correlation"] ** 2 == pytest.approx(found["slope"] * back["slope"], rel=1e-10)


def test_optimum_agrees_exactly(tmp_path, monkeypatch, capsys):
    """DPO's optimum, reference * exp(reward / beta) / Z, gives back the reward; it is drawn."""
    rewards_PC = toy.rewards(toy.PROMPTS, toy.completions())
    reference_PC = np.random.default_rng(0).normal(size=rewards_PC.shape)
    reference_PC -= np.logaddexp.reduce(reference_PC, axis=-1, keepdims=True)
    optimum_PC = reference_PC + rewards_PC / 2
    optimum_PC -= np.logaddexp.reduce(optimum_PC, axis=-1, keepdims=True)
    seeds = {}

    def run_seed(folder, seed):
        rewards = implicit_reward.Rewards(rewards_PC, 2 * (optimum_PC - reference_PC), reference_PC)
        row = dict(seed=seed)
        for name in implicit_reward.WEIGHTS:
            found = implicit_reward.agreement(
                rewards.true_PC, rewards.implicit_PC, rewards.weights(name)
            )
            row |= {f"{measure}_{name}": value for measure, value in found.items()}
        seeds[seed] = row
        return row, rewards

    monkeypatch.setattr(implicit_reward, "run_seed", run_seed)
    rows = implicit_reward.run(tmp_path, 2)
    assert (
        rows == list(seeds.values()) == json.loads((tmp_path / "implicit_reward.json").read_text())
    )
    for row in rows:
        for name in implicit_reward.WEIGHTS:
            assert row[f"slope_{name}"] == pytest.approx(1, abs=1e-9)
            assert row[f"correlation_{name}"] == pytest.approx(1, abs=1e-9)
    assert (tmp_path / "implicit_reward.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("seed 1") == 2


def test_committed_rows_are_of_all_completions():
    rows = json.loads((RESULTS / "implicit_reward.json").read_text())
    assert len(rows) >= 3 and all(row["completions"] == 4 * 8**5 for row in rows)


@pytest.mark.slow
def test_trained_toy_agrees_as_the_committed_rows(tmp_path):
    """One seed, trained anew: two minutes."""
    row, _ = implicit_reward.run_seed(tmp_path, 0)
    committed = json.loads((RESULTS / "implicit_reward.json").read_text())[0]
    for name, value in row.items():
        assert value == pytest.approx(committed[name], abs=0.02), name
