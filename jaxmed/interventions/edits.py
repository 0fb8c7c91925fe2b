"""Interventions as arguments: an `Edit` is data, applied by blending inside the layer scan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxmed.errors import UserError
from jaxmed.interventions.sites import INTERNAL, SITES, Site, site_name

ANY = np.iinfo(np.int32).max
"""In a field of `Where`: every layer, position, unit or row."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Where:
    """Integer data that says which entries of a site an edit touches; one entry per element of axis `E`.

    Attributes:
        layer: int [E], 0-based, or `ANY`.
        position: int [E]; counts real tokens (padding does not count), negative from the last real token, or `ANY`.
        unit: int [E]; index on the site's unit axis (neuron, head, residual dimension), or `ANY`.
        row: int [E]; row of the batch, or `ANY`.
    """

    layer: Any
    position: Any
    unit: Any
    row: Any


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
    """

    gate: Any
    value: Any
    add: Any = 0.0
    basis: Any = None
    where: Where | None = None


Edits = Mapping[str, Edit]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenIndex:
    """Which token each column of a batch is: `position` int [B, T] counts real tokens, `length` int [B]."""

    position: Any
    length: Any


def where(layer: Any = ANY, position: Any = ANY, unit: Any = ANY, row: Any = ANY) -> Where:
    """A `Where` from scalars and lists, broadcast against each other to one axis `E`."""
    fields = np.broadcast_arrays(*(np.atleast_1d(np.asarray(field, np.int32)) for field in (layer, position, unit, row)))
    return Where(*(np.ascontiguousarray(field) for field in fields))


def blend(a: jax.Array, gate: Any, value: Any, add: Any, basis: Any) -> jax.Array:
    """`(1 - gate) * a + gate * value + add`, in float32, inside the span of `basis` if there is one."""
    wide = a.astype(jnp.float32)
    if basis is None:
        return ((1.0 - gate) * wide + gate * value + add).astype(a.dtype)
    shift = gate * (jnp.broadcast_to(value, wide.shape) - wide)
    project = lambda x: jnp.matmul(jnp.matmul(x, basis, precision="highest"), basis.T, precision="highest")  # noqa: E731
    return (wide + project(shift) + add).astype(a.dtype)


def apply_edit(edit: Edit, site: Site, a: jax.Array, layer: jax.Array, index: TokenIndex) -> jax.Array:
    """The edited activation of one layer. Dense fields are already this layer's slice."""
    if edit.where is None:
        return blend(a, edit.gate, edit.value, edit.add, edit.basis)
    heads_first = site.axes == "BNTS"
    a = jnp.moveaxis(a, 1, 2) if heads_first else a
    gate, value, add = (_spread(edit.where, field, a, layer, index) for field in (edit.gate, edit.value, edit.add))
    out = blend(a, gate, value, add, edit.basis)
    return jnp.moveaxis(out, 2, 1) if heads_first else out


def _spread(where: Where, field: Any, a: jax.Array, layer: jax.Array, index: TokenIndex) -> jax.Array:
    """`field` at the entries that `where` names in this layer, zero elsewhere: [B, T, ...unit shape]."""
    unit_shape = a.shape[2:]
    entries = where.layer.shape[0]
    hit = _matches(where.layer, layer)[:, None, None]  # [E, B, T]
    hit &= _matches(where.row[:, None, None], jnp.arange(a.shape[0])[:, None])
    position, from_right = index.position, index.position - index.length[:, None]
    wanted = where.position[:, None, None]
    hit &= _matches(wanted, position) | ((wanted < 0) & (wanted == from_right))
    hit &= position >= 0
    unit = _matches(where.unit[:, None], jnp.arange(unit_shape[0]))  # [E, unit]
    field = jnp.broadcast_to(jnp.asarray(field, jnp.float32), (entries, *jnp.shape(field)[1:]))
    missing = 1 + len(unit_shape) - field.ndim
    field = field.reshape((entries,) + (1,) * missing + field.shape[1:])
    masked = field * unit.reshape(unit.shape + (1,) * (len(unit_shape) - 1))
    return jnp.einsum("ebt,e...->bt...", hit.astype(jnp.float32), masked, precision="highest")


