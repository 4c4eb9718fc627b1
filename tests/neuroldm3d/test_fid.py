"""Sets of features compared: precision and recall, intervals over subjects, all measures together."""

import numpy as np
import pytest

from common.fid import kid, normal_interval
from neuroldm3d.diffusion import fid


def normal(n, d, seed, shift=0.0, scale=1.0):
    return shift + scale * np.random.default_rng(seed).standard_normal((n, d))


def test_small_samples_say_so():
    assert "n = 20 is not above the 64 features" in fid.small_sample_warning(20, 64)
    assert fid.small_sample_warning(64, 64) and not fid.small_sample_warning(65, 64)


def test_unusable_features_are_refused():
    with pytest.raises(ValueError, match="feature sizes differ"):
        fid.neighbourhood_metrics(np.ones((3, 2)), np.ones((3, 4)))
    with pytest.raises(ValueError, match="n of at least 2"):
        fid.neighbourhood_metrics(np.ones((1, 2)), np.ones((3, 2)))


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
        low, high = normal_interval(value, fid.fid_bootstrap(x, y, *draws))
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
    assert normal_interval(1.0, found[:1]) is None
    assert normal_interval(0.1, np.array([0.0, 5.0]))[0] == 0  # a distance


def test_all_measures_together():
    real, fake = normal(30, 6, 0), normal(30, 6, 1, 0.5)
    found = fid.compare_sets(real, fake, seed=0)
    assert found["fid"] == fid.fid(real, fake) and (found["kid"], found["kid_se"]) == kid(real, fake, seed=0)
    assert "fid_resampled" not in found
    draws = fid.bootstrap_draws(30, 4, 0), fid.bootstrap_draws(30, 4, 1)
    assert len(fid.compare_sets(real, fake, seed=0, draws=draws)["fid_resampled"]) == 4
