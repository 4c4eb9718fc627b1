"""Bad raw data: one line that names the case, the file and what to do, exit status 2, nothing half-written (fact 9)."""

import json
import shutil

import numpy as np
import pytest

from common import nifti
from common.cli import UserError
from lapt import make_phantom, preprocessing
from tests.helpers import run_main, run_script

DEFECTS = {  # of case_0002: what the message says is wrong, what it advises
    "ADC on another grid": ("adc.nii.gz", "another grid than the CTP", "--to_ctp_grid"),
    "one time point less": ("ctp.nii.gz", "14 time points, 15 are needed", "--resample_time"),
    "empty mask": ("mask.nii.gz", "the mask is empty", "repair it"),
    "lesion outside the mask": ("lesion.nii.gz", "lesion voxels lie outside the brain mask", "--clip_lesion"),
    "NaN in the CTP": ("ctp.nii.gz", "1 voxels are NaN", "repair the file"),
    "ADC missing": ("case_0002", "no adc in", "add adc.nii.gz"),
    "CTP without its offset of -1024": ("ctp.nii.gz", "a CT in HU about 35", "rescale slope"),
}


def prepare(raw, out, *more):
    run_main(preprocessing, "--input_dir", raw, "--output_dir", out, "--num_workers", 1, *more)


def test_every_harmful_defect_of_the_phantom_is_listed():
    assert set(DEFECTS) == set(make_phantom.DEFECTS) - set(make_phantom.HARMLESS)


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("more", [(), ("--check_only",)])
def test_defect(raw_cases, tmp_path, defect, more):
    make_phantom._spoil(raw_cases / "case_0002", defect)
    with pytest.raises(UserError) as error:
        prepare(raw_cases, tmp_path / "out", *more)
    message = str(error.value)
    assert message.startswith("case_0002: ") and "\n" not in message
    assert all(part in message for part in DEFECTS[defect])
    assert not (tmp_path / "out").exists()


def test_as_a_user_sees_it(raw_cases, tmp_path):
    """Several bad cases: a line each, then one error line; status 2; nothing written; no traceback."""
    make_phantom._spoil(raw_cases / "case_0001", "empty mask")
    make_phantom._spoil(raw_cases / "case_0003", "ADC missing")
    done = run_script(["lapt/preprocessing.py", "--input_dir", raw_cases, "--output_dir", "out", "--num_workers", 1],
                      cwd=tmp_path)  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith(("case_", "error"))]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert lines[0].startswith("case_0001: the mask is empty") and lines[1].startswith("case_0003: no adc")
    assert lines[2].startswith("error: 2 of 3 cases cannot be used (case_0001, case_0003)") and "--skip_bad" in lines[2]
    assert len(lines) == 3 and not (tmp_path / "out").exists()


def rewrite(path, change):
    volume = nifti.load(path)
    nifti.save(path, change(volume.data), volume.affine)


@pytest.mark.parametrize(
    ("what", "change", "message"),
    [
        ("adc", lambda d: d * 50, "in the brain, in mm\\^2/s, 1e-3 or 1e-6"),
        ("adc", lambda d: 0 * d, "the ADC covers 0% of the brain mask"),
        ("dwi", lambda d: 0 * d, "covers 0% of the brain mask"),
        ("dwi", lambda d: 0 * d + 7, "every voxel of the brain has the value 7"),
        ("lesion", lambda d: 255 * d, "reach from 0 to 255"),
    ],
)
def test_wrong_values(raw_cases, tmp_path, what, change, message):
    rewrite(raw_cases / f"case_0002/{what}.nii.gz", change)
    with pytest.raises(UserError, match=f"case_0002: .*{message}.*{what}.nii.gz"):
        prepare(raw_cases, tmp_path / "out")


def test_same_size_but_elsewhere(raw_cases, tmp_path):
    """Equal shapes do not make equal grids: a shift of the affine is found."""
    path = raw_cases / "case_0002/dwi.nii.gz"
    volume = nifti.load(path)
    volume.affine[0, 3] += 4
    nifti.save(path, volume.data, volume.affine)
    with pytest.raises(UserError, match=r"case_0002: another grid than the CTP \(.* from \(-90.*CTP .* from \(-94"):
        prepare(raw_cases, tmp_path / "out")


