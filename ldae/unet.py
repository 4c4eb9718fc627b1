"""The two denoisers of LDAE on latents: the prior (a U-Net) and the gradient estimator on top of the frozen prior.

`UNet` predicts the noise of a latent z_t; it is the U-Net of guided diffusion (Dhariwal & Nichol 2021) in 3D.
`ShiftUNet` is what the posterior-mean gap is filled with (PDAE, Zhang et al. 2022, figure 1): it runs the frozen prior
and, on the same skip connections, a second decoder that reads the semantic code y of an image. Its output pair is the
prior's noise eps and the estimator's gradient G; both are exactly 0 before training.
Latents are (B, C, d, h, w); the paper's are 3 x 16 x 20 x 16, its prior has 486,927,363 parameters and its estimator
378,411,779.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.blocks3d import sinusoidal_embedding

NORM_GROUPS = 32  # of the original, whose widths are 256 and more


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all of its parameters 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def factors(isotropic: bool) -> tuple[int, int, int]:
    """What one level changes each axis by."""
    # Deviation (original code): there a "3D" network inherits video's rule and never resamples the first axis.
    return (2, 2, 2) if isotropic else (1, 2, 2)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution; scale and shift by time (and by a code); SiLU, dropout, convolution; plus input.

    resample: None, "down" (mean) or "up" (nearest), applied to the input and behind the first SiLU, by `factor`.
    The last convolution starts at 0. With `code_dim` the block is modulated by both time and code:
    (1 + s_y) * [norm(h) * (1 + s_t) + b_t] + b_y.
    """

    def __init__(
        self, c_in: int, c_out: int, emb_dim: int, dropout: float, *,
        resample=None, factor=(2, 2, 2), code_dim: int = 0, norm_groups: int = NORM_GROUPS,
    ):  # fmt: skip
        super().__init__()
        self.resample, self.factor = resample, factor
        self.norm1 = nn.GroupNorm(norm_groups, c_in)
        self.conv1 = nn.Conv3d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(emb_dim, 2 * c_out)
        self.code = nn.Linear(code_dim, 2 * c_out) if code_dim else None
        self.norm2 = nn.GroupNorm(norm_groups, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv3d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool3d(x, self.factor)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=tuple(map(float, self.factor)), mode="nearest")
        return x

    def forward(self, x: Tensor, emb: Tensor, code: Tensor | None = None) -> Tensor:
        h = self.conv1(self.resampled(F.silu(self.norm1(x))))
        h = modulated(self.norm2(h), self.time(F.silu(emb)))
        if self.code is not None:
            h = modulated(h, self.code(F.silu(code)))
        h = self.conv2(self.dropout(F.silu(h)))
        return self.skip(self.resampled(x)) + h


def modulated(h: Tensor, scale_and_shift: Tensor) -> Tensor:
    """h (B, C, d, h, w) * (1 + scale) + shift, both from one tensor (B, 2C)."""
    scale, shift = scale_and_shift[..., None, None, None].chunk(2, dim=1)
    return h * (1 + scale) + shift


