"""preprocess.py: exact affines there and back, the original's chain, orientation, bad voxels, masks."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from common import nifti
from common.cli import UserError
from ldae import preprocess
from ldae.dataset import Row, Volumes
from ldae.preprocess import Preparation

PREP = Preparation(shape=(24, 28, 24), spacing_mm=2.0)


def row_of(path):
    return Row(0, "s", None, path, None, None, None, "s")


def head(shape=(20, 26, 22), spacing=(2.0, 2.0, 2.0), seed=0):
    """A lopsided bright ellipsoid with texture on a background of 0, in scanner units."""
    rng = np.random.default_rng(seed)
    x, y, z = (np.linspace(-1, 1, n).reshape([-1 if i == k else 1 for i in range(3)]) for k, n in enumerate(shape))
    inside = (x / 0.7) ** 2 + (y / 0.8) ** 2 + ((z - 0.1 * x) / 0.75) ** 2 < 1
    data = np.where(inside, 700 + 200 * x + 60 * rng.standard_normal(shape), 0).astype(np.float32)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-17, -31, 5)
    return nifti.Volume(data, affine)


def test_robust_range_and_pad():
    """Background 0, bright tissue about 1, a shift by whole voxels, and the affine that says so."""
    volume = head()
    made = preprocess.prepare(volume, PREP)
    assert made.shape == PREP.shape and made.data.dtype == np.float32
    np.testing.assert_allclose(made.affine[:3, 3], volume.affine[:3, 3] - 2 * np.array([2, 1, 1]))
    inner = made.data[2:-2, 1:-1, 1:-1]
    assert made.data.min() == 0 and not made.data[:2].any() and 1 <= made.data.max() < 1.2
    high = np.percentile(volume.data[volume.data > 300], 99.5)
    np.testing.assert_allclose(inner, volume.data / high, atol=2e-3)
    np.testing.assert_array_equal(preprocess.prepared_affine(volume.affine, volume.shape, PREP), made.affine)


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (1.7, 2.3, 2.0)])
@pytest.mark.parametrize("crop", ["centre", "head"])
@pytest.mark.parametrize("intensity", ["robust", "minmax"])
def test_world_positions_stay(spacing, crop, intensity):
    """The centre of mass in mm is that of the input, whatever is resampled, cropped or padded."""
    volume = head(spacing=spacing)

    def centre(v):
        return v.affine @ [*(np.argwhere(v.data > 0) * v.data[v.data > 0, None]).sum(0) / v.data.sum(), 1]

    prep = replace(PREP, crop=crop, intensity=intensity)
    made = preprocess.prepare(volume, prep)
    np.testing.assert_allclose(made.spacing_mm, 2.0)
    np.testing.assert_allclose(centre(made), centre(volume), atol=0.15)
    np.testing.assert_array_equal(preprocess.plan(volume, prep).prepared_affine, made.affine)


@pytest.mark.parametrize("prep", [PREP, replace(PREP, intensity="minmax"), replace(PREP, crop="head")])
def test_to_native_inverts_prepare(prep):
    """Without resampling: the input's voxels, units and affine come back; with it: to interpolation error."""
    volume = head()
    back = preprocess.to_native(preprocess.prepare(volume, prep).data, prep, volume)
    np.testing.assert_array_equal(back.affine, volume.affine)
    np.testing.assert_allclose(back.data, volume.data, atol=0.01 if prep.crop == "centre" else 0.02)
    other = replace(prep, spacing_mm=1.5, shape=(32, 40, 32))
    back = preprocess.to_native(preprocess.prepare(volume, other).data, other, volume)
    assert back.shape == volume.shape and np.corrcoef(back.data.ravel(), volume.data.ravel())[0, 1] > 0.98
    with pytest.raises(ValueError, match="needs a prepared volume"):
        preprocess.to_native(volume.data, prep, volume)


def test_to_native_outside_of_the_crop_is_background():
    volume, small = head(), replace(PREP, shape=(12, 28, 24))
    back = preprocess.to_native(preprocess.prepare(volume, small).data, small, volume)
    np.testing.assert_allclose(back.data[4:16], volume.data[4:16], atol=0.01)
    assert not back.data[:4].any() and not back.data[16:].any()


def test_fact_10_geometry_of_the_shipped_sample():
    """Fact 10: 188 x 256 x 190 of 0.88 mm become 111 x 151 x 112, centred; exactly [0, 1] in the original's chain."""
    shape = (188, 256, 190)
    data = np.zeros(shape, np.float32)
    data[20:160, 30:220, 10:180] = np.random.default_rng(0).integers(1, 255, (140, 190, 170))
    volume = nifti.Volume(data, np.diag([0.88, 0.88, 0.88, 1]))
    prep = Preparation.upstream()
    plan = preprocess.plan(volume, prep)
    assert plan.shape == (111, 151, 112) and prep.shape == (128, 160, 128)
    assert plan.start == (-8, -4, -8)  # 17, 9 and 16 voxels of padding, the odd one behind
    made = preprocess.prepare(volume, prep)
    assert made.data.min() == 0 and made.data.max() == 1
    np.testing.assert_allclose(made.affine[:3, 3], -1.5 * np.array([8, 4, 8]))


