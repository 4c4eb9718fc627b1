"""scripts/check.py: the acceptance set's defects by name, geometry, intensities, copies; errors alone give status 2."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from common import nifti, tables
from common.cli import UserError
from ldae import dataset, make_phantom
from ldae.scripts import check
from tests.helpers import run_main, run_script
from tests.ldae.conftest import SHAPE, SPACING_MM

GRID = ("--shape", *map(str, SHAPE), "--spacing_mm", str(SPACING_MM))


def report(root):
    return json.loads((root / "check/check.json").read_text())


def found(root, level=None):
    """(kind, scan) of the findings."""
    return {(f["kind"], f["scan"]) for f in report(root)["findings"] if level in (None, f["level"])}


@pytest.fixture
def few(cohort, tmp_path):
    """Six subjects of the cohort (18 scans) in a folder of their own."""
    root = tmp_path / "few"
    columns, records = dataset.read_csv(cohort / "data/dataset.csv")
    records = records[:18]
    for record in records:
        target = root / "data" / record["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(cohort / "data" / record["path"], target)
    tables.write_csv(root / "data/dataset.csv", records, columns)
    return root


def edit(root, **changes):
    """Change entries of the table: edit(root, r2={"age": ""}) is data row 2."""
    columns, records = dataset.read_csv(root / "data/dataset.csv")
    for name, values in changes.items():
        records[int(name[1:])].update(values)
    tables.write_csv(root / "data/dataset.csv", records, columns)


def test_fact_9_names_the_defects_of_the_acceptance_set(tmp_path):
    """Fact 9: names the NaN file, the missing age and the LAS file; status 2 for the NaN file, 0 once it is mended."""
    root = tmp_path / "study"
    run_main(make_phantom, "--out", root, "--shape", *SHAPE, "--n_subjects", 4, "--sessions", 0, "--defects")
    command = ["ldae/scripts/check.py", "--root", str(root), *GRID]
    done = run_script(command)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: 1 errors in")
    lines = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines[:4]] == ["error", "warning", "note", "note"]
    assert "sub-0003_ses-M000_T1w.nii.gz" in lines[0] and "1 voxels are NaN" in lines[0]
    assert lines[1].startswith("warning: sub-0004_M000: missing age")
    assert "sub-0001_ses-M000_T1w.nii.gz is stored LAS" in lines[2]
    assert "sub-0002_ses-M000_T1w.nii.gz is int16 with slope 0.5 and offset -100" in lines[3]
    with open(root / "check/check.csv", newline="") as file:
        status = {row["scan"]: row["status"] for row in csv.DictReader(file)}
    assert list(status.values()) == ["note", "note", "error", "warning"]
    path = next((root / "data/scans/sub-0003").rglob("*.nii.gz"))
    volume = nifti.load(path, allow_nonfinite=True)
    nifti.save(path, np.nan_to_num(volume.data, nan=500), volume.affine)
    assert "is there already" in run_script(command).stderr
    done = run_script([*command, "--overwrite"])
    assert done.returncode == 0 and "0 errors, 1 warnings, 2 notes" in done.stdout


def test_a_good_cohort_has_no_findings(few, capsys):
    run_main(check, "--root", few, *GRID)
    assert "18 scans of 6 subjects: 0 errors, 0 warnings, 0 notes" in capsys.readouterr().out
    with Image.open(few / "check/check.png") as picture:
        assert picture.size[0] > 1000 and np.asarray(picture.convert("L")).std() > 20


def test_copies_are_found_by_their_voxels(few):
    """One scan under two subjects, even reoriented and stored as another type, is an error."""
    rows = dataset.read_table(few / "data/dataset.csv")
    volume = nifti.load(rows[0].path)
    nifti.save(rows[5].path, *nifti.reorient(volume.data, volume.affine, "LPS"), dtype=np.float32)
    with pytest.raises(UserError, match="1 errors .* the same voxels as sub-0001_M000, another subject"):
        run_main(check, "--root", few, *GRID)
    assert found(few, "error") == {("duplicate", "sub-0002_M012")}


def test_unreadable_files_are_all_named(few):
    rows = dataset.read_table(few / "data/dataset.csv")
    rows[1].path.unlink()
    rows[4].path.write_bytes(rows[4].path.read_bytes()[:2000])
    volume = nifti.load(rows[7].path)
    nifti.save(rows[7].path, np.ones_like(volume.data), volume.affine)
    with pytest.raises(UserError, match="3 errors"):
        run_main(check, "--root", few, *GRID)
    assert found(few, "error") == {("unreadable", rows[i].scan) for i in (1, 4, 7)}
    texts = [f["text"] for f in report(few)["findings"]]
    assert "file not found" in texts[0] and "truncated" in texts[1] and "every voxel is about 1" in texts[2]


def test_geometry_and_intensity_warnings(few):
    """Cut off, outside the field of view, anisotropic, another sequence, another grid: warnings, notes, no errors."""
    rows = dataset.read_table(few / "data/dataset.csv")
    volumes = [nifti.load(row.path) for row in rows]
    inferior = nifti.crop_or_pad(volumes[0], (16, 20, 8), (7.5, 9.5, 11.5))  # the lower half is missing
    nifti.save(rows[0].path, inferior.data, inferior.affine)
    far = nifti.crop_or_pad(volumes[3], (16, 20, 28), (7.5, 9.5, 13.5))  # the head is at one end
    nifti.save(rows[3].path, far.data, far.affine)
    flat = volumes[6].affine @ np.diag([0.25, 1, 1, 1])
    nifti.save(rows[6].path, np.repeat(volumes[6].data, 4, 0), flat)
    nifti.save(rows[9].path, 1000 * np.sqrt(volumes[9].data / 1000), volumes[9].affine)  # another contrast
    run_main(check, "--root", few, *GRID)
    assert not found(few, "error")
    warnings = found(few, "warning")
    assert ("cut off", rows[0].scan) in warnings and ("spacing", rows[6].scan) in warnings
    assert ("intensities", rows[9].scan) in warnings and ("field of view", rows[3].scan) in warnings
    assert {("grid", rows[i].scan) for i in (0, 3, 6)} <= found(few, "note")


def test_table_warnings(few):
    edit(few, r0={"age": "", "diagnosis": ""}, r4={"age": "40"}, r7={"sex": "F"}, r8={"sex": "M"})
    edit(few, r10={"diagnosis": "AD"}, r11={"diagnosis": "CN"})
    with pytest.raises(UserError, match="subject sub-0003 is listed with several sexes"):
        run_main(check, "--root", few, *GRID)
    warnings = found(few, "warning")
    assert {("missing age", "sub-0001_M000"), ("missing diagnosis", "sub-0001_M000")} <= warnings
    assert {("age", "sub-0002_M006"), ("age", "sub-0002_M012"), ("diagnosis", "sub-0004_M012")} <= warnings


def test_a_head_with_skull_is_suspected(few, capsys):
    """A bright scalp on dark bone about every brain: warned of, unless scans with skull are expected."""
    from scipy import ndimage

    for row in dataset.read_table(few / "data/dataset.csv"):
        volume = nifti.crop_or_pad(nifti.resample(nifti.load(row.path), 6.0), (40, 48, 40))
        brain = volume.data > 100
        bone, scalp = (ndimage.binary_dilation(brain, iterations=n) for n in (2, 3))
        nifti.save(row.path, volume.data * brain + 900 * (scalp & ~bone), volume.affine)
    run_main(check, "--root", few, *GRID)
    everybody = {row.scan for row in dataset.read_table(few / "data/dataset.csv")}
    assert {scan for kind, scan in found(few) if kind == "skull"} == everybody
    assert "warning: 18 scans: skull, such as sub-0001_M000: looks not skull-stripped" in capsys.readouterr().out
    run_main(check, "--root", few, *GRID, "--no_skull_stripped", "--overwrite")
    assert not {scan for kind, scan in found(few) if kind == "skull"}
