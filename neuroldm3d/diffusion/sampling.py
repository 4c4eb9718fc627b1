"""From a trained DiT to volumes: load it with what belongs to it, sample latents by class with guidance, decode them.

Samples are seeded one by one (`sample_generator`): a volume depends on seed, class and number, not on batch or company.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import checkpoint, nifti, runtime, schedulers, training
from common.checkpoint import replacing
from common.cli import UserError
from common.runlog import git_revision, write_json
from neuroldm3d import preprocess, upstream
from neuroldm3d.dataset import CLASSES, SYNTHETIC_RECORD
from neuroldm3d.diffusion.model import DiT3D
from neuroldm3d.VAE import latents

VARIANCES = {"fixedsmall": "small", "fixedlarge": "large"}


@dataclass(frozen=True)
class TrainedDiT:
    """A frozen DiT with the noise schedule and the latent statistics it was trained with."""

    model: DiT3D
    schedule: schedulers.Schedule
    variance: str  # of an ancestral step: "small" or "large"
    stats: dict  # mean and std of the training latents, see latents.statistics
    hash: str  # of the weights that are used
    vae: str | None  # hash of the VAE that made the latents; None: not known (the original's files)
    affine: torch.Tensor | None = None  # (4, 4) of the prepared volumes behind the latents, LAS+
    about: dict | None = None  # label counts and table hash of the training set

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, d, h, w)."""
        return self.model.in_channels, *self.model.in_size


def noise_schedule(kind: str, T: int, beta_start: float, beta_end: float, prediction: str) -> schedulers.Schedule:
    return schedulers.make_schedule(kind, T, beta_start, beta_end, prediction)


def load_dit(path: Path, rt: runtime.Runtime, *, weights="ema", trust_pickle=False, option="--dit") -> TrainedDiT:
    """The DiT of a file, ours or the original's (unnormalised latents, linear schedule of 1000 steps, eps).

    weights: "ema", the average, or "raw", the optimizer's own. UserError for anything else than a DiT.
    """
    saved = training.read_network(path, "neuroldm3d dit", "diffusion/train.py", option, trust_pickle)
    if "network" in saved:
        model, diffusion = DiT3D(**saved["config"]), saved["diffusion"]
        checkpoint.load_weights(model, saved["state_dict" if weights == "ema" else "raw_state_dict"], path)
        schedule = noise_schedule(**diffusion["schedule"])
        variance, stats, affine = diffusion["variance"], saved["latents"], torch.tensor(saved["affine"]).double()
        about = {key: saved[key] for key in ("label_counts", "csv_hash")}
    else:
        kind, model = upstream.from_checkpoint(saved, path, weights=weights)
        if not isinstance(model, DiT3D):
            raise UserError(f"{path} holds a {kind}, not a DiT; name one with {option}")
        schedule, variance = noise_schedule("linear", 1000, 1e-4, 0.02, "eps"), "small"
        affine = about = None
        stats = {"mean": [0.0] * model.in_channels, "std": [1.0] * model.in_channels}
    model = runtime.frozen_network(model, rt)
    used = checkpoint.weights_hash(model.state_dict())
    return TrainedDiT(model, schedule, variance, stats, used, saved.get("vae"), affine, about)


def check_pair(dit: TrainedDiT, vae: latents.TrainedVAE) -> None:
    """UserError unless the DiT was trained on latents of this VAE."""
    if dit.vae not in (None, vae.hash):
        raise UserError(f"the DiT was trained on latents of VAE {dit.vae}, but this VAE is {vae.hash}; give the "
                        "matching pair")  # fmt: skip
    if dit.latent_shape != vae.latent_shape:
        raise UserError(f"the DiT makes latents of shape {dit.latent_shape}, the VAE's have {vae.latent_shape}; give "
                        "the matching pair")  # fmt: skip


def check_guidance(dit: TrainedDiT, guidance: float) -> None:
    """UserError for a guidance scale that needs a null label which the DiT does not have."""
    if dit.model.null_label is None and guidance != 1:
        raise UserError("this DiT was trained without label dropout and has no null label: --guidance must be 1")


def sample_generator(seed: int, label: int, number: int) -> torch.Generator:
    """Source of all noise of synthetic volume `number` of a class."""
    return runtime.generator(seed, "synthetic", CLASSES[label], number)


