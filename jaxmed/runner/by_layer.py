"""Restarted runs on the CPU, by a program of one layer.

A loop over stacked weights copies the weights of each layer out of the stack before it multiplies by them. Weights that lie on their own
are multiplied where they lie. Elsewhere the loop of `propagate` is as good, and one call is cheaper than many.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxmed.models.config import ModelConfig
from jaxmed.models.params import Params
from jaxmed.runner.blocks import are_few, run
from jaxmed.runner.calls import Readout
from jaxmed.runner.layout import Entry, Prefix, Restart


def lies_by_layer(params: Params) -> bool:
    """Whether every device is a CPU and holds all parameters, so that layers can be taken apart without a copy."""
    held = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array) and leaf.is_fully_replicated]
    return len(held) == len(jax.tree.leaves(params)) and all(device.platform == "cpu" for device in held[0].devices())


_apart: dict[tuple[Any, ...], list[Any]] = {}


def each_layer(stacked: Any) -> list[Any]:
    """Replicated arrays [L, ...] as one tree of arrays [1, ...] per layer, without a copy where they are aligned.

    Made once for the same arrays, and forgotten with the first of them.
    """
    leaves, tree = jax.tree.flatten(stacked)
    key = tree, *map(id, leaves)
    if key not in _apart:
        parts = zip(*map(_take_apart, leaves), strict=True)
        _apart[key] = [jax.tree.unflatten(tree, part) for part in parts]
        for leaf in leaves:
            weakref.finalize(leaf, _apart.pop, key, None)
    return _apart[key]


def _take_apart(stack: jax.Array) -> list[jax.Array]:
    held = [(np.asarray(shard.data), shard.device) for shard in stack.addressable_shards]
    make = partial(jax.make_array_from_single_device_arrays, (1, *stack.shape[1:]), stack.sharding)
    return [make([jax.device_put(array[at : at + 1], device) for array, device in held]) for at in range(len(stack))]


def propagate_by_layer(
    config: ModelConfig,
    params: Params,
    restart: Restart,
    stream: jax.Array,
    first: np.int32,
    reads: Any,
    readout: Readout,
    asked: Any,
    entry: Entry | None = None,
    minus: jax.Array | None = None,
) -> jax.Array:
    """`propagate` without edits, a call per layer; returns before they are finished."""
    prefix, few = restart.prefix, bool(first < config.layers) and are_few(len(asked), stream.shape[1])
    blocks, cached = each_layer(params["blocks"]), each_layer((prefix.key, prefix.value))
    where = jax.tree.leaves(blocks)[0].sharding
    everywhere = jax.NamedSharding(where.mesh, jax.P()) if isinstance(where, jax.NamedSharding) else where
    seen, layout, asked = jax.device_put(((prefix.position, prefix.seen), restart.layout, asked), everywhere)
    for number in range(first, config.layers):
        here = Restart(Prefix(*cached[number], *seen), layout)
        taken = asked if few and number == config.layers - 1 else None
        stream = run_layer(config, blocks[number], here, stream, np.int32(number), entry, taken)
    top = {name: held for name, held in params.items() if name != "blocks"}
    return read_out(config, top, stream, minus, reads, readout, asked, few)


@partial(jax.jit, static_argnames="config")
def run_layer(
    config: ModelConfig,
    arrays: Params,
    restart: Restart,
    stream: jax.Array,
    number: Any,
    entry: Entry | None,
    asked: jax.Array | None,
) -> jax.Array:
    """One layer on residual streams [U,T,D], or for its columns `asked` alone.

    A loop of one step, whose bounds are traced: inside loops XLA (jaxlib 0.10) runs a device's matmuls on one core, and outside them the
    devices share all cores and push each other's operands out of the caches.
    """

    def step(number: jax.Array, stream: jax.Array) -> jax.Array:
        how: dict[str, Any] = {"first": number, "prefix": restart.prefix, "entry": entry, "asked": asked}
        return run(config, {"blocks": arrays}, stream, restart.layout, **how).stream

    if asked is None:
        return jax.lax.fori_loop(number, number + 1, step, stream)
    return jax.lax.fori_loop(number, number + 1, lambda number, _: step(number, stream), stream[:, asked])


@partial(jax.jit, static_argnames=("config", "readout", "taken"))
def read_out(
    config: ModelConfig,
    params: Params,
    stream: jax.Array,
    minus: jax.Array | None,
    reads: Any,
    readout: Readout,
    asked: jax.Array,
    taken: bool,
) -> jax.Array:
    """What `readout` makes of last residual streams; `taken`: of those at `asked` alone."""
    stream = stream if taken else stream[:, asked]
    stream = stream if minus is None else stream - minus[:, asked]
    return readout(config, params, stream, reads)
