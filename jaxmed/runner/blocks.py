"""One run over blocks: the full forward, the restarted run, and the continuation of a cached prompt are calls of it.

`run` carries a residual stream through the blocks, from any layer on. With a static first layer it is a `lax.scan` (gradients, taps of
all layers); with a traced one a `fori_loop`, so that one program restarts at every layer. Both take the same step: edits act and taps
read at every site, rows may enter late, and earlier tokens are seen through the keys and values that another run has left. Changing any
unit at layer l changes the residual stream there by a known vector, so the exact effect of the unit is one row of a restarted run;
thousands of units are the batch axis of its matmuls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmed.attention import Segment, attend
from jaxmed.axes import hold_rows
from jaxmed.interventions.acting import Part, Staged, apply_edit, at_layer, in_order, split_dense
from jaxmed.interventions.sites import BRANCHES, INTERNAL, SITES
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import recomputed, sees
from jaxmed.models.params import Params
from jaxmed.models.rope import layer_windows, model_angles
from jaxmed.models.rules import EXACT, Rules
from jaxmed.models.transformer import open_block
from jaxmed.runner.layout import Entry, Layout, Prefix

FEWER = 8
"""Tokens that the last block must be spared to be compiled apart."""


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


PLAIN = Recording()
"""Nothing is recorded, and derivatives are exact."""


def run(
    config: ModelConfig,
    params: Params,
    stream: jax.Array,
    layout: Layout,
    recording: Recording = PLAIN,
    *,
    first: int | jax.Array = 0,
    prefix: Prefix | None = None,
    entry: Entry | None = None,
    edits: Staged | None = None,
    columns: jax.Array | None = None,
    asked: jax.Array | None = None,
) -> Ran:
    """Blocks from number `first` on over a residual stream float32 [B,T,D]. More than six arguments: each is one seam of the engine.

    Args:
        first: static: a scan over the blocks that `params` holds, of which the lowest has this number. Traced: a loop from this layer to
            the last, and taps of layers before it are zero; where `params` holds some of the blocks alone, a scan over these.
        prefix: earlier tokens, seen through their keys and values.
        entry: rows that join late; until then they carry `stream`.
        edits: checked interventions (`check_edits`); they act in restarted runs too, where `Where.row` names a row. Several of one site act
            one after another.
        columns: int [B,W], keeps only these columns of every tap but the cached keys and values.
        asked: int [R], with a traced `first` or one block: the columns whose last residual stream is returned, [B,R,D]. Where they are few
            and nothing is edited or recorded, the last block has queries and an MLP for them alone.
    """
    stream = hold_rows(config.mesh, stream)
    parts, names = in_order(edits or {}), recording.taps + (("cached_key", "cached_value") if recording.keep else ())
    scanned, fixed = split_dense(parts)
    angles, windows = model_angles(config, layout.position), layer_windows(config)

    def step(stream: jax.Array, at: _Layer, asked: jax.Array | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        recorded: dict[str, jax.Array] = {}
        here = {part: at_layer(edit, fixed[part], at.dense[part]) for part, edit in parts.items()}

        def touch(name: str, a: jax.Array) -> jax.Array:
            if entry is not None and name in ("residual_mid", "residual_out"):
                joins = (entry.layer == at.number) & (entry.mid == (name == "residual_mid"))
                joining = entry.stream if asked is None else entry.stream[:, asked]
                a = jnp.where(joins[:, None, None], joining, a)
            for (site, _), edit in here.items():
                if site == name:
                    a = apply_edit(edit, SITES[name], a, at.number, layout.index)
            if name in names:
                recorded[name] = a if columns is None or name.startswith("cached_") else _take_tokens(name, a, columns)
            return a

        block = open_block(config, at.arrays, recording.rules)
        touched = {*names, *(site for site, _ in here)}
        at_pattern = partial(touch, "attention_pattern") if "attention_pattern" in touched else None
        at_branch = touch if touched.intersection(BRANCHES) else None
        see = partial(_attend, config, layout if asked is None else layout.asked(asked), at, prefix, at_pattern, recording.rules)
        return block.mlp(block.attention(stream, angles(at.window), see, touch, asked), touch, at_branch), recorded

    kv = None if prefix is None else (prefix.key, prefix.value)
    count = jax.tree.leaves(params["blocks"])[0].shape[0]
    if isinstance(first, int) or count < config.layers:
        windows, scanned = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, count), (windows, scanned))
        layers = _Layer(params["blocks"], windows, first + jnp.arange(count), scanned, kv)
        if asked is not None and count == 1:
            return Ran(step(stream, jax.tree.map(lambda x: x[0], layers), asked)[0], {}, None)
        stream, recorded = _scan(jax.checkpoint(step) if recording.remat else step, stream, layers, count)
    else:
        layers = _Layer(params["blocks"], windows, jnp.arange(config.layers), scanned, kv)
        if asked is not None and are_few(asked.shape[0], stream.shape[1]) and not parts and not names:
            return Ran(_loop_to_few(config, step, stream, first, layers, asked), {}, None)
        stream, recorded = _loop(config, step, stream, first, layers, bool(names))
        stream = stream if asked is None else stream[:, asked]
    kept = (recorded.pop("cached_key"), recorded.pop("cached_value")) if recording.keep else None
    return Ran(stream, recorded, kept)


class _Layer(NamedTuple):
    """What differs between layers; stacked on a leading axis outside the loop."""

    arrays: Params
    window: jax.Array
    number: jax.Array
    dense: dict[Part, Any]
    cached: tuple[jax.Array, jax.Array] | None

    def at(self, number: Any) -> _Layer:
        """One layer's slice of all."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, 0, keepdims=False), self)


