"""Statistics: levels under the null, power, and hand-computed values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from jaxmed import statistics


def test_group_means_weigh_groups_equally() -> None:
    means, names = statistics.group_means(np.asarray([[1.0], [3.0], [10.0]]), np.asarray(["b", "b", "a"]))
    assert names.tolist() == ["b", "a"]
    assert means.tolist() == [[2.0], [10.0]]


def test_share_is_a_ratio_of_means() -> None:
    x, total = np.asarray([[1.0], [1.0]]), np.asarray([0.1, 3.9])
    assert statistics.share(x, total, np.asarray(["a", "b"]))[0] == pytest.approx(0.5)


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


def test_bca_equals_scipy() -> None:
    x = np.random.default_rng(1).exponential(size=(50, 1))
    low, high = statistics.interval(x, resamples=20000)
    theirs = stats.bootstrap((x[:, 0],), np.mean, n_resamples=20000, rng=0, method="BCa").confidence_interval
    assert low[0] == pytest.approx(theirs.low, abs=0.01)
    assert high[0] == pytest.approx(theirs.high, abs=0.01)


def test_stability_of_a_clear_ranking_is_one() -> None:
    x = np.tile(np.arange(10.0), (8, 1))
    assert statistics.jaccard_stability(x, 3) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "draw"), [(12, "normal"), (20, "t"), (45, "normal")])
def test_intervals_cover(groups: int, draw: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(groups, 3000)) if draw == "normal" else rng.standard_t(4, size=(groups, 3000))
    low, high = statistics.interval(x)
    assert (0.915 if draw == "t" else 0.93) <= np.mean((low <= 0) & (high >= 0)) <= 0.98  # heavy tails cost a little


@pytest.mark.slow
def test_family_wise_error_holds_under_the_null() -> None:
    rng = np.random.default_rng(0)
    errors = 0
    for _ in range(200):
        common = rng.normal(size=(12, 1))
        x = rng.standard_t(3, size=(12, 300)) + common * rng.choice([-1, 1], 300)
        errors += statistics.max_t(x, flips=500).min() < 0.05
    assert errors / 200 <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5
