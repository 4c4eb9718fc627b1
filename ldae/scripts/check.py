"""Look at every scan of a table before training: unreadable files, geometry, intensities, skull, duplicates, ages.

    python ldae/scripts/check.py --root STUDY                     # ROOT/data/dataset.csv at the paper's 1.5 mm grid
    python ldae/scripts/check.py --root STUDY --shape 24 32 24 --spacing_mm 8

Writes ROOT/check/check.csv (a row per scan with what was measured), check.json (findings) and check.png (a slice of
every scan, the dubious ones framed). Findings are errors (must be mended: exit status 2), warnings (look at them) and
notes (handled, good to know); what more than five scans have in common is printed once. Every scan is read once: a few
seconds each at 1 mm.
"""

from __future__ import annotations

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

import numpy as np

from common import cli
from common.cli import CommonOptions, UserError, option

if TYPE_CHECKING:
    from ldae.dataset import Row

HERE = Path(__file__).resolve().parents[1]
LEVELS = ("error", "warning", "note")
LOST_SHARE = 0.01  # of the head that may lie outside the prepared field of view
SHOWN = 120  # scans in the picture, at most
SINGLY = 5  # findings of one kind that are printed one by one, at most


@dataclass
class Options(CommonOptions):
    root: str = option(str(HERE), "study folder that default paths hang off")
    csv_path: str = option("", "table of the scans; default: ROOT/data/dataset.csv")
    out: str = option("", "folder of the report; default: ROOT/check")
    shape: tuple[int, int, int] = option((128, 160, 128), "prepared grid", unit="voxels")
    spacing_mm: float = option(1.5, "prepared voxel size", unit="mm")
    crop: str = option("centre", "field of view about the centre of the scan, or the head", choices=("centre", "head"))
    mask: str = option("none", "mask of the preparation; file: the table's mask_path", choices=("none", "head", "file"))
    skull_stripped: bool = option(True, "the scans are meant to be skull-stripped")
    overwrite: bool = option(False, "replace an earlier report")


@dataclass
class Facts:
    """What one scan is like. problem: why it cannot be used; then nothing else is known."""

    problem: str = ""
    stored: str = ""  # orientation code in the file, such as LAS
    scaling: str = ""
    shape: tuple = ()
    spacing_mm: tuple = ()
    lost: float = 0.0  # share of the head outside the prepared field of view
    cut: list = field(default_factory=list)
    skull: dict = field(default_factory=dict)
    histogram: np.ndarray | None = None
    fingerprint: str = ""
    picture: np.ndarray | None = None  # (h, w) middle axial slice as displayed


@dataclass(frozen=True)
class Finding:
    level: str
    kind: str
    scan: str
    text: str


# ---- one scan


