"""The letter legend, and where each letter lives on the device mesh.

Einsum strings, shape annotations and comments use these letters and no others:

    B batch              T query position (or window slot)    S key position
    D residual width     N query heads                        K key/value heads
    H head width         F MLP neurons                        V vocabulary
    L layers             U units swept                        P pairs
    G query heads per key/value head (N = K * G)
    J rows of the fused projection per key/value head: G queries, one key, one value (J = G + 2)
    C branches of the MLP's input projection: gate and up, or up alone
    E entries of an indexed edit                              R answer tokens read from the logits, or rank of an adapter
    I fan-in and O fan-out of any matrix                      W gathered columns; w neurons of a window
    A microbatches of a step
    X experts of a mixture; M neurons of one expert (F = X * M)
    Q learned positions                                       Y inputs of the nodes of a graph

A parameter names its letters once (`models/transformer.py`); its sharding follows from `MESH_AXES`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmed.errors import UserError

MESH_AXES: dict[str, str] = dict.fromkeys("BUP", "data") | dict.fromkeys("NKFXV", "model")
"""Logical axis -> mesh axis. A letter that is absent is replicated. `L` is never sharded: the layer loop slices it."""


def partition(letters: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose axes are `letters`.

    Raises:
        UserError: two letters land on one mesh axis, or an axis does not divide over its mesh axis.
    """
    axes: list[str | None] = []
    for letter, size in zip(letters, shape, strict=True):
        axis = MESH_AXES.get(letter)
        if axis is None or mesh.shape.get(axis, 1) == 1:
            axes.append(None)
            continue
        if axis in axes:
            raise UserError(f"Axes {letters!r} put two letters on mesh axis {axis!r}; change MESH_AXES.")
        if size % mesh.shape[axis]:
            raise UserError(
                f"Axis {letter} of size {size} does not divide over mesh axis {axis}={mesh.shape[axis]}. "
                f"Choose a --mesh whose {axis!r} size divides {size}."
            )
        axes.append(axis)
    return NamedSharding(mesh, PartitionSpec(*axes))


def lead(x: Any, rank: int) -> Any:
    """An array with leading axes of length one, `rank` axes in all, so that it broadcasts as written; a scalar as it is."""
    shape = jnp.shape(x)
    return x if not shape or len(shape) >= rank else jnp.reshape(x, (1,) * (rank - len(shape)) + shape)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
