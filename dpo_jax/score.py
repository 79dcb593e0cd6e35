"""Score pairs: dpo-jax score --model=DIR_OR_HUB_NAME --data=FILE.jsonl --out=FILE.jsonl

Adds to each row (prompt, chosen, rejected) `logp_chosen, logp_rejected`, the summed log-probs in
nats, and `tokens_chosen, tokens_rejected`, the tokens they are summed over, EOS included. The
tokens, their layout and the log-probs come from the code that trains.
"""

import json
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags

from dpo_jax import config as configs
from dpo_jax import device_command
from dpo_jax.console import say
from dpo_jax.data import dataset, readers
from dpo_jax.models import inference, loading
from dpo_jax.parallel import processes, sharding
from dpo_jax.whole_file import whole_file


def score_file(
    model_path: str, data_path: str, out: str, mesh, *, batch_size: int, dtype: str, limits: dict
) -> None:
    """Read pairs, score them, and write the rows that could be scored, in the file's order.

    batch_size: pairs at a time, over all devices. limits: fields of config.data. Raises
    FileExistsError if `out` is there already, and what reading the model and the data raises.
    """
    folder = pathlib.Path(out).absolute().parent
    if pathlib.Path(out).exists():
        raise FileExistsError(f"--out={out}: the file exists. Give another name, or remove it.")
    if not folder.is_dir():
        raise FileNotFoundError(f"--out={out}: there is no folder {folder}. Make it first.")
    processes.check_shared(folder)

    checkpoint = loading.open_checkpoint(model_path, dtype=dtype)
    data = configs.default(()).data
    data.update(source="local", path=data_path, eval_fraction=0.0, **limits)
    loaded = dataset.load(data, checkpoint.tokenizer, "pairs")
    say(loaded.ledger.table())
    checkpoint.check(loaded.train)
    model = checkpoint.load(mesh)
    log_probs = inference.log_probs("score", model, loaded.train, batch_size)
    if jax.process_index() == 0:
        _write(out, _rows(data_path), loaded.train, log_probs)
    # Without this, the others would take process 0 for dead while it writes, and end it.
    processes.wait_for_all("scores")
    left_out = loaded.ledger.train.read - len(log_probs)
    chosen, rejected = log_probs.mean(axis=0)
    say(
        f"scored {len(log_probs)} pairs into {out}, left out {left_out} (see above); "
        f"mean log-prob chosen {chosen:.4g}, rejected {rejected:.4g} nats"
    )


def _rows(data_path: str) -> Iterator:
    """Yield (where, record) of the split that dataset.load trains on: train, or the only one."""
    splits = readers.find_splits(data_path)
    split = "train" if "train" in splits else next(iter(splits))
    return splits[split]()


def _write(out: str, rows: Iterator, examples, log_probs: np.ndarray) -> None:
    """Write the rows that were scored, as they were read, with what was found, in one piece."""
    scored = {}
    for where, responses, pair in zip(examples.where, examples.responses, log_probs, strict=True):
        scored[where] = dict(
            logp_chosen=float(pair[0]),
            logp_rejected=float(pair[1]),
            tokens_chosen=len(responses[0]),
            tokens_rejected=len(responses[1]),
        )
    with whole_file(out) as draft, draft.open("w") as file:
        for where, record in rows:
            if where in scored:
                row = readers.fields_of(record) | scored[where]
                # Parquet has values that JSON lacks, such as times: those are written as text.
                file.write(json.dumps(row, default=str) + "\n")


def main():
    defaults = configs.default(()).data
    model = flags.DEFINE_string(
        "model", None, "The model: a folder in Hugging Face format, or a hub name."
    )
    data = flags.DEFINE_string("data", None, "The pairs: rows of prompt, chosen, rejected.")
    out = flags.DEFINE_string("out", None, "Where the scored rows go; must not exist.")
    batch_size = flags.DEFINE_integer(
        "batch_size", 16, "Pairs at a time, over all devices.", lower_bound=1
    )
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

    device_command.run(score_pairs, __doc__)


if __name__ == "__main__":
    main()
