"""A model as a run sees it: shape, weights to load, tokenizer; from Hugging Face format or made at
random.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from dpo_jax.console import say
from dpo_jax.data import packing, toy
from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.models import families, hf, transformer
from dpo_jax.parallel import processes, sharding


@dataclasses.dataclass
class Pretrained:
    """A model that has been looked at but not loaded."""

    config: transformer.TransformerConfig
    hf_config: object  # what export writes back
    tokenizer: object
    path: str  # where it is: a hub name or a folder; "": made at random
    load: Callable  # mesh -> weights on it
    fingerprint: Callable  # () -> what names the weights: those of another model have another

    @property
    def shapes(self):
        """The abstract weights."""
        return transformer.abstract(self.config)

    def check(self, examples) -> None:
        """ValueError where a row has a token the model does not know, or more tokens than it has
        positions.
        """
        if not len(examples):
            return
        prompt_P, response_PK = packing.lengths_of(examples)
        length_P = prompt_P + response_PK.max(axis=1)
        size_P = prompt_P + response_PK.sum(axis=1)
        ids = np.concatenate(
            [part for prompt, responses in examples for part in (prompt, *responses)]
        )
        largest_P = np.maximum.reduceat(ids, np.cumsum(size_P) - size_P)
        if largest_P.max() >= self.config.vocab:
            row = int(np.argmax(largest_P >= self.config.vocab))
            raise ValueError(
                f"{examples.where[row]} has token {largest_P[row]}, but the model's vocabulary ends at "
                f"{self.config.vocab - 1}: this tokenizer is another model's."
            )
        if self.config.learned_positions and length_P.max() > self.config.max_positions:
            row = int(np.argmax(length_P > self.config.max_positions))
            raise ValueError(
                f"{examples.where[row]} has {length_P[row]} tokens, but the model has "
                f"{self.config.max_positions} positions: lower config.data.max_length (--max_length)."
            )
        if length_P.max() > self.config.max_positions:
            say(
                f"warning: rows of up to {length_P.max()} tokens, but the model was made for "
                f"{self.config.max_positions}; config.data.max_length cuts them."
            )


def open_model(path: str, *, tokenizer: str = "", words=None, **options) -> Pretrained:
    """A model in Hugging Face format, by hub name or folder.

    tokenizer: where that is, if not with the model; words: the tokenizer itself, where it is at
    hand. options: of `families.from_hf`; head is "score" for a reward model.
    """
    folder = hf.fetch(path)
    hf_config = hf.read_config(folder)
    config = families.from_hf(hf_config, **options)

    def load(mesh):
        return hf.load(folder, config, sharding.param_shardings(mesh, transformer.abstract(config)))

    if words is None:
        words = tokenizers.load(hf.fetch(tokenizer, weights=False) if tokenizer else folder)

    @functools.cache  # it reads all of the weights
    def fingerprint():
        return processes.from_first(lambda: hf.fingerprint(folder))

    return Pretrained(config, hf_config, words, path, load, fingerprint)


def from_scratch(fields: dict, seed: int, *, tokenizer: str = "", **options) -> Pretrained:
    """A random model of the family and sizes that Hugging Face config fields give; without a path,
    the toy's words.
    """
    hf_config = hf.make_config(fields)
    config = families.from_hf(hf_config, **options)

    def load(mesh):
        placed = sharding.param_shardings(mesh, transformer.abstract(config))
        return jax.jit(lambda key: transformer.init(config, key), out_shardings=placed)(
            jax.random.key(seed)
        )

    words = tokenizers.load(hf.fetch(tokenizer, weights=False)) if tokenizer else toy.tokenizer()
    return Pretrained(
        config, hf_config, words, "", load, lambda: f"seed {seed} of {sorted(fields.items())}"
    )
