"""Train the KL autoencoder of NeuroLDM-3D on grey-matter maps, from scratch or from --init.

    python neuroldm3d/VAE/train.py --lpips_weights ALEXNET.pth LPIPS.pth    # the published loss
    python neuroldm3d/VAE/train.py --lambda_lpips 0                         # without the perceptual term
    python neuroldm3d/VAE/train.py --preset smoke                           # phantom of 33x41x33: two minutes on a CPU

Loss: reconstruction + 1e-6 KL + 0.6 LPIPS over the slices of three axes. Writes ROOT/runs/vae/best_vae.pth (lowest
held-out loss) and continues from ROOT/runs/vae/checkpoints/last.pt. At 112x136x112 100 epochs are 136,200 steps of two
volumes, two minutes each on a CPU core even without LPIPS: a job for a GPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from neuroldm3d.VAE.config import PRESETS, Config


def main() -> None:
    config = cli.parse(Config, description=__doc__, presets=PRESETS)

    # torch is imported only now, so that --help and a mistyped flag answer at once
    from common import runtime
    from neuroldm3d.VAE import trainer

    with runtime.start(config.device, config.precision, config.seed) as rt:
        (trainer.dry_run if config.dry_run else trainer.train)(config, rt)


if __name__ == "__main__":
    cli.run(main)
