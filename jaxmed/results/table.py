"""Labelled effect tables on disk: `effects.zarr` and `top.csv`, beside the record of the run.

zarr and xarray lay the table out; TensorStore writes the numbers, one chunk per (pair, layer). `done[pair, layer]` is written
after the layer's chunks are committed, and is the only thing a resumed run trusts. Every chunk carries a checksum, and one that is
missing or damaged though its layer is done is found before anything is made of the table (`damage`).
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from jaxmed.errors import UserError
from jaxmed.files.arrays import open_array, reason
from jaxmed.files.chunk_sums import ChunkSums
from jaxmed.hosts import leads
from jaxmed.runs.legal import Legal

TABLE, TOP, REPORT = "effects.zarr", "top.csv", "report.html"
NEAR_TIE = 1e-3
"""Margin in router logits below which rounding may decide which expert of a mixture a token uses."""
_PARTIAL = ".effects.zarr.partial"
LEGAL = Legal((TABLE, TOP, REPORT, _PARTIAL), needed=(TABLE,))
"""What the folder of a sweep may hold."""
CODECS = (ZstdCodec(level=0), Crc32cCodec())
"""Of every array; the checksum covers the bytes on the disk."""


@dataclass(frozen=True)
class Variable:
    """One numeric variable of the table; its chunks hold one (pair, layer), or one pair where it has no layer axis."""

    name: str
    dims: tuple[str, ...]
    dtype: str = "float32"
    attributes: Mapping[str, Any] = field(default_factory=dict)


def lay_out(path: Path, coordinates: Mapping[str, Any], attributes: Mapping[str, Any]) -> xr.Dataset:
    """Writes a Zarr group with coordinates alone; `coordinates` maps a name to values, or to (dimensions, values)."""
    coords = {k: v if isinstance(v, tuple) else ((k,), v) for k, v in coordinates.items()}
    dataset = xr.Dataset(coords=coords, attrs=dict(attributes))
    encoding = {name: {"compressors": CODECS} for name in coords}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr: strings are not in the v3 standard yet
        dataset.to_zarr(path, mode="a", zarr_format=3, consolidated=False, encoding=encoding, write_empty_chunks=True)
    return dataset


def note_sums(path: Path, dataset: xr.Dataset, names: Sequence[str]) -> None:
    """Notes the checksums of a group's coordinates, and of its metadata and that of the arrays `names`."""
    sums = ChunkSums(path)
    for name in dataset.coords:
        sums.set_whole(str(name), dataset[name].values)
    sums.note_metadata(["", *map(str, dataset.coords), *names])


