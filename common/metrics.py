"""Image, segmentation and detection metrics for one subject at a time, and their summary over subjects.

Volumes are numpy arrays or torch tensors with the spatial axes last, (D, H, W) or (C, D, H, W); results are python
floats. Call once per subject: leading axes are channels of that subject and are averaged. Arithmetic is float64.
`data_range` is the width of the declared intensity scale (1 for volumes in [0, 1]), never taken from the pair.
A mask selects voxels (0/1, broadcast over channels). Every function raises ValueError for NaN or infinite input,
for shapes that differ, and for an empty mask, so a failed subject is noticed and never averaged away.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

PSNR_CAP_DB = 100.0
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli & Bovik 2003, section 3.2


def _tensor(x, name):
    if not torch.is_tensor(x):  # the copy serves read-only, byte-swapped and reversed arrays, as nibabel gives them
        x = torch.from_numpy(np.array(x, dtype=np.float64, order="C"))
    x = (x.cpu() if x.device.type == "mps" else x).detach().to(torch.float64)  # mps has no float64
    if x.numel() == 0 or not torch.isfinite(x).all():
        raise ValueError(f"{name} is empty or has NaN or infinite values")
    return x


def _pair(pred, target, data_range=1.0):
    pred, target = _tensor(pred, "pred"), _tensor(target, "target")
    if pred.shape != target.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} differ in shape")
    if not 0 < data_range < math.inf:
        raise ValueError(f"data_range must be a positive number, got {data_range}")
    return pred, target.to(pred.device)


def _binary(x, name):
    x = _tensor(x, name)
    if not ((x == 0) | (x == 1)).all():
        raise ValueError(f"{name} must hold only 0 and 1 (threshold it, or compare it with a label)")
    return x.bool()


def _mean(values, mask, crop=0):
    """Mean of `values` over `mask`, from whose three last axes `crop` voxels are cut at both ends first."""
    if mask is None:
        return values.mean().item()
    mask = _binary(mask, "mask").to(values.device)
    try:
        mask = mask.expand(*values.shape[:-3], *(n + 2 * crop for n in values.shape[-3:]))
    except RuntimeError:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit the volume") from None
    for axis in (-3, -2, -1) if crop else ():
        mask = mask.narrow(axis, crop, values.shape[axis])
    if not mask.any():
        raise ValueError("mask is empty" + (" inside the region where the SSIM map is defined" if crop else ""))
    return values[mask].mean().item()


def mae(pred, target, *, mask=None):
    """Mean absolute error in the volumes' unit."""
    pred, target = _pair(pred, target)
    return _mean((pred - target).abs_(), mask)


def psnr(pred, target, *, data_range, mask=None, cap_db=PSNR_CAP_DB):
    """Peak signal-to-noise ratio in dB, 10 log10(data_range^2 / MSE), at most `cap_db`.

    Identical volumes have no finite PSNR. They count as 100 dB (an RMSE of 1e-5 data_range) and stay in every mean;
    cap_db=math.inf gives the textbook value, which `summary` refuses.
    """
    pred, target = _pair(pred, target, data_range)
    mse = _mean((pred - target).square_(), mask)
    return min(cap_db, 10 * math.log10(data_range**2 / mse)) if mse > 0 else float(cap_db)


def nmse(pred, target, *, mask=None):
    """Normalised mean squared error ||pred - target||^2 / ||target||^2; ValueError where the target is all zero."""
    pred, target = _pair(pred, target)
    power = _mean(target.square(), mask)
    if power == 0:
        raise ValueError("nmse: target is zero everywhere")
    return _mean((pred - target).square_(), mask) / power


def nrmse(pred, target, *, data_range, mask=None):
    """Root mean squared error divided by data_range."""
    pred, target = _pair(pred, target, data_range)
    return math.sqrt(_mean((pred - target).square_(), mask)) / data_range


def _filter(x, taps):
    """Separable valid filtering of the three last axes, as a sum of shifted slices (no unfolding, any device)."""
    for axis in (-3, -2, -1):
        size = x.shape[axis] - len(taps) + 1
        out = x.narrow(axis, 0, size) * taps[0]
        for k, weight in enumerate(taps[1:], 1):
            out.add_(x.narrow(axis, k, size), alpha=weight)
        x = out
    return x


def _window(shape, window, window_size):
    if window not in ("gaussian", "uniform"):
        raise ValueError(f"window must be 'gaussian' or 'uniform', got {window!r}")
    size = window_size or {"gaussian": 11, "uniform": 7}[window]
    if size % 2 == 0 or len(shape) < 3 or min(shape[-3:]) < size:
        raise ValueError(f"SSIM needs an odd window and (D, H, W) of at least its {size} voxels at the coarsest scale, "
                         f"got {tuple(shape)}: pass a smaller odd window_size, or fewer scales")
    distance = np.arange(size) - size // 2
    taps = np.exp(-0.5 * (distance / 1.5) ** 2) if window == "gaussian" else np.ones(size)
    return (taps / taps.sum()).tolist()


