"""What the trainers share: run folders and records, learning rates and losses, network files, a memory estimate."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from common import checkpoint, runtime
from common.cli import UserError, to_dict
from common.runlog import Means, write_json

# ---- options and run folders ----------------------------------------------------------------------------------------


def check_options(config, rt: runtime.Runtime, batch_option: str = "batch_size", intervals=("val_every",)) -> None:
    """UserError for intervals and batch sizes that no loop can use; `batch_option` names the global batch."""
    batch_size = getattr(config, batch_option)
    for name in (batch_option, "accumulate", "log_every", *intervals):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: must be at least 1")
    if batch_size % (parts := rt.world_size * config.accumulate):
        raise UserError(f"--{batch_option} {batch_size} cannot be shared by {rt.world_size} rank(s) and "
                        f"--accumulate {config.accumulate}: give a multiple of {parts}")  # fmt: skip


def recorded(config) -> dict:
    """All options for config.json, and the stage of configs that have one, from which a run can be started again.

    Paths below --root are written relative to it, others without their folders.
    """
    root = Path(config.root).resolve()

    def plain(value):
        if isinstance(value, list):
            return [plain(item) for item in value]
        if not isinstance(value, str) or not Path(value).is_absolute():
            return value
        path = Path(value).resolve()
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name

    stage = {"stage": config.stage} if hasattr(config, "stage") else {}
    return stage | {name: plain(value) for name, value in to_dict(config).items()}


def claim_run(best_path: Path, last_path: Path, config, rt: runtime.Runtime, more: str = "") -> None:
    """--restart removes the earlier run's checkpoints (and files of pattern `more` beside the best one).

    Weights that no run here has written are not replaced: UserError.
    """
    if config.restart and rt.is_main:
        ours = list(best_path.parent.glob(more)) if more and last_path.exists() else []
        for path in (last_path, best_path, *ours):
            path.unlink(missing_ok=True)
    elif not config.restart and best_path.exists() and not last_path.exists():
        raise UserError(f"{best_path} was not made by a run that can continue (no {last_path}): name another run "
                        "folder, or replace it with --restart")  # fmt: skip
    rt.barrier()


def is_complete(what: str, step: int, last_step: int, stale: int, best_path: Path, config, rt) -> bool:
    """Whether a resumed run has nothing left to do; says so."""
    out_of_patience = bool(config.patience) and stale >= config.patience
    done = best_path.exists() and (step >= last_step or out_of_patience)
    rt.barrier()  # every rank has looked before any writes
    if not done:
        return False
    why = f"no improvement in {stale} validations" if out_of_patience else "more epochs continue it"
    rt.print(f"{what} is complete at step {step} ({best_path}): {why}; --restart begins anew")
    return True


def read_record(path: Path, keys: Iterable[str], remedy: str) -> dict:
    """Content of a JSON record that a script here wrote; UserError (with `remedy`) if it is damaged or lacks `keys`."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        raise UserError(f"{path} is no record of this program; {remedy}")
    return content


def claim_study(options) -> None:
    """Write OUT/options.json of a reproduce.py, whose cohort and runs are kept there.

    UserError if OUT holds a study of other options, for its results would be told as this one's. Only free options,
    --out and --preset may differ; an option that is newer than the study counts as what it is by default.
    """
    free = {f.name for f in fields(options) if f.metadata["free"]} | {"out", "preset"}
    now, usual = ({name: value for name, value in to_dict(o).items() if name not in free}
                  for o in (options, type(options)()))  # fmt: skip
    path = Path(options.out) / "options.json"
    if path.is_file():
        before = usual | read_record(path, (), "delete the folder or name another --out")
        changed = [f"{name} {before[name]} -> {now.get(name)}" for name in before if before[name] != now.get(name)]
        if changed:
            raise UserError(f"{options.out} holds a study of other options ({'; '.join(changed)}): name another --out, "
                            "or delete the folder")  # fmt: skip
    write_json(path, now)


# ---- steps ----------------------------------------------------------------------------------------------------------


def restart_cosine(epoch: int, lr: float, t_0: int, t_mult: int, floor: float) -> float:
    """Learning rate of an epoch (from 0): half cosines from `lr` to `floor` over t_0, t_0·t_mult, ... epochs."""
    length = t_0
    while epoch >= length:
        epoch, length = epoch - length, length * t_mult
    return floor + (lr - floor) * 0.5 * (1 + math.cos(math.pi * epoch / length))


def falling_cosine(step: int, lr: float, total: int) -> float:
    """Learning rate of a step: half a cosine from `lr` to zero at `total`."""
    return lr * 0.5 * (1 + math.cos(math.pi * min(step / total, 1)))


def learning_rate_factor(config, step: int, total: int) -> float:
    """What --lr_schedule multiplies the learning rate with at a step."""
    return falling_cosine(step, 1.0, total) if config.lr_schedule == "cosine" else 1.0


def set_learning_rate(lr: float, *optimizers: torch.optim.Optimizer) -> float:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
    return lr


def mean_losses(what: str, means: Means, step: int, rt: runtime.Runtime) -> dict[str, float]:
    """Losses since the last call, averaged over steps and ranks; UserError if one is not finite."""
    values = {name: rt.mean(value).item() for name, value in means.pop().items()}
    if not all(map(math.isfinite, values.values())):
        raise UserError(f"{what} diverged at step {step}: {values}; try a lower learning rate or gradient "
                        "clipping, with --restart")  # fmt: skip
    return values


class RealAndFake(nn.Module):
    """Both discriminator passes of a step in one forward, as DistributedDataParallel needs it."""

    def __init__(self, discriminator: nn.Module):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, x: torch.Tensor, x_hat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.discriminator(x), self.discriminator(x_hat)


# ---- network files --------------------------------------------------------------------------------------------------


def save_network(path: Path, kind: str, state: dict[str, torch.Tensor], settings: dict, **more) -> None:
    """Weights of a network, the options that rebuild it, the weights' hash, and whatever else belongs to it.

    `kind` is paper and network, such as "il_cldm autoencoder".
    """
    head = {"network": kind, "state_dict": state, "config": settings}
    checkpoint.save(path, head | more | {"hash": checkpoint.weights_hash(state)})


def read_network(path: Path, kind: str, command: str, option: str, trust_pickle: bool) -> dict:
    """Content of a network file, ours or the original's; a UserError names the `command` that makes a missing one."""
    paper, _, name = kind.partition(" ")
    if not path.is_file():
        raise UserError(f"no {name} at {path}; train it with `python {paper}/{command}` or name one with {option}")
    saved = checkpoint.load(path, trust_pickle=trust_pickle)
    if (found := saved.get("network", kind)) != kind:
        a, found = "an" if name[0] in "aeiou" else "a", found.removeprefix(paper + " ")
        raise UserError(f"{path} holds a {found}, not {a} {name}; name one with {option}")
    return saved


# ---- --dry_run ------------------------------------------------------------------------------------------------------


def print_memory(network: nn.Module, saved: runtime.SavedBytes, copies: tuple[str, ...], rt: runtime.Runtime) -> None:
    """One line: parameters, and memory per rank of their float32 `copies` (weights, gradients, ...) and activations."""
    count = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    fixed = 4 * len(copies) * count / 2**30
    activations = saved.total / (2 if rt.autocast_dtype else 1) / 2**30  # autocast keeps most of them in 16 bits
    rt.print(f"{count:,} parameters ({trained:,} trained); about {fixed + activations:.1f} GiB per rank "
             f"({', '.join(dict.fromkeys(copies))} {fixed:.1f}; activations {activations:.1f})")  # fmt: skip
