"""scripts/build_table.py: BIDS trees and plain folders to a table, what is missing, the split file."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from common.cli import UserError
from ldae import dataset
from ldae.scripts import build_table
from tests.helpers import run_main, run_script


def scan(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), path)


def records(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_bids_tree_gives_the_phantoms_own_table(cohort, tmp_path):
    """participants.tsv, sessions.tsv and the paths say all that dataset.csv says; the split is of the same subjects."""
    out, split = tmp_path / "tables/dataset.csv", tmp_path / "split.json"
    done = run_script(["ldae/scripts/build_table.py", "--folder", str(cohort / "data/scans"), "--out", str(out),
                       "--split", str(split)], cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "48 scans of 16 subjects: 15 AD, 18 CN, 15 MCI" in done.stdout and "missing" not in done.stdout
    made, own = (dataset.read_table(path) for path in (out, cohort / "data/dataset.csv"))
    assert [row.path.resolve() for row in made] == [row.path.resolve() for row in own]
    for a, b in zip(made, own, strict=True):
        assert (a.subject, a.session, a.diagnosis, a.age, a.sex, a.scan) == (
            b.subject, b.session, b.diagnosis, b.age, b.sex, b.scan)  # fmt: skip
    assert not records(out)[0]["path"].startswith("/")  # relative to the table
    assert sum(map(len, json.loads(split.read_text())["subjects"].values())) == 16


def test_dry_run_lists_what_is_missing_and_writes_nothing(tmp_path, capsys):
    names = [f"sub-01/ses-M00{m}/anat/sub-01_ses-M00{m}_T1w.nii.gz" for m in (0, 6)]
    others = ["sub-02/anat/sub-02_T1w.nii", "sub-02/anat/sub-02_T2w.nii", "derivatives/sub-01_T1w.nii.gz"]
    for name in names + others:
        scan(tmp_path / "bids" / name)
    (tmp_path / "bids/participants.tsv").write_text("participant_id\tGender\tDX\tage\nsub-01\tf\tDementia\tn/a\n")
    (tmp_path / "bids/sub-01/sub-01_sessions.tsv").write_text("session_id\tage\nses-M000\t71\nses-M006\t71.5\n")
    before = sorted(tmp_path.rglob("*"))
    run_main(build_table, "--folder", tmp_path / "bids", "--dry_run")
    text = capsys.readouterr().out
    assert "3 scans of 2 subjects: 2 AD, 1 no diagnosis" in text
    for line in ("missing session: 1 of 3 scans (sub-02_T1w.nii)", "missing age: 1 of 3", "missing diagnosis: 1 of 3"):
        assert line in text
    assert sorted(tmp_path.rglob("*")) == before
    run_main(build_table, "--folder", tmp_path / "bids", "--out", tmp_path / "t.csv")
    rows = dataset.read_table(tmp_path / "t.csv")
    assert [(r.scan, r.age, r.sex, r.diagnosis) for r in rows] == [
        ("sub-01_M000", 71.0, "F", "AD"),
        ("sub-01_M006", 71.5, "F", "AD"),
        ("sub-02_T1w", None, None, None),
    ]


def test_plain_folder_with_a_table_of_subjects_and_masks(tmp_path):
    """Subjects by the ids that file names begin with (the longest that fits), masks by the scans' names."""
    for name in ("scans/IXI1-HH_T1.nii.gz", "scans/IXI1-HH2_T1.nii.gz", "scans/stranger.nii.gz"):
        scan(tmp_path / name)
    scan(tmp_path / "scans/masks/IXI1-HH_T1_brain.nii.gz")
    (tmp_path / "scans/participants.csv").write_text("MRID,Age,Sex\nIXI1-HH,36.6,M\nIXI1-HH2,40,F\n")
    run_main(build_table, "--folder", tmp_path / "scans", "--masks", tmp_path / "scans/masks",
             "--out", tmp_path / "scans/table.csv")  # fmt: skip
    rows = {row.subject: row for row in dataset.read_table(tmp_path / "scans/table.csv")}
    assert set(rows) == {"IXI1-HH", "IXI1-HH2", "stranger"}
    assert (rows["IXI1-HH"].age, rows["IXI1-HH2"].sex, rows["stranger"].age) == (36.6, "F", None)
    assert rows["IXI1-HH"].mask_path.is_file() and rows["IXI1-HH2"].mask_path is None
    assert rows["IXI1-HH"].scan == "IXI1-HH_T1" and list(records(tmp_path / "scans/table.csv")[0]) == [
        "subject", "path", "age", "sex", "mask_path"]  # fmt: skip


def test_a_table_that_no_stage_could_read_is_not_written(tmp_path):
    for name in ("sub-01/anat/sub-01_T1w.nii.gz", "sub-01/more/sub-01_T1w.nii.gz"):
        scan(tmp_path / "bids" / name)
    with pytest.raises(UserError, match=r"t.csv: rows 2 and 3 are both sub-01_T1w"):
        run_main(build_table, "--folder", tmp_path / "bids", "--out", tmp_path / "t.csv")
    shutil.rmtree(tmp_path / "bids/sub-01/more")
    with pytest.raises(UserError, match="too few to train"):
        run_main(build_table, "--folder", tmp_path / "bids", "--out", tmp_path / "t.csv",
                 "--split", tmp_path / "s.json")  # fmt: skip
    assert not list(tmp_path.glob("*.csv")) + list(tmp_path.glob(".*")) + list(tmp_path.glob("*.json"))


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="--out is not given"):
        run_main(build_table, "--folder", tmp_path)
    with pytest.raises(UserError, match="no folder"):
        run_main(build_table, "--folder", tmp_path / "none", "--dry_run")
    with pytest.raises(UserError, match=r"no scan \*.nii or \*.nii.gz below"):
        run_main(build_table, "--folder", tmp_path, "--dry_run")
    scan(tmp_path / "scans/a.nii.gz")
    (tmp_path / "t.csv").write_text("mine")
    with pytest.raises(UserError, match="t.csv is there already"):
        run_main(build_table, "--folder", tmp_path / "scans", "--out", tmp_path / "t.csv")
    with pytest.raises(UserError, match="no table"):
        run_main(build_table, "--folder", tmp_path / "scans", "--dry_run", "--participants", tmp_path / "no.csv")
    (tmp_path / "p.csv").write_text("colour\nred\n")
    with pytest.raises(UserError, match="has no column of subjects"):
        run_main(build_table, "--folder", tmp_path / "scans", "--dry_run", "--participants", tmp_path / "p.csv")
    assert (tmp_path / "t.csv").read_text() == "mine"
