"""Two-phase samples of very many units of which each has an estimate: which to compute, and what is then known of the others.

First the largest estimates are computed for certain, and of the others a random sample with known probabilities: from it comes how far
estimates are off. Then whatever may yet be among the largest, first what is cheapest for its chance of it. Numpy in, numpy out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

CERTAIN, SAMPLED = 0.5, 0.25
"""Parts of a budget that go to the largest estimates and to the random sample; what the sample shows decides over the rest."""
FLOOR = 0.2
"""Part of the sample that falls on all units alike; the others fall on units in proportion to their estimates."""
FEWEST = 20
"""Errors that have to be known before anything is said of the others."""
TAIL = 0.1
"""Part of the errors that a power law is fitted to."""
RESAMPLES, DRAWS = 20, 10
"""Of the errors, and for each of the number of units that were missed."""
_STEPS, _BINS, _RANKS, _TINY = 12, 256, 100, 1e-30


def weigh(size: np.ndarray, certain: np.ndarray) -> np.ndarray:
    """How a sample is spread over units: float64 [N] that add up to 1, FLOOR of it evenly and the rest in proportion to `size`; none on
    units that are certain.

    Args:
        size: float64 [N], not negative.
        certain: bool [N].
    """
    others = ~certain
    size = np.where(others, size, 0.0)
    even = others / max(1, others.sum())
    return FLOOR * even + (1 - FLOOR) * (size / size.sum() if size.any() else even)


def draw(weight: np.ndarray, certain: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Probabilities float64 [N] with which units are sampled: 1 of those that are certain, 0 of what was not drawn.

    Systematic sampling in random order: `count` units in all (one less or more), each with a probability in proportion to its weight.

    Args:
        weight: float64 [N], of `weigh`.
    """
    found, others = certain.astype(np.float64), np.flatnonzero(~certain)
    if not count or not len(others):
        return found
    chance = count * weight[others]
    while (chance > 1).any():  # what is certain leaves its surplus to the others
        full = chance >= 1
        spare = count - full.sum()
        chance = np.where(full, 1.0, chance * (spare / chance[~full].sum() if spare > 0 and not full.all() else 0.0))
    order = rng.permutation(len(others))
    steps = np.floor(np.cumsum(chance[order]) + rng.random() * (1 - 1e-9))
    taken = order[np.diff(steps, prepend=0) > 0]
    found[others[taken]] = chance[taken]
    return found


