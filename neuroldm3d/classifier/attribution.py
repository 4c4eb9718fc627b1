"""Attribution of a classifier's logit to the voxels of its input, and the way back to the space of the volume's file.

Methods (captum): input x gradient; integrated gradients (Sundararajan et al. 2017, 50 Gauss-Legendre nodes); gradient
SHAP (Lundberg & Lee 2017, as expected gradients); the absolute gradient; integrated gradients under SmoothGrad.
Positive attributions speak for TLE. DeepLIFT, which fails in the original, is not offered. Maps of classifier inputs
are (S, h, w), see `preprocess.classifier_input`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn

from common import nifti, runtime
from neuroldm3d import preprocess
from neuroldm3d.preprocess import Preparation

METHODS = ("integrated_gradients", "saliency", "gradient_shap", "input_x_gradient", "noise_tunnel_ig")
COMPLETE = ("integrated_gradients", "gradient_shap")  # the maps whose sum should be the logit's change
STATISTICS = ("mean", "std", "min", "max", "abs_mean", "positive_ratio", "negative_ratio")
STEPS, NODES_AT_ONCE = 50, 10  # nodes of the path integral
SHAP_SAMPLES, SHAP_SD = 10, 0.1
NOISE_DRAWS, NOISE_SD = 10, 0.1


def attribute(network: Callable, x: Tensor, method: str, *, baseline: Tensor | float = 0.0, seed: int = 0) -> Tensor:
    """Attribution of the logit to every entry of x (1, S, h, w), same shape, on x's device.

    network: x -> logits (B, 1), in eval mode. baseline: what stands for "nothing", a number or a tensor like x, of the
    path methods. The random methods depend on `seed` alone and leave the global generators as they were.
    """
    from captum import attr

    def logit(inputs):
        return network(inputs)[:, 0]

    x = x.detach().requires_grad_()
    baseline = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).expand_as(x)
    path = dict(baselines=baseline, n_steps=STEPS, method="gausslegendre", internal_batch_size=NODES_AT_ONCE)
    with seeded(seed):
        if method == "input_x_gradient":
            found = attr.InputXGradient(logit).attribute(x)
        elif method == "saliency":
            found = attr.Saliency(logit).attribute(x, abs=True)
        elif method == "integrated_gradients":
            found = attr.IntegratedGradients(logit).attribute(x, **path)
        elif method == "gradient_shap":
            around = shap_baseline(x, baseline, seed)
            found = attr.GradientShap(logit).attribute(x, baselines=around, n_samples=SHAP_SAMPLES, stdevs=0.0)
        elif method == "noise_tunnel_ig":
            noisy = dict(nt_type="smoothgrad", nt_samples=NOISE_DRAWS, nt_samples_batch_size=1, stdevs=NOISE_SD)
            found = attr.NoiseTunnel(attr.IntegratedGradients(logit)).attribute(x, **noisy, **path)
        else:
            raise ValueError(f"unknown method {method!r}: one of {METHODS}")
    return found.detach()


def shap_baseline(x: Tensor, baseline: Tensor | float, seed: int) -> Tensor:
    """The one baseline of gradient SHAP, as published: `baseline` with Gaussian noise, like x."""
    return baseline + SHAP_SD * torch.randn(x.shape, generator=runtime.generator(seed, "shap")).to(x)


@contextmanager
def seeded(seed: int):
    """Within the block the generators of torch and NumPy, from which captum draws, start from `seed`."""
    before = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(before)


def statistics(attribution) -> dict[str, float]:
    """mean, std (n - 1), min, max, abs_mean, and shares of positive and negative entries of a map."""
    a = torch.as_tensor(attribution).double()
    values = (a.mean(), a.std(), a.min(), a.max(), a.abs().mean(), (a > 0).double().mean(), (a < 0).double().mean())
    return dict(zip(STATISTICS, (v.item() for v in values), strict=True))


@torch.no_grad()
def completeness(network: Callable, x: Tensor, baseline: Tensor | float, attribution: Tensor) -> dict[str, float]:
    """Sum of a map, change of the logit from the baseline to x, and |their difference| over |change|."""
    change = (network(x) - network(torch.as_tensor(baseline).to(x).expand_as(x))).item()
    total = attribution.double().sum().item()
    return {"sum": total, "logit_change": change, "relative_error": abs(total - change) / max(abs(change), 1e-12)}


def randomised(network: nn.Module, seed: int) -> nn.Module:
    """A copy of the network with fresh weights and norm statistics (Adebayo et al. 2018, in one step)."""
    fresh = copy.deepcopy(network)
    with seeded(seed):
        for module in fresh.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return fresh.eval()


# ---- back to the file's space ---------------------------------------------------------------------------------------


def to_prepared(attribution: np.ndarray, prep: Preparation) -> np.ndarray:
    """Map (S, h, w) of a classifier input on the prepared grid (D, H, W): the frame is cut off, unseen slices are 0."""
    across, up = preprocess.classifier_margins(prep)
    inner = attribution[:, across : across + prep.shape[0], up : up + prep.shape[2]]
    full = np.zeros(prep.shape, np.float32)
    full[:, preprocess.classifier_slices(prep)] = inner.transpose(1, 0, 2)
    return full


def to_file_grid(prepared: np.ndarray, affine: np.ndarray, path: Path) -> nifti.Volume:
    """Volume on the prepared grid (affine LAS+) resampled to the grid of the file `path`, in RAS+ order."""
    return nifti.resample_to(nifti.Volume(prepared, affine), *nifti.header(path))


def save_like(path: Path, volume: nifti.Volume, like: Path) -> None:
    """Write a volume on the grid of the file `like` with that file's axis order and affine."""
    axes = nib.aff2axcodes(nib.load(like).affine)
    nifti.save(path, *nifti.reorient(volume.data, volume.affine, axes))
