"""The notebook runs headless on a quickly made phantom study, and shows what it says."""

import base64
import importlib
import io
import os
import re

import pytest

from common.cli import UserError
from mgdcr.notebooks import study
from tests import notebooks
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
    from PIL import Image

    monkeypatch.setattr(study, "run", in_this_process)
    root = study.make(tmp_path / "study", **TINY)
    monkeypatch.setenv("MGDCR_ROOT", str(root))
    shown = notebooks.execute(NOTEBOOK, tmp_path, monkeypatch)
    real = (study.Path(os.environ.get("REAL_DATA_DIR", "")) / "cardiac").is_dir()
    assert len(shown.pictures) == 8 + 2 * real
    beats = [Image.open(io.BytesIO(base64.b64decode(animation))) for animation in shown.animations]
    assert [beat.n_frames for beat in beats] == [4] + [13] * real

    # registration finds what was moved; the views add decibels; volumes between the slices are not lost
    found = re.findall(r"^(\dch): NCC along the crossing lines ([\d.]+) before, ([\d.]+) after$", shown.text, re.M)
    assert len(found) == 3 and all(float(after) > 0.99 for _, _, after in found)
    assert min(float(before) for _, before, _ in found) < 0.9
    for phase in ("ED", "ES"):
        line = re.search(rf"^{phase}: (.*)$", shown.text, re.M)[1]
        scores = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+) dB", line)}
        assert min(scores["ours"], scores["lax_residual"]) > max(scores["linear"], scores["cubic"]) + 2
    volumes = {name: [float(v) for v in row] for name, *row in
               re.findall(r"^(\w+): EDV ([\d.]+) ml, ESV ([\d.]+) ml, EF ([\d.]+)$", shown.text, re.M)}  # fmt: skip
    assert abs(volumes["ours"][0] / volumes["truth"][0] - 1) < 0.04 < 1 - volumes["linear"][0] / volumes["truth"][0]
    assert ("NCC along the crossing lines" in shown.text.split("cine.gif")[1]) == real
