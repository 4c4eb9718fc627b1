"""data_split.py: one stored, stratified, subject-wise split for all stages; the original's rule beside it."""

import json
import shutil
from collections import Counter

import pytest

from common import runtime
from common.cli import UserError
from ldae import data_split, dataset
from ldae.dataset import Row
from tests.helpers import run_main


@pytest.fixture
def rt():
    with runtime.start("cpu", "fp32") as rt:
        yield rt


def people(**counts):
    """Rows of subjects with two sessions each, `counts` subjects of each diagnosis."""
    names = [(f"{d}{i:02d}", d) for d, n in counts.items() for i in range(n)]
    return [Row(2 * i + k, s, 6 * k, None, d, 70.0, None, f"{s}_{k}")
            for i, (s, d) in enumerate(names) for k in range(2)]  # fmt: skip


def test_fact_12_disjoint_with_every_class_and_one_hash(cohort, tmp_path, rt):
    """Fact 12: disjoint subjects, every class everywhere, one file and hash for all stages, whatever `classes` is."""
    path = tmp_path / "split.json"
    rows = dataset.read_table(cohort / "data/dataset.csv")
    split = data_split.load_or_create(path, rows, 0.2, 0.2, 42, rt)
    content = path.read_bytes()
    parts = {name: split.rows(rows, name) for name in data_split.SPLITS}
    subjects = [{row.subject for row in part} for part in parts.values()]
    assert sum(map(len, subjects)) == len(set.union(*subjects)) == 16
    assert sum(map(len, parts.values())) == 48  # all sessions of a subject stay together
    for part in parts.values():
        assert {row.diagnosis for row in part} == {"AD", "CN", "MCI"}
    again = data_split.load_or_create(path, rows, 0.2, 0.2, 42, rt)
    few = dataset.read_table(cohort / "data/dataset.csv", classes=("AD", "CN"))
    narrow = data_split.load_or_create(path, few, 0.2, 0.2, 42, rt)
    assert split.hash == again.hash == narrow.hash == json.loads(content)["hash"] and path.read_bytes() == content
    for name in data_split.SPLITS:
        assert narrow.rows(few, name) == [row for row in parts[name] if row.diagnosis != "MCI"]


def test_made_alike_whatever_the_order(tmp_path, rt, capsys):
    rows = people(AD=9, CN=14, MCI=6)
    split, notes = data_split.stratified(rows, 0.1, 0.2, 3)
    assert data_split.stratified(rows[::-1], 0.1, 0.2, 3)[0] == split and not notes
    assert data_split.stratified(rows, 0.1, 0.2, 4)[0] != split
    counts = {name: Counter(s[:2] for s in split.subjects[name]) for name in data_split.SPLITS}
    assert counts["test"] == {"AD": 2, "CN": 3, "MC": 1} and counts["val"] == {"AD": 1, "CN": 1, "MC": 1}
    stored = data_split.load_or_create(tmp_path / "s.json", rows, 0.1, 0.2, 3, rt, table="/somewhere/t.csv")
    record = json.loads((tmp_path / "s.json").read_text())
    assert stored.subjects == split.subjects and record["table"] == "t.csv" and record["seed"] == 3
    assert record["counts"]["test"] == {"AD": 2, "CN": 3, "MCI": 1}
    capsys.readouterr()
    data_split.load_or_create(tmp_path / "s.json", rows, 0.3, 0.2, 3, rt)
    assert "stays as it was made: val_size 0.1, not 0.3" in capsys.readouterr().out


def test_diagnosis_of_a_subject_is_its_last_one():
    rows = [Row(0, "a", 12, None, "AD", None, None, ""), Row(1, "a", 0, None, "MCI", None, None, ""),
            Row(2, "b", 0, None, "CN", None, None, ""), Row(3, "b", 6, None, None, None, None, ""),
            Row(4, "c", None, None, None, None, None, "")]  # fmt: skip
    assert data_split.diagnosis_of(rows) == {"a": "AD", "b": "CN", "c": ""}


