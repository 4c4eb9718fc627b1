"""Attribute editing: directions in the space of semantic codes, edits of a calibrated size, counterfactual reports.

A code y (n,) is normalised with the training codes' statistics, x = (y - mean) / std. A linear probe reads it,
score(y) = weight . x + bias: the log-odds of the class `positive`, or an age in years. An edit moves x along `path`:

    unit        an amount of 1 is
    logit       a change of the probe's log-odds by 1 (classes)
    years       a change of the predicted age by one year (age)
    sd          one standard deviation of the training codes along the path
    upstream    sqrt(n) in normalised units, as in the original code: 2.5 of these change the log-odds by hundreds

`path` is the probe's weight (the shortest way), or what goes with the target in the training codes: the difference of
the class means (probes.py writes both). Either way the probe reads the result, so doses and probabilities compare.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from common import figures
from common.checkpoint import replacing
from common.cli import UserError
from common.runlog import write_json
from ldae import preprocess, quality

UNITS = ("logit", "years", "sd", "upstream")
ARRAYS = ("mean", "std", "weight", "path", "correlation")
PARALLEL = 1e-6  # cosine of path and weight below which an edit cannot move the score
SHELL_VOXELS = 2  # around a labelled region: what its volume is told apart from
CONTRAST = 0.05  # in units of intensity: less between region and shell and no volume is measured


# ---- directions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Direction:
    """A linear probe of semantic codes with a path to edit along; tensors are float32 on the CPU."""

    mean: torch.Tensor  # (n,) of the training codes
    std: torch.Tensor  # (n,) population SD
    weight: torch.Tensor  # (n,) in normalised units
    bias: float
    positive: str  # what a larger score stands for
    negative: str
    kind: str = "binary"  # or "regression": the score is in years
    target: str = "diagnosis"
    path: torch.Tensor | None = None  # (n,) in normalised units, any length; None: the weight
    path_name: str = ""  # what the path is, if not the weight
    correlation: torch.Tensor | None = None  # (n, n) of the training codes; None: taken as uncorrelated
    codes: str | None = None  # hash of the codes the probe was fitted on
    encoder: str | None = None  # hash of what made the codes
    nuisance: tuple[str, ...] = ()  # covariates whose linear effect the probe subtracts
    nuisance_mean: tuple[float, ...] = ()
    nuisance_weight: tuple[float, ...] = ()  # score per unit of a covariate

    def __post_init__(self):
        if self.path is None:
            object.__setattr__(self, "path", self.weight)
        for name in ("mean", "std", "weight", "path"):
            if getattr(self, name).shape != (self.code_dim,):
                raise ValueError(f"{name} must be ({self.code_dim},), got {tuple(getattr(self, name).shape)}")
        if self.kind not in ("binary", "regression"):
            raise ValueError(f"kind must be binary or regression, not {self.kind!r}")

    @property
    def code_dim(self) -> int:
        return self.mean.numel()

    @property
    def unit(self) -> str:
        """The unit of the score: "logit" or "years"."""
        return "logit" if self.kind == "binary" else "years"

    @property
    def name(self) -> str:
        name = f"{self.target}_{self.positive}_vs_{self.negative}" if self.kind == "binary" else self.target
        return name + without_suffix(self.nuisance) + (f"_{self.path_name}" if self.path_name else "")

    # ---- reading

    def normalise(self, y: torch.Tensor) -> torch.Tensor:
        """Codes (B, n) to x = (y - mean) / std."""
        return (y - self.mean.to(y)) / self.std.to(y)

    def denormalise(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.std.to(x) + self.mean.to(x)

    def score(self, y: torch.Tensor, nuisance: torch.Tensor | None = None) -> torch.Tensor:
        """Log-odds of `positive`, or years, (B,) of codes (B, n).

        nuisance: values (B, k) of the covariates that the probe subtracts; None takes their training means.
        """
        score = self.normalise(y) @ self.weight.to(y) + self.bias
        if nuisance is not None and self.nuisance:
            mean, slope = (torch.tensor(v, dtype=y.dtype, device=y.device) for v in
                           (self.nuisance_mean, self.nuisance_weight))  # fmt: skip
            score = score - (nuisance.to(y) - mean) @ slope
        return score

    def logit(self, y: torch.Tensor, nuisance: torch.Tensor | None = None) -> torch.Tensor:
        """Log-odds (B,) of the class `positive`; UserError for a direction of age."""
        if self.kind != "binary":
            raise UserError(f"the direction {self.name} predicts years and has no log-odds; use years or sd")
        return self.score(y, nuisance)

    def probability(self, y: torch.Tensor, nuisance: torch.Tensor | None = None) -> torch.Tensor:
        """Probability (B,) of the class `positive`."""
        return torch.sigmoid(self.logit(y, nuisance))

    def predict(self, y: torch.Tensor, nuisance: torch.Tensor | None = None) -> torch.Tensor:
        """What a reader of a report wants, (B,): the probability of `positive`, or the predicted age in years."""
        return self.probability(y, nuisance) if self.kind == "binary" else self.score(y, nuisance)

    # ---- editing

    def edit(self, y: torch.Tensor, amount, unit: str = "", stop: float | None = None) -> torch.Tensor:
        """Codes (B, n) moved along the path by `amount` (a number, or one per code (B,)); 0 returns `y` exactly.

        unit: one of UNITS, empty for the score's own. stop: probability (or age) that the edit does not pass. A
        positive amount raises the score. UserError for a unit that this direction does not have.
        """
        length = torch.as_tensor(amount, dtype=y.dtype, device=y.device) * self._unit_length(unit)
        if stop is not None:
            limit = self.amount_for(y, stop) * self._unit_length(self.unit)
            up = torch.minimum(length, limit.clamp_min(0))
            length = torch.where(length >= 0, up, torch.maximum(length, limit.clamp_max(0)))
        step = (self._unit_path() * self.std).to(y)
        # Deviation (original code): one addition in code space instead of normalising there and back, so that an edit
        # of 0 is none at all.
        return y + length.reshape(-1, 1) * step

    def amount_for(self, y: torch.Tensor, target: float) -> torch.Tensor:
        """Amount (B,), in the score's own unit, that brings each code's probability (or age) to `target`."""
        if self.kind == "binary":
            if not 0 < target < 1:
                raise UserError(f"target probability {target}: give one between 0 and 1, such as 0.1 or 0.9")
            target = math.log(target / (1 - target))
        return target - self.score(y)

    def convert(self, amount: float, unit: str, to: str) -> float:
        """An amount of `unit` in units of `to`."""
        return amount * self._unit_length(unit) / self._unit_length(to)

    def without(self, *others: Direction) -> Direction:
        """The same probe with a path along which none of the `others` changes its score (nuisance directions).

        UserError if nothing is left of the path, or of its effect.
        """
        x = torch.stack([(o.weight / o.std * self.std).double() for o in others])  # their gradients, in our units
        basis = torch.linalg.qr(x.T).Q
        path = self.path.double() - basis @ (basis.T @ self.path.double())
        named = ", ".join(o.name for o in others)
        if path.norm() < PARALLEL * self.path.norm():
            raise UserError(f"the direction {self.name} is the same as {named}: nothing is left without it")
        name = "_".join(filter(None, [self.path_name, *(f"orthogonal_to_{o.name}" for o in others)]))
        edited = replace(self, path=path.to(self.path), path_name=name)
        edited._unit_length(self.unit)  # says so if the score cannot be moved any more
        return edited

    def along(self, path: torch.Tensor, name: str) -> Direction:
        """The same probe with another path (n,), in normalised units and turned so that it raises the score."""
        path = path.to(self.weight)
        return replace(self, path=path if path @ self.weight >= 0 else -path, path_name=name)

    def _unit_path(self) -> torch.Tensor:
        return self.path / self.path.norm()

    def _unit_length(self, unit: str) -> float:
        """Signed length along the path, in normalised units, of an amount of 1."""
        unit, u = unit or self.unit, self._unit_path().double()
        if unit == "upstream":
            return math.sqrt(self.code_dim)
        if unit == "sd":
            return math.sqrt(float(u @ self.correlation.double() @ u)) if self.correlation is not None else 1.0
        if unit != self.unit:
            raise UserError(f"unit {unit!r} does not fit the direction {self.name}: use {self.unit}, sd or upstream")
        weight = self.weight.double()
        if float(u @ weight) <= PARALLEL * float(weight.norm()):
            raise UserError(f"an edit along this path does not change {self.name}; choose another path")
        return 1 / float(u @ weight)

    # ---- how far an edit goes

    def typicality(self, y: torch.Tensor) -> torch.Tensor:
        """Root mean square of the normalised codes, (B,): 1 on average over the training codes, more is unusual."""
        return self.normalise(y).square().mean(1).sqrt()

    def identity_distance(self, y: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """How two codes (B, n) differ besides the path, (B,): 0 is the same person, 1 usual between two people."""
        x = self.normalise(other) - self.normalise(y)
        u = self._unit_path().to(y)
        rest = x - (x @ u)[:, None] * u
        return rest.square().sum(1).sqrt() / math.sqrt(2 * self.code_dim)

    # ---- files

    def save(self, path: Path) -> None:
        """One .npz of arrays and a JSON text, atomically; nothing is pickled."""
        head = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ARRAYS}
        arrays = {name: value.numpy() for name in ARRAYS if (value := getattr(self, name)) is not None}
        buffer = io.BytesIO()
        np.savez(buffer, head=np.array(json.dumps(head)), **arrays)
        with replacing(npz_path(path)) as file:
            file.write(buffer.getvalue())

    @staticmethod
    def load(path: Path) -> Direction:
        """The direction of PATH or PATH.npz; UserError if there is none, or it is something else."""
        path = npz_path(path)
        if not path.is_file():
            raise UserError(f"no direction {path}; write it with `python ldae/scripts/train_manipulation.py`")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                head = json.loads(str(arrays["head"]))
                tensors = {name: torch.from_numpy(arrays[name]) for name in ARRAYS if name in arrays}
            lists = {name: tuple(head[name]) for name in ("nuisance", "nuisance_mean", "nuisance_weight")}
            return Direction(**(head | lists), **tensors)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged or no direction ({error}); run train_manipulation.py again") from error

    def check_encoder(self, encoder_hash: str) -> None:
        """UserError unless the probe was fitted on codes of this encoder (an imported one does not know its own)."""
        if self.encoder not in (None, encoder_hash):
            raise UserError(f"the direction {self.name} is of codes of {self.encoder}, this model is {encoder_hash}; "
                            "export the codes again and run train_manipulation.py")  # fmt: skip


def without_suffix(nuisance: Sequence[str]) -> str:
    """Suffix _without_age_sex for nuisance columns such as age, sex=M; empty for none."""
    names = dict.fromkeys(name.partition("=")[0] for name in nuisance)
    return f"_without_{'_'.join(names)}" if names else ""


def npz_path(path: Path) -> Path:
    """PATH.npz, whether or not it was given with .npz or .json."""
    path = Path(path)
    return path.with_name((path.stem if path.suffix in (".npz", ".json") else path.name) + ".npz")


def from_original(weights: Path, mean: Path, std: Path, *, positive="CN", negative="AD") -> Direction:
    """The original's probe: a state dict of Linear(n, 1) and two tensors (n,); there the positive class is CN."""
    state = _tensors(weights)
    if not isinstance(state, dict) or not {"weight", "bias"} <= state.keys():
        raise UserError(f"{weights} is no linear probe: expected a dict with weight and bias")
    mean, std, weight = (torch.as_tensor(v).float().flatten() for v in (_tensors(mean), _tensors(std), state["weight"]))
    if not mean.shape == std.shape == weight.shape:
        raise UserError(f"{weights}: weight, mean and SD have {weight.numel()}, {mean.numel()} and {std.numel()} "
                        "entries; give the three files of one probe")  # fmt: skip
    return Direction(mean, std, weight, float(state["bias"].reshape(-1)[0]), positive, negative)


