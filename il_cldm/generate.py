"""MRI-only synthesis: one PET per MRI, on the MRI's grid and affine, with optional mean and standard deviation over k samples."""

from __future__ import annotations

import json
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
    """Write the synthetic PET of a list (or of --mri) plus `generation.json`; finished subjects of the same settings are kept.

    Needs MRI and the two checkpoints only. The noise of a subject depends on --seed and its name, never on order or batch.
    """
    # ---- setup: everything the user can get wrong, before any network call
    out = Path(config.out or config.syn_Abeta)
    inputs = find_inputs(config)
    autoencoder, aae_hash = aae.load_autoencoder(config, rt)
    trained = ldm.load_denoiser(config, rt, aae_hash)
    labels = choose_labels(config, inputs, trained.num_classes, rt)
    if config.native and trained.preparation is None:
        trained = replace(trained, preparation=prepare.preparation(config))
    if config.samples < 1 or config.gen_batch < 1 or config.steps < 0:
        raise UserError("--samples and --gen_batch start at 1, --steps at 0")
    for path in inputs.values():
        shape, _ = nifti.header(path)
        if not config.native and any(s % aae.COMPRESSION for s in shape):
            raise UserError(f"{path}: shape {shape} is no multiple of 4 per axis; run --prepare, or add --native to prepare it in memory")
    record = {
        "aae": aae_hash, "unet": trained.hash, "seed": config.seed, "sampler": config.sampler, "steps": config.steps, "eta": config.eta,
        "samples": config.samples, "average": config.average, "label": config.label, "guidance": config.guidance, "native": config.native,
        "precision": config.precision, "true_label_used": uses_true_label(config), "unit": "PET scaled to [0, 1] as in training",
        "labels": labels,
    }  # fmt: skip
    claim_folder(out, record, config, rt)

    # ---- loop over subjects: each rank takes its share
    mine = [name for name in rt.shard(list(inputs)) if not finished(out, name, config)]
    settings = dict(sampler=config.sampler, steps=config.steps, guidance=config.guidance, eta=config.eta, rt=rt)
    with progress(len(mine), 0, "generate", enabled=rt.is_main) as bar:
        for name in mine:
            volume = prepare.prepare_in_memory(inputs[name], trained.preparation, config) if config.native else nifti.load(inputs[name])
            dataset.check_values(volume.data, inputs[name])
            mri = torch.from_numpy(volume.data)[None, None]
            samples = synthesize(trained, autoencoder, mri, labels[name], dataset.stem(name), config, settings)
            write(out, name, samples, volume, inputs[name], config)
            bar.update()
    rt.barrier()
    if rt.is_main:
        rt.print(f"{len(inputs)} synthetic PET in {out}")


def synthesize(trained: ldm.Trained, autoencoder, mri, label, key: str, config: Config, settings: dict) -> np.ndarray:
    """Samples of one subject, (k, D, H, W) float32 in [0, 1]; with --average latent the one decoded mean latent comes first.

    Sample j draws from the generator of (seed, subject, j).
    """
    rt = settings["rt"]
    cond_map = ldm.condition(trained.denoiser, mri, rt)
    volumes, latents = [], []
    for start in range(0, config.samples, config.gen_batch):
        chunk = range(start, min(start + config.gen_batch, config.samples))
        generators = [runtime.generator(config.seed, key, j) for j in chunk]
        z = ldm.sample_latents(trained.denoiser, trained.schedule, cond_map, label, generators, **settings)
        volumes.append(ldm.decode(autoencoder, z, trained.stats, rt)[:, 0].numpy())
        latents.append(z)
    samples = np.concatenate(volumes)
    if config.average == "latent" and config.samples > 1:
        mean = ldm.decode(autoencoder, torch.cat(latents).mean(0, keepdim=True), trained.stats, rt)[:, 0].numpy()
        samples = np.concatenate([mean, samples])
    return samples


