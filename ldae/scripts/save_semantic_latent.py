"""Semantic code of every scan of the table, with its split, and the same of the controls of a probe.

    python ldae/scripts/save_semantic_latent.py --with_controls       # what train_manipulation.py reads
    python ldae/scripts/save_semantic_latent.py --control untrained   # one control alone
    python ldae/scripts/save_semantic_latent.py --import_train TRAIN.pt --import_test TEST.pt   # of the original

Writes codes.npz, codes.csv and codes.json to ROOT/codes (controls: ROOT/codes/controls/<name>); row order is that of
the table. All splits are exported. Codes of the same network are kept, those of another are refused. A scan takes a
second on a GPU at 128x160x128, most of a minute on a CPU. Under torchrun the scans are shared out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parents[1]
CONTROLS = ("untrained", "pooled_latents", "intensity_pca")
FROM_YAML = ("csv_path", "split", "cache")  # what --config_path gives, if the command line does not


@dataclass
class Options(CommonOptions):
    precision: str = option("fp32", "arithmetic of the encoder: each scan is encoded once, so exactly",
                            choices=("auto", "fp32", "bf16", "fp16"))  # fmt: skip
    root: str = option(str(HERE), "study folder that default paths hang off", group="paths")
    csv_path: str = option("", "table of the scans; empty: ROOT/data/dataset.csv", group="paths")
    model_path: str = option("", "network of stage 3; empty: ROOT/runs/ldae_repr_learn/checkpoints/best.ckpt",
                             group="paths")  # fmt: skip
    config_path: str = option("", "YAML of stage 3, only for its paths of table, split and cache: the network's file "
                                  "says how it is built", group="paths")  # fmt: skip
    output_dir: str = option("", "folder of the codes; empty: ROOT/codes, with --suffix ROOT/codes_<suffix>",
                             group="paths")  # fmt: skip
    suffix: str = option("", "added to the folder's name", group="paths")
    split: str = option("", "split of the subjects; empty: ROOT/split.json", group="paths")
    cache: str = option("", "LMDB cache of prepared volumes; empty: ROOT/data/cache; 'none': no cache", group="paths")
    trust_pickle: bool = option(False, "allow files that need pickle; it can run code", group="paths")
    overwrite: bool = option(False, "replace codes of another network", group="paths")
    model_name: str = option("", "name of the model in codes.json; empty: that of its run folder", group="what")
    target_model: str = option("ema_encoder", "averaged weights, or the optimizer's own of last.ckpt beside the model",
                               choices=("ema_encoder", "encoder"), group="what")  # fmt: skip
    control: tuple[str, ...] = option((), "export these controls instead of the codes", choices=CONTROLS, group="what")
    with_controls: bool = option(False, "export the codes and all controls", group="what")
    backbone_weights: str = option("", "ImageNet weights for the control 'untrained': the backbone alone is pretrained",
                                   group="what")  # fmt: skip
    components: int = option(64, "principal components of the control intensity_pca, at most", group="what")
    import_train: str = option("", "embedding file of the original, training subjects", group="import")
    import_test: str = option("", "embedding file of the original, test subjects", group="import")
    classes: tuple[str, ...] = option(("AD", "CN", "MCI"), "diagnoses behind labels of imported files", group="import")

    def __post_init__(self):
        if self.config_path:
            from ldae.config import find_file, read_file

            values = read_file(find_file(self.config_path))[1]
            for name in FROM_YAML:
                setattr(self, name, getattr(self, name) or str(values.get(name) or ""))
        if self.components < 1:
            raise UserError(f"--components {self.components}: at least 1")
        root = Path(self.root)
        self.csv_path = self.csv_path or str(root / "data" / "dataset.csv")
        self.model_path = self.model_path or str(root / "runs" / "ldae_repr_learn" / "checkpoints" / "best.ckpt")
        self.split = self.split or str(root / "split.json")
        self.cache = self.cache or str(root / "data" / "cache")
        raw = "_encoder" if self.target_model == "encoder" else ""
        name = f"codes{raw}_{self.suffix}" if self.suffix else f"codes{raw}"
        self.output_dir = self.output_dir or str(root / name)


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    from common import runtime

    with runtime.start(options.device, options.precision, options.seed) as rt:
        if options.import_train or options.import_test:
            import_codes(options, rt)
        else:
            save_codes(options, rt)


def save_codes(options: Options, rt) -> dict:
    """Write the asked codes; returns {name: codes}. Finished ones are kept."""
    from ldae import codes, data_split, dataset, model

    # ---- setup: everything the user can get wrong, before anything is written
    path = Path(options.model_path)
    ldae = model.load_ldae(path, rt, options.trust_pickle, option="--model_path")
    rows = dataset.read_table(options.csv_path)
    if not Path(options.split).is_file():
        raise UserError(f"no split {options.split}; name the model's own with --split, or make one with "
                        "`python ldae/data_split.py`")  # fmt: skip
    split = data_split.read(options.split)
    if ldae.split_hash not in (None, split.hash):
        raise UserError(f"{options.split} is split {split.hash}, the model was trained with {ldae.split_hash}; name "
                        "that split with --split")  # fmt: skip
    for row in rows:
        split.of(row.subject)
    volumes = dataset.Volumes(ldae.preparation, None if options.cache == "none" else options.cache)
    makers = {name: make(name, options, ldae, volumes, split) for name in asked(options)}

    # ---- loop over what is asked
    about = {"model_name": options.model_name or run_name(path), "table": Path(options.csv_path).name}
    about |= {"precision": options.precision}
    found = {}
    for name, maker in makers.items():
        folder = Path(options.output_dir)
        folder = folder if name == options.target_model else folder / "controls" / name
        found[name] = codes.export(folder, rows, split, maker, rt, overwrite=options.overwrite, **about)
        rt.print(f"{len(found[name])} codes of {found[name].code_dim} numbers in {folder}, hash {found[name].hash}")
    return found


def asked(options: Options) -> list[str]:
    """What is exported: the encoder's codes, controls, or both."""
    if options.with_controls:
        return [options.target_model, *CONTROLS]
    return list(dict.fromkeys(options.control)) or [options.target_model]


def make(name: str, options: Options, ldae, volumes, split):
    """The maker of one kind of codes; UserError for what it needs and is not there."""
    from ldae import codes

    if name == "untrained":
        return codes.untrained_maker(ldae, volumes, options.seed, options.backbone_weights)
    if name == "pooled_latents":
        return codes.pooled_maker(ldae, volumes)
    if name == "intensity_pca":
        return codes.pca_maker(ldae, volumes, split.hash, options.components)
    if name == "encoder":
        return codes.raw_maker(ldae, volumes, Path(options.model_path).with_name("last.ckpt"))
    return codes.semantic_maker(ldae, volumes)


def run_name(path: Path) -> str:
    """RUN of RUN/checkpoints/best.ckpt, else the file's stem."""
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.stem


def import_codes(options: Options, rt):
    """The original's embedding files as a folder of codes."""
    from ldae import codes

    files = {"train": options.import_train, "test": options.import_test}
    files = {split: Path(file) for split, file in files.items() if file}
    folder = Path(options.output_dir)
    if codes.record_path(folder).exists() and not options.overwrite:
        raise UserError(f"{folder} holds codes already: add --overwrite or name another --output_dir")
    found = codes.import_embeddings(files, options.classes, trust_pickle=options.trust_pickle)
    if rt.is_main:
        codes.save(folder, found)
    rt.print(f"{len(found)} codes of {found.code_dim} numbers imported to {folder}")
    return found


if __name__ == "__main__":
    cli.run(main)
