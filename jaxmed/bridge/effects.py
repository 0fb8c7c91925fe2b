"""Effects before and after pruning, pair by pair: of the whole difference, of modules, and of the mediating units together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from jaxmed.bridge.job import BridgeJob
from jaxmed.results import open_results
from jaxmed.statistics import group_means, mean_interval, ratio_interval

TOTAL, NEURONS, HEADS, RANDOM_NEURONS = "total", "mediating neurons together", "mediating heads together", "random neurons together"
JOINT = {NEURONS: "neurons", RANDOM_NEURONS: "random", HEADS: "heads"}
"""What -> its sets, one per half of the pairs: a pair is patched with what the other half has chosen."""


def after_rows(job: BridgeJob, tables: dict[str, xr.Dataset], modules: xr.Dataset, out: Path) -> list[dict[str, Any]]:
    """The rows of effects.csv: means before and after pruning, their change and ratio, with intervals over groups of pairs."""
    kept = np.flatnonzero(job.gate.counted)
    groups = modules.group.values[kept]

    def mean(values: np.ndarray) -> np.ndarray:
        return group_means(np.asarray(values, np.float64)[kept, None], groups)[0][:, 0]

    compared = list(_compared(job, tables, modules, out))
    return [_row(what, mean(before), mean(after)) for what, before, after in compared]


def _row(what: str, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {"what": what}
    for name, values in (("before", before), ("after", after), ("change", after - before)):
        low, high = mean_interval(values)
        found |= {name: float(values.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}
    return found | dict(zip(("ratio", "ratio_low", "ratio_high"), ratio_interval(after, before), strict=True))


def _compared(
    job: BridgeJob, tables: dict[str, xr.Dataset], modules: xr.Dataset, out: Path
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(what, effects [P] before, effects [P] after)."""
    before, after, neurons = (open_results(out / name).load() for name in ("before", "after", "after-neurons"))
    layer, halves = job.gate.layout.layer, job.gate.halves
    yield TOTAL, _total(modules), _total(after)
    for what, name in JOINT.items():
        first, second = (np.stack([table.joint.sel(set=f"{name} {half + 1}").values for half in (0, 1)]) for table in (before, after))
        at = halves, np.arange(len(halves))
        yield what, first[at], second[at]
    for kind in ("attention_out", "mlp_out"):
        strongest = int(np.abs(modules[kind].transpose("pair", "layer").values[job.gate.counted].mean(axis=0)).argmax())
        for at in sorted({strongest, layer} if kind == "mlp_out" else {strongest}):
            yield f"{kind} of layer {at}", modules[kind].sel(layer=at).values, after[kind].sel(layer=at).values
    own = tables["neuron"].neuron.sel(layer=layer), neurons.neuron.sel(layer=layer)
    yield f"mean |effect| of a neuron of layer {layer}", _size(own[0]), _size(own[1])
    yield "mean |effect| of a head", _size(tables["head_out"].head_out), _size(after.head_out)


def _total(table: xr.Dataset) -> np.ndarray:
    return (table.source_outcome - table.base_outcome).values


def _size(effects: xr.DataArray) -> np.ndarray:
    values = effects.transpose("pair", ...).values
    return np.abs(values).reshape(len(values), -1).mean(axis=1)
