"""Who is in the study and what the scans hold: the table, class labels, prepared volumes with a cache.

A table is a CSV in the original's layout, one row per scan: subject, path (absolute or relative to the folder of the
CSV), diagnosis, session, age, sex, latent_path, mask_path. A stage asks for the columns that it uses (`need`); others
may be missing or blank. Sessions are months ("M006", "ses-M006", "6", "bl"), else taken from `ses-M006` in the path.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import checkpoint, nifti, tables
from common.cache import VolumeCache
from common.cli import UserError
from ldae import preprocess
from ldae.preprocess import Preparation

COLUMNS = ("subject", "path", "diagnosis", "session", "age", "sex", "latent_path", "mask_path")
CLASSES = ("AD", "CN", "MCI")
BLANK = ("", "nan", "na", "n/a", "none")
BASELINE = ("bl", "sc", "baseline")


@dataclass(frozen=True)
class Row:
    """One scan. index: its row in the table (from 0); session: months since the first visit; age: years at the scan.

    scan: unique, safe in file names, the stem of every output: `<subject>_M006`, or the file's stem without session.
    What the table does not say is None.
    """

    index: int
    subject: str
    session: int | None
    path: Path
    diagnosis: str | None
    age: float | None
    sex: str | None
    scan: str
    latent_path: Path | None = None
    mask_path: Path | None = None


def stem(path: str | Path) -> str:
    """File name without .nii, .nii.gz."""
    return re.sub(r"\.nii(\.gz)?$", "", Path(path).name, flags=re.IGNORECASE)


def fingerprint(rows: list[Row]) -> str:
    """Sixteen hex digits of the names and files of these scans, in their order."""
    text = "\n".join(f"{row.scan} {checkpoint.file_hash(row.path)}" for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def class_index(classes) -> dict[str, int]:
    """Label index of each selected class, its alphabetical rank as in the original: {"AD": 0, "CN": 1, "MCI": 2}."""
    return {name: i for i, name in enumerate(sorted(set(classes)))}


# ---- tables


def read_csv(path: str | Path) -> tuple[list[str], list[dict]]:
    """Column names and rows (text) of a CSV; UserError if it is missing, empty or no table."""
    return tables.read_csv(path, "`python ldae/make_phantom.py` makes a synthetic cohort, "
                           "`python ldae/scripts/build_table.py FOLDER` lists your own scans")  # fmt: skip


def read_table(
    csv_path: str | Path, *, need=("subject", "path"), classes=None, missing_files: bool = False
) -> list[Row]:
    """Rows of a table in its order; only the columns in `need` must be there.

    Rows in which a needed entry is blank are left out and counted on stderr; with `classes` also (uncounted) those of
    other diagnoses. UserError for a missing column or class, a blank subject or path, an age or a session that cannot
    be read, a scan twice, a file under two subjects, missing files (unless `missing_files`), no rows left.
    """
    # Deviation (original code): it needs latent_path and age in every stage, and never reads session.
    csv_path = Path(csv_path)
    columns, records = read_csv(csv_path)
    need = tuple(dict.fromkeys((*need, "diagnosis"))) if classes else tuple(need)
    absent = [c for c in dict.fromkeys(("subject", "path", *need)) if c not in columns]
    from_path = all(session_months(r.get("path", "")) is not None for r in records)
    if "session" in absent and from_path:
        absent.remove("session")
    if absent:
        hint = " (or write it as ses-M006 into the paths)" if "session" in absent else ""
        raise UserError(f"{csv_path} has no column {', '.join(absent)} but {', '.join(columns)}; add it{hint}")
    rows = [_row(i, record, csv_path) for i, record in enumerate(records)]
    _check_unique(rows, csv_path)
    if not missing_files:
        _check_files(rows, csv_path)
    for column in need:
        known = [row for row in rows if getattr(row, column) is not None]
        if len(known) < len(rows) and os.environ.get("RANK", "0") == "0":
            out_of = f"{len(rows) - len(known)} of {len(rows)} rows of {csv_path}"
            print(f"note: {out_of} have no {column} and are left out", file=sys.stderr)
        rows = known
    if rows:
        rows = select(rows, classes, csv_path)
    if not rows:
        raise UserError(f"{csv_path}: no row has all of {', '.join(need)}; fill them in")
    return rows


def select(rows: list[Row], classes, where: str | Path = "the table") -> list[Row]:
    """Rows whose diagnosis is one of `classes`; all for None or (). UserError for a class that no row has."""
    if not classes:
        return rows
    present = Counter(row.diagnosis for row in rows if row.diagnosis)
    unknown = sorted(set(classes) - set(present))
    if unknown:
        there = ", ".join(f"{name} ({n})" for name, n in sorted(present.items())) or "none"
        raise UserError(f"{where}: no row has diagnosis {', '.join(unknown)}; there are: {there}")
    return [row for row in rows if row.diagnosis in classes]


def frequent_classes(rows: list[Row], share: float = 0.1) -> list[str]:
    """The original's rule where no classes are named: those with at least `share` of the largest class' rows."""
    counts = Counter(row.diagnosis for row in rows if row.diagnosis)
    return sorted(name for name, n in counts.items() if n >= share * max(counts.values()))


def session_months(path: str | Path) -> int | None:
    """Months of the pattern ses-M006 in a path, as the original reads it; None without one."""
    found = re.search(r"ses-M(\d+)", str(path))
    return int(found.group(1)) if found else None


def parse_session(text: str) -> int | None:
    """Months of "M006", "ses-M006", "m06", "6", "bl"; None if it says nothing of the kind."""
    text = text.strip().lower().removeprefix("ses-")
    if text in BASELINE:
        return 0
    found = re.fullmatch(r"m?(\d+)(\.0+)?", text)
    return int(found.group(1)) if found else None


def scan_name(subject: str, session: int | None, path: str | Path) -> str:
    """`<subject>_M006`; without a session the file's stem, led by the subject if it does not name it."""
    if session is not None:
        name = f"{subject}_M{session:03d}"
    else:
        name = stem(path) if subject in stem(path) else f"{subject}_{stem(path)}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _text(record, column):
    value = (record.get(column) or "").strip()
    return "" if value.lower() in BLANK else value


