"""Readers of checkpoint files. Each gives a `Checkpoint`: a config and named tensors under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmed.models.config import ModelConfig

if TYPE_CHECKING:  # the PyTorch processes read checkpoints too, and never import JAX
    import jax


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, opened but not read.

    Attributes:
        config: config.json, or what the file's metadata says in the same keys.
        shapes: shape of every tensor, by its Hugging Face name.
        read: (name, slices of every axis or None for all) -> tensor, in its stored dtype (quantised tensors: float32).
        files: the files that hold the weights.
        tokenizer: builds the tokenizer; returns None where the checkpoint has none.
        restore: (config, mesh) -> parameters, of our own stores, which hold whole parameters and no tensors; None elsewhere.
        unreadable: tensors whose values cannot be read, and why.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[..., np.ndarray]
    files: tuple[Path, ...]
    tokenizer: Callable[[], Any]
    restore: Callable[[ModelConfig, jax.sharding.Mesh], dict[str, Any]] | None = None
    unreadable: Mapping[str, str] = field(default_factory=dict)
