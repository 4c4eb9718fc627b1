"""Train the class-conditional 3D diffusion transformer of NeuroLDM-3D on the latents of VAE/save_latent.py.

    python neuroldm3d/diffusion/train.py                     # DiT-S/4, linear schedule, eps: the published network
    python neuroldm3d/diffusion/train.py --preset smoke      # latents of 8x10x8: three minutes on a CPU
    python neuroldm3d/diffusion/train.py --model_type DiT-B/4 --pad_input --window_size 7 --window_block_indexes 0 2 4

Writes MODEL_DIR/EXPERIMENT_NAME/epoch_best.pth (averaged and raw weights, lowest held-out loss) and continues from
checkpoints/last.pt beside it. The published 10,000 epochs are 6.8 million steps of batch 4: weeks on one GPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from neuroldm3d.diffusion.config import PRESETS, Config


def main() -> None:
    config = cli.parse(Config, description=__doc__, presets=PRESETS)

    # torch is imported only now, so that --help and a mistyped flag answer at once
    from common import runtime
    from neuroldm3d.diffusion import trainer

    with runtime.start(config.device, config.precision, config.seed) as rt:
        (trainer.dry_run if config.dry_run else trainer.train)(config, rt)


if __name__ == "__main__":
    cli.run(main)
