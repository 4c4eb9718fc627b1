"""Metrics, intervals, calibration, DeLong and what is done with its p values; closed forms and brute force."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from neuroldm3d.classifier import metrics


def draw(n=60, k=None, seed=0, signal=0.7):
    """Labels and scores with ties."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.55).astype(int)
    return labels, (signal * labels + rng.standard_normal((k, n) if k else n)).round(1)


# ---- one classifier


def test_counts_of_the_published_run():
    """Fact 31: the counts behind real_2723_syn_50."""
    rates = metrics.rates(tp=155, fp=25, tn=103, fn=20)
    expected = {"accuracy": 0.8515, "sensitivity": 0.8857, "specificity": 0.8047, "ppv": 0.8611, "f1_score": 0.8732}
    assert {name: round(rates[name], 4) for name in expected} == expected
    assert rates["precision"] == rates["ppv"] and rates["recall"] == rates["sensitivity"]
    labels = np.repeat([1, 0, 0, 1], (155, 25, 103, 20))
    scores = np.repeat([0.5, 0.9, 0.1, 0.499], (155, 25, 103, 20))  # 0.5 counts as TLE
    assert metrics.counts(labels, scores, 0.5) == {"tp": 155, "fp": 25, "tn": 103, "fn": 20}
    assert metrics.rates(**metrics.counts(labels, scores, 0.5)) == rates


def test_nothing_called_gives_zero_and_no_nan():
    rates = metrics.rates(tp=0, fp=0, tn=5, fn=3)
    assert rates["ppv"] == rates["f1_score"] == rates["sensitivity"] == 0 and rates["accuracy"] == 5 / 8


def test_points_agree_with_scikit_learn():
    labels, scores = draw()
    found = metrics.evaluate(labels, scores, 0.3)
    assert found["auc_roc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert found["auc_pr"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert set(metrics.NAMES) < set(found)
    best = found["best_threshold"]
    rates = [metrics.rates(**metrics.counts(labels, scores, t)) for t in (best, *np.unique(scores))]
    youden = [r["sensitivity"] + r["specificity"] for r in rates]
    assert youden[0] == pytest.approx(max(youden))


def test_youden_threshold_of_useless_scores_is_infinite():
    labels = np.array([1, 0, 1, 0])
    assert metrics.youden_threshold(labels, np.zeros(4)) == math.inf
    assert metrics.youden_threshold(labels, -labels.astype(float)) == math.inf


@pytest.mark.parametrize("labels, scores", [([1, 1], [0.1, 0.2]), ([0, 1], [0.1, math.nan]), ([0, 1, 1], [0.1, 0.2]),
                                            ([0, 2], [0.1, 0.2])])  # fmt: skip
def test_unusable_input_is_refused(labels, scores):
    with pytest.raises(ValueError):
        metrics.evaluate(labels, scores, 0.5)


def test_wilson_interval_of_a_textbook_case():
    assert metrics.wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    low, high = metrics.wilson(10, 10)
    assert high == 1 and 0.7 < low < 0.75
    assert all(map(math.isnan, metrics.wilson(0, 0)))


def test_intervals_contain_the_value_and_cover_the_truth():
    labels, scores = draw(200)
    point = metrics.evaluate(labels, scores, 0.3)
    found = metrics.intervals([labels], [scores], 0.3, seed=0, resamples=300)
    assert set(found) == set(metrics.NAMES)
    assert all(low < point[name] < high for name, (low, high) in found.items())
    assert found == metrics.intervals([labels], [scores], 0.3, seed=0, resamples=300)
    truth = stats.norm.cdf(0.7 / math.sqrt(2))  # AUC of two unit normals 0.7 apart
    covered = 0
    for seed in range(100):
        labels, scores = draw(120, seed=seed)
        low, high = metrics.auc_interval(*metrics.delong(labels, scores[None]))[0][1:]
        covered += low <= truth <= high
    assert 88 <= covered <= 100


def test_intervals_over_folds_are_those_of_the_mean():
    folds = [draw(80, seed=seed) for seed in range(3)]
    labels, scores = ([fold[i] for fold in folds] for i in range(2))
    found = metrics.intervals(labels, scores, 0.3, seed=0, resamples=200)
    values = [metrics.evaluate(*fold, 0.3) for fold in folds]
    for name, (low, high) in found.items():
        assert low < np.mean([row[name] for row in values]) < high
        one = metrics.intervals(labels[:1], scores[:1], 0.3, seed=0, resamples=200)[name]
        assert high - low < one[1] - one[0]  # three times the subjects


# ---- calibration


def test_temperature_is_found_and_calibrates():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, 4000)
    labels = (rng.random(4000) < 1 / (1 + np.exp(-logits))).astype(int)
    found = metrics.fit_temperature(labels, 3 * logits)
    assert found == pytest.approx(3, rel=0.1)
    raw, scaled = metrics.calibration(labels, 3 * logits), metrics.calibration(labels, 3 * logits / found)
    assert all(scaled[name] < raw[name] for name in raw)
    assert scaled["ece"] < 0.02


def test_log_loss_is_cross_entropy_and_stable():
    labels, logits = np.array([1, 0, 1]), np.array([0.3, -2.0, 4.0])
    p = 1 / (1 + np.exp(-logits))
    expected = -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    assert metrics.log_loss(labels, logits) == pytest.approx(expected, rel=1e-12)
    assert metrics.log_loss(np.array([0, 1]), np.array([1000.0, -1000.0])) == 1000


# ---- DeLong


