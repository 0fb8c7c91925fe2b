"""What processes tell each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxmed.errors import UserError

T = TypeVar("T")


class Joined:
    """Whether this process is one of several; a process alone never asks its backend."""

    many = False
    items = 0


def several() -> bool:
    """Whether this process is one of several."""
    return Joined.many


def leads() -> bool:
    """Whether this process writes and prints: the first of several, or the only one."""
    if not Joined.many:
        return True
    import jax

    return jax.process_index() == 0


def agree(value: float) -> float:
    """The first process's value, in all of them. What decides the course of a run must be the same everywhere."""
    if not Joined.many:
        return value
    from jax.experimental import multihost_utils

    return float(multihost_utils.broadcast_one_to_all(np.float64(value)))


REFUSED = float("nan")
"""What the first process tells the others where it has refused."""


def first_tells(work: Callable[[], float]) -> float:
    """Runs `work` in the first process alone; what it returns, in all of them. Where it fails, the others end too.

    Raises:
        UserError: what `work` raises; in the other processes, that it failed.
    """
    if leads():
        try:
            found = float(work())
        except BaseException:
            agree(REFUSED)
            raise
        return agree(found)
    if np.isnan(found := agree(REFUSED)):
        raise UserError("The first process has refused to go on, and says why.")
    return found


ITEM, END = "jaxmed/item", "jaxmed/end"
"""Keys of what processes tell each other beside their devices: what the first decided after an item; who was asked to end."""
KEPT_ITEMS = 1000
LONGEST_ITEM = 7 * 24 * 3600 * 1000
"""Milliseconds. A process that is gone is noticed by its silence, long before."""


def told_to_end(number: int) -> int:
    """After an item: the signal that any process was sent, the same in all of them, so that all end after the same item; 0: go on.

    Processes tell the first one, and it decides. The messages go through the service that holds the processes together, so they wait for
    no device; a process goes on when the first one is as far.

    Args:
        number: the signal that this process was sent, or 0.
    """
    from jaxmed.hosts.state import client

    Joined.items += 1
    shared, item = client(), f"{ITEM}/{Joined.items}"
    if not leads():
        if number:
            shared.key_value_set(f"{END}/{number}", str(number), allow_overwrite=True)
        return int(shared.blocking_key_value_get(item, LONGEST_ITEM))
    asked = [int(value) for _, value in shared.key_value_dir_get(END)]
    decided = number or max(asked, default=0)
    shared.key_value_set(item, str(decided))
    if Joined.items > KEPT_ITEMS:
        shared.key_value_delete(f"{ITEM}/{Joined.items - KEPT_ITEMS}")
    return decided


def wait_for_all(name: str) -> None:
    """Returns when all processes are here."""
    if Joined.many:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def own_part(items: Sequence[T]) -> list[T | None]:
    """Of items that no two processes do together, those of this process; filled up with None, so that all have equally many."""
    if not Joined.many:
        return list(items)
    import jax

    count, own = jax.process_count(), list(items[jax.process_index() :: jax.process_count()])
    return [*own, *[None] * (-(-len(items) // count) - len(own))]


def own_mesh(spec: str | None = None) -> Any:
    """A mesh over this process's own devices, for work that processes do apart.

    Args:
        spec: as `make_mesh` takes it; by default all of these devices share the work.

    Raises:
        UserError: another spec; more devices than this process has.
    """
    import jax

    from jaxmed.distributed import make_mesh

    if not Joined.many:
        return make_mesh(spec)
    own = jax.local_devices()
    mesh = make_mesh(spec or f"data={len(own)}")
    if mesh.size > len(own):
        raise UserError(f"--mesh {spec!r} needs {mesh.size} devices; each process has {len(own)} of its own here.")
    return jax.sharding.Mesh(np.asarray(own[: mesh.size]).reshape(mesh.devices.shape), mesh.axis_names)


def to_host(values: Any) -> np.ndarray:
    """An array as numpy; one whose parts other processes hold is gathered from them, so all of them must ask for it."""
    if not Joined.many or getattr(values, "is_fully_addressable", True) or values.is_fully_replicated:
        return np.asarray(values)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values, tiled=True))
