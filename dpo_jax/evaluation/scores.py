"""What `score` writes of a response, and what it reports of all of them.

The names of fields end in the side of a pair, and have no end where there is one completion. Those
of the second model, the reference, start with "reference_".
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from dpo_jax.data.examples import Example
from dpo_jax.data.grouping import clustered_error
from dpo_jax.models.inference import TokenScores

SIDES = {1: ("",), 2: ("_chosen", "_rejected")}  # responses -> what the names of the fields end in
REFERENCE = "reference_"
CELL = 14  # characters of a mean with its error


@dataclasses.dataclass
class ModelScores:
    """What a model gives to the responses of all examples."""

    log_probs: np.ndarray  # float32 [examples, responses], summed over completion tokens, nats
    tokens: TokenScores | None = None  # where those of single tokens are wanted


class TokenTexts:
    """The texts of single tokens, as they stand within a longer text."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            # Some tokenizers drop the first space of a text, or put one between tokens: what the
            # token adds to itself has it.
            once, twice = (self._decoded([token] * times) for times in (1, 2))
            self._known[token] = twice[len(once) :] if twice.startswith(once) else once
        return self._known[token]

    def of(self, tokens: Sequence[int]) -> list[str]:
        """Return the texts of tokens."""
        return [self[token] for token in tokens]

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def perplexity(log_prob: float, tokens: int) -> float | None:
    """Return exp(-log_prob / tokens), the perplexity per token.

    None without tokens, and where it is beyond all floats: JSON has no number for it.
    """
    if not tokens:
        return None
    with np.errstate(over="ignore"):
        value = float(np.exp(-log_prob / tokens))
    return value if math.isfinite(value) else None


def summed_fields(
    example: Example, index: int, models: dict[str, ModelScores], beta: float
) -> dict:
    """Return the fields of an example that are sums over its completion tokens.

    index: of the example. models: what each gives, by what its fields start with. With a reference
    there are implicit rewards, beta * (log policy - log reference).
    """
    sides = SIDES[len(example.responses)]
    lengths = example.completion_lengths()
    fields = {}
    for prefix, scores in models.items():
        for side, log_prob in zip(sides, scores.log_probs[index], strict=True):
            fields[f"{prefix}logp{side}"] = float(log_prob)
        if not prefix:  # both models read the same tokens
            fields |= {f"tokens{side}": n for side, n in zip(sides, lengths, strict=True)}
    if len(sides) == 1:
        for prefix in models:
            fields[f"{prefix}perplexity"] = perplexity(fields[f"{prefix}logp"], lengths[0])
    if REFERENCE in models:
        for side in sides:
            log_ratio = fields[f"logp{side}"] - fields[f"{REFERENCE}logp{side}"]
            fields[f"implicit_reward{side}"] = beta * log_ratio
        if len(sides) == 2:
            chosen, rejected = (fields[f"implicit_reward{side}"] for side in sides)
            fields["implicit_margin"] = chosen - rejected
    return fields


def token_fields(
    example: Example,
    index: int,
    models: dict[str, ModelScores],
    texts: TokenTexts,
    *,
    per_token: bool,
    top: bool,
) -> dict:
    """Return the fields of an example that are lists over its completion tokens.

    per_token: the tokens, their log-probs and, with a reference, log-ratios. top: the likeliest
    tokens in the place of each. The other arguments are those of `summed_fields`.
    """
    sides = SIDES[len(example.responses)]
    masks = example.completion_masks or (slice(None),) * len(sides)
    fields = {}
    for number, (side, mask) in enumerate(zip(sides, masks, strict=True)):
        ids = example.responses[number][mask].tolist()
        if per_token:
            fields[f"token_ids{side}"] = ids
            fields[f"token_texts{side}"] = texts.of(ids)
        log_probs = {}
        for prefix, scores in models.items():
            found = scores.tokens[index * len(sides) + number]
            log_probs[prefix], top_ids_Tk, top_log_probs_Tk = found
            if per_token:
                fields[f"{prefix}token_logps{side}"] = log_probs[prefix].tolist()
            if top:
                fields[f"{prefix}top_ids{side}"] = top_ids_Tk.tolist()
                fields[f"{prefix}top_texts{side}"] = [texts.of(ids) for ids in top_ids_Tk.tolist()]
                fields[f"{prefix}top_logps{side}"] = top_log_probs_Tk.tolist()
        if per_token and REFERENCE in models:
            log_ratios = log_probs[""].astype(np.float64) - log_probs[REFERENCE]
            fields[f"token_log_ratios{side}"] = log_ratios.tolist()
    return fields


