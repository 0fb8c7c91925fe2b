"""Simulated studies: how often the statistics of a sweep are wrong, and how often they find what is there."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from jaxmed import statistics

STUDIES = 200
LEVEL = 0.05


def _noise(rng: np.random.Generator, pairs: int, units: int, factors: int = 3) -> np.ndarray:
    """Heavy-tailed noise [pairs, units] of variance 1, half of it shared through factors with loadings of either sign."""
    own = rng.standard_t(5, (pairs, units)) * (3 / 5) ** 0.5
    shared = rng.normal(size=(pairs, factors)) @ rng.normal(size=(factors, units)) / factors**0.5
    return ((own + shared) / 2**0.5).astype(np.float32)


def _binomial(count: int, of: int = STUDIES) -> tuple[float, float]:
    """95 % interval of a share that was seen `count` times."""
    found = stats.binomtest(count, of).proportion_ci(0.95)
    return found.low, found.high


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [12, 40])
def test_studies_in_which_nothing_happens_find_something_in_a_twentieth(pairs: int) -> None:
    rng = np.random.default_rng(0)
    anything = sum(statistics.max_t(_noise(rng, pairs, 400), 1000, seed).min() <= LEVEL for seed in range(STUDIES))
    low, high = _binomial(anything)
    assert low <= LEVEL <= high, anything


@pytest.mark.slow
def test_nothing_beyond_the_margin_is_found_in_studies_at_the_margin() -> None:
    rng = np.random.default_rng(0)
    anything = 0
    for seed in range(STUDIES):
        x = _noise(rng, 20, 300) + 0.5 * rng.choice([-1, 1], 300)
        found = statistics.summarise(x, np.arange(20).astype(str), flips=500, seed=seed, margin=0.5)
        assert found.p_margin is not None
        anything += found.p_margin.min() <= LEVEL
    assert _binomial(anything)[0] <= LEVEL, anything


@pytest.mark.slow
def test_false_discoveries_beside_correlated_effects() -> None:
    """Of what is found beside 20 effects whose sizes in a pair go together, a twentieth at most is false on average."""
    rng, shares = np.random.default_rng(0), []
    for seed in range(100):
        x = _noise(rng, 30, 1000)
        x[:, :20] += 1 + rng.normal(0, 0.5, (30, 1))
        found = np.flatnonzero(statistics.max_t(x, 500, seed) <= LEVEL)
        shares.append((found >= 20).mean() if len(found) else 0.0)
    assert np.mean(shares) <= LEVEL, np.mean(shares)


@pytest.mark.slow
def test_q_values_hold_the_false_discovery_rate() -> None:
    rng, shares = np.random.default_rng(0), []
    splits = np.asarray(["discovery", "heldout"])[np.arange(40) % 2]
    for seed in range(60):
        x = _noise(rng, 40, 1000)
        x[:, :20] += 1 + rng.normal(0, 0.5, (40, 1))
        q = statistics.replicate(x[splits == "discovery"], x[splits == "heldout"], 5000, seed)
        found = np.flatnonzero(q <= LEVEL)
        shares.append((found >= 20).mean() if len(found) else 0.0)
    assert np.mean(shares) <= LEVEL, np.mean(shares)


@pytest.mark.slow
def test_sixty_pairs_find_twenty_of_very_many_units() -> None:
    """d = 1 for 20 of 46,080 units, half of whose variance over pairs is shared."""
    rng, power, shares = np.random.default_rng(0), [], []
    for seed in range(10):
        x = _noise(rng, 60, 46_080)
        x[:, :20] = 1 + (rng.standard_normal((60, 20)) + rng.standard_normal((60, 1))) / 2**0.5
        found = np.flatnonzero(statistics.max_t(x, 2000, seed) <= LEVEL)
        power.append((found < 20).sum() / 20)
        shares.append((found >= 20).sum() / max(1, len(found)))
    assert np.mean(power) >= 0.95, power
    assert np.mean(shares) <= LEVEL, shares


@pytest.mark.slow
@pytest.mark.parametrize("groups", [10, 20, 60])
@pytest.mark.parametrize("draw", ["normal", "t", "exponential"])
def test_intervals_cover_where_they_are_printed(groups: int, draw: str) -> None:
    rng = np.random.default_rng(groups)
    shape, true = (groups, 20_000), float(draw == "exponential")
    x = {"normal": rng.standard_normal, "t": lambda s: rng.standard_t(5, s), "exponential": rng.standard_exponential}[draw](shape)
    low, high = statistics.mean_interval(x)
    covered = np.mean((low <= true) & (true <= high))
    assert 0.93 <= covered <= 0.97, covered
