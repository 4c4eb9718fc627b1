"""Grey-matter maps and a master table from region label maps of real T1 (MUSE or DLMUSE), where there is no CAT12.

    python neuroldm3d/from_labels.py --labels DLMUSE_FOLDER --csv participants.csv --out STUDY
    python neuroldm3d/from_labels.py --labels DIR --csv TABLE --label_column Age --threshold 60 --out STUDY
    python neuroldm3d/from_labels.py --labels DIR --csv TABLE --label_column diagnosis --classes HC TLE --out STUDY

For trying the pipeline on real anatomy; crude beside CAT12's mwp1. A subject is turned by the best rotation between the
centroids of 14 structures and those of the MNI template, then scaled and moved along each axis until mean and SD of its
brain agree: no deformation; IXI brains overlap the template's with a Dice of 0.93. Grey matter is a label mask,
smoothed by --smooth_mm and modulated as in CAT12: divided by the enlargement, so sums are the subject's own volume.

The label is any column with two values, or a number split in two: the first class takes HC's place and the second
TLE's, which makes them no diagnosis. Writes OUT/data/gm, data/regions (codes of common/phantom.py),
data_csvs/master.csv and data/from_labels.json (rule, and each subject's matrix to MNI space). Next: data_split.py --csv
OUT/data_csvs/master.csv --root OUT.
"""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

import numpy as np

from common import cli
from common.cli import CommonOptions, UserError, option
from neuroldm3d.make_phantom import SHAPE, grid_affine

HERE = Path(__file__).resolve().parent
GREY = ("frontal", "parietal", "precuneus", "temporal", "occipital", "deep_grey", "hippocampus_left",
        "hippocampus_right", "cerebellum_grey")  # fmt: skip
GM, REGIONS, MASTER, RECORD = "data/gm", "data/regions", "data_csvs/master.csv", "data/from_labels.json"
ENLARGEMENT = (0.4, 3.0)  # of a head's volume on the way to the template: others are no adult head, or not in mm


@dataclass
class Options(CommonOptions):
    labels: str = option("", "folder of label maps, one per subject, whose names begin with the subject's id")
    csv: str = option("", "table of the subjects")
    out: str = option(str(HERE), "study folder that gets data/ and data_csvs/master.csv")
    id_column: str = option("MRID", "column of the ids")
    label_column: str = option("Sex", "column that becomes the label")
    classes: tuple[str, str] = option(("F", "M"), "values in the place of HC and of TLE; other rows have no label")
    threshold: float = option(float("inf"), "split a number instead: below it HC's place, from it on TLE's; inf: no")
    age_column: str = option("Age", "column of the age, if there is one", unit="years")
    sex_column: str = option("Sex", "column of the sex, if there is one")
    shape: tuple[int, int, int] = option(SHAPE, "grid, as in make_phantom.py (113 137 113: 1.5 mm)", unit="voxels")
    smooth_mm: float = option(3.0, "width (FWHM) of the smoothing that makes fractions of masks", unit="mm")
    overwrite: bool = option(False, "replace maps and table that are already there")


# ---- who


def read_subjects(options: Options) -> list[dict]:
    """Rows {"id", "path", "group", "age", "sex"} of labelled subjects with a label map; UserError for a bad table."""
    from neuroldm3d import dataset

    columns, records = dataset.read_csv(options.csv)
    for column in (options.id_column, options.label_column):
        if column not in columns:
            raise UserError(f"{options.csv} has no column {column} but {', '.join(columns)}; name another")
    files = sorted(p for p in Path(options.labels).glob("*") if p.name.endswith(dataset.EXTENSIONS))
    if not files:
        raise UserError(f"no .nii or .nii.gz in {options.labels}; name the folder of label maps with --labels")
    subjects, without = [], []
    for record in records:
        key, group = record[options.id_column].strip(), group_of(record[options.label_column].strip(), options)
        if not group:
            continue
        found = [p for p in files if dataset.stem(p) == key or p.name.startswith((f"{key}_", f"{key}."))]
        if not key or "." in key or "/" in key or len(found) > 1:
            raise UserError(f"{options.csv}: id {key!r} fits {len(found)} files in {options.labels}; ids are the part "
                            "of one file's name before _ or ., without dots")  # fmt: skip
        covariates = {"age": record.get(options.age_column, ""), "sex": record.get(options.sex_column, "")}
        if found:
            subjects.append({"id": key, "path": found[0], "group": group} | covariates)
        else:
            without.append(key)
    twice = [key for key, n in Counter(row["id"] for row in subjects).items() if n > 1]
    if twice:
        raise UserError(f"{options.csv}: {twice[0]} is in several rows; keep one")
    for group in ("HC", "TLE"):
        if not any(row["group"] == group for row in subjects):
            raise UserError(f"no label map in {options.labels} belongs to a subject in {group}'s place by column "
                            f"{options.label_column} of {options.csv}; check --classes or --threshold")  # fmt: skip
    if without:
        print(f"note: {len(without)} labelled subjects, such as {without[0]}, have no label map", file=sys.stderr)
    return subjects


