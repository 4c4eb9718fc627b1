"""Every setting of IL-CLDM: one line per option, and argparse makes a flag of each (`--learning_rate 2e-4`).

Names that the original's `config.py` documents are kept (`Lambda`, `noiseSteps`, `whole_Abeta`, ...). Defaults are the paper's,
as the public code states them; where the original was wrong the default is the corrected choice and
`--preset upstream` sets the original's science instead. See README.md, "Deviations".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.cli import TrainOptions, UserError, option

HERE = Path(__file__).resolve().parent

# Where things lie below --root unless a path option says otherwise (the original's layout).
DEFAULT_PATHS = {
    "whole_Abeta": "data/process/whole_Abeta_112",
    "whole_MRI": "data/process/whole_MRI_112",
    "regions": "data/process/regions_112",
    "latent_Abeta": "data/latent_Abeta/latent_Abeta_112",
    "syn_Abeta": "data/syn_Abeta",
    "data_info": "data_info",
    "cache": "data/cache",
    "result": "result",
}
SPLITS = ("train", "validation", "test")


@dataclass
class Config(TrainOptions):
    # What to do. Several flags in one call run in this order.
    prepare: bool = option(False, "raw NIfTI -> registered-grid volumes in [0, 1] with a record and a QC picture", group="stages")
    check: bool = option(False, "verify lists, labels, shapes, ranges, affines and subject overlap", group="stages")
    train_aae: bool = option(False, "stage 1: train the adversarial autoencoder on PET", group="stages")
    test_aae: bool = option(False, "PSNR and SSIM of the autoencoder on the test list", group="stages")
    enc: bool = option(False, "encode the PET of the training list to latents", group="stages")
    enc_val: bool = option(False, "encode the PET of the validation list", group="stages")
    enc_test: bool = option(False, "encode the PET of the test list (never needed for --gen)", group="stages")
    train_ldm: bool = option(False, "stage 2: train the MRI- and label-conditioned latent diffusion model", group="stages")
    gen: bool = option(False, "synthesize PET from MRI alone: the test list, or --mri FILE_OR_FOLDER", group="stages")
    evaluate: bool = option(False, "compare synthetic with true PET: report, baselines, amyloid status", group="stages")

    root: str = option(str(HERE), "folder that holds data/, data_info/ and result/", group="paths", free=True)
    exp: str = option("exp_1", "name of the run: everything goes to ROOT/result/EXP", group="paths", free=True)
    whole_Abeta: str = option("", "prepared PET; empty: ROOT/data/process/whole_Abeta_112", group="paths", free=True)
    whole_MRI: str = option("", "prepared MRI, same file names; empty: ROOT/data/process/whole_MRI_112", group="paths", free=True)
    regions: str = option("", "region label maps, same file names; empty: ROOT/data/process/regions_112", group="paths", free=True)
    latent_Abeta: str = option("", "latents of --enc; empty: ROOT/data/latent_Abeta/latent_Abeta_112", group="paths", free=True)
    syn_Abeta: str = option("", "output of --gen; empty: ROOT/data/syn_Abeta", group="paths", free=True)
    data_info: str = option("", "folder of data_info.csv and the split lists; empty: ROOT/data_info", group="paths", free=True)
    cache: str = option("", "LMDB cache of decoded volumes; empty: ROOT/data/cache; 'none' switches it off", group="paths", free=True)
    result: str = option("", "folder of the runs; empty: ROOT/result", group="paths", free=True)
    checkpoint_aae: str = option("", "autoencoder to use; empty: RESULT/EXP/AAE.pth.tar (the original's files load too)", group="paths", free=True)
    checkpoint_unet: str = option("", "denoiser to use; empty: RESULT/EXP/Unet.pth.tar (the original's files load too)", group="paths", free=True)
    trust_pickle: bool = option(False, "allow a checkpoint that needs pickle; it can run code, so only for files you made", group="paths", free=True)
    overwrite: bool = option(False, "replace outputs that exist and were made with other settings", group="paths", free=True)

    batch_size: int = option(2, "global batch: split over ranks", unit="volumes", group="training")
    epochs: int = option(1000, "length of both stages", group="training", free=True)
    aae_steps: int = option(0, "length of stage 1 in optimizer steps; 0: from --epochs", group="training", free=True)
    ldm_steps: int = option(0, "length of stage 2 in optimizer steps; 0: from --epochs", group="training", free=True)
    learning_rate: float = option(1e-4, "Adam (stage 1) and AdamW (stage 2)", group="training")
    lr_schedule: str = option("constant", "learning rate over the run; cosine falls to zero at the last step", choices=("constant", "cosine"), group="training")
    clip_grad: float = option(0.0, "largest gradient norm; 0: no clipping", group="training")
    accumulate: int = option(1, "micro-batches per optimizer step (memory, not speed)", group="training")
    checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, about a third slower", group="training", free=True)
    aae_channels_last: bool = option(True, "channels_last_3d layout of the autoencoder and discriminator (`make bench`: a fifth faster to train, twice to decode)", group="training", free=True)
    unet_channels_last: bool = option(False, "channels_last_3d layout of the denoiser (`make bench`: slower on the CPU; try it on a GPU)", group="training", free=True)
    save_every: int = option(500, "write checkpoints/last every so many steps; 0: only at validation and at the end", unit="steps", group="training", free=True)
    log_every: int = option(20, "training log interval", unit="steps", group="training")
    patience: int = option(0, "stop after so many validations without improvement; 0: never", group="training", free=True)

    Lambda: float = option(100.0, "weight of the L1 reconstruction term", group="stage 1")
    latent_dim: int = option(1, "latent channels", group="stage 1")
    aae_channels: int = option(16, "width of the first level (then x2, x4)", group="stage 1")
    aae_groups: int = option(16, "groups of the autoencoder's group norm", group="stage 1")
    kl_weight: float = option(0.0, "KL term of a stochastic latent; 0: the paper's deterministic latent", group="stage 1")
    disc_channels: tuple[int, ...] = option((16, 32, 64, 128), "discriminator widths", group="stage 1")
    disc_norm: str = option("batch", "discriminator normalisation", choices=("batch", "group"), group="stage 1")
    disc_start: int = option(0, "first step with the adversarial terms", unit="steps", group="stage 1")
    augment_shift: int = option(0, "random shift of the PET, uniform per axis (the first release used 2)", unit="voxels", group="stage 1")
    augment_flip: bool = option(False, "random left-right flip of the PET", group="stage 1")
    aae_val_every: int = option(1, "validation interval", unit="epochs", group="stage 1")

    ldm_batch_size: int = option(0, "global batch of stage 2; 0: --batch_size", unit="latents", group="stage 2")
    noiseSteps: int = option(1000, "length T of the noise schedule", group="stage 2")
    beta_start: float = option(1e-4, "first beta of the linear schedule", group="stage 2")
    beta_end: float = option(0.02, "last beta of the linear schedule", group="stage 2")
    prediction: str = option("eps", "what the denoiser predicts: eps as published, or v, which trains faster and lets few-step samplers start well", choices=("eps", "v"), group="stage 2")
    time_dim: int = option(128, "width of the time and label embedding", group="stage 2")
    num_classes: int = option(4, "diagnosis classes: label_id 0 .. num_classes-1", group="stage 2")
    label_dropout: float = option(0.15, "share of training labels replaced by the learned null class; 0: label always given", group="stage 2")
    normalise_latents: bool = option(True, "give latents zero mean and unit variance with training-set statistics", group="stage 2")
    cond_channels: int = option(1, "channels of the MRI feature map that is concatenated with the noisy latent", group="stage 2")
    latent_mean: str = option("channel", "mean that --normalise_latents subtracts: one number per channel, or the mean latent image (registered volumes of one grid only)", choices=("channel", "voxel"), group="stage 2")
    unet_channels: int = option(128, "base width of the denoiser", group="stage 2")
    unet_mults: tuple[int, ...] = option((1, 2, 2), "width multiplier per level", group="stage 2")
    unet_groups: int = option(32, "groups of the denoiser's group norm", group="stage 2")
    unet_res_blocks: int = option(2, "residual blocks per level", group="stage 2")
    unet_attn_res: tuple[int, ...] = option((3,), "levels with attention, named by image_size halved per level (3 never occurs: only the middle attends)", group="stage 2")
    image_size: int = option(28, "first level's nominal size, used only with --unet_attn_res", group="stage 2")
    unet_dropout: float = option(0.0, "dropout inside residual blocks", group="stage 2")
    weight_decay: float = option(0.01, "AdamW weight decay", group="stage 2")
    ema_decay: float = option(0.9999, "decay of the averaged weights that sampling uses", group="stage 2")
    ema_start: int = option(2000, "steps for which the average is a plain copy", unit="steps", group="stage 2")
    ldm_val_every: int = option(10, "validation interval (samples every validation subject)", unit="epochs", group="stage 2")
    select: str = option("score", "what picks the best weights: score of one sample (PSNR + 10 SSIM, as published) or the held-out loss, which sees overfitting", choices=("score", "loss"), group="stage 2")
    val_sampler: str = option("dpm", "sampler of validation", choices=("ddpm", "ddim", "dpm"), group="stage 2")
    val_steps: int = option(20, "sampling steps of validation", group="stage 2")

    mri: str = option("", "--gen: one MRI file or a folder of them instead of the test list; nothing else is needed", group="generation", free=True)
    out: str = option("", "--gen: output folder; empty: --syn_Abeta", group="generation", free=True)
    split: str = option("test", "list that --gen and --evaluate use", choices=SPLITS, group="generation", free=True)
    native: bool = option(False, "--gen --mri: inputs are raw MRI: prepare in memory, write on the input's own grid", group="generation", free=True)
    label: str = option("none", "label fed to the sampler: none, csv (true label: flagged, excluded from detection), predicted (from the MRI), or a class number", group="generation", free=True)
    guidance: float = option(1.0, "classifier-free guidance scale; 1: plain conditional, 0: unconditional", group="generation", free=True)
    sampler: str = option("dpm", "ddpm: ancestral as published; ddim; dpm: DPM-Solver++ 2M", choices=("ddpm", "ddim", "dpm"), group="generation", free=True)
    steps: int = option(50, "denoiser calls per sample; 0: all T-1", group="generation", free=True)
    eta: float = option(0.0, "DDIM stochasticity", group="generation", free=True)
    samples: int = option(1, "samples per subject; with 2 or more the mean is written, and the standard deviation beside it", group="generation", free=True)
    average: str = option("image", "where samples are averaged", choices=("image", "latent"), group="generation", free=True)
    keep_samples: bool = option(False, "also write every single sample", group="generation", free=True)
    gen_batch: int = option(1, "samples of one subject denoised and decoded together on a GPU; a CPU takes them one by one, to be exact", group="generation", free=True)

    target_labels: tuple[int, ...] = option((), "region codes of the cortical composite; empty: from data_info/prepare.json", group="evaluation", free=True)
    reference_labels: tuple[int, ...] = option((), "region codes of the SUVR reference; empty: from data_info/prepare.json", group="evaluation", free=True)
    suvr_threshold: float = option(0.0, "amyloid-positive at or above; 0: from data_info/prepare.json", unit="SUVR", group="evaluation", free=True)
    mask_threshold: float = option(0.05, "without region maps the mask is MRI above this", group="evaluation", free=True)
    bootstrap: int = option(2000, "bootstrap resamples of the intervals", group="evaluation", free=True)
    classifier_steps: int = option(300, "training steps of the small CNNs (status from MRI, status from PET, label from MRI)", group="evaluation", free=True)

    raw_mri: str = option("", "--prepare: folder (or BIDS tree) of raw T1 NIfTI", group="preparation", free=True)
    raw_pet: str = option("", "--prepare: folder of raw PET in the space of its MRI; empty: MRI only", group="preparation", free=True)
    raw_mask: str = option("", "--prepare: folder of brain masks or label maps, > 0 is brain; empty: no masking", group="preparation", free=True)
    shape: tuple[int, ...] = option((112, 128, 112), "--prepare: target grid", unit="voxels", group="preparation", free=True)
    spacing_mm: float = option(1.5, "--prepare: isotropic target voxel size", unit="mm", group="preparation", free=True)
    mri_norm: str = option("percentile", "MRI scaling: percentile (99.5th in the mask -> 1), minmax, none", choices=("percentile", "minmax", "none"), group="preparation", free=True)
    pet_norm: str = option("fixed", "PET scaling: fixed (divide by --pet_divisor: keeps SUVR ratios), percentile, minmax, none", choices=("fixed", "percentile", "minmax", "none"), group="preparation", free=True)
    pet_divisor: float = option(3.0, "SUVR that maps to 1 with --pet_norm fixed", unit="SUVR", group="preparation", free=True)
    split_fractions: tuple[float, ...] = option((0.7, 0.1, 0.2), "--prepare: train, validation, test shares by subject, when no lists exist", group="preparation", free=True)

    def __post_init__(self):
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: seeds are 0 or more")
        for name, tail in DEFAULT_PATHS.items():
            if not getattr(self, name):
                setattr(self, name, str(Path(self.root) / tail))

    # Paths derived from the options: one place.
    @property
    def run_folder(self) -> Path:
        return Path(self.result) / self.exp

    @property
    def aae_path(self) -> Path:
        return Path(self.checkpoint_aae) if self.checkpoint_aae else self.run_folder / "AAE.pth.tar"

    @property
    def unet_path(self) -> Path:
        return Path(self.checkpoint_unet) if self.checkpoint_unet else self.run_folder / "Unet.pth.tar"

    @property
    def cache_folder(self) -> Path | None:
        return None if self.cache == "none" else Path(self.cache)

    def list_path(self, split: str) -> Path:
        return Path(self.data_info) / f"{'val' if split == 'validation' else split}.txt"


PRESETS = {
    "paper": {},
    # The original's science through ordinary options; its bugs are not reproduced.
    "upstream": dict(
        label_dropout=0.0, normalise_latents=False, sampler="ddpm", steps=0, val_sampler="ddpm", val_steps=0, ldm_val_every=1
    ),
    # Minutes on two CPU cores, for volumes of about 32 voxels a side (make_phantom.py --shape 28 32 28). At 6 mm a voxel, one
    # channel per 4x4x4 block keeps neither the PET nor the ventricles: the latent and the MRI map get eight. v prediction is
    # what a short training can learn: an eps error at t = 999 comes back 25,000 times larger in x_0. Half of the labels are
    # dropped, since sampling without one is what matters.
    "smoke": dict(
        batch_size=2, learning_rate=2e-3, lr_schedule="cosine", save_every=500, num_workers=0,
        latent_dim=8, aae_channels=8, aae_groups=8, disc_channels=(8, 16, 32), disc_start=400, aae_steps=800, aae_val_every=4,
        ldm_batch_size=8, prediction="v", latent_mean="voxel", label_dropout=0.5, cond_channels=8, unet_channels=32, unet_mults=(1, 2), unet_groups=8,
        unet_res_blocks=1, ldm_steps=1200, ldm_val_every=4, select="loss", ema_decay=0.99, ema_start=100,
        steps=20, classifier_steps=150, bootstrap=1000,
    ),
}  # fmt: skip
