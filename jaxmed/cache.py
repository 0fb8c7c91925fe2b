"""Activations on disk: a folder that is a Zarr group, with an array per site and the record of its run, written batch by batch.

`done[prompt]` is written after a batch's arrays are committed, and is the only thing that a resumed run trusts. MANIFEST says what the
arrays are of.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from jaxmed.files import ArrayLayout, find_damage, open_array, write_json
from jaxmed.files.arrays import open_checked
from jaxmed.interventions.sites import ALIASES, SITES
from jaxmed.results import Table, lay_out, open_group
from jaxmed.runs.folder import RunFolder, Session
from jaxmed.runs.legal import Legal
from jaxmed.runs.provenance import versions

MANIFEST, DONE, GROUP = "manifest.json", "done", "zarr.json"
PLACES = ("token_position", "key_position")
"""Coordinates that some folders have."""


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
    """An open folder that activations are written to.

    Attributes:
        done: bool [prompt].
    """

    def __init__(self, folder: Path, session: Session):
        self._table, self._session = Table(folder, "."), session
        self.done = self._table.done().astype(bool)

    def write(self, prompts: Sequence[int], found: Mapping[str, np.ndarray]) -> None:
        """Writes the activations [prompt, ...] of a batch, then marks its prompts as done.

        Raises:
            UserError: the disk is full; what was finished stays.
        """
        rows = {prompt: row for row, prompt in enumerate(prompts)}
        self._table.write([(name, {"prompt": prompt}, values[row]) for name, values in found.items() for prompt, row in rows.items()])
        self._mark(list(rows), 1)
        self._session.count(prompts=len(rows))

    def _mark(self, prompts: list[int], done: int) -> None:
        self._table.write([(DONE, {"prompt": prompts}, np.full(len(prompts), done, np.uint8))])
        self.done[prompts] = done

    def mend(self, folder: RunFolder, names: Sequence[str]) -> None:
        """Marks prompts that are damaged as not done, so that they are computed again, and says so.

        Raises:
            UserError: the run was finished: its numbers may be in use, so they change at the next resume alone.
        """
        finished, shown, lost = np.flatnonzero(self.done).tolist(), [], []
        for name in names:
            array = open_checked(folder.path / name, f"{folder.path / name}")
            for prompt in finished:
                if why := find_damage(array, [(prompt,)])[0]:
                    shown.append(f"{name}, prompt {prompt}: {why}")
                    lost.append(prompt)
        if lost:
            self._mark(sorted({*lost}), 0)
        folder.tell_damage(shown)


@contextmanager
def open_cache(out: Path, manifest: Mapping[str, Any], table: Labelled, resume: bool) -> Iterator[Cache]:
    """Begins or continues a folder of activations, and holds it inside the block.

    Args:
        manifest: all that decides a number or a label, with the prompts' token ids under "tokens".

    Raises:
        UserError: foreign files; a run without `resume`, or of another request; a disk without room; finished activations that are
            damaged (they are computed when the run is resumed again).
    """
    ids = hashlib.sha256(json.dumps(manifest["tokens"]).encode()).hexdigest()
    legal = Legal((MANIFEST, DONE, GROUP, *table.coordinates, *PLACES, *SITES, *ALIASES), needed=(MANIFEST,))
    with RunFolder.open(out, {**manifest, "tokens": ids}, resume, legal, table.bytes + 1_000_000) as folder:
        if not folder.continues:
            _create(out, manifest, table)
        with folder.session() as session:
            cache = Cache(out, session)
            cache.mend(folder, list(table.arrays))
            yield cache


def _create(out: Path, manifest: Mapping[str, Any], table: Labelled) -> None:
    """Lays out empty arrays, the manifest last."""
    count = len(table.coordinates["prompt"])
    arrays = {**table.arrays, DONE: ArrayLayout((count,), (count,), "uint8", 0, ("prompt",))}
    for name in (*table.coordinates, *arrays):
        shutil.rmtree(out / name, ignore_errors=True)
    lay_out(out, table.coordinates, table.attributes)
    for name, layout in arrays.items():
        open_array(out / name, layout)
    write_json(out / MANIFEST, {**manifest, "versions": versions()})


def read_cache(folder: Path) -> xr.Dataset:
    """The activations of a folder, lazily read."""
    return open_group(folder).drop_vars(DONE)
