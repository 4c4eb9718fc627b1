"""Train the prior over semantic codes that `generate.py synthesize` draws from.

    python ldae/scripts/save_semantic_latent.py       # the codes of all scans
    python ldae/scripts/train_code_prior.py           # an MLP of 19 million parameters at 768 numbers a code
    python ldae/scripts/train_code_prior.py --preset tiny
    python ldae/scripts/train_code_prior.py --preset upstream      # constant beta 0.008, noise, L1: the original

Reads ROOT/codes, trains on the codes of the training subjects and writes ROOT/runs/code_prior/checkpoints/best.ckpt
(lowest held-out loss); the same command continues a run. Minutes on a GPU; the tiny preset takes seconds on a CPU.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from common.cli import TrainOptions, UserError, option

HERE = Path(__file__).resolve().parents[1]
PRESETS = {
    "paper": {},
    "upstream": dict(schedule="upstream", prediction="eps", loss="l1"),
    "small": dict(width=256, layers=6, steps=20000),
    "tiny": dict(width=128, layers=4, batch_size=64, steps=1000, lr=1e-3, ema_decay=0.99, val_every=200),
}
PRESETS["smoke"] = PRESETS["tiny"]  # design.md's name of it
SCHEDULES = ("linear", "cosine", "upstream")


@dataclass
class Config(TrainOptions):
    seed: int = option(42, "seed of everything random")

    root: str = option(str(HERE), "folder that holds codes/ and runs/", group="paths", free=True)
    codes: str = option("", "codes of save_semantic_latent.py; empty: ROOT/codes", group="paths", free=True)
    run: str = option("", "run folder; empty: ROOT/runs/code_prior", group="paths", free=True)

    width: int = option(1024, "width of the hidden layers", group="model")
    layers: int = option(6, "hidden layers", group="model")
    dropout: float = option(0.0, "dropout in the hidden layers", group="model")

    timesteps: int = option(1000, "length T of the noise schedule", unit="steps", group="diffusion")
    schedule: str = option("cosine", "noise schedule; upstream: beta 0.008 throughout", choices=SCHEDULES,
                           group="diffusion")  # fmt: skip
    prediction: str = option("v", "what the network predicts; the original: eps", choices=("v", "eps"),
                             group="diffusion")  # fmt: skip
    loss: str = option("l2", "error of the prediction; the original's is l1", choices=("l2", "l1"), group="diffusion")

    batch_size: int = option(256, "codes per step, over all ranks and micro-batches", unit="codes", group="training")
    steps: int = option(50000, "length of the training", unit="steps", group="training")
    lr: float = option(1e-4, "learning rate of AdamW, falls to zero by a cosine", group="training")
    weight_decay: float = option(0.01, "weight decay of AdamW", group="training")
    accumulate: int = option(1, "micro-batches per optimizer step", group="training")
    grad_clip: float = option(1.0, "largest gradient norm; 0: no clipping", group="training")
    ema_decay: float = option(0.999, "decay of the averaged weights, per optimizer step", group="training")
    ema_start: int = option(100, "steps for which the average is a plain copy", unit="steps", group="training")
    val_every: int = option(500, "validation interval", unit="steps", group="training")
    patience: int = option(20, "stop after so many validations without improvement; 0: never", group="training",
                           free=True)  # fmt: skip
    log_every: int = option(100, "training log interval", unit="steps", group="training")

    def __post_init__(self):
        if min(self.width, self.layers, self.steps) < 1 or self.timesteps < 2:
            raise UserError("--width, --layers and --steps must be at least 1, --timesteps at least 2")
        if not 0 <= self.ema_decay < 1 or not 0 <= self.dropout < 1:
            raise UserError("--ema_decay and --dropout must be 0 or more and less than 1")
        for name in ("max_steps", "lr", "weight_decay", "grad_clip", "ema_start", "patience", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be 0 or more")
        root = Path(self.root)
        self.codes = self.codes or str(root / "codes")
        self.run = self.run or str(root / "runs" / "code_prior")


def main() -> None:
    config = cli.parse(Config, description=__doc__, presets=PRESETS)

    # torch is imported only now, so that --help and a mistyped flag answer at once
    from common import runtime
    from ldae import code_prior

    with runtime.start(config.device, config.precision, config.seed) as rt:
        (code_prior.dry_run if config.dry_run else code_prior.train)(config, rt)


if __name__ == "__main__":
    cli.run(main)
