"""The autoencoder stage of LAPT: DWI and ADC slices to a latent of a codebook's vectors, and back.

Training with an adversarial term after Esser et al. 2021 (VQGAN). `vqgan_step` is the training step, `train` the loop
around it (entry script: main.py). Despite the name most of the training is plain L1: the adversarial term starts late.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from common import checkpoint, figures, runtime, training
from common.checkpoint import replacing
from common.cli import UserError, frozen
from common.ema import EMA
from common.lpips import LPIPS
from common.runlog import Means, RunLog, progress, write_json
from lapt import dataset
from lapt.autoencoder import PatchDiscriminator, VQAutoencoder
from lapt.config import VQGANConfig, network_file, sections
from lapt.dataset import Intensity
from lapt.diffusion import read_file
from lapt.losses import hinge_discriminator_loss, vq_generator_loss

KIND = "lapt vqgan"
COMMAND = "main.py --base lapt/configs/vqgan.yaml -t"
ARCHITECTURE = (
    "channels", "channel_mult", "num_res_blocks", "z_channels", "embed_dim", "n_embed", "attention_levels",
    "norm_groups", "modality_separate", "legacy_beta", "beta",
)  # fmt: skip
REVIVAL_SLICES = 32
LOG_COLUMNS = ("loss", "rec", "l2", "codebook", "adversarial", "d_weight", "discriminator", "perceptual")


def vqgan_step(
    model, real_and_fake, x, config, *, lpips=None, scale=1.0, autocast=nullcontext, average: Callable | None = None
) -> dict[str, torch.Tensor]:
    """Accumulate one step's gradients in both networks; returns detached losses.

    x: normalised slices (B, 2, X, Y). Autoencoder: mean|x - x_hat| + l2_weight mean (x - x_hat)² + codebook term +
    adaptive weight times -mean D(x_hat). Discriminator: hinge. `real_and_fake` None: no adversarial terms. `scale`
    multiplies every gradient (loss scaling, micro-batches); `average` makes a gradient that of all ranks.
    """
    with autocast():
        x_hat, codebook_loss = model(x)
    x_hat, codebook_loss = x_hat.float(), codebook_loss.float()
    perceptual = None if lpips is None else lpips(*(images.flatten(0, 1)[:, None] for images in (x_hat, x))).mean()
    fake_logits = None
    if real_and_fake is not None:
        discriminator = runtime.unwrap(real_and_fake).discriminator.requires_grad_(False)
        with autocast():
            fake_logits = discriminator(x_hat).float()
    last_layer = runtime.unwrap(model).last_layer
    losses = vq_generator_loss(
        x, x_hat, codebook_loss, fake_logits, last_layer, codebook_weight=config.codebook_weight,
        disc_weight=config.disc_weight, perceptual=perceptual, perceptual_weight=config.perceptual_weight,
        average=average,
    )  # fmt: skip
    losses["l2"] = (x_hat - x).square().mean()
    losses["loss"] = losses["loss"] + config.l2_weight * losses["l2"]
    (scale * losses["loss"]).backward()
    if real_and_fake is not None:
        discriminator.requires_grad_(True)
        with autocast():
            real_logits, fake_logits = (logits.float() for logits in real_and_fake(x, x_hat.detach()))
        losses["discriminator"] = hinge_discriminator_loss(real_logits, fake_logits)
        (scale * losses["discriminator"]).backward()
    return {name: value.detach() for name, value in losses.items()}


def train(config: VQGANConfig, rt: runtime.Runtime) -> None:
    """Train to RUN/checkpoints/best.ckpt (lowest held-out L1); resumes RUN/checkpoints/last.ckpt."""
    # ---- data
    training.check_options(config, rt)
    intensity = Intensity.of_folder(config.data, config.normalisation, config.statistics)
    data = open_slices(config, "train", intensity, augment=config.augment)
    held_out = open_slices(config, "val", intensity)
    check_sizes(config, data.size)
    chosen = spread(len(held_out), config.val_items)
    steps_per_epoch = math.ceil(len(data) / config.batch_size)
    total = config.steps or config.epochs * steps_per_epoch
    last_step = min(total, config.max_steps or total)
    every = {name: getattr(config, name) * steps_per_epoch for name in ("val_every", "sample_every")}

    # ---- model
    torch.manual_seed(config.seed)
    vqgan, discriminator = build_vqgan(config), build_discriminator(config)
    source = load_init(vqgan, config, rt) if config.init else None
    vqgan.to(rt.device)
    if discriminator:
        discriminator.to(rt.device)
    if config.compile:
        vqgan.compile()
    lpips = build_lpips(config, rt)
    print_memory(config, data.size, rt)

    # ---- optimizer and EMA
    adam = dict(lr=rate(config, rt), betas=(0.5, 0.9), **runtime.fused_optimizer_kwargs(rt.device))
    optimizer = torch.optim.Adam(vqgan.parameters(), **adam)
    pairs = {"grad_norm": (optimizer, vqgan)}
    if discriminator:
        optimizer_d = torch.optim.Adam(discriminator.parameters(), **adam)
        pairs["grad_norm_d"] = (optimizer_d, discriminator)
    ema = EMA(vqgan, config.ema_decay, config.ema_start) if config.ema_decay else None
    scaler, means = rt.grad_scaler(), Means()

    # ---- resume
    best_path, last_path = config.best_path, config.last_path
    training.claim_run(best_path, last_path, config, rt)
    settings = frozen(config, {"data", "model", "loss", "training"})
    settings |= {"seed": config.seed, "precision": config.precision, "init": source}
    settings |= {"intensity": intensity.to_dict(), "cases": [case.name for case in data.cases]}
    objects = {"vqgan": vqgan, "optimizer": optimizer, "scaler": scaler, "means": means}
    objects |= {"discriminator": discriminator, "optimizer_d": optimizer_d} if discriminator else {}
    objects |= {"ema": ema} if ema else {}
    step, extra = checkpoint.resume_training(last_path, objects=objects, config=settings)
    best, stale = extra.get("best", math.inf), extra.get("stale", 0)
    if training.is_complete("vqgan", step, last_step, stale, best_path, config, rt):
        return
    kept = ema.module if ema else vqgan  # what is validated and written

    def save_last():
        check_finite("vqgan", means, step)
        means.share(rt)
        if rt.is_main:
            extra = {"best": best, "stale": stale}
            checkpoint.save_training(last_path, step=step, objects=objects, config=settings, extra=extra)

    def save_best(scores):
        if rt.is_main:
            save_vqgan(best_path, kept, config, intensity, step=step, scores=scores, init=source)

    # ---- loop
    model = runtime.wrap_ddp(vqgan, rt)
    pair = runtime.wrap_ddp(training.RealAndFake(discriminator), rt) if discriminator else None
    batches = runtime.training_batches(data, config.batch_size, step, config.seed, rt, config.num_workers)
    fingerprint = {"split": intensity.split_hash, "train": len(data), "val": len(held_out)}
    with (
        open_log(config, step, fingerprint, rt) as log,
        runtime.StopRequest() as stop,
        progress(last_step, step, "vqgan", enabled=rt.is_main) as bar,
    ):
        if step == 0:
            save_last()  # claims the folder, and a disk that is too small shows now
        while step < last_step and not stop.agree(rt):
            lr = config.learning_rate * training.learning_rate_factor(config, step, total)
            training.set_learning_rate(lr, *(own for own, _ in pairs.values()))
            if config.revive_every and step % config.revive_every == 0 and step <= total // 2:
                revive_codes(vqgan, data, step, config, rt)
            x_batch = next(batches)["mri"].to(rt.device, non_blocking=True)
            for own, _ in pairs.values():
                own.zero_grad(set_to_none=True)
            for (x,) in runtime.micro_batches(config.accumulate, x_batch):
                losses = vqgan_step(model, pair if step >= config.disc_start else None, x, config, lpips=lpips,
                                    scale=scaler.get_scale() / config.accumulate, autocast=rt.autocast,
                                    average=rt.mean)  # fmt: skip
                means.add(losses)
            means.add(runtime.update_weights(scaler, config.grad_clip, **pairs))
            if ema:
                ema.update(vqgan)
            step += 1
            bar.update()

            if step % config.log_every == 0 or step % steps_per_epoch == 0 or step == total:
                columns = dict.fromkeys((*LOG_COLUMNS, *pairs))
                values = columns | training.mean_losses("vqgan", means, step, rt)
                log.log("train", step, epoch=step / steps_per_epoch, lr=lr, **values)
                bar.set_postfix({name: f"{values[name]:.4g}" for name in ("loss", "rec")})
            if rt.is_main and config.sample_every and (step % every["sample_every"] == 0 or step == total):
                log.image("reconstruction", step, draw(config.run / "samples" / "latest.png", kept, held_out, rt))
            if step % every["val_every"] == 0 or step == total:
                scores = evaluate(kept, held_out, chosen, rt)[0]
                log.log("val", step, epoch=step / steps_per_epoch, **scores)
                stale += 1
                if scores["rec"] < best:
                    best, stale = scores["rec"], 0
                    save_best(scores)
                save_last()
                if config.patience and stale >= config.patience:
                    rt.print(f"vqgan: no improvement in {stale} validations, stopped at step {step}")
                    break
            elif config.save_every and step % config.save_every == 0:
                save_last()

        # ---- finish
        save_last()
        if not best_path.exists():
            save_best({})  # cut short before its first validation: still a usable file
        rt.barrier()
    stop.leave("vqgan", step, last_step, rt)


@torch.no_grad()
def revive_codes(vqgan: VQAutoencoder, data: dataset.Slices, step: int, config: VQGANConfig, rt) -> None:
    """Move codebook entries that some training slices do not use onto latent pixels of these, drawn at random.

    Entries start within 1/n_embed of zero. Those that the first latents pass by are never chosen, so never trained.
    """
    codes = vqgan.codebook.embedding.weight
    x = torch.stack([data[i]["mri"] for i in spread(len(data), REVIVAL_SLICES)])
    z = torch.cat([vqgan.encode(part.to(rt.device)).float() for part in x.split(8)])
    unused = torch.ones(len(codes), dtype=torch.bool)
    unused[vqgan.codebook.nearest(z).flatten().cpu()] = False
    pixels = z.movedim(1, -1).flatten(0, -2).cpu()
    drawn = torch.randint(len(pixels), (len(codes),), generator=runtime.generator(config.seed, "codebook", step))
    moved = rt.gather((unused, pixels[drawn]))[0]  # rank 0 decides: rounding must not set ranks apart
    codes.copy_(torch.where(moved[0][:, None], moved[1], codes.cpu()))


# ---- what all stages share ------------------------------------------------------------------------------------------


def rate(config, rt: runtime.Runtime) -> float:
    """The learning rate; says where it comes from if the original's rule is asked for."""
    if config.base_learning_rate:
        local = config.batch_size // rt.world_size // config.accumulate
        rt.print(f"learning rate {config.learning_rate:g} = base {config.base_learning_rate:g} x {local} per rank and "
                 f"micro-batch x {rt.world_size} rank(s) x {config.accumulate} accumulated")  # fmt: skip
    return config.learning_rate


