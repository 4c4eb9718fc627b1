"""How good a classifier is and whether two differ: point metrics with intervals, DeLong, corrections, equivalence.

`labels` are 0 (HC) and 1 (TLE), `scores` probabilities or logits, higher for TLE. AUC comparisons: DeLong et al. 1988
in the fast form of Sun & Xu 2014; Holm 1979; Benjamini & Hochberg 1995. Arithmetic is float64.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95
NAMES = ("accuracy", "auc_roc", "auc_pr", "ppv", "sensitivity", "specificity", "precision", "recall", "f1_score")


def _arrays(labels, scores) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels).astype(int).ravel(), np.asarray(scores, dtype=np.float64)
    if scores.shape[-1] != len(labels) or not np.isfinite(scores).all() or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"need labels 0 or 1 and as many finite scores, got {labels.shape} and {scores.shape}")
    if labels.min() == labels.max():
        raise ValueError(f"all {len(labels)} labels are {labels[0]}: no metric of two classes is defined")
    return labels, scores


# ---- one classifier


def counts(labels, scores, threshold: float) -> dict[str, int]:
    """TP, FP, TN, FN with `scores >= threshold` called TLE."""
    labels, scores = _arrays(labels, scores)
    called = scores >= threshold
    cells = {"tp": called & (labels == 1), "fp": called & (labels == 0)}
    cells |= {"tn": ~called & (labels == 0), "fn": ~called & (labels == 1)}
    return {name: int(cell.sum()) for name, cell in cells.items()}


def rates(tp: int, fp: int, tn: int, fn: int) -> dict[str, float]:
    """Accuracy, PPV (precision), sensitivity (recall), specificity and F1 of counts; 0 where nothing was called."""

    def share(part, whole):
        return part / whole if whole else 0.0

    ppv, sensitivity = share(tp, tp + fp), share(tp, tp + fn)
    return {
        "accuracy": share(tp + tn, tp + fp + tn + fn),
        "ppv": ppv,
        "sensitivity": sensitivity,
        "specificity": share(tn, tn + fp),
        "precision": ppv,
        "recall": sensitivity,
        "f1_score": share(2 * tp, 2 * tp + fp + fn),
    }


def youden_threshold(labels, scores) -> float:
    """First maximiser of sensitivity + specificity - 1 over the falling ROC thresholds; inf where none beats chance."""
    from sklearn.metrics import roc_curve  # slow to import

    fpr, tpr, thresholds = roc_curve(*_arrays(labels, scores))
    return float(thresholds[np.argmax(tpr - fpr)])


def average_precision(labels, scores) -> float:
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*_arrays(labels, scores)))


def evaluate(labels, scores, threshold: float) -> dict[str, float]:
    """Rates at `threshold`, AUC, average precision (auc_pr), and the Youden threshold of these very data.

    The last one looks at the labels it is judged on: a description, never to be used as a threshold.
    """
    found = rates(**counts(labels, scores, threshold))
    areas = {"auc_roc": float(auc(labels, scores)), "auc_pr": average_precision(labels, scores)}
    return found | areas | {"best_threshold": youden_threshold(labels, scores)}


def wilson(successes: int, n: int, level: float = LEVEL) -> list[float]:
    """Wilson score interval [low, high] of a proportion; nan without trials."""
    if n == 0:
        return [math.nan, math.nan]
    interval = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return [float(interval.low), float(interval.high)]


def intervals(labels_by_fold, scores_by_fold, threshold: float, *, seed: int, resamples: int) -> dict[str, list[float]]:
    """95 % intervals [low, high] of each metric's mean over folds (lists of one for a single test set).

    AUC: DeLong, fold by fold. Rates of a single test set: Wilson. Everything else: bootstrap within folds, stratified
    by class.
    """
    folds = [_arrays(labels, scores) for labels, scores in zip(labels_by_fold, scores_by_fold, strict=True)]
    drawn = []  # (folds, resamples, metrics)
    for number, (labels, scores) in enumerate(folds):
        draws = stratified_draws(labels, seed=(seed, number), resamples=resamples)
        drawn.append([[*rates(**counts(labels[i], scores[i], threshold)).values(),
                       average_precision(labels[i], scores[i])] for i in draws])  # fmt: skip
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    bounds = np.quantile(np.mean(drawn, axis=0), tails, axis=0).T.tolist()
    found = dict(zip((*rates(1, 1, 1, 1), "auc_pr"), bounds, strict=True))
    areas, covariance = delong_over_folds([y for y, _ in folds], [s[None] for _, s in folds])
    found["auc_roc"] = auc_interval(areas, covariance)[0][1:].tolist()
    if len(folds) == 1:
        c = counts(*folds[0], threshold)
        ppv, sensitivity = wilson(c["tp"], c["tp"] + c["fp"]), wilson(c["tp"], c["tp"] + c["fn"])
        found |= {"accuracy": wilson(c["tp"] + c["tn"], sum(c.values())), "ppv": ppv, "precision": ppv,
                  "sensitivity": sensitivity, "recall": sensitivity,
                  "specificity": wilson(c["tn"], c["tn"] + c["fp"])}  # fmt: skip
    return found


# ---- calibration


def fit_temperature(labels, logits) -> float:
    """Temperature T > 0 that minimises the log loss of sigmoid(logits / T) (Guo et al. 2017), within 0.05 and 20."""
    labels, logits = _arrays(labels, logits)
    found = optimize.minimize_scalar(lambda u: log_loss(labels, logits / math.exp(u)), bounds=np.log([0.05, 20]),
                                     method="bounded")  # fmt: skip
    return float(math.exp(found.x))


def log_loss(labels, logits) -> float:
    """Mean binary cross-entropy of logits."""
    signed = np.where(np.asarray(labels) == 1, logits, -np.asarray(logits, dtype=np.float64))
    return float(np.logaddexp(0, -signed).mean())


def calibration(labels, logits, bins: int = 10) -> dict[str, float]:
    """Log loss, Brier score, and expected calibration error over `bins` equal-width bins of the probability of TLE."""
    labels, logits = _arrays(labels, logits)
    p = 1 / (1 + np.exp(-logits))
    index = np.minimum((p * bins).astype(int), bins - 1)
    gaps = [abs((p - labels)[index == b].sum()) for b in range(bins)]
    return {"log_loss": log_loss(labels, logits), "brier": float(((p - labels) ** 2).mean()),
            "ece": float(sum(gaps) / len(labels))}  # fmt: skip


# ---- areas under the ROC curve and their differences


def delong(labels, scores) -> tuple[np.ndarray, np.ndarray]:
    """AUC (k,) and their covariance (k, k) of k score vectors (k, n) over the same n subjects; ties count half."""
    labels, scores = _arrays(labels, scores)
    positive, negative = scores[:, labels == 1], scores[:, labels == 0]  # (k, m), (k, n)
    m, n = positive.shape[1], negative.shape[1]
    rank = lambda x: stats.rankdata(x, axis=1)  # noqa: E731 - average ranks
    together = rank(np.concatenate([positive, negative], axis=1))
    areas = (together[:, :m].sum(1) / m - (m + 1) / 2) / n
    v10 = (together[:, :m] - rank(positive)) / n  # structural components, one per TLE subject
    v01 = 1 - (together[:, m:] - rank(negative)) / m  # one per HC subject
    with np.errstate(invalid="ignore", divide="ignore"):  # one subject in a class: nan
        covariance = np.atleast_2d(np.cov(v10)) / m + np.atleast_2d(np.cov(v01)) / n
    return areas, covariance


def auc(labels, scores) -> np.ndarray:
    """Rank-sum AUC of scores (n,) or (k, n)."""
    labels, scores = _arrays(labels, scores)
    m, n = int(labels.sum()), int((1 - labels).sum())
    ranks = stats.rankdata(scores, axis=-1)[..., labels == 1]
    return (ranks.sum(-1) - m * (m + 1) / 2) / (m * n)


def auc_interval(areas, covariance, level: float = LEVEL) -> np.ndarray:
    """Rows (standard error, lower, upper) of DeLong's normal interval, cut to [0, 1]."""
    se = np.sqrt(np.diag(covariance))
    half = stats.norm.ppf((1 + level) / 2) * se
    return np.stack([se, np.clip(areas - half, 0, 1), np.clip(areas + half, 0, 1)], axis=1)


