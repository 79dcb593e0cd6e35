"""Score pairs: dpo-jax score --model=DIR_OR_HUB_NAME --data=FILE --out=FILE.jsonl

Adds to each row (prompt, chosen, rejected) `logp_chosen, logp_rejected`, the summed log-probs in
nats, and `tokens_chosen, tokens_rejected`, the tokens they are summed over, EOS included. A row of
one completion gets `logp, tokens, perplexity`; a row that gives several pairs a line for each, with
the pair's `chosen` and `rejected`, and a row whose answers tie one for each answer, as
`completion`. The tokens, their layout and the log-probs come from the code that trains.

No row is left out: one that cannot be scored says why in `unscored`. The last lines say how often
chosen is more likely than rejected, in each `subset` too, and the perplexity of all tokens.

With --reference a second model scores the same tokens: `reference_logp_chosen,
reference_logp_rejected`, and the implicit rewards, --beta times the log-ratio:
`implicit_reward_chosen, implicit_reward_rejected, implicit_margin`. --per_token adds the tokens and
their log-probs, --top=K the K likeliest tokens in the place of each. With --prompts=FILE instead of
--data, --top shows which tokens each prompt is likely to go on with.
"""

import dataclasses
import datetime
import functools
import json
import pathlib

import jax
from absl import flags

from dpo_jax import config as configs
from dpo_jax import data_flags, device_command
from dpo_jax.console import say
from dpo_jax.data import dataset, every_row
from dpo_jax.data.examples import Example, Examples
from dpo_jax.data.ledger import CHAT_LINES, Counts, Malformed
from dpo_jax.data.tokenizer import Encoder, encode_prompts
from dpo_jax.evaluation import scores
from dpo_jax.evaluation.scores import REFERENCE, SIDES, ModelScores
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
OF_RESPONSES = ("max_prompt_length", "append_eos", "turns", "on_bad_row")  # not of prompts alone
DEFAULT_BETA = 0.1  # as config.dpo.beta
SHOWN = 5  # prompts whose likeliest next tokens are printed
AT_ONCE = 1000  # prompts that are tokenised together
ADVICE = "Fix the row, or let such rows be written without scores with --on_bad_row=drop."


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    model: str
    data: str  # the rows, or "" where there are prompts alone
    out: str
    prompts: str = ""
    reference: str = ""  # another model, or none
    split: str = ""
    date: datetime.date | None = None  # what chat templates take for today; None: today
    batch_size: int = 16  # pairs at a time, over all devices
    dtype: str = "float32"
    beta: float | None = None  # of implicit rewards; None: DPO's default
    per_token: bool = False
    top: int = 0  # how many of the likeliest tokens in each token's place
    settings: dict = dataclasses.field(default_factory=dict)  # fields of config.data

    def __post_init__(self):
        """Raise ValueError for options that do not go together."""
        if bool(self.data) == bool(self.prompts):
            raise ValueError(
                "expected --data=FILE, the rows to score, or --prompts=FILE, the prompts whose "
                f"next tokens are shown; found {'both' if self.data else 'neither'}."
            )
        if self.prompts and (self.per_token or not self.top):
            raise ValueError(
                f"--prompts={self.prompts}: a prompt alone has no tokens to score. Expected "
                "--top=K, the number of likeliest next tokens to show, and no --per_token."
            )
        for name in OF_RESPONSES:
            default = configs.DATA[name].default
            value = self.settings.get(name, default)
            if self.prompts and value != default:
                raise ValueError(
                    f"--{name}={value} is about rows with responses, and --prompts={self.prompts} "
                    f"has prompts alone. Leave --{name} out."
                )
        if self.beta is not None and (self.prompts or not self.reference):
            raise ValueError(
                f"--beta={self.beta:g} is the factor of implicit rewards, of which there are none "
                "without --data and --reference. Leave --beta out, or give both."
            )


@dataclasses.dataclass
class Encoded:
    """What there is to score in a file, and why nothing else is."""

    pairs: Examples
    completions: Examples
    unscored: dict[str, str]  # where -> reason
    counts: Counts


@dataclasses.dataclass
class Found:
    """Where the scores of each example stand."""

    kinds: list[tuple[Examples, dict[str, ModelScores]]]  # the scores by what fields start with
    places: dict[str, tuple[int, int]]  # where -> its kind, and its index there


def score_file(options: Options, mesh) -> None:
    """Score the rows of a file, and write them all, in the file's order.

    Raises FileExistsError if the file to write is there already, and what reading the model and the
    data raises.
    """
    with data_flags.named(FIELDS, path="prompts" if options.prompts else "data"):
        _score_file(options, mesh)


