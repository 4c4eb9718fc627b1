"""Reconstruct listed volumes with the VAE: NIfTI of original, reconstruction and difference, and their errors.

    python neuroldm3d/VAE/infer.py                                  # the held-out table, decoded mean latents
    python neuroldm3d/VAE/infer.py --csv TEST.csv --latent sample   # one draw of the latent, as the original does
    python neuroldm3d/VAE/infer.py --csv TRAIN.csv --out recon_train --arm smooth_train   # smooth real maps

Writes OUT/NAME_{original,recon,difference}.nii.gz in native units (grey-matter fraction) on the prepared grid with each
volume's own affine, per_subject_metrics.csv and summary_metrics.json. Half a minute per volume on a CPU.

--arm also writes the reconstructions as samples are written. per_slice_fid.py, memorisation.py and classifier/train.py
take that folder in the place of samples: how much of what they find is the VAE, and how much the diffusion model?
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parents[1]
KINDS = ("original", "recon", "difference")


@dataclass
class Options(CommonOptions):
    root: str = option(str(HERE), "folder that holds data_csvs/, runs/ and reconstructions/")
    csv: str = option("", "table of the volumes; empty: ROOT/data_csvs/val.csv")
    label_column: str = option("HC_vs_LTLE_vs_RTLE_string", "column of the label")
    vae: str = option("", "VAE; empty: ROOT/runs/vae/best_vae.pth (the original's files load too)")
    out: str = option("", "output folder; empty: ROOT/reconstructions")
    cache: str = option("", "LMDB cache of prepared volumes; empty: ROOT/data/cache; 'none': no cache")
    latent: str = option("mean", "decode the mean latent, or one seeded draw", choices=("mean", "sample"))
    regions: str = option("", "folder of region maps of the volumes, same file names: also errors per region")
    lpips_weights: tuple[str, ...] = option((), "pretrained files, backbone and LPIPS heads: also perceptual errors")
    lpips_net: str = option("alex", "backbone of --lpips_weights", choices=("alex", "vgg"))
    arm: str = option("", "folder for the reconstructions as {HC,TLE}/NAME.nii.gz with synthetic.json; empty: none")
    max_files: int = option(0, "only the first so many volumes; 0: all")
    trust_pickle: bool = option(False, "allow a VAE file that needs pickle; it can run code")
    overwrite: bool = option(False, "replace reconstructions made with other settings")

    def __post_init__(self):
        root = Path(self.root)
        self.csv = self.csv or str(root / "data_csvs" / "val.csv")
        self.vae = self.vae or str(root / "runs" / "vae" / "best_vae.pth")
        self.out = self.out or str(root / "reconstructions")
        self.cache = self.cache or str(root / "data" / "cache")
        if self.max_files < 0:
            raise UserError(f"--max_files {self.max_files}: give 0 for all, or more")


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    from common import runtime

    with runtime.start(options.device, options.precision, options.seed) as rt:
        infer(options, rt)


def infer(options: Options, rt) -> dict | None:
    """Write reconstructions and metrics of the listed volumes; returns the summary (rank 0). Ranks share the work."""
    import torch

    from common import checkpoint, nifti
    from common.runlog import progress
    from neuroldm3d import dataset, preprocess
    from neuroldm3d.diffusion import sampling
    from neuroldm3d.VAE import evaluation, latents
    from neuroldm3d.VAE.losses import LPIPS3D

    # ---- setup
    out = Path(options.out)
    rows = dataset.read_table(options.csv, options.label_column)[: options.max_files or None]
    vae = latents.load_vae(Path(options.vae), rt, trust_pickle=options.trust_pickle)
    prep = vae.preparation
    volumes = dataset.Volumes(prep, None if options.cache == "none" else options.cache)
    settings = {"vae": vae.hash, "latent": options.latent, "seed": options.seed, "units": preprocess.units(prep),
                "preparation": prep.to_dict(), "csv_hash": checkpoint.file_hash(options.csv)}  # fmt: skip
    for row in rows if options.regions else ():
        region_map(options, row)  # missing ones are known before the first volume
    lpips = LPIPS3D(options.lpips_net, options.lpips_weights).to(rt.device) if options.lpips_weights else None
    claim_folder(out, settings, [row.name for row in rows], options.overwrite, rt)
    if options.arm:
        files = {arm_name(row): row.label for row in rows}
        sampling.claim_folder(Path(options.arm), settings | {"files": files}, options.overwrite, rt)
    mask = evaluation.brain_mask(volumes.load(row) for row in rows)

    # ---- loop over volumes
    found, mine = [], rt.shard(rows)
    with progress(len(mine), 0, "reconstruct", enabled=rt.is_main) as bar:
        for row in mine:
            x = volumes.tensor(row)[None]
            x_hat = latents.decode(vae.model, encode(vae.model, x, row.name, options, rt), rt)[0].numpy()
            x = x[0, 0].numpy()
            pair = preprocess.denormalise(x, prep), preprocess.denormalise(x_hat, prep)
            for kind, data in zip(KINDS, (*pair, pair[1] - pair[0]), strict=True):
                nifti.save(output(out, row.name, kind), data, volumes.affine(row))
            if options.arm:
                data = sampling.to_units(torch.from_numpy(x_hat), prep, clip=True)
                sampling.save_volume(Path(options.arm) / arm_name(row), data, row.label, volumes.affine(row))
            maps = load_regions(options, row, prep) if options.regions else {}
            source = nifti.load(row.file).data.astype("f8")
            mean, sd = float(source.mean()), float(source.std())
            errors = evaluation.reconstruction_metrics(x, x_hat, prep, source_sd=sd, mask=mask, **maps)
            found.append({"name": row.name, "label": row.label} | evaluation.flatten(errors))
            if lpips:
                z_scores = (x, x_hat) if prep.norm == "zscore" else ((volume - mean) / sd for volume in pair)
                tensors = (torch.from_numpy(z)[None, None].float().to(rt.device) for z in z_scores)
                found[-1] |= evaluation.perceptual_errors(lpips, *tensors)
            bar.update()

    # ---- finish
    table = sorted((row for part in rt.gather(found) for row in part), key=lambda row: row["name"])
    summary = evaluation.write_report(out, table, settings, options.seed) if rt.is_main else None
    if summary:
        native = summary["metrics"]["all"]
        rt.print(f"{len(table)} reconstructions in {out}: PSNR {native['native_psnr']['mean']:.2f} dB (range 1), "
                 f"NMSE {native['native_nmse']['mean']:.4f}")  # fmt: skip
    rt.barrier()
    return summary


def encode(model, x, name: str, options: Options, rt):
    """The latent that is decoded: the mean, or a draw seeded by the volume's name."""
    import torch

    from common import runtime
    from neuroldm3d.VAE import latents

    mu, logvar = latents.encode(model, x, rt)
    if options.latent == "mean":
        return mu
    return model.sample(mu, logvar, torch.randn(mu.shape, generator=runtime.generator(options.seed, "infer", name)))


