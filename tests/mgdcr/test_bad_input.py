"""A21, A31: bad data end in one line that says what, where and what to do; odd but usable data work."""

import nibabel as nib
import numpy as np
import pytest

from common.cli import UserError
from mgdcr import geometry, intensity, lmdb_writer, make_phantom
from tests.helpers import run_main, run_script


def rewrite(path, change=None, *, placed=True):
    """Save a NIfTI file again with changed data (W, H, Z, T), or (not `placed`) without sform and qform."""
    file = nib.load(path)
    data = np.asarray(file.dataobj, dtype=np.float32)
    nib.save(nib.Nifti1Image(data if change is None else change(data), file.affine if placed else None), path)


def with_nan(data):
    data = data.copy()
    data[3:5, 3:5] = np.nan
    return data


SAX_DEFECTS = {
    "not there": (lambda path: path.unlink(), "not found"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:2000]), "truncated or corrupt"),
    "no affine": (lambda path: rewrite(path, placed=False), "no affine"),
    "one slice": (lambda path: rewrite(path, lambda d: d[:, :, :1]), "one slice"),
    "two dimensions": (lambda path: rewrite(path, lambda d: d[:, :, 0, 0]), "not a 3D volume"),
    "five dimensions": (lambda path: rewrite(path, lambda d: np.stack([d, d], -1)), "not a 3D volume"),
    "slices first": (lambda path: rewrite(path, lambda d: d[:4].transpose(2, 0, 1, 3)), "axis order"),
    "all NaN": (lambda path: rewrite(path, lambda d: d * np.nan), "no finite value"),
    "text": (lambda path: path.write_text("not an image"), "gzip"),
}


@pytest.mark.parametrize("defect", SAX_DEFECTS)
def test_A31_unusable_short_axis_files(spoilt, defect):
    spoil, message = SAX_DEFECTS[defect]
    spoil(spoilt / "sax.nii.gz")
    with pytest.raises(UserError, match=message) as error:
        geometry.load_sax(spoilt / "sax.nii.gz")
    assert "sax.nii.gz" in str(error.value)


def test_A31_several_slices_are_no_view(spoilt):
    with pytest.raises(UserError, match="one slice per file"):
        geometry.load_lax(spoilt / "sax.nii.gz")


def test_A31_a_blank_cine_has_no_contrast(spoilt):
    rewrite(spoilt / "sax.nii.gz", np.zeros_like)
    cine = geometry.load_sax(spoilt / "sax.nii.gz")
    with pytest.raises(UserError, match="every voxel is 0"):
        intensity.Scale.of(cine.data, where=str(cine.path))


def test_A21_nan_background_is_marked_and_warned_of(spoilt):
    rewrite(spoilt / "lax_4ch.nii.gz", with_nan)
    with pytest.warns(UserWarning, match="NaN or Inf"):
        view = geometry.load_lax(spoilt / "lax_4ch.nii.gz")
    assert np.isfinite(view.data).all() and not view.valid[:, 0, 3:5, 3:5].any()
    assert view.valid.sum() == view.data.size - 4 * view.frames
    assert not geometry.resample_frames(view, 7).valid[:, 0, 3, 3].any()


def test_A21_two_slices_are_a_stack(spoilt):
    rewrite(spoilt / "sax.nii.gz", lambda d: d[:, :, 4:6])
    cine = geometry.load_sax(spoilt / "sax.nii.gz")
    assert cine.grid.shape[0] == 2 and geometry.dense_grid(cine.grid).shape[0] == 9


def test_A21_a_still_image_is_a_cine_of_one_frame(spoilt):
    rewrite(spoilt / "sax.nii.gz", lambda d: d[..., 0])
    cine = geometry.load_sax(spoilt / "sax.nii.gz")
    assert cine.frames == 1 and cine.frame_s == 0.0


def test_A31_the_writer_names_the_file_and_writes_nothing(spoilt, tmp_path):
    rewrite(spoilt / "sax.nii.gz", placed=False)
    done = run_script(["mgdcr/lmdb_writer.py", "--input", spoilt.parent, "--root", tmp_path / "out"], cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "sax.nii.gz" in last and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("datasets/*")) and not list((tmp_path / "out").glob("datasets/.*"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--input", "nowhere"], "no such folder"),
        (["--size", "-1"], "--size"),
        (["--low", "60", "--high", "50"], "percentiles"),
    ],
)
def test_A31_impossible_options_of_the_writer(tmp_path, monkeypatch, words, message, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, SystemExit)) as error:
        run_main(lmdb_writer, "--root", tmp_path, *words)
    assert message in str(error.value) + capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_A31_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="no short-axis cine"):
        lmdb_writer.find_cines(tmp_path)


def test_A31_unknown_options_are_named(tmp_path):
    with pytest.raises(SystemExit) as error:
        run_main(make_phantom, "--out", tmp_path, "--n_subject", 1)
    assert error.value.code == 2


def test_A31_no_dense_grid_of_nothing(sax):
    with pytest.raises(UserError, match="1 or more"):
        geometry.dense_grid(sax.grid, 0)
    with pytest.raises(UserError, match="thickness_points"):
        geometry.PlaneSampler(sax.grid, geometry.Grid(np.eye(4), (1, 4, 4)), 0)
