"""Shared fixtures: two CPU devices, tiny random models, the default model."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

KNOWN = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
QUICK_COMPILES = " ".join((" --xla_backend_optimization_level=0", *(KNOWN if version("jaxlib").startswith("0.10.") else ())))
"""Compiling takes most of the suite's time. XLA ends the process at a flag it does not know, hence the version."""
LEAST_SECONDS = 0.05
"""Programs that compile sooner are not kept."""
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + QUICK_COMPILES

if os.environ.get("JAXMED_TYPES"):
    from tests.types_at_run import check_package

    check_package()

from jaxmed.memory import keep_freed_memory  # noqa: E402

keep_freed_memory()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from jaxmed.models.load import describe, load  # noqa: E402
from jaxmed.models.model import Model  # noqa: E402
from tests import tiny  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs are kept between runs of the suite, and for the commands that tests start.

    A shell that starts it in the background has it ignore Ctrl-C; tests of signals and the commands that they start may not.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.cache:
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("compiled by commands"))  # those that are killed leave half a file
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(LEAST_SECONDS)


MOST_MAPS = 20_000
"""Compiled programs are pieces of mapped memory; Linux gives a process 65,530 of them and ends it at the next."""


@pytest.fixture(autouse=True)
def _few_programs() -> Iterator[None]:
    """Drops compiled programs before the process has too many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(
    scope="session",
    params=["post_norm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("four_norms", "windowed_biased"))],
)
def tiny_model(request: pytest.FixtureRequest) -> Model:
    """A random model of a few thousand weights, one per kind of block."""
    return tiny.model(request.param)


@pytest.fixture(scope="session")
def plain_model() -> Model:
    """The tiny Llama."""
    return tiny.model("llama")


@pytest.fixture(scope="session")
def smol() -> Any:
    """The default model's tokenizer."""
    return describe("smollm2-135m-instruct").tokenizer


@pytest.fixture(scope="session")
def default_model() -> Model:
    """SmolLM2-135M-Instruct."""
    return load("smollm2-135m-instruct")
