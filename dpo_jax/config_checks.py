"""Checks of a config: a wrong value is refused by its field, with what was expected instead."""

import math
import re

from ml_collections import ConfigDict

from dpo_jax import config as configs
from dpo_jax import config_files, loss_table, stage_table
from dpo_jax.config import (
    EXPORT_DTYPES,
    OPEN_BLOCKS,
    OPTIMIZERS,
    REWARDS,
    SCHEDULES,
    TRUNCATIONS,
    default,
    flat_fields,
)
from dpo_jax.config_files import shortened
from dpo_jax.data import mixtures
from dpo_jax.data.sources import SOURCES
from dpo_jax.loss_table import DIVERGENCES, LOSSES
from dpo_jax.stage_table import STAGES

ALLOWED = {  # field -> its values; STAGE stands for every training stage
    "model.dtype": ("float32", "bfloat16"),
    "model.frozen_dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "xla", "splash", "cudnn"),
    "model.remat": ("none", "full", "dots"),
    "model.lora.init": ("b_zero", "a_zero"),
    "data.source": tuple(SOURCES),
    "data.truncate": TRUNCATIONS,
    "data.on_bad_row": ("error", "drop"),
    "data.on_leak": ("error", "drop", "allow"),
    "data.order": ("prompts", "pairs"),
    "data.turns": ("all", "last"),
    "export.dtype": EXPORT_DTYPES,
    "reward.kind": REWARDS,
    "reward.on_long": ("error", "cut"),
    "ppo.reward": ("rm", "true"),
    "best_of_n.reward": ("rm", "true"),
    "sft.loss": ("sum", "token_mean"),
    "preferred_ft.loss": ("sum", "token_mean"),
    "dpo.loss": tuple(LOSSES),
    "dpo.divergence": tuple(DIVERGENCES),
    "dpo.weighting": ("none", "wpo"),
    "pairs.choose": ("all", "best_worst", "best_random"),
    "pairs.labels": ("bradley_terry", "deterministic", "judge"),
    "STAGE.optimizer": OPTIMIZERS,
    "STAGE.schedule": SCHEDULES,
}
TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
FUNCTIONS = {"dpo.loss": "loss", "reward.kind": "reward"}  # field -> argument of dpo_jax.run


def validate(config: ConfigDict) -> None:
    """Check the whole config.

    Raises ValueError at the first wrong value: its field, the value, and what was expected.
    """
    _validate_stages(config)
    _validate_tree(config)
    _validate_run(config)
    _validate_rounds(config)
    for field, value in flat_fields("", config.to_dict()).items():
        _validate_alone(field, value)
    _validate_model(config.model)
    _validate_attention(config)
    _validate_lora(config)
    _validate_frozen_dtype(config)
    _validate_data(config.data)
    _validate_columns_of_numbers(config)
    for stage in stage_table.training_stages(config):
        _validate_training(stage, config[stage])
    if "dpo" in config.stages:
        _validate_dpo(config)
    if "kto" in config.stages:
        _validate_kto(config)
    if "ppo" in config.stages:
        _validate_ppo(config)
    if "best_of_n" in config.stages:
        _validate_best_of_n(config)
    if "pairs" in config.stages:
        _validate_labels(config)
    if stage_table.samples(config):
        _validate_sampling(config)


def _validate_stages(config):
    known = ", ".join(STAGES)
    if "stages" not in config:
        raise ValueError(
            "config.stages is missing: start a config file with dpo_jax.config.default(stages)."
        )
    _validate_type("stages", config.stages, ())
    if not config.stages:
        _fail("stages", config.stages, f"at least one of {known}")
    for stage in config.stages:
        if stage not in STAGES:
            _fail("stages", stage, f"one of {known}")
        if stage not in config:
            expected = "a stage that this config file has a block for; take a file that runs it"
            _fail("stages", stage, expected)
    if list(config.stages) != [stage for stage in STAGES if stage in config.stages]:
        _fail("stages", config.stages, f"each stage once, in the order {known}")

    policies = ", ".join(stage for stage in STAGES if STAGES[stage].is_policy)
    trained = stage_table.policy_stages(config)
    if "evaluate" in config.stages and not trained:
        _fail("stages", config.stages, f"a stage to evaluate, one of {policies}")
    if len(trained) > 1:
        expected = f"only one of {policies}; give each a run of its own"
        _fail("stages", config.stages, expected)


