"""List the scans of a folder or a BIDS tree in a table (CSV), and say what is missing.

    python ldae/scripts/build_table.py --folder ADNI_BIDS --out STUDY/data/dataset.csv
    python ldae/scripts/build_table.py --folder SCANS --participants participants.csv --out STUDY/data/dataset.csv
    python ldae/scripts/build_table.py --folder ADNI_BIDS --dry_run        # only the listing
    python ldae/scripts/build_table.py --folder ADNI_BIDS --out STUDY/data/dataset.csv --split STUDY/split.json

BIDS: sub-X[/ses-Y][/anat]/*_T1w.nii[.gz], with sex, age and diagnosis from sub-X/sub-X_sessions.tsv (session_id,
diagnosis, age) and participants.tsv or .csv (participant_id, sex, age, diagnosis); a session's own entry wins. Without
sub- folders every .nii or .nii.gz below the folder is a scan, and its subject is what comes before `_ses-`, or the
longest id of the participants' table that its name begins with, or the whole name. Columns are found by common names
(subject, MRID, age, Age, gender, dx, group, ...). Other preparation than this: ldae/preprocess.py.
"""

from __future__ import annotations

import csv
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option

COLUMNS = ("subject", "path", "diagnosis", "session", "age", "sex", "mask_path")
NAMES = {
    "subject": ("participant_id", "subject", "subject_id", "sub", "mrid", "ptid", "rid", "id"),
    "session": ("session_id", "session", "ses", "viscode", "visit"),
    "diagnosis": ("diagnosis", "dx", "group", "diagnosis_sc", "label"),
    "age": ("age", "age_at_scan", "age_years", "age_bl"),
    "sex": ("sex", "gender", "ptgender"),
}
WORDS = {"cn": "CN", "hc": "CN", "nc": "CN", "control": "CN", "ad": "AD", "dementia": "AD", "mci": "MCI",
         "emci": "MCI", "lmci": "MCI"}  # fmt: skip


@dataclass
class Options(CommonOptions):
    folder: str = option("", "folder or BIDS tree of the scans")
    out: str = option("", "table to write; paths are written relative to its folder")
    participants: str = option("", "table of the subjects (CSV, TSV); default: participants.tsv or .csv in the folder")
    suffix: str = option("", "take only files whose name ends so, before .nii; default: _T1w in a BIDS tree, else all")
    masks: str = option("", "folder of brain masks or label maps named after the scans: fills the column mask_path")
    harmonize: bool = option(True, "write diagnoses as AD, CN, MCI where a common spelling is found")
    split: str = option("", "also make this split file, for all stages")
    val_size: float = option(0.1, "share of the subjects of each diagnosis for validation")
    test_size: float = option(0.1, "share of the subjects of each diagnosis for the test")
    split_seed: int = option(42, "seed of the split")
    dry_run: bool = option(False, "only list what is there and what is missing, write nothing")
    overwrite: bool = option(False, "replace a table or split that is already there")


# ---- tables of subjects and sessions


def read_table(path: Path) -> list[dict]:
    """Rows (text) of a CSV or TSV, with our column names where the table has one of the common ones."""
    from ldae.dataset import BLANK

    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table ({error}); save it as CSV or TSV in UTF-8") from error
    columns = {name.strip().lower(): name for name in (rows[0] if rows else {}) if name}
    found = {ours: next((columns[n] for n in names if n in columns), None) for ours, names in NAMES.items()}
    clean = []
    for row in rows:
        values = {ours: (row[theirs] or "").strip() for ours, theirs in found.items() if theirs}
        clean.append({name: value for name, value in values.items() if value.lower() not in BLANK})
    return clean


def bare(subject: str) -> str:
    return subject.removeprefix("sub-")


def known_subjects(options: Options) -> dict[str, dict]:
    """Entries of the participants' table by subject without sub-; {} if there is none."""
    candidates = [Path(options.participants)] if options.participants else [
        Path(options.folder) / name for name in ("participants.tsv", "participants.csv")]  # fmt: skip
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        if options.participants:
            raise UserError(f"no table {options.participants}; correct --participants")
        return {}
    rows = read_table(path)
    if not rows or not all("subject" in row for row in rows):
        raise UserError(f"{path} has no column of subjects ({', '.join(NAMES['subject'])}), or blank ones; add it")
    return {bare(row["subject"]): row for row in rows}


def known_sessions(subject_folder: Path, subject: str) -> dict[int, dict]:
    """Entries of sub-X_sessions.tsv by months; {} if there is none."""
    from ldae.dataset import parse_session

    path = subject_folder / f"{subject}_sessions.tsv"
    if not path.is_file():
        return {}
    return {parse_session(row.get("session", "")): row for row in read_table(path)}


# ---- the scans


