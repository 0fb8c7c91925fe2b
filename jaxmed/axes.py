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

A parameter names its letters once (`models/params.py`); its sharding follows from `MESH_AXES`. The mesh has three axes:

    data     rows; nothing is sent between its devices in a sweep
    fsdp     rows too, and a part of every matrix: each layer's weights are gathered where the layer runs
    tensor   heads, neurons, experts and vocabulary: weights stay, and what attention and MLP add is summed
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, get_abstract_mesh

from jaxmed.errors import UserError

ROWS: tuple[str, ...] = ("data", "fsdp")
"""The mesh axes that split rows: batches, swept units, pairs."""
MESH_AXES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys("BUP", ROWS),
    **dict.fromkeys("NKFX", ("tensor",)),
    "V": ("tensor", "fsdp"),
    "D": ("fsdp",),
}
"""Logical axis -> mesh axes. A letter that is absent is replicated. `L` is never sharded: the layer loop slices it. `D` is split in
matrices alone, and not beside `V`: tables of the vocabulary are split by their rows, which need not be gathered to be multiplied by."""


def mesh_axes(letters: str, mesh: Mesh) -> list[tuple[str, ...]]:
    """The mesh axes, of those longer than one, that split each axis of a parameter; none for one that every device holds whole.

    Raises:
        UserError: two letters land on one mesh axis.
    """
    found: list[tuple[str, ...]] = []
    for letter in letters:
        whole = letter == "D" and ("V" in letters or len(letters.replace("L", "")) == 1)
        axes = [] if whole else [axis for axis in MESH_AXES.get(letter, ()) if mesh.shape.get(axis, 1) > 1]
        if any(axis in taken for axis in axes for taken in found):
            raise UserError(f"Axes {letters!r} put two letters on mesh axis {axes[0]!r}; change MESH_AXES.")
        found.append(tuple(axes))
    return found


def partition(letters: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of a parameter whose axes are `letters`.

    Raises:
        UserError: two letters land on one mesh axis, or an axis does not divide over its mesh axes.
    """
    found = mesh_axes(letters, mesh)
    for letter, size, axes in zip(letters, shape, found, strict=True):
        count = math.prod(mesh.shape[axis] for axis in axes)
        if size % count:
            given = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
            raise UserError(f"Axis {letter} of size {size} does not divide over the mesh axes {given}. Choose sizes that divide it.")
    return NamedSharding(mesh, PartitionSpec(*split_axes(letters, mesh)))


def split_axes(letters: str, mesh: Mesh) -> list[str | tuple[str, ...] | None]:
    """`mesh_axes`, as a partition spec has them."""
    return [_one(axes) for axes in mesh_axes(letters, mesh)]


def _one(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """Mesh axes as a partition spec has them."""
    return axes if len(axes) > 1 else axes[0] if axes else None


def row_parts(mesh: Mesh) -> int:
    """Over how many devices rows (batches, swept units, pairs) are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def vocabulary_parts(mesh: Mesh) -> int:
    """Over how many devices the rows of the unembedding are split."""
    return math.prod(mesh.shape[axis] for axis in MESH_AXES["V"])


def weight_parts(mesh: Mesh) -> int:
    """Over how many devices weights are split."""
    return math.prod(mesh.shape[axis] for axis in ("fsdp", "tensor"))


def row_sharding(mesh: Mesh, ahead: int = 0) -> NamedSharding:
    """The sharding of arrays whose axis number `ahead` is rows."""
    return NamedSharding(mesh, PartitionSpec(*[None] * ahead, ROWS))


def hold_rows(mesh: Mesh | None, x: jax.Array, axes: tuple[str, ...] = ROWS) -> jax.Array:
    """x [B,...], inside a program, with its rows split over these mesh axes, or held whole where they do not divide; x without a mesh."""
    if mesh is None:
        return x
    return _constrain(mesh, x, PartitionSpec(_dividing(mesh, x, axes), *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)))


def _dividing(mesh: Mesh, x: jax.Array, axes: tuple[str, ...]) -> tuple[str, ...] | None:
    """Those of the mesh axes that x [B,...] can be split over here, if its rows divide over them."""
    axes = tuple(axis for axis in axes if mesh.shape[axis] > 1 and axis not in get_abstract_mesh().manual_axes)
    return axes if x.shape[0] % math.prod(mesh.shape[axis] for axis in axes) == 0 else None


def whole_rows(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """x [B,...] with each row on all devices of "fsdp", which split the vocabulary: what its tables are multiplied by."""
    return hold_rows(mesh, x, ("data",))


def from_columns(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """x [B,...,D], rows of a matrix whose D is split over "fsdp": first as its devices hold them, then split as rows are."""
    if mesh is None:
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 2)
    return hold_rows(mesh, _constrain(mesh, x, PartitionSpec(_dividing(mesh, x, ("data",)), *free, "fsdp")))


@dataclass(frozen=True)
class Placement:
    """How a layer's matrix is split: by its letters, over a mesh; not at all without one."""

    mesh: Mesh | None = None
    letters: str = ""

    def gather(self, matrix: jax.Array) -> jax.Array:
        """The matrix on all devices of "fsdp". One layer's: it is gathered where it is used, and for as long."""
        return matrix if self.mesh is None else _constrain(self.mesh, self.split(matrix), self._spec(("fsdp",)))

    def split(self, matrix: jax.Array) -> jax.Array:
        """The matrix as parameters are kept."""
        return matrix if self.mesh is None else _constrain(self.mesh, matrix, self._spec(()))

    def apart(self, x: jax.Array) -> jax.Array:
        """x, one entry of whose first axis belongs to each device of "fsdp"."""
        return x if self.mesh is None else _constrain(self.mesh, x, PartitionSpec("fsdp", *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)))

    @property
    def parts(self) -> int:
        """Over how many devices of "fsdp" rows are split."""
        return 1 if self.mesh is None else self.mesh.shape["fsdp"]

    def _spec(self, without: tuple[str, ...]) -> PartitionSpec:
        assert self.mesh is not None
        found = mesh_axes(self.letters, self.mesh)
        return PartitionSpec(*(_one(tuple(axis for axis in axes if axis not in without)) for axes in found))


def _constrain(mesh: Mesh, x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """x in a sharding; inside of `shard_map`, of its other axes."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec) if get_abstract_mesh().empty else spec)


def lead(x: Any, rank: int) -> Any:
    """An array with leading axes of length one, `rank` axes in all, so that it broadcasts as written; a scalar as it is."""
    shape = jnp.shape(x)
    return x if not shape or len(shape) >= rank else jnp.reshape(x, (1,) * (rank - len(shape)) + shape)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
