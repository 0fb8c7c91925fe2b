"""Shared fixtures: two CPU devices, tiny random models, the default model."""

from __future__ import annotations

from typing import Any

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)

from jaxmed.models.load import Model, load  # noqa: E402
from tests import tiny  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs are kept between runs of the suite."""
    folder = config.cache.mkdir("compiled") if config.cache else None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session", params=sorted(tiny.CONFIGS))
def tiny_model(request: pytest.FixtureRequest) -> Model:
    """A random model of a few thousand weights, one per kind of block."""
    return tiny.model(request.param)


@pytest.fixture(scope="session")
def plain_model() -> Model:
    """The tiny Llama."""
    return tiny.model("llama")


@pytest.fixture(scope="session")
def smol(default_model: Model) -> Any:
    """The default model's tokenizer."""
    return default_model.tokenizer


@pytest.fixture(scope="session")
def default_model() -> Model:
    """SmolLM2-135M-Instruct."""
    return load("smollm2-135m-instruct")
