"""From a DiT file to volumes: schedule, guidance, number of network calls, pairs that fit, the original's files."""

import dataclasses

import numpy as np
import pytest
import torch

from common import checkpoint, runtime, schedulers
from common.cli import UserError
from neuroldm3d import upstream
from neuroldm3d.diffusion import sampling
from neuroldm3d.diffusion.model import DiT3D
from neuroldm3d.VAE import latents
from tests.neuroldm3d.stages import best, trained


@pytest.fixture(scope="session")
def done(cohort):
    return trained(cohort)


@pytest.fixture
def rt():
    with runtime.start("cpu") as started:
        yield started


class Affine(torch.nn.Module):
    """A denoiser whose answer is linear in the label: what guidance does can be computed by hand. Counts its calls."""

    null_label, in_channels, in_size = 2, 4, (2, 3, 2)

    def __init__(self):
        super().__init__()
        self.calls, self.times = 0, []

    def forward(self, z_t, t, label):
        self.calls += 1
        self.times.append(int(t[0]))
        shift = torch.tensor([0.3, -0.2, 0.1])[label].view(-1, 1, 1, 1, 1) * torch.arange(1, 5).view(1, 4, 1, 1, 1)
        return 0.2 * z_t + shift


def dit_of(model, prediction="eps", T=1000):
    schedule = sampling.noise_schedule("linear", T, 1e-4, 0.02, prediction)
    stats = {"mean": [0.0] * 4, "std": [1.0] * 4}
    return sampling.TrainedDiT(model, schedule, "small", stats, "", None)


def sample(dit, rt, label, guidance=1.0, sampler="ddim", steps=4, n=1):
    g = [runtime.generator("x", k) for k in range(n)]
    return sampling.sample_latents(dit, label, g, rt, sampler=sampler, steps=steps, guidance=guidance)


def test_schedule_has_the_published_values():
    """Fact 22: section 6 and table A.3 of the specification; the first reverse step returns x_0 exactly."""
    schedule = sampling.noise_schedule("linear", 1000, 1e-4, 0.02, "eps")
    table = {  # t: beta, alpha_bar, posterior variance, c_x0, c_xt
        1: (1.1992e-4, 0.99978012, 5.4547e-5, 0.545357, 0.454839),
        100: (2.09199e-3, 0.89514160, 2.05455e-3, 0.018895, 0.981076),
        250: (5.07998e-3, 0.52142304, 5.05172e-3, 0.007684, 0.991908),
        500: (1.005996e-2, 0.07779666, 1.005134e-2, 0.003058, 0.994104),
        999: (2.0e-2, 4.035830e-5, 1.9999983e-2, 0.000128, 0.989949),
    }
    bars, betas = schedule.alphas_bar.tolist(), np.linspace(1e-4, 0.02, 1000)
    products = np.cumprod(1 - betas)
    assert bars == pytest.approx(products, rel=1e-12) and schedule.betas.tolist() == pytest.approx(betas, rel=1e-12)
    for t, (beta, bar, variance, c_x0, c_xt) in table.items():
        assert betas[t] == pytest.approx(beta, rel=2e-5) and bars[t] == pytest.approx(bar, rel=1e-6)
        found = schedulers.posterior_coefficients(bars[t], bars[t - 1])[:3]
        left = (1 - products[t - 1]) / (1 - products[t])  # Ho et al. 2020, eq. 7
        exact = (products[t - 1] ** 0.5 * betas[t] / (1 - products[t]), (1 - betas[t]) ** 0.5 * left, betas[t] * left)
        assert found == pytest.approx(exact, rel=1e-6)
        assert found == pytest.approx((c_x0, c_xt, variance), rel=4e-4, abs=1e-6)  # the table rounds in float32
    assert schedulers.posterior_coefficients(bars[0], 1.0)[:3] == (1.0, 0.0, 0.0)
    cosine = sampling.noise_schedule("cosine", 1000, 1e-4, 0.02, "eps").betas
    assert cosine[[0, 500, 999]].tolist() == pytest.approx([4.12842e-5, 3.15569e-3, 0.999], rel=1e-5)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_guidance_acts_on_all_channels(rt, sampler):
    """Fact 24: scale 1 is the conditional output, 0 the unconditional, s is u + s (c - u) in every channel."""
    dit = dit_of(Affine())
    one, none = sample(dit, rt, 1, 1.0, sampler), sample(dit, rt, None, 1.0, sampler)
    assert torch.equal(sample(dit, rt, 1, 0.0, sampler), none) and not torch.allclose(one, none)
    assert torch.equal(sample(dit, rt, None, 3.0, sampler), none)  # nothing to guide with
    # In one step the result is affine in the predicted noise, hence in the scale.
    once = {s: sample(dit, rt, 1, s, sampler, steps=1) for s in (0.0, 1.0, 2.5)}
    assert torch.allclose(once[2.5], once[0.0] + 2.5 * (once[1.0] - once[0.0]), rtol=1e-3)
    moved = (once[2.5] - once[1.0]).abs().amax(dim=(0, 2, 3, 4))
    assert moved.shape == (4,) and moved.min() > 1e-2


