"""NeuroLDM-3D: training steps of VAE, DiT and classifiers, denoising step, encode, decode, at 112x136x112."""

from functools import partial

import numpy as np
import torch

from common import runtime
from common.ema import EMA
from neuroldm3d import preprocess
from neuroldm3d.classifier import config as classifier_options
from neuroldm3d.classifier.model import build_classifier
from neuroldm3d.diffusion import config as dit_options
from neuroldm3d.diffusion import trainer as dit_trainer
from neuroldm3d.diffusion.model import DiT3D
from neuroldm3d.VAE import config as vae_options
from neuroldm3d.VAE import trainer as vae_trainer
from tests.bench.measure import LAYOUTS, failures, layout_table, measure


def preset(module, options, **more):
    return module.Config(**(module.PRESETS["paper" if options.size == "full" else "smoke"] | more))


def build_vae(options, rt, channels_last):
    """VAE without the perceptual term (which needs pretrained weights), and its layout."""
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    config = preset(vae_options, options, lambda_lpips=0.0)
    return config, vae_trainer.build_vae(config).to(rt.device, memory_format=layout), layout


def latents(config, rt, batch):
    factor = 2 ** (len(config.channels) - 1)
    return torch.randn(batch, config.latent_channels, *(n // factor for n in config.shape)).to(rt.device)


def build_dit(options, rt):
    config = preset(dit_options, options)
    shape = latents(preset(vae_options, options), rt, 1).shape[1:]
    return config, DiT3D(**dit_trainer.architecture(config, tuple(shape)), checkpointing=False).to(rt.device), shape


def optimizing(network, rt, loss_of, ema=None):
    """A training step: forward, backward, Adam, EMA."""
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4, **runtime.fused_optimizer_kwargs(rt.device))

    def step():
        optimizer.zero_grad(set_to_none=True)
        with rt.autocast():
            loss = loss_of()
        loss.backward()
        optimizer.step()
        if ema:
            ema.update(network)

    return step


def vae_step(options, rt, channels_last):
    config, vae, layout = build_vae(options, rt, channels_last)
    x = torch.rand(options.batch, 1, *config.shape).to(rt.device, memory_format=layout)
    eps = latents(config, rt, options.batch)
    return measure(optimizing(vae, rt, lambda: vae_trainer.vae_loss(*vae(x, eps), x, config)["loss"]), rt,
                   options.repeats)  # fmt: skip


@torch.inference_mode()
def coding(options, rt, channels_last, decode):
    config, vae, layout = build_vae(options, rt, channels_last)
    x = latents(config, rt, 1) if decode else torch.rand(1, 1, *config.shape).to(rt.device, memory_format=layout)
    with rt.autocast():
        return measure(partial(vae.eval().decode if decode else vae.eval().encode, x), rt, options.repeats)


def dit_step(options, rt):
    """One step of diffusion/train.py: forward, backward, optimizer, EMA."""
    config, dit, shape = build_dit(options, rt)
    z_0 = torch.randn(options.batch, *shape).to(rt.device)
    index = torch.zeros(options.batch, dtype=torch.long, device=rt.device)
    schedule = dit_trainer.sampling.noise_schedule(**dit_trainer.schedule_settings(config))

    def loss():
        return dit_trainer.dit_loss(dit, schedule, z_0, index, index + 500, torch.randn_like(z_0)).mean()

    return measure(optimizing(dit, rt, loss, EMA(dit, config.ema_decay)), rt, options.repeats)


@torch.inference_mode()
def denoising(options, rt):
    """One DiT call for one volume, as each sampling step makes it."""
    _, dit, shape = build_dit(options, rt)
    z_t, index = torch.randn(1, *shape).to(rt.device), torch.zeros(1, dtype=torch.long, device=rt.device)
    with rt.autocast():
        return measure(lambda: dit.eval()(z_t, index + 500, index), rt, options.repeats)


def classifier_step(options, rt, model):
    """Forward, backward and Adam of a classifier, batch 2 at least: its batch norm needs two."""
    config = preset(classifier_options, options, model=model)
    prep = preprocess.Preparation(config.shape)
    n, *sides = preprocess.classifier_input(np.zeros(prep.shape, np.float32), prep).shape
    names = ("model", "dropout", "drop_path", "width", "depth", "filters")
    network = build_classifier({name: getattr(config, name) for name in names} | {"in_channels": n}).to(rt.device)
    x = torch.randn(max(options.batch, 2), n, *sides).to(rt.device)
    return measure(optimizing(network.train(), rt, lambda: network(x).square().mean()), rt, options.repeats)


BY_LAYOUT = {"VAE training step": vae_step, "encode": partial(coding, decode=False),
             "decode": partial(coding, decode=True)}  # fmt: skip
PLAIN = {
    "DiT training step": dit_step,
    "denoising step": denoising,
    "2D classifier step": partial(classifier_step, model="2d"),
    "3D classifier step": partial(classifier_step, model="3d"),
}
ITEMS = {f"{name}, {layout}": partial(function, channels_last=layout != "contiguous")
         for name, function in BY_LAYOUT.items() for layout in LAYOUTS}  # fmt: skip
ITEMS |= PLAIN


def report(results):
    """Lines of a table, and the cost of a sample by sampler."""
    yield from layout_table(results, BY_LAYOUT)
    for name in PLAIN:
        if "seconds" in (r := results.get(name, {})):
            yield f"{name:24}{r['seconds']:10.3f} s{r['peak_gib']:10.2f}"
    step, decode = (results.get(name, {}).get("seconds") for name in ("denoising step", "decode, contiguous"))
    if step and decode:
        cost = {n: n * step + decode for n in (1000, 50, 20)}
        yield (f"one sample (steps x denoising step + decode): ancestral 1000 steps {cost[1000]:.0f} s; DPM-Solver++ "
               f"50 steps {cost[50]:.1f} s ({cost[1000] / cost[50]:.0f} times faster), "
               f"20 steps {cost[20]:.1f} s ({cost[1000] / cost[20]:.0f} times faster)")
    yield from failures(results)
