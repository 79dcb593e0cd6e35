"""The `pairs` stage: completions of a model, labelled as pairs by a reward (appendix C.1).

    WORKDIR/pairs/
      completions.jsonl               each prompt's completions and their rewards, as they are made
      pairs.jsonl  pairs_eval.jsonl   prompt, chosen, rejected: text, rewards and tokens

Tokens are kept beside the text, so that training reads exactly what was sampled: the same tokens,
and no EOS where a completion ended by its length.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.console import say
from dpo_jax.data import readers
from dpo_jax.data.dataset import Dataset
from dpo_jax.data.examples import Examples
from dpo_jax.data.ledger import NOT_DISTINCT, Ledger
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


@dataclasses.dataclass(frozen=True)
class Labelling:
    """Which pairs of a prompt's completions are taken, and how their labels are found."""

    labels: str = "deterministic"  # config.pairs.labels
    choose: str = "all"  # config.pairs.choose


class Candidate(NamedTuple):
    """Two completions of a prompt, before one of them is chosen."""

    number: int  # of the prompt's row
    first: dict
    second: dict
    uniform: float  # drawn from [0, 1) for this pair's label


def make_pairs(
    model: Model,
    prompts: dict[str, Prompts],
    reward: Callable,
    labelling: Labelling,
    sampling: Sampling,
    folder: pathlib.Path,
) -> dict:
    """Sample completions, give each its reward, label their pairs and write the files above.

    prompts: of the splits train and eval. Completions that completions.jsonl has already are kept.
    Returns the number of training pairs; raises ValueError where a split has none.
    """
    train, held_out = prompts["train"], prompts["eval"]
    rows = rollouts.complete(model, train.followed_by(held_out), reward, sampling, folder)
    splits = dict(train=rows[: len(train)], eval=rows[len(train) :])

    ledger = {}
    for number, (split, file) in enumerate(FILES.items()):
        count = len(splits[split])
        pairs, left_out = label(splits[split], labelling, [sampling.seed, number])
        if not pairs:
            raise ValueError(
                f"pairs: no pair is left of the {count} prompts of {file} ({left_out}). Sample "
                "more prompts or completions (config.pairs.prompts, config.pairs.completions), or "
                "use a reward that tells them apart."
            )
        write_lines(folder / file, pairs)
        agreeing = sum(pair["reward_chosen"] > pair["reward_rejected"] for pair in pairs)
        ledger[split] = dict(
            prompts=count,
            completions=count * sampling.n,
            pairs=len(pairs),
            left_out=left_out,
            chosen_has_higher_reward=agreeing,
        )
        say(
            f"pairs: {len(pairs)} pairs from {count} prompts in {file}; the chosen side has the "
            f"higher reward in {agreeing / len(pairs):.0%}; left out: {left_out}"
        )
    write_json(folder / "ledger.json", ledger)
    return dict(pairs=ledger["train"]["pairs"])


def label(
    rows: list[dict], labelling: Labelling, seed: Sequence[int]
) -> tuple[list[dict], dict[str, int]]:
    """Return the pairs of each prompt's completions, and how many were left out, by reason.

    rows: as `rollouts.with_rewards` makes them.
    """
    pairs = []
    left_out = {"equal completions": 0, "equal rewards": 0}
    for number, first, second, uniform in candidates(rows, labelling.choose, seed):
        margin = first["reward"] - second["reward"]
        if first["tokens"] == second["tokens"]:
            left_out["equal completions"] += 1
        elif margin == 0 and labelling.labels == "deterministic":
            left_out["equal rewards"] += 1
        else:
            chosen, rejected = first, second
            if uniform >= LABELS[labelling.labels](np.float64(margin)):
                chosen, rejected = second, first
            pairs.append(_pair(number, rows[number], chosen, rejected))
    return pairs, left_out


def candidates(rows: list[dict], choose: str, seed: Sequence[int]) -> Iterator[Candidate]:
    """Yield the pairs of each prompt's completions that are taken.

    choose: config.pairs.choose. The best is always chosen by the rewards themselves. So noisy
    labels (bradley_terry) keep their probabilities, which are given the two completions of a pair:
    of the best by noisy rewards, the label would be right more often than the model says.
    """
    if choose == "all":
        rng = np.random.default_rng(seed)
        for number, row in enumerate(rows):
            for first, second in itertools.combinations(row["completions"], 2):
                # Drawn for every two, so that a label does not depend on the pairs before it.
                yield Candidate(number, first, second, rng.random())
        return
    for number, row in enumerate(rows):
        # A generator of its own, so that a prompt's pair does not depend on the other prompts.
        rng = np.random.default_rng([*seed, number])
        others = list(row["completions"])
        rewards = [completion["reward"] for completion in others]
        best = others.pop(int(np.argmax(rewards)))
        if choose == "best_worst":
            other = min(others, key=_reward_of)
        else:
            other = others[rng.integers(len(others))]
        yield Candidate(number, best, other, rng.random())


def _reward_of(completion: dict) -> float:
    return completion["reward"]


def _pair(number: int, row: dict, chosen: dict, rejected: dict) -> dict:
    """Return a row of pairs.jsonl."""
    return dict(
        prompt=row["prompt"],
        chosen=chosen["text"],
        rejected=rejected["text"],
        reward_chosen=chosen["reward"],
        reward_rejected=rejected["reward"],
        tokens=[row["tokens"], chosen["tokens"], rejected["tokens"]],
        sampled_set=number,
    )


@functools.lru_cache(maxsize=1)  # the runs of a sweep in one process read them once
def load(folder: pathlib.Path, kind: str, distinct: bool = False) -> Dataset:
    """Return the pairs of a finished stage, to train on.

    kind: "pairs"; "sft", their chosen responses; or "unpaired", both responses with their labels.
    distinct: leave out what an earlier pair of the split has.
    """
    ledger = Ledger()
    found = {}
    for split, file in FILES.items():
        examples = Examples(distinct=distinct)
        counts = getattr(ledger, split)
        for number, row in readers.read_jsonl(folder / file):
            prompt, chosen, rejected = row["tokens"]
            of_row = dict(where=f"{file} row {number}", sampled_set=row.get("sampled_set"))
            counts.read += 1
            if kind == "unpaired":
                counts.further_pairs += 1
                for response, label in ((chosen, True), (rejected, False)):
                    examples.append(prompt, [response], label=label, **of_row)
                    counts.count_label(label)
                continue
            wanted = [chosen] if kind == "sft" else [chosen, rejected]
            if not examples.append(prompt, wanted, **of_row):
                counts.filter(NOT_DISTINCT)
        counts.kept = len(examples)
        found[split] = examples
    return Dataset(found["train"], found["eval"], ledger)
