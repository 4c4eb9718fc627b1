"""The entry script called in this process, and a study small enough to train on in a second."""

import contextlib
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

from common import cli, nifti
from il_cldm import main

# Networks of a few thousand weights; --steps and --val_steps: denoiser calls.
TINY = (
    "--aae_channels 8 --aae_groups 8 --disc_channels 4 8 --unet_channels 8 --unet_mults 1 2 --unet_groups 4 "
    "--unet_res_blocks 1 --time_dim 16 --batch_size 2 --num_workers 0 --log_every 1 --val_steps 3 --steps 3 "
    "--learning_rate 1e-3 --ema_start 0 --ema_decay 0.9 --device cpu --classifier_steps 5 --bootstrap 50"
).split()
# A little training that already shows something: with few, larger noise steps an untrained start is forgiven sooner.
SHORT = (
    "--unet_channels 16 --unet_groups 8 --learning_rate 2e-3 --lr_schedule cosine --disc_start 100000 --ema_decay 0.95 "
    "--noiseSteps 100 --beta_end 0.1 --aae_val_every 1000 --ldm_val_every 1000"
).split()
NAMES = {"train": ("100S0001", "100S0002", "100S0003"), "val": ("100S0004",), "test": ("100S0005", "100S0006")}
AFFINE = np.array([[8.0, 0, 0, -60], [0, 8, 0, -80], [0, 0, 8, -50], [0, 0, 0, 1]])


@dataclass
class Ended:
    status: int
    out: str
    err: str


def captured(*args) -> Ended:
    """`python il_cldm/main.py args...` without a new process: exit status and what it printed."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["main.py", *map(str, args)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.run(main.main)
        except SystemExit as end:
            status = end.code or 0
    return Ended(status, out.getvalue(), err.getvalue())


def complaint(ended) -> str:
    """The one `error:` line that bad input must end in: status 2, nothing else on stderr but progress bars."""
    status, err = (ended.status, ended.err) if isinstance(ended, Ended) else (ended.returncode, ended.stderr)
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip() and not re.search(r"\| \d+/\d+ \[", line)]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), f"status {status}\n{err}"
    assert "Traceback" not in err
    return lines[0]


def files(root) -> dict[str, bytes]:
    """Content of every file below a folder but the cache."""
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in sorted(Path(root).rglob("*"))
        if p.is_file() and "data/cache" not in p.as_posix()
    }


def volume(shape, seed: int) -> np.ndarray:
    """Smooth positive volume in [0, 1], zero at the border."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    offsets = np.random.default_rng(seed).uniform(-0.1, 0.1, 3)
    distance = sum(((a - o) / 0.75) ** 2 for a, o in zip(axes, offsets, strict=True))
    return (0.9 * np.clip(1.2 - distance, 0, 1)).astype(np.float32)


def write_study(root, shape=(16, 16, 16)) -> Path:
    """Lists, labels, MRI and PET of six subjects below `root`."""
    root = Path(root)
    (root / "data_info").mkdir(parents=True)
    rows = ["filename,label_id"]
    for split, names in NAMES.items():
        (root / "data_info" / f"{split}.txt").write_text("".join(f"{n}.nii.gz\n" for n in names))
        for name in names:
            seed = int(name[-1])
            nifti.save(root / "data/process/whole_MRI_112" / f"{name}.nii.gz", volume(shape, seed), AFFINE)
            nifti.save(root / "data/process/whole_Abeta_112" / f"{name}.nii.gz", volume(shape, seed) ** 2, AFFINE)
            rows.append(f"{name}.nii.gz,{seed % 4}")
    (root / "data_info" / "data_info.csv").write_text("\n".join(rows) + "\n")
    return root
