"""A prior over semantic codes, so that LDAE can invent brains: a diffusion model whose network is an MLP over y.

z_T and the frozen prior say nothing about y; to synthesise without a scan, y must be drawn too (PDAE, appendix; after
Preechakul et al. 2022, section 3). Codes of the training subjects are normalised by mean and SD per entry, the MLP
learns to denoise them, and a few dozen steps of DDIM draw new ones. `train` is behind scripts/train_code_prior.py.
Deviation (original code): it ships the schedule and a sampling loop that fails, but no network and no training.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from common import checkpoint, runtime, schedulers, training
from common.blocks3d import sinusoidal_embedding
from common.cli import UserError, frozen
from common.ema import EMA
from common.runlog import Means, RunLog, progress
from ldae import codes as code_files

if TYPE_CHECKING:
    from ldae.scripts.train_code_prior import Config

KIND = "ldae code_prior"
COMMAND = "scripts/train_code_prior.py"
UPSTREAM_BETA = 0.008  # constant, for all 1000 steps
VALIDATION_TIMES = 16  # timesteps of the held-out loss
TIME_DIM = 64


class CodeMLP(nn.Module):
    """Noisy codes z_t (B, code_dim) and integer steps t (B,) -> v (or the noise in them), (B, code_dim).

    `layers` hidden layers of `width`, each reading the one before and z_t again (skip), scaled by the time embedding
    and normalised. The last layer starts at 0.
    """

    def __init__(self, *, code_dim: int, width: int, layers: int, dropout: float):
        super().__init__()
        self.code_dim = code_dim
        self.time = nn.Sequential(nn.Linear(TIME_DIM, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        inputs = [code_dim] + [width + code_dim] * (layers - 1)
        self.hidden = nn.ModuleList(nn.Linear(n, width) for n in inputs)
        self.scales = nn.ModuleList(nn.Linear(width, width) for _ in inputs)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in inputs)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width + code_dim, code_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        emb = self.time(sinusoidal_embedding(t, TIME_DIM).to(z_t.dtype))
        h = z_t
        for i, (linear, scale, norm) in enumerate(zip(self.hidden, self.scales, self.norms, strict=True)):
            h = linear(torch.cat([h, z_t], 1) if i else h)
            h = self.dropout(nn.functional.silu(norm(h * (1 + scale(emb)))))
        return self.out(torch.cat([h, z_t], 1))


def make_schedule(kind: str, T: int, prediction: str = "eps") -> schedulers.Schedule:
    """A schedule of kind linear, cosine or upstream, the original's constant beta of 0.008."""
    if kind == "upstream":
        return schedulers.schedule_from_betas(torch.full((T,), UPSTREAM_BETA, dtype=torch.float64), prediction)
    return schedulers.make_schedule(kind, T, prediction=prediction)