def group_of(value: str, options: Options) -> str:
    """HC, TLE, or nothing for a row without label; UserError if a value cannot be compared with --threshold."""
    if np.isinf(options.threshold):
        return dict(zip(options.classes, ("HC", "TLE"), strict=True)).get(value, "")
    try:
        return "TLE" if value and float(value) >= options.threshold else "HC" if value else ""
    except ValueError:
        raise UserError(f"{options.csv}: {options.label_column} is {value!r}, no number to compare") from None


# ---- where


def our_codes(labels: np.ndarray) -> np.ndarray:
    """Label map with the codes of common.phantom.LABELS in place of MUSE's; other codes become 0."""
    from common import phantom

    table = np.zeros(max(int(labels.max()), 0) + 1, np.int16)
    for name, numbers in phantom.MUSE.items():
        table[[n for n in numbers if n < len(table)]] = phantom.LABELS[name]
    return table[np.maximum(labels, 0)]


@dataclass(frozen=True)
class Anatomy:
    """World positions (mm): centroids of structures by code, and mean and covariance of the brain without fluid."""

    centroids: dict[int, np.ndarray]
    mean: np.ndarray
    covariance: np.ndarray


def anatomy(labels: np.ndarray, affine: np.ndarray) -> Anatomy:
    """Of a label map (D, H, W) in our codes."""
    from common.phantom import LABELS

    inside = labels > LABELS["csf"]  # fluid outside the brain depends on who drew the map
    points, codes = np.argwhere(inside) @ affine[:3, :3].T + affine[:3, 3], labels[inside]
    return Anatomy({int(c): points[codes == c].mean(0) for c in np.unique(codes)}, points.mean(0), np.cov(points.T))


@lru_cache(maxsize=1)
def template() -> Anatomy:
    """Of the MNI template that the phantom is made from."""
    from common import phantom

    base = phantom.template()
    tissue, affine = base["tissue"][:3].numpy(), np.eye(4)
    affine[:3, 3] = base["origin"]
    labels = phantom.LABEL_OF[base["region"][0].numpy().astype(int), tissue.argmax(0)]
    return anatomy(np.where(tissue.sum(0) > 0.5, labels, 0), affine)


def to_template(subject: Anatomy, where) -> np.ndarray:
    """Matrix (4, 4) from a subject's world to MNI space; UserError (naming `where`) if this is no whole adult head."""
    target = template()
    missing = sorted(target.centroids.keys() - subject.centroids.keys())
    if missing:
        raise UserError(f"{where} lacks {len(missing)} of {len(target.centroids)} structures; give whole brains in "
                        "MUSE or DLMUSE codes, in mm")  # fmt: skip
    codes = sorted(target.centroids)
    a, b = (np.stack([who.centroids[c] for c in codes]) for who in (subject, target))
    u, _, vt = np.linalg.svd((b - b.mean(0)).T @ (a - a.mean(0)))  # best rotation between the centroids (Kabsch 1976)
    rotation = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
    scale = np.sqrt(np.diag(target.covariance) / np.diag(rotation @ subject.covariance @ rotation.T))
    matrix = np.eye(4)
    matrix[:3, :3] = scale[:, None] * rotation
    matrix[:3, 3] = target.mean - matrix[:3, :3] @ subject.mean
    if not ENLARGEMENT[0] < scale.prod() < ENLARGEMENT[1]:
        raise UserError(f"{where} would be enlarged {scale.prod():.2g} times to fit the template; give whole adult "
                        "brains in mm")  # fmt: skip
    return matrix


