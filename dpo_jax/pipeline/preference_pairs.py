"""The `pairs` stage: completions of a model, labelled as pairs by a reward (appendix C.1).

    WORKDIR/pairs/
      completions.jsonl               each prompt's completions and their rewards, as they are made
      judgements.jsonl                the answers of a judge, if one labels the pairs instead
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

from dpo_jax import costs
from dpo_jax.console import say
from dpo_jax.data import conversations, readers
from dpo_jax.data.dataset import Dataset
from dpo_jax.data.examples import Examples
from dpo_jax.data.ledger import NOT_DISTINCT, Ledger
from dpo_jax.evaluation import chat_api
from dpo_jax.evaluation import judge as judges
from dpo_jax.evaluation.judge import Comparison, Judge
from dpo_jax.models.loading import Model
from dpo_jax.parallel import processes
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
    judge: Judge | None = None  # whose votes are the labels, instead of a reward's


class Candidate(NamedTuple):
    """Two completions of a prompt, before one of them is chosen."""

    number: int  # of the prompt's row
    first: dict
    second: dict
    uniform: float  # drawn from [0, 1) for this pair's label


def labelling_of(block, seed: int) -> Labelling:
    """Return the labelling that config.pairs asks for; ValueError for a judge that cannot be.

    seed: by which it is drawn which completion the judge sees first.
    """
    if block.labels != "judge":
        return Labelling(block.labels, block.choose)
    judge = block.judge
    try:
        asked = Judge(
            model=judge.model,
            template=judge.template,
            temperature=judge.temperature,
            orders=judge.orders,
            seed=seed,
            concurrency=judge.concurrency,
            timeout=judge.timeout,
            # In the config 0 stands for no limit.
            requests_per_minute=judge.requests_per_minute or None,
            max_calls=judge.max_calls or None,
            max_cost=judge.max_cost or None,
            input_price=judge.input_price,
            output_price=judge.output_price,
        )
    except ValueError as error:
        raise ValueError(f"config.pairs.judge: {error}") from None
    return Labelling(block.labels, block.choose, asked)


def make_pairs(
    model: Model,
    prompts: dict[str, Prompts],
    reward: Callable | None,
    labelling: Labelling,
    sampling: Sampling,
    folder: pathlib.Path,
) -> dict:
    """Sample completions, give each its reward, label their pairs and write the files above.

    prompts: of the splits train and eval. reward: None where a judge labels the pairs. Completions
    that completions.jsonl has already are kept, and so are a judge's answers. Returns the number of
    training pairs; raises ValueError where a split has none, BudgetExhausted before a call that
    could pass the judge's caps, and ChatError where its endpoint fails.
    """
    train, held_out = prompts["train"], prompts["eval"]
    if labelling.judge:
        processes.from_first(functools.partial(_check_key, folder))
    rows = rollouts.complete(model, train.followed_by(held_out), reward, sampling, folder)
    costs.write_work(folder, rollouts.work_of(model.config, rows))
    splits = dict(train=rows[: len(train)], eval=rows[len(train) :])

    ledger = {}
    for number, (split, file) in enumerate(FILES.items()):
        count = len(splits[split])
        if labelling.judge:
            pairs, left_out = judged(splits[split], prompts[split], labelling.judge, folder)
        else:
            pairs, left_out = label(splits[split], labelling, [sampling.seed, number])
        if not pairs:
            raise ValueError(
                f"pairs: no pair is left of the {count} prompts of {file} ({left_out}). Sample "
                "more prompts or completions (config.pairs.prompts, config.pairs.completions), or "
                "use a reward or a judge that tells them apart."
            )
        write_lines(folder / file, pairs)
        ledger[split] = dict(
            prompts=count, completions=count * sampling.n, pairs=len(pairs), left_out=left_out
        )
        by = f"labelled by {labelling.judge.model}" if labelling.judge else ""
        if not labelling.judge:
            agreeing = sum(pair["reward_chosen"] > pair["reward_rejected"] for pair in pairs)
            ledger[split]["chosen_has_higher_reward"] = agreeing
            by = f"the chosen side has the higher reward in {agreeing / len(pairs):.0%}"
        say(f"pairs: {len(pairs)} pairs from {count} prompts in {file}; {by}; left out: {left_out}")
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


def judged(
    rows: list[dict], prompts: Prompts, judge: Judge, folder: pathlib.Path
) -> tuple[list[dict], dict[str, int]]:
    """Return the pairs of each prompt's completions by a judge's votes, and how many were left out.

    rows: as `rollouts.with_rewards` makes them, of these prompts. Calls are kept in the folder, as
    `judge.compare` does.
    """
    left_out = {"equal completions": 0, "undecided": 0, "no verdict": 0}
    asked = []
    comparisons = []
    for number, row in enumerate(rows):
        for first, second in itertools.combinations(row["completions"], 2):
            if first["tokens"] == second["tokens"]:
                left_out["equal completions"] += 1
                continue
            asked.append((number, first, second))
            comparisons.append(_comparison(prompts, number, first, second))
    # One process asks: the calls are paid for, and kept in one file.
    verdicts = processes.from_first(lambda: judges.compare(judge, comparisons, folder, say))
    pairs = []
    for (number, first, second), verdict in zip(asked, verdicts, strict=True):
        if verdict == "tie":
            left_out["undecided"] += 1
        elif verdict is None:  # unreadable answers, or a question that the endpoint refuses
            left_out["no verdict"] += 1
        else:
            chosen, rejected = (first, second) if verdict == "win" else (second, first)
            pairs.append(_pair(number, rows[number], chosen, rejected))
    return pairs, left_out


def _check_key(folder: pathlib.Path) -> None:
    """Raise ValueError where the judge's key is missing; the answers may be kept already."""
    # It is better known before hours of sampling. Not returned: results travel to all processes.
    if not (folder / judges.JUDGEMENTS).exists():
        chat_api.api_key()


def _comparison(prompts: Prompts, number: int, first: dict, second: dict) -> Comparison:
    """Return the question which of a prompt's completions is better; `ours` is the first."""
    conversation = prompts.conversations[number] if prompts.conversations else None
    if conversation is None:
        return Comparison(prompts.texts[number], first["text"], second["text"])
    # As a person reads it, without the marks of the policy's chat template.
    shown = conversations.transcript(conversation.messages)
    begun = conversation.begun
    return Comparison(shown, begun + first["text"], begun + second["text"])


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
    """Return a row of pairs.jsonl, with rewards where the completions have them."""
    rewards = {}
    if "reward" in chosen:
        rewards = dict(reward_chosen=chosen["reward"], reward_rejected=rejected["reward"])
    return dict(
        prompt=row["prompt"],
        chosen=chosen["text"],
        rejected=rejected["text"],
        **rewards,
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
