"""The notebook runs headless on a quickly made phantom study, shows what it says, and has no outputs in git."""

import base64
import importlib
import io
import os
import re

import nbformat
import pytest

from common.cli import UserError
from mgdcr.notebooks import study
from tests.helpers import ROOT, run_main
from tests.mgdcr import stages

NOTEBOOK = ROOT / "mgdcr" / "notebooks" / "visualize.ipynb"
NETWORK = " ".join(
    [*stages.TINY["autoenc"], *"--batch_size 4 --val_every_samples 200 --sample_every_samples 0".split()]
)
TINY = {"subjects": 3, "frames": 4, "samples": 200, "network": NETWORK, "iterations": 2, "steps": 3}


def in_this_process(script, *args):
    """A script as `study.run` starts it, without the seconds that a new process takes to import torch."""
    more = ("--device", "cpu") if script not in ("make_phantom.py", "lmdb_writer.py") else ()
    module = f"mgdcr.{script.removesuffix('.py')}".replace("/", ".")
    run_main(importlib.import_module(module), *args, *more)


def test_it_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not c.outputs and c.execution_count is None for c in notebook.cells if c.cell_type == "code")


def test_a_study_without_what_is_needed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MGDCR_ROOT", str(tmp_path))
    with pytest.raises(UserError, match="has no trained prior.*run the commands"):
        study.open_study()
    assert not list(tmp_path.iterdir())


def test_a_script_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="lmdb_writer.py: error: .*nowhere"):
        study.run("lmdb_writer.py", "--input", tmp_path / "nowhere", "--root", tmp_path / "out")


@pytest.mark.slow
def test_it_runs_and_shows_what_it_says(tmp_path, monkeypatch):
    from nbclient import NotebookClient
    from PIL import Image

    monkeypatch.setattr(study, "run", in_this_process)
    root = study.make(tmp_path / "study", **TINY)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other on a busy machine are slower than one
    monkeypatch.setenv("MGDCR_ROOT", str(root))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    real = (study.Path(os.environ.get("REAL_DATA_DIR", "")) / "cardiac").is_dir()
    pictures = [out["data"]["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 8 + 2 * real and all(len(picture) > 5000 for picture in pictures)
    animations = [out["data"]["image/gif"] for out in outputs if "image/gif" in out.get("data", {})]
    beats = [Image.open(io.BytesIO(base64.b64decode(animation))) for animation in animations]
    assert [beat.n_frames for beat in beats] == [4] + [13] * real
    said = "".join(out.get("text", "") for out in outputs if out.get("name") == "stdout")

    # registration finds what was moved; the views add decibels; volumes between the slices are not lost
    found = re.findall(r"^(\dch): NCC along the crossing lines ([\d.]+) before, ([\d.]+) after$", said, re.M)
    assert len(found) == 3 and all(float(after) > 0.99 for _, _, after in found)
    assert min(float(before) for _, before, _ in found) < 0.9
    for phase in ("ED", "ES"):
        line = re.search(rf"^{phase}: (.*)$", said, re.M)[1]
        scores = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+) dB", line)}
        assert min(scores["ours"], scores["lax_residual"]) > max(scores["linear"], scores["cubic"]) + 2
    volumes = {name: [float(v) for v in row] for name, *row in
               re.findall(r"^(\w+): EDV ([\d.]+) ml, ESV ([\d.]+) ml, EF ([\d.]+)$", said, re.M)}  # fmt: skip
    assert abs(volumes["ours"][0] / volumes["truth"][0] - 1) < 0.04 < 1 - volumes["linear"][0] / volumes["truth"][0]
    assert ("NCC along the crossing lines" in said.split("cine.gif")[1]) == real
