"""What a trained LDAE can make of scans, and how it reaches the disk: NIfTI, JSON sidecar and picture per volume.

Functions take a `model.LDAE` and yield volumes (D, H, W) on the prepared grid; `save_output` puts them back onto the
grid of the input. Everything random is keyed by seed, scan and number, so that a file depends neither on the batch nor
on what else is made. On a CPU volumes are decoded one by one, where a batch rounds differently and saves no time.
The command is ldae/scripts/generate.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import checkpoint, figures, nifti, runtime, schedulers, training
from common.cli import UserError
from common.runlog import write_json
from ldae import data_split, dataset, evaluation, interpolation, model, posterior_gap, preprocess

RECORD = "generate.json"  # of an output folder

# ---- model and scans ------------------------------------------------------------------------------------------------


def load_model(options, rt: runtime.Runtime) -> model.LDAE:
    """The LDAE of --model_path with the asked sampling; UserError for a number of steps that does not exist."""
    ldae = model.load_ldae(Path(options.model_path), rt, options.trust_pickle, option="--model_path")
    if options.sampling == "upstream":
        ldae = ldae.with_sampling(**posterior_gap.UPSTREAM)
    schedulers.respace(ldae.schedule.T, options.steps, ldae.spacing)
    if options.inversion_passes and ldae.clip is not None:
        raise UserError(f"--inversion_passes {options.inversion_passes}: not with a model that clamps, and not with "
                        "--sampling upstream")  # fmt: skip
    return ldae.with_sampling(inversion_passes=options.inversion_passes)


def select_rows(options, ldae: model.LDAE, scans=()) -> list[dataset.Row]:
    """Rows of --csv_path: those named by `scans`, in that order, or those of --part.

    UserError for an unknown scan. A split that differs from the model's is refused: its test subjects may have been
    trained on.
    """
    rows = dataset.read_table(options.csv_path)
    if scans:
        known = {row.scan: row for row in rows}
        for name in scans:
            if name not in known:
                shown = ", ".join(list(known)[:4])
                raise UserError(f"no scan {name} in {options.csv_path}; there are {shown}, ...")
        return [known[name] for name in scans]
    if options.part != "all":
        split = data_split.read(options.split)
        if ldae.split_hash not in (None, split.hash):
            raise UserError(f"{options.split} is split {split.hash}, the model was trained with {ldae.split_hash}; "
                            "name that split, or choose --part all")  # fmt: skip
        rows = split.rows(rows, options.part)
    return rows[: options.max_scans or None]


def rows_of_files(paths, option: str = "--input") -> list[dataset.Row]:
    """Rows of plain NIfTI files, named by their stems; UserError for a missing file or a name that occurs twice."""
    rows = []
    for index, path in enumerate(map(Path, paths)):
        if not path.is_file():
            raise UserError(f"no file {path}; correct {option}")
        name = dataset.stem(path)
        name = dataset.scan_name(name, None, path)
        if name in {row.scan for row in rows}:
            raise UserError(f"two inputs are called {name}; outputs are named after them: rename one")
        rows.append(dataset.Row(index, name, None, path, None, None, None, name))
    return rows


# ---- codes to volumes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScanCodes:
    """A prepared scan and its codes."""

    x: torch.Tensor  # (1, 1, D, H, W)
    z_0: torch.Tensor  # (1, C, d, h, w)
    y: torch.Tensor  # (1, code_dim)
    z_T: torch.Tensor | None = None  # (1, C, d, h, w); None: not inferred


def encode(ldae: model.LDAE, x: torch.Tensor, steps: int = 0) -> ScanCodes:
    """Codes of one prepared scan (1, D, H, W); with `steps` also z_T, inferred with the scan's own y."""
    x = x[None]
    z_0, y = ldae.compress(x), ldae.semantic(x)
    return ScanCodes(x, z_0, y, ldae.invert(z_0, y, steps) if steps else None)


def decode(
    ldae: model.LDAE, z_T: torch.Tensor, y: torch.Tensor, steps: int, sampler: str = "ddim", batch: int = 1
) -> Iterator[np.ndarray]:
    """Volumes (D, H, W) of codes z_T (N, C, d, h, w) and y (N or 1, code_dim), one after the other."""
    y = y.expand(len(z_T), -1)
    batch = 1 if ldae.rt.device.type == "cpu" else batch
    for z_part, y_part in zip(z_T.split(batch), y.split(batch), strict=True):
        yield from decompress(ldae, ldae.decode(z_part, y_part, steps, sampler))


