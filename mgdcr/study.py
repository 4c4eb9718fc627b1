"""One study on disk: its files, its frames as the inverse optimisation wants them, and the results beside them."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from common.cli import UserError
from common.runlog import RunLog, write_json
from mgdcr import align as registration
from mgdcr import baselines, geometry, intensity, inverse
from mgdcr.geometry import Cine, Grid
from mgdcr.objective import View

PREFIX = "lax_"


@dataclass(frozen=True)
class Source:
    """Files of a study."""

    name: str
    sax: Path
    lax: dict[str, Path]


@dataclass
class Study:
    """A study in memory: short axis, views at as many phases, the map of intensities, where the dense slices lie."""

    name: str
    sax: Cine
    views: dict[str, Cine]
    scale: intensity.Scale
    dense: Grid
    factor: int
    thickness_points: int = 1
    report: dict = field(default_factory=dict)  # of the alignment


# ---- finding and reading --------------------------------------------------------------------------------------------


def find(options) -> list[Source]:
    """The studies that the options name; UserError for one that is not there."""
    if options.sax:
        path = Path(options.sax)
        files = [Path(p) for p in (() if options.no_lax else options.lax)]
        names = options.lax_names or [_stem(p) for p in files]
        if len(set(names)) < len(files):
            raise UserError("two --lax files have the same name: tell them apart with --lax_names")
        for file in (path, *files):
            if not file.is_file():
                raise UserError(f"file not found, {file}, check the path")
        name = options.subject_id[0] if options.subject_id else _stem(path)
        return [Source(name, path, dict(zip(names, files, strict=False)))]
    root = Path(options.data)
    known = sorted(path.parent.name for path in root.glob("*/sax.nii.gz"))
    if not known:
        raise UserError(f"no <subject>/sax.nii.gz in {root}: make data with mgdcr/make_phantom.py, or give --sax FILE")
    wrong = [name for name in options.subject_id if name not in known]
    if wrong:
        raise UserError(f"no subject {wrong[0]} in {root}: there are {', '.join(known[:5])}{' ...' * (len(known) > 5)}")
    return [_of_folder(root / name, options) for name in options.subject_id or known]


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _of_folder(folder: Path, options) -> Source:
    found = {_stem(path).removeprefix(PREFIX): path for path in sorted(folder.glob(f"{PREFIX}*.nii.gz"))}
    missing = [name for name in options.lax_names if name not in found]
    if missing:
        raise UserError(f"no view {missing[0]} in {folder}: there are {', '.join(found) or 'none'}")
    chosen = {} if options.no_lax else {name: found[name] for name in options.lax_names or found}
    return Source(folder.name, folder / "sax.nii.gz", chosen)


def load(source: Source, *, factor: int, thickness_points: int = 1, align: bool = True) -> Study:
    """Read a study; views with another number of frames are paired by cardiac phase.

    UserError for files that cannot be read; a view that does not meet the stack is left out with a warning.
    """
    sax = geometry.load_sax(source.sax)
    views = {name: geometry.resample_frames(geometry.load_lax(path), sax.frames) for name, path in source.lax.items()}
    return prepare(source.name, sax, views, factor=factor, thickness_points=thickness_points, align=align)


def prepare(name: str, sax: Cine, views: dict[str, Cine], *, factor: int, thickness_points: int = 1,
            align: bool = True) -> Study:  # fmt: skip
    """A study of cines in memory."""
    report = {}
    if align and views:
        found = registration.align(sax, views)
        sax = replace(sax, data=found.corrected(sax.data, sax.grid))
        views = {view: replace(cine, grid=found.view_grid(number, cine.grid))
                 for number, (view, cine) in enumerate(views.items())}  # fmt: skip
        report = found.report
    dense = geometry.dense_grid(sax.grid, factor)
    used = {}
    for view, cine in views.items():
        if len(geometry.PlaneSampler(dense, cine.grid, thickness_points)) < inverse.objective.MIN_PIXELS:
            warnings.warn(f"{name}: view {view} does not meet the short-axis stack and is left out", stacklevel=2)
        else:
            used[view] = cine
    scale = intensity.Scale.of(sax.data, sax.valid, where=str(sax.path or name))
    return Study(name, sax, used, scale, dense, factor, thickness_points, report)


def frame_of(study: Study, number: int, image_size: int | None = None) -> inverse.Frame:
    """A frame for the optimisation; `image_size`: of the prior, a window about the middle where slices are larger.

    Pixels of a view that are NaN, Inf or exactly 0 (outside what was scanned) are not used; the others count as far as
    the view agrees with the acquired slices (baselines.trust).
    """
    sax = (study.scale.normalise(study.sax.data[number], clip=False) + 1) / 2
    spacing = study.dense.spacing_mm
    shape = sax.shape[1:]
    window = None
    if image_size is not None and shape != (image_size, image_size):
        window = inverse.Window.middle(shape, image_size)
    frame = inverse.Frame(sax, study.factor, (spacing[1], spacing[0]), [], window)
    linear = torch.from_numpy(baselines.interpolate(sax, study.factor, "linear"))
    for name, cine in study.views.items():
        view = _view(study, name, cine, number, linear)
        if (view.weights > 0).any():
            frame.views.append(view)
        else:
            warnings.warn(f"{study.name}, frame {number}: view {name} has no usable pixel", stacklevel=2)
    return frame


def _view(study: Study, name: str, cine: Cine, number: int, linear: torch.Tensor) -> View:
    """The view's pixels in the scale of the short axis, gain and offset by the pixels next to acquired slices."""
    sampler = geometry.PlaneSampler(study.dense, cine.grid, study.thickness_points)
    values = sampler.values(np.ascontiguousarray(cine.data[number, 0])).float()
    usable = torch.isfinite(values) & (values != 0)
    if cine.valid is not None:
        usable &= sampler.values(np.ascontiguousarray(cine.valid[number, 0])).bool()
    position = sampler.coordinates[:, 0]
    near = usable & ((position - (position / study.factor).round() * study.factor).abs() < baselines.NEAR_SLICE)
    chosen = near if near.sum() >= inverse.objective.MIN_PIXELS else usable
    # A gain near 1 is sought, so that a fit from few pixels can be told from nonsense: own units go first.
    low, high = np.percentile(values[usable].numpy(), intensity.PERCENTILES) if usable.any() else (0.0, 1.0)
    values = (values - float(low)) / (float(high - low) or 1.0)
    gain, offset = intensity.robust_gain_offset(values[chosen].numpy(), sampler_sample(sampler, linear)[chosen].numpy())
    values = torch.where(usable, gain * values + offset, torch.zeros_like(values))
    view = View(name, sampler, values, usable.float())
    with torch.no_grad():
        return replace(view, weights=view.weights * baselines.trust(linear, view, study.factor))


