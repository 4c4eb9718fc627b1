"""Loss terms of every LAPT stage; weights and how terms are added stand in the trainers.

    autoencoder   mean |x - x_hat| + w_code L_code + d (-mean D(x_hat)), d adaptive; discriminator: hinge
    LDM           mean (eps - eps_hat)^2
    LAPT          that + w_img L_img + w_les L_les + w_seg L_seg, of the decoded one-step estimate of the clean latent
    guide         1/2 Tversky + 1/2 (1 - Dice)^(gamma + 1)

Images are (N, C, ...) with any spatial axes: N slices, or N volumes. Masks are (N, 1, ...), 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common import schedulers

# ---- autoencoder and discriminator (Esser et al. 2021)


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, average: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """How much stronger the reconstruction pulls at `last_layer` than the adversarial term: ratio of gradient norms.

    A scalar without gradient in [0, 1e4]. `average` makes the gradients those of all ranks.
    """
    norms = []
    for term in (reconstruction, adversarial):
        (gradient,) = torch.autograd.grad(term, last_layer, retain_graph=True)
        norms.append((average(gradient) if average else gradient).norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4).detach()


def vq_generator_loss(
    x: Tensor,
    x_hat: Tensor,
    codebook_loss: Tensor,
    fake_logits: Tensor | None,
    last_layer: Tensor,
    *,
    codebook_weight: float,
    disc_weight: float,
    perceptual: Tensor | None = None,
    perceptual_weight: float = 0.0,
    average: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Terms of the autoencoder's loss: "loss" (their weighted sum), "rec", "codebook", "adversarial", "d_weight".

    fake_logits: the discriminator's of x_hat, None as long as it does not take part. perceptual: mean distance of x and
    x_hat, where it has a weight. Without gradients (validation) the adaptive weight is 0.
    """
    zero = x_hat.new_zeros(())
    terms = {"rec": F.l1_loss(x_hat, x), "codebook": codebook_loss, "adversarial": zero, "d_weight": zero}
    reconstruction = terms["rec"]
    if perceptual is not None:
        terms["perceptual"] = perceptual
        reconstruction = reconstruction + perceptual_weight * perceptual
    if fake_logits is not None:
        terms["adversarial"] = -fake_logits.mean()
        if fake_logits.requires_grad:
            ratio = adaptive_weight(reconstruction, terms["adversarial"], last_layer, average)
            terms["d_weight"] = disc_weight * ratio
    adversarial = terms["d_weight"] * terms["adversarial"]
    terms["loss"] = reconstruction + codebook_weight * codebook_loss + adversarial
    return terms


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Logits of real images towards 1 and above, of reconstructed ones towards -1 and below; a scalar."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


# ---- post-training: squared error e = (x_hat - x)^2 of decoded images

REDUCTIONS = ("sample", "batch", "sum")


def image_term(e: Tensor, mask: Tensor, weight: Tensor | None = None, reduction: str = "sample") -> Tensor:
    """Squared error e (N, C, ...) per brain voxel, channels added; a scalar.

    weight (N,): of each sample, for example by its timestep.
    "sample": mean over the samples of sum(e mask) / sum(mask). "batch", the original's: sum(e) / sum(mask) over the
    whole batch, where e counts outside the mask too, and the mask may cover more slices than e.
    """
    _check(reduction, ("sample", "batch"))
    if reduction == "batch":
        return _weighted(e, weight).sum() / mask.sum().clamp(min=1)
    return _weighted(_masked_mean(e, mask), weight).mean()


def lesion_term(e: Tensor, lesion: Tensor, weight: Tensor | None = None, reduction: str = "sample") -> Tensor:
    """Squared error e (N, C, ...) per lesion voxel, channels added; a scalar, 0 and without gradient if there is none.

    "sample": mean over all samples of sum(e lesion) / sum(lesion), 0 for those without lesion: every lesion counts the
    same whatever its size, and terms of parts of a batch add up. "sum", the original's of the 3D release: the sum of
    these ratios over samples (there slices). "batch", the original's of the 2D release: sum(e lesion) / sum(lesion)
    over the batch.
    """
    _check(reduction, REDUCTIONS)
    if reduction == "batch":
        # Deviation (original code): a batch without lesion is 0 / 0 there, and the step that follows ends the training.
        return (_weighted(e, weight) * lesion).sum() / lesion.sum().clamp(min=1)
    ratios = _weighted(_masked_mean(e, lesion), weight)
    return ratios.sum() if reduction == "sum" else ratios.mean()