def _matches(wanted: jax.Array, actual: Any) -> jax.Array:
    return (wanted == ANY) | (wanted == actual)


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
    for i, j in np.ndindex(len(first.where.layer), len(second.where.layer)):
        if _overlap(first.where, i, second.where, j):
            raise UserError(
                f"Two edits touch the same entry of site {name!r} (layer {_shown(first.where.layer[i])}, position "
                f"{_shown(first.where.position[i])}, unit {_shown(first.where.unit[i])}). Drop one, or use different entries."
            )
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), first.where, second.where)
    at = (len(first.where.layer), len(second.where.layer))
    gate, value, add = (_concatenate((getattr(first, name), getattr(second, name)), at) for name in ("gate", "value", "add"))
    return Edit(gate, value, add, None, joined)


def _concatenate(fields: tuple[Any, Any], entries: tuple[int, int]) -> np.ndarray:
    """Two fields [E] or [E, ...], or scalars, as one with as many entries as both have."""
    rank = max(np.ndim(fields[0]), np.ndim(fields[1]), 1)
    shape = np.broadcast_shapes(*(np.shape(field)[1:] for field in fields))
    parts = []
    for field, count in zip(fields, entries, strict=True):
        field = np.asarray(field, np.float32)
        parts.append(np.broadcast_to(field.reshape(field.shape + (1,) * (rank - field.ndim)), (count, *shape)))
    return np.concatenate(parts)


def _overlap(a: Where, i: int, b: Where, j: int) -> bool:
    """Whether two entries may name the same element; positions counted from different ends count as overlapping."""

    def meets(x: int, y: int, two_ended: bool = False) -> bool:
        return x == y or ANY in (x, y) or (two_ended and (x < 0) != (y < 0))

    return (
        meets(a.layer[i], b.layer[j])
        and meets(a.row[i], b.row[j])
        and meets(a.unit[i], b.unit[j])
        and meets(a.position[i], b.position[j], two_ended=True)
    )


def _shown(value: int) -> str:
    return "any" if value == ANY else str(value)


def check_edits(edits: Edits | None, layers: int, sizes: Mapping[str, int]) -> dict[str, Edit]:
    """Edits with canonical site names, checked on the host.

    Args:
        layers: number of layers of the model.
        sizes: size of each letter of the legend.

    Raises:
        UserError: unknown or read-only site, a layer or unit out of range, or a value that is not finite (a NaN spreads even
            at gate 0).
    """
    checked: dict[str, Edit] = {}
    for name, edit in (edits or {}).items():
        if name in INTERNAL:
            raise UserError(f"Site {name!r} can be read, not edited. Editable: {', '.join(SITES)}.")
        name = site_name(name)
        if name in checked:
            raise UserError(f"Site {name!r} is given twice, under two names. Combine the edits with `merge`.")
        for field in ("gate", "value", "add", "basis"):
            array = getattr(edit, field)
            if array is not None and not isinstance(array, Tracer) and not np.all(np.isfinite(np.asarray(array, np.float32))):
                raise UserError(f"The {field} of the edit at {name!r} holds a value that is not finite.")
        if edit.where is not None:
            _check_range(name, "layer", edit.where.layer, layers)
            _check_range(name, "unit", edit.where.unit, sizes[SITES[name].unit])
            fields = (jnp.asarray(f, jnp.float32).reshape(-1) if jnp.ndim(f) == 0 else f for f in (edit.gate, edit.value, edit.add))
            edit = replace(edit, **dict(zip(("gate", "value", "add"), fields, strict=True)))
        checked[name] = edit
    return checked


def _check_range(name: str, what: str, index: Any, size: int) -> None:
    if isinstance(index, Tracer):
        return
    wrong = [int(i) for i in np.asarray(index) if i != ANY and not 0 <= i < size]
    if wrong:
        raise UserError(f"The edit at {name!r} names {what} {wrong[0]}; legal: 0 to {size - 1}.")