def normalise(y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Codes (B, code_dim) with mean and SD per entry, (code_dim,), taken out."""
    return (y - mean) / std.clamp_min(1e-6)


def denormalise(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Inverse of `normalise`."""
    return z * std.clamp_min(1e-6) + mean


def code_prior_loss(model, schedule: schedulers.Schedule, z_0: Tensor, t: Tensor, noise: Tensor, kind="l2") -> Tensor:
    """Error of the prediction for each code, (B,): mean square, or with "l1" (the original's) mean magnitude.

    z_0, noise (B, code_dim): normalised codes; t (B,).
    """
    target = schedulers.training_target(schedule, z_0, t, noise)
    error = model(schedulers.q_sample(schedule, z_0, t, noise), t).to(target.dtype) - target
    return (error.square() if kind == "l2" else error.abs()).mean(1)


# ---- the trained prior ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodePrior:
    """A frozen CodeMLP with its schedule, the statistics of the training codes, and the hash of their LDAE."""

    model: CodeMLP
    schedule: schedulers.Schedule
    mean: Tensor  # (code_dim,)
    std: Tensor
    encoder: str | None
    hash: str
    split_hash: str | None = None

    @property
    def code_dim(self) -> int:
        return self.model.code_dim

    @torch.inference_mode()
    def sample(self, n: int, seed: int, *, first: int = 0, steps: int = 50) -> Tensor:
        """New codes first .. first + n - 1, (n, code_dim) on the device; each depends on seed and number alone."""
        timesteps, made = schedulers.respace(self.schedule.T, steps), []
        for number in range(first, first + n):  # one by one: a batch rounds differently
            generators = [runtime.generator(seed, "code", number)]
            z_T = schedulers.draw_noise(generators, (1, self.code_dim), self.mean.device)
            made.append(schedulers.ddim_sample(self.model, z_T, self.schedule, timesteps))
        return denormalise(torch.cat(made), self.mean, self.std)


def load_code_prior(path: Path, rt: runtime.Runtime, ldae=None, option="--code_prior") -> CodePrior:
    """The prior of a file of train_code_prior.py; UserError for anything else, and for codes of another `ldae`."""
    saved = training.read_network(Path(path), KIND, COMMAND, option, trust_pickle=False)
    model = CodeMLP(**saved["config"])
    checkpoint.load_weights(model, saved["state_dict"], path)
    if ldae is not None and saved["encoder"] != ldae.hash:
        raise UserError(f"{path} was trained on codes of LDAE {saved['encoder']}, but this LDAE is {ldae.hash}; train "
                        f"it again with `python ldae/{COMMAND}`, or give the matching pair")  # fmt: skip
    mean, std = (saved[name].to(rt.device) for name in ("mean", "std"))
    return CodePrior(runtime.frozen_network(model, rt), make_schedule(**saved["schedule"]), mean, std, saved["encoder"],
                     saved["hash"], saved["split"])  # fmt: skip


def compare(samples: Tensor, train: Tensor, held_out: Tensor) -> dict[str, float]:
    """How samples (n, k) relate to normalised codes: moments, and distances that show memorising.

    mean_error, std_error: root mean square over entries against the training codes (SD 1). nearest: mean distance of a
    sample to its nearest training code, over the same of the held-out codes; near 0 means copies.
    """
    moments = {
        "mean_error": (samples.mean(0) - train.mean(0)).square().mean().sqrt().item(),
        "std_error": (samples.std(0) - train.std(0)).square().mean().sqrt().item(),
    }
    nearest = [torch.cdist(x.double(), train.double()).min(1).values.mean().item() for x in (samples, held_out)]
    return moments | {"nearest": nearest[0] / nearest[1] if nearest[1] > 0 else math.nan}


# ---- training -------------------------------------------------------------------------------------------------------


class TrainingCodes(Dataset):
    """Normalised codes (code_dim,), asked for by (index, position in the endless stream)."""

    def __init__(self, z: Tensor):
        self.z = z

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, item: tuple[int, int]) -> Tensor:
        return self.z[item[0]]


def read_codes(config: Config) -> tuple[code_files.Codes, dict[str, Tensor], Tensor, Tensor]:
    """Codes of a folder, normalised by split, and their mean and SD over the training subjects."""
    codes = code_files.load(Path(config.codes))
    parts = {name: torch.from_numpy(codes.values[codes.column("split") == name]).float() for name in ("train", "val")}
    for name, part in parts.items():
        if len(part) < 2:
            raise UserError(f"{config.codes} has {len(part)} {name} codes, at least 2 are needed; export more scans")
    mean, std = parts["train"].mean(0), parts["train"].std(0)
    return codes, {name: normalise(part, mean, std) for name, part in parts.items()}, mean, std


def draw(config: Config, step: int, code_dim: int, rt: runtime.Runtime) -> tuple[Tensor, Tensor]:
    """This rank's timesteps and noise of a step; every rank draws the whole global batch and keeps its slice."""
    g = runtime.generator(config.seed, "code prior", step)
    t = torch.randint(0, config.timesteps, (config.batch_size,), generator=g)
    noise = torch.randn((config.batch_size, code_dim), generator=g)
    return tuple(runtime.local_slice(x, rt).to(rt.device) for x in (t, noise))


