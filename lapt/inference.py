"""From a CT perfusion study to DWI and ADC: CTP and brain mask go in, volumes on the CTP's own grid come out.

A 2D model takes slice by slice. A volume model takes the whole study: where it has more slices than the network, its
predictions on overlapping windows are blended at every step of the sampler (MultiDiffusion, Bar-Tal et al. 2023), so
that the windows agree and no seam appears. Everything random depends on seed, model id, case, sample and slice alone.
The command is lapt/sample.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from common import checkpoint, nifti, runtime, schedulers, training
from common.cli import UserError
from common.runlog import git_revision, progress, write_json
from lapt import dataset, lesions, raw
from lapt.diffusion import LatentModel, fold
from lapt.segmentation import TrainedGuide

SIDECAR, RECORD = "sample.json", "samples.json"  # of a case, of an output folder
UNITS = {"dwi": "scanner units of the training set", "adc": "1e-6 mm^2/s", "lesion_probability": "share, 0 to 1"}
NOTICE = "research use only: synthetic images, not for diagnosis"
SPACINGS = {  # timesteps that the sampler visits; "model": as the model's file says
    "trailing": {"spacing": "trailing", "offset": 0, "final": "clean"},
    "upstream": {"spacing": "leading", "offset": 1, "final": "first"},
}
SAMPLERS = {"ddim": schedulers.ddim_sample, "dpmpp_2m": schedulers.dpmpp_2m_sample}
CPU_BATCH = 8  # slices are always grouped alike on a CPU, where a batch of another size rounds differently
BRAIN_ML, TISSUE_HU, BOLUS_HU = (500.0, 2200.0), (10.0, 80.0), 0.5  # what a perfusion CT of a head looks like


@dataclass(frozen=True)
class Settings:
    """What decides the values of a sample, and is recorded beside it."""

    steps: int = 50
    sampler: str = "ddim"
    spacing: str = "model"  # or a key of SPACINGS
    n_samples: int = 1
    seed: int = 42
    model_id: str = "lapt"
    weights: str = "average"  # or "raw": of the model, as it was loaded
    slice_noise: str = "independent"  # or "shared": one noise image for all slices of a sample (2D)
    overlap: int = -1  # slices that neighbouring windows of a volume model share; -1: half of them
    spacing_mm: tuple[float, ...] = ()  # voxel size to bring the CTP to; (): as it is
    lesion_threshold: float = lesions.ADC_CORE


@dataclass(frozen=True)
class Study:
    """A CTP study of one case in RAS+ order. ctp (T, X, Y, Z) float32 HU, mask (X, Y, Z) bool, affine (4, 4).

    maps: names of the last channels of ctp, which are no frames but maps in their own units.
    axes: order of the axes in the files, to which outputs are turned back. inputs: file names and hashes.
    """

    name: str
    ctp: np.ndarray
    mask: np.ndarray
    affine: np.ndarray
    axes: tuple[str, str, str] = ("R", "A", "S")
    inputs: dict = field(default_factory=dict)
    maps: tuple[str, ...] = ()

    @property
    def time_points(self) -> int:
        """Frames of the CTP."""
        return len(self.ctp) - len(self.maps)


@dataclass(frozen=True)
class Samples:
    """k samples on the grid of the study: dwi and adc (k, X, Y, Z) float32, probability (X, Y, Z) of being lesion."""

    dwi: np.ndarray
    adc: np.ndarray
    probability: np.ndarray


# ---- studies --------------------------------------------------------------------------------------------------------


def read_study(source: raw.Source, rules: raw.Rules) -> Study:
    """CTP, maps and brain mask of a raw case, checked; UserError names the file and the remedy."""
    files = {what: source.files[what] for what in (*rules.inputs, "mask") if what in source.files}
    study = raw.read(replace(source, files=files), rules)
    first = files[rules.inputs[0]]
    axes = nib.aff2axcodes(nib.load(first).affine)
    used = {"time_points": 0 if rules.maps_only else raw.frames(first), "mask_made": "mask" not in files}
    inputs = _fingerprint(**files) | used
    return Study(source.name, study.ctp, study.mask, study.affine, axes, inputs, study.maps)


def raw_studies(sources: list[raw.Source], rules: raw.Rules) -> list[tuple[str, Callable[[], Study]]]:
    """(name, loader) of raw cases; UserError where a file is missing."""
    for source in sources:
        for what in (*rules.inputs, "mask"):
            path = source.files.get(what)
            to_be_made = path is None and what == "mask" and rules.make_masks
            if not to_be_made and (path is None or not path.is_file()):
                where = path or f"{source.name}/{what}.nii.gz"
                images = " and ".join("CTP" if name == "ctp" else name for name in rules.inputs)
                raise UserError(f"{source.name}: no {what} at {where}; sampling needs {images} and a brain mask")
    return [(source.name, partial(read_study, source, rules)) for source in sources]


def prepared_studies(folder: Path, split: str) -> list[tuple[str, Callable[[], Study]]]:
    """(name, loader) of the cases of a split of a prepared folder; only CTP and mask are ever read."""

    def load(case: dataset.Case) -> Study:
        inputs = _fingerprint(ctp=case.folder / "ctp.npy", mask=case.folder / "mask.npy")
        mask = case.volume("mask") > 0
        return Study(case.name, case.volume("ctp"), mask, case.affine, inputs=inputs, maps=case.maps)

    return [(case.name, partial(load, case)) for case in dataset.read_cases(folder, split)]


def _fingerprint(**paths: Path) -> dict:
    return {key: {"file": path.name, "sha256": checkpoint.file_hash(path)}
            for key, path in paths.items()}  # fmt: skip


def check_study(study: Study, model: LatentModel) -> list[str]:
    """What is unusual about the input, as sentences; UserError where the network cannot take it at all."""
    T, needed, found = study.time_points, model.intensity.time_points, []
    if study.maps != tuple(model.intensity.maps):
        ours, theirs = dataset.maps_text(study.maps), dataset.maps_text(model.intensity.maps)
        raise UserError(f"{study.name}: {ours}, the model was trained with {theirs}; give it these, in this order")
    if T != needed:
        raise UserError(f"{study.name}: the CTP has {T} time points, the model was trained with {needed}; prepare it "
                        f"with --time_points {needed} --resample_time")  # fmt: skip
    before = study.inputs.get("time_points", T)
    if before != T:
        found.append(f"the CTP has {before} time points, interpolated to the {T} of the training")
    if study.inputs.get("mask_made"):
        found.append("the brain mask was made from the CTP: look at it")
    ml = float(study.mask.sum()) * lesions.voxel_ml(study.affine)
    if not BRAIN_ML[0] <= ml <= BRAIN_ML[1]:
        found.append(f"brain mask of {ml:.0f} ml, expected {BRAIN_ML[0]:g} to {BRAIN_ML[1]:g}: is it a brain mask?")
    for (name, (low, high)), image in zip(model.intensity.maps.items(), study.ctp[T:], strict=True):
        middle = float(np.median(image[study.mask]))
        if not low <= middle <= high:
            found.append(f"median of {name} inside the mask is {middle:.4g}, in the training set all but 1 % of the "
                         f"voxels are {low:.4g} to {high:.4g}: is it in the same unit?")  # fmt: skip
    if not T:
        return found
    baseline = float(np.median(study.ctp[0][study.mask]))
    if not TISSUE_HU[0] <= baseline <= TISSUE_HU[1]:
        found.append(f"median of the first frame inside the mask is {baseline:.4g}, expected {TISSUE_HU[0]:g} to "
                     f"{TISSUE_HU[1]:g} HU: is the CTP in Hounsfield units?")  # fmt: skip
    change = float(np.ptp([frame[study.mask].mean(dtype=np.float64) for frame in study.ctp[:T]]))
    if T > 1 and change < BOLUS_HU:
        found.append(f"the mean of the brain changes by {change:.2g} HU over time: no contrast bolus is seen")
    return found


# ---- random numbers and windows -------------------------------------------------------------------------------------


def case_seed(seed: int, model_id: str, case: str) -> int:
    """Seed of a case: SHA-256 of "seed|model id|case", the first 8 bytes modulo 2^31 - 1 (as in the original)."""
    digest = hashlib.sha256(f"{seed}|{model_id}|{case}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % (2**31 - 1)


def draw_noise(settings: Settings, case: str, sample: int, numbers: list[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (len(numbers), C, x, y) of these slices of a sample; shape: (C, x, y)."""
    seed = case_seed(settings.seed, settings.model_id, case)
    key = (lambda z: ()) if settings.slice_noise == "shared" else (lambda z: (z,))
    generators = [runtime.generator(seed, sample, *key(z)) for z in numbers]
    return schedulers.draw_noise(generators, (len(numbers), *shape))


