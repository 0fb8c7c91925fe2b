"""Pure functions of a decoder block. Residual stream and softmax are float32 whatever the weights are."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxmed.axes import Placement, lead
from jaxmed.models.config import ModelConfig
from jaxmed.models.rules import EXACT, Rules

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


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _product(x: jax.Array, weight: jax.Array, transposed: jax.Array | None, inputs: int) -> jax.Array:
    """x [B,T,...in] times weight [...in, ...out] -> [U, ...out]."""
    del transposed
    return _times(x, weight, inputs)


def _times(x: jax.Array, weight: jax.Array, inputs: int) -> jax.Array:
    """The product with the weight's output axes left apart: joined, an axis that is split over devices behind one that is not (the neurons
    behind gate and up) would have every device gather the whole weight, in every layer. `contract`'s precision."""
    flat = x.reshape(-1, math.prod(weight.shape[:inputs]))
    matrix = weight.reshape(flat.shape[1], *weight.shape[inputs:])
    precision = jax.lax.Precision.HIGHEST if flat.dtype == jnp.float32 else None
    return jnp.tensordot(flat, matrix, 1, precision=precision, preferred_element_type=jnp.float32)


def _flat(x: jax.Array, weight: jax.Array, inputs: int) -> tuple[jax.Array, jax.Array]:
    fan_in = math.prod(weight.shape[:inputs])
    return x.reshape(-1, fan_in), weight.reshape(fan_in, -1)


