"""A diffusion autoencoder on voxels, as deep as LDAE: the yardstick of its speed.

A voxel-space diffusion autoencoder is an LDAE whose compression is the identity, so it is one here: the same class,
encoder, sampler and inversion, with a U-Net on (B, 1, D, H, W). Equal depth means that this U-Net halves the volume
down to the very grid that LDAE's reaches: its fine levels have the autoencoder's widths, its coarse ones the widths,
blocks and attention of LDAE's own U-Net. Deviation (original code): no such network, configuration or benchmark exists
there; its 20x cannot be traced.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from common import runtime, schedulers, training
from common.cli import UserError
from ldae import model
from ldae.encoder import SemanticEncoder
from ldae.preprocess import Preparation
from ldae.unet import NORM_GROUPS

KIND = "ldae voxel"
STATS = {"mean": [0.5], "std": [0.5]}  # [0, 1] -> [-1, 1], as image diffusion has it


class Identity(nn.Module):
    """An autoencoder that compresses nothing: the "latent" of a volume is the volume."""

    compression = 1

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance, both like x (B, 1, D, H, W)."""
        return x, torch.full_like(x, -30.0)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z


def voxel_settings(settings: dict) -> dict:
    """Constructor arguments of the voxel-space model of equal depth from those of an LDAE ("aekl", "unet", "encoder").

    Widths that the group norm does not divide are rounded up (the autoencoder's of small presets).
    """
    unet = dict(settings["unet"])
    groups = unet.get("norm_groups", NORM_GROUPS)
    fine = [-(-width // groups) * groups for width in settings["aekl"]["channels"][:-1]]
    coarse = [unet["base_channels"] * mult for mult in unet["channel_mult"]]
    base = math.gcd(*fine, *coarse)
    unet |= {
        "in_channels": settings["aekl"]["in_channels"], "base_channels": base, "isotropic": True,
        "channel_mult": tuple(width // base for width in (*fine, *coarse)),
        "attention_resolutions": tuple(n * 2 ** len(fine) for n in unet["attention_resolutions"]),
    }  # fmt: skip
    return {"aekl": {"latent_channels": unet["in_channels"]}, "unet": unet, "encoder": dict(settings["encoder"])}


def build(
    settings: dict, *, schedule: dict, preparation: Preparation, plane: str, rt: runtime.Runtime, seed: int = 0, **about
) -> model.LDAE:
    """An untrained voxel-space diffusion autoencoder; settings of `voxel_settings`, the rest as for `model.build`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = model.build_decoder(settings)
        encoder = SemanticEncoder(**settings["encoder"])
    decoder, encoder = (runtime.frozen_network(network, rt) for network in (decoder, encoder))
    return model.LDAE(Identity(), decoder, encoder, settings, schedulers.make_schedule(**schedule), schedule, STATS,
                      preparation, plane, rt, **about)  # fmt: skip


def save(path: Path, dae: model.LDAE) -> None:
    """Write weights and what rebuilds them to one file."""
    state = model.state_dict(dae.aekl, dae.decoder, dae.encoder)
    training.save_network(path, KIND, state, dae.settings, schedule=dae.schedule_settings, plane=dae.plane,
                          preparation=dae.preparation.to_dict())  # fmt: skip


def load(path: Path, rt: runtime.Runtime, option: str = "--voxel") -> model.LDAE:
    """The voxel-space model of a file that `save` wrote; UserError for anything else."""
    if not Path(path).is_file():
        raise UserError(f"no voxel-space model {path}; correct {option} (nothing here trains one)")
    saved = training.read_network(Path(path), KIND, "voxel_dae.py", option, trust_pickle=False)
    dae = build(saved["config"], schedule=saved["schedule"], preparation=Preparation.from_dict(saved["preparation"]),
                plane=saved["plane"], rt=rt, hash=saved["hash"])  # fmt: skip
    model.load_state(dae, saved["state_dict"], path)
    return dae
