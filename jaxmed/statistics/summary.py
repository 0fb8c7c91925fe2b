"""All statistics of effects over pairs. The unit of resampling is the group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxmed.statistics.flips import flip_tests, replicate, scaled, smallest_p, studentised
from jaxmed.statistics.intervals import FEWEST_FOR_INTERVAL, INTERVAL, mean_interval

_BLOCK = 1 << 14


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


def group_means(x: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of x [pairs, units] within each group: [groups, units], and the groups' names in order of first appearance."""
    names, first, index = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))[index]  # of the group that a pair belongs to
    if len(names) == len(groups):
        return np.asarray(x, np.float64), names[np.argsort(first)]
    means = np.zeros((len(names), x.shape[1]))
    for begin in range(0, x.shape[1], _BLOCK):
        block = slice(begin, begin + _BLOCK)
        np.add.at(means[:, block], rank, x[:, block])
    return means / np.bincount(rank)[:, None], names[np.argsort(first)]


def summarise(x: np.ndarray, groups: np.ndarray, splits: np.ndarray | None = None, flips: int = 2000, seed: int = 0) -> Summary:
    """All statistics of effects x [pairs, units]; `groups` and `splits` are labels of the pairs.

    Beside x, memory holds its group means and a copy of them in single precision, and blocks of units.
    """
    means, names = group_means(np.asarray(x), groups)
    count, units = means.shape
    whole = np.isfinite(means).all(axis=0)
    low, high = mean_interval(means)
    t, p, p_adjusted, q = np.full((4, units), np.nan)
    kept = means if whole.all() else means[:, whole]
    if count >= 2:
        t[whole] = studentised(kept)
        p[whole], p_adjusted[whole] = flip_tests(scaled(kept), flips, seed)
    if splits is not None:
        of_group = dict(zip(groups, splits, strict=True))
        side = np.asarray([of_group[name] for name in names])
        discovery, heldout = kept[side == "discovery"], kept[side == "heldout"]
        if min(len(discovery), len(heldout)) >= 3:
            q[whole] = replicate(discovery, heldout, seed=seed)
    note = f"95 % {INTERVAL}; {count} groups"
    if count < FEWEST_FOR_INTERVAL:
        note = f"none: {count} groups are too few for an interval that holds its level (at least {FEWEST_FOR_INTERVAL})"
    return Summary(means.mean(axis=0), low, high, t, p, p_adjusted, q, smallest_p(count, flips), note)


LEVEL = 0.05


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
    """Mean effect over mean total [units] (never the mean of ratios), both as means over groups; x [pairs, units], total [pairs]."""
    means, _ = group_means(np.asarray(x, np.float64), groups)
    totals, _ = group_means(np.asarray(total, np.float64)[:, None], groups)
    return means.mean(axis=0) / totals.mean()
