"""Look at a study before anything is trained on it: copies under other ids, leaks, grids, values, site and class.

    python neuroldm3d/audit.py --csv data_csvs/train.csv data_csvs/val.csv data_csvs/test.csv
    python neuroldm3d/audit.py --csv MASTER.csv --report STUDY/audit.json

Writes a report and prints what it found; exit status 2 with one line if something must be mended first. Every volume is
read once: about a tenth of a second for 113 x 137 x 113 voxels.

Near copies are found by the normalised MSE of two maps, after each was averaged to at most 34 voxels a side and
standardised: their mean squared difference over that of unrelated maps of this cohort. 0 is the same map up to scale,
about 1 are two people; rescaled, smoothed, noisier or half a voxel shifted copies of 1.5 mm maps stay below 0.2. Copies
mirrored left-right are found too. data_split.py audits before it splits, the classifier before it folds.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

import numpy as np

from common import cli
from common.cli import CommonOptions, UserError, option

if TYPE_CHECKING:
    from neuroldm3d.dataset import Row, Volumes

HERE = Path(__file__).resolve().parent
# The original's authors later excluded latents that differ by less than 0.05, 0.29 of the median nearest distance.
THRESHOLD = 0.3
SIDE = 34  # voxels of a descriptor along its longest axis, at most
SITE_AUC, SITE_ROWS = 0.6, 5  # what is worth a warning; sites smaller than this are not
KINDS = ("duplicates", "subjects", "grid")  # findings that --allow can turn into warnings


@dataclass
class Options(CommonOptions):
    root: str = option(str(HERE), "study folder that default paths hang off")
    csv: tuple[str, ...] = option((), "tables; default: those of ROOT/data_csvs/{train,val,test}.csv that exist")
    report: str = option("", "report; default: ROOT/data_csvs/audit.json")
    label_column: str = option("HC_vs_LTLE_vs_RTLE_string", "column of the labels HC, left, right")
    threshold: float = option(THRESHOLD, "two maps with a normalised MSE below this are copies of one scan")
    allow: tuple[str, ...] = option((), "findings that warn but do not block", choices=KINDS)
    salt: str = option("", "write salted hashes in place of subject ids and file names")
    overwrite: bool = option(False, "replace an earlier report")


# ---- volumes


@dataclass
class Facts:
    """What one volume is like. problem: why it cannot be used, or empty; then the rest is known."""

    problem: str = ""
    fingerprint: str = ""
    descriptor: np.ndarray | None = None
    shape: tuple = ()
    affine: np.ndarray | None = None
    negative: bool = False


def fingerprint(data: np.ndarray) -> str:
    """Sixteen hex digits of the SHA-256 of the voxels (float32) and the shape, whatever the file's compression."""
    data = np.ascontiguousarray(data, np.float32) + np.float32(0)  # -0 counts as 0
    return hashlib.sha256(repr(data.shape).encode() + data.tobytes()).hexdigest()[:16]


