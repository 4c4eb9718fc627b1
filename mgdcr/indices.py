"""Clinical indices of a cine from label maps, the phases of the cycle, and agreement of two methods.

Labels are those of make_phantom.py: 1 left cavity, 2 myocardium, 3 right cavity. Volumes in ml, mass in g, EF as a
fraction of the end-diastolic volume.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

LABELS = {"lv": 1, "myo": 2, "rv": 3}
DENSITY = 1.05  # g per ml of myocardium
CODES = np.array([0, *LABELS.values()])


def volumes_ml(labels: np.ndarray, spacing_mm) -> dict[str, np.ndarray]:
    """Volume of every label per frame: labels (T, Z, H, W) or (Z, H, W), voxel size along three axes in any order.

    Of a sparse stack with the slice spacing in it this is Simpson's rule of slice sums.
    """
    labels = labels[None] if labels.ndim == 3 else labels
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    return {name: (labels == code).sum((1, 2, 3)) * voxel_ml for name, code in LABELS.items()}


def phases(cavity_ml: np.ndarray) -> tuple[int, int]:
    """End-diastolic and end-systolic frame: the largest and smallest of the curve, smoothed over the closed cycle."""
    curve = np.asarray(cavity_ml, dtype=np.float64)
    if len(curve) > 4:
        curve = ndimage.convolve1d(curve, [0.25, 0.5, 0.25], mode="wrap")
    return int(curve.argmax()), int(curve.argmin())


def function(labels: np.ndarray, spacing_mm) -> dict[str, float]:
    """EDV, ESV, SV (ml), EF, LV mass at end-diastole (g), RV volumes, and the frames that were found."""
    curves = volumes_ml(labels, spacing_mm)
    ed, es = phases(curves["lv"])
    out = {"ed_frame": ed, "es_frame": es, "mass_g": DENSITY * float(curves["myo"][ed])}
    for prefix, curve in (("", curves["lv"]), ("rv_", curves["rv"])):
        edv, esv = float(curve[ed]), float(curve[es])
        ef = (edv - esv) / edv if edv > 0 else math.nan
        out |= {f"{prefix}edv_ml": edv, f"{prefix}esv_ml": esv, f"{prefix}sv_ml": edv - esv, f"{prefix}ef": ef}
    return out


def bland_altman(ours, reference) -> dict[str, float]:
    """Bias (ours - reference), its SD (n - 1) and 95 % limits of agreement of paired values; ValueError if unpaired."""
    ours, reference = np.asarray(ours, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if ours.shape != reference.shape or ours.ndim != 1 or not len(ours):
        raise ValueError(f"Bland-Altman needs two equally long lists, got {ours.shape} and {reference.shape}")
    difference = ours - reference
    sd = float(difference.std(ddof=1)) if len(difference) > 1 else math.nan
    bias = float(difference.mean())
    return {"n": len(difference), "bias": bias, "sd": sd, "low": bias - 1.96 * sd, "high": bias + 1.96 * sd}


# ---- labels of a reconstruction -------------------------------------------------------------------------------------


def interpolate_labels(labels: np.ndarray, factor: int) -> np.ndarray:
    """Dense labels (N, H, W) of a stack (Z, H, W): indicators of the classes linearly between slices, the largest."""
    from mgdcr.baselines import interpolate

    scores = np.stack([interpolate((labels == code).astype(np.float32), factor, "linear") for code in CODES])
    return CODES[scores.argmax(0)].astype(labels.dtype)


def transport_labels(volume: np.ndarray, stack: np.ndarray, labels: np.ndarray, factor: int, *, weight: float = 2.0,
                     smooth: float = 0.6) -> np.ndarray:  # fmt: skip
    """Dense labels (N, H, W) of a reconstruction from those of the acquired slices: a simple segmenter.

    Every class has the intensities it has in the two acquired slices around, and the place that signed distances to its
    outline give between them; a voxel takes the class that fits both best. Of a plain interpolation this is not worse
    than interpolated outlines; of a volume whose walls moved it follows the walls.
    """
    depth = len(volume)
    distances = np.stack([[signed_distance(part == code) for part in labels] for code in CODES])
    out = np.empty(volume.shape, labels.dtype)
    smoothed = ndimage.gaussian_filter(volume, (0, smooth, smooth))
    for k in range(depth):
        low, share = divmod(k, factor)
        high = min(low + 1, len(labels) - 1)
        share /= factor
        scores = []
        for c, code in enumerate(CODES):
            place = (1 - share) * distances[c, low] + share * distances[c, high]
            values = np.concatenate([stack[i][labels[i] == code] for i in (low, high)])
            if not len(values):
                scores.append(np.full(volume.shape[1:], -np.inf))
                continue
            middle, spread = np.median(values), max(1.4826 * np.median(np.abs(values - np.median(values))), 0.05)
            fit = np.minimum(np.abs(smoothed[k] - middle) / spread, 3.0)
            scores.append(np.clip(place, -6, 6) - weight * fit)
        out[k] = CODES[np.argmax(scores, 0)]
    out[::factor] = labels
    return out


def signed_distance(mask: np.ndarray) -> np.ndarray:
    """Pixels to the outline of a mask (H, W), positive inside; of an empty mask as far outside as the image is wide."""
    if not mask.any():
        return np.full(mask.shape, -float(max(mask.shape)))
    inside, outside = ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(~mask)
    return np.where(mask, inside - 0.5, 0.5 - outside)
