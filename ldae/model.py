"""The trained LDAE: autoencoder, frozen prior, gradient estimator and semantic encoder with what belongs to them.

Two codes of a scan, and back:

    ldae = load_ldae(Path("ldae/runs/ldae_repr_learn/checkpoints/best.ckpt"), rt)
    y, z_0 = ldae.semantic(x), ldae.compress(x)             # x (B, 1, D, H, W), prepared as ldae.preparation says
    z_T = ldae.invert(z_0, y, steps=100)                    # the stochastic code: what y does not say
    x_hat = ldae.decompress(ldae.decode(z_T, y, steps=100)) # (B, 1, D, H, W)

The file holds every tensor once (prefixes aekl., prior., estimator., encoder.) and needs no other file to be used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from common import checkpoint, runtime, schedulers, training
from common.cli import UserError
from ldae import posterior_gap, weights
from ldae.autoencoder import AutoencoderKL
from ldae.encoder import SemanticEncoder, to_slices
from ldae.latents import denormalise, normalise
from ldae.preprocess import Preparation
from ldae.unet import ShiftUNet, UNet

KIND = "ldae representation"
SAMPLING = ("spacing", "final", "clip", "coefficient")  # options of samplers that are stored with the weights


@dataclass(frozen=True)
class LDAE:
    """Frozen networks in eval mode, and the numbers without which their outputs mean nothing.

    Latents z_0, z_T are (B, C, d, h, w) with zero mean and unit variance per channel; codes y are (B, code_dim). All on
    rt.device, float32. `clip`, `spacing`, `final` and `coefficient`: see posterior_gap; `with_sampling` changes them.
    """

    aekl: AutoencoderKL
    decoder: ShiftUNet
    encoder: SemanticEncoder
    settings: dict  # constructor arguments of the networks: "aekl", "unet", "encoder"
    schedule: schedulers.Schedule
    schedule_settings: dict
    stats: dict  # mean (C,) or (C, d, h, w) and SD (C,) of the training latents
    preparation: Preparation
    plane: str  # of the slices that the encoder sees
    rt: runtime.Runtime = field(repr=False)
    split_hash: str | None = None  # of the split that all stages were trained with; None: not known
    hash: str = ""  # of all weights
    hashes: dict | None = None  # of the autoencoder and of the prior alone
    spacing: str = posterior_gap.SPACING
    final: str = posterior_gap.FINAL
    clip: float | None = None
    coefficient: str = "training"
    inversion_passes: int = 0  # of posterior_gap.invert; not stored

    @property
    def code_dim(self) -> int:
        return self.settings["encoder"]["embed_dim"]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, d, h, w) of the latents of a prepared volume."""
        settings = self.settings["aekl"]
        return settings["latent_channels"], *(n // self.aekl.compression for n in self.preparation.shape)

    def with_sampling(self, **options) -> LDAE:
        """The same networks with other sampling options, such as **posterior_gap.UPSTREAM."""
        return replace(self, **options)

    # ---- volumes, latents and codes

    @torch.inference_mode()
    def compress(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """z_0 of prepared volumes (B, 1, D, H, W), normalised: the posterior mean, or with `noise` a draw around it."""
        with self.rt.autocast():
            mu, logvar = self.aekl.encode(x.to(self.rt.device))
        z_0 = mu.float()
        if noise is not None:
            z_0 = self.aekl.sample(z_0, logvar.float(), noise.to(self.rt.device))
        return normalise(z_0, self.stats)

    @torch.inference_mode()
    def decompress(self, z_0: torch.Tensor) -> torch.Tensor:
        """Volumes (B, 1, D, H, W) of z_0, not clipped."""
        with self.rt.autocast():
            x = self.aekl.decode(denormalise(z_0.to(self.rt.device), self.stats))
        return x.float()

    @torch.inference_mode()
    def semantic(self, x: torch.Tensor) -> torch.Tensor:
        """y (B, code_dim) of prepared volumes (B, 1, D, H, W)."""
        with self.rt.autocast():
            y = self.encoder(to_slices(x.to(self.rt.device), self.plane))
        return y.float()

    @torch.inference_mode()
    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Weight of every slice of `plane` in y, (B, S), with sum 1."""
        with self.rt.autocast():
            _, weights = self.encoder(to_slices(x.to(self.rt.device), self.plane), return_attention=True)
        return weights.float()

    # ---- diffusion

    def denoiser(self, y: torch.Tensor | None = None, stop_percent=0.0, steps: int = 0) -> Callable:
        """denoise(z_t, t) for common.schedulers: guided by y, or with None the prior alone.

        stop_percent leaves the last share of `steps` to the prior.
        """
        if y is None:
            return self.prior
        timesteps = schedulers.respace(self.schedule.T, steps, self.spacing) if stop_percent else None
        y = y.to(self.rt.device)
        return posterior_gap.guided_denoiser(self.shift, y, self.schedule, self.coefficient, stop_percent, timesteps)

    def prior(self, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The frozen prior's eps."""
        with self.rt.autocast():
            return self.decoder.prior(z_t, t).float()

    def shift(self, z_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(eps, G): the decoder that posterior_gap's functions take."""
        with self.rt.autocast():
            eps, G = self.decoder(z_t, t, y)
        return eps.float(), G.float()

    @torch.inference_mode()
    def invert(self, z_0: torch.Tensor, y: torch.Tensor | None, steps: int) -> torch.Tensor:
        """The stochastic code z_T of z_0 under y; None: under the prior alone."""
        denoise = self.denoiser(y)
        how = self._how | {"passes": self.inversion_passes}
        return posterior_gap.invert(denoise, z_0.to(self.rt.device), self.schedule, steps, **how)

    @torch.inference_mode()
    def decode(
        self, z_T: torch.Tensor, y: torch.Tensor | None, steps: int, sampler="ddim", stop_percent=0.0, callback=None
    ) -> torch.Tensor:
        """z_0 of both codes in `steps` network calls; sampler "ddim" (inverse of `invert`) or "dpmpp_2m"."""
        denoise = self.denoiser(y, stop_percent, steps)
        return posterior_gap.sample(
            denoise, z_T.to(self.rt.device), self.schedule, steps, sampler=sampler, callback=callback, **self._how
        )  # fmt: skip

    def noise(self, keys: Sequence, seed: int) -> torch.Tensor:
        """Fresh z_T, one per key (a scan's name, a number): the same seed and key give the same bytes in any batch."""
        generators = [runtime.generator(seed, "z_T", key) for key in keys]
        return schedulers.draw_noise(generators, (len(generators), *self.latent_shape), self.rt.device)

    @property
    def _how(self) -> dict:
        return {"spacing": self.spacing, "final": self.final, "clip": self.clip}


# ---- building, saving, loading --------------------------------------------------------------------------------------


def build(
    settings: dict, *, schedule: dict, stats: dict, preparation: Preparation, plane: str, rt: runtime.Runtime,
    sampling: dict | None = None, seed: int = 0, **about,
) -> LDAE:  # fmt: skip
    """An untrained LDAE: the control of every claim about a trained one.

    settings: constructor arguments of the networks, "aekl", "unet", "encoder", and "estimator" where it has own ones;
    schedule: of schedulers.make_schedule;
    sampling: values of SAMPLING.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        aekl = AutoencoderKL(**settings["aekl"])
        decoder = build_decoder(settings)
        encoder = SemanticEncoder(**settings["encoder"])
    aekl, decoder, encoder = (runtime.frozen_network(network, rt) for network in (aekl, decoder, encoder))
    return LDAE(aekl, decoder, encoder, settings, schedulers.make_schedule(**schedule), schedule, stats, preparation,
                plane, rt, **(sampling or {}), **about)  # fmt: skip


def build_decoder(settings: dict) -> ShiftUNet:
    return ShiftUNet(UNet(**settings["unet"]), settings["encoder"]["embed_dim"], **settings.get("estimator", {}))


def state_dict(aekl, decoder: ShiftUNet, encoder) -> dict[str, torch.Tensor]:
    """Every tensor once, under aekl., prior., estimator. and encoder."""
    parts = {"aekl": aekl.state_dict(), "prior": decoder.prior.state_dict(),
             "estimator": decoder.estimator.state_dict(), "encoder": encoder.state_dict()}  # fmt: skip
    return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}


def plain(stats: dict) -> dict[str, list]:
    """Statistics of latents as (nested) lists, for checkpoints and JSON."""
    return {name: torch.as_tensor(values).tolist() for name, values in stats.items()}


def tensors(stats: dict) -> dict[str, torch.Tensor]:
    """Inverse of `plain`."""
    return {name: torch.as_tensor(values) for name, values in stats.items()}


def save_ldae(path: Path, ldae: LDAE, **more) -> None:
    """Write all that `load_ldae` needs to one file, tensors and plain values only."""
    state = state_dict(ldae.aekl, ldae.decoder, ldae.encoder)
    training.save_network(
        path, KIND, state, ldae.settings, schedule=ldae.schedule_settings, latents=plain(ldae.stats),
        preparation=ldae.preparation.to_dict(), plane=ldae.plane, split=ldae.split_hash, hashes=ldae.hashes,
        sampling={name: getattr(ldae, name) for name in SAMPLING}, **more,
    )  # fmt: skip


def load_ldae(path: Path, rt: runtime.Runtime, trust_pickle=False, option="--ldae") -> LDAE:
    """The LDAE of a file that stage 3 (or the importer of the published weights) wrote; UserError for anything else."""
    command = "run_cli.py fit --config ldae/config/ldae_repr_learn.yaml"
    saved = weights.read_network(Path(path), KIND, command, option, trust_pickle)
    if "network" not in saved:
        raise UserError(f"{path} holds weights without what belongs to them; import the original's with `python "
                        f"ldae/scripts/import_weights.py`, or name a file of stage 3 with {option}")  # fmt: skip
    ldae = build(
        saved["config"], schedule=saved["schedule"], stats=tensors(saved["latents"]), plane=saved["plane"], rt=rt,
        preparation=Preparation.from_dict(saved["preparation"]), sampling=saved["sampling"],
        split_hash=saved["split"], hashes=saved["hashes"], hash=saved["hash"],
    )  # fmt: skip
    load_state(ldae, saved["state_dict"], path)
    return ldae


def load_state(ldae: LDAE, state: dict[str, torch.Tensor], path) -> None:
    """Fill the networks from `state_dict`'s keys, strictly; UserError naming `path` if they are of another model."""
    decoder = ldae.decoder
    parts = {"aekl": ldae.aekl, "prior": decoder.prior, "estimator": decoder.estimator, "encoder": ldae.encoder}
    for name, network in parts.items():
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        checkpoint.load_weights(network, own, path)
