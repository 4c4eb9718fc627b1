"""--prepare: raw NIfTI to paired volumes on one grid, RAS+, in [0, 1], with a record of scales and pictures to check.

Not done here, because established tools do it better: PET-to-MRI registration and motion correction (SPM, ANTs, FSL),
skull stripping (SynthStrip, HD-BET). Give registered PET (same world space as its MRI) and brain masks or label maps.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from common import figures, nifti, runtime
from common.checkpoint import replacing
from common.cli import UserError
from common.runlog import progress, write_json
from il_cldm import dataset
from il_cldm.config import SPLITS, Config

# Trailing words that say what a file is, not whom it shows.
SUFFIX = re.compile(r"(_T1w?|_MRI|_PET|_pet|_AV45|_FBP|_FBB|_PIB|_mask|_brainmask|_DLMUSE|_labels?|_dseg)+$")
BIDS_SUFFIX = {"mri": "_T1w", "pet": "_pet"}
GRID_SETTINGS = ("shape", "spacing_mm", "mri_norm", "masked")  # what an MRI must share with those of the training
LOST_SHARE = 0.05  # of the brain, outside the target grid
PET_SHARE = 0.8  # of the brain that a PET must cover


def key_of(path: Path) -> str:
    """Whom a file shows: `sub-X[_ses-Y]` of BIDS names, else the stem without modality words."""
    name = dataset.stem(path.name)
    bids = re.match(r"(sub-[A-Za-z0-9]+)(?:_(ses-[A-Za-z0-9]+))?", name)
    return "_".join(p for p in bids.groups() if p) if bids else SUFFIX.sub("", name)


def scan(folder: str, what: str) -> dict[str, Path]:
    """NIfTI files below a folder by key; in a BIDS tree only T1w (MRI) or pet images. UserError if two share a key."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"no folder {root} (--raw_{what}); name the folder of raw NIfTI files")
    paths = sorted(p.resolve() for p in root.rglob("*") if p.name.endswith(dataset.EXTENSIONS) and p.name[0] != ".")
    if what in BIDS_SUFFIX and any(p.name.startswith("sub-") for p in paths):
        paths = [p for p in paths if dataset.stem(p.name).endswith(BIDS_SUFFIX[what])] or paths
    if not paths:
        raise UserError(f"no NIfTI file below {root} (--raw_{what}); name the folder of raw NIfTI files")
    found: dict[str, Path] = {}
    for path in paths:
        if key_of(path) in found:
            raise UserError(f"{found[key_of(path)]} and {path} both belong to {key_of(path)}; keep one of them")
        found[key_of(path)] = path
    return found


def scale(data: np.ndarray, norm: str, inside: np.ndarray, divisor: float, path: Path) -> tuple[np.ndarray, dict]:
    """Data to [0, 1] and the (low, high) that map to 0 and 1. Only `fixed` and `none` keep subjects comparable."""
    values = data[inside]
    if norm == "none":
        low, high = 0.0, 1.0
    elif norm == "fixed":
        low, high = 0.0, float(divisor)
    elif norm == "percentile":
        low, high = 0.0, float(np.percentile(values, 99.5))
    else:
        low, high = float(values.min()), float(values.max())
    if not high > low:
        raise UserError(f"{path}: {norm} scaling found no contrast in the brain (low {low:.4g}, high {high:.4g})")
    scaled = ((data - low) / (high - low)).astype(np.float32)
    clipped = float(((scaled < 0) | (scaled > 1))[inside].mean())
    return scaled.clip(0, 1), {"norm": norm, "low": low, "high": high, "clipped_share": clipped}


def share_within(mask: np.ndarray, affine: np.ndarray, shape, other_affine: np.ndarray) -> float:
    """Share of a mask's voxels whose centres lie in the field of view of another grid."""
    points = np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]
    inverse = np.linalg.inv(other_affine)
    voxels = points @ inverse[:3, :3].T + inverse[:3, 3]
    return float(np.all((voxels >= -0.5) & (voxels <= np.array(shape) - 0.5), axis=1).mean())


