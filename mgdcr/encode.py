"""Export the semantic codes of all slices and their statistics to latent.ckpt.

    python mgdcr/encode.py                                          # of ROOT/checkpoints/cardiac_autoenc/best.ckpt
    python mgdcr/encode.py --ckpt BEST.ckpt --store STORE.lmdb --out latent.ckpt

Reads the store of lmdb_writer.py and writes, for every slice, the code of the averaged encoder: `conds` (M, k), its
`keys` "subject/frame/slice" and `parts` (train, val, test), and `conds_mean`, `conds_std` (k,), which latent_dpm.py
standardises by. Under torchrun the slices are shared out. Seconds, for the phantom on a CPU too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

from common import cli
from mgdcr.config import EncodeConfig


def main() -> None:
    config = cli.parse(EncodeConfig, description=__doc__)

    # torch is imported only now, so that --help and a mistyped flag answer at once
    from common import runtime
    from mgdcr import latents

    with runtime.start(config.device, config.precision, config.seed) as rt:
        latents.export(config, rt)


if __name__ == "__main__":
    cli.run(main)
