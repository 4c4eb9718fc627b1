"""LAPT: training steps and network calls at the paper's size: slices of 192 x 224 pixels, windows of 8 slices.

Two things are smaller than in the paper, to fit the memory of an ordinary machine: the volume network sees
VOLUME_SLICES slices, not 32 (no weight depends on that), and its training step halves the sides in-plane. Training
steps of the diffusion stages recompute activations.
"""

from functools import partial

import torch

from common import runtime, training
from common.ema import EMA
from lapt import diffusion, ldm, losses, segmentation, vqgan
from lapt.config import CONFIGS, PRESETS
from lapt.dataset import Intensity
from tests.bench.measure import LAYOUTS, failures, layout_table, measure

VOLUME_SLICES, TIME_POINTS = 4, 15
STATS = {"dwi": {"low": 100.0, "high": 900.0, "mean": 400.0, "sd": 150.0},
         "adc": {"low": 300.0, "high": 2300.0, "mean": 900.0, "sd": 300.0}}  # fmt: skip


def preset(stage, options, **more):
    return CONFIGS[stage](**(PRESETS[stage]["paper" if options.size == "full" else "tiny"] | more))


def plane(options):
    return (192, 224) if options.size == "full" else (48, 48)


def adam(network, rt, kind=torch.optim.AdamW):
    trained = [p for p in network.parameters() if p.requires_grad]
    return kind(trained, lr=1e-5, **runtime.fused_optimizer_kwargs(rt.device))


# ---- autoencoder and guide


def build_vqgan(options, rt, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    config = preset("vqgan", options)
    return config, vqgan.build_vqgan(config).to(rt.device, memory_format=layout), layout


def vqgan_step(options, rt, channels_last):
    """Stage 1 with its adversary."""
    config, autoencoder, layout = build_vqgan(options, rt, channels_last)
    discriminator = vqgan.build_discriminator(config).to(rt.device, memory_format=layout)
    pairs = [(adam(network, rt, torch.optim.Adam), network) for network in (autoencoder, discriminator)]
    x = torch.rand(options.batch, 2, *plane(options)).to(rt.device, memory_format=layout)

    def step():
        vqgan.vqgan_step(autoencoder, training.RealAndFake(discriminator), x, config, autocast=rt.autocast)
        for optimizer, _ in pairs:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return measure(step, rt, options.repeats)


@torch.inference_mode()
def coding(options, rt, channels_last, decode):
    config, autoencoder, layout = build_vqgan(options, rt, channels_last)
    x = torch.rand(1, 2, *plane(options)).to(rt.device, memory_format=layout)
    with rt.autocast():
        x = autoencoder.encode(x) if decode else x
        return measure(partial(autoencoder.eval().decode if decode else autoencoder.eval().encode, x), rt,
                       options.repeats)  # fmt: skip


def guide_step(options, rt):
    """The guide on one window."""
    config = preset("guide", options)
    guide = segmentation.build_guide(config).to(rt.device)
    optimizer = adam(guide, rt, torch.optim.Adam)
    x = torch.rand(1, 2, *plane(options), config.window).to(rt.device)
    lesion = (x[:, :1] > 0.9).float()

    def step():
        with rt.autocast():
            logits = guide(x)
        segmentation.objective(logits.float(), lesion, config).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return measure(step, rt, options.repeats)


# ---- diffusion


def build(options, rt, stage):
    """Configuration of a stage, a model of random weights that it could start from, on the device."""
    volumes = CONFIGS[stage].volumes
    own = dict(size=(*plane(options), VOLUME_SLICES)) if volumes else {}
    base = preset("ldm3d" if volumes else "ldm", options, **own)
    settings = ldm.model_settings(base, vqgan.vqgan_settings(preset("vqgan", options)), TIME_POINTS)
    intensity = Intensity("quantile", "training", STATS, (0.0, 200.0), TIME_POINTS)
    model = diffusion.build_model(settings, intensity, rt, checkpointing=True)
    more = own | (dict(window=VOLUME_SLICES, w_seg=0.0) if stage == "lapt3d" else {})
    return preset(stage, options, checkpointing=True, **more), runtime.frozen_network(model, rt)


def training_step(options, rt, stage):
    """Forward, backward, AdamW and EMA of one item per batch; post-training decodes and compares with the image."""
    config, model = build(options, rt, stage)
    learned = ldm.learned_parts(model, config)
    optimizer, ema = adam(learned, rt), EMA(learned, config.ema_decay)
    denoiser, slices = ldm.Denoiser(model.conditioner, model.unet), model.slices
    size = [n // 2 for n in plane(options)] if slices and options.size == "full" else plane(options)
    shape = (*size, slices) if slices else size
    item = {"mri": torch.rand(options.batch, 2, *shape), "ctp": torch.rand(options.batch, TIME_POINTS, *shape),
            "mask": torch.ones(options.batch, 1, *shape)}  # fmt: skip
    item["lesion"] = (item["mri"][:, :1] > 0.9).float()
    t = torch.full((options.batch,), 100)
    noise = torch.randn(options.batch, slices or 1, *model.latent_shape(torch.empty(1, 0, *size))[1:]).to(rt.device)
    table = losses.timestep_weight(model.schedule, "snr", snr_gamma=5.0) if "lapt" in stage else None

    def step():
        u = torch.full((options.batch, 2), 0.5)
        ldm.training_losses(denoiser, model, item, t, noise, u, config, table)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(learned)

    return measure(step, rt, options.repeats)


@torch.inference_mode()
def network_call(options, rt, stage):
    """One call of the U-Net: of one slice, or of VOLUME_SLICES of a volume."""
    _, model = build(options, rt, stage)
    n = model.slices or 1
    z = torch.randn(model.latent_shape(torch.empty(n, 0, *plane(options)))).to(rt.device)
    c = model.condition(torch.rand(n, TIME_POINTS, *plane(options)).to(rt.device))
    t = torch.full((n,), 500, device=rt.device)
    return measure(lambda: model.denoiser(c)(z, t), rt, options.repeats)


BY_LAYOUT = {"VQGAN step": vqgan_step, "encode": partial(coding, decode=False), "decode": partial(coding, decode=True)}
PLAIN = {
    "guide step": guide_step,
    "LDM step": partial(training_step, stage="ldm"),
    "LAPT step": partial(training_step, stage="lapt"),
    "3D LAPT step, half size": partial(training_step, stage="lapt3d"),
    "U-Net call": partial(network_call, stage="ldm"),
    "3D U-Net call": partial(network_call, stage="ldm3d"),
}
ITEMS = {f"{name}, {layout}": partial(function, channels_last=layout != "contiguous")
         for name, function in BY_LAYOUT.items() for layout in LAYOUTS}  # fmt: skip
ITEMS |= PLAIN


def report(results):
    """Lines of a table, and the cost of a study of 32 slices."""
    yield from layout_table(results, BY_LAYOUT)
    for name in PLAIN:
        if "seconds" in (r := results.get(name, {})):
            yield f"{name:24}{r['seconds']:10.3f} s{r['peak_gib']:10.2f}"
    yield f"3D: {VOLUME_SLICES} slices, not 32; its training step at half the sides in-plane"
    call, decode = (results.get(name, {}).get("seconds") for name in ("U-Net call", "decode, contiguous"))
    if call and decode:
        cost = {n: 32 * (n * call + decode) / 60 for n in (50, 10)}
        yield f"a study of 32 slices in 2D: 50 steps {cost[50]:.0f} minutes, 10 steps {cost[10]:.0f} minutes"
    yield from failures(results)
