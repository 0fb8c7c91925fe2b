"""Sign-flip tests of very many units at once, in bounded memory. Every function takes `x` [groups, units].

The studentised mean |t| of n values is a growing function of r = |sum| / sqrt(n * sum of squares), the same one for all units, and a
flip of signs leaves the sum of squares as it is. So units are scaled once, one matmul of single precision gives r for every flip and
unit, and maxima and comparisons of r are those of |t|.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from scipy import stats

DISCOVERIES = 200
HELD_OUT_FLIPS = 20_000
"""A q value of 0.05 among 200 units needs p values far below 1 / 2,000."""
BLOCK = 1024
"""Units in one block: with 2,000 flips, 8 MB."""
TIE = 4e-6
"""Values of r that differ by less are equal: single precision of a sum of up to some thousands of values."""


def smallest_p(groups: int, flips: int = 2000) -> float:
    """The smallest two-sided p that sign flips of this many groups can reach."""
    return max(2.0 / 2**groups, 1.0 / (flips + 1)) if groups > 1 else 1.0


def make_flips(groups: int, flips: int, seed: int) -> np.ndarray:
    """Sign matrix [flips, groups], float32: all of them where they are few, else random ones led by the identity."""
    if 2 ** (groups - 1) <= flips:
        codes = np.arange(2 ** (groups - 1))
        return (1 - 2 * ((codes[:, None] >> np.arange(groups)) & 1)).astype(np.float32)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(flips, groups))
    return np.concatenate([np.ones((1, groups)), signs]).astype(np.float32)


def scaled(x: np.ndarray) -> np.ndarray:
    """x divided by sqrt(n * sum of squares) of each unit: float32 [groups, units], whose sums are r with a sign; 0 where all is 0."""
    out = np.zeros(x.shape, np.float32)
    for begin in range(0, x.shape[1], BLOCK):
        block = slice(begin, begin + BLOCK)
        part = x[:, block].astype(np.float64)
        largest = np.abs(part).max(axis=0)  # first, so that no square overflows or vanishes
        part = np.divide(part, largest, out=np.zeros_like(part), where=largest > 0)
        size = np.sqrt(len(x) * (part**2).sum(axis=0))
        out[:, block] = np.divide(part, size, out=part, where=size > 0)
    return out


def studentised(x: np.ndarray) -> np.ndarray:
    """Student's t of the mean [units], the statistic of every test here; +-inf where nothing varies around a mean, 0 where all is 0."""
    t = np.zeros(x.shape[1])
    for begin in range(0, x.shape[1], BLOCK):
        part = x[:, begin : begin + BLOCK].astype(np.float64)
        mean, error = part.mean(axis=0), part.std(axis=0, ddof=1) / math.sqrt(len(x))
        with np.errstate(divide="ignore", invalid="ignore"):
            t[begin : begin + BLOCK] = np.where(mean == 0, 0.0, mean / error)
    return t


def _blocks(z: np.ndarray, order: np.ndarray, signs: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(units, r [block, flips]) of scaled values, in this order of units."""
    for begin in range(0, len(order), BLOCK):
        units = order[begin : begin + BLOCK]
        r = np.ascontiguousarray(z[:, units].T) @ signs.T
        yield units, np.abs(r, out=r)


def _reached(r: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """The share of flips whose r [block, flips] reaches what was observed [block]; counted bit by bit, which is several times faster."""
    bits = np.packbits(r >= observed[:, None] - TIE, axis=1)
    return np.bitwise_count(bits).sum(axis=1, dtype=np.int64) / r.shape[1]


def flip_tests(z: np.ndarray, flips: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(p, p_adjusted), each [units], of `scaled` values: two-sided sign-flip p values, and step-down max-T of the same flips.

    Westfall and Young (1993), algorithm 4.1; strong control of the family-wise error under symmetry. Units are walked from the weakest
    to the strongest, with every flip's largest r so far: one pass, one block at a time.
    """
    groups, units = z.shape
    observed = np.abs(z.sum(axis=0, dtype=np.float64)).astype(np.float32)
    weakest_first = np.argsort(observed, kind="stable")
    signs = make_flips(groups, flips, seed)
    so_far = np.zeros(len(signs), np.float32)
    p, adjusted = np.ones(units), np.ones(units)
    for block, r in _blocks(z, weakest_first, signs):
        p[block] = _reached(r, observed[block])
        for row in r:  # several times faster than maximum.accumulate
            so_far = np.maximum(row, so_far, out=row)
        so_far = so_far.copy()
        adjusted[block] = _reached(r, observed[block])
    strongest_first = weakest_first[::-1]
    adjusted[strongest_first] = np.maximum.accumulate(adjusted[strongest_first])
    return p, adjusted


def max_t(x: np.ndarray, flips: int = 2000, seed: int = 0) -> np.ndarray:
    """Step-down max-T p values [units] of x [groups, units]; see `flip_tests`."""
    return flip_tests(scaled(x), flips, seed)[1]


def sign_flip(x: np.ndarray, flips: int = 2000, seed: int = 0) -> np.ndarray:
    """Unadjusted two-sided sign-flip p values [units] of x [groups, units]."""
    z = scaled(x)
    observed = np.abs(z.sum(axis=0, dtype=np.float64)).astype(np.float32)
    p = np.ones(z.shape[1])
    for block, r in _blocks(z, np.arange(z.shape[1]), make_flips(len(z), flips, seed)):
        p[block] = _reached(r, observed[block])
    return p


def replicate(discovery: np.ndarray, heldout: np.ndarray, flips: int = HELD_OUT_FLIPS, seed: int = 0) -> np.ndarray:
    """q values [units]: the `DISCOVERIES` largest |t| in discovery groups, tested in held-out groups with Benjamini-Hochberg."""
    picked = np.argsort(-np.abs(studentised(discovery)), kind="stable")[:DISCOVERIES]
    q = np.full(discovery.shape[1], np.nan)
    if len(picked):
        q[picked] = stats.false_discovery_control(sign_flip(heldout[:, picked], flips, seed))
    return q
