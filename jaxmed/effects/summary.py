"""After a sweep: statistics into the table, ranked units into `top.csv`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from jaxmed import results, statistics
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.effects.ranking import name_tokens, noise_floor, ranked, write_top
from jaxmed.effects.table import ESTIMATE, PROBABILITY, TOGETHER
from jaxmed.effects.unit_blocks import Sampled, UnitBlocks
from jaxmed.errors import NOT_FINITE, notice
from jaxmed.hosts import leads, wait_for_all
from jaxmed.models.model import Model
from jaxmed.runs.folder import RunFolder, hold, read_run
from jaxmed.runs.legal import MADE, digests_of

NULL = "paraphrase"
"""The `control` of pairs whose sides say the same in other words: null pairs, whose effects set the margin."""


def summarise(folder: Path, model: Model | None = None, top: int = 50, seed: int = 0, by: str = "") -> xr.Dataset:
    """Adds statistics and the noise floor to the table in `folder`, writes top.csv, and returns the table, lazily read.

    Effects are read a block of units at a time: memory holds the statistics, and what `UnitBlocks` reads at once.

    Args:
        model: for the tokens promoted; without it, those columns are left out.
        top: rows per unit and outcome, and per category.
        by: "category": statistics and rows of every category of pairs too.

    Raises:
        UserError: a table that is damaged.
    """
    table = results.open_results(folder)
    parts, null = _parts(table, by), _null_pairs(table)
    rows: list[dict[str, Any]] = []
    noise = noise_floor(table)
    added: dict[str, Any] = {"noise_floor": (noise.dims, noise.values, {})} if "base_lowest" in table else {}
    for unit in swept_variables(table):
        found: dict[str, list[xr.Dataset]] = {}
        for category, pairs in parts.items():
            for outcome, effects in _outcomes(table, unit):
                of_pairs = _statistics(table, effects, pairs, null, seed, _sampled(table, unit, outcome))
                found.setdefault(category, []).append(of_pairs.assign_attrs(unit=unit, outcome=outcome, category=category))
                rows += ranked(table, effects, found[category][-1], pairs, top)
        added |= dict(_variables(unit, found, "outcome" in table[unit].dims))
    name_tokens(rows, model)
    if wrong := results.not_finite(table):
        notice(f"{folder}: not finite in {', '.join(f'{count} (pair, layer) of {name}' for name, count in wrong.items())}. {NOT_FINITE}")
    wait_for_all("statistics are known")
    if leads():
        with hold(folder):
            results.append(folder, added)
            write_top(folder, rows)
            RunFolder(folder, read_run(folder), True).note(not_finite=wrong, **{MADE: digests_of(folder, [results.TOP])})
    wait_for_all("statistics are written")
    return results.open_results(folder, check=False)


def swept_variables(table: xr.Dataset) -> list[str]:
    """The variables that hold effects: those that say which mediator they are of."""
    found = [str(name) for name in table.data_vars if "unit" in table[name].attrs]
    order = [*MEDIATORS, *TOGETHER]
    return sorted(found, key=lambda name: (order.index(table[name].attrs["unit"]), len(name)))


def _parts(table: xr.Dataset, by: str) -> dict[str, np.ndarray]:
    """Category -> indices of its pairs, control pairs left out where there are others; "" is all of them."""
    counted = table.control.values == "" if (table.control.values == "").any() else np.ones(table.sizes["pair"], bool)
    names = list(dict.fromkeys(map(str, table.category.values[counted]))) if by else []
    return {name: np.flatnonzero(counted & (table.category.values == name if name else True)) for name in ("", *filter(None, names))}


def _null_pairs(table: xr.Dataset) -> np.ndarray:
    """Indices of the control pairs in which nothing is to happen, where other pairs are counted."""
    control = table.control.values
    return np.flatnonzero((control == NULL) & (control == "").any())


def _outcomes(table: xr.Dataset, unit: str) -> Iterator[tuple[str, xr.DataArray]]:
    """(outcome, effects with the axis `pair` first), not read yet."""
    if "outcome" not in table[unit].dims:
        yield table.attrs["outcome"], table[unit]
        return
    for outcome in map(str, table.outcome.values):
        yield outcome, table[unit].sel(outcome=outcome)


def _sampled(table: xr.Dataset, unit: str, outcome: str) -> Sampled | None:
    """Estimates and probabilities of a unit's effects, of a screened sweep."""
    if f"{unit}_{PROBABILITY}" not in table:
        return None
    estimate = table[f"{unit}_{ESTIMATE}"]
    return estimate.sel(outcome=outcome) if "outcome" in estimate.dims else estimate, table[f"{unit}_{PROBABILITY}"]


