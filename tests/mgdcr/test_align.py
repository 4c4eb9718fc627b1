"""Alignment finds the displacements that the phantom was given, whatever contrast and noise, and reports them."""

from dataclasses import replace

import numpy as np
import pytest

from mgdcr import align, geometry, make_phantom
from tests.helpers import run_main


def study(folder, *words):
    """Short-axis cine and views of one phantom of two frames."""
    run_main(make_phantom, "--out", folder, "--n_subjects", 1, "--frames", 2, "--no_dense", *words)
    folder = folder / "subject_001"
    views = {name: geometry.load_lax(folder / f"lax_{name}.nii.gz") for name in make_phantom.VIEWS}
    return geometry.load_sax(folder / "sax.nii.gz"), views


def view_errors(found, views, shift_mm):
    """Distance in mm between the true place of each view's middle and the one found, within the view's plane."""
    errors = []
    for number, (name, view) in enumerate(views.items()):
        angle = np.deg2rad(make_phantom.VIEWS[name])
        off = shift_mm[0] * np.array([np.cos(angle), np.sin(angle), 0]) + shift_mm[1] * np.array([0, 0, 1])
        moved = found.view_grid(number, view.grid).centre_mm - view.grid.centre_mm
        away = moved + off  # the anatomy lies `off` before the place that the header says
        errors.append(np.linalg.norm(away - (away @ view.grid.normal) * view.grid.normal))
    return errors


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    """Views 2 mm across and 1.5 mm along off their headers, with another contrast."""
    folder = tmp_path_factory.mktemp("shifted")
    words = ("--shift_lax", 2, 1.5, 0, "--lax_gain", 1.25, "--lax_offset", 0.05, "--noise_lax", 0.01)
    sax, views = study(folder, *words)
    return sax, views, align.align(sax, views)


def test_A15_views_are_put_back(shifted):
    sax, views, found = shifted
    assert max(view_errors(found, views, (0, 0))) > 2.4  # they are moved by as much
    assert max(view_errors(found, views, (2.0, 1.5))) < 0.4
    for name in views:
        before, after = found.report["before"][name], found.report["after"][name]
        assert after["ncc"] > 0.98 > before["ncc"]
        assert after["difference"] < before["difference"] / 2
        assert after["gain"] == pytest.approx(1 / 1.25, abs=0.03) and after["lines"] == 11


def test_slices_stay_when_only_views_moved(shifted):
    """No resampling of slices that lie where they should: pixels stay as acquired."""
    sax, _, found = shifted
    assert np.abs(found.slice_shifts_mm).max() < align.IGNORE_MM
    np.testing.assert_array_equal(found.corrected(sax.data, sax.grid), sax.data)


def test_aligned_study_is_left_alone(sax, views):
    found = align.align(sax, views)
    assert max(view_errors(found, views, (0, 0))) < 0.25
    assert np.abs(found.slice_shifts_mm).max() < align.IGNORE_MM


def test_slices_are_put_back(tmp_path, sax):
    """Breath-hold shifts of 2 mm SD: the corrected stack is closer to the one without them."""
    moved, views = study(tmp_path, "--shift_sax", 2)
    still = sax.data[::2]  # the same subject; frames 0 and 2 of 4
    found = align.align(moved, views)
    corrected = found.corrected(moved.data, moved.grid)
    crossed = slice(0, 9)  # the last slices show hardly any structure at end-systole
    before = np.sqrt(np.mean((moved.data - still)[:, crossed, 8:-8, 8:-8] ** 2))
    after = np.sqrt(np.mean((corrected - still)[:, crossed, 8:-8, 8:-8] ** 2))
    assert after < before / 2
    assert found.slice_shifts_mm.mean(axis=0) == pytest.approx([0, 0], abs=1e-6)


def test_frames_of_different_number_are_paired(tmp_path):
    sax, views = study(tmp_path, "--lax_frames", 3, "--shift_lax", 2, 0, 0)
    found = align.align(sax, views)
    assert max(view_errors(found, views, (2.0, 0))) < 0.5


def test_A21_nothing_to_align(sax, views):
    far = {"4ch": replace(views["4ch"], grid=views["4ch"].grid.moved([900.0, 0, 0]))}
    for given in ({}, far):
        found = align.align(sax, given)
        assert not found.slice_shifts_mm.any() and not found.view_poses.any()
        np.testing.assert_array_equal(found.corrected(sax.data, sax.grid), sax.data)
    assert found.report["after"]["4ch"] == {"lines": 0, "difference": None, "ncc": None, "gain": 1.0, "offset": 0.0}
    flat = {"4ch": replace(views["4ch"], data=np.zeros_like(views["4ch"].data))}
    assert np.isfinite(align.align(sax, flat).view_poses).all()


def test_intersection_lies_in_both_planes(sax, views):
    for view in views.values():
        points = align.intersection(sax.grid, 4, view.grid)
        assert len(points) > 100
        assert np.abs(sax.grid.voxels(points)[:, 2] - 4).max() < 1e-6
        assert np.abs(view.grid.voxels(points)[:, 2]).max() < 1e-6
    assert len(align.intersection(sax.grid, 4, align.slice_grid(sax.grid, 5))) == 0  # parallel


def test_pose_is_a_rigid_motion_about_the_middle(views):
    grid = views["2ch"].grid
    turned = align.posed(grid, np.array([1.0, 2.0, 3.0, 5.0]))
    assert turned.spacing_mm == pytest.approx(grid.spacing_mm)
    np.testing.assert_allclose(turned.centre_mm - grid.centre_mm, align._basis(grid) @ [1, 2, 3], atol=1e-9)
    assert np.degrees(np.arccos(turned.axes[:, 0] @ grid.axes[:, 0])) == pytest.approx(5.0)
    np.testing.assert_allclose(turned.normal, grid.normal, atol=1e-12)


def test_picture(tmp_path, shifted):
    sax, views, found = shifted
    path = align.save_picture(tmp_path / "alignment.png", sax, views, found)
    assert path.read_bytes().startswith(b"\x89PNG")
    shown = align.stripes(sax.data[0], sax.grid, views["4ch"].data[0, 0], views["4ch"].grid)
    assert shown.shape == (96, 128) and 0 <= shown.min() < shown.max() <= 1


def test_slopes_are_those_of_the_residuals(sax, views):
    """Against one unknown at a time, gains and offsets held."""
    profiles = align.Profiles([sax.data[0]], sax.grid, [[v.data[0, 0]] for v in views.values()],
                              [v.grid for v in views.values()])  # fmt: skip
    at = np.random.default_rng(0).normal(0, 0.7, 22 + 12)
    fits = {view: align.robust_gain_offset(lax, sax) for view in range(3) for sax, lax in [profiles.pair(at, view)]}
    slopes, here = profiles.jacobian(at), profiles.residuals(at, fits=fits)
    for place in range(len(at)):
        moved = at.copy()
        moved[place] += align.NUDGE
        column = (profiles.residuals(moved, fits=fits) - here) / align.NUDGE
        np.testing.assert_allclose(slopes[:, place], column, atol=1e-9)
        assert np.abs(column).max() > 1e-4
