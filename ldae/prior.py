"""Stage 2 of LDAE: an unconditional diffusion prior over latents, which stage 3 freezes.

Lozupone et al., arXiv 2504.08635, section 3; the network is that of guided diffusion (Dhariwal & Nichol 2021) in 3D.
`prior_loss` is the objective; `train` the loop around it (entry script: run_cli.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from common import checkpoint, figures, metrics, nifti, runtime, schedulers, training
from common.cli import UserError, frozen
from common.ema import EMA
from common.runlog import Means, RunLog, progress, write_json
from ldae import dataset, evaluation, generation, latents, model, posterior_gap, weights
from ldae.aekl import (
    check_split,
    claim_output,
    open_split,
    preparation,
    report_path,
)
from ldae.config import DiffusionConfig, PretrainConfig
from ldae.preprocess import Preparation
from ldae.unet import UNet

KIND = "ldae prior"
COMMAND = "run_cli.py fit --config ldae/config/ldae_pretrain.yaml"
ARCHITECTURE = (
    "base_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_heads", "head_channels",
    "new_attention_order", "dropout", "isotropic", "norm_groups",
)  # fmt: skip
VALIDATION_TIMES = 8  # timesteps of the held-out loss
LATENT_SPACE = (
    "samples and scans are compared as latents: no feature network is involved, so there is no FID here; nearest is "
    "the mean RMS distance to the nearest training latent, of samples over that of held-out scans (near 0: copies)"
)


# ---- the objective --------------------------------------------------------------------------------------------------


def prior_loss(unet, schedule: schedulers.Schedule, z_0, t, noise) -> torch.Tensor:
    """Mean squared error of the predicted noise (or v) of each sample, (B,); z_0, noise (B, C, d, h, w), t (B,)."""
    error = schedulers.training_target(schedule, z_0, t, noise) - unet(schedulers.q_sample(schedule, z_0, t, noise), t)
    return error.float().square().flatten(1).mean(1)


def draw(config: DiffusionConfig, step: int, latent_shape: tuple[int, ...], rt: runtime.Runtime):
    """This rank's timesteps (uniform on 0 .. T-1) and noise of a step.

    Every rank draws the whole global batch from the step's own generator, so N ranks see what one would.
    """
    g = runtime.generator(config.seed, config.stage, step)
    t = torch.randint(0, config.timesteps, (config.batch_size,), generator=g)
    noise = torch.randn((config.batch_size, *latent_shape), generator=g)
    return tuple(runtime.local_slice(x, rt).to(rt.device) for x in (t, noise))


def fixed_table(schedule: schedulers.Schedule, shape: tuple[int, ...], seed: int, scan: str, times: int):
    """Timesteps (K,) over the whole schedule and noise (K, C, d, h, w) of a scan: the same at every validation."""
    t = torch.linspace(0, schedule.T - 1, times).round().long()
    return t, torch.randn((times, *shape), generator=runtime.generator(seed, "validation", scan))


class TrainingLatents(Dataset):
    """Normalised latents (C, d, h, w), another draw of the posterior at every visit; kind "mean": always its mean."""

    def __init__(self, data: latents.Latents, kind: str):
        self.data, self.kind = data, kind

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: tuple[int, int]) -> torch.Tensor:
        return self.data.draw(item) if self.kind == "sample" else self.data[item][0]


# ---- training -------------------------------------------------------------------------------------------------------


def train(config: PretrainConfig, rt: runtime.Runtime) -> None:
    """Train to RUN/checkpoints/best.ckpt (lowest held-out loss of the average); resumes RUN/checkpoints/last.ckpt.

    Deviation (original code): there `best` is picked by the training loss, and stage 3 takes the last weights.
    """
    # ---- data
    training.check_options(config, rt)
    split, (rows, held_out_rows) = open_split(config, rt, "train", "val")
    record, folder = open_latents(config, split.hash, rt), Path(config.latents)
    stats = latent_statistics(config, record, rows)
    data, held_out = (latents.Latents(folder, part, record, stats, seed=config.seed) for part in (rows, held_out_rows))
    aekl = open_aekl(config, record, rt) if config.sample_every else None
    steps_per_epoch = math.ceil(len(rows) / config.batch_size)
    total = config.steps or config.epochs * steps_per_epoch
    last_step = min(total, config.max_steps or total)
    every = {name: getattr(config, name) * steps_per_epoch for name in ("val_every", "sample_every")}

    # ---- model
    torch.manual_seed(config.seed)
    unet = build_unet(config, data.shape).to(rt.device)
    if config.compile:
        unet.compile()
    schedule = schedulers.make_schedule(**schedule_settings(config), prediction=config.prediction)
    schedulers.respace(schedule.T, config.sample_steps, config.spacing)  # a number of steps that there is: said now

    # ---- optimizer and EMA
    optimizer = torch.optim.Adam(unet.parameters(), lr=config.lr, **runtime.fused_optimizer_kwargs(rt.device))
    # Deviation (original code): averaged once per optimizer step, after a warm-up; there once per micro-batch.
    ema = EMA(unet, config.ema_decay, config.ema_start)
    scaler, means = rt.grad_scaler(), Means()

    # ---- resume
    run, best_path, last_path = Path(config.run), config.best_path, config.last_path
    training.claim_run(best_path, last_path, config, rt)
    settings = frozen(config, {"data", "model", "diffusion", "training"})
    settings |= {"seed": config.seed, "precision": config.precision, "aekl": record["aekl"]}
    settings |= {"split": split.hash, "scans": [row.scan for row in rows]}
    objects = {"unet": unet, "ema": ema, "optimizer": optimizer, "scaler": scaler, "means": means}
    step, extra = checkpoint.resume_training(last_path, objects=objects, config=settings)
    best, stale = extra.get("best", math.inf), extra.get("stale", 0)
    if training.is_complete("ldae_pretrain", step, last_step, stale, best_path, config, rt):
        return

    def save_last():
        means.share(rt)
        if rt.is_main:
            extra = {"best": best, "stale": stale}
            checkpoint.save_training(last_path, step=step, objects=objects, config=settings, extra=extra)

    def save_best(scores):
        if rt.is_main:
            save_prior(best_path, ema.module, config, record, stats, split=split.hash, step=step, scores=scores)

    # ---- loop
    network = runtime.wrap_ddp(unet, rt)
    stream = TrainingLatents(data, config.latent)
    batches = runtime.training_batches(stream, config.batch_size, step, config.seed, rt, config.num_workers)
    fingerprint = {"split": split.hash, "aekl": record["aekl"], "train": len(rows), "val": len(held_out_rows)}
    options = training.recorded(config)
    with (
        RunLog(run, options, start_step=step, enabled=rt.is_main, data_fingerprint=fingerprint) as log,
        runtime.StopRequest() as stop,
        progress(last_step, step, "stage 2: prior", enabled=rt.is_main) as bar,
    ):
        if step == 0:
            save_last()  # claims the folder, and a disk that is too small shows now
        while step < last_step and not stop.agree(rt):
            lr = training.set_learning_rate(config.lr * training.learning_rate_factor(config, step, total), optimizer)
            z_batch = next(batches).to(rt.device, non_blocking=True)
            t_batch, noise_batch = draw(config, step, data.shape, rt)
            optimizer.zero_grad(set_to_none=True)
            for z_0, t, noise in runtime.micro_batches(config.accumulate, z_batch, t_batch, noise_batch):
                with rt.autocast():
                    loss = prior_loss(network, schedule, z_0, t, noise).mean()
                scaler.scale(loss / config.accumulate).backward()
                means.add({"loss": loss})
            norms = runtime.update_weights(scaler, config.grad_clip, grad_norm=(optimizer, unet))
            ema.update(unet)
            step += 1
            bar.update()

            if step % config.log_every == 0 or step % steps_per_epoch == 0 or step == total:
                values = training.mean_losses("stage 2", means, step, rt)
                log.log("train", step, epoch=step / steps_per_epoch, lr=lr, **values, **norms)
                bar.set_postfix({name: f"{v:.4f}" for name, v in values.items()})
            if aekl and rt.is_main and (step % every["sample_every"] == 0 or step == total):
                volumes = preview(ema.module, schedule, stats, config, aekl, rt)
                log.image("samples", step, figures.montage(run / "samples" / "latest.png", volumes, window=(0.0, 1.0)))
            if step % every["val_every"] == 0 or step == total:
                scores = held_out_loss(ema.module, schedule, held_out, config, rt)
                log.log("val", step, epoch=step / steps_per_epoch, **scores)
                stale += 1
                if scores["loss"] < best:
                    best, stale = scores["loss"], 0
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
def held_out_loss(unet, schedule, data: latents.Latents, config: DiffusionConfig, rt) -> dict[str, float]:
    """`prior_loss` over all held-out scans at VALIDATION_TIMES timesteps, with the same draws and noise every time.

    loss_q1 .. loss_q4: of the four quarters of the schedule, low noise first.
    """
    was_training = unet.training
    unet.eval()
    found = []
    for index in rt.shard(range(len(data))):
        mu, logvar = data[index]
        scan = data.rows[index].scan
        times, noise = (x.to(rt.device) for x in fixed_table(schedule, mu.shape, config.seed, scan, VALIDATION_TIMES))
        eps = torch.randn(mu.shape, generator=runtime.generator(config.seed, "validation latent", scan))
        z_0 = latents.sample(mu, logvar, eps) if config.latent == "sample" else mu
        with rt.autocast():
            losses = prior_loss(unet, schedule, z_0.to(rt.device).expand_as(noise), times, noise)
        found.append((index, losses.tolist()))
    unet.train(was_training)
    table = np.array([losses for _, losses in sorted(row for part in rt.gather(found) for row in part)])  # (N, K)
    return {"loss": float(table.mean())} | quarters(table.mean(0), "loss")


def quarters(values: np.ndarray, name: str) -> dict[str, float]:
    """Means of the four quarters of a curve (K,) over the schedule."""
    return {f"{name}_q{i}": float(part.mean()) for i, part in enumerate(np.array_split(values, 4), 1)}


# ---- what stages 2 and 3 share --------------------------------------------------------------------------------------


def open_latents(config: DiffusionConfig, split_hash: str | None, rt: runtime.Runtime) -> dict:
    """Record of the cached latents; UserError if they belong to another split."""
    record = latents.read_record(Path(config.latents))
    if split_hash and record["split"] != split_hash:
        raise UserError(f"the latents in {config.latents} are of split {record['split']}, {config.split} is "
                        f"{split_hash}: name the split they belong to, or run {latents.SCRIPT} again")  # fmt: skip
    if (own := Preparation.from_dict(record["preparation"])) != preparation(config):
        rt.print(f"note: volumes are prepared as for the autoencoder of the latents: {own}")
    return record


def latent_statistics(config: PretrainConfig, record: dict, rows: list[dataset.Row]) -> dict[str, torch.Tensor]:
    """Mean (C,) or (C, d, h, w) and SD (C,) that latents are normalised with, from the training scans `rows`."""
    if config.latent_scale == "voxel":
        stats = latents.voxel_statistics(Path(config.latents), rows, record)
    else:
        stats = latents.statistics(record, config.latent_scale)
    return {name: torch.tensor(values) for name, values in stats.items()}


def open_aekl(config: DiffusionConfig, record: dict, rt: runtime.Runtime) -> latents.TrainedAEKL:
    """The autoencoder that made the latents; UserError for another one."""
    aekl = latents.load_aekl(Path(config.aekl), rt, trust_pickle=config.trust_pickle)
    latents.check_maker(record, aekl)
    return aekl


def schedule_settings(config: DiffusionConfig) -> dict:
    """Arguments of schedulers.make_schedule but for the prediction, which is the prior's."""
    ends = {"beta_start": config.beta_start, "beta_end": config.beta_end}
    return {"kind": config.schedule, "T": config.timesteps} | ends