def _validate_run(config):
    run = config.run
    if not run:
        return
    if not stage_table.training_stages(config):
        _fail("run", run, "empty, as no stage trains")
    # Other names would be the folder of another stage, of a round or of the kept references, or
    # outside WORKDIR.
    is_taken = run in STAGES or run == "reference" or configs.is_round_folder(run)
    if is_taken or not re.fullmatch(r"\w[\w.-]*", run):
        expected = "a folder's name in letters, digits, '.', '_' and '-', other than a stage's"
        _fail("run", run, f"{expected} or a round's")


def _validate_rounds(config):
    rounds = config.rounds
    if rounds == 1:
        return
    stages = ", ".join(config.stages)
    if "pairs" not in config.stages:
        expected = (
            f"1, as nothing is sampled to be learned from anew: a round goes from the stage pairs "
            f"to the next policy, and config.stages is {stages}"
        )
        _fail("rounds", rounds, expected)
    if not stage_table.policy_stages(config):
        policies = ", ".join(stage for stage in STAGES if STAGES[stage].is_policy)
        expected = (
            f"1, as no stage of config.stages ({stages}) trains the policy that the next round "
            f"would sample from: {policies} do"
        )
        _fail("rounds", rounds, expected)


def _validate_alone(field: str, value):
    expected = expected_instead(field, value)
    if expected:
        _fail(field, value, expected)


def expected_instead(field: str, value) -> str:
    """Return what a field, BLOCK.NAME, expects instead of the value; "" if the value may stand.

    It is about the field alone, whatever the others are, and takes a value of the field's type.
    """
    block, _, name = field.partition(".")
    rules = [field]
    if block in STAGES and STAGES[block].trains:
        rules.append(f"STAGE.{name}")
    if field == "dpo.loss" and loss_table.is_mixture(value):
        return _mixture_instead(value)
    for rule in rules:
        if rule in ALLOWED and value not in ALLOWED[rule]:
            expected = "one of " + ", ".join(ALLOWED[rule])
            if field == "dpo.loss":
                expected += ", or a mixture of them, as sigmoid=1,nll=0.2"
            # A run that was given a function has recorded it in such a field.
            if field in FUNCTIONS and str(value).startswith("function"):
                expected += f"; a function is given by dpo_jax.run(..., {FUNCTIONS[field]}=...)"
            return expected
    return _range_instead(field, value)


def _mixture_instead(loss: str) -> str:
    """Return what is expected instead of a mixture of losses; "" if it may stand."""
    try:
        loss_table.weights(loss)
    except ValueError as error:
        return str(error)
    return ""


def _range_instead(field: str, value) -> str:
    """Return the range that a number, or a number in a tuple, is outside of; "" if in none."""
    known = configs.field_of(field)
    if known is None or known.least is None:
        return ""
    for number in value if isinstance(value, tuple | list) else (value,):
        if not math.isfinite(number):
            return "a finite number"
        is_within = known.least <= number <= known.most
        if not is_within and known.most <= 1:  # a share
            return f"between {known.least} and {known.most}"
        if number < known.least:
            return "more than 0" if known.least == configs.ABOVE_ZERO else f"at least {known.least}"
        if number > known.most:
            shown = f"{known.most:,}" if isinstance(known.most, int) else f"{known.most:g}"
            return f"at most {shown}"
    return ""


def _validate_tree(config):
    """Check that a config has the fields of its stages, each of its type, and none unknown."""
    defaults = default(tuple(config.stages))
    for name, value in flat_fields("", defaults.to_dict()).items():
        if not config_files.has_field(config, name):
            raise ValueError(
                f"config.{name} is missing: expected a field of this name. Start a config file "
                "with dpo_jax.config.default(stages), and change its fields one by one."
            )
        _validate_type(name, config_files.value_of(config, name), value)
    for name in OPEN_BLOCKS:
        if not isinstance(config_files.value_of(config, name), ConfigDict):
            _fail(name, config_files.value_of(config, name), "a dict of options")
    for name in flat_fields("", config.to_dict()):
        is_option = any(name.startswith(f"{block}.") for block in OPEN_BLOCKS)
        # Blocks of stages that were taken out of config.stages may stay.
        if not is_option and configs.field_of(name) is None:
            raise ValueError(config_files.unknown_field(defaults, name))


def _validate_type(name, value, default_value):
    if isinstance(default_value, tuple):
        items = value if isinstance(value, tuple | list) else (None,)
        kind = type(default_value[0]) if default_value else str
        if not all(type(item) is kind for item in items):
            _fail(name, value, f"{TYPES[kind]}, several in a tuple")
    # Not isinstance, by which True would be 1.
    elif type(value) is not type(default_value):
        _fail(name, value, TYPES[type(default_value)])


def _validate_model(model):
    if bool(model.path) == bool(len(model.scratch)):
        expected = "a hub name or a folder in Hugging Face format, or else model.scratch"
        _fail("model.path", model.path, expected)


