"""Rotary position embedding: frequencies by scaling rule, and the rotation.

Rules and constants as in the papers and in `transformers`: linear (Chen et al. 2023), Llama 3.1's ramp, YaRN (Peng et al. 2023),
LongRoPE (Ding et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.axes import lead
from jaxmed.models.config import ModelConfig, Rope

Angles = tuple[jax.Array, jax.Array]
"""Cosines and sines [..., T, 1, rotated / 2]."""


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Low frequencies divided, high ones kept, a linear ramp between."""
    wavelength = 2 * math.pi / plain
    low, high = rope.original_length / rope.low_factor, rope.original_length / rope.high_factor
    ramp = (rope.original_length / wavelength - rope.low_factor) / (rope.high_factor - rope.low_factor)
    between = (1 - ramp) * plain / rope.factor + ramp * plain
    return np.where(wavelength < high, plain, np.where(wavelength > low, plain / rope.factor, between))


def _yarn(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """As Llama 3.1's, with a ramp over the index of the frequency."""
    width = 2 * len(plain)

    def index(rotations: float) -> float:
        return width * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / (high - low or 0.001), 0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


SCALINGS: dict[str, Callable[[Rope, np.ndarray], np.ndarray]] = {
    "none": lambda rope, plain: plain,
    "linear": lambda rope, plain: plain / rope.factor,
    "llama3": _llama3,
    "yarn": _yarn,
    "factors": lambda rope, plain: plain / np.asarray(rope.factors),
}
"""Each rule takes the unscaled frequencies (radians per token). "factors" is also LongRoPE, which has a second set for short texts."""


def frequencies(rope: Rope, head_width: int) -> np.ndarray:
    """Angular frequencies float32 [rotated / 2] in radians per token."""
    rotated = int(head_width * rope.rotary_fraction)
    plain = 1.0 / rope.base ** (np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    return SCALINGS[rope.scaling](rope, plain).astype(np.float32)


def rope_angles(rope: Rope, head_width: int, position: jax.Array) -> Angles:
    """Cosines and sines for integer positions [..., T].

    LongRoPE takes its short factors where a row's text is no longer than the original length, and else the long ones for every
    position of it; rows beside it do not count.
    """
    spread = jnp.asarray(frequencies(rope, head_width))
    if rope.short_factors:
        rotated = 2 * len(rope.short_factors)
        plain = 1.0 / rope.base ** (np.arange(0, rotated, 2, dtype=np.float64) / rotated)
        short = (plain / np.asarray(rope.short_factors)).astype(np.float32)
        length = position.max(axis=-1, keepdims=True) + 1
        spread = jnp.where(length[..., None, None] > rope.original_length, lead(spread, length.ndim + 2), lead(short, length.ndim + 2))
    angles = position[..., None, None].astype(jnp.float32) * lead(spread, position.ndim + 2)
    return jnp.cos(angles) * rope.amplitude, jnp.sin(angles) * rope.amplitude


def model_angles(config: ModelConfig, position: jax.Array) -> Callable[[jax.Array], Angles | None]:
    """The angles of every layer for positions [..., T], as a function of the layer's sliding window."""
    if config.rope is None:
        return lambda window: None
    everywhere = rope_angles(config.rope, config.head_width, position)
    if config.local_rope is None:
        return lambda window: everywhere
    local = rope_angles(config.local_rope, config.head_width, position)
    return lambda window: jax.tree.map(lambda near, far: jnp.where(window < UNLIMITED, near, far), local, everywhere)


UNLIMITED = 2**30
"""The sliding window of a layer that sees every token."""


def layer_windows(config: ModelConfig) -> jax.Array:
    """Sliding window of every layer, int [L]."""
    return jnp.asarray(config.windows or (UNLIMITED,) * config.layers, jnp.int32)


def rotate(x: jax.Array, angles: Angles | None) -> jax.Array:
    """Applies RoPE to x [..., T, heads, H], halves paired as in Hugging Face checkpoints; dimensions past the rotated ones are kept."""
    if angles is None:
        return x
    cos, sin = angles
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)
