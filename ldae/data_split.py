"""Which subjects train, validate and test: one file for all stages, by subject, stratified by diagnosis.

    python ldae/data_split.py --root STUDY          # written by the first stage too, if it is not there

ROOT/split.json is made over all subjects of the table, whatever classes a stage selects, and never changes by itself:
every output carries its hash. A file of your own needs the entry "subjects" only: {"train": [...], "val", "test"}.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

import numpy as np

from common import cli
from common.cli import CommonOptions, UserError, option

if TYPE_CHECKING:
    from ldae.dataset import Row

HERE = Path(__file__).resolve().parent
SPLITS = ("train", "val", "test")
RULES = ("stratified", "upstream")


@dataclass
class Options(CommonOptions):
    root: str = option(str(HERE), "study folder that default paths hang off")
    csv_path: str = option("", "table of all scans; default: ROOT/data/dataset.csv")
    split: str = option("", "split file; default: ROOT/split.json")
    val_size: float = option(0.1, "share of the subjects of each diagnosis for validation")
    test_size: float = option(0.1, "share of the subjects of each diagnosis for the test")
    split_seed: int = option(42, "seed of the split")
    split_rule: str = option("stratified", "stratified, or the original's unstratified group shuffle", choices=RULES)
    overwrite: bool = option(False, "replace a split that is already there: earlier results no longer match")


@dataclass(frozen=True)
class Split:
    """Subjects by split; `hash` (16 hex digits) depends on them alone."""

    subjects: dict[str, tuple[str, ...]]
    path: Path | None = None

    @property
    def hash(self) -> str:
        content = json.dumps({name: sorted(self.subjects[name]) for name in SPLITS}, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @cached_property
    def _split_of(self) -> dict[str, str]:
        return {subject: name for name in SPLITS for subject in self.subjects[name]}

    def of(self, subject: str) -> str:
        """The split of a subject; UserError if it is in none."""
        if subject in self._split_of:
            return self._split_of[subject]
        raise UserError(f"subject {subject} is not in the split {self.path or ''}; the split belongs to another table: "
                        "name the right one with --split, or remove the file and train anew")  # fmt: skip

    def rows(self, rows: list[Row], name: str) -> list[Row]:
        """The rows of train, val or test, in table order; UserError for subjects in no split, and if none is left."""
        where = {row.subject: self.of(row.subject) for row in rows}
        chosen = [row for row in rows if where[row.subject] == name]
        if not chosen:
            classes = ", ".join(sorted({row.diagnosis or "no diagnosis" for row in rows}))
            raise UserError(f"{self.path or 'split'}: none of the {len(rows)} rows ({classes}) is of split {name}; "
                            "choose other classes, or split anew with larger shares")  # fmt: skip
        return chosen


# ---- making


def diagnosis_of(rows: list[Row]) -> dict[str, str]:
    """Diagnosis of each subject in order of appearance: that of its last session which has one, else ""."""
    last: dict[str, tuple] = {}
    for row in rows:
        key = (row.diagnosis is not None, row.session or 0, row.index)
        if row.subject not in last or key > last[row.subject][0]:
            last[row.subject] = (key, row.diagnosis or "")
    return {subject: diagnosis for subject, (_, diagnosis) in last.items()}


def stratified(rows: list[Row], val_size: float, test_size: float, seed: int) -> tuple[Split, list[str]]:
    """The split of all subjects of `rows`, and notes on what could not be done.

    Each diagnosis is shuffled by itself (seed and its name: the order of the table does not matter); val and test get
    the rounded share, at least one subject each. A diagnosis of fewer than three subjects stays in train, with a note.
    UserError if that leaves val or test empty.
    """
    # Deviation (original code): it splits the selected classes anew in every run, so stages and baselines disagree.
    parts, notes = {name: [] for name in SPLITS}, []
    diagnoses = diagnosis_of(rows)
    for diagnosis in sorted(set(diagnoses.values())):
        members = sorted(subject for subject, own in diagnoses.items() if own == diagnosis)
        n = len(members)
        order = np.random.default_rng(np.random.SeedSequence([seed, *diagnosis.encode()])).permutation(n)
        n_test, n_val = (max(1, int(np.floor(n * share + 0.5))) for share in (test_size, val_size))
        if n_test + n_val >= n:
            n_test = n_val = 1 if n >= 3 else 0
        if n < 3:
            shown = f"diagnosis {diagnosis}" if diagnosis else "no diagnosis"
            notes.append(f"{shown}: {n} subject{'s' * (n > 1)}, too few for every split, in train only")
        members = [members[i] for i in order]
        parts["test"] += members[:n_test]
        parts["val"] += members[n_test : n_test + n_val]
        parts["train"] += members[n_test + n_val :]
    if not all(parts.values()):
        counts = ", ".join(f"{n} {d or 'without diagnosis'}" for d, n in sorted(Counter(diagnoses.values()).items()))
        raise UserError(f"{len(diagnoses)} subjects ({counts}) are too few to train, validate and test: at least three "
                        "of one diagnosis are needed")  # fmt: skip
    return Split({name: tuple(sorted(parts[name])) for name in SPLITS}), notes


def group_shuffle(rows: list[Row], val_size: float, test_size: float, seed: int, classes=None) -> dict[str, list[Row]]:
    """The original's rule: rows of `classes` (None: its 10 % rule), then twice a random share of their subjects.

    Not stratified, and another selection of classes gives other test subjects: kept for comparison.
    """
    from sklearn.model_selection import GroupShuffleSplit

    from ldae.dataset import frequent_classes, select

    rows = select(rows, classes or frequent_classes(rows))

    def part(rows, share):
        shuffle = GroupShuffleSplit(1, test_size=share, random_state=seed)
        try:
            rest, taken = next(shuffle.split(rows, groups=[row.subject for row in rows]))
        except ValueError as error:
            raise UserError(f"{len(rows)} rows cannot be split at {share:g} ({error}); give more subjects") from error
        return [rows[i] for i in rest], [rows[i] for i in taken]

    rest, test = part(rows, test_size)
    train, val = part(rest, val_size)
    return {"train": train, "val": val, "test": test}


def make(rows: list[Row], val_size: float, test_size: float, seed: int, rule: str = "stratified"):
    """(Split, notes) by `rule`; UserError for shares that no split can have."""
    for name, share in (("val_size", val_size), ("test_size", test_size)):
        if not 0 < share < 1 or val_size + test_size >= 1:
            raise UserError(f"--{name} {share}: val_size and test_size are shares above 0, together below 1")
    if seed < 0:
        raise UserError(f"--split_seed {seed}: seeds are 0 or more")
    if rule == "stratified":
        return stratified(rows, val_size, test_size, seed)
    parts = group_shuffle(rows, val_size, test_size, seed)
    left_out = sorted({row.subject for row in rows} - {row.subject for part in parts.values() for row in part})
    notes = [f"{len(left_out)} subjects of rare diagnoses are in train only"] if left_out else []
    parts = {name: {row.subject for row in parts[name]} for name in SPLITS}
    parts["train"] |= set(left_out)
    return Split({name: tuple(sorted(parts[name])) for name in SPLITS}), notes


# ---- the file


def read(path: str | Path) -> Split:
    """The split of a file; UserError if it is damaged, edited (the hash tells) or puts a subject into two splits."""
    path = Path(path)
    try:
        content = json.loads(path.read_text())
        subjects = {name: tuple(str(s) for s in content["subjects"][name]) for name in SPLITS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no split file ({error!r}); it needs {{\"subjects\": {{\"train\": [...], \"val\": "
                        "[...], \"test\": [...]}}, or remove it to have one made") from error  # fmt: skip
    twice = [s for s, n in Counter(s for name in SPLITS for s in subjects[name]).items() if n > 1]
    if twice:
        raise UserError(f"{path}: {len(twice)} subjects are listed twice, such as {twice[0]}; keep each in one split")
    split = Split(subjects, path)
    if content.get("hash", split.hash) != split.hash:
        raise UserError(f"{path}: its subjects do not match its hash {content['hash']}; restore the file, or delete "
                        "the entry hash if you changed them on purpose: earlier results no longer match")  # fmt: skip
    return split


def write(path: str | Path, split: Split, rows: list[Row], options: dict) -> None:
    """The split file: hash, options, counts of subjects by diagnosis, subjects."""
    from common.runlog import write_json

    diagnosis = {subject: own or "none" for subject, own in diagnosis_of(rows).items()}
    counts = {name: dict(sorted(Counter(diagnosis[s] for s in split.subjects[name]).items())) for name in SPLITS}
    write_json(Path(path), {"hash": split.hash, **options, "counts": counts,
                            "subjects": {name: list(split.subjects[name]) for name in SPLITS}})  # fmt: skip


def load_or_create(path, rows: list[Row], val_size: float, test_size: float, seed: int, rt,
                   rule: str = "stratified", table: str | Path = "") -> Split:  # fmt: skip
    """The split of the study: read, or made from `rows` (all rows of the table) where there is no file yet.

    UserError if the table has subjects that the file does not know. rt: only rank 0 writes.
    """
    path = Path(path)
    exists = any(rt.gather(path.exists()))
    if not exists:
        split, notes = make(rows, val_size, test_size, seed, rule)
        if rt.is_main:
            write(path, split, rows, recorded(val_size, test_size, seed, rule, table))
            sizes = ", ".join(f"{len(split.subjects[name])} {name}" for name in SPLITS)
            for note in (f"new split {path}: {sizes} subjects, hash {split.hash}", *notes):
                rt.print(note)
        rt.barrier()
    split = read(path)
    asked = recorded(val_size, test_size, seed, rule, "")
    made = json.loads(path.read_text())
    changed = [f"{k} {made[k]}, not {v}" for k, v in asked.items() if k != "table" and made.get(k, v) != v]
    if changed:
        rt.print(f"note: {path} stays as it was made: {'; '.join(changed)}")
    for row in rows:
        split.of(row.subject)
    return split


def recorded(val_size, test_size, seed, rule, table) -> dict:
    """What the split file says about its making."""
    return {"seed": seed, "val_size": val_size, "test_size": test_size, "rule": rule, "table": Path(table).name}


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    from ldae import dataset

    csv_path = Path(options.csv_path or Path(options.root) / "data" / "dataset.csv")
    path = Path(options.split or Path(options.root) / "split.json")
    if path.exists() and not options.overwrite:
        raise UserError(f"{path} is there already; results carry its hash: name another --split, or add --overwrite")
    rows = dataset.read_table(csv_path, missing_files=True)
    how = options.val_size, options.test_size, options.split_seed, options.split_rule
    split, notes = make(rows, *how)
    write(path, split, rows, recorded(*how, csv_path))
    for note in notes:
        print(f"note: {note}")
    for name, counts in json.loads(path.read_text())["counts"].items():
        print(f"{name}: {len(split.subjects[name])} subjects ({', '.join(f'{n} {d}' for d, n in counts.items())})")
    print(f"split {split.hash} in {path}")


if __name__ == "__main__":
    cli.run(main)