def _check(reduction: str, known: tuple[str, ...]) -> None:
    if reduction not in known:
        raise ValueError(f"reduction {reduction!r}: choose {', '.join(known)}")


def _masked_mean(e: Tensor, mask: Tensor) -> Tensor:
    """sum(e mask) / sum(mask) of each sample, (N,); 0 where the mask is empty."""
    return (e * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


def _weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    return values if weight is None else values * weight.view(-1, *[1] * (values.ndim - 1))


def timestep_weight(
    schedule: schedulers.Schedule, kind: str, *, snr_gamma: float | None = None, t_max: int | None = None
) -> Tensor:
    """Weight of the pixel terms at each timestep, (T,) float32 in [0, 1].

    The estimate of the clean latent turns an error of the noise into one sqrt(1 / SNR) as large, which is 84 at the
    last step: unweighted terms learn from the steps that know least. "none": 1 everywhere, the original's. "snr":
    min(SNR, snr_gamma) / snr_gamma, so that no step weighs more than one of SNR snr_gamma (after Hang et al. 2023).
    "range": 1 where t < t_max, else 0.
    """
    ones = torch.ones(schedule.T)
    if kind == "none":
        return ones
    if kind == "snr":
        return (schedulers.snr(schedule).clamp(max=snr_gamma) / snr_gamma).float()
    if kind == "range":
        return ones * (torch.arange(schedule.T) < t_max)
    raise ValueError(f"timestep weight {kind!r}: choose none, snr or range")


# ---- segmentation


def _counts(p: Tensor, truth: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """True positives, false positives, false negatives: scalars over the batch, or (N,) of each sample."""
    _check(reduction, ("batch", "sample"))
    p, truth = p.float(), truth.float()
    maps = (p * truth, p * (1 - truth), (1 - p) * truth)
    return tuple(part.sum() if reduction == "batch" else part.flatten(1).sum(1) for part in maps)


def tversky(
    p: Tensor, truth: Tensor, *, alpha: float, beta: float, smooth: float = 1e-6, reduction: str = "batch"
) -> Tensor:
    """1 - Tversky index of probabilities p (N, 1, ...); alpha weights false positives, beta false negatives."""
    tp, fp, fn = _counts(p, truth, reduction)
    return (1 - (tp + smooth) / (tp + alpha * fp + beta * fn + smooth)).mean()


def focal_dice(p: Tensor, truth: Tensor, *, gamma: float, smooth: float = 1e-6, reduction: str = "batch") -> Tensor:
    """(1 - Dice)^(gamma + 1) of probabilities p (N, 1, ...); a scalar."""
    tp, fp, fn = _counts(p, truth, reduction)
    dice = (2 * tp + smooth) / (2 * tp + fp + fn + smooth)
    return (1 - dice).clamp(min=0).pow(gamma + 1).mean()


def guide_loss(
    logits: Tensor,
    lesion: Tensor,
    *,
    alpha: float,
    beta: float,
    gamma: float,
    smooth: float = 1e-6,
    reduction: str = "batch",
) -> Tensor:
    """1/2 Tversky + 1/2 (1 - Dice)^(gamma + 1) of sigmoid(logits) against the lesion mask (N, 1, ...); a scalar.

    reduction: counts over the whole "batch", the original's, or of each "sample", then averaged. Without any lesion
    voxel the loss is 1 and its gradient about smooth: give a larger smooth (in voxels) where such samples should teach.
    """
    p, how = logits.float().sigmoid(), {"smooth": smooth, "reduction": reduction}
    return 0.5 * tversky(p, lesion, alpha=alpha, beta=beta, **how) + 0.5 * focal_dice(p, lesion, gamma=gamma, **how)
