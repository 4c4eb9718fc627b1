"""The infarct in numbers: core by ADC threshold, error and contrast inside it, overlap of masks, lesions by size.

Volumes are (X, Y, Z) in RAS+ order, masks boolean, DWI in the units of the scan, ADC in 1e-6 mm²/s.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from common import metrics

ADC_CORE = 620.0  # 1e-6 mm²/s; below it tissue counts as infarct core (Purushotham et al., Int. J. Stroke 2015)
SIZE_EDGES_ML = (1.0, 10.0, 70.0)  # between small, medium, large and very large lesions (70 ml: DEFUSE 3)
RIM_MM = 8.0  # tissue this close to a lesion is not its reference: partial volume and oedema


def voxel_ml(affine: np.ndarray) -> float:
    """Volume of a voxel in ml."""
    return abs(float(np.linalg.det(np.asarray(affine, np.float64)[:3, :3]))) / 1000


def spacing_mm(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel size along each axis in mm."""
    return tuple(np.linalg.norm(np.asarray(affine, np.float64)[:3, :3], axis=0).tolist())


def core_mask(adc: np.ndarray, mask: np.ndarray, threshold: float = ADC_CORE) -> np.ndarray:
    """Voxels (..., X, Y, Z) of the brain mask whose ADC lies below the threshold."""
    return (np.asarray(adc) < threshold) & np.asarray(mask, bool)


