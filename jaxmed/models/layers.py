"""Pure functions of a decoder block. Residual stream and softmax are float32 whatever the weights are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.models.config import ModelConfig

MASKED = -1e30
"""Score of a token that may not be seen: finite, so that a row without any visible token stays finite."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
"""The MLP's nonlinearity, by name."""


def contract(letters: str, *operands: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """`einsum` with float32 accumulation, and full float32 products where the operands are float32.

    The defaults would be TF32 on GPUs and bfloat16 on TPUs.
    """
    precision = jax.lax.Precision.HIGHEST if operands[0].dtype == jnp.float32 else None
    out = jnp.einsum(letters, *operands, precision=precision, preferred_element_type=jnp.float32)
    return out if dtype is None else out.astype(dtype)


@jax.custom_vjp
def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [U,D] times weight [D,V]; the gradient of x multiplies by the transposed weight, written out on the CPU.

    Eigen takes twice the time for a product over the second axis of a matrix.
    """
    return contract("UD,DV->UV", x, weight)


def _product_forward(x: Any, weight: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    saved = (x.value if weight.perturbed else None), weight.value, x.value[:0]
    return _product(x.value, weight.value), saved


def _product_backward(saved: tuple[Any, ...], out: Any) -> tuple[Any, Any]:
    x, weight, like = saved
    out = out.astype(like.dtype)
    turned = jax.lax.optimization_barrier(weight.T) if jax.default_backend() == "cpu" else weight.T
    of_weight = None if x is None else contract("UD,UV->DV", x, out, dtype=weight.dtype)  # none is asked for of frozen weights
    return contract("UV,VD->UD", out, turned, dtype=like.dtype), of_weight


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def project(x: jax.Array, weight: jax.Array, inputs: int = 1, dtype: jnp.dtype | None = None) -> jax.Array:
    """x [B,T,...in] times weight [...in, ...out], over the last `inputs` axes of x -> [B,T,...out], accumulated in float32.

    Written as one product of two matrices: given more axes, XLA on the CPU transposes the weights anew in every loop step.
    """
    fan_in = math.prod(weight.shape[:inputs])
    out = _product(x.reshape(-1, fan_in), weight.reshape(fan_in, -1))
    out = out.reshape(*x.shape[:-inputs], *weight.shape[inputs:])
    return out if dtype is None else out.astype(dtype)


def normalise(
    config: ModelConfig, x: jax.Array, scale: jax.Array, bias: jax.Array | None = None, dtype: Any = jnp.float32, axes: int = 1
) -> jax.Array:
    """The family's norm over the last `axes` axes of x, computed in float32, returned in `dtype`.

    Root-mean-square norm, or layer norm (mean subtracted, bias added).
    """
    x, over = x.astype(jnp.float32), tuple(range(-axes, 0))
    if config.norm == "layer":
        x = x - jnp.mean(x, axis=over, keepdims=True)
    normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=over, keepdims=True) + config.norm_eps)
    normed = normed * (scale.astype(jnp.float32) + config.norm_offset)
    return (normed if bias is None else normed + bias.astype(jnp.float32)).astype(dtype)


def cap(x: jax.Array, limit: float) -> jax.Array:
    """Soft cap: `limit * tanh(x / limit)`; nothing at limit 0."""
    return limit * jnp.tanh(x / limit) if limit else x


def attention_scores(config: ModelConfig, products: jax.Array) -> jax.Array:
    """Scaled and capped attention scores from the products of queries and keys."""
    scale = config.head_width**-0.5 if config.score_scale is None else config.score_scale
    return cap(products * scale, config.score_cap)


def route(config: ModelConfig, products: jax.Array) -> jax.Array:
    """Router products [B,T,X] -> weight of every expert, float32 [B,T,X]; zero for experts that a token does not use."""
    share = jax.nn.softmax(products.astype(jnp.float32), axis=-1)
    most, chosen = jax.lax.top_k(share, config.experts_used)
    if config.experts_normed:
        most = most / most.sum(-1, keepdims=True)
    return (jax.nn.one_hot(chosen, config.experts) * most[..., None]).sum(-2)


def sees(query_position: jax.Array, key_position: jax.Array, window: jax.Array) -> jax.Array:
    """Whether the key lies inside the query's sliding window: bool [..., T, S]."""
    return query_position[..., :, None] - key_position[..., None, :] < window
