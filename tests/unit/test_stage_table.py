"""The table of stages agrees with what else there is of each stage."""

import pytest

from dpo_jax import config as configs
from dpo_jax import stage_table
from dpo_jax.pipeline.stages import OTHER_STAGES
from dpo_jax.stage_table import STAGES
from dpo_jax.training.objectives import OBJECTIVES


def test_stages_have_fields_and_runner():
    trained = {name for name, stage in STAGES.items() if stage.trains}
    assert list(configs.STAGE_FIELDS) == list(STAGES)
    assert OBJECTIVES.keys() == trained
    assert OTHER_STAGES.keys() == STAGES.keys() - trained
    for name, stage in STAGES.items():
        assert ("lr" in configs.STAGE_FIELDS[name]) == stage.trains, name
        assert (stage.responses > 0) == stage.trains, name


@pytest.mark.parametrize("reference", ["init", "none", "some/model"])
def test_reference_by_block(reference):
    config = configs.default(("rm", "dpo", "ppo"))
    config.dpo.reference = reference
    assert stage_table.reference_of(config, "dpo") == reference
    assert stage_table.reference_of(config, "ppo") == "init"
    assert stage_table.reference_of(config, "rm") == "none"


@pytest.mark.parametrize("loss", ["simpo", "orpo", "cpo", "nll", "simpo=1,nll=2"])
def test_losses_without_reference_have_none(loss):
    config = configs.default(("dpo",))
    config.dpo.loss = loss
    assert stage_table.reference_of(config, "dpo") == "none"


def test_a_mixture_has_a_reference_if_any_of_its_losses_needs_one():
    config = configs.default(("dpo",))
    config.dpo.loss = "nll=1,sigmoid=0.5"
    assert stage_table.reference_of(config, "dpo") == "init"


def test_a_function_of_the_callers_has_a_reference():
    config = configs.default(("dpo",))
    config.dpo.loss = "function:simpo"
    assert stage_table.reference_of(config, "dpo") == "init"


@pytest.mark.parametrize(
    "fields",
    [
        {"dpo.loss": "ipo"},
        {"dpo.loss": "sigmoid_norm"},
        {"dpo.loss": "simpo"},
        {"dpo.loss": "sigmoid=1,nll=0.2"},
        {"dpo.loss": "function:mine"},
        {"dpo.label_smoothing": 0.1},
        {"dpo.divergence": "jensen_shannon"},
        {"dpo.weighting": "wpo"},
        {"dpo.ld_alpha": 0.5},
        {"dpo.reference_every": 10},
        {"dpo.reference": "none"},
        {"pairs.labels": "deterministic"},
    ],
)
def test_only_the_papers_loss_aims_at_its_optimum(fields):
    config = configs.default(("sft", "pairs", "dpo", "evaluate"))
    config.pairs.labels = "bradley_terry"
    assert stage_table.aims_at_optimum(config, "dpo")
    config.dpo.update(reference="first", beta=3.0)
    assert stage_table.aims_at_optimum(config, "dpo")
    config.update_from_flattened_dict(fields)
    assert not stage_table.aims_at_optimum(config, "dpo")


def test_other_stages_aim_at_no_known_optimum():
    config = configs.default(("sft", "pairs", "kto", "evaluate"))
    config.pairs.labels = "bradley_terry"
    assert not stage_table.aims_at_optimum(config, "kto")


def test_sampled_pairs_of_run_alone():
    config = configs.default(("sft", "pairs", "dpo"))
    assert stage_table.trains_on_samples(config, "dpo")
    assert not stage_table.trains_on_samples(config, "sft")
    assert not stage_table.trains_on_samples(configs.default(("dpo",)), "dpo")


def test_groups_are_of_pairs_and_of_sampled_completions():
    config = configs.default(tuple(STAGES))
    grouped = {stage for stage in STAGES if stage_table.trains_in_groups(config, stage)}
    assert grouped == {"preferred_ft", "unlikelihood", "rm", "dpo", "kto"}
    from_file = configs.default(("preferred_ft", "kto"))
    assert not stage_table.trains_in_groups(from_file, "preferred_ft")
    assert not stage_table.trains_in_groups(from_file, "kto")
