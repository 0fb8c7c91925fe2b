"""What jax.distributed knows of the processes. It has no public name in JAX, so this is the only place that asks for it."""

from __future__ import annotations

from typing import Any


def state() -> Any:
    """The address of process 0, the number of processes and this one's, as far as they are known."""
    from jax._src.distributed import global_state

    return global_state


def client() -> Any:
    """The connection to the service that holds the processes together: keys and values that all of them see."""
    return state().client
