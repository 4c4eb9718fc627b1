"""The augmentation study: real budgets x synthetic shares x seeds, its controls, and tests between the cells.

Every cell is trained with the same seeds and tested on the same subjects. Two kinds of uncertainty are reported side by
side: that of the training (differences seed by seed, t interval) and that of the test subjects (DeLong on the scores
averaged over seeds, corrected over all comparisons after Holm and after Benjamini and Hochberg).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy import stats

from common import figures, runtime, tables
from common.cli import UserError, frozen, to_dict
from common.runlog import write_json
from common.training import read_record
from neuroldm3d.classifier import composition, metrics, trainer
from neuroldm3d.classifier.config import Config, GridConfig

REAL, SYNTHETIC, MIXED, EQUAL = "real", "synthetic only", "added", "same size"
SHOWN = ("accuracy", "auc_roc", "auc_pr", "ppv", "sensitivity", "specificity", "f1_score")
ALPHA = 0.05
REMEDY = "train that cell again with --restart"


@dataclass(frozen=True)
class Cell:
    """A setting of the study: `share` is its synthetic volumes in percent of `budget`, within which it is compared."""

    name: str
    kind: str
    budget: int
    share: float
    n_real: int
    n_synthetic: int

    @property
    def baseline(self) -> str:
        """Name of the real-only cell of the same budget."""
        return f"real_{self.budget}"


def cells_of(config: GridConfig) -> list[Cell]:
    """Every cell of a study, without repeats, under the original's names (real_500_syn_25, syn_500)."""
    cells = []
    for budget in config.budgets:
        for share in config.shares:
            n = round(budget * share / 100)
            name = f"real_{budget}_syn_{share:g}" if n else f"real_{budget}"
            cells.append(Cell(name, MIXED if n else REAL, budget, share if n else 0, budget, n))
        for share in filter(None, config.equal_size):
            # Deviation (original code): it only adds volumes, so that augmented trainings are larger, too.
            n = round(budget * share / 100)
            cells.append(Cell(f"equal_{budget}_syn_{share:g}", EQUAL, budget, share, budget - n, n))
    cells += [Cell(f"syn_{n}", SYNTHETIC, n, 100, 0, n) for n in config.synthetic_only if n]
    return list({cell.name: cell for cell in cells}.values())


def cell_config(config: GridConfig, cell: Cell, seed: int) -> Config:
    """Options of one training of a cell."""
    options = {name: getattr(config, name) for name in Config.__dataclass_fields__}
    options |= dict(seed=seed, num_samples=cell.n_real, num_synth_samples=cell.n_synthetic)
    options |= dict(exp=f"{config.exp}/{cell.name}/seed_{seed}")
    if config.redraw:
        options["sample_seed"] = config.sample_seed + seed
    return Config(**options)


def run_grid(config: GridConfig, rt: runtime.Runtime) -> dict:
    """Train what is missing, then write grid.json, its tables and figures to RUNS/EXP; returns grid.json's content.

    With --part k/n this is only done once every cell is there; before that an empty dict is returned.
    """
    trainer.check_options(config, rt)
    cells = cells_of(config)
    jobs = [(cell, seed) for cell in cells for seed in config.seeds]
    finished = {job: not config.restart and is_finished(cell_config(config, *job)) for job in jobs}
    rt.barrier()  # every rank has looked before any writes
    k, n = map(int, config.part.split("/"))
    todo = [job for job in jobs[k - 1 :: n] if not finished[job]]
    rt.print(f"{len(jobs)} trainings of {len(cells)} cells, {sum(finished.values())} finished, {len(todo)} to do here")
    if todo:
        train_cells(config, todo, rt)
    missing = [job for job in jobs if not is_finished(cell_config(config, *job))]
    if missing:
        cell, seed = missing[0]
        rt.print(f"{len(missing)} trainings are left to the other parts, such as {cell.name} with seed {seed}")
        return {}
    report = aggregate(config, cells)
    if rt.is_main:
        write_report(config, report)
        print_report(report, rt)
    rt.barrier()
    return report


