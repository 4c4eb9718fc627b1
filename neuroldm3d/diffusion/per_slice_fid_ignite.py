"""The original's name of per_slice_fid.py, which has no need of pytorch-ignite; same options, same results."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from neuroldm3d.diffusion.per_slice_fid import main

if __name__ == "__main__":
    cli.run(main)
