"""Decoding and inversion. "A<n>" is an acceptance fact of the specification."""

import pytest
import torch

from common import schedulers
from common.cli import UserError
from mgdcr import diffusion
from mgdcr.diffusion import SCHEDULE, decode, invert, soft_clamp, timesteps
from mgdcr.model import UncondUNet
from tests.mgdcr.test_model import SMALL, drawn, randomised, small

EXACT = [n for n in range(2, 1001) if any(len(range(0, 1000, s)) == n for s in range(1, 1000))]
SPREAD = 0.3  # standard deviation of the images of `Gaussian`


class Gaussian:
    """The perfect denoiser of images whose pixels are N(z, SPREAD^2), z (B, 1); notes the steps it is asked for."""

    def __init__(self):
        self.times = []

    def denoise(self, x_t, t, z):
        self.times.append(int(t[0]))
        bar = schedulers.at(SCHEDULE.alphas_bar, t, x_t)
        mean = bar.sqrt() * (0 if z is None else z[..., None, None])
        return (1 - bar).sqrt() * (x_t - mean) / (bar * SPREAD**2 + 1 - bar)


# ---- the steps


def test_the_schedule():
    """A3: alpha_bar of 0.9999 at first and 4.03583e-5 at last, float64."""
    bar = SCHEDULE.alphas_bar
    assert SCHEDULE.T == diffusion.T == 1000 and SCHEDULE.prediction == "eps" and bar.dtype == torch.float64
    assert bar[0].item() == pytest.approx(0.9999, abs=1e-12)
    assert bar[999].item() == pytest.approx(4.03583e-5, abs=1e-10)
    assert bar[986].item() == pytest.approx(5.24e-5, abs=1e-7) and bar[950].item() == pytest.approx(1.06e-4, abs=1e-6)


def test_thirty_steps_are_the_multiples_of_34():
    """A3."""
    assert timesteps(30)[::-1] == list(range(0, 987, 34))


def test_every_number_of_steps_exists():
    """A4: 1 to 1000; where the original has a stride, its steps, elsewhere the integers nearest to an even spacing."""
    assert len(EXACT) == 62
    for n in range(1, 1001):
        times = timesteps(n)
        assert len(times) == n and times == sorted(set(times), reverse=True) and 0 <= times[-1] <= times[0] <= 999
        if n in EXACT:
            strides = {a - b for a, b in zip(times, times[1:], strict=False)}
            assert len(strides) == 1 and times[-1] == 0 and times[0] + strides.pop() >= 1000
        elif n > 1:
            assert max(abs(t - 999 * k / (n - 1)) for k, t in enumerate(times[::-1])) <= 0.5
    assert timesteps(1) == [999]


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_a_number_of_steps_that_does_not_exist(steps):
    with pytest.raises(UserError, match="1 to 1000"):
        timesteps(steps)


# ---- the clamps


def test_the_soft_clamp_is_a_clamp_with_gradient():
    x = torch.linspace(-4, 4, 8001, dtype=torch.float64).requires_grad_()
    y = soft_clamp(x)
    inside = x.detach().abs() <= 1
    assert torch.equal(y[inside], x[inside]) and y.abs().max() <= 1 + diffusion.SOFTNESS
    torch.testing.assert_close(y, -soft_clamp(-x))
    assert (y.diff() >= 0).all()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad[inside], torch.ones(int(inside.sum()), dtype=grad.dtype))
    near = (x.detach().abs() > 1) & (x.detach().abs() < 1.2)
    assert (grad[near] > 0.01).all() and (grad[near] < 1).all()


def test_which_clamp():
    model, x_T = Gaussian(), 3 * drawn(2, 1, 8, 8)
    z = torch.tensor([[0.9], [-0.9]])
    hard, soft, none = (decode(model, x_T, z, 10, clamp) for clamp in ("hard", "soft", "none"))
    assert hard.abs().max() == 1 and 1 < soft.abs().max() <= 1 + diffusion.SOFTNESS < none.abs().max()
    with pytest.raises(ValueError, match="clamp 'firm'"):
        decode(model, x_T, z, 10, "firm")


def test_only_the_soft_clamp_leaves_a_gradient_where_it_acts():
    z = torch.tensor([[0.9]])
    for clamp, found in (("hard", False), ("soft", True)):
        x_T = torch.full((1, 1, 2, 2), 0.8).requires_grad_()  # ends just beyond 1
        (grad,) = torch.autograd.grad(decode(Gaussian(), x_T, z, 30, clamp).sum(), x_T)
        assert bool(grad.any()) == found, clamp


# ---- decoding


def test_decoding_maps_noise_to_the_images_distribution():
    """For Gaussian images the flow is known: x_0 = mean + SPREAD x_T, the better the more steps."""
    x_T, z = drawn(2, 1, 8, 8).clamp(-2, 2), torch.tensor([[0.1], [-0.2]])
    expected = z[..., None, None] + SPREAD * x_T
    error = [(decode(Gaussian(), x_T, z, steps, "none") - expected).abs().max().item() for steps in (10, 100, 1000)]
    assert error[0] > error[1] > error[2] and error[2] < 0.01