def train_cells(config: GridConfig, jobs: list[tuple[Cell, int]], rt: runtime.Runtime) -> None:
    """Train the jobs one after the other; the data are checked once, and every cell's numbers before the first step."""
    tables, volumes = composition.read_tables(config), composition.open_volumes(config)
    twins = composition.find_twins(tables, volumes, config, rt)
    for cell, seed in jobs:
        composition.compose(tables, twins, cell_config(config, cell, seed), rt)
    for number, (cell, seed) in enumerate(jobs, 1):
        rt.print(f"[{number}/{len(jobs)}] {cell.name}, seed {seed}")
        trainer.train(cell_config(config, cell, seed), rt, twins)


def is_finished(config: Config) -> bool:
    """Whether a training's results are there; UserError if they are of other options."""
    summary, parameters = config.folder / trainer.SUMMARY, config.folder / "parameters.json"
    if not (summary.is_file() and parameters.is_file()):
        return False
    groups = {"data", "folds", "model", "training"}
    now = frozen(config, groups) | {name: to_dict(config)[name] for name in ("seed", "epochs", "max_steps")}
    before = read_record(parameters, ("options",), REMEDY)["options"]
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]
    if changed:
        raise UserError(f"{config.folder} was trained with other options ({'; '.join(changed)}): use those, name "
                        "another --exp, or --restart")  # fmt: skip
    return True


# ---- aggregation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """What the trainings of a cell gave: summaries by seed, and per fold labels (n,) and mean probabilities (n,)."""

    summaries: dict[int, dict]
    names: list[list[str]]
    labels: list[np.ndarray]
    scores: list[np.ndarray]

    def values(self, metric: str) -> np.ndarray:
        return np.array([summary["overall_results"][metric]["mean"] for summary in self.summaries.values()])


def read_results(config: GridConfig, cell: Cell) -> Results:
    """Results of a finished cell; calibrated probabilities are averaged over seeds, subject by subject."""
    folders = {seed: cell_config(config, cell, seed).folder for seed in config.seeds}
    summaries = {seed: read_record(folder / trainer.SUMMARY, (), REMEDY) for seed, folder in folders.items()}
    names, labels, scores = [], [], []
    for k in range(1, next(iter(summaries.values()))["n_folds"] + 1):
        tables = [trainer.read_predictions(folder / f"fold_{k}" / "individual_test_performance.csv")
                  for folder in folders.values()]  # fmt: skip
        names.append([row["name"] for row in tables[0]])
        labels.append(np.array([row["original_label"] for row in tables[0]]))
        scores.append(np.mean([[row["calibrated_score"] for row in table] for table in tables], axis=0))
    return Results(summaries, names, labels, scores)


def aggregate(config: GridConfig, cells: list[Cell]) -> dict:
    """Cells with means over seeds and intervals; comparisons with tests corrected over all of them."""
    results = {cell.name: read_results(config, cell) for cell in cells}
    reference = results[cells[0].name]
    for name, result in results.items():
        if result.names != reference.names:
            raise UserError(f"{name} was tested on other subjects than {cells[0].name}: use one set of tables")
    by_name = {cell.name: cell for cell in cells}
    pairs = [(cell.name, cell.baseline) for cell in cells if cell.kind != REAL and cell.baseline in by_name]
    if config.all_pairs:
        pairs = list(combinations(by_name, 2))
    comparisons = [compare(config, results, *pair) for pair in pairs]
    p_values = [row["p"] for row in comparisons]
    adjusted = zip(metrics.holm(p_values), metrics.benjamini_hochberg(p_values), strict=True)
    for row, (p_holm, p_bh) in zip(comparisons, adjusted, strict=True):
        row |= {"p_holm": float(p_holm), "p_bh": float(p_bh)}
    return {
        "cells": [describe(cell, results[cell.name]) for cell in cells],
        "comparisons": comparisons,
        "seeds": list(config.seeds),
        "n_test": sum(map(len, reference.labels)),
        "n_folds": len(reference.labels),
        "margin": config.margin,
        "tests": "DeLong on probabilities averaged over seeds, fold by fold; p_holm and p_bh over all comparisons "
        "listed; bootstrap_ci95: test subjects drawn anew within folds and classes, the same for both cells; "
        "over_seeds: t interval of the differences seed by seed",
        "notes": notes(config, cells),
    }


