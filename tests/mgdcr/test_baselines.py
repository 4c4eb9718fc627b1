"""Interpolations along the slices, and what the long-axis views add to them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.cli import UserError
from mgdcr import baselines, geometry, make_phantom, study
from mgdcr.baselines import INTERPOLATIONS
from mgdcr.evaluate import image_scores, region, unobserved

FACTOR = 8


def phantom(phase=0.0, gain=1.0, offset=0.0, views=("4ch", "2ch", "3ch"), pixel=make_phantom.PIXEL_MM):
    """A frame of the phantom, its dense truth in the frame's scale, and the mask of its region of interest."""
    factors = make_phantom.draw_factors(0, 1)
    dense = make_phantom.image(factors, phase, *make_phantom.dense_points()).astype(np.float32)
    stack = np.ascontiguousarray(dense[None, ::FACTOR])
    sax = geometry.Cine(stack, geometry.Grid(make_phantom.stack_affine(8.0), stack.shape[1:]))
    cines = {}
    for name in views:
        shape = make_phantom.lax_shape(pixel)
        image = make_phantom.image(factors, phase, *make_phantom.lax_points(name, pixel)).reshape(1, 1, *shape)
        grid = geometry.Grid(make_phantom.lax_affine(name, pixel), (1, *shape))
        cines[name] = geometry.Cine((gain * image + offset).astype(np.float32), grid)
    loaded = study.prepare("phantom", sax, cines, factor=FACTOR, align=False)
    truth = (loaded.scale.normalise(dense, clip=False) + 1) / 2
    frame = study.frame_of(loaded, 0)
    return frame, truth, region(truth.shape, frame.spacing_mm, make_phantom.ROI_MM)


def psnr(volume, truth, mask):
    return image_scores(volume, truth, mask, unobserved(len(truth), FACTOR))["psnr_db"]


@pytest.mark.parametrize("kind", INTERPOLATIONS)
def test_a9_acquired_slices_stay_and_constants_are_constant(kind):
    stack = np.random.default_rng(0).random((5, 4, 3)).astype(np.float32)
    volume = baselines.interpolate(stack, 4, kind)
    assert volume.shape == (17, 4, 3) and volume.dtype == np.float32
    np.testing.assert_allclose(volume[::4], stack, atol=1e-6)
    np.testing.assert_allclose(baselines.interpolate(np.full((5, 2, 2), 0.3), 4, kind), 0.3, atol=1e-6)


def test_linear_and_cubic_are_exact_for_their_polynomials():
    t = np.arange(6.0)[:, None, None]
    fine = np.arange(0, 5.01, 0.25)[:, None, None]
    np.testing.assert_allclose(baselines.interpolate(2 * t + 1, 4, "linear"), 2 * fine + 1, atol=1e-5)
    np.testing.assert_allclose(baselines.interpolate(t**3, 4, "cubic"), fine**3, rtol=1e-5, atol=1e-4)
    assert np.unique(baselines.interpolate(t, 4, "nearest")).tolist() == [0, 1, 2, 3, 4, 5]


def test_lanczos_follows_a_slow_wave_better_than_linear():
    t, fine = np.arange(24.0), np.arange(0, 23.01, 0.25)
    stack, truth = np.cos(t)[:, None, None], np.cos(fine)[:, None, None]
    inner = slice(16, -16)
    errors = {kind: np.abs(baselines.interpolate(stack, 4, kind) - truth)[inner].max() for kind in INTERPOLATIONS}
    assert errors["lanczos"] < 0.5 * errors["linear"] < errors["nearest"]


def test_a21_two_slices_have_every_interpolation():
    stack = np.random.default_rng(0).random((2, 4, 4)).astype(np.float32)
    for kind in INTERPOLATIONS:
        assert np.isfinite(baselines.interpolate(stack, 8, kind)).all()
    assert baselines.better_interpolation(stack) == "linear"
    with pytest.raises(UserError, match="choose nearest"):
        baselines.interpolate(stack, 8, "magic")


def test_better_interpolation_needs_no_truth():
    t = np.linspace(0, 4, 9)[:, None, None]
    smooth, rough = np.sin(t) * np.ones((1, 3, 3)), np.random.default_rng(1).random((9, 3, 3))
    assert baselines.better_interpolation(smooth) == "cubic"
    assert baselines.better_interpolation(rough) == "linear"
    assert baselines.better_interpolation(smooth, 0.1 * rough) == "cubic"  # one answer for several phases
    assert baselines.better_interpolation(0.1 * smooth, rough) == "linear"


class TestLaxResidual:
    @pytest.mark.parametrize("phase", [0.0, 0.5])
    def test_a12_views_add_two_decibels(self, phase):
        """The residual alone passes A12's threshold on the ideal phantom: end-diastole and end-systole."""
        frame, truth, mask = phantom(phase)
        best = max(psnr(baselines.interpolate(frame.sax, FACTOR, kind), truth, mask) for kind in ("linear", "cubic"))
        linear = baselines.interpolate(frame.sax, FACTOR)
        ours = baselines.lax_residual(linear, frame.views, FACTOR, frame.spacing_mm)
        assert psnr(ours, truth, mask) > best + 2
        np.testing.assert_array_equal(ours[::FACTOR], linear[::FACTOR])

    def test_a14_a16_contrast_and_single_view(self):
        """A14: gain 1.25, offset 0.05. A16: one view, and none."""
        for views, gain, wanted in ((("4ch", "2ch", "3ch"), 1.25, 1.5), (("4ch",), 1.0, 0.5)):
            frame, truth, mask = phantom(gain=gain, offset=0.05 * (gain > 1), views=views)
            linear = baselines.interpolate(frame.sax, FACTOR)
            ours = baselines.lax_residual(linear, frame.views, FACTOR, frame.spacing_mm)
            assert psnr(ours, truth, mask) > psnr(linear, truth, mask) + wanted
        np.testing.assert_array_equal(baselines.lax_residual(linear, [], FACTOR, frame.spacing_mm), linear)

    def test_a15_views_are_trusted_as_far_as_they_agree_with_the_slices(self):
        """A15, A16: nearly fully where ideal, little where displaced by a pixel, in between with noise."""
        frame, truth, _ = phantom(pixel=1.0)
        linear = torch.from_numpy(baselines.interpolate(frame.sax, FACTOR))
        assert min(float(view.weights.max()) for view in frame.views) > 0.9
        view, generator = frame.views[0], torch.Generator().manual_seed(0)
        noisy = replace(view, values=view.values + 0.05 * torch.randn(len(view.values), generator=generator))
        displaced = replace(view, values=view.sampler.sample(torch.from_numpy(np.roll(truth, 1, axis=2))))
        found = [baselines.trust(linear, v, FACTOR) for v in (view, noisy, displaced)]
        assert found[0] > 0.9 > found[1] > 0.4 > found[2]

    def test_a21_views_without_pixels_and_along_the_slices_are_left_out(self):
        frame, _, _ = phantom(views=("4ch",))
        view = frame.views[0]
        linear = baselines.interpolate(frame.sax, FACTOR)
        view.weights = torch.zeros_like(view.weights)
        np.testing.assert_array_equal(baselines.lax_residual(linear, [view], FACTOR, frame.spacing_mm), linear)

        class Flat:
            coordinates = torch.tensor([[4.0, r, c] for r in range(30) for c in range(30)])

            def sample(self, volume):
                return volume[4, :30, :30].reshape(-1)

        flat = type(view)("flat", Flat(), torch.rand(900), torch.ones(900))
        np.testing.assert_array_equal(baselines.lax_residual(linear, [flat], FACTOR, frame.spacing_mm), linear)
