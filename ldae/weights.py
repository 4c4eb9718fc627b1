"""Weights for other programs: a safetensors file, and beside it a JSON file that says what they are. No pickle.

NAME.safetensors holds the tensors of one network, NAME.json its kind, constructor arguments ("config"), preparation,
the hash of the weights and whatever else belongs to them; the same entries as in our checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from common import checkpoint, training
from common.checkpoint import replacing
from common.cli import UserError
from common.runlog import write_json

SUFFIX = ".safetensors"


def save(path: Path, state: dict[str, torch.Tensor], about: dict) -> None:
    """Write `state` to `path` (.safetensors) and `about`, with the weights' hash, to the JSON file beside it.

    Of a tensor with two names the second is left out: nothing is stored twice.
    """
    from safetensors.torch import save as to_bytes

    first = {}
    for name, tensor in state.items():
        first.setdefault((tensor.data_ptr(), tensor.shape), name)
    state = {name: state[name].detach().cpu().contiguous() for name in first.values()}
    about = about | {"hash": checkpoint.weights_hash(state)}
    with replacing(path) as file:
        file.write(to_bytes(state))
    write_json(path.with_suffix(".json"), about)


def load(path: Path) -> dict:
    """Entries of the JSON file and the tensors as "state_dict"; UserError if missing, damaged or not a pair."""
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    about = path.with_suffix(".json")
    if not path.is_file() or not about.is_file():
        raise UserError(f"no {path if about.is_file() else about}; weights of this kind are a pair of files, made by "
                        "`python ldae/scripts/save_model_weights.py`")  # fmt: skip
    try:
        state, content = from_bytes(path.read_bytes()), json.loads(about.read_text())
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} or {about.name} is damaged ({error}); write them again") from error
    if not isinstance(content, dict) or content.get("hash") != checkpoint.weights_hash(state):
        raise UserError(f"{about} is not of {path.name} (another hash); write both again")
    return content | {"state_dict": state}


def read_network(path: Path, kind: str, command: str, option: str, trust_pickle: bool) -> dict:
    """`training.read_network` that takes these pairs of files too."""
    path = Path(path)
    if path.suffix != SUFFIX:
        return training.read_network(path, kind, command, option, trust_pickle)
    saved = load(path)
    if saved.get("network") != kind:
        found, wanted = (str(name).partition(" ")[2] for name in (saved.get("network"), kind))
        raise UserError(f"{path} holds {found or 'another network'}, not {wanted}; name one with {option}")
    return saved
