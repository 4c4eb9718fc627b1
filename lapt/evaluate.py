"""Measure samples against the real DWI and ADC: image quality, lesions, detection of the core, realism of slices.

    python lapt/evaluate.py --synthetic lapt/runs/lapt/samples/50
    python lapt/evaluate.py --synthetic lapt/runs/lapt/samples/50 --baseline lapt/runs/ldm/samples/50 \\
        --model lapt/runs/lapt --guide lapt/runs/guide --features autoencoder

Real images are the prepared folder's, synthetic ones what lapt/sample.py wrote with --split. Every number is of voxels
inside the brain mask, in physical units; the data range of PSNR and SSIM is that of the training set and is stated.
With --baseline (the plain LDM) every measure is compared patient by patient. --model adds the autoencoder's
reconstruction of the real images, which no sample can beat, and --guide a fixed segmenter beside the ADC threshold.
Writes OUTDIR/evaluation.csv, segmentation.csv, lesions.csv, evaluation.json, figures/ and report.html, one page to hand
on. A case of the paper's size takes some seconds; under torchrun the cases are shared out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parent
FEATURES = ("none", "random", "autoencoder", "alex", "vgg", "squeeze")
PRESETS = {"paper": {}, "smoke": dict(features="random", fid_resamples=20)}


@dataclass
class Options(CommonOptions):
    preset: str = option("paper", "named set of option values, applied before the other options")
    dataroot: str = option(str(HERE / "data"), "prepared folder with the real images")
    split: str = option("test", "its list to measure", choices=("train", "val", "test"))
    synthetic: str = option("", "folder of sample.py")
    baseline: str = option("", "folder of sample.py with another model's samples to compare with; empty: none")
    outdir: str = option("", "output folder; empty: SYNTHETIC/evaluation")
    image: str = option("mean", "what is measured where there are several samples: their mean, or the first",
                        choices=("mean", "first"))  # fmt: skip
    data_range: str = option("training", "range of PSNR and SSIM, q0.995 - q0.005 of training set or case",
                             choices=("training", "case"))  # fmt: skip
    model: str = option("", "run or file of the model, for its autoencoder's reconstruction; empty: without")
    guide: str = option("", "run of the segmentation guide; empty: the ADC threshold alone")
    lesion_threshold: float = option(620.0, "ADC below which tissue counts as core", unit="1e-6 mm^2/s")
    size_edges_ml: tuple[float, ...] = option((1.0, 10.0, 70.0), "limits of the lesion size classes", unit="ml")
    features: str = option("none", "feature network of FID and KID: the model's own encoder, an ImageNet network from "
                           "--feature_weights, or random convolutions to try it out", choices=FEATURES)  # fmt: skip
    feature_weights: str = option("", "torchvision's file of alex, vgg or squeeze")
    fid_resamples: int = option(100, "bootstrap resamples of FID; 0: no interval")
    figures: int = option(4, "cases that are drawn, those with the largest lesions")
    trust_pickle: bool = option(False, "allow network files that need pickle; they can run code")
    overwrite: bool = option(False, "replace results that exist")

    def __post_init__(self):
        if not self.synthetic:
            raise UserError("name the samples with --synthetic, a folder of lapt/sample.py")
        edges = self.size_edges_ml
        if not edges or min(edges) <= 0 or list(edges) != sorted(set(edges)):
            raise UserError(f"--size_edges_ml {edges}: give rising volumes above 0")
        if self.fid_resamples < 0 or self.figures < 0 or self.seed < 0:
            raise UserError("--fid_resamples, --figures and --seed must be 0 or more")
        self.outdir = self.outdir or str(Path(self.synthetic) / "evaluation")


def main() -> None:
    options = cli.parse(Options, description=__doc__, presets=PRESETS)
    from common import runtime
    from lapt import evaluation

    with runtime.start(options.device, options.precision, options.seed) as rt:
        evaluation.evaluate(options, rt)


if __name__ == "__main__":
    cli.run(main)
