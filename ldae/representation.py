"""Stage 3 of LDAE: a semantic encoder and a gradient estimator learn to fill the frozen prior's posterior-mean gap.

Lozupone et al., arXiv 2504.08635, section 3; the objective is that of PDAE (Zhang et al. 2022), see posterior_gap.py.
`gap_losses` is the training step's loss; `train` the loop around it (entry script: run_cli.py).
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from common import checkpoint, figures, metrics, nifti, runtime, schedulers, tables, training
from common.checkpoint import replacing
from common.cli import UserError, frozen
from common.ema import EMA
from common.runlog import Means, RunLog, progress, write_json
from ldae import dataset, evaluation, latents, model, posterior_gap, preprocess
from ldae.aekl import (
    check_split,
    claim_output,
    fill_cache,
    open_split,
    part_rows,
    report_path,
)
from ldae.config import ReprLearnConfig
from ldae.encoder import CONVNEXT, SemanticEncoder, load_backbone, to_slices
from ldae.prior import (
    TrainedPrior,
    TrainingLatents,
    check_prior,
    draw,
    fixed_table,
    latent_shape,
    load_prior,
    open_aekl,
    open_latents,
    quarters,
    sampling_settings,
    schedule_settings,
)
from ldae.unet import ShiftUNet, UNet

VALIDATION_TIMES = 8  # timesteps of the held-out gap while training
CURVE_TIMES = 25  # of the curves that validate and test write
CODE_SCANS = 64  # about so many scans tell mean and SD of the codes
SLICE_BATCH = 32  # slices that the backbone takes at a time with --checkpointing
GAPS = {"with": "own code", "without": "prior alone", "other": "another subject's code"}


# ---- the objective --------------------------------------------------------------------------------------------------


class Learner(nn.Module):
    """Encoder and decoder in one forward, as DistributedDataParallel needs it: x, z_t, t -> (eps, G).

    x: prepared volumes (B, 1, D, H, W), not the latent: the code comes from the image. The prior inside the decoder is
    frozen, and computes no gradient.
    """

    def __init__(self, encoder: SemanticEncoder, decoder: ShiftUNet, plane: str):
        super().__init__()
        self.encoder, self.decoder, self.plane = encoder, decoder, plane

    def forward(self, x, z_t, t):
        return self.decoder(z_t, t, self.encoder(to_slices(x, self.plane)))


def gap_losses(learner, schedule: schedulers.Schedule, x, z_0, t, noise, gamma: float) -> dict[str, torch.Tensor]:
    """The objective of each sample, "loss" (B,), and what it would be without the estimator, "without" (B,).

    x (B, 1, D, H, W) and z_0 (B, C, d, h, w): image and normalised latent of the same scans; noise like z_0, t (B,).
    """
    eps, G = learner(x, schedulers.q_sample(schedule, z_0, t, noise), t)
    target = schedulers.training_target(schedule, z_0, t, noise)  # the noise, unless the prior predicts v
    loss = posterior_gap.posterior_gap_loss(eps, G, target, t, schedule, gamma)
    with torch.no_grad():
        without = posterior_gap.posterior_gap_loss(eps, None, target, t, schedule, gamma)
    return {"loss": loss, "without": without}


def quarter_sums(losses: torch.Tensor, t: torch.Tensor, T: int) -> dict[str, torch.Tensor]:
    """Sum of losses (B,) and number of samples in each quarter of the schedule; no entry waits for the device."""
    member = F.one_hot(t * 4 // T, 4).to(losses.dtype)  # (B, 4)
    sums, counts = losses.detach() @ member, member.sum(0)
    return {f"sum_q{i + 1}": sums[i] for i in range(4)} | {f"count_q{i + 1}": counts[i] for i in range(4)}


class Pairs(Dataset):
    """Image (1, D, H, W) and latent (C, d, h, w) of the same scan, asked for by (index, position in the stream).

    Deviation (original code): its augmentation would change the image and leave the cached latent; there is none here.
    """

    def __init__(self, volumes: dataset.Volumes, data: latents.Latents, kind: str):
        self.volumes, self.data, self.drawn = volumes, data, TrainingLatents(data, kind)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.volumes.tensor(self.data.rows[item[0]]), self.drawn[item]


# ---- training -------------------------------------------------------------------------------------------------------


def train(config: ReprLearnConfig, rt: runtime.Runtime) -> None:
    """Train to RUN/checkpoints/best.ckpt (smallest held-out gap of the average); resumes RUN/checkpoints/last.ckpt.

    best.ckpt is a whole LDAE, each tensor once; last.ckpt holds only what trains. Deviation (original code): every
    checkpoint there has the frozen prior twice and the autoencoder, and the SSIM of unseeded samples picks `best`.
    """
    # ---- data
    training.check_options(config, rt)
    split, (rows, held_out_rows) = open_split(config, rt, "train", "val")
    record = open_latents(config, split.hash, rt)
    aekl, prior = open_aekl(config, record, rt), open_prior(config, record, split.hash, rt)
    schedulers.respace(prior.schedule.T, config.sample_steps, config.spacing)  # said now, not after an epoch
    folder = Path(config.latents)
    data, held_out = (latents.Latents(folder, part, record, prior.stats, seed=config.seed)
                      for part in (rows, held_out_rows))  # fmt: skip
    volumes = dataset.Volumes(aekl.preparation, config.cache_folder)
    fill_cache(volumes, rows + held_out_rows, rt)
    steps_per_epoch = math.ceil(len(rows) / config.batch_size)
    total = config.steps or config.epochs * steps_per_epoch
    last_step = min(total, config.max_steps or total)
    every = {name: getattr(config, name) * steps_per_epoch for name in ("val_every", "sample_every")}

    # ---- model
    torch.manual_seed(config.seed)
    encoder, backbone = build_encoder(config, aekl.preparation.shape)
    if config.standardise_codes:
        standardise_codes(encoder, volumes, rows, config.plane)
    own = estimator_settings(config, prior.latent_shape)
    decoder = ShiftUNet(prior.model, config.code_dim, **own, checkpointing=config.checkpointing)
    learner = Learner(encoder, decoder, config.plane).to(rt.device).train()
    learned = nn.ModuleDict({"encoder": encoder, "estimator": decoder.estimator})  # all that has gradients
    if config.compile:
        encoder.compile()
        decoder.compile()
    schedule = prior.schedule

    # ---- optimizer and EMA
    rates = {"encoder": config.lr_encoder or config.lr, "estimator": config.lr}
    groups = [{"params": list(learned[name].parameters()), "lr": rate} for name, rate in rates.items()]
    optimizer = torch.optim.Adam(groups, **runtime.fused_optimizer_kwargs(rt.device))
    # Deviation (original code): averaged once per optimizer step, after a warm-up, and without the frozen prior; there
    # once per micro-batch, all tensors, those of the backbone twice.
    ema = EMA(learned, config.ema_decay, config.ema_start)
    scaler, means = rt.grad_scaler(), Means()
    averaged = bundle(config, aekl, prior, with_estimator(decoder, ema.module["estimator"]), ema.module["encoder"],
                      split.hash, rt)  # fmt: skip

    # ---- resume
    run, best_path, last_path = Path(config.run), config.best_path, config.last_path
    training.claim_run(best_path, last_path, config, rt)
    settings = frozen(config, {"data", "model", "loss", "diffusion", "training"})
    settings |= {"seed": config.seed, "precision": config.precision, "aekl": aekl.hash, "prior": prior.hash}
    settings |= {"backbone_weights": backbone, "split": split.hash, "scans": [row.scan for row in rows]}
    objects = {"learned": learned, "ema": ema, "optimizer": optimizer, "scaler": scaler, "means": means}
    step, extra = checkpoint.resume_training(last_path, objects=objects, config=settings)
    best, stale = extra.get("best", math.inf), extra.get("stale", 0)
    if training.is_complete("ldae_repr_learn", step, last_step, stale, best_path, config, rt):
        return

    def save_last():
        means.share(rt)
        if rt.is_main:
            extra = {"best": best, "stale": stale}
            checkpoint.save_training(last_path, step=step, objects=objects, config=settings, extra=extra)

    def save_best(scores):
        if rt.is_main:
            model.save_ldae(best_path, averaged, step=step, scores=scores)

    # ---- loop
    network = runtime.wrap_ddp(learner, rt)
    stream = Pairs(volumes, data, config.latent)
    batches = runtime.training_batches(stream, config.batch_size, step, config.seed, rt, config.num_workers)
    fingerprint = {"split": split.hash, "prior": prior.hash, "train": len(rows), "val": len(held_out_rows)}
    options = training.recorded(config)
    with (
        RunLog(run, options, start_step=step, enabled=rt.is_main, data_fingerprint=fingerprint) as log,
        runtime.StopRequest() as stop,
        progress(last_step, step, "stage 3: representation", enabled=rt.is_main) as bar,
    ):
        if step == 0:
            save_last()  # claims the folder, and a disk that is too small shows now
        while step < last_step and not stop.agree(rt):
            factor = training.learning_rate_factor(config, step, total)
            for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
                group["lr"] = rate * factor
            x_batch, z_batch = (x.to(rt.device, non_blocking=True) for x in next(batches))
            t_batch, noise_batch = draw(config, step, data.shape, rt)
            optimizer.zero_grad(set_to_none=True)
            batch = (x_batch, z_batch, t_batch, noise_batch)
            for x, z_0, t, noise in runtime.micro_batches(config.accumulate, *batch):
                with rt.autocast():
                    losses = gap_losses(network, schedule, x, z_0, t, noise, config.gamma)
                scaler.scale(losses["loss"].mean() / config.accumulate).backward()
                means.add({name: value.mean() for name, value in losses.items()})
                means.add(quarter_sums(losses["loss"], t, schedule.T))
            norms = runtime.update_weights(scaler, config.grad_clip, grad_norm=(optimizer, learned))
            ema.update(learned)
            step += 1
            bar.update()

            if step % config.log_every == 0 or step % steps_per_epoch == 0 or step == total:
                values = logged(training.mean_losses("stage 3", means, step, rt))
                log.log("train", step, epoch=step / steps_per_epoch, lr=config.lr * factor, **values, **norms)
                bar.set_postfix({name: f"{values[name]:.4f}" for name in ("loss", "without")})
            if rt.is_main and config.sample_every and (step % every["sample_every"] == 0 or step == total):
                pictures = preview(averaged, volumes, held_out_rows, config)
                log.image("y_only", step, figures.montage(run / "samples" / "latest.png", pictures, window=(0.0, 1.0)))
            if step % every["val_every"] == 0 or step == total:
                scores = held_out_gap(averaged, volumes, held_out, config, rt)
                scores |= y_only_scores(averaged, volumes, held_out_rows, config, rt)
                log.log("val", step, epoch=step / steps_per_epoch, **scores)
                stale += 1
                if scores["loss"] < best:
                    best, stale = scores["loss"], 0
                    save_best(scores)
                save_last()
                if config.patience and stale >= config.patience:
                    rt.print(f"stage 3: no improvement in {stale} validations, stopped at step {step}")
                    break
            elif config.save_every and step % config.save_every == 0:
                save_last()

        # ---- finish
        save_last()
        if not best_path.exists():
            save_best({})  # cut short before its first validation: still a usable file
        rt.barrier()
    stop.leave("stage 3", step, last_step, rt)


def logged(values: dict[str, float]) -> dict[str, float]:
    """Losses for the log: those of the quarters as means; None for one that no timestep fell into."""
    row = {name: values[name] for name in ("loss", "without")}
    for i in range(1, 5):
        count = values[f"count_q{i}"]
        row[f"loss_q{i}"] = values[f"sum_q{i}"] / count if count else None
    return row


# ---- validation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def gap_table(
    ldae: model.LDAE, volumes: dataset.Volumes, data: latents.Latents, config, rt, times: int, other: bool = False
) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """Timesteps (K,) and the curves of posterior_gap.gap_curve, each (N, K); the same latents and noise every time.

    other: also "other" and "loss_other", the gap with the code of another subject: it is what the code adds.
    """
    partners = evaluation.partners([row.subject for row in data.rows]) if other else None
    found = []
    for index in rt.shard(range(len(data))):
        row, (mu, logvar) = data.rows[index], data[index]
        t, noise = (x.to(rt.device) for x in fixed_table(ldae.schedule, mu.shape, config.seed, row.scan, times))
        eps = torch.randn(mu.shape, generator=runtime.generator(config.seed, "validation latent", row.scan))
        z_0 = (latents.sample(mu, logvar, eps) if config.latent == "sample" else mu)[None].to(rt.device)
        codes = {"with": row} | ({"other": data.rows[partners[index]]} if other and partners[index] >= 0 else {})
        curves = {}
        for name, whose in codes.items():
            y = ldae.semantic(volumes.tensor(whose)[None])
            made = posterior_gap.gap_curve(ldae.shift, z_0, y, ldae.schedule, t, noise[None], config.gamma)
            curves |= {key.replace("with", name) if key in ("with", "loss_with") else key: value[0].tolist()
                       for key, value in made.items()}  # fmt: skip
        found.append((index, curves))
    rows = [curves for _, curves in sorted((r for part in rt.gather(found) for r in part), key=lambda r: r[0])]
    return t.cpu(), {name: np.array([curves[name] for curves in rows]) for name in rows[0]}


def held_out_gap(ldae: model.LDAE, volumes, data: latents.Latents, config, rt) -> dict[str, float]:
    """The objective over all held-out scans with ("loss") and without the estimator, and the share that it fills.

    gap_*: the same as plain distances of posterior means.
    """
    _, curves = gap_table(ldae, volumes, data, config, rt, VALIDATION_TIMES)
    scores = {"loss": float(curves["loss_with"].mean()), "without": float(curves["loss_without"].mean())}
    scores["fraction"] = posterior_gap.gap_fraction(curves["loss_with"], curves["loss_without"])
    scores |= {"gap_with": float(curves["with"].mean()), "gap_without": float(curves["without"].mean())}
    return scores | quarters(curves["loss_with"].mean(0), "loss")


def y_only_scores(ldae: model.LDAE, volumes, rows: list[dataset.Row], config, rt) -> dict[str, float]:
    """Mean SSIM of n_samples held-out scans and their reconstruction from y with fixed noise, and by the autoencoder.

    Deviation (original code): it compares with the decoded latent instead of the scan, from fresh noise every time.
    """
    n = max(1, min(config.n_samples, len(rows)))
    found = []
    for row in rt.shard(rows[:: len(rows) // n][:n]):
        x = volumes.tensor(row)[None]
        z_0 = y_only(ldae, row, ldae.semantic(x), config)
        for name, z in (("ssim_y_only", z_0), ("ssim_aekl", ldae.compress(x))):
            found.append((row.index, name, evaluation.image_metrics(ldae.decompress(z)[0, 0].cpu(), x[0, 0])["ssim"]))
    rows = sorted(row for part in rt.gather(found) for row in part)
    names = ("ssim_y_only", "ssim_aekl")
    return {name: float(np.mean([value for _, kind, value in rows if kind == name])) for name in names}


def y_only(ldae: model.LDAE, row: dataset.Row, y: torch.Tensor, config) -> torch.Tensor:
    """z_0 (1, C, d, h, w) of a code and the scan's fixed noise, by a few steps of DPM-Solver++."""
    return ldae.decode(ldae.noise([row.scan], config.seed), y, config.sample_steps, sampler="dpmpp_2m")


