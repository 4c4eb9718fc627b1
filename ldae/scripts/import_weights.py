"""The published LDAE, or a checkpoint of the original program, as a network file that every command here reads.

    python ldae/scripts/import_weights.py autoencoderkl.pth decoder.pth encoder.pth
    python ldae/scripts/import_weights.py last.ckpt --trust_pickle --output original.ckpt     # of its third stage

Writes ROOT/runs/ldae_repr_learn/checkpoints/best.ckpt with the original's preparation, latent scale and sampling. Every
tensor must find its place, or nothing is written. A minute and 8 GB of memory for the published sizes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parents[1]


@dataclass
class Options(CommonOptions):
    files: tuple[str, ...] = option((), "files of the original (also as the first words of the command line)")
    root: str = option(str(HERE), "study folder that default paths hang off")
    output: str = option("", "file to write; empty: ROOT/runs/ldae_repr_learn/checkpoints/best.ckpt")
    weights: str = option("ema", "which of two sets a checkpoint holds: averages or raw", choices=("ema", "raw"))
    trust_pickle: bool = option(False, "read files that need pickle; it can run code")
    overwrite: bool = option(False, "replace --output")

    def __post_init__(self):
        default = Path(self.root) / "runs" / "ldae_repr_learn" / "checkpoints" / "best.ckpt"
        self.output = self.output or str(default)


def with_names(words: list[str]) -> list[str]:
    """The command line with leading file names as --files."""
    return ["--files", *words] if words and not words[0].startswith("-") else words


def main() -> None:
    options = cli.parse(Options, with_names(sys.argv[1:]), description=__doc__)
    if not options.files:
        raise UserError("no files to import: name the original's autoencoderkl.pth, decoder.pth and encoder.pth")
    if Path(options.output).exists() and not options.overwrite:
        raise UserError(f"{options.output} exists: add --overwrite, or name another --output")
    import torch

    from common import runtime
    from ldae import model, upstream

    rt = runtime.Runtime(torch.device("cpu"))
    ldae = upstream.import_ldae(options.files, rt, trust_pickle=options.trust_pickle, weights=options.weights)
    model.save_ldae(Path(options.output), ldae, source=[Path(path).name for path in options.files])
    networks = {"autoencoder": ldae.aekl, "decoder": ldae.decoder, "encoder": ldae.encoder}
    counts = ", ".join(f"{name} {sum(p.numel() for p in net.parameters()):,}" for name, net in networks.items())
    print(f"{options.output}: parameters of {counts}")


if __name__ == "__main__":
    cli.run(main)
