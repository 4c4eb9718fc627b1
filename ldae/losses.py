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
from torch.utils.checkpoint import checkpoint

from common.cli import UserError
from common.lpips import LPIPS


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


class SliceLPIPS(nn.Module):
    """LPIPS over slices along three axes ("fake 3D"): two volumes (B, 1, D, H, W) -> a scalar.

    net: "squeeze", "alex" or "vgg", read from the files `weights_path` (one or two, see LPIPS.load), or a module that
    compares images. slice_fraction < 1 takes that share of each axis's slices, drawn anew at every call. value_range
    (low, high) is mapped to the [-1, 1] that LPIPS was made for; None compares the values as they are. sum_axes adds
    the three axes' means instead of averaging them. checkpointing recomputes `slice_batch` slices at a time in the
    backward pass.
    """

    # Deviation (original code): the sum over axes of volumes in [0, 1], that is sum_axes=True, value_range=None.

    def __init__(
        self,
        net: str | nn.Module,
        weights_path: str | Path | Sequence = (),
        *,
        slice_fraction: float = 1.0,
        value_range: tuple[float, float] | None = (0.0, 1.0),
        sum_axes: bool = False,
        slice_batch: int = 64,
        checkpointing: bool = False,
    ):
        super().__init__()
        if isinstance(net, str):
            paths = [weights_path] if isinstance(weights_path, str | Path) else list(weights_path)
            paths = [path for path in paths if str(path)]
            if not paths:
                raise UserError(f"the perceptual loss needs pretrained {net} and LPIPS weights: name the files with "
                                "--lpips_weights, or switch the term off with --perceptual_weight 0")  # fmt: skip
            net = LPIPS(net).load(paths)
        if not 0 < slice_fraction <= 1:
            raise UserError(f"slice fraction {slice_fraction}: choose more than 0 and at most 1")
        self.distance = net
        self.slice_fraction, self.value_range, self.sum_axes = slice_fraction, value_range, sum_axes
        self.slice_batch, self.checkpointing = slice_batch, checkpointing

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
        smallest = getattr(self.distance, "smallest", 1)
        if min(x.shape[2:]) < smallest:
            size = "x".join(map(str, x.shape[2:]))
            raise UserError(f"volume {size} is too small for LPIPS: {smallest} voxels along each axis; switch it off "
                            "with --perceptual_weight 0")  # fmt: skip
        if self.value_range is not None:
            low, high = self.value_range
            x_hat, x = (2 * (volume - low) / (high - low) - 1 for volume in (x_hat, x))
        means = []
        for axis, chosen in zip((2, 3, 4), slices, strict=True):
            chosen = chosen.to(x.device)
            a, b = (volume.index_select(axis, chosen).movedim(axis, 1).flatten(0, 1) for volume in (x_hat, x))
            means.append(self._compare(a, b).mean())
        return torch.stack(means)

    def _compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances of slices (N, 1, rows, columns) -> (N,), `slice_batch` of them at a time."""
        parts = []
        for part_a, part_b in zip(a.split(self.slice_batch), b.split(self.slice_batch), strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                parts.append(checkpoint(self.distance, part_a, part_b, use_reentrant=False))
            else:
                parts.append(self.distance(part_a, part_b))
        return torch.cat(parts)
