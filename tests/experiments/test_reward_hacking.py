"""The experiment on reward hacking: its runs, what it measures, and what it draws."""

import json

import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax import config_checks
from dpo_jax.evaluation import tables
from experiments import reward_hacking
from tests.helpers.paths import ROOT

RESULTS = ROOT / "experiments" / "results" / "reward_hacking"


def test_runs_share_a_reward_model():
    """And differ in the penalty alone: a weight of 0 stays 0, whatever the target."""
    shared = {}
    found = {}
    for name in reward_hacking.RUNS:
        config, stage = reward_hacking.config_of(name, 300, 1)
        config_checks.validate(config)
        found[name] = config[stage]
        assert config[stage].steps % config[stage].eval_every == 0
        for before in ("sft", "pairs", "rm"):
            if before in config.stages:
                fields = configs.dependencies(config, before)
                assert shared.setdefault(before, fields) == fields
    assert shared.keys() == {"sft", "pairs", "rm"}
    assert found["ppo_kl"].init_kl_coef > 0 == found["ppo_no_kl"].init_kl_coef
    found["ppo_no_kl"].init_kl_coef = found["ppo_kl"].init_kl_coef
    assert found["ppo_no_kl"] == found["ppo_kl"]


def test_measure_by_hand():
    """Of one prompt with two completions, of which the policy always gives the second."""
    reference_PC = np.log([[0.75, 0.25]])
    true_PC, learned_PC = np.array([[1.0, 3.0]]), np.array([[10.0, 6.0]])
    completions = reward_hacking.Completions(reference_PC, true_PC, learned_PC)
    start = completions.measure(reference_PC)
    assert start == pytest.approx(dict(kl=0, true_reward=0, learned_reward=0))
    policy_PC = np.log([[1e-12, 1 - 1e-12]])
    assert completions.measure(policy_PC) == pytest.approx(
        dict(kl=np.log(4), true_reward=3 - 1.5, learned_reward=6 - 9.0), abs=1e-9
    )


def test_table_and_figure(tmp_path):
    """The best checkpoint by the true reward is not the last one, where the policy hacks."""
    rows = []
    for seed in (0, 1):
        rows.append(
            dict(run="rm", prompts=50, seed=seed, accuracy=0.75)
            | dict(correlation_reference=0.9, correlation_uniform=0.6)
        )
        for name in reward_hacking.RUNS:
            for step, true in ((0, 0.0), (5, 2.25), (10, 1.5)):
                about = dict(prompts=50, seed=seed, run=name, step=step, progress=step / 10)
                rows.append(about | dict(kl=step / 2, true_reward=true, learned_reward=step / 4))
    found = reward_hacking.summary(rows)
    assert [row["run"] for row in found] == sorted(2 * list(reward_hacking.RUNS))
    expected = dict(kl=5, learned_reward=2.5, true_reward=1.5, best_true_reward=2.25, best_kl=2.5)
    for row in found:
        assert row["pairs"] == 300
        assert row == row | expected | dict(lost=0.75)
    reward_hacking.draw(tmp_path / "figure.png", rows)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")


def test_committed_table_is_that_of_the_rows():
    rows = json.loads((RESULTS / "reward_hacking.json").read_text())
    table = tables.to_markdown(reward_hacking.summary(rows), reward_hacking.COLUMNS)
    assert (RESULTS / "reward_hacking.md").read_text() == table
