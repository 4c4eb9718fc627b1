"""The two classifiers of HC against TLE: EfficientNetV2-L on coronal slices as channels, and a plain 3D CNN.

EfficientNetV2 after Tan & Le, ICML 2021 (Table 4 and its -L variant), with the state-dict names of torchvision's
`efficientnet_v2_l`, so that published ImageNet weights load from a file without torchvision. A classifier takes
`preprocess.classifier_input`, (B, S, h, w): S coronal slices of axes 0 and 2. The published sizes are
115 x 128 x 128, 117,267,809 parameters (2D) and 6,451,521 parameters (3D).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from common import checkpoint
from common.blocks3d import SyncBatchNorm3d
from common.cli import UserError

# Stages of EfficientNetV2-L: block, expansion, stride, channels, repeats. The stem has 32 channels, the head 1280.
STAGES = (
    ("fused", 1, 1, 32, 4),
    ("fused", 4, 2, 64, 7),
    ("fused", 4, 2, 96, 7),
    ("mbconv", 4, 2, 192, 10),
    ("mbconv", 6, 1, 224, 19),
    ("mbconv", 6, 2, 384, 25),
    ("mbconv", 6, 1, 640, 7),
)
STEM, HEAD = 32, 1280
DROP_PATH = 0.2  # torchvision's stochastic depth, which the original keeps
FILTERS = (64, 128, 256, 256, 256, 256)  # 3D CNN of the original's later revision
HIDDEN = 128


class SyncBatchNorm2d(SyncBatchNorm3d):
    """Batch norm of (B, C, H, W) whose training statistics cover the batches of all ranks, on any device."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(2)).squeeze(2)


class PooledStages(nn.Sequential):
    """Stages in a row: `maps(x)` gives (B, F, ...), calling it their mean over space (B, F)."""

    def maps(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x).flatten(2).mean(2)


class StochasticDepth(nn.Module):
    """In training drops the residual branch of a sample with probability p and scales the kept ones by 1 / (1 - p)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.p  # (B, 1, 1, 1)
        return x * kept / (1 - self.p)


class SqueezeExcitation(nn.Module):
    """Gates channels by their spatial means: (B, C, h, w) -> same."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.silu(self.fc1(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.fc2(h))


def conv_norm(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    """Convolution without bias, batch norm (eps 1e-3), and SiLU unless `act` is False."""
    layers = [
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        SyncBatchNorm2d(c_out, eps=1e-3),
    ]
    return nn.Sequential(*layers, *([nn.SiLU()] if act else []))


class InvertedResidual(nn.Module):
    """MBConv (expand, depthwise, squeeze-excite, project) or Fused-MBConv (expand with 3 x 3, project)."""

    def __init__(self, kind: str, expansion: int, c_in: int, c_out: int, stride: int, drop_path: float):
        super().__init__()
        wide = c_in * expansion
        if kind == "fused" and expansion == 1:
            layers = [conv_norm(c_in, c_out, 3, stride)]
        elif kind == "fused":
            layers = [conv_norm(c_in, wide, 3, stride), conv_norm(wide, c_out, 1, act=False)]
        else:
            layers = [
                conv_norm(c_in, wide, 1),
                conv_norm(wide, wide, 3, stride, groups=wide),
                SqueezeExcitation(wide, max(1, c_in // 4)),
                conv_norm(wide, c_out, 1, act=False),
            ]
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(drop_path)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x)
        return x + self.stochastic_depth(h) if self.residual else h


class EfficientNetV2L(nn.Module):
    """EfficientNetV2-L on `in_channels` slices (B, S, h, w) -> logit (B, 1), positive for TLE; sides of 32 at least.

    Drop probabilities of the residual branches rise linearly from 0 to `drop_path` (which no block reaches). `width`
    scales the channels (to multiples of 8) and `depth` the repeats (rounded up), as Tan & Le scale their networks.
    """

    fast_layout = torch.channels_last

    def __init__(self, in_channels: int, dropout: float, drop_path: float, width: float = 1.0, depth: float = 1.0):
        super().__init__()

        def scaled(channels: int) -> int:
            return max(8, 8 * round(channels * width / 8))

        repeats = [math.ceil(n * depth) for *_, n in STAGES]
        total, channels, index = sum(repeats), scaled(STEM), 0
        # Deviation (original code): there the stem is replaced after the ImageNet weights are in; here `load_imagenet`
        # leaves stem and head as they are drawn.
        stages = [conv_norm(in_channels, channels, 3, 2)]
        for (kind, expansion, stride, c_out, _), n in zip(STAGES, repeats, strict=True):
            blocks = []
            for k in range(n):
                p = drop_path * index / total
                first = stride if k == 0 else 1
                blocks.append(InvertedResidual(kind, expansion, channels, scaled(c_out), first, p))
                channels, index = scaled(c_out), index + 1
            stages.append(nn.Sequential(*blocks))
        stages.append(conv_norm(channels, scaled(HEAD), 1))
        self.features = PooledStages(*stages)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(scaled(HEAD), 1))
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))

    def drop_path_rates(self) -> list[float]:
        """Drop probability of each block in order."""
        return [module.p for module in self.modules() if isinstance(module, StochasticDepth)]


