"""Export the networks of a checkpoint as bare weights: safetensors with a JSON file each, or .pth under the original's
key names.

    python ldae/scripts/save_model_weights.py --config ldae/config/aekl.yaml --output_folder models
    python ldae/scripts/save_model_weights.py --ckpt best.ckpt --format pth --names original

Here --config is the YAML of a stage; without --ckpt its best.ckpt is exported. Stage 1 gives autoencoderkl; stage 2
prior; stage 3 autoencoderkl, encoder and decoder (averaged weights); the baselines classifier or regressor. The
original's programs read `--format pth --names original`; --ae_model_path, --init and --aekl here read all. Seconds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parents[1]
KINDS = {  # of network files, and the stage whose run writes them
    "ldae aekl": "aekl",
    "ldae prior": "ldae_pretrain",
    "ldae representation": "ldae_repr_learn",
    "ldae classification": "classification",
    "ldae regression": "regression",
}


@dataclass
class Options(CommonOptions):
    stage_file: str = option("", "YAML of the stage to export; --config means the same here, as in the original")
    ckpt: str = option("", "checkpoint; empty: ROOT/runs/<stage of --config>/checkpoints/best.ckpt")
    root: str = option(str(HERE), "study folder that default paths hang off")
    output_folder: str = option("", "folder of the exported files; empty: ROOT/models")
    format: str = option("safetensors", "kind of file", choices=("safetensors", "pth"))
    names: str = option("ours", "names of the tensors", choices=("ours", "original"))
    overwrite: bool = option(False, "replace files that exist")

    def __post_init__(self):
        self.output_folder = self.output_folder or str(Path(self.root) / "models")


def main() -> None:
    options = cli.parse(Options, configured(sys.argv[1:]), description=__doc__)
    export(options)


def configured(argv: list[str]) -> list[str]:
    """The command line with `--config FILE` as `--stage_file FILE`: it names a stage here, not options."""
    named = {word: "--stage_file" + word.removeprefix("--config") for word in argv if word.split("=")[0] == "--config"}
    return [named.get(word, word) for word in argv]


def export(options: Options) -> list[Path]:
    """Write every network of the checkpoint; returns the files."""
    from common import checkpoint
    from ldae import weights

    path = checkpoint_path(options)
    saved = checkpoint.load(path)
    if saved.get("network") not in KINDS or "state_dict" not in saved:
        raise UserError(f"{path} is no best.ckpt of a stage; its kind is {saved.get('network', 'unknown')}")
    check_stage(options, saved["network"], path)
    folder, written = Path(options.output_folder), {}
    for name, (model, about) in networks(saved, path).items():
        written[folder / f"{name}{weights.SUFFIX if options.format == 'safetensors' else '.pth'}"] = model, about
    for file in (f for target in written for f in (target, about_path(target))):
        if file.exists() and not options.overwrite:
            raise UserError(f"{file} exists: add --overwrite, or name another --output_folder")
    for file, (model, about) in written.items():
        write(file, model, about | {"names": options.names}, options)
        print(f"{file}: {sum(p.numel() for p in model.parameters()):,} parameters")
        if options.names == "original":
            for difference in differences(about["config"]):
                print(f"warning: {file} {difference}")
    return list(written)


def differences(config: dict) -> list[str]:
    """What the original's programs would not know of a prior or decoder of these constructor arguments."""
    found = []
    if config.get("isotropic"):
        found.append("pools all three axes, the original's U-Net two: its programs would load it and compute something "
                     "else; train with --no_isotropic for them")  # fmt: skip
    if "base_channels" in config and config.get("norm_groups", 32) != 32:
        found.append(f"has {config['norm_groups']} groups in its norms, the original 32: its programs would load it "
                     "and compute something else")  # fmt: skip
    if config.get("image_size"):
        found.append("has an estimator with a linear image, which the original's programs refuse to load; train with "
                     "--no_linear_image for them")  # fmt: skip
    return found


def checkpoint_path(options: Options) -> Path:
    from ldae.config import find_file, read_file

    if options.ckpt:
        return Path(options.ckpt)
    if not options.stage_file:
        raise UserError("nothing to export: give --ckpt, or --config with the YAML of a stage")
    stage, values = read_file(find_file(options.stage_file))
    run = values.get("run") or str(Path(options.root) / "runs" / stage)
    return Path(run) / "checkpoints" / "best.ckpt"


def check_stage(options: Options, kind: str, path: Path) -> None:
    """UserError if --config names another stage than the checkpoint is of."""
    from ldae.config import find_file, read_file

    stage = read_file(find_file(options.stage_file))[0] if options.stage_file else KINDS[kind]
    if stage != KINDS[kind]:
        raise UserError(f"{path} is of stage {KINDS[kind]}, {options.stage_file} of {stage}: give a matching pair")


def networks(saved: dict, path: Path) -> dict:
    """{file name: (network, what is known about it)} of a network file."""
    import torch

    from common import checkpoint, runtime
    from ldae import model, supervised
    from ldae.autoencoder import AutoencoderKL
    from ldae.encoder import SemanticEncoder
    from ldae.unet import UNet

    known = {key: value for key, value in saved.items() if key not in ("network", "state_dict", "config", "hash")}
    kind, settings = saved["network"], saved["config"]
    if kind == "ldae representation":
        ldae = model.load_ldae(path, runtime.Runtime(torch.device("cpu")))
        decoder = settings["unet"] | {"code_dim": ldae.code_dim} | settings.get("estimator", {})
        parts = {
            "autoencoderkl": (ldae.aekl, "ldae aekl", settings["aekl"]),
            "encoder": (ldae.encoder, "ldae encoder", settings["encoder"]),
            "decoder": (ldae.decoder, "ldae decoder", decoder),
        }
    else:
        if kind == "ldae aekl":
            name, network = "autoencoderkl", AutoencoderKL(**settings)
        elif kind == "ldae prior":
            name, network = "prior", UNet(**settings)
        else:
            target = supervised.TARGETS[KINDS[kind]](**saved["target"])
            name = "classifier" if kind == "ldae classification" else "regressor"
            network = supervised.with_head(SemanticEncoder(**settings), target)
        checkpoint.load_weights(network, saved["state_dict"], path)
        parts = {name: (network, kind, settings)}
    source = {"source": path.name, "source_hash": saved["hash"]}
    return {name: (network, {"network": kind, "config": settings} | source | known)
            for name, (network, kind, settings) in parts.items()}  # fmt: skip


def write(file: Path, model, about: dict, options: Options) -> None:
    from common import checkpoint
    from common.runlog import write_json
    from ldae import upstream, weights

    state = upstream.to_upstream(model) if options.names == "original" else model.state_dict()
    if options.format == "safetensors":
        weights.save(file, state, about)
    else:
        checkpoint.save(file, dict(state))
        write_json(about_path(file), about | {"hash": checkpoint.weights_hash(state)})


def about_path(file: Path) -> Path:
    """The JSON file beside NAME.safetensors or NAME.pth."""
    return file.with_suffix(".json") if file.suffix == ".safetensors" else file.with_name(f"{file.name}.json")


if __name__ == "__main__":
    cli.run(main)
