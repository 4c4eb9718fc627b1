"""Slices for training and validation: from the store, in [-1, 1], with augmentation; which subject trains where.

Subjects, not slices, are split into train, val and test: neighbouring slices and frames of one heart are nearly alike.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.cli import UserError
from common.runtime import generator
from mgdcr.geometry import centred
from mgdcr.store import Store, subject_of

PARTS = ("train", "val", "test")


# ---- split ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Disjoint subjects of train, val and test; `hash` (16 hex digits) depends on nothing else."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        content = json.dumps({part: sorted(getattr(self, part)) for part in PARTS}, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def part(self, subject: str) -> str:
        """train, val or test; UserError for a subject of none."""
        for part in PARTS:
            if subject in getattr(self, part):
                return part
        raise UserError(f"subject {subject} is in no part of the split: add it, or delete the split to make it anew")


def make_split(subjects: Sequence[str], val_size: float, test_size: float, seed: int) -> Split:
    """A random split by shares; val gets one subject at least, test too unless its share is 0 or only two are there.

    Depends on the names, the shares and the seed alone. UserError for impossible shares and fewer than two subjects.
    """
    if not 0 < val_size < 1 or not 0 <= test_size < 1 or val_size + test_size >= 1:
        raise UserError(
            f"--val_size {val_size}, --test_size {test_size}: shares above 0 (test: or 0), together below 1"
        )
    if seed < 0:
        raise UserError(f"--split_seed {seed}: seeds are 0 or more")
    names = sorted(set(subjects))
    if len(names) < 2:
        raise UserError(f"{len(names)} subject(s) cannot both train and validate: at least two are needed")
    mixed = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    n_val = min(max(1, round(val_size * len(mixed))), len(mixed) - 1)
    n_test = min(max(1, round(test_size * len(mixed))), len(mixed) - n_val - 1) if test_size else 0
    val, test, train = mixed[:n_val], mixed[n_val : n_val + n_test], mixed[n_val + n_test :]
    return Split(tuple(sorted(train)), tuple(sorted(val)), tuple(sorted(test)))


def write_split(path: str | Path, split: Split) -> None:
    from common.runlog import write_json

    write_json(Path(path), {part: list(getattr(split, part)) for part in PARTS})


def read_split(path: str | Path) -> Split:
    """A split file (JSON: lists train, val and test); UserError if unusable or a subject is listed twice."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"split cannot be read ({error}), {path}, repair it or delete it to make it anew") from error
    lists = [content.get(part, []) for part in PARTS] if isinstance(content, dict) else [None]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise UserError(f"split must be lists of subjects under train, val and test, {path}, repair it")
    twice = [name for name, n in Counter(name for names in lists for name in names).items() if n > 1]
    if twice:
        raise UserError(f"{len(twice)} subject(s) listed twice, such as {twice[0]}, {path}, keep each in one part")
    if not lists[0] or not lists[1]:
        raise UserError(f"no subjects to {'train' if not lists[0] else 'validate'}, {path}, put some into that part")
    return Split(*map(tuple, lists))


def open_store(config, rt) -> tuple[Store, Split]:
    """The store of a configuration and its split; a missing split is made by the options, and written by rank 0.

    UserError where either is unusable, or the split names subjects that the store lacks.
    """
    store = Store(config.store)
    path = Path(config.split or Path(config.store).parent / "split.json")
    if path.exists():
        split = read_split(path)
    elif hasattr(config, "val_size"):
        split = make_split(store.subjects, config.val_size, config.test_size, config.split_seed)
        if rt.is_main and not getattr(config, "dry_run", False):
            write_split(path, split)  # the other ranks have made the same one, or read this one
    else:
        raise UserError(f"no split, {path}, train first, which makes it, or name it with --split")
    missing = sorted({*split.train, *split.val, *split.test} - set(store.subjects))
    if missing:
        raise UserError(f"{len(missing)} subject(s) of the split not in {store.path}, such as {missing[0]}, {path}, "
                        "write the store with them or take them out of the split")  # fmt: skip
    return store, split


