"""Every option of the training commands, one line each: a dataclass per command over a shared base. Imports no torch.

Defaults are what the cardiac prior was trained with, as far as the public code tells: Preechakul et al. 2022 (DiffAE) at
128 x 128 pixels and one channel. Where the original was wrong the default is the corrected choice, and `--preset
upstream` sets the original's science instead. A batch is what one optimizer step sees: all ranks, all micro-batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from common.cli import CommonOptions, TrainOptions, UserError, option

HERE = Path(__file__).resolve().parent
STORE = "cardiac_cine_128.lmdb"
AUGMENTATIONS = ("none", "plausible")

# fmt: off


def at_root(config, **defaults: tuple[str, ...]) -> None:
    """Fill in the paths that were left empty: each the folder or file ROOT/part/part/..."""
    for name, parts in defaults.items():
        setattr(config, name, getattr(config, name) or str(Path(config.root).joinpath(*parts)))


# ---- training -------------------------------------------------------------------------------------------------------


@dataclass
class TrainingConfig(TrainOptions):
    """What all trainings share. Paths hang off --root unless an option says otherwise; lengths are counted in samples."""

    name: ClassVar[str] = ""  # of the folders of checkpoints and logs
    label: ClassVar[str] = ""  # what progress bars and messages call it
    unit: ClassVar[str] = "slices"

    root: str = option(str(HERE), "folder that holds datasets/, checkpoints/ and logs/", group="paths", free=True)
    checkpoints: str = option("", "folder of best.ckpt and last.ckpt; empty: ROOT/checkpoints/<name>", group="paths", free=True)
    run: str = option("", "folder of logs and pictures; empty: ROOT/logs/<name>", group="paths", free=True)

    total_samples: int = option(68_000_000, "length of the training; stops after this many samples, rounded up to whole batches", unit="samples", group="training", free=True)
    batch_size: int = option(100, "samples per optimizer step, over all ranks and micro-batches", unit="samples", group="training")
    accumulate: int = option(1, "micro-batches per optimizer step and rank (memory, not speed)", group="training")
    lr: float = option(1e-4, "learning rate", group="training")
    lr_schedule: str = option("constant", "cosine falls to zero at the end", choices=("constant", "cosine"), group="training")
    warmup_samples: int = option(0, "samples over which the learning rate rises from zero", unit="samples", group="training")
    weight_decay: float = option(0.0, "decoupled weight decay; 0: plain Adam", group="training")
    grad_clip: float = option(1.0, "largest gradient norm, of unscaled gradients; 0: no clipping", group="training")
    ema_decay: float = option(0.9999, "decay of the averaged weights, per optimizer step; 0: no average", group="training")
    ema_start: int = option(1000, "steps for which the average is a plain copy", unit="steps", group="training")
    patience: int = option(0, "stop after so many validations without improvement; 0: never", group="training", free=True)
    val_every_samples: int = option(500_000, "validation interval", unit="samples", group="training")
    save_every_samples: int = option(100_000, "write last.ckpt every so many samples; 0: at validations only", unit="samples", group="training", free=True)
    log_every: int = option(50, "training log interval", unit="steps", group="training")

    def __post_init__(self):
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: seeds are 0 or more")
        if self.total_samples < 1:
            raise UserError(f"--total_samples {self.total_samples}: must be at least 1")
        if min(self.warmup_samples, self.save_every_samples, self.ema_start, self.patience) < 0:
            raise UserError("--warmup_samples, --save_every_samples, --ema_start and --patience must be 0 or more")
        if self.lr <= 0 or self.weight_decay < 0 or self.grad_clip < 0:
            raise UserError("--lr must be positive, --weight_decay and --grad_clip 0 or more")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"--ema_decay {self.ema_decay}: choose 0 (no average) or more and less than 1")
        at_root(self, checkpoints=("checkpoints", self.name), run=("logs", self.name))

    @property
    def best_path(self) -> Path:
        return Path(self.checkpoints) / "best.ckpt"

    @property
    def last_path(self) -> Path:
        return Path(self.checkpoints) / "last.ckpt"

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole sample budget: exactly ceil(total_samples / batch_size)."""
        return math.ceil(self.total_samples / self.batch_size)

    def steps_of(self, samples: int) -> int:
        """An interval of samples in optimizer steps, at least one."""
        return max(1, round(samples / self.batch_size))


