"""reproduce.py to its end on a study too small to show anything: every claim gets its row and its picture."""

import csv
import json

import pytest

from mgdcr import reproduce
from tests.helpers import run_script

CLAIMS = ["A5", "A12", "A12", "A13", "A13", "A13", "A14", "A15", "A15", "A16", "A16", "A16", "A17", "A17", "A17", "A18",
          "A19", "A20"]  # fmt: skip


@pytest.mark.slow
def test_reproduce_writes_every_claim(tmp_path):
    sizes = "--n_train 4 --total_samples 16 --ddim_samples 8 --n_slices 2 --phases 4 --iterations 1 --cine_iterations 1"
    command = ["mgdcr/reproduce.py", "--preset", "smoke", *sizes.split(), "--device", "cpu", "--out", tmp_path / "out"]
    done = run_script(command, cwd=tmp_path, timeout=1500)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [name.split()[0] for name in results["claims"]] == CLAIMS
    for name, row in results["claims"].items():
        assert isinstance(row["passed"], bool) and row["ours"] and row["target"] and row["values"], name
        assert name in done.stdout
    with open(tmp_path / "out" / "scores.csv") as file:
        methods = {row["method"] for row in csv.DictReader(file)}
    assert {*reproduce.METHODS, *reproduce.CONDITIONS} <= methods
    compared = {(row["phase"], row["method"]): row for row in results["methods"]}
    wanted = {"nearest", "linear", "cubic", "lanczos", "lax_residual", "diffae", "unconditional", "ours"}  # issue
    assert compared.keys() == {(phase, name) for phase in ("ED", "ES") for name in wanted | {"outlines", "truth"}}
    for (_, name), row in compared.items():
        images = {"psnr_db", "ssim", "nrmse"} if name in wanted else set()
        assert images | {"dice_lv", "dice_myo", "dice_rv"} | {"phase", "method", "n"} == row.keys()
        assert f"{row['phase']} {name} " in done.stdout
    for picture in ("round_trip", "volumes_ed", "volumes_es", "gains", "volume_curve"):
        assert (tmp_path / "out" / "figures" / f"{picture}.png").stat().st_size > 1000
    # The views alone pass A12, whatever the prior; a prior of two steps must not take that away.
    assert all(row["passed"] for name, row in results["claims"].items() if name.startswith("A12"))


def test_a_cohort_that_is_there_is_kept(tmp_path):
    for _ in range(2):
        folder = reproduce.make_cohort(tmp_path / "a", 1, 1, 3, "--no-dense", noise_lax=0.05, shift_lax=(2.0, 0.0, 0.0))
    options = json.loads((folder / "phantom.json").read_text())["options"]
    assert options["noise_lax"] == 0.05 and options["shift_lax"] == [2.0, 0.0, 0.0] and options["seed"] == 3


def test_impossible_sizes_are_refused():
    done = run_script(["mgdcr/reproduce.py", "--n_other", "9"])
    assert done.returncode == 2 and done.stderr.startswith("error: --n_other")
