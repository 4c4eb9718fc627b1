"""neuroldm3d/dataset.py: tables, cached volumes, who is drawn for training, tests and comparisons."""

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common import nifti
from common.cli import UserError
from neuroldm3d import dataset, preprocess
from neuroldm3d.dataset import Row, Volumes, read_table


def rows_of(counts, clusters=None):
    """Made-up rows of {group: number}, in a shuffled order."""
    groups = [g for g, n in counts.items() for _ in range(n)]
    order = np.random.default_rng(0).permutation(len(groups))
    return [
        Row(Path(f"v{i}.nii"), f"v{i}", dataset.LABEL_OF[groups[j]], groups[j], f"s{i}") for i, j in enumerate(order)
    ]


def write(path, rows, columns):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *rows])


@pytest.fixture
def table(tmp_path):
    """Four empty files and a function that writes a table of (file, label, subject, age)."""
    for name in "abcd":
        (tmp_path / f"{name}.nii.gz").touch()
    path = tmp_path / "table.csv"

    def make(*rows, columns=("file", "HC_vs_LTLE_vs_RTLE_string", "sbj_nme", "age")):
        write(path, rows, columns)
        return path

    return make


def test_rows_of_the_phantom(cohort):
    rows = read_table(cohort / "data_csvs/train.csv")
    truth = {row["name"]: row for row in csv.DictReader(open(cohort / "truth.csv"))}
    assert len(rows) == 12 and Counter(row.label for row in rows) == {0: 5, 1: 7}
    for row in rows:
        known = truth[row.name]
        assert row.file.name == f"{row.name}.nii.gz" and row.file.is_file()
        assert row.group == known["group"] and row.label == int(row.group != "HC")
        assert row.name == f"mwp1{row.subject}_T1w" and dataset.cluster_of(row) == row.subject
        assert row.covariates == {"site": known["site"], "age": float(known["age"]), "sex": known["sex"]}


def test_paths_blanks_and_defaults(table, tmp_path, capsys):
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "e.nii").touch()
    path = table(("a.nii.gz", "HC", "", ""), (str(other / "e.nii"), "left", "s2", "40"), ("b.nii.gz", " ", "s3", ""))
    first, second = read_table(path)
    assert "1 of 3 rows" in capsys.readouterr().err
    assert first.subject == first.name == "a" and first.covariates == {} and first.file == tmp_path / "a.nii.gz"
    assert second.name == "e" and second.subject == "s2" and second.covariates == {"age": 40.0}
    path = table(("e.nii", "right", "", ""))
    assert read_table(path, root=other)[0].file == other / "e.nii"
    path.write_text("\ufeff" + path.read_text())  # as Excel writes it
    assert read_table(path, root=other)[0].group == "right"


def test_unknown_labels_are_refused_fact_10(table):
    """Fact 10: a string that is not known is an error, not TLE."""
    with pytest.raises(UserError, match="b has label 'Left'.*known are HC, left, right"):
        read_table(table(("a.nii.gz", "HC", "", ""), ("b.nii.gz", "Left", "", "")))


@pytest.mark.parametrize(("rows", "columns", "message"), [
    ([("a.nii.gz", "HC")], ("path", "HC_vs_LTLE_vs_RTLE_string"), "no column file"),
    ([("a.nii.gz", "HC")], ("file", "label"), "no column HC_vs_LTLE_vs_RTLE_string"),
    ([("z.nii.gz", "HC"), ("a.nii.gz", "HC")], None, "1 of 2 files .* do not exist, such as .*z.nii.gz"),
    ([("a.nii.gz", "HC"), ("./a.nii.gz", "left")], None, "1 names belong to several rows, such as a"),
    ([("a.nii.gz", "")], None, "no row has a label"),
    ([("", "HC")], None, "names no file"),
    ([], None, "no rows"),
    ([("a.nii.gz",)], None, "row 2 has not as many cells"),
    ([("a.nii.gz", "HC", "s", "old")], ("file", "HC_vs_LTLE_vs_RTLE_string", "sbj_nme", "age"), "age 'old'"),
])  # fmt: skip
def test_bad_tables(table, rows, columns, message):
    path = table(*rows, columns=columns or ("file", "HC_vs_LTLE_vs_RTLE_string"))
    with pytest.raises(UserError, match=message):
        read_table(path)


def test_missing_table(tmp_path):
    with pytest.raises(UserError, match="no table .*make_phantom"):
        read_table(tmp_path / "none.csv")


# ---- volumes


