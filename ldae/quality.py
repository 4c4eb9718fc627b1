"""What a volume shows without any network: size of the ventricles, where an edit changed it, signs of bad input.

All functions take prepared volumes (D, H, W) in RAS+ order with bright tissue about 1 (ldae/preprocess.py).
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from ldae.preprocess import head_mask

# The ventricles lie in an ellipsoid of these radii (mm), a little in front of and above the brain's centre of mass.
VENTRICLE_OFFSET_MM, VENTRICLE_RADII_MM = np.array([0.0, 3.0, 3.0]), np.array([30.0, 46.0, 24.0])
FLUID, TISSUE = 0.15, 0.60  # values relative to white matter: all fluid, none (grey matter)
BINS, RANGE = 64, (0.0, 1.5)  # of intensity histograms
SHELL_MM = (6.0, 14.0)  # depths under the surface between which a skull is dark and a brain is not
SKULL_SHARE, SKULL_ML = 0.10, 2200.0  # IXI with skull: 0.29 to 0.37, 3480 to 4350 ml; stripped: below 0.03, 1500 ml
DARK = 0.25


def white_level(volume: np.ndarray) -> float:
    """Value of bright tissue, white matter in T1: 90th percentile of what is not dark; NaN if all is dark."""
    bright = volume[volume > 0.3]
    return float(np.percentile(bright, 90)) if bright.size else float("nan")


def central_region(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """(D, H, W) bool: the ellipsoid about the ventricles, placed by the brain's centre of mass and the voxel size."""
    brain = volume > 0.1
    if not brain.any():
        return np.zeros(volume.shape, bool)
    linear = np.asarray(affine, np.float64)[:3, :3]
    centre = np.array(ndimage.center_of_mass(brain))
    away = np.moveaxis(np.indices(volume.shape), 0, -1) - centre  # voxels
    mm = away @ linear.T - VENTRICLE_OFFSET_MM
    return ((mm / VENTRICLE_RADII_MM) ** 2).sum(-1) < 1


def ventricle_ml(volume: np.ndarray, affine: np.ndarray, region: np.ndarray | None = None) -> float:
    """Fluid in the middle of a skull-stripped brain in ml: the sum of dark fractions inside `central_region`.

    A voxel counts fully below 0.15 of white matter, not at all above 0.60, in proportion between. On the phantom it
    follows the true ventricles with r = 0.97 (6 mm and 3 mm voxels), 0.95 to 0.96 after a blur of sigma 3 mm and 0.91
    to 0.93 of 4.8 mm; slope 0.65 to 0.68 ml per ml, 0.5 and 0.2 when blurred: compare volumes of one sharpness only.
    region: one region for several pictures of a head, by default that of `volume`. NaN for an all-dark volume.
    """
    volume = np.asarray(volume, np.float32)
    region = central_region(volume, affine) if region is None else region
    fluid = np.clip((TISSUE - volume[region] / white_level(volume)) / (TISSUE - FLUID), 0, 1)
    return float(fluid.sum(dtype=np.float64) * voxel_ml(affine)) if fluid.size else float("nan")


def voxel_ml(affine: np.ndarray) -> float:
    """Volume of a voxel in ml."""
    return abs(float(np.linalg.det(np.asarray(affine, np.float64)[:3, :3]))) / 1000


def change_outside(original: np.ndarray, edited: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Mean absolute change inside and outside a mask (D, H, W), and the share of the whole change that is outside.

    An edit of the brain should leave the rest alone: outside 0, share 0. NaN where a part is empty or nothing changed.
    """
    change, mask = np.abs(np.asarray(edited, np.float64) - np.asarray(original, np.float64)), np.asarray(mask) > 0
    total = change.sum()
    inside, outside = (float(part.mean()) if part.size else float("nan") for part in (change[mask], change[~mask]))
    share = float(change[~mask].sum() / total) if total > 0 else float("nan")
    return {"inside": inside, "outside": outside, "share_outside": share}


# ---- signs of bad input


def skull_signs(volume: np.ndarray, spacing_mm) -> dict[str, float | bool]:
    """head_ml, dark_shell (share of dark voxels 6 to 14 mm under the surface), and whether they speak of a skull.

    Bone is dark under bright scalp; a stripped brain is bright at that depth. dark_shell is NaN for a tiny head.
    """
    head = head_mask(volume)
    depth = ndimage.distance_transform_edt(np.pad(head, 1), sampling=spacing_mm)[1:-1, 1:-1, 1:-1]
    shell = volume[(depth > SHELL_MM[0]) & (depth <= SHELL_MM[1])]
    dark = float((shell < DARK).mean()) if shell.size else float("nan")
    ml = float(head.sum() * np.prod(spacing_mm) / 1000)
    return {"head_ml": ml, "dark_shell": dark, "skull": bool(dark > SKULL_SHARE or ml > SKULL_ML)}


def cut_off(head: np.ndarray) -> list[str]:
    """Borders of the field of view (D, H, W) that the head touches: left, right, posterior, ... of RAS+ axes."""
    names = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))
    return [names[axis][end] for axis in range(3) for end in (0, 1) if head.take(-end, axis).any()]


def histogram(volume: np.ndarray) -> np.ndarray:
    """(64,) share of the non-zero voxels in bins of 0 to 1.5, the last with all above."""
    values = np.clip(volume[volume > 0], *RANGE)
    counts = np.histogram(values, BINS, RANGE)[0]
    return counts / max(counts.sum(), 1)


def histogram_outliers(histograms: np.ndarray, z: float = 5.0, least: float = 0.03) -> tuple[np.ndarray, np.ndarray]:
    """(distance, whether an outlier) of each of (n, 64) histograms to their median.

    Distance: of the cumulative curves (Wasserstein, in units of the volume). Outlier: beyond median + z robust SD, and
    beyond `least`; never among fewer than five.
    """
    curves = np.cumsum(np.asarray(histograms, np.float64), axis=1)
    distance = np.abs(curves - np.median(curves, axis=0)).sum(1) * (RANGE[1] - RANGE[0]) / BINS
    middle = np.median(distance)
    spread = 1.4826 * np.median(np.abs(distance - middle))
    outlier = (distance > middle + z * spread) & (distance > least) & (len(distance) >= 5)
    return distance, outlier
