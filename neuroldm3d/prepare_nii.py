"""Make a blinded set of real and synthetic volumes for readers: numbered files, and the key in a separate table.

    python neuroldm3d/prepare_nii.py                       # 12 HC + 12 TLE real, as many synthetic: 1.nii to 48.nii
    python neuroldm3d/prepare_nii.py --per_class 4 --seed 1 --out STUDY/readers --key STUDY/readers_key.csv

Real volumes come from the held-out table, prepared like the synthetic ones; nobody is shown twice. All files have the
same size, units and type (uncompressed float32, grey-matter fraction from 0), and each has its own true affine.
"""

from __future__ import annotations

import csv
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

import numpy as np

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parent


@dataclass
class Options(CommonOptions):
    root: str = option(str(HERE), "study folder that default paths hang off")
    csv: str = option("", "held-out real volumes; default: ROOT/data_csvs/test.csv")
    train_csv: str = option("", "training table, none of whose volumes may be shown; default: ROOT/data_csvs/train.csv")
    synthetic: str = option("", "folder with HC/, TLE/ and synthetic.json; default: ROOT/synthetic_data")
    out: str = option("", "folder of the numbered volumes; default: ROOT/nii_test")
    key: str = option("", "table that says what is what; default: ROOT/qualitative_results.csv")
    label_column: str = option("HC_vs_LTLE_vs_RTLE_string", "column of the labels HC, left, right")
    per_class: int = option(12, "volumes of each class, real and synthetic each")

    def __post_init__(self):
        root = Path(self.root)
        self.csv = self.csv or str(root / "data_csvs" / "test.csv")
        self.train_csv = self.train_csv or str(root / "data_csvs" / "train.csv")
        self.synthetic = self.synthetic or str(root / "synthetic_data")
        self.out, self.key = self.out or str(root / "nii_test"), self.key or str(root / "qualitative_results.csv")


def choose(options: Options) -> list[tuple]:
    """(row, "Real" or "synthetic") in blinded order. Deviation (original code): held-out reals, seeded, no repeats."""
    from neuroldm3d import dataset

    counts = dict.fromkeys(range(len(dataset.CLASSES)), options.per_class)
    real = dataset.read_table(options.csv, options.label_column)
    if Path(options.train_csv).is_file():
        trained = dataset.read_table(options.train_csv, options.label_column)
        seen = {dataset.cluster_of(row) for row in trained} | {row.file.resolve() for row in trained}
        shared = next((r for r in real if dataset.cluster_of(r) in seen or r.file.resolve() in seen), None)
        if shared:
            raise UserError(f"{shared.name} of {options.csv} is in {options.train_csv} too; readers see held-out "
                            "volumes only: split again with data_split.py")  # fmt: skip
    chosen = [(row, "Real") for row in dataset.select_matched(real, counts, options.seed)]
    synthetic = dataset.synthetic_rows(options.synthetic)
    chosen += [(row, "synthetic") for row in dataset.select_matched(synthetic, counts, options.seed)]
    order = np.random.default_rng((options.seed, len(counts))).permutation(len(chosen))
    return [chosen[i] for i in order]


def check(options: Options) -> None:
    if options.per_class < 1 or options.seed < 0:
        raise UserError("--per_class starts at 1 and --seed at 0")
    out, key = Path(options.out), Path(options.key)
    if key.resolve().is_relative_to(out.resolve()):
        raise UserError(f"--key {key} lies among the volumes that readers get; name a place outside {out}")
    for path in (out, key):
        if path.is_file() or path.is_dir() and any(path.iterdir()):
            raise UserError(f"{path} is there already; move it away or name another (--out, --key)")


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    check(options)
    from common import nifti
    from common.checkpoint import replacing
    from neuroldm3d import dataset, preprocess

    prep = dataset.synthetic_preparation(Path(options.synthetic))
    if prep is None:
        raise UserError(
            f"{options.synthetic} has no {dataset.SYNTHETIC_RECORD}; make volumes with diffusion/save_synth.py"
        )
    chosen, volumes = choose(options), dataset.Volumes(prep, None)
    loaded = [volumes.load(row) for row, _ in chosen]  # a bad one is known before the first file is written
    affines = [volumes.affine(row) for row, _ in chosen]
    if max(np.abs(affine - affines[0]).max() for affine in affines) > 0.1:
        print("note: real and synthetic volumes have different affines, which a viewer shows to the readers")

    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["ID", "filepath", "label", "Real/synthetic"])
    for number, ((row, kind), x, affine) in enumerate(zip(chosen, loaded, affines, strict=True), start=1):
        data = preprocess.denormalise(x, prep)
        if prep.norm == "native":
            data = data.clip(min=0)  # a decoder's slightly negative background would give it away
        nifti.save(Path(options.out) / f"{number}.nii", data, affine)
        writer.writerow([number, os.path.relpath(row.file, Path(options.key).parent), dataset.CLASSES[row.label], kind])
    with replacing(Path(options.key)) as file:
        file.write(table.getvalue().encode())
    print(f"{len(chosen)} volumes in {options.out}, seeded {options.seed}; key, not for the readers: {options.key}")


if __name__ == "__main__":
    cli.run(main)
