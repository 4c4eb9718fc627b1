"""Synthetic cardiac cines with known truth: short-axis stack, three long-axis views, dense volumes, labels, volumes.

    python mgdcr/make_phantom.py                                          # 24 subjects of 20 frames: minutes
    python mgdcr/make_phantom.py --n_subjects 2 --frames 2                # end-diastole and end-systole only
    python mgdcr/make_phantom.py --lax_gain 1.25 --lax_offset 0.05 --noise_lax 0.05 --shift_lax 2 0 0
    python mgdcr/make_phantom.py --orientation oblique --lax_frames 25    # scanner-like affines, other frame count

The anatomy is analytic, in mm: a left ventricle (half ellipsoid below a moving valve plane) with papillary muscles, a
right ventricle, an atrium, lung, fat and an oblique interface, with logistic edges in the plane and along z. One slice
has 64 x 64 pixels of 2 mm; the dense truth 81 slices 1 mm apart; the short-axis (SAX) file every 8th of them, 11
slices. Long-axis (LAX) planes hold the z axis, at 0, 60 and 120 degrees. Phase 0 is end-diastole, 0.5 end-systole.

OUT/<subject>/sax.nii.gz, lax_{4ch,2ch,3ch}.nii.gz (single-slice cines), dense.nii.gz, labels.nii.gz (1 cavity,
2 myocardium, 3 right ventricle; on the grid of dense.nii.gz); OUT/truth.csv: volumes in ml of every subject and frame;
OUT/phantom.json: options, factors and shifts of every subject. Each subject has its own seed: another --n_subjects
leaves the others as they were, and noise or shifts change nothing but the scans that they are for.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

import numpy as np

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parent
SIZE, PIXEL_MM, DEPTH_MM, FACTOR = 64, 2.0, 80.0, 8  # pixels, in-plane size, extent along z, dense slices per gap
N_DENSE = 81
EDGE_MM, GONE_MM = 0.8, -6.0  # softness of the edges; a radius beyond the apex, where the edge has faded out
ROI_MM = 50.0  # radius of the region around the grid's middle in which results are judged
CAVITY, MYOCARDIUM, RIGHT = 1, 2, 3
LABELS = {"lv": CAVITY, "myo": MYOCARDIUM, "rv": RIGHT}
VIEWS = {"4ch": 0.0, "2ch": 60.0, "3ch": 120.0}  # degrees of the plane; the right ventricle lies in that of 0
LAX_SIZE_MM = (128.0, 96.0)  # across, along z: beyond the short-axis field of view on all sides
ORIENTATIONS = ("plain", "flipped", "oblique")


@dataclass
class Options(CommonOptions):
    out: str = option(str(HERE / "data"), "folder that gets one folder per subject and truth.csv")
    n_subjects: int = option(24, "subjects")
    frames: int = option(20, "frames of the short-axis cine, phases 0, 1/n, ...")
    lax_frames: int = option(0, "frames of the long-axis cines; 0: as the short-axis cine")
    cycle_s: float = option(0.9, "length of the heart beat", unit="s")
    lax_pixel: float = option(1.0, "pixel size of the long-axis views", unit="mm")
    lax_names: tuple[str, ...] = option(tuple(VIEWS), f"views to write, of {', '.join(VIEWS)}", choices=tuple(VIEWS))
    shift_sax: float = option(0.0, "in-plane displacement of each slice (breath-hold)", unit="mm SD")
    start_sax: int = option(
        0, "the short-axis stack begins at random up to so many dense slices below the grid's first, at most 7: "
        "planning differs", unit="slices",
    )  # fmt: skip
    shift_lax: tuple[float, float, float] = option(
        (0.0, 0.0, 0.0), "displacement of the views: across, along z, off the plane", unit="mm"
    )
    lax_gain: float = option(1.0, "gain of the long-axis intensities")
    lax_offset: float = option(0.0, "offset of the long-axis intensities")
    noise_sax: float = option(0.0, "noise of the short-axis cine", unit="SD")
    noise_lax: float = option(0.0, "noise of the long-axis cines", unit="SD")
    scale: float = option(1.0, "stored intensity = this times the intensity of the definition (0 to 0.9)")
    orientation: str = option(
        "plain", "plain: axes of the world; flipped: two axes stored backwards; oblique: tilted too",
        choices=ORIENTATIONS,
    )  # fmt: skip
    dense: bool = option(True, "also write the dense truth and its labels")
    overwrite: bool = option(False, "replace a cohort that is already there")


# ---- anatomy --------------------------------------------------------------------------------------------------------


def contraction(phase: float) -> float:
    """0 at end-diastole (phase 0), 1 at end-systole (phase 0.5)."""
    return float((1 - np.cos(2 * np.pi * phase)) / 2)


def draw_factors(seed: int, number: int) -> np.ndarray:
    """The six factors of a subject, each uniform in 0.92 to 1.08."""
    return np.random.default_rng(np.random.SeedSequence([seed, number])).uniform(0.92, 1.08, 6)


def _soft(distance, width: float = EDGE_MM) -> np.ndarray:
    """1 inside (negative distance), 0 outside, 1/2 on the edge."""
    return 1 / (1 + np.exp(np.clip(distance / width, -60, 60)))


def _dome(radius, height) -> np.ndarray:
    """radius * sqrt(1 - height^2); GONE_MM from the apex (height 1) on."""
    root = np.sqrt(np.clip(1 - height**2, 0, None))
    return np.where(root > 0, radius * root, GONE_MM)


class Heart:
    """Distances to the structures of one subject at one phase, for points x, y (mm, centred) and z (mm, 0 to 80).

    Every distance is negative inside; `below` is the soft share beyond the valve plane, where the ventricle is, and
    `rods` that of the papillary muscles along z. Broadcasts.
    """

    def __init__(self, factors: np.ndarray, phase: float, x, y, z):
        g, s = factors, contraction(phase)
        X, Y = x - 6 * g[3] * np.sin(np.pi * z / DEPTH_MM), y - 0.1 * (z - 40)
        base, length = 8 + 10 * s, (62 - 10 * s) * g[1]
        radius, wall = (24 - 9 * s) * g[0], (9 + 4 * s) * g[2]
        r, down = np.hypot(X, Y), z - base
        self.below = _soft(-down)

        right = _dome(30 * g[4], np.clip((down + 4) / (0.82 * length), 0, 1.2))
        away = np.hypot(X + 24, (Y + 4) / 1.15)
        self.right = away - right
        self.right_wall = away - np.where(right > 0, right + 3, GONE_MM)

        opening = np.sqrt(np.clip(-down / 6, 0, 1))
        self.atrium = np.hypot(X / 1.25, (Y - 6) / 0.9) - np.where(opening > 0, 20 * opening, GONE_MM)
        self.myocardium = r - _dome(radius + wall, down / (length + wall))
        cavity = _dome(radius, down / length)
        self.cavity = r - cavity
        away = [np.hypot(X - 0.62 * cavity * np.cos(a), Y - 0.62 * cavity * np.sin(a)) for a in (0.9, 3.9)]
        self.papillary = np.minimum(*away) - (4.5 - s)
        self.rods = _soft(np.abs(down - length / 2) - 0.22 * length)


def image(factors: np.ndarray, phase: float, x, y, z) -> np.ndarray:
    """Intensity (about 0 to 0.9, float64) at the points; painted from the background to the papillary muscles."""
    heart = Heart(factors, phase, x, y, z)
    out = 0.25 + 0.05 * np.sin(x / 17 + z / 23) * np.cos(y / 19 - z / 31)
    cavity = _soft(heart.cavity) * heart.below
    ring = np.hypot(x / 60, y / 56)
    lung = np.hypot((x - 52) / 22, (y + 20 - 0.2 * z) / 34)
    layers = (
        (_soft(34 - 0.25 * (z - 10) + 6 * np.sin(x / 25) - y, 1.2), 0.45),
        (_soft(lung - 1, 0.04), 0.05),
        (_soft(np.abs(ring - 1) - 0.06, 0.02), 0.90),
        (_soft(heart.right_wall), 0.35),
        (_soft(heart.right), 0.82),
        (_soft(heart.atrium) * (1 - heart.below), 0.80),
        (_soft(heart.myocardium) * heart.below, 0.35),
        (cavity, 0.88),
        (_soft(heart.papillary) * cavity * heart.rods, 0.38),
    )
    for share, value in layers:
        out = out + share * (value - out)
    return out


def labels(factors: np.ndarray, phase: float, x, y, z) -> np.ndarray:
    """Label (uint8) at the points; papillary muscles belong to the cavity."""
    heart = Heart(factors, phase, x, y, z)
    below = heart.below > 0.5
    right = (heart.right < 0) & ~((heart.atrium < 0) & ~below)
    out = np.where(right, RIGHT, 0)
    out = np.where(below & (heart.myocardium < 0), MYOCARDIUM, out)
    return np.where(below & (heart.cavity < 0), CAVITY, out).astype(np.uint8)


def in_plane() -> tuple[np.ndarray, np.ndarray]:
    """Centred x (1, W) and y (H, 1) of the pixels in mm."""
    places = (np.arange(SIZE) - (SIZE - 1) / 2) * PIXEL_MM
    return places[None, :], places[:, None]


def dense_points() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y, z in mm of the dense truth, broadcasting to (81, 64, 64)."""
    x, y = in_plane()
    return x, y, np.linspace(0, DEPTH_MM, N_DENSE)[:, None, None]


