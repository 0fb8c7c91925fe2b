"""Effects of a table that lies on the disk, read a block of units at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import xarray as xr

from jaxmed.statistics.screening import corrected

VALUES = 1 << 21
"""Effects in one block at most, where one unit of all pairs is not more: 8 MB."""


Sampled = tuple[xr.DataArray, xr.DataArray]
"""Estimates of the same effects, and the probabilities with which they were computed, 0 where they were not."""


class UnitBlocks:
    """Effects of some pairs, [pairs, units] in blocks; nothing is read before it is asked for. See `statistics.Blocks`.

    A table has one chunk per pair and layer. A block is as many whole layers as `VALUES` allows, or a part of one.
    """

    def __init__(self, effects: xr.DataArray, pairs: np.ndarray, sampled: Sampled | None = None):
        """`effects`: one outcome of a variable, its first axis `pair`, lazily read or in memory. With `sampled`, blocks hold the
        difference estimator, which is unbiased, in the place of values that are partly estimates."""
        self._effects, self._pairs, self._sampled = effects, pairs, sampled

    @property
    def shape(self) -> tuple[int, int]:
        """(pairs, units)."""
        return len(self._pairs), math.prod(self._effects.shape[1:])

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(units, effects [pairs, block]), in the order of the variable's axes."""
        begin = 0
        for place in self._places():
            part = self._effects.isel(place)
            read = np.empty((len(self._pairs), *part.shape[1:]), part.dtype)
            for row, pair in enumerate(self._pairs):
                read[row] = part[pair].values
                if self._sampled is not None:
                    estimate, probability = (one.isel(place)[pair].values for one in self._sampled)
                    read[row] = corrected(read[row], estimate, probability)
            read = read.reshape(len(read), -1)
            yield slice(begin, begin + read.shape[1]), read
            begin += read.shape[1]

    def _places(self) -> Iterator[dict[str, slice]]:
        """Indices of the blocks along the first axis behind `pair`, and along the next where one of the first is too large."""
        first, *more = (str(dim) for dim in self._effects.dims[1:])
        sizes = self._effects.sizes
        room = max(1, VALUES // max(1, len(self._pairs) * math.prod(sizes[dim] for dim in more)))
        if room > 1 or not more:
            for begin in range(0, sizes[first], room):
                yield {first: slice(begin, begin + room)}
            return
        step = max(1, VALUES // max(1, len(self._pairs) * math.prod(sizes[dim] for dim in more[1:])))
        for at in range(sizes[first]):
            for begin in range(0, sizes[more[0]], step):
                yield {first: slice(at, at + 1), more[0]: slice(begin, begin + step)}
