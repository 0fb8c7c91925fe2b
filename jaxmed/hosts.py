"""Several processes that run one program on the devices of all of them. A process alone needs no JAX to know that it is alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxmed.errors import UserError

AUTO = "auto"
SECONDS_TO_JOIN, SECONDS_SILENT = 300, 60
"""How long processes wait for each other at the beginning, and how long one may be silent before the others end."""


class _Joined:
    """Whether this process is one of several; a process alone never asks its backend."""

    many = False


def join(hosts: str) -> None:
    """Makes this process one of several, before JAX's backend starts. All of them run the same command on one mesh of all devices.

    Args:
        hosts: "auto" where Slurm, Kubernetes, Open MPI or Cloud TPU say who takes part; or HOST:PORT,COUNT,NUMBER: the address of process
            0, how many there are, and which this one is; empty: it is alone.

    Raises:
        UserError: another word; numbers that make no sense; processes that do not come.
    """
    if not hosts or _Joined.many:
        return
    import jax

    from jaxmed.distributed import use_all_cores

    use_all_cores()
    given: dict[str, Any] = {}
    if hosts != AUTO:
        address, count, number = (*hosts.split(","), "", "")[:3]
        if ":" not in address or not (count.isdigit() and number.isdigit()) or not int(number) < int(count):
            raise UserError(f"--hosts {hosts!r}: give auto, or HOST:PORT,COUNT,NUMBER such as node0:8476,4,0 with numbers from 0.")
        given = {"coordinator_address": address, "num_processes": int(count), "process_id": int(number)}
    if jax.config.values.get("jax_cpu_collectives_implementation") is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**given, initialization_timeout=SECONDS_TO_JOIN, heartbeat_timeout_seconds=SECONDS_SILENT)
    except (RuntimeError, ValueError) as error:
        told = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        fix = "Start all of them, each with its number."
        raise UserError(f"--hosts {hosts}: the processes did not come together ({told}). {fix}") from None
    _Joined.many = jax.process_count() > 1


def several() -> bool:
    """Whether this process is one of several."""
    return _Joined.many


def leads() -> bool:
    """Whether this process writes and prints: the first of several, or the only one."""
    if not _Joined.many:
        return True
    import jax

    return jax.process_index() == 0


def agree(value: float) -> float:
    """The first process's value, in all of them. What decides the course of a run must be the same everywhere."""
    if not _Joined.many:
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


def wait_for_all(name: str) -> None:
    """Returns when all processes are here."""
    if _Joined.many:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def to_host(values: Any) -> np.ndarray:
    """An array as numpy; one whose parts other processes hold is gathered from them, so all of them must ask for it."""
    if not _Joined.many or getattr(values, "is_fully_addressable", True) or values.is_fully_replicated:
        return np.asarray(values)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values, tiled=True))