def test_volumes_are_prepared_and_cached(cohort, prep, tmp_path):
    row = read_table(cohort / "data_csvs/val.csv")[0]
    expected = preprocess.prepare(nifti.load(row.file), prep)
    volumes = Volumes(prep, tmp_path / "cache")
    for _ in range(2):
        loaded = volumes.load(row)
        np.testing.assert_array_equal(loaded, expected.data)
    assert volumes.tensor(row).shape == (1, 32, 40, 32) and volumes.tensor(row).dtype == torch.float32
    np.testing.assert_allclose(volumes.affine(row), expected.affine, atol=1e-9)
    other = Volumes(replace(prep, norm="zscore"), tmp_path / "cache")  # same cache, other recipe
    assert abs(other.load(row).mean()) < 0.1 < abs(loaded.mean())
    assert 0.5 < np.std([volumes.load(r) for r in read_table(cohort / "data_csvs/train.csv")]) < 1.5


@pytest.fixture
def synthetic(tmp_path, cohort, prep):
    """Prepared volumes of the phantom, saved as save_synth.py does: HC_00000, HC_00001, TLE_00000."""
    folder, volumes = tmp_path / "synthetic_data", Volumes(prep, None)
    real = read_table(cohort / "data_csvs/val.csv")
    for name, row in zip(("HC/HC_00000", "HC/HC_00001", "TLE/TLE_00000"), real, strict=False):
        native = preprocess.denormalise(volumes.load(row), prep)
        nifti.save(folder / f"{name}.nii.gz", native, volumes.affine(row))
    (folder / "synthetic.json").write_text(json.dumps({"preparation": prep.to_dict()}))
    return folder


def test_synthetic_volumes_come_back_in_normalised_units(synthetic, cohort, prep):
    rows = dataset.synthetic_rows(synthetic)
    assert [(r.name, r.label, r.group) for r in rows] == [("HC_00000", 0, "HC"), ("HC_00001", 0, "HC"),
                                                          ("TLE_00000", 1, "TLE")]  # fmt: skip
    assert [r.name for r in dataset.synthetic_rows(synthetic, label=1)] == ["TLE_00000"]
    volumes, real = Volumes(prep, None), read_table(cohort / "data_csvs/val.csv")
    np.testing.assert_allclose(volumes.load(rows[2]), volumes.load(real[2]), atol=1e-5)
    np.testing.assert_allclose(volumes.affine(rows[2]), volumes.affine(real[2]), atol=1e-4)


def test_synthetic_volumes_of_another_preparation_are_refused(synthetic, prep):
    row = dataset.synthetic_rows(synthetic)[0]
    with pytest.raises(UserError, match="was made with .*native"):
        Volumes(replace(prep, norm="zscore"), None).load(row)
    nifti.save(row.file, np.ones((16, 16, 16)), np.eye(4))
    with pytest.raises(UserError, match="has shape"):
        Volumes(prep, None).load(row)
    (synthetic / "synthetic.json").write_text("{}")
    with pytest.raises(UserError, match="does not say how its volumes are scaled"):
        Volumes(prep, None).load(row)
    with pytest.raises(UserError, match="no synthetic volumes"):
        dataset.synthetic_rows(synthetic / "HC")


# ---- augmentation


def test_flips_fact_4():
    """Fact 4: identity, axis 0, axis 2, both, equally often where asked for; by default axis 2 is never flipped."""
    x = np.arange(24.0).reshape(1, 2, 3, 4)
    variants = {tuple(np.flip(x, axes).ravel()): axes for axes in ((), (-3,), (-1,), (-3, -1))}
    rng = np.random.default_rng(0)
    both = Counter(variants[tuple(dataset.augment(x, rng, up_down=True).ravel())] for _ in range(400))
    assert set(both) == set(variants.values()) and min(both.values()) > 60
    default = Counter(variants[tuple(dataset.augment(x, rng).ravel())] for _ in range(400))
    assert set(default) == {(), (-3,)} and min(default.values()) > 150
    tensor = torch.from_numpy(x)
    assert torch.equal(dataset.flip(tensor, True, True), torch.from_numpy(np.flip(x, (-3, -1)).copy()))


# ---- who is drawn

PUBLISHED = {"HC": 1153, "left": 910, "right": 660}  # of the training table


def test_subsample_fact_7():
    """Fact 7: 500 -> 212/167/121; 1000 -> 999 rows as the original counts, 1000 otherwise."""
    rows = rows_of(PUBLISHED)

    def counts(part):
        assert len({row.name for row in part}) == len(part)
        return [sum(row.group == g for row in part) for g in PUBLISHED]

    for exact in (True, False):
        assert counts(dataset.subsample(rows, 500, 1000, exact=exact)) == [212, 167, 121]
        assert counts(dataset.subsample(rows, 2723, 1000, exact=exact)) == list(PUBLISHED.values())
    assert counts(dataset.subsample(rows, 1000, 1000, exact=False)) == [423, 334, 242]
    assert counts(dataset.subsample(rows, 1000, 1000)) == [424, 334, 242]
    once, again, other = (dataset.subsample(rows, 100, seed) for seed in (1, 1, 2))
    assert once == again != other
    for n in (0, 2724):
        with pytest.raises(UserError, match="ask for 1 to 2723"):
            dataset.subsample(rows, n, 0)


