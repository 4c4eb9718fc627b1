"""The objective against closed forms, and what sampling and inversion do to data whose exact denoiser is known."""

import math

import pytest
import torch

from common import schedulers
from common.cli import UserError
from ldae import posterior_gap

SCHEDULE = schedulers.make_schedule("linear", 1000)
V_SCHEDULE = schedulers.make_schedule("linear", 1000, prediction="v")
SHAPE = (2, 3, 16, 20, 16)


def zero(z_t, t):
    return torch.zeros_like(z_t)


def ideal(z_t, t):
    """E[noise | z_t] of unit Gaussian latents."""
    return schedulers.at((1 - SCHEDULE.alphas_bar).sqrt(), t, z_t) * z_t


def analytic(z_t, t, y):
    """A decoder with eps, G of z_t, t and y."""
    mean = y.mean(1).view(-1, 1, 1, 1, 1)
    return 0.3 * z_t + 0.01 * torch.sin(t.to(z_t)).view(-1, 1, 1, 1, 1), 0.05 * z_t + 0.1 * mean


def latents(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- the objective


def test_schedule_and_weights():
    """Fact 4: alpha_bar, lambda and c at the listed steps; lambda peaks at 475; c_0 = 0."""
    steps = [0, 100, 250, 500, 750, 999]
    listed = [0.9999, 0.895142, 0.521423, 0.0777967, 0.00330016, 4.03583e-5]
    assert SCHEDULE.alphas_bar[steps].tolist() == pytest.approx(listed, rel=2e-6)
    weight = posterior_gap.gap_weight(SCHEDULE)
    listed = [2.51186e-4, 0.129937, 0.482698, 0.720178, 0.563069, 0.363561]
    assert weight[steps].tolist() == pytest.approx(listed, rel=5e-6)
    assert weight.argmax() == 475 and weight.max().item() == pytest.approx(0.72247, abs=1e-5)
    assert weight.mean().item() == pytest.approx(0.49267, abs=1e-5)
    c = posterior_gap.shift_coefficient(SCHEDULE)
    assert c[0] == 0
    listed = [0.00674, 0.04045, 0.31769, 0.68620, 0.95465, 0.99076, 0.98993]
    assert c[[1, 10, 100, 250, 500, 750, 999]].tolist() == pytest.approx(listed, abs=1e-5)


def test_shift_of_the_noise_is_a_shift_of_the_mean_by_sigma_g():
    """Predicted noise minus c_t G is the posterior mean plus Sigma_t G, Sigma_t the posterior variance."""
    t = torch.tensor([1, 300, 999])
    z_t, eps, G = (latents(seed, (3, 2, 4, 4, 4)).double() for seed in (1, 2, 3))
    before = torch.cat([torch.ones(1), SCHEDULE.alphas_bar[:-1]])
    *_, variance, _ = schedulers.posterior_coefficients(SCHEDULE.alphas_bar, before)
    c = schedulers.at(posterior_gap.shift_coefficient(SCHEDULE), t, z_t)

    def mean(noise):
        z_0 = schedulers.x0_from_eps(SCHEDULE, z_t, t, noise)
        return posterior_gap.posterior_mean(SCHEDULE, z_0, z_t, t)

    shift = mean(eps - c * G) - mean(eps)
    assert torch.allclose(shift, schedulers.at(variance, t, z_t) * G, rtol=1e-9, atol=1e-12)


def test_loss_is_zero_where_the_gap_is_filled():
    t = torch.tensor([1, 300, 999])
    noise, eps = latents(1, (3, 2, 4, 4, 4)), latents(2, (3, 2, 4, 4, 4))
    c = schedulers.at(posterior_gap.shift_coefficient(SCHEDULE), t, eps)
    filled = posterior_gap.posterior_gap_loss(eps, (eps - noise) / c, noise, t, SCHEDULE)
    assert filled.shape == (3,) and filled.max() < 1e-10
    left = posterior_gap.posterior_gap_loss(eps, None, noise, t, SCHEDULE)
    weight = posterior_gap.gap_weight(SCHEDULE)[t].float()
    assert torch.allclose(left, weight * (noise - eps).square().flatten(1).mean(1))
    assert torch.equal(left, posterior_gap.posterior_gap_loss(eps, torch.zeros_like(eps), noise, t, SCHEDULE))
    # at t = 0 the estimator has no influence
    t = torch.zeros(3, dtype=torch.long)
    assert torch.equal(posterior_gap.posterior_gap_loss(eps, 1e3 * eps, noise, t, SCHEDULE),
                       posterior_gap.posterior_gap_loss(eps, None, noise, t, SCHEDULE))  # fmt: skip


def test_gap_curve_is_the_noise_error_times_a_known_factor():
    """Gap of posterior means = beta / (sqrt(alpha) sqrt(1 - alpha_bar)) times the error of the noise (spec 5.4)."""
    z_0, noise, y = latents(1, (2, 2, 4, 4, 4)), latents(2, (2, 4, 2, 4, 4, 4)), latents(3, (2, 6))
    times = torch.tensor([0, 10, 500, 999])
    curves = posterior_gap.gap_curve(analytic, z_0, y, SCHEDULE, times, noise)
    assert all(curve.shape == (2, 4) for curve in curves.values())
    beta = SCHEDULE.betas[times]
    factor = (beta / ((1 - beta).sqrt() * (1 - SCHEDULE.alphas_bar[times]).sqrt())).square().float()
    weight = posterior_gap.gap_weight(SCHEDULE)[times].float()
    for name in ("without", "with"):
        assert torch.allclose(curves[name] / factor, curves[f"loss_{name}"] / weight, rtol=1e-3)
    assert torch.equal(curves["with"][:, 0], curves["without"][:, 0])  # c_0 = 0
    assert not torch.equal(curves["with"][:, 1], curves["without"][:, 1])


def test_gap_fraction():
    assert posterior_gap.gap_fraction([1.0, 2.0], [4.0, 4.0]) == pytest.approx(0.625)
    assert posterior_gap.gap_fraction(0.5, 0.5) == 0
    assert math.isnan(posterior_gap.gap_fraction(0.0, 0.0))


# ---- steps and guidance


def test_step_grids():
    """Fact 5: the original's grids, and a message for numbers of steps that they do not have."""
    for steps, start in ((10, [0, 99, 199, 299]), (50, [0, 19, 39, 59]), (100, [0, 9, 19, 29])):
        nodes = [0, *schedulers.respace(1000, steps, "nodes")[::-1]]
        assert nodes[:4] == start and nodes[-1] == 999 and len(nodes) == steps + 1
    for steps in (1000, 1001, 0):
        with pytest.raises(UserError, match=f"{steps} sampling steps.*choose"):
            posterior_gap.sample(zero, torch.zeros(1, 1, 2, 2, 2), SCHEDULE, steps, spacing="nodes", final="first")
    with pytest.raises(UserError, match="1001 sampling steps"):
        posterior_gap.invert(zero, torch.zeros(1, 1, 2, 2, 2), SCHEDULE, 1001)


@pytest.mark.parametrize("coefficient", ["training", "sampling"])
def test_without_estimator_guidance_is_unconditional(coefficient):
    """Fact 17: G = 0 gives bit by bit what the prior alone gives, both ways."""
    z, y = latents(1, (2, 2, 4, 4, 4)), latents(2, (2, 6))

    def silent(z_t, t, y):
        return ideal(z_t, t), torch.zeros_like(z_t)

    guided = posterior_gap.guided_denoiser(silent, y, SCHEDULE, coefficient)
    for run in (posterior_gap.invert, posterior_gap.sample):
        assert torch.equal(run(guided, z, SCHEDULE, 10), run(ideal, z, SCHEDULE, 10))


def test_coefficients_of_guidance():
    """Defect 23: the coefficient of training vanishes at t = 0, that of the original's samplers does not."""
    ours, theirs = (posterior_gap.guidance(SCHEDULE, name) for name in ("training", "sampling"))
    assert ours[0] == 0 and theirs[0] == pytest.approx(0.01, rel=1e-6)
    ratio = ours / theirs
    assert ratio[10].item() == pytest.approx(0.864, abs=1e-3) and ratio[500].item() == pytest.approx(0.994, abs=1e-3)
    with pytest.raises(ValueError, match="coefficient must be"):
        posterior_gap.guidance(SCHEDULE, "both")


def test_stop_percent():
    """The last floor(p S) steps are the prior's; a share of 1 leaves all of them to it."""
    timesteps = schedulers.respace(1000, 10, "nodes")  # 999 .. 99
    table = posterior_gap.guidance(SCHEDULE, "sampling", 0.35, timesteps)
    assert [bool(table[t] > 0) for t in timesteps] == [True] * 7 + [False] * 3
    assert not posterior_gap.guidance(SCHEDULE, "sampling", 1.0, timesteps).any()


def test_mixed_trajectories_have_the_right_ends():
    z_T, y_1, y_2 = latents(1, (2, 2, 4, 4, 4)), latents(2, (2, 6)), latents(3, (2, 6))

    def run(decoder, y):
        return posterior_gap.sample(posterior_gap.guided_denoiser(decoder, y, SCHEDULE), z_T, SCHEDULE, 10)

    ends = [run(analytic, y) for y in (y_1, y_2)]
    mixed = [run(posterior_gap.mixed_decoder(analytic, y_1, y_2, alpha), None) for alpha in (0.0, 0.5, 1.0)]
    assert torch.equal(mixed[0], ends[0]) and torch.allclose(mixed[2], ends[1], atol=1e-5)
    # eps and G are linear here, so the middle of the paths is the middle of the ends
    assert torch.allclose(mixed[1], (ends[0] + ends[1]) / 2, atol=1e-4)


# ---- the ideal denoiser of unit Gaussian latents


@pytest.mark.parametrize("how", [{}, {"spacing": "nodes", "final": "first"}], ids=["ours", "grid of the original"])
def test_ideal_denoiser_without_clamp(how):
    """Fact 15: z_T has SD 0.97 to 1, round trip RMSE at most 0.04, samples SD at least 0.97 in 100 steps."""
    z_0, z_T = latents(1), latents(2)
    found, _ = posterior_gap.round_trip(ideal, z_0, SCHEDULE, 100, **how)
    assert 0.97 < found["std"] <= 1.0 and found["std"] == pytest.approx(0.983, abs=0.01)
    assert found["rmse"] == pytest.approx(0.036, abs=0.003)
    assert abs(found["kurtosis"]) < 0.1 and found["max_abs"] < 6
    assert posterior_gap.sample(ideal, z_T, SCHEDULE, 100, **how).std() >= 0.97


@pytest.mark.parametrize("how", [{}, {"spacing": "nodes", "final": "first"}], ids=["ours", "grid of the original"])
def test_inversion_in_several_passes_is_exact(how):
    """Ten steps lose 0.3 of a unit latent there and back; solved for, nothing is lost."""
    z_0, y = latents(1, (2, 2, 4, 4, 4)), latents(2, (2, 6))
    plain, few, many = (posterior_gap.round_trip(ideal, z_0, SCHEDULE, 10, n, **how)[0] for n in (0, 4, 25))
    assert plain["rmse"] == pytest.approx(0.308, abs=0.02) and many["rmse"] < 1e-4 < few["rmse"] < 0.1
    factor = posterior_gap.sample(ideal, torch.ones_like(z_0), SCHEDULE, 10, **how)  # the sampler is linear here
    z_T = posterior_gap.invert(ideal, z_0, SCHEDULE, 10, passes=25, **how)
    assert factor.std() < 1e-6 and torch.allclose(z_T, z_0 / factor, atol=1e-4)
    for decoder, schedule in ((analytic, SCHEDULE), (as_v(analytic), V_SCHEDULE)):
        guided = posterior_gap.guided_denoiser(decoder, y, schedule)
        found, again = posterior_gap.round_trip(guided, z_0, schedule, 20, 25, **how)
        assert found["rmse"] < 1e-4 and torch.allclose(again, z_0, atol=1e-3)
    with pytest.raises(UserError, match="cannot undo a clamp"):
        posterior_gap.invert(ideal, z_0, SCHEDULE, 10, passes=1, clip=1.0, final="first")


def test_ideal_denoiser_with_the_clamp_of_the_original():
    """Fact 15, compatibility mode: z_T of SD 38.8, samples confined to about 1.04; defect 1 in one picture."""
    how = {name: value for name, value in posterior_gap.UPSTREAM.items() if name != "coefficient"}
    z_0, z_T = latents(1), latents(2)
    found, _ = posterior_gap.round_trip(ideal, z_0, SCHEDULE, 100, **how)
    assert found["std"] == pytest.approx(38.8, rel=0.03) and found["max_abs"] > 200
    assert found["rmse"] == pytest.approx(0.016, abs=0.003)
    samples = posterior_gap.sample(ideal, z_T, SCHEDULE, 100, **how)
    assert samples.abs().max().item() == pytest.approx(1.04, abs=0.02)
    assert samples.std().item() == pytest.approx(0.718, abs=0.02)


def test_untrained_network_control():
    """Fact 16: the zero network's round trip stands beside the trained one's, and equal ones are called out."""
    z_0 = latents(1, (2, 3, 8, 10, 8))
    control = posterior_gap.round_trip_control(ideal, z_0, SCHEDULE, 50)
    assert control["zero_network"]["rmse"] < 1e-5 < control["network"]["rmse"]  # the trained one's is worse
    assert control["zero_network"]["std"] < 0.01 and control["warning"] == ""
    control = posterior_gap.round_trip_control(zero, z_0, SCHEDULE, 50)
    assert "shows no training" in control["warning"]


# ---- v prediction


def as_v(decoder):
    """The same decoder for a prior that predicts v, where G stands for G / alpha_t."""

    def decode(z_t, t, y):
        eps, G = decoder(z_t, t, y)
        return schedulers.v_from_eps(V_SCHEDULE, z_t, t, eps), G / schedulers.at(V_SCHEDULE.alphas_bar.sqrt(), t, G)

    return decode


def test_v_prediction_is_the_same_objective_in_other_units():
    z_0, noise = (latents(seed, (2, 2, 4, 4, 4)).double() for seed in (1, 2))
    y = latents(3, (2, 6)).double()
    t = torch.tensor([40, 700])
    z_t = schedulers.q_sample(SCHEDULE, z_0, t, noise)
    v = schedulers.training_target(V_SCHEDULE, z_0, t, noise)
    loss = posterior_gap.posterior_gap_loss(*analytic(z_t, t, y), noise, t, SCHEDULE)
    loss_v = posterior_gap.posterior_gap_loss(*as_v(analytic)(z_t, t, y), v, t, V_SCHEDULE)
    assert torch.allclose(loss_v, loss, rtol=1e-4)
    times, table = torch.tensor([5, 300, 900]), latents(4, (2, 3, 2, 4, 4, 4)).double()
    a = posterior_gap.gap_curve(analytic, z_0, y, SCHEDULE, times, table)
    b = posterior_gap.gap_curve(as_v(analytic), z_0, y, V_SCHEDULE, times, table)
    assert all(torch.allclose(a[name], b[name], rtol=1e-3) for name in a)


def test_v_prediction_gives_the_same_samples():
    z, y = latents(1, (2, 2, 4, 4, 4)).double(), latents(2, (2, 6)).double()
    guided = posterior_gap.guided_denoiser(analytic, y, SCHEDULE)
    guided_v = posterior_gap.guided_denoiser(as_v(analytic), y, V_SCHEDULE)
    for run in (posterior_gap.invert, posterior_gap.sample):
        expected, found = (run(*args, 20, final="first") for args in ((guided, z, SCHEDULE), (guided_v, z, V_SCHEDULE)))
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
