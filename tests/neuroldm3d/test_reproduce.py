"""reproduce.py to its end on a study too small to show anything: every claim gets its row."""

import json

import pytest

from tests.helpers import run_script


@pytest.mark.slow
def test_reproduce_writes_every_claim(tmp_path):
    sizes = (
        "--n_train 16 --n_val 6 --n_test 8 --vae_steps 4 --dit_steps 4 --n_synth 4 --budgets 8 --shares 0 100 "
        "--seeds 1 --classifier_epochs 1 --n_saliency 4"
    ).split()
    done = run_script(["neuroldm3d/reproduce.py", "--preset", "smoke", *sizes, "--out", str(tmp_path / "out")],
                      cwd=tmp_path, timeout=900)  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [name.split()[0] for name in results["claims"]] == ["a1", "a2", "b", "c", "d", "e"]
    for name, row in results["claims"].items():
        assert row["ours"] and row["paper"] and name in done.stdout
        assert row["passed"] is None if name.startswith("c") else isinstance(row["passed"], bool), name
    planted = next(row for name, row in results["claims"].items() if name.startswith("e"))["values"]["planted"]
    assert planted["latent"]["verdict"]["memorised"]  # copies are caught however little was trained
    assert (tmp_path / "out" / "figures" / "hippocampus.png").stat().st_size > 1000
