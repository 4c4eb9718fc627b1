"""Synthetic volumes by class: exactly n of each, sampled by the DiT and decoded by the VAE.

    python neuroldm3d/diffusion/save_synth.py --n_per_class 100                    # 100 HC, 100 TLE, 50 steps
    python neuroldm3d/diffusion/save_synth.py --n_per_class 52 72 --guidance 2     # 52 HC and 72 TLE, guided
    python neuroldm3d/diffusion/save_synth.py --n_per_class 100 --preset upstream  # ancestral, 1000 steps, as published
    python neuroldm3d/diffusion/save_synth.py --pickles OLD_HC OLD_TLE --trust_pickle  # the original's volumes instead

Writes ROOT/synthetic_data/{HC,TLE}/<class>_<number>.nii.gz in grey-matter fraction on the training grid, and
synthetic.json with settings, networks and labels. A volume depends on --seed, class and number alone: the same command
again makes what is missing, a larger number adds to it. Under torchrun the volumes are shared out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parents[1]
# DDPM with all steps, the raw weights and no clipping is what the original does.
PRESETS = {
    "paper": {},
    "upstream": dict(sampler="ddpm", steps=0, weights="raw", clip=False),
    # A DiT of a short training knows its classes only faintly: guidance makes up for a part of that.
    "smoke": dict(n_per_class=(8,), steps=20, guidance=4.0),
}


@dataclass
class Options(CommonOptions):
    preset: str = option("paper", "named set of option values, applied before the other options")
    root: str = option(str(HERE), "folder that holds runs/ and synthetic_data/")
    vae: str = option("", "VAE; empty: ROOT/runs/vae/best_vae.pth (the original's files load too)")
    dit: str = option("", "DiT; empty: ROOT/runs/dit/epoch_best.pth (the original's files load too)")
    latents: str = option("", "latents whose affine volumes get if --dit has none; empty: ROOT/latent_data, or the "
                              "grid of CAT12's maps")  # fmt: skip
    out: str = option("", "output folder; empty: ROOT/synthetic_data")
    n_per_class: tuple[int, ...] = option((100,), "one number for both classes, or one for HC and one for TLE")
    weights: str = option("ema", "averaged or raw weights of the DiT", choices=("ema", "raw"))
    sampler: str = option("dpm", "ddpm: ancestral as published; ddim; dpm: DPM-Solver++ 2M",
                          choices=("ddpm", "ddim", "dpm"))  # fmt: skip
    steps: int = option(50, "timesteps visited per volume; 0: all")
    guidance: float = option(1.0, "classifier-free guidance scale; 1: plain conditional, 0: unconditional")
    eta: float = option(0.0, "DDIM stochasticity")
    clip: bool = option(True, "raise negative grey-matter fractions to 0")
    gen_batch: int = option(8, "volumes sampled together on a GPU; a CPU takes them one by one, to be exact")
    npz: bool = option(False, "also write <class>_<number>.npz with `image` (D, H, W) and `label`")
    pickles: tuple[str, ...] = option((), "import the original's <number>_<label>.pkl of these folders, sampling "
                                          "nothing; needs --trust_pickle")  # fmt: skip
    trust_pickle: bool = option(False, "allow network files that need pickle, which can run code, and --pickles, of "
                                       "which only plain arrays and numbers are accepted")  # fmt: skip
    overwrite: bool = option(False, "replace volumes made with other settings")

    def __post_init__(self):
        self.n_per_class = self.n_per_class * 2 if len(self.n_per_class) == 1 else self.n_per_class
        if len(self.n_per_class) != 2 or min(self.n_per_class) < 0 or not sum(self.n_per_class):
            given = " ".join(map(str, self.n_per_class))
            raise UserError(f"--n_per_class {given}: give one number for both classes, or one each, not only 0")
        if self.steps < 0 or self.gen_batch < 1 or self.eta < 0:
            raise UserError("--steps and --eta must be 0 or more, --gen_batch at least 1")
        if self.pickles and not self.trust_pickle:
            raise UserError("--pickles reads pickled files: add --trust_pickle if you trust where they come from")
        root = Path(self.root)
        self.vae = self.vae or str(root / "runs" / "vae" / "best_vae.pth")
        self.dit = self.dit or str(root / "runs" / "dit" / "epoch_best.pth")
        self.latents = self.latents or str(root / "latent_data")
        self.out = self.out or str(root / "synthetic_data")


def main() -> None:
    options = cli.parse(Options, description=__doc__, presets=PRESETS)
    from common import runtime

    with runtime.start(options.device, options.precision, options.seed) as rt:
        (import_pickles if options.pickles else save_synth)(options, rt)


def save_synth(options: Options, rt) -> dict[str, int]:
    """Write the volumes and OUT/synthetic.json; returns {path below OUT: label}. Finished volumes are kept."""
    from common import schedulers
    from common.runlog import progress
    from neuroldm3d import preprocess
    from neuroldm3d.dataset import CLASSES
    from neuroldm3d.diffusion import sampling
    from neuroldm3d.VAE import latents

    # ---- setup: everything the user can get wrong, before any network call
    out = Path(options.out)
    vae = latents.load_vae(Path(options.vae), rt, trust_pickle=options.trust_pickle)
    dit = sampling.load_dit(Path(options.dit), rt, weights=options.weights, trust_pickle=options.trust_pickle)
    sampling.check_pair(dit, vae)
    sampling.check_guidance(dit, options.guidance)
    schedulers.respace(dit.schedule.T, options.steps or dit.schedule.T)
    if dit.affine is not None:
        affine = dit.affine.tolist()
    elif latents.record_path(Path(options.latents)).is_file():
        affine = latents.read_record(Path(options.latents))["affine"]
    else:
        affine = preprocess.published_affine(vae.preparation).tolist()
    files = {file_name(label, k): (label, k) for label, n in enumerate(options.n_per_class) for k in range(n)}
    settings = ("sampler", "steps", "guidance", "eta", "seed", "weights", "clip", "precision")
    record = {"network": "neuroldm3d dit", "vae": vae.hash, "dit": dit.hash, "training": dit.about}
    record |= {name: getattr(options, name) for name in settings}
    record |= {"units": preprocess.units(vae.preparation), "preparation": vae.preparation.to_dict(), "affine": affine,
               "classes": list(CLASSES), "files": {file: label for file, (label, _) in files.items()}}  # fmt: skip
    sampling.claim_folder(out, record, options.overwrite, rt)

    # ---- loop over volumes: each rank takes its share
    mine = [file for file in rt.shard(list(files)) if not finished(out / file, options)]
    sampler = {name: getattr(options, name) for name in ("sampler", "steps", "guidance", "eta")}
    with progress(len(mine), 0, "sample", enabled=rt.is_main) as bar:
        for label in range(len(CLASSES)):
            numbers = [files[file][1] for file in mine if files[file][0] == label]
            found = sampling.synthesize(dit, vae, label, numbers, options.seed, rt, batch=options.gen_batch, **sampler)
            for number, x in found:
                data = sampling.to_units(x, vae.preparation, options.clip)
                sampling.save_volume(out / file_name(label, number), data, label, affine, options.npz)
                bar.update()
    rt.barrier()
    counts = " and ".join(f"{n} {name}" for n, name in zip(options.n_per_class, CLASSES, strict=True))
    rt.print(f"{counts} volumes in {out} ({len(mine)} new on this rank), values in {record['units']}")
    return record["files"]


def import_pickles(options: Options, rt) -> dict[str, int]:
    """Write the original's pickled volumes (112 x 136 x 112, z-scores) as NIfTI and OUT/synthetic.json, like samples.

    Returns {path below OUT: label}. Finished volumes are kept. UserError for other names, sizes and labels.
    """
    from common.runlog import progress
    from neuroldm3d import preprocess, upstream
    from neuroldm3d.dataset import CLASSES
    from neuroldm3d.diffusion import sampling

    # ---- setup: labels are those of the names, so that gigabytes need not be read twice
    out, prep, sources = Path(options.out), preprocess.Preparation(norm="zscore"), {}
    for folder in map(Path, options.pickles):
        paths = sorted(folder.glob("*.pkl"))
        if not paths:
            raise UserError(f"no *.pkl in {folder}; name the original's folders of pickled volumes with --pickles")
        for path in paths:
            label = path.stem.rpartition("_")[2]
            if label not in ("0", "1"):
                raise UserError(f"{path} is not named <number>_0.pkl (HC) or <number>_1.pkl (TLE) like the original's")
            name = f"{CLASSES[int(label)]}/{path.stem}.nii.gz"
            if name in sources:
                raise UserError(f"{path} has the name of {sources[name]}; rename one of them")
            sources[name] = path
    files = {name: CLASSES.index(name.split("/")[0]) for name in sources}
    affine = preprocess.published_affine(prep).tolist()
    record = {"network": "pickles of the original", "units": preprocess.units(prep), "preparation": prep.to_dict(),
              "affine": affine, "classes": list(CLASSES), "files": files}  # fmt: skip
    sampling.claim_folder(out, record, options.overwrite, rt)

    # ---- loop over volumes: each rank takes its share
    mine = [name for name in rt.shard(list(files)) if not finished(out / name, options)]
    with progress(len(mine), 0, "import", enabled=rt.is_main) as bar:
        for name in mine:
            (data,), label = upstream.read_item(sources[name], "image")
            if data.shape != prep.shape or label != files[name]:
                raise UserError(f"{sources[name]} has shape {data.shape} and label {label}; expected {prep.shape} and "
                                f"{files[name]}")  # fmt: skip
            sampling.save_volume(out / name, data, label, affine, options.npz)
            bar.update()
    rt.barrier()
    rt.print(f"{len(files)} volumes in {out} ({len(mine)} new on this rank), values in {record['units']}")
    return files


def finished(path: Path, options: Options) -> bool:
    """Whether a volume and, with --npz, its array are there."""
    from neuroldm3d.diffusion.sampling import array_path

    return path.is_file() and (not options.npz or array_path(path).is_file())


def file_name(label: int, number: int) -> str:
    """Path of a volume below OUT."""
    from neuroldm3d.dataset import CLASSES

    return f"{CLASSES[label]}/{CLASSES[label]}_{number:05d}.nii.gz"


if __name__ == "__main__":
    cli.run(main)
