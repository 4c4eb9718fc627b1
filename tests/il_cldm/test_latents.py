"""Latent statistics, v prediction and a wide MRI map: the options that the smoke preset turns on."""

import pytest
import torch

from common import runtime, schedulers
from common.cli import UserError
from il_cldm import ldm
from il_cldm.config import PRESETS, Config
from il_cldm.model import build_denoiser


def cohort(n=12, shape=(2, 3, 4, 3)):
    """Latents that share a strong mean image and differ a little around it, differently per channel."""
    g = torch.Generator().manual_seed(0)
    shared = 5 * torch.randn(shape, generator=g)
    spread = torch.tensor([0.1, 0.5]).view(2, 1, 1, 1)
    return {f"s{i}": shared + spread * torch.randn(shape, generator=g) for i in range(n)}, shared


def test_voxel_statistics_take_out_what_everybody_shares():
    latents, shared = cohort()
    stats = ldm.voxel_statistics(latents)
    z = torch.stack(list(latents.values()))
    normalised = ldm.normalise(z, stats)
    assert torch.allclose(normalised.mean(0), torch.zeros_like(shared), atol=1e-5)
    rms = normalised.square().mean(dim=(0, 2, 3, 4)).sqrt()
    assert torch.allclose(rms, torch.ones(2), atol=1e-4)  # per channel, although channel 1 varies five times more
    assert torch.allclose(ldm.denormalise(normalised, stats), z, atol=1e-5)
    channel = {"mean": z.mean(dim=(0, 2, 3, 4)).tolist(), "std": z.std(dim=(0, 2, 3, 4)).tolist()}
    between = ldm.normalise(z, channel).var(0).mean()
    assert between < 0.05  # what a channel's own SD leaves of the differences between people


def test_model_with_a_mean_image_refuses_another_grid(tmp_path):
    trained = ldm.Trained(None, None, {"mean": torch.zeros(2, 4, 4, 4)}, "", 4, None)
    ldm.check_grid(trained, (16, 16, 16), tmp_path)
    with pytest.raises(UserError, match="shape .20, 16, 16."):
        ldm.check_grid(trained, (20, 16, 16), tmp_path)
    ldm.check_grid(ldm.Trained(None, None, {"mean": [0.0]}, "", 4, None), (20, 16, 16), tmp_path)


def test_v_prediction_recovers_known_data_where_eps_would_not():
    config = Config(**(PRESETS["smoke"] | {"unet_channels": 8, "unet_groups": 4}))
    schedule = ldm.noise_schedule(config)
    assert schedule.prediction == "v"
    g = torch.Generator().manual_seed(1)
    z_0, eps = torch.randn(2, 8, 3, 4, 3, generator=g), torch.randn(2, 8, 3, 4, 3, generator=g)
    t = torch.tensor([999, 500])
    v = schedulers.training_target(schedule, z_0, t, eps)
    loss = ldm.ldm_loss(lambda z_t, mri, t, label: v, schedule, z_0, None, None, t, eps)
    assert loss == 0  # the objective asks for v, not for eps
    z_t = schedulers.q_sample(schedule, z_0, t, eps)
    off = schedulers.x0_from_output(schedule, z_t, t, v + 0.01)  # a 1 % error stays one in x_0
    assert (off - z_0).abs().max() < 0.011


def test_wide_mri_map_reaches_the_denoiser():
    config = Config(**(PRESETS["smoke"] | {"unet_channels": 8, "unet_groups": 4}))
    torch.manual_seed(0)
    denoiser = build_denoiser(config).eval()
    cond = denoiser.condition(torch.rand(1, 1, 16, 16, 16))
    assert cond.shape == (1, config.cond_channels, 4, 4, 4)
    with runtime.start("cpu", "fp32", 0) as rt:
        schedule = ldm.noise_schedule(config)
        sample = [
            ldm.sample_latents(denoiser, schedule, c, None, [runtime.generator(0, "x")], sampler="dpm", steps=3, rt=rt)
            for c in (cond, cond.flip(1))
        ]
    assert sample[0].shape == (1, config.latent_dim, 4, 4, 4)
    assert not torch.allclose(*sample)


def test_held_out_loss_is_the_mean_over_fixed_times_and_noise(tmp_path):
    """A denoiser that knows v exactly has loss 0; one that is off by 0.1 everywhere has 0.01, on every call."""
    config = Config(prediction="v", val_sampler="dpm", val_steps=1)
    schedule = ldm.noise_schedule(config)
    truth = torch.rand(1, 12, 12, 12, generator=torch.Generator().manual_seed(2))

    class Identity(torch.nn.Module):  # latents are the image itself
        def encode(self, x):
            return x

        decode = encode

    class Knows(torch.nn.Module):
        null_label, conv_out = None, torch.nn.Conv3d(1, 1, 1)

        def __init__(self, off):
            super().__init__()
            self.off = off

        def condition(self, mri):
            return mri

        def forward(self, z_t, cond_map, t, label):
            alpha, sigma = (schedules.view(-1, 1, 1, 1, 1).float() for schedules in
                            (schedule.alphas_bar[t].sqrt(), (1 - schedule.alphas_bar[t]).sqrt()))  # fmt: skip
            return alpha * (z_t - alpha * truth[None]) / sigma - sigma * truth[None] + self.off

    class Same:
        def tensor(self, name):
            return truth

    stats = {"mean": [0.0], "std": [1.0]}
    with runtime.start("cpu", "fp32", 0) as rt:
        for off, expected in ((0.0, 0.0), (0.1, 0.01), (0.1, 0.01)):
            scores = ldm.validate(Knows(off), Identity(), schedule, stats, Same(), Same(), ["a"], config, rt)
            assert scores["loss"] == pytest.approx(expected, abs=1e-4)
