"""Statistics of effects over pairs: numpy in, numpy out.

The unit of resampling is the group. Every function takes `x` [groups, units], one row per group (`group_means`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

FEWEST_FOR_INTERVAL = 10
FEWEST_FOR_BCA = 40
DISCOVERIES = 200
HELD_OUT_FLIPS = 20_000
"""A q value of 0.05 among 200 units needs p values far below 1 / 2,000."""
_BLOCK = 4096


@dataclass(frozen=True)
class Summary:
    """Statistics of every unit, each [units]; NaN where a unit lacks a value in some group.

    Attributes:
        mean: mean over groups of the group's mean.
        low, high: 95 % interval of the mean; NaN below `FEWEST_FOR_INTERVAL` groups.
        p: two-sided sign-flip p, adjusted over all units by step-down max-T (strong control of the family-wise error).
        q: Benjamini-Hochberg q in the held-out groups of the units that the discovery groups picked; NaN elsewhere.
        smallest_p: the smallest p that this number of groups can reach.
        interval: how the interval was made, or why there is none.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    q: np.ndarray
    smallest_p: float
    interval: str


def group_means(x: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of x [pairs, units] within each group: [groups, units], and the groups' names in order of first appearance."""
    names, first, index = np.unique(groups, return_index=True, return_inverse=True)
    sums = np.zeros((len(names), x.shape[1]))
    np.add.at(sums, index, x)
    means = sums / np.bincount(index)[:, None]
    order = np.argsort(first)
    return means[order], names[order]


def summarise(x: np.ndarray, groups: np.ndarray, splits: np.ndarray | None = None, resamples: int = 2000, seed: int = 0) -> Summary:
    """All statistics of effects x [pairs, units]; `groups` and `splits` are labels of the pairs."""
    means, names = group_means(np.asarray(x, np.float64), groups)
    count, units = means.shape
    whole = np.isfinite(means).all(axis=0)
    out = {name: np.full(units, np.nan) for name in ("low", "high", "p", "q")}
    kept = means[:, whole]
    if count >= FEWEST_FOR_INTERVAL:
        out["low"][whole], out["high"][whole] = interval(kept, resamples=resamples, seed=seed)
    if count >= 2:
        out["p"][whole] = max_t(kept, flips=resamples, seed=seed)
    if splits is not None:
        of_group = {group: split for group, split in zip(groups, splits, strict=True)}
        side = np.asarray([of_group[name] for name in names])
        discovery, heldout = kept[side == "discovery"], kept[side == "heldout"]
        if min(len(discovery), len(heldout)) >= 3:
            out["q"][whole] = replicate(discovery, heldout, seed=seed)
    how = "bootstrap-t" if count < FEWEST_FOR_BCA else "BCa bootstrap"
    note = f"95 % {how}, {resamples} resamples of {count} groups"
    if count < FEWEST_FOR_INTERVAL:
        note = f"none: {count} groups are too few for an interval that holds its level (at least {FEWEST_FOR_INTERVAL})"
    return Summary(means.mean(axis=0), smallest_p=smallest_p(count, resamples), interval=note, **out)


def smallest_p(groups: int, flips: int = 2000) -> float:
    """The smallest two-sided p that sign flips of this many groups can reach."""
    return max(2.0 / 2**groups, 1.0 / (flips + 1)) if groups > 1 else 1.0


def _flips(groups: int, flips: int, seed: int) -> np.ndarray:
    """Sign matrix [flips, groups]: all of them where they are few, else random ones led by the identity."""
    if 2 ** (groups - 1) <= flips:
        codes = np.arange(2 ** (groups - 1))
        return 1.0 - 2.0 * ((codes[:, None] >> np.arange(groups)) & 1)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(flips, groups))
    return np.concatenate([np.ones((1, groups)), signs])


