"""Which figures a run has."""

from __future__ import annotations

import numpy as np

from jaxmed.reports.lines import ends, profile
from jaxmed.reports.maps import head_map, position_map, unit_map
from jaxmed.reports.record import Record, mean_effect, totals
from jaxmed.reports.style import Figure

MOST_COLUMNS = 2048
MOST_CELLS = 60_000  # of all neuron maps of a page: about 9 bytes each, in pages of 3 MB at most, of which plotly.js is 2


def columns(records: list[Record]) -> int:
    """Columns that a neuron map may have, so that all maps of a page together stay small."""
    rows = sum(len(record.outcomes) * len(record.layers) for record in records for _ in record.shown("map"))
    return int(np.clip(MOST_CELLS // max(rows, 1), 64, MOST_COLUMNS))


def figures(record: Record, outcome: str, columns: int) -> list[Figure]:
    """All figures of one outcome of a run, in reading order; what holds no number yet is left out."""
    units = [unit for unit in record.units if np.isfinite(mean_effect(record, unit, outcome)).any()]
    if "position" in record.table.dims:
        found = [position_map(record, unit, outcome) for unit in units]
    else:
        found = [unit_map(record, unit, outcome, columns) for unit in record.shown("map") if unit in units]
        found += [profile(record, outcome)] if set(record.shown("line", "carry")) & set(units) else []
        found += [head_map(record, unit, outcome) for unit in record.shown("heads") if unit in units]
    return [*found, ends(record, outcome)] if np.isfinite(np.sum(totals(record, outcome), axis=0)).any() else found