def describe(data: np.ndarray) -> np.ndarray:
    """(D, H, W) averaged to at most 34 voxels a side, mean 0 and variance 1, float32; symmetric under mirroring."""
    import torch
    import torch.nn.functional as F

    factor = -(-max(data.shape) // SIDE)
    small = F.adaptive_avg_pool3d(
        torch.from_numpy(np.ascontiguousarray(data))[None], [-(-n // factor) for n in data.shape]
    )
    small = small[0].numpy()
    return (small - small.mean()) / max(small.std(), 1e-12)


def examine(row: Row) -> Facts:
    """Read one volume; what is wrong with it does not raise."""
    from common import nifti
    from neuroldm3d.preprocess import AXES

    try:
        volume = nifti.load(row.file)
    except UserError as error:
        return Facts(str(error))
    data, affine = nifti.reorient(volume.data, volume.affine, AXES)
    if data.min() == data.max():
        return Facts(f"every voxel is {data.flat[0]:.4g}, {row.file}, remove the row or repair the file")
    return Facts("", fingerprint(data), describe(data), data.shape, affine, bool(data.min() < 0))


# ---- copies


def near_pairs(descriptors: np.ndarray, threshold: float = THRESHOLD) -> list[tuple[int, int, float, bool]]:
    """Pairs (i, j, normalised MSE, mirrored) of (n, d, h, w) descriptors that differ by less than the threshold.

    Mirrored pairs are those that only agree after a left-right flip of one.
    """
    n, found = len(descriptors), []
    if n < 2:
        return found
    mean = descriptors.mean(0)
    plain = (descriptors - mean).reshape(n, -1)
    mirrored = (descriptors[:, ::-1] - mean).reshape(n, -1)
    power, power_mirrored = ((x**2).sum(1, dtype=np.float64) for x in (plain, mirrored))
    for start in range(0, n, 512):
        part = slice(start, start + 512)
        same, flipped = (
            (total - 2 * (plain[part] @ other.T)) / np.maximum(total, 1e-9)  # where all are copies: 0 of 0 is 0
            for other, total in ((plain, power[part, None] + power), (mirrored, power[part, None] + power_mirrored))
        )
        for i, j in np.argwhere(np.minimum(same, flipped) < threshold):
            if start + i < j:
                nmse = max(float(min(same[i, j], flipped[i, j])), 0.0)  # rounding may pass below 0
                found.append((int(start + i), int(j), nmse, bool(same[i, j] >= threshold)))
    return found


def duplicate_pairs(facts: list[Facts], threshold: float = THRESHOLD) -> list[dict]:
    """Copies among usable volumes: {"a", "b": indices, "kind": exact, near or mirrored, "nmse"}, closest first."""
    pairs = []
    for shape in {f.descriptor.shape for f in facts if not f.problem}:
        index = [i for i, f in enumerate(facts) if not f.problem and f.descriptor.shape == shape]
        for i, j, nmse, mirrored in near_pairs(np.stack([facts[k].descriptor for k in index]), threshold):
            a, b = index[i], index[j]
            exact = facts[a].fingerprint == facts[b].fingerprint
            kind = "exact" if exact else "mirrored" if mirrored else "near"
            pairs.append({"a": a, "b": b, "kind": kind, "nmse": 0.0 if exact else nmse})
    seen = {(pair["a"], pair["b"]) for pair in pairs}
    first: dict[str, int] = {}
    for i, f in enumerate(facts):  # exact copies whatever the threshold
        j = first.setdefault(f.fingerprint, i) if not f.problem else i
        if j != i and (j, i) not in seen:
            pairs.append({"a": j, "b": i, "kind": "exact", "nmse": 0.0})
    return sorted(pairs, key=lambda pair: (pair["nmse"], pair["a"], pair["b"]))


def joined(n: int, pairs) -> list[list[int]]:
    """Connected groups of two or more of n items under the pairs (i, j)."""
    leader = list(range(n))

    def root(i):
        while leader[i] != i:
            i = leader[i]
        return i

    for i, j in pairs:
        low, high = sorted((root(i), root(j)))
        leader[high] = low
    groups: dict[int, list[int]] = {}
    for i in range(n):
        groups.setdefault(root(i), []).append(i)
    return [group for group in groups.values() if len(group) > 1]


def clustered(rows: list[Row], groups: list[list[int]]) -> list[Row]:
    """The rows with a `cluster` wherever groups of copies (indices) join subjects: named after the first of them."""
    from neuroldm3d.dataset import CLUSTER_COLUMN, cluster_of

    first: dict[str, int] = {}
    same_subject = [(first.setdefault(cluster_of(row), i), i) for i, row in enumerate(rows)]
    copies = [(group[0], i) for group in groups for i in group[1:]]
    result = list(rows)
    for members in joined(len(rows), same_subject + copies):
        for i in members:
            known = rows[i].covariates | {CLUSTER_COLUMN: cluster_of(rows[members[0]])}
            result[i] = replace(rows[i], covariates=known)
    return result


def duplicate_groups(rows: list[Row], volumes: Volumes, rt=None, threshold: float = THRESHOLD) -> list[list[str]]:
    """Names of rows that are copies of one scan, group by group, seen on prepared (cached) volumes.

    rt: with several ranks each prepares its share first; all give the same answer.
    """
    if rt is not None:
        volumes.fill(rows, rt)
    facts = [Facts("", fingerprint(data), describe(data)) for data in map(volumes.load, rows)]
    pairs = duplicate_pairs(facts, threshold)
    return [[rows[i].name for i in group] for group in joined(len(rows), [(p["a"], p["b"]) for p in pairs])]


# ---- site and class


def site_baseline(rows: list[Row]) -> dict | None:
    """Counts by site and group, and how well the site alone tells TLE from HC; None without a site column.

    auc: out of fold (5 folds, seeded), each row scored by the share of TLE at its site; None where a class has fewer
    than 5 rows. one_class: sites of 5 rows or more that have only HC or only TLE.
    """
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    rows = [row for row in rows if "site" in row.covariates]
    if not rows:
        return None
    sites, labels = np.array([row.covariates["site"] for row in rows]), np.array([row.label for row in rows])
    table = {site: dict(sorted(Counter(row.group for row in rows if row.covariates["site"] == site).items()))
             for site in sorted(set(sites))}  # fmt: skip
    one_class = [site for site in table if (sites == site).sum() >= SITE_ROWS and len(set(labels[sites == site])) < 2]
    auc = None
    if min(np.bincount(labels, minlength=2)) >= 5:
        scores = np.zeros(len(rows))
        for train, test in StratifiedKFold(5, shuffle=True, random_state=0).split(sites, labels):
            overall = labels[train].mean()
            for site in table:
                there = labels[train][sites[train] == site]
                scores[test[sites[test] == site]] = (there.sum() + overall) / (len(there) + 1)  # shrunk by one row
        auc = float(roc_auc_score(labels, scores))
    return {"groups_by_site": table, "site_only_auc": auc, "one_class_sites": one_class}


def covariates(rows: list[Row]) -> dict:
    """Age (mean, SD, n) and sex counts by class, of the rows that have them."""
    from neuroldm3d.dataset import CLASSES

    result = {}
    for label, name in enumerate(CLASSES):
        ages = np.array([r.covariates["age"] for r in rows if r.label == label and "age" in r.covariates])
        sexes = Counter(r.covariates["sex"] for r in rows if r.label == label and "sex" in r.covariates)
        age = {"mean": float(ages.mean()), "sd": float(ages.std()), "n": len(ages)} if len(ages) else None
        result[name] = {"age_years": age, "sex": dict(sorted(sexes.items()))}
    return result


# ---- the audit


def run(
    tables: dict[str, list[Row]], *, threshold=THRESHOLD, allow=(), salt="", num_workers=0
) -> tuple[dict, list[list[int]]]:
    """Report (plain values) on tables of rows by name; groups of copies as indices into all rows, table after table.

    report["blocking"] lists what must be mended, empty if nothing; `allow` turns kinds of findings into warnings. With
    `salt` the report holds hashes instead of ids and names.
    """
    from common.runlog import progress

    rows = [row for part in tables.values() for row in part]
    where = [table for table, part in tables.items() for _ in part]
    with ThreadPoolExecutor(max(num_workers, 1)) as pool, progress(len(rows), 0, "audit") as bar:
        facts = []
        for found in pool.map(examine, rows):
            facts.append(found)
            bar.update()
    pairs = duplicate_pairs(facts, threshold)

    def called(i):
        return pseudonym(rows[i].name, salt) if salt else rows[i].name

    findings = [
        *value_findings(rows, facts, called),
        *grid_findings(facts, called),
        *subject_findings(rows, where, salt),
    ]
    findings += duplicate_findings(rows, where, pairs, called)
    sites = site_baseline(rows)
    findings += site_findings(sites)
    blocking = [text for kind, text in findings if kind != "warning" and kind not in allow]
    groups = joined(len(rows), [(p["a"], p["b"]) for p in pairs])
    report = {
        "rows": len(rows),
        "groups_by_table": {
            name: dict(sorted(Counter(r.group for r in part).items())) for name, part in tables.items()
        },
        "subjects": len({row.subject for row in rows}),
        "shapes": {" x ".join(map(str, s)): n for s, n in Counter(f.shape for f in facts if not f.problem).items()},
        "threshold": threshold,
        "blocking": blocking,
        "warnings": [text for _, text in findings if text not in blocking],
        "duplicates": [
            {"a": called(p["a"]), "b": called(p["b"]), "tables": [where[p["a"]], where[p["b"]]]}
            | {key: p[key] for key in ("kind", "nmse")}
            for p in pairs
        ],
        "duplicate_groups": [[called(i) for i in group] for group in groups],
        "site": sites,
        "covariates": covariates(rows),
        "fingerprints": {called(i): f.fingerprint for i, f in enumerate(facts)},
    }
    return report, groups


def value_findings(rows, facts, called):
    for i, f in enumerate(facts):
        if f.problem:
            yield "values", f"{called(i)}: {f.problem.replace(str(rows[i].file), 'its file')}"
    if negative := [called(i) for i, f in enumerate(facts) if f.negative]:
        yield "warning", f"{len(negative)} volumes have negative values, as grey-matter maps have not: {negative[0]}"


def grid_findings(facts, called):
    """Volumes off the commonest shape or voxel grid block; another origin only warns."""
    usable = [i for i, f in enumerate(facts) if not f.problem]
    if not usable:
        return
    shape = Counter(facts[i].shape for i in usable).most_common(1)[0][0]
    alike = [i for i in usable if facts[i].shape == shape]
    affine = np.median([facts[i].affine for i in alike], axis=0)
    other = [i for i in usable if facts[i].shape != shape]
    turned = [i for i in alike if np.abs(facts[i].affine[:3, :3] - affine[:3, :3]).max() > 0.01]
    moved = [i for i in alike if i not in turned and np.abs(facts[i].affine - affine).max() > 0.1]
    if other:
        yield "grid", (f"{len(other)} of {len(usable)} volumes have another shape than {shape}, such as "
                       f"{called(other[0])} with {facts[other[0]].shape}; warp all to one template grid")  # fmt: skip
    if turned:
        yield "grid", (f"{len(turned)} of {len(usable)} volumes have other voxel sizes or axes than most, such as "
                       f"{called(turned[0])}; warp all to one template grid")  # fmt: skip
    if moved:
        yield "warning", f"{len(moved)} volumes have another origin than most, such as {called(moved[0])}"


def subject_findings(rows, where, salt):
    """A subject in two tables, or with both labels, blocks."""
    from neuroldm3d.dataset import cluster_of

    tables, groups = {}, {}
    for row, table in zip(rows, where, strict=True):
        tables.setdefault(cluster_of(row), set()).add(table)
        groups.setdefault(row.subject, set()).add(row.group)
    for subject in (s for s, seen in tables.items() if len(seen) > 1):
        shown = pseudonym(subject, salt) if salt else subject
        yield "subjects", f"subject {shown} is in {' and '.join(sorted(tables[subject]))}; keep it in one table"
    for subject in (s for s, seen in groups.items() if len(seen) > 1):
        shown = pseudonym(subject, salt) if salt else subject
        yield "subjects", f"subject {shown} is labelled {' and '.join(sorted(groups[subject]))}; correct the labels"


def duplicate_findings(rows, where, pairs, called):
    """Copies under two ids block; under one id, or in one cluster of data_split.py, they are known."""
    from neuroldm3d.dataset import cluster_of

    unknown = [p for p in pairs if cluster_of(rows[p["a"]]) != cluster_of(rows[p["b"]])]
    if unknown:
        across = sum(where[p["a"]] != where[p["b"]] for p in unknown)
        first, second = (f"{called(unknown[0][k])} ({where[unknown[0][k]]})" for k in "ab")
        how = f"{unknown[0]['kind']}, normalised MSE {unknown[0]['nmse']:.3g}"
        yield "duplicates", (f"{len(unknown)} pairs of volumes under different ids are copies of one scan, {across} "
                             f"across tables, such as {first} and {second} ({how}); remove one of each, or keep them "
                             "together with data_split.py --duplicates group")  # fmt: skip
    if known := len(pairs) - len(unknown):
        yield "warning", f"{known} pairs of copies are of one subject or cluster; they stay together"


def site_findings(sites):
    if sites is None:
        yield "warning", "there is no column site: whether site and class are confounded cannot be seen"
        return
    for site in sites["one_class_sites"]:
        yield "warning", f"site {site} has only {', '.join(sites['groups_by_site'][site])}: it gives the class away"
    if (sites["site_only_auc"] or 0) > SITE_AUC:
        yield "warning", f"the site alone tells TLE from HC with an AUC of {sites['site_only_auc']:.2f}"


def pseudonym(text: str, salt: str) -> str:
    """Twelve hex digits that stand for an id; without the secret salt nobody can tell whose."""
    return hashlib.sha256(f"{salt}\0{text}".encode()).hexdigest()[:12]


def table_hashes(paths, folder: Path) -> dict[str, str]:
    """SHA-256 (16 digits) of files, by path relative to `folder`."""
    from common.checkpoint import file_hash

    return {os.path.relpath(p, folder): file_hash(p) for p in paths}


def default_tables(root: str | Path) -> list[str]:
    paths = [Path(root) / "data_csvs" / f"{name}.csv" for name in ("train", "val", "test")]
    return [str(path) for path in paths if path.is_file()]


def summary(report: dict) -> str:
    """A few lines for the terminal."""
    groups = Counter()
    for counts in report["groups_by_table"].values():
        groups.update(counts)
    lines = [f"{report['rows']} volumes of {report['subjects']} subjects: {dict(groups)}; shapes {report['shapes']}"]
    if report["site"]:
        auc = report["site"]["site_only_auc"]
        lines.append(f"{len(report['site']['groups_by_site'])} sites; AUC of the site alone "
                     + ("unknown: too few rows" if auc is None else f"{auc:.2f}"))  # fmt: skip
    lines += [f"problem: {text}" for text in report["blocking"]]
    lines += [f"warning: {text}" for text in report["warnings"]]
    return "\n".join(lines)


def raise_if_blocked(report: dict, where) -> None:
    if report["blocking"]:
        n = len(report["blocking"])
        raise UserError(f"the audit found {n} problem{'s' * (n > 1)} (report: {where}), first: {report['blocking'][0]}")


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    if options.threshold < 0:
        raise UserError(f"--threshold {options.threshold}: 0 or more")
    from common.runlog import write_json
    from neuroldm3d import dataset

    paths = list(options.csv) or default_tables(options.root)
    if not paths:
        raise UserError(f"no tables in {Path(options.root) / 'data_csvs'}; name them with --csv")
    report_path = Path(options.report or Path(options.root) / "data_csvs" / "audit.json")
    if report_path.exists() and not options.overwrite:
        raise UserError(f"{report_path} is there already; name another --report, or add --overwrite")
    names = [Path(p).stem for p in paths]
    if len(set(names)) < len(names):
        names = [os.path.relpath(p, options.root) for p in paths]
    tables = {n: dataset.read_table(p, options.label_column) for n, p in zip(names, paths, strict=True)}
    report, _ = run(tables, threshold=options.threshold, allow=options.allow, salt=options.salt,
                 num_workers=options.num_workers)  # fmt: skip
    write_json(report_path, {"tables": table_hashes(paths, report_path.parent), **report})
    print(summary(report))
    raise_if_blocked(report, report_path)
    print(f"nothing to mend; report: {report_path}")


if __name__ == "__main__":
    cli.run(main)
