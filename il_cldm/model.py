"""The three networks of IL-CLDM: autoencoder, patch discriminator, and the image- and label-conditioned denoiser.

Ou et al., "Image-and-Label Conditioning Latent Diffusion Model", IEEE JBHI 29(2):1221-1231, 2025.
Volumes are (B, 1, D, H, W) in [0, 1]; a latent is (B, latent_dim, D/4, H/4, W/4). Every network is fully convolutional.
Parameters at the paper's widths: autoencoder 1,396,178, discriminator 697,809, denoiser 72,970,130 (no null class).
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.blocks3d import (
    SelfAttention3d,
    SyncBatchNorm3d,
    match_size,
    sinusoidal_embedding,
    sinusoidal_frequencies,
)

DOWNSAMPLING = 4  # image voxels per latent voxel and axis: two stride-2 layers in encoder, decoder, image conditioner
CONDITIONER_WIDTH = 16  # channels (and norm groups) inside the image conditioner


def conv3(c_in: int, c_out: int) -> nn.Conv3d:
    return nn.Conv3d(c_in, c_out, 3, padding=1)


def halve(c_in: int, c_out: int, bias: bool = True) -> nn.Conv3d:
    """Halve every axis; an odd axis is rounded down."""
    return nn.Conv3d(c_in, c_out, 4, stride=2, padding=1, bias=bias)


def double(channels: int) -> nn.ConvTranspose3d:
    return nn.ConvTranspose3d(channels, channels, 4, stride=2, padding=1)


# ------------------------------------------------------------------------------------------------------------ stage 1


class ResidualBlock(nn.Module):
    """Twice (GroupNorm, ReLU, 3x3x3 convolution), plus the input (by a 1x1x1 convolution if the channels change)."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = conv3(c_in, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = conv3(c_out, c_out)
        self.skip = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x).relu())
        h = self.conv2(self.norm2(h).relu())
        return self.skip(x) + h


