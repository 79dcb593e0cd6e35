"""A model as a run sees it: shape, weights to load, tokenizer; from Hugging Face format or made at random."""

import dataclasses
from collections.abc import Callable

import jax

from dpo_jax import sharding
from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.data import toy
from dpo_jax.models import families, hf, transformer


@dataclasses.dataclass
class Pretrained:
    """A model that has been looked at but not loaded."""
    config: transformer.TransformerConfig
    hf_config: object  # what export writes back
    tokenizer: object
    load: Callable  # mesh -> weights on it

    @property
    def shapes(self):
        """The abstract weights."""
        return transformer.abstract(self.config)


def open_model(path: str, *, tokenizer: str = "", dtype: str = "float32", remat: str = "none") -> Pretrained:
    """A model in Hugging Face format, by hub name or folder; `tokenizer` is where that is, if not with it."""
    folder = hf.fetch(path)
    hf_config = hf.read_config(folder)
    config = families.from_hf(hf_config, dtype=dtype, remat=remat)

    def load(mesh):
        return hf.load(folder, config, sharding.param_shardings(mesh, transformer.abstract(config)))
    return Pretrained(config, hf_config, tokenizers.load(hf.fetch(tokenizer) if tokenizer else folder), load)


def from_scratch(fields: dict, seed: int, *, tokenizer: str = "", dtype="float32", remat="none") -> Pretrained:
    """A random model of the family and sizes that Hugging Face config fields give; without a path, the toy's words."""
    hf_config = hf.make_config(fields)
    config = families.from_hf(hf_config, dtype=dtype, remat=remat)

    def load(mesh):
        placed = sharding.param_shardings(mesh, transformer.abstract(config))
        return jax.jit(lambda key: transformer.init(config, key), out_shardings=placed)(jax.random.key(seed))
    words = tokenizers.load(hf.fetch(tokenizer)) if tokenizer else toy.tokenizer()
    return Pretrained(config, hf_config, words, load)
