"""Training of the DiT: `dit_loss` is the objective, `train` the loop around it (entry script: train.py)."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from common import checkpoint, figures, runtime, schedulers, training
from common.cli import UserError, frozen
from common.ema import EMA
from common.runlog import Means, RunLog, progress
from neuroldm3d.dataset import CLASSES
from neuroldm3d.diffusion import sampling
from neuroldm3d.diffusion.config import Config
from neuroldm3d.diffusion.model import SIZES, DiT3D, drop_labels
from neuroldm3d.preprocess import units
from neuroldm3d.VAE import latents
from neuroldm3d.VAE.trainer import window

SPLITS = ("train", "val")
VALIDATION_TIMES = 8  # timesteps of the held-out loss
PREVIEW_STEPS = 20  # of DPM-Solver++, for pictures


def architecture(config: Config, latent_shape: tuple[int, ...]) -> dict:
    """Constructor arguments of the network: the size's, unless an option says otherwise."""
    settings = dict(SIZES[config.model_type])
    for name in ("patch_size", "hidden_size", "depth", "num_heads"):
        settings[name] = getattr(config, name) or settings[name]
    own = ("mlp_ratio", "label_dropout", "window_size", "positions", "relative_positions", "mask_padding", "pad_input")
    settings |= {name: getattr(config, name) for name in own}
    settings |= {"in_channels": latent_shape[0], "in_size": tuple(latent_shape[1:]), "num_classes": len(CLASSES)}
    return settings | {"window_blocks": config.window_block_indexes}


def schedule_settings(config: Config) -> dict:
    return {"kind": config.schedule_type, "T": config.time_num, "beta_start": config.beta_start,
            "beta_end": config.beta_end, "prediction": config.model_mean_type}  # fmt: skip


