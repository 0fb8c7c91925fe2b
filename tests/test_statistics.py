"""Statistics: levels under the null, power, and hand-computed values."""

from __future__ import annotations

import itertools
import tracemalloc

import hypothesis.strategies
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from scipy import stats

from jaxmed import statistics


def student(x: np.ndarray) -> np.ndarray:
    """Student's t of the mean of every column."""
    return x.mean(axis=0) / (x.std(axis=0, ddof=1) / len(x) ** 0.5)


def test_group_means_weigh_groups_equally() -> None:
    means, names = statistics.group_means(np.asarray([[1.0], [3.0], [10.0]]), np.asarray(["b", "b", "a"]))
    assert names.tolist() == ["b", "a"]
    assert means.tolist() == [[2.0], [10.0]]


def test_share_is_a_ratio_of_means() -> None:
    x, total = np.asarray([[1.0], [1.0]]), np.asarray([0.1, 3.9])
    assert statistics.share(x, total, np.asarray(["a", "b"]))[0] == pytest.approx(0.5)


def test_nothing_is_divided_by_a_total_of_zero() -> None:
    x, total, groups = np.asarray([[1.0], [1.0]]), np.asarray([1.0, -1.0]), np.asarray(["a", "b"])
    assert np.isnan(statistics.share(x, total, groups)).all()
    assert np.isnan(statistics.ratio_interval(np.ones(20), np.tile([1.0, -1.0], 10))).all()


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_effects_that_are_all_zero_are_not_found(groups: int) -> None:
    splits = np.asarray(["discovery", "heldout"])[np.arange(groups) % 2]
    found = statistics.summarise(np.zeros((groups, 150)), np.arange(groups).astype(str), splits, margin=0.0)
    assert (found.mean == 0).all()
    for p in (found.p, found.p_adjusted, found.p_margin):
        assert p is not None
        assert np.isnan(p).all() if groups == 1 else (p == 1).all()
    assert found.replication is None or found.replication.replicated == 0


def test_smallest_p_of_a_sign_flip() -> None:
    x = np.asarray([[1.0], [1.1], [0.9], [1.2]])
    assert statistics.sign_flip(x)[0] == statistics.smallest_p(4) == 2 / 16


def test_max_t_equals_the_single_test_for_one_unit() -> None:
    x = np.random.default_rng(0).normal(0.5, 1, (9, 1))
    assert statistics.max_t(x)[0] == pytest.approx(statistics.sign_flip(x)[0])


def test_max_t_finds_strong_units_among_very_many() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4000))
    x[:, :20] += 1.0
    p = statistics.max_t(x)
    assert (p[:20] < 0.05).all()
    assert (p[20:] < 0.05).sum() <= 1


def test_max_t_ignores_the_scale_of_units() -> None:
    x = np.random.default_rng(0).normal(0.4, 1, (12, 50))
    assert np.allclose(statistics.max_t(x), statistics.max_t(x * np.geomspace(1e-6, 1e6, 50)))


def test_no_interval_below_ten_groups_and_the_reason_is_said() -> None:
    found = statistics.summarise(np.random.default_rng(0).normal(size=(9, 3)), np.arange(9).astype(str))
    assert np.isnan(found.low).all()
    assert "too few" in found.interval


def test_missing_values_give_missing_statistics_for_that_unit_only() -> None:
    x = np.random.default_rng(0).normal(size=(12, 3))
    x[4, 1] = np.nan
    found = statistics.summarise(x, np.arange(12).astype(str))
    for values in (found.mean, found.low, found.p):
        assert np.isnan(values).tolist() == [False, True, False]


def test_replication_tests_only_what_discovery_picked() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 500))
    x[:, 7] += 3
    found = statistics.summarise(x, np.arange(40).astype(str), np.asarray(["discovery", "heldout"] * 20))
    assert np.isfinite(found.q).sum() == statistics.DISCOVERIES
    assert found.q[7] < 0.05


def test_intervals_are_the_wider_of_two() -> None:
    x = np.random.default_rng(1).exponential(size=20)
    low, high = statistics.mean_interval(x)
    mean, deviation = x.mean(), x.std(ddof=1)
    theirs = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    g, root = ((x - mean) ** 3).mean() / deviation**3, 20**0.5

    def transformed(end: float) -> float:
        """Hall's transform of the studentised mean, were `end` the true one."""
        t = (mean - end) / deviation
        return root * (t + g * t**2 / 3 + g**2 * t**3 / 27 + g / 120)

    quantile = float(stats.t.ppf(0.975, 19))
    assert low == pytest.approx(theirs.low)  # skewed to the right: Student's lower end is the wider one
    assert high > theirs.high
    assert transformed(float(high)) == pytest.approx(-quantile)


