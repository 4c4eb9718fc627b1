"""Stage 1 of LDAE: a KL autoencoder compresses T1 volumes by 8 per axis, 171 voxels to one number.

Lozupone et al., arXiv 2504.08635, section 3; sizes after Pinaya et al., arXiv 2209.07162. `aekl_step` is the training
step; `train` the loop around it (entry script: run_cli.py).
"""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from common import checkpoint, figures, metrics, nifti, runtime, training
from common.cli import UserError, frozen
from common.ema import EMA
from common.runlog import Means, RunLog, progress, write_json
from ldae import data_split, dataset, latents, preprocess
from ldae.autoencoder import AutoencoderKL, PatchDiscriminator
from ldae.config import AEKLConfig
from ldae.losses import SliceLPIPS, discriminator_loss, generator_loss, kl_divergence, reconstruction_loss
from ldae.preprocess import Preparation

ARCHITECTURE = ("channels", "latent_channels", "num_res_blocks", "norm_groups")  # what rebuilds the network of a file
LOG_COLUMNS = ("loss", "l1", "kl", "perceptual", "adversarial", "discriminator", "grad_norm", "grad_norm_d")
SSIM = "3D Gaussian, sigma 1.5, 11 voxels, valid border, data range 1"
PREPARATION = ("shape", "spacing_mm", "intensity", "crop", "mask", "order")  # options that make a Preparation


def aekl_step(
    model, real_and_fake, x, eps, config, *, lpips=None, slices=None, scale=1.0, autocast=nullcontext
) -> dict[str, torch.Tensor]:
    """Accumulate one step's gradients in both networks; returns detached losses.

    x: prepared volumes (B, 1, D, H, W); eps: latent noise (B, C, d, h, w). Autoencoder: mean|x - x_hat| + kl_weight KL
    + perceptual_weight LPIPS + adv_weight mean (D(x_hat) - 1)². Discriminator: adv_weight/2 [mean D(x_hat)² +
    mean (D(x) - 1)²]. `real_and_fake` None: no adversarial terms. `slices`: generator of the slices that LPIPS sees.
    `scale` multiplies every gradient (loss scaling, micro-batches).
    """
    with autocast():
        x_hat, mu, logvar = model(x, eps)
    x_hat = x_hat.float()
    losses = autoencoder_losses(x_hat, mu, logvar, x, config, lpips, slices)
    if real_and_fake is None:
        (scale * losses["loss"]).backward()
    else:
        # Deviation (original code): the generator's term reaches the autoencoder as a gradient of x_hat, and nothing of
        # it stays in the discriminator; there it stays, and the discriminator's optimizer takes it along.
        x_fake = x_hat.detach().requires_grad_()
        with autocast():
            logits_real, logits_fake = (logits.float() for logits in real_and_fake(x, x_fake))
        loss_adv = generator_loss(logits_fake)
        loss_disc = config.adv_weight * discriminator_loss(logits_fake, logits_real)
        (grad_adv,) = torch.autograd.grad(scale * config.adv_weight * loss_adv, x_fake, retain_graph=True)
        torch.autograd.backward([scale * losses["loss"], x_hat], [None, grad_adv])
        (scale * loss_disc).backward()
        losses["loss"] = losses["loss"] + config.adv_weight * loss_adv
        losses |= {"adversarial": loss_adv, "discriminator": loss_disc}
    return {name: value.detach() for name, value in losses.items()}


def autoencoder_losses(x_hat, mu, logvar, x, config, lpips=None, slices=None) -> dict[str, torch.Tensor]:
    """`loss` without its adversarial term, and its parts; scalars."""
    mu, logvar = mu.float(), logvar.float()
    losses = {"l1": reconstruction_loss(x_hat, x), "kl": kl_divergence(mu, logvar)}
    loss = losses["l1"] + config.kl_weight * losses["kl"]
    if lpips is not None:
        losses["perceptual"] = lpips(x_hat, x, slices)
        loss = loss + config.perceptual_weight * losses["perceptual"]
    return {"loss": loss} | losses


