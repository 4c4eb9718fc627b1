"""Metrics against scikit-image, MONAI, torchmetrics values, closed forms and the spec's fixtures."""

import math
import warnings

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from common import metrics

warnings.filterwarnings("ignore", category=FutureWarning)


def ramp_pair():
    """Fixture of spec section 11.2, fact 7."""
    n = np.arange(16**3)
    target = 0.5 + 0.5 * np.sin(0.01 * n)
    pred = np.clip(target + 0.05 * np.sin(0.37 * n), 0, 1)
    return pred.reshape(16, 16, 16), target.reshape(16, 16, 16)


def random_pair(shape=(20, 17, 14), seed=0):
    rng = np.random.default_rng(seed)
    target = rng.random(shape)
    return np.clip(target + 0.1 * rng.standard_normal(shape), 0, 1), target


def test_spec_fixture():
    pred, target = ramp_pair()
    assert metrics.psnr(pred, target, data_range=1) == pytest.approx(29.5207, abs=1e-4)
    assert metrics.mae(pred, target) == pytest.approx(0.0291552, abs=1e-7)
    original = metrics.ssim(pred, target, data_range=1, window="uniform", border="reflect")
    assert original == pytest.approx(0.995737, abs=1e-6)
    scikit = metrics.ssim(pred, target, data_range=1, window="uniform", sample_covariance=True)
    assert scikit == pytest.approx(0.995629, abs=1e-6)


@pytest.mark.parametrize("shape", [(20, 17, 14), (11, 12, 13), (2, 12, 13, 12)])
@pytest.mark.parametrize("data_range", [1.0, 2.5])
def test_ssim_agrees_with_scikit_image_and_monai(shape, data_range):
    from monai.metrics import SSIMMetric

    pred, target = random_pair(shape)
    channel = 0 if len(shape) == 4 else None
    ours = metrics.ssim(pred, target, data_range=data_range)
    scikit = structural_similarity(pred, target, data_range=data_range, gaussian_weights=True, sigma=1.5,
                                   use_sample_covariance=False, channel_axis=channel)
    assert ours == pytest.approx(scikit, abs=1e-9)
    tensors = [torch.from_numpy(x).reshape(1, -1, *shape[-3:]) for x in (pred, target)]
    assert ours == pytest.approx(SSIMMetric(3, data_range=data_range)(*tensors).item(), abs=1e-5)
    uniform = SSIMMetric(3, data_range=data_range, kernel_type="uniform", win_size=7)(*tensors).item()
    assert metrics.ssim(pred, target, data_range=data_range, window="uniform") == pytest.approx(uniform, abs=1e-5)
    sample = metrics.ssim(pred, target, data_range=data_range, window="uniform", sample_covariance=True)
    plain = structural_similarity(pred, target, data_range=data_range, channel_axis=channel)
    assert sample == pytest.approx(plain, abs=1e-9)


def test_ssim_of_constant_volumes_is_the_luminance_term():
    a, b = np.full((12, 12, 12), 0.0), np.full((12, 12, 12), 0.1)
    for options in ({}, {"window": "uniform", "border": "reflect"}):
        closed_form = 1e-4 / (0.1**2 + 1e-4)
        assert metrics.ssim(a, b, data_range=1, **options) == pytest.approx(closed_form, rel=1e-9)


def test_masked_ssim_is_the_mean_of_the_map_over_the_mask():
    pred, target = random_pair()
    mask = np.zeros(pred.shape, bool)
    mask[:, 4:12, 3:9] = True
    full = structural_similarity(pred, target, data_range=1, gaussian_weights=True, sigma=1.5,
                                 use_sample_covariance=False, full=True)[1]
    rim = np.zeros_like(mask)
    rim[5:-5, 5:-5, 5:-5] = True
    assert metrics.ssim(pred, target, data_range=1, mask=mask) == pytest.approx(full[mask & rim].mean(), abs=1e-9)
    everywhere = np.ones_like(mask)
    for border in ("valid", "reflect"):
        whole = metrics.ssim(pred, target, data_range=1, border=border)
        assert metrics.ssim(pred, target, data_range=1, border=border, mask=everywhere) == pytest.approx(whole)
    with pytest.raises(ValueError, match="mask is empty inside the region"):
        metrics.ssim(pred, target, data_range=1, mask=~rim)


