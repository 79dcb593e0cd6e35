"""Direct Preference Optimization (Rafailov et al. 2023) in JAX and Flax.

    import dpo_jax
    model = dpo_jax.load("PATH_OR_HUB_NAME")
    pairs = model.encode([{"prompt": "...", "chosen": "...", "rejected": "..."}])
    chosen, rejected = model.log_probs(pairs)
    trainer = dpo_jax.Trainer(model, "dpo", beta=0.1, lr=1e-6)
    metrics = trainer.step(pairs)

See `dpo_jax.api`. Importing the package imports neither jax nor anything that uses it.
"""

import importlib
import logging
import sys
import typing
import warnings

from dpo_jax import stopping, surroundings

if typing.TYPE_CHECKING:
    from dpo_jax.api import LogProbs, Model, Trainer, batches, load, load_config, run

__all__ = ["LogProbs", "Model", "Trainer", "batches", "load", "load_config", "run"]


def _is_own_command() -> bool:
    """Return whether this is `python -m dpo_jax.COMMAND`, whose module is imported next."""
    # Python calls a program so until it has found its module. Another program may import this
    # package then too.
    if sys.argv[:1] != ["-m"] or "-m" not in sys.orig_argv[:-1]:
        return False
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    return module.partition(".")[0] == "dpo_jax"


# The command's own imports take seconds, in which a signal may come too.
if _is_own_command():
    surroundings.prepare()
    stopping.end_at_once()


def _not_about_torch(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


# On import, transformers warns if there is no PyTorch. Only its tokenizers and configs are used.
logging.getLogger("transformers").addFilter(_not_about_torch)


def __getattr__(name: str):
    """Import the Python interface, and jax with it, when one of its names is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'dpo_jax' has no attribute {name!r}")
    with warnings.catch_warnings():
        # In a notebook without ipywidgets a library's import warns that bars will be plain.
        warnings.filterwarnings("ignore", message="IProgress not found")
        api = importlib.import_module("dpo_jax.api")
    return getattr(api, name)


def __dir__():
    return list(__all__)
