"""The notebook runs headless on a quickly trained phantom study, and shows what it says."""

import importlib
import re

import pytest

from common.cli import UserError
from lapt.notebooks import study
from tests import notebooks
from tests.helpers import ROOT, run_main

NOTEBOOK = ROOT / "lapt" / "notebooks" / "visualize.ipynb"
TINY = {"cases": 12, "vqgan": 50, "ldm": 40, "lapt": 20}


def in_this_process(script, *args):
    """A script as `study.run` starts it, without the seconds that a new process takes to import torch."""
    more = ("--device", "cpu") if script == "main.py" else ("--num_workers", 1)
    run_main(importlib.import_module(f"lapt.{script.removesuffix('.py')}"), *args, *more)


def test_a_study_without_what_is_needed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LAPT_ROOT", str(tmp_path))
    with pytest.raises(UserError, match="has no trained runs/ldm; run the commands"):
        study.open_study()
    assert not list(tmp_path.iterdir())


def test_a_script_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="preprocessing.py: error: .*nowhere"):
        study.run("preprocessing.py", "--input_dir", tmp_path / "nowhere", "--output_dir", tmp_path / "out")


@pytest.mark.slow
def test_it_runs_and_shows_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "run", in_this_process)
    root = study.make(tmp_path / "study", **TINY)
    monkeypatch.setenv("LAPT_ROOT", str(root))
    shown = notebooks.execute(NOTEBOOK, tmp_path, monkeypatch)
    assert len(shown.pictures) == 10

    # what the curves and the images of a stroke must show, whatever was trained
    found = re.findall(r"^([a-z ]+): rises by ([\d.]+) HU, peak at time point (\d+)$", shown.text, re.M)
    rise, peak = ({name: float(row[i]) for name, *row in found} for i in (0, 1))
    assert rise["lesion"] < 0.5 * rise["other side"] and peak["penumbra"] > peak["other side"]
    inside, outside = zip(*re.findall(r"^(?:dwi|adc): (\d+) in the lesion, (\d+) ", shown.text, re.M), strict=True)
    assert int(inside[0]) > 1.3 * int(outside[0]) and int(inside[1]) < 0.7 * int(outside[1])

    # the floor is below every model; the three models are different ones, told in one unit
    pairs = r"DWI ([\d.]+) / ([\d.]+), ADC ([\d.]+) / ([\d.]+), ADC bias ([-+][\d.]+)"
    found = re.findall(rf"^([A-Za-z ]+): {pairs}$", shown.text, re.M)
    errors = {name: [float(value) for value in row] for name, *row in found}
    assert list(errors) == ["autoencoder", "LDM", "continued LDM", "LAPT"]
    assert all(errors["autoencoder"][0] < errors[name][0] for name in errors if name != "autoencoder")
    assert len({tuple(row) for row in errors.values()}) == 4
    p = re.search(r"^LAPT: mean lesion probability ([\d.]+) inside the lesion, ([\d.]+) outside$", shown.text, re.M)
    assert all(0 <= float(value) <= 1 for value in p.groups())
