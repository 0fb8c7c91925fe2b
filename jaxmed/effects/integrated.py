"""Integrated gradients of every unit of a layer: the gradient's mean along the way of one site of one layer from base to source.

Sundararajan et al. 2017 (arXiv 1703.01365), with the model restarted at the layer and all other sites as in the base run. All elements of
the site go together, so the effects of a layer's units add up to the exact effect of swapping the whole site (completeness). The mean is
taken at the points of Gauss and Legendre's rule, which is exact for slopes that are polynomials of degree 2m - 1 along the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.axes import row_parts
from jaxmed.effects.estimates import FirstOrder, RanPairs, rows_of
from jaxmed.effects.first_order import END, Base, cached_of, prefix_of, read_gradient, unit_effects, window_layout
from jaxmed.effects.job import Job
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.effects.outcomes import OUTCOMES
from jaxmed.effects.pair_batches import BatchShape, PairRows, shape_of
from jaxmed.effects.readout import Readout
from jaxmed.effects.rows import Record
from jaxmed.effects.work import Item, Work
from jaxmed.hosts import to_host
from jaxmed.interventions.edits import Edit
from jaxmed.models.config import ModelConfig
from jaxmed.models.params import Params
from jaxmed.runner import Recording, run
from jaxmed.runs.cost import TOKENS_PER_DEVICE, backward_flops, propagate_flops

Opened = Callable[..., tuple[jax.Array, Record]]
"""(number, stream [B,W,D], changes of sites, taps) -> the stream behind the block of that number, and the tapped sites."""


class Points(NamedTuple):
    """Where the gradient is taken: int [n] the patch, float32 [n] how far on its way from base to source, and the rule's weight."""

    patch: Any
    part: Any
    weight: Any


def points_of(patches: int, count: int, size: int) -> Iterator[Points]:
    """`count` points on the way of every patch, patch by patch, in equal pieces of `size`; what fills the last one weighs nothing."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    total = -(-patches * count // size) * size
    fill = total - patches * count
    patch = np.pad(np.repeat(np.arange(patches, dtype=np.int32), count), (0, fill))
    part, weight = (np.pad(np.tile(one, patches), (0, fill)).astype(np.float32) for one in ((1 + nodes) / 2, weights / 2))
    return (Points(patch[at : at + size], part[at : at + size], weight[at : at + size]) for at in range(0, total, size))


def ways_of(units: Sequence[str]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The sites that go together, of every way; and the kinds of units that swap them."""
    every = dict.fromkeys(MEDIATORS[unit].sites for unit in units)
    return {sites: tuple(unit for unit in units if MEDIATORS[unit].sites == sites) for sites in every}


@partial(jax.jit, static_argnames=("config", "units", "width", "readout"))
def integrate(
    config: ModelConfig, params: Params, pairs: PairRows, base: Base, written: Record, layer: Any, points: Points,
    units: tuple[str, ...], width: int, readout: Readout,
) -> Record:  # fmt: skip
    """What each point adds to the effects of the units of a layer: unit -> float32 [n, O, B, count].

    Args:
        written: sites [L, B, W, ...], what is written in the place of the base values.
        layer: int, traced: one program serves all layers.
        width: neurons of a window.
    """
    opened = _opener(config, params, pairs, base, readout)
    stream, sites = base.record["residual_in"][layer], tuple(sorted({site for unit in units for site in MEDIATORS[unit].sites}))
    values = opened(layer, stream, {}, sites)[1]
    change = {site: written[site][layer].astype(jnp.float32) - values[site].astype(jnp.float32) for site in sites}
    slope = partial(_slope, config, params, pairs, opened, readout)

    def at_point(patch: jax.Array, part: jax.Array, weight: jax.Array) -> Record:
        one = replace(pairs, slots=pairs.slots[:, patch][:, None], patched=pairs.patched[:, patch][:, None])
        here, found = _tokens(one), {}
        for moved, kinds in ways_of(units).items():
            entry = moved[0] if len(moved) == 1 else "residual_out"
            together = sum((change[site] for site in moved[1:]), change[moved[0]])
            moving = part * together * here.reshape(*here.shape, *(1,) * (together.ndim - 2))
            gradient = {entry if len(moved) == 1 else END: weight * slope(layer, stream, entry, moving)}
            found |= unit_effects(config, one, kinds, width, change, gradient)
        return {unit: effects[:, :, 0] for unit, effects in found.items()}

    return jax.vmap(at_point)(*points)


def _tokens(one: PairRows) -> jax.Array:
    """Which tokens of the windows the only patch has: float32 [B,W]."""
    window = jnp.arange(one.base.columns.shape[1])[None, None]
    return ((one.slots[:, 0, :, None] == window) & one.patched[:, 0, :, None]).any(1).astype(jnp.float32)


