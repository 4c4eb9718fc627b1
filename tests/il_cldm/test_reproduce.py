"""reproduce.py to its end on a study too small to show anything: every claim gets its row and its picture."""

import json

import pytest

from tests.helpers import run_script


@pytest.mark.slow
def test_reproduce_writes_every_claim(tmp_path):
    sizes = "--n_train 8 --n_val 2 --n_test 8 --shape 16 16 16 --aae_steps 4 --ldm_steps 4".split()
    options = ["--preset", "smoke", "--leak", *sizes, "--n_ancestral", "1", "--samples", "9"]
    command = ["il_cldm/reproduce.py", *options, "--out", str(tmp_path / "out")]
    done = run_script(command, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [name.split()[0] for name in results["claims"]] == ["a1", "a2", "a3", "b", "c", "d"]
    for name, row in results["claims"].items():
        assert isinstance(row["passed"], bool) and row["ours"] and row["paper"], name
        assert name in done.stdout
    coverage = results["claims"]["d 80 % interval holds the true SUVR about as often"]["values"]
    assert coverage["nominal"] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert all(a >= b for a, b in zip(coverage["voxels"], coverage["voxels"][1:], strict=False))  # nested intervals
    for picture in ("guidance", "coverage"):
        assert (tmp_path / "out" / "figures" / f"{picture}.png").stat().st_size > 1000


def test_reproduce_refuses_sample_counts_without_an_80_percent_interval():
    done = run_script(["il_cldm/reproduce.py", "--samples", "10"])
    assert done.returncode == 2 and done.stderr.startswith("error: --samples 10")
