"""FID and KID between real and synthetic volumes at every slice position of three axes, beside real against real.

    python neuroldm3d/diffusion/per_slice_fid.py --weights pt_inception-2015-12-05-6726825d.pth
    python neuroldm3d/diffusion/per_slice_fid.py --features classifier   # whole volumes, a trained classifier
    python neuroldm3d/diffusion/per_slice_fid.py --preset smoke        # no weights: random convolutions
    python neuroldm3d/diffusion/per_slice_fid.py --preset upstream     # the original's network, scaling and rounding

Compares equally many real and synthetic volumes with the real set's class shares, drawn by --seed and listed in the
result, and as a floor the same number of other real volumes. Writes OUTPUT_DIR/axis{0,1,2}_fids.npy (112, 136 and 112
values), axis*_fids_by_position.npz, per_slice_fids.png, fid_summary.txt and fid_results.json. With 477 volumes 515,000
slices pass through Inception-v3, 0.2 s each on a CPU core: take a GPU, or fewer --max_files. Ranks share the positions.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parents[1]
WEIGHTS = {  # default file of each feature network below ROOT
    "inception": "weights/pt_inception-2015-12-05-6726825d.pth",
    "torchvision": "weights/inception_v3_google-0cc3c7bd.pth",
    "classifier": "runs/classifier/exp_1/fold_1/best_model.pth",
    "medicalnet": "weights/resnet_10_23dataset.pth",
    "random": "",
}


@dataclass
class Options(CommonOptions):
    preset: str = option("paper", "named set of option values, applied before the other options")
    root: str = option(str(HERE), "folder that holds data_csvs/, synthetic_data/, runs/ and weights/", group="paths")
    synthetic_folder: str = option("", "synthetic volumes, in HC/ and TLE/; empty: ROOT/synthetic_data", group="paths")
    synthetic_folder_2: str = option("", "more synthetic volumes, e.g. where HC and TLE lie apart", group="paths")
    synthetic_csv: str = option("", "a table of real volumes to judge in the place of synthetic ones", group="paths")
    real_csv: str = option("", "real volumes; empty: ROOT/data_csvs/test.csv, which chose no network", group="paths")
    baseline_csv: str = option(
        "",
        "other real volumes for the real-vs-real floor; empty: ROOT/data_csvs/train.csv; none: no floor",
        group="paths",
    )
    output_dir: str = option("", "empty: ROOT/fid_results", group="paths")
    label_column: str = option("HC_vs_LTLE_vs_RTLE_string", "column of the label", group="paths")
    cache: str = option(
        "", "LMDB cache of prepared volumes; empty: ROOT/data/cache; none: no cache (slow)", group="paths"
    )
    vae: str = option("", "network whose preparation real volumes get with --synthetic_csv; empty: ROOT/runs/vae/best_vae.pth", group="paths")  # fmt: skip  # noqa: E501
    overwrite: bool = option(False, "replace the results of --output_dir")

    features: str = option(
        "inception",
        "inception: the standard FID network; torchvision: the ImageNet one; random: untrained, for trying the program "
        "(all three per slice); classifier, medicalnet: whole volumes",
        choices=tuple(WEIGHTS),
        group="features",
    )
    weights: str = option(
        "", "weights file; empty: ROOT/" + ", ROOT/".join(filter(None, WEIGHTS.values())), group="features"
    )
    batch_size: int = option(16, "slices per network call", unit="slices", group="features")
    volume_batch_size: int = option(
        2, "volumes per network call of whole-volume features", unit="volumes", group="features"
    )
    positions_per_pass: int = option(8, "slice positions in memory at a time", unit="positions", group="features")
    scaling: str = option(
        "fixed", "fixed: one --window for all volumes; minmax: each volume's own range", choices=("fixed", "minmax"),
        group="features",
    )  # fmt: skip
    window: tuple[float, ...] = option((), "values that become 0 and 1; empty: 0 1 GM fraction", group="features")
    aspect: str = option(
        "pad",
        "slices that are not square: pad with background, or stretch",
        choices=("pad", "stretch"),
        group="features",
    )
    eight_bit: bool = option(
        False, "round scaled volumes down to 256 grey levels, as image files would", group="features"
    )

    max_files: int = option(477, "volumes per set at most; 0: as many as there are", unit="volumes", group="sets")
    match_classes: bool = option(True, "give all sets the real set's class shares", group="sets")
    foreground_only: bool = option(
        False, "leave out positions with little foreground (their values are NaN)", group="sets"
    )
    foreground_share: float = option(0.05, "mean share of a slice that makes it foreground", group="sets")
    bootstrap: int = option(20, "resamples of the volumes for the intervals of FID; 0: none", group="sets")

    def __post_init__(self):
        if self.bootstrap < 0 or self.max_files < 0 or self.seed < 0:
            raise UserError("--bootstrap, --max_files and --seed are 0 or more")
        root = Path(self.root)
        self.synthetic_folder = self.synthetic_folder or str(root / "synthetic_data")
        self.real_csv = self.real_csv or str(root / "data_csvs" / "test.csv")
        self.baseline_csv = self.baseline_csv or str(root / "data_csvs" / "train.csv")
        self.output_dir = self.output_dir or str(root / "fid_results")
        self.cache = self.cache or str(root / "data" / "cache")
        self.vae = self.vae or str(root / "runs" / "vae" / "best_vae.pth")
        self.weights = self.weights or str(root / WEIGHTS[self.features])


PRESETS = {
    "paper": {},
    # The original's measurement through ordinary options.
    "upstream": dict(features="torchvision", scaling="minmax", aspect="stretch", eight_bit=True),
    # No weights; a tiny phantom on a CPU.
    "smoke": dict(features="random", positions_per_pass=64, batch_size=64),
}


def main() -> None:
    options = cli.parse(Options, description=__doc__, presets=PRESETS)

    # torch is imported only now, so that --help and a mistyped flag answer at once
    from common import runtime
    from neuroldm3d.diffusion import evaluation

    with runtime.start(options.device, options.precision, options.seed) as rt:
        evaluation.evaluate(options, rt)


if __name__ == "__main__":
    cli.run(main)
