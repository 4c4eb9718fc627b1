"""Every option of `main.py`, one line each: a dataclass per stage, named in the YAML as `stage:`. Imports no torch.

Defaults are the numbers of the public configuration files; where the original was wrong the default is the corrected
choice, and `--preset upstream` sets the original's science instead. A batch is what one optimizer step sees (all
ranks, all micro-batches): the original's batch size x GPUs x accumulated batches.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from common.cli import TrainOptions, UserError, option

HERE = Path(__file__).resolve().parent
STAGES = ("vqgan", "guide", "ldm", "lapt", "ldm3d", "lapt3d")
AUGMENTATIONS = ("none", "plausible", "strong", "upstream", "upstream3d")
SECTIONS = ("general", "paths", "data", "model", "loss", "diffusion", "training")  # of the YAML files: option groups
NOT_NEGATIVE = (
    "max_steps", "epochs", "steps", "base_learning_rate", "grad_clip", "ema_start", "patience", "val_items",
    "sample_every", "save_every", "weight_decay",
)  # fmt: skip

# fmt: off


@dataclass
class StageConfig(TrainOptions):
    """What all stages share."""

    stage: ClassVar[str] = ""
    volumes: ClassVar[bool] = False  # whether the stage sees volumes or single slices

    seed: int = option(23, "seed of everything random")
    num_workers: int = option(4, "data loading processes; the result does not depend on it", free=True)
    project: str = option("", "name of the study, for config.json; nothing is sent anywhere", free=True)

    root: str = option(str(HERE), "folder that holds data/ and runs/", group="paths", free=True)
    data: str = option("", "prepared data of preprocessing.py; empty: ROOT/data", group="paths", free=True)
    logdir: str = option("", "folder of the runs; empty: ROOT/runs", group="paths", free=True)
    name: str = option("", "name of the run; empty: the stage, so that the same command continues it", group="paths", free=True)
    trust_pickle: bool = option(False, "allow weight files that need pickle; it can run code", group="paths", free=True)
    overwrite: bool = option(False, "replace results of the test pass that exist", group="paths", free=True)

    augment: str = option("plausible", "random changes of training items (dataset.AUGMENTATIONS)", choices=AUGMENTATIONS, group="data")

    base_learning_rate: float = option(0.0, "the original's: the learning rate is this times the batch of a step; 0: --lr", group="model")

    batch_size: int = option(48, "items per optimizer step, over all ranks and micro-batches", unit="items", group="training")
    accumulate: int = option(1, "micro-batches per optimizer step and rank (memory, not speed)", group="training")
    epochs: int = option(1000, "length of the training", group="training", free=True)
    steps: int = option(0, "length in optimizer steps; 0: from epochs", group="training", free=True)
    lr: float = option(1e-4, "learning rate", group="training")
    lr_schedule: str = option("constant", "cosine falls to zero at the end", choices=("constant", "cosine"), group="training")
    grad_clip: float = option(1.0, "largest gradient norm; 0: no clipping", group="training")
    ema_decay: float = option(0.0, "average of the weights per optimizer step, which is then what is validated and kept; 0: none", group="training")
    ema_start: int = option(0, "steps for which the average is a plain copy", unit="steps", group="training")
    patience: int = option(0, "stop after so many validations without improvement; 0: never", group="training", free=True)
    val_every: int = option(1, "validation interval", unit="epochs", group="training")
    val_items: int = option(256, "validation items, evenly spaced among all; 0: all", group="training")
    sample_every: int = option(10, "picture for samples/; 0: never", unit="epochs", group="training", free=True)
    save_every: int = option(1000, "write checkpoints/last.ckpt every so many steps; 0: at validations only", unit="steps", group="training", free=True)
    log_every: int = option(50, "training log interval", unit="steps", group="training")
    checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third slower", group="training", free=True)

    def __post_init__(self):
        if self.seed < 0:
            raise UserError(f"seed {self.seed}: seeds are 0 or more")
        self._check_numbers()
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"training.ema_decay {self.ema_decay}: choose 0 (no average) or more and less than 1")
        root = Path(self.root)
        self.data = self.data or str(root / "data")
        self.logdir = self.logdir or str(root / "runs")
        self.name = self.name or self.stage

    def _check_numbers(self) -> None:
        """UserError for lengths, rates and sizes of networks that cannot be."""
        for f in fields(self):
            value, name = getattr(self, f.name), f"{f.metadata['group']}.{f.name}"
            size = f.metadata["group"] == "model" and f.type in ("int", "tuple[int, ...]") and "attention" not in f.name
            sizes = value if isinstance(value, (list, tuple)) else (value,)
            if size and (not sizes or min(sizes) < 1):
                raise UserError(f"{name} {value}: sizes of networks are at least 1")
            if f.name in NOT_NEGATIVE and value < 0:
                raise UserError(f"{name} {value}: must be 0 or more")
        if self.learning_rate <= 0:
            raise UserError(f"training.lr {self.lr}: must be above 0")
        if not (self.steps or self.epochs):
            raise UserError("training.steps and training.epochs are both 0: give the training a length")

    @property
    def run(self) -> Path:
        return Path(self.logdir) / self.name

    @property
    def best_path(self) -> Path:
        return self.run / "checkpoints" / "best.ckpt"

    @property
    def last_path(self) -> Path:
        return self.run / "checkpoints" / "last.ckpt"

    @property
    def learning_rate(self) -> float:
        return self.base_learning_rate * self.batch_size or self.lr

    def earlier_run(self, path: str, stage: str) -> str:
        """`path`, by default the run of an earlier stage beside this one."""
        return path or str(Path(self.logdir) / stage)


@dataclass
class VQGANConfig(StageConfig):
    """The autoencoder: DWI and ADC slices to a latent with codebook, 4 times smaller along each side."""

    stage: ClassVar[str] = "vqgan"

    init: str = option("", "start from the weights of this autoencoder (run folder or file)", group="paths", free=True)
    perceptual_weights: tuple[str, ...] = option((), "pretrained files of the perceptual term: VGG16 and LPIPS heads", group="paths", free=True)

    normalisation: str = option("quantile", "DWI and ADC: quantiles to [-1, 1] (2D release), or z-scores clipped at 3 (3D release)", choices=("quantile", "zscore"), group="data")
    statistics: str = option("training", "whose quantiles, mean and SD: of the training set, or of the very image, which CT-only sampling does not have", choices=("training", "case"), group="data")

    channels: int = option(128, "width of the first level", group="model")
    channel_mult: tuple[int, ...] = option((1, 2, 4), "width multiplier per level; each level but the last halves the sides", group="model")
    num_res_blocks: int = option(2, "residual blocks per level", group="model")
    z_channels: int = option(3, "channels before the last 1x1 convolution of the encoder", group="model")
    embed_dim: int = option(3, "latent channels", group="model")
    n_embed: int = option(8192, "codebook entries", group="model")
    attention_levels: tuple[int, ...] = option((), "levels with self-attention, beside the middle", group="model")
    norm_groups: int = option(32, "groups of the group norm", group="model")
    modality_separate: bool = option(False, "own stem and head for DWI and for ADC (3D release)", group="model")
    disc_channels: int = option(64, "width of the discriminator's first layer (then x2, x4, x8)", group="model")
    disc_layers: int = option(3, "strided layers of the discriminator", group="model")

    l2_weight: float = option(0.0, "weight of the mean squared error beside the mean absolute one, which in a short training passes over lesions of a few pixels", group="loss")
    codebook_weight: float = option(1.0, "weight of the codebook term", group="loss")
    beta: float = option(0.25, "weight of the commitment inside the codebook term", group="loss")
    legacy_beta: bool = option(False, "beta on the codebook's side of it, as the original has it", group="loss")
    perceptual_weight: float = option(0.0, "weight of the perceptual term; 0 needs no pretrained files", group="loss")
    disc_weight: float = option(0.2, "factor of the adaptive adversarial weight; 0: no discriminator", group="loss")
    disc_start: int = option(30001, "first step with the adversarial terms, in optimizer steps of the autoencoder", unit="steps", group="loss")

    batch_size: int = option(4, "slices per optimizer step, over all ranks and micro-batches", unit="slices", group="training")
    accumulate: int = option(2, "micro-batches per optimizer step and rank (memory, not speed)", group="training")
    lr: float = option(1.8e-5, "learning rate of both Adams (betas 0.5, 0.9)", group="training")
    revive_every: int = option(0, "move codebook entries that nothing uses onto training latents, at the start and so often in the first half; 0: never. Short trainings use a handful of entries without", unit="steps", group="training")

    def __post_init__(self):
        super().__post_init__()
        if min(self.l2_weight, self.codebook_weight, self.perceptual_weight, self.disc_weight, self.beta) < 0:
            raise UserError("loss.l2_weight, codebook_weight, beta, perceptual_weight and disc_weight must be 0 or more")
        if min(self.disc_start, self.revive_every) < 0:
            raise UserError("loss.disc_start and training.revive_every must be 0 or more")


@dataclass
class GuideConfig(StageConfig):
    """The lesion segmentation network that guides the volume post-training."""

    stage: ClassVar[str] = "guide"
    volumes: ClassVar[bool] = True

    normalisation: str = option("quantile", "of DWI and ADC, as the autoencoder has it: quantiles to [-1, 1] (2D release), or z-scores clipped at 3 (3D release)", choices=("quantile", "zscore"), group="data")
    statistics: str = option("training", "whose quantiles, mean and SD: of the training set, or of the very image, which CT-only sampling does not have", choices=("training", "case"), group="data")
    size: tuple[int, int, int] = option((192, 224, 32), "volumes are padded to this grid; of larger ones it is taken about the brain", unit="voxels", group="data")
    window: int = option(8, "consecutive slices of a training item, two of three on lesion where there is one", unit="slices", group="data")
    augment: str = option("strong", "random changes of training items (dataset.AUGMENTATIONS)", choices=AUGMENTATIONS, group="data")

    channels: int = option(64, "width of the first level", group="model")
    channel_mult: tuple[int, ...] = option((1, 2, 4), "width multiplier per level; each level but the last halves all sides", group="model")
    num_res_blocks: int = option(2, "residual blocks per level of the way down; one more on the way up", group="model")
    norm_groups: int = option(16, "groups of the group norm", group="model")

    tversky_alpha: float = option(0.7, "Tversky weight of false positives", group="loss")
    tversky_beta: float = option(0.3, "Tversky weight of false negatives", group="loss")
    focal_gamma: float = option(2.0, "exponent of the focal Dice term is this plus 1", group="loss")
    smooth: float = option(1.0, "added to both sides of the overlap ratios, so that windows without lesion teach too; the original: 1e-6", unit="voxels", group="loss")
    threshold: float = option(0.5, "probability above which a voxel counts as lesion", group="loss", free=True)

    batch_size: int = option(8, "windows per optimizer step, over all ranks and micro-batches", unit="windows", group="training")
    accumulate: int = option(2, "micro-batches per optimizer step and rank (memory, not speed)", group="training")
    epochs: int = option(2000, "length of the training", group="training", free=True)
    lr: float = option(3.6e-5, "learning rate of Adam (betas 0.5, 0.9)", group="training")
    val_items: int = option(0, "validation volumes, evenly spaced among all; 0: all", group="training")

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.threshold < 1:
            raise UserError(f"loss.threshold {self.threshold}: choose more than 0 and less than 1")
        if min(self.size) < 1 or not 1 <= self.window <= self.size[2]:
            raise UserError(f"data.size {self.size} must be positive, and data.window {self.window} is to be 1 to its {self.size[2]} slices")


@dataclass
class DiffusionConfig(StageConfig):
    """What all diffusion stages share: frozen autoencoder, noise schedule, one average over all that is trained."""

    trainable: str = option("all", "what is trained: U-Net and conditioner, the U-Net alone, or the layers between slices", choices=("all", "unet", "inter_slice"), group="model")

    sample_steps: int = option(50, "steps of sampling: pictures and the test pass", group="diffusion", free=True)
    sampler: str = option("ddim", "sampler of pictures and the test pass", choices=("ddim", "dpmpp_2m"), group="diffusion", free=True)

    lr: float = option(9.6e-5, "learning rate of AdamW", group="training")
    weight_decay: float = option(0.01, "decoupled weight decay of AdamW", group="training")
    ema_decay: float = option(0.9999, "decay of the averaged weights, per optimizer step; 0: no average", group="training")
    ema_start: int = option(1000, "steps for which the average is a plain copy", unit="steps", group="training")
    val_times: int = option(4, "timesteps of the fixed (t, noise) table per validation item", group="training")
    select: str = option("loss", "what picks best.ckpt: noise loss, the lesion-aware score, or simply the last validation", choices=("loss", "lesion", "last"), group="training")

    def __post_init__(self):
        super().__post_init__()
        if self.sample_steps < 1 or self.val_times < 1:
            raise UserError("diffusion.sample_steps and training.val_times must be at least 1")


@dataclass
class LDMConfig(DiffusionConfig):
    """The conditional latent diffusion model of slices: latent of DWI and ADC from CT perfusion."""

    stage: ClassVar[str] = "ldm"

    vqgan: str = option("", "the frozen autoencoder: run folder or file; empty: LOGDIR/vqgan", group="paths", free=True)
    cache: str = option("", "LMDB cache of latents, used where augment is none; empty: RUN/cache", group="paths", free=True)

    ctp_window: tuple[float, float] | None = option(None, "window of CTP; none: that of the prepared data, by default 0 to 200", unit="HU", group="data")

    model_channels: int = option(224, "width of the first level of the U-Net", group="model")
    channel_mult: tuple[int, ...] = option((1, 4, 8), "width multiplier per level", group="model")
    num_res_blocks: int = option(2, "residual blocks per level", group="model")
    attention_resolutions: tuple[int, ...] = option((8, 4, 2), "downsampling factors at which the U-Net attends", group="model")
    head_channels: int = option(32, "channels per attention head", group="model")
    conditioner: str = option("rescaler", "CTP to the latent grid: block means and a 1x1 convolution, or the learned branch of the 3D release besides", choices=("rescaler", "volume"), group="model")
    conditioner_channels: int = option(32, "width of the learned branch", group="model")

    timesteps: int = option(1000, "length T of the noise schedule", unit="steps", group="diffusion")
    schedule: str = option("scaled_linear", "noise schedule", choices=("scaled_linear", "linear", "cosine"), group="diffusion")
    beta_start: float = option(0.0015, "first beta", group="diffusion")
    beta_end: float = option(0.0195, "last beta", group="diffusion")
    prediction: str = option("eps", "what the U-Net predicts: the noise, as published, or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) z_0, whose estimate of z_0 is of use at every step after short trainings too", choices=("eps", "v"), group="diffusion")
    latent_scale: str = option("training", "scaling of latents: mean and SD per channel of the training set, or none as the original", choices=("training", "none"), group="diffusion")
    spacing: str = option("trailing", "steps that a short sampler visits; leading: the original's, one later", choices=("trailing", "leading", "linspace"), group="diffusion")
    final: str = option("clean", "where the last sampling step leads: to no noise, or to the noise of t = 0 as in the original", choices=("clean", "first"), group="diffusion")

    def __post_init__(self):
        super().__post_init__()
        if self.ctp_window and self.ctp_window[0] >= self.ctp_window[1]:
            raise UserError(f"data.ctp_window {self.ctp_window}: the lower end must be below the upper")
        if self.timesteps < 2 or not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError("diffusion.timesteps must be at least 2, and 0 < beta_start <= beta_end < 1")
        if self.conditioner == "volume" and not self.volumes:
            raise UserError("model.conditioner volume sees stacks of slices: take it with stage ldm3d, here rescaler")
        if self.trainable == "inter_slice" and not self.volumes:
            raise UserError("model.trainable inter_slice: only the networks of ldm3d and lapt3d have such layers")
        self.vqgan = self.earlier_run(self.vqgan, "vqgan")
        self.cache = self.cache or str(self.run / "cache")


@dataclass
class LAPTConfig(DiffusionConfig):
    """Lesion-aware post-training of a slice LDM: pixel and lesion terms on the decoded one-step estimate."""

    stage: ClassVar[str] = "lapt"

    ldm: str = option("", "the trained LDM to start from: run folder or file; empty: LOGDIR/ldm", group="paths", free=True)
    cache: str = option("", "LMDB cache of latents, used where augment is none; empty: RUN/cache", group="paths", free=True)

    w_img: float = option(0.01, "weight of the whole-image term", group="loss")
    w_les: float = option(0.02, "weight of the lesion term; with w_img 0 too it is plain continued training", group="loss")
    target: str = option("real", "what decoded estimates are compared with: the real images, or the autoencoder's reconstruction", choices=("real", "recon"), group="loss")
    weighting: str = option("snr", "weight of the pixel terms over timesteps: min(SNR, snr_gamma) / snr_gamma, only below t_max, or none as in the original", choices=("none", "snr", "range"), group="loss")
    snr_gamma: float = option(5.0, "SNR from which weighting snr is 1", group="loss")
    t_max: int = option(500, "first timestep without pixel terms of weighting range", group="loss")
    reduction: str = option("sample", "pixel terms: masked means per sample, or the original's ratios of sums over the batch", choices=("sample", "batch"), group="loss")
    init_weights: str = option("average", "weights of the LDM to start from: averaged, or raw as in the original", choices=("average", "raw"), group="training")

    batch_size: int = option(6, "items per optimizer step, over all ranks and micro-batches", unit="items", group="training")
    lr: float = option(1.2e-5, "learning rate of AdamW", group="training")
    ema_start: int = option(0, "steps for which the average is a plain copy", unit="steps", group="training")
    ema_decay: float = option(0.999, "decay of the averaged weights, per optimizer step; 0: no average", group="training")
    patience: int = option(50, "stop after so many validations without improvement; 0: never", group="training", free=True)
    select: str = option("lesion", "what picks best.ckpt: noise loss, the lesion-aware score, or simply the last validation", choices=("loss", "lesion", "last"), group="training")
    floor_steps: int = option(10, "sampling steps of the lesion error that the autoencoder's floor is compared with; 0: not measured", group="diffusion")

    def __post_init__(self):
        super().__post_init__()
        if min(self.w_img, self.w_les) < 0 or self.snr_gamma <= 0 or self.t_max < 1 or self.floor_steps < 0:
            raise UserError("loss.w_img and w_les must be 0 or more, snr_gamma and t_max positive, diffusion.floor_steps 0 or more")
        if self.trainable == "inter_slice" and not self.volumes:
            raise UserError("model.trainable inter_slice: only the networks of ldm3d and lapt3d have such layers")
        self.ldm = self.earlier_run(self.ldm, self.before)
        self.cache = self.cache or str(self.run / "cache")

    @property
    def before(self) -> str:
        """The stage whose result is trained on."""
        return "ldm"


@dataclass
class LDM3DConfig(LDMConfig):
    """The LDM of volumes: the slice network with layers between slices, from a trained 2D LDM."""

    stage: ClassVar[str] = "ldm3d"
    volumes: ClassVar[bool] = True

    ldm2d: str = option("", "2D LDM to start from, which decides the U-Net's sizes: run folder or file; empty: LOGDIR/ldm; none: from scratch on paths.vqgan", group="paths", free=True)

    size: tuple[int, int, int] = option((192, 224, 32), "volumes are padded to this grid; its last number is the stack that the networks see", unit="voxels", group="data")
    conditioner: str = option("volume", "CTP to the latent grid: block means and a 1x1 convolution, or the learned branch of the 3D release besides", choices=("rescaler", "volume"), group="model")

    batch_size: int = option(8, "volumes per optimizer step, over all ranks and micro-batches", unit="volumes", group="training")
    accumulate: int = option(8, "micro-batches per optimizer step and rank (memory, not speed)", group="training")
    epochs: int = option(200, "length of the training", group="training", free=True)
    lr: float = option(1.6e-5, "learning rate of AdamW", group="training")
    val_items: int = option(0, "validation volumes, evenly spaced among all; 0: all", group="training")
    checkpointing: bool = option(True, "recompute activations in the backward pass: less memory, a third slower", group="training", free=True)

    def __post_init__(self):
        super().__post_init__()
        if min(self.size) < 1:
            raise UserError(f"data.size {self.size} must be positive")
        self.ldm2d = "" if self.ldm2d == "none" else self.earlier_run(self.ldm2d, "ldm")


@dataclass
class LAPT3DConfig(LAPTConfig):
    """Lesion-aware post-training of a volume LDM: a window of slices is decoded, and segmented by the frozen guide."""

    stage: ClassVar[str] = "lapt3d"
    volumes: ClassVar[bool] = True

    guide: str = option("", "the frozen guide: run folder or file; empty: LOGDIR/guide", group="paths", free=True)

    size: tuple[int, int, int] = option((192, 224, 32), "volumes are padded to this grid; its last number is the stack that the networks see", unit="voxels", group="data")

    w_les: float = option(0.0001, "weight of the lesion term; with w_img and w_seg 0 too it is plain continued training", group="loss")
    w_seg: float = option(0.001, "weight of the guide's term; 0 needs no guide", group="loss")
    window: int = option(8, "consecutive slices that are decoded per volume", unit="slices", group="loss")
    window_rule: str = option("centred", "which slices: about a random lesion slice, or beginning on one as in the original", choices=("centred", "upstream"), group="loss")
    lesion_share: float = option(2 / 3, "share of windows that are placed on lesion, where there is one; the original: 1", group="loss")
    tversky_alpha: float = option(0.1, "Tversky weight of false positives in the guide's term", group="loss")
    tversky_beta: float = option(0.9, "Tversky weight of false negatives in the guide's term", group="loss")
    focal_gamma: float = option(3.0, "exponent of the focal Dice term is this plus 1", group="loss")
    smooth: float = option(1.0, "added to both sides of the overlap ratios, so that windows without lesion teach too; the original: 1e-6", unit="voxels", group="loss")

    batch_size: int = option(8, "volumes per optimizer step, over all ranks and micro-batches", unit="volumes", group="training")
    accumulate: int = option(8, "micro-batches per optimizer step and rank (memory, not speed)", group="training")
    epochs: int = option(200, "length of the training", group="training", free=True)
    lr: float = option(1.6e-5, "learning rate of AdamW", group="training")
    val_items: int = option(0, "validation volumes, evenly spaced among all; 0: all", group="training")
    checkpointing: bool = option(True, "recompute activations in the backward pass: less memory, a third slower", group="training", free=True)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.lesion_share <= 1:
            raise UserError(f"loss.lesion_share {self.lesion_share}: choose 0 to 1")
        if not 1 <= self.window <= self.size[2]:
            raise UserError(f"loss.window {self.window}: choose 1 to {self.size[2]}, the slices of a volume (data.size)")
        if self.w_seg < 0:
            raise UserError(f"loss.w_seg {self.w_seg}: must be 0 or more")
        self.guide = self.earlier_run(self.guide, "guide")

    @property
    def before(self) -> str:
        return "ldm3d"


CONFIGS = {c.stage: c for c in (VQGANConfig, GuideConfig, LDMConfig, LAPTConfig, LDM3DConfig, LAPT3DConfig)}

# What the original does and we corrected, through ordinary options.
UPSTREAM = dict(augment="upstream", grad_clip=0.0)
UPSTREAM_3D = UPSTREAM | dict(augment="upstream3d")
UPSTREAM_SAMPLING = dict(latent_scale="none", spacing="leading", final="first", ema_start=0)
UPSTREAM_LAPT = dict(target="recon", weighting="none", reduction="batch", init_weights="raw", select="loss")
# The 3D release in the stages that both releases have.
RELEASE_3D = dict(normalisation="zscore", modality_separate=True, batch_size=32, lr=1.44e-4, epochs=2000)
UPSTREAM_VQGAN = UPSTREAM | dict(statistics="case", legacy_beta=True, disc_start=15001)
# A quarter of the width: hours on one GPU.
SMALL = dict(accumulate=1, epochs=200)
# Two CPU cores, `make_phantom.py --shape 48 48 8`: latents of 3 x 12 x 12, minutes for all stages.
TINY = dict(augment="none", accumulate=1, num_workers=0, lr_schedule="cosine", patience=0, checkpointing=False, sample_every=0)
TINY_LDM = dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), head_channels=16, conditioner_channels=16)

PRESETS = {
    "vqgan": {
        "paper": {},
        "paper3d": RELEASE_3D,
        "upstream": UPSTREAM_VQGAN,
        "upstream3d": UPSTREAM_VQGAN | RELEASE_3D,
        "small": SMALL | dict(channels=32, n_embed=1024, disc_channels=32, disc_start=5000, batch_size=16, lr=1e-4),
        "tiny": TINY | dict(
            channels=16, channel_mult=(1, 2, 2), num_res_blocks=1, n_embed=1024, z_channels=4, embed_dim=4, norm_groups=8, disc_channels=8, disc_layers=2,
            l2_weight=20.0, disc_start=500, batch_size=8, steps=600, lr=3e-3, ema_decay=0.98, revive_every=25, val_every=5,
        ),
    },
    "guide": {
        "paper": {},
        "paper3d": dict(normalisation="zscore"),
        "upstream": dict(normalisation="zscore", statistics="case", grad_clip=0.0, smooth=1e-6),
        "small": SMALL | dict(channels=16, size=(96, 112, 16), batch_size=4, lr=1e-4),
        "tiny": TINY | dict(channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4, size=(48, 48, 8), batch_size=4, steps=200, lr=2e-3, val_every=5),
    },
    "ldm": {
        "paper": {},
        "paper3d": dict(epochs=400),
        "upstream": UPSTREAM | UPSTREAM_SAMPLING,
        "upstream3d": UPSTREAM | UPSTREAM_SAMPLING | dict(epochs=400),
        "small": SMALL | dict(model_channels=64, channel_mult=(1, 2, 4), lr=1e-4),
        "tiny": TINY | TINY_LDM | dict(batch_size=16, steps=1500, lr=1e-3, ema_decay=0.99, ema_start=100, val_every=20, sample_steps=20),
    },
    "lapt": {
        "paper": {},
        "upstream": UPSTREAM | UPSTREAM_LAPT | dict(ema_decay=0.0),
        "small": SMALL | dict(lr=2e-5, batch_size=16),
        "tiny": TINY | dict(w_img=1.0, w_les=2.0, batch_size=8, steps=250, lr=2e-4, ema_decay=0.98, val_every=5, sample_steps=20),
    },
    "ldm3d": {
        "paper": {},
        "upstream": UPSTREAM_3D | UPSTREAM_SAMPLING,
        "small": SMALL | dict(size=(96, 112, 16), model_channels=64, channel_mult=(1, 2, 4), batch_size=4, accumulate=4, lr=1e-4),
        "tiny": TINY | TINY_LDM | dict(size=(48, 48, 8), batch_size=2, steps=200, lr=5e-4, ema_decay=0.98, val_every=5, sample_steps=20),
    },
    "lapt3d": {
        "paper": {},
        "upstream": UPSTREAM_3D | UPSTREAM_LAPT | dict(ema_decay=0.9999, window_rule="upstream", lesion_share=1.0, smooth=1e-6),
        "small": SMALL | dict(size=(96, 112, 16), batch_size=4, accumulate=4, lr=2e-5),
        "tiny": TINY | dict(size=(48, 48, 8), window=4, batch_size=2, steps=60, lr=2e-4, ema_decay=0.95, val_every=5, sample_steps=20),
    },
}
for _presets in PRESETS.values():
    _presets["smoke"] = _presets["tiny"]  # design.md's name of it

# Class names of the original's files, and the stage that each of them means here.
TARGETS = {
    "ldm.models.autoencoder.VQModel": "vqgan",
    "ldm3d_lapt.models.autoencoder.VQModel": "vqgan",
    "ldm3d_lapt.models.segmentation.SegmentationGuide3D": "guide",
    "ldm.models.diffusion.ddpm.LatentDiffusion": "ldm",
    "ldm.models.diffusion.ddpm_ft.LatentDiffusion": "lapt",
    "ldm3d_lapt.models.ddpm.LatentDiffusion": "ldm",
    "ldm3d_lapt.models.ddpm_volume.LatentDiffusionVolume": "ldm3d",
    "ldm3d_lapt.models.ddpm_volume_lapt.LatentDiffusionVolumeLAPT": "lapt3d",
}
# Keys of the original's files that mean something here: our option.
ALIASES = {
    "data.params.num_workers": "num_workers",
    "data.params.train.params.dataroot": "data",
    "lightning.trainer.max_epochs": "epochs",
    "lightning.trainer.max_steps": "steps",
    "lightning.trainer.accumulate_grad_batches": "accumulate",
    "model.params.embed_dim": "embed_dim",
    "model.params.n_embed": "n_embed",
    "model.params.ddconfig.ch": "channels",
    "model.params.ddconfig.ch_mult": "channel_mult",
    "model.params.ddconfig.num_res_blocks": "num_res_blocks",
    "model.params.ddconfig.z_channels": "z_channels",
    "model.params.lossconfig.params.disc_start": "disc_start",
    "model.params.lossconfig.params.disc_weight": "disc_weight",
    "model.params.lossconfig.params.codebook_weight": "codebook_weight",
    "model.params.lossconfig.params.perceptual_weight": "perceptual_weight",
    "model.params.linear_start": "beta_start",
    "model.params.linear_end": "beta_end",
    "model.params.timesteps": "timesteps",
    "model.params.unet_config.params.model_channels": "model_channels",
    "model.params.unet_config.params.channel_mult": "channel_mult",
    "model.params.unet_config.params.num_res_blocks": "num_res_blocks",
    "model.params.unet_config.params.attention_resolutions": "attention_resolutions",
    "model.params.unet_config.params.num_head_channels": "head_channels",
    "model.params.original_img_weight": "w_img",
    "model.params.original_lesion_weight": "w_les",
    "model.params.img_loss_weight": "w_img",
    "model.params.lesion_loss_weight": "w_les",
    "model.params.seg_loss_weight": "w_seg",
    "model.params.consecutive_slices": "window",
}


# fmt: on
# ---- files and overrides --------------------------------------------------------------------------------------------


def network_file(path: str | Path) -> Path:
    """The network file that a path means: of a run folder its best.ckpt, otherwise the path itself."""
    path = Path(path)
    return path / "checkpoints" / "best.ckpt" if path.is_dir() else path


def find_file(word: str) -> Path:
    """The file that `--base WORD` means; the name of a stage stands for ours. UserError if there is none."""
    path = HERE / "configs" / f"{word}.yaml" if word in STAGES else Path(word).expanduser()
    if not path.is_file():
        names = ", ".join(f"{stage}.yaml" for stage in STAGES)
        raise UserError(f"no configuration file {path}; ours are {names} in {HERE / 'configs'}")
    return path


def merge(paths: list[Path], words: list[str]) -> tuple[str, dict]:
    """Stage and option values of YAML files, merged from left to right, and of `a.b.c=value` words, merged last.

    UserError for anything that is no option of the stage.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged, where = OmegaConf.create({}), "the command line"
    try:
        for path in paths:
            where = path
            content = OmegaConf.load(path)
            if not OmegaConf.is_dict(content) or not content:
                raise UserError(f"{path} holds no options; copy one of {HERE / 'configs'} and change it")
            merged = OmegaConf.merge(merged, content)
        where = "the command line"
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(words))
        values = OmegaConf.to_container(merged, resolve=True)
    except (OSError, UnicodeDecodeError, ValueError, OmegaConfBaseException, _yaml_error()) as error:
        raise UserError(f"{where} cannot be read as options ({error}); repair it") from error
    return _flat(values, " and ".join([*map(str, paths), *words]))


