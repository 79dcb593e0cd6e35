"""The config tree: every field with its default and meaning, its checks, and what each stage
depends on.

A config file calls `default(stages)` and changes fields. The tree holds a block for each stage it
runs and for no other, so an override of a field that would do nothing is refused by name. Defaults
are the paper's (appendix B) or, where it is silent, its reference code's.
"""

import json

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
    # name of the last training stage's folder, so that a sweep shares a WORKDIR; "": the stage's
    config.run = ""
    config.seed = 0  # weights from scratch, data order, sampling
    config.model = ConfigDict(
        dict(
            # Hugging Face name or folder with config.json, safetensors and tokenizer; "": from
            # scratch
            path="",
            tokenizer="",  # where the tokenizer is; "": with the model
            # Hugging Face config fields (model_type, n_layer, ...) of a model made at random
            scratch=dict(),
            # compute dtype: float32 or bfloat16; weights, log-probs and losses stay float32
            dtype="float32",
            # xla; splash on TPUs; cudnn on NVIDIA's GPUs; auto: what is made for the device
            attention="auto",
            # what the backward pass recomputes: none, full (all of a layer), dots (all but
            # products)
            remat="none",
            unroll=1,  # layers compiled one after the other: more is faster on CPU, compiles longer
        )
    )
    config.model.lora = ConfigDict(
        dict(
            # of low-rank adapters (LoRA), which are trained instead of the weights; 0: all weights
            # are trained
            rank=0,
            alpha=16.0,  # their products are scaled by alpha / rank
            # layers that have one, of q, k, v, out, gate, up, down; (): all that the model has
            targets=(),
            # which factor starts from 0: b_zero (the usual: A is random) or a_zero (B is)
            init="b_zero",
        )
    )
    config.data = ConfigDict(
        dict(
            source="local",  # local, hh, shp, imdb, tldr, cnn_dailymail or toy
            path="",  # hub name (owner/name, or owner/name:subset), folder or file
            # what sft trains on, and prompts to sample from are taken from, if not data.path
            sft_path="",
            train_split="train",  # a split's name, or several joined by +
            # "": test or validation where there is one, else a held-out part of the one split
            eval_split="",
            # share of prompts held out, chosen by hash, where there is one split only
            eval_fraction=0.02,
            max_rows=0,  # train on the first rows only; 0: all
            max_eval_rows=256,  # evaluate on the first held-out rows only; 0: all
            max_length=512,  # longest prompt + response, tokens
            # a prompt is cut to this where prompt + response is too long, tokens
            max_prompt_length=256,
            # what of a cut prompt stays: keep_start, keep_end, keep_cue (start, last 16); auto: by
            # source
            truncate="auto",
            # end each response with EOS; False only where every response has one length
            append_eos=True,
            shuffle=True,  # a new order each epoch; False: the file's order
            on_bad_row="error",  # a malformed row is an error, or counted and left out: drop
            max_dropped=0.05,  # stop when more than this share of the rows would be dropped
            show=0,  # print this many rows as the model sees them, scored tokens marked
        )
    )
    config.mesh = ConfigDict(
        dict(
            data=-1,  # copies of the weights; -1: all devices that are left
            fsdp=1,  # devices that split both the weights and the batch
            tensor=1,  # devices that split heads, feed-forward width and vocabulary
        )
    )
    config.log = ConfigDict(
        dict(
            # write TensorBoard events to each stage's folder (needs tensorboardX)
            tensorboard=False,
            wandb="",  # Weights & Biases project; "": off (needs wandb)
        )
    )
    if set(stages) & set(SAMPLING_STAGES):
        config.reward = ConfigDict(
            dict(
                # classifier or ngram (p(positive)), model, toy, toy_saturating; rm where none is
                # known
                kind="classifier",
                # its hub name or folder; ngram: labelled texts; rm: none
                path="siebert/sentiment-roberta-large-english",
                batch_size=64,  # texts scored at a time, over all devices
            )
        )
        config.sampling = ConfigDict(
            dict(
                max_new_tokens=60,  # longest completion, tokens
                min_prefix=0,  # prompts are the first min_prefix to max_prefix tokens of a text
                max_prefix=0,  # 0: prompts are the data's own
                batch_size=256,  # completions sampled at a time, over all devices
            )
        )
    for stage in stages:
        if stage not in BLOCKS:
            raise ValueError(f"unknown stage {stage!r}; there are: {', '.join(BLOCKS)}.")
        config[stage] = ConfigDict(BLOCKS[stage]())
    return config


def _training(**changed) -> dict:
    """The fields that every training stage has; `changed`: defaults of a stage's own."""
    return (
        dict(
            batch_size=64,  # rows (pairs) per optimiser step, over all devices
            # rows per forward and backward pass, over all devices; 0: the whole batch
            microbatch_size=0,
            steps=0,  # optimiser steps; 0: what `epochs` makes
            epochs=1.0,  # passes over the data, where steps is 0
            optimizer="rmsprop",  # rmsprop (as torch's), adamw, adafactor, lion or sgd
            weight_decay=0.0,  # of adamw and lion, times the learning rate
            lr=1e-6,  # peak learning rate
            schedule="constant",  # after the warm-up: constant, or linear or cosine to 0
            warmup_steps=150,  # linear from lr / (warmup_steps + 1)
            max_grad_norm=10.0,  # gradients are scaled down to this norm; 0: never
            # steps between evaluations (the reference's 20,000 examples); one before step 1 and at
            # the end
            eval_every=312,
            save_every=312,  # steps between checkpoints; one at the end
            log_every=1,  # steps between rows of metrics.jsonl
            keep=1,  # how many of the latest checkpoints to keep
            # an evaluation metric: its best checkpoint is kept too, and exported; losses are
            # minimised
            keep_best="",
        )
        | changed
    )


