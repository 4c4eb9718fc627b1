"""Where slices lie in the world: cines in their own grids, the dense grid, long-axis pixels in it, frames by phase.

A cine is (T, Z, H, W) float32 in the axis order of its file: W, H and Z are the first, second and third axis, neither
permuted nor flipped, so that the dense grid holds the acquired slices exactly. `Grid` says where that is: RAS mm from
the affine. Spacings come from the affine (distance of slice centres), never from a slice thickness.
"""

from __future__ import annotations

import gzip
import struct
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from common import nifti
from common.checkpoint import replacing
from common.cli import UserError

FRAME_TIME, UNITS, MM_AND_S = 92, 123, 10  # bytes of pixdim[4] and xyzt_units in a NIfTI-1 header; their code


# ---- grids ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Grid:
    """Voxel positions of a stack: affine (4, 4) from voxel (w, h, z) to RAS mm, shape (Z, H, W)."""

    affine: np.ndarray
    shape: tuple[int, int, int]

    def __post_init__(self):
        object.__setattr__(self, "affine", np.asarray(self.affine, dtype=np.float64))
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of voxel centres along w, h, z in mm."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def axes(self) -> np.ndarray:
        """Unit vectors (3, 3) of w, h and z in the columns."""
        return self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def normal(self) -> np.ndarray:
        """Unit normal of the slices; differs from the z axis in a sheared stack."""
        normal = np.cross(self.axes[:, 0], self.axes[:, 1])
        return normal / np.linalg.norm(normal)

    @property
    def centre_mm(self) -> np.ndarray:
        """World point in the middle."""
        return self.world((np.array(self.shape[::-1]) - 1) / 2)

    def world(self, voxels: np.ndarray) -> np.ndarray:
        """RAS mm (..., 3) of voxels (w, h, z) (..., 3)."""
        return np.asarray(voxels) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def voxels(self, points_mm: np.ndarray) -> np.ndarray:
        """Voxels (w, h, z) (..., 3) of RAS mm (..., 3)."""
        return np.linalg.solve(self.affine[:3, :3], (np.asarray(points_mm) - self.affine[:3, 3])[..., None])[..., 0]

    def moved(self, shift_mm: np.ndarray) -> Grid:
        """The grid displaced by a world vector (3,) in mm."""
        affine = self.affine.copy()
        affine[:3, 3] += shift_mm
        return replace(self, affine=affine)


def dense_grid(grid: Grid, factor: int = 8) -> Grid:
    """The grid with `factor` slices per gap: factor (Z - 1) + 1 in all, slice factor * i where slice i of `grid` is."""
    if factor < 1:
        raise UserError(f"factor {factor}: the number of dense slices per gap is 1 or more")
    affine = grid.affine.copy()
    affine[:3, 2] /= factor
    depth, height, width = grid.shape
    return Grid(affine, (factor * (depth - 1) + 1, height, width))


# ---- cines ----------------------------------------------------------------------------------------------------------


@dataclass
class Cine:
    """Frames (T, Z, H, W) float32 on a grid; `valid` (T, Z, H, W) where a file had NaN or Inf (stored as 0) elsewhere.

    frame_s: time between frames, 0 where the file does not say.
    """

    data: np.ndarray
    grid: Grid
    frame_s: float = 0.0
    path: Path | None = None
    valid: np.ndarray | None = None

    def __post_init__(self):
        if self.data.ndim != 4 or self.data.shape[1:] != self.grid.shape:
            raise ValueError(f"a cine is (T, Z, H, W) on its grid, got {self.data.shape} on {self.grid.shape}")

    @property
    def frames(self) -> int:
        return len(self.data)


def load_cine(path: str | Path) -> Cine:
    """Read a 3D or 4D NIfTI file in its own axis order (W, H, Z[, T]).

    NaN and Inf become 0 and are marked in `valid`, with a warning. UserError as `nifti.load`, for a file whose sform
    and qform are both unset (nobody could place it against another view), and without any finite value.
    """
    path = Path(path)
    loaded = nifti.load(path, allow_nonfinite=True, series=True)
    header, own = _header(path)
    if int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0:
        raise UserError(f"no affine (sform and qform codes are 0), {path}, convert the file from DICOM again")
    data, affine = nifti.reorient(loaded.data, loaded.affine, nib.aff2axcodes(own))
    data = np.ascontiguousarray(data.reshape(-1, *data.shape[-3:]).transpose(0, 3, 2, 1))  # (T, Z, H, W)
    finite, valid = np.isfinite(data), None
    if not finite.all():
        if not finite.any():
            raise UserError(f"no finite value, {path}, fetch the file again")
        warnings.warn(f"{path}: {np.count_nonzero(~finite)} voxels are NaN or Inf and will not be used", stacklevel=2)
        data, valid = np.where(finite, data, 0), finite
    seconds = {8: 1.0, 16: 1e-3, 24: 1e-6}.get(int(header["xyzt_units"]) & 56, 1.0)
    frame_s = float(header["pixdim"][4]) * seconds if len(data) > 1 else 0.0
    frame_s = frame_s if np.isfinite(frame_s) and frame_s > 0 else 0.0
    return Cine(data, Grid(affine, data.shape[1:]), frame_s, path, valid)


