"""The screened estimator: first-order estimates of all units of a pair, and exact effects where they matter.

The largest estimates are computed by restarted runs, and so is a random sample of the others, which shows how far estimates are off; the
rest of the budget goes where it is likeliest to find one of the largest units (`statistics.screening`). Rows of many layers and tokens
share chunks, each joining at its own layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxmed.effects.engine import PreparedContrast
from jaxmed.effects.estimates import FirstOrder, RanPairs, run_pairs
from jaxmed.effects.job import BUDGET, Job
from jaxmed.effects.mediators import recorded_sites
from jaxmed.effects.pair_batches import window_of
from jaxmed.effects.screen import Screen
from jaxmed.effects.work import Chunk, Item, OpenPair, Work
from jaxmed.hosts import to_host


@dataclass(frozen=True)
class Screened(FirstOrder):
    """First-order estimates under `rules`, verified where it matters."""

    def work(self, job: Job, item: Item) -> Work:
        """The estimates, and the rows that the budget allows for; how many these are is known when they are chosen."""
        estimated, rows, flops = super().work(job, item), 0.0, 0.0
        for pair in item.pairs:
            many, part = job.screened(pair), job.chunk[BUDGET] / 1e6
            few = [unit for unit in job.request.units if unit not in many]
            flops += job.row_flops(pair, few) + part * job.row_flops(pair, many)
            rows += job.count_in(pair, few) + part * job.count_in(pair, many)
        return Work(estimated.passes + round(rows), estimated.flops + flops, estimated.effects)

    def start(self, job: Job, item: Item, opened: OpenPair | None) -> Callable[[], list[Chunk]]:
        """Estimates, computes what is chosen before any exact effect is known, and dispatches what is chosen then."""
        del opened
        readout = self.readout(job)
        ran = run_pairs(job, item, readout, *reversed(recorded_sites(job.model.config, job.request.units, True)))
        found = {unit: to_host(values) for unit, values in ran.effects(job, self.rules).items()}
        screens, collects = [], []
        for row, pair in enumerate(item.pairs):
            of_pair = {unit: values[:, :, row] for unit, values in found.items()}
            screen = Screen.of(job, pair, _prepared(job, pair, ran, row), readout, of_pair)
            screen.begin()
            collects.append(screen.go_on())
            screens.append(screen)
        ends = ran.ends(job, item)

        def finish() -> list[Chunk]:
            for collect in collects:
                collect()
            return [*ends, *(chunk for screen in screens for chunk in screen.chunks())]

        return finish


def _prepared(job: Job, pair: int, ran: RanPairs, row: int) -> PreparedContrast:
    """The runs of a pair, a row of its batch, as restarted runs take them; on every device whole."""
    contrast, everywhere = job.contrasts[pair], jax.NamedSharding(job.model.mesh, jax.P())
    own: Any = lambda tree: jax.device_put(jax.tree.map(lambda x: x[:, row], tree), everywhere)  # noqa: E731
    base, source, key, value = own((ran.base.record, ran.written, ran.base.key, ran.base.value))
    ends = to_host(ran.base.outcome)[:, row], to_host(ran.source_outcome)[:, row]
    return PreparedContrast(contrast, contrast.packed(), window_of(contrast)[0], base, source, key, value, None, *ends, None)