def sampling_settings(config: DiffusionConfig) -> dict:
    """Options of posterior_gap's samplers."""
    return {"spacing": config.spacing, "final": config.final, "clip": config.clip or None}


def build_unet(config: PretrainConfig, latent_shape: tuple[int, ...]) -> UNet:
    """The network for latents (C, d, h, w); UserError for sizes that it cannot have."""
    try:
        unet = UNet(**unet_settings(config, latent_shape[0]), checkpointing=config.checkpointing)
        unet.check_size(latent_shape[1:])
    except ValueError as error:
        raise UserError(f"{error}; choose --base_channels, --channel_mult and heads to fit the latents "
                        f"{tuple(latent_shape)}") from error  # fmt: skip
    return unet


def unet_settings(config: PretrainConfig, channels: int) -> dict:
    """Constructor arguments of the network."""
    return {"in_channels": channels} | {name: getattr(config, name) for name in ARCHITECTURE}


# ---- the trained prior ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedPrior:
    """A frozen prior with what its latents mean: schedule, statistics, autoencoder, preparation, split."""

    model: UNet
    settings: dict
    schedule: schedulers.Schedule
    schedule_settings: dict
    sampling: dict
    stats: dict
    latent_scale: str
    latent_shape: tuple[int, ...]
    preparation: Preparation
    aekl: str  # hash of the autoencoder that made the latents
    hash: str
    split_hash: str | None = None

    def denoiser(self, rt: runtime.Runtime) -> Callable:
        """denoise(z_t, t) for common.schedulers, in the runtime's precision."""

        def denoise(z_t, t):
            with rt.autocast():
                return self.model(z_t, t).float()

        return denoise


