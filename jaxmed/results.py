"""Labelled effect tables on disk, with provenance: `effects.zarr`, `run.json`, `top.csv`.

zarr and xarray lay the table out; TensorStore writes the numbers, one chunk per (pair, layer). `done[pair, layer]` is written
after the layer's chunks are committed, and is the only thing a resumed run trusts.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import xarray as xr
import zarr

from jaxmed.errors import UserError

TABLE, RUN, TOP, REPORT = "effects.zarr", "run.json", "top.csv", "report.html"
NEAR_TIE = 1e-3
"""Margin in router logits below which rounding may decide which expert of a mixture a token uses."""
_PARTIAL = ".effects.zarr.partial"
_OURS = {TABLE, RUN, TOP, REPORT, _PARTIAL, RUN + ".tmp", TOP + ".tmp", REPORT + ".tmp"}


@dataclass(frozen=True)
class Variable:
    """One numeric variable of the table; its chunks hold one (pair, layer), or one pair where it has no layer axis."""

    name: str
    dims: tuple[str, ...]
    dtype: str = "float32"


def check_folder(folder: Path, resume: bool) -> bool:
    """Whether a sweep can begin or go on in `folder`; returns True if it holds one to go on with.

    Raises:
        UserError: foreign files, or a run and no --resume.
    """
    return {RUN, TABLE} <= check_contents(folder, resume, _OURS)


def check_contents(folder: Path, resume: bool, ours: Collection[str], begins: tuple[str, ...] = ()) -> set[str]:
    """The names that a folder of results holds, before a run begins or goes on in it.

    Args:
        ours, begins: legal names, and what others may begin with.

    Raises:
        UserError: a file instead of a folder, foreign files, or a run and no --resume.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file. Give a folder.")
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(name for name in held if name not in ours and not name.startswith(begins))
    if foreign:
        raise UserError(f"--out {folder} holds something else ({', '.join(foreign[:5])}). Give a new or empty folder; nothing was written.")
    if RUN in held and not resume:
        raise UserError(f"--out {folder} holds a run already. Add --resume to continue it, or give another folder; nothing was written.")
    return held


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON so that a reader never sees half a file."""
    partial = file.with_name(file.name + ".tmp")
    partial.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(file)


def create(folder: Path, variables: Sequence[Variable], coordinates: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
    """Lays out an empty table (NaN, nothing done). `coordinates` maps a name to values, or to (dimension, values)."""
    partial, table = folder / _PARTIAL, folder / TABLE
    for leftover in (partial, table):
        shutil.rmtree(leftover, ignore_errors=True)
    coords = {k: v if isinstance(v, tuple) else ((k,), v) for k, v in coordinates.items()}
    dataset = xr.Dataset(coords=coords, attrs=dict(attributes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr: strings are not in the v3 standard yet
        dataset.to_zarr(partial, mode="w", zarr_format=3, consolidated=False)
        group = zarr.open_group(partial, mode="a")
        for variable in variables:
            shape = tuple(dataset.sizes[dim] for dim in variable.dims)
            chunks = tuple(1 if dim in _chunk_dims(variable) else size for dim, size in zip(variable.dims, shape, strict=True))
            fill = np.nan if variable.dtype == "float32" else 0
            group.create_array(
                variable.name, shape=shape, chunks=chunks, dtype=variable.dtype, fill_value=fill, dimension_names=variable.dims
            )
    partial.rename(table)


def _chunk_dims(variable: Variable) -> tuple[str, ...]:
    return ("pair",) if variable.name == "done" else ("pair", "layer")


class Table:
    """An open table that chunks are written to."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._arrays: dict[str, Any] = {}

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            path = str((self.folder / TABLE / name).resolve()) + os.sep
            self._arrays[name] = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}, open=True).result()
        return self._arrays[name]

    def write(self, chunks: Sequence[tuple[str, dict[str, int], np.ndarray]]) -> None:
        """Writes (variable, {dimension: index}, values) chunks; returns when all are committed.

        Raises:
            UserError: the disk is full or cannot be written; chunks committed before stay.
        """
        try:
            for pending in [self._array(name)[_label(self._array(name), at)].write(values) for name, at, values in chunks]:
                pending.result()
        except (ValueError, OSError, RuntimeError) as error:
            text = str(error)
            if any(word in text for word in ("No space", "RESOURCE_EXHAUSTED", "ENOSPC", "File too large", "quota", "Disk", "Permission")):
                raise UserError(
                    f"Could not write to {self.folder}: {text.splitlines()[0][:300]}\nWhat was finished is kept; continue with --resume."
                ) from None
            raise

    def done(self) -> np.ndarray:
        """uint8 [pair, layer]: which chunks are committed."""
        return np.asarray(self._array("done").read().result())

    def mark_done(self, pair: int, layer: int) -> None:
        """Marks one (pair, layer); call it after `write` returned."""
        self.write([("done", {"pair": pair, "layer": layer}, np.asarray(1, np.uint8))])


def _label(array: Any, at: Mapping[str, int]) -> tuple[Any, ...]:
    return tuple(at.get(label, slice(None)) for label in array.domain.labels)


def open_results(folder: str | Path) -> xr.Dataset:
    """The table of a finished or half-made run, lazily read.

    Raises:
        UserError: no table there.
    """
    table = Path(folder) / TABLE
    if not table.is_dir():
        raise UserError(f"{folder} holds no {TABLE}. Give the --out folder of a sweep.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return xr.open_zarr(table, consolidated=False, chunks=None)


def near_ties(table: xr.Dataset) -> tuple[int, int]:
    """How many (pair, layer) have a `routing_margin` below `NEAR_TIE`, and of how many it is known."""
    margin = table["routing_margin"].values
    return int((margin < NEAR_TIE).sum()), int((~np.isnan(margin)).sum())


def append(folder: Path, added: Mapping[str, tuple[Sequence[str], np.ndarray, Mapping[str, Any]]]) -> None:
    """Adds float32 variables name -> (dimensions, values, attributes) to a table; those already there are replaced."""
    group = zarr.open_group(folder / TABLE, mode="a")
    for name, (dims, values, attributes) in added.items():
        values = np.asarray(values, np.float32)
        array = group.create_array(
            name, shape=values.shape, chunks=values.shape, dtype="float32", fill_value=np.nan, dimension_names=tuple(dims), overwrite=True
        )
        array[...] = values
        array.attrs.update(dict(attributes))


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a folder."""
    try:
        return json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / RUN} cannot be read: {error}. Give another --out folder.") from None


def check_same(out: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises a UserError where the manifest of a run in `out` is not that of the run that would go on with it."""
    now = json.loads(json.dumps(now, default=str))
    different = [key for key in now if stored.get(key) != now[key]]
    if different:
        shown = "\n".join(f"  - {key}: {str(stored.get(key))[:120]} there, {str(now[key])[:120]} now" for key in different)
        raise UserError(
            f"--resume: {out} holds a run of another request:\n{shown}\nUse the same settings, or another --out. Nothing was written."
        )


def check_space(folder: Path, needed: int) -> None:
    """Raises a UserError if the disk has no room for `needed` bytes."""
    at = folder
    while not at.exists():
        at = at.parent
    free = shutil.disk_usage(at).free
    if free < needed:
        raise UserError(f"--out {folder} needs up to {needed / 1e6:.1f} MB and its disk has {free / 1e6:.1f} MB free. Nothing was written.")
