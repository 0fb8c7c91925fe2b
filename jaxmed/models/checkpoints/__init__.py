"""Readers of checkpoint files. Each gives a `Checkpoint`: a config and named tensors under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, opened but not read.

    Attributes:
        config: config.json, or what the file's metadata says in the same keys.
        shapes: shape of every tensor, by its Hugging Face name.
        read: (name, slices of every axis or None for all) -> tensor, in its stored dtype (quantised tensors: float32).
        files: the files that hold the weights.
        tokenizer: builds the tokenizer; returns None where the checkpoint has none.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[..., np.ndarray]
    files: tuple[Path, ...]
    tokenizer: Callable[[], Any]
