"""The diffusion of MGDCR's prior: deterministic decoding and inversion (DDIM, Song et al. 2021).

A slice x_0 (B, 1, H, W) in [-1, 1] stands for its code z (B, 512) and noise code x_T (like x_0), and they for it:
    z = model.encode(x_0);  x_T = invert(model, x_0, z, steps);  x_0 = decode(model, x_T, z, steps)
The round trip is nearly exact; `steps` must be the same in both. Nothing here keeps a state, and gradients are recorded
unless the caller disables them. The network sees original steps 0..999, however few of them are visited.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import schedulers
from common.cli import UserError

T = 1000
SCHEDULE = schedulers.make_schedule("linear", T, 1e-4, 0.02)
SOFTNESS = 0.1  # by how much a softly clamped image may leave [-1, 1]


def timesteps(steps: int, total: int = T) -> list[int]:
    """The decreasing steps that a process of `steps` steps visits, out of `total`; UserError outside 1..total.

    Where an integer stride gives exactly that many, its multiples 0, s, 2s, ... (what the original accepts: 30 steps
    are 0, 34, ..., 986). Otherwise the integers nearest to an even spacing of 0..total-1; a single step is the last.
    """
    # Deviation (original code): there a count that no stride gives is an error.
    try:
        if steps > 1:
            return schedulers.respace(total, steps, "stride")
    except UserError:
        if not 1 <= steps <= total:
            raise
    return schedulers.respace(total, steps, "trailing" if steps == 1 else "linspace")


# ------------------------------------------------------------------------------------------------------------- clamps


def soft_clamp(x: Tensor) -> Tensor:
    """x in [-1, 1]; beyond, x's sign times 1 + s * tanh((|x| - 1) / s), s = SOFTNESS: some gradient is left there."""
    inside = x.clamp(-1, 1)
    return inside + SOFTNESS * torch.tanh((x - inside) / SOFTNESS)


def _clip(clamp: str):
    clips = {"hard": 1.0, "soft": soft_clamp, "none": None}
    if clamp not in clips:
        raise ValueError(f"clamp {clamp!r}: choose hard, soft or none")
    return clips[clamp]


# ----------------------------------------------------------------------------------------------- decoding, inversion


def denoiser(model: nn.Module, z: Tensor | None, checkpointing: bool = False):
    """denoise(x_t, t) for common.schedulers; checkpointing: its activations are recomputed in the backward pass."""

    def denoise(x_t, t):
        if checkpointing and torch.is_grad_enabled():
            return checkpoint(model.denoise, x_t, t, z, use_reentrant=False)
        return model.denoise(x_t, t, z)

    return denoise


def decode(
    model: nn.Module,
    x_T: Tensor,
    z: Tensor | None,
    steps: int,
    clamp: str = "hard",
    checkpointing: bool = False,
    grad_steps: int | None = None,
    schedule: schedulers.Schedule = SCHEDULE,
) -> Tensor:
    """Slices x_0 (B, 1, H, W) of noise codes x_T (same shape) and codes z (B, C), in `steps` steps of DDIM.

    clamp: what every estimate of x_0 passes: "hard" is clamp(-1, 1), whose gradient is 0 where it acts; "soft" see
    `soft_clamp`; "none". checkpointing: only the state between steps is kept for the backward pass, every step is
    computed twice. grad_steps: gradients through the last so many steps only; x_T gets none unless that is all of them.
    model: a `DiffAE`, or an `UncondUNet` with z = None. ValueError for another clamp or no step with a gradient.
    """
    times = timesteps(steps, schedule.T)
    sample = partial(schedulers.ddim_sample, denoiser(model, z, checkpointing), schedule=schedule, clip=_clip(clamp))
    kept = len(times) if grad_steps is None else min(grad_steps, len(times))
    if kept < 1:
        raise ValueError(f"grad_steps {grad_steps}: at least one step must have a gradient")
    first, last = times[: len(times) - kept], times[len(times) - kept :]
    if first:
        with torch.no_grad():
            x_T = sample(x_T, timesteps=first, final=schedule.alphas_bar[last[0]].item())
    return sample(x_T, timesteps=last)


def invert(
    model: nn.Module,
    x_0: Tensor,
    z: Tensor | None,
    steps: int,
    clamp: str = "hard",
    refine: int = 0,
    schedule: schedulers.Schedule = SCHEDULE,
) -> Tensor:
    """Noise code x_T of slices x_0 (B, 1, H, W) with codes z: what `decode` turns back into x_0, nearly.

    refine 0: the original's rule, DDIM run backwards; x_0 counts as a state of step 0, and the code is the noise that
    is predicted from the state of the last step. refine n > 0: each step of `decode` is inverted by n fixed-point
    iterations, n network calls a step.
    """
    times = timesteps(steps, schedule.T)
    denoise = denoiser(model, z)
    if refine:
        return schedulers.ddim_undo(denoise, x_0, schedule, times, rounds=refine, clip=_clip(clamp))
    return schedulers.ddim_invert(denoise, x_0, schedule, times, end=0.0, clip=_clip(clamp))