def find_scans(options: Options) -> tuple[list[Path], bool]:
    """NIfTI files in order of their paths, and whether it is a BIDS tree; UserError if there are none."""
    folder = Path(options.folder)
    if not options.folder or not folder.is_dir():
        raise UserError(f"no folder {options.folder or '(--folder is not given)'}; name the folder of the scans")
    bids = any(p.is_dir() for p in folder.glob("sub-*"))
    suffix = options.suffix or ("_T1w" if bids else "")
    masks = Path(options.masks).resolve() if options.masks else None
    files = [p for pattern in ("*.nii", "*.nii.gz") for p in folder.rglob(pattern)]
    files = [p for p in files if re.sub(r"\.nii(\.gz)?$", "", p.name).endswith(suffix)]
    files = [p for p in files if not masks or not p.resolve().is_relative_to(masks)]
    if bids:
        files = [p for p in files if p.relative_to(folder).parts[0].startswith("sub-")]
    if not files:
        raise UserError(f"no scan *{suffix}.nii or *{suffix}.nii.gz below {folder}; correct --folder or --suffix")
    return sorted(files), bids


def subject_of(path: Path, folder: Path, bids: bool, known: dict[str, dict]) -> str:
    if bids:
        return path.relative_to(folder).parts[0]
    name = re.sub(r"\.nii(\.gz)?$", "", path.name)
    if "_ses-" in name:
        return name.split("_ses-")[0]
    starts = [s for s in known if name == s or re.match(re.escape(s) + r"[^0-9A-Za-z]", name)]
    return max(starts, key=len) if starts else name


def find_mask(folder: str, path: Path) -> Path | None:
    """The file in `folder` whose name begins with the scan's stem."""
    name = re.sub(r"\.nii(\.gz)?$", "", path.name)
    files = sorted(p for p in Path(folder).rglob(f"{name}*") if re.search(r"\.nii(\.gz)?$", p.name))
    return files[0] if files else None


def collect(options: Options) -> list[dict]:
    """Records with the COLUMNS, one per scan; what is not known is blank. Paths are absolute."""
    from ldae.dataset import parse_session, session_months

    files, bids = find_scans(options)
    folder, known, records = Path(options.folder), known_subjects(options), []
    for path in files:
        subject = subject_of(path, folder, bids, known)
        session = session_months(path)
        if session is None and (found := re.search(r"_ses-([0-9A-Za-z]+)", path.name)):
            session = parse_session(found.group(1)) if not found.group(1).isdigit() else None  # ses-01 is no month
        entry = dict(known.get(bare(subject), {}))
        entry |= known_sessions(folder / subject, subject).get(session, {}) if bids else {}
        diagnosis = entry.get("diagnosis", "")
        if options.harmonize:
            diagnosis = WORDS.get(diagnosis.lower(), diagnosis)
        mask = find_mask(options.masks, path) if options.masks else None
        records.append({"subject": subject, "path": path.resolve(), "diagnosis": diagnosis, "age": entry.get("age", ""),
                        "session": "" if session is None else f"M{session:03d}", "sex": entry.get("sex", ""),
                        "mask_path": mask.resolve() if mask else ""})  # fmt: skip
    return records


def listing(records: list[dict], masks: bool) -> list[str]:
    """Lines on what is there and what is missing."""
    subjects = {r["subject"] for r in records}
    classes = Counter(r["diagnosis"] or "no diagnosis" for r in records)
    lines = [f"{len(records)} scans of {len(subjects)} subjects: "
             + ", ".join(f"{n} {name}" for name, n in sorted(classes.items()))]  # fmt: skip
    for column in ("diagnosis", "session", "age", "sex", *(("mask_path",) if masks else ())):
        missing = [r for r in records if not r[column]]
        if missing:
            names = ", ".join(Path(r["path"]).name for r in missing[:3]) + (", ..." if len(missing) > 3 else "")
            lines.append(f"missing {column}: {len(missing)} of {len(records)} scans ({names})")
    return lines


def check(options: Options) -> None:
    if not options.dry_run and not options.out:
        raise UserError("--out is not given; name the table to write, or add --dry_run")
    for path in (options.out, options.split):
        if path and Path(path).exists() and not (options.overwrite or options.dry_run):
            raise UserError(f"{path} is there already; name another, or add --overwrite to replace it")


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    check(options)
    from common import tables
    from ldae import data_split, dataset

    records = collect(options)
    for line in listing(records, bool(options.masks)):
        print(line)
    if options.dry_run:
        return
    out = Path(options.out)
    base = out.resolve().parent
    for record in records:
        for column in ("path", "mask_path"):
            record[column] = Path(os.path.relpath(record[column], base)).as_posix() if record[column] else ""
    used = [c for c in COLUMNS if c in ("subject", "path") or any(r[c] for r in records)]
    # A table that no stage could read is not written: the same checks, on a file beside it.
    draft = out.with_name(f".{out.name}.draft")
    tables.write_csv(draft, records, used)
    try:
        rows = dataset.read_table(draft)
        made = data_split.make(rows, options.val_size, options.test_size, options.split_seed) if options.split else None
    except UserError as error:
        raise UserError(str(error).replace(str(draft), str(out))) from error
    finally:
        draft.unlink(missing_ok=True)
    tables.write_csv(out, records, used)
    print(f"table {out} with the columns {', '.join(used)}")
    if made:
        split, notes = made
        how = data_split.recorded(options.val_size, options.test_size, options.split_seed, "stratified", out)
        data_split.write(options.split, split, rows, how)
        for note in notes:
            print(f"note: {note}")
        print(f"split {split.hash} in {options.split}")
    print(f"next: python ldae/scripts/check.py --csv_path {out}")


if __name__ == "__main__":
    cli.run(main)
