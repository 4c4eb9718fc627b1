"""Attribution maps of a classifier on test subjects: NIfTI in the space of their files, overlays, tables.

    python neuroldm3d/classifier/generate_saliency_maps.py                      # of runs/classifier/exp_1, 50 subjects
    python neuroldm3d/classifier/generate_saliency_maps.py --model_path best_model.pth --csv_path test.csv

Writes OUTPUT_DIR/METHOD/NAME/NAME_METHOD_{attributions.nii.gz,overlay.png,summary.png}, mean maps per class,
attribution_statistics.csv, completeness.csv, region_shares.csv (with region maps) and saliency.json. Subjects of
training and validation are left out. Integrated gradients take 50 passes: twenty seconds a subject on a CPU core, at
115 x 128 x 128.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from neuroldm3d.classifier.config import SaliencyOptions


def main() -> None:
    options = cli.parse(SaliencyOptions, description=__doc__)

    # torch is imported only now, so that --help and a mistyped flag answer at once
    from common import runtime
    from neuroldm3d import dataset
    from neuroldm3d.classifier import saliency

    with runtime.start(options.device, options.precision, options.seed) as rt:
        rows = dataset.read_table(options.csv_path, options.label_column)
        saliency.generate(options, rows, Path(options.model_path), Path(options.output_dir), rt)


if __name__ == "__main__":
    cli.run(main)
