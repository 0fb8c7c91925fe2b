"""What estimators share: the items of a job, what an item takes, and what it leaves in the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from jaxmed.effects.engine import PreparedContrast, Window
from jaxmed.effects.job import Job
from jaxmed.tokens import BY_POSITION

Chunk = tuple[str, dict[str, int], np.ndarray]
"""(variable, {dimension: index}, values): what an item leaves in the table."""


@dataclass(frozen=True)
class Item:
    """The unit of work, of resume and of distribution: layers of one pair. Its first one brings the pair's sets and paths."""

    pair: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """What an item takes: restarted rows, matmul FLOPs, and effects that come of it."""

    passes: int
    flops: float
    effects: int


@dataclass(frozen=True)
class OpenPair:
    """A pair that is being swept: its prepared contrast and windows, as it stands (False) and turned (True)."""

    prepared: dict[bool, PreparedContrast]
    windows: dict[bool, list[Window]]


@runtime_checkable
class Estimator(Protocol):
    """A way to compute effects."""

    exact: bool

    def items(self, job: Job) -> Sequence[Item]:
        """The job's items, those of a pair one after the other."""
        ...

    def work(self, job: Job, item: Item) -> Work:
        """What an item takes."""
        ...

    def open(self, job: Job, pair: int) -> OpenPair:
        """What all items of a pair share."""
        ...

    def start(self, job: Job, item: Item, opened: OpenPair) -> Callable[[], list[Chunk]]:
        """Begins an item on the devices; the call of what it returns waits for it."""
        ...


def one_outcome(job: Job, values: np.ndarray) -> np.ndarray:
    """Drops the outcome axis where there is one outcome."""
    return values if len(job.request.outcomes) > 1 else np.asarray(values[0])


def in_table(job: Job, effect: np.ndarray) -> np.ndarray:
    """Effects [outcome, ..., patches] as the table has them: patches on its position axis, right-aligned, or without one."""
    if job.request.position not in BY_POSITION:
        return one_outcome(job, effect[..., 0])
    width = max(len(contrast.patches) for contrast in job.contrasts)
    padded = np.full((*effect.shape[:-1], width), np.nan, np.float32)
    padded[..., width - effect.shape[-1] :] = effect
    return one_outcome(job, padded)
