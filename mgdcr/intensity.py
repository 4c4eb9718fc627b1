"""Intensities: short-axis cines to the [-1, 1] of the prior and back, long-axis views to the same contrast.

Statistics come from the pixels that count (a mask, the intersection lines), never from empty space around them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from common.cli import UserError

PERCENTILES = (0.5, 99.5)
LEGACY = (None, 98.0)  # the original: 0 and the 98th percentile
GAINS = (0.1, 10.0)  # beyond these a fit is nonsense: two views of one scanner differ less
MIN_POINTS = 8


@dataclass(frozen=True)
class Scale:
    """Linear map of acquired intensities: `low` is -1 and `high` is 1."""

    low: float
    high: float

    def normalise(self, stack: np.ndarray, *, clip: bool = True) -> np.ndarray:
        """Acquired intensities as float32 in [-1, 1]; without `clip` beyond it where they are beyond the limits."""
        out = (np.asarray(stack, dtype=np.float64) - self.low) / (self.high - self.low) * 2 - 1
        return (np.clip(out, -1, 1) if clip else out).astype(np.float32)

    def restore(self, stack: np.ndarray) -> np.ndarray:
        """[-1, 1] as acquired intensities, float32."""
        return ((np.asarray(stack, dtype=np.float64) + 1) / 2 * (self.high - self.low) + self.low).astype(np.float32)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def of(cls, stack: np.ndarray, mask=None, percentiles=PERCENTILES, where: str = "the image") -> Scale:
        """Limits by percentiles (a lower one of None: 0) of the finite voxels, or of those inside `mask`.

        UserError naming `where` if nothing is left or all of it is one value.
        """
        stack = np.asarray(stack)
        usable = np.isfinite(stack) if mask is None else np.isfinite(stack) & mask
        values = stack[usable].astype(np.float64)
        if not values.size:
            raise UserError(f"no finite voxel, {where}, check the file and its mask")
        low, high = percentiles
        low, high = 0.0 if low is None else float(np.percentile(values, low)), float(np.percentile(values, high))
        if high <= low:  # mostly background: the full range, then
            low, high = min(low, float(values.min())), float(values.max())
        if high <= low:
            raise UserError(f"every voxel is {high:g}, {where}, check that it holds an image")
        return cls(low, high)


def normalise(stack: np.ndarray, mask=None, percentiles=PERCENTILES, where: str = "the image"):
    """`stack` in [-1, 1] (float32, NaN as -1) and its Scale; the parameters as in `Scale.of`."""
    scale = Scale.of(stack, mask, percentiles, where)
    return scale.normalise(np.nan_to_num(stack, nan=scale.low, posinf=scale.high, neginf=scale.low)), scale


def gain_offset(prediction: np.ndarray, target: np.ndarray, weights=None) -> tuple[float, float]:
    """Closed-form a, b of the weighted least squares |a * prediction + b - target|^2, arrays of one shape.

    Too few points, a flat prediction or a gain out of range leave gain 1 and the difference of the means.
    """
    p, g = np.ravel(prediction).astype(np.float64), np.ravel(target).astype(np.float64)
    w = np.ones_like(p) if weights is None else np.ravel(weights).astype(np.float64)
    use = np.isfinite(p) & np.isfinite(g) & (w > 0)
    p, g, w = p[use], g[use], w[use]
    if not len(p):
        return 1.0, 0.0
    mean_p, mean_g = np.average(p, weights=w), np.average(g, weights=w)
    variance = np.average((p - mean_p) ** 2, weights=w)
    gain = np.average((p - mean_p) * (g - mean_g), weights=w) / variance if variance > 1e-12 else 0.0
    if len(p) < MIN_POINTS or not GAINS[0] <= gain <= GAINS[1]:
        gain = 1.0
    return float(gain), float(mean_g - gain * mean_p)


def robust_gain_offset(prediction: np.ndarray, target: np.ndarray, rounds: int = 5) -> tuple[float, float]:
    """`gain_offset` despite outliers: points that fit worse than 2.5 robust SD (motion, edges) lose their say."""
    prediction, target = np.ravel(prediction), np.ravel(target)
    keep = np.isfinite(prediction) & np.isfinite(target)
    gain, offset = gain_offset(prediction, target, keep)
    for _ in range(rounds):
        residual = np.abs(gain * prediction + offset - target)
        limit = 2.5 * 1.4826 * np.median(residual[keep]) if keep.any() else 0.0
        closer = keep & (residual <= limit)
        if limit <= 0 or closer.sum() < MIN_POINTS:
            break
        gain, offset = gain_offset(prediction, target, closer)
    return gain, offset
