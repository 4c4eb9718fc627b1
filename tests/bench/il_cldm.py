"""IL-CLDM: training steps of both stages, denoising step, encode, decode, loader, at 112x128x112."""

import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from common import nifti, phantom, runtime, training
from common.cache import VolumeCache
from common.ema import EMA
from il_cldm.aae import COMPRESSION, aae_step
from il_cldm.config import PRESETS, Config
from il_cldm.dataset import PetDataset, Volumes
from il_cldm.ldm import DenoiserWithMri, ldm_loss, noise_schedule
from il_cldm.model import build_autoencoder, build_denoiser, build_discriminator
from tests.bench.measure import LAYOUTS, failures, layout_table, measure

SHAPES = {"full": (112, 128, 112), "small": (32, 32, 32)}


def setup(options, rt, channels_last, build):
    config = Config(**PRESETS["paper" if options.size == "full" else "smoke"])
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    return config, build(config).to(rt.device, memory_format=layout), layout


def volumes(options, rt, batch, layout=torch.contiguous_format, channels=1, compression=1):
    """Uniform noise (batch, channels, ...): the time does not depend on the picture."""
    shape = (n // compression for n in SHAPES[options.size])
    return torch.rand(batch, channels, *shape).to(rt.device, memory_format=layout)


def latents(options, rt, batch, config, layout=torch.contiguous_format):
    return volumes(options, rt, batch, layout, config.latent_dim, COMPRESSION)


def stage_1(options, rt, channels_last):
    """One step of `train_aae`: both networks forward and backward, both optimizers."""
    config, autoencoder, layout = setup(options, rt, channels_last, build_autoencoder)
    discriminator = build_discriminator(config).to(rt.device, memory_format=layout)
    pair, x = training.RealAndFake(discriminator), volumes(options, rt, options.batch, layout)
    fused = runtime.fused_optimizer_kwargs(rt.device)
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-4, **fused) for net in (autoencoder, discriminator)]

    def step():
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        aae_step(autoencoder, pair, x, config, autocast=rt.autocast)
        for optimizer in optimizers:
            optimizer.step()

    return measure(step, rt, options.repeats)


def stage_2(options, rt, channels_last):
    """One step of `train_ldm`: MRI features, denoiser forward and backward, optimizer, EMA."""
    config, denoiser, _ = setup(options, rt, channels_last, build_denoiser)
    mri, z_0 = volumes(options, rt, options.batch), latents(options, rt, options.batch, config)
    label = torch.zeros(options.batch, dtype=torch.long, device=rt.device)
    model, schedule, ema = DenoiserWithMri(denoiser), noise_schedule(config), EMA(denoiser, config.ema_decay)
    fused = runtime.fused_optimizer_kwargs(rt.device)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4, **fused)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with rt.autocast():
            loss = ldm_loss(model, schedule, z_0, mri, label, label + 500, torch.randn_like(z_0))
        loss.backward()
        optimizer.step()
        ema.update(denoiser)

    return measure(step, rt, options.repeats)


@torch.inference_mode()
def denoising(options, rt, channels_last):
    """One denoiser call for one volume, as each sampling step makes it (MRI features are computed once)."""
    config, denoiser, _ = setup(options, rt, channels_last, build_denoiser)
    z_t = latents(options, rt, 1, config)
    label = torch.zeros(1, dtype=torch.long, device=rt.device)
    denoiser.eval()
    with rt.autocast():
        cond_map = denoiser.condition(volumes(options, rt, 1)).float()
        return measure(lambda: denoiser(z_t, cond_map, label + 500, label), rt, options.repeats)


@torch.inference_mode()
def coding(options, rt, channels_last, decode):
    config, autoencoder, layout = setup(options, rt, channels_last, build_autoencoder)
    x = latents(options, rt, 1, config, layout) if decode else volumes(options, rt, 1, layout)
    with rt.autocast():
        return measure(partial(autoencoder.decode if decode else autoencoder.encode, x), rt, options.repeats)


def loader(options, rt, workers, cached):
    """Volumes per second of the stage-1 loader over .nii.gz phantoms; with cache, once it is filled."""
    n, workers = 4, options.num_workers if workers else 0
    with tempfile.TemporaryDirectory() as folder:
        brain = phantom.anatomy(0, SHAPES[options.size])
        for seed in range(n):
            image = phantom.pet_image(brain, seed) / 3
            nifti.save(Path(folder) / f"sub-{seed}.nii.gz", image.clip(0, 1), brain.affine)
        pet = Volumes(folder, VolumeCache(Path(folder) / "cache" if cached else None))
        dataset = PetDataset(pet, [f"sub-{seed}" for seed in range(n)], Config())
        batches = runtime.training_batches(dataset, 2, 0, 0, rt, workers)
        for _ in range(1 + workers * 2):  # starts the workers, fills the cache and uses up what they fetched ahead
            next(batches)
        count, start = 0, time.perf_counter()
        while count < 12 or time.perf_counter() - start < 1:
            count += len(next(batches))
        return {"per_second": count / (time.perf_counter() - start)}


COMPUTE = {
    "stage 1 training step": stage_1,
    "stage 2 training step": stage_2,
    "denoising step": denoising,
    "encode": partial(coding, decode=False),
    "decode": partial(coding, decode=True),
}
ITEMS = {f"{name}, {layout}": partial(function, channels_last=layout != "contiguous")
         for name, function in COMPUTE.items() for layout in LAYOUTS}
LOADERS = {"loader without workers": False, "loader with workers": True}
ITEMS |= {f"{name}, {source}": partial(loader, workers=workers, cached=source == "cache")
          for name, workers in LOADERS.items() for source in (".nii.gz", "cache")}


def report(results):
    """Lines of a table, the loader's ratio, and the cost of a sample by sampler."""
    yield from layout_table(results, COMPUTE)
    for name in LOADERS:
        rates = [results.get(f"{name}, {source}", {}).get("per_second") for source in (".nii.gz", "cache")]
        if all(rates):
            yield (f"{name}: {rates[0]:.1f} volumes/s from .nii.gz, {rates[1]:.1f} from the cache, "
                   f"{rates[1] / rates[0]:.1f} times as fast")
    step, decode = (results.get(f"{name}, contiguous", {}).get("seconds") for name in ("denoising step", "decode"))
    if step and decode:
        cost = {n: n * step + decode for n in (999, 50, 20)}
        yield (f"one sample (steps x denoising step + decode): ancestral 999 steps {cost[999]:.0f} s; DPM-Solver++ "
               f"50 steps {cost[50]:.1f} s ({cost[999] / cost[50]:.0f} times faster), "
               f"20 steps {cost[20]:.1f} s ({cost[999] / cost[20]:.0f} times faster)")
    yield from failures(results)
