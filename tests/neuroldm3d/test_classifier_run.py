"""The augmentation study: which cells, what is skipped, and what is concluded from their results."""

import csv
import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from common import cli
from common.cli import UserError
from neuroldm3d.classifier import grid, metrics, run
from neuroldm3d.classifier.config import GRID_PRESETS, GridConfig
from tests.helpers import run_main
from tests.neuroldm3d.classifier_tools import TINY, add_synthetic, run_folder

STUDY = "--budgets 8 --shares 0 50 --equal_size 50 --synthetic_only 8 --seeds 1 2 --max_steps 4".split()


def call(root, *args):
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(io.StringIO()):
        run_main(run, "--root", root, *TINY, *STUDY, *args)
    return out.getvalue()


@pytest.fixture(scope="module")
def finished(cohort, tmp_path_factory):
    """A study of four cells and two seeds, and what running it printed."""
    root = shutil.copytree(cohort, tmp_path_factory.mktemp("grid") / "study")
    add_synthetic(root)
    return root, call(root)


def config_of(root, **options) -> GridConfig:
    return cli.parse(GridConfig, ["--root", str(root), *TINY, *STUDY], description="", presets=GRID_PRESETS) \
        if not options else replace(config_of(root), **options)  # fmt: skip


# ---- cells


def test_the_published_grid():
    """Four budgets x five shares and five synthetic-only cells, and the controls of equal size that were missing."""
    cells = {cell.name: cell for cell in grid.cells_of(GridConfig())}
    kinds = [cell.kind for cell in cells.values()]
    assert (kinds.count(grid.REAL), kinds.count(grid.MIXED), kinds.count(grid.SYNTHETIC)) == (4, 16, 5)
    assert kinds.count(grid.EQUAL) == 4
    best = cells["real_2723_syn_50"]
    assert (best.n_real, best.n_synthetic, best.baseline) == (2723, 1362, "real_2723")
    control = cells["equal_500_syn_50"]
    assert (control.n_real, control.n_synthetic, control.baseline) == (250, 250, "real_500")
    assert cells["syn_5446"].n_real == 0 and cells["real_500"].n_synthetic == 0
    published = {"real_500", "real_1000_syn_75", "real_2723_syn_100", "syn_500", "syn_2723", "real_2000_syn_25"}
    assert published <= cells.keys()


def test_every_cell_gets_the_same_seeds_and_volumes():
    config = GridConfig()
    cells = grid.cells_of(config)
    real, mixed = (next(c for c in cells if c.name == name) for name in ("real_500", "real_500_syn_50"))
    a, b = (grid.cell_config(config, cell, 3) for cell in (real, mixed))
    assert a.seed == b.seed == 3 and a.sample_seed == b.sample_seed == config.sample_seed + 3
    assert (b.num_samples, b.num_synth_samples, b.exp) == (500, 250, "grid/real_500_syn_50/seed_3")
    kept = grid.cell_config(replace(config, redraw=False), mixed, 3)
    assert kept.sample_seed == config.sample_seed
    assert {name for name in a.__dataclass_fields__ if getattr(a, name) != getattr(b, name)} == {
        "num_synth_samples", "exp"}  # fmt: skip


@pytest.mark.parametrize("options, message", [
    (dict(seeds=(1, 1)), "different numbers"), (dict(budgets=(0,)), "--budgets start at 1"),
    (dict(equal_size=(100.0,)), "--equal_size"), (dict(part="3/2"), "--part 3/2"), (dict(part="a"), "--part a"),
])  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        GridConfig(**options)


# ---- statistics


def results_of(name, shift=0.0, seeds=3, n=60, noise=1.0):
    """Made-up results of a cell: probabilities that tell TLE from HC better with a larger `shift`."""
    rng, labels = np.random.default_rng(0), np.arange(n) % 2
    shared = rng.standard_normal(n)
    own = np.random.default_rng(sum(map(ord, name)))
    scores = [1 / (1 + np.exp(-(shift * labels + shared + noise * 0.1 * own.standard_normal(n)))) for _ in range(seeds)]
    overall = [{"overall_results": {m: {"mean": float(metrics.auc(labels, s))} for m in grid.SHOWN},
                "collapsed_folds": []} for s in scores]  # fmt: skip
    return grid.Results(dict(enumerate(overall)), [[str(i) for i in range(n)]], [labels], [np.mean(scores, axis=0)])


def test_comparison_of_a_cell_with_itself_and_with_a_better_one():
    """Fact 34: equal scores give p = 1; a clear gain is found, with the sign of cell minus baseline."""
    results = {"a": results_of("a"), "b": results_of("a"), "c": results_of("c", shift=2.0)}
    same = grid.compare(GridConfig(), results, "a", "b")
    assert (same["delta_auc"], same["p"], same["over_seeds"]["sd"]) == (0, 1, 0)
    assert same["p_equivalence"] == 0 and same["mcnemar"]["p"] == 1 and same["bootstrap_ci95"] == [0, 0]
    better = grid.compare(GridConfig(), results, "c", "a")
    assert better["delta_auc"] > 0.2 and better["p"] < 1e-3 and better["ci95"][0] > 0
    assert better["over_seeds"]["ci95"][0] > 0 and better["p_non_inferiority"] < 1e-3 < better["p_equivalence"]
    assert better["bootstrap_ci95"] == pytest.approx(better["ci95"], abs=0.03)  # another way to the same interval
    labels = results["c"].labels[0]
    stacked = np.stack([results["c"].scores[0], results["a"].scores[0]])
    z, p = metrics.z_test(*metrics.difference(*metrics.delong(labels, stacked), 0, 1))
    assert (better["z"], better["p"]) == (z, p)


