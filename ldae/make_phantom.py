"""Longitudinal synthetic cohort with known truth: T1 of AD, CN and MCI subjects at several sessions, table, label maps.

    python ldae/make_phantom.py                                            # the paper's grid, 60 subjects: minutes
    python ldae/make_phantom.py --shape 24 32 24 --out STUDY               # for training on a CPU: a minute
    python ldae/make_phantom.py --shape 24 32 24 --sessions 0 12 24 --progression 2 --converters 0.3 --out STUDY
    python ldae/make_phantom.py --n_subjects 30 --shape 48 56 48 --defects --out STUDY   # something for check.py

A subject is one head of common/phantom.py; its sessions are that head at other times: same seed, other factors. Scans
look as the paper's after preprocessing: skull-stripped, registered (MNI-like mm, no repositioning between sessions), a
rest of the bias field that N4 leaves, and noise that large voxels average out. A latent disease score drives all:

    score(0)     CN 0.18, MCI 0.46, AD 0.74; SD 0.19 within a class, so the classes overlap
    score(m)     score(0) + rate * m / 12; rate CN 0.01, MCI 0.05, AD 0.09 per year, each +- 30 %, times --progression
    ventricles   exp(1.05 score + 0.25 older + 0.10 n), older = (age - 75) / 10, n a number of the subject
    hippocampi   1 - 0.38 score - 0.05 older + 0.04 n (own n for each side)
    atrophy      0.1 + 0.5 score + 0.12 older + 0.05 n

Ages at the first session: 60 to 90, the same in all classes. By the true score the AUC of AD against CN is 0.98, by the
true factor of the ventricles 0.91, of the hippocampi 0.95, by all with age 0.98. With --converters a share of the MCI
subjects progresses at 0.25 a year and is called AD from the first later session on.

Layout: data/dataset.csv (subject, path, diagnosis, session, age, sex), data/truth.csv (one row per scan: score, rate,
factors, volumes in ml), data/labels/<scan>.nii.gz (common.phantom.LABELS), data/scans: a BIDS tree with
participants.tsv and sessions.tsv, which scripts/build_table.py turns into the same table. Subjects are seeded one by
one: another --n_subjects leaves every other subject as it was.
"""

from __future__ import annotations

import gzip
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

import numpy as np

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parent
SHAPE, SPACING_MM = (128, 160, 128), 1.5  # the paper's prepared grid
IN_TURN = ("CN", "AD", "MCI")  # diagnosis of subject 1, 2, 3, 4, ...
STAGE, SPREAD = {"CN": 0.18, "MCI": 0.46, "AD": 0.74}, 0.19
RATE, RATE_SPREAD, CONVERTER_RATE = {"CN": 0.01, "MCI": 0.05, "AD": 0.09}, 0.3, 0.25  # score per year
UNITS = 1200.0  # scanner units of value 1
NOISE, BIAS = 0.02, 0.02  # SD of the noise in voxels of 1.5 mm, rms of the logarithm of the field that N4 leaves
COLUMNS = ("subject", "path", "diagnosis", "session", "age", "sex")
DEFECTS = ("stored LAS", "int16 with scale and offset", "NaN voxel", "missing age")


@dataclass
class Options(CommonOptions):
    out: str = option(str(HERE), "folder that gets data/")
    n_subjects: int = option(60, "subjects; AD, CN and MCI in equal numbers")
    sessions: tuple[int, ...] = option((0, 6, 12), "times of the scans of every subject", unit="months")
    shape: tuple[int, int, int] = option(
        SHAPE, "grid; isotropic voxels that hold the paper's field of view (128 160 128: 1.5 mm)", unit="voxels"
    )
    progression: float = option(1.0, "factor on the rates of progression")
    converters: float = option(0.0, "share of the MCI subjects that turn to AD after the first session")
    labels: bool = option(True, "write the label maps")
    defects: bool = option(False, f"spoil one scan each of the first subjects: {', '.join(DEFECTS)}")
    overwrite: bool = option(False, "replace a cohort that is already there")


# ---- who