def reference_tissue(lesion: np.ndarray, mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Brain further than `RIM_MM` from every lesion voxel; all brain outside the lesion if nothing is that far."""
    if not lesion.any():
        return np.asarray(mask, bool)
    far = mask & (ndimage.distance_transform_edt(~lesion, sampling=spacing) > RIM_MM)
    return far if far.any() else mask & ~lesion


def contrast(image: np.ndarray, lesion: np.ndarray, reference: np.ndarray) -> float | None:
    """Mean inside the lesion over the mean in reference tissue; None where one of them is empty or the latter 0."""
    if not (lesion.any() and reference.any()):
        return None
    tissue = float(image[reference].mean(dtype=np.float64))
    return float(image[lesion].mean(dtype=np.float64)) / tissue if tissue else None


def lesion_errors(
    predicted: np.ndarray, real: np.ndarray, lesion: np.ndarray, mask: np.ndarray, spacing: tuple[float, ...]
) -> dict[str, float | None]:
    """Errors of one image inside the lesion; every value None where there is no lesion.

    lesion_mae and lesion_bias (signed) in the image's unit; lesion_contrast of the predicted and _real of the real
    image, lesion_contrast_error: the absolute difference of the two.
    """
    names = ("lesion_mae", "lesion_bias", "lesion_contrast", "lesion_contrast_real", "lesion_contrast_error")
    if not lesion.any():
        return dict.fromkeys(names)
    difference = predicted[lesion].astype(np.float64) - real[lesion]
    reference = reference_tissue(lesion, mask, spacing)
    ours, true = contrast(predicted, lesion, reference), contrast(real, lesion, reference)
    error = None if ours is None or true is None else abs(ours - true)
    values = (float(np.abs(difference).mean()), float(difference.mean()), ours, true, error)
    return dict(zip(names, values, strict=True))


def overlap(predicted: np.ndarray, lesion: np.ndarray, affine: np.ndarray) -> dict[str, float | None]:
    """Dice, HD95 in mm, and volumes in ml of a predicted mask against the lesion mask.

    Dice and hd95_mm are None without a lesion: there false_positive_ml tells what was invented. A missed lesion counts
    with Dice 0 and the image's diagonal as distance. volume_error_ml is signed, predicted minus true.
    """
    ml = voxel_ml(affine)
    row = {"dice": None, "hd95_mm": None, "false_positive_ml": None}
    if lesion.any():
        row["dice"] = metrics.dice(predicted, lesion)
        row["hd95_mm"] = metrics.hd95_mm(predicted, lesion, spacing_mm=spacing_mm(affine))
    else:
        row["false_positive_ml"] = float(predicted.sum()) * ml
    true, found = float(lesion.sum()) * ml, float(predicted.sum()) * ml
    return row | {"volume_ml": found, "true_volume_ml": true, "volume_error_ml": found - true,
                  "volume_abs_error_ml": abs(found - true)}  # fmt: skip


# ---- one by one and by size -----------------------------------------------------------------------------------------


def components(lesion: np.ndarray) -> list[np.ndarray]:
    """Each connected lesion (faces, edges and corners touch) as a mask of its own, the largest first."""
    labels, count = ndimage.label(lesion, structure=np.ones((3, 3, 3)))
    found = [labels == i for i in range(1, count + 1)]
    return sorted(found, key=lambda part: -int(part.sum()))  # stable: equal sizes keep their place


def size_class(ml: float, edges: tuple[float, ...] = SIZE_EDGES_ML) -> str:
    """Name of the size class of a lesion volume, such as "1-10 ml"."""
    bounds = (0.0, *edges, math.inf)
    low, high = next((a, b) for a, b in zip(bounds, bounds[1:], strict=False) if ml < b)
    return f"{low:g}-{high:g} ml" if high < math.inf else f">={low:g} ml"


def size_classes(edges: tuple[float, ...] = SIZE_EDGES_ML) -> list[str]:
    """All size classes, the smallest first."""
    return [size_class(low, edges) for low in (0.0, *edges)]


def component_rows(
    images: dict[str, tuple[np.ndarray, np.ndarray]], lesion: np.ndarray, mask: np.ndarray, affine: np.ndarray,
    found: np.ndarray, edges: tuple[float, ...] = SIZE_EDGES_ML,
) -> list[dict]:  # fmt: skip
    """One row per connected lesion: number, ml, size class, share found by `found`, and errors of each image.

    images: {"dwi": (predicted, real), ...}; found: predicted lesion mask. Reference tissue is away from all lesions.
    """
    rows, spacing = [], spacing_mm(affine)
    reference = reference_tissue(lesion, mask, spacing)
    for number, part in enumerate(components(lesion), 1):
        ml = float(part.sum()) * voxel_ml(affine)
        row = {"lesion": number, "ml": ml, "size": size_class(ml, edges), "found": float(found[part].mean())}
        for name, (predicted, real) in images.items():
            difference = predicted[part].astype(np.float64) - real[part]
            ours, true = contrast(predicted, part, reference), contrast(real, part, reference)
            row[f"{name}_mae"] = float(np.abs(difference).mean())
            row[f"{name}_bias"] = float(difference.mean())
            row[f"{name}_contrast_error"] = None if ours is None or true is None else abs(ours - true)
        rows.append(row)
    return rows


def size_table(rows: list[dict], edges: tuple[float, ...] = SIZE_EDGES_ML) -> list[dict]:
    """Per size class: number of lesions and cases, and the mean of every other number of `component_rows`.

    rows carry "case". Classes without a lesion are listed with n 0 and None.
    """
    columns = [name for name in rows[0] if name not in ("case", "patient", "method", "lesion", "size")] if rows else []
    table = []
    for size in size_classes(edges):
        part = [row for row in rows if row["size"] == size]
        values = {name: [row[name] for row in part if row[name] is not None] for name in columns}
        means = {name: float(np.mean(v)) if v else None for name, v in values.items()}
        table.append({"size": size, "lesions": len(part), "cases": len({row["case"] for row in part}), **means})
    return table


# ---- several samples ------------------------------------------------------------------------------------------------


def lesion_probability(adc: np.ndarray, mask: np.ndarray, threshold: float = ADC_CORE) -> np.ndarray:
    """Share of samples (k, X, Y, Z) in which a voxel is core, (X, Y, Z) float32 in [0, 1]."""
    return core_mask(adc, mask, threshold).mean(0, dtype=np.float64).astype(np.float32)
