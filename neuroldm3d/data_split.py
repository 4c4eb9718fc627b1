"""Split a master table into training, validation and test by subject, stratified by group, after the audit.

    python neuroldm3d/data_split.py --csv MASTER.csv                       # 85 % train, 5.5 % val, 9.5 % test
    python neuroldm3d/data_split.py --csv MASTER.csv --selection_fraction 1  # train and val only, as the notebook did
    python neuroldm3d/data_split.py --csv MASTER.csv --duplicates group    # copies of one scan stay in one table

Writes ROOT/data_csvs/{train,val,test}.csv with every column of the master table, `file` relative to that folder, and
split.json (rule, seeds, counts, hashes) beside audit.json. Rows without a label are left out. On the published table
(1356 HC, 1071 left, 777 right; one row a subject) the defaults give the published rows: 2723 train; of the 481 others
178 val (early stopping) and 303 test.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option
from neuroldm3d import audit

if TYPE_CHECKING:
    from neuroldm3d.dataset import Row

HERE = Path(__file__).resolve().parent
SPLITS = ("train", "val", "test", "reference")


@dataclass
class Options(CommonOptions):
    csv: str = option("", "master table with the columns file and the label column; sbj_nme, site, age, sex if there")
    root: str = option(str(HERE), "study folder; tables go to ROOT/data_csvs")
    out: str = option("", "folder of the tables instead")
    label_column: str = option("HC_vs_LTLE_vs_RTLE_string", "column of the labels HC, left, right")
    held_out_fraction: float = option(0.15, "share of the subjects that are not trained on")
    seed: int = option(42, "seed of the split into training and held-out subjects")
    selection_fraction: float = option(0.37, "share of the held-out subjects for early stopping (val); the rest: test")
    selection_seed: int = option(7, "seed of the split into val and test")
    reference_fraction: float = option(0.0, "share of the training subjects set aside as FID reference (reference.csv)")
    duplicates: str = option("block", "copies of one scan under other ids: refuse, or keep in one table",
                             choices=("block", "group"))  # fmt: skip
    check_volumes: bool = option(True, "audit every volume first; see audit.py")
    threshold: float = option(audit.THRESHOLD, "two maps with a normalised MSE below this are copies of one scan")
    salt: str = option("", "replace subject ids by salted hashes; the file names stay, rename those yourself")
    overwrite: bool = option(False, "replace tables that are already there")


def two_parts(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(rest, part): `part` holds about that share of the clusters, groups (HC, left, right) in equal shares.

    With one row a cluster these are the rows, in the order, of scikit-learn's train_test_split, as in the original.
    """
    from sklearn.model_selection import train_test_split

    from neuroldm3d.dataset import clusters

    if fraction in (0, 1):
        return ([], rows) if fraction else (rows, [])
    members, groups = clusters(rows)
    try:
        rest, part = train_test_split(range(len(members)), test_size=fraction, random_state=seed, stratify=groups)
    except ValueError as error:
        subjects = f"{len(members)} subjects ({dict(Counter(groups))})"
        raise UserError(f"{subjects} cannot be split {1 - fraction:.3g} to {fraction:.3g} with every group in both "
                        f"({error}); give more rows or another share") from error  # fmt: skip
    return [rows[i] for c in rest for i in members[c]], [rows[i] for c in part for i in members[c]]


def split(rows: list[Row], options: Options) -> dict[str, list[Row]]:
    """Rows of train, val and, where their shares are not 0, test and reference; no cluster is in two of them."""
    train, held_out = two_parts(rows, options.held_out_fraction, options.seed)
    test, val = two_parts(held_out, options.selection_fraction, options.selection_seed)
    train, reference = two_parts(train, options.reference_fraction, options.selection_seed)
    return {name: part for name, part in zip(SPLITS, (train, val, test, reference), strict=True) if part}


