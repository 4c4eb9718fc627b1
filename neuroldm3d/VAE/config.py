"""Every option of VAE/train.py: one line each. Defaults are the paper's, as the public code states them.

Where the original was wrong the default is the corrected choice; `--preset upstream` sets the original's science.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.cli import TrainOptions, UserError, option

HERE = Path(__file__).resolve().parents[1]

# fmt: off


@dataclass
class Config(TrainOptions):
    root: str = option(str(HERE), "folder that holds data_csvs/, data/ and runs/", group="paths", free=True)
    train_csv: str = option("", "training table; empty: ROOT/data_csvs/train.csv", group="paths", free=True)
    val_csv: str = option("", "held-out table; empty: ROOT/data_csvs/val.csv", group="paths", free=True)
    label_column: str = option("HC_vs_LTLE_vs_RTLE_string", "column of the label", group="paths", free=True)
    cache: str = option("", "LMDB cache of prepared volumes; empty: ROOT/data/cache; 'none': no cache", group="paths", free=True)
    run: str = option("", "run folder; empty: ROOT/runs/vae", group="paths", free=True)
    init: str = option("", "start from the weights of this VAE, ours or the original's", group="paths", free=True)
    lpips_weights: tuple[str, ...] = option((), "pretrained files of the perceptual loss: backbone and LPIPS heads", group="paths", free=True)
    trust_pickle: bool = option(False, "allow an --init file that needs pickle; it can run code", group="paths", free=True)

    shape: tuple[int, int, int] = option((112, 136, 112), "prepared grid", unit="voxels", group="data")
    crop_start: int = option(1, "first coronal slice that is kept", group="data")
    norm: str = option("native", "scaling: native divides by --norm_scale (background stays 0), zscore as published", choices=("native", "zscore"), group="data")
    norm_scale: float = option(0.25, "grey-matter fraction that becomes 1 with --norm native", group="data")
    flips: str = option("left_right", "random mirroring of training volumes; both also turns heads upside down", choices=("none", "left_right", "both"), group="data")

    channels: tuple[int, ...] = option((32, 64, 128), "width per level", group="model")
    num_res_blocks: tuple[int, ...] = option((1, 1, 1), "residual blocks per level", group="model")
    latent_channels: int = option(4, "latent channels", group="model")
    norm_groups: int = option(16, "groups of the group norm", group="model")

    recon_loss: str = option("l1", "reconstruction term", choices=("l1", "mse"), group="loss")
    lambda_recon: float = option(1.0, "weight of the reconstruction term", group="loss")
    lambda_kl: float = option(1e-6, "weight of KL, summed over the latent", group="loss")
    lambda_lpips: float = option(0.6, "weight of the perceptual term; 0 needs no pretrained weights", group="loss")
    lpips_net: str = option("alex", "backbone of the perceptual term", choices=("alex", "vgg"), group="loss")
    lpips_fraction: float = option(1.0, "share of slices that the perceptual term sees, drawn anew each step", group="loss")

    batch_size: int = option(2, "global batch: split over ranks", unit="volumes", group="training")
    epochs: int = option(100, "length of the training", group="training", free=True)
    steps: int = option(0, "length in optimizer steps; 0: from --epochs", group="training", free=True)
    vae_lr: float = option(1e-4, "learning rate of Adam", group="training")
    weight_decay: float = option(0.0, "L2 term of Adam", group="training")
    lr_schedule: str = option("restarts", "restarts: cosine with warm restarts, set per epoch; cosine: to zero at the end", choices=("restarts", "cosine", "constant"), group="training")
    lr_t0: int = option(5, "first restart; each next period is --lr_t_mult times longer", unit="epochs", group="training")
    lr_t_mult: int = option(2, "growth of the restart period", group="training")
    lr_min: float = option(5e-6, "lowest learning rate of --lr_schedule restarts", group="training")
    grad_clip: float = option(0.0, "largest gradient norm; 0: no clipping", group="training")
    accumulate: int = option(1, "micro-batches per optimizer step (memory, not speed)", group="training")
    checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third slower", group="training", free=True)
    channels_last: bool = option(False, "channels_last_3d memory layout", group="training", free=True)
    ema_decay: float = option(0.0, "average of the weights, which is then what is validated and kept; 0: none", group="training")
    patience: int = option(35, "stop after so many validations without improvement; 0: never", group="training", free=True)
    val_every: int = option(1, "validation interval", unit="epochs", group="training")
    sample_every: int = option(1, "picture of held-out reconstructions; 0: never", unit="epochs", group="training", free=True)
    save_every: int = option(500, "write checkpoints/last.pt every so many steps; 0: at validations only", unit="steps", group="training", free=True)
    log_every: int = option(20, "training log interval", unit="steps", group="training")

    def __post_init__(self):
        if len(self.channels) != len(self.num_res_blocks):
            raise UserError(f"--channels has {len(self.channels)} levels, --num_res_blocks {len(self.num_res_blocks)}: "
                            "give one number of blocks per level")
        if any(c % self.norm_groups for c in self.channels):
            raise UserError(f"--channels {self.channels}: every width must be a multiple of --norm_groups "
                            f"{self.norm_groups}")
        factor = 2 ** (len(self.channels) - 1)
        if any(n % factor for n in self.shape):
            raise UserError(f"--shape {self.shape}: every axis must be a multiple of {factor}")
        if self.lr_t0 < 1 or self.lr_t_mult < 1:
            raise UserError("--lr_t0 and --lr_t_mult must be at least 1")
        root = Path(self.root)
        self.train_csv = self.train_csv or str(root / "data_csvs" / "train.csv")
        self.val_csv = self.val_csv or str(root / "data_csvs" / "val.csv")
        self.cache = self.cache or str(root / "data" / "cache")
        self.run = self.run or str(root / "runs" / "vae")

    @property
    def best_path(self) -> Path:
        return Path(self.run) / "best_vae.pth"


PRESETS = {
    "paper": {},
    # The original's science through ordinary options: z-scored volumes, heads upside down half of the time.
    "upstream": dict(norm="zscore", flips="both"),
    # Two CPU cores, `make_phantom.py --shape 33 41 33`: latents of 8x10x8.
    "smoke": dict(
        shape=(32, 40, 32), channels=(8, 16, 32), norm_groups=8, latent_channels=8, channels_last=True, lambda_lpips=0.0,
        batch_size=2, steps=800, vae_lr=2e-3, lr_schedule="cosine", grad_clip=1.0, ema_decay=0.99, patience=0,
        val_every=2, sample_every=4, num_workers=0,
    ),
}