def test_identical_volumes_and_the_psnr_cap():
    x = random_pair()[1]
    assert metrics.ssim(x, x, data_range=1) == 1.0 and metrics.mae(x, x) == 0 and metrics.nmse(x, x) == 0
    assert metrics.psnr(x, x, data_range=1) == 100.0
    assert metrics.psnr(x, x, data_range=1, cap_db=math.inf) == math.inf
    values = [metrics.psnr(x, x, data_range=1), metrics.psnr(x, x + 0.1, data_range=1)]
    assert metrics.summary(values)["mean"] == pytest.approx(60.0)
    with pytest.raises(ValueError, match="finite"):
        metrics.summary([20.0, math.inf])


def test_error_metrics_by_closed_form_and_scikit_image():
    pred, target = random_pair()
    mask = np.zeros(pred.shape, np.uint8)
    mask[3:9, 2:5] = 1
    p, t = pred[mask == 1], target[mask == 1]
    scikit = peak_signal_noise_ratio(target, pred, data_range=2)
    assert metrics.psnr(pred, target, data_range=2) == pytest.approx(scikit)
    assert metrics.psnr(pred, target, data_range=1, mask=mask) == pytest.approx(-10 * np.log10(np.mean((p - t) ** 2)))
    assert metrics.mae(pred, target, mask=mask) == pytest.approx(np.abs(p - t).mean())
    assert metrics.nmse(pred, target, mask=mask) == pytest.approx(np.sum((p - t) ** 2) / np.sum(t**2))
    assert metrics.nmse(2 * target, target) == pytest.approx(1.0)
    assert metrics.nrmse(target + 0.3, target, data_range=2) == pytest.approx(0.15)
    two = np.stack([pred, target])  # a (D, H, W) mask serves every channel
    zeros = np.zeros_like(pred)
    assert metrics.mae(two, np.stack([target, target]), mask=mask) == pytest.approx(np.abs(p - t).mean() / 2)
    with pytest.raises(ValueError, match="zero everywhere"):
        metrics.nmse(pred, zeros)


def test_arrays_and_tensors_of_any_type_give_the_same_float():
    pred, target = (x.astype(np.float32) for x in random_pair())
    for name in ("ssim", "psnr"):
        function = getattr(metrics, name)
        value = function(pred, target, data_range=1)
        assert type(value) is float
        assert function(torch.from_numpy(pred).requires_grad_(), torch.from_numpy(target), data_range=1) == value
        assert function(pred[::-1, :, ::-1], target[::-1, :, ::-1], data_range=1) == pytest.approx(value, abs=1e-12)
    stored = target.astype(">f4")  # as nibabel gives a big-endian file
    stored.setflags(write=False)
    assert metrics.ssim(pred, stored, data_range=1) == metrics.ssim(pred, target, data_range=1)
    assert metrics.mae(np.full((2, 2, 2), 200, np.uint8), np.full((2, 2, 2), 210, np.uint8)) == 10.0


@pytest.mark.parametrize("scales,shape,kernel", [(5, (48, 49, 50), 3), (3, (48, 47, 45), 11), (2, (33, 24, 25), 11)])
def test_ms_ssim_agrees_with_monai(scales, shape, kernel):  # five scales of an 11 window need 176^3: slow
    from monai.metrics.regression import compute_ms_ssim

    # blocks keep their contrast at coarse scales; MONAI's float32 variances lose 3e-5 on white noise
    pred, target = (np.kron(x, np.ones((8, 8, 8)))[tuple(map(slice, shape))] for x in random_pair((13, 13, 13)))
    weights = np.array(metrics.MS_SSIM_WEIGHTS[:scales])
    weights = weights / weights.sum() if scales < 5 else weights
    tensors = [torch.from_numpy(x)[None, None] for x in (pred, target)]
    theirs = compute_ms_ssim(*tensors, 3, kernel_size=kernel, weights=weights.tolist()).item()
    ours = metrics.ms_ssim(pred, target, data_range=1, scales=scales, window_size=kernel)
    assert ours == pytest.approx(theirs, abs=1e-5) and ours != 1
    assert metrics.ms_ssim(target, target, data_range=1, scales=scales, window_size=kernel) == pytest.approx(1.0)