def draw_subject(seed: int, number: int, progression: float = 1.0, converters: float = 0.0) -> dict:
    """Diagnosis, sex, age and score at the first session, rate per year, personal deviations (no image)."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, number]))
    diagnosis = IN_TURN[(number - 1) % len(IN_TURN)]
    sex, age = str(rng.choice(["F", "M"])), float(np.round(rng.uniform(60, 90), 1))
    score = float(np.clip(STAGE[diagnosis] + SPREAD * rng.normal(), -0.1, 1.2))
    rate = RATE[diagnosis] * (1 + RATE_SPREAD * float(np.clip(rng.normal(), -2, 2)))
    own = {name: float(rng.normal()) for name in ("ventricle", "hippocampus_left", "hippocampus_right", "atrophy")}
    converts = diagnosis == "MCI" and bool(rng.random() < converters)
    rate = progression * (CONVERTER_RATE if converts else rate)
    return {"diagnosis": diagnosis, "sex": sex, "age": age, "score": score, "rate": rate, "own": own,
            "converts": int(converts)}  # fmt: skip


def at_session(subject: dict, months: int) -> tuple[dict, dict]:
    """(diagnosis, age, score, rate, converts of a subject at a session; its factors for common.phantom.Factors)."""
    years, own = months / 12, subject["own"]
    age, score = subject["age"] + years, subject["score"] + subject["rate"] * years
    older = (age - 75) / 10
    factors = {
        "age": age,
        "atrophy": np.clip(0.1 + 0.5 * score + 0.12 * older + 0.05 * own["atrophy"], 0, 1),
        "ventricle_scale": np.clip(np.exp(1.05 * score + 0.25 * older + 0.10 * own["ventricle"]), 0.6, 5),
    }
    for side in ("hippocampus_left", "hippocampus_right"):
        factors[side] = np.clip(1 - 0.38 * score - 0.05 * older + 0.04 * own[side], 0.5, 1.2)
    diagnosis = "AD" if subject["converts"] and months > 0 else subject["diagnosis"]
    known = {"diagnosis": diagnosis, "sex": subject["sex"], "score": score, "rate": subject["rate"],
             "converts": subject["converts"]}  # fmt: skip
    return known, {name: float(value) for name, value in factors.items()}


def spacing_of(shape) -> float:
    """mm of isotropic voxels that are as fine as the paper's field of view (192 x 240 x 192 mm) fits `shape`."""
    return SPACING_MM * max(full / n for full, n in zip(SHAPE, shape, strict=True))


# ---- what


def scan_paths(out: Path, subject: str, months: int) -> tuple[Path, Path]:
    """Files of a scan and of its label map."""
    session = f"ses-M{months:03d}"
    scan = out / "data" / "scans" / subject / session / "anat" / f"{subject}_{session}_T1w.nii.gz"
    return scan, out / "data" / "labels" / f"{subject}_M{months:03d}.nii.gz"


def make_subject(options: Options, number: int) -> list[dict]:
    """Write all scans and label maps of one subject; returns their truth rows."""
    from common import nifti, phantom  # they import nibabel and torch, which --help need not

    out, seed = Path(options.out), options.seed * 100_003 + number  # distinct anatomy for every (seed, number)
    name, drawn = f"sub-{number:04d}", draw_subject(options.seed, number, options.progression, options.converters)
    rows = []
    for months in options.sessions:
        known, factors = at_session(drawn, months)
        brain = phantom.anatomy(seed, options.shape, phantom.Factors(**factors), spacing_of(options.shape))
        noise = NOISE * (SPACING_MM / spacing_of(options.shape)) ** 1.5  # large voxels average it out
        image = UNITS * phantom.t1_image(brain, seed * 1009 + months, noise=noise, bias=BIAS)  # of this session
        scan, label_map = scan_paths(out, name, months)
        nifti.save(scan, np.rint(image).clip(0, 32767), brain.affine, dtype=np.int16)
        if options.labels:
            nifti.save(label_map, brain.labels(), brain.affine, dtype=np.int16)
        truth = {key: value for key, value in brain.truth.items() if key not in ("amyloid_load", "composite_suvr")}
        path = scan.relative_to(out / "data").as_posix()
        rows.append({"scan": f"{name}_M{months:03d}", "subject": name, "path": path, "session": f"M{months:03d}"}
                    | known | truth)  # fmt: skip
    return rows


