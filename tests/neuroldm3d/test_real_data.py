"""The whole chain on real anatomy: grey-matter maps from the DLMUSE label maps of 22 IXI subjects, at a small size.

The binary label is made up: sex, women in the place of HC and men in that of TLE. Nobody here has epilepsy; what is
tested is that every stage works on real input and that every output lies where its input lies.
"""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common import nifti, phantom
from common.cli import UserError
from neuroldm3d import audit, data_split, dataset, from_labels, preprocess, regions
from neuroldm3d.classifier import run_saliency_generation
from neuroldm3d.classifier import train as classifier_train
from neuroldm3d.diffusion import memorisation, per_slice_fid, save_synth
from neuroldm3d.diffusion import train as dit_train
from neuroldm3d.preprocess import Preparation
from neuroldm3d.VAE import infer, save_latent
from neuroldm3d.VAE import train as vae_train
from tests.helpers import run_main
from tests.neuroldm3d.stages import COMMON, TINY_DIT

DATA = Path(os.environ.get("REAL_DATA_DIR", "")) / "brain_t1"
LABELS, PEOPLE = DATA / "ixi_2mm_dlmuse", DATA / "ixi_2mm" / "participants.csv"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (LABELS.is_dir() and PEOPLE.is_file()),
        reason="REAL_DATA_DIR names no folder with brain_t1/ixi_2mm_dlmuse and brain_t1/ixi_2mm/participants.csv",
    ),
]
PREP = Preparation(shape=(32, 40, 32))
VAE = (
    "--preset smoke --channels 4 8 16 --norm_groups 4 --latent_channels 4 --steps 100 --vae_lr 5e-3 --ema_decay 0.9 "
    "--val_every 10 --sample_every 0"
).split()
DIT = [*TINY_DIT, *"--patch_size 2 2 2 --steps 60 --latent_mean voxel --model_mean_type v".split()]
CLASSIFIER = "--preset smoke --filters 8 16 --batch_size 4 --epochs 3 --steps_per_epoch 5 --bootstrap 50".split()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Label maps to maps and tables, then every stage, as the README lists them."""
    root = tmp_path_factory.mktemp("real")
    run_main(from_labels, "--labels", LABELS, "--csv", PEOPLE, "--out", root, "--shape", 33, 41, 33)
    master = root / "data_csvs/master.csv"
    run_main(audit, "--csv", master, "--root", root, "--report", root / "audit.json")
    run_main(data_split, "--csv", master, "--root", root, "--held_out_fraction", 0.45, "--selection_fraction", 0.4)
    run_main(vae_train, "--root", root, *COMMON, *VAE)
    run_main(infer, "--root", root, *COMMON, "--csv", root / "data_csvs/test.csv", "--regions", root / "data/regions")
    run_main(save_latent, "--root", root, *COMMON)
    run_main(dit_train, "--root", root, *COMMON, *DIT)
    run_main(save_synth, "--root", root, *COMMON, "--n_per_class", 5, "--steps", 10)
    run_main(per_slice_fid, "--root", root, *COMMON, "--preset", "smoke", "--bootstrap", 2)
    run_main(memorisation, "--root", root, *COMMON, "--top_pairs", 1, "--ms_ssim_pairs", 2)
    run_main(classifier_train, "--root", root, *COMMON, *CLASSIFIER, "--num_synth_samples", 8)
    run_main(run_saliency_generation, "--root", root, *COMMON, "--pictures", 1, "--sanity_samples", 1)
    return root


def read(root, name):
    return json.loads((root / name).read_text())


def rows(root, split):
    return dataset.read_table(root / f"data_csvs/{split}.csv")


def label_map(name):
    return nifti.load_labels(LABELS / f"{name}_T1_DLMUSE.nii.gz")


def test_maps_hold_the_subjects_own_grey_matter(study):
    """Modulated: the sum over the map is the volume of the labels, though the head was enlarged to the template."""
    record, codes = read(study, "data/from_labels.json"), phantom.codes(phantom.MUSE, from_labels.GREY)
    assert "not a diagnosis" in record["label"] and len(record["to_mni"]) == 22
    for row in rows(study, "master")[:6]:
        grey, source = nifti.load(row.file), label_map(row.name)
        own_ml = np.isin(source.data, codes).sum() * np.prod(source.spacing_mm) / 1000
        assert 450 < own_ml < 900
        assert grey.data.sum() * np.prod(grey.spacing_mm) / 1000 == pytest.approx(own_ml, rel=0.02)
        assert grey.data.min() >= 0 and 0.4 < grey.data.max() < 1.2
        assert 1 < np.linalg.det(np.array(record["to_mni"][row.name])[:3, :3]) < 2  # MNI heads are large


def test_maps_lie_on_their_label_maps_and_on_the_template(study):
    """Taken back by its matrix, a map covers the subject's grey matter; in MNI space all brains cover one another."""
    matrices, codes = read(study, "data/from_labels.json")["to_mni"], phantom.codes(phantom.MUSE, from_labels.GREY)
    brains = []
    for row in rows(study, "master")[:6]:
        grey, source, matrix = nifti.load(row.file), label_map(row.name), np.array(matrices[row.name])
        back = nifti.Volume(grey.data, np.linalg.inv(matrix) @ grey.affine)
        found = nifti.resample_to(back, source.shape, source.affine).data
        mask = np.isin(source.data, codes).astype(np.float32)
        coarse = nifti.resample(nifti.Volume(mask, source.affine), grey.spacing_mm)
        expected = nifti.resample_to(coarse, source.shape, source.affine).data
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9
        labels = nifti.load_labels(study / "data/regions" / row.file.name)
        assert labels.shape == grey.shape and np.allclose(labels.affine, grey.affine)
        brains.append(labels.data > phantom.LABELS["csf"])
        for side, sign in (("left", -1), ("right", 1)):  # the hippocampus is where MNI has it
            inside = np.argwhere(labels.data == phantom.LABELS[f"hippocampus_{side}"])
            centre = inside.mean(0) @ labels.affine[:3, :3].T + labels.affine[:3, 3]
            np.testing.assert_allclose(centre, [sign * 28, -21, -14], atol=8)
    dice = [2 * (a & b).sum() / (a.sum() + b.sum()) for i, a in enumerate(brains) for b in brains[:i]]
    assert np.mean(dice) > 0.9


