"""Training of noise predictors: the diffusion autoencoder (prior), the unconditional U-Net, and the latent DPM.

All three learn the noise eps in x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps at uniform t (Ho et al. 2020,
equation 14); the autoencoder's encoder learns through the same loss (Preechakul et al. 2022, equation 9). `fit` is the
loop; `train` and `validate` are of the two networks over slices (scripts: run_ffhq128.py, run_ffhq128_ddim.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from common import checkpoint, metrics, runtime, schedulers, training
from common.cli import UserError, frozen
from common.ema import EMA
from common.runlog import Means, RunLog, progress
from mgdcr import dataset, diffusion, intensity, upstream
from mgdcr.config import AutoencConfig, SliceConfig, TrainingConfig
from mgdcr.model import DiffAE, UncondUNet

DIFFAE, DDIM = "mgdcr diffae", "mgdcr ddim"  # kinds of network files
VALIDATION_TIMES = 8  # timesteps of the held-out noise loss
LOSS_MARGIN = 0.02  # relative; the validation's noise losses within it count as equal
CHUNK = 8  # held-out slices at a time, whatever the number of ranks: rounding depends on it


# ---- the networks over slices ---------------------------------------------------------------------------------------


def kind_of(config: SliceConfig) -> str:
    """What the network's file calls itself."""
    return DIFFAE if isinstance(config, AutoencConfig) else DDIM


def script_of(kind: str) -> str:
    """The script that trains a network of this kind."""
    return {DIFFAE: "run_ffhq128.py", DDIM: "run_ffhq128_ddim.py"}[kind]


def build_network(kind: str, settings: dict, checkpointing: bool = False) -> DiffAE | UncondUNet:
    """The network of `config.network()`; UserError for sizes that it cannot have."""
    try:
        return {DIFFAE: DiffAE, DDIM: UncondUNet}[kind](**settings, checkpointing=checkpointing)
    except ValueError as error:
        raise UserError(f"{error}; choose --model_channels, multipliers and --num_heads to fit") from error


def code_of(model: DiffAE | UncondUNet, x_0: Tensor) -> Tensor | None:
    """Semantic code (B, k) of slices (B, 1, H, W), None of a network without one."""
    return model.encode(x_0) if isinstance(model, DiffAE) else None


