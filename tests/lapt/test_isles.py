"""isles.py: a folder in the layout of ISLES'24 becomes a table that preprocessing.py reads."""

import csv
import shutil

import pytest

from common.cli import UserError
from lapt import dataset, isles, preprocessing
from tests.helpers import run_main

FILES = {"ctp": "ses-01/{0}_ses-01_space-ncct_ctp", "dwi": "ses-02/{0}_ses-02_space-ncct_dwi",
         "adc": "ses-02/{0}_ses-02_space-ncct_adc", "lesion": "ses-02/{0}_ses-02_lesion-msk"}  # fmt: skip


@pytest.fixture
def study(cohort, tmp_path):
    """Four subjects: 1 to 3 complete, 4 without DWI; raw data of subject 1 beside, which must not be taken."""
    root = tmp_path / "isles"
    for number in range(1, 5):
        subject = f"sub-stroke{number:04d}"
        for what, name in FILES.items():
            if number == 4 and what in ("dwi", "adc", "lesion"):
                continue
            path = root / "derivatives" / subject / (name.format(subject) + ".nii.gz")
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(cohort / f"raw/case_{number:04d}/{what}.nii.gz", path)
    raw = root / "raw_data/sub-stroke0001/ses-02/sub-stroke0001_ses-02_dwi.nii.gz"
    raw.parent.mkdir(parents=True)
    raw.write_bytes(b"native space")
    return root


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_table_and_preparation(study, tmp_path, capsys):
    """The files in the space of the CT are taken; the table prepares as it is, masks made from the CT."""
    run_main(isles, "--root", study)
    assert "4 cases, 3 with DWI and ADC, 0 with a brain mask" in capsys.readouterr().out
    table = rows(study / "cases.csv")
    assert [row["case"] for row in table] == [f"sub-stroke{n:04d}" for n in range(1, 5)]
    assert table[0]["dwi"].endswith("derivatives/sub-stroke0001/ses-02/sub-stroke0001_ses-02_space-ncct_dwi.nii.gz")
    assert table[0]["lesion"] and table[3]["ctp"] and not table[3]["dwi"] + table[3]["adc"] + table[3]["lesion"]
    run_main(preprocessing, "--cases", study / "cases.csv", "--output_dir", tmp_path / "out", "--make_masks",
             "--clip_lesion", "--to_ctp_grid", "--num_workers", 1)  # fmt: skip
    assert [c.name for c in dataset.read_cases(tmp_path / "out", "ct_only")] == ["sub-stroke0004"]
    assert len(dataset.read_cases(tmp_path / "out")) == 4


def test_images_in_another_space_are_left_out(study, capsys):
    folder = study / "derivatives/sub-stroke0002/ses-02"
    (folder / "sub-stroke0002_ses-02_space-ncct_dwi.nii.gz").rename(folder / "sub-stroke0002_ses-02_dwi.nii.gz")
    shutil.rmtree(study / "derivatives/sub-stroke0003/ses-01")
    run_main(isles, "--root", study)
    out = capsys.readouterr().out
    assert "sub-stroke0002: sub-stroke0002_ses-02_dwi.nii.gz is not in the space of the CT; register it" in out
    assert "sub-stroke0003: no CT perfusion, left out" in out
    assert [bool(row["dwi"]) for row in rows(study / "cases.csv")] == [True, False, False]
    run_main(isles, "--root", study, "--any_space", "--overwrite")
    assert [bool(row["dwi"]) for row in rows(study / "cases.csv")] == [True, True, False]


def test_own_patterns(study, tmp_path):
    folder = study / "derivatives/sub-stroke0001/ses-01"
    shutil.copy(folder / "sub-stroke0001_ses-01_space-ncct_ctp.nii.gz", folder / "sub-stroke0001_moco.nii.gz")
    run_main(isles, "--root", study, "--ctp", "{subject}_moco.nii.gz", "--out", tmp_path / "t.csv", "--any_space")
    assert [row["ctp"].rpartition("/")[2] for row in rows(tmp_path / "t.csv")] == ["sub-stroke0001_moco.nii.gz"]


def test_refusals(study, tmp_path):
    run_main(isles, "--root", study)
    for options, message in ((("--root", study), "cases.csv exists"), ((), "--root"),
                             (("--root", tmp_path / "absent"), "--root .*absent"),
                             (("--root", study / "raw_data/sub-stroke0001"), "no folders sub-"),
                             (("--root", study / "raw_data", "--out", tmp_path / "x.csv"), "none of its subjects"),
                             (("--root", study, "--out", tmp_path / "x.csv", "--ctp", "{foo}*{"), r"\{foo\}\*\{"),
                             ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            run_main(isles, *options)
