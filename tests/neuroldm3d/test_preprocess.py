"""neuroldm3d/preprocess.py: values against a direct computation, geometry to the voxel, refusal of bad volumes."""

import numpy as np
import pytest
from PIL import Image

from common import nifti
from common.cli import UserError
from neuroldm3d import preprocess
from neuroldm3d.preprocess import Preparation

CAT12 = np.array([[-1.5, 0, 0, 84], [0, 1.5, 0, -120], [0, 0, 1.5, -72], [0, 0, 0, 1.0]])
ZSCORE = Preparation(norm="zscore")


def volume(data, affine=CAT12):
    return nifti.Volume(np.asarray(data, np.float32), affine, "some.nii")


def random_map(shape=(113, 137, 113), seed=0):
    return np.random.default_rng(seed).gamma(1.0, 0.2, shape).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shape_axes_and_crop_fact_1(axis):
    """Fact 1: (1, 112, 136, 112) float32 in the order of the file's axes; the crop starts at index 1."""
    ramp = np.broadcast_to(np.arange((113, 137, 113)[axis]).reshape([-1 if a == axis else 1 for a in range(3)]),
                           (113, 137, 113))  # fmt: skip
    out = preprocess.prepare(volume(ramp), Preparation(norm_scale=10.0)).data[None]
    assert out.shape == (1, 112, 136, 112) and out.dtype == np.float32 and out.flags["C_CONTIGUOUS"]
    line = np.moveaxis(out[0], axis, 0) * 10
    assert np.ptp(line.reshape(len(line), -1), axis=1).max() < 1e-3  # varies along its own axis only
    if axis == 1:
        np.testing.assert_allclose(line[:, 0, 0], np.arange(1, 137), atol=1e-4)
    else:  # voxel i covers 113/112 of the old ones, with the same outer corners
        np.testing.assert_allclose(line[1:-1, 0, 0], (np.arange(112) + 0.5)[1:-1] * 113 / 112 - 0.5, atol=0.02)


def test_zscore_of_the_uncropped_volume_fact_2():
    """Fact 2: mean and population SD come from the un-cropped volume; without a resize the result is exact."""
    data = random_map((112, 137, 112))
    data[:, 0] = 5.0  # only the slice that is cropped away
    direct = (data.astype(np.float64) - data.mean(dtype=np.float64)) / data.std(dtype=np.float64)
    out = preprocess.prepare(volume(data), ZSCORE).data
    assert np.abs(out - direct[:, 1:]).max() < 1e-5
    cropped = data[:, 1:]
    assert np.abs(out - (cropped - cropped.mean()) / cropped.std()).max() > 0.1


def test_resize_is_pillows():
    """Every coronal slice as Pillow resizes a float image: bilinear and antialiased."""
    data = random_map((61, 40, 51), seed=1)
    prep = Preparation(shape=(40, 36, 45), crop_start=2, norm_scale=0.5)
    out = preprocess.prepare(volume(data), prep).data
    for j in (0, 17, 35):
        image = Image.fromarray(data[:, j + 2] / 0.5).resize((45, 40), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(out[:, j], np.asarray(image), atol=4e-5)


def test_affine_of_the_published_grid():
    out = preprocess.prepare(volume(random_map()), ZSCORE)
    expected = [[-1.5133929, 0, 0, 83.9933036], [0, 1.5, 0, -118.5], [0, 0, 1.5133929, -71.9933036], [0, 0, 0, 1]]
    np.testing.assert_allclose(out.affine, expected, atol=1e-6)


def test_affine_keeps_the_outer_corners():
    """Also of an oblique grid: corners of the resized axes and the cropped slices stay where they were in the world."""
    rng = np.random.default_rng(0)
    affine = np.eye(4)
    affine[:3] = rng.normal(size=(3, 4)) * [1, 1, 1, 30] + np.c_[np.diag([-2, 2, 2]), np.zeros(3)]
    prep = Preparation(shape=(20, 30, 25), crop_start=3)
    out, old = preprocess.prepared_affine(affine, (33, 41, 31), prep), affine
    for corner in np.ndindex(2, 2, 2):
        new_voxel = np.array(corner) * prep.shape - 0.5
        old_voxel = np.array(corner) * [33, 30, 31] - 0.5 + [0, 3, 0]
        np.testing.assert_allclose(out @ [*new_voxel, 1], old @ [*old_voxel, 1], atol=1e-9)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "ASR"])
