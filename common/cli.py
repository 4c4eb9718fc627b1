"""Command line from a dataclass: one field is one option. Imports no torch, so that `--help` is fast."""

import argparse
import difflib
import errno
import json
import math
import os
import sys
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


class UserError(Exception):
    """What the user caused and can mend; the message says what, where and what to do."""


def option(default, help, *, group="general", choices=None, unit="", free=False):
    """One option as a dataclass field; `free` marks what may change when a run is resumed."""
    meta = {"help": help, "group": group, "choices": choices, "unit": unit, "free": free}
    return field(default=default, metadata=meta)


@dataclass
class CommonOptions:
    device: str = option("auto", "device: auto, cpu, cuda, cuda:N or mps", free=True)
    precision: str = option("auto", "arithmetic of the networks; auto is bf16 where CUDA supports it, else fp32",
                            choices=("auto", "fp32", "bf16", "fp16"))
    seed: int = option(0, "seed of everything random")
    num_workers: int = option(2, "data loading processes; the result does not depend on it", free=True)


@dataclass
class TrainOptions(CommonOptions):
    preset: str = option("paper", "named set of option values, applied before the other options")
    max_steps: int = option(0, "stop after this many steps, 0 for no limit", unit="steps", free=True)
    dry_run: bool = option(False, "print configuration, parameter counts and shapes, touch nothing", free=True)
    restart: bool = option(False, "begin anew instead of resuming", free=True)
    compile: bool = option(False, "compile the networks with torch.compile")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse(config_class, argv=None, *, description, presets=None):
    """An instance of the dataclass `config_class` from the command line `argv` (default `sys.argv[1:]`).

    Precedence: defaults < preset < --config FILE.json < --set key=value < options. `presets` maps a name to option
    values. Anything wrong prints one line `error: ...` and leaves with exit status 2.
    """
    try:
        return _parse(config_class, sys.argv[1:] if argv is None else list(argv), description, presets or {})
    except UserError as error:
        fail(error)


def _parse(config_class, argv, description, presets):
    hints = typing.get_type_hints(config_class)
    specs = {f.name: dict(f.metadata, default=f.default, hint=hints[f.name]) for f in fields(config_class)}
    if "preset" in specs:
        specs["preset"]["choices"] = tuple(presets) or (specs["preset"]["default"],)

    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="JSON file of option values, such as a run's config.json")
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[],
                        help="option values by name; an option given by itself wins")
    groups = {}
    for name, spec in specs.items():
        if spec["group"] not in groups:
            groups[spec["group"]] = parser.add_argument_group(spec["group"])
        _add_argument(groups[spec["group"]], name, spec)

    known = {s for action in parser._actions for s in action.option_strings}
    argv = [_underscores(word, known) for word in argv]
    given, rest = parser.parse_known_args(argv)
    if rest:
        unknown = next((word for word in rest if word.startswith("-")), rest[0])
        raise UserError(f"unknown argument {unknown}{_suggest(unknown.partition('=')[0].strip('-'), specs, '--')}")
    given = vars(given)
    layers = [("--config", _read_config(given.pop("config"))), ("--set", dict(map(_split_pair, given.pop("set")))),
              ("", given)]
    if "preset" in specs:
        chosen = [values["preset"] for _, values in layers if "preset" in values] or [specs["preset"]["default"]]
        preset = _convert("--preset", specs["preset"], chosen[-1], text=True)
        layers.insert(0, (f"preset {preset}", presets.get(preset, {})))

    values = {}
    for source, layer in layers:
        for name, value in layer.items():
            if name not in specs:
                raise UserError(f"{source}: unknown option {name}{_suggest(name, specs)}")
            where = f"{source}: {name}" if source else f"--{name}"
            values[name] = _convert(where, specs[name], value, text=source in ("", "--set"))
    if values.get("num_workers", 0) < 0:  # here, as the papers' classes have their own __post_init__
        raise UserError(f"--num_workers {values['num_workers']}: 0 loads in this process, more in as many others")
    return config_class(**values)


