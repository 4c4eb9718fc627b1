"""3D ResNets with the state-dict names of MedicalNet (Chen et al., arXiv 1904.00625): features of whole volumes.

Weights such as `resnet_10_23dataset.pth`, `resnet_18_23dataset.pth`, `resnet_50_23dataset.pth`; the file name is
free, the depth is read from the weights. Stages 3 and 4 are dilated instead of strided. Shortcuts that change the
shape are 1 x 1 x 1 convolutions ("B"; depths 10 and 50) or strided with zero channels ("A"; depth 18).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import checkpoint
from common.cli import UserError

# depth: (blocks per stage, bottleneck, shortcut)
DEPTHS = {10: ((1, 1, 1, 1), False, "B"), 18: ((2, 2, 2, 2), False, "A"), 50: ((3, 4, 6, 3), True, "B")}
STAGES = ((64, 1, 1), (128, 2, 1), (256, 1, 2), (512, 1, 4))  # width, stride, dilation
FOREGROUND = 1e-3  # of a volume's range above its minimum


def conv3(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> nn.Conv3d:
    return nn.Conv3d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)


class Block(nn.Module):
    """Two 3³ convolutions, or 1³, 3³, 1³ as bottleneck, and the shortcut."""

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int, bottleneck: bool, shortcut: str):
        super().__init__()
        out_channels = width * (4 if bottleneck else 1)
        if bottleneck:
            self.conv1 = nn.Conv3d(in_channels, width, 1, bias=False)
            self.conv2 = conv3(width, width, stride, dilation)
            self.conv3 = nn.Conv3d(width, out_channels, 1, bias=False)
            self.bn3 = nn.BatchNorm3d(out_channels)
        else:
            self.conv1 = conv3(in_channels, width, stride, dilation)
            self.conv2 = conv3(width, width, 1, dilation)
        self.bn1, self.bn2 = nn.BatchNorm3d(width), nn.BatchNorm3d(width)
        self.bottleneck, self.stride, self.more_channels = bottleneck, stride, out_channels - in_channels
        if shortcut == "B" and (stride > 1 or self.more_channels):
            conv = nn.Conv3d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm3d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            h = self.bn3(self.conv3(F.relu(h)))
        if hasattr(self, "downsample"):
            return F.relu(h + self.downsample(x))
        strided = x[..., :: self.stride, :: self.stride, :: self.stride]
        return F.relu(h + F.pad(strided, (0, 0) * 3 + (0, self.more_channels)))


class MedicalNet(nn.Module):
    """Prepared volumes (B, 1, D, H, W) -> features (B, 512), or (B, 2048) at depth 50."""

    def __init__(self, depth: int):
        super().__init__()
        counts, bottleneck, shortcut = DEPTHS[depth]
        self.depth = depth
        self.conv1 = nn.Conv3d(1, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        channels = 64
        for number, (count, (width, stride, dilation)) in enumerate(zip(counts, STAGES, strict=True), 1):
            blocks = []
            for i in range(count):
                blocks.append(Block(channels, width, stride if i == 0 else 1, dilation, bottleneck, shortcut))
                channels = width * (4 if bottleneck else 1)
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.width = channels

    def maps(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(standardise(x)).mean((2, 3, 4))


def standardise(x: Tensor) -> Tensor:
    """Zero mean and unit variance over each volume's foreground, background 0: MedicalNet's input.

    MedicalNet fills the background with noise instead; zeros give every volume one fixed feature vector.
    """
    low, high = x.amin((1, 2, 3, 4), keepdim=True), x.amax((1, 2, 3, 4), keepdim=True)
    inside = (x > low + FOREGROUND * (high - low)).to(x.dtype)
    count = inside.sum((1, 2, 3, 4), keepdim=True).clamp(min=1)
    mean = (x * inside).sum((1, 2, 3, 4), keepdim=True) / count
    variance = ((x - mean).square() * inside).sum((1, 2, 3, 4), keepdim=True) / count
    return (x - mean) / variance.sqrt().clamp(min=1e-6) * inside


def load_medicalnet(path: str | Path) -> tuple[MedicalNet, dict]:
    """Network of the depth that the file holds, and what a result must say about the weights; UserError if unusable."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no MedicalNet weights at {path}; fetch e.g. resnet_10_23dataset.pth once and name it with "
                        "--weights, or take --features classifier")  # fmt: skip
    state = checkpoint.load(path)
    state = state.get("state_dict", state)
    state = {key.removeprefix("module."): value for key, value in state.items() if "conv_seg" not in key}
    depth = 50 if "layer1.0.conv3.weight" in state else 18 if "layer1.1.conv1.weight" in state else 10
    network = MedicalNet(depth)
    counters = {key: torch.tensor(0) for key in network.state_dict() if key.endswith("num_batches_tracked")}
    checkpoint.load_weights(network, counters | state, path)
    record = {"file": path.name, "sha256": checkpoint.file_hash(path, digits=64), "depth": depth}
    return network.eval().requires_grad_(False), record
