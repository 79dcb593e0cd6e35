"""The config tree: every field with its default and meaning, and what each stage depends on.

A config file calls `default(stages)` and changes fields. The tree has a block for each stage that
the run has and for no other, so an override of a field that would do nothing is refused by name.
Defaults are the paper's (appendix B) or, where it says nothing, those of its reference code.
"""

import json
import re
import typing

from ml_collections import ConfigDict

from dpo_jax import stage_table
from dpo_jax.loss_table import LOSSES
from dpo_jax.stage_table import STAGES

EXPORT_DTYPES = ("source", "float32", "bfloat16")
TRUNCATIONS = ("auto", "keep_start", "keep_end", "keep_cue")
OPTIMIZERS = ("rmsprop", "adamw", "adafactor", "lion", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
REWARDS = ("classifier", "ngram", "model", "rm", "toy", "toy_saturating")

METHODS = {  # method -> the stages after sft, in a run that samples its own pairs (IMDb, the toy)
    "dpo": ("pairs", "dpo", "evaluate"),
    "preferred_ft": ("pairs", "preferred_ft", "evaluate"),
    "unlikelihood": ("pairs", "unlikelihood", "evaluate"),
    "kto": ("pairs", "kto", "evaluate"),
    "ppo": ("pairs", "rm", "ppo", "evaluate"),
    "ppo_gt": ("ppo", "evaluate"),
    "ppo_gt_trl": ("ppo", "evaluate"),
    "best_of_n": ("pairs", "rm", "best_of_n"),
}
# TRL's settings of PPO, off the shelf: its defaults, and those of its sentiment example, in May
# 2023, when the paper was written.
TRL_PPO = dict(
    normalize_rewards=False,
    target_kl=6.0,
    init_kl_coef=0.2,
    kl_horizon=10_000,
    batch_size=256,
    minibatch_size=16,
    inner_epochs=4,
    gae_lambda=0.95,
    clip=0.2,
    value_clip=0.2,
    value_coef=0.1,
    optimizer="adamw",  # without weight decay: torch's Adam
    lr=1.41e-5,
    schedule="constant",
    warmup_steps=0,
    max_grad_norm=0.0,
)


SEEDS = 2**32 - 1  # jax takes 32 bits of a seed: a larger one would be another's double
MANY = 10**12  # of rows or steps: more than anybody means
ABOVE_ZERO = 1.2e-38  # float32 rounds what is smaller to 0


class Field(typing.NamedTuple):
    """A field of the config, with one line for a person."""

    default: object
    meaning: str
    # Of a number, or of each number in a tuple: the lowest value, and the highest that could be
    # meant. The checks of config_checks.py may narrow the range.
    least: float | None = None
    most: float | None = None


RUN = dict(
    stages=Field((), "what runs, in this order; each stage writes to WORKDIR/NAME/"),
    run=Field(
        "",
        "folder name of the last training stage; empty: the stage's name, plus whatever was "
        "changed",
    ),
    seed=Field(
        0,
        "seed of all that the run draws; the seed of a stage is added to it for that stage alone",
        least=0,
        most=SEEDS,
    ),
    rounds=Field(
        1,
        "how often the stages from pairs on are run, each time from the policy of the round "
        "before; those of round 2 write to WORKDIR/round_2/",
        least=1,
        most=1000,
    ),
)

LORA = dict(
    rank=Field(
        0,
        "rank of the adapters, trained instead of the weights; 0: no adapters",
        least=0,
        most=65_536,
    ),
    alpha=Field(
        16.0, "the adapters' product is scaled by alpha / rank", least=ABOVE_ZERO, most=1e6
    ),
    targets=Field((), "layers with adapters: any of q, k, v, out, gate, up, down; (): all of them"),
    init=Field(
        "b_zero", "which factor starts at zero: b_zero (A is random) or a_zero (B is random)"
    ),
)

MODEL = dict(
    path=Field(
        "",
        "Hugging Face name, or folder with config.json, safetensors and tokenizer; "
        "empty: random weights of the shape model.scratch",
    ),
    tokenizer=Field("", "Hugging Face name or folder of the tokenizer; empty: the model's own"),
    scratch=Field({}, "Hugging Face config fields (model_type, n_layer, ...) of a random model"),
    dtype=Field(
        "float32",
        "compute dtype, float32 or bfloat16; weights, log-probs and losses stay float32",
    ),
    frozen_dtype=Field(
        "float32",
        "float32 or bfloat16: what a training stage holds the kernels and embeddings in of weights "
        "that it reads and does not train: LoRA's base, and a reference that does not move, also "
        "where it is there to measure KL in training",
    ),
    attention=Field("auto", "attention kernel: xla, splash (TPU), cudnn (NVIDIA); auto: by device"),
    remat=Field(
        "none",
        "what the backward pass recomputes: none, dots (all but matrix products, outside of "
        "experts) or full (all)",
    ),
    unroll=Field(
        0,
        "layers unrolled per scan step: may be faster, but slower to compile; 0: all of up to 6 "
        "layers on a CPU and 12 on a GPU, else 1",
        least=0,
        most=1_000,
    ),
    lora=LORA,
)

DATA = dict(
    source=Field("local", "format: local (your files), hh, shp, imdb, tldr, cnn_dailymail or toy"),
    path=Field(
        "",
        "file (JSON, JSON lines, CSV, Parquet, Arrow; text .gz, .bz2, .xz too), folder of such "
        "files or of save_to_disk, or hub name (owner/name or owner/name:subset)",
    ),
    sft_path=Field(
        "", "data for the sft stage and for the prompts to sample from; empty: path or mix"
    ),
    train_split=Field("train", "split to train on, or several joined by +"),
    eval_split=Field(
        "",
        "split to evaluate on in training; empty: validation or test if there is one, else a "
        "held-out share",
    ),
    eval_fraction=Field(
        0.02,
        "approximate share of prompts to hold out, chosen by hash, if there is no test or "
        "validation split; 0: none",
        least=0,
        most=1,
    ),
    max_rows=Field(
        0,
        "train on this many rows only, drawn by a hash of their prompts, for which all rows are "
        "read; 0: on all",
        least=0,
        most=MANY,
    ),
    max_eval_rows=Field(
        256,
        "validate on this many held-out rows only, and test on as many others, drawn by a hash of "
        "their prompts; 0: on all",
        least=0,
        most=MANY,
    ),
    max_length=Field(
        512, "longest prompt and response together, in tokens", least=2, most=10_000_000
    ),
    max_prompt_length=Field(
        256,
        "a prompt is cut to this many tokens if prompt and response are longer than max_length",
        least=0,
        most=10_000_000,
    ),
    truncate=Field(
        "auto",
        "part of a cut prompt to keep: keep_start, keep_end, or keep_cue (start and last 16 "
        "tokens); auto: keep_end, if the source has no other",
    ),
    append_eos=Field(
        True,
        "end each response with EOS; set to False only if all responses have the same length",
    ),
    columns=Field(
        "",
        "names of your columns, where they are others: prompt=question,chosen=chosen_response",
    ),
    weight=Field(
        "",
        "column with each pair's weight, 0 or more: a pair of weight 2 counts as two; empty: all "
        "count once",
    ),
    margin=Field(
        "",
        "column with the margin by which the chosen response of a pair is to win, on the scale of "
        "rewards (beta times log-ratios); empty: 0",
    ),
    turns=Field(
        "all",
        "what SFT trains on in rows of whole conversations: all assistant turns, or the last one",
    ),
    template=Field({}, "options of the chat template, such as enable_thinking=False"),
    ignore=Field(
        (),
        "columns of rows, and keys of chat messages, to leave out although they have content",
    ),
    mix=Field(
        "",
        "several data sets instead of path, separated by commas, each with a number of rows or a "
        "share (else all of it) and perhaps its source and split: "
        "helpful.jsonl=1000, hh@Anthropic/hh-rlhf=50%, owner/name:subset[train]=10000",
    ),
    order=Field(
        "prompts",
        "what is shuffled: prompts (the pairs of a prompt stay together) or pairs (each alone)",
    ),
    group_pairs=Field(
        32,
        "most pairs that stay together; more of a prompt are cut into several",
        least=1,
        most=1_000_000,
    ),
    shuffle=Field(True, "shuffle before each epoch; False: keep the order of the file"),
    on_bad_row=Field("error", "what to do about a malformed row: error (stop) or drop (count it)"),
    max_dropped=Field(
        0.05, "stop if more than this share of the rows would be dropped", least=0, most=1
    ),
    on_leak=Field(
        "error",
        "what to do where a held-out prompt that evaluate, best_of_n or a win rate is to judge is "
        "trained on by a stage of the run: error (stop), drop (judge others in its place) or allow",
    ),
    show=Field(
        0,
        "print this many examples as the model reads them, with the trained part marked",
        least=0,
        most=1_000_000,
    ),
)

MESH = dict(
    data=Field(
        -1,
        "number of copies of the weights (the batch is split over them); -1: all remaining devices",
        least=-1,
        most=1_000_000,
    ),
    fsdp=Field(1, "devices that split both the weights and the batch", least=-1, most=1_000_000),
    context=Field(
        1,
        "devices that split the tokens of long rows, and the weights other than experts",
        least=1,
        most=1_000_000,
    ),
    expert=Field(
        1,
        "devices that split both the experts and the batch, in models that have experts",
        least=1,
        most=1_000_000,
    ),
    tensor=Field(
        1, "devices that split heads, feed-forward width and vocabulary", least=-1, most=1_000_000
    ),
)

LOG = dict(
    tensorboard=Field(
        False, "write TensorBoard events to each stage's folder (needs tensorboardX)"
    ),
    wandb=Field("", "Weights & Biases project (needs wandb); empty: off"),
    profile=Field(
        0,
        "each training stage writes a profile of three steps from this one on to its profile/; "
        "0: none",
        least=0,
        most=MANY,
    ),
)

EXPORT = dict(
    dtype=Field(
        "source",
        "type of the weights in hf/ of the last training stage: source (as model.path stores "
        "them), float32 or bfloat16; earlier stages keep float32, which later ones start from",
    ),
)

REWARD = dict(
    kind=Field(
        "classifier",
        "the true reward: classifier or ngram (probability of positive), model (a reward model), "
        "toy or toy_saturating; rm (the rm stage's model) if no true reward is known",
    ),
    path=Field(
        "siebert/sentiment-roberta-large-english",
        "hub name or folder of the classifier or model; ngram: labelled texts; rm: empty",
    ),
    on_long=Field(
        "error",
        "of a model that others trained: what to do about a text with more tokens than it has "
        "positions: error (stop) or cut (leave out its start)",
    ),
    batch_size=Field(64, "texts per batch, over all devices", least=1, most=100_000),
)

SAMPLING = dict(
    max_new_tokens=Field(60, "longest completion, in tokens", least=1, most=1_000_000),
    min_prefix=Field(
        0,
        "prompts are the first min_prefix to max_prefix tokens of a text",
        least=0,
        most=10_000_000,
    ),
    max_prefix=Field(0, "see min_prefix; 0: the prompts of the data", least=0, most=10_000_000),
    batch_size=Field(256, "completions sampled at a time, over all devices", least=1, most=100_000),
)

TRAINING = dict(  # of every stage that trains
    batch_size=Field(
        64, "examples (pairs) per optimiser step, over all devices", least=1, most=100_000
    ),
    microbatch_size=Field(
        0,
        "examples per forward and backward pass, over all devices; 0: the whole batch",
        least=0,
        most=100_000,
    ),
    steps=Field(0, "optimiser steps; 0: as given by epochs", least=0, most=10_000_000),
    epochs=Field(1.0, "passes over the data, if steps is 0", least=0, most=100_000),
    optimizer=Field("rmsprop", "rmsprop (as in PyTorch), adamw, adafactor, lion or sgd"),
    weight_decay=Field(
        0.0,
        "decoupled weight decay of adamw and lion, on all weights, norms and biases too; "
        "multiplied by the learning rate",
        least=0,
        most=1e3,
    ),
    lr=Field(1e-6, "peak learning rate", least=ABOVE_ZERO, most=1e38),
    schedule=Field(
        "constant", "learning rate after the warm-up: constant, linear or cosine (to 0)"
    ),
    warmup_steps=Field(
        150, "steps of linear warm-up, from lr / (warmup_steps + 1)", least=0, most=10_000_000
    ),
    max_grad_norm=Field(
        10.0, "gradients are scaled down to this norm; 0: never", least=0, most=1e30
    ),
    eval_every=Field(
        312,
        "steps between evaluations (312: 20,000 pairs); also at start and end",
        least=1,
        most=MANY,
    ),
    save_every=Field(312, "steps between checkpoints; also at the end", least=1, most=MANY),
    log_every=Field(1, "steps between rows of metrics.jsonl", least=1, most=MANY),
    keep=Field(
        2,
        "number of latest checkpoints to keep; with 2, a damaged one costs little",
        least=1,
        most=1_000_000,
    ),
    keep_best=Field(
        "",
        "keep and export the checkpoint with the best value of this evaluation metric (the lowest, "
        "for losses)",
    ),
    patience=Field(
        0,
        "end the stage after this many evaluations in a row without a better value of keep_best; "
        "0: never",
        least=0,
        most=MANY,
    ),
    seed=Field(
        0,
        "added to config.seed for what this stage draws: the order of its examples, new adapters, "
        "completions of ppo",
        least=0,
        most=SEEDS,
    ),
)


def _training(**defaults) -> dict[str, Field]:
    """Return the fields of every training stage, with defaults of one stage's own."""
    fields = dict(TRAINING)
    for name, default in defaults.items():
        fields[name] = TRAINING[name]._replace(default=default)
    return fields


BALANCE = dict(  # of the stages in objectives.BALANCED
    router_aux_loss_coef=Field(
        0.0,
        "weight of the load-balancing loss of models with experts, over all tokens of the batch; "
        "with several microbatches it takes one more forward pass of the layers",
        least=0,
        most=1e6,
    )
)

SFT = dict(
    loss=Field(
        "sum", "sum of an example's token losses (the reference's), or token_mean: over all"
    ),
    distinct=Field(
        False,
        "train and evaluate on each response to a prompt once, however many rows or pairs choose "
        "it; False: once for each",
    ),
    **BALANCE,
    **_training(),
)

JUDGE = dict(  # by whose votes pairs are labelled, where pairs.labels is judge
    model=Field("", "the chat model's name at its endpoint, which OPENAI_BASE_URL says"),
    template=Field(
        "dialogue",
        "the question: summary_simple, summary_concise, news_concise, dialogue, or a file",
    ),
    temperature=Field(0.0, "sampling temperature of the chat model", least=0, most=2),
    orders=Field(
        1,
        "1: which completion is shown first is drawn; 2: both orders are asked, and a pair on "
        "which they disagree is left out",
        least=1,
        most=2,
    ),
    concurrency=Field(8, "calls in flight at a time", least=1, most=10_000),
    requests_per_minute=Field(0.0, "most requests per minute; 0: no limit", least=0, most=1e9),
    timeout=Field(
        60.0, "seconds after which a hanging request is retried", least=ABOVE_ZERO, most=1e6
    ),
    max_calls=Field(0, "most answers that the stage may keep; 0: no cap", least=0, most=MANY),
    max_cost=Field(
        0.0, "most that they may cost, by the prices below; 0: no cap", least=0, most=1e12
    ),
    input_price=Field(0.0, "price of a million input tokens", least=0, most=1e12),
    output_price=Field(0.0, "price of a million output tokens", least=0, most=1e12),
)

PAIRS = dict(
    prompts=Field(25_000, "number of prompts to sample from", least=1, most=MANY),
    completions=Field(4, "completions per prompt", least=2, most=10_000),
    choose=Field(
        "all",
        "which of a prompt's completions make pairs: all (every two), best_worst (the one with the "
        "highest reward and the one with the lowest) or best_random (the highest and another one)",
    ),
    labels=Field(
        "deterministic",
        "deterministic: the higher reward is chosen; bradley_terry: with probability "
        "sigmoid(difference); judge: the completion that a chat model prefers",
    ),
    judge=JUDGE,
    seed=Field(
        0,
        "added to config.seed for what this stage draws: prompts, completions, labels, the order "
        "in which a judge sees two completions",
        least=0,
        most=SEEDS,
    ),
)

PREFERRED_FT = SFT

UNLIKELIHOOD = dict(
    alpha=Field(0.5, "weight of the rejected response's log-prob", least=0, most=1e6),
    **BALANCE,
    **_training(),
)

_WITH_DIVERGENCE = [name for name, loss in LOSSES.items() if loss.takes_divergence]

DPO = dict(
    loss=Field(
        "sigmoid",
        f"one of {', '.join(LOSSES)}, or a mixture, as sigmoid=1,nll=0.2: the sum of losses, each "
        "times its weight; a loss takes some of the numbers below, and refuses the others",
    ),
    beta=Field(
        0.1,
        "strength of the KL penalty: implicit rewards are beta times log-ratios; simpo: scale of "
        "the margin per token (the paper: 2 to 2.5); every loss but orpo and nll",
        least=ABOVE_ZERO,
        most=1e6,
    ),
    label_smoothing=Field(
        0.0,
        "assumed share of flipped labels, of sigmoid, sigmoid_norm, robust and exo, which needs "
        "one above 0",
        least=0,
        most=0.5,
    ),
    simpo_gamma=Field(
        1.0, "simpo: margin by which the chosen response is to win", least=0, most=1e6
    ),
    orpo_lambda=Field(
        0.1, "orpo: weight of the odds ratio, beside the likelihood", least=0, most=1e6
    ),
    cpo_alpha=Field(
        1.0, "cpo: weight of the likelihood of the chosen response, per token", least=0, most=1e6
    ),
    dpop_lambda=Field(
        50.0,
        "dpop: penalty on a chosen response that is less likely than under the reference",
        least=0,
        most=1e6,
    ),
    discopop_tau=Field(
        0.05,
        "discopop: width of the change from logistic to exponential loss",
        least=ABOVE_ZERO,
        most=1e6,
    ),
    divergence=Field(
        "reverse_kl",
        "divergence from the reference that is penalised: reverse_kl, forward_kl, jensen_shannon "
        f"or alpha; others than reverse_kl for {', '.join(_WITH_DIVERGENCE)}",
    ),
    divergence_alpha=Field(
        0.5,
        "alpha of divergence=alpha, between reverse_kl (0) and forward_kl (1)",
        least=0,
        most=1,
    ),
    weighting=Field(
        "none",
        "weight of each pair's loss: none (1), or wpo: near 1 for a pair that the policy itself "
        "might have written, and mostly less for others",
    ),
    ld_alpha=Field(
        1.0,
        "LD-DPO: factor of the log-probs of a response's tokens beyond the length of the pair's "
        "shorter response, in log-ratios; 1: all tokens count alike",
        least=0,
        most=1,
    ),
    reference=Field(
        "init",
        "reference model: init (the weights that the stage starts from, in each round), first "
        "(those that round 1 starts from), none (reference-free), or a path; losses that need no "
        "reference load none",
    ),
    reference_every=Field(
        0,
        "steps between moves of the reference to the policy (TR-DPO); 0: it stays",
        least=0,
        most=MANY,
    ),
    reference_mix=Field(
        1.0,
        "share of the policy in the weights of a moved reference; 1: the policy takes its place",
        least=ABOVE_ZERO,
        most=1,
    ),
    cache_reference=Field(
        False,
        "compute the reference's log-probs before training and keep them in WORKDIR/reference",
    ),
    **BALANCE,
    **_training(),
)

KTO = dict(
    beta=Field(
        0.1,
        "strength of the KL penalty: implicit rewards are beta times log-ratios",
        least=ABOVE_ZERO,
        most=1e6,
    ),
    desirable_weight=Field(
        1.0,
        "weight of desirable rows; weight x rows should be 1 to 4/3 times that of the undesirable "
        "rows",
        least=ABOVE_ZERO,
        most=1e6,
    ),
    undesirable_weight=Field(1.0, "weight of undesirable rows", least=ABOVE_ZERO, most=1e6),
    reference=Field(
        "init",
        "reference model: init (the weights that the stage starts from, in each round), first "
        "(those that round 1 starts from), or a path",
    ),
    **BALANCE,
    **_training(),
)

PPO = dict(
    reward=Field("rm", "reward to maximise: rm (the rm stage's model) or true (config.reward)"),
    normalize_rewards=Field(
        True,
        "bring rewards to mean 0 and deviation 1 of the first step's; False: take them as they are",
    ),
    target_kl=Field(
        6.0,
        "target KL to the reference, in nats per completion; kl_coef adapts to reach it",
        least=ABOVE_ZERO,
        most=1e6,
    ),
    init_kl_coef=Field(
        0.2,
        "initial weight of the KL penalty, on the scale of the rewards (see normalize_rewards); "
        "0: no penalty at any step",
        least=0,
        most=1e6,
    ),
    kl_horizon=Field(10_000, "number of completions over which kl_coef adapts", least=1, most=MANY),
    inner_epochs=Field(4, "passes over the completions of a step", least=1, most=10_000),
    minibatch_size=Field(256, "completions per optimiser update", least=1, most=100_000),
    gae_lambda=Field(
        0.95, "lambda of generalised advantage estimation; 1: returns minus values", least=0, most=1
    ),
    clip=Field(
        0.2, "clipping range of a token's probability ratio: 1 ± clip", least=ABOVE_ZERO, most=1e6
    ),
    value_clip=Field(0.2, "clipping range of the change of a value", least=ABOVE_ZERO, most=1e30),
    value_coef=Field(0.1, "weight of the value loss", least=0, most=1e6),
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

BEST_OF_N = dict(
    n=Field(
        (1, 4, 16, 64, 128),
        "values of N: how many completions to choose from",
        least=1,
        most=1_000_000,
    ),
    reward=Field("rm", "reward to choose by: rm (the rm stage's model) or true (config.reward)"),
    prompts=Field(256, "number of test prompts", least=1, most=MANY),
    seed=Field(0, "added to config.seed for the completions", least=0, most=SEEDS),
)

EVALUATE = dict(
    prompts=Field(
        256,
        "number of test prompts, and of validation prompts at each evaluation in training",
        least=2,
        most=MANY,
    ),
    show=Field(
        4,
        "completions to print: of the policy at each evaluation in training, and beside those of "
        "the reference at the end; 0: none",
        least=0,
        most=1_000_000,
    ),
    seed=Field(
        0, "added to config.seed for the completions that are measured", least=0, most=SEEDS
    ),
)

STAGE_FIELDS = {
    "sft": SFT,
    "pairs": PAIRS,
    "preferred_ft": PREFERRED_FT,
    "unlikelihood": UNLIKELIHOOD,
    "rm": _training(epochs=3.0, keep_best="rewards_eval/accuracies"),
    "dpo": DPO,
    "kto": KTO,
    "ppo": PPO,
    "best_of_n": BEST_OF_N,
    "evaluate": EVALUATE,
}


def default(stages: tuple[str, ...]) -> ConfigDict:
    """Return the config of a run through `stages`, with the paper's values.

    Raises ValueError for a stage that does not exist.
    """
    for stage in stages:
        if stage not in STAGES:
            raise ValueError(f"unknown stage {stage!r}: expected one of {', '.join(STAGES)}.")
    config = ConfigDict(_defaults(_fields(stages)))
    config.stages = tuple(stages)
    return config


def field_docs() -> list[tuple[str, object, str]]:
    """Return (dotted name, default, meaning) of every field, those of all stages among them."""
    return _flat_docs("", _fields(tuple(STAGES)))


def field_of(name: str) -> Field | None:
    """Return the field of a dotted name, whatever the stages; None where there is no such field."""
    found = _fields(tuple(STAGES))
    for part in name.split("."):
        if isinstance(found, Field) or part not in found:
            return None
        found = found[part]
    return found if isinstance(found, Field) else None


def _fields(stages: tuple[str, ...]) -> dict:
    """Return the tree of fields of a run through `stages`: Field, or a block of them, by name."""
    fields = RUN | dict(model=MODEL, data=DATA, mesh=MESH, log=LOG, export=EXPORT)
    if any(STAGES[stage].samples for stage in stages):
        fields |= dict(reward=REWARD, sampling=SAMPLING)
    return fields | {stage: STAGE_FIELDS[stage] for stage in stages}


def _defaults(fields: dict) -> dict:
    defaults = {}
    for name, field in fields.items():
        defaults[name] = field.default if isinstance(field, Field) else _defaults(field)
    return defaults


def _flat_docs(prefix: str, fields: dict) -> list[tuple[str, object, str]]:
    docs = []
    for name, field in fields.items():
        if isinstance(field, Field):
            docs.append((prefix + name, field.default, field.meaning))
        else:
            docs += _flat_docs(f"{prefix}{name}.", field)
    return docs


# Fields that may change between two starts of a stage: they change nothing that it makes, but for
# the rounding of its sums. Without a block: that field of every stage.
FREE = (
    "data.show",
    "evaluate.show",
    "model.attention",
    "model.remat",
    "model.unroll",
    "sampling.batch_size",
    "reward.batch_size",
    "microbatch_size",  # the gradient is added up over a step's microbatches
    "log_every",
    "save_every",
    "keep",
    "cache_reference",  # the same log-probs, computed earlier
    # A judge's answers are the same, however they are called and paid for.
    *(
        f"pairs.judge.{name}"
        for name in ("concurrency", "requests_per_minute", "timeout", "max_calls", "max_cost")
    ),
    *("pairs.judge.input_price", "pairs.judge.output_price"),
)


# Fields that only change what is trained on examples of which several may belong together.
GROUPING = ("data.order", "data.group_pairs")
# Fields that only change what is trained on pairs of the data.
OF_PAIRS = ("data.weight", "data.margin")

# Blocks whose fields are not ours, but Hugging Face's and the chat template's: they take any.
OPEN_BLOCKS = ("model.scratch", "data.template")


def sft_data(config: ConfigDict) -> ConfigDict:
    """Return the data block of sft and of prompts: config.data, at data.sft_path if given."""
    data = config.data.copy_and_resolve_references()
    data.update(weight="", margin="")  # they are of pairs
    if data.sft_path:
        # The split to evaluate on is the other data set's.
        data.update(path=data.sft_path, mix="", eval_split="")
    return data


def model_options(config: ConfigDict) -> dict:
    """Return how a run's models compute: options of `families.from_hf`."""
    return {name: config.model[name] for name in ("dtype", "attention", "remat", "unroll")}


def longest_sequence(config: ConfigDict) -> int:
    """Return how many tokens the longest sequence has that a run's stages read or sample."""
    longest = config.data.max_length
    if stage_table.samples(config):
        prefix = config.sampling.max_prefix
        prompt = 1 + prefix if prefix else config.data.max_prompt_length  # with a BOS
        longest = max(longest, prompt + config.sampling.max_new_tokens)
    return longest


def of_round(config: ConfigDict, number: int) -> ConfigDict:
    """Return the config of a round: that of a run which ends with it.

    So the folders and the records of a round are the same, however many rounds follow.
    """
    config = config.copy_and_resolve_references()
    config.rounds = number
    return config


def folder_names(config: ConfigDict) -> dict[str, str]:
    """Return each stage's folder under WORKDIR, in the last round.

    It is the stage's name; with `config.run`, the last training stage has that name instead, and
    each stage after it the name as a suffix. Stages of round 2 are in round_2/, where every stage
    but the last training one comes after a stage of the run's name.
    """
    names = {}
    is_after = False
    for stage in config.stages:
        is_in_later_round = config.rounds > 1 and stage_table.repeats(config, stage)
        is_run = bool(config.run) and stage == stage_table.training_stages(config)[-1]
        name = stage
        if is_run:
            name = config.run
        elif config.run and (is_after or is_in_later_round):
            name = f"{stage}-{config.run}"
        is_after = is_after or is_run
        if is_in_later_round:
            name = f"round_{config.rounds}/{name}"
        names[stage] = name
    return names


def is_round_folder(name: str) -> bool:
    """Return whether a folder of WORKDIR has this name because it holds a later round."""
    return re.fullmatch(r"round_\d+", name) is not None


def stages_so_far(config: ConfigDict, stage: str) -> tuple[str, ...]:
    """Return the stages, in order, that the result of a stage depends on, with the stage itself."""
    last = config.stages.index(stage)
    if config.rounds > 1 and stage_table.repeats(config, stage):
        # A later round begins with the policy of the one before.
        policies = stage_table.policy_stages(config)
        last = max(last, *map(config.stages.index, policies))
    return tuple(config.stages[: last + 1])


def _read_by(config: ConfigDict, stage: str) -> tuple[str, ...]:
    """Return the stages whose blocks the result of a stage depends on."""
    so_far = stages_so_far(config, stage)
    is_later_round = config.rounds > 1 and stage_table.repeats(config, stage)
    is_measured = STAGES[stage].is_policy or is_later_round
    # The policy is measured while it is trained, too.
    if is_measured and "evaluate" in config.stages and "evaluate" not in so_far:
        return (*so_far, "evaluate")
    return so_far


def dependencies(config: ConfigDict, stage: str) -> dict:
    """Return every field (dotted name -> value) that the result of a stage depends on.

    They are its own, the model's, the data's, those of the stages before it, and those of sampling
    if any of these samples. How pairs are grouped (GROUPING) counts from the first stage that
    trains in groups. Those of a later round have the round's number, too.
    """
    so_far = stages_so_far(config, stage)
    is_later_round = config.rounds > 1 and stage_table.repeats(config, stage)
    read = _read_by(config, stage)
    blocks = ["model", "data", *read]
    if any(STAGES[block].samples for block in read):
        blocks += ["reward", "sampling"]
    fields = {"seed": config.seed, "stages": list(so_far)}
    # Round 1 is the same run as one without rounds.
    if is_later_round:
        fields["rounds"] = config.rounds
    for block in blocks:
        fields |= flat_fields(block, json.loads(config[block].to_json()))
    # Where a run is not stopped, it judges the same prompts as if all were allowed.
    if fields["data.on_leak"] == "allow":
        fields["data.on_leak"] = "error"
    return {name: value for name, value in fields.items() if may_matter(config, stage, name)}


def may_matter(config: ConfigDict, stage: str, field: str) -> bool:
    """Return whether a field (dotted name) that a stage or one before it reads may change it."""
    if is_free(field):
        return False
    so_far = stages_so_far(config, stage)
    # A policy is measured while it is trained, on validation prompts and with draws of its own.
    if field == "data.on_leak":
        return stage in stage_table.JUDGING
    if field == "evaluate.seed":
        return stage == "evaluate"
    if field in OF_PAIRS:
        return any(stage_table.reads_pairs(config, name) for name in so_far)
    if field in GROUPING:
        return any(stage_table.trains_in_groups(config, name) for name in so_far)
    if field.startswith("reward."):
        return any(stage_table.asks_reward(config, name) for name in _read_by(config, stage))
    if field == "model.frozen_dtype":
        return any(stage_table.holds_frozen(config, name) for name in so_far)
    return True


def is_free(field: str) -> bool:
    """Return whether a field (dotted name) may change between two starts of a stage."""
    return field in FREE or field.rpartition(".")[2] in FREE


def flat_fields(prefix: str, tree: dict) -> dict:
    """Return the leaves of nested dicts by dotted name, under a prefix if there is one."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict):
            flat |= flat_fields(name, value)
        else:
            flat[name] = value
    return flat