def transform(path: Path) -> np.ndarray:
    """`to_template` of a label map on disk."""
    from common import nifti

    volume = nifti.load_labels(path)
    labels = our_codes(volume.data)
    if not (labels > 1).any():
        raise UserError(f"{path} has no MUSE label; give label maps of whole brains")
    return to_template(anatomy(labels, volume.affine), path)


# ---- what


def grey_matter(volume, matrix: np.ndarray, options: Options):
    """Grey-matter map (D, H, W) float32 and region map int16 on the grid of --shape, LAS+, with their affine.

    volume: label map in MUSE codes (nifti.Volume); matrix: from its world to MNI space.
    """
    from scipy import ndimage

    from common import nifti
    from common.phantom import LABELS

    labels, grid = our_codes(volume.data), grid_affine(options.shape)
    mask = np.isin(labels, [LABELS[name] for name in GREY]).astype(np.float32)
    fraction = ndimage.gaussian_filter(mask, options.smooth_mm / 2.3548 / np.array(volume.spacing_mm))
    moved = matrix @ volume.affine
    grey = nifti.resample_to(nifti.Volume(fraction, moved), options.shape, grid).data / np.linalg.det(matrix[:3, :3])
    regions = nifti.resample_to(nifti.Volume(labels, moved), options.shape, grid, order=0).data
    return np.maximum(grey, 0).astype(np.float32), regions, grid


# ---- the script


def check(options: Options) -> None:
    if not options.labels or not options.csv:
        raise UserError("--labels and --csv: name the folder of label maps and the table of the subjects")
    if min(options.shape) < 16 or max(options.shape) > 192 or not 0 <= options.smooth_mm < 20:
        raise UserError(
            f"--shape {options.shape}, --smooth_mm {options.smooth_mm}: axes of 16 to 192 voxels, 0 to 20 mm"
        )
    if len(set(options.classes)) < 2:
        raise UserError(f"--classes {' '.join(options.classes)}: two different values")
    for name in (GM, REGIONS, MASTER, RECORD):
        path = Path(options.out) / name
        if not options.overwrite and (path.is_file() or path.is_dir() and any(path.iterdir())):
            raise UserError(f"{path} already holds data; give another --out, or --overwrite to replace it")


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    check(options)
    from common import nifti
    from common.checkpoint import replacing
    from common.runlog import progress, write_json
    from neuroldm3d.dataset import FILE_COLUMN, LABEL_COLUMN, SUBJECT_COLUMN

    # ---- data: every label map is read once before anything is written
    out, subjects = Path(options.out), read_subjects(options)
    with progress(len(subjects), 0, "align") as bar:
        for row in subjects:
            row["matrix"] = transform(row["path"])
            bar.update()

    # ---- loop over subjects
    with progress(len(subjects), 0, "grey matter") as bar:
        for row in subjects:
            grey, regions, grid = grey_matter(nifti.load_labels(row["path"]), row["matrix"], options)
            nifti.save(out / GM / f"{row['id']}.nii.gz", grey, grid)
            nifti.save(out / REGIONS / f"{row['id']}.nii.gz", regions, grid, dtype=np.int16)
            bar.update()

    # ---- finish
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([SUBJECT_COLUMN, FILE_COLUMN, LABEL_COLUMN, "age", "sex"])
    writer.writerows([r["id"], f"../{GM}/{r['id']}.nii.gz", r["group"], r["age"], r["sex"]] for r in subjects)
    with replacing(out / MASTER) as file:
        file.write(table.getvalue().encode())
    low, high = options.classes if np.isinf(options.threshold) else (f"< {options.threshold:g}", "the others")
    rule = f"column {options.label_column}: {low} in the place of HC, {high} in the place of TLE; not a diagnosis"
    matrices = {row["id"]: row["matrix"].tolist() for row in subjects}
    write_json(out / RECORD, {"source": "region label maps of real T1", "label": rule, "shape": list(options.shape),
                              "smooth_mm": options.smooth_mm, "to_mni": matrices})  # fmt: skip
    counts = Counter(row["group"] for row in subjects)
    print(f"{len(subjects)} subjects in {out}: {counts['HC']} as HC, {counts['TLE']} as TLE ({rule})")


if __name__ == "__main__":
    cli.run(main)
