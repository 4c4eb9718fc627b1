"""MRI-only synthesis: one PET per MRI, on the MRI's grid and affine; of k samples the mean and standard deviation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common import nifti, runtime
from common.cli import UserError
from common.runlog import progress, write_json
from il_cldm import aae, dataset, ldm, prepare
from il_cldm.config import Config


def generate(config: Config, rt: runtime.Runtime) -> None:
    """Write the synthetic PET of a list (or of --mri) and `generation.json`; finished subjects are kept.

    Needs MRI and the two checkpoints only. A subject's noise depends on --seed and its name, not on order or company.
    """
    # ---- setup: everything the user can get wrong, before any network call
    if config.samples < 1 or config.gen_batch < 1 or config.steps < 0:
        raise UserError("--samples and --gen_batch start at 1, --steps at 0")
    out, inputs = Path(config.out or config.syn_Abeta), find_inputs(config)
    autoencoder, aae_hash = aae.load_autoencoder(config, rt)
    trained = ldm.load_denoiser(config, rt, aae_hash)
    grid = trained.preparation or prepare.preparation(config)

    def load_mri(path: Path) -> nifti.Volume:
        return prepare.prepare_in_memory(path, grid, config) if config.native else nifti.load(path)

    check_inputs(rt.shard(list(inputs.values())), trained, config)
    labels = choose_labels(config, inputs, load_mri, trained.num_classes, rt)
    record = {
        "aae": aae_hash, "unet": trained.hash, "seed": config.seed, "sampler": config.sampler, "steps": config.steps,
        "eta": config.eta, "samples": config.samples, "average": config.average, "label": config.label,
        "guidance": config.guidance, "native": config.native, "precision": config.precision,
        "true_label_used": uses_true_label(config), "unit": "PET scaled to [0, 1] as in training",
        "keep_samples": config.keep_samples, "labels": labels,
    }  # fmt: skip
    claim_folder(out, record, config, rt)

    # ---- loop over subjects: each rank takes its share
    mine = [name for name in rt.shard(list(inputs)) if not finished(out, name, config)]
    with progress(len(mine), 0, "generate", enabled=rt.is_main) as bar:
        for name in mine:
            volume = load_mri(inputs[name])
            mri = torch.from_numpy(volume.data)[None, None]
            samples, mean = synthesize(trained, autoencoder, mri, labels[name], dataset.stem(name), config, rt)
            write(out, name, samples, mean, volume, inputs[name], config)
            bar.update()
    rt.barrier()
    rt.print(f"{len(inputs)} synthetic PET in {out}")


def synthesize(
    trained: ldm.Trained, autoencoder, mri: torch.Tensor, label: int | None, key: str, config: Config, rt
) -> tuple[np.ndarray, np.ndarray]:
    """A subject's samples (k, D, H, W) in [0, 1] and their mean (D, H, W); mri: (1, 1, D, H, W).

    Sample j draws from the generator of (seed, subject, j). With --average latent the mean is the decoded mean latent.
    """
    settings = dict(sampler=config.sampler, steps=config.steps, guidance=config.guidance, eta=config.eta, rt=rt)
    cond_map = ldm.condition(trained.denoiser, mri, rt)
    # A batched convolution rounds differently, and saves no time on a CPU: there one by one, to be exact.
    batch = 1 if rt.device.type == "cpu" else config.gen_batch
    volumes, latents = [], []
    for numbers in torch.arange(config.samples).split(batch):
        generators = [runtime.generator(config.seed, key, j) for j in numbers.tolist()]
        z = ldm.sample_latents(trained.denoiser, trained.schedule, cond_map, label, generators, **settings)
        volumes.append(ldm.decode(autoencoder, z, trained.stats, rt)[:, 0].numpy())
        latents.append(z)
    samples = np.concatenate(volumes)
    if config.average == "image" or config.samples == 1:
        return samples, samples.mean(0)
    z_mean = torch.cat(latents).mean(0, keepdim=True)
    return samples, ldm.decode(autoencoder, z_mean, trained.stats, rt)[0, 0].numpy()


def find_inputs(config: Config) -> dict[str, Path]:
    """Output file name -> MRI path: the split list, one file, or every NIfTI of a folder."""
    path = Path(config.mri)
    if not config.mri:
        names = dataset.read_list(config.list_path(config.split))
        found = [dataset.find_volume(config.whole_MRI, name) for name in names]
    elif path.is_dir():
        found = sorted(p for p in path.iterdir() if p.name.endswith(dataset.EXTENSIONS))
        if not found:
            raise UserError(f"no .nii or .nii.gz file in {path}; name a folder of MRI or one file with --mri")
    elif path.is_file():
        found = [path]
    else:
        raise UserError(f"no MRI at {path}; give --mri a NIfTI file or a folder")
    stems = [dataset.stem(p.name) for p in found]
    if twice := {s for s in stems if stems.count(s) > 1}:
        raise UserError(f"{path} holds {min(twice)} as .nii and as .nii.gz; keep one of them")
    return {p.name: p for p in found}


def check_inputs(paths: list[Path], trained: ldm.Trained, config: Config) -> None:
    """UserError for an MRI that cannot be read, is not scaled or does not fit the networks."""
    for path in paths:
        volume = nifti.load(path)
        if config.native:
            continue
        if any(s % aae.COMPRESSION for s in volume.shape):
            raise UserError(f"{path}: shape {volume.shape} is no multiple of {aae.COMPRESSION} per axis; run "
                            "--prepare, or add --native to prepare it in memory")  # fmt: skip
        ldm.check_grid(trained, volume.shape, path)
        dataset.check_values(volume.data, path)


def uses_true_label(config: Config) -> bool:
    """A given class may be the diagnosis itself: such outputs must not be used to detect it."""
    return config.label not in ("none", "predicted")


def choose_labels(
    config: Config, inputs: dict[str, Path], load_mri: Callable, num_classes: int, rt: runtime.Runtime
) -> dict[str, int | None]:
    """Class fed to the sampler per subject: None (no label), the table's, the MRI classifier's, or one for all."""
    config = replace(config, num_classes=num_classes)  # the denoiser decides, not --num_classes
    if config.label == "none":
        return dict.fromkeys(inputs)
    if config.label == "csv":
        table = dataset.read_labels(config)
        return {name: dataset.label_of(table, name, config) for name in inputs}
    if config.label == "predicted":
        from il_cldm.amyloid import predict_labels  # trains a small classifier: only for those who ask

        return predict_labels(config, inputs, load_mri, rt)
    if not config.label.isdecimal() or int(config.label) >= num_classes:
        raise UserError(f"--label {config.label}: give none, csv, predicted or a class from 0 to {num_classes - 1}")
    return dict.fromkeys(inputs, int(config.label))


def claim_folder(out: Path, record: dict, config: Config, rt: runtime.Runtime) -> None:
    """Enter these subjects in OUT/generation.json; UserError if it holds PET of other settings or files not ours.

    With --overwrite the files of other settings are removed first: those that the old record names, and nothing else.
    """
    path = out / "generation.json"
    old = json.loads(path.read_text()) if path.is_file() else {"labels": {}}
    free = ("labels", "keep_samples")
    changed = [f"{k} {old.get(k)} -> {v}" for k, v in record.items() if k not in free and old.get(k) != v]
    changed += [f"label of {name} {old['labels'][name]} -> {label}" for name, label in record["labels"].items()
                if old["labels"].get(name, label) != label]  # fmt: skip
    if changed and old["labels"] and not config.overwrite:
        what = ", ".join(changed)
        raise UserError(f"{out} holds PET of other settings ({what}); name another --out or add --overwrite")
    for name in record["labels"].keys() - old["labels"].keys():
        for file in outputs(out, name, record).values():
            if file.exists():
                raise UserError(f"{file} was not written by --gen; name another --out")
    rt.barrier()  # every rank has judged the folder before rank 0 changes it
    if changed and rt.is_main:
        for name in old["labels"]:
            for file in outputs(out, name, old).values():
                file.unlink(missing_ok=True)
    if not changed:
        record["labels"] = old["labels"] | record["labels"]
        record["keep_samples"] |= old["keep_samples"]
    if rt.is_main:
        write_json(path, record)
    rt.barrier()


def outputs(out: Path, name: str, settings: dict) -> dict[str, Path]:
    """Files of a subject: the PET, and with several samples their standard deviation and (on request) each of them."""
    files = {"pet": out / name}
    if settings["samples"] > 1:
        files["std"] = out / "std" / name
        if settings["keep_samples"]:
            files |= {f"sample{j}": out / f"sample{j}" / name for j in range(settings["samples"])}
    return files


def finished(out: Path, name: str, config: Config) -> bool:
    return all(path.is_file() for path in outputs(out, name, vars(config)).values())


def write(
    out: Path, name: str, samples: np.ndarray, mean: np.ndarray, volume: nifti.Volume, source: Path, config: Config
) -> None:
    """Store a subject's maps with its own affine; --native puts them back on the raw MRI's grid."""
    maps = {"pet": mean} | {f"sample{j}": sample for j, sample in enumerate(samples)}
    if config.samples > 1:
        maps["std"] = samples.std(0, ddof=1)
    for key, path in outputs(out, name, vars(config)).items():
        result = nifti.Volume(maps[key].astype(np.float32), volume.affine)
        if config.native:
            result = nifti.resample_to(result, *nifti.header(source))
        nifti.save(path, result.data.clip(0, 1), result.affine)