def delong_over_folds(labels_by_fold: list, scores_by_fold: list) -> tuple[np.ndarray, np.ndarray]:
    """Mean AUC over folds and its covariance; every fold is judged by itself.

    Pooling scores of separately trained networks would compare their calibrations, too. With one fold: `delong`.
    """
    parts = [delong(labels, scores) for labels, scores in zip(labels_by_fold, scores_by_fold, strict=True)]
    k = len(parts)
    return sum(areas for areas, _ in parts) / k, sum(covariance for _, covariance in parts) / k**2


def difference(areas, covariance, i: int, j: int) -> tuple[float, float]:
    """AUC i minus AUC j and its standard error."""
    variance = covariance[i, i] + covariance[j, j] - 2 * covariance[i, j]
    return float(areas[i] - areas[j]), math.sqrt(max(float(variance), 0.0))


def z_test(delta: float, se: float) -> tuple[float, float]:
    """z and two-sided p of a difference; scores without any difference give 0 and 1."""
    if se < 1e-12:
        return (0.0, 1.0) if abs(delta) < 1e-12 else (math.copysign(math.inf, delta), 0.0)
    z = delta / se
    return z, float(2 * stats.norm.sf(abs(z)))


def holm(p_values) -> np.ndarray:
    """Holm's adjusted p values, in the given order."""
    p = np.asarray(p_values, dtype=np.float64)
    order, n = np.argsort(p, kind="stable"), p.size
    adjusted = np.empty(n)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * (n - np.arange(n))), 1)
    return adjusted