@dataclass
class SliceConfig(TrainingConfig):
    """What the two networks over short-axis slices share."""

    store: str = option("", f"LMDB of lmdb_writer.py; empty: ROOT/datasets/{STORE}", group="paths", free=True)
    split: str = option("", "split of the subjects, made when it is missing; empty: beside the store, split.json", group="paths", free=True)
    init: str = option("", "start from the averaged weights of this file, to fine-tune them", group="paths", free=True)
    trust_pickle: bool = option(False, "allow an --init file that needs pickle; it can run code", group="paths", free=True)

    image_size: int = option(128, "height and width of the slices; other stores are padded or cropped about the middle", unit="pixels", group="data")
    augment: str = option("plausible", "random changes of training slices (dataset.AUGMENTATIONS)", choices=AUGMENTATIONS, group="data")
    val_size: float = option(0.1, "share of subjects for validation, when the split is made", group="data", free=True)
    test_size: float = option(0.1, "share of subjects for testing, when the split is made", group="data", free=True)
    split_seed: int = option(0, "seed of the split, when it is made", group="data", free=True)

    model_channels: int = option(128, "width of the first level", group="model")
    channel_mult: tuple[int, ...] = option((1, 1, 2, 3, 4), "width multiplier per level of the U-Net; each level but the last halves the sides", group="model")
    num_res_blocks: int = option(2, "residual blocks per level of the way down; one more on the way up", group="model")
    attention_resolutions: tuple[int, ...] = option((16,), "sides of the levels with self-attention, beside the middle", unit="pixels", group="model")
    num_heads: int = option(1, "attention heads", group="model")
    embed_channels: int = option(512, "width of the time embedding", group="model")
    resblock_updown: bool = option(True, "resample inside residual blocks instead of by plain layers", group="model")
    dropout: float = option(0.1, "dropout inside residual blocks of the U-Net", group="model")
    norm_groups: int = option(32, "most groups of a normalisation; narrow networks need fewer", group="model")
    checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third slower", group="model", free=True)

    snr_gamma: float = option(0.0, "weight of a step is min(SNR, gamma) / SNR (Hang et al. 2023): less for nearly clean slices; 0: 1 for all", group="loss")

    val_slices: int = option(64, "held-out slices of a validation, evenly spaced among all; 0: all", group="training")
    val_steps: int = option(30, "DDIM steps of the inversion and decoding that a validation scores", group="training")
    select: str = option("psnr", "what picks best.ckpt: PSNR of the round trip among equal noise losses (trainer.better_round_trip), the noise loss, or simply the last validation", choices=("psnr", "loss", "last"), group="training")
    sample_every_samples: int = option(500_000, "picture for samples/; 0: never", unit="samples", group="training", free=True)
    sample_size: int = option(8, "slices of a picture", group="training", free=True)
    sample_steps: int = option(20, "DDIM steps of a picture", group="training", free=True)

    def __post_init__(self):
        super().__post_init__()
        at_root(self, store=("datasets", STORE))
        self.split = self.split or str(Path(self.store).parent / "split.json")
        if not (0 < self.val_size < 1 and 0 < self.test_size < 1 and self.val_size + self.test_size < 1):
            raise UserError(f"--val_size {self.val_size} and --test_size {self.test_size}: give positive shares with a sum below 1")
        if not 1 <= min(self.val_steps, self.sample_steps) <= max(self.val_steps, self.sample_steps) <= 1000:
            raise UserError(f"--val_steps {self.val_steps} and --sample_steps {self.sample_steps}: give 1 to 1000 steps of the noise schedule")
        if self.val_slices < 0 or self.sample_every_samples < 0 or self.sample_size < 1:
            raise UserError("--val_slices and --sample_every_samples must be 0 or more, --sample_size at least 1")
        if self.snr_gamma < 0:
            raise UserError(f"--snr_gamma {self.snr_gamma}: choose 0 (no weights) or more")
        self.check_levels("channel_mult", self.channel_mult)

    def check_levels(self, name: str, channel_mult: tuple[int, ...]) -> None:
        """UserError for widths and sides that the network cannot have."""
        factor = 2 ** (len(channel_mult) - 1)
        if self.image_size < 1 or self.image_size % factor:
            raise UserError(f"--image_size {self.image_size}: must be a multiple of {factor}, because --{name} has {len(channel_mult)} levels")
        if min((self.model_channels, self.num_res_blocks, self.num_heads, self.embed_channels, self.norm_groups, *channel_mult), default=0) < 1 or not channel_mult:
            raise UserError(f"--model_channels, --num_res_blocks, --num_heads, --embed_channels, --norm_groups and --{name} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout {self.dropout}: choose 0 or more and less than 1")

    def network(self) -> dict:
        """Constructor arguments of the network."""
        names = ("image_size", "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_heads",
                 "embed_channels", "resblock_updown", "dropout", "norm_groups")
        return {name: getattr(self, name) for name in names}


