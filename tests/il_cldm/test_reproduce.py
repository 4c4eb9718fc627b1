"""reproduce.py to its end on a study too small to show anything: every claim gets its row and its picture."""

import json

import numpy as np
import pytest

from il_cldm.reproduce import conformal_margin
from tests.helpers import run_script


@pytest.mark.slow
def test_reproduce_writes_every_claim(tmp_path):
    sizes = "--n_train 8 --n_val 2 --n_test 8 --shape 16 16 16 --aae_steps 4 --ldm_steps 4".split()
    options = ["--preset", "smoke", "--leak", *sizes, "--n_ancestral", "1", "--samples", "9"]
    command = ["il_cldm/reproduce.py", *options, "--out", str(tmp_path / "out")]
    done = run_script(command, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [name.split()[0] for name in results["claims"]] == ["a1", "a2", "a3", "b", "c", "d1", "d2"]
    for name, row in results["claims"].items():
        assert isinstance(row["passed"], bool) and row["ours"] and row["paper"], name
        assert name in done.stdout
    coverage = next(row for name, row in results["claims"].items() if name.startswith("d1"))["values"]
    assert coverage["nominal"] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert all(a >= b for a, b in zip(coverage["voxels"], coverage["voxels"][1:], strict=False))  # nested intervals
    for picture in ("guidance", "coverage"):
        assert (tmp_path / "out" / "figures" / f"{picture}.png").stat().st_size > 1000


def test_conformal_margin_covers_new_truths_as_promised():
    """Intervals of ±0.3 SD are far too narrow for a normal truth, ±3 too wide: the margin mends both."""
    rng = np.random.default_rng(0)
    for half in (0.3, 3.0):
        shares = []
        for _ in range(200):
            seen, new = rng.normal(size=40), rng.normal(size=400)
            margin = conformal_margin(np.full(40, -half), np.full(40, half), seen, 0.8)
            shares.append(np.mean(np.abs(new) <= half + margin))
        # in expectation ceil(0.8 * 41) / 41
        assert np.mean(shares) == pytest.approx(33 / 41, abs=0.015)


def test_reproduce_refuses_sample_counts_without_an_80_percent_interval():
    done = run_script(["il_cldm/reproduce.py", "--samples", "10"])
    assert done.returncode == 2 and done.stderr.startswith("error: --samples 10")
