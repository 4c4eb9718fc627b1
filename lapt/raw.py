"""Raw stroke cases: finding, reading and checking them, and what is measured on each; geometry always exact.

Raw images are NIfTI in any orientation: ctp (4D, HU), dwi (any unit), adc (mm^2/s, 1e-3 or 1e-6 mm^2/s), mask (brain),
lesion; in memory (X, Y, Z) in RAS+ order, a CTP (T, X, Y, Z). DWI, ADC and lesion may be missing (CT only), or the
lesion alone (no lesion). Further images that the network is to see, 3D and in any unit (perfusion maps, a CT without
contrast), are named by `maps`; they follow the frames of the CTP as channels, or take its place. Not done here, for
established tools do it better: motion correction of the CTP and registration to it (see lapt/isles.py for commands).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from common import nifti, tables
from common.cli import UserError

IMAGES = ("ctp", "dwi", "adc", "mask", "lesion")
NAMES = {"ctp": ("ctp",), "dwi": ("dwi",), "adc": ("adc",), "mask": ("mask", "ctp_mask"), "lesion": ("lesion",)}
QUANTILES = (0.005, 0.995)
SAME_MM = 0.1  # grids whose voxels lie closer are the same
ADC_UNITS = ((1e2, 5e3, 1.0), (1e-1, 5.0, 1e3), (1e-4, 5e-3, 1e6))  # range of the brain's median; factor to 1e-6 mm^2/s
REST_HU = (-20.0, 150.0)  # of the brain's median in the first frame
COVERED = 0.5  # share of the brain that DWI and ADC must reach
FINEST_MM, COARSEST_MM = 0.2, 40.0  # of a common grid
BONE_HU = 150.0  # thin bone of the temples is fainter in thick slices than bone elsewhere


@dataclass(frozen=True)
class Source:
    """Files of one case by IMAGES; those that it lacks are not in `files`."""

    name: str
    patient: str
    files: dict[str, Path]


@dataclass(frozen=True)
class Rules:
    """How raw cases are read. time_points: 0 takes any number.

    resample_time: another number of frames is interpolated to time_points; frame_s > 0: at these distances, by the
    time in the header, else over the whole series. to_ctp_grid: images of another grid are resampled onto the CTP's.
    spacing_mm, shape: common grid, 0 keeps the case's own. clip_lesion: lesion outside the mask is cut off rather than
    refused. fill_holes: of the mask, slice by slice. make_masks: where there is none, from the CTP. min_brain_mm2:
    slices with less brain are not retained. maps: images that follow the CTP as channels, in this order; maps_only:
    instead of it.
    """

    time_points: int = 0
    resample_time: bool = False
    frame_s: float = 0.0
    to_ctp_grid: bool = False
    spacing_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    shape: tuple[int, int, int] = (0, 0, 0)
    clip_lesion: bool = False
    fill_holes: bool = False
    make_masks: bool = False
    min_brain_mm2: float = 200.0
    maps: tuple[str, ...] = ()
    maps_only: bool = False

    def __post_init__(self):
        if self.maps_only and self.make_masks:
            raise UserError("--make_masks makes brain masks from a CTP, which maps alone have not: give the masks")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Images of which the network's input is made; the first one sets the grid."""
        return self.maps if self.maps_only else ("ctp", *self.maps)


@dataclass
class Study:
    """One case as read: ctp (T, X, Y, Z) float32 HU, mask (X, Y, Z) bool; dwi, adc (1e-6 mm^2/s), lesion or None.

    The last channels of ctp are the images `maps`, in their own units.
    """

    ctp: np.ndarray
    mask: np.ndarray
    affine: np.ndarray
    dwi: np.ndarray | None = None
    adc: np.ndarray | None = None
    lesion: np.ndarray | None = None
    maps: tuple[str, ...] = ()

    @property
    def time_points(self) -> int:
        """Frames of the CTP."""
        return len(self.ctp) - len(self.maps)

    @property
    def spacing_mm(self) -> np.ndarray:
        return np.linalg.norm(self.affine[:3, :3], axis=0)


# ---- finding --------------------------------------------------------------------------------------------------------


