"""--prepare: raw NIfTI to paired volumes on one grid, RAS+, in [0, 1], with a record of every scale and a picture to check.

Not done here, because established tools do it better: PET-to-MRI registration and motion correction (SPM, ANTs, FSL), skull
stripping (SynthStrip, HD-BET). Give registered PET (same world space as its MRI) and brain masks or label maps.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from common import figures, nifti, runtime
from common.cli import UserError
from common.runlog import progress, write_json
from il_cldm import dataset
from il_cldm.config import SPLITS, Config

# Trailing words that say what a file is, not whom it shows.
SUFFIX = re.compile(r"(_T1w?|_MRI|_PET|_pet|_AV45|_FBP|_FBB|_PIB|_mask|_brainmask|_DLMUSE|_labels?|_dseg)+$")


def key_of(path: Path) -> str:
    """Whom a file shows: `sub-X[_ses-Y]` of BIDS names, else the stem without modality words."""
    name = dataset.stem(path.name)
    bids = re.match(r"(sub-[A-Za-z0-9]+)(?:_(ses-[A-Za-z0-9]+))?", name)
    return "_".join(p for p in bids.groups() if p) if bids else SUFFIX.sub("", name)


def scan(folder: str, what: str) -> dict[str, Path]:
    """NIfTI files below a folder by key; in a BIDS tree only T1w (MRI) or pet images. UserError if two files share a key."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"no folder {root} (--raw_{what}); name the folder of raw NIfTI files")
    paths = sorted(p for p in root.rglob("*") if p.name.endswith(dataset.EXTENSIONS))
    if any("sub-" in p.name for p in paths) and what in ("mri", "pet"):
        paths = [p for p in paths if dataset.stem(p.name).endswith({"mri": "_T1w", "pet": "_pet"}[what])]
    if not paths:
        raise UserError(f"no NIfTI file below {root} (--raw_{what})")
    found: dict[str, Path] = {}
    for path in paths:
        if key_of(path) in found:
            raise UserError(f"{found[key_of(path)]} and {path} both belong to {key_of(path)}; keep one of them")
        found[key_of(path)] = path
    return found


def scale(data: np.ndarray, norm: str, inside: np.ndarray, divisor: float) -> tuple[np.ndarray, dict]:
    """Data to [0, 1] and the (low, high) that map to 0 and 1. Only `fixed` and `none` keep values comparable between subjects."""
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
        raise UserError(f"{norm} scaling found no contrast (low {low:.4g}, high {high:.4g})")
    scaled = ((data - low) / (high - low)).astype(np.float32)
    clipped = float(((scaled < 0) | (scaled > 1))[inside].mean())
    return scaled.clip(0, 1), {"norm": norm, "low": low, "high": high, "clipped_share": clipped}


def to_grid(mri: nifti.Volume, mask: nifti.Volume | None, shape, spacing_mm: float) -> tuple[nifti.Volume, np.ndarray]:
    """MRI (masked) on the target grid, axes kept, centred on the brain, and the mask there; also without a mask (head > mean)."""
    if mask is not None:
        on_mri = mask if mask.shape == mri.shape and np.allclose(mask.affine, mri.affine, atol=1e-3) else nifti.resample_to(mask, mri.shape, mri.affine, order=0)
        inside = on_mri.data > 0
        if not inside.any():
            raise UserError(f"{mask.path}: the mask is empty on the grid of {mri.path}; are both in one world space?")
        mri = replace(mri, data=mri.data * inside)
    else:
        inside = mri.data > mri.data.mean()
        if not inside.any():
            raise UserError(f"{mri.path}: every voxel has the same value")
    corners = np.argwhere(inside)
    middle_mm = mri.affine @ np.append((corners.min(0) + corners.max(0)) / 2, 1.0)
    fine = nifti.resample(mri, spacing_mm)
    centre = (np.linalg.inv(fine.affine) @ middle_mm)[:3]
    grid = nifti.crop_or_pad(fine, shape, centre)
    if mask is None:
        return grid, grid.data > grid.data.mean()
    on_grid = nifti.resample_to(replace(mri, data=inside.astype(np.float32)), grid.shape, grid.affine, order=1).data > 0.5
    lost = 1 - on_grid.sum() * np.prod(grid.spacing_mm) / (inside.sum() * np.prod(mri.spacing_mm))
    if lost > 0.05:
        raise UserError(f"{mri.path}: {100 * lost:.0f} % of the brain falls outside the grid {tuple(shape)} at {spacing_mm} mm; raise --shape or --spacing_mm")
    return replace(grid, data=grid.data * on_grid), on_grid


def prepare_mri(path: Path, mask_path: Path | None, shape, spacing_mm: float, norm: str) -> tuple[nifti.Volume, np.ndarray, dict]:
    """One raw MRI on the target grid in [0, 1], the mask there, and its scale."""
    mask = nifti.load_labels(mask_path) if mask_path else None
    grid, inside = to_grid(nifti.load(path), mask, shape, spacing_mm)
    data, scales = scale(grid.data, norm, inside, 1.0)
    return replace(grid, data=data), inside, scales


def preparation(config: Config) -> dict:
    """Grid and MRI scaling that a model is trained with, from data_info/prepare.json where it exists; stored with the checkpoint."""
    record = read_record(config)
    own = {"shape": list(config.shape), "spacing_mm": config.spacing_mm, "mri_norm": config.mri_norm}
    return {name: record.get(name, value) for name, value in own.items()}


