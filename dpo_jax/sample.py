"""Sample completions: dpo-jax sample --model=DIR_OR_HUB_NAME --prompts=FILE.jsonl --out=FILE.jsonl

Adds to each row, whose `prompt` is text or chat messages, the `completion` as text without EOS, its
`logp` (summed over its tokens, nats, under the model itself) and `tokens` (how many, EOS included).
With --n above 1 it adds `completions`, and lists of the other two.

Rows are written as they are made. The same command continues a file where a killed one stopped;
what the file was made with is kept beside it, in OUT.settings.json.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib

from absl import flags

from dpo_jax import config as configs
from dpo_jax import device_command
from dpo_jax.console import Progress, say
from dpo_jax.data import readers
from dpo_jax.models import loading
from dpo_jax.parallel import processes, sharding
from dpo_jax.sampling import generation, sampler
from dpo_jax.sampling.prompts import Prompts
from dpo_jax.workdir import append_lines, differences, read_lines, write_json, write_lines


def sample_file(
    model_path: str,
    prompts_path: str,
    out: str,
    mesh,
    sampling: sampler.Sampling,
    *,
    dtype: str,
    limits: dict,
) -> None:
    """Sample completions for each row of a file that is not in `out` yet.

    limits: max_prompt_length and truncate, as in config.data.
    """
    rows = _read(prompts_path)
    path = pathlib.Path(out)
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    made_with = dict(
        model=model_path,
        prompts=f"{len(rows)} rows, sha256 {digest[:16]}",
        dtype=dtype,
        **dataclasses.asdict(sampling),
        **limits,
    )
    chunk = generation.prompts_at_a_time(sampling)
    start = processes.from_first(functools.partial(_begin, path, made_with, len(rows), chunk))
    processes.check_shared(path.parent)
    if start < len(rows):
        checkpoint = loading.open_checkpoint(model_path, dtype=dtype)
        prompts = _encode(rows, checkpoint, sampling, limits)
        model = checkpoint.load(mesh)
        progress = Progress("sample", start, len(rows), unit="prompt")
        done = start
        for generated in generation.generate(model, prompts, sampling, first=start):
            part = rows[done : done + len(generated)]
            added = [_fields(completions) for completions in generated]
            append_lines(path, [row | new for row, new in zip(part, added, strict=True)])
            done += len(part)
            progress.update(done, {})
        progress.close()
    say(f"finished: {out} holds {len(rows)} prompts with {sampling.n} sampled for each")


def _read(path: str) -> list[dict]:
    """Return the rows of a file; ValueError names the first line that has no prompt."""
    rows = []
    for number, row in readers.read_jsonl(path):
        if not isinstance(row.get("prompt"), str | list):
            raise ValueError(
                f"{path} line {number}: expected a field 'prompt', text or chat messages; found "
                f"the fields {', '.join(row) or '(none)'}."
            )
        rows.append(row)
    if not rows:
        raise ValueError(
            f'{path} has no rows; expected lines such as {{"prompt": "Name a colour."}}.'
        )
    return rows


def _begin(path: pathlib.Path, made_with: dict, total: int, chunk: int) -> int:
    """Return how many rows are done already, in whole chunks; cut off what is beyond them."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out={path}: there is no folder {path.parent}. Make it first.")
    beside = path.with_name(path.name + ".settings.json")
    if not path.exists():
        write_json(beside, made_with)
        return 0
    if not beside.exists():
        raise FileExistsError(
            f"--out={path}: the file exists, but not {beside.name}, which would say what it was "
            "made with. Give another name, or remove the file."
        )
    found = json.loads(beside.read_text())
    if found != made_with:
        raise ValueError(
            f"--out={path}: the file was made with other settings:\n"
            f"{differences(found, made_with, place='the file')}\n"
            "Use the old values, or give another name, or remove the file."
        )
    rows = read_lines(path)
    if len(rows) == total:
        return total
    start = len(rows) // chunk * chunk
    write_lines(path, rows[:start])
    say(f"continuing after {start} of {total} prompts")
    return start


def _encode(
    rows: list[dict], checkpoint: loading.Checkpoint, sampling: sampler.Sampling, limits: dict
) -> Prompts:
    """Tokenise the prompts, each cut to limits["max_prompt_length"]; say how many may be cut."""
    texts = [row["prompt"] for row in rows]
    prompts, truncate = generation.encode(
        texts, checkpoint.tokenizer, checkpoint.config, sampling, limits
    )
    full = sum(len(prompt) == limits["max_prompt_length"] for prompt in prompts.ids)
    if full:
        say(
            f"{full} of {len(prompts)} prompts fill --max_prompt_length="
            f"{limits['max_prompt_length']}; longer ones are cut by {truncate}"
        )
    return prompts


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
    defaults = configs.default(()).data
    model = flags.DEFINE_string(
        "model", None, "The model: a folder in Hugging Face format, or a hub name."
    )
    prompts = flags.DEFINE_string(
        "prompts", None, "JSON lines with a field prompt, text or chat messages."
    )
    out = flags.DEFINE_string("out", None, "Where the rows go; an unfinished file is completed.")
    settings = dict(
        max_new_tokens=flags.DEFINE_integer(
            "max_new_tokens", 128, "Longest completion.", lower_bound=1
        ),
        temperature=flags.DEFINE_float("temperature", 1.0, "0: always the likeliest token."),
        top_k=flags.DEFINE_integer("top_k", 0, "Draw among the k likeliest tokens; 0: all."),
        top_p=flags.DEFINE_float(
            "top_p", 1.0, "Draw among the likeliest tokens that make up this share."
        ),
        n=flags.DEFINE_integer("n", 1, "Completions per prompt.", lower_bound=1),
        seed=flags.DEFINE_integer("seed", 0, "Seed of the draws."),
        batch_size=flags.DEFINE_integer(
            "batch_size", 64, "Completions at a time, over all devices.", lower_bound=1
        ),
    )
    dtype = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
    limits = dict(
        max_prompt_length=flags.DEFINE_integer(
            "max_prompt_length", defaults.max_prompt_length, "A prompt is cut to this, tokens."
        ),
        truncate=flags.DEFINE_enum(
            "truncate",
            "keep_end",
            configs.TRUNCATIONS,
            "Which part of a longer prompt stays, as config.data.truncate.",
        ),
    )
    flags.mark_flags_as_required(["model", "prompts", "out"])
    mesh = sharding.define_flags()

    def sample_rows():
        sample_file(
            model.value,
            prompts.value,
            out.value,
            mesh(),
            sampler.Sampling(**{name: flag.value for name, flag in settings.items()}),
            dtype=dtype.value,
            limits={name: flag.value for name, flag in limits.items()},
        )

    device_command.run(sample_rows, __doc__)


if __name__ == "__main__":
    main()
