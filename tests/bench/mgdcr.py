"""MGDCR: network calls, training steps and iterations of the inverse optimisation, at 128 x 128 pixels.

An iteration is measured with STEPS diffusion steps and DENSE slices, not with 30 and 81: time is proportional to both,
and memory to neither, but to the slices that are decoded at a time, which the items differ in.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from common import runtime
from common.ema import EMA
from mgdcr import geometry, inverse, objective, trainer
from mgdcr.config import PRESETS, AutoencConfig, DDIMConfig, LatentDPMConfig
from mgdcr.latent_net import MLPSkipNet
from tests.bench.measure import failures, measure

STEPS, FACTOR, DENSE = 2, 4, (5, 9)  # dense slices of two and of three acquired ones
CHUNKS = (1, 2, 4)
CONFIGS = {"autoenc": AutoencConfig, "ddim": DDIMConfig, "latent_dpm": LatentDPMConfig}
PAPER_STEPS, PAPER_SLICES, PAPER_ITERATIONS = 30, 81, 200


def build_config(options, name):
    return CONFIGS[name](**PRESETS[name]["paper" if options.size == "full" else "tiny"])


def build(options, rt, name="autoenc"):
    """Configuration and network of a script."""
    config = build_config(options, name)
    kind = trainer.DIFFAE if name == "autoenc" else trainer.DDIM
    return config, trainer.build_network(kind, config.network(), config.checkpointing).to(rt.device)


def slices(config, rt, n=1):
    """Noise: the time does not depend on the picture."""
    return torch.randn(n, 1, config.image_size, config.image_size).to(rt.device)


def training_step(options, rt, name):
    """Forward, backward, clipping, Adam and EMA of a batch."""
    config, network = build(options, rt, name)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-5, **runtime.fused_optimizer_kwargs(rt.device))
    ema, x_0 = EMA(network, config.ema_decay), slices(config, rt, options.batch)
    t, noise = torch.full((options.batch,), 500, device=rt.device), torch.randn_like(x_0)

    def step():
        with rt.autocast():
            loss = trainer.noise_loss(network, x_0, t, noise).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(network)

    return measure(step, rt, options.repeats)


@torch.inference_mode()
def network_call(options, rt, which):
    """One call for one slice: the semantic encoder, a denoising step with or without its code, or the latent MLP."""
    t = torch.full((1,), 500, device=rt.device)
    if which == "latent":
        config = build_config(options, "latent_dpm")
        code_dim = build_config(options, "autoenc").enc_out_channels
        network, z = MLPSkipNet(**config.network(code_dim)).to(rt.device).eval(), torch.randn(1, code_dim).to(rt.device)
        return measure(lambda: network(z, t), rt, options.repeats)
    config, network = build(options, rt, "ddim" if which == "unconditional" else "autoenc")
    x = slices(config, rt)
    with rt.autocast():
        if which == "encoder":
            return measure(lambda: network.eval().encode(x), rt, options.repeats)
        code = (network.eval().encode(x),) if which == "conditional" else ()
        return measure(lambda: network.eval().denoise(x, t, *code), rt, options.repeats)


def iteration(options, rt, chunk, dense):
    """One iteration of the inverse optimisation over both codes of all slices, with one view."""
    config, network = build(options, rt)
    settings = inverse.Settings(steps=STEPS, iterations=1000, chunk=chunk, patience=0, hold=False)
    size, depth = config.image_size, (dense - 1) // FACTOR + 1
    stack = np.random.default_rng(0).random((depth, size, size), dtype=np.float32)
    grid = geometry.dense_grid(geometry.Grid(np.diag([1.5, 1.5, 8.0, 1.0]), stack.shape), FACTOR)
    across = np.array([[1.5, 0, 0, 0], [0, 0, 6.0, 0.75 * size], [0, 1.5, 0, 0], [0, 0, 0, 1]])  # a plane y = const
    sampler = geometry.PlaneSampler(grid, geometry.Grid(across, (1, 8 * depth, size)))
    view = objective.View("view", sampler, torch.rand(len(sampler)), torch.ones(len(sampler)))
    prior = inverse.Prior(runtime.frozen_network(network, rt), settings, rt)
    codes = inverse.Codes(torch.randn(dense, 1, size, size).to(rt.device),
                          torch.randn(dense, config.enc_out_channels).to(rt.device))  # fmt: skip
    frame = inverse.Frame(stack, FACTOR, (1.5, 1.5), [view])
    problem = inverse.Problem(prior, frame, objective.Objective(), replace(settings, output="decoded"), codes)
    return measure(inverse.Optimiser(problem, codes).step, rt, 1)


ITEMS = {
    "semantic encoder": partial(network_call, which="encoder"),
    "denoising step": partial(network_call, which="conditional"),
    "unconditional step": partial(network_call, which="unconditional"),
    "latent DPM step": partial(network_call, which="latent"),
    "training step": partial(training_step, name="autoenc"),
    "unconditional training": partial(training_step, name="ddim"),
}
ITERATIONS = {f"{dense} slices, {chunk} at a time": partial(iteration, chunk=chunk, dense=dense)
              for chunk, dense in [*((chunk, DENSE[0]) for chunk in CHUNKS), (CHUNKS[0], DENSE[1])]}  # fmt: skip
ITEMS |= {f"iteration, {name}": function for name, function in ITERATIONS.items()}


def report(results):
    """Lines of a table, and the cost of a frame."""
    for name in ITEMS:
        if "seconds" in (r := results.get(name, {})):
            yield f"{name:36}{r['seconds']:10.3f} s{r['peak_gib']:10.2f} GiB"
    found = [results.get(f"iteration, {DENSE[0]} slices, {chunk} at a time", {}).get("seconds") for chunk in CHUNKS]
    if any(found):
        once = min(filter(None, found)) / (STEPS * DENSE[0]) * PAPER_STEPS * PAPER_SLICES
        yield (
            f"a frame of {PAPER_SLICES} slices with {PAPER_STEPS} diffusion steps: {once / 60:.0f} minutes an "
            f"iteration, {PAPER_ITERATIONS * once / 3600:.1f} hours in all"
        )
    yield from failures(results)
