"""The reference's log-probs, computed once and kept: a sweep pays for them once and holds no second
model.

    WORKDIR/reference/KEY/train.npy  eval.npy    float32 [rows, responses], nan where not computed
    yet
                          train.sha256  eval.sha256  of the rows, once a fill is finished; checked
                          when they are read

KEY is made of all that the numbers depend on: the reference's weights, the rows' tokens, and the
code and dtype of the forward pass; not of beta, learning rate, seed or the run's name. A run
computes the rows that it needs and that are not there yet; killed, it goes on where it was.
"""

import hashlib
import inspect
import os
import pathlib

import jax
import numpy as np

from dpo_jax.console import say
from dpo_jax.data import packing
from dpo_jax.data.batches import FILLER, evaluation_order
from dpo_jax.models import attention, log_probs, transformer
from dpo_jax.models.inference import score_rows
from dpo_jax.models.loading import Pretrained
from dpo_jax.parallel import processes, sharding

CODE = (transformer, attention, log_probs, packing)  # what a log-prob is computed by
FREE = ("remat", "unroll")  # of the model's config: they change no value


class ReferenceCache:
    """The log-probs of one reference model on one data set; the model's weights are loaded only to
    fill it.
    """

    def __init__(self, workdir: pathlib.Path, model: Pretrained, mesh, batch_size: int):
        """batch_size: rows at a time."""
        self._root, self._model, self._mesh = pathlib.Path(workdir) / "reference", model, mesh
        shards = sharding.batch_shards(mesh)
        self._batch_size = -(-batch_size // shards) * shards

    def log_probs(self, split: str, examples, rows: np.ndarray) -> np.ndarray:
        """Log-probs [rows of the data set, responses], of which at least `rows` are there; nan for
        the others.

        examples: the split, a `tokenizer.Examples`.
        """
        path = self._root / self._key(examples) / f"{split}.npy"
        found = processes.from_first(
            lambda: _read(path, (len(examples), len(examples.responses[0])))
        )
        needed = np.unique(rows[rows != FILLER])
        missing = needed[np.isnan(found[needed]).any(axis=1)]
        if not len(missing):
            say(f"reference: log-probs of {len(needed)} {split} rows are in {path}")
            return found
        say(f"reference: {len(missing)} of {len(needed)} {split} rows to compute, kept in {path}")
        order = evaluation_order(len(missing), self._batch_size)
        order = np.where(order == FILLER, FILLER, missing[order])
        for done, values in score_rows(
            "reference",
            self._model.config,
            self._model.load(self._mesh),
            self._mesh,
            examples,
            order,
        ):
            found[done] = values
            _put(path, found, done)
        _seal(path)
        return found

    def _key(self, examples) -> str:
        config = {
            name: value for name, value in vars(self._model.config).items() if name not in FREE
        }
        with jax.set_mesh(
            self._mesh
        ):  # kernels round otherwise: a policy's margins would start from that
            config["attention"] = attention.choose(
                config["attention"], config["dtype"], config["head_width"]
            )
        parts = [
            self._model.fingerprint(),
            examples.fingerprint,
            repr(sorted(config.items())),
            *map(inspect.getsource, CODE),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _read(path: pathlib.Path, shape: tuple[int, int]) -> np.ndarray:
    """What is kept, nan for the rest; ValueError where a finished fill is no longer what was
    written.
    """
    found = np.load(path) if path.exists() else np.full(shape, np.nan, "f4")
    seal = path.with_suffix(".sha256")
    if seal.exists() and seal.read_text() != hashlib.sha256(found.tobytes()).hexdigest():
        raise ValueError(
            f"{path} is not what was written there (its sha256 is another than {seal.name}'s). Remove "
            f"{path.parent}: the log-probs are then computed again."
        )
    return found


def _seal(path: pathlib.Path) -> None:
    """Says what a finished fill has written. Process 0 only."""
    if not jax.process_index():
        path.with_suffix(".sha256").write_text(hashlib.sha256(np.load(path).tobytes()).hexdigest())


def _put(path: pathlib.Path, found: np.ndarray, rows: np.ndarray) -> None:
    """Writes rows of the array to its file, in place; a kill leaves whole rows, or nan. Process 0
    only.
    """
    if jax.process_index():
        return
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(
            f".{os.getpid()}.draft"
        )  # another run's may be about to make it too
        with draft.open("wb") as file:
            np.save(file, np.full_like(found, np.nan))
        os.replace(draft, path)
    path.with_suffix(".sha256").unlink(missing_ok=True)  # until this fill is finished too
    kept = np.lib.format.open_memmap(path, mode="r+")
    kept[rows] = found[rows]
    kept.flush()
