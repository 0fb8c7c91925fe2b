"""The sizes of the programs that sweep a contrast, and what a row of each unit takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxmed.effects.contrast import Contrast
from jaxmed.effects.mediators import MEDIATORS
from jaxmed.effects.readout import READ_BUCKETS, read_columns
from jaxmed.models.config import ModelConfig
from jaxmed.runs.cost import propagate_flops
from jaxmed.tokens import WINDOW_BUCKETS, bucket


@dataclass(frozen=True)
class Shape:
    """The sizes of one patch's programs: tokens that rows carry, that they see, and that are read."""

    window: int
    seen: int
    asked: int

    def chunk_key(self, group: str) -> str:
        """The key of `Job.chunk`: the group of units, and the program's sizes."""
        return f"{group}@{self.window}x{self.seen}"


def shapes_of(contrast: Contrast) -> list[Shape]:
    """The sizes of every patch of a contrast."""
    packed = contrast.packed()
    asked = bucket(len(read_columns(packed)), READ_BUCKETS)
    return [Shape(bucket(packed.used - patch.base[0], WINDOW_BUCKETS), len(packed.tokens), asked) for patch in contrast.patches]


def row_flops(config: ModelConfig, unit: str, shape: Shape) -> np.ndarray:
    """FLOPs float64 [L] of a row that restarts with a unit of this kind at each layer. To make and to read it counts as a layer."""
    layers = config.layers - np.arange(config.layers) - MEDIATORS[unit].by_layer
    return (layers + 1) * propagate_flops(config, 1, shape.window, shape.seen, 1)
