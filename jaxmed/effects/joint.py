"""Rows of restarted runs in which many units are patched together: joint sets, and paths from a sender to chosen receivers.

A set's units are masks of the sites that are swapped, and all rows share the source's values, so that sets of any size cost no more than
single units: a chunk restarts at its lowest layer, and the masks act while it runs. Held units get the base run's values back behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.axes import row_parts, row_sharding
from jaxmed.effects.engine import Values, Window, chunk_rows
from jaxmed.effects.mediators import MEDIATORS, patched_rows, written
from jaxmed.effects.readout import Readout
from jaxmed.effects.rows import Picks, Record, View
from jaxmed.effects.sets import UnitPath, UnitSet, kinds_of, membership
from jaxmed.interventions.acting import Staged
from jaxmed.interventions.edits import Edit
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model
from jaxmed.models.params import Params
from jaxmed.runner import Recording, Restart, propagate, run


def set_values(model: Model, window: Window, sets: Sequence[UnitSet], width: int, per_device: int, readout: Readout) -> Values:
    """Outcomes of joint sets, one row each. Returns before they are finished; arguments as `engine.unit_values` takes them."""
    view = window.view
    stages = (("units", view.source, view.patched), ("held", view.base, None))
    kinds = {which: kinds_of(unit for one in sets for unit in getattr(one, which)) for which, *_ in stages}
    values = {
        which: {site: _recorded(record, view.slots, site) for kind in kinds[which] for site in MEDIATORS[kind].sites}
        for which, record, _ in stages
    }

    def outcome(first: int, chunk: Sequence[UnitSet | None]) -> jax.Array:
        edits: dict[str, tuple[Edit, ...]] = {}
        for which, _, tokens in stages:
            rows = [() if one is None else getattr(one, which) for one in chunk]
            for site, mask in membership(model.config, rows, width, kinds[which]).items():
                edits[site] = (*edits.get(site, ()), _gated(model, mask, values[which][site], tokens))
        return _restarted(model, window, first, len(chunk), readout, edits)

    return _in_chunks(model, sets, per_device, outcome)


def path_values(model: Model, window: Window, paths: Sequence[UnitPath], width: int, per_device: int, readout: Readout) -> Values:
    """Outcomes of paths, one row each: first what the receivers would be, then how the model responds to them."""
    kinds, senders = kinds_of(unit for one in paths for unit in one.receivers), kinds_of(one.sender for one in paths)

    def outcome(first: int, chunk: Sequence[UnitPath | None]) -> jax.Array:
        members = membership(model.config, [() if one is None else one.receivers for one in chunk], width, kinds)
        found = _receivers(model, window, [None if one is None else one.sender for one in chunk], width, senders, tuple(members))
        edits = {site: _gated(model, mask, found[site]) for site, mask in members.items()}
        return _restarted(model, window, first, len(chunk), readout, edits)

    return _in_chunks(model, paths, per_device, outcome)


def _restarted(model: Model, window: Window, first: int, rows: int, readout: Readout, edits: Staged) -> jax.Array:
    """Outcomes of rows that all carry the base run's stream into layer `first`, with edits from there on."""
    stream, reads = _streams(model, window.view, first, rows), window.reads
    return propagate(model.config, model.params, window.restart, stream, np.int32(first), reads, readout, reads.slots, edits=edits)


def _in_chunks(model: Model, rows: Sequence[Any], per_device: int, outcome: Any) -> Values:
    """Rows in the order of their first layers, each chunk from its lowest one on; the base row of every device has no units."""
    order = np.argsort([row.first for row in rows], kind="stable")
    chunks = chunk_rows(len(rows), per_device, row_parts(model.mesh))
    numbers = np.where(chunks >= 0, order[np.maximum(chunks, 0)], -1).astype(np.int32)
    found = []
    for chunk in numbers.reshape(len(numbers), -1):
        own = [rows[number] if number >= 0 else None for number in chunk]
        found.append(outcome(min(row.first for row in own if row is not None), own))
    return Values(numbers, found)


@partial(jax.jit, static_argnames=("site",))
def _recorded(record: Record, slots: jax.Array, site: str) -> jax.Array:
    """A site of a run at the window's columns: [L,1,T,...]."""
    return record[site][:, None, slots]


def _gated(model: Model, mask: np.ndarray, values: jax.Array, tokens: Any = None) -> Edit:
    """A swap of the units in `mask` [L,R,n] by `values` [L, 1 or R, T, n, ...]."""
    gate = mask.reshape(*mask.shape[:2], 1, mask.shape[2], *(1,) * (values.ndim - 4))
    placed = jax.device_put(gate, row_sharding(model.mesh, 1))
    return Edit(placed, values, np.float32(0.0), tokens=tokens)


def _streams(model: Model, view: View, first: int, rows: int) -> jax.Array:
    """The base run's input of a layer, for every row: float32 [R,T,D]."""
    sharding = row_sharding(model.mesh)
    return jax.device_put(_base_streams(view, np.full(rows, first, np.int32)), sharding)


@jax.jit
def _base_streams(view: View, layer: jax.Array) -> jax.Array:
    return view.at(view.base, "residual_in", layer)


def _receivers(
    model: Model, window: Window, senders: Sequence[Any], width: int, kinds: tuple[str, ...], sites: tuple[str, ...]
) -> dict[str, jax.Array]:
    """Receivers' values [L,R,T,...] where every layer reads the base run's stream and, behind the sender, its change."""
    own = [(-1, 0, 0) if unit is None else (kinds.index(unit[0]), unit[1], unit[2]) for unit in senders]
    picks = Picks(*(np.asarray(column, np.int32) for column in zip(*own, strict=True)))
    placed = jax.device_put(picks, row_sharding(model.mesh))
    return _respond(model.config, model.params, window.restart, window.view, placed, kinds, width, sites)


@partial(jax.jit, static_argnames=("config", "kinds", "width", "sites"))
def _respond(
    config: ModelConfig,
    params: Params,
    restart: Restart,
    view: View,
    picks: Picks,
    kinds: tuple[str, ...],
    width: int,
    sites: tuple[str, ...],
) -> dict[str, jax.Array]:
    rows, mid = patched_rows(config, params, view, picks, kinds, width)
    change = jnp.where((picks.kind >= 0)[:, None, None], written(view, picks, rows, mid), 0.0)
    layer, own = jnp.arange(config.layers)[:, None], picks.layer[None]
    behind = {"residual_in": layer > own, "residual_mid": (layer > own) | ((layer == own) & mid[None])}
    frozen = {
        site: Edit(np.float32(1.0), view.base[site][:, None, view.slots], jnp.where(reached[..., None, None], change[None], 0.0))
        for site, reached in behind.items()
    }
    stream = view.at(view.base, "residual_in", jnp.zeros_like(picks.layer))
    return run(config, params, stream, restart.layout, Recording(sites), first=0, prefix=restart.prefix, edits=frozen).taps
