"""The exact estimator: every unit, set and path by a restarted run of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np

from jaxmed.axes import row_parts, vocabulary_parts
from jaxmed.effects.engine import Values, Window, open_window, prepare, unit_values
from jaxmed.effects.estimands import ESTIMANDS, PASSES, variable
from jaxmed.effects.job import BLOCK, Job
from jaxmed.effects.joint import path_values, set_values
from jaxmed.effects.mediators import MEDIATORS, Unit
from jaxmed.effects.patches import with_patch
from jaxmed.effects.readout import Readout
from jaxmed.effects.sets import UnitPath, UnitSet
from jaxmed.effects.shapes import Shape, shapes_of
from jaxmed.effects.work import Chunk, Item, OpenPair, Work, ends, in_table, one_outcome
from jaxmed.models.model import Model
from jaxmed.runner import are_few
from jaxmed.runs.cost import propagate_flops


@runtime_checkable
class Batch(Protocol):
    """Rows that are chunked by themselves."""

    @property
    def group(self) -> str:
        """The rows' part of the key of their chunk size."""
        ...

    @property
    def firsts(self) -> Sequence[int]:
        """The first layer that runs for every row, in the order in which rows share chunks."""
        ...

    def values(self, model: Model, window: Window, way: str, per_device: int, readout: Readout) -> Values:
        """Outcomes of all rows."""
        ...

    def cells(self) -> list[tuple[str, dict[str, int], list[int]]]:
        """(variable, place in a pair's part of the table, numbers of the rows that stand there)."""
        ...


@dataclass(frozen=True)
class UnitBatch:
    """Single units, in the order of their layers."""

    group: str
    units: tuple[Unit, ...]
    window: int

    @property
    def firsts(self) -> list[int]:
        return [layer + MEDIATORS[kind].by_layer for kind, layer, _ in self.units]

    def values(self, model: Model, window: Window, way: str, per_device: int, readout: Readout) -> Values:
        return unit_values(model, window, self.units, self.window, per_device, readout, way)

    def cells(self) -> list[tuple[str, dict[str, int], list[int]]]:
        rows: dict[tuple[str, int], list[int]] = {}
        for number, (kind, layer, _) in enumerate(self.units):
            rows.setdefault((kind, layer), []).append(number)
        return [(kind, {"layer": layer}, numbers) for (kind, layer), numbers in rows.items()]


@dataclass(frozen=True)
class TogetherBatch:
    """The joint sets of a pair, or its paths; `group` is the variable that they stand in."""

    group: str
    rows: tuple[UnitSet, ...] | tuple[UnitPath, ...]
    window: int
    run: Callable[..., Values]

    @property
    def firsts(self) -> list[int]:
        return sorted(row.first for row in self.rows)

    def values(self, model: Model, window: Window, way: str, per_device: int, readout: Readout) -> Values:
        del way
        return self.run(model, window, self.rows, self.window, per_device, readout)

    def cells(self) -> list[tuple[str, dict[str, int], list[int]]]:
        return [(self.group, {}, list(range(len(self.rows))))]


class Exact:
    """Every unit, set and path by a restarted run."""

    def items(self, job: Job) -> list[Item]:
        """Blocks of layers, pair by pair."""
        size = job.chunk[BLOCK]
        blocks = [job.layers[at : at + size] for at in range(0, len(job.layers), size)]
        return [Item((number,), layers) for number in range(len(job.contrasts)) for layers in blocks]

    def work(self, job: Job, item: Item) -> Work:
        """Rows of whole chunks, base rows and padding included."""
        sides, batches = job.sides(job.contrasts[item.pairs[0]]), _batches(job, item)
        works = [
            _work(job, batch, shape, PASSES[name].way, number == 0)
            for number, name in enumerate(job.passes)
            for shape in shapes_of(sides[PASSES[name].turned])
            for batch in batches
        ]
        return Work(sum(one.passes for one in works), sum(one.flops for one in works), sum(one.effects for one in works))

    def shared(self, job: Job, pair: int) -> float:
        """The full forwards of both sides."""
        config, seen = job.model.config, shapes_of(job.contrasts[pair])[0].seen
        return 2 * len(job.sides(job.contrasts[pair])) * propagate_flops(config, 1, seen, 0, config.layers)

    def open(self, job: Job, pairs: tuple[int, ...]) -> OpenPair:
        """Runs base and source."""
        (pair,) = pairs
        stream = bool(job.request.sets or job.request.paths)
        sides = job.sides(job.contrasts[pair])
        prepared = {turned: prepare(side, job.request.outcomes, job.request.kinds, stream) for turned, side in sides.items()}
        prepared = {turned: with_patch(one, job.request.patching, job.reference) for turned, one in prepared.items()}
        windows = {turned: [open_window(one, p) for p in one.contrast.patches] for turned, one in prepared.items()}
        turned, one = next(iter(prepared.items()))
        base, source = one.base_outcome, one.source_outcome
        base, source = (source, base) if turned else (base, source)  # turned: the only contrast that was run
        return OpenPair(prepared, windows, ends(job, pair, base, source, one.routing_margin))

    def start(self, job: Job, item: Item, opened: OpenPair | None) -> Callable[[], list[Chunk]]:
        """Dispatches all chunks of the item."""
        assert opened is not None
        readout = Readout(job.request.outcomes, vocabulary_parts(job.model.mesh))
        started: list[_Started] = []
        for batch in _batches(job, item):
            values: dict[str, list[Values]] = {}
            for name in job.passes:
                one = opened.prepared[PASSES[name].turned]
                sizes = [job.chunk[shape.chunk_key(batch.group)] for shape in shapes_of(one.contrast)]
                windows = zip(opened.windows[PASSES[name].turned], sizes, strict=True)
                model, way = one.contrast.base.model, PASSES[name].way
                values[name] = [batch.values(model, window, way, size, readout) for window, size in windows]
            started.append((batch, values))
        return lambda: _collect(job, item, opened, started)