def _score_file(options: Options, mesh) -> None:
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

    data = configs.default(()).data
    data.update(source="local", path=options.data or options.prompts, **options.settings)
    checkpoint = _open(options, options.model, data)
    if options.top > checkpoint.config.vocab:
        raise ValueError(
            f"--top={options.top}: {options.model} has {checkpoint.config.vocab} tokens; expected "
            "no more than that."
        )
    reference = _open_reference(options, checkpoint, data) if options.reference else None
    encode = _encode_prompts if options.prompts else _encode
    encoded = encode(options, data, checkpoint.tokenizer)
    say(account(encoded.counts))
    agreement.check_same(functools.partial(_tokens, options, encoded), agreement.SAME_ROWS)

    checkpoints = {"": checkpoint}
    if reference:
        checkpoints[REFERENCE] = reference
    found = _scores(options, encoded, checkpoints, mesh)

    if jax.process_index() == 0:
        writer = _Writer(options, data, found, encoded.unscored, checkpoint.tokenizer)
        with whole_file(out) as draft, draft.open("w") as file:
            writer.write(file)
        shadow.push(folder, [out.name])
    # Without this, the others would take process 0 for dead while it writes, and end it.
    processes.wait_for_all("scores")
    if jax.process_index() == 0:
        say(_summary(options, encoded, out))
        say(writer.report())


def _open(options: Options, path: str, data, tokenizer=None) -> loading.Checkpoint:
    return loading.open_checkpoint(
        path, tokenizer=tokenizer, max_length=data.max_length, dtype=options.dtype
    )


def _open_reference(options: Options, checkpoint: loading.Checkpoint, data) -> loading.Checkpoint:
    """Open the second model, which reads the tokens of the first; ValueError where it cannot."""
    reference = _open(options, options.reference, data, checkpoint.tokenizer)
    if reference.config.vocab != checkpoint.config.vocab:
        raise ValueError(
            f"--reference={options.reference} has a vocabulary of {reference.config.vocab}, the "
            f"model one of {checkpoint.config.vocab}: they cannot be compared."
        )
    return reference


def _tokens(options: Options, encoded: Encoded) -> dict:
    """Return the fingerprints of what is scored, by how an error calls it."""
    source = f"--prompts={options.prompts}" if options.prompts else f"--data={options.data}"
    found = {}
    for kind, examples in (("pairs", encoded.pairs), ("completions", encoded.completions)):
        counted = f"{len(examples):,} {kind}, tokens of sha256 {examples.fingerprint[:16]}"
        found[f"{source}, {kind}"] = counted
    return found


def _summary(options: Options, encoded: Encoded, out: pathlib.Path) -> str:
    """Say what was scored."""
    counted = []
    alone = "prompts" if options.prompts else "completions"
    for examples, name in ((encoded.pairs, "pairs"), (encoded.completions, alone)):
        if len(examples):
            counted.append(f"{len(examples)} {name}")
    told = f"scored {' and '.join(counted) or 'nothing'} into {out}"
    if encoded.unscored:
        told += f"; {len(encoded.unscored)} rows could not be scored (see above)"
    return told


def _encode_prompts(options: Options, data, tokenizer) -> Encoded:
    """Read and tokenise prompts, each with a completion of one token that is not looked at.

    The likeliest tokens in its place are those that the prompt may go on with. A prompt is cut only
    where it alone is longer than max_length. ValueError names a row without a prompt.
    """
    # As much room as there is for a prompt and its response, and a token more.
    data.update(append_eos=False, max_prompt_length=data.max_length, max_length=data.max_length + 1)
    truncate = dataset.truncation(data)
    completions = Examples()
    counts = Counts()

    def encode(texts):
        encoded = encode_prompts(texts, tokenizer, data, truncate, date=options.date, counts=counts)
        for text, ids in zip(texts, encoded, strict=True):
            completions.append(ids, [[0]], text.where)

    waiting = []
    for where, fields in every_row.read(options.prompts, options.split):
        counts.read += 1
        waiting.append(every_row.prompt(fields, data, where))
        if len(waiting) == AT_ONCE:
            encode(waiting)
            waiting = []
    if not counts.read:
        raise ValueError(
            f'{options.prompts} has no rows; expected rows such as {{"prompt": "Name a colour."}}.'
        )
    if waiting:
        encode(waiting)
    counts.kept = len(completions)
    return Encoded(Examples(), completions, {}, counts)


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
    options: Options, encoded: Encoded, checkpoints: dict[str, loading.Checkpoint], mesh
) -> Found:
    """Return what the models give to all examples.

    checkpoints: the models, by what the names of their fields start with.
    """
    kinds = [(examples, {}) for examples in (encoded.pairs, encoded.completions) if len(examples)]
    for prefix, checkpoint in checkpoints.items():
        # One model after the other, so that the weights of one alone are in memory.
        model = None
        for examples, by_model in kinds:
            checkpoint.check(examples)
            model = model or checkpoint.load(mesh)  # its weights are read once
            by_model[prefix] = _of_model(options, model, examples)
    places = {}
    for kind, (examples, _) in enumerate(kinds):
        for index, where in enumerate(examples.where):
            places[where] = (kind, index)
    return Found(kinds, places)


