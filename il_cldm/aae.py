"""Stage 1 of IL-CLDM: a 3D autoencoder with an adversary on its reconstructions compresses PET by 4 per axis.

Ou et al., IEEE JBHI 29(2):1221-1231, 2025. `aae_step` is the training step; `train_aae` the loop around it.
The "AAE" has no prior on its latent: the adversary judges reconstructed images.
"""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from common import checkpoint, figures, metrics, nifti, runtime, training
from common.cli import UserError, frozen, to_dict
from common.runlog import Means, RunLog, progress, write_json
from il_cldm import dataset, upstream
from il_cldm.config import Config
from il_cldm.losses import generator_adversarial_loss, hinge_discriminator_loss, kl_loss, reconstruction_loss
from il_cldm.model import build_autoencoder, build_discriminator

COMPRESSION = 4
ARCHITECTURE = ("latent_dim", "aae_channels", "aae_groups", "kl_weight")  # what rebuilds the network of a checkpoint
INTERVALS = ("aae_val_every", "ldm_val_every")
LOG_COLUMNS = dict.fromkeys(("loss_rec", "loss_adv", "loss_disc"))  # in this order; None before --disc_start


def aae_step(
    autoencoder, real_and_fake, x, config, *, adversarial=True, scale=1.0, noise=None, autocast=nullcontext
) -> dict[str, torch.Tensor]:
    """Accumulate one step's gradients in both networks; returns detached losses. x: PET (B, 1, D, H, W) in [0, 1].

    Autoencoder: Lambda·mean|x - x_hat| - mean D(x_hat) (+ KL). Discriminator: hinge. `scale` multiplies every gradient
    (loss scaling, micro-batches). `noise` (B, latent_dim, ...) samples the latent where there is a KL term.
    """
    with autocast():
        x_hat, mean, logvar = autoencoder(x, noise)
    x_hat = x_hat.float()
    loss_rec = reconstruction_loss(x_hat, x)
    loss, losses = config.Lambda * loss_rec, {"loss_rec": loss_rec}
    if logvar is not None:
        losses["loss_kl"] = kl_loss(mean.float(), logvar.float())
        loss = loss + config.kl_weight * losses["loss_kl"]
    if adversarial:
        # Deviation (original code): x_hat is cut from the graph here, so the discriminator's loss cannot reach the
        # autoencoder; there it leaked in and halved the adversarial gradient. The generator's part is `grad_adv`.
        x_fake = x_hat.detach().requires_grad_()
        with autocast():
            logits_real, logits_fake = real_and_fake(x, x_fake)
        loss_adv = generator_adversarial_loss(logits_fake.float())
        loss_disc = hinge_discriminator_loss(logits_real.float(), logits_fake.float())
        (grad_adv,) = torch.autograd.grad(scale * loss_adv, x_fake, retain_graph=True)
        torch.autograd.backward([scale * loss, x_hat], [None, grad_adv])
        (scale * loss_disc).backward()
        losses |= {"loss_adv": loss_adv, "loss_disc": loss_disc}
    else:
        (scale * loss).backward()
    return {name: value.detach() for name, value in losses.items()}


