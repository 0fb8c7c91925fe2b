"""Interventions as arguments: an `Edit` is data, applied by blending inside the layer scan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxmed.errors import UserError, quoted
from jaxmed.interventions.sites import site_name

ANY = np.iinfo(np.int32).max
"""In a field of `Where`: every layer, position, unit or row."""
CURRENT = ANY - 1
"""As a position: every token as it is written, while text is generated; "current" in `where`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Where:
    """Integer data that says which entries of a site an edit touches; one entry per element of axis `E`.

    Attributes:
        layer: int [E], 0-based, or `ANY`.
        position: int [E]; counts real tokens (padding does not count), negative from the last real token, or `ANY`, or `CURRENT`.
        unit: int [E]; index on the site's unit axis (neuron, head, residual dimension), or `ANY`.
        row: int [E]; row of the batch, or `ANY`.
        names: which of "row", "position" and "unit" every entry names, where the others are `ANY` in every entry; None where entries differ
            or nobody looked. It decides how the edit is computed, not what it does. `where` finds out.
    """

    layer: Any
    position: Any
    unit: Any
    row: Any
    names: tuple[str, ...] | None = field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Edit:
    """Turns the activation `a` at its site into `(1 - gate) * a + gate * value + add`.

    At gate 1 this is a bit-exact swap, in bfloat16 too; at gate 0 with add 0 it changes nothing.

    Attributes:
        gate, value, add: with `where`: [E] or [E, ...] (right-aligned to the site's unit shape); without: a scalar, or
            an array that broadcasts to the stacked activation [L, B, T, ...].
        basis: None, or orthonormal columns [D, r]; the blend then acts only inside their span.
        where: None (dense), or the indexed entries. Sparse edits stay sparse: entries become a mask by index
            comparison, inside the scan, one layer at a time.
        tokens: None, or bool [B or 1, T], with dense edits: the columns they touch. So thousands of units of many rows are a gate
            [L, B, 1, F] and the values [L, 1, T, F] that all rows share.
    """

    gate: Any
    value: Any
    add: Any = 0.0
    basis: Any = None
    where: Where | None = None
    tokens: Any = None


Edits = Mapping[str, Edit]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenIndex:
    """Which token each column of a batch is: `position` int [B, T] counts real tokens, `length` int [B]."""

    position: Any
    length: Any


def where(layer: Any = ANY, position: Any = ANY, unit: Any = ANY, row: Any = ANY) -> Where:
    """A `Where` from scalars and lists, broadcast against each other to one axis `E`; "current" is a position too.

    Raises:
        UserError: what is no whole number; lists of lengths that do not go together.
    """
    if isinstance(position, str) and position == "current":
        position = CURRENT
    if isinstance(position, (list, tuple)):
        position = [CURRENT if isinstance(one, str) and one == "current" else one for one in position]
    given = {"layer": layer, "position": position, "unit": unit, "row": row}
    numbers = {name: _numbers(name, held) for name, held in given.items()}
    try:
        fields = np.broadcast_arrays(*numbers.values())
    except ValueError:
        said = ", ".join(f"{len(held)} {name}s" for name, held in numbers.items() if len(held) != 1)
        raise UserError(f"An edit names {said}. Give one of each, or lists of one length: the first of each belong together.") from None
    return with_names(Where(*map(np.ascontiguousarray, fields), names=None))


def _numbers(name: str, given: Any) -> np.ndarray:
    """What an edit names of one kind, as int32 [E]."""
    try:
        found = np.atleast_1d(np.asarray(given))
    except (ValueError, TypeError):  # lists of lists of different lengths; what JAX traces
        found = np.zeros((0, 0))
    if found.ndim != 1 or (found.size and (found.dtype.kind not in "iu" or not -ANY <= found.min() <= found.max() <= ANY)):
        words = 'a whole number, a list of them, or "current"' if name == "position" else "a whole number or a list of them"
        raise UserError(f"An edit's {name} is {quoted(given)}; {words} is expected.")
    return found.astype(np.int32)


