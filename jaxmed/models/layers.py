"""Pure functions of a decoder block. Residual stream and softmax are float32 whatever the weights are."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.models.config import Rope

MASKED = -1e30
"""Score of a token that may not be seen: finite, so that a row without any visible token stays finite."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def contract(letters: str, *operands: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """`einsum` with float32 accumulation, and full float32 products where the operands are float32.

    The defaults would be TF32 on GPUs and bfloat16 on TPUs.
    """
    precision = jax.lax.Precision.HIGHEST if operands[0].dtype == jnp.float32 else None
    out = jnp.einsum(letters, *operands, precision=precision, preferred_element_type=jnp.float32)
    return out if dtype is None else out.astype(dtype)


def project(x: jax.Array, weight: jax.Array, inputs: int = 1, dtype: jnp.dtype | None = None) -> jax.Array:
    """x [B,T,...in] times weight [...out, ...in], over the last `inputs` axes of both -> [B,T,...out], accumulated in float32.

    Written as one product of two matrices: given more axes, XLA on the CPU transposes the weights anew in every loop step.
    """
    fan_in = math.prod(weight.shape[-inputs:])
    out = contract("UD,VD->UV", x.reshape(-1, fan_in), weight.reshape(-1, fan_in))
    out = out.reshape(*x.shape[:-inputs], *weight.shape[:-inputs])
    return out if dtype is None else out.astype(dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, dtype: jnp.dtype) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32, returned in `dtype`."""
    x = x.astype(jnp.float32)
    normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(dtype)


def rope_frequencies(rope: Rope, head_width: int) -> np.ndarray:
    """Angular frequencies [H / 2] (radians per token), with the scaling of `rope`."""
    frequencies = 1.0 / rope.base ** (np.arange(0, head_width, 2, dtype=np.float64) / head_width)
    if rope.scaling == "linear":
        frequencies = frequencies / rope.factor
    elif rope.scaling == "factors":
        frequencies = frequencies / np.asarray(rope.factors)
    elif rope.scaling == "llama3":
        wavelength = 2 * math.pi / frequencies
        low, high = rope.original_length / rope.low_factor, rope.original_length / rope.high_factor
        ramp = (rope.original_length / wavelength - rope.low_factor) / (rope.high_factor - rope.low_factor)
        between = (1 - ramp) * frequencies / rope.factor + ramp * frequencies
        scaled = np.where(wavelength > low, frequencies / rope.factor, between)
        frequencies = np.where(wavelength < high, frequencies, scaled)
    return frequencies.astype(np.float32)


def rope_angles(rope: Rope, head_width: int, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., T, 1, H / 2] for integer positions [..., T]."""
    angles = position[..., None, None].astype(jnp.float32) * rope_frequencies(rope, head_width)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Applies RoPE to x [..., T, heads, H], halves paired as in Hugging Face checkpoints."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def sees(query_position: jax.Array, key_position: jax.Array, window: jax.Array) -> jax.Array:
    """Whether the key lies inside the query's sliding window: bool [..., T, S]."""
    return query_position[..., :, None] - key_position[..., None, :] < window
