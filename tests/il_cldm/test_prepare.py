"""--prepare: raw scans of any orientation, spacing and origin come out on one grid, where they were in the world."""

import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from common import nifti, phantom
from il_cldm import make_phantom, prepare
from il_cldm.config import Config
from tests.helpers import run_script
from tests.il_cldm.tools import SHORT, TINY, captured, complaint, files

SHAPE, SPACING = (20, 24, 20), 9.0  # 180 x 216 x 180 mm
MRI, PET, REGIONS = (f"data/process/{f}_112" for f in ("whole_MRI", "whole_Abeta", "regions"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Raw scans of three phantom subjects: LAS, anisotropic, shifted; PET LPS and coarser."""
    out = tmp_path_factory.mktemp("native")
    done = run_script(["il_cldm/make_phantom.py", "--out", out, "--shape", 24, 24, 24, "--n_train", 1, "--n_val", 1,
                       "--n_test", 1, "--native"])  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out / "raw"


def prepare_args(raw, root):
    return ["--prepare", "--root", root, "--raw_mri", raw / "mri", "--raw_pet", raw / "pet", "--raw_mask",
            raw / "labels", "--shape", *SHAPE, "--spacing_mm", SPACING]  # fmt: skip


@pytest.fixture(scope="module")
def study(raw, tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    done = captured(*prepare_args(raw, root))
    assert done.status == 0, done.err
    return root


def record_of(root):
    return json.loads((root / "data_info" / "prepare.json").read_text())


def centroid_mm(volume):
    weights = np.asarray(volume.data, np.float64)
    return volume.affine[:3, :3] @ ndimage.center_of_mass(weights) + volume.affine[:3, 3]


NAMES = ("001S0001", "084S6001", "047S8001")


@pytest.mark.parametrize("name", NAMES)
def test_prepared_volumes_lie_where_the_raw_ones_lay(raw, study, name):
    mri, pet = (nifti.load(study / f / f"{name}.nii.gz") for f in (MRI, PET))
    labels = nifti.load_labels(study / REGIONS / f"{name}.nii.gz")
    for v in (mri, pet, labels):
        stored = nib.load(v.path)
        assert stored.shape == SHAPE and nib.aff2axcodes(stored.affine) == ("R", "A", "S")
        np.testing.assert_allclose(v.spacing_mm, SPACING, rtol=1e-6)
        np.testing.assert_allclose(v.affine, mri.affine, atol=1e-4)
        assert stored.header["sform_code"] > 0 and np.allclose(stored.get_sform(), v.affine, atol=1e-3)
        assert stored.header["qform_code"] > 0 and np.allclose(stored.get_qform(), v.affine, atol=1e-3)
    for v in (mri, pet):
        assert nib.load(v.path).get_data_dtype() == np.float32 and v.data.min() == 0 and 0.4 < v.data.max() <= 1
        assert (v.data[labels.data == 0] > 0).mean() < 0.05  # masked, up to partial volume at the rim
    source = nifti.load(raw / "mri" / f"{name}_T1w.nii.gz")
    inside = nifti.load_labels(raw / "labels" / f"{name}_dseg.nii.gz").data > 0
    np.testing.assert_allclose(  # subjects sit up to 40 mm apart in the world
        centroid_mm(mri), centroid_mm(nifti.Volume(source.data * inside, source.affine)), atol=1.0
    )
    uptake = nifti.load(raw / "pet" / f"{name}_pet.nii.gz")
    where = nifti.resample_to(uptake, source.shape, source.affine).data * inside
    np.testing.assert_allclose(centroid_mm(pet), centroid_mm(nifti.Volume(where, source.affine)), atol=1.0)
    # region by region: label volumes and centres in the world
    coarse, fine = labels, nifti.load_labels(raw / "labels" / f"{name}_dseg.nii.gz")
    for region in ("frontal", "cerebellum_grey", "ventricle_right"):
        a, b = (nifti.Volume(v.data == phantom.LABELS[region], v.affine) for v in (coarse, fine))
        if b.data.sum() > 20:
            np.testing.assert_allclose(centroid_mm(a), centroid_mm(b), atol=5.0)


@pytest.mark.parametrize("axes", ["RAS", "LPI", "PSR", "AIL"])
def test_a_blob_keeps_its_world_position_from_any_oblique_grid(tmp_path, axes):
    """Closed form: the centroid of a blob of known position, in mm, from MRI and PET on grids of their own."""
    at = np.array([31.0, -47.0, 22.0])  # right, posterior, superior

    def write(folder, spacing, angle, shape, axes, sigma):
        affine = np.eye(4)
        turn = Rotation.from_euler("xyz", [angle, -angle / 2, angle], degrees=True).as_matrix()
        affine[:3, :3] = turn @ np.diag(spacing)
        affine[:3, 3] = [5, -10, 12] - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
        points = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
        head = 300.0 * ((np.abs(points - [5, -10, 12]) / [70, 85, 70]) ** 2).sum(-1).__lt__(1)
        blob = 600 * np.exp(-((points - at) ** 2).sum(-1) / (2 * sigma**2))
        data, affine = nifti.reorient(blob + (head if folder == "mri" else 0), affine, axes)
        nifti.save(tmp_path / folder / "sub-7.nii", data, affine)

    write("mri", [2.0, 2.5, 4.0], 12, (100, 90, 50), axes, 10)
    write("pet", [4.0, 4.0, 5.0], -7, (52, 56, 42), "LAS", 10)
    done = captured("--prepare", "--root", tmp_path, "--raw_mri", tmp_path / "mri", "--raw_pet", tmp_path / "pet",
                    "--shape", *SHAPE, "--spacing_mm", SPACING, "--pet_divisor", 700, "--mri_norm", "none")  # fmt: skip
    assert done.status == 0, done.err
    pet, mri = (nifti.load(tmp_path / f / "sub-7.nii.gz") for f in (PET, MRI))
    np.testing.assert_allclose(centroid_mm(pet), at, atol=0.1)
    np.testing.assert_allclose(pet.affine, mri.affine, atol=1e-4)
    raw = nifti.load(tmp_path / "mri" / "sub-7.nii")
    directions = raw.affine[:3, :3] / raw.spacing_mm  # axes kept: only voxel size and corner change
    np.testing.assert_allclose(mri.affine[:3, :3] / SPACING, directions, atol=1e-5)


def test_the_record_turns_volumes_back_into_raw_units(raw, study):
    record = record_of(study)
    expected = {"shape": list(SHAPE), "spacing_mm": SPACING, "mri_norm": "percentile", "pet_norm": "fixed",
                "pet_divisor": 3.0, "masked": True}  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert set(record["subjects"]) == {f"{n}.nii.gz" for n in NAMES}
    for name in NAMES:
        entry = record["subjects"][f"{name}.nii.gz"]
        assert entry["pet_scale"]["high"] == 3.0 and entry["mri"] == str((raw / "mri" / f"{name}_T1w.nii.gz").resolve())
        mri, labels = (nifti.load(study / f / f"{name}.nii.gz").data for f in (MRI, REGIONS))
        scan = nifti.load(raw / "mri" / f"{name}_T1w.nii.gz")
        source, spacing_mm = scan.data, scan.spacing_mm
        inside = nifti.load_labels(raw / "labels" / f"{name}_dseg.nii.gz").data > 0
        assert entry["mri_scale"]["clipped_share"] <= 0.01
        # the blurred rim outside the mask is cut
        total = mri.sum() * entry["mri_scale"]["high"] * SPACING**3  # scanner units times mm^3
        assert total == pytest.approx(source[inside].sum() * np.prod(spacing_mm), rel=0.1)
        pet = nifti.load(study / PET / f"{name}.nii.gz").data
        regions = [phantom.codes(phantom.LABELS, n) for n in (phantom.TARGET, phantom.REFERENCE)]
        suvr = phantom.composite_suvr(pet, labels.astype(int), *regions)
        assert 0.7 < suvr < 2.2  # dividing by a fixed number keeps ratios
        picture = (study / "data_info" / "qc" / f"{name}.png").read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 5000


def test_kept_refused_replaced(raw, study, tmp_path):
    before = files(study)
    stamp = (study / MRI / "001S0001.nii.gz").stat().st_mtime_ns
    assert captured(*prepare_args(raw, study)).status == 0
    assert files(study) == before and (study / MRI / "001S0001.nii.gz").stat().st_mtime_ns == stamp
    line = complaint(captured(*prepare_args(raw, study), "--mri_norm", "minmax"))
    assert "mri_norm percentile -> minmax" in line and "--overwrite" in line
    other = tmp_path / "other"
    other.mkdir()
    for path in (raw / "mri").iterdir():
        os.symlink(path, other / path.name.replace("_T1w", "_MRI"))
    (other / "001S0001_MRI.nii.gz").unlink()
    shutil.copy(raw / "mri" / "001S0001_T1w.nii.gz", other / "001S0001_T1.nii.gz")
    args = prepare_args(raw, study)
    args[args.index("--raw_mri") + 1] = other
    assert "001S0001" in complaint(captured(*args))  # same name, another file
    assert files(study) == before
    # a run that was cut short continues: one subject's record entry and another's PET are gone
    record = record_of(study)
    del record["subjects"]["084S6001.nii.gz"]["mri_scale"]
    (study / "data_info" / "prepare.json").write_text(json.dumps(record))
    (study / PET / "047S8001.nii.gz").unlink()
    assert captured(*prepare_args(raw, study)).status == 0
    after = files(study)
    assert json.loads(after.pop("data_info/prepare.json")) == json.loads(before.pop("data_info/prepare.json"))
    assert after == before


def test_names_and_pairs(tmp_path):
    def key(name):
        return prepare.key_of(tmp_path / name)

    assert key("sub-01_ses-M24_acq-x_T1w.nii.gz") == key("sub-01_ses-M24_trc-AV45_pet.nii") == "sub-01_ses-M24"
    assert key("sub-02_T1w.nii") == "sub-02" and key("IXI132-HH-1415_T1_DLMUSE.nii.gz") == "IXI132-HH-1415"
    assert key("037S6046_m12_MRI.nii.gz") == "037S6046_m12" == key("037S6046_m12_AV45_PET.nii.gz")
    tree = tmp_path / "bids"
    for name in ("sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", "sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz",
                 "sub-02/anat/sub-02_T1w.nii", "sub-02/anat/._sub-02_T1w.nii"):  # fmt: skip
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    assert {k: p.name for k, p in prepare.scan(str(tree), "mri").items()} == {
        "sub-01_ses-1": "sub-01_ses-1_T1w.nii.gz", "sub-02": "sub-02_T1w.nii"}  # fmt: skip
    (tree / "sub-02/anat/sub-02_run-2_T1w.nii").touch()
    line = complaint(captured("--prepare", "--raw_mri", tree, "--root", tmp_path))
    assert "sub-02_T1w.nii" in line and "sub-02_run-2_T1w.nii" in line


class Quiet:
    def print(self, text):
        self.said = text


def test_lists_keep_a_person_together_and_fill_every_split(tmp_path):
    config = Config(root=str(tmp_path / "a"), split_fractions=(0.6, 0.2, 0.2))
    names = [f"sub-{i:02d}_ses-{s}.nii.gz" for i in range(20) for s in "AB"]
    prepare.write_lists(config, names, Quiet())
    lists = [config.list_path(s).read_text().split() for s in ("train", "validation", "test")]
    people = [{n[:6] for n in part} for part in lists]
    assert sorted(sum(lists, [])) == names and [len(p) for p in people] == [12, 4, 4]
    assert not people[0] & people[1] and not people[0] & people[2] and not people[1] & people[2]
    other = Config(root=str(tmp_path / "b"), split_fractions=(0.6, 0.2, 0.2), seed=1)
    prepare.write_lists(other, names, Quiet())
    assert other.list_path("test").read_text() != config.list_path("test").read_text()
    small = Config(root=str(tmp_path / "c"))  # 0.7, 0.1, 0.2 of three people: rounding alone would leave one list empty
    prepare.write_lists(small, ["a.nii.gz", "b.nii.gz", "c.nii.gz"], Quiet())
    assert [len(small.list_path(s).read_text().split()) for s in ("train", "validation", "test")] == [1, 1, 1]
    listener, before = Quiet(), small.list_path("train").read_text()
    prepare.write_lists(small, ["a.nii.gz", "d.nii.gz"], listener)  # lists that exist belong to the user
    assert small.list_path("train").read_text() == before and "d.nii.gz" in listener.said
    few = Config(root=str(tmp_path / "d"))
    prepare.write_lists(few, ["a.nii.gz"], Quiet())
    assert not few.list_path("train").exists()


def raw_head(folder, name, *, fill=300.0, centre=(0, 0, 0), shape=(40, 40, 40), spacing=5.0):
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = np.array(centre) - spacing * (np.array(shape) - 1) / 2
    radius = np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - (np.array(shape) - 1) / 2, axis=-1) * spacing
    nifti.save(folder / name, fill * np.clip(1.2 - radius / 90, 0, 1), affine)
    return affine, radius < 85


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("pet elsewhere", "register PET"),
        ("mask empty", "mask is empty"),
        ("mask elsewhere", "mask is empty"),
        ("grid too small", "falls outside the grid"),
        ("no pet of one", "no PET matches"),
        ("no mask of one", "no mask matches"),
        ("constant mri", "same value"),
        ("truncated", "truncated"),
        ("no folder", "no folder"),
        ("no files", "no NIfTI file"),
        ("no raw_mri", "--raw_mri"),
        ("shape", "multiple of 4"),
        ("spacing", "--spacing_mm"),
        ("divisor", "--pet_divisor"),
        ("fractions", "--split_fractions"),
        ("two fractions", "--split_fractions"),
    ],
)
def test_bad_raw_data_end_in_one_line_that_names_them(tmp_path, case, words):
    mri, pet, mask, root = (tmp_path / n for n in ("mri", "pet", "mask", "root"))
    extra = []
    for name in ("A", "B"):
        affine, inside = raw_head(mri, f"{name}_T1.nii.gz")
        raw_head(pet, f"{name}_PET.nii.gz", fill=2.0)
        nifti.save(mask / f"{name}_mask.nii.gz", inside, affine, dtype=np.uint8)
    if case == "pet elsewhere":
        raw_head(pet, "B_PET.nii.gz", fill=2.0, centre=(0, 0, 150))
    elif case == "mask empty":
        nifti.save(mask / "B_mask.nii.gz", 0 * inside, affine, dtype=np.uint8)
    elif case == "mask elsewhere":
        nifti.save(mask / "B_mask.nii.gz", inside, affine + np.eye(4, k=3) * 500, dtype=np.uint8)
    elif case == "grid too small":
        extra = ["--spacing_mm", 6]
    elif case == "no pet of one":
        (pet / "B_PET.nii.gz").unlink()
    elif case == "no mask of one":
        (mask / "B_mask.nii.gz").unlink()
    elif case == "constant mri":
        nifti.save(mri / "B_T1.nii.gz", np.full((40, 40, 40), 7.0), affine)
        mask = None
    elif case == "truncated":
        path = mri / "B_T1.nii.gz"
        path.write_bytes(path.read_bytes()[:-2000])
    elif case == "no folder":
        pet = tmp_path / "nowhere"
    elif case == "no files":
        pet = tmp_path / "empty"
        pet.mkdir()
    elif case == "no raw_mri":
        mri = ""
    elif case == "shape":
        extra = ["--shape", 20, 22, 20]
    elif case in ("spacing", "divisor"):
        extra = [{"spacing": "--spacing_mm", "divisor": "--pet_divisor"}[case], 0]
    else:
        extra = ["--split_fractions", *((0.5, -0.5, 1) if case == "fractions" else (0.5, 0.5))]
    args = ["--prepare", "--root", root, "--shape", 20, 20, 20, "--spacing_mm", 10, "--raw_mri", mri, "--raw_pet", pet]
    line = complaint(captured(*args, *(["--raw_mask", mask] if mask else []), *extra))
    assert words in line
    if case not in ("no folder", "no files", "no raw_mri", "shape", "spacing", "divisor", "fractions", "two fractions"):
        assert "B" in line.split()[1] or "B_" in line or "A_T1" in line
    written = {p.name for p in root.rglob("*") if p.is_file()}
    assert not any("B" in name or name.endswith((".tmp", ".txt")) for name in written)
    if case in ("pet elsewhere", "mask empty", "truncated"):  # once the file is mended, the same command finishes
        raw_head(mri, "B_T1.nii.gz")
        raw_head(pet, "B_PET.nii.gz", fill=2.0)
        nifti.save(mask / "B_mask.nii.gz", inside, affine, dtype=np.uint8)
        done = captured(*args, "--raw_mask", mask)
        assert done.status == 0 and (root / MRI / "B.nii.gz").is_file(), done.err


@pytest.mark.slow
def test_native_generation_lies_on_the_raw_mri(raw, study, tmp_path):
    """Train a little on prepared data, then synthesize from raw MRI: output on the raw grid, uptake inside the head."""
    base = ["--root", study, *TINY, *SHORT]
    labels = "".join(f"{n}.nii.gz,{i}\n" for i, n in enumerate(NAMES))
    (study / "data_info" / "data_info.csv").write_text("filename,label_id\n" + labels)
    done = captured(*base, "--train_aae", "--enc", "--train_ldm", "--aae_steps", 100, "--ldm_steps", 200)
    assert done.status == 0, done.err
    args = [*base, "--gen", "--native", "--mri", raw / "mri", "--out", tmp_path / "out"]
    assert "--raw_mask" in complaint(captured(*args))  # trained on masked brains: a head with skull would mislead it
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.nii.gz"))
    done = captured(*args, "--raw_mask", raw / "labels", "--samples", 2, "--steps", 10, "--overwrite")
    assert done.status == 0, done.err
    (tmp_path / "prepared").mkdir()
    for name in NAMES:  # the same subjects, prepared beforehand
        shutil.copy(study / MRI / f"{name}.nii.gz", tmp_path / "prepared" / f"{name}_T1w.nii.gz")
    done = captured(*base, "--gen", "--mri", tmp_path / "prepared", "--out", tmp_path / "on_grid", "--samples", 2,
                    "--steps", 10)  # fmt: skip
    assert done.status == 0, done.err
    for name in NAMES:
        source, made = raw / "mri" / f"{name}_T1w.nii.gz", nifti.load(tmp_path / "out" / f"{name}_T1w.nii.gz")
        shape, affine = nifti.header(source)
        assert made.shape == shape == nifti.header(tmp_path / "out" / "std" / f"{name}_T1w.nii.gz")[0]
        np.testing.assert_allclose(made.affine, affine, atol=1e-4)
        assert nib.load(made.path).get_data_dtype() == np.float32 and 0 <= made.data.min() and made.data.max() <= 1
        inside = nifti.load_labels(raw / "labels" / f"{name}_dseg.nii.gz").data > 0
        bright = made.data > np.quantile(made.data, 1 - inside.mean())  # as many voxels as the brain has
        overlap = 2 * (bright & inside).sum() / (bright.sum() + inside.sum())
        assert overlap > 0.8, overlap  # 0.89 to 0.92 measured
        there = nifti.load(tmp_path / "on_grid" / f"{name}_T1w.nii.gz")
        np.testing.assert_allclose(made.data, nifti.resample_to(there, shape, affine).data, atol=1e-3)


def test_phantom_and_preparation_agree_on_the_folder_names():
    assert (make_phantom.MRI, make_phantom.PET, make_phantom.REGIONS) == (MRI, PET, REGIONS)