def preview(ldae: model.LDAE, volumes, rows: list[dataset.Row], config) -> list[tuple[str, np.ndarray]]:
    """Scans of different diagnoses, each with its reconstruction from y alone and by the autoencoder."""
    chosen = list({row.diagnosis: row for row in reversed(rows)}.values())[::-1][: config.n_samples]
    pictures = []
    for row in chosen:
        x = volumes.tensor(row)[None]
        z_0 = {"y only": y_only(ldae, row, ldae.semantic(x), config), "autoencoder": ldae.compress(x)}
        pictures += [(row.scan, x[0, 0])]
        pictures += [(f"{row.scan} {name}", ldae.decompress(z)[0, 0]) for name, z in z_0.items()]
    return pictures


# ---- networks -------------------------------------------------------------------------------------------------------


def open_prior(config: ReprLearnConfig, record: dict, split_hash: str | None, rt: runtime.Runtime) -> TrainedPrior:
    """The frozen prior of --prior; UserError if it is missing, or of other latents or another split.

    Its schedule and latent statistics hold for stage 3, whatever the options say.
    """
    prior = load_prior(Path(config.prior), rt, trust_pickle=config.trust_pickle)
    check_prior(prior, record)
    if prior.split_hash not in (None, split_hash):
        raise UserError(f"{config.prior} was trained with split {prior.split_hash}, {config.split} is {split_hash}: "
                        "name the split it belongs to with --split, or train stage 2 again")  # fmt: skip
    if prior.schedule_settings != schedule_settings(config) | {"prediction": prior.schedule.prediction}:
        rt.print(f"note: the noise schedule is the prior's: {prior.schedule_settings}")
    if prior.latent_scale != config.latent_scale:
        rt.print(f"note: latents are scaled as for the prior ({prior.latent_scale})")
    return prior


