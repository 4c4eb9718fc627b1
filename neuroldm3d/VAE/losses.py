"""Loss terms of the autoencoder: reconstruction, KL, and LPIPS over the slices of all three axes.

The published loss is 1.0 * L1 + 1e-6 * KL + 0.6 * LPIPS.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.lpips import SliceDistances


def reconstruction_loss(x_hat: Tensor, x: Tensor, kind: str) -> Tensor:
    """Mean absolute ("l1") or squared ("mse") error of two volumes of one shape; a scalar."""
    return {"l1": F.l1_loss, "mse": F.mse_loss}[kind](x_hat, x)


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)), summed over the latent (B, C, d, h, w) and averaged over the batch."""
    return 0.5 * (mu.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1).mean()


class LPIPS3D(SliceDistances):
    """LPIPS averaged over every slice of the three axes: two volumes (B, 1, D, H, W) -> one distance per pair (B,).

    slice_fraction < 1 takes that share of each axis's slices, drawn anew at every call without replacement; the mean
    stays unbiased. value_range None is as published. The arguments: see SliceDistances.
    """

    option = "--lambda_lpips"

    def forward(self, x_hat: Tensor, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Distance (B,); `generator` (CPU) draws the slices where slice_fraction is below 1."""
        (x_hat, x), total = self.prepare(x_hat, x), 0.0
        for axis in (2, 3, 4):
            n = x.shape[axis]
            a, b = x_hat.movedim(axis, 1), x.movedim(axis, 1)  # (B, n, 1, rows, columns)
            if self.slice_fraction < 1:
                chosen = torch.randperm(n, generator=generator)[: max(1, round(n * self.slice_fraction))]
                a, b = a[:, chosen.to(x.device)], b[:, chosen.to(x.device)]
            per_slice = self.compare(a.flatten(0, 1), b.flatten(0, 1))
            total = total + n * per_slice.view(len(x), -1).mean(1)
        return total / sum(x.shape[2:])

