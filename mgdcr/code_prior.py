"""A prior over semantic codes, the "latent DPM" (Preechakul et al. 2022, section 4): trained, measured, drawn from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common import checkpoint, nifti, runtime, schedulers, training
from common.cli import UserError
from common.runlog import write_json
from mgdcr import diffusion, latents, trainer
from mgdcr.config import LatentDPMConfig
from mgdcr.latent_net import MLPSkipNet

KIND = "mgdcr latent_dpm"
VALIDATION_TIMES = 16  # timesteps of the held-out loss
VALIDATION_CODES = 256  # held-out codes of a validation at most, evenly spaced
CODE_DIM = 512  # of a dry run before there are codes


def make_schedule(beta: float) -> schedulers.Schedule:
    """The noise schedule of codes: the same beta at all 1000 steps."""
    return schedulers.schedule_from_betas(torch.full((diffusion.SCHEDULE.T,), beta, dtype=torch.float64))


def code_loss(network, schedule, z_0: Tensor, t: Tensor, noise: Tensor, kind: str) -> Tensor:
    """Error of the predicted noise of each code, (B,): mean magnitude ("l1") or mean square ("l2").

    z_0, noise (B, k): standardised codes; t (B,).
    """
    error = network(schedulers.q_sample(schedule, z_0, t, noise), t).float() - noise
    return (error.abs() if kind == "l1" else error.square()).mean(1)


# ---- training -------------------------------------------------------------------------------------------------------


class TrainingCodes(Dataset):
    """Standardised codes (k,), asked for by (index, position in the endless stream)."""

    def __init__(self, z: Tensor):
        self.z = z

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, item: tuple[int, int]) -> Tensor:
        return self.z[item[0]]


def train(config: LatentDPMConfig, rt: runtime.Runtime) -> None:
    """Train the MLP on the standardised codes of the training subjects; the loop is `trainer.fit`."""
    # ---- data
    training.check_options(config, rt, intervals=("val_every_samples",))
    codes = latents.load(Path(config.latents))
    z = latents.check_parts(codes, config.latents)

    # ---- model
    torch.manual_seed(config.seed)
    code_dim = z["train"].shape[1]
    settings, schedule = config.network(code_dim), make_schedule(config.beta)
    network = MLPSkipNet(**settings)

    def save(path, average, **more):
        training.save_network(path, KIND, average.state_dict(), settings, mean=codes.mean, std=codes.std,
                              beta=config.beta, prior=codes.prior, split=codes.split_hash, **more)  # fmt: skip

    # ---- task
    fixed = {"latents": codes.hash, "prior": codes.prior}
    fingerprint = fixed | {"train": len(z["train"]), "val": len(z["val"])}
    task = trainer.Task(
        network, TrainingCodes(z["train"]), (code_dim,), fixed, fingerprint,
        loss=lambda net, z_0, t, noise: code_loss(net, schedule, z_0, t, noise, config.loss),
        validate=lambda average: validate(average, schedule, z, config, rt),
        better=trainer.lower_loss, save=save,
    )  # fmt: skip
    trainer.fit(task, config, rt)


@torch.inference_mode()
def validate(network, schedule, z: dict[str, Tensor], config: LatentDPMConfig, rt: runtime.Runtime) -> dict[str, float]:
    """Held-out loss at fixed times and noise, and how drawn codes relate to the training ones, which have SD 1.

    mean_error, std_error: root mean square over the entries. nearest: mean distance of a drawn code to its nearest
    training code, over the same of held-out codes; near 0 means copies.
    """
    t = torch.linspace(0, schedule.T - 1, VALIDATION_TIMES).round().long().to(rt.device)
    held_out = z["val"][trainer.evenly(len(z["val"]), VALIDATION_CODES)]
    losses = []
    for number, code in enumerate(held_out.to(rt.device)):
        noise = torch.randn((len(t), len(code)), generator=runtime.generator(config.seed, "validation", number))
        losses.append(code_loss(network, schedule, code.expand_as(noise), t, noise.to(rt.device), config.loss))
    drawn = draw_codes(network, schedule, *held_out.shape, config.latent_steps, config.seed, rt).cpu()
    exact = "donot_use_mm_for_euclid_dist"  # the fast way rounds distances near 0
    distances = [torch.cdist(x, z["train"], compute_mode=exact) for x in (drawn, held_out)]
    nearest = [d.min(1).values.mean().item() for d in distances]
    return {
        "loss": torch.stack(losses).mean().item(),
        "mean_error": (drawn.mean(0) - z["train"].mean(0)).square().mean().sqrt().item(),
        "std_error": (drawn.std(0) - z["train"].std(0)).square().mean().sqrt().item(),
        "nearest": nearest[0] / nearest[1] if nearest[1] > 0 else math.nan,
    }  # fmt: skip


# ---- drawing --------------------------------------------------------------------------------------------------------


def draw_codes(network, schedule, n: int, code_dim: int, steps: int, seed: int, rt: runtime.Runtime) -> Tensor:
    """Standardised codes 0 .. n-1, (n, k) on the device, by DDIM; the noise of each is of its own seed."""
    z_T = schedulers.draw_noise([runtime.generator(seed, "code", i) for i in range(n)], (n, code_dim), rt.device)
    return schedulers.ddim_sample(network, z_T, schedule, diffusion.timesteps(steps, schedule.T))


@torch.inference_mode()
def sample(config: LatentDPMConfig, rt: runtime.Runtime) -> None:
    """n_samples slices without a patient, (W, H, n) in [0, 1], to OUT, and a record beside it; UserError if it exists.

    A slice depends on --seed and its number alone; ranks share the slices.
    """
    out = Path(config.out)
    if out.exists() and not config.overwrite:
        raise UserError(f"{out} exists: replace it with --overwrite, or name another file with --out")
    network, saved = load_latent_dpm(config.best_path, rt)
    prior = trainer.load_network(Path(config.ckpt), rt, trust_pickle=config.trust_pickle)
    latents.check_prior(prior, saved["prior"], str(config.best_path), config.ckpt)
    mean, std = (saved[name].to(rt.device) for name in ("mean", "std"))
    z = draw_codes(network, make_schedule(saved["beta"]), config.n_samples, len(mean), config.latent_steps,
                   config.seed, rt)  # fmt: skip
    z = latents.restore(z, mean, std)
    found = {}
    for number in rt.shard(range(config.n_samples)):  # one by one: a batch rounds differently
        generator = runtime.generator(config.seed, "slice", number)
        x_T = schedulers.draw_noise(generator, (1, 1, prior.image_size, prior.image_size), rt.device)
        x_0 = diffusion.decode(prior.model, x_T, z[number : number + 1], config.steps)
        found[number] = ((x_0[0, 0].clamp(-1, 1) + 1) / 2).cpu().numpy()
    slices = {number: x for part in rt.gather(found) for number, x in part.items()}
    if rt.is_main:
        stack = np.stack([slices[number].T for number in range(config.n_samples)], -1)  # (W, H, n)
        nifti.save(out, stack.astype(np.float32), np.eye(4))
        record = {"n": config.n_samples, "latent_dpm": saved["hash"], "prior": prior.hash}
        about = {"units": "0 to 1: the prior's intensities", "options": training.recorded(config)}
        write_json(out.with_name(out.name.removesuffix(".gz").removesuffix(".nii") + ".json"), record | about)
        rt.print(f"{config.n_samples} slices ({out})")
    rt.barrier()


def load_latent_dpm(path: Path, rt: runtime.Runtime) -> tuple[MLPSkipNet, dict]:
    """The averaged MLP and everything else in a best.ckpt of `train`; UserError if it is missing or anything else."""
    saved = training.read_network(path, KIND, "latent_dpm.py", "--checkpoints", trust_pickle=False)
    network = MLPSkipNet(**saved["config"])
    checkpoint.load_weights(network, saved["state_dict"], path)
    return runtime.frozen_network(network, rt), saved


def dry_run(config: LatentDPMConfig, rt: runtime.Runtime) -> None:
    """Print the resolved configuration, length, parameter count and an estimate of training memory; write nothing."""
    training.check_options(config, rt, intervals=("val_every_samples",))
    path = Path(config.latents)
    code_dim = latents.load(path).codes.shape[1] if path.is_file() else CODE_DIM
    with torch.device("meta"):
        network = MLPSkipNet(**config.network(code_dim))
        z, t = torch.zeros(config.batch_size, code_dim), torch.zeros(config.batch_size, dtype=torch.long)
        with runtime.SavedBytes() as saved:
            network(z, t)
    rt.print(json.dumps(training.recorded(config), indent=2))
    rt.print(f"{config.total_steps:,} steps of {config.batch_size} codes of {code_dim} numbers")
    training.print_memory(network, saved, ("weights", "gradients", "Adam", "Adam", "EMA"), rt)
