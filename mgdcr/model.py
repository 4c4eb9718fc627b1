"""The networks of MGDCR: a 2D diffusion autoencoder (Preechakul et al. 2022), and its U-Net without the code.

`DiffAE` has two halves. A semantic encoder makes one code z of a clean slice x_0; a U-Net predicts the noise in x_t
from the step t and z. Time scales and shifts every residual block of the U-Net behind its second norm, z then scales it
once more. `UncondUNet` is the same U-Net without z, a baseline.
Slices are (B, 1, H, W) in [-1, 1]. At the paper's size (128 x 128 pixels, z of 512 numbers) DiffAE has 128,538,241
parameters, 24,671,232 of them in the encoder, and UncondUNet 98,613,889.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.blocks3d import sinusoidal_embedding

NORM_GROUPS = 32


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all of its parameters 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def groups_of(channels: int, groups: int = NORM_GROUPS) -> int:
    """`groups`, or one per channel of fewer; where they do not divide the channels, what divides both."""
    return channels if channels < groups else math.gcd(groups, channels)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups_of(channels), channels)


def set_norm_groups(module: nn.Module, groups: int) -> None:
    """Another number of groups for all normalisations: of narrow networks, 32 would leave each channel alone.

    A group of one channel loses the channel's mean, and with it what the encoder's head could tell of a whole slice.
    """
    for part in module.modules():
        if isinstance(part, nn.GroupNorm):
            part.num_groups = groups_of(part.num_channels, groups)


def conv3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1)


def resampled(x: Tensor, how: str | None) -> Tensor:
    """x (B, C, H, W) at half the size ("down": mean), at twice the size ("up": nearest), or as it is."""
    if how == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if how == "up" else x


# ------------------------------------------------------------------------------------------------------------- blocks


class EncoderBlock(nn.Module):
    """GroupNorm, SiLU, one convolution, plus input: what diffusion autoencoders call a residual block of the encoder.

    resample: None, "down" or "up", applied to the input and behind the SiLU.
    """

    def __init__(self, c_in: int, c_out: int, *, resample: str | None = None):
        super().__init__()
        self.resample = resample
        self.norm1 = norm(c_in)
        self.conv1 = conv3(c_in, c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(resampled(F.silu(self.norm1(x)), self.resample))
        return self.skip(resampled(x, self.resample)) + h


class ResidualBlock(EncoderBlock):
    """A block of the U-Net: the same, then GroupNorm, modulation, SiLU, dropout and a convolution that starts at 0.

    Modulation is (norm(h) * (1 + a_t) + b_t) * (1 + a_z) with a_t, b_t linear in SiLU(time embedding) and a_z linear in
    SiLU(code) (Preechakul et al. 2022, equation 7); without code_dim there is no a_z.
    """

    def __init__(
        self, c_in: int, c_out: int, emb_dim: int, code_dim: int, dropout: float, *, resample: str | None = None
    ):
        super().__init__(c_in, c_out, resample=resample)
        self.time = nn.Linear(emb_dim, 2 * c_out)
        self.code = nn.Linear(code_dim, c_out) if code_dim else None
        self.norm2 = norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(conv3(c_out, c_out))

    def forward(self, x: Tensor, emb: Tensor, code: Tensor | None = None) -> Tensor:
        h = self.conv1(resampled(F.silu(self.norm1(x)), self.resample))
        scale, shift = _per_channel(self.time(F.silu(emb))).chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        if self.code is not None:
            h = h * (1 + _per_channel(self.code(F.silu(code))))
        h = self.conv2(self.dropout(F.silu(h)))
        return self.skip(resampled(x, self.resample)) + h


def _per_channel(values: Tensor) -> Tensor:
    return values[..., None, None]


class Down(nn.Module):
    """Halve both axes by a convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Up(nn.Module):
    """Double both axes: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(resampled(x, "up"))


class Attention(nn.Module):
    """Residual self-attention over all pixels: (B, C, H, W) -> same; the output projection starts at 0."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        if channels % heads:
            raise ValueError(f"attention over {channels} channels cannot be split into {heads} heads")
        self.heads = heads
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, C = x.shape[:2]
        qkv = self.qkv(self.norm(x).flatten(2))  # (B, 3C, N): q, k, v of one head after the other
        q, k, v = qkv.view(B, self.heads, 3, C // self.heads, -1).transpose(3, 4).unbind(2)
        h = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())  # (B, heads, N, C / heads)
        h = self.proj(h.transpose(2, 3).reshape(B, C, -1))
        return x + h.view(x.shape)