def check_maps(maps: tuple[str, ...]) -> None:
    """UserError for names of maps that no file can have, are another image's, or occur twice."""
    taken = {name for names in NAMES.values() for name in names}
    odd = [name for name in maps if not re.fullmatch(r"[A-Za-z][\w-]*", name) or name in taken or maps.count(name) > 1]
    if odd:
        raise UserError(f"--maps {' '.join(maps)}: {odd[0]!r} must be the name of a further image, once, such as tmax "
                        "for tmax.nii.gz")  # fmt: skip


def find(input_dir: str | Path, maps: tuple[str, ...] = ()) -> list[Source]:
    """Cases below a folder: every folder with one of the images; its path is the name, its first part the patient.

    `<case>/ctp.nii.gz` as in the 2D release; `<patient>/<date>/<series>/ctp.nii.gz` as in the volume release.
    """
    all_names = NAMES | {name: (name,) for name in maps}
    root = Path(input_dir).resolve()
    if not root.is_dir():
        raise UserError(f"no folder {root}; name the folder of raw cases with --input_dir, or a table with --cases")
    known = {f"{name}{ending}" for names in all_names.values() for name in names for ending in (".nii.gz", ".nii")}
    folders = sorted({path.parent for path in root.rglob("*") if path.name in known})
    if not folders:
        raise UserError(f"{root} holds no case; cases are folders with ctp.nii.gz, mask.nii.gz and, for training, "
                        "dwi.nii.gz, adc.nii.gz, lesion.nii.gz (`python lapt/make_phantom.py` makes some)")  # fmt: skip
    if root in folders:
        raise UserError(f"{root} holds images itself; give the folder above it, with one folder per case")
    sources = []
    for folder in folders:
        parts = folder.relative_to(root).parts
        files = {}
        for what, names in all_names.items():
            there = [folder / f"{n}{e}" for n in names for e in (".nii.gz", ".nii") if (folder / f"{n}{e}").is_file()]
            if there:
                files[what] = there[0]
        sources.append(Source("__".join(parts), parts[0], files))
    return sources


def read_table(path: str | Path, maps: tuple[str, ...] = ()) -> list[Source]:
    """Cases of a CSV with the columns case, maps and optionally ctp, patient, dwi, adc, mask, lesion (blank: none).

    Paths are absolute or count from the table's folder. UserError for missing columns, blank or repeated cases.
    """
    path = Path(path)
    known = ", ".join(("case", "patient", *IMAGES, *maps))
    columns, rows = tables.read_csv(path, f"give one with the columns {known}")
    absent = [column for column in ("case", *(maps or ("ctp",))) if column not in columns]
    if absent:
        raise UserError(f"{path} has no column {', '.join(absent)}; add it: {known}")
    sources = []
    for number, row in enumerate(rows, 2):
        name = (row["case"] or "").strip()
        if not name or "/" in name or name in (".", ".."):
            raise UserError(f"{path}: row {number} has case {name!r}; give a name that can be a folder's")
        given = (what for what in (*IMAGES, *maps) if (row.get(what) or "").strip())
        files = {what: path.parent.resolve() / row[what].strip() for what in given}
        sources.append(Source(name, (row.get("patient") or "").strip() or name, files))
    twice = [name for name, n in Counter(source.name for source in sources).items() if n > 1]
    if twice:
        raise UserError(f"{path}: case {twice[0]} has several rows; keep one")
    return sorted(sources, key=lambda source: source.name)


def frames(path: Path) -> int | None:
    """Number of time points by the header; None where it cannot be read (reading the file will say why)."""
    try:
        shape = nib.load(path).shape
    except Exception:  # nibabel raises many kinds
        return None
    return int(shape[3]) if len(shape) > 3 else 1


def frame_seconds(path: Path) -> float:
    """Time between the frames of a series in s by its header; UserError where it says nothing."""
    header = nib.load(path).header
    unit = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}.get(header.get_xyzt_units()[1], 0.0)
    step = float((*header.get_zooms(), 0.0)[3]) * unit
    if not 0 < step < 60:
        raise UserError(f"{path}: its header gives no time between frames; correct it, or leave out --frame_s")
    return step


