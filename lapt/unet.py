"""The denoisers of LAPT: a U-Net on the latents of slices, and its extension to volumes by layers between the slices.

Both predict the noise of a latent z_t that the conditioned CT perfusion is concatenated to: (B, 3 + 15, h, w) and the
integer step t (B,) -> (B, 3, h, w) at the paper's sizes, with 739,385,251 parameters (U-Net of guided diffusion,
Dhariwal & Nichol 2021). The volume network folds the slices of a volume into the batch, slice index running fastest,
(B * slices, C, h, w), and has behind every 3x3 convolution one along the slices and behind every spatial attention one
along the slices (after Zhu et al. 2023, "Make-A-Volume"); 1,007,827,777 parameters. These layers start as identities,
so that `inflate` makes a volume network that equals a trained 2D network slice by slice.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.blocks3d import sinusoidal_embedding
from common.cli import UserError

NORM_GROUPS = 32


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with its own weight and bias (not those of its submodules) 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ---- layers


def turn(x: Tensor, n: int) -> Tensor:
    """(B * n, C, m) -> (B * m, C, n): stacks of n slices of m pixels as pixels with n slices, and back."""
    return x.unflatten(0, (-1, n)).permute(0, 3, 2, 1).flatten(0, 1)


class SliceConv(nn.Module):
    """Convolution along the slices at every pixel, (B * slices, C, h, w) -> same, zeros beyond both ends of the stack.

    Starts as the identity.
    """

    def __init__(self, channels: int, slices: int, kernel_size: int = 3):
        super().__init__()
        self.slices = slices
        self.weight = nn.Parameter(nn.init.dirac_(torch.empty(channels, channels, kernel_size)))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        pixels = turn(x.flatten(2), self.slices)  # (B * h * w, C, slices)
        h = F.conv1d(pixels, self.weight, self.bias, padding=self.weight.shape[2] // 2)
        return turn(h, x.shape[2] * x.shape[3]).reshape(x.shape)


class PlaneConv(nn.Conv2d):
    """3x3 convolution within each slice and, where there are `slices`, one along them behind it."""

    def __init__(self, c_in: int, c_out: int, slices: int | None, stride: int = 1):
        super().__init__(c_in, c_out, 3, stride, padding=1)
        self.across = SliceConv(c_out, slices) if slices else None

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return h if self.across is None else self.across(h)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution; plus the time; GroupNorm, SiLU, convolution (starts at 0); plus the input."""

    def __init__(self, c_in: int, c_out: int, emb_dim: int, slices: int | None):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = PlaneConv(c_in, c_out, slices)
        self.time = nn.Linear(emb_dim, c_out)
        self.norm2 = norm(c_out)
        self.conv2 = zeroed(PlaneConv(c_out, c_out, slices))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(emb))[..., None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention of (B, 3C, N) -> (B, C, N); the 3C channels are q, k, v of one head after the other."""
    B, channels = qkv.shape[0], qkv.shape[1] // 3
    q, k, v = qkv.view(B, heads, 3, channels // heads, -1).transpose(3, 4).unbind(2)  # each (B, heads, N, C / heads)
    mixed = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
    return mixed.transpose(2, 3).reshape(B, channels, -1)


class Attention(nn.Module):
    """Residual self-attention within each slice, then, where there are `slices`, along them at every pixel.

    (B, C, h, w) -> same. Output projections start at 0. The attention along the slices uses the same GroupNorm, there
    over channels and slices of a pixel.
    """

    def __init__(self, channels: int, heads: int, slices: int | None):
        super().__init__()
        self.heads, self.slices = heads, slices
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv1d(channels, channels, 1))
        if slices:
            self.qkv_across = nn.Conv1d(channels, 3 * channels, 1)
            self.out_across = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(2)  # (B, C, h * w)
        h = h + self.out(attend(self.qkv(self.norm(h)), self.heads))
        if self.slices:
            pixels = turn(h, self.slices)  # (B / slices * h * w, C, slices)
            pixels = pixels + self.out_across(attend(self.qkv_across(self.norm(pixels)), self.heads))
            h = turn(pixels, h.shape[2])
        return h.reshape(x.shape)


class Up(nn.Module):
    """Double both axes of every slice: nearest neighbour, then a convolution."""

    def __init__(self, channels: int, slices: int | None):
        super().__init__()
        self.conv = PlaneConv(channels, channels, slices)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.ModuleList):
    """Layers in a row, of which residual blocks see the time; recomputed in the backward pass where `checkpointing`."""

    checkpointing = False

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run, x, emb, use_reentrant=False)
        return self._run(x, emb)

    def _run(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResidualBlock) else layer(x)
        return x


# ---- network


class UNet(nn.Module):
    """Noisy latent with its condition (B, in_channels, h, w) and steps t (B,) -> noise (B, out_channels, h, w).

    model_channels and channel_mult give each level's width (multiples of 32); attention_resolutions are the
    downsampling factors (1, 2, 4, ...) at which attention stands, with heads of head_channels. With `slices` it is the
    volume network: the batch is that many slices of each volume in order, t one step a slice or one a volume.
    h and w must be multiples of `multiple`. checkpointing recomputes activations in the backward pass; parameters may
    be frozen in any combination.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        head_channels: int,
        slices: int | None = None,
        checkpointing: bool = False,
    ):
        super().__init__()
        widths = [model_channels * mult for mult in channel_mult]
        attended = [2**level in attention_resolutions for level in range(len(widths))]
        _check_widths(model_channels, widths, attended, head_channels)
        self.model_channels, self.slices, self.multiple = model_channels, slices, 2 ** (len(widths) - 1)
        emb_dim = 4 * model_channels
        self.time1 = nn.Linear(model_channels, emb_dim)
        self.time2 = nn.Linear(emb_dim, emb_dim)

        def layers(c_in, c_out, with_attention):
            block = ResidualBlock(c_in, c_out, emb_dim, slices)
            return [block, Attention(c_out, c_out // head_channels, slices)] if with_attention else [block]

        self.input_stages = nn.ModuleList([Stage([PlaneConv(in_channels, model_channels, slices)])])
        channels, skips = model_channels, [model_channels]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.input_stages.append(Stage(layers(channels, width, attended[level])))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                self.input_stages.append(Stage([PlaneConv(channels, channels, slices, stride=2)]))
                skips.append(channels)

        self.middle = Stage([*layers(channels, channels, True), *layers(channels, channels, False)])

        self.output_stages = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for i in range(num_res_blocks + 1):
                stage = Stage(layers(channels + skips.pop(), widths[level], attended[level]))
                channels = widths[level]
                if level > 0 and i == num_res_blocks:
                    stage.append(Up(channels, slices))
                self.output_stages.append(stage)

        self.norm_out = norm(channels)
        self.conv_out = zeroed(PlaneConv(channels, out_channels, slices))
        self.set_checkpointing(checkpointing)

    def set_checkpointing(self, on: bool) -> None:
        """Whether activations are recomputed in the backward pass instead of kept."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.checkpointing = on

    def check_size(self, x: Tensor, t: Tensor) -> None:
        """ValueError if the network cannot take a latent or steps of these shapes."""
        if any(n % self.multiple for n in x.shape[2:]):
            size = " x ".join(map(str, x.shape[2:]))
            raise ValueError(f"latent of {size}: this U-Net needs multiples of {self.multiple}; pad the images")
        if x.shape[0] % (self.slices or 1) or len(t) not in (x.shape[0], x.shape[0] // (self.slices or 1)):
            volumes = f" of volumes with {self.slices} slices" if self.slices else ""
            raise ValueError(f"batch of {x.shape[0]} with {len(t)} steps: not a batch{volumes}, one step each")

    def embed(self, t: Tensor) -> Tensor:
        """Time embedding (B, 4 * model_channels)."""
        emb = sinusoidal_embedding(t, self.model_channels, cos_first=True).to(self.time1.weight.dtype)
        return self.time2(F.silu(self.time1(emb)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.check_size(x, t)
        emb = self.embed(t).repeat_interleave(x.shape[0] // len(t), dim=0)
        skips = []
        for stage in self.input_stages:
            x = stage(x, emb)
            skips.append(x)
        x = self.middle(x, emb)
        for stage in self.output_stages:
            x = stage(torch.cat([x, skips.pop()], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(x)))


def _check_widths(model_channels, widths, attended, head_channels) -> None:
    if odd := [width for width in (model_channels, *widths) if width % NORM_GROUPS]:
        raise ValueError(f"U-Net width {odd[0]} is no multiple of {NORM_GROUPS}, its groups of channels")
    with_attention = [width for width, on in zip(widths, attended, strict=True) if on] + widths[-1:]
    if odd := [width for width in with_attention if width % head_channels]:
        raise ValueError(f"attention over {odd[0]} channels cannot be split into heads of {head_channels}")


def is_between_slices(key: str) -> bool:
    """Whether a parameter of the volume network, by its name, belongs to the layers that a 2D network lacks."""
    return any(part.endswith("across") for part in key.split("."))


def inflate(state_2d: dict[str, Tensor], unet3d: UNet) -> UNet:
    """Load the weights of a 2D network into a volume network, whose layers between slices keep their values.

    UserError if anything else is missing, unexpected or of another shape.
    """
    own = unet3d.state_dict()
    needed = {key for key in own if not is_between_slices(key)}
    odd = sorted(needed ^ state_2d.keys())
    odd += [key for key in sorted(needed & state_2d.keys()) if own[key].shape != state_2d[key].shape]
    if odd:
        raise UserError(f"the 2D network does not fit the volume network ({len(odd)} entries differ, first {odd[0]}): "
                        "give both the same model options")  # fmt: skip
    unet3d.load_state_dict(state_2d, strict=False)
    return unet3d