@dataclass(frozen=True)
class Errors:
    """How far estimates are off, as a function of their size: |exact - estimate| = scale(|estimate|) * z, z alike for all units.

    Small estimates are off by rounding, whatever their size, and large ones by a part of it: the scale is a running median.

    Attributes:
        size, typical: float64 [m], logarithms of sizes, and of the median error there.
        z: float64 [n], sorted.
    """

    size: np.ndarray
    typical: np.ndarray
    z: np.ndarray

    @staticmethod
    def fit(estimate: np.ndarray, exact: np.ndarray) -> Errors | None:
        """From units of which both are known; None where there are too few."""
        finite = np.isfinite(estimate) & np.isfinite(exact)
        size, error = np.abs(estimate[finite]).astype(np.float64), np.abs(exact - estimate)[finite].astype(np.float64)
        if len(size) < FEWEST:
            return None
        order = np.argsort(size)
        size, error = np.log(np.maximum(size[order], _TINY)), np.log(np.maximum(error[order], _TINY))
        parts = np.array_split(np.arange(len(size)), np.clip(len(size) // FEWEST, 1, _STEPS))
        typical = [np.asarray([np.median(of[part]) for part in parts]) for of in (size, error)]
        found = Errors(typical[0], typical[1], np.zeros(0))
        return replace(found, z=np.sort(np.exp(error - np.log(found.scale(np.exp(size))))))

    def scale(self, size: np.ndarray) -> np.ndarray:
        """The typical error (median) of estimates of these sizes."""
        return np.exp(np.interp(np.log(np.maximum(size, _TINY)), self.size, self.typical))

    def quantile(self, part: float) -> float:
        """The part of errors that is below this many scales."""
        return float(np.quantile(self.z, part))

    def above(self, many: np.ndarray) -> np.ndarray:
        """The part of errors that exceeds so many scales: as observed, and beyond the largest TAIL of them a power law (Hill 1975)."""
        count = max(5, round(TAIL * len(self.z)))
        least = max(float(self.z[-count]), _TINY)
        power = np.clip(1 / max(np.log(np.maximum(self.z[-count:], _TINY) / least).mean(), 1e-3), 1.0, 20.0)
        seen = 1 - np.searchsorted(self.z, many, side="right") / len(self.z)
        with np.errstate(over="ignore", divide="ignore"):
            beyond = count / len(self.z) * (np.maximum(many, least) / least) ** -power
        return np.where(many > least, np.maximum(beyond, 0), seen)

    def exceeds(self, estimate: np.ndarray, threshold: float | np.ndarray) -> np.ndarray:
        """The chance that |exact| is above a threshold, of units with these estimates; errors go either way."""
        size = np.abs(estimate)
        scale = np.maximum(self.scale(size), _TINY)
        toward, across = self.above((threshold - size) / scale), self.above((threshold + size) / scale)
        return np.where(size < threshold, (toward + across) / 2, 1.0)

    def resampled(self, rng: np.random.Generator) -> Errors:
        """The same from a resample of the errors."""
        return replace(self, z=np.sort(rng.choice(self.z, len(self.z))))


def threshold(exact: np.ndarray, top: int) -> float:
    """The `top`-th largest |exact| of those that are known, and the smallest of them where there are fewer."""
    size = np.abs(exact[np.isfinite(exact)])
    return float(np.partition(size, -min(top, len(size)))[-min(top, len(size))]) if len(size) else 0.0


@dataclass(frozen=True)
class Recall:
    """The part of the truly largest units that was computed: expected, and a 95 % interval."""

    mean: float
    low: float
    high: float


def recall(estimate: np.ndarray, exact: np.ndarray, top: int, errors: Errors | None, rng: np.random.Generator) -> Recall:
    """What part of the `top` units with the largest |exact| is among those that were computed.

    Args:
        estimate: float [N], of all units.
        exact: float [N], NaN where it was not computed.
        errors: of this pair's estimates; None: nothing is known.
    """
    known = np.isfinite(exact)
    others, top = np.abs(estimate[~known]).astype(np.float64), min(top, len(exact))
    if not len(others):
        return Recall(1.0, 1.0, 1.0)
    if errors is None:
        return Recall(float("nan"), 0.0, min(1.0, known.sum() / top))
    ranks = np.unique(np.linspace(1, min(top, known.sum()), _RANKS).astype(int))
    largest = np.sort(np.abs(exact[known]).astype(np.float64))[::-1][ranks - 1]
    size, count = _binned(others)
    found = []
    for _ in range(RESAMPLES):
        one = errors.resampled(rng)
        expected = (one.exceeds(size[:, None], largest[None]) * count[:, None]).sum(0)  # of the others, above each of the largest
        for _ in range(DRAWS):
            missed = np.searchsorted(np.cumsum(rng.exponential(size=top + 1)), expected)
            found.append(np.max(ranks[ranks + missed <= top], initial=0) / top)
    low, high = np.quantile(found, (0.025, 0.975), method="inverted_cdf")
    return Recall(float(np.mean(found)), float(low), float(high))


def _binned(size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean sizes and how many units have them: logarithmic bins of the three largest decades, and one of all that is less."""
    order = np.sort(size)
    at = np.searchsorted(order, order[-1] * np.logspace(-3, 0, _BINS))
    at = np.unique([*at[at > 0], len(size)])
    count = np.diff(at, prepend=0)
    return np.add.reduceat(order, [0, *at[:-1]]) / count, count


def corrected(value: np.ndarray, estimate: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """The difference estimator (Särndal et al. 1992, ch. 6): unbiased for the exact value of every unit, over samples.

    Args:
        value: exact where the unit was computed, else its estimate.
        probability: with which it was; 0 where it was not.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(probability > 0, estimate + (value - estimate) / probability, value)