# ---- reading --------------------------------------------------------------------------------------------------------


def read(source: Source, rules: Rules) -> Study:
    """The images of a case, checked and on one grid. UserError says what is wrong with which file, and what to do."""
    first = rules.inputs[0]
    where = Path(source.files[first]).parent if first in source.files else source.name
    needed = [*rules.inputs] + ["mask"] * (not rules.make_masks)
    needed += ["dwi", "adc"] if {"dwi", "adc", "lesion"} & set(source.files) else []
    missing = [what for what in needed if what not in source.files]
    if missing:
        hint = "; or add --make_masks" if missing == ["mask"] else ""
        raise UserError(f"no {', '.join(missing)} in {where}; add {missing[0]}.nii.gz (CT alone: no DWI, ADC and "
                        f"lesion){hint}")  # fmt: skip

    ctp = nifti.load(source.files[first], series=not rules.maps_only)
    if ctp.data.ndim == 3:
        ctp = replace(ctp, data=ctp.data[None])
    grid = nifti.Volume(ctp.data[0], ctp.affine, ctp.path)
    channels = [] if rules.maps_only else [*fit_time(ctp.data, ctp.path, rules)]
    others = {*IMAGES[1:], *rules.maps} - {first}
    loaded = {what: nifti.load(path) for what, path in source.files.items() if what in others}
    loaded |= {first: grid} if rules.maps_only else {}
    loaded = {what: on_grid(volume, grid, rules, soft=what in ("mask", "lesion")) for what, volume in loaded.items()}
    if "mask" not in loaded:
        loaded["mask"] = replace(grid, data=mask_from_ct(ctp, np.array(grid.spacing_mm)).astype(np.float32))
    mask = loaded["mask"].data > (0.5 if rules.to_ctp_grid else 0)
    mask = fill_holes(mask) if rules.fill_holes else mask
    if not mask.any():
        raise UserError(f"the mask is empty, {loaded['mask'].path}; repair it, or remove it and add --make_masks")
    channels += [loaded[name].data for name in rules.maps]
    study = Study(np.stack(channels), mask, grid.affine, maps=rules.maps)
    if study.time_points:
        check_hounsfield(study, ctp.path)
    for name in rules.maps:
        check_varies(loaded[name].data[mask], loaded[name].path)
    if "dwi" in loaded:
        study.dwi = np.maximum(loaded["dwi"].data, 0)
        study.adc = np.maximum(loaded["adc"].data * adc_factor(loaded["adc"], mask), 0).astype(np.float32)
        lesion = loaded.get("lesion")
        study.lesion = np.zeros(mask.shape, bool) if lesion is None else lesion_inside(lesion, mask, rules)
        for what, image in (("dwi", study.dwi), ("adc", study.adc)):
            check_contrast(image[mask], loaded[what].path)
    return to_common_grid(study, rules, ctp.path)


def fit_time(ctp: np.ndarray, path: Path, rules: Rules) -> np.ndarray:
    """The series with the time points asked for, interpolated where that is allowed; UserError otherwise."""
    n = rules.time_points or len(ctp)
    if rules.resample_time and (len(ctp) != n or rules.frame_s):
        step = rules.frame_s / frame_seconds(path) if rules.frame_s else None
        return resample_time(ctp, n, step)
    if len(ctp) != n:
        raise UserError(f"{len(ctp)} time points, {n} are needed, {path}; fetch the whole series, add --resample_time "
                        f"to interpolate, or prepare all with --time_points {len(ctp)}")  # fmt: skip
    return ctp


def resample_time(ctp: np.ndarray, n: int, step: float | None = None) -> np.ndarray:
    """A series (T, ...) at n times by linear interpolation: over its whole length, or `step` frames apart.

    The first frame stays; beyond the end the last one is held.
    """
    positions = np.linspace(0, len(ctp) - 1, n) if step is None else np.minimum(np.arange(n) * step, len(ctp) - 1)
    low = np.minimum(positions.astype(int), max(len(ctp) - 2, 0))
    high = np.minimum(low + 1, len(ctp) - 1)
    share = (positions - low).astype(np.float32).reshape(-1, *[1] * (ctp.ndim - 1))
    return ctp[low] * (1 - share) + ctp[high] * share