def test_orientation_on_disk_does_not_matter(tmp_path, prep, cohort, axes):
    path = next((cohort / "data/gm").iterdir())
    expected = preprocess.prepare(nifti.load(path), prep)
    source = nifti.load(path)
    nifti.save(tmp_path / "turned.nii", *nifti.reorient(source.data, source.affine, axes))
    out = preprocess.prepare(nifti.load(tmp_path / "turned.nii"), prep)
    np.testing.assert_array_equal(out.data, expected.data)
    np.testing.assert_allclose(out.affine, expected.affine, atol=1e-4)
    assert out.shape == (32, 40, 32) and out.affine[0, 0] < 0 < out.affine[1, 1]  # LAS


def test_native_units_come_back():
    data, prep = random_map((112, 137, 112)), Preparation()
    data[:20] = 0
    out = preprocess.prepare(volume(data), prep).data
    assert (out[:20] == 0).all()  # background stays 0
    np.testing.assert_allclose(preprocess.denormalise(out, prep), data[:, 1:], rtol=1e-6)
    assert preprocess.units(prep) == "GM fraction" and preprocess.units(ZSCORE) == "z-score"
    assert preprocess.denormalise(out, ZSCORE) is out


@pytest.mark.parametrize("norm", preprocess.NORMS)
def test_constant_and_nan_volumes_are_refused_fact_5(norm):
    """Fact 5: a named error and no NaN tensor."""
    prep, data = Preparation(shape=(32, 40, 32), norm=norm), random_map((33, 41, 33))
    with pytest.raises(UserError, match="some.nii: every voxel is 0.3"):
        preprocess.prepare(volume(np.full((33, 41, 33), 0.3)), prep)
    data[3, 4, 5] = np.nan
    with pytest.raises(UserError, match="some.nii: voxels are NaN"):
        preprocess.prepare(volume(data), prep)


def test_other_bad_volumes_are_refused():
    with pytest.raises(UserError, match="no coronal slices 1 to 136"):
        preprocess.prepare(volume(random_map((113, 136, 113))), Preparation())
    with pytest.raises(UserError, match="norm_scale"):  # a raw T1
        preprocess.prepare(volume(random_map((33, 41, 33)) * 1000), Preparation(shape=(32, 40, 32)))


def test_preparation_as_plain_values():
    prep = Preparation(shape=[32, 40, 32], crop_start=0, norm="zscore", norm_scale=0.3)
    assert Preparation.from_dict(prep.to_dict()) == prep and prep.to_dict()["shape"] == [32, 40, 32]
    with pytest.raises(UserError, match="missing or unknown entries: crop_start"):
        Preparation.from_dict({"shape": [1, 1, 1], "norm": "native", "norm_scale": 1.0})
    for bad in ({"norm": "minmax"}, {"norm_scale": 0.0}, {"shape": (1, 0, 1)}, {"crop_start": -1}):
        with pytest.raises(UserError, match="preparation"):
            Preparation(**bad)


def test_classifier_input_lines_up_with_the_volume_fact_3():
    """Fact 3: (115, 128, 128), with a leading axis in 3D mode; slice 9 of the VAE grid is slice 10 of the original."""
    data = random_map()
    prepared = preprocess.prepare(volume(data), ZSCORE)
    x = preprocess.classifier_input(prepared.data, ZSCORE, pad="zero")
    assert x.shape == (115, 128, 128) and x[None].shape == (1, 115, 128, 128) and x.dtype == np.float32
    # The original cuts slices 10..124 out of the volume on disk; a synthetic volume is on the VAE grid.
    direct = preprocess.prepare(volume(data), Preparation(shape=(112, 115, 112), crop_start=10, norm="zscore")).data
    np.testing.assert_array_equal(x[:, 8:-8, 8:-8], direct.transpose(1, 0, 2))
    frame = np.ones((128, 128), bool)
    frame[8:-8, 8:-8] = False
    assert (x[:, frame] == 0).all()
    background = preprocess.classifier_input(prepared.data, ZSCORE)
    assert (background[:, frame] == prepared.data[:, preprocess.classifier_slices(ZSCORE)].min()).all()
    np.testing.assert_array_equal(background[:, ~frame], x[:, ~frame])


def test_classifier_input_of_small_grids(prep):
    x = preprocess.classifier_input(random_map((32, 40, 32)), prep)
    assert x.shape == (34, 36, 36)
    with pytest.raises(ValueError, match="prepared volume"):
        preprocess.classifier_input(random_map((32, 41, 32)), prep)


def test_rotation():
    slices = random_map((3, 16, 16))
    np.testing.assert_array_equal(preprocess.rotate_slices(slices, 0, -1), slices)
    np.testing.assert_array_equal(preprocess.rotate_slices(slices, 90, -1), np.rot90(slices, axes=(1, 2)))
    turned = preprocess.rotate_slices(slices, 45, -1)
    assert (turned[:, 0, 0] == -1).all() and turned.dtype == np.float32
    assert set(turned[0].ravel()) <= set(slices[0].ravel()) | {-1}  # nearest neighbour: no new values
