"""FID and KID: distances between two sets of feature vectors.

Features are (n, d) arrays, one row per image or volume, of any network; arithmetic is float64. FID is biased upward
where n is not well above d, and its covariances are singular for n <= d: it is then comparable only between sets of
one size, beside the distance of real to real. KID has no such bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


def checked(features, name: str = "features", least: int = 2) -> np.ndarray:
    """Features (array or tensor) as float64 (n, d); ValueError unless finite and n of at least `least`."""
    features = features.detach().cpu() if hasattr(features, "detach") else features  # a tensor
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < least:
        raise ValueError(f"{name} must be (n, d) with n of at least {least}, got {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError(f"{name} have NaN or infinite values")
    return features


def pair(x, y) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features, `checked` and of one width."""
    x, y = checked(x, "real features"), checked(y, "other features")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"feature sizes differ: {x.shape[1]} and {y.shape[1]}")
    return x, y


@dataclass
class FeatureStats:
    """Mean and scatter of feature vectors in float64, taken in batch by batch: memory d², whatever n is."""

    n: int = 0
    mean: np.ndarray | None = None  # (d,)
    scatter: np.ndarray | None = None  # (d, d), sum of outer products of deviations

    def update(self, features) -> FeatureStats:
        """Take in a batch (B, d) of any size, arrays or tensors; ValueError unless finite and of one width."""
        batch = checked(features, least=1)
        mean = batch.mean(0)
        return self.merge(FeatureStats(len(batch), mean, (batch - mean).T @ (batch - mean)))

    def merge(self, other: FeatureStats) -> FeatureStats:
        """Take in what another one has seen (Chan et al. 1979: no cancellation, unlike sums of squares)."""
        if not other.n:
            return self
        if not self.n:
            self.n, self.mean, self.scatter = other.n, other.mean.copy(), other.scatter.copy()
            return self
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"feature sizes differ: {self.mean.size} and {other.mean.size}")
        n, shift = self.n + other.n, other.mean - self.mean
        self.scatter += other.scatter + np.outer(shift, shift) * (self.n * other.n / n)
        self.mean = self.mean + shift * (other.n / n)
        self.n = n
        return self

    @property
    def covariance(self) -> np.ndarray:
        """(d, d), unbiased (n - 1)."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, got {self.n}")
        return self.scatter / (self.n - 1)


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """Squared Fréchet distance of two Gaussians: |m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½), Heusel et al. 2017.

    The trace of the root is the sum of the singular values of C_a^½ C_b^½, so singular covariances need no offset on
    the diagonal and no complex part is dropped.
    """
    if a.mean is None or b.mean is None or a.mean.shape != b.mean.shape:
        raise ValueError("Fréchet distance needs two sets of features of one size")
    cov_a, cov_b = a.covariance, b.covariance
    root = np.linalg.svd(_symmetric_root(cov_a) @ _symmetric_root(cov_b), compute_uv=False).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def fid(x, y) -> float:
    """Fréchet distance of features (n, d) and (m, d), by way of whichever matrices are smaller.

    With C_a = A'A (A: centred rows over sqrt(n - 1)) the trace of the root is the sum of the singular values of A B',
    n x m numbers instead of d x d.
    """
    x, y = pair(x, y)
    if min(len(x), len(y)) > x.shape[1]:
        return frechet_distance(FeatureStats().update(x), FeatureStats().update(y))
    return fid_of_samples(x, y, x @ y.T)


def fid_of_samples(x: np.ndarray, y: np.ndarray, products: np.ndarray) -> float:
    """FID from samples and their products x y' (n, m), which centring turns into those of the deviations."""
    n, m = products.shape
    centred = products - products.mean(0) - products.mean(1, keepdims=True) + products.mean()
    root = np.linalg.svd(centred, compute_uv=False).sum() / np.sqrt((n - 1) * (m - 1))
    traces = x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + traces - 2 * root)


def normal_interval(value: float, resampled: np.ndarray) -> list[float] | None:
    """95 % interval value ± 1.96 SD of the resampled values (from 0 on); None with fewer than 2 resamples.

    Percentiles would not do: a resample repeats subjects, so its FID lies above the one it is drawn for.
    """
    if len(resampled) < 2:
        return None
    half = 1.96 * float(np.std(resampled, ddof=1))
    return [max(0.0, value - half), value + half]


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x'y / d + 1)³, Bińkowski et al. 2018."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid(x, y, *, seed: int, subsets: int = KID_SUBSETS, subset_size: int = KID_SUBSET_SIZE) -> tuple[float, float]:
    """Unbiased squared MMD of the polynomial kernel over all pairs, and its standard error.

    The error comes from random subsets without replacement, of `subset_size` or half the smaller set: their standard
    deviation, scaled from their size to the sets'. It may be negative; 0 is no difference.
    """
    x, y = pair(x, y)
    kernels = polynomial_kernel(x, x), polynomial_kernel(y, y), polynomial_kernel(x, y)
    value = _mmd2(*kernels)
    n = min(len(x), len(y))
    size = min(subset_size, n // 2)
    if size < 2 or subsets < 2:
        return value, float("nan")
    rng, values = np.random.default_rng((seed, len(x), len(y))), []
    for _ in range(subsets):
        i, j = rng.choice(len(x), size, replace=False), rng.choice(len(y), size, replace=False)
        xx, yy, xy = (k[np.ix_(a, b)] for k, (a, b) in zip(kernels, ((i, i), (j, j), (i, j)), strict=True))
        values.append(_mmd2(xx, yy, xy))
    return value, float(np.std(values, ddof=1) * np.sqrt(size / n))


def _mmd2(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> float:
    n, m = xy.shape
    within_x = (xx.sum() - np.trace(xx)) / (n * (n - 1))
    within_y = (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within_x + within_y - 2 * xy.mean())
