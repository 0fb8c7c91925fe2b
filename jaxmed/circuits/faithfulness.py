"""Exact joint patching of edges: the outcome of base's prompt where every edge outside a circuit carries source's value.

Every head's queries, keys and values, every MLP and the logits read an input of their own: source's, plus what the circuit's edges change.
    input(v) = source's input(v) + sum over edges u -> v of the circuit of (what u writes now - what u writes in source)
With all edges this is the base run, with none the source run. Many circuits of a pair run side by side.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmed.axes import lead
from jaxmed.circuits.nodes import Cached, Seen, write_heads, write_mlp
from jaxmed.circuits.scores import Ends
from jaxmed.effects.readout import Readout, Reads
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import contract
from jaxmed.models.params import Params
from jaxmed.models.rope import layer_windows


class OnePair(NamedTuple):
    """What circuits of one pair need of its two runs.

    Attributes:
        start: float32 [T, D], base's embedded tokens at the window.
        entering, middle: float32 [L, T, D], what heads and MLPs read in source.
        last: float32 [T, D], source's last residual stream.
        written: float32 [U, T, D], what every sender writes in source.
        cached: keys and values of earlier tokens, [L, 1, S, K, H].
        seen: how the window's tokens see.
        reads: what the outcome reads.
    """

    start: Any
    entering: Any
    middle: Any
    last: Any
    written: Any
    cached: Cached
    seen: Seen
    reads: Reads


def one_pair(ends: Ends, reads: Reads, row: int) -> OnePair:
    """One row of a batch."""
    source = ends.source
    cached, seen = Cached(*(x[:, row : row + 1] for x in ends.cached)), Seen(*(x[row : row + 1] for x in ends.seen))
    own = jax.tree.map(lambda x: x[row], reads)
    return OnePair(
        ends.base.written[row, 0], source.entering[:, row], source.middle[:, row], source.last[row], source.written[row], cached, seen, own
    )


@partial(jax.jit, static_argnames=("config", "readout"))
def circuit_outcomes(config: ModelConfig, params: Params, pair: OnePair, circuits: Any, readout: Readout) -> jax.Array:
    """Outcomes float32 [B] of circuits bool [B, senders, receivers] of one pair; entries that are no edges may be anything."""
    count, layers, per_layer = len(circuits), config.layers, 3 * config.heads + 1
    kept = circuits.astype(jnp.float32)
    by_layer = jnp.moveaxis(kept[:, :, :-1].reshape(count, -1, layers, per_layer), 2, 0)
    nodes = pair.written[1:].reshape(layers, -1, *pair.written.shape[1:])
    number = jnp.arange(layers, dtype=jnp.int32)
    scanned = params["blocks"], pair.entering, pair.middle, nodes, pair.cached, layer_windows(config), by_layer, number
    change = jnp.zeros((count, *pair.written.shape), jnp.float32).at[:, 0].set(pair.start - pair.written[0])
    change, _ = jax.lax.scan(partial(_step, config, pair.seen), change, scanned)
    stream = lead(pair.last, 3) + contract("BU,BUTD->BTD", kept[:, :, -1], change)
    return readout(config, params, stream[:, pair.reads.slots], pair.reads)[0]


def _step(config: ModelConfig, seen: Seen, change: jax.Array, layer: Any) -> tuple[jax.Array, None]:
    """One block of all circuits: `change` [B,U,T,D] is what every sender writes now minus what it writes in source, so far."""
    arrays, entering, middle, source, cached, window, kept, number = layer
    at = 1 + number * (config.heads + 1)
    read = lead(entering, 4) + contract("BUY,BUTD->BYTD", kept[:, :, :-1], change)
    inputs = read.reshape(len(read), 3, config.heads, *read.shape[2:])
    heads = write_heads(config, arrays, inputs, seen, cached, window) - lead(source[:-1], 4)
    change = jax.lax.dynamic_update_slice_in_dim(change, heads, at, 1)
    read = lead(middle, 3) + contract("BU,BUTD->BTD", kept[:, :, -1], change)
    written = write_mlp(config, arrays, read) - lead(source[-1], 3)
    return jax.lax.dynamic_update_slice_in_dim(change, written[:, None], at + config.heads, 1), None
