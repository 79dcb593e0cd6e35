"""In which type a stage's hf/ is stored, what done.json keeps of it, and when it is written again.

hf/ of a run's last training stage, in its last round, is for others: its weights are stored in
config.export.dtype. Those before it are what later stages and rounds start from, and stay in
float32, so that a run of several stages rounds nothing on its way.
"""

import pathlib

from ml_collections import ConfigDict

from dpo_jax.stage_table import STAGES
from dpo_jax.workdir import EXPORT, StageChanged, read_done, saved_steps


def dtype_of(config: ConfigDict, is_last: bool, source: str) -> str:
    """Return the type in which a stage's weights are stored.

    is_last: no other stage of the run trains after it. source: the type of model.path's weights.
    """
    if not is_last:
        return "float32"
    asked = config.export.dtype
    return source if asked == "source" else asked


def record(config: ConfigDict, is_last: bool, source: str) -> dict[str, str]:
    """Return what done.json keeps: the type, what was asked for, and the source's.

    is_last, source: as for `dtype_of`.
    """
    stored = dtype_of(config, is_last, source)
    return dict(asked=config.export.dtype, dtype=stored, source=source)


def is_out_of_date(config: ConfigDict, is_last: bool, folder: pathlib.Path) -> bool:
    """Return whether a finished stage's hf/ is stored otherwise than this config needs it.

    It is where the stage was the last one of its run, so that its weights were rounded, and is an
    earlier one now; and where config.export.dtype has been changed. is_last: as for `dtype_of`.
    Raises StageChanged where there is no checkpoint to write it from.
    """
    kept = _read(folder)
    # Stages that do not train have none, nor have those from before it was written.
    if not kept:
        return False
    # What an earlier run kept exact is not rounded before somebody asks for it.
    if is_last and config.export.dtype == kept["asked"]:
        return False
    wanted = dtype_of(config, is_last, kept["source"])
    if wanted == kept["dtype"]:
        return False
    if not saved_steps(folder / "checkpoints"):
        checkpoints = folder / "checkpoints"
        raise StageChanged(
            f"{folder / 'hf'} is stored in {kept['dtype']}, and this run needs it in {wanted}: "
            "later stages start from exact weights, and config.export.dtype is for the last "
            f"one. It cannot be written again, as {checkpoints} is gone. Give another --workdir."
        )
    return True


def is_gone(stage: str, folder: pathlib.Path) -> bool:
    """Return whether a finished stage's hf/ has no weights any more, and can be written again.

    Raises StageChanged where there is no checkpoint to write it from.
    """
    model = folder / "hf"
    if not STAGES[stage].trains:
        return False
    # Where only smaller files are gone, the stage's record names the first of them.
    if any(model.glob("*.safetensors")):
        return False
    if not saved_steps(folder / "checkpoints"):
        raise StageChanged(
            f"{model}, the model that the finished stage {stage} made, is gone or lacks files, and "
            f"{folder / 'checkpoints'} holds nothing to write it from. Put it back, or remove "
            f"{folder} to train the stage again."
        )
    return True


def source_dtype(folder: pathlib.Path) -> str:
    """Return in which type the model was stored that a finished stage started from; "" if unknown.

    That stage's own hf/ may be stored in another one.
    """
    return _read(folder).get("source", "")


def _read(folder: pathlib.Path) -> dict[str, str]:
    return read_done(folder).get(EXPORT, {}) if (folder / "done.json").exists() else {}