def load_sax(path: str | Path) -> Cine:
    """A short-axis cine; UserError where it is a single slice, which has nothing to interpolate."""
    cine = load_cine(path)
    if cine.grid.shape[0] < 2:
        raise UserError(f"short-axis file has one slice, {path}, give a stack of two slices or more")
    if min(cine.grid.shape[1:]) < 8:
        raise UserError(f"slices of {cine.grid.shape[2]} x {cine.grid.shape[1]} pixels, {path}, is the axis order "
                        "columns, rows, slices?")  # fmt: skip
    return cine


def load_lax(path: str | Path) -> Cine:
    """A long-axis view (T, 1, H, W), from a file of one slice along any axis; UserError for several slices."""
    cine = load_cine(path)
    thin = [axis for axis, n in enumerate(cine.grid.shape) if n == 1]
    if not thin:
        raise UserError(f"long-axis file has {' x '.join(map(str, cine.grid.shape[::-1]))} voxels, {path}, save one "
                        "slice per file")  # fmt: skip
    return cine if 0 in thin else _slice_first(cine, thin[0])


def _slice_first(cine: Cine, thin: int) -> Cine:
    """The cine with its axis of length 1 (of Z, H, W) moved to the front."""

    def turn(stack):
        return np.ascontiguousarray(np.moveaxis(stack, 1 + thin, 1))

    order = [axis for axis in (2, 1, 0) if axis != thin] + [thin]  # of w, h, z: positions in (Z, H, W)
    affine = cine.grid.affine[:, [2 - axis for axis in order] + [3]]
    data = turn(cine.data)
    valid = None if cine.valid is None else turn(cine.valid)
    return replace(cine, data=data, grid=Grid(affine, data.shape[1:]), valid=valid)


def _header(path: Path):
    image = nib.load(path)
    return image.header, image.affine


def save(path: str | Path, data: np.ndarray, grid: Grid, frame_s: float = 0.0, *, dtype=np.float32) -> None:
    """Write a stack (Z, H, W) or cine (T, Z, H, W) as NIfTI in the axis order of `grid`, atomically, same bytes again.

    frame_s: time between frames, kept in the header of a cine. UserError as `nifti.save`.
    """
    path, data = Path(path), np.asarray(data)
    if data.shape[-3:] != grid.shape:
        raise ValueError(f"data {data.shape} are not on the grid {grid.shape}")
    path.parent.mkdir(parents=True, exist_ok=True)
    nifti.save(path, np.swapaxes(data, -1, -3), grid.affine, dtype=dtype)
    if data.ndim == 4 and frame_s > 0:
        _write_frame_time(path, frame_s)


def _write_frame_time(path: Path, frame_s: float) -> None:
    """Put the time between frames into the header, which `nifti.save` leaves out."""
    zipped, raw = path.name.endswith(".gz"), path.read_bytes()
    raw = bytearray(gzip.decompress(raw) if zipped else raw)
    raw[FRAME_TIME : FRAME_TIME + 4] = struct.pack("<f", frame_s)
    raw[UNITS] = MM_AND_S
    with replacing(path) as file:
        file.write(gzip.compress(raw, nifti.GZIP_LEVEL, mtime=0) if zipped else raw)


def crop_or_pad(cine: Cine, size: int | tuple[int, int]) -> Cine:
    """The cine on `size` (H, W) pixels about the same middle, padded with 0; its grid follows."""
    size = (size, size) if isinstance(size, int) else size
    (data, start) = centred(cine.data, size)
    valid = None if cine.valid is None else centred(cine.valid, size)[0]
    affine = cine.grid.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [start[1], start[0], 0]
    return replace(cine, data=data, grid=Grid(affine, data.shape[1:]), valid=valid)