def noise_loss(network: nn.Module, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the predicted noise of each slice, (B,); x_0, noise (B, 1, H, W), t (B,)."""
    x_t = schedulers.q_sample(diffusion.SCHEDULE, x_0, t, noise)
    return (network(x_t, t, x_0).float() - noise).square().flatten(1).mean(1)


def step_weights(t: Tensor, gamma: float) -> Tensor:
    """Weights (B,) of the noise losses at steps t: min(SNR, gamma) / SNR (Hang et al. 2023, equation 5); 1 of gamma 0.

    An error of the noise moves the estimated slice by 1 / SNR as much: at small steps nearly nothing. Those steps make
    up most of the plain loss, and the code helps at the others.
    """
    if not gamma:
        return torch.ones_like(t, dtype=torch.float32)
    ratio = schedulers.snr(diffusion.SCHEDULE).to(t.device)[t]
    return (ratio.clamp(max=gamma) / ratio).float()


# ---- the loop -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What one training has of its own.

    loss(network, x_0, t, noise) -> (B,); validate(average) -> scores; better(scores, best scores so far) picks the
    network to keep; save(path, average, **more) writes its file; picture(average) -> array (H, W) in [0, 1], if any.
    """

    network: nn.Module
    data: Dataset
    item_shape: tuple[int, ...]
    fixed: dict  # of options and data: what may not change when a run is resumed
    fingerprint: dict
    loss: Callable
    validate: Callable
    better: Callable
    save: Callable
    picture: Callable | None = None


def draw(config: TrainingConfig, step: int, shape: tuple[int, ...], rt: runtime.Runtime):
    """This rank's timesteps (uniform on 0 .. T-1) and noise of a step.

    Every rank draws the whole global batch from the step's own generator, so N ranks see what one would.
    """
    g = runtime.generator(config.seed, config.name, step)
    t = torch.randint(0, diffusion.SCHEDULE.T, (config.batch_size,), generator=g)
    noise = torch.randn((config.batch_size, *shape), generator=g)
    return tuple(runtime.local_slice(x, rt).to(rt.device) for x in (t, noise))


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Of a step (from 0): the schedule's, during the first --warmup_samples less."""
    lr = config.lr
    if config.lr_schedule == "cosine":
        lr = training.falling_cosine(step, config.lr, config.total_steps)
    return lr * min(1.0, (step + 1) * config.batch_size / config.warmup_samples) if config.warmup_samples else lr


def fit(task: Task, config: TrainingConfig, rt: runtime.Runtime) -> None:
    """Train to CHECKPOINTS/best.ckpt for exactly ceil(total_samples / batch_size) steps; resumes last.ckpt.

    Deviation (original code): there the sample budget is not enforced, a run never resumes by itself, and the "best"
    weights are the latest ones. Here a resumed run equals an uninterrupted one bit by bit.
    """
    # ---- optimizer and EMA
    network = task.network.to(rt.device)
    if config.compile:
        network.compile()
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay,
                                  **runtime.fused_optimizer_kwargs(rt.device))  # fmt: skip
    ema = EMA(network, config.ema_decay, config.ema_start)
    scaler, means = rt.grad_scaler(), Means()

    # ---- resume
    run, best_path, last_path = Path(config.run), config.best_path, config.last_path
    training.claim_run(best_path, last_path, config, rt)
    fixed = frozen(config, {"data", "model", "loss", "diffusion", "training"})
    fixed |= {"seed": config.seed, "precision": config.precision} | task.fixed
    if config.lr_schedule == "cosine":
        fixed["total_samples"] = config.total_samples  # the learning rate depends on it
    objects = {"network": network, "ema": ema, "optimizer": optimizer, "scaler": scaler, "means": means}
    step, extra = checkpoint.resume_training(last_path, objects=objects, config=fixed)
    best, stale = extra.get("best"), extra.get("stale", 0)
    total = config.total_steps
    last_step = min(total, config.max_steps or total)
    if training.is_complete(config.label, step, last_step, stale, best_path, config, rt):
        return

    def save_last():
        means.share(rt)
        if rt.is_main:
            extra = {"best": best, "stale": stale}
            checkpoint.save_training(last_path, step=step, objects=objects, config=fixed, extra=extra)

    def save_best(scores):
        if rt.is_main:
            task.save(best_path, ema.module, step=step, samples=step * config.batch_size, scores=scores)

    def due(samples):
        return bool(samples) and (step % config.steps_of(samples) == 0 or step == total)

    # ---- loop
    parallel = runtime.wrap_ddp(network, rt)
    batches = runtime.training_batches(task.data, config.batch_size, step, config.seed, rt, config.num_workers)
    options = training.recorded(config)
    with (
        RunLog(run, options, start_step=step, enabled=rt.is_main, data_fingerprint=task.fingerprint) as log,
        runtime.StopRequest() as stop,
        progress(last_step, step, config.label, enabled=rt.is_main) as bar,
    ):
        if step == 0:
            save_last()  # claims the folder, and a disk that is too small shows now
        while step < last_step and not stop.agree(rt):
            lr = training.set_learning_rate(learning_rate(config, step), optimizer)
            x_batch = next(batches).to(rt.device, non_blocking=True)
            t_batch, noise_batch = draw(config, step, task.item_shape, rt)
            optimizer.zero_grad(set_to_none=True)
            for x_0, t, noise in runtime.micro_batches(config.accumulate, x_batch, t_batch, noise_batch):
                with rt.autocast():
                    loss = task.loss(parallel, x_0, t, noise).mean()
                scaler.scale(loss / config.accumulate).backward()
                means.add({"loss": loss})
            runtime.update_weights(scaler, config.grad_clip, network=(optimizer, network))
            ema.update(network)
            step += 1
            bar.update()

            if step % config.log_every == 0 or step == total:
                values = training.mean_losses(config.label, means, step, rt)
                log.log("train", step, samples=step * config.batch_size, lr=lr, **values)
                bar.set_postfix({name: f"{v:.4f}" for name, v in values.items()})
            if task.picture and rt.is_main and due(config.sample_every_samples):
                log.image("samples", step, task.picture(ema.module))
            if due(config.val_every_samples):
                scores = task.validate(ema.module)
                log.log("val", step, samples=step * config.batch_size, **scores)
                stale += 1
                if best is None or task.better(scores, best):
                    best, stale = scores, 0
                    save_best(scores)
                save_last()
                if config.patience and stale >= config.patience:
                    rt.print(f"{config.label}: no improvement in {stale} validations, stopped at step {step}")
                    break
            elif due(config.save_every_samples):
                save_last()

        # ---- finish
        save_last()
        if not best_path.exists():
            save_best({})  # cut short before its first validation: still a usable file
        rt.barrier()
    stop.leave(config.label, step, last_step, rt)
    if rt.is_main:
        rt.print(f"{config.label}: {step} steps, {step * config.batch_size:,} {config.unit} ({best_path})")


# ---- training on slices ---------------------------------------------------------------------------------------------


