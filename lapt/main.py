"""LAPT: diffusion MRI (DWI, ADC) from CT perfusion by latent diffusion with lesion-aware post-training. Train a stage.

Lee, Kim et al., MICCAI 2025 (LNCS 15961), doi 10.1007/978-3-032-04937-7_27, and its volume follow-up. In order, on a
phantom that needs no data:

    python lapt/make_phantom.py --shape 48 48 8
    python lapt/preprocessing.py
    python lapt/main.py --base lapt/configs/vqgan.yaml -t --preset tiny    # autoencoder
    python lapt/main.py --base lapt/configs/ldm.yaml -t --preset tiny      # conditional latent diffusion of slices
    python lapt/main.py --base lapt/configs/lapt.yaml -t --preset tiny     # lesion-aware post-training
    python lapt/sample.py -r lapt/runs/lapt --split test

and for volumes guide, ldm3d and lapt3d besides. A stage finds the earlier one beside it, in LOGDIR/<stage>, unless
paths.vqgan=RUN, paths.ldm=RUN, paths.ldm2d=RUN or paths.guide=RUN names another. The same command continues a run.

Options of a stage follow as a.b.c=value, merged last: training.lr=1e-4 data.augment=none model.channel_mult=[1,2].
They win over a --preset given here, that over the files of --base (merged from left to right), these over the defaults.
After training the test pass measures and, from ldm on, samples the test cases (--no-test leaves it out; without -t it
is all that is done). `main.py --base FILE --help` lists the options of that file's stage.
At the paper's size a stage takes days on GPUs; the tiny preset takes about a minute on a CPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

from common import cli
from common.cli import UserError
from lapt.config import CONFIGS, HERE, PRESETS, SECTIONS, find_file, merge, suggest

MODULES = {
    "vqgan": "lapt.vqgan",
    "guide": "lapt.segmentation",
    "ldm": "lapt.ldm",
    "lapt": "lapt.ldm",
    "ldm3d": "lapt.ldm",
    "lapt3d": "lapt.ldm",
}
PRESET_NAMES = tuple(dict.fromkeys(name for presets in PRESETS.values() for name in presets))
PASSED_ON = ("device", "precision", "num_workers", "seed", "max_steps", "logdir", "name", "project")  # to the options
FLAGS = ("dry_run", "restart", "compile", "trust_pickle", "overwrite")
SINGLE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")  # a.b.c=value


def main() -> None:
    words = sys.argv[1:]
    args, config = parse(words)
    relaunch(args, config, words)

    # torch is imported only now, so that --help and a mistyped option answer at once
    from common import runtime

    stage = importlib.import_module(MODULES[config.stage])
    with runtime.start(config.device, config.precision, config.seed) as rt:
        if config.dry_run:
            stage.dry_run(config, rt)
            return
        if args.train:
            stage.train(config, rt)
        # a training that --max_steps cut short is not what the test pass should measure
        if not args.no_test and not (args.train and config.max_steps):
            stage.test(config, rt)


def parse(words: list[str]):
    """(arguments, options of the stage) of a command line; --help and mistakes leave the program."""
    parser = build_parser()
    words, overrides = split_words(words, parser)
    args, rest = parser.parse_known_args(words)
    if rest:
        known = [s for action in parser._actions for s in action.option_strings]
        raise UserError(f"unknown argument {rest[0]}{suggest(rest[0], known)}; options of a stage are written "
                        "section.option=value")  # fmt: skip
    if args.help and not (args.base or args.resume):
        print(overview(parser))
        sys.exit(0)
    return args, stage_options(args, parser, overrides)


def build_parser() -> argparse.ArgumentParser:
    parser = cli._Parser(prog="main.py", add_help=False, allow_abbrev=False)
    add = parser.add_argument
    # fmt: off
    add("-h", "--help", action="store_true", help="with --base: all options of that file's stage")
    add("-b", "--base", nargs="+", action="extend", default=[], metavar="YAML",
        help="configuration files, merged from left to right; the name of a stage means ours (default: none)")
    add("-t", "--train", nargs="?", type=boolean, const=True, default=False, metavar="BOOL",
        help="train, or continue the run (default: false)")
    add("-r", "--resume", metavar="RUN", help="run folder, or a checkpoint in it, to continue or to test with its own "
        "options (default: none)")
    add("-n", "--name", help="name of the run (default: the stage)")
    add("-l", "--logdir", help="folder of the runs (default: lapt/runs)")
    add("-p", "--project", help="name of the study, kept in config.json; nothing is sent anywhere (default: none)")
    add("-s", "--seed", help="seed of everything random (default: 23)")
    add("--no-test", "--no_test", nargs="?", type=boolean, const=True, default=False, metavar="BOOL",
        help="leave out the test pass after training (default: false)")
    add("--gpus", default="", help="devices: 0 or 0, for one, 0,1 for several (starts torchrun), auto for all; "
        "with --device cpu as many processes (default: what --device says)")
    add("--preset", choices=PRESET_NAMES, help="named set of option values (default: paper)")
    add("--max_steps", help="stop after this many steps, 0 for no limit (default: 0)")
    add("--device", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--precision", help="auto, fp32, bf16 or fp16 (default: auto)")
    add("--num_workers", help="data loading processes; the result does not depend on it (default: 4)")
    # fmt: on
    helps = {
        "dry_run": "print options, parameter counts, shapes and memory, touch nothing",
        "restart": "begin anew instead of continuing",
        "compile": "compile the networks with torch.compile",
        "trust_pickle": "allow weight files that need pickle; it can run code",
        "overwrite": "replace results of the test pass that exist",
    }  # fmt: skip
    for name in FLAGS:
        add(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), action="store_true",
            help=f"{helps[name]} (default: false)")  # fmt: skip
    return parser


def boolean(text: str) -> bool:
    """argparse type of the original's optional booleans."""
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return known[text.lower()]


