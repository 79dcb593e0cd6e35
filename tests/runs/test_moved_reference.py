"""TR-DPO: the reference moves to the policy, and is a part of what training resumes from."""

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import dpo_jax
from dpo_jax.training.metrics import read_rows
from tests.helpers.tiny_runs import (
    dpo_config,
    on_devices,
    rows_without_timings,
    run,
    sigterm_at,
    weights,
)

ROWS = [{"prompt": f"w{i} w2", "chosen": f"w3{i} w31", "rejected": f"w{i + 3}"} for i in range(4)]


def leaves(tree) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def trainer_of(model, **settings):
    fixed = dict(optimizer="sgd", lr=0.05, warmup_steps=0, reference_every=3)
    return dpo_jax.Trainer(model, "dpo", **fixed | settings)


@pytest.fixture
def loaded(model):
    with on_devices(1):
        yield dpo_jax.load(str(model))


@pytest.mark.parametrize("mix", [1.0, 0.6])
def test_moved_references_are_those_of_trl(loaded, mix):
    """Twenty steps, with the policy of each given to TRL's own callback."""
    torch = pytest.importorskip("torch", reason="the independent reference is TRL's callback")
    trl = pytest.importorskip("trl", reason="the independent reference is TRL's callback")
    from trl.trainer.callbacks import SyncRefModelCallback

    assert trl
    trainer = trainer_of(loaded, reference_mix=mix)
    pairs = loaded.encode(ROWS)
    before = leaves(loaded.params)
    theirs = torch.nn.ParameterList([torch.tensor(leaf) for leaf in before])
    for step in range(1, 21):
        old = trainer._state.reference
        trainer.step(pairs)
        if step % 3 == 0:
            policy = torch.nn.ParameterList(
                [torch.tensor(leaf) for leaf in leaves(trainer._state.params)]
            )
            SyncRefModelCallback._sync_target_model(policy, theirs, mix)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        for mine, expected in zip(leaves(trainer._state.reference), theirs, strict=True):
            tolerance = 0 if mix == 1 else 1e-6
            np.testing.assert_allclose(mine, expected.detach(), rtol=0, atol=tolerance)
    # Nobody else's weights have moved.
    for leaf, expected in zip(leaves(loaded.params), before, strict=True):
        np.testing.assert_array_equal(leaf, expected)


def test_steps_are_measured_against_the_moved_reference(loaded):
    trainer = trainer_of(loaded)
    pairs = loaded.encode(ROWS)
    losses = [trainer.step(pairs)["loss/train"] for _ in range(4)]
    # After three steps policy and reference are equal again.
    assert losses[0] == pytest.approx(np.log(2)) == losses[3]
    assert losses[2] < losses[1] < losses[0]
    trainer = trainer_of(loaded, reference_every=2)
    trainer.fit(pairs, batch_size=4, steps=2)
    assert trainer.evaluate(pairs)["loss/eval"] == pytest.approx(np.log(2))


def test_trainer_without_a_reference_to_move(loaded):
    for settings in (
        dict(reference="none"),
        dict(reference_log_probs=loaded.log_probs(loaded.encode(ROWS))),
        dict(reference=loaded, lora=dict(rank=2)),
    ):
        with pytest.raises(ValueError, match="reference_every=3 moves"):
            trainer_of(loaded, **settings)


def moving_config(model, pairs, **fields):
    return dpo_config(
        model, pairs, **dict(reference_every=3, reference_mix=0.6, steps=8, save_every=100) | fields
    )


def test_interrupted_between_moves(model, pairs, tmp_path):
    config = moving_config(model, pairs, eval_every=2)
    with on_devices(1):
        expected = run(config, tmp_path / "whole")
        with sigterm_at(5):
            run(config, tmp_path / "stopped")
        folder = run(config, tmp_path / "stopped")
    assert rows_without_timings(folder) == rows_without_timings(expected)
    for name, value in weights(expected).items():
        np.testing.assert_array_equal(weights(folder)[name], value)
    saved = ocp.metadata(folder / "checkpoints" / "8").metadata
    assert set(saved) == {"step", "params", "opt_state", "reference"}


@pytest.mark.slow
def test_moved_reference_lies_as_the_policy(model, pairs, tmp_path):
    config = moving_config(model, pairs, steps=5, eval_every=5)
    with on_devices(1):
        expected = run(config, tmp_path / "one")
    config.mesh.fsdp, config.mesh.tensor = 2, 2
    with on_devices(8):
        folder = run(config, tmp_path / "mesh")
    for name, value in weights(expected).items():
        np.testing.assert_allclose(weights(folder)[name], value, atol=1e-5)


@pytest.mark.slow
def test_adapters_take_the_place_of_the_reference(model, pairs, tmp_path, capsys):
    config = moving_config(model, pairs, steps=9, eval_every=1, reference_mix=1.0, lr=0.5)
    config.model.lora.rank = 2
    with on_devices(1):
        folder = run(config, tmp_path)
    rows = {row["step"]: row for row in read_rows(folder / "metrics.jsonl")}
    # Evaluated after the move, and trained on before it.
    for step in (0, 3, 6, 9):
        assert rows[step]["loss/eval"] == pytest.approx(np.log(2), abs=1e-6)
    assert rows[3]["loss/train"] != pytest.approx(np.log(2), abs=1e-4)
    assert rows[8]["loss/eval"] != pytest.approx(np.log(2), abs=1e-6)
    assert "the last evaluation compares the policy with itself" in capsys.readouterr().out
