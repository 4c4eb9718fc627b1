"""Write the short-axis slices of all subjects into a lossless store, which the trainings read.

    python mgdcr/lmdb_writer.py                                     # the phantom of make_phantom.py
    python mgdcr/lmdb_writer.py --input CINES --root RUNS           # RUNS/datasets/cardiac_cine_128.lmdb

--input is a folder of <subject>/sax.nii.gz, of img/<subject>.nii.gz or of <subject>.nii.gz (a name may end in _crop_sa,
as MR_Heart_<id>_crop_sa.nii.gz); each a 3D or 4D NIfTI file of columns, rows, slices and frames. Slices are cut to
--size about their middle, never padded; pixels are kept as acquired, without loss (store.py describes the records).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option
from mgdcr.config import STORE, at_root

HERE = Path(__file__).resolve().parent
ENDINGS = (".nii.gz", ".nii")


@dataclass
class Options(CommonOptions):
    root: str = option(str(HERE), "folder that gets datasets/")
    input: str = option(str(HERE / "data"), "folder of short-axis cines")
    out: str = option("", f"store to write; empty: ROOT/datasets/{STORE}")
    size: int = option(
        128, "largest height and width; larger slices are cut about their middle; 0: never", unit="pixels"
    )
    low: float = option(0.5, "percentile of a subject's intensities that becomes -1")
    high: float = option(99.5, "percentile of a subject's intensities that becomes 1")
    dtype: str = option("auto", "auto: float16 where it is exact, else float32", choices=("auto", "float16", "float32"))
    dry_run: bool = option(False, "list the subjects, write nothing")
    overwrite: bool = option(False, "replace a store that exists")

    def __post_init__(self):
        if self.size < 0 or not 0 <= self.low < self.high <= 100:
            raise UserError(f"--size {self.size} is 0 or more, --low {self.low} and --high {self.high} are percentiles")
        at_root(self, out=("datasets", STORE))


def subject_name(path: Path) -> str:
    """The subject of a cine: its folder if the file is called sax, else the file's name."""
    name = next(path.name[: -len(ending)] for ending in ENDINGS if path.name.endswith(ending))
    return path.parent.name if name == "sax" else name.removesuffix("_crop_sa")


def find_cines(folder: str | Path) -> dict[str, Path]:
    """Short-axis files below a folder by subject, sorted; UserError if there are none or two of one subject."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no such folder, {folder}, make a phantom with mgdcr/make_phantom.py or correct --input")
    patterns = ("*/sax.nii*", "img/*.nii*", "*.nii*")
    found = [[p for p in sorted(folder.glob(pattern)) if p.name.endswith(ENDINGS)] for pattern in patterns]
    paths = next((paths for paths in found if paths), [])
    cines: dict[str, Path] = {}
    for path in paths:
        name = subject_name(path)
        if name in cines:
            raise UserError(f"two files of subject {name}, {cines[name]} and {path}, keep one")
        cines[name] = path
    if not cines:
        raise UserError(f"no short-axis cine, {folder}, expected <subject>/sax.nii.gz or img/<subject>.nii.gz")
    return dict(sorted(cines.items()))


def read_cine(path: Path, size: int):
    """A short-axis cine, cut to at most `size` pixels a side."""
    from mgdcr import geometry

    cine = geometry.load_sax(path)
    return geometry.crop_or_pad(cine, tuple(min(n, size) for n in cine.grid.shape[1:])) if size else cine


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    cines = find_cines(options.input)
    if options.dry_run:
        for name, path in cines.items():
            print(f"{name}: {path}")
        print(f"{len(cines)} subjects for {options.out}; nothing written")
        return
    from common.runlog import progress
    from mgdcr import store

    with progress(len(cines), 0, "store") as bar:

        def each():
            for name, path in cines.items():
                yield name, read_cine(path, options.size)
                bar.update()

        count = store.write(options.out, each(), percentiles=(options.low, options.high), dtype=options.dtype,
                            overwrite=options.overwrite)  # fmt: skip
    print(f"{count} slices of {len(cines)} subjects in {options.out}")


if __name__ == "__main__":
    cli.run(main)