def examine(row: Row, prep) -> Facts:
    """Read and prepare one scan; what is wrong with it does not raise."""
    import hashlib

    import nibabel as nib

    from common.figures import plane
    from ldae import dataset, preprocess, quality

    try:
        volume = dataset.Volumes(prep, None).native(row)
        prepared = preprocess.prepare(volume, prep)
        made = preprocess.plan(volume, prep)
    except UserError as error:
        return Facts(str(error))
    image = nib.load(row.path)
    slope, inter = image.dataobj.slope, image.dataobj.inter
    scaling = f"{image.get_data_dtype()} with slope {slope:g} and offset {inter:g}"
    head = preprocess.head_mask(volume.data)
    inside = _prepared_voxels(np.argwhere(head), volume.affine, prepared)
    unit = np.clip((volume.data - made.low) / (made.high - made.low), 0, prep.limit)
    content = repr(volume.shape).encode() + np.ascontiguousarray(volume.data + np.float32(0)).tobytes()
    return Facts(
        stored=preprocess.stored_order(row.path),
        scaling=scaling if (slope, inter) != (1, 0) else "",
        shape=volume.shape,
        spacing_mm=tuple(round(s, 4) for s in volume.spacing_mm),
        lost=1 - float(inside.mean()),
        cut=quality.cut_off(head),
        skull=quality.skull_signs(unit, volume.spacing_mm),
        histogram=quality.histogram(prepared.data),
        fingerprint=hashlib.sha256(content).hexdigest()[:16],
        picture=plane(prepared.data, "axial", prep.shape[2] // 2),
    )


def _prepared_voxels(voxels, affine, prepared):
    """Whether each native voxel (n, 3) lies on the prepared grid."""
    matrix = np.linalg.solve(prepared.affine, affine)
    at = voxels @ matrix[:3, :3].T + matrix[:3, 3]
    return ((at > -0.5 - 1e-3) & (at < np.array(prepared.shape) - 0.5 + 1e-3)).all(-1)


# ---- findings


def scan_findings(row: Row, facts: Facts, options: Options):
    if facts.problem:
        yield "error", "unreadable", facts.problem
        return
    if facts.stored != "RAS":
        yield "note", "orientation", f"{row.path} is stored {facts.stored}; it is read in RAS+ order"
    if facts.scaling:
        yield "note", "scaling", f"{row.path} is {facts.scaling}, which are applied"
    if max(facts.spacing_mm) > 3 * min(facts.spacing_mm):
        shown = " x ".join(f"{s:g}" for s in facts.spacing_mm)
        yield "warning", "spacing", f"voxels of {shown} mm are far from isotropic"
    if facts.lost > LOST_SHARE:
        grid = f"{' x '.join(map(str, options.shape))} voxels of {options.spacing_mm:g} mm"
        yield "warning", "field of view", f"{facts.lost:.1%} of the head lie outside the prepared {grid}"
    cut = [name for name in facts.cut if options.skull_stripped or name != "inferior"]  # a neck always ends there
    if cut:
        yield "warning", "cut off", f"the head touches the {', '.join(cut)} border of the scan"
    if options.skull_stripped and facts.skull["skull"]:
        yield "warning", "skull", (f"looks not skull-stripped: head of {facts.skull['head_ml']:.0f} ml, "
                                   f"{facts.skull['dark_shell']:.0%} dark under its surface")  # fmt: skip


def table_findings(rows: list[Row]):
    """(level, kind, scan, text) on ages, sex, diagnoses and sessions."""
    for row in rows:
        for column in ("age", "diagnosis"):
            if getattr(row, column) is None:
                text = f"{column} is missing in row {row.index + 2}; stages that need it leave the scan out"
                yield "warning", f"missing {column}", row.scan, text
        if row.age is not None and row.age < 18:
            yield "warning", "age", row.scan, f"age {row.age:g}: the networks are meant for adults"
    subjects: dict[str, list[Row]] = {}
    for row in rows:
        subjects.setdefault(row.subject, []).append(row)
    for visits in subjects.values():
        if len({row.sex for row in visits if row.sex}) > 1:
            yield "error", "sex", visits[0].scan, f"subject {visits[0].subject} is listed with several sexes"
        dated = sorted((row for row in visits if row.session is not None), key=lambda row: row.session)
        for before, after in zip(dated, dated[1:], strict=False):
            if None not in (before.age, after.age):
                years = (after.session - before.session) / 12
                if abs(after.age - before.age - years) > 1:
                    yield "warning", "age", after.scan, (f"{after.age - before.age:+.1f} years of age since "
                                                         f"{before.scan}, {years:.1f} by the sessions")  # fmt: skip
            if before.diagnosis == "AD" and after.diagnosis in ("CN", "MCI"):
                yield "warning", "diagnosis", after.scan, f"{after.diagnosis} after AD at {before.scan}"


def cohort_findings(rows: list[Row], facts: list[Facts]):
    """Copies, and scans unlike the others in grid or intensities."""
    from ldae import quality

    usable = [i for i, f in enumerate(facts) if not f.problem]
    first: dict[str, int] = {}
    for i in usable:
        j = first.setdefault(facts[i].fingerprint, i)
        if j != i:
            same = rows[i].subject == rows[j].subject
            text = f"the same voxels as {rows[j].scan}" + ("" if same else ", another subject")
            yield "error", "duplicate", rows[i].scan, f"{text} ({rows[i].path}, {rows[j].path}); remove one"
    if not usable:
        return
    grid = Counter((facts[i].shape, facts[i].spacing_mm) for i in usable).most_common(1)[0][0]
    for i in usable:
        if (facts[i].shape, facts[i].spacing_mm) != grid:
            own, usual = (" x ".join(map(str, shape)) for shape in (facts[i].shape, grid[0]))
            text = f"{own} voxels of {facts[i].spacing_mm} mm, most have {usual} of {grid[1]}"
            yield "note", "grid", rows[i].scan, text
    distance, outlier = quality.histogram_outliers(np.stack([facts[i].histogram for i in usable]))
    for i, d, odd in zip(usable, distance, outlier, strict=True):
        if odd:
            text = f"histogram {d:.3f} from the cohort's, median {np.median(distance):.3f}: other sequence or scaling?"
            yield "warning", "intensities", rows[i].scan, text


def find_all(rows: list[Row], facts: list[Facts], options: Options) -> list[Finding]:
    """All findings, errors first, then in table order."""
    found = [Finding(level, kind, row.scan, text)
             for row, known in zip(rows, facts, strict=True)
             for level, kind, text in scan_findings(row, known, options)]  # fmt: skip
    found += [Finding(level, kind, scan, text) for level, kind, scan, text in table_findings(rows)]
    found += [Finding(level, kind, scan, text) for level, kind, scan, text in cohort_findings(rows, facts)]
    place = {row.scan: i for i, row in enumerate(rows)}
    return sorted(found, key=lambda f: (LEVELS.index(f.level), place[f.scan]))


# ---- report


def lines(findings: list[Finding]) -> list[str]:
    """For the terminal: one line per finding, or per kind where many scans have the same."""
    kinds: dict[tuple, list[Finding]] = {}
    for f in findings:
        kinds.setdefault((f.level, f.kind), []).append(f)
    text = []
    for (level, kind), alike in kinds.items():
        if len(alike) <= SINGLY:
            text += [f"{level}: {f.scan}: {kind}: {f.text}" for f in alike]
        else:
            text.append(f"{level}: {len(alike)} scans: {kind}, such as {alike[0].scan}: {alike[0].text}")
    return text


def write_report(out: Path, rows, facts: list[Facts], findings: list[Finding], options: Options) -> None:
    from common.runlog import write_json
    from common.tables import write_csv

    records = []
    for row, known in zip(rows, facts, strict=True):
        own = [f for f in findings if f.scan == row.scan]
        record = {"scan": row.scan, "subject": row.subject, "path": row.path, "session": row.session, "age": row.age,
                  "diagnosis": row.diagnosis, "status": own[0].level if own else "ok",
                  "findings": "; ".join(f"{f.kind}: {f.text}" for f in own)}  # fmt: skip
        if not known.problem:
            record |= {"stored": known.stored, "shape": "x".join(map(str, known.shape)),
                       "spacing_mm": "x".join(f"{s:g}" for s in known.spacing_mm), "lost_share": round(known.lost, 4),
                       "head_ml": round(known.skull["head_ml"], 1), "dark_shell": round(known.skull["dark_shell"], 4),
                       "fingerprint": known.fingerprint}  # fmt: skip
        records.append(record)
    write_csv(out / "check.csv", records)
    counts = Counter(f.level for f in findings)
    report = {"scans": len(rows), "subjects": len({row.subject for row in rows}),
              "counts": {level: counts[level] for level in LEVELS}}  # fmt: skip
    report |= {"options": cli.to_dict(options), "findings": [vars(f) for f in findings]}
    write_json(out / "check.json", report)
    draw(out / "check.png", rows, facts, findings)


def draw(path: Path, rows, facts: list[Facts], findings: list[Finding]) -> None:
    """Middle axial slice of every scan, those with errors first, and all intensity histograms."""
    from matplotlib.figure import Figure

    from common import figures
    from ldae import quality

    status = {row.scan: "ok" for row in rows}
    status |= {f.scan: f.level for f in reversed(findings)}  # errors come first in findings, so they win
    rank = [*LEVELS, "ok"]
    order = sorted(range(len(rows)), key=lambda i: (rank.index(status[rows[i].scan]), i))[:SHOWN]
    columns = min(max(len(order), 4), 12)
    lines = -(-len(order) // columns)
    fig = Figure(figsize=(1.1 * columns, 1.35 * lines + 2.2), layout="constrained")
    grid = fig.add_gridspec(lines + 1, columns, height_ratios=[*[1.35] * lines, 2.0])
    colour = {"error": "#d62728", "warning": "#ff7f0e", "note": "#1f77b4", "ok": "0.7"}
    for k, i in enumerate(order):
        ax = fig.add_subplot(grid[divmod(k, columns)], xticks=[], yticks=[])
        shown = status[rows[i].scan]
        ax.spines[:].set(color=colour[shown], linewidth=0.6 if shown == "ok" else 2)
        ax.set_title(rows[i].scan[-18:], fontsize=4.5, color="black" if shown == "ok" else colour[shown], pad=2)
        if facts[i].picture is None:
            ax.text(0.5, 0.5, "unreadable", ha="center", va="center", fontsize=5, transform=ax.transAxes)
        else:
            ax.imshow(facts[i].picture, cmap="gray", vmin=0, vmax=1.1)
    ax = fig.add_subplot(grid[-1, :])
    centres = np.linspace(*quality.RANGE, quality.BINS, endpoint=False)
    for i in reversed(order):
        if facts[i].histogram is not None:
            odd = any(f.scan == rows[i].scan and f.kind == "intensities" for f in findings)
            ax.plot(centres, facts[i].histogram, color=colour["warning" if odd else "ok"], linewidth=1 if odd else 0.5)
    ax.set_xlabel("prepared intensity", fontsize=6)
    ax.set_ylabel("share of the head", fontsize=6)
    ax.tick_params(labelsize=5)
    figures.save(fig, path)


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    out = Path(options.out or Path(options.root) / "check")
    if (out / "check.json").exists() and not options.overwrite:
        raise UserError(f"{out / 'check.json'} is there already; name another --out, or add --overwrite")
    from common.runlog import progress
    from ldae import dataset
    from ldae.preprocess import Preparation

    csv_path = Path(options.csv_path or Path(options.root) / "data" / "dataset.csv")
    rows = dataset.read_table(csv_path, missing_files=True)
    prep = Preparation(options.shape, options.spacing_mm, crop=options.crop, mask=options.mask)
    with ThreadPoolExecutor(max(options.num_workers, 1)) as pool, progress(len(rows), 0, "check") as bar:
        facts = []
        for known in pool.map(lambda row: examine(row, prep), rows):
            facts.append(known)
            bar.update()
    findings = find_all(rows, facts, options)
    write_report(out, rows, facts, findings, options)
    for line in lines(findings):
        print(line)
    counts = Counter(f.level for f in findings)
    print(f"{len(rows)} scans of {len({row.subject for row in rows})} subjects: "
          + ", ".join(f"{counts[level]} {level}s" for level in LEVELS) + f"; report in {out}")  # fmt: skip
    if counts["error"]:
        first = next(f for f in findings if f.level == "error")
        raise UserError(f"{counts['error']} errors in {csv_path}, first: {first.scan}: {first.text}")


if __name__ == "__main__":
    cli.run(main)
