"""Start codes and every term of the inverse optimisation, against the published scripts and by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.cli import UserError
from mgdcr import objective
from mgdcr.geometry import Grid, PlaneSampler, dense_grid
from mgdcr.objective import LEGACY, FrameData, Objective, Painted, View
from tests import golden
from tests.golden.fill import tensor

GOLDEN = Path(golden.__file__).parent / "mgdcr"


def case(name):
    spec = json.loads((GOLDEN / f"{name}.json").read_text())
    drawn = {k: v for k, v in spec["inputs"].items() if isinstance(v, dict) and "seed" in v}
    return {k: tensor(v["seed"], v["shape"]) for k, v in drawn.items()}, np.load(GOLDEN / f"{name}.npz")


def legacy(name, goal, empty=(), dark=()):
    """Terms of a reference case, its expected outputs and the leaves that have gradients."""
    drawn, expected = case(name)
    pred, x, z = (v.requires_grad_() for v in (drawn["pred"].sigmoid(), drawn["x"], drawn["z"]))
    target, mask = drawn["target"].abs() * 0.4, (drawn["mask"] > 0.5).float()
    mask[list(empty)], target[list(dark)] = 0, 0
    data = FrameData(torch.zeros(0), 8, drawn["x0"], drawn["z0"], painted=Painted(target, mask))
    terms = goal.image_terms(pred[:, 0], data) | goal.code_terms(x, z, data)
    return terms, expected, {"pred": pred, "x": x, "z": z}


def view_at(rows=12, depth=3, column=5.0, factor=4):
    """A view in the plane x = column of a stack of unit voxels, with as many pixels as dense rows and slices."""
    sax = Grid(np.diag([1.0, 1.0, factor, 1.0]), (depth, rows, 11))
    n = factor * (depth - 1) + 1
    affine = np.array([[0, 0, 1, column], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])  # image x is z of the stack
    sampler = PlaneSampler(dense_grid(sax, factor), Grid(affine, (1, rows, n)))
    return sampler, n


class TestSeeds:
    def test_a8_even_alphas_exact_ends_and_finite_for_equal_slices(self):
        x, z = torch.randn(3, 1, 6, 5), torch.randn(3, 4)
        x[1] = x[0]
        dense_x, dense_z = objective.seeds(x, z, 8)
        assert dense_x.shape == (17, 1, 6, 5) and dense_z.shape == (17, 4)
        assert torch.equal(dense_x[::8], x) and torch.equal(dense_z[::8], z)
        assert dense_x.isfinite().all() and torch.allclose(dense_x[3], x[0])
        torch.testing.assert_close(dense_z[11], z[1] + 3 / 8 * (z[2] - z[1]))

    def test_a8_opposite_codes_are_finite(self):
        x = torch.randn(1, 4, 4)
        assert objective.slerp(x, -x, 0.3).isfinite().all() and objective.slerp(x, 0 * x, 0.3).isfinite().all()

    def test_a8_slerp_keeps_the_norm_and_the_angle(self):
        a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        torch.testing.assert_close(objective.slerp(a, b, 1 / 3), torch.tensor([3**0.5 / 2, 0.5]))

    @pytest.mark.parametrize("schedule, ending", [("legacy", "legacy"), ("even", "exact")])
    def test_reference_seeds(self, schedule, ending):
        drawn, expected = case("seeds")
        x, z = objective.seeds(drawn["x"], drawn["z"], 8, schedule)
        np.testing.assert_allclose(x.numpy(), expected[f"x_{ending}"], atol=1e-6)
        np.testing.assert_allclose(z.numpy(), expected[f"z_{ending}"], atol=1e-6)

    def test_legacy_schedule_repeats_the_first_slice(self):
        assert objective.alphas(8, "legacy") == [0, 0, *(k / 7 for k in range(1, 7))]
        with pytest.raises(UserError, match="even or legacy"):
            objective.alphas(8, "odd")


@pytest.mark.parametrize("name, preset", [("terms_final", "ex8_norm"), ("terms_multi", "ex8_multi")])
def test_a29_legacy_terms_and_gradients(name, preset):
    """A29: both published objectives, term by term, with gradients."""
    goal = LEGACY[preset]
    terms, expected, leaves = legacy(name, goal)
    np.testing.assert_allclose(terms["lax"].detach(), expected["roi_losses"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(goal.prior * terms["prior"].detach(), expected["prior_losses"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(terms["difference"].detach(), expected["smooth_losses"], rtol=1e-6, atol=1e-6)
    total = goal.total(terms)
    np.testing.assert_allclose(total.detach(), expected["total_loss"], rtol=1e-6)
    total.backward()
    for leaf, value in leaves.items():
        np.testing.assert_allclose(value.grad, expected[f"grad:total:{leaf}"], atol=1e-6)


def test_a21_empty_masks_are_finite_where_the_original_is_not():
    goal = LEGACY["ex8_norm"]
    terms, expected, leaves = legacy("terms_empty_mask", goal, empty=(1, 3), dark=(3,))
    good = [0, 2, 4]
    assert not np.isfinite(expected["roi_losses"][[1, 3]]).any()
    assert terms["lax"][[1, 3]].eq(0).all()
    np.testing.assert_allclose(terms["lax"].detach()[good], expected["roi_losses"][good], rtol=1e-6, atol=1e-6)
    goal.total(terms).backward()
    assert leaves["pred"].grad.isfinite().all()


class TestTerms:
    def test_robust_squares_near_zero_and_lines_far_away(self):
        r = torch.tensor([1e-3, 10.0])
        for kind in ("huber", "charbonnier"):
            near, far = objective.robust(r, kind, 0.1)
            assert near == pytest.approx(1e-6, rel=1e-3) and far == pytest.approx(2 * 0.1 * 10, rel=0.02)

    def test_contrast_is_the_least_squares_line_without_gradient(self):
        p = torch.linspace(0, 1, 40, requires_grad=True)
        gain, offset = objective.contrast(p, 1.25 * p.detach() + 0.05, torch.ones(40))
        assert gain == pytest.approx(1.25, rel=1e-5) and offset == pytest.approx(0.05, abs=1e-6)
        assert not gain.requires_grad

    def test_contrast_of_a_flat_or_inverted_prediction_keeps_gain_one(self):
        g = torch.linspace(0, 1, 40)
        for p in (torch.full((40,), 0.2), 1 - g):
            gain, offset = objective.contrast(p, g, torch.ones(40))
            assert gain == 1 and offset == pytest.approx(float(g.mean() - p.mean()), abs=1e-6)

    def test_sax_term_sees_acquired_slices_only(self):
        volume, sax = torch.rand(9, 4, 4), torch.rand(3, 4, 4)
        volume[::4] = sax
        assert objective.sax_term(volume, sax, 4, "square", 1).sum() == 0
        volume[4] += 0.5
        assert objective.sax_term(volume, sax, 4, "square", 1).tolist() == pytest.approx([0] * 4 + [0.25] + [0] * 4)

    def test_lax_term_ignores_gain_offset_and_unused_pixels(self):
        sampler, n = view_at()
        volume = torch.rand(n, 12, 11)
        values, weights = 1.25 * sampler.sample(volume) + 0.05, torch.ones(len(sampler))
        weights[:7], values[:7] = 0, 0
        view = View("2ch", sampler, values, weights)
        assert objective.lax_term(volume, view, "square", 1).sum() < 1e-10
        assert objective.lax_term(volume, view, "square", 1, match=False).sum() > 0.1

    def test_lax_term_books_a_pixel_at_its_slice(self):
        sampler, n = view_at()
        volume = torch.rand(n, 12, 11)
        values = sampler.sample(volume)
        values[sampler.coordinates[:, 0] == 6] += 0.1
        term = objective.lax_term(volume, View("v", sampler, values, torch.ones(len(values))), "square", 1, False)
        assert term.nonzero().flatten().tolist() == [6]
        assert term[6] == pytest.approx(0.01, rel=1e-4)  # of N / n pixels times a row's share 1 / N

    def test_view_without_usable_pixels_adds_nothing(self):
        sampler, n = view_at()
        view = View("v", sampler, torch.zeros(len(sampler)), torch.zeros(len(sampler)))
        assert objective.lax_term(torch.rand(n, 12, 11), view, "huber", 0.1).sum() == 0

    def test_curvature_spares_straight_lines_and_difference_does_not(self):
        ramp = torch.arange(5.0)[:, None, None].expand(5, 3, 3)
        assert objective.curvature_term(ramp).sum() == 0
        assert objective.difference_term(ramp).tolist() == [1, 2, 2, 2, 1]
        assert objective.curvature_term(torch.rand(2, 3, 3)).tolist() == [0, 0]

    def test_norm_and_prior(self):
        x = torch.full((2, 1, 4, 4), 2.0)
        assert objective.norm_term(x).tolist() == [9, 9]
        assert objective.prior_term(x, torch.ones(2, 3), x - 1, torch.zeros(2, 3)).tolist() == [2, 2]

    def test_temporal_adds_over_both_phases(self):
        volume = torch.zeros(2, 3, 3)
        assert objective.temporal_term(volume, [volume + 1, volume - 2]).tolist() == [5, 5]
        assert objective.temporal_term(volume, []).tolist() == [0, 0]

    def test_weights_of_zero_are_not_computed(self):
        data = FrameData(torch.rand(2, 4, 4), 2, torch.rand(3, 1, 4, 4), torch.rand(3, 2))
        goal = Objective(sax=0, lax=0, prior=0, norm=1, curvature=0, temporal=0)
        assert list(goal.image_terms(torch.rand(3, 4, 4), data) | goal.code_terms(data.seed_x, data.seed_z, data)) == [
            "norm"]  # fmt: skip

    def test_blame_names_slice_and_term(self):
        bad = torch.zeros(4)
        bad[2] = torch.nan
        assert objective.blame({"sax": torch.zeros(4), "lax_2ch": bad}) == "slice 2 of term lax_2ch"
        assert objective.blame({"sax": torch.zeros(4)}) == ""

    def test_bad_weights_are_refused(self):
        with pytest.raises(UserError):
            Objective(lax=-1)
        with pytest.raises(UserError):
            Objective(rho="cube")