def _tensors(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"no file {path}; correct the path") from error
    except Exception as error:
        what = f"{path} is damaged or holds more than tensors ({type(error).__name__})"
        raise UserError(f"{what}; give a file of tensors") from error


# ---- counterfactual report ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """One edited version of a scan: how far, its code (n,), the decoded volume, and the code read back from that."""

    amount: float
    code: torch.Tensor
    volume: np.ndarray  # (D, H, W)
    reencoded: torch.Tensor | None = None  # (n,) code of `volume`: did the picture follow the code?


def counterfactual_report(
    stem: Path,
    *,
    direction: Direction,
    y: torch.Tensor,
    original: np.ndarray,
    edits: Sequence[Edit],
    affine: np.ndarray,
    unit: str = "",
    brain: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    names: dict[str, int | Sequence[int]] | None = None,
    **about,
) -> dict:
    """Write STEM.json and STEM.png (original, edited and difference maps) of one scan's edits; returns the record.

    y: code (n,) of the scan. original: what is decoded from the unedited code, (D, H, W); a change is judged against it
    and not against the scan, so that the reconstruction error does not count as an effect. brain: mask (D, H, W),
    by default `preprocess.head_mask(original)`. labels: label map of the scan on the same grid, with `names` {region:
    codes}; their volumes are measured in every picture. about: further entries of the record.
    """
    unit = unit or direction.unit
    brain = preprocess.head_mask(original) if brain is None else brain.astype(bool)
    regions = region_masks(labels, names) if labels is not None else {}
    voxel_ml, centre = quality.voxel_ml(affine), quality.central_region(original, affine)

    def measured(volume):
        volumes = {name: region_ml(volume, original, mask, voxel_ml) for name, mask in regions.items()}
        return {"ventricle_ml": _plain(quality.ventricle_ml(volume, affine, centre)), "regions_ml": volumes}

    before = {"prediction": float(direction.predict(y[None])), "typicality": float(direction.typicality(y[None]))}
    before |= measured(original)
    after = []
    for edit in edits:
        found = {"amount": edit.amount, "prediction": float(direction.predict(edit.code[None]))}
        found |= {"typicality": float(direction.typicality(edit.code[None]))}
        if edit.reencoded is not None:
            found["prediction_reencoded"] = float(direction.predict(edit.reencoded[None]))
            found["identity_distance"] = float(direction.identity_distance(y[None], edit.reencoded[None]))
        after.append(found | measured(edit.volume) | change(original, edit.volume, brain))
    record = about | {
        "direction": direction.name,
        "positive": direction.positive,
        "prediction_is": f"probability of {direction.positive}" if direction.kind == "binary" else "years",
        "unit": unit,
        "unit_in_sd": direction.convert(1.0, unit, "sd"),
        "codes": direction.codes,
        "encoder": direction.encoder,
        "original": before,
        "edits": after,
    }
    write_json(Path(stem).with_name(Path(stem).name + ".json"), record)
    draw(Path(stem).with_name(Path(stem).name + ".png"), direction, y, original, edits, affine, unit)
    return record