def decompress(ldae: model.LDAE, z_0: torch.Tensor) -> Iterator[np.ndarray]:
    """Volumes (D, H, W) of latents z_0 (N, C, d, h, w)."""
    yield from ldae.decompress(z_0)[:, 0].cpu().numpy()


def reconstruct(ldae: model.LDAE, codes: ScanCodes, scan: str, kinds, seed: int, steps: int, sampler: str) -> dict:
    """{kind: volume (D, H, W)}: "aekl" the autoencoder alone, "y_only" fixed noise, "encoded" the scan's own z_T."""
    made = {}
    for kind in kinds:
        if kind == "aekl":
            made[kind] = next(decompress(ldae, codes.z_0))
        elif kind == "y_only":
            made[kind] = next(decode(ldae, ldae.noise([scan], seed), codes.y, steps, sampler))
        else:
            made[kind] = next(decode(ldae, codes.z_T, codes.y, steps))
    return made


def vary(
    ldae: model.LDAE, codes: ScanCodes, scan: str, numbers, seed: int, steps: int, sampler: str, batch: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(number, volume (D, H, W)): the scan's y with fresh z_T, another one for every number."""
    z_T = ldae.noise([[scan, "vary", number] for number in numbers], seed)
    yield from zip(numbers, decode(ldae, z_T, codes.y, steps, sampler, batch), strict=True)


def interpolate(
    ldae: model.LDAE, first: ScanCodes, second: ScanCodes, alphas, steps: int, *, noise_path="slerp", mix="codes",
    batch: int = 1,
) -> Iterator[tuple[float, np.ndarray]]:  # fmt: skip
    """(alpha, volume (D, H, W)) between two scans: LERP on y, `noise_path` on z_T.

    mix "codes" decodes the mixed y; "gradients" mixes what the two y say at every step (PDAE's trajectory mixing).
    """
    pairs = [(alpha, *interpolation.mix_codes((first.y, first.z_T), (second.y, second.z_T), alpha, noise_path))
             for alpha in alphas]  # fmt: skip
    if mix == "codes":
        y, z_T = (torch.cat(parts) for parts in zip(*((y, z) for _, y, z in pairs), strict=True))
        yield from zip(alphas, decode(ldae, z_T, y, steps, batch=batch), strict=True)
        return
    for alpha, _, z_T in pairs:
        decoder = posterior_gap.mixed_decoder(ldae.shift, first.y, second.y, alpha)
        denoise = posterior_gap.guided_denoiser(decoder, None, ldae.schedule, ldae.coefficient)
        with torch.inference_mode():
            z_0 = posterior_gap.sample(denoise, z_T, ldae.schedule, steps, **evaluation.sampler_options(ldae))
        yield alpha, next(decompress(ldae, z_0))


def manipulate(
    ldae: model.LDAE, codes: ScanCodes, edited: torch.Tensor, steps: int, batch: int = 1
) -> Iterator[np.ndarray]:
    """Volumes (D, H, W) of edited codes (N, code_dim) with the z_T that was inferred with the scan's own y."""
    yield from decode(ldae, codes.z_T.expand(len(edited), -1, -1, -1, -1), edited, steps, batch=batch)


# ---- files ----------------------------------------------------------------------------------------------------------


def claim_folder(
    out: Path, settings: dict, files: list[str], overwrite: bool, rt: runtime.Runtime, inputs: dict | None = None
) -> None:
    """Enter these outputs (names without suffix) in OUT/generate.json.

    inputs: {output: {entry of its sidecar: the file whose hash it is}}, because other scans may have the same name.
    UserError if OUT holds outputs of other settings or other inputs, or files of these names that are not ours. With
    `overwrite` these outputs are removed first: those that the old record names, and nothing else.
    """
    path = out / RECORD
    remedy = "delete the folder or name another --output_dir"
    old = training.read_record(path, ("settings", "files"), remedy) if path.is_file() else {"settings": {}, "files": []}
    before = old["settings"]
    changed = [f"{key} {before.get(key)} -> {settings.get(key)}" for key in sorted({*before, *settings})
               if before and before.get(key) != settings.get(key)]  # fmt: skip
    if changed and old["files"] and not overwrite:
        raise UserError(f"{out} holds outputs of other settings ({'; '.join(changed)}); name another --output_dir or "
                        "add --overwrite")  # fmt: skip
    for name in set(files) - set(old["files"]):
        if volume_path(out, name).exists():
            raise UserError(f"{volume_path(out, name)} was not written by generate.py; name another --output_dir")
    others = [] if changed else [name for name in inputs or {} if is_of_other_input(out, name, inputs[name])]
    if others and not overwrite:
        named = ", ".join(map(str, inputs[others[0]].values()))
        raise UserError(f"{volume_path(out, others[0])} was made of another scan than {named}; name another "
                        "--output_dir, or add --overwrite")  # fmt: skip
    rt.barrier()  # every rank has judged the folder before rank 0 changes it
    if rt.is_main:
        for name in old["files"] if changed else others:
            for file in (volume_path(out, name), out / f"{name}.json", out / f"{name}.png"):
                file.unlink(missing_ok=True)
        kept = [] if changed else old["files"]
        write_json(path, {"settings": settings, "files": sorted({*kept, *files})})
    rt.barrier()


def volume_path(out: Path, name: str) -> Path:
    return out / f"{name}.nii.gz"


def is_finished(out: Path, name: str) -> bool:
    """Whether an output is complete: its sidecar is written last."""
    return volume_path(out, name).is_file() and (out / f"{name}.json").is_file()


def is_of_other_input(out: Path, name: str, files: dict[str, Path]) -> bool:
    """Whether an output is complete and its sidecar has another hash of one of these {entry: file}."""
    if not is_finished(out, name):
        return False
    record = training.read_record(out / f"{name}.json", (), "delete the folder or name another --output_dir")
    return any(record.get(entry) != checkpoint.file_hash(file) for entry, file in files.items())


def save_output(
    out: Path, name: str, x: np.ndarray, record: dict, prep: preprocess.Preparation, *, affine: np.ndarray,
    native: nifti.Volume | None = None, compare: dict[str, np.ndarray] | None = None,
) -> nifti.Volume:  # fmt: skip
    """Write OUT/NAME.nii.gz, .png and .json of a volume x (D, H, W) on the prepared grid; returns what is written.

    native: the input whose grid, affine and intensity units the file gets; None keeps the prepared grid with `affine`.
    compare: volumes on the prepared grid that the picture shows before x, which is also shown minus the first of them.
    """
    volume = nifti.Volume(x, affine) if native is None else preprocess.to_native(x, prep, native)
    nifti.save(volume_path(out, name), volume.data, volume.affine)
    shown, title = {**(compare or {}), record.get("what", "output"): x}, name
    figures.montage(
        out / f"{name}.png", shown, window=(0, 1), title=title, spacing_mm=[prep.spacing_mm] * 3,
        difference_to=next(iter(compare)) if compare else None,
        difference_of=[list(shown)[-1]] if compare else None,
    )  # fmt: skip
    units = "prepared: 0 background, about 1 bright tissue" if native is None else "those of the input"
    about = {"units": units, "shape": list(volume.shape), "affine": volume.affine.tolist()}
    write_json(out / f"{name}.json", {"file": volume_path(out, name).name} | record | about)
    return volume


def about_model(ldae: model.LDAE) -> dict:
    """What outputs say about the model: hashes, split, preparation, sampling."""
    sampling = {name: getattr(ldae, name) for name in model.SAMPLING}
    if ldae.inversion_passes:
        sampling["inversion_passes"] = ldae.inversion_passes
    return {"model": ldae.hash, "parts": ldae.hashes, "split": ldae.split_hash,
            "preparation": ldae.preparation.to_dict(), "sampling": sampling}  # fmt: skip


def centred_affine(prep: preprocess.Preparation) -> np.ndarray:
    """Affine (4, 4) of the prepared grid of nobody: RAS+, the middle of the volume at 0 mm."""
    affine = np.diag([prep.spacing_mm] * 3 + [1.0])
    affine[:3, 3] = -prep.spacing_mm * (np.array(prep.shape) - 1) / 2
    return affine
