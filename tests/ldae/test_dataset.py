"""dataset.py: what a table must have, clear errors, sessions, classes, cached volumes."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from common import nifti
from common.cli import UserError
from ldae import dataset, preprocess
from tests.ldae.conftest import SHAPE


def table(tmp_path, text, *files):
    """A CSV with existing (empty) scans."""
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "t.csv").write_text(text)
    return tmp_path / "t.csv"


def test_full_table(cohort):
    rows = dataset.read_table(cohort / "data/dataset.csv", need=("diagnosis", "session", "age", "sex"))
    assert [row.index for row in rows] == list(range(48)) and len({row.subject for row in rows}) == 16
    assert [row.session for row in rows[:3]] == [0, 6, 12] and rows[1].scan == "sub-0001_M006"
    assert rows[0].path.is_file() and rows[0].age < rows[1].age and {row.sex for row in rows} == {"F", "M"}
    assert {row.diagnosis for row in rows} == {"AD", "CN", "MCI"} and rows[0].latent_path is None
    few = dataset.read_table(cohort / "data/dataset.csv", classes=("AD", "CN"))
    assert {row.diagnosis for row in few} == {"AD", "CN"} and [row.index for row in few[:4]] == [0, 1, 2, 3]


def test_fact_13_only_subject_and_path_are_mandatory(cohort, tmp_path):
    """Fact 13: stage 1 needs no latent_path, age or session; what else it needs is asked for by name."""
    with open(cohort / "data/dataset.csv", newline="") as file:
        records = list(csv.DictReader(file))
    text = "path,subject\n" + "".join(f"{cohort / 'data' / r['path']},{r['subject']}\n" for r in records)
    rows = dataset.read_table(table(tmp_path, text))
    assert len(rows) == 48 and rows[0].diagnosis is rows[0].age is rows[0].sex is None
    assert rows[1].session == 6 and rows[1].scan == "sub-0001_M006"  # from ses-M006 in the path, as the original
    with pytest.raises(UserError, match=r"has no column age, diagnosis but path, subject; add it"):
        dataset.read_table(tmp_path / "t.csv", need=("path", "age", "session", "diagnosis"))
    with pytest.raises(UserError, match="no column diagnosis"):
        dataset.read_table(tmp_path / "t.csv", classes=("AD",))


def test_sessions_and_names(tmp_path):
    months = {"M006": 6, "ses-M012": 12, "m24": 24, "6": 6, "18.0": 18, "bl": 0, "ses-x": None, "": None}
    assert {text: dataset.parse_session(text) for text in months} == months
    assert dataset.session_months("/x/sub-1/ses-M036/anat/a.nii.gz") == 36
    assert dataset.session_months("/x/ses-2/a.nii.gz") is None
    assert dataset.scan_name("S 1/2", 6, "x.nii.gz") == "S-1-2_M006"
    assert dataset.scan_name("s1", None, "a/s1_T1w.nii.gz") == "s1_T1w"
    assert dataset.scan_name("s1", None, "a/T1w.nii") == "s1_T1w"
    text = "subject,path,session\ns1,a.nii.gz,next\n"
    with pytest.raises(UserError, match="row 2 has session 'next'; write months"):
        dataset.read_table(table(tmp_path, text, "a.nii.gz"))
    text = "subject,path\ns1,a.nii.gz\n"
    with pytest.raises(UserError, match="no column session .*ses-M006 into the paths"):
        dataset.read_table(table(tmp_path, text, "a.nii.gz"), need=("session",))


def test_blank_entries_are_left_out_where_needed(tmp_path, capsys):
    text = "subject,path,diagnosis,age\ns1,a.nii,AD,70.5\ns2,b.nii,,n/a\ns3,c.nii, CN ,NaN\n"
    csv_path = table(tmp_path, text, "a.nii", "b.nii", "c.nii")
    assert [row.age for row in dataset.read_table(csv_path)] == [70.5, None, None]
    assert capsys.readouterr().err == ""
    rows = dataset.read_table(csv_path, need=("age",))
    assert [row.subject for row in rows] == ["s1"]
    assert "2 of 3 rows" in capsys.readouterr().err
    rows = dataset.read_table(csv_path, classes=("CN",))
    assert [row.index for row in rows] == [2] and "1 of 3 rows" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no row has diagnosis MCI; there are: AD \(1\), CN \(1\)"):
        dataset.read_table(csv_path, classes=("AD", "MCI"))
    blank = table(tmp_path, "subject,path,age\ns1,a.nii,\n")
    with pytest.raises(UserError, match="no row has all of age"):
        dataset.read_table(blank, need=("age",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("subject,path\n", "has no rows"),
        ("subject,file\ns1,a.nii\n", "has no column path but subject, file; add it"),
        ("subject,path,age\ns1,a.nii\n", "row 2 has not as many cells"),
        ("subject,path\n,a.nii\n", "row 2 has no subject"),
        ("subject,path\ns1,\n", "row 2 has no path"),
        ("subject,path,age\ns1,a.nii,old\n", "row 2 has age 'old'; give years"),
        ("subject,path,age\ns1,a.nii,-3\n", "row 2 has age -3"),
        ("subject,path\ns1,a.nii\ns1,./a.nii\n", "rows 2 and 3 are one scan twice"),
        ("subject,path\ns1,a.nii\ns2,a.nii\n", "one file under the subjects s1 and s2"),
        ("subject,path,session\ns1,a.nii,0\ns1,b.nii,M000\n", r"rows 2 and 3 are both s1_M000 .*keep one scan"),
        ("subject,path\ns1,a.nii\ns2,gone.nii\n", r"1 of 2 files .* do not exist, such as .*gone.nii"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        dataset.read_table(table(tmp_path, text, "a.nii", "b.nii"))


def test_missing_table_and_missing_files(tmp_path):
    with pytest.raises(UserError, match="no table .*make_phantom.py.*build_table.py"):
        dataset.read_table(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00s")
    with pytest.raises(UserError, match="no CSV table in UTF-8"):
        dataset.read_table(tmp_path / "bytes.csv")
    rows = dataset.read_table(table(tmp_path, "subject,path\ns1,gone.nii\n"), missing_files=True)
    assert rows[0].path == tmp_path / "gone.nii"


def test_class_index_is_the_alphabetical_rank():
    assert dataset.class_index(("MCI", "AD", "CN")) == {"AD": 0, "CN": 1, "MCI": 2}
    assert dataset.class_index(("MCI", "CN")) == {"CN": 0, "MCI": 1}


def test_labels_and_ages(cohort):
    rows = dataset.read_table(cohort / "data/dataset.csv")
    labels = dataset.labels(rows, dataset.CLASSES)
    assert labels.dtype == np.int64 and labels.tolist()[:9] == [1, 1, 1, 0, 0, 0, 2, 2, 2]
    assert dataset.ages(rows).dtype == np.float32 and 60 <= dataset.ages(rows).min() < dataset.ages(rows).max() <= 91


def test_the_cache_keeps_preparations_apart(cohort, prep, tmp_path):
    """One cache folder serves all stages: what one preparation left there is nothing to another."""
    row = dataset.read_table(cohort / "data/dataset.csv")[0]
    others = {"intensity": "minmax"}, {"mask": "head"}, {"shape": (12, 16, 12)}, {"spacing_mm": 10.0}
    for change in ({}, *others):
        own = replace(prep, **change)
        np.testing.assert_array_equal(dataset.Volumes(own, tmp_path).load(row), dataset.Volumes(own, None).load(row))


def test_volumes_are_cached_and_follow_the_file(cohort, prep, tmp_path, monkeypatch):
    source = dataset.read_table(cohort / "data/dataset.csv")[4]
    volume = nifti.load(source.path)
    path = tmp_path / "scan.nii.gz"
    nifti.save(path, volume.data, volume.affine)
    row = dataset.Row(0, "s", None, path, None, None, None, "s")
    volumes = dataset.Volumes(prep, tmp_path / "cache")
    first = volumes.load(row)
    assert first.shape == SHAPE and first.dtype == np.float32 and volumes.tensor(row).shape == (1, *SHAPE)
    assert isinstance(volumes.tensor(row), torch.Tensor)
    np.testing.assert_array_equal(volumes.affine(row), volume.affine)
    np.testing.assert_array_equal(volumes.native(row).data, volume.data)
    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "prepare", lambda *_: pytest.fail("prepared again"))
        np.testing.assert_array_equal(dataset.Volumes(prep, tmp_path / "cache").load(row), first)
    nifti.save(path, volume.data[::-1], volume.affine)
    np.testing.assert_array_equal(volumes.load(row), first[::-1])
    path.unlink()
    with pytest.raises(UserError, match="scan.nii.gz"):
        volumes.load(row)
