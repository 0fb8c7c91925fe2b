"""GradDrop: first-order effects that do not cancel along different ways (Kramár et al. 2024, arXiv 2403.00745).

A unit's direct and indirect effects may cancel in the gradient at the base run, and not in a whole patch. So the backward is repeated, each
time as if one layer, attention and MLP, added a constant to the residual stream; a unit's value is the mean of its absolute effects over
the L - 1 layers that are not its own. It is unsigned. The outcomes of all backwards are rows of one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmed.effects.rows import Record

GRADDROP = "graddrop"
"""Ending of the variable's name."""


def dropped_rows(gradient: jax.Array, first: int, layers: int) -> tuple[jax.Array, jax.Array]:
    """The layers that are dropped, int [n], -1 for none; and the last stream's gradient [O,...] for each of them, [n * O, ...].

    To drop the layer `first` or one before it changes no gradient from `first` on.
    """
    dropped = jnp.asarray([-1, *range(first + 1, layers)])
    return dropped, jnp.tile(gradient, (len(dropped), *(1,) * (gradient.ndim - 1)))


def with_drops(effects: Record, dropped: jax.Array, number: jax.Array, layers: int) -> Record:
    """Effects [n * O, ...] of a layer's units -> those without any drop, [O, ...], and their GradDrop values beside them.

    Drops of the layers before the unit's own are as none; they count, and so the mean is over all other layers.
    """
    weight = jnp.where(dropped < 0, number, (dropped > number).astype(number.dtype)) / max(layers - 1, 1)
    found: Record = {}
    for unit, values in effects.items():
        apart = values.reshape(len(dropped), -1, *values.shape[1:])
        found |= {unit: apart[0], f"{unit}_{GRADDROP}": jnp.tensordot(weight.astype(values.dtype), jnp.abs(apart), 1)}
    return found
