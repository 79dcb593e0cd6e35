"""Three rounds beside one: what the arms share, and the arithmetic of the comparison."""

import json

import numpy as np
import pytest

from dpo_jax import config_checks
from experiments import rounds
from tests.helpers.paths import ROOT


def test_arms_have_equal_labels_and_steps():
    for target in rounds.TARGETS:
        found = set()
        for arm in rounds.ARMS:
            config = rounds.config_of(arm, target, seed=3)
            config_checks.validate(config)
            labels = config.pairs.prompts * config.pairs.completions * config.rounds
            found.add((labels, config.dpo.steps * config.rounds, config.dpo.batch_size))
            # k rounds with a moved reference end at the optimum of beta / k.
            moves = config.dpo.reference == "init"
            assert config.dpo.beta / (config.rounds if moves else 1) == target
        assert len(found) == 1


def test_gap_at_a_kl_lies_between_runs():
    rows = [dict(kl=2.0, gap=0.3), dict(kl=1.0, gap=0.1)]
    assert rounds.gap_at(rows, 1.5) == pytest.approx(0.2)
    assert rounds.gap_at(rows, 0.5) == pytest.approx(0.05)  # the first policy has no gap
    assert np.isnan(rounds.gap_at(rows, 2.1))


def test_interval_is_students():
    from scipy import stats

    values = [1.0, 2.0, 4.0, 4.5, 3.0]
    found = rounds.interval(values)
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert found["mean"] == pytest.approx(2.9) and found["seeds"] == 5
    assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-4)


def made_up() -> list[dict]:
    """Rows of two seeds and all arms; offline has a gap that is larger by 0.1 at every KL."""
    made = []
    for seed in range(2):
        for arm, (count, *_) in rounds.ARMS.items():
            for target in rounds.TARGETS:
                for number in range(1, count + 1):
                    kl = number / count * 4 / target
                    slope = 0.01 * (1 + seed) + (0.1 if arm == rounds.BASE else 0)
                    row = dict(seed=seed, arm=arm, target=target, beta=target, round=number)
                    row |= dict(reward=kl, kl=kl, gap=slope * kl)
                    made.append(row | dict(target_reward=1.0, target_kl=1.0))
    return made


def test_reward_won_is_a_difference_within_seeds(tmp_path):
    rows = made_up()
    for row in rounds.matched(rows):
        won = 0 if row["arm"] == rounds.BASE else 0.1 * row["kl"]
        # Both seeds win the same, so the interval is a point, though their gaps differ.
        assert row["won"]["mean"] == pytest.approx(won)
        assert row["won"]["low"] == pytest.approx(row["won"]["high"])
        assert row["gap"]["low"] < row["gap"]["high"]
    targets = rounds.at_targets(rows)
    assert "reward won" in rounds.table(targets, rounds.matched(rows))
    kls = np.linspace(0, 20, 20)
    rounds.draw(tmp_path / "rounds.png", rows, (kls, kls), targets)
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def committed():
    return json.loads((ROOT / "experiments/results/rounds/rounds.json").read_text())


def test_committed_results_follow_from_their_rows(committed):
    runs = {(row["seed"], row["arm"], row["target"]) for row in committed["rows"]}
    assert len(runs) == rounds.SEEDS * len(rounds.ARMS) * len(rounds.TARGETS)
    assert committed["targets"] == rounds.at_targets(committed["rows"])
    assert committed["equal_kl"] == rounds.matched(committed["rows"])


def test_page_tells_what_was_compared():
    page = " ".join((ROOT / "docs" / "rounds.md").read_text().split())
    config = rounds.config_of("moved", target=1.0, seed=0)
    completions = config.pairs.completions
    sampled = config.rounds * config.pairs.prompts * completions
    pairs = sampled * (completions - 1) // 2
    steps = config.rounds * config.dpo.steps
    assert f"{pairs:,} pairs of {sampled:,} completions" in page
    assert f"({steps} of {config.dpo.batch_size} pairs)" in page