def loss_weights(schedule: schedulers.Schedule, t: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR weights of steps t (B,): min(SNR, gamma) / SNR for eps, / (SNR + 1) for v (Hang et al. 2023, eq. 6)."""
    snr = schedulers.snr(schedule)
    weights = snr.clamp(max=gamma) / (snr + (schedule.prediction == "v"))
    return weights.float().to(t.device)[t]


def dit_loss(model, schedule, z_0, label, t, eps, kind: str = "mse", min_snr: float = 0.0) -> torch.Tensor:
    """Error of the predicted noise (or v) of each sample, (B,).

    z_0, eps (B, C, d, h, w); label, t (B,) integers; kind "mse" or "l1".
    """
    z_t = schedulers.q_sample(schedule, z_0, t, eps)
    error = model(z_t, t, label).float() - schedulers.training_target(schedule, z_0, t, eps)
    losses = (error.square() if kind == "mse" else error.abs()).flatten(1).mean(1)
    return losses * loss_weights(schedule, t, min_snr) if min_snr else losses


def draw(config: Config, step: int, latent_shape: tuple[int, ...], rt: runtime.Runtime):
    """This rank's timesteps (uniform on 0 .. T-1), noise, and uniform numbers for label dropout, of a step.

    Every rank draws the whole global batch from the step's own generator, so N ranks see what one would.
    """
    g = runtime.generator(config.seed, "dit", step)
    t = torch.randint(0, config.time_num, (config.bs,), generator=g)
    eps = torch.randn((config.bs, *latent_shape), generator=g)
    u = torch.rand(config.bs, generator=g)
    return (runtime.local_slice(x, rt).to(rt.device) for x in (t, eps, u))


def train(config: Config, rt: runtime.Runtime) -> None:
    """Train to RUN/epoch_best.pth (average and raw weights); resumes RUN/checkpoints/last.pt."""
    # ---- data
    training.check_options(config, rt, "bs")
    for split in SPLITS:
        record = latents.read_record(Path(config.dataroot), split)
    how = config.latent_mean if config.normalise_latents else "none"
    stats = latents.statistics(Path(config.dataroot), record, how)
    drawn = dict(seed=config.seed, sample=config.latent == "sample")
    data, held_out = (latents.LatentDataset(Path(config.dataroot), split, record, stats, **drawn) for split in SPLITS)
    vae = open_vae(config, record, rt)
    steps_per_epoch = math.ceil(len(data) / config.bs)
    total = config.steps or config.niter * steps_per_epoch
    last_step = min(total, config.max_steps or total)
    every = {name: getattr(config, name) * steps_per_epoch for name in ("val_every", "sample_every", "saveIter")}

    # ---- model
    torch.manual_seed(config.seed)
    settings = architecture(config, data.shape)
    dit = DiT3D(**settings, checkpointing=config.checkpointing).to(rt.device)
    if config.compile:
        dit.compile()
    schedule = sampling.noise_schedule(**schedule_settings(config))

    # ---- optimizer and EMA
    trained = [p for p in dit.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.lr, betas=(config.beta1, 0.999), weight_decay=config.decay,
                                 **runtime.fused_optimizer_kwargs(rt.device))  # fmt: skip
    ema = EMA(dit, config.ema_decay, config.ema_start)
    scaler, means = rt.grad_scaler(), Means()

    # ---- resume
    folder, best_path = config.run_folder, config.best_path
    last_path = folder / "checkpoints" / "last.pt"
    training.claim_run(best_path, last_path, config, rt, more="epoch_[0-9]*.pth")
    frozen_settings = frozen(config, {"data", "model", "diffusion", "training"})
    frozen_settings |= {"seed": config.seed, "precision": config.precision, "vae": record["vae"]}
    frozen_settings |= {"train_names": record["splits"]["train"]["names"], "train_labels": data.labels}
    objects = {"dit": dit, "ema": ema, "optimizer": optimizer, "scaler": scaler, "means": means}
    step, extra = checkpoint.resume_training(last_path, objects=objects, config=frozen_settings)
    best, stale = extra.get("best", math.inf), extra.get("stale", 0)
    if training.is_complete("DiT", step, last_step, stale, best_path, config, rt):
        return

    def save_last():
        means.share(rt)
        if rt.is_main:
            extra = {"best": best, "stale": stale}
            checkpoint.save_training(last_path, step=step, objects=objects, config=frozen_settings, extra=extra)

    def save_weights(path, scores):
        if rt.is_main:
            save_dit(path, dit, ema, settings, config, stats, record, step=step, scores=scores)

    # ---- loop
    model = runtime.wrap_ddp(dit, rt)
    batches = runtime.training_batches(data, config.bs, step, config.seed, rt, config.num_workers)
    options, scores = training.recorded(config), {}
    fingerprint = {"vae": record["vae"], "labels": record["splits"]["train"]["label_counts"], "n": len(data)}
    with (
        RunLog(folder, options, start_step=step, enabled=rt.is_main, data_fingerprint=fingerprint) as log,
        runtime.StopRequest() as stop,
        progress(last_step, step, "DiT", enabled=rt.is_main) as bar,
    ):
        if step == 0:
            save_last()  # claims the folder, and a disk that is too small shows now
        while step < last_step and not stop.agree(rt):
            lr = training.falling_cosine(step, config.lr, total) if config.lr_schedule == "cosine" else config.lr
            training.set_learning_rate(lr, optimizer)
            z_batch, label_batch = (x.to(rt.device, non_blocking=True) for x in next(batches))
            t_batch, eps_batch, u = draw(config, step, data.shape, rt)
            if config.label_dropout > 0:
                label_batch = drop_labels(label_batch, u, config.label_dropout, dit.null_label)
            optimizer.zero_grad(set_to_none=True)
            batch = (z_batch, label_batch, t_batch, eps_batch)
            for z_0, label, t, eps in runtime.micro_batches(config.accumulate, *batch):
                with rt.autocast():
                    loss = dit_loss(model, schedule, z_0, label, t, eps, config.loss_type, config.min_snr).mean()
                scaler.scale(loss / config.accumulate).backward()
                means.add({"loss": loss})
            runtime.update_weights(scaler, config.grad_clip, dit=(optimizer, dit))
            ema.update(dit)
            step += 1
            bar.update()

            if step % config.log_every == 0 or step % steps_per_epoch == 0 or step == total:
                values = training.mean_losses("DiT", means, step, rt)
                log.log("train", step, epoch=step / steps_per_epoch, lr=lr, **values)
                bar.set_postfix({name: f"{v:.4f}" for name, v in values.items()})
            if vae and rt.is_main and (step % every["sample_every"] == 0 or step == total):
                picture = folder / "samples" / "latest.png"
                log.image("samples", step, preview(picture, ema.module, vae, schedule, stats, config, rt))
            if step % every["val_every"] == 0 or step == total:
                scores = validate(ema.module, schedule, held_out, config, rt)
                log.log("val", step, epoch=step / steps_per_epoch, **scores)
                stale += 1
                if scores["loss"] < best or config.select == "last":
                    best, stale = scores["loss"], 0
                    save_weights(best_path, scores)
                save_last()
                if config.patience and stale >= config.patience:
                    rt.print(f"DiT: no improvement in {stale} validations, stopped at step {step}")
                    break
            elif config.save_every and step % config.save_every == 0:
                save_last()
            if every["saveIter"] and step % every["saveIter"] == 0:
                save_weights(folder / f"epoch_{step // steps_per_epoch}.pth", scores)
                prune(folder, config.keep, rt)

        # ---- finish
        save_last()
        if not best_path.exists():
            save_weights(best_path, {})  # cut short before its first validation: still a usable file
        rt.barrier()
    stop.leave("DiT", step, last_step, rt)


@torch.inference_mode()
def validate(model, schedule, held_out: latents.LatentDataset, config: Config, rt) -> dict[str, float]:
    """Held-out loss per class and over all, at VALIDATION_TIMES timesteps with the same latents and noise every time.

    Deviation (original code): it validates nothing and keeps the weights of the lowest training loss.
    """
    was_training = model.training
    model.eval()
    times = torch.linspace(0, schedule.T - 1, VALIDATION_TIMES).round().long().to(rt.device)
    found = []
    for index in rt.shard(validation_items(held_out.labels, config.val_per_class)):
        z_0, label = held_out[index, index]
        eps = torch.randn((VALIDATION_TIMES, *z_0.shape), generator=runtime.generator(config.seed, "validation", index))
        z_0 = z_0.to(rt.device).expand_as(eps)
        with rt.autocast():
            losses = dit_loss(model, schedule, z_0, torch.full_like(times, label), times, eps.to(rt.device))
        found.append((index, label, losses.mean().item()))
    model.train(was_training)
    rows = sorted(row for part in rt.gather(found) for row in part)
    by_class = {name: [loss for _, label, loss in rows if label == k] for k, name in enumerate(CLASSES)}
    scores = {f"loss_{name}": float(np.mean(losses)) for name, losses in by_class.items() if losses}
    return {"loss": float(np.mean([loss for *_, loss in rows]))} | scores


def validation_items(labels: list[int], per_class: int) -> list[int]:
    """The first `per_class` indices of each class (0: all) in order."""
    seen = Counter()
    chosen = []
    for index, label in enumerate(labels):
        seen[label] += 1
        if not per_class or seen[label] <= per_class:
            chosen.append(index)
    return chosen


def preview(path: Path, model, vae: latents.TrainedVAE, schedule, stats: dict, config: Config, rt) -> Path:
    """Montage of two samples of every class by a few steps of DPM-Solver++, always from the same noise."""
    was_training = model.training
    model.eval()
    dit = sampling.TrainedDiT(model, schedule, "small", stats, "", None, None)
    steps, pictures = min(PREVIEW_STEPS, schedule.T), []
    for label, name in enumerate(CLASSES):
        for number, x in sampling.synthesize(dit, vae, label, [0, 1], config.seed, rt, sampler="dpm", steps=steps):
            pictures.append((f"{name} {number}", np.flip(x.numpy(), 0)))  # figures are RAS+, volumes LAS+
    model.train(was_training)
    unit = f"{units(vae.preparation)} (normalised)"
    return figures.montage(path, pictures, window=window(vae.preparation), unit=unit)


def open_vae(config: Config, record: dict, rt: runtime.Runtime) -> latents.TrainedVAE | None:
    """The VAE that decodes the pictures; None if there are to be none. UserError if it did not make the latents."""
    if not config.sample_every:
        return None
    if not Path(config.vae).is_file():
        raise UserError(f"no VAE at {config.vae} to decode samples with; name it with --vae, or add --sample_every 0")
    vae = latents.load_vae(Path(config.vae), rt, trust_pickle=config.trust_pickle)
    latents.check_maker(record, vae)
    return vae


def save_dit(path: Path, dit: DiT3D, ema: EMA, settings: dict, config: Config, stats, record: dict, **more) -> None:
    """The averaged weights as `state_dict`, the raw ones beside them, and everything that sampling needs.

    Deviation (original code): which subjects, labels and VAE are behind the weights is part of the file.
    """
    diffusion = {"schedule": schedule_settings(config), "variance": sampling.VARIANCES[config.model_var_type]}
    shared = {key: record[key] for key in ("vae", "preparation", "affine")}
    about = {key: record["splits"]["train"][key] for key in ("label_counts", "csv_hash")}
    training.save_network(
        path, "neuroldm3d dit", ema.module.state_dict(), settings, raw_state_dict=runtime.unwrap(dit).state_dict(),
        diffusion=diffusion, latents=stats, **shared, **about, **more,
    )  # fmt: skip


def prune(folder: Path, keep: int, rt: runtime.Runtime) -> None:
    """Remove all but the newest `keep` epoch_<n>.pth; 0 keeps all."""
    files = sorted(folder.glob("epoch_[0-9]*.pth"), key=lambda path: int(path.stem.split("_")[1]))
    for path in files[:-keep] if keep and rt.is_main else ():
        path.unlink(missing_ok=True)


def dry_run(config: Config, rt: runtime.Runtime) -> None:
    """Print the resolved configuration, parameter count, shapes and an estimate of training memory; write nothing."""
    training.check_options(config, rt, "bs")
    dataroot = Path(config.dataroot)
    encoded = latents.record_path(dataroot).is_file()
    shape = latents.read_record(dataroot)["latent_shape"] if encoded else (4, 28, 34, 28)
    local = config.bs // rt.world_size // config.accumulate
    with torch.device("meta"):
        dit = DiT3D(**architecture(config, tuple(shape)), checkpointing=config.checkpointing)
        z, index = torch.zeros(local, *shape), torch.zeros(local, dtype=torch.long)
        with runtime.SavedBytes() as saved:
            dit(z, index, index)
    rt.print(json.dumps(training.recorded(config), indent=2))
    rt.print(f"latents {tuple(z.shape)} -> {math.prod(dit.grid)} tokens of width {dit.time2.out_features}")
    training.print_memory(dit, saved, ("weights", "gradients", "Adam", "Adam", "EMA"), rt)
