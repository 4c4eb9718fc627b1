"""The study that the notebook shows: your own, or a phantom made and trained by the scripts in a few minutes.

LAPT_ROOT names the folder of your own, with data/ and runs/{ldm,lapt} (README.md), and runs/continued if there is one:
the LDM trained as long as LAPT, without its terms. Without it a study is made in a temporary folder. Nothing is written
into your own.
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
from lapt import dataset, evaluation, inference, lesions
from lapt.diffusion import LatentModel, load_model
from lapt.make_phantom import PENUMBRA

PAPER = Path(__file__).resolve().parents[1]
RUNS = {"ldm": "LDM", "continued": "continued LDM", "lapt": "LAPT"}  # run folder: name in pictures
# Enough steps to see every part work, far from a good model. The CTP window is that of brain tissue: in the original's,
# 0 to 200 HU, it fills a fifth, too little for so short a training.
TRAIN = "-t --no-test --preset tiny paths.root=ROOT"
COMMANDS = f"""
make_phantom.py --out ROOT/data --shape 32 32 8 --n_cases {{cases}} --num_workers 2
preprocessing.py --input_dir ROOT/data/raw --output_dir ROOT/data --ctp_window 10 60 --val_size 0.1 --test_size 0.2
main.py --base vqgan {TRAIN} training.steps={{vqgan}}
main.py --base ldm {TRAIN} training.steps={{ldm}}
main.py --base lapt {TRAIN} training.steps={{lapt}}
main.py --base lapt {TRAIN} training.steps={{lapt}} -n continued loss.w_img=0 loss.w_les=0
"""
SIZES = {"cases": 60, "vqgan": 800, "ldm": 2000, "lapt": 250}


def run(script: str, *args) -> str:
    """A script of this paper, as on the command line: what it printed; RuntimeError with its message if it fails."""
    command = [sys.executable, str(PAPER / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        message = next((line for line in done.stderr.splitlines() if line.startswith("error:")), done.stderr[-2000:])
        raise RuntimeError(f"{script}: {message}")
    return done.stdout.strip()


def make(root: Path, **sizes: int) -> Path:
    """A phantom study in `root` after all COMMANDS; sizes: other numbers than SIZES."""
    for line in COMMANDS.format(**(SIZES | sizes)).strip().splitlines():
        script, *words = line.split()
        run(script, *(word.replace("ROOT", str(root)) for word in words))
        print(f"done: {line}")
    return root


@dataclass(frozen=True)
class Study:
    """A study and what the notebook reads from it; `work` is a temporary folder for its own files."""

    root: Path
    work: Path
    rt: runtime.Runtime
    steps: int = 20  # of sampling

    @cached_property
    def models(self) -> dict[str, LatentModel]:
        """Trained models by their name in pictures, in the order of training."""
        there = {name: self.root / "runs" / run for run, name in RUNS.items()}
        return {name: load_model(path, self.rt) for name, path in there.items() if path.is_dir()}

    @cached_property
    def cases(self) -> list[dataset.Case]:
        """Test cases, the largest lesion first."""
        return sorted(dataset.read_cases(self.root / "data", "test"), key=lambda case: -case.lesion_ml)

    @cached_property
    def loaders(self) -> dict:
        return dict(inference.prepared_studies(self.root / "data", "test"))

    def sample(self, model: LatentModel, case: dataset.Case, n: int = 1) -> inference.Samples:
        """n samples from the case's CTP and mask alone. Every model starts from the same noise."""
        settings = inference.Settings(steps=self.steps, n_samples=n)
        return inference.sample_study(model, self.loaders[case.name](), settings)

    def tissues(self, case: dataset.Case) -> dict[str, np.ndarray]:
        """Masks (X, Y, Z): the lesion, of a phantom the penumbra, and the lesion's mirror image in the healthy side."""
        mask, lesion = case.volume("mask") > 0, case.volume("lesion") > 0
        found, diseased = {"lesion": lesion}, lesion
        path = self.root / "data" / "labels" / f"{case.name}.nii.gz"
        if path.is_file():
            found["penumbra"] = nifti.load(path).data == PENUMBRA
            diseased = lesion | found["penumbra"]
        mirrored = np.flip(lesion, 0) & mask & ~diseased
        return found | {"other side": mirrored if mirrored.any() else mask & ~diseased}

    def errors(self, images: dict[str, np.ndarray], case: dataset.Case) -> dict[str, dict[str, float]]:
        """MAE of DWI and ADC in physical units over the brain and inside the lesion."""
        real, mask, lesion = evaluation.load_real(case)
        difference = {name: np.abs(images[name] - real[name]) for name in real}
        return {name: {"brain": float(e[mask].mean()), "lesion": float(e[lesion].mean()) if lesion.any() else np.nan}
                for name, e in difference.items()}  # fmt: skip

    def bias(self, images: dict[str, np.ndarray], case: dataset.Case) -> float:
        """Mean error of the ADC inside the lesion, in 1e-6 mm²/s; positive: the lesion is too faint."""
        real, mask, lesion = evaluation.load_real(case)
        return lesions.lesion_errors(images["adc"], real["adc"], lesion, mask, case.spacing_mm)["lesion_bias"]

    def montage(self, pictures: dict[str, np.ndarray], case: dataset.Case, **options) -> None:
        """Show the axial slice with most lesion of volumes (X, Y, Z) by name."""
        z = int((case.volume("lesion") > 0).sum((0, 1)).argmax())
        path = figures.montage(self.work / "figure.png", pictures, planes=("axial",), spacing_mm=case.spacing_mm,
                               voxel=[n // 2 for n in case.shape[:2]] + [z], **options)  # fmt: skip
        columns = len(pictures) + (len(pictures) - 1) * ("difference_to" in options)
        display(Image(data=path.read_bytes(), width=120 + 150 * columns))

    def outline(self, background: np.ndarray, mask: np.ndarray, case: dataset.Case, **options) -> None:
        """Show the same slice with the outline of a mask."""
        z = int((case.volume("lesion") > 0).sum((0, 1)).argmax())
        path = figures.overlay(self.work / "figure.png", background, mask, planes=("axial",), voxel=[0, 0, z],
                               spacing_mm=case.spacing_mm, **options)  # fmt: skip
        display(Image(data=path.read_bytes(), width=300))

    def curves(self, lines: dict, **options) -> None:
        path = figures.curves(self.work / "figure.png", lines, **options)
        display(Image(data=path.read_bytes(), width=520))


def open_study() -> Study:
    """The study of LAPT_ROOT, else a new phantom study; UserError if your own has no trained models."""
    work = Path(tempfile.mkdtemp(prefix="lapt_"))
    if named := os.environ.get("LAPT_ROOT", ""):
        root = Path(named).expanduser().resolve()
        for run_name in ("ldm", "lapt"):
            if not (root / "runs" / run_name / "checkpoints" / "best.ckpt").is_file():
                raise UserError(f"LAPT_ROOT={root} has no trained runs/{run_name}; run the commands of lapt/README.md "
                                "there")  # fmt: skip
    else:
        root = make(work / "study")
        print(f"to show this study again: export LAPT_ROOT={root}")
    return Study(root, work, ExitStack().enter_context(runtime.start("auto", "auto", 0)))
