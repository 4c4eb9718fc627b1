"""Grey-matter volume of regions on the prepared grid, for real and synthetic volumes alike, and its group difference.

A synthetic volume has no label map of its own. All volumes here are in one template space (CAT12 warps them), so the
mean region map of real subjects serves for everyone: volume of a region = sum of grey-matter fraction x probability of
the region x voxel volume. No warp, no segmentation network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import metrics, nifti
from common.cli import UserError
from neuroldm3d import dataset, preprocess
from neuroldm3d.dataset import CLASSES, Row
from neuroldm3d.preprocess import Preparation

HC, TLE = range(len(CLASSES))


@dataclass(frozen=True)
class RegionMap:
    """Probabilities of regions on the prepared grid (LAS+): {name: (D, H, W) float32 in [0, 1]}, and their grid."""

    probability: dict[str, np.ndarray]
    affine: np.ndarray

    @property
    def voxel_mm3(self) -> float:
        return float(abs(np.linalg.det(self.affine[:3, :3])))


def region_path(folder: str | Path, name: str) -> Path:
    """Region map of the volume `name` in a folder, .nii.gz or .nii; UserError if there is none."""
    for extension in dataset.EXTENSIONS:
        if (path := Path(folder) / f"{name}{extension}").is_file():
            return path
    raise UserError(f"{name}: no region map {name}.nii.gz in {folder}; name the folder of label maps")


def prepared_labels(path: str | Path, prep: Preparation) -> nifti.Volume:
    """Label map (D, H, W) int32 of a volume on disk on the prepared grid, LAS+, by nearest neighbour."""
    labels = nifti.load_labels(path)
    data, affine = nifti.reorient(labels.data, labels.affine, preprocess.AXES)
    grid = preprocess.prepared_affine(affine, data.shape, prep)
    return nifti.resample_to(nifti.Volume(data, affine, labels.path), prep.shape, grid, order=0)


def mean_region_map(paths: Sequence[str | Path], codes: dict[str, Iterable[int]], prep: Preparation) -> RegionMap:
    """Share of subjects in whom a voxel of the prepared grid belongs to each region; streamed over the label maps.

    codes: region name -> label codes. UserError for maps on different grids, or a region that no map has.
    """
    if not paths:
        raise UserError("no region maps; name at least one")
    total, affine = {name: np.zeros(prep.shape, np.float64) for name in codes}, None
    for path in paths:
        labels = prepared_labels(path, prep)
        affine = labels.affine if affine is None else affine
        if not np.allclose(labels.affine, affine, atol=0.1):
            raise UserError(f"{path} lies on another grid than {paths[0]}; give maps in one template space")
        for name, values in codes.items():
            total[name] += np.isin(labels.data, tuple(values))
    empty = [name for name, value in total.items() if not value.any()]
    if empty:
        raise UserError(f"no region map has codes {tuple(codes[empty[0]])} ({empty[0]}); correct the codes")
    return RegionMap({name: (value / len(paths)).astype(np.float32) for name, value in total.items()}, affine)


def region_volumes(volume: np.ndarray, regions: RegionMap) -> dict[str, float]:
    """Grey matter (mm3) of every region in a prepared volume (D, H, W) in native units (grey-matter fraction)."""
    volume = np.asarray(volume, np.float64)
    shape = next(iter(regions.probability.values())).shape
    if volume.shape != shape:
        raise ValueError(f"volume {volume.shape} and region map {shape} differ in shape")
    return {name: float((volume * p).sum() * regions.voxel_mm3) for name, p in regions.probability.items()}


def region_table(rows: Sequence[Row], volumes: dataset.Volumes, regions: RegionMap) -> list[dict]:
    """[{"name", "label", "group", REGION: mm3, ...}] of real or synthetic volumes; UserError for z-scored ones."""
    if volumes.prep.norm != "native":
        raise UserError("z-scored volumes have no grey-matter fraction to sum; train with --norm native")
    table = []
    for row in rows:
        if not np.allclose(volumes.affine(row), regions.affine, atol=0.1):
            raise UserError(f"{row.file} lies on another grid than the region maps; generate with this data's grid")
        found = region_volumes(preprocess.denormalise(volumes.load(row), volumes.prep), regions)
        table.append({"name": row.name, "label": row.label, "group": row.group} | found)
    return table


def group_difference(table: Sequence[dict], region: str, *, seed: int = 0) -> dict:
    """HC against TLE in one region: summaries, difference TLE - HC with its interval, effect size, AUC.

    effect_size: difference over the pooled SD. auc: how well a smaller volume tells TLE; an interval that lies below 0
    says that TLE volumes are smaller. ValueError if a class has fewer than 2 volumes.
    """
    values = [np.array([row[region] for row in table if row["label"] == label]) for label in (HC, TLE)]
    if min(map(len, values)) < 2:
        raise ValueError(f"{region}: need at least 2 volumes of each class, got {[len(v) for v in values]}")
    hc, tle = values
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(v, (2000, len(v))).mean(1) for v in values]
    pooled = np.sqrt(((len(hc) - 1) * hc.var(ddof=1) + (len(tle) - 1) * tle.var(ddof=1)) / (len(hc) + len(tle) - 2))
    labels = np.concatenate([np.zeros(len(hc)), np.ones(len(tle))])
    return {
        "region": region,
        "unit": "mm3",
        "HC": metrics.summary(hc, seed=seed),
        "TLE": metrics.summary(tle, seed=seed),
        "difference": float(tle.mean() - hc.mean()),
        "difference_ci95": [float(q) for q in np.quantile(drawn[1] - drawn[0], [0.025, 0.975])],
        "effect_size": float((tle.mean() - hc.mean()) / pooled) if pooled else float("nan"),
        "auc": metrics.roc_auc(labels, -np.concatenate([hc, tle]), seed=seed),
    }


def distribution_distance(real: Sequence[dict], synthetic: Sequence[dict], region: str, label: int) -> dict:
    """One region and class, synthetic against real: means, SDs, their ratios, Kolmogorov-Smirnov, Wasserstein (mm3)."""
    from scipy import stats

    a, b = (np.array([row[region] for row in table if row["label"] == label]) for table in (real, synthetic))
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{region}: need at least 2 {CLASSES[label]} volumes of each kind, got {len(a)} and {len(b)}")
    ks = stats.ks_2samp(a, b)
    return {
        "region": region, "class": CLASSES[label], "n_real": len(a), "n_synthetic": len(b),
        "mean_real": float(a.mean()), "mean_synthetic": float(b.mean()),
        "sd_real": float(a.std(ddof=1)), "sd_synthetic": float(b.std(ddof=1)),
        "mean_ratio": float(b.mean() / a.mean()), "sd_ratio": float(b.std(ddof=1) / a.std(ddof=1)),
        "ks_stat": float(ks.statistic), "ks_p": float(ks.pvalue),
        "wasserstein_mm3": float(stats.wasserstein_distance(a, b)),
    }  # fmt: skip
