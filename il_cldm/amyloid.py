"""Amyloid status: regional SUVR, and small CNNs for the baselines that every detection claim needs.

SUVR = mean uptake of a cortical composite / mean uptake of a reference region; positive at or above a threshold.
Image metrics alone do not show that status is recovered: independent work measured chance level for this method
(README, "What image metrics do not show").
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import checkpoint, metrics, nifti, runtime
from common.cli import UserError
from il_cldm import dataset
from il_cldm.config import Config
from il_cldm.prepare import read_record

LARGEST_AXIS = 32  # the classifiers see volumes averaged down to at most this many voxels a side


def suvr(pet: np.ndarray, labels: np.ndarray, target: tuple[int, ...], reference: tuple[int, ...]) -> float:
    """Standardised uptake value ratio of (D, H, W) PET over an integer label map; UserError if a region is empty."""
    inside, base = np.isin(labels, target), np.isin(labels, reference)
    if not inside.any() or not base.any():
        which = "reference" if inside.any() else "target"
        raise UserError(f"label map without voxels of {which} codes; check --target_labels and --reference_labels")
    level = float(pet[base].mean())
    return float(pet[inside].mean()) / max(level, 1e-6)


def region_settings(config: Config) -> tuple[tuple[int, ...], tuple[int, ...], float] | None:
    """Target codes, reference codes, threshold: options, else data_info/prepare.json; None if not all are known."""
    record = read_record(config)
    target = config.target_labels or tuple(record.get("target_labels", ()))
    reference = config.reference_labels or tuple(record.get("reference_labels", ()))
    threshold = config.suvr_threshold or record.get("suvr_threshold", 0.0)
    return (target, reference, threshold) if target and reference and threshold else None


def load_regions(config: Config, name: str, shape: tuple[int, ...]) -> np.ndarray:
    labels = nifti.load_labels(dataset.find_volume(config.regions, name))
    if labels.shape != tuple(shape):
        raise UserError(
            f"{dataset.stem(name)}: region map of shape {labels.shape} in {config.regions}, PET has {tuple(shape)}"
        )
    return labels.data


class SmallClassifier(nn.Module):
    """3D CNN: (B, 1, D, H, W) -> (B, classes) logits."""

    def __init__(self, classes: int, width: int = 16):
        super().__init__()
        widths = (1, width, 2 * width, 4 * width)
        self.blocks = nn.Sequential(*(
            nn.Sequential(nn.Conv3d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.ReLU())
            for a, b in zip(widths, widths[1:], strict=False)
        ))  # fmt: skip
        self.head = nn.Linear(2 * widths[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.blocks(x).flatten(2)
        return self.head(torch.cat([h.mean(2), h.amax(2)], dim=1))


def shrink(volume: torch.Tensor) -> torch.Tensor:
    """(1, D, H, W) averaged down to at most LARGEST_AXIS voxels a side."""
    factor = max(1, -(-max(volume.shape) // LARGEST_AXIS))
    return F.avg_pool3d(volume, factor, ceil_mode=True) if factor > 1 else volume


def fit_classifier(
    inputs: torch.Tensor, targets: torch.Tensor, classes: int, config: Config, rt: runtime.Runtime, what: str
) -> SmallClassifier:
    """Train on inputs (N, 1, d, h, w) with integer targets (N,); class-balanced, left-right flips, seeded by `what`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = SmallClassifier(classes).to(rt.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    g = runtime.generator(config.seed, "classifier", what)
    counts = torch.bincount(targets, minlength=classes).clamp_min(1)
    weights = (1.0 / counts)[targets]
    for step in range(config.classifier_steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / config.classifier_steps)
        pick = torch.multinomial(weights, min(16, len(targets)), replacement=True, generator=g)
        flip = torch.rand(len(pick), generator=g) < 0.5
        x = inputs[pick]
        x = torch.where(flip[:, None, None, None, None], x.flip(2), x).to(rt.device)
        loss = F.cross_entropy(model(x), targets[pick].to(rt.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.inference_mode()
def probabilities(model: SmallClassifier, inputs: torch.Tensor, rt: runtime.Runtime) -> np.ndarray:
    """(N, classes) softmax probabilities."""
    return torch.cat([model(x.to(rt.device)).softmax(1).cpu() for x in inputs.split(16)]).numpy()


def stack(volumes: dataset.Volumes, names: list[str]) -> torch.Tensor:
    return torch.stack([shrink(volumes.tensor(name)) for name in names])


def detection_report(
    status: np.ndarray, scores: dict[str, np.ndarray], cutoffs: dict[str, float], config: Config
) -> dict[str, dict]:
    """ROC-AUC with bootstrap interval and balanced accuracy of each score against 0/1 status; and of chance."""
    report = {}
    for name, values in scores.items():
        report[name] = metrics.roc_auc(status, values, seed=config.seed, resamples=config.bootstrap)
        report[name] |= metrics.balanced_accuracy(status, values >= cutoffs[name]) | {"cutoff": cutoffs[name]}
    if 0 < status.sum() < len(status):
        rng = np.random.default_rng(config.seed)
        chance = [metrics.roc_auc(status, rng.random(len(status)), seed=0, resamples=1)["auc"] for _ in range(500)]
        report["chance (random scores)"] = {
            "auc": float(np.mean(chance)),
            "ci": tuple(np.percentile(chance, [2.5, 97.5]).tolist()),
            "balanced_accuracy": 0.5,
        }
    return report


def baseline_scores(
    config: Config,
    rt: runtime.Runtime,
    train: list[str],
    status: np.ndarray,
    mri: dataset.Volumes,
    pet: dataset.Volumes,
    test: list[str],
    synthetic: list[np.ndarray],
) -> dict[str, np.ndarray]:
    """Probability of a positive status from CNNs fitted on the training split: of MRI, and of PET (real, synthetic)."""
    targets = torch.from_numpy(status.astype(np.int64))
    from_mri = fit_classifier(stack(mri, train), targets, 2, config, rt, "status from MRI")
    from_pet = fit_classifier(stack(pet, train), targets, 2, config, rt, "status from PET")
    fake = torch.stack([shrink(torch.from_numpy(v)[None]) for v in synthetic])
    return {
        "MRI-only CNN": probabilities(from_mri, stack(mri, test), rt)[:, 1],
        "PET CNN on synthetic PET": probabilities(from_pet, fake, rt)[:, 1],
        "PET CNN on true PET": probabilities(from_pet, stack(pet, test), rt)[:, 1],
    }


def predict_labels(config: Config, inputs: dict[str, Path], load_mri: Callable, rt: runtime.Runtime) -> dict[str, int]:
    """Diagnosis label per input MRI from a small CNN (--label predicted).

    It is trained on the training list, and kept in the run folder as long as list, labels and options stay the same.
    """
    names, table = dataset.read_list(config.list_path("train")), dataset.read_labels(config)
    labels = {dataset.stem(name): dataset.label_of(table, name, config) for name in names}
    settings = {"labels": labels, "steps": config.classifier_steps, "seed": config.seed, "classes": config.num_classes}
    path = config.run_folder / "label_classifier.pt"
    if rt.is_main and not (path.is_file() and checkpoint.load(path)["settings"] == settings):
        mri, _ = dataset.open_volumes(config)
        targets = torch.tensor(list(labels.values()))
        model = fit_classifier(stack(mri, names), targets, config.num_classes, config, rt, "label from MRI")
        checkpoint.save(path, {"settings": settings, "state_dict": model.state_dict()})
    rt.barrier()
    model = SmallClassifier(config.num_classes).to(rt.device).eval()
    model.load_state_dict(checkpoint.load(path)["state_dict"])

    def predict(file: Path) -> int:
        volume = torch.from_numpy(load_mri(file).data)[None]
        return int(probabilities(model, shrink(volume)[None], rt).argmax())

    return {name: predict(file) for name, file in inputs.items()}
