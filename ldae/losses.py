"""Loss terms of the autoencoder (stage 1): reconstruction, KL, least-squares adversarial, LPIPS over slices.

    generator       mean |x_hat - x| + 1e-7 KL + 1e-3 LPIPS + 0.025 mean (D(x_hat) - 1)^2
    discriminator   0.025 · 1/2 [mean D(x_hat)^2 + mean (D(x) - 1)^2]

KL is a sum over the latent, hence its small weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.lpips import SliceDistances


def reconstruction_loss(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean absolute error of two volumes of one shape; a scalar."""
    return F.l1_loss(x_hat, x)


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)), summed over the latent (B, C, d, h, w) and averaged over the batch."""
    return 0.5 * (mu.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Least-squares loss of the generator (Mao et al. 2017) from the discriminator's logits of what it made."""
    return (fake_logits - 1).square().mean()


def discriminator_loss(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """Least-squares loss of the discriminator: logits of generated volumes towards 0, of real ones towards 1."""
    return 0.5 * (fake_logits.square().mean() + (real_logits - 1).square().mean())


class SliceLPIPS(SliceDistances):
    """LPIPS over slices along three axes ("fake 3D"): two volumes (B, 1, D, H, W) -> a scalar.

    slice_fraction < 1 takes that share of each axis's slices, drawn anew at every call. sum_axes adds the three axes'
    means instead of averaging them. The other arguments: see SliceDistances.
    """

    # Deviation (original code): the sum over axes of volumes in [0, 1], that is sum_axes=True, value_range=None.

    def __init__(
        self, net: str | nn.Module, weights_path: str | Path | Sequence = (), *,
        value_range: tuple[float, float] | None = (0.0, 1.0), sum_axes: bool = False, **options,
    ):  # fmt: skip
        super().__init__(net, weights_path, value_range=value_range, **options)
        self.sum_axes = sum_axes

    def draw(self, size: Sequence[int], generator: torch.Generator | None = None) -> list[Tensor]:
        """Numbers of the slices to compare along each axis of a volume of `size`; all of them at slice_fraction 1."""
        if self.slice_fraction == 1:
            return [torch.arange(n) for n in size]
        return [torch.randperm(n, generator=generator)[: max(1, int(n * self.slice_fraction))] for n in size]

    def forward(
        self,
        x_hat: Tensor,
        x: Tensor,
        generator: torch.Generator | None = None,
        slices: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Distance; `generator` (CPU) draws the slices, or `slices` names them (what `draw` gave)."""
        per_axis = self.per_axis(x_hat, x, self.draw(x.shape[2:], generator) if slices is None else slices)
        return per_axis.sum() if self.sum_axes else per_axis.mean()

    def per_axis(self, x_hat: Tensor, x: Tensor, slices: Sequence[Tensor]) -> Tensor:
        """Mean distance of the `slices` along each axis, (3,)."""
        volumes, means = self.prepare(x_hat, x), []
        for axis, chosen in zip((2, 3, 4), slices, strict=True):
            chosen = chosen.to(x.device)
            a, b = (volume.index_select(axis, chosen).movedim(axis, 1).flatten(0, 1) for volume in volumes)
            means.append(self.compare(a, b).mean())
        return torch.stack(means)

