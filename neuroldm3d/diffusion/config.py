"""Every option of diffusion/train.py: one line each. Names that the original documents are kept (`bs`, `niter`, ...).

Defaults are the paper's; where the original was wrong the default is the corrected choice, and `--preset upstream` sets
the original's science instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.cli import TrainOptions, UserError, option

HERE = Path(__file__).resolve().parents[1]
MODEL_TYPES = tuple(f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4))

# fmt: off


@dataclass
class Config(TrainOptions):
    root: str = option(str(HERE), "folder that holds latent_data/ and runs/", group="paths", free=True)
    dataroot: str = option("", "latents of save_latent.py; empty: ROOT/latent_data", group="paths", free=True)
    model_dir: str = option("", "folder of the runs; empty: ROOT/runs", group="paths", free=True)
    experiment_name: str = option("dit", "name of the run: everything goes to MODEL_DIR/EXPERIMENT_NAME", group="paths", free=True)
    vae: str = option("", "VAE that decodes the pictures of --sample_every; empty: ROOT/runs/vae/best_vae.pth", group="paths", free=True)
    trust_pickle: bool = option(False, "allow a VAE file that needs pickle; it can run code", group="paths", free=True)

    normalise_latents: bool = option(True, "give latents zero mean and unit variance with whole-set statistics", group="data")
    latent_mean: str = option("channel", "mean that --normalise_latents subtracts: one number per channel, or the mean latent image (registered volumes)", choices=("channel", "voxel"), group="data")
    latent: str = option("sample", "train on z = mu + sigma eps, drawn anew each epoch, or on mu", choices=("sample", "mean"), group="data")

    model_type: str = option("DiT-S/4", "size and patch; S/4 has patches of 4x2x4, since 34 is no multiple of 4", choices=MODEL_TYPES, group="model")
    patch_size: tuple[int, ...] = option((), "patch along the three axes instead of that of --model_type", unit="latent voxels", group="model")
    hidden_size: int = option(0, "width instead of that of --model_type", group="model")
    depth: int = option(0, "blocks instead of that of --model_type", group="model")
    num_heads: int = option(0, "attention heads instead of that of --model_type", group="model")
    mlp_ratio: float = option(4.0, "width of the MLP over the width of the tokens", group="model")
    label_dropout: float = option(0.1, "share of training labels replaced by the null label, which guidance needs; 0: none", group="model")
    window_size: int = option(0, "side of the attention windows of --window_block_indexes", unit="tokens", group="model")
    window_block_indexes: tuple[int, ...] = option((), "blocks that attend inside windows; the others attend to all tokens", group="model")
    mask_padding: bool = option(True, "keep padding of the last windows out of the attention", group="model")
    positions: str = option("sincos", "fixed sine-cosine table, or rotary queries and keys", choices=("sincos", "rotary"), group="model")
    relative_positions: bool = option(False, "learned term per axis in the attention logits", group="model")
    pad_input: bool = option(False, "pad and crop latents that the patch does not divide, instead of refusing them", group="model")

    schedule_type: str = option("linear", "noise schedule", choices=("linear", "cosine"), group="diffusion")
    beta_start: float = option(1e-4, "first beta of the linear schedule", group="diffusion")
    beta_end: float = option(0.02, "last beta of the linear schedule", group="diffusion")
    time_num: int = option(1000, "length T of the schedule", unit="steps", group="diffusion")
    model_mean_type: str = option("eps", "what the network predicts: eps as published, or v, which trains faster and lets few-step samplers start well", choices=("eps", "v"), group="diffusion")
    model_var_type: str = option("fixedsmall", "variance of an ancestral step: of the posterior, or beta", choices=("fixedsmall", "fixedlarge"), group="diffusion")
    loss_type: str = option("mse", "error of the prediction", choices=("mse", "l1"), group="diffusion")
    min_snr: float = option(0.0, "gamma of min-SNR loss weights (5 is usual); 0: all timesteps weigh the same", group="diffusion")

    bs: int = option(4, "global batch: split over ranks", unit="latents", group="training")
    niter: int = option(10000, "length of the training", unit="epochs", group="training", free=True)
    steps: int = option(0, "length in optimizer steps; 0: from --niter", group="training", free=True)
    lr: float = option(2e-4, "learning rate of Adam", group="training")
    lr_schedule: str = option("constant", "cosine falls to zero at the end", choices=("constant", "cosine"), group="training")
    decay: float = option(0.0, "L2 term of Adam", group="training")
    beta1: float = option(0.9, "first moment of Adam", group="training")
    grad_clip: float = option(0.0, "largest gradient norm; 0: no clipping", group="training")
    accumulate: int = option(1, "micro-batches per optimizer step (memory, not speed)", group="training")
    checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third slower", group="training", free=True)
    ema_decay: float = option(0.9999, "decay of the averaged weights that sampling uses", group="training")
    ema_start: int = option(2000, "steps for which the average is a plain copy", unit="steps", group="training")
    val_every: int = option(10, "validation interval", unit="epochs", group="training")
    val_per_class: int = option(64, "held-out latents per class in the validation loss; 0: all", group="training")
    select: str = option("held_out", "what picks epoch_best.pth: the held-out loss of the average, or the last step", choices=("held_out", "last"), group="training")
    patience: int = option(0, "stop after so many validations without improvement; 0: never", group="training", free=True)
    sample_every: int = option(500, "decoded samples of every class as a picture; 0: never", unit="epochs", group="training", free=True)
    saveIter: int = option(100, "keep epoch_<n>.pth every so many epochs; 0: never", unit="epochs", group="training", free=True)
    keep: int = option(2, "how many of the newest epoch_<n>.pth stay; 0: all (a quarter of a gigabyte each for DiT-S)", group="training", free=True)
    save_every: int = option(500, "write checkpoints/last.pt every so many steps; 0: at validations only", unit="steps", group="training", free=True)
    log_every: int = option(20, "training log interval", unit="steps", group="training")

    def __post_init__(self):
        if self.patch_size and (len(self.patch_size) != 3 or min(self.patch_size) < 1):
            raise UserError(f"--patch_size {self.patch_size}: give three positive numbers")
        if not 0 <= self.label_dropout < 1:
            raise UserError(f"--label_dropout {self.label_dropout}: choose 0 or more and less than 1")
        if self.time_num < 2 or not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError("--time_num must be at least 2, and 0 < --beta_start <= --beta_end < 1")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"--ema_decay {self.ema_decay}: choose 0 (the last weights) or more and less than 1")
        root = Path(self.root)
        self.dataroot = self.dataroot or str(root / "latent_data")
        self.model_dir = self.model_dir or str(root / "runs")
        self.vae = self.vae or str(root / "runs" / "vae" / "best_vae.pth")

    @property
    def run_folder(self) -> Path:
        return Path(self.model_dir) / self.experiment_name

    @property
    def best_path(self) -> Path:
        return self.run_folder / "epoch_best.pth"


PRESETS = {
    "paper": {},
    # The original's science through ordinary options: latents as they are, average from the first step, last weights.
    "upstream": dict(normalise_latents=False, ema_start=0, mask_padding=False, select="last"),
    # Two CPU cores, latents of 8x10x8. v prediction and the mean latent image are what a short training can learn with.
    "smoke": dict(
        latent_mean="voxel", patch_size=(2, 2, 2), hidden_size=128, depth=6, num_heads=4, model_mean_type="v", bs=16,
        steps=2000, lr=1e-3, lr_schedule="cosine", grad_clip=1.0, ema_decay=0.99, ema_start=100, val_every=10,
        sample_every=50, saveIter=0, num_workers=0,
    ),
}