def train_aae(config: Config, rt: runtime.Runtime) -> None:
    """Train stage 1 to RESULT/EXP/AAE.pth.tar (best on validation); resumes RESULT/EXP/aae/checkpoints/last.pt."""
    # ---- data
    training.check_options(config, rt, intervals=INTERVALS)
    lists = dataset.check_splits(config)
    _, pet = dataset.open_volumes(config)
    train, validation = lists["train"], lists["validation"]
    shape = dataset.check_volumes(pet, train + validation, rt, "PET")
    smallest = 2 ** (len(config.disc_channels) + 1)
    if min(shape) < smallest:
        levels = len(config.disc_channels)
        raise UserError(f"PET of shape {shape} is too small for {levels} discriminator levels: axes need {smallest} "
                        "voxels; give fewer --disc_channels")  # fmt: skip
    steps_per_epoch = math.ceil(len(train) / config.batch_size)
    total = config.aae_steps or config.epochs * steps_per_epoch
    last_step = min(total, config.max_steps or total)
    validate_every = config.aae_val_every * steps_per_epoch

    # ---- model
    torch.manual_seed(config.seed)
    layout = runtime.memory_layout(config.aae_channels_last)
    autoencoder = build_autoencoder(config).to(rt.device, memory_format=layout)
    discriminator = build_discriminator(config).to(rt.device, memory_format=layout)
    if config.compile:
        autoencoder.compile()

    # ---- optimizer
    adam = dict(lr=config.learning_rate, betas=(0.5, 0.999), **runtime.fused_optimizer_kwargs(rt.device))
    optimizer = torch.optim.Adam(autoencoder.parameters(), **adam)
    optimizer_disc = torch.optim.Adam(discriminator.parameters(), **adam)
    scaler, means = rt.grad_scaler(), Means()

    # ---- resume
    folder, best_path = config.run_folder / "aae", config.run_folder / "AAE.pth.tar"
    last_path = folder / "checkpoints" / "last.pt"
    training.claim_run(best_path, last_path, config, rt)
    settings = frozen_settings(config, "stage 1", train)
    objects = {"autoencoder": autoencoder, "discriminator": discriminator, "optimizer": optimizer,
               "optimizer_disc": optimizer_disc, "scaler": scaler, "means": means}  # fmt: skip
    step, extra = checkpoint.resume_training(last_path, objects=objects, config=settings)
    best, stale = extra.get("best", -math.inf), extra.get("stale", 0)
    if training.is_complete("stage 1", step, last_step, stale, best_path, config, rt):
        return

    def save_last():
        means.share(rt)
        if rt.is_main:
            extra = {"best": best, "stale": stale}
            checkpoint.save_training(last_path, step=step, objects=objects, config=settings, extra=extra)

    def save_best(scores):
        if rt.is_main:
            save_autoencoder(best_path, autoencoder, config, step, scores, shape)

    # ---- loop
    model, pair = runtime.wrap_ddp(autoencoder, rt), runtime.wrap_ddp(training.RealAndFake(discriminator), rt)
    volumes = dataset.PetDataset(pet, train, config)
    batches = runtime.training_batches(volumes, config.batch_size, step, config.seed, rt, config.num_workers)
    fingerprint = {"train": train, "validation": validation, "shape": list(shape)}
    with (
        RunLog(folder, to_dict(config), start_step=step, enabled=rt.is_main, data_fingerprint=fingerprint) as log,
        runtime.StopRequest() as stop,
        progress(last_step, step, "stage 1: autoencoder", enabled=rt.is_main) as bar,
    ):
        if step == 0:
            save_last()  # claims the folder, and a disk that is too small shows now
        while step < last_step and not stop.agree(rt):
            lr = training.set_learning_rate(learning_rate(config, step, total), optimizer, optimizer_disc)
            x_batch = next(batches).to(rt.device, memory_format=layout, non_blocking=True)
            noise_batch = latent_noise(config, step, shape, rt)
            optimizer.zero_grad(set_to_none=True)
            optimizer_disc.zero_grad(set_to_none=True)
            for x, noise in runtime.micro_batches(config.accumulate, x_batch, noise_batch):
                losses = aae_step(model, pair, x, config, adversarial=step >= config.disc_start, noise=noise,
                                  scale=scaler.get_scale() / config.accumulate, autocast=rt.autocast)  # fmt: skip
                means.add(losses)
            pairs = {"autoencoder": (optimizer, autoencoder), "discriminator": (optimizer_disc, discriminator)}
            runtime.update_weights(scaler, config.clip_grad, **pairs)
            step += 1
            bar.update()

            if step % config.log_every == 0 or step % steps_per_epoch == 0 or step == total:
                values = LOG_COLUMNS | training.mean_losses("stage 1", means, step, rt)
                log.log("train", step, epoch=step / steps_per_epoch, lr=lr, **values)
                bar.set_postfix({name: f"{v:.4f}" for name, v in values.items() if v is not None})
            if step % validate_every == 0 or step == total:
                scores = validate(autoencoder, pet, validation, rt)
                log.log("val", step, epoch=step / steps_per_epoch, **scores)
                if rt.is_main:
                    picture = folder / "samples" / "latest.png"
                    log.image("reconstruction", step, draw_reconstruction(picture, autoencoder, pet, validation[0], rt))
                stale += 1
                if scores["score"] > best:
                    best, stale = scores["score"], 0
                    save_best(scores)
                save_last()
                if config.patience and stale >= config.patience:
                    rt.print(f"stage 1: no improvement in {stale} validations, stopped at step {step}")
                    break
            elif config.save_every and step % config.save_every == 0:
                save_last()

        # ---- finish
        save_last()
        if not best_path.exists():
            save_best({})  # cut short before its first validation: still a usable file
        rt.barrier()
    stop.leave("stage 1", step, last_step, rt)