class CNN3D(nn.Module):
    """3D CNN on a volume (B, S, h, w) or (B, 1, S, h, w) -> logit (B, n_outputs), positive for TLE.

    Per stage: convolution 3^3 (stride 2 in the first), batch norm, max pool 2 (not in the last), ReLU.
    """

    fast_layout = torch.channels_last_3d

    def __init__(self, filters: tuple[int, ...], dropout: float, n_outputs: int = 1):
        super().__init__()
        layers, channels = [], 1
        for i, width in enumerate(filters):
            pool = [nn.MaxPool3d(2)] if i < len(filters) - 1 else []
            conv = nn.Conv3d(channels, width, 3, stride=2 if i == 0 else 1, padding=1, bias=False)
            layers += [conv, SyncBatchNorm3d(width), *pool, nn.ReLU()]
            channels = width
        self.features = PooledStages(*layers)
        self.dropout = nn.Dropout(dropout)
        self.fc1 = nn.Linear(channels, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x if x.ndim == 5 else x.unsqueeze(1))
        return self.fc2(torch.relu(self.fc1(self.dropout(h))))

    @staticmethod
    def smallest_side(filters: tuple[int, ...]) -> int:
        """Voxels that an axis needs so that the last pooling still has something to pool."""
        return 2 ** len(filters) - 1


def build_classifier(settings: dict) -> nn.Module:
    """Network of a checkpoint's settings: model, in_channels, dropout, drop_path, width, depth, filters."""
    if settings["model"] == "3d":
        return CNN3D(tuple(settings["filters"]), settings["dropout"])
    names = ("in_channels", "dropout", "drop_path", "width", "depth")
    return EfficientNetV2L(**{name: settings[name] for name in names})


def check_input_size(settings: dict, shape: tuple[int, int, int]) -> None:
    """UserError if the classifier input (S, h, w) is too small for the network's downsampling."""
    smallest = CNN3D.smallest_side(settings["filters"]) if settings["model"] == "3d" else 1
    if min(shape) < smallest:
        stages = len(settings["filters"])
        raise UserError(f"classifier input {tuple(shape)} is too small for {stages} stages, which need {smallest} "
                        "voxels per axis; give fewer --filters")  # fmt: skip


def load_imagenet(network: EfficientNetV2L, path: Path) -> None:
    """Fill the backbone from torchvision's `efficientnet_v2_l` weights file; stem and head keep their fresh values.

    UserError if the file does not hold exactly that network.
    """
    state = checkpoint.load(path)
    own = network.state_dict()
    fresh = ("features.0.0.weight", "classifier.1.weight", "classifier.1.bias")
    if missing := [key for key in own if key not in fresh and not key.endswith("num_batches_tracked")
                   and (key not in state or state[key].shape != own[key].shape)]:  # fmt: skip
        raise UserError(f"{path} is no efficientnet_v2_l weights file of torchvision (no fitting {missing[0]}): "
                        "download that file, and use --model 2d with --width 1 --depth 1")  # fmt: skip
    network.load_state_dict(own | {key: value for key, value in state.items() if key in own and key not in fresh})