def _opener(config: ModelConfig, params: Params, pairs: PairRows, base: Base, readout: Readout) -> Opened:
    layout, cached = window_layout(pairs), cached_of(pairs, base)

    def opened(number: Any, stream: jax.Array, changes: Record, taps: tuple[str, ...] = ()) -> tuple[jax.Array, Record]:
        arrays, before = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, 0, keepdims=False), (params["blocks"], cached))
        edits = {site: Edit(0.0, 0.0, change[None]) for site, change in changes.items()}
        first = number if config.layers > 1 else 0
        recording, one = Recording(taps, rules=readout.rules), {"blocks": jax.tree.map(lambda x: x[None], arrays)}
        ran = run(config, one, stream, layout, recording, first=first, prefix=prefix_of(pairs, before), edits=edits)
        return ran.stream, {site: values[0] for site, values in ran.taps.items()}

    return opened


def _slope(
    config: ModelConfig, params: Params, pairs: PairRows, opened: Opened, readout: Readout, layer: Any, stream: jax.Array, entry: str,
    moving: jax.Array,
) -> jax.Array:  # fmt: skip
    """The gradient float32 [O,B,W,...] of the outcomes in a layer's site `entry` once that has changed by `moving` [B,W,...]."""
    after, pull = jax.vjp(lambda change: opened(layer, stream, {entry: change})[0], moving)

    def forward(number: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        stream, kept = carry
        return opened(number, stream, {})[0], kept.at[number].set(stream)

    def backward(step: jax.Array, gradient: jax.Array) -> jax.Array:
        number = config.layers - 1 - step
        _, pull = jax.vjp(lambda stream: opened(number, stream, {})[0], kept[number])
        return jax.vmap(pull)(gradient)[0]

    kept = jnp.zeros((config.layers, *after.shape), after.dtype)
    last, kept = jax.lax.fori_loop(layer + 1, config.layers, forward, (after, kept))
    _, gradient = read_gradient(config, params, last, pairs.base.reads, readout)
    return jax.vmap(pull)(jax.lax.fori_loop(0, config.layers - 1 - layer, backward, gradient))[0]


LOGITS = 64 << 20
"""Logits, as numbers, that the points of one call may have on a device."""


@dataclass(frozen=True)
class Integrated(FirstOrder):
    """The gradient's mean on the way, for every unit; `rules` say what gradients flow through."""

    def work(self, job: Job, item: Item) -> Work:
        """Two forwards of every row; and for every point, those that fill a call included, its layer's block, and a forward and a backward
        of the layers behind it."""
        shape, config, outcomes = shape_of(job.contrasts[item.pairs[0]]), job.model.config, len(job.request.outcomes)
        rows, part, seen = rows_of(job, item), len(item.layers) / len(job.layers), shape.length if shape.window < shape.length else 0
        flops = part * sum(propagate_flops(config, rows, length, 0, config.layers) for length in (shape.length, shape.source_length))
        size, ways = self.size(job, item), len(ways_of(job.request.units))
        points = ways * size * -(-shape.patches * job.request.points // size)
        after = sum(config.layers - 1 - layer for layer in item.layers)
        flops += points * propagate_flops(config, rows, shape.window, seen, after + len(item.layers))
        flops += points * backward_flops(config, rows, shape.window, seen, after, outcomes)
        effects = super().work(job, item).effects
        return Work(round(2 * rows * part) + (1 + outcomes) * points * rows * len(item.layers), flops, effects)

    def size(self, job: Job, item: Item) -> int:
        """Points of one call: as many as keep the devices busy."""
        shape, devices = shape_of(job.contrasts[item.pairs[0]]), row_parts(job.model.mesh)
        rows, most = rows_of(job, item) // devices, TOKENS_PER_DEVICE.get(job.model.mesh.devices.flat[0].platform, 2048)
        whole = any(callable(one) or OUTCOMES[one].normalised for one in job.request.outcomes)
        logits = LOGITS // (rows * shape.asked * job.model.config.vocabulary) if whole else most
        return max(1, min(most // (rows * shape.window), logits, shape.patches * job.request.points))

    def effects(self, job: Job, item: Item, ran: RanPairs) -> Record:
        """Effects of the item's layers; those of the job's other layers are zero."""
        shape, model, request = shape_of(job.contrasts[item.pairs[0]]), job.contrasts[0].base.model, job.request
        how = (request.units, request.window, self.readout(job))
        found: dict[str, Any] = {}
        for layer in item.layers:
            pieces = points_of(shape.patches, request.points, self.size(job, item))
            parts = [integrate(model.config, model.params, ran.pairs, ran.base, ran.written, np.int32(layer), one, *how) for one in pieces]
            for unit in request.units:
                whole = _mean([part[unit] for part in parts], shape, request.points)
                found.setdefault(unit, np.zeros((model.config.layers - job.layers[0], *whole.shape), np.float32))[layer - job.layers[0]] = (
                    whole
                )
        return found


def _mean(parts: list[jax.Array], shape: BatchShape, points: int) -> np.ndarray:
    """What the points add [n, O, B, count], piece by piece, as effects float32 [O, B, P, count]."""
    values = np.concatenate([to_host(part) for part in parts])[: shape.patches * points]
    return np.moveaxis(values.reshape(shape.patches, points, *values.shape[1:]).sum(1), 0, 2)