def train(config: Config, rt: runtime.Runtime) -> None:
    """Train to RUN/checkpoints/best.ckpt (lowest held-out loss of the average); resumes RUN/checkpoints/last.ckpt."""
    # ---- data
    training.check_options(config, rt)
    codes, z, mean, std = read_codes(config)

    # ---- model
    torch.manual_seed(config.seed)
    settings = {"code_dim": codes.code_dim, "width": config.width, "layers": config.layers, "dropout": config.dropout}
    mlp = CodeMLP(**settings).to(rt.device)
    schedule_settings = {"kind": config.schedule, "T": config.timesteps, "prediction": config.prediction}
    schedule = make_schedule(**schedule_settings)

    # ---- optimizer and EMA
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    ema = EMA(mlp, config.ema_decay, config.ema_start)
    scaler, means = rt.grad_scaler(), Means()

    # ---- resume
    best_path, last_path = (Path(config.run) / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    training.claim_run(best_path, last_path, config, rt)
    fixed = frozen(config, {"model", "diffusion", "training"})
    fixed |= {"seed": config.seed, "precision": config.precision, "codes": codes.hash, "encoder": codes.encoder}
    objects = {"mlp": mlp, "ema": ema, "optimizer": optimizer, "scaler": scaler, "means": means}
    step, extra = checkpoint.resume_training(last_path, objects=objects, config=fixed)
    best, stale = extra.get("best", math.inf), extra.get("stale", 0)
    last_step = min(config.steps, config.max_steps or config.steps)
    if training.is_complete("code prior", step, last_step, stale, best_path, config, rt):
        return

    def save_last():
        means.share(rt)
        if rt.is_main:
            extra = {"best": best, "stale": stale}
            checkpoint.save_training(last_path, step=step, objects=objects, config=fixed, extra=extra)

    def save_best(scores):
        if rt.is_main:
            training.save_network(
                best_path, KIND, ema.module.state_dict(), settings, mean=mean, std=std, encoder=codes.encoder,
                schedule=schedule_settings, split=codes.record["split"],
                codes=codes.hash, n=len(z["train"]), step=step, scores=scores,
            )  # fmt: skip

    # ---- loop
    model = runtime.wrap_ddp(mlp, rt)
    batches = runtime.training_batches(TrainingCodes(z["train"]), config.batch_size, step, config.seed, rt, 0)
    options, fingerprint = training.recorded(config), {"codes": codes.hash, "n": len(z["train"])}
    with (
        RunLog(Path(config.run), options, start_step=step, enabled=rt.is_main, data_fingerprint=fingerprint) as log,
        runtime.StopRequest() as stop,
        progress(last_step, step, "code prior", enabled=rt.is_main) as bar,
    ):
        if step == 0:
            save_last()
        while step < last_step and not stop.agree(rt):
            training.set_learning_rate(training.falling_cosine(step, config.lr, config.steps), optimizer)
            z_batch = next(batches).to(rt.device)
            t_batch, noise_batch = draw(config, step, codes.code_dim, rt)
            optimizer.zero_grad(set_to_none=True)
            for z_0, t, noise in runtime.micro_batches(config.accumulate, z_batch, t_batch, noise_batch):
                with rt.autocast():
                    loss = code_prior_loss(model, schedule, z_0, t, noise, config.loss).mean()
                scaler.scale(loss / config.accumulate).backward()
                means.add({"loss": loss})
            runtime.update_weights(scaler, config.grad_clip, mlp=(optimizer, mlp))
            ema.update(mlp)
            step += 1
            bar.update()

            if step % config.log_every == 0 or step == config.steps:
                log.log("train", step, **training.mean_losses("code prior", means, step, rt))
            if step % config.val_every == 0 or step == config.steps:
                scores = validate(ema.module, schedule, z, config, rt)
                log.log("val", step, **scores)
                stale += 1
                if scores["loss"] < best:
                    best, stale = scores["loss"], 0
                    save_best(scores)
                save_last()
                if config.patience and stale >= config.patience:
                    rt.print(f"code prior: no improvement in {stale} validations, stopped at step {step}")
                    break

        # ---- finish
        save_last()
        if not best_path.exists():
            save_best({})  # cut short before its first validation: still a usable file
        rt.barrier()
    stop.leave("code prior", step, last_step, rt)


@torch.inference_mode()
def validate(model: CodeMLP, schedule, z: dict[str, Tensor], config: Config, rt: runtime.Runtime) -> dict[str, float]:
    """Held-out loss on a fixed table of times and noise, and what as many samples as held-out codes look like."""
    was_training = model.training
    model.eval()
    times = torch.linspace(0, schedule.T - 1, VALIDATION_TIMES).round().long().to(rt.device)
    losses = []
    for index, code in enumerate(z["val"]):
        noise = torch.randn((len(times), len(code)), generator=runtime.generator(config.seed, "validation", index))
        losses.append(code_prior_loss(model, schedule, code.to(times.device).expand_as(noise), times,
                                      noise.to(times.device), config.loss).mean().item())  # fmt: skip
    zero, one = torch.zeros(model.code_dim, device=rt.device), torch.ones(model.code_dim, device=rt.device)
    samples = CodePrior(model, schedule, zero, one, None, "").sample(len(z["val"]), config.seed).cpu()
    model.train(was_training)
    return {"loss": float(np.mean(losses))} | compare(samples, z["train"], z["val"])


def dry_run(config: Config, rt: runtime.Runtime) -> None:
    """Print the resolved configuration and the parameter count; write nothing."""
    training.check_options(config, rt)
    exported = code_files.record_path(Path(config.codes)).is_file()
    code_dim = code_files.load(Path(config.codes)).code_dim if exported else 768
    with torch.device("meta"):
        mlp = CodeMLP(code_dim=code_dim, width=config.width, layers=config.layers, dropout=config.dropout)
        z, t = torch.zeros(config.batch_size, code_dim), torch.zeros(config.batch_size, dtype=torch.long)
        with runtime.SavedBytes() as saved:
            mlp(z, t)
    rt.print(json.dumps(training.recorded(config), indent=2))
    rt.print(f"codes of {code_dim} numbers")
    training.print_memory(mlp, saved, ("weights", "gradients", "Adam", "Adam", "EMA"), rt)
