"""One training step of every published network on the CPU: within memory, no dead part, and as --dry_run estimates.

Each runs in a process of its own (`python -m tests.neuroldm3d.test_full_size NETWORK`), so that its memory is its own.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from common.ema import EMA
from neuroldm3d.classifier import config as classifier_options
from neuroldm3d.classifier import train as classifier_train
from neuroldm3d.classifier import trainer as classifier_trainer
from neuroldm3d.diffusion import config as dit_options
from neuroldm3d.diffusion import train as dit_train
from neuroldm3d.diffusion import trainer as dit_trainer
from neuroldm3d.VAE import config as vae_options
from neuroldm3d.VAE import train as vae_train
from neuroldm3d.VAE import trainer as vae_trainer
from tests.bench.measure import peak_gib
from tests.helpers import ROOT, run_main, run_script

LATENT = (4, 28, 34, 28)


def vae():
    config = vae_options.Config(lambda_lpips=0.0)  # the perceptual term needs pretrained weights
    network = vae_trainer.build_vae(config)
    x, eps = torch.rand(1, 1, *config.shape), torch.randn(1, *LATENT)
    return network, lambda: vae_trainer.vae_loss(*network(x, eps), x, config)["loss"].backward()


def dit():
    config = dit_options.Config()
    network = dit_trainer.DiT3D(**dit_trainer.architecture(config, LATENT))
    for p in network.parameters():  # zero gates would keep gradients from everything behind them
        p.data += 0.02 * torch.randn(p.shape) * p.requires_grad
    schedule = dit_trainer.sampling.noise_schedule(**dit_trainer.schedule_settings(config))
    z_0, eps, index = torch.randn(1, *LATENT), torch.randn(1, *LATENT), torch.tensor([1])
    return network, lambda: dit_trainer.dit_loss(network, schedule, z_0, index, 500 * index, eps).mean().backward()


def classifier(model):
    config = classifier_options.Config(model=model, drop_path=0.0)  # a dropped block would have no gradient
    network = classifier_trainer.build_classifier(classifier_trainer.architecture(config)).train()
    shape = classifier_trainer.input_shape(classifier_trainer.composition.preparation(config))
    x, labels = torch.randn(2, *shape), torch.tensor([0.0, 1.0])
    return network, lambda: classifier_trainer.classifier_step(network, x, labels)


NETWORKS = {  # network, its entry script, options of a batch as here, largest peak in GiB
    "vae": (vae, vae_train, ("--batch_size", 1), 8),
    "dit": (dit, dit_train, ("--bs", 1), 2),
    "2d": (lambda: classifier("2d"), classifier_train, ("--batch_size", 2), 4),
    "3d": (lambda: classifier("3d"), classifier_train, ("--batch_size", 2, "--model", "3d"), 2),
}


def report(name):
    libraries = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    torch.manual_seed(0)
    network, backward = NETWORKS[name][0]()
    average = EMA(network, 0.9) if name == "dit" else None
    trained = {key: p for key, p in network.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr=1e-4)
    backward()
    bad = [key for key, p in trained.items() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    optimizer.step()
    if average:
        average.update(network)
    bad += [key for key, p in trained.items() if not p.isfinite().all()]
    return {"bad": bad, "step_gib": peak_gib(torch.device("cpu")) - libraries}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from Linux's /proc")
@pytest.mark.parametrize("name", NETWORKS)
def test_one_step_at_full_size(name, tmp_path, capsys):
    _, script, options, largest = NETWORKS[name]
    done = run_script(["-m", "tests.neuroldm3d.test_full_size", name], cwd=ROOT, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bad"] == [] and result["step_gib"] < largest, result
    run_main(script, "--dry_run", "--root", tmp_path, "--device", "cpu", *options)
    estimated = float(re.search(r"about ([\d.]+) GiB per rank", capsys.readouterr().out)[1])
    assert 0.5 < estimated / result["step_gib"] < 2, (estimated, result)


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1])))
