"""Feature networks of the evaluation, by name: what turns slices or volumes into vectors, and how a result names it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import checkpoint, runtime
from common.cli import UserError
from neuroldm3d import preprocess
from neuroldm3d.classifier.model import CNN3D
from neuroldm3d.preprocess import Preparation

SLICE_NETWORKS = ("inception", "torchvision", "random")  # one vector per slice; classifier and medicalnet: per volume
RANDOM_WIDTH = 64


@dataclass(frozen=True)
class Features:
    """A frozen network in eval mode; `record` names it and its weights in results.

    per_slice: takes slices (B, h, w) in [0, 1]; otherwise prepared volumes (B, D, H, W) in normalised units.
    """

    per_slice: bool
    network: Callable[[Tensor], Tensor]
    record: dict

    @torch.inference_mode()
    def __call__(self, batches: Iterable[np.ndarray], rt: runtime.Runtime) -> np.ndarray:
        """(n, d) float32 features of batches of slices or volumes; float32 arithmetic, whatever the precision."""
        parts = [self.network(torch.from_numpy(np.ascontiguousarray(b)).to(rt.device)).float().cpu() for b in batches]
        return torch.cat(parts).numpy()


class RandomSlices(nn.Module):
    """Slices (B, h, w) -> (B, 64): three strided convolutions with seeded random weights and a mean.

    For trying a pipeline without any weights. Its distances order gross differences and mean nothing in themselves.
    """

    def __init__(self, seed: int):
        super().__init__()
        widths = (1, 16, 32, RANDOM_WIDTH)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 5, 2, 2, bias=False) for a, b in zip(widths, widths[1:], strict=False)
        )
        for i, conv in enumerate(self.convs):
            fan_in = conv.weight[0].numel()
            drawn = torch.randn(conv.weight.shape, generator=runtime.generator(seed, "random features", i))
            conv.weight.data.copy_(drawn * (2 / fan_in) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        for conv in self.convs:
            x = F.relu(conv(x))
        return x.mean((2, 3))


def load_features(name: str, weights: str | Path, prep: Preparation, rt: runtime.Runtime, *, seed: int = 0) -> Features:
    """The network that --features names, with the weights of a file; UserError if they are missing or unfit.

    prep: of the volumes that it will see.
    """
    if name == "random":
        network = RandomSlices(seed)
        record = {"network": f"random convolutions, seed {seed} (not for reporting)",
                  "weights_hash": checkpoint.weights_hash(network.state_dict())}  # fmt: skip
    elif name == "classifier":
        network, record = classifier_features(weights, prep, rt)
    elif name == "medicalnet":
        from neuroldm3d.diffusion.medicalnet import load_medicalnet

        backbone, record = load_medicalnet(weights)
        record = {"network": f"MedicalNet ResNet-{backbone.depth}", **record}
        network = OneChannel(backbone)
    else:
        from neuroldm3d.diffusion.inception import load_inception

        variant = "fid" if name == "inception" else "torchvision"
        network, record = load_inception(variant, weights)
        record = {"network": f"Inception-v3, {variant} variant", **record}
    network = network.to(rt.device).eval().requires_grad_(False)
    return Features(name in SLICE_NETWORKS, network, {"name": name, **record})


class OneChannel(nn.Module):
    """Volumes (B, D, H, W) to a network that wants (B, 1, D, H, W)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x[:, None])


class ClassifierFeatures(nn.Module):
    """Prepared volumes (B, D, H, W) to the penultimate features (B, F) of a trained classifier."""

    def __init__(self, network: nn.Module, prep: Preparation, pad: str):
        super().__init__()
        self.network, self.prep, self.pad = network, prep, pad

    def forward(self, x: Tensor) -> Tensor:
        inputs = np.stack([preprocess.classifier_input(v.cpu().numpy(), self.prep, pad=self.pad) for v in x])
        inputs = torch.from_numpy(inputs).to(x.device)  # (B, S, h, w)
        return self.network.features(inputs[:, None] if isinstance(self.network, CNN3D) else inputs)


def classifier_features(path: str | Path, prep: Preparation, rt: runtime.Runtime) -> tuple[nn.Module, dict]:
    """Feature network of a file of classifier/train.py; UserError if its volumes are prepared in another way."""
    from neuroldm3d.classifier.trainer import load_classifier

    network, saved = load_classifier(Path(path), rt, option="--weights")
    made_with = Preparation.from_dict(saved["preparation"])
    if made_with != prep:
        raise UserError(f"{path} was trained on {made_with}, the volumes have {prep}; use one preparation")
    kind = "3D CNN" if isinstance(network, CNN3D) else "EfficientNetV2"
    return ClassifierFeatures(network, prep, saved["pad"]), {
        "network": f"classifier, {kind}",
        "weights_hash": saved["hash"],
    }
