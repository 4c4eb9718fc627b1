"""Stage 2 of IL-CLDM: a 3D U-Net denoises PET latents, given the MRI (concatenated map) and the label (added to t).

Ou et al., IEEE JBHI 29(2):1221-1231, 2025. `ldm_loss` is the objective, `train_ldm` the loop around it,
`sample_latents` the sampler.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import checkpoint, metrics, runtime, schedulers, training
from common.cli import UserError, to_dict
from common.ema import EMA
from common.runlog import Means, RunLog, progress
from il_cldm import aae, dataset, upstream
from il_cldm.config import Config
from il_cldm.model import build_denoiser
from il_cldm.prepare import preparation

ARCHITECTURE = (
    "latent_dim", "unet_channels", "unet_mults", "unet_groups", "unet_res_blocks", "unet_attn_res", "image_size",
    "unet_dropout", "time_dim", "num_classes", "label_dropout", "noiseSteps", "beta_start", "beta_end",
    "prediction", "cond_channels",
)  # fmt: skip


VALIDATION_TIMES = 8  # timesteps of the held-out loss


class DenoiserWithMri(nn.Module):
    """Denoiser that computes the MRI feature map itself: training re-evaluates it each step, samplers cache it."""

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, z_t, mri, t, label):
        return self.denoiser(z_t, self.denoiser.condition(mri), t, label)


def noise_schedule(config) -> schedulers.Schedule:
    return schedulers.make_schedule("linear", config.noiseSteps, config.beta_start, config.beta_end, config.prediction)


def ldm_loss(model, schedule, z_0, mri, label, t, eps) -> torch.Tensor:
    """Mean squared error of the predicted noise (or v).

    z_0, eps (B, C, d, h, w); t, label (B,) integers; mri (B, 1, D, H, W), or its feature map if `model` is the bare
    denoiser.
    """
    z_t = schedulers.q_sample(schedule, z_0, t, eps)
    target = schedulers.training_target(schedule, z_0, t, eps)  # eps itself in the paper
    return F.mse_loss(model(z_t, mri, t, label).float(), target)


def draw(config: Config, step: int, latent_shape: tuple[int, ...], rt: runtime.Runtime):
    """This rank's timesteps (uniform on 1 .. T-1: the original never visits 0), noise and label-dropout mask of a step.

    Every rank draws the whole global batch from the step's own generator, so N ranks see what one would.
    """
    g = runtime.generator(config.seed, "ldm", step)
    t = torch.randint(1, config.noiseSteps, (config.batch_size,), generator=g)
    eps = torch.randn((config.batch_size, *latent_shape), generator=g)
    dropped = torch.rand(config.batch_size, generator=g) < config.label_dropout
    return (runtime.local_slice(x, rt).to(rt.device) for x in (t, eps, dropped))


# ---- training -------------------------------------------------------------------------------------------------------


def train_ldm(config: Config, rt: runtime.Runtime) -> None:
    """Train stage 2 to RESULT/EXP/Unet.pth.tar (best EMA on validation); resumes RESULT/EXP/ldm/checkpoints/last.pt."""
    # ---- data
    config = replace(config, batch_size=config.ldm_batch_size or config.batch_size)
    training.check_options(config, rt, intervals=aae.INTERVALS)
    lists = dataset.check_splits(config)
    train, validation = lists["train"], lists["validation"]
    table = dataset.read_labels(config)
    labels = {dataset.stem(name): dataset.label_of(table, name, config) for name in train}
    mri, pet = dataset.open_volumes(config)
    shape = dataset.check_volumes(mri, train + validation, rt, "MRI")
    dataset.check_pairs(mri, pet, validation)
    autoencoder, aae_hash = aae.load_autoencoder(config, rt)
    latents, stats = load_latents(config, train, shape, aae_hash)
    latent_shape = tuple(next(iter(latents.values())).shape)
    steps_per_epoch = math.ceil(len(train) / config.batch_size)
    total = config.ldm_steps or config.epochs * steps_per_epoch
    last_step = min(total, config.max_steps or total)
    validate_every = config.ldm_val_every * steps_per_epoch

    # ---- model
    torch.manual_seed(config.seed)
    layout = runtime.memory_layout(config.unet_channels_last)
    config = replace(config, latent_dim=latent_shape[0])  # the autoencoder decides, not --latent_dim
    denoiser = build_denoiser(config).to(rt.device, memory_format=layout)
    if config.compile:
        denoiser.compile()
    schedule = noise_schedule(config)

    # ---- optimizer and EMA
    fused = runtime.fused_optimizer_kwargs(rt.device)
    decay = config.weight_decay
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=config.learning_rate, weight_decay=decay, **fused)
    ema = EMA(denoiser, config.ema_decay, config.ema_start)
    scaler, means = rt.grad_scaler(), Means()

    # ---- resume
    folder, best_path = config.run_folder / "ldm", config.run_folder / "Unet.pth.tar"
    last_path = folder / "checkpoints" / "last.pt"
    training.claim_run(best_path, last_path, config, rt)
    settings = aae.frozen_settings(config, "stage 2", train) | {"aae": aae_hash}
    objects = {"denoiser": denoiser, "ema": ema, "optimizer": optimizer, "scaler": scaler, "means": means}
    step, extra = checkpoint.resume_training(last_path, objects=objects, config=settings)
    best, stale = extra.get("best", -math.inf), extra.get("stale", 0)
    if training.is_complete("stage 2", step, last_step, stale, best_path, config, rt):
        return

    def save_last():
        means.share(rt)
        if rt.is_main:
            extra = {"best": best, "stale": stale}
            checkpoint.save_training(last_path, step=step, objects=objects, config=settings, extra=extra)

    def save_best(scores):
        if rt.is_main:
            save_denoiser(best_path, ema.module, config, stats, aae_hash, step, scores, shape)

    # ---- loop
    model = runtime.wrap_ddp(DenoiserWithMri(denoiser), rt)
    pairs = dataset.PairDataset(mri, latents, labels, train)
    batches = runtime.training_batches(pairs, config.batch_size, step, config.seed, rt, config.num_workers)
    fingerprint = {"train": train, "validation": validation, "shape": list(shape), "aae": aae_hash}
    with (
        RunLog(folder, to_dict(config), start_step=step, enabled=rt.is_main, data_fingerprint=fingerprint) as log,
        runtime.StopRequest() as stop,
        progress(last_step, step, "stage 2: latent diffusion", enabled=rt.is_main) as bar,
    ):
        if step == 0:
            save_last()  # claims the folder, and a disk that is too small shows now
        while step < last_step and not stop.agree(rt):
            lr = training.set_learning_rate(aae.learning_rate(config, step, total), optimizer)
            x_batch, z_batch, label_batch = (v.to(rt.device, non_blocking=True) for v in next(batches))
            t_batch, eps_batch, dropped = draw(config, step, latent_shape, rt)
            if config.label_dropout > 0:
                # Deviation (original code): labels are dropped, so that sampling without one is a trained case.
                label_batch = torch.where(dropped, config.num_classes, label_batch)
            optimizer.zero_grad(set_to_none=True)
            batch = (z_batch, x_batch, label_batch, t_batch, eps_batch)
            for z_0, x, label, t, eps in runtime.micro_batches(config.accumulate, *batch):
                with rt.autocast():
                    loss = ldm_loss(model, schedule, z_0, x, label, t, eps)
                scaler.scale(loss / config.accumulate).backward()
                means.add({"loss": loss})
            runtime.update_weights(scaler, config.clip_grad, denoiser=(optimizer, denoiser))
            ema.update(denoiser)
            step += 1
            bar.update()

            if step % config.log_every == 0 or step % steps_per_epoch == 0 or step == total:
                values = training.mean_losses("stage 2", means, step, rt)
                log.log("train", step, epoch=step / steps_per_epoch, lr=lr, **values)
                bar.set_postfix({name: f"{v:.4f}" for name, v in values.items()})
            if step % validate_every == 0 or step == total:
                scores = validate(ema.module, autoencoder, schedule, stats, mri, pet, validation, config, rt)
                log.log("val", step, epoch=step / steps_per_epoch, **scores)
                stale += 1
                merit = -scores["loss"] if config.select == "loss" else scores["score"]
                if merit > best:
                    best, stale = merit, 0
                    save_best(scores)
                save_last()
                if config.patience and stale >= config.patience:
                    rt.print(f"stage 2: no improvement in {stale} validations, stopped at step {step}")
                    break
            elif config.save_every and step % config.save_every == 0:
                save_last()

        # ---- finish
        save_last()
        if not best_path.exists():
            save_best({})  # cut short before its first validation: still a usable file
        rt.barrier()
    stop.leave("stage 2", step, last_step, rt)


@torch.inference_mode()
def validate(denoiser, autoencoder, schedule, stats, mri, pet, names, config: Config, rt: runtime.Runtime) -> dict:
    """Held-out loss, and PSNR, SSIM, PSNR + 10·SSIM of one sample per subject; label-free, with fixed noise throughout.

    The loss is a mean over VALIDATION_TIMES timesteps. It rises when the model starts to know its training subjects by
    heart and its samples become too sure of themselves; PSNR and SSIM of a sample hardly show that.
    """
    rows, times = [], torch.linspace(1, schedule.T - 1, VALIDATION_TIMES).round().long()
    null = None if denoiser.null_label is None else torch.tensor([denoiser.null_label], device=rt.device)
    for name in rt.shard(names):
        x, cond_map = pet.tensor(name)[None], condition(denoiser, mri.tensor(name)[None], rt)
        noise = runtime.generator(config.seed, "validation", dataset.stem(name))
        z = sample_latents(
            denoiser, schedule, cond_map, None, [noise], sampler=config.val_sampler, steps=config.val_steps, rt=rt
        )
        x_hat = decode(autoencoder, z, stats, rt)
        with rt.autocast():
            z_0 = autoencoder.encode(x.to(rt.device))
        z_0, losses = normalise(z_0.float(), stats), []
        for t in times.to(rt.device):
            eps = torch.randn(z_0.shape, generator=noise).to(rt.device)
            with rt.autocast():
                losses.append(ldm_loss(denoiser, schedule, z_0, cond_map, null, t[None], eps))
        scores = (metrics.psnr(x_hat, x, data_range=1.0), metrics.ssim(x_hat, x, data_range=1.0))
        rows.append((torch.stack(losses).mean().item(), *scores))
    loss, psnr, ssim = np.mean([row for part in rt.gather(rows) for row in part], axis=0)
    return {"loss": float(loss), "psnr": float(psnr), "ssim": float(ssim), "score": float(psnr + 10 * ssim)}


# ---- latents and their scale ----------------------------------------------------------------------------------------


def load_latents(config: Config, names: list[str], shape: tuple[int, ...], aae_hash: str) -> tuple[dict, dict]:
    """Training latents by stem, normalised with the training set's mean and SD, and these statistics.

    UserError if latents are missing, of another autoencoder or training list, or of another grid than the MRI.
    """
    path, folder = aae.latents_record(config), config.latent_Abeta
    record = json.loads(path.read_text()) if path.is_file() else {}
    if "mean" not in record:
        raise UserError(f"no training latents in {folder}; encode them with `python il_cldm/main.py --enc`")
    if record["aae"] != aae_hash:
        raise UserError(f"{folder} holds latents of another autoencoder than {config.aae_path}; run --enc --overwrite")
    if record["train_list"] != sorted(map(dataset.stem, names)):
        raise UserError(f"{folder} has the mean and SD of another training list; run --enc again")
    channels = len(record["mean"])
    expected = (channels, *(s // aae.COMPRESSION for s in shape))
    latents = {}
    for name in map(dataset.stem, names):
        path = aae.latent_path(config, name)
        if not path.is_file():
            raise UserError(f"{name}: no latent {path}; run --enc again")
        z = latents[name] = aae.load_latent(path)
        if tuple(z.shape) != expected:
            raise UserError(f"{name}: latent {path} has shape {tuple(z.shape)}, its MRI asks for {expected}; MRI and "
                            "PET must lie on one grid")  # fmt: skip
    if not config.normalise_latents:
        stats = {"mean": [0.0] * channels, "std": [1.0] * channels}
    elif config.latent_mean == "channel":
        stats = {"mean": record["mean"], "std": record["std"]}
    else:
        stats = voxel_statistics(latents)
    return {name: normalise(z[None], stats)[0] for name, z in latents.items()}, stats


def voxel_statistics(latents: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mean latent image (C, d, h, w) of the training set, and per channel the SD around it, (C, 1, 1, 1).

    Registered brains are so alike that a channel's own SD is mostly anatomy which everybody shares: what differs
    between people is then far below unit variance and hardly enters the loss. The mean image takes out what is shared.
    """
    mean = sum(z.double() for z in latents.values()) / len(latents)
    variance = sum((z - mean).square().mean(dim=(1, 2, 3), keepdim=True) for z in latents.values()) / len(latents)
    return {"mean": mean.float(), "std": variance.sqrt().float()}


