"""Who is trained, validated and tested on: splits or folds without leaks, real and synthetic volumes, and their record.

Two rows belong together if they are of one subject or, under two ids, nearly the same image (the audit); what belongs
together never crosses from training to validation or test.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import checkpoint, runtime
from common.cli import UserError
from common.training import read_record
from neuroldm3d import audit, dataset
from neuroldm3d.classifier import metrics
from neuroldm3d.classifier.config import Config
from neuroldm3d.dataset import CLASSES, Row
from neuroldm3d.preprocess import Preparation

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Fold:
    """One training and its tests. train: real rows; synthetic: further training rows; val, test: always real."""

    number: int
    train: list[Row]
    synthetic: list[Row]
    val: list[Row]
    test: list[Row]

    @property
    def rows(self) -> list[Row]:
        """All training rows."""
        return self.train + self.synthetic


def preparation(config: Config) -> Preparation:
    return Preparation(config.shape, config.crop_start, config.norm, config.norm_scale)


def open_volumes(config: Config) -> dataset.Volumes:
    return dataset.Volumes(preparation(config), None if config.cache == "none" else config.cache)


def read_tables(config: Config) -> dict[str, list[Row]]:
    """Rows of the three tables; UserError if a subject is in two of them (which folds over all of them may have)."""
    tables = {split: dataset.read_table(getattr(config, f"{split}_csv"), config.label_column) for split in SPLITS}
    if not divides_all(config):
        dataset.check_disjoint({getattr(config, f"{split}_csv"): rows for split, rows in tables.items()})
    return tables


def divides_all(config: Config) -> bool:
    return config.leave_site_out or (bool(config.folds) and config.fold_pool == "all")


def compose(tables: dict[str, list[Row]], twins: list[list[str]], config: Config, rt: runtime.Runtime) -> list[Fold]:
    """The folds of a run, one without --folds; UserError if twins cross splits or there are too few rows."""
    if divides_all(config):
        everyone = list({row.name: row for rows in tables.values() for row in rows}.values())
        if config.num_synth_samples:
            raise UserError("folds over all tables test on subjects that the generator of the synthetic volumes was "
                            "trained on: --folds with --fold_pool held_out, or --num_synth_samples 0")  # fmt: skip
        parts = divide_all(joined(everyone, twins), config)
    else:
        tables = separate(tables, twins, config, rt)
        parts = [(tables["train"], tables["val"], tables["test"])]
        if config.folds:
            parts = divide_held_out(tables["train"], joined(tables["val"] + tables["test"], twins), config)
    folds = []
    for number, (train, val, test) in enumerate(parts, 1):
        real, synthetic = choose_training(train, config)
        folds.append(Fold(number, real, synthetic, val, test))
    check_classes(folds)
    return folds


# ---- who belongs together


def find_twins(tables: dict[str, list[Row]], volumes: dataset.Volumes, config: Config, rt) -> list[list[str]]:
    """Names of rows that show nearly the same image under several ids, group by group; none with --duplicates keep."""
    if config.duplicates == "keep":
        return []
    everyone = {row.name: row for rows in tables.values() for row in rows}
    groups = audit.duplicate_groups(list(everyone.values()), volumes, rt)
    for group in groups:
        rt.print(f"note: nearly the same image: {', '.join(group)}")
    return groups


def separate(tables: dict[str, list[Row]], twins: list[list[str]], config: Config, rt) -> dict[str, list[Row]]:
    """The tables without twins across splits: UserError, or (--duplicates exclude) the training side leaves."""
    where = {row.name: split for split, rows in tables.items() for row in rows}
    leaving = set()
    for group in twins:
        splits = {where[name] for name in group}
        if len(splits) == 1:
            continue
        if config.duplicates == "block":
            pair = [next(name for name in group if where[name] == split) for split in sorted(splits)[:2]]
            raise UserError(f"{pair[0]} ({where[pair[0]]}) and {pair[1]} ({where[pair[1]]}) are nearly the same image: "
                            "split again with data_split.py, or give --duplicates exclude")  # fmt: skip
        last = next(split for split in reversed(SPLITS) if split in splits)
        leaving |= {name for name in group if where[name] != last}
    if leaving:
        rt.print(f"--duplicates exclude: {len(leaving)} volumes leave training or validation: {sorted(leaving)}")
    return {split: [row for row in rows if row.name not in leaving] for split, rows in tables.items()}


def joined(rows: list[Row], twins: list[list[str]]) -> list[Row]:
    """The rows with `cluster` set such that subjects and twins stay together."""
    place = {row.name: i for i, row in enumerate(rows)}
    return audit.clustered(rows, [[place[name] for name in group if name in place] for group in twins])


# ---- folds


def divide_all(rows: list[Row], config: Config) -> list[tuple[list[Row], list[Row], list[Row]]]:
    """True cross-validation: every row is tested once, by a network that saw none of its cluster."""
    # Deviation (original code): its "five folds" are one, or five test sets of one fixed training set.
    parts = []
    for test in sites(rows) if config.leave_site_out else dataset.folds(rows, config.folds, config.split_seed):
        held_out = {dataset.cluster_of(rows[i]) for i in test}  # someone scanned at two sites leaves training too
        rest = [row for row in rows if dataset.cluster_of(row) not in held_out]
        rarest = min(Counter(dataset.clusters(rest)[1]).values())  # a small study cannot be cut as finely
        val = set(dataset.folds(rest, max(2, min(round(1 / config.fold_val), rarest)), config.split_seed)[0])
        train = [row for i, row in enumerate(rest) if i not in val]
        parts.append((train, [rest[i] for i in sorted(val)], [rows[i] for i in sorted(test)]))
    return parts


def sites(rows: list[Row]) -> list[list[int]]:
    """Row indices of each site, in the order of their names; UserError without at least two named sites."""
    found = [row.covariates.get("site", "") for row in rows]
    if "" in found or len(set(found)) < 2:
        raise UserError("--leave_site_out: the tables need a column site, filled in every row, with at least two sites")
    return [[i for i, site in enumerate(found) if site == name] for name in sorted(set(found))]


def divide_held_out(train: list[Row], rows: list[Row], config: Config) -> list[tuple[list[Row], list[Row], list[Row]]]:
    """Rotating tests of one training table: each fold of the others is tested, the rest of them validates."""
    parts = []
    for test in map(set, dataset.folds(rows, config.folds, config.split_seed)):
        val = [row for i, row in enumerate(rows) if i not in test]
        parts.append((train, val, [rows[i] for i in sorted(test)]))
    return parts


# ---- training rows


def choose_training(train: list[Row], config: Config) -> tuple[list[Row], list[Row]]:
    """Real and synthetic training rows as --num_samples and --num_synth_samples ask, drawn with --sample_seed."""
    real, synthetic = [], []
    if config.num_samples == -1:
        real = train
    elif config.num_samples:
        real = dataset.subsample(train, config.num_samples, config.sample_seed, exact=config.exact_counts)
    if config.num_synth_samples:
        share_hc = sum(row.label == 0 for row in train) / len(train)
        n = dataset.synthetic_counts(config.num_synth_samples, share_hc, exact=config.exact_counts)
        pool = dataset.synthetic_rows(config.synthetic)
        synthetic = dataset.select_matched(pool, dict(enumerate(n)), config.sample_seed)
    return real, synthetic


def generator_record(config: Config, rt: runtime.Runtime) -> dict | None:
    """What the generator of the synthetic volumes was trained on, with a note where that may reach into the tests."""
    path = Path(config.synthetic) / dataset.SYNTHETIC_RECORD
    if not config.num_synth_samples or not path.is_file():
        return None
    about = read_record(path, (), "generate the volumes again").get("training")
    known = bool(about) and about["csv_hash"] == checkpoint.file_hash(config.train_csv)
    if not known:
        rt.print(f"note: the generator of {config.synthetic} was not trained on {config.train_csv}: make sure that it "
                 "has seen no validation or test subject")  # fmt: skip
    return {"trained_on": about, "same_training_table": known}


def check_classes(folds: list[Fold]) -> None:
    for fold in folds:
        for split, rows in (("training", fold.rows), ("validation", fold.val), ("test", fold.test)):
            if len({row.label for row in rows}) < 2:
                raise UserError(f"the {split} set of fold {fold.number} has {len(rows)} rows of one class or none; "
                                "it needs HC and TLE: give more rows or fewer --folds")  # fmt: skip


def all_rows(folds: list[Fold]) -> list[Row]:
    """Every row of every fold, once."""
    return list({row.file: row for fold in folds for row in fold.rows + fold.val + fold.test}.values())


# ---- records


def parts(fold: Fold) -> dict[str, list[Row]]:
    return {"train_real": fold.train, "train_synthetic": fold.synthetic, "validation": fold.val, "test": fold.test}


def counts(fold: Fold) -> dict:
    """Volumes per part and class."""
    tally = {name: Counter(row.label for row in rows) for name, rows in parts(fold).items()}
    return {name: {c: count[i] for i, c in enumerate(CLASSES)} for name, count in tally.items()}


def names(fold: Fold) -> dict[str, list[str]]:
    """Names per part in the order of use: what a resumed run must share."""
    return {f"names_{name}": [row.name for row in rows] for name, rows in parts(fold).items()}


def files(fold: Fold, root: Path) -> dict:
    """Content of files.json: counts, and the files of every part."""
    return {"counts": counts(fold)} | {n: [portable(row.file, root) for row in rows] for n, rows in parts(fold).items()}


def portable(path: Path, root: Path) -> str:
    """The path relative to `root`, or without its folders where it lies elsewhere."""
    path, root = path.resolve(), root.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def site_only_auc(fold: Fold) -> dict | None:
    """AUC on the test rows of the share of TLE at each row's site in training: what knowing the site alone gives."""
    if not all("site" in row.covariates for row in fold.train + fold.test) or not fold.train:
        return None
    tally = defaultdict(Counter)
    for row in fold.train:
        tally[row.covariates["site"]][row.label] += 1
    shares = {site: (count[1] + 1) / (count.total() + 2) for site, count in tally.items()}
    labels = np.array([row.label for row in fold.test])
    scores = np.array([shares.get(row.covariates["site"], 0.5) for row in fold.test])  # 0.5: site new to the test
    areas, covariance = metrics.delong(labels, scores[None])
    _, low, high = metrics.auc_interval(areas, covariance)[0].tolist()
    return {"auc": float(areas[0]), "ci95": [low, high], "sites": len(tally)}
