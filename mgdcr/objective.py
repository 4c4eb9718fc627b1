"""The objective of the inverse optimisation: start codes between acquired slices, and every term of the energy.

A dense volume has N = f(Z-1)+1 slices; `volume` is (N, H, W) in [0, 1], the decoded slices, x (N, 1, H, W) and z (N, C)
are their codes. Every term is a vector (N,): what each slice contributes, so that a log or an error can name slices.

    E = w_sax sum_i rho(s_fi - sax_i) + w_lax sum_v (N / n_v) sum_p rho(a_v (P_v s)_p + b_v - g_vp)
      + w_prior sum_k (|x_k - x0_k|^2 / HW + |z_k - z0_k|^2 / C) + w_norm sum_k (|x_k|^2 / HW - 1)^2
      + w_curvature sum_k |s_k+1 - 2 s_k + s_k-1|^2 / HW + w_difference (first difference, of images or codes)
      + w_temporal sum_k |s_k(t) - s_k(t +- 1)|^2 / HW

with P_v the sampling of view v in its own pixels, a_v and b_v its contrast in closed form, and rho a robust square. The
objectives of the two published scripts are `LEGACY`: the same sum with the view painted into the dense grid.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch

from common.cli import UserError
from mgdcr.intensity import GAINS

MIN_ANGLE = 1e-4  # rad; below it slerp is lerp
FLAT_VARIANCE = 1e-6  # added to variances inside the mask of a painted view, as the reference values show
MIN_PIXELS = 16  # a view needs so many pixels for a contrast of its own


# ---- start codes ----------------------------------------------------------------------------------------------------


def slerp(a: torch.Tensor, b: torch.Tensor, alpha: float) -> torch.Tensor:
    """Spherical interpolation of two codes of any one shape, `alpha` in [0, 1]; finite for equal and opposite codes."""
    if alpha in (0, 1):
        return (b if alpha else a).clone()
    norm = (a.norm() * b.norm()).clamp_min(1e-12)
    angle = torch.arccos(((a * b).sum() / norm).clamp(-1, 1))
    sine = torch.sin(angle)
    if angle < MIN_ANGLE or sine < MIN_ANGLE:
        return torch.lerp(a, b, alpha)
    return (torch.sin((1 - alpha) * angle) * a + torch.sin(alpha * angle) * b) / sine


def alphas(factor: int, schedule: str = "even") -> list[float]:
    """Positions of the `factor` codes of a gap, the acquired one first.

    "even" is j/f. "legacy" is the published 0, 0, 1/(f-1), ..., (f-2)/(f-1), up to 1/f of a gap off the slice's place.
    """
    if schedule == "even":
        return [j / factor for j in range(factor)]
    if schedule == "legacy":
        return [max(0, j - 1) / (factor - 1) for j in range(factor)]
    raise UserError(f"seed schedule {schedule!r}: choose even or legacy")


def seeds(x: torch.Tensor, z: torch.Tensor, factor: int, schedule: str = "even") -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of the N = f(Z-1)+1 dense slices from those of Z acquired ones: x (Z, 1, H, W) by slerp, z (Z, C) by lerp.

    Dense slice f*i holds exactly the codes of acquired slice i.
    """
    dense_x, dense_z = [], []
    for i in range(len(x) - 1):
        for alpha in alphas(factor, schedule):
            dense_x.append(slerp(x[i], x[i + 1], alpha))
            dense_z.append(torch.lerp(z[i], z[i + 1], alpha))
    return torch.stack([*dense_x, x[-1]]), torch.stack([*dense_z, z[-1]])


# ---- data of a frame ------------------------------------------------------------------------------------------------


@dataclass
class View:
    """One long-axis image: `sampler` (geometry.PlaneSampler) gives its pixels from a dense volume.

    values (P,) in the [0, 1] scale of the prior up to a gain and an offset; weights (P,): how far a pixel is to be
    believed, 0 (not at all) to 1.
    """

    name: str
    sampler: object
    values: torch.Tensor
    weights: torch.Tensor

    def to(self, device: torch.device) -> View:
        """A copy on a device."""
        return View(self.name, copy.copy(self.sampler).to(device), self.values.to(device), self.weights.to(device))

    @property
    def slices(self) -> torch.Tensor:
        """Nearest dense slice of every pixel, (P,)."""
        return self.sampler.coordinates[:, 0].round().long()


@dataclass
class Painted:
    """A long-axis image painted into the dense grid, as the published scripts have it: values, mask (N, 1, H, W)."""

    values: torch.Tensor
    mask: torch.Tensor


