"""Checks of a config: every field that has a wrong value is refused by name, with what is
expected.
"""

import re

from ml_collections import ConfigDict

from dpo_jax.config import (
    BLOCKS,
    OPTIMIZERS,
    POLICY_STAGES,
    PREFERENCE_LOSSES,
    REWARDS,
    SAMPLING_STAGES,
    SCHEDULES,
    SMOOTHED_LOSSES,
    SOURCES,
    TRAINING_STAGES,
    TRUNCATIONS,
    default,
    flat_fields,
)

ALLOWED = {  # field -> its values; STAGE: every training stage
    "model.dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "xla", "splash", "cudnn"),
    "model.remat": ("none", "full", "dots"),
    "model.lora.init": ("b_zero", "a_zero"),
    "data.source": SOURCES,
    "data.truncate": TRUNCATIONS,
    "data.on_bad_row": ("error", "drop"),
    "reward.kind": REWARDS,
    "ppo.reward": ("rm", "true"),
    "best_of_n.reward": ("rm", "true"),
    "sft.loss": ("sum", "token_mean"),
    "preferred_ft.loss": ("sum", "token_mean"),
    "dpo.loss": PREFERENCE_LOSSES,
    "pairs.labels": ("bradley_terry", "deterministic"),
    "STAGE.optimizer": OPTIMIZERS,
    "STAGE.schedule": SCHEDULES,
}
LEAST = {  # field -> its lowest value
    "model.unroll": 1,
    "model.lora.rank": 0,
    "data.max_length": 2,
    "data.max_rows": 0,
    "data.max_eval_rows": 0,
    "data.show": 0,
    "reward.batch_size": 1,
    "sampling.max_new_tokens": 1,
    "sampling.batch_size": 1,
    "pairs.prompts": 1,
    "pairs.completions": 2,
    "unlikelihood.alpha": 0,
    "ppo.inner_epochs": 1,
    "ppo.init_kl_coef": 0,
    "ppo.value_coef": 0,
    "best_of_n.prompts": 1,
    "evaluate.prompts": 2,
    "evaluate.show": 0,
    "STAGE.batch_size": 1,
    "STAGE.eval_every": 1,
    "STAGE.save_every": 1,
    "STAGE.log_every": 1,
    "STAGE.keep": 1,
    "STAGE.microbatch_size": 0,
    "STAGE.steps": 0,
    "STAGE.warmup_steps": 0,
    "STAGE.max_grad_norm": 0,
    "STAGE.weight_decay": 0,
}


def validate(config: ConfigDict) -> None:
    """Checks every field that has a wrong value; ValueError names the field, the value and what is
    allowed.
    """
    if not config.stages:
        _fail("stages", config.stages, "at least one of " + ", ".join(BLOCKS))
    for stage in config.stages:
        if stage not in BLOCKS:
            _fail("stages", stage, "one of " + ", ".join(BLOCKS))
        if stage not in config:
            _fail(
                "stages",
                stage,
                "a stage that this config file has a block for; take a config file that runs it",
            )
    if list(config.stages) != [stage for stage in BLOCKS if stage in config.stages]:
        _fail("stages", config.stages, "each stage once, in the order " + ", ".join(BLOCKS))
    if "evaluate" in config.stages and not set(config.stages) & set(POLICY_STAGES):
        _fail("stages", config.stages, "a stage to evaluate, one of " + ", ".join(POLICY_STAGES))
    if len(set(config.stages) & set(POLICY_STAGES)) > 1:
        _fail(
            "stages",
            config.stages,
            "one of " + ", ".join(POLICY_STAGES) + " a run; give the next a run of its own",
        )
    if config.run and not set(config.stages) & set(TRAINING_STAGES):
        _fail("run", config.run, "empty where no stage trains")
    if (
        config.run in (*BLOCKS, "reference")
        or config.run
        and not re.fullmatch(r"\w[\w.-]*", config.run)
    ):
        _fail(
            "run",
            config.run,
            "a folder's name in letters, digits, '.', '_' and '-', other than a stage's",
        )
    for field, value in flat_fields("", config.to_dict()).items():
        _validate_alone(field, value)
    _validate_model(config.model)
    _validate_lora(config)
    _validate_data(config.data)
    for stage in set(config.stages) & set(TRAINING_STAGES):
        _validate_training(stage, config[stage])
    if "dpo" in config.stages:
        _validate_dpo(config.dpo)
        if config.data.source == "toy" and config.dpo.reference != "init":
            _fail(
                "dpo.reference",
                config.dpo.reference,
                "'init' on the toy, whose exact KL is to the initial policy",
            )
    if "ppo" in config.stages:
        _validate_ppo(config)
    if "best_of_n" in config.stages:
        _validate_rm("best_of_n", config)
        if not config.best_of_n.n or min(config.best_of_n.n) < 1:
            _fail("best_of_n.n", config.best_of_n.n, "numbers of completions, 1 or more")
    if set(config.stages) & set(SAMPLING_STAGES):
        _validate_sampling(config)


def _validate_alone(field: str, value):
    """A field, block.name, for which some values are wrong whatever the others are."""
    block, _, name = field.partition(".")
    for known in (field, f"STAGE.{name}") if block in TRAINING_STAGES else (field,):
        if value not in ALLOWED.get(known, (value,)):
            _fail(field, value, "one of " + ", ".join(ALLOWED[known]))
        if known in LEAST and value < LEAST[known]:
            _fail(field, value, f"at least {LEAST[known]}")


