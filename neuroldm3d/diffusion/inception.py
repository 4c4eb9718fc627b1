"""Inception-v3 (Szegedy et al., CVPR 2016) as feature network of slice-wise FID: 2048 numbers per image.

Two variants with the same state-dict names, which are torchvision's:

"fid"         the network of all published FIDs (Heusel et al., NeurIPS 2017), ported from TensorFlow by pytorch-fid;
              weights `pt_inception-2015-12-05-6726825d.pth`, 1008 classes. Average pools of blocks A, C and the first E
              leave padding out of the mean, the last E block pools by maximum. Input: images in [0, 1], bilinear
              299 x 299 (half-pixel centres, no antialiasing), then 2x - 1.
"torchvision" the ImageNet classifier `inception_v3_google-0cc3c7bd.pth`, 1000 classes, which the original used. Padding
              counts in every average pool. Input: images in [0, 1], the same resize, then ImageNet mean and deviation.

The classification head is loaded and never used; torchvision's auxiliary head is ignored.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import checkpoint
from common.cli import UserError

CLASSES = {"fid": 1008, "torchvision": 1000}
FILES = {"fid": "pt_inception-2015-12-05-6726825d.pth", "torchvision": "inception_v3_google-0cc3c7bd.pth"}
SIZE, WIDTH = 299, 2048
IMAGENET_MEAN, IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ConvBlock(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel, stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def row(in_channels: int, out_channels: int, length: int) -> ConvBlock:
    """1 x length convolution that keeps the size."""
    return ConvBlock(in_channels, out_channels, (1, length), padding=(0, length // 2))


def column(in_channels: int, out_channels: int, length: int) -> ConvBlock:
    """length x 1 convolution that keeps the size."""
    return ConvBlock(in_channels, out_channels, (length, 1), padding=(length // 2, 0))


def pool3(x: Tensor, kind: str) -> Tensor:
    """3 x 3 pooling with stride 1. kind: "avg" counts padding as zeros, "avg_inside" leaves it out, "max"."""
    if kind == "max":
        return F.max_pool2d(x, 3, stride=1, padding=1)
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=kind == "avg")


class InceptionA(nn.Module):
    """35 x 35 block: 64 + 64 + 96 + pool_features channels."""

    def __init__(self, in_channels: int, pool_features: int, pool: str):
        super().__init__()
        self.pool = pool
        self.branch1x1 = ConvBlock(in_channels, 64, 1)
        self.branch5x5_1 = ConvBlock(in_channels, 48, 1)
        self.branch5x5_2 = ConvBlock(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvBlock(in_channels, 64, 1)
        self.branch3x3dbl_2 = ConvBlock(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBlock(96, 96, 3, padding=1)
        self.branch_pool = ConvBlock(in_channels, pool_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        b5 = self.branch5x5_2(self.branch5x5_1(x))
        b3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), b5, b3, self.branch_pool(pool3(x, self.pool))], 1)


class InceptionB(nn.Module):
    """35 x 35 -> 17 x 17: 384 + 96 + in_channels channels."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3 = ConvBlock(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvBlock(in_channels, 64, 1)
        self.branch3x3dbl_2 = ConvBlock(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBlock(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        b3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), b3, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionC(nn.Module):
    """17 x 17 block with factorised 7 x 7 convolutions of `width` channels: 4 x 192 channels."""

    def __init__(self, in_channels: int, width: int, pool: str):
        super().__init__()
        self.pool = pool
        self.branch1x1 = ConvBlock(in_channels, 192, 1)
        self.branch7x7_1 = ConvBlock(in_channels, width, 1)
        self.branch7x7_2 = row(width, width, 7)
        self.branch7x7_3 = column(width, 192, 7)
        self.branch7x7dbl_1 = ConvBlock(in_channels, width, 1)
        self.branch7x7dbl_2 = column(width, width, 7)
        self.branch7x7dbl_3 = row(width, width, 7)
        self.branch7x7dbl_4 = column(width, width, 7)
        self.branch7x7dbl_5 = row(width, 192, 7)
        self.branch_pool = ConvBlock(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        b7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        bd = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        bd = self.branch7x7dbl_5(self.branch7x7dbl_4(bd))
        return torch.cat([self.branch1x1(x), b7, bd, self.branch_pool(pool3(x, self.pool))], 1)


class InceptionD(nn.Module):
    """17 x 17 -> 8 x 8: 320 + 192 + in_channels channels."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3_1 = ConvBlock(in_channels, 192, 1)
        self.branch3x3_2 = ConvBlock(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvBlock(in_channels, 192, 1)
        self.branch7x7x3_2 = row(192, 192, 7)
        self.branch7x7x3_3 = column(192, 192, 7)
        self.branch7x7x3_4 = ConvBlock(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        b3 = self.branch3x3_2(self.branch3x3_1(x))
        b7 = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([b3, b7, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionE(nn.Module):
    """8 x 8 block whose 3 x 3 convolutions fork into 1 x 3 and 3 x 1: 320 + 768 + 768 + 192 channels."""

    def __init__(self, in_channels: int, pool: str):
        super().__init__()
        self.pool = pool
        self.branch1x1 = ConvBlock(in_channels, 320, 1)
        self.branch3x3_1 = ConvBlock(in_channels, 384, 1)
        self.branch3x3_2a = row(384, 384, 3)
        self.branch3x3_2b = column(384, 384, 3)
        self.branch3x3dbl_1 = ConvBlock(in_channels, 448, 1)
        self.branch3x3dbl_2 = ConvBlock(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = row(384, 384, 3)
        self.branch3x3dbl_3b = column(384, 384, 3)
        self.branch_pool = ConvBlock(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        b3 = self.branch3x3_1(x)
        bd = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        forks = [self.branch3x3_2a(b3), self.branch3x3_2b(b3), self.branch3x3dbl_3a(bd), self.branch3x3dbl_3b(bd)]
        return torch.cat([self.branch1x1(x), *forks, self.branch_pool(pool3(x, self.pool))], 1)


def network_input(x: Tensor, variant: str) -> Tensor:
    """Images (B, h, w) or (B, 3, h, w) in [0, 1] -> (B, 3, 299, 299) in the range that the variant expects."""
    x = x[:, None] if x.ndim == 3 else x
    x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    if variant == "fid":
        return 2 * x - 1
    mean, sd = (x.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_SD))
    return (x - mean) / sd


class InceptionV3(nn.Module):
    """Grey slices (B, h, w) or colour images (B, 3, h, w) in [0, 1] -> features (B, 2048); see the module."""

    def __init__(self, variant: str):
        super().__init__()
        self.variant = variant
        average, last = ("avg_inside", "max") if variant == "fid" else ("avg", "avg")
        self.Conv2d_1a_3x3 = ConvBlock(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBlock(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBlock(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvBlock(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBlock(80, 192, 3)
        self.Mixed_5b = InceptionA(192, 32, average)
        self.Mixed_5c = InceptionA(256, 64, average)
        self.Mixed_5d = InceptionA(288, 64, average)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128, average)
        self.Mixed_6c = InceptionC(768, 160, average)
        self.Mixed_6d = InceptionC(768, 160, average)
        self.Mixed_6e = InceptionC(768, 192, average)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, average)
        self.Mixed_7c = InceptionE(WIDTH, last)
        self.fc = nn.Linear(WIDTH, CLASSES[variant])  # part of the published files; features come from before it

    def maps(self, x: Tensor) -> Tensor:
        """Network input (B, 3, 299, 299) -> last feature maps (B, 2048, 8, 8)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(network_input(x, self.variant)).mean((2, 3))


def load_inception(variant: str, path: str | Path) -> tuple[InceptionV3, dict]:
    """The network with the weights of a published file, and what a result must say about them.

    UserError if the file is missing, damaged, or has other entries or shapes than the variant.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no Inception weights at {path}; fetch {FILES[variant]} once and name it with --weights (its "
                        "download page is in the README), or take --features classifier or random")  # fmt: skip
    state = checkpoint.load(path)
    network = InceptionV3(variant)
    # Files older than torch 0.4.1 lack the batch counters, which inference does not need.
    counters = {key: torch.tensor(0) for key in network.state_dict() if key.endswith("num_batches_tracked")}
    state = counters | {key: value for key, value in state.items() if not key.startswith("AuxLogits.")}
    checkpoint.load_weights(network, state, path)
    sha256 = checkpoint.file_hash(path, digits=64)
    # Both publishers put the first eight digits of the file's SHA-256 into its name.
    standard = sha256.startswith(Path(FILES[variant]).stem.split("-")[-1])
    return network.eval().requires_grad_(False), {"file": path.name, "sha256": sha256, "published_file": standard}
