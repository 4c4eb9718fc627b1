"""Stage 1 of IL-CLDM: a 3D autoencoder with an adversary on its reconstructions compresses PET by 4 per axis.

Ou et al., IEEE JBHI 29(2):1221-1231, 2025. `aae_step` is the training step; `train_aae` the loop around it.
The "AAE" has no prior on its latent: the adversary judges reconstructed images.
"""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from common import checkpoint, figures, metrics, nifti, runtime
from common.cli import UserError, frozen, to_dict
from common.runlog import Means, RunLog, progress, write_json
from il_cldm import dataset, upstream
from il_cldm.config import Config
from il_cldm.losses import generator_adversarial_loss, hinge_discriminator_loss, kl_loss, reconstruction_loss
from il_cldm.model import build_autoencoder, build_discriminator

COMPRESSION = 4
ARCHITECTURE = ("latent_dim", "aae_channels", "aae_groups", "kl_weight")  # what a checkpoint needs to rebuild the network


class RealAndFake(nn.Module):
    """Both discriminator passes of a step in one forward, real first, as DistributedDataParallel needs it."""

    def __init__(self, discriminator: nn.Module):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, x: torch.Tensor, x_hat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.discriminator(x), self.discriminator(x_hat)


def aae_step(
    autoencoder, real_and_fake, x, config, *, adversarial=True, scale=1.0, noise=None, autocast=nullcontext
) -> dict[str, torch.Tensor]:
    """Accumulate the gradients of one step into both networks; returns detached losses. x: PET (B, 1, D, H, W) in [0, 1].

    Autoencoder: Lambda·mean|x - x_hat| - mean D(x_hat) (+ KL). Discriminator: hinge. `scale` multiplies every gradient
    (loss scaling, micro-batches). `noise` (B, latent_dim, ...) samples the latent where there is a KL term.
    """
    with autocast():
        x_hat, mean, logvar = autoencoder(x, noise)
    loss_rec = reconstruction_loss(x_hat, x)
    loss, losses = config.Lambda * loss_rec, {"loss_rec": loss_rec}
    if logvar is not None:
        losses["loss_kl"] = kl_loss(mean, logvar)
        loss = loss + config.kl_weight * losses["loss_kl"]
    if adversarial:
        # Deviation (original code): x_hat is cut from the graph here, so the discriminator's loss cannot reach the autoencoder;
        # there it leaked in and halved the adversarial gradient. The generator's part comes back through `grad_adv`.
        x_fake = x_hat.detach().requires_grad_()
        with autocast():
            logits_real, logits_fake = real_and_fake(x, x_fake)
        loss_adv = generator_adversarial_loss(logits_fake)
        loss_disc = hinge_discriminator_loss(logits_real, logits_fake)
        (grad_adv,) = torch.autograd.grad(scale * loss_adv, x_fake, retain_graph=True)
        torch.autograd.backward([scale * loss, x_hat], [None, grad_adv])
        (scale * loss_disc).backward()
        losses |= {"loss_adv": loss_adv, "loss_disc": loss_disc}
    else:
        (scale * loss).backward()
    return {name: value.detach().float() for name, value in losses.items()}


def learning_rate(config: Config, step: int, total: int) -> float:
    """Learning rate of a step: constant, or half a cosine down to zero at `total`."""
    if config.lr_schedule == "constant":
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(step / total, 1)))


def frozen_settings(config: Config, stage: str, names: list[str]) -> dict:
    """What may not change when `stage` is resumed: its options, seed, precision, and the training list."""
    return frozen(config, {"training", stage}) | {"seed": config.seed, "precision": config.precision, "train_list": sorted(names)}


