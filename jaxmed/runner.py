"""The two ways to run a decoder, both over the same `Block`: the full forward, and `propagate`, which restarts it.

`forward` is a `lax.scan` over stacked blocks, with edits and taps. `propagate` is a `fori_loop` with a traced first layer
over the same blocks: it carries only the tokens from the first patched one on and reads every earlier token's keys and
values from the base run. Changing any unit at layer l changes the residual stream there by a known vector, so the exact
effect of the unit is one row of `propagate`; thousands of units are the batch axis of its matmuls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.interventions.edits import Edit, TokenIndex, apply_edit
from jaxmed.interventions.sites import INTERNAL, SITES
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import MASKED, attention_scores, contract, recomputed, sees
from jaxmed.models.rope import layer_windows, model_angles
from jaxmed.models.transformer import Params, Touch, as_logits, embed, final_norm, head, open_block, untouched


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layout:
    """How the tokens of a batch see each other.

    Attributes:
        position: int [B, T], RoPE position of every token.
        visible: bool [B, T, S], whether query token t may see key token s (causal and padding masks included).
        index: which real token each column is, for `Where.position`.
        trunk, branch: where `branch` is not 0, a row is `trunk` tokens of ordinary text, and then branches of `branch` tokens each; a
            branch sees the trunk and itself alone, and `visible` is of branches: [B, branches, branch, trunk + branch].
    """

    position: Any
    visible: Any
    index: TokenIndex
    trunk: int = field(default=0, metadata={"static": True})
    branch: int = field(default=0, metadata={"static": True})


def causal_layout(batch: int, length: int, padding: Any = None) -> Layout:
    """The layout of ordinary text. `padding` int [B]: how many tokens at the left of each row are padding."""
    left = jnp.zeros(batch, jnp.int32) if padding is None else jnp.asarray(padding, jnp.int32)
    column = jnp.arange(length)
    counted = column - left[:, None]
    causal = column[:, None] >= column
    visible = causal & (counted >= 0)[:, None, :]
    return Layout(jnp.maximum(counted, 0), visible, TokenIndex(counted, length - left))


def run_blocks(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    layout: Layout,
    edits: dict[str, Edit] | None = None,
    taps: Sequence[str] = (),
    gather: jax.Array | None = None,
    remat: bool = False,
    h: jax.Array | None = None,
    first: int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """All blocks over tokens int [B,T]: the last residual stream float32 [B,T,D], and the tapped activations [L,B,T,...].

    Args:
        gather: int [B,W], keeps only these columns of every tap but the cached keys and values.
        remat: gradients keep the residual stream between blocks alone and run each block again.
        h, first: the stream to begin with instead of the embedding, where `params` holds the blocks from number `first` on alone.
    """
    edits = edits or {}
    scanned, fixed = _split_dense(edits)
    angles = model_angles(config, layout.position)

    def step(h: jax.Array, inputs: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        arrays, window, layer, dense = inputs
        block = open_block(config, arrays)
        recorded: dict[str, jax.Array] = {}
        here = {name: _at_layer(edit, fixed[name], dense[name]) for name, edit in edits.items()}

        def touch(name: str, a: jax.Array) -> jax.Array:
            if name in here:
                a = apply_edit(here[name], SITES[name], a, layer, layout.index)
            if name in taps:
                recorded[name] = a if gather is None or name.startswith("cached_") else _take_tokens(name, a, gather)
            return a

        if layout.branch:
            attend = partial(_attend_branches, config, layout, window)
        else:
            visible = layout.visible & sees(layout.position, layout.position, window)
            attend = partial(_attend_all, config, visible=visible, touch=touch)
        h = block.attention(h, angles(window), attend, touch)
        return block.mlp(h, touch), recorded

    layers = first + jnp.arange(jax.tree.leaves(params["blocks"])[0].shape[0])
    inputs = (params["blocks"], layer_windows(config)[first : first + len(layers)], layers, scanned)
    h = embed(config, params, tokens, layout.position) if h is None else h
    return jax.lax.scan(jax.checkpoint(step) if remat else step, h, inputs)


def _attend_all(
    config: ModelConfig, query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, touch: Touch = untouched
) -> jax.Array:
    """Attention among the tokens of a batch: query [B,T,K,G,H], key and value [B,S,K,H] -> [B,T,K,G,H]."""
    batch, length, kv_heads, group, _ = query.shape
    scores = attention_scores(config, contract("BTKGH,BSKH->BKGTS", query, key))
    pattern = jax.nn.softmax(jnp.where(visible[:, None, None], scores, MASKED), axis=-1)
    pattern = touch("attention_pattern", pattern.reshape(batch, kv_heads * group, length, -1))
    pattern = pattern.reshape(scores.shape).astype(value.dtype)
    return contract("BKGTS,BSKH->BTKGH", pattern, value, dtype=value.dtype)


def _attend_branches(config: ModelConfig, layout: Layout, window: jax.Array, *qkv: jax.Array) -> jax.Array:
    """Attention in rows of a trunk and its branches: query [B,T,K,G,H], key and value [B,T,K,H] -> [B,T,K,G,H]. It has no sites."""
    sizes = layout.trunk, layout.visible.shape[1], layout.branch
    return recomputed(partial(_trunk_and_branches, config, sizes), *qkv, layout.position, layout.visible, window)


def _trunk_and_branches(config: ModelConfig, sizes: tuple[int, int, int], *operands: jax.Array) -> jax.Array:
    query, key, value, position, visible, window = operands
    trunk, count, branch = sizes
    rows = query.shape[0]

    def of_trunk(x: jax.Array) -> jax.Array:
        return x[:, :trunk]

    def of_branches(x: jax.Array) -> jax.Array:
        return x[:, trunk:].reshape(rows * count, branch, *x.shape[2:])

    def seen(x: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.repeat(of_trunk(x), count, axis=0), of_branches(x)], axis=1)

    near = sees(of_branches(position), seen(position), window)
    mask = visible.reshape(near.shape) & near
    out = _attend_all(config, of_branches(query), seen(key), seen(value), mask).reshape(rows, -1, *query.shape[2:])
    if not trunk:
        return out
    mask = jnp.tril(jnp.ones((trunk, trunk), bool)) & sees(of_trunk(position), of_trunk(position), window)
    return jnp.concatenate([_attend_all(config, of_trunk(query), of_trunk(key), of_trunk(value), mask), out], axis=1)


def _split_dense(edits: dict[str, Edit]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Dense fields with a layer axis (scanned) and those without (fixed)."""
    scanned, fixed = {}, {}
    for name, edit in edits.items():
        fields = {} if edit.where is not None else {f: getattr(edit, f) for f in ("gate", "value", "add")}
        per_layer = {f: jnp.asarray(x) for f, x in fields.items() if jnp.ndim(x) > 0 and jnp.shape(x)[0] > 1}
        scanned[name] = per_layer
        fixed[name] = {f: (x if jnp.ndim(x) == 0 else x[0]) for f, x in fields.items() if f not in per_layer}
    return scanned, fixed