def spoil(out: Path, rows: list[dict], sessions) -> dict[str, str]:
    """The acceptance set's defects, on the first sessions of the first subjects; returns scan -> defect.

    The LAS and the scaled int16 copy hold the same head as before.
    """
    import nibabel as nib

    from common import nifti

    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    spoilt = {}
    for subject, defect in zip(subjects, DEFECTS, strict=False):
        row = next(row for row in rows if row["subject"] == subject)
        row["defect"] = defect
        spoilt[row["scan"]] = defect
        path = scan_paths(out, subject, sessions[0])[0]
        volume = nifti.load(path)
        if defect == "stored LAS":
            nifti.save(path, *nifti.reorient(volume.data, volume.affine, "LAS"), dtype=np.int16)
        elif defect == "int16 with scale and offset":
            image = nib.Nifti1Image(np.rint((volume.data + 100) / 0.5).astype(np.int16), volume.affine)
            image.header.set_slope_inter(0.5, -100)
            path.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))
        elif defect == "NaN voxel":
            volume.data[tuple(n // 2 for n in volume.shape)] = np.nan
            path.write_bytes(gzip.compress(nib.Nifti1Image(volume.data, volume.affine).to_bytes(), 1, mtime=0))
        else:
            row["age_in_table"] = ""
    return spoilt


# ---- files


def write_tables(out: Path, rows: list[dict]) -> None:
    """dataset.csv, truth.csv, participants.tsv and one sessions.tsv per subject."""
    from common.tables import write_csv

    rows = [row | {"age": f"{row['age']:.2f}", "age_in_table": row.get("age_in_table", f"{row['age']:.2f}")}
            for row in rows]  # fmt: skip
    table = [row | {"age": row["age_in_table"]} for row in rows]
    write_csv(out / "data" / "dataset.csv", table, COLUMNS)
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "age_in_table"]
    write_csv(out / "data" / "truth.csv", rows, columns, digits=6)
    scans, subjects = out / "data" / "scans", {row["subject"]: row for row in rows}
    write_tsv(scans / "participants.tsv", [{"participant_id": s, "sex": row["sex"]} for s, row in subjects.items()])
    for subject in subjects:
        visits = [{"session_id": f"ses-{row['session']}", "diagnosis": row["diagnosis"], "age": row["age"] or "n/a"}
                  for row in table if row["subject"] == subject]  # fmt: skip
        write_tsv(scans / subject / f"{subject}_sessions.tsv", visits)


def write_tsv(path: Path, rows: list[dict]) -> None:
    lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def remove_cohort(out: Path) -> None:
    """The scans and label maps of an earlier cohort; whatever has other names stays."""
    for folder in (out / "data" / "scans").glob("sub-[0-9][0-9][0-9][0-9]"):
        shutil.rmtree(folder)
    for path in (out / "data" / "labels").glob("sub-[0-9][0-9][0-9][0-9]_M[0-9][0-9][0-9].nii.gz"):
        path.unlink()


def check(options: Options) -> None:
    if min(options.shape) < 16 or max(options.shape) > 192:
        raise UserError(f"--shape {options.shape}: every axis between 16 and 192 voxels")
    if not 0 < options.n_subjects < 10_000 or options.seed < 0:
        raise UserError(f"--n_subjects {options.n_subjects}, --seed {options.seed}: 1 to 9999 subjects, seeds from 0")
    in_order = options.sessions == tuple(sorted(set(options.sessions)))
    if not in_order or min(options.sessions) < 0 or max(options.sessions) > 999:
        raise UserError(f"--sessions {options.sessions}: months below 1000, each once, in order")
    if not 0 <= options.converters <= 1 or not 0 <= options.progression <= 10:
        raise UserError(f"--converters {options.converters} is a share, --progression {options.progression} 0 to 10")
    if options.defects and options.n_subjects < len(DEFECTS):
        raise UserError(f"--defects needs {len(DEFECTS)} subjects, one each; raise --n_subjects")
    data = Path(options.out) / "data"
    for path in (data / name for name in ("scans", "labels", "dataset.csv", "truth.csv")):
        if not options.overwrite and (path.is_file() or path.is_dir() and any(path.iterdir())):
            raise UserError(f"{path} already holds data; give another --out, or --overwrite to replace it")


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    check(options)
    from common import phantom
    from common.runlog import progress, write_json

    phantom.template()  # once, before the threads ask for it
    out = Path(options.out)
    if options.overwrite:
        remove_cohort(out)
    with ThreadPoolExecutor(max(options.num_workers, 1)) as pool, progress(options.n_subjects, 0, "phantom") as bar:
        futures = [pool.submit(make_subject, options, number + 1) for number in range(options.n_subjects)]
        rows = []
        try:
            for future in futures:
                rows += future.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    spoilt = spoil(out, rows, options.sessions) if options.defects else {}
    write_tables(out, rows)
    told = ("seed", "n_subjects", "sessions", "shape", "progression", "converters", "defects")
    record = {"source": "phantom"} | {name: getattr(options, name) for name in told}
    record |= {"spacing_mm": spacing_of(options.shape), "label_codes": phantom.LABELS}
    write_json(out / "data" / "phantom.json", record | {"spoilt": spoilt})
    counts = Counter(row["diagnosis"] for row in rows)
    shown = ", ".join(f"{counts[name]} {name}" for name in sorted(counts))
    print(f"{len(rows)} scans of {options.n_subjects} subjects in {out / 'data'}: {shown}")
    print(f"{' x '.join(map(str, options.shape))} voxels of {spacing_of(options.shape):.4g} mm")
    for scan, defect in spoilt.items():
        print(f"spoilt: {scan}: {defect}")


if __name__ == "__main__":
    cli.run(main)
