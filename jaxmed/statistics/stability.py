"""How far the top of a ranking is the same for other groups: bootstrap resamples of groups, a block of units at a time."""

from __future__ import annotations

import math

import numpy as np

from jaxmed.statistics.intervals import resample_weights

RESAMPLES = 200
TOP = (10, 100)
"""How many of the first units are compared."""
FEWEST_FOR_STABILITY = 3
"""Groups below which resamples are nearly all alike."""
_BLOCK = 512
_LEAST = 1e-12
"""Of a variance, where the largest deviation of a unit is 1: single precision of what does not vary."""


class Stability:
    """The strongest units of the sample and of every resample, by |t| or |mean|, of units that come in blocks.

    A resample of one group alone has no t and is left out.
    """

    def __init__(self, groups: int, by_t: bool, seed: int = 0):
        weights = resample_weights(groups, RESAMPLES, seed)
        weights = np.concatenate([np.ones((1, groups)), weights[(weights > 0).sum(axis=1) > 1]])
        self._weights, self._by_t, self._seen = (weights / groups).astype(np.float32), by_t, 0
        self._scores = np.full((len(weights), max(TOP)), -np.inf, np.float32)
        self._units = np.full(self._scores.shape, -1, np.int64)

    def add(self, units: np.ndarray, means: np.ndarray) -> None:
        """Ranks these units [block] by their group means, finite float [groups, block]."""
        self._seen += len(units)
        for begin in range(0, len(units), _BLOCK):
            block = slice(begin, begin + _BLOCK)
            scores = self._score(means[:, block].astype(np.float64))
            rises = (scores > self._scores.min(axis=1, keepdims=True)).any(axis=0)
            joined = np.concatenate([self._scores, scores[:, rises]], axis=1)
            named = np.broadcast_to(units[block][rises], (len(joined), int(rises.sum())))
            strongest = np.argsort(-joined, axis=1, kind="stable")[:, : self._scores.shape[1]]
            self._scores = np.take_along_axis(joined, strongest, axis=1)
            self._units = np.take_along_axis(np.concatenate([self._units, named], axis=1), strongest, axis=1)

    def _score(self, means: np.ndarray) -> np.ndarray:
        """|t| or |mean| in every resample: float32 [resamples, block]."""
        mean = means.mean(axis=0)
        centred = means - mean
        size = np.abs(centred).max(axis=0) if self._by_t else np.ones_like(mean)
        size = np.where(size > 0, size, 1.0)
        scaled = (centred / size).astype(np.float32)
        shift = self._weights @ scaled
        level = np.abs(shift + (mean / size).astype(np.float32))
        if not self._by_t:
            return level
        variance = np.maximum(self._weights @ scaled**2 - shift**2, np.float32(_LEAST))
        return level / np.sqrt(variance / np.float32(len(means) - 1))

    def jaccard(self) -> dict[int, float]:
        """k -> mean Jaccard index (shared over all) of the sample's first k units and a resample's; those k alone that leave some out."""
        found = {}
        for k in TOP:
            if k < self._seen:
                shared = [len(np.intersect1d(self._units[0, :k], one)) for one in self._units[1:, :k]]
                found[k] = float(np.mean([both / (2 * k - both) for both in shared])) if shared else math.nan
        return found
