"""NIfTI volumes and their geometry: load, save, reorient, crop or pad, resample, always with the exact affine.

In memory a volume is (D, H, W) with axes in the closest RAS+ order: D = x left->right, H = y posterior->anterior,
W = z inferior->superior. `affine` (4, 4) float64 maps voxel indices to world mm; voxel centres are at integers.

Header rules. Affine: the one nibabel chooses, sform if its code > 0, else qform if its code > 0, else the fallback from
shape and voxel size (the last, and a disagreement of the two forms, are warned about once per process). Scaling:
scl_slope and scl_inter are applied; a slope of 0, NaN or Inf means none. Oblique axes are permuted and flipped, never
interpolated. Nothing of an input header is carried to an output.
"""

import gzip
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from scipy import ndimage

from common.checkpoint import replacing
from common.cli import UserError

GZIP_LEVEL = 1  # as nibabel: float volumes gain little from more, and writing is several times faster
CODE = 2  # NIFTI_XFORM_ALIGNED_ANAT: what we write lines up with the subject's input, whatever space that is in
_warned = set()


@dataclass
class Volume:
    """One 3D volume: data (D, H, W) float32 (label maps int32), RAS+ order; affine (4, 4) voxel -> world mm."""

    data: np.ndarray
    affine: np.ndarray
    path: Path | None = None

    @property
    def shape(self):
        return tuple(int(n) for n in self.data.shape)

    @property
    def spacing_mm(self):
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))


# ---- reading


def load(path, *, allow_nonfinite=False, series=False) -> Volume:
    """Read a .nii or .nii.gz volume in RAS+ order: data (D, H, W) float32, writable and contiguous.

    Trailing axes of length 1 are dropped. With `series` a 4D file of N volumes (frames, channels) gives (N, D, H, W),
    also for N = 1. UserError names the file if it is missing, truncated, corrupt, misnamed, not 3D (or 4D), empty,
    without a usable affine, or (unless `allow_nonfinite`) holds NaN or Inf.
    """
    data, affine = _read(Path(path), series)
    with np.errstate(over="ignore"):  # beyond float32 becomes Inf, which is refused below
        data = np.array(data, dtype=np.float32, order="C")
    if not allow_nonfinite and not np.isfinite(data).all():
        count = int(np.count_nonzero(~np.isfinite(data)))
        raise UserError(f"{count} voxels are NaN, Inf or beyond float32, {path}, repair the file")
    return Volume(data, affine, Path(path))


def load_labels(path) -> Volume:
    """Read an integer label map in RAS+ order: data (D, H, W) int32; UserError as `load`, and for other values."""
    data, affine = _read(Path(path))
    with np.errstate(invalid="ignore"):
        labels = np.array(data, dtype=np.int32, order="C")
    if not np.array_equal(labels, data):
        raise UserError(f"label map has values that are not int32 integers, {path}, check that it is a label map")
    return Volume(labels, affine, Path(path))


def header(path) -> tuple[tuple, np.ndarray]:
    """Shape (D, H, W) and affine that `load` would give, without reading voxels."""
    path = Path(path)
    _, shape, affine = _parse(_bytes(path, 540), path)
    return _orient(shape, affine, "RAS")[1:]


def _bytes(path, count=-1):
    """The first `count` bytes of the uncompressed file; all of them, with the gzip checksum verified, by default."""
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        raise UserError(f"not a NIfTI file name, {path}, convert it to .nii or .nii.gz")
    try:
        with open(path, "rb") as file:
            magic = file.read(2)
            file.seek(0)
            zipped = magic == b"\x1f\x8b"
            if magic and zipped != name.endswith(".gz"):
                wrong = "is gzip-compressed but named .nii" if zipped else "is not gzip-compressed but named .nii.gz"
                raise UserError(f"file {wrong}, {path}, rename it")
            if not zipped:
                return file.read(count)
            return gzip.decompress(file.read()) if count < 0 else gzip.GzipFile(fileobj=file).read(count)
    except FileNotFoundError as error:
        raise UserError(f"file not found, {path}, check the path") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"file is truncated or corrupt ({error}), {path}, fetch it again") from error
    except OSError as error:
        raise UserError(f"file cannot be read ({error.strerror}), {path}, check it") from error


