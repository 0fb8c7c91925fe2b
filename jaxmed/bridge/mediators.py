"""Which units mediate: single neurons and heads by their mean effects, from the table of a sweep."""

from __future__ import annotations

import numpy as np
import xarray as xr

from jaxmed.errors import UserError
from jaxmed.statistics import group_means

Effects = dict[tuple[str, int], np.ndarray]
"""(kind of unit, layer) -> mean effects float64 [U], positive in the direction of the mean total."""
UNITS = {"neuron": "neurons", "head_out": "heads"}
MOST_PART = 8
"""Mediating units are an eighth of the units at most, and one at least."""


def single_effects(table: xr.Dataset, pairs: np.ndarray | None = None) -> Effects:
    """Mean effects of single neurons and heads over groups of pairs, of a sweep's table.

    Args:
        pairs: numbers of the pairs that count; default: all that are no controls.

    Raises:
        UserError: a table without neurons and heads, of several outcomes, or position by position.
    """
    kinds = [kind for kind in UNITS if kind in table]
    if not kinds or any(set(table[kind].dims) & {"outcome", "position"} for kind in kinds):
        raise UserError("Give a sweep's table of single neurons or heads (units neuron, head_out), of one outcome and one place.")
    kept = np.flatnonzero(table.control.values == "") if pairs is None else pairs
    groups = table.group.values[kept]
    total = group_means((table.source_outcome - table.base_outcome).values[kept, None], groups)[0].mean()
    sign, found = -1.0 if total < 0 else 1.0, {}
    for kind in kinds:
        for layer in table.layer.values:
            effects = table[kind].sel(layer=layer).transpose("pair", ...).values[kept]
            if np.isfinite(effects).all():
                found[kind, int(layer)] = sign * group_means(effects, groups)[0].mean(axis=0)
    return found


def strongest(effects: Effects, most: int) -> dict[tuple[str, int], np.ndarray]:
    """The mediating units of every layer, int [k], by their effects: the first `most`, and an eighth of the units at most; of neurons in
    each layer, of heads in all layers together."""
    found = {place: _first(one, most) for place, one in effects.items() if place[0] == "neuron"}
    heads = [place for place in effects if place[0] != "neuron"]
    if heads:
        chosen, first = np.sort(_first(np.concatenate([effects[place] for place in heads]), most)), 0
        for place in heads:
            inside = (chosen >= first) & (chosen < first + len(effects[place]))
            found[place], first = chosen[inside] - first, first + len(effects[place])
    return found


def _first(effects: np.ndarray, most: int) -> np.ndarray:
    return np.argsort(-effects, kind="stable")[: max(1, min(most, len(effects) // MOST_PART))]
