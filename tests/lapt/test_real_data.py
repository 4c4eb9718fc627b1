"""Real stroke images where there are any: lesion masks of twelve patients, DWI and ADC of another, a CT template.

No CT perfusion of a patient exists here, and nobody of whom both modalities do. So real lesions are put into
perfusion phantoms, real DWI and ADC go through the autoencoder alone, and samples are made on the grids of real scans.
"""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from common import nifti
from lapt import dataset, diffusion, evaluate, main, make_phantom, preprocessing, sample, vqgan
from tests.helpers import run_main
from tests.lapt import stages
from tests.lapt.untrained import RT, untrained_model

DATA = Path(os.environ.get("REAL_DATA_DIR", "")) / "stroke"
MASKS, CT = DATA / "lesion_masks_mni", DATA / "scct.nii"
DWI, ADC = (DATA / f"sub-strokecase0001_ses-0001_{what}.nii.gz" for what in ("dwi", "adc"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (MASKS.is_dir() and all(path.is_file() for path in (CT, DWI, ADC))),
        reason="REAL_DATA_DIR names no folder with stroke/{scct.nii, lesion_masks_mni/, DWI and ADC of a case}",
    ),
]
CPU = ("--device", "cpu", "--num_workers", 0)


def prepare(raw, folder, *more):
    run_main(preprocessing, "--input_dir", raw, "--output_dir", folder, "--num_workers", 1, *more)


def assert_overlays(made: Path, scan: Path) -> np.ndarray:
    """Same voxels in the same order and place as in the scan's own file; returns the values."""
    a, b = nib.load(made), nib.load(scan)
    assert a.shape == b.shape[:3] and nib.aff2axcodes(a.affine) == nib.aff2axcodes(b.affine)
    np.testing.assert_allclose(a.affine, b.affine, atol=1e-3)
    assert a.header["sform_code"] > 0 and a.header["qform_code"] > 0 and a.header.get_xyzt_units()[0] == "mm"
    return a.get_fdata()


# ---- real lesions in perfusion phantoms -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strokes(tmp_path_factory):
    """Twelve phantoms with cores of the shapes of real lesions, and a run of vqgan, ldm and lapt on them."""
    root = tmp_path_factory.mktemp("strokes")
    run_main(make_phantom, "--out", root, "--shape", 48, 48, 8, "--n_cases", 12, "--lesion_masks", MASKS, "--maps",
             "--num_workers", 1)  # fmt: skip
    prepare(root / "raw", root / "data", "--val_size", 0.2, "--test_size", 0.25)
    for stage, steps in {"vqgan": 12, "ldm": 4, "lapt": 4}.items():
        stages.run(stage, root / "data", root / "runs", f"training.steps={steps}")
    return root


def test_real_lesions_are_hypoperfused_dark_in_adc_and_of_many_sizes(strokes):
    cases = [case for case in dataset.read_cases(strokes / "data") if case.lesion_ml]
    assert len(cases) == 10
    for case in cases:
        lesion, mask = case.volume("lesion") > 0, case.volume("mask") > 0
        ctp, adc = case.volume("ctp"), case.volume("adc")
        cbf, delay = (nifti.load(strokes / "raw" / case.name / f"{what}.nii.gz").data for what in ("cbf", "delay"))
        parts = lesion, mask & ~lesion & (delay < 2)  # core, and what is neither core nor penumbra
        flow = [cbf[part].mean() for part in parts]
        assert flow[0] < 0.2 * flow[1] and np.median(adc[lesion]) < 600 < np.median(adc[parts[1]]), case.name
        if case.lesion_ml > 10:  # enough voxels for the noise to average out
            rise = [np.ptp(ctp[:, part].mean(1)) for part in parts]
            assert rise[0] < 0.35 * rise[1], case.name
    volumes = [case.lesion_ml for case in cases]
    assert min(volumes) < 0.5 and max(volumes) > 100  # from one voxel to a territory