@dataclass
class AutoencConfig(SliceConfig):
    """run_ffhq128.py: the diffusion autoencoder, which is the prior of the reconstruction."""

    name: ClassVar[str] = "cardiac_autoenc"
    label: ClassVar[str] = "prior"

    enc_channel_mult: tuple[int, ...] = option((1, 1, 2, 3, 4, 4), "width multiplier per level of the semantic encoder", group="model")
    enc_num_res_blocks: int = option(2, "residual blocks per level of the semantic encoder", group="model")
    enc_out_channels: int = option(512, "length of the semantic code", group="model")

    def __post_init__(self):
        super().__post_init__()
        self.check_levels("enc_channel_mult", self.enc_channel_mult)
        if min(self.enc_num_res_blocks, self.enc_out_channels) < 1:
            raise UserError("--enc_num_res_blocks and --enc_out_channels must be at least 1")

    def network(self) -> dict:
        names = ("enc_channel_mult", "enc_num_res_blocks", "enc_out_channels")
        return super().network() | {name: getattr(self, name) for name in names} | {"cond_channels": self.enc_out_channels}


@dataclass
class DDIMConfig(SliceConfig):
    """run_ffhq128_ddim.py: the unconditional U-Net, a baseline without semantic code."""

    name: ClassVar[str] = "cardiac_ddim"
    label: ClassVar[str] = "unconditional DDIM"


# ---- codes ----------------------------------------------------------------------------------------------------------


@dataclass
class EncodeConfig(CommonOptions):
    """encode.py: semantic codes of all slices of a store, and their statistics."""

    root: str = option(str(HERE), "folder that holds datasets/ and checkpoints/", group="paths")
    store: str = option("", f"LMDB of lmdb_writer.py; empty: ROOT/datasets/{STORE}", group="paths")
    split: str = option("", "split of the subjects; empty: beside the store, split.json", group="paths")
    ckpt: str = option("", "trained prior; empty: ROOT/checkpoints/cardiac_autoenc/best.ckpt", group="paths")
    out: str = option("", "file to write; empty: latent.ckpt beside --ckpt", group="paths")
    trust_pickle: bool = option(False, "allow a checkpoint that needs pickle; it can run code", group="paths")
    overwrite: bool = option(False, "replace the file if it exists", group="paths")
    batch_size: int = option(32, "slices at a time; the codes do not depend on it beyond rounding", unit="slices", group="encoding")

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size}: must be at least 1")
        at_root(self, store=("datasets", STORE), ckpt=("checkpoints", "cardiac_autoenc", "best.ckpt"))
        self.split = self.split or str(Path(self.store).parent / "split.json")
        self.out = self.out or str(Path(self.ckpt).with_name("latent.ckpt"))


@dataclass
class LatentDPMConfig(TrainingConfig):
    """latent_dpm.py: a diffusion model over semantic codes (MLP with skips), to draw slices without a patient."""

    name: ClassVar[str] = "cardiac_latent_dpm"
    label: ClassVar[str] = "latent DPM"
    unit: ClassVar[str] = "codes"

    latents: str = option("", "codes of encode.py; empty: ROOT/checkpoints/cardiac_autoenc/latent.ckpt", group="paths", free=True)
    ckpt: str = option("", "prior that made them, for --sample; empty: best.ckpt beside --latents", group="paths", free=True)
    out: str = option("", "file of the drawn slices; empty: RUN/samples.nii.gz", group="paths", free=True)
    trust_pickle: bool = option(False, "allow a --ckpt that needs pickle; it can run code", group="paths", free=True)
    overwrite: bool = option(False, "replace drawn slices that exist", group="paths", free=True)

    sample: bool = option(False, "draw slices with the trained model instead of training it", group="sampling", free=True)
    n_samples: int = option(16, "slices to draw", unit="slices", group="sampling", free=True)
    latent_steps: int = option(20, "DDIM steps over the code", group="sampling", free=True)
    steps: int = option(20, "DDIM steps of the decoder", group="sampling", free=True)

    hidden: int = option(2048, "width of the MLP", group="model")
    layers: int = option(10, "layers of the MLP; all but the first read the code again", group="model")
    time_channels: int = option(64, "width of the sinusoidal time code", group="model")
    dropout: float = option(0.0, "dropout inside the MLP", group="model")

    beta: float = option(0.008, "beta of every one of the 1000 steps of the noise schedule", group="diffusion")
    loss: str = option("l1", "error of the predicted noise: mean magnitude or mean square", choices=("l1", "l2"), group="loss")

    total_samples: int = option(101_000_000, "length of the training; stops after this many samples, rounded up to whole batches", unit="codes", group="training", free=True)
    batch_size: int = option(256, "codes per optimizer step, over all ranks and micro-batches", unit="codes", group="training")
    weight_decay: float = option(0.01, "decoupled weight decay of AdamW", group="training")

    def __post_init__(self):
        super().__post_init__()
        at_root(self, latents=("checkpoints", "cardiac_autoenc", "latent.ckpt"))
        self.ckpt = self.ckpt or str(Path(self.latents).with_name("best.ckpt"))
        self.out = self.out or str(Path(self.run) / "samples.nii.gz")
        if min(self.hidden, self.n_samples) < 1 or self.layers < 2:
            raise UserError("--hidden and --n_samples must be at least 1, --layers at least 2")
        if not 1 <= min(self.latent_steps, self.steps) <= max(self.latent_steps, self.steps) <= 1000:
            raise UserError(f"--latent_steps {self.latent_steps} and --steps {self.steps}: give 1 to 1000 steps of the noise schedule")
        if self.time_channels < 2 or self.time_channels % 2:
            raise UserError(f"--time_channels {self.time_channels}: must be even and at least 2")
        if not 0 < self.beta < 1 or not 0 <= self.dropout < 1:
            raise UserError(f"--beta {self.beta} must be between 0 and 1, --dropout {self.dropout} 0 or more and less than 1")

    def network(self, code_dim: int) -> dict:
        """Constructor arguments of the MLP over codes of `code_dim` numbers."""
        return {
            "num_channels": code_dim, "num_hid_channels": self.hidden, "num_layers": self.layers, "skip_layers": tuple(range(1, self.layers)),
            "num_time_emb_channels": self.time_channels, "dropout": self.dropout,
        }


