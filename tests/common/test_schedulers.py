"""Schedules and samplers: closed forms, agreement with diffusers, exact scores of Gaussian data, convergence orders."""

import math

import diffusers
import numpy as np
import pytest
import torch

from common import schedulers as S
from common.cli import UserError

SHAPE = (2, 3, 4, 4)
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}


def draw(seed, shape=SHAPE, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(x_t, t):
    """Any smooth function of x_t and t, bounded so that differences cannot grow without limit."""
    return torch.tanh(0.7 * x_t) + 0.1 * torch.sin(t.to(x_t.dtype)).reshape(-1, *[1] * (x_t.ndim - 1))


def close(ours, theirs, tolerance=1e-5):
    """Largest difference relative to the larger of 1 and the largest value."""
    difference = (ours - theirs).abs().max().item() / max(1.0, theirs.abs().max().item())
    assert difference <= tolerance, difference


def theirs(scheduler_class, kind="linear", prediction="eps", exact=True, **options):
    """A diffusers scheduler; `exact` gives it float64 tables, so that only the formulas are compared."""
    scheduler = scheduler_class(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=KINDS[kind],
        prediction_type=PREDICTIONS[prediction],
        **options,
    )
    if exact:
        scheduler.alphas_cumprod = S.make_schedule(kind, 1000).alphas_bar
        scheduler.one = torch.ones((), dtype=torch.float64)
        if not options.get("set_alpha_to_one", True):
            scheduler.final_alpha_cumprod = scheduler.initial_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def walk(scheduler, x, steps, **step_options):
    """Run a diffusers scheduler; returns the states, the clean estimates and the timesteps."""
    scheduler.set_timesteps(steps)
    states, estimates = [x], []
    for t in scheduler.timesteps:
        out = scheduler.step(network(states[-1], t.expand(len(x))), t, states[-1], **step_options)
        states.append(out.prev_sample)
        estimates.append(getattr(out, "pred_original_sample", None))
    return states, estimates, scheduler.timesteps.tolist()


# --- schedules and formulas --------------------------------------------------------------------------------------
def test_linear_schedule_pinned_values():
    s = S.make_schedule("linear", 1000)
    assert s.betas.dtype == s.alphas_bar.dtype == torch.float64 and s.T == 1000
    pinned = {0: 0.9999, 1: 0.99978012, 10: 0.99780606, 100: 0.895141, 249: 0.524085, 500: 0.077797, 749: 0.0033506}
    for t, value in pinned.items():
        assert s.alphas_bar[t].item() == pytest.approx(value, abs=1e-6)
    assert s.alphas_bar[999].item() == pytest.approx(4.035830e-5, rel=1e-6)


def test_other_schedules_pinned_values():
    latent = S.make_schedule("scaled_linear", 1000, 0.0015, 0.0195)
    assert latent.betas[0].item() == pytest.approx(0.0015) and latent.betas[-1].item() == pytest.approx(0.0195)
    assert latent.alphas_bar[499].item() == pytest.approx(0.115844, abs=1e-6)
    assert latent.alphas_bar[999].item() == pytest.approx(1.42304e-4, rel=1e-5)
    cosine = S.make_schedule("cosine", 1000)
    assert cosine.betas[0].item() == pytest.approx(4.12842e-5, rel=1e-5)
    assert cosine.betas[500].item() == pytest.approx(3.15569e-3, rel=1e-5)
    assert cosine.betas[999].item() == pytest.approx(0.999)


@pytest.mark.parametrize("kind", KINDS)
def test_schedules_agree_with_diffusers(kind):
    ours = S.make_schedule(kind, 1000)
    reference = theirs(diffusers.DDPMScheduler, kind, exact=False)
    close(ours.betas, reference.betas.double(), 1e-6)
    close(ours.alphas_bar, reference.alphas_cumprod.double(), 1e-6)


@pytest.mark.parametrize("betas", [[], [0.1, 1.0], [0.0, 0.1], [[0.1]], [0.1, math.nan]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError):
        S.schedule_from_betas(betas)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="schedule"):
        S.make_schedule("quadratic", 10)
    with pytest.raises(ValueError, match="prediction"):
        S.make_schedule("linear", 10, prediction="score")


def test_posterior_coefficients():
    s = S.make_schedule("linear", 1000)
    alphas_bar_prev = torch.cat([s.alphas_bar.new_ones(1), s.alphas_bar[:-1]])
    c_x0, c_xt, variance, beta = S.posterior_coefficients(s.alphas_bar, alphas_bar_prev)
    torch.testing.assert_close(beta, s.betas, rtol=1e-11, atol=0)
    # Bayes: the precisions of q(x_t | x_prev) and q(x_prev | x_0) add up; at t = 0 the answer is x_0 itself.
    precision = (1 - s.betas[1:]) / s.betas[1:] + 1 / (1 - alphas_bar_prev[1:])
    torch.testing.assert_close(1 / variance[1:], precision, rtol=1e-9, atol=0)
    assert c_x0[0].item() == pytest.approx(1) and c_xt[0] == 0 and variance[0] == 0
    for t, row in {1: (0.545357, 0.454839, 5.4547e-5), 500: (0.003058, 0.994104, 1.005134e-2)}.items():
        assert (c_x0[t].item(), c_xt[t].item(), variance[t].item()) == pytest.approx(row, rel=5e-4)


def test_snr():
    s = S.make_schedule("cosine", 1000)
    for t in (0, 300, 999):
        assert S.snr(s)[t].item() == pytest.approx(s.alphas_bar[t].item() / (1 - s.alphas_bar[t].item()))


def test_q_sample_and_targets_agree_with_diffusers():
    x_0, noise, t = draw(1), draw(2), torch.tensor([7, 800])
    reference = theirs(diffusers.DDPMScheduler, exact=False)
    s = S.make_schedule("linear", 1000, prediction="v")
    close(S.q_sample(s, x_0, t, noise), reference.add_noise(x_0, noise, t))
    close(S.training_target(s, x_0, t, noise), reference.get_velocity(x_0, noise, t))
    assert S.training_target(S.make_schedule("linear", 1000), x_0, t, noise) is noise
    assert S.training_target(S.make_schedule("linear", 1000, prediction="x0"), x_0, t, noise) is x_0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_every_conversion(dtype, tolerance):
    x_0, eps = draw(1, dtype=dtype), draw(2, dtype=dtype)
    t = torch.tensor([20, 700])
    s = S.make_schedule("linear", 1000)
    x_t = S.q_sample(s, x_0, t, eps)
    v = S.training_target(S.make_schedule("linear", 1000, prediction="v"), x_0, t, eps)
    assert x_t.dtype == v.dtype == dtype
    for result, truth in [
        (S.x0_from_eps(s, x_t, t, eps), x_0),
        (S.x0_from_v(s, x_t, t, v), x_0),
        (S.eps_from_x0(s, x_t, t, x_0), eps),
        (S.eps_from_v(s, x_t, t, v), eps),
        (S.v_from_eps(s, x_t, t, eps), v),
        (S.v_from_x0(s, x_t, t, x_0), v),
    ]:
        close(result, truth, tolerance)
    for prediction, output in {"eps": eps, "x0": x_0, "v": v}.items():
        close(S.x0_from_output(S.make_schedule("linear", 1000, prediction=prediction), x_t, t, output), x_0, tolerance)


# --- respacing ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_respacing_agrees_with_diffusers(spacing):
    reference = theirs(diffusers.DDIMScheduler, timestep_spacing=spacing)
    for steps in (1, 2, 3, 7, 10, 30, 48, 50, 61, 333, 600, 1000):
        reference.set_timesteps(steps)
        valid = [t for t in reference.timesteps.tolist() if t >= 0]  # theirs ends at -1 for 61 trailing steps
        assert S.respace(1000, steps, spacing) == valid and len(valid) == steps


def test_respacing_rules():
    assert S.respace(1000, 2) == [999, 499]
    assert S.respace(1000, 2, "leading", offset=1) == [501, 1]
    assert S.respace(1000, 50, "leading", offset=1)[0] == 981
    assert S.respace(1000, 10, "nodes") == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert S.respace(1000, 50, "nodes")[-3:] == [59, 39, 19]
    assert S.respace(1000, 30, "stride") == list(range(986, -1, -34))
    assert [S.respace(1000, n, "stride")[-2] for n in (20, 25, 50, 100, 250)] == [50, 40, 20, 10, 4]
    for spacing in ("trailing", "leading", "linspace"):
        assert S.respace(20, 20, spacing) == list(range(19, -1, -1))
    assert all(type(t) is int for t in S.respace(1000, 7))


def test_stride_rule_admits_62_counts():
    def exists(steps):
        try:
            return len(S.respace(1000, steps, "stride")) == steps
        except UserError:
            return False

    admitted = [steps for steps in range(1, 1001) if exists(steps)]
    assert len(admitted) == 62 and not {1, 37, 60, 64, 300} & set(admitted)
    assert admitted[-9:] == [112, 125, 143, 167, 200, 250, 334, 500, 1000]


@pytest.mark.parametrize(
    "arguments, hint",
    [
        ((1000, 0), "1 to 1000"),
        ((1000, 1001), "1 to 1000"),
        ((1000, 1000, "nodes"), "999"),
        ((1000, 37, "stride"), "36, 38"),
        ((1000, 1000, "leading", 1), "offset 1"),
        ((1000, 10, "quad"), "trailing"),
    ],
)
def test_impossible_step_counts_are_refused(arguments, hint):
    with pytest.raises(UserError, match=hint):
        S.respace(*arguments)


# --- agreement of the samplers with diffusers --------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddpm_agrees_with_diffusers(kind, prediction, variance, spacing):
    x_T = draw(3, dtype=torch.float64)
    reference = theirs(
        diffusers.DDPMScheduler,
        kind,
        prediction,
        variance_type=f"fixed_{variance}",
        timestep_spacing=spacing,
        clip_sample=True,
        clip_sample_range=1.5,
    )
    states, estimates, times = walk(reference, x_T, 12, generator=torch.Generator().manual_seed(5))
    drawn, ours = torch.Generator().manual_seed(5), []
    result = S.ddpm_sample(
        network,
        x_T,
        S.make_schedule(kind, 1000, prediction=prediction),
        S.respace(1000, 12, spacing),
        variance=variance,
        clip=1.5,
        noise=lambda i, shape: torch.randn(shape, generator=drawn, dtype=torch.float64),
        callback=lambda i, t, x_t, x_0_pred: ours.append((t, x_t, x_0_pred)),
    )
    assert [t for t, _, _ in ours] == times
    for (_, x_t, x_0_pred), state, estimate in zip(ours, states[:-1], estimates, strict=True):
        close(x_t, state, 1e-8)
        close(x_0_pred, estimate, 1e-8)
    close(result, estimates[-1], 1e-8)  # ours never adds noise to the clean end; theirs does at t > 0 with fixed_large


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("clean", [True, False])
def test_ddim_agrees_with_diffusers(kind, prediction, spacing, eta, clean):
    x_T = draw(4, dtype=torch.float64)
    reference = theirs(
        diffusers.DDIMScheduler,
        kind,
        prediction,
        timestep_spacing=spacing,
        set_alpha_to_one=clean,
        clip_sample=False,
    )
    noises = [draw(100 + i, dtype=torch.float64) for i in range(20)]
    reference.set_timesteps(20)
    expected = x_T
    for i, t in enumerate(reference.timesteps):
        given = {"eta": eta, "variance_noise": noises[i]} if eta else {}
        expected = reference.step(network(expected, t.expand(2)), t, expected, **given).prev_sample
    ours = S.ddim_sample(
        network,
        x_T,
        S.make_schedule(kind, 1000, prediction=prediction),
        S.respace(1000, 20, spacing),
        eta=eta,
        final="clean" if clean else "first",
        noise=lambda i, shape: noises[i],
    )
    close(ours, expected, 1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [1.0, 0.7, "dynamic"])
def test_clipped_ddim_agrees_with_diffusers(prediction, clip):
    x_T = 2 * draw(5, dtype=torch.float64)
    options = (
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.6}
        if clip == "dynamic"
        else {"clip_sample": True, "clip_sample_range": clip}
    )
    reference = theirs(diffusers.DDIMScheduler, "linear", prediction, timestep_spacing="trailing", **options)
    states, _, times = walk(reference, x_T, 10, use_clipped_model_output=True)
    if clip == "dynamic":

        def clip(x_0):
            return S.clip_dynamic(x_0, 0.9, 1.6)

    ours = S.ddim_sample(network, x_T, S.make_schedule("linear", 1000, prediction=prediction), times, clip=clip)
    close(ours, states[-1], 1e-8)


