"""Who is in the study and what their volumes hold: split lists, labels, checks, datasets.

Layout (the original's): PET and MRI of a subject carry the same file name in two folders; `train.txt`, `val.txt` and
`test.txt` list file names (bare ids work too); `data_info.csv` has the columns `filename,label_id` (or `ID,label`).
Volumes are (D, H, W) float32 in RAS+ order with values in [0, 1]; every axis is a multiple of 4.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from common import nifti
from common.cache import VolumeCache
from common.cli import UserError
from common.runlog import progress
from il_cldm.config import SPLITS, Config

EXTENSIONS = (".nii.gz", ".nii")
RANGE_TOLERANCE = 1e-3  # resampled or float16-stored volumes may leave [0, 1] by rounding


def stem(name: str) -> str:
    """File name without folder and NIfTI extension."""
    name = Path(name).name
    return next((name[: -len(e)] for e in EXTENSIONS if name.endswith(e)), name)


def subject_of(name: str) -> str:
    """Person behind a file name: `sub-XX` of BIDS names, `123S4567` of ADNI names, else the whole stem.

    Two scans of one person must not fall into two splits, so the split check compares this and not the file name.
    """
    found = re.match(r"(sub-[A-Za-z0-9]+)", stem(name)) or re.match(r"(\d{3}_?S_?\d{4})", stem(name))
    return found.group(1).replace("_", "") if found else stem(name)


def find_volume(folder: str | Path, name: str) -> Path:
    """File of `name` below `folder`, with or without extension; UserError if there is none."""
    folder = Path(folder)
    for candidate in (name, *(stem(name) + e for e in EXTENSIONS)):
        if candidate.endswith(EXTENSIONS) and (folder / candidate).is_file():
            return folder / candidate
    raise UserError(
        f"{stem(name)}: no volume {stem(name)}.nii.gz in {folder}; "
        "make a phantom with `python il_cldm/make_phantom.py`, prepare your own data with --prepare, or name the folder"
    )


def read_list(path: Path) -> list[str]:
    """Names of a split list (whitespace separated, as the original reads it)."""
    if not path.is_file():
        raise UserError(
            f"no split list {path}; `python il_cldm/make_phantom.py` makes a synthetic cohort, "
            "`python il_cldm/main.py --prepare --raw_mri FOLDER` writes lists for your own data"
        )
    names = path.read_text(encoding="utf-8-sig").split()
    if not names:
        raise UserError(f"split list {path} is empty; list one file name per line")
    twice = [name for name, n in Counter(map(stem, names)).items() if n > 1]
    if twice:
        raise UserError(f"{twice[0]} is listed twice in {path}; keep one line")
    return names


def read_labels(config: Config) -> dict[str, int]:
    """Diagnosis label per file stem from `data_info.csv`; UserError on bad columns, duplicates, bad values."""
    path = Path(config.data_info) / "data_info.csv"
    if not path.is_file():
        raise UserError(f"no label table {path}; give a CSV with the columns filename,label_id")
    try:
        table = pd.read_csv(path, encoding="ISO-8859-1", dtype=str, skipinitialspace=True)
    except pd.errors.ParserError as error:
        raise UserError(f"{path} is no table ({error}); give a CSV with the columns filename,label_id") from error
    except pd.errors.EmptyDataError as error:
        raise UserError(f"{path} is empty; give a CSV with the columns filename,label_id") from error
    columns = {c.removeprefix("ï»¿").strip().lower(): c for c in table.columns}  # Excel writes a byte-order mark
    key = next((columns[c] for c in ("filename", "id") if c in columns), None)
    value = next((columns[c] for c in ("label_id", "label") if c in columns), None)
    if key is None or value is None:
        raise UserError(f"{path} has the columns {', '.join(table.columns)}; it needs filename,label_id (or ID,label)")
    labels: dict[str, int] = {}
    for name, text in zip(table[key], table[value], strict=True):
        name = stem(str(name).strip())
        if name in labels:
            raise UserError(f"{name} has two rows in {path}; keep one")
        try:
            number = float(text)
        except (TypeError, ValueError):
            number = float("nan")
        if not number.is_integer() or not 0 <= number < config.num_classes:
            raise UserError(f"{name} has label {text!r} in {path}; labels are whole numbers from 0 to "
                            f"{config.num_classes - 1} (--num_classes)")  # fmt: skip
        labels[name] = int(number)
    return labels


def label_of(labels: dict[str, int], name: str, config: Config) -> int:
    if stem(name) not in labels:
        table = Path(config.data_info) / "data_info.csv"
        raise UserError(f"{stem(name)} has no row in {table}; add filename,label_id for it")
    return labels[stem(name)]


def check_splits(config: Config, splits: tuple[str, ...] = SPLITS) -> dict[str, list[str]]:
    """Names per split; UserError if a list is missing or empty, or if one subject is in two lists."""
    lists = {split: read_list(config.list_path(split)) for split in splits}
    seen: dict[str, str] = {}
    for split, names in lists.items():
        for subject in {subject_of(n): None for n in names}:
            if subject in seen:
                raise UserError(
                    f"subject {subject} is in both the {seen[subject]} and the {split} list; "
                    f"keep it in one of {config.list_path(seen[subject])}, {config.list_path(split)}"
                )
            seen[subject] = split
    return lists


@dataclass(frozen=True)
class Volumes:
    """Prepared volumes of one folder, decoded once and cached."""

    folder: str
    cache: VolumeCache

    def path(self, name: str) -> Path:
        return find_volume(self.folder, name)

    def load(self, name: str) -> np.ndarray:
        """(D, H, W) float32, RAS+; UserError if the file is missing, unreadable, not finite."""
        path = self.path(name)
        return self.cache.get(path, "ras-float32", lambda: nifti.load(path).data)

    def tensor(self, name: str) -> torch.Tensor:
        """(1, D, H, W) float32."""
        return torch.from_numpy(self.load(name))[None]


def open_volumes(config: Config) -> tuple[Volumes, Volumes]:
    """MRI and PET folders of a configuration behind one cache."""
    cache = VolumeCache(config.cache_folder)
    return Volumes(config.whole_MRI, cache), Volumes(config.whole_Abeta, cache)


def check_volumes(volumes: Volumes, names: list[str], runtime=None, what: str = "volumes") -> tuple[int, int, int]:
    """UserError unless shape and values of every volume are usable; fills the cache and returns the common shape.

    Headers of all files are compared first, since that is fast; then voxels are read, sharded over ranks.
    """
    shape = check_shapes(volumes, names)
    mine = runtime.shard(names) if runtime else names
    with progress(len(mine), 0, f"check {what}", enabled=runtime is None or runtime.is_main) as bar:
        for name in mine:
            check_voxels(volumes, name)
            bar.update()
    return shape


def check_shapes(volumes: Volumes, names: list[str]) -> tuple[int, int, int]:
    """The common shape of all volumes; UserError if they differ or do not fit the networks."""
    shapes = {name: nifti.header(volumes.path(name))[0] for name in names}
    common = Counter(shapes.values()).most_common(1)[0][0]
    for name, shape in shapes.items():
        where = f"{stem(name)}: shape {shape} in {volumes.folder}"
        if shape != common:
            raise UserError(f"{where}, the others have {common}; run --prepare on it")
        if any(s % 4 or s < 16 for s in shape):
            raise UserError(f"{where}; every axis must be a multiple of 4 and at least 16: crop or pad with --prepare")
    return common


def check_voxels(volumes: Volumes, name: str) -> None:
    check_values(volumes.load(name), volumes.path(name))


def check_values(volume: np.ndarray, path: Path) -> None:
    """UserError unless a volume has contrast and lies in [0, 1]."""
    low, high = float(volume.min()), float(volume.max())
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise UserError(f"{stem(path.name)}: values from {low:.4g} to {high:.4g} in {path}; volumes are scaled to "
                        "[0, 1]: run --prepare")  # fmt: skip
    if high <= low:
        raise UserError(f"{stem(path.name)}: every voxel of {path} is {low:.4g}; remove the subject or repair the file")


def check_pairs(mri: Volumes, pet: Volumes, names: list[str]) -> None:
    """UserError unless MRI and PET of every subject share shape and affine (0.1 mm)."""
    for name in names:
        (shape_m, affine_m), (shape_p, affine_p) = nifti.header(mri.path(name)), nifti.header(pet.path(name))
        if shape_m != shape_p:
            raise UserError(f"{stem(name)}: MRI has shape {shape_m}, PET {shape_p}; put both on one grid (--prepare)")
        if not np.allclose(affine_m, affine_p, atol=0.1):
            off = np.abs(affine_m - affine_p).max()
            raise UserError(
                f"{stem(name)}: affines of MRI and PET differ by up to {off:.3g}; register them (--prepare)"
            )


def augment(volume: np.ndarray, shift: int, flip: bool, rng: np.random.Generator) -> np.ndarray:
    """Shift (D, H, W) by up to `shift` voxels per axis (zeros enter) and mirror left-right with probability 1/2."""
    if flip and rng.integers(2):
        volume = volume[::-1]
    if shift:
        padded = np.pad(volume, shift)
        starts = rng.integers(0, 2 * shift + 1, size=3)
        volume = padded[tuple(slice(a, a + n) for a, n in zip(starts, volume.shape, strict=True))]
    return np.ascontiguousarray(volume)


class PetDataset(Dataset):
    """Stage 1: PET (1, D, H, W) in [0, 1]; an item is asked for by (index, position in the endless stream)."""

    def __init__(self, volumes: Volumes, names: list[str], config: Config):
        self.volumes, self.names = volumes, names
        self.shift, self.flip, self.seed = config.augment_shift, config.augment_flip, config.seed

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, item: tuple[int, int]) -> torch.Tensor:
        index, position = item
        pet = self.volumes.load(self.names[index])
        if self.shift or self.flip:  # seeded by position: the same whatever the workers, the ranks and a resume
            pet = augment(pet, self.shift, self.flip, np.random.default_rng((self.seed, position)))
        return torch.from_numpy(pet)[None]


class PairDataset(Dataset):
    """Stage 2: MRI (1, D, H, W), normalised PET latent (C, D/4, H/4, W/4), label."""

    def __init__(self, mri: Volumes, latents: dict[str, torch.Tensor], labels: dict[str, int], names: list[str]):
        self.mri, self.latents, self.labels, self.names = mri, latents, labels, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        name = self.names[item[0]]
        return self.mri.tensor(name), self.latents[stem(name)], self.labels[stem(name)]
