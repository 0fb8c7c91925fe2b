"""How edits act inside a run: on one layer's activation, at the entries that they name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.axes import lead
from jaxmed.interventions.edits import ANY, Edit, TokenIndex, Where
from jaxmed.interventions.sites import Site

Staged = Mapping[str, Edit | tuple[Edit, ...]]
"""Site -> an edit, or several that act one after another."""
Part = tuple[str, int]
"""(site, number among the edits of that site)."""


def in_order(edits: Staged) -> dict[Part, Edit]:
    """The edits one by one; those of one site in the order in which they act."""
    given = {name: several if isinstance(several, tuple) else (several,) for name, several in edits.items()}
    return {(name, number): edit for name, several in given.items() for number, edit in enumerate(several)}


def blend(a: jax.Array, gate: Any, value: Any, add: Any, basis: Any) -> jax.Array:
    """`(1 - gate) * a + gate * value + add`, in float32, inside the span of `basis` if there is one."""
    wide = a.astype(jnp.float32)
    gate, value, add = (lead(jnp.asarray(field, jnp.float32), a.ndim) for field in (gate, value, add))
    if basis is None:
        return ((1.0 - gate) * wide + gate * value + add).astype(a.dtype)
    shift = gate * (jnp.broadcast_to(value, wide.shape) - wide)
    inside = jnp.matmul(jnp.matmul(shift, basis, precision="highest"), basis.T, precision="highest")
    return (wide + inside + add).astype(a.dtype)


def apply_edit(edit: Edit, site: Site, a: jax.Array, layer: jax.Array, index: TokenIndex) -> jax.Array:
    """The edited activation of one layer. Dense fields are already this layer's slice."""
    if edit.where is None:
        return blend(a, _at_tokens(edit, site, edit.gate), edit.value, _at_tokens(edit, site, edit.add), edit.basis)
    heads_first = site.axes == "BNTS"
    a = jnp.moveaxis(a, 1, 2) if heads_first else a
    if edit.where.names == ("row", "position", "unit") and edit.basis is None:
        out = _set_points(edit, edit.where, a, layer, index)
    else:
        spread = _spread_mixed if edit.where.names is None else _spread
        gate, value, add = (spread(edit.where, field, a, layer, index) for field in (edit.gate, edit.value, edit.add))
        out = blend(a, gate, value, add, edit.basis)
    return jnp.moveaxis(out, 2, 1) if heads_first else out


def _at_tokens(edit: Edit, site: Site, field: Any) -> Any:
    """A field of a dense edit, zero at tokens that it does not touch."""
    field = jnp.asarray(field, jnp.float32)
    if edit.tokens is None:
        return field
    shape = [1] * len(site.axes)
    shape[site.axes.index("B")], shape[site.axes.index("T")] = edit.tokens.shape
    return lead(field, len(shape)) * jnp.asarray(edit.tokens, jnp.float32).reshape(shape)


def at_layer(edit: Edit, fixed: Mapping[str, Any], dense: Mapping[str, Any]) -> Edit:
    """A dense edit with the fields of one layer, from `split_dense` and the layer's slice; an indexed one as it is."""
    return edit if edit.where is not None else Edit(**fixed, **dense, basis=edit.basis, tokens=edit.tokens)


def split_dense(edits: Mapping[Part, Edit]) -> tuple[dict[Part, Any], dict[Part, Any]]:
    """Fields of dense edits: (those with a layer axis, which a loop over layers slices; those without)."""
    scanned, fixed = {}, {}
    for name, edit in edits.items():
        fields = {} if edit.where is not None else {f: getattr(edit, f) for f in ("gate", "value", "add")}
        per_layer = {f: jnp.asarray(x) for f, x in fields.items() if jnp.ndim(x) > 0 and jnp.shape(x)[0] > 1}
        scanned[name] = per_layer
        fixed[name] = {f: (x if jnp.ndim(x) == 0 else x[0]) for f, x in fields.items() if f not in per_layer}
    return scanned, fixed


def _matches(wanted: jax.Array, actual: Any) -> jax.Array:
    return (wanted == ANY) | (wanted == actual)