def test_dynamic_clipping_is_per_sample():
    x_0 = torch.stack([torch.linspace(-4, 4, 101), torch.linspace(-0.5, 0.5, 101)])[:, None]
    clipped = S.clip_dynamic(x_0, ratio=0.9)
    assert clipped[0].abs().max() == 1 and clipped[0, 0, 60] == pytest.approx(0.8 / torch.quantile(x_0[0].abs(), 0.9))
    assert torch.equal(clipped[1], x_0[1])  # never stretched
    assert torch.equal(S.clip_dynamic(x_0, ratio=1.0, max_value=1.0), x_0.clamp(-1, 1))


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("clean", [True, False])
def test_inversion_agrees_with_diffusers(prediction, spacing, clean):
    x_0 = draw(6, dtype=torch.float64)
    reference = theirs(
        diffusers.DDIMInverseScheduler,
        "linear",
        prediction,
        timestep_spacing=spacing,
        set_alpha_to_one=clean,
        clip_sample=False,
    )
    states, _, times = walk(reference, x_0, 20)
    start = "clean" if clean else "first"
    ours = S.ddim_invert(
        network, x_0, S.make_schedule("linear", 1000, prediction=prediction), times[::-1], start=start, at_target=True
    )
    close(ours, states[-1], 1e-8)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("final", ["clean", "first"])