def train_aae(config: Config, rt: runtime.Runtime) -> None:
    """Train stage 1 to RESULT/EXP/AAE.pth.tar (best on validation); resumes RESULT/EXP/aae/checkpoints/last.pt."""
    # ---- data
    lists = dataset.check_splits(config)
    _, pet = dataset.open_volumes(config)
    train, validation = lists["train"], lists["validation"]
    shape = dataset.check_volumes(pet, train + validation, rt, "PET")
    smallest = 2 ** (len(config.disc_channels) + 1)
    if min(shape) < smallest:
        raise UserError(f"PET of shape {shape} is too small for {len(config.disc_channels)} discriminator levels; axes need {smallest} voxels (--disc_channels)")
    steps_per_epoch = math.ceil(len(train) / config.batch_size)
    total = config.aae_steps or config.epochs * steps_per_epoch
    last_step = min(total, config.max_steps or total)

    # ---- model
    torch.manual_seed(config.seed)
    layout = torch.channels_last_3d if config.channels_last else torch.contiguous_format
    autoencoder = build_autoencoder(config).to(rt.device, memory_format=layout)
    discriminator = build_discriminator(config).to(rt.device, memory_format=layout)
    if config.compile:
        autoencoder.compile()

    # ---- optimizer
    fused = runtime.fused_optimizer_kwargs(rt.device)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=config.learning_rate, betas=(0.5, 0.999), **fused)
    optimizer_disc = torch.optim.Adam(discriminator.parameters(), lr=config.learning_rate, betas=(0.5, 0.999), **fused)
    scaler, means = rt.grad_scaler(), Means()

    # ---- resume
    folder = config.run_folder / "aae"
    last_path = folder / "checkpoints" / "last.pt"
    if config.restart and rt.is_main:
        last_path.unlink(missing_ok=True)
    rt.barrier()
    objects = {"autoencoder": autoencoder, "discriminator": discriminator, "optimizer": optimizer, "optimizer_disc": optimizer_disc, "scaler": scaler, "means": means}  # fmt: skip
    settings = frozen_settings(config, "stage 1", train)
    step, extra = checkpoint.resume_training(last_path, objects=objects, config=settings)
    best, stale = extra.get("best", -math.inf), extra.get("stale", 0)
    if step >= last_step:
        rt.print(f"stage 1 is complete at step {step} ({config.aae_path}); more --epochs continue it, --restart begins anew")
        return

    def save_last():
        if rt.is_main:
            checkpoint.save_training(last_path, step=step, objects=objects, config=settings, extra={"best": best, "stale": stale})

    # ---- loop
    model, pair = runtime.wrap_ddp(autoencoder, rt), runtime.wrap_ddp(RealAndFake(discriminator), rt)
    batches = runtime.training_batches(dataset.PetDataset(pet, train, config), config.batch_size, step, config.seed, rt, config.num_workers)  # fmt: skip
    validate_every = config.aae_val_every * steps_per_epoch
    fingerprint = {"train": train, "validation": validation, "shape": list(shape)}
    with (
        RunLog(folder, to_dict(config), start_step=step, enabled=rt.is_main, data_fingerprint=fingerprint) as log,
        runtime.StopRequest() as stop,
        progress(last_step, step, "stage 1: autoencoder", enabled=rt.is_main) as bar,
    ):
        while step < last_step:
            for group in (*optimizer.param_groups, *optimizer_disc.param_groups):
                group["lr"] = learning_rate(config, step, total)
            x_batch = next(batches).to(rt.device, memory_format=layout, non_blocking=True)
            noise = latent_noise(config, step, shape, rt) if config.kl_weight > 0 else None
            optimizer.zero_grad(set_to_none=True)
            optimizer_disc.zero_grad(set_to_none=True)
            micro = x_batch.chunk(config.accumulate)
            noises = [None] * len(micro) if noise is None else noise.chunk(config.accumulate)
            for x, n in zip(micro, noises, strict=True):
                losses = aae_step(model, pair, x, config, adversarial=step >= config.disc_start,
                                  scale=scaler.get_scale() / len(micro), noise=n, autocast=rt.autocast)  # fmt: skip
                means.add(losses)
            for opt, net in ((optimizer, autoencoder), (optimizer_disc, discriminator)):
                if any(p.grad is not None for p in net.parameters()):
                    scaler.unscale_(opt)
                    if config.clip_grad:
                        nn.utils.clip_grad_norm_(net.parameters(), config.clip_grad)
                    scaler.step(opt)
            scaler.update()
            step += 1
            bar.update()

            if step % config.log_every == 0 or step == last_step:
                values = {name: rt.mean(value).item() for name, value in means.pop().items()}
                if not all(math.isfinite(v) for v in values.values()):
                    raise UserError(f"stage 1 diverged at step {step}: {values}; lower --learning_rate or set --clip_grad 1 and resume")
                log.log("train", step, epoch=step / steps_per_epoch, lr=learning_rate(config, step - 1, total), **values)
                bar.set_postfix({k: f"{v:.4f}" for k, v in values.items()})
            if step % validate_every == 0 or step == total:
                scores = validate(autoencoder, pet, validation, rt)
                log.log("val", step, epoch=step / steps_per_epoch, **scores)
                stale += 1
                if scores["score"] > best:
                    best, stale = scores["score"], 0
                    if rt.is_main:
                        save_autoencoder(config.run_folder / "AAE.pth.tar", autoencoder, config, step, scores, shape)
                if rt.is_main:
                    log.image("reconstruction", step, draw_reconstruction(folder / "samples" / "latest.png", autoencoder, pet, validation[0], rt))
                save_last()
                if config.patience and stale >= config.patience:
                    rt.print(f"stage 1: no improvement in {stale} validations, stopped at step {step}")
                    break
            elif config.save_every and step % config.save_every == 0:
                save_last()
            if stop.agree(rt):
                break
        # ---- finish
        save_last()
        if rt.is_main and not (config.run_folder / "AAE.pth.tar").exists():
            # A run cut short by --max_steps before its first validation still leaves a usable file.
            save_autoencoder(config.run_folder / "AAE.pth.tar", autoencoder, config, step, {}, shape)
        rt.barrier()
    if stop.requested:
        rt.print(f"stage 1: stopped on request at step {step}; the same command continues")
        raise SystemExit(stop.exit_status)