def _at_layer(edit: Edit, fixed: dict[str, Any], dense: dict[str, Any]) -> Edit:
    return edit if edit.where is not None else Edit(**fixed, **dense, basis=edit.basis)


def _take_tokens(name: str, a: jax.Array, gather: jax.Array) -> jax.Array:
    axis = {**SITES, **INTERNAL}[name].axes.index("T")
    shape = [1] * a.ndim
    shape[0], shape[axis] = gather.shape
    return jnp.take_along_axis(a, gather.reshape(shape), axis)


@partial(jax.jit, static_argnames=("config", "taps"))
def forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    layout: Layout,
    edits: dict[str, Edit] | None = None,
    taps: tuple[str, ...] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """tokens int [B,T] -> logits float32 [B,T,V] and the tapped activations, each [L,B,T,...]."""
    h, recorded = run_blocks(config, params, tokens, layout, edits, taps)
    return as_logits(config, contract("BTD,VD->BTV", final_norm(config, params, h), head(params))), recorded


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Restart:
    """What `propagate` keeps of the base run, for one window of tokens.

    Attributes:
        key, value: [L, S, K, H], rotated keys and values of every token of the base run.
        prefix: int, how many tokens come before the window; those are seen through `key` and `value`.
        position: int [T], RoPE positions of the window's tokens.
        visible: bool [T, T], which tokens of the window see which.
    """

    key: Any
    value: Any
    prefix: Any
    position: Any
    visible: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entry:
    """Where rows of different layers enter the stream.

    Attributes:
        layer: int [U], the layer of each row.
        mid: bool [U], whether the row replaces residual_mid (its layer's MLP still runs) or residual_out.
    """

    layer: Any
    mid: Any


