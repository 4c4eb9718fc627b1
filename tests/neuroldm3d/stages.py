"""The tiny cohort after VAE training, encoding and DiT training, made once and shared by the tests of these stages."""

import json
import shutil
from functools import lru_cache
from pathlib import Path

import torch

from neuroldm3d.diffusion import train as dit_train
from neuroldm3d.VAE import save_latent
from neuroldm3d.VAE import train as vae_train
from tests.helpers import run_main

COMMON = "--device cpu --num_workers 0".split()
TINY_VAE = (
    "--shape 16 20 16 --crop_start 10 --channels 4 4 8 --norm_groups 2 --latent_channels 2 --lambda_lpips 0 "
    "--batch_size 4 --vae_lr 3e-3 --steps 12 --log_every 2 --save_every 4 --val_every 2 --patience 0 --sample_every 0"
).split()
TINY_DIT = (
    "--patch_size 2 5 2 --hidden_size 48 --depth 2 --num_heads 2 --time_num 100 --beta_end 0.1 --bs 4 --lr 1e-3 "
    "--steps 12 --log_every 2 --save_every 5 --val_every 2 --ema_start 4 --ema_decay 0.9 --sample_every 0 --saveIter 0"
).split()
BEST = {"vae": "best_vae.pth", "dit": "epoch_best.pth"}


def train_vae(root, *args):
    run_main(vae_train, "--root", root, *COMMON, *TINY_VAE, *args)


def train_dit(root, *args):
    run_main(dit_train, "--root", root, *COMMON, *TINY_DIT, *args)


TRAIN = {"vae": train_vae, "dit": train_dit}
COMMAND = {
    "vae": ["neuroldm3d/VAE/train.py", *COMMON, *TINY_VAE],
    "dit": ["neuroldm3d/diffusion/train.py", *COMMON, *TINY_DIT],
}


def encode(root, *args):
    run_main(save_latent, "--root", root, *COMMON, *args)


@lru_cache(maxsize=1)
def trained(cohort: Path) -> Path:
    """A study with a tiny VAE, its latents of train and val, and a tiny DiT. Not to be changed: copy it."""
    root = cohort.with_name(f"{cohort.name}_trained")
    shutil.copytree(cohort, root)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_vae(root)
    encode(root)
    train_dit(root)
    torch.set_num_threads(threads)
    return root


def last(root, stage):
    return root / "runs" / stage / "checkpoints" / "last.pt"


def best(root, stage):
    return root / "runs" / stage / BEST[stage]


def fresh(root, tmp_path, stage, name):
    """A copy of a trained study without the run of `stage`, so that it can be trained again."""
    copy = shutil.copytree(root, tmp_path / name)
    shutil.rmtree(copy / "runs" / stage)
    return copy


def log_rows(root, stage, kind=None):
    """Rows of the log but for the clock."""
    rows = [json.loads(line) for line in (root / "runs" / stage / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows if kind in (None, row["kind"])]
