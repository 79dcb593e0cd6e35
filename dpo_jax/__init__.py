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
import typing
import warnings

if typing.TYPE_CHECKING:
    from dpo_jax.api import LogProbs, Model, Trainer, batches, load, load_config, run

__all__ = ["LogProbs", "Model", "Trainer", "batches", "load", "load_config", "run"]


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
