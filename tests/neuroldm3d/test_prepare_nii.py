"""prepare_nii.py: the blinded reader-study set holds what was asked for, once, on its true grid, and nothing tells."""

import csv
import json
import shutil
from collections import Counter

import nibabel as nib
import numpy as np
import pytest

from common import nifti
from common.cli import UserError
from neuroldm3d import prepare_nii
from neuroldm3d.dataset import Volumes, read_table
from tests.helpers import run_main


@pytest.fixture
def ready(study, prep):
    """The study with 4 synthetic volumes of each class (made of the training volumes, with other values)."""
    volumes = Volumes(prep, None)
    for label, name in enumerate(("HC", "TLE")):
        rows = [row for row in read_table(study / "data_csvs/train.csv") if row.label == label][:4]
        for i, row in enumerate(rows):
            data = 0.9 * volumes.load(row) * prep.norm_scale - 0.01
            nifti.save(study / f"synthetic_data/{name}/{name}_{i:05d}.nii.gz", data, volumes.affine(row))
    (study / "synthetic_data/synthetic.json").write_text(json.dumps({"preparation": prep.to_dict()}))
    return study


def key_of(study, name="qualitative_results.csv"):
    with open(study / name, newline="") as file:
        return list(csv.DictReader(file))


def test_blinded_set(ready, prep):
    run_main(prepare_nii, "--root", ready, "--per_class", 2)
    key = key_of(ready)
    assert list(key[0]) == ["ID", "filepath", "label", "Real/synthetic"]
    assert [row["ID"] for row in key] == [str(i) for i in range(1, 9)]
    assert Counter((row["label"], row["Real/synthetic"]) for row in key) == {
        (label, kind): 2 for label in ("HC", "TLE") for kind in ("Real", "synthetic")
    }
    assert len({row["filepath"] for row in key}) == 8  # no repeats
    assert sorted(path.name for path in (ready / "nii_test").iterdir()) == [f"{i}.nii" for i in range(1, 9)]
    assert [row["Real/synthetic"] for row in key] != sorted(row["Real/synthetic"] for row in key)
    assert len({(ready / "nii_test" / f"{i}.nii").stat().st_size for i in range(1, 9)}) == 1  # sizes do not tell

    held_out = {row.name: row for row in read_table(ready / "data_csvs/test.csv")}
    volumes = Volumes(prep, None)
    for row in key:
        path = ready / "nii_test" / f"{row['ID']}.nii"
        shown = nifti.load(path)
        source = nifti.load(ready / row["filepath"])
        assert shown.data.min() == 0 and shown.shape == (32, 40, 32) and not row["filepath"].startswith("/")
        if row["Real/synthetic"] == "synthetic":
            np.testing.assert_allclose(shown.data, source.data.clip(min=0), atol=1e-6)
            np.testing.assert_allclose(shown.affine, source.affine, atol=1e-4)
            continue
        real = held_out[source.path.name.split(".")[0]]
        assert real.label == ("HC", "TLE").index(row["label"])
        raw = nib.load(path)  # as stored: LAS
        np.testing.assert_allclose(raw.affine, volumes.affine(real), atol=1e-4)
        np.testing.assert_allclose(raw.get_fdata(), volumes.load(real) * prep.norm_scale, atol=1e-6)


def test_seed(ready):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_main(prepare_nii, "--root", ready, "--per_class", 2, "--seed", seed, "--out", ready / name,
                 "--key", ready / f"{name}.csv")  # fmt: skip
    assert key_of(ready, "a.csv") == key_of(ready, "b.csv") != key_of(ready, "c.csv")
    for i in range(1, 9):
        assert (ready / f"a/{i}.nii").read_bytes() == (ready / f"b/{i}.nii").read_bytes()


def test_refusals(ready):
    with pytest.raises(UserError, match="volumes asked for, there are"):
        run_main(prepare_nii, "--root", ready, "--per_class", 12)
    with pytest.raises(UserError, match="lies among the volumes"):
        run_main(prepare_nii, "--root", ready, "--per_class", 1, "--key", ready / "nii_test/key.csv")
    with pytest.raises(UserError, match="is in .*train.csv too"):
        run_main(prepare_nii, "--root", ready, "--per_class", 1, "--csv", ready / "data_csvs/train.csv")
    assert not (ready / "nii_test").exists() and not (ready / "qualitative_results.csv").exists()
    run_main(prepare_nii, "--root", ready, "--per_class", 1)
    with pytest.raises(UserError, match="nii_test is there already"):
        run_main(prepare_nii, "--root", ready, "--per_class", 1)
    shutil.rmtree(ready / "nii_test")
    with pytest.raises(UserError, match="qualitative_results.csv is there already"):
        run_main(prepare_nii, "--root", ready, "--per_class", 1)
    (ready / "synthetic_data/synthetic.json").unlink()
    with pytest.raises(UserError, match="has no synthetic.json"):
        run_main(prepare_nii, "--root", ready, "--per_class", 1, "--key", ready / "k.csv")
