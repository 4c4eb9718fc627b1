"""Loss terms of the autoencoder: reconstruction, KL, and LPIPS over the slices of all three axes.

The published loss is 1.0 * L1 + 1e-6 * KL + 0.6 * LPIPS. LPIPS (Zhang et al., CVPR 2018, version 0.1) is written out:
neither torchvision nor lpips is needed and nothing is downloaded; its pretrained weights come from files.
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


def reconstruction_loss(x_hat: Tensor, x: Tensor, kind: str) -> Tensor:
    """Mean absolute ("l1") or squared ("mse") error of two volumes of one shape; a scalar."""
    return {"l1": F.l1_loss, "mse": F.mse_loss}[kind](x_hat, x)


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)), summed over the latent (B, C, d, h, w) and averaged over the batch."""
    return 0.5 * (mu.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1).mean()


# -------------------------------------------------------------------------------------------------------------- LPIPS

# Layers up to the last convolution that LPIPS looks at: "pool", or (channels in, out, kernel, stride, padding) of a
# convolution, each followed by ReLU. A layer's number is its place in torchvision's `features`.
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
BACKBONES = {  # layers, the convolutions whose activations are compared, size of a max-pool window, smallest slice side
    "alex": (ALEX, (0, 3, 6, 8, 10), 3, 31),
    "vgg": (VGG, (2, 7, 14, 21, 28), 2, 16),
}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS' own normalisation of images in [-1, 1]


class LPIPS(nn.Module):
    """Perceptual distance of image pairs, 2D: (N, 1 or 3, h, w) twice -> (N,). Frozen; weights as `load` finds them.

    The squared differences of unit-length activations at five depths, weighted per channel and averaged over the image.
    """

    def __init__(self, net: str):
        super().__init__()
        layers, self.compared, self.pool, self.smallest = BACKBONES[net]
        self.net, self.layers = net, layers
        convs = {str(k): layer for k, layer in layers.items() if layer != "pool"}
        self.features = nn.ModuleDict({k: nn.Conv2d(*sizes) for k, sizes in convs.items()})
        widths = [layers[k][1] for k in self.compared]
        self.heads = nn.ParameterList([nn.Parameter(torch.rand(1, width, 1, 1)) for width in widths])
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def activations(self, image: Tensor) -> list[Tensor]:
        """Activations of unit length over the channels at the five compared depths."""
        h, found = (image - self.shift) / self.scale, []  # one channel becomes three here
        for k, layer in self.layers.items():
            if layer == "pool":
                h = F.max_pool2d(h, self.pool, 2)
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
    if parts[0] == "net" and len(parts) == 4:
        return f"features.{parts[2]}.{parts[3]}"
    return f"heads.{parts[0][3:]}" if key.endswith(".model.1.weight") and parts[0][3:].isdigit() else key


class LPIPS3D(nn.Module):
    """LPIPS averaged over every slice of the three axes: two volumes (B, 1, D, H, W) -> one distance per pair (B,).

    net: "alex" or "vgg", read from the files `weights_path` (one or two, see LPIPS.load), or a module that compares
    images. slice_fraction < 1 takes that share of each axis's slices, drawn anew at every call without replacement; the
    mean stays unbiased. value_range (low, high) is mapped to the [-1, 1] that LPIPS was made for; None, as published,
    compares the values as they are. checkpointing recomputes `slice_batch` slices at a time in the backward pass.
    """

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
                                "--lpips_weights, or switch the term off with --lambda_lpips 0")  # fmt: skip
            net = LPIPS(net).load(paths)
        if not 0 < slice_fraction <= 1:
            raise UserError(f"slice fraction {slice_fraction}: choose more than 0 and at most 1")
        self.distance = net
        self.slice_fraction, self.value_range = slice_fraction, value_range
        self.slice_batch, self.checkpointing = slice_batch, checkpointing

    def forward(self, x_hat: Tensor, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Distance (B,); `generator` (CPU) draws the slices where slice_fraction is below 1."""
        smallest = getattr(self.distance, "smallest", 1)
        if min(x.shape[2:]) < smallest:
            size = "x".join(map(str, x.shape[2:]))
            raise UserError(f"volume {size} is too small for LPIPS: {smallest} voxels along each axis; switch it off")
        if self.value_range is not None:
            low, high = self.value_range
            x_hat, x = (2 * (volume - low) / (high - low) - 1 for volume in (x_hat, x))
        total = 0.0
        for axis in (2, 3, 4):
            n = x.shape[axis]
            a, b = x_hat.movedim(axis, 1), x.movedim(axis, 1)  # (B, n, 1, rows, columns)
            if self.slice_fraction < 1:
                chosen = torch.randperm(n, generator=generator)[: max(1, round(n * self.slice_fraction))]
                a, b = a[:, chosen.to(x.device)], b[:, chosen.to(x.device)]
            per_slice = self._compare(a.flatten(0, 1), b.flatten(0, 1))
            total = total + n * per_slice.view(len(x), -1).mean(1)
        return total / sum(x.shape[2:])

    def _compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances of slices (N, 1, rows, columns) -> (N,), `slice_batch` of them at a time."""
        parts = []
        for part_a, part_b in zip(a.split(self.slice_batch), b.split(self.slice_batch), strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                parts.append(checkpoint(self.distance, part_a, part_b, use_reentrant=False))
            else:
                parts.append(self.distance(part_a, part_b))
        return torch.cat(parts)
