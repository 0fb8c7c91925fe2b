"""The command `bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxmed.cli.commands import Config, Dtype
from jaxmed.models.catalog import DEFAULT


@dataclass(frozen=True)
class Bench:
    """Measures the exact engine against the bare matmuls of the same shapes and against other ways to do a neuron sweep, in one run."""

    model: str = DEFAULT
    """Model whose weights and prompt are used; ignored with --shape."""
    shape: Literal["", "smollm2-135m", "llama-3.2-1b", "llama-3.1-8b"] = ""
    """Random weights of these shapes instead of a model; needs --random-weights."""
    random_weights: bool = False
    """Confirms that --shape runs on random weights."""
    dtype: Dtype = "float32"
    """Weights and matmuls."""
    tokens: int = 42
    """Prompt length with random weights."""
    layers: str = ""
    """Layers whose neurons are swept in each round, such as 0,9,19,29; empty: all."""
    repeats: int = 3
    """Rounds; the contestants alternate within each, and medians are reported."""
    peers: bool = True
    """Also measure naive full-forward patching in JAX, and PyTorch where it is installed."""
    json: Path | None = None
    """Write every number to this file."""
    append: Path | None = None
    """Add rows (command, date, commit, device) to this Markdown file, such as BENCHMARKS.md."""
    config: Config = None

    def run(self) -> None:
        """Measures and prints."""
        from jaxmed.bench.measure import bench

        bench(self)
