"""One file with everything that using a trained network needs: of a finished run, or of a checkpoint of the original.

    python lapt/export.py -r lapt/runs/lapt --out lapt.ckpt                     # then: sample.py -r lapt.ckpt
    python lapt/export.py --import_upstream last.ckpt --data lapt/data --out lapt.ckpt

A diffusion stage's file holds autoencoder, conditioner and averaged U-Net, the latent scale, the noise schedule and the
intensities, and no optimizer: it works after all runs are deleted. Files of the original hold no intensities; they are
taken from the training set of --data, and its own statistics are what the original normalised every image with. Most of
them are pickled: --trust_pickle, if you trust their source. Takes seconds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option
from lapt.config import network_file

HERE = Path(__file__).resolve().parent
SHORT = {"-r": "--resume"}
LEFT_OUT = ("raw_state_dict",)


@dataclass
class Options(CommonOptions):
    resume: str = option("", "-r: run folder or checkpoint to export")
    out: str = option("", "file to write")
    weights: str = option("average", "averaged or raw weights of conditioner and U-Net", choices=("average", "raw"))
    import_upstream: str = option("", "checkpoint of the original to turn into a file of ours, instead of a run")
    data: str = option(str(HERE / "data"), "prepared folder with the intensities of an imported network")
    normalisation: str = option(
        "quantile",
        "of an imported network: quantile of the 2D, zscore of the 3D release",
        choices=("quantile", "zscore"),
    )
    head_channels: int = option(32, "channels per attention head of an imported U-Net")
    slices: int = option(32, "slices of a volume of an imported network of the 3D release")
    threshold: float = option(0.5, "probability above which an imported guide says lesion")
    trust_pickle: bool = option(False, "allow weight files that need pickle; it can run code")
    overwrite: bool = option(False, "replace the file if it is there")

    def __post_init__(self):
        if bool(self.resume) == bool(self.import_upstream):
            raise UserError("name a run with -r, or a checkpoint of the original with --import_upstream: one of them")
        if not self.out:
            raise UserError("name the file to write with --out")
        if not 0 < self.threshold < 1:
            raise UserError(f"--threshold {self.threshold}: choose more than 0 and less than 1")


def main() -> None:
    argv = [SHORT.get(word, word) for word in sys.argv[1:]]
    options = cli.parse(Options, argv, description=__doc__)
    out = Path(options.out)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file")
    if out.exists() and not options.overwrite:
        raise UserError(f"{out} exists: name another --out, or add --overwrite")
    from common import runtime

    with runtime.start("cpu", "fp32", options.seed) as rt:
        kind, digest = import_upstream(options, out, rt) if options.import_upstream else export(options, out)
    print(f"{kind} {digest} in {out}, {out.stat().st_size / 2**20:.1f} MiB: research use only")


def export(options: Options, out: Path) -> tuple[str, str]:
    """Write the network file of a run without what only training needs; (kind, hash of the weights)."""
    from common import checkpoint
    from lapt import diffusion, segmentation, vqgan

    source = network_file(options.resume)
    if not source.is_file():
        raise UserError(f"no network at {source}: name a run with -r that has finished its first validation")
    if out.exists() and out.samefile(source):
        raise UserError(f"--out {out} is the file that is exported: name another")
    content = checkpoint.load(source, trust_pickle=options.trust_pickle)
    if content.get("network") not in (diffusion.KIND, vqgan.KIND, segmentation.KIND):
        raise UserError(f"{source} is no network file of LAPT (best.ckpt of a run is one, last.ckpt not); checkpoints "
                        "of the original are taken with --import_upstream")  # fmt: skip
    if options.weights == "raw":
        if "raw_state_dict" not in content:
            raise UserError(f"{source} holds no raw weights beside the averaged ones: leave out --weights raw")
        content["state_dict"] = content["state_dict"] | content["raw_state_dict"]
        content["hash"] = checkpoint.weights_hash(content["state_dict"])
    checkpoint.save(out, {key: value for key, value in content.items() if key not in LEFT_OUT})
    return content["network"], content["hash"]


def import_upstream(options: Options, out: Path, rt) -> tuple[str, str]:
    """Write a checkpoint of the original as a file of ours; (kind, hash of the weights)."""
    from common import training
    from lapt import diffusion, segmentation, upstream, vqgan
    from lapt.dataset import Intensity

    weights = {"average": "ema", "raw": "raw"}[options.weights]
    intensity = Intensity.of_folder(options.data, options.normalisation, "case")
    imported = upstream.import_checkpoint(
        options.import_upstream, trust_pickle=options.trust_pickle, weights=weights,
        head_channels=options.head_channels, slices=options.slices,
    )  # fmt: skip
    about = {"origin": Path(options.import_upstream).name}
    if imported.kind == "ldm":
        model = imported.latent_model(intensity, rt)
        diffusion.save_model(out, model, **about)
        return diffusion.KIND, model.hash
    kind, name = (vqgan.KIND, "autoencoder") if imported.kind == "vqgan" else (segmentation.KIND, "guide")
    if imported.kind == "guide":
        about["threshold"] = options.threshold
    state = imported.networks[name].state_dict()
    training.save_network(out, kind, state, imported.settings[name], intensity=intensity.to_dict(), **about)
    return kind, training.read_network(out, kind, "", "", False)["hash"]


if __name__ == "__main__":
    cli.run(main)