def train(config: SliceConfig, rt: runtime.Runtime) -> None:
    """Train the diffusion autoencoder or the unconditional U-Net on the slices of the training subjects."""
    # ---- data
    training.check_options(config, rt, intervals=("val_every_samples",))
    store, split = dataset.open_store(config, rt)
    data = dataset.TrainingSlices(store, split.train, config.image_size, config.augment, config.seed)
    held_out = dataset.Slices(store, split.val, config.image_size)
    shown = evenly(len(held_out), config.val_slices)

    # ---- model
    torch.manual_seed(config.seed)
    kind, settings = kind_of(config), config.network()
    network = build_network(kind, settings, config.checkpointing)
    origin = start_from(network, kind, config) if config.init else ""

    def save(path, average, **more):
        training.save_network(path, kind, average.state_dict(), settings, normaliser=store.normaliser,
                              split=split.hash, data=store.hash, origin=origin, **more)  # fmt: skip

    # ---- task
    fixed = {"split": split.hash, "data": store.hash}
    task = Task(
        network, data, (1, config.image_size, config.image_size), fixed,
        fixed | {"train": len(data), "val": len(held_out), "origin": origin},
        loss=lambda net, x_0, t, noise: step_weights(t, config.snr_gamma) * noise_loss(net, x_0, t, noise),
        validate=lambda average: validate(average, held_out, shown, config, rt),
        better=BETTER[config.select], save=save,
        picture=lambda average: picture(average, held_out, config, rt),
    )  # fmt: skip
    fit(task, config, rt)


def evenly(n: int, wanted: int) -> list[int]:
    """`wanted` of n numbers, evenly spaced; 0: all."""
    if not wanted or wanted >= n:
        return list(range(n))
    return [round((i + 0.5) * n / wanted - 0.5) for i in range(wanted)]


def better_round_trip(scores: dict, best: dict) -> bool:
    """Whether a network is the better prior: by the round trip, of networks that predict the noise about as well.

    The round trip alone says little: predicting the share sqrt(1 - alpha_bar_t) of x_t itself, the best guess for white
    images, takes any slice there and back, to 40 dB with 100 steps. So a noise loss lower by more than LOSS_MARGIN
    wins, a higher one loses, and PSNR decides between; of equals the later network is kept.
    """
    if abs(scores["loss"] - best["loss"]) > LOSS_MARGIN * best["loss"]:
        return scores["loss"] < best["loss"]
    return scores["psnr"] >= best["psnr"]


def lower_loss(scores: dict, best: dict) -> bool:
    return scores["loss"] <= best["loss"]


BETTER = {"psnr": better_round_trip, "loss": lower_loss, "last": lambda scores, best: True}  # of --select


def start_from(model: nn.Module, kind: str, config: SliceConfig) -> str:
    """Load the weights of --init and return their hash; UserError for a network of other sizes."""
    saved = read_network(Path(config.init), kind, "--init", config.trust_pickle)
    checkpoint.load_weights(model, saved["state_dict"], config.init)
    return saved["hash"]


@torch.inference_mode()
def validate(model: DiffAE | UncondUNet, data, numbers: list[int], config: SliceConfig, rt) -> dict[str, float]:
    """Held-out slices `numbers`: PSNR after inversion and decoding, and the noise loss with the same draws every time.

    psnr: dB on [0, 1], mean over slices, --val_steps DDIM steps each way, float32. loss_q1 .. loss_q4: of the four
    quarters of the schedule, low noise first.
    """
    chunks = [numbers[i : i + CHUNK] for i in range(0, len(numbers), CHUNK)]
    found = []
    for chunk in rt.shard(chunks):
        x_0 = torch.stack([data[n] for n in chunk]).to(rt.device)
        again = round_trip(model, x_0, config.val_steps)
        losses = [noise_losses(model, x, n, config.seed, rt) for n, x in zip(chunk, x_0, strict=True)]
        found += [(n, psnr(a, b), loss) for n, a, b, loss in zip(chunk, again, x_0, losses, strict=True)]
    found = sorted((row for part in rt.gather(found) for row in part), key=lambda row: row[0])
    by_time = np.mean([loss for _, _, loss in found], axis=0)  # (K,)
    quarters = by_time.reshape(4, -1).mean(1)
    scores = {"psnr": float(np.mean([value for _, value, _ in found])), "loss": float(by_time.mean())}
    return scores | {f"loss_q{i}": float(value) for i, value in enumerate(quarters, 1)}


def round_trip(model: DiffAE | UncondUNet, x_0: Tensor, steps: int) -> Tensor:
    """Slices (B, 1, H, W) in [-1, 1] after DDIM inversion and decoding with the code of the slice, float32."""
    z = code_of(model, x_0)
    return diffusion.decode(model, diffusion.invert(model, x_0, z, steps), z, steps)


