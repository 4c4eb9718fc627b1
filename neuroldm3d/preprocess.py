"""From a grey-matter map on disk to the networks' input: orientation, normalisation, crop, per-slice resize, affine.

A prepared volume is (D, H, W) float32 in LAS+ order, as CAT12 writes its mwp1 files: D = x right->left, H = y
posterior->anterior (coronal slices), W = z inferior->superior. The original worked in file order, which is this one,
so its weights fit. 113 x 137 x 113 voxels of 1.5 mm become 112 x 136 x 112 of 1.513 x 1.5 x 1.513 mm.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F

from common import nifti
from common.cli import UserError

AXES = "LAS"
NORMS = ("native", "zscore")
PUBLISHED_SHAPE, PUBLISHED_STEP_MM, PUBLISHED_ORIGIN_MM = (113, 137, 113), (-1.5, 1.5, 1.5), (84, -120, -72)  # CAT12
# Of 136 prepared coronal slices the classifier sees 9..123, 112 voxels wide + 2 x 8; other sizes in proportion.
SLICES, FIRST_SLICE, USED_SLICES, FRAME, MARGIN = 136, 9, 115, 112, 8
LARGEST = 40.0  # normalised grey-matter maps stay below 10


@dataclass(frozen=True)
class Preparation:
    """How volumes become network input; plain values, stored in every network file.

    shape: prepared grid (D, H, W). crop_start: first kept coronal slice of the volume on disk. norm: "native" divides
    by norm_scale (about the standard deviation of a mwp1 map, so that volumes get unit variance): background stays 0,
    and native units come back. "zscore" is the original's: mean and population standard deviation of the whole
    un-cropped volume; not invertible, since a synthetic volume has neither.
    """

    shape: tuple[int, int, int] = (112, 136, 112)
    crop_start: int = 1
    norm: str = "native"
    norm_scale: float = 0.25

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if len(self.shape) != 3 or min(self.shape) < 1 or self.crop_start < 0:
            raise UserError(f"preparation: shape {self.shape}, crop_start {self.crop_start}; three positive sizes and "
                            "0 or more are needed")  # fmt: skip
        if self.norm not in NORMS or not 0 < self.norm_scale < float("inf"):
            raise UserError(f"preparation: norm {self.norm!r}, norm_scale {self.norm_scale}; choose one of "
                            f"{', '.join(NORMS)} and a positive scale")  # fmt: skip

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


def prepare(volume: nifti.Volume, prep: Preparation) -> nifti.Volume:
    """The volume normalised and on the prepared grid, LAS+, with its exact affine.

    volume: any orientation. UserError names the file for NaN, a constant volume, too few coronal slices, or values
    far from the scale of `prep`.
    """
    where = volume.path or "volume"
    data, affine = nifti.reorient(volume.data, volume.affine, AXES)
    start, stop = prep.crop_start, prep.crop_start + prep.shape[1]
    if stop > data.shape[1]:
        raise UserError(f"{where}: shape {data.shape} has no coronal slices {start} to {stop - 1}; give a smaller "
                        "preparation shape or resample the volume")  # fmt: skip
    normalised = normalise(data, prep, where)[:, start:stop]
    grid = prepared_affine(affine, data.shape, prep)
    return replace(volume, data=resize_slices(normalised.astype(np.float32), prep.shape), affine=grid)


def normalise(data: np.ndarray, prep: Preparation, where) -> np.ndarray:
    """float64 values of a whole un-cropped volume in normalised units; UserError (naming `where`) if unusable."""
    data = data.astype(np.float64)
    if not np.isfinite(data).all():
        raise UserError(f"{where}: voxels are NaN or Inf, repair the file")
    if data.min() == data.max():
        raise UserError(f"{where}: every voxel is {data.flat[0]:.4g}, remove the subject or repair the file")
    if prep.norm == "zscore":
        return (data - data.mean()) / data.std()
    # Deviation (original code): dividing by one number for all keeps the background 0 and the units recoverable.
    data /= prep.norm_scale
    if np.abs(data).max() > LARGEST:
        reach = np.abs(data).max() * prep.norm_scale
        raise UserError(f"{where}: values reach {reach:.4g}, grey-matter fractions about 1; set norm_scale to the "
                        "volumes' standard deviation, or choose norm zscore")  # fmt: skip
    return data


def resize_slices(data: np.ndarray, shape) -> np.ndarray:
    """(D, H, W) float32 -> `shape`: every coronal slice bilinear and antialiased, H kept."""
    if data.shape == tuple(shape):
        return np.ascontiguousarray(data)
    slices = torch.from_numpy(np.ascontiguousarray(data.transpose(1, 0, 2)))[:, None]  # (H, 1, D, W)
    slices = F.interpolate(slices, (shape[0], shape[2]), mode="bilinear", antialias=True, align_corners=False)
    return np.ascontiguousarray(slices[:, 0].numpy().transpose(1, 0, 2))


def prepared_affine(affine: np.ndarray, shape, prep: Preparation) -> np.ndarray:
    """Affine (4, 4) of the prepared grid from that of the un-cropped LAS+ volume of `shape`."""
    factor = np.array([shape[0] / prep.shape[0], 1.0, shape[2] / prep.shape[2]])
    step = np.diag([*factor, 1.0])
    step[:3, 3] = (factor - 1) / 2 + np.array([0, prep.crop_start, 0])  # a resize keeps the outer corners
    return np.asarray(affine, np.float64) @ step


def published_affine(prep: Preparation) -> np.ndarray:
    """Affine (4, 4) of the prepared grid of CAT12's mwp1 files, which the original's arrays do not carry."""
    affine = np.diag([*PUBLISHED_STEP_MM, 1.0])
    affine[:3, 3] = PUBLISHED_ORIGIN_MM
    return prepared_affine(affine, PUBLISHED_SHAPE, prep)


def denormalise(array, prep: Preparation):
    """Normalised array or tensor in the units that `units` names."""
    return array * prep.norm_scale if prep.norm == "native" else array


def units(prep: Preparation) -> str:
    return "GM fraction" if prep.norm == "native" else "z-score"


def classifier_slices(prep: Preparation) -> slice:
    """Coronal slices of the prepared grid that the classifier sees: 9..123 of 136."""
    start = round(prep.shape[1] * FIRST_SLICE / SLICES)
    return slice(start, start + round(prep.shape[1] * USED_SLICES / SLICES))


def classifier_margins(prep: Preparation) -> tuple[int, int]:
    """Voxels added on either side of axis 0 and of axis 2: 8 at 112."""
    return round(prep.shape[0] * MARGIN / FRAME), round(prep.shape[2] * MARGIN / FRAME)


def classifier_input(prepared: np.ndarray, prep: Preparation, *, pad: str = "background") -> np.ndarray:
    """Prepared (D, H, W) -> (S, h, w) float32: coronal slice, axis 0, axis 2; 115 x 128 x 128 of 112 x 136 x 112.

    pad: see `frame_slices`.
    """
    if prepared.shape != prep.shape:
        raise ValueError(f"classifier_input needs a prepared volume {prep.shape}, not {prepared.shape}")
    return frame_slices(prepared[:, classifier_slices(prep)], classifier_margins(prep), pad)


def frame_slices(volume: np.ndarray, margins: tuple[int, int], pad: str) -> np.ndarray:
    """(D, S, W) -> (S, D + 2 m, W + 2 n) float32, the margins filled.

    pad: "background" frames the head with the volume's minimum, "zero" with 0 as the original does.
    """
    # Deviation (original code): zero is brighter than z-scored background, so its head sits in a bright frame.
    fill = {"background": volume.min(), "zero": 0.0}[pad]
    (m, n), slices = margins, volume.transpose(1, 0, 2)
    return np.pad(slices, ((0, 0), (m, m), (n, n)), constant_values=fill).astype(np.float32)


def rotate_slices(slices: np.ndarray, degrees: float, fill: float) -> np.ndarray:
    """Every slice of (S, h, w) turned about its centre, counter-clockwise, nearest neighbour; `fill` outside."""
    turn = np.deg2rad(degrees)
    h, w = slices.shape[1:]
    row, column = np.mgrid[:h, :w].astype(np.float64)
    y, x = row - (h - 1) / 2, column - (w - 1) / 2
    source_y = np.rint(np.cos(turn) * y + np.sin(turn) * x + (h - 1) / 2).astype(int)
    source_x = np.rint(np.cos(turn) * x - np.sin(turn) * y + (w - 1) / 2).astype(int)
    inside = (source_y >= 0) & (source_y < h) & (source_x >= 0) & (source_x < w)
    turned = slices[:, source_y.clip(0, h - 1), source_x.clip(0, w - 1)]
    return np.where(inside, turned, slices.dtype.type(fill))