def test_real_lesions_through_training_sampling_and_evaluation(strokes, tmp_path):
    """The lesion term sees them, every test case is sampled, every lesion stands in the table of sizes."""
    rows = stages.log_rows(strokes / "runs", "lapt", "train")
    assert all(np.isfinite(row["loss"]) for row in rows) and rows[-1]["lesion"] > 0
    split = ["--dataroot", strokes / "data", "--split", "test", *CPU]
    run_main(sample, "-r", strokes / "runs" / "lapt", *split, "--steps", 2, "--outdir", tmp_path / "made")
    run_main(evaluate, "--synthetic", tmp_path / "made", *split, "--preset", "smoke", "--figures", 0)
    report = json.loads((tmp_path / "made/evaluation/evaluation.json").read_text())
    with_lesion = [case for case in dataset.read_cases(strokes / "data", "test") if case.lesion_ml]
    assert report["n_with_lesion"] == len(with_lesion) > 0
    table = report["lesion_sizes"]["synthetic"]
    assert sum(row["lesions"] for row in table) >= len(with_lesion)


# ---- real DWI and ADC through the autoencoder -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """The patient's DWI and ADC, prepared. Every 2nd slice trains, the ones between validate and test in turn.

    One patient is no cohort: this says what the autoencoder does with real images, not how well it generalises. There
    is no CT of this patient; the constant CTP beside the images is not used.
    """
    root = tmp_path_factory.mktemp("patient")
    dwi, adc = nifti.load(DWI), nifti.load(ADC)
    mask = (dwi.data > 20) & (adc.data > 0.05)
    ctp = np.where(mask, np.float32(35), np.float32(-1000))[None].repeat(2, 0)
    ctp[1][mask] += 10
    for name, first, step in (("a", 0, 2), ("b", 1, 4), ("c", 3, 4)):
        affine = dwi.affine.copy()
        affine[:, 3] = dwi.affine @ [0, 0, first, 1]
        affine[:, 2] *= step
        files = {"ctp": ctp, "dwi": dwi.data, "adc": adc.data, "mask": mask}
        for what, data in files.items():
            nifti.save(root / "raw" / name / f"{what}.nii.gz", data[..., first::step], affine)
    (root / "splits").mkdir()
    for split, name in (("train", "a"), ("val", "b"), ("test", "c")):
        (root / "splits" / f"{split}_list.json").write_text(json.dumps([name]))
    prepare(root / "raw", root / "data", "--splits", root / "splits", "--fill_holes")
    return root


def test_real_dwi_and_adc_have_known_units(patient):
    """The ADC's unit is found (it is stored in 1e-3 mm²/s), every slice keeps its size and its quantiles."""
    for case in dataset.read_cases(patient / "data"):
        assert case.shape[:2] == (112, 112) and len(case.slices) > 0
        mask, adc = case.volume("mask") > 0, case.volume("adc")
        assert 600 < np.median(adc[mask]) < 1300 and case.stats["adc"]["high"] > 2000  # tissue, and fluid
        assert 900 < case.brain_ml < 1600  # every second or fourth slice, all over the brain


def test_autoencoder_of_real_dwi_and_adc_at_native_size(patient, capsys):
    """A short training at tiny widths on 112 x 112 pixels: slices it has not seen come back, and the error is told."""
    how = ("training.steps=160 training.batch_size=2 training.val_every=5 training.lr=4e-3 training.ema_decay=0 "
           "training.lr_schedule=cosine training.revive_every=20 data.augment=none model.n_embed=256 "
           "loss.disc_weight=0 loss.l2_weight=1").split()  # fmt: skip
    stages.run("vqgan", patient / "data", patient / "runs", *how)
    run_main(main, "-r", patient / "runs" / "vqgan", "--device", "cpu")  # the test pass
    found = json.loads((patient / "runs/vqgan/test.json").read_text())
    error = found["scores"]["brain"]

    trained = vqgan.load_vqgan(patient / "runs" / "vqgan", RT)
    truth, made = [], []
    for item in dataset.Slices(patient / "data", "test", trained.intensity, with_ctp=False):
        inside = item["mask"][0] > 0
        with torch.no_grad():
            x_hat = trained.model.decode(trained.model.encode(item["mri"][None]))[0]
        truth.append(item["mri"][:, inside])
        made.append(x_hat[:, inside])
    truth, made = (torch.cat(parts, 1).numpy() for parts in (truth, made))
    r = [np.corrcoef(*pair)[0, 1] for pair in zip(truth, made, strict=True)]
    constant = np.abs(truth - np.median(truth, axis=1, keepdims=True)).mean()
    unit = [trained.intensity.range(m) / 2 * np.abs(pair[0] - pair[1]).mean()
            for m, *pair in zip(dataset.MODALITIES, truth, made, strict=True)]  # fmt: skip
    with capsys.disabled():
        print(f"\n{found['n']} unseen slices of 112 x 112: L1 in the brain {error:.3f} of [-1, 1], "
              f"{constant:.3f} if every pixel were the median; DWI {unit[0]:.0f}, r {r[0]:.2f}; "
              f"ADC {unit[1]:.0f}e-6 mm^2/s, r {r[1]:.2f}")  # fmt: skip
    assert error < 0.9 * constant and min(r) > 0.4