def roi() -> np.ndarray:
    """Mask (64, 64) of the pixels less than 50 mm from the middle."""
    x, y = in_plane()
    return np.hypot(x, y) < ROI_MM


def phases(frames: int) -> np.ndarray:
    return np.arange(frames) / frames


# ---- scans ----------------------------------------------------------------------------------------------------------


def world(orientation: str) -> np.ndarray:
    """Rigid transform (4, 4) from phantom mm (x, y, z) to world mm; the middle of the grid goes to the same point."""
    out = np.eye(4)
    if orientation == "oblique":
        a, b = np.deg2rad([40.0, -55.0])
        about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
        about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
        out[:3, :3] = about_y @ about_z
    out[:3, 3] = [12.0, -25.0, 30.0] - out[:3, :3] @ [0, 0, DEPTH_MM / 2]
    return out


def stored(data: np.ndarray, affine: np.ndarray, orientation: str) -> tuple[np.ndarray, np.ndarray]:
    """Data (..., H, W) and affine with rows and columns backwards unless the orientation is plain."""
    if orientation == "plain":
        return data, affine
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    flip[:2, 3] = data.shape[-1] - 1, data.shape[-2] - 1
    return np.ascontiguousarray(data[..., ::-1, ::-1]), affine @ flip


def stack_affine(step_mm: float, start_mm: float = 0.0) -> np.ndarray:
    """Affine (w, h, z) -> phantom mm of a stack of 64 x 64 slices from z = start_mm."""
    out = np.diag([PIXEL_MM, PIXEL_MM, step_mm, 1.0])
    out[:3, 3] = *2 * (-(SIZE - 1) / 2 * PIXEL_MM,), start_mm
    return out