def window_starts(slices: int, size: int, overlap: int = -1) -> list[int]:
    """First slices of windows of `size` that cover `slices`, evenly spread; at least `overlap` are shared, -1: half."""
    overlap = size // 2 if overlap < 0 else overlap
    if overlap >= size:
        raise UserError(f"--overlap {overlap}: must be less than the {size} slices of the network")
    if slices <= size:
        return [0]
    count = 1 + -(-(slices - size) // (size - overlap))
    return np.rint(np.linspace(0, slices - size, count)).astype(int).tolist()


def blend_weights(size: int) -> Tensor:
    """Weights (size, 1, 1, 1) that rise from both ends of a window to its middle."""
    up = torch.arange(1, size + 1)
    return torch.minimum(up, up.flip(0)).float().view(-1, 1, 1, 1)


def blended_denoiser(model: LatentModel, conditions: dict[int, Tensor], slices: int) -> Callable:
    """denoise(z_t, t) over a stack of `slices` >= model.slices from windows {first slice: condition}."""
    size = model.slices
    weights = blend_weights(size).to(model.rt.device)
    total = torch.zeros(slices, 1, 1, 1, device=model.rt.device)
    for start in conditions:
        total[start : start + size] += weights

    def denoise(z_t, t):
        mixed = torch.zeros_like(z_t)
        for start, c in conditions.items():
            part = slice(start, start + size)
            mixed[part] += weights * model.denoiser(c)(z_t[part], t[part])
        return mixed / total

    return denoise


# ---- sampling -------------------------------------------------------------------------------------------------------


def timesteps(model: LatentModel, settings: Settings) -> tuple[list[int], str]:
    """(decreasing timesteps, where the last step leads); UserError for a number of steps that does not exist."""
    how = SPACINGS.get(settings.spacing, model.settings["sampling"])
    return schedulers.respace(model.schedule.T, settings.steps, how["spacing"], how["offset"]), how["final"]


def check_settings(settings: Settings, model: LatentModel) -> None:
    """UserError for settings that this model cannot sample with."""
    if settings.n_samples < 1:
        raise UserError(f"--n_samples {settings.n_samples}: must be at least 1")
    if settings.overlap < -1:
        raise UserError(f"--overlap {settings.overlap}: 0 or more slices, or -1 for half of the network's")
    if settings.spacing_mm and (len(settings.spacing_mm) != 3 or min(settings.spacing_mm) <= 0):
        raise UserError(f"--spacing_mm {settings.spacing_mm}: give three positive numbers, or none")
    raw.check_spacing(settings.spacing_mm)
    if model.slices and settings.slice_noise == "shared":
        raise UserError("--slice_noise shared: a volume model is trained on noise of its own in every slice; it is for "
                        "2D models")  # fmt: skip
    if model.slices:
        window_starts(model.slices, model.slices, settings.overlap)
    timesteps(model, settings)


@torch.inference_mode()
def sample_stack(model: LatentModel, ctp: Tensor, noise: Tensor, settings: Settings, batch: int = CPU_BATCH) -> Tensor:
    """Normalised images (Z, 2, X, Y) on the CPU of normalised CTP slices (Z, T, X, Y) and noise (Z, C, x, y).

    X and Y are multiples of `model.multiple`; a volume model needs at least `model.slices` slices. batch: slices
    that a 2D model (and the decoder) takes at a time on a GPU.
    """
    device = model.rt.device
    batch = CPU_BATCH if device.type == "cpu" else batch
    times, final = timesteps(model, settings)

    def sampled(denoise: Callable, z_T: Tensor) -> Tensor:
        return SAMPLERS[settings.sampler](denoise, z_T.to(device), model.schedule, times, final=final)

    if model.slices:
        starts = window_starts(len(ctp), model.slices, settings.overlap)
        conditions = {s: model.condition(ctp[s : s + model.slices].to(device)) for s in starts}
        latents = sampled(blended_denoiser(model, conditions, len(ctp)), noise).split(batch)
    else:
        pairs = zip(ctp.split(batch), noise.split(batch), strict=True)
        latents = (sampled(model.denoiser(model.condition(c.to(device))), z_T) for c, z_T in pairs)
    return torch.cat([model.decode(z_0).cpu() for z_0 in latents])


def sample_study(
    model: LatentModel, study: Study, settings: Settings, *, batch: int = CPU_BATCH, guide: TrainedGuide | None = None
) -> Samples:
    """Samples of a study in physical units on its own grid, 0 outside the mask.

    guide: finds the lesions; None: ADC below the settings' threshold.
    """
    work = at_spacing(study, settings.spacing_mm) if settings.spacing_mm else study
    volumes = [native_grid(volumes, work, study) for volumes in sample_volumes(model, work, settings, batch)]
    dwi, adc = (np.stack(parts) for parts in zip(*volumes, strict=True))
    if guide is None:
        probability = lesions.lesion_probability(adc, study.mask, settings.lesion_threshold)
    else:
        found = [guide_probability(guide, *pair, study.mask) for pair in zip(dwi, adc, strict=True)]
        probability = np.mean(found, 0, dtype=np.float64).astype(np.float32)
    return Samples(dwi, adc, probability)


def guide_probability(guide: TrainedGuide, dwi: np.ndarray, adc: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Probability of lesion (X, Y, Z) that the guide finds in DWI and ADC; 0 outside the mask.

    A guide that was trained with the statistics of each image gets those of these very images.
    """
    stats = None
    if guide.intensity.statistics == "case":
        stats = {"dwi": raw.statistics(dwi[mask]), "adc": raw.statistics(adc[mask])}
    return guide.probability(dwi, adc, mask, stats)


def sample_volumes(
    model: LatentModel, study: Study, settings: Settings, batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(DWI, ADC), each (X, Y, Z) float32 in physical units, of one sample after the other."""
    prepared = torch.from_numpy(model.intensity.normalise_ctp(study.ctp, study.mask))
    numbers, stack = choose_slices(study.mask, prepared, model.slices)
    padded = dataset.pad_to_multiple(stack, model.multiple, dataset.CTP_BACKGROUND)
    shape = model.latent_shape(padded)[1:]
    inside = [i for i, z in enumerate(numbers) if 0 <= z < study.mask.shape[2]]
    kept = [numbers[i] for i in inside]
    for j in range(settings.n_samples):
        noise = draw_noise(settings, study.name, j, numbers, shape)
        images = dataset.unpad(sample_stack(model, padded, noise, settings, batch), stack.shape[2:])[inside]
        volumes = np.zeros((2, *study.mask.shape), np.float32)
        physical = model.intensity.denormalise(images.permute(1, 2, 3, 0).numpy())
        for volume, values in zip(volumes, physical, strict=True):
            volume[..., kept] = values * study.mask[..., kept]
        yield tuple(volumes)


def choose_slices(mask: np.ndarray, ctp: Tensor, size: int) -> tuple[list[int], Tensor]:
    """Slice numbers and normalised CTP slices (N, T, X, Y) that the network gets, of ctp (T, X, Y, Z).

    2D (size 0): those that hold brain. A volume model: all, and background above and below where there are fewer
    than `size`; such slices have numbers outside 0..Z-1.
    """
    Z, slices = ctp.shape[-1], fold(ctp[None])
    if not size:
        numbers = np.flatnonzero(mask.any((0, 1))).tolist()
        return numbers, slices[numbers]
    below = max(size - Z, 0) // 2
    above = max(size - Z, 0) - below
    empty = torch.full_like(slices[:1], dataset.CTP_BACKGROUND)
    stack = torch.cat([empty.expand(below, -1, -1, -1), slices, empty.expand(above, -1, -1, -1)])
    return list(range(-below, Z + above)), stack


# ---- other voxel sizes ----------------------------------------------------------------------------------------------


def at_spacing(study: Study, spacing_mm: tuple[float, ...]) -> Study:
    """The study resampled to another voxel size."""
    plain = raw.Study(study.ctp, study.mask, study.affine, maps=study.maps)
    moved = raw.to_common_grid(plain, raw.Rules(spacing_mm=spacing_mm), Path(study.name))
    return replace(study, ctp=moved.ctp, mask=moved.mask, affine=moved.affine)


def native_grid(volumes: tuple[np.ndarray, ...], work: Study, study: Study) -> tuple[np.ndarray, ...]:
    """Volumes of the working grid on the grid of the study: linear inside the mask, no background bleeds in."""
    if work is study:
        return volumes

    def back(data: np.ndarray) -> np.ndarray:
        return nifti.resample_to(nifti.Volume(data, work.affine), study.mask.shape, study.affine).data

    weight = back(work.mask.astype(np.float32))
    inside = study.mask & (weight > 1e-3)
    return tuple(np.divide(back(v), weight, out=np.zeros_like(weight), where=inside) for v in volumes)


# ---- files ----------------------------------------------------------------------------------------------------------


def file_names(n_samples: int) -> list[str]:
    """Files of a case, without the sidecar."""
    names = [f"{m}_sample_{j}.nii.gz" for m in dataset.MODALITIES for j in range(n_samples)]
    if n_samples > 1:
        names += [f"{m}_{what}.nii.gz" for m in dataset.MODALITIES for what in ("mean", "sd")]
    return [*names, "lesion_probability.nii.gz"]


def about(model: LatentModel, settings: Settings, guide: TrainedGuide | None) -> dict:
    """What decides the values of all cases of a folder: model, settings, normalisation, lesion rule."""
    rule = f"ADC < {settings.lesion_threshold:g}e-6 mm^2/s" if guide is None else f"guide network {guide.hash}"
    chosen = asdict(settings) | {"spacing_mm": list(settings.spacing_mm)}
    visited, final = timesteps(model, settings)
    precision = str(model.rt.autocast_dtype or torch.float32).removeprefix("torch.")
    return {"model": model.hash, "stage": model.stage, **chosen, "timesteps": [visited[0], visited[-1]], "final": final,
            "precision": precision, "lesion": rule, "normalisation": model.intensity.to_dict()}  # fmt: skip


def claim_folder(out: Path, settings: dict, names: list[str], overwrite: bool, rt: runtime.Runtime) -> None:
    """Enter these cases in OUT/samples.json.

    UserError if OUT holds cases of other settings, or case folders that are not ours. With `overwrite` the files of
    other settings are removed first: those of the cases that the old record names, and nothing else.
    """
    path, remedy = out / RECORD, "delete the folder or name another --outdir"
    old = training.read_record(path, ("settings", "cases"), remedy) if path.is_file() else {"settings": {}, "cases": []}
    before = old["settings"]
    if not any((out / name).is_dir() for name in old["cases"]):
        before = {}  # a run that stopped before its first case
    changed = [f"{key} {before.get(key)} -> {settings.get(key)}" for key in sorted({*before, *settings})
               if before and before.get(key) != settings.get(key)]  # fmt: skip
    if changed and not overwrite:
        raise UserError(f"{out} holds samples of other settings ({'; '.join(changed)}); name another --outdir or add "
                        "--overwrite")  # fmt: skip
    for name in set(names) - set(old["cases"]):
        foreign = [file for file in (SIDECAR, *file_names(settings["n_samples"])) if (out / name / file).exists()]
        if foreign and not overwrite:
            raise UserError(f"{out / name / foreign[0]} was not written by this run; name another --outdir or add "
                            "--overwrite")  # fmt: skip
    rt.barrier()  # every rank has judged the folder before rank 0 changes it
    if rt.is_main:
        for name in old["cases"] if changed else ():
            for file in (SIDECAR, *file_names(before.get("n_samples", 1))):
                (out / name / file).unlink(missing_ok=True)
        kept = [] if changed else old["cases"]
        write_json(path, {"settings": settings, "cases": sorted({*kept, *names}), "notice": NOTICE,
                          "git_revision": git_revision()})  # fmt: skip
    rt.barrier()


def is_finished(folder: Path, settings: dict, inputs: dict, overwrite: bool) -> bool:
    """Whether a case is complete: the sidecar is written last, and must tell the same settings and inputs.

    UserError if it tells others and nothing allows replacing them.
    """
    path = folder / SIDECAR
    if not path.is_file():
        return False
    record = training.read_record(path, ("settings", "inputs", "files"), "delete this folder")
    if record["settings"] == settings and record["inputs"] == inputs:
        return all((folder / name).is_file() for name in record["files"])
    if not overwrite:
        what = "inputs" if record["settings"] == settings else "settings"
        raise UserError(f"{folder} holds samples of other {what}; name another --outdir or add --overwrite")
    return False


def write_case(folder: Path, study: Study, samples: Samples, settings: dict, findings: list[str]) -> None:
    """All volumes of a study on the grid and in the axis order of its CTP file, then the sidecar."""
    maps = {}
    for name in dataset.MODALITIES:
        values = getattr(samples, name)
        maps |= {f"{name}_sample_{j}.nii.gz": value for j, value in enumerate(values)}
        if len(values) > 1:
            maps[f"{name}_mean.nii.gz"] = values.mean(0, dtype=np.float64)
            maps[f"{name}_sd.nii.gz"] = values.std(0, ddof=1, dtype=np.float64)
    maps["lesion_probability.nii.gz"] = samples.probability
    (folder / SIDECAR).unlink(missing_ok=True)
    for file, data in maps.items():
        data, affine = nifti.reorient(data, study.affine, study.axes)
        nifti.save(folder / file, data, affine)
    shape = list(nifti.reorient(study.mask, study.affine, study.axes)[0].shape)
    write_json(folder / SIDECAR, {
        "case": study.name, "notice": NOTICE, "units": UNITS, "files": list(maps), "inputs": study.inputs,
        "case_seed": case_seed(settings["seed"], settings["model_id"], study.name), "shape": shape,
        "affine": affine.tolist(), "slices_with_brain": np.flatnonzero(study.mask.any((0, 1))).tolist(),
        "findings": findings, "settings": settings,
    })  # fmt: skip


def sample_folder(
    model: LatentModel, cases: list[tuple[str, Callable[[], Study]]], out: Path, settings: Settings, rt, *,
    batch: int = CPU_BATCH, guide: TrainedGuide | None = None, overwrite: bool = False,
) -> int:  # fmt: skip
    """Write OUT/<case>/ of (name, loader) pairs, case by case, ranks sharing them; returns how many are new.

    Finished cases of the same settings, model and inputs are kept.
    """
    check_settings(settings, model)
    names = [name for name, _ in cases]
    if odd := [name for name in names if name != Path(name).name or name in ("", "..")]:
        raise UserError(f"case {odd[0]!r} cannot be the name of a folder: give another with --case")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two cases are called {twice}; outputs are named after cases: rename one")
    record = about(model, settings, guide)
    claim_folder(out, record, names, overwrite, rt)
    mine, new = rt.shard(cases), 0
    with progress(len(mine), 0, "sample", enabled=rt.is_main) as bar:
        for name, load in mine:
            study = load()
            if not is_finished(out / name, record, study.inputs, overwrite):
                findings = check_study(study, model)
                for finding in findings:
                    bar.write(f"note: {name}: {finding}")
                samples = sample_study(model, study, settings, batch=batch, guide=guide)
                write_case(out / name, study, samples, record, findings)
                new += 1
            bar.update()
    return sum(rt.gather(new))