@torch.inference_mode()
def sample_latents(
    dit: TrainedDiT,
    label: int | None,
    generators: list[torch.Generator],
    rt: runtime.Runtime,
    *,
    sampler: str,
    steps: int,
    guidance: float = 1.0,
    eta: float = 0.0,
    callback: Callable | None = None,
) -> torch.Tensor:
    """One normalised latent per generator, (len(generators), C, d, h, w) on the device.

    label: class, None for the null label. sampler: "ddpm" (ancestral), "ddim" or "dpm" (DPM-Solver++ 2M). steps:
    visited timesteps, 0 for all; guidance other than 0 and 1 calls the network twice in each.
    """
    model, B = dit.model, len(generators)
    check_guidance(dit, 0.0 if label is None else guidance)

    def denoise_with(index: int):
        labels = torch.full((B,), index, device=rt.device)

        def denoise(z_t, t):
            with rt.autocast():
                return model(z_t, t, labels).float()

        return denoise

    if label is None:
        denoise = denoise_with(model.null_label)
    elif guidance == 1:
        denoise = denoise_with(label)
    else:
        # Deviation (original code): guidance acts on all channels; there on three of four, and nothing calls it.
        denoise = schedulers.guided(denoise_with(label), denoise_with(model.null_label), guidance)
    timesteps = schedulers.respace(dit.schedule.T, steps or dit.schedule.T)
    z_T = schedulers.draw_noise(generators, (B, *dit.latent_shape), rt.device)
    common = dict(timesteps=timesteps, callback=callback)
    if sampler == "ddpm":
        return schedulers.ddpm_sample(denoise, z_T, dit.schedule, variance=dit.variance, noise=generators, **common)
    if sampler == "ddim":
        return schedulers.ddim_sample(denoise, z_T, dit.schedule, eta=eta, noise=generators, **common)
    return schedulers.dpmpp_2m_sample(denoise, z_T, dit.schedule, **common)


def synthesize(
    dit: TrainedDiT, vae: latents.TrainedVAE, label: int, numbers: list[int], seed: int, rt: runtime.Runtime, *,
    batch: int = 1, **settings
) -> Iterator[tuple[int, torch.Tensor]]:  # fmt: skip
    """(number, volume (D, H, W) in normalised units, LAS+, on the CPU) for each of these numbers of a class.

    settings: as for `sample_latents`. `batch` volumes at a time; on a CPU one by one, where a batch rounds differently
    and saves no time.
    """
    batch = 1 if rt.device.type == "cpu" else batch
    for start in range(0, len(numbers), batch):
        part = numbers[start : start + batch]
        generators = [sample_generator(seed, label, number) for number in part]
        z = latents.denormalise(sample_latents(dit, label, generators, rt, **settings), dit.stats)
        yield from zip(part, latents.decode(vae.model, z, rt), strict=True)


# ---- files ----------------------------------------------------------------------------------------------------------


def claim_folder(out: Path, record: dict, overwrite: bool, rt: runtime.Runtime) -> None:
    """Write OUT/synthetic.json; UserError if OUT holds volumes of other settings, files not ours, or more than asked.

    record: the settings, and "files": {path below OUT: label}. With `overwrite` the files of other settings are removed
    first: those that the old record names, and nothing else.
    """
    path = out / SYNTHETIC_RECORD
    remedy = "delete the folder or name another --out"
    old = training.read_record(path, ("files",), remedy) if path.is_file() else {"files": {}}
    changed = [f"{k} {old.get(k)} -> {v}" for k, v in record.items() if k != "files" and old.get(k) != v]
    if changed and old["files"] and not overwrite:
        what = ", ".join(changed)
        raise UserError(f"{out} holds synthetic volumes of other settings ({what}); name another --out or add "
                        "--overwrite")  # fmt: skip
    if not changed and old["files"].keys() - record["files"].keys():
        raise UserError(f"{out} holds {len(old['files'])} volumes of these settings, more than the "
                        f"{len(record['files'])} asked for; name another --out")  # fmt: skip
    for name in record["files"].keys() - old["files"].keys():
        if (out / name).exists():
            raise UserError(f"{out / name} was not written by this script; name another --out")
    rt.barrier()  # every rank has judged the folder before rank 0 changes it
    if rt.is_main:
        for name in old["files"] if changed else ():
            (out / name).unlink(missing_ok=True)
            array_path(out / name).unlink(missing_ok=True)
        write_json(path, record | {"git_revision": git_revision()})
    rt.barrier()


def array_path(path: Path) -> Path:
    """The .npz that --npz writes beside a NIfTI volume."""
    return path.with_name(path.name.removesuffix(".nii.gz") + ".npz")


def to_units(x: torch.Tensor, prep: preprocess.Preparation, clip: bool) -> np.ndarray:
    """Normalised (D, H, W) in the units of files; `clip` takes off what is below an empty voxel (native units only)."""
    data = preprocess.denormalise(x.numpy(), prep)
    return np.maximum(data, 0) if clip and prep.norm == "native" else data


def save_volume(path: Path, data: np.ndarray, label: int | None, affine, npz: bool = False) -> None:
    """Volume (D, H, W) of `to_units` as NIfTI with the prepared grid's affine; with `npz` also as an array."""
    if npz:
        buffer = io.BytesIO()
        np.savez(buffer, image=data, label=np.int64(label))
        with replacing(array_path(path)) as file:
            file.write(buffer.getvalue())
    nifti.save(path, data, np.asarray(affine, np.float64))