def same_grid(a: nifti.Volume, b: nifti.Volume) -> bool:
    """Same shape, and no voxel centre further than SAME_MM from its twin."""
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * [*np.array(a.shape) - 1, 1]
    return a.shape == b.shape and np.abs((a.affine - b.affine) @ corners.T).max() <= SAME_MM


def on_grid(volume: nifti.Volume, grid: nifti.Volume, rules: Rules, soft: bool) -> nifti.Volume:
    """The volume on the CTP's grid; resampled only where rules allow it. soft: a mask (values are then shares)."""
    if same_grid(volume, grid):
        return volume
    if not rules.to_ctp_grid:
        raise UserError(f"another grid than the CTP ({_size(volume)}, CTP {_size(grid)}), {volume.path}; if it is "
                        "registered to the CTP add --to_ctp_grid, else register it first")  # fmt: skip
    data = (volume.data > 0.5).astype(np.float32) if soft else volume.data
    volume = nifti.resample_to(replace(volume, data=data), grid.shape, grid.affine)
    return volume


def _size(volume: nifti.Volume) -> str:
    shape, spacing, origin = volume.shape, volume.spacing_mm, volume.affine[:3, 3]
    shape, spacing = " x ".join(map(str, shape)), " x ".join(f"{s:.3g}" for s in spacing)
    return f"{shape} voxels of {spacing} mm from ({', '.join(f'{v:.4g}' for v in origin)})"


def check_hounsfield(study: Study, path: Path) -> None:
    """UserError where the brain at rest has no HU of a brain."""
    rest = float(np.median(study.ctp[0][study.mask]))
    if not REST_HU[0] <= rest <= REST_HU[1]:
        raise UserError(f"the brain has a median of {rest:.4g} in the first frame, a CT in HU about 35, {path}; apply "
                        "the rescale slope and intercept of the scanner, and check that mask and CTP belong "
                        "together")  # fmt: skip


def adc_factor(adc: nifti.Volume, mask: np.ndarray) -> float:
    """Factor that brings the ADC to 1e-6 mm^2/s, from its median in the brain; UserError where no unit fits."""
    values = adc.data[mask & (adc.data > 0)]
    if len(values) < COVERED * mask.sum():
        raise UserError(f"the ADC covers {len(values) / mask.sum():.0%} of the brain mask, {adc.path}; register "
                        "it to the CTP first, or correct the mask")  # fmt: skip
    median = float(np.median(values))
    for low, high, factor in ADC_UNITS:
        if low <= median <= high:
            return factor
    raise UserError(f"the ADC has a median of {median:.4g} in the brain, in mm^2/s, 1e-3 or 1e-6 mm^2/s it would be "
                    f"about 0.0008, 0.8 or 800, {adc.path}; give an ADC map in one of these units")  # fmt: skip


def check_contrast(values: np.ndarray, path: Path) -> None:
    """UserError for an image that covers too little of the brain or has one value there."""
    covered = float((values > 0).mean())
    if covered < COVERED:
        raise UserError(f"the image covers {covered:.0%} of the brain mask, {path}; register it to the CTP first")
    check_varies(values, path)


def check_varies(values: np.ndarray, path: Path) -> None:
    """UserError for an image that has one value in the brain."""
    low, high = quantiles(values)
    if not high > low:
        raise UserError(f"every voxel of the brain has the value {low:.4g}, {path}; give the real image")


def lesion_inside(lesion: nifti.Volume, mask: np.ndarray, rules: Rules) -> np.ndarray:
    """The lesion as a mask (values from 0.5 on); UserError where it leaves the brain, unless it may be cut off."""
    if lesion.data.min() < 0 or lesion.data.max() > 1:
        raise UserError(f"lesion values reach from {lesion.data.min():.4g} to {lesion.data.max():.4g}, {lesion.path}; "
                        "give a mask of 0 and 1")  # fmt: skip
    inside = lesion.data >= 0.5
    outside = int((inside & ~mask).sum())
    if outside and not rules.clip_lesion:
        raise UserError(f"{outside} of {int(inside.sum())} lesion voxels lie outside the brain mask, {lesion.path}; "
                        "correct one of the masks, add --fill_holes, or cut them off with --clip_lesion")  # fmt: skip
    return inside & mask


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """Mask (X, Y, Z) whose holes are filled in every axial slice."""
    return np.stack([ndimage.binary_fill_holes(mask[..., z]) for z in range(mask.shape[2])], -1)


