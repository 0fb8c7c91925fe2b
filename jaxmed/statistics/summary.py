"""All statistics of effects over pairs, a block of units at a time. The unit of resampling is the group."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from jaxmed.statistics.blocks import Blocks, Grouping, as_blocks, group_means, take
from jaxmed.statistics.flips import FlipTest, held_out_q, picked, scaled, smallest_p, strength, studentised
from jaxmed.statistics.intervals import FEWEST_FOR_INTERVAL, INTERVAL, mean_interval
from jaxmed.statistics.stability import FEWEST_FOR_STABILITY, Stability

LEVEL = 0.05
FEWEST_IN_HALF = 3
"""Groups of discovery and held-out pairs below which nothing is replicated."""
NULL_QUANTILE = 0.999


@dataclass(frozen=True)
class Replication:
    """What held-out groups say of the units that discovery groups picked.

    Attributes:
        picked: units that the discovery groups picked.
        replicated: those of them with q <= 0.05 in the held-out groups and a mean of the same sign.
    """

    picked: int
    replicated: int


@dataclass(frozen=True)
class Summary:
    """Statistics of every unit, each [units]; NaN where a unit lacks a value in some group.

    Attributes:
        mean: mean over groups of the group's mean.
        low, high: 95 % interval of the mean; NaN below `FEWEST_FOR_INTERVAL` groups.
        t: studentised mean, which the tests are about; ranking by |t| never puts a unit first that its own test refutes.
        p: two-sided sign-flip p of the unit alone.
        p_adjusted: p adjusted over all units by step-down max-T (strong control of the family-wise error).
        q: Benjamini-Hochberg q in the held-out groups of the units that the discovery groups picked; NaN elsewhere.
        smallest_p: the smallest p that this number of groups can reach.
        interval: how the interval was made, or why there is none.
        p_margin: p of |mean| being above the margin, adjusted as `p_adjusted`; None without a margin.
        stability: k -> mean Jaccard index of the first k units over resamples of groups; see `Stability.jaccard`.
        replication: None where either half has fewer than `FEWEST_IN_HALF` groups.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    t: np.ndarray
    p: np.ndarray
    p_adjusted: np.ndarray
    q: np.ndarray
    smallest_p: float
    interval: str
    p_margin: np.ndarray | None = None
    stability: Mapping[int, float] = field(default_factory=dict)
    replication: Replication | None = None