class Stage(nn.ModuleList):
    """Blocks and attentions in a row; recomputed in the backward pass where `checkpointing`."""

    checkpointing = False

    def forward(self, x: Tensor, emb: Tensor | None = None, code: Tensor | None = None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run, x, emb, code, use_reentrant=False)
        return self._run(x, emb, code)

    def _run(self, x: Tensor, emb: Tensor | None, code: Tensor | None) -> Tensor:
        for layer in self:
            x = layer(x, emb, code) if isinstance(layer, ResidualBlock) else layer(x)
        return x


def set_checkpointing(module: nn.Module, on: bool) -> None:
    """Whether the stages of `module` are recomputed in the backward pass instead of kept."""
    for part in module.modules():
        if isinstance(part, Stage):
            part.checkpointing = on


class Plan:
    """Widths of the levels of a network, which of them attend, and how blocks and resamplings are made.

    attention_resolutions count in pixels of a square image of `image_size`: level L has attention if
    image_size / 2^L is among them, whatever size of image the network then sees.
    """

    def __init__(
        self,
        image_size: int,
        base_channels: int,
        channel_mult: Sequence[int],
        attention_resolutions: Sequence[int],
        num_heads: int,
        resblock_updown: bool,
        block,
    ):
        self.widths = [base_channels * mult for mult in channel_mult]
        self.multiple = 2 ** (len(self.widths) - 1)
        if image_size % self.multiple:
            raise ValueError(f"image_size {image_size}: {len(self.widths)} levels need a multiple of {self.multiple}")
        self.base_channels, self.num_heads = base_channels, num_heads
        self.attends = [image_size // 2**level in attention_resolutions for level in range(len(self.widths))]
        self.resblock_updown, self.block = resblock_updown, block

    def layers(self, level: int, c_in: int) -> list[nn.Module]:
        """A block to the level's width, and attention where the level has it."""
        width = self.widths[level]
        attention = [Attention(width, self.num_heads)] if self.attends[level] else []
        return [self.block(c_in, width), *attention]

    def down(self, channels: int) -> nn.Module:
        return self.block(channels, channels, resample="down") if self.resblock_updown else Down(channels)

    def up(self, channels: int) -> nn.Module:
        return self.block(channels, channels, resample="up") if self.resblock_updown else Up(channels)

    def contracting(self, num_blocks: int) -> tuple[nn.ModuleList, list[list[int]]]:
        """Stages behind the first convolution, and per level the widths of everything that exists at its size."""
        stages, channels, laterals = nn.ModuleList(), self.base_channels, [[self.base_channels]]
        for level, width in enumerate(self.widths):
            for _ in range(num_blocks):
                stages.append(Stage(self.layers(level, channels)))
                channels = width
                laterals[level].append(channels)
            if level < len(self.widths) - 1:
                stages.append(Stage([self.down(channels)]))
                laterals.append([channels])
        return stages, laterals

    def middle(self) -> Stage:
        width = self.widths[-1]
        return Stage([self.block(width, width), Attention(width, self.num_heads), self.block(width, width)])


# ----------------------------------------------------------------------------------------------------------- networks


class SemanticEncoder(nn.Module):
    """Slices x_0 (B, in_channels, H, W) -> code z (B, out_channels): contracting blocks, mean of pixels, projection."""

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        model_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        num_heads: int,
        out_channels: int,
        resblock_updown: bool,
    ):
        super().__init__()
        plan = Plan(
            image_size, model_channels, channel_mult, attention_resolutions, num_heads, resblock_updown, EncoderBlock
        )
        self.conv_in = conv3(in_channels, model_channels)
        self.stages, _ = plan.contracting(num_res_blocks)
        self.middle = plan.middle()
        width = plan.widths[-1]
        self.head = nn.Sequential(
            norm(width), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, out_channels, 1), nn.Flatten()
        )

    def features(self, x_0: Tensor) -> Tensor:
        """What the head averages: (B, C, H / 2^levels, W / 2^levels)."""
        h = self.conv_in(x_0)
        for stage in self.stages:
            h = stage(h)
        return self.middle(h)

    def forward(self, x_0: Tensor) -> Tensor:
        return self.head(self.features(x_0))