def _scan(step: Callable[..., Any], stream: jax.Array, layers: _Layer, count: int) -> tuple[jax.Array, Any]:
    """`step` over all layers. One layer needs no loop, whose gradient would run what nothing reads."""
    if count > 1:
        return jax.lax.scan(step, stream, layers)
    stream, recorded = step(stream, jax.tree.map(lambda x: x[0], layers))
    return stream, jax.tree.map(lambda x: x[None], recorded)


def _loop(
    config: ModelConfig, step: Callable[..., Any], stream: jax.Array, first: jax.Array, layers: _Layer, records: bool
) -> tuple[jax.Array, Any]:
    """`step` from a traced layer on; what it records, if anything, is put into arrays with an axis of all layers."""

    shapes = jax.eval_shape(lambda: step(stream, layers.at(jnp.int32(0)))[1]) if records else {}
    empty = jax.tree.map(lambda x: jnp.zeros((config.layers, *x.shape), x.dtype), shapes)

    def body(number: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        stream, recorded = step(carry[0], layers.at(number))
        return stream, jax.tree.map(lambda all_layers, x: all_layers.at[number].set(x), carry[1], recorded)

    return jax.lax.fori_loop(first, config.layers, body, (stream, empty))


def are_few(asked: int, window: int) -> bool:
    """Whether a last block for the tokens asked for alone saves more than compiling it apart costs."""
    return window - asked >= FEWER


def _loop_to_few(
    config: ModelConfig, step: Callable[..., Any], stream: jax.Array, first: jax.Array, layers: _Layer, asked: jax.Array
) -> jax.Array:
    """`step` from a traced layer on; the last block has queries for the columns `asked` alone. Keys and values it has for all."""
    last = config.layers - 1
    stream = jax.lax.fori_loop(first, last, lambda number, stream: step(stream, layers.at(number))[0], stream)
    return jax.lax.cond(first <= last, lambda x: step(x, layers.at(last), asked)[0], lambda x: x[:, asked], stream)


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
    keys = position if layout.keys is None else layout.keys
    segments = [Segment(key, value, layout.visible & sees(position, keys, at.window))]
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
    causal = jnp.tril(jnp.ones((1, trunk, trunk), bool)) & sees(of_trunk(position), of_trunk(position), window)
    stem = attend(config, of_trunk(query), [Segment(of_trunk(key), of_trunk(value), causal)], None, rules)
    return jnp.concatenate([stem, branches], axis=1)


def _take_tokens(name: str, a: jax.Array, columns: jax.Array) -> jax.Array:
    axis = {**SITES, **INTERNAL}[name].axes.index("T")
    shape = [1] * a.ndim
    shape[0], shape[axis] = columns.shape
    return jnp.take_along_axis(a, columns.reshape(shape), axis)