def describe(cell: Cell, results: Results) -> dict:
    """Mean, SD, t interval over seeds of every metric; AUC of the scores averaged over seeds, DeLong's interval."""
    row = {"cell": cell.name, "kind": cell.kind, "budget": cell.budget, "share": cell.share,
           "n_real": cell.n_real, "n_synthetic": cell.n_synthetic}  # fmt: skip
    row["metrics"] = {name: over_seeds(results.values(name)) for name in SHOWN}
    areas, covariance = metrics.delong_over_folds(results.labels, [score[None] for score in results.scores])
    _, low, high = metrics.auc_interval(areas, covariance)[0].tolist()
    row["ensemble_auc"] = {"auc": float(areas[0]), "ci95": [low, high]}
    row["collapsed"] = [seed for seed, summary in results.summaries.items() if summary["collapsed_folds"]]
    return row


def over_seeds(values: np.ndarray) -> dict:
    """Mean, SD and t interval of the mean; None where one value does not tell."""
    n, sd = len(values), None
    interval = None
    if n > 1:
        sd = float(values.std(ddof=1))
        half = float(stats.t.ppf((1 + metrics.LEVEL) / 2, n - 1)) * sd / math.sqrt(n)
        interval = [float(values.mean()) - half, float(values.mean()) + half]
    return {"mean": float(values.mean()), "sd": sd, "ci95": interval, "values": values.tolist()}


def compare(config: GridConfig, results: dict[str, Results], name: str, baseline: str) -> dict:
    """AUC of a cell minus that of another: over seeds, and over test subjects with DeLong and what follows from it."""
    a, b = results[name], results[baseline]
    both = [np.stack(pair) for pair in zip(a.scores, b.scores, strict=True)]
    areas, covariance = metrics.delong_over_folds(a.labels, both)
    delta, se = metrics.difference(areas, covariance, 0, 1)
    z, p = metrics.z_test(delta, se)
    half = stats.norm.ppf((1 + metrics.LEVEL) / 2) * se
    drawn = np.mean([metrics.bootstrap_auc(y, pair, seed=(config.seed, fold), resamples=config.bootstrap)
                     for fold, (y, pair) in enumerate(zip(a.labels, both, strict=True))], axis=0)  # fmt: skip
    bootstrapped = np.quantile(drawn[:, 0] - drawn[:, 1], [(1 - metrics.LEVEL) / 2, (1 + metrics.LEVEL) / 2]).tolist()
    labels, first, second = (np.concatenate(parts) for parts in (a.labels, a.scores, b.scores))
    mcnemar = metrics.mcnemar(labels, first >= trainer.THRESHOLD, second >= trainer.THRESHOLD)
    return {
        "cell": name, "baseline": baseline, "delta_auc": delta, "ci95": [delta - half, delta + half], "se": se, "z": z,
        "p": p, "bootstrap_ci95": bootstrapped, "over_seeds": over_seeds(a.values("auc_roc") - b.values("auc_roc")),
        "p_equivalence": metrics.tost(delta, se, config.margin)[0],
        "p_non_inferiority": metrics.non_inferiority(delta, se, config.margin),
        "minimum_detectable": metrics.minimum_detectable_effect(se, ALPHA),
        "power_at_delta": metrics.power_at(delta, se, ALPHA),
        "mcnemar": dict(zip(("only_cell_right", "only_baseline_right", "p"), mcnemar, strict=True)),
    }  # fmt: skip


def notes(config: GridConfig, cells: list[Cell]) -> list[str]:
    """What a reader must know before believing a gain."""
    found = []
    for cell in cells:
        path = cell_config(config, cell, config.seeds[0]).folder / "parameters.json"
        about = (read_record(path, (), REMEDY).get("generator") or {}).get("trained_on")
        n = sum(about["label_counts"].values()) if about else 0
        if n > min(config.budgets):
            found.append(f"the generator was trained on {n} real volumes: at budgets below that, synthetic volumes "
                         "also bring in what it saw of the others")  # fmt: skip
            break
    if len(config.seeds) < 3:
        found.append(f"{len(config.seeds)} seeds per cell say little about the spread over trainings")
    return found


# ---- report ---------------------------------------------------------------------------------------------------------


