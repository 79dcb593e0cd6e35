"""Score pairs: dpo-jax score --model=DIR_OR_HUB_NAME --data=FILE --out=FILE.jsonl

Adds to each row (prompt, chosen, rejected) `logp_chosen, logp_rejected`, the summed log-probs in
nats, and `tokens_chosen, tokens_rejected`, the tokens they are summed over, EOS included. A row of
one completion gets `logp, tokens`; a row that gives several pairs a line for each, with the pair's
`chosen` and `rejected`, and a row whose answers tie one for each answer, as `completion`. The
tokens, their layout and the log-probs come from the code that trains.

No row is left out: one that cannot be scored says why in `unscored`. The last lines say how often
chosen is more likely than rejected, in each `subset` too. With --reference a second model scores
the same tokens: `reference_logp_chosen, reference_logp_rejected`.
"""

import dataclasses
import datetime
import functools
import json
import pathlib

import jax
import numpy as np
from absl import flags

from dpo_jax import config as configs
from dpo_jax import data_flags, device_command
from dpo_jax.console import say
from dpo_jax.data import dataset, every_row
from dpo_jax.data.examples import Examples
from dpo_jax.data.ledger import CHAT_LINES, Counts, Malformed
from dpo_jax.data.tokenizer import Encoder
from dpo_jax.models import inference, loading
from dpo_jax.parallel import agreement, processes, sharding
from dpo_jax.storage import shadow
from dpo_jax.whole_file import whole_file

FIELDS = (  # of config.data, each a flag
    "max_length",
    "max_prompt_length",
    "truncate",
    "append_eos",
    "columns",
    "turns",
    "template",
    "ignore",
    "on_bad_row",
)
SIDES = {1: ("",), 2: ("_chosen", "_rejected")}  # responses -> what the names of the fields end in
# What the report is made of.
PAIR_FIELDS = {
    *("logp_chosen", "logp_rejected", "tokens_chosen", "tokens_rejected"),
    *("reference_logp_chosen", "reference_logp_rejected", "subset"),
}
ADVICE = "Fix the row, or let such rows be written without scores with --on_bad_row=drop."


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    model: str
    data: str
    out: str
    reference: str = ""  # another model, or none
    split: str = ""
    date: datetime.date | None = None  # what chat templates take for today; None: today
    batch_size: int = 16  # pairs at a time, over all devices
    dtype: str = "float32"
    settings: dict = dataclasses.field(default_factory=dict)  # fields of config.data


@dataclasses.dataclass
class Encoded:
    """What there is to score in a file, and why nothing else is."""

    pairs: Examples
    completions: Examples
    unscored: dict[str, str]  # where -> reason
    counts: Counts


@data_flags.named(FIELDS, path="data")
def score_file(options: Options, mesh) -> None:
    """Score the rows of a file, and write them all, in the file's order.

    Raises FileExistsError if the file to write is there already, and what reading the model and the
    data raises.
    """
    out = shadow.place(options.out)
    folder = out.absolute().parent
    if shadow.is_copy(out):
        folder.mkdir(parents=True, exist_ok=True)
        # Whether it is there already.
        processes.from_first(lambda: shadow.pull(folder, names=[out.name], exactly=True))
    if out.exists():
        raise FileExistsError(f"--out={out}: the file exists. Give another name, or remove it.")
    if not folder.is_dir():
        raise FileNotFoundError(f"--out={out}: there is no folder {folder}. Make it first.")
    processes.check_shared(folder)

    checkpoint = loading.open_checkpoint(options.model, dtype=options.dtype)
    reference = _open_reference(options, checkpoint) if options.reference else None
    data = configs.default(()).data
    data.update(source="local", path=options.data, **options.settings)
    encoded = _encode(options, data, checkpoint.tokenizer)
    say(account(encoded.counts))
    agreement.check_same(functools.partial(_tokens, options.data, encoded), agreement.SAME_ROWS)

    # One model after the other, so that the weights of one alone are in memory.
    scores = _scores(options, encoded, checkpoint, "", mesh)
    if reference:
        of_reference = _scores(options, encoded, reference, "reference_", mesh)
        for where, fields in of_reference.items():
            scores[where] |= fields

    if jax.process_index() == 0:
        scored = _write(out, options, data, scores, encoded.unscored)
        shadow.push(folder, [out.name])
    # Without this, the others would take process 0 for dead while it writes, and end it.
    processes.wait_for_all("scores")
    if jax.process_index() == 0:
        say(_summary(encoded, out))
        say(report(scored))


def _open_reference(options: Options, checkpoint: loading.Checkpoint) -> loading.Checkpoint:
    """Open the second model, which reads the tokens of the first; ValueError where it cannot."""
    reference = loading.open_checkpoint(
        options.reference, dtype=options.dtype, tokenizer=checkpoint.tokenizer
    )
    if reference.config.vocab != checkpoint.config.vocab:
        raise ValueError(
            f"--reference={options.reference} has a vocabulary of {reference.config.vocab}, the "
            f"model one of {checkpoint.config.vocab}: they cannot be compared."
        )
    return reference


