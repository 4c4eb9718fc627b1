"""Volumes decoded from the VAE's prior, latents ~ N(0, 1): what the VAE makes without a diffusion model.

    python neuroldm3d/VAE/generate_synthetic_samples.py              # 481 volumes each way
    python neuroldm3d/VAE/generate_synthetic_samples.py --n_samples 8 --scale scaled

--scale unscaled decodes N(0, 1) itself, as the original does; scaled gives it the mean and SD of the training latents
first. A baseline: diffusion samples must look better. Writes ROOT/vae_prior/<scale>/synthetic_sample_<number>.nii.gz in
grey-matter fraction on the training grid, and synthetic.json.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parents[1]
SCALES = ("unscaled", "scaled")


@dataclass
class Options(CommonOptions):
    root: str = option(str(HERE), "folder that holds runs/, latent_data/ and vae_prior/")
    vae: str = option("", "VAE; empty: ROOT/runs/vae/best_vae.pth (the original's files load too)")
    latents: str = option("", "latents with their statistics and affine; empty: ROOT/latent_data")
    out: str = option("", "output folder; empty: ROOT/vae_prior")
    n_samples: int = option(481, "volumes per scale", unit="volumes")
    scale: tuple[str, ...] = option(SCALES, "latents N(0, 1) as they are, or with the training latents' mean and SD",
                                    choices=SCALES)  # fmt: skip
    clip: bool = option(True, "raise negative grey-matter fractions to 0")
    trust_pickle: bool = option(False, "allow a VAE file that needs pickle; it can run code")
    overwrite: bool = option(False, "replace volumes made with other settings")

    def __post_init__(self):
        if self.n_samples < 1:
            raise UserError(f"--n_samples {self.n_samples}: give at least 1")
        root = Path(self.root)
        self.vae = self.vae or str(root / "runs" / "vae" / "best_vae.pth")
        self.latents = self.latents or str(root / "latent_data")
        self.out = self.out or str(root / "vae_prior")


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    from common import runtime

    with runtime.start(options.device, options.precision, options.seed) as rt:
        generate(options, rt)


def generate(options: Options, rt) -> None:
    """Write the volumes and OUT/synthetic.json; finished volumes are kept. Each rank takes its share."""
    import torch

    from common import runtime
    from common.runlog import progress
    from neuroldm3d import preprocess
    from neuroldm3d.diffusion import sampling
    from neuroldm3d.VAE import latents

    # ---- setup
    out = Path(options.out)
    vae = latents.load_vae(Path(options.vae), rt, trust_pickle=options.trust_pickle)
    record = latents.read_record(Path(options.latents))
    latents.check_maker(record, vae)
    stats = {scale: latents.statistics(Path(options.latents), record, how)
             for scale, how in (("unscaled", "none"), ("scaled", "channel"))}  # fmt: skip
    pairs = [(scale, number) for scale in options.scale for number in range(options.n_samples)]
    names = {f"{scale}/synthetic_sample_{number:04d}.nii.gz": (scale, number) for scale, number in pairs}
    settings = {"network": "neuroldm3d vae", "vae": vae.hash, "seed": options.seed, "clip": options.clip,
                "precision": options.precision, "units": preprocess.units(vae.preparation),
                "preparation": vae.preparation.to_dict(), "affine": record["affine"]}  # fmt: skip
    sampling.claim_folder(out, settings | {"files": dict.fromkeys(names)}, options.overwrite, rt)

    # ---- loop over volumes
    mine = [name for name in rt.shard(list(names)) if not (out / name).is_file()]
    with progress(len(mine), 0, "decode", enabled=rt.is_main) as bar:
        for name in mine:
            scale, number = names[name]
            z = torch.randn(1, *vae.latent_shape, generator=runtime.generator(options.seed, "vae prior", number))
            x = latents.decode(vae.model, latents.denormalise(z, stats[scale]), rt)[0]
            data = sampling.to_units(x, vae.preparation, options.clip)
            sampling.save_volume(out / name, data, None, record["affine"])
            bar.update()
    rt.barrier()
    rt.print(f"{len(names)} volumes of the VAE's prior in {out}, values in {settings['units']}")


if __name__ == "__main__":
    cli.run(main)