def check_finite(what: str, means: Means, step: int) -> None:
    """UserError if a loss or gradient since the last log row is not finite: such weights replace no good checkpoint."""
    bad = [name for name, value in means.sums.items() if not math.isfinite(value)]
    if bad:
        raise UserError(f"{what} diverged by step {step} ({', '.join(bad)} not finite); last.ckpt is the one before: "
                        "try a lower training.lr or training.grad_clip, with --restart")  # fmt: skip


def check_split(intensity: Intensity, config, what: str) -> None:
    """UserError if a network was trained with another split: its training patients may be tested here."""
    split = dataset.read_statistics(config.data)["split_hash"]
    if intensity.split_hash not in ("", split):
        raise UserError(f"{what} was trained with split {intensity.split_hash}, {config.data} is split {split}: name "
                        "the data it belongs to with paths.data, or train it again")  # fmt: skip


def open_log(config, step: int, fingerprint: dict, rt: runtime.Runtime) -> RunLog:
    """The run's log, and its options once more as a file for --base: RUN/configs/<stage>.yaml."""
    if rt.is_main:
        import yaml

        with replacing(config.run / "configs" / f"{config.stage}.yaml") as file:
            file.write(yaml.safe_dump(sections(config), sort_keys=False, default_flow_style=None).encode())
    options = training.recorded(config)
    return RunLog(config.run, options, start_step=step, enabled=rt.is_main, data_fingerprint=fingerprint)


