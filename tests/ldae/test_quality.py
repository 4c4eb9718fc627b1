"""quality.py: ventricles measured in images against the truth, change outside of a mask, signs of bad input."""

import csv

import numpy as np
import pytest
from scipy import ndimage

from ldae import dataset, make_phantom, quality
from ldae.preprocess import Preparation
from tests.helpers import run_main

SHAPE, SPACING_MM = (32, 40, 32), 6.0


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """(volume, affine, true ml) of 18 subjects of the tiny preset's grid."""
    root = tmp_path_factory.mktemp("heads")
    run_main(make_phantom, "--out", root, "--shape", *SHAPE, "--n_subjects", 18, "--sessions", 0, "--no_labels")
    with open(root / "data/truth.csv", newline="") as file:
        truth = {row["scan"]: float(row["ventricle_ml"]) for row in csv.DictReader(file)}
    volumes = dataset.Volumes(Preparation(SHAPE, SPACING_MM), None)
    rows = dataset.read_table(root / "data/dataset.csv")
    return [(volumes.load(row), volumes.affine(row), truth[row.scan]) for row in rows]


@pytest.mark.parametrize(
    ("sigma_mm", "least", "low", "high"), [(0, 0.95, 0.5, 0.85), (3, 0.93, 0.35, 0.7), (4.8, 0.88, 0.12, 0.4)]
)
def test_ventricle_ml_follows_the_truth(heads, sigma_mm, least, low, high):
    """r > 0.9 and a linear slope, for sharp images and for the blur of an autoencoder."""
    measured = [quality.ventricle_ml(ndimage.gaussian_filter(x, sigma_mm / SPACING_MM) if sigma_mm else x, affine)
                for x, affine, _ in heads]  # fmt: skip
    truth = [ml for _, _, ml in heads]
    slope = np.polyfit(truth, measured, 1)[0]
    assert np.corrcoef(measured, truth)[0, 1] > least and low < slope < high


def test_ventricle_ml_of_one_head_follows_its_ventricles():
    """The same head with larger ventricles: monotonic, whatever the rest of the disease does."""
    from common import phantom

    sizes = (0.8, 1.2, 1.8, 2.6)
    measured = []
    for size in sizes:
        brain = phantom.anatomy(5, SHAPE, phantom.Factors(age=70, ventricle_scale=size), SPACING_MM)
        measured.append(quality.ventricle_ml(phantom.t1_image(brain, 5) / 0.95, brain.affine))
    assert all(a < b for a, b in zip(measured, measured[1:], strict=False)) and measured[-1] > 2 * measured[0]


def test_ventricle_ml_is_a_volume(heads):
    """It moves with the head, scales with the voxel volume, ignores the units of intensity and stays in its region."""
    x, affine, _ = heads[0]
    ml = quality.ventricle_ml(x, affine)
    assert quality.ventricle_ml(np.roll(x, (1, -2, 1), (0, 1, 2)), affine) == pytest.approx(ml, rel=1e-5)
    moved = affine.copy()
    moved[:3, 3] += (40, -25, 60)
    assert quality.ventricle_ml(x, moved) == pytest.approx(ml, rel=1e-5)
    assert quality.ventricle_ml(1.1 * x, affine) == pytest.approx(ml, rel=0.02)
    region = quality.central_region(x, affine)
    assert region.sum() * quality.voxel_ml(affine) == pytest.approx(4 / 3 * np.pi * 30 * 46 * 24 / 1000, rel=0.05)
    filled = np.where(region, quality.white_level(x), x)
    assert quality.ventricle_ml(filled, affine, region) == pytest.approx(0, abs=0.1)
    hole = filled.copy()
    hole[tuple(np.argwhere(region)[len(np.argwhere(region)) // 2])] = 0
    assert quality.ventricle_ml(hole, affine, region) == pytest.approx(SPACING_MM**3 / 1000, rel=0.05)
    assert np.isnan(quality.ventricle_ml(np.zeros(SHAPE), affine))


def test_change_outside():
    before, mask = np.zeros((4, 4, 4)), np.zeros((4, 4, 4), bool)
    mask[:2] = True
    after = before.copy()
    after[0] = 1.0
    assert quality.change_outside(before, after, mask) == {"inside": 0.5, "outside": 0.0, "share_outside": 0.0}
    after[2] = -3.0
    assert quality.change_outside(before, after, mask) == {"inside": 0.5, "outside": 1.5, "share_outside": 0.75}
    assert np.isnan(quality.change_outside(before, before, mask)["share_outside"])
    assert np.isnan(quality.change_outside(before, after, ~mask | mask)["outside"])


def test_skull_signs(heads):
    """A stripped brain is bright under its surface; with a bright scalp on dark bone it is not."""
    x = heads[1][0]
    signs = quality.skull_signs(x, (SPACING_MM,) * 3)
    assert not signs["skull"] and 900 < signs["head_ml"] < 2000 and signs["dark_shell"] < 0.05
    brain = ndimage.binary_closing(np.pad(x > 0.1, 4), iterations=2)
    bone, scalp = (ndimage.binary_dilation(brain, iterations=n) for n in (2, 3))
    head = np.pad(x, 4) + np.where(scalp & ~bone, 0.9, 0)
    signs = quality.skull_signs(head, (SPACING_MM,) * 3)
    assert signs["skull"] and signs["dark_shell"] > quality.SKULL_SHARE


def test_cut_off():
    head = np.zeros((6, 6, 6), bool)
    head[1:5, 1:5, 1:5] = True
    assert quality.cut_off(head) == []
    head[0, 2, 2] = head[3, 3, 5] = True
    assert quality.cut_off(head) == ["left", "superior"]


def test_histogram_outliers(heads):
    histograms = np.stack([quality.histogram(x) for x, _, _ in heads])
    assert histograms.shape == (18, quality.BINS) and np.allclose(histograms.sum(1), 1)
    assert not quality.histogram_outliers(histograms)[1].any()
    x = heads[3][0]
    inverted = np.where(x > 0, 1.3 - np.clip(x, 0, 1.1), 0)  # as a T2
    for other in (inverted, np.sqrt(x), 0.7 * x):
        distance, odd = quality.histogram_outliers(np.concatenate([histograms, quality.histogram(other)[None]]))
        assert odd.tolist() == [False] * 18 + [True] and distance[-1] > 4 * np.median(distance)
    assert not quality.histogram_outliers(histograms[:4])[1].any()
