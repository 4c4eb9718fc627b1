"""How slices look: 2D MS-SSIM, flicker between neighbouring slices, and FID and KID of slice features.

Volumes are (X, Y, Z); a slice is an axial one, (X, Y). Feature networks are named by what they are and by the hash of
their weights; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import checkpoint, runtime
from common.cli import UserError
from common.fid import fid, kid, normal_interval
from common.lpips import LPIPS
from common.metrics import MS_SSIM_WEIGHTS
from lapt.dataset import pad_to_multiple
from lapt.diffusion import LatentModel

WINDOW, SIGMA = 11, 1.5  # of SSIM
GRID = 4  # the autoencoder's latent is averaged over this many parts per axis
RANDOM_WIDTH = 32

# ---- slices ---------------------------------------------------------------------------------------------------------


def flicker(predicted: np.ndarray, real: np.ndarray, mask: np.ndarray) -> float | None:
    """Mean absolute difference of neighbouring slices' errors, in the image's unit; None if no two slices overlap.

    A constant or slowly changing error does not count, one that jumps from slice to slice does. Only voxels (x, y)
    that lie in the mask in both slices.
    """
    error = np.asarray(predicted, np.float64) - real
    both = mask[..., 1:] & mask[..., :-1]
    return float(np.abs(np.diff(error, axis=2))[both].mean()) if both.any() else None


def ms_ssim_scales(shape: tuple[int, int]) -> int:
    """How many of the five scales slices of this shape (X, Y) allow: the window must fit the coarsest one."""
    return max(1, min(len(MS_SSIM_WEIGHTS), int(np.log2(max(min(shape) / WINDOW, 1))) + 1))


def ms_ssim_slices(predicted: np.ndarray, real: np.ndarray, *, data_range: float) -> np.ndarray:
    """Multi-scale SSIM (Wang, Simoncelli & Bovik 2003) of each axial slice of volumes (X, Y, Z), (Z,) float64.

    Gaussian window of 11, sigma 1.5, valid borders, factors clipped at 0, 2x mean pooling: MONAI's definition in 2D.
    Slices under 176 voxels keep the first `ms_ssim_scales` weights, scaled to sum 1. UserError for slices under 11.
    """
    if min(real.shape[:2]) < WINDOW:
        raise UserError(f"slices of {real.shape[0]} x {real.shape[1]} voxels are too small for MS-SSIM: it needs 11")
    scales = ms_ssim_scales(real.shape[:2])
    weights = np.array(MS_SSIM_WEIGHTS[:scales]) / (sum(MS_SSIM_WEIGHTS[:scales]) if scales < 5 else 1.0)
    x, y = (torch.from_numpy(np.array(v, np.float64)).movedim(2, 0)[:, None] for v in (predicted, real))
    result = torch.ones(len(x), dtype=torch.float64)
    for level, weight in enumerate(weights):
        ssim, structure = _ssim_factors(x, y, data_range)
        result *= (ssim if level == scales - 1 else structure).clamp(min=0) ** weight
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return result.numpy()


def _ssim_factors(x: Tensor, y: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    """Mean SSIM and mean contrast-structure factor of each slice pair (Z, 1, X, Y), (Z,) each."""
    distance = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    taps = torch.exp(-0.5 * (distance / SIGMA) ** 2)
    taps = taps / taps.sum()

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    structure = (2 * (blur(x * y) - mean_x * mean_y) + c2) / (variance_x + variance_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * structure).mean((1, 2, 3)), structure.mean((1, 2, 3))


# ---- features -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """A frozen feature network of slices; `record` names it and its weights in results."""

    network: Callable[[Tensor], Tensor]
    record: dict

    @torch.inference_mode()
    def __call__(self, slices: np.ndarray, rt: runtime.Runtime, batch: int = 16) -> np.ndarray:
        """(n, d) float32 features of slices (n, 2, X, Y), DWI and ADC, scaled to [-1, 1]."""
        parts = torch.from_numpy(np.ascontiguousarray(slices, np.float32)).split(batch)
        return torch.cat([self.network(part.to(rt.device)).float().cpu() for part in parts]).numpy()


class RandomSlices(nn.Module):
    """Slices (n, 2, X, Y) -> (n, 32): two strided convolutions with seeded random weights and a mean.

    For trying the evaluation without any weights; its distances order gross differences and mean nothing in themselves.
    """

    def __init__(self):
        super().__init__()
        widths = (2, RANDOM_WIDTH // 2, RANDOM_WIDTH)
        pairs = zip(widths, widths[1:], strict=False)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 5, 2, 2, bias=False) for a, b in pairs)
        for i, conv in enumerate(self.convs):
            drawn = torch.randn(conv.weight.shape, generator=runtime.generator(0, "random features", i))
            conv.weight.data.copy_(drawn * (2 / conv.weight[0].numel()) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return x.mean((2, 3))


class BackboneSlices(nn.Module):
    """Slices (n, 2, X, Y) to an ImageNet backbone, DWI and ADC each as a grey image -> (n, 2 C), spatial means."""

    def __init__(self, backbone: LPIPS):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        means = [self.backbone.activations(x[:, i : i + 1])[-1].mean((2, 3)) for i in range(2)]
        return torch.cat(means, dim=1)


class EncoderSlices(nn.Module):
    """Slices (n, 2, X, Y) to the latent of a VQ autoencoder before quantisation, averaged over 4 x 4 parts.

    background: of the images, which are padded to the autoencoder's factor with it.
    """

    def __init__(self, autoencoder: nn.Module, background: float):
        super().__init__()
        self.autoencoder, self.background = autoencoder, background

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, self.autoencoder.factor, self.background)
        return F.adaptive_avg_pool2d(self.autoencoder.encode(x), GRID).flatten(1)


def load_features(
    name: str, weights: str | Path, rt: runtime.Runtime, model: LatentModel | None = None
) -> Features:
    """The network that --features names; UserError if its weights are missing or of another network.

    weights: torchvision's file of a backbone of common.lpips (alex, vgg, squeeze); model: whose autoencoder it is.
    """
    if name == "random":
        network, what = RandomSlices(), "random convolutions (not for reporting)"
    elif name == "autoencoder":
        if model is None:
            raise UserError("--features autoencoder needs a trained model: name its run with --model")
        network = EncoderSlices(model.autoencoder, model.intensity.background)
        what = "encoder of the VQ autoencoder, 4 x 4 means"
    else:
        network, what = BackboneSlices(load_backbone(name, weights)), f"{name}, ImageNet, deepest LPIPS layer"
    network = runtime.frozen_network(network, rt)
    return Features(network, {"name": name, "network": what,
                              "weights_hash": checkpoint.weights_hash(network.state_dict())})  # fmt: skip


def load_backbone(name: str, path: str | Path) -> LPIPS:
    """Backbone of common.lpips from torchvision's file, without LPIPS heads."""
    if not path:
        raise UserError(f"--features {name} needs --feature_weights: torchvision's file of that network")
    state = checkpoint.load(path)
    network = LPIPS(name)
    own = network.features.state_dict()
    found = {key: state.get(f"features.{key}") for key in own}
    bad = [key for key in own if not isinstance(found[key], Tensor) or found[key].shape != own[key].shape]
    if bad:
        raise UserError(f"{path} has no features.{bad[0]} of {name}; give torchvision's file of that network")
    network.features.load_state_dict(found)
    network.heads = nn.ParameterList()  # random here, not used, and no part of the hash
    return network


# ---- distances of feature sets --------------------------------------------------------------------------------------


def compare_sets(real: np.ndarray, other: np.ndarray, patients: tuple, *, seed: int, resamples: int) -> dict:
    """fid with a bootstrap interval over patients, kid and kid_se of two feature sets (n, d) and (m, d).

    patients: the id of each row of both sets.
    """
    value, (mmd, error) = fid(real, other), kid(real, other, seed=seed)
    rng, draws = np.random.default_rng((seed, 1)), []
    for _ in range(resamples):
        rows = [_resample(np.asarray(ids), rng) for ids in patients]
        draws.append(fid(real[rows[0]], other[rows[1]]))
    return {"fid": value, "fid_ci95": normal_interval(value, draws), "kid": mmd,
            "kid_se": None if np.isnan(error) else error, "n_real": len(real), "n_other": len(other)}  # fmt: skip


def _resample(patients: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Row numbers of as many patients as there are, drawn with replacement, each with all of its rows."""
    names, codes = np.unique(patients, return_inverse=True)
    return np.concatenate([np.flatnonzero(codes == code) for code in rng.integers(len(names), size=len(names))])
