"""make_phantom.py: the paper's layout and grid, truth that the images bear out, same seed same bytes, refusals."""

import csv
import json
from collections import Counter

import nibabel as nib
import numpy as np
import pytest

from common import nifti, phantom
from common.cli import UserError
from neuroldm3d import make_phantom
from tests.helpers import run_main

TINY = ("--shape", 24, 28, 24, "--n_val", 1, "--n_test", 1)


def records(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_layout(cohort):
    truth = records(cohort / "truth.csv")
    assert Counter(row["split"] for row in truth) == {"train": 12, "val": 6, "test": 6}
    assert Counter(row["group"] for row in truth if row["split"] == "train") == {"HC": 5, "left": 4, "right": 3}
    names = {row["name"] for row in truth}
    for folder in (make_phantom.GREY, make_phantom.REGIONS):
        assert {path.name for path in (cohort / folder).iterdir()} == {f"{name}.nii.gz" for name in names}
    assert len(names) == 24 and {row["site"] for row in truth} <= set(make_phantom.SITES)
    record = json.loads((cohort / "data/phantom.json").read_text())
    assert record["labels"] == phantom.LABELS and record["shape"] == [33, 41, 33]


def test_tables_have_the_masters_columns(cohort):
    schemes = [f"{scheme}{plus}" for plus in ("", "_MRI_Plus")
               for scheme in ("HC_vs_EPD", "LTLE_vs_RTLE", "HC_vs_LTLE_vs_RTLE")]  # fmt: skip
    master = records(cohort / "data_csvs/master.csv")
    expected = ["sbj_nme", "file", *(f"{s}_numeric" for s in schemes), *(f"{s}_string" for s in schemes)]
    assert list(master[0])[:14] == expected and list(master[0])[14:] == ["site", "age", "sex"]
    parts = [row for split in ("train", "val", "test") for row in records(cohort / f"data_csvs/{split}.csv")]
    assert parts == master
    truth = {row["name"]: row for row in records(cohort / "truth.csv")}
    for row in master:
        known = truth[row["file"].split("/")[-1].split(".")[0]]
        assert (cohort / "data_csvs" / row["file"]).is_file()
        group = row["HC_vs_LTLE_vs_RTLE_string"]
        assert group == known["group"]
        assert row["HC_vs_LTLE_vs_RTLE_numeric"] == str(("HC", "left", "right").index(group))
        assert row["HC_vs_EPD_string"] == ("HC" if group == "HC" else "EPD")
        assert row["LTLE_vs_RTLE_string"] == ("" if group == "HC" else group)
        shown = group == "HC" or known["mri_positive"] == "1"
        assert row["HC_vs_LTLE_vs_RTLE_MRI_Plus_string"] == (group if shown else "")


def test_images_bear_out_the_truth(cohort):
    for row in records(cohort / "truth.csv"):
        raw = nib.load(cohort / make_phantom.GREY / f"{row['name']}.nii.gz")
        assert nib.aff2axcodes(raw.affine) == ("L", "A", "S") and raw.shape == (33, 41, 33)
        grey = nifti.load(cohort / make_phantom.GREY / f"{row['name']}.nii.gz")
        labels = nifti.load_labels(cohort / make_phantom.REGIONS / f"{row['name']}.nii.gz")
        np.testing.assert_allclose(labels.affine, grey.affine)
        assert grey.data.min() == 0 and 0.8 < grey.data.max() < 1.6 and 0.15 < grey.data.std() < 0.3
        voxel_mm3 = np.prod(grey.spacing_mm)
        assert float(row["grey_ml"]) == pytest.approx(grey.data.sum() * voxel_mm3 / 1000, rel=1e-4)
        for side, sign in (("left", -1), ("right", 1)):
            inside = labels.data == phantom.LABELS[f"hippocampus_{side}"]
            measured = grey.data[inside].sum() * voxel_mm3
            assert float(row[f"measured_{side}_mm3"]) == pytest.approx(measured, rel=1e-4)
            assert measured == pytest.approx(float(row[f"hippocampus_{side}_mm3"]), rel=0.5)
            centre = grey.affine @ [*np.argwhere(inside).mean(0), 1]
            np.testing.assert_allclose(centre[:3], [27 * sign, -23, -13], atol=7)  # mm, MNI


def test_grid_of_the_paper():
    """The published grid to the number: 113 x 137 x 113 voxels of 1.5 mm, origin (84, -120, -72), LAS."""
    expected = [[-1.5, 0, 0, 84], [0, 1.5, 0, -120], [0, 0, 1.5, -72], [0, 0, 0, 1]]
    np.testing.assert_allclose(make_phantom.grid_affine((113, 137, 113)), expected, atol=1e-9)
    subject = make_phantom.draw_subject(0, 1, "left")
    grey, labels, affine, truth = make_phantom.grey_matter(5, (113, 137, 113), subject)
    assert grey.shape == labels.shape == (113, 137, 113) and grey.dtype == np.float32
    assert not any(face.any() for face in (grey[0], grey[-1], grey[:, 0], grey[:, -1], grey[..., -1]))  # head fits
    assert 550 < truth["grey_ml"] < 900
    coarse = make_phantom.grey_matter(5, (33, 41, 33), subject)[3]  # the same head on another grid
    for name in ("hippocampus_left_mm3", "hippocampus_right_mm3", "grey_ml"):
        assert coarse[name] == pytest.approx(truth[name], rel=0.1)


def test_hippocampus_follows_its_factor_and_nothing_else_does():
    """Halving one side's factor takes away that hippocampus, leaves the other and the rest of the brain alone."""
    healthy = {"site": "SITE_A", "sex": "F", "age": 40.0, "factor_left": 1.0, "factor_right": 1.0}
    before, labels, _, truth = make_phantom.grey_matter(3, (33, 41, 33), healthy)
    after, same_labels, _, changed = make_phantom.grey_matter(3, (33, 41, 33), healthy | {"factor_left": 0.6})
    np.testing.assert_array_equal(labels, same_labels)
    assert changed["hippocampus_left_mm3"] / truth["hippocampus_left_mm3"] == pytest.approx(0.6, abs=0.02)
    assert changed["hippocampus_right_mm3"] == pytest.approx(truth["hippocampus_right_mm3"], rel=1e-3)
    assert (after <= before + 1e-6).all() and 0.985 < changed["grey_ml"] / truth["grey_ml"] < 0.999
    loss = before - after
    assert loss[labels == phantom.LABELS["frontal"]].max() < 0.02 < 0.15 < loss.max()


def test_groups_sites_and_factors():
    """Groups come in the paper's shares; the factor is low on the side of the group; patients are likelier at F."""
    groups = [make_phantom.draw_group(i) for i in range(300)]
    assert Counter(groups) == {"HC": 127, "left": 100, "right": 73}
    drawn = [(group, make_phantom.draw_subject(0, i, group)) for i, group in enumerate(groups * 4)]
    for group, low in (("left", "factor_left"), ("right", "factor_right")):
        own = np.array([s[low] for g, s in drawn if g == group])
        other = np.array([s[{"factor_left": "factor_right"}.get(low, "factor_left")] for g, s in drawn if g == group])
        assert 0.68 < own.mean() < 0.75 and 0.94 < other.mean() < 0.98
    healthy = np.array([min(s["factor_left"], s["factor_right"]) for g, s in drawn if g == "HC"])
    assert 0.93 < healthy.mean() < 0.98 and not any(s["mri_positive"] for g, s in drawn if g == "HC")
    negative = np.mean([not s["mri_positive"] for g, s in drawn if g != "HC"])
    assert 0.15 < negative < 0.25
    share = {site: np.mean([g != "HC" for g, s in drawn if s["site"] == site]) for site in make_phantom.SITES}
    assert share["SITE_A"] < share["SITE_F"] and 0.3 < min(share.values()) < max(share.values()) < 0.9


def test_same_seed_same_bytes_whatever_the_number(tmp_path):
    """Another --n_train, one thread or several: every other subject is as it was; another seed is other people."""
    for name, options in (("a", ("--n_train", 2)), ("b", ("--n_train", 3, "--num_workers", 0)),
                          ("c", ("--n_train", 2, "--seed", 1))):  # fmt: skip
        run_main(make_phantom, "--out", tmp_path / name, *TINY, *options)
    files = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a/data").rglob("*.nii.gz")}
    assert len(files) == 8
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()
    a, b = (records(tmp_path / name / "truth.csv") for name in "ab")
    assert [row for row in b if row["name"] in {r["name"] for r in a}] == a and len(b) == 5


def test_refusals(tmp_path):
    (tmp_path / "data_csvs").mkdir()
    (tmp_path / "data_csvs/train.csv").write_text("mine")
    with pytest.raises(UserError, match="data_csvs already holds data"):
        run_main(make_phantom, "--out", tmp_path, *TINY, "--n_train", 1)
    for options, message in ((("--n_train", 0), "--n_train 0"), (("--seed", -1), "--seed -1"),
                             (("--shape", 8, 28, 24), "between 16 and 192")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            run_main(make_phantom, "--out", tmp_path / "x", *TINY, *options)
    assert not (tmp_path / "x").exists() and (tmp_path / "data_csvs/train.csv").read_text() == "mine"