def _yaml_error() -> type[Exception]:
    import yaml

    return yaml.YAMLError


def _flat(content: dict, where: str) -> tuple[str, dict]:
    """Stage and {option: value} of sections, of a run's config.json, or of a file in the original's schema."""
    content = {str(key): value for key, value in content.items()}
    stage = _stage(content, where)
    content.pop("stage", None)
    groups = {f.name: f.metadata["group"] for f in fields(CONFIGS[stage])}
    content, values = _without_original_schema(content, groups, where)
    for key, value in content.items():
        if key in SECTIONS and isinstance(value, dict) or value is None:
            for name, item in (value or {}).items():
                check_section(f"{where}: ", key, name, stage)
                values[name] = item
        elif key in groups:  # a run's config.json has no sections
            values[key] = value
        else:
            known = (*SECTIONS, *groups)
            raise UserError(f"{where}: unknown section {key!r}{suggest(key, known)}; sections of stage {stage} are "
                            f"{', '.join(dict.fromkeys(groups.values()))}")  # fmt: skip
    return stage, {name: value for name, value in values.items() if value is not None}


def _stage(content: dict, where: str) -> str:
    """The stage that a file names with `stage:`, or as the original does by a class in `model.target`."""
    stage, model = content.get("stage"), content.get("model")
    if stage is None and isinstance(model, dict) and "target" in model:
        if model["target"] not in TARGETS:
            raise UserError(f"{where}: model.target {model['target']} is unknown{suggest(model['target'], TARGETS)}; "
                            f"known are {', '.join(TARGETS)}")  # fmt: skip
        stage = TARGETS[model["target"]]
    if stage not in CONFIGS:
        said = f"stage {stage!r} is unknown{suggest(stage, STAGES)}" if stage else "no stage is named"
        raise UserError(f"{where}: {said}; write `stage:` with one of {', '.join(STAGES)} at its top")
    return stage


