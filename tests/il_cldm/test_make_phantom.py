"""il_cldm/make_phantom.py as a user runs it: layout, determinism, refusal to overwrite, couplings, raw files."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from common import nifti, phantom
from il_cldm import make_phantom

SCRIPT = Path(make_phantom.__file__)
SMALL = ("--shape", "16", "20", "16", "--n_val", "1", "--n_test", "3")


def call(*options):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, options)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    out = tmp_path_factory.mktemp("cohort")
    done = call("--out", out, *SMALL, "--n_train", 2, "--native")
    assert done.returncode == 0, done.stderr
    return out


def truth_rows(out):
    return {row["filename"]: row for row in csv.DictReader(open(out / "truth.csv"))}


def test_layout_and_record(cohort):
    lists = {split: (cohort / "data_info" / f"{split}.txt").read_text().split() for split in ("train", "val", "test")}
    names = sum(lists.values(), [])
    assert (
        [len(v) for v in lists.values()] == [2, 1, 3]
        and len(set(names)) == 6
        and lists["train"][0] == "001S0001.nii.gz"
    )
    assert list(csv.reader(open(cohort / "data_info/data_info.csv")))[0] == ["filename", "label_id"]
    record, rows = json.loads((cohort / "data_info/prepare.json").read_text()), truth_rows(cohort)
    assert list(rows) == names and set(record["subjects"]) == set(names)
    for name in names:
        volumes = [nifti.load(cohort / f / name) for f in (make_phantom.PET, make_phantom.MRI)]
        labels = nifti.load_labels(cohort / make_phantom.REGIONS / name)
        for v in volumes:
            assert v.shape == (16, 20, 16) == labels.shape and 0 <= v.data.min() and 0.3 < v.data.max() <= 1
            np.testing.assert_allclose(v.affine, phantom.grid_affine((16, 20, 16)), atol=1e-4)
        assert nib.load(cohort / make_phantom.REGIONS / name).get_data_dtype() == np.int16
        measured = phantom.composite_suvr(
            volumes[0].data, labels.data, record["target_labels"], record["reference_labels"]
        )
        assert measured == pytest.approx(float(rows[name]["measured_suvr"]), rel=1e-3)  # the divisor keeps ratios
        assert (measured >= record["suvr_threshold"]) == bool(int(rows[name]["amyloid_positive"]))
        assert float(rows[name]["composite_suvr"]) == pytest.approx(measured, abs=0.5)


def test_refuses_to_overwrite_and_repeats_byte_for_byte(cohort, tmp_path):
    before = (cohort / "truth.csv").stat().st_mtime_ns
    refused = call("--out", cohort, *SMALL, "--n_train", 2)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and refused.stderr.startswith("error: ")
    assert (cohort / "truth.csv").stat().st_mtime_ns == before
    longer = call(
        "--out", tmp_path, *SMALL, "--n_train", 3, "--num_workers", 1
    )  # more subjects: the others stay the same
    assert longer.returncode == 0, longer.stderr
    first, second = truth_rows(cohort), truth_rows(tmp_path)
    assert len(second) == 7 and all(second[name] == row for name, row in first.items())
    for name in first:
        for folder in (make_phantom.PET, make_phantom.MRI, make_phantom.REGIONS):
            assert (cohort / folder / name).read_bytes() == (tmp_path / folder / name).read_bytes()
    again = call("--out", tmp_path, *SMALL, "--n_train", 3, "--overwrite")
    assert again.returncode == 0, again.stderr


def test_bad_options(tmp_path):
    for options in (("--n_val", 0), ("--shape", 8, 8, 8), ("--coupling", "both"), ("--pet_divisor", 0)):
        done = call("--out", tmp_path / "x", *options)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and not (tmp_path / "x").exists()


def test_raw_files_are_the_same_head_in_another_space(cohort):
    name = "001S0001"
    mri, pet, labels = (
        cohort / "raw" / f for f in (f"mri/{name}_T1w.nii.gz", f"pet/{name}_pet.nii.gz", f"labels/{name}_dseg.nii.gz")
    )
    stored = nib.load(mri)
    assert nib.aff2axcodes(stored.affine) == ("L", "A", "S") and nib.aff2axcodes(nib.load(pet).affine) == (
        "L",
        "P",
        "S",
    )
    assert stored.get_data_dtype() == np.int16 and 500 < np.asarray(stored.dataobj).max() <= 1500
    t1, brain, uptake = nifti.load(mri), nifti.load_labels(labels), nifti.load(pet)
    assert np.ptp(t1.spacing_mm) > 1 and t1.shape == brain.shape != uptake.shape
    on_mri = nifti.resample_to(uptake, t1.shape, t1.affine).data
    assert on_mri[brain.data > 0].mean() > 5 * on_mri[brain.data == 0].mean()  # PET and MRI share a world
    prepared = nifti.load(cohort / make_phantom.MRI / f"{name}.nii.gz")
    assert (t1.data > 200).sum() * np.prod(t1.spacing_mm) == pytest.approx(
        (prepared.data > 0.2).sum() * np.prod(prepared.spacing_mm), rel=0.15
    )


def draws(coupling, n=200):
    drawn = [make_phantom.draw_subject(1, i, coupling) for i in range(1, n + 1)]
    column = {k: np.array([d["factors"][k] for d in drawn]) for k in drawn[0]["factors"]}
    return column, np.array([d["amyloid_positive"] for d in drawn]), np.array([d["label_id"] for d in drawn])


def test_independent_uptake_is_unrelated_to_mri_and_label():
    factors, positive, label = draws("independent")
    for name in ("age", "atrophy", "ventricle_scale", "hippocampus_left", "hippocampus_right"):
        assert abs(np.corrcoef(factors[name], factors["amyloid_load"])[0, 1]) < 0.16  # 2.2 standard errors
        assert 0.4 < roc_auc_score(positive, factors[name]) < 0.6
    assert all(positive[label == k].mean() == 0.5 for k in range(4))
    assert ((factors["amyloid_load"] >= make_phantom.POSITIVE_LOAD) == positive).all()
    assert np.corrcoef(factors["ventricle_scale"], label)[0, 1] > 0.6  # the MRI still shows the disease


def test_coupled_uptake_follows_what_the_mri_shows_and_the_label():
    factors, positive, label = draws("mri")
    assert 0.85 < roc_auc_score(positive, factors["ventricle_scale"]) < 0.99
    assert (
        0.85 < roc_auc_score(positive, factors["atrophy"]) < 0.99
        and roc_auc_score(positive, -factors["hippocampus_left"]) > 0.8
    )
    assert np.all(np.diff([factors["amyloid_load"][label == k].mean() for k in range(4)]) > 0.03)
    assert ((factors["amyloid_load"] >= make_phantom.POSITIVE_LOAD) == positive).all() and 0.35 < positive.mean() < 0.65
    truth = [
        phantom.anatomy(i, (16, 16, 16), phantom.Factors(ventricle_scale=s)).truth
        for i, s in enumerate(factors["ventricle_scale"][:16])
    ]
    assert roc_auc_score(positive[:16], [t["ventricle_ml"] for t in truth]) > 0.8  # also from the measured volume