def save_prior(path: Path, unet: UNet, config: PretrainConfig, record: dict, stats: dict, **more) -> None:
    """The averaged weights and everything that later stages need."""
    shared = {key: record[key] for key in ("aekl", "preparation", "latent_shape")}
    training.save_network(
        path, KIND, unet.state_dict(), unet_settings(config, record["latent_shape"][0]),
        latents=model.plain(stats), latent_scale=config.latent_scale,
        schedule=schedule_settings(config) | {"prediction": config.prediction}, sampling=sampling_settings(config),
        **shared, **more,
    )  # fmt: skip


def load_prior(path: Path, rt: runtime.Runtime, *, trust_pickle=False, option="--prior") -> TrainedPrior:
    """The prior of a file of stage 2, strictly; UserError if it is missing or anything else.

    Deviation (original code): there a missing prior is only printed, and stage 3 trains on a random frozen network.
    """
    saved = weights.read_network(Path(path), KIND, COMMAND, option, trust_pickle)
    if "network" not in saved:
        raise UserError(f"{path} holds weights without their options; name a file of `python ldae/{COMMAND}` with "
                        f"{option}")  # fmt: skip
    unet = UNet(**saved["config"])
    checkpoint.load_weights(unet, saved["state_dict"], path)
    return TrainedPrior(
        runtime.frozen_network(unet, rt), saved["config"], schedulers.make_schedule(**saved["schedule"]),
        saved["schedule"], saved["sampling"], model.tensors(saved["latents"]), saved["latent_scale"],
        tuple(saved["latent_shape"]), Preparation.from_dict(saved["preparation"]), saved["aekl"],
        checkpoint.weights_hash(unet.state_dict()), saved["split"],
    )  # fmt: skip