def encoder_settings(config) -> dict:
    """Constructor arguments of the semantic encoder."""
    own = tuple(zip(config.backbone_widths, config.backbone_depths, strict=True))
    if not own and config.backbone not in CONVNEXT:
        raise UserError(f"--backbone {config.backbone}: choose {', '.join(CONVNEXT)}, or give --backbone_depths and "
                        "--backbone_widths")  # fmt: skip
    return {
        "stages": own or CONVNEXT[config.backbone], "embed_dim": config.code_dim, "num_heads": config.encoder_heads,
        "max_slices": config.max_slices, "dropout": config.encoder_dropout, "drop_path": config.drop_path,
    }  # fmt: skip


def build_encoder(config: ReprLearnConfig, shape: tuple[int, ...]) -> tuple[SemanticEncoder, str]:
    """The encoder, and the hash of the file of its backbone's weights ("" from scratch).

    UserError if it cannot take volumes of this shape.
    """
    settings = encoder_settings(config)
    try:
        with torch.device("meta"):  # tries sizes at no cost
            SemanticEncoder(**settings)(to_slices(torch.zeros(1, 1, *shape), config.plane))
    except (ValueError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the semantic encoder cannot take {config.plane} slices of volumes {tuple(shape)} ({reason}): "
                        "check --plane, --max_slices, --backbone and --code_dim") from error  # fmt: skip
    encoder = SemanticEncoder(**settings)
    encoder.slice_batch = SLICE_BATCH if config.checkpointing else None
    if not config.backbone_weights:
        return encoder, ""
    load_backbone(encoder, config.backbone_weights)
    return encoder, latents.bytes_hash(Path(config.backbone_weights).read_bytes())


