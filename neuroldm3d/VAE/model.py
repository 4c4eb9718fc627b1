"""The KL autoencoder of NeuroLDM-3D (the original's "MAISI" VAE is a plain one): volumes to latents and back.

Volumes are (B, 1, D, H, W), mean and log-variance (B, latent_channels, D/f, H/f, W/f); f doubles with every level after
the first.
Published widths (32, 64, 128), one residual block a level, 4 latent channels: 2,929,037 parameters, and a volume of
112 x 136 x 112 becomes a latent of 4 x 28 x 34 x 28. Same function as MONAI's AutoencoderKL (Rombach et al. 2022).
"""

from torch import Tensor, nn

from common.blocks3d import Down, Half, Up

LOGVAR_RANGE = (-30.0, 20.0)  # exp stays finite


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