def report(pairs: list[dict], completions: list[dict], beta: float) -> str:
    """Return what is to be said of all scores, in lines; "" where there are none.

    pairs, completions: their `summed_fields`, with `prompt`, equal for equal prompts, and `subset`
    where the row has one. An equal pair is no success, as in training's accuracies.
    """
    lines = []
    if pairs:
        chosen, rejected = (np.mean([pair[f"logp{side}"] for pair in pairs]) for side in SIDES[2])
        lines.append(f"mean log-prob chosen {chosen:.4g}, rejected {rejected:.4g} nats")
    lines += _perplexities(pairs, completions)
    if completions and "implicit_reward" in completions[0]:
        rewards = np.array([line["implicit_reward"] for line in completions])
        error = clustered_error(rewards, _prompts(completions))
        mean = _with_error(rewards.mean(), error, ".4g")
        lines.append(f"implicit reward of completions, beta {beta:g}: {mean}")
    if not pairs:
        return "\n".join(lines)

    by_subset = {"all": pairs}
    for pair in pairs:
        if isinstance(pair.get("subset"), str):
            by_subset.setdefault(f"  {pair['subset']}", []).append(pair)
    if "implicit_margin" in pairs[0]:
        lines += _table(f"implicit reward, beta {beta:g}", by_subset, _rewards, ".4g")
    lines += _table("chosen more likely than rejected, by", by_subset, _successes, ".1%")
    lines.append("± standard error, clustered by prompt")
    return "\n".join(lines)


def next_tokens(rows: list[dict]) -> str:
    """Return the likeliest next tokens of prompts with their probabilities, a table for each.

    rows: the `token_fields` of prompts alone, and where each stands.
    """
    lines = []
    for row in rows:
        prefixes = [prefix for prefix in ("", REFERENCE) if f"{prefix}top_ids" in row]
        names = {"": "next token", REFERENCE: "of the reference"}
        lines.append(f"{row['where']}: {', '.join(names[prefix] for prefix in prefixes)}")
        columns = []
        for prefix in prefixes:
            # A prompt has one place, that after its end.
            (texts,), (log_probs,) = row[f"{prefix}top_texts"], row[f"{prefix}top_logps"]
            shares = np.exp(log_probs)
            columns.append(
                [f"{share:>8.2%}  {text!r:<20}" for share, text in zip(shares, texts, strict=True)]
            )
        lines += ["".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    return "\n".join(lines)


def _perplexities(pairs: list[dict], completions: list[dict]) -> list[str]:
    """Return lines of the perplexity over all tokens, of each side and of completions."""
    lines = []
    kinds = [("chosen", pairs, "_chosen"), ("rejected", pairs, "_rejected")]
    for name, rows, side in [*kinds, ("completions", completions, "")]:
        tokens = sum(row[f"tokens{side}"] for row in rows)
        if not tokens:
            continue
        found = []
        for prefix, of_model in (("", ""), (REFERENCE, "reference ")):
            if f"{prefix}logp{side}" not in rows[0]:
                continue
            log_prob = sum(row[f"{prefix}logp{side}"] for row in rows)
            value = perplexity(log_prob, tokens)
            told = "beyond all numbers" if value is None else f"{value:.4g}"
            found.append(of_model + told)
        lines.append(f"perplexity per token, {name}: {', '.join(found)} ({tokens:,} tokens)")
    return lines


def _table(title: str, by_subset: dict[str, list[dict]], measure, number_format: str) -> list[str]:
    """Return the mean of each measure with its error, a line for each subset.

    measure: pairs -> {name: the values of all pairs}.
    """
    measures = {name: measure(rows) for name, rows in by_subset.items()}
    names = list(measures["all"])
    width = max(len(name) for name in (title, *by_subset))
    heads = [f"{'pairs':>7}", f"{'prompts':>7}", *(f"{name:>{CELL}}" for name in names)]
    lines = ["  ".join([f"{title:<{width}}", *heads])]
    for subset, rows in by_subset.items():
        prompts_N = _prompts(rows)
        cells = [f"{len(rows):>7}", f"{len(np.unique(prompts_N)):>7}"]
        for head, values_N in measures[subset].items():
            error = clustered_error(values_N, prompts_N)
            cells.append(
                f"{_with_error(values_N.mean(), error, number_format):>{max(len(head), CELL)}}"
            )
        lines.append("  ".join([f"{subset:<{width}}", *cells]))
    return lines


def _with_error(mean: float, error: float | None, number_format: str) -> str:
    shown = format(mean, number_format)
    return shown if error is None else f"{shown} ±{format(error, number_format)}"


def _prompts(rows: list[dict]) -> np.ndarray:
    return np.array([row["prompt"] for row in rows])


def _rewards(pairs: list[dict]) -> dict[str, np.ndarray]:
    """Return the implicit rewards of both sides, and their margins."""
    chosen_N, rejected_N = _of_sides(pairs, "implicit_reward")
    return {"chosen": chosen_N, "rejected": rejected_N, "margin": chosen_N - rejected_N}


def _successes(pairs: list[dict]) -> dict[str, np.ndarray]:
    """Return whether the chosen side is more likely, by each way to compare the sides."""
    log_probs = _of_sides(pairs, "logp")
    lengths = np.maximum(_of_sides(pairs, "tokens"), 1)
    compared = {"log-prob": log_probs, "per token": log_probs / lengths}
    if f"{REFERENCE}logp_chosen" in pairs[0]:
        ratios = log_probs - _of_sides(pairs, f"{REFERENCE}logp")
        compared |= {"log-ratio": ratios, "log-ratio per token": ratios / lengths}
    return {name: (value[0] > value[1]).astype(float) for name, value in compared.items()}


def _of_sides(pairs: list[dict], name: str) -> np.ndarray:
    """Return a number of both sides, [2, pairs]."""
    return np.array([[pair[f"{name}{side}"] for pair in pairs] for side in SIDES[2]], np.float64)