def sampler_sample(sampler, volume: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return sampler.sample(volume)


def restore(study: Study, volume: np.ndarray) -> np.ndarray:
    """A volume in [0, 1] in acquired intensities."""
    return study.scale.restore(2 * volume - 1)


# ---- results --------------------------------------------------------------------------------------------------------


def digest(frame: inverse.Frame) -> str:
    """Sixteen hex digits of what a frame was measured to be."""
    out = hashlib.sha256(np.ascontiguousarray(frame.sax).tobytes())
    for view in frame.views:
        for part in (view.values, view.weights, view.sampler.coordinates):
            out.update(view.name.encode() + part.cpu().numpy().tobytes())
    return out.hexdigest()[:16]


def hash_of(identity: dict) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]


class FrameFolder:
    """Results and state of one frame; `identity` tells them from those of other data, settings or networks."""

    def __init__(self, path: Path, identity: dict, overwrite: bool):
        self.path, self.identity = path, json.loads(json.dumps(identity))
        self.report = path / "report.json"
        self.done = self.report.is_file() and json.loads(self.report.read_text()).get("hash") == hash_of(self.identity)
        if self.done:
            return
        if overwrite:
            for file in (*path.glob("*.nii.gz"), *path.glob("**/codes.ckpt"), self.report):
                file.unlink(missing_ok=True)
        elif self.report.is_file():
            raise UserError(f"{path} holds a result of other data or settings: name another --out, or add --overwrite")

    def files(self, sweep: int | None = None) -> inverse.Files:
        folder = self.path if sweep is None else self.path / f"sweep_{sweep}"
        return inverse.Files(folder / "codes.ckpt", self.identity)

    def log(self, sweep: int | None = None) -> FrameLog:
        return FrameLog(self.files(sweep), self.identity)

    def write(self, study: Study, result: inverse.Result, seconds: float) -> None:
        """Volumes in acquired intensities on the dense grid, then the report, which says that they are complete."""
        images = {"volume": result.volume, "seed": result.seed, "decoded": result.decoded}
        for name, image in images.items():
            geometry.save(self.path / f"{name}.nii.gz", restore(study, image), study.dense)
        if result.spread is not None:
            width = study.scale.high - study.scale.low
            geometry.save(self.path / "sd.nii.gz", width * result.spread, study.dense)
        write_json(self.report, {"hash": hash_of(self.identity), "seconds": round(seconds, 2), **result.report,
                                 "alignment": study.report, "scale": study.scale.to_dict(),
                                 "identity": self.identity})  # fmt: skip