Readout = Callable[[ModelConfig, Params, jax.Array, Any], jax.Array]
"""(config, params, last residual stream [U,T,D], reads) -> outcomes [..., U]. Hashable: it is part of the program."""


@partial(jax.jit, static_argnames=("config", "readout"))
def propagate(
    config: ModelConfig,
    params: Params,
    restart: Restart,
    h: jax.Array,
    first: jax.Array,
    reads: Any,
    readout: Readout,
    entry: Entry | None = None,
) -> jax.Array:
    """Outcomes of many counterfactual runs, restarted from the residual stream.

    Args:
        h: float32 [U,T,D], the patched residual stream of the window. Without `entry`: the input of layer `first`. With
            `entry`: each row's value at its own layer, where it joins the stream.
        first: int, the first layer that runs.
        reads: what `readout` reads.

    Returns:
        What `readout` returns, [..., U].
    """
    angles = model_angles(config, restart.position)
    windows = layer_windows(config)
    base_position = jnp.arange(restart.key.shape[1])

    def step(layer: jax.Array, stream: jax.Array) -> jax.Array:
        arrays = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False), params["blocks"])
        block = open_block(config, arrays)
        before = (base_position < restart.prefix) & sees(restart.position, base_position, windows[layer])
        among = restart.visible & sees(restart.position, restart.position, windows[layer])
        attend = partial(_attend_restarted, config, before=before, among=among, cached=(restart.key[layer], restart.value[layer]))
        stream = block.attention(stream, angles(windows[layer]), attend)
        if entry is not None:
            stream = _join(stream, h, (entry.layer == layer) & entry.mid)
        stream = block.mlp(stream)
        return stream if entry is None else _join(stream, h, (entry.layer == layer) & ~entry.mid)

    return readout(config, params, jax.lax.fori_loop(first, config.layers, step, h), reads)


def _join(stream: jax.Array, rows: jax.Array, here: jax.Array) -> jax.Array:
    return jnp.where(here[:, None, None], rows, stream)


def _attend_restarted(
    config: ModelConfig,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    before: jax.Array,
    among: jax.Array,
    cached: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Attention of window tokens to the base run's earlier tokens (shared by all rows) and to each other.

    query [B,T,K,G,H], key and value [B,T,K,H], cached [S,K,H], before [T,S], among [T,T] -> [B,T,K,G,H].
    """
    earlier = attention_scores(config, contract("BTKGH,SKH->KBTGS", query, cached[0]))
    earlier = jnp.where(before[None, None, :, None], earlier, MASKED)
    own = attention_scores(config, contract("BTKGH,BSKH->KBTGS", query, key))
    own = jnp.where(among[None, None, :, None], own, MASKED)
    top = jnp.maximum(earlier.max(-1), own.max(-1))[..., None]
    earlier, own = jnp.exp(earlier - top), jnp.exp(own - top)
    total = earlier.sum(-1) + own.sum(-1)
    mixed = contract("KBTGS,SKH->KBTGH", earlier.astype(value.dtype), cached[1])
    mixed = mixed + contract("KBTGS,BSKH->KBTGH", own.astype(value.dtype), value)
    return jnp.moveaxis(mixed / total[..., None], 0, 2).astype(value.dtype)
