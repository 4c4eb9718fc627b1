"""The diffusion stages: conditional latent diffusion (ldm, ldm3d), lesion-aware post-training (lapt, lapt3d).

Lee, Kim et al., MICCAI 2025. `noise_loss` is the objective of an LDM; `pixel_terms` is what post-training adds: the
one-step estimate of the clean latent is decoded by the frozen autoencoder and compared with the real image, over the
brain and over the lesion, and segmented by a frozen guide. `train` is the loop of all four stages (entry: main.py).

Latents are encoded on the fly where training items are augmented: a turned image has another latent. Without
augmentation (data.augment=none) every latent is encoded once and read from a cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed
from torch.utils.data import Dataset

from common import checkpoint, figures, runtime, schedulers, training
from common.cache import VolumeCache
from common.cli import UserError, frozen
from common.ema import EMA
from common.runlog import Means, progress
from lapt import dataset, losses, segmentation
from lapt.autoencoder import VQAutoencoder
from lapt.config import DiffusionConfig, LAPTConfig, LDM3DConfig, LDMConfig, VQGANConfig, network_file
from lapt.diffusion import (
    COMMAND,
    KIND,
    TRAINED,
    LatentModel,
    build_conditioner,
    build_model,
    fold,
    load_model,
    read_file,
    save_model,
    unfold,
)
from lapt.unet import UNet, inflate, is_between_slices
from lapt.vqgan import (
    check_finite,
    check_split,
    checked,
    load_vqgan,
    masked_l1,
    mean_or_none,
    open_log,
    rate,
    slice_size,
    spread,
    vqgan_settings,
    with_lesion,
)

GOLDEN = 0.6180339887498949  # multiples of it modulo 1 are spread evenly, however many there are


# ---- the objective --------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """Conditioner and U-Net in one forward, as DistributedDataParallel needs it: ctp, z_t, t -> noise or v."""

    def __init__(self, conditioner: nn.Module, unet: nn.Module):
        super().__init__()
        self.conditioner, self.unet = conditioner, unet

    def forward(self, ctp: torch.Tensor, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.unet(torch.cat([z_t, self.conditioner(ctp)], 1), t)


def noise_loss(model: LatentModel, pred: torch.Tensor, z_0, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the predicted noise, or of v where the model predicts that; a scalar."""
    return (pred.float() - schedulers.training_target(model.schedule, z_0, t, noise)).square().mean()


