"""A model as a run sees it: shape, weights to load, tokenizer; from Hugging Face format or made at random."""

import dataclasses
from collections.abc import Callable

import jax

from dpo_jax import sharding
from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.data import toy
from dpo_jax.metrics import say
from dpo_jax.models import families, hf, transformer


@dataclasses.dataclass
class Pretrained:
    """A model that has been looked at but not loaded."""
    config: transformer.TransformerConfig
    hf_config: object  # what export writes back
    tokenizer: object
    load: Callable  # mesh -> weights on it
    fingerprint: Callable  # () -> what names the weights: those of another model have another

    @property
    def shapes(self):
        """The abstract weights."""
        return transformer.abstract(self.config)

    def check(self, examples) -> None:
        """ValueError where a row has a token the model does not know, or more tokens than it has positions."""
        longest = 0
        for where, (prompt, responses) in zip(examples.where, examples, strict=True):
            largest = max(int(ids.max()) for ids in (prompt, *responses))
            length = len(prompt) + max(map(len, responses))
            longest = max(longest, length)
            if largest >= self.config.vocab:
                raise ValueError(f"{where} has token {largest}, but the model's vocabulary ends at "
                                 f"{self.config.vocab - 1}: this tokenizer is another model's.")
            if self.config.learned_positions and length > self.config.max_positions:
                raise ValueError(f"{where} has {length} tokens, but the model has {self.config.max_positions} "
                                 "positions: lower config.data.max_length (--max_length).")
        if longest > self.config.max_positions:
            say(f"warning: rows of up to {longest} tokens, but the model was made for {self.config.max_positions}; "
                "config.data.max_length cuts them.")


def open_model(path: str, *, tokenizer: str = "", words=None, **options) -> Pretrained:
    """A model in Hugging Face format, by hub name or folder.

    tokenizer: where that is, if not with the model; words: the tokenizer itself, where it is at hand.
    options: of families.from_hf: head ("score" for a reward model), dtype, remat, unroll.
    """
    folder = hf.fetch(path)
    hf_config = hf.read_config(folder)
    config = families.from_hf(hf_config, **options)

    def load(mesh):
        return hf.load(folder, config, sharding.param_shardings(mesh, transformer.abstract(config)))
    if words is None:
        words = tokenizers.load(hf.fetch(tokenizer, weights=False) if tokenizer else folder)
    return Pretrained(config, hf_config, words, load, lambda: hf.fingerprint(folder))


def from_scratch(fields: dict, seed: int, *, tokenizer: str = "", **options) -> Pretrained:
    """A random model of the family and sizes that Hugging Face config fields give; without a path, the toy's words."""
    hf_config = hf.make_config(fields)
    config = families.from_hf(hf_config, **options)

    def load(mesh):
        placed = sharding.param_shardings(mesh, transformer.abstract(config))
        return jax.jit(lambda key: transformer.init(config, key), out_shardings=placed)(jax.random.key(seed))
    words = tokenizers.load(hf.fetch(tokenizer, weights=False)) if tokenizer else toy.tokenizer()
    return Pretrained(config, hf_config, words, load, lambda: f"seed {seed} of {sorted(fields.items())}")