def test_intervals_of_what_does_not_vary_are_points() -> None:
    assert statistics.mean_interval(np.full(12, 0.5)) == (0.5, 0.5)
    low, high = statistics.mean_interval(np.zeros((12, 3)))
    assert (low == 0).all()
    assert (high == 0).all()


@pytest.mark.parametrize("large", [(4.56, 3.79), (1e6, 1e6), (-4.56, 3.79)])
def test_intervals_of_sparse_effects_have_a_bounded_length(large: tuple[float, float]) -> None:
    x = np.asarray([0.07, 0.02, 0.02, 0.03, 0.01, -0.01, large[0], 0, -0.01, large[1]])
    low, high = statistics.mean_interval(x)
    assert low <= x.mean() <= high
    assert high - low < 2 * np.ptp(x)


def test_intervals_stay_within_what_is_legal() -> None:
    x = np.asarray([1.0] * 11 + [0.0])
    assert statistics.mean_interval(x)[1] > 1
    assert statistics.mean_interval(x, legal=(0, 1))[1] == 1


def test_a_ratio_of_means_of_equal_weights_is_the_interval_of_a_mean() -> None:
    x = np.random.default_rng(0).normal(3, 1, 30)
    found = statistics.ratio_interval(2 * x, np.full(30, 2.0))
    assert found == pytest.approx((x.mean(), *statistics.mean_interval(x)))
    assert np.isnan(statistics.ratio_interval(x[:9], x[:9])[1])


def test_auc_equals_its_definition_and_its_interval_holds_it() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.integers(0, 6, 30) + 1.0, rng.integers(0, 6, 20).astype(float)
    above = one[:, None] - two[None]
    assert statistics.auc(one, two) == pytest.approx((above > 0).mean() + 0.5 * (above == 0).mean())
    low, high = statistics.auc_interval(one, two)
    assert 0 < low < statistics.auc(one, two) < high < 1
    assert statistics.auc_interval(two, one) == pytest.approx((1 - high, 1 - low))
    assert np.isnan(statistics.auc_interval(one[:9], two)[0])


def test_auc_at_its_ends_has_an_interval_of_some_length() -> None:
    one, two = np.arange(12.0), np.arange(12.0) + 20
    low, high = statistics.auc_interval(two, one)
    assert 0.7 < low < 0.95
    assert high == 1
    assert statistics.auc_interval(one, two) == pytest.approx((0, 1 - low))


def test_ranking_by_t_is_the_order_of_the_tests() -> None:
    x = np.random.default_rng(0).standard_t(5, (15, 400)) + 0.3
    x[:, 0] = [30, -29, 28, -27, 31, -30, 29, -28, 60, -29, 28, 30, -31, 29, -28]  # a large mean that its own test refutes
    found = statistics.summarise(x, np.arange(15).astype(str))
    order = np.argsort(-np.abs(found.t), kind="stable")
    assert np.argmax(np.abs(found.mean)) == 0 != order[0]
    assert (np.diff(found.p_adjusted[order]) >= 0).all()
    assert (found.p <= found.p_adjusted).all()
    assert np.allclose(found.t, student(x))


def brute_max_t(x: np.ndarray) -> np.ndarray:
    """Westfall and Young's step-down max-T by the book, over all flips, in double precision."""
    n, units = x.shape
    signs = np.asarray(list(itertools.product([1, -1], repeat=n)))
    t = np.abs(np.stack([student(row[:, None] * x) for row in signs]))
    order = np.argsort(-t[0])
    raw = [(t[:, order[rank:]].max(axis=1) >= t[0, order[rank]] * (1 - 1e-9)).mean() for rank in range(units)]
    p = np.empty(units)
    p[order] = np.maximum.accumulate(raw)
    return p


@pytest.mark.parametrize("seed", range(3))
def test_max_t_equals_the_textbook(seed: int) -> None:
    x = np.random.default_rng(seed).normal(0.6, 1, (7, 6))
    assert np.allclose(statistics.max_t(x), brute_max_t(x))