@dataclass
class FrameData:
    """What the codes of one frame are fitted to; `sax` (Z, H, W) in [0, 1], `factor` dense slices per acquired gap."""

    sax: torch.Tensor
    factor: int
    seed_x: torch.Tensor
    seed_z: torch.Tensor
    views: list[View] = field(default_factory=list)
    painted: Painted | None = None
    neighbours: list[torch.Tensor] = field(default_factory=list)  # volumes (N, H, W) of the phases before and after


# ---- terms ----------------------------------------------------------------------------------------------------------


def robust(residual: torch.Tensor, kind: str, scale: float) -> torch.Tensor:
    """rho(r), about r^2 for |r| << scale: "square", "huber" or "charbonnier" (linear beyond the scale)."""
    if kind == "square":
        return residual.square()
    if kind == "huber":
        size = residual.abs()
        return torch.where(size <= scale, residual.square(), scale * (2 * size - scale))
    return 2 * scale * ((residual.square() + scale**2).sqrt() - scale)


def contrast(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain and offset, without gradient, that bring `prediction` (P,) closest to `target` in weighted least squares.

    Of fewer than MIN_PIXELS pixels, a flat prediction or a gain beyond intensity.GAINS (an inverted view, or one that
    shows something else): gain 1 and the difference of the means.
    """
    with torch.no_grad():
        p, g, w = (v.double() if v.device.type != "mps" else v for v in (prediction, target, weights))
        total = w.sum().clamp_min(1e-12)
        mean_p, mean_g = (w * p).sum() / total, (w * g).sum() / total
        variance = (w * (p - mean_p).square()).sum() / total
        gain = (w * (p - mean_p) * (g - mean_g)).sum() / total / variance.clamp_min(1e-12)
        if (weights > 0).sum() < MIN_PIXELS or variance < 1e-8 or not GAINS[0] <= gain <= GAINS[1]:
            gain = torch.ones_like(gain)
        return gain.to(prediction.dtype), (mean_g - gain * mean_p).to(prediction.dtype)


def sax_term(volume: torch.Tensor, sax: torch.Tensor, factor: int, kind: str, scale: float) -> torch.Tensor:
    """Fidelity of dense slices f*i to the acquired ones (Z, H, W): mean rho per acquired slice, 0 elsewhere."""
    out = volume.new_zeros(len(volume))
    out[::factor] = robust(volume[::factor] - sax, kind, scale).mean((1, 2))
    return out


def lax_term(volume: torch.Tensor, view: View, kind: str, scale: float, match: bool = True) -> torch.Tensor:
    """Consistency with a view: (N / n) sum of rho over its pixels, each booked at its nearest slice.

    n counts pixels of non-zero weight; a view without any contributes 0.
    """
    out = volume.new_zeros(len(volume))
    count = int((view.weights > 0).sum())
    if count == 0:
        return out
    prediction = view.sampler.sample(volume)
    gain, offset = contrast(prediction, view.values, view.weights) if match else (1.0, 0.0)
    # The weights may not multiply what is not finite: a pixel that is not used has value 0.
    cost = view.weights * robust(gain * prediction + offset - view.values, kind, scale)
    return out.index_add(0, view.slices.to(volume.device), cost) * (len(volume) / count)


def prior_term(x, z, seed_x, seed_z) -> torch.Tensor:
    """Mean squared distance of both codes from where they began."""
    return (x - seed_x).square().flatten(1).mean(1) + (z - seed_z).square().mean(1)


def norm_term(x: torch.Tensor) -> torch.Tensor:
    """(|x|^2 / HW - 1)^2: a noise code keeps the norm of noise."""
    return (x.square().flatten(1).mean(1) - 1).square()


def curvature_term(volume: torch.Tensor) -> torch.Tensor:
    """Mean squared second difference along the slices, 0 at both ends."""
    if len(volume) < 3:
        return volume.new_zeros(len(volume))
    inner = (volume[2:] - 2 * volume[1:-1] + volume[:-2]).square().flatten(1).mean(1)
    return torch.cat([inner.new_zeros(1), inner, inner.new_zeros(1)])


def difference_term(values: torch.Tensor) -> torch.Tensor:
    """Mean squared difference to both neighbours (a pair counts twice, ends have one), of images or codes (N, ...)."""
    steps = (values[1:] - values[:-1]).square().flatten(1).mean(1)
    none = steps.new_zeros(1)
    return torch.cat([steps, none]) + torch.cat([none, steps])


def temporal_term(volume: torch.Tensor, neighbours: list[torch.Tensor]) -> torch.Tensor:
    """Mean squared difference to the volumes of the phases before and after, which are held fixed."""
    return sum(((volume - other).square().flatten(1).mean(1) for other in neighbours), volume.new_zeros(len(volume)))


def match_slices(slices: torch.Tensor, painted: Painted) -> torch.Tensor:
    """`slices` (N, 1, H, W) brought to the mean and SD of the painted view inside its mask, slice by slice."""
    count = painted.mask.sum((1, 2, 3), keepdim=True).clamp_min(1)

    def moments(values):
        mean = (values * painted.mask).sum((1, 2, 3), keepdim=True) / count
        variance = ((values - mean).square() * painted.mask).sum((1, 2, 3), keepdim=True) / count
        return mean, (variance + FLAT_VARIANCE).sqrt()

    (mean, sd), (mean_to, sd_to) = moments(slices), moments(painted.values)
    return (slices - mean) * sd_to / sd + mean_to


def painted_term(volume: torch.Tensor, painted: Painted, match: bool, mask_target: bool) -> torch.Tensor:
    """LAX term of the published scripts: (1 / n_k) sum (m s - g)^2 of every slice, 0 for a slice with an empty mask."""
    slices = volume[:, None]
    if match:
        slices = match_slices(slices, painted)
    target = painted.values * painted.mask if mask_target else painted.values
    count = painted.mask.sum((1, 2, 3))
    cost = (painted.mask * slices - target).square().sum((1, 2, 3)) / count.clamp_min(1)
    # Deviation (original code): a slice without long-axis pixels gave 0/0 and stopped the whole optimisation.
    return torch.where(count > 0, cost, torch.zeros_like(cost))


# ---- the sum --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """Weights of the terms (0: not computed) and how they are measured."""

    sax: float = 2.0
    lax: float = 4.0
    prior: float = 0.2
    norm: float = 0.02
    curvature: float = 2.0
    difference: float = 0.0
    temporal: float = 0.2
    rho: str = "charbonnier"  # of the sax and lax terms
    rho_scale: float = 0.1
    match: str = "view"  # contrast of the views: "view" (gain and offset), "slice" (painted views only), "none"
    difference_of: str = "images"  # or "codes": x
    mask_target: bool = True  # painted views: whether pixels outside the mask are left out of the target too

    def __post_init__(self):
        if min(self.sax, self.lax, self.prior, self.norm, self.curvature, self.difference, self.temporal) < 0:
            raise UserError("weights of the objective must be 0 or more")
        if self.rho_scale <= 0 or self.rho not in ("square", "huber", "charbonnier"):
            raise UserError(f"rho {self.rho} of scale {self.rho_scale}: choose square, huber or charbonnier, scale > 0")

    def image_terms(self, volume: torch.Tensor, data: FrameData) -> dict[str, torch.Tensor]:
        """Un-weighted terms of the decoded volume (N, H, W) in [0, 1]: name -> (N,)."""
        out = {}
        if self.sax:
            out["sax"] = sax_term(volume, data.sax, data.factor, self.rho, self.rho_scale)
        if self.lax and data.painted is not None:
            out["lax"] = painted_term(volume, data.painted, self.match == "slice", self.mask_target)
        elif self.lax:
            for view in data.views:
                out[f"lax_{view.name}"] = lax_term(volume, view, self.rho, self.rho_scale, self.match != "none")
        if self.curvature:
            out["curvature"] = curvature_term(volume)
        if self.difference and self.difference_of == "images":
            out["difference"] = difference_term(volume)
        if self.temporal and data.neighbours:
            out["temporal"] = temporal_term(volume, data.neighbours)
        return out

    def code_terms(self, x: torch.Tensor, z: torch.Tensor, data: FrameData) -> dict[str, torch.Tensor]:
        """Un-weighted terms of the codes: name -> (N,)."""
        out = {}
        if self.prior:
            out["prior"] = prior_term(x, z, data.seed_x, data.seed_z)
        if self.norm:
            out["norm"] = norm_term(x)
        if self.difference and self.difference_of == "codes":
            out["difference"] = difference_term(x)
        return out

    def weight(self, name: str) -> float:
        return getattr(self, name.partition("_")[0])

    def total(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum over terms and slices."""
        return sum(self.weight(name) * value.sum() for name, value in terms.items())


LEGACY = {
    "ex8_multi": Objective(sax=0, lax=6, prior=0.02, norm=0, curvature=0, difference=3, temporal=0, rho="square",
                           match="slice", difference_of="codes", mask_target=False),
    "ex8_norm": Objective(sax=0, lax=5, prior=0.02, norm=0, curvature=0, difference=5, temporal=0, rho="square",
                          match="none", difference_of="images", mask_target=False),
}  # fmt: skip


def blame(terms: dict[str, torch.Tensor]) -> str:
    """Which slices of which terms are not finite, "slice 3 of term lax_2ch, ..."; empty if all are finite."""
    bad = []
    for name, values in terms.items():
        wrong = torch.nonzero(~torch.isfinite(values.detach())).flatten().tolist()
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            bad.append(f"slice {wrong[0]}{more} of term {name}")
    return ", ".join(bad)
