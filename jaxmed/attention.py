"""Attention: one softmax over the union of segments of keys.

Every run of a decoder is described by which keys its queries see. A full forward has one segment, its own tokens. A restarted run
has two: the earlier tokens of the base run, shared by all rows, and its own. A token that is being written has the cache and
itself. Branches of a packed row have the row's trunk and themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import MASKED, attention_scores, contract
from jaxmed.models.rules import EXACT, Rules


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segment:
    """Keys and values that some queries may see.

    Attributes:
        key, value: [b, S, K, H], rotated. b divides the rows B of the queries: each of its rows serves B / b rows in a row; with
            b = 1 all rows share the segment.
        seen: bool [1 or B, T, S], whether a query token may see a key token.
    """

    key: Any
    value: Any
    seen: Any


PatternSite = Callable[[jax.Array], jax.Array]
"""Called with the pattern [B,N,T,S]; returns the pattern to go on with."""


def attend(
    config: ModelConfig, query: jax.Array, segments: Sequence[Segment], at_pattern: PatternSite | None = None, rules: Rules = EXACT
) -> jax.Array:
    """Head outputs [B,T,K,G,H] of rotated queries [B,T,K,G,H]: one softmax over the keys of all segments.

    Args:
        at_pattern: reads or edits the pattern; there must be one segment then.
    """
    if len(segments) == 1:
        if at_pattern is None and _is_fusable(config, query):
            return _fused(config, query, segments[0])
        pattern = rules.pattern(jax.nn.softmax(_scores(config, query, segments[0]), axis=-1))
        if at_pattern is not None:
            pattern = _as_scores(at_pattern(_as_pattern(pattern)), pattern.shape)
        mixed = _mix(pattern, segments[0], query.shape[:2])
        return jnp.moveaxis(mixed, 0, 2).astype(query.dtype)
    scores = [_scores(config, query, segment) for segment in segments]
    top = jax.lax.stop_gradient(jnp.stack([one.max(-1) for one in scores]).max(0))[..., None]
    weights = [jnp.exp(one - top) for one in scores]
    total = sum(one.sum(-1, keepdims=True) for one in weights)
    if rules is not EXACT:
        weights = [rules.pattern(one / total) for one in weights]
        total = jnp.ones_like(total)
    mixed = sum(_mix(one, segment, query.shape[:2]) for one, segment in zip(weights, segments, strict=True))
    return jnp.moveaxis(mixed / total, 0, 2).astype(query.dtype)


def _scores(config: ModelConfig, query: jax.Array, segment: Segment) -> jax.Array:
    """Masked scores float32 [K,B,T,G,S]. The key/value heads lead: with shared keys this is one wide matmul per head."""
    shared = segment.key.shape[0]
    if shared == 1 < len(query):
        products = contract("BTKGH,SKH->KBTGS", query, segment.key[0])
    else:
        grouped = query.reshape(shared, -1, *query.shape[2:])
        products = contract("BTKGH,BSKH->KBTGS", grouped, segment.key)
        products = products.reshape(products.shape[0], *query.shape[:2], *products.shape[3:])
    return jnp.where(segment.seen[None, :, :, None], attention_scores(config, products), MASKED)


def _mix(weights: jax.Array, segment: Segment, size: tuple[int, ...]) -> jax.Array:
    """Weights [K,B,T,G,S] times the segment's values -> float32 [K,B,T,G,H]."""
    shared, weights = segment.value.shape[0], weights.astype(segment.value.dtype)
    if shared == 1 < size[0]:
        return contract("KBTGS,SKH->KBTGH", weights, segment.value[0])
    grouped = weights.reshape(weights.shape[0], shared, -1, *weights.shape[3:])
    mixed = contract("KBTGS,BSKH->KBTGH", grouped, segment.value)
    return mixed.reshape(mixed.shape[0], *size, *mixed.shape[3:])


def _as_pattern(scores: jax.Array) -> jax.Array:
    """[K,B,T,G,S] -> [B,N,T,S]."""
    kv_heads, rows, length, group, keys = scores.shape
    return jnp.transpose(scores, (1, 0, 3, 2, 4)).reshape(rows, kv_heads * group, length, keys)


def _as_scores(pattern: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B,N,T,S] -> [K,B,T,G,S]."""
    kv_heads, rows, length, group, keys = shape
    return jnp.transpose(pattern.reshape(rows, kv_heads, group, length, keys), (1, 0, 3, 2, 4))


def _is_fusable(config: ModelConfig, query: jax.Array) -> bool:
    """Whether the device has a fused kernel for these heads, one that never writes the pattern to memory."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return jax.default_backend() == "gpu" and half and not config.score_cap and config.head_width % 8 == 0 and config.head_width <= 128


def _fused(config: ModelConfig, query: jax.Array, segment: Segment, implementation: Any = "cudnn") -> jax.Array:
    """The same with a fused kernel; `seen` is its mask."""
    rows, length, kv_heads, group, width = query.shape
    key, value = (jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in (segment.key, segment.value))
    scale = config.head_width**-0.5 if config.score_scale is None else config.score_scale
    heads = query.reshape(rows, length, kv_heads * group, width)
    out = jax.nn.dot_product_attention(heads, key, value, mask=segment.seen[:, None], scale=scale, implementation=implementation)
    return out.reshape(query.shape)