def test_synthetic_counts_fact_7():
    """Fact 7: 125 -> 52 + 72 as the original counts; otherwise the parts add up to what was asked for."""
    asked = {125: (52, 72), 250: (105, 144), 680: (287, 392), 1000: (423, 577), 2723: (1151, 1571), 5446: (2303, 3142)}
    for n, counts in asked.items():
        assert dataset.synthetic_counts(n, 0.423, exact=False) == counts
        assert sum(dataset.synthetic_counts(n, 0.423)) == n
    assert dataset.synthetic_counts(125, 0.423) == (53, 72)


def test_balanced_batches_fact_8():
    """Fact 8: every batch half and half; 2723 rows in batches of 128 give 24; the larger class is visited once."""
    labels = [row.label for row in rows_of(PUBLISHED)]
    batches = dataset.balanced_batches(labels, 128, epoch=0, seed=3)
    assert len(batches) == 24 and all(len(b) == 128 and sum(labels[i] for i in b) == 64 for b in batches)
    tle = [i for b in batches for i in b if labels[i] == 1]
    assert len(tle) == len(set(tle)) == 1536
    hc = {i for b in batches for i in b if labels[i] == 0}
    assert len(hc) < 1153  # with replacement
    assert batches == dataset.balanced_batches(labels, 128, 0, 3) != dataset.balanced_batches(labels, 128, 1, 3)
    assert batches != dataset.balanced_batches(labels, 128, 0, 4)
    assert len({labels[b[0]] for b in batches}) == 2  # the halves are mixed within a batch


def test_balanced_batches_that_cannot_be():
    with pytest.raises(UserError, match="use a batch size of at most 6"):
        dataset.balanced_batches([0, 0, 1, 1, 1], 8, 0, 0)
    with pytest.raises(UserError, match="even number"):
        dataset.balanced_batches([0, 1], 3, 0, 0)
    with pytest.raises(UserError, match="one class"):
        dataset.balanced_batches([1, 1, 1], 2, 0, 0)


def test_selection_is_matched_and_repeatable_fact_30():
    """Fact 30: the same files on two runs, whatever the order they are listed in; classes as asked, no repeats."""
    rows = rows_of({"HC": 30, "left": 20, "right": 20})
    chosen = dataset.select_matched(rows, {0: 12, 1: 9}, seed=5)
    assert Counter(row.label for row in chosen) == {0: 12, 1: 9} and len({row.name for row in chosen}) == 21
    assert chosen == dataset.select_matched(rows[::-1], {0: 12, 1: 9}, seed=5)
    assert chosen != dataset.select_matched(rows, {0: 12, 1: 9}, seed=6)
    assert [row.name for row in chosen] == [row.name for row in sorted(chosen, key=lambda r: (r.label, r.name))]
    with pytest.raises(UserError, match="31 HC volumes asked for, there are 30"):
        dataset.select_matched(rows, {0: 31}, seed=0)


def test_folds_partition_the_pool_fact_33():
    """Fact 33: each row is in one fold, no subject or duplicate group in two, groups in equal shares."""
    rows = rows_of({"HC": 40, "left": 30, "right": 20})
    rows[1] = replace(rows[1], subject=rows[0].subject)  # a second scan
    twins = [i for i, row in enumerate(rows) if row.group == "left"][:3]
    for i in twins:
        rows[i] = replace(rows[i], covariates={"cluster": "twins"})
    parts = dataset.folds(rows, 5, seed=7)
    assert sorted(i for part in parts for i in part) == list(range(90))
    fold = {i: k for k, part in enumerate(parts) for i in part}
    assert fold[0] == fold[1] and len({fold[i] for i in twins}) == 1
    for part in parts:
        counts = Counter(rows[i].group for i in part)
        assert abs(counts["HC"] - 8) <= 2 and abs(counts["left"] - 6) <= 3 and abs(counts["right"] - 4) <= 1
    assert parts == dataset.folds(rows, 5, seed=7) != dataset.folds(rows, 5, seed=8)
    for k in (1, 21):
        with pytest.raises(UserError, match="folds"):
            dataset.folds(rows, k, seed=0)


def test_apportion():
    assert dataset.apportion({"a": 1.5, "b": 1.5, "c": 2.0}, 5) == {"a": 2, "b": 1, "c": 2}
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(1, 50))
        shares = dict(enumerate(rng.dirichlet(np.ones(4)) * n))
        whole = dataset.apportion(shares, n)
        assert sum(whole.values()) == n and all(abs(whole[k] - shares[k]) < 1 for k in shares)