@pytest.mark.parametrize(("sampler", "steps"), [("dpm", 20), ("ddim", 50), ("ddpm", 7), ("ddpm", 0)])
def test_steps_are_network_calls(rt, sampler, steps):
    """Fact 27: as many calls as steps, twice that with guidance; 0 steps are all, from T-1 down to 0."""
    calls = steps or 1000
    for guidance, factor in ((1.0, 1), (2.0, 2), (0.0, 1)):
        model = Affine()
        sample(dit_of(model), rt, 0, guidance, sampler, steps)
        assert model.calls == calls * factor
        times = model.times[::factor]
        assert times[0] == 999 and times == sorted(set(times), reverse=True)
    if steps == 0:
        assert times[-1] == 0
    with pytest.raises(UserError, match="1001 sampling steps"):
        sample(dit_of(Affine()), rt, 0, 1.0, sampler, 1001)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_a_sample_does_not_depend_on_its_batch(rt, sampler):
    dit = dit_of(Affine())
    three, one = sample(dit, rt, 0, 1.0, sampler, n=3), sample(dit, rt, 0, 1.0, sampler)
    assert torch.allclose(three[:1], one, atol=1e-6) and not torch.allclose(three[1], three[0])


def test_without_a_null_label_only_scale_one_is_possible(rt):
    model = Affine()
    model.null_label = None
    sample(dit_of(model), rt, 0)
    for label, guidance in ((0, 2.0), (0, 0.0), (None, 1.0)):
        with pytest.raises(UserError, match="no null label: --guidance must be 1"):
            sample(dit_of(model), rt, label, guidance)


def test_known_data_come_back_in_their_own_scale(rt, done):
    """A denoiser that knows the normalised latent: the volume is the decoded latent with the statistics put back."""
    vae = latents.load_vae(best(done, "vae"), rt)
    trained_dit = sampling.load_dit(best(done, "dit"), rt)
    truth = torch.randn(1, *vae.latent_shape, generator=torch.Generator().manual_seed(0))

    class Knows(torch.nn.Module):
        null_label, in_channels, in_size = 2, vae.latent_shape[0], vae.latent_shape[1:]

        def forward(self, z_t, t, label):
            alpha, sigma = (schedulers.at(x, t, z_t) for x in (bars.sqrt(), (1 - bars).sqrt()))
            return (z_t - alpha * truth) / sigma

    dit = dataclasses.replace(trained_dit, model=Knows())
    bars = dit.schedule.alphas_bar
    ((number, x),) = sampling.synthesize(dit, vae, 1, [7], 0, rt, sampler="dpm", steps=10)
    mean, std = (torch.tensor(dit.stats[key]).view(1, -1, 1, 1, 1) for key in ("mean", "std"))
    assert number == 7 and torch.allclose(x, latents.decode(vae.model, truth * std + mean, rt)[0], atol=1e-3)


def test_average_is_used_unless_raw_weights_are_asked_for(rt, done):
    """Fact 25, sampler side: both sets load, the average by default."""
    saved = checkpoint.load(best(done, "dit"))
    default, raw = sampling.load_dit(best(done, "dit"), rt), sampling.load_dit(best(done, "dit"), rt, weights="raw")
    for dit, entry in ((default, "state_dict"), (raw, "raw_state_dict")):
        assert all(torch.equal(value, saved[entry][key]) for key, value in dit.model.state_dict().items())
        assert not dit.model.training
    assert default.hash == saved["hash"] != raw.hash
    a, b = (sample(dit, rt, 1, sampler="ddim", steps=5) for dit in (default, raw))
    assert not torch.equal(a, b)


def test_dit_and_vae_must_belong_together(rt, done, tmp_path):
    vae, dit = latents.load_vae(best(done, "vae"), rt), sampling.load_dit(best(done, "dit"), rt)
    sampling.check_pair(dit, vae)
    with pytest.raises(UserError, match="trained on latents of VAE .*give the matching pair"):
        sampling.check_pair(dataclasses.replace(dit, vae="other"), vae)
    with pytest.raises(UserError, match="latents of shape .*give the matching pair"):
        sampling.check_pair(dataclasses.replace(dit, model=Affine()), vae)
    with pytest.raises(UserError, match="holds a vae, not a dit"):
        sampling.load_dit(best(done, "vae"), rt)
    with pytest.raises(UserError, match="no dit at .*python neuroldm3d/diffusion/train.py"):
        sampling.load_dit(tmp_path / "no.pth", rt)


def test_the_originals_dit_file_loads(rt, tmp_path):
    """Both weight sets, unnormalised latents, linear schedule; a VAE file in its place is refused."""
    torch.manual_seed(0)
    model = DiT3D(
        in_size=(28, 34, 28), patch_size=(4, 2, 4), in_channels=4, hidden_size=384, depth=1, num_heads=6, mlp_ratio=4.0,
        num_classes=2, label_dropout=0.1, window_size=0, window_blocks=(), positions="sincos",
    )  # fmt: skip
    names = upstream.to_upstream(model)
    average = {key: value + 0.01 for key, value in names.items()}
    content = {"epoch": 9999, "model_state": {f"model.{key}": value for key, value in names.items()},
               "ema_state": {f"module.model.{key}": value for key, value in average.items()}}  # fmt: skip
    torch.save(content, tmp_path / "epoch_9999.pth")
    ema, raw = (sampling.load_dit(tmp_path / "epoch_9999.pth", rt, weights=w) for w in ("ema", "raw"))
    assert torch.equal(raw.model.time1.bias, model.time1.bias)
    assert torch.allclose(ema.model.time1.bias, model.time1.bias + 0.01)
    assert ema.vae is None and ema.latent_shape == (4, 28, 34, 28) and ema.schedule.T == 1000
    assert ema.stats == {"mean": [0.0] * 4, "std": [1.0] * 4} and ema.schedule.prediction == "eps"
    torch.save({"vae_state_dict": {}, "val_loss": 0.1}, tmp_path / "vae.pth")
    with pytest.raises(UserError):
        sampling.load_dit(tmp_path / "vae.pth", rt)
