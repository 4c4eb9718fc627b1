"""The tutorial runs headless on a quickly trained phantom study, and shows what it says."""

import re

import numpy as np
import pytest

from common.cli import UserError
from ldae.notebooks import study
from tests import notebooks
from tests.helpers import ROOT

NOTEBOOK = ROOT / "ldae" / "notebooks" / "tutorial.ipynb"


def test_a_study_without_what_is_needed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LDAE_ROOT", str(tmp_path))
    with pytest.raises(UserError, match="has no probes/diagnosis_AD_vs_CN.npz"):
        study.open_study()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_runs_and_shows_what_it_says(tmp_path, monkeypatch):
    root = study.make(tmp_path / "study", subjects=30, aekl=150, prior=60, representation=60)
    monkeypatch.setenv("LDAE_ROOT", str(root))
    shown = notebooks.execute(NOTEBOOK, tmp_path, monkeypatch)
    assert len(shown.pictures) == 9

    mse = {name: float(value) for name, value in re.findall(r"^(aekl|encoded|y_only): MSE ([\d.]+)$", shown.text, re.M)}
    assert mse["encoded"] < mse["y_only"]  # z_T tells what y does not
    edits = re.findall(r"^([-+]\d+): probability of AD ([\d.]+), ventricles ([\d.]+) ml$", shown.text, re.M)
    edits = np.array(edits, float)
    np.testing.assert_array_equal(edits[:, 0], [-4, -2, 0, 2, 4])
    assert (np.diff(edits[:, 1]) > 0).all()  # the code follows; whether the picture does is for reproduce.py
    logits = np.log(edits[:, 1] / (1 - edits[:, 1]))
    np.testing.assert_allclose(np.diff(logits), 2, atol=0.3)
    found = re.findall(r"by (model|copy|voxel blend): MSE in the head ([\d.]+)", shown.text)
    by = {name: float(value) for name, value in found}
    assert len(by) == 3 and min(by.values()) > 0
    assert re.search(r"diagnosis_AD_vs_CN: auc [\d.]+, 95 % interval \[", shown.text) and "age: mae" in shown.text