def test_delong_auc_is_the_rank_sum_auc():
    """Fact 34: to 1e-9, ties included."""
    labels, scores = draw(80, k=3)
    areas, _ = metrics.delong(labels, scores)
    u = [stats.mannwhitneyu(s[labels == 1], s[labels == 0]).statistic for s in scores]
    assert areas == pytest.approx(np.array(u) / (labels.sum() * (1 - labels).sum()), abs=1e-9)
    assert areas == pytest.approx([roc_auc_score(labels, s) for s in scores], abs=1e-9)
    assert metrics.auc(labels, scores) == pytest.approx(areas, abs=1e-12)
    assert metrics.auc(labels, scores[0]) == pytest.approx(areas[0], abs=1e-12)


def test_delong_covariance_by_its_definition():
    """Structural components pair by pair, DeLong et al. 1988, eq. 4 to 6."""
    labels, scores = draw(40, k=2, seed=3)
    positive, negative = scores[:, labels == 1], scores[:, labels == 0]
    kernel = (np.sign(positive[:, :, None] - negative[:, None, :]) + 1) / 2
    v10, v01 = kernel.mean(2), kernel.mean(1)
    expected = np.cov(v10) / positive.shape[1] + np.cov(v01) / negative.shape[1]
    assert metrics.delong(labels, scores)[1] == pytest.approx(expected, abs=1e-12)


def test_identical_scores_give_p_1():
    """Fact 34."""
    labels, scores = draw()
    areas, covariance = metrics.delong(labels, np.stack([scores, scores]))
    assert metrics.z_test(*metrics.difference(areas, covariance, 0, 1)) == (0.0, 1.0)


def test_delong_p_values_are_uniform_under_the_null():
    p = []
    for seed in range(300):
        labels, scores = draw(100, k=2, seed=seed)
        p.append(metrics.z_test(*metrics.difference(*metrics.delong(labels, scores), 0, 1))[1])
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.09


def test_folds_are_judged_one_by_one():
    """A shift of one fold's scores, as another network's calibration gives, changes pooled AUC and not ours."""
    folds = [draw(60, k=2, seed=seed) for seed in range(3)]
    labels, scores = [fold[0] for fold in folds], [fold[1] for fold in folds]
    areas, covariance = metrics.delong_over_folds(labels, scores)
    shifted = [s + 5 * i for i, s in enumerate(scores)]
    again, _ = metrics.delong_over_folds(labels, shifted)
    assert again == pytest.approx(areas, abs=1e-12)
    pooled = [metrics.auc(np.concatenate(labels), np.concatenate(s, axis=1)) for s in (scores, shifted)]
    assert not np.allclose(pooled[0], pooled[1], atol=0.01)
    assert covariance == pytest.approx(sum(metrics.delong(*fold)[1] for fold in folds) / 9, abs=1e-15)
    one = metrics.delong_over_folds(labels[:1], scores[:1])
    assert np.array_equal(one[1], metrics.delong(*folds[0])[1])


# ---- many comparisons, equivalence, power


def test_corrections_match_values_worked_out_by_hand():
    """Fact 34: Holm and Benjamini-Hochberg on a list of five."""
    p = [0.01, 0.04, 0.03, 0.005, 0.5]
    assert metrics.holm(p) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.5], abs=1e-12)
    assert metrics.benjamini_hochberg(p) == pytest.approx([0.025, 0.05, 0.05, 0.025, 0.5], abs=1e-12)
    assert metrics.holm([0.9, 0.8]).tolist() == [1, 1] and metrics.holm([]).size == 0
    assert metrics.benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p), abs=1e-12)


def test_equivalence_and_non_inferiority():
    assert metrics.tost(0.0, 0.01, 0.05)[0] == pytest.approx(stats.norm.sf(5))
    largest, lower, upper = metrics.tost(0.05, 0.02, 0.05)
    assert (largest, upper) == (0.5, 0.5) and lower == pytest.approx(stats.norm.sf(5))
    assert metrics.non_inferiority(0.05, 0.02, 0.05) == lower
    assert metrics.tost(0.0, 0.0, 0.05) == (0.0, 0.0, 0.0) and metrics.tost(-0.1, 0.0, 0.05)[0] == 1.0


def test_the_minimum_detectable_effect_has_its_power():
    effect = metrics.minimum_detectable_effect(0.03, alpha=0.05, power=0.8)
    assert metrics.power_at(effect, 0.03) == pytest.approx(0.8)
    z = np.random.default_rng(0).normal(effect / 0.03, 1, 20000)
    assert (np.abs(z) > stats.norm.ppf(0.975)).mean() == pytest.approx(0.8, abs=0.01)


def test_mcnemar_counts_disagreements_only():
    labels = np.array([1] * 6 + [0] * 4)
    a, b = labels.copy(), labels.copy()
    b[:5] = 0
    a[9] = 1
    assert metrics.mcnemar(labels, a, b) == (5, 1, pytest.approx(stats.binomtest(1, 6).pvalue))
    assert metrics.mcnemar(labels, labels, labels) == (0, 0, 1.0)


def test_bootstrap_keeps_classes_and_pairs():
    labels, scores = draw(60, k=2)
    draws = list(metrics.stratified_draws(labels, seed=1, resamples=5))
    assert all(labels[i].sum() == labels.sum() for i in draws)
    found = metrics.bootstrap_auc(labels, scores, seed=1, resamples=5)
    assert found[2, 1] == pytest.approx(roc_auc_score(labels[draws[2]], scores[1][draws[2]]))
