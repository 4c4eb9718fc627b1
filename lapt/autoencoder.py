"""The vector-quantised autoencoder of LAPT (stage 1), slices to latents and back, and the discriminator it trains with.

Slices are (B, 2, X, Y), channel 0 DWI and channel 1 ADC; latents (B, embed_dim, X/f, Y/f), f doubling with every level
after the first. At the paper's widths (128, 256, 512) 55,320,477 parameters make of 192 x 224 pixels a latent of
3 x 48 x 56. The later stages work on the latent before quantisation; decoding snaps it to the codebook first.
Architecture after Rombach et al. 2022 (VQ-regularised autoencoder) and Esser et al. 2021 (patch discriminator).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks3d import SyncBatchNorm3d

NORM_EPS = 1e-6
NEAREST_CHUNK = 8192  # latent pixels compared with the whole codebook at a time: bounds the memory, not the result


def conv3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


# ---- blocks


class ResidualBlock(nn.Module):
    """Twice (GroupNorm, SiLU, 3x3 convolution), plus the input (by a 1x1 convolution if the channels change)."""

    def __init__(self, c_in: int, c_out: int, norm_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, c_in, NORM_EPS)
        self.conv1 = conv3(c_in, c_out)
        self.norm2 = nn.GroupNorm(norm_groups, c_out, NORM_EPS)
        self.conv2 = conv3(c_out, c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Residual single-head self-attention over all positions: (B, C, ...) -> same; `dims` is 2 or 3 spatial axes."""

    def __init__(self, channels: int, norm_groups: int, dims: int = 2):
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.norm = nn.GroupNorm(norm_groups, channels, NORM_EPS)
        self.q, self.k, self.v, self.out = (conv(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2).unsqueeze(1) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, 1 head, N, C), scaled by 1 / sqrt(C)
        return x + self.out(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))


class Down(nn.Module):
    """Halve both axes, rounding down: a row and a column of zeros at the end, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Double both axes: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each with attention behind it where `attention`; then `resample`, if any."""

    def __init__(self, c_in: int, c_out: int, n_blocks: int, attention: bool, resample, norm_groups: int):
        super().__init__()
        widths = [c_in, *[c_out] * (n_blocks - 1)]
        self.blocks = nn.ModuleList(ResidualBlock(width, c_out, norm_groups) for width in widths)
        self.attentions = nn.ModuleList(Attention(c_out, norm_groups) for _ in range(n_blocks if attention else 0))
        self.resample = resample(c_out) if resample else None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[i](x)
        return x if self.resample is None else self.resample(x)


def middle(channels: int, norm_groups: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels, norm_groups),
        Attention(channels, norm_groups),
        ResidualBlock(channels, channels, norm_groups),
    )


def three_convs(*widths: int) -> nn.Sequential:
    """3x3 convolutions through four widths with SiLU between them: the stem or head of one modality."""
    a, b, c, d = widths
    return nn.Sequential(conv3(a, b), nn.SiLU(), conv3(b, c), nn.SiLU(), conv3(c, d))


