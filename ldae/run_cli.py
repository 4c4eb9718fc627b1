"""LDAE: latent diffusion autoencoder of 3D brain MRI. Train, measure and use one stage, named in a YAML file.

Lozupone et al., arXiv 2504.08635 (2025); Medical Image Analysis (2026). In order, on a phantom that needs no data:

    python ldae/make_phantom.py --shape 24 32 24
    python ldae/run_cli.py fit --config ldae/config/aekl.yaml --preset tiny             # stage 1: autoencoder
    python ldae/scripts/save_compressed_latent.py                                       # latents, encoded once
    python ldae/run_cli.py fit --config ldae/config/ldae_pretrain.yaml --preset tiny    # stage 2: prior over latents
    python ldae/run_cli.py fit --config ldae/config/ldae_repr_learn.yaml --preset tiny  # stage 3: semantic codes
    python ldae/run_cli.py test --config ldae/config/ldae_repr_learn.yaml --preset tiny

    fit        train to RUN/checkpoints/best.ckpt; the same command continues a run
    validate   the measures of the validation subjects, to RUN/validate.json
    test       the same of the test subjects, to RUN/test.json
    predict    reconstructions or samples as NIfTI, or a table of probabilities or ages, to RUN/predict

`run_cli.py VERB --config FILE --help` lists the options of that file's stage. Options come after, in any form:
--lr 1e-4, --training.lr 1e-4, --training.lr=1e-4. They win over a --preset given here, that over the file, the file
over the defaults. The verb may also follow --config FILE, and `--config aekl` means ldae/config/aekl.yaml.
At the paper's size the three stages take days to weeks on GPUs; the tiny preset takes minutes on a CPU.
"""

import importlib
import json
import sys
import tempfile
import textwrap
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

from common import cli
from ldae.config import CONFIGS, PRESETS, SECTIONS, check_section, find_file, read_file

VERBS = {"fit": "train", "validate": "validate", "test": "test", "predict": "predict"}  # and the functions behind them
MODULES = {
    "aekl": "ldae.aekl",
    "ldae_pretrain": "ldae.prior",
    "ldae_repr_learn": "ldae.representation",
    "classification": "ldae.supervised",
    "regression": "ldae.supervised",
}
FLAGS = {f.name for config in CONFIGS.values() for f in fields(config) if f.type in (bool, "bool")}


def main() -> None:
    verb, config = parse(sys.argv[1:])

    # torch is imported only now, so that --help and a mistyped flag answer at once
    from common import runtime

    stage = importlib.import_module(MODULES[config.stage])
    with runtime.start(config.device, config.precision, config.seed) as rt:
        getattr(stage, "dry_run" if config.dry_run else VERBS[verb])(config, rt)


def parse(argv: list[str]):
    """(verb, options of the stage) of a command line; --help and mistakes leave the program."""
    verb, file, words = split_command(argv)
    if file is None:
        if {"-h", "--help"} & set(words) or not argv:
            print(overview())
            sys.exit(0)
        raise cli.UserError("name a stage with --config, such as --config ldae/config/aekl.yaml (--help says more)")
    path = find_file(file)
    stage, values = read_file(path)
    if verb is None and not {"-h", "--help"} & set(words):
        raise cli.UserError(f"say what to do: one of {', '.join(VERBS)} (--help says more)")
    words = [without_section(word, stage) for word in words]
    # A preset that is asked for here is newer than the file; one that the file names is only its starting point.
    values = {name: value for name, value in values.items() if name not in PRESETS[stage].get(asked_preset(words), {})}
    about = f"{verb or '|'.join(VERBS)} · {stage} ({path.name}): {CONFIGS[stage].__doc__}\n\n{__doc__}"
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "config.json"
        plain.write_text(json.dumps(values))
        words = ["--config", str(plain), *words]
        return verb, cli.parse(CONFIGS[stage], words, description=about, presets=PRESETS[stage])


def overview() -> str:
    """What --help says before a stage is named: all options by name, section by section."""
    usage = f"usage: run_cli.py {{{','.join(VERBS)}}} --config FILE [--help] [--option value ...]"
    lines = [usage, "", __doc__.strip()]
    named = {f.name: f.metadata["group"] for config in CONFIGS.values() for f in fields(config)}
    for section in SECTIONS:
        names = " ".join(f"--{name}" for name, group in named.items() if group == section)
        lines += ["", textwrap.fill(f"{section}: {names}", 100, subsequent_indent="  ", break_on_hyphens=False)]
    return "\n".join(lines)


def split_command(argv: list[str]) -> tuple[str | None, str | None, list[str]]:
    """(verb, --config file, other words); a verb's name that is the value of an option stays with that option."""
    verb, file, rest = None, None, []
    words, before = iter(argv), ""
    for word in words:
        name, equals, value = word.partition("=")
        is_value = before.startswith("--") and "=" not in before and flag_name(before) not in FLAGS
        if name == "--config":
            file, before = value if equals else next(words, None), ""
        elif word in VERBS and verb is None and not is_value:
            verb, before = word, ""
        else:
            rest.append(word)
            before = word
    return verb, file, rest


def flag_name(word: str) -> str:
    """`overwrite` of --overwrite, --paths.overwrite and --no_overwrite."""
    return word[2:].replace("-", "_").split(".")[-1].removeprefix("no_")


def without_section(word: str, stage: str) -> str:
    """`--section.key=value` as `--key=value`; UserError if the stage has no such option in that section."""
    name, equals, value = word.partition("=")
    if not name.startswith("--") or "." not in name:
        return word
    section, _, key = name[2:].replace("-", "_").partition(".")
    check_section(f"{name}: ", section, flag_name(name) if flag_name(name) in FLAGS else key, stage)
    return f"--{key}{equals}{value}"


def asked_preset(words: list[str]) -> str:
    """The last --preset among these words, or "paper"."""
    asked = "paper"
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--preset":
            asked = value if equals else "".join(words[i + 1 : i + 2])
    return asked


if __name__ == "__main__":
    cli.run(main)
