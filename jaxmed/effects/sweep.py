"""The sweep: every unit of every layer of every pair, written as it goes, resumable at any point."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed import results
from jaxmed.effects.exact import Prepared, Values, Window, module_values, neuron_values, open_window, prepare
from jaxmed.effects.job import Job, coordinates, layer_effects, layer_flops, manifest, plan, variables
from jaxmed.effects.outcomes import Readout, outcome_name
from jaxmed.effects.units import UNITS, units_per_layer
from jaxmed.runs.provenance import versions

Report = Callable[[float, int, str], None]
"""Called with (FLOPs done, effects done, what is being done) after every step."""


def run(job: Job, out: Path, resume: bool = False, report: Report = lambda *_: None, rate: float | None = None) -> None:
    """Runs a job into `out`. What is finished is on disk at every moment; an interrupted run goes on with `resume`.

    Raises:
        UserError: `out` holds something else, a run without `resume`, or a run of another request; no room on the disk.
    """
    continues = results.check_folder(out, resume)
    record = manifest(job)
    begun = time.time()
    if continues:
        stored = results.read_run(out)
        results.check_same(out, stored["manifest"], record)
    else:
        planned = plan(job, rate)
        results.check_space(out, planned.disk + 1_000_000)
        out.mkdir(parents=True, exist_ok=True)
        attributes = {"position": str(job.request.position), "window": job.request.window, "model": job.model.name}
        attributes["outcome"] = ", ".join(outcome_name(outcome) for outcome in job.request.outcomes)
        results.create(out, variables(job), coordinates(job), attributes)
        plan_record = {k: v for k, v in asdict(planned).items() if k != "chunk"}
        stored = {"manifest": record, "plan": plan_record, "sessions": [], "status": "running"}
    session = {"started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "versions": versions(), "seconds": 0.0}
    stored["sessions"].append(session | {"passes": 0, "layers": 0})
    stored["status"] = "running"
    results.write_json(out / results.RUN, stored)
    for step in _steps(job, results.Table(out), report):
        stored["sessions"][-1].update(step, seconds=round(time.time() - begun, 3))
    stored["sessions"][-1]["seconds"] = round(time.time() - begun, 3)
    stored["status"] = "finished"
    stored |= _near_ties(job, out)
    results.write_json(out / results.RUN, stored)


def _steps(job: Job, table: results.Table, report: Report) -> Iterator[dict[str, Any]]:
    """Runs what is not done yet; yields the counts of this session after every layer."""
    done = table.done()
    passes = layers = 0
    for number, pair in enumerate(job.pairs):
        todo = [layer for layer in job.layers if not done[number, layer]]
        for layer in set(job.layers) - set(todo):
            report(layer_flops(job, number, layer), layer_effects(job, number), "resumed")
        if not todo:
            continue
        prepared = prepare(job.model, pair, job.request.outcomes, job.request.units, job.request.position, job.request.form)
        _write_ends(table, number, prepared)
        windows = [open_window(prepared, patch) for patch in job.patches[number]]
        modules, count = _modules(job, prepared, windows, todo)
        passes += count
        pending: tuple[int, Any] | None = None
        for layer in [*todo, None]:  # one layer is computed while the one before is written
            ahead = None if layer is None else (layer, _dispatch(job, prepared, windows, layer))
            if pending is not None:
                passes += _commit(job, table, number, pending, modules)
                layers += 1
                report(layer_flops(job, number, pending[0]), layer_effects(job, number), pair.id)
                yield {"passes": passes, "layers": layers}
            pending = ahead


def _near_ties(job: Job, out: Path) -> dict[str, Any]:
    """The entry of run.json on near-tied routing; empty without experts."""
    if not job.model.config.experts:
        return {}
    count, known = results.near_ties(results.open_results(out))
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
