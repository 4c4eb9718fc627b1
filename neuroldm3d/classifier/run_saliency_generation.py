"""Attribution maps of a whole run: every fold's classifier on the test subjects of its own fold.

    python neuroldm3d/classifier/run_saliency_generation.py                                # ROOT/runs/classifier/exp_1
    python neuroldm3d/classifier/run_saliency_generation.py --exp grid/real_2723_syn_50/seed_1

Takes the options of generate_saliency_maps.py, whose outputs it writes to ROOT/runs/classifier/EXP/saliency/fold_K.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from neuroldm3d.classifier.config import RunSaliencyOptions


def main() -> None:
    options = cli.parse(RunSaliencyOptions, description=__doc__)

    # torch is imported only now, so that --help and a mistyped flag answer at once
    from common import runtime
    from neuroldm3d.classifier import saliency

    with runtime.start(options.device, options.precision, options.seed) as rt:
        saliency.explain_run(options, rt)


if __name__ == "__main__":
    cli.run(main)
