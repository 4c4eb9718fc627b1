"""From files to files: odd studies, acquired units, what a reconstruction leaves on disk. A4, A21, A28."""

import json
import warnings
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from mgdcr import geometry, make_phantom, study
from mgdcr.LAX_condition import ex8_multi_optimizer
from tests.helpers import run_main

QUICK = "--preset fast --steps 3 --iterations 2 --grad_steps 2 --stride 1 --factor 2 --device cpu".split()


def reconstruct(prior, data, out, *more):
    run_main(ex8_multi_optimizer, *QUICK, "--ckpt", prior, "--data", data, "--out", out, *more)


# ---- units ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sax_unit, lax_unit", [(2000.0, 2000.0), (2000.0, 1.0), (1.0, 4000.0)])
def test_units_of_files_do_not_matter(sax, views, sax_unit, lax_unit):
    """Scanner units differ by orders of magnitude, and converted views may have others than the short axis."""
    known = study.prepare("a", sax, views, factor=8, align=False)
    cines = {name: replace(view, data=lax_unit * view.data) for name, view in views.items()}
    other = study.prepare("b", replace(sax, data=sax_unit * sax.data), cines, factor=8, align=False)
    frames = [study.frame_of(one, 1) for one in (known, other)]
    np.testing.assert_allclose(frames[0].sax, frames[1].sax, atol=1e-5)
    for a, b in zip(frames[0].views, frames[1].views, strict=True):
        assert a.values.max() - a.values.min() > 0.5  # an image, in the scale of the short axis
        np.testing.assert_allclose(a.values, b.values, atol=1e-4)


def test_alignment_does_not_depend_on_units(sax, views):
    from mgdcr import align

    moved = {"4ch": views["4ch"], "2ch": replace(views["2ch"], grid=views["2ch"].grid.moved([2.0, 0, 0]))}
    plain = align.align(sax, moved, move_slices=False)
    scaled = {name: replace(view, data=3000 * view.data) for name, view in moved.items()}
    other = align.align(sax, scaled, move_slices=False)
    np.testing.assert_allclose(plain.view_poses, other.view_poses, atol=0.05)
    for name in moved:
        gains = [found.report["before"][name]["gain"] for found in (plain, other)]
        assert gains[0] == pytest.approx(3000 * gains[1], rel=1e-3)
        assert found_ncc(plain, name) == pytest.approx(found_ncc(other, name), abs=1e-3)


def found_ncc(alignment, name):
    return alignment.report["after"][name]["ncc"]


# ---- A21: odd studies -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd(cohort, tmp_path_factory):
    """Folder of studies that are not as they should be."""
    root = tmp_path_factory.mktemp("odd") / "data"
    sax = geometry.load_sax(cohort / "subject_001" / "sax.nii.gz")
    views = {name: geometry.load_lax(cohort / "subject_001" / f"lax_{name}.nii.gz") for name in make_phantom.VIEWS}

    def write(name, sax_data, grid=None, **cines):
        for file, data, where in (("sax", sax_data, grid or sax.grid),
                                  *((f"lax_{view}", *cine) for view, cine in cines.items())):  # fmt: skip
            (root / name).mkdir(parents=True, exist_ok=True)
            image = nib.Nifti1Image(data.transpose(3, 2, 1, 0), where.affine)  # our own writer refuses NaN
            image.header.set_xyzt_units("mm", "sec")
            nib.save(image, root / name / f"{file}.nii.gz")

    two = geometry.Grid(sax.grid.affine, (2, 64, 64))
    write("two_slices", sax.data[:, 4:6], two)
    holes = sax.data.copy()
    holes[:, :, :6] = np.nan
    empty = views["4ch"].data.copy()
    empty[:, :, 40:70] = 0  # rows along z: slices without any usable pixel
    empty[:, :, :10] = np.nan
    write("holes", holes, four=(empty, views["4ch"].grid))
    write("far", sax.data, four=(views["4ch"].data, views["4ch"].grid.moved([900.0, 0, 0])))
    write("identical", np.repeat(sax.data[:, 5:6], 11, 1), four=(views["4ch"].data, views["4ch"].grid))
    more = geometry.resample_frames(views["2ch"], 5)
    write("phases", sax.data, two=(more.data, views["2ch"].grid))
    return root


