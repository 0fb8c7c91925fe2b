"""Devices: one host device per core on the CPU, and the mesh."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

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


def keep_compiled_programs(folder: Path) -> None:
    """Turns JAX's persistent compilation cache on, in `folder`, unless the user has chosen one."""
    if jax.config.values.get("jax_compilation_cache_dir") is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def device_name(mesh: jax.sharding.Mesh) -> str:
    """The devices of a mesh, in words."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind} ({jax.default_backend()})"