def draw(path: Path, direction: Direction, y, original, edits: Sequence[Edit], affine, unit: str) -> Path:
    """Original, edited and difference maps, with the probe's prediction above each."""
    spacing_mm = tuple(float(s) for s in np.linalg.norm(np.asarray(affine)[:3, :3], axis=0))

    def shown(code):
        value = float(direction.predict(code[None]))
        return f"P({direction.positive}) {value:.2f}" if direction.kind == "binary" else f"{value:.1f} years"

    reference = f"original, {shown(y)}"
    volumes = {reference: original}
    volumes |= {f"{edit.amount:+.3g} {unit}, {shown(edit.code)}": edit.volume for edit in edits}
    return figures.montage(path, volumes, window=(0, max(float(np.percentile(original, 99.5)), 1e-3)),
                           difference_to=reference, spacing_mm=spacing_mm, title=direction.name)  # fmt: skip


def change(original: np.ndarray, edited: np.ndarray, brain: np.ndarray) -> dict[str, float | None]:
    """Mean absolute change over all voxels, in the brain and outside it, the outside's share of it, the largest."""
    difference = np.abs(np.asarray(edited, np.float64) - np.asarray(original, np.float64))
    parts = quality.change_outside(original, edited, brain)
    found = {"l1": difference.mean(), "l1_brain": parts["inside"], "l1_outside": parts["outside"]}
    found |= {"share_outside": parts["share_outside"], "largest": difference.max()}
    return {name: _plain(value) for name, value in found.items()}


