"""train_manipulation.py as a user runs it, on synthetic codes of known effect."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.cli import UserError
from ldae import codes
from ldae.manipulation import Direction
from ldae.scripts import train_manipulation
from tests.helpers import run_main, run_script
from tests.ldae.test_probes import make_codes

QUICK = "--repeats 1 --permutations 2 --bootstrap 50 --strengths 0.1 --num_workers 0".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study of codes alone with one control. Not to be changed."""
    root = tmp_path_factory.mktemp("codes_study")
    found = make_codes(80, sessions=2, dim=6, classes=("AD", "CN", "MCI"))
    codes.save(root / "codes", found)
    noise = np.random.default_rng(9).normal(size=found.values.shape).astype(np.float32)
    record = found.record | {"maker": {"name": "untrained", "encoder": "untrained"}}
    codes.save(root / "codes" / "controls" / "untrained", replace(found, values=noise, record=record))
    return root


@pytest.fixture
def study(made, tmp_path):
    return shutil.copytree(made, tmp_path / "study")


def train(root, *args):
    run_main(train_manipulation, "--root", root, *QUICK, *args)


def record_of(root, name):
    return json.loads((root / "probes" / f"{name}.json").read_text())


def test_three_targets(study, capsys):
    """Facts 30, 31 and 38: every number that is asked for is printed and written, the directions load."""
    train(study, "--targets", "diagnosis", "age", "sex")
    out = capsys.readouterr().out
    for word in ("auc", "balanced_accuracy", "recall_AD", "recall_CN", "Prevalence: AD", "Positive class: AD", "rmse",
                 "predicting the mean", "untrained", "Subjects permuted", "test split"):  # fmt: skip
        assert word in out, word
    record = record_of(study, "diagnosis_AD_vs_CN")
    metrics, control = record["cross_validation"]["metrics"], record["controls"]["untrained"]
    assert metrics["auc"]["ci95"][0] <= metrics["auc"]["value"] <= metrics["auc"]["ci95"][1]
    assert metrics["auc"]["value"] > 0.7 and control["difference"]["value"] > 0
    assert record["codes"]["hash"] == codes.load(study / "codes").hash and record["codes"]["split"] == "s" * 16
    age = record_of(study, "age")
    assert age["cross_validation"]["metrics"]["mae"]["value"] < age["mean_predictor"]["metrics"]["mae"]["value"]
    assert record_of(study, "sex_F_vs_M")["positive"] == "F"
    for name in ("diagnosis_AD_vs_CN", "age", "sex_F_vs_M"):
        for path in (name, f"{name}_means"):
            direction = Direction.load(study / "probes" / path)
            assert direction.codes == codes.load(study / "codes").hash and direction.name == path


def test_flags_of_the_original_work(study, tmp_path):
    """Fact 38: age, classes by rank, baseline sessions, suffix, width, epochs, and its embedding files."""
    train(study, "--train_on_age", "--suffix", "a", "--embeddings_dim", 6, "--epochs", 500)
    age = record_of(study, "age_a")
    assert age["kind"] == "regression" and age["settings"]["iterations"] == 500
    train(study, "--target_classes", "1", "2", "--train_on_baseline_sessions")
    record = record_of(study, "diagnosis_CN_vs_MCI")
    data = record["data"]["cross_validation"]
    assert record["positive"] == "CN" and data["scans"] == data["subjects"]
    found = codes.load(study / "codes")
    for split in ("train", "test"):
        part = found.select(found.column("split") == split)
        content = {"embeddings": torch.from_numpy(part.values), "subject_id": [r.subject for r in part.rows],
                   "labels": torch.tensor([float("AD CN MCI".split().index(r.diagnosis)) for r in part.rows]),
                   "age": torch.tensor([r.age for r in part.rows]),
                   "session_number": [r.session for r in part.rows]}  # fmt: skip
        torch.save(content, tmp_path / f"{split}.pt")
    train(study, "--train_path", tmp_path / "train.pt", "--test_path", tmp_path / "test.pt", "--suffix", "original")
    assert record_of(study, "diagnosis_AD_vs_CN_original")["codes"]["maker"]["name"] == "imported"