class TrainingVolumes(Dataset):
    """Prepared volumes (1, D, H, W); asked for by (index, position in the endless stream)."""

    def __init__(self, volumes: dataset.Volumes, rows: list[dataset.Row]):
        self.volumes, self.rows = volumes, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[int, int]) -> torch.Tensor:
        return self.volumes.tensor(self.rows[item[0]])


def train(config: AEKLConfig, rt: runtime.Runtime) -> None:
    """Train to RUN/checkpoints/best.ckpt (lowest held-out val_loss); resumes RUN/checkpoints/last.ckpt."""
    # ---- data
    training.check_options(config, rt)
    check_sizes(config)
    prep = preparation(config)
    split, (rows, held_out) = open_split(config, rt, "train", "val")
    volumes = dataset.Volumes(prep, config.cache_folder)
    fill_cache(volumes, rows + held_out, rt)
    steps_per_epoch = math.ceil(len(rows) / config.batch_size)
    total = config.steps or config.epochs * steps_per_epoch
    last_step = min(total, config.max_steps or total)
    every = {name: getattr(config, name) * steps_per_epoch for name in ("val_every", "sample_every")}

    # ---- model
    torch.manual_seed(config.seed)
    layout = runtime.memory_layout(config.channels_last)
    aekl, discriminator = build_aekl(config), build_discriminator(config)
    source = load_init(aekl, config, prep, rt) if config.init else None
    aekl.to(rt.device, memory_format=layout)
    if discriminator:
        discriminator.to(rt.device, memory_format=layout)
    if config.compile:
        aekl.compile()
    lpips = build_lpips(config, rt)

    # ---- optimizer and EMA
    # Deviation (paper's configuration): the weight decay that its constructors mention is never used; nor is it here.
    fused = runtime.fused_optimizer_kwargs(rt.device)
    optimizer = torch.optim.Adam(aekl.parameters(), lr=config.lr, **fused)
    pairs = {"grad_norm": (optimizer, aekl)}
    if discriminator:
        optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=config.lr_d, **fused)
        pairs["grad_norm_d"] = (optimizer_d, discriminator)
    ema = EMA(aekl, config.ema_decay, start_step=steps_per_epoch) if config.ema_decay else None
    scaler, means = rt.grad_scaler(), Means()

    # ---- resume
    folder, best_path, last_path = Path(config.run), config.best_path, config.last_path
    training.claim_run(best_path, last_path, config, rt)
    settings = frozen(config, {"data", "model", "loss", "training"})
    settings |= {"seed": config.seed, "precision": config.precision, "init": source}
    settings |= {"split": split.hash, "scans": [row.scan for row in rows]}
    objects = {"aekl": aekl, "optimizer": optimizer, "scaler": scaler, "means": means}
    objects |= {"discriminator": discriminator, "optimizer_d": optimizer_d} if discriminator else {}
    objects |= {"ema": ema} if ema else {}
    step, extra = checkpoint.resume_training(last_path, objects=objects, config=settings)
    best, stale = extra.get("best", math.inf), extra.get("stale", 0)
    if training.is_complete("aekl", step, last_step, stale, best_path, config, rt):
        return
    kept = ema.module if ema else aekl  # what is validated and written

    def save_last():
        means.share(rt)
        if rt.is_main:
            extra = {"best": best, "stale": stale}
            checkpoint.save_training(last_path, step=step, objects=objects, config=settings, extra=extra)

    def save_best(scores):
        if rt.is_main:
            save_aekl(best_path, kept, config, prep, split=split.hash, step=step, scores=scores, init=source)

    # ---- loop
    model = runtime.wrap_ddp(aekl, rt)
    pair = runtime.wrap_ddp(training.RealAndFake(discriminator), rt) if discriminator else None
    stream = TrainingVolumes(volumes, rows)
    batches = runtime.training_batches(stream, config.batch_size, step, config.seed, rt, config.num_workers)
    latent_shape = (config.latent_channels, *(n // aekl.compression for n in prep.shape))
    fingerprint = {"split": split.hash, "train": len(rows), "val": len(held_out)}
    options = training.recorded(config)
    with (
        RunLog(folder, options, start_step=step, enabled=rt.is_main, data_fingerprint=fingerprint) as log,
        runtime.StopRequest() as stop,
        progress(last_step, step, "stage 1: autoencoder", enabled=rt.is_main) as bar,
    ):
        if step == 0:
            save_last()  # claims the folder, and a disk that is too small shows now
        while step < last_step and not stop.agree(rt):
            factor = training.learning_rate_factor(config, step, total)
            training.set_learning_rate(config.lr * factor, optimizer)
            if discriminator:
                training.set_learning_rate(config.lr_d * factor, optimizer_d)
            x_batch = next(batches).to(rt.device, memory_format=layout, non_blocking=True)
            eps_batch = draw_eps(config, step, latent_shape, rt)
            slices = runtime.generator(config.seed, "lpips", step)
            for own, _ in pairs.values():
                own.zero_grad(set_to_none=True)
            for x, eps in runtime.micro_batches(config.accumulate, x_batch, eps_batch):
                losses = aekl_step(model, pair if step >= config.adv_start else None, x, eps, config,
                                   lpips=lpips, slices=slices, scale=scaler.get_scale() / config.accumulate,
                                   autocast=rt.autocast)  # fmt: skip
                means.add(losses)
            norms = runtime.update_weights(scaler, config.grad_clip, **pairs)
            if ema:
                ema.update(aekl)
            step += 1
            bar.update()

            if step % config.log_every == 0 or step % steps_per_epoch == 0 or step == total:
                values = dict.fromkeys(LOG_COLUMNS) | training.mean_losses("stage 1", means, step, rt) | norms
                log.log("train", step, epoch=step / steps_per_epoch, lr=config.lr * factor, **values)
                bar.set_postfix({name: f"{values[name]:.4g}" for name in ("loss", "l1")})
            if rt.is_main and config.sample_every and (step % every["sample_every"] == 0 or step == total):
                log.image("reconstruction", step, draw(folder / "samples" / "latest.png", kept, volumes, held_out, rt))
            if step % every["val_every"] == 0 or step == total:
                scores = evaluate(kept, volumes, held_out, config.seed, rt)[0]
                log.log("val", step, epoch=step / steps_per_epoch, **scores)
                stale += 1
                if scores["val_loss"] < best:
                    best, stale = scores["val_loss"], 0
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


# ---- what all stages that read scans share --------------------------------------------------------------------------


def preparation(config) -> Preparation:
    return Preparation(**{name: getattr(config, name) for name in PREPARATION})


def open_split(config, rt, *names: str, need=("subject", "path")):
    """The study's split, made over all rows if it is missing, and this stage's rows of each named part."""
    table = dataset.read_table(config.csv_path)
    rows = dataset.read_table(config.csv_path, need=need, classes=config.classes or None)
    split = data_split.load_or_create(config.split, table, config.val_size, config.test_size, config.split_seed, rt,
                                      rule=config.split_rule, table=config.csv_path)  # fmt: skip
    return split, [split.rows(rows, name) for name in names]


def fill_cache(volumes: dataset.Volumes, rows: list[dataset.Row], rt: runtime.Runtime) -> None:
    """Prepare every volume once, sharded over ranks: bad ones are known before the first step."""
    mine = rt.shard(rows)
    with progress(len(mine), 0, "prepare volumes", enabled=rt.is_main) as bar:
        for row in mine:
            volumes.load(row)
            bar.update()
    rt.barrier()


def report_path(config, verb: str) -> Path:
    """RUN/<verb>.json; UserError if it is there and may not be replaced."""
    path = Path(config.run) / f"{verb}.json"
    if path.exists() and not config.overwrite:
        raise UserError(f"{path} exists: add --overwrite, or name another --run")
    return path


def claim_output(config, rt) -> Path:
    """The empty or new folder of predict; UserError if it holds something that may not be replaced."""
    folder = Path(config.out)
    if folder.is_dir() and any(folder.iterdir()) and not config.overwrite:
        raise UserError(f"{folder} is not empty: add --overwrite, or name another --out")
    rt.barrier()  # every rank has looked before any writes
    return folder


def part_rows(config, rt, classes=()) -> tuple[list[dataset.Row], str | None]:
    """Rows that predict takes (--part, diagnoses `classes`), and the split's hash; part "all" needs no split."""
    rows = dataset.read_table(config.csv_path, classes=classes or None)
    if config.part == "all":
        return rows, None
    split, _ = open_split(config, rt)
    return split.rows(rows, config.part), split.hash


# ---- networks -------------------------------------------------------------------------------------------------------


def aekl_settings(config: AEKLConfig) -> dict:
    """Constructor arguments of the autoencoder."""
    return {"in_channels": 1, "out_channels": 1} | {name: getattr(config, name) for name in ARCHITECTURE}


def build_aekl(config: AEKLConfig) -> AutoencoderKL:
    aekl = AutoencoderKL(**aekl_settings(config), checkpointing=config.checkpointing)
    if config.posterior_logvar:  # a decoder that starts from clean latents learns sooner, and they stay cleaner
        nn.init.zeros_(aekl.logvar.weight)
        nn.init.constant_(aekl.logvar.bias, config.posterior_logvar)
    return aekl


def build_discriminator(config: AEKLConfig) -> PatchDiscriminator | None:
    """The discriminator; None at adv_weight 0."""
    if not config.adv_weight:
        return None
    return PatchDiscriminator(in_channels=1, channels=config.disc_channels, layers=config.disc_layers)


def build_lpips(config: AEKLConfig, rt: runtime.Runtime) -> SliceLPIPS | None:
    """The perceptual term on its device; None at weight 0. UserError if its pretrained files are not given."""
    if not config.perceptual_weight:
        return None
    value_range = (0.0, 1.0) if config.lpips_centred else None
    how = dict(slice_fraction=config.lpips_fraction, value_range=value_range, sum_axes=config.lpips_sum)
    lpips = SliceLPIPS(config.lpips_net, config.lpips_weights, **how, checkpointing=config.checkpointing)
    return lpips.to(rt.device)


def check_sizes(config: AEKLConfig) -> None:
    """UserError if widths, groups and grid do not fit together, or the grid is too small for discriminator or SSIM."""
    if any(c % config.norm_groups for c in config.channels):
        raise UserError(f"--channels {config.channels}: every width must be a multiple of --norm_groups "
                        f"{config.norm_groups}")  # fmt: skip
    factor = 2 ** (len(config.channels) - 1)
    if any(n % factor for n in config.shape):
        raise UserError(f"--shape {config.shape}: every axis must be a multiple of {factor}")
    with torch.device("meta"):
        try:
            if discriminator := build_discriminator(config):
                discriminator.eval()(torch.zeros(1, 1, *config.shape))
        except RuntimeError as error:
            raise UserError(f"--shape {config.shape} is too small for a discriminator of --disc_layers "
                            f"{config.disc_layers}: give fewer, or --adv_weight 0") from error  # fmt: skip
    if min(config.shape) < 11:
        raise UserError(f"--shape {config.shape}: every axis needs 11 voxels or more, the width of SSIM's window")


def draw_eps(config: AEKLConfig, step: int, shape: tuple[int, ...], rt: runtime.Runtime) -> torch.Tensor:
    """This rank's share of a step's latent noise: every rank draws the global batch and keeps its slice."""
    g = runtime.generator(config.seed, "aekl", step)
    return runtime.local_slice(torch.randn((config.batch_size, *shape), generator=g), rt).to(rt.device)


def load_init(aekl: AutoencoderKL, config: AEKLConfig, prep: Preparation, rt: runtime.Runtime) -> str:
    """Fill `aekl` from --init and return the hash of its weights; UserError if it does not fit the options."""
    if Path(config.init).resolve() == config.best_path.resolve():
        raise UserError(f"--init {config.init} is the file that this run writes: copy it or name another --run")
    trained = latents.load_aekl(Path(config.init), rt, trust_pickle=config.trust_pickle, option="--init")
    checkpoint.load_weights(aekl, trained.model.state_dict(), config.init)
    if trained.preparation != prep:
        rt.print(f"note: {config.init} was trained on {trained.preparation}, this run uses {prep}")
    return trained.hash


def save_aekl(path: Path, aekl: AutoencoderKL, config: AEKLConfig, prep: Preparation, **more) -> None:
    settings = aekl_settings(config)
    training.save_network(path, latents.KIND, aekl.state_dict(), settings, preparation=prep.to_dict(), **more)


# ---- using the autoencoder ------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(aekl, volumes: dataset.Volumes, rows: list[dataset.Row], seed: int, rt) -> tuple[dict, list[dict]]:
    """Means over all rows, and each row's values: L1 of a drawn latent (val_loss), errors of the mean latent.

    Deviation (original code): the noise of the draw is fixed, so that val_loss compares weights and not draws.
    """
    was_training = aekl.training
    aekl.eval()
    found = []
    for row in rt.shard(rows):
        x = volumes.tensor(row)[None].to(rt.device)
        with rt.autocast():
            mu, logvar = aekl.encode(x)
            eps = torch.randn(mu.shape, generator=runtime.generator(seed, "validation", row.scan)).to(mu)
            x_hat, x_mean = aekl.decode(aekl.sample(mu, logvar, eps)).float(), aekl.decode(mu).float()
        found.append({"scan": row.scan, "val_loss": reconstruction_loss(x_hat, x).item(),
                      "posterior_std": (0.5 * logvar.float()).exp().mean().item(), **scores(x_mean, x)})  # fmt: skip
    aekl.train(was_training)
    each = sorted((values for part in rt.gather(found) for values in part), key=lambda values: values["scan"])
    return {name: float(np.mean([values[name] for values in each])) for name in each[0] if name != "scan"}, each


def scores(x_hat: torch.Tensor, x: torch.Tensor) -> dict[str, float]:
    """L1, PSNR and SSIM of one prepared volume (1, 1, D, H, W), whole and inside the head (see head_mask)."""
    x_hat, x = x_hat[0, 0], x[0, 0]
    head = torch.from_numpy(preprocess.head_mask(x.cpu().numpy())).to(x.device)
    return {
        "l1": metrics.mae(x_hat, x),
        "psnr": metrics.psnr(x_hat, x, data_range=1.0),
        "ssim": metrics.ssim(x_hat, x, data_range=1.0),
        "l1_masked": metrics.mae(x_hat, x, mask=head),
        "ssim_masked": metrics.ssim(x_hat, x, data_range=1.0, mask=head),
    }


def draw(path: Path, aekl, volumes: dataset.Volumes, rows: list[dataset.Row], rt) -> Path:
    """Montage of the first row of each diagnosis and its reconstruction from the mean latent."""
    was_training = aekl.training
    aekl.eval()
    pictures = []
    for diagnosis in sorted({row.diagnosis or "" for row in rows}):
        row = next(row for row in rows if (row.diagnosis or "") == diagnosis)
        x = volumes.tensor(row)[None]
        x_hat = latents.decode(aekl, latents.encode(aekl, x, rt)[0], rt)
        name = diagnosis or row.scan
        pictures += [(name, x[0, 0].numpy()), (f"{name} decoded", x_hat[0, 0].numpy())]
    aekl.train(was_training)
    return figures.montage(path, pictures, window=(0.0, 1.0))


def validate(config: AEKLConfig, rt: runtime.Runtime) -> None:
    """Scores of the validation subjects, to RUN/validate.json."""
    measure(config, rt, "validate", "val")


def test(config: AEKLConfig, rt: runtime.Runtime) -> None:
    """Scores of the test subjects, to RUN/test.json."""
    measure(config, rt, "test", "test")


def measure(config: AEKLConfig, rt: runtime.Runtime, verb: str, part: str) -> None:
    path = report_path(config, verb)
    trained = open_trained(config, rt)
    split, (rows,) = open_split(config, rt, part)
    check_split(trained, split.hash, config)
    volumes = dataset.Volumes(trained.preparation, config.cache_folder)
    means, each = evaluate(trained.model, volumes, rows, config.seed, rt)
    if rt.is_main:
        subjects = {row.scan: row.subject for row in rows}
        groups = [subjects[values["scan"]] for values in each]
        summaries = {name: metrics.summary([values[name] for values in each], groups=groups) for name in means}
        about = {"stage": config.stage, "part": part, "n": len(rows), "subjects": len(set(groups))}
        about |= {"split": split.hash, "aekl": trained.hash, "preparation": trained.preparation.to_dict()}
        about |= {"ssim_definition": SSIM, "mask": "largest bright component (Otsu)"}
        write_json(path, about | {"scores": summaries, "scans": each, "options": training.recorded(config)})
        shown = ", ".join(f"{name} {means[name]:.4g}" for name in ("val_loss", "l1", "psnr", "ssim", "ssim_masked"))
        rt.print(f"autoencoder on {len(rows)} scans of {len(set(groups))} {part} subjects: {shown} ({path})")


def predict(config: AEKLConfig, rt: runtime.Runtime) -> None:
    """Decoded mean latents of --part, on each scan's own grid and in its units: OUT/<scan>_reconstruction.nii.gz."""
    folder, trained = claim_output(config, rt), open_trained(config, rt)
    rows, split_hash = part_rows(config, rt, config.classes)
    check_split(trained, split_hash, config)
    volumes = dataset.Volumes(trained.preparation, config.cache_folder)
    mine = rt.shard(rows)
    with progress(len(mine), 0, "reconstruct", enabled=rt.is_main) as bar:
        for row in mine:
            x_hat = latents.decode(trained.model, latents.encode(trained.model, volumes.tensor(row)[None], rt)[0], rt)
            native = preprocess.to_native(x_hat[0, 0].numpy(), trained.preparation, volumes.native(row))
            nifti.save(folder / f"{row.scan}_reconstruction.nii.gz", native.data, native.affine)
            bar.update()
    rt.barrier()
    if rt.is_main:
        about = {"stage": config.stage, "part": config.part, "n": len(rows), "split": split_hash, "aekl": trained.hash}
        files = {row.scan: f"{row.scan}_reconstruction.nii.gz" for row in rows}
        write_json(folder / "predict.json", about | {"files": files, "options": training.recorded(config)})
        rt.print(f"{len(rows)} reconstructions in {folder}")


def open_trained(config: AEKLConfig, rt: runtime.Runtime) -> latents.TrainedAEKL:
    return latents.load_aekl(Path(config.ckpt_path), rt, trust_pickle=config.trust_pickle, option="--ckpt_path")


def check_split(trained, split_hash: str | None, config) -> None:
    """UserError if a network was trained with another split: its training subjects may be among those here."""
    if split_hash and trained.split_hash not in (None, split_hash):
        raise UserError(f"{config.ckpt_path} was trained with split {trained.split_hash}, {config.split} is "
                        f"{split_hash}: name the split it belongs to with --split, or take --part all")  # fmt: skip


def dry_run(config: AEKLConfig, rt: runtime.Runtime) -> None:
    """Print the resolved configuration, parameter counts, shapes and an estimate of training memory; write nothing."""
    training.check_options(config, rt)
    check_sizes(config)
    local = config.batch_size // rt.world_size // config.accumulate
    with torch.device("meta"):
        aekl, discriminator = build_aekl(config), build_discriminator(config)
        x = torch.zeros(local, 1, *config.shape)
        eps = torch.zeros(local, config.latent_channels, *(n // aekl.compression for n in config.shape))
        with runtime.SavedBytes() as saved:
            x_hat, mu, _ = aekl(x, eps)
        if discriminator:
            with runtime.SavedBytes() as saved_d:
                logits = discriminator.eval()(x)
                discriminator(x_hat.detach())
    rt.print(json.dumps(training.recorded(config), indent=2))
    rt.print(f"volumes {tuple(x.shape)} -> latents {tuple(mu.shape)} -> {tuple(x_hat.shape)}")
    copies = ("weights", "gradients", "Adam", "Adam")
    rt.print("autoencoder:")
    training.print_memory(aekl, saved, copies + (("EMA",) if config.ema_decay else ()), rt)
    if discriminator:
        rt.print(f"discriminator, logits {tuple(logits.shape)}:")
        training.print_memory(discriminator, saved_d, copies, rt)
    if config.perceptual_weight:
        rt.print("the perceptual term comes on top: give --lpips_fraction or --checkpointing where memory is short")