def _add_argument(group, name, spec):
    default = spec["default"]
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else "none" if default is None else default
    text = spec["help"] + (f" [{spec['unit']}]" if spec["unit"] else "") + f" (default: {shown})"
    text = text.replace("%", "%%")
    kind, _ = _unwrap(spec["hint"])
    if kind is bool:  # the opposite exists too, because a preset may turn the option on
        group.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=text)
        group.add_argument(f"--no_{name}", dest=name, action="store_false", default=argparse.SUPPRESS,
                           help=f"turn --{name} off" if default else argparse.SUPPRESS)
        return
    is_tuple = typing.get_origin(kind) is tuple
    item = typing.get_args(kind)[0] if is_tuple else kind
    metavar = "{" + ",".join(map(str, spec["choices"])) + "}" if spec["choices"] else item.__name__.upper()
    nargs = "+" if is_tuple else None
    group.add_argument(f"--{name}", nargs=nargs, metavar=metavar, default=argparse.SUPPRESS, help=text)


def _unwrap(hint):
    """`X | None` -> (X, True), otherwise (hint, False)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None)), True
    return hint, False


def _convert(where, spec, value, text):
    """`value` as the option's type; `text` says that it comes from the command line rather than from JSON."""
    kind, optional = _unwrap(spec["hint"])
    choices = spec["choices"]
    if optional and (value is None or (text and value == "none" and "none" not in (choices or ()))):
        return None
    if typing.get_origin(kind) is tuple:
        value = value.replace(",", " ").split() if isinstance(value, str) and text else value
        items = typing.get_args(kind)
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list of {items[0].__name__}, got {value!r}")
        if items[-1] is not Ellipsis and len(value) != len(items):
            raise UserError(f"{where}: expected {len(items)} values, got {len(value)}")
        value = tuple(_scalar(where, items[0] if items[-1] is Ellipsis else items[i], v, text)
                      for i, v in enumerate(value))
    else:
        value = _scalar(where, kind, value, text)
    for item in value if isinstance(value, tuple) else (value,):
        if choices and item not in choices:
            raise UserError(f"{where}: {item!r} is not one of {', '.join(map(str, choices))}{_suggest(item, choices)}")
    return value


def _scalar(where, kind, value, text):
    if kind is bool and text and isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
    try:
        if kind in (int, float) and text:
            value = kind(value)
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif kind is Path and isinstance(value, (str, Path)):
            value = Path(value).expanduser()
    except (ValueError, OverflowError):
        pass
    wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
    if wrong or (kind is float and math.isnan(value)):
        raise UserError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _underscores(word, known):
    """`--na-me=x-y` as `--na_me=x-y` where that is an option."""
    name, equals, value = word.partition("=")
    plain = "--" + name[2:].replace("-", "_")
    return plain + equals + value if name.startswith("--") and plain in known else word


def _suggest(word, known, prefix=""):
    close = difflib.get_close_matches(str(word).replace("-", "_"), list(map(str, known)), n=1)
    return f", did you mean {prefix}{close[0]}?" if close else ""


def _split_pair(pair):
    key, equals, value = pair.partition("=")
    if not equals:
        raise UserError(f"--set: expected KEY=VALUE, got {pair!r}")
    return key.replace("-", "_"), value


def _read_config(path):
    if path is None:
        return {}
    try:
        values = json.loads(Path(path).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--config: cannot read {path} as JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"--config: {path} must hold one JSON object of option values")
    return values


def to_dict(config):
    """All options as plain JSON values (paths become strings, tuples lists)."""
    return json.loads(json.dumps(asdict(config), default=str))


def frozen(config, groups):
    """Plain values of the options of these `groups` that must not change when a run is resumed."""
    keep = {f.name for f in fields(config) if f.metadata["group"] in groups and not f.metadata["free"]}
    return {name: value for name, value in to_dict(config).items() if name in keep}


def run(main):
    """Call `main()`; a UserError, a full or forbidden disk end in a line `error: ...` and status 2, Ctrl-C in 130."""
    try:
        main()
    except UserError as error:
        fail(error)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            name = error.filename or "output"
            fail(f"disk full while writing {name}: free some space and run the same command again")
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise
        fail(f"{error.filename or 'a file'} cannot be used ({error.strerror}): check the path and its permissions")
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message):
    """Print `error: message` in one line on stderr (once per torchrun job) and leave with exit status 2."""
    if _first_to_fail():
        print("error: " + " ".join(line.strip() for line in str(message).splitlines()), file=sys.stderr, flush=True)
    sys.exit(2)


def _first_to_fail():
    """Of several ranks only the first to fail speaks: rank 0 as a rule, another where only its shard is bad."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return os.environ.get("RANK", "0") == "0"
    from torch.distributed import TCPStore

    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        return store.add(f"error/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except RuntimeError:
        return os.environ["RANK"] == "0"