def to_grid(mri: nifti.Volume, mask: nifti.Volume | None, shape, spacing_mm: float) -> tuple[nifti.Volume, np.ndarray]:
    """MRI (masked) on the target grid, axes kept, centred on the brain, and the mask there; else head > mean."""
    if mask is None:
        inside = mri.data > mri.data.mean()
        if not inside.any():
            raise UserError(f"{mri.path}: every voxel has the same value; repair the file")
    else:
        if mask.shape != mri.shape or not np.allclose(mask.affine, mri.affine, atol=1e-3):
            mask = nifti.resample_to(mask, mri.shape, mri.affine, order=0)
        inside = mask.data > 0
        if not inside.any():
            raise UserError(f"{mask.path}: the mask is empty on the grid of {mri.path}; bring both into one space")
        mri = replace(mri, data=mri.data * inside)
    corners = np.argwhere(inside)
    middle_mm = mri.affine @ np.append((corners.min(0) + corners.max(0)) / 2, 1.0)
    fine = nifti.resample(mri, spacing_mm)
    grid = nifti.crop_or_pad(fine, shape, (np.linalg.inv(fine.affine) @ middle_mm)[:3])
    if mask is None:
        return grid, grid.data > grid.data.mean()
    lost = 1 - share_within(inside, mri.affine, grid.shape, grid.affine)
    if lost > LOST_SHARE:
        raise UserError(
            f"{mri.path}: {100 * lost:.0f} % of the brain falls outside the grid "
            f"{' x '.join(map(str, shape))} at {spacing_mm:g} mm; raise --shape or --spacing_mm"
        )
    soft = nifti.resample_to(replace(mri, data=inside.astype(np.float32)), grid.shape, grid.affine).data
    if not (soft > 0.5).any():
        raise UserError(f"{mask.path}: the mask fills no voxel of {spacing_mm:g} mm; check it, or lower --spacing_mm")
    return replace(grid, data=grid.data * (soft > 0.5)), soft > 0.5


def prepare_mri(mri_path: Path, mask_path: Path | None, settings: dict) -> tuple[nifti.Volume, np.ndarray, dict]:
    """One raw MRI on the target grid in [0, 1], the mask there, and its scale."""
    mask = nifti.load_labels(mask_path) if mask_path else None
    grid, inside = to_grid(nifti.load(mri_path), mask, settings["shape"], settings["spacing_mm"])
    data, scales = scale(grid.data, settings["mri_norm"], inside, 1.0, mri_path)
    return replace(grid, data=data), inside, scales


def record_path(config: Config) -> Path:
    return Path(config.data_info) / "prepare.json"


def read_record(config: Config) -> dict:
    """What --prepare (or make_phantom.py) wrote down; {} before."""
    path = record_path(config)
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); repair it, or delete it and run --prepare again") from error


def preparation(config: Config) -> dict:
    """Grid and MRI scaling that a model is trained with, from prepare.json where it exists; kept in its checkpoint."""
    record, own = read_record(config), own_settings(config)
    return {name: record.get(name, own[name]) for name in GRID_SETTINGS}


def own_settings(config: Config) -> dict:
    """Settings of the command line that all subjects of a study share."""
    names = ("shape", "spacing_mm", "mri_norm", "pet_norm", "pet_divisor")
    settings = {name: getattr(config, name) for name in names} | {"masked": bool(config.raw_mask)}
    return settings | {"shape": list(config.shape)}


def check_options(config: Config) -> None:
    if not config.raw_mri:
        raise UserError(
            "--prepare needs --raw_mri FOLDER (and --raw_pet FOLDER for training, --raw_mask FOLDER to strip skulls)"
        )
    if len(config.shape) != 3 or any(s % 4 or s < 16 for s in config.shape):
        raise UserError(f"--shape {' '.join(map(str, config.shape))}: three axes, each a multiple of 4 from 16 on")
    if not 0 < config.spacing_mm < np.inf or not 0 < config.pet_divisor < np.inf:
        raise UserError("--spacing_mm and --pet_divisor must be positive")
    shares = np.array(config.split_fractions)
    if len(shares) != 3 or not np.isfinite(shares).all() or shares.min() < 0 or shares.sum() <= 0:
        raise UserError(f"--split_fractions {config.split_fractions}: three shares, none negative, not all zero")