def _tokens(path: str, encoded: Encoded) -> dict:
    """Return the fingerprints of what is scored, by how an error calls it."""
    found = {}
    for kind, examples in (("pairs", encoded.pairs), ("completions", encoded.completions)):
        counted = f"{len(examples):,} {kind}, tokens of sha256 {examples.fingerprint[:16]}"
        found[f"--data={path}, {kind}"] = counted
    return found


def _summary(encoded: Encoded, out: pathlib.Path) -> str:
    """Say what was scored."""
    counted = []
    for examples, name in ((encoded.pairs, "pairs"), (encoded.completions, "completions")):
        if len(examples):
            counted.append(f"{len(examples)} {name}")
    told = f"scored {' and '.join(counted) or 'nothing'} into {out}"
    if encoded.unscored:
        told += f"; {len(encoded.unscored)} rows could not be scored (see above)"
    return told


def _encode(options: Options, data, tokenizer) -> Encoded:
    """Read and tokenise all that can be scored; ValueError names a row that cannot be read."""
    truncate = dataset.truncation(data)
    # Pairs and completions apart: examples that are laid out together have equally many responses.
    encoders = {}
    # The encoder stops at what the chat template refuses, and says why.
    strict = data.copy_and_resolve_references()
    strict.on_bad_row = "error"
    for responses in SIDES:
        encoders[responses] = Encoder(tokenizer, strict, truncate, date=options.date, keep_all=True)
    counts = Counts()
    unscored = {}
    added = []
    for where, fields in every_row.read(options.data, options.split):
        counts.read += 1
        try:
            examples = every_row.answered(fields, data, where, counts)
        except every_row.REFUSALS as error:
            if isinstance(error, Malformed) and data.on_bad_row == "error":
                raise every_row.explained(error, where, fields, ADVICE) from None
            unscored[where] = data_flags.in_flags(str(error), FIELDS, "data")
            # A tie and a broken row are one thing here: nothing to score.
            counts.drop(getattr(error, "reason", str(error)), where)
            continue
        counts.further_pairs += len(examples) - 1
        for example in examples:
            try:
                encoders[len(example.responses)].add(example)
            except ValueError as error:
                refusal = error.__cause__
                # Other errors are about the model or the settings.
                if data.on_bad_row == "error" or not isinstance(refusal, Malformed):
                    raise
                unscored[example.where] = data_flags.in_flags(str(refusal), FIELDS, "data")
                counts.drop(refusal.reason, example.where)
                continue
            added.append(example.where)
    if not counts.read:
        raise ValueError(f"{options.data} has no rows to score.")

    completions, of_completions = encoders[1].finish()
    pairs, of_pairs = encoders[2].finish()
    kept = {*pairs.where, *completions.where}
    for where in added:
        if where not in kept:
            unscored[where] = "it cannot be tokenised"
    # The lengths of pairs are shown, where there are any.
    of_pairs.mean_tokens = of_pairs.mean_tokens or of_completions.mean_tokens
    of_completions.mean_tokens = {}
    counts = counts.plus(of_pairs).plus(of_completions)
    return Encoded(pairs, completions, unscored, counts)


def account(counts: Counts) -> str:
    """Return what became of the rows, a line for each count that is not 0."""
    unscored = sum(counts.dropped.values())
    numbers = {"rows": counts.read}
    for shape, count in counts.shapes.items():
        numbers[f"  recognised as: {shape}"] = count
    numbers["further pairs of the same rows"] = counts.further_pairs
    numbers["not to be scored"] = unscored
    numbers["to score"] = counts.kept
    numbers["prompts cut"] = counts.prompts_truncated
    numbers["responses cut"] = counts.responses_truncated
    numbers["boundary merges"] = counts.boundary_merges
    for label, name in CHAT_LINES.items():
        numbers[label] = getattr(counts, name)
    shown = {label: f"{count}" for label, count in numbers.items() if count}
    for part, mean in counts.mean_tokens.items():
        shown[f"mean tokens, {part}"] = f"{mean:.1f}"
    width = max(map(len, shown))
    number_width = max(map(len, shown.values()))
    lines = [f"{label:<{width}}  {text:>{number_width}}" for label, text in shown.items()]
    lines += [f"not to be scored: {line}" for line in counts.drops()]
    lines += [f"warning: {line}" for line in counts.all_warnings()]
    return data_flags.in_flags("\n".join(lines), FIELDS, "data")


def _scores(
    options: Options, encoded: Encoded, checkpoint: loading.Checkpoint, prefix: str, mesh
) -> dict[str, dict]:
    """Return where -> the fields that a model adds to what stands there.

    prefix: of their names.
    """
    found = {}
    model = None
    for examples in (encoded.pairs, encoded.completions):
        if not len(examples):
            continue
        checkpoint.check(examples)
        model = model or checkpoint.load(mesh)  # its weights are read once
        log_probs = inference.log_probs("score", model, examples, options.batch_size)
        for index, example in enumerate(examples):
            sides = SIDES[len(example.responses)]
            fields = {}
            for side, log_prob in zip(sides, log_probs[index], strict=True):
                fields[f"{prefix}logp{side}"] = float(log_prob)
            if not prefix:  # both models read the same tokens
                lengths = example.completion_lengths()
                fields |= {f"tokens{side}": n for side, n in zip(sides, lengths, strict=True)}
            found[examples.where[index]] = fields
    return found


