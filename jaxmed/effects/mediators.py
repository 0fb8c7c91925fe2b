"""Mediators: what can be patched, and the residual stream that each patch leaves at its layer.

A new granularity is one row of `MEDIATORS`. A row says the same intervention twice: `rows` is the fast form, one vector per unit, and
`edits` is the same as data for any run (sets, generation, gradients, oracles). A property test holds the two equal for every family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.effects.rows import (
    Picks,
    Rows,
    View,
    down_rows,
    gate_change,
    head_rows,
    module_rows,
    neuron_change,
    up_change,
)
from jaxmed.errors import UserError, unknown
from jaxmed.interventions.edits import ANY, Edit, where
from jaxmed.interventions.sites import check_sites, has_site
from jaxmed.models.config import ModelConfig
from jaxmed.models.params import Params


@dataclass(frozen=True)
class Mediator:
    """A kind of unit.

    Attributes:
        sites: the activations that are swapped together.
        axis: letter of the index within a layer, or "" where a layer has one.
        coordinate: name of that index in result tables.
        windowed: an index stands for a window of adjacent units, whose width the request says; else for one.
        mid: whether the patched residual stream is residual_mid (the layer's MLP still runs) or residual_out.
        by_layer: a layer has enough units for chunks of its own; otherwise layers share chunks.
        rows: the fast form.
        show: what a report draws: "map" (units by layer), "heads", "line" (one value per layer), or "carry" (the same, of something that
            carries all that came before it).
        told: what one such unit is, for captions.
        reads: sites of the base run that the rows need beside those that are swapped, of models that have them.
    """

    sites: tuple[str, ...]
    axis: str
    coordinate: str
    windowed: bool
    mid: bool
    by_layer: bool
    rows: Rows
    show: str
    told: str
    reads: tuple[str, ...] = ()

    def count(self, config: ModelConfig, window: int) -> int:
        """How many units a layer has."""
        size = config.sizes[self.axis] if self.axis else 1
        return -(-size // window) if self.windowed else size

    def width(self, window: int) -> int:
        """How many adjacent elements of the axis a unit has."""
        return window if self.windowed else 1

    def edits(self, config: ModelConfig, source: Mapping[str, np.ndarray], tokens: np.ndarray, picks: Picks, width: int) -> dict[str, Edit]:
        """The same interventions as data: row u of the batch has its own unit swapped.

        Args:
            source: site -> values [L, P, ...] of the source run at the patched tokens.
            tokens: int [P], the patched tokens' places in the base prompt.
        """
        return {site: self._edit(config, np.asarray(source[site]), tokens, picks, width) for site in self.sites}

    def _edit(self, config: ModelConfig, source: np.ndarray, tokens: np.ndarray, picks: Picks, width: int) -> Edit:
        row, layer, index = (np.asarray(x) for x in (np.arange(len(picks.layer)), picks.layer, picks.index))
        if not self.axis:
            at = np.broadcast_arrays(*np.ix_(row, np.arange(len(tokens))))
            unit: Any = ANY
        else:
            at = np.broadcast_arrays(*np.ix_(row, np.arange(len(tokens)), np.arange(width)))
            unit = index[at[0]] * width + at[2]
            kept = unit < config.sizes[self.axis]
            at, unit = [x[kept] for x in at], unit[kept]
        row, token = at[0].ravel(), at[1].ravel()
        values = source[layer[row], token] if not self.axis else source[layer[row], token, unit]
        gate = np.ones((len(row),) + (1,) * (values.ndim - 1), np.float32)
        return Edit(gate, values.astype(np.float32), np.zeros_like(gate), None, where(layer[row], tokens[token], unit, row))


def _module(told: str, mid: bool, *sites: str, show: str = "line") -> Mediator:
    return Mediator(sites, "", "", False, mid, False, module_rows("residual_mid" if mid else "residual_out", *sites), show, told)


def _of_neurons(site: str, told: str, change: Any, *reads: str) -> Mediator:
    """Units that change what a neuron's row of the down projection is multiplied by."""
    return Mediator((site,), "F", OF_NEURON, False, False, True, down_rows(change), "map", told, (*reads, "routing"))


OF_NEURON = "neuron_index"
"""The coordinate of units that each write through one neuron."""
MEDIATORS: dict[str, Mediator] = {
    "neuron": _of_neurons("neuron", "one MLP neuron", neuron_change),
    "gate": _of_neurons("gate", "the gate of one MLP neuron, before its activation", gate_change, "up"),
    "up": _of_neurons("up", "the up branch of one MLP neuron", up_change, "gate"),
    "window": replace(_of_neurons("neuron", "a window of adjacent MLP neurons", neuron_change), coordinate="window_index", windowed=True),
    "head_out": Mediator(("head_out",), "N", "head_index", False, True, False, head_rows, "heads", "one attention head"),
    "attention_out": _module("what attention adds", True, "attention_out"),
    "mlp_out": _module("what the MLP adds", False, "mlp_out"),
    "both_out": _module("what the layer adds: attention and MLP together", False, "attention_out", "mlp_out"),
    "residual_out": _module("the residual stream after the layer", False, "residual_out", show="carry"),
}

Unit = tuple[str, int, int]
"""(mediator, layer, index)."""
EXPERT = ("expert", "expert_neuron")
"""Where a neuron of a mixture is: its expert, and its index within it. `neuron_index` counts expert by expert."""


def units_of(config: ModelConfig) -> tuple[str, ...]:
    """The kinds of units that a model has."""
    return tuple(unit for unit, mediator in MEDIATORS.items() if all(has_site(config.sizes, site) for site in mediator.sites))


def check_units(config: ModelConfig, units: Any) -> tuple[str, ...]:
    """The units as a tuple in the order of `MEDIATORS`.

    Raises:
        UserError: one that is unknown, with the nearest names, or that the model lacks.
    """
    for unit in units:
        if unit not in MEDIATORS:
            raise unknown("unit", unit, MEDIATORS)
        check_sites(config.sizes, MEDIATORS[unit].sites)
    if not units:
        raise UserError(f"Give at least one unit of: {', '.join(units_of(config))}.")
    return tuple(unit for unit in MEDIATORS if unit in units)


def recorded_sites(config: ModelConfig, units: tuple[str, ...], stream: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites that must be recorded in the base run and in the source run; with `stream`, the input of every layer too."""
    swapped = {site for unit in units for site in MEDIATORS[unit].sites}
    base = swapped | {"residual_mid", "residual_out"} | ({"mlp_raw", "attention_raw", "residual_in"} if config.post_norm else set())
    base |= {"residual_in"} if stream else set()
    reads = {site for unit in units for site in MEDIATORS[unit].reads if has_site(config.sizes, site)}
    base |= reads if config.experts else reads - {"routing"}
    always = {"router_logits"} if config.experts else set()
    return tuple(sorted(base | always)), tuple(sorted(swapped | always))


def written(view: View, picks: Picks, rows: jax.Array, mid: jax.Array) -> jax.Array:
    """What the units of patched rows [U,T,D] add to the residual stream: the rows minus the base run's stream where they enter."""
    entered = jnp.where(
        mid[:, None, None], view.at(view.base, "residual_mid", picks.layer), view.at(view.base, "residual_out", picks.layer)
    )
    return rows - entered


@partial(jax.jit, static_argnames=("config", "kinds", "width"))
def patched_rows(
    config: ModelConfig, params: Params, view: View, picks: Picks, kinds: tuple[str, ...], width: int
) -> tuple[jax.Array, jax.Array]:
    """Patched residual streams float32 [U,T,D] of units of any layers, and whether each enters mid-layer, bool [U].

    Args:
        width: neurons of a window.
    """
    mid = jnp.zeros(picks.kind.shape, bool)
    if len(kinds) == 1 and MEDIATORS[kinds[0]].by_layer:  # these leave a row without a unit at base themselves
        return MEDIATORS[kinds[0]].rows(config, params, view, picks, MEDIATORS[kinds[0]].width(width)), mid
    rows = view.at(view.base, "residual_out", picks.layer)
    for number, kind in enumerate(kinds):
        here = picks.kind == number
        rows = jnp.where(here[:, None, None], MEDIATORS[kind].rows(config, params, view, picks, MEDIATORS[kind].width(width)), rows)
        mid = jnp.where(here, MEDIATORS[kind].mid, mid)
    return rows, mid