@partial(_product.defjvp, symbolic_zeros=True)
def _product_change(inputs: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The product's derivative, written so that its transpose, the gradient, is the matmul that the CPU is fastest at.

    The gradient of x multiplies by `transposed` where that copy is at hand; a weight's gradient puts the narrow side first, which Eigen
    is up to five times faster at.
    """
    (x, weight, transposed), (of_x, of_weight, _) = primals, tangents
    flat, matrix = _flat(x, weight, inputs)
    out = _times(x, weight, inputs)
    change = jnp.zeros((len(flat), matrix.shape[1]), out.dtype)
    if not isinstance(of_x, SymbolicZero):
        moved = of_x.reshape(flat.shape)
        letters, other = ("UI,IO->UO", matrix) if transposed is None else ("UI,OI->UO", transposed.astype(flat.dtype))
        change = change + contract(letters, moved, other)
    if not isinstance(of_weight, SymbolicZero):
        moved = of_weight.reshape(matrix.shape)
        narrow = matrix.shape[1] < matrix.shape[0]
        change = change + (contract("OI,UI->OU", moved.T, flat).T if narrow else contract("UI,IO->UO", flat, moved))
    return out, change.reshape(out.shape)


UNSPLIT = Placement()


def project(
    x: jax.Array,
    weight: jax.Array,
    inputs: int = 1,
    dtype: jnp.dtype | None = None,
    transposed: jax.Array | None = None,
    placed: Placement = UNSPLIT,
) -> jax.Array:
    """x [B,T,...in] times weight [...in, ...out], over the last `inputs` axes of x -> [B,T,...out], accumulated in float32.

    Tokens and inputs are one axis each: given more, XLA on the CPU transposes the weights anew in every loop step. What is kept
    for gradients is the weight as it came (`recomputed`), so that a scan over layers stacks no copies of it, gathered or of another dtype.

    Args:
        transposed: the weight as [...out, ...in], flat [O,I], where it is at hand; the gradient of x is then taken with it.
        placed: how the weight is split over devices; it is gathered here.
    """

    def product(x: jax.Array, weight: jax.Array, transposed: jax.Array | None) -> jax.Array:
        return _product(x, placed.gather(weight).astype(x.dtype), transposed, inputs)

    flat: Any = recomputed(product)(x, weight, transposed)
    out = flat.reshape(*x.shape[:-inputs], *weight.shape[inputs:])
    return out if dtype is None else out.astype(dtype)


Totals = dict[str, Any]
"""What is summed over examples, by kind, all float32: "signed" and "absolute" [...in, ...out], "inputs" [...in]."""


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _scored_product(
    x: jax.Array, weight: jax.Array, totals: Totals, counted: jax.Array | None, inputs: int, placed: Placement
) -> jax.Array:
    return contract("UI,IO->UO", *_flat(x, placed.gather(weight), inputs))


def _scored_forward(x: Any, weight: Any, totals: Totals, counted: Any, inputs: int, placed: Placement) -> tuple[jax.Array, tuple[Any, ...]]:
    return _scored_product(x, weight, totals, counted, inputs, placed), (x, weight, totals, counted)


def _scored_backward(inputs: int, placed: Placement, saved: Any, out: Any) -> tuple[Any, Any, Totals, Any]:
    x, kept, totals, counted = saved
    flat, weight = _flat(x, placed.gather(kept), inputs)
    out = out.astype(x.dtype)
    of_x = contract("UO,IO->UI", out, weight, dtype=x.dtype).reshape(x.shape)
    new, examples = {}, x.shape[0]
    if "signed" in totals:
        new["signed"] = totals["signed"] + placed.split(contract("UI,UO->IO", flat, out).reshape(kept.shape))
    if "absolute" in totals:
        rows = flat.reshape(examples, -1, flat.shape[-1]), out.reshape(examples, -1, out.shape[-1])
        new["absolute"] = _add_absolute(totals["absolute"], rows, weight.shape, placed)
    if "inputs" in totals:
        squares = jnp.square(flat.astype(jnp.float32)) * counted.reshape(-1, 1)
        new["inputs"] = totals["inputs"] + squares.sum(0).reshape(totals["inputs"].shape)
    return of_x, None, new, None


def _add_absolute(total: jax.Array, rows: tuple[jax.Array, jax.Array], shape: tuple[int, ...], placed: Placement) -> jax.Array:
    """The total plus the absolute value of every example's gradient [I,O]; `rows`: x and the output's gradient, [B,T,I] and [B,T,O].

    Devices that share the weight add up their own examples, and then these sums.
    """

    def add(total: jax.Array, one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + jnp.abs(contract("UI,UO->IO", *one)), None

    def add_each(total: jax.Array, each: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + jnp.abs(contract("BUI,BUO->BIO", *each)), None

    if placed.parts == 1:
        return jax.lax.scan(add, total.reshape(shape), rows)[0].reshape(total.shape)
    apart = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(placed.parts, -1, *x.shape[1:]), 0, 1), rows)
    zero = placed.apart(jnp.zeros((placed.parts, *shape), jnp.float32))
    return total + placed.split(jax.lax.scan(add_each, zero, apart)[0].sum(0).reshape(total.shape))


_scored_product.defvjp(_scored_forward, _scored_backward)


def scored_project(
    x: jax.Array, weight: jax.Array, totals: Totals, counted: jax.Array | None, inputs: int = 1, placed: Placement = UNSPLIT
) -> jax.Array:
    """`project`, whose "gradient" with respect to `totals` is `totals` plus what the rows of x, one example each, add to them.

    "signed" adds the sum over examples of their gradients of the weight; "absolute" the sum of their absolute values, one example at a
    time, so that no array has both an example axis and a weight's size; "inputs" the squares of x at tokens that are `counted` (float
    [B,T]). So totals are updated matrix by matrix inside the reverse scan over layers.
    """
    flat: Any = _scored_product(x, weight, totals, counted, inputs, placed)
    return flat.reshape(*x.shape[:-inputs], *weight.shape[inputs:])


def recomputed(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The function; its gradient computes it anew from its operands instead of keeping what it computed on the way.

    For cheap functions between matmuls, whose intermediates cost more to write and read than to compute.
    """
    return jax.checkpoint(function, prevent_cse=False)


