"""Noise schedules, parameterisations and samplers of discrete-time Gaussian diffusion.

Notation: x_t = alpha * x_0 + sigma * eps, alpha = sqrt(alpha_bar_t), sigma = sqrt(1 - alpha_bar_t), v = alpha * eps -
sigma * x_0; x is (B, ...), t an integer step 0..T-1, as a tensor a LongTensor (B,).
Tables are float64 on the CPU. Samplers turn them into Python floats before their loop, so nothing in a loop waits for
the device; the state is float32 (float64 if x_T is). Gradients are recorded unless the caller disables them.

What the samplers share:
    denoise     denoise(x_t, t) -> output of the schedule's prediction type, (B, ...)
    timesteps   strictly decreasing steps to visit (see `respace`), None = all
    final       where the last step leads: "clean" (alpha_bar 1), "first" (alpha_bar of t = 0), or an alpha_bar
    noise       a torch.Generator, one generator per sample (results then do not depend on the batch), or a function
                noise(step_index, shape) -> tensor; step_index counts visited steps from 0
    clip        applied to every predicted x_0: None, a bound b (clamp to [-b, b]), "dynamic" (`clip_dynamic`), callable
    callback    callback(step_index, t, x_t, x_0_pred) before each update
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from common.cli import UserError


@dataclass(frozen=True)
class Schedule:
    """Noise schedule: betas and alphas_bar, (T,) float64 on the CPU; what the network predicts: "eps", "x0" or "v"."""

    betas: torch.Tensor
    alphas_bar: torch.Tensor
    prediction: str = "eps"

    @property
    def T(self):
        return len(self.betas)


def schedule_from_betas(betas, prediction="eps") -> Schedule:
    """Schedule of given betas, (T,) in (0, 1); ValueError otherwise."""
    betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
    if betas.ndim != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError("betas must be a non-empty vector of values strictly between 0 and 1")
    if prediction not in ("eps", "x0", "v"):
        raise ValueError(f"prediction must be 'eps', 'x0' or 'v', not {prediction!r}")
    return Schedule(betas, torch.cumprod(1 - betas, 0), prediction)


def make_schedule(kind, T, beta_start=1e-4, beta_end=0.02, prediction="eps") -> Schedule:
    """Named schedule of T steps.

    "linear" (Ho et al. 2020), "scaled_linear" (linear in sqrt(beta), Rombach et al. 2022), "sigmoid" (over [-6, 6]
    between the ends), "cosine" (Nichol & Dhariwal 2021: offset 0.008, beta <= 0.999; ignores the ends).
    """
    if kind == "linear":
        betas = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2
    elif kind == "sigmoid":
        betas = torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float64)) * (beta_end - beta_start) + beta_start
    elif kind == "cosine":
        f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"unknown schedule {kind!r}: linear, scaled_linear, sigmoid or cosine")
    return schedule_from_betas(betas, prediction)


def posterior_coefficients(alpha_bar, alpha_bar_prev):
    """(c_x0, c_xt, variance, beta): x_prev given x_0 and x_t has mean c_x0 * x_0 + c_xt * x_t (Ho et al. 2020, eq. 7).

    Floats or tensors. The two levels need not be neighbours: beta = 1 - alpha_bar / alpha_bar_prev is the respaced one.
    """
    beta = 1 - alpha_bar / alpha_bar_prev
    c_x0 = alpha_bar_prev**0.5 * beta / (1 - alpha_bar)
    c_xt = (1 - beta) ** 0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return c_x0, c_xt, beta * (1 - alpha_bar_prev) / (1 - alpha_bar), beta


def snr(schedule):
    """Signal-to-noise ratio alpha_bar / (1 - alpha_bar), (T,) float64."""
    return schedule.alphas_bar / (1 - schedule.alphas_bar)


def at(table, t, like):
    """Entries of a (T,) table at steps t (B,), shaped (B, 1, ...) to multiply `like` (B, ...), on its device."""
    table = table.to(_dtype(like)).to(like.device, non_blocking=True)  # cast first: some devices have no float64
    return table[t.to(like.device)].reshape(-1, *[1] * (like.ndim - 1))


def _dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _alpha_sigma(schedule, t, like):
    return at(schedule.alphas_bar.sqrt(), t, like), at((1 - schedule.alphas_bar).sqrt(), t, like)


def q_sample(schedule, x_0, t, noise):
    """x_t of x_0 (B, ...) at steps t (B,) with standard normal noise (B, ...)."""
    alpha, sigma = _alpha_sigma(schedule, t, x_0)
    return alpha * x_0 + sigma * noise


def training_target(schedule, x_0, t, noise):
    """What the network should return at q_sample(schedule, x_0, t, noise): the noise, x_0 or v."""
    alpha, sigma = _alpha_sigma(schedule, t, x_0)
    return {"eps": lambda: noise, "x0": lambda: x_0, "v": lambda: alpha * noise - sigma * x_0}[schedule.prediction]()


def _to_x0(kind, value, x, alpha, sigma):
    if kind == "eps":
        return (x - sigma * value) / alpha
    return value if kind == "x0" else alpha * x - sigma * value


def _to_eps(kind, value, x, alpha, sigma):
    if kind == "x0":
        return (x - alpha * value) / sigma
    return value if kind == "eps" else alpha * value + sigma * x


def x0_from_eps(schedule, x_t, t, eps):
    """x_0 from eps, both (B, ...), at x_t (B, ...) and steps t (B,)."""
    return _to_x0("eps", eps, x_t, *_alpha_sigma(schedule, t, x_t))


def x0_from_v(schedule, x_t, t, v):
    """x_0 from v; shapes as x0_from_eps."""
    return _to_x0("v", v, x_t, *_alpha_sigma(schedule, t, x_t))


def eps_from_x0(schedule, x_t, t, x_0):
    """eps from x_0; shapes as x0_from_eps."""
    return _to_eps("x0", x_0, x_t, *_alpha_sigma(schedule, t, x_t))


def eps_from_v(schedule, x_t, t, v):
    """eps from v; shapes as x0_from_eps."""
    return _to_eps("v", v, x_t, *_alpha_sigma(schedule, t, x_t))


def v_from_eps(schedule, x_t, t, eps):
    """v from eps; shapes as x0_from_eps."""
    alpha, sigma = _alpha_sigma(schedule, t, x_t)
    return (eps - sigma * x_t) / alpha


def v_from_x0(schedule, x_t, t, x_0):
    """v from x_0; shapes as x0_from_eps."""
    alpha, sigma = _alpha_sigma(schedule, t, x_t)
    return (alpha * x_t - x_0) / sigma


def x0_from_output(schedule, x_t, t, output):
    """x_0 from a network output (the schedule's prediction type); shapes as x0_from_eps."""
    return _to_x0(schedule.prediction, output, x_t, *_alpha_sigma(schedule, t, x_t))


def clip_dynamic(x_0, ratio=0.995, max_value=math.inf):
    """Dynamic thresholding: clamp each sample to its `ratio` quantile s of |x_0|, 1 <= s <= max_value, and divide by s.

    x_0 (B, ...) with data in [-1, 1] (Saharia et al. 2022, section 2.3).
    """
    flat = x_0.abs().flatten(1).sort(dim=1).values  # torch.quantile refuses more than 2^24 values
    rank = ratio * (flat.shape[1] - 1)
    low, high = flat[:, math.floor(rank)], flat[:, math.ceil(rank)]
    s = torch.lerp(low, high, rank % 1).clamp(1, max_value).reshape(-1, *[1] * (x_0.ndim - 1))
    return torch.minimum(torch.maximum(x_0, -s), s) / s


def guided(denoise_cond, denoise_uncond, scale):
    """Classifier-free guidance as a denoiser: uncond + scale * (cond - uncond) (Ho & Salimans 2022).

    Scale 1 is denoise_cond itself and scale 0 denoise_uncond itself. The mix means the same in eps, x0 and v.
    """
    if scale in (0, 1):
        return denoise_cond if scale == 1 else denoise_uncond

    def denoise(x_t, t):
        cond, uncond = denoise_cond(x_t, t).to(x_t.dtype), denoise_uncond(x_t, t).to(x_t.dtype)
        return uncond + scale * (cond - uncond)

    return denoise


def respace(T, steps, spacing="trailing", offset=0) -> list[int]:
    """`steps` decreasing timesteps out of T; UserError if they do not exist.

    trailing  from T-1 in equal strides, rounded (Lin et al. 2023); starts at the noisiest step for every count
    leading   k * (T // steps), k = steps-1..0
    linspace  evenly from T-1 to 0, rounded
    nodes     k * (T-1) // steps, k = steps..1; node 0 is where to end, final="first" (PDAE)
    stride    0, s, 2s, ... with the smallest s that gives exactly `steps` below T ("ddimN" of DiffAE)
    `offset` is added to every step (1 with "leading": the DDIM of latent diffusion).
    """
    if not 1 <= steps <= T:
        raise UserError(f"{steps} sampling steps: choose 1 to {T}, the steps of the noise schedule")
    up = np.arange(steps)
    if spacing == "trailing":
        times = np.round(np.arange(T, 0, -T / steps)[:steps]).astype(int)[::-1] - 1
    elif spacing == "leading":
        times = up * (T // steps)
    elif spacing == "linspace":
        times = np.round(np.linspace(0, T - 1, steps)).astype(int)
    elif spacing == "nodes":
        if steps == T:
            raise UserError(f"{steps} sampling steps with spacing nodes: choose at most {T - 1}")
        times = (up + 1) * (T - 1) // steps
    elif spacing == "stride":
        counts = {len(range(0, T, s)): s for s in range(T - 1, 0, -1)}  # later, smaller strides win
        if steps not in counts:
            near = ", ".join(map(str, sorted(sorted(counts, key=lambda n: abs(n - steps))[:4])))
            raise UserError(f"{steps} sampling steps: no integer stride of {T} gives it; choose for example {near}")
        times = up * counts[steps]
    else:
        raise UserError(f"spacing {spacing!r}: choose trailing, leading, linspace, nodes or stride")
    times = (times + offset).tolist()[::-1]
    if times[0] >= T or times[-1] < 0:
        raise UserError(f"{steps} sampling steps with offset {offset} leave 0..{T - 1}: choose another offset or count")
    return times


def draw_noise(generators, shape, device="cpu"):
    """Standard normal float32 tensor of `shape` on `device`, from one generator or a list of one per sample."""
    many = not isinstance(generators, torch.Generator)
    source = (generators[0] if many else generators).device
    pinned = torch.device(device).type == "cuda" and source.type == "cpu"  # so that the copy need not wait
    out = torch.empty(shape, device=source, pin_memory=pinned)
    for part, generator in zip(out, generators, strict=True) if many else [(out, generators)]:
        part.normal_(generator=generator)
    return out.to(device, non_blocking=True)


def _drawer(noise, x):
    if noise is None:
        raise ValueError("this sampler draws noise: pass noise= a generator, one generator per sample, or a function")
    draw = noise if callable(noise) else lambda i, shape: draw_noise(noise, shape, x.device)
    return lambda i: draw(i, x.shape).to(x, non_blocking=True)


def _levels(schedule, timesteps, final):
    """Timesteps as checked ints, and their alpha_bar with the final one appended, as floats."""
    times = [int(t) for t in (range(schedule.T - 1, -1, -1) if timesteps is None else timesteps)]
    if not times or times[0] >= schedule.T or times[-1] < 0 or any(b >= a for a, b in pairwise(times)):
        raise ValueError(f"timesteps must fall strictly within {schedule.T - 1}..0, got {times[:3]}...{times[-3:]}")
    table = schedule.alphas_bar.tolist()
    levels = [table[t] for t in times] + [{"clean": 1.0, "first": table[0]}.get(final, final)]
    if isinstance(levels[-1], str) or not levels[-2] <= levels[-1] <= 1:
        raise ValueError(f"final must be 'clean', 'first' or an alpha_bar from {levels[-2]:.6g} to 1, got {final!r}")
    return times, levels


def _predictor(denoise, schedule, x, times, clip, callback):
    """The state in working precision, and predict(i, x, alpha, sigma) -> clipped x_0, network output."""
    x = x.to(_dtype(x))
    rows = torch.tensor(times, device=x.device)[:, None].repeat(1, x.shape[0])  # (S, B)
    if clip == "dynamic":
        clip = clip_dynamic
    elif clip is not None and not callable(clip):
        clip = partial(torch.clamp, min=-clip, max=clip)

    def predict(i, x, alpha, sigma):
        output = denoise(x, rows[i]).to(x.dtype)
        x_0 = _to_x0(schedule.prediction, output, x, alpha, sigma)
        x_0 = clip(x_0) if clip else x_0
        if callback:
            callback(i, times[i], x, x_0)
        return x_0, output

    return x, predict


def ddpm_sample(
    denoise, x_T, schedule, timesteps=None, *, variance="small", final="clean", noise=None, clip=None, callback=None
):
    """Ancestral sampling, x_T (B, ...) -> x_0 (Ho et al. 2020, algorithm 2); arguments in the module docstring.

    variance "small" is the posterior variance, "large" beta. The last visited step adds no noise. The rule that never
    visits index 0 is timesteps=range(T - 1, 0, -1), final="first".
    """
    times, levels = _levels(schedule, timesteps, final)
    pick = {"small": 2, "large": 3}[variance]
    plan = []
    for a, b in pairwise(levels):
        c = posterior_coefficients(a, b)
        plan.append((a**0.5, (1 - a) ** 0.5, c[0], c[1], c[pick] ** 0.5))
    x, predict = _predictor(denoise, schedule, x_T, times, clip, callback)
    draw = _drawer(noise, x) if len(times) > 1 else None
    for i, (alpha, sigma, c_x0, c_xt, std) in enumerate(plan):
        x_0, _ = predict(i, x, alpha, sigma)
        x = c_x0 * x_0 + c_xt * x
        if i < len(plan) - 1:
            x = x + std * draw(i)
    return x


def _ddim(denoise, x, schedule, steps, eta=0.0, noise=None, clip=None, callback=None):
    """DDIM steps (t, alpha_bar from, alpha_bar to) in either direction (Song et al. 2021, eq. 12 and 16)."""
    plan = []
    for _, a, b in steps:
        if a == 1 and (clip is not None or schedule.prediction == "x0"):
            raise ValueError("at alpha_bar 1 a clipped or predicted x_0 says nothing about eps: use start='first'")
        std = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5 if eta > 0 else 0.0
        if std**2 > (1 - b) * (1 + 1e-9):
            raise ValueError(f"eta {eta} asks for more noise than a step can add")
        plan.append((a**0.5, (1 - a) ** 0.5, b**0.5, max(1 - b - std**2, 0.0) ** 0.5, std))
    x, predict = _predictor(denoise, schedule, x, [t for t, *_ in steps], clip, callback)
    draw = _drawer(noise, x) if eta > 0 else None
    for i, (alpha, sigma, alpha_to, sigma_to, std) in enumerate(plan):
        x_0, output = predict(i, x, alpha, sigma)
        # A clipped x_0 has another eps: the one that belongs to the same x_t.
        kind, value = (schedule.prediction, output) if clip is None else ("x0", x_0)
        eps = _to_eps(kind, value, x, alpha, sigma)
        x = alpha_to * x_0 + sigma_to * eps
        if std > 0:
            x = x + std * draw(i)
    return x


def ddim_sample(
    denoise, x_T, schedule, timesteps=None, *, eta=0.0, final="clean", noise=None, clip=None, callback=None
):
    """DDIM, x_T (B, ...) -> x_0, deterministic at eta 0; arguments in the module docstring."""
    times, levels = _levels(schedule, timesteps, final)
    steps = list(zip(times, levels[:-1], levels[1:], strict=True))
    return _ddim(denoise, x_T, schedule, steps, eta, noise, clip, callback)


def ddim_invert(
    denoise, x_0, schedule, timesteps=None, *, start="first", end=None, at_target=False, clip=None, callback=None
):
    """Noise code of x_0 (B, ...): ddim_sample(..., timesteps, final=start) backwards, up to the noisiest timestep.

    A step calls the network with the time it starts from (0 at first), with at_target the time it leads to (what
    DDIMInverseScheduler of diffusers does). end: alpha_bar of one more step from the noisiest timestep; 0.0 returns the
    noise predicted there (DiffAE). Sampling leads back to x_0 nearly; exactly after `ddim_undo`.
    """
    times, levels = _levels(schedule, timesteps, start)
    up, levels = times[::-1], levels[::-1] + ([] if end is None else [end])
    calls = [*up, up[-1]] if at_target else [0, *up]
    steps = [step for step in zip(calls, levels, levels[1:], strict=False) if step[1] != step[2]]  # none from 0 to 0
    return _ddim(denoise, x_0, schedule, steps, clip=clip, callback=callback)


def ddim_undo(denoise, x_0, schedule, timesteps=None, *, start="clean", rounds=1, clip=None):
    """Noise code that ddim_sample(..., timesteps, final=start) leads back to x_0 (B, ...), exactly for many `rounds`.

    Each step is solved for the state it came from by so many fixed-point iterations (Pan et al., ICCV 2023), one
    network call each; for predicted noise a single one is ddim_invert(at_target=True). The step that ends at alpha_bar
    1 is solved without `clip`, whose range x_0 has.
    """
    times, levels = _levels(schedule, timesteps, start)
    x = x_0.to(_dtype(x_0))
    for t, level, level_to in reversed(list(zip(times, levels, levels[1:], strict=False))):
        if level == level_to:
            continue  # start "first" is where the first step is
        target, ratio = x, (level / level_to) ** 0.5
        step, bound = [(t, level, level_to)], None if level_to == 1 else clip
        for _ in range(rounds):
            x = x + ratio * (target - _ddim(denoise, x, schedule, step, clip=bound))
    return x


def dpmpp_2m_sample(
    denoise, x_T, schedule, timesteps=None, *, final="clean", lower_order_final=True, clip=None, callback=None
):
    """DPM-Solver++(2M), midpoint form, x_T (B, ...) -> x_0 (Lu et al. 2022); arguments in the module docstring.

    Deterministic, second order at one call a step. Of first order are the first step, the last one if it ends clean,
    and with lower_order_final the last one of fewer than 15 steps.
    """
    times, levels = _levels(schedule, timesteps, final)
    lam = [math.log(a / (1 - a)) / 2 if a < 1 else math.inf for a in levels]  # log(alpha / sigma)
    plan = []
    for i, (a, b) in enumerate(pairwise(levels)):
        last = i == len(times) - 1
        first_order = i == 0 or (last and (b == 1 or (lower_order_final and len(times) < 15)))
        extra = 0.0 if first_order else (lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1]) / 2
        ratio = ((1 - b) / (1 - a)) ** 0.5
        plan.append((a**0.5, (1 - a) ** 0.5, ratio, b**0.5 - ratio * a**0.5, extra))
    x, predict = _predictor(denoise, schedule, x_T, times, clip, callback)
    x_0_before = None
    for i, (alpha, sigma, ratio, gain, extra) in enumerate(plan):
        x_0, _ = predict(i, x, alpha, sigma)
        ahead = x_0 + extra * (x_0 - x_0_before) if extra else x_0
        x, x_0_before = ratio * x + gain * ahead, x_0
    return x
