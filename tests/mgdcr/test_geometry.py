"""Grids, the long-axis operator, frames paired by phase: against closed forms and the analytic phantom."""

import warnings

import nibabel as nib
import numpy as np
import pytest
import torch

from mgdcr import geometry, intensity, make_phantom
from mgdcr.geometry import Grid, PlaneSampler
from tests.helpers import run_main


def oblique(shape=(5, 12, 10), spacing=(1.5, 1.7, 9.0), flips=(1, 1, 1)):
    """A grid at a slant, with axes possibly backwards."""
    turn = make_phantom.world("oblique")[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(np.array(spacing) * flips)
    affine[:3, 3] = [-30.0, 12.0, 55.0]
    return Grid(affine, shape)


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
def test_A10_dense_slices_lie_where_the_acquired_ones_do(flips):
    grid = oblique(flips=flips)
    dense = geometry.dense_grid(grid, 8)
    assert dense.shape == (33, 12, 10) and dense.spacing_mm == pytest.approx((1.5, 1.7, 9 / 8))
    for number in range(5):
        corners = np.array([[0, 0], [9, 0], [0, 11], [9, 11]])
        acquired = grid.world(np.column_stack([corners, np.full(4, number)]))
        between = dense.world(np.column_stack([corners, np.full(4, 8 * number)]))
        assert np.abs(acquired - between).max() <= 1e-4
    np.testing.assert_allclose(grid.voxels(grid.world([3.0, 4.0, 2.0])), [3, 4, 2], atol=1e-9)


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
def test_A10_files_keep_their_axis_order_and_place(tmp_path, flips):
    grid = oblique(flips=flips)
    data = np.random.default_rng(0).random((3, *grid.shape), dtype=np.float32)
    geometry.save(tmp_path / "a.nii.gz", data, grid, 0.04)
    stored = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(stored.get_fdata(dtype=np.float32), data.transpose(3, 2, 1, 0))
    assert stored.header.get_zooms()[3] == pytest.approx(0.04) and stored.header.get_xyzt_units() == ("mm", "sec")
    np.testing.assert_allclose(stored.get_sform(), stored.get_qform(), atol=1e-4)

    cine = geometry.load_cine(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(cine.data, data)
    np.testing.assert_allclose(cine.grid.affine, grid.affine, atol=1e-4)
    assert cine.frame_s == pytest.approx(0.04) and cine.valid is None


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_view_may_have_its_slice_along_any_axis(tmp_path, axis):
    data = np.random.default_rng(1).random((9, 7, 2), dtype=np.float32)  # two axes and frames
    file = np.expand_dims(data, axis)
    nib.save(nib.Nifti1Image(file, oblique().affine), tmp_path / "view.nii.gz")
    view = geometry.load_lax(tmp_path / "view.nii.gz")
    assert view.grid.shape == (1, 7, 9) and view.frames == 2
    np.testing.assert_array_equal(view.data[1, 0], data[..., 1].T)
    voxel = np.insert([4, 3], axis, 0)  # of the file
    np.testing.assert_allclose(view.grid.world([4, 3, 0]), oblique().world(voxel), atol=1e-4)


def test_crop_keeps_every_pixel_in_its_place(sax):
    small = geometry.crop_or_pad(sax, (40, 48))
    assert small.data.shape == (4, 11, 40, 48)
    np.testing.assert_array_equal(small.data, sax.data[..., 12:52, 8:56])
    np.testing.assert_allclose(small.grid.world([0, 0, 3]), sax.grid.world([8, 12, 3]))
    np.testing.assert_array_equal(geometry.crop_or_pad(small, 64).data[..., 12:52, 8:56], small.data)
    np.testing.assert_allclose(geometry.crop_or_pad(small, 64).grid.affine, sax.grid.affine)


# ---- long-axis operator ----------------------------------------------------------------------------------------------


def test_operator_is_exact_for_a_linear_volume():
    """Trilinear interpolation reproduces a linear function of the world, whatever the affines."""
    dense, slope = geometry.dense_grid(oblique(), 4), np.array([0.3, -0.2, 0.7])
    z, y, x = np.indices(dense.shape)
    volume = torch.from_numpy(dense.world(np.stack([x, y, z], -1)) @ slope)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = dense.axes[:, 2], dense.axes @ [0.6, 0.8, 0]
    affine[:3, 2] = 6 * np.cross(affine[:3, 0], affine[:3, 1])
    affine[:3, 3] = dense.centre_mm - affine[:3, :3] @ [20, 10, 0]
    view = Grid(affine, (1, 21, 41))
    for points in (1, 5):
        sampler = PlaneSampler(dense, view, points, thickness_mm=3.0)
        assert 50 < len(sampler) < 21 * 41
        rows, columns = np.divmod(sampler.pixels.numpy(), 41)
        expected = view.world(np.column_stack([columns, rows, 0 * rows])) @ slope
        np.testing.assert_allclose(sampler.sample(volume).numpy(), expected, atol=1e-4)
        assert (sampler.coordinates >= 0).all() and (sampler.coordinates <= torch.tensor(dense.shape) - 1).all()


@pytest.mark.parametrize("orientation", make_phantom.ORIENTATIONS)
def test_A11_dense_phantom_at_long_axis_pixels(tmp_path, orientation):
    run_main(make_phantom, "--out", tmp_path, "--n_subjects", 1, "--frames", 2, "--orientation", orientation)
    folder = tmp_path / "subject_001"
    dense, sax = geometry.load_cine(folder / "dense.nii.gz"), geometry.load_sax(folder / "sax.nii.gz")
    grid = geometry.dense_grid(sax.grid)
    np.testing.assert_allclose(grid.affine, dense.grid.affine, atol=1e-4)
    for name in make_phantom.VIEWS:
        view = geometry.load_lax(folder / f"lax_{name}.nii.gz")
        sampler = PlaneSampler(grid, view.grid)
        assert len(sampler) > 9000
        for frame in (0, 1):
            error = sampler.sample(torch.from_numpy(dense.data[frame])) - sampler.values(view.data[frame])
            assert error.square().mean().sqrt() <= 0.02


def test_operator_is_differentiable_and_works_on_chunks(dense, views, sax):
    sampler = PlaneSampler(geometry.dense_grid(sax.grid), views["2ch"].grid)
    volume = torch.from_numpy(dense.data[0]).requires_grad_()
    whole = sampler.sample(volume)
    whole.sum().backward()
    assert volume.grad.sum() == pytest.approx(len(sampler), rel=1e-4)  # the weights of a pixel sum to 1
    seen = torch.zeros(len(sampler), dtype=torch.bool)
    for k0 in range(0, 81, 10):
        k1 = min(k0 + 11, 81)  # one slice of halo
        chosen = sampler.slices(k0, k1)
        part = sampler.sample(volume.detach()[k0:k1], chosen, first_slice=k0)
        torch.testing.assert_close(part, whole.detach()[chosen], rtol=0, atol=1e-6)
        seen[chosen] = True
    assert seen.all()


def test_picture_and_values_are_inverse(views, sax):
    sampler = PlaneSampler(geometry.dense_grid(sax.grid), views["4ch"].grid)
    image = views["4ch"].data[0, 0]
    picture = sampler.picture(sampler.values(image))
    seen = np.isfinite(picture)
    assert seen.sum() == len(sampler) < image.size
    np.testing.assert_array_equal(picture[seen], image[seen])


def test_a_plane_off_the_stack_has_no_pixels(sax):
    far = Grid(np.diag([1.0, 1, 1, 1]) + np.array([[0, 0, 0, 900.0]] + [[0] * 4] * 3), (1, 20, 20))
    sampler = PlaneSampler(geometry.dense_grid(sax.grid), far)
    assert len(sampler) == 0 and sampler.sample(torch.zeros(81, 64, 64)).shape == (0,)
    assert len(sampler.slices(0, 81)) == 0


def test_painted_view_is_the_view(dense, views, sax):
    """The legacy target: one voxel thick, with the values of the dense truth."""
    painted, mask = geometry.paint(dense.grid, views["4ch"].grid, views["4ch"].data[0])
    assert mask.any(axis=(1, 2)).sum() >= 80 and mask.sum(axis=1).max() <= 2
    assert np.sqrt(np.mean((painted - dense.data[0])[mask] ** 2)) < 0.05
    assert not painted[~mask].any()


# ---- frames ----------------------------------------------------------------------------------------------------------


def test_frames_are_paired_by_phase():
    """25 and 30 frames of one beat: a signal of the phase alone agrees at all pairs."""
    grid = Grid(np.eye(4), (1, 8, 8))

    def cine(frames):
        values = np.cos(2 * np.pi * np.arange(frames) / frames)
        return geometry.Cine(
            np.ones((frames, 1, 8, 8), np.float32) * values[:, None, None, None].astype(np.float32), grid, 1 / frames
        )

    paired = geometry.resample_frames(cine(30), 25)
    assert paired.frames == 25 and paired.frame_s == pytest.approx(1 / 25)
    np.testing.assert_allclose(paired.data, cine(25).data, atol=0.01)
    assert geometry.resample_frames(cine(25), 25).data is not None
    still = geometry.resample_frames(cine(1), 25)
    assert (still.data == 1).all()


def test_last_phase_lies_between_the_last_frame_and_the_first():
    data = np.arange(4, dtype=np.float32)[:, None, None, None] * np.ones((1, 1, 2, 2), np.float32)
    image, _ = geometry.frame_at(geometry.Cine(data, Grid(np.eye(4), (1, 2, 2))), 3.5)
    np.testing.assert_allclose(image, 1.5)


# ---- intensities -----------------------------------------------------------------------------------------------------


def test_scale_restores_what_it_did_not_clip():
    stack = np.random.default_rng(0).uniform(100, 1900, (3, 9, 9)).astype(np.float32)
    scaled, scale = intensity.normalise(stack, percentiles=(0, 100))
    assert scaled.min() == -1 and scaled.max() == 1
    np.testing.assert_allclose(scale.restore(scaled), stack, rtol=1e-4)


def test_percentiles_come_from_inside_the_mask():
    stack, mask = np.zeros((40, 40), np.float32), np.zeros((40, 40), bool)
    stack[3], mask[3] = np.linspace(50, 100, 40), True
    assert intensity.Scale.of(stack, mask, (0, 100)) == intensity.Scale(50, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert intensity.Scale.of(stack, percentiles=(0.5, 90)).high > 0  # mostly background


def test_gain_and_offset_in_closed_form_and_despite_outliers():
    rng = np.random.default_rng(0)
    view = rng.random(400)
    target = 0.8 * view - 0.04
    assert intensity.gain_offset(view, target) == pytest.approx((0.8, -0.04))
    target[::10] += 3 * rng.random(40)
    assert intensity.robust_gain_offset(view, target) == pytest.approx((0.8, -0.04), abs=1e-3)


@pytest.mark.parametrize("prediction", [np.ones(50), np.arange(3.0), np.zeros(0), -np.arange(50.0)])
def test_no_gain_from_nothing(prediction):
    gain, offset = intensity.gain_offset(prediction, np.arange(len(prediction), dtype=float) + 5)
    assert gain == 1.0 and np.isfinite(offset)
