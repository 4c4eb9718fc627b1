"""From a T1 volume on disk to network input and back: orientation, intensity, spacing, mask, crop, exact affine.

A prepared volume is (D, H, W) float32 in RAS+ order (D = x left->right, H = y posterior->anterior, W = z
inferior->superior), background 0, bright tissue about 1. The paper: 128 x 160 x 128 voxels of 1.5 mm.

What this light chain does not do, and the paper's data had: bias correction (ANTs N4), brain extraction (ANTsPyNet,
SynthStrip, HD-BET: threshold the probability map, keep the largest component), registration to MNI space (ANTs SyN;
or Clinica's t1-linear), from BIDS folders (Clinica's adni-to-bids). Sessions of one subject should be in one space.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

import nibabel as nib
import numpy as np
from scipy import ndimage

from common import nifti
from common.cli import UserError

INTENSITIES, CROPS, MASKS, ORDERS = ("robust", "minmax"), ("centre", "head"), ("none", "head", "file"), ("RAS", "file")
LOW, HIGH = 1.0, 99.5  # percentiles of the robust range: of all voxels, of the bright ones
SAME_MM = 1e-3  # spacings closer than this are not resampled
TOP_MM = 5.0  # above the head, where the grid is too low for head and neck


@dataclass(frozen=True)
class Preparation:
    """How volumes become network input; plain values, stored in every network file.

    shape: prepared grid (D, H, W). intensity: "robust" maps the 1st percentile of the volume to 0 and the 99.5th of
    its bright voxels (Otsu) to 1, and cuts off below 0 and above `limit`, so that one bright voxel changes nothing
    else; "minmax" is the original's chain: resampled from the first voxel on without anti-aliasing, padded with
    minima, minimum and maximum of the result to 0 and 1. crop: around the "centre" of the grid (registered data) or
    of the "head" (where that is too high for the grid, its top is kept). mask: what lies outside becomes background:
    "none", "head" (see `head_mask`), "file" (the table's column mask_path, see `masked`).
    order: axes in "RAS" order, or as stored in the "file" (the original: a LAS file is then mirrored).
    """

    shape: tuple[int, int, int] = (128, 160, 128)
    spacing_mm: float = 1.5
    intensity: str = "robust"
    crop: str = "centre"
    mask: str = "none"
    order: str = "RAS"
    limit: float = 2.0

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "spacing_mm", float(self.spacing_mm))
        if len(self.shape) != 3 or min(self.shape) < 1 or not 0 < self.spacing_mm < 100:
            raise UserError(f"preparation: shape {self.shape}, spacing_mm {self.spacing_mm}; three positive sizes and "
                            "a spacing in mm are needed")  # fmt: skip
        if not 1 <= self.limit < float("inf"):
            raise UserError(f"preparation: limit {self.limit}; 1 or more is needed")
        for name, known in (("intensity", INTENSITIES), ("crop", CROPS), ("mask", MASKS), ("order", ORDERS)):
            if getattr(self, name) not in known:
                raise UserError(f"preparation: {name} {getattr(self, name)!r} is not one of {', '.join(known)}")

    @classmethod
    def upstream(cls, shape=(128, 160, 128), spacing_mm: float = 1.5) -> Preparation:
        """The original's chain: stored order of the axes, min-max, no mask."""
        return cls(shape, spacing_mm, intensity="minmax", order="file")

    def to_dict(self) -> dict:
        return asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_dict(cls, values: dict) -> Preparation:
        """Inverse of `to_dict`; UserError if entries are missing or unknown."""
        odd = {f.name for f in fields(cls)} ^ set(values)
        if odd:
            raise UserError(f"preparation has missing or unknown entries: {', '.join(sorted(odd))}; give a file of "
                            "this program")  # fmt: skip
        return cls(**values)


@dataclass(frozen=True)
class Plan:
    """What `prepare` does to one volume, and `to_native` undoes; `to_dict` is the record for a JSON file.

    shape, affine: the resampled grid before cropping. start: its voxel that becomes voxel 0 (negative: padding).
    low, high: the input's values at 0 and 1.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    start: tuple[int, int, int]
    low: float
    high: float

    def to_dict(self) -> dict:
        return asdict(self) | {"shape": list(self.shape), "start": list(self.start), "affine": self.affine.tolist()}

    @property
    def prepared_affine(self) -> np.ndarray:
        return _shifted(self.affine, self.start)


# ---- there


def read(path, prep: Preparation) -> nifti.Volume:
    """A volume as `prepare` wants it: RAS+ order, or the file's own where `prep.order` says so."""
    volume = nifti.load(path)
    if prep.order == "RAS":
        return volume
    data, affine = nifti.reorient(volume.data, volume.affine, stored_order(path))
    return replace(volume, data=data, affine=affine)


def header(path, prep: Preparation) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine of what `read` gives, without reading voxels."""
    shape, affine = nifti.header(path)
    if prep.order == "RAS":
        return shape, affine
    data, affine = nifti.reorient(np.broadcast_to(np.uint8(0), shape), affine, stored_order(path))
    return data.shape, affine


def stored_order(path) -> str:
    """Directions of the axes as a file has them, such as LAS."""
    return "".join(nib.aff2axcodes(nib.load(path).affine))


def masked(volume: nifti.Volume, mask: nifti.Volume) -> nifti.Volume:
    """The volume with its minimum wherever the mask (on the same grid) is 0; UserError if they do not fit.

    This comes before `prepare` and `to_native`: range and crop are those of what the mask leaves.
    """
    if mask.shape != volume.shape or np.abs(mask.affine - volume.affine).max() > 0.1:
        raise UserError(f"{mask.path} is on another grid than {volume.path}; resample it onto the scan")
    if not (mask.data > 0).any():
        raise UserError(f"{mask.path}: the mask of {volume.path} is empty; repair it")
    return replace(volume, data=np.where(mask.data > 0, volume.data, volume.data.min()))


def prepare(volume: nifti.Volume, prep: Preparation) -> nifti.Volume:
    """The volume on the prepared grid, (D, H, W) float32, with its exact affine.

    UserError names the file for NaN, an empty or constant volume.
    """
    volume = _ordered(volume, prep)
    made = plan(volume, prep)
    inside = head_mask(volume.data) if prep.mask == "head" else None
    if prep.intensity == "minmax":
        data = volume.data if inside is None else np.where(inside, volume.data, volume.data.min())
        data = _upstream_field(data, made, volume, prep)
        return nifti.Volume(_unit(data, data.min(), data.max(), volume), made.prepared_affine, volume.path)
    data = np.clip(_unit(volume.data, made.low, made.high, volume), 0, prep.limit)
    if inside is not None:
        data = np.where(inside, data, np.float32(0))
    data = _resampled(replace(volume, data=data), made)
    return nifti.Volume(_crop(data, made.start, prep.shape), made.prepared_affine, volume.path)


def plan(volume: nifti.Volume, prep: Preparation) -> Plan:
    """Grid and intensity range of one volume (in the order of `read`); UserError names its file if it is unusable."""
    volume = _ordered(volume, prep)
    where = volume.path or "volume"
    if volume.data.size == 0:
        raise UserError(f"{where}: the volume has no voxels, fetch the file again")
    if not np.isfinite(volume.data).all():
        count = np.count_nonzero(~np.isfinite(volume.data))
        raise UserError(f"{where}: {count} voxels are NaN or Inf, repair the file")
    shape, affine = resampled_grid(volume.shape, volume.affine, prep)
    if prep.intensity == "minmax":
        low, high = float(volume.data.min()), float(volume.data.max())
    else:
        low, high = robust_range(volume.data)
    if not high > low:
        raise UserError(f"{where}: every voxel is about {high:.4g}, remove the row or repair the file")
    start = _about_head(volume, affine, prep) if prep.crop == "head" else _centred(shape, prep.shape)
    return Plan(shape, affine, start, low, high)


def resampled_grid(shape, affine, prep: Preparation) -> tuple[tuple, np.ndarray]:
    """Shape and affine of the volume's axes at `prep.spacing_mm`.

    Robust: centre and field of view stay. Minmax: voxel 0 stays, the last new voxel is the one nearest to the last.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(spacing - prep.spacing_mm).max() < SAME_MM:
        return tuple(int(n) for n in shape), np.array(affine, np.float64)
    factor, old = prep.spacing_mm / spacing, np.array(shape)
    step = np.diag([*factor, 1.0])
    if prep.intensity == "minmax":
        new = np.round((old - 1) / factor + 1)
    else:
        new = np.maximum(np.floor(old / factor + 0.5), 1)
        step[:3, 3] = (old - 1) / 2 - factor * (new - 1) / 2
    return tuple(int(n) for n in new), np.asarray(affine, np.float64) @ step


def prepared_affine(affine: np.ndarray, shape, prep: Preparation) -> np.ndarray:
    """Affine (4, 4) of the prepared grid from shape and affine of the input; ValueError for crop "head": see `plan`."""
    if prep.crop == "head":
        raise ValueError("where the head is, only the voxels tell: use plan(volume, prep).prepared_affine")
    if prep.order == "RAS":
        data, affine = nifti.reorient(np.broadcast_to(np.uint8(0), shape), affine)
        shape = data.shape
    shape, affine = resampled_grid(shape, affine, prep)
    return _shifted(affine, _centred(shape, prep.shape))


def robust_range(data: np.ndarray) -> tuple[float, float]:
    """Values to call 0 and 1: 1st percentile of all voxels, 99.5th of those brighter than Otsu's threshold."""
    # Deviation (original code): minimum and maximum, which one bright vessel decides.
    high = np.percentile(data[_bright(data)], HIGH)
    return float(np.percentile(data, LOW)), float(high)


def head_mask(data: np.ndarray) -> np.ndarray:
    """(D, H, W) bool: bright voxels (Otsu), closed by a 40th of the field of view, holes filled, the largest part.

    The whole head of a scan with skull; the brain of a skull-stripped one.
    """
    n = max(1, max(data.shape) // 40)
    bright = np.pad(_bright(data), n)  # closing erodes from the border of the array otherwise
    bright = ndimage.binary_closing(bright, iterations=n)[n:-n, n:-n, n:-n]
    bright = ndimage.binary_fill_holes(bright)  # before the choice: a scalp that is apart then holds the brain
    parts, count = ndimage.label(bright)
    if count > 1:
        bright = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    return bright


def _bright(data):
    """Voxels above Otsu's threshold, which a few very bright voxels do not move."""
    from skimage.filters import threshold_otsu

    capped = np.minimum(data, np.percentile(data, 99.9))
    if capped.min() == capped.max():
        return np.ones(data.shape, bool)
    return data > threshold_otsu(capped)


def _ordered(volume, prep):
    # Deviation (original code): it keeps the stored order, so that a LAS file is used mirrored.
    if prep.order == "file":
        return volume
    data, affine = nifti.reorient(volume.data, volume.affine)
    return replace(volume, data=data, affine=affine)


def _unit(data, low, high, volume):
    if not high > low:
        raise UserError(f"{volume.path or 'volume'}: every voxel of the field of view is {low:.4g}, repair the file")
    return ((data.astype(np.float64) - low) / (float(high) - low)).astype(np.float32)


def _resampled(volume, made: Plan) -> np.ndarray:
    if made.shape == volume.shape and np.array_equal(made.affine, volume.affine):
        return volume.data
    return nifti.resample_to(volume, made.shape, made.affine).data


def _upstream_field(data, made: Plan, volume, prep: Preparation) -> np.ndarray:
    """The original's resampling (linear, edge values beyond the border, nothing against aliasing) and crop; float64.

    Padded with the minimum of each line of voxels, one axis after the other; then cropped.
    """
    matrix = np.linalg.solve(volume.affine, made.affine)
    data = ndimage.affine_transform(data.astype(np.float64), matrix[:3, :3], matrix[:3, 3], made.shape, order=1,
                                    mode="nearest")  # fmt: skip
    before = [max(-s, 0) for s in made.start]
    after = [max(s + m - n, 0) for s, m, n in zip(made.start, prep.shape, made.shape, strict=True)]
    data = np.pad(data, list(zip(before, after, strict=True)), mode="minimum")
    return data[tuple(slice(max(s, 0), max(s, 0) + m) for s, m in zip(made.start, prep.shape, strict=True))]


def _centred(old, new) -> tuple[int, ...]:
    """First kept voxel per axis, as the original's pad-then-crop about the middle has it."""
    return tuple(int(n // 2 - m // 2 if n > m else -((m - n) // 2)) for n, m in zip(old, new, strict=True))


def _about_head(volume, affine, prep: Preparation) -> tuple[int, ...]:
    """First kept voxel per axis of the resampled grid: the head in the middle; of a long neck the lower end goes."""
    places = np.argwhere(head_mask(volume.data))
    matrix = np.linalg.solve(affine, volume.affine)
    first, last = (matrix[:3, :3] @ end + matrix[:3, 3] for end in (places.min(0), places.max(0)))
    start = (first + last) / 2 - (np.array(prep.shape) - 1) / 2
    if prep.order == "RAS" and last[2] - first[2] > prep.shape[2] - 1:
        start[2] = last[2] + TOP_MM / prep.spacing_mm - (prep.shape[2] - 1)
    return tuple(int(n) for n in np.floor(start + 0.5))


def _crop(data, start, shape) -> np.ndarray:
    """`shape` voxels from `start` on, 0 outside."""
    out = np.zeros(shape, data.dtype)
    low = [max(s, 0) for s in start]
    high = [max(min(s + m, n), 0) for s, m, n in zip(start, shape, data.shape, strict=True)]
    source = tuple(slice(min(a, b), b) for a, b in zip(low, high, strict=True))
    out[tuple(slice(part.start - s, part.stop - s) for part, s in zip(source, start, strict=True))] = data[source]
    return out


def _shifted(affine, start):
    out = np.array(affine, np.float64)
    out[:3, 3] += out[:3, :3] @ np.asarray(start, np.float64)
    return out


# ---- and back


def to_native(array: np.ndarray, prep: Preparation, volume: nifti.Volume) -> nifti.Volume:
    """A prepared (D, H, W) array on the grid and in the intensity units of its input `volume`; 0 outside the crop.

    Without resampling and clipping it is the exact inverse of `prepare`; otherwise linear interpolation.
    """
    volume = _ordered(volume, prep)
    made = plan(volume, prep)
    low, high = made.low, made.high
    if prep.intensity == "minmax":  # its range is that of the prepared field of view
        seen = _upstream_field(volume.data, made, volume, prep)
        low, high = float(seen.min()), float(seen.max())
    array = np.asarray(array, np.float32)
    if array.shape != prep.shape:
        raise ValueError(f"to_native needs a prepared volume {prep.shape}, not {array.shape}")
    if made.shape == volume.shape and np.array_equal(made.affine, volume.affine):
        data = _crop(array, tuple(-s for s in made.start), volume.shape)
    else:
        prepared = nifti.Volume(array, made.prepared_affine)
        data = nifti.resample_to(prepared, volume.shape, volume.affine).data
    data = (data * np.float64(high - low) + low).astype(np.float32)
    return nifti.Volume(data, volume.affine.copy(), volume.path)