# ---- what both stages share -----------------------------------------------------------------------------------------


def frozen_settings(config: Config, stage: str, names: list[str]) -> dict:
    """What may not change when `stage` is resumed: its options, seed, precision, and the training list."""
    fixed = {"seed": config.seed, "precision": config.precision, "train_list": sorted(names)}
    return frozen(config, {"training", stage}) | fixed


def learning_rate(config: Config, step: int, total: int) -> float:
    """Learning rate of a step: constant, or half a cosine down to zero at `total`."""
    if config.lr_schedule == "cosine":
        return training.falling_cosine(step, config.learning_rate, total)
    return config.learning_rate


def latent_noise(config: Config, step: int, shape: tuple[int, ...], rt: runtime.Runtime) -> torch.Tensor | None:
    """Noise of the stochastic latent (None without one): every rank draws the global batch and keeps its slice."""
    if not config.kl_weight:
        return None
    size = (config.batch_size, config.latent_dim, *(s // COMPRESSION for s in shape))
    noise = torch.randn(size, generator=runtime.generator(config.seed, "aae noise", step))
    return runtime.local_slice(noise, rt).to(rt.device)


# ---- using the autoencoder ------------------------------------------------------------------------------------------


def save_autoencoder(path: Path, autoencoder, config: Config, step: int, scores: dict, shape) -> None:
    settings = {name: getattr(config, name) for name in ARCHITECTURE}
    about = {"step": step, "scores": scores, "shape": list(shape)}
    training.save_network(path, "il_cldm autoencoder", autoencoder.state_dict(), settings, **about)


def load_autoencoder(config: Config, rt: runtime.Runtime):
    """Frozen autoencoder in eval mode and the hash of its weights; reads our files and the original's AAE.pth.tar."""
    path = config.aae_path
    option, command = "--checkpoint_aae", "main.py --train_aae"
    saved = training.read_network(path, "il_cldm autoencoder", command, option, config.trust_pickle)
    if saved.get("network") == "il_cldm autoencoder":
        autoencoder = build_autoencoder(Config(**saved["config"]))
        checkpoint.load_weights(autoencoder, saved["state_dict"], path)
    else:
        kind, autoencoder = upstream.from_checkpoint(saved, path)
        if kind != "AAE":
            raise UserError(f"{path} holds a {kind}, not an autoencoder; give --checkpoint_aae the AAE.pth.tar file")
    autoencoder = runtime.frozen_network(autoencoder, rt, config.aae_channels_last)
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
    return figures.montage(
        path, [("PET", x[0].numpy()), ("reconstruction", x_hat)], window=(0.0, 1.0), difference_to="PET"
    )


def test_aae(config: Config, rt: runtime.Runtime) -> None:
    """Print and store the autoencoder's PSNR and SSIM over every subject of the test list."""
    names = dataset.read_list(config.list_path("test"))
    _, pet = dataset.open_volumes(config)
    dataset.check_volumes(pet, names, rt, "test PET")
    autoencoder, aae_hash = load_autoencoder(config, rt)
    scores = validate(autoencoder, pet, names, rt)
    if rt.is_main:
        ssim = "3D gaussian, sigma 1.5, valid border, data_range 1"
        report = {"n": len(names), **scores, "ssim_definition": ssim, "aae": aae_hash}
        write_json(config.run_folder / "aae" / "test.json", report)
        rt.print(f"autoencoder on {len(names)} test subjects: PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f}")


# ---- latents --------------------------------------------------------------------------------------------------------


def latents_record(config: Config) -> Path:
    return Path(config.latent_Abeta) / "latents.json"


def encode(config: Config, rt: runtime.Runtime, split: str) -> None:
    """Write a split's latents as NIfTI (affine with 4x voxels); the training split's mean and SD go to latents.json.

    latents.json names the autoencoder and the files; finished files of the same autoencoder are kept.
    """
    names = dataset.read_list(config.list_path(split))
    _, pet = dataset.open_volumes(config)
    dataset.check_volumes(pet, names, rt, f"{split} PET")
    autoencoder, aae_hash = load_autoencoder(config, rt)
    record = claim_latents(config, names, aae_hash, rt)

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
            z = load_latent(path).double().flatten(1)  # (C, voxels)
            sums.append((z.shape[1], z.sum(1).numpy(), z.square().sum(1).numpy()))
            bar.update()
    rows = [row for part in rt.gather(sums) for row in part]
    if split == "train" and rt.is_main:
        n_voxels = sum(n for n, _, _ in rows)
        mean = sum(s for _, s, _ in rows) / n_voxels
        std = np.sqrt(np.maximum(sum(q for _, _, q in rows) / n_voxels - mean**2, 0))
        statistics = {"mean": mean.tolist(), "std": std.tolist(), "n_subjects": len(rows), "n_voxels": n_voxels}
        write_json(latents_record(config), record | statistics | {"train_list": sorted(map(dataset.stem, names))})
        rt.print(f"latents of {len(rows)} training subjects: mean {mean.round(4).tolist()}, SD {std.round(4).tolist()}")
    rt.barrier()


def claim_latents(config: Config, names: list[str], aae_hash: str, rt: runtime.Runtime) -> dict:
    """latents.json with these files entered; UserError if the folder is another autoencoder's or a file is not ours.

    With --overwrite the files that another autoencoder's record lists are removed first, and nothing else.
    """
    path = latents_record(config)
    record = json.loads(path.read_text()) if path.is_file() else {"aae": aae_hash}
    fresh, listed = record["aae"] != aae_hash, record.get("files", [])
    if fresh and not config.overwrite:
        raise UserError(f"{path.parent} holds latents of another autoencoder ({record['aae']}, not {aae_hash}): "
                        "add --overwrite or name another --latent_Abeta")  # fmt: skip
    files = [latent_path(config, name).name for name in names]
    for file in files:
        if file not in listed and (path.parent / file).exists():
            raise UserError(f"{path.parent / file} was not written by --enc; name another --latent_Abeta")
    rt.barrier()  # every rank has judged the folder before rank 0 changes it
    if fresh and rt.is_main:
        for file in listed:
            (path.parent / file).unlink(missing_ok=True)
    if fresh:
        record, listed = {"aae": aae_hash}, []
    record |= {"compression": COMPRESSION, "files": sorted({*listed, *files})}
    if rt.is_main:
        write_json(path, record)
    rt.barrier()
    return record


def latent_path(config: Config, name: str) -> Path:
    return Path(config.latent_Abeta) / f"{dataset.stem(name)}.nii.gz"


def save_latent(path: Path, z: torch.Tensor, affine: np.ndarray) -> None:
    """z (C, d, h, w) float32 as NIfTI; several channels become a series."""
    nifti.save(path, z.numpy() if len(z) > 1 else z[0].numpy(), affine)


def load_latent(path: Path) -> torch.Tensor:
    """(C, d, h, w) float32; inverse of `save_latent`."""
    data = torch.from_numpy(nifti.load(path, series=True).data)
    return data if data.ndim == 4 else data[None]