def read_record(config: Config) -> dict:
    path = Path(config.data_info) / "prepare.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def prepare(config: Config, rt: runtime.Runtime) -> None:
    """Prepare every raw MRI (and PET, and label map) into the data folders; write prepare.json, QC pictures and split lists."""
    if not config.raw_mri:
        raise UserError("--prepare needs --raw_mri FOLDER (and --raw_pet FOLDER for training, --raw_mask FOLDER for skull stripping)")
    if any(s % 4 for s in config.shape) or len(config.shape) != 3:
        raise UserError(f"--shape {config.shape}: three axes, each a multiple of 4")
    mris = scan(config.raw_mri, "mri")
    pets = scan(config.raw_pet, "pet") if config.raw_pet else {}
    masks = scan(config.raw_mask, "mask") if config.raw_mask else {}
    for what, files in (("PET", pets), ("mask", masks)):
        missing = [k for k in mris if files and k not in files]
        if missing:
            raise UserError(f"{missing[0]}: no {what} matches {mris[missing[0]].name}; files are paired by name without modality words")
    record = read_record(config)
    fresh = {"shape": list(config.shape), "spacing_mm": config.spacing_mm, "mri_norm": config.mri_norm, "pet_norm": config.pet_norm, "pet_divisor": config.pet_divisor}  # fmt: skip
    changed = [k for k, v in fresh.items() if k in record and record[k] != v]
    if changed and not config.overwrite:
        raise UserError(f"{config.data_info}/prepare.json was made with other settings ({', '.join(f'{k} {record[k]} -> {fresh[k]}' for k in changed)}); add --overwrite or use another --root")

    entries = {}
    mine = rt.shard(sorted(mris))
    with progress(len(mine), 0, "prepare", enabled=rt.is_main) as bar:
        for key in mine:
            entries[f"{key}.nii.gz"] = prepare_subject(key, mris[key], pets.get(key), masks.get(key), config, record)
            bar.update()
    entries = {k: v for part in rt.gather(entries) for k, v in part.items()}
    if rt.is_main:
        write_json(Path(config.data_info) / "prepare.json", record | fresh | {"subjects": record.get("subjects", {}) | entries})
        write_lists(config, sorted(entries))
        rt.print(f"{len(entries)} subjects prepared; look at {Path(config.data_info) / 'qc'} before training")
        if not (Path(config.data_info) / "data_info.csv").is_file():
            rt.print(f"stage 2 needs {Path(config.data_info) / 'data_info.csv'} with the columns filename,label_id")
    rt.barrier()


def prepare_subject(key: str, mri_path: Path, pet_path: Path | None, mask_path: Path | None, config: Config, record: dict) -> dict:
    name = f"{key}.nii.gz"
    targets = [Path(config.whole_MRI) / name] + ([Path(config.whole_Abeta) / name] if pet_path else [])
    old = record.get("subjects", {}).get(name)
    if all(t.is_file() for t in targets) and not config.overwrite:
        if old is None or old["mri"] != str(mri_path):
            raise UserError(f"{key}: {targets[0]} exists and was not made from {mri_path}; add --overwrite or use another --root")
        return old
    mri, inside, scales = prepare_mri(mri_path, mask_path, config.shape, config.spacing_mm, config.mri_norm)
    entry = {"mri": str(mri_path), "mri_scale": scales}
    pictures = [("MRI", mri.data)]
    if pet_path:
        pet = nifti.resample_to(nifti.load(pet_path), mri.shape, mri.affine)
        if not pet.data.any():
            raise UserError(f"{pet_path}: nothing of it lies on the MRI {mri_path}; register PET to MRI first")
        data, pet_scale = scale(pet.data * inside if mask_path else pet.data, config.pet_norm, inside, config.pet_divisor)
        entry |= {"pet": str(pet_path), "pet_scale": pet_scale}
        nifti.save(targets[1], data, mri.affine)
        pictures.append(("PET", data))
    if mask_path:
        labels = nifti.resample_to(nifti.load_labels(mask_path), mri.shape, mri.affine, order=0)
        nifti.save(Path(config.regions) / name, labels.data, mri.affine, dtype=np.int16)
        entry["mask"] = str(mask_path)
    figures.montage(Path(config.data_info) / "qc" / f"{key}.png", pictures, window=(0, 1), spacing_mm=mri.spacing_mm, title=key)
    nifti.save(targets[0], mri.data, mri.affine)  # the MRI last: a subject with an MRI is complete
    return entry


def write_lists(config: Config, names: list[str]) -> None:
    """Split lists by subject in the given shares; existing lists are left alone."""
    paths = {split: config.list_path(split) for split in SPLITS}
    if any(p.is_file() for p in paths.values()):
        return
    subjects = sorted({dataset.subject_of(n) for n in names})
    order = np.random.default_rng(config.seed).permutation(len(subjects))
    bounds = np.round(np.cumsum(config.split_fractions) / np.sum(config.split_fractions) * len(subjects)).astype(int)
    start = 0
    for split, end in zip(SPLITS, bounds, strict=True):
        chosen = {subjects[i] for i in order[start:end]}
        paths[split].write_text("".join(f"{n}\n" for n in names if dataset.subject_of(n) in chosen))
        start = end


def prepare_in_memory(path: Path, settings: dict, config: Config) -> nifti.Volume:
    """A raw MRI on the grid that the model was trained with (--gen --native); --raw_mask gives its brain mask."""
    mask = scan(config.raw_mask, "mask").get(key_of(path)) if config.raw_mask else None
    if config.raw_mask and mask is None:
        raise UserError(f"{path}: no mask in {config.raw_mask} matches its name")
    return prepare_mri(path, mask, settings["shape"], settings["spacing_mm"], settings["mri_norm"])[0]