def _validate_attention(config):
    context = config.mesh.context
    if config.model.attention == "cudnn" and context > 1:
        expected = f"auto, as cuDNN's kernel does not run with config.mesh.context = {context}"
        _fail("model.attention", "cudnn", expected)


def _validate_lora(config):
    lora = config.model.lora
    if not lora.rank and lora.to_dict() != default(()).model.lora.to_dict():
        _fail("model.lora.rank", 0, "1 or more, as another field of model.lora is set")
    if not lora.rank:
        return
    if not stage_table.training_stages(config):
        _fail("model.lora.rank", lora.rank, "0, as no stage trains")
    if not config.model.path:
        expected = "0, as there is no model.path: adapters need weights to start from"
        _fail("model.lora.rank", lora.rank, expected)


def _validate_frozen_dtype(config):
    held = config.model.frozen_dtype
    if held != "float32" and not any(
        stage_table.holds_frozen(config, stage) for stage in config.stages
    ):
        expected = "float32, as no stage trains beside weights that it does not train"
        _fail("model.frozen_dtype", held, expected)


def _validate_data(data):
    if data.source != "toy" and not data.path and not data.mix:
        _fail("data.path", data.path, "a hub name, a folder or a file (or several, as data.mix)")
    if data.mix and data.path:
        _fail("data.mix", data.mix, "empty, as data.path is set: give one of them")
    mixtures.parse(data.mix, SOURCES)
    if data.mix and data.max_rows:
        expected = "0, as data.mix says how many rows are read of each set"
        _fail("data.max_rows", data.max_rows, expected)
    for field in ("path", "sft_path", "mix"):
        if data.source == "toy" and data[field]:
            _fail(f"data.{field}", data[field], "empty: the toy makes its own data")
    if not 0 < data.max_prompt_length < data.max_length:
        expected = f"between 1 and data.max_length - 1 = {data.max_length - 1}"
        _fail("data.max_prompt_length", data.max_prompt_length, expected)
    if not 0 <= data.eval_fraction < 1:
        _fail("data.eval_fraction", data.eval_fraction, "from 0 (hold out none) to below 1")


def _validate_columns_of_numbers(config):
    """Check that a column of weights or margins is used by each stage that reads pairs."""
    readers = [stage for stage in config.stages if stage_table.reads_pairs(config, stage)]
    for field in ("weight", "margin"):
        column = config.data[field]
        if not column:
            continue
        if config.data.source == "toy":
            _fail(f"data.{field}", column, "empty: the toy makes its own data")
        for stage in config.stages:
            if stage_table.reads_unpaired(config, stage):
                expected = f"empty, as the stage {stage} takes rows one by one, without {field}s"
                _fail(f"data.{field}", column, expected)
        if not readers:
            reason = "no stage trains on pairs of the data"
            if "pairs" in config.stages:
                reason = "the run trains on pairs of its own samples (the stage pairs)"
            _fail(f"data.{field}", column, f"empty, as {reason}")
    if not config.data.margin:
        return
    for stage in readers:
        loss = config[stage].get("loss", "")
        if stage == "rm" or (stage == "dpo" and loss_table.properties(loss).takes_margin):
            continue
        takers = ", ".join(loss_table.takers_of_margin())
        owner = f"the {loss} loss" if stage == "dpo" else f"the stage {stage}"
        expected = f"empty, as {owner} takes no margin (rm does, and dpo with {takers})"
        _fail("data.margin", config.data.margin, expected)


def _validate_training(stage, block):
    # What one optimiser update learns from, and so what is divided into microbatches.
    divided = "minibatch_size" if "minibatch_size" in block else "batch_size"
    if block.microbatch_size and block[divided] % block.microbatch_size:
        expected = f"a divisor of {stage}.{divided} = {block[divided]}"
        _fail(f"{stage}.microbatch_size", block.microbatch_size, expected)
    if not block.steps and not block.epochs > 0:
        _fail(f"{stage}.epochs", block.epochs, f"more than 0, as {stage}.steps is 0")
    if block.weight_decay and block.optimizer not in ("adamw", "lion"):
        expected = f"0, as {block.optimizer} has no weight decay (adamw and lion have)"
        _fail(f"{stage}.weight_decay", block.weight_decay, expected)
    if block.patience and not block.keep_best:
        expected = (
            f"0, as {stage}.keep_best is empty: name the evaluation metric that must improve, "
            "such as loss/eval"
        )
        _fail(f"{stage}.patience", block.patience, expected)