# ---- presets --------------------------------------------------------------------------------------------------------


# What the original does and we corrected, through ordinary options: no augmentation, the average from the first step on,
# the last weights instead of the best, and a budget that it never enforced.
UPSTREAM = dict(augment="none", ema_start=0, select="last", total_samples=300_000_000)
# A quarter of the width at the phantom's 64 pixels: under an hour on one GPU.
SMALL = dict(
    image_size=64, model_channels=64, channel_mult=(1, 2, 2, 4), embed_channels=256, batch_size=64, total_samples=2_000_000, ema_decay=0.999, ema_start=200,
    val_every_samples=50_000, save_every_samples=50_000, sample_every_samples=100_000,
)
# Two CPU cores, `make_phantom.py`: 1.4 million parameters, 8 ms a slice and network call. Eight channels at full size leave
# 32 groups one channel each, which hides from the encoder what a slice is; and with the plain loss the code was not used
# after 8,000 slices: 97 % of it was from the quarter of the steps with the least noise, where the code is of no help.
TINY = dict(
    image_size=64, model_channels=8, channel_mult=(1, 2, 4, 8), num_res_blocks=1, attention_resolutions=(8,), embed_channels=64, norm_groups=4, dropout=0.0, snr_gamma=1.0,
    batch_size=8, total_samples=48_000, lr=2e-3, lr_schedule="cosine", warmup_samples=800, ema_decay=0.995, ema_start=50, augment="none", val_every_samples=8_000,
    save_every_samples=2_000, sample_every_samples=8_000, val_slices=12, sample_size=4, log_every=20, num_workers=0,
)
TINY_ENCODER = dict(enc_channel_mult=(1, 2, 4, 8, 16), enc_num_res_blocks=1, enc_out_channels=64)

PRESETS = {
    "autoenc": {
        "paper": {},
        "upstream": UPSTREAM,
        "small": SMALL | dict(enc_channel_mult=(1, 2, 2, 4, 4), enc_out_channels=256),
        "tiny": TINY | TINY_ENCODER,
    },
    "ddim": {"paper": {}, "upstream": UPSTREAM, "small": SMALL, "tiny": TINY},
    "latent_dpm": {
        "paper": {},
        "upstream": dict(ema_start=0),
        "small": dict(hidden=512, layers=6, total_samples=2_000_000, ema_decay=0.999, ema_start=200, val_every_samples=100_000),
        "tiny": dict(
            hidden=128, layers=4, time_channels=32, batch_size=64, total_samples=64_000, lr=1e-3, lr_schedule="cosine", ema_decay=0.99, ema_start=50,
            val_every_samples=12_800, save_every_samples=12_800, num_workers=0,
        ),
    },
}
for _presets in PRESETS.values():
    _presets["smoke"] = _presets["tiny"]  # the name that every command of the repository knows