ODD = {
    "two_slices": None, "identical": None, "holes": "NaN or Inf", "far": "does not meet", "phases": None,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_A21_odd_studies_give_finite_volumes(untrained, odd, tmp_path, name):
    """A21: empty mask on some slices, view off the stack, Z = 2, identical slices, NaN and 0, 4 and 5 frames."""
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        reconstruct(untrained, odd, tmp_path, "--subject_id", name, "--frame", 1)
    said = " ".join(str(w.message) for w in noted)
    assert ODD[name] is None or ODD[name] in said
    volume = geometry.load_cine(tmp_path / name / "frame_001" / "volume.nii.gz")
    source = nib.load(odd / name / "sax.nii.gz")
    assert volume.valid is None and volume.grid.shape[0] == 2 * (source.shape[2] - 1) + 1
    assert np.ptp(volume.data) > 0.1
    if name == "two_slices":
        np.testing.assert_allclose(volume.data[0, ::2].T, source.get_fdata()[..., 1], atol=1e-5)
    if name == "far":
        report = json.loads((tmp_path / name / "frame_001" / "report.json").read_text())
        assert report["alignment"]["before"]["four"]["lines"] == 0


# ---- A28: what is left on disk --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flipped(untrained, tmp_path_factory):
    """A reconstruction of one frame of a flipped, oblique phantom in scanner units: data folder, results."""
    root = tmp_path_factory.mktemp("flipped")
    run_main(make_phantom, "--out", root / "data", "--n_subjects", 1, "--frames", 2, "--orientation", "oblique",
             "--scale", 1500)  # fmt: skip
    reconstruct(untrained, root / "data", root / "out", "--frame", 1, "--starts", 2)
    return root / "data" / "subject_001", root / "out" / "subject_001"


@pytest.mark.slow
def test_A28_volumes_lie_where_the_stack_lies(flipped):
    """A28, A10: sform and qform agree, mm, and every acquired slice is where it was, value by value."""
    data, out = flipped
    made, source = nib.load(out / "frame_001" / "volume.nii.gz"), nib.load(data / "sax.nii.gz")
    assert made.header["sform_code"] > 0 and made.header["qform_code"] > 0
    np.testing.assert_allclose(made.get_sform(), made.get_qform(), atol=1e-3)
    assert made.header.get_xyzt_units()[0] == "mm"
    assert nib.aff2axcodes(made.affine) == nib.aff2axcodes(source.affine)
    for number in range(11):
        here, there = (image.affine @ [5, 7, k, 1] for image, k in ((made, 2 * number), (source, number)))
        np.testing.assert_allclose(here, there, atol=1e-3)
    acquired, low, high = source.get_fdata()[..., 1], source.get_fdata().min(), source.get_fdata().max()
    np.testing.assert_allclose(made.get_fdata()[..., ::2], acquired, atol=1e-3 * high)
    margin = 0.01 * (high - low)
    assert low - margin <= made.get_fdata().min() and made.get_fdata().max() <= high + margin
    spread = nib.load(out / "frame_001" / "sd.nii.gz").get_fdata()
    assert spread.min() >= 0 and np.abs(spread[..., ::2]).max() < 1e-3 * high


@pytest.mark.slow
def test_A28_log_report_and_manifest(flipped):
    """A28: a row of every term per iteration; what was run, on which data, with which code, and how long it took."""
    _, out = flipped
    place = out / "frame_001"
    rows = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    views = {f"lax_{name}" for name in make_phantom.VIEWS}
    for row in rows:
        assert {"sax", "prior", "norm", "curvature", "total", "lr", *views} <= row.keys()
        assert all(np.isfinite(v) for v in row.values() if isinstance(v, float))
    report, manifest = (json.loads((place / f"{name}.json").read_text()) for name in ("report", "manifest"))
    assert len(report["hash"]) == 16 and report["seconds"] > 0 and report["alignment"]["before"].keys() == {
        "2ch", "3ch", "4ch"}  # fmt: skip
    assert report["scale"]["high"] > 1000
    assert {"packages", "hardware"} & manifest.keys() or "torch" in json.dumps(manifest)


# ---- A4 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 37, 60, 64, 999, 1000])
def test_A4_any_number_of_steps_on_the_command_line(untrained, cohort, capsys, steps):
    """A4: 1, 37, 60, 64 raise in the original."""
    run_main(ex8_multi_optimizer, "--ckpt", untrained, "--data", cohort, "--steps", steps, "--dry_run")
    assert f"steps={steps}" in capsys.readouterr().out
