"""Devices: one host device per core on the CPU, and the mesh."""

from __future__ import annotations

import math
import os
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

from jaxmed.errors import UserError

AXES = ("data", "fsdp", "tensor")
EXAMPLE = "data=4,fsdp=2,tensor=2"
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
    """A mesh over the devices of all processes, with the axes "data", "fsdp" and "tensor".

    Args:
        spec: "data=4,fsdp=2,tensor=2"; axes that are not named have size 1. None: all devices on "data" (units are swept in parallel).

    Raises:
        UserError: an unknown axis, one that is named twice, or sizes whose product exceeds the number of devices.
    """
    use_all_cores()
    devices = jax.devices()
    sizes = dict.fromkeys(AXES, 1) | (_sizes(spec) if spec else {"data": len(devices)})
    count = math.prod(sizes.values())
    if count > len(devices):
        raise UserError(
            f"--mesh {spec!r} needs {count} devices; there are {len(devices)} ({devices[0].device_kind}). "
            "Give sizes whose product is no larger."
        )
    return jax.sharding.Mesh(np.asarray(devices[:count]).reshape(tuple(sizes.values())), AXES)


def _sizes(spec: str) -> dict[str, int]:
    """Axis -> size of "data=4,fsdp=2"."""
    sizes: dict[str, int] = {}
    for part in spec.split(","):
        axis, _, size = part.partition("=")
        if axis == "model":
            raise UserError(f"--mesh {spec!r}: the axis 'model' is called 'tensor' now. Write {spec.replace('model=', 'tensor=')}.")
        if axis not in AXES or not (size.isascii() and size.isdecimal()) or int(size) < 1:
            raise UserError(f"--mesh {spec!r}: {part!r} is not AXIS=SIZE. Legal axes: {', '.join(AXES)}. Example: {EXAMPLE}.")
        if axis in sizes:
            raise UserError(f"--mesh {spec!r} gives {axis!r} twice. Give every axis once. Example: {EXAMPLE}.")
        sizes[axis] = int(size)
    return sizes


def check_mesh(mesh: jax.sharding.Mesh) -> None:
    """Raises a UserError where a mesh has other axes than `make_mesh` gives it."""
    if mesh.axis_names != AXES:
        raise UserError(
            f"The mesh has the axes {', '.join(map(str, mesh.axis_names))}; needed are {', '.join(AXES)}. Make it by jm.make_mesh."
        )


def keep_compiled_programs(folder: Path) -> None:
    """Turns JAX's persistent compilation cache on, in `folder`, unless the user has chosen one."""
    if jax.config.values.get("jax_compilation_cache_dir") is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def device_name(mesh: jax.sharding.Mesh) -> str:
    """The devices of a mesh, in words."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind} ({jax.default_backend()})"
