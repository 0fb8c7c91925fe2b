"""The commands `bench`, `bench generate`, `bench load` and `bench cache`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxmed.cli.flags import ConfigFlags, ModelFlags, check_layers
from jaxmed.errors import UserError
from jaxmed.files import check_file
from jaxmed.models.catalog import DEFAULT


@dataclass(frozen=True, kw_only=True)
class RowFlags:
    """Where measured rows go."""

    append: Path | None = None
    """Markdown file that rows are added to (command, date, commit, device), such as BENCHMARKS.md."""

    def check_files(self) -> None:
        """Raises a UserError where rows cannot be written."""
        from jaxmed.bench.rows import check_rows

        check_rows(self.append)


@dataclass(frozen=True, kw_only=True)
class Bench(RowFlags, ModelFlags, ConfigFlags):
    """Measures the exact engine against the bare matmuls of the same shapes and against other ways to do a neuron sweep, in one run."""

    shape: Literal["", "smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b", "gemma-2-2b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b"] = ""
    """Random weights of these shapes instead of --model; needs --random-weights."""
    random_weights: bool = False
    """Confirm that --shape runs on random weights."""
    tokens: int = 42
    """Tokens of the prompt with random weights."""
    layers: tuple[int, ...] = ()
    """Layers whose neurons are swept in each round, such as 0,9,19,29; empty: all."""
    repeats: int = 3
    """Rounds; the contestants alternate within each, and medians are reported."""
    peers: bool = True
    """Measure naive full-forward patching in JAX too, and PyTorch where it is installed."""
    json: Path | None = None
    """JSON file that every number is written to."""

    def run(self) -> None:
        """Measures and prints."""
        from jaxmed.bench.measure import bench

        self.check_files()
        if self.json is not None:
            check_file(self.json, "--json")
        if self.repeats < 1:
            raise UserError(f"--repeats {self.repeats} leaves nothing to measure. Give 1 or more.")
        if not self.shape:
            check_layers(self.layers, self.describe().config)
        bench(self)


@dataclass(frozen=True, kw_only=True)
class RoundsFlag:
    """How often contestants alternate."""

    rounds: int = 3
    """Rounds; the contestants alternate within each, and medians are reported."""


@dataclass(frozen=True, kw_only=True)
class BenchGenerate(RoundsFlag, RowFlags, ModelFlags, ConfigFlags):
    """Measures greedy text against the bare matmuls of its tokens and against `generate` of transformers, in one run."""

    rows: tuple[int, ...] = (1, 16)
    """Prompts at once, one measurement for each, such as 1 16."""
    tokens: int = 128
    """Tokens written behind every prompt."""

    def run(self) -> None:
        """Measures and prints."""
        from jaxmed.bench.generate import check_counts, measure_generate

        self.check_files()
        check_counts(self.rows, self.tokens, self.rounds)
        self.describe()
        measure_generate(self.load(), self.rows, self.tokens, self.rounds, self.append)


@dataclass(frozen=True, kw_only=True)
class BenchLoad(RowFlags, ConfigFlags):
    """Loads a GGUF model twice into a cache of its own, against reading and decoding its file once and reading the decoded bytes."""

    name: str = DEFAULT
    """Known name (see `jaxmed models`), or a .gguf file."""

    def run(self) -> None:
        """Measures and prints."""
        from jaxmed.bench.load import measure_load

        self.check_files()
        measure_load(self.name, self.append)


@dataclass(frozen=True, kw_only=True)
class BenchCache(RoundsFlag, RowFlags, ModelFlags, ConfigFlags):
    """Measures activations on disk against one plain file of the same bytes, and reading them against computing them, in one run."""

    site: str = "residual_out"
    """Site that is kept at every token."""
    prompts: int = 64
    """Random prompts; rounded down to whole shards."""
    tokens: int = 64
    """Tokens of a prompt."""

    def run(self) -> None:
        """Measures and prints."""
        from jaxmed.bench.cache import measure_cache, random_job

        self.check_files()
        for flag, value in (("--prompts", self.prompts), ("--tokens", self.tokens), ("--rounds", self.rounds)):
            if value < 1:
                raise UserError(f"{flag} {value} leaves nothing to measure. Give 1 or more.")
        random_job(self.describe(), self.site, self.prompts, self.tokens)
        measure_cache(self.load(), self.site, self.prompts, self.tokens, self.rounds, self.append)


@dataclass(frozen=True, kw_only=True)
class BenchPlan(RoundsFlag, RowFlags, ModelFlags, ConfigFlags):
    """Measures a little of every kind of long work against the time that its plan says, in one run."""

    def run(self) -> None:
        """Measures and prints."""
        from jaxmed.bench.planned import measure_plans

        if self.rounds < 1:
            raise UserError(f"--rounds {self.rounds} leaves nothing to measure. Give 1 or more.")
        measure_plans(self.load(), self.rounds, self.append)
