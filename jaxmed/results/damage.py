"""What of a table was written and cannot be read: found by its checksums, named, and marked so that a resumed run computes it again."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import Crc32cCodec

from jaxmed.errors import UserError, all_problems
from jaxmed.files.arrays import find_damage, open_array, reason
from jaxmed.files.chunk_sums import UNSAID, ChunkSums
from jaxmed.results.table import TABLE, Table, label, open_group
from jaxmed.runs.folder import RUN, RunFolder, read_run

STATISTICS = ("_mean", "_ci_low", "_ci_high", "_t", "_p", "_p_adjusted", "_q", "_p_margin", "noise_floor")
"""Endings of what `summarise` writes, which is made again from the effects."""


CHANGED = "its metadata is not what was written (if it was changed on purpose, delete the folder sums)"


@dataclass(frozen=True)
class Damage:
    """A part of a table.

    Attributes:
        why: "missing", or what is wrong with its bytes.
        pair, layer: which part; None: all.
        name: the pair's.
    """

    variable: str
    why: str
    pair: int | None = None
    layer: int | None = None
    name: str = ""

    def __str__(self) -> str:
        pair = f", pair {self.name!r}" if self.pair is not None else ""
        return f"{TABLE}/{self.variable}{pair}{f', layer {self.layer}' if self.layer is not None else ''}: {self.why}"


def damaged_parts(folder: Path, status: str) -> list[Damage]:
    """Every part of a table that was written and cannot be read now; all of the table is read for that.

    Args:
        status: of the run, before it was continued: of a finished one no marker may be missing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr: strings are not in the v3 standard yet
        try:
            group = zarr.open_group(folder / TABLE, mode="r")
            arrays = {str(name): group[name] for name in sorted(group.array_keys())}
            swept = [name for name, array in arrays.items() if _is_swept(array)]
        except Exception as error:  # zarr raises many types on damaged metadata
            return [Damage("zarr.json", f"damaged ({type(error).__name__}: {str(error)[:120]})")]
        named, sums = list(group.attrs.get("variables", ())), ChunkSums(folder / TABLE)  # type: ignore[arg-type]
        found = [Damage(str(name), "missing") for name in named if name not in arrays]
        found += [Damage(name or "zarr.json", CHANGED) for name in sums.changed_metadata() if name in arrays or name not in named]
        found += [damage for name, array in arrays.items() if name not in swept for damage in _whole(name, array, sums)]
        if any(damage.variable == "pair" for damage in found) or not {"pair", "done"} <= arrays.keys():
            return found or [Damage("the layout", "damaged")]
        pairs = [str(name) for name in np.asarray(arrays["pair"][...])]  # type: ignore[index]
    return [*found, *_chunks(folder, swept, pairs, status == "finished")]


def _is_swept(array: Any) -> bool:
    """Whether a variable is written pair by pair."""
    dims = array.metadata.dimension_names or ()
    return "pair" in dims and array.chunks[dims.index("pair")] == 1 and array.dtype.kind in "fu"


def _whole(name: str, array: Any, sums: ChunkSums) -> Iterator[Damage]:
    """Damage of a variable that is written at once."""
    try:
        why = sums.problem(name, None, (), array[...])
        checked = any(isinstance(codec, Crc32cCodec) for codec in array.metadata.codecs)
        if checked and array.size and array.nchunks_initialized < array.nchunks:
            why = "missing"
        if why:
            yield Damage(name, why)
    except Exception as error:  # many types, of codecs and of stores
        yield Damage(name, f"damaged ({str(error).splitlines()[0][:160] if str(error) else type(error).__name__})")


