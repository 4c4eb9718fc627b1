"""Regional grey matter on the prepared grid: by hand, against the phantom's truth, and the difference of the groups."""

import csv
import json

import numpy as np
import pytest

from common import nifti
from common.cli import UserError
from common.phantom import LABELS
from neuroldm3d import dataset, preprocess, regions
from neuroldm3d.preprocess import Preparation

CODES = {
    "hippocampus_left": (LABELS["hippocampus_left"],),
    "hippocampus_right": (LABELS["hippocampus_right"],),
    "hippocampus": (LABELS["hippocampus_left"], LABELS["hippocampus_right"]),
}


@pytest.fixture(scope="module")
def region_map(cohort):
    paths = sorted((cohort / "data" / "regions").glob("*.nii.gz"))
    return regions.mean_region_map(paths, CODES, Preparation(shape=(32, 40, 32)))


def test_volume_by_hand():
    probability = np.zeros((4, 5, 6), np.float32)
    probability[1, 2, 3], probability[0, 0, 0] = 1.0, 0.5
    found = regions.RegionMap({"region": probability}, np.diag([-2.0, 3.0, 4.0, 1.0]))
    volume = np.full((4, 5, 6), 0.25)
    assert regions.region_volumes(volume, found)["region"] == pytest.approx(1.5 * 0.25 * 24)
    with pytest.raises(ValueError, match="differ in shape"):
        regions.region_volumes(volume[1:], found)


def test_map_is_on_the_prepared_grid(cohort, region_map):
    """Left is left: world coordinates of the map's centres agree with the label maps on disk."""
    path = next((cohort / "data" / "regions").glob("*.nii.gz"))
    labels = nifti.load_labels(path)
    for name, code in (
        ("hippocampus_left", LABELS["hippocampus_left"]),
        ("hippocampus_right", LABELS["hippocampus_right"]),
    ):
        weights = region_map.probability[name]
        assert weights.shape == (32, 40, 32) and 0 <= weights.min() and weights.max() <= 1
        centre = np.array([(g * weights).sum() / weights.sum() for g in np.indices(weights.shape)])
        on_disk = np.argwhere(labels.data == code).mean(0)
        world = region_map.affine[:3, :3] @ centre + region_map.affine[:3, 3]
        expected = labels.affine[:3, :3] @ on_disk + labels.affine[:3, 3]
        np.testing.assert_allclose(world, expected, atol=4)  # mm, of voxels of 5 mm
    both = region_map.probability["hippocampus_left"] + region_map.probability["hippocampus_right"]
    np.testing.assert_allclose(both, region_map.probability["hippocampus"], atol=1e-6)


def test_measured_volumes_follow_the_truth(cohort, region_map, prep):
    """With the mean map instead of each subject's own: correlated with the truth, on either side."""
    rows = dataset.read_table(cohort / "data_csvs" / "master.csv")
    table = regions.region_table(rows, dataset.Volumes(prep, None), region_map)
    with open(cohort / "truth.csv", newline="") as file:
        truth = {row["name"]: row for row in csv.DictReader(file)}
    for side in ("left", "right"):
        measured = np.array([row[f"hippocampus_{side}"] for row in table])
        true = np.array([float(truth[row["name"]][f"hippocampus_{side}_mm3"]) for row in table])
        assert np.corrcoef(measured, true)[0, 1] > 0.6 and 0.5 < measured.mean() / true.mean() < 1.5
    assert {row["label"] for row in table} == {0, 1} and {row["group"] for row in table} == {"HC", "left", "right"}


def test_synthetic_volumes_are_measured_alike(cohort, region_map, prep, tmp_path):
    rows = dataset.read_table(cohort / "data_csvs" / "train.csv")[:2]
    volumes = dataset.Volumes(prep, None)
    expected = regions.region_table(rows, volumes, region_map)
    for row in rows:
        data = preprocess.denormalise(volumes.load(row), prep)
        name = dataset.CLASSES[row.label]
        nifti.save(tmp_path / name / f"{row.name}.nii.gz", data, volumes.affine(row))
    (tmp_path / "synthetic.json").write_text(json.dumps({"preparation": prep.to_dict()}))
    found = regions.region_table(dataset.synthetic_rows(tmp_path), volumes, region_map)
    by_name = {row["name"]: row["hippocampus"] for row in found}
    assert {row["name"]: pytest.approx(row["hippocampus"], rel=1e-5) for row in expected} == by_name
    shifted = nifti.load(tmp_path / dataset.CLASSES[rows[0].label] / f"{rows[0].name}.nii.gz")
    affine = shifted.affine.copy()
    affine[2, 3] += 5
    nifti.save(shifted.path, shifted.data, affine)
    with pytest.raises(UserError, match="lies on another grid than the region maps"):
        regions.region_table(dataset.synthetic_rows(tmp_path), volumes, region_map)
    with pytest.raises(UserError, match="z-scored volumes have no grey-matter fraction"):
        regions.region_table(rows, dataset.Volumes(Preparation(shape=(32, 40, 32), norm="zscore"), None), region_map)


def test_group_difference():
    rng = np.random.default_rng(0)
    table = [{"label": 0, "v": 100 + 5 * rng.standard_normal()} for _ in range(40)]
    table += [{"label": 1, "v": 90 + 5 * rng.standard_normal()} for _ in range(30)]
    found = regions.group_difference(table, "v")
    assert found["HC"]["n"] == 40 and found["difference"] == pytest.approx(-10, abs=3)
    low, high = found["difference_ci95"]
    assert low < found["difference"] < high < 0
    assert found["effect_size"] == pytest.approx(-2, abs=0.6) and found["auc"]["auc"] > 0.85
    alike = regions.group_difference([{"label": i % 2, "v": rng.random()} for i in range(60)], "v")
    assert alike["difference_ci95"][0] < 0 < alike["difference_ci95"][1]
    with pytest.raises(ValueError, match="at least 2 volumes of each class"):
        regions.group_difference(table[:41], "v")


def test_distribution_distance():
    table = [{"label": 0, "v": float(v)} for v in range(10)]
    shifted = [{"label": 0, "v": 2 * v + 3.0} for v in range(10)]
    same = regions.distribution_distance(table, table, "v", 0)
    assert same["wasserstein_mm3"] == 0 and same["ks_stat"] == 0 and same["mean_ratio"] == 1
    found = regions.distribution_distance(table, shifted, "v", 0)
    assert found["sd_ratio"] == pytest.approx(2) and found["wasserstein_mm3"] == pytest.approx(7.5)
    with pytest.raises(ValueError, match="at least 2 TLE"):
        regions.distribution_distance(table, table, "v", 1)


def test_unusable_maps_are_named(cohort, tmp_path, prep):
    path = next((cohort / "data" / "regions").glob("*.nii.gz"))
    with pytest.raises(UserError, match=r"no region map has codes \(99,\) \(nothing\)"):
        regions.mean_region_map([path], {"nothing": (99,)}, prep)
    labels = nifti.load_labels(path)
    affine = labels.affine.copy()
    affine[0, 3] += 3
    nifti.save(tmp_path / "moved.nii.gz", labels.data, affine, dtype=np.int16)
    with pytest.raises(UserError, match="moved.nii.gz lies on another grid"):
        regions.mean_region_map([path, tmp_path / "moved.nii.gz"], CODES, prep)
    with pytest.raises(UserError, match="no region maps"):
        regions.mean_region_map([], CODES, prep)
    assert regions.region_path(path.parent, dataset.stem(path)) == path
    with pytest.raises(UserError, match="nobody: no region map nobody.nii.gz in"):
        regions.region_path(path.parent, "nobody")
