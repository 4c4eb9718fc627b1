"""The KL autoencoder of LDAE (stage 1), volumes to latents and back, and the patch discriminator it trains against.

Volumes are (B, 1, D, H, W), mean and log-variance (B, latent_channels, D/f, H/f, W/f); f doubles with every level after
the first. At the paper's widths (64, 128, 128, 128) with two residual blocks a level and 3 latent channels, 13,766,248
parameters make of a volume of 128 x 160 x 128 a latent of 3 x 16 x 20 x 16. Sizes after Pinaya et al. 2022; the same
function as MONAI's AutoencoderKL (Rombach et al. 2022).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks3d import Down, Half, SyncBatchNorm3d, Up

NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


class AutoencoderKL(nn.Module):
    """Variational autoencoder; `compression` voxels become one latent voxel along each axis.

    channels: width of each level, fine to coarse; num_res_blocks: residual blocks of each level, one number for all or
    one each. An axis that `compression` does not divide comes back rounded down. checkpointing recomputes activations
    in the backward pass.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        latent_channels: int,
        num_res_blocks: int | Sequence[int],
        norm_groups: int,
        checkpointing: bool = False,
    ):
        super().__init__()
        if odd := [width for width in channels if width % norm_groups]:
            raise ValueError(f"autoencoder width {odd[0]} is no multiple of its {norm_groups} norm groups")
        if isinstance(num_res_blocks, int):
            num_res_blocks = [num_res_blocks] * len(channels)
        self.compression = 2 ** (len(channels) - 1)
        self.latent_channels = latent_channels
        levels = list(zip(channels, num_res_blocks, strict=True))
        rest = (norm_groups, NORM_EPS, checkpointing)
        self.encoder = Half(in_channels, levels, latent_channels, Down, *rest)
        self.mean = nn.Conv3d(latent_channels, latent_channels, 1)
        self.logvar = nn.Conv3d(latent_channels, latent_channels, 1)
        self.latent = nn.Conv3d(latent_channels, latent_channels, 1)
        self.decoder = Half(latent_channels, levels[::-1], out_channels, Up, *rest)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (in [-30, 20]) of the latent: (B, in, D, H, W) -> two of (B, latent, d, h, w)."""
        h = self.encoder(x)
        return self.mean(h), self.logvar(h).clamp(*LOGVAR_RANGE)

    @staticmethod
    def sample(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
        """Latent mu + sigma * eps with standard normal eps; all of one shape."""
        return mu + (0.5 * logvar).exp() * eps

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, latent_channels, d, h, w) -> volume (B, out_channels, f d, f h, f w), not clamped."""
        return self.decoder(self.latent(z))

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x_hat, mu, logvar), decoded from the latent that `eps` (shape of mu) draws."""
        mu, logvar = self.encode(x)
        return self.decode(self.sample(mu, logvar, eps)), mu, logvar


class PatchDiscriminator(nn.Module):
    """Real or generated, patch by patch (Isola et al. 2017, in 3D): (B, C, D, H, W) -> logit map (B, 1, d, h, w).

    4x4x4 convolutions with LeakyReLU 0.2: one to `channels`, then `layers` more with batch norm, each doubling the
    width, then one to the logits. All but the last two have stride 2. At 64 channels and 3 layers 11,048,769 parameters
    give 14 x 18 x 14 logits of a volume of 128 x 160 x 128. Statistics of batch norm cover all ranks.
    """

    def __init__(self, *, in_channels: int, channels: int, layers: int):
        super().__init__()
        self.conv_in = nn.Conv3d(in_channels, channels, 4, stride=2, padding=1)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for i in range(layers):
            stride = 2 if i < layers - 1 else 1
            self.convs.append(nn.Conv3d(channels, 2 * channels, 4, stride, padding=1, bias=False))
            self.norms.append(SyncBatchNorm3d(2 * channels))
            channels *= 2
        self.conv_out = nn.Conv3d(channels, 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm3d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def features(self, x: Tensor) -> list[Tensor]:
        """Feature map of every layer in order; the last one is the logit map."""
        maps = [F.leaky_relu(self.conv_in(x), 0.2)]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            maps.append(F.leaky_relu(norm(conv(maps[-1])), 0.2))
        return [*maps, self.conv_out(maps[-1])]

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)[-1]
