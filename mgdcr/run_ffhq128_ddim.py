"""Train the unconditional baseline of MGDCR: a diffusion model of short-axis slices without semantic code.

    python mgdcr/run_ffhq128_ddim.py                    # as published: 68 million slices, days on four GPUs
    python mgdcr/run_ffhq128_ddim.py --preset tiny      # the phantom at 64 pixels: minutes on two CPU cores

The same data, budget and U-Net as run_ffhq128.py, without the encoder (Ho et al. 2020, sampled by DDIM). Writes
ROOT/checkpoints/cardiac_ddim/best.ckpt and ROOT/logs/cardiac_ddim; the same command continues from last.ckpt.
Deviation (original code): its unconditional network refers to undefined names and does not run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

from common import cli
from mgdcr.config import PRESETS, DDIMConfig


def main() -> None:
    config = cli.parse(DDIMConfig, description=__doc__, presets=PRESETS["ddim"])

    # torch is imported only now, so that --help and a mistyped flag answer at once
    from common import runtime
    from mgdcr import trainer

    with runtime.start(config.device, config.precision, config.seed) as rt:
        (trainer.dry_run if config.dry_run else trainer.train)(config, rt)


if __name__ == "__main__":
    cli.run(main)
