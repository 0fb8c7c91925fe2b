"""Estimators: how effects are computed. A new method is one row of `ESTIMATORS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jaxmed.effects.engine import PreparedContrast, Unit, Values, Window, open_window, prepare, unit_values
from jaxmed.effects.estimands import ESTIMANDS, variable
from jaxmed.effects.job import BLOCK, Job, shapes_of
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.effects.readout import Readout
from jaxmed.errors import unknown
from jaxmed.runs.cost import propagate_flops

Chunk = tuple[str, dict[str, int], np.ndarray]
"""(variable, {dimension: index}, values): what an item leaves in the table."""


@dataclass(frozen=True)
class Item:
    """The unit of work, of resume and of distribution: layers of one pair."""

    pair: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """What an item takes: restarted rows, matmul FLOPs, and effects that come of it."""

    passes: int
    flops: float
    effects: int


class Estimator(Protocol):
    """A way to compute effects."""

    exact: bool

    def items(self, job: Job) -> Sequence[Item]:
        """The job's items, those of a pair one after the other."""
        ...

    def work(self, job: Job, item: Item) -> Work:
        """What an item takes."""
        ...

    def open(self, job: Job, pair: int) -> OpenPair:
        """What all items of a pair share."""
        ...

    def start(self, job: Job, item: Item, opened: OpenPair) -> Callable[[], list[Chunk]]:
        """Begins an item on the devices; the call of what it returns waits for it."""
        ...


@dataclass(frozen=True)
class OpenPair:
    """A pair that is being swept: for every restarted pass its prepared contrast and windows."""

    prepared: dict[str, PreparedContrast]
    windows: dict[str, list[Window]]


class Exact:
    """Every unit by a restarted run."""

    exact = True

    def items(self, job: Job) -> list[Item]:
        """Blocks of layers, pair by pair."""
        size = job.chunk[BLOCK]
        blocks = [job.layers[at : at + size] for at in range(0, len(job.layers), size)]
        return [Item(number, layers) for number in range(len(job.contrasts)) for layers in blocks]

    def work(self, job: Job, item: Item) -> Work:
        """Rows of whole chunks, base rows and padding included."""
        contrast, config = job.contrasts[item.pair], job.model.config
        passes, flops, effects = 0, 0.0, 0
        for name in job.passes:
            for shape in shapes_of(contrast if name == "into-base" else contrast.turned()):
                for units, group in _batches(job, item.layers):
                    each = job.chunk[shape.chunk_key(group)] * job.model.mesh.shape["data"]
                    for at in range(0, len(units), each):
                        rows = each + job.model.mesh.shape["data"]
                        first = units[at][1] + MEDIATORS[units[at][0]].by_layer
                        passes, flops = (
                            passes + rows,
                            flops + propagate_flops(config, rows, shape.window, shape.seen, config.layers - first),
                        )
                    effects += len(units) * (name == job.passes[0])
        return Work(passes, flops, effects * len(job.request.outcomes) * len(job.request.estimands))

    def open(self, job: Job, pair: int) -> OpenPair:
        """Runs base and source."""
        contrast = job.contrasts[pair]
        sides = {"into-base": contrast, "into-source": contrast.turned()}
        prepared = {name: prepare(sides[name], job.request.outcomes, job.request.units) for name in job.passes}
        return OpenPair(prepared, {name: [open_window(one, patch) for patch in one.contrast.patches] for name, one in prepared.items()})

    def start(self, job: Job, item: Item, opened: OpenPair) -> Callable[[], list[Chunk]]:
        """Dispatches all chunks of the item."""
        readout, width = Readout(job.request.outcomes), job.request.window
        started: list[tuple[list[Unit], dict[str, list[Values]]]] = []
        for units, group in _batches(job, item.layers):
            values = {}
            for name, prepared in opened.prepared.items():
                model = prepared.contrast.base.model
                sizes = [job.chunk[shape.chunk_key(group)] for shape in shapes_of(prepared.contrast)]
                windows = zip(opened.windows[name], sizes, strict=True)
                values[name] = [
                    unit_values(model, window, units, MEDIATORS[units[0][0]].width(width), size, readout) for window, size in windows
                ]
            started.append((units, values))
        return lambda: _collect(job, item, opened, started)


