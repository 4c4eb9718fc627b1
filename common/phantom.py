"""Brain phantom with known truth: anatomy from the ICBM152 templates that nilearn bundles, T1 and amyloid PET physics.

A subject is the template pulled back: subject mm --affine--> --random diffeomorphism--> --factors--> template mm.
The first two depend on the seed alone: one seed with other `Factors` is the same head at another time (a session).
Both deformations are exponentials of smooth stationary velocity fields (scaling and squaring: Arsigny et al., MICCAI
2006), so they do not fold. Anatomy is drawn on a control grid in mm, so it is the same on every image grid.

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
from scipy.spatial.transform import Rotation

FOV_MM = (168.0, 192.0, 168.0)  # holds every head; 112x128x112 is 1.5 mm isotropic
CENTRE_MM = np.array([0.0, -17.0, 6.0])  # world position of the centre of every grid
CONTROL_MM, CONTROL_SHAPE = 4.0, (48, 56, 48)  # grid of the deformation, independent of the image grid
CONTROL_ORIGIN = CENTRE_MM - CONTROL_MM * (np.array(CONTROL_SHAPE) - 1) / 2
WORK_MM = 2.4  # tissues are evaluated on a grid at least this fine, then block-averaged: proper partial volumes
SHARPEN = 2.0  # exponent on tissue fractions: makes one head of the average of 152
THINNING = 1.6  # log-odds that sulcal fluid gains over cortex at atrophy 1
HIPPOCAMPUS_GAIN = 0.4  # brings the measured volume to the factor within a few per cent between 0.5 and 1.2
VENTRICLE_MM = 7.0  # reach (sigma) of the field that widens the ventricles
# Peak of that field in mm for a volume ratio, measured on the template.
VENTRICLE_RATIO, VENTRICLE_PEAK = (0.58, 1.0, 1.40, 1.89, 2.76, 3.73, 5.02), (-3.0, 0.0, 2.0, 4.0, 7.0, 10.0, 14.0)

STRUCTURES = {  # label code; T1 mean; SUVR (against cerebellar grey) without amyloid; its increase at load 1
    "background": (0, 0.0, 0.0, 0.0),
    "csf": (1, 0.16, 0.30, 0.0),
    "ventricle_left": (2, 0.14, 0.30, 0.0),
    "ventricle_right": (3, 0.14, 0.30, 0.0),
    "white_matter": (4, 0.90, 1.65, 0.05),  # non-specific uptake
    "deep_grey": (5, 0.69, 1.15, 0.45),
    "hippocampus_left": (6, 0.59, 1.10, 0.20),
    "hippocampus_right": (7, 0.59, 1.10, 0.20),
    "brain_stem": (8, 0.82, 1.55, 0.0),
    "cerebellum_grey": (9, 0.58, 1.00, 0.0),
    "cerebellum_white": (10, 0.87, 1.40, 0.0),
    "frontal": (11, 0.60, 1.08, 0.95),
    "parietal": (12, 0.60, 1.08, 0.85),
    "temporal": (13, 0.60, 1.06, 0.80),
    "occipital": (14, 0.61, 1.10, 0.45),
    "precuneus": (15, 0.60, 1.10, 1.15),  # with posterior cingulate
}
LABELS = {name: row[0] for name, row in STRUCTURES.items()}
CORTEX = ("frontal", "parietal", "temporal", "occipital", "precuneus")
TARGET = ("frontal", "parietal", "temporal", "precuneus")  # cortical composite
REFERENCE = ("cerebellum_grey",)
TISSUES = ("csf", "grey", "white")
# A region is decided by MNI geometry; the row says which label each tissue carries there. Cortex comes first.
REGIONS = {n: ("csf", n, "white_matter") for n in (*CORTEX, "deep_grey", "hippocampus_left", "hippocampus_right")} | {
    "brain_stem": ("csf", "brain_stem", "brain_stem"),
    "cerebellum": ("csf", "cerebellum_grey", "cerebellum_white"),
    "ventricle_left": ("ventricle_left", "deep_grey", "white_matter"),
    "ventricle_right": ("ventricle_right", "deep_grey", "white_matter"),
}
REGION_ID = {name: i for i, name in enumerate(REGIONS)}
LABEL_OF = np.array([[LABELS[name] for name in row] for row in REGIONS.values()])  # (region, tissue) -> label


def _pairs(*right):  # MUSE numbers a right gyrus even, its left twin one more
    return tuple(code + side for code in right for side in (0, 1))


# MUSE / DLMUSE codes of the same structures (checked by volume and centroid on real IXI label maps).
MUSE = {
    "csf": (1, 4, 11, 46), "ventricle_right": (49, 51), "ventricle_left": (50, 52),
    "white_matter": (69, *range(81, 96)), "deep_grey": (23, 30, 31, 32, 36, 37, *range(55, 63), 75, 76),
    "hippocampus_right": (47,), "hippocampus_left": (48,), "brain_stem": (35,),
    "cerebellum_grey": (38, 39, 71, 72, 73), "cerebellum_white": (40, 41),
    "frontal": _pairs(100, 104, 112, 118, 120, 124, 136, 138, 140, 142, 146, 150, 152, 162, 164, 178, 182, 186)
    + _pairs(190, 192, 204),
    "parietal": _pairs(106, 148, 174, 176, 194, 198), "precuneus": _pairs(166, 168),
    "temporal": _pairs(102, 116, 122, 132, 154, 170, 172, 180, 184, 200, 202, 206),
    "occipital": _pairs(108, 114, 128, 134, 144, 156, 160, 196),
}  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """What may be set for a subject; the defaults are the young, healthy template.

    age in years (T1 contrast and periventricular white matter only; shape follows the other factors); atrophy 0..1:
    thinner cortex, wider sulci; ventricle_scale, hippocampus_left, hippocampus_right: volume relative to the same head
    with factor 1 (0.6..5 and 0.5..1.2); amyloid_load 0..1.
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

    tissue (3, ...) float32 fractions of csf, grey, white; their sum is the brain fraction. region (...) uint8, index
    into REGIONS. periventricular (...) float32 closeness to the lateral ventricles in 0..1. k (3,) block size.
    affine (4, 4) of the image grid. truth: factors, seed, volumes in ml (`<label>_ml`, ventricle, brain, grey, cortex),
    composite_suvr (uptake of the target over that of the reference, no blur, no noise), smallest Jacobian.
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
        """Image (D, H, W) float32 of values (regions, tissues) mixed by tissue fraction, see `values_by_label`.

        The Gaussian blur acts on the working grid, before the average over each voxel.
        """
        table, index = torch.as_tensor(np.asarray(values, np.float32)), torch.from_numpy(self.region).int()
        parts = (torch.from_numpy(t) * F.embedding(index, table[:, i, None])[..., 0] for i, t in enumerate(self.tissue))
        return block_mean(_blur(sum(parts).numpy(), fwhm_mm, self.spacing_mm / self.k), self.k)

    def labels(self) -> np.ndarray:
        """Label map (D, H, W) int16, codes `LABELS`: the label with the largest fraction, background included."""
        k, n = self.k, len(LABELS)
        d, h, w = (s // f for s, f in zip(self.region.shape, k, strict=True))
        voxel = np.arange(h * w * n, step=n).reshape(h, w).repeat(k[1], 0).repeat(k[2], 1)  # where its fractions start
        out = np.empty((d, h, w), np.int16)
        for x in range(d):  # one slab at a time: the fractions of all labels do not fit in memory comfortably
            slab = slice(x * k[0], (x + 1) * k[0])
            region, tissue = self.region[slab], self.tissue[:, slab]
            places = ((voxel + LABEL_OF[region, i]).ravel() for i in range(3))
            sums = sum(np.bincount(c, t.ravel(), h * w * n) for c, t in zip(places, tissue, strict=True))
            sums = sums.reshape(h, w, n)
            sums[..., 0] = np.prod(k) - sums.sum(-1)
            out[x] = sums.argmax(-1)
        return out


def values_by_label(values: dict[str, float]) -> np.ndarray:
    """The (region, tissue) table of `Brain.render` from one value per label name (missing names: 0)."""
    return np.array([[values.get(name, 0.0) for name in row] for row in REGIONS.values()], np.float32)


def grid_affine(shape, spacing_mm=None) -> np.ndarray:
    """Affine (4, 4) of a grid centred on the head; spacing_mm: one number, three, or None.

    None: isotropic, as fine as FOV_MM fits along every axis; shapes unlike 7:8:7 are padded with air.
    """
    spacing = np.broadcast_to(max(np.divide(FOV_MM, shape)) if spacing_mm is None else spacing_mm, 3).astype(float)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = CENTRE_MM - spacing * (np.asarray(shape) - 1) / 2
    return affine


def block_mean(fine: np.ndarray, k) -> np.ndarray:
    """Average over blocks of k voxels: (D k0, H k1, W k2) -> (D, H, W)."""
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


def _points(shape, affine):  # world mm of every voxel, (D, H, W, 3) float32; affine is diagonal
    axes = [torch.arange(n) * float(affine[i, i]) + float(affine[i, 3]) for i, n in enumerate(shape)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def _control_points():
    affine = np.diag([CONTROL_MM] * 3 + [1.0])
    affine[:3, 3] = CONTROL_ORIGIN
    return _points(CONTROL_SHAPE, affine)


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
    """Squared radius of a tilted ellipsoid about the right hippocampus (left: pass -x): its tail rises outward."""
    s = y + 23
    return ((x - 27 + 0.12 * s) / 8) ** 2 + (s / 19) ** 2 + ((z + 13 + 0.42 * s) / 6.5) ** 2


@lru_cache(maxsize=1)
def template() -> dict:
    """ICBM152 tissue fractions and closeness to the ventricles (4, ...), regions (1, ...) at 1 mm; factor fields.

    Read from files inside the nilearn package: nothing is downloaded. Takes a second or two, once per process.
    """
    from nilearn import datasets  # slow import, and only the phantom needs it

    image = datasets.load_mni152_gm_template(resolution=1)
    grey = np.asarray(image.dataobj, np.float32)
    white = np.asarray(datasets.load_mni152_wm_template(resolution=1).dataobj, np.float32)
    mask = np.asarray(datasets.load_mni152_template(resolution=1).dataobj) > 0.1  # the T1 is skull-free
    extents = (np.flatnonzero(mask.any(axes)) for axes in ((1, 2), (0, 2), (0, 1)))
    box = tuple(slice(max(i[0] - 4, 0), i[-1] + 5) for i in extents)
    grey, white, mask = grey[box], white[box], mask[box]
    csf = np.clip(mask - grey - white, 0, 1)
    origin = image.affine[:3, 3] + [b.start for b in box]
    x, y, z = np.ogrid[tuple(slice(0, n) for n in grey.shape)]
    x, y, z = (np.float32(a + o) for a, o in zip((x, y, z), origin, strict=True))
    r = abs(x)  # the template is symmetric

    # Lateral ventricles: the largest deep pool of fluid on each side, cut from the third ventricle and the cisterns.
    pool = (csf > 0.45) & ((z > 9) | (r > 5)) & ((z > 4) | (r > 12))
    pool &= _ellipsoid(x, y, z, (0, -18, 12), (42, 52, 28)) < 1
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
    # White matter mixed with fluid passes for grey around the ventricles, and so do the nuclei of the stem: undo.
    false_grey = (ndimage.binary_dilation(near["left"] | near["right"], iterations=2) & ~deep) | stem
    white = np.where(false_grey, white + grey, white)
    grey = np.where(false_grey, 0, grey)

    region = np.full(grey.shape, REGION_ID["frontal"], np.uint8)

    def paint(name, where):
        region[np.broadcast_to(where, region.shape)] = REGION_ID[name]

    behind_central = y < -2 - 0.42 * (z - 10)  # central sulcus: y -2 at z 10, -27 at z 70
    paint("parietal", behind_central)
    paint("precuneus", behind_central & (r < 16) & (y < -34) & (z > 8))
    below_fissure = (r > 14) & (y < 24 - 0.4 * (z + 30)) & (z < -0.33 * y)  # lateral fissure
    paint("temporal", below_fissure | behind_central & (z < 6))
    paint("occipital", y < -62 - 0.75 * np.maximum(z - 8, 0))  # parieto-occipital sulcus, preoccipital notch
    tentorium = np.minimum(2 + 0.6 * (y + 55), 2) - (0.6 + 0.011 * (y + 45)) * r
    paint("cerebellum", (z < tentorium) & (y < -32 - 0.25 * np.maximum(20 - r, 0)) & ((z > -60) | (y < -45)))
    paint("brain_stem", stem)
    paint("deep_grey", deep)
    for side, name in ((-1, "left"), (1, "right")):
        paint(f"hippocampus_{name}", _hippocampus_radius(side * x, y, z) < 1)
        paint(f"ventricle_{name}", near[name] & (csf > 0.1))

    # A pull-back grows what its flow runs into: the ventricles attract, the hippocampi repel.
    c = _control_points()
    soft = _blur((bodies["left"] | bodies["right"]).astype(np.float32), 2.3548 * VENTRICLE_MM, (1, 1, 1))
    pull = torch.stack(torch.gradient(_sample(torch.from_numpy(soft)[None], c, origin, 1.0)[0], spacing=CONTROL_MM))
    push = []
    for side in (-1, 1):
        window = torch.exp(-0.5 * _hippocampus_radius(side * c[..., 0], c[..., 1], c[..., 2]) / 1.7**2)
        push.append(((c - torch.tensor([27.0 * side, -23.0, -13.0])) * window[..., None]).movedim(-1, 0))
    return {
        "tissue": torch.from_numpy(np.stack([csf, grey, white, soft / soft.max()])),
        "region": torch.from_numpy(region)[None].float(),
        "origin": origin,
        "pull": pull / pull.norm(dim=0).max(),
        "push": push,
    }


def _smooth_noise(rng, channels, fwhm_mm, rms):
    noise = rng.standard_normal((channels, *CONTROL_SHAPE), dtype=np.float32)
    noise = np.stack([_blur(n, fwhm_mm, (CONTROL_MM,) * 3) for n in noise])
    return torch.from_numpy(noise * (rms / noise.std(axis=(1, 2, 3), keepdims=True)))


@lru_cache(maxsize=64)
def _head(seed: int):
    """What the seed alone decides: positions (X, Y, Z, 3) before the factors, smooth tissue log-odds (2, X, Y, Z)."""
    rng = _rng(seed, 1)
    size = np.clip(rng.normal(0.93, 0.025), 0.87, 0.98)  # the MNI head is larger than most
    turn = Rotation.from_euler("xyz", np.clip(rng.normal(0, 2.0, 3), -5, 5), degrees=True).as_matrix()
    matrix = turn / (size * np.exp(rng.normal(0, 0.015, 3)))  # subject mm -> template mm
    shift = np.clip(rng.normal(0, 1.5, 3), -4, 4)
    velocity = _smooth_noise(rng, 3, 40.0, 2.2) + _smooth_noise(rng, 3, 17.0, 0.8)  # lobes, then gyri
    velocity -= velocity[:, 12:-12, 10:-10, 12:-12].mean((1, 2, 3), keepdim=True)  # keeps the head in the middle
    logits = _smooth_noise(rng, 2, 9.0, 0.5)
    matrix, shift, centre = (torch.as_tensor(a, dtype=torch.float32) for a in (matrix, shift, CENTRE_MM))
    start = (_control_points() - centre - shift) @ matrix.T + centre
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

    Same seed, other factors: the same head at another time. Same arguments, same bytes. Any axes of 16 to 160.
    """
    factors, base = factors or Factors(), template()
    affine = grid_affine(shape, spacing_mm)
    spacing = np.diag(affine)[:3]
    k = tuple(int(np.ceil(s / WORK_MM)) for s in spacing)
    fine_affine = affine.copy()
    fine_affine[:3, :3] /= k
    fine_affine[:3, 3] -= spacing / 2 - spacing / k / 2  # same corner

    moved, logits = _head(seed)
    velocity = float(np.interp(factors.ventricle_scale, VENTRICLE_RATIO, VENTRICLE_PEAK)) * base["pull"]
    for volume, field in zip((factors.hippocampus_left, factors.hippocampus_right), base["push"], strict=True):
        velocity = velocity - HIPPOCAMPUS_GAIN * float(np.log(volume)) * field
    flow = exponential(velocity)
    position = moved + _sample(flow, moved, CONTROL_ORIGIN, CONTROL_MM).movedim(0, -1)

    fine_shape = tuple(n * f for n, f in zip(shape, k, strict=True))
    box = _head_box(position, base, fine_affine, fine_shape)  # nothing but air outside
    points = _points(fine_shape, fine_affine)[box]
    warped = _sample(torch.cat([position.movedim(-1, 0), logits]), points, CONTROL_ORIGIN, CONTROL_MM)
    points, logits = warped[:3].movedim(0, -1), warped[3:]
    tissue = _sample(base["tissue"], points, base["origin"], 1.0, padding="zeros")
    tissue, halo = tissue[:3], tissue[3]
    region = _sample(base["region"], points, base["origin"], 1.0, "nearest", "zeros")[0].to(torch.uint8)

    # Fractions of an average head become those of one: sharpened, with sulci of its own, and cortex lost to atrophy.
    brain = tissue.sum(0).clamp(max=1)
    cortex = (region < len(CORTEX)).float()
    odds = (tissue + 1e-4) ** SHARPEN
    odds[0] *= torch.exp(cortex * (logits[0] + THINNING * factors.atrophy))
    odds[2] *= torch.exp(logits[1])
    tissue = odds / odds.sum(0) * brain

    def whole(part):
        full = np.zeros((*part.shape[:-3], *fine_shape), part.numpy().dtype)
        full[(..., *box)] = part.numpy()
        return full

    sums = np.stack([np.bincount(region.numpy().ravel(), t.numpy().ravel(), len(REGIONS)) for t in tissue], 1)
    sums *= np.prod(spacing / k) / 1000  # ml, (region, tissue)
    truth = asdict(factors) | {"seed": int(seed)}
    truth |= {f"{name}_ml": float(sums[LABEL_OF == code].sum()) for name, code in LABELS.items() if code}
    truth["ventricle_ml"] = truth["ventricle_left_ml"] + truth["ventricle_right_ml"]
    truth["cortex_ml"] = sum(truth[f"{name}_ml"] for name in CORTEX)
    truth |= {"brain_ml": float(sums.sum()), "grey_ml": float(sums[:, 1].sum())}
    uptake = uptake_table(factors.amyloid_load)
    target, reference = (np.isin(LABEL_OF, codes(LABELS, names)) for names in (TARGET, REFERENCE))
    target, reference = (np.average(uptake[part], weights=sums[part]) for part in (target, reference))
    truth |= {"composite_suvr": float(target / reference), "jacobian_min": float(jacobian(position).min())}
    return Brain(whole(tissue), whole(region), whole(halo), k, affine, factors, truth)


def uptake_table(amyloid_load: float) -> np.ndarray:
    """(region, tissue) SUVR at a load in 0..1 for `Brain.render`."""
    return values_by_label({name: base + amyloid_load * gain for name, (_, _, base, gain) in STRUCTURES.items()})


def _field(rng, affine, shape, fwhm_mm, rms):  # exp of smooth noise, the same in mm on every grid
    log_field = _smooth_noise(rng, 1, fwhm_mm, rms)
    log_field -= log_field[:, 12:-12, 12:-12, 12:-12].mean()  # shape, not scale
    return np.exp(_sample(log_field, _points(shape, affine), CONTROL_ORIGIN, CONTROL_MM)[0].numpy())


def t1_image(brain: Brain, seed: int, *, noise=0.02, bias=0.08, fwhm_mm=1.2) -> np.ndarray:
    """Skull-free T1 (D, H, W) float32, 0 outside the head, white matter near 0.9 (multiply for scanner units).

    Gaussian point spread, smooth multiplicative bias field (`bias`: rms of its logarithm), Rician noise (`noise`:
    standard deviation). Age lowers the contrast and darkens periventricular white matter.
    """
    rng = _rng(seed, 2)
    years = max(brain.factors.age - 40.0, 0.0)
    values = values_by_label({name: row[1] for name, row in STRUCTURES.items()})
    values[:, 2] -= 0.0008 * years
    image = brain.render(values, fwhm_mm)
    image -= 0.006 * years * block_mean(brain.tissue[2] * brain.periventricular**2, brain.k)
    image = image * _field(rng, brain.affine, image.shape, 90.0, bias)
    real, imaginary = noise * rng.standard_normal((2, *image.shape), dtype=np.float32)
    image = np.hypot(image + real, imaginary)
    return np.where(block_mean(brain.tissue.sum(0), brain.k) > 0.1, image, 0).astype(np.float32)


def _count(clean, spacing_mm, rng, noise):  # reconstruction noise: correlated over 4 mm, as the root of the signal
    grain = _blur(rng.standard_normal(clean.shape, dtype=np.float32), 4.0, spacing_mm)
    return np.maximum(clean + noise * np.sqrt(0.05 + clean.clip(min=0)) * grain / grain.std(), 0).astype(np.float32)


def pet_image(brain: Brain, seed: int, *, noise=0.04, heterogeneity=0.03, fwhm_mm=6.0) -> np.ndarray:
    """Amyloid PET (D, H, W) float32 in SUVR units, cerebellar grey near 1, spill-out beyond the head included.

    Cortical uptake by region and `factors.amyloid_load`, non-specific white matter, Gaussian point spread, smooth
    biological heterogeneity (rms) and correlated noise (standard deviation at SUVR 1).
    """
    rng = _rng(seed, 3)
    clean = brain.render(uptake_table(brain.factors.amyloid_load), fwhm_mm)
    clean = clean * _field(rng, brain.affine, clean.shape, 30.0, heterogeneity)
    return _count(clean, brain.spacing_mm, rng, noise)


def pet_from_labels(
    labels: np.ndarray, groups: dict, amyloid_load: float, spacing_mm, rng, *, noise=0.04, fwhm_mm=6.0
) -> np.ndarray:
    """Amyloid PET in SUVR units from integer labels (D, H, W), e.g. of a real T1: groups=MUSE for a DLMUSE map.

    groups: structure name (a key of STRUCTURES) -> codes; codes in no group count as background; rng: numpy Generator.
    """
    table = np.zeros(int(labels.max()) + 1, np.float32)
    for name, numbers in groups.items():
        _, _, base, gain = STRUCTURES[name]
        table[[c for c in numbers if c < len(table)]] = base + amyloid_load * gain
    return _count(_blur(table[labels], fwhm_mm, spacing_mm), spacing_mm, rng, noise)


def codes(groups: dict, names) -> list[int]:
    """Label codes of several structures: `codes(MUSE, TARGET)`; works on LABELS too."""
    return [int(c) for name in names for c in np.atleast_1d(groups[name])]


def composite_suvr(pet: np.ndarray, labels: np.ndarray, target, reference) -> float:
    """Mean PET over the target codes divided by the mean over the reference codes; NaN when one of them is empty."""
    parts = [pet[np.isin(labels, numbers)] for numbers in (target, reference)]
    return float(np.divide(*[p.mean(dtype=np.float64) if p.size else np.nan for p in parts]))
