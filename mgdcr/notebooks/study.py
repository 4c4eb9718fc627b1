"""The study that the notebook shows: your own, or a phantom made, trained and reconstructed by the scripts in minutes.

MGDCR_ROOT names the folder of your own, with data/, datasets/, checkpoints/cardiac_autoenc/ and results/ (README.md).
Without it a study is made in a temporary folder. Nothing is written into your own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from IPython.display import Image, display
from matplotlib.figure import Figure
from PIL import Image as Picture

from common import figures, runtime
from common.cli import UserError
from mgdcr import align, baselines, geometry, indices, inverse, study
from mgdcr.trainer import load_network

PAPER = Path(__file__).resolve().parents[1]
PRIOR = Path("checkpoints") / "cardiac_autoenc" / "best.ckpt"
# Enough to see every part work, far from a good prior.
COMMANDS = """
make_phantom.py --out ROOT/data --n_subjects {subjects} --frames {frames}
lmdb_writer.py --root ROOT --input ROOT/data
run_ffhq128.py --root ROOT --preset tiny --total_samples {samples} {network}
LAX_condition/ex8_multi_optimizer.py --root ROOT --preset fast --subject_id TEST --iterations {iterations} \
--steps {steps} --temporal_weight 0
"""
SIZES = {"subjects": 12, "frames": 8, "samples": 8000, "network": "", "iterations": 10, "steps": 10}
METHODS = ("nearest", "linear", "cubic", "lax_residual")
TITLES = {"lax_residual": "cubic + LAX residual", "ours": "reconstruction"}


def run(script: str, *args) -> str:
    """A script of this paper, as on the command line: what it printed; RuntimeError with its message if it fails."""
    command = [sys.executable, str(PAPER / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        message = next((line for line in done.stderr.splitlines() if line.startswith("error:")), done.stderr[-2000:])
        raise RuntimeError(f"{script}: {message}")
    return done.stdout.strip()


def make(root: Path, **sizes) -> Path:
    """A phantom study in `root` after all COMMANDS; sizes: others than SIZES (network: further options)."""
    for line in COMMANDS.format(**(SIZES | sizes)).strip().splitlines():
        script, *words = line.split()
        words = [word.replace("ROOT", str(root)) for word in words]
        if "TEST" in words:  # the split is made by the training
            words[words.index("TEST")] = held_out(root)
        run(script, *words)
        print(f"done: {line}")
    return root


def held_out(root: Path) -> str:
    """The first subject that the training has not seen."""
    return json.loads((root / "datasets" / "split.json").read_text())["test"][0]


@dataclass(frozen=True)
class Study:
    """A study and what the notebook reads from it; `work` is a temporary folder for its own files."""

    root: Path
    work: Path
    rt: runtime.Runtime

    # ---- data

    @cached_property
    def results(self) -> Path:
        """Reconstructions of the test subject."""
        found = [path.parents[1] for path in sorted((self.root / "results").glob("*/*/frame_*/report.json"))]
        mine = [path for path in found if path.name == held_out(self.root)]
        return (mine or found)[0]

    @property
    def subject(self) -> str:
        return self.results.name

    @cached_property
    def heart(self) -> study.Study:
        """The subject as the reconstruction saw it, registered."""
        return self.load()

    def load(self, align: bool = True) -> study.Study:
        folder = self.root / "data" / self.subject
        views = {path.name.removeprefix("lax_").removesuffix(".nii.gz"): path
                 for path in sorted(folder.glob("lax_*.nii.gz"))}  # fmt: skip
        return study.load(study.Source(self.subject, folder / "sax.nii.gz", views), factor=8, align=align)

    @cached_property
    def frames(self) -> list[int]:
        """Reconstructed frames."""
        return sorted(int(path.name.removeprefix("frame_")) for path in self.results.glob("frame_*"))

    @cached_property
    def truth(self) -> geometry.Cine | None:
        """Dense truth of a phantom."""
        path = self.root / "data" / self.subject / "dense.nii.gz"
        return geometry.load_cine(path) if path.is_file() else None

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Dense labels (T, N, H, W) of a phantom."""
        path = self.root / "data" / self.subject / "labels.nii.gz"
        return geometry.load_cine(path).data.round().astype(np.uint8) if path.is_file() else None

    @cached_property
    def prior(self) -> inverse.Prior:
        trained = load_network(self.root / PRIOR, self.rt)
        return inverse.Prior(trained.model, inverse.Settings(steps=20), self.rt)

    def scaled(self, volume: np.ndarray) -> np.ndarray:
        """Acquired intensities as [0, 1] of the prior."""
        return (self.heart.scale.normalise(volume, clip=False) + 1) / 2

    # ---- volumes

    def ours(self, frame: int) -> np.ndarray:
        """The reconstruction (N, H, W) in [0, 1]."""
        return self.scaled(geometry.load_cine(self.results / f"frame_{frame:03d}" / "volume.nii.gz").data[0])

    def interpolations(self, frame: int, kinds=METHODS) -> dict[str, np.ndarray]:
        """Volumes without a prior, in [0, 1], by name."""
        return interpolations(study.frame_of(self.heart, frame), kinds)

    def round_trip(self, n: int = 6) -> tuple[np.ndarray, np.ndarray]:
        """Every other acquired slice of the first frame, and what the prior makes of it: encoded, inverted, decoded."""
        sax = self.scaled(self.heart.sax.data[self.frames[0]])[1 :: max(1, (self.heart.sax.grid.shape[0] - 1) // n)]
        slices = torch.from_numpy(np.clip(sax, 0, 1)[:n]).float()
        with torch.no_grad():
            decoded = self.prior.decode(*self.prior.encode(slices))
        return slices.numpy(), decoded.clamp(0, 1).cpu().numpy()

    def curve(self, method: str) -> np.ndarray:
        """Cavity volume in ml of every reconstructed frame: truth, ours, or an interpolation."""
        spacing, curve = self.heart.dense.spacing_mm[::-1], []
        for frame in self.frames:
            if method == "truth":
                found = self.labels[frame]
            else:
                volume = self.ours(frame) if method == "ours" else self.interpolations(frame, (method,))[method]
                found = indices.grow_labels(
                    volume, self.labels[frame, :: self.heart.factor], self.heart.factor, spacing
                )
            curve.append(indices.volumes_ml(found, spacing)["lv"][0])
        return np.array(curve)

    # ---- pictures

    def show(self, path: Path, width: int) -> None:
        display(Image(data=path.read_bytes(), width=width))

    def scene(self, frame: int = 0, every: int = 2) -> None:
        """Slices and views where they lie, and the lines in which the views cross the middle slice."""
        fig = Figure(figsize=(9.5, 4.6), layout="constrained")
        space, flat = fig.add_subplot(1, 2, 1, projection="3d"), fig.add_subplot(1, 2, 2)
        sax, views = self.heart.sax, self.heart.views
        for number in range(0, sax.grid.shape[0], every):
            _surface(space, align.slice_grid(sax.grid, number), sax.data[frame, number], 0.25)
        for cine in views.values():
            _surface(space, cine.grid, cine.data[frame, 0], 0.9)
        space.set(xlabel="right, mm", ylabel="front, mm", zlabel="up, mm")
        space.set_box_aspect((1, 1, 1))
        middle = sax.grid.shape[0] // 2
        flat.imshow(sax.data[frame, middle], cmap="gray")
        for number, (name, cine) in enumerate(views.items()):
            line = sax.grid.voxels(align.intersection(sax.grid, middle, cine.grid))
            flat.plot(line[:, 0], line[:, 1], color=f"C{number}", label=name)
        flat.legend(fontsize=8)
        flat.set_axis_off()
        flat.set_title(f"slice {middle}", fontsize=9)
        self.show(figures.save(fig, self.work / "figure.png"), 860)

    def misplace(self, slices_mm: float = 1.5, view_mm: tuple[float, float] = (4.0, -2.5), seed: int = 1):
        """The study with slices and one view moved off their places, and unregistered: (sax, views)."""
        raw, rng = self.load(align=False), np.random.default_rng(seed)
        shifts = slices_mm * rng.standard_normal((raw.sax.grid.shape[0], 2))
        moved = align.Alignment(shifts, np.zeros((len(raw.views), 4))).corrected(raw.sax.data, raw.sax.grid)
        name, view = next(iter(raw.views.items()))
        away = view.grid.axes[:, :2] @ np.array(view_mm)
        return replace(raw.sax, data=moved), raw.views | {name: replace(view, grid=view.grid.moved(away))}

    def registration(self, sax: geometry.Cine, views: dict[str, geometry.Cine]) -> align.Alignment:
        """Register, and show stripes of view and resliced stack before and after."""
        found = align.align(sax, views)
        path = align.save_picture(self.work / "figure.png", sax, views, found)
        self.show(path, 260 * len(views))
        return found

    def gallery(self, images: dict[str, np.ndarray], *, limits=(0.0, 1.0), cmap="gray", columns: int = 6,
                bar: str = "", aspect: float = 1.0) -> None:  # fmt: skip
        """Named images (H, W) in rows."""
        rows = -(-len(images) // columns)
        width = min(columns, len(images))
        fig = Figure(figsize=(2.1 * width + 0.6 * bool(bar), 2.3 * rows), layout="constrained")
        axes = fig.subplots(rows, width, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, (name, image) in zip(axes.flat, images.items(), strict=False):
            drawn = axis.imshow(image, cmap=cmap, vmin=limits[0], vmax=limits[1], aspect=aspect)
            axis.set_title(TITLES.get(name, name), fontsize=8)
        if bar:
            fig.colorbar(drawn, ax=axes, label=bar, shrink=0.8)
        self.show(figures.save(fig, self.work / "figure.png"), 130 * width)

    def reformat(self, volume: np.ndarray, degrees: float = 30.0) -> np.ndarray:
        """A volume (N, H, W) on a plane along the stack's axis that no view has, (slices, across)."""
        return reformat(volume, self.heart.dense, degrees)

    def animation(self, cines: dict[str, np.ndarray], seconds: float = 1.0, zoom: int = 3) -> Path:
        """GIF of images (T, H, W) in [0, 1] side by side, one heart beat in `seconds`."""
        beside = np.concatenate([np.pad(cine, ((0, 0), (0, 0), (0, 2))) for cine in cines.values()], axis=2)
        grey = (255 * np.clip(beside, 0, 1)).astype(np.uint8).repeat(zoom, 1).repeat(zoom, 2)
        pictures, path = [Picture.fromarray(image) for image in grey], self.work / "cine.gif"
        pictures[0].save(path, save_all=True, append_images=pictures[1:], loop=0, duration=1000 * seconds / len(grey))
        display(Image(data=path.read_bytes(), format="gif"))
        return path

    def curves(self, lines: dict, **options) -> None:
        self.show(figures.curves(self.work / "figure.png", lines, **options), 520)


def interpolations(frame: inverse.Frame, kinds=METHODS) -> dict[str, np.ndarray]:
    """Volumes (N, H, W) of a frame without a prior, by name."""
    out = {}
    for kind in kinds:
        out[kind] = baselines.interpolate(frame.sax, frame.factor, "cubic" if kind == "lax_residual" else kind)
        if kind == "lax_residual":
            out[kind] = baselines.lax_residual(out[kind], frame.views, frame.factor, frame.spacing_mm)
    return out


def reformat(volume: np.ndarray, dense: geometry.Grid, degrees: float, pixel_mm: float = 1.0) -> np.ndarray:
    """A volume (N, H, W) on a plane through the middle of its grid along its third axis, (slices, across) in [0, 1]."""
    angle = np.deg2rad(degrees)
    across = np.cos(angle) * dense.axes[:, 0] + np.sin(angle) * dense.axes[:, 1]
    width, depth = min(n * s for n, s in zip(dense.shape[1:], dense.spacing_mm[1::-1], strict=True)), dense.shape[0]
    shape = (1, round((depth - 1) * dense.spacing_mm[2] / pixel_mm) + 1, round(width / pixel_mm) - 2)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([across * pixel_mm, dense.axes[:, 2] * pixel_mm, np.cross(across, dense.axes[:, 2])], 1)
    affine[:3, 3] = dense.centre_mm - affine[:3, :3] @ [(shape[2] - 1) / 2, (shape[1] - 1) / 2, 0]
    sampler = geometry.PlaneSampler(dense, geometry.Grid(affine, shape))
    return sampler.picture(sampler.sample(torch.from_numpy(np.ascontiguousarray(volume))), fill=0.0)


def _surface(axis, grid: geometry.Grid, image: np.ndarray, alpha: float, step: int = 3) -> None:
    """An image in space, coarsely."""
    rows, columns = np.mgrid[: image.shape[0] : step, : image.shape[1] : step]
    points = grid.world(np.stack([columns, rows, np.zeros_like(rows)], -1))
    low, high = np.percentile(image, [1, 99])
    grey = np.clip((image[rows, columns] - low) / max(high - low, 1e-9), 0, 1)
    colours = np.stack([grey, grey, grey, np.full_like(grey, alpha)], -1)
    axis.plot_surface(*np.moveaxis(points, -1, 0), facecolors=colours, rstride=1, cstride=1, shade=False, linewidth=0)


# ---- a real heart ---------------------------------------------------------------------------------------------------


def real_heart(size: int = 112) -> study.Study | None:
    """The sparse cine of REAL_DATA_DIR with its two views, cut to the middle and registered; None without it."""
    folder = Path(os.environ.get("REAL_DATA_DIR", "")) / "cardiac"
    paths = {name: folder / f"biv-me_patient1_{name}.nii.gz" for name in ("sax", "lax_4ch", "lax_2ch")}
    if not all(path.is_file() for path in paths.values()):
        return None
    sax = geometry.crop_or_pad(geometry.load_sax(paths["sax"]), size)
    views = {name.removeprefix("lax_"): geometry.resample_frames(geometry.load_lax(path), sax.frames)
             for name, path in paths.items() if name != "sax"}  # fmt: skip
    return study.prepare("a real heart", sax, views, factor=8)


def frame_of(heart: study.Study, number: int, prior: inverse.Prior | None = None) -> inverse.Frame:
    """A frame of a study, with the window that a prior sees of it."""
    return study.frame_of(heart, number, prior.model.image_size if prior else None)


def reconstruct(prior: inverse.Prior, frame: inverse.Frame, iterations: int = 3) -> inverse.Result:
    """A frame with the fast mode and few iterations."""
    from mgdcr.objective import Objective

    quick = inverse.Settings(**inverse.MODES["fast"] | {"iterations": iterations})
    return inverse.reconstruct(inverse.Prior(prior.model, quick, prior.rt), frame, Objective(), quick)


# ---- opening --------------------------------------------------------------------------------------------------------


def open_study() -> Study:
    """The study of MGDCR_ROOT, else a new phantom study; UserError if your own lacks a prior or a reconstruction."""
    work = Path(tempfile.mkdtemp(prefix="mgdcr_"))
    if named := os.environ.get("MGDCR_ROOT", ""):
        root = Path(named).expanduser().resolve()
        for what, pattern in (("trained prior", str(PRIOR)), ("reconstruction", "results/*/*/frame_*/report.json")):
            if not list(root.glob(pattern)):
                raise UserError(
                    f"MGDCR_ROOT={root} has no {what} ({pattern}); run the commands of mgdcr/README.md there"
                )
    else:
        root = make(work / "study")
        print(f"to show this study again: export MGDCR_ROOT={root}")
    return Study(root, work, ExitStack().enter_context(runtime.start("auto", "auto", 0)))
