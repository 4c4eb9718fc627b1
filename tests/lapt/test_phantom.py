"""make_phantom.py: physics against closed forms, truth borne out, lesion shapes, equal seed equal bytes."""

import csv
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.integrate import trapezoid

from common import nifti
from common.cli import UserError
from common.phantom import CENTRE_MM
from lapt import make_phantom
from tests.helpers import run_main
from tests.lapt.conftest import N_CASES, SHAPE, SPACING_MM

TINY = ("--shape", 24, 24, 4, "--num_workers", 1)


def records(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def images(root, case):
    """The images of a case by name, and its label map."""
    folder = root / "raw" / case
    loaded = {what: nifti.load(folder / f"{what}.nii.gz").data for what in ("dwi", "adc", "mask", "lesion")}
    loaded["ctp"] = nifti.load(folder / "ctp.nii.gz", series=True).data
    return loaded, nifti.load_labels(root / "labels" / f"{case}.nii.gz").data


# ---- physics


def test_arterial_input_is_a_gamma_variate():
    t = np.arange(0, 60, 0.001)
    aif = make_phantom.arterial_input(t, arrival_s=6.0, width_s=2.0)
    assert aif[t < 6].max() == 0 and aif.max() == pytest.approx(450)
    assert t[aif.argmax()] == pytest.approx(12.0, abs=2e-3)
    assert trapezoid(aif, t) == pytest.approx(450 * 2.0 * 6 * (np.e / 3) ** 3, rel=1e-5)  # Gamma(4) (e/3)^3


def test_tissue_curves_convolve_exactly():
    """A constant input gives a m (1 - exp(-t/m)), a ramp m (t - m (1 - exp(-t/m))): linear inputs without any error."""
    dt, m = 0.5, np.array([0.7, 4.0, 30.0])
    t = np.arange(41) * dt
    grown = 1 - np.exp(-t / m[:, None])
    np.testing.assert_allclose(make_phantom.tissue_curves(np.full(41, 3.0), dt, m), 3 * m[:, None] * grown, rtol=1e-12)
    ramp = m[:, None] * (t - m[:, None] * grown)
    np.testing.assert_allclose(make_phantom.tissue_curves(t, dt, m), ramp, rtol=1e-10, atol=1e-12)


def test_central_volume_theorem():
    """Area under a tissue curve = CBF * MTT * area of the input; a delay shifts the curve and changes nothing else."""
    times, bolus = np.arange(0, 400, 0.5), (6.0, 2.0)
    cbf, mtt, delay = np.array([60.0, 25.0, 7.0]), np.array([4.0, 4.8, 12.0]), np.array([0.0, 1.0, 8.0])
    curves = make_phantom.enhancement(cbf, mtt, delay, times, *bolus)
    area_in = trapezoid(make_phantom.arterial_input(times, *bolus), times)
    np.testing.assert_allclose(trapezoid(curves, times, axis=0), cbf / 6000 * mtt * area_in, rtol=2e-3)
    late = make_phantom.enhancement(cbf, mtt, delay + 5, times, *bolus)
    np.testing.assert_allclose(late[10:], curves[:-10], atol=1e-3)
    assert (curves[times <= 6.0] == 0).all()
    assert 8 < curves[:, 0].max() < 16 and 3 < curves[:, 1].max() < 8  # HU, as in patients


# ---- cohort


def test_layout(cohort):
    truth = records(cohort / "truth.csv")
    assert [row["case"] for row in truth] == [f"case_{n:04d}" for n in range(1, N_CASES + 1)]
    for row in truth:
        folder = cohort / "raw" / row["case"]
        assert sorted(p.name for p in folder.iterdir()) == sorted(
            f"{w}.nii.gz" for w in ("ctp", "dwi", "adc", "mask", "lesion", "cbf", "mtt", "delay"))  # fmt: skip
        ctp = nib.load(folder / "ctp.nii.gz")
        assert ctp.shape == (*SHAPE, 15) and nib.aff2axcodes(ctp.affine) == ("R", "A", "S")
        assert ctp.header.get_zooms()[:3] == SPACING_MM and ctp.header["sform_code"] > 0
        for what in ("dwi", "adc", "mask", "lesion", "cbf", "mtt", "delay"):
            image = nib.load(folder / f"{what}.nii.gz")
            assert image.shape == SHAPE
            np.testing.assert_array_equal(image.affine, ctp.affine)
    record = json.loads((cohort / "phantom.json").read_text())
    assert record["labels"] == {"core": 1, "penumbra": 2} and record["voxel_mm"] == list(SPACING_MM)
    free = [row["case"] for row in truth if float(row["core_ml"]) == 0]
    assert free == ["case_0006", "case_0012"]


def test_images_bear_out_the_truth(cohort):
    """Core: DWI bright, ADC below 620, little and late contrast. Penumbra: late, but DWI and ADC of healthy tissue."""
    for row in records(cohort / "truth.csv"):
        scans, labels = images(cohort, row["case"])
        mask, core, penumbra = scans["mask"] > 0, labels == 1, labels == 2
        np.testing.assert_array_equal(scans["lesion"] > 0, core)
        voxel_ml = np.prod(SPACING_MM) / 1000
        assert core.sum() * voxel_ml == pytest.approx(float(row["core_ml"]), rel=1e-5)
        assert penumbra.sum() * voxel_ml == pytest.approx(float(row["penumbra_ml"]), rel=1e-5)
        assert not (core | penumbra)[~mask].any() and 700 < float(row["brain_ml"]) < 1700
        healthy = mask & ~core & ~penumbra
        low_adc = (scans["adc"] < 620) & mask
        assert low_adc[healthy | penumbra].mean() < 0.01
        if row["side"] == "none":
            assert not core.any() and not penumbra.any() and row["x_mm"] == ""
            continue
        assert low_adc[core].mean() > 0.99
        tissue = healthy & (scans["adc"] < 1000)
        late = penumbra & (scans["adc"] < 1000)
        assert np.median(scans["dwi"][core]) > 1.5 * np.median(scans["dwi"][tissue])
        assert np.median(scans["dwi"][late]) == pytest.approx(np.median(scans["dwi"][tissue]), rel=0.15)
        curves = {name: scans["ctp"][:, part].mean(1) for name, part in (("core", core), ("penumbra", late),
                                                                         ("healthy", tissue))}  # fmt: skip
        rise = {name: curve - curve[0] for name, curve in curves.items()}
        assert 3 < rise["healthy"].max() < 16 and rise["core"].max() < 0.4 * rise["healthy"].max()
        assert rise["penumbra"].argmax() >= rise["healthy"].argmax() + 2  # frames of 3 s
        x = np.argwhere(core).mean(0)[0] * SPACING_MM[0] - (SHAPE[0] - 1) / 2 * SPACING_MM[0]
        assert x == pytest.approx(float(row["x_mm"]), abs=0.1) and (x < 0) == (row["side"] == "left")


def test_curves_are_those_of_the_maps(cohort):
    """The CTP, averaged over thousands of voxels, is HU at rest + enhancement of the written maps: nothing else."""
    row = records(cohort / "truth.csv")[0]
    scans, labels = images(cohort, row["case"])
    maps = [nifti.load(cohort / "raw" / row["case"] / f"{what}.nii.gz").data for what in ("cbf", "mtt", "delay")]
    part = (scans["mask"] > 0) & (labels == 0)
    expected = make_phantom.enhancement(*(m[part] for m in maps), np.arange(15) * 3.0,
                                        float(row["arrival_s"]), float(row["width_s"]))  # fmt: skip
    measured = scans["ctp"][:, part] - scans["ctp"][:1, part]
    np.testing.assert_allclose(measured.mean(1), expected.mean(1), atol=0.15)
    np.testing.assert_allclose((measured - expected)[1:].std(), 1.5 * np.sqrt(2), rtol=0.05)  # its noise


def test_penumbra_is_told_from_the_core_by_the_curves_alone(cohort):
    """What the networks are to learn is in the CTP: flow separates core and penumbra."""
    for row in records(cohort / "truth.csv")[:5]:
        cbf, delay = (nifti.load(cohort / "raw" / row["case"] / f"{w}.nii.gz").data for w in ("cbf", "delay"))
        _, labels = images(cohort, row["case"])
        assert delay[labels > 0].min() > 5.9 and delay[labels == 0].max() <= 1.0
        assert np.median(cbf[labels == 1]) < 0.35 * np.median(cbf[labels == 2])


def test_grids():
    """The paper's 192 x 224 x 32 voxels are 1 x 1 x 4 mm; other grids keep the field of view."""
    assert make_phantom.grid_mm((192, 224, 32)) == (1.0, 1.0, 4.0)
    assert make_phantom.grid_mm((48, 48, 8)) == SPACING_MM
    assert make_phantom.grid_mm((96, 112, 32), (0, 0, 5)) == (2.0, 2.0, 5.0)


def test_same_seed_same_bytes_whatever_the_number(tmp_path):
    """Another --n_cases or number of workers leaves every case as it was; another seed is other people."""
    for name, options in (("a", ("--n_cases", 1)), ("b", ("--n_cases", 2, "--num_workers", 2)),
                          ("c", ("--n_cases", 1, "--seed", 1))):  # fmt: skip
        run_main(make_phantom, "--out", tmp_path / name, *TINY, *options)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.nii.gz"))
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()
    a, b = (records(tmp_path / name / "truth.csv") for name in "ab")
    assert b[:1] == a and len(b) == 2


# ---- lesion shapes from files


def test_lesion_masks_give_place_and_volume(tmp_path):
    """A box at the right of MNI space: the core is there, of its volume in a 93 % head; in the second turn mirrored."""
    data = np.zeros((60, 60, 60), bool)
    data[20:34, 20:40, 24:36] = True
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = [-20.0, -70.0, -40.0]
    nifti.save(tmp_path / "masks/box.nii.gz", data, affine, dtype=np.uint8)
    run_main(make_phantom, "--out", tmp_path, "--shape", 48, 48, 8, "--n_cases", 2, "--lesion_masks",
             tmp_path / "masks", "--num_workers", 1)  # fmt: skip
    first, second = records(tmp_path / "truth.csv")
    for row, sign in ((first, 1), (second, -1)):
        assert float(row["core_ml"]) == pytest.approx(14 * 20 * 12 * 8 / 1000 * 0.93**3, rel=0.1)
        centre = (np.array([33.0, -11.0, 19.0]) - CENTRE_MM) * 0.93 + CENTRE_MM
        found = np.array([float(row[f"{axis}_mm"]) for axis in "xyz"])
        np.testing.assert_allclose(found, centre * [sign, 1, 1], atol=6)  # voxels of 4 x 4 x 16 mm
        assert row["side"] == ("right" if sign > 0 else "left") and row["lesion_mask"] == "box.nii.gz"


@pytest.mark.skipif("REAL_DATA_DIR" not in os.environ, reason="REAL_DATA_DIR names the folder of real volumes")
def test_real_lesion_shapes(tmp_path):
    """The twelve real masks as cores: volumes kept (of a head of 93 %), low ADC inside, shapes unlike an ellipsoid."""
    folder = Path(os.environ["REAL_DATA_DIR"]) / "stroke" / "lesion_masks_mni"
    paths = make_phantom.mask_files(str(folder))
    run_main(make_phantom, "--out", tmp_path, "--shape", 64, 64, 16, "--n_cases", 5, "--lesion_masks", folder,
             "--num_workers", 1)  # fmt: skip
    for row, path in zip(records(tmp_path / "truth.csv"), paths, strict=False):
        real = nifti.load(path)
        volume = (real.data > 0).sum() * np.prod(real.spacing_mm) / 1000 * 0.93**3
        voxel_ml = 3 * 3 * 8 / 1000
        assert float(row["core_ml"]) == pytest.approx(volume, rel=0.15, abs=voxel_ml), path.name
        scans, labels = images(tmp_path, row["case"])
        assert row["lesion_mask"] == path.name and (scans["adc"][labels == 1] < 620).mean() > 0.99


# ---- defects and refusals


def test_defects(tmp_path):
    """Every defect is there, and those called harmless change no value."""
    common = ("--shape", 24, 24, 4, "--n_cases", len(make_phantom.DEFECTS), "--num_workers", 1)
    run_main(make_phantom, "--out", tmp_path / "good", *common)
    run_main(make_phantom, "--out", tmp_path / "bad", *common, "--defects")
    truth = records(tmp_path / "bad/truth.csv")
    assert [row["defect"] for row in truth] == list(make_phantom.DEFECTS)
    case = {row["defect"]: row["case"] for row in truth}

    def pair(defect, what, series=False):
        return [nifti.load(tmp_path / kind / "raw" / case[defect] / f"{what}.nii.gz", series=series)
                for kind in ("good", "bad")]  # fmt: skip

    a, b = pair("ADC on another grid", "adc")
    assert a.shape != b.shape
    a, b = pair("one time point less", "ctp", True)
    assert len(b.data) == len(a.data) - 1
    assert not pair("empty mask", "mask")[1].data.any()
    mask, lesion = (pair("lesion outside the mask", what)[1].data for what in ("mask", "lesion"))
    assert (lesion[mask == 0] > 0).any()
    with pytest.raises(UserError, match="1 voxels are NaN"):
        pair("NaN in the CTP", "ctp", True)
    assert not (tmp_path / "bad/raw" / case["ADC missing"] / "adc.nii.gz").exists()
    a, b = pair("CTP without its offset of -1024", "ctp", True)
    np.testing.assert_array_equal(a.data + 1024, b.data)
    for defect in ("CTP stored LAS", "CTP scaled by its header"):
        a, b = pair(defect, "ctp", True)
        np.testing.assert_array_equal(a.data, b.data)
        np.testing.assert_array_equal(a.affine, b.affine)
    path = tmp_path / "bad/raw" / case["CTP stored LAS"] / "ctp.nii.gz"
    assert nib.aff2axcodes(nib.load(path).affine) == ("L", "A", "S")
    scaled = nib.load(tmp_path / "bad/raw" / case["CTP scaled by its header"] / "ctp.nii.gz")
    assert (scaled.dataobj.slope, scaled.dataobj.inter) == (0.5, -1024)
    a, b = pair("ADC in mm^2/s", "adc")
    np.testing.assert_allclose(a.data, b.data * 1e6, rtol=1e-5)


def test_refusals(tmp_path):
    (tmp_path / "truth.csv").write_text("mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="truth.csv already holds data"):
        run_main(make_phantom, "--out", tmp_path, *TINY)
    for options, message in ((("--n_cases", 0), "--n_cases 0"), (("--seed", -1), "--seed -1"),
                             (("--shape", 8, 28, 24), "16 to 256"), (("--voxel", -1, 1, 1), "--voxel"),
                             (("--voxel", 0, 0, 0.5), "misses most of a head: 80 mm"),
                             (("--time_points", 1), "--time_points 1"), (("--defects", "--n_cases", 3), "needs 10"),
                             (("--lesion_masks", tmp_path / "empty"), "no NIfTI file")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            run_main(make_phantom, "--out", tmp_path / "x", *TINY, *options)
    assert not (tmp_path / "x").exists() and (tmp_path / "truth.csv").read_text() == "mine"
