"""Every option of classifier/: train.py, run.py (those of train.py and the grid's), the saliency scripts.

One line each. Defaults are the paper's; where the original was wrong, the corrected choice. `--preset upstream` sets the original's science.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from common.cli import CommonOptions, TrainOptions, UserError, option

HERE = Path(__file__).resolve().parents[1]


# fmt: off
@dataclass
class Config(TrainOptions):
    root: str = option(str(HERE), "folder that holds data_csvs/, data/, synthetic_data/ and runs/", group="paths", free=True)
    train_csv: str = option("", "training table; empty: ROOT/data_csvs/train.csv", group="paths", free=True)
    val_csv: str = option("", "table for early stopping, threshold and calibration; empty: ROOT/data_csvs/val.csv", group="paths", free=True)
    test_csv: str = option("", "table that only the final test sees; empty: ROOT/data_csvs/test.csv", group="paths", free=True)
    label_column: str = option("HC_vs_LTLE_vs_RTLE_string", "column of the label", group="paths", free=True)
    synthetic: str = option("", "folder of save_synth.py; empty: ROOT/synthetic_data", group="paths", free=True)
    cache: str = option("", "LMDB cache of prepared volumes; empty: ROOT/data/cache; 'none': no cache", group="paths", free=True)
    runs: str = option("", "folder of the runs; empty: ROOT/runs/classifier", group="paths", free=True)
    exp: str = option("exp_1", "name of the run: everything goes to RUNS/EXP", group="paths", free=True)
    weights: str = option("", "torchvision's efficientnet_v2_l weights file to start from (--model 2d); empty: from scratch", group="paths", free=True)

    shape: tuple[int, int, int] = option((112, 136, 112), "prepared grid", unit="voxels", group="data")
    crop_start: int = option(1, "first coronal slice that is kept", group="data")
    norm: str = option("native", "scaling: native divides by --norm_scale (background stays 0), zscore as published", choices=("native", "zscore"), group="data")
    norm_scale: float = option(0.25, "grey-matter fraction that becomes 1 with --norm native", group="data")
    pad: str = option("background", "what surrounds head and rotated slices; zero is a bright frame about z-scored heads", choices=("background", "zero"), group="data")
    flips: str = option("left_right", "random mirroring of training volumes; both also turns heads upside down", choices=("none", "left_right", "both"), group="data")
    rotation: float = option(15.0, "training volumes are turned about the anterior-posterior axis by up to +- this", unit="degrees", group="data")
    num_samples: int = option(-1, "real training volumes, drawn with the groups' shares; -1: all; 0: synthetic only", unit="volumes", group="data")
    num_synth_samples: int = option(0, "synthetic training volumes, HC and TLE as in the training table; 0: real only", unit="volumes", group="data")
    exact_counts: bool = option(True, "draw exactly as many as asked for (the original rounds some away)", group="data")
    sample_seed: int = option(1000, "seed of the choice of real and synthetic volumes", group="data")
    duplicates: str = option("block", "near-identical volumes in two splits: stop, take them out of training, or keep them as published", choices=("block", "exclude", "keep"), group="data")

    folds: int = option(0, "k-fold cross-validation by subject over all tables; 0: the three tables as they are", group="folds")
    leave_site_out: bool = option(False, "one fold per site over all tables: each is tested by a network that saw nothing of it; needs the column site", group="folds")
    fold_pool: str = option("all", "what the folds divide: all tables (a new training set each time), or held_out: the training table stays, folds divide the others", choices=("all", "held_out"), group="folds")
    fold_val: float = option(0.15, "--fold_pool all: share of a fold's other subjects kept for validation", group="folds")
    split_seed: int = option(7, "seed of the folds", group="folds")

    model: str = option("2d", "2d: EfficientNetV2-L, slices as channels; 3d: the plain 3D CNN", choices=("2d", "3d"), group="model")
    dropout: float = option(0.3, "dropout before the last layers", group="model")
    drop_path: float = option(0.2, "stochastic depth of the last block (2d)", group="model")
    width: float = option(1.0, "channels of EfficientNetV2-L times this (2d)", group="model")
    depth: float = option(1.0, "repeats of EfficientNetV2-L times this (2d)", group="model")
    filters: tuple[int, ...] = option((64, 128, 256, 256, 256, 256), "channels per stage (3d)", group="model")

    batch_size: int = option(128, "global batch, half HC and half TLE: split over ranks", unit="volumes", group="training")
    epochs: int = option(100, "length", group="training", free=True)
    steps_per_epoch: int = option(0, "steps of an epoch whatever the number of volumes; 0: the larger class once", unit="steps", group="training")
    learning_rate: float = option(1e-3, "learning rate of Adam", group="training")
    weight_decay: float = option(0.0, "L2 term of Adam", group="training")
    scheduler: str = option("cosine", "cosine with warm restarts per epoch, plateau on the validation loss, or constant", choices=("cosine", "plateau", "constant"), group="training")
    lr_t0: int = option(25, "cosine: first restart; each next period is --lr_t_mult times longer", unit="epochs", group="training")
    lr_t_mult: int = option(2, "cosine: growth of the restart period", group="training")
    lr_min: float = option(1e-5, "lowest learning rate of cosine and plateau", group="training")
    lr_patience: int = option(5, "plateau: halve after so many validations without improvement", group="training")
    grad_clip: float = option(0.0, "largest gradient norm; 0: no clipping", group="training")
    select: str = option("loss", "what picks the best weights: the validation loss, as published, or the validation AUC, which overconfidence does not disturb", choices=("loss", "auc"), group="training")
    channels_last: bool = option(True, "channels_last memory layout (a third faster than without, on a CPU)", group="training", free=True)
    patience: int = option(50, "stop after so many validations without improvement; 0: never", group="training", free=True)
    val_every: int = option(1, "validation interval", unit="epochs", group="training")
    save_every: int = option(500, "write checkpoints/last.pt every so many steps; 0: at validations only", unit="steps", group="training", free=True)
    log_every: int = option(10, "training log interval", unit="steps", group="training")

    eval_batch: int = option(16, "volumes per forward pass in validation and test", group="evaluation", free=True)
    bootstrap: int = option(2000, "bootstrap resamples of the intervals", group="evaluation", free=True)

    # fmt: on
    def __post_init__(self):
        root = Path(self.root)
        for split in ("train", "val", "test"):
            name = f"{split}_csv"
            setattr(self, name, getattr(self, name) or str(root / "data_csvs" / f"{split}.csv"))
        self.synthetic = self.synthetic or str(root / "synthetic_data")
        self.cache = self.cache or str(root / "data" / "cache")
        self.runs = self.runs or str(root / "runs" / "classifier")
        if self.num_samples < -1 or self.num_synth_samples < 0:
            raise UserError("--num_samples starts at -1 (all), --num_synth_samples at 0 (none)")
        if self.num_samples == 0 and self.num_synth_samples == 0:
            raise UserError("--num_samples 0 and --num_synth_samples 0 leave nothing to train on: give one of them")
        if self.folds < 0 or self.folds == 1 or not 0 < self.fold_val < 1:
            raise UserError(f"--folds {self.folds}, --fold_val {self.fold_val}: give 0 or at least 2 folds, and a share "
                            "between 0 and 1")  # fmt: skip
        if self.leave_site_out and (self.folds or self.fold_pool != "all"):
            raise UserError("--leave_site_out makes its own folds, over all tables: give neither --folds nor --fold_pool held_out")
        if min(self.lr_t0, self.lr_t_mult, self.eval_batch, self.bootstrap) < 1:
            raise UserError("--lr_t0, --lr_t_mult, --eval_batch and --bootstrap start at 1")
        if self.weights and (self.model, self.width, self.depth) != ("2d", 1.0, 1.0):
            raise UserError("--weights are of the full EfficientNetV2-L: give --model 2d --width 1 --depth 1")

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.exp

    @property
    def mode(self) -> str:
        if self.num_synth_samples == 0:
            return "real"
        return "synthetic-only" if self.num_samples == 0 else "mixed"


# fmt: off
@dataclass
class GridConfig(Config):
    exp: str = option("grid", "name of the study: cells go to RUNS/EXP/CELL/seed_S", group="paths", free=True)
    budgets: tuple[int, ...] = option((500, 1000, 2000, 2723), "real training volumes", unit="volumes", group="grid", free=True)
    shares: tuple[float, ...] = option((0.0, 25.0, 50.0, 75.0, 100.0), "synthetic volumes added, in percent of a budget", unit="%", group="grid", free=True)
    equal_size: tuple[float, ...] = option((50.0,), "control of the same size: this part of a budget is synthetic instead of real; 0: no such cell", unit="%", group="grid", free=True)
    synthetic_only: tuple[int, ...] = option((500, 1000, 2000, 2723, 5446), "synthetic volumes of trainings without real ones; 0: no such cell", unit="volumes", group="grid", free=True)
    seeds: tuple[int, ...] = option((1, 2, 3), "trainings per cell, the same seeds in every cell (they replace --seed)", group="grid", free=True)
    redraw: bool = option(True, "draw other volumes with each seed (--sample_seed + seed), as another study would", group="grid", free=True)
    all_pairs: bool = option(False, "compare every pair of cells, not only each with the real-only one of its budget", group="grid", free=True)
    margin: float = option(0.05, "AUC difference that counts as equivalent or not inferior", group="grid", free=True)
    part: str = option("1/1", "train only every n-th cell, k/n, on this machine; the last one to finish draws the figure", group="grid", free=True)

    # fmt: on
    def __post_init__(self):
        super().__post_init__()
        if min(self.budgets) < 1 or min(self.shares) < 0 or min(self.synthetic_only, default=0) < 0:
            raise UserError("--budgets start at 1, --shares and --synthetic_only at 0")
        if not all(0 <= share < 100 for share in self.equal_size):
            raise UserError(f"--equal_size {self.equal_size}: percent below 100 (that would be --synthetic_only)")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"--seeds {self.seeds}: give different numbers from 0 on")
        if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", self.part) or int(self.part.split("/")[0]) > int(self.part.split("/")[1]):
            raise UserError(f"--part {self.part}: give K/N with K from 1 to N, such as 2/4")


# fmt: off
@dataclass
class SaliencyOptions(CommonOptions):
    root: str = option(str(HERE), "folder that holds data_csvs/, data/ and runs/")
    model_path: str = option("", "classifier, ours or the original's; empty: ROOT/runs/classifier/exp_1/fold_1/best_model.pth")
    csv_path: str = option("", "table of the subjects; empty: ROOT/data_csvs/test.csv")
    label_column: str = option("HC_vs_LTLE_vs_RTLE_string", "column of the label")
    output_dir: str = option("", "output folder; empty: saliency/ beside the fold's folder")
    cache: str = option("", "LMDB cache of prepared volumes; empty: ROOT/data/cache; 'none': no cache")
    regions: str = option("", "label maps of the same names as the volumes; empty: ROOT/data/regions")
    methods: tuple[str, ...] = option(("integrated_gradients", "saliency", "gradient_shap", "input_x_gradient"), "what to compute; noise_tunnel_ig exists, too")
    max_samples: int = option(50, "subjects, in the table's order; 0: all")
    pictures: int = option(-1, "subjects with overlays and slice pictures; -1: all")
    key_slices: tuple[int, ...] = option((), "coronal slices of the summary pictures; none: seven between 20 and 80 %")
    baseline: str = option("background", "where the path methods start: the volume's minimum, or zero as published", choices=("background", "zero"))
    target_regions: tuple[str, ...] = option(("hippocampus_left", "hippocampus_right"), "regions of the pointing test: phantom's names, or NAME=CODE ending in left or right")
    tolerance_mm: float = option(6.0, "a peak this close to a region points at it", unit="mm")
    sanity_samples: int = option(4, "subjects whose maps are compared with those of a randomised network; 0: none")
    trust_pickle: bool = option(False, "allow a model file that needs pickle; it can run code")
    overwrite: bool = option(False, "replace maps of other settings")

    # fmt: on
    def __post_init__(self):
        root = Path(self.root)
        self.model_path = self.model_path or str(root / "runs" / "classifier" / "exp_1" / "fold_1" / "best_model.pth")
        self.csv_path = self.csv_path or str(root / "data_csvs" / "test.csv")
        self.output_dir = self.output_dir or str(Path(self.model_path).parent.parent / "saliency")
        self.cache = self.cache or str(root / "data" / "cache")
        self.regions = self.regions or str(root / "data" / "regions")


# fmt: off
@dataclass
class RunSaliencyOptions(SaliencyOptions):
    runs: str = option("", "folder of the runs; empty: ROOT/runs/classifier")
    exp: str = option("exp_1", "the run, or a cell of run.py such as grid/real_2723_syn_50/seed_1")
    max_samples: int = option(477, "subjects of each fold, in the table's order; 0: all")

    # fmt: on
    def __post_init__(self):
        self.runs = self.runs or str(Path(self.root) / "runs" / "classifier")
        self.output_dir = self.output_dir or str(Path(self.runs) / self.exp / "saliency")
        super().__post_init__()


# Of the original's later revision: the 3D CNN, whose "epochs" were a tenth of ours.
CNN3D_STUDY = dict(
    model="3d", dropout=0.2, batch_size=8, rotation=0.0, scheduler="plateau", lr_patience=2, lr_min=1e-8, patience=25,
)  # fmt: skip
PRESETS = {
    "paper": {},
    "paper3d": CNN3D_STUDY,
    # The original's science through ordinary options: z-scored, upside-down heads, a bright frame, duplicates.
    "upstream": dict(norm="zscore", pad="zero", flips="both", exact_counts=False, duplicates="keep"),
    # Two CPU cores, `make_phantom.py --shape 33 41 33`.
    "smoke": dict(
        shape=(32, 40, 32), model="3d", filters=(16, 32, 64, 64), dropout=0.5, batch_size=8, rotation=10.0, epochs=15,
        steps_per_epoch=20, learning_rate=2e-3, lr_t0=15, select="auc", patience=0, num_workers=0, bootstrap=500,
    ),
}  # fmt: skip
GRID_PRESETS = {name: dict(values) for name, values in PRESETS.items()}
GRID_PRESETS["upstream"] |= dict(redraw=False, equal_size=(0.0,))
GRID_PRESETS["smoke"] |= dict(
    budgets=(40,), shares=(0.0, 100.0), equal_size=(50.0,), synthetic_only=(40,), seeds=(1, 2)
)  # fmt: skip
