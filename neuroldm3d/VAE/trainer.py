"""Training of the KL autoencoder: `vae_loss` is the objective, `train` the loop around it (entry script: train.py)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from common import checkpoint, figures, runtime, training
from common.cli import UserError, frozen
from common.ema import EMA
from common.runlog import Means, RunLog, progress
from neuroldm3d import dataset
from neuroldm3d.preprocess import Preparation, units
from neuroldm3d.VAE import latents
from neuroldm3d.VAE.config import Config
from neuroldm3d.VAE.losses import LPIPS3D, kl_divergence, reconstruction_loss
from neuroldm3d.VAE.model import AutoencoderKL

ARCHITECTURE = ("channels", "num_res_blocks", "latent_channels", "norm_groups")  # what rebuilds the network of a file


class TrainingVolumes(Dataset):
    """Prepared volumes (1, D, H, W), mirrored at random; asked for by (index, position in the endless stream)."""

    def __init__(self, volumes: dataset.Volumes, rows: list[dataset.Row], config: Config):
        self.volumes, self.rows, self.flips, self.seed = volumes, rows, config.flips, config.seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[int, int]) -> torch.Tensor:
        index, position = item
        x = self.volumes.load(self.rows[index])
        if self.flips != "none":
            x = dataset.augment(x, np.random.default_rng((self.seed, position)), up_down=self.flips == "both")
        return torch.from_numpy(x)[None]


def build_vae(config: Config) -> AutoencoderKL:
    return AutoencoderKL(**{name: getattr(config, name) for name in ARCHITECTURE}, checkpointing=config.checkpointing)


def build_lpips(config: Config, rt: runtime.Runtime) -> nn.Module | None:
    """The perceptual term on its device; None at weight 0. UserError if its pretrained files are not given."""
    if not config.lambda_lpips:
        return None
    # Deviation (original code): LPIPS expects [-1, 1] and gets z-scored volumes; native volumes can be brought there.
    value_range = (0.0, 1 / config.norm_scale) if config.norm == "native" else None
    lpips = LPIPS3D(config.lpips_net, config.lpips_weights, slice_fraction=config.lpips_fraction,
                    value_range=value_range, checkpointing=config.checkpointing)  # fmt: skip
    return lpips.to(rt.device)


def vae_loss(x_hat, mu, logvar, x, config: Config, lpips=None, slices=None) -> dict[str, torch.Tensor]:
    """The objective `loss` and its terms, scalars.

    x_hat, x: (B, 1, D, H, W); mu, logvar: (B, C, d, h, w); slices: generator of the slices that LPIPS sees.
    """
    x_hat, mu, logvar = x_hat.float(), mu.float(), logvar.float()
    terms = {"recon": reconstruction_loss(x_hat, x, config.recon_loss), "kl": kl_divergence(mu, logvar)}
    loss = config.lambda_recon * terms["recon"] + config.lambda_kl * terms["kl"]
    if lpips is not None:
        terms["lpips"] = lpips(x_hat, x, slices).mean()
        loss = loss + config.lambda_lpips * terms["lpips"]
    return {"loss": loss} | terms


def draw_eps(config: Config, step: int, shape: tuple[int, ...], rt: runtime.Runtime) -> torch.Tensor:
    """This rank's share of a step's latent noise: every rank draws the global batch and keeps its slice."""
    g = runtime.generator(config.seed, "vae", step)
    return runtime.local_slice(torch.randn((config.batch_size, *shape), generator=g), rt).to(rt.device)


def learning_rate(config: Config, step: int, total: int, steps_per_epoch: int) -> float:
    if config.lr_schedule == "restarts":
        epoch = step // steps_per_epoch
        return training.restart_cosine(epoch, config.vae_lr, config.lr_t0, config.lr_t_mult, config.lr_min)
    return training.falling_cosine(step, config.vae_lr, total) if config.lr_schedule == "cosine" else config.vae_lr


def train(config: Config, rt: runtime.Runtime) -> None:
    """Train to RUN/best_vae.pth (lowest held-out loss); resumes RUN/checkpoints/last.pt."""
    # ---- data
    training.check_options(config, rt, "batch_size")
    prep = preparation(config)
    rows, held_out = (dataset.read_table(path, config.label_column) for path in (config.train_csv, config.val_csv))
    dataset.check_disjoint({config.train_csv: rows, config.val_csv: held_out})
    volumes = dataset.Volumes(prep, None if config.cache == "none" else config.cache)
    volumes.fill(rows + held_out, rt)
    steps_per_epoch = math.ceil(len(rows) / config.batch_size)
    total = config.steps or config.epochs * steps_per_epoch
    last_step = min(total, config.max_steps or total)
    every = {name: getattr(config, name) * steps_per_epoch for name in ("val_every", "sample_every")}

    # ---- model
    torch.manual_seed(config.seed)
    layout = runtime.memory_layout(config.channels_last)
    vae = build_vae(config)
    # Deviation (original code): training starts from scratch; there an unpublished checkpoint is needed.
    source = load_init(vae, config, prep, rt) if config.init else None
    vae.to(rt.device, memory_format=layout)
    if config.compile:
        vae.compile()
    lpips = build_lpips(config, rt)

    # ---- optimizer and EMA
    fused = runtime.fused_optimizer_kwargs(rt.device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=config.vae_lr, weight_decay=config.weight_decay, **fused)
    ema = EMA(vae, config.ema_decay, start_step=steps_per_epoch) if config.ema_decay else None
    scaler, means = rt.grad_scaler(), Means()

    # ---- resume
    folder, best_path = Path(config.run), config.best_path
    last_path = folder / "checkpoints" / "last.pt"
    training.claim_run(best_path, last_path, config, rt)
    data = {"train_csv": checkpoint.file_hash(config.train_csv), "train_names": [row.name for row in rows]}
    settings = frozen(config, {"data", "model", "loss", "training"}) | data
    settings |= {"seed": config.seed, "precision": config.precision, "init": source}
    objects = {"vae": vae, "optimizer": optimizer, "scaler": scaler, "means": means} | ({"ema": ema} if ema else {})
    step, extra = checkpoint.resume_training(last_path, objects=objects, config=settings)
    best, stale = extra.get("best", math.inf), extra.get("stale", 0)
    if training.is_complete("VAE", step, last_step, stale, best_path, config, rt):
        return
    kept = ema.module if ema else vae  # what is validated and written

    def save_last():
        means.share(rt)
        if rt.is_main:
            extra = {"best": best, "stale": stale}
            checkpoint.save_training(last_path, step=step, objects=objects, config=settings, extra=extra)

    def save_best(scores):
        if rt.is_main:
            save_vae(best_path, kept, config, prep, step=step, scores=scores, train_csv=data["train_csv"], init=source,
                     label_counts=latents.label_counts([row.label for row in rows]))  # fmt: skip

    # ---- loop
    model = runtime.wrap_ddp(vae, rt)
    stream = TrainingVolumes(volumes, rows, config)
    batches = runtime.training_batches(stream, config.batch_size, step, config.seed, rt, config.num_workers)
    latent_shape = (config.latent_channels, *(n // vae.compression for n in prep.shape))
    options = training.recorded(config)
    fingerprint = {"train": data["train_csv"], "validation": checkpoint.file_hash(config.val_csv), "n": len(rows)}
    with (
        RunLog(folder, options, start_step=step, enabled=rt.is_main, data_fingerprint=fingerprint) as log,
        runtime.StopRequest() as stop,
        progress(last_step, step, "VAE", enabled=rt.is_main) as bar,
    ):
        if step == 0:
            save_last()  # claims the folder, and a disk that is too small shows now
        while step < last_step and not stop.agree(rt):
            lr = training.set_learning_rate(learning_rate(config, step, total, steps_per_epoch), optimizer)
            x_batch = next(batches).to(rt.device, memory_format=layout, non_blocking=True)
            eps_batch = draw_eps(config, step, latent_shape, rt)
            slices = runtime.generator(config.seed, "lpips", step)
            optimizer.zero_grad(set_to_none=True)
            for x, eps in runtime.micro_batches(config.accumulate, x_batch, eps_batch):
                with rt.autocast():
                    x_hat, mu, logvar = model(x, eps)
                losses = vae_loss(x_hat, mu, logvar, x, config, lpips, slices)
                scaler.scale(losses["loss"] / config.accumulate).backward()
                means.add(losses)
            runtime.update_weights(scaler, config.grad_clip, vae=(optimizer, vae))
            if ema:
                ema.update(vae)
            step += 1
            bar.update()

            if step % config.log_every == 0 or step % steps_per_epoch == 0 or step == total:
                values = training.mean_losses("VAE", means, step, rt)
                log.log("train", step, epoch=step / steps_per_epoch, lr=lr, **values)
                bar.set_postfix({name: f"{v:.4g}" for name, v in values.items()})
            if rt.is_main and config.sample_every and (step % every["sample_every"] == 0 or step == total):
                picture = folder / "samples" / "latest.png"
                log.image("reconstruction", step, draw(picture, kept, volumes, held_out, prep, rt))
            if step % every["val_every"] == 0 or step == total:
                scores = validate(kept, volumes, held_out, config, lpips, rt)
                log.log("val", step, epoch=step / steps_per_epoch, **scores)
                stale += 1
                if scores["loss"] < best:
                    best, stale = scores["loss"], 0
                    save_best(scores)
                save_last()
                if config.patience and stale >= config.patience:
                    rt.print(f"VAE: no improvement in {stale} validations, stopped at step {step}")
                    break
            elif config.save_every and step % config.save_every == 0:
                save_last()

        # ---- finish
        save_last()
        if not best_path.exists():
            save_best({})  # cut short before its first validation: still a usable file
        rt.barrier()
    stop.leave("VAE", step, last_step, rt)


@torch.inference_mode()
def validate(vae, volumes: dataset.Volumes, rows: list[dataset.Row], config: Config, lpips, rt) -> dict[str, float]:
    """Means over all held-out volumes: the objective with fixed noise, and the errors of decoded mean latents.

    Deviation (original code): there every validation draws other noise, and the last batch counts too much.
    """
    was_training = vae.training
    vae.eval()
    scores = []
    for row in rt.shard(rows):
        x = volumes.tensor(row)[None].to(rt.device)
        with rt.autocast():
            mu, logvar = vae.encode(x)
            eps = torch.randn(mu.shape, generator=runtime.generator(config.seed, "validation", row.name)).to(mu)
            x_hat, x_mean = vae.decode(vae.sample(mu, logvar, eps)), vae.decode(mu).float()
        slices = runtime.generator(config.seed, "validation slices", row.name)
        terms = vae_loss(x_hat, mu, logvar, x, config, lpips, slices)
        terms |= {"l1_mean": reconstruction_loss(x_mean, x, "l1"), "mse_mean": reconstruction_loss(x_mean, x, "mse"),
                  "posterior_std": (0.5 * logvar.float()).exp().mean()}  # fmt: skip
        scores.append((row.name, {name: value.item() for name, value in terms.items()}))
    vae.train(was_training)
    ordered = [terms for _, terms in sorted((s for part in rt.gather(scores) for s in part), key=lambda s: s[0])]
    return {name: float(np.mean([terms[name] for terms in ordered])) for name in ordered[0]}


def draw(path: Path, vae, volumes: dataset.Volumes, rows: list[dataset.Row], prep: Preparation, rt) -> Path:
    """Montage of the first held-out volume of each class and its reconstruction from the mean latent."""
    was_training = vae.training
    vae.eval()
    pictures = []
    for label, name in enumerate(dataset.CLASSES):
        row = next((row for row in rows if row.label == label), None)
        if row is not None:
            x = volumes.tensor(row)[None]
            x_hat = latents.decode(vae, latents.encode(vae, x, rt)[0], rt)[0]
            pictures += [(name, x[0, 0]), (f"{name} decoded", x_hat)]
    vae.train(was_training)
    # figures are drawn in RAS+ order, volumes are LAS+
    return figures.montage(path, [(name, np.flip(x.numpy(), 0)) for name, x in pictures],
                           window=window(prep), unit=f"{units(prep)} (normalised)")  # fmt: skip


def window(prep: Preparation) -> tuple[float, float] | None:
    """Grey-level window of normalised volumes: grey-matter fraction 0 to 1; None (automatic) for z-scores."""
    return (0.0, 1 / prep.norm_scale) if prep.norm == "native" else None


def preparation(config: Config) -> Preparation:
    return Preparation(config.shape, config.crop_start, config.norm, config.norm_scale)


def load_init(vae: AutoencoderKL, config: Config, prep: Preparation, rt: runtime.Runtime) -> str:
    """Fill `vae` from --init and return the hash of its weights; UserError if it does not fit the options."""
    if Path(config.init).resolve() == config.best_path.resolve():
        raise UserError(f"--init {config.init} is the file that this run writes: copy it or name another --run")
    trained = latents.load_vae(Path(config.init), rt, trust_pickle=config.trust_pickle, option="--init")
    checkpoint.load_weights(vae, trained.model.state_dict(), config.init)
    if trained.preparation != prep:
        rt.print(f"note: {config.init} was trained on {trained.preparation}, this run uses {prep}")
    return trained.hash


def save_vae(path: Path, vae: AutoencoderKL, config: Config, prep: Preparation, **more) -> None:
    settings = {name: getattr(config, name) for name in ARCHITECTURE}
    training.save_network(path, "neuroldm3d vae", vae.state_dict(), settings, preparation=prep.to_dict(), **more)


def dry_run(config: Config, rt: runtime.Runtime) -> None:
    """Print the resolved configuration, parameter count, shapes and an estimate of training memory; write nothing."""
    training.check_options(config, rt, "batch_size")
    local = config.batch_size // rt.world_size // config.accumulate
    with torch.device("meta"):
        vae = build_vae(config)
        x = torch.zeros(local, 1, *config.shape)
        eps = torch.zeros(local, config.latent_channels, *(n // vae.compression for n in config.shape))
        with runtime.SavedBytes() as saved:
            x_hat, mu, _ = vae(x, eps)
    rt.print(json.dumps(training.recorded(config), indent=2))
    rt.print(f"volumes {tuple(x.shape)} -> latents {tuple(mu.shape)} -> {tuple(x_hat.shape)}")
    copies = ("weights", "gradients", "Adam", "Adam") + (("EMA",) if config.ema_decay else ())
    training.print_memory(vae, saved, copies, rt)
    if config.lambda_lpips:
        rt.print("the perceptual term comes on top: give --lpips_fraction or --checkpointing where memory is short")
