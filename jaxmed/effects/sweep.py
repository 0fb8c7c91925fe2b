"""The sweep: every unit of every layer of every pair, written as it goes, resumable at any point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed import results
from jaxmed.effects.exact import Prepared, Values, Window, module_values, neuron_values, open_window, prepare
from jaxmed.effects.job import Job, coordinates, layer_effects, layer_flops, manifest, plan, variables
from jaxmed.effects.outcomes import Readout, outcome_name
from jaxmed.effects.units import UNITS, units_per_layer
from jaxmed.runs.folder import RunFolder
from jaxmed.runs.watch import RESUMED, Watch, silent


def run(job: Job, out: Path, resume: bool = False, report: Watch = silent, rate: float | None = None) -> None:
    """Runs a job into `out`. What is finished is on disk at every moment; an interrupted run goes on with `resume`.

    Raises:
        UserError: `out` holds something else, a run without `resume`, or a run of another request; it is in use, or has no room; a
            finished table that is damaged (what is damaged is computed when the run is resumed again).
    """
    planned = plan(job, rate)
    with RunFolder.open(out, manifest(job), resume, results.LEGAL, planned.disk + 1_000_000, ("chunk",)) as folder:
        job = replace(job, chunk=dict(folder.manifest["chunk"]))  # of a resumed run, the one it began with
        if not folder.continues:
            attributes = {"position": str(job.request.position), "window": job.request.window, "model": job.model.name}
            attributes["outcome"] = ", ".join(outcome_name(outcome) for outcome in job.request.outcomes)
            results.create(out, variables(job), coordinates(job), attributes)
            folder.record["plan"] = {k: v for k, v in asdict(planned).items() if k != "chunk"}
        with folder.session() as session:
            results.mend(folder)
            session.count(passes=0, layers=0)
            for done in _steps(job, results.Table(out), report):
                session.count(**done)
            folder.record |= _near_ties(job, out)


def _steps(job: Job, table: results.Table, report: Watch) -> Iterator[dict[str, int]]:
    """Runs what is not done yet; yields what was done after every layer."""
    done = table.done()
    for number, pair in enumerate(job.pairs):
        todo = [layer for layer in job.layers if not done[number, layer]]
        for layer in set(job.layers) - set(todo):
            report(layer_flops(job, number, layer), layer_effects(job, number), RESUMED)
        if not todo:
            continue
        prepared = prepare(job.model, pair, job.request.outcomes, job.request.units, job.request.position, job.request.form)
        _write_ends(table, number, prepared)
        windows = [open_window(prepared, patch) for patch in job.patches[number]]
        modules, passes = _modules(job, prepared, windows, todo)
        pending: tuple[int, Any] | None = None
        for layer in [*todo, None]:  # one layer is computed while the one before is written
            ahead = None if layer is None else (layer, _dispatch(job, prepared, windows, layer))
            if pending is not None:
                passes += _commit(job, table, number, pending, modules)
                report(layer_flops(job, number, pending[0]), layer_effects(job, number), pair.id)
                yield {"passes": passes, "layers": 1}
                passes = 0
            pending = ahead


def _near_ties(job: Job, out: Path) -> dict[str, Any]:
    """The entry of run.json on near-tied routing; empty without experts."""
    if not job.model.config.experts:
        return {}
    count, known = results.near_ties(results.open_results(out, check=False))
    return {"near_tied_routing": {"chunks": count, "of": known, "margin_below": results.NEAR_TIE}}


def _one(job: Job, values: np.ndarray) -> np.ndarray:
    """Drops the outcome axis where there is one outcome."""
    return values if len(job.request.outcomes) > 1 else values[0]


def _write_ends(table: results.Table, number: int, prepared: Prepared) -> None:
    several = len(prepared.base_outcome) > 1
    ends = (("base_outcome", prepared.base_outcome), ("source_outcome", prepared.source_outcome))
    chunks = [(name, {"pair": number}, values if several else values[0]) for name, values in ends]
    if prepared.routing_margin is not None:
        chunks.append(("routing_margin", {"pair": number}, prepared.routing_margin))
    table.write(chunks)


Effects = tuple[np.ndarray, np.ndarray]
"""Effects and the base outcomes they were taken from, [outcome, ...]."""


def _modules(job: Job, prepared: Prepared, windows: list[Window], todo: list[int]) -> tuple[dict[str, Effects], int]:
    """Module effects of the layers to do: kind -> [outcome, L, index, patches]; and the passes they took."""
    if not job.modules:
        return {}, 0
    config, readout = job.model.config, Readout(job.request.outcomes)
    shape = lambda kind: (len(job.request.outcomes), config.layers, units_per_layer(config, kind, 1), len(windows))  # noqa: E731
    effects = {kind: (np.full(shape(kind), np.nan, np.float32), np.full(shape(kind), np.nan, np.float32)) for kind in job.modules}
    passes = 0
    for at, window in enumerate(windows):
        values, named = module_values(job.model, prepared, window, job.modules, todo, job.chunk["module"], readout)
        found = values.effects(len(named))
        passes += values.units.size
        for unit, (kind, layer, index) in enumerate(named):
            for array, values_of in zip(effects[kind], found, strict=True):
                array[:, layer, index, at] = values_of[:, unit]
    return effects, passes


def _dispatch(job: Job, prepared: Prepared, windows: list[Window], layer: int) -> dict[str, list[Values]]:
    """Starts the neuron and window chunks of one layer; returns before they are finished."""
    config, readout = job.model.config, Readout(job.request.outcomes)
    started: dict[str, list[Values]] = {}
    for unit in job.many:
        units = units_per_layer(config, unit, job.request.window)
        width = job.request.window if unit == "window" else 1
        started[unit] = [neuron_values(job.model, prepared, window, layer, units, width, job.chunk[unit], readout) for window in windows]
    return started


def _commit(job: Job, table: results.Table, number: int, pending: tuple[int, Any], modules: dict[str, Effects]) -> int:
    """Writes one finished layer of one pair, then marks it done; returns its passes."""
    layer, started = pending
    at = {"pair": number, "layer": layer}
    chunks, bases, passes = [], [], 0
    for unit in job.request.units:
        if unit in started:
            units = units_per_layer(job.model.config, unit, job.request.window)
            parts = [values.effects(units) for values in started[unit]]
            effect, base = (np.stack([part[i] for part in parts], axis=-1) for i in range(2))
            passes += sum(values.units.size for values in started[unit])
        else:
            effect, base = (array[:, layer] for array in modules[unit])
            effect = effect if UNITS[unit].axis else effect[:, 0]
        chunks.append((unit, at, _one(job, _on_axis(job, effect))))
        bases.append(base.reshape(len(base), -1))
    seen = np.concatenate(bases, axis=1)
    chunks += [("base_lowest", at, _one(job, seen.min(axis=1))), ("base_highest", at, _one(job, seen.max(axis=1)))]
    table.write(chunks)
    table.mark_done(number, layer)
    return passes


def _on_axis(job: Job, effect: np.ndarray) -> np.ndarray:
    """Effects with a last axis of patches, on the table's position axis (right-aligned), or without one."""
    if job.request.position != "each":
        return effect[..., 0]
    width = max(len(patches) for patches in job.patches)
    padded = np.full((*effect.shape[:-1], width), np.nan, np.float32)
    padded[..., width - effect.shape[-1] :] = effect
    return padded
