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
def faults():
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin

for _ in range(5):
    faults()
print(sorted(faults() for _ in range(15))[7])
"""


def page_faults(**settings: str) -> int:
    """Page faults of a call of a program whose temporary arrays are 64 MB: the median of 15 calls, for memory of one call may be freed
    behind the beginning of the next."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env={**environment, **settings})
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_the_second_call_of_a_program_gets_the_memory_of_the_first() -> None:
    assert page_faults() < 1000  # 64 MB are 16,384 pages


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_settings_of_the_user_stay() -> None:
    assert page_faults(MALLOC_TOP_PAD_="131072") > 10_000


HOLES = """
import jaxmed as jm
from jaxmed.memory import return_freed_memory
jm.keep_freed_memory()
import numpy as np

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) // 1024

blocks = [np.ones(1 << 22) for _ in range(24)]  # 32 MB each
blocks = blocks[::2]  # every other one is a hole
held = resident()
print(return_freed_memory(1 << 40), resident() > held - 50, return_freed_memory(1 << 28), resident() < held - 300)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_holes_between_what_is_used_go_back_where_they_are_large() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["False", "True", "True", "True"]