_Started = tuple[Batch, dict[str, list[Values]]]


def _work(job: Job, batch: Batch, shape: Shape, way: str, counted: bool) -> Work:
    devices = row_parts(job.model.mesh)
    each = job.chunk[shape.chunk_key(batch.group)] * devices
    config, firsts, flops = job.model.config, batch.firsts, 0.0
    begins, run = range(0, len(firsts), each), partial(propagate_flops, config, each + devices, shape.window, shape.seen)
    for at in begins:
        layers = 0 if way == "to-logits" else config.layers - firsts[at]
        few = isinstance(batch, UnitBatch) and are_few(shape.asked, shape.window)
        flops += run(layers, shape.asked if few else None)
        flops += run(config.layers) if batch.group == "path" else 0.0  # the receivers are read first
    effects = len(firsts) * counted * len(job.request.outcomes) * len(job.request.estimands)
    return Work(len(begins) * (each + devices), flops, effects)


def _batches(job: Job, item: Item) -> list[Batch]:
    """The batches of an item."""
    config, window = job.model.config, job.request.window
    found: list[Batch] = []
    for group, kinds in job.groups.items():
        spans = [item.layers] if group == "modules" else [(layer,) for layer in item.layers]
        for span in spans:
            units = tuple((kind, layer, i) for layer in span for kind in kinds for i in range(MEDIATORS[kind].count(config, window)))
            found.append(UnitBatch(group, units, window))
    if item.layers[0] == job.layers[0]:
        together = (
            TogetherBatch("joint", job.request.sets, window, set_values),
            TogetherBatch("path", job.request.paths, window, path_values),
        )
        found += [batch for batch in together if batch.rows]
    return found


def _collect(job: Job, item: Item, opened: OpenPair, started: list[_Started]) -> list[Chunk]:
    """The item's chunks of the table, base spreads included."""
    turned, one = next(iter(opened.prepared.items()))
    total = (one.source_outcome - one.base_outcome)[:, None, None] * (-1 if turned else 1)
    chunks: list[Chunk] = []
    bases: dict[int, list[np.ndarray]] = {layer: [] for layer in item.layers}
    for batch, values in started:
        found: dict[str, np.ndarray] = {"total": total}
        for name, per_window in values.items():
            parts = [window.effects(len(batch.firsts)) for window in per_window]
            found[name] = np.stack([effect for effect, _ in parts], axis=-1)  # [outcome, units, patches]
            if name == job.passes[0]:
                base = np.stack([base for _, base in parts], axis=-1)
        for estimand in job.request.estimands:
            combined = ESTIMANDS[estimand].combine(found)
            for unit, at, rows in batch.cells():
                alone = unit in MEDIATORS and not MEDIATORS[unit].axis
                effect = combined[:, rows[0]] if alone else combined[:, rows]
                chunks.append((variable(unit, estimand), {"pair": item.pairs[0], **at}, in_table(job, effect)))
        for _, at, rows in batch.cells():
            bases[at.get("layer", item.layers[0])].append(base[:, rows].reshape(len(base), -1))
    for layer, parts in bases.items():
        seen, place = np.concatenate(parts, axis=1) if parts else one.base_outcome[:, None], {"pair": item.pairs[0], "layer": layer}
        chunks += [("base_lowest", place, one_outcome(job, seen.min(axis=1))), ("base_highest", place, one_outcome(job, seen.max(axis=1)))]
    return chunks