def _of_model(options: Options, model: loading.Model, examples: Examples) -> ModelScores:
    if not options.per_token and not options.top:
        return ModelScores(inference.log_probs("score", model, examples, options.batch_size))
    return ModelScores(
        *inference.token_scores("score", model, examples, options.batch_size, options.top)
    )


class _Writer:
    """Writes every row as it was read, with what was found."""

    def __init__(self, options: Options, data, found: Found, unscored: dict[str, str], tokenizer):
        """Take what was found; unscored: where -> why nothing was."""
        self._options = options
        self._data = data
        self._found = found
        self._unscored = unscored
        self._texts = scores.TokenTexts(tokenizer)
        self._beta = DEFAULT_BETA if options.beta is None else options.beta
        # What the report is made of: by how many responses there are; of prompts, the first ones.
        self._reported: dict[int, list[dict]] = {responses: [] for responses in SIDES}
        self._shown: list[dict] = []

    def write(self, file) -> None:
        """Write all rows as lines."""
        for where, fields in every_row.read(self._data.path, self._options.split):
            for line in self._lines(where, fields):
                # Parquet has values that JSON lacks, such as times: those are written as text.
                file.write(json.dumps(line, default=str) + "\n")

    def report(self) -> str:
        """Return what is to be said of the rows that were written."""
        if self._options.prompts:
            return scores.next_tokens(self._shown)
        return scores.report(self._reported[2], self._reported[1], self._beta)

    def _lines(self, where: str, fields: dict) -> list[dict]:
        """Return the lines of a row: itself with its scores, or one for each of its pairs."""
        if where in self._found.places or where in self._unscored:
            return [fields | self._added(where, fields)]
        lines = []
        for example in every_row.answered(fields, self._data, where):
            # The row's pairs, or the answers of a tie.
            names = ("chosen", "rejected") if len(example.responses) == 2 else ("completion",)
            said = dict(zip(names, example.responses, strict=True))
            lines.append(fields | said | self._added(example.where, fields))
        return lines

    def _added(self, where: str, fields: dict) -> dict:
        """Return the fields that are added to what stands in a place, and report them."""
        if where not in self._found.places:
            return {"unscored": self._unscored[where]}
        kind, index = self._found.places[where]
        examples, models = self._found.kinds[kind]
        example = examples[index]
        per_token, top = self._options.per_token, self._options.top > 0
        of_tokens = {}
        if per_token or top:
            of_tokens = scores.token_fields(
                example, index, models, self._texts, per_token=per_token, top=top
            )
        if self._options.prompts:
            if len(self._shown) < SHOWN:
                self._shown.append(of_tokens | {"where": where})
            return of_tokens
        summed = scores.summed_fields(example, index, models, self._beta)
        self._report(example, summed, fields)
        return summed | of_tokens

    def _report(self, example: Example, summed: dict, fields: dict) -> None:
        """Keep what the report needs of an example."""
        prompt, *_ = example.identities()
        kept = summed | {"prompt": prompt, "subset": fields.get("subset")}
        self._reported[len(example.responses)].append(kept)


def main():
    model = flags.DEFINE_string(
        "model", None, "The model: a folder in Hugging Face format, or a hub name."
    )
    data = flags.DEFINE_string(
        "data", None, "The rows: a file in any format that training reads, a folder or a hub name."
    )
    prompts = flags.DEFINE_string(
        "prompts", None, "Instead of --data: rows with a prompt, whose next tokens --top shows."
    )
    out = flags.DEFINE_string("out", None, "Where the scored rows go; must not exist.")
    reference = flags.DEFINE_string(
        "reference", "", "Another model to score the same tokens, such as DPO's reference."
    )
    beta = flags.DEFINE_float(
        "beta",
        None,
        "With --reference: implicit rewards are this times log-ratios. Default: 0.1, as DPO's.",
        lower_bound=0,
        upper_bound=1e6,
    )
    per_token = flags.DEFINE_bool(
        "per_token", False, "Add the tokens of each response, and their log-probs."
    )
    top = flags.DEFINE_integer(
        "top",
        0,
        "Add this many of the likeliest tokens in the place of each token, with log-probs.",
        lower_bound=0,
        upper_bound=1000,
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
    flags.mark_flags_as_required(["model", "out"])
    mesh = sharding.define_flags(("fsdp", "context", "tensor"))

    def score_rows():
        options = Options(
            model=model.value,
            data=data.value or "",
            out=out.value,
            prompts=prompts.value or "",
            reference=reference.value,
            split=split.value,
            date=date.value,
            batch_size=batch_size.value,
            dtype=dtype.value,
            beta=beta.value,
            per_token=per_token.value,
            top=top.value,
            settings=settings(),
        )
        score_file(options, mesh())

    device_command.run(score_rows, __doc__)


if __name__ == "__main__":
    main()
