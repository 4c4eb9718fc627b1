"""The notebook runs from a fresh clone, headless, and is committed without outputs."""

import re

import nbformat
import numpy as np
import pytest

from tests.helpers import ROOT

NOTEBOOK = ROOT / "il_cldm" / "notebooks" / "visualize.ipynb"


def test_it_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not c.outputs and c.execution_count is None for c in notebook.cells if c.cell_type == "code")


@pytest.mark.slow
def test_it_runs_and_shows_what_it_says(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.delenv("IL_CLDM_ROOT", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other on a busy machine are slower than one
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) >= 9 and all(len(out["data"]["image/png"]) > 5000 for out in pictures)
    said = "".join(out.get("text", "") for out in outputs)
    suvr = {int(c): np.array(v.split(","), float) for c, v in re.findall(r"class (\d) \[([^]]*)\]", said)}
    assert set(suvr) == {0, 3}
    np.testing.assert_allclose(suvr[0][0], suvr[3][0], atol=1e-3)  # scale 0: the label has no say
    gap = suvr[3] - suvr[0]
    assert gap[1] > 0.01 and gap[2] > gap[1]  # the sick class takes up more, and more so the more it is guided
