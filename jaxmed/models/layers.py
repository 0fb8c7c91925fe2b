"""Pure functions of a decoder block. Residual stream and softmax are float32 whatever the weights are."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
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


LANES = 128


def _lanes(logits: jax.Array) -> jax.Array:
    """[..., V] as [..., V / LANES, LANES] on the CPU, whose XLA backend reduces a row number by number, but rows under each other many
    numbers at a time; else, and where the vocabulary does not divide, [..., V, 1]."""
    lanes = 1 if jax.default_backend() != "cpu" or logits.shape[-1] % LANES else LANES
    return logits.reshape(*logits.shape[:-1], -1, lanes)


def largest(logits: jax.Array) -> jax.Array:
    """The largest over the last axis."""
    return _lanes(logits).max(-2).max(-1)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, 0)


@jax.custom_jvp
def log_total(logits: jax.Array) -> jax.Array:
    """log of the sum of the exponentials over the last axis."""
    lanes = _lanes(logits)
    most = lanes.max(-2)
    top = _finite(most.max(-1))
    totals = jnp.exp(lanes - _finite(most)[..., None, :]).sum(-2)
    return top + jnp.log((totals * jnp.exp(most - top[..., None])).sum(-1))


@log_total.defjvp
def _log_total_change(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    found = log_total(primals[0])
    return found, (jnp.exp(primals[0] - found[..., None]) * tangents[0]).sum(-1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: jax.Array, weight: jax.Array, turned: jax.Array | None, inputs: int) -> jax.Array:
    """x [B,T,...in] times weight [...in, ...out], flat: [U,V].

    The gradient of x multiplies by the transposed weight: by `turned` [V,D] where it is at hand, which is a little faster on the CPU. What
    is kept for it is the weight as it came, so that a scan over layers stacks no copies.
    """
    return contract("UD,DV->UV", *_flat(x, weight, inputs))


def _flat(x: jax.Array, weight: jax.Array, inputs: int) -> tuple[jax.Array, jax.Array]:
    fan_in = math.prod(weight.shape[:inputs])
    return x.reshape(-1, fan_in), weight.reshape(fan_in, -1)


def _product_forward(x: Any, weight: Any, turned: Any, inputs: int) -> tuple[jax.Array, tuple[Any, ...]]:
    saved = (x.value if weight.perturbed else None), weight.value, None if turned is None else turned.value, x.value[:0]
    return _product(x.value, weight.value, None, inputs), saved


def _product_backward(inputs: int, saved: Any, out: Any) -> tuple[Any, Any, Any]:
    x, kept, turned, like = saved
    _, weight = _flat(like, kept, inputs)
    out = out.astype(like.dtype)
    turned = weight.T if turned is None else turned.astype(like.dtype)
    of_x = contract("UV,VD->UD", out, turned, dtype=like.dtype).reshape(-1, *like.shape[1:])
    if x is None:  # none is asked for of frozen weights
        return of_x, None, None
    x = _flat(x, kept, inputs)[0]
    if weight.shape[1] < weight.shape[0]:  # the narrow side first: Eigen is up to five times faster so
        of_weight = contract("UV,UD->VD", out, x, dtype=weight.dtype).T
    else:
        of_weight = contract("UD,UV->DV", x, out, dtype=weight.dtype)
    of_weight = of_weight.reshape(kept.shape)
    return of_x, of_weight, None


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def project(x: jax.Array, weight: jax.Array, inputs: int = 1, dtype: jnp.dtype | None = None, turned: jax.Array | None = None) -> jax.Array:
    """x [B,T,...in] times weight [...in, ...out], over the last `inputs` axes of x -> [B,T,...out], accumulated in float32.

    Written as one product of two matrices: given more axes, XLA on the CPU transposes the weights anew in every loop step.

    Args:
        turned: the weight as [...out, ...in], flat [V,D], where it is at hand; the gradient of x is then taken with it.
    """
    flat: Any = _product(x, weight, turned, inputs)
    out = flat.reshape(*x.shape[:-inputs], *weight.shape[inputs:])
    return out if dtype is None else out.astype(dtype)


Totals = dict[str, Any]
"""What is summed over examples, by kind, all float32: "signed" and "absolute" [...in, ...out], "inputs" [...in]."""


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _scored_product(x: jax.Array, weight: jax.Array, totals: Totals, counted: jax.Array | None, inputs: int) -> jax.Array:
    return contract("UD,DV->UV", *_flat(x, weight, inputs))


def _scored_forward(x: Any, weight: Any, totals: Totals, counted: Any, inputs: int) -> tuple[jax.Array, tuple[Any, ...]]:
    return contract("UD,DV->UV", *_flat(x, weight, inputs)), (x, weight, totals, counted)


def _scored_backward(inputs: int, saved: Any, out: Any) -> tuple[Any, Any, Totals, Any]:
    x, kept, totals, counted = saved
    flat, weight = _flat(x, kept, inputs)
    out = out.astype(x.dtype)
    of_x = contract("UV,DV->UD", out, weight, dtype=x.dtype).reshape(x.shape)
    new, examples = {}, x.shape[0]
    if "signed" in totals:
        new["signed"] = totals["signed"] + contract("UD,UV->DV", flat, out).reshape(kept.shape)
    if "absolute" in totals:

        def add(total: jax.Array, one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            return total + jnp.abs(contract("UD,UV->DV", *one)), None

        rows = flat.reshape(examples, -1, flat.shape[-1]), out.reshape(examples, -1, out.shape[-1])
        new["absolute"] = jax.lax.scan(add, totals["absolute"].reshape(weight.shape), rows)[0].reshape(kept.shape)
    if "inputs" in totals:
        squares = jnp.square(flat.astype(jnp.float32)) * counted.reshape(-1, 1)
        new["inputs"] = totals["inputs"] + squares.sum(0).reshape(totals["inputs"].shape)
    return of_x, None, new, None


_scored_product.defvjp(_scored_forward, _scored_backward)


def scored_project(x: jax.Array, weight: jax.Array, totals: Totals, counted: jax.Array | None, inputs: int = 1) -> jax.Array:
    """`project`, whose "gradient" with respect to `totals` is `totals` plus what the rows of x, one example each, add to them.

    "signed" adds the sum over examples of their gradients of the weight; "absolute" the sum of their absolute values, one example at a
    time, so that no array has both an example axis and a weight's size; "inputs" the squares of x at tokens that are `counted` (float
    [B,T]). So totals are updated matrix by matrix inside the reverse scan over layers.
    """
    flat: Any = _scored_product(x, weight, totals, counted, inputs)
    return flat.reshape(*x.shape[:-inputs], *weight.shape[inputs:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def recomputed(function: Callable[..., jax.Array], *operands: Any) -> jax.Array:
    """function(*operands); its gradient computes it anew from the operands instead of keeping what it computed on the way.

    For cheap functions between matmuls, whose intermediates cost more to write and read than to compute. `function` closes over no array.
    """
    return function(*operands)


def _recomputed_forward(function: Callable[..., jax.Array], *operands: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return function(*operands), operands


def _recomputed_backward(function: Callable[..., jax.Array], operands: tuple[Any, ...], out: Any) -> tuple[Any, ...]:
    return jax.vjp(function, *operands)[1](out)


recomputed.defvjp(_recomputed_forward, _recomputed_backward)


def normalise(
    config: ModelConfig, x: jax.Array, scale: jax.Array, bias: jax.Array | None = None, dtype: Any = jnp.float32, axes: int = 1
) -> jax.Array:
    """The family's norm over the last `axes` axes of x, computed in float32, returned in `dtype`.

    Root-mean-square norm, or layer norm (mean subtracted, bias added).
    """
    given = (x, scale) if bias is None else (x, scale, bias)
    return recomputed(partial(_normalise, config, jnp.dtype(dtype), axes), *given)


def _normalise(config: ModelConfig, dtype: Any, axes: int, x: jax.Array, scale: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    x, over = x.astype(jnp.float32), tuple(range(-axes, 0))
    if config.norm == "layer":
        x = x - jnp.mean(x, axis=over, keepdims=True)
    normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=over, keepdims=True) + config.norm_eps)
    normed = normed * (scale.astype(jnp.float32) + config.norm_offset)
    return (normed if bias is None else normed + bias.astype(jnp.float32)).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(config: ModelConfig, branches: jax.Array) -> jax.Array:
    """Input projection of the MLP [B,T,C,M] -> its neurons [B,T,M]: the activation, times the up branch where there is one."""
    gate = ACTIVATIONS[config.activation](branches[..., 0, :])
    return gate * branches[..., 1, :] if config.gated else gate


def _activate_forward(config: ModelConfig, branches: jax.Array) -> tuple[jax.Array, jax.Array]:
    return activate(config, branches), branches


def _activate_backward(config: ModelConfig, branches: jax.Array, out: jax.Array) -> tuple[jax.Array]:
    """Both branches' gradients as one elementwise expression: put together from slices, XLA on the CPU computes it a number at a time."""
    gate, out = branches[..., :1, :], out[..., None, :]
    active, of_active = jax.vjp(ACTIVATIONS[config.activation], gate)
    if not config.gated:
        return (of_active(out)[0],)
    of_gate = of_active(out * branches[..., 1:, :])[0]
    return (jnp.where(jnp.arange(2)[:, None] == 0, of_gate, out * active),)


activate.defvjp(_activate_forward, _activate_backward)


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