def mask_from_ct(ctp: nifti.Volume, spacing_mm: np.ndarray) -> np.ndarray:
    """Brain mask (X, Y, Z) from the mean of a CTP in HU: soft tissue inside the closed skull, its largest part.

    A stopgap: SynthStrip, HD-BET or a vendor's mask are better. UserError where no skull is found.
    """
    mean = ctp.data.mean(0)
    reach = np.maximum(np.round(6 / spacing_mm[:2]), 1).astype(int)  # gaps of 12 mm in the bone are closed
    disk = np.ones((2 * reach[0] + 1, 2 * reach[1] + 1), bool)
    inside = np.zeros(mean.shape, bool)
    for z in range(mean.shape[2]):
        bone = np.pad(mean[..., z] > BONE_HU, [(r, r) for r in reach])
        closed = ndimage.binary_fill_holes(ndimage.binary_closing(bone, disk))
        inside[..., z] = (closed & ~bone)[reach[0] : -reach[0], reach[1] : -reach[1]]
    soft = inside & (mean > -10) & (mean < 120)
    parts, n = ndimage.label(soft)
    if not n:
        raise UserError(f"no skull found, {ctp.path}; give a brain mask")
    return fill_holes(parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]))


# ---- common grid ----------------------------------------------------------------------------------------------------


def check_spacing(spacing_mm) -> None:
    """UserError for voxels (0: the case's own) that no head scan has, whose grids would fill any memory."""
    if any(s and not FINEST_MM <= s <= COARSEST_MM for s in spacing_mm):
        raise UserError(f"--spacing_mm {tuple(spacing_mm)}: voxels of {FINEST_MM:g} to {COARSEST_MM:g} mm")


def to_common_grid(study: Study, rules: Rules, path: Path) -> Study:
    """The case at rules.spacing_mm, cut or padded to rules.shape about the middle of the brain; as it is without.

    UserError if that cuts off brain.
    """
    if not any(rules.spacing_mm) and not any(rules.shape):
        return study
    brain = nifti.Volume(study.mask.astype(np.float32), study.affine, path)
    grid = nifti.resample(brain, [new or own for new, own in zip(rules.spacing_mm, brain.spacing_mm, strict=True)])
    whole = (grid.data > 0.5).sum()
    if any(rules.shape):
        corners = np.argwhere(study.mask)
        middle_mm = study.affine @ np.append((corners.min(0) + corners.max(0)) / 2, 1.0)
        shape = [new or own for new, own in zip(rules.shape, grid.shape, strict=True)]
        grid = nifti.crop_or_pad(grid, shape, (np.linalg.inv(grid.affine) @ middle_mm)[:3])
    kept = (grid.data > 0.5).sum()
    if kept < whole or not whole:
        share = 1 - kept / max(whole, 1)
        raise UserError(f"{share:.1%} of the brain falls outside the common grid, {path}; raise --shape or "
                        "--spacing_mm")  # fmt: skip

    def moved(data, fill):
        return nifti.resample_to(nifti.Volume(data, study.affine), grid.shape, grid.affine, fill=fill).data

    def moved_mask(data):
        return moved(data.astype(np.float32), 0) > 0.5

    mask = moved_mask(study.mask)
    images = {name: moved(getattr(study, name), 0) for name in ("dwi", "adc") if study.dwi is not None}
    lesion = None if study.lesion is None else moved_mask(study.lesion) & mask
    ctp = np.stack([moved(frame, float(frame.min())) for frame in study.ctp])
    return Study(ctp, mask, grid.affine, lesion=lesion, maps=study.maps, **images)


