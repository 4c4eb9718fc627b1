"""Two sets of feature vectors compared: FID with intervals over subjects, KID, precision, recall, density, coverage.

Features are (n, d) arrays, one row per image or volume, of any network; arithmetic is float64 (common/fid.py).
"""

from __future__ import annotations

import numpy as np

from common.fid import fid, fid_of_samples, kid, pair

NEIGHBOURS = 5  # of precision, recall, density, coverage (Naeem et al. 2020)


def bootstrap_draws(n: int, resamples: int, *key: int) -> np.ndarray:
    """(resamples, n) row numbers drawn with replacement; one seed key gives the same subjects at every position."""
    return np.random.default_rng(key).integers(n, size=(resamples, n))


def fid_bootstrap(x, y, draws_x: np.ndarray, draws_y: np.ndarray) -> np.ndarray:
    """FID of each resampled pair of sets, (resamples,); the rows of `draws_*` number the resampled subjects."""
    x, y = pair(x, y)
    products = x @ y.T
    resampled = zip(draws_x, draws_y, strict=True)
    return np.array([fid_of_samples(x[i], y[j], products[np.ix_(i, j)]) for i, j in resampled])


def small_sample_warning(n: int, dim: int) -> str:
    """What must stand beside an FID of n samples and d features; empty where n is large enough."""
    if n > dim:
        return ""
    return (f"n = {n} is not above the {dim} features: the covariances are singular and FID is biased upward; compare "
            "with the real-vs-real baseline or sets of the same n only, and prefer KID")  # fmt: skip


# ---- fidelity and diversity apart


def neighbourhood_metrics(real, fake, k: int = NEIGHBOURS) -> dict[str, float]:
    """precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020), nn_accuracy.

    precision: share of fakes inside some real sample's ball (up to its k-th real neighbour); density: how many such
    balls hold a fake, over k; recall: share of reals inside some fake's ball; coverage: share of reals whose ball
    holds a fake. nn_accuracy: how often the nearest other sample is of one's own set (Lopez-Paz & Oquab 2017; mean of
    both sets, ties count half): 0.5 where they cannot be told apart, 1 where they can. k is at most the smaller set
    minus 1.
    """
    real, fake = pair(real, fake)
    k = min(k, len(real) - 1, len(fake) - 1)
    between = distances(real, fake)  # (n_real, n_fake)
    sorted_real, sorted_fake = (np.sort(distances(x, x), axis=1) for x in (real, fake))  # column 0: the sample itself
    radius_real, radius_fake = sorted_real[:, k], sorted_fake[:, k]
    gaps = (between.min(1) - sorted_real[:, 1], between.min(0) - sorted_fake[:, 1])  # > 0: the nearest is of one's own
    in_real = between <= radius_real[:, None]
    return {
        "precision": float(in_real.any(0).mean()),
        "recall": float((between <= radius_fake).any(1).mean()),
        "density": float(in_real.sum(0).mean() / k),
        "coverage": float(in_real.any(1).mean()),
        "nn_accuracy": float(np.mean([np.sign(gap).mean() for gap in gaps]) / 2 + 0.5),
    }


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean squared difference over the features of every pair, (n, m) float64; exact 0 for equal rows."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    shift = y.mean(0)  # small norms cancel less
    x, y = x - shift, y - shift
    squared = (x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * x @ y.T
    small = squared < 1e-9 * ((x * x).sum(1)[:, None] + (y * y).sum(1))  # what cancellation leaves there is noise
    for i, j in zip(*np.nonzero(small), strict=True):
        squared[i, j] = ((x[i] - y[j]) ** 2).sum()
    return squared / x.shape[1]


# ---- all of it


def compare_sets(real, fake, *, seed: int, draws: tuple[np.ndarray, np.ndarray] | None = None) -> dict:
    """fid, kid, kid_se and the neighbourhood metrics of two sets; with `draws` also `fid_resampled`, an array."""
    value, error = kid(real, fake, seed=seed)
    result = {"fid": fid(real, fake), "kid": value, "kid_se": error, **neighbourhood_metrics(real, fake)}
    if draws is not None:
        result["fid_resampled"] = fid_bootstrap(real, fake, *draws)
    return result
