"""Names of runs: what they change in their last training stage."""

import pytest

from dpo_jax import config as configs
from dpo_jax import config_checks
from dpo_jax.run_name import name_run


def base():
    config = configs.default(("sft", "pairs", "dpo", "evaluate"))
    config.model.path, config.data.path = "gpt2", "rows.jsonl"
    return config


def named(swept=(), **overrides) -> str:
    """The name of a run with overrides: block__field=value."""
    config = base()
    for name, value in overrides.items():
        block, _, field = name.rpartition("__")
        (config[block] if block else config)[field] = value
    name_run(config, base(), swept)
    config_checks.validate(config)
    return config.run


@pytest.mark.parametrize(
    "overrides, name",
    [
        (dict(dpo__beta=0.5), "dpo-beta0.5"),
        (dict(dpo__beta=1.0), "dpo-beta1"),
        (dict(dpo__lr=1e-5, dpo__beta=0.5), "dpo-beta0.5-lr1e-05"),  # in the config's order
        (dict(dpo__beta=0.123456789), "dpo-beta0.123456789"),
        (dict(dpo__lr=1e20), "dpo-lr1e20"),
        (dict(dpo__loss="ipo"), "dpo-lossipo"),
        (dict(dpo__loss="sigmoid=1,nll=0.2"), "dpo-losssigmoid-1-nll-0.2"),
        (dict(dpo__reference="/models/a b"), "dpo-referencemodels-a-b"),
        (dict(dpo__keep_best="rewards_eval/margins"), "dpo-keep_bestrewards_eval-margins"),
        (dict(dpo__beta=0.1), ""),  # the file's own value
        (dict(dpo__steps=7, dpo__epochs=2.0, dpo__microbatch_size=8, dpo__eval_every=5), ""),
        (dict(dpo__log_every=2, dpo__save_every=3, dpo__keep=2), ""),
        (dict(dpo__cache_reference=True), ""),
        (dict(dpo__beta=0.5, dpo__steps=7), "dpo-beta0.5"),
        (dict(dpo__beta=0.5, run="mine"), "mine"),
    ],
)
def test_run_name_of_overrides(overrides, name):
    assert named(**overrides) == name


@pytest.mark.parametrize(
    "other",
    [
        dict(model__path="other", data__path="other.jsonl"),
        dict(seed=1),
        dict(sft__lr=1e-5),
        dict(data__max_rows=10),
        dict(model__dtype="bfloat16"),
        dict(evaluate__prompts=8),
        dict(mesh__fsdp=2),
        dict(model__attention="xla"),
        dict(log__wandb="project"),
    ],
)
def test_run_name_is_of_last_stage_alone(other):
    assert named(**other) == ""
    assert named(dpo__beta=0.5, **other) == "dpo-beta0.5"


def test_run_name_of_stage_that_base_has_not():
    config = base()
    config.dpo.beta = 0.5
    name_run(config, configs.default(("sft",)))
    assert config.run == ""


def test_run_name_of_shortened_stages():
    config = base()
    config.stages = ("sft",)
    config.sft.lr, config.dpo.beta = 1e-5, 0.5
    name_run(config, base())
    assert config.run == "sft-lr1e-05"


def test_run_name_in_sweep():
    assert named(["dpo.beta"], dpo__beta=0.5) == "dpo-beta0.5"
    assert named(["dpo.beta"], dpo__beta=0.5, dpo__lr=1e-5) == "dpo-beta0.5-lr1e-05"
    assert named(["dpo.beta"], dpo__beta=0.5, data__max_rows=10) == "dpo-beta0.5"
    assert named(["dpo.beta"], dpo__lr=1e-5, data__max_rows=10) == "dpo-lr1e-05"
    assert named(["dpo.beta"], dpo__beta=0.5, run="mine") == "mine-beta0.5"
    assert named(["dpo.steps"], dpo__steps=7) == "dpo-steps7"


def test_run_name_as_suffix():
    config = base()
    config.dpo.beta = 0.5
    name_run(config, base())
    folders = configs.folder_names(config)
    assert folders["dpo"] == "dpo-beta0.5" and folders["evaluate"] == "evaluate-dpo-beta0.5"
    assert folders["sft"] == "sft" and folders["pairs"] == "pairs"


def test_name_leaves_out_what_a_resumed_run_changes():
    """It goes on under the name that it began with."""
    config = configs.default(("dpo",))
    config.dpo.update(lr=1e-7, beta=0.5)
    name_run(config, configs.default(("dpo",)), unnamed=frozenset(["dpo.lr"]))
    assert config.run == "dpo-beta0.5"