def _statistic(values, like: torch.Tensor) -> torch.Tensor:
    """A number per channel, or a map (C, d, h, w), to broadcast against latents (B, C, d, h, w)."""
    values = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    return values.view(1, -1, 1, 1, 1) if values.ndim == 1 else values[None]


def normalise(z: torch.Tensor, stats: dict) -> torch.Tensor:
    """(B, C, ...) latents to zero mean and unit variance over the training set."""
    return (z - _statistic(stats["mean"], z)) / _statistic(stats["std"], z).clamp_min(1e-8)


def denormalise(z: torch.Tensor, stats: dict) -> torch.Tensor:
    """Inverse of `normalise`."""
    return z * _statistic(stats["std"], z).clamp_min(1e-8) + _statistic(stats["mean"], z)


# ---- sampling -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def condition(denoiser, mri: torch.Tensor, rt: runtime.Runtime) -> torch.Tensor:
    """MRI (B, 1, D, H, W) to the feature map that every denoising step reuses."""
    with rt.autocast():
        return denoiser.condition(mri.to(rt.device)).float()


@torch.inference_mode()
def decode(autoencoder, z: torch.Tensor, stats: dict, rt: runtime.Runtime) -> torch.Tensor:
    """Normalised latents (B, C, d, h, w) to PET (B, 1, D, H, W) in [0, 1] on the CPU."""
    with rt.autocast():
        x = autoencoder.decode(denormalise(z, stats))
    return x.float().clamp(0, 1).cpu()