def region_masks(labels: np.ndarray, names: dict[str, int | Sequence[int]] | None = None) -> dict[str, np.ndarray]:
    """Masks (D, H, W) by region of a label map; without `names` one per label other than 0."""
    if names is None:
        names = {f"label_{code}": (int(code),) for code in np.unique(labels) if code != 0}
    masks = {name: np.isin(labels, codes) for name, codes in names.items()}
    return {name: mask for name, mask in masks.items() if mask.any()}


def region_ml(volume: np.ndarray, original: np.ndarray, mask: np.ndarray, voxel_ml: float) -> float | None:
    """Volume in ml that a region of the original's label map has in another picture of the same head.

    Partial volumes: between the original's mean intensity in the shell around the region (0) and in the region (1),
    summed over region and shell. None where the two differ too little to be told apart.
    """
    shell = ndimage.binary_dilation(mask, iterations=SHELL_VOXELS) & ~mask
    if not shell.any():
        return None
    inside, around = float(original[mask].mean()), float(original[shell].mean())
    if abs(inside - around) < CONTRAST:
        return None
    share = (np.asarray(volume, np.float64)[mask | shell] - around) / (inside - around)
    return float(np.clip(share, 0, 1).sum() * voxel_ml)


def _plain(value) -> float | None:
    """A JSON number; None for what is not finite."""
    return float(value) if value is not None and math.isfinite(value) else None
