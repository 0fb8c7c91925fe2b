"""After a sweep: statistics into the table, ranked units into `top.csv`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from jaxmed import results, statistics
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.effects.ranking import name_tokens, ranked, write_top
from jaxmed.effects.table import TOGETHER
from jaxmed.errors import notice
from jaxmed.models.model import Model
from jaxmed.results import NOT_FINITE
from jaxmed.runs.folder import RunFolder, hold, read_run


def summarise(folder: Path, model: Model | None = None, top: int = 50, seed: int = 0, by: str = "") -> xr.Dataset:
    """Adds statistics and the noise floor to the table in `folder`, writes top.csv, and returns the table.

    Args:
        model: for the tokens promoted; without it, those columns are left out.
        top: rows per unit and outcome, and per category.
        by: "category": statistics and rows of every category of pairs too.

    Raises:
        UserError: a table that is damaged.
    """
    table = results.open_results(folder).load()
    parts = _parts(table, by)
    rows: list[dict[str, Any]] = []
    added: dict[str, Any] = {"noise_floor": _noise(table)}
    for unit in swept_variables(table):
        stacked = table[unit] if "outcome" in table[unit].dims else table[unit].expand_dims(outcome=[table.attrs["outcome"]])
        found = []
        for category, pairs in parts.items():
            of_outcomes = []
            for outcome in map(str, stacked.outcome.values):
                effects = stacked.sel(outcome=outcome)
                of_outcomes.append(_statistics(table, effects, pairs, seed).assign_attrs(unit=unit, outcome=outcome, category=category))
                rows += ranked(table, effects, of_outcomes[-1], pairs, top)
            found.append(xr.concat(of_outcomes, "outcome") if "outcome" in table[unit].dims else of_outcomes[0])
        added |= dict(_variables(unit, found))
    name_tokens(rows, model)
    if wrong := results.not_finite(table):
        notice(f"{folder}: not finite in {', '.join(f'{count} (pair, layer) of {name}' for name, count in wrong.items())}. {NOT_FINITE}")
    with hold(folder):
        results.append(folder, added)
        write_top(folder, rows)
        RunFolder(folder, read_run(folder), True).note(not_finite=wrong)
    return results.open_results(folder, check=False).load()


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


def _noise(table: xr.Dataset) -> tuple[Any, np.ndarray, dict[str, Any]]:
    highest = np.maximum(table.base_highest.max("layer"), table.base_outcome)  # the full forward is one more way to the same number
    noise = highest - np.minimum(table.base_lowest.min("layer"), table.base_outcome)
    return noise.dims, noise.values, {}


def _statistics(table: xr.Dataset, effects: xr.DataArray, pairs: np.ndarray, seed: int) -> xr.Dataset:
    """Statistics of one unit kind and outcome over some pairs."""
    effects = effects.isel(pair=pairs).transpose("pair", ...)
    shape = effects.shape[1:]
    found = statistics.summarise(effects.values.reshape(len(pairs), -1), table.group.values[pairs], table.split.values[pairs], seed=seed)
    fields = {"mean": found.mean, "ci_low": found.low, "ci_high": found.high, "t": found.t}
    fields |= {"p": found.p, "p_adjusted": found.p_adjusted, "q": found.q}
    coords = {name: effects.coords[name] for name in effects.dims if name != "pair"}
    coords |= {name: effects.coords[name] for name in effects.coords if {*effects.coords[name].dims} <= {*effects.dims[1:]}}
    arrays = {name: (effects.dims[1:], values.reshape(shape)) for name, values in fields.items()}
    attributes = {"interval": found.interval, "smallest_p": found.smallest_p, "ranked": statistics.ranked_by(found.smallest_p)}
    return xr.Dataset(arrays, coords=coords, attrs=attributes)


def _variables(unit: str, found: list[xr.Dataset]) -> Iterator[tuple[str, tuple[Any, np.ndarray, dict[str, Any]]]]:
    """The statistics of a unit as variables of the table, and those of its categories with `by_category` as their first axis."""
    told = {name: found[0].attrs[name] for name in ("interval", "smallest_p", "ranked")}
    for name in found[0].data_vars:
        whole = found[0][name]
        yield f"{unit}_{name}", (whole.dims, whole.values, told if name == "mean" else {})
        if len(found) > 1:
            names = {"by_category": [part.attrs["category"] for part in found[1:]]}
            yield f"{unit}_by_category_{name}", (("by_category", *whole.dims), np.stack([part[name].values for part in found[1:]]), names)
