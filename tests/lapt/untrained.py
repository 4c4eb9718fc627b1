"""A tiny LAPT model of random weights, for what needs a model but no training."""

import torch

from common import runtime
from lapt import dataset, diffusion

RT = runtime.Runtime(torch.device("cpu"))
STATS = {"dwi": {"low": 100.0, "high": 900.0, "mean": 400.0, "sd": 150.0},
         "adc": {"low": 300.0, "high": 2300.0, "mean": 900.0, "sd": 300.0}}  # fmt: skip


def untrained_model(*, slices=0, time_points=4, seed=0, intensity=None, prediction="eps", **sampling):
    """A model of slices (0) or stacks, whose zero-initialised layers are filled, so that all of its inputs matter."""
    autoencoder = {"in_channels": 2, "out_channels": 2, "channels": 8, "channel_mult": (1, 2, 2), "num_res_blocks": 1,
                   "z_channels": 3, "embed_dim": 3, "n_embed": 64, "norm_groups": 4}  # fmt: skip
    unet = {"in_channels": 3 + time_points, "out_channels": 3, "model_channels": 32, "channel_mult": (1, 2),
            "num_res_blocks": 1, "attention_resolutions": (2,), "head_channels": 16,
            "slices": slices or None}  # fmt: skip
    settings = {
        "stage": "lapt3d" if slices else "lapt", "slices": slices, "autoencoder": autoencoder, "unet": unet,
        "conditioner": {"in_channels": time_points, "out_channels": time_points, "stages": 2},
        "schedule": {"kind": "scaled_linear", "T": 1000, "beta_start": 0.0015, "beta_end": 0.0195,
                     "prediction": prediction},
        "sampling": {"spacing": "trailing", "offset": 0, "final": "clean"} | sampling,
    }  # fmt: skip
    torch.manual_seed(seed)
    intensity = intensity or dataset.Intensity("quantile", "training", STATS, (0.0, 200.0), time_points)
    model = diffusion.build_model(settings, intensity, RT)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim > 1 and not parameter.any():
            drawn = torch.randn(parameter.shape, generator=runtime.generator(seed, name))
            parameter.data.copy_(0.3 * drawn * parameter[0].numel() ** -0.5)
    model.hash = f"{slices:016d}"
    return runtime.frozen_network(model, RT)