def _t(mean: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """Student's t from a mean and a second moment; 0 where nothing varies around zero."""
    variance = np.maximum(second - mean**2, 0.0) / max(count - 1, 1)
    tiny = 1e-12 * second
    return np.divide(mean, np.sqrt(np.maximum(variance, tiny)), out=np.zeros_like(mean), where=second > 0)


def max_t(x: np.ndarray, flips: int = 2000, seed: int = 0) -> np.ndarray:
    """Step-down max-T p values [units] of x [groups, units], studentised sign flips, one flip matrix for all units.

    Westfall and Young (1993), algorithm 4.1; strong control of the family-wise error under symmetry.
    """
    groups, units = x.shape
    second = np.mean(x**2, axis=0)
    observed = np.abs(_t(x.mean(axis=0), second, groups))
    order = np.argsort(-observed, kind="stable")
    sorted_x, sorted_second, sorted_t = x[:, order], second[order], observed[order]
    signs = _flips(groups, flips, seed)
    exceeded = np.zeros(units)
    for begin in range(0, len(signs), 64):
        flipped = np.abs(_t(signs[begin : begin + 64] @ sorted_x / groups, sorted_second, groups))
        successive = np.maximum.accumulate(flipped[:, ::-1], axis=1)[:, ::-1]
        exceeded += (successive >= sorted_t * (1 - 1e-9)).sum(axis=0)
    adjusted = np.maximum.accumulate(exceeded / len(signs))
    p = np.empty(units)
    p[order] = np.minimum(adjusted, 1.0)
    return p


def sign_flip(x: np.ndarray, flips: int = 2000, seed: int = 0) -> np.ndarray:
    """Unadjusted two-sided sign-flip p values [units] of x [groups, units]."""
    groups = len(x)
    second = np.mean(x**2, axis=0)
    observed = np.abs(_t(x.mean(axis=0), second, groups))
    signs = _flips(groups, flips, seed)
    exceeded = np.zeros(x.shape[1])
    for begin in range(0, len(signs), 64):
        exceeded += (np.abs(_t(signs[begin : begin + 64] @ x / groups, second, groups)) >= observed * (1 - 1e-9)).sum(axis=0)
    return exceeded / len(signs)


def replicate(discovery: np.ndarray, heldout: np.ndarray, flips: int = HELD_OUT_FLIPS, seed: int = 0) -> np.ndarray:
    """q values [units]: the `DISCOVERIES` largest |t| in discovery groups, tested in held-out groups with Benjamini-Hochberg."""
    strength = np.abs(_t(discovery.mean(axis=0), np.mean(discovery**2, axis=0), len(discovery)))
    picked = np.argsort(-strength, kind="stable")[:DISCOVERIES]
    q = np.full(discovery.shape[1], np.nan)
    q[picked] = stats.false_discovery_control(sign_flip(heldout[:, picked], flips, seed))
    return q


def interval(x: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Intervals of the mean of x [groups, units]: bootstrap-t below 40 groups, BCa from there on (Efron and Tibshirani 1993).

    scipy's bootstrap gathers resamples x groups x units values; here a resample is a weight vector, so one matmul does all.
    """
    groups, units = x.shape
    weights = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=resamples) / groups
    low, high = np.empty(units), np.empty(units)
    for begin in range(0, units, _BLOCK):
        block = slice(begin, begin + _BLOCK)
        make = _bootstrap_t if groups < FEWEST_FOR_BCA else _bca
        low[block], high[block] = make(x[:, block], weights, (1 - level) / 2)
    return low, high


def _bootstrap_t(x: np.ndarray, weights: np.ndarray, tail: float) -> tuple[np.ndarray, np.ndarray]:
    groups = len(x)
    mean = x.mean(axis=0)
    centred = x - mean
    error = np.sqrt(np.mean(centred**2, axis=0) / (groups - 1))
    shift = weights @ centred
    spread = np.sqrt(np.maximum(weights @ centred**2 - shift**2, 0.0) / (groups - 1))
    t = np.divide(shift, spread, out=np.zeros_like(shift), where=spread > 1e-9 * error)
    upper, lower = np.quantile(t, [1 - tail, tail], axis=0)
    return mean - upper * error, mean - lower * error


def _bca(x: np.ndarray, weights: np.ndarray, tail: float) -> tuple[np.ndarray, np.ndarray]:
    mean = x.mean(axis=0)
    centred = x - mean
    means = np.sort(weights @ x, axis=0)
    below = (np.sum(means < mean, axis=0) + 0.5 * np.sum(means == mean, axis=0)) / len(weights)
    bias = stats.norm.ppf(np.clip(below, 1 / len(weights), 1 - 1 / len(weights)))
    squares = np.sum(centred**2, axis=0)
    skew = np.divide(np.sum(centred**3, axis=0), squares**1.5, out=np.zeros_like(mean), where=squares > 0)
    acceleration = skew / 6  # of the jackknife values of a mean, which are -centred / (groups - 1)
    ends = []
    for z in stats.norm.ppf([tail, 1 - tail]):
        level = stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
        at = np.clip(np.round(level * (len(weights) - 1)).astype(int), 0, len(weights) - 1)
        ends.append(np.take_along_axis(means, at[None], axis=0)[0])
    return ends[0], ends[1]


def share(x: np.ndarray, total: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Mean effect over mean total [units] (never the mean of ratios), both as means over groups; x [pairs, units], total [pairs]."""
    means, _ = group_means(np.asarray(x, np.float64), groups)
    totals, _ = group_means(np.asarray(total, np.float64)[:, None], groups)
    return means.mean(axis=0) / totals.mean()


def jaccard_stability(x: np.ndarray, top: int, resamples: int = 200, seed: int = 0) -> float:
    """Mean Jaccard overlap between the top units of x [groups, units] by |mean| and those of bootstrap resamples of the groups."""
    groups = len(x)
    chosen = set(np.argsort(-np.abs(x.mean(axis=0)), kind="stable")[:top])
    rng = np.random.default_rng(seed)
    overlaps = []
    for weights in rng.multinomial(groups, np.full(groups, 1 / groups), size=resamples) / groups:
        again = set(np.argsort(-np.abs(weights @ x), kind="stable")[:top])
        overlaps.append(len(chosen & again) / len(chosen | again))
    return float(np.mean(overlaps))
