"""A saved run as the page sees it: what was swept, means over pairs, totals. Reads lazily; partial runs are welcome."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from jaxmed import results
from jaxmed.files import read_csv
from jaxmed.runs.folder import read_run
from jaxmed.runs.legal import MADE, check_tables

HELD = 2**29  # bytes of a table that is read whole; a larger one is read piece by piece
_DRAWN = ("map", "heads", "line", "carry")
_SHARED = {"outcome", "pair", "layer", "position"}
_NO_EFFECTS = ("done", "base_lowest", "base_highest", "routing_margin")
"""Variables by pair and layer that are about a run, not effects."""


@dataclass(frozen=True)
class Record:
    """One run folder. `table` may be lazily read; `run` is run.json; `top` the rows of top.csv (None without the file)."""

    folder: Path
    table: xr.Dataset
    run: dict[str, Any]
    top: list[dict[str, str]] | None

    @property
    def manifest(self) -> dict[str, Any]:
        return self.run.get("manifest", {})

    @property
    def request(self) -> dict[str, Any]:
        return self.manifest.get("request", {})

    @property
    def values(self) -> str:
        """What the table holds: "exact effects", or estimates."""
        return str(self.table.attrs.get("values", "exact effects"))

    @property
    def exact(self) -> bool:
        """Whether effects were computed and not estimated."""
        return self.table.attrs.get("method", "exact") == "exact"

    @property
    def screened(self) -> bool:
        """Whether the values are exact where they matter and estimates elsewhere."""
        return self.table.attrs.get("method") == "screened"

    @property
    def units(self) -> list[str]:
        """The variables that hold effects, in the order in which they are drawn."""
        swept = [
            str(name) for name, array in self.table.data_vars.items() if {"pair", "layer"} <= set(array.dims) and "of" not in array.attrs
        ]
        return sorted((name for name in swept if name not in _NO_EFFECTS), key=lambda name: (_DRAWN.index(shows(self.table[name])), name))

    def shown(self, *how: str) -> list[str]:
        """The variables that are drawn in these ways: "map", "heads", "line", "carry"."""
        return [unit for unit in self.units if shows(self.table[unit]) in how]

    @property
    def outcomes(self) -> list[str]:
        if "outcome" in self.table.dims:
            return [str(name) for name in self.table["outcome"].values]
        return [str(name) for name in self.request.get("outcomes", [])][:1] or ["outcome"]

    @property
    def layers(self) -> list[int]:
        """Layers that the run asked for."""
        return list(self.manifest.get("layers", self.table["layer"].values.tolist()))


def shows(effects: xr.DataArray) -> str:
    """How a variable is drawn: as it says itself, or, in tables of earlier versions, as its axes suggest."""
    if "show" in effects.attrs:
        return effects.attrs["show"]
    index = {str(dim) for dim in effects.dims} - _SHARED
    whole = "carry" if effects.name == "residual_out" else "line"
    return "heads" if index == {"head_index"} else "map" if index else whole


def read(folder: Path) -> Record:
    """The run saved in `folder`.

    Raises:
        UserError: no table, or no readable run.json there; something of it is damaged.
    """
    table, run, file = results.open_results(folder), read_run(folder), folder / results.TOP
    check_tables(folder, run, MADE, all_there=True)
    table = table.load() if table.nbytes < HELD else table
    top = read_csv(file) if file.is_file() else None
    return Record(folder, table, run, [_renamed(row) for row in top] if top is not None else None)


def _renamed(row: dict[str, str]) -> dict[str, str]:
    """A row of top.csv; what earlier versions called p was adjusted over all units."""
    return row if "p_adjusted" in row or "p" not in row else {**row, "p_adjusted": row["p"], "p": ""}


def labels(record: Record, name: str) -> np.ndarray:
    """A text coordinate of the pairs (category, group, split, control), str [pair]; empty texts where the table lacks it."""
    if name in record.table:
        return np.asarray(record.table[name].values, str)
    return np.asarray([""] * record.table.sizes["pair"])


def finished_chunks(record: Record) -> np.ndarray:
    """bool [pair, layer asked for]: what is committed."""
    return record.table["done"].sel(layer=record.layers).values.astype(bool)


def is_partial(record: Record) -> bool:
    """Whether some (pair, layer) is still to do."""
    return not bool(finished_chunks(record).all())


def used_pairs(record: Record) -> np.ndarray:
    """Indices of the pairs that means are taken over: not controls (where there are others), every layer done.

    In a partial run with no pair done in full: the pairs that were begun.
    """
    control, done = labels(record, "control"), finished_chunks(record)
    kept = control == "" if (control == "").any() else np.ones(len(control), bool)
    whole = kept & done.all(axis=1)
    return np.flatnonzero(whole if whole.any() else kept & done.any(axis=1))


def index_axis(record: Record, unit: str) -> str:
    """Name of the unit's index dimension; "" where a layer has one such unit."""
    return next((str(dim) for dim in record.table[unit].dims if dim not in _SHARED), "")


