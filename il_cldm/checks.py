"""--check: all about the data that can be known before training. --dry_run: settings, sizes, memory; writes nothing."""

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
    shape = None
    for volumes in (mri, pet):
        shape = attempt(dataset.check_shapes, volumes, names)
    for name in rt.shard(names):
        for volumes in (mri, pet):
            attempt(dataset.check_voxels, volumes, name)
        attempt(dataset.check_pairs, mri, pet, [name])
    with_regions = Path(config.regions).is_dir()
    for name in rt.shard(names) if with_regions else ():
        attempt(check_region, config, name, mri)
    problems = list(dict.fromkeys(p for part in rt.gather(problems) for p in part))
    for problem in problems:
        rt.print(f"problem: {problem}")
    if problems:
        raise UserError(f"{len(problems)} problem(s) in the data, the first: {problems[0]}")
    counts = dict(sorted(Counter(labels[dataset.stem(n)] for n in names if dataset.stem(n) in labels).items()))
    sizes = ", ".join(f"{len(lists[s])} {s}" for s in SPLITS)
    maps = "yes" if with_regions else "no"
    rt.print(f"data are fine: {sizes}; volumes {shape}; labels {counts}; region maps {maps}")


def check_region(config: Config, name: str, mri: dataset.Volumes) -> None:
    shape, _ = nifti.header(dataset.find_volume(config.regions, name))
    expected = nifti.header(mri.path(name))[0]
    if shape != expected:
        raise UserError(
            f"{dataset.stem(name)}: region map of shape {shape}, MRI {expected}; remake it on the MRI's grid"
        )


def dry_run(config: Config, rt: runtime.Runtime) -> None:
    """Print the resolved configuration, parameter counts, shapes and an estimate of training memory per rank."""
    shape = data_shape(config)
    local = max(1, math.ceil(config.batch_size / rt.world_size / config.accumulate))
    with torch.device("meta"):
        networks = {"autoencoder": build_autoencoder(config), "discriminator": build_discriminator(config),
                    "denoiser": build_denoiser(config)}  # fmt: skip
        autoencoder, discriminator, denoiser = networks.values()
        x = torch.zeros(local, 1, *shape)
        with runtime.SavedBytes() as stage1:
            x_hat = autoencoder(x)[0]
            logits = discriminator(x)
            reconstruction_loss(x_hat, x)
            discriminator(x_hat.detach().requires_grad_())
        z = autoencoder.encode(x).detach()
        index = torch.zeros(local, dtype=torch.long)
        with runtime.SavedBytes() as stage2:
            denoiser(z, denoiser.condition(x), index, index)
    if not rt.is_main:
        return
    print(json.dumps(to_dict(config), indent=2))
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    for name, count in counts.items():
        print(f"{name}: {count:,} parameters")
    print(f"PET and MRI {tuple(x.shape)} -> latent {tuple(z.shape)}, discriminator logits {tuple(logits.shape)}")
    half = 2 if rt.autocast_dtype else 1  # autocast keeps most activations in 16 bits
    for stage, trained, saved, what in (
        ("stage 1", ("autoencoder", "discriminator"), stage1, ("weights", "gradients", "Adam", "Adam")),
        ("stage 2", ("denoiser",), stage2, ("weights", "gradients", "Adam", "Adam", "EMA")),
    ):
        fixed = len(what) * 4 * sum(counts[name] for name in trained) / 2**30
        activations = saved.total / half / 2**30
        print(f"{stage}: about {fixed + activations:.1f} GiB per rank at {local} volume(s) a step "
              f"({', '.join(dict.fromkeys(what))} {fixed:.1f}; activations {activations:.1f})")  # fmt: skip


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