def open_group(path: Path) -> xr.Dataset:
    """A Zarr group, lazily read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr: strings are not in the v3 standard yet, and other files may lie beside the arrays
        return xr.open_zarr(path, consolidated=False, chunks=None)


def create(folder: Path, variables: Sequence[Variable], coordinates: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
    """Lays out an empty table (NaN, nothing done); see `lay_out`."""
    partial, table = folder / _PARTIAL, folder / TABLE
    for leftover in (partial, table):
        shutil.rmtree(leftover, ignore_errors=True)
    dataset = lay_out(partial, coordinates, {**attributes, "variables": [variable.name for variable in variables]})
    group = zarr.open_group(partial, mode="a")
    for variable in variables:
        shape = tuple(dataset.sizes[dim] for dim in variable.dims)
        chunks = tuple(1 if dim in _chunk_dims(variable.name) else size for dim, size in zip(variable.dims, shape, strict=True))
        fill = np.nan if variable.dtype == "float32" else 0
        array = group.create_array(
            variable.name,
            shape=shape,
            chunks=chunks,
            dtype=variable.dtype,
            fill_value=fill,
            dimension_names=variable.dims,
            compressors=CODECS,
        )
        array.attrs.update(dict(variable.attributes))
    names = [variable.name for variable in variables]
    ChunkSums(partial).make([name for name in names if name != "done"])  # a marker that is not true is found by what it marks
    note_sums(partial, dataset, names)
    partial.rename(table)


def _chunk_dims(name: str) -> tuple[str, ...]:
    return ("pair",) if name == "done" else ("pair", "layer")


class Table:
    """An open table that chunks are written to.

    Attributes:
        folder, table: the folder of a run, and the table in it.
        apart: whether each of several processes writes chunks of its own; else the first writes all.
    """

    def __init__(self, folder: Path, table: str = TABLE, apart: bool = False):
        self.folder, self.table, self.apart = folder, table, apart
        self._arrays: dict[str, Any] = {}
        self._sums = ChunkSums(folder / table)

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            self._arrays[name] = open_array(self.folder / self.table / name, partial=True)
        return self._arrays[name]

    def write(self, chunks: Sequence[tuple[str, Mapping[str, Any], np.ndarray]]) -> None:
        """Writes (variable, {dimension: index}, values) chunks; returns when all are committed.

        Of several processes the first one writes, unless `apart`.

        Raises:
            UserError: the disk is full or cannot be written; chunks committed before stay.
        """
        if not (self.apart or leads()):
            return
        try:
            places = [(name, self._array(name), label(self._array(name), at), values) for name, at, values in chunks]
            pending = [array[place].write(values) for _, array, place, values in places]
            for one in [*pending, *(sums for written in places for sums in self._sums.write(*written))]:
                one.result()
        except (ValueError, OSError, RuntimeError) as error:
            text = str(error)
            if any(word in text for word in ("No space", "RESOURCE_EXHAUSTED", "ENOSPC", "File too large", "quota", "Disk", "Permission")):
                raise UserError(
                    f"Could not write to {self.folder}: {text.splitlines()[0][:300]}\nWhat was finished is kept; continue with --resume."
                ) from None
            raise

    def done(self) -> np.ndarray:
        """uint8 [pair, layer], or as the table has it: which chunks are committed.

        Raises:
            UserError: the markers are damaged; see `damage.mend`.
        """
        try:
            return np.asarray(self._array("done").read().result())
        except (ValueError, OSError) as error:
            raise UserError(f"{self.folder / self.table / 'done'}: {reason(error)}. Continue the run with --resume.") from None

    def mark_done(self, pair: int, layer: int | Sequence[int], done: int = 1) -> None:
        """Marks layers of a pair, all at once; call it after `write` returned."""
        layers = [layer] if isinstance(layer, int) else list(layer)
        self.write([("done", {"pair": pair, "layer": layers}, np.full(len(layers), done, np.uint8))])


def label(array: Any, at: Mapping[str, Any]) -> tuple[Any, ...]:
    """The index of a chunk: numbers, or lists of them, where `at` has them, all along the other axes."""
    return tuple(at.get(label, slice(None)) for label in array.domain.labels)


def near_ties(table: xr.Dataset) -> tuple[int, int]:
    """How many (pair, layer) have a `routing_margin` below `NEAR_TIE`, and of how many it is known."""
    margin = table["routing_margin"].values
    return int((margin < NEAR_TIE).sum()), int((~np.isnan(margin)).sum())


def not_finite(table: xr.Dataset) -> dict[str, int]:
    """Variable -> how many of its (pair, layer) were computed and hold a number that is not finite; those alone that have some.

    Of a table with positions the last one counts: it is there for every pair, and others are NaN where a prompt is shorter.
    """
    done, found = table["done"].values.astype(bool), {}
    for name, variable in table.data_vars.items():
        if not {"pair", "layer"} <= {*variable.dims} or variable.dtype.kind != "f" or name == "routing_margin" or "of" in variable.attrs:
            continue
        last = variable.isel(position=-1) if "position" in variable.dims else variable
        ordered = last.transpose("pair", "layer", ...)
        wrong = [~np.isfinite(ordered[number].values).reshape(done.shape[1], -1).all(axis=1) for number in range(len(done))]
        if (count := int((np.asarray(wrong) & done).sum())) > 0:
            found[str(name)] = count
    return found


def append(folder: Path, added: Mapping[str, tuple[Sequence[str], np.ndarray, Mapping[str, Any]]]) -> None:
    """Adds float32 variables name -> (dimensions, values, attributes) to a table; those already there are replaced."""
    group, sums = zarr.open_group(folder / TABLE, mode="a"), ChunkSums(folder / TABLE)
    sums.forget(added)
    for name, (dims, values, attributes) in added.items():
        values = np.asarray(values, np.float32)
        array = group.create_array(
            name,
            shape=values.shape,
            chunks=values.shape,
            dtype="float32",
            fill_value=np.nan,
            dimension_names=tuple(dims),
            compressors=CODECS,
            config={"write_empty_chunks": True},
            overwrite=True,
        )
        array[...] = values
        array.attrs.update(dict(attributes))
        if sums.folder.is_dir():
            sums.set_whole(name, values)
    sums.note_metadata([*added])
