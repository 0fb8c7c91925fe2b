"""Freed memory is kept for the next program, unless the user has settings of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import jaxmed as jm
jm.keep_freed_memory()
import jax.numpy as jnp
import jax

mesh = jm.make_mesh()

@jax.jit
def run(x):
    return jax.lax.scan(lambda total, one: (total + one, one * total), jnp.zeros_like(x[0]), x)[1].sum()

x = jax.device_put(jnp.full((64, 512, 512), 1e-3), jax.NamedSharding(mesh, jax.P("data")))
for _ in range(5):
    run(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    run(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(**settings: str) -> int:
    """Page faults of four calls of one program whose temporary arrays are 64 MB."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env={**environment, **settings})
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_the_second_call_of_a_program_gets_the_memory_of_the_first() -> None:
    assert page_faults() < 4000  # 4 x 64 MB are 65,536 pages


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_settings_of_the_user_stay() -> None:
    assert page_faults(MALLOC_TOP_PAD_="131072") > 40_000