@torch.inference_mode()
def sample_latents(
    denoiser,
    schedule: schedulers.Schedule,
    cond_map: torch.Tensor,
    label: int | None,
    generators: list[torch.Generator],
    *,
    sampler: str,
    steps: int,
    guidance: float = 1.0,
    eta: float = 0.0,
    rt: runtime.Runtime,
    callback: Callable | None = None,
) -> torch.Tensor:
    """One normalised latent per generator, (len(generators), C, d, h, w).

    cond_map: (1, cond_channels, d, h, w) from `condition`.
    label None: the null class where there is one, else no label vector.
    steps: denoiser calls; 0 means all of T-1 .. 1. With "ddpm" the published rule: beta variance, no noise after i = 1.
    """
    B, T = len(generators), schedule.T
    latent_shape = (denoiser.conv_out.out_channels, *cond_map.shape[2:])
    cond_map = cond_map.expand(B, -1, -1, -1, -1)

    def denoise_with(class_index: int | None):
        index = denoiser.null_label if class_index is None else class_index
        labels = None if index is None else torch.full((B,), index, device=rt.device)

        def denoise(z_t, t):
            with rt.autocast():
                return denoiser(z_t, cond_map, t, labels).float()

        return denoise

    denoise = denoise_with(label)
    if label is not None and guidance != 1.0:
        denoise = schedulers.guided(denoise, denoise_with(None), guidance)
    timesteps = list(range(T - 1, 0, -1))
    if 0 < steps < T - 1:
        timesteps = np.linspace(T - 1, 1, steps).round().astype(int).tolist()
    # Each sample draws from its own generator: independent of batch and order.
    z_T = schedulers.draw_noise(generators, (B, *latent_shape), rt.device)
    common = dict(timesteps=timesteps, callback=callback)
    if sampler == "ddpm":
        common |= dict(variance="large", final="first")
        return schedulers.ddpm_sample(denoise, z_T, schedule, noise=generators, **common)
    if sampler == "ddim":
        return schedulers.ddim_sample(denoise, z_T, schedule, eta=eta, noise=generators, **common)
    return schedulers.dpmpp_2m_sample(denoise, z_T, schedule, **common)