@torch.inference_mode()
def sample_latents(denoise, schedule, shape: tuple[int, ...], keys, seed: int, rt, *, steps: int, **how):
    """Normalised latents (1, C, d, h, w), one per key, each from noise of its own, by DPM-Solver++."""
    for key in keys:
        z_T = schedulers.draw_noise([runtime.generator(seed, "synthetic", key)], (1, *shape), rt.device)
        yield posterior_gap.sample(denoise, z_T, schedule, steps, sampler="dpmpp_2m", **how)


def preview(unet: UNet, schedule, stats: dict, config: DiffusionConfig, aekl: latents.TrainedAEKL, rt) -> list:
    """(name, volume (D, H, W)) of n_samples samples, always from the same noise, by a few steps of DPM-Solver++."""
    was_training = unet.training
    unet.eval()

    def denoise(z_t, t):
        with rt.autocast():
            return unet(z_t, t).float()

    made = sample_latents(denoise, schedule, aekl.latent_shape, range(config.n_samples), config.seed, rt,
                          steps=config.sample_steps, **sampling_settings(config))  # fmt: skip
    volumes = [(f"sample {i}", decode(aekl, z, stats, rt)) for i, z in enumerate(made)]
    unet.train(was_training)
    return volumes


def decode(aekl: latents.TrainedAEKL, z_0: torch.Tensor, stats: dict, rt: runtime.Runtime) -> np.ndarray:
    """Volume (D, H, W) of a normalised latent (1, C, d, h, w)."""
    return latents.decode(aekl.model, latents.denormalise(z_0, stats), rt)[0, 0].numpy()