def psnr(x: Tensor, truth: Tensor) -> float:
    """PSNR in dB of two slices in [-1, 1], measured on [0, 1]."""
    return metrics.psnr((x.clamp(-1, 1) + 1) / 2, (truth + 1) / 2, data_range=1.0)


def noise_losses(model: DiffAE | UncondUNet, x_0: Tensor, number: int, seed: int, rt: runtime.Runtime) -> list[float]:
    """Noise losses of a slice (1, H, W) at VALIDATION_TIMES steps over the whole schedule, low noise first."""
    t = torch.linspace(0, diffusion.SCHEDULE.T - 1, VALIDATION_TIMES).round().long().to(rt.device)
    g = runtime.generator(seed, "validation", number)
    noise = torch.randn((VALIDATION_TIMES, *x_0.shape), generator=g).to(rt.device)
    with rt.autocast():
        return noise_loss(model, x_0.expand_as(noise), t, noise).tolist()


@torch.inference_mode()
def picture(model: DiffAE | UncondUNet, data: Dataset, config: SliceConfig, rt: runtime.Runtime) -> np.ndarray:
    """Grid (rows x H, columns x W) in [0, 1], one held-out slice per column, from the same noise at every call.

    Rows: the slice, it after inversion and decoding, decoded from noise (with its code, where the network has one).
    """
    x_0 = torch.stack([data[n] for n in evenly(len(data), min(config.sample_size, len(data)))]).to(rt.device)
    generators = [runtime.generator(config.seed, "picture", i) for i in range(len(x_0))]
    x_T = schedulers.draw_noise(generators, x_0.shape, rt.device)
    drawn = diffusion.decode(model, x_T, code_of(model, x_0), config.sample_steps)
    rows = (x_0, round_trip(model, x_0, config.sample_steps), drawn)
    return grid([[x[0] for x in row] for row in rows])


def grid(rows: list[list[Tensor]]) -> np.ndarray:
    """Pictures (H, W) in [-1, 1] side by side, as one array in [0, 1]."""
    lines = [torch.cat([(x.clamp(-1, 1) + 1) / 2 for x in row], 1) for row in rows]
    return torch.cat(lines).float().cpu().numpy()


# ---- the trained networks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedNetwork:
    """A frozen network over slices: what it was built with, the intensities and the split of its training, its hash."""

    model: DiffAE | UncondUNet
    settings: dict
    normaliser: dict
    hash: str
    split_hash: str | None = None

    @property
    def image_size(self) -> int:
        return self.settings["image_size"]


def load_network(path, rt: runtime.Runtime, kind=DIFFAE, *, trust_pickle=False, option="--ckpt") -> TrainedNetwork:
    """The averaged network of a best.ckpt or of the original's checkpoint, in eval mode and without gradients.

    UserError if the file is missing or holds something else.
    """
    saved = read_network(Path(path), kind, option, trust_pickle)
    model = build_network(kind, saved["config"])
    checkpoint.load_weights(model, saved["state_dict"], path)
    return TrainedNetwork(runtime.frozen_network(model, rt), saved["config"], saved["normaliser"], saved["hash"],
                          saved["split"])  # fmt: skip


def read_network(path: Path, kind: str, option: str, trust_pickle: bool) -> dict:
    """Content of a network file, ours or the original's, with our names of its weights and options."""
    saved = training.read_network(path, kind, script_of(kind), option, trust_pickle)
    if "network" in saved:
        return saved
    found, settings, model = upstream.from_checkpoint(saved, path)
    if f"mgdcr {found}" != kind:
        raise UserError(f"{path} holds a {found} network, not a {kind.removeprefix('mgdcr ')}; name one with {option}")
    state = model.state_dict()
    return {"state_dict": state, "config": settings, "normaliser": {"percentiles": list(intensity.LEGACY)},
            "hash": checkpoint.weights_hash(state), "split": None}  # fmt: skip


def dry_run(config: SliceConfig, rt: runtime.Runtime) -> None:
    """Print the resolved configuration, length, parameter count and an estimate of training memory; write nothing."""
    training.check_options(config, rt, intervals=("val_every_samples",))
    local = config.batch_size // rt.world_size // config.accumulate
    with torch.device("meta"):
        network = build_network(kind_of(config), config.network(), config.checkpointing)
        x, t = torch.zeros(local, 1, config.image_size, config.image_size), torch.zeros(local, dtype=torch.long)
        with runtime.SavedBytes() as saved:
            network(x, t, x)
    rt.print(json.dumps(training.recorded(config), indent=2))
    rt.print(f"{config.total_steps:,} steps of {config.batch_size} slices {tuple(x.shape[1:])}")
    training.print_memory(network, saved, ("weights", "gradients", "Adam", "Adam", "EMA"), rt)