def centred(data: np.ndarray, size: tuple[int, int], fill: float = 0) -> tuple[np.ndarray, tuple[int, int]]:
    """(..., H, W) cut or padded with `fill` to `size` about the middle, and where row and column 0 of it were."""
    old, new = np.array(data.shape[-2:]), np.array(size)
    start = np.trunc((old - new) / 2).astype(int)
    out = np.full((*data.shape[:-2], *size), fill, data.dtype)
    low, high = np.clip(start, 0, old), np.clip(start + new, 0, old)
    rows, columns = (slice(a, b) for a, b in zip(low, high, strict=True))
    to_rows, to_columns = (slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
    out[..., to_rows, to_columns] = data[..., rows, columns]
    return out, (int(start[0]), int(start[1]))


# ---- frames ---------------------------------------------------------------------------------------------------------


def paired_frame(frame: int, frames: int, other_frames: int) -> float:
    """Position in a cine of `other_frames` of the cardiac phase of `frame` of `frames`; both cover one heart beat."""
    return frame / frames * other_frames


def frame_at(cine: Cine, position: float) -> tuple[np.ndarray, np.ndarray | None]:
    """Image (Z, H, W) at a frame position, linear between frames and cyclic, and where it is valid (None: all).

    A still image (one frame) is the same at every position.
    """
    position = position % cine.frames
    low, share = int(position), position - int(position)
    if share < 1e-6 or cine.frames == 1:
        return cine.data[low].copy(), None if cine.valid is None else cine.valid[low]
    high = (low + 1) % cine.frames
    valid = None if cine.valid is None else cine.valid[low] & cine.valid[high]
    return ((1 - share) * cine.data[low] + share * cine.data[high]).astype(np.float32), valid


def resample_frames(cine: Cine, frames: int) -> Cine:
    """The cine at `frames` evenly spaced phases of its heart beat: paired by phase with a cine of that many."""
    if frames == cine.frames:
        return cine
    pairs = [frame_at(cine, paired_frame(frame, frames, cine.frames)) for frame in range(frames)]
    valid = None if cine.valid is None else np.stack([valid for _, valid in pairs])
    frame_s = cine.frame_s * cine.frames / frames
    return replace(cine, data=np.stack([image for image, _ in pairs]), frame_s=frame_s, valid=valid)


# ---- long-axis pixels in the dense grid ------------------------------------------------------------------------------


class PlaneSampler:
    """The pixels of a long-axis image as trilinear samples of a dense volume (N, H, W); differentiable.

    thickness_points > 1 averages so many points spread over `thickness_mm` across the plane (default: the slice
    spacing in the affine of `lax`, which for a single slice is its thickness). A pixel takes part if all its points lie
    in the field of view, that is between the outermost voxel centres.

    coordinates (P, 3): dense voxels (z, y, x) of the pixel centres; pixels (P,): their flat places in the image (H, W);
    first_slice, last_slice (P,): the dense slices that the pixel needs.
    """

    def __init__(self, dense: Grid, lax: Grid, thickness_points: int = 1, thickness_mm: float | None = None):
        if lax.shape[0] != 1:
            raise ValueError(f"a long-axis grid has one slice, not {lax.shape[0]}")
        if thickness_points < 1:
            raise UserError(f"thickness_points {thickness_points}: 1 or more points across the slice")
        thickness_mm = lax.spacing_mm[2] if thickness_mm is None else thickness_mm
        depth = ((np.arange(thickness_points) + 0.5) / thickness_points - 0.5) * thickness_mm
        rows, columns = np.indices(lax.shape[1:]).reshape(2, -1)
        centres = lax.world(np.stack([columns, rows, np.zeros_like(rows)], axis=-1))  # (H * W, 3)
        points = dense.voxels(centres[:, None] + depth[:, None] * lax.normal)[..., ::-1]  # (H * W, S, 3), z y x
        whole = np.rint(points)  # affines pass through float32 files: undo that rounding
        points = np.where(np.abs(points - whole) < 1e-4, whole, points)
        last = np.array(dense.shape) - 1
        inside = ((points >= 0) & (points <= last)).all(axis=(1, 2))
        points = points[inside]

        self.dense, self.lax = dense, lax
        self.shape, self.image_shape = dense.shape, lax.shape[1:]
        self.pixels = torch.from_numpy(np.flatnonzero(inside))
        self.coordinates = torch.from_numpy(points.mean(axis=1)).float()
        corner = np.clip(np.floor(points), 0, np.maximum(last - 1, 0))
        self.corner, self.share = torch.from_numpy(corner).long(), torch.from_numpy(points - corner).float()
        upper = np.minimum(corner[..., 0] + (points[..., 0] > corner[..., 0]), last[0])
        empty = np.zeros(0)
        self.first_slice = torch.from_numpy(corner[..., 0].min(axis=1) if len(points) else empty).long()
        self.last_slice = torch.from_numpy(upper.max(axis=1) if len(points) else empty).long()

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device) -> PlaneSampler:
        """Move the index tables to a device; returns self."""
        for name in ("pixels", "coordinates", "corner", "share", "first_slice", "last_slice"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def slices(self, k0: int, k1: int) -> torch.Tensor:
        """Indices (into the P pixels) of those that need dense slices k0 to k1 - 1 only."""
        return torch.nonzero((self.first_slice >= k0) & (self.last_slice < k1)).flatten()

    def sample(self, volume: torch.Tensor, chosen: torch.Tensor | None = None, first_slice: int = 0) -> torch.Tensor:
        """Values (P,) of the pixels, or of those `chosen`, in a volume (N, H, W) or its part from `first_slice` on."""
        corner, share = self.corner, self.share
        if chosen is not None:
            corner, share = corner[chosen], share[chosen]
        height, width = self.shape[1:]
        z, y, x = corner[..., 0] - first_slice, corner[..., 1], corner[..., 2]
        fz, fy, fx = share.to(volume.dtype).unbind(-1)
        flat, out = volume.reshape(-1), 0.0
        for dz in (0, 1):
            for dy in (0, 1):
                for dx in (0, 1):
                    # A share of 0 needs no voxel there: the index stays inside, also at the end of a part.
                    place = (torch.where(fz > 0, z + dz, z) * height + torch.where(fy > 0, y + dy, y)) * width
                    place = place + torch.where(fx > 0, x + dx, x)
                    weight = (fz if dz else 1 - fz) * (fy if dy else 1 - fy) * (fx if dx else 1 - fx)
                    out = out + weight * flat[place]
        return out.mean(dim=-1)

    def values(self, image: np.ndarray | torch.Tensor) -> torch.Tensor:
        """The pixels (P,) of an image (H, W) or (1, H, W) of the view."""
        return torch.as_tensor(image).reshape(-1)[self.pixels.to("cpu")].to(self.pixels.device)

    def picture(self, values: torch.Tensor, fill: float = float("nan")) -> np.ndarray:
        """An image (H, W) of the view from values (P,), `fill` outside the field of view."""
        out = np.full(self.image_shape, fill, np.float32)
        out.reshape(-1)[self.pixels.cpu().numpy()] = values.detach().float().cpu().numpy()
        return out


def paint(dense: Grid, lax: Grid, image: np.ndarray, valid: np.ndarray | None = None):
    """Legacy target of the original scripts: the view painted into the dense grid, and its mask, both (N, H, W).

    A voxel is painted when the plane passes within half a voxel of its centre; its value is bilinear in the image.
    """
    from scipy import ndimage

    image = np.asarray(image, dtype=np.float64).reshape(lax.shape[1:])
    valid = np.ones(image.shape, bool) if valid is None else np.asarray(valid).reshape(image.shape)
    z, y, x = np.indices(dense.shape)
    points = dense.world(np.stack([x, y, z], axis=-1).reshape(-1, 3))
    distance = (points - lax.affine[:3, 3]) @ lax.normal
    reach = np.abs(lax.normal @ dense.affine[:3, :3]).max() / 2  # half a voxel along the axis nearest to the normal
    near = np.flatnonzero((distance >= -reach) & (distance < reach))
    flat = lax.voxels(points[near] - distance[near, None] * lax.normal)
    columns, rows = flat[:, 0], flat[:, 1]
    inside = (columns >= 0) & (rows >= 0) & (columns <= image.shape[1] - 1) & (rows <= image.shape[0] - 1)
    places = np.stack([rows, columns])[:, inside]
    usable = ndimage.map_coordinates(valid.astype(np.float64), places, order=1) > 0.999
    painted, mask = np.zeros(dense.shape, np.float32), np.zeros(dense.shape, bool)
    chosen = near[inside][usable]
    painted.reshape(-1)[chosen] = ndimage.map_coordinates(image, places, order=1)[usable]
    mask.reshape(-1)[chosen] = True
    return painted, mask
