"""Coverage and length of intervals of a mean for sparse, heavy-tailed effects of 10 to 60 groups.

    python scripts/simulate_intervals.py [--draws 2000]

Prints, for every population and number of groups, coverage / median length / 95th percentile of the length of each kind of interval at
95 %; lengths are in units of 2 * 1.96 * sd / sqrt(groups). The last column is how often no large effect is among the groups at all: no
interval can cover more often than that leaves.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from jaxmed.statistics import mean_interval
from jaxmed.statistics.intervals import _untransform

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
Ends = tuple[np.ndarray, np.ndarray]


def sparse(part: float, large: Draw) -> Draw:
    """Effects that are large in this part of the groups and N(0.01, 0.02) elsewhere."""
    return lambda rng, shape: np.where(rng.random(shape) < part, large(rng, shape), rng.normal(0.01, 0.02, shape))


def near_four(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.normal(4, 1, shape)


def exponential(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.exponential(4, shape)


POPULATIONS: dict[str, tuple[Draw, float, float]] = {
    "normal": (lambda rng, shape: rng.normal(0, 1, shape), 0.0, 1.0),
    "t, 3 degrees": (lambda rng, shape: rng.standard_t(3, shape), 0.0, 1.0),
    "exponential": (lambda rng, shape: rng.exponential(1, shape), 1.0, 1.0),
    "lognormal": (lambda rng, shape: rng.lognormal(0, 1, shape), math.exp(0.5), 1.0),
    "half, exponential": (sparse(1 / 2, exponential), 2.005, 1 / 2),
    "third, N(4, 1)": (sparse(1 / 3, near_four), 4 / 3 + 0.02 / 3, 1 / 3),
    "fifth, N(4, 1)": (sparse(1 / 5, near_four), 0.808, 1 / 5),
    "fifth, exponential": (sparse(1 / 5, exponential), 0.808, 1 / 5),
    "tenth, N(4, 1)": (sparse(1 / 10, near_four), 0.409, 1 / 10),
    "tenth, N(0, 4)": (sparse(1 / 10, lambda rng, shape: rng.normal(0, 4, shape)), 0.009, 1.0),
}
"""Name -> (how it is drawn, its mean, which part of the groups carries it)."""


def student(x: np.ndarray, weights: np.ndarray) -> Ends:
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(axis=0, ddof=1) / math.sqrt(len(x))
    return x.mean(axis=0) - half, x.mean(axis=0) + half


def hall(x: np.ndarray, weights: np.ndarray) -> Ends:
    deviation, mean, quantile = x.std(axis=0, ddof=1), x.mean(axis=0), float(stats.t.ppf(0.975, len(x) - 1))
    skewness = ((x - mean) ** 3).mean(axis=0) / deviation**3
    low, high = (mean - _untransform(t, skewness, len(x)) * deviation / math.sqrt(len(x)) for t in (quantile, -quantile))
    return low, high


def bootstrap_t(x: np.ndarray, weights: np.ndarray) -> Ends:
    mean, n = x.mean(axis=0), len(x)
    centred, error = x - mean, x.std(axis=0) / math.sqrt(n - 1)
    shift = weights @ centred
    spread = np.sqrt(np.maximum(weights @ centred**2 - shift**2, 0.0) / (n - 1))
    t = np.divide(shift, spread, out=np.zeros_like(shift), where=spread > 1e-9 * error)
    upper, lower = np.quantile(t, [0.975, 0.025], axis=0)
    return mean - upper * error, mean - lower * error


def bca(x: np.ndarray, weights: np.ndarray) -> Ends:
    mean = x.mean(axis=0)
    centred, means = x - mean, np.sort(weights @ x, axis=0)
    below = ((means < mean).sum(axis=0) + 0.5 * (means == mean).sum(axis=0)) / len(weights)
    bias = stats.norm.ppf(np.clip(below, 1 / len(weights), 1 - 1 / len(weights)))
    acceleration = (centred**3).sum(axis=0) / (centred**2).sum(axis=0) ** 1.5 / 6
    ends = []
    for z in stats.norm.ppf([0.025, 0.975]):
        level = stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
        at = np.clip(np.round(level * (len(weights) - 1)).astype(int), 0, len(weights) - 1)
        ends.append(np.take_along_axis(means, at[None], axis=0)[0])
    return ends[0], ends[1]


def sign_flip_inversion(x: np.ndarray, weights: np.ndarray) -> Ends:
    """Quantiles of the means of random subsets (Hartigan 1969)."""
    subsets = np.random.default_rng(1).random(weights.shape) < 0.5
    subsets = subsets[subsets.any(axis=1)]
    low, high = np.quantile(subsets / subsets.sum(axis=1, keepdims=True) @ x, [0.025, 0.975], axis=0)
    return low, high


KINDS: dict[str, Callable[[np.ndarray, np.ndarray], Ends]] = {
    "bootstrap-t": bootstrap_t,
    "BCa": bca,
    "sign-flip": sign_flip_inversion,
    "Student's t": student,
    "Hall": hall,
    "jaxmed": lambda x, weights: mean_interval(x),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000, help="samples of every population and size")
    parser.add_argument("--resamples", type=int, default=1000, help="resamples of the bootstraps")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = np.random.default_rng(given.seed)
    print(f"{'groups':>6} {'population':20}", *(f"{name:>17}" for name in KINDS), "  none large")
    for groups in (10, 15, 20, 30, 40, 60):
        weights = rng.multinomial(groups, np.full(groups, 1 / groups), given.resamples) / groups
        for name, (draw, mean, part) in POPULATIONS.items():
            x = draw(rng, (groups, given.draws))
            unit = 2 * 1.96 * draw(rng, (200_000, 1)).std() / math.sqrt(groups)
            cells = []
            for make in KINDS.values():
                low, high = make(x, weights)
                length = (high - low) / unit
                covered = ((low <= mean) & (mean <= high)).mean()
                cells.append(f"{covered:.3f}/{np.median(length):5.2f}/{np.quantile(length, 0.95):5.1f}")
            print(f"{groups:6} {name:20}", *cells, f"{(1 - part) ** groups:12.3f}")


if __name__ == "__main__":
    main()