def _columns(where: Where, index: TokenIndex, rows: jax.Array) -> jax.Array:
    """int [E,R], the column of each entry's token in rows int [E or 1, R]; -1 where the run has no such column."""
    held = jnp.minimum(rows, index.position.shape[0] - 1)
    first, length = index.position[:, 0][held], jnp.broadcast_to(index.length, index.position.shape[:1])[held]
    wanted = where.position[:, None]
    token = jnp.where(wanted < 0, length + wanted, wanted)
    column = token - first
    return jnp.where((token >= 0) & (column >= 0) & (column < index.position.shape[1]), column, -1)


def _values(where: Where, field: Any, rank: int) -> jax.Array:
    """A field, scalar, [E] or [E, ...], as [E, 1..., ...] with `rank` axes behind E."""
    field = jnp.asarray(field, jnp.float32)
    field = jnp.broadcast_to(field, (where.layer.shape[0], *field.shape[1:]))
    return field.reshape(field.shape[:1] + (1,) * (rank + 1 - field.ndim) + field.shape[1:])


def _at_units(values: jax.Array, unit: jax.Array) -> jax.Array:
    """Values [E, unit or 1, ...] at each entry's own unit: [E, ...]."""
    return values[jnp.arange(len(values)), unit if values.shape[1] > 1 else 0]


def _set_points(edit: Edit, where: Where, a: jax.Array, layer: jax.Array, index: TokenIndex) -> jax.Array:
    """Entries that each name one row, token and unit: only those are read and written, so that sets of any size cost what they change."""
    column = _columns(where, index, where.row[:, None])[:, 0]
    row = jnp.where(_matches(where.layer, layer) & (column >= 0), where.row, a.shape[0])  # the others fall off the end
    at = row, column, where.unit
    gate, value, add = (_at_units(_values(where, field, a.ndim - 2), where.unit) for field in (edit.gate, edit.value, edit.add))
    return a.at[at].set(blend(a.at[at].get(mode="fill", fill_value=0), gate, value, add, None), mode="drop")


def _spread(where: Where, field: Any, a: jax.Array, layer: jax.Array, index: TokenIndex) -> jax.Array:
    """`field` at the entries of this layer, zero elsewhere: [B or 1, T or 1, unit or 1, ...], short where no entry names the axis.

    Entries are scattered: thousands of them need no mask over units each.
    """
    names, values = where.names or (), _values(where, field, a.ndim - 2)
    by_token, by_unit = "position" in names, "unit" in names
    rows = where.row[:, None] if "row" in names else jnp.arange(a.shape[0] if by_token else 1)[None]
    column = _columns(where, index, rows) if by_token else jnp.zeros((1, 1), jnp.int32)
    size = (a.shape[0] if by_token or "row" in names else 1, a.shape[1] if by_token else 1)
    row = jnp.where(_matches(where.layer, layer)[:, None] & (column >= 0), rows, size[0])
    at = (row, jnp.broadcast_to(column, row.shape))
    if by_unit:
        values, size, at = _at_units(values, where.unit), (*size, a.shape[2]), (*at, jnp.broadcast_to(where.unit[:, None], row.shape))
    values = jnp.broadcast_to(values[:, None], (*row.shape, *values.shape[1:]))
    spread = jnp.zeros((*size, *values.shape[2:]), jnp.float32).at[at].add(values, mode="drop")
    real = index.position >= 0  # padding is no token
    return spread * real.reshape(real.shape + (1,) * (a.ndim - 2)).astype(jnp.float32)


def _spread_mixed(where: Where, field: Any, a: jax.Array, layer: jax.Array, index: TokenIndex) -> jax.Array:
    """The same where some entries name an axis and others do not: [B, T, ...unit shape], by masks."""
    hit = _matches(where.layer, layer)[:, None, None]  # [E, B, T]
    hit &= _matches(where.row[:, None, None], jnp.arange(a.shape[0])[None, :, None])
    position, from_right = index.position[None], index.position[None] - jnp.reshape(index.length, (1, -1, 1))
    wanted = where.position[:, None, None]
    hit &= _matches(wanted, position) | ((wanted < 0) & (wanted == from_right))
    hit &= position >= 0
    unit = _matches(where.unit[:, None], jnp.arange(a.shape[2])[None])
    masked = _values(where, field, a.ndim - 2) * unit.reshape(unit.shape + (1,) * (a.ndim - 3)).astype(jnp.float32)
    return jnp.einsum("ebt,e...->bt...", hit.astype(jnp.float32), masked, precision="highest")
