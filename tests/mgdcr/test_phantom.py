"""The phantom is the one of the specification: intensities, baselines, volumes, scans and bytes."""

import csv
import json

import numpy as np
import pytest
from scipy.interpolate import CubicSpline

from common.cli import UserError
from mgdcr import geometry, make_phantom
from tests.helpers import run_main, run_script

X, Y, Z = make_phantom.dense_points()
BETWEEN = [k for k in range(81) if k % 8]


def psnr(error):
    return -10 * np.log10(np.mean(np.square(error)))


def linear(acquired):
    z = np.arange(81) / 8
    low = np.minimum(z.astype(int), 9)
    share = (z - low)[:, None, None]
    return (1 - share) * acquired[low] + share * acquired[low + 1]


@pytest.mark.parametrize("phase, nearest_db, linear_db, cubic_db", [(0.0, 26.7, 29.6, 30.0), (0.5, 27.1, 30.8, 30.8)])
def test_baselines_are_those_measured_for_the_definition(phase, nearest_db, linear_db, cubic_db):
    """ROI PSNR on unobserved slices, mean of four subjects; the published draw of subjects is not known: 0.3 dB."""
    found = []
    for number in range(1, 5):
        truth = make_phantom.image(make_phantom.draw_factors(0, number), phase, X, Y, Z)
        acquired = truth[::8]
        nearest = acquired[np.round(np.arange(81) / 8).astype(int)]
        cubic = CubicSpline(np.arange(11), acquired, bc_type="natural")(np.arange(81) / 8)
        results = (nearest, linear(acquired), cubic)
        found.append([psnr((result - truth)[BETWEEN][:, make_phantom.roi()]) for result in results])
    assert np.mean(found, axis=0) == pytest.approx([nearest_db, linear_db, cubic_db], abs=0.3)


def test_structures_have_their_intensities():
    factors = np.ones(6)
    values = {
        "cavity": ((0.0, 1.5, 55.0), 0.88), "myocardium": ((33.0, -1.5, 25.0), 0.35),
        "right ventricle": ((-40.0, -4.0, 25.0), 0.82), "lung": ((44.0, -14.0, 30.0), 0.05),
        "atrium": ((0.0, 2.0, 1.0), 0.80),
    }  # fmt: skip
    for name, (point, value) in values.items():
        assert make_phantom.image(factors, 0.0, *map(np.array, point)) == pytest.approx(value, abs=0.03), name


def test_heart_contracts_and_volumes_are_plausible():
    volumes = []
    for phase in (0.0, 0.25, 0.5):
        counts = np.bincount(make_phantom.labels(np.ones(6), phase, X, Y, Z).ravel(), minlength=4) * 0.004
        volumes.append(counts[make_phantom.CAVITY])
    assert 66 <= volumes[0] <= 79 and 21 <= volumes[2] <= 26
    assert volumes[0] > volumes[1] > volumes[2]
    assert 1 - volumes[2] / volumes[0] == pytest.approx(0.67, abs=0.02)


def test_files_and_truth(cohort, sax, dense, views):
    folder = cohort / "subject_001"
    assert sax.data.shape == (4, 11, 64, 64) and dense.data.shape == (4, 81, 64, 64)
    assert sax.frame_s == pytest.approx(0.9 / 4)
    assert sax.grid.spacing_mm == pytest.approx((2, 2, 8)) and dense.grid.spacing_mm == pytest.approx((2, 2, 1))
    np.testing.assert_array_equal(dense.data[:, ::8], sax.data)
    assert {name: view.grid.shape for name, view in views.items()} == dict.fromkeys(make_phantom.VIEWS, (1, 96, 128))

    maps = geometry.load_cine(folder / "labels.nii.gz").data
    rows = [row for row in csv.DictReader(open(cohort / "truth.csv")) if row["subject"] == "subject_001"]
    assert [int(row["frame"]) for row in rows] == [0, 1, 2, 3]
    for row, frame in zip(rows, maps, strict=True):
        for part, code in make_phantom.LABELS.items():
            assert float(row[f"{part}_ml"]) == pytest.approx(np.count_nonzero(frame == code) * 0.004, rel=1e-5)
    subject = json.loads((cohort / "phantom.json").read_text())["subjects"][0]
    assert (subject["ed_frame"], subject["es_frame"]) == (0, 2)
    assert subject["edv_ml"] == pytest.approx(float(rows[0]["lv_ml"]), rel=1e-5)


