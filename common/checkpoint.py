"""Checkpoints of tensors and plain values: safe to load, atomic to write, exact to resume from."""

import errno
import hashlib
import json
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from common.cli import UserError
from common.runtime import unwrap

RESERVED = ("step", "config", "extra", "rng")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path):
    """Binary file that takes the place of `path` once the block has ended well; otherwise the old file stays as it was.

    The data reach the disk before the rename. A full disk raises UserError and leaves no temporary file behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # fixed name: what a kill leaves is overwritten the next time
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        causes = (error, error.__cause__, error.__context__)  # torch.save may bury the cause
        if any(isinstance(e, OSError) and e.errno in DISK_FULL for e in causes):
            raise UserError(f"disk full while writing {path}: free some space, run the same command again") from error
        raise


def file_hash(path, digits=16):
    """The first `digits` of a file's SHA-256, hexadecimal, which records know it by; UserError if it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:digits]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct the path") from error


def save(path, state):
    """Write the dict `state` to `path`; raises TypeError naming the key of anything but tensors and plain values."""
    _check_plain(state, "")
    with replacing(path) as file:
        torch.save(state, file)


def _check_plain(value, where):
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int, float, bool):
                raise TypeError(f"checkpoint key {where}.{key!r} is a {type(key).__name__}")
            _check_plain(item, f"{where}.{key}".lstrip("."))
    elif kind in (list, tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif not (value is None or kind in (bool, int, float, str) or isinstance(value, torch.Tensor)):
        raise TypeError(f"checkpoint entry {where or '(top)'} is a {kind.__module__}.{kind.__name__}, "
                        "only tensors and plain values may be stored")


def load(path, *, trust_pickle=False):
    """The dict in a checkpoint, on the CPU; raises UserError if missing, damaged, or pickled and not trusted."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: train first or correct the path")
    try:
        state = torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        with open(path, "rb") as file:
            is_pickle = zipfile.is_zipfile(path) or file.read(1) == b"\x80"
        if is_pickle and isinstance(error, pickle.UnpicklingError) and not trust_pickle:
            raise UserError(f"checkpoint {path} holds pickled objects, which can run any code: "
                            "add --trust_pickle if you trust its source") from error
        raise UserError(f"checkpoint {path} is truncated, damaged or no checkpoint: "
                        "delete it or replace it by a good copy") from error
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}, expected a dict of weights")
    return state


def renamed_keys(model, children):
    """Our state-dict key -> theirs, for every entry of `model` that they have.

    children(module): {our name of a submodule or entry: their name}, "" for a level that they lack; {} keeps all names.
    """
    keys = {}

    def walk(module, ours, theirs):
        state, names = module.state_dict(), children(module)
        for name, their_name in names.items():
            if name in state:
                keys[ours + name] = theirs + their_name
            elif any(key.startswith(f"{name}.") for key in state):
                walk(module.get_submodule(name), f"{ours}{name}.", theirs + (f"{their_name}." if their_name else ""))
        if not names:
            keys.update({ours + key: theirs + key for key in state})

    walk(model, "", "")
    return keys


def load_renamed(model, state, names, known, assign=False, partial=False):
    """Load `state` under foreign names: names {our key: theirs}, `known`: all of their keys that may be there.

    Strict: UserError names missing, unexpected and differently shaped entries. assign: take over the tensors instead of
    copying them. partial: entries of ours that have no name there stay as they are.
    """
    own = model.state_dict()
    problems = [f"no {key}" for key in names.values() if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in known]
    problems += [
        f"{theirs} has shape {tuple(state[theirs].shape)}, expected {tuple(own[ours].shape)}"
        for ours, theirs in names.items()
        if theirs in state and state[theirs].shape != own[ours].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        listed = ", ".join(problems[:3]) + more
        raise UserError(f"weights do not fit {type(model).__name__}: {listed}; check the model options")
    loaded = {ours: state[theirs] for ours, theirs in names.items()}
    model.load_state_dict(own | loaded if partial else loaded, assign=assign)


def load_weights(module, state_dict, path):
    """Strict `load_state_dict` with weights read from `path`; raises UserError if they are of another model."""
    try:
        module.load_state_dict(state_dict)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"checkpoint {path} is of another model ({reason}): give one of this program") from error


def rng_state():
    """State of the generators of Python, NumPy, torch and CUDA as tensors and plain values."""
    name, key, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy_state = (name, key.tolist(), *rest)
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state):
    """Put `rng_state()` back; of CUDA as far as there are as many GPUs."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for index, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, index)


def save_training(path, *, step, objects, config, extra=None):
    """Save a training run after `step` steps: `state_dict()` of each of `objects`, RNG, plain `config` and `extra`."""
    if set(objects) & set(RESERVED):
        raise ValueError(f"names of objects must differ from {RESERVED}")
    states = {name: unwrap(item).state_dict() for name, item in objects.items()}
    save(path, {"step": step, "config": _json(config), "extra": extra or {}, "rng": rng_state(), **states})


def resume_training(path, *, objects, config):
    """(step, extra) after loading `objects` and RNG in place, or (0, {}) if there is no file yet.

    Raises UserError if the run had another `config` (naming each difference) or other objects.
    """
    if not Path(path).exists():
        return 0, {}
    state, now = load(path), _json(config)
    missing = [name for name in (*RESERVED, *objects) if name not in state]
    if missing:
        raise UserError(f"checkpoint {path} has no {', '.join(missing)}: it is of another program, use --restart")
    before = state["config"]
    changed = [f"{key}: {before.get(key, 'absent')!r} before, {now.get(key, 'absent')!r} now"
               for key in sorted({*before, *now}) if before.get(key, "absent") != now.get(key, "absent")]
    if changed:
        raise UserError(f"{path} is of a run with other options ({'; '.join(changed)}): use those, or --restart")
    for name, item in objects.items():
        try:
            unwrap(item).load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{name} in {path} is of another model ({reason}): use --restart to begin anew") from error
    set_rng_state(state["rng"])
    return state["step"], state["extra"]


def _json(config):
    return json.loads(json.dumps(config, default=str))  # one form for tuples and paths, then comparison is fair


def weights_hash(state_dict):
    """Sixteen hex digits of the SHA-256 of names, types, shapes and bytes, whatever the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