class Encoder(nn.Module):
    """(B, in_channels, X, Y) -> (B, z_channels, X/f, Y/f); with `modality_separate` each half of the channels has its
    own stem of three convolutions.
    """

    def __init__(
        self, in_channels, channels, widths, n_blocks, z_channels, attention_levels, norm_groups, modality_separate
    ):
        super().__init__()
        self.stems = nn.ModuleList()
        if modality_separate:
            self.stems.extend(three_convs(in_channels // 2, 16, 32, channels // 2) for _ in range(2))
            in_channels = 2 * (channels // 2)
        self.conv_in = conv3(in_channels, channels)
        self.levels = nn.ModuleList()
        for i, width in enumerate(widths):
            resample = Down if i < len(widths) - 1 else None
            self.levels.append(Level(channels, width, n_blocks, i in attention_levels, resample, norm_groups))
            channels = width
        self.middle = middle(widths[-1], norm_groups)
        self.norm_out = nn.GroupNorm(norm_groups, widths[-1], NORM_EPS)
        self.conv_out = conv3(widths[-1], z_channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.stems:
            x = torch.cat([stem(part) for stem, part in zip(self.stems, x.chunk(2, dim=1), strict=True)], dim=1)
        h = self.conv_in(x)
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, out_channels, f h, f w); with `modality_separate` one head of three convolutions for
    each half of the channels. `levels` run from coarse to fine.
    """

    def __init__(self, out_channels, widths, n_blocks, z_channels, attention_levels, norm_groups, modality_separate):
        super().__init__()
        self.conv_in = conv3(z_channels, widths[-1])
        self.middle = middle(widths[-1], norm_groups)
        self.levels, channels = nn.ModuleList(), widths[-1]
        for i in reversed(range(len(widths))):
            resample = Up if i > 0 else None
            self.levels.append(Level(channels, widths[i], n_blocks + 1, i in attention_levels, resample, norm_groups))
            channels = widths[i]
        self.norm_out = nn.GroupNorm(norm_groups, channels, NORM_EPS)
        self.conv_out = conv3(channels, channels if modality_separate else out_channels)
        self.heads = nn.ModuleList()
        if modality_separate:
            self.heads.extend(three_convs(channels, 32, 16, out_channels // 2) for _ in range(2))

    def forward(self, z: Tensor) -> Tensor:
        h = self.middle(self.conv_in(z))
        for level in self.levels:
            h = level(h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return torch.cat([head(h) for head in self.heads], dim=1) if self.heads else h


# ---- codebook


class Codebook(nn.Module):
    """`n_embed` vectors, by which latents are replaced (van den Oord et al. 2017); starts uniform in +-1/n_embed."""

    def __init__(self, n_embed: int, embed_dim: int, beta: float, legacy_beta: bool):
        super().__init__()
        self.beta, self.legacy_beta = beta, legacy_beta
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Index (B, h, w) of the vector nearest to each latent pixel of z (B, embed_dim, h, w)."""
        pixels, codes = z.movedim(1, -1).flatten(0, -2).float(), self.embedding.weight.float()
        # Differences, not a matrix product: neighbouring codes are closer than TF32 or bfloat16 products can tell.
        mode = "donot_use_mm_for_euclid_dist"
        found = [torch.cdist(part, codes, compute_mode=mode).argmin(1) for part in pixels.split(NEAREST_CHUNK)]
        return torch.cat(found).view(z.shape[0], *z.shape[2:])

    def entries(self, indices: Tensor) -> Tensor:
        """Vectors of `indices` (B, h, w) as an image (B, embed_dim, h, w)."""
        return self.embedding(indices).movedim(-1, 1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(z_q with the gradient of z, loss, indices (B, h, w)).

        loss = mean |e - sg(z)|^2 + beta mean |sg(e) - z|^2: beta belongs to the commitment of the encoder.
        """
        indices = self.nearest(z)
        e, z = self.entries(indices).float(), z.float()
        codebook, commitment = F.mse_loss(e, z.detach()), F.mse_loss(z, e.detach())
        # Deviation (original code): beta weights the codebook term there, which is the option legacy_beta.
        loss = commitment + self.beta * codebook if self.legacy_beta else codebook + self.beta * commitment
        return z + (e - z).detach(), loss, indices


# ---- autoencoder


class VQAutoencoder(nn.Module):
    """Vector-quantised autoencoder of DWI and ADC slices.

    channels and channel_mult give each level's width (multiples of norm_groups), fine to coarse; every level has
    num_res_blocks residual blocks on the way down and one more on the way up, and attention where its number is in
    attention_levels (0 is the finest). modality_separate: own stem and head for each of the two modalities, as in the
    3D release. legacy_beta: `beta` weights the codebook instead of the commitment, as in the original.
    An axis that `factor` does not divide comes back rounded down.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        embed_dim: int,
        n_embed: int,
        attention_levels: Sequence[int] = (),
        norm_groups: int = 32,
        modality_separate: bool = False,
        legacy_beta: bool = False,
        beta: float = 0.25,
    ):
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        if odd := [width for width in (channels, *widths) if width % norm_groups]:
            raise ValueError(f"autoencoder width {odd[0]} is no multiple of its {norm_groups} norm groups")
        if modality_separate and (in_channels % 2 or out_channels % 2):
            raise ValueError("modality_separate splits the channels in two halves: give an even number of them")
        self.factor = 2 ** (len(widths) - 1)
        self.embed_dim = embed_dim
        rest = (widths, num_res_blocks, z_channels, tuple(attention_levels), norm_groups, modality_separate)
        self.encoder = Encoder(in_channels, channels, *rest)
        self.to_code = nn.Conv2d(z_channels, embed_dim, 1)
        self.codebook = Codebook(n_embed, embed_dim, beta, legacy_beta)
        self.from_code = nn.Conv2d(embed_dim, z_channels, 1)
        self.decoder = Decoder(out_channels, *rest)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight at which gradients of the loss terms are compared (`losses.adaptive_weight`)."""
        return self.decoder.conv_out.weight

    def encode(self, x: Tensor) -> Tensor:
        """Latent before quantisation: (B, in_channels, X, Y) -> (B, embed_dim, X/f, Y/f)."""
        return self.to_code(self.encoder(x))

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latent z (B, embed_dim, h, w) -> (nearest codes with the gradient of z, codebook loss, indices (B, h, w))."""
        return self.codebook(z)

    def decode_codes(self, z_q: Tensor) -> Tensor:
        """Slices (B, out_channels, f h, f w) of a latent as it is, not snapped to the codebook; values not clamped."""
        return self.decoder(self.from_code(z_q))

    def decode(self, z: Tensor) -> Tensor:
        """Slices (B, out_channels, f h, f w) of a latent, which is snapped to the codebook first (straight-through)."""
        return self.decode_codes(self.quantize(z)[0])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x_hat like x, codebook loss)."""
        z_q, codebook_loss, _ = self.quantize(self.encode(x))
        return self.decode_codes(z_q), codebook_loss


# ---- discriminator


class SyncBatchNorm2d(SyncBatchNorm3d):
    """BatchNorm2d whose training statistics cover the batches of all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(2)).squeeze(2)


class PatchDiscriminator(nn.Module):
    """Real or reconstructed, patch by patch (Isola et al. 2017): (B, C, X, Y) -> logit map (B, 1, x, y).

    4x4 convolutions with LeakyReLU 0.2: one to `channels`, then `layers` more with batch norm, each doubling the width
    up to 8 times `channels`, then one to the logits. All but the last two have stride 2. At 64 channels and 3 layers
    2,764,609 parameters give 22 x 26 logits of 192 x 224 pixels. Statistics of batch norm cover all ranks.
    """

    def __init__(self, *, in_channels: int, channels: int = 64, layers: int = 3):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels, 4, stride=2, padding=1)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        for i, (c_in, c_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            stride = 2 if i < layers - 1 else 1
            self.convs.append(nn.Conv2d(c_in, c_out, 4, stride, padding=1, bias=False))
            self.norms.append(SyncBatchNorm2d(c_out))
        self.conv_out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm3d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv_in(x), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.leaky_relu(norm(conv(h)), 0.2)
        return self.conv_out(h)
