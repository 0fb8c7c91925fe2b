"""A block whose every head and MLP reads an input of its own: what edge attribution differentiates, and what circuits run.

In the model all of them read the residual stream. Here the queries, keys and values of every head, and the MLP, are given theirs. With
grouped queries a key/value head is run for each of its query heads apart, on that head's input, with the same weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmed.attention import Segment, attend
from jaxmed.axes import lead
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import contract, normalise, sees
from jaxmed.models.params import Params
from jaxmed.models.rope import model_angles, rotate
from jaxmed.models.transformer import Block, open_block


class Seen(NamedTuple):
    """What a window's tokens see of their own, and of the tokens before them.

    Attributes:
        position: int [B or 1, T], of the window's tokens.
        visible: bool [B or 1, T, T], how they see each other.
        before: bool [B or 1, S], which earlier tokens there are; their positions are 0, 1, ...
    """

    position: Any
    visible: Any
    before: Any


class Cached(NamedTuple):
    """Keys and values of a layer's earlier tokens, rotated: [B or 1, S, K, H]."""

    key: Any
    value: Any


def write_heads(config: ModelConfig, arrays: Params, inputs: jax.Array, seen: Seen, cached: Cached, window: jax.Array) -> jax.Array:
    """What every head of a layer writes into the residual stream, float32 [B,N,T,D].

    Args:
        arrays: the layer's parameters.
        inputs: float32 [B,3,N,T,D], the residual streams that the queries, keys and values of every head read.
        cached: of the layer.
        window: of sliding attention.
    """
    block, angles = open_block(config, arrays), model_angles(config, seen.position)(window)
    query, key, value = (_project(config, block, inputs[:, number], number) for number in range(3))
    if config.query_key_norm:
        query = normalise(config, query, block.query_norm[...], None, config.compute)
        key = normalise(config, key, block.key_norm[...], None, config.compute)
    query, key = rotate(query, angles), rotate(key, angles)
    own = Segment(key, value, seen.visible & sees(seen.position, seen.position, window))
    earlier = [jnp.repeat(x, config.group, axis=2) for x in cached]
    columns = jnp.broadcast_to(jnp.arange(earlier[0].shape[1]), seen.before.shape)
    before = seen.before[:, None, :] & sees(seen.position, columns, window)
    mixed = attend(config, query[:, :, :, None], [Segment(earlier[0], earlier[1], before), own])[:, :, :, 0]
    return write(config, block, mixed)


def write(config: ModelConfig, block: Block, mixed: jax.Array) -> jax.Array:
    """Head outputs [...,T,N,H] through each head's part of the output projection: float32 [...,N,T,D]."""
    out = contract("BTNH,NHD->BNTD", mixed.reshape(-1, *mixed.shape[-3:]), block.out[...].astype(mixed.dtype))
    out = out * lead(block.out_scale[...], 4) if config.int8 else out
    out = out * config.residual_scale if config.residual_scale != 1 else out
    return out.reshape(*mixed.shape[:-3], *out.shape[1:])


def _project(config: ModelConfig, block: Block, inputs: jax.Array, number: int) -> jax.Array:
    """Queries (0), keys (1) or values (2) of every head from its own input [B,N,T,D]: [B,T,N,H] in the dtype of matmuls."""
    at = slice(0, config.group) if number == 0 else slice(config.group + number - 1, config.group + number)

    def by_head(array: jax.Array) -> jax.Array:
        """The part [..., N, H] of an array [..., K, J, H]."""
        part = array[..., at, :]
        part = part if number == 0 else jnp.repeat(part, config.group, axis=-2)
        return part.reshape(*part.shape[:-3], config.heads, config.head_width)

    x = block.norm(inputs, "attention_norm", config.compute)
    out = contract("BNTD,DNH->BTNH", x, by_head(block.qkv[...]).astype(x.dtype))
    out = out * lead(by_head(block.qkv_scale[...]), 4) if config.int8 else out
    out = out.astype(config.compute)
    return out + lead(by_head(block.qkv_bias[...]), 4) if config.qkv_bias else out


def write_mlp(config: ModelConfig, arrays: Params, h: jax.Array) -> jax.Array:
    """What the MLP of a layer writes for its input float32 [B,T,D]: float32 [B,T,D]."""
    written: list[jax.Array] = []

    def touch(name: str, a: jax.Array) -> jax.Array:
        if name == "mlp_out":
            written.append(a)
        return a

    open_block(config, arrays).mlp(h, touch)
    return written[0].astype(jnp.float32)
