"""Volumes to latents and back: VAE files, the latents on disk, their whole-set statistics, the data set over them.

LATENT_DATA/{train,val,test}/NAME_latent.npz holds `mu` and `logvar`, (C, d, h, w) float32 in LAS+ order with 4x larger
voxels, and `label`. LATENT_DATA/latents.json says whose they are: VAE, preparation, affine, tables, and the mean and SD
per channel of z = mu + sigma·eps over the whole training set. Nothing is pickled.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from common import checkpoint, runtime, training
from common.checkpoint import replacing
from common.cli import UserError
from common.runlog import git_revision, write_json
from neuroldm3d import upstream
from neuroldm3d.dataset import CLASSES
from neuroldm3d.preprocess import Preparation
from neuroldm3d.VAE.model import AutoencoderKL

IN_MEMORY = 1 << 30  # bytes: smaller sets are read once, larger ones at every access
KEYS = ("vae", "preparation", "latent_shape", "affine", "splits")  # of latents.json
REMEDY = "delete the folder and run `python neuroldm3d/VAE/save_latent.py` again"


# ---- the VAE and its file -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedVAE:
    """A frozen VAE with the preparation of its volumes and the hash of its weights."""

    model: AutoencoderKL
    preparation: Preparation
    hash: str

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, d, h, w) of the latents of a prepared volume."""
        return self.model.latent_channels, *(n // self.model.compression for n in self.preparation.shape)


def load_vae(path: Path, rt: runtime.Runtime, *, trust_pickle=False, option="--vae", channels_last=False) -> TrainedVAE:
    """The VAE of a file, ours or the original's (whose volumes are z-scored); UserError for anything else."""
    saved = training.read_network(path, "neuroldm3d vae", "VAE/train.py", option, trust_pickle)
    if "network" in saved:
        model = AutoencoderKL(**saved["config"])
        checkpoint.load_weights(model, saved["state_dict"], path)
        preparation = Preparation.from_dict(saved["preparation"])
    else:
        kind, model = upstream.from_checkpoint(saved, path)
        if not isinstance(model, AutoencoderKL):
            raise UserError(f"{path} holds a {kind}, not a VAE; name one with {option}")
        preparation = Preparation(norm="zscore")
    model = runtime.frozen_network(model, rt, channels_last)
    return TrainedVAE(model, preparation, checkpoint.weights_hash(model.state_dict()))


@torch.inference_mode()
def encode(model: nn.Module, x: torch.Tensor, rt: runtime.Runtime) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised volumes (B, 1, D, H, W) to mean and log-variance (B, C, d, h, w), float32 on the CPU."""
    with rt.autocast():
        mu, logvar = model.encode(x.to(rt.device))
    return mu.float().cpu(), logvar.float().cpu()


@torch.inference_mode()
def decode(model: nn.Module, z: torch.Tensor, rt: runtime.Runtime) -> torch.Tensor:
    """Latents (B, C, d, h, w) in the VAE's own scale to normalised volumes (B, D, H, W), float32 on the CPU."""
    with rt.autocast():
        x_hat = model.decode(z.to(rt.device))
    return x_hat[:, 0].float().cpu()


# ---- files ----------------------------------------------------------------------------------------------------------


def record_path(folder: Path) -> Path:
    return Path(folder) / "latents.json"


def latent_path(folder: Path, split: str, name: str) -> Path:
    return Path(folder) / split / f"{name}_latent.npz"


def save_latent(path: Path, mu: torch.Tensor, logvar: torch.Tensor, label: int) -> None:
    """One volume's latent, atomically; same arrays, same bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, mu=mu.numpy(), logvar=logvar.numpy(), label=np.int64(label))
    with replacing(path) as file:
        file.write(buffer.getvalue())


def read_latent(path: Path) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(mu, logvar, label); UserError if the file is missing, damaged or something else."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mu, logvar, label = (arrays[name] for name in ("mu", "logvar", "label"))
    except FileNotFoundError as error:
        raise UserError(f"no latent {path}; run `python neuroldm3d/VAE/save_latent.py` again") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or no latent ({error}); delete it and run save_latent.py again") from error
    return torch.from_numpy(mu), torch.from_numpy(logvar), int(label)


def label_counts(labels) -> dict[str, int]:
    """{"HC": n, "TLE": n}."""
    counts = Counter(labels)
    return {name: counts[i] for i, name in enumerate(CLASSES)}


def claim_folder(folder: Path, record: dict, splits: dict[str, dict], overwrite: bool, rt: runtime.Runtime) -> dict:
    """latents.json with these splits entered; returned. UserError if the folder is another VAE's or a file is not ours.

    record: what all latents share ("vae", "preparation", ...). splits: split -> {"names", "labels", ...}. With
    `overwrite` the files that another VAE's record lists are removed first, and nothing else.
    """
    path = record_path(folder)
    old = training.read_record(path, KEYS, REMEDY) if path.is_file() else record | {"splits": {}}
    fresh = old["vae"] != record["vae"]
    if fresh and not overwrite:
        raise UserError(f"{folder} holds latents of another VAE ({old['vae']}, not {record['vae']}): add "
                        "--overwrite or name another --latents")  # fmt: skip
    for split, entry in splits.items():
        listed = set(old["splits"].get(split, {}).get("names", ()))
        for name in entry["names"]:
            if name not in listed and latent_path(folder, split, name).exists():
                raise UserError(f"{latent_path(folder, split, name)} was not written by save_latent.py; name another "
                                "--latents")  # fmt: skip
    rt.barrier()  # every rank has judged the folder before rank 0 changes it
    if rt.is_main:
        for file in stale_files(folder, old, splits, everything=fresh):
            file.unlink(missing_ok=True)
        kept = {} if fresh else old["splits"]
        statistics = {} if fresh or "train" in splits else {k: old[k] for k in ("mean", "std") if k in old}
        record = record | statistics | {"splits": kept | splits, "git_revision": git_revision()}
        write_json(path, record)
    rt.barrier()
    return json.loads(path.read_text())


def stale_files(folder: Path, old: dict, splits: dict[str, dict], *, everything: bool) -> list[Path]:
    """Our files that must go: all of another VAE; of a split that is written again, those dropped or relabelled."""
    stale = []
    for split, entry in old["splits"].items():
        now = dict(zip(splits[split]["names"], splits[split]["labels"], strict=True)) if split in splits else None
        for name, label in zip(entry["names"], entry["labels"], strict=True):
            if everything or (now is not None and now.get(name) != label):
                stale.append(latent_path(folder, split, name))
    return stale


def read_record(folder: Path, split: str = "train") -> dict:
    """latents.json, with the statistics and the given split in it; UserError otherwise."""
    path = record_path(folder)
    record = training.read_record(path, KEYS, REMEDY) if path.is_file() else {"splits": {}}
    if split not in record["splits"] or "mean" not in record:
        raise UserError(f"no {split} latents in {folder}; encode them with `python neuroldm3d/VAE/save_latent.py`")
    return record


def check_maker(record: dict, vae: TrainedVAE) -> None:
    """UserError unless these latents are of this VAE."""
    if record["vae"] != vae.hash:
        raise UserError(f"the latents are of VAE {record['vae']}, but this VAE is {vae.hash}; name the matching pair")


# ---- statistics of the whole training set ---------------------------------------------------------------------------


def channel_sums(mu: torch.Tensor, logvar: torch.Tensor) -> tuple[int, np.ndarray, np.ndarray]:
    """Voxels, and per channel the sums of E z and of E z² for z = mu + sigma·eps, float64."""
    mu, variance = mu.double().flatten(1), logvar.double().exp().flatten(1)
    return mu.shape[1], mu.sum(1).numpy(), (mu.square() + variance).sum(1).numpy()


def channel_statistics(sums: dict[str, tuple]) -> dict[str, list[float]]:
    """Mean and SD per channel of z over all volumes, from `channel_sums` by name; the order does not matter."""
    parts = [sums[name] for name in sorted(sums)]
    n = sum(part[0] for part in parts)
    mean = sum(part[1] for part in parts) / n
    std = np.sqrt(np.maximum(sum(part[2] for part in parts) / n - mean**2, 0))
    return {"mean": mean.tolist(), "std": std.tolist()}


def voxel_statistics(paths: list[Path]) -> dict[str, torch.Tensor]:
    """Mean latent image (C, d, h, w) of the training set, and per channel the SD of z around it, (C, 1, 1, 1).

    Registered brains are so alike that a channel's own SD is mostly anatomy which everybody shares: what differs
    between people is then far below unit variance and hardly enters the loss. The mean image takes out what is shared.
    """
    total = square = 0
    for path in paths:
        mu, logvar, _ = read_latent(path)
        mu = mu.double()
        total, square = total + mu, square + mu.square() + logvar.double().exp()
    mean = total / len(paths)
    variance = (square / len(paths) - mean.square()).clamp_min(0).mean(dim=(1, 2, 3), keepdim=True)
    return {"mean": mean.float(), "std": variance.sqrt().float()}


def statistics(folder: Path, record: dict, how: str) -> dict:
    """What latents are normalised with: "none" (0 and 1), "channel" (one number each), or "voxel" (the mean image)."""
    channels = len(record["mean"])
    if how == "none":
        return {"mean": [0.0] * channels, "std": [1.0] * channels}
    if how == "channel":
        return {"mean": record["mean"], "std": record["std"]}
    return voxel_statistics([latent_path(folder, "train", name) for name in record["splits"]["train"]["names"]])


def _statistic(values, like: torch.Tensor) -> torch.Tensor:
    """A number per channel, or a map (C, ...), to broadcast against latents (B, C, d, h, w)."""
    values = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    return values.view(1, -1, 1, 1, 1) if values.ndim == 1 else values[None]


def normalise(z: torch.Tensor, stats: dict) -> torch.Tensor:
    """(B, C, ...) latents to zero mean and unit variance over the training set."""
    return (z - _statistic(stats["mean"], z)) / _statistic(stats["std"], z).clamp_min(1e-8)


def denormalise(z: torch.Tensor, stats: dict) -> torch.Tensor:
    """Inverse of `normalise`."""
    return z * _statistic(stats["std"], z).clamp_min(1e-8) + _statistic(stats["mean"], z)


# ---- data set -------------------------------------------------------------------------------------------------------


class LatentDataset(Dataset):
    """Normalised latents (C, d, h, w) float32 with their labels; an item is asked for by (index, position).

    `position` counts samples in the endless stream, so every epoch draws another z = mu + sigma·eps of a volume, the
    same whatever the workers, the ranks and a resume. sample=False gives mu.
    """

    def __init__(self, folder: Path, split: str, record: dict, stats: dict, *, seed: int, sample: bool = True):
        entry, shape = record["splits"][split], tuple(record["latent_shape"])
        self.names, self.labels = entry["names"], entry["labels"]
        self.paths = [latent_path(folder, split, name) for name in self.names]
        self.stats, self.seed, self.sample, self.shape = stats, seed, sample, shape
        missing = next((path for path in self.paths if not path.is_file()), None)
        if missing:
            raise UserError(f"no latent {missing}; run `python neuroldm3d/VAE/save_latent.py` again")
        fits = 8 * int(np.prod(shape)) * len(self.paths) <= IN_MEMORY
        self.kept = [self._read(path) for path in self.paths] if fits else None

    def __len__(self) -> int:
        return len(self.paths)

    def _read(self, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        mu, logvar, _ = read_latent(path)
        if tuple(mu.shape) != self.shape:
            raise UserError(f"{path} has shape {tuple(mu.shape)}, latents.json says {self.shape}; delete it and run "
                            "save_latent.py again")  # fmt: skip
        return mu, logvar

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, int]:
        index, position = item
        z, logvar = self.kept[index] if self.kept else self._read(self.paths[index])
        if self.sample:
            # Deviation (original code): z is normalised below; there the posterior's own noise is most of its variance.
            g = runtime.generator(self.seed, "latent", position)
            z = z + (0.5 * logvar).exp() * torch.randn(z.shape, generator=g)
        return normalise(z[None], self.stats)[0], self.labels[index]