class UNet(nn.Module):
    """Noisy slice x_t (B, C, H, W), integer step t (B,) and code z (B, cond_channels) -> its noise eps.

    num_res_blocks counts blocks per level of the contracting half; the expanding half has one more. With another
    num_input_res_blocks the contracting half has that many: blocks of the expanding half for which nothing is left then
    take no lateral input. cond_channels 0: no code. H and W must be multiples of `multiple`.
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        num_input_res_blocks: int | None,
        attention_resolutions: Sequence[int],
        num_heads: int,
        embed_channels: int,
        cond_channels: int,
        resblock_updown: bool,
        dropout: float,
    ):
        super().__init__()

        def block(c_in, c_out, resample=None):
            return ResidualBlock(c_in, c_out, embed_channels, cond_channels, dropout, resample=resample)

        plan = Plan(image_size, model_channels, channel_mult, attention_resolutions, num_heads, resblock_updown, block)
        self.multiple, self.time_channels, self.conditional = plan.multiple, model_channels, cond_channels > 0
        self.time1 = nn.Linear(model_channels, embed_channels)
        self.time2 = nn.Linear(embed_channels, embed_channels)
        self.conv_in = conv3(in_channels, model_channels)
        n_in = num_res_blocks if num_input_res_blocks is None else num_input_res_blocks
        self.input_stages, laterals = plan.contracting(n_in)
        self.middle = plan.middle()
        self.output_stages = self._expanding(plan, laterals, num_res_blocks + 1)
        width = plan.widths[0]
        self.out = nn.Sequential(norm(width), nn.SiLU(), zeroed(conv3(width, out_channels)))

    def _expanding(self, plan: Plan, laterals: list[list[int]], num_blocks: int) -> nn.ModuleList:
        stages, channels = nn.ModuleList(), plan.widths[-1]
        self.takes = []  # level of the lateral input of each stage, None without one
        for level in reversed(range(len(plan.widths))):
            left = list(laterals[level])
            for i in range(num_blocks):
                self.takes.append(level if left else None)
                layers = plan.layers(level, channels + (left.pop() if left else 0))
                channels = plan.widths[level]
                if level > 0 and i == num_blocks - 1:
                    layers.append(plan.up(channels))
                stages.append(Stage(layers))
        self.levels = [level for level, widths in enumerate(laterals) for _ in widths]  # of each lateral output
        return stages

    def check_size(self, size: Sequence[int]) -> None:
        """ValueError if an image of this size (H, W) cannot be halved as often as the network does."""
        if any(n % self.multiple for n in size):
            raise ValueError(f"image of {size[0]} x {size[1]}: this U-Net needs multiples of {self.multiple}")

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor | None = None) -> Tensor:
        self.check_size(x_t.shape[2:])
        emb = sinusoidal_embedding(t, self.time_channels, cos_first=True).to(self.time1.weight.dtype)
        emb = self.time2(F.silu(self.time1(emb)))  # (B, embed_channels)
        outputs = [self.conv_in(x_t)]
        for stage in self.input_stages:
            outputs.append(stage(outputs[-1], emb, z))
        laterals = [[] for _ in range(1 + max(self.levels))]
        for level, output in zip(self.levels, outputs, strict=True):
            laterals[level].append(output)
        h = self.middle(outputs[-1], emb, z)
        for level, stage in zip(self.takes, self.output_stages, strict=True):
            h = stage(h if level is None else torch.cat([h, laterals[level].pop()], dim=1), emb, z)
        return self.out(h)


class DiffAE(nn.Module):
    """Diffusion autoencoder: `encode` a slice to its code z, `denoise` a noisy slice with a code's help.

    model_channels times channel_mult are the U-Net's widths per level, times enc_channel_mult the encoder's. Both
    attend at attention_resolutions (pixels of a square image of image_size), the encoder at its own if it has any.
    cond_channels (None: embed_channels) is the width that the U-Net expects of z, and must equal enc_out_channels.
    norm_groups: most groups of a normalisation. checkpointing: recompute activations in the backward pass of training.
    ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        *,
        image_size: int,
        model_channels: int,
        channel_mult: Sequence[int],
        enc_channel_mult: Sequence[int],
        num_res_blocks: int,
        enc_num_res_blocks: int,
        attention_resolutions: Sequence[int],
        enc_attention_resolutions: Sequence[int] | None = None,
        num_heads: int,
        embed_channels: int,
        enc_out_channels: int,
        cond_channels: int | None = None,
        num_input_res_blocks: int | None = None,
        resblock_updown: bool = True,
        dropout: float,
        in_channels: int = 1,
        out_channels: int = 1,
        norm_groups: int = NORM_GROUPS,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.image_size, self.code_dim = image_size, enc_out_channels
        if enc_out_channels != (wanted := cond_channels or embed_channels):
            raise ValueError(f"the encoder's code has {enc_out_channels} numbers, the U-Net takes {wanted}: set "
                             "enc_out_channels and cond_channels (or embed_channels) alike")  # fmt: skip
        enc_attention = attention_resolutions if enc_attention_resolutions is None else enc_attention_resolutions
        both = {"image_size": image_size, "in_channels": in_channels, "model_channels": model_channels}
        both |= {"num_heads": num_heads, "resblock_updown": resblock_updown}
        self.encoder = SemanticEncoder(
            **both, channel_mult=enc_channel_mult, num_res_blocks=enc_num_res_blocks,
            attention_resolutions=enc_attention, out_channels=enc_out_channels,
        )  # fmt: skip
        self.unet = UNet(
            **both, out_channels=out_channels, channel_mult=channel_mult, num_res_blocks=num_res_blocks,
            num_input_res_blocks=num_input_res_blocks, attention_resolutions=attention_resolutions,
            embed_channels=embed_channels, cond_channels=enc_out_channels, dropout=dropout,
        )  # fmt: skip
        set_norm_groups(self, norm_groups)
        set_checkpointing(self, checkpointing)

    def encode(self, x_0: Tensor) -> Tensor:
        """Code z (B, enc_out_channels) of clean slices x_0 (B, 1, H, W) in [-1, 1]."""
        return self.encoder(x_0)

    def denoise(self, x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Predicted noise eps (B, 1, H, W) of x_t at integer steps t (B,) for codes z."""
        return self.unet(x_t, t, z)

    def forward(self, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
        """Predicted noise of x_t with the code of the clean x_0: the call of training, gradients into both halves."""
        return self.denoise(x_t, t, self.encode(x_0))


class UncondUNet(nn.Module):
    """Unconditional noise predictor with the calls of `DiffAE`; z and x_0 are ignored. Arguments as there."""

    def __init__(
        self,
        *,
        image_size: int,
        model_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        num_heads: int,
        embed_channels: int,
        num_input_res_blocks: int | None = None,
        resblock_updown: bool = True,
        dropout: float,
        in_channels: int = 1,
        out_channels: int = 1,
        norm_groups: int = NORM_GROUPS,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.image_size, self.code_dim = image_size, 0
        self.unet = UNet(
            image_size=image_size, in_channels=in_channels, model_channels=model_channels, out_channels=out_channels,
            channel_mult=channel_mult, num_res_blocks=num_res_blocks, num_input_res_blocks=num_input_res_blocks,
            attention_resolutions=attention_resolutions, num_heads=num_heads, embed_channels=embed_channels,
            cond_channels=0, resblock_updown=resblock_updown, dropout=dropout,
        )  # fmt: skip
        set_norm_groups(self, norm_groups)
        set_checkpointing(self, checkpointing)

    def denoise(self, x_t: Tensor, t: Tensor, z: Tensor | None = None) -> Tensor:
        """Predicted noise eps (B, 1, H, W) of x_t at integer steps t (B,)."""
        return self.unet(x_t, t)

    def forward(self, x_t: Tensor, t: Tensor, x_0: Tensor | None = None) -> Tensor:
        """The same: the call of training."""
        return self.denoise(x_t, t)
