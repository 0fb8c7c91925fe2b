"""Edits held against the run that they are for, on the host, before anything is traced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxmed.errors import UserError, quoted
from jaxmed.interventions.edit import numbers
from jaxmed.interventions.edits import ANY, CURRENT, Edit, Edits, Where
from jaxmed.interventions.sites import INTERNAL, SITES, check_sites, site_name

ORTHONORMAL = 1e-2
"""How far products of a basis' columns may be from 0 and 1: bfloat16 has three digits."""


@dataclass(frozen=True)
class Extent:
    """What a run has, for edits to be held against.

    Attributes:
        layers: of the model.
        sizes: size of each letter of the legend; "S" is the number of key tokens.
        rows: int [B], real tokens of every row; None where nobody knows yet.
    """

    layers: int
    sizes: Mapping[str, int]
    rows: tuple[int, ...] | None = None


def check_edits(edits: Edits | None, extent: Extent) -> dict[str, Edit]:
    """Edits with canonical site names, checked on the host.

    Raises:
        UserError: unknown or read-only site, or one that the model lacks; a layer, unit, row or position that the run does not have (such
            an edit would change nothing without a word); a field of another shape than the site; or a value that is not finite (a NaN
            spreads even at gate 0).
    """
    checked: dict[str, Edit] = {}
    if not isinstance(edits, Mapping | None):
        raise UserError(f"edits is a dictionary, site -> Edit, as the functions of jm.edits return it; not {quoted(edits)}.")
    for name, edit in (edits or {}).items():
        if not isinstance(edit, Edit):
            raise UserError(f"The edit at {quoted(name)} is {quoted(edit)}; an Edit is expected, as the functions of jm.edits make it.")
        if name in INTERNAL:
            raise UserError(f"Site {name!r} can be read, not edited. Editable: {', '.join(SITES)}.")
        name = site_name(name)
        check_sites(extent.sizes, [name])
        if name in checked:
            raise UserError(f"Site {name!r} is given twice, under two names. Combine the edits with `merge`.")
        for which in ("gate", "value", "add", "basis"):
            array = getattr(edit, which)
            if isinstance(array, Tracer) or (array is None and which == "basis"):
                continue
            if not np.all(np.isfinite(numbers(f"The {which} of the edit at {name!r}", array))):
                raise UserError(f"The {which} of the edit at {name!r} holds a value that is not finite.")
        _check_basis(name, edit, extent)
        checked[name] = _check_dense(name, edit, extent) if edit.where is None else _check_indexed(name, edit, edit.where, extent)
    return checked


def _check_dense(name: str, edit: Edit, extent: Extent) -> Edit:
    """A dense edit whose fields are scalars or have every axis of the stacked activation: fewer axes would be read as other ones."""
    letters = "L" + SITES[name].axes
    sizes = {"L": extent.layers, **extent.sizes, "T": extent.sizes.get("T", 0), "B": len(extent.rows or ())}
    for which in ("gate", "value", "add"):
        shape = np.shape(getattr(edit, which))
        if shape and (
            len(shape) != len(letters) or any(n != 1 and sizes[c] and n != sizes[c] for c, n in zip(letters, shape, strict=True))
        ):
            wanted = ", ".join(f"{letter} = {sizes[letter]}" if sizes[letter] else letter for letter in letters)
            raise UserError(
                f"The {which} of the edit at {name!r} has shape {list(shape)}; legal: a scalar, or [{wanted}] with 1 for any of them. "
                "Name single entries with `where`."
            )
    rows, length = len(extent.rows or ()), sizes["T"]
    if edit.tokens is not None and not (
        np.ndim(edit.tokens) == 2 and np.shape(edit.tokens)[0] in (1, rows or 1) and np.shape(edit.tokens)[1] == (length or -1)
    ):
        raise UserError(
            f"The tokens of the edit at {name!r} have shape {list(np.shape(edit.tokens))}; "
            f"legal: bool [{rows or 'B'} or 1, {length or 'T'}]."
        )
    return edit