def region_map(options: Options, row) -> Path:
    """Label map of a volume; UserError if there is none of the volume's shape."""
    from common import nifti
    from neuroldm3d import regions

    path = regions.region_path(options.regions, row.name)
    (labels, _), (shape, _) = nifti.header(path), nifti.header(row.file)
    if labels != shape:
        raise UserError(f"region map {path} has shape {labels}, its volume {shape}; make it on the same grid")
    return path


def load_regions(options: Options, row, prep) -> dict:
    """Label map on the prepared grid (nearest neighbour) and the region codes, for reconstruction_metrics."""
    from common.phantom import LABELS
    from neuroldm3d import regions

    codes = {name: (code,) for name, code in LABELS.items()}
    return {"labels": regions.prepared_labels(region_map(options, row), prep).data, "regions": codes}


def arm_name(row) -> str:
    """Path of a reconstruction below --arm, as save_synth.py names classes."""
    from neuroldm3d.dataset import CLASSES

    return f"{CLASSES[row.label]}/{row.name}.nii.gz"


def output(out: Path, name: str, kind: str) -> Path:
    return out / f"{name}_{kind}.nii.gz"


def claim_folder(out: Path, settings: dict, names: list[str], overwrite: bool, rt) -> None:
    """Enter these volumes in OUT/reconstructions.json; UserError for outputs of other settings or files not ours."""
    from common import training
    from common.runlog import git_revision, write_json

    path = out / "reconstructions.json"
    remedy = "delete the folder or name another --out"
    old = training.read_record(path, ("names",), remedy) if path.is_file() else {**settings, "names": []}
    changed = [f"{key} {old.get(key)} -> {value}" for key, value in settings.items() if old.get(key) != value]
    if changed and not overwrite:
        raise UserError(f"{out} holds reconstructions of other settings ({', '.join(changed)}); name another --out or "
                        "add --overwrite")  # fmt: skip
    for name in set(names) - set(old["names"]):
        for kind in KINDS:
            if output(out, name, kind).exists():
                raise UserError(f"{output(out, name, kind)} was not written by infer.py; name another --out")
    rt.barrier()  # every rank has judged the folder before rank 0 changes it
    if rt.is_main:
        for name in old["names"] if changed else ():
            for kind in KINDS:
                output(out, name, kind).unlink(missing_ok=True)
        listed = sorted({*names, *(() if changed else old["names"])})
        write_json(path, settings | {"names": listed, "git_revision": git_revision()})
    rt.barrier()


if __name__ == "__main__":
    cli.run(main)
