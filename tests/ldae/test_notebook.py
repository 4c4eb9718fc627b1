"""The tutorial runs headless on a quickly trained phantom study, shows what it says, and has no outputs in git."""

import re

import nbformat
import numpy as np
import pytest

from common.cli import UserError
from ldae.notebooks import study
from tests.helpers import ROOT

NOTEBOOK = ROOT / "ldae" / "notebooks" / "tutorial.ipynb"


def test_it_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not c.outputs and c.execution_count is None for c in notebook.cells if c.cell_type == "code")


def test_a_study_without_what_is_needed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LDAE_ROOT", str(tmp_path))
    with pytest.raises(UserError, match="has no probes/diagnosis_AD_vs_CN.npz"):
        study.open_study()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_runs_and_shows_what_it_says(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other on a busy machine are slower than one
    root = study.make(tmp_path / "study", subjects=30, aekl=150, prior=60, representation=60)
    monkeypatch.setenv("LDAE_ROOT", str(root))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    pictures = [out["data"]["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 9 and all(len(picture) > 5000 for picture in pictures)
    said = "".join(out.get("text", "") for out in outputs if out.get("name") == "stdout")

    mse = {name: float(value) for name, value in re.findall(r"^(aekl|encoded|y_only): MSE ([\d.]+)$", said, re.M)}
    assert mse["encoded"] < mse["y_only"]  # z_T tells what y does not
    edits = np.array(re.findall(r"^([-+]\d+): probability of AD ([\d.]+), ventricles ([\d.]+) ml$", said, re.M), float)
    np.testing.assert_array_equal(edits[:, 0], [-4, -2, 0, 2, 4])
    assert (np.diff(edits[:, 1]) > 0).all()  # the code follows; whether the picture does is for reproduce.py
    logits = np.log(edits[:, 1] / (1 - edits[:, 1]))
    np.testing.assert_allclose(np.diff(logits), 2, atol=0.3)
    found = re.findall(r"by (model|copy|voxel blend): MSE in the head ([\d.]+)", said)
    by = {name: float(value) for name, value in found}
    assert len(by) == 3 and min(by.values()) > 0
    assert re.search(r"diagnosis_AD_vs_CN: auc [\d.]+, 95 % interval \[", said) and "age: mae" in said