def prepare(config: Config, rt: runtime.Runtime) -> None:
    """Prepare every raw MRI (and PET, label map) into the data folders; write prepare.json, QC pictures, split lists.

    Subjects that were prepared from the same files with the same settings are kept.
    """
    # ---- setup: everything that names and headers can tell, before anything is written
    check_options(config)
    mris = scan(config.raw_mri, "mri")
    pets = scan(config.raw_pet, "pet") if config.raw_pet else {}
    masks = scan(config.raw_mask, "mask") if config.raw_mask else {}
    for what, files in (("PET", pets), ("mask", masks)):
        missing = [k for k in mris if files and k not in files]
        if missing:
            raise UserError(
                f"{missing[0]}: no {what} matches {mris[missing[0]].name}; "
                "files are paired by name without modality words such as _T1w or _pet"
            )
    for path in (*mris.values(), *(pets[k] for k in mris if pets), *(masks[k] for k in mris if masks)):
        nifti.header(path)
    record, settings = read_record(config), own_settings(config)
    known = record.get("subjects", {})
    changed = [k for k, v in settings.items() if k in record and record[k] != v]
    if changed and not config.overwrite:
        what = ", ".join(f"{k} {record[k]} -> {settings[k]}" for k in changed)
        raise UserError(f"{record_path(config)} is of other settings ({what}); add --overwrite or use another --root")
    others = [name for name in known if dataset.stem(name) not in mris]
    if changed and others:
        raise UserError(f"{others[0]}, of other settings, is not in {config.raw_mri}; use another --root")
    sources = {
        f"{k}.nii.gz": {what: str(files[k]) for what, files in (("mri", mris), ("pet", pets), ("mask", masks)) if files}
        for k in sorted(mris)
    }
    for name, source in sources.items():
        present = [path for path in targets(config, name, source).values() if path.is_file()]
        if present and known.get(name, {}).get("mri") != source["mri"] and not config.overwrite:
            raise UserError(
                f"{present[0]} exists and was not made from {source['mri']}; add --overwrite or use another --root"
            )

    # ---- subjects: the record claims them first, so that a run that was cut short can be continued
    regions = {k: getattr(config, k) for k in ("target_labels", "reference_labels", "suvr_threshold")}
    record |= settings | {k: v for k, v in regions.items() if v}
    done = {n: known[n] for n, source in sources.items() if not config.overwrite and complete(config, n, source, known)}
    rt.barrier()

    def write_record(entries):
        if rt.is_main:
            write_json(record_path(config), record | {"subjects": known | sources | entries})

    write_record(done)
    mine = rt.shard([n for n in sources if n not in done])
    with progress(len(mine), 0, "prepare", enabled=rt.is_main) as bar:
        for name in mine:
            done[name] = prepare_subject(config, name, sources[name], settings)
            write_record(done)
            bar.update()
    done = {k: v for part in rt.gather(done) for k, v in part.items()}
    write_record(done)
    if rt.is_main:
        write_lists(config, sorted(sources), rt)
        rt.print(f"{len(sources)} subjects prepared; look at {Path(config.data_info) / 'qc'} before training")
        if set(pets) - set(mris):
            rt.print(f"{len(set(pets) - set(mris))} PET without an MRI left out, such as {min(set(pets) - set(mris))}")
        if not (Path(config.data_info) / "data_info.csv").is_file():
            rt.print(f"stage 2 needs {Path(config.data_info) / 'data_info.csv'} with the columns filename,label_id")
    rt.barrier()


def targets(config: Config, name: str, source: dict) -> dict[str, Path]:
    """Files that a subject is prepared into."""
    folders = {"pet": config.whole_Abeta, "mask": config.regions, "mri": config.whole_MRI}
    return {what: Path(folder) / name for what, folder in folders.items() if what in source}


