"""Runs of a model with experts, which are split over devices; its load-balancing loss."""

import jax
import numpy as np
import pytest

from dpo_jax.models import flops
from dpo_jax.parallel import sharding
from dpo_jax.planning import groups, planner
from dpo_jax.planning.program import make_program
from tests.helpers.tiny_runs import dpo_config, on_devices, rows_without_timings, run

MIXTRAL = dict(
    model_type="mixtral",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
)


@pytest.fixture
def config(model, pairs):
    """Two steps with a load-balancing loss, of a loss that needs no reference."""
    config = dpo_config("", pairs, data__max_rows=24, steps=2, eval_every=2)
    config.model.tokenizer = str(model)
    config.model.scratch.update(MIXTRAL)
    config.dpo.update(loss="simpo", router_aux_loss_coef=0.5)
    config.mesh.update(data=1, fsdp=2, expert=2)
    return config


def test_microbatches_are_balanced_together(config, tmp_path):
    found = {}
    with on_devices(4):
        for size in (8, 4):
            config.dpo.microbatch_size = size
            folder = run(config, tmp_path / str(size))
            found[size] = [row for row in rows_without_timings(folder) if row["step"]]
    assert len(found[8]) == 2
    for row, expected in zip(found[4], found[8], strict=True):
        assert 2 < row["router_train/imbalance"] < 4
        for name in ("loss/train", "grad_norm", "router_train/imbalance"):
            np.testing.assert_allclose(row[name], expected[name], rtol=2e-5, err_msg=name)


@pytest.mark.slow
def test_plan_counts_the_pass_that_measures_the_routing(config):
    """The layers once more, without a gradient, where there are several microbatches."""
    mesh = sharding.make_mesh(1, 2, expert=2, devices=jax.devices()[:4])
    model = planner.model_config(config, "dpo")

    def flops_of(coefficient, microbatch_size):
        config.dpo.update(router_aux_loss_coef=coefficient, microbatch_size=microbatch_size)
        group = groups.group_of(config, "dpo", planner.Assumptions())
        [batch] = groups.lay_out(config, "dpo", group, sharding.batch_shards(mesh))
        program = make_program(config, "dpo", model, mesh, batch)
        return flops.of_program(program.trace().jaxpr.jaxpr)

    whole = flops_of(0.5, 8) / flops_of(0.0, 8)
    in_parts = flops_of(0.5, 4) / flops_of(0.0, 4)
    assert whole == pytest.approx(1, abs=1e-2) and 1.15 < in_parts < 1.3
