"""The smallest model and pairs, which need no file."""

import numpy as np

from dpo_jax.data.examples import Example
from dpo_jax.models.rope import Rope
from dpo_jax.models.transformer import LayerKind, TransformerConfig

# The numbers of a training stage, as the step takes them.
HYPER = {
    name: np.float32(value)
    for name, value in dict(
        lr=0.1,
        warmup_steps=0,
        steps=10,
        max_grad_norm=1.0,
        beta=0.3,
        label_smoothing=0.0,
        alpha=0.5,
        clip=0.2,
        value_clip=0.2,
        value_coef=0.1,
    ).items()
}


def tiny_config(**fields) -> TransformerConfig:
    """Return the shape of a two-layer rotary decoder with 40 tokens."""
    sizes = dict(
        vocab=40,
        width=16,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=4,
        mlp_width=32,
        max_positions=64,
        pattern=(LayerKind(rope=Rope(4)),),
    )
    return TransformerConfig(**sizes | fields)


def random_pairs(count, seed=0, vocab=40, longest=12) -> list[Example]:
    """Return pairs of random lengths: prompt, chosen and rejected of 1 to `longest` tokens each."""
    rng = np.random.default_rng(seed)

    def tokens():
        return rng.integers(0, vocab, rng.integers(1, longest + 1)).astype(np.int32)

    return [Example(tokens(), (tokens(), tokens())) for _ in range(count)]


def masked_pairs(count, seed=0, **sizes) -> list[Example]:
    """Return random pairs with a mask for each response, True at its last token at least."""
    rng = np.random.default_rng([seed, 1])

    def mask(response):
        drawn = rng.random(len(response)) < 0.5
        drawn[-1] = True  # an answer ends in an assistant's turn
        return drawn

    examples = []
    for pair in random_pairs(count, seed, **sizes):
        masks = tuple(mask(response) for response in pair.responses)
        examples.append(Example(pair.prompt, pair.responses, masks))
    return examples


def first_responses(examples: list[Example]) -> list[Example]:
    """Return the same prompts with the first of their responses alone."""
    alone = []
    for example in examples:
        masks = example.completion_masks
        alone.append(
            Example(example.prompt, example.responses[:1], None if masks is None else masks[:1])
        )
    return alone