# ---- files ----------------------------------------------------------------------------------------------------------


def save_denoiser(path, denoiser, config: Config, stats: dict, aae_hash: str, step: int, scores: dict, shape) -> None:
    settings = {name: getattr(config, name) for name in ARCHITECTURE}
    training.save_network(
        path, "il_cldm denoiser", denoiser.state_dict(), settings, latents=stats, aae=aae_hash, step=step,
        scores=scores, shape=list(shape), preparation=preparation(config),
    )  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A denoiser in eval mode with what sampling from it needs."""

    denoiser: nn.Module
    schedule: schedulers.Schedule
    stats: dict  # mean and std of the training latents, see load_latents
    hash: str
    num_classes: int
    preparation: dict | None  # grid and MRI scaling of the training data; None for the original's files


def check_grid(trained: Trained, shape: tuple[int, ...], path: Path) -> None:
    """UserError if the model is tied to one grid (a mean latent image) and the MRI at `path` lies on another."""
    mean = trained.stats["mean"]
    grid = tuple(s * aae.COMPRESSION for s in mean.shape[1:]) if torch.is_tensor(mean) else tuple(shape)
    if tuple(shape) != grid:
        raise UserError(f"{path}: shape {tuple(shape)}, but the model was trained on {grid} with --latent_mean voxel; "
                        "bring it there with --prepare, or add --native")  # fmt: skip


def load_denoiser(config: Config, rt: runtime.Runtime, aae_hash: str) -> Trained:
    """The trained (EMA) denoiser; reads our files and the original's Unet.pth.tar, which has unnormalised latents."""
    path = config.unet_path
    option, command = "--checkpoint_unet", "main.py --train_ldm"
    saved = training.read_network(path, "il_cldm denoiser", command, option, config.trust_pickle)
    if saved.get("network") == "il_cldm denoiser":
        if saved["aae"] != aae_hash:
            raise UserError(f"{path} was trained on latents of autoencoder {saved['aae']}, but {config.aae_path} is "
                            f"{aae_hash}; give the matching pair")  # fmt: skip
        settings = Config(**saved["config"])
        denoiser, stats, num_classes = build_denoiser(settings), saved["latents"], settings.num_classes
        checkpoint.load_weights(denoiser, saved["state_dict"], path)
    else:
        kind, denoiser = upstream.from_checkpoint(saved, path)
        if kind != "UNet":
            raise UserError(f"{path} holds a {kind}, not a denoiser; give --checkpoint_unet the Unet.pth.tar file")
        settings = SimpleNamespace(noiseSteps=1000, beta_start=1e-4, beta_end=0.02, prediction="eps")
        channels, num_classes = denoiser.conv_out.out_channels, denoiser.projector.label.num_embeddings
        stats = {"mean": [0.0] * channels, "std": [1.0] * channels}
    denoiser = runtime.frozen_network(denoiser, rt, config.unet_channels_last)
    return Trained(
        denoiser,
        noise_schedule(settings),
        stats,
        checkpoint.weights_hash(denoiser.state_dict()),
        num_classes,
        saved.get("preparation"),
    )