class Encoder(nn.Module):
    """Image (B, image_channels, D, H, W) -> (B, out_channels, D//4, H//4, W//4); an axis not divisible by 4 is cut."""

    def __init__(self, image_channels: int, width: int, out_channels: int, groups: int, checkpointing: bool = False):
        super().__init__()
        self.checkpointing = checkpointing
        self.conv_in = conv3(image_channels, width)
        self.res1 = ResidualBlock(width, 2 * width, groups)
        self.down1 = halve(2 * width, 2 * width)
        self.res2 = ResidualBlock(2 * width, 4 * width, groups)
        self.down2 = halve(4 * width, 4 * width)
        self.res3 = ResidualBlock(4 * width, 4 * width, groups)
        self.norm_out = nn.GroupNorm(groups, 4 * width, eps=1e-6)
        self.conv_out = conv3(4 * width, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        h = self.down1(run_block(self, self.res1, h))  # (B, 2 width, D/2, H/2, W/2)
        h = self.down2(run_block(self, self.res2, h))  # (B, 4 width, D/4, H/4, W/4)
        h = run_block(self, self.res3, h)
        return self.conv_out(self.norm_out(h).relu())


class Decoder(nn.Module):
    """Latent (B, latent_dim, d, h, w) -> image (B, image_channels, 4d, 4h, 4w); no output activation, callers clamp."""

    def __init__(self, image_channels: int, width: int, latent_dim: int, groups: int, checkpointing: bool = False):
        super().__init__()
        self.checkpointing = checkpointing
        self.conv_in = conv3(latent_dim, 4 * width)
        self.res1 = ResidualBlock(4 * width, 4 * width, groups)
        self.res2 = ResidualBlock(4 * width, 4 * width, groups)
        self.res3 = ResidualBlock(4 * width, 2 * width, groups)
        self.up1 = double(2 * width)
        self.res4 = ResidualBlock(2 * width, width, groups)
        self.up2 = double(width)
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = conv3(width, image_channels)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for block in (self.res1, self.res2, self.res3):
            h = run_block(self, block, h)
        h = run_block(self, self.res4, self.up1(h))  # (B, width, 2d, 2h, 2w)
        h = self.up2(h)  # (B, width, 4d, 4h, 4w)
        return self.conv_out(self.norm_out(h).relu())


class Autoencoder(nn.Module):
    """Deterministic autoencoder of the paper (its "AAE"); with kl=True the encoder gives mean and log-variance instead.

    forward(x, noise=None) -> (x_hat, mean, logvar), logvar None without kl. With kl and noise (shape of the mean) the
    decoder sees mean + std * noise, otherwise the mean.
    """

    def __init__(
        self,
        image_channels: int,
        width: int,
        latent_dim: int,
        groups: int,
        kl: bool = False,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.latent_dim, self.kl = latent_dim, kl
        self.encoder = Encoder(image_channels, width, latent_dim * (2 if kl else 1), groups, checkpointing)
        self.decoder = Decoder(image_channels, width, latent_dim, groups, checkpointing)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.kl:
            return self.encoder(x), None
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, x: Tensor) -> Tensor:
        """The latent (the posterior mean with kl): (B, C, D, H, W) -> (B, latent_dim, D//4, H//4, W//4)."""
        return self.posterior(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Latent to image, not clamped."""
        return self.decoder(z)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        mean, logvar = self.posterior(x)
        z = mean if logvar is None or noise is None else mean + (0.5 * logvar).exp() * noise
        return self.decoder(z), mean, logvar


class PatchDiscriminator(nn.Module):
    """3D patch discriminator: (B, image_channels, D, H, W) -> logits (B, image_channels, D//32, H//32, W//32).

    One stride-2 convolution per entry of `channels` and one more to the logits: with n entries an axis is divided by
    2^(n+1) and must be at least that long. norm "batch" takes its statistics over all ranks; "group" does not depend on
    the batch.
    """

    def __init__(self, image_channels: int, channels: tuple[int, ...], norm: str):
        super().__init__()
        if norm not in ("batch", "group"):
            raise ValueError(f"norm must be 'batch' or 'group', not {norm!r}")
        widths = [image_channels, *channels]
        convs = [halve(a, b, bias=i == 0) for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))]
        self.convs = nn.ModuleList([*convs, halve(channels[-1], image_channels)])
        self.norms = nn.ModuleList(
            SyncBatchNorm3d(c) if norm == "batch" else nn.GroupNorm(math.gcd(8, c), c) for c in channels[1:]
        )

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.leaky_relu(self.convs[0](x), 0.2)
        for conv, norm in zip(self.convs[1:-1], self.norms, strict=True):
            h = nn.functional.leaky_relu(norm(conv(h)), 0.2)
        return self.convs[-1](h)


# ------------------------------------------------------------------------------------------------------------ stage 2


class ImageConditioner(nn.Module):
    """The paper's extractor: MRI (B, 1, D, H, W) -> feature map of latent size (B, channels, D//4, H//4, W//4).

    The paper has one channel.
    """

    def __init__(self, channels: int = 1):
        super().__init__()
        width = CONDITIONER_WIDTH
        self.conv_in = halve(1, width)
        self.res = ResidualBlock(width, width, groups=width)
        self.norm_out = nn.GroupNorm(width, width, eps=1e-6)
        self.conv_out = halve(width, channels)

    def forward(self, mri: Tensor) -> Tensor:
        h = self.norm_out(self.res(self.conv_in(mri)))
        # Deviation (paper): the figure draws ReLU here; the original code uses Swish, and so do we.
        return self.conv_out(nn.functional.silu(h))


class TimeEmbedding(nn.Module):
    """Sinusoid of the integer timestep: (B,) -> (B, dim), sines first; the frequencies are a buffer of checkpoints."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.register_buffer("inv_freq", sinusoidal_frequencies(dim // 2))

    def forward(self, t: Tensor) -> Tensor:
        return sinusoidal_embedding(t, self.dim, frequencies=self.inv_freq)


class LabelTimeProjector(nn.Module):
    """The paper's projector: timestep (B,) and optional class label -> conditioning vector (B, time_dim).

    A label is (B,) or (B, 1), or a single entry for the whole batch; floats are truncated. Its embedding is added to
    the time vector; label None adds nothing. The table may have one row more than classes: the learned null class.
    """

    def __init__(self, time_dim: int, n_labels: int):
        super().__init__()
        self.time = TimeEmbedding(time_dim)
        self.linear1 = nn.Linear(time_dim, 4 * time_dim)
        self.linear2 = nn.Linear(4 * time_dim, time_dim)
        self.label = nn.Embedding(n_labels, time_dim)

    def forward(self, t: Tensor, label: Tensor | None = None) -> Tensor:
        vector = self.linear2(nn.functional.silu(self.linear1(self.time(t))))
        return vector if label is None else vector + self.label(label.reshape(-1).long())


class DenoiserBlock(nn.Module):
    """Residual block with the conditioning vector added between its convolutions, then optional self-attention."""

    def __init__(self, c_in: int, c_out: int, time_dim: int, groups: int, dropout: float, attention: bool):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = conv3(c_in, c_out)
        self.time = nn.Linear(time_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3(c_out, c_out)
        self.skip = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = SelfAttention3d(c_out, groups) if attention else nn.Identity()

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        silu = nn.functional.silu
        h = self.conv1(silu(self.norm1(x)))
        h = h + self.time(silu(vector))[:, :, None, None, None]
        h = self.conv2(self.dropout(silu(self.norm2(h))))
        return self.attention(self.skip(x) + h)


class Denoiser(nn.Module):
    """3D U-Net that predicts the noise in x_t from the MRI feature map, the timestep and an optional label.

    mults: channel multiplier per level; each but the last ends in a halving. res_blocks per level on the way down,
    one more on the way up. The bottleneck attends once. A level attends too if its nominal resolution, image_size // 2
    per level on the way down and * 2 on the way up, is in attn_res; with the paper's 28, 14, 7 against 3 none does.
    null_class adds a label row, index num_classes, that stands for "unknown".
    """

    def __init__(
        self,
        latent_channels: int,
        out_channels: int,
        channels: int,
        mults: tuple[int, ...],
        groups: int,
        res_blocks: int,
        attn_res: tuple[int, ...],
        image_size: int,
        dropout: float,
        time_dim: int,
        num_classes: int,
        null_class: bool,
        cond_channels: int = 1,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.checkpointing = checkpointing
        self.null_label = num_classes if null_class else None
        self.projector = LabelTimeProjector(time_dim, num_classes + int(null_class))

        def block(c_in, c_out, attention):
            return DenoiserBlock(c_in, c_out, time_dim, groups, dropout, attention)

        resolution = image_size
        self.down = nn.ModuleList([conv3(latent_channels + cond_channels, channels)])
        skips, c = [channels], channels  # channels of every tensor that `down` leaves for the way up
        for level, mult in enumerate(mults):
            for _ in range(res_blocks):
                self.down.append(block(c, channels * mult, resolution in attn_res))
                c = channels * mult
                skips.append(c)
            if level < len(mults) - 1:
                self.down.append(halve(c, c))
                skips.append(c)
                resolution //= 2

        self.middle = nn.ModuleList([block(c, c, True), block(c, c, False)])

        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for _ in range(res_blocks + 1):
                self.up.append(block(c + skips.pop(), channels * mult, resolution in attn_res))
                c = channels * mult
            if level > 0:
                self.up.append(double(c))
                resolution *= 2

        self.norm_out = nn.GroupNorm(groups, c)
        self.conv_out = conv3(c, out_channels)
        self.extractor = ImageConditioner(cond_channels)

    def condition(self, mri: Tensor) -> Tensor:
        """MRI (B, 1, D, H, W) -> feature map (B, 1, D//4, H//4, W//4); it depends on neither x_t nor t: cache it."""
        return self.extractor(mri)

    def forward(self, x_t: Tensor, cond_map: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Predicted noise, shape (B, out_channels, d, h, w).

        x_t (B, latent_channels, d, h, w), any d, h, w; cond_map (B, cond_channels, d, h, w) from `condition`;
        t (B,) integer timesteps. label None: no label vector at all, what the original does when it samples
        (self.null_label is the learned one).
        """
        vector = self.projector(t, label)
        h = torch.cat([x_t, cond_map], dim=1)
        skips = []
        for layer in self.down:
            h = run_block(self, layer, h, vector) if isinstance(layer, DenoiserBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = run_block(self, layer, h, vector)
        for layer in self.up:
            if isinstance(layer, DenoiserBlock):
                skip = skips.pop()
                h = torch.cat([match_size(h, skip.shape[2:]), skip], dim=1)  # odd axes come back one voxel short
                h = run_block(self, layer, h, vector)
            else:
                h = layer(h)
        return self.conv_out(nn.functional.silu(self.norm_out(h)))


def run_block(owner: nn.Module, block: nn.Module, *args: Tensor) -> Tensor:
    """Apply a block, recomputing its activations in the backward pass if the owner asks for checkpointing."""
    if owner.checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


# --------------------------------------------------------------------------------------------------- from the options


def build_autoencoder(config) -> Autoencoder:
    return Autoencoder(
        image_channels=1,
        width=config.aae_channels,
        latent_dim=config.latent_dim,
        groups=config.aae_groups,
        kl=config.kl_weight > 0,
        checkpointing=config.checkpointing,
    )


def build_discriminator(config) -> PatchDiscriminator:
    return PatchDiscriminator(image_channels=1, channels=config.disc_channels, norm=config.disc_norm)


def build_denoiser(config) -> Denoiser:
    return Denoiser(
        latent_channels=config.latent_dim,
        out_channels=config.latent_dim,
        channels=config.unet_channels,
        mults=config.unet_mults,
        groups=config.unet_groups,
        res_blocks=config.unet_res_blocks,
        attn_res=config.unet_attn_res,
        image_size=config.image_size,
        dropout=config.unet_dropout,
        time_dim=config.time_dim,
        num_classes=config.num_classes,
        null_class=config.label_dropout > 0,
        cond_channels=config.cond_channels,
        checkpointing=config.checkpointing,
    )
