"""What a screened sweep knows of itself: which effects are exact, and how many of the largest are among them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from jaxmed.reports.style import percent


def screen(table: xr.Dataset) -> list[tuple[str, str]]:
    """Label and value, kind by kind and outcome by outcome; nothing of other sweeps."""
    return [one for name in table.data_vars if "unit" in table[name].attrs for one in _of_unit(table, str(name))]


def _of_unit(table: xr.Dataset, unit: str) -> Iterator[tuple[str, str]]:
    if f"{unit}_verified" not in table:
        return
    exact = verified(table, unit)
    yield f"Computed exactly ({unit})", percent(exact)
    if exact == 1:
        return
    top = table[f"{unit}_recall"].attrs["top"]
    outcomes = [str(name) for name in table["outcome"].values] if "outcome" in table.dims else [""]
    for outcome in outcomes:
        mean, low, _ = ((one.sel(outcome=outcome) if outcome else one).values for one in _recalls(table, unit))
        about = f", {outcome}" if outcome else ""
        if not np.isfinite(mean).any():
            yield f"Of the {top} largest of a pair ({unit}{about})", "not known: too few exact effects. Raise --budget"
            continue
        expected, worst, lower, least = (percent(float(one)) for one in (np.nanmean(mean), np.nanmin(mean), np.mean(low), np.min(low)))
        yield (
            f"Of the {top} largest of a pair, computed ({unit}{about})",
            f"{expected} expected, {worst} in the worst pair; lower end of the pairs' 95 % intervals {lower} on average, {least} at worst "
            "(errors of unseen units are extrapolated)",
        )


def verified(table: xr.Dataset, unit: str) -> float:
    """The part of a kind's effects, of finished chunks, that is exact."""
    done = table["done"].values.astype(bool)
    of, places = table[f"{unit}_verified"].transpose("pair", "layer", ...), table[f"{unit}_estimate"]
    places = places.isel(outcome=0) if "outcome" in places.dims else places
    places = places.transpose("pair", "layer", ...)
    counts = [(int(of[pair].values[one].sum()), int(np.isfinite(places[pair].values[one]).sum())) for pair, one in enumerate(done)]
    exact, every = np.sum(counts, axis=0)
    return float(exact / every) if every else 0.0


def _recalls(table: xr.Dataset, unit: str) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    pairs = table["done"].values.astype(bool).any(1)
    return tuple(table[f"{unit}_{end}"].isel(pair=np.flatnonzero(pairs)) for end in ("recall", "recall_low", "recall_high"))  # type: ignore[return-value]