def test_small_classes_stay_in_train_with_a_note(tmp_path, rt, capsys):
    rows = people(CN=6, SMC=2, AD=3)
    split = data_split.load_or_create(tmp_path / "s.json", rows, 0.005, 0.1, 1, rt)
    assert "diagnosis SMC: 2 subjects, too few for every split, in train only" in capsys.readouterr().out
    assert {s[:2] for s in split.subjects["train"]} == {"CN", "SM", "AD"}
    for name in ("val", "test"):
        assert {s[:2] for s in split.subjects[name]} == {"CN", "AD"}
        with pytest.raises(UserError, match=f"none of the 4 rows .SMC. is of split {name}"):
            split.rows([row for row in rows if row.diagnosis == "SMC"], name)
    with pytest.raises(UserError, match=r"4 subjects \(2 CN, 2 SMC\) are too few"):
        data_split.stratified(people(CN=2, SMC=2), 0.1, 0.1, 1)
    unknown = [Row(i, f"s{i}", None, None, None, None, None, f"s{i}") for i in range(10)]
    assert len(data_split.stratified(unknown, 0.1, 0.1, 0)[0].subjects["train"]) == 8  # no diagnosis at all is fine


def test_subjects_that_the_file_does_not_know(tmp_path, rt):
    data_split.load_or_create(tmp_path / "s.json", people(CN=6), 0.2, 0.2, 1, rt)
    with pytest.raises(UserError, match="subject CN06 is not in the split .*s.json"):
        data_split.load_or_create(tmp_path / "s.json", people(CN=7), 0.2, 0.2, 1, rt)


def test_bad_and_own_files(tmp_path, rt):
    path, rows = tmp_path / "s.json", people(CN=6)
    data_split.load_or_create(path, rows, 0.2, 0.2, 1, rt)
    record = json.loads(path.read_text())
    moved = record["subjects"]["train"].pop()
    record["subjects"]["test"].append(moved)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="do not match its hash"):
        data_split.read(path)
    del record["hash"]
    path.write_text(json.dumps(record))
    assert data_split.read(path).of(moved) == "test"
    record["subjects"]["val"].append(moved)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"1 subjects are listed twice, such as {moved}"):
        data_split.read(path)
    for text in ("{", "[]", '{"subjects": {"train": []}}'):
        path.write_text(text)
        with pytest.raises(UserError, match="is no split file"):
            data_split.load_or_create(path, rows, 0.2, 0.2, 1, rt)


@pytest.mark.parametrize(
    ("val", "test", "seed", "message"),
    [(0, 0.1, 0, "--val_size 0"), (0.5, 0.5, 0, "together below 1"), (0.1, 0.1, -1, "--split_seed")],
)
def test_impossible_shares(tmp_path, rt, val, test, seed, message):
    with pytest.raises(UserError, match=message):
        data_split.load_or_create(tmp_path / "s.json", people(CN=6), val, test, seed, rt)
    assert not (tmp_path / "s.json").exists()


def test_upstream_rule_is_scikit_learns_twice():
    """The original: group shuffle of the selected rows; another selection has other test subjects (defect 4)."""
    rows = people(AD=10, CN=12, MCI=9, SMC=1)
    parts = data_split.group_shuffle(rows, 0.2, 0.1, 42, ("AD", "CN", "MCI"))
    subjects = [{row.subject for row in part} for part in parts.values()]
    assert sum(map(len, subjects)) == 31 and not subjects[0] & subjects[1] and len(subjects[2]) == 4
    assert data_split.group_shuffle(rows, 0.2, 0.1, 42)["test"] == parts["test"]  # the 10 % rule drops SMC
    other = data_split.group_shuffle(rows, 0.2, 0.1, 42, ("AD", "CN"))
    assert {row.subject for row in other["test"]} != {s for s in subjects[2] if not s.startswith("MCI")}
    split, notes = data_split.make(rows, 0.2, 0.1, 42, "upstream")
    assert set(split.subjects["test"]) == subjects[2] and "SMC00" in split.subjects["train"] and notes


def test_command(cohort, tmp_path, capsys):
    shutil.copytree(cohort, tmp_path / "study")
    run_main(data_split, "--root", tmp_path / "study", "--test_size", 0.2)
    assert "test: 3 subjects (1 AD, 1 CN, 1 MCI)" in capsys.readouterr().out
    with pytest.raises(UserError, match="split.json is there already"):
        run_main(data_split, "--root", tmp_path / "study")
    run_main(data_split, "--root", tmp_path / "study", "--overwrite", "--split_seed", 1)
