"""Encode the training and held-out volumes: mean and log-variance of every latent, and their whole-set statistics.

    python neuroldm3d/VAE/save_latent.py                          # train.csv and val.csv in one go
    python neuroldm3d/VAE/save_latent.py --splits train val test
    python neuroldm3d/VAE/save_latent.py --pickles OLD/latent_data --trust_pickle    # the original's latents instead

Writes ROOT/latent_data/{train,val}/NAME_latent.npz and latents.json (VAE, preparation, affine, labels, mean and SD per
channel). Files of the same VAE are kept, those of another are refused. The decoder is never called: seconds per volume
on a CPU at 112x136x112. Under torchrun the volumes are shared out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parents[1]
SPLITS = ("train", "val", "test")


@dataclass
class Options(CommonOptions):
    root: str = option(str(HERE), "folder that holds data_csvs/, runs/ and latent_data/")
    splits: tuple[str, ...] = option(("train", "val"), "tables to encode: ROOT/data_csvs/<split>.csv", choices=SPLITS)
    tables: str = option("", "folder of the tables; empty: ROOT/data_csvs")
    label_column: str = option("HC_vs_LTLE_vs_RTLE_string", "column of the label")
    vae: str = option("", "VAE; empty: ROOT/runs/vae/best_vae.pth (the original's files load too)")
    latents: str = option("", "output folder; empty: ROOT/latent_data")
    cache: str = option("", "LMDB cache of prepared volumes; empty: ROOT/data/cache; 'none': no cache")
    pickles: str = option("", "import the original's FOLDER/{train,val}/*_latent.pkl of this VAE; needs --trust_pickle")
    trust_pickle: bool = option(False, "read pickled files; only plain arrays and numbers are accepted")
    overwrite: bool = option(False, "replace latents of another VAE")

    def __post_init__(self):
        root = Path(self.root)
        self.tables = self.tables or str(root / "data_csvs")
        self.vae = self.vae or str(root / "runs" / "vae" / "best_vae.pth")
        self.latents = self.latents or str(root / "latent_data")
        self.cache = self.cache or str(root / "data" / "cache")
        if self.pickles and not self.trust_pickle:
            raise UserError("--pickles reads pickled files: add --trust_pickle if you trust where they come from")


@dataclass
class Split:
    """What one split's latents are made of: names, labels, hash of the table, and read(name) -> (mu, logvar)."""

    names: list[str]
    labels: list[int]
    csv_hash: str | None
    read: Callable


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    from common import runtime

    with runtime.start(options.device, options.precision, options.seed) as rt:
        save_latents(options, rt)


def save_latents(options: Options, rt) -> dict:
    """Write the latents of every split and latents.json; returns its content. Finished files are kept."""
    from common.runlog import progress, write_json
    from neuroldm3d.VAE import latents

    # ---- setup: everything the user can get wrong, before anything is written
    folder = Path(options.latents)
    vae = latents.load_vae(Path(options.vae), rt, trust_pickle=options.trust_pickle)
    splits, affine = open_pickles(options, vae) if options.pickles else open_tables(options, vae, rt)
    record = {
        "vae": vae.hash,
        "preparation": vae.preparation.to_dict(),
        "compression": vae.model.compression,
        "latent_shape": list(vae.latent_shape),
        "affine": affine.tolist(),
    }
    entries = {
        name: {
            "names": split.names,
            "labels": split.labels,
            "label_counts": latents.label_counts(split.labels),
            "csv_hash": split.csv_hash,
        }
        for name, split in splits.items()
    }
    record = latents.claim_folder(folder, record, entries, options.overwrite, rt)

    # ---- loop over volumes: each rank takes its share
    sums = {}
    for name, split in splits.items():
        mine = rt.shard(list(zip(split.names, split.labels, strict=True)))
        with progress(len(mine), 0, f"encode {name}", enabled=rt.is_main) as bar:
            for stem, label in mine:
                path = latents.latent_path(folder, name, stem)
                if not path.is_file():
                    latents.save_latent(path, *split.read(stem), label)
                if name == "train":
                    sums[stem] = latents.channel_sums(*latents.read_latent(path)[:2])
                bar.update()

    # ---- statistics of the whole training set
    if "train" in splits:
        record |= latents.channel_statistics({k: v for part in rt.gather(sums) for k, v in part.items()})
        if rt.is_main:
            write_json(latents.record_path(folder), record)
        mean, std = ([round(x, 4) for x in record[key]] for key in ("mean", "std"))
        rt.print(f"latents of {len(splits['train'].names)} training volumes: mean {mean}, SD {std}")
    rt.barrier()
    return record


def open_tables(options: Options, vae, rt) -> tuple[dict[str, Split], object]:
    """The splits of the tables, to be encoded, and the affine of the first training volume on the prepared grid."""
    import numpy as np

    from common import checkpoint
    from neuroldm3d import dataset
    from neuroldm3d.VAE import latents

    volumes = dataset.Volumes(vae.preparation, None if options.cache == "none" else options.cache)
    splits, affines = {}, {}
    for name in options.splits:
        path = Path(options.tables) / f"{name}.csv"
        rows = {row.name: row for row in dataset.read_table(path, options.label_column)}

        def read(stem, rows=rows):
            mu, logvar = latents.encode(vae.model, volumes.tensor(rows[stem])[None], rt)
            return mu[0], logvar[0]

        labels = [row.label for row in rows.values()]
        splits[name] = Split(list(rows), labels, checkpoint.file_hash(path), read)
        affines |= {row.name: volumes.affine(row) for row in rows.values()}
    first = next(iter(affines.values()))
    if odd := [name for name, affine in affines.items() if not np.allclose(affine, first, atol=0.1)]:
        rt.print(f"note: {len(odd)} volumes, such as {odd[0]}, lie on another grid than the first; synthetic volumes "
                 "get the first one's affine")  # fmt: skip
    return splits, first


def open_pickles(options: Options, vae) -> tuple[dict[str, Split], object]:
    """The splits of a folder of the original's pickles, and the affine of its published grid."""
    import torch

    from neuroldm3d import preprocess, upstream

    splits = {}
    for name in options.splits:
        found = Path(options.pickles, name).glob("*_latent.pkl")
        files = {path.name.removesuffix("_latent.pkl"): path for path in found}
        if not files:
            raise UserError(f"no *_latent.pkl in {Path(options.pickles, name)}; name the folder that holds train/ and "
                            "val/, or leave a split out with --splits")  # fmt: skip

        def read(stem, files=files):
            mu, logvar = map(torch.from_numpy, upstream.read_item(files[stem], "mu", "logvar")[0])
            if tuple(mu.shape) != vae.latent_shape or mu.shape != logvar.shape:
                raise UserError(f"{files[stem]} has latents of shape {tuple(mu.shape)}, this VAE makes "
                                f"{vae.latent_shape}; name the VAE that made them")  # fmt: skip
            return mu, logvar

        names = sorted(files)
        labels = [upstream.read_item(files[stem])[1] for stem in names]
        splits[name] = Split(names, labels, None, read)
    return splits, preprocess.published_affine(vae.preparation)


if __name__ == "__main__":
    cli.run(main)