def numbers(what: str, given: Any) -> Any:
    """Real numbers as float32, those that JAX traces as they are; a UserError where they are none."""
    if isinstance(given, Tracer):
        return given.astype(np.float32)
    try:
        found = np.asarray(given)
        if found.dtype.kind not in "biufVO" or any(entry is None for entry in found.ravel() if found.dtype.kind == "O"):  # V: bfloat16
            raise ValueError
        return np.asarray(found, np.float32)
    except (TypeError, ValueError):
        raise UserError(f"{what} is {quoted(given)}; numbers are expected.") from None


def with_names(entries: Where) -> Where:
    """The entries, with what all of them name."""
    named = {name: np.asarray(getattr(entries, name)) != ANY for name in ("row", "position", "unit")}
    mixed = any(flags.any() and not flags.all() for flags in named.values())
    return replace(entries, names=None if mixed else tuple(name for name, flags in named.items() if flags.size and flags.all()))


def merge(*parts: Edits) -> dict[str, Edit]:
    """One set of edits from several.

    Raises:
        UserError: two parts touch the same entry of the same site.
    """
    merged: dict[str, Edit] = {}
    for part in parts:
        for name, edit in part.items():
            name = site_name(name)
            merged[name] = _join(name, merged[name], edit) if name in merged else edit
    return merged


def _join(name: str, first: Edit, second: Edit) -> Edit:
    if first.where is None or second.where is None or first.basis is not None or second.basis is not None:
        raise UserError(f"Two edits touch site {name!r}, and at least one of them touches all of it. Apply them in two runs.")
    _refuse_overlap(name, first.where, second.where)
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), replace(first.where, names=None), replace(second.where, names=None))
    at = (len(first.where.layer), len(second.where.layer))
    gate, value, add = (_concatenate((getattr(first, name), getattr(second, name)), at) for name in ("gate", "value", "add"))
    return Edit(gate, value, add, None, with_names(joined))


def _concatenate(fields: tuple[Any, Any], entries: tuple[int, int]) -> np.ndarray:
    """Two fields [E] or [E, ...], or scalars, as one with as many entries as both have."""
    rank = max(np.ndim(fields[0]), np.ndim(fields[1]), 1)
    shape = np.broadcast_shapes(*(np.shape(given)[1:] for given in fields))
    parts = []
    for given, count in zip(fields, entries, strict=True):
        given = np.asarray(given, np.float32)
        parts.append(np.broadcast_to(given.reshape(given.shape + (1,) * (rank - given.ndim)), (count, *shape)))
    return np.concatenate(parts)


COMPARED = 1 << 24
"""Pairs of entries that are compared at once."""


def _refuse_overlap(name: str, first: Where, second: Where) -> None:
    """Raises a UserError where an entry of one may name the same element as an entry of the other.

    Positions counted from different ends count as the same.
    """
    size = max(1, COMPARED // max(len(second.layer), 1))
    for begin in range(0, len(first.layer), size):
        block = jax.tree.map(lambda x, begin=begin: np.asarray(x)[begin : begin + size, None], replace(first, names=None))
        meet = np.ones((len(block.layer), len(second.layer)), bool)
        for one in ("layer", "row", "unit", "position"):
            ours, theirs = getattr(block, one), np.asarray(getattr(second, one))
            same = (ours == theirs) | (ours == ANY) | (theirs == ANY)
            if one == "position":  # of a written token, the number may be any
                same |= ((ours < 0) != (theirs < 0)) | (ours == CURRENT) | (theirs == CURRENT)
            meet &= same
        if meet.any():
            at = begin + int(np.argwhere(meet)[0, 0])
            raise UserError(
                f"Two edits touch the same entry of site {name!r} (layer {_shown(first.layer[at])}, position "
                f"{_shown(first.position[at])}, unit {_shown(first.unit[at])}). Drop one, or use different entries."
            )


def _shown(value: np.integer) -> str:
    return {ANY: "any", CURRENT: "current"}.get(int(value), str(value))
