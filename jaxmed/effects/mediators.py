"""Mediators: what can be patched, and the residual stream that each patch leaves at its layer.

A new granularity is one row of `MEDIATORS`. A row says the same intervention twice: `rows` is the fast form, one vector per unit, and
`edits` is the same as data for any run (sets, generation, gradients, oracles). A property test holds the two equal for every family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.errors import UserError, unknown
from jaxmed.interventions.edits import ANY, Edit, where
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import contract, normalise
from jaxmed.models.transformer import Params, matrix_rows

Record = dict[str, jax.Array]
"""Site -> activations [L, W, ...] of one run, at the columns of a window."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """What both runs left at the columns of one window.

    Attributes:
        base, source: their records; the source's columns are aligned to the base's.
        slots: int [T], which recorded columns the window has.
        patched: bool [T], the columns where values are swapped.
    """

    base: Record
    source: Record
    slots: Any
    patched: Any

    def at(self, record: Record, site: str, layer: jax.Array) -> jax.Array:
        """A site of one run at layers int [U]: float32 [U,T,...]."""
        return record[site][layer[:, None], self.slots[None]].astype(jnp.float32)

    def change(self, site: str, layer: jax.Array) -> jax.Array:
        """Source minus base where values are swapped, zero elsewhere: [U,T,D]."""
        change = self.at(self.source, site, layer) - self.at(self.base, site, layer)
        return jnp.where(self.patched[None, :, None], change, 0.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Picks:
    """The units of a chunk's rows: int [U] each. `kind` indexes the chunk's mediators (-1: the row stays at base)."""

    kind: Any
    layer: Any
    index: Any


Rows = Callable[[ModelConfig, Params, View, Picks, int], jax.Array]
"""(config, params, view, picks, width) -> the patched residual stream at its entry, float32 [U,T,D]."""


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


def after_module(config: ModelConfig, params: Params, view: View, picks: Picks, module: str, change: jax.Array) -> jax.Array:
    """The residual stream behind a module ("attention" or "mlp") whose raw output changes by `change` [U,T,D]."""
    before, after = {"attention": ("residual_in", "residual_mid"), "mlp": ("residual_mid", "residual_out")}[module]
    if not config.post_norm:
        return view.at(view.base, after, picks.layer) + change * config.residual_scale
    raw = view.at(view.base, f"{module}_raw", picks.layer) + change
    name = f"{module}_post_norm"
    scale, bias = (params["blocks"].get(n) for n in (name, name + "_bias"))
    normed = normalise(config, raw, scale[picks.layer][:, None], None if bias is None else bias[picks.layer][:, None])
    return view.at(view.base, before, picks.layer) + normed * config.residual_scale


def _neuron_rows(config: ModelConfig, params: Params, view: View, picks: Picks, width: int) -> jax.Array:
    """Neuron j changes the MLP's output by `delta_j * W_down[j]`: no MLP matmul is run again. In a mixture of experts that is times the
    weight of j's expert in the base run, where routing at this layer stays as it was; later layers route anew."""
    index = picks.index[:, None] * width + jnp.arange(width)[None]
    valid = (picks.kind >= 0)[:, None] & (index < config.neurons)
    index = jnp.clip(index, 0, config.neurons - 1)
    layer, slots = picks.layer[:, None, None], view.slots[None, :, None]
    values = [record["neuron"][layer, slots, index[:, None]].astype(jnp.float32) for record in (view.source, view.base)]
    delta = values[0] - values[1]  # [U, T, w]
    if config.experts:
        delta = delta * view.base["routing"][layer, slots, index[:, None] // config.sizes["M"]]
    delta = jnp.where(view.patched[None, :, None] & valid[:, None], delta, 0.0)
    vectors = matrix_rows(config, params, "down", picks.layer[:, None], index)  # [U, w, D]
    return after_module(config, params, view, picks, "mlp", jnp.einsum("UTw,UwD->UTD", delta, vectors, precision="highest"))


def _head_rows(config: ModelConfig, params: Params, view: View, picks: Picks, width: int) -> jax.Array:
    """Head n changes the output projection by `delta_n @ W_O[n]`."""
    del width
    at = picks.layer[:, None], view.slots[None], picks.index[:, None]
    values = [record["head_out"][at].astype(jnp.float32) for record in (view.source, view.base)]
    delta = jnp.where(view.patched[None, :, None], values[0] - values[1], 0.0)  # [U, T, H]
    change = contract("UTH,UHD->UTD", delta, matrix_rows(config, params, "out", picks.layer, picks.index))
    return after_module(config, params, view, picks, "attention", change)


def _module_rows(entry: str, *sites: str) -> Rows:
    """What whole modules add: the stream at `entry` plus the sites' changes."""

    def rows(config: ModelConfig, params: Params, view: View, picks: Picks, width: int) -> jax.Array:
        del config, params, width
        return view.at(view.base, entry, picks.layer) + sum(view.change(site, picks.layer) for site in sites)

    return rows


def _module(told: str, mid: bool, *sites: str, show: str = "line") -> Mediator:
    return Mediator(sites, "", "", False, mid, False, _module_rows("residual_mid" if mid else "residual_out", *sites), show, told)


MEDIATORS: dict[str, Mediator] = {
    "neuron": Mediator(("neuron",), "F", "neuron_index", False, False, True, _neuron_rows, "map", "one MLP neuron"),
    "window": Mediator(("neuron",), "F", "window_index", True, False, True, _neuron_rows, "map", "a window of adjacent MLP neurons"),
    "head_out": Mediator(("head_out",), "N", "head_index", False, True, False, _head_rows, "heads", "one attention head"),
    "attention_out": _module("what attention adds", True, "attention_out"),
    "mlp_out": _module("what the MLP adds", False, "mlp_out"),
    "both_out": _module("what the layer adds: attention and MLP together", False, "attention_out", "mlp_out"),
    "residual_out": _module("the residual stream after the layer", False, "residual_out", show="carry"),
}

Unit = tuple[str, int, int]
"""(mediator, layer, index)."""
EXPERT = ("expert", "expert_neuron")
"""Where a neuron of a mixture is: its expert, and its index within it. `neuron_index` counts expert by expert."""


def check_units(units: Any) -> tuple[str, ...]:
    """The units as a tuple in the order of `MEDIATORS`; a UserError with the nearest names where one is unknown."""
    for unit in units:
        if unit not in MEDIATORS:
            raise unknown("unit", unit, MEDIATORS)
    if not units:
        raise UserError(f"Give at least one unit of: {', '.join(MEDIATORS)}.")
    return tuple(unit for unit in MEDIATORS if unit in units)


def recorded_sites(config: ModelConfig, units: tuple[str, ...], stream: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites that must be recorded in the base run and in the source run; with `stream`, the input of every layer too."""
    swapped = {site for unit in units for site in MEDIATORS[unit].sites}
    base = swapped | {"residual_mid", "residual_out"} | ({"mlp_raw", "attention_raw", "residual_in"} if config.post_norm else set())
    base |= {"residual_in"} if stream else set()
    base |= {"routing"} if config.experts and "neuron" in swapped else set()
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