def _validate_model(model):
    if bool(model.path) == bool(len(model.scratch)):
        _fail(
            "model.path",
            model.path,
            "a hub name or a folder in Hugging Face format, or else model.scratch",
        )


def _validate_lora(config):
    lora = config.model.lora
    if not lora.rank and lora.to_dict() != default(()).model.lora.to_dict():
        _fail("model.lora.rank", 0, "1 or more, as another field of model.lora is given")
    if not lora.alpha > 0:
        _fail("model.lora.alpha", lora.alpha, "more than 0")
    if lora.rank and not (config.model.path and set(config.stages) & set(TRAINING_STAGES)):
        _fail(
            "model.lora.rank",
            lora.rank,
            "0 where no stage trains, or none has a model.path to begin with",
        )


def _validate_data(data):
    if data.source != "toy" and not data.path:
        _fail("data.path", data.path, "a hub name, a folder or a file")
    for field in ("path", "sft_path"):
        if data.source == "toy" and data[field]:
            _fail(f"data.{field}", data[field], "empty: the toy makes its own data")
    if not 0 < data.max_prompt_length < data.max_length:
        _fail(
            "data.max_prompt_length",
            data.max_prompt_length,
            f"between 1 and data.max_length - 1 = {data.max_length - 1}",
        )
    if not 0 < data.eval_fraction < 1:
        _fail("data.eval_fraction", data.eval_fraction, "between 0 and 1")
    if not 0 <= data.max_dropped <= 1:
        _fail("data.max_dropped", data.max_dropped, "between 0 and 1")


def _validate_training(stage, block):
    divided = "minibatch_size" if stage == "ppo" else "batch_size"
    if block.microbatch_size and block[divided] % block.microbatch_size:
        _fail(
            f"{stage}.microbatch_size",
            block.microbatch_size,
            f"a divisor of {stage}.{divided} = {block[divided]}",
        )
    if not block.lr > 0:
        _fail(f"{stage}.lr", block.lr, "more than 0")
    if not block.steps and not block.epochs > 0:
        _fail(f"{stage}.epochs", block.epochs, f"more than 0, where {stage}.steps is 0")
    if block.weight_decay and block.optimizer not in ("adamw", "lion"):
        _fail(
            f"{stage}.weight_decay",
            block.weight_decay,
            f"0: {block.optimizer} has none, adamw and lion have",
        )


def _validate_dpo(block):
    if not block.beta > 0:
        _fail("dpo.beta", block.beta, "more than 0")
    if not 0 <= block.label_smoothing < 0.5:
        _fail("dpo.label_smoothing", block.label_smoothing, "from 0 to below 0.5")
    if block.label_smoothing and block.loss not in SMOOTHED_LOSSES:
        _fail(
            "dpo.label_smoothing",
            block.label_smoothing,
            f"0: the {block.loss} loss has none, {' and '.join(SMOOTHED_LOSSES)} have",
        )
    if block.cache_reference and block.reference == "none":
        _fail("dpo.cache_reference", True, 'False where dpo.reference is "none"')
    if not block.reference:
        _fail("dpo.reference", block.reference, '"init", "none" or the path of a model')


def _validate_ppo(config):
    block = config.ppo
    _validate_rm("ppo", config)
    if block.minibatch_size < 1 or block.batch_size % block.minibatch_size:
        _fail(
            "ppo.minibatch_size",
            block.minibatch_size,
            f"a divisor of ppo.batch_size = {block.batch_size}",
        )
    for field in ("target_kl", "kl_horizon", "clip", "value_clip"):
        if not block[field] > 0:
            _fail(f"ppo.{field}", block[field], "more than 0")
    if not 0 <= block.gae_lambda <= 1:
        _fail("ppo.gae_lambda", block.gae_lambda, "between 0 and 1")


def _validate_rm(stage, config):
    """A stage's choice of reward."""
    if config[stage].reward == "rm" and "rm" not in config.stages:
        _fail(
            f"{stage}.reward",
            "rm",
            f"'true' (config.reward), or rm before {stage} in config.stages",
        )


def _validate_sampling(config):
    reward, sampling = config.reward, config.sampling
    toy = config.data.source == "toy"
    if reward.kind.startswith("toy") != toy:
        _fail(
            "reward.kind",
            reward.kind,
            "'toy' or 'toy_saturating' with data.source='toy', and only there",
        )
    if reward.kind == "rm":
        if reward.path:
            _fail("reward.path", reward.path, "empty: the reward is the rm stage's model")
        if "rm" not in config.stages:
            _fail("reward.kind", reward.kind, "another one, or rm in config.stages")
        if "pairs" in config.stages:
            _fail(
                "reward.kind",
                reward.kind,
                "another one, by which the pairs are labelled that rm is trained on",
            )
    elif not toy and not reward.path:
        _fail("reward.path", reward.path, "a hub name, a folder or a file")
    if not 0 <= sampling.min_prefix <= sampling.max_prefix:
        _fail(
            "sampling.min_prefix",
            sampling.min_prefix,
            f"from 0 to sampling.max_prefix = {sampling.max_prefix}",
        )


def _fail(field, value, expected):
    raise ValueError(f"config.{field} = {value!r}: expected {expected}.")
