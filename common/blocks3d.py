"""Building blocks that several 3D networks share: embeddings, attention, KL autoencoder, batch norm over ranks."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def sinusoidal_frequencies(half: int, *, max_period: float = 10000.0, endpoint: bool = False) -> Tensor:
    """Geometric frequencies from 1 down towards 1 / max_period, shape (half,), float32.

    endpoint=False: max_period^(-k/half), as in "Attention is all you need" and guided diffusion.
    endpoint=True: max_period^(-k/(half-1)), as in the original DDPM code; the last one is exactly 1 / max_period.
    """
    steps = max(half - 1, 1) if endpoint else max(half, 1)
    # In float32, as every original does it: at t near 1000 exact frequencies would move the angle by up to 6e-5.
    return torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32) / steps)


def sinusoidal_embedding(
    t: Tensor,
    dim: int,
    *,
    max_period: float = 10000.0,
    endpoint: bool = False,
    cos_first: bool = False,
    frequencies: Tensor | None = None,
) -> Tensor:
    """Sines and cosines of t times each frequency, in two blocks: (B,) -> (B, dim), float32 in [-1, 1].

    Sines come first unless cos_first. An odd dim gets a trailing zero. `frequencies` (dim // 2,) replaces the rule.
    """
    if frequencies is None:
        frequencies = sinusoidal_frequencies(dim // 2, max_period=max_period, endpoint=endpoint).to(t.device)
    angle = t.reshape(-1, 1).float() * frequencies.float()  # (B, dim // 2)
    blocks = (angle.cos(), angle.sin()) if cos_first else (angle.sin(), angle.cos())
    return F.pad(torch.cat(blocks, dim=1), (0, dim % 2))


def match_size(x: Tensor, size) -> Tensor:
    """Resize (B, C, D, H, W) trilinearly (half-pixel centres) to the spatial size (D', H', W'); untouched if equal."""
    size = tuple(size)
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=size, mode="trilinear", align_corners=False)


class SelfAttention3d(nn.Module):
    """Residual single-head self-attention over all voxels: (B, C, D, H, W) -> same.

    GroupNorm, 1x1x1 convolution to q, k, v (no bias), softmax(q k^T / sqrt(C)) v, 1x1x1 convolution, plus the input.
    """

    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels)
        self.qkv = nn.Conv3d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, N, 3C)
        q, k, v = (part.unsqueeze(1) for part in tokens.chunk(3, dim=2))  # each (B, 1 head, N, C)
        mixed = F.scaled_dot_product_attention(q, k, v)  # scales by 1 / sqrt(C)
        return x + self.out(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))


# ---- KL autoencoder (the function of MONAI's AutoencoderKL; Rombach et al. 2022)


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


# ---- several ranks


class SyncBatchNorm3d(nn.BatchNorm3d):
    """BatchNorm3d whose training statistics cover the batches of all ranks, on any device and backend.

    torch.nn.SyncBatchNorm works on CUDA only. Same keys as BatchNorm3d, and exactly BatchNorm3d with one process or in
    eval mode. Gradients averaged over the ranks (as DistributedDataParallel does) equal those of the whole batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce  # imports RPC code, hence not at module level

        self._check_input_dim(x)
        axes, shape = (0, 2, 3, 4), (1, -1, 1, 1, 1)
        h = x.float()
        # Two passes (mean, then centred squares): E[x^2] - E[x]^2 loses digits when the mean is large.
        totals = all_reduce(torch.cat([h.sum(axes), h.new_tensor([h.numel() / h.shape[1]])]))
        count = totals[-1].detach()
        mean = totals[:-1] / count
        centred = h - mean.view(shape)
        var = all_reduce(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var), self.momentum)
        y = centred * (var + self.eps).rsqrt().view(shape)
        return (y * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)
