"""One training step of both stages at 112x128x112 on the CPU, within memory, and the estimate of --dry_run against it.

Each stage runs in a process of its own (`python -m tests.il_cldm.test_full_size STAGE`), so that its memory is its own.
"""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from common import runtime, training
from il_cldm.aae import aae_step
from il_cldm.config import Config
from il_cldm.ldm import DenoiserWithMri, ldm_loss, noise_schedule
from il_cldm.losses import reconstruction_loss
from il_cldm.model import build_autoencoder, build_denoiser, build_discriminator
from tests.bench.measure import peak_gib
from tests.helpers import run_script

SHAPE, LATENT = [112, 128, 112], [28, 32, 28]


class Stage1:
    shapes = {"latent": [1, 1, *LATENT], "x_hat": [1, 1, *SHAPE]}

    def __init__(self):
        self.config = Config()
        self.nets = {"autoencoder": build_autoencoder(self.config), "discriminator": build_discriminator(self.config)}
        self.pair = training.RealAndFake(self.nets["discriminator"])
        self.x = torch.rand(1, 1, *SHAPE)

    def forward(self):  # all that is alive when the step goes backward
        latent = self.nets["autoencoder"].encode(self.x)
        x_hat = self.nets["autoencoder"].decode(latent)
        logits = self.pair(self.x, x_hat.detach().requires_grad_())
        return {"latent": latent, "x_hat": x_hat}, logits, reconstruction_loss(x_hat, self.x)

    def step(self):
        return aae_step(self.nets["autoencoder"], self.pair, self.x, self.config)


class Stage2:
    shapes = {"cond": [1, 1, *LATENT], "eps_pred": [1, 1, *LATENT]}

    def __init__(self):
        self.config = Config()
        self.nets = {"denoiser": build_denoiser(self.config)}
        self.model = DenoiserWithMri(self.nets["denoiser"])
        self.mri, self.z_0, self.eps = torch.rand(1, 1, *SHAPE), torch.randn(1, 1, *LATENT), torch.randn(1, 1, *LATENT)
        self.t, self.label = torch.full((1,), 500), torch.full((1,), 2)

    def forward(self):
        cond = self.nets["denoiser"].condition(self.mri)
        return {"cond": cond, "eps_pred": self.nets["denoiser"](self.z_0, cond, self.t, self.label)}

    def step(self):
        loss = ldm_loss(self.model, noise_schedule(self.config), self.z_0, self.mri, self.label, self.t, self.eps)
        loss.backward()
        return {"loss": loss.detach()}


def resident_gib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


def report(stage):
    with torch.device("meta"):
        on_meta = stage()
        with runtime.SavedBytes() as estimate:
            on_meta.forward()
    torch.manual_seed(0)
    real = stage()
    before = resident_gib()
    graph = real.forward()
    activations = resident_gib() - before
    outputs = graph[0] if isinstance(graph, tuple) else graph
    shapes = {name: list(value.shape) for name, value in outputs.items()}
    del graph, outputs
    losses = {name: value.item() for name, value in real.step().items()}
    bad = [f"{net}.{name}" for net, module in real.nets.items() for name, p in module.named_parameters()
           if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    return {"shapes": shapes, "losses": losses, "bad_gradients": bad, "estimated_gib": estimate.total / 2**30,
            "activations_gib": activations, "peak_gib": peak_gib(torch.device("cpu"))}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from Linux's /proc")
@pytest.mark.parametrize("stage", [Stage1, Stage2], ids=["stage_1", "stage_2"])
def test_one_step_at_full_size(stage):
    done = run_script(["-m", "tests.il_cldm.test_full_size", stage.__name__], cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    assert result["shapes"] == stage.shapes
    assert all(math.isfinite(value) for value in result["losses"].values()), result["losses"]
    assert result["bad_gradients"] == []
    assert result["peak_gib"] < 20
    assert 0.5 < result["estimated_gib"] / result["activations_gib"] < 2


if __name__ == "__main__":
    print(json.dumps(report({"Stage1": Stage1, "Stage2": Stage2}[sys.argv[1]])))