def checked(data: dataset.Slices | dataset.Volumes):
    """The data set, after a look at every file of its cases; UserError if one is missing, cut off or without MRI."""
    for case in data.cases:
        if not case.has_mri:
            raise UserError(f"{case.name} has no DWI and ADC: move its patient {case.patient} to the list ct_only and "
                            "run lapt/data_split.py --keep_lists")  # fmt: skip
        for name in ("dwi", "adc", "mask", "lesion", *(["ctp"] if data.with_ctp else [])):
            case.slices_first(name)
    return data


def spread(n: int, wanted: int) -> list[int]:
    """`wanted` indices out of n, evenly spaced; 0: all."""
    wanted = min(wanted or n, n)
    return [int((i + 0.5) * n / wanted) for i in range(wanted)]


def groups(data: Dataset, indices: list[int], size: int) -> Iterator[dict]:
    """Collated items of `indices`, not augmented, up to `size` at a time."""
    for start in range(0, len(indices), size):
        yield default_collate([data[i] for i in indices[start : start + size]])


def claim_report(config, rt: runtime.Runtime) -> Path | None:
    """RUN/test.json, or None where it is there already and may not be replaced."""
    path = config.run / "test.json"
    there = path.exists() and not config.overwrite
    rt.barrier()  # every rank has looked before any writes
    if there:
        rt.print(f"the test pass is done ({path}); --overwrite repeats it")
        return None
    return path


