"""Two-phase samples: probabilities are what they say, means unbiased, errors calibrated, recall covered."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmed.statistics import screening

COUNT = 4000


def population(rng: np.random.Generator, spread: float = 0.15, heavy: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Estimates of very unequal sizes, and exact values that are off by a heavy-tailed part of them."""
    estimate = rng.normal(size=COUNT) * np.exp(1.5 * rng.normal(size=COUNT))
    error = spread * np.abs(estimate) * rng.standard_t(heavy, COUNT)
    return estimate, estimate + error


def screened(estimate: np.ndarray, exact: np.ndarray, rows: int, top: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The sample of a sweep whose rows all cost the same: probabilities, and exact values with NaN."""
    size = np.abs(estimate)
    certain = size >= np.sort(size)[-round(screening.CERTAIN * rows)]
    probability = screening.draw(screening.weigh(size, certain), certain, round(screening.SAMPLED * rows), rng)
    known = np.where(probability > 0, exact, np.nan)
    errors = screening.Errors.fit(estimate[probability > 0], exact[probability > 0])
    assert errors is not None
    order = np.argsort(-errors.exceeds(estimate, screening.threshold(known, top)), kind="stable")
    spent = np.cumsum(probability[order] == 0)
    probability[order[spent <= rows - (probability > 0).sum()]] = 1.0
    return probability, np.where(probability > 0, exact, np.nan)


def test_units_are_drawn_with_the_probabilities_that_are_told() -> None:
    rng = np.random.default_rng(0)
    size = np.exp(2 * rng.normal(size=60))
    certain = size > np.sort(size)[-4]
    told, drawn = np.zeros(60), np.zeros(60)
    for _ in range(4000):
        chance = screening.draw(screening.weigh(size, certain), certain, 12, rng)
        assert abs((chance > 0).sum() - 15) <= 1
        told, drawn = np.maximum(told, chance), drawn + (chance > 0)
    assert (told[certain] == 1).all()
    assert (drawn[certain] == 4000).all()
    spread = np.sqrt(told * (1 - told) / 4000)
    assert (np.abs(drawn / 4000 - told) <= 5 * spread + 1e-12).all()
    assert np.isclose(told.sum(), 15)


@pytest.mark.parametrize("count", [0, 100])
def test_draws_of_nothing_and_of_more_than_there_are(count: int) -> None:
    size, certain = np.ones(30), np.arange(30) < 3
    assert (screening.draw(screening.weigh(size, certain), certain, count, np.random.default_rng(0)) > 0).sum() == (30 if count else 3)
    assert (screening.draw(screening.weigh(np.zeros(30), certain), certain, 5, np.random.default_rng(0)) > 0).sum() == 8


def test_the_difference_estimator_is_unbiased_where_plain_values_are_not() -> None:
    rng = np.random.default_rng(1)
    estimate, exact = population(rng)
    exact = exact + 0.3 * np.abs(estimate)  # estimates that are too low throughout
    total, plain = [], []
    for _ in range(400):
        probability, known = screened(estimate, exact, 300, 20, rng)
        value = np.where(probability > 0, known, estimate)
        total.append(screening.corrected(value, estimate, probability).mean())
        plain.append(value.mean())
    error = np.std(total, ddof=1) / np.sqrt(len(total))
    assert abs(np.mean(total) - exact.mean()) < 4 * error
    assert abs(np.mean(plain) - exact.mean()) > 20 * error


def test_errors_of_units_that_were_not_computed_stay_below_what_is_told_of_them() -> None:
    rng, inside = np.random.default_rng(2), []
    for _ in range(20):
        estimate, exact = population(rng)
        probability, known = screened(estimate, exact, 300, 20, rng)
        errors = screening.Errors.fit(estimate[probability > 0], known[probability > 0])
        assert errors is not None
        bound = errors.scale(np.abs(estimate)) * errors.quantile(0.9)
        inside.append((np.abs(exact - estimate) <= bound)[probability == 0].mean())
    assert 0.86 < np.mean(inside) < 0.94


@pytest.mark.parametrize(("rows", "spread", "heavy"), [(120, 0.15, 3.0), (300, 0.15, 3.0), (120, 0.4, 2.5), (120, 0.05, 4.0)])
def test_intervals_of_the_recall_hold_it(rows: int, spread: float, heavy: float) -> None:
    rng, top, held, expected, true = np.random.default_rng(3), 50, [], [], []
    for _ in range(150):
        estimate, exact = population(rng, spread, heavy)
        probability, known = screened(estimate, exact, rows, top, rng)
        errors = screening.Errors.fit(estimate[probability > 0], known[probability > 0])
        told = screening.recall(estimate, known, top, errors, rng)
        largest = np.argsort(-np.abs(exact))[:top]
        true.append((probability[largest] > 0).mean())
        expected.append(told.mean)
        held.append(told.low <= true[-1] <= told.high)
    assert np.mean(held) >= 0.9
    assert abs(np.mean(expected) - np.mean(true)) < 0.03


def test_too_little_is_known_or_everything_is() -> None:
    estimate, exact, rng = np.ones(100), np.full(100, np.nan), np.random.default_rng(0)
    exact[:5] = 1.0
    assert screening.Errors.fit(estimate[:5], exact[:5]) is None
    told = screening.recall(estimate, exact, 10, None, rng)
    assert np.isnan(told.mean)
    assert (told.low, told.high) == (0.0, 0.5)
    assert screening.recall(estimate, np.ones(100), 10, None, rng) == screening.Recall(1.0, 1.0, 1.0)


def test_estimates_without_errors_miss_nothing() -> None:
    rng = np.random.default_rng(4)
    estimate, _ = population(rng)
    probability, known = screened(estimate, estimate, 200, 50, rng)
    errors = screening.Errors.fit(estimate[probability > 0], known[probability > 0])
    told = screening.recall(estimate, known, 50, errors, rng)
    assert told == screening.Recall(1.0, 1.0, 1.0)


def test_better_estimates_are_verified_where_the_sample_says_that_it_pays() -> None:
    rng = np.random.default_rng(5)
    estimate, exact = population(rng)
    errors = screening.Errors.fit(estimate[:400], exact[:400])
    assert errors is not None
    near, far = errors.exceeds(np.asarray([0.9, 0.1]), 1.0)
    assert 0.2 < near < 0.5
    assert far < 0.02
    assert errors.exceeds(np.asarray([1.2]), 1.0) == 1.0
