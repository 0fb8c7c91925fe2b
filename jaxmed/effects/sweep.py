"""The sweep: every unit of every layer of every pair, written as it goes, resumable at any point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed import results
from jaxmed.effects.cost import open_items, plan
from jaxmed.effects.engine import PreparedContrast
from jaxmed.effects.estimators import Chunk, Estimator, Item, find_estimator, one_outcome
from jaxmed.effects.job import Job, manifest
from jaxmed.effects.table import attributes, coordinates, variables
from jaxmed.runs.folder import RunFolder
from jaxmed.runs.watch import RESUMED, Watch, silent


def run_sweep(job: Job, out: Path, resume: bool = False, watch: Watch = silent, rate: float | None = None) -> None:
    """Runs a job into `out`. What is finished is on disk at every moment; an interrupted run goes on with `resume`.

    Raises:
        UserError: `out` holds something else, a run without `resume`, or a run of another request; it is in use, or has no room; a
            finished table that is damaged (what is damaged is computed when the run is resumed again).
    """
    planned = plan(job, rate)
    with RunFolder.open(out, manifest(job), resume, results.LEGAL, planned.cost.written + 1_000_000, reused=("chunk",)) as folder:
        if folder.continues:
            job = with_chunk(job, folder.manifest["chunk"])
        else:
            results.create(out, variables(job), coordinates(job), attributes(job))
            numbers = {"pairs": planned.pairs, "patches": planned.patches, "effects": planned.effects, "seconds": planned.seconds}
            folder.record["plan"] = {**numbers, "passes": planned.cost.passes, "flops": planned.cost.flops, "disk": planned.cost.written}
        with folder.session() as session:
            results.mend(folder)
            session.count(passes=0, layers=0)
            for done in _run_items(job, results.Table(out), watch):
                session.count(**done)
            folder.record |= _near_ties(job, out)


def with_chunk(job: Job, stored: Mapping[str, int]) -> Job:
    """The job with the chunk sizes that a run began with, so that its second half has the bits that it would have had."""
    return replace(job, chunk={key: stored.get(key, size) for key, size in job.chunk.items()})


def _run_items(job: Job, table: results.Table, watch: Watch) -> Iterator[dict[str, int]]:
    """Runs what is not done yet; yields what was done after every item. One item is computed while the one before is written."""
    estimator, done = find_estimator(job.request.method), table.done().astype(bool)
    todo = open_items(job, done)
    for item in _difference(estimator.items(job), todo):
        work = estimator.work(job, item)
        watch(work.flops, work.effects, RESUMED)
    pending: tuple[Item, Callable[[], list[Chunk]]] | None = None
    opened, pair = None, -1
    for item in [*todo, None]:
        ahead = None
        if item is not None:
            if item.pair != pair:
                if pending is not None:  # one pair's records are held at a time
                    yield _commit(job, table, estimator, *pending, watch)
                    pending = None
                opened, pair = estimator.open(job, item.pair), item.pair
                table.write(_ends(job, item.pair, next(iter(opened.prepared.values()))))
            assert opened is not None
            ahead = item, estimator.start(job, item, opened)
        if pending is not None:
            yield _commit(job, table, estimator, *pending, watch)
        pending = ahead


def _difference(every: Any, todo: Any) -> list[Item]:
    """Of all items, the layers that are done."""
    left = {(item.pair, layer) for item in todo for layer in item.layers}
    found = [Item(item.pair, tuple(layer for layer in item.layers if (item.pair, layer) not in left)) for item in every]
    return [item for item in found if item.layers]


def _commit(
    job: Job, table: results.Table, estimator: Estimator, item: Item, collect: Callable[[], list[Chunk]], watch: Watch
) -> dict[str, int]:
    """Writes a finished item, then marks its layers done."""
    table.write(collect())
    for layer in item.layers:
        table.mark_done(item.pair, layer)
    work = estimator.work(job, item)
    watch(work.flops, work.effects, job.pairs[item.pair].id)
    return {"passes": work.passes, "layers": len(item.layers)}


def _ends(job: Job, pair: int, prepared: PreparedContrast) -> list[Chunk]:
    """What is known of a pair before any unit: outcomes of base and source, and how near routing is to a tie."""
    ends = [prepared.base_outcome, prepared.source_outcome]
    if job.passes == ("into-source",):
        ends.reverse()  # the only contrast that was run is turned
    names = ("base_outcome", "source_outcome")
    chunks: list[Chunk] = [(name, {"pair": pair}, one_outcome(job, np.asarray(value))) for name, value in zip(names, ends, strict=True)]
    if prepared.routing_margin is not None:
        chunks.append(("routing_margin", {"pair": pair}, prepared.routing_margin))
    return chunks


def _near_ties(job: Job, out: Path) -> dict[str, Any]:
    """The entry of run.json on near-tied routing; empty without experts."""
    if not job.model.config.experts:
        return {}
    count, known = results.near_ties(results.open_results(out, check=False))
    return {"near_tied_routing": {"chunks": count, "of": known, "margin_below": results.NEAR_TIE}}
