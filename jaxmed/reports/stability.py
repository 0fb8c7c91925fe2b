"""What holds for the ranking of a unit kind as a whole: overlap of its top between resamples, replication, the margin of null pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xarray as xr

from jaxmed.reports.style import number

TOP = (10, 100)


def stability(table: xr.Dataset) -> list[tuple[str, str]]:
    """Label and value of what the attributes of the means say; only what the table has."""
    means = {str(name)[: -len("_mean")]: one.attrs for name, one in table.data_vars.items() if "ranked" in one.attrs}
    outcomes = [str(name) for name in table["outcome"].values] if "outcome" in table.dims else [""]
    found = [
        *((f"First {k} kept in resamples", _line(means, outcomes, (f"top{k}_jaccard",), "{}")) for k in TOP),
        ("Replicated in held-out groups", _line(means, outcomes, ("replicated", "picked"), "{} of {}")),
        ("Margin of null pairs", _line(means, outcomes, ("margin",), "{}")),
    ]
    return [(label, line) for label, line in found if line]


def _line(means: Mapping[str, Mapping[str, Any]], outcomes: list[str], names: tuple[str, ...], text: str) -> str:
    """One kind of unit after the other, each with the numbers of its outcomes."""
    return "; ".join(f"{unit} {', '.join(_numbers(told, outcomes, names, text))}" for unit, told in means.items() if {*names} <= {*told})


def _numbers(told: Mapping[str, Any], outcomes: list[str], names: tuple[str, ...], text: str) -> Iterator[str]:
    for at, outcome in enumerate(outcomes):
        values = [told[name][at] for name in names]
        shown = text.format(*(f"{one:,}" if isinstance(one, int | np.integer) else number(one) for one in values))
        yield f"{shown} ({outcome})" if outcome else shown
