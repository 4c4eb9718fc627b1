"""LPIPS, the perceptual distance of image pairs (Zhang et al., CVPR 2018, version 0.1), on three backbones.

Written out: neither torchvision nor lpips is needed and nothing is downloaded; pretrained weights come from files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import common.checkpoint
from common.cli import UserError

# Layers up to the last one that LPIPS looks at: "pool", (channels in, out, kernel, stride, padding) of a convolution
# followed by ReLU, or (channels in, squeezed, out) of a fire module. A layer's number is its place in torchvision's
# `features`.
ALEX = {
    0: (3, 64, 11, 4, 2),
    2: "pool",
    3: (64, 192, 5, 1, 2),
    5: "pool",
    6: (192, 384, 3, 1, 1),
    8: (384, 256, 3, 1, 1),
    10: (256, 256, 3, 1, 1),
}
VGG = {
    0: (3, 64, 3, 1, 1),
    2: (64, 64, 3, 1, 1),
    4: "pool",
    5: (64, 128, 3, 1, 1),
    7: (128, 128, 3, 1, 1),
    9: "pool",
    10: (128, 256, 3, 1, 1),
    12: (256, 256, 3, 1, 1),
    14: (256, 256, 3, 1, 1),
    16: "pool",
    17: (256, 512, 3, 1, 1),
    19: (512, 512, 3, 1, 1),
    21: (512, 512, 3, 1, 1),
    23: "pool",
    24: (512, 512, 3, 1, 1),
    26: (512, 512, 3, 1, 1),
    28: (512, 512, 3, 1, 1),
}
SQUEEZE = {  # SqueezeNet 1.1 (Iandola et al. 2016)
    0: (3, 64, 3, 2, 0),
    2: "pool",
    3: (64, 16, 128),
    4: (128, 16, 128),
    5: "pool",
    6: (128, 32, 256),
    7: (256, 32, 256),
    8: "pool",
    9: (256, 48, 384),
    10: (384, 48, 384),
    11: (384, 64, 512),
    12: (512, 64, 512),
}
BACKBONES = {  # layers, those whose activations are compared, max-pool window (every second voxel) and ceil mode
    "alex": (ALEX, (0, 3, 6, 8, 10), 3, False),
    "vgg": (VGG, (2, 7, 14, 21, 28), 2, False),
    "squeeze": (SQUEEZE, (0, 4, 7, 9, 10, 11, 12), 3, True),
}
SMALLEST = {"alex": 31, "vgg": 16, "squeeze": 17}  # side of an image
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS' own normalisation of images in [-1, 1]


class Fire(nn.Module):
    """SqueezeNet's module: 1x1 convolution to few channels, ReLU, then 1x1 and 3x3 convolutions beside each other."""

    def __init__(self, c_in: int, squeezed: int, c_out: int):
        super().__init__()
        self.squeeze = nn.Conv2d(c_in, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, c_out // 2, 1)
        self.expand3x3 = nn.Conv2d(squeezed, c_out // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.squeeze(x))
        return torch.cat([self.expand1x1(h), self.expand3x3(h)], dim=1)


def _layer(sizes: tuple[int, ...]) -> tuple[nn.Module, int]:
    """A convolution or fire module, and its number of output channels."""
    return (Fire(*sizes), sizes[2]) if len(sizes) == 3 else (nn.Conv2d(*sizes), sizes[1])


class LPIPS(nn.Module):
    """Perceptual distance of image pairs, 2D: (N, 1 or 3, h, w) twice -> (N,). Frozen; weights as `load` finds them.

    net: "alex", "vgg" or "squeeze". The squared differences of unit-length activations at several depths, weighted per
    channel and averaged over the image.
    """

    def __init__(self, net: str):
        super().__init__()
        layers, self.compared, self.pool, self.ceil_mode = BACKBONES[net]
        self.net, self.layers, self.smallest = net, layers, SMALLEST[net]
        built = {k: _layer(sizes) for k, sizes in layers.items() if sizes != "pool"}
        self.features = nn.ModuleDict({str(k): layer for k, (layer, _) in built.items()})
        widths = [built[k][1] for k in self.compared]
        self.heads = nn.ParameterList([nn.Parameter(torch.rand(1, width, 1, 1)) for width in widths])
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def activations(self, image: Tensor) -> list[Tensor]:
        """Activations of unit length over the channels at the compared depths."""
        h, found = (image - self.shift) / self.scale, []  # one channel becomes three here
        for k, layer in self.layers.items():
            if layer == "pool":
                h = F.max_pool2d(h, self.pool, 2, ceil_mode=self.ceil_mode)
                continue
            h = F.relu(self.features[str(k)](h))
            if k in self.compared:
                found.append(F.normalize(h, dim=1, eps=1e-10))
        return found

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(self.activations(a), self.activations(b), self.heads, strict=True)
        return sum(((x - y).square() * head).sum(1).mean((1, 2)) for x, y, head in pairs)

    def load(self, paths: Sequence) -> LPIPS:
        """Fill from one file with everything or from two, backbone and heads; returns itself. UserError otherwise.

        Backbone keys are torchvision's (`features.0.weight`, ...; the classifier is ignored) or those of the lpips
        package (`net.slice1.0.weight`, ...), head keys always the latter's (`lin0.model.1.weight`, ...).
        """
        found = {}
        for path in paths:
            state = common.checkpoint.load(path)
            state = state.get("state_dict", state)
            found |= {_lpips_key(str(key)): value for key, value in state.items()}
        own = {key: value for key, value in self.state_dict().items() if key not in ("shift", "scale")}
        bad = [key for key in own if not isinstance(found.get(key), Tensor) or found[key].shape != own[key].shape]
        if bad:
            kind, _, rest = bad[0].partition(".")
            raise UserError(
                f"LPIPS weights {' and '.join(map(str, paths))}: no {'backbone' if kind == 'features' else 'head'} "
                f"{rest} of {self.net}; give torchvision's file of the backbone and the lpips package's {self.net}.pth"
            )
        self.load_state_dict({key: found[key] for key in own}, strict=False)  # shift and scale are constants
        return self


def _lpips_key(key: str) -> str:
    """Our name of an entry of a weights file: features.<k>.weight, heads.<i>; anything else stays."""
    parts = key.split(".")
    if parts[0] == "net" and len(parts) >= 4:
        return ".".join(["features", *parts[2:]])
    return f"heads.{parts[0][3:]}" if key.endswith(".model.1.weight") and parts[0][3:].isdigit() else key


class SliceDistances(nn.Module):
    """What the LPIPS terms over the slices of a volume share: the network, the range of values, slices in batches.

    net: a backbone of LPIPS, read from the files `weights_path` (one or two, see LPIPS.load), or a module that compares
    images. slice_fraction in (0, 1]. value_range (low, high) is mapped to the [-1, 1] that LPIPS was made for; None
    compares the values as they are. checkpointing recomputes `slice_batch` slices at a time in the backward pass.
    `option` is the one that weights the term, for error messages.
    """

    option = "--perceptual_weight"

    def __init__(
        self,
        net: str | nn.Module,
        weights_path: str | Path | Sequence = (),
        *,
        slice_fraction: float = 1.0,
        value_range: tuple[float, float] | None = None,
        slice_batch: int = 64,
        checkpointing: bool = False,
    ):
        super().__init__()
        if isinstance(net, str):
            paths = [weights_path] if isinstance(weights_path, str | Path) else list(weights_path)
            paths = [path for path in paths if str(path)]
            if not paths:
                raise UserError(f"the perceptual loss needs pretrained {net} and LPIPS weights: name the files with "
                                f"--lpips_weights, or switch the term off with {self.option} 0")  # fmt: skip
            net = LPIPS(net).load(paths)
        if not 0 < slice_fraction <= 1:
            raise UserError(f"slice fraction {slice_fraction}: choose more than 0 and at most 1")
        self.distance, self.slice_fraction, self.value_range = net, slice_fraction, value_range
        self.slice_batch, self.checkpointing = slice_batch, checkpointing

    def prepare(self, x_hat: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both volumes (B, 1, D, H, W) in the network's range; UserError where a slice is too small for it."""
        smallest = getattr(self.distance, "smallest", 1)
        if min(x.shape[2:]) < smallest:
            size = "x".join(map(str, x.shape[2:]))
            raise UserError(f"volume {size} is too small for LPIPS: {smallest} voxels along each axis; switch it off "
                            f"with {self.option} 0")  # fmt: skip
        if self.value_range is None:
            return x_hat, x
        low, high = self.value_range
        return 2 * (x_hat - low) / (high - low) - 1, 2 * (x - low) / (high - low) - 1

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances of slices (N, 1, rows, columns) -> (N,), `slice_batch` of them at a time."""
        parts = []
        for part_a, part_b in zip(a.split(self.slice_batch), b.split(self.slice_batch), strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                parts.append(checkpoint(self.distance, part_a, part_b, use_reentrant=False))
            else:
                parts.append(self.distance(part_a, part_b))
        return torch.cat(parts)