def _row(index: int, record: dict, csv_path: Path) -> Row:
    where = f"{csv_path}: row {index + 2}"
    subject, path = _text(record, "subject"), _text(record, "path")
    if not subject or not path:
        raise UserError(f"{where} has no {'path' if subject else 'subject'}; fill it in")
    session = session_months(path)
    if _text(record, "session"):
        session = parse_session(record["session"])
        if session is None:
            raise UserError(f"{where} has session {record['session']!r}; write months, such as M006, or leave it blank")
    try:
        age = float(_text(record, "age")) if _text(record, "age") else None
    except ValueError:
        raise UserError(f"{where} has age {record['age']!r}; give years or leave it blank") from None
    if age is not None and not 0 <= age < 130:
        raise UserError(f"{where} has age {age:g}; give years or leave it blank")
    sex = _text(record, "sex")
    sex = {"female": "F", "f": "F", "male": "M", "m": "M"}.get(sex.lower(), sex) or None
    files = (_text(record, column) for column in ("latent_path", "mask_path"))
    return Row(index, subject, session, csv_path.parent / path, _text(record, "diagnosis") or None, age, sex,
               scan_name(subject, session, path), *(csv_path.parent / f if f else None for f in files))  # fmt: skip


def _check_unique(rows: list[Row], csv_path: Path) -> None:
    files, scans = {}, {}
    for row in rows:
        line = f"{csv_path}: rows {{}} and {row.index + 2}"
        other = files.setdefault(os.path.abspath(row.path), row)
        if other is not row:
            who = f"one file under the subjects {other.subject} and {row.subject}"
            what = who if other.subject != row.subject else "one scan twice"
            raise UserError(f"{line.format(other.index + 2)} are {what} ({row.path}); remove one of them")
        other = scans.setdefault(row.scan, row)
        if other is not row:
            raise UserError(f"{line.format(other.index + 2)} are both {row.scan} ({other.path} and {row.path}); "
                            "outputs are named after subject and session: keep one scan of each")  # fmt: skip


def _check_files(rows: list[Row], csv_path: Path) -> None:
    missing = [row.path for row in rows if not row.path.is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(rows)} files listed in {csv_path} do not exist, such as {missing[0]}; "
                        "correct the column path (relative paths count from the table's folder)")  # fmt: skip


def labels(rows: list[Row], classes) -> np.ndarray:
    """(N,) int64 label index of every row, see `class_index`."""
    index = class_index(classes)
    return np.array([index[row.diagnosis] for row in rows], np.int64)


def ages(rows: list[Row]) -> np.ndarray:
    """(N,) float32 ages in years, NaN where the table has none."""
    return np.array([math.nan if row.age is None else row.age for row in rows], np.float32)


# ---- volumes


class Volumes:
    """Prepared scans, decoded once and cached. cache_folder: LMDB folder, None for no cache."""

    def __init__(self, prep: Preparation, cache_folder: str | Path | None):
        self.prep, self.cache = prep, VolumeCache(cache_folder)

    def load(self, row: Row) -> np.ndarray:
        """(D, H, W) float32; UserError naming the file if it is missing, unreadable, not finite or constant."""
        recipe: dict = {"volume": self.prep.to_dict()}
        if self.prep.mask == "file" and row.mask_path:
            recipe["mask"] = [str(row.mask_path), row.mask_path.stat().st_mtime_ns if row.mask_path.exists() else None]

        def prepared():
            return preprocess.prepare(self.native(row), self.prep).data

        return self.cache.get(row.path, json.dumps(recipe), prepared)

    def tensor(self, row: Row) -> torch.Tensor:
        """(1, D, H, W) float32."""
        return torch.from_numpy(self.load(row))[None]

    def native(self, row: Row) -> nifti.Volume:
        """The scan as read (with mask "file": masked), for `preprocess.to_native`."""
        volume = preprocess.read(row.path, self.prep)
        if self.prep.mask != "file":
            return volume
        if row.mask_path is None:
            raise UserError(f"{row.path}: mask 'file', and the table has no mask_path for it; fill it in, or choose "
                            "another mask")  # fmt: skip
        return preprocess.masked(volume, preprocess.read(row.mask_path, self.prep))

    def affine(self, row: Row) -> np.ndarray:
        """Affine (4, 4) of what `load` returns; voxels are read only for crop "head"."""
        if self.prep.crop == "head":
            return preprocess.plan(self.native(row), self.prep).prepared_affine
        shape, affine = preprocess.header(row.path, self.prep)
        return preprocess.prepared_affine(affine, shape, self.prep)
