"""LDAE: training steps of all three stages, denoising steps, encode, decode and semantic encoder, at 128x160x128.

Training steps recompute activations (--checkpointing), as a machine of ordinary memory needs it at this size.
"""

from functools import partial

import torch
from torch import nn

from common import runtime, schedulers, training
from common.ema import EMA
from ldae import aekl, prior, representation
from ldae.config import CONFIGS, PRESETS
from ldae.encoder import to_slices
from ldae.unet import ShiftUNet
from tests.bench.measure import LAYOUTS, failures, layout_table, measure


def preset(stage, options, **more):
    return CONFIGS[stage](**(PRESETS[stage]["paper" if options.size == "full" else "tiny"] | more))


def volume(config, rt, layout=torch.contiguous_format):
    return torch.rand(1, 1, *config.shape).to(rt.device, memory_format=layout)


def latent_shape(options):
    config = preset("aekl", options)
    return (config.latent_channels, *(n // 2 ** (len(config.channels) - 1) for n in config.shape))


def build_aekl(options, rt, channels_last, **more):
    config = preset("aekl", options, perceptual_weight=0.0, **more)
    layout = runtime.memory_layout(channels_last)
    return config, aekl.build_aekl(config).to(rt.device, memory_format=layout), layout


def adam(network, rt):
    trained = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.Adam(trained, lr=1e-5, **runtime.fused_optimizer_kwargs(rt.device))


def aekl_step(options, rt, channels_last):
    """Stage 1 without the perceptual term, which needs pretrained weights."""
    config, autoencoder, layout = build_aekl(options, rt, channels_last, checkpointing=True)
    discriminator = aekl.build_discriminator(config).to(rt.device, memory_format=layout)
    pairs = [(adam(network, rt), network) for network in (autoencoder, discriminator)]
    x, eps = volume(config, rt, layout), torch.randn(1, *latent_shape(options)).to(rt.device)

    def step():
        aekl.aekl_step(autoencoder, training.RealAndFake(discriminator), x, eps, config, autocast=rt.autocast)
        for optimizer, _ in pairs:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return measure(step, rt, options.repeats)


@torch.inference_mode()
def coding(options, rt, channels_last, decode):
    config, autoencoder, layout = build_aekl(options, rt, channels_last)
    x = torch.randn(1, *latent_shape(options)).to(rt.device) if decode else volume(config, rt, layout)
    with rt.autocast():
        return measure(partial(autoencoder.eval().decode if decode else autoencoder.eval().encode, x), rt,
                       options.repeats)  # fmt: skip


def diffusion(options, rt, batch):
    """Configuration of stage 2, its U-Net, and z_0, noise, t of a batch."""
    shape = latent_shape(options)
    config = preset("ldae_pretrain", options, checkpointing=True)
    unet = prior.build_unet(config, shape).to(rt.device)
    z_0, noise = torch.randn(2, batch, *shape).to(rt.device)
    return config, unet, (z_0, torch.full((batch,), config.timesteps // 2, device=rt.device), noise)


def optimizing(network, rt, ema, loss_of):
    """A training step: forward, backward, Adam, EMA."""
    optimizer = adam(network, rt)

    def step():
        with rt.autocast():
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for average, averaged in ema:
            average.update(averaged)

    return step


def prior_step(options, rt):
    config, unet, (z_0, t, noise) = diffusion(options, rt, options.batch)
    schedule = schedulers.make_schedule(**prior.schedule_settings(config))
    ema = [(EMA(unet, config.ema_decay), unet)]
    return measure(optimizing(unet, rt, ema, lambda: prior.prior_loss(unet, schedule, z_0, t, noise).mean()), rt,
                   options.repeats)  # fmt: skip


def representation_step(options, rt):
    """Stage 3: frozen prior, gradient estimator and semantic encoder; both that train are averaged."""
    config, unet, (z_0, t, noise) = diffusion(options, rt, options.batch)
    config = preset("ldae_repr_learn", options, checkpointing=True)
    encoder, _ = representation.build_encoder(config, tuple(config.shape))
    decoder = ShiftUNet(unet, encoder.embed_dim, checkpointing=True)
    learner = representation.Learner(encoder, decoder, config.plane).to(rt.device).train()
    schedule = schedulers.make_schedule(**prior.schedule_settings(config))
    x = volume(config, rt).expand(options.batch, -1, -1, -1, -1)
    ema = [(EMA(part, config.ema_decay), part) for part in (encoder, decoder.estimator)]

    def loss():
        return representation.gap_losses(learner, schedule, x, z_0, t, noise, config.gamma)["loss"].mean()

    return measure(optimizing(learner, rt, ema, loss), rt, options.repeats)


@torch.inference_mode()
def network_call(options, rt, which):
    """One call for one scan: the prior, the decoder of a sampling step, or the semantic encoder."""
    _, unet, (z_t, t, _) = diffusion(options, rt, 1)
    config = preset("ldae_repr_learn", options)
    encoder, _ = representation.build_encoder(config, tuple(config.shape))
    network: nn.Module = encoder
    inputs = (to_slices(volume(config, rt), config.plane),)
    if which != "encoder":
        network = unet if which == "prior" else ShiftUNet(unet, encoder.embed_dim)
        inputs = (z_t, t) if which == "prior" else (z_t, t, torch.randn(1, encoder.embed_dim).to(rt.device))
    network = network.to(rt.device).eval()
    with rt.autocast():
        return measure(lambda: network(*inputs), rt, options.repeats)


BY_LAYOUT = {"stage 1 step": aekl_step, "encode": partial(coding, decode=False), "decode": partial(coding, decode=True)}
PLAIN = {
    "stage 2 step": prior_step,
    "stage 3 step": representation_step,
    "prior call": partial(network_call, which="prior"),
    "decoder call": partial(network_call, which="decoder"),
    "semantic encoder": partial(network_call, which="encoder"),
}
ITEMS = {f"{name}, {layout}": partial(function, channels_last=layout != "contiguous")
         for name, function in BY_LAYOUT.items() for layout in LAYOUTS}  # fmt: skip
ITEMS |= PLAIN


def report(results):
    """Lines of a table, and the cost of encoding a scan and decoding it again."""
    yield from layout_table(results, BY_LAYOUT)
    for name in PLAIN:
        if "seconds" in (r := results.get(name, {})):
            yield f"{name:24}{r['seconds']:10.3f} s{r['peak_gib']:10.2f}"
    parts = ("encode, contiguous", "decode, contiguous", "semantic encoder", "decoder call")
    found = [results.get(name, {}).get("seconds") for name in parts]
    if all(found):
        fixed = sum(found[:3])
        cost = {n: fixed + 2 * n * found[3] for n in (100, 20)}
        yield (f"one scan to (y, z_T) and back: 100 steps {cost[100] / 60:.1f} minutes, "
               f"20 steps {cost[20] / 60:.1f} minutes")
    yield from failures(results)
