"""What a stage took, as cost.json keeps it."""

import json

import numpy as np
import pytest

from dpo_jax import costs
from dpo_jax.data.examples import Example
from dpo_jax.models import flops
from dpo_jax.sampling import rollouts
from tests.helpers.tiny import tiny_config


def test_attempts_add_up(tmp_path):
    """One that fails counts, too; counts are of the whole, and replace those before."""
    with costs.measured(tmp_path):
        costs.write(tmp_path, samples=3)
    first = costs.read(tmp_path)
    with pytest.raises(ZeroDivisionError), costs.measured(tmp_path):
        costs.write(tmp_path, samples=5)
        1 / 0  # noqa: B018
    found = costs.read(tmp_path)
    assert (first["attempts"], found["attempts"], found["samples"]) == (1, 2, 5)
    assert found["seconds"] > first["seconds"] > 0
    assert found["peak_memory"] >= first["peak_memory"] > 50e6 and found["memory"] == "process"


def test_peak_is_of_the_attempt(tmp_path):
    large = np.ones(100_000_000, np.uint8)
    with costs.measured(tmp_path):
        pass
    first = costs.read(tmp_path)["peak_memory"]
    del large
    costs.write(tmp_path, peak_memory=0)
    with costs.measured(tmp_path):
        pass
    assert first - costs.read(tmp_path)["peak_memory"] > 50e6


def test_a_damaged_cost_is_told_and_begun_anew(tmp_path, capsys):
    costs.write(tmp_path, samples=3)
    path = tmp_path / "cost.json"
    path.write_text(path.read_text().replace('"samples": 3', '"samples": 4'))
    with pytest.raises(ValueError, match=f"{path} is not what was written there: .* Remove it"):
        costs.read(tmp_path)
    costs.write(tmp_path, examples=5)
    assert costs.read(tmp_path) == dict(examples=5)
    assert "It is written anew" in capsys.readouterr().out
    assert costs.read(tmp_path / "none") == {}


def test_spent_survives_a_checkpoint():
    work = costs.Work(samples=1, read_tokens=7, flops=10**15)
    spent = costs.Spent().plus(0.5, work).plus(0.25, work)
    kept = json.loads(json.dumps(spent.to_dict()))
    assert costs.Spent.of_dict(kept) == spent
    assert (spent.steps, spent.step_seconds, spent.work.flops) == (2, 0.75, 2 * 10**15)
    assert costs.Spent.of_dict({}) == costs.Spent()  # a checkpoint of an earlier version


def test_work_of_samples():
    """A prompt is read once for its completions."""
    config = tiny_config()

    def row(prompt, *lengths):
        return dict(tokens=[0] * prompt, completions=[dict(tokens=[0] * n) for n in lengths])

    work = rollouts.work_of(config, [row(3, 5, 2), row(4, 1, 1)])
    assert (work.samples, work.sampled_tokens, work.examples) == (4, 9, 0)
    once = rollouts.work_of(config, [row(3, 5)])
    alone = flops.contents_of([Example(np.zeros(3, int), (np.zeros(5, int),))])
    assert once.flops == sum(flops.forward(config, alone).values())
    twice = rollouts.work_of(config, [row(3, 5, 5)])
    read = flops.forward(
        config, flops.contents_of([Example(np.zeros(3, int), (np.zeros(0, int),))])
    )
    assert twice.flops == 2 * once.flops - sum(read.values())
