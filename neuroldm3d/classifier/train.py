"""Train and test a classifier of HC against TLE on real volumes, real and synthetic ones, or synthetic ones alone.

    python neuroldm3d/classifier/train.py                                          # real only
    python neuroldm3d/classifier/train.py --exp mixed --num_synth_samples 1361     # with synthetic volumes
    python neuroldm3d/classifier/train.py --exp syn --num_samples 0 --num_synth_samples 2723
    python neuroldm3d/classifier/train.py --exp cv --folds 5                       # cross-validation by subject
    python neuroldm3d/classifier/train.py --preset smoke                           # phantom of 33x41x33: a minute

Writes ROOT/runs/classifier/EXP: parameters.json (what went in), all_folds_metrics.json, and per fold best_model.pth,
fold_metrics.json, individual_test_performance.csv and files.json. The same command continues. The published sizes
need a GPU: a batch of 128 takes EfficientNetV2-L a minute on a CPU, and an epoch of 2723 volumes has 24.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from neuroldm3d.classifier.config import PRESETS, Config


def main() -> None:
    config = cli.parse(Config, description=__doc__, presets=PRESETS)

    # torch is imported only now, so that --help and a mistyped flag answer at once
    from common import runtime
    from neuroldm3d.classifier import trainer

    with runtime.start(config.device, config.precision, config.seed) as rt:
        (trainer.dry_run if config.dry_run else trainer.train)(config, rt)


if __name__ == "__main__":
    cli.run(main)