def write_report(config: GridConfig, report: dict) -> None:
    """grid.json, cells.csv, comparisons.csv, performance_by_budget.png and performance_by_share.png."""
    folder = config.folder
    write_json(folder / "grid.json", trainer.json_ready(report))
    rows = []
    for cell in report["cells"]:
        row = {key: cell[key] for key in ("cell", "kind", "budget", "share", "n_real", "n_synthetic")}
        for name, value in cell["metrics"].items():
            row |= {f"{name}_mean": value["mean"], f"{name}_sd": value["sd"]}
        rows.append(row | {"ensemble_auc": cell["ensemble_auc"]["auc"]})
    tables.write_csv(folder / "cells.csv", rows)
    plain = ("cell", "baseline", "delta_auc", "se", "z", "p", "p_holm", "p_bh", "p_equivalence", "p_non_inferiority",
             "minimum_detectable", "power_at_delta")  # fmt: skip
    compared = [{key: row[key] for key in plain} for row in report["comparisons"]]
    if compared:
        tables.write_csv(folder / "comparisons.csv", compared)
    draw(folder, report)


def draw(folder: Path, report: dict) -> None:
    """AUC against the budget, one line per share, and against the share, one line per budget; bands: t intervals."""
    real = [cell for cell in report["cells"] if cell["kind"] in (REAL, MIXED)]
    by_budget = {share_name(s): [c for c in real if c["share"] == s] for s in sorted({c["share"] for c in real})}
    by_budget["synthetic only"] = [c for c in report["cells"] if c["kind"] == SYNTHETIC]
    by_budget |= {f"{s:g} % replaced": [c for c in report["cells"] if c["kind"] == EQUAL and c["share"] == s]
                  for s in sorted({c["share"] for c in report["cells"] if c["kind"] == EQUAL})}  # fmt: skip
    by_share = {f"{b} real": [c for c in real if c["budget"] == b] for b in sorted({c["budget"] for c in real})}
    for file, lines, key, xlabel in (
        ("performance_by_budget.png", by_budget, "budget", "volumes (real, or synthetic alone)"),
        ("performance_by_share.png", by_share, "share", "synthetic volumes added (% of the real ones)"),
    ):
        drawn = {name: line(cells, key) for name, cells in lines.items() if cells}
        title = f"{len(report['seeds'])} seeds, {report['n_test']} test volumes"
        figures.curves(folder / file, drawn, xlabel=xlabel, ylabel="AUC", title=title)


def share_name(share: float) -> str:
    return f"real + {share:g} % synthetic" if share else "real only"


def line(cells: list[dict], key: str) -> tuple:
    cells = sorted(cells, key=lambda cell: cell[key])
    found = [cell["metrics"]["auc_roc"] for cell in cells]
    bounds = [value["ci95"] or [value["mean"]] * 2 for value in found]
    low, high = np.clip(np.array(bounds).T, 0, 1)
    return [cell[key] for cell in cells], [value["mean"] for value in found], low, high


def print_report(report: dict, rt: runtime.Runtime) -> None:
    rt.print(f"\n{report['n_test']} test volumes, seeds {report['seeds']}\n{'cell':26s}{'AUC mean +- SD':>18s}"
             f"{'of mean scores':>24s}{'accuracy':>10s}")  # fmt: skip
    for cell in report["cells"]:
        auc, ensemble = cell["metrics"]["auc_roc"], cell["ensemble_auc"]
        spread = f" +- {auc['sd']:.3f}" if auc["sd"] is not None else ""
        interval = "{:.3f} [{:.3f}, {:.3f}]".format(ensemble["auc"], *ensemble["ci95"])
        rt.print(f"{cell['cell']:26s}{auc['mean']:.3f}{spread:>13s}{interval:>24s}"
                 f"{cell['metrics']['accuracy']['mean']:10.3f}")  # fmt: skip
    rt.print(f"\n{'difference of AUC':44s}{'DeLong':>24s}{'p':>8s}{'Holm':>8s}{'BH':>8s}")
    for row in report["comparisons"]:
        interval = "{:+.3f} [{:+.3f}, {:+.3f}]".format(row["delta_auc"], *row["ci95"])
        rt.print(f"{row['cell'] + ' - ' + row['baseline']:44s}{interval:>24s}{row['p']:8.3f}{row['p_holm']:8.3f}"
                 f"{row['p_bh']:8.3f}")  # fmt: skip
    for note in report["notes"]:
        rt.print(f"note: {note}")
