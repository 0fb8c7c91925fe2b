"""One run over blocks: the full forward, the restarted run, and the continuation of a cached prompt are calls of it.

`run` carries a residual stream through the blocks, from any layer on. With a static first layer it is a `lax.scan` (gradients, taps of
all layers); with a traced one a `fori_loop`, so that one program restarts at every layer. Both take the same step: edits act and taps
read at every site, rows may enter late, and earlier tokens are seen through the keys and values that another run has left. Changing any
unit at layer l changes the residual stream there by a known vector, so the exact effect of the unit is one row of a restarted run;
thousands of units are the batch axis of its matmuls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmed.attention import Segment, attend
from jaxmed.interventions.acting import apply_edit, at_layer, split_dense
from jaxmed.interventions.edits import Edit, TokenIndex
from jaxmed.interventions.sites import INTERNAL, SITES
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import contract, recomputed, sees
from jaxmed.models.rope import layer_windows, model_angles
from jaxmed.models.rules import EXACT, Rules
from jaxmed.models.transformer import Params, as_logits, embed, final_norm, head, open_block


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layout:
    """How the tokens of a batch see each other.

    Attributes:
        position: int [B, T], RoPE position of every token; [1, T] where all rows have the same.
        visible: bool [B or 1, T, S], whether query token t may see key token s (causal and padding masks included).
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """Keys and values that earlier tokens have left behind, rotated: of a base run, or of prompts that are continued.

    Attributes:
        key, value: [L, b, S, K, H]; each of the b rows serves B / b rows of the run that sees it.
        position: int [b, S], RoPE position of every token.
        seen: bool [b, S], which of them may be seen (not padding, not beyond the first patched token).
    """

    key: Any
    value: Any
    position: Any
    seen: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entry:
    """Rows that join the stream late, each at its own layer.

    Attributes:
        stream: float32 [B, T, D], each row's residual stream where it joins.
        layer: int [B].
        mid: bool [B], whether the row replaces residual_mid (its layer's MLP still runs) or residual_out.
    """

    stream: Any
    layer: Any
    mid: Any


class Ran(NamedTuple):
    """What a run gives.

    Attributes:
        stream: float32 [B, T, D], the last residual stream.
        taps: site -> [layers, B, T, ...].
        kept: the run's own keys and values [layers, B, T, K, H], with `keep`; else None.
    """

    stream: jax.Array
    taps: dict[str, jax.Array]
    kept: tuple[jax.Array, jax.Array] | None


@dataclass(frozen=True)
class Recording:
    """What a run records and how it is differentiated; static.

    Attributes:
        taps: names of sites.
        keep: whether the run's keys and values are returned.
        remat: gradients keep the residual stream between blocks alone and run each block again.
        rules: what gradients flow through.
    """

    taps: tuple[str, ...] = ()
    keep: bool = False
    remat: bool = False
    rules: Rules = EXACT