class FrameLog:
    """log.jsonl of an optimisation, opened with its first iteration; continues after the last saved one."""

    def __init__(self, files: inverse.Files, config: dict):
        self.files, self.config, self.log = files, config, None

    def __call__(self, iteration: int, values: dict) -> None:
        if self.log is None:
            self.log = RunLog(self.files.path.parent, self.config, start_step=iteration - 1)
        self.log.log("inverse", iteration, **values)

    def close(self) -> None:
        if self.log is not None:
            self.log.close()


def reconstruct(source: Source, prior, trained, goal, settings, options, rt, stop, *, share_frames: bool) -> None:
    """All wanted frames of a study; finished ones are kept. With `share_frames` ranks share them, each on its own."""
    study = load(source, factor=options.factor, thickness_points=options.thickness_points, align=options.align)
    numbers = list(range(study.sax.frames)) if options.frame < 0 else [options.frame]
    if numbers[-1] >= study.sax.frames:
        raise UserError(f"--frame {options.frame}: {source.sax} has frames 0 to {study.sax.frames - 1}")
    folder = Path(options.out) / source.name
    frames = {number: frame_of(study, number, trained.image_size) for number in numbers}
    tied = not share_frames and len(numbers) > 1
    more = {"network": trained.hash, "starts": options.starts, "perturbation": options.perturbation,
            "seed": options.seed, "sweeps": options.sweeps if tied else 1}  # fmt: skip
    if tied:
        more["cine"] = hash_of({str(number): digest(frame) for number, frame in frames.items()})
    places = {
        number: FrameFolder(folder / f"frame_{number:03d}", inverse.identity_of(
            goal, settings, frame=number, data=digest(frame), **more), options.overwrite)
        for number, frame in frames.items()
    }  # fmt: skip
    if tied:
        _tied(study, list(frames.values()), list(places.values()), prior, goal, settings, options, stop)
    else:
        for number in rt.shard(numbers):
            if not places[number].done and not stop.requested:
                _single(study, frames[number], places[number], prior, goal, settings, options, stop)
        rt.barrier()
    if (tied or rt.is_main) and options.frame < 0 and not stop.requested:
        write_cine(folder, study, numbers)


def _single(study, frame, place: FrameFolder, prior, goal, settings, options, stop) -> None:
    start, log = time.time(), place.log()
    try:
        result = inverse.reconstruct(prior, frame, goal, settings, files=place.files(), starts=options.starts,
                                     strength=options.perturbation, seed=options.seed, log=log,
                                     stop=lambda: stop.requested)  # fmt: skip
    finally:
        log.close()
    if not stop.requested:
        place.write(study, result, time.time() - start)


def _tied(study, frames, places: list[FrameFolder], prior, goal, settings, options, stop) -> None:
    """Frames that warm starts and the temporal term tie: all of them, or nothing where all are done."""
    if all(place.done for place in places):
        return
    start, logs = time.time(), []

    def log(sweep, i):
        logs.append(places[i].log(sweep))
        return logs[-1]

    def on_frame(sweep, i, result):
        logs[-1].close()

    results = inverse.reconstruct_cine(prior, frames, goal, settings, sweeps=options.sweeps,
                             files=lambda sweep, i: places[i].files(sweep), log=log,
                             stop=lambda: stop.requested, on_frame=on_frame, starts=options.starts,
                             strength=options.perturbation, seed=options.seed)  # fmt: skip
    if not stop.requested:
        for place, result in zip(places, results, strict=True):
            place.write(study, result, (time.time() - start) / len(places))


def write_cine(folder: Path, study: Study, numbers: list[int]) -> None:
    """volume.nii.gz of all frames with the time between them, report.json of what each frame's says."""
    volumes, reports = [], {}
    for number in numbers:
        place = folder / f"frame_{number:03d}"
        volumes.append(geometry.load_cine(place / "volume.nii.gz").data[0])
        reports[number] = json.loads((place / "report.json").read_text())
    stacked = np.stack(volumes) if len(volumes) > 1 else volumes[0]
    geometry.save(folder / "volume.nii.gz", stacked, study.dense, study.sax.frame_s)
    write_json(folder / "report.json", {"subject": study.name, "views": list(study.views), "frames": reports})
