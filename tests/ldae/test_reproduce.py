"""reproduce.py to its end on a study too small to show anything: every claim gets its row; what makes one fail."""

import json
import math

import pytest

from common.cli import UserError
from ldae import reproduce
from ldae.scripts import benchmark, interpolation_evaluation
from tests.helpers import run_script

CLAIMS = ["a1", "a2", "a3", "b1", "b2", "b3", "b4", "c", "d1", "d2", "e"]
FIGURES = ("reconstruction", "probe_diagnosis", "probe_age", "probe_sex", "edit", "ventricles", "interpolation")


@pytest.mark.slow
def test_reproduce_writes_every_claim(tmp_path):
    sizes = (
        "--n_subjects 18 --aekl_steps 20 --prior_steps 10 --repr_steps 10 --table_steps 2 3 --n_table 4 --n_edit 2 "
        "--n_interpolate 2 --steps 2 --bench_steps 2 --num_workers 0"
    ).split()
    command = ["ldae/reproduce.py", "--preset", "smoke", *sizes, "--device", "cpu", "--out", tmp_path / "out"]
    done = run_script(command, cwd=tmp_path, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [name.split()[0] for name in results["claims"]] == CLAIMS
    for name, row in results["claims"].items():
        assert row["passed"] in (True, False, None) and row["ours"] and row["paper"] and row["values"], name
        verdict = "reported" if row["passed"] is None else "pass" if row["passed"] else "FAIL"
        assert any(line.startswith(name) and verdict in line for line in done.stdout.splitlines()), name
    assert results["options"]["aekl_steps"] == 20 and results["data"] == "phantom"
    for name in FIGURES:
        assert (tmp_path / "out" / "figures" / f"{name}.png").stat().st_size > 1000, name
    table = results["claims"][next(name for name in results["claims"] if name.startswith("a1"))]["values"]["table"]
    assert {(entry["row"], entry["steps"]) for entry in table} >= {("encoded", 2), ("untrained", 3), ("aekl", None)}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n_table": 3}, "--n_table 3: give more than the 3 sessions"), ({"sessions": (0, 12)}, "--sessions 0 12: a"),
     ({"aekl_steps": 0}, "--aekl_steps 0: must be at least 1"), ({"n_edit": 0}, "--n_edit 0")],
)  # fmt: skip
def test_sizes_that_answer_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        reproduce.check(reproduce.Options(**options))
    for preset in reproduce.PRESETS.values():
        reproduce.check(reproduce.Options(**preset))


@pytest.mark.parametrize(("ci95", "passed"), [([-0.002, -0.001], True), ([-0.002, 0.001], False), ([0, 1], False)])
def test_interpolation_must_be_better_than_chance_allows(tmp_path, monkeypatch, ci95, passed):
    """(d): the whole interval of the difference lies on the right side, not its mean alone."""
    methods = ("ldae", "ldae_change", "copy_nearest", "voxel_blend", "latent_blend", "aekl_target")
    found = {"overall": {name: {"mse_masked": {"mean": 0.01}} for name in methods}, "n_predictions": 5}
    minus = {"copy_nearest": {"mse_masked": {"mean": sum(ci95) / 2, "ci95": ci95}}}
    found |= {"ldae_minus": minus, "ldae_change_minus": minus}
    monkeypatch.setattr(interpolation_evaluation, "evaluate", lambda options, rt: found)
    monkeypatch.setattr(reproduce, "keep_figure", lambda *_: None)
    rows = reproduce.claim_interpolation(reproduce.Options(out=str(tmp_path)), tmp_path, None)
    assert [row["passed"] for row in rows.values()] == [passed] * 2
    assert "10.00 against 10.00" in next(iter(rows.values()))["ours"]


@pytest.mark.parametrize(("slowest", "passed"), [(1.2, True), (0.9, False)])
def test_speed_must_hold_in_every_round(tmp_path, monkeypatch, slowest, passed):
    seconds = {name: {"total": 1.0} for name in ("ldae", "voxel")}
    found = {"seconds_per_scan": seconds, "ratios": {"total": {"median": 2.0, "min": slowest, "max": 3.0}}, "about": {}}
    monkeypatch.setattr(benchmark, "benchmark", lambda options, rt: found)
    (row,) = reproduce.claim_speed(reproduce.Options(out=str(tmp_path)), tmp_path, None).values()
    assert row["passed"] is passed and "2.0 times" in row["ours"]


def test_differences_are_drawn_by_subject():
    """Three scans of everybody are not three times as many people."""
    values, subjects = [0.1, 0.5, -0.2, 0.3, 0.6, -0.1], list("abcdef")
    once, thrice = reproduce.paired(values, subjects, 0), reproduce.paired(values * 3, subjects * 3, 0)
    assert once["n"] == 6 and thrice["ci95"] == pytest.approx(once["ci95"]) and once["mean"] == pytest.approx(0.2)
    assert reproduce.interval(once).startswith("+0.200 [")
    assert reproduce.span({"value": 0.5, "ci95": None}) == "0.500 [nan, nan]" and math.isfinite(once["ci95"][0])


def test_a_cohort_that_is_complete_is_kept(tmp_path, monkeypatch):
    folder = tmp_path / "cohort" / "data"
    folder.mkdir(parents=True)
    (folder / "phantom.json").write_text("{}")
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *_: pytest.fail("made again"))
    assert reproduce.make_cohort(reproduce.Options(out=str(tmp_path))) == tmp_path / "cohort"
