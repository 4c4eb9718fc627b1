"""Semantic codes of all slices of a store, with the statistics that the latent DPM works in: latent.ckpt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common import checkpoint, runtime
from common.cli import UserError
from common.runlog import progress
from mgdcr import dataset, trainer
from mgdcr.config import EncodeConfig

KIND = "mgdcr latents"


# ---- making ---------------------------------------------------------------------------------------------------------


def export(config: EncodeConfig, rt: runtime.Runtime) -> None:
    """Encode every slice of the store and write OUT; UserError if it exists, or the prior is of another split.

    Deviation (original code): its export crashes, keeps gradients, and takes mean and SD over all subjects.
    """
    out = Path(config.out)
    if out.exists() and not config.overwrite:
        raise UserError(f"{out} exists: replace it with --overwrite, or name another file with --out")
    prior = trainer.load_network(Path(config.ckpt), rt, trust_pickle=config.trust_pickle)
    store, split = dataset.open_store(config, rt)
    if prior.split_hash not in (None, split.hash):
        raise UserError(f"{config.ckpt} was trained with split {prior.split_hash}, {config.split} is {split.hash}: "
                        "give the split of its training with --split")  # fmt: skip
    data = dataset.Slices(store, (*split.train, *split.val, *split.test), prior.image_size)
    codes = encode(prior.model, data, config.batch_size, rt)
    parts = [split.part(subject) for subject in data.subjects]
    train = codes[torch.tensor([part == "train" for part in parts])].double()
    if len(train) < 2:
        raise UserError(f"{config.store} has {len(train)} slices of training subjects, at least 2 are needed")
    if rt.is_main:
        checkpoint.save(out, {
            "network": KIND, "conds": codes, "conds_mean": train.mean(0).float(), "conds_std": train.std(0).float(),
            "keys": list(data.keys), "parts": parts, "prior": prior.hash, "split": split.hash, "data": store.hash,
        })  # fmt: skip
        rt.print(f"{len(codes)} codes of {codes.shape[1]} numbers ({out})")
    rt.barrier()


@torch.inference_mode()
def encode(model, data, batch_size: int, rt: runtime.Runtime) -> Tensor:
    """Codes (M, k), float32 on the CPU, of all slices of a data set, in its order; a collective call."""
    chunks = [range(i, min(i + batch_size, len(data))) for i in range(0, len(data), batch_size)]
    mine, found = rt.shard(chunks), {}
    with progress(len(mine), 0, "encode", enabled=rt.is_main) as bar:
        for chunk in mine:
            x_0 = torch.stack([data[n] for n in chunk]).to(rt.device)
            found[chunk.start] = model.encode(x_0).float().cpu()
            bar.update()
    codes = {start: z for part in rt.gather(found) for start, z in part.items()}
    return torch.cat([codes[chunk.start] for chunk in chunks])


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latents:
    """Codes (M, k) with the part of each, mean and SD of the training ones, the hash of their prior and their own."""

    codes: Tensor
    parts: list[str]
    mean: Tensor
    std: Tensor
    prior: str
    split_hash: str | None
    hash: str

    def standardised(self, part: str) -> Tensor:
        """Codes (n, k) of "train", "val" or "test" with mean and SD of the training ones taken out."""
        rows = torch.tensor([p == part for p in self.parts])
        return standardise(self.codes[rows], self.mean, self.std)


def standardise(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Codes (B, k) with mean and SD per entry, (k,), taken out; entries that never change become 0."""
    return (z - mean) / std.clamp_min(1e-6)


def restore(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Inverse of `standardise`."""
    return z * std.clamp_min(1e-6) + mean


def load(path: Path) -> Latents:
    """The codes of a latent.ckpt; UserError if it is missing or something else."""
    if not path.is_file():
        raise UserError(f"no codes at {path}; make them with `python mgdcr/encode.py` or name others with --latents")
    saved = checkpoint.load(path)
    names = ("network", "conds", "conds_mean", "conds_std", "parts", "prior", "split")
    if saved.get("network") != KIND or not saved.keys() >= set(names):
        raise UserError(f"{path} holds no codes: make them with `python mgdcr/encode.py`")
    digest = checkpoint.weights_hash({"conds": saved["conds"]})
    return Latents(saved["conds"], saved["parts"], saved["conds_mean"], saved["conds_std"], saved["prior"],
                   saved["split"], digest)  # fmt: skip


def check_prior(prior: trainer.TrainedNetwork, maker: str, what: str, ckpt: str) -> None:
    """UserError unless `what` was made from codes of this prior."""
    if prior.hash != maker:
        raise UserError(f"{what} belongs to codes of prior {maker}, {ckpt} is {prior.hash}: give the matching pair, or "
                        "run encode.py and latent_dpm.py again")  # fmt: skip


def check_parts(latents: Latents, path: str) -> dict[str, Tensor]:
    """Standardised codes (n, k) of train and val; UserError for fewer than two of either."""
    z = {part: latents.standardised(part) for part in ("train", "val")}
    for part, codes in z.items():
        if len(codes) < 2:
            raise UserError(f"{path} has {len(codes)} codes of {part} subjects, at least 2 are needed: encode more "
                            "subjects with `python mgdcr/encode.py`")  # fmt: skip
    return z
