"""Loss terms of the autoencoder: reconstruction, KL, and LPIPS over the slices of all three axes.

The published loss is 1.0 * L1 + 1e-6 * KL + 0.6 * LPIPS.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.cli import UserError
from common.lpips import LPIPS


def reconstruction_loss(x_hat: Tensor, x: Tensor, kind: str) -> Tensor:
    """Mean absolute ("l1") or squared ("mse") error of two volumes of one shape; a scalar."""
    return {"l1": F.l1_loss, "mse": F.mse_loss}[kind](x_hat, x)


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)), summed over the latent (B, C, d, h, w) and averaged over the batch."""
    return 0.5 * (mu.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1).mean()


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