def test_more_options(study):
    train(study, "--target_classes", "AD", "CN", "MCI", "--class_weight", "balanced")
    assert record_of(study, "diagnosis_AD_vs_CN_vs_MCI")["kind"] == "multiclass"
    assert (study / "probes" / "diagnosis_AD_vs_CN_vs_MCI_MCI_means.npz").is_file()
    train(study, "--positive", "CN", "--remove", "age", "sex", "--controls", "none")
    record = record_of(study, "diagnosis_CN_vs_AD_without_age_sex")
    assert record["positive"] == "CN" and list(record["controls"]) == ["nuisance alone"]
    train(study, "--targets", "age", "--diagnoses", "CN", "--cv_splits", "train", "val", "test")
    age = record_of(study, "age")
    assert age["test"] is None and age["data"]["cross_validation"]["subjects"] == 27  # all the healthy


def test_directions_that_are_there_are_judged(study):
    train(study, "--targets", "diagnosis", "age")
    train(study, "--targets", "diagnosis", "age", "--skip_training")
    for name in ("diagnosis_AD_vs_CN", "age"):
        judged, trained = record_of(study, f"{name}_test")["metrics"], record_of(study, name)["test"]["metrics"]
        assert judged.keys() == trained.keys()
        for key in judged:
            assert np.isclose(judged[key]["value"], trained[key]["value"], atol=1e-4)


def test_probe_of_the_original(study, tmp_path):
    torch.save({"weight": torch.tensor([[-1.0, 0, 0, 0, 0, 0]]), "bias": torch.zeros(1)}, tmp_path / "w.ckpt")
    torch.save(torch.zeros(6), tmp_path / "mean.pt")
    torch.save(torch.ones(6), tmp_path / "std.pt")
    train(study, "--import_probe", tmp_path / "w.ckpt", tmp_path / "mean.pt", tmp_path / "std.pt")
    assert Direction.load(study / "probes" / "diagnosis_CN_vs_AD").positive == "CN"
    train(study, "--skip_training", "--positive", "CN")
    assert record_of(study, "diagnosis_CN_vs_AD_test")["metrics"]["auc"]["value"] > 0.6


def test_errors_come_before_anything_is_fitted(study, tmp_path):
    train(study)
    before = {p.name: p.read_bytes() for p in (study / "probes").iterdir()}
    with pytest.raises(UserError, match="AD_vs_CN.json is there already; name another --output_dir or --suffix"):
        train(study)
    with pytest.raises(UserError, match="the codes have 6 numbers, not --embeddings_dim 768"):
        train(study, "--embeddings_dim", 768, "--overwrite")
    with pytest.raises(UserError, match="no codes in"):
        train(study, "--codes", tmp_path / "none")
    with pytest.raises(UserError, match="no scan has diagnosis FTD"):
        train(study, "--target_classes", "AD", "FTD")
    with pytest.raises(UserError, match="--positive XX: no scan has this diagnosis"):
        train(study, "--positive", "XX")
    with pytest.raises(UserError, match="--seed -1: seeds are 0 or more"):
        train_manipulation.Options(seed=-1)
    assert {p.name: p.read_bytes() for p in (study / "probes").iterdir()} == before
    train(study, "--overwrite")
    assert {p.name for p in (study / "probes").iterdir()} == set(before)


def test_as_a_command(study, tmp_path):
    """Fact 38: --help, a real run from another folder, and one line for a mistake."""
    script = "ldae/scripts/train_manipulation.py"
    done = run_script([script, "--help"], cwd=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0 and "--train_on_age" in done.stdout and "--epochs" in done.stdout
    assert not re.search(r"\| +torch$", done.stderr, re.M)
    done = run_script([script, "--root", study, *QUICK, "--targets", "sex"], cwd=tmp_path)
    assert done.returncode == 0 and (study / "probes" / "sex_F_vs_M.npz").is_file(), done.stderr
    done = run_script([script, "--root", study, "--remove", "age", "--train_on_age"], cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "error: --remove age: what is predicted cannot be removed\n"
