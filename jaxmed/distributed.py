"""Devices: one host device per core on the CPU, the mesh, and several processes that run one program on the devices of all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmed.errors import UserError

AXES = ("data", "model")
MOST_HOST_DEVICES = 8
"""Each host device may hold its own copy of the weights, so many-core machines stop here."""


EIGEN_MATMULS = "--xla_cpu_experimental_ynn_fusion_type="
"""Leaves float32 matmuls on the CPU to Eigen: a tenth faster at the engine's shapes than YNNPACK, the default of the versions below."""
KNOWN_JAXLIB = ("0.10.", "0.11.")
"""Versions that have the flag; XLA ends the process at a flag it does not know."""


def use_all_cores() -> None:
    """Gives JAX one CPU device per core and the faster matmuls, before its backend starts; later calls change nothing.

    XLA runs the matmuls inside a loop on one core, so a single CPU device would leave the others idle.
    """
    if version("jaxlib").startswith(KNOWN_JAXLIB) and "ynn_fusion_type" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {EIGEN_MATMULS}".strip()
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        jax.config.update("jax_num_cpu_devices", min(cores, MOST_HOST_DEVICES))
    except RuntimeError:  # the backend runs already: the user's own setting stands
        return


def make_mesh(spec: str | None = None) -> jax.sharding.Mesh:
    """A mesh over the devices of all processes.

    Args:
        spec: "data=4,model=2", or None for all devices on "data" (units are swept in parallel).

    Raises:
        UserError: unknown axis, or sizes whose product exceeds the number of devices.
    """
    use_all_cores()
    devices = jax.devices()
    sizes = {"data": len(devices), "model": 1}
    if spec:
        sizes = {"data": 1, "model": 1}
        for part in spec.split(","):
            axis, _, size = part.partition("=")
            if axis not in AXES or not size.isdigit() or int(size) < 1:
                raise UserError(f"--mesh {spec!r}: {part!r} is not AXIS=SIZE. Legal axes: {', '.join(AXES)}. Example: data=4,model=2.")
            sizes[axis] = int(size)
    count = sizes["data"] * sizes["model"]
    if count > len(devices):
        raise UserError(f"--mesh {spec!r} needs {count} devices; there are {len(devices)} ({devices[0].device_kind}).")
    return jax.sharding.Mesh(np.asarray(devices[:count]).reshape(sizes["data"], sizes["model"]), AXES)


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
    return not _Joined.many or jax.process_index() == 0


def agree(value: float) -> float:
    """The first process's value, in all of them. What decides the course of a run must be the same everywhere."""
    if not _Joined.many:
        return value
    from jax.experimental import multihost_utils

    return float(multihost_utils.broadcast_one_to_all(np.float64(value)))


def first_checks(check: Callable[[], Any]) -> None:
    """Runs a check in the first process alone; where it fails, the others end too.

    Raises:
        UserError: what the check raises; in the other processes, that it failed.
    """
    if not leads():
        if not agree(0.0):
            raise UserError("The first process has refused to go on, and says why.")
        return
    try:
        check()
    except BaseException:
        agree(0.0)
        raise
    agree(1.0)


def wait_for_all(name: str) -> None:
    """Returns when all processes are here."""
    if _Joined.many:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def to_host(values: Any) -> np.ndarray:
    """An array as numpy; one whose parts other processes hold is gathered from them, so all of them must ask for it."""
    if not _Joined.many or not isinstance(values, jax.Array) or values.is_fully_addressable or values.is_fully_replicated:
        return np.asarray(values)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values, tiled=True))


def keep_compiled_programs(folder: Path) -> None:
    """Turns JAX's persistent compilation cache on, in `folder`, unless the user has chosen one."""
    if jax.config.values.get("jax_compilation_cache_dir") is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def device_name(mesh: jax.sharding.Mesh) -> str:
    """The devices of a mesh, in words."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind} ({jax.default_backend()})"