@torch.no_grad()
def standardise_codes(encoder: SemanticEncoder, volumes: dataset.Volumes, rows: list[dataset.Row], plane: str) -> None:
    """Set scale and bias of the last layer norm so that the codes of scans have mean 0 and SD 1 in every entry.

    An untrained encoder gives registered brains codes that differ by a tenth of their norm; what differs is then noise
    to the estimator, and the encoder learns to give all scans one code before the estimator has learned to read it.
    Data-dependent initialisation (Krähenbühl et al. 2016); the architecture stays what it is.
    """
    was_training = encoder.training
    encoder.eval()
    chosen = rows[:: max(1, len(rows) // CODE_SCANS)]
    device = next(encoder.parameters()).device
    y = torch.cat([encoder(to_slices(volumes.tensor(row)[None].to(device), plane)) for row in chosen])
    std = y.std(0).clamp_min(1e-3)
    encoder.norm.weight.copy_(1 / std)
    encoder.norm.bias.copy_(-y.mean(0) / std)
    encoder.train(was_training)


def estimator_settings(config: ReprLearnConfig, latent_shape: tuple[int, ...]) -> dict:
    """Constructor arguments of the gradient estimator beside the prior and the code's width."""
    return {"image_size": tuple(latent_shape[1:])} if config.linear_image else {}


def with_estimator(decoder: ShiftUNet, estimator: nn.Module) -> ShiftUNet:
    """A decoder of the same frozen prior, not a copy of it, with another estimator."""
    with torch.device("meta"):  # no memory for the estimator that is replaced
        other = ShiftUNet(decoder.prior, decoder.code_dim)
    other.estimator = estimator
    return other.eval()


def bundle(config: ReprLearnConfig, aekl, prior: TrainedPrior, decoder, encoder, split_hash, rt) -> model.LDAE:
    """The parts as an LDAE that shares their tensors."""
    settings = {"aekl": aekl.settings, "unet": prior.settings, "encoder": encoder_settings(config)}
    if own := estimator_settings(config, prior.latent_shape):
        settings["estimator"] = own
    return model.LDAE(
        aekl.model, decoder, encoder, settings, prior.schedule, prior.schedule_settings, prior.stats, aekl.preparation,
        config.plane, rt, split_hash, hashes={"aekl": aekl.hash, "prior": prior.hash}, coefficient=config.coefficient,
        **sampling_settings(config),
    )  # fmt: skip


# ---- using the representation ---------------------------------------------------------------------------------------


def validate(config: ReprLearnConfig, rt: runtime.Runtime) -> None:
    """Measures of the validation subjects, to RUN/validate.json."""
    measure(config, rt, "validate", "val")


def test(config: ReprLearnConfig, rt: runtime.Runtime) -> None:
    """Measures of the test subjects, to RUN/test.json."""
    measure(config, rt, "test", "test")


def measure(config: ReprLearnConfig, rt: runtime.Runtime, verb: str, part: str) -> None:
    """The gap over time (also RUN/<verb>_gap.{csv,png}), and reconstructions from y, both codes, and of controls."""
    path = report_path(config, verb)
    ldae, record = open_trained(config, rt)
    split, (rows,) = open_split(config, rt, part)
    check_split(ldae, split.hash, config)
    data = latents.Latents(Path(config.latents), rows, record, ldae.stats, seed=config.seed)
    volumes = dataset.Volumes(ldae.preparation, config.cache_folder)
    times, curves = gap_table(ldae, volumes, data, config, rt, CURVE_TIMES, other=len({r.subject for r in rows}) > 1)
    each = reconstructions(ldae, volumes, rows, config, rt)
    if not rt.is_main:
        return
    table = evaluation.summarise(each, config.seed)
    gap = summarise_gap(curves, [row.subject for row in rows])
    warnings = evaluation.control_warnings(table)
    if "loss_other" in gap and gap["loss_with"]["mean"] >= gap["loss_other"]["mean"]:
        warnings.append("a scan's own code fills the gap no better than another subject's")
    curve = [{"t": t} | {name: float(values[:, k].mean()) for name, values in curves.items()}
             for k, t in enumerate(times.tolist())]  # fmt: skip
    about = {"stage": config.stage, "part": part, "n": len(rows), "subjects": len({row.subject for row in rows})}
    about |= {"split": split.hash, "model": ldae.hash, "parts": ldae.hashes, "preparation": ldae.preparation.to_dict()}
    names = dict.fromkeys(key for entry in table for key in entry)
    tables.write_csv(path.with_name(f"{verb}_gap.csv"), curve)
    lines = {label: (times.numpy(), curves[name].mean(0)) for name, label in GAPS.items() if name in curves}
    figures.curves(path.with_name(f"{verb}_gap.png"), lines, xlabel="t", log_y=True,
                   ylabel="squared gap of posterior means", title=f"{len(rows)} {part} scans")  # fmt: skip
    write_json(path, about | {
        "gap": gap, "curve": curve, "table": table, "definitions": evaluation.definitions(names), "warnings": warnings,
        "scans": each, "options": training.recorded(config),
    })  # fmt: skip
    shown = {entry["row"]: f"{entry['ssim']['mean']:.4f}" for entry in table}
    rt.print(f"LDAE on {len(rows)} {part} scans: the code fills {gap['fraction']:.1%} of the prior's gap; SSIM in "
             f"{config.sample_steps} steps {shown} ({path})")  # fmt: skip
    for warning in warnings:
        rt.print(f"warning: {warning}")


def summarise_gap(curves: dict[str, np.ndarray], subjects: list[str]) -> dict:
    """Summaries over scans of every curve's mean, and the share of the prior's gap that is filled."""
    summaries = {name: metrics.summary(values.mean(1), groups=subjects) for name, values in curves.items()}
    summaries["fraction"] = posterior_gap.gap_fraction(curves["loss_with"], curves["loss_without"])
    if "loss_other" in curves:
        summaries["fraction_other"] = posterior_gap.gap_fraction(curves["loss_other"], curves["loss_without"])
    return summaries


def reconstructions(ldae: model.LDAE, volumes, rows: list[dataset.Row], config, rt) -> list[dict]:
    """Rows of evaluation's table for every scan, at sample_steps steps."""
    partners, wanted = evaluation.partners([row.subject for row in rows]), ["y_only", "encoded", "untrained"]
    wanted += ["shuffled_y_only"] if min(partners) >= 0 else []
    mine, found = rt.shard(range(len(rows))), []
    with progress(len(mine), 0, "reconstruct", enabled=rt.is_main) as bar:
        for index in mine:
            row, x = rows[index], volumes.tensor(rows[index])[None]
            z_0, y = ldae.compress(x), ldae.semantic(x)
            other = rows[partners[index]] if "shuffled_y_only" in wanted else None
            y_other = ldae.semantic(volumes.tensor(other)[None]) if other else None
            noise = ldae.noise([row.scan], config.seed)
            made = evaluation.reconstruct(ldae, z_0, y, y_other, noise, config.sample_steps, wanted)
            made[evaluation.AEKL] = (z_0, None)
            for name, (z_hat, z_T) in made.items():
                entry = {"scan": row.scan, "subject": row.subject, "row": name,
                         "steps": None if name == evaluation.AEKL else config.sample_steps}  # fmt: skip
                entry |= evaluation.image_metrics(ldae.decompress(z_hat)[0, 0].cpu(), x[0, 0])
                if name != evaluation.AEKL:
                    entry["latent_rmse"] = (z_hat - z_0).double().square().mean().sqrt().item()
                if z_T is not None:
                    entry |= evaluation.noise_statistics(z_T[0])
                found.append((index, entry))
            bar.update()
    return [entry for _, entry in sorted((e for part in rt.gather(found) for e in part), key=lambda e: e[0])]


def predict(config: ReprLearnConfig, rt: runtime.Runtime) -> None:
    """Codes of --part, OUT/codes.npz, and both reconstructions of each scan, OUT/<scan>_{y_only,encoded}.nii.gz.

    codes.npz holds y (N, code_dim), z_T (N, C, d, h, w) and the scans' names; volumes are on each scan's own grid.
    """
    folder, (ldae, _) = claim_output(config, rt), open_trained(config, rt)
    rows, split_hash = part_rows(config, rt, config.classes)
    check_split(ldae, split_hash, config)
    volumes = dataset.Volumes(ldae.preparation, config.cache_folder)
    mine, found = rt.shard(range(len(rows))), []
    with progress(len(mine), 0, "encode and decode", enabled=rt.is_main) as bar:
        for index in mine:
            row, x = rows[index], volumes.tensor(rows[index])[None]
            z_0, y = ldae.compress(x), ldae.semantic(x)
            z_T = ldae.invert(z_0, y, config.sample_steps)
            made = {"encoded": ldae.decode(z_T, y, config.sample_steps), "y_only": y_only(ldae, row, y, config)}
            for name, z in made.items():
                volume = ldae.decompress(z)[0, 0].cpu().numpy()
                native = preprocess.to_native(volume, ldae.preparation, volumes.native(row))
                nifti.save(folder / f"{row.scan}_{name}.nii.gz", native.data, native.affine)
            found.append((index, y[0].cpu().numpy(), z_T[0].cpu().numpy()))
            bar.update()
    codes = sorted((code for part in rt.gather(found) for code in part), key=lambda code: code[0])
    if rt.is_main:
        arrays = {"y": np.stack([y for _, y, _ in codes]), "z_T": np.stack([z for *_, z in codes])}
        buffer = io.BytesIO()
        np.savez(buffer, scans=np.array([row.scan for row in rows]), **arrays)
        with replacing(folder / "codes.npz") as file:
            file.write(buffer.getvalue())
        about = {"stage": config.stage, "part": config.part, "n": len(rows), "split": split_hash, "model": ldae.hash}
        files = {row.scan: [f"{row.scan}_{name}.nii.gz" for name in ("encoded", "y_only")] for row in rows}
        about |= {"codes": "codes.npz", "files": files, "options": training.recorded(config)}
        write_json(folder / "predict.json", about)
        rt.print(f"codes and reconstructions of {len(rows)} scans in {folder}")


def open_trained(config: ReprLearnConfig, rt: runtime.Runtime) -> tuple[model.LDAE, dict]:
    """The LDAE of --ckpt_path and the record of the cached latents, which must be of its autoencoder."""
    ldae = model.load_ldae(Path(config.ckpt_path), rt, config.trust_pickle, option="--ckpt_path")
    record = latents.read_record(Path(config.latents))
    if ldae.hashes and ldae.hashes["aekl"] != record["aekl"]:
        raise UserError(f"{config.ckpt_path} is of autoencoder {ldae.hashes['aekl']}, the latents in {config.latents} "
                        f"of {record['aekl']}; name the matching pair with --latents")  # fmt: skip
    return ldae, record


def dry_run(config: ReprLearnConfig, rt: runtime.Runtime) -> None:
    """Print the resolved configuration, parameter counts, shapes and an estimate of training memory; write nothing."""
    training.check_options(config, rt)
    local = config.batch_size // rt.world_size // config.accumulate
    settings, shape, volume = prior_settings(config)
    with torch.device("meta"):
        encoder, _ = build_encoder(config, volume)
        own = estimator_settings(config, shape)
        decoder = ShiftUNet(UNet(**settings), config.code_dim, **own, checkpointing=config.checkpointing)
        learner = Learner(encoder, decoder, config.plane)
        x, z, t = torch.zeros(local, 1, *volume), torch.zeros(local, *shape), torch.zeros(local, dtype=torch.long)
        with runtime.SavedBytes() as saved:
            learner(x, z, t)
    rt.print(json.dumps(training.recorded(config), indent=2))
    rt.print(f"volumes {tuple(x.shape)}, latents {tuple(z.shape)}, codes of {config.code_dim} numbers")
    learned = nn.ModuleDict({"encoder": encoder, "estimator": decoder.estimator})
    parts = {"encoder": encoder, "gradient estimator": decoder.estimator, "frozen prior": decoder.prior}
    for name, part in parts.items():
        rt.print(f"{name}: {sum(p.numel() for p in part.parameters()):,} parameters")
    training.print_memory(learned, saved, ("weights", "gradients", "Adam", "Adam", "EMA"), rt)
    rt.print(f"the frozen prior comes on top: {sum(p.numel() for p in decoder.prior.parameters()) * 4 / 2**30:.1f} GiB")


def prior_settings(config: ReprLearnConfig) -> tuple[dict, tuple[int, ...], tuple[int, ...]]:
    """The prior's constructor arguments, the shapes of latents and volumes: of --prior, else the paper's on --shape."""
    if Path(config.prior).is_file():
        saved = checkpoint.load(Path(config.prior))
        return saved["config"], tuple(saved["latent_shape"]), tuple(saved["preparation"]["shape"])
    from ldae.config import PretrainConfig
    from ldae.prior import unet_settings

    shape = latent_shape(config)
    return unet_settings(PretrainConfig(), shape[0]), shape, config.shape