def test_the_audit_finds_people_not_copies_and_the_split_shares_nobody(study):
    report = read(study, "audit.json")
    assert report["rows"] == report["subjects"] == 22 and report["blocking"] == []
    assert any("site" in text for text in report["warnings"])
    names = [row.name for split in ("train", "val", "test") for row in rows(study, split)]
    assert len(names) == len(set(names)) == 22
    assert all({row.label for row in rows(study, split)} == {0, 1} for split in ("train", "val", "test"))
    with pytest.raises(UserError, match="there already"):
        run_main(data_split, "--csv", study / "data_csvs/master.csv", "--root", study)


def test_reconstructions_overlay(study):
    """On each subject's prepared grid, and alike after a few steps of training."""
    volumes = dataset.Volumes(PREP, None)
    mean = np.mean([volumes.load(row) for row in rows(study, "train")], axis=0)
    errors = []
    for row in rows(study, "test"):
        original, recon = (nib.load(study / f"reconstructions/{row.name}_{k}.nii.gz") for k in ("original", "recon"))
        for image in (original, recon):
            assert image.shape == PREP.shape
            np.testing.assert_allclose(image.affine, volumes.affine(row), atol=1e-4)
        x, x_hat = original.get_fdata(), recon.get_fdata()
        np.testing.assert_allclose(x, preprocess.denormalise(volumes.load(row), PREP), atol=1e-6)
        errors.append([np.corrcoef(x.ravel(), x_hat.ravel())[0, 1], np.square(x - x_hat).mean(),
                       np.square(x - mean * PREP.norm_scale).mean()])  # fmt: skip
    print("correlation, MSE of reconstructions and of the mean map:", *np.mean(errors, axis=0))
    assert min(correlation for correlation, *_ in errors) > 0.8
    table = read(study, "reconstructions/summary_metrics.json")["metrics"]["all"]
    assert {"region_hippocampus_left_mse", "region_frontal_mse"} <= table.keys()


