"""Encode every scan of the table once: mean and log-variance of its latent, and the statistics of the training split.

    python ldae/scripts/save_compressed_latent.py                                  # what stages 2 and 3 read
    python ldae/scripts/save_compressed_latent.py --csv_path TABLE.csv --ae_model_path autoencoderkl.pth --root STUDY

Writes ROOT/latents/<scan>.npz, latents.json (autoencoder, preparation, split, hashes, mean and SD per channel) and
<csv>_with_compressed_latent.csv, the table with the columns latent_path and split. Finished files of the same
autoencoder and scan are kept, those of another autoencoder are refused. Seconds per volume on a GPU at 128x160x128,
half a minute on a CPU. Under torchrun the scans are shared out.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from common.cli import CommonOptions, option

HERE = Path(__file__).resolve().parents[1]
RULES = ("stratified", "upstream")


@dataclass
class Options(CommonOptions):
    precision: str = option("fp32", "arithmetic of the encoder: each scan is encoded once, so exactly",
                            choices=("auto", "fp32", "bf16", "fp16"))  # fmt: skip
    root: str = option(str(HERE), "study folder that default paths hang off")
    csv_path: str = option("", "table of the scans; empty: ROOT/data/dataset.csv")
    ae_model_path: str = option("", "autoencoder, ours or the original's autoencoderkl.pth; empty: "
                                    "ROOT/runs/aekl/checkpoints/best.ckpt")  # fmt: skip
    output_dir: str = option("", "folder of the latents; empty: ROOT/latents")
    split: str = option("", "split of the subjects, made when it is missing; empty: ROOT/split.json")
    cache: str = option("", "LMDB cache of prepared volumes; empty: ROOT/data/cache; 'none': no cache")
    val_size: float = option(0.1, "share of subjects for validation, when the split is made")
    test_size: float = option(0.1, "share of subjects for testing, when the split is made")
    split_seed: int = option(42, "seed of the split, when it is made")
    split_rule: str = option("stratified", "how the split is made", choices=RULES)
    trust_pickle: bool = option(False, "allow an autoencoder file that needs pickle; it can run code")
    overwrite: bool = option(False, "replace latents of another autoencoder")

    def __post_init__(self):
        root = Path(self.root)
        self.csv_path = self.csv_path or str(root / "data" / "dataset.csv")
        self.ae_model_path = self.ae_model_path or str(root / "runs" / "aekl" / "checkpoints" / "best.ckpt")
        self.output_dir = self.output_dir or str(root / "latents")
        self.split = self.split or str(root / "split.json")
        self.cache = self.cache or str(root / "data" / "cache")


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    from common import runtime

    with runtime.start(options.device, options.precision, options.seed) as rt:
        save_latents(options, rt)


def save_latents(options: Options, rt) -> dict:
    """Write the latents of every scan, latents.json and the table; returns the content of latents.json."""
    from common import checkpoint, nifti
    from common.runlog import progress, write_json
    from ldae import data_split, dataset, latents

    # ---- setup: everything the user can get wrong, before anything is written
    folder = Path(options.output_dir)
    file = Path(options.ae_model_path)
    aekl = latents.load_aekl(file, rt, trust_pickle=options.trust_pickle, option="--ae_model_path")
    rows = dataset.read_table(options.csv_path)
    split = data_split.load_or_create(options.split, rows, options.val_size, options.test_size, options.split_seed, rt,
                                      rule=options.split_rule, table=options.csv_path)  # fmt: skip
    if aekl.split_hash not in (None, split.hash):
        rt.print(f"note: the autoencoder was trained with split {aekl.split_hash}, this one is {split.hash}; it may "
                 "know scans that are for testing here")  # fmt: skip
    volumes = dataset.Volumes(aekl.preparation, None if options.cache == "none" else options.cache)
    sources = {row.scan: checkpoint.file_hash(row.path) for row in rt.shard(rows)}
    sources = {scan: source for part in rt.gather(sources) for scan, source in part.items()}
    record = {
        "aekl": aekl.hash,
        "preparation": aekl.preparation.to_dict(),
        "compression": aekl.model.compression,
        "latent_shape": list(aekl.latent_shape),
        "split": split.hash,
        "table": Path(options.csv_path).name,
        "precision": options.precision,
        "scans": {row.scan: {"split": split.of(row.subject), "source": sources[row.scan], "hash": None}
                  for row in rows},
    }  # fmt: skip
    latents.claim_folder(folder, record, options.overwrite, rt)

    # ---- loop over scans: each rank takes its share
    sums, hashes = {}, {}
    mine = rt.shard(rows)
    with progress(len(mine), 0, "encode", enabled=rt.is_main) as bar:
        for row in mine:
            path = latents.latent_path(folder, row.scan)
            if not path.is_file():
                # Deviation (original code): mean and log-variance instead of one random, unseeded draw.
                mu, logvar = latents.encode(aekl.model, volumes.tensor(row)[None], rt)
                affine = nifti.strided_affine(volumes.affine(row), aekl.model.compression)
                latents.save_latent(path, mu[0], logvar[0], affine)
            hashes[row.scan] = latents.bytes_hash(path.read_bytes())
            if record["scans"][row.scan]["split"] == "train":
                sums[row.scan] = latents.channel_sums(*latents.read_latent(path))
            bar.update()

    # ---- statistics of the whole training split
    for part in rt.gather(hashes):
        for scan, found in part.items():
            record["scans"][scan]["hash"] = found
    sums = {scan: values for part in rt.gather(sums) for scan, values in part.items()}
    record |= {"n_train": len(sums), **latents.channel_statistics(sums)}
    if rt.is_main:
        write_json(latents.record_path(folder), record)
        table = write_table(options, folder, rows, record)
        mean, std = ([round(x, 4) for x in record[key]] for key in ("mean", "std"))
        rt.print(f"latents of {len(rows)} scans in {folder}; of the {len(sums)} for training: mean {mean}, SD {std}")
        rt.print(f"table with latent_path and split: {table}")
    rt.barrier()
    return record


def write_table(options: Options, folder: Path, rows, record: dict) -> Path:
    """<csv>_with_compressed_latent.csv in the output folder: the table's columns, paths that count from there."""
    from common import tables
    from ldae import dataset

    columns, records = dataset.read_csv(options.csv_path)
    here, root = folder.resolve(), Path(options.root).resolve()

    def moved(path):
        if path is None:
            return None
        path = Path(path).resolve()
        return os.path.relpath(path, here) if path.is_relative_to(root) and here.is_relative_to(root) else str(path)

    for row in rows:
        entry = records[row.index]
        entry |= {"path": moved(row.path), "latent_path": f"{row.scan}.npz"}
        entry["split"] = record["scans"][row.scan]["split"]
        if "mask_path" in columns:
            entry["mask_path"] = moved(row.mask_path)
    path = folder / f"{Path(options.csv_path).stem.removesuffix('_with_compressed_latent')}_with_compressed_latent.csv"
    tables.write_csv(path, records, dict.fromkeys([*columns, "latent_path", "split"]))
    return path


if __name__ == "__main__":
    cli.run(main)