def _parse(raw, path, series=False):
    """nibabel header, shape (3D, or 4D of a series) and affine as stored (before reorientation)."""
    try:
        size = int.from_bytes(raw[:4], "little")
        nifti2 = 540 in (size, int.from_bytes(raw[:4], "big"))
        kind, length = (nib.Nifti2Header, 540) if nifti2 else (nib.Nifti1Header, 348)
        if len(raw) < length:
            raise UserError(f"file is truncated ({len(raw)} bytes), {path}, fetch it again")
        hdr = kind(raw[:length])
        if hdr["magic"].item()[:3] not in (b"n+1", b"n+2"):
            raise ValueError("no single-file NIfTI mark")
        shape, affine = tuple(int(n) for n in hdr.get_data_shape()), hdr.get_best_affine().astype(np.float64)
        hdr.get_slope_inter()
    except (nib.spatialimages.HeaderDataError, nib.wrapstruct.WrapStructError, ValueError) as error:
        raise UserError(f"not a usable NIfTI header ({error}), {path}, convert or fetch the file again") from error
    if len(shape) < 3 or any(n != 1 for n in shape[4 if series else 3 :]):
        raise UserError(f"not a 3D volume but {' x '.join(map(str, shape))}, {path}, save one 3D volume per file")
    if min(shape) < 1:
        raise UserError(f"volume has no voxels ({' x '.join(map(str, shape))}), {path}, fetch it again")
    _check_affine(affine, path)
    sform_code, qform_code = int(hdr["sform_code"]), int(hdr["qform_code"])
    if sform_code <= 0 and qform_code <= 0:
        _warn_once("codes", f"{path}: sform and qform codes are 0; position and left-right are a guess from voxel size")
    elif sform_code > 0 and qform_code > 0:
        try:
            if (np.abs(hdr.get_qform() - affine) @ [*shape[:3], 1]).max() > 0.1:  # mm
                _warn_once("forms", f"{path}: sform and qform disagree; sform is used")
        except ValueError:  # the qform is broken, but it is not needed
            pass
    return hdr, shape[: 4 if series else 3], affine


def _read(path, series=False):
    """Scaled voxels in RAS+ order, possibly a view in any dtype, and affine."""
    raw = _bytes(path)
    hdr, shape, affine = _parse(raw, path, series)
    dtype, count, offset = hdr.get_data_dtype(), int(np.prod(shape)), max(hdr.get_data_offset(), len(hdr.binaryblock))
    if dtype.kind not in "iuf":
        raise UserError(f"voxels are {dtype}, not real numbers, {path}, save one real channel per file")
    if len(raw) < offset + count * dtype.itemsize:
        need = offset + count * dtype.itemsize
        raise UserError(f"file is truncated ({len(raw)} of {need} bytes), {path}, fetch it again")
    data = np.frombuffer(raw, dtype, count, offset).reshape(shape, order="F")
    slope, inter = hdr.get_slope_inter()
    if slope is not None and (slope, inter) != (1.0, 0.0):
        data = data.astype(np.float64) * slope + inter
    ornt, _, affine = _orient(shape[:3], affine, "RAS")
    data = apply_orientation(data, ornt)  # turns the first three axes
    return np.moveaxis(data, 3, 0) if data.ndim == 4 else data, affine


def _check_affine(affine, where):
    norms = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) <= 1e-6 * np.prod(norms):
        raise UserError(f"affine is singular or not finite, {where}, repair the sform or qform")


def _warn_once(kind, message):
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(f"{message} (further such files are not reported)", stacklevel=4)


# ---- writing


