"""The study that the notebooks show: your own, or a phantom made and trained by the scripts in about three minutes.

NEUROLDM3D_ROOT names the folder of your own (README.md, "Data"), after all commands up to save_synth.py; the notebook
data_split needs its tables only, visualize_recon the VAE too. Without it a study is made in a temporary folder. Nothing
is written into your own but the cache of prepared volumes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from IPython.display import Image, display

from common import figures, nifti, runtime
from common.cli import UserError
from common.phantom import LABELS
from neuroldm3d import dataset, preprocess, regions
from neuroldm3d.diffusion import sampling
from neuroldm3d.VAE import latents

PAPER = Path(__file__).resolve().parents[1]
HIPPOCAMPI = {side: [LABELS[f"hippocampus_{side}"]] for side in ("left", "right")}  # codes in ROOT/data/regions
# Enough steps to see every part work, far from a good model. Each stage with the file or folder that it leaves.
STAGES = {
    "data": ("data_csvs", ["make_phantom.py --shape 33 41 33 --n_train 40 --n_val 10 --n_test 20"]),
    "vae": ("runs/vae/best_vae.pth", ["VAE/train.py --preset smoke --steps 400 --val_every 10 --sample_every 0"]),
    "samples": (
        "synthetic_data/synthetic.json",
        [
            "VAE/save_latent.py",
            "diffusion/train.py --preset smoke --steps 450 --val_every 50 --sample_every 0",
            "diffusion/save_synth.py --preset smoke",
        ],
    ),
}


def run(script: str, *args, check: bool = True) -> str:
    """A script of this paper, as on the command line: what it printed; RuntimeError with its message if it fails.

    check=False: a failure is part of what is shown, its message is returned too.
    """
    command = [sys.executable, str(PAPER / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    message = next((line for line in done.stderr.splitlines() if line.startswith("error:")), done.stderr[-2000:])
    if done.returncode and check:
        raise RuntimeError(f"{script}: {message}")
    return done.stdout.strip() + (f"\n{message}" if done.returncode else "")


def make(root: Path, until: str = "samples") -> Path:
    """A phantom study in `root`, with all stages up to this one."""
    for stage in list(STAGES)[: list(STAGES).index(until) + 1]:
        for command in STAGES[stage][1]:
            script, *args = command.split()
            said = run(script, "--out" if script == "make_phantom.py" else "--root", root, *args)
            print(f"{script}: {(said.splitlines() or ['done'])[-1]}")
    return root


@dataclass(frozen=True)
class Study:
    """A study and what the notebooks read from it; `work` is a temporary folder for their own files."""

    root: Path
    work: Path
    rt: runtime.Runtime

    def rows(self, split: str) -> list[dataset.Row]:
        """Rows of train, val, test or "synthetic"."""
        if split == "synthetic":
            return dataset.synthetic_rows(self.root / "synthetic_data")
        return dataset.read_table(self.root / "data_csvs" / f"{split}.csv")

    @cached_property
    def vae(self) -> latents.TrainedVAE:
        return latents.load_vae(self.root / "runs" / "vae" / "best_vae.pth", self.rt)

    @cached_property
    def dit(self) -> sampling.TrainedDiT:
        dit = sampling.load_dit(self.root / "runs" / "dit" / "epoch_best.pth", self.rt)
        sampling.check_pair(dit, self.vae)
        return dit

    @cached_property
    def volumes(self) -> dataset.Volumes:
        return dataset.Volumes(self.vae.preparation, self.root / "data" / "cache")

    @cached_property
    def hippocampi(self) -> regions.RegionMap | None:
        """Mean map of each hippocampus over the training set; None, said aloud, where that cannot be measured."""
        folder, prep = self.root / "data" / "regions", self.vae.preparation
        if not folder.is_dir() or prep.norm != "native":
            print(f"no region maps in {folder}, or no --norm native: hippocampi are not measured")
            return None
        paths = [regions.region_path(folder, row.name) for row in self.rows("train")]
        return regions.mean_region_map(paths, HIPPOCAMPI, prep)

    @cached_property
    def grid(self) -> nifti.Volume:
        """An empty prepared volume: shape, affine and voxel size."""
        row = self.rows("train")[0]
        return nifti.Volume(self.volumes.load(row) * 0, self.volumes.affine(row))

    def centre(self) -> list[int]:
        """Voxel to cut volumes at, in the RAS+ order of figures: the middle of the left hippocampus, if known."""
        if self.hippocampi is None:
            return [n // 2 for n in self.grid.shape]
        p = self.hippocampi.probability["left"]
        middle = [int(round(float((p.sum(tuple({0, 1, 2} - {i})) * range(n)).sum() / p.sum())))
                  for i, n in enumerate(p.shape)]  # fmt: skip
        return [p.shape[0] - 1 - middle[0], *middle[1:]]

    def volume(self, row: dataset.Row) -> np.ndarray:
        """Prepared volume (D, H, W), LAS+, in native units."""
        return preprocess.denormalise(self.volumes.load(row), self.volumes.prep)

    def through_vae(self, row: dataset.Row) -> np.ndarray:
        """Normalised volume (D, H, W), LAS+, decoded from its mean latent."""
        mu, _ = latents.encode(self.vae.model, self.volumes.tensor(row)[None], self.rt)
        return latents.decode(self.vae.model, mu, self.rt)[0].numpy()

    def montage(self, pictures: dict, **options) -> None:
        """Volumes by name on the prepared grid, LAS+, cut at `centre`; options as for figures.montage."""
        pictures = {name: volume[::-1] for name, volume in pictures.items()}  # figures wants RAS+
        where = {"spacing_mm": self.grid.spacing_mm, "voxel": self.centre()}
        self.show(figures.montage, pictures, **(where | options))

    def show(self, function, content, **options) -> None:
        """Draw with a function of common.figures, and display the PNG."""
        path = function(self.work / "figure.png", content, **options)
        columns = len(content) + len(options.get("difference_of", list(content)[1:])) * ("difference_to" in options)
        display(Image(data=path.read_bytes(), width=150 + 150 * columns if function is figures.montage else 520))


def open_study(until: str = "samples") -> Study:
    """The study of NEUROLDM3D_ROOT, else a new phantom study with all stages up to this one.

    UserError if your own study lacks what this stage leaves.
    """
    work = Path(tempfile.mkdtemp(prefix="neuroldm3d_"))
    if named := os.environ.get("NEUROLDM3D_ROOT", ""):
        root, needed = Path(named).expanduser().resolve(), STAGES[until][0]
        if not (root / needed).exists():
            raise UserError(f"NEUROLDM3D_ROOT={root} has no {needed}; run the commands of neuroldm3d/README.md there")
    else:
        root = make(work / "study", until)
        print(f"to show this study again: export NEUROLDM3D_ROOT={root}")
    return Study(root, work, ExitStack().enter_context(runtime.start("auto", "auto", 0)))
