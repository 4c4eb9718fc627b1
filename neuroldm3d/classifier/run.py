"""The augmentation study: train every cell of real budgets x synthetic shares x seeds and compare them.

    python neuroldm3d/classifier/run.py                                      # the paper's grid, 3 seeds a cell
    python neuroldm3d/classifier/run.py --budgets 500 --shares 0 50 --synthetic_only 0 --folds 5 --fold_pool held_out
    python neuroldm3d/classifier/run.py --part 1/4                           # a quarter of the cells on this machine
    python neuroldm3d/classifier/run.py --preset smoke                       # phantom of 33x41x33: a few minutes

Takes every option of train.py. Finished cells are skipped, interrupted ones continue. Writes ROOT/runs/classifier/EXP:
CELL/seed_S (see train.py), grid.json, cells.csv, comparisons.csv (DeLong with Holm and Benjamini-Hochberg) and the
figures performance_by_*.png. The paper's grid with its controls and 3 seeds a cell is 87 trainings.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from neuroldm3d.classifier.config import GRID_PRESETS, GridConfig


def main() -> None:
    config = cli.parse(GridConfig, description=__doc__, presets=GRID_PRESETS)

    # torch is imported only now, so that --help and a mistyped flag answer at once
    from common import runtime
    from neuroldm3d.classifier import grid, trainer

    with runtime.start(config.device, config.precision, config.seed) as rt:
        (trainer.dry_run if config.dry_run else grid.run_grid)(config, rt)


if __name__ == "__main__":
    cli.run(main)