def save(path, data, affine, *, dtype=np.float32) -> None:
    """Write data (D, H, W) or a series (N, D, H, W) as .nii or .nii.gz, atomically; same input, same bytes.

    Stored as `dtype` whatever the dtype of `data`; bool becomes uint8, float16 float32 and int64 int32, which NIfTI
    readers lack. sform and qform get the same affine (float32) and code 2; a sheared affine does not fit a qform,
    whose code is then 0. Units mm, no scaling. UserError before anything is written for NaN or Inf, values that an
    integer dtype cannot hold, no voxels, a bad affine or file name; and, with the old file untouched, for a full disk.
    """
    path, data, affine = Path(path), np.asarray(data), np.asarray(affine, dtype=np.float64)
    if data.ndim not in (3, 4) or affine.shape != (4, 4):
        raise ValueError(f"save needs data ([N,] D, H, W) and affine (4, 4), not {data.shape} and {affine.shape}")
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise UserError(f"not a NIfTI file name, {path}, use .nii or .nii.gz")
    if data.size == 0:
        raise UserError(f"volume to write has no voxels {data.shape}, {path}, check the crop")
    _check_affine(affine, path)
    if data.ndim == 4:
        data = np.moveaxis(data, 0, 3)  # NIfTI keeps the volumes of a series on the last axis
    stored = np.dtype({"b1": "u1", "f2": "f4", "i8": "i4", "u8": "i4"}.get(np.dtype(dtype).str[1:], dtype))
    with np.errstate(invalid="ignore", over="ignore"):
        voxels = data.astype(stored.newbyteorder("<"))
    if not np.isfinite(data).all() or not np.isfinite(voxels).all():
        raise UserError(f"volume to write has NaN or Inf voxels, {path}, check what produced it")
    if (stored.kind in "iu" or data.dtype.kind in "iu") and not np.array_equal(voxels, data):
        raise UserError(f"{data.dtype} values do not fit {stored}, {path}, choose another dtype")

    hdr = nib.Nifti1Header(endianness="<")
    hdr.set_data_dtype(voxels.dtype)
    hdr.set_data_shape(voxels.shape)
    hdr.set_slope_inter(1, 0)
    hdr.set_xyzt_units("mm")
    hdr["magic"], hdr["vox_offset"] = b"n+1", 352
    hdr.set_qform(affine, CODE)
    if (np.abs(hdr.get_qform() - affine) @ [*voxels.shape[:3], 1]).max() > 0.01:  # mm; sheared
        hdr["qform_code"] = 0
    hdr.set_sform(affine, CODE)
    raw = hdr.binaryblock + bytes(4) + voxels.tobytes(order="F")
    if path.name.lower().endswith(".gz"):
        raw = gzip.compress(raw, GZIP_LEVEL, mtime=0)

    try:
        with replacing(path) as file:
            file.write(raw)
    except OSError as error:
        raise UserError(f"cannot write ({error.strerror}), {path}, check it") from error


# ---- geometry


def _orient(shape, affine, axcodes):
    """nibabel orientation array, shape and affine of a grid whose axes are reordered to `axcodes`."""
    ornt = ornt_transform(io_orientation(affine), axcodes2ornt(axcodes))
    new_shape = tuple(int(shape[i]) for i in np.argsort(ornt[:, 0]))
    return ornt, new_shape, affine @ inv_ornt_aff(ornt, shape)


def reorient(data, affine, axcodes="RAS"):
    """Permute and flip the last three axes of (..., D, H, W) to the closest `axcodes`; returns data, affine."""
    ornt, _, affine = _orient(data.shape[-3:], affine, axcodes)
    data = apply_orientation(np.moveaxis(data, (-3, -2, -1), (0, 1, 2)), ornt)
    return np.ascontiguousarray(np.moveaxis(data, (0, 1, 2), (-3, -2, -1))), affine


