"""Rotary embeddings (Su et al. 2021), and how they are stretched to longer sequences.

Letters in array names are those of `transformer.py`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions that lie closer together by a factor."""

    factor: float

    @property
    def attention_factor(self) -> float:
        return 1.0

    def stretched(self, frequency, rope: "Rope"):
        return frequency / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretching of the low frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    @property
    def attention_factor(self) -> float:
        return 1.0

    def stretched(self, frequency, rope: "Rope"):
        """Divide slow frequencies by the factor, keep fast ones, and blend those between."""
        # How often each frequency turns over the length that the model was first trained on.
        turns = self.original_max_positions * frequency / (2 * jnp.pi)
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = jnp.clip(blend, 0, 1)
        return frequency * (blend + (1 - blend) / self.factor)


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023): stretched low frequencies, and sharper attention."""

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0  # as many turns over the original length: kept
    beta_slow: float = 1.0  # as many: divided by the factor
    truncate: bool = True  # whether the ramp between the two begins and ends at a whole pair

    def stretched(self, frequency, rope: "Rope"):
        """Keep fast frequencies, divide slow ones by the factor, along a ramp over the pairs."""
        first, last = self._pair(self.beta_fast, rope), self._pair(self.beta_slow, rope)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rope.width - 1)
        if first == last:
            last += 0.001  # a step rather than a division by 0
        ramp = jnp.clip((jnp.arange(len(frequency)) - first) / (last - first), 0, 1)
        return frequency * (1 - ramp + ramp / self.factor)

    def _pair(self, turns: float, rope: "Rope") -> float:
        """Return the number of the pair, and a part of one, that turns so often.

        It is i in theta^(-2i / width) = 2 pi turns / original_max_positions.
        """
        wavelength = self.original_max_positions / (2 * math.pi * turns)
        return rope.width * math.log(wavelength) / (2 * math.log(rope.theta))


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """Return the attention factor that YaRN has for a factor: 1 + 0.1 mscale log(factor)."""
    return 1 + 0.1 * mscale * math.log(max(factor, 1))


@dataclasses.dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024): a factor of its own for each frequency, and sharper attention.

    Models have two sets of factors, for short sequences and for long ones; this is the one taken.
    """

    factors: tuple[float, ...]
    attention_factor: float

    def stretched(self, frequency, rope: "Rope"):
        return frequency / jnp.array(self.factors, jnp.float32)


def longrope_attention_factor(factor: float, original_max_positions: int) -> float:
    """Return LongRoPE's attention factor: sqrt(1 + log(factor) / log(original_max_positions))."""
    return math.sqrt(1 + math.log(max(factor, 1)) / math.log(original_max_positions))


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclasses.dataclass(frozen=True)
class Rope:
    """A rotary embedding: pairs of a head's channels are turned by angles that grow with position.

    Only the first `width` channels of each head are.
    """

    width: int
    theta: float = 10_000.0
    interleaved: bool = False  # pairs are neighbours (GPT-J), not halves
    scaling: Scaling | None = None


def rotary_angles(rope: Rope, positions_SN) -> tuple[jax.Array, jax.Array]:
    """Return cosines and sines of the rotary embedding, [S, N, 1, rope.width / 2] each, float32.

    Both are scaled by the attention factor, whose square so scales the scores.
    """
    # Float32 whatever the compute dtype: bfloat16 cannot tell large positions apart.
    exponent = jnp.arange(0, rope.width, 2, dtype=jnp.float32) / rope.width
    frequency = rope.theta**-exponent
    factor = 1.0
    if rope.scaling is not None:
        frequency = rope.scaling.stretched(frequency, rope)
        factor = rope.scaling.attention_factor
    angle = positions_SN[..., None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def rotate(rope: Rope, x_SNHC, rotation) -> jax.Array:
    """Rotate the first `rope.width` channels of each head by the token's angles."""
    cos, sin = rotation
    # GPT-NeoX and GPT-J rotate the first channels alone; the others carry no position.
    turned, kept = jnp.split(x_SNHC, [rope.width], axis=-1)
    # Which channels make a pair is a convention of the weights, so it must be the checkpoint's.
    if rope.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = jnp.split(turned, 2, axis=-1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    if rope.interleaved:
        turned = jnp.stack(pair, axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate(pair, axis=-1)
    # The float32 angles have widened the pairs.
    return jnp.concatenate([turned.astype(x_SNHC.dtype), kept], axis=-1)
