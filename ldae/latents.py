"""Scans to latents and back: autoencoder files, latents on disk, their whole-set statistics, the data set over them.

LATENTS/<scan>.npz holds `mu` and `logvar`, (C, d, h, w) float32, RAS+ order, and the `affine` of that grid.
LATENTS/latents.json says whose they are: autoencoder, preparation, split, each file's hash, and mean and SD per channel
of z = mu + sigma·eps over the whole training split. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from common import checkpoint, runtime, training
from common.checkpoint import replacing
from common.cli import UserError
from common.runlog import write_json
from ldae import upstream, weights
from ldae.autoencoder import AutoencoderKL
from ldae.dataset import Row
from ldae.preprocess import Preparation

KIND = "ldae aekl"
COMMAND = "run_cli.py fit --config ldae/config/aekl.yaml"
SCRIPT = "`python ldae/scripts/save_compressed_latent.py`"
IN_MEMORY = 1 << 30  # bytes: smaller sets are read once, larger ones at every access
KEYS = ("aekl", "preparation", "latent_shape", "split", "scans")  # of latents.json
REMEDY = f"delete the folder and run {SCRIPT} again"


# ---- the autoencoder and its file -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedAEKL:
    """A frozen autoencoder, its constructor arguments, the preparation of its volumes, the hash of its weights."""

    model: AutoencoderKL
    settings: dict
    preparation: Preparation
    hash: str
    split_hash: str | None = None  # of the split it was trained with; None: not known

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, d, h, w) of the latents of a prepared volume."""
        return self.model.latent_channels, *(n // self.model.compression for n in self.preparation.shape)


def load_aekl(path: Path, rt: runtime.Runtime, *, trust_pickle=False, option="--aekl") -> TrainedAEKL:
    """The autoencoder of a file: our checkpoint, our safetensors, or weights of the original (bare state dict or whole
    checkpoint; their volumes are prepared as the original does). UserError for anything else.
    """
    saved = weights.read_network(Path(path), KIND, COMMAND, option, trust_pickle)
    if "network" in saved:
        settings, preparation = saved["config"], Preparation.from_dict(saved["preparation"])
        model = AutoencoderKL(**settings)
        if saved.get("names") == "original":  # of an exported file
            upstream.load(model, saved["state_dict"])
        else:
            checkpoint.load_weights(model, saved["state_dict"], path)
    else:
        _, model = upstream.from_checkpoint(saved, path, want="aekl")
        settings, preparation = upstream.aekl_settings(model), Preparation.upstream()
    model = runtime.frozen_network(model, rt)
    found = checkpoint.weights_hash(model.state_dict())
    return TrainedAEKL(model, settings, preparation, found, saved.get("split"))


@torch.inference_mode()
def encode(model: nn.Module, x: torch.Tensor, rt: runtime.Runtime) -> tuple[torch.Tensor, torch.Tensor]:
    """Prepared volumes (B, 1, D, H, W) to mean and log-variance (B, C, d, h, w), float32 on the CPU."""
    with rt.autocast():
        mu, logvar = model.encode(x.to(rt.device))
    return mu.float().cpu(), logvar.float().cpu()


@torch.inference_mode()
def decode(model: nn.Module, z: torch.Tensor, rt: runtime.Runtime) -> torch.Tensor:
    """Latents (B, C, d, h, w) in the autoencoder's own scale to volumes (B, 1, D, H, W), float32 on the CPU."""
    with rt.autocast():
        x_hat = model.decode(z.to(rt.device))
    return x_hat.float().cpu()


# ---- files ----------------------------------------------------------------------------------------------------------


def record_path(folder: Path) -> Path:
    return Path(folder) / "latents.json"


def latent_path(folder: Path, scan: str) -> Path:
    return Path(folder) / f"{scan}.npz"


def save_latent(path: Path, mu: torch.Tensor, logvar: torch.Tensor, affine: np.ndarray) -> None:
    """One scan's latent, atomically; same arrays, same bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, mu=mu.numpy(), logvar=logvar.numpy(), affine=np.asarray(affine, np.float64))
    with replacing(path) as file:
        file.write(buffer.getvalue())


def read_latent(path: Path, expected: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(mu, logvar), (C, d, h, w) each; UserError if missing, damaged, something else, or not of hash `expected`."""
    try:
        raw = Path(path).read_bytes()
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            mu, logvar = (torch.from_numpy(arrays[name]) for name in ("mu", "logvar"))
    except FileNotFoundError as error:
        raise UserError(f"no latent {path}; run {SCRIPT} again") from error
    except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or no latent ({error}); delete it and run {SCRIPT} again") from error
    if expected not in (None, bytes_hash(raw)):
        raise UserError(f"{path} has changed since latents.json was written; delete it and run {SCRIPT} again")
    return mu, logvar


def bytes_hash(raw: bytes) -> str:
    """Sixteen hex digits of the SHA-256."""
    return hashlib.sha256(raw).hexdigest()[:16]


def claim_folder(folder: Path, record: dict, overwrite: bool, rt: runtime.Runtime) -> None:
    """Enter `record` as latents.json. UserError if the folder is another autoencoder's, holds latents of scans that
    `record` does not list, or a file that is not ours.

    With `overwrite` the latents that the old record lists and that do not fit are removed first, and nothing else;
    those of scans whose files have changed always. Statistics and hashes are written when the encoding is finished.
    """
    path = record_path(folder)
    old = training.read_record(path, KEYS, REMEDY) if path.is_file() else record | {"scans": {}}
    another = any(old[key] != record[key] for key in ("aekl", "preparation"))
    if another and not overwrite:
        raise UserError(f"{folder} holds latents of another autoencoder ({old['aekl']}, not {record['aekl']}): add "
                        "--overwrite or name another --output_dir")  # fmt: skip
    dropped = [scan for scan in old["scans"] if scan not in record["scans"]]
    stale = [scan for scan, entry in old["scans"].items()
             if "source" in entry and entry["source"] != record["scans"].get(scan, entry)["source"]]  # fmt: skip
    if dropped and not overwrite:
        raise UserError(f"{folder} holds latents of {len(dropped)} scans that the table does not list, such as "
                        f"{dropped[0]}: add --overwrite to remove them, or name another --output_dir")  # fmt: skip
    for scan in record["scans"]:
        if scan not in old["scans"] and latent_path(folder, scan).exists():
            raise UserError(f"{latent_path(folder, scan)} was not written by save_compressed_latent.py; name another "
                            "--output_dir")  # fmt: skip
    rt.barrier()  # every rank has judged the folder before rank 0 changes it
    if rt.is_main:
        for scan in old["scans"] if another else [*dropped, *stale]:
            latent_path(folder, scan).unlink(missing_ok=True)
        write_json(path, record)
    rt.barrier()


def read_record(folder: Path) -> dict:
    """latents.json of a folder whose encoding was finished; UserError otherwise."""
    path = record_path(folder)
    if not path.is_file():
        raise UserError(f"no latents in {folder}; encode the scans with {SCRIPT}")
    record = training.read_record(path, KEYS, REMEDY)
    if "mean" not in record:
        raise UserError(f"the latents in {folder} are not complete; run {SCRIPT} again, it continues")
    return record


def check_maker(record: dict, aekl: TrainedAEKL) -> None:
    """UserError unless these latents are of this autoencoder."""
    if record["aekl"] != aekl.hash:
        raise UserError(f"the latents are of autoencoder {record['aekl']}, but this one is {aekl.hash}; name the "
                        f"matching pair, or encode again with {SCRIPT}")  # fmt: skip


# ---- statistics of the whole training split -------------------------------------------------------------------------


def channel_sums(mu: torch.Tensor, logvar: torch.Tensor) -> tuple[int, np.ndarray, np.ndarray]:
    """Voxels, and per channel the sums of E z and of E z² for z = mu + sigma·eps, float64."""
    mu, variance = mu.double().flatten(1), logvar.double().exp().flatten(1)
    return mu.shape[1], mu.sum(1).numpy(), (mu.square() + variance).sum(1).numpy()


def channel_statistics(sums: dict[str, tuple]) -> dict[str, list[float]]:
    """Mean, SD and scale 1/SD per channel of z over all scans, from `channel_sums` by name; the order does not matter.

    Var z = var(mu) + mean(exp(logvar)).
    """
    parts = [sums[name] for name in sorted(sums)]
    n = sum(part[0] for part in parts)
    mean = sum(part[1] for part in parts) / n
    std = np.sqrt(np.maximum(sum(part[2] for part in parts) / n - mean**2, 1e-16))
    return {"mean": mean.tolist(), "std": std.tolist(), "scale": (1 / std).tolist()}


def statistics(record: dict, how: str = "dataset") -> dict[str, list[float]]:
    """{"mean", "std"} per channel to normalise latents with: of the training split, or the original's constant."""
    if how == "upstream":
        channels = len(record["mean"])
        return {"mean": [0.0] * channels, "std": [1 / upstream.LATENT_SCALE] * channels}
    return {"mean": record["mean"], "std": record["std"]}


def voxel_statistics(folder: Path, rows: list[Row], record: dict) -> dict[str, list]:
    """Mean latent image (C, d, h, w) of these scans, and per channel the SD of z around it; nested lists.

    Registered brains are so alike that a channel's own SD is mostly anatomy which everybody shares: what differs
    between people is then far below unit variance and hardly enters the loss. The mean image takes out what is shared.
    """
    total = square = 0
    for path, expected in (locate(Path(folder), row, record) for row in rows):
        mu, logvar = (x.double() for x in read_latent(path, expected))
        total, square = total + mu, square + mu.square() + logvar.exp()
    mean = total / len(rows)
    variance = (square / len(rows) - mean.square()).clamp_min(1e-16).mean(dim=(1, 2, 3))
    return {"mean": mean.float().tolist(), "std": variance.sqrt().tolist()}


def _statistic(values, like: torch.Tensor) -> torch.Tensor:
    """A number per channel, or a map (C, d, h, w), to broadcast against latents (B, C, d, h, w) or (C, d, h, w)."""
    values = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    return values.view(-1, 1, 1, 1) if values.ndim == 1 else values


def normalise(z: torch.Tensor, stats: dict) -> torch.Tensor:
    """Latents (..., C, d, h, w) to zero mean and unit variance over the training split."""
    return (z - _statistic(stats["mean"], z)) / _statistic(stats["std"], z)


def denormalise(z: torch.Tensor, stats: dict) -> torch.Tensor:
    """Inverse of `normalise`."""
    return z * _statistic(stats["std"], z) + _statistic(stats["mean"], z)


def normalise_posterior(mu: torch.Tensor, logvar: torch.Tensor, stats: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of the normalised latent."""
    return normalise(mu, stats), logvar - 2 * _statistic(stats["std"], logvar).log()


def sample(mu: torch.Tensor, logvar: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """mu + sigma·eps."""
    return AutoencoderKL.sample(mu, logvar, eps)


# ---- data set -------------------------------------------------------------------------------------------------------


class Latents(Dataset):
    """Normalised posteriors of scans: item -> (mu, logvar), (C, d, h, w) float32 each; an item is (index, position).

    `position` counts samples in the endless stream; `draw` makes of it a latent that is another one every epoch, the
    same whatever the workers, the ranks and a resume.
    """

    def __init__(self, folder: Path, rows: list[Row], record: dict, stats: dict, *, seed: int):
        """record: `read_record(folder)`; stats: `statistics(record)`. UserError if a scan has no latent of it."""
        self.rows, self.stats, self.seed = rows, stats, seed
        self.shape = tuple(record["latent_shape"])
        found = [locate(Path(folder), row, record) for row in rows]
        self.paths, self.hashes = [path for path, _ in found], [expected for _, expected in found]
        fits = 8 * int(np.prod(self.shape)) * len(rows) <= IN_MEMORY
        self.kept = [self._read(i) for i in range(len(rows))] if fits else None

    def __len__(self) -> int:
        return len(self.rows)

    def _read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        mu, logvar = read_latent(self.paths[index], self.hashes[index])
        if tuple(mu.shape) != self.shape or mu.shape != logvar.shape:
            raise UserError(f"{self.paths[index]} has shape {tuple(mu.shape)}, latents.json says {self.shape}; delete "
                            f"it and run {SCRIPT} again")  # fmt: skip
        return normalise_posterior(mu, logvar, self.stats)

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        index = item[0] if isinstance(item, tuple) else item
        return self.kept[index] if self.kept else self._read(index)

    def draw(self, item: tuple[int, int]) -> torch.Tensor:
        """Normalised latent (C, d, h, w) of a scan, drawn anew for every position of the stream."""
        # Deviation (original code): there one unseeded draw per scan is stored and used in every epoch.
        mu, logvar = self[item]
        g = runtime.generator(self.seed, "latent", item[1])
        return sample(mu, logvar, torch.randn(mu.shape, generator=g))


def locate(folder: Path, row: Row, record: dict) -> tuple[Path, str]:
    """File of a scan's latent and its hash: the table's latent_path, or the one in `folder`; UserError if it is not of
    the autoencoder and preparation of `record`.
    """
    path, own = row.latent_path or latent_path(folder, row.scan), record
    if path.parent.resolve() != folder.resolve():
        own = read_record(path.parent)
        if any(own[key] != record[key] for key in ("aekl", "preparation")):
            raise UserError(f"{path} (column latent_path) is of autoencoder {own['aekl']}, the latents in {folder} of "
                            f"{record['aekl']}; encode again with {SCRIPT}, or empty the column")  # fmt: skip
    entry = own["scans"].get(path.stem)
    if entry is None:
        raise UserError(f"latents.json beside {path} does not list scan {row.scan}; encode the table with {SCRIPT}")
    return path, entry["hash"]