def complete(config: Config, name: str, source: dict, known: dict) -> bool:
    """Whether the record and the disk hold this subject, made from these very files."""
    old = known.get(name, {})
    same = "mri_scale" in old and all(old.get(what) == path for what, path in source.items())
    return same and all(path.is_file() for path in targets(config, name, source).values())


def prepare_subject(config: Config, name: str, source: dict, settings: dict) -> dict:
    """Write one subject; returns its entry of prepare.json. Nothing is written before everything is computed."""
    mask_path = Path(source["mask"]) if "mask" in source else None
    mri, inside, scales = prepare_mri(Path(source["mri"]), mask_path, settings)
    entry, volumes = source | {"mri_scale": scales}, {"mri": mri.data}
    if "pet" in source:
        pet = nifti.load(source["pet"])
        covered = share_within(inside, mri.affine, pet.shape, pet.affine)
        if covered < PET_SHARE:
            raise UserError(
                f"{pet.path} covers {100 * covered:.0f} % of the brain of {source['mri']}; register PET to MRI first"
            )
        on_grid = nifti.resample_to(pet, mri.shape, mri.affine).data
        if mask_path:
            on_grid = on_grid * inside
        volumes["pet"], entry["pet_scale"] = scale(on_grid, config.pet_norm, inside, config.pet_divisor, pet.path)
    if mask_path:
        volumes["mask"] = nifti.resample_to(nifti.load_labels(mask_path), mri.shape, mri.affine, order=0).data
    pictures = {what.upper(): volumes[what] for what in ("mri", "pet") if what in volumes}
    picture = Path(config.data_info) / "qc" / f"{dataset.stem(name)}.png"
    figures.montage(picture, pictures, window=(0, 1), spacing_mm=mri.spacing_mm, title=dataset.stem(name))
    for what, path in targets(config, name, source).items():  # the MRI last: a subject with an MRI is complete
        nifti.save(path, volumes[what], mri.affine, dtype=np.int32 if what == "mask" else np.float32)
    return entry


def write_lists(config: Config, names: list[str], rt: runtime.Runtime) -> None:
    """Split lists by subject in the given shares, each of at least one subject; existing lists are left alone."""
    paths = {split: config.list_path(split) for split in SPLITS}
    if any(p.is_file() for p in paths.values()):
        listed = {dataset.stem(n) for p in paths.values() if p.is_file() for n in p.read_text().split()}
        new = [n for n in names if dataset.stem(n) not in listed]
        if new:
            rt.print(f"{len(new)} subjects are in no split list, such as {new[0]}: edit the lists, they existed before")
        return
    subjects = sorted({dataset.subject_of(n) for n in names})
    shares = np.array(config.split_fractions) / np.sum(config.split_fractions)
    counts = np.maximum(np.round(shares * len(subjects)).astype(int), (shares > 0).astype(int))
    counts[counts.argmax()] += len(subjects) - counts.sum()
    if counts.min() < 0 or (counts < (shares > 0)).any():
        rt.print(f"{len(subjects)} subjects are too few for the splits: no lists written")
        return
    order = np.random.default_rng(config.seed).permutation(len(subjects))
    for path, group in zip(paths.values(), np.split(order, np.cumsum(counts)[:-1]), strict=True):
        chosen = {subjects[i] for i in group}
        with replacing(path) as file:
            file.write("".join(f"{n}\n" for n in names if dataset.subject_of(n) in chosen).encode())


def prepare_in_memory(path: Path, settings: dict, config: Config) -> nifti.Volume:
    """A raw MRI on the grid that the model was trained with (--gen --native); --raw_mask gives its brain mask."""
    mask = scan(config.raw_mask, "mask").get(key_of(path)) if config.raw_mask else None
    if config.raw_mask and mask is None:
        raise UserError(f"{path}: no mask in {config.raw_mask} matches its name")
    if mask is None and settings.get("masked"):
        raise UserError(f"{path}: the model was trained on masked brains; give brain masks with --raw_mask FOLDER")
    return prepare_mri(path, mask, settings)[0]
