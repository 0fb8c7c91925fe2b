"""First-order estimates by the mean of the gradients at both ends: at the base run, and at the source run.

The rule of the trapezoid for the way on which everything goes from base to source together. The half at the source run is what attribution
says of the reverse direction, with a minus.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jaxmed.effects.estimates import FirstOrder, RanPairs, rows_of, run_pairs
from jaxmed.effects.first_order import narrow, sites_of
from jaxmed.effects.job import Job
from jaxmed.effects.pair_batches import BatchShape, shape_of
from jaxmed.effects.rows import Record
from jaxmed.effects.work import Item, Work
from jaxmed.hosts import to_host


@dataclass(frozen=True)
class MeanGradient(FirstOrder):
    """Change times the mean of two gradients, for every unit at once."""

    def work(self, job: Job, item: Item) -> Work:
        """Those of both directions."""
        other, pieces = _turned(job, item)
        here, there = super().work(job, item), [super(MeanGradient, self).work(other, piece) for piece in pieces]
        return replace(here, passes=here.passes + sum(one.passes for one in there), flops=here.flops + sum(one.flops for one in there))

    def effects(self, job: Job, item: Item, ran: RanPairs) -> Record:
        """Half of the estimates of one direction, less half of those of the other."""
        found: dict[str, Any] = {unit: to_host(values) / 2 for unit, values in super().effects(job, item, ran).items()}
        other, pieces = _turned(job, item)
        sites = sites_of(job.request.units)
        for piece in pieces:
            rows = [item.pairs.index(pair) for pair in piece.pairs]
            back = super().effects(other, piece, run_pairs(other, piece, self.readout(job), sites, narrow(sites)))
            for unit, values in back.items():
                found[unit][:, :, rows] -= to_host(values)[:, :, : len(rows)] / 2
        return found


def _turned(job: Job, item: Item) -> tuple[Job, list[Item]]:
    """The job with base and source in each other's place, and the item's pairs in pieces of one shape there."""
    other, pieces = tuple(contrast.turned() for contrast in job.contrasts), dict[BatchShape, list[int]]()
    for pair in item.pairs:
        pieces.setdefault(shape_of(other[pair]), []).append(pair)
    chunk = {shape.key: rows_of(job, item) for shape in pieces}
    return replace(job, contrasts=other, chunk=chunk), [Item(tuple(pairs), item.layers) for pairs in pieces.values()]
