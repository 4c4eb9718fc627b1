"""Distances of feature sets: closed forms, singular covariances, unbiased KID, precision and recall, intervals."""

import numpy as np
import pytest
import torch
from scipy import linalg

from neuroldm3d.diffusion import fid
from neuroldm3d.diffusion.fid import FeatureStats, frechet_distance, kid


def normal(n, d, seed, shift=0.0, scale=1.0):
    return shift + scale * np.random.default_rng(seed).standard_normal((n, d))


def stats_of(mean, covariance, n=11):
    return FeatureStats(n, np.asarray(mean, float), np.asarray(covariance, float) * (n - 1))


# ---- Fréchet distance


def test_closed_forms():
    one = frechet_distance(stats_of([1.0], [[4.0]]), stats_of([3.0], [[9.0]]))
    assert one == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2)
    a, b = np.array([1.0, 4.0, 0.0]), np.array([9.0, 1.0, 0.25])
    turn = np.linalg.qr(normal(3, 3, 0))[0]  # commuting covariances in any basis
    shift = np.array([1.0, -2.0, 0.5])
    found = frechet_distance(stats_of(np.zeros(3), turn * a @ turn.T), stats_of(shift, turn * b @ turn.T))
    assert found == pytest.approx((shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum())


def test_agrees_with_the_matrix_root_where_that_exists():
    x, y = normal(200, 6, 0), normal(150, 6, 1, 0.3, 1.4) @ np.triu(np.ones((6, 6)))
    product = np.cov(x.T) @ np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T))
    expected -= 2 * np.trace(linalg.sqrtm(product)).real
    assert frechet_distance(FeatureStats().update(x), FeatureStats().update(y)) == pytest.approx(expected, rel=1e-9)
    assert fid.fid(x, y) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(40, 40, 8), (10, 10, 24), (7, 12, 30), (30, 8, 9)])
def test_by_way_of_samples_equals_by_way_of_moments(n, m, d):
    """Fewer samples than features make covariances singular: both ways must still agree."""
    x, y = normal(n, d, 0), normal(m, d, 1, 0.2, 1.3)
    moments = frechet_distance(FeatureStats().update(x), FeatureStats().update(y))
    assert fid.fid(x, y) == pytest.approx(moments, rel=1e-7)
    assert fid._fid_of_samples(x, y, x @ y.T) == pytest.approx(moments, rel=1e-7)


@pytest.mark.parametrize(("n", "d"), [(300, 16), (12, 64), (20, 512)])
def test_a_set_with_itself_is_zero(n, d):
    """Fact 29, for more and for fewer samples than features."""
    x = np.maximum(normal(n, d, 0, 0.3), 0)
    assert abs(fid.fid(x, x)) < 1e-6
    assert abs(frechet_distance(FeatureStats().update(x), FeatureStats().update(x[::-1]))) < 1e-6


def test_moments_stream_in_any_batches_without_cancellation():
    x = normal(501, 5, 3, shift=1e6) * [1, 2, 3, 4, 5]
    whole, parts, merged = FeatureStats().update(x), FeatureStats(), FeatureStats()
    for start in range(0, 501, 37):
        parts.update(torch.from_numpy(x[start : start + 37]))
    for start in (250, 0):
        merged.merge(FeatureStats().update(x[start : start + 251] if start else x[:250]))
    for found in (whole, parts, merged):
        assert found.n == 501
        np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-6)
    single = FeatureStats()
    for row in x[:50]:
        single.update(row[None])
    np.testing.assert_allclose(single.covariance, np.cov(x[:50].T), rtol=1e-6)


def test_unusable_features_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        FeatureStats().update([[np.nan]])
    with pytest.raises(ValueError, match="feature sizes differ"):
        FeatureStats().update(np.ones((2, 3))).update(np.ones((2, 4)))
    with pytest.raises(ValueError, match="at least 2"):
        _ = FeatureStats().update(np.ones((1, 3))).covariance
    for function in (fid.fid, lambda x, y: kid(x, y, seed=0), fid.neighbourhood_metrics):
        with pytest.raises(ValueError, match="feature sizes differ"):
            function(np.ones((3, 2)), np.ones((3, 4)))
        with pytest.raises(ValueError, match="n of at least 2"):
            function(np.ones((1, 2)), np.ones((3, 2)))


def test_small_samples_are_biased_upward_and_say_so():
    """The reason for the warning and for the real-vs-real baseline."""
    few = fid.fid(normal(20, 64, 0), normal(20, 64, 1))
    many = fid.fid(normal(4000, 64, 0), normal(4000, 64, 1))
    assert few > 20 * many
    assert "n = 20 is not above the 64 features" in fid.small_sample_warning(20, 64)
    assert fid.small_sample_warning(64, 64) and not fid.small_sample_warning(65, 64)


# ---- KID