def _without_original_schema(content: dict, groups: dict, where: str) -> tuple[dict, dict]:
    """The rest of a file, and the options that its keys of the original's schema mean.

    UserError for such a key that means nothing here: silently ignored options would be worse.
    """
    nested = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    found, leaves = {}, {}
    for section, names in {"model": ("target", "params"), "data": ("target", "params"), "lightning": None}.items():
        part = nested.get(section)
        if isinstance(part, dict):
            for name in [n for n in part if names is None or n in names]:
                leaves |= _leaves(f"{section}.{name}", part.pop(name))
            if names is None:
                nested.pop(section)
    batch = leaves.pop("data.params.batch_size", None)
    for key, value in leaves.items():
        if key.endswith("target"):
            continue
        option_name = ALIASES.get(key)
        if option_name not in groups:
            raise UserError(f"{where}: {key} of the original's schema means nothing here{suggest(key, ALIASES)}; leave "
                            f"it out, the options are in {HERE / 'configs'}")  # fmt: skip
        found[option_name] = value
    if batch is not None:  # of one GPU and one micro-batch there, of a whole step here
        found["batch_size"] = batch * found.get("accumulate", 1)
    return nested, found


def _leaves(name: str, value) -> dict:
    """{dotted name: value} of everything below."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part, item in value.items() for key, leaf in _leaves(f"{name}.{part}", item).items()}


def check_section(where: str, section: str, name: str, stage: str) -> None:
    """UserError unless option `name` belongs to `section` at this stage."""
    groups = {f.name: f.metadata["group"] for f in fields(CONFIGS[stage])}
    if section not in SECTIONS:
        raise UserError(f"{where}unknown section {section!r}{suggest(section, SECTIONS)}")
    if name not in groups:
        raise UserError(f"{where}stage {stage} has no option {section}.{name}{suggest(name, groups)}")
    if groups[name] != section:
        raise UserError(f"{where}option {name} belongs to section {groups[name]}, not {section}")


def sections(config) -> dict:
    """The options as the YAML files hold them: {"stage": ..., section: {name: value}}."""
    from common.training import recorded  # imports torch

    values, found = recorded(config), {"stage": config.stage}
    for f in fields(config):
        found.setdefault(f.metadata["group"], {})[f.name] = values[f.name]
    return found


def suggest(word, known) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""