def select(array: xr.DataArray, outcome: str) -> xr.DataArray:
    """One outcome of a variable; the variable itself where the run has one outcome."""
    return array.sel(outcome=outcome) if "outcome" in array.dims else array


def statistic(record: Record, unit: str, outcome: str, field: str) -> xr.DataArray | None:
    """A stored statistic [layer, ...], or None where there is none (partial runs have none to trust)."""
    if f"{unit}_p_adjusted" not in record.table:  # what earlier versions called p was adjusted over all units
        field = {"p_adjusted": "p", "p": "p_adjusted"}.get(field, field)
    name = f"{unit}_{field}"
    if name not in record.table or is_partial(record):
        return None
    return select(record.table[name], outcome).load()


def mean_effect(record: Record, unit: str, outcome: str) -> xr.DataArray:
    """Mean over groups of the group's mean effect, [layer, ...]; NaN where a group lacks a value."""
    stored = statistic(record, unit, outcome, "mean")
    if stored is not None:
        return stored
    effects, used = select(record.table[unit], outcome), used_pairs(record)
    groups = labels(record, "group")[used]
    names = list(dict.fromkeys(groups))
    empty = xr.full_like(effects.isel(pair=0, drop=True), np.nan)
    means = (effects.isel(pair=used[groups == name]).mean("pair", skipna=False) for name in names)  # one group in memory at a time
    return sum(means) / len(names) if names else empty  # type: ignore[return-value]


def swept(mean: xr.DataArray) -> xr.DataArray:
    """The layers of a mean effect that hold any number."""
    known = np.isfinite(mean.transpose("layer", ...).values)
    return mean.isel(layer=np.flatnonzero(known.reshape(len(known), -1).any(axis=1)))


def totals(record: Record, outcome: str) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of base and source, float [pair]; NaN where not computed yet."""
    base, source = (select(record.table[name], outcome).values.astype(float) for name in ("base_outcome", "source_outcome"))
    return base, source


def mean_total(record: Record, outcome: str) -> float:
    """Mean total over groups, y(source) - y(base), of the pairs that means are taken over; NaN without any."""
    base, source = totals(record, outcome)
    used = used_pairs(record)
    total, groups = (source - base)[used], labels(record, "group")[used]
    return float(np.mean([total[groups == name].mean() for name in dict.fromkeys(groups)])) if len(used) else float("nan")


def shared_total(record: Record, outcome: str) -> float:
    """The mean total that effects are a share of; NaN where it is not above the noise floor."""
    total = mean_total(record, outcome)
    return total if abs(total) > np.nan_to_num(noise_floor(record, outcome)) else float("nan")


def noise_floor(record: Record, outcome: str) -> float:
    """Largest spread over a pair's base outcomes, max over pairs; NaN where nothing is done."""
    if "noise_floor" in record.table and not is_partial(record):
        stored = select(record.table["noise_floor"], outcome).values
        return float(np.nanmax(stored)) if np.isfinite(stored).any() else float("nan")
    if "base_lowest" not in record.table:  # estimates have none
        return float("nan")
    low, high = (select(record.table[name], outcome) for name in ("base_lowest", "base_highest"))
    spread = (high.max("layer") - low.min("layer")).values
    return float(np.nanmax(spread)) if np.isfinite(spread).any() else float("nan")
