"""The segmentation guide of the 3D release: a 3D U-Net that finds the lesion in DWI and ADC.

Frozen, it tells the post-training whether a lesion can be found where it is. Volumes (B, 2, X, Y, Z), normalised DWI
and ADC; one logit a voxel. At the paper's widths (64, 128, 256) 39,202,177 parameters.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import blocks3d
from common.blocks3d import Down, Up, conv3
from lapt.autoencoder import NORM_EPS, Attention


class ResidualBlock(blocks3d.ResidualBlock):
    """As in common; `time_dim` adds the projection that the original stores and never runs."""

    def __init__(self, c_in: int, c_out: int, norm_groups: int, time_dim: int):
        super().__init__(c_in, c_out, norm_groups, NORM_EPS)
        if time_dim:
            self.time = nn.Linear(time_dim, c_out).requires_grad_(False)


class Level(nn.Module):
    """Residual blocks of one resolution, each with attention behind it where `attention`; `resample` leads on."""

    def __init__(
        self, widths_in: Sequence[int], width: int, attention: bool, resample, norm_groups: int, time_dim: int
    ):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(c_in, width, norm_groups, time_dim) for c_in in widths_in)
        count = len(self.blocks) if attention else 0
        self.attentions = nn.ModuleList(Attention(width, norm_groups, dims=3) for _ in range(count))
        self.resample = resample(width) if resample else None

    def block(self, i: int, x: Tensor) -> Tensor:
        x = self.blocks[i](x)
        return self.attentions[i](x) if self.attentions else x


class SegmentationGuide(nn.Module):
    """Logits of a lesion: (B, in_channels, X, Y, Z) -> (B, out_channels, X, Y, Z), all axes multiples of `multiple`.

    channels and channel_mult give each level's width (multiples of norm_groups), fine to coarse; num_res_blocks on the
    way down, one more on the way up; attention in the middle and in the levels attention_levels (0 is the finest).
    timestep_projections: keep the layers that the original stores and never runs (39,909,441 parameters in all).
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_levels: Sequence[int] = (),
        norm_groups: int = 16,
        timestep_projections: bool = False,
    ):
        super().__init__()
        widths, n = [channels * mult for mult in channel_mult], len(channel_mult)
        if odd := [width for width in (channels, *widths) if width % norm_groups]:
            raise ValueError(f"guide width {odd[0]} is no multiple of its {norm_groups} norm groups")
        self.multiple = 2 ** (n - 1)
        rest = (norm_groups, 4 * channels if timestep_projections else 0)
        self.conv_in = conv3(in_channels, channels)
        width, skips = channels, [channels]

        self.down = nn.ModuleList()
        for i in range(n):
            widths_in = [width, *[widths[i]] * (num_res_blocks - 1)]
            width = widths[i]
            self.down.append(Level(widths_in, width, i in attention_levels, Down if i < n - 1 else None, *rest))
            skips += [width] * (num_res_blocks + (i < n - 1))

        first, last = (ResidualBlock(width, width, *rest) for _ in range(2))
        self.middle = nn.Sequential(first, Attention(width, norm_groups, dims=3), last)

        self.up = nn.ModuleList()  # from coarse to fine
        for i in reversed(range(n)):
            widths_in = [c + skips.pop() for c in (width, *[widths[i]] * num_res_blocks)]
            width = widths[i]
            self.up.append(Level(widths_in, width, i in attention_levels, Up if i > 0 else None, *rest))

        self.norm_out = nn.GroupNorm(norm_groups, width, NORM_EPS)
        self.conv_out = conv3(width, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if any(n % self.multiple for n in x.shape[2:]):
            size = " x ".join(map(str, x.shape[2:]))
            raise ValueError(f"volume of {size}: the guide needs multiples of {self.multiple}; pad it")
        skips = [self.conv_in(x)]
        for level in self.down:
            for i in range(len(level.blocks)):
                skips.append(level.block(i, skips[-1]))
            if level.resample is not None:
                skips.append(level.resample(skips[-1]))
        h = self.middle(skips[-1])
        for level in self.up:
            for i in range(len(level.blocks)):
                h = level.block(i, torch.cat([h, skips.pop()], dim=1))
            if level.resample is not None:
                h = level.resample(h)
        return self.conv_out(F.silu(self.norm_out(h)))
