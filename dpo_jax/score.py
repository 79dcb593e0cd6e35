"""Scores: python -m dpo_jax.score --model=DIR_OR_HUB_NAME --data=FILE.jsonl --out=FILE.jsonl

Adds to each row (prompt, chosen, rejected) `logp_chosen, logp_rejected` (summed, nats) and
`tokens_chosen, tokens_rejected` (scored tokens, EOS included), by the very code that trains: same
tokenisation, layout and log-probs.
"""

import json
import os
import pathlib

import jax
from absl import flags

from dpo_jax import config as configs
from dpo_jax.console import say
from dpo_jax.data import dataset, readers
from dpo_jax.models import inference, loading
from dpo_jax.parallel import processes, sharding


def score_file(
    model_path: str, data_path: str, out: str, mesh, *, batch_size: int, dtype: str, limits: dict
) -> None:
    """Reads pairs, scores them, and writes every row that could be scored, in order, with what was
    found.
    """
    if pathlib.Path(out).exists():
        raise FileExistsError(f"--out={out} exists: give another name, or remove it.")
    if not pathlib.Path(out).absolute().parent.is_dir():
        raise FileNotFoundError(
            f"--out={out}: there is no folder {pathlib.Path(out).parent}; make it first."
        )
    processes.check_shared(pathlib.Path(out).parent)
    checkpoint = loading.open_checkpoint(model_path, dtype=dtype)
    data = configs.default(()).data
    data.update(source="local", path=data_path, eval_fraction=0.0, **limits)
    loaded = dataset.load(data, checkpoint.tokenizer, "pairs")
    say(loaded.ledger.table())
    checkpoint.check(loaded.train)
    model = checkpoint.load(mesh)
    log_probs = inference.log_probs("score", model, loaded.train, batch_size)
    if jax.process_index() == 0:
        splits = readers.find_splits(data_path)
        rows = (
            splits["train"] if "train" in splits else next(iter(splits.values()))
        )  # as dataset.load chose
        _write(out, rows(), loaded.train, log_probs)
    processes.wait_for_all("scores")  # or they would give process 0 up, and end it
    left_out = loaded.ledger.train.read - len(log_probs)
    say(
        f"scored {len(log_probs)} pairs into {out}, left out {left_out} (see above); "
        f"mean log-prob chosen {log_probs[:, 0].mean():.4g}, rejected {log_probs[:, 1].mean():.4g} nats"
    )


def _write(out: str, rows, examples, log_probs) -> None:
    """The rows that were scored, as they were read, with the scores; a kill leaves no half-written
    file.
    """
    scores = dict(zip(examples.where, zip(examples.responses, log_probs, strict=True), strict=True))
    draft = pathlib.Path(out + ".draft")
    with draft.open("w") as file:
        for where, record in rows:
            if where in scores:
                responses, (chosen, rejected) = scores[where]
                found = dict(
                    logp_chosen=float(chosen),
                    logp_rejected=float(rejected),
                    tokens_chosen=len(responses[0]),
                    tokens_rejected=len(responses[1]),
                )
                # Parquet has columns that JSON has not, such as times: those are written as text.
                file.write(json.dumps(readers.fields_of(record) | found, default=str) + "\n")
    os.replace(draft, out)


def main():
    defaults = configs.default(()).data
    model = flags.DEFINE_string("model", None, "Folder in Hugging Face format, or hub name.")
    data = flags.DEFINE_string("data", None, "Pairs: rows of prompt, chosen, rejected.")
    out = flags.DEFINE_string("out", None, "Where the scored rows go; must not exist.")
    batch_size = flags.DEFINE_integer("batch_size", 16, "Pairs at a time, over all devices.")
    dtype = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
    names = {
        "max_length": flags.DEFINE_integer,
        "max_prompt_length": flags.DEFINE_integer,
        "max_dropped": flags.DEFINE_float,
    }
    limits = {
        name: define(name, defaults[name], f"As config.data.{name}.")
        for name, define in names.items()
    }
    limits["truncate"] = flags.DEFINE_enum(
        "truncate", "auto", configs.TRUNCATIONS, "As config.data.truncate."
    )
    limits["on_bad_row"] = flags.DEFINE_enum(
        "on_bad_row", "error", ["error", "drop"], "As config.data.on_bad_row."
    )
    limits["append_eos"] = flags.DEFINE_bool("append_eos", True, "As config.data.append_eos.")
    flags.mark_flags_as_required(["model", "data", "out"])
    mesh = sharding.define_flags()

    def score_pairs():
        score_file(
            model.value,
            data.value,
            out.value,
            mesh(),
            batch_size=batch_size.value,
            dtype=dtype.value,
            limits={name: flag.value for name, flag in limits.items()},
        )

    processes.run(score_pairs, __doc__)


if __name__ == "__main__":
    main()
