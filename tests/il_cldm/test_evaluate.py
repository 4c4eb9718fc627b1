"""The evaluation report: everybody counts, by hand the same, ceilings and baselines, and no circular detection."""

import csv
import json
import shutil

import numpy as np
import pytest

from common import nifti
from common.cli import UserError
from il_cldm import amyloid
from tests.il_cldm.conftest import call
from tests.il_cldm.test_pipeline import MRI, PET, SYN, names

REGIONS = "data/process/regions_112"


def report(root, folder=SYN):
    return json.loads((root / folder / "evaluation.json").read_text())


def rows(root):
    with open(root / SYN / "evaluation.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_subject_counts_and_means_are_by_hand(trained):
    found, table = report(trained), rows(trained)
    listed = names(trained, "test")
    assert found["n"] == 3 and len(table) == 9
    errors = {"mae": [], "mae_mask": [], "psnr": []}
    for name in listed:
        truth, fake = nifti.load(trained / PET / name).data, nifti.load(trained / SYN / name).data
        inside = nifti.load_labels(trained / REGIONS / name).data > 0
        errors["mae"].append(np.abs(truth - fake).mean())
        errors["mae_mask"].append(np.abs(truth - fake)[inside].mean())
        errors["psnr"].append(-10 * np.log10(np.mean((truth.astype(float) - fake) ** 2)))
        (row,) = [r for r in table if r["subject"] == name.removesuffix(".nii.gz") and r["method"] == "synthetic"]
        for metric, values in errors.items():
            assert float(row[metric]) == pytest.approx(values[-1], rel=1e-5), metric
    for metric, values in errors.items():
        entry = found["metrics"]["synthetic"][metric]
        assert entry["n"] == 3
        assert entry["mean"] == pytest.approx(np.mean(values), rel=1e-5)
        assert entry["sd"] == pytest.approx(np.std(values, ddof=1), rel=1e-3)
        assert entry["ci95"][0] <= entry["mean"] <= entry["ci95"][1]


def test_ceiling_and_baseline(trained):
    table = report(trained)["metrics"]
    for metric in ("psnr", "ssim", "psnr_mask"):
        assert table["autoencoder"][metric]["mean"] >= table["synthetic"][metric]["mean"], metric
    mean = np.mean([nifti.load(trained / PET / n).data for n in names(trained, "train")], axis=0)
    errors = [np.abs(mean - nifti.load(trained / PET / n).data).mean() for n in names(trained, "test")]
    assert table["mean_image"]["mae"]["mean"] == pytest.approx(np.mean(errors), rel=1e-4)
    difference = report(trained)["synthetic_minus_mean_image"]["mae"]["mean"]
    assert difference == pytest.approx(table["synthetic"]["mae"]["mean"] - table["mean_image"]["mae"]["mean"], rel=1e-5)


def test_report_names_its_conventions(trained):
    found = report(trained)
    assert found["data_range"] == 1.0 and "gaussian" in found["ssim"] and "7x7x7" in found["ssim_uniform"]
    assert found["mask"] == "region map > 0" and found["generation"]["sampler"] == "dpm"
    assert (trained / SYN / "figures" / "suvr.png").stat().st_size > 1000
    detection = found["amyloid"]["detection"]
    assert {"SUVR of synthetic PET", "MRI-only CNN", "PET CNN on synthetic PET"} <= set(detection)


def test_perfect_synthesis_scores_perfectly(study):
    """True PET in the place of the synthetic one: no error, SUVR without bias, AUC 1 when both classes are there."""
    listed = names(study, "test")
    suvrs = []
    settings = json.loads((study / "data_info" / "prepare.json").read_text())
    for name in listed:
        shutil.copy(study / PET / name, study / SYN / name)
        labels = nifti.load_labels(study / REGIONS / name).data
        target, reference = settings["target_labels"], settings["reference_labels"]
        suvrs.append(amyloid.suvr(nifti.load(study / PET / name).data, labels, target, reference))
    threshold = float(np.median(suvrs))  # two at or above, one below
    call(study, "--evaluate", "--suvr_threshold", threshold)
    found = report(study)
    assert found["metrics"]["synthetic"]["mae"]["mean"] == 0 and found["metrics"]["synthetic"]["ssim"]["mean"] == 1
    status = found["amyloid"]
    assert status["n_positive"] == 2 and status["suvr_mae"] == 0
    assert status["suvr_correlation"] == pytest.approx(1)
    scores = status["detection"]["SUVR of synthetic PET"]
    assert scores["auc"] == 1 and scores["balanced_accuracy"] == 1
    chance = status["detection"]["chance (random scores)"]["auc"]
    assert 0.3 < chance < 0.7


def test_outputs_with_a_true_label_are_kept_out_of_detection(study, capsys):
    threshold = ("--suvr_threshold", 1.29)
    call(study, "--gen", "--label", "csv", "--out", study / "with_label")
    call(study, "--evaluate", "--out", study / "with_label", *threshold)
    status = report(study, "with_label")["amyloid"]
    assert "--label csv: excluded from detection" in status["flag"]
    assert not [name for name in status["detection"] if "synthetic" in name]
    assert "excluded from detection" in capsys.readouterr().out
    call(study, "--gen", "--label", "predicted", "--out", study / "predicted")
    call(study, "--evaluate", "--out", study / "predicted", *threshold)
    status = report(study, "predicted")["amyloid"]
    assert "flag" not in status and "SUVR of synthetic PET" in status["detection"]


def test_one_class_only_has_no_auc_and_no_crash(study):
    call(study, "--evaluate", "--suvr_threshold", 99)
    scores = report(study)["amyloid"]["detection"]["SUVR of synthetic PET"]
    assert np.isnan(scores["auc"]) and "all 3 labels are 0" in scores["reason"]


def test_without_region_maps_the_mask_is_the_mri(study):
    shutil.rmtree(study / REGIONS)
    call(study, "--evaluate")
    found = report(study)
    assert found["mask"] == "MRI > 0.05" and "needs region maps" in found["amyloid"]["skipped"]
    name = names(study, "test")[0]
    truth, fake = nifti.load(study / PET / name).data, nifti.load(study / SYN / name).data
    expected = np.abs(truth - fake)[nifti.load(study / MRI / name).data > 0.05].mean()
    assert float(rows(study)[0]["mae_mask"]) == pytest.approx(expected, rel=1e-5)


def test_missing_foreign_or_misplaced_synthetic_pet(study):
    name = names(study, "test")[1]
    stem = name.removesuffix(".nii.gz")
    fake = nifti.load(study / SYN / name)
    (study / SYN / name).unlink()
    with pytest.raises(UserError, match=f"{stem}: no synthetic PET in .*--gen"):
        call(study, "--evaluate")
    for data, shift in ((fake.data[:12], 0), (fake.data, 5)):
        affine = fake.affine.copy()
        affine[0, 3] += shift
        nifti.save(study / SYN / name, data, affine)
        with pytest.raises(UserError, match=f"{stem}: .* lie on different grids"):
            call(study, "--evaluate")
    path = study / SYN / "generation.json"
    record = json.loads(path.read_text())
    del record["labels"][name]
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"{stem}: no synthetic PET in"):
        call(study, "--evaluate")


def test_other_splits_can_be_judged(study):
    call(study, "--gen", "--evaluate", "--split", "validation", "--out", study / "val")
    found = report(study, "val")
    assert found["n"] == 1 and found["split"] == "validation"
    assert np.isnan(found["metrics"]["synthetic"]["psnr"]["sd"])


def test_suvr_closed_form():
    labels = np.zeros((4, 4, 4), int)
    labels[0], labels[1], labels[2] = 1, 2, 7
    pet = np.select([labels == 1, labels == 2, labels == 7], [0.6, 0.3, 0.4], 0.9).astype(np.float32)
    assert amyloid.suvr(pet, labels, (1, 7), (2,)) == pytest.approx(0.5 / 0.3)
    assert amyloid.suvr(pet / 3, labels, (1, 7), (2,)) == pytest.approx(0.5 / 0.3)  # the scaling of PET cancels
    for target, reference, which in (((9,), (2,), "target"), ((1,), (9,), "reference")):
        with pytest.raises(UserError, match=f"without voxels of {which} codes"):
            amyloid.suvr(pet, labels, target, reference)