# ---- samples on the grids of real scans -----------------------------------------------------------------------------


def test_sample_lies_on_the_grid_of_a_real_scan(strokes, tmp_path):
    """Facts 20 and 21: a perfusion phantom stored as the real DWI is, oblique and from left to right."""
    scan = nib.load(DWI)
    affine = scan.affine @ np.diag([1, 1, 4, 1])  # every 4th slice, to save time
    shape = (*scan.shape[:2], -(-scan.shape[2] // 4))
    folder = strokes / "raw" / "case_0001"
    ctp, mask = nifti.load(folder / "ctp.nii.gz", series=True), nifti.load(folder / "mask.nii.gz")
    frames = [nifti.resample_to(nifti.Volume(f, ctp.affine), shape, affine, fill=-1000).data for f in ctp.data]
    brain = nifti.resample_to(nifti.Volume(mask.data, mask.affine), shape, affine).data > 0.5
    nifti.save(tmp_path / "ctp.nii.gz", np.stack(frames), affine)
    nifti.save(tmp_path / "mask.nii.gz", brain, affine, dtype=np.uint8)
    assert nib.aff2axcodes(nib.load(tmp_path / "ctp.nii.gz").affine) == ("L", "A", "S")
    run_main(sample, "-r", strokes / "runs" / "lapt", "--ctp", tmp_path / "ctp.nii.gz", "--mask",
             tmp_path / "mask.nii.gz", "--case", "real", "--steps", 2, "--outdir", tmp_path / "out", *CPU)  # fmt: skip
    for what in dataset.MODALITIES:
        made = assert_overlays(tmp_path / "out/real" / f"{what}_sample_0.nii.gz", tmp_path / "ctp.nii.gz")
        assert (made[~brain] == 0).all() and (made[brain] > 0).mean() > 0.9
    assert json.loads((tmp_path / "out/real/sample.json").read_text())["units"]["adc"] == "1e-6 mm^2/s"


def test_sample_of_a_real_head_without_a_mask(tmp_path):
    """A real CT head with skull and an imitated bolus: its brain is found, and the sample lies in it, nowhere else."""
    head = nib.load(CT)
    stored = np.asarray(head.dataobj, np.float32)
    # Cormack units of the template back to HU: its maker stretches -100 to 100 HU by 11
    hu = np.where(stored < 900, stored - 1000, np.where(stored < 3100, (stored - 900) / 11 - 100, stored - 3000))
    soft = (hu > 10) & (hu < 80)
    series = np.stack([hu + bolus * soft for bolus in (0, 10, 20, 5)])
    nifti.save(tmp_path / "head.nii.gz", series, head.affine)
    diffusion.save_model(tmp_path / "model.ckpt", untrained_model(time_points=4))
    run_main(sample, "-r", tmp_path / "model.ckpt", "--ctp", tmp_path / "head.nii.gz", "--make_masks", "--steps", 2,
             "--outdir", tmp_path / "out", *CPU)  # fmt: skip
    made = assert_overlays(tmp_path / "out/head/adc_sample_0.nii.gz", tmp_path / "head.nii.gz")
    brain = made > 0
    assert 900 < brain.sum() * 0.008 < 2000  # ml
    assert (hu[brain] < 120).all() and (hu[brain] > -10).mean() > 0.95
    centre = nib.affines.apply_affine(head.affine, np.argwhere(brain).mean(0))
    assert abs(centre[0]) < 5 and np.abs(centre).max() < 40
