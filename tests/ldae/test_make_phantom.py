"""make_phantom.py: layout, truth that the images bear out, disease and age in the anatomy, same seed same bytes."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest

from common import nifti, phantom
from common.cli import UserError
from ldae import dataset, make_phantom, preprocess
from ldae.preprocess import Preparation
from tests.helpers import run_main
from tests.ldae.conftest import SHAPE, SPACING_MM

TINY = ("--shape", *SHAPE)


def records(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_layout(cohort):
    table, truth = records(cohort / "data/dataset.csv"), records(cohort / "data/truth.csv")
    assert list(table[0]) == list(make_phantom.COLUMNS) and len(table) == len(truth) == 48
    assert [row["scan"] for row in truth[:4]] == ["sub-0001_M000", "sub-0001_M006", "sub-0001_M012", "sub-0002_M000"]
    assert [row.scan for row in dataset.read_table(cohort / "data/dataset.csv")] == [row["scan"] for row in truth]
    for row, known in zip(table, truth, strict=True):
        scan = nib.load(cohort / "data" / row["path"])
        labels = nifti.load_labels(cohort / "data/labels" / f"{known['scan']}.nii.gz")
        assert scan.shape == labels.shape == SHAPE and nib.aff2axcodes(scan.affine) == ("R", "A", "S")
        np.testing.assert_array_equal(scan.affine, labels.affine)
        assert scan.header["sform_code"] > 0 and scan.header.get_zooms() == (SPACING_MM,) * 3
        assert 900 < np.asarray(scan.dataobj).max() < 1900 and (row["age"], row["sex"]) == (known["age"], known["sex"])
    record = json.loads((cohort / "data/phantom.json").read_text())
    assert record["label_codes"] == phantom.LABELS and record["spacing_mm"] == SPACING_MM


def test_subjects_stay_the_same_and_get_older(cohort):
    """Head, sex and diagnosis of a subject do not change; age follows the months; diseased ventricles grow."""
    truth = records(cohort / "data/truth.csv")
    for visits in (truth[i : i + 3] for i in range(0, 48, 3)):
        assert len({(row["subject"], row["sex"], row["diagnosis"], row["seed"]) for row in visits}) == 1
        ages = [float(row["age"]) for row in visits]
        np.testing.assert_allclose(np.diff(ages), 0.5, atol=0.011)
        ventricles = [float(row["ventricle_ml"]) for row in visits]
        assert ventricles[0] < ventricles[1] < ventricles[2] < 1.5 * ventricles[0]
        images = [nifti.load(cohort / "data" / row["path"]).data for row in visits]
        assert np.abs(images[0] - images[1]).max() > 0  # noise and bias field of their own
        assert np.corrcoef(images[0].ravel(), images[2].ravel())[0, 1] > 0.97


def test_labels_bear_out_the_truth(cohort):
    truth = records(cohort / "data/truth.csv")[::3]
    voxel_ml = SPACING_MM**3 / 1000
    labels = [nifti.load_labels(cohort / "data/labels" / f"{row['scan']}.nii.gz").data for row in truth]
    for map_, row in zip(labels, truth, strict=True):
        assert (map_ > 0).sum() * voxel_ml == pytest.approx(float(row["brain_ml"]), rel=0.1)
    codes = [phantom.LABELS["ventricle_left"], phantom.LABELS["ventricle_right"]]
    counted = [np.isin(map_, codes).sum() for map_ in labels]  # coarse: a ventricle is a few voxels
    assert np.corrcoef(counted, [float(row["ventricle_ml"]) for row in truth])[0, 1] > 0.8


def test_disease_model():
    """Classes overlap: AUC of AD against CN high but not 1; ventricles grow with score and age, hippocampi shrink."""
    from sklearn.metrics import roc_auc_score

    subjects = [make_phantom.draw_subject(0, n) for n in range(1, 901)]
    known, factors = zip(*(make_phantom.at_session(s, 0) for s in subjects), strict=True)
    diagnosis = np.array([s["diagnosis"] for s in subjects])
    assert {d: (diagnosis == d).sum() for d in ("AD", "CN", "MCI")} == {"AD": 300, "CN": 300, "MCI": 300}
    two = diagnosis != "MCI"
    score = np.array([k["score"] for k in known])
    ventricle = np.array([f["ventricle_scale"] for f in factors])
    hippocampus = np.array([f["hippocampus_left"] + f["hippocampus_right"] for f in factors])
    age = np.array([s["age"] for s in subjects])
    assert 0.96 < roc_auc_score(diagnosis[two] == "AD", score[two]) < 0.99
    assert 0.87 < roc_auc_score(diagnosis[two] == "AD", ventricle[two]) < 0.95
    assert 0.92 < roc_auc_score(diagnosis[two] == "AD", -hippocampus[two]) < 0.98
    assert 0.4 < roc_auc_score(diagnosis[two] == "AD", age[two]) < 0.6  # ages are alike
    assert np.corrcoef(ventricle, age)[0, 1] > 0.3 and np.corrcoef(hippocampus, age)[0, 1] < -0.2
    assert score[diagnosis == "CN"].mean() < score[diagnosis == "MCI"].mean() < score[diagnosis == "AD"].mean()
    rate = np.array([s["rate"] for s in subjects])
    assert rate[diagnosis == "CN"].mean() < rate[diagnosis == "MCI"].mean() < rate[diagnosis == "AD"].mean()


def test_progression_and_converters():
    steady = [make_phantom.draw_subject(0, n) for n in range(1, 301)]
    fast = [make_phantom.draw_subject(0, n, progression=2.0, converters=0.5) for n in range(1, 301)]
    converters = [s for s in fast if s["converts"]]
    assert 35 <= len(converters) <= 65 and {s["diagnosis"] for s in converters} == {"MCI"}
    for a, b in zip(steady, fast, strict=True):
        assert (a["score"], a["age"], a["own"]) == (b["score"], b["age"], b["own"])
        assert b["rate"] == pytest.approx(0.5 if b["converts"] else 2 * a["rate"])
        assert [make_phantom.at_session(b, m)[0]["diagnosis"] for m in (0, 6, 12)] == (
            ["MCI", "AD", "AD"] if b["converts"] else [a["diagnosis"]] * 3
        )
    first, last = (make_phantom.at_session(converters[0], m) for m in (0, 12))
    assert last[0]["score"] - first[0]["score"] == pytest.approx(0.5)
    assert last[1]["ventricle_scale"] > 1.3 * first[1]["ventricle_scale"]


def test_grid_of_the_paper():
    """128 x 160 x 128 voxels of 1.5 mm; smaller grids hold the same field of view, so nothing is resampled or cut."""
    assert make_phantom.spacing_of((128, 160, 128)) == 1.5
    assert make_phantom.spacing_of((32, 40, 32)) == 6.0 and make_phantom.spacing_of((48, 56, 48)) == 240 / 56
    prep = Preparation((32, 40, 32), 6.0)
    affine = phantom.grid_affine((32, 40, 32), 6.0)
    np.testing.assert_array_equal(preprocess.prepared_affine(affine, (32, 40, 32), prep), affine)


def test_same_seed_same_bytes_whatever_the_number(tmp_path):
    """Another --n_subjects or number of workers leaves every subject as it was; another seed is other people."""
    for name, options in (("a", ("--n_subjects", 1)), ("b", ("--n_subjects", 2, "--num_workers", 0)),
                          ("c", ("--n_subjects", 1, "--seed", 1))):  # fmt: skip
        run_main(make_phantom, "--out", tmp_path / name, *TINY, "--sessions", 0, 24, *options)
    files = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.nii.gz")}
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()
    a, b = (records(tmp_path / name / "data/truth.csv") for name in "ab")
    assert b[:2] == a and len(b) == 4


def test_defects(tmp_path):
    """The acceptance set: a LAS file, int16 with scale and offset, a NaN voxel, a missing age; the heads stay."""
    common = (*TINY, "--n_subjects", 4, "--sessions", 0)
    run_main(make_phantom, "--out", tmp_path / "good", *common)
    run_main(make_phantom, "--out", tmp_path / "bad", *common, "--defects", "--no_labels")
    good, bad = ([row for row in records(tmp_path / name / "data/dataset.csv")] for name in ("good", "bad"))
    paths = [(tmp_path / "good/data" / row["path"], tmp_path / "bad/data" / row["path"]) for row in bad]
    assert nib.aff2axcodes(nib.load(paths[0][1]).affine) == ("L", "A", "S")
    for a, b in paths[:2]:
        np.testing.assert_array_equal(nifti.load(a).data, nifti.load(b).data)
        np.testing.assert_array_equal(nifti.load(a).affine, nifti.load(b).affine)
    scaled = nib.load(paths[1][1])
    assert scaled.get_data_dtype() == np.int16 and (scaled.dataobj.slope, scaled.dataobj.inter) == (0.5, -100)
    with pytest.raises(UserError, match="1 voxels are NaN"):
        nifti.load(paths[2][1])
    assert [row["age"] == "" for row in bad] == [False, False, False, True] and all(row["age"] for row in good)
    truth = records(tmp_path / "bad/data/truth.csv")
    assert [row["defect"] for row in truth] == list(make_phantom.DEFECTS) and truth[3]["age"]
    assert not (tmp_path / "bad/data/labels").exists()


def test_a_smaller_cohort_leaves_nothing_of_the_larger_one(tmp_path):
    """--overwrite replaces the cohort: build_table.py would list subjects that remained."""
    common = (*TINY, "--sessions", 0)
    run_main(make_phantom, "--out", tmp_path, *common, "--n_subjects", 3)
    (tmp_path / "data/scans/notes.txt").write_text("mine")
    run_main(make_phantom, "--out", tmp_path, *common, "--n_subjects", 1, "--overwrite")
    assert len(list(tmp_path.rglob("*.nii.gz"))) == 2 and not (tmp_path / "data/scans/sub-0002").exists()
    assert (tmp_path / "data/scans/notes.txt").read_text() == "mine"


def test_refusals(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/truth.csv").write_text("mine")
    with pytest.raises(UserError, match="truth.csv already holds data"):
        run_main(make_phantom, "--out", tmp_path, *TINY)
    for options, message in ((("--n_subjects", 0), "--n_subjects 0"), (("--seed", -1), "--seed -1"),
                             (("--shape", 8, 28, 24), "between 16 and 192"), (("--sessions", 6, 0), "in order"),
                             (("--sessions", 0, 0), "in order"), (("--converters", 2), "--converters 2"),
                             (("--defects", "--n_subjects", 3), "needs 4 subjects")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            run_main(make_phantom, "--out", tmp_path / "x", *TINY, *options)
    assert not (tmp_path / "x").exists() and (tmp_path / "data/truth.csv").read_text() == "mine"