# ---- using the prior ------------------------------------------------------------------------------------------------


def validate(config: PretrainConfig, rt: runtime.Runtime) -> None:
    """Measures of the validation subjects, to RUN/validate.json."""
    measure(config, rt, "validate", "val")


def test(config: PretrainConfig, rt: runtime.Runtime) -> None:
    """Measures of the test subjects, to RUN/test.json."""
    measure(config, rt, "test", "test")


def measure(config: PretrainConfig, rt: runtime.Runtime, verb: str, part: str) -> None:
    """Held-out loss, the round trip of every scan ("LDDIM") beside its controls, and samples against scans."""
    path = report_path(config, verb)
    prior, record, aekl = open_trained(config, rt)
    split, (rows, train_rows) = open_split(config, rt, part, "train")
    check_split(prior, split.hash, config)
    folder = Path(config.latents)
    data, known = (latents.Latents(folder, r, record, prior.stats, seed=config.seed) for r in (rows, train_rows))
    volumes = dataset.Volumes(prior.preparation, config.cache_folder)
    loss = held_out_loss(prior.model, prior.schedule, data, config, rt)
    each = round_trips(prior, aekl, data, volumes, config.sample_steps, rt)
    samples = compare_samples(prior, data, known, config, rt)
    if not rt.is_main:
        return
    groups = [row["subject"] for row in each]
    scores = {name: metrics.summary([row[name] for row in each], groups=groups)
              for name, value in each[0].items() if not isinstance(value, str)}  # fmt: skip
    about = {"stage": config.stage, "part": part, "n": len(rows), "subjects": len(set(groups)), "split": split.hash}
    about |= {"prior": prior.hash, "aekl": prior.aekl, "preparation": prior.preparation.to_dict()}
    meanings = evaluation.definitions(name.partition(".")[2] for name in scores)
    warning = control_warning(scores)
    write_json(path, about | {
        "steps": config.sample_steps, "loss": loss, "scores": scores, "definitions": meanings, "warning": warning,
        "samples": samples, "samples_definition": LATENT_SPACE, "scans": each, "options": training.recorded(config),
    })  # fmt: skip
    mean = {name: value["mean"] for name, value in scores.items()}
    rt.print(f"prior on {len(rows)} scans of {len(set(groups))} {part} subjects: loss {loss['loss']:.4f}; encoded and "
             f"decoded SSIM {mean['lddim.ssim']:.4f} (autoencoder alone {mean['aekl.ssim']:.4f}), SD of z_T "
             f"{mean['lddim.z_std']:.3f}; round trip RMSE {mean['lddim.latent_rmse']:.2e} (network that predicts 0: "
             f"{mean['zero.latent_rmse']:.2e}); samples' SD {samples['samples']['std']:.3f} ({path})")  # fmt: skip
    if warning:
        rt.print(f"warning: {warning}")


