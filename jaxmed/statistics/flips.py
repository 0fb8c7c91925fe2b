"""Sign-flip tests of very many units at once, in bounded memory. Every function takes `x` [groups, units].

The studentised mean |t| of n values is a growing function of r = |sum| / sqrt(n * sum of squares), the same one for all units, and a
flip of signs leaves the sum of squares as it is. So units are scaled once, one matmul of single precision gives r for every flip and
unit, and maxima and comparisons of r are those of |t|.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

DISCOVERIES = 200
HELD_OUT_FLIPS = 20_000
"""A q value of 0.05 among 200 units needs p values far below 1 / 2,000."""
BLOCK = 1024
"""Units that are scaled or studentised at once."""
FLIPPED = 1 << 21
"""Values of r in one block of units and flips: 8 MB."""
TIE = 4e-6
"""Values of r that differ by less are equal: single precision of a sum of up to some thousands of values."""
MOST_STEPS = 200_000
"""Steps that are held before those that do not matter are dropped: 2.4 MB."""


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


def strength(z: np.ndarray) -> np.ndarray:
    """r with its sign, float32 [units], of `scaled` values: what `FlipTest` compares flips with."""
    return z.sum(axis=0, dtype=np.float64).astype(np.float32)


def _reached(r: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """The share of flips whose r [block, flips] reaches what was observed [block]; counted bit by bit, which is several times faster."""
    bits = np.packbits(r >= observed[:, None] - TIE, axis=1)
    return np.bitwise_count(bits).sum(axis=1, dtype=np.int64) / r.shape[1]


class FlipTest:
    """Sign flips of units that come in blocks, in any order: p of every unit alone, and step-down max-T over all of them.

    Westfall and Young (1993), algorithm 4.1; strong control of the family-wise error under symmetry. The algorithm walks from the weakest
    unit to the strongest with every flip's largest r so far. That is a staircase over the ranks of units, and its steps are all that is
    kept of a block: a dozen per flip, whatever the number of units.

    Attributes:
        p: two-sided p values [units], of the units that were added.
    """

    def __init__(self, observed: np.ndarray, groups: int, flips: int = 2000, seed: int = 0):
        """`observed` [units], float32: r of every unit, without sign; 0 where a unit is not to be found."""
        weakest_first = np.argsort(observed, kind="stable")
        self._observed, self._least = observed, observed[weakest_first] - TIE
        self._rank = np.empty(len(observed), np.int64)
        self._rank[weakest_first] = np.arange(len(observed))
        self._signs = make_flips(groups, flips, seed)
        self._width = max(1, FLIPPED // len(self._signs))
        self._steps = [(np.zeros(0, np.int64), np.zeros(0, np.float32))]
        self.p = np.ones(len(observed))

    def add(self, units: np.ndarray, z: np.ndarray) -> None:
        """Flips the `scaled` values z [groups, block] of these units [block]."""
        for begin in range(0, len(units), self._width):
            block = units[begin : begin + self._width]
            order = np.argsort(self._rank[block])
            block = block[order]
            r = np.ascontiguousarray(z[:, begin : begin + self._width].T[order]) @ self._signs.T
            np.abs(r, out=r)
            self.p[block] = _reached(r, self._observed[block])
            self._keep_steps(self._rank[block], r)

    def _keep_steps(self, ranks: np.ndarray, r: np.ndarray) -> None:
        """Keeps where the largest r so far [flips] grows in a block of units, the weakest first; r is overwritten."""
        so_far = r[0]
        for row in r[1:]:  # several times faster than maximum.accumulate
            so_far = np.maximum(row, so_far, out=row)
        grows = np.ones(r.shape, bool)
        np.greater(r[1:], r[:-1], out=grows[1:])
        steps = np.flatnonzero(grows)
        at, flip = np.divmod(steps, r.shape[1])
        self._steps.append((flip * len(self.p) + ranks[at], r.reshape(-1)[steps]))
        if sum(len(keys) for keys, _ in self._steps) > MOST_STEPS:
            self._steps = [self._merged()]

    def _merged(self) -> tuple[np.ndarray, np.ndarray]:
        """(flip * units + rank, r) of all steps, by flip and rank, without those that rise above no weaker unit's."""
        keys, r = (np.concatenate(parts) for parts in zip(*self._steps, strict=True))
        order = np.argsort(keys)
        keys, r = keys[order], r[order]
        highest = np.maximum.accumulate(4.0 * (keys // len(self.p)) + r)  # r is below 2: each flip begins anew
        grows = np.diff(highest, prepend=-1.0) > 0
        return keys[grows], r[grows]

    def adjusted(self) -> np.ndarray:
        """Step-down max-T p values [units], after all units were added."""
        units = len(self.p)
        keys, r = self._merged()
        if not units:
            return np.ones(0)
        begin = keys % units
        end = np.append(np.where(keys[1:] // units == keys[:-1] // units, begin[1:], units), units)
        reached = np.searchsorted(self._least, r, side="right")  # units from `begin` to here are no stronger than this step
        counts = np.zeros(units + 1, np.int64)
        np.add.at(counts, begin, 1)
        np.add.at(counts, np.maximum(begin, np.minimum(end, reached)), -1)
        share = np.cumsum(counts[:-1]) / len(self._signs)
        return np.maximum.accumulate(share[::-1])[::-1][self._rank]


def flip_tests(z: np.ndarray, flips: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(p, p_adjusted), each [units], of `scaled` values z [groups, units]; see `FlipTest`."""
    test = FlipTest(np.abs(strength(z)), len(z), flips, seed)
    test.add(np.arange(z.shape[1]), z)
    return test.p, test.adjusted()


def max_t(x: np.ndarray, flips: int = 2000, seed: int = 0) -> np.ndarray:
    """Step-down max-T p values [units] of x [groups, units]; see `flip_tests`."""
    return flip_tests(scaled(x), flips, seed)[1]


def sign_flip(x: np.ndarray, flips: int = 2000, seed: int = 0) -> np.ndarray:
    """Unadjusted two-sided sign-flip p values [units] of x [groups, units]."""
    return flip_tests(scaled(x), flips, seed)[0]


def picked(t: np.ndarray) -> np.ndarray:
    """Indices of the `DISCOVERIES` largest |t| [units]."""
    return np.argsort(-np.abs(t), kind="stable")[:DISCOVERIES]


def held_out_q(x: np.ndarray, flips: int = HELD_OUT_FLIPS, seed: int = 0) -> np.ndarray:
    """Benjamini-Hochberg q values [units] of picked units' values x in held-out groups [groups, units]."""
    return stats.false_discovery_control(sign_flip(x, flips, seed)) if x.shape[1] else np.zeros(0)


def replicate(discovery: np.ndarray, heldout: np.ndarray, flips: int = HELD_OUT_FLIPS, seed: int = 0) -> np.ndarray:
    """q values [units]: the `DISCOVERIES` largest |t| in discovery groups, tested in held-out groups with Benjamini-Hochberg."""
    those, q = picked(studentised(discovery)), np.full(discovery.shape[1], np.nan)
    q[those] = held_out_q(heldout[:, those], flips, seed)
    return q