def test_kid_by_its_definition():
    x, y = normal(4, 3, 0), normal(5, 3, 1, 0.5)

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    xx = np.mean([k(x[i], x[j]) for i in range(4) for j in range(4) if i != j])
    yy = np.mean([k(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    assert kid(x, y, seed=0)[0] == pytest.approx(xx + yy - 2 * xy)


def test_kid_is_unbiased_where_fid_is_not():
    draws = [kid(normal(12, 32, 2 * s), normal(12, 32, 2 * s + 1), seed=0, subsets=2)[0] for s in range(300)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 300**0.5
    assert min(draws) < 0 < max(draws)


def test_kid_error_is_that_of_repeated_experiments():
    found = [kid(normal(60, 8, 2 * s), normal(60, 8, 2 * s + 1, 0.5), seed=s) for s in range(60)]
    spread, stated = np.std([v for v, _ in found], ddof=1), np.median([e for _, e in found])
    assert 0.5 < stated / spread < 2
    assert kid(normal(60, 8, 0), normal(60, 8, 1), seed=3) == kid(normal(60, 8, 0), normal(60, 8, 1), seed=3)
    assert np.isnan(kid(normal(3, 8, 0), normal(3, 8, 1), seed=0)[1])  # no subset of two


# ---- precision, recall, density, coverage


def test_same_distribution_far_apart_and_collapsed():
    real, other = normal(200, 4, 0), normal(200, 4, 1)
    same = fid.neighbourhood_metrics(real, other)
    assert min(same["precision"], same["recall"], same["coverage"]) > 0.85
    assert same["density"] == pytest.approx(1, abs=0.15) and same["nn_accuracy"] == pytest.approx(0.5, abs=0.08)
    itself = fid.neighbourhood_metrics(real, real)
    assert itself["precision"] == itself["recall"] == itself["coverage"] == 1
    far = fid.neighbourhood_metrics(real, other + 100)
    assert (far["precision"], far["recall"], far["density"], far["coverage"], far["nn_accuracy"]) == (0, 0, 0, 0, 1)
    collapsed = fid.neighbourhood_metrics(real, 0.05 * other)  # one mode, right in the middle
    assert collapsed["precision"] == 1 and collapsed["recall"] < 0.1 and collapsed["coverage"] < 0.5
    assert collapsed["density"] > 1


def test_neighbourhoods_counted_by_hand():
    real, fake = np.array([[0.0], [1.0], [3.0]]), np.array([[0.5], [10.0], [10.5]])
    # k = 2: the balls of 0, 1, 3 reach 3, 2, 3 far; those of the fakes 10, 9.5, 10.
    found = fid.neighbourhood_metrics(real, fake, k=2)
    assert found["precision"] == pytest.approx(1 / 3) and found["recall"] == pytest.approx(1)
    assert found["density"] == pytest.approx(3 / (2 * 3)) and found["coverage"] == pytest.approx(1)
    assert found["nn_accuracy"] == pytest.approx((1 / 3 + 2 / 3) / 2)  # 3 among the reals; 10 and 10.5 among the fakes


def test_ties_are_a_coin_toss():
    constant = np.zeros((6, 3))  # as features of empty slices
    assert fid.neighbourhood_metrics(constant, constant)["nn_accuracy"] == 0.5


def test_distances_are_exact_for_equal_rows():
    x = normal(20, 300, 0, shift=1e3).astype(np.float32)
    y = np.concatenate([x[5:8], normal(10, 300, 1, shift=1e3).astype(np.float32)])
    brute = ((x[:, None].astype(float) - y[None].astype(float)) ** 2).mean(-1)
    found = fid.distances(x, y)
    np.testing.assert_allclose(found, brute, rtol=1e-9, atol=0)
    assert found[5, 0] == found[6, 1] == found[7, 2] == 0


# ---- intervals


def test_bootstrap_interval_has_the_spread_of_repeated_experiments():
    values, widths = [], []
    for s in range(30):
        x, y = normal(80, 3, 2 * s), normal(80, 3, 2 * s + 1, 1.0)
        draws = fid.bootstrap_draws(80, 40, s, 0), fid.bootstrap_draws(80, 40, s, 1)
        value = fid.fid(x, y)
        low, high = fid.bootstrap_interval(value, fid.fid_bootstrap(x, y, *draws))
        values.append(value)
        widths.append((high - low) / 3.92)
        assert low < value < high
    assert 0.6 < np.median(widths) / np.std(values, ddof=1) < 1.6


def test_resampled_fid_is_the_fid_of_the_resampled_sets():
    x, y = normal(9, 20, 0), normal(9, 20, 1, 0.4)
    draws = fid.bootstrap_draws(9, 3, 5, 0), fid.bootstrap_draws(9, 3, 5, 1)
    found = fid.fid_bootstrap(x, y, *draws)
    expected = [fid.fid(x[i], y[j]) for i, j in zip(*draws, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert fid.bootstrap_interval(1.0, found[:1]) is None
    assert fid.bootstrap_interval(0.1, np.array([0.0, 5.0]))[0] == 0  # a distance


def test_all_measures_together():
    real, fake = normal(30, 6, 0), normal(30, 6, 1, 0.5)
    found = fid.compare_sets(real, fake, seed=0)
    assert found["fid"] == fid.fid(real, fake) and (found["kid"], found["kid_se"]) == kid(real, fake, seed=0)
    assert "fid_resampled" not in found
    draws = fid.bootstrap_draws(30, 4, 0), fid.bootstrap_draws(30, 4, 1)
    assert len(fid.compare_sets(real, fake, seed=0, draws=draws)["fid_resampled"]) == 4