def crop_or_pad(volume, shape, centre=None, *, fill=0) -> Volume:
    """Cut out or extend with `fill` to `shape` by whole voxels, around voxel position `centre` (default: the middle).

    Cropping and padding back around the middle restores the grid exactly.
    """
    old, new = np.array(volume.shape), np.array([int(n) for n in shape])
    if new.shape != (3,) or new.min() < 1:
        raise ValueError(f"crop_or_pad needs three positive sizes, not {shape}")
    if centre is None:
        start = np.trunc((old - new) / 2).astype(int)
    else:
        start = np.floor(np.asarray(centre) - (new - 1) / 2 + 0.5).astype(int)
    data = np.full(new, fill, volume.data.dtype)
    low, high = np.clip(start, 0, old), np.clip(start + new, 0, old)
    source = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    target = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
    data[target] = volume.data[source]
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ start
    return replace(volume, data=data, affine=affine)


def resample(volume, spacing_mm, order=1) -> Volume:
    """Resample to `spacing_mm` (number or three, mm) on a grid with the same axes and the same centre.

    The field of view is kept to half a new voxel; the rest as in `resample_to`.
    """
    spacing_mm = np.broadcast_to(np.asarray(spacing_mm, dtype=np.float64), 3)
    if not (np.isfinite(spacing_mm).all() and spacing_mm.min() > 0):
        raise ValueError(f"resample needs positive spacings, not {spacing_mm}")
    factor = spacing_mm / volume.spacing_mm
    shape = np.maximum(1, np.floor(np.array(volume.shape) / factor + 0.5)).astype(int)
    step = np.diag([*factor, 1.0])
    step[:3, 3] = (np.array(volume.shape) - 1) / 2 - factor * (shape - 1) / 2
    return resample_to(volume, shape, volume.affine @ step, order)


def resample_to(volume, shape, affine, order=1, *, fill=0) -> Volume:
    """Resample onto the grid `shape`, `affine`; with `header(original)` it puts a result back onto the original grid.

    order: spline order, 0 for label maps (keeps the dtype), 1 linear, 3 cubic (may overshoot); float32 otherwise.
    Where the new voxels are larger, a Gaussian first removes what they cannot carry (sigma such that the widths add
    up, Cardoso et al. 2015, "Scale factor point spread function matching"); it reflects at the borders, which keeps
    the mean. The outer half voxel takes the edge value, not a fade to 0; outside the field of view is `fill`.
    """
    shape, affine = tuple(int(n) for n in shape), np.asarray(affine, dtype=np.float64)
    _check_affine(affine, "target grid of resample_to")
    matrix = np.linalg.solve(volume.affine, affine)  # new voxel -> old voxel
    whole = np.rint(matrix)  # affines pass through float32 files: undo that rounding, so that pure shifts stay exact
    matrix = np.where(np.abs(matrix - whole) < [1e-6, 1e-6, 1e-6, 1e-4], whole, matrix)
    data = volume.data if order == 0 else volume.data.astype(np.float32)
    if order > 0:
        factor = np.linalg.norm(matrix[:3, :3], axis=1)  # new voxel size in old voxels, along the old axes
        sigma = np.sqrt(np.maximum(factor**2 - 1, 0)) / (2 * np.sqrt(2 * np.log(2)))
        if sigma.max() > 1e-3:
            data = ndimage.gaussian_filter(data, sigma, mode="reflect")
    out = ndimage.affine_transform(data, matrix[:3, :3], matrix[:3, 3], shape, data.dtype, order, mode="nearest")
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    for row, n in zip(matrix[:3], data.shape, strict=True):
        position = row[0] * grid[0] + row[1] * grid[1] + row[2] * grid[2] + row[3]
        out[(position < -0.5 - 1e-4) | (position > n - 0.5 + 1e-4)] = fill
    return replace(volume, data=out, affine=affine.copy())


def strided_affine(affine, factor) -> np.ndarray:
    """Affine of a grid with voxels `factor` (number or three) times larger and the same outer corner.

    The grid of latents that a convolutional network has `factor` times fewer voxels of.
    """
    factor = np.broadcast_to(np.asarray(factor, dtype=np.float64), 3)
    step = np.diag([*factor, 1.0])
    step[:3, 3] = (factor - 1) / 2
    return np.asarray(affine, dtype=np.float64) @ step