def test_samples_are_on_the_training_grid_in_grey_matter_fraction(study):
    volumes, train = dataset.Volumes(PREP, None), rows(study, "train")
    head = np.mean([volumes.load(row) for row in train], axis=0) > 0.2
    for row in dataset.synthetic_rows(study / "synthetic_data"):
        image = nib.load(row.file)
        np.testing.assert_allclose(image.affine, volumes.affine(train[0]), atol=1e-3)
        data = np.flip(image.get_fdata(), 0) if image.affine[0, 0] > 0 else image.get_fdata()
        assert data.min() >= 0 and data.max() < 2
        print(row.name, "mean in the head over mean outside:", data[head].mean() / data[~head].mean())
        assert data[head].mean() > 5 * data[~head].mean()  # grey matter where people have it
    assert read(study, "synthetic_data/synthetic.json")["units"] == "GM fraction"


def test_evaluation_speaks_of_its_numbers(study):
    fid = read(study, "fid_results/fid_results.json")
    assert fid["n"] == len(fid["selection"]["real"]) and fid["warnings"] and "not for reporting" in str(fid["features"])
    assert np.isfinite(fid["overall"]["synthetic"]["fid"]) and np.isfinite(fid["overall"]["baseline"]["fid"])
    audit_of_copies = read(study, "memorisation_results/summary.json")["spaces"]["latent"]["verdict"]
    assert isinstance(audit_of_copies["memorised"], bool) and audit_of_copies["text"]
    metrics = read(study, "runs/classifier/exp_1/all_folds_metrics.json")
    assert metrics["mode"] == "mixed" and metrics["n_test"] == len(rows(study, "test"))
    low, high = metrics["overall_results"]["auc_roc"]["ci95"]
    assert 0 <= low <= high <= 1


def test_saliency_maps_overlay_on_the_maps_they_explain(study):
    """NIfTI on the grid of each subject's file, with nothing outside the field of view that the network sees."""
    out = study / "runs/classifier/exp_1/saliency/fold_1"
    names = read(study, "runs/classifier/exp_1/saliency/fold_1/saliency.json")["subjects"]
    assert sorted(names) == sorted(row.name for row in rows(study, "test"))
    for row in rows(study, "test"):
        source = nib.load(row.file)
        maps = list(out.rglob(f"{row.name}_*_attributions.nii.gz"))
        assert len(maps) == 4
        for path in maps:
            image = nib.load(path)
            assert image.shape == source.shape and np.isfinite(image.get_fdata()).all()
            np.testing.assert_allclose(image.affine, source.affine, atol=1e-5)
            assert np.abs(image.get_fdata()).max() > 0
        xgrad = nib.load(out / f"input_x_gradient/{row.name}/{row.name}_input_x_gradient_attributions.nii.gz")
        size, grey = np.abs(xgrad.get_fdata()), source.get_fdata()
        assert size[grey > 0.02].sum() > 0.9 * size.sum()  # zero where the input is: it lies on the head
    assert (out / "region_shares.csv").is_file() and len(list(out.rglob("*_overlay.png"))) == 4


def test_an_age_split_and_regions_of_the_template(study, tmp_path):
    """The other made-up label; and region volumes of real maps through the mean region map."""
    run_main(from_labels, "--labels", LABELS, "--csv", PEOPLE, "--out", tmp_path, "--shape", 17, 21, 17,
             "--label_column", "Age", "--threshold", 60)  # fmt: skip
    for row in rows(tmp_path, "master"):
        assert row.label == (row.covariates["age"] >= 60)
    codes = {"hippocampus": [phantom.LABELS[f"hippocampus_{side}"] for side in ("left", "right")]}
    train = rows(study, "train")
    region = regions.mean_region_map([study / "data/regions" / row.file.name for row in train], codes, PREP)
    table = regions.region_table(rows(study, "test"), dataset.Volumes(PREP, None), region)
    own = []
    for row, entry in zip(rows(study, "test"), table, strict=True):
        source = label_map(row.name)
        own.append(np.isin(source.data, (47, 48)).sum() * np.prod(source.spacing_mm))
        assert 2000 < entry["hippocampus"] < 12000 and 5000 < own[-1] < 12000
    print("hippocampus, mm3, by mean region map and by own labels:", [round(e["hippocampus"]) for e in table], own)