def benjamini_hochberg(p_values) -> np.ndarray:
    """Benjamini and Hochberg's adjusted p values, in the given order."""
    p = np.asarray(p_values, dtype=np.float64)
    order, n = np.argsort(p, kind="stable"), p.size
    adjusted = np.empty(n)
    scaled = p[order] * n / np.arange(1, n + 1)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return adjusted


def tost(delta: float, se: float, margin: float) -> tuple[float, float, float]:
    """Equivalence within +-margin: p (the larger one), p of "not below -margin", p of "not above +margin"."""
    if se < 1e-12:
        lower, upper = float(delta <= -margin), float(delta >= margin)
    else:
        lower, upper = float(stats.norm.sf((delta + margin) / se)), float(stats.norm.cdf((delta - margin) / se))
    return max(lower, upper), lower, upper


def non_inferiority(delta: float, se: float, margin: float) -> float:
    """One-sided p of "the first is worse by `margin` or more"."""
    return tost(delta, se, margin)[1]


def minimum_detectable_effect(se: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """AUC difference that a two-sided test at `alpha` finds with probability `power`, given the standard error."""
    return float((stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) * se)


def power_at(delta: float, se: float, alpha: float = 0.05) -> float:
    """Probability that a two-sided test at `alpha` finds a true difference `delta` (in its own direction)."""
    return float(stats.norm.cdf(abs(delta) / se - stats.norm.ppf(1 - alpha / 2))) if se > 0 else float(delta != 0)


def mcnemar(labels, called_a, called_b) -> tuple[int, int, float]:
    """Exact McNemar test of two sets of calls: only A right, only B right, two-sided binomial p."""
    labels = np.asarray(labels)
    right_a, right_b = np.asarray(called_a) == labels, np.asarray(called_b) == labels
    b, c = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
    return b, c, float(stats.binomtest(min(b, c), b + c).pvalue) if b + c else 1.0


def stratified_draws(labels, *, seed: int | tuple, resamples: int):
    """Index arrays of class-stratified bootstrap samples, TLE drawn before HC."""
    labels, rng = np.asarray(labels), np.random.default_rng(seed)
    members = [np.flatnonzero(labels == label) for label in (1, 0)]
    for _ in range(resamples):
        yield np.concatenate([rng.choice(part, len(part)) for part in members])


def bootstrap_auc(labels, scores, *, seed: int | tuple, resamples: int) -> np.ndarray:
    """AUC (resamples, k) of k score vectors, all on the same resampled subjects."""
    labels, scores = _arrays(labels, scores)
    return np.array([auc(labels[i], scores[..., i]) for i in stratified_draws(labels, seed=seed, resamples=resamples)])