class Attention(nn.Module):
    """Residual self-attention over all voxels: (B, C, d, h, w) -> same; the output projection starts at 0.

    new_order: the 3C channels of qkv are q, k, v of all heads; otherwise ("legacy") those of one head after the other.
    """

    def __init__(self, channels: int, heads: int, new_order: bool, norm_groups: int = NORM_GROUPS):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(norm_groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, C = x.shape[:2]
        qkv = self.qkv(self.norm(x).flatten(2))  # (B, 3C, N)
        if self.new_order:
            q, k, v = qkv.view(B, 3, self.heads, C // self.heads, -1).unbind(1)  # each (B, heads, C / heads, N)
        else:
            q, k, v = qkv.view(B, self.heads, 3, C // self.heads, -1).unbind(2)
        q, k, v = (part.transpose(2, 3).contiguous() for part in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C / heads)
        h = self.proj(h.transpose(2, 3).reshape(B, C, -1))
        return x + h.view(x.shape)


class Stage(nn.ModuleList):
    """Residual blocks and attentions in a row; recomputed in the backward pass where `checkpointing`."""

    checkpointing = False

    def forward(self, x: Tensor, emb: Tensor, code: Tensor | None = None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run, x, emb, code, use_reentrant=False)
        return self._run(x, emb, code)

    def _run(self, x: Tensor, emb: Tensor, code: Tensor | None) -> Tensor:
        for layer in self:
            x = layer(x, emb, code) if isinstance(layer, ResidualBlock) else layer(x)
        return x


class Plan:
    """Widths and layers of a U-Net, from which the prior and the estimator's half are built alike."""

    def __init__(
        self,
        base_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        num_heads: int,
        head_channels: int,
        new_attention_order: bool,
        dropout: float,
        isotropic: bool,
        norm_groups: int,
    ):
        self.widths = [base_channels * mult for mult in channel_mult]
        if odd := [width for width in (base_channels, *self.widths) if width % norm_groups]:
            raise ValueError(f"U-Net width {odd[0]} is no multiple of {norm_groups}, its groups of channels")
        self.base_channels, self.num_res_blocks, self.dropout = base_channels, num_res_blocks, dropout
        self.emb_dim = 4 * base_channels
        self.attention_levels = [2**level in attention_resolutions for level in range(len(self.widths))]
        self.num_heads, self.head_channels, self.new_order = num_heads, head_channels, new_attention_order
        self.factor, self.norm_groups = factors(isotropic), norm_groups

    def attention(self, channels: int) -> Attention:
        heads = self.num_heads if self.head_channels == -1 else channels // self.head_channels
        if heads < 1 or channels % heads or self.head_channels not in (-1, channels // heads):
            wanted = f"{self.num_heads} heads" if self.head_channels == -1 else f"heads of {self.head_channels}"
            raise ValueError(f"attention over {channels} channels cannot be split into {wanted}")
        return Attention(channels, heads, self.new_order, self.norm_groups)

    def block(self, c_in: int, c_out: int, **options) -> ResidualBlock:
        own = {"factor": self.factor, "norm_groups": self.norm_groups}
        return ResidualBlock(c_in, c_out, self.emb_dim, self.dropout, **own, **options)

    def input_stages(self) -> tuple[nn.ModuleList, list[int]]:
        """The contracting half behind its first convolution, and the width of every skip connection."""
        stages, channels, skips = nn.ModuleList(), self.base_channels, [self.base_channels]
        for level, width in enumerate(self.widths):
            for _ in range(self.num_res_blocks):
                layers = [self.block(channels, width)]
                if self.attention_levels[level]:
                    layers.append(self.attention(width))
                stages.append(Stage(layers))
                channels = width
                skips.append(channels)
            if level < len(self.widths) - 1:
                stages.append(Stage([self.block(channels, channels, resample="down")]))
                skips.append(channels)
        return stages, skips

    def middle_stage(self, **options) -> Stage:
        width = self.widths[-1]
        return Stage([self.block(width, width, **options), self.attention(width), self.block(width, width, **options)])

    def output_stages(self, skips: Sequence[int], **options) -> nn.ModuleList:
        """The expanding half before its head; every stage takes one of `skips`, last first."""
        skips, stages, channels = list(skips), nn.ModuleList(), self.widths[-1]
        for level in reversed(range(len(self.widths))):
            width = self.widths[level]
            for i in range(self.num_res_blocks + 1):
                layers = [self.block(channels + skips.pop(), width, **options)]
                if self.attention_levels[level]:
                    layers.append(self.attention(width))
                if level > 0 and i == self.num_res_blocks:
                    layers.append(self.block(width, width, resample="up", **options))
                stages.append(Stage(layers))
                channels = width
        return stages

    def head(self, out_channels: int) -> nn.Sequential:
        conv = zeroed(nn.Conv3d(self.widths[0], out_channels, 3, padding=1))
        return nn.Sequential(nn.GroupNorm(self.norm_groups, self.widths[0]), nn.SiLU(), conv)


class UNet(nn.Module):
    """The prior: noisy latent z_t (B, C, d, h, w) and integer step t (B,) -> its noise eps (B, C, d, h, w).

    base_channels and channel_mult give each level's width (multiples of norm_groups); attention_resolutions are the
    downsampling factors (1, 2, 4, ...) at which attention stands; head_channels -1 leaves the number of heads at
    num_heads. isotropic=False resamples the last two axes only, as the original's weights need it. Widths near
    norm_groups make it an instance norm, which takes the size of a pattern out of every channel.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        base_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        num_heads: int,
        head_channels: int,
        new_attention_order: bool,
        dropout: float,
        isotropic: bool,
        norm_groups: int = NORM_GROUPS,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.plan = Plan(
            base_channels, channel_mult, num_res_blocks, attention_resolutions,
            num_heads, head_channels, new_attention_order, dropout, isotropic, norm_groups,
        )  # fmt: skip
        plan = self.plan
        self.time1 = nn.Linear(base_channels, plan.emb_dim)
        self.time2 = nn.Linear(plan.emb_dim, plan.emb_dim)
        self.conv_in = nn.Conv3d(in_channels, base_channels, 3, padding=1)
        self.input_stages, self.skips = plan.input_stages()
        self.middle = plan.middle_stage()
        self.output_stages = plan.output_stages(self.skips)
        self.out = plan.head(in_channels)
        set_checkpointing(self, checkpointing)

    def check_size(self, size: Sequence[int]) -> None:
        """ValueError if a latent of this size (d, h, w) cannot be halved as often as the network does."""
        multiples = [factor ** (len(self.plan.widths) - 1) for factor in self.plan.factor]
        if any(n % m for n, m in zip(size, multiples, strict=True)):
            listed = " x ".join(map(str, size))
            raise ValueError(f"latent of {listed}: this U-Net needs multiples of {' x '.join(map(str, multiples))}")

    def contract(self, z_t: Tensor, t: Tensor) -> tuple[list[Tensor], Tensor]:
        """Skip connections of the contracting half, the last one also its result, and the time embedding."""
        self.check_size(z_t.shape[2:])
        emb = sinusoidal_embedding(t, self.plan.base_channels, cos_first=True).to(self.time1.weight.dtype)
        emb = self.time2(F.silu(self.time1(emb)))  # (B, emb_dim)
        skips = [self.conv_in(z_t)]
        for stage in self.input_stages:
            skips.append(stage(skips[-1], emb))
        return skips, emb

    def expand(self, skips: list[Tensor], emb: Tensor) -> Tensor:
        """Noise from what `contract` gave."""
        return expand(self.middle, self.output_stages, self.out, skips, emb)

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        return self.expand(*self.contract(z_t, t))


def expand(middle: Stage, stages: nn.ModuleList, head: nn.Module, skips: list[Tensor], emb: Tensor, code=None):
    """The middle and the expanding half of a U-Net on the skip connections of its contracting half."""
    h = middle(skips[-1], emb, code)
    for stage, skip in zip(stages, reversed(skips), strict=True):
        h = stage(torch.cat([h, skip], dim=1), emb, code)
    return head(h)


def set_checkpointing(module: nn.Module, on: bool) -> None:
    """Whether the stages of `module` are recomputed in the backward pass instead of kept."""
    for part in module.modules():
        if isinstance(part, Stage):
            part.checkpointing = on


class GradientEstimator(nn.Module):
    """The trainable half G of a ShiftUNet: middle and expanding half of the prior's shape, modulated by a code.

    With image_size (d, h, w), G gets an image more that is linear in the code and starts at 0.
    """

    def __init__(self, prior: UNet, code_dim: int, image_size: Sequence[int] = ()):
        super().__init__()
        plan = prior.plan
        self.label_emb = nn.Linear(code_dim, plan.emb_dim)
        self.shift_middle_block = plan.middle_stage(code_dim=plan.emb_dim)
        self.shift_output_blocks = plan.output_stages(prior.skips, code_dim=plan.emb_dim)
        self.shift_out = plan.head(prior.in_channels)
        # Deviation (original code): it has none. Modulated channels of the prior's features say little about where
        # something is; a short training learns to draw what the code says this way, and hardly any other way.
        self.image = zeroed(nn.Linear(code_dim, prior.in_channels * math.prod(image_size))) if image_size else None

    def forward(self, skips: list[Tensor], emb: Tensor, y: Tensor) -> Tensor:
        code = self.label_emb(y)  # (B, emb_dim)
        G = expand(self.shift_middle_block, self.shift_output_blocks, self.shift_out, skips, emb, code)
        return G if self.image is None else G + self.image(y).view_as(G)


class ShiftUNet(nn.Module):
    """The frozen prior and the gradient estimator: z_t, t and a code y (B, code_dim) -> (eps, G), each like z_t.

    `prior` gets no gradient, computes none, and stays in eval mode whatever train() says; its contracting half runs
    once for both. `estimator` is all that trains; image_size: GradientEstimator's.
    """

    def __init__(self, prior: UNet, code_dim: int, *, image_size: Sequence[int] = (), checkpointing: bool = False):
        super().__init__()
        self.code_dim = code_dim
        self.prior = prior.requires_grad_(False).eval()
        self.estimator = GradientEstimator(prior, code_dim, image_size)
        set_checkpointing(self.estimator, checkpointing)

    def train(self, mode: bool = True):
        super().train(mode)
        self.prior.eval()
        return self

    def forward(self, z_t: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            skips, emb = self.prior.contract(z_t, t)
            eps = self.prior.expand(skips, emb)
        return eps, self.estimator(skips, emb, y)