def test_dpmpp_agrees_with_diffusers(kind, prediction, steps, final):
    x_T = draw(7, dtype=torch.float64)
    reference = theirs(
        diffusers.DPMSolverMultistepScheduler,
        kind,
        prediction,
        timestep_spacing="trailing",
        final_sigmas_type="zero" if final == "clean" else "sigma_min",
        lambda_min_clipped=-20.0,
    )
    states, _, times = walk(reference, x_T, steps)
    ours = S.dpmpp_2m_sample(network, x_T, S.make_schedule(kind, 1000, prediction=prediction), times, final=final)
    close(ours, states[-1])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_float32_agrees_with_unmodified_diffusers(prediction):
    x_T, s = draw(8), S.make_schedule("scaled_linear", 1000, prediction=prediction)
    options = {"kind": "scaled_linear", "prediction": prediction, "exact": False, "timestep_spacing": "trailing"}
    unclipped = options | {"clip_sample": False}
    states, _, times = walk(theirs(diffusers.DDIMScheduler, **unclipped), x_T, 50)
    ours = S.ddim_sample(network, x_T, s, times)
    assert ours.dtype == torch.float32
    close(ours, states[-1])
    states, _, times = walk(theirs(diffusers.DPMSolverMultistepScheduler, **options), x_T, 20)
    close(S.dpmpp_2m_sample(network, x_T, s, times), states[-1])
    seeded = [torch.Generator().manual_seed(1) for _ in range(2)]
    states, _, times = walk(theirs(diffusers.DDPMScheduler, **unclipped), x_T, 50, generator=seeded[0])
    close(S.ddpm_sample(network, x_T, s, times, noise=seeded[1]), states[-1])