def _ssim_maps(pred, target, data_range, taps, cov_norm=1.0):
    """Map of SSIM and of its contrast-structure factor (Wang et al. 2004, eq. 13) at every full window."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mu_p, mu_t = _filter(pred, taps), _filter(target, taps)
    mu_pt, mu_sq = mu_p * mu_t, mu_p.square_().add_(mu_t.square_())
    cov = _filter(pred * target, taps).sub_(mu_pt).mul_(cov_norm)
    var = _filter(pred.square().add_(target.square()), taps).sub_(mu_sq).clamp_(min=0).mul_(cov_norm)  # of both
    contrast = cov.mul_(2).add_(c2).div_(var.add_(c2))
    return mu_pt.mul_(2).add_(c1).div_(mu_sq.add_(c1)).mul_(contrast), contrast


def ssim(pred, target, *, data_range, mask=None, window="gaussian", border="valid", sample_covariance=False,
         window_size=None):
    """Mean 3D structural similarity (Wang et al. 2004; K 0.01 and 0.03).

    The default (Gaussian sigma 1.5, 11 voxels wide, population covariance, windows that lie inside the volume) is
    MONAI's SSIMMetric default and scikit-image's gaussian_weights=True, sigma=1.5, use_sample_covariance=False.
    window="uniform", sample_covariance=True is scikit-image called with data_range alone (7^3); without
    sample_covariance it is MONAI's kernel_type="uniform", win_size=7; with border="reflect" (volume mirrored without
    repeating its edge, so every voxel has a window) it is torchmetrics with gaussian_kernel=False, kernel_size=7.
    `mask` averages the SSIM map over the mask; with border="valid" the map lacks a rim of window_size // 2 voxels,
    and mask voxels in that rim do not count. ValueError for volumes smaller than the window.
    """
    pred, target = _pair(pred, target, data_range)
    taps = _window(pred.shape, window, window_size)
    radius, n = len(taps) // 2, len(taps) ** 3
    if border not in ("valid", "reflect"):
        raise ValueError(f"border must be 'valid' or 'reflect', got {border!r}")
    if border == "reflect":
        shape, pad = pred.shape, (radius,) * 6
        pred, target = (F.pad(x.reshape(1, -1, *shape[-3:]), pad, mode="reflect") for x in (pred, target))
        pred, target = (x.reshape(*shape[:-3], *x.shape[-3:]) for x in (pred, target))
    ssim_map, _ = _ssim_maps(pred, target, data_range, taps, n / (n - 1) if sample_covariance else 1.0)
    return _mean(ssim_map, mask, crop=radius if border == "valid" else 0)


def ms_ssim(pred, target, *, data_range, scales=5, window="gaussian", window_size=None):
    """Multi-scale SSIM (Wang, Simoncelli & Bovik 2003) in MONAI's definition: factors clipped at 0, 2x mean pooling.

    Every axis needs window_size * 2^(scales - 1) voxels, 176 for the defaults. `scales` < 5 keeps the first weights,
    scaled to sum 1 (4 scales fit 112x128x112): another quantity, to be named with the result. ValueError if too small.
    """
    pred, target = _pair(pred, target, data_range)
    if not 1 <= scales <= len(MS_SSIM_WEIGHTS):
        raise ValueError(f"scales must be 1 to {len(MS_SSIM_WEIGHTS)}, got {scales}")
    taps = _window([n >> (scales - 1) for n in pred.shape[-3:]], window, window_size)  # the coarsest scale must fit
    weights = np.array(MS_SSIM_WEIGHTS[:scales]) / (sum(MS_SSIM_WEIGHTS[:scales]) if scales < 5 else 1.0)
    pred, target = (x.reshape(1, -1, *x.shape[-3:]) for x in (pred, target))
    result = 1.0
    for level, weight in enumerate(weights):
        ssim_map, contrast = _ssim_maps(pred, target, data_range, taps)
        factor = ssim_map if level == scales - 1 else contrast
        result *= max(factor.mean().item(), 0.0) ** weight
        pred, target = F.avg_pool3d(pred, 2), F.avg_pool3d(target, 2)
    return float(result)


def dice(pred, target):
    """Dice overlap of two 0/1 masks; 1 where both are empty."""
    pred, target = _pair(_binary(pred, "pred"), _binary(target, "target"))
    total = (pred.sum() + target.sum()).item()
    return 2 * (pred * target).sum().item() / total if total else 1.0


def _surface_distances(pred, target, spacing_mm):
    """Distances (mm) of each surface's voxels to the other surface: (pred to target, target to pred).

    The surface is the mask minus its erosion by a face-connected cross; outside the image counts as background.
    Both empty: no structure and none predicted, 0 mm. One empty: a missed or invented structure costs the image's
    diagonal, an upper bound of every distance in it.
    """
    pred, target = (_binary(x, name).cpu().numpy() for x, name in ((pred, "pred"), (target, "target")))
    if pred.shape != target.shape or len(spacing_mm) != pred.ndim or not all(0 < s < math.inf for s in spacing_mm):
        raise ValueError(f"masks {pred.shape} and {target.shape} need one shape and a spacing_mm > 0 for each axis, "
                         f"got {tuple(spacing_mm)}")
    if not (pred.any() and target.any()):
        missed = pred.any() or target.any()
        penalty = np.array([math.dist(np.multiply(pred.shape, spacing_mm), [0] * pred.ndim) if missed else 0.0])
        return penalty, penalty
    box = ndimage.find_objects((pred | target).astype(np.uint8))[0]  # nothing outside it matters
    edges = [x[box] & ~ndimage.binary_erosion(x[box]) for x in (pred, target)]
    to_pred, to_target = (ndimage.distance_transform_edt(~edge, sampling=spacing_mm) for edge in edges)
    return to_target[edges[0]], to_pred[edges[1]]


def hd95_mm(pred, target, *, spacing_mm):
    """95 % Hausdorff distance in mm of two 0/1 masks: the larger of the two directed 95th percentiles (as MONAI).

    `spacing_mm` gives one voxel size per axis. Both masks empty: 0; one empty: the image's diagonal, never dropped.
    """
    return float(max(np.percentile(d, 95) for d in _surface_distances(pred, target, spacing_mm)))


def assd_mm(pred, target, *, spacing_mm):
    """Average symmetric surface distance in mm over the voxels of both surfaces; empty masks as in `hd95_mm`."""
    return float(np.concatenate(_surface_distances(pred, target, spacing_mm)).mean())


def _values(values):
    values = np.asarray(values, dtype=np.float64).ravel()
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError("need at least one value, all finite: give a failed subject a stated penalty")
    return values


def bootstrap_interval(values, *, seed, level=0.95, statistic=np.mean, groups=None, resamples=2000):
    """Percentile bootstrap interval (lo, hi) of `statistic(array, axis=...)` over subjects; (nan, nan) for one subject.

    With `groups` (one id per value) whole groups are drawn, so repeated scans of a person do not narrow it.
    """
    values, rng = _values(values), np.random.default_rng(seed)
    codes = np.arange(values.size) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if codes.size != values.size:
        raise ValueError(f"{values.size} values but {codes.size} groups")
    n_groups = int(codes.max()) + 1
    if n_groups < 2:
        return math.nan, math.nan
    draws = rng.integers(n_groups, size=(resamples, n_groups))
    if n_groups == values.size:  # one value per group
        statistics = statistic(values[np.argsort(codes)][draws], axis=1)
    else:
        members = [np.flatnonzero(codes == g) for g in range(n_groups)]
        statistics = [statistic(values[np.concatenate([members[g] for g in draw])], axis=0) for draw in draws]
    lo, hi = np.quantile(statistics, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def summary(values, *, seed=0, groups=None):
    """n, mean, sd (n - 1), min, max and ci95 (bootstrap interval of the mean); sd and ci95 are nan for one value."""
    v = _values(values)
    sd = float(v.std(ddof=1)) if v.size > 1 else math.nan
    return {"n": v.size, "mean": float(v.mean()), "sd": sd, "min": float(v.min()), "max": float(v.max()),
            "ci95": bootstrap_interval(v, seed=seed, groups=groups)}


def _classes(labels, values):
    labels, values = _binary(labels, "labels").cpu().numpy().ravel(), _values(values)
    if labels.shape != values.shape:
        raise ValueError(f"{labels.size} labels but {values.size} predictions")
    reason = "" if labels.any() and not labels.all() else f"all {labels.size} labels are {int(labels[0])}"
    return values[labels], values[~labels], reason


def roc_auc(labels, scores, *, seed, level=0.95, resamples=2000):
    """Area under the ROC curve (Mann-Whitney; ties count half) with a bootstrap interval stratified by class.

    `labels` 0/1, `scores` higher for 1. Returns auc, ci (lo, hi), n_positive, n_negative, reason: why auc is nan
    (labels of one class), else "". At auc 0 or 1 the interval has no width, which is not certainty.
    """
    positive, negative, reason = _classes(labels, scores)
    auc, ci = math.nan, (math.nan, math.nan)
    if not reason:
        wins = (np.sign(positive[:, None] - negative[None, :]) + 1) / 2
        rng, (n_p, n_n) = np.random.default_rng(seed), wins.shape
        times_p, times_n = (rng.multinomial(n, np.full(n, 1 / n), size=resamples) for n in (n_p, n_n))
        drawn = ((times_p @ wins) * times_n).sum(axis=1) / (n_p * n_n)
        auc, ci = float(wins.mean()), tuple(np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]).tolist())
    return {"auc": auc, "ci": ci, "n_positive": positive.size, "n_negative": negative.size, "reason": reason}


def balanced_accuracy(labels, predictions):
    """Mean of sensitivity and specificity of 0/1 `predictions`; nan, with the reason, for labels of one class."""
    positive, negative, reason = _classes(labels, _binary(predictions, "predictions").cpu().numpy())
    sensitivity = float(positive.mean()) if positive.size else math.nan
    specificity = float(1 - negative.mean()) if negative.size else math.nan
    return {"balanced_accuracy": (sensitivity + specificity) / 2, "sensitivity": sensitivity,
            "specificity": specificity, "reason": reason}
