"""FID and KID: closed forms, singular covariances, streamed moments, unbiased KID and its error."""

import numpy as np
import pytest
import torch
from scipy import linalg

from common import fid
from common.fid import FeatureStats, frechet_distance, kid


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
    assert fid.fid_of_samples(x, y, x @ y.T) == pytest.approx(moments, rel=1e-7)


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
    for function in (fid.fid, lambda x, y: kid(x, y, seed=0)):
        with pytest.raises(ValueError, match="feature sizes differ"):
            function(np.ones((3, 2)), np.ones((3, 4)))
        with pytest.raises(ValueError, match="n of at least 2"):
            function(np.ones((1, 2)), np.ones((3, 2)))


def test_few_samples_are_biased_upward():
    few = fid.fid(normal(20, 64, 0), normal(20, 64, 1))
    many = fid.fid(normal(4000, 64, 0), normal(4000, 64, 1))
    assert few > 20 * many


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
