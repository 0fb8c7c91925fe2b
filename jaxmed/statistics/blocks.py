"""Effects of very many units, one block of units after the other, and their means over groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np

_BLOCK = 1 << 13


@runtime_checkable
class Blocks(Protocol):
    """Effects [pairs, units] that can be read as often as needed, a block of units at a time: (units, effects [pairs, block])."""

    @property
    def shape(self) -> tuple[int, int]:
        """(pairs, units)."""
        ...

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Blocks that follow each other and cover all units."""
        ...


class ArrayBlocks:
    """Blocks of an array in memory."""

    def __init__(self, x: np.ndarray):
        self._x = np.asarray(x)

    @property
    def shape(self) -> tuple[int, int]:
        """(pairs, units)."""
        return self._x.shape[0], self._x.shape[1]

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Views of the array."""
        for begin in range(0, self.shape[1], _BLOCK):
            block = slice(begin, min(begin + _BLOCK, self.shape[1]))
            yield block, self._x[:, block]


def as_blocks(x: np.ndarray | Blocks) -> Blocks:
    """An array as blocks; blocks as they are."""
    return ArrayBlocks(x) if isinstance(x, np.ndarray) else x


def take(x: Blocks, units: np.ndarray) -> np.ndarray:
    """The columns of these units: [pairs, len(units)]; one reading of all blocks."""
    order, parts = np.argsort(units, kind="stable"), []
    for block, effects in x.blocks():
        here = units[order][np.searchsorted(units[order], block.start) : np.searchsorted(units[order], block.stop)]
        parts.append(effects[:, here - block.start])
    return np.concatenate(parts, axis=1)[:, np.argsort(order)]


class Grouping:
    """Which pairs belong to which group.

    Attributes:
        names: names of the groups, in order of first appearance.
    """

    def __init__(self, groups: np.ndarray):
        names, first, index = np.unique(groups, return_index=True, return_inverse=True)
        self.names = names[np.argsort(first)]
        self._rank = np.argsort(np.argsort(first))[index]  # of the group that a pair belongs to

    def means(self, x: np.ndarray) -> np.ndarray:
        """Means of x [pairs, units] within each group: float64 [groups, units]."""
        if len(self.names) == len(self._rank):
            return np.asarray(x, np.float64)
        means = np.zeros((len(self.names), x.shape[1]))
        for begin in range(0, x.shape[1], _BLOCK):
            block = slice(begin, begin + _BLOCK)
            np.add.at(means[:, block], self._rank, x[:, block])
        return means / np.bincount(self._rank)[:, None]


def group_means(x: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of x [pairs, units] within each group: [groups, units], and the groups' names in order of first appearance."""
    grouping = Grouping(groups)
    return grouping.means(np.asarray(x)), grouping.names
