"""Tiny stages in turn, for torchrun: `python -m tests.lapt.rank_stages DATA RUNS OUT WORDS...`."""

import sys
from pathlib import Path

from common import cli
from tests.lapt.stages import again

STAGES = ("vqgan", "guide", "ldm", "lapt3d")


def main():
    data, runs, out, *more = sys.argv[1:]
    for stage in STAGES:
        again(stage, Path(data), Path(runs), Path(out), *more)


if __name__ == "__main__":
    cli.run(main)
