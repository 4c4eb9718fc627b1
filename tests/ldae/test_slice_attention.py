"""slice_attention.py as a user runs it."""

import csv
import json
import re
import shutil

import numpy as np
import pytest

from common.cli import UserError
from ldae import data_split, dataset
from ldae.scripts import slice_attention
from tests.helpers import run_main, run_script
from tests.ldae.conftest import SHAPE, SPACING_MM
from tests.ldae.stages import best, untrained_ldae

COMMON = "--device cpu --num_workers 0".split()


@pytest.fixture(scope="module")
def modelled(cohort, tmp_path_factory):
    root = shutil.copytree(cohort, tmp_path_factory.mktemp("attention") / "study")
    run_main(data_split, "--root", root)
    untrained_ldae(best(root))
    return root


def export(root, *args):
    run_main(slice_attention, "--root", root, *COMMON, *args)


def read(folder):
    with open(folder / "slice_attention.csv") as file:
        return list(csv.DictReader(file))


def test_weights_of_every_slice_of_every_scan(modelled, tmp_path, capsys):
    export(modelled, "--output_dir", tmp_path)
    entries, ldae = read(tmp_path), untrained_ldae()
    rows = dataset.read_table(modelled / "data" / "dataset.csv")
    assert len(entries) == len(rows) * SHAPE[2] == 48 * 16
    volumes = dataset.Volumes(ldae.preparation, None)
    for row in rows[:3]:
        own = [e for e in entries if e["scan"] == row.scan]
        weights = np.array([float(e["weight"]) for e in own])
        assert [int(e["slice"]) for e in own] == list(range(16)) and np.isclose(weights.sum(), 1, atol=1e-4)
        assert np.allclose(weights, ldae.attention(volumes.tensor(row)[None])[0], atol=1e-5)
        positions = np.array([float(e["position_mm"]) for e in own])
        assert np.allclose(np.diff(positions), SPACING_MM)
        assert np.isclose(positions[0], volumes.affine(row)[2, 3], atol=0.01)  # axial: world z of the lowest slice
        assert own[0]["diagnosis"] == row.diagnosis and own[0]["subject"] == row.subject
    record = json.loads((tmp_path / "slice_attention.json").read_text())
    assert set(record["by_diagnosis"]) == {"AD", "CN", "MCI"} and record["plane"] == "axial"
    assert all(1 <= entry["effective_slices"] <= 16 for entry in record["by_diagnosis"].values())
    names = {p.name for p in tmp_path.iterdir()}
    assert {"slice_attention.png", "single_scans.png"} <= names and sum(n.startswith("scan_") for n in names) == 4
    assert "effective slices of 16" in "".join(capsys.readouterr())
    with pytest.raises(UserError, match="slice_attention.json is there already; name another --output_dir"):
        export(modelled, "--output_dir", tmp_path)
    export(modelled, "--output_dir", tmp_path, "--overwrite", "--part", "test", "--n_single", 0)
    split = data_split.read(modelled / "split.json")
    assert {e["subject"] for e in read(tmp_path)} == set(split.subjects["test"])


def test_a_part_of_another_split_is_refused(modelled, tmp_path):
    """Its test subjects may have been trained on."""
    path = untrained_ldae(tmp_path / "other.ckpt", split_hash="f" * 16)
    with pytest.raises(UserError, match="the model was trained with ffffffffffffffff; name that split"):
        export(modelled, "--output_dir", tmp_path / "out", "--model_path", path, "--part", "test")
    assert not (tmp_path / "out").exists()


def test_positions_follow_the_plane():
    affine = np.array([[2.0, 0, 0, -10], [0, 3, 0, -20], [0, 0, 4, -30], [0, 0, 0, 1]])
    for plane, step, first, n in (("sagittal", 2, -10, 5), ("coronal", 3, -20, 6), ("axial", 4, -30, 7)):
        found = slice_attention.positions(affine, (5, 6, 7), plane)
        assert len(found) == n and np.allclose(found, first + step * np.arange(n))


def test_effective_slices():
    row = dataset.Row(0, "s", 0, None, "AD", None, None, "s_M000")
    even, one = np.full(10, 0.1), np.eye(10)[3]
    for weights, number, centre in ((even, 10, 45.0), (one, 1, 30.0)):
        found = slice_attention.summary([row], {"s_M000": (weights, 10.0 * np.arange(10))})["AD"]
        assert np.isclose(found["effective_slices"], number) and np.isclose(found["mean_position_mm"], centre)


def test_single_scans_take_the_diagnoses_in_turn():
    rows = [dataset.Row(i, f"{d}{i // 2}", i % 2, None, d, None, None, f"{d}{i}")
            for d in ("AD", "CN") for i in range(4)]  # fmt: skip
    chosen = slice_attention.singles(rows, 6)
    assert [row.diagnosis for row in chosen] == ["AD", "CN"] * 3
    assert len({row.subject for row in chosen[:4]}) == 4 and len(slice_attention.singles(rows, 99)) == 8


def test_as_a_command(modelled, tmp_path):
    """Fact 38: --help without torch, a real run, one line for a mistake."""
    script = "ldae/scripts/slice_attention.py"
    done = run_script([script, "--help"], cwd=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0 and "--n_single" in done.stdout
    assert not re.search(r"\| +torch$", done.stderr, re.M)
    args = [script, "--root", modelled, "--output_dir", tmp_path / "a", "--max_scans", 4, "--n_single", 1, *COMMON]
    done = run_script(args, cwd=tmp_path)
    assert done.returncode == 0 and len(read(tmp_path / "a")) == 4 * 16, done.stderr
    done = run_script([script, "--root", tmp_path, *COMMON], cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: no representation at")