def test_intervals_over_seeds():
    values = np.array([0.7, 0.8, 0.75, 0.72])
    found = grid.over_seeds(values)
    low, high = stats.t.interval(0.95, 3, values.mean(), values.std(ddof=1) / 2)
    assert found["ci95"] == pytest.approx([low, high]) and found["sd"] == pytest.approx(values.std(ddof=1))
    assert grid.over_seeds(values[:1])["ci95"] is None and grid.over_seeds(values[:1])["sd"] is None


# ---- the run


def test_a_study_from_end_to_end(finished):
    root, printed = finished
    folder = run_folder(root, "grid")
    report = json.loads((folder / "grid.json").read_text())
    assert [cell["cell"] for cell in report["cells"]] == ["real_8", "real_8_syn_50", "equal_8_syn_50", "syn_8"]
    numbers = [(cell["n_real"], cell["n_synthetic"]) for cell in report["cells"]]
    assert numbers == [(8, 0), (8, 4), (4, 4), (0, 8)]
    for cell in report["cells"]:
        aucs = []
        for seed in (1, 2):
            path = folder / cell["cell"] / f"seed_{seed}"
            counts = json.loads((path / "parameters.json").read_text())["folds"][0]
            assert (sum(counts["train_real"].values()), sum(counts["train_synthetic"].values())) == (
                cell["n_real"], cell["n_synthetic"])  # fmt: skip
            aucs.append(json.loads((path / "all_folds_metrics.json").read_text())["overall_results"]["auc_roc"]["mean"])
        assert cell["metrics"]["auc_roc"]["values"] == aucs
        assert cell["metrics"]["auc_roc"]["mean"] == pytest.approx(np.mean(aucs))
    rows = report["comparisons"]
    assert {(row["cell"], row["baseline"]) for row in rows} == {
        ("real_8_syn_50", "real_8"), ("equal_8_syn_50", "real_8"), ("syn_8", "real_8")}  # fmt: skip
    p = [row["p"] for row in rows]
    assert [row["p_holm"] for row in rows] == pytest.approx(metrics.holm(p).tolist())
    assert [row["p_bh"] for row in rows] == pytest.approx(metrics.benjamini_hochberg(p).tolist())
    assert any("the generator was trained on 12 real volumes" in note for note in report["notes"])
    assert all(note in printed for note in report["notes"]) and "Holm" in printed
    for name in ("performance_by_budget.png", "performance_by_share.png"):
        assert (folder / name).stat().st_size > 5000
    with open(folder / "comparisons.csv") as file:
        assert [row["cell"] for row in csv.DictReader(file)] == [row["cell"] for row in rows]
    with open(folder / "cells.csv") as file:
        assert len(list(csv.DictReader(file))) == 4
    assert str(root) not in (folder / "grid.json").read_text()


def test_finished_cells_are_skipped_and_missing_ones_made(finished, tmp_path):
    root = shutil.copytree(finished[0], tmp_path / "study")
    folder = run_folder(root, "grid")
    models = {p: p.stat().st_mtime_ns for p in folder.rglob("best_model.pth")}
    report = (folder / "grid.json").read_bytes()
    assert "8 trainings of 4 cells, 8 finished, 0 to do here" in call(root)
    shutil.rmtree(folder / "syn_8" / "seed_2")
    assert "7 finished, 1 to do here" in call(root)
    after = {p: p.stat().st_mtime_ns for p in folder.rglob("best_model.pth")}
    assert after.keys() == models.keys()
    assert {p for p in models if after[p] != models[p]} == {folder / "syn_8" / "seed_2" / "fold_1" / "best_model.pth"}
    assert (folder / "grid.json").read_bytes() == report  # the same training again


def test_other_options_are_not_mixed_into_a_study(finished, tmp_path):
    root = shutil.copytree(finished[0], tmp_path / "study")
    with pytest.raises(UserError, match="was trained with other options .learning_rate 0.002 -> 0.5."):
        call(root, "--learning_rate", 0.5)


def test_parts_share_the_cells(finished, tmp_path):
    """Two machines train half of the cells each; the one that ends last reports."""
    root = tmp_path / "study"
    shutil.copytree(finished[0], root, ignore=shutil.ignore_patterns("runs"))
    printed = call(root, "--part", "1/2")
    folder = run_folder(root, "grid")
    assert "4 trainings are left to the other parts" in printed and not (folder / "grid.json").exists()
    call(root, "--part", "2/2")
    assert (folder / "grid.json").read_bytes() == (run_folder(finished[0], "grid") / "grid.json").read_bytes()


def test_all_pairs(finished):
    config = config_of(finished[0], all_pairs=True)
    report = grid.aggregate(config, grid.cells_of(config))
    assert len(report["comparisons"]) == 6
    p = [row["p"] for row in report["comparisons"]]
    assert [row["p_holm"] for row in report["comparisons"]] == pytest.approx(metrics.holm(p).tolist())


def test_too_large_budgets_are_known_before_training(cohort, tmp_path):
    root = shutil.copytree(cohort, tmp_path / "study")
    add_synthetic(root)
    with pytest.raises(UserError, match="40 real volumes asked for, the training table has 12"):
        call(root, "--budgets", 8, 40)
    assert not list(root.rglob("*.pt"))
