"""Activations on disk against what they cannot avoid: writing and reading the same bytes plainly; and whether reading beats recomputing."""

from __future__ import annotations

import datetime
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.bench.rows import add_rows
from jaxmed.cache.job import Job, make_job
from jaxmed.cache.run import open_shards, run_shards
from jaxmed.cache.store import open_cache
from jaxmed.distributed import device_name
from jaxmed.files.arrays import open_array
from jaxmed.models.model import Model
from jaxmed.runs.provenance import short_commit

GOAL = 0.7
"""Of the plain rates, for writing and for reading."""


def measure_cache(model: Model, site: str, prompts: int, tokens: int, rounds: int = 3, append: Path | None = None) -> dict[str, float]:
    """Computes, writes and reads a site at every token of random prompts, in turn with one plain file of the same bytes; prints rates.

    Both ways of writing end when the bytes are on the disk (fsync). Before each reading the system is asked to forget its copies.

    Returns:
        Median seconds by what was done, and the ratios "write" and "read" (rates over the plain ones) and "read over computing".
    """
    job = random_job(model, site, prompts, tokens)
    whole = len(job.rows)
    found, size = _rounds(job, site, rounds), job.table.bytes
    shards = whole // job.shard
    ratios = {"write ratio": found["write plainly"] / found["write"], "read ratio": found["read plainly"] / found["read"]}
    ratios["reading over computing"] = found["compute a shard"] * shards / found["read"]
    sizes = {what: size / shards if what == "compute a shard" else size for what in found}
    lines = [f"{what}: {seconds:.2f} s, {sizes[what] / seconds / 1e6:,.0f} MB/s" for what, seconds in found.items()]
    lines += [f"write: {ratios['write ratio']:.2f} x the plain rate (goal {GOAL})", f"read: {ratios['read ratio']:.2f} x (goal {GOAL})"]
    lines += [f"reading is {ratios['reading over computing']:.1f} x as fast as computing"]
    print("\n".join(lines))
    if append is not None:
        title = f"\n## {datetime.date.today()}, commit {short_commit()}, activations of {model.name} on disk, {device_name(model.mesh)}\n\n"
        command = f"`jaxmed bench cache --model {model.name} --site {site} --prompts {prompts} --tokens {tokens} --rounds {rounds}`\n\n"
        add_rows(append, title + command + "".join(f"- {line}\n" for line in lines))
    return found | ratios


def random_job(model: Model, site: str, prompts: int, tokens: int) -> Job:
    """Activations of random prompts, rounded down to whole shards; needs no weights.

    Raises:
        UserError: what `cache.job.make_job` raises.
    """
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, model.config.vocabulary, tokens, np.int32) for _ in range(prompts)]
    job = make_job(model, ids, (site,), "all", "chat")
    return make_job(model, ids[: prompts - prompts % job.shard], (site,), "all", "chat")


def _rounds(job: Job, site: str, rounds: int) -> dict[str, float]:
    """Median seconds of everything, the contestants in turn."""
    shards, seconds = range(0, len(job.rows), job.shard), {}
    done = np.ones(len(job.rows), bool)
    done[: job.shard] = False
    _, held = next(run_shards(job, open_shards(len(job.rows), job.shard, done)))  # compiles, too

    def timed(what: str, work: Callable[[], Any]) -> None:
        begun = time.perf_counter()
        work()
        seconds.setdefault(what, []).append(time.perf_counter() - begun)

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        plain, folder = Path(scratch) / "plain", Path(scratch) / "cache"
        for _ in range(rounds):
            shutil.rmtree(folder, ignore_errors=True)
            timed("compute a shard", lambda: next(run_shards(job, open_shards(len(job.rows), job.shard, done))))
            timed("write plainly", lambda: _write_plainly(plain, held[site], len(shards)))
            timed("write", lambda: _write(job, folder, held))
            _forget(Path(scratch))
            timed("read plainly", lambda: np.fromfile(plain, np.float32))
            timed("read", lambda: open_array(folder / site).read().result())
    return {what: statistics.median(values) for what, values in seconds.items()}


def _write_plainly(file: Path, values: np.ndarray, times: int) -> None:
    with file.open("wb") as handle:
        for _ in range(times):
            handle.write(values.data)
        handle.flush()
        os.fsync(handle.fileno())


def _forget(folder: Path) -> None:
    """Asks the system to drop its copies of files that are on the disk."""
    for file in folder.rglob("*"):
        if file.is_file() and hasattr(os, "posix_fadvise"):
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def _write(job: Job, folder: Path, held: dict[str, np.ndarray]) -> None:
    with open_cache(folder, job.manifest, job.table, False) as cache:
        for begin in range(0, len(job.rows), job.shard):
            cache.write(range(begin, begin + job.shard), held)