def damaged_labels(group: Path, names: Sequence[str]) -> dict[str, str]:
    """Name -> what is wrong, of arrays of a Zarr group that were written at once, and of all metadata ("zarr.json" is the group's)."""
    sums = ChunkSums(group)
    found = {name or "zarr.json": CHANGED for name in sums.changed_metadata()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr: strings are not in the v3 standard yet
        for name in names:
            try:
                found |= {one.variable: one.why for one in _whole(name, zarr.open_array(group / name, mode="r"), sums)}
            except Exception as error:  # zarr raises many types on damaged metadata
                found[name] = f"damaged ({type(error).__name__})"
    return found


def _chunks(folder: Path, names: list[str], pairs: list[str], finished: bool) -> Iterator[Damage]:
    """Damage of the variables that a sweep writes, one pair after the other."""
    arrays, sums = {}, ChunkSums(folder / TABLE)
    for name in names:
        try:
            arrays[name] = open_array(folder / TABLE / name)
        except (ValueError, OSError) as error:
            yield Damage(name, reason(error))
    arrays.pop("done", None)
    try:
        markers = open_array(folder / TABLE / "done", partial=not finished)
    except (ValueError, OSError):
        return  # named above
    for number, pair in enumerate(pairs):
        try:
            layers = np.flatnonzero(markers[number].read().result()).tolist()
        except (ValueError, OSError) as error:
            yield Damage("done", reason(error), number, None, pair)
            continue
        for name, array in arrays.items() if layers else ():
            places = [{"pair": number, "layer": layer} if "layer" in array.domain.labels else {"pair": number} for layer in layers]
            places = places if "layer" in array.domain.labels else places[:1]
            whys = find_damage(array, [label(array, place) for place in places], partial(sums.problem, name, array))
            yield from (Damage(name, why, number, at.get("layer"), pair) for at, why in zip(places, whys, strict=True) if why)


def mend(folder: RunFolder) -> None:
    """Takes the marker from every (pair, layer) of a continued run that is damaged, so that it is computed again, and says so.

    Raises:
        UserError: a run that was finished: its numbers may be in use, so they change at the next --resume alone; or damage of what no
            run computes (labels, the layout).
    """
    damage = damaged_parts(folder.path, folder.ended) if folder.continues else []
    shown = [str(one) for one in damage]
    if any(one.pair is None and not one.variable.endswith(STATISTICS) for one in damage):
        raise all_problems(str(folder.path), shown, "No run computes this again. Begin anew in another folder.")
    sums = ChunkSums(folder.path / TABLE)
    table, layers = Table(folder.path), zarr.open_group(folder.path / TABLE, mode="r")["done"].shape[1]  # type: ignore[union-attr]
    for pair in {one.pair for one in damage if one.variable == "done"}:
        table.write([("done", {"pair": pair}, np.zeros(layers, np.uint8))])  # type: ignore[dict-item]
    for one in damage:
        if one.pair is None:  # statistics: made again from the effects
            shutil.rmtree(folder.path / TABLE / one.variable, ignore_errors=True)
            sums.forget([one.variable])
        elif one.variable != "done":
            if one.why.startswith(UNSAID):
                sums.reset(one.variable, one.pair)
            for layer in range(layers) if one.layer is None else (one.layer,):
                table.mark_done(one.pair, layer, 0)
    folder.tell_damage(shown)


def open_results(folder: str | Path, check: bool = True) -> xr.Dataset:
    """The table of a finished or half-made run, lazily read.

    Args:
        check: read everything that was written once before, and compare its checksums.

    Raises:
        UserError: no table there, or one of which something is damaged or missing; all of it is named.
    """
    table = Path(folder) / TABLE
    if not table.is_dir():
        raise UserError(f"{folder} holds no {TABLE}. Give the --out folder of a sweep.")
    status = read_run(Path(folder)).get("status", "") if (Path(folder) / RUN).is_file() else ""
    if check and (damage := damaged_parts(Path(folder), status)):
        fix = "Nothing was made of this table. Run the sweep again with --resume to compute what is damaged."
        raise all_problems(str(folder), [str(one) for one in damage], fix)
    return open_group(table)
