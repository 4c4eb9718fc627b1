"""ISLES'24-style folders (BIDS: CT perfusion in ses-01, DWI and ADC in ses-02) as a table for lapt/preprocessing.py.

    python lapt/isles.py --root ISLES24/train --out ISLES24/cases.csv
    python lapt/preprocessing.py --cases ISLES24/cases.csv --output_dir lapt/data --make_masks --to_ctp_grid \\
        --time_points 15 --resample_time --frame_s 3 --spacing_mm 1 1 4 --shape 192 224 32 --clip_lesion --num_workers 8

Nothing is copied. The files are found by patterns below --root, `{subject}` standing for sub-...; where several match,
the one in derivatives/ in the space of the CT wins, then the first by name:

    ctp     {subject}*_ses-01*_ctp.nii.gz       mask  {subject}*_ses-01*_brain-mask.nii.gz (or *_mask; not in ISLES'24)
    dwi     {subject}*_ses-02*_dwi.nii.gz       lesion {subject}*_ses-02*_lesion-msk.nii.gz
    adc     {subject}*_ses-02*_adc.nii.gz      tmax, cbf, cbv, mtt {subject}*_ses-01*_tmax.nii.gz ... (for --maps)

Know what you train on: in ISLES'24 the CT perfusion is from admission, DWI and ADC from 2 to 9 days later, after
treatment. The lesion is the final infarct, which a perfusion study before recanalisation does not determine, and ADC
has begun to rise again; a pair from the same hour (as the paper's) is another task.

Registration. The derivatives in the space of the CT need none. From raw data, per patient, with ANTs:

    # 1 motion of the CTP: every frame rigidly onto their mean
    antsMotionCorr -d 3 -a ctp.nii.gz -o ctp_mean.nii.gz
    antsMotionCorr -d 3 -o [ctp_,ctp_moved.nii.gz] -m MI[ctp_mean.nii.gz,ctp.nii.gz,1,32,Regular,0.2] \\
        -t Rigid[0.05] -i 50x20 -s 1x0 -f 2x1 -n 15
    # 2 brain masks: SynthStrip takes CT and MRI
    mri_synthstrip -i ctp_mean.nii.gz -m mask.nii.gz ; mri_synthstrip -i dwi.nii.gz -o dwi_brain.nii.gz
    # 3 DWI rigidly onto the mean CTP by mutual information; the same transform for ADC and lesion
    antsRegistrationSyNQuick.sh -d 3 -t r -f ctp_mean.nii.gz -m dwi_brain.nii.gz -x mask.nii.gz -o dwi_to_ctp_
    antsApplyTransforms -d 3 -r ctp_mean.nii.gz -t dwi_to_ctp_0GenericAffine.mat -i adc.nii.gz -o adc_in_ctp.nii.gz
    antsApplyTransforms -d 3 -r ctp_mean.nii.gz -t dwi_to_ctp_0GenericAffine.mat -i lesion.nii.gz \\
        -n GenericLabel -o lesion_in_ctp.nii.gz
    # 4 look at every overlay: preprocessing.py refuses other grids and images that miss the brain, not a wrong match
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option

PATTERNS = {
    "ctp": ("{subject}*_ses-01*_ctp.nii.gz",),
    "dwi": ("{subject}*_ses-02*_dwi.nii.gz",),
    "adc": ("{subject}*_ses-02*_adc.nii.gz",),
    "mask": ("{subject}*_ses-01*_brain-mask.nii.gz", "{subject}*_ses-01*_mask.nii.gz"),
    "lesion": ("{subject}*_ses-02*_lesion-msk.nii.gz", "{subject}*_ses-02*_msk.nii.gz"),
} | {name: (f"{{subject}}*_ses-01*_{name}.nii.gz",) for name in ("tmax", "cbf", "cbv", "mtt")}


@dataclass
class Options(CommonOptions):
    root: str = option("", "folder with derivatives/ and raw_data/ (or sub-... folders)")
    out: str = option("", "table to write; default: ROOT/cases.csv")
    ctp: str = option("", "pattern of the CTP instead of the usual ones, such as '{subject}*_ctp.nii.gz'")
    dwi: str = option("", "pattern of the DWI")
    adc: str = option("", "pattern of the ADC")
    mask: str = option("", "pattern of the brain mask")
    lesion: str = option("", "pattern of the lesion mask")
    tmax: str = option("", "pattern of the perfusion map of Tmax")
    cbf: str = option("", "pattern of the map of CBF")
    cbv: str = option("", "pattern of the map of CBV")
    mtt: str = option("", "pattern of the map of MTT")
    any_space: bool = option(False, "take images that are not in the space of the CT too: register them yourself")
    overwrite: bool = option(False, "replace a table that is already there")


def subjects(root: Path) -> list[str]:
    """Names of all folders sub-... below the root."""
    found = sorted({path.name for path in root.rglob("sub-*") if path.is_dir()})
    if not found:
        raise UserError(f"{root} has no folders sub-...; give the folder with derivatives/ and raw_data/")
    return found


def choose(files: list[Path], globs: tuple[str, ...], root: Path, subject: str) -> Path | None:
    """The best of the files of a subject: in the space of the CT, then in derivatives/, then the first by name."""
    own = [path for path in files if subject in path.relative_to(root).parts]
    own = [path for path in own if any(fnmatch(path.name, glob.replace("{subject}", subject)) for glob in globs)]

    def rank(path):
        return in_ct_space(path), "derivatives" in path.relative_to(root).parts

    return max(own, key=rank, default=None)


def in_ct_space(path: Path) -> bool:
    """By its name: `space-ncct`, `space-ctp` and the like."""
    return "_space-" in path.name


def table(root: Path, patterns: dict[str, tuple[str, ...]], any_space: bool = False) -> tuple[list[dict], list[str]]:
    """(rows case, patient, files; notes on what was left out). DWI without ADC counts as neither."""
    rows, notes, files = [], [], sorted(root.rglob("*.nii.gz"))
    for subject in subjects(root):
        row = {"case": subject, "patient": subject}
        for what, globs in patterns.items():
            path = choose(files, globs, root, subject)
            if path and what in ("dwi", "adc") and not any_space and not in_ct_space(path):
                notes.append(f"{subject}: {path.name} is not in the space of the CT; register it, or --any_space")
                path = None
            row[what] = path.resolve() if path else ""
        if not row["ctp"]:
            notes.append(f"{subject}: no CT perfusion, left out")
            continue
        if row["dwi"] and not in_ct_space(row["ctp"]) and not any_space:
            notes.append(f"{subject}: {row['ctp'].name} may not be in the space of the CT as the DWI is; look at both")
        if not (row["dwi"] and row["adc"]):
            notes.append(f"{subject}: no pair of DWI and ADC, CT only")
            row |= {"dwi": "", "adc": "", "lesion": ""}
        rows.append(row)
    return rows, notes


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    if not options.root or not Path(options.root).is_dir():
        raise UserError(f"--root {options.root or '(missing)'}: name the folder with derivatives/ and raw_data/")
    from common import tables

    root = Path(options.root).resolve()
    out = Path(options.out or root / "cases.csv")
    if out.exists() and not options.overwrite:
        raise UserError(f"{out} exists; give another --out, or --overwrite to replace it")
    patterns = {what: (own,) if (own := getattr(options, what)) else usual for what, usual in PATTERNS.items()}
    rows, notes = table(root, patterns, options.any_space)
    if not rows:
        raise UserError(f"{root}: none of its subjects has a CT perfusion ({patterns['ctp'][0]}); give its pattern "
                        "with --ctp")  # fmt: skip
    tables.write_csv(out, rows)
    for note in notes:
        print(f"note: {note}")
    paired, masks = sum(bool(row["dwi"]) for row in rows), sum(bool(row["mask"]) for row in rows)
    print(f"{out}: {len(rows)} cases, {paired} with DWI and ADC, {masks} with a brain mask")


if __name__ == "__main__":
    cli.run(main)
