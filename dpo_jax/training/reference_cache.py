"""The reference's log-probs, computed once and kept: a sweep pays once, without a second model.

    WORKDIR/reference/KEY/train.npy  eval.npy        float32 [examples, responses]; nan: not yet
                          train.sha256  eval.sha256  of a finished file, checked when it is read

KEY is a hash of what the numbers depend on, and of nothing else: the reference's weights and shape,
the tokens, the forward pass (FORWARD_VERSION, dtypes, attention kernel). So beta, learning rate,
seed, mesh and the run's name share one. A run computes what it needs and does not find, each
distinct response to a prompt once; killed in between, it continues where it was.
"""

import dataclasses
import hashlib
import json
import pathlib

import jax
import numpy as np

from dpo_jax.console import say
from dpo_jax.data.batches import FILLER
from dpo_jax.models import attention, log_probs
from dpo_jax.models.inference import DistinctResponses, score_responses
from dpo_jax.models.loading import Checkpoint
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import processes
from dpo_jax.whole_file import whole_file

# Fields of the model's config that change no log-prob: two say how it is compiled, one is a limit.
WITHOUT_EFFECT = ("remat", "unroll", "max_positions")


class ReferenceCache:
    """The kept log-probs of one reference; its weights are loaded only to compute more of them."""

    def __init__(
        self,
        workdir: pathlib.Path,
        checkpoint: Checkpoint,
        mesh,
        batch_size: int,
        dtype: str = "float32",
    ):
        """Keep log-probs in WORKDIR/reference, computed `batch_size` examples at a time.

        dtype: of the reference's kernels and embeddings.
        """
        self._dtype = dtype
        self._root = pathlib.Path(workdir) / "reference"
        self._checkpoint = checkpoint
        self._mesh = mesh
        self._batch_size = batch_size

    def log_probs(self, split: str, examples, needed: np.ndarray) -> np.ndarray:
        """Return summed log-probs [examples, responses] in nats, at least those of `needed`.

        split: "train" or "eval". examples: all of the split, a `tokenizer.Examples`. needed:
        indices of examples, of any shape, FILLER among them or not; others may be nan.
        """
        path = self._root / self.key(examples) / f"{split}.npy"
        shape = (len(examples), len(examples.responses[0]))
        # One process reads: others might see another state of a file that is being filled.
        kept = processes.from_first(lambda: _read(path, shape))
        needed = np.unique(needed[needed != FILLER])
        # An earlier run may have computed some of them, or been killed in the middle.
        missing_PK = np.zeros(shape, bool)
        missing_PK[needed] = np.isnan(kept[needed])
        if not missing_PK.any():
            say(f"reference: log-probs of {len(needed)} {split} rows are in {path}")
            return kept
        responses = DistinctResponses(examples, missing_PK)
        say(
            f"reference: {missing_PK.any(axis=1).sum()} of {len(needed)} {split} rows to compute, "
            f"{len(responses)} distinct responses, kept in {path}"
        )
        model = self._checkpoint.load(self._mesh, dtype=self._dtype)
        for places, values in score_responses("reference", model, responses, self._batch_size):
            kept.ravel()[places] = values
            # After each batch, so that a kill costs one batch.
            _write(path, kept, places)
        _seal(path)
        return kept

    def key(self, examples) -> str:
        """Return the name of the folder for these examples."""
        config = self._checkpoint.config
        with jax.set_mesh(self._mesh):
            # Kernels round differently, and a policy's log-ratios would start from that.
            kernel = attention.choose(
                config.attention,
                config.dtype,
                config.head_width,
                config.attention_softcap,
                self._mesh.shape["context"],
            )
        # Everything that moves a log-prob: a changed input gives another folder, and never old
        # numbers.
        depends_on = dict(
            weights=self._checkpoint.fingerprint(),
            tokens=examples.fingerprint,
            model=_fields_with_effect(config) | dict(attention=kernel),
            forward=log_probs.FORWARD_VERSION,
        )
        # Where products are made of 16 bits, it is all the same how many are held.
        if self._dtype not in ("float32", config.dtype):
            depends_on["held"] = self._dtype
        text = json.dumps(depends_on, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fields_with_effect(config: TransformerConfig) -> dict:
    """Return the fields of a model's config that its log-probs depend on.

    Those at their default are left out, so that a field added later leaves old keys as they are.
    """
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in WITHOUT_EFFECT or value == field.default:
            continue
        if field.name == "pattern":
            value = [dataclasses.asdict(kind) for kind in value]
        found[field.name] = value
    return found


def _read(path: pathlib.Path, shape: tuple[int, int]) -> np.ndarray:
    """Return what is kept, nan for the rest; ValueError where the file is not what was written."""
    if not path.exists():
        return np.full(shape, np.nan, np.float32)
    kept, found = inspect(path)
    if not found and (kept.shape, kept.dtype) != (shape, np.float32):
        found = f"it holds {kept.dtype} {list(kept.shape)} in place of float32 {list(shape)}"
    if found:
        raise ValueError(
            f"{path} is not what was written there: {found}. Remove {path.parent}, and the "
            "log-probs are computed again."
        )
    return kept


def inspect(path: pathlib.Path) -> tuple[np.ndarray | None, str]:
    """Return the array in a file, and what is wrong with it; "" where nothing is known to be."""
    try:
        kept = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return None, f"it cannot be read ({reason[0]})"
    seal = path.with_suffix(".sha256")
    digest = hashlib.sha256(kept.tobytes()).hexdigest()
    if seal.exists() and seal.read_bytes() != digest.encode():
        return kept, f"its sha256 is not the one in {seal.name}"
    return kept, ""


def _seal(path: pathlib.Path) -> None:
    """Write down the sha256 of a finished file. Process 0 only."""
    if jax.process_index() == 0:
        digest = hashlib.sha256(np.load(path, allow_pickle=False).tobytes()).hexdigest()
        path.with_suffix(".sha256").write_text(digest)


def _write(path: pathlib.Path, values: np.ndarray, places: np.ndarray) -> None:
    """Write some numbers of an array to its file, in place. Process 0 only.

    places: indices into the flat array. A kill leaves whole numbers, or nan.
    """
    if jax.process_index():
        return
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as draft, draft.open("wb") as file:
            np.save(file, np.full_like(values, np.nan))
    path.with_suffix(".sha256").unlink(missing_ok=True)  # until this fill is finished too
    # Only these numbers are written: another run may be filling the rest at the same time.
    file_array = np.lib.format.open_memmap(path, mode="r+")
    file_array.reshape(-1)[places] = values.ravel()[places]
    file_array.flush()