def find_inputs(config: Config) -> dict[str, Path]:
    """Output file name -> MRI path: the split list, one file, or every NIfTI of a folder."""
    if not config.mri:
        return {path.name: path for path in (dataset.find_volume(config.whole_MRI, n) for n in dataset.read_list(config.list_path(config.split)))}
    path = Path(config.mri)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.name.endswith(dataset.EXTENSIONS))
        if not found:
            raise UserError(f"no .nii or .nii.gz file in {path}; name a folder of MRI or one file with --mri")
    elif path.is_file():
        found = [path]
    else:
        raise UserError(f"no MRI at {path}; give --mri a NIfTI file or a folder")
    out = Path(config.out or config.syn_Abeta)
    if out.resolve() in {p.parent.resolve() for p in found}:
        raise UserError(f"output folder {out} holds the input MRI, which would be overwritten; name another --out")
    return {p.name: p for p in found}


def uses_true_label(config: Config) -> bool:
    """A given class may be the diagnosis itself: such outputs must not be used to detect it."""
    return config.label not in ("none", "predicted")


def choose_labels(config: Config, inputs: dict[str, Path], num_classes: int, rt: runtime.Runtime) -> dict[str, int | None]:
    """Class fed to the sampler per subject: None (no label), the table's, the MRI classifier's, or one number for all."""
    names = list(inputs)
    if config.label == "none":
        return dict.fromkeys(names)
    if config.label == "csv":
        table = dataset.read_labels(config)
        return {name: dataset.label_of(table, name, config) for name in names}
    if config.label == "predicted":
        from il_cldm.amyloid import predict_labels  # trains a small classifier: only for those who ask

        return predict_labels(config, inputs, rt)
    if not config.label.isdigit() or int(config.label) >= num_classes:
        raise UserError(f"--label {config.label}: give none, csv, predicted or a class number from 0 to {num_classes - 1}")
    return dict.fromkeys(names, int(config.label))


def claim_folder(out: Path, record: dict, config: Config, rt: runtime.Runtime) -> None:
    """Refuse a folder that holds outputs of other settings, unless --overwrite; then write the settings first."""
    path = out / "generation.json"
    if path.is_file():
        old = json.loads(path.read_text())
        changed = [k for k in record if k != "labels" and old.get(k) != record[k]]
        if changed and not config.overwrite:
            what = ", ".join(f"{k} {old.get(k)} -> {record[k]}" for k in changed)
            raise UserError(f"{out} holds PET of other settings ({what}); name another --out or add --overwrite")
        stale = list(old.get("labels", {})) if changed else []
        if not changed:
            record["labels"] = old["labels"] | record["labels"]
    else:
        stale = [name for name in record["labels"] if (out / name).is_file()]
        if stale and not config.overwrite:
            raise UserError(f"{out / stale[0]} exists and was not written by --gen; name another --out or add --overwrite")
    rt.barrier()  # every rank has judged the folder before rank 0 changes it
    if rt.is_main:
        for name in stale:  # only what this folder's own record names, never other files
            for old_file in [out / name, *out.glob(f"*/{name}")]:
                old_file.unlink(missing_ok=True)
        write_json(path, record)
    rt.barrier()


def outputs(out: Path, name: str, config: Config) -> dict[str, Path]:
    """Files of a subject: the PET, and with several samples their standard deviation and (on request) each of them."""
    files = {"pet": out / name}
    if config.samples > 1:
        files["std"] = out / "std" / name
        if config.keep_samples:
            files |= {f"sample{j}": out / f"sample{j}" / name for j in range(config.samples)}
    return files


def finished(out: Path, name: str, config: Config) -> bool:
    return all(path.is_file() for path in outputs(out, name, config).values())


def write(out: Path, name: str, samples: np.ndarray, volume: nifti.Volume, source: Path, config: Config) -> None:
    """Store the mean (or the only sample) and its companions with the subject's own affine; --native maps back onto the raw grid."""
    single = samples[-config.samples :]
    mean = samples[0] if config.average == "latent" else single.mean(0)
    maps = {"pet": mean.clip(0, 1)}
    if config.samples > 1:
        maps["std"] = single.std(0, ddof=1)
        maps |= {f"sample{j}": single[j] for j in range(config.samples)}
    if config.native:
        shape, affine = nifti.header(source)
        maps = {k: nifti.resample_to(nifti.Volume(v.astype(np.float32), volume.affine), shape, affine).data.clip(0, 1) for k, v in maps.items()}
    else:
        affine = volume.affine
    for key, path in outputs(out, name, config).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        nifti.save(path, maps[key].astype(np.float32), affine)
