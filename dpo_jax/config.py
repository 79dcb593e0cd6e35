"""The config tree: every field with its default and meaning, its checks, and what each stage depends on.

A config file calls `default(stages)` and changes fields. The tree holds a block for each stage it runs and
for no other, so an override of a field that would do nothing is refused by name. Defaults are the paper's
(appendix B) or, where it is silent, its reference code's.
"""

import json
import re

from ml_collections import ConfigDict

SOURCES = ("local", "hh", "shp", "imdb", "tldr", "cnn_dailymail", "toy")
TRUNCATIONS = ("auto", "keep_start", "keep_end", "keep_cue")
OPTIMIZERS = ("rmsprop", "adamw", "adafactor", "lion", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
REWARDS = ("classifier", "ngram", "model", "rm", "toy", "toy_saturating")
SMOOTHED_LOSSES = ("sigmoid", "robust")  # the preference losses that use label_smoothing
PREFERENCE_LOSSES = ("sigmoid", "sigmoid_norm", "ipo", "ipo_sum", "hinge", "robust")


def default(stages: tuple[str, ...]) -> ConfigDict:
    """The config of a run through `stages`, with the paper's values."""
    config = ConfigDict()
    config.stages = tuple(stages)  # what runs, in order; each writes WORKDIR/NAME/
    config.run = ""  # name of the last training stage's folder, so that a sweep shares a WORKDIR; "": the stage's
    config.seed = 0  # weights from scratch, data order, sampling
    config.model = ConfigDict(dict(
        path="",  # Hugging Face name or folder with config.json, safetensors and tokenizer; "": from scratch
        tokenizer="",  # where the tokenizer is; "": with the model
        scratch=dict(),  # Hugging Face config fields (model_type, n_layer, ...) of a model made at random
        dtype="float32",  # compute dtype: float32 or bfloat16; weights, log-probs and losses stay float32
        attention="auto",  # xla; splash on TPUs; cudnn on NVIDIA's GPUs; auto: what is made for the device
        remat="none",  # what the backward pass recomputes: none, full (all of a layer), dots (all but products)
        unroll=1,  # layers compiled one after the other: more is faster on CPU, compiles longer
    ))
    config.model.lora = ConfigDict(dict(
        rank=0,  # of low-rank adapters (LoRA), which are trained instead of the weights; 0: all weights are trained
        alpha=16.0,  # their products are scaled by alpha / rank
        targets=(),  # layers that have one, of q, k, v, out, gate, up, down; (): all that the model has
        init="b_zero",  # which factor starts from 0: b_zero (the usual: A is random) or a_zero (B is)
    ))
    config.data = ConfigDict(dict(
        source="local",  # local, hh, shp, imdb, tldr, cnn_dailymail or toy
        path="",  # hub name (owner/name, or owner/name:subset), folder or file
        sft_path="",  # what sft trains on, and prompts to sample from are taken from, if not data.path
        train_split="train",  # a split's name, or several joined by +
        eval_split="",  # "": test or validation where there is one, else a held-out part of the one split
        eval_fraction=0.02,  # share of prompts held out, chosen by hash, where there is one split only
        max_rows=0,  # train on the first rows only; 0: all
        max_eval_rows=256,  # evaluate on the first held-out rows only; 0: all
        max_length=512,  # longest prompt + response, tokens
        max_prompt_length=256,  # a prompt is cut to this where prompt + response is too long, tokens
        truncate="auto",  # what of a cut prompt stays: keep_start, keep_end, keep_cue (start, last 16); auto: by source
        append_eos=True,  # end each response with EOS; False only where every response has one length
        shuffle=True,  # a new order each epoch; False: the file's order
        on_bad_row="error",  # a malformed row is an error, or counted and left out: drop
        max_dropped=0.05,  # stop when more than this share of the rows would be dropped
        show=0,  # print this many rows as the model sees them, scored tokens marked
    ))
    config.mesh = ConfigDict(dict(
        data=-1,  # copies of the weights; -1: all devices that are left
        fsdp=1,  # devices that split both the weights and the batch
        tensor=1,  # devices that split heads, feed-forward width and vocabulary
    ))
    config.log = ConfigDict(dict(
        tensorboard=False,  # write TensorBoard events to each stage's folder (needs tensorboardX)
        wandb="",  # Weights & Biases project; "": off (needs wandb)
    ))
    if set(stages) & set(SAMPLING_STAGES):
        config.reward = ConfigDict(dict(
            kind="classifier",  # classifier or ngram (p(positive)), model, toy, toy_saturating; rm where none is known
            path="siebert/sentiment-roberta-large-english",  # its hub name or folder; ngram: labelled texts; rm: none
            batch_size=64,  # texts scored at a time, over all devices
        ))
        config.sampling = ConfigDict(dict(
            max_new_tokens=60,  # longest completion, tokens
            min_prefix=0,  # prompts are the first min_prefix to max_prefix tokens of a text
            max_prefix=0,  # 0: prompts are the data's own
            batch_size=256,  # completions sampled at a time, over all devices
        ))
    for stage in stages:
        if stage not in BLOCKS:
            raise ValueError(f"unknown stage {stage!r}; there are: {', '.join(BLOCKS)}.")
        config[stage] = ConfigDict(BLOCKS[stage]())
    return config


def _training(**changed) -> dict:
    """The fields that every training stage has; `changed`: defaults of a stage's own."""
    return dict(
        batch_size=64,  # rows (pairs) per optimiser step, over all devices
        microbatch_size=0,  # rows per forward and backward pass, over all devices; 0: the whole batch
        steps=0,  # optimiser steps; 0: what `epochs` makes
        epochs=1.0,  # passes over the data, where steps is 0
        optimizer="rmsprop",  # rmsprop (as torch's), adamw, adafactor, lion or sgd
        weight_decay=0.0,  # of adamw and lion, times the learning rate
        lr=1e-6,  # peak learning rate
        schedule="constant",  # after the warm-up: constant, or linear or cosine to 0
        warmup_steps=150,  # linear from lr / (warmup_steps + 1)
        max_grad_norm=10.0,  # gradients are scaled down to this norm; 0: never
        eval_every=312,  # steps between evaluations (the reference's 20,000 examples); one before step 1 and at the end
        save_every=312,  # steps between checkpoints; one at the end
        log_every=1,  # steps between rows of metrics.jsonl
        keep=1,  # how many of the latest checkpoints to keep
        keep_best="",  # an evaluation metric: its best checkpoint is kept too, and exported; losses are minimised
    ) | changed


def _sft() -> dict:
    return dict(
        loss="sum",  # per example: sum of its tokens' losses (the reference), or token_mean: over all tokens
        **_training(),
    )


def _preferred_ft() -> dict:
    return _sft() | dict(
        seed=0,  # added to config.seed for the order of this stage's data: the paper's runs differ by it
    )


def _dpo() -> dict:
    return dict(
        loss="sigmoid",  # sigmoid, sigmoid_norm, ipo (per-token mean), ipo_sum, hinge or robust
        beta=0.1,  # strength of the KL penalty
        label_smoothing=0.0,  # assumed share of flipped labels; sigmoid and robust only
        reference="init",  # init: the weights this stage starts from; none: reference-free; or a model's path
        cache_reference=False,  # compute the reference's log-probs before training and keep them in WORKDIR/reference
        **_training(),
    )


def _pairs() -> dict:
    return dict(
        prompts=25_000,  # how many prompts are sampled
        completions=4,  # completions per prompt; all their pairs are labelled
        labels="deterministic",  # the higher reward is chosen; or bradley_terry: with probability sigmoid(difference)
    )


def _unlikelihood() -> dict:
    return dict(
        alpha=0.5,  # weight of the rejected response's log-prob
        **_training(),
    )


def _rm() -> dict:
    return _training(epochs=3.0, keep_best="rewards_eval/accuracies")


def _ppo() -> dict:
    return dict(
        reward="rm",  # what is maximised: rm (the rm stage's model) or true (config.reward)
        target_kl=6.0,  # nats per completion, to which kl_coef adapts
        init_kl_coef=0.2,  # weight of the KL penalty at the start, on rewards of deviation 1
        kl_horizon=10_000,  # completions over which kl_coef adapts
        inner_epochs=4,  # passes over each step's completions
        minibatch_size=256,  # completions per optimiser update
        gae_lambda=0.95,  # of the advantage estimates; 1: plain returns less the value
        clip=0.2,  # largest change of a token's probability ratio that is rewarded
        value_clip=0.2,  # largest change of a value that is rewarded
        value_coef=0.1,  # weight of the value loss
        **_training(batch_size=1024, optimizer="adamw", lr=1e-5, warmup_steps=0, max_grad_norm=1.0, eval_every=10,
                    save_every=10),
    )


def _best_of_n() -> dict:
    return dict(
        n=(1, 4, 16, 64, 128),  # of how many completions the best is taken
        reward="rm",  # by which it is the best: rm (the rm stage's model) or true (config.reward)
        prompts=256,  # how many held-out prompts
    )


def _evaluate() -> dict:
    return dict(
        prompts=256,  # how many held-out prompts, in training (every eval_every steps) and at the end
        show=4,  # completions of policy and reference that are shown side by side
    )


BLOCKS = {"sft": _sft, "pairs": _pairs, "preferred_ft": _preferred_ft, "unlikelihood": _unlikelihood, "rm": _rm,
          "dpo": _dpo, "ppo": _ppo, "best_of_n": _best_of_n, "evaluate": _evaluate}
TRAINING_STAGES = ("sft", "preferred_ft", "unlikelihood", "rm", "dpo", "ppo")
POLICY_STAGES = ("preferred_ft", "unlikelihood", "dpo", "ppo")  # whose policy `evaluate` compares with where it began
PAIR_STAGES = ("preferred_ft", "unlikelihood", "rm", "dpo")  # which train on the pairs
SAMPLING_STAGES = ("pairs", "ppo", "best_of_n", "evaluate")  # which sample completions and score them


ALLOWED = {  # field -> its values; STAGE: every training stage
    "model.dtype": ("float32", "bfloat16"), "model.attention": ("auto", "xla", "splash", "cudnn"),
    "model.remat": ("none", "full", "dots"), "model.lora.init": ("b_zero", "a_zero"),
    "data.source": SOURCES, "data.truncate": TRUNCATIONS, "data.on_bad_row": ("error", "drop"),
    "reward.kind": REWARDS, "ppo.reward": ("rm", "true"), "best_of_n.reward": ("rm", "true"),
    "sft.loss": ("sum", "token_mean"), "preferred_ft.loss": ("sum", "token_mean"), "dpo.loss": PREFERENCE_LOSSES,
    "pairs.labels": ("bradley_terry", "deterministic"),
    "STAGE.optimizer": OPTIMIZERS, "STAGE.schedule": SCHEDULES,
}
LEAST = {  # field -> its lowest value
    "model.unroll": 1, "model.lora.rank": 0, "data.max_length": 2, "data.max_rows": 0, "data.max_eval_rows": 0,
    "data.show": 0, "reward.batch_size": 1, "sampling.max_new_tokens": 1, "sampling.batch_size": 1,
    "pairs.prompts": 1, "pairs.completions": 2, "unlikelihood.alpha": 0, "ppo.inner_epochs": 1, "ppo.init_kl_coef": 0,
    "ppo.value_coef": 0, "best_of_n.prompts": 1, "evaluate.prompts": 2, "evaluate.show": 0,
    "STAGE.batch_size": 1, "STAGE.eval_every": 1, "STAGE.save_every": 1, "STAGE.log_every": 1, "STAGE.keep": 1,
    "STAGE.microbatch_size": 0, "STAGE.steps": 0, "STAGE.warmup_steps": 0, "STAGE.max_grad_norm": 0,
    "STAGE.weight_decay": 0,
}


def validate(config: ConfigDict) -> None:
    """Checks every field that has a wrong value; ValueError names the field, the value and what is allowed."""
    if not config.stages:
        _fail("stages", config.stages, "at least one of " + ", ".join(BLOCKS))
    for stage in config.stages:
        if stage not in BLOCKS:
            _fail("stages", stage, "one of " + ", ".join(BLOCKS))
        if stage not in config:
            _fail("stages", stage, "a stage that this config file has a block for; take a config file that runs it")
    if list(config.stages) != [stage for stage in BLOCKS if stage in config.stages]:
        _fail("stages", config.stages, "each stage once, in the order " + ", ".join(BLOCKS))
    if "evaluate" in config.stages and not set(config.stages) & set(POLICY_STAGES):
        _fail("stages", config.stages, "a stage to evaluate, one of " + ", ".join(POLICY_STAGES))
    if len(set(config.stages) & set(POLICY_STAGES)) > 1:
        _fail("stages", config.stages, "one of " + ", ".join(POLICY_STAGES) + " a run; give the next a run of its own")
    if config.run and not set(config.stages) & set(TRAINING_STAGES):
        _fail("run", config.run, "empty where no stage trains")
    if config.run in (*BLOCKS, "reference") or config.run and not re.fullmatch(r"\w[\w.-]*", config.run):
        _fail("run", config.run, "a folder's name in letters, digits, '.', '_' and '-', other than a stage's")
    for field, value in _flat("", config.to_dict()).items():
        _validate_alone(field, value)
    _validate_model(config.model)
    _validate_lora(config)
    _validate_data(config.data)
    for stage in set(config.stages) & set(TRAINING_STAGES):
        _validate_training(stage, config[stage])
    if "dpo" in config.stages:
        _validate_dpo(config.dpo)
        if config.data.source == "toy" and config.dpo.reference != "init":
            _fail("dpo.reference", config.dpo.reference, "'init' on the toy, whose exact KL is to the initial policy")
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
        _fail("model.path", model.path, "a hub name or a folder in Hugging Face format, or else model.scratch")


def _validate_lora(config):
    lora = config.model.lora
    if not lora.rank and lora.to_dict() != default(()).model.lora.to_dict():
        _fail("model.lora.rank", 0, "1 or more, as another field of model.lora is given")
    if not lora.alpha > 0:
        _fail("model.lora.alpha", lora.alpha, "more than 0")
    if lora.rank and not (config.model.path and set(config.stages) & set(TRAINING_STAGES)):
        _fail("model.lora.rank", lora.rank, "0 where no stage trains, or none has a model.path to begin with")


def _validate_data(data):
    if data.source != "toy" and not data.path:
        _fail("data.path", data.path, "a hub name, a folder or a file")
    for field in ("path", "sft_path"):
        if data.source == "toy" and data[field]:
            _fail(f"data.{field}", data[field], "empty: the toy makes its own data")
    if not 0 < data.max_prompt_length < data.max_length:
        _fail("data.max_prompt_length", data.max_prompt_length,
              f"between 1 and data.max_length - 1 = {data.max_length - 1}")
    if not 0 < data.eval_fraction < 1:
        _fail("data.eval_fraction", data.eval_fraction, "between 0 and 1")
    if not 0 <= data.max_dropped <= 1:
        _fail("data.max_dropped", data.max_dropped, "between 0 and 1")


def _validate_training(stage, block):
    divided = "minibatch_size" if stage == "ppo" else "batch_size"
    if block.microbatch_size and block[divided] % block.microbatch_size:
        _fail(f"{stage}.microbatch_size", block.microbatch_size, f"a divisor of {stage}.{divided} = {block[divided]}")
    if not block.lr > 0:
        _fail(f"{stage}.lr", block.lr, "more than 0")
    if not block.steps and not block.epochs > 0:
        _fail(f"{stage}.epochs", block.epochs, f"more than 0, where {stage}.steps is 0")
    if block.weight_decay and block.optimizer not in ("adamw", "lion"):
        _fail(f"{stage}.weight_decay", block.weight_decay, f"0: {block.optimizer} has none, adamw and lion have")


def _validate_dpo(block):
    if not block.beta > 0:
        _fail("dpo.beta", block.beta, "more than 0")
    if not 0 <= block.label_smoothing < 0.5:
        _fail("dpo.label_smoothing", block.label_smoothing, "from 0 to below 0.5")
    if block.label_smoothing and block.loss not in SMOOTHED_LOSSES:
        _fail("dpo.label_smoothing", block.label_smoothing,
              f"0: the {block.loss} loss has none, {' and '.join(SMOOTHED_LOSSES)} have")
    if block.cache_reference and block.reference == "none":
        _fail("dpo.cache_reference", True, 'False where dpo.reference is "none"')
    if not block.reference:
        _fail("dpo.reference", block.reference, '"init", "none" or the path of a model')


def _validate_ppo(config):
    block = config.ppo
    _validate_rm("ppo", config)
    if block.minibatch_size < 1 or block.batch_size % block.minibatch_size:
        _fail("ppo.minibatch_size", block.minibatch_size, f"a divisor of ppo.batch_size = {block.batch_size}")
    for field in ("target_kl", "kl_horizon", "clip", "value_clip"):
        if not block[field] > 0:
            _fail(f"ppo.{field}", block[field], "more than 0")
    if not 0 <= block.gae_lambda <= 1:
        _fail("ppo.gae_lambda", block.gae_lambda, "between 0 and 1")


def _validate_rm(stage, config):
    """A stage's choice of reward."""
    if config[stage].reward == "rm" and "rm" not in config.stages:
        _fail(f"{stage}.reward", "rm", f"'true' (config.reward), or rm before {stage} in config.stages")


def _validate_sampling(config):
    reward, sampling = config.reward, config.sampling
    toy = config.data.source == "toy"
    if reward.kind.startswith("toy") != toy:
        _fail("reward.kind", reward.kind, "'toy' or 'toy_saturating' with data.source='toy', and only there")
    if reward.kind == "rm":
        if reward.path:
            _fail("reward.path", reward.path, "empty: the reward is the rm stage's model")
        if "rm" not in config.stages:
            _fail("reward.kind", reward.kind, "another one, or rm in config.stages")
        if "pairs" in config.stages:
            _fail("reward.kind", reward.kind, "another one, by which the pairs are labelled that rm is trained on")
    elif not toy and not reward.path:
        _fail("reward.path", reward.path, "a hub name, a folder or a file")
    if not 0 <= sampling.min_prefix <= sampling.max_prefix:
        _fail("sampling.min_prefix", sampling.min_prefix, f"from 0 to sampling.max_prefix = {sampling.max_prefix}")


def _fail(field, value, expected):
    raise ValueError(f"config.{field} = {value!r}: expected {expected}.")


# What can change between two starts of a stage without changing what it makes.
_FREE = ("data.show", "evaluate.show", "model.attention", "model.remat", "model.unroll", "sampling.batch_size",
         "reward.batch_size", "log_every", "save_every", "keep")


def model_options(config: ConfigDict) -> dict:
    """How a run's models compute: options of `families.from_hf`."""
    return {name: config.model[name] for name in ("dtype", "attention", "remat", "unroll")}


def folder_names(config: ConfigDict) -> dict[str, str]:
    """Stage -> folder under WORKDIR: its name; `config.run` for the last training stage, and a suffix after it."""
    names = {stage: stage for stage in config.stages}
    if config.run:
        last = max(i for i, stage in enumerate(config.stages) if stage in TRAINING_STAGES)
        for i, stage in enumerate(config.stages[last:]):
            names[stage] = config.run if i == 0 else f"{stage}-{config.run}"
    return names


def dependencies(config: ConfigDict, stage: str) -> dict:
    """Every field (dotted name -> value) that the stage's result depends on: its own, the model's, the data's,
    those of the stages before it, and of sampling where any of these samples."""
    before = config.stages[:config.stages.index(stage) + 1]
    fields = {"seed": config.seed, "stages": list(before)}
    blocks = ["model", "data", *before]
    if stage in POLICY_STAGES and "evaluate" in config.stages:
        blocks.append("evaluate")  # it measures the policy in training too
    if set(blocks) & set(SAMPLING_STAGES):
        blocks += ["reward", "sampling"]
    for block in blocks:
        fields |= _flat(block, json.loads(config[block].to_json()))
    return {name: value for name, value in fields.items()
            if name not in _FREE and name.rpartition(".")[2] not in _FREE}


def _flat(prefix, tree) -> dict:
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else key
        flat |= _flat(name, value) if isinstance(value, dict) else {name: value}
    return flat