@torch.inference_mode()
def round_trips(prior: TrainedPrior, aekl, data: latents.Latents, volumes, steps: int, rt) -> list[dict]:
    """Per scan: image metrics of z_0 -> z_T -> z_0 decoded ("lddim."), of the autoencoder alone ("aekl."), z_T's
    statistics, and the round trip of a network that always predicts 0 ("zero."), which proves how little it says.
    """
    found = []
    for index in rt.shard(range(len(data))):
        row, z_0 = data.rows[index], data[index][0][None].to(rt.device)
        control = posterior_gap.round_trip_control(prior.denoiser(rt), z_0, prior.schedule, steps, **prior.sampling)
        x = volumes.load(row)
        images = {"lddim": control["z_0"], "aekl": z_0}
        values = {"index": index, "scan": row.scan, "subject": row.subject}
        for name, z in images.items():
            image = evaluation.image_metrics(decode(aekl, z, prior.stats, rt), x)
            values |= {f"{name}.{key}": value for key, value in image.items()}
        for name, key in (("lddim", "network"), ("zero", "zero_network")):
            trip = control[key]
            values[f"{name}.latent_rmse"] = trip["rmse"]
            values |= {f"{name}.z_{k}": v for k, v in trip.items() if k != "rmse"}
        found.append(values)
    rows = sorted((row for part in rt.gather(found) for row in part), key=lambda row: row["index"])
    return [{key: value for key, value in row.items() if key != "index"} for row in rows]


def control_warning(scores: dict) -> str:
    """What is to be said if the round trips cannot be told from those of a network that predicts 0; else empty."""
    network, zero = ({"rmse": scores[f"{name}.latent_rmse"]["mean"], "std": scores[f"{name}.z_std"]["mean"]}
                     for name in ("lddim", "zero"))  # fmt: skip
    return posterior_gap.control_warning(network, zero)


@torch.inference_mode()
def compare_samples(prior: TrainedPrior, data: latents.Latents, known: latents.Latents, config, rt) -> dict:
    """As many samples as scans, against these scans' latents and, for copies, against the training latents."""
    mine = rt.shard(range(len(data)))
    made = sample_latents(prior.denoiser(rt), prior.schedule, prior.latent_shape, mine, config.seed, rt,
                          steps=config.sample_steps, **prior.sampling)  # fmt: skip
    made = dict(zip(mine, (z[0].cpu() for z in made), strict=True))
    samples = {index: z for part in rt.gather(made) for index, z in part.items()}
    samples = torch.stack([samples[i] for i in range(len(data))])  # (N, C, d, h, w)
    scans = torch.stack([data[i][0] for i in range(len(data))])
    nearest = torch.full((2, len(data)), math.inf)
    for i in range(len(known)):
        distances = [(x - known[i][0]).square().flatten(1).mean(1).sqrt() for x in (samples, scans)]
        nearest = torch.minimum(nearest, torch.stack(distances))
    of_samples, of_scans = nearest.mean(1).tolist()
    return {
        "n": len(data),
        "samples": posterior_gap.gaussian_statistics(samples), "scans": posterior_gap.gaussian_statistics(scans),
        "mean_image_rmse": (samples.mean(0) - scans.mean(0)).square().mean().sqrt().item(),
        "nearest_of_samples": of_samples, "nearest_of_scans": of_scans, "nearest": of_samples / of_scans,
    }  # fmt: skip


