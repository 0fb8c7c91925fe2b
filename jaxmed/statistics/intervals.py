"""Every interval of the package: of means, ratios, proportions and areas under the ROC curve. 95 % unless said otherwise.

The interval of a mean is the wider, at either end, of two: Student's t, which holds its level for symmetric effects, and Hall's (1992)
transformed t, which corrects for skewness. Both are closed formulas: no resampling, a block of units at a time. For effects that are zero
in most groups and large in a few, bootstrap-t gives intervals hundreds of times too long at ten groups, and BCa and the inverted sign-flip
test miss the mean too often; `scripts/simulate_intervals.py` prints the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import optimize, stats

FEWEST_FOR_INTERVAL = 10
"""Groups, examples or paragraphs below which there is no interval: too few to hold its level."""
INTERVAL = "Student's t and Hall's skewness-corrected t, the wider of both"
EVERYTHING = (-math.inf, math.inf)
_BLOCK = 1 << 17
"""Values in one block."""


def mean_interval(
    x: np.ndarray, level: float = 0.95, legal: tuple[float, float] = EVERYTHING, fewest: int = FEWEST_FOR_INTERVAL
) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the mean of x over its first axis.

    Args:
        x: [n] or [n, units]; n independent groups, examples or differences of pairs.
        legal: bounds of what a mean can be, such as (0, 1) for scores.
        fewest: below so many there is no interval.

    Returns:
        (low, high), each [] or [units]; NaN where n < `fewest` or a value is not finite.
    """
    x = np.asarray(x)
    if x.ndim == 1:
        low, high = mean_interval(x[:, None], level, legal, fewest)
        return low[0], high[0]
    n, units = x.shape
    low, high = np.full(units, np.nan), np.full(units, np.nan)
    width = max(1, _BLOCK // max(n, 1))
    for begin in range(0, units if n >= max(fewest, 2) else 0, width):
        block = slice(begin, begin + width)
        low[block], high[block] = _wider(x[:, block].astype(np.float64), (1 + level) / 2)
    return np.clip(low, *legal), np.clip(high, *legal)


def _wider(x: np.ndarray, upper: float) -> tuple[np.ndarray, np.ndarray]:
    """The wider of Student's and Hall's interval at either end; x [n, units]."""
    n = len(x)
    mean = x.mean(axis=0)
    centred = x - mean
    deviation = np.sqrt((centred**2).sum(axis=0) / (n - 1))
    error = deviation / math.sqrt(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        skewness = np.where(error > 0, (centred**3).mean(axis=0) / deviation**3, 0.0)
    quantile = float(stats.t.ppf(upper, n - 1))
    ends = [(mean - t * error, mean - _untransform(t, skewness, n) * error) for t in (quantile, -quantile)]
    return np.minimum(*ends[0]), np.maximum(*ends[1])


def _untransform(t: float, skewness: np.ndarray, n: int) -> np.ndarray:
    """The studentised mean whose transform, Hall's (1992) monotone cubic, is `t`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.cbrt(1 + skewness * (t / math.sqrt(n) - skewness / (6 * n)))
        return np.where(np.abs(skewness) > 1e-9, 3 * math.sqrt(n) * (root - 1) / skewness, t)


def ratio_interval(above: np.ndarray, below: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """(ratio of the means, low, high) of paired values [n]: the interval of the mean of what each pair adds to the ratio (delta method).

    NaN where the mean of `below` is zero.
    """
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    mean = float(below.mean()) or math.nan
    ratio = float(above.mean()) / mean
    low, high = mean_interval(ratio + (above - ratio * below) / mean, level)
    return ratio, float(low), float(high)


def wilson(successes: int, of: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's (1927) score interval of a proportion; NaN of none."""
    if of == 0:
        return math.nan, math.nan
    low, high = stats.binomtest(successes, of).proportion_ci(level, method="wilson")
    return float(low), float(high)


def leaves_out_zero(low: Any, high: Any) -> bool:
    """Whether an interval leaves zero out; one that is NaN does not."""
    return bool(low > 0 or high < 0)


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """How often a positive value exceeds a negative one, ties counting half: the area under the ROC curve."""
    return float(stats.mannwhitneyu(positive, negative, method="asymptotic").statistic / (len(positive) * len(negative)))


def auc_interval(positive: np.ndarray, negative: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Score interval of `auc` (Newcombe 2006, method 5), within 0 and 1 and of some length at both ends; NaN below ten of either kind."""
    m, n = len(positive), len(negative)
    if min(m, n) < FEWEST_FOR_INTERVAL:
        return math.nan, math.nan
    area, more = auc(positive, negative), (m + n) / 2 - 1
    z = float(stats.norm.ppf((1 + level) / 2))

    def excess(theta: float) -> float:
        spread = 1 + more * (1 - theta) / (2 - theta) + more * theta / (1 + theta)
        return (area - theta) ** 2 - z**2 * theta * (1 - theta) * spread / (m * n)

    inside = min(max(area, 1e-12), 1 - 1e-12)  # at 0 and 1 themselves the equation holds, and says nothing
    root: Callable[..., Any] = optimize.brentq
    low = 0.0 if area == 0 else float(root(excess, 0.0, inside))
    high = 1.0 if area == 1 else float(root(excess, inside, 1.0))
    return low, high


def resample_weights(size: int, resamples: int = 2000, seed: int | np.random.Generator = 0) -> np.ndarray:
    """How often each of `size` examples is drawn: int [resamples, size], for statistics that are no means."""
    return np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), resamples)


def percentile_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentiles of a statistic over resamples; NaN where a value is not finite."""
    if not np.isfinite(values).all():
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