@given(
    x=arrays(np.float64, (6, 5), elements=hypothesis.strategies.floats(-8, 8).map(lambda value: round(value, 2))),
    units=hypothesis.strategies.permutations(range(5)),
    groups=hypothesis.strategies.permutations(range(6)),
    scale=hypothesis.strategies.floats(1e-3, 1e3),
)
@settings(deadline=None, max_examples=60)
def test_max_t_does_not_depend_on_order_or_scale(x: np.ndarray, units: list[int], groups: list[int], scale: float) -> None:
    p = statistics.max_t(x)
    assert np.allclose(statistics.max_t(x[:, units]), p[units])
    assert np.allclose(statistics.max_t(x[groups]), p)
    assert np.allclose(statistics.max_t(-scale * x), p)
    assert np.allclose(statistics.max_t(x * np.geomspace(1, scale, 5)), p)


@given(arrays(np.float64, (8, 3), elements=hypothesis.strategies.floats(-4, 4).map(lambda value: round(value, 2))))
@settings(deadline=None, max_examples=40)
def test_more_units_never_lower_a_p(x: np.ndarray) -> None:
    assert (statistics.max_t(x)[:2] >= statistics.max_t(x[:, :2]) - 1e-12).all()
    assert (statistics.max_t(x) >= statistics.sign_flip(x) - 1e-12).all()


def test_statistics_of_very_many_units_need_little_memory() -> None:
    groups, units, flips = 25, 60_000, 100
    x = np.random.default_rng(0).standard_normal((groups, units))
    tracemalloc.start()
    statistics.summarise(x, np.arange(groups).astype(str), flips=flips)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.6 * x.nbytes  # a copy in single precision, eight columns and blocks; all flips of all units would take twice that
    assert flips * units * 4 > 1.9 * x.nbytes


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "draw"), [(12, "normal"), (20, "t"), (45, "normal")])
def test_intervals_cover(groups: int, draw: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(groups, 3000)) if draw == "normal" else rng.standard_t(4, size=(groups, 3000))
    low, high = statistics.mean_interval(x)
    assert 0.93 <= np.mean((low <= 0) & (high >= 0)) <= 0.98


@pytest.mark.slow
def test_family_wise_error_holds_under_the_null() -> None:
    rng = np.random.default_rng(0)
    errors = 0
    for _ in range(200):
        common = rng.normal(size=(12, 1))
        x = rng.standard_t(3, size=(12, 300)) + common * rng.choice([-1, 1], 300)
        errors += statistics.max_t(x, flips=500).min() < 0.05
    assert errors / 200 <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5


OUTLIER = np.asarray([0.07, 0.02, 0.02, 0.03, 0.01, -0.01, 4.56, 0.0, -0.01, 3.79])


@pytest.mark.parametrize("groups", [6, 10, 40])
def test_no_unit_leads_that_its_own_test_refutes(groups: int) -> None:
    """Of units with large means in a few groups, and one that is small and steady, the steady one leads."""
    rng = np.random.default_rng(groups)
    loud = np.resize(OUTLIER[::-1], groups)[:, None] * rng.choice([0.5, 1, 2], 4)
    steady = 0.1 + 0.01 * rng.normal(size=(groups, 1))
    found = statistics.summarise(np.concatenate([loud, steady], axis=1), np.arange(groups).astype(str))
    assert statistics.ranked_by(found.smallest_p) == "|t|"
    order = statistics.strongest(found.mean, found.t, found.smallest_p)
    assert order[0] == 4
    assert np.abs(found.mean).argmax() != 4
    assert (np.diff(found.p_adjusted[order]) >= 0).all()


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_too_few_groups_are_ranked_by_their_means_and_it_is_said(groups: int) -> None:
    x = np.random.default_rng(groups).normal(size=(groups, 50))
    found = statistics.summarise(x, np.arange(groups).astype(str))
    assert statistics.ranked_by(found.smallest_p).startswith("|mean|, because")
    order = statistics.strongest(found.mean, found.t, found.smallest_p)
    assert (np.diff(np.abs(found.mean[order])) <= 0).all()


def test_what_is_not_known_comes_last() -> None:
    mean, t = np.asarray([np.nan, 1.0, -2.0, 0.0, 3.0, 0.5]), np.asarray([np.nan, np.inf, -np.inf, 0.0, 5.0, -7.0])
    assert statistics.strongest(mean, t, 0.01).tolist() == [2, 1, 5, 4, 3, 0]
    assert statistics.strongest(mean, t, 1.0).tolist() == [4, 2, 1, 5, 3, 0]