def predict(config: PretrainConfig, rt: runtime.Runtime) -> None:
    """n_samples synthetic volumes on the prepared grid, the middle at 0 mm: OUT/synthetic_<number>.nii.gz."""
    folder = claim_output(config, rt)
    prior, _, aekl = open_trained(config, rt)
    affine, numbers = generation.centred_affine(prior.preparation), range(config.n_samples)
    for number, x in synthesize(prior, aekl, rt.shard(numbers), config, rt):
        nifti.save(folder / f"synthetic_{number:05d}.nii.gz", x, affine)
    rt.barrier()
    if rt.is_main:
        files = [f"synthetic_{number:05d}.nii.gz" for number in numbers]
        about = {"stage": config.stage, "n": len(files), "prior": prior.hash, "aekl": prior.aekl}
        about |= {"split": prior.split_hash, "preparation": prior.preparation.to_dict()}
        about |= {"units": "prepared: 0 background, about 1 bright tissue"}
        write_json(folder / "predict.json", about | {"files": files, "options": training.recorded(config)})
        rt.print(f"{len(files)} synthetic volumes in {folder}")


def synthesize(prior: TrainedPrior, aekl, numbers, config, rt: runtime.Runtime) -> Iterator[tuple[int, np.ndarray]]:
    """(number, volume (D, H, W)); a volume depends on --seed and its number alone."""
    made = sample_latents(prior.denoiser(rt), prior.schedule, prior.latent_shape, numbers, config.seed, rt,
                          steps=config.sample_steps, **prior.sampling)  # fmt: skip
    with progress(len(numbers), 0, "synthesise", enabled=rt.is_main) as bar:
        for number, z_0 in zip(numbers, made, strict=True):
            yield number, decode(aekl, z_0, prior.stats, rt)
            bar.update()


def open_trained(config: PretrainConfig, rt: runtime.Runtime) -> tuple[TrainedPrior, dict, latents.TrainedAEKL]:
    """The prior of --ckpt_path with the latents and the autoencoder that it belongs to."""
    prior = load_prior(Path(config.ckpt_path), rt, trust_pickle=config.trust_pickle, option="--ckpt_path")
    record = latents.read_record(Path(config.latents))
    check_prior(prior, record)
    return prior, record, open_aekl(config, record, rt)


def check_prior(prior: TrainedPrior, record: dict) -> None:
    """UserError unless the prior was trained on latents of this record's autoencoder."""
    if prior.aekl != record["aekl"]:
        raise UserError(f"the prior was trained on latents of autoencoder {prior.aekl}, these are of {record['aekl']}; "
                        "give the matching pair, or train stage 2 again")  # fmt: skip


def dry_run(config: PretrainConfig, rt: runtime.Runtime) -> None:
    """Print the resolved configuration, parameter count, shapes and an estimate of training memory; write nothing."""
    training.check_options(config, rt)
    shape = latent_shape(config)
    local = config.batch_size // rt.world_size // config.accumulate
    with torch.device("meta"):
        unet = build_unet(config, shape)
        z, t = torch.zeros(local, *shape), torch.zeros(local, dtype=torch.long)
        with runtime.SavedBytes() as saved:
            unet(z, t)
    rt.print(json.dumps(training.recorded(config), indent=2))
    rt.print(f"latents {tuple(z.shape)}")
    training.print_memory(unet, saved, ("weights", "gradients", "Adam", "Adam", "EMA"), rt)


def latent_shape(config: DiffusionConfig) -> tuple[int, ...]:
    """(C, d, h, w) of the cached latents; before there are any, of the paper's autoencoder on --shape."""
    if latents.record_path(Path(config.latents)).is_file():
        return tuple(latents.read_record(Path(config.latents))["latent_shape"])
    return 3, *(n // 8 for n in config.shape)
