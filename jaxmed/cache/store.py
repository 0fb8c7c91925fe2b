"""Activations on disk: a folder that is a Zarr group, with an array per site and the record of its run, written shard by shard.

A shard is a file per site with all layers of some prompts; a layer of it is read alone. `done[prompt]` is written after a shard is
committed, and is the only thing that a resumed run trusts. MANIFEST says what the arrays are of.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from jaxmed.errors import all_problems
from jaxmed.files import ArrayLayout, find_damage, open_array, write_json
from jaxmed.files.arrays import open_checked
from jaxmed.files.chunk_sums import GROUP as SUMS
from jaxmed.files.chunk_sums import UNSAID, ChunkSums
from jaxmed.hosts import first_tells, leads, several, wait_for_all
from jaxmed.interventions.sites import ALIASES, SITES
from jaxmed.results import Table, damaged_labels, lay_out, note_sums, open_group
from jaxmed.runs.folder import RunFolder, Session
from jaxmed.runs.legal import Legal
from jaxmed.runs.provenance import versions
from jaxmed.runs.watch import Watch, silent

MANIFEST, DONE, GROUP = "manifest.json", "done", "zarr.json"
PLACES = ("token_position", "key_position")
"""Coordinates that some folders have."""
LABELS = ("prompt", "layer", "position", "length", *PLACES)
LEGAL = Legal((MANIFEST, DONE, GROUP, *LABELS, *SITES, *ALIASES, SUMS), needed=(MANIFEST,))
"""What a folder of activations may hold."""


@dataclass(frozen=True)
class Labelled:
    """Labelled arrays before they have values.

    Attributes:
        arrays: site -> its layout, whose first axis is the prompt.
        coordinates: name -> values, or (dimensions, values); "prompt" is among them.
        attributes: of the whole.
    """

    arrays: Mapping[str, ArrayLayout]
    coordinates: Mapping[str, Any]
    attributes: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """Bytes of all arrays."""
        return 4 * sum(math.prod(layout.shape) for layout in self.arrays.values())


class Cache:
    """An open folder that activations are written to, one shard at a time, while the next one is computed.

    Attributes:
        done: bool [prompt].
        shard: prompts of a shard.
    """

    def __init__(self, folder: Path, session: Session, names: Sequence[str]):
        self._table, self._session, self._folder = Table(folder, ".", apart=True), session, folder
        self._pool, self._pending = ThreadPoolExecutor(1), None
        self.names = list(names)
        self.begin()
        self.shard = shard_of(folder / self.names[0])

    def begin(self) -> None:
        """Reads what is done; what is written from here on is counted."""
        self.done = self._table.done().astype(bool)
        self._before = int(self.done.sum())

    def finish(self) -> None:
        """Waits until all processes have written their shards; the session's record counts the prompts of all of them then."""
        self.flush()
        wait_for_all("all shards are written")
        self._session.record["prompts"] = int(self._table.done().sum()) - self._before

    def write(self, prompts: range, found: Mapping[str, np.ndarray]) -> None:
        """Begins to write the activations [prompt, ...] of a whole shard, as soon as the one before is committed; or of no prompts, where
        another process has one more.

        Raises:
            UserError: the disk is full; what was finished stays.
        """
        self.flush()
        self._pending = prompts, self._pool.submit(self._commit, prompts, found)

    def _commit(self, prompts: range, found: Mapping[str, np.ndarray]) -> None:
        if not prompts:
            return
        at = {"prompt": slice(prompts.start, prompts.stop)}
        self._table.write([(name, at, values) for name, values in found.items()])
        self._mark(at["prompt"], 1)

    def flush(self) -> None:
        """Waits until what was given is committed and counted."""
        if self._pending is not None:
            (prompts, written), self._pending = self._pending, None
            written.result()
            self._session.count(prompts=len(prompts))

    def _mark(self, prompts: slice, done: int) -> None:
        count = prompts.stop - prompts.start
        self._table.write([(DONE, {"prompt": prompts}, np.full(count, done, np.uint8))])
        self.done[prompts] = done

    def mend(self, folder: RunFolder, table: Labelled) -> int:
        """Writes damaged labels again, marks shards that are damaged as not done, so that they are computed again, and says so; returns how
        many things were damaged.

        Raises:
            UserError: the run was finished: its numbers may be in use, so they change at the next resume alone.
        """
        labels = damaged_labels(folder.path, list(table.coordinates)) if folder.continues else {}
        shown = [f"{name}: {why}" for name, why in labels.items()]
        if labels.keys() - table.coordinates.keys():
            raise all_problems(str(folder.path), shown, "No run computes this again. Begin anew in another folder.")
        if labels:
            _lay_out_labels(folder.path, table)
        for name, prompts, why in damaged_shards(folder.path, self.names, self.done):
            shown.append(f"{name}, {told(prompts)}: {why}")
            if why.startswith(UNSAID):
                ChunkSums(folder.path).reset(name, prompts.start // self.shard)
            self._mark(slice(prompts.start, prompts.stop), 0)
        folder.tell_damage(shown)
        return len(shown)


def shard_of(array: Path) -> int:
    """Prompts of a shard of a stored array."""
    return int(open_checked(array, str(array)).chunk_layout.write_chunk.shape[0])


def damaged_shards(folder: Path, names: Sequence[str], done: np.ndarray, report: Watch = silent) -> Iterator[tuple[str, range, str]]:
    """(site, prompts, why) of every finished shard that cannot be read; all of it is read for that."""
    sums = ChunkSums(folder)
    for name in names:
        array, shard = open_checked(folder / name, f"{folder / name}"), shard_of(folder / name)
        for begin in range(0, len(done), shard):
            prompts = range(begin, min(begin + shard, len(done)))
            if done[prompts].any():
                why = find_damage(array, [(slice(prompts.start, prompts.stop),)], partial(sums.problem, name, array))[0]
                report(len(prompts), len(prompts), name)
                if why:
                    yield name, prompts, why


def told(prompts: range) -> str:
    """Numbers of prompts, in words."""
    return f"prompt {prompts.start}" if len(prompts) == 1 else f"prompts {prompts.start} to {prompts.stop - 1}"


def cache_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a run compares when it is resumed: of the token ids, a digest."""
    return {**manifest, "tokens": hashlib.sha256(json.dumps(manifest["tokens"]).encode()).hexdigest()}


@contextmanager
def open_cache(out: Path, manifest: Mapping[str, Any], table: Labelled, resume: bool) -> Iterator[Cache]:
    """Begins or continues a folder of activations, and holds it inside the block.

    Args:
        manifest: all that decides a number or a label, with the prompts' token ids under "tokens".

    Raises:
        UserError: foreign files; a run without `resume`, or of another request; a disk without room; finished activations that are
            damaged (they are computed when the run is resumed again).
    """
    with RunFolder.open(out, cache_manifest(manifest), resume, LEGAL, table.bytes + 1_000_000) as folder:
        if not folder.continues and leads():
            _create(out, manifest, table)
        with folder.session() as session:
            wait_for_all("the arrays are laid out")
            cache = Cache(out, session, list(table.arrays))
            first_tells(lambda: float(cache.mend(folder, table)))
            cache.begin()
            try:
                yield cache
            finally:
                cache.flush()


def _create(out: Path, manifest: Mapping[str, Any], table: Labelled) -> None:
    """Lays out empty arrays, the manifest last."""
    count = len(table.coordinates["prompt"])
    together = min(layout.shards[0] for layout in table.arrays.values()) if several() else count  # processes share no chunk
    arrays = {**table.arrays, DONE: ArrayLayout((count,), (together,), "uint8", 0, ("prompt",))}
    for name in (*arrays, SUMS):
        shutil.rmtree(out / name, ignore_errors=True)
    for name, layout in arrays.items():
        open_array(out / name, layout)
    ChunkSums(out).make(list(table.arrays))
    _lay_out_labels(out, table)
    write_json(out / MANIFEST, {**manifest, "versions": versions()})


def _lay_out_labels(out: Path, table: Labelled) -> None:
    """Writes the coordinates and their checksums."""
    for name in table.coordinates:
        shutil.rmtree(out / name, ignore_errors=True)
    note_sums(out, lay_out(out, table.coordinates, table.attributes), [*table.arrays, DONE])


def read_cache(folder: Path) -> xr.Dataset:
    """The activations of a folder, lazily read."""
    return open_group(folder).drop_vars(DONE)