def _validate_dpo(config):
    block = config.dpo
    _validate_loss_numbers(block)
    _validate_divergence(block)
    _validate_ld(block)
    if block.cache_reference and block.reference == "none":
        _fail("dpo.cache_reference", True, "False, as dpo.reference is 'none'")
    if not block.reference:
        _fail("dpo.reference", block.reference, "'init', 'first', 'none' or the path of a model")
    if not loss_table.properties(block.loss).needs_reference:
        _validate_no_reference(block)
    _validate_moved_reference(config)
    _validate_toy_reference(config, "dpo")


def _validate_toy_reference(config, stage):
    reference = config[stage].reference
    if config.data.source == "toy" and reference not in ("init", "first"):
        expected = "'init' or 'first' on the toy, whose exact KL is to the initial policy"
        _fail(f"{stage}.reference", reference, expected)


def _validate_loss_numbers(block):
    """Check that a number which differs from its default is one that the loss takes."""
    taken = (*loss_table.properties(block.loss).numbers, *DIVERGENCES[block.divergence])
    for name in loss_table.numbers():
        default_value = configs.DPO[name].default
        if name not in taken and block[name] != default_value:
            takers = ", ".join(loss_table.takers(name))
            owner = f"the {block.loss} loss"
            if name == "divergence_alpha":
                owner = f"the divergence {block.divergence}"
            expected = f"{default_value:g}, its default, as {owner} does not take it ({takers} do)"
            _fail(f"dpo.{name}", block[name], expected)
    if not 0 <= block.label_smoothing < 0.5:
        _fail("dpo.label_smoothing", block.label_smoothing, "from 0 to below 0.5")
    if "exo" in loss_table.names(block.loss) and not block.label_smoothing:
        expected = "more than 0 (the paper: 0.001), as the exo loss is infinite at 0"
        _fail("dpo.label_smoothing", block.label_smoothing, expected)


def _validate_divergence(block):
    if block.divergence == "reverse_kl":
        return
    if not loss_table.properties(block.loss).takes_divergence:
        takers = ", ".join(name for name, loss in LOSSES.items() if loss.takes_divergence)
        # A mixture is told by the loss of it that is in the way, if there is one.
        loss = block.loss
        for name in loss_table.names(block.loss):
            if LOSSES[name].needs_reference and not LOSSES[name].takes_divergence:
                loss = name
        expected = f"'reverse_kl', as the {loss} loss has no other divergence ({takers} do)"
        _fail("dpo.divergence", block.divergence, expected)
    if block.reference == "none":
        expected = "'reverse_kl', as dpo.reference is 'none'"
        _fail("dpo.divergence", block.divergence, expected)


def _validate_ld(block):
    if block.ld_alpha == 1:
        return
    if not loss_table.properties(block.loss).needs_reference:
        expected = f"1, as dpo.ld_alpha shortens log-ratios and the {block.loss} loss uses none"
        _fail("dpo.ld_alpha", block.ld_alpha, expected)
    if block.cache_reference:
        expected = (
            f"False, as dpo.ld_alpha is {block.ld_alpha:g}: log-probs are kept of whole responses, "
            "not of their parts"
        )
        _fail("dpo.cache_reference", True, expected)


def _validate_no_reference(block):
    """Check that no reference is asked for, where the loss needs none."""
    if block.reference not in ("init", "first", "none"):
        expected = f"'none', as the {block.loss} loss needs no reference"
        _fail("dpo.reference", block.reference, expected)
    if block.cache_reference:
        expected = f"False, as the {block.loss} loss needs no reference"
        _fail("dpo.cache_reference", True, expected)


def _validate_kto(config):
    block = config.kto
    if block.batch_size < 2:
        expected = "at least 2: its KL is of each prompt with the completion of another row"
        _fail("kto.batch_size", block.batch_size, expected)
    if block.reference in ("", "none"):
        expected = (
            "'init', 'first' or the path of a model: KTO compares the policy with a reference"
        )
        _fail("kto.reference", block.reference, expected)
    _validate_toy_reference(config, "kto")