def _batches(job: Job, layers: Sequence[int]) -> list[tuple[list[Unit], str]]:
    """(units in the order of their layers, group) of an item: a batch is chunked by itself."""
    config, window = job.model.config, job.request.window
    found: list[tuple[list[Unit], str]] = []
    for group, kinds in job.groups.items():
        spans = [layers] if group == "modules" else [[layer] for layer in layers]
        for span in spans:
            units = [(kind, layer, i) for layer in span for kind in kinds for i in range(MEDIATORS[kind].count(config, window))]
            found.append((units, group))
    return found


def _collect(job: Job, item: Item, opened: OpenPair, started: list[tuple[list[Unit], dict[str, list[Values]]]]) -> list[Chunk]:
    """The item's chunks of the table, base spreads included."""
    ends = next(iter(opened.prepared.values()))
    total = (ends.source_outcome - ends.base_outcome)[:, None, None]
    if "into-base" not in opened.prepared:
        total = -total  # the only contrast that was run is turned
    chunks: list[Chunk] = []
    bases: dict[int, list[np.ndarray]] = {layer: [] for layer in item.layers}
    for units, values in started:
        found: dict[str, np.ndarray] = {"total": total}
        for name, per_window in values.items():
            parts = [one.effects(len(units)) for one in per_window]
            found[name] = np.stack([effect for effect, _ in parts], axis=-1)  # [outcome, units, patches]
            if name == job.passes[0]:
                base = np.stack([base for _, base in parts], axis=-1)
        for estimand in job.request.estimands:
            combined = ESTIMANDS[estimand].combine(found)
            for kind in dict.fromkeys(kind for kind, _, _ in units):
                for layer in item.layers:
                    at = [number for number, unit in enumerate(units) if unit[:2] == (kind, layer)]
                    if at:
                        effect = combined[:, at] if MEDIATORS[kind].axis else combined[:, at[0]]
                        chunks.append((variable(kind, estimand), {"pair": item.pair, "layer": layer}, _in_table(job, effect)))
        for layer in item.layers:
            at = [number for number, unit in enumerate(units) if unit[1] == layer]
            bases[layer].append(base[:, at].reshape(len(base), -1))
    for layer, parts in bases.items():
        seen, at = np.concatenate(parts, axis=1), {"pair": item.pair, "layer": layer}
        chunks += [("base_lowest", at, one_outcome(job, seen.min(axis=1))), ("base_highest", at, one_outcome(job, seen.max(axis=1)))]
    return chunks


def one_outcome(job: Job, values: np.ndarray) -> np.ndarray:
    """Drops the outcome axis where there is one outcome."""
    return values if len(job.request.outcomes) > 1 else values[0]


def _in_table(job: Job, effect: np.ndarray) -> np.ndarray:
    """Effects [outcome, ..., patches] as the table has them: patches on its position axis, right-aligned, or without one."""
    if job.request.position != "each":
        return one_outcome(job, effect[..., 0])
    width = max(len(contrast.patches) for contrast in job.contrasts)
    padded = np.full((*effect.shape[:-1], width), np.nan, np.float32)
    padded[..., width - effect.shape[-1] :] = effect
    return one_outcome(job, padded)


ESTIMATORS: dict[str, Estimator] = {"exact": Exact()}


def find_estimator(method: str) -> Estimator:
    """The estimator of a name; a UserError with the nearest names where there is none."""
    if method not in ESTIMATORS:
        raise unknown("method", method, ESTIMATORS)
    return ESTIMATORS[method]
