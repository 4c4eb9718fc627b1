"""The KL autoencoder of NeuroLDM-3D (the original's "MAISI" VAE is a plain one): volumes to latents and back.

Volumes are (B, 1, D, H, W), mean and log-variance (B, latent_channels, D/f, H/f, W/f); f doubles with every level after
the first.
Published widths (32, 64, 128), one residual block a level, 4 latent channels: 2,929,037 parameters, and a volume of
112 x 136 x 112 becomes a latent of 4 x 28 x 34 x 28. Same function as MONAI's AutoencoderKL (Rombach et al. 2022).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGVAR_RANGE = (-30.0, 20.0)  # exp stays finite


def conv3(c_in: int, c_out: int) -> nn.Conv3d:
    return nn.Conv3d(c_in, c_out, 3, padding=1)


class ResidualBlock(nn.Module):
    """Twice (GroupNorm, SiLU, 3x3x3 convolution), plus the input (by a 1x1x1 convolution if the channels change)."""

    def __init__(self, c_in: int, c_out: int, norm_groups: int, norm_eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, c_in, norm_eps)
        self.conv1 = conv3(c_in, c_out)
        self.norm2 = nn.GroupNorm(norm_groups, c_out, norm_eps)
        self.conv2 = conv3(c_out, c_out)
        self.skip = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Down(nn.Module):
    """Halve every axis, rounding down: a zero voxel at the end of each, then a 3x3x3 convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1) * 3))


class Up(nn.Module):
    """Double every axis: nearest neighbour, then a 3x3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Half(nn.Module):
    """Encoder or decoder: 3x3x3 convolution, residual blocks level by level, GroupNorm, 3x3x3 convolution.

    `levels` is [(channels, number of residual blocks), ...] in the order of the data; `resample` (Down or Up) stands
    between two levels. There is no activation behind the last norm, as in MONAI's autoencoder.
    """

    def __init__(self, c_in, levels, c_out, resample, norm_groups: int, norm_eps: float, checkpointing: bool):
        super().__init__()
        self.checkpointing = checkpointing
        channels = levels[0][0]
        self.conv_in = conv3(c_in, channels)
        self.blocks = nn.ModuleList()
        for level, (width, n_blocks) in enumerate(levels):
            if level > 0:
                self.blocks.append(resample(channels))
            for _ in range(n_blocks):
                self.blocks.append(ResidualBlock(channels, width, norm_groups, norm_eps))
                channels = width
        self.norm_out = nn.GroupNorm(norm_groups, channels, norm_eps)
        self.conv_out = conv3(channels, c_out)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, use_reentrant=False)
            else:
                h = block(h)
        return self.conv_out(self.norm_out(h))


class AutoencoderKL(nn.Module):
    """Variational autoencoder; `compression` voxels become one latent voxel along each axis.

    channels and num_res_blocks: width and number of residual blocks of each level, fine to coarse. An axis that
    `compression` does not divide comes back rounded down. checkpointing recomputes activations in the backward pass.
    """

    def __init__(
        self,
        *,
        channels: tuple[int, ...],
        num_res_blocks: tuple[int, ...],
        latent_channels: int,
        norm_groups: int,
        norm_eps: float = 1e-5,
        image_channels: int = 1,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.compression = 2 ** (len(channels) - 1)
        self.latent_channels = latent_channels
        levels = list(zip(channels, num_res_blocks, strict=True))
        rest = (norm_groups, norm_eps, checkpointing)
        self.encoder = Half(image_channels, levels, latent_channels, Down, *rest)
        self.mean = nn.Conv3d(latent_channels, latent_channels, 1)
        self.logvar = nn.Conv3d(latent_channels, latent_channels, 1)
        self.decoder = Half(latent_channels, levels[::-1], image_channels, Up, *rest)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latent: (B, 1, D, H, W) -> two of (B, latent_channels, d, h, w)."""
        h = self.encoder(x)
        # Deviation (original code): unbounded there; the bounds are MONAI's and not reached in ordinary use.
        return self.mean(h), self.logvar(h).clamp(*LOGVAR_RANGE)

    @staticmethod
    def sample(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
        """Latent mu + sigma * eps with standard normal eps; all of one shape."""
        return mu + (0.5 * logvar).exp() * eps

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, latent_channels, d, h, w) -> volume (B, 1, f d, f h, f w), not clamped."""
        return self.decoder(z)

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x_hat, mu, logvar), decoded from the latent that `eps` (shape of mu) draws."""
        mu, logvar = self.encode(x)
        return self.decode(self.sample(mu, logvar, eps)), mu, logvar