def latent_noise(config: Config, step: int, shape: tuple[int, ...], rt: runtime.Runtime) -> torch.Tensor:
    """Noise of the stochastic latent for the whole global batch; every rank draws it all and keeps its slice."""
    size = (config.batch_size, config.latent_dim, *(s // COMPRESSION for s in shape))
    return runtime.local_slice(torch.randn(size, generator=runtime.generator(config.seed, "aae noise", step)), rt).to(rt.device)


# ---- using the autoencoder --------------------------------------------------------------------------------------------


def save_autoencoder(path: Path, autoencoder, config: Config, step: int, scores: dict, shape) -> None:
    state = autoencoder.state_dict()
    architecture = {name: getattr(config, name) for name in ARCHITECTURE}
    checkpoint.save(path, {"network": "il_cldm autoencoder", "state_dict": state, "config": architecture, "step": step, "scores": scores,
                           "shape": list(shape), "hash": checkpoint.weights_hash(state)})  # fmt: skip


def load_autoencoder(config: Config, rt: runtime.Runtime):
    """Frozen autoencoder in eval mode and the hash of its weights; reads our files and the original's AAE.pth.tar."""
    path = config.aae_path
    if not path.is_file():
        raise UserError(f"no autoencoder at {path}; train it with `python il_cldm/main.py --train_aae` or name one with --checkpoint_aae")
    saved = checkpoint.load(path, trust_pickle=config.trust_pickle)
    if saved.get("network") == "il_cldm autoencoder":
        autoencoder = build_autoencoder(SimpleNamespace(checkpointing=False, **saved["config"]))
        autoencoder.load_state_dict(saved["state_dict"])
    else:
        kind, autoencoder = upstream.from_checkpoint(saved, path)
        if kind != "AAE":
            raise UserError(f"{path} holds a {kind}, not an autoencoder; give --checkpoint_aae the AAE.pth.tar file")
    autoencoder = autoencoder.to(rt.device).eval().requires_grad_(False)
    return autoencoder, checkpoint.weights_hash(autoencoder.state_dict())


@torch.inference_mode()
def reconstruct(autoencoder, x: torch.Tensor, rt: runtime.Runtime) -> torch.Tensor:
    """Decoded latent of PET x (B, 1, D, H, W), clamped to [0, 1], on the CPU."""
    with rt.autocast():
        x_hat = autoencoder.decode(autoencoder.encode(x.to(rt.device)))
    return x_hat.float().clamp(0, 1).cpu()


def validate(autoencoder, pet: dataset.Volumes, names: list[str], rt: runtime.Runtime) -> dict[str, float]:
    """PSNR, SSIM and the original's score PSNR + 10·SSIM, each a mean over every listed subject."""
    autoencoder.eval()
    rows = []
    for name in rt.shard(names):
        x = pet.tensor(name)
        x_hat = reconstruct(autoencoder, x[None], rt)[0, 0]
        rows.append((metrics.psnr(x_hat, x[0], data_range=1.0), metrics.ssim(x_hat, x[0], data_range=1.0)))
    autoencoder.train()
    psnr, ssim = np.mean([row for part in rt.gather(rows) for row in part], axis=0)
    return {"psnr": float(psnr), "ssim": float(ssim), "score": float(psnr + 10 * ssim)}


def draw_reconstruction(path: Path, autoencoder, pet: dataset.Volumes, name: str, rt: runtime.Runtime) -> Path:
    x = pet.tensor(name)
    autoencoder.eval()
    x_hat = reconstruct(autoencoder, x[None], rt)[0, 0].numpy()
    autoencoder.train()
    return figures.montage(path, [("PET", x[0].numpy()), ("reconstruction", x_hat)], window=(0.0, 1.0), difference_to="PET")


def test_aae(config: Config, rt: runtime.Runtime) -> None:
    """Print and store the autoencoder's PSNR and SSIM over every subject of the test list."""
    names = dataset.read_list(config.list_path("test"))
    _, pet = dataset.open_volumes(config)
    dataset.check_volumes(pet, names, rt, "test PET")
    autoencoder, aae_hash = load_autoencoder(config, rt)
    scores = validate(autoencoder, pet, names, rt)
    if rt.is_main:
        report = {"n": len(names), **scores, "ssim_definition": "3D gaussian, sigma 1.5, valid border, data_range 1", "aae": aae_hash}
        write_json(config.run_folder / "aae" / "test.json", report)
        rt.print(f"autoencoder on {len(names)} test subjects: PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f}")


# ---- latents ------------------------------------------------------------------------------------------------------------


def latents_record(config: Config) -> Path:
    return Path(config.latent_Abeta) / "latents.json"


def encode(config: Config, rt: runtime.Runtime, split: str) -> None:
    """Write the latents of a split as NIfTI (affine with 4x voxels); with the training split also its mean and SD per channel.

    `latents.json` beside them names the autoencoder; latents of another one are refused. Existing files are kept.
    """
    names = dataset.read_list(config.list_path(split))
    _, pet = dataset.open_volumes(config)
    dataset.check_volumes(pet, names, rt, f"{split} PET")
    autoencoder, aae_hash = load_autoencoder(config, rt)
    folder, record_path = Path(config.latent_Abeta), latents_record(config)
    record = json.loads(record_path.read_text()) if record_path.is_file() else None
    fresh = record is None or record["aae"] != aae_hash
    if record is not None and fresh and not config.overwrite:
        raise UserError(f"{folder} holds latents of another autoencoder ({record['aae']}, this one is {aae_hash}); add --overwrite or name another --latent_Abeta")
    rt.barrier()
    if fresh and rt.is_main:
        for old in folder.glob("*.nii*") if record is not None else ():
            old.unlink()
        write_json(record_path, {"aae": aae_hash, "compression": COMPRESSION})
    rt.barrier()

    mine = rt.shard(names)
    sums = []  # per subject: voxels, sum and sum of squares per channel
    with progress(len(mine), 0, f"encode {split}", enabled=rt.is_main) as bar:
        for name in mine:
            path = latent_path(config, name)
            if not path.is_file():
                with torch.inference_mode(), rt.autocast():
                    z = autoencoder.encode(pet.tensor(name)[None].to(rt.device))[0]
                affine = nifti.strided_affine(nifti.header(pet.path(name))[1], COMPRESSION)
                save_latent(path, z.float().cpu(), affine)
            z = load_latent(path).double().flatten(1)
            sums.append((z.shape[1], z.sum(1).tolist(), z.square().sum(1).tolist()))
            bar.update()
    rows = [row for part in rt.gather(sums) for row in part]
    if split == "train" and rt.is_main:
        count = sum(n for n, _, _ in rows)
        mean = np.sum([s for _, s, _ in rows], axis=0) / count
        std = np.sqrt(np.maximum(np.sum([q for _, _, q in rows], axis=0) / count - mean**2, 0))
        record = {"aae": aae_hash, "compression": COMPRESSION, "mean": mean.tolist(), "std": std.tolist(), "n_subjects": len(rows), "n_voxels": count}
        write_json(record_path, record)
        rt.print(f"latents of {len(rows)} training subjects: mean {np.round(mean, 4).tolist()}, SD {np.round(std, 4).tolist()}")
    rt.barrier()


def latent_path(config: Config, name: str) -> Path:
    return Path(config.latent_Abeta) / f"{dataset.stem(name)}.nii.gz"


def save_latent(path: Path, z: torch.Tensor, affine: np.ndarray) -> None:
    """z (C, d, h, w) float32 as NIfTI; several channels become a series."""
    nifti.save(path, z.numpy() if len(z) > 1 else z[0].numpy(), affine)


def load_latent(path: Path) -> torch.Tensor:
    """(C, d, h, w) float32; inverse of `save_latent`."""
    data = torch.from_numpy(nifti.load(path, series=True).data)
    return data if data.ndim == 4 else data[None]
