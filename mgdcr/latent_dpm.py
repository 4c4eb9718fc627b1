"""Draw cardiac slices without a patient: a diffusion model over semantic codes feeds the decoder of the prior.

    python mgdcr/encode.py                                  # the codes
    python mgdcr/latent_dpm.py                              # 101 million codes, an MLP of 54 million parameters
    python mgdcr/latent_dpm.py --preset tiny                # half a minute on a CPU
    python mgdcr/latent_dpm.py --preset tiny --sample --n_samples 16

Codes of the training subjects are standardised, and an MLP that reads the code again in every layer learns the noise in
them: L1 error, constant beta of 0.008, AdamW (Preechakul et al. 2022, section 4 and appendix A.1). Writes
ROOT/checkpoints/cardiac_latent_dpm/best.ckpt (lowest held-out loss); the same command continues. --sample draws codes
by DDIM, decodes each from noise of its own and writes them as one NIfTI of n slices, in [0, 1], to --out.
Research use only: the images are synthetic.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

from common import cli
from mgdcr.config import PRESETS, LatentDPMConfig


def main() -> None:
    config = cli.parse(LatentDPMConfig, description=__doc__, presets=PRESETS["latent_dpm"])

    # torch is imported only now, so that --help and a mistyped flag answer at once
    from common import runtime
    from mgdcr import code_prior

    with runtime.start(config.device, config.precision, config.seed) as rt:
        run = code_prior.dry_run if config.dry_run else code_prior.sample if config.sample else code_prior.train
        run(config, rt)


if __name__ == "__main__":
    cli.run(main)