def test_truncated_file(raw_cases, tmp_path):
    path = raw_cases / "case_0003/ctp.nii.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="case_0003: file is truncated or corrupt .*ctp.nii.gz"):
        prepare(raw_cases, tmp_path / "out")


def test_too_little_brain(raw_cases, tmp_path):
    path = raw_cases / "case_0001/mask.nii.gz"
    inside = np.argwhere(nifti.load(path).data)[500]

    def one_voxel(data):
        data = 0 * data
        data[tuple(inside)] = 1
        return data

    rewrite(path, one_voxel)
    (raw_cases / "case_0001/lesion.nii.gz").unlink()
    with pytest.raises(UserError, match="case_0001: .*(every voxel|no slice has 200 mm)"):
        prepare(raw_cases, tmp_path / "out")


def test_folders_and_tables(raw_cases, tmp_path):
    (tmp_path / "empty").mkdir()
    for options, message in ((("--input_dir", tmp_path / "absent"), "no folder .*absent"),
                             (("--input_dir", tmp_path / "empty"), "holds no case"),
                             (("--input_dir", raw_cases / "case_0001"), "holds images itself"),
                             (("--cases", tmp_path / "absent.csv"), "no table .*absent.csv; give one")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            run_main(preprocessing, *options, "--output_dir", tmp_path / "out", "--num_workers", 1)
    table = tmp_path / "cases.csv"
    for text, message in (("", "no rows"), ("id,ctp\na,b\n", "no column case"), ("case,ctp\n", "no rows"),
                          ("case,ctp\na\n", "row 2 has not as many cells"),
                          ("case,ctp\n,x.nii.gz\n", "row 2 has case ''"), ("case,ctp\na/b,x\n", "row 2 has case 'a/b'"),
                          ("case,ctp\na,x\na,y\n", "case a has several rows"),
                          ("case,ctp,mask\na,x.nii.gz,m.nii.gz\n", "a: file not found, .*x.nii.gz")):  # fmt: skip
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            run_main(preprocessing, "--cases", table, "--output_dir", tmp_path / "out", "--num_workers", 1)
    assert not (tmp_path / "out").exists()


def test_options(raw_cases, tmp_path):
    for options, message in ((("--frame_s", 2), "--frame_s needs"), (("--ctp_window", 9, 1), "the lower value first"),
                             (("--ctp_window", 0, "inf"), "both finite"), (("--spacing_mm", 1, 1, 0.001), "0.2 to 40"),
                             (("--time_points", -1), "0 or more"), (("--shape", -1, 0, 0), "0 or more"),
                             (("--splits", "x", "--one_split", "train"), "exclude each other"),
                             (("--val_size", 0.9), "together below 1")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            prepare(raw_cases, tmp_path / "out", *options)
    shutil.rmtree(raw_cases / "case_0003")
    with pytest.raises(UserError, match="2 patients .* --one_split"):
        prepare(raw_cases, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_overlapping_lists_are_refused(raw_cases, tmp_path):
    """Fact 9: a patient in two of the given lists."""
    (tmp_path / "lists/splits").mkdir(parents=True)
    for name, patients in {"train": ["case_0001", "case_0002"], "val": ["case_0002"], "test": ["case_0003"]}.items():
        (tmp_path / f"lists/splits/{name}_list.json").write_text(json.dumps(patients))
    with pytest.raises(UserError, match=r"listed twice, such as case_0002 \(train, val\).*one list"):
        prepare(raw_cases, tmp_path / "out", "--splits", tmp_path / "lists")
    (tmp_path / "lists/splits/val_list.json").write_text("[]")
    (tmp_path / "lists/splits/test_list.json").write_text("[]")
    with pytest.raises(UserError, match="patient case_0003 is in no list"):
        prepare(raw_cases, tmp_path / "out", "--splits", tmp_path / "lists")
    (tmp_path / "lists/splits/val_list.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="must be a JSON list"):
        prepare(raw_cases, tmp_path / "out", "--splits", tmp_path / "lists")
    assert not (tmp_path / "out").exists()
