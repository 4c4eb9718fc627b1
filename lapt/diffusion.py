"""The conditional latent diffusion model of LAPT: what every diffusion stage trains, and what sampling loads.

    model = load_model(Path("lapt/runs/lapt"), rt)          # a run folder, its best.ckpt, or an exported file
    c = model.condition(ctp)                                # ctp (N, T, X, Y), normalised by model.intensity
    z_0 = model.sample(c, z_T, steps=50)                    # z_T (N, C, x, y), standard normal
    mri = model.decode(z_0)                                 # (N, 2, X, Y): DWI and ADC, normalised

Networks see slices. A volume (B, C, X, Y, Z) becomes B·Z slices by `fold`, and slices become volumes by `unfold`; the
volume networks of the 3D follow-up get whole stacks of `model.slices` slices, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from common import checkpoint, runtime, schedulers, training
from common.cli import UserError
from lapt import conditioner as conditioners
from lapt.autoencoder import VQAutoencoder
from lapt.config import network_file
from lapt.dataset import Intensity
from lapt.unet import UNet

KIND = "lapt ldm"
COMMAND = "main.py --base lapt/configs/ldm.yaml -t"
TRAINED = ("conditioner", "unet")  # what the diffusion stages train, and average


def fold(x: torch.Tensor) -> torch.Tensor:
    """Volumes (B, C, X, Y, Z) as slices (B·Z, C, X, Y); slices stay slices."""
    return x if x.ndim == 4 else x.permute(0, 4, 1, 2, 3).flatten(0, 1)


def unfold(x: torch.Tensor, slices: int) -> torch.Tensor:
    """Slices (B·Z, C, X, Y) as volumes (B, C, X, Y, Z) of Z = `slices`; 0: they stay slices."""
    return x.unflatten(0, (-1, slices)).permute(0, 2, 3, 4, 1) if slices else x


class LatentModel(nn.Module):
    """Frozen autoencoder, conditioner and U-Net with the numbers without which their outputs mean nothing.

    settings: constructor arguments "autoencoder", "conditioner", "unet", the "schedule" (of schedulers.make_schedule),
    "sampling" (spacing, offset, final), "stage", and "slices" (0: 2D). Latents z have zero mean and unit variance per
    channel over the training set: `latent_mean`, `latent_std` (C,) are buffers and travel with the weights.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        conditioner: nn.Module,
        unet: nn.Module,
        *,
        settings: dict,
        intensity: Intensity,
        rt: runtime.Runtime,
        latent_mean: torch.Tensor | None = None,
        latent_std: torch.Tensor | None = None,
    ):
        super().__init__()
        self.autoencoder, self.conditioner, self.unet = autoencoder, conditioner, unet
        self.settings, self.intensity, self.rt = settings, intensity, rt
        channels = settings["unet"]["out_channels"]
        self.register_buffer("latent_mean", torch.zeros(channels) if latent_mean is None else latent_mean)
        self.register_buffer("latent_std", torch.ones(channels) if latent_std is None else latent_std)
        self.schedule = schedulers.make_schedule(**settings["schedule"])
        self.hash = ""  # of the file that the weights came from

    @property
    def stage(self) -> str:
        return self.settings["stage"]

    @property
    def slices(self) -> int:
        """Slices of a volume that the networks see together; 0: every slice by itself."""
        return self.settings["slices"]

    @property
    def mode(self) -> str:
        return "3d" if self.slices else "2d"

    @property
    def multiple(self) -> int:
        """In-plane sizes of images must be multiples of this."""
        return self.autoencoder.factor * self.unet.multiple

    @property
    def ctp_channels(self) -> int:
        """T: frames of the CTP and the maps that follow them."""
        return self.settings["conditioner"]["in_channels"]

    def latent_shape(self, image: torch.Tensor) -> tuple[int, ...]:
        """(N, C, x, y) of the latents of images (N, ?, X, Y)."""
        n, _, *size = image.shape
        return n, self.settings["unet"]["out_channels"], *(side // self.autoencoder.factor for side in size)

    # ---- images and latents

    @torch.no_grad()
    def encode(self, mri: torch.Tensor) -> torch.Tensor:
        """z_0 (N, C, x, y) of normalised images (N, 2, X, Y): the encoder's output before quantisation, normalised."""
        return self.normalise(self.encode_unscaled(mri))

    @torch.no_grad()
    def encode_unscaled(self, mri: torch.Tensor) -> torch.Tensor:
        """The same in the autoencoder's own scale."""
        with self.rt.autocast():
            return self.autoencoder.encode(mri).float()

    def normalise(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (N, C, x, y) in the autoencoder's own scale to z_0."""
        return (z - _channels(self.latent_mean)) / _channels(self.latent_std)

    def decode(self, z_0: torch.Tensor) -> torch.Tensor:
        """Images (N, 2, X, Y) of z_0, which is snapped to the codebook first; gradients pass straight through that."""
        with self.rt.autocast():
            x = self.autoencoder.decode(z_0 * _channels(self.latent_std) + _channels(self.latent_mean))
        return x.float()

    # ---- diffusion

    def condition(self, ctp: torch.Tensor) -> torch.Tensor:
        """c (N, T, x, y) of normalised CTP (N, T, X, Y)."""
        with self.rt.autocast():
            return self.conditioner(ctp).float()

    def denoiser(self, c: torch.Tensor) -> Callable:
        """denoise(z_t, t) -> predicted noise or v, (N, C, x, y), for common.schedulers; t (N,)."""

        def denoise(z_t, t):
            with self.rt.autocast():
                return self.unet(torch.cat([z_t, c], 1), t).float()

        return denoise

    def predict_clean(self, z_t: torch.Tensor, t: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
        """One-step estimate of z_0 from the U-Net's output, not clamped.

        From noise: z_t / sqrt(alpha_bar) - sqrt(1 / alpha_bar - 1) pred; from v: sqrt(alpha_bar) z_t -
        sqrt(1 - alpha_bar) pred.
        """
        return schedulers.x0_from_output(self.schedule, z_t, t, pred)

    def timesteps(self, steps: int) -> list[int]:
        """The decreasing timesteps that a sampler of `steps` steps visits."""
        how = self.settings["sampling"]
        return schedulers.respace(self.schedule.T, steps, how["spacing"], how["offset"])

    @torch.inference_mode()
    def sample(self, c: torch.Tensor, z_T: torch.Tensor, steps: int, sampler: str = "ddim") -> torch.Tensor:
        """z_0 from noise z_T (N, C, x, y) under the condition c; deterministic. sampler: "ddim" or "dpmpp_2m"."""
        run = {"ddim": schedulers.ddim_sample, "dpmpp_2m": schedulers.dpmpp_2m_sample}[sampler]
        final = self.settings["sampling"]["final"]
        return run(self.denoiser(c), z_T, self.schedule, self.timesteps(steps), final=final)


def _channels(values: torch.Tensor) -> torch.Tensor:
    return values.view(1, -1, 1, 1)


# ---- building, saving, loading --------------------------------------------------------------------------------------


def build_conditioner(settings: dict) -> nn.Module:
    """The conditioner of these constructor arguments; "model_channels" makes it the learned one of the 3D follow-up."""
    volume = "model_channels" in settings
    return (conditioners.VolumeConditioner if volume else conditioners.Rescaler)(**settings)


def build_model(settings: dict, intensity: Intensity, rt: runtime.Runtime, checkpointing=False) -> LatentModel:
    """A model of random weights; UserError for sizes that the networks cannot have."""
    try:
        return LatentModel(
            VQAutoencoder(**settings["autoencoder"]), build_conditioner(settings["conditioner"]),
            UNet(**settings["unet"], checkpointing=checkpointing), settings=settings, intensity=intensity, rt=rt,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"{error}; change the options of section model") from error


def save_model(path: Path, model: LatentModel, **more) -> None:
    """Everything that sampling needs in one file of tensors and plain values."""
    state = model.state_dict()
    training.save_network(path, KIND, state, model.settings, intensity=model.intensity.to_dict(), **more)


def read_file(path: Path, kind: str, command: str, option: str, trust_pickle: bool) -> dict:
    """Content of a network file of ours, of a run folder its best.ckpt; UserError if missing or anything else."""
    saved = training.read_network(network_file(path), kind, command, option, trust_pickle)
    if "network" not in saved:
        raise UserError(f"{path} is a checkpoint of the original, or of something else: turn it into a file of ours "
                        "with `python lapt/export.py --import_upstream FILE --out NEW`")  # fmt: skip
    return saved


def load_model(
    path: Path | str, rt: runtime.Runtime, trust_pickle=False, *, option="--resume", weights="average"
) -> LatentModel:
    """The model of a run folder, its best.ckpt or an exported file, frozen, in eval mode, on the runtime's device.

    weights: "average" (EMA, or the raw ones where a run kept no average) or "raw". UserError for anything else there.
    """
    saved = read_file(path, KIND, COMMAND, option, trust_pickle)
    model = build_model(saved["config"], Intensity.from_dict(saved["intensity"]), rt)
    state = saved["state_dict"]
    if weights == "raw":
        if "raw_state_dict" not in saved:
            raise UserError(f"{path} holds only averaged weights: take those, or name a run's best.ckpt")
        state = state | saved["raw_state_dict"]
    checkpoint.load_weights(model, state, path)
    model.hash = saved["hash"]
    return runtime.frozen_network(model, rt)