def masked_l1(x_hat: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean absolute error inside mask (N, 1, ...) of each of N images (N, C, ...); NaN where the mask is empty."""
    error = ((x_hat - x).abs().mean(1, keepdim=True) * mask).flatten(1).sum(1)
    return error / mask.flatten(1).sum(1)


def mean_or_none(values) -> float | None:
    """Mean of the values that are numbers; None if there is none."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.mean(finite)) if finite else None


# ---- data and networks ----------------------------------------------------------------------------------------------


def open_slices(config: VQGANConfig, split: str, intensity: Intensity, augment: str = "none") -> dataset.Slices:
    factor = 2 ** (len(config.channel_mult) - 1)
    return checked(dataset.Slices(config.data, split, intensity, augment=augment, seed=config.seed, with_ctp=False,
                                  multiple=factor))  # fmt: skip


def vqgan_settings(config: VQGANConfig) -> dict:
    """Constructor arguments of the autoencoder."""
    return {"in_channels": 2, "out_channels": 2} | {name: getattr(config, name) for name in ARCHITECTURE}


def build_vqgan(config: VQGANConfig) -> VQAutoencoder:
    try:
        return VQAutoencoder(**vqgan_settings(config))
    except ValueError as error:
        raise UserError(f"{error}; change model.channels, channel_mult or norm_groups") from error


def build_discriminator(config: VQGANConfig) -> PatchDiscriminator | None:
    """The discriminator; None at disc_weight 0."""
    if not config.disc_weight:
        return None
    return PatchDiscriminator(in_channels=2, channels=config.disc_channels, layers=config.disc_layers)


class ScaledLPIPS(nn.Module):
    """LPIPS of images (N, 1, X, Y) whose values reach from -bound to bound; it expects -1 to 1."""

    def __init__(self, lpips: LPIPS, bound: float):
        super().__init__()
        self.lpips, self.bound = lpips, bound

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.lpips(a / self.bound, b / self.bound)


def build_lpips(config: VQGANConfig, rt: runtime.Runtime) -> ScaledLPIPS | None:
    """The perceptual term of every channel by itself; None at weight 0. UserError if its files are not given."""
    if not config.perceptual_weight:
        return None
    if not config.perceptual_weights:
        raise UserError("the perceptual term needs pretrained VGG16 and LPIPS weights: name the files with "
                        "paths.perceptual_weights, or switch it off with loss.perceptual_weight=0")  # fmt: skip
    bound = 1.0 if config.normalisation == "quantile" else dataset.CLIP_SD
    return ScaledLPIPS(LPIPS("vgg").load(config.perceptual_weights), bound).to(rt.device)


def check_sizes(config: VQGANConfig, size: tuple[int, ...]) -> None:
    """UserError if slices of this size are too small for the discriminator."""
    with torch.device("meta"):
        try:
            if discriminator := build_discriminator(config):
                discriminator.eval()(torch.zeros(1, 2, *size))
        except RuntimeError as error:
            raise UserError(f"slices of {size[0]} x {size[1]} are too small for a discriminator of model.disc_layers "
                            f"{config.disc_layers}: give fewer, or loss.disc_weight=0") from error  # fmt: skip


def load_init(vqgan: VQAutoencoder, config: VQGANConfig, rt: runtime.Runtime) -> str:
    """Fill `vqgan` from paths.init and return the hash of its weights; UserError if it does not fit the options."""
    if network_file(config.init).resolve() == config.best_path.resolve():
        raise UserError(f"paths.init {config.init} is what this run writes: copy it or name another run")
    trained = load_vqgan(Path(config.init), rt, trust_pickle=config.trust_pickle, option="paths.init=RUN")
    checkpoint.load_weights(vqgan, trained.model.state_dict(), config.init)
    return trained.hash


@dataclass(frozen=True)
class TrainedVQGAN:
    """A frozen autoencoder, its constructor arguments, the intensities of its images, the hash of its weights."""

    model: VQAutoencoder
    settings: dict
    intensity: Intensity
    hash: str


def save_vqgan(path: Path, vqgan: VQAutoencoder, config: VQGANConfig, intensity: Intensity, **more) -> None:
    settings = vqgan_settings(config)
    training.save_network(path, KIND, vqgan.state_dict(), settings, intensity=intensity.to_dict(), **more)


def load_vqgan(path: Path | str, rt: runtime.Runtime, *, trust_pickle=False, option="paths.vqgan=RUN") -> TrainedVQGAN:
    """The autoencoder of a run folder or file; UserError if it is missing or anything else."""
    saved = read_file(path, KIND, COMMAND, option, trust_pickle)
    model = VQAutoencoder(**saved["config"])
    checkpoint.load_weights(model, saved["state_dict"], path)
    intensity = Intensity.from_dict(saved["intensity"])
    return TrainedVQGAN(runtime.frozen_network(model, rt), saved["config"], intensity, saved["hash"])


# ---- using the autoencoder ------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(vqgan: VQAutoencoder, data: dataset.Slices, indices: list[int], rt, size: int = 8):
    """(means over slices, values of each slice): L1 over the slice ("rec"), the brain and the lesion, codebook use.

    The lesion's error is the floor below which no later stage can come. Ordered by index, whatever the ranks.
    """
    was_training = vqgan.training
    vqgan.eval()
    found, codes = [], torch.zeros(vqgan.codebook.embedding.num_embeddings, dtype=torch.bool)
    for part in groups(data, mine := rt.shard(indices), size):
        x, mask, lesion = (part[name].to(rt.device) for name in ("mri", "mask", "lesion"))
        with rt.autocast():
            z = vqgan.encode(x)
            z_q, _, used = vqgan.quantize(z)
            x_hat = vqgan.decode_codes(z_q).float()
        codes[used.flatten().cpu()] = True
        columns = [(x_hat - x).abs().flatten(1).mean(1), masked_l1(x_hat, x, mask), masked_l1(x_hat, x, lesion)]
        names = zip(part["case"], part["slice"].tolist(), strict=True)
        for (case, number), values in zip(names, torch.stack(columns, 1).tolist(), strict=True):
            values = (value if math.isfinite(value) else None for value in values)
            found.append({"case": case, "slice": number, **dict(zip(("rec", "brain", "lesion"), values, strict=True))})
    vqgan.train(was_training)
    parts = rt.gather((list(zip(mine, found, strict=True)), codes))
    each = [values for _, values in sorted((pair for part, _ in parts for pair in part), key=lambda pair: pair[0])]
    means = {name: mean_or_none([values[name] for values in each]) for name in ("rec", "brain", "lesion")}
    used = torch.stack([codes for _, codes in parts]).any(0)
    return means | {"codes_used": used.float().mean().item()}, each


def draw(path: Path, vqgan: VQAutoencoder, data: dataset.Slices, rt: runtime.Runtime) -> Path:
    """DWI and ADC of one slice, with lesion if the first cases have one, beside its reconstruction."""
    was_training = vqgan.training
    vqgan.eval()
    item = data[with_lesion(data)]
    x = item["mri"][None].to(rt.device)
    with torch.inference_mode(), rt.autocast():
        x_hat = vqgan.decode(vqgan.encode(x)).float()
    vqgan.train(was_training)
    pictures = []
    for channel, name in enumerate(("DWI", "ADC")):
        for suffix, images in (("", x), (" decoded", x_hat)):
            pictures.append((name + suffix, images[0, channel, :, :, None].cpu().numpy()))
    return figures.montage(path, pictures, window=data.intensity.bounds, planes=("axial",), unit="normalised")


def with_lesion(data: Dataset, look_at: int = 64) -> int:
    """Index of the item with most lesion among some, evenly spaced."""
    return max(spread(len(data), look_at), key=lambda i: data[i]["lesion"].sum().item())


def test(config: VQGANConfig, rt: runtime.Runtime) -> None:
    """Reconstruction errors of the test slices, to RUN/test.json."""
    if (path := claim_report(config, rt)) is None:
        return
    trained = load_vqgan(config.best_path, rt, trust_pickle=config.trust_pickle, option="--resume RUN")
    check_split(trained.intensity, config, "the autoencoder")
    data = open_slices(config, "test", trained.intensity)
    means, each = evaluate(trained.model, data, list(range(len(data))), rt)
    if rt.is_main:
        about = {"stage": config.stage, "model": trained.hash, "split": trained.intensity.split_hash, "n": len(each),
                 "cases": len(data.cases), "units": "L1 of normalised images, mean over slices",
                 "normalisation": trained.intensity.to_dict()}  # fmt: skip
        write_json(path, about | {"scores": means, "slices": each, "options": training.recorded(config)})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in means.items() if value is not None)
        rt.print(f"vqgan on {len(each)} slices of {len(data.cases)} test cases: L1 {shown} ({path})")