class _Means:
    """Group means of a run's pairs, a block of units at a time, with the sides that groups are on."""

    def __init__(self, x: Blocks, groups: np.ndarray, splits: np.ndarray | None):
        self.x, self.grouping = x, Grouping(groups)
        self.groups, self.units = len(self.grouping.names), x.shape[1]
        of_group = dict(zip(groups, splits, strict=True)) if splits is not None else {}
        side = np.asarray([of_group.get(name, "") for name in self.grouping.names])
        self.discovery, self.heldout = side == "discovery", side == "heldout"
        self.halved = min(self.discovery.sum(), self.heldout.sum()) >= FEWEST_IN_HALF

    def whole(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(units, group means [groups, block]) of the units that have a finite value in every group."""
        for block, effects in self.x.blocks():
            means = self.grouping.means(effects)
            kept = np.isfinite(means).all(axis=0)
            yield block.start + np.flatnonzero(kept), means if kept.all() else means[:, kept]


def summarise(
    x: np.ndarray | Blocks,
    groups: np.ndarray,
    splits: np.ndarray | None = None,
    flips: int = 2000,
    seed: int = 0,
    margin: float = math.nan,
) -> Summary:
    """All statistics of effects x [pairs, units]; `groups` and `splits` are labels of the pairs.

    x is read block by block, some times over. Memory holds what is returned, [units] each, and blocks.

    Args:
        margin: what |mean| is tested against; see `null_margin`.
    """
    means = _Means(as_blocks(x), groups, splits)
    count, units = means.groups, means.units
    mean, low, high, t, q, half_t = np.full((6, units), np.nan)
    r, r_margin = np.zeros((2, units), np.float32)
    stability = Stability(count, ranked_by(smallest_p(count, flips)) == "|t|", seed)
    for those, values in means.whole():
        mean[those], (low[those], high[those]) = values.mean(axis=0), mean_interval(values)
        t[those] = studentised(values) if count >= 2 else np.nan
        r[those] = np.abs(strength(scaled(values)))
        r_margin[those] = np.maximum(strength(scaled(_beyond(values, margin))), 0) if math.isfinite(margin) else 0
        half_t[those] = studentised(values[means.discovery]) if means.halved else np.nan
        if count >= FEWEST_FOR_STABILITY:
            stability.add(those, values)
    replication = _replicate(means, half_t, q, seed) if means.halved else None
    del half_t
    whole = np.isfinite(mean)
    p, p_adjusted = _flip(means, r, whole, flips, seed)
    p_margin = _flip(means, r_margin, whole, flips, seed, margin)[1] if math.isfinite(margin) else None
    note = f"95 % {INTERVAL}; {count} groups"
    if count < FEWEST_FOR_INTERVAL:
        note = f"none: {count} groups are too few for an interval that holds its level (at least {FEWEST_FOR_INTERVAL})"
    told = (smallest_p(count, flips), note, p_margin, stability.jaccard(), replication)
    return Summary(mean, low, high, t, p, p_adjusted, q, *told)


def _flip(means: _Means, r: np.ndarray, whole: np.ndarray, flips: int, seed: int, margin: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """(p, p_adjusted), each [units], of units whose observed r [units] is known; NaN where a unit is not whole, and below two groups."""
    found = np.full((2, means.units), np.nan)
    if means.groups >= 2:
        place = np.cumsum(whole) - 1  # of a unit among those that are whole
        test = FlipTest(r[whole], means.groups, flips, seed)
        for those, values in means.whole():
            test.add(place[those], scaled(_beyond(values, margin) if margin else values))
        found[:, whole] = test.p, test.adjusted()
    return found[0], found[1]


def _beyond(means: np.ndarray, margin: float) -> np.ndarray:
    """Group means with the sign that makes a unit's mean positive, minus the margin."""
    return means * np.where(means.mean(axis=0) < 0, -1.0, 1.0) - margin


def _replicate(means: _Means, t: np.ndarray, q: np.ndarray, seed: int) -> Replication:
    """Fills q [units] in for the units with the largest |t| [units] in discovery groups."""
    known = np.flatnonzero(~np.isnan(t))
    those = known[picked(t[known])]
    values = means.grouping.means(take(means.x, those))
    q[those] = held_out_q(values[means.heldout], seed=seed)
    agree = np.sign(values[means.discovery].mean(axis=0)) == np.sign(values[means.heldout].mean(axis=0))
    return Replication(len(those), int((agree & (q[those] <= LEVEL)).sum()))


def null_margin(x: np.ndarray | Blocks, groups: np.ndarray, count: int) -> float:
    """The size of mean effect that rewording alone has: a quantile over units of null pairs' |mean effect|.

    The 99.9th percentile over units, so of fewer than a thousand units nearly the largest one: a unit beyond it does what one in a thousand
    does at most where nothing is meant to happen, and a handful of units that react to wording do not set the margin for all.
    A part of a null mean is noise between groups, which shrinks with the square root of their number; another part, how a unit reacts to
    any rewording, does not shrink. So with more null groups than `count` the margin grows by the ratio of the roots, as the noise of a mean
    over `count` groups would, and with fewer it stays as it is: too large rather than too small.

    Args:
        x: effects [pairs, units] of the null pairs.
        count: groups of the pairs that are tested against the margin.

    Returns:
        The margin; NaN where no unit has a finite effect in all null pairs.
    """
    means = _Means(as_blocks(x), groups, None)
    sizes = np.full(means.units, np.nan)
    for those, values in means.whole():
        sizes[those] = np.abs(values.mean(axis=0))
    known = sizes[~np.isnan(sizes)]
    return float(np.quantile(known, NULL_QUANTILE)) * max(1.0, math.sqrt(means.groups / count)) if len(known) else math.nan


def ranked_by(smallest: float) -> str:
    """What units are ranked by, given the smallest p that the number of groups can reach: "|t|", or "|mean|" with the reason.

    Ranking by |t| puts no unit first that its own test refutes. Where no unit can be significant, t is that of a handful of groups, and
    the largest of very many belong to units that do next to nothing.
    """
    return "|t|" if smallest <= LEVEL else f"|mean|, because no test of so few groups can reach p = {LEVEL}"


def strongest(mean: np.ndarray, t: np.ndarray, smallest: float) -> np.ndarray:
    """Flat indices of all units from the strongest to the weakest, as `ranked_by` says; those that are not known come last."""
    by_mean = -np.abs(mean.astype(np.float64)).reshape(-1)
    by_t = -np.abs(t.astype(np.float64)).reshape(-1) if ranked_by(smallest) == "|t|" else by_mean
    return np.lexsort((np.nan_to_num(by_mean, nan=np.inf), np.nan_to_num(by_t, nan=np.inf, neginf=-np.inf)))


def share(x: np.ndarray, total: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Mean effect over mean total [units] (never the mean of ratios), both as means over groups; x [pairs, units], total [pairs].

    NaN where the mean total is zero.
    """
    means, _ = group_means(np.asarray(x, np.float64), groups)
    totals, _ = group_means(np.asarray(total, np.float64)[:, None], groups)
    return means.mean(axis=0) / (totals.mean() or math.nan)
