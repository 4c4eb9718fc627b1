"""Brain phantom with known truth: anatomy from the ICBM152 2009 templates that nilearn bundles, then T1 and amyloid PET physics.

A subject is the template pulled back through  subject mm --affine--> --random diffeomorphism--> --controlled factors--> template mm.
The first two depend on the seed only, so one seed with other `Factors` is the same head at another time (a longitudinal session).
Both flows are exponentials of smooth stationary velocity fields (scaling and squaring; Arsigny et al., MICCAI 2006), so they fold nowhere.
Everything random is drawn on a control grid in mm: a subject is the same anatomy on every grid, up to partial volume.

Arrays are (D, H, W) with RAS+ axes (x left->right, y posterior->anterior, z inferior->superior), world = MNI-like mm.
Template: Fonov et al., NeuroImage 2011, (c) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, McGill University.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

FOV_MM = (168.0, 192.0, 168.0)  # holds every head; 112x128x112 is 1.5 mm isotropic
CENTRE_MM = np.array([0.0, -17.0, 6.0])  # world position of the centre of every grid
SHARPEN, THINNING = 2.0, 1.6
HIPPOCAMPUS_GAIN = 0.4  # brings the measured volume to the factor within a few per cent between 0.5 and 1.2
VENTRICLE_MM = 7.0  # reach (sigma) of the field that widens the ventricles, and volume ratio against its peak in mm, measured on the template:
VENTRICLE_RATIO, VENTRICLE_PEAK = (0.58, 1.0, 1.40, 1.89, 2.76, 3.73, 5.02), (-3.0, 0.0, 2.0, 4.0, 7.0, 10.0, 14.0)
CONTROL_MM, CONTROL_SHAPE = 4.0, (48, 56, 48)  # grid of the deformation, independent of the image grid
WORK_MM = 2.4  # tissues are evaluated on a grid at least this fine, then block-averaged: proper partial volumes

LABELS = {
    "background": 0, "csf": 1, "ventricle_left": 2, "ventricle_right": 3, "white_matter": 4, "deep_grey": 5,
    "hippocampus_left": 6, "hippocampus_right": 7, "brain_stem": 8, "cerebellum_grey": 9, "cerebellum_white": 10,
    "frontal": 11, "parietal": 12, "temporal": 13, "occipital": 14, "precuneus": 15,
}  # fmt: skip
TARGET = ("frontal", "parietal", "temporal", "precuneus")  # cortical composite; precuneus includes posterior cingulate
REFERENCE = ("cerebellum_grey",)
TISSUES = ("csf", "grey", "white")
# Which label a tissue (csf, grey, white) carries in each region of the template; a region is decided by MNI geometry.
REGIONS = {
    "outside": ("csf", "frontal", "white_matter"), "frontal": ("csf", "frontal", "white_matter"),
    "parietal": ("csf", "parietal", "white_matter"), "temporal": ("csf", "temporal", "white_matter"),
    "occipital": ("csf", "occipital", "white_matter"), "precuneus": ("csf", "precuneus", "white_matter"),
    "cerebellum": ("csf", "cerebellum_grey", "cerebellum_white"), "brain_stem": ("csf", "brain_stem", "brain_stem"),
    "deep": ("csf", "deep_grey", "white_matter"), "hippocampus_left": ("csf", "hippocampus_left", "white_matter"),
    "hippocampus_right": ("csf", "hippocampus_right", "white_matter"),
    "ventricle_left": ("ventricle_left", "deep_grey", "white_matter"),
    "ventricle_right": ("ventricle_right", "deep_grey", "white_matter"),
}  # fmt: skip
REGION_ID = {name: i for i, name in enumerate(REGIONS)}
LABEL_OF = np.array([[LABELS[name] for name in row] for row in REGIONS.values()])  # (region, tissue) -> label

# Uptake in SUVR against cerebellar grey: value without amyloid, increase at load 1. White matter is non-specific.
UPTAKE = {
    "csf": (0.30, 0.0), "ventricle_left": (0.30, 0.0), "ventricle_right": (0.30, 0.0), "white_matter": (1.65, 0.05),
    "deep_grey": (1.15, 0.45), "hippocampus_left": (1.10, 0.20), "hippocampus_right": (1.10, 0.20), "brain_stem": (1.55, 0.0),
    "cerebellum_grey": (1.0, 0.0), "cerebellum_white": (1.40, 0.0), "frontal": (1.08, 0.95), "parietal": (1.08, 0.85),
    "temporal": (1.06, 0.80), "occipital": (1.10, 0.45), "precuneus": (1.10, 1.15),
}  # fmt: skip


def _pairs(*right):  # MUSE numbers a right gyrus even, its left twin one more
    return tuple(code + side for code in right for side in (0, 1))


# MUSE / DLMUSE codes of the same structures (the code lists of real IXI label maps were checked by volume and centroid).
MUSE = {
    "csf": (1, 4, 11, 46), "ventricle_right": (49, 51), "ventricle_left": (50, 52),
    "white_matter": (69, *range(81, 96)), "deep_grey": (23, 30, 31, 32, 36, 37, *range(55, 63), 75, 76),
    "hippocampus_right": (47,), "hippocampus_left": (48,), "brain_stem": (35,),
    "cerebellum_grey": (38, 39, 71, 72, 73), "cerebellum_white": (40, 41),
    "frontal": _pairs(100, 104, 112, 118, 120, 124, 136, 138, 140, 142, 146, 150, 152, 162, 164, 178, 182, 186, 190, 192, 204),
    "parietal": _pairs(106, 148, 174, 176, 194, 198), "precuneus": _pairs(166, 168),
    "temporal": _pairs(102, 116, 122, 132, 154, 170, 172, 180, 184, 200, 202, 206),
    "occipital": _pairs(108, 114, 128, 134, 144, 156, 160, 196),
}  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """What may be set for a subject; the defaults are the young, healthy template.

    age in years (T1 contrast and periventricular white matter only; shape follows the other factors); atrophy 0..1 cortical thinning
    with wider sulci; ventricle_scale and hippocampus_left/right = volume relative to the same head with factor 1
    (ventricle 0.6..5, hippocampus 0.5..1.2); amyloid_load 0..1.
    """

    age: float = 40.0
    atrophy: float = 0.0
    ventricle_scale: float = 1.0
    hippocampus_left: float = 1.0
    hippocampus_right: float = 1.0
    amyloid_load: float = 0.0


@dataclass(frozen=True)
class Brain:
    """One subject on a fine working grid (k voxels per image voxel and axis); images and maps come from `render`.

    tissue (3, ...) float32 fractions of csf, grey, white whose sum is the brain fraction; region (...) uint8 index into REGIONS;
    k (3,) block size; affine (4, 4) of the image grid; truth = factors, volumes in ml, composite SUVR, smallest Jacobian.
    """

    tissue: np.ndarray
    region: np.ndarray
    periventricular: np.ndarray
    k: tuple[int, int, int]
    affine: np.ndarray
    factors: Factors
    truth: dict

    @property
    def spacing_mm(self):
        return np.sqrt((self.affine[:3, :3] ** 2).sum(0))

    def tissue_map(self, name: str) -> np.ndarray:
        """Fraction of "csf", "grey" or "white" per voxel, (D, H, W) float32 in [0, 1]."""
        return block_mean(self.tissue[TISSUES.index(name)], self.k)

    def render(self, values: np.ndarray, fwhm_mm: float = 0.0) -> np.ndarray:
        """Mixture of per-(region, tissue) values by tissue fraction, blurred by a Gaussian and averaged to voxels: (D, H, W) float32.

        values (13 regions, 3 tissues), see `values_by_label`; the blur acts on the working grid, before the voxel average.
        """
        table = torch.as_tensor(np.asarray(values, np.float32))
        index = torch.from_numpy(self.region).int()
        fine = sum(
            torch.from_numpy(self.tissue[i]) * F.embedding(index, table[:, i : i + 1])[..., 0] for i in range(3)
        ).numpy()
        return block_mean(_blur(fine, fwhm_mm, self.spacing_mm / self.k), self.k)

    def labels(self) -> np.ndarray:
        """Label map (D, H, W) int16, codes `LABELS`: in each voxel the label with the largest fraction, background included."""
        k, n = self.k, len(LABELS)
        d, h, w = (s // f for s, f in zip(self.region.shape, k, strict=True))
        voxel = np.repeat(np.arange(h * w * n, step=n).reshape(h, w), k[1], 0).repeat(
            k[2], 1
        )  # where a voxel's fractions start
        out = np.empty((d, h, w), np.int16)
        for x in range(d):  # one slab at a time: the fractions of all labels do not fit in memory comfortably
            slab = slice(x * k[0], (x + 1) * k[0])
            region, tissue = self.region[slab], self.tissue[:, slab]
            sums = sum(
                np.bincount((voxel + LABEL_OF[region, i]).ravel(), t.ravel(), h * w * n) for i, t in enumerate(tissue)
            )
            sums = sums.reshape(h, w, n)
            sums[..., 0] = np.prod(k) - sums.sum(-1)
            out[x] = sums.argmax(-1)
        return out


def values_by_label(values: dict[str, float]) -> np.ndarray:
    """The (region, tissue) table of `Brain.render` from one value per label name (missing names: 0)."""
    return np.array([[values.get(name, 0.0) for name in row] for row in REGIONS.values()], np.float32)


def grid_affine(shape, spacing_mm=None) -> np.ndarray:
    """Affine (4, 4) of a grid centred on the head: isotropic unless spacing_mm gives three numbers, and just large enough that the
    field of view FOV_MM fits along every axis (axes in another proportion than 7:8:7 are padded)."""
    spacing = np.broadcast_to(max(np.divide(FOV_MM, shape)) if spacing_mm is None else spacing_mm, 3).astype(float)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = CENTRE_MM - spacing * (np.asarray(shape) - 1) / 2
    return affine


def block_mean(fine: np.ndarray, k) -> np.ndarray:
    if tuple(k) == (1, 1, 1):
        return fine
    d, h, w = (n // f for n, f in zip(fine.shape, k, strict=True))
    return fine.reshape(d, k[0], h, k[1], w, k[2]).mean((1, 3, 5), dtype=np.float32)


def _blur(volume, fwhm_mm, spacing_mm):
    if fwhm_mm <= 0:
        return volume
    return ndimage.gaussian_filter(volume, fwhm_mm / 2.3548 / np.asarray(spacing_mm), mode="constant", truncate=3.0)


def _rng(*key):  # independent, documented streams: (seed, stream number)
    return np.random.default_rng(np.random.SeedSequence([int(k) for k in key]))


def _sample(volume, points_mm, origin, step, mode="bilinear", padding="border"):
    """volume (C, X, Y, Z) at world points (..., 3) -> (C, ...)."""
    scale = 2 / (step * (torch.tensor(volume.shape[1:], dtype=torch.float32) - 1))
    offset = -1 - torch.as_tensor(origin, dtype=torch.float32) * scale
    g = torch.addcmul(offset, points_mm, scale)  # -1 and 1 are the centres of the outermost voxels
    return F.grid_sample(volume[None], g.flip(-1)[None], mode=mode, padding_mode=padding, align_corners=True)[0]


CONTROL_ORIGIN = CENTRE_MM - CONTROL_MM * (np.array(CONTROL_SHAPE) - 1) / 2


def _points(shape, affine):  # world mm of every voxel, (D, H, W, 3) float32; affine is diagonal
    axes = [
        torch.arange(n, dtype=torch.float32) * float(affine[i, i]) + float(affine[i, 3]) for i, n in enumerate(shape)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def _control_points():
    return _points(CONTROL_SHAPE, np.vstack([np.column_stack([CONTROL_MM * np.eye(3), CONTROL_ORIGIN]), [0, 0, 0, 1]]))


def exponential(velocity: torch.Tensor, steps: int = 6) -> torch.Tensor:
    """Displacement (3, X, Y, Z) in mm of the time-1 flow of a stationary velocity field in mm on the control grid."""
    points, d = _control_points(), velocity / 2**steps
    for _ in range(steps):
        d = d + _sample(d, points + d.movedim(0, -1), CONTROL_ORIGIN, CONTROL_MM)
    return d


def jacobian(positions: torch.Tensor) -> np.ndarray:
    """Determinant of the map given as positions (X, Y, Z, 3) in mm on the control grid (central differences)."""
    columns = torch.gradient(positions, spacing=CONTROL_MM, dim=(0, 1, 2))
    return torch.linalg.det(torch.stack(columns, -1)).numpy()


def _ellipsoid(x, y, z, centre, axes):  # squared ellipsoidal radius
    return ((x - centre[0]) / axes[0]) ** 2 + ((y - centre[1]) / axes[1]) ** 2 + ((z - centre[2]) / axes[2]) ** 2


def _hippocampus_radius(x, y, z):
    """Squared radius of a tilted ellipsoid about the right hippocampus (left: -x); the tail rises and swings outward."""
    s = y + 23
    return ((x - 27 + 0.12 * s) / 8) ** 2 + (s / 19) ** 2 + ((z + 13 + 0.42 * s) / 6.5) ** 2


@lru_cache(maxsize=1)
def template() -> dict:
    """ICBM152 tissue fractions (3, ...) and region index at 1 mm, with the velocity fields of the factors on the control grid.

    Read from files inside the nilearn package: nothing is downloaded. Takes a second or two, once per process.
    """
    from nilearn import datasets  # slow import, and only the phantom needs it

    image = datasets.load_mni152_gm_template(resolution=1)
    grey = np.asarray(image.dataobj, np.float32)
    white = np.asarray(datasets.load_mni152_wm_template(resolution=1).dataobj, np.float32)
    mask = np.asarray(datasets.load_mni152_template(resolution=1).dataobj) > 0.1  # the T1 is skull-free
    box = tuple(
        slice(max(i.min() - 4, 0), i.max() + 5)
        for i in map(np.flatnonzero, (mask.any((1, 2)), mask.any((0, 2)), mask.any((0, 1))))
    )
    grey, white, mask = grey[box], white[box], mask[box]
    csf = np.clip(mask - grey - white, 0, 1)
    origin = image.affine[:3, 3] + [b.start for b in box]
    x, y, z = np.ogrid[tuple(slice(0, n) for n in grey.shape)]
    x, y, z = (np.float32(a + o) for a, o in zip((x, y, z), origin, strict=True))
    r = abs(x)  # the template is symmetric

    # Lateral ventricles: the largest deep pool of fluid on each side, cut from the third ventricle and the cisterns.
    pool = (
        (csf > 0.45)
        & (_ellipsoid(x, y, z, (0, -18, 12), (42, 52, 28)) < 1)
        & ((z > 9) | (r > 5))
        & ((z > 4) | (r > 12))
    )
    bodies = {}
    for side, name in ((-1, "left"), (1, "right")):
        parts, _ = ndimage.label(pool & (side * x > 0))
        bodies[name] = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    near = {name: ndimage.binary_dilation(body, iterations=2) for name, body in bodies.items()}
    deep = _ellipsoid(r, y, z, (27, 2, 0), (8, 21, 13)) < 1  # lentiform nucleus
    deep |= _ellipsoid(r, y, z, (12, -18, 7), (13, 15, 11)) < 1  # thalamus
    deep |= _ellipsoid(r, y, z, (13, 11, 9), (9, 16, 13)) < 1  # head of the caudate
    # The brain stem tapers and leans back on its way down.
    taper = np.clip((z + 75) / 30, 0.55, 1)
    stem = (z < -6) & ((r / (20 * taper)) ** 2 + ((y + 22 - 0.35 * (z + 10)) / (14 * taper)) ** 2 < 1)
    # Partial volume of white matter and fluid passes for grey around the ventricles, and so do the mixed nuclei of the stem: undo.
    false_grey = (ndimage.binary_dilation(near["left"] | near["right"], iterations=2) & ~deep) | stem
    white = np.where(false_grey, white + grey, white)
    grey = np.where(false_grey, 0, grey)

    region = np.full(grey.shape, REGION_ID["frontal"], np.uint8)

    def paint(name, where):
        region[np.broadcast_to(where, region.shape)] = REGION_ID[name]

    behind_central = y < -2 - 0.42 * (z - 10)  # central sulcus: y -2 at z 10, -27 at z 70
    paint("parietal", behind_central)
    paint("precuneus", behind_central & (r < 16) & (y < -34) & (z > 8))
    paint(
        "temporal", (r > 14) & (y < 24 - 0.4 * (z + 30)) & (z < -0.33 * y) | behind_central & (z < 6)
    )  # below the lateral fissure
    paint("occipital", y < -62 - 0.75 * np.maximum(z - 8, 0))  # parieto-occipital sulcus, preoccipital notch
    tentorium = np.minimum(2 + 0.6 * (y + 55), 2) - (0.6 + 0.011 * (y + 45)) * r
    paint("cerebellum", (z < tentorium) & (y < -32 - 0.25 * np.maximum(20 - r, 0)) & ((z > -60) | (y < -45)))
    paint("brain_stem", stem)
    paint("deep", deep)
    for side, name in ((-1, "left"), (1, "right")):
        paint(f"hippocampus_{name}", _hippocampus_radius(side * x, y, z) < 1)
        paint(f"ventricle_{name}", near[name] & (csf > 0.1))

    # A pull-back grows what the flow runs into: towards the ventricle it widens it, away from the hippocampus it shrinks it.
    c = _control_points()
    soft = _blur((bodies["left"] | bodies["right"]).astype(np.float32), 2.3548 * VENTRICLE_MM, (1, 1, 1))
    pull = torch.stack(torch.gradient(_sample(torch.from_numpy(soft)[None], c, origin, 1.0)[0], spacing=CONTROL_MM))
    push = []
    for side in (-1, 1):
        window = torch.exp(-0.5 * _hippocampus_radius(side * c[..., 0], c[..., 1], c[..., 2]) / 1.7**2)
        push.append(((c - torch.tensor([27.0 * side, -23.0, -13.0])) * window[..., None]).movedim(-1, 0))
    return {
        "tissue": torch.from_numpy(np.stack([csf, grey, white, soft / soft.max()])), "region": torch.from_numpy(region)[None].float(),
        "origin": origin, "pull": pull / pull.norm(dim=0).max(), "push": push,
    }  # fmt: skip


def _smooth_noise(rng, channels, fwhm_mm, rms):
    noise = rng.standard_normal((channels, *CONTROL_SHAPE), dtype=np.float32)
    noise = np.stack([_blur(n, fwhm_mm, (CONTROL_MM,) * 3) for n in noise])
    return torch.from_numpy(noise * (rms / noise.std(axis=(1, 2, 3), keepdims=True)))


def _rotation(angles):
    a, b, c = angles
    rx = [[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]
    ry = [[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]]
    rz = [[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]]
    return np.array(rz) @ ry @ rx


@lru_cache(maxsize=64)
def _head(seed: int):
    """What the seed alone decides: positions (X, Y, Z, 3) in factor space of the control grid, and smooth tissue log-odds (2, X, Y, Z)."""
    rng = _rng(seed, 1)
    size = np.clip(rng.normal(0.95, 0.025), 0.88, 1.02) * np.exp(
        rng.normal(0, 0.015, 3)
    )  # the MNI head is larger than most
    matrix = _rotation(np.deg2rad(np.clip(rng.normal(0, 2.0, 3), -5, 5))) / size  # subject mm -> template mm
    shift = np.clip(rng.normal(0, 1.5, 3), -4, 4)
    velocity = _smooth_noise(rng, 3, 40.0, 2.2) + _smooth_noise(rng, 3, 17.0, 0.8)  # lobes, then gyri
    logits = _smooth_noise(rng, 2, 9.0, 0.5)
    p = _control_points()
    start = (p - torch.as_tensor(CENTRE_MM + shift, dtype=torch.float32)) @ torch.as_tensor(
        matrix.T, dtype=torch.float32
    )
    start = start + torch.as_tensor(CENTRE_MM, dtype=torch.float32)
    moved = start + _sample(exponential(velocity), start, CONTROL_ORIGIN, CONTROL_MM).movedim(0, -1)
    return moved, logits


def _head_box(position, base, affine, shape):
    """Slices of a grid that hold the head, from the control points which map into the template."""
    low = torch.as_tensor(base["origin"], dtype=torch.float32)
    inside = ((position > low) & (position < low + torch.tensor(base["region"].shape[1:]) - 1)).all(-1).numpy()
    box = []
    for axis, n in enumerate(shape):
        hit = np.flatnonzero(inside.any(tuple({0, 1, 2} - {axis}))) * CONTROL_MM + CONTROL_ORIGIN[axis]
        ends = (np.array([hit[0] - CONTROL_MM, hit[-1] + CONTROL_MM]) - affine[axis, 3]) / affine[axis, axis]
        box.append(slice(max(int(ends[0]), 0), min(int(ends[1]) + 2, n)))
    return tuple(box)


def anatomy(seed: int, shape, factors: Factors | None = None, spacing_mm=None) -> Brain:
    """A subject: head from `seed`, disease from `factors`, on a grid of `shape` (see `grid_affine` for spacing_mm).

    Same seed, other factors: the same head at another time. Same arguments, same bytes. Any shape from 16^3 to 160^3, odd sizes too.
    """
    factors, base = factors or Factors(), template()
    affine = grid_affine(shape, spacing_mm)
    spacing = np.diag(affine)[:3]
    k = tuple(int(np.ceil(s / WORK_MM)) for s in spacing)
    fine_affine = affine.copy()
    fine_affine[:3, :3] /= k
    fine_affine[:3, 3] -= spacing / 2 - spacing / k / 2  # same corner

    moved, logits = _head(seed)
    flow = exponential(
        float(np.interp(factors.ventricle_scale, VENTRICLE_RATIO, VENTRICLE_PEAK)) * base["pull"]
        + sum(
            -HIPPOCAMPUS_GAIN * np.log(v) * f
            for v, f in zip((factors.hippocampus_left, factors.hippocampus_right), base["push"], strict=True)
        )
    )
    position = moved + _sample(flow, moved, CONTROL_ORIGIN, CONTROL_MM).movedim(0, -1)

    fine_shape = tuple(n * f for n, f in zip(shape, k, strict=True))
    box = _head_box(position, base, fine_affine, fine_shape)  # nothing but air outside
    points = _points(fine_shape, fine_affine)[box]
    warped = _sample(torch.cat([position.movedim(-1, 0), logits]), points, CONTROL_ORIGIN, CONTROL_MM)
    points, logits = warped[:3].movedim(0, -1), warped[3:]
    tissue = _sample(
        base["tissue"], points, base["origin"], 1.0, padding="zeros"
    )  # csf, grey, white, closeness to the ventricles
    tissue, halo = tissue[:3], tissue[3]
    region = _sample(base["region"], points, base["origin"], 1.0, "nearest", "zeros")[0].to(torch.uint8)

    # The template is an average of 152 heads: sharpen its fractions to those of one head, vary its sulci, and thin the cortex with atrophy.
    brain = tissue.sum(0).clamp(max=1)
    cortex = (region <= REGION_ID["precuneus"]).float()
    odds = (tissue + 1e-4) ** SHARPEN
    odds[0] *= torch.exp(logits[0] * cortex + THINNING * factors.atrophy * cortex)
    odds[2] *= torch.exp(logits[1])
    tissue = odds / odds.sum(0) * brain

    def whole(part):
        full = np.zeros((*part.shape[:-3], *fine_shape), part.numpy().dtype)
        full[(..., *box)] = part.numpy()
        return full

    result = Brain(whole(tissue), whole(region), whole(halo), k, affine, factors, {})
    sums = np.stack([np.bincount(region.numpy().ravel(), t.numpy().ravel(), len(REGIONS)) for t in tissue], 1)
    sums *= np.prod(spacing / k) / 1000  # ml, (region, tissue)
    labels_ml = {name: float(sums[LABEL_OF == code].sum()) for name, code in LABELS.items() if code}
    uptake = uptake_table(factors.amyloid_load)
    target = np.isin(LABEL_OF, [LABELS[n] for n in TARGET])
    reference = np.isin(LABEL_OF, [LABELS[n] for n in REFERENCE])
    result.truth.update(asdict(factors), seed=int(seed), **{f"{n}_ml": v for n, v in labels_ml.items()})
    result.truth.update(
        ventricle_ml=labels_ml["ventricle_left"] + labels_ml["ventricle_right"], brain_ml=float(sums.sum()),
        grey_ml=float(sums[:, 1].sum()), cortex_ml=sum(labels_ml[n] for n in (*TARGET, "occipital")),
        composite_suvr=float((sums * uptake)[target].sum() / sums[target].sum() / ((sums * uptake)[reference].sum() / sums[reference].sum())),
        jacobian_min=float(jacobian(position).min()),
    )  # fmt: skip
    return result


def uptake_table(amyloid_load: float) -> np.ndarray:
    """(region, tissue) SUVR at a load in 0..1 for `Brain.render`."""
    return values_by_label({name: base + amyloid_load * gain for name, (base, gain) in UPTAKE.items()})


# T1 means (csf, grey, white), white matter near 0.9; deep nuclei and the brain stem are brighter than cortex.
T1_MEAN = {
    "csf": 0.16, "ventricle_left": 0.14, "ventricle_right": 0.14, "white_matter": 0.90, "deep_grey": 0.69, "hippocampus_left": 0.59,
    "hippocampus_right": 0.59, "brain_stem": 0.82, "cerebellum_grey": 0.58, "cerebellum_white": 0.87, "frontal": 0.60,
    "parietal": 0.60, "temporal": 0.60, "occipital": 0.61, "precuneus": 0.60,
}  # fmt: skip


def _field(rng, affine, shape, fwhm_mm, rms):  # exp of smooth noise, the same in mm on every grid
    log_field = _smooth_noise(rng, 1, fwhm_mm, rms)
    log_field -= log_field[:, 12:-12, 12:-12, 12:-12].mean()  # shape, not scale
    return np.exp(_sample(log_field, _points(shape, affine), CONTROL_ORIGIN, CONTROL_MM)[0].numpy())


def t1_image(brain: Brain, seed: int, *, noise=0.02, bias=0.08, fwhm_mm=1.2) -> np.ndarray:
    """Skull-free T1 (D, H, W) float32, 0 outside the head, white matter near 0.9 (multiply for scanner units).

    Smooth multiplicative bias field (rms of its logarithm `bias`), Gaussian point spread, Rician noise of standard deviation `noise`.
    Age lowers the contrast and darkens periventricular white matter.
    """
    rng = _rng(seed, 2)
    years = max(brain.factors.age - 40.0, 0.0)
    values = values_by_label(T1_MEAN)
    values[:, 2] -= 0.0008 * years
    image = brain.render(values, fwhm_mm)
    image -= 0.006 * years * block_mean(brain.tissue[2] * brain.periventricular**2, brain.k)
    image = image * _field(rng, brain.affine, image.shape, 90.0, bias)
    real, imaginary = noise * rng.standard_normal((2, *image.shape), dtype=np.float32)
    image = np.hypot(image + real, imaginary)
    return np.where(block_mean(brain.tissue.sum(0), brain.k) > 0.1, image, 0).astype(np.float32)


def _count(
    clean, spacing_mm, rng, noise
):  # noise of a smoothed reconstruction, correlated over about 4 mm, growing with the signal
    grain = _blur(rng.standard_normal(clean.shape, dtype=np.float32), 4.0, spacing_mm)
    return np.maximum(clean + noise * np.sqrt(0.05 + clean.clip(min=0)) * grain / grain.std(), 0).astype(np.float32)


def pet_image(brain: Brain, seed: int, *, noise=0.04, heterogeneity=0.03, fwhm_mm=6.0) -> np.ndarray:
    """Amyloid PET (D, H, W) float32 in SUVR units (cerebellar grey near 1 before the point spread), spill-out beyond the head included.

    Cortical uptake by region and `factors.amyloid_load`, non-specific white matter, Gaussian point spread of `fwhm_mm`, smooth
    biological heterogeneity (rms) and correlated noise (standard deviation at SUVR 1).
    """
    rng = _rng(seed, 3)
    clean = brain.render(uptake_table(brain.factors.amyloid_load), fwhm_mm)
    clean = clean * _field(rng, brain.affine, clean.shape, 30.0, heterogeneity)
    return _count(clean, brain.spacing_mm, rng, noise)


def pet_from_labels(
    labels: np.ndarray, groups: dict, amyloid_load: float, spacing_mm, rng, *, noise=0.04, fwhm_mm=6.0
) -> np.ndarray:
    """Amyloid PET in SUVR units from an integer label map, e.g. of a real T1: `pet_from_labels(dlmuse, MUSE, 0.8, (2, 2, 2), rng)`.

    labels (D, H, W) int; groups: structure name (a key of `UPTAKE`) -> codes; codes in no group count as background; rng a numpy Generator.
    """
    table = np.zeros(int(labels.max()) + 1, np.float32)
    for name, codes in groups.items():
        base, gain = UPTAKE[name]
        table[[c for c in codes if c < len(table)]] = base + amyloid_load * gain
    return _count(_blur(table[labels], fwhm_mm, spacing_mm), spacing_mm, rng, noise)


def codes(groups: dict, names) -> list[int]:
    """Label codes of several structures: `codes(MUSE, TARGET)`; works on LABELS too."""
    return [int(c) for name in names for c in np.atleast_1d(groups[name])]


def composite_suvr(pet: np.ndarray, labels: np.ndarray, target, reference) -> float:
    """Mean PET over the target codes divided by the mean over the reference codes; NaN when one of them is empty."""
    means = [
        pet[where].mean(dtype=np.float64) if (where := np.isin(labels, c)).any() else np.nan
        for c in (target, reference)
    ]
    return float(means[0] / means[1])