def _write(
    out: pathlib.Path, options: Options, data, scores: dict[str, dict], unscored: dict[str, str]
) -> list[dict]:
    """Write every row as it was read, with what was found, in one piece.

    Returns what was written of each pair: its scores, and the row's subset if it has one.
    """
    pairs = []
    with whole_file(out) as draft, draft.open("w") as file:
        for where, fields in every_row.read(options.data, options.split):
            for line in _lines(where, fields, data, scores, unscored):
                # Parquet has values that JSON lacks, such as times: those are written as text.
                file.write(json.dumps(line, default=str) + "\n")
                if "logp_chosen" in line:
                    pairs.append({name: line[name] for name in line if name in PAIR_FIELDS})
    return pairs


def _lines(
    where: str, fields: dict, data, scores: dict[str, dict], unscored: dict[str, str]
) -> list[dict]:
    """Return the lines of a row: itself with its scores, or one for each of its pairs."""
    if where in scores:
        return [fields | scores[where]]
    if where in unscored:
        return [fields | {"unscored": unscored[where]}]
    lines = []
    for example in every_row.answered(fields, data, where):
        # The row's pairs, or the answers of a tie.
        names = ("chosen", "rejected") if len(example.responses) == 2 else ("completion",)
        found = scores.get(example.where) or {"unscored": unscored[example.where]}
        lines.append(fields | dict(zip(names, example.responses, strict=True)) | found)
    return lines


def report(pairs: list[dict]) -> str:
    """Return how often chosen is more likely than rejected, in all pairs and in each subset.

    pairs: scores as they are written, with `subset` where the row has one. An equal pair is no
    success, as in training's accuracies. "" where there are no pairs.
    """
    if not pairs:
        return ""
    chosen, rejected = (
        np.mean([pair[f"logp_{side}"] for pair in pairs]) for side in ("chosen", "rejected")
    )
    by_subset = {"all": pairs}
    for pair in pairs:
        if isinstance(pair.get("subset"), str):
            by_subset.setdefault(f"  {pair['subset']}", []).append(pair)
    rates = {name: _rates(of_subset) for name, of_subset in by_subset.items()}
    title = "chosen more likely than rejected, by"
    width = max(len(name) for name in (title, *rates))
    lines = [f"mean log-prob chosen {chosen:.4g}, rejected {rejected:.4g} nats"]
    heads = ("pairs", *rates["all"])
    lines.append("  ".join([f"{title:<{width}}", *(f"{head:>9}" for head in heads)]))
    for name, of_subset in rates.items():
        cells = [f"{len(by_subset[name]):>9}"]
        for head, rate in of_subset.items():
            cells.append(f"{rate:>{max(len(head), 9)}.1%}")
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    return "\n".join(lines)


def _rates(pairs: list[dict]) -> dict[str, float]:
    """Return the share of pairs whose chosen side is more likely, by each way to compare them."""
    log_probs = _of_sides(pairs, "logp")
    lengths = np.maximum(_of_sides(pairs, "tokens"), 1)
    compared = {"log-prob": log_probs, "per token": log_probs / lengths}
    if "reference_logp_chosen" in pairs[0]:
        ratios = log_probs - _of_sides(pairs, "reference_logp")
        compared |= {"log-ratio": ratios, "log-ratio per token": ratios / lengths}
    return {name: float(np.mean(value[0] > value[1])) for name, value in compared.items()}


def _of_sides(pairs: list[dict], name: str) -> np.ndarray:
    """Return a number of both sides, [2, pairs]."""
    sides = SIDES[2]
    return np.array([[pair[f"{name}{side}"] for pair in pairs] for side in sides], np.float64)


def main():
    model = flags.DEFINE_string(
        "model", None, "The model: a folder in Hugging Face format, or a hub name."
    )
    data = flags.DEFINE_string(
        "data", None, "The rows: a file in any format that training reads, a folder or a hub name."
    )
    out = flags.DEFINE_string("out", None, "Where the scored rows go; must not exist.")
    reference = flags.DEFINE_string(
        "reference", "", "Another model to score the same tokens, such as DPO's reference."
    )
    split = data_flags.define_split()
    date = data_flags.define_date()
    batch_size = flags.DEFINE_integer(
        "batch_size",
        16,
        "Pairs at a time, over all devices.",
        lower_bound=1,
        upper_bound=100_000,
    )
    dtype = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
    settings = data_flags.define(*FIELDS)
    flags.mark_flags_as_required(["model", "data", "out"])
    mesh = sharding.define_flags()

    def score_rows():
        options = Options(
            model=model.value,
            data=data.value,
            out=out.value,
            reference=reference.value,
            split=split.value,
            date=date.value,
            batch_size=batch_size.value,
            dtype=dtype.value,
            settings=settings(),
        )
        score_file(options, mesh())

    device_command.run(score_rows, __doc__)


if __name__ == "__main__":
    main()
