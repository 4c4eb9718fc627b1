"""Prepared cases as network input and back: intensities, slices, volumes, padding, augmentation.

A prepared folder (lapt/preprocessing.py) holds, slice axis first so that one slice is one read:

    cases/<case>/ctp.npy (Z, T, X, Y) HU, dwi.npy (Z, X, Y) scanner units, adc.npy (Z, X, Y) 1e-6 mm^2/s: float32
                 mask.npy, lesion.npy (Z, X, Y) uint8; case.json: grid, retained slices, statistics, sources
    manifest.csv, splits/{train,val,test,ct_only}_list.json (patients), statistics.json (of the training patients)

In memory a volume is (X, Y, Z) in RAS+ order (x left->right, y posterior->anterior, z inferior->superior), a CTP
(T, X, Y, Z). Channel 0 of `mri` is DWI, channel 1 ADC. Cases prepared with further images (preprocessing.py --maps)
have them as the last channels of their CTP: T then counts both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.cli import UserError
from common.runtime import generator
from lapt import data_split

NORMALISATIONS, STATISTICS = ("quantile", "zscore"), ("training", "case")
MODALITIES = ("dwi", "adc")
CTP_BACKGROUND = -1.0
CLIP_SD = 3.0  # z-scores beyond are cut off
TINY = 1e-8  # the original's guard against a constant image
REMAKE = "make it with `python lapt/preprocessing.py --input_dir RAW --output_dir FOLDER`"


# ---- intensities ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Intensity:
    """How DWI, ADC and CTP become network input, and back to physical units; plain values, stored with every network.

    normalisation: "quantile" (2D release: [low, high] to [-1, 1], background -1) or "zscore" (volume release: mean 0,
    SD 1, cut off at +-3, background 0). statistics: which low, high, mean, sd images are normalised with: "training"
    (`stats`, of the brains of all training patients) or "case" (the original: of the very image).
    stats: {"dwi": {"low", "high", "mean", "sd"}, "adc": {...}} of the training set, in scanner units and 1e-6 mm^2/s;
    predictions get their units from it, for there is no image to take them from. ctp_window: HU that become -1 and 1.
    maps: {name: (low, high)} of the maps that follow the CTP's `time_points` frames as channels, of the training set.
    """

    # Deviation (original code): predictions there need the quantiles, or mean and SD, of the image to be predicted.

    normalisation: str
    statistics: str
    stats: dict
    ctp_window: tuple[float, float]
    time_points: int
    split_hash: str = ""
    maps: dict = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "maps", {name: tuple(float(v) for v in window) for name, window in self.maps.items()})
        object.__setattr__(self, "ctp_window", tuple(float(v) for v in self.ctp_window))
        for name, known in (("normalisation", NORMALISATIONS), ("statistics", STATISTICS)):
            if getattr(self, name) not in known:
                raise UserError(f"intensity: {name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if len(self.ctp_window) != 2 or not -math.inf < self.ctp_window[0] < self.ctp_window[1] < math.inf:
            raise UserError(f"intensity: CTP window {self.ctp_window}; two values in HU are needed, the lower first")
        for name, (low, high) in self.maps.items():
            if not -math.inf < low < high < math.inf:
                raise UserError(f"intensity: {name} reaches from {low:g} to {high:g} in the training set; prepare the "
                                "data without it, or with real maps")  # fmt: skip
        missing = [m for m in MODALITIES if not {"low", "high", "mean", "sd"} <= set(self.stats.get(m, {}))]
        if missing:
            raise UserError(f"intensity: no training statistics of {', '.join(missing)}; they come from the training "
                            "patients: prepare a folder that has some")  # fmt: skip

    @classmethod
    def of_folder(cls, folder: str | Path, normalisation: str = "quantile", statistics: str = "training",
                  ctp_window: Sequence[float] | None = None) -> Intensity:  # fmt: skip
        """Of a prepared folder; `ctp_window` None: the one written there."""
        known = read_statistics(folder)
        stats = {m: known[m] for m in MODALITIES if known.get(m)}
        window = tuple(known["ctp_window"] if ctp_window is None else ctp_window)
        maps = {name: (s["low"], s["high"]) for name, s in known["maps"].items() if s}
        return cls(normalisation, statistics, stats, window, known["time_points"], known["split_hash"], maps)

    def to_dict(self) -> dict:
        """Plain values; without the entry `maps` where there are none, as before there could be any."""
        values = asdict(self) | {"ctp_window": list(self.ctp_window)}
        maps = {name: list(window) for name, window in values.pop("maps").items()}
        return values | ({"maps": maps} if maps else {})

    @classmethod
    def from_dict(cls, values: dict) -> Intensity:
        """Inverse of `to_dict`; UserError if entries are missing or unknown."""
        odd = ({f.name for f in fields(cls)} ^ set(values)) - {"maps"}
        if odd:
            raise UserError(f"intensity has missing or unknown entries: {', '.join(sorted(odd))}; give a file of this "
                            "program")  # fmt: skip
        return cls(**values)

    @property
    def channels(self) -> int:
        """Channels of the CTP with its maps, T."""
        return self.time_points + len(self.maps)

    @property
    def background(self) -> float:
        """Value of `mri` outside the brain."""
        return -1.0 if self.normalisation == "quantile" else 0.0

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value of a normalised image."""
        return (-1.0, 1.0) if self.normalisation == "quantile" else (-CLIP_SD, CLIP_SD)

    def range(self, modality: str) -> float:
        """`high - low` of the training set in physical units: the data range of PSNR and SSIM."""
        return self.stats[modality]["high"] - self.stats[modality]["low"]

    def normalise(self, dwi: np.ndarray, adc: np.ndarray, mask: np.ndarray, stats: dict | None = None) -> np.ndarray:
        """`mri` (2, ...) float32 from DWI and ADC (...) in physical units; outside the mask exactly `background`.

        stats: the case's own, used where `statistics` is "case".
        """
        if self.statistics == "case" and stats is None:
            raise ValueError("normalise needs the statistics of the case where statistics is 'case'")
        stats = stats if self.statistics == "case" else self.stats
        inside, channels = mask > 0, []
        for image, s in zip((dwi, adc), (stats[m] for m in MODALITIES), strict=True):
            image = np.asarray(image, np.float32)
            if self.normalisation == "quantile":
                low, high = np.float32(s["low"]), np.float32(s["high"])
                image = np.clip(image, low, high) - low
                image = image / np.float32(high - low + TINY) * np.float32(2) - np.float32(1)
            else:
                image = (image - np.float32(s["mean"])) / np.float32(s["sd"] + TINY)
                image = np.clip(image, np.float32(-CLIP_SD), np.float32(CLIP_SD))
            channels.append(np.where(inside, image, np.float32(self.background)))
        return np.stack(channels)

    def normalise_ctp(self, ctp: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """CTP (T, ...) in HU to [-1, 1] by the window, maps by theirs, float32; outside the mask (...) exactly -1."""
        windows = [self.ctp_window] * (len(ctp) - len(self.maps)) + list(self.maps.values())
        low, high = np.array(windows, np.float32).T.reshape(2, -1, *[1] * (np.ndim(ctp) - 1))
        ctp = (np.clip(np.asarray(ctp, np.float32), low, high) - low) / (high - low) * np.float32(2) - np.float32(1)
        return np.where(mask > 0, ctp, np.float32(CTP_BACKGROUND))

    def denormalise(self, mri, stats: dict | None = None, *, clip: bool = True):
        """(DWI, ADC) (...) in physical units from `mri` (2, ...), array or tensor; not masked.

        stats: of another image than the training set (the original takes that of the true image). clip: to what a
        normalised image can hold, and to no negative values.
        """
        stats, images = stats or self.stats, []
        for image, s in zip(mri, (stats[m] for m in MODALITIES), strict=True):
            image = image.clip(*self.bounds) if clip else image
            if self.normalisation == "quantile":
                image = (image + 1) / 2 * (s["high"] - s["low"] + TINY) + s["low"]
            else:
                image = image * (s["sd"] + TINY) + s["mean"]
            images.append(image.clip(0) if clip else image)
        return tuple(images)


# ---- padding --------------------------------------------------------------------------------------------------------


def padded_size(shape: Sequence[int], multiple: int) -> tuple[int, ...]:
    """The next multiples."""
    return tuple(multiple * math.ceil(n / multiple) for n in shape)


def pad_to(array, size: Sequence[int], fill: float):
    """Array or tensor whose last axes are extended by `fill` to `size`, half on either side; ValueError if larger."""
    old = tuple(array.shape[-len(size) :])
    before = [(n - o) // 2 for n, o in zip(size, old, strict=True)]
    after = [n - o - b for n, o, b in zip(size, old, before, strict=True)]
    if min(before) < 0:
        raise ValueError(f"{old} does not fit into {tuple(size)}")
    if isinstance(array, torch.Tensor):
        return F.pad(array, [p for pair in zip(before[::-1], after[::-1], strict=True) for p in pair], value=fill)
    widths = [(0, 0)] * (array.ndim - len(size)) + list(zip(before, after, strict=True))
    return np.pad(array, widths, constant_values=fill)


def unpad(array, shape: Sequence[int]):
    """Inverse of `pad_to`: the middle `shape` of the last axes."""
    old = tuple(array.shape[-len(shape) :])
    starts = [(n - m) // 2 for n, m in zip(old, shape, strict=True)]
    if min(starts) < 0:
        raise ValueError(f"{tuple(shape)} is larger than {old}")
    return array[(..., *(slice(s, s + m) for s, m in zip(starts, shape, strict=True)))]


def pad_to_multiple(array, multiple: int, fill: float, axes: int = 2):
    """The last `axes` axes extended by `fill` to the next multiple; undone by `unpad(array, shape before)`."""
    return pad_to(array, padded_size(array.shape[-axes:], multiple), fill)


def extract(array: np.ndarray, start: Sequence[int], size: Sequence[int], fill: float) -> np.ndarray:
    """`size` voxels of the last axes from voxel `start` on (may be negative), `fill` outside; a copy."""
    old = array.shape[-len(size) :]
    out = np.full((*array.shape[: -len(size)], *size), fill, array.dtype)
    low = [min(max(s, 0), n) for s, n in zip(start, old, strict=True)]
    high = [min(max(s + m, low_), n) for s, m, low_, n in zip(start, size, low, old, strict=True)]
    source = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    target = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
    out[(..., *target)] = array[(..., *source)]
    return out


# ---- prepared cases -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One prepared case; what case.json says. `slices`: retained axial slices; `stats`: of DWI and ADC in its brain.

    has_mri: DWI and ADC are there; shape (X, Y, Z); spacing_mm (3,); lesion_ml None without MRI.
    """

    name: str
    patient: str
    folder: Path
    shape: tuple[int, int, int]
    affine: np.ndarray = field(compare=False)
    time_points: int
    slices: tuple[int, ...]
    stats: dict
    has_mri: bool
    lesion_ml: float | None
    brain_ml: float
    sources: dict
    maps: tuple[str, ...] = ()

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))

    def slices_first(self, what: str) -> np.ndarray:
        """ctp (Z, T, X, Y), dwi, adc, mask or lesion (Z, X, Y) mapped from disk; UserError if missing or damaged."""
        path = self.folder / f"{what}.npy"
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.name}: {path} is missing or damaged ({error}); prepare the case again") from error
        x, y, z = self.shape
        if array.shape != ((z, self.time_points + len(self.maps), x, y) if what == "ctp" else (z, x, y)):
            raise UserError(f"{self.name}: {path} has shape {array.shape}, its case.json says {self.shape}; prepare "
                            "the case again")  # fmt: skip
        return array

    def volume(self, what: str) -> np.ndarray:
        """ctp (T, X, Y, Z), or dwi, adc, mask, lesion (X, Y, Z), contiguous; a lesion of a case without MRI is 0."""
        if what == "lesion" and not self.has_mri:
            return np.zeros(self.shape, np.uint8)
        array = self.slices_first(what)
        return np.ascontiguousarray(np.moveaxis(array, 0, -1))


def read_case(folder: str | Path) -> Case:
    """The case of a folder `cases/<case>`; UserError if its record is missing or damaged."""
    folder = Path(folder)
    try:
        known = json.loads((folder / "case.json").read_text())
        return Case(known["case"], known["patient"], folder, tuple(known["shape"]), np.array(known["affine"]),
                    known["time_points"], tuple(known["slices"]), known["stats"], known["has_mri"],
                    known["lesion_ml"], known["brain_ml"], known["sources"],
                    tuple(known.get("maps", ())))  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no usable case.json ({error!r}); {REMAKE}") from error


def read_statistics(folder: str | Path) -> dict:
    """statistics.json of a prepared folder; UserError if it is missing, damaged or of another split than the lists."""
    path = Path(folder) / "statistics.json"
    try:
        known = json.loads(path.read_text())
        known.setdefault("maps", {})  # folders of before there were any
        known["time_points"], known["ctp_window"], known["shape"], written = (
            int(known["time_points"]), [float(v) for v in known["ctp_window"]], tuple(known["shape"]),
            known["split_hash"])  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no prepared folder ({path.name}: {error!r}); {REMAKE}") from error
    if (now := data_split.read(folder).hash) != written:
        raise UserError(f"{path} belongs to split {written}, the lists in {Path(folder) / 'splits'} are split {now}; "
                        f"run `python lapt/data_split.py --data {folder} --keep_lists`")  # fmt: skip
    return known


def read_cases(folder: str | Path, split: str | None = None) -> list[Case]:
    """Cases of a prepared folder by name: of split train, val, test or ct_only, or all of them (None).

    UserError if the folder is not one, a patient is in two splits or none, or the split is empty.
    """
    folder = Path(folder)
    if not (folder / "cases").is_dir():
        raise UserError(f"{folder} is no prepared folder (no cases/ in it); {REMAKE}")
    cases = [read_case(path) for path in sorted((folder / "cases").iterdir()) if path.is_dir()]
    split_of = data_split.read(folder)
    where = {case.name: split_of.of(case.patient, case.has_mri) for case in cases}
    chosen = [case for case in cases if split in (None, where[case.name])]
    if not chosen:
        raise UserError(f"{folder}: none of its {len(cases)} cases is in split {split}; change the lists in "
                        f"{folder / 'splits'} with lapt/data_split.py")  # fmt: skip
    return chosen


def split_note(trained_on: dict[str, str], folder: str | Path) -> str:
    """What to say of networks {what: hash of the split it was trained with} and a folder split otherwise; "" if none.

    An error would be wrong: networks are measured on other hospitals' patients too.
    """
    split = read_statistics(folder)["split_hash"]
    other = [what for what, known in trained_on.items() if known not in ("", split)]
    if not other:
        return ""
    return f"{', '.join(other)}: trained with another split; make sure that none of these patients was trained on"


# ---- augmentation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augment:
    """Random geometry and intensity of training items, in normalised units, after masking.

    flip_x, flip_y, flip_z: probabilities of mirroring left-right, front-back, up-down. affine: probability of turn,
    shift and zoom: `rotate` radians about x, y, z (2D: the last), `translate` shares of the axes' lengths, `zoom`
    relative change per axis, each uniform in +-. What comes in from outside is "constant" background or the "border"
    repeated. intensity: probability of gain and offset (share, share of SD 1) and noise (SD) of DWI and ADC.
    """

    flip_x: float = 0.5
    flip_y: float = 0.0
    flip_z: float = 0.0
    affine: float = 0.9
    rotate: tuple[float, float, float] = (math.pi / 48, math.pi / 48, math.pi / 16)
    translate: tuple[float, float, float] = (0.05, 0.05, 0.03)
    zoom: tuple[float, float, float] = (0.05, 0.05, 0.03)
    padding: str = "constant"
    intensity: float = 0.0
    gain: float = 0.05
    offset: float = 0.03
    noise: float = 0.1

    # Deviation (original code): it also mirrors front-back and up-down, and shifts by up to 32 pixels with the border
    # repeated, before masking; preset "upstream" (shares of 192 x 224 pixels).

    def __call__(self, item: dict, intensity: Intensity, spacing_mm, rng: torch.Generator) -> dict:
        """Item with its tensors (C, X, Y) or (C, X, Y, Z) changed alike; background stays exactly background."""
        nd = item["mask"].ndim - 1
        u = torch.rand(16, generator=rng, dtype=torch.float64).tolist()  # all of them always: the draws stay in step
        axes = [i + 1 for i, p in enumerate((self.flip_x, self.flip_y, self.flip_z)[:nd]) if u[i] < p]
        images = {name: item[name] for name in ("mri", "ctp") if name in item}
        labels = {name: item[name] for name in ("mask", "lesion")}
        if axes:
            images, labels = ({k: v.flip(axes) for k, v in part.items()} for part in (images, labels))
        if u[3] < self.affine:
            theta = self._theta(u[4:13], item["mask"].shape[1:], spacing_mm)
            mode = "border" if self.padding == "border" else "zeros"
            base = {"mri": intensity.background, "ctp": CTP_BACKGROUND}
            shape = (1, 1, *item["mask"].shape[1:])
            grid = F.affine_grid(theta[None], shape, align_corners=False)
            images = {k: _resample(v - base[k], grid, "bilinear", mode) + base[k] for k, v in images.items()}
            labels = {k: _resample(v, grid, "nearest", mode) for k, v in labels.items()}
        if u[13] < self.intensity and "mri" in images:
            noise = torch.randn(images["mri"].shape, generator=rng) * self.noise
            changed = images["mri"] * (1 + self.gain * (2 * u[14] - 1)) + self.offset * (2 * u[15] - 1) + noise
            images["mri"] = changed.clamp(*intensity.bounds)
        inside = labels["mask"] > 0
        for name, background in (("mri", intensity.background), ("ctp", CTP_BACKGROUND)):
            if name in images:
                images[name] = torch.where(inside, images[name], background)
        labels["lesion"] = labels["lesion"] * inside
        return item | images | labels

    def _theta(self, u, shape, spacing_mm) -> torch.Tensor:
        """(nd, nd + 1) for affine_grid: turns are turns in mm, whatever the voxels."""
        nd, signed = len(shape), [2 * v - 1 for v in u]
        angles = [a * s for a, s in zip(self.rotate, signed[:3], strict=True)]
        matrix = np.eye(nd)
        for axis in range(3) if nd == 3 else (2,):
            i, j = (n for n in range(3) if n != axis)
            turn, (c, s) = np.eye(nd), (math.cos(angles[axis]), math.sin(angles[axis]))
            turn[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
            matrix = matrix @ turn
        half_mm = np.array(shape) * np.asarray(spacing_mm)[:nd] / 2
        zoom = [1 + z * s for z, s in zip(self.zoom[:nd], signed[3 : 3 + nd], strict=True)]
        matrix = matrix / zoom * half_mm / half_mm[:, None]
        shift = [2 * t * s for t, s in zip(self.translate[:nd], signed[6 : 6 + nd], strict=True)]
        theta = np.concatenate([matrix[::-1, ::-1], np.array(shift)[::-1, None]], 1)  # affine_grid: last axis first
        return torch.from_numpy(np.ascontiguousarray(theta)).float()


def _resample(tensor, grid, mode, padding):
    return F.grid_sample(tensor[None].float(), grid, mode=mode, padding_mode=padding, align_corners=False)[0]


AUGMENTATIONS = {
    "none": None,
    "plausible": Augment(),
    "strong": Augment(zoom=(0.2, 0.2, 0.05), intensity=0.5, noise=0.2),  # the segmentation guide: any image quality
    "upstream": Augment(flip_y=0.5, flip_z=0.5, rotate=(math.pi / 48, math.pi / 48, math.pi / 16),
                        translate=(32 / 192, 32 / 224, 3 / 32), zoom=(0.001,) * 3, padding="border"),
    "upstream3d": Augment(flip_y=0.5, flip_z=0.5, rotate=(math.pi / 48, math.pi / 48, math.pi / 12),
                          translate=(10 / 192, 10 / 224, 3 / 32), zoom=(0.1, 0.1, 0.03), padding="border"),
}  # fmt: skip


def augmentation(name: str) -> Augment | None:
    """One of AUGMENTATIONS by name."""
    if name not in AUGMENTATIONS:
        raise UserError(f"augmentation {name!r} is not one of {', '.join(AUGMENTATIONS)}")
    return AUGMENTATIONS[name]


# ---- items ----------------------------------------------------------------------------------------------------------


class Slices(torch.utils.data.Dataset):
    """Retained axial slices of a split, by case name and slice, padded to one size with background.

    An item has mri (2, X, Y) (not for cases without MRI), ctp (T, X, Y) (unless `with_ctp` is off), mask and lesion
    (1, X, Y), float32; case (str), slice (int). Address it by index, or by (index, position): then augmented, by a
    generator of (seed, position) alone. size (X, Y): None is the smallest multiple of `multiple` that holds every case
    of the folder. UserError where a case has other time points than `intensity`, or does not fit `size`.
    """

    def __init__(self, folder: str | Path, split: str, intensity: Intensity, *, augment: str = "none", seed: int = 0,
                 with_ctp: bool = True, multiple: int = 1, size: Sequence[int] | None = None):  # fmt: skip
        self.cases, self.intensity, self.seed, self.with_ctp = read_cases(folder, split), intensity, seed, with_ctp
        self.augment = augmentation(augment)
        self.size = tuple(size or padded_size(read_statistics(folder)["shape"][:2], multiple))
        check_items(self.cases, intensity, with_ctp)
        large = next((c for c in self.cases if any(n > m for n, m in zip(c.shape, self.size, strict=False))), None)
        if large:
            raise UserError(f"{large.name}: slices of {large.shape[0]} x {large.shape[1]} pixels do not fit the size "
                            f"{self.size[0]} x {self.size[1]}; give a larger one")  # fmt: skip
        self.index = [(case, z) for case in self.cases for z in case.slices]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key) -> dict:
        index, position = key if isinstance(key, tuple) else (key, None)
        case, z = self.index[index]
        item = slice_item(case, z, self.intensity, self.size, self.with_ctp)
        if self.augment and position is not None:
            rng = generator(self.seed, "augment", position)
            item = self.augment(item, self.intensity, case.spacing_mm, rng)
        return item


def slice_item(case: Case, z: int, intensity: Intensity, size: Sequence[int], with_ctp: bool = True) -> dict:
    """Item of one axial slice, see `Slices`."""
    mask = case.slices_first("mask")[z]
    item = {"mask": mask, "lesion": case.slices_first("lesion")[z] if case.has_mri else np.zeros_like(mask)}
    if case.has_mri:
        dwi, adc = (case.slices_first(name)[z] for name in MODALITIES)
        item["mri"] = intensity.normalise(dwi, adc, mask, case.stats)
    if with_ctp:
        item["ctp"] = intensity.normalise_ctp(case.slices_first("ctp")[z], mask)
    return _tensors(item, intensity, lambda array, fill: pad_to(array, size, fill)) | {"case": case.name, "slice": z}


def _tensors(arrays: dict, intensity: Intensity, fit) -> dict:
    """Float32 tensors with a channel axis, each fitted to the size with its own background."""
    fill = {"mri": intensity.background, "ctp": CTP_BACKGROUND, "mask": 0, "lesion": 0}
    tensors = {}
    for name, array in arrays.items():
        array = array if name in ("mri", "ctp") else array[None]
        tensors[name] = torch.from_numpy(np.ascontiguousarray(fit(array, fill[name]), dtype=np.float32))
    return tensors


def check_items(cases: list[Case], intensity: Intensity, with_ctp: bool) -> None:
    """UserError where a CTP has other time points or maps than the network's."""
    if not with_ctp:
        return
    other = next((c for c in cases if c.maps != tuple(intensity.maps)), None)
    if other:
        raise UserError(f"{other.name}: {maps_text(other.maps)}, the network takes {maps_text(intensity.maps)}; "
                        "prepare the data with these, in this order")  # fmt: skip
    other = next((c for c in cases if c.time_points != intensity.time_points), None)
    if other:
        raise UserError(f"{other.name}: {other.time_points} CTP time points, {intensity.time_points} are needed; "
                        f"prepare it with --time_points {intensity.time_points} --resample_time")  # fmt: skip


def maps_text(maps) -> str:
    """Names of maps in a sentence."""
    return f"maps {' '.join(maps)}" if maps else "no maps"


class Volumes(torch.utils.data.Dataset):
    """Whole volumes of a split, by case name, or windows of slices of them.

    An item has mri (2, X, Y, Z), ctp (T, X, Y, Z), mask and lesion (1, X, Y, Z), float32; case (str); start (3,) int64:
    voxel of the case that is voxel 0 of the item, so `extract(item, -start, case.shape, fill)` puts it back.
    size (X, Y, Z): None is the smallest that holds every case of the folder, in-plane a multiple of `multiple`. Smaller
    cases are padded with background in the middle; of larger ones the size about the brain is taken, UserError where
    that cuts off brain. window: so many slices instead of all; two of three on lesion where there is one (by a
    generator of (seed, position); without position the one with most lesion).
    """

    def __init__(self, folder: str | Path, split: str, intensity: Intensity, *, size: Sequence[int] | None = None,
                 window: int | None = None, augment: str = "none", seed: int = 0, with_ctp: bool = True,
                 multiple: int = 1):  # fmt: skip
        self.cases, self.intensity, self.seed, self.with_ctp = read_cases(folder, split), intensity, seed, with_ctp
        self.augment, self.window = augmentation(augment), window
        largest = read_statistics(folder)["shape"]
        self.size = tuple(size or (*padded_size(largest[:2], multiple), largest[2]))
        check_items(self.cases, intensity, with_ctp)
        if window and not 0 < window <= self.size[2]:
            raise UserError(f"window of {window} slices: between 1 and the {self.size[2]} of the volume")
        for case in self.cases:
            place(case, self.size)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key) -> dict:
        index, position = key if isinstance(key, tuple) else (key, None)
        case = self.cases[index]
        item = volume_item(case, self.intensity, self.size, self.with_ctp)
        rng = generator(self.seed, "augment", -1 if position is None else position)
        if self.augment and position is not None:
            item = self.augment(item, self.intensity, case.spacing_mm, rng)
        if self.window:
            z = self._window_start(item["lesion"], rng if position is not None else None)
            item |= {name: value[..., z : z + self.window].contiguous() for name, value in item.items()
                     if name in ("mri", "ctp", "mask", "lesion")}  # fmt: skip
            item["start"] = item["start"] + torch.tensor([0, 0, z])
        return item

    def _window_start(self, lesion: torch.Tensor, rng) -> int:
        depth, per_slice = lesion.shape[-1], lesion.sum((0, 1, 2))
        if rng is None:
            sums = per_slice.unfold(0, self.window, 1).sum(-1)
            best = torch.nonzero(sums == sums.max())[:, 0]
            return int(best[(len(best) - 1) // 2])
        on_lesion = torch.rand(1, generator=rng).item() < 2 / 3
        lesion_slices = torch.nonzero(per_slice)[:, 0].tolist() if on_lesion else []
        starts = window_starts(lesion_slices, depth, self.window)
        return starts[int(torch.randint(len(starts), (1,), generator=rng))]


def volume_item(case: Case, intensity: Intensity, size: Sequence[int], with_ctp: bool = True) -> dict:
    """Item of a whole volume, see `Volumes`."""
    mask = case.volume("mask")
    item = {"mask": mask, "lesion": case.volume("lesion")}
    if case.has_mri:
        item["mri"] = intensity.normalise(*(case.volume(name) for name in MODALITIES), mask, case.stats)
    if with_ctp:
        item["ctp"] = intensity.normalise_ctp(case.volume("ctp"), mask)
    start = place(case, size)
    tensors = _tensors(item, intensity, lambda array, fill: extract(array, start, size, fill))
    return tensors | {"case": case.name, "start": torch.tensor(start)}


def place(case: Case, size: Sequence[int]) -> tuple[int, ...]:
    """Voxel of the case that is voxel 0 of a grid `size`: in the middle where it fits, about the brain where not.

    UserError where brain would be cut off: nothing is cropped silently.
    """
    # Deviation (original code): it crops in the middle, whatever that cuts off.
    starts = []
    for axis, (n, m) in enumerate(zip(case.shape, size, strict=True)):
        if n <= m:
            starts.append(-((m - n) // 2))
            continue
        inside = case.slices_first("mask").any(tuple(a for a in range(3) if a != (1, 2, 0)[axis]))
        first, last = (int(v) for v in np.flatnonzero(inside)[[0, -1]])
        if last - first + 1 > m:
            raise UserError(f"{case.name}: its brain is {last - first + 1} voxels along {'xyz'[axis]}, the size there "
                            f"is {m}; give a larger size, or prepare the cases on a coarser common grid")  # fmt: skip
        starts.append(min(max((first + last - m + 1) // 2, 0), n - m))
    return tuple(starts)


def window_starts(lesion_slices: Sequence[int], depth: int, window: int, rule: str = "centred") -> list[int]:
    """First slices of windows of `window` out of `depth` slices, for a uniform draw.

    "centred": one window about each lesion slice, moved inside the volume; without lesion every window. "upstream":
    windows that begin on a lesion slice, of late or no lesions all windows that begin on a slice without.
    """
    # Deviation (original code): its rule never shows slices below a lesion, and lesions of the last slices by chance.
    last = depth - window
    if rule == "centred":
        return [min(max(z - window // 2, 0), last) for z in lesion_slices] or list(range(last + 1))
    if rule != "upstream":
        raise UserError(f"window rule {rule!r} is not one of centred, upstream")
    lesion = set(lesion_slices)
    eligible = [z for z in range(last + 1) if z in lesion]
    return eligible or [z for z in range(last + 1) if z not in lesion]