def _validate_moved_reference(config):
    """Check that a reference which moves is one that can, and that all else goes with it."""
    block = config.dpo
    if not block.reference_every:
        if block.reference_mix != 1:
            expected = "1, its default, as dpo.reference_every is 0: the reference stays"
            _fail("dpo.reference_mix", block.reference_mix, expected)
        return

    reason = ""
    if not loss_table.properties(block.loss).needs_reference:
        reason = f"the {block.loss} loss needs no reference"
    elif block.reference == "none":
        reason = "dpo.reference is 'none'"
    elif block.cache_reference:
        reason = "dpo.cache_reference keeps the log-probs of a reference that stays"
    elif config.model.lora.rank and stage_table.reference_of(config, "dpo") != "init":
        reason = (
            f"under adapters the reference {block.reference!r} is another model than their base"
        )
    if reason:
        _fail("dpo.reference_every", block.reference_every, f"0, as {reason}")
    if config.model.lora.rank and block.reference_mix != 1:
        expected = (
            "1 under adapters: a mean of their factors is not the mean of what these make of the "
            "weights"
        )
        _fail("dpo.reference_mix", block.reference_mix, expected)
    if block.keep_best.startswith(("loss/", "rewards_", "dpo_")):
        expected = (
            "a metric that does not depend on the reference, or empty, as dpo.reference_every "
            "moves it: later values are measured against another one"
        )
        _fail("dpo.keep_best", block.keep_best, expected)


def _validate_ppo(config):
    block = config.ppo
    _validate_reward_choice(config, "ppo")
    if block.minibatch_size < 1 or block.batch_size % block.minibatch_size:
        expected = f"a divisor of ppo.batch_size = {block.batch_size}"
        _fail("ppo.minibatch_size", block.minibatch_size, expected)
    # A step changes kl_coef by up to 0.2 batch_size / kl_horizon of itself: it would reach 0.
    if block.batch_size >= 5 * block.kl_horizon:
        least = block.batch_size // 5 + 1
        expected = f"at least {least:,}, as ppo.batch_size is {block.batch_size:,}"
        expected += ": kl_coef would become 0 or negative"
        _fail("ppo.kl_horizon", block.kl_horizon, expected)


def _validate_best_of_n(config):
    _validate_reward_choice(config, "best_of_n")
    if not config.best_of_n.n:
        _fail("best_of_n.n", config.best_of_n.n, "numbers of completions, 1 or more")


def _validate_reward_choice(config, stage):
    if config[stage].reward == "rm" and "rm" not in config.stages:
        expected = f"'true' (config.reward), or the stage rm before {stage} in config.stages"
        _fail(f"{stage}.reward", "rm", expected)


def _validate_labels(config):
    block = config.pairs
    if block.labels != "judge":
        for name, field in configs.JUDGE.items():
            if block.judge[name] != field.default:
                expected = f"its default, {field.default!r}, as pairs.labels is {block.labels!r}"
                _fail(f"pairs.judge.{name}", block.judge[name], f"{expected} (judge takes it)")
        return
    if not block.judge.model:
        _fail("pairs.judge.model", "", "the name of a chat model at its endpoint")
    if block.choose != "all":
        expected = (
            "'all', as pairs.labels is 'judge': a judge compares two completions, and gives none "
            "of them a reward by which the best could be found"
        )
        _fail("pairs.choose", block.choose, expected)


def _validate_sampling(config):
    reward = config.reward
    sampling = config.sampling
    on_toy = config.data.source == "toy"
    if reward.kind.startswith("toy") != on_toy:
        expected = "'toy' or 'toy_saturating' with data.source='toy', and only there"
        _fail("reward.kind", reward.kind, expected)
    if reward.kind == "rm":
        if reward.path:
            _fail("reward.path", reward.path, "empty: the reward is the rm stage's model")
        if "rm" not in config.stages:
            _fail("reward.kind", "rm", "another kind, or the stage rm in config.stages")
        if "pairs" in config.stages and stage_table.asks_reward(config, "pairs"):
            expected = "another kind: rm is trained on the pairs, so it cannot label them"
            _fail("reward.kind", "rm", expected)
    is_asked = any(stage_table.asks_reward(config, stage) for stage in config.stages)
    if not is_asked and not on_toy:
        for name, field in configs.REWARD.items():
            if reward[name] != field.default:
                expected = (
                    f"its default, {field.default!r}, as a judge labels the pairs and no other "
                    "stage asks for a reward"
                )
                _fail(f"reward.{name}", reward[name], expected)
    if reward.on_long != "error" and reward.kind != "model":
        expected = f"'error', as a reward of kind {reward.kind!r} does not take it (model does)"
        _fail("reward.on_long", reward.on_long, expected)
    if reward.kind != "rm" and not on_toy and not reward.path:
        _fail("reward.path", reward.path, "a hub name, a folder or a file")
    if not 0 <= sampling.min_prefix <= sampling.max_prefix:
        expected = f"from 0 to sampling.max_prefix = {sampling.max_prefix}"
        _fail("sampling.min_prefix", sampling.min_prefix, expected)


def _fail(field, value, expected):
    raise ValueError(f"config.{field} = {shortened(repr(value))}: expected {expected}.")