# --- exact scores ------------------------------------------------------------------------------------------------
MEAN, SD = 0.7, 0.4


def gaussian_denoiser(s):
    """The optimal network for data N(MEAN, SD^2) in the schedule's prediction type."""

    def denoise(x_t, t):
        a = S.at(s.alphas_bar, t, x_t)
        eps = (1 - a).sqrt() * (x_t - a.sqrt() * MEAN) / (a * SD**2 + 1 - a)
        convert = {"eps": lambda s, x_t, t, eps: eps, "x0": S.x0_from_eps, "v": S.v_from_eps}
        return convert[s.prediction](s, x_t, t, eps)

    return denoise


def gaussian_flow(s, x, a, b):
    """Exact probability flow of the same data from level a to level b: the standardised value is constant."""
    spread = [math.sqrt(level * SD**2 + 1 - level) for level in (a, b)]
    return math.sqrt(b) * MEAN + spread[1] / spread[0] * (x - math.sqrt(a) * MEAN)


@pytest.mark.parametrize("sampler, order", [(S.ddim_sample, 1), (S.dpmpp_2m_sample, 2)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_deterministic_samplers_converge_with_their_order(sampler, order, prediction):
    fine = 8192  # a fine schedule, so that steps can be halved several times between the same two levels
    s = S.make_schedule("linear", fine, 1e-4 * 1000 / fine, 0.02 * 1000 / fine, prediction)
    x_T = draw(9, (64, 1), torch.float64)
    top, bottom = 7168, 1024
    end = s.alphas_bar[bottom].item()
    truth = gaussian_flow(s, x_T, s.alphas_bar[top].item(), end)
    errors = []
    for steps in (24, 48, 96, 192):
        times = list(range(top, bottom, -(top - bottom) // steps))
        errors.append((sampler(gaussian_denoiser(s), x_T, s, times, final=end) - truth).abs().max().item())
    measured = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert measured[-1] == pytest.approx(order, abs=0.15), (errors, measured)
    assert errors[-1] < (2e-2 if order == 1 else 1e-3)


def test_inversion_converges_to_the_exact_code():
    s = S.make_schedule("linear", 1000)
    x_0 = MEAN + SD * draw(10, (64, 1), torch.float64)
    first, last = s.alphas_bar[0].item(), s.alphas_bar[999].item()
    truth = gaussian_flow(s, x_0, first, last)
    errors = [
        (S.ddim_invert(gaussian_denoiser(s), x_0, s, S.respace(1000, n, "nodes")) - truth).abs().max().item()
        for n in (27, 111, 333, 999)
    ]
    assert errors[-1] < 0.01 and all(a > 2 * b for a, b in zip(errors, errors[1:], strict=False)), errors


@pytest.mark.parametrize("final", ["first", "clean"])
def test_inversion_and_decoding_return_the_input(final):
    s = S.make_schedule("linear", 1000)
    x_0 = MEAN + SD * draw(11, (64, 1), torch.float64)
    errors = []
    for steps in (50, 100, 200):
        times = S.respace(1000, steps)
        code = S.ddim_invert(gaussian_denoiser(s), x_0, s, times, start=final)
        errors.append((S.ddim_sample(gaussian_denoiser(s), code, s, times, final=final) - x_0).abs().max().item())
    assert errors[-1] < 0.05 and errors[0] > 3.5 * errors[-1], errors  # first order: four times the steps, a quarter


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("final", ["first", "clean"])
def test_undoing_each_step_is_exact_in_few_steps(final, prediction):
    """Where the inversion above needs hundreds: the error shrinks with every round, to nothing."""
    s = S.make_schedule("linear", 1000, prediction=prediction)
    x_0, times, errors = MEAN + SD * draw(11, (64, 1), torch.float64), S.respace(1000, 10), []
    for rounds in (1, 4, 200):
        code = S.ddim_undo(gaussian_denoiser(s), x_0, s, times, start=final, rounds=rounds)
        errors.append((S.ddim_sample(gaussian_denoiser(s), code, s, times, final=final) - x_0).abs().max().item())
    assert errors[0] > 2 * errors[1] and errors[2] < 1e-9, errors


def test_undoing_by_one_call_a_step_is_the_inversion_at_the_target_time():
    s, x_0 = S.make_schedule("linear", 1000), draw(12)
    times = S.respace(1000, 10)
    close(S.ddim_undo(network, x_0, s, times), S.ddim_invert(network, x_0, s, times, start="clean", at_target=True))


def test_undoing_clipped_steps():
    """Every step but the one that ends clean, which the documented rule leaves unclipped."""
    s, times, x_0 = S.make_schedule("linear", 1000), S.respace(1000, 10), draw(11, (64, 1), torch.float64)
    denoise, how = gaussian_denoiser(s), dict(clip=lambda x_0: 0.9 * x_0)
    code = S.ddim_undo(denoise, x_0, s, times, start="first", rounds=200, **how)
    close(S.ddim_sample(denoise, code, s, times, final="first", **how), x_0)
    code = S.ddim_undo(denoise, x_0, s, times, rounds=200, **how)
    before_last = S.ddim_sample(denoise, code, s, times[:-1], final=s.alphas_bar[times[-1]].item(), **how)
    close(S.ddim_sample(denoise, before_last, s, times[-1:]), x_0)


def test_inversion_can_end_in_the_predicted_noise():
    s, x_0 = S.make_schedule("linear", 1000), draw(12)
    times, seen, states = S.respace(1000, 10, "stride"), [], []
    code = S.ddim_invert(
        network, x_0, s, times, end=0.0, callback=lambda i, t, x_t, x_0_pred: (seen.append(t), states.append(x_t))
    )
    assert seen == times[::-1]  # the first step leaves t = 0; none is spent on going from 0 to 0
    close(code, network(states[-1], torch.full((2,), 900)))


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ancestral_sampling_reproduces_mean_and_variance(variance, prediction):
    """Full-length ancestral sampling with the exact score of N(MEAN, SD^2)."""
    s = S.make_schedule("linear", 1000, prediction=prediction)
    n = 20_000
    x = S.ddpm_sample(
        gaussian_denoiser(s), draw(13, (n, 1)), s, variance=variance, noise=torch.Generator().manual_seed(14)
    ).double()
    # With a finite number of steps neither variance is exact (Ho et al. 2020, section 3.2): allow that small bias.
    assert abs(x.mean().item() - MEAN) < 4 * SD / math.sqrt(n) + 0.003
    assert abs(x.std().item() - SD) < 4 * SD / math.sqrt(2 * n) + 0.01


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_sampling_is_exact_for_the_matching_data(variance):
    """Few steps suffice: "small" is exact for a single point, "large" for N(0, 1) (Ho et al. 2020, section 3.2)."""
    s, states, n, point = S.make_schedule("linear", 1000), [], 50_000, 0.7

    def denoise(x_t, t):
        a = S.at(s.alphas_bar, t, x_t)
        return (1 - a).sqrt() * x_t if variance == "large" else (x_t - a.sqrt() * point) / (1 - a).sqrt()

    end = S.ddpm_sample(
        denoise,
        draw(15, (n, 1)),
        s,
        S.respace(1000, 10),
        variance=variance,
        noise=torch.Generator().manual_seed(16),
        callback=lambda i, t, x_t, x_0_pred: states.append((t, x_t)),
    )
    for t, x_t in states[1:]:
        a = s.alphas_bar[t].item()
        mean, var = (0.0, 1.0) if variance == "large" else (a**0.5 * point, 1 - a)
        assert abs(x_t.mean().item() - mean) < 4.5 * math.sqrt(var / n)
        assert abs(x_t.var().item() / var - 1) < 4.5 * math.sqrt(2 / n)
    if variance == "small":
        close(end, torch.full_like(end, point))


def test_eta_one_is_ancestral_sampling():
    """DDIM at eta 1 has the posterior variance and mean of DDPM (Song et al. 2021, section 4.1)."""
    s, x_T = S.make_schedule("linear", 1000), draw(17, dtype=torch.float64)
    times = S.respace(1000, 25)

    def noise(i, shape):
        return draw(200 + i, shape, torch.float64)

    close(
        S.ddim_sample(network, x_T, s, times, eta=1.0, noise=noise),
        S.ddpm_sample(network, x_T, s, times, noise=noise),
        1e-10,
    )


def test_first_order_dpmpp_is_ddim():
    s, x_T = S.make_schedule("cosine", 1000, prediction="v"), draw(18, dtype=torch.float64)
    close(S.dpmpp_2m_sample(network, x_T, s, [999], final=0.3), S.ddim_sample(network, x_T, s, [999], final=0.3), 1e-12)


# --- the rule that never visits index 0 --------------------------------------------------------------------------
@pytest.mark.parametrize("factor, end", [(0.1, 50.3124), (1.0, 0.00163806)])
def test_ancestral_recursion_down_to_one(factor, end):
    s, seen = S.make_schedule("linear", 1000), []
    x = S.ddpm_sample(
        lambda x_t, t: factor * x_t,
        torch.ones(1, 1),
        s,
        range(999, 0, -1),
        variance="large",
        final="first",
        noise=lambda i, shape: torch.zeros(shape),
        callback=lambda i, t, x_t, x_0_pred: seen.append(t),
    )
    assert x.item() == pytest.approx(end, rel=1e-5)
    assert seen == list(range(999, 0, -1))


def test_ancestral_step_formula_and_noise():
    s, x_T = S.make_schedule("linear", 20), draw(19, dtype=torch.float64)
    noises = {i: draw(300 + i, dtype=torch.float64) for i in range(19, 1, -1)}
    used = []

    def noise(step_index, shape):
        used.append(19 - step_index)
        return noises[19 - step_index]

    ours = S.ddpm_sample(network, x_T, s, range(19, 0, -1), variance="large", final="first", noise=noise)
    x = x_T
    for i in range(19, 0, -1):
        alpha, alpha_bar = 1 - s.betas[i], s.alphas_bar[i]
        x = (x - (1 - alpha) / (1 - alpha_bar).sqrt() * network(x, torch.full((2,), i))) / alpha.sqrt()
        x = x + s.betas[i].sqrt() * noises[i] if i > 1 else x
    close(ours, x, 1e-12)
    assert used == list(range(19, 1, -1))


# --- guidance ----------------------------------------------------------------------------------------------------
def conditional(x_t, t, shift, gain):
    return network(x_t, t) * gain.reshape(-1, 1, 1, 1) + shift.reshape(-1, 1, 1, 1)


COND = {"shift": torch.tensor([0.3, -0.2]), "gain": torch.tensor([1.0, 0.5])}
NULL = {"shift": torch.zeros(2), "gain": torch.ones(2)}


@pytest.mark.parametrize("scale", [0, 1, 0.0, 1.0])
def test_guidance_identities_cost_one_call(scale):
    calls = []

    def counted(name):
        def denoise(x_t, t):
            calls.append(name)
            return conditional(x_t, t, **(COND if name == "cond" else NULL))

        return denoise

    x_t, t = draw(20), torch.tensor([3, 600])
    expected = conditional(x_t, t, **(COND if scale == 1 else NULL))
    assert torch.equal(S.guided(counted("cond"), counted("null"), scale)(x_t, t), expected)
    assert calls == ["cond" if scale == 1 else "null"]


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0, 7.5])
def test_guidance_mixes_linearly(scale):
    x_t, t = draw(21), torch.tensor([3, 600])
    expected = (1 - scale) * conditional(x_t, t, **NULL) + scale * conditional(x_t, t, **COND)
    two = S.guided(lambda x, t: conditional(x, t, **COND), lambda x, t: conditional(x, t, **NULL), scale)
    close(two(x_t, t), expected, 1e-6)


def test_guidance_is_the_same_in_every_parameterisation():
    """Guiding eps, x0 or v gives one trajectory, because they are affine in each other at a given x_t."""
    x_T, ends = draw(22, dtype=torch.float64), []
    for prediction in PREDICTIONS:
        s = S.make_schedule("linear", 1000, prediction=prediction)

        def answer(cond, s=s):
            def denoise(x_t, t):
                eps = conditional(x_t, t, **{k: v.double() for k, v in cond.items()})
                x_0 = S.x0_from_eps(s, x_t, t, eps)
                return {"eps": eps, "x0": x_0, "v": S.v_from_eps(s, x_t, t, eps)}[s.prediction]

            return denoise

        ends.append(S.ddim_sample(S.guided(answer(COND), answer(NULL), 2.5), x_T, s, S.respace(1000, 8)))
    close(ends[1], ends[0], 1e-9)
    close(ends[2], ends[0], 1e-9)


# --- behaviour every sampler shares ------------------------------------------------------------------------------
STOCHASTIC = {
    "ddpm": lambda x, s, noise: S.ddpm_sample(network, x, s, S.respace(1000, 6), noise=noise),
    "ddim": lambda x, s, noise: S.ddim_sample(network, x, s, S.respace(1000, 6), eta=0.5, noise=noise),
}


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_one_generator_per_sample_makes_results_independent_of_the_batch(sampler):
    s = S.make_schedule("linear", 1000)

    def sample(*seeds):
        own = generators(*seeds)
        return STOCHASTIC[sampler](S.draw_noise(own, (len(seeds), 3, 4, 4)), s, own)

    together, reordered = sample(1, 2, 3), sample(3, 1)
    assert torch.equal(together[0], reordered[1]) and torch.equal(together[2], reordered[0])
    assert torch.equal(together[1:2], sample(2))
    assert not torch.equal(together[0], together[1])
    single = torch.Generator().manual_seed(2)
    assert torch.equal(STOCHASTIC[sampler](S.draw_noise(single, (1, 3, 4, 4)), s, single), sample(2))


def test_noise_must_be_given_and_must_match_the_batch():
    s = S.make_schedule("linear", 1000)
    for sampler in STOCHASTIC.values():
        with pytest.raises(ValueError, match="noise"):
            sampler(draw(1), s, None)
        with pytest.raises(ValueError):
            sampler(draw(1), s, generators(1, 2, 3))
    S.ddim_sample(network, draw(1), s, S.respace(1000, 4))  # eta 0 needs none
    S.ddpm_sample(network, draw(1), s, [999])  # nor does a single step


def test_no_noise_is_drawn_where_none_enters():
    """At alpha_bar 1 the noise term has no room; eta 1 to a clean end asks for one tensor less than steps."""
    s, asked = S.make_schedule("linear", 1000), []

    def noise(i, shape):
        asked.append(i)
        return torch.zeros(shape)

    x = S.ddim_sample(network, draw(1), s, S.respace(1000, 5), eta=1.0, noise=noise)
    assert asked == [0, 1, 2, 3] and torch.isfinite(x).all()
    asked.clear()
    S.ddim_sample(network, draw(1), s, S.respace(1000, 5), eta=1.0, noise=noise, final="first")
    assert asked == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("sampler", [S.ddim_sample, S.ddim_invert, S.dpmpp_2m_sample, S.ddpm_sample])
def test_samplers_are_pure_differentiable_and_take_half_precision_outputs(sampler):
    s = S.make_schedule("linear", 1000, prediction="v")
    options = {"noise": lambda i, shape: torch.ones(shape)} if sampler is S.ddpm_sample else {}

    def run(x, denoise=network):
        return sampler(denoise, x, s, S.respace(1000, 4), **options)

    x = draw(23).requires_grad_()
    before = x.detach().clone()
    run(x).square().sum().backward()
    assert torch.equal(x.detach(), before)
    step = 1e-3  # the gradient is that of the whole chain
    up, down = (run((before + h).double()).square().sum().item() for h in (step, -step))
    assert x.grad.sum().item() == pytest.approx((up - down) / (2 * step), rel=1e-3)

    seen = []

    def half(x_t, t):
        seen.append((x_t.dtype, t.dtype, t.shape))
        return network(x_t, t).bfloat16()

    assert run(before.half(), half).dtype == torch.float32
    assert seen == [(torch.float32, torch.long, (2,))] * 4


@pytest.mark.parametrize("sampler", [S.ddim_sample, S.dpmpp_2m_sample, S.ddpm_sample])
@pytest.mark.parametrize("times", [[], [1000, 5], [5, 5], [5, 7], [3, -1]])
def test_impossible_timesteps_are_refused(sampler, times):
    with pytest.raises(ValueError, match="timesteps"):
        sampler(network, draw(1), S.make_schedule("linear", 1000), times)


def test_impossible_ends_are_refused():
    s = S.make_schedule("linear", 1000)
    for final in ("zero", 0.01, 1.5):
        with pytest.raises(ValueError, match="final"):
            S.ddim_sample(network, draw(1), s, [500, 100], final=final)
    with pytest.raises(ValueError, match="eta"):
        S.ddim_sample(network, draw(1), s, [999, 500, 0], eta=2.0, noise=torch.Generator())
    with pytest.raises(ValueError, match="start"):
        S.ddim_invert(network, draw(1), s, [999, 500], start="clean", clip=1.0)


@pytest.mark.parametrize("sampler", [S.ddim_sample, S.dpmpp_2m_sample])
def test_static_clipping_bounds_every_estimate(sampler):
    estimates = []
    s = S.make_schedule("linear", 1000)
    x = sampler(
        network, 3 * draw(24), s, S.respace(1000, 8), clip=0.5, callback=lambda i, t, x, x_0: estimates.append(x_0)
    )
    assert torch.stack(estimates).abs().max() == 0.5 and x.abs().max() <= 0.5 + 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nothing_waits_for_the_device_inside_the_loop():
    s = S.make_schedule("linear", 1000)

    def watch(i, t, x_t, x_0_pred):
        torch.cuda.set_sync_debug_mode("error")  # from the first step on every synchronisation raises

    x_T = draw(25).cuda()
    for sampler, options in [
        (S.ddpm_sample, {"noise": generators(1, 2)}),
        (S.ddim_sample, {"eta": 1.0, "noise": torch.Generator().manual_seed(1), "clip": "dynamic"}),
        (S.ddim_invert, {}),
        (S.dpmpp_2m_sample, {"clip": 1.0}),
    ]:
        try:
            sampler(network, x_T, s, S.respace(1000, 6), callback=watch, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_numpy_and_tensor_timesteps_are_accepted():
    s, x_T = S.make_schedule("linear", 1000), draw(26)
    expected = S.ddim_sample(network, x_T, s, [999, 500, 100])
    for times in (np.array([999, 500, 100]), torch.tensor([999, 500, 100]), (999, 500, 100)):
        assert torch.equal(S.ddim_sample(network, x_T, s, times), expected)
