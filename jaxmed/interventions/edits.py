"""Interventions by name: each function returns a dictionary of edits; `merge` joins several. `jm.edits` in Python."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxmed.errors import UserError
from jaxmed.interventions.edit import ANY, CURRENT, Edit, Edits, TokenIndex, Where, merge, numbers, where
from jaxmed.interventions.sites import site_name

__all__ = [
    "ANY",
    "CURRENT",
    "Edit",
    "Edits",
    "TokenIndex",
    "Where",
    "ablate_direction",
    "mean",
    "merge",
    "noise",
    "resample",
    "scale",
    "steer",
    "where",
    "zero",
]


def _at(site: str, gate: Any, value: Any, add: Any, layer: Any, position: Any, unit: Any) -> dict[str, Edit]:
    entries = where(layer, position, unit)
    count = len(entries.layer)

    if not count:
        raise UserError(f"The edit at {site!r} names no entries: nothing would be edited.")

    def field(x: Any) -> Any:
        x = numbers(f"A value of the edit at {site!r}", x)
        if x.ndim and x.shape[0] not in (1, count):
            entries = f"{count} {'entry' if count == 1 else 'entries'}"
            whole = " For one value of the whole unit axis, write values[None]." if count == 1 else ""
            raise UserError(
                f"The edit at {site!r} has values of shape {list(x.shape)} for {entries}: the first axis is [E = {count}].{whole}"
            )
        own = jnp if isinstance(x, Tracer) else np
        return own.broadcast_to(x, (count, *x.shape[1:])) if x.ndim else own.full(count, x)

    return {site_name(site): Edit(field(gate), field(value), field(add), None, entries)}


def resample(site: str, values: Any, layer: Any = ANY, position: Any = ANY, unit: Any = ANY) -> dict[str, Edit]:
    """Replaces entries by `values` [E] or [E, ...unit shape], for instance their values in another run."""
    return _at(site, 1.0, values, 0.0, layer, position, unit)


def zero(site: str, layer: Any = ANY, position: Any = ANY, unit: Any = ANY) -> dict[str, Edit]:
    """Replaces entries by zero."""
    return _at(site, 1.0, 0.0, 0.0, layer, position, unit)


def mean(site: str, means: Any, layer: Any = ANY, position: Any = ANY, unit: Any = ANY) -> dict[str, Edit]:
    """Replaces entries by `means` [E] or [E, ...unit shape], averages over a reference set."""
    return resample(site, means, layer, position, unit)


def noise(
    site: str, deviation: Any, shape: tuple[int, ...], seed: int, layer: Any = ANY, position: Any = ANY, unit: Any = ANY
) -> dict[str, Edit]:
    """Adds Gaussian noise of standard deviation `deviation` and shape `shape` ([E] or [E, ...unit shape])."""
    draw = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return _at(site, 0.0, 0.0, np.asarray(deviation, np.float32) * draw, layer, position, unit)


def scale(site: str, factor: Any, layer: Any = ANY, position: Any = ANY, unit: Any = ANY) -> dict[str, Edit]:
    """Multiplies entries by `factor` (scalar or [E])."""
    return _at(site, 1.0 - numbers("The factor", factor), 0.0, 0.0, layer, position, unit)


def steer(site: str, direction: Any, coefficient: Any = 1.0, layer: Any = ANY, position: Any = ANY) -> dict[str, Edit]:
    """Adds `coefficient * direction` ([D]) at the entries; the coefficient is a number."""
    size = numbers("The coefficient", coefficient)
    if size.ndim:
        raise UserError(f"The coefficient has shape {list(size.shape)}; one number is expected.")
    vector = size * numbers("The direction", direction)
    return _at(site, 0.0, 0.0, vector[None], layer, position, ANY)


def ablate_direction(site: str, direction: Any) -> dict[str, Edit]:
    """Removes the component along `direction` ([D]) at every layer and position (Arditi et al. 2024, arXiv 2406.11717)."""
    unit = numbers("The direction", direction)
    if isinstance(unit, Tracer):
        return {site_name(site): Edit(np.float32(1.0), np.float32(0.0), np.float32(0.0), (unit / jnp.linalg.norm(unit))[:, None])}
    length = np.linalg.norm(unit)
    if unit.ndim != 1 or not 0 < length < np.inf:
        raise UserError(f"The direction has shape {list(unit.shape)} and length {length:g}; a vector [D] that is not zero is expected.")
    unit = unit / length
    return {site_name(site): Edit(np.float32(1.0), np.float32(0.0), np.float32(0.0), unit[:, None])}