def print_memory(config: VQGANConfig, size: tuple[int, ...], rt: runtime.Runtime) -> None:
    """Parameter counts and an estimate of the memory that training takes on one rank."""
    local = max(config.batch_size // rt.world_size // config.accumulate, 1)
    with torch.device("meta"):
        vqgan, discriminator = build_vqgan(config), build_discriminator(config)
        x = torch.zeros(local, 2, *size)
        with runtime.SavedBytes() as saved:
            x_hat, _ = vqgan(x)
        z = vqgan.encode(x)
        if discriminator:
            with runtime.SavedBytes() as saved_d:
                discriminator.eval()(x)
                discriminator(x_hat.detach())
    rt.print(f"slices {tuple(x.shape)} -> latents {tuple(z.shape)} -> {tuple(x_hat.shape)}")
    copies = ("weights", "gradients", "Adam", "Adam")
    rt.print("autoencoder:")
    training.print_memory(vqgan, saved, copies + (("EMA",) if config.ema_decay else ()), rt)
    if discriminator:
        rt.print("discriminator:")
        training.print_memory(discriminator, saved_d, copies, rt)


def slice_size(config, multiple: int) -> tuple[int, int]:
    """(X, Y) of the padded slices of the prepared data; before there are any, the original's 192 x 224."""
    if (Path(config.data) / "statistics.json").is_file():
        return dataset.padded_size(dataset.read_statistics(config.data)["shape"][:2], multiple)
    return dataset.padded_size((192, 224), multiple)


def dry_run(config: VQGANConfig, rt: runtime.Runtime) -> None:
    """Print the resolved options, parameter counts, shapes and an estimate of training memory; write nothing."""
    training.check_options(config, rt)
    size = slice_size(config, 2 ** (len(config.channel_mult) - 1))
    check_sizes(config, size)
    rt.print(json.dumps(training.recorded(config), indent=2))
    print_memory(config, size, rt)