def normalise(
    config: ModelConfig,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None = None,
    dtype: Any = jnp.float32,
    axes: int = 1,
    rules: Rules = EXACT,
) -> jax.Array:
    """The family's norm over the last `axes` axes of x, computed in float32, returned in `dtype`.

    Root-mean-square norm, or layer norm (mean subtracted, bias added).
    """

    def norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
        x, over = x.astype(jnp.float32), tuple(range(-axes, 0))
        if config.norm == "layer":
            x = x - jnp.mean(x, axis=over, keepdims=True)
        normed = x * rules.norm(jax.lax.rsqrt(jnp.mean(x * x, axis=over, keepdims=True) + config.norm_eps))
        normed = normed * lead(scale.astype(jnp.float32) + config.norm_offset, x.ndim)
        return (normed if bias is None else normed + lead(bias.astype(jnp.float32), x.ndim)).astype(dtype)

    return recomputed(norm)(x, scale, bias)


def activate(config: ModelConfig, branches: jax.Array, rules: Rules = EXACT) -> jax.Array:
    """Input projection of the MLP [B,T,C,M] -> its neurons [B,T,M]: the activation, times the up branch where there is one."""
    if rules is EXACT:
        return recomputed(partial(_activate, config))(branches)
    gate = branches[..., 0, :]
    active = rules.active(gate, ACTIVATIONS[config.activation](gate))
    return rules.product(active, branches[..., 1, :]) if config.gated else active


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _activate(config: ModelConfig, branches: jax.Array) -> jax.Array:
    active = ACTIVATIONS[config.activation](branches[..., 0, :])
    return active * branches[..., 1, :] if config.gated else active


@_activate.defjvp
def _activate_change(config: ModelConfig, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """One elementwise slope for both branches, summed over them. Put together from slices, the gradient (this rule's transpose) is computed
    a number at a time by XLA on the CPU."""
    (branches,), (moved,) = primals, tangents
    gate = branches[..., :1, :]
    active, slope = jax.jvp(ACTIVATIONS[config.activation], (gate,), (jnp.ones_like(gate),))
    if not config.gated:
        return active[..., 0, :], (slope * moved)[..., 0, :]
    both = jnp.where(lead(jnp.arange(2)[:, None] == 0, moved.ndim), slope * branches[..., 1:, :], active)
    return active[..., 0, :] * branches[..., 1, :], (both * moved).sum(-2)


def cap(x: jax.Array, limit: float) -> jax.Array:
    """Soft cap: `limit * tanh(x / limit)`; nothing at limit 0."""
    return limit * jnp.tanh(x / limit) if limit else x


def attention_scores(config: ModelConfig, products: jax.Array) -> jax.Array:
    """Scaled and capped attention scores from the products of queries and keys."""
    scale = config.head_width**-0.5 if config.score_scale is None else config.score_scale
    return cap(products * scale, config.score_cap)


def route(config: ModelConfig, products: jax.Array) -> jax.Array:
    """Router products [B,T,X] -> weight of every expert, float32 [B,T,X]; zero for experts that a token does not use.

    An expert is used where few enough have a larger chance, or the same and a lower number: `top_k` would have all devices gather all
    rows, in every layer.
    """
    chances, number = jax.nn.softmax(products.astype(jnp.float32), axis=-1), jnp.arange(config.experts)
    own, other = chances[..., :, None], chances[..., None, :]
    before = (other > own) | ((other == own) & lead(number[None] < number[:, None], other.ndim))
    weight = jnp.where(before.sum(-1) < config.experts_used, chances, 0.0)
    return weight / weight.sum(-1, keepdims=True) if config.experts_normed else weight


def sees(query_position: jax.Array, key_position: jax.Array, window: jax.Array) -> jax.Array:
    """Whether the key lies inside the query's sliding window: bool [..., T, S]."""
    return query_position[..., :, None] - key_position[..., None, :] < window
