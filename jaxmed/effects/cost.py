"""What a sweep will take, from its items: rows, FLOPs, bytes, time; what an earlier run has finished is not counted again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxmed import results
from jaxmed.effects.estimators import find_estimator
from jaxmed.effects.job import BUDGET, Job, programs_of
from jaxmed.effects.methods import METHODS
from jaxmed.effects.pair_batches import PAIRS
from jaxmed.effects.patches import PATCHES
from jaxmed.effects.shapes import shapes_of
from jaxmed.effects.table import table_bytes
from jaxmed.effects.work import Item
from jaxmed.runs.cost import Cost, propagate_flops
from jaxmed.runs.watch import show_time


@dataclass(frozen=True)
class SweepPlan:
    """The cost of a sweep.

    Attributes:
        cost: rows and matmul FLOPs, the full forwards included; bytes of the result table.
        pairs, patches, effects: pairs and patched positions in all, and effects to compute.
        chunk: rows per device of every program.
        rate: FLOP/s of this machine, or None.
        method: a key of `METHODS`.
    """

    cost: Cost
    pairs: int
    patches: int
    effects: int
    chunk: dict[str, int]
    rate: float | None
    method: str = "exact"

    @property
    def seconds(self) -> float | None:
        """Estimate from the rate."""
        return self.cost.flops / self.rate if self.rate else None

    def lines(self) -> list[str]:
        """The plan in words."""
        method = METHODS[self.method]
        programs = programs_of(self.chunk)
        sizes = sorted({size for key, size in programs.items() if not (method.screened and key.startswith(PAIRS))})
        shown = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        lines = [
            f"pairs {self.pairs}, patched positions {self.patches}, {method.values} {self.effects:,}",
            f"{method.passes} {self.cost.passes:,.0f} ({self.cost.flops / 1e12:.2f} TFLOP of matmuls); {shown} {method.rows}",
            f"result table at most {self.cost.written / 1e6:.1f} MB",
        ]
        if method.screened:
            part = self.chunk[BUDGET] / 1e4
            lines.append(f"exact where it matters: {part:.3g} % of what all exact effects would take; all units of kinds that are few")
        if self.seconds is not None and self.rate is not None:
            lines.append(f"about {show_time(self.seconds)} at this machine's matmul rate ({self.rate / 1e9:,.0f} GFLOP/s)")
        return lines


def finished(job: Job, out: Path | None) -> np.ndarray:
    """bool [pair, layer]: what a run in `out` has done already; all False without one."""
    done = np.zeros((len(job.pairs), job.model.config.layers), bool)
    if out is not None and (out / results.TABLE).is_dir():
        stored = results.Table(out).done().astype(bool)
        return stored if stored.shape == done.shape else done
    return done


def open_items(job: Job, done: np.ndarray) -> Sequence[Item]:
    """The items that hold a layer to do, and of them those layers."""
    every = find_estimator(job.request.method).items(job)
    left = [Item(item.pairs, tuple(layer for layer in item.layers if not done[list(item.pairs), layer].all())) for item in every]
    return [item for item in left if item.layers]


def reference_forwards(job: Job) -> float:
    """FLOPs of the full forwards of all pairs that the patch refers to."""
    config, sides = job.model.config, 0 if job.request.reference else len(PATCHES[job.request.patch].needs)
    return sides * sum(propagate_flops(config, 1, shapes_of(one)[0].seen, 0, config.layers) for one in job.contrasts)


def plan(job: Job, rate: float | None = None, out: Path | None = None) -> SweepPlan:
    """The cost of a job.

    Args:
        rate: FLOP/s, for a time.
        out: a folder whose finished part is not counted.
    """
    estimator, items = find_estimator(job.request.method), open_items(job, finished(job, out))
    works = [estimator.work(job, item) for item in items]
    pairs = sorted({pair for item in items for pair in item.pairs})
    flops = sum(work.flops for work in works) + sum(estimator.shared(job, pair) for pair in pairs)
    flops += reference_forwards(job) if items else 0.0
    programs = len(programs_of(job.chunk))
    cost = Cost("sweep", flops, sum(work.passes for work in works), written=table_bytes(job), programs=programs)
    patches = sum(len(job.contrasts[pair].patches) for pair in pairs)
    return SweepPlan(cost, len(pairs), patches, sum(work.effects for work in works), dict(job.chunk), rate, job.request.method)


def progress_total(job: Job) -> float:
    """What a watch's work adds up to: FLOPs of all items."""
    estimator = find_estimator(job.request.method)
    return sum(estimator.work(job, item).flops for item in estimator.items(job))