def test_bad_input_is_refused():
    pred, target = random_pair((12, 12, 12))
    bad = pred.copy()
    bad[0, 0, 0] = np.nan
    for function in (metrics.mae, metrics.nmse):
        with pytest.raises(ValueError, match="NaN"):
            function(bad, target)
    with pytest.raises(ValueError, match="NaN"):
        metrics.ssim(pred, bad, data_range=1)
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.psnr(pred[:-1], target, data_range=1)
    with pytest.raises(TypeError, match="data_range"):
        metrics.psnr(pred, target)
    with pytest.raises(ValueError, match="data_range"):
        metrics.ssim(pred, target, data_range=0)
    with pytest.raises(ValueError, match="at least its 11 voxels"):
        metrics.ssim(pred[:10], target[:10], data_range=1)
    assert metrics.ssim(pred[:10], target[:10], data_range=1, window_size=9) < 1
    with pytest.raises(ValueError, match="coarsest scale"):
        metrics.ms_ssim(pred, target, data_range=1)
    with pytest.raises(ValueError, match="only 0 and 1"):
        metrics.dice(pred, target)
    with pytest.raises(ValueError, match="does not fit"):
        metrics.mae(pred, target, mask=np.ones((12, 12, 11)))
    with pytest.raises(ValueError, match="mask is empty"):
        metrics.mae(pred, target, mask=np.zeros((12, 12, 12)))


def blobs(seed):
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, (24, 20, 16)), indexing="ij"), -1)
    return np.any([np.linalg.norm(grid - rng.uniform(2, 15, 3), axis=-1) < rng.uniform(2, 5) for _ in range(3)], axis=0)


@pytest.mark.parametrize("seed", range(3))
def test_surface_distances_agree_with_monai(seed):
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    pred, target, spacing = blobs(2 * seed), blobs(2 * seed + 1), (1.0, 1.5, 3.0)
    tensors = [torch.from_numpy(x)[None, None] for x in (pred, target)]
    options = {"include_background": True, "spacing": spacing}
    hd95 = compute_hausdorff_distance(*tensors, percentile=95, **options).item()
    assd = compute_average_surface_distance(*tensors, symmetric=True, **options).item()
    assert metrics.hd95_mm(pred, target, spacing_mm=spacing) == pytest.approx(hd95, abs=1e-4)
    assert metrics.assd_mm(pred, target, spacing_mm=spacing) == pytest.approx(assd, abs=1e-4)
    assert metrics.hd95_mm(target, pred, spacing_mm=spacing) == metrics.hd95_mm(pred, target, spacing_mm=spacing)


def test_surface_distances_closed_form():
    a, b = np.zeros((30, 8, 8), bool), np.zeros((30, 8, 8), bool)
    a[5], b[12] = True, True  # two planes, 7 voxels of 2 mm apart
    for metric in (metrics.hd95_mm, metrics.assd_mm):
        assert metric(a, b, spacing_mm=(2.0, 1.0, 1.0)) == pytest.approx(14.0)
        assert metric(a, a, spacing_mm=(2.0, 1.0, 1.0)) == 0
    grid = np.stack(np.meshgrid(*[np.arange(41) - 20] * 3, indexing="ij"), -1)
    radius = np.linalg.norm(grid, axis=-1)
    concentric = metrics.assd_mm(radius <= 16, radius <= 10, spacing_mm=(1, 1, 1))
    assert concentric == pytest.approx(6.0, abs=0.35)


def test_empty_masks_are_counted():
    empty, full = np.zeros((6, 8, 10), bool), np.zeros((6, 8, 10), bool)
    full[2:4, 2:4, 2:4] = True
    diagonal = math.dist((6, 16, 30), (0, 0, 0))
    assert metrics.dice(empty, empty) == 1.0 and metrics.dice(empty, full) == 0.0 and metrics.dice(full, full) == 1.0
    for metric in (metrics.hd95_mm, metrics.assd_mm):
        assert metric(empty, empty, spacing_mm=(1, 2, 3)) == 0.0
        assert metric(empty, full, spacing_mm=(1, 2, 3)) == pytest.approx(diagonal)
        assert metric(full, empty, spacing_mm=(1, 2, 3)) == pytest.approx(diagonal)
        with pytest.raises(ValueError, match="spacing_mm"):
            metric(full, full, spacing_mm=(1, 2))
    half = full.copy()
    half[2] = False
    assert metrics.dice(half, full) == pytest.approx(2 / 3)