def test_network_is_asked_at_original_steps_and_in_order():
    model, x = Gaussian(), drawn(1, 1, 4, 4)
    decode(model, x, None, 30)
    assert model.times == timesteps(30)
    model.times.clear()
    invert(model, x.clamp(-1, 1), None, 30)
    assert model.times == timesteps(30)[::-1]


def test_decoding_keeps_no_state_and_sees_every_slice_alone():
    model, x_T, z = small(), drawn(3, 1, 16, 16), drawn(3, 12, seed=2)
    with torch.no_grad():
        first = decode(model, x_T, z, 5)
        assert torch.equal(decode(model, x_T, z, 5), first)
        torch.testing.assert_close(decode(model, x_T[1:2], z[1:2], 5), first[1:2], atol=1e-4, rtol=1e-4)


def test_decoding_without_a_code():
    model, x_T = randomised(UncondUNet(**SMALL)), drawn(2, 1, 16, 16)
    with torch.no_grad():
        assert decode(model, x_T, None, 3).shape == invert(model, x_T.clamp(-1, 1), None, 3).shape == x_T.shape


def gradients(model, x_T, z, wanted, **how):
    x_T, z = (v.clone().requires_grad_(name in wanted) for name, v in (("x_T", x_T), ("z", z)))
    loss = decode(model, x_T, z, 5, "soft", **how).square().mean()
    return torch.autograd.grad(loss, [v for v in (x_T, z) if v.requires_grad])


@pytest.mark.parametrize("wanted", [("x_T", "z"), ("z",), ("x_T",)])
def test_recomputed_gradients_are_the_plain_ones(wanted):
    """A6: per-step checkpoints against the plain chain, for both codes and for one alone."""
    model, x_T, z = small().requires_grad_(False), drawn(2, 1, 16, 16), drawn(2, 12, seed=2)
    plain = gradients(model, x_T, z, wanted)
    for a, b in zip(plain, gradients(model, x_T, z, wanted, checkpointing=True), strict=True):
        assert a.any() and (a - b).abs().max() <= 1e-5


def test_recomputing_keeps_less():
    """The activations of one step are kept instead of those of all."""

    def kept(steps, checkpointing):
        model, total = small().requires_grad_(False), []
        x_T, z = drawn(1, 1, 16, 16).requires_grad_(), drawn(1, 12, seed=2).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda v: total.append(v.numel()) or v, lambda v: v):
            decode(model, x_T, z, steps, checkpointing=checkpointing)
        return sum(total)

    assert kept(8, True) < 0.05 * kept(8, False)


def test_gradients_of_the_last_steps_only():
    """The image stays the same; all steps are the full gradient, fewer leave none for x_T and another for z."""
    model, x_T, z = small().requires_grad_(False), drawn(2, 1, 16, 16), drawn(2, 12, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(decode(model, x_T, z, 5, grad_steps=2), decode(model, x_T, z, 5))
    full = gradients(model, x_T, z, ("x_T", "z"))
    for a, b in zip(full, gradients(model, x_T, z, ("x_T", "z"), grad_steps=5), strict=True):
        assert torch.equal(a, b)
    (last,) = gradients(model, x_T, z, ("z",), grad_steps=2)
    assert last.any() and not torch.allclose(last, full[1])
    x_T = x_T.requires_grad_()
    assert not decode(model, x_T, z, 5, grad_steps=2).requires_grad
    with pytest.raises(ValueError, match="grad_steps 0"):
        decode(model, x_T, z, 5, grad_steps=0)


# ---- inversion


def round_trip(steps, refine, clamp="hard"):
    """Largest error over images of which some pixels lie at the clamp."""
    x_0, z = (SPREAD * drawn(2, 1, 8, 8) + 0.3).clamp(-1, 1), torch.tensor([[0.3], [0.3]])
    code = invert(Gaussian(), x_0, z, steps, clamp, refine)
    return (decode(Gaussian(), code, z, steps, clamp) - x_0).abs().max().item()


def test_more_steps_invert_better():
    errors = [round_trip(steps, 0) for steps in (10, 30, 100)]
    assert errors[0] > errors[1] > errors[2]


def test_refined_inversion_is_the_inverse_of_decoding():
    """Fixed-point iterations undo the very steps that `decode` takes."""
    errors = [round_trip(30, refine, "none") for refine in (0, 1, 3, 30)]
    assert errors[3] < 1e-3 and errors[3] < errors[2] < errors[1] and errors[3] < 0.1 * errors[0]


def test_the_code_of_an_image_looks_like_noise():
    x_0 = (SPREAD * drawn(4, 1, 16, 16)).clamp(-1, 1)
    assert invert(Gaussian(), x_0, None, 100).std().item() == pytest.approx(1, abs=0.1)


def test_inversion_has_gradients():
    model, x_0, z = small().requires_grad_(False), drawn(1, 1, 16, 16).clamp(-1, 1), drawn(1, 12, seed=2)
    for refine in (0, 2):
        leaf = z.clone().requires_grad_()
        (grad,) = torch.autograd.grad(invert(model, x_0, leaf, 3, refine=refine).sum(), leaf)
        assert grad.any() and grad.isfinite().all()
