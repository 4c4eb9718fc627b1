"""The tiny cohort after stage 1, encoding, stages 2 and 3, made once and shared; and an LDAE of random weights."""

import json
import shutil
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from common import runtime
from ldae import model, run_cli
from ldae.preprocess import Preparation
from ldae.scripts import save_compressed_latent
from tests.helpers import run_main
from tests.ldae.conftest import SHAPE, SPACING_MM

COMMON = "--device cpu --num_workers 0".split()
VOLUME = ["--shape", *map(str, SHAPE), "--spacing_mm", str(SPACING_MM)]
LOOP = (
    "--batch_size 4 --steps 12 --lr 1e-3 --accumulate 1 --log_every 2 --save_every 5 --val_every 1 --sample_every 0 "
    "--patience 0 --val_size 0.2 --test_size 0.2"
).split()
SCHEDULE = "--timesteps 100 --beta_end 0.1 --ema_start 4 --ema_decay 0.9 --sample_steps 4 --n_samples 2".split()
TINY = {
    "aekl": ("--channels 4 4 8 --norm_groups 2 --latent_channels 2 --num_res_blocks 1 --perceptual_weight 0 "
             "--adv_weight 0").split(),
    "ldae_pretrain": [*SCHEDULE, *("--base_channels 32 --channel_mult 1 --num_res_blocks 1 --attention_resolutions 1 "
                                   "--dropout 0").split()],
    "ldae_repr_learn": [*SCHEDULE, *("--backbone_depths 1 1 --backbone_widths 8 16 --code_dim 16 --encoder_heads 2 "
                                     "--max_slices 20 --drop_path 0.1 --linear_image").split()],
}  # fmt: skip
STAGES = tuple(TINY)


def command(stage, verb="fit"):
    """Words of a tiny stage's command line, without --root."""
    return ["ldae/run_cli.py", verb, "--config", stage, *COMMON, *VOLUME, *LOOP, *TINY[stage]]


def run(stage, root, *args, verb="fit"):
    """One verb of a tiny stage in this process."""
    run_main(run_cli, *command(stage, verb)[1:], "--root", root, *args)


def encode(root, *args):
    run_main(save_compressed_latent, "--root", root, *COMMON, *args)


@lru_cache(maxsize=1)
def trained(cohort: Path) -> Path:
    """A study after all three stages. Not to be changed: copy it."""
    root = cohort.with_name(f"{cohort.name}_trained")
    shutil.copytree(cohort, root)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run("aekl", root)
    encode(root)
    run("ldae_pretrain", root)
    run("ldae_repr_learn", root)
    torch.set_num_threads(threads)
    return root


def best(root, stage="ldae_repr_learn"):
    return root / "runs" / stage / "checkpoints" / "best.ckpt"


def last(root, stage):
    return root / "runs" / stage / "checkpoints" / "last.ckpt"


def fresh(root, tmp_path, stage, name):
    """A copy of a trained study without the run of `stage`, so that it can be trained again."""
    copy = shutil.copytree(root, tmp_path / name)
    shutil.rmtree(copy / "runs" / stage)
    return copy


def log_rows(root, stage, kind=None):
    """Rows of the log but for the clock."""
    rows = [json.loads(line) for line in (root / "runs" / stage / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows if kind in (None, row["kind"])]


# ---- without training -----------------------------------------------------------------------------------------------

CODE_DIM = 16
SETTINGS = {
    "aekl": {"in_channels": 1, "out_channels": 1, "channels": (4, 4, 8), "latent_channels": 2, "num_res_blocks": 1,
             "norm_groups": 2},
    "unet": {"in_channels": 2, "base_channels": 32, "channel_mult": (1,), "num_res_blocks": 1,
             "attention_resolutions": (1,), "num_heads": 1, "head_channels": -1, "new_attention_order": False,
             "dropout": 0.0, "isotropic": True},
    "encoder": {"stages": ((8, 1), (CODE_DIM, 1)), "embed_dim": CODE_DIM, "num_heads": 2, "max_slices": 20,
                "dropout": 0.0, "drop_path": 0.0},
}  # fmt: skip


def untrained_ldae(path: Path | None = None, *, seed: int = 0, rt=None, split_hash=None, **sampling):
    """An LDAE of random weights for SHAPE whose eps and G are not zero and whose codes differ between scans.

    With `path` it is written there as a file of stage 3, and the path returned; without, the LDAE itself on the CPU.
    sampling: clip, spacing, final, coefficient.
    """
    preparation = Preparation(shape=SHAPE, spacing_mm=SPACING_MM)
    ldae = model.build(
        SETTINGS, schedule={"kind": "linear", "T": 1000, "prediction": "v"},
        stats={"mean": [0.0, 0.0], "std": [1.0, 1.0]}, preparation=preparation, plane="axial",
        rt=rt or runtime.Runtime(torch.device("cpu")), sampling=sampling, seed=seed,
        split_hash=split_hash, hashes={"aekl": "0" * 16, "prior": "1" * 16}, hash="2" * 16,
    )  # fmt: skip
    g = torch.Generator().manual_seed(seed + 1)
    for network in (ldae.decoder, ldae.encoder):
        for parameter in network.parameters():
            if parameter.ndim >= 2 and parameter.abs().max() < 1e-3:  # zero convolutions, layer scale
                fan_in = max(1, parameter[0].numel())
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.5 * fan_in**-0.5)
    for head in (ldae.decoder.prior.out, ldae.decoder.estimator.shift_out):
        head[-1].weight.mul_(0.5)  # smooth enough to be inverted
        nn.init.constant_(head[-1].bias, 0.05)
    if path is None:
        return ldae
    model.save_ldae(Path(path), ldae)
    return Path(path)
