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
    """The unit of work, of resume and of distribution: layers of some pairs. Their first one brings the pairs' sets and paths."""

    pairs: tuple[int, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """What an item takes: rows that run through the model, matmul FLOPs, and effects that come of it."""

    passes: int
    flops: float
    effects: int


@dataclass(frozen=True)
class OpenPair:
    """A pair that is being swept: its prepared contrast and windows, as it stands (False) and turned (True); and what is known of it
    before any unit, for the table."""

    prepared: dict[bool, PreparedContrast]
    windows: dict[bool, list[Window]]
    known: list[Chunk]


@runtime_checkable
class Estimator(Protocol):
    """A way to come by effects. What a reader is told of it is a row of `METHODS`."""

    def items(self, job: Job) -> Sequence[Item]:
        """The job's items, those of the same pairs one after the other."""
        ...

    def work(self, job: Job, item: Item) -> Work:
        """What an item takes."""
        ...

    def shared(self, job: Job, pair: int) -> float:
        """Matmul FLOPs that all items of a pair share."""
        ...

    def open(self, job: Job, pairs: tuple[int, ...]) -> OpenPair | None:
        """What all items of some pairs share; None where they share nothing."""
        ...

    def start(self, job: Job, item: Item, opened: OpenPair | None) -> Callable[[], list[Chunk]]:
        """Begins an item on the devices; the call of what it returns waits for it."""
        ...


def one_outcome(job: Job, values: np.ndarray) -> np.ndarray:
    """Drops the outcome axis where there is one outcome."""
    return values if len(job.request.outcomes) > 1 else np.asarray(values[0])


def in_table(job: Job, effect: np.ndarray) -> np.ndarray:
    """Effects [outcome, ..., patches] as the table has them: patches on its position axis, right-aligned, or without one."""
    return one_outcome(job, by_position(job, effect))


def by_position(job: Job, values: np.ndarray, nothing: float = np.nan) -> np.ndarray:
    """Values [..., patches] on the table's position axis, if it has one; `nothing` where a prompt has no such position."""
    if job.request.position not in BY_POSITION:
        return values[..., 0]
    width = max(len(contrast.patches) for contrast in job.contrasts)
    padded = np.full((*values.shape[:-1], width), nothing, np.float32)
    padded[..., width - values.shape[-1] :] = values
    return padded


def ends(job: Job, pair: int, base: np.ndarray, source: np.ndarray, margin: np.ndarray | None) -> list[Chunk]:
    """What is known of a pair before any unit.

    Args:
        base, source: float32 [outcome], outcomes of the two runs.
        margin: float32 [L], how near routing is to a tie; None without experts.
    """
    found: list[Chunk] = [
        ("base_outcome", {"pair": pair}, one_outcome(job, base)),
        ("source_outcome", {"pair": pair}, one_outcome(job, source)),
    ]
    return found if margin is None else [*found, ("routing_margin", {"pair": pair}, margin)]