def table_records(part: list[Row], columns: list[str], records: dict[str, dict], out: Path, salt: str) -> list[dict]:
    """The master table's records of these rows, with relative files, and `cluster` where one is known."""
    from neuroldm3d.dataset import CLUSTER_COLUMN, FILE_COLUMN, SUBJECT_COLUMN

    found = []
    for row in part:
        record = dict(records[row.name])
        record[FILE_COLUMN] = Path(os.path.relpath(row.file, out)).as_posix()
        if SUBJECT_COLUMN in record and salt:
            record[SUBJECT_COLUMN] = audit.pseudonym(row.subject, salt)
        if CLUSTER_COLUMN in columns:
            cluster = row.covariates.get(CLUSTER_COLUMN, "")
            record[CLUSTER_COLUMN] = audit.pseudonym(cluster, salt) if cluster and salt else cluster
        found.append(record)
    return found


def check(options: Options) -> Path:
    """UserError for what is wrong with the options; returns the folder of the tables."""
    if not options.csv:
        raise UserError("--csv: name the master table")
    for name, lowest in (("held_out", 0.001), ("selection", 0.0), ("reference", 0.0)):
        value = getattr(options, f"{name}_fraction")
        if not lowest <= value <= 1 or value == 1 and name != "selection":
            raise UserError(f"--{name}_fraction {value}: a share between 0 and 1")
    out = Path(options.out or Path(options.root) / "data_csvs")
    for name in (*(f"{s}.csv" for s in SPLITS), "split.json"):
        if (out / name).exists() and not options.overwrite:
            raise UserError(f"{out / name} is there already; name another folder with --out, or add --overwrite")
    if Path(options.csv).resolve() in {(out / f"{s}.csv").resolve() for s in SPLITS}:
        raise UserError(f"--csv {options.csv} would be replaced by a part of itself; name another --out")
    return out


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    out = check(options)
    from common import tables
    from common.runlog import git_revision, write_json
    from neuroldm3d import dataset

    # ---- data: labelled rows, audited
    rows = dataset.read_table(options.csv, options.label_column)
    columns, records = dataset.read_csv(options.csv)
    records = {dataset.stem(r[dataset.FILE_COLUMN].strip()): r for r in records if r[options.label_column].strip()}
    if options.check_volumes:
        allow = ("duplicates",) if options.duplicates == "group" else ()
        report, copies = audit.run({"master": rows}, threshold=options.threshold, allow=allow, salt=options.salt,
                                   num_workers=options.num_workers)  # fmt: skip
        write_json(out / "audit.json", {"tables": audit.table_hashes([options.csv], out), **report})
        print(audit.summary(report))
        audit.raise_if_blocked(report, out / "audit.json")
        if copies:
            rows = audit.clustered(rows, copies)
            columns = list(dict.fromkeys([*columns, dataset.CLUSTER_COLUMN]))

    # ---- split
    parts = split(rows, options)

    # ---- finish
    for name in SPLITS:
        if name in parts:
            kept = table_records(parts[name], columns, records, out, options.salt)
            tables.write_csv(out / f"{name}.csv", kept, columns)
        else:
            (out / f"{name}.csv").unlink(missing_ok=True)  # one of an earlier split would overlap with this one
    counts = {
        name: {"rows": len(part), **dict(sorted(Counter(r.group for r in part).items()))}
        for name, part in parts.items()
    }
    rule = ("held_out_fraction", "seed", "selection_fraction", "selection_seed", "reference_fraction")
    record = {name: getattr(options, name) for name in rule}
    record |= {"duplicates": options.duplicates, "audited": options.check_volumes, "hashed_ids": bool(options.salt)}
    record |= {"master": audit.table_hashes([options.csv], out), "counts": counts, "git_revision": git_revision(),
               "tables": audit.table_hashes([out / f"{name}.csv" for name in parts], out)}  # fmt: skip
    write_json(out / "split.json", record)
    for name, part in parts.items():
        print(f"{name}: {len(part)} rows ({', '.join(f'{n} {g}' for g, n in Counter(r.group for r in part).items())})")
    print(f"tables in {out}")


if __name__ == "__main__":
    cli.run(main)