# ---- augmentation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augment:
    """Random changes of a slice in [-1, 1], as other patients and scanners would cause; each uniform in its range.

    flip: probability, of rows and of columns; rotate_deg: +-; zoom: +- of 1; shift: +- share of the side; gamma: the
    exponent lies in 1 / gamma to gamma; bias: largest relative change by a smooth field.
    """

    flip: float = 0.5
    rotate_deg: float = 15.0
    zoom: float = 0.1
    shift: float = 6 / 128
    gamma: float = 1.25
    bias: float = 0.15

    def __call__(self, x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """A changed copy of the slice (1, H, W); what comes in from outside repeats the border."""
        u = torch.rand(12, generator=rng, dtype=torch.float64).tolist()  # all of them always: the draws stay in step
        signed = [2 * v - 1 for v in u]
        flips = [axis for axis, v in ((1, u[0]), (2, u[1])) if v < self.flip]
        x = self._moved(x.flip(flips) if flips else x, signed[2:6])
        grey = ((x + 1) / 2).clamp(0, 1) ** (self.gamma ** signed[6])
        return (grey * self._bias_field(x.shape[-2:], signed[7:12])).clamp(0, 1) * 2 - 1

    def _moved(self, x: torch.Tensor, signed: list[float]) -> torch.Tensor:
        angle, zoom = math.radians(self.rotate_deg) * signed[0], 1 + self.zoom * signed[1]
        height, width = x.shape[-2:]
        c, s = math.cos(angle) / zoom, math.sin(angle) / zoom
        # affine_grid counts in half sides: the turn must be one in pixels
        theta = [
            [c, -s * height / width, 2 * self.shift * signed[2]],
            [s * width / height, c, 2 * self.shift * signed[3]],
        ]
        grid = F.affine_grid(torch.tensor([theta], dtype=x.dtype), (1, *x.shape), align_corners=False)
        return F.grid_sample(x[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]

    def _bias_field(self, size, signed: list[float]) -> torch.Tensor:
        """Factor (H, W) within 1 +- bias: a random polynomial of second order."""
        y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij")
        field = sum(weight * term for weight, term in zip(signed, (x, y, x * y, x * x - 0.5, y * y - 0.5), strict=True))
        return 1 + self.bias * field / max(sum(map(abs, signed)), 1.0)


def augmentation(name: str) -> Augment | None:
    """ "none": None, as the original code (its flags had no effect); "plausible": the ranges of `Augment`."""
    if name not in ("none", "plausible"):
        raise UserError(f"--augment {name}: choose none or plausible")
    return Augment() if name == "plausible" else None


# ---- slices ---------------------------------------------------------------------------------------------------------


class Slices(torch.utils.data.Dataset):
    """Slices (1, H, W) float32 in [-1, 1] of some subjects, padded with -1 or cut to `size` pixels about the middle.

    keys: "{subject}/{frame:03d}/{slice:03d}" in the order of the slices; subjects: the subject of each.
    """

    def __init__(self, store: Store, subjects: Sequence[str], size: int):
        self.store, self.size = store, size
        self.keys = store.keys_of(subjects)
        self.subjects = [subject_of(key) for key in self.keys]
        if not self.keys:
            raise UserError(f"no slices of {len(subjects)} subject(s) in {store.path}, check the split")

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> torch.Tensor:
        key = self.keys[number]
        pixels = self.store.scale(subject_of(key)).normalise(self.store[key])
        return torch.from_numpy(centred(pixels, (self.size, self.size), fill=-1)[0])[None]


class TrainingSlices(Slices):
    """Slices to train on: item (number, position), changed at random by (seed, position) alone."""

    def __init__(self, store: Store, subjects: Sequence[str], size: int, augment: str = "none", seed: int = 0):
        super().__init__(store, subjects, size)
        self.augment, self.seed = augmentation(augment), seed

    def __getitem__(self, item: tuple[int, int]) -> torch.Tensor:
        number, position = item
        x = super().__getitem__(number)
        return x if self.augment is None else self.augment(x, generator(self.seed, "augment", position))