def _check_indexed(name: str, edit: Edit, entries: Where, extent: Extent) -> Edit:
    site = SITES[name]
    _check_range(name, "layer", entries.layer, 0, extent.layers)
    _check_range(name, "unit", entries.unit, 0, extent.sizes[site.unit])
    if extent.rows is not None:
        _check_range(name, "row", entries.row, 0, len(extent.rows))
        _check_positions(name, entries, extent.rows)
    count = len(entries.layer)
    for which in ("gate", "value", "add"):
        shape, most = np.shape(getattr(edit, which)), len(site.axes) - 1
        unit = [extent.sizes.get(letter, 0) for letter in site.axes.replace("B", "").replace("T", "")]
        inner = shape[1:]
        fits = all(n == 1 or not size or n == size for n, size in zip(reversed(inner), reversed(unit), strict=False))
        if len(shape) > most or (shape and shape[0] not in (1, count)) or not fits:
            raise UserError(
                f"The {which} of the edit at {name!r} has shape {list(shape)}; legal: a scalar, [E] with E = {count} entries, "
                f"or [E, {', '.join(f'{letter} = {extent.sizes.get(letter)}' for letter in site.axes.replace('B', '').replace('T', ''))}]."
            )
    _refuse_repeats(name, entries, extent.rows)
    fields = (jnp.asarray(x, jnp.float32).reshape(-1) if jnp.ndim(x) == 0 else x for x in (edit.gate, edit.value, edit.add))
    return replace(edit, **dict(zip(("gate", "value", "add"), fields, strict=True)))


def _check_basis(name: str, edit: Edit, extent: Extent) -> None:
    """Directions have as many numbers as the site's last axis, and are orthonormal: else the blend would act on no subspace."""
    if edit.basis is None:
        return
    letter, shape = SITES[name].axes[-1], np.shape(edit.basis)
    if len(shape) != 2 or shape[0] != extent.sizes.get(letter, shape[0]):
        raise UserError(
            f"The basis of the edit at {name!r} has shape {list(shape)}; legal: [{letter} = {extent.sizes.get(letter)}, directions]."
        )
    if isinstance(edit.basis, Tracer):
        return
    columns = np.asarray(edit.basis, np.float64)
    if not np.allclose(columns.T @ columns, np.eye(shape[1]), atol=ORTHONORMAL):
        raise UserError(f"The basis of the edit at {name!r} has columns that are not orthonormal. Take np.linalg.qr(basis)[0].")


def _refuse_repeats(name: str, entries: Where, rows: tuple[int, ...] | None) -> None:
    """Entries that each name one element may not name the same one twice: which of them acts would be chance."""
    if entries.names != ("row", "position", "unit"):
        return
    row, position, unit, layer = (np.asarray(x, np.int64) for x in (entries.row, entries.position, entries.unit, entries.layer))
    if rows is not None:
        position = np.where(position < 0, position + np.asarray(rows)[row], position)
    every = np.stack([row, position, unit, np.zeros_like(layer) if (layer == ANY).any() else layer])
    if np.unique(every, axis=1).shape[1] < every.shape[1]:
        raise UserError(f"The edit at {name!r} names an entry twice. Give each (row, position, unit) of a layer once.")


def _check_positions(name: str, entries: Where, rows: tuple[int, ...]) -> None:
    if isinstance(entries.position, Tracer) or isinstance(entries.row, Tracer):
        return
    position, row = (np.asarray(x) for x in np.broadcast_arrays(entries.position, entries.row))
    lengths = np.asarray(rows)
    longest = np.where(row == ANY, lengths.max(initial=0), lengths[np.where(row == ANY, 0, row)])
    if (position == CURRENT).any():
        raise UserError(
            f'The edit at {name!r} has position="current", a token as it is written: `generate` writes, and `forward` reads tokens that '
            "are there. Leave the position out for every token, or give its number."
        )
    wrong = (position != ANY) & ((position >= longest) | (position < -longest))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise UserError(
            f"The edit at {name!r} names position {position[at]}, which matches no token; legal: {-longest[at]} to {longest[at] - 1}."
        )


def _check_range(name: str, what: str, index: Any, first: int, size: int) -> None:
    if isinstance(index, Tracer):
        return
    wrong = [int(i) for i in np.asarray(index) if i != ANY and not first <= i < size]
    if wrong:
        raise UserError(f"The edit at {name!r} names {what} {wrong[0]}; legal: {first} to {size - 1}.")
