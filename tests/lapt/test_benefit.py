"""What post-training is for, in small: lesions come back that plain continued training passes over (fact 18)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import runtime
from lapt import ldm
from lapt.config import LAPTConfig
from lapt.dataset import Intensity, Slices
from tests.lapt.untrained import RT, untrained_model

BATCH = 8


class Means(nn.Module):
    """Stands for a trained autoencoder: latents are means of 4 x 4 pixels of DWI and ADC, and an empty channel."""

    factor = 4

    def encode(self, x):
        return F.pad(F.avg_pool2d(x, 4), (0, 0, 0, 0, 0, 1))

    def decode(self, z):
        return F.interpolate(z[:, :2], scale_factor=4.0)


def start(prepared, state=None):
    """A diffusion model of slices on that autoencoder, which predicts v; with random weights, or with `state`."""
    intensity = Intensity.of_folder(prepared, ctp_window=(20, 50))
    model = untrained_model(time_points=15, intensity=intensity, prediction="v")
    model.autoencoder = Means()
    if state:
        model.load_state_dict(state)
    return model


def trained(model, prepared, steps, lr, seed, **weights):
    """The model after so many steps of ldm.py's objective."""
    config = LAPTConfig(data=str(prepared), seed=seed, batch_size=BATCH, augment="none", **weights)
    learned, table = ldm.learned_parts(model, config), ldm.pixel_weights(model, config)
    data, network = Slices(prepared, "train", model.intensity), ldm.Denoiser(model.conditioner, model.unet)
    batches = runtime.training_batches(data, BATCH, 0, seed, RT, 0)
    optimizer = torch.optim.AdamW(learned.parameters(), lr=lr)
    for step in range(steps):
        item = {name: x for name, x in next(batches).items() if name in ("mri", "ctp", "mask", "lesion")}
        t, noise, u = ldm.draw(config, model.schedule.T, step, (1, 3, 12, 12), RT)
        optimizer.zero_grad()
        ldm.training_losses(network, model, item, t, noise, u, config, table)["loss"].backward()
        optimizer.step()
    return model


def lesion_error(model, prepared):
    """L1 in the lesions of patients who were not trained on, over the fixed table of timesteps and noise."""
    config, errors = LAPTConfig(data=str(prepared), val_times=2), []
    for split in ("val", "test"):
        data = Slices(prepared, split, model.intensity)
        bearing = [i for i in range(len(data)) if data[i]["lesion"].any()]
        errors.append(ldm.validate(model, data, bearing, config, RT)["lesion"])
    return sum(errors) / 2


@pytest.mark.slow
def test_post_training_lowers_the_lesion_error_below_continued_training(prepared):
    """Equal steps, rate, data order, timesteps and noise, three seeds; the gain is of the terms, not of the steps."""
    base = trained(start(prepared), prepared, 60, 2e-3, 0, w_img=0, w_les=0).state_dict()
    gains = []
    for seed in (1, 2, 3):
        arms = {"plain": dict(w_img=0, w_les=0), "lapt": dict(w_img=1, w_les=2)}
        errors = {name: lesion_error(trained(start(prepared, base), prepared, 20, 5e-4, seed, **weights), prepared)
                  for name, weights in arms.items()}  # fmt: skip
        gains.append(errors["lapt"] / errors["plain"] - 1)
    assert sum(gains) / 3 < -0.05 and sum(gain < 0 for gain in gains) >= 2, gains