def pixel_terms(
    model: LatentModel, z_t, z_0, pred, t: torch.Tensor, item: dict, starts: list[int], config: LAPTConfig,
    table: torch.Tensor, guide: segmentation.TrainedGuide | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What post-training adds: "image", "lesion" and with a guide "guide"; scalars.

    Slices z_t, z_0, pred (B·S, C, x, y) of B items of S slices (2D: S = 1); t (B,) on the CPU; item: mri, mask and
    lesion (B, ., X, Y[, Z]); starts: first decoded slice of each item; table (T,) on the CPU: weight of the terms at
    each timestep. Only items of positive weight are decoded.
    """
    names = ("image", "lesion", *(["guide"] if guide else []))
    weight = table[t]
    rows = torch.nonzero(weight)[:, 0]
    if not len(rows):
        return {name: z_t.new_zeros(()) for name in names}
    slices, window = model.slices or 1, getattr(config, "window", 1)
    first = rows * slices + torch.tensor(starts)[rows]
    take = (first[:, None] + torch.arange(window)).flatten().to(z_t.device, non_blocking=True)
    t_taken = t[rows].repeat_interleave(window).to(z_t.device, non_blocking=True)

    z_pred = model.predict_clean(z_t[take], t_taken, pred[take].float())
    x_hat = remember(config)(model.decode, z_pred)
    if config.target == "real":
        x = fold(item["mri"])[take]
    else:
        with torch.no_grad():
            x = model.decode(z_0[take])
    mask, lesion = (fold(item[name])[take] for name in ("mask", "lesion"))
    e = (x_hat - x).square()

    w, share = weight[rows].to(e.device, non_blocking=True), len(rows) / len(t)  # terms are means over all B items
    volumes = [unfold(y, window if model.slices else 0) for y in (e, mask, lesion)]
    if config.reduction == "sample":
        terms = {"image": share * losses.image_term(volumes[0], volumes[1], w),
                 "lesion": share * losses.lesion_term(volumes[0], volumes[2], w)}  # fmt: skip
    else:
        # Deviation (original code): in 3D its image term divides the window's error by the mask of all slices.
        per_slice = w.repeat_interleave(window)
        how = "sum" if model.slices else "batch"
        terms = {"image": losses.image_term(e, mask, per_slice, "batch"),
                 "lesion": losses.lesion_term(e, lesion, per_slice, how)}  # fmt: skip
    if guide:
        logits = remember(config)(guide.logits, unfold(x_hat, window), volumes[1])
        if config.reduction == "sample":
            pairs = zip(logits.split(1), volumes[2].split(1), strict=True)
            terms["guide"] = share * (w * torch.stack([segmentation.objective(*pair, config) for pair in pairs])).mean()
        else:
            terms["guide"] = segmentation.objective(logits, volumes[2], config)
    return terms


def remember(config: DiffusionConfig) -> Callable:
    """run(f, *x) calls f(*x), whose activations are recomputed in the backward pass with training.checkpointing."""
    return partial(recomputed, use_reentrant=False) if config.checkpointing else lambda f, *x: f(*x)


def training_losses(
    denoiser, model: LatentModel, item: dict, t, noise, u, config: DiffusionConfig, table=None, guide=None
) -> dict[str, torch.Tensor]:
    """The objective `loss` and its terms, scalars.

    item: mri, ctp, mask, lesion (B, ., X, Y[, Z]) and, from a cache, the unscaled latent z; t (B,) on the CPU, noise
    (B, S, C, x, y), u (B, 2) uniform numbers for the choice of windows. table None: no pixel terms.
    """
    slices = model.slices or 1
    starts = choose_windows(item["lesion"], u, config) if model.slices and table is not None else [0] * len(t)
    needed = ("ctp", "z" if "z" in item else "mri") if table is None else item.keys()
    item = {name: x.to(noise.device, non_blocking=True) for name, x in item.items() if name in needed}
    z_0 = (
        model.normalise(item["z"].reshape(-1, *item["z"].shape[-3:]))
        if "z" in item
        else model.encode(fold(item["mri"]))
    )
    noise = noise.flatten(0, 1)
    t_slices = t.repeat_interleave(slices).to(noise.device, non_blocking=True)  # one timestep for a whole volume
    z_t = schedulers.q_sample(model.schedule, z_0, t_slices, noise)
    with model.rt.autocast():
        pred = denoiser(fold(item["ctp"]), z_t, t_slices)
    terms = {"noise": noise_loss(model, pred, z_0, t_slices, noise)}
    loss = terms["noise"]
    if table is not None:
        terms |= pixel_terms(model, z_t, z_0, pred, t, item, starts, config, table, guide)
        weights = {"image": config.w_img, "lesion": config.w_les, "guide": getattr(config, "w_seg", 0.0)}
        loss = loss + sum(weight * terms[name] for name, weight in weights.items() if name in terms)
    return {"loss": loss} | terms


def choose_windows(lesion: torch.Tensor, u: torch.Tensor, config: LAPTConfig) -> list[int]:
    """First slice of the decoded window of each volume; lesion (B, 1, X, Y, Z) on the CPU, u (B, 2) uniform."""
    starts = []
    for volume, (on_lesion, which) in zip(lesion, u.tolist(), strict=True):
        bearing = torch.nonzero(volume.sum((0, 1, 2)))[:, 0].tolist() if on_lesion < config.lesion_share else []
        possible = dataset.window_starts(bearing, volume.shape[-1], config.window, config.window_rule)
        starts.append(possible[int(which * len(possible))])
    return starts


def draw(config: DiffusionConfig, T: int, step: int, latent_shape: tuple[int, ...], rt: runtime.Runtime):
    """This rank's timesteps (B,), noise (B, S, C, x, y) and uniform numbers (B, 2) of a step; t and u on the CPU.

    Every rank draws the global batch from the step's own generator, so N ranks see what one would, and plain continued
    training sees what post-training does.
    """
    g = runtime.generator(config.seed, "diffusion", step)
    t = torch.randint(0, T, (config.batch_size,), generator=g)
    noise = torch.randn((config.batch_size, *latent_shape), generator=g)
    u = torch.rand((config.batch_size, 2), generator=g)
    t, noise, u = (runtime.local_slice(x, rt) for x in (t, noise, u))
    return t, noise.to(rt.device), u


# ---- training -------------------------------------------------------------------------------------------------------


def train(config: DiffusionConfig, rt: runtime.Runtime) -> None:
    """Train to RUN/checkpoints/best.ckpt (as training.select says); resumes RUN/checkpoints/last.ckpt.

    best.ckpt is a whole LatentModel with averaged weights, the raw ones beside them; last.ckpt holds what trains.
    """
    # ---- data and model
    training.check_options(config, rt)
    torch.manual_seed(config.seed)
    model = start_model(config, rt)
    check_sampling(config, model.settings)
    source, stage = model.hash, config.stage
    data, held_out = (open_items(config, split, model, config.augment if split == "train" else "none")
                      for split in ("train", "val"))  # fmt: skip
    chosen = spread(len(held_out), config.val_items)
    learned = learned_parts(model, config)
    table, guide = pixel_weights(model, config), open_guide(model, config, rt)
    if config.compile:
        model.unet.compile()
    steps_per_epoch = math.ceil(len(data) / config.batch_size)
    total = config.steps or config.epochs * steps_per_epoch
    last_step = min(total, config.max_steps or total)
    every = {name: getattr(config, name) * steps_per_epoch for name in ("val_every", "sample_every")}
    print_memory(config, model.settings, data.size, rt)

    # ---- optimizer and EMA
    parameters = [p for p in learned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate(config, rt), weight_decay=config.weight_decay,
                                  **runtime.fused_optimizer_kwargs(rt.device))  # fmt: skip
    # Deviation (original code): one average over all that is trained, once per optimizer step; there of the U-Net
    # alone, once per micro-batch, and none in the 2D post-training.
    ema = EMA(learned, config.ema_decay, config.ema_start) if config.ema_decay else None
    scaler, means = rt.grad_scaler(), Means()
    kept = with_parts(model, ema.module) if ema else model  # what is validated and written

    # ---- resume
    best_path, last_path = config.best_path, config.last_path
    training.claim_run(best_path, last_path, config, rt)
    settings = frozen(config, {"data", "model", "loss", "diffusion", "training"})
    settings |= {"seed": config.seed, "precision": config.precision, "source": source}
    settings |= {"guide": guide.hash if guide else None, "cases": [case.name for case in data.cases]}
    objects = {"learned": learned, "optimizer": optimizer, "scaler": scaler, "means": means}
    objects |= {"ema": ema} if ema else {}
    step, extra = checkpoint.resume_training(last_path, objects=objects, config=settings)
    best, stale = extra.get("best", math.inf), extra.get("stale", 0)
    if training.is_complete(stage, step, last_step, stale, best_path, config, rt):
        return
    items = open_latents(config, model, data, extra, rt)
    for name in ("latent_mean", "latent_std"):
        getattr(kept, name).copy_(getattr(model, name))
    found = extra.get("floor")
    if found is None and getattr(config, "floor_steps", 0):
        found = measure_floor(kept, held_out, chosen, config, rt)

    def save_last():
        check_finite(stage, means, step)
        means.share(rt)
        if rt.is_main:
            extra = {"best": best, "stale": stale, "floor": found, "latents": latent_statistics(model)}
            checkpoint.save_training(last_path, step=step, objects=objects, config=settings, extra=extra)

    def save_best(scores):
        if rt.is_main:
            raw = {f"{part}.{name}": value for part in TRAINED for name, value in learned[part].state_dict().items()}
            save_model(best_path, kept, raw_state_dict=raw, step=step, scores=scores, floor=found, source=source,
                       objective=frozen(config, {"loss"}))  # fmt: skip

    # ---- loop
    network = runtime.wrap_ddp(Denoiser(model.conditioner, model.unet), rt)
    batches = runtime.training_batches(items, config.batch_size, step, config.seed, rt, config.num_workers)
    shape = (model.slices or 1, *model.latent_shape(torch.empty(1, 0, *data.size[:2]))[1:])
    fingerprint = {"split": model.intensity.split_hash, "source": source, "train": len(data), "val": len(held_out)}
    with (
        open_log(config, step, fingerprint, rt) as log,
        runtime.StopRequest() as stop,
        progress(last_step, step, stage, enabled=rt.is_main) as bar,
    ):
        if step == 0:
            save_last()  # claims the folder, and a disk that is too small shows now
        while step < last_step and not stop.agree(rt):
            lr = config.learning_rate * training.learning_rate_factor(config, step, total)
            training.set_learning_rate(lr, optimizer)
            batch = {name: x for name, x in next(batches).items() if name in ("mri", "ctp", "mask", "lesion", "z")}
            drawn = draw(config, model.schedule.T, step, shape, rt)
            optimizer.zero_grad(set_to_none=True)
            for *columns, t, noise, u in runtime.micro_batches(config.accumulate, *batch.values(), *drawn):
                item = dict(zip(batch, columns, strict=True))
                terms = training_losses(network, model, item, t, noise, u, config, table, guide)
                scaler.scale(terms["loss"] / config.accumulate).backward()
                means.add(terms)
            means.add(runtime.update_weights(scaler, config.grad_clip, grad_norm=(optimizer, learned)))
            if ema:
                ema.update(learned)
            step += 1
            bar.update()

            if step % config.log_every == 0 or step % steps_per_epoch == 0 or step == total:
                values = training.mean_losses(stage, means, step, rt)
                log.log("train", step, epoch=step / steps_per_epoch, lr=lr, **values)
                bar.set_postfix({name: f"{v:.4g}" for name, v in values.items()})
            if rt.is_main and config.sample_every and (step % every["sample_every"] == 0 or step == total):
                log.image("samples", step, preview(config.run / "samples" / "latest.png", kept, held_out, config))
            if step % every["val_every"] == 0 or step == total:
                scores = validate(kept, held_out, chosen, config, rt)
                log.log("val", step, epoch=step / steps_per_epoch, **scores)
                criterion = scores["score" if config.select == "lesion" else "loss"]
                stale += 1
                if criterion < best or config.select == "last":
                    best, stale = criterion, 0
                    save_best(scores)
                save_last()
                if config.patience and stale >= config.patience:
                    rt.print(f"{stage}: no improvement in {stale} validations, stopped at step {step}")
                    break
            elif config.save_every and step % config.save_every == 0:
                save_last()

        # ---- finish
        save_last()
        if not best_path.exists():
            save_best({})  # cut short before its first validation: still a usable file
        rt.barrier()
    stop.leave(stage, step, last_step, rt)


# ---- where a stage starts -------------------------------------------------------------------------------------------


def start_model(config: DiffusionConfig, rt: runtime.Runtime) -> LatentModel:
    """The model before its first step, on the device; `hash` is that of the file it starts from."""
    if isinstance(config, LAPTConfig):
        model = start_from_ldm(config, rt)
    elif isinstance(config, LDM3DConfig) and config.ldm2d:
        model = start_from_slices(config, rt)
    else:
        model = start_from_autoencoder(config, rt)
    check_split(model.intensity, config, "the earlier stage")
    return model


def start_from_ldm(config: LAPTConfig, rt: runtime.Runtime) -> LatentModel:
    """The trained LDM that is post-trained; UserError for one of slices where volumes are trained, or the reverse."""
    # Deviation (original code): the averaged weights, by which the LDM was chosen; there the raw ones.
    model = load_model(config.ldm, rt, config.trust_pickle, option="paths.ldm=RUN", weights=config.init_weights)
    if config.volumes != bool(model.slices):
        kind = f"volumes of {model.slices} slices" if model.slices else "single slices"
        raise UserError(f"paths.ldm {config.ldm} is a model of {kind}: {config.stage} needs a run of {config.before}")
    model.settings = model.settings | {"stage": config.stage}
    model.unet.set_checkpointing(config.checkpointing)
    return model


def start_from_autoencoder(config: LDMConfig, rt: runtime.Runtime) -> LatentModel:
    """A new denoiser on a trained autoencoder."""
    vqgan = load_vqgan(config.vqgan, rt, trust_pickle=config.trust_pickle)
    # The autoencoder has seen no CTP: how many frames and which maps there are is asked of the prepared data.
    here = dataset.Intensity.of_folder(config.data)
    intensity = replace(vqgan.intensity, time_points=here.time_points, maps=here.maps)
    if config.ctp_window:
        intensity = replace(intensity, ctp_window=config.ctp_window)
    settings = model_settings(config, vqgan.settings, intensity.channels)
    model = build_model(settings, intensity, rt, config.checkpointing)
    checkpoint.load_weights(model.autoencoder, vqgan.model.state_dict(), config.vqgan)
    model.hash = vqgan.hash
    return runtime.frozen_network(model, rt)


def start_from_slices(config: LDM3DConfig, rt: runtime.Runtime) -> LatentModel:
    """The volume model that equals a trained 2D model slice by slice: new layers start as identities.

    Autoencoder, latent scale, schedule, intensities and the sizes of the U-Net are those of the 2D model.
    """
    flat = load_model(config.ldm2d, rt, config.trust_pickle, option="paths.ldm2d=RUN")
    if flat.slices:
        raise UserError(f"paths.ldm2d {config.ldm2d} is a model of volumes: name a run of ldm")
    settings = volume_settings(config, flat.settings)
    model = build_model(settings, flat.intensity, rt, config.checkpointing)
    model.autoencoder.load_state_dict(flat.autoencoder.state_dict())
    own = model.conditioner.rescaler if config.conditioner == "volume" else model.conditioner
    own.load_state_dict(flat.conditioner.state_dict())
    inflate({name: value.cpu() for name, value in flat.unet.state_dict().items()}, model.unet)
    for name in ("latent_mean", "latent_std"):
        getattr(model, name).copy_(getattr(flat, name))
    model.hash = flat.hash
    return runtime.frozen_network(model, rt)


def model_settings(config: LDMConfig, autoencoder: dict, ctp_channels: int) -> dict:
    """Settings of a LatentModel on an autoencoder of these constructor arguments."""
    channels, stages = autoencoder["embed_dim"], len(autoencoder["channel_mult"]) - 1
    names = ("model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "head_channels")
    unet = {"in_channels": channels + ctp_channels, "out_channels": channels, "slices": None}
    settings = {
        "stage": config.stage, "slices": 0, "autoencoder": autoencoder,
        "conditioner": {"in_channels": ctp_channels, "out_channels": ctp_channels, "stages": stages},
        "unet": unet | {name: getattr(config, name) for name in names},
        "schedule": {"kind": config.schedule, "T": config.timesteps, "beta_start": config.beta_start,
                     "beta_end": config.beta_end, "prediction": config.prediction},
        "sampling": {"spacing": config.spacing, "offset": int(config.spacing == "leading"), "final": config.final},
    }  # fmt: skip
    return volume_settings(config, settings) if config.volumes else settings


def volume_settings(config: LDM3DConfig, flat: dict) -> dict:
    """Settings of the volume model for those of a 2D model."""
    slices, conditioner = config.size[2], dict(flat["conditioner"])
    if config.conditioner == "volume":
        conditioner |= {"model_channels": config.conditioner_channels, "slices": slices}
    unet = flat["unet"] | {"slices": slices}
    return flat | {"stage": config.stage, "slices": slices, "conditioner": conditioner, "unet": unet}


def check_sampling(config: DiffusionConfig, settings: dict) -> None:
    """UserError, before the training and not after it, for a test pass of steps that the schedule does not have."""
    how = settings["sampling"]
    schedulers.respace(settings["schedule"]["T"], config.sample_steps, how["spacing"], how["offset"])


def learned_parts(model: LatentModel, config: DiffusionConfig) -> nn.ModuleDict:
    """Conditioner and U-Net, of which what model.trainable names has gradients, and all else of the model has none."""
    learned = nn.ModuleDict({part: getattr(model, part) for part in TRAINED})
    for name, parameter in learned.named_parameters():
        part = name.partition(".")[0]
        parameter.requires_grad_(
            {"all": True, "unet": part == "unet", "inter_slice": is_between_slices(name)}[config.trainable]
        )
    return learned


def with_parts(model: LatentModel, parts: nn.ModuleDict) -> LatentModel:
    """The same model around another conditioner and U-Net."""
    other = LatentModel(model.autoencoder, parts["conditioner"], parts["unet"], settings=model.settings,
                        intensity=model.intensity, rt=model.rt)  # fmt: skip
    return other.to(model.rt.device)


def pixel_weights(model: LatentModel, config: DiffusionConfig) -> torch.Tensor | None:
    """Weight of the pixel terms at each timestep, (T,); None for plain (continued) training of the noise alone."""
    if not isinstance(config, LAPTConfig) or not any((config.w_img, config.w_les, getattr(config, "w_seg", 0.0))):
        return None
    return losses.timestep_weight(model.schedule, config.weighting, snr_gamma=config.snr_gamma, t_max=config.t_max)


def open_guide(model: LatentModel, config: DiffusionConfig, rt: runtime.Runtime) -> segmentation.TrainedGuide | None:
    """The frozen guide; None where its term has no weight. UserError if it knows other intensities than the model."""
    if not getattr(config, "w_seg", 0.0):
        return None
    guide = segmentation.load_guide(config.guide, rt, trust_pickle=config.trust_pickle)
    check_split(guide.intensity, config, "the guide")
    own, other = (intensity.to_dict() for intensity in (model.intensity, guide.intensity))
    differs = [key for key in ("normalisation", "statistics", "stats") if own[key] != other[key]]
    if differs:
        raise UserError(f"the guide {config.guide} was trained on images of other intensities ({', '.join(differs)}): "
                        "train it with the same data.normalisation and statistics, or give loss.w_seg=0")  # fmt: skip
    return guide


# ---- items and latents ----------------------------------------------------------------------------------------------


def open_items(config: DiffusionConfig, split: str, model: LatentModel, augment: str = "none"):
    """Slices or volumes of a split, padded to what the networks take."""
    how = dict(augment=augment, seed=config.seed)
    if not config.volumes:
        return checked(dataset.Slices(config.data, split, model.intensity, multiple=model.multiple, **how))
    check_size(config, model.multiple, model.slices)
    return checked(dataset.Volumes(config.data, split, model.intensity, size=config.size, **how))


def check_size(config: DiffusionConfig, multiple: int, slices: int) -> None:
    """UserError for volumes that the networks cannot take."""
    if any(n % multiple for n in config.size[:2]) or config.size[2] != slices:
        raise UserError(f"data.size {config.size}: the first two must be multiples of {multiple}, the last the "
                        f"{slices} slices of the model")  # fmt: skip


class CachedItems(Dataset):
    """Items that are not augmented, with their unscaled latents "z" (C, x, y) or (Z, C, x, y) from a cache."""

    def __init__(self, data, folder: str, model: LatentModel):
        self.data, self.root, self.cache = data, Path(data.cases[0].folder).parent, VolumeCache(folder)
        about = {"autoencoder": checkpoint.weights_hash(model.autoencoder.state_dict()), "size": list(data.size),
                 "intensity": model.intensity.to_dict()}  # fmt: skip
        self.recipe = json.dumps(about, sort_keys=True)

    def __len__(self) -> int:
        return len(self.data)

    def latent(self, item: dict, compute) -> torch.Tensor:
        """The latent of an item, by `compute()` where the cache does not have it."""
        source, number = self.root / item["case"] / "dwi.npy", item.get("slice", -1)
        return torch.from_numpy(self.cache.get(source, f"{number} {self.recipe}", lambda: compute().numpy()))

    def __getitem__(self, key) -> dict:
        item = self.data[key]
        return item | {"z": self.latent(item, lambda: _changed(item["case"]))}


def _changed(case: str):
    raise UserError(f"{case}: its images or the latent cache changed while the training ran; start the command again")


def open_latents(config: DiffusionConfig, model: LatentModel, data, extra: dict, rt: runtime.Runtime) -> Dataset:
    """The training items, cached latents with them where nothing is augmented; sets the model's latent scale.

    The scale is mean and SD per channel over the whole training set, as the first LDM on an autoencoder measures it.
    """
    known = extra.get("latents")
    measured = getattr(config, "latent_scale", "none") == "training" and not getattr(config, "ldm2d", "")
    items = CachedItems(data, config.cache, model) if config.augment == "none" else data
    if config.augment == "none" or (measured and not known):
        found = encode_all(model, data, items, rt)
        known = known or (found if measured else None)
    if known:
        for name, values in zip(("latent_mean", "latent_std"), (known["mean"], known["std"]), strict=True):
            getattr(model, name).copy_(torch.tensor(values))
    return items


def encode_all(model: LatentModel, data, items, rt: runtime.Runtime) -> dict[str, list[float]]:
    """Mean and SD per channel of the unscaled latents of all items, none augmented; fills the cache of `items`.

    Deviation (original code): no scale is measured there; latents as small as a tenth meet noise of SD 1.
    """
    mine, sums = rt.shard(range(len(data))), []
    with progress(len(mine), 0, "encode", enabled=rt.is_main) as bar:
        for index in mine:
            item = data[index]

            def encode(item=item):
                x = fold(item["mri"][None]).to(model.rt.device)
                z = model.encode_unscaled(x).cpu()
                return z if model.slices else z[0]

            z = items.latent(item, encode) if isinstance(items, CachedItems) else encode()
            z = z.double().reshape(-1, *z.shape[-3:]).transpose(0, 1).flatten(1)  # (C, pixels)
            sums.append((index, z.shape[1], z.sum(1), z.square().sum(1)))
            bar.update()
    parts = sorted((part for parts in rt.gather(sums) for part in parts), key=lambda part: part[0])
    n = sum(part[1] for part in parts)
    mean, square = (torch.stack([part[i] for part in parts]).sum(0) / n for i in (2, 3))
    std = (square - mean.square()).clamp(min=1e-16).sqrt()
    return {"mean": mean.float().tolist(), "std": std.float().tolist()}


def latent_statistics(model: LatentModel) -> dict[str, list[float]]:
    return {"mean": model.latent_mean.tolist(), "std": model.latent_std.tolist()}


# ---- validation -----------------------------------------------------------------------------------------------------


def fixed_times(number: int, times: int, T: int) -> list[int]:
    """Timesteps of validation item `number`: one in each of `times` equal parts of the schedule, always the same."""
    return [int((k + number * GOLDEN % 1) * T / times) for k in range(times)]


def held_out_noise(config: DiffusionConfig, item: dict, shape: tuple[int, ...], key, rt) -> torch.Tensor:
    g = runtime.generator(config.seed, "validation", item["case"], item.get("slice", -1), key)
    return torch.randn(shape, generator=g).to(rt.device)


@torch.inference_mode()
def validate(model: LatentModel, data, indices: list[int], config: DiffusionConfig, rt) -> dict[str, float | None]:
    """Held-out scores over a fixed table of timesteps and noise; the same at every validation.

    loss: noise error. brain, lesion: L1 of the decoded one-step estimates against the real images, normalised units,
    inside the brain and inside the lesions of items that have one. score = brain + lesion, the lesion-aware criterion.
    Deviation (original code): timesteps and noise are drawn anew there, and the noise error alone selects.
    """
    found = []
    for number, index in rt.shard(list(enumerate(indices))):
        item = data[index]
        ctp, x, mask, lesion = (fold(item[name][None]).to(rt.device) for name in ("ctp", "mri", "mask", "lesion"))
        z_0, c = model.encode(x), model.condition(ctp)
        denoise = model.denoiser(c)
        for key, time in enumerate(fixed_times(number, config.val_times, model.schedule.T)):
            noise = held_out_noise(config, item, z_0.shape, key, rt)
            t = torch.full((len(z_0),), time, device=rt.device)
            z_t = schedulers.q_sample(model.schedule, z_0, t, noise)
            pred = denoise(z_t, t)
            x_hat = model.decode(model.predict_clean(z_t, t, pred))
            values = (noise_loss(model, pred, z_0, t, noise), *image_errors(model, x_hat, x, mask, lesion))
            found.append((number, key, *(float(value) for value in values)))
    rows = sorted(row for part in rt.gather(found) for row in part)
    scores = {name: mean_or_none([row[i] for row in rows]) for i, name in enumerate(("loss", "brain", "lesion"), 2)}
    return scores | {"score": scores["brain"] + (scores["lesion"] or 0.0)}


def image_errors(model: LatentModel, x_hat, x, mask, lesion) -> tuple[torch.Tensor, torch.Tensor]:
    """L1 inside the brain and inside the lesion (NaN without one) of one item, given as slices."""
    x_hat, x, mask, lesion = (unfold(y, model.slices) for y in (x_hat, x, mask, lesion))
    return masked_l1(x_hat, x, mask).squeeze(), masked_l1(x_hat, x, lesion).squeeze()


@torch.inference_mode()
def measure_floor(model: LatentModel, data, indices: list[int], config: LAPTConfig, rt) -> dict:
    """Brain and lesion L1 of held-out images after the autoencoder alone ("autoencoder") and of the LDM's samples.

    No post-training gets below the first. Says so, with a warning if it is more than half of the second.
    """
    found = []
    for number, index in rt.shard(list(enumerate(indices))):
        item = data[index]
        ctp, x, mask, lesion = (fold(item[name][None]).to(rt.device) for name in ("ctp", "mri", "mask", "lesion"))
        z_0 = model.encode(x)
        z_T = held_out_noise(config, item, z_0.shape, "floor", rt)
        images = (z_0, model.sample(model.condition(ctp), z_T, config.floor_steps))
        errors = [image_errors(model, model.decode(z), x, mask, lesion) for z in images]
        found.append((number, *(float(value) for pair in errors for value in pair)))
    rows = sorted(row for part in rt.gather(found) for row in part)
    brain_a, lesion_a, brain_l, lesion_l = (mean_or_none([row[i] for row in rows]) for i in range(1, 5))
    report = {"autoencoder": {"brain": brain_a, "lesion": lesion_a}, "ldm": {"brain": brain_l, "lesion": lesion_l},
              "steps": config.floor_steps, "n": len(rows), "units": "L1 of normalised images"}  # fmt: skip
    if lesion_a is None:
        rt.print("the autoencoder's lesion floor is unknown: no validation item has a lesion")
        return report
    rt.print(f"floor of the autoencoder: lesion L1 {lesion_a:.4f}, brain {brain_a:.4f}; the LDM it starts from "
             f"({config.floor_steps} steps): lesion {lesion_l:.4f}, brain {brain_l:.4f}")  # fmt: skip
    if lesion_a > 0.5 * lesion_l:
        rt.print(f"warning: the autoencoder's lesion floor is {lesion_a / lesion_l:.0%} of the LDM's lesion error: "
                 "post-training cannot gain much; train the autoencoder longer")  # fmt: skip
    return report


def preview(path: Path, model: LatentModel, data, config: DiffusionConfig) -> Path:
    """A held-out slice with lesion: CTP, real DWI and ADC, a sample of them; always from the same noise."""
    item = data[with_lesion(data, look_at=8 if model.slices else 64)]
    ctp, x, lesion = (fold(item[name][None]).to(model.rt.device) for name in ("ctp", "mri", "lesion"))
    z_T = held_out_noise(config, item, model.latent_shape(x), "preview", model.rt)
    with torch.inference_mode():
        x_hat = model.decode(model.sample(model.condition(ctp), z_T, config.sample_steps, config.sampler))
    z = int(lesion.flatten(1).sum(1).argmax())
    T, maps = model.intensity.time_points, list(model.intensity.maps)
    pictures = [("CTP, middle of the bolus" if T else maps[0], ctp[z, T // 2])]
    for channel, name in enumerate(("DWI", "ADC")):
        pictures += [(name, x[z, channel]), (f"{name} sample", x_hat[z, channel])]
    pictures = [(name, image[:, :, None].cpu().numpy()) for name, image in pictures]
    return figures.montage(path, pictures, window=model.intensity.bounds, planes=("axial",), unit="normalised")


# ---- using the model ------------------------------------------------------------------------------------------------


def test(config: DiffusionConfig, rt: runtime.Runtime) -> None:
    """Sample the test cases to RUN/samples/<steps>, as sample.py does, and measure them there, as evaluate.py does."""
    from lapt import evaluation, inference
    from lapt.evaluate import Options

    out = config.run / "samples" / str(config.sample_steps)
    report = out / "evaluation" / evaluation.REPORT
    there = report.exists() and not config.overwrite
    rt.barrier()  # every rank has looked before any writes
    if there:
        rt.print(f"the test pass is done ({report}); --overwrite repeats it")
        return
    model = load_model(config.best_path, rt, config.trust_pickle, option="--resume RUN")
    check_split(model.intensity, config, "the model")
    cases = inference.prepared_studies(Path(config.data), "test")
    settings = inference.Settings(steps=config.sample_steps, sampler=config.sampler)
    inference.sample_folder(model, cases, out, settings, rt, overwrite=config.overwrite)
    options = Options(dataroot=config.data, synthetic=str(out), model=str(config.best_path), overwrite=config.overwrite)
    evaluation.evaluate(options, rt)


# ---- --dry_run ------------------------------------------------------------------------------------------------------


def assumed_settings(config: DiffusionConfig) -> dict:
    """Settings of the model: of the earlier stage's file where it is there, otherwise of the paper's networks."""
    known = Path(config.data) / "statistics.json"
    here = dataset.read_statistics(config.data) if known.is_file() else {"time_points": 15, "maps": {}}
    ctp_channels = here["time_points"] + len(here["maps"])

    def of_file(path: str, kind=KIND) -> dict | None:
        there = network_file(path).is_file()
        return read_file(Path(path), kind, COMMAND, "paths", config.trust_pickle)["config"] if there else None

    if isinstance(config, LAPTConfig):
        default = LDM3DConfig(size=config.size) if config.volumes else LDMConfig()
        return of_file(config.ldm) or model_settings(default, vqgan_settings(VQGANConfig()), ctp_channels)
    flat = of_file(config.ldm2d) if isinstance(config, LDM3DConfig) and config.ldm2d else None
    if flat:
        return volume_settings(config, flat)
    autoencoder = of_file(config.vqgan, "lapt vqgan") or vqgan_settings(VQGANConfig())
    return model_settings(config, autoencoder, ctp_channels)


def print_memory(config: DiffusionConfig, settings: dict, size: tuple[int, ...], rt: runtime.Runtime) -> None:
    """Parameter counts, shapes and an estimate of the memory that training takes on one rank."""
    local = max(config.batch_size // rt.world_size // config.accumulate, 1)
    slices = settings["slices"] or 1
    with torch.device("meta"):
        autoencoder = VQAutoencoder(**settings["autoencoder"]).requires_grad_(False)
        unet = UNet(**settings["unet"], checkpointing=config.checkpointing)
        denoiser = Denoiser(build_conditioner(settings["conditioner"]), unet)
        ctp = torch.zeros(local * slices, settings["conditioner"]["in_channels"], *size[:2])
        shape = (settings["unet"]["out_channels"], *(n // autoencoder.factor for n in size[:2]))
        z, t = torch.zeros(local * slices, *shape), torch.zeros(local * slices, dtype=torch.long)
        with runtime.SavedBytes() as saved:
            denoiser(ctp, z, t)
        decoded = torch.zeros(local * getattr(config, "window", 1), *shape, requires_grad=True)
        with runtime.SavedBytes() as saved_d:
            remember(config)(autoencoder.decode, decoded)
    rt.print(f"CTP {tuple(ctp.shape)} and latents {tuple(z.shape)}")
    rt.print("conditioner and U-Net:")
    copies = ("weights", "gradients", "Adam", "Adam") + (("EMA",) if config.ema_decay else ())
    training.print_memory(denoiser, saved, copies, rt)
    if isinstance(config, LAPTConfig):
        rt.print("frozen autoencoder, which decodes every item:")
        training.print_memory(autoencoder, saved_d, ("weights",), rt)


def dry_run(config: DiffusionConfig, rt: runtime.Runtime) -> None:
    """Print the resolved options, parameter counts, shapes and an estimate of training memory; write nothing."""
    training.check_options(config, rt)
    settings = assumed_settings(config)
    rt.print(json.dumps(training.recorded(config), indent=2))
    levels = len(settings["autoencoder"]["channel_mult"]) + len(settings["unet"]["channel_mult"]) - 2
    size = config.size if config.volumes else slice_size(config, 2**levels)
    if config.volumes:
        check_size(config, 2**levels, settings["slices"])
    check_sampling(config, settings)
    print_memory(config, settings, size, rt)