# ---- measuring and writing ------------------------------------------------------------------------------------------


def quantiles(values: np.ndarray) -> tuple[float, float]:
    """The 0.5 % and 99.5 % quantiles, interpolated in float64 (so that NumPy's version does not matter)."""
    low, high = np.quantile(np.asarray(values, np.float64), QUANTILES)
    return float(low), float(high)


def statistics(values: np.ndarray) -> dict:
    """Quantiles, mean, population SD, extremes and number of the values of a brain."""
    values = np.asarray(values, np.float64)
    low, high = quantiles(values)
    return {"low": low, "high": high, "mean": float(values.mean()), "sd": float(values.std()),
            "min": float(values.min()), "max": float(values.max()), "n": len(values)}  # fmt: skip


def retained_slices(study: Study, min_brain_mm2: float) -> list[int]:
    """Axial slices with that much brain (one voxel at least), and in it signal of every image that the case has."""
    # Deviation (original code): it keeps one-voxel slices, and drops slices whose HU add up to exactly 0.
    fewest = max(1, int(np.ceil(min_brain_mm2 / np.prod(study.spacing_mm[:2]) - 1e-9)))
    images = [study.ctp.any(0), *(image != 0 for image in (study.dwi, study.adc) if image is not None)]
    return [
        z
        for z in range(study.mask.shape[2])
        if study.mask[..., z].sum() >= fewest and all((image[..., z] & study.mask[..., z]).any() for image in images)
    ]


def record(source: Source, study: Study, rules: Rules) -> dict:
    """What case.json says about a case; UserError if no slice has enough brain."""
    slices = retained_slices(study, rules.min_brain_mm2)
    if not slices:
        raise UserError(f"no slice has {rules.min_brain_mm2:g} mm^2 of brain with signal, "
                        f"{source.files[rules.inputs[0]]}; check the mask, or lower --min_brain_mm2")  # fmt: skip
    voxel_ml = float(np.prod(study.spacing_mm)) / 1000
    has_mri = study.dwi is not None
    images = {name: getattr(study, name) for name in ("dwi", "adc")} if has_mri else {}
    images |= zip(study.maps, study.ctp[study.time_points :], strict=True)
    stats = {name: statistics(image[study.mask]) for name, image in images.items()}
    return {
        "case": source.name, "patient": source.patient, "shape": list(study.mask.shape),
        "spacing_mm": [float(s) for s in study.spacing_mm], "affine": study.affine.tolist(),
        "time_points": study.time_points, "maps": list(study.maps), "slices": slices, "stats": stats,
        "has_mri": has_mri, "has_lesion_file": "lesion" in source.files,
        "lesion_ml": float(study.lesion.sum() * voxel_ml) if has_mri else None,
        "brain_ml": float(study.mask.sum() * voxel_ml), "sources": {k: str(v) for k, v in source.files.items()},
    }  # fmt: skip


def prepare(source: Source, rules: Rules, folder: str | Path | None) -> tuple[str, dict | str]:
    """Read, check and (with `folder`) write one case, for worker processes: ("", record), or (what is wrong, name)."""
    try:
        study = read(source, rules)
        known = record(source, study, rules)
        if folder is not None:
            write(study, known, Path(folder) / source.name)
    except UserError as error:
        return str(error), source.name
    return "", known


def write(study: Study, known: dict, folder: Path) -> None:
    """The arrays of a case, slice axis first, and its record; the same study gives the same bytes."""
    from common.runlog import write_json

    folder.mkdir(parents=True)
    kinds = {"ctp": np.float32, "dwi": np.float32, "adc": np.float32, "mask": np.uint8, "lesion": np.uint8}
    for what, dtype in kinds.items():
        image = getattr(study, what)
        if image is not None:
            np.save(folder / f"{what}.npy", np.ascontiguousarray(np.moveaxis(image, -1, 0), dtype))
    write_json(folder / "case.json", known)


def read_record(folder: Path) -> dict:
    """case.json of a prepared case; UserError if it is missing or damaged."""
    try:
        return json.loads((folder / "case.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no usable case.json ({error}); prepare the data again") from error
