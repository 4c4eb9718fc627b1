"""Who is in the study and what their volumes hold: tables, labels, cached volumes, sub-samples, batches, folds.

A table is a CSV in the original's layout: `file` (relative to the folder of the CSV, or absolute) and the label column
`HC_vs_LTLE_vs_RTLE_string` (HC, left, right; blank rows are dropped); `sbj_nme`, `site`, `age`, `sex` and `cluster`
(written by data_split.py: rows that must stay together) are used where present. Other columns do not matter.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from common import nifti, runtime, tables
from common.cache import VolumeCache
from common.cli import UserError
from common.runlog import progress
from neuroldm3d import preprocess
from neuroldm3d.preprocess import Preparation

CLASSES = ("HC", "TLE")
LABEL_OF = {"HC": 0, "left": 1, "right": 1, "TLE": 1}  # TLE: side unknown, as in synthetic volumes
LABEL_COLUMN = "HC_vs_LTLE_vs_RTLE_string"
FILE_COLUMN, SUBJECT_COLUMN, CLUSTER_COLUMN = "file", "sbj_nme", "cluster"
COVARIATES = ("site", "age", "sex")
EXTENSIONS = (".nii.gz", ".nii")
SYNTHETIC_RECORD = "synthetic.json"


@dataclass(frozen=True)
class Row:
    """One volume. label: 0 HC, 1 TLE; group: HC, left, right, or TLE of unknown side; name: the stem of every output.

    covariates: site, sex, cluster (str) and age (float, years), as far as the table has them.
    """

    file: Path
    name: str
    label: int
    group: str
    subject: str
    covariates: dict = field(default_factory=dict)


def stem(path: str | Path) -> str:
    """File name up to its first dot."""
    return Path(path).name.split(".")[0]


# ---- tables


def read_csv(path: str | Path) -> tuple[list[str], list[dict]]:
    """Column names and rows (text) of a CSV; UserError if it is missing, empty or no table."""
    return tables.read_csv(path, "`python neuroldm3d/make_phantom.py` makes a synthetic cohort, "
                           "`python neuroldm3d/data_split.py --csv MASTER.csv` splits your own")  # fmt: skip


def read_table(csv_path: str | Path, label_column: str = LABEL_COLUMN, root: str | Path = "") -> list[Row]:
    """Labelled rows of a table; relative `file` entries count from `root`, by default the folder of the CSV.

    Rows with a blank label are dropped and counted on stderr. UserError for a missing column, an unknown label, a
    missing file, two files of one name, an age that is no number.
    """
    csv_path = Path(csv_path)
    columns, records = read_csv(csv_path)
    for column in (FILE_COLUMN, label_column):
        if column not in columns:
            raise UserError(f"{csv_path} has no column {column} but {', '.join(columns)}; add it")
    labelled = [record for record in records if record[label_column].strip()]
    if not labelled:
        raise UserError(f"{csv_path}: no row has a label in column {label_column}; fill it in")
    if len(labelled) < len(records) and os.environ.get("RANK", "0") == "0":
        blank = f"{len(records) - len(labelled)} of {len(records)} rows of {csv_path}"
        print(f"note: {blank} have no label and are left out", file=sys.stderr)
    rows = [_row(record, label_column, Path(root or csv_path.parent), csv_path) for record in labelled]
    missing = [row.file for row in rows if not row.file.is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(rows)} files listed in {csv_path} do not exist, such as {missing[0]}; "
                        "correct the column file (relative paths count from the table's folder)")  # fmt: skip
    twice = [name for name, n in Counter(row.name for row in rows).items() if n > 1]
    if twice:
        raise UserError(f"{csv_path}: {len(twice)} names belong to several rows, such as {twice[0]}; outputs are named "
                        "after files: keep one row each or rename the files")  # fmt: skip
    return rows


def _row(record: dict, label_column: str, root: Path, csv_path: Path) -> Row:
    group, name = record[label_column].strip(), stem(record[FILE_COLUMN].strip())
    if group not in LABEL_OF:
        raise UserError(f"{csv_path}: {name} has label {group!r} in {label_column}; known are {', '.join(LABEL_OF)}")
    if not name:
        raise UserError(f"{csv_path}: a row labelled {group} names no file; fill in the column {FILE_COLUMN}")
    covariates = {c: record[c].strip() for c in (*COVARIATES, CLUSTER_COLUMN) if record.get(c, "").strip()}
    if "age" in covariates:
        try:
            covariates["age"] = float(covariates["age"])
        except ValueError:
            raise UserError(f"{csv_path}: {name} has age {covariates['age']!r}; give years or leave it blank") from None
    subject = record.get(SUBJECT_COLUMN, "").strip() or name
    return Row(root / record[FILE_COLUMN].strip(), name, LABEL_OF[group], group, subject, covariates)


def synthetic_rows(folder: str | Path, label: int | None = None) -> list[Row]:
    """Synthetic volumes in FOLDER/HC and FOLDER/TLE by class and name; `label`: only that class. UserError if none."""
    folder, rows = Path(folder), []
    for number, name in enumerate(CLASSES):
        if label in (None, number):
            files = sorted(p for p in (folder / name).glob("*") if p.name.endswith(EXTENSIONS))
            rows += [Row(file, stem(file), number, name, stem(file)) for file in files]
    if not rows:
        raise UserError(f"no synthetic volumes in {folder}/{{HC,TLE}}; make some with diffusion/save_synth.py")
    return rows


# ---- volumes


def synthetic_preparation(folder: Path) -> Preparation | None:
    """Preparation by the record in this folder or the one above; None where there is no record: real volumes."""
    record = next((f / SYNTHETIC_RECORD for f in (folder, folder.parent) if (f / SYNTHETIC_RECORD).is_file()), None)
    if record is None:
        return None
    try:
        return Preparation.from_dict(json.loads(record.read_text())["preparation"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record} does not say how its volumes are scaled ({error!r}); generate them again") from error


class Volumes:
    """Real and synthetic volumes in normalised units on the prepared grid, LAS+, decoded once and cached.

    cache_folder: LMDB folder, None for no cache. Synthetic volumes (save_synth.py) lie beside, or one folder below, a
    `synthetic.json` with the entry "preparation"; they are on the prepared grid already, in `preprocess.units`.
    """

    def __init__(self, prep: Preparation, cache_folder: str | Path | None):
        self.prep, self.cache = prep, VolumeCache(cache_folder)

    def load(self, row: Row) -> np.ndarray:
        """(D, H, W) float32; UserError if the file is missing, unreadable, not finite, constant or on another grid."""
        synthetic = self._is_synthetic(row)
        recipe = json.dumps({"synthetic": synthetic, **self.prep.to_dict()})
        return self.cache.get(row.file, recipe, lambda: self._read(row, synthetic).data)

    def fill(self, rows: list[Row], rt: runtime.Runtime) -> None:
        """Prepare every volume once, shared out over the ranks: bad ones are known before the first step."""
        mine = rt.shard(rows)
        with progress(len(mine), 0, "prepare volumes", enabled=rt.is_main) as bar:
            for row in mine:
                self.load(row)
                bar.update()
        rt.barrier()

    def tensor(self, row: Row) -> torch.Tensor:
        """(1, D, H, W) float32."""
        return torch.from_numpy(self.load(row))[None]

    def affine(self, row: Row) -> np.ndarray:
        """Affine (4, 4) of what `load` returns, without reading voxels."""
        shape, affine = nifti.header(row.file)
        affine = nifti.reorient(np.broadcast_to(np.uint8(0), shape), affine, preprocess.AXES)[1]
        if self._is_synthetic(row):
            return affine
        return preprocess.prepared_affine(affine, shape, self.prep)

    def _is_synthetic(self, row: Row) -> bool:
        made_with = synthetic_preparation(row.file.parent)
        if made_with not in (None, self.prep):
            raise UserError(f"{row.file} was made with {made_with}, here it is {self.prep}; use volumes and networks "
                            "of one preparation")  # fmt: skip
        return made_with is not None

    def _read(self, row: Row, synthetic: bool) -> nifti.Volume:
        volume = nifti.load(row.file)
        if not synthetic:
            return preprocess.prepare(volume, self.prep)
        data, affine = nifti.reorient(volume.data, volume.affine, preprocess.AXES)
        if data.shape != self.prep.shape:
            raise UserError(f"{row.file} has shape {data.shape}, its synthetic.json says {self.prep.shape}; generate "
                            "it again")  # fmt: skip
        scale = self.prep.norm_scale if self.prep.norm == "native" else 1.0
        return nifti.Volume(data / np.float32(scale), affine, row.file)


def flip(array, left_right: bool, up_down: bool):
    """Array or tensor (..., D, H, W) mirrored along axis D and/or axis W."""
    axes = [axis for axis, wanted in ((-3, left_right), (-1, up_down)) if wanted]
    return array.flip(axes) if isinstance(array, torch.Tensor) else np.flip(array, axes)


def augment(volume: np.ndarray, rng: np.random.Generator, *, up_down: bool = False) -> np.ndarray:
    """Prepared (..., D, H, W), mirrored left-right with probability 1/2; with `up_down` also upside down, 1/2.

    Seed `rng` by (seed, position in the stream): then the result does not depend on workers, ranks or a resume.
    """
    # Deviation (original code): half of its training heads stand on their head; ours only with this option.
    left_right, upside_down = rng.random(2) < 0.5
    return np.ascontiguousarray(flip(volume, left_right, up_down and upside_down))


# ---- who is drawn


def cluster_of(row: Row) -> str:
    """What must stay on one side of every split: the cluster that data_split.py wrote, else the subject."""
    return row.covariates.get(CLUSTER_COLUMN, row.subject)


def check_disjoint(tables: dict[str, list[Row]]) -> None:
    """UserError if a subject (or cluster of data_split.py) is in two of these tables; keys are their paths."""
    seen: dict[str, tuple[str, str]] = {}
    for path, rows in tables.items():
        for row in rows:
            other, name = seen.setdefault(cluster_of(row), (path, row.name))
            if other != path:
                raise UserError(f"{row.name} of {path} and {name} of {other} are of one subject; split by subject with "
                                "data_split.py")  # fmt: skip


def folds(rows: list[Row], k: int, seed: int) -> list[list[int]]:
    """Row indices of k test folds that partition the rows: clusters whole, groups (HC, left, right) in equal shares."""
    from sklearn.model_selection import StratifiedKFold

    members, groups = clusters(rows)
    rarest = min(Counter(groups).values())
    if not 2 <= k <= rarest:
        raise UserError(f"{k} folds: at least 2, and no more than the {rarest} subjects of the smallest group")
    parts = StratifiedKFold(k, shuffle=True, random_state=seed).split(np.zeros(len(groups)), groups)
    return [sorted(i for c in test for i in members[c]) for _, test in parts]


def clusters(rows: list[Row]) -> tuple[list[list[int]], list[str]]:
    """Row indices of each cluster in order of first appearance, and its most frequent group."""
    members: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(cluster_of(row), []).append(i)
    groups = [Counter(rows[i].group for i in part).most_common(1)[0][0] for part in members.values()]
    return list(members.values()), groups


def subsample(rows: list[Row], n: int, seed: int, *, exact: bool = True) -> list[Row]:
    """About n rows with the groups' shares kept, seeded; UserError for n outside 1..len(rows).

    exact: the shares are rounded such that they add up to n; otherwise each by itself as the original does (1000 of
    the published training set: 999).
    """
    import pandas as pd

    if not 0 < n <= len(rows):
        raise UserError(f"{n} real volumes asked for, the training table has {len(rows)}; ask for 1 to {len(rows)}")
    frame = pd.DataFrame({"group": [row.group for row in rows]})
    counts = frame["group"].value_counts()
    wanted = counts / len(rows) * n
    taken = apportion(dict(wanted), n) if exact else {group: round(share) for group, share in wanted.items()}
    chosen = [frame[frame["group"] == group].sample(taken[group], random_state=seed).index for group in counts.index]
    return [rows[i] for part in chosen for i in part]


def apportion(shares: dict, n: int) -> dict:
    """Whole numbers that add up to n, closest to the shares (largest remainders)."""
    whole = {key: math.floor(share + 1e-9) for key, share in shares.items()}
    order = sorted(shares, key=lambda key: whole[key] - shares[key])
    return whole | {key: whole[key] + 1 for key in order[: n - sum(whole.values())]}


def synthetic_counts(n: int, share_hc: float, *, exact: bool = True) -> tuple[int, int]:
    """Numbers of HC and TLE among n synthetic volumes; share_hc: of HC in the real training set.

    exact: they add up to n; otherwise both are cut off, as in the original (0.423 of 125: 52 + 72).
    """
    # Deviation (original code): it cuts both off and so takes one volume fewer than asked for.
    wanted = {0: share_hc * n, 1: (1 - share_hc) * n}
    counts = apportion(wanted, n) if exact else {label: math.floor(share) for label, share in wanted.items()}
    return counts[0], counts[1]


def select_matched(rows: list[Row], counts: dict[int, int], seed: int) -> list[Row]:
    """Per label `counts[label]` rows without repeats: a seeded choice that does not depend on the order of `rows`.

    Sorted by label and name. UserError if there are too few.
    """
    chosen = []
    for label, n in sorted(counts.items()):
        pool = sorted((row for row in rows if row.label == label), key=lambda row: row.name)
        if n > len(pool):
            raise UserError(f"{n} {CLASSES[label]} volumes asked for, there are {len(pool)}; ask for less or make more")
        picked = np.random.default_rng((seed, label)).choice(len(pool), n, replace=False)
        chosen += [pool[i] for i in sorted(picked)]
    return chosen


def balanced_batches(labels, batch_size: int, epoch: int, seed: int) -> list[list[int]]:
    """Index batches of one epoch, half label 0 and half label 1, in a seeded order.

    The larger class is visited once (what does not fill a batch is left out), the smaller one drawn with replacement;
    with equal sizes label 0 is the one visited once. UserError for an odd batch or classes too small for one batch.
    """
    labels, half = np.asarray(labels), batch_size // 2
    if batch_size < 2 or batch_size % 2:
        raise UserError(f"batch size {batch_size}: balanced batches need an even number")
    by_label = [np.flatnonzero(labels == label) for label in range(len(CLASSES))]
    large, small = (by_label[0], by_label[1]) if len(by_label[0]) >= len(by_label[1]) else (by_label[1], by_label[0])
    if not len(small):
        raise UserError(f"all {len(large)} training rows are of one class; balanced batches need HC and TLE")
    n = len(large) // half
    if n == 0:
        raise UserError(f"{len(labels)} training rows do not fill one balanced batch of {batch_size}; "
                        f"use a batch size of at most {2 * len(large)}")  # fmt: skip
    rng = np.random.default_rng((seed, epoch))
    visited = rng.permutation(large)[: n * half].reshape(n, half)
    drawn = rng.choice(small, (n, half))
    return rng.permuted(np.concatenate([visited, drawn], axis=1), axis=1).tolist()