def run(
    config: ModelConfig,
    params: Params,
    stream: jax.Array,
    layout: Layout,
    recording: Recording = Recording(),
    *,
    first: int | jax.Array = 0,
    prefix: Prefix | None = None,
    entry: Entry | None = None,
    edits: dict[str, Edit] | None = None,
    columns: jax.Array | None = None,
) -> Ran:
    """Blocks from number `first` on over a residual stream float32 [B,T,D]. More than six arguments: each is one seam of the engine.

    Args:
        first: static: a scan over the blocks that `params` holds, of which the lowest has this number. Traced: a loop from this layer to
            the last; `params` holds all blocks, and taps of layers before it are zero.
        prefix: earlier tokens, seen through their keys and values.
        entry: rows that join late; until then they carry `stream`.
        edits: checked interventions (`check_edits`); they act in restarted runs too, where `Where.row` names a row.
        columns: int [B,W], keeps only these columns of every tap but the cached keys and values.
    """
    edits, names = edits or {}, recording.taps + (("cached_key", "cached_value") if recording.keep else ())
    scanned, fixed = split_dense(edits)
    angles, windows = model_angles(config, layout.position), layer_windows(config)

    def step(stream: jax.Array, at: _Layer) -> tuple[jax.Array, dict[str, jax.Array]]:
        recorded: dict[str, jax.Array] = {}
        here = {name: at_layer(edit, fixed[name], at.dense[name]) for name, edit in edits.items()}

        def touch(name: str, a: jax.Array) -> jax.Array:
            if entry is not None and name in ("residual_mid", "residual_out"):
                joins = (entry.layer == at.number) & (entry.mid == (name == "residual_mid"))
                a = jnp.where(joins[:, None, None], entry.stream, a)
            if name in here:
                a = apply_edit(here[name], SITES[name], a, at.number, layout.index)
            if name in names:
                recorded[name] = a if columns is None or name.startswith("cached_") else _take_tokens(name, a, columns)
            return a

        block = open_block(config, at.arrays, recording.rules)
        at_pattern = partial(touch, "attention_pattern") if "attention_pattern" in (*names, *here) else None
        see = partial(_attend, config, layout, at, prefix, at_pattern, recording.rules)
        return block.mlp(block.attention(stream, angles(at.window), see, touch), touch), recorded

    kv = None if prefix is None else (prefix.key, prefix.value)
    if isinstance(first, int):
        count = jax.tree.leaves(params["blocks"])[0].shape[0]
        layers = _Layer(params["blocks"], windows[first : first + count], first + jnp.arange(count), scanned, kv)
        stream, recorded = jax.lax.scan(jax.checkpoint(step) if recording.remat else step, stream, layers)
    else:
        layers = _Layer(params["blocks"], windows, jnp.arange(config.layers), scanned, kv)
        stream, recorded = _loop(config, step, stream, first, layers, bool(names))
    kept = (recorded.pop("cached_key"), recorded.pop("cached_value")) if recording.keep else None
    return Ran(stream, recorded, kept)


class _Layer(NamedTuple):
    """What differs between layers; stacked on a leading axis outside the loop."""

    arrays: Params
    window: jax.Array
    number: jax.Array
    dense: dict[str, Any]
    cached: tuple[jax.Array, jax.Array] | None


