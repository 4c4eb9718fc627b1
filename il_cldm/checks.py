"""--check: everything about the data that can be known before training. --dry_run: configuration, sizes and memory, touching nothing."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import torch

from common import nifti, runtime
from common.cli import UserError, to_dict
from il_cldm import dataset
from il_cldm.aae import COMPRESSION
from il_cldm.config import SPLITS, Config
from il_cldm.losses import reconstruction_loss
from il_cldm.model import build_autoencoder, build_denoiser, build_discriminator


def check(config: Config, rt: runtime.Runtime) -> None:
    """Print every problem of lists, labels, volumes, pairs and region maps; UserError if there is one."""
    problems: list[str] = []

    def attempt(function, *args):
        try:
            return function(*args)
        except UserError as error:
            problems.append(str(error))

    lists = attempt(dataset.check_splits, config)
    if lists is None:
        raise UserError(problems[0])
    names = [name for split in SPLITS for name in lists[split]]
    labels = attempt(dataset.read_labels, config)
    if labels is not None:
        for name in lists["train"]:
            attempt(dataset.label_of, labels, name, config)
    mri, pet = dataset.open_volumes(config)
    shapes = {attempt(dataset.check_volumes, volumes, names, rt, what) for volumes, what in ((mri, "MRI"), (pet, "PET"))}
    for name in names:
        attempt(dataset.check_pairs, mri, pet, [name])
    with_regions = Path(config.regions).is_dir()
    if with_regions:
        for name in names:
            attempt(check_region, config, name, mri)
    everywhere = [p for part in rt.gather(problems) for p in part]
    unique = list(dict.fromkeys(everywhere))
    if unique:
        for problem in unique if rt.is_main else ():
            print(f"problem: {problem}")
        raise UserError(f"{len(unique)} problem(s) in the data, the first: {unique[0]}")
    counts = Counter(labels[dataset.stem(n)] for n in names if dataset.stem(n) in labels)
    sizes = ", ".join(f"{len(lists[s])} {s}" for s in SPLITS)
    rt.print(f"data are fine: {sizes}; volumes {shapes.pop()}; labels {dict(sorted(counts.items()))}; region maps {'yes' if with_regions else 'no'}")


def check_region(config: Config, name: str, mri: dataset.Volumes) -> None:
    shape, _ = nifti.header(dataset.find_volume(config.regions, name))
    expected = nifti.header(mri.path(name))[0]
    if shape != expected:
        raise UserError(f"{dataset.stem(name)}: region map of shape {shape}, MRI has {expected}; remake it on the MRI's grid")


class SavedBytes:
    """Counts what autograd keeps for the backward pass; on the meta device that costs neither time nor memory."""

    def __enter__(self):
        self.storages: dict[int, int] = {}
        self.kept = []  # keeps storages alive, so that none is counted under a recycled address
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = tensor.numel() * tensor.element_size()
        self.kept.append(storage)
        return tensor

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    @property
    def total(self) -> int:
        return sum(self.storages.values())


def dry_run(config: Config, rt: runtime.Runtime) -> None:
    """Print the resolved configuration, parameter counts, shapes and an estimate of training memory per rank."""
    shape = data_shape(config)
    local = max(1, math.ceil(config.batch_size / rt.world_size / config.accumulate))
    with torch.device("meta"):
        autoencoder, discriminator, denoiser = build_autoencoder(config), build_discriminator(config), build_denoiser(config)
        x = torch.zeros(local, 1, *shape)
        with SavedBytes() as stage1:
            x_hat = autoencoder(x)[0]
            logits = discriminator(x)
            reconstruction_loss(x_hat, x)
            discriminator(x_hat.detach().requires_grad_())
        z = autoencoder.encode(x)[:, : config.latent_dim]
        with SavedBytes() as stage2:
            denoiser(z.detach(), denoiser.condition(x), torch.zeros(local, dtype=torch.long), torch.zeros(local, dtype=torch.long))
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in
              (("autoencoder", autoencoder), ("discriminator", discriminator), ("denoiser", denoiser))}  # fmt: skip
    if not rt.is_main:
        return
    print(json.dumps(to_dict(config), indent=2))
    for name, count in counts.items():
        print(f"{name}: {count:,} parameters")
    print(f"PET and MRI {tuple(x.shape)} -> latent {tuple(z.shape)}, discriminator logits {tuple(logits.shape)}")
    half = 2 if rt.autocast_dtype else 1  # autocast keeps most activations in 16 bits
    for name, nets, copies, saved in (("stage 1", ("autoencoder", "discriminator"), 4, stage1), ("stage 2", ("denoiser",), 5, stage2)):
        weights = copies * 4 * sum(counts[n] for n in nets)
        print(f"{name}: about {(weights + saved.total / half) / 2**30:.1f} GiB per rank at {local} volume(s) a step "
              f"(weights, gradients, Adam{', EMA' if copies == 5 else ''} {weights / 2**30:.1f}; activations {saved.total / half / 2**30:.1f})")  # fmt: skip


def data_shape(config: Config) -> tuple[int, ...]:
    """Shape of the first training PET if there is one, else of --shape."""
    try:
        name = dataset.read_list(config.list_path("train"))[0]
        shape = nifti.header(dataset.find_volume(config.whole_Abeta, name))[0]
    except UserError:
        shape = config.shape
    if any(s % COMPRESSION for s in shape):
        raise UserError(f"shape {tuple(shape)}: every axis must be a multiple of {COMPRESSION}")
    return tuple(shape)
