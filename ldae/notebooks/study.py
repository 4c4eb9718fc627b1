"""The study that the tutorial shows: your own, or a phantom made and trained by the scripts in a few minutes.

LDAE_ROOT names the folder of your own (README.md, "Data"), after all commands up to train_manipulation.py. Without it a
study is made in a temporary folder. Nothing is written into your own but the cache of prepared volumes.
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

from common import figures, runtime
from common.cli import UserError
from ldae import data_split, dataset, generation, model
from ldae.manipulation import Direction

PAPER = Path(__file__).resolve().parents[1]
NEEDED = "probes/diagnosis_AD_vs_CN.npz"  # what the last command leaves
# Enough steps to see every part work, far from a good model.
COMMANDS = """
make_phantom.py --shape 24 32 24 --n_subjects {subjects} --sessions 0 12 24 --progression 2
run_cli.py fit --config aekl --preset tiny --steps {aekl} --test_size 0.2 --val_every 8 --sample_every 0
scripts/save_compressed_latent.py
run_cli.py fit --config ldae_pretrain --preset tiny --steps {prior} --val_every 40 --sample_every 0
run_cli.py fit --config ldae_repr_learn --preset tiny --steps {representation} --val_every 20 --sample_every 0
scripts/save_semantic_latent.py --with_controls
scripts/train_manipulation.py --preset tiny --targets diagnosis age
"""
SIZES = {"subjects": 60, "aekl": 500, "prior": 800, "representation": 600}  # the last three in steps


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


def make(root: Path, **sizes: int) -> Path:
    """A phantom study in `root` after all COMMANDS; sizes: other numbers than SIZES."""
    for line in COMMANDS.format(**(SIZES | sizes)).strip().splitlines():
        script, *args = line.split()
        said = run(script, *args, "--out" if script == "make_phantom.py" else "--root", root)
        print(f"{script} {' '.join(args[:3])}: {(said.splitlines() or ['done'])[-1]}")
    return root


@dataclass(frozen=True)
class Study:
    """A study and what the tutorial reads from it; `work` is a temporary folder for its own files."""

    root: Path
    work: Path
    rt: runtime.Runtime
    steps: int = 50  # of inversion and sampling

    @cached_property
    def ldae(self) -> model.LDAE:
        return model.load_ldae(self.root / "runs" / "ldae_repr_learn" / "checkpoints" / "best.ckpt", self.rt)

    @cached_property
    def volumes(self) -> dataset.Volumes:
        return dataset.Volumes(self.ldae.preparation, self.root / "data" / "cache")

    @cached_property
    def direction(self) -> Direction:
        return Direction.load(self.root / "probes" / "diagnosis_AD_vs_CN")

    def rows(self, part: str = "test") -> list[dataset.Row]:
        rows = dataset.read_table(self.root / "data" / "dataset.csv")
        return data_split.read(self.root / "split.json").rows(rows, part)

    def first(self, diagnosis: str) -> dataset.Row:
        """The first test scan of a diagnosis."""
        return next(row for row in self.rows() if row.diagnosis == diagnosis)

    def encode(self, row: dataset.Row, z_T: bool = True) -> generation.ScanCodes:
        """Codes of a scan, with z_T unless that is not wanted."""
        return generation.encode(self.ldae, self.volumes.tensor(row), self.steps if z_T else 0)

    def montage(self, pictures: dict[str, np.ndarray], **options) -> None:
        """Draw prepared volumes (D, H, W) by name, and display the PNG."""
        spacing = [self.ldae.preparation.spacing_mm] * 3
        path = figures.montage(self.work / "figure.png", pictures, window=(0, 1), spacing_mm=spacing, **options)
        columns = len(pictures) + (len(pictures) - 1) * ("difference_to" in options)
        display(Image(data=path.read_bytes(), width=150 + 150 * columns))

    def curves(self, lines: dict, **options) -> None:
        path = figures.curves(self.work / "figure.png", lines, **options)
        display(Image(data=path.read_bytes(), width=520))


def open_study() -> Study:
    """The study of LDAE_ROOT, else a new phantom study; UserError if your own lacks what the last command leaves."""
    work = Path(tempfile.mkdtemp(prefix="ldae_"))
    if named := os.environ.get("LDAE_ROOT", ""):
        root = Path(named).expanduser().resolve()
        if not (root / NEEDED).is_file():
            raise UserError(f"LDAE_ROOT={root} has no {NEEDED}; run the commands of ldae/README.md there")
    else:
        root = make(work / "study")
        print(f"to show this study again: export LDAE_ROOT={root}")
    return Study(root, work, ExitStack().enter_context(runtime.start("auto", "auto", 0)))