def _sft() -> dict:
    return dict(
        # per example: sum of its tokens' losses (the reference), or token_mean: over all tokens
        loss="sum",
        **_training(),
    )


def _preferred_ft() -> dict:
    return _sft() | dict(
        # added to config.seed for the order of this stage's data: the paper's runs differ by it
        seed=0,
    )


def _dpo() -> dict:
    return dict(
        loss="sigmoid",  # sigmoid, sigmoid_norm, ipo (per-token mean), ipo_sum, hinge or robust
        beta=0.1,  # strength of the KL penalty
        label_smoothing=0.0,  # assumed share of flipped labels; sigmoid and robust only
        # init: the weights this stage starts from; none: reference-free; or a model's path
        reference="init",
        # compute the reference's log-probs before training and keep them in WORKDIR/reference
        cache_reference=False,
        **_training(),
    )


def _pairs() -> dict:
    return dict(
        prompts=25_000,  # how many prompts are sampled
        completions=4,  # completions per prompt; all their pairs are labelled
        # the higher reward is chosen; or bradley_terry: with probability sigmoid(difference)
        labels="deterministic",
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
        **_training(
            batch_size=1024,
            optimizer="adamw",
            lr=1e-5,
            warmup_steps=0,
            max_grad_norm=1.0,
            eval_every=10,
            save_every=10,
        ),
    )


def _best_of_n() -> dict:
    return dict(
        n=(1, 4, 16, 64, 128),  # of how many completions the best is taken
        reward="rm",  # by which it is the best: rm (the rm stage's model) or true (config.reward)
        prompts=256,  # how many held-out prompts
    )


def _evaluate() -> dict:
    return dict(
        # how many held-out prompts, in training (every eval_every steps) and at the end
        prompts=256,
        show=4,  # completions of policy and reference that are shown side by side
    )


BLOCKS = {
    "sft": _sft,
    "pairs": _pairs,
    "preferred_ft": _preferred_ft,
    "unlikelihood": _unlikelihood,
    "rm": _rm,
    "dpo": _dpo,
    "ppo": _ppo,
    "best_of_n": _best_of_n,
    "evaluate": _evaluate,
}
TRAINING_STAGES = ("sft", "preferred_ft", "unlikelihood", "rm", "dpo", "ppo")
POLICY_STAGES = (
    "preferred_ft",
    "unlikelihood",
    "dpo",
    "ppo",
)  # whose policy `evaluate` compares with where it began
PAIR_STAGES = ("preferred_ft", "unlikelihood", "rm", "dpo")  # which train on the pairs
SAMPLING_STAGES = (
    "pairs",
    "ppo",
    "best_of_n",
    "evaluate",
)  # which sample completions and score them


# What can change between two starts of a stage without changing what it makes.
_FREE = (
    "data.show",
    "evaluate.show",
    "model.attention",
    "model.remat",
    "model.unroll",
    "sampling.batch_size",
    "reward.batch_size",
    "log_every",
    "save_every",
    "keep",
)


def model_options(config: ConfigDict) -> dict:
    """How a run's models compute: options of `families.from_hf`."""
    return {name: config.model[name] for name in ("dtype", "attention", "remat", "unroll")}


def folder_names(config: ConfigDict) -> dict[str, str]:
    """Stage -> folder under WORKDIR: its name; `config.run` for the last training stage, and a
    suffix after it.
    """
    names = {stage: stage for stage in config.stages}
    if config.run:
        last = max(i for i, stage in enumerate(config.stages) if stage in TRAINING_STAGES)
        for i, stage in enumerate(config.stages[last:]):
            names[stage] = config.run if i == 0 else f"{stage}-{config.run}"
    return names


def dependencies(config: ConfigDict, stage: str) -> dict:
    """Every field (dotted name -> value) that the stage's result depends on: its own, the model's,
    the data's, those of the stages before it, and of sampling where any of these samples.
    """
    before = config.stages[: config.stages.index(stage) + 1]
    fields = {"seed": config.seed, "stages": list(before)}
    blocks = ["model", "data", *before]
    if stage in POLICY_STAGES and "evaluate" in config.stages:
        blocks.append("evaluate")  # it measures the policy in training too
    if set(blocks) & set(SAMPLING_STAGES):
        blocks += ["reward", "sampling"]
    for block in blocks:
        fields |= flat_fields(block, json.loads(config[block].to_json()))
    return {
        name: value
        for name, value in fields.items()
        if name not in _FREE and name.rpartition(".")[2] not in _FREE
    }


def flat_fields(prefix, tree) -> dict:
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else key
        flat |= flat_fields(name, value) if isinstance(value, dict) else {name: value}
    return flat
