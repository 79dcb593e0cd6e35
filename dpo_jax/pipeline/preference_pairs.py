"""The `pairs` stage: completions of a model, scored by a reward, labelled as preference pairs
(appendix C.1).

    WORKDIR/pairs/  completions.jsonl  (each prompt's completions with their rewards, as they are
    made)
                    pairs.jsonl  pairs_eval.jsonl  (prompt, chosen, rejected: text, rewards and
                    tokens)

Tokens are kept beside the text, so that training reads what was sampled: no EOS where a completion
ended by length, and no other tokens for the same text.
"""

import functools
import itertools
import pathlib
from collections.abc import Callable

import numpy as np

from dpo_jax.console import say
from dpo_jax.data import readers
from dpo_jax.data.dataset import Dataset
from dpo_jax.data.ledger import Ledger
from dpo_jax.data.tokenizer import Examples
from dpo_jax.models.loading import Model
from dpo_jax.sampling import rollouts
from dpo_jax.sampling.prompts import Prompts
from dpo_jax.sampling.sampler import Sampling
from dpo_jax.workdir import write_json, write_lines

EVAL_PROMPTS = 100  # prompts of the held-out pairs
FILES = {"train": "pairs.jsonl", "eval": "pairs_eval.jsonl"}
# config.pairs.labels -> the probability that the first is chosen, from its margin in reward
LABELS = {
    "bradley_terry": lambda margin: 1 / (1 + np.exp(-margin)),
    "deterministic": lambda margin: (margin > 0).astype(float),
}


def make_pairs(
    model: Model,
    prompts: dict[str, Prompts],
    reward: Callable,
    labels: str,
    sampling: Sampling,
    folder: pathlib.Path,
) -> dict:
    """Samples, scores and labels; writes the files above and ledger.json, and returns the number of
    pairs.

    prompts: of the splits train and eval. labels: config.pairs.labels. What completions.jsonl has
    already is kept.
    """
    both = Prompts(
        *(
            [*getattr(prompts["train"], part), *getattr(prompts["eval"], part)]
            for part in ("ids", "texts")
        )
    )
    rows = rollouts.complete(model, both, reward, sampling, folder)
    of_splits = dict(train=rows[: len(prompts["train"])], eval=rows[len(prompts["train"]) :])
    ledger = {}
    for number, (split, file) in enumerate(FILES.items()):
        of_split = of_splits[split]
        found, left_out = label(of_split, labels, np.random.default_rng([sampling.seed, number]))
        if not found:
            raise ValueError(
                f"pairs: no pair is left of {len(of_split)} prompts in {file}: {left_out}."
            )
        write_lines(folder / file, found)
        agreeing = sum(pair["reward_chosen"] > pair["reward_rejected"] for pair in found)
        ledger[split] = dict(
            prompts=len(of_split),
            completions=len(of_split) * sampling.n,
            pairs=len(found),
            left_out=left_out,
            chosen_has_higher_reward=agreeing,
        )
        say(
            f"pairs: {len(found)} pairs from {len(of_split)} prompts in {file}, "
            f"{agreeing / len(found):.0%} of them with the higher reward chosen; left out: {left_out}"
        )
    write_json(folder / "ledger.json", ledger)
    return dict(pairs=ledger["train"]["pairs"])


def label(rows: list[dict], labels: str, rng) -> tuple[list[dict], dict[str, int]]:
    """All pairs of each prompt's completions, labelled by `labels`, and how many were left out, by
    reason.
    """
    pairs, equal, tied = [], 0, 0
    for row in rows:
        for first, second in itertools.combinations(row["completions"], 2):
            margin = first["reward"] - second["reward"]
            uniform = rng.random()
            if first["tokens"] == second["tokens"]:
                equal += 1
            elif margin == 0 and labels == "deterministic":
                tied += 1
            else:
                chosen, rejected = (
                    (first, second)
                    if uniform < LABELS[labels](np.float64(margin))
                    else (second, first)
                )
                pairs.append(
                    dict(
                        prompt=row["prompt"],
                        chosen=chosen["text"],
                        rejected=rejected["text"],
                        reward_chosen=chosen["reward"],
                        reward_rejected=rejected["reward"],
                        tokens=[row["tokens"], chosen["tokens"], rejected["tokens"]],
                    )
                )
    return pairs, {"equal completions": equal, "equal rewards": tied}


@functools.lru_cache(maxsize=1)  # the runs of a sweep in one process read them once
def load(folder: pathlib.Path, kind: str) -> Dataset:
    """The pairs that a finished stage made, as data to train on; of kind "sft", the chosen
    responses.
    """
    ledger, found = Ledger(), {}
    for split, file in FILES.items():
        examples, counts = Examples(), getattr(ledger, split)
        for number, row in readers.read_jsonl(folder / file):
            prompt, *responses = (np.array(ids, np.int32) for ids in row["tokens"])
            examples.prompts.append(prompt)
            examples.responses.append(tuple(responses[:1] if kind == "sft" else responses))
            examples.where.append(f"{file} row {number}")
        counts.read = counts.kept = len(examples)
        found[split] = examples
    return Dataset(found["train"], found["eval"], ledger)
