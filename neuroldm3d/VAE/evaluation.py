"""How well the autoencoder gives a volume back: errors of one subject, inside the brain and by region, and the table.

Errors are reported twice. "native": grey-matter fraction, PSNR with the declared range 1. "zscored": after the
original's normalisation (mean and standard deviation of the whole volume), its unit, so that its table can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import metrics, tables
from common.cli import UserError
from common.runlog import git_revision, write_json
from neuroldm3d.dataset import CLASSES
from neuroldm3d.preprocess import Preparation

DATA_RANGE = 1.0  # grey-matter fraction
MASK_FRACTION = 0.1  # of the mean volume's range above its minimum: brain
UNITS = ("native", "zscored")


def errors(real, recon, *, data_range: float, mask=None) -> dict[str, float]:
    """mse, mae, psnr (of `data_range`), psnr_own_range and nmse of one volume (D, H, W); with `mask` also *_mask.

    nmse is MSE / variance of `real` (1: as good as its mean). psnr_own_range takes the range of `real` itself, as
    the original does: it depends on the subject's brightest voxel, so it serves comparison only. NaN where `real` is
    constant within the mask.
    """
    result = {}
    for suffix, where in (("", None), ("_mask", mask)) if mask is not None else (("", None),):
        mse = mean_squared_error(recon, real, where)  # first, because it refuses what cannot be compared
        inside = np.asarray(real, np.float64)
        inside = inside[np.broadcast_to(np.asarray(where, bool), inside.shape)] if suffix else inside
        span, variance = float(np.ptp(inside)), float(inside.var())
        own = metrics.psnr(recon, real, data_range=span, mask=where) if span else float("nan")
        result |= {
            f"mse{suffix}": mse,
            f"mae{suffix}": metrics.mae(recon, real, mask=where),
            f"psnr{suffix}": metrics.psnr(recon, real, data_range=data_range, mask=where),
            f"psnr_own_range{suffix}": own,
            f"nmse{suffix}": mse / variance if variance else float("nan"),
        }
    return result


def mean_squared_error(pred, target, mask=None) -> float:
    return metrics.nrmse(pred, target, data_range=1.0, mask=mask) ** 2


def reconstruction_metrics(
    real: np.ndarray,
    recon: np.ndarray,
    prep: Preparation,
    *,
    source_sd: float,
    mask: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    regions: dict[str, Iterable[int]] | None = None,
) -> dict:
    """{"native": errors, "zscored": errors, "regions": {name: {"mse", "mae", "nmse" in z-scores, "voxels"}}}.

    real, recon: (D, H, W) in normalised units of `prep`. source_sd: population standard deviation of the whole volume
    on disk in native units. mask: brain (see `brain_mask`). labels, regions: integer map on the same grid and the
    codes of each region; a region without voxels is left out, since no error exists there. ValueError for unlike
    shapes or values that are not finite.
    """
    to_native = prep.norm_scale if prep.norm == "native" else source_sd
    real, recon = np.asarray(real, np.float64), np.asarray(recon, np.float64)
    factors = dict(zip(UNITS, (to_native, to_native / source_sd), strict=True))
    ranges = dict(zip(UNITS, (DATA_RANGE, DATA_RANGE / source_sd), strict=True))
    found = {u: errors(real * f, recon * f, data_range=ranges[u], mask=mask) for u, f in factors.items()}
    scale = factors["zscored"]
    found["regions"] = region_errors(real * scale, recon * scale, labels, regions or {}) if labels is not None else {}
    return found


def region_errors(real, recon, labels: np.ndarray, regions: dict[str, Iterable[int]]) -> dict[str, dict]:
    """mse, mae, nmse and number of voxels of every region of an integer map that has voxels."""
    table = {}
    for name, codes in regions.items():
        inside = np.isin(labels, tuple(codes))
        if inside.any():
            mse, variance = mean_squared_error(recon, real, inside), float(np.var(real[inside]))
            nmse = mse / variance if variance else float("nan")
            mae = metrics.mae(recon, real, mask=inside)
            table[name] = {"mse": mse, "mae": mae, "nmse": nmse, "voxels": int(inside.sum())}
    return table


def brain_mask(volumes: Iterable[np.ndarray], limit: int = 60) -> np.ndarray:
    """(D, H, W) bool: the mean of up to `limit` registered volumes exceeds its minimum by 10 % of its range."""
    total, n = None, 0
    for volume in volumes:
        total = volume.astype(np.float64) + (0 if total is None else total)
        n += 1
        if n == limit:
            break
    if total is None:
        raise UserError("no volumes for a brain mask; give at least one")
    return total > total.min() + MASK_FRACTION * np.ptp(total)


def to_unit_range(real: torch.Tensor, recon: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both (B, 1, D, H, W) mapped to [-1, 1] by the range of each real volume, `recon` clipped: the input of LPIPS.

    A constant real volume maps to -1.
    """
    low, high = (f(real, dim=tuple(range(1, real.ndim)), keepdim=True) for f in (torch.amin, torch.amax))
    span = torch.where(high > low, high - low, torch.ones_like(high))
    unit_real, unit_recon = (2 * (x - low) / span - 1 for x in (real, recon))
    return unit_real, unit_recon.clamp(-1, 1)


@torch.no_grad()
def perceptual_errors(lpips: nn.Module, real: torch.Tensor, recon: torch.Tensor) -> dict[str, float]:
    """zscored_lpips, the original's number, and unit_range_lpips, on the [-1, 1] that LPIPS was made for.

    lpips: VAE/losses.LPIPS3D. real, recon: z-scored volumes (1, 1, D, H, W) on its device.
    """
    pairs = {"zscored_lpips": (real, recon), "unit_range_lpips": to_unit_range(real, recon)}
    return {name: lpips(b, a).item() for name, (a, b) in pairs.items()}


# ---- over subjects


def flatten(found: dict) -> dict[str, float]:
    """One flat row of `reconstruction_metrics`: native_mse, zscored_mae_mask, region_hippocampus_mse, ..."""
    row = {f"{unit}_{name}": value for unit in UNITS for name, value in found[unit].items()}
    return row | {f"region_{r}_{m}": v for r, part in found["regions"].items() for m, v in part.items()}


def summarise(rows: list[dict], seed: int = 0) -> dict:
    """{"all" | class: {metric: n, mean, sd, min, max, ci95}} of flat rows with the keys "name" and "label".

    Subjects whose value is NaN (a constant region) are left out of that metric; its n says so.
    """
    names = [key for row in rows for key in row if key not in ("name", "label")]
    groups = {"all": rows} | {CLASSES[k]: [row for row in rows if row["label"] == k] for k in range(len(CLASSES))}
    table = {}
    for group, members in groups.items():
        for name in dict.fromkeys(names):
            values = [row[name] for row in members if np.isfinite(row.get(name, np.nan))]
            if values:
                table.setdefault(group, {})[name] = metrics.summary(values, seed=seed)
    return table


def write_report(folder: Path, rows: list[dict], options: dict, seed: int = 0) -> dict:
    """per_subject_metrics.csv and summary_metrics.json (with `options`) in `folder`; returns the summary."""
    tables.write_csv(Path(folder) / "per_subject_metrics.csv", rows)
    summary = {"n": len(rows), "data_range": {"native": DATA_RANGE, "unit": "GM fraction"}, "options": options}
    summary |= {"metrics": summarise(rows, seed), "git_revision": git_revision()}
    write_json(Path(folder) / "summary_metrics.json", summary)
    return summary
