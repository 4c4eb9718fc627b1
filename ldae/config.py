"""Every option of `run_cli.py`, one line each: a dataclass per stage, named in the YAML as `stage:`. Imports no torch.

Defaults are the paper's, as the public configuration files state them; where the original was wrong the default is the
corrected choice, and `--preset upstream` sets the original's science instead. A batch is what one optimizer step sees
(all ranks, all micro-batches): the original's batch size x GPUs x accumulated batches.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from common.cli import TrainOptions, UserError, option

HERE = Path(__file__).resolve().parent
STAGES = ("aekl", "ldae_pretrain", "ldae_repr_learn", "classification", "regression")
BACKBONES = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
SECTIONS = ("general", "paths", "data", "model", "loss", "diffusion", "training")  # of the YAML files: option groups
POSITIVE = (  # at least 1, every number of them
    "epochs", "channels", "latent_channels", "num_res_blocks", "norm_groups", "disc_channels", "disc_layers",
    "base_channels", "channel_mult", "attention_resolutions", "num_heads", "backbone_depths", "backbone_widths",
    "code_dim", "encoder_heads", "max_slices", "sample_steps", "n_samples", "bootstrap",
)  # fmt: skip
NOT_NEGATIVE = (
    "max_steps", "steps", "lr", "lr_d", "lr_encoder", "grad_clip", "weight_decay", "patience",
    "sample_every", "save_every", "ema_start", "adv_start", "kl_weight", "perceptual_weight", "adv_weight",
)  # fmt: skip
SHARES = ("ema_decay", "dropout", "encoder_dropout", "drop_path")  # 0 or more and less than 1

# fmt: off


@dataclass
class StageConfig(TrainOptions):
    """What all stages share. Paths hang off --root unless an option says otherwise."""

    stage: ClassVar[str] = ""

    seed: int = option(42, "seed of everything random but the split")

    root: str = option(str(HERE), "folder that holds data/, split.json, latents/ and runs/", group="paths", free=True)
    csv_path: str = option("", "table of the scans; empty: ROOT/data/dataset.csv", group="paths", free=True)
    split: str = option("", "split of the subjects, made when it is missing; empty: ROOT/split.json", group="paths", free=True)
    cache: str = option("", "LMDB cache of prepared volumes; empty: ROOT/data/cache; 'none': no cache", group="paths", free=True)
    run: str = option("", "run folder; empty: ROOT/runs/<stage>", group="paths", free=True)
    ckpt_path: str = option("", "network that validate, test and predict use; empty: RUN/checkpoints/best.ckpt", group="paths", free=True)
    out: str = option("", "output folder of predict; empty: RUN/predict", group="paths", free=True)
    trust_pickle: bool = option(False, "allow weight files that need pickle; it can run code", group="paths", free=True)
    overwrite: bool = option(False, "replace outputs of validate, test and predict that exist", group="paths", free=True)

    classes: tuple[str, ...] = option((), "diagnoses that take part; none given: all rows, labelled or not", group="data")
    part: str = option("test", "subjects that predict takes; all needs no split", choices=("train", "val", "test", "all"), group="data", free=True)
    shape: tuple[int, int, int] = option((128, 160, 128), "prepared grid", unit="voxels", group="data")
    spacing_mm: float = option(1.5, "prepared voxel size", unit="mm", group="data")
    intensity: str = option("robust", "scaling to [0, 1]: percentiles inside the head, or minmax of the whole volume as published", choices=("robust", "minmax"), group="data")
    crop: str = option("centre", "middle of the prepared grid: of the volume's grid (registered data), or of the head", choices=("centre", "head"), group="data")
    mask: str = option("none", "what lies outside becomes 0: nothing, the head as found by threshold, the table's mask_path", choices=("none", "head", "file"), group="data")
    order: str = option("RAS", "axes: brought to RAS+, or as stored in the file like the original", choices=("RAS", "file"), group="data")
    plane: str = option("axial", "slices that the 2.5D encoder sees", choices=("axial", "coronal", "sagittal"), group="data")
    val_size: float = option(0.1, "share of subjects for validation, when the split is made", group="data", free=True)
    test_size: float = option(0.1, "share of subjects for testing, when the split is made", group="data", free=True)
    split_seed: int = option(42, "seed of the split, when it is made", group="data", free=True)
    split_rule: str = option("stratified", "how the split is made: each diagnosis by itself, or the original's group shuffle", choices=("stratified", "upstream"), group="data", free=True)

    batch_size: int = option(4, "volumes per optimizer step, over all ranks and micro-batches", unit="volumes", group="training")
    epochs: int = option(100, "length of the training", group="training", free=True)
    steps: int = option(0, "length in optimizer steps; 0: from --epochs", group="training", free=True)
    lr: float = option(5e-5, "learning rate of Adam", group="training")
    lr_schedule: str = option("constant", "cosine falls to zero at the end", choices=("constant", "cosine"), group="training")
    accumulate: int = option(1, "micro-batches per optimizer step and rank (memory, not speed)", group="training")
    grad_clip: float = option(1.0, "largest gradient norm, of unscaled gradients; 0: no clipping", group="training")
    ema_decay: float = option(0.0, "average of the weights per optimizer step, which is then what is validated and kept; 0: none", group="training")
    patience: int = option(30, "stop after so many validations without improvement; 0: never", group="training", free=True)
    val_every: int = option(1, "validation interval", unit="epochs", group="training")
    sample_every: int = option(1, "picture for samples/; 0: never", unit="epochs", group="training", free=True)
    save_every: int = option(500, "write checkpoints/last.ckpt every so many steps; 0: at validations only", unit="steps", group="training", free=True)
    log_every: int = option(20, "training log interval", unit="steps", group="training")
    checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third slower", group="training", free=True)

    def __post_init__(self):
        if self.seed < 0 or self.split_seed < 0:
            raise UserError("--seed and --split_seed: seeds are 0 or more")
        if min(self.shape) < 1 or self.spacing_mm <= 0:
            raise UserError(f"--shape {self.shape} and --spacing_mm {self.spacing_mm} must be positive")
        if not (0 < self.val_size < 1 and 0 < self.test_size < 1 and self.val_size + self.test_size < 1):
            raise UserError(f"--val_size {self.val_size} and --test_size {self.test_size}: give positive shares with a sum below 1")
        check_ranges(self)
        root = Path(self.root)
        self.csv_path = self.csv_path or str(root / "data" / "dataset.csv")
        self.split = self.split or str(root / "split.json")
        self.cache = self.cache or str(root / "data" / "cache")
        self.run = self.run or str(root / "runs" / self.stage)
        self.ckpt_path = self.ckpt_path or str(self.best_path)
        self.out = self.out or str(Path(self.run) / "predict")

    @property
    def best_path(self) -> Path:
        return Path(self.run) / "checkpoints" / "best.ckpt"

    @property
    def last_path(self) -> Path:
        return Path(self.run) / "checkpoints" / "last.ckpt"

    @property
    def cache_folder(self) -> str | None:
        return None if self.cache == "none" else self.cache


@dataclass
class AEKLConfig(StageConfig):
    """Stage 1: the KL autoencoder."""

    stage: ClassVar[str] = "aekl"

    init: str = option("", "start from the weights of this autoencoder: ours, the original's, or a bare state dict", group="paths", free=True)
    lpips_weights: tuple[str, ...] = option((), "pretrained files of the perceptual loss: backbone and LPIPS heads", group="paths", free=True)

    channels: tuple[int, ...] = option((64, 128, 128, 128), "width per level; each level but the last halves the grid", group="model")
    latent_channels: int = option(3, "latent channels", group="model")
    num_res_blocks: int = option(2, "residual blocks per level", group="model")
    norm_groups: int = option(32, "groups of the group norm", group="model")
    posterior_logvar: float = option(0.0, "log-variance that every posterior starts from; 0: as drawn. Short trainings want -6: at the usual 1 most of a latent stays noise", group="model")
    disc_channels: int = option(64, "width of the discriminator's first layer (then x2, x4, x8)", group="model")
    disc_layers: int = option(3, "layers of the discriminator between its first and last convolution", group="model")

    kl_weight: float = option(1e-7, "weight of KL, summed over the latent", group="loss")
    perceptual_weight: float = option(1e-3, "weight of the perceptual term; 0 needs no pretrained weights", group="loss")
    adv_weight: float = option(0.025, "weight of the least-squares adversarial terms; 0: no discriminator", group="loss")
    adv_start: int = option(0, "first step with the adversarial terms", unit="steps", group="loss")
    lpips_net: str = option("squeeze", "backbone of the perceptual term", choices=("squeeze", "alex", "vgg"), group="loss")
    lpips_fraction: float = option(0.5, "share of slices that the perceptual term sees, drawn anew each step", group="loss")
    lpips_sum: bool = option(False, "sum the perceptual term over the three axes, as published, instead of the mean", group="loss")
    lpips_centred: bool = option(True, "bring volumes to [-1, 1] for the perceptual term, as its networks expect", group="loss")

    lr_d: float = option(1e-4, "learning rate of the discriminator's Adam", group="training")
    accumulate: int = option(4, "micro-batches per optimizer step and rank (memory, not speed)", group="training")
    channels_last: bool = option(False, "channels_last_3d memory layout", group="training", free=True)

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.lpips_fraction <= 1:
            raise UserError(f"--lpips_fraction {self.lpips_fraction}: choose more than 0 and at most 1")


@dataclass
class DiffusionConfig(StageConfig):
    """What stages 2 and 3 share: cached latents, the noise schedule, and how samples are drawn."""

    latents: str = option("", "latents of save_compressed_latent.py; empty: ROOT/latents", group="paths", free=True)
    aekl: str = option("", "autoencoder that made the latents; empty: ROOT/runs/aekl/checkpoints/best.ckpt", group="paths", free=True)

    classes: tuple[str, ...] = option(("AD", "CN", "MCI"), "diagnoses that take part; none given: all rows", group="data")
    latent: str = option("sample", "train on z = mu + sigma eps, drawn anew each epoch, or on mu", choices=("sample", "mean"), group="data")
    latent_scale: str = option("dataset", "scaling of latents: mean and SD per channel of the training set; around its mean latent image (voxel: for registered scans); or the original's constant 0.8730", choices=("dataset", "voxel", "upstream"), group="data")

    timesteps: int = option(1000, "length T of the noise schedule", unit="steps", group="diffusion")
    schedule: str = option("linear", "noise schedule", choices=("linear", "cosine"), group="diffusion")
    beta_start: float = option(1e-4, "first beta of the linear schedule", group="diffusion")
    beta_end: float = option(0.02, "last beta of the linear schedule", group="diffusion")
    clip: float = option(0.0, "bound of the predicted clean latent in samplers; 0: none (the original clamps to 1)", group="diffusion")
    spacing: str = option("trailing", "steps that a short sampler visits; nodes: the original's", choices=("trailing", "leading", "linspace", "nodes"), group="diffusion")
    final: str = option("clean", "where the last sampling step leads: to no noise, or to the noise of t = 0 as published", choices=("clean", "first"), group="diffusion")
    sample_steps: int = option(50, "sampling steps of pictures, test and predict", group="diffusion", free=True)
    n_samples: int = option(4, "samples of a picture, and of predict of the prior", group="diffusion", free=True)

    batch_size: int = option(128, "latents per optimizer step, over all ranks and micro-batches", unit="latents", group="training")
    epochs: int = option(500, "length of the training", group="training", free=True)
    lr: float = option(2.5e-5, "learning rate of Adam", group="training")
    ema_decay: float = option(0.999, "decay of the averaged weights, per optimizer step", group="training")
    ema_start: int = option(100, "steps for which the average is a plain copy", unit="steps", group="training")
    patience: int = option(100, "stop after so many validations without improvement; 0: never", group="training", free=True)
    sample_every: int = option(50, "decoded samples as a picture; 0: never", unit="epochs", group="training", free=True)

    def __post_init__(self):
        super().__post_init__()
        if self.timesteps < 2 or not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError("--timesteps must be at least 2, and 0 < --beta_start <= --beta_end < 1")
        if self.clip < 0 or (self.clip and self.final == "clean"):
            raise UserError(f"--clip {self.clip}: choose 0 (no clamp), or a positive bound together with --final first")
        root = Path(self.root)
        self.latents = self.latents or str(root / "latents")
        self.aekl = self.aekl or str(root / "runs" / "aekl" / "checkpoints" / "best.ckpt")


@dataclass
class PretrainConfig(DiffusionConfig):
    """Stage 2: the unconditional prior over latents."""

    stage: ClassVar[str] = "ldae_pretrain"

    base_channels: int = option(256, "width of the first level", group="model")
    channel_mult: tuple[int, ...] = option((1, 2, 3), "width multiplier per level", group="model")
    num_res_blocks: int = option(2, "residual blocks per level", group="model")
    attention_resolutions: tuple[int, ...] = option((2, 4), "downsampling factors at which the network attends", group="model")
    num_heads: int = option(1, "attention heads", group="model")
    head_channels: int = option(-1, "channels per attention head; -1: from --num_heads", group="model")
    new_attention_order: bool = option(False, "split heads after q, k, v instead of before", group="model")
    dropout: float = option(0.1, "dropout inside residual blocks", group="model")
    isotropic: bool = option(True, "pool all three axes; the original pools the last two", group="model")
    norm_groups: int = option(32, "groups of the group norms; narrow networks need fewer, or every channel is normalised by itself", group="model")

    prediction: str = option("eps", "what the network predicts: eps as published, or v, whose samples keep their scale after a short training", choices=("eps", "v"), group="diffusion")


@dataclass
class ReprLearnConfig(DiffusionConfig):
    """Stage 3: semantic encoder and gradient estimator around the frozen prior (whose file says how it is built)."""

    stage: ClassVar[str] = "ldae_repr_learn"

    prior: str = option("", "frozen prior; empty: ROOT/runs/ldae_pretrain/checkpoints/best.ckpt", group="paths", free=True)
    backbone_weights: str = option("", "pretrained weights of the 2D backbone (torchvision's key names); empty: from scratch", group="paths", free=True)

    backbone: str = option("convnext_small", "2D backbone of the semantic encoder", choices=BACKBONES, group="model")
    backbone_depths: tuple[int, ...] = option((), "blocks per stage instead of those of --backbone", group="model")
    backbone_widths: tuple[int, ...] = option((), "width per stage instead of those of --backbone", group="model")
    code_dim: int = option(768, "width of the semantic code", group="model")
    encoder_heads: int = option(8, "heads of the slice attention", group="model")
    max_slices: int = option(160, "most slices that the position code knows; the original's 128 cannot take coronal slices", group="model")
    encoder_dropout: float = option(0.1, "dropout of position code and slice attention", group="model")
    drop_path: float = option(0.4, "stochastic depth of the backbone at its last block", group="model")

    linear_image: bool = option(False, "add to the estimator's output an image of the latent's size that is linear in the code: without, short trainings of narrow networks hardly learn to draw what the code says", group="model")

    standardise_codes: bool = option(False, "start the encoder so that codes of the training scans have mean 0 and SD 1; from scratch they are nearly alike, and a short training then ignores them", group="model")
    gamma: float = option(0.1, "exponent of the SNR in the loss weight; a negative one favours high noise, where most must come from the code", group="loss")
    coefficient: str = option("training", "guidance of samplers: the coefficient that training uses, or sqrt(1 - alpha_bar) as published", choices=("training", "sampling"), group="diffusion")

    lr_encoder: float = option(0.0, "learning rate of the encoder; 0: that of --lr", group="training")
    batch_size: int = option(32, "scans per optimizer step, over all ranks and micro-batches", unit="scans", group="training")
    accumulate: int = option(4, "micro-batches per optimizer step and rank (memory, not speed)", group="training")
    epochs: int = option(400, "length of the training", group="training", free=True)
    patience: int = option(75, "stop after so many validations without improvement; 0: never", group="training", free=True)

    def __post_init__(self):
        super().__post_init__()
        check_backbone(self)
        self.prior = self.prior or str(Path(self.root) / "runs" / "ldae_pretrain" / "checkpoints" / "best.ckpt")


@dataclass
class SupervisedConfig(StageConfig):
    """What the supervised baselines share: the 2.5D encoder with a linear head."""

    backbone_weights: str = option("", "pretrained weights of the 2D backbone (torchvision's key names); empty: from scratch", group="paths", free=True)

    backbone: str = option("convnext_small", "2D backbone of the encoder", choices=BACKBONES, group="model")
    backbone_depths: tuple[int, ...] = option((), "blocks per stage instead of those of --backbone", group="model")
    backbone_widths: tuple[int, ...] = option((), "width per stage instead of those of --backbone", group="model")
    code_dim: int = option(768, "width of the encoder's output", group="model")
    encoder_heads: int = option(8, "heads of the slice attention", group="model")
    max_slices: int = option(160, "most slices that the position code knows; the original's 128 cannot take coronal slices", group="model")
    encoder_dropout: float = option(0.1, "dropout of position code and slice attention", group="model")
    drop_path: float = option(0.4, "stochastic depth of the backbone at its last block", group="model")

    batch_size: int = option(8, "scans per optimizer step, over all ranks and micro-batches", unit="scans", group="training")
    accumulate: int = option(2, "micro-batches per optimizer step and rank (memory, not speed)", group="training")
    epochs: int = option(50, "length of the training", group="training", free=True)
    weight_decay: float = option(0.0, "L2 term of Adam", group="training")
    bootstrap: int = option(2000, "resamples of the intervals, drawn by subject", group="training", free=True)

    def __post_init__(self):
        super().__post_init__()
        check_backbone(self)


@dataclass
class ClassificationConfig(SupervisedConfig):
    """Supervised baseline: diagnosis from the scan."""

    stage: ClassVar[str] = "classification"

    classes: tuple[str, ...] = option(("AD", "CN"), "diagnoses to tell apart; a class's index is its alphabetical rank", group="data")
    positive: str = option("AD", "diagnosis that metrics of two classes call positive", group="data", free=True)
    class_weights: bool = option(False, "weigh classes in the loss by the inverse of their training frequency", group="loss")
    lr: float = option(1e-6, "learning rate of Adam", group="training")
    patience: int = option(5, "stop after so many validations without improvement; 0: never", group="training", free=True)

    def __post_init__(self):
        super().__post_init__()
        if len(set(self.classes)) < 2:
            raise UserError(f"--classes {' '.join(self.classes)}: give at least two diagnoses to tell apart")
        if self.positive not in self.classes:
            raise UserError(f"--positive {self.positive}: must be one of --classes {' '.join(self.classes)}")


@dataclass
class RegressionConfig(SupervisedConfig):
    """Supervised baseline: age from the scan."""

    stage: ClassVar[str] = "regression"

    classes: tuple[str, ...] = option(("AD", "CN", "MCI"), "diagnoses that take part; none given: all rows", group="data")
    age_scale: str = option("train", "scaling of ages: mean and SD of the training subjects, or the original's (age - 50.4) / 97.3", choices=("train", "upstream"), group="loss")
    weight_decay: float = option(1e-3, "L2 term of Adam", group="training")
    patience: int = option(10, "stop after so many validations without improvement; 0: never", group="training", free=True)


def check_ranges(config) -> None:
    """UserError for a number that no training can use, such as a negative length, before anything is written."""
    for names, fits, wanted in (
        (POSITIVE, lambda x: x >= 1, "at least 1"),
        (NOT_NEGATIVE, lambda x: x >= 0, "0 or more"),
        (SHARES, lambda x: 0 <= x < 1, "0 or more and less than 1"),
    ):
        for name in names:
            value = getattr(config, name, ())
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(map(fits, numbers)):
                raise UserError(f"--{name} {' '.join(map(str, numbers))}: must be {wanted}")
    for name in ("channels", "channel_mult"):
        if getattr(config, name, None) == ():
            raise UserError(f"--{name}: give a number for every level")
    head_channels = getattr(config, "head_channels", -1)
    if head_channels < 1 and head_channels != -1:
        raise UserError(f"--head_channels {head_channels}: must be -1 (from --num_heads) or at least 1")


def check_backbone(config) -> None:
    """UserError for stages, widths and heads that do not fit together."""
    if len(config.backbone_depths) != len(config.backbone_widths):
        raise UserError("--backbone_depths and --backbone_widths: give both, with one number per stage")
    if config.backbone_widths and config.backbone_widths[-1] != config.code_dim:
        raise UserError(f"--code_dim {config.code_dim}: must be the last of --backbone_widths {config.backbone_widths}")
    if config.code_dim % config.encoder_heads:
        raise UserError(f"--code_dim {config.code_dim} cannot be shared by --encoder_heads {config.encoder_heads}")


CONFIGS = {c.stage: c for c in (AEKLConfig, PretrainConfig, ReprLearnConfig, ClassificationConfig, RegressionConfig)}

# What the original does and we corrected, through ordinary options.
UPSTREAM = dict(intensity="minmax", order="file", split_rule="upstream")
UPSTREAM_DIFFUSION = dict(latent_scale="upstream", ema_start=0, clip=1.0, spacing="nodes", final="first")
UPSTREAM_ENCODER = dict(max_slices=128)
# A quarter of the width at half the resolution: hours on one GPU; `make_phantom.py --shape 64 80 64`.
SMALL = dict(shape=(64, 80, 64), spacing_mm=3.0)
SMALL_ENCODER = dict(backbone_depths=(2, 2, 6, 2), backbone_widths=(32, 64, 128, 256), code_dim=256, drop_path=0.1)
# Two CPU cores, `make_phantom.py --shape 24 32 24`: latents of 8x6x8x6, minutes for all stages.
TINY = dict(shape=(24, 32, 24), spacing_mm=8.0, accumulate=1, patience=0, num_workers=0, lr_schedule="cosine")
TINY_ENCODER = dict(backbone_depths=(1, 1, 1), backbone_widths=(16, 32, 64), code_dim=64, encoder_heads=4, drop_path=0.0)

PRESETS = {
    "aekl": {
        "paper": {},
        "upstream": UPSTREAM | dict(val_size=0.05, lpips_sum=True, lpips_centred=False),
        "small": SMALL | dict(channels=(32, 64, 64), disc_channels=32, accumulate=1),
        "tiny": TINY | dict(
            channels=(8, 16, 32), latent_channels=8, num_res_blocks=1, norm_groups=4, posterior_logvar=-6.0, disc_channels=8, disc_layers=2, perceptual_weight=0.0,
            kl_weight=1e-9, adv_start=3500, batch_size=2, steps=4000, lr=3e-3, lr_d=1e-3, ema_decay=0.99, channels_last=True, val_every=4, sample_every=8,
        ),
    },
    "ldae_pretrain": {
        "paper": {},
        "upstream": UPSTREAM | UPSTREAM_DIFFUSION | dict(val_size=0.005, isotropic=False),
        "small": SMALL | dict(base_channels=64, prediction="v", batch_size=64, lr=1e-4),
        "tiny": TINY | dict(
            latent_scale="voxel", prediction="v", base_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,), norm_groups=4, dropout=0.0, batch_size=4,
            steps=4000, lr=2e-3, ema_decay=0.99, val_every=10, sample_every=50, sample_steps=20,
        ),
    },
    "ldae_repr_learn": {
        "paper": {},
        "upstream": UPSTREAM | UPSTREAM_DIFFUSION | UPSTREAM_ENCODER | dict(val_size=0.005, coefficient="sampling"),
        "small": SMALL | SMALL_ENCODER | dict(standardise_codes=True, batch_size=16, accumulate=2, lr=1e-4),
        # From scratch and in minutes: without these the encoder gives every scan the same code.
        "tiny": TINY | TINY_ENCODER | dict(
            linear_image=True, standardise_codes=True, encoder_dropout=0.0, gamma=-0.5, lr_encoder=5e-4,
            latent_scale="voxel", batch_size=4, steps=4000, lr=2e-3, ema_decay=0.99, val_every=10, sample_every=50, sample_steps=20,
        ),
    },
    "classification": {
        "paper": {},
        "upstream": UPSTREAM | UPSTREAM_ENCODER | dict(val_size=0.3),
        "small": SMALL | SMALL_ENCODER | dict(lr=1e-4, accumulate=1),
        "tiny": TINY | TINY_ENCODER | dict(batch_size=8, steps=200, lr=1e-3, val_every=5, sample_every=0, encoder_dropout=0.0),
    },
    "regression": {
        "paper": {},
        "upstream": UPSTREAM | UPSTREAM_ENCODER | dict(val_size=0.3, age_scale="upstream"),
        "small": SMALL | SMALL_ENCODER | dict(lr=1e-4, accumulate=1),
        "tiny": TINY | TINY_ENCODER | dict(batch_size=8, steps=200, lr=1e-3, val_every=5, sample_every=0, encoder_dropout=0.0),
    },
}
for _presets in PRESETS.values():
    _presets["smoke"] = _presets["tiny"]  # design.md's name of it


# fmt: on
# ---- files ----------------------------------------------------------------------------------------------------------


def find_file(word: str) -> Path:
    """The file that `--config WORD` means; the name of a stage stands for ours. UserError if there is none."""
    path = HERE / "config" / f"{word}.yaml" if word in STAGES else Path(word).expanduser()
    if not path.is_file():
        names = ", ".join(f"{stage}.yaml" for stage in STAGES)
        raise UserError(f"no configuration file {path}; ours are {names} in {HERE / 'config'}")
    return path


def read_file(path: Path) -> tuple[str, dict]:
    """Stage and option values of a YAML file in sections, or of a run's config.json; UserError for anything else.

    The file names its `stage:`; every other key is an option, or a section with options of that group.
    """
    content = _load_yaml(path)
    stage = content.pop("stage", None)
    if stage not in CONFIGS:
        said = f"stage {stage!r} is unknown{_suggest(stage, STAGES)}" if stage else "no stage is named"
        raise UserError(f"{path}: {said}; write `stage:` with one of {', '.join(STAGES)} at its top")
    groups = {f.name: f.metadata["group"] for f in fields(CONFIGS[stage])}
    values = {}
    for key, value in content.items():
        if key in groups:
            values[key] = _filled_in(f"{path}: {key}", value)
        elif key not in SECTIONS:
            raise UserError(f"{path}: unknown section {key!r}{_suggest(key, (*SECTIONS, *groups))}; sections of stage "
                            f"{stage} are {', '.join(dict.fromkeys(groups.values()))}")  # fmt: skip
        elif not isinstance(value or {}, dict):
            raise UserError(f"{path}: section {key} holds {value!r}; write options below it, one `name: value` a line")
        else:
            for name, item in (value or {}).items():
                check_section(f"{path}: ", key, name, stage)
                values[name] = _filled_in(f"{path}: {key}: {name}", item)
    return stage, values


def check_section(where: str, section: str, name: str, stage: str) -> None:
    """UserError unless option `name` belongs to `section` at this stage."""
    groups = {f.name: f.metadata["group"] for f in fields(CONFIGS[stage])}
    if section not in SECTIONS:
        raise UserError(f"{where}unknown section {section!r}{_suggest(section, SECTIONS)}")
    if name not in groups:
        raise UserError(f"{where}stage {stage} has no option {section}.{name}{_suggest(name, groups)}")
    if groups[name] != section:
        raise UserError(f"{where}option {name} belongs to section {groups[name]}, not {section}")


def _load_yaml(path: Path) -> dict:
    import yaml

    class Loader(yaml.SafeLoader):
        """Also reads 1e-4 as a number, as YAML 1.2 does."""

    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        content = yaml.load(path.read_text(), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML ({error}); repair it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no options; copy one of {HERE / 'config'} and change it")
    return {str(key): value for key, value in content.items()}


def _filled_in(where: str, value):
    """The value; UserError for what a template leaves to its reader, such as `{ INSERT_PATH_TO_CSV }`."""
    if isinstance(value, dict) or (isinstance(value, str) and re.search(r"\bINSERT[_ ]", value)):
        shown = "{ " + ", ".join(map(str, value)) + " }" if isinstance(value, dict) else value
        raise UserError(f"{where} is still the placeholder {shown}: write a value, or leave the line out (default)")
    return value


def _suggest(word, known) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""