def _loop(
    config: ModelConfig, step: Callable[..., Any], stream: jax.Array, first: jax.Array, layers: _Layer, records: bool
) -> tuple[jax.Array, Any]:
    """`step` from a traced layer on; what it records, if anything, is put into arrays with an axis of all layers."""

    def at(number: jax.Array) -> _Layer:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, 0, keepdims=False), layers)

    shapes = jax.eval_shape(lambda: step(stream, at(jnp.int32(0)))[1]) if records else {}
    empty = jax.tree.map(lambda x: jnp.zeros((config.layers, *x.shape), x.dtype), shapes)

    def body(number: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        stream, recorded = step(carry[0], at(number))
        return stream, jax.tree.map(lambda all_layers, x: all_layers.at[number].set(x), carry[1], recorded)

    return jax.lax.fori_loop(first, config.layers, body, (stream, empty))


def _attend(
    config: ModelConfig, layout: Layout, at: _Layer, prefix: Prefix | None, at_pattern: Any, rules: Rules, *qkv: jax.Array
) -> jax.Array:
    """Attention of a layer: query [B,T,K,G,H], key and value [B,T,K,H] -> [B,T,K,G,H]."""
    if layout.branch:
        return recomputed(partial(_attend_branches, config, layout.trunk, layout.branch, rules))(
            *qkv, layout.position, layout.visible, at.window
        )
    query, key, value = qkv
    position = layout.position
    segments = [Segment(key, value, layout.visible & sees(position, position, at.window))]
    if prefix is not None and at.cached is not None:
        near = sees(_for_rows(position, len(prefix.position)), prefix.position, at.window)
        before = prefix.seen[:, None, :] & near
        segments.insert(0, Segment(*at.cached, before if len(before) == 1 else _repeat(before, len(query))))
    return attend(config, query, segments, at_pattern, rules)


def _for_rows(position: jax.Array, rows: int) -> jax.Array:
    """Positions [B or 1, T] of queries, as the prefix's rows see them where there are fewer: rows of one prefix have equal positions."""
    return position[:: len(position) // rows] if rows < len(position) else position


def _repeat(mask: jax.Array, rows: int) -> jax.Array:
    return jnp.repeat(mask, rows // len(mask), axis=0) if len(mask) < rows else mask


def _attend_branches(config: ModelConfig, trunk: int, branch: int, rules: Rules, *operands: jax.Array) -> jax.Array:
    """Attention in rows of a trunk and its branches: query [B,T,K,G,H], key and value [B,T,K,H] -> [B,T,K,G,H]. It has no sites."""
    query, key, value, position, visible, window = operands
    rows = query.shape[0]

    def of_branches(x: jax.Array) -> jax.Array:
        return x[:, trunk:].reshape(-1, branch, *x.shape[2:])

    def of_trunk(x: jax.Array) -> jax.Array:
        return x[:, :trunk]

    near = sees(of_branches(position), of_branches(position), window)
    own = Segment(of_branches(key), of_branches(value), visible[..., trunk:].reshape(near.shape) & near)
    if not trunk:
        return attend(config, of_branches(query), [own], None, rules).reshape(query.shape)
    near = sees(position[:, trunk:], of_trunk(position), window)
    above = Segment(of_trunk(key), of_trunk(value), (visible[..., :trunk].reshape(near.shape) & near).reshape(-1, branch, trunk))
    branches = attend(config, of_branches(query), [above, own], None, rules).reshape(rows, -1, *query.shape[2:])
    causal = jnp.tril(jnp.ones((trunk, trunk), bool)) & sees(of_trunk(position), of_trunk(position), window)
    stem = attend(config, of_trunk(query), [Segment(of_trunk(key), of_trunk(value), causal)], None, rules)
    return jnp.concatenate([stem, branches], axis=1)


def _take_tokens(name: str, a: jax.Array, columns: jax.Array) -> jax.Array:
    axis = {**SITES, **INTERNAL}[name].axes.index("T")
    shape = [1] * a.ndim
    shape[0], shape[axis] = columns.shape
    return jnp.take_along_axis(a, columns.reshape(shape), axis)


def run_tokens(
    config: ModelConfig, params: Params, tokens: jax.Array, layout: Layout, recording: Recording = Recording(), **how: Any
) -> Ran:
    """`run` over tokens int [B,T], from their embedding on; `how` as `run` takes it."""
    return run(config, params, embed(config, params, tokens, layout.position), layout, recording, **how)


def logits_of(config: ModelConfig, params: Params, stream: jax.Array) -> jax.Array:
    """Logits float32 [...,V] of residual streams [...,D]."""
    flat = final_norm(config, params, stream.reshape(-1, stream.shape[-1]))
    return as_logits(config, contract("UD,VD->UV", flat, head(params))).reshape(*stream.shape[:-1], -1)


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
    ran = run_tokens(config, params, tokens, layout, Recording(taps), edits=edits)
    return logits_of(config, params, ran.stream), ran.taps


Readout = Callable[[ModelConfig, Params, jax.Array, Any], jax.Array]
"""(config, params, last residual stream [U,T,D], reads) -> outcomes [..., U]. Hashable: it is part of the program."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Restart:
    """What restarted runs keep of the base run, for one window of tokens: the tokens before it, and how its own see each other."""

    prefix: Prefix
    layout: Layout


@partial(jax.jit, static_argnames=("config", "readout"))
def propagate(
    config: ModelConfig,
    params: Params,
    restart: Restart,
    stream: jax.Array,
    first: jax.Array,
    reads: Any,
    readout: Readout,
    entry: Entry | None = None,
    edits: dict[str, Edit] | None = None,
) -> jax.Array:
    """Outcomes of many counterfactual runs, restarted from the residual stream.

    Args:
        stream: float32 [U,T,D], the input of layer `first`, the first layer that runs.
        reads: what `readout` reads.
        entry: rows that join the stream at layers of their own.
        edits: further interventions on rows, at any layers from `first` on: joint sets, paths.

    Returns:
        What `readout` returns, [..., U].
    """
    ran = run(config, params, stream, restart.layout, first=first, prefix=restart.prefix, entry=entry, edits=edits)
    return readout(config, params, ran.stream, reads)


def extend(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    layout: Layout,
    prefix: Prefix,
    recording: Recording = Recording(),
    **how: Any,
) -> Ran:
    """Continues cached prompts: tokens int [B,T] behind a prefix of b prompts, B / b continuations of each in a row.

    Generation is the case T = 1; scoring and probing teacher-force whole continuations. `layout.position` counts from the prompts'
    beginning.
    """
    return run_tokens(config, params, tokens, layout, recording, prefix=prefix, **how)
