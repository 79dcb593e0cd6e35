"""Sample completions: dpo-jax sample --model=DIR_OR_HUB_NAME --prompts=FILE --out=FILE.jsonl

Adds to each row the `completion` as text without EOS, its `logp` (summed over its tokens, nats,
under the model itself) and `tokens` (how many, EOS included). With --n above 1 it adds
`completions`, and lists of the other two. With --beams=K nothing is drawn: the completion is the
likeliest one that beam search finds. Rows are in any format and shape that training reads; they
need a prompt, and no answers.

Rows are written as they are made. The same command continues a file where a killed one stopped;
what the file was made with is kept beside it, in OUT.settings.json, and sums by which its rows are
known again in OUT.sums.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import pathlib

import jax
from absl import flags

from dpo_jax import config as configs
from dpo_jax import data_flags, device_command
from dpo_jax.console import Progress, say
from dpo_jax.data import every_row
from dpo_jax.data.rows import TextExample
from dpo_jax.data.tokenizer import TOKENIZATION_VERSION
from dpo_jax.models import loading
from dpo_jax.parallel import agreement, processes, sharding
from dpo_jax.sampling import generation, sampler
from dpo_jax.storage import shadow
from dpo_jax.whole_file import IsoDate, read_record
from dpo_jax.workdir import (
    SealedRows,
    differences,
    lock_output,
    write_record,
)

FIELDS = ("columns", "template", "ignore")  # of config.data, each a flag as it is there
ADDED = ("completion", "completions", "logp", "tokens")  # to each row
OWN_FIELDS = ("max_prompt_length", "truncate")  # with other defaults


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    model: str
    prompts: str
    out: str
    sampling: sampler.Sampling
    split: str = ""
    date: datetime.date | None = None  # what chat templates take for today; None: today
    dtype: str = "float32"
    settings: dict = dataclasses.field(default_factory=dict)  # fields of config.data


@data_flags.named((*FIELDS, *OWN_FIELDS), path="prompts")
def sample_file(options: Options, mesh) -> None:
    """Sample completions for each row of a file that is not in the output yet."""
    path = shadow.place(options.out)
    if shadow.is_copy(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out={path}: there is no folder {path.parent}. Make it first.")
    # A second command would add the same rows once more.
    with lock_output(path, [_settings_of(path), _sums_of(path)]):
        _sample_file(options, path, mesh)


def _sample_file(options: Options, path: pathlib.Path, mesh) -> None:
    rows, prompts = _read(options)
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    made_with = dict(
        model=options.model,
        prompts=f"{len(rows)} rows, sha256 {digest[:16]}",
        dtype=options.dtype,
        tokenization=TOKENIZATION_VERSION,
        **_drawn_by(options.sampling),
        **options.settings,
    )
    source = f"--prompts={options.prompts}"
    agreement.check_same(lambda: {source: made_with["prompts"]}, agreement.SAME_FILES)
    sampling = options.sampling
    chunk = generation.prompts_at_a_time(sampling)
    kept = SealedRows(path, _sums_of(path), at_once=chunk)
    begin = functools.partial(_begin, path, kept, made_with, options.date, rows, chunk)
    start, date = processes.from_first(begin)
    processes.check_shared(path.parent)
    if start < len(rows):
        longest = options.settings.get("max_prompt_length", 0)  # 0: as long as it is
        longest = longest and longest + sampling.max_new_tokens
        checkpoint = loading.open_checkpoint(options.model, dtype=options.dtype, max_length=longest)
        encoded = generation.encode(
            prompts,
            checkpoint.tokenizer,
            checkpoint.config,
            sampling,
            options.settings,
            datetime.date.fromisoformat(date),
        )
        agreement.check_same(
            lambda: {source: f"tokens of sha256 {encoded.fingerprint[:16]}"}, agreement.SAME_ROWS
        )
        model = checkpoint.load(mesh)
        progress = Progress("sample", start, len(rows), unit="prompt")
        done = start
        for generated in generation.generate(model, encoded, sampling, first=start):
            part = rows[done : done + len(generated)]
            added = [_fields(completions) for completions in generated]
            if jax.process_index() == 0:
                kept.append([row | new for row, new in zip(part, added, strict=True)])
            done += len(part)
            progress.update(done, {})
        progress.close()
    say(f"finished: {path} holds {len(rows)} prompts with {_of_each(sampling)}")


def _of_each(sampling: sampler.Sampling) -> str:
    """Return what each prompt has in the end, for the last line."""
    if sampling.beams:
        return f"the likeliest completion that {sampling.beams} beams found for each"
    return f"{sampling.n} sampled for each"


def _read(options: Options) -> tuple[list[dict], list[TextExample]]:
    """Return the rows of a file, and their prompts; ValueError names the first without one."""
    data = configs.default(()).data
    data.update(**options.settings)
    rows = []
    prompts = []
    for where, fields in every_row.read(options.prompts, options.split):
        # Parquet has values that JSON lacks, such as times: those are written as text.
        rows.append(json.loads(json.dumps(fields, default=str)))
        prompts.append(every_row.prompt(fields, data, where))
    if not rows:
        raise ValueError(
            f'{options.prompts} has no rows; expected rows such as {{"prompt": "Name a colour."}}.'
        )
    return rows, prompts


def _begin(
    path: pathlib.Path,
    kept: SealedRows,
    made_with: dict,
    date: datetime.date | None,
    inputs: list[dict],
    chunk: int,
) -> tuple[int, str]:
    """Return how many rows are done already, in whole chunks, and the date of the file.

    Rows beyond whole chunks are cut off. A file keeps the date with which it was begun, unless
    another one is asked for, which is refused.
    """
    beside = _settings_of(path)
    # As it comes back from a file: tuples become lists.
    made_with = json.loads(json.dumps(made_with))
    if not path.exists():
        kept.forget()
        day = (date or datetime.date.today()).isoformat()
        write_record(beside, made_with | dict(date=day))
        return 0, day
    if not beside.exists():
        raise FileExistsError(
            f"--out={path}: the file exists, but not {beside.name}, which would say what it was "
            "made with. Put that one back from a copy, or give another name, or remove the file."
        )
    found = read_record(beside, f"Put it back from a copy, or remove it and {path}.", date=IsoDate)
    day = date.isoformat() if date else found.get("date", datetime.date.today().isoformat())
    made_with["date"] = day
    if found != made_with:
        raise ValueError(
            f"--out={path}: the file was made with other settings:\n"
            f"{differences(found, made_with, place='the file')}\n"
            "Use the old values, or give another name, or remove the file."
        )
    total = len(inputs)
    rows = kept.read()
    _check_rows(path, rows, inputs)
    if len(rows) == total:
        return total, day
    start = len(rows) // chunk * chunk
    kept.cut(start)
    say(f"continuing after {start} of {total} prompts")
    return start, day


def _drawn_by(sampling: sampler.Sampling) -> dict:
    """Return the settings of sampling, as they are kept beside an output."""
    settings = dataclasses.asdict(sampling)
    # Files that are older than beam search have no such setting, and are continued.
    if not sampling.beams:
        del settings["beams"]
    return settings


def _settings_of(path: pathlib.Path) -> pathlib.Path:
    """Return the file that says what the rows of an output were made with."""
    return path.with_name(path.name + ".settings.json")


def _sums_of(path: pathlib.Path) -> pathlib.Path:
    """Return the file by which the rows of an output are known again."""
    return path.with_name(path.name + ".sums")


def _check_rows(path: pathlib.Path, rows: list[dict], inputs: list[dict]) -> None:
    """Raise ValueError for the first row of the output that was not made of the input's row.

    So it is where a line was removed: the prompts that follow would be sampled one row too late.
    """
    if len(rows) > len(inputs):
        raise ValueError(
            f"{path} holds {len(rows):,} rows, but there are {len(inputs):,} prompts: the file was "
            "changed. Put it back from a copy, or remove it."
        )
    for number, (row, given) in enumerate(zip(rows, inputs, strict=False), start=1):
        fields = [name for name in given if name not in ADDED]
        kept = [row.get(name) for name in fields]
        expected = [given[name] for name in fields]
        # As text: nan is not equal to itself.
        if json.dumps(kept) != json.dumps(expected):
            raise ValueError(
                f"{path} row {number:,} is not made of row {number:,} of the prompts: the file was "
                f"changed. Put it back from a copy, or remove row {number:,} and all after it, "
                "which are then made again."
            )


def _fields(completions: list[generation.Generated]) -> dict:
    """Return what is added to a row: of one completion values, of several lists."""
    if len(completions) == 1:
        (made,) = completions
        return dict(completion=made.text, logp=made.log_prob, tokens=made.tokens)
    return dict(
        completions=[made.text for made in completions],
        logp=[made.log_prob for made in completions],
        tokens=[made.tokens for made in completions],
    )


def main():
    model = flags.DEFINE_string(
        "model", None, "The model: a folder in Hugging Face format, or a hub name."
    )
    prompts = flags.DEFINE_string(
        "prompts",
        None,
        "Rows with a prompt: a file in any format that training reads, a folder or a hub name.",
    )
    out = flags.DEFINE_string("out", None, "Where the rows go; an unfinished file is completed.")
    settings = dict(
        max_new_tokens=flags.DEFINE_integer(
            "max_new_tokens", 128, "Longest completion.", lower_bound=1, upper_bound=1_000_000
        ),
        temperature=flags.DEFINE_float(
            "temperature", 1.0, "0: always the likeliest token.", lower_bound=0, upper_bound=1e4
        ),
        top_k=flags.DEFINE_integer(
            "top_k",
            0,
            "Draw among the k likeliest tokens; 0: all.",
            lower_bound=0,
            upper_bound=10_000_000,
        ),
        top_p=flags.DEFINE_float(
            "top_p", 1.0, "Draw among the likeliest tokens that make up this share."
        ),
        n=flags.DEFINE_integer(
            "n", 1, "Completions per prompt.", lower_bound=1, upper_bound=100_000
        ),
        seed=flags.DEFINE_integer(
            "seed", 0, "Seed of the draws.", lower_bound=0, upper_bound=configs.SEEDS
        ),
        beams=flags.DEFINE_integer(
            "beams",
            0,
            "Above 0: beam search for the likeliest completion, with so many beams; nothing is "
            "drawn.",
            lower_bound=0,
            upper_bound=100_000,
        ),
        batch_size=flags.DEFINE_integer(
            "batch_size",
            64,
            "Completions at a time, over all devices.",
            lower_bound=1,
            upper_bound=100_000,
        ),
    )
    dtype = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
    split = data_flags.define_split()
    date = data_flags.define_date()
    data_settings = data_flags.define(*FIELDS, truncate="keep_end")
    max_prompt_length = flags.DEFINE_integer(
        "max_prompt_length",
        0,
        "Tokens that a prompt is cut to; 0: the model's positions without --max_new_tokens, so "
        "that only what the model cannot read is cut.",
        lower_bound=0,
        upper_bound=10_000_000,
    )
    flags.mark_flags_as_required(["model", "prompts", "out"])
    mesh = sharding.define_flags()

    def sample_rows():
        options = Options(
            model=model.value,
            prompts=prompts.value,
            out=out.value,
            sampling=sampler.Sampling(**{name: flag.value for name, flag in settings.items()}),
            split=split.value,
            date=date.value,
            dtype=dtype.value,
            settings=dict(max_prompt_length=max_prompt_length.value, **data_settings()),
        )
        sample_file(options, mesh())

    device_command.run(sample_rows, __doc__)


if __name__ == "__main__":
    main()
