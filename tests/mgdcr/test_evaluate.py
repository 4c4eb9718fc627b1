"""Scores, clinical indices, leave-one-out, and the evaluation script."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from common.cli import UserError
from mgdcr import evaluate, geometry, indices, make_phantom, study
from tests.helpers import run_main, run_script

SCRIPT = "mgdcr/evaluate.py"


def small_study(depth=5, frames=1):
    rng = np.random.default_rng(0)
    base = rng.random((frames, 1, 12, 12))
    data = (base + 0.1 * np.arange(depth)[None, :, None, None]).astype(np.float32)
    sax = geometry.Cine(data, geometry.Grid(np.diag([2.0, 2.0, 8.0, 1.0]), data.shape[1:]))
    return study.prepare("small", sax, {}, factor=4, align=False)


class TestIndices:
    def test_volumes_mass_and_ef(self):
        labels = np.zeros((2, 4, 10, 10), np.uint8)
        labels[0, :, :5, :5], labels[1, :, :5, :2] = 1, 1
        labels[0, :, 6:8, :5] = 2
        found = indices.function(labels, (8, 2, 2))
        assert found["edv_ml"] == pytest.approx(4 * 25 * 32 / 1000)
        assert found["ef"] == pytest.approx(1 - 10 / 25) and (found["ed_frame"], found["es_frame"]) == (0, 1)
        assert found["sv_ml"] == pytest.approx(found["edv_ml"] - found["esv_ml"])
        assert found["mass_g"] == pytest.approx(1.05 * 4 * 10 * 32 / 1000)

    def test_a19_phases_are_found_across_the_closed_cycle(self):
        curve = 100 + 30 * np.cos(2 * np.pi * (np.arange(20) - 3) / 20)
        assert indices.phases(curve) == (3, 13)
        spike = curve.copy()
        spike[8] = 131  # one bad frame is not end-diastole
        assert indices.phases(spike)[0] == 3

    def test_bland_altman(self):
        found = indices.bland_altman([1, 2, 3], [0, 2, 4])
        assert found["bias"] == 0 and found["sd"] == pytest.approx(1)
        assert (found["low"], found["high"]) == pytest.approx((-1.96, 1.96))
        with pytest.raises(ValueError, match="equally long"):
            indices.bland_altman([1], [1, 2])

    @pytest.mark.parametrize("phase", [0.0, 0.5])
    def test_a13_labels_grow_to_the_walls_of_the_image(self, phase):
        """A13: in the true volume far better than interpolated outlines, EDV within 4 %; in an interpolated one not."""
        from mgdcr import baselines

        factors, points = make_phantom.draw_factors(0, 1), make_phantom.dense_points()
        image = make_phantom.image(factors, phase, *points).astype(np.float32)
        truth, spacing = make_phantom.labels(factors, phase, *points), (1, 2, 2)
        sparse = truth[::8]
        grown = indices.grow_labels(image, sparse, 8, spacing)
        np.testing.assert_array_equal(grown[::8], sparse)
        linear = indices.grow_labels(baselines.interpolate(image[::8], 8, "linear"), sparse, 8, spacing)
        scores = [evaluate.label_scores(labels, truth, spacing)
                  for labels in (grown, indices.interpolate_labels(sparse, 8), linear)]  # fmt: skip
        assert scores[0]["dice_lv"] >= 0.95 and scores[0]["dice_myo"] >= 0.95 and scores[0]["dice_rv"] >= 0.95
        for other in scores[1:]:
            assert scores[0]["dice_lv"] >= other["dice_lv"] + 0.02
            assert scores[0]["dice_myo"] >= other["dice_myo"] + 0.02
        volumes = [np.count_nonzero(labels == 1) for labels in (grown, truth)]
        assert volumes[0] == pytest.approx(volumes[1], rel=0.04)

    def test_a13_labels_without_edges_meet_at_interpolated_shapes(self):
        """A cone of circular slices in a volume that shows no wall: its radius is linear between the slices."""
        rows, columns = np.mgrid[:40, :40] - 19.5
        radius = np.hypot(rows, columns)
        sparse = np.stack([np.where(radius < r, 1, 0) for r in (8, 12, 16)]).astype(np.uint8)
        wanted = np.stack([radius < 8 + k for k in range(9)])
        ramp = np.linspace(0, 1, 9)[:, None, None] + np.zeros((9, 40, 40))  # equal edges everywhere, so none that leads
        grown = indices.grow_labels(ramp, sparse, 4, (1, 2, 2))
        assert evaluate.label_scores(grown, wanted.astype(np.uint8), (1, 2, 2))["dice_lv"] > 0.95
        near = indices.expected_outlines(sparse, 4, (2, 2))
        assert near.shape == (9, 40, 40) and 0 <= near.min() and near.max() <= 1
        for k in range(9):  # the outline lies between the pixels at radius 8 + k -+ 1/2
            assert near[k][np.abs(radius - (8 + k)) < 0.4].min() > 0.4
            assert near[k][np.abs(radius - (8 + k)) > 3.2].max() == 0

    def test_a13_units_do_not_matter_and_a_wall_of_equal_grey_is_no_leak(self, monkeypatch):
        """A bridge of the same grey between two structures is not followed, though no edge is there."""
        rows, columns = np.mgrid[:40, :40] - 19.5
        disc, bridge = np.hypot(rows, columns) < 9, (np.abs(rows) < 3) & (columns > 0)
        image = np.repeat((0.3 + 0.5 * (disc | bridge))[None], 9, 0).astype(np.float32)
        sparse = np.repeat(np.where(disc, 2, 0)[None], 3, 0).astype(np.uint8)
        grown = indices.grow_labels(image, sparse, 4, (1, 2, 2))
        assert ((grown == 2) != disc).sum((1, 2)).max() <= 2
        np.testing.assert_array_equal(indices.grow_labels(1500 * image + 40, sparse, 4, (1, 2, 2)), grown)
        monkeypatch.setattr(indices, "GUIDE_PER_MM", 0.0)
        assert ((indices.grow_labels(image, sparse, 4, (1, 2, 2)) == 2) != disc).sum((1, 2)).max() > 10

    def test_a_structure_that_ends_in_a_gap_ends_where_the_image_says(self):
        image, sparse = np.full((9, 20, 20), 0.2, np.float32), np.zeros((3, 20, 20), np.uint8)
        image[:3, 6:14, 6:14] = 0.9  # ends between dense slices 2 and 3
        sparse[0, 6:14, 6:14] = 1
        grown = indices.grow_labels(image, sparse, 4, (1, 2, 2))
        assert [int((part == 1).sum()) > 32 for part in grown] == [True] * 3 + [False] * 6


class TestScores:
    def test_perfect_and_worse(self):
        truth = np.random.default_rng(0).random((5, 16, 16))
        mask, chosen = evaluate.region((16, 16), (2, 2), 10), evaluate.unobserved(5, 4)
        perfect = evaluate.image_scores(truth, truth, mask, chosen)
        assert perfect["psnr_db"] == 100 and perfect["ssim"] == pytest.approx(1) and perfect["nrmse"] == 0
        shifted = evaluate.image_scores(np.clip(truth, 0, 0.9) + 0.1, np.clip(truth, 0, 0.9), mask, chosen)
        assert shifted["psnr_db"] == pytest.approx(20, abs=1e-6)

    def test_only_unobserved_slices_inside_the_region_count(self):
        truth = np.zeros((5, 16, 16))
        mask, chosen = evaluate.region((16, 16), (2, 2), 10), evaluate.unobserved(5, 4)
        spoilt = truth.copy()
        spoilt[[0, 4]], spoilt[:, 0, 0] = 1, 1
        assert evaluate.image_scores(spoilt, truth, mask, chosen)["psnr_db"] == 100
        assert chosen.tolist() == [False, True, True, True, False]

    def test_roughness_and_a20_jitter(self):
        ramp = np.arange(5.0)[:, None, None] * np.ones((1, 3, 3))
        assert evaluate.roughness(ramp) == 0 and evaluate.roughness(ramp**2) == pytest.approx(2)
        assert evaluate.jitter(np.ones((4, 2, 2, 2))) == 0
        assert evaluate.jitter(np.array([0, 1, 0, 1.0])[:, None, None, None]) == 2

    def test_plane_scores_ignore_contrast(self):
        target = np.linspace(0, 1, 50)
        found = evaluate.plane_scores((target - 0.05) / 1.25, target, np.ones(50))
        assert found["psnr_db"] > 90 and found["ncc"] == pytest.approx(1)

    def test_label_scores_in_mm(self):
        a, b = np.zeros((4, 8, 8), int), np.zeros((4, 8, 8), int)
        a[1:3, 2:5, 2:5], b[1:3, 2:5, 3:6] = 1, 1
        found = evaluate.label_scores(a, b, (8, 2, 2))
        assert found["dice_lv"] == pytest.approx(2 / 3) and found["hd95_mm_lv"] == pytest.approx(2)
        assert found["dice_rv"] == 1


class TestLeaveOut:
    def test_slice_is_withheld_and_found_again(self):
        whole = small_study()
        sparse, place = evaluate.without_slice(whole, 1)
        assert sparse.sax.grid.shape[0] == 3 and sparse.factor == 8 and place == 4
        np.testing.assert_allclose(sparse.dense.affine, whole.dense.affine)
        sparse, place = evaluate.without_slice(whole, 2)
        world = sparse.dense.world([0, 0, place])
        np.testing.assert_allclose(world, whole.sax.grid.world([0, 0, 2]), atol=1e-9)

    def test_scores_of_a_linear_stack_are_perfect(self):
        rows = evaluate.leave_slices_out(small_study(), 0, None, None, None, 0)
        linear = [row for row in rows if row["method"] == "linear"]
        assert {row["left_out"] for row in linear} == {"slice_1", "slice_2", "slice_3"}
        assert all(row["psnr_db"] > 60 for row in linear)
        nearest = [row["psnr_db"] for row in rows if row["method"] == "nearest"]
        assert max(nearest) < 40

    def test_two_slices_and_no_views_are_refused(self):
        with pytest.raises(UserError, match="three or more"):
            evaluate.leave_slices_out(small_study(depth=2), 0, None, None, None, 0)
        with pytest.raises(UserError, match="no long-axis view"):
            evaluate.leave_views_out(small_study(), 0, None, None, None)

    def test_a18_other_views_help_on_the_withheld_plane(self):
        from mgdcr.study import prepare

        factors, pixel = make_phantom.draw_factors(0, 1), make_phantom.PIXEL_MM
        dense = make_phantom.image(factors, 0.0, *make_phantom.dense_points()).astype(np.float32)
        stack = np.ascontiguousarray(dense[None, ::8])
        sax = geometry.Cine(stack, geometry.Grid(make_phantom.stack_affine(8.0), stack.shape[1:]))
        views = {}
        for name in make_phantom.VIEWS:
            shape = make_phantom.lax_shape(pixel)
            image = make_phantom.image(factors, 0.0, *make_phantom.lax_points(name, pixel)).astype(np.float32)
            grid = geometry.Grid(make_phantom.lax_affine(name, pixel), (1, *shape))
            views[name] = geometry.Cine(image.reshape(1, 1, *shape), grid)
        rows = evaluate.leave_views_out(prepare("p", sax, views, factor=8, align=False), 0, None, None, None)
        mean = {m: np.mean([r["psnr_db"] for r in rows if r["method"] == m]) for m in ("cubic", "lax_residual")}
        assert len({r["left_out"] for r in rows}) == 3 and mean["lax_residual"] > mean["cubic"]


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "no <subject>/sax.nii.gz"),
        (["--factor", "1"], "--factor 1"),
        (["--iterations", "-1"], "--iterations -1"),
        (["--leave_out", "view", "--ckpt", "nowhere.ckpt"], "no <subject>/sax.nii.gz"),
    ],
)
def test_A31_what_cannot_be_scored(tmp_path, capsys, words, message):
    with pytest.raises((UserError, SystemExit)) as stopped:
        run_main(evaluate, "--data", tmp_path, "--results", tmp_path, "--device", "cpu", *words)
    assert message in f"{stopped.value}{capsys.readouterr().err}" and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_script_against_the_truth(runs, tmp_path):
    """Volumes that are the truth itself score so, beside every baseline; CSV, JSON, no silent overwriting."""
    run_main(make_phantom, "--out", tmp_path / "data", "--n_subjects", 1, "--frames", 2)
    folder = tmp_path / "data" / "subject_001"
    truth = geometry.load_cine(folder / "dense.nii.gz")
    low, high = float(truth.data.min()), float(truth.data.max())
    for frame in range(2):
        place = tmp_path / "results" / "subject_001" / f"frame_{frame:03d}"
        geometry.save(place / "volume.nii.gz", truth.data[frame], replace(truth.grid))
        (place / "report.json").write_text(json.dumps({"scale": {"low": low, "high": high}}))
    args = [SCRIPT, "--root", runs, "--data", tmp_path / "data", "--results", tmp_path / "results", "--priors",
            "--prior_steps", 2, "--device", "cpu"]  # fmt: skip
    done = run_script(args)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "results" / "evaluation"
    rows = list(csv.DictReader((out / "scores.csv").open()))
    baselines = {"nearest", "linear", "cubic", "lanczos", "lax_residual", "diffae", "unconditional"}
    assert {row["method"] for row in rows} == baselines | {"ours", "outlines"}
    assert all(float(row["psnr_db"]) > 90 for row in rows if row["method"] == "ours")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["agreement"]["ef"]["n"] == 1 and abs(summary["agreement"]["ef"]["bias"]) < 0.05
    again = run_script(args)
    assert again.returncode == 2 and "--overwrite" in again.stderr