def lax_affine(name: str, pixel_mm: float) -> np.ndarray:
    """Affine (column, row, 0) -> phantom mm of a view: columns run across, rows along z."""
    angle, shape = np.deg2rad(VIEWS[name]), lax_shape(pixel_mm)
    across, normal = [np.cos(angle), np.sin(angle), 0], [np.sin(angle), -np.cos(angle), 0]
    out = np.eye(4)
    out[:3, :3] = np.stack([np.array(across) * pixel_mm, [0, 0, pixel_mm], np.array(normal) * 8.0], axis=1)
    out[:3, 3] = [0, 0, DEPTH_MM / 2] - out[:3, :3] @ [(shape[1] - 1) / 2, (shape[0] - 1) / 2, 0]
    return out


def lax_shape(pixel_mm: float) -> tuple[int, int]:
    """Rows and columns of a view."""
    return round(LAX_SIZE_MM[1] / pixel_mm), round(LAX_SIZE_MM[0] / pixel_mm)


def lax_points(name: str, pixel_mm: float, shift_mm=(0.0, 0.0, 0.0)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Phantom x, y, z (rows, columns) in mm that the pixels of a view really show, `shift_mm` off their header."""
    rows, columns = np.indices(lax_shape(pixel_mm))
    affine = lax_affine(name, pixel_mm)
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    points = affine[:3, 0, None, None] * columns + affine[:3, 1, None, None] * rows
    return tuple(points + (affine[:3, 3] - axes @ np.array(shift_mm))[:, None, None])


def scan_sax(factors, options: Options, rng, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Short-axis cine (T, Z, 64, 64) and the displacement (Z, 2) of its slices in mm along x and y.

    Its slices are every 8th of the dense ones from `start` on: 11 from 0, else 10.
    """
    x, y, z = dense_points()
    z = z[start::FACTOR]
    shifts = options.shift_sax * rng.standard_normal((len(z), 2))
    x, y = x - shifts[:, 0, None, None], y - shifts[:, 1, None, None]
    cine = np.stack([image(factors, phase, x, y, z) for phase in phases(options.frames)])
    return options.scale * (cine + options.noise_sax * rng.standard_normal(cine.shape)), shifts


def scan_lax(factors, name: str, options: Options, rng) -> np.ndarray:
    """Cine (T, rows, columns) of one view, with its gain, offset, noise and displacement."""
    points = lax_points(name, options.lax_pixel, options.shift_lax)
    frames = options.lax_frames or options.frames
    cine = np.stack([image(factors, phase, *points) for phase in phases(frames)])
    cine = options.lax_gain * cine + options.lax_offset
    return options.scale * (cine + options.noise_lax * rng.standard_normal(cine.shape))


# ---- a subject on disk ----------------------------------------------------------------------------------------------


def subject_name(number: int) -> str:
    return f"subject_{number:03d}"


def make_subject(options: Options, number: int) -> tuple[list[dict], dict]:
    """Write the files of subject `number` (from 1); rows of truth.csv and what phantom.json says about the subject."""
    from mgdcr import geometry

    factors = draw_factors(options.seed, number)
    rngs = [np.random.default_rng(np.random.SeedSequence([options.seed, number, k])) for k in range(1, 2 + len(VIEWS))]
    name, to_world = subject_name(number), world(options.orientation)
    folder = Path(options.out) / name

    def write(file, data, affine, frame_s, dtype=np.float32):
        data, affine = stored(data, to_world @ affine, options.orientation)
        geometry.save(folder / f"{file}.nii.gz", data, geometry.Grid(affine, data.shape[1:]), frame_s, dtype=dtype)

    frame_s = options.cycle_s / options.frames
    begin = np.random.default_rng(np.random.SeedSequence([options.seed, number, 2 + len(VIEWS)]))
    start = int(begin.integers(options.start_sax + 1))
    sax, shifts = scan_sax(factors, options, rngs[0], start)
    step = DEPTH_MM / (N_DENSE - 1)
    write("sax", sax, stack_affine(FACTOR * step, start * step), frame_s)
    for view, rng in zip(VIEWS, rngs[1:], strict=True):
        if view in options.lax_names:
            cine = scan_lax(factors, view, options, rng)[:, None]
            write(f"lax_{view}", cine, lax_affine(view, options.lax_pixel), options.cycle_s / len(cine))
    points = dense_points()
    maps = np.stack([labels(factors, phase, *points) for phase in phases(options.frames)])
    if options.dense:
        dense = np.stack([image(factors, phase, *points) for phase in phases(options.frames)])
        write("dense", options.scale * dense, stack_affine(1.0), frame_s)
        write("labels", maps, stack_affine(1.0), frame_s, np.uint8)
    rows = truth_rows(name, maps)
    about = {"subject": name, "factors": factors.tolist(), "sax_start": start, "sax_shifts_mm": shifts.tolist()}
    return rows, about | function(rows)


def truth_rows(name: str, maps: np.ndarray) -> list[dict]:
    """Volumes in ml of label maps (T, 81, 64, 64)."""
    voxel_ml = PIXEL_MM**2 * DEPTH_MM / (N_DENSE - 1) / 1000
    rows = []
    for frame, phase in enumerate(phases(len(maps))):
        counts = np.bincount(maps[frame].ravel(), minlength=4)
        row = {"subject": name, "frame": frame, "phase": float(phase)}
        rows.append(row | {f"{part}_ml": float(counts[code] * voxel_ml) for part, code in LABELS.items()})
    return rows


def function(rows: list[dict]) -> dict:
    """End-diastolic and end-systolic frame and volume, and ejection fraction, of a subject's rows."""
    volumes = [row["lv_ml"] for row in rows]
    ed, es = int(np.argmax(volumes)), int(np.argmin(volumes))
    edv, esv = volumes[ed], volumes[es]
    return {"ed_frame": ed, "es_frame": es, "edv_ml": edv, "esv_ml": esv, "ef": (edv - esv) / edv}


def check(options: Options) -> None:
    """UserError for options that no cohort can have, and where a cohort would be overwritten."""
    if not 0 < options.n_subjects < 1000 or options.seed < 0:
        raise UserError(f"--n_subjects {options.n_subjects}, --seed {options.seed}: 1 to 999 subjects, seeds from 0")
    if not 1 <= options.frames <= 200 or not 0 <= options.lax_frames <= 200:
        raise UserError(
            f"--frames {options.frames} (1 to 200), --lax_frames {options.lax_frames} (0 to 200): change it"
        )
    if not 0 < options.cycle_s <= 10 or not 0.5 <= options.lax_pixel <= 8 or not 0 < options.scale <= 1e6:
        raise UserError(f"--cycle_s {options.cycle_s} (to 10), --lax_pixel {options.lax_pixel} (0.5 to 8), --scale "
                        f"{options.scale} (above 0, to 1e6): change it")  # fmt: skip
    if not all(0 <= v < np.inf for v in (options.shift_sax, options.noise_sax, options.noise_lax)):
        raise UserError("--shift_sax, --noise_sax, --noise_lax: standard deviations are finite and not negative")
    if not 0 <= options.start_sax < FACTOR:
        raise UserError(f"--start_sax {options.start_sax}: 0 to {FACTOR - 1} dense slices")
    if not 0 < options.lax_gain < np.inf or not np.isfinite([options.lax_offset, *options.shift_lax]).all():
        raise UserError("--lax_gain is above 0, --lax_offset and --shift_lax are finite: change them")
    out = Path(options.out)
    taken = out.is_file() or (out / "truth.csv").exists() or any(out.glob("subject_*"))
    if taken and not options.overwrite:
        raise UserError(f"{out} already holds data; give another --out, or --overwrite to replace it")


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    check(options)
    from common import tables
    from common.runlog import progress, write_json

    rows, subjects = [], []
    with progress(options.n_subjects, 0, "phantom") as bar:
        for number in range(1, options.n_subjects + 1):
            more, subject = make_subject(options, number)
            rows, subjects = rows + more, [*subjects, subject]
            bar.update()
    out = Path(options.out)
    tables.write_csv(out / "truth.csv", rows, digits=6)
    record = {"source": "phantom", "labels": LABELS, "views_deg": VIEWS}
    told = set(cli.to_dict(options)) - {"out", "device", "precision", "num_workers", "overwrite"}
    record["options"] = {k: v for k, v in cli.to_dict(options).items() if k in told}
    write_json(out / "phantom.json", record | {"subjects": subjects})
    edv, ef = [s["edv_ml"] for s in subjects], [s["ef"] for s in subjects]
    print(f"{len(subjects)} subjects of {options.frames} frames in {out}: EDV {min(edv):.0f} to {max(edv):.0f} ml, "
          f"EF {min(ef):.2f} to {max(ef):.2f}")  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
