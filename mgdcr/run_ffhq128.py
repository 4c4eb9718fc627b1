"""Train the prior of MGDCR: a diffusion autoencoder of short-axis cardiac slices (the name is the original's).

    python mgdcr/make_phantom.py                        # or your own cines, see README.md
    python mgdcr/lmdb_writer.py                         # their slices, into ROOT/datasets/cardiac_cine_128.lmdb
    python mgdcr/run_ffhq128.py                         # as published: 68 million slices, days on four GPUs
    python mgdcr/run_ffhq128.py --preset tiny           # the phantom at 64 pixels: minutes on two CPU cores
    python mgdcr/run_ffhq128.py --init BEST.ckpt --checkpoints DIR --total_samples 8000000     # fine-tune
    torchrun --nproc_per_node 4 mgdcr/run_ffhq128.py    # the same batches, shared by four GPUs

An encoder sees a slice, a U-Net predicts the noise in it from the noisy slice and the code; both learn together
(Preechakul et al. 2022). Writes ROOT/checkpoints/cardiac_autoenc/best.ckpt (held-out subjects: lowest noise loss; of
about equal ones highest PSNR after inversion and decoding) and ROOT/logs/cardiac_autoenc; the same command continues
from last.ckpt and stops after --total_samples. Next: encode.py for latent.ckpt, LAX_condition/ex8_multi_optimizer.py
for the reconstruction.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

from common import cli
from mgdcr.config import PRESETS, AutoencConfig


def main() -> None:
    config = cli.parse(AutoencConfig, description=__doc__, presets=PRESETS["autoenc"])

    # torch is imported only now, so that --help and a mistyped flag answer at once
    from common import runtime
    from mgdcr import trainer

    with runtime.start(config.device, config.precision, config.seed) as rt:
        (trainer.dry_run if config.dry_run else trainer.train)(config, rt)


if __name__ == "__main__":
    cli.run(main)
