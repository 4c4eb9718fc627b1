"""audit.py and data_split.py: planted copies, leaks and bad volumes stop the split; published row counts come out."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from common import nifti
from common.cli import UserError
from neuroldm3d import audit, data_split, dataset
from neuroldm3d.dataset import Row, Volumes, read_table
from tests.helpers import run_main, run_script


def records(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def add_row(table, file, **changes):
    """A copy of the table's first row under another file and subject id."""
    rows = records(table)
    row = rows[0] | {"file": f"../data/gm/{file}", "sbj_nme": Path(file).name.split(".")[0]} | changes
    with open(table, "w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows([*rows, row])


def plant(study, change=lambda data: data, *, split="test", name="mwp1sub-9999_T1w.nii"):
    """Write a changed copy of the first training volume under a new id and list it in another table."""
    first = read_table(study / "data_csvs/train.csv")[0]
    volume = nifti.load(first.file)
    nifti.save(study / "data/gm" / name, change(volume.data), volume.affine)  # RAS on disk, uncompressed
    add_row(study / f"data_csvs/{split}.csv", name, HC_vs_LTLE_vs_RTLE_string=first.group)
    add_row(study / "data_csvs/master.csv", name, HC_vs_LTLE_vs_RTLE_string=first.group)
    return first.name, name.split(".")[0]


def report_of(study):
    return json.loads((study / "data_csvs/audit.json").read_text())


# ---- audit


def test_a_clean_cohort_passes(study, capsys):
    run_main(audit, "--root", study)
    report = report_of(study)
    assert report["blocking"] == [] == report["duplicates"] and report["rows"] == report["subjects"] == 24
    assert report["groups_by_table"]["train"] == {"HC": 5, "left": 4, "right": 3}
    assert report["shapes"] == {"33 x 41 x 33": 24}
    by_site = report["site"]["groups_by_site"]
    assert sum(n for groups in by_site.values() for n in groups.values()) == 24
    assert report["covariates"]["HC"]["age_years"]["n"] == sum(g.get("HC", 0) for g in by_site.values())
    assert len(set(report["fingerprints"].values())) == 24
    assert "nothing to mend" in capsys.readouterr().out
    with pytest.raises(UserError, match="audit.json is there already"):
        run_main(audit, "--root", study)


@pytest.mark.parametrize(("change", "kind"), [
    (lambda x: x, "exact"),
    (lambda x: 1.2 * x, "near"),
    (lambda x: np.clip(x + np.random.default_rng(0).normal(0, 0.03, x.shape) * (x > 0), 0, None), "near"),
    (lambda x: ndimage.gaussian_filter(x, 0.5), "near"),
    (lambda x: x[::-1], "mirrored"),
])  # fmt: skip
def test_copies_in_another_table_block_fact_9(study, change, kind):
    """Fact 9: one copy under a new id in the other split is reported and blocks."""
    names = plant(study, change)
    with pytest.raises(UserError, match="1 pairs of volumes under different ids are copies of one scan, 1 across"):
        run_main(audit, "--root", study)
    report = report_of(study)
    (pair,) = report["duplicates"]
    assert {pair["a"], pair["b"]} == set(names) and set(pair["tables"]) == {"train", "test"}
    assert pair["kind"] == kind and pair["nmse"] < audit.THRESHOLD
    assert report["duplicate_groups"] == [list(names)]


def test_exit_status_and_one_line(study):
    plant(study)
    done = run_script(["neuroldm3d/audit.py", "--root", study])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert "mwp1sub-9999_T1w" in done.stderr and "normalised MSE 0" in done.stderr
    allowed = run_script(["neuroldm3d/audit.py", "--root", study, "--allow", "duplicates", "--overwrite"])
    assert allowed.returncode == 0 and "warning: 1 pairs" in allowed.stdout


def test_unrelated_maps_are_far_apart(cohort):
    rows = [row for split in ("train", "val", "test") for row in read_table(cohort / f"data_csvs/{split}.csv")]
    facts = [audit.examine(row) for row in rows]
    pairs = audit.duplicate_pairs(facts, threshold=10.0)
    assert len(pairs) == 24 * 23 / 2 and min(pair["nmse"] for pair in pairs) > 2 * audit.THRESHOLD


def test_cohort_of_copies_only():
    """All differences from the mean are 0; two unrelated maps are not copies of each other."""
    x = np.random.default_rng(0).normal(size=(3, 6, 7, 6)).astype(np.float32)
    assert [p[:2] for p in audit.near_pairs(np.stack([x[0], x[0]]))] == [(0, 1)]
    assert audit.near_pairs(x[:2]) == [] == audit.near_pairs(x[:1])
    many = np.concatenate([np.random.default_rng(1).normal(size=(1100, 4, 4, 4)), np.zeros((1, 4, 4, 4))])
    many[-1] = many[600]  # beyond the first chunk
    assert [p[:2] for p in audit.near_pairs(many.astype(np.float32), 0.01)] == [(600, 1100)]


def test_duplicate_groups_of_prepared_volumes(study, prep, tmp_path):
    name, copy = plant(study)
    rows = [row for split in ("train", "test") for row in read_table(study / f"data_csvs/{split}.csv")]
    assert audit.duplicate_groups(rows, Volumes(prep, tmp_path / "cache")) == [[name, copy]]
    assert audit.duplicate_groups(rows[:-1], Volumes(prep, tmp_path / "cache")) == []


@pytest.mark.parametrize(("change", "message"), [
    (lambda x: np.full_like(x, 0.2), "every voxel is 0.2"),
    (lambda x: x[:-1], "another shape than"),
])  # fmt: skip
def test_bad_volumes_block(study, change, message):
    plant(study, change)
    with pytest.raises(UserError, match=message):
        run_main(audit, "--root", study)


def test_unreadable_and_misplaced_volumes(study):
    rows = read_table(study / "data_csvs/train.csv")
    rows[0].file.write_bytes(rows[0].file.read_bytes()[:1000])
    volume = nifti.load(rows[1].file)
    data = volume.data.copy()
    data[3, 3, 3] = np.nan
    import nibabel as nib  # ours refuses to write NaN

    nib.save(nib.Nifti1Image(data, volume.affine), rows[1].file)
    nifti.save(rows[2].file, nifti.load(rows[2].file).data - 0.1, volume.affine * [[1, 1, 1, 1]] * 3 + 5)
    with pytest.raises(UserError, match="the audit found 3 problems"):
        run_main(audit, "--root", study)
    report = report_of(study)
    found = " | ".join(report["blocking"])
    assert f"{rows[0].name}: file is truncated" in found and f"{rows[1].name}: 1 voxels are NaN" in found
    assert f"other voxel sizes or axes than most, such as {rows[2].name}" in found
    assert "negative values" in report["warnings"][0]
    assert str(study) not in json.dumps(report)  # fact 39


def test_subject_in_two_tables_or_with_two_labels(study):
    rows = read_table(study / "data_csvs/train.csv")
    copy = study / "data/gm/mwp1sub-9999_T1w.nii.gz"
    shutil.copy(read_table(study / "data_csvs/val.csv")[0].file, copy)
    plant(study, lambda x: np.random.default_rng(0).random(x.shape), name="other_scan.nii")
    table = study / "data_csvs/test.csv"
    table.write_text(table.read_text().replace("other_scan,", f"{rows[0].subject},").replace(",HC,", ",left,"))
    with pytest.raises(UserError, match=f"subject {rows[0].subject} is in test and train; keep it in one table"):
        run_main(audit, "--root", study)
    assert any("is labelled HC and left" in text for text in report_of(study)["blocking"])


def test_site_only_baseline():
    """A site that has one class only is named; an uninformative site gives an AUC of about one half."""
    rng = np.random.default_rng(0)

    def rows(site_of):
        labels = rng.permutation([0] * 150 + [1] * 150)
        return [Row(Path("x"), f"v{i}", int(y), "left" if y else "HC", f"s{i}", {"site": site_of(y)})
                for i, y in enumerate(labels)]  # fmt: skip

    clean = audit.site_baseline(rows(lambda y: f"S{rng.integers(5)}"))
    assert 0.35 < clean["site_only_auc"] < 0.65 and clean["one_class_sites"] == []
    confounded = audit.site_baseline(rows(lambda y: "S9" if y and rng.random() < 0.5 else f"S{rng.integers(5)}"))
    assert 0.68 < confounded["site_only_auc"] < 0.85 and confounded["one_class_sites"] == ["S9"]
    texts = [text for _, text in audit.site_findings(confounded)]
    assert "site S9 has only left" in texts[0] and "the site alone tells TLE from HC" in texts[1]
    assert audit.site_baseline([Row(Path("x"), "v", 0, "HC", "s")]) is None
    few = audit.site_baseline(rows(lambda y: "S")[:4])
    assert few["site_only_auc"] is None


# ---- split


def published_rows():
    groups = np.repeat(["HC", "left", "right"], [1356, 1071, 777])[np.random.RandomState(0).permutation(3204)]
    return [Row(Path(f"{i}.nii"), str(i), dataset.LABEL_OF[g], str(g), str(i)) for i, g in enumerate(groups)]


def test_published_counts_fact_6():
    """Fact 6: 3204 rows -> 2723/481, of these 178/303, with the published classes; rows are in the golden case."""
    rows = published_rows()
    parts = data_split.split(rows, data_split.Options())
    counts = {name: Counter(row.group for row in part) for name, part in parts.items()}
    assert [len(parts[name]) for name in ("train", "val", "test")] == [2723, 178, 303]
    assert counts["train"] == {"HC": 1153, "left": 910, "right": 660}
    assert counts["val"] + counts["test"] == {"HC": 203, "left": 161, "right": 117}
    assert counts["val"]["HC"] == 75 and counts["test"]["HC"] == 128
    both = data_split.split(rows, data_split.Options(selection_fraction=1.0))
    assert {name: len(part) for name, part in both.items()} == {"train": 2723, "val": 481}
    four = data_split.split(rows, data_split.Options(reference_fraction=0.1))
    assert sum(map(len, four.values())) == 3204 and len(four["reference"]) == 273
    assert {row.name for row in four["test"]} == {row.name for row in parts["test"]}


def split(study, *options):
    run_main(data_split, "--csv", study / "data_csvs/master.csv", "--out", study / "split", *options)
    return {path.stem: read_table(path) for path in sorted((study / "split").glob("*.csv"))}


SIZES = ("--held_out_fraction", 0.5, "--selection_fraction", 0.5)


def test_split_of_the_phantom_facts_9_and_39(study):
    """Fact 39: relative paths only; every row is in one table, with all columns of the master."""
    tables = split(study, *SIZES)
    assert {name: len(rows) for name, rows in tables.items()} == {"train": 12, "val": 6, "test": 6}
    assert len({row.subject for rows in tables.values() for row in rows}) == 24
    columns = dataset.read_csv(study / "data_csvs/master.csv")[0]
    assert all(dataset.read_csv(study / f"split/{name}.csv")[0] == columns for name in tables)
    record = json.loads((study / "split/split.json").read_text())
    assert record["counts"]["train"]["rows"] == 12 and record["audited"] and record["seed"] == 42
    assert record["tables"] == audit.table_hashes([study / f"split/{n}.csv" for n in tables], study / "split")
    for path in (study / "split").iterdir():
        assert str(study) not in path.read_text() and "/tmp" not in path.read_text()
    with pytest.raises(UserError, match="train.csv is there already"):
        split(study)
    again = split(study, *SIZES, "--overwrite", "--no_check_volumes")
    assert again == tables
    two = split(study, "--held_out_fraction", 0.5, "--selection_fraction", 1, "--overwrite", "--no_check_volumes")
    assert {name: len(rows) for name, rows in two.items()} == {"train": 12, "val": 12}  # the old test.csv is gone


def test_planted_copies_stop_the_split_fact_9(study):
    """Fact 9: nothing but the report is written."""
    names = plant(study)
    with pytest.raises(UserError, match="copies of one scan"):
        split(study)
    assert [path.name for path in (study / "split").iterdir()] == ["audit.json"]
    for seed in range(4):  # kept together wherever they fall
        tables = split(study, *SIZES, "--duplicates", "group", "--overwrite", "--seed", seed)
        where = [split for split, rows in tables.items() for row in rows if row.name in names]
        clusters = {row.covariates.get("cluster") for rows in tables.values() for row in rows if row.name in names}
        assert len(where) == 2 and len(set(where)) == 1 and len(clusters) == 1 and None not in clusters
        assert sum(len(rows) for rows in tables.values()) == 25
    tables = [study / f"split/{name}.csv" for name in ("train", "val", "test")]
    run_main(audit, "--csv", *tables, "--report", study / "after.json")  # known by their cluster
    assert json.loads((study / "after.json").read_text())["blocking"] == []


def test_rows_of_one_subject_stay_together():
    rows = published_rows()[:200]
    rows = [Row(row.file, row.name, 0, "HC", f"s{i // 2}") for i, row in enumerate(rows)]
    rest, part = data_split.two_parts(rows, 0.2, 0)
    assert len(part) == 40 and not {row.subject for row in rest} & {row.subject for row in part}


def test_salted_ids_fact_39(study):
    """Fact 39: subject ids can be replaced by hashes, the same for one salt."""
    tables = split(study, *SIZES, "--salt", "secret")
    subjects = {row.name: row.subject for rows in tables.values() for row in rows}
    assert all(len(s) == 12 and int(s, 16) >= 0 for s in subjects.values()) and len(set(subjects.values())) == 24
    assert subjects["mwp1sub-0001_T1w"] == audit.pseudonym("sub-0001", "secret") != audit.pseudonym("sub-0001", "x")
    for name in ("audit.json", "split.json"):
        assert "sub-0" not in (study / "split" / name).read_text()


def test_bad_options(study):
    with pytest.raises(UserError, match="--csv: name the master table"):
        run_main(data_split, "--out", study / "split")
    with pytest.raises(UserError, match="held_out_fraction 1.5"):
        split(study, "--held_out_fraction", 1.5)
    with pytest.raises(UserError, match="cannot be split"):
        split(study, "--held_out_fraction", 0.01, "--no_check_volumes")
    with pytest.raises(UserError, match="replaced by a part of itself"):
        run_main(data_split, "--csv", study / "data_csvs/train.csv", "--root", study, "--overwrite")
    assert not (study / "split/train.csv").exists()


@pytest.mark.parametrize("script", ["audit", "data_split", "make_phantom", "prepare_nii"])
def test_help_without_torch(tmp_path, script):
    """Fact 37: from any folder, quickly, with none of the heavy packages."""
    code = (f"import sys, runpy; sys.argv = ['{script}.py', '--help']\n"
            f"try: runpy.run_path({str(Path(audit.__file__).with_name(script + '.py'))!r}, run_name='__main__')\n"
            "except SystemExit as end: assert end.code == 0\n"
            "assert not {'torch', 'nibabel', 'sklearn', 'pandas'} & set(sys.modules)")  # fmt: skip
    done = run_script(["-c", code], cwd=tmp_path)
    assert done.returncode == 0 and "--seed" in done.stdout and "default:" in done.stdout, done.stderr