def _statistics(
    table: xr.Dataset, effects: xr.DataArray, pairs: np.ndarray, null: np.ndarray, seed: int, sampled: Sampled | None
) -> xr.Dataset:
    """Statistics of one unit kind and outcome over some pairs, against the margin of the null pairs where there are some."""
    groups, margin = table.group.values, float("nan")
    if len(null):
        margin = statistics.null_margin(UnitBlocks(effects, null, sampled), groups[null], len(np.unique(groups[pairs])))
    found = statistics.summarise(UnitBlocks(effects, pairs, sampled), groups[pairs], table.split.values[pairs], seed=seed, margin=margin)
    fields = {"mean": found.mean, "ci_low": found.low, "ci_high": found.high, "t": found.t}
    fields |= {"p": found.p, "p_adjusted": found.p_adjusted, "q": found.q}
    fields |= {"p_margin": found.p_margin} if found.p_margin is not None else {}
    coords = {name: effects.coords[name] for name in effects.dims if name != "pair"}
    coords |= {name: effects.coords[name] for name in effects.coords if {*effects.coords[name].dims} <= {*effects.dims[1:]}}
    arrays = {name: (effects.dims[1:], values.reshape(effects.shape[1:])) for name, values in fields.items()}
    attributes = {"interval": found.interval, "smallest_p": found.smallest_p, "ranked": statistics.ranked_by(found.smallest_p)}
    return xr.Dataset(arrays, coords=coords, attrs={**attributes, "told": _told(found, margin, len(np.unique(groups[null])))})


def _told(found: statistics.Summary, margin: float, null_groups: int) -> dict[str, float]:
    """What holds for a unit kind as a whole, of one outcome: attributes of the mean, those alone that are known."""
    told: dict[str, float] = {f"top{k}_jaccard": value for k, value in found.stability.items()}
    if found.replication is not None:
        told |= {"picked": found.replication.picked, "replicated": found.replication.replicated}
    return told | ({"margin": margin, "null_groups": null_groups} if found.p_margin is not None else {})


def _variables(
    unit: str, found: dict[str, list[xr.Dataset]], outcomes: bool
) -> Iterator[tuple[str, tuple[Any, np.ndarray, dict[str, Any]]]]:
    """The statistics of a unit as variables of the table, and those of its categories with `by_category` as their first axis.

    Args:
        found: category -> statistics of every outcome; "" is all pairs.
        outcomes: whether they are the rows of an axis `outcome`.
    """
    whole, categories = found[""], [name for name in found if name]
    about = {name: whole[0].attrs[name] for name in ("interval", "smallest_p", "ranked")} | _by_outcome(whole)
    for name in whole[0].data_vars:
        if not all(name in one for of_pairs in found.values() for one in of_pairs):
            continue
        dims = (*(["outcome"] if outcomes else []), *whole[0][name].dims)
        stacked = {
            category: np.stack([one[name].values for one in of_pairs]) if outcomes else of_pairs[0][name].values
            for category, of_pairs in found.items()
        }
        yield f"{unit}_{name}", (dims, stacked[""], about if name == "mean" else {})
        if categories:
            told = {"by_category": categories} | (
                {"of_categories": [_by_outcome(found[one]) for one in categories]} if name == "mean" else {}
            )
            yield f"{unit}_by_category_{name}", (("by_category", *dims), np.stack([stacked[one] for one in categories]), told)


def _by_outcome(found: list[xr.Dataset]) -> dict[str, list[float]]:
    """`_told` of every outcome, one list per name; names that all of them have."""
    told = [one.attrs["told"] for one in found]
    return {name: [one[name] for one in told] for name in told[0] if all(name in one for one in told)}
