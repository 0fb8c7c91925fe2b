"""Checksums by place, in the group `sums` beside the arrays of a Zarr group: a chunk's own checksum does not say whose chunk it is.

sums/NAME is uint32 with a number per chunk of the array NAME: the CRC-32 of the chunk's name and its values, 0 where none was written. The
attributes of `sums` hold the same of the arrays' metadata, that of `sums/NAME` included. Folders of earlier versions have no such group,
and pass.
"""

from __future__ import annotations

import itertools
import json
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.files.arrays import ArrayLayout, open_array, reason

GROUP, METADATA = "sums", "zarr.json"
MOVED = "holds other values than were written there"
UNSAID = "has no readable checksum"
Place = Sequence[Any]
"""Indices of a part of an array: an integer, a list or a slice for each of its first axes."""


def sum_of(name: str, values: Any) -> int:
    """CRC-32 of a name and of numbers or texts that stand under it; never 0."""
    held = np.asarray(values)
    content = held.reshape(-1) if held.dtype.kind in "biuf" else np.frombuffer("\0".join(map(str, held.reshape(-1))).encode(), np.uint8)
    return zlib.crc32(np.ascontiguousarray(content).view(np.uint8).data, zlib.crc32(name.encode())) or 1


class ChunkSums:
    """The checksums of a Zarr group's chunks.

    Attributes:
        folder: where they are; nothing is there in folders of earlier versions.
    """

    def __init__(self, group: Path):
        self.group, self.folder = group, group / GROUP
        self._open: dict[tuple[str, bool], Any] = {}
        self._row: dict[str, tuple[int, np.ndarray]] = {}
        self._changed: dict[str, bool] = {}

    def make(self, names: Sequence[str]) -> None:
        """Lays out empty checksums of arrays, which are there already."""
        self.folder.mkdir(exist_ok=True)
        _write_group(self.folder, {})
        for name in names:
            self._make(name)
        self.note_metadata([f"{GROUP}/{name}" for name in names])

    def _make(self, name: str) -> None:
        array = open_array(self.group / name, partial=True)
        grid = tuple(-(-size // step) for size, step in zip(array.shape, array.chunk_layout.write_chunk.shape, strict=True))
        open_array(self.folder / name, ArrayLayout(grid, (1, *grid[1:]), "uint32"))

    def reset(self, name: str, row: int) -> None:
        """Makes room for new checksums of chunks whose first number is `row`, where those that are there cannot be read."""
        try:
            usable = not self._is_changed(name) and open_array(self.folder / name, partial=True)
        except (ValueError, OSError):
            usable = False
        if not usable:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            self._make(name)
            self.note_metadata([f"{GROUP}/{name}"])
            self._changed[name] = False
        held = self.folder / name / "c" / str(row)
        shutil.rmtree(held, ignore_errors=True)
        held.unlink(missing_ok=True)

    def note_metadata(self, names: Sequence[str]) -> None:
        """Notes the checksums of the metadata of arrays; "" is the group itself."""
        held = self._metadata()
        if held is not None and (self.folder / METADATA).is_file():
            _write_group(self.folder, {**held, **{name: self._metadata_sum(name) for name in names}})

    def changed_metadata(self) -> list[str]:
        """Names of arrays whose metadata is not what was written; "" is the group itself, "sums" this one."""
        held = self._metadata()
        if held is None:
            return [GROUP]
        return [name for name, said in held.items() if not name.startswith(f"{GROUP}/") and self._metadata_sum(name) != said]

    def _is_changed(self, name: str) -> bool:
        """Whether the metadata of an array's checksums is not what was written; looked up once."""
        if name not in self._changed:
            key = f"{GROUP}/{name}"
            said = (self._metadata() or {}).get(key)
            self._changed[name] = said is not None and said != self._metadata_sum(key)
        return self._changed[name]

    def _metadata_sum(self, name: str) -> int:
        """0 of metadata that cannot be read."""
        try:
            return zlib.crc32((self.group / name / METADATA).read_bytes(), zlib.crc32(name.encode())) or 1
        except OSError:
            return 0

    def _metadata(self) -> dict[str, int] | None:
        """The attributes of `sums`; empty where there is no such group, None where it is not as it was written."""
        file = self.folder / METADATA
        if not file.is_file():
            return {}
        try:
            text = file.read_text(encoding="utf-8")
            held = dict(json.loads(text)["attributes"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return held if _group_text(held) == text else None

    def set_whole(self, name: str, values: Any) -> None:
        """Notes the checksum of an array that was written at once, as one chunk."""
        ((cell, said),) = _whole(name, values)
        grid = (1,) * len(cell)
        open_array(self.folder / name, ArrayLayout(grid, grid, "uint32"))[cell].write(np.uint32(said)).result()
        self.note_metadata([f"{GROUP}/{name}"])

    def forget(self, names: Iterable[str]) -> None:
        """Drops the checksums of arrays that are removed, or are about to be written anew."""
        if (self.folder / METADATA).is_file():
            names = {*names}
            gone = names | {f"{GROUP}/{name}" for name in names}
            _write_group(self.folder, {name: said for name, said in (self._metadata() or {}).items() if name not in gone})
            for name in names:
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def write(self, name: str, array: Any, place: Place, values: Any) -> list[Any]:
        """Begins to note the checksums of chunks that are written; returns what to wait for."""
        held = self._array(name, partial=True)
        if held is None:
            return []
        return [held[cell].write(np.uint32(said)) for cell, said in _cells(name, array, place, values)]

    def problem(self, name: str, array: Any, place: Place, values: Any) -> str:
        """What is wrong with values that were read at a place, or "".

        Args:
            array: None where the array was written at once.
        """
        try:
            held = self._array(name)
            if held is None:
                return ""
            if self._is_changed(name):
                return f"{UNSAID}: the metadata of {GROUP}/{name} is not what was written"
            cells = _whole(name, values) if array is None else _cells(name, array, place, values)
            return MOVED if any(self._said(name, held, cell) not in (0, found) for cell, found in cells) else ""
        except (ValueError, OSError) as error:
            return f"{UNSAID}: {GROUP}/{name} is {reason(error)}"

    def _array(self, name: str, partial: bool = False) -> Any:
        if (name, partial) not in self._open:
            self._open[name, partial] = open_array(self.folder / name, partial=partial) if (self.folder / name).is_dir() else None
        return self._open[name, partial]

    def _said(self, name: str, held: Any, cell: tuple[int, ...]) -> int:
        """A stored number; rows of them are read once."""
        if self._row.get(name, (-1,))[0] != cell[0]:
            self._row[name] = cell[0], held[cell[0]].read().result()
        return int(self._row[name][1][cell[1:]])


def _whole(name: str, values: Any) -> list[tuple[tuple[int, ...], int]]:
    """`_cells` of an array that is one chunk."""
    cell = (0,) * max(1, np.asarray(values).ndim)
    return [(cell, sum_of(_key(name, cell), values))]


def _key(name: str, cell: tuple[int, ...]) -> str:
    return f"{name}/{'/'.join(map(str, cell))}"


def _cells(name: str, array: Any, place: Place, values: Any) -> Iterator[tuple[tuple[int, ...], int]]:
    """(place in the grid, checksum) of every chunk of some values; 0 of those that are not whole."""
    shape, steps = array.shape, array.chunk_layout.write_chunk.shape
    place = (*place, *[slice(None)] * (len(shape) - len(place)))
    wanted = [np.atleast_1d(np.arange(size)[at]) for size, at in zip(shape, place, strict=True)]
    given = [len(one) for one, at in zip(wanted, place, strict=True) if not isinstance(at, int)]
    values = np.broadcast_to(np.asarray(values, array.dtype.numpy_dtype), given).reshape([len(one) for one in wanted])
    rows = [one // step for one, step in zip(wanted, steps, strict=True)]
    for cell in itertools.product(*(dict.fromkeys(one.tolist()) for one in rows)):
        inside = [np.flatnonzero(one == at) for one, at in zip(rows, cell, strict=True)]
        whole = [min(step, size - at * step) for step, size, at in zip(steps, shape, cell, strict=True)]
        chunk = values[tuple(slice(one[0], one[-1] + 1) for one in inside)]
        yield cell, sum_of(_key(name, cell), chunk) if [len(one) for one in inside] == whole else 0


def _group_text(attributes: dict[str, int]) -> str:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=1)


def _write_group(folder: Path, attributes: dict[str, int]) -> None:
    (folder / METADATA).write_text(_group_text(attributes), encoding="utf-8")