def test_upstream_chain_is_monais():
    """The same numbers as MONAI's Spacing, ResizeWithPadOrCrop and ScaleIntensity, as the original chains them."""
    transforms = pytest.importorskip("monai.transforms")
    torch = pytest.importorskip("torch")
    from monai.data import MetaTensor

    volume = head((17, 25, 22), (2.1, 1.2, 2.5), seed=3)
    volume.data += 40  # padding differs from 0 then
    prep = Preparation.upstream((30, 20, 32), 1.5)
    image = MetaTensor(torch.from_numpy(volume.data)[None], affine=torch.from_numpy(volume.affine))
    image = transforms.Spacing(1.5, mode="bilinear", padding_mode="border")(image)
    image = transforms.ResizeWithPadOrCrop(prep.shape, mode="minimum")(image)
    image = transforms.ScaleIntensity(0, 1)(image)
    made = preprocess.prepare(volume, prep)
    np.testing.assert_allclose(made.data, image[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(made.affine, image.affine.numpy(), atol=1e-6)


@pytest.mark.parametrize("intensity", ["robust", "minmax"])
def test_fact_11_las_and_ras_copies_give_one_tensor(cohort, prep, tmp_path, intensity):
    """Fact 11: a LAS (and a PIR) copy of a scan is the same tensor; only in file order it is mirrored."""
    source = next((cohort / "data/scans").rglob("*.nii.gz"))
    volume, prep = nifti.load(source), replace(prep, intensity=intensity)
    tensor = Volumes(prep, None).load(row_of(source))
    for axes in ("LAS", "PIR"):
        copy = tmp_path / f"{axes}.nii.gz"
        nifti.save(copy, *nifti.reorient(volume.data, volume.affine, axes))
        assert nib.aff2axcodes(nib.load(copy).affine) == tuple(axes)
        volumes = Volumes(prep, None)
        np.testing.assert_allclose(volumes.load(row_of(copy)), tensor, atol=1e-5)
        np.testing.assert_allclose(volumes.affine(row_of(copy)), Volumes(prep, None).affine(row_of(source)), atol=1e-4)
    stored = Volumes(replace(prep, order="file"), None)
    mirrored = stored.load(row_of(tmp_path / "LAS.nii.gz"))
    np.testing.assert_allclose(mirrored[::-1], tensor, atol=1e-5)
    assert stored.affine(row_of(tmp_path / "LAS.nii.gz"))[0, 0] == -12 and np.abs(mirrored - tensor).max() > 0.1


def test_one_bright_voxel_changes_nothing_else():
    """Defect 20: min-max lets one voxel rescale the volume, the robust range does not."""
    volume = head()
    clean = preprocess.prepare(volume, PREP).data
    spot = (10, 13, 11)
    volume.data[spot] = 1e6
    bright = preprocess.prepare(volume, PREP).data
    at = tuple(np.add(spot, (2, 1, 1)))
    assert bright[at] == PREP.limit
    bright[at] = clean[at]
    np.testing.assert_allclose(bright, clean, atol=0.01)
    assert np.median(preprocess.prepare(volume, replace(PREP, intensity="minmax")).data[clean > 0.5]) < 1e-3


@pytest.mark.parametrize("prep", [PREP, Preparation.upstream((24, 28, 24), 2.0)])
def test_unusable_volumes_name_the_file(tmp_path, prep):
    """Defect 20: one NaN voxel is an error that names the file; so are constant and empty volumes."""
    volume = replace(head(), path=tmp_path / "bad.nii.gz")
    volume.data[3, 4, 5] = np.nan
    with pytest.raises(UserError, match="bad.nii.gz: 1 voxels are NaN"):
        preprocess.prepare(volume, prep)
    with pytest.raises(UserError, match="bad.nii.gz: every voxel is about 7"):
        preprocess.prepare(replace(volume, data=np.full((9, 9, 9), 7, np.float32)), prep)
    with pytest.raises(UserError, match="bad.nii.gz: the volume has no voxels"):
        preprocess.prepare(replace(volume, data=np.zeros((0, 9, 9), np.float32)), prep)


def test_masks(tmp_path):
    """A skull ring is cut away by a mask file, kept by "none"; noise outside the head is cut away by "head"."""
    volume = head()
    noisy = replace(volume, data=volume.data + np.where(volume.data == 0, 25, 0).astype(np.float32))
    brain = volume.data > 0
    mask = nifti.Volume(brain.astype(np.float32), volume.affine, tmp_path / "mask.nii")
    made = preprocess.prepare(preprocess.masked(noisy, mask), replace(PREP, mask="file"))
    assert not made.data[2:-2, 1:-1, 1:-1][~brain].any() and made.data.max() > 1
    plain = preprocess.prepare(nifti.Volume(noisy.data + 100 * brain, volume.affine), replace(PREP, mask="head"))
    outside = plain.data[2:-2, 1:-1, 1:-1][~brain]
    assert (outside == 0).mean() > 0.95
    with pytest.raises(UserError, match="mask.nii is on another grid"):
        preprocess.masked(noisy, replace(mask, data=mask.data[1:]))
    with pytest.raises(UserError, match="mask.nii: the mask of .* is empty"):
        preprocess.masked(noisy, replace(mask, data=0 * mask.data))


def test_range_and_crop_are_those_of_the_masked_brain():
    """A bright, large scalp decides neither the range nor the place of the crop, and the way back is the same."""
    volume = head((40, 44, 40))
    brain = volume.data > 0
    scan = replace(volume, data=volume.data.copy())
    scan.data[:, :, :3] = 3000  # a bright neck
    stripped = preprocess.masked(scan, nifti.Volume(brain, volume.affine))
    prep = Preparation((32, 40, 32), 2.0, crop="head", mask="file")
    made = preprocess.prepare(stripped, prep)
    np.testing.assert_array_equal(made.data, preprocess.prepare(volume, prep).data)
    back = preprocess.to_native(made.data, prep, stripped)
    np.testing.assert_allclose(back.data, volume.data, atol=0.02)


def test_top_of_a_long_head_is_kept():
    """Where head and neck are higher than the grid, the neck is cut, and 5 mm above the head are left."""
    data = np.zeros((30, 30, 60), np.float32)
    data[8:22, 6:24, :50] = 500
    data[10:20, 8:20, 20:45] = 900
    volume = nifti.Volume(data, np.diag([2.5, 2.5, 2.5, 1]))
    made = preprocess.prepare(volume, Preparation((24, 24, 32), 2.5, crop="head"))
    rows = np.flatnonzero(made.data.any((0, 1)))
    assert rows[-1] == 31 - 2 and rows[0] == 0
    columns = [np.flatnonzero(made.data.any(axes)) for axes in ((1, 2), (0, 2))]
    for seen in columns:
        assert abs((seen[0] + seen[-1]) / 2 - 11.5) <= 0.5


def test_mask_files_of_the_table(cohort, prep, tmp_path):
    """mask_path: read, brought to RAS+ order with the scan, part of the cache's key; another grid is refused."""
    source = next((cohort / "data/scans").rglob("*.nii.gz"))
    volume = nifti.load(source)
    mask = (volume.data > 300).astype(np.uint8)
    path = tmp_path / "mask.nii.gz"
    nifti.save(path, *nifti.reorient(mask, volume.affine, "LPS"), dtype=np.uint8)
    row = replace(row_of(source), mask_path=path)
    volumes = Volumes(replace(prep, mask="file"), tmp_path / "cache")
    first = volumes.load(row)
    assert not first[mask == 0].any() and (first[mask > 0] > 0).all()
    nifti.save(path, 1 - mask, volume.affine, dtype=np.uint8)
    assert not volumes.load(row)[mask > 0].any()
    nifti.save(path, mask[1:], volume.affine, dtype=np.uint8)
    with pytest.raises(UserError, match="another grid"):
        volumes.load(row)
    with pytest.raises(UserError, match="no mask_path"):
        volumes.load(row_of(source))


def test_head_mask_keeps_the_largest_part_and_fills_holes():
    volume = head((40, 44, 40))
    volume.data[18:22, 20:24, 18:22] = 0  # ventricles
    volume.data[1:3, 1:3, 1:3] = 800  # a marker beside the head
    mask = preprocess.head_mask(volume.data)
    assert mask[20, 22, 20] and not mask[:4, :4, :4].any()
    assert abs(mask.sum() / (head((40, 44, 40)).data > 0).sum() - 1) < 0.05


def test_preparation_is_plain_and_checked():
    prep = Preparation(shape=[32, 40, 32], spacing_mm=6, crop="head")
    assert Preparation.from_dict(prep.to_dict()) == prep and prep.to_dict()["shape"] == [32, 40, 32]
    with pytest.raises(UserError, match="missing or unknown entries: colour"):
        Preparation.from_dict(prep.to_dict() | {"colour": 1})
    for wrong in ({"shape": (1, 2)}, {"spacing_mm": 0}, {"intensity": "z"}, {"crop": "x"}, {"mask": "x"},
                  {"order": "LAS"}, {"limit": 0.5}):  # fmt: skip
        with pytest.raises(UserError, match="preparation"):
            Preparation(**wrong)


def test_plan_is_a_record():
    """Plain values only: what a JSON file needs to say what was done."""
    import json

    record = json.loads(json.dumps(preprocess.plan(head(), PREP).to_dict()))
    assert record["shape"] == [20, 26, 22] and record["start"] == [-2, -1, -1] and record["high"] > record["low"] == 0
