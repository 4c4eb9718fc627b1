"""A real heart where there is one: a sparse short-axis cine with its 4-chamber and 2-chamber views, one examination.

Six slices 17.7 mm apart, no dense truth: what was withheld, a slice or a view, is the truth. The prior has random
weights: it is shown that the rest of the method does no harm and its geometry is right, not how good a prior is.
"""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from mgdcr import align, baselines, evaluate, geometry, inverse, objective, study
from mgdcr.LAX_condition import ex8_multi_optimizer
from mgdcr.trainer import load_network
from tests.helpers import run_main

DATA = Path(os.environ.get("REAL_DATA_DIR", "")) / "cardiac"
SAX, VIEWS = DATA / "biv-me_patient1_sax.nii.gz", {n: DATA / f"biv-me_patient1_lax_{n}.nii.gz" for n in ("4ch", "2ch")}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(path.is_file() for path in (SAX, *VIEWS.values())),
        reason="REAL_DATA_DIR names no folder with cardiac/biv-me_patient1_{sax,lax_4ch,lax_2ch}.nii.gz",
    ),
]
SETTINGS = inverse.Settings(**inverse.MODES["fast"] | dict(steps=3, iterations=3, grad_steps=2))


@pytest.fixture(scope="module")
def heart():
    """The study, registered."""
    return study.load(study.Source("heart", SAX, VIEWS), factor=8)


@pytest.fixture(scope="module")
def prior(untrained):
    from common.runtime import Runtime

    rt = Runtime(torch.device("cpu"))
    trained = load_network(untrained, rt)
    return inverse.Prior(trained.model, SETTINGS, rt), trained.image_size


def agreement(sax: geometry.Cine, view: geometry.Cine, frame: int = 0) -> float:
    """Correlation of a view with the linearly interpolated stack at its pixels."""
    dense = geometry.dense_grid(sax.grid, 8)
    sampler = geometry.PlaneSampler(dense, view.grid)
    resliced = sampler.sample(torch.from_numpy(baselines.interpolate(sax.data[frame], 8)))
    return align.ncc(resliced.numpy(), sampler.values(view.data[frame]).numpy())


def test_headers_place_the_views(heart):
    """Where the headers say, view and stack show the same heart; 30 mm or a mirror image away they do not."""
    sax = geometry.load_sax(SAX)
    assert sax.data.shape == (25, 6, 208, 236) and sax.grid.spacing_mm[2] == pytest.approx(17.7, abs=0.1)
    for name, path in VIEWS.items():
        view = geometry.load_lax(path)
        right = agreement(sax, view)
        moved = geometry.Cine(view.data, view.grid.moved(30 * sax.grid.axes[:, 0]))
        mirrored = geometry.Cine(np.ascontiguousarray(view.data[..., ::-1]), view.grid)
        assert right > 0.75 and right > agreement(sax, moved) + 0.1, name
        assert right > agreement(sax, mirrored) + 0.1, name


def test_registration_improves_both_views(heart):
    before, after = heart.report["before"], heart.report["after"]
    for name in VIEWS:
        assert before[name]["lines"] == 6
        assert after[name]["ncc"] > before[name]["ncc"] and after[name]["difference"] < before[name]["difference"]
    assert np.abs(heart.report["slice_shifts_mm"]).max() < 6  # a breath-hold, not another heart


def test_guided_by_one_view_scored_on_the_other(heart, prior):
    network, size = prior
    rows = evaluate.leave_views_out(heart, 0, network, objective.Objective(), SETTINGS, size)
    assert {row["left_out"] for row in rows} == set(VIEWS)
    for view in VIEWS:
        found = {row["method"]: row["psnr_db"] for row in rows if row["left_out"] == view}
        best = max(found[kind] for kind in baselines.INTERPOLATIONS)
        assert 15 < best < 25 and found["ours"] >= best - 0.2, view
        assert found["lax_residual"] > found["linear"], view  # the other view tells something


def test_leave_one_slice_out(heart, prior):
    network, size = prior
    rows = evaluate.leave_slices_out(heart, 0, network, objective.Objective(), SETTINGS, 50.0, size)
    assert {row["left_out"] for row in rows} == {"slice_1", "slice_2", "slice_3", "slice_4"}
    mean = {m: np.mean([r["psnr_db"] for r in rows if r["method"] == m]) for m in {r["method"] for r in rows}}
    assert mean["ours"] > max(mean[kind] for kind in baselines.INTERPOLATIONS) - 0.2
    assert mean["lax_residual"] > mean["linear"]


def test_reconstruction_overlays_the_acquisition(untrained, tmp_path):
    """From files to files: same axes and place, every acquired slice in it, a frame of the dense grid."""
    run_main(ex8_multi_optimizer, "--preset", "smoke", "--ckpt", untrained, "--sax", SAX, "--lax", *VIEWS.values(),
             "--lax_names", *VIEWS, "--subject_id", "heart", "--frame", 0, "--no_align", "--out", tmp_path,
             "--device", "cpu")  # fmt: skip
    made, source = nib.load(tmp_path / "heart" / "frame_000" / "volume.nii.gz"), nib.load(SAX)
    assert made.shape == (236, 208, 41) and nib.aff2axcodes(made.affine) == nib.aff2axcodes(source.affine)
    for number in range(6):
        here, there = made.affine @ [10, 20, 8 * number, 1], source.affine @ [10, 20, number, 1]
        np.testing.assert_allclose(here, there, atol=1e-2)
    np.testing.assert_allclose(made.get_fdata()[..., ::8], source.get_fdata()[..., 0], atol=2.0)  # of 1981
    log = (tmp_path / "heart" / "frame_000" / "log.jsonl").read_text().splitlines()
    assert {f"lax_{name}" for name in VIEWS} <= json.loads(log[0]).keys()
