"""The posterior-mean gap: what LDAE learns from, and how its two codes are made and used. Start reading here.

A diffusion prior eps(z_t, t) over latents z_0 is trained without labels and then frozen. Noise n destroys information,
z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) n, so the prior steps back to a mean that differs from the true one, which
knows z_0: the *posterior-mean gap*. A semantic encoder y = Enc(x_0) and a gradient estimator G(z_t, t, y) are trained
to fill it: mean + Sigma_t G. Whatever the prior cannot know has to come through y, which therefore learns what
distinguishes one brain from another.

In units of noise the shifted prediction is eps - c_t G, and the objective (PDAE, Zhang et al. 2022, eq. 10 and 14)

    L = E[ lambda_t · mean( n - eps(z_t, t) + c_t G(z_t, t, y) )^2 ],   lambda_t = SNR^gamma / (1 + SNR)
    c_t = sqrt(alpha_t) (1 - abar_{t-1}) / sqrt(1 - abar_t),            abar_{-1} = 1, so c_0 = 0

Two codes describe a scan: y, and z_T, where deterministic DDIM inversion of z_0 under y ends. Everything here is a pure
function of tensors and a `common.schedulers.Schedule`; `decoder(z_t, t, y) -> (eps, G)` is unet.ShiftUNet or any
function. Latents are (B, C, d, h, w), scaled to zero mean and unit variance per channel; t is (B,), integer.

Where the schedule's prediction is "v", the prior's output is v and the estimator shifts v: the shifted prediction is
v - c_t G, which as noise, eps = sigma_t z_t + alpha_t v, is a shift by -c_t alpha_t G. The objective stays in units of
noise. At high noise alpha_t is small, so that errors of a briefly trained network do not blow up samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from common import schedulers
from common.cli import UserError
from common.schedulers import Schedule, at

GAMMA = 0.1  # of lambda_t
SPACING, FINAL = "trailing", "clean"  # of sampling and inversion, see common.schedulers
# How the original samples. Deviation (original code): it clamps latents of unit variance to [-1, 1], an image-space
# habit that breaks z_T (SD 39 instead of 1) and flattens contrast; and it guides with sqrt(1 - abar_t) where training
# used c_t, so that at t = 0 an untrained G steers the first step of every inversion.
UPSTREAM = {"spacing": "nodes", "final": "first", "clip": 1.0, "coefficient": "sampling"}

# ---- the objective --------------------------------------------------------------------------------------------------


def shift_coefficient(schedule: Schedule) -> torch.Tensor:
    """c_t, (T,) float64: Sigma_t G, a shift of the posterior mean, is a shift of -c_t G of the predicted noise."""
    abar, abar_before = schedule.alphas_bar, _before(schedule)
    return (abar / abar_before).sqrt() * (1 - abar_before) / (1 - abar).sqrt()


def gap_weight(schedule: Schedule, gamma: float = GAMMA) -> torch.Tensor:
    """lambda_t, (T,) float64: small where little or everything of z_0 is left, largest in between (PDAE, eq. 14)."""
    snr = schedulers.snr(schedule)
    return snr**gamma / (1 + snr)


def posterior_gap_loss(eps, G, noise, t, schedule: Schedule, gamma: float = GAMMA) -> torch.Tensor:
    """lambda_t-weighted gap of each sample, (B,), from the decoder's eps and G and the true noise, all (B, ...).

    G None gives the gap that the prior leaves by itself. With prediction "v", eps and noise are predicted and true v.
    """
    error = noise - eps.to(noise.dtype)
    if G is not None:
        error = error + at(shift_coefficient(schedule), t, error) * G.to(noise.dtype)
    weight = gap_weight(schedule, gamma)
    if schedule.prediction == "v":
        weight = weight * schedule.alphas_bar  # an error of v is one of alpha_t v in the noise
    return weight.to(error.dtype).to(t.device)[t] * error.square().flatten(1).mean(1)


def _before(schedule: Schedule) -> torch.Tensor:
    """abar_{t-1}, (T,); 1 before the first step."""
    return torch.cat([schedule.alphas_bar.new_ones(1), schedule.alphas_bar[:-1]])


# ---- denoisers for common.schedulers --------------------------------------------------------------------------------


def guidance(schedule: Schedule, coefficient: str = "training", stop_percent=0.0, timesteps=None) -> torch.Tensor:
    """Factor of -G at every step, (T,) float64: c_t ("training") or sqrt(1 - abar_t) ("sampling", the original's).

    stop_percent switches guidance off for the last floor(stop_percent · S) of the S `timesteps` that are visited.
    """
    tables = {"training": shift_coefficient, "sampling": lambda schedule: (1 - schedule.alphas_bar).sqrt()}
    if coefficient not in tables:
        raise ValueError(f"coefficient must be 'training' or 'sampling', got {coefficient!r}")
    table = tables[coefficient](schedule)
    if stop_percent:
        guided = len(timesteps) - math.floor(stop_percent * len(timesteps))
        stop_below = timesteps[guided - 1] if guided > 0 else schedule.T
        table = torch.where(torch.arange(schedule.T) >= stop_below, table, 0.0)
    return table


def guided_denoiser(
    decoder: Callable, y, schedule: Schedule, coefficient="training", stop_percent=0.0, timesteps=None
) -> Callable:
    """denoise(z_t, t) -> eps - c_t G for the code y (B, code_dim); options as for `guidance`."""
    table = guidance(schedule, coefficient, stop_percent, timesteps)

    def denoise(z_t, t):
        eps, G = decoder(z_t, t, y)
        return eps.to(z_t.dtype) - at(table, t, z_t) * G.to(z_t.dtype)

    return denoise


def mixed_decoder(decoder: Callable, y_1, y_2, alpha: float) -> Callable:
    """A decoder that ignores its y and mixes, at every step, what two codes say: G = (1 - alpha) G_1 + alpha G_2.

    Trajectory interpolation of PDAE, for `guided_denoiser(mixed_decoder(...), None, schedule)`.
    """

    def decode(z_t, t, _y=None):
        (eps, G_1), (_, G_2) = decoder(z_t, t, y_1), decoder(z_t, t, y_2)
        return eps, torch.lerp(G_1, G_2, alpha)

    return decode


# ---- from z_0 to z_T and back ---------------------------------------------------------------------------------------


def invert(
    denoise, z_0, schedule: Schedule, steps: int, *, spacing=SPACING, final=FINAL, clip=None, passes=0, callback=None
):
    """The stochastic code z_T of z_0: deterministic DDIM towards noise; `sample` with the same options gives z_0 again.

    That is exact only for many steps, or with `passes`: each step is then solved for the z from which the sampler
    steps back to where it came from, by so many more network calls (fixed-point iteration, Pan et al., ICCV 2023).
    UserError for a number of steps that the spacing does not have, and for `passes` with `clip`.
    """
    timesteps = schedulers.respace(schedule.T, steps, spacing)
    if not passes:
        return schedulers.ddim_invert(denoise, z_0, schedule, timesteps, start=final, clip=clip, callback=callback)
    if clip is not None:
        raise UserError("an inversion in several passes cannot undo a clamp: leave one of the two out")
    return schedulers.ddim_undo(denoise, z_0, schedule, timesteps, start=final, rounds=passes + 1)


def sample(
    denoise, z_T, schedule: Schedule, steps: int, *, sampler="ddim", spacing=SPACING, final=FINAL, clip=None,
    callback=None,
):  # fmt: skip
    """z_0 from z_T in `steps` network calls: "ddim", or for few steps from fresh noise "dpmpp_2m" (second order)."""
    run = {"ddim": schedulers.ddim_sample, "dpmpp_2m": schedulers.dpmpp_2m_sample}[sampler]
    timesteps = schedulers.respace(schedule.T, steps, spacing)
    return run(denoise, z_T, schedule, timesteps, final=final, clip=clip, callback=callback)


# ---- what was learned -----------------------------------------------------------------------------------------------


def posterior_mean(schedule: Schedule, z_0, z_t, t) -> torch.Tensor:
    """Mean of q(z_{t-1} | z_t, z_0); with a predicted z_0 the mean of the reverse step."""
    c_x0, c_xt, *_ = schedulers.posterior_coefficients(schedule.alphas_bar, _before(schedule))
    return at(c_x0, t, z_t) * z_0 + at(c_xt, t, z_t) * z_t


@torch.no_grad()
def gap_curve(decoder: Callable, z_0, y, schedule: Schedule, times, noise, gamma=GAMMA) -> dict[str, torch.Tensor]:
    """The gap over time with and without the estimator, each (B, K): the direct test of what was trained.

    times (K,) steps; noise (B, K, C, d, h, w), normal, fixed so that curves compare. "without" and "with" are mean
    squared distances of the posterior means, "loss_without" and "loss_with" the same in units of the objective.
    Deviation (original code): its helper uses uniform noise and averages four of five axes, which fails for volumes.
    """
    curves = {name: [] for name in ("without", "with", "loss_without", "loss_with")}
    for z, code, n in zip(z_0, y, noise, strict=True):  # one scan at all times is one batch
        z, code = z.expand_as(n), code.expand(len(times), -1)
        z_t, target = schedulers.q_sample(schedule, z, times, n), schedulers.training_target(schedule, z, times, n)
        eps, G = (x.to(n.dtype) for x in decoder(z_t, times, code))
        for name, shift in (("without", None), ("with", G)):
            guided = eps if shift is None else eps - at(shift_coefficient(schedule), times, eps) * shift
            z_0_pred = schedulers.x0_from_output(schedule, z_t, times, guided)
            gap = posterior_mean(schedule, z, z_t, times) - posterior_mean(schedule, z_0_pred, z_t, times)
            curves[name].append(gap.square().flatten(1).mean(1))
            curves[f"loss_{name}"].append(posterior_gap_loss(eps, shift, target, times, schedule, gamma))
    return {name: torch.stack(rows) for name, rows in curves.items()}


def gap_fraction(gap_with, gap_without) -> float:
    """Share of the prior's gap that the estimator fills, 1 - with/without of the means: 0 nothing, 1 all."""
    gap_with, gap_without = (torch.as_tensor(x, dtype=torch.float64).mean().item() for x in (gap_with, gap_without))
    return 1 - gap_with / gap_without if gap_without > 0 else math.nan


def gaussian_statistics(z: torch.Tensor) -> dict[str, float]:
    """Mean, SD, excess kurtosis and largest magnitude of all entries; 0, 1, 0 and about 4 for a unit Gaussian."""
    z = z.detach().double().flatten()
    mean, std = z.mean(), z.std(unbiased=False)
    kurtosis = ((z - mean) / std.clamp_min(1e-12)).pow(4).mean() - 3
    return {"mean": mean.item(), "std": std.item(), "kurtosis": kurtosis.item(), "max_abs": z.abs().max().item()}


def round_trip(
    denoise, z_0, schedule: Schedule, steps: int, passes: int = 0, **how
) -> tuple[dict[str, float], torch.Tensor]:
    """RMSE of z_0 -> z_T -> z_0 with `gaussian_statistics` of z_T, and that last z_0.

    `how`: options of `invert` and `sample`; passes: of `invert`.
    """
    z_T = invert(denoise, z_0, schedule, steps, passes=passes, **how)
    z_0_again = sample(denoise, z_T, schedule, steps, **how)
    rmse = (z_0_again - z_0).double().square().mean().sqrt().item()
    return {"rmse": rmse} | gaussian_statistics(z_T), z_0_again


def round_trip_control(denoise, z_0, schedule: Schedule, steps: int, **how) -> dict:
    """`round_trip` of a network ("network", "z_0") beside that of one that always predicts 0, as an untrained one does.

    Deterministic inversion undoes itself for any smooth network, so a small error is no evidence of learning; what a
    trained prior adds is a z_T that is distributed like noise. "warning": see `control_warning`.
    """
    network, z_0_again = round_trip(denoise, z_0, schedule, steps, **how)
    zero, _ = round_trip(lambda z_t, t: torch.zeros_like(z_t), z_0, schedule, steps, **how)
    warning = control_warning(network, zero)
    return {"steps": steps, "network": network, "zero_network": zero, "z_0": z_0_again, "warning": warning}


def control_warning(network: dict, zero_network: dict) -> str:
    """What is to be said of two round trips that agree in "rmse" and "std" (of z_T); empty if they differ."""
    if not all(math.isclose(network[k], zero_network[k], rel_tol=0.02, abs_tol=1e-7) for k in ("rmse", "std")):
        return ""
    return (f"the network's round trip (RMSE {network['rmse']:.2g}, SD of z_T {network['std']:.2g}) equals that of a "
            "network that always predicts 0: it shows no training")  # fmt: skip
