"""What brings the CT perfusion to the latent's size: a rescaler (2D release) and the volume conditioner (3D release).

Both take the slices (B, T, X, Y) of a CT perfusion study with its T time points as channels, normalised to [-1, 1], and
give the condition (B, out_channels, X / 2^stages, Y / 2^stages) that is concatenated to the noisy latent.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapt.unet import PlaneConv, zeroed


class Rescaler(nn.Module):
    """Halve both axes `stages` times, then map the channels by a 1x1 convolution (225 parameters for 15 to 15).

    Every stage samples at exactly twice the distance and floors an odd size. out_channels None leaves the channels.
    method: a mode of torch.nn.functional.interpolate; bias: whether the map has one.
    """

    def __init__(
        self, *, in_channels: int, out_channels: int | None, stages: int, method: str = "bilinear", bias: bool = False
    ):
        super().__init__()
        self.stages, self.method = stages, method
        self.out_channels = out_channels or in_channels
        self.map = nn.Conv2d(in_channels, out_channels, 1, bias=bias) if out_channels else nn.Identity()

    def forward(self, ctp: Tensor) -> Tensor:
        for _ in range(self.stages):
            ctp = F.interpolate(ctp, scale_factor=0.5, mode=self.method)
        return self.map(ctp)


class HalvingBlock(nn.Module):
    """Residual block at half the size: InstanceNorm, SiLU, mean over 2x2, convolution; InstanceNorm, SiLU, convolution
    (starts at 0); plus the halved input (by a 3x3 convolution if the channels change). Norms are without parameters, of
    each slice.
    """

    def __init__(self, c_in: int, c_out: int, slices: int):
        super().__init__()
        self.conv1 = PlaneConv(c_in, c_out, slices)
        self.conv2 = zeroed(PlaneConv(c_out, c_out, slices))
        self.skip = nn.Conv2d(c_in, c_out, 3, padding=1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.avg_pool2d(F.silu(F.instance_norm(x)), 2))
        h = self.conv2(F.silu(F.instance_norm(h)))
        return self.skip(F.avg_pool2d(x, 2)) + h


class VolumeConditioner(nn.Module):
    """The rescaled CT perfusion plus a learned branch, which starts at 0: (B * slices, T, X, Y), slices in order.

    The branch has `stages` halving blocks of width model_channels, twice that, ..., each with convolutions along the
    slices, and each seeing the study at its own size beside what the block before gave (149,904 parameters for 15 time
    points and width 32).
    """

    def __init__(self, *, in_channels: int, out_channels: int, stages: int, model_channels: int, slices: int):
        super().__init__()
        self.out_channels = out_channels
        self.rescaler = Rescaler(in_channels=in_channels, out_channels=out_channels, stages=stages)
        # The first block thus sees the study twice, as in the original, whose weights fit.
        widths = [in_channels, *(model_channels * 2**i for i in range(stages))]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.blocks = nn.ModuleList(HalvingBlock(c_in + in_channels, c_out, slices) for c_in, c_out in pairs)
        self.out = zeroed(nn.Conv2d(widths[-1], out_channels, 1))

    def forward(self, ctp: Tensor) -> Tensor:
        h = ctp
        for block in self.blocks:
            beside = F.interpolate(ctp, size=h.shape[2:], mode="bilinear")
            h = block(torch.cat([h, beside], dim=1))
        return self.rescaler(ctp) + self.out(h)
