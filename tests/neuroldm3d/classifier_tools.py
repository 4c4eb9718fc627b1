"""Tiny classifier runs: options, synthetic volumes, and the entry script called in this process."""

import csv
import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from common import nifti
from common.runlog import write_json
from neuroldm3d import dataset, preprocess
from neuroldm3d.classifier import train
from neuroldm3d.classifier.config import PRESETS, Config
from neuroldm3d.preprocess import Preparation
from tests.helpers import run_main

PREP = Preparation(shape=(32, 40, 32))
TINY = (
    "--preset smoke --device cpu --filters 4 8 8 --batch_size 4 --epochs 3 --steps_per_epoch 4 --log_every 1 "
    "--save_every 3 --bootstrap 20 --num_workers 0"
).split()


def tiny_config(root, **options) -> Config:
    """The same as TINY, as an object."""
    tiny = dict(filters=(4, 8, 8), batch_size=4, epochs=3, steps_per_epoch=4, log_every=1, save_every=3, bootstrap=20)
    return Config(**(PRESETS["smoke"] | tiny | dict(root=str(root), device="cpu") | options))


def call(root, *args):
    """train.py on the study in `root`; later options win. Returns what it printed."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(io.StringIO()):
        run_main(train, "--root", root, *TINY, *args)
    return out.getvalue()


def run_folder(root, exp="exp_1") -> Path:
    return Path(root) / "runs" / "classifier" / exp


def add_synthetic(root, n: int = 6) -> None:
    """n synthetic volumes per class as save_synth.py leaves them: training maps with noise, and their record."""
    volumes, rng = dataset.Volumes(PREP, None), np.random.default_rng(0)
    rows = dataset.read_table(Path(root) / "data_csvs" / "train.csv")
    folder = Path(root) / "synthetic_data"
    training = {"label_counts": {"HC": 5, "TLE": 7}, "csv_hash": "0" * 16}
    write_json(folder / "synthetic.json", {"preparation": PREP.to_dict(), "training": training})
    for label, name in enumerate(dataset.CLASSES):
        pool = [row for row in rows if row.label == label]
        for k in range(n):
            x = preprocess.denormalise(volumes.load(pool[k % len(pool)]), PREP)
            x = np.maximum(x + 0.05 * rng.standard_normal(x.shape) * (x > 0), 0).astype(np.float32)
            nifti.save(folder / name / f"{name}_{k:05d}.nii.gz", x, volumes.affine(pool[0]))


def plant_copy(root, source="train", target="test") -> tuple[str, str]:
    """A copy of the first volume of one table under a new id in another one; returns both names."""
    tables = Path(root) / "data_csvs"
    _, rows = dataset.read_csv(tables / f"{source}.csv")
    row = dict(rows[0])
    original = tables / row["file"]
    volume = nifti.load(original)
    copy = original.with_name("mwp1sub-9999_T1w.nii.gz")
    data, affine = nifti.reorient(volume.data * np.float32(1.01), volume.affine, "LAS")
    nifti.save(copy, data, affine)
    (original.parents[1] / "regions" / copy.name).write_bytes(
        (original.parents[1] / "regions" / original.name).read_bytes()
    )
    row |= {"sbj_nme": "sub-9999", "file": str(Path(row["file"]).with_name(copy.name))}
    with open(tables / f"{target}.csv", "a", newline="") as file:
        csv.DictWriter(file, list(row)).writerow(row)
    return dataset.stem(original), dataset.stem(copy)


def rewrite_table(path, keep) -> None:
    """Keep the rows of a table for which `keep(row)` holds."""
    columns, rows = dataset.read_csv(path)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(row for row in rows if keep(row))


@pytest.fixture(scope="session")
def trained(cohort, tmp_path_factory):
    """The cohort with a finished run exp_1, not to be changed."""
    import shutil

    import torch

    root = tmp_path_factory.mktemp("classifier") / "study"
    shutil.copytree(cohort, root)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    call(root)
    torch.set_num_threads(threads)
    return root