def test_bootstrap_interval_has_the_normal_width_and_coverage():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(400)
    lo, hi = metrics.bootstrap_interval(values, seed=1)
    half = 1.96 * values.std() / 20
    assert lo == pytest.approx(values.mean() - half, abs=0.01) and hi == pytest.approx(values.mean() + half, abs=0.01)
    assert (lo, hi) == metrics.bootstrap_interval(values, seed=1) != metrics.bootstrap_interval(values, seed=2)
    median = metrics.bootstrap_interval(values, seed=1, statistic=np.median)
    assert median[0] < np.median(values) < median[1]
    intervals = [metrics.bootstrap_interval(rng.standard_normal(40), seed=i, resamples=500) for i in range(300)]
    assert np.mean([lo < 0 < hi for lo, hi in intervals]) == pytest.approx(0.94, abs=0.04)


def test_bootstrap_draws_whole_groups():
    rng = np.random.default_rng(0)
    subjects = rng.standard_normal(30)
    scans, groups = np.repeat(subjects, 4), np.repeat([f"s{i}" for i in range(30)], 4)
    single = np.subtract(*metrics.bootstrap_interval(subjects, seed=0))
    grouped = np.subtract(*metrics.bootstrap_interval(scans, seed=0, groups=groups))
    naive = np.subtract(*metrics.bootstrap_interval(scans, seed=0))
    assert grouped == pytest.approx(single, rel=0.1) and naive == pytest.approx(single / 2, rel=0.1)
    uneven = metrics.bootstrap_interval([1.0, 1, 1, 3], seed=0, groups=["a", "a", "a", "b"])
    assert uneven == (1.0, 3.0)  # draws are aa, ab, ba, bb
    with pytest.raises(ValueError, match="groups"):
        metrics.bootstrap_interval([1.0, 2.0], seed=0, groups=["a"])


def test_summary():
    result = metrics.summary([1.0, 2.0, 6.0])
    assert result["n"] == 3 and result["mean"] == 3.0 and result["sd"] == pytest.approx(np.sqrt(7))
    assert (result["min"], result["max"]) == (1.0, 6.0)
    assert 1.0 <= result["ci95"][0] < 3.0 < result["ci95"][1] <= 6.0
    one = metrics.summary([4.0])
    assert one["mean"] == 4.0 and math.isnan(one["sd"]) and all(map(math.isnan, one["ci95"]))
    with pytest.raises(ValueError, match="finite"):
        metrics.summary([1.0, math.nan])
    with pytest.raises(ValueError):
        metrics.summary([])


def test_roc_auc_agrees_with_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    rng = np.random.default_rng(0)
    labels = rng.random(120) < 0.3
    scores = np.round(rng.standard_normal(120) + labels, 1)  # rounded: ties
    result = metrics.roc_auc(labels, scores, seed=0)
    assert result["auc"] == pytest.approx(roc_auc_score(labels, scores)) and result["reason"] == ""
    assert result["n_positive"] == labels.sum() and result["n_positive"] + result["n_negative"] == 120
    draws = []  # the plain way: resample within each class
    for _ in range(500):
        index = np.concatenate([rng.choice(np.flatnonzero(labels == c), (labels == c).sum()) for c in (0, 1)])
        draws.append(roc_auc_score(labels[index], scores[index]))
    assert result["ci"] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.02)
    accuracy = metrics.balanced_accuracy(labels, scores > 0.5)
    assert accuracy["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, scores > 0.5))
    assert metrics.roc_auc([0, 0, 1], [0.1, 0.2, 0.9], seed=0)["auc"] == 1.0


def test_one_class_is_nan_with_the_reason():
    result = metrics.roc_auc([1, 1, 1], [0.1, 0.5, 0.2], seed=0)
    assert math.isnan(result["auc"]) and all(map(math.isnan, result["ci"])) and result["reason"] == "all 3 labels are 1"
    accuracy = metrics.balanced_accuracy([0, 0], [0, 1])
    assert math.isnan(accuracy["balanced_accuracy"]) and accuracy["specificity"] == 0.5 and accuracy["reason"]
    with pytest.raises(ValueError):
        metrics.roc_auc([0, 1], [0.1, math.nan], seed=0)
    with pytest.raises(ValueError, match="2 labels but 3"):
        metrics.roc_auc([0, 1], [0.1, 0.2, 0.3], seed=0)