def test_views_show_the_same_heart_at_their_pixels(views):
    """The analytic anatomy at the world points that the headers name."""
    back = np.linalg.inv(make_phantom.world("plain"))
    factors = make_phantom.draw_factors(0, 1)
    for view in views.values():
        rows, columns = np.indices(view.grid.shape[1:])
        world = view.grid.world(np.stack([columns, rows, 0 * rows], axis=-1))
        points = np.moveaxis(world @ back[:3, :3].T + back[:3, 3], -1, 0)
        np.testing.assert_allclose(view.data[2, 0], make_phantom.image(factors, 0.5, *points), atol=1e-4)


def test_same_seed_same_bytes_and_subjects_do_not_depend_on_their_number(cohort, tmp_path):
    run_main(make_phantom, "--out", tmp_path, "--n_subjects", 1, "--frames", 4)
    for path in sorted((tmp_path / "subject_001").iterdir()):
        assert path.read_bytes() == (cohort / "subject_001" / path.name).read_bytes(), path.name


def test_scan_options_change_only_the_scans_they_are_for(cohort, tmp_path, sax, views):
    run_main(make_phantom, "--out", tmp_path, "--n_subjects", 1, "--frames", 4, "--lax_gain", 1.25, "--lax_offset",
             0.05, "--noise_lax", 0.05, "--lax_frames", 5, "--lax_names", "4ch", "--no_dense")  # fmt: skip
    folder = tmp_path / "subject_001"
    assert sorted(path.name for path in folder.iterdir()) == ["lax_4ch.nii.gz", "sax.nii.gz"]
    np.testing.assert_array_equal(geometry.load_sax(folder / "sax.nii.gz").data, sax.data)
    changed = geometry.load_lax(folder / "lax_4ch.nii.gz")
    assert changed.frames == 5
    noise = changed.data[0] - (1.25 * views["4ch"].data[0] + 0.05)
    assert noise.std() == pytest.approx(0.05, rel=0.05) and abs(noise.mean()) < 2e-3


def test_shift_moves_the_anatomy_against_the_header():
    still, moved = (make_phantom.lax_points("2ch", 1.0, shift) for shift in ((0, 0, 0), (2, 3, 4)))
    angle = np.deg2rad(60)
    across, along, off = [np.cos(angle), np.sin(angle), 0], [0, 0, 1], [np.sin(angle), -np.cos(angle), 0]
    expected = -(2 * np.array(across) + 3 * np.array(along) + 4 * np.array(off))
    for a, b, shift in zip(still, moved, expected, strict=True):
        np.testing.assert_allclose(b - a, shift, atol=1e-12)


@pytest.mark.parametrize(
    "words",
    [["--n_subjects", "0"], ["--frames", "0"], ["--lax_gain", "0"], ["--noise_lax", "-1"], ["--lax_pixel", "0"]],
)
def test_impossible_options(tmp_path, words):
    with pytest.raises(UserError):
        run_main(make_phantom, "--out", tmp_path, *words)
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten_unasked(cohort):
    before = (cohort / "truth.csv").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        run_main(make_phantom, "--out", cohort, "--n_subjects", 1)
    assert (cohort / "truth.csv").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("script", ["make_phantom.py", "lmdb_writer.py"])
def test_A31_help_from_another_folder(tmp_path, script):
    done = run_script([f"mgdcr/{script}", "--help"], cwd=tmp_path)
    assert done.returncode == 0 and "--overwrite" in done.stdout


def test_stacks_begin_where_planning_put_them(tmp_path):
    """--start_sax: every 8th dense slice from a random one on; the affine says where, and the truth stays."""
    run_main(make_phantom, "--out", tmp_path, "--n_subjects", 3, "--frames", 1, "--start_sax", 7)
    record = json.loads((tmp_path / "phantom.json").read_text())["subjects"]
    starts = [subject["sax_start"] for subject in record]
    assert len(set(starts)) > 1 and set(starts) <= set(range(8))
    for subject in record:
        folder, start = tmp_path / subject["subject"], subject["sax_start"]
        sax, dense = (geometry.load_cine(folder / f"{name}.nii.gz") for name in ("sax", "dense"))
        assert sax.data.shape[1] == (10 if start else 11)
        np.testing.assert_allclose(sax.data, dense.data[:, start::8], atol=1e-6)
        np.testing.assert_allclose(sax.grid.world([0, 0, 1]), dense.grid.world([0, 0, start + 8]), atol=1e-4)
    with pytest.raises(UserError, match="start_sax 8"):
        run_main(make_phantom, "--out", tmp_path / "other", "--start_sax", 8)