def split_words(words: list[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Words of flags, and `a.b.c=value` words wherever they stand: also right behind --base FILE or -t."""
    takes_one = {s for a in parser._actions if a.nargs is None for s in a.option_strings}
    flags, overrides = [], []
    for i, word in enumerate(words):
        is_value = i > 0 and words[i - 1] in takes_one
        (overrides if SINGLE.match(word) and not is_value else flags).append(word)
    return flags, overrides


def stage_options(args: argparse.Namespace, parser: argparse.ArgumentParser, overrides: list[str]):
    """The resolved options of the stage."""
    paths, own = [], {}
    if args.resume:
        if args.name or args.logdir:
            raise UserError("--resume names the run already: leave out --name and --logdir")
        run = run_folder(Path(args.resume))
        paths.append(run / "config.json")
        own = {"logdir": str(run.parent), "name": run.name}
    paths += [find_file(word) for word in args.base]
    if not paths:
        raise UserError("name a stage with --base, such as --base lapt/configs/vqgan.yaml, or a run with --resume "
                        "(--help says more)")  # fmt: skip
    stage, values = merge(paths, overrides)
    given = merge([], [f"stage={stage}", *overrides])[1] if overrides else {}
    if args.resume:
        values |= relocated(run, stage, {k: v for k, v in values.items() if k not in given})
    if args.preset:  # newer than the files, older than what is given by name
        chosen = PRESETS[stage].get(args.preset)
        if chosen is None:
            raise UserError(f"--preset {args.preset}: stage {stage} has {', '.join(PRESETS[stage])}")
        values = {k: v for k, v in values.items() if k in given or k not in chosen} | {"preset": args.preset}
    values |= own | {name: getattr(args, name) for name in FLAGS if getattr(args, name)}
    words = [f"--{name}={value}" for name in PASSED_ON if (value := getattr(args, name)) is not None]
    about = f"{CONFIGS[stage].__doc__}\n\n{__doc__}\n{flag_help(parser)}"
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "options.json"
        plain.write_text(json.dumps(values))
        words = ["--config", str(plain), *words, *(["--help"] if args.help else [])]
        return cli.parse(CONFIGS[stage], words, description=about, presets=PRESETS[stage])


def run_folder(path: Path) -> Path:
    """The run that --resume means: the folder itself, or the one of a checkpoint; UserError if it is none."""
    folder = path if path.is_dir() else path.parent.parent
    if not path.exists() or not (folder / "config.json").is_file():
        raise UserError(f"--resume {path}: no run folder (with config.json and checkpoints/) and no checkpoint in one")
    return folder.resolve()


def relocated(run: Path, stage: str, values: dict) -> dict:
    """Path options of a run's config.json, relative to its root there, as they are now; what is gone is left out."""
    names = {f.name for f in fields(CONFIGS[stage]) if f.metadata["group"] == "paths"} - {"logdir", "name"}
    roots, found = (run.parent.parent, HERE), {}
    for name in names & values.keys():
        value = values[name]
        if name == "root":
            found[name] = str(next((root for root in roots if (root / values.get("data", "data")).exists()), roots[0]))
        elif isinstance(value, str) and value != "none":
            places = [root / value for root in roots if value]
            found[name] = next((str(place) for place in places if place.exists()), "")
            if name == "data" and not found[name]:
                raise UserError(f"--resume {run}: its data, {value}, are not in {' or '.join(map(str, roots))}: name "
                                "them with paths.data=FOLDER")  # fmt: skip
    return found


def relaunch(args: argparse.Namespace, config, words: list[str]) -> None:
    """Start one process per device of --gpus with torchrun, in place of this one; one device needs none."""
    if "RANK" in os.environ:
        return
    devices = chosen_devices(args.gpus, config.device)
    if devices and config.device != "cpu":
        import torch

        if max(devices) >= (there := torch.cuda.device_count()):
            raise UserError(f"--gpus {args.gpus}: this machine has {there} CUDA device(s), numbered from 0; leave it "
                            "out, or add --device cpu for as many processes on the CPU")  # fmt: skip
    if len(devices) == 1 and config.device != "cpu":
        config.device = f"cuda:{devices[0]}"
    if len(devices) < 2:
        return
    if config.device != "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={len(devices)}",
               str(Path(__file__).resolve()), *words]  # fmt: skip
    print("+ torchrun " + " ".join(command[3:]), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os.execv(command[0], command)


def chosen_devices(text: str, device: str) -> list[int]:
    """Device numbers of --gpus ("0", "0,", "0,1", "auto"); none where it is not given or there is no GPU for auto."""
    if not text:
        return []
    if text == "auto":
        import torch

        return list(range(torch.cuda.device_count())) if device != "cpu" else []
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"--gpus {text}: expected device numbers such as 0 or 0,1, or auto")
    if device not in ("auto", "cuda", "cpu"):
        raise UserError(f"--gpus {text} and --device {device} contradict each other: leave one out")
    return [int(part) for part in parts]


def flag_help(parser: argparse.ArgumentParser) -> str:
    parser.usage = "main.py --base YAML [YAML ...] [-t] [flags] [section.option=value ...]"
    return parser.format_help()


def overview(parser: argparse.ArgumentParser) -> str:
    """What --help says before a stage is named: the flags, and all options by name, section by section."""
    lines = [flag_help(parser), __doc__.strip()]
    named = {f.name: f.metadata["group"] for config in CONFIGS.values() for f in fields(config)}
    for section in SECTIONS:
        names = " ".join(f"{section}.{name}" for name, group in named.items() if group == section)
        lines += ["", f"{section}: {names}"]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
