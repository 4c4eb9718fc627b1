"""Checkpoints and reference cases of the original NeuroLDM-3D program in terms of our modules.

`build`, `load`, `run` are what `python -m tests.golden` calls: our network for the original's class name and arguments,
strict loading from the original's keys, and the named outputs of a reference case. `from_checkpoint` builds the network
of one of the original's files, `to_upstream` gives our weights under the original's names, and `read_pickle` reads the
original's latents and synthetic volumes without running what a pickle may hold.
"""

import pickle
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

import common.checkpoint
from common import nifti, schedulers, training
from common.blocks3d import Down, Half, ResidualBlock, Up, sinusoidal_embedding
from common.cli import UserError
from common.ema import EMA
from common.lpips import LPIPS
from neuroldm3d import dataset, preprocess
from neuroldm3d.classifier import metrics as classifier_metrics
from neuroldm3d.classifier.model import CNN3D, DROP_PATH, FILTERS, EfficientNetV2L, StochasticDepth
from neuroldm3d.diffusion.model import (
    SIZES,
    Attention,
    Block,
    DiT3D,
    drop_labels,
    merge_windows,
    sincos_positions,
    split_windows,
    unpatchify,
)
from neuroldm3d.VAE.losses import LPIPS3D, kl_divergence, reconstruction_loss
from neuroldm3d.VAE.model import AutoencoderKL

# ------------------------------------------------------------------------------------------------------------ key map
# Our class -> {our submodule or tensor: the original's}. A class that is not listed is a leaf: same names there.

NAMES: dict[type[nn.Module], dict[str, str]] = {
    AutoencoderKL: {"encoder": "encoder", "decoder": "decoder", "mean": "conv_mean", "logvar": "conv_var"},
    ResidualBlock: {
        "norm1": "norm1",
        "conv1": "conv1.conv",
        "norm2": "norm2",
        "conv2": "conv2.conv",
        "skip": "nin_shortcut.conv",
    },
    Down: {"conv": "conv.conv"},
    Up: {"conv": "postconv.conv"},
    LPIPS3D: {"distance": "lpips_fn"},
    DiT3D: {
        "positions": "pos_embed",
        "patches": "patch_embed.proj",
        "time1": "t_embedder.mlp.0",
        "time2": "t_embedder.mlp.2",
        "label": "y_embedder.embedding_table",
        "modulation_out": "final_layer.adaLN_modulation.1",
        "linear_out": "final_layer.linear",
    },
    Block: {"attention": "attn", "fc1": "mlp.fc1", "fc2": "mlp.fc2", "modulation": "adaLN_modulation.1"},
    Attention: {
        "qkv": "qkv",
        "proj": "proj",
        "relative.0": "rel_pos_x",
        "relative.1": "rel_pos_y",
        "relative.2": "rel_pos_z",
    },
    EfficientNetV2L: {"features": "backbone.features", "classifier": "backbone.classifier"},
}


def _children(module: nn.Module) -> dict[str, str]:
    names = dict(NAMES.get(type(module), {}))
    if isinstance(module, Half):  # one list there: the convolution, the blocks, the norm, the convolution
        n = len(module.blocks)
        names = {"conv_in": "blocks.0.conv", "norm_out": f"blocks.{n + 1}", "conv_out": f"blocks.{n + 2}.conv"}
        names |= {f"blocks.{i}": f"blocks.{i + 1}" for i in range(n)}
    if isinstance(module, DiT3D):
        names |= {f"blocks.{i}": f"blocks.{i}" for i in range(len(module.blocks))}
    if isinstance(module, LPIPS):
        names = {"shift": "scaling_layer.shift", "scale": "scaling_layer.scale"}
        for k in map(int, module.features):
            depth = next(i for i, last in enumerate(module.compared, 1) if k <= last)
            names[f"features.{k}"] = f"net.slice{depth}.{k}"
        names |= {f"heads.{i}": f"lin{i}.model.1.weight" for i in range(len(module.heads))}
    return names


def key_map(model: nn.Module) -> dict[str, str]:
    """Our state-dict key -> the original's key, for every entry of `model`."""
    return common.checkpoint.renamed_keys(model, _children)


WRAPPERS = ("module.", "model.")  # of DataParallel and of the class that holds the original's DiT


def to_upstream(model: nn.Module, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """State dict of `model` (or another one with its keys, for example the average's) under the original's names."""
    state_dict = model.state_dict() if state_dict is None else state_dict
    names, prefix = key_map(model), getattr(model, "upstream_prefix", "")
    state = {prefix + names[key]: value for key, value in state_dict.items()}
    heads = [key for key in state if key.startswith("lpips_fn.lin")]  # the lpips package lists them twice
    return state | {key.replace(".lin", ".lins.", 1): state[key] for key in heads}


def _unwrapped(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the prefixes of wrappers, and without the second listing of the LPIPS heads."""
    state = {}
    for key, value in state_dict.items():
        while key.startswith(WRAPPERS):
            key = key.partition(".")[2]
        if not key.startswith("lpips_fn.lins."):
            state[key] = value
    return state


def load(model, state_dict: dict[str, Tensor]):
    """Fill `model` from a state dict with the original's keys, with or without the prefixes of its wrappers.

    Returns the model. Strict: UserError names missing, unexpected and differently shaped entries.
    """
    names = key_map(model)
    common.checkpoint.load_renamed(model, _unwrapped(state_dict), names, set(names.values()))
    return model


# ------------------------------------------------------------------------------------- the original's files: networks

LATENT_SIZE = (28, 34, 28)  # of every published latent
PUBLISHED = {  # what leaves no trace in the weights
    "vae": {"norm_num_groups": 16},
    "dit": {"in_size": LATENT_SIZE, "class_dropout_prob": 0.1},
    "classifier": {"dropout_rate": 0.3},
}


def from_checkpoint(content: dict, path, *, weights: str = "ema", **overrides) -> tuple[str, nn.Module]:
    """("vae" | "dit" | "classifier", our network) of what a checkpoint of the original holds, read from `path`.

    weights: a DiT file has two sets, the average ("ema", our choice) and the "raw" ones (the original sampled from
    these). `overrides` replace what is inferred of the original's constructor arguments, for example in_size=(d, h, w)
    of another latent. UserError, naming `path`, for anything else.
    """
    entries = {"vae": "vae_state_dict", "dit": "model_state", "classifier": "model_state_dict"}
    kind = next((kind for kind, entry in entries.items() if isinstance(content.get(entry), dict)), None)
    if kind is None:
        listed = ", ".join(entries.values())
        raise UserError(f"checkpoint {path} is not a file of the original NeuroLDM-3D: it has none of {listed}")
    entry = "ema_state" if kind == "dit" and weights == "ema" and content.get("ema_state") else entries[kind]
    try:
        state = _unwrapped(content[entry])
        module, config = {"vae": _identify_vae, "dit": _identify_dit, "classifier": _identify_classifier}[kind](state)
        return kind, load(build(module, PUBLISHED[kind] | config | overrides), state)
    except (UserError, ValueError, KeyError, IndexError) as error:  # the latter: keys of some other network
        what = f"no {error.args[0]}" if isinstance(error, KeyError) else error
        raise UserError(f"checkpoint {path}: {what}") from None


def _identify_vae(state: dict[str, Tensor]) -> tuple[str, dict]:
    channels, blocks, i = [], [0], 1
    while f"encoder.blocks.{i}.conv.weight" not in state:  # up to the last convolution
        if f"encoder.blocks.{i}.conv.conv.weight" in state:
            blocks.append(0)
        elif f"encoder.blocks.{i}.conv1.conv.weight" in state:
            channels[len(blocks) - 1 :] = [state[f"encoder.blocks.{i}.conv1.conv.weight"].shape[0]]
            blocks[-1] += 1
        elif f"encoder.blocks.{i}.weight" not in state:  # the norm
            raise ValueError(f"no encoder.blocks.{i}")
        i += 1
    return "VAE_Lite", {
        "channels": channels,
        "num_res_blocks": blocks,
        "latent_channels": len(state["conv_mean.weight"]),
        "in_channels": state["encoder.blocks.0.conv.weight"].shape[1],
    }


def _identify_dit(state: dict[str, Tensor]) -> tuple[str, dict]:
    hidden, in_channels, *patch = state["patch_embed.proj.weight"].shape
    heads = {size["hidden_size"]: {"num_heads": size["num_heads"]} for size in SIZES.values()}
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    out_channels = len(state["final_layer.linear.bias"]) // int(np.prod(patch))
    config = {
        "patch_size": patch,
        "in_channels": in_channels,
        "hidden_size": hidden,
        "depth": depth,
        "mlp_ratio": len(state["blocks.0.mlp.fc1.bias"]) / hidden,
        "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
        "learn_sigma": out_channels == 2 * in_channels,
        "use_rel_pos": "blocks.0.attn.rel_pos_x" in state,
    }
    return "DiT", config | heads.get(hidden, {})  # of another width: the caller knows how many


def _identify_classifier(state: dict[str, Tensor]) -> tuple[str, dict]:
    stem = state.get("backbone.features.0.0.weight")
    if stem is not None:
        return "MRIClassifier (2D, EfficientNetV2-L backbone)", {"in_channels": stem.shape[1]}
    filters = [len(value) for key, value in state.items() if key.startswith("features.") and value.ndim == 5]
    return "MRIClassifier (3D CNN)", {"filters": filters, "num_classes": len(state["fc2.bias"])}


# -------------------------------------------------------------------------------------- the original's files: pickles


class _Refused(Exception):
    """A pickle asks for something that may not be made of it."""


class _ArraysOnly(pickle.Unpickler):
    """Unpickler for NumPy arrays and plain values: any other class or function in the file is an error."""

    ALLOWED = {
        *((module, name) for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
          for name in ("ndarray", "dtype", "scalar", "_reconstruct")),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
        ("_codecs", "encode"),  # how old protocols write the bytes of an array
    }  # fmt: skip

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise _Refused(f"it holds a {module}.{name}")
        return super().find_class(module, name)


def read_pickle(path) -> dict:
    """A latent {mu, logvar, label} or synthetic volume {image, label} that the original pickled.

    NumPy arrays and plain values are read; a file with anything else is refused (UserError) before it can run. The
    scripts call this only with --trust_pickle.
    """
    try:
        with open(path, "rb") as file:
            content = _ArraysOnly(file).load()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: correct the path") from None
    except _Refused as error:
        raise UserError(f"{path} is refused: {error}; only pickled arrays and plain values are read") from None
    except Exception as error:  # damaged bytes can raise about anything
        raise UserError(f"{path} is truncated, damaged or no pickle of the original: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} holds a {type(content).__name__}, expected the dict of a latent or synthetic volume")
    odd = [key for key, value in content.items() if isinstance(value, np.ndarray) and value.dtype.hasobject]
    if odd:
        raise UserError(f"{path} is refused: {odd[0]} is an array of objects, not of numbers")
    return content


def read_item(path, *names: str) -> tuple[list[np.ndarray], int]:
    """Float32 arrays of these names and the label (0 HC, 1 TLE) of a pickled latent or volume; UserError otherwise."""
    content = read_pickle(path)
    if missing := [name for name in (*names, "label") if name not in content]:
        raise UserError(f"{path} has no {missing[0]} but {', '.join(content) or 'nothing'}; name the right folder")
    try:
        arrays, label = [np.asarray(content[name], np.float32) for name in names], np.asarray(content["label"]).item()
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} holds no numbers where {', '.join(names)} and one label should be: {error}") from None
    if label not in (0, 1):
        raise UserError(f"{path} has label {label!r}; known are 0 (HC) and 1 (TLE)")
    if odd := [name for name, array in zip(names, arrays, strict=True) if not np.isfinite(array).all()]:
        raise UserError(f"{path}: {odd[0]} has values that are NaN or Inf; leave the file out")
    return arrays, int(label)


# ----------------------------------------------------------------------------------------------- golden: autoencoder

VAE_FIXED = {  # arguments of the original with which alone it was ever built; others of its arguments have no effect
    "spatial_dims": 3,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
    "use_convtranspose": False,
}


def _build_vae(config: dict) -> AutoencoderKL:
    odd = [name for name, value in VAE_FIXED.items() if config.get(name, value) != value]
    if odd or any(config.get("attention_levels", ())):
        raise KeyError(f"{', '.join(odd) or 'attention_levels'}: never used, and not implemented")
    return AutoencoderKL(
        channels=tuple(config["channels"]),
        num_res_blocks=tuple(config["num_res_blocks"]),
        latent_channels=config["latent_channels"],
        norm_groups=config["norm_num_groups"],
        norm_eps=config.get("norm_eps", 1e-5),
        image_channels=config["in_channels"],
    )


def _run_vae(model: AutoencoderKL, inputs: dict) -> dict:
    with torch.no_grad():
        recon_z, mean, logvar = model.eval()(inputs["x"], inputs["eps"])
        return {"mean": mean, "logvar": logvar, "recon_z": recon_z, "recon_mean": model.decode(mean)}


def _run_vae_loss(model: AutoencoderKL, inputs: dict) -> dict:
    """Through the loss of VAE/trainer.py, without the perceptual term."""
    from neuroldm3d.VAE import trainer  # here, because it imports this module

    weights = {name: inputs[name] for name in ("lambda_recon", "lambda_kl")}
    config = SimpleNamespace(recon_loss=inputs["recon_loss_type"], **weights)
    terms = trainer.vae_loss(*model.train()(inputs["x"], inputs["eps"]), inputs["x"], config)
    terms["loss"].backward()
    names = {"loss": "loss", "recon": "recon_term", "kl": "kl_term"}
    return {names[name]: term.detach() for name, term in terms.items()} | _gradients(model)


def _run_vae_terms(config: dict, inputs: dict) -> dict:
    out = {kind: reconstruction_loss(inputs["x_recon"], inputs["x"], kind) for kind in ("l1", "mse")}
    ones = torch.ones(1, 4, *LATENT_SIZE)
    out["kl_unit_mean_zero_logvar_full_latent"] = kl_divergence(ones, torch.zeros_like(ones))
    return out | {"kl": kl_divergence(inputs["mu"], 0.5 * inputs["logvar"])}


def _gradients(model: nn.Module) -> dict:
    grads = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.named_parameters()}
    return {f"grad:{key}": grad for key, grad in to_upstream(model, grads).items()}


class _SliceStandIn(nn.Module):
    """Stands for the 2D distance in the case of the slices: it knows rows from columns."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        rows, columns = torch.arange(a.shape[2])[:, None], torch.arange(a.shape[3])
        return ((a - b).square() * (1 + 0.01 * rows + 0.03 * columns)).mean((1, 2, 3))


def _build_lpips(config: dict) -> LPIPS3D:
    return LPIPS3D(LPIPS(config["net"]) if "net" in config else _SliceStandIn())


def _run_lpips(model: LPIPS3D, inputs: dict) -> dict:
    a = inputs["a"].clone().requires_grad_()
    loss = model(a, inputs["b"])
    (grad,) = torch.autograd.grad(loss.mean(), a)
    return {"loss": loss.detach().view(-1, 1, 1, 1), "grad_a": grad}


# ------------------------------------------------------------------------------------------------- golden: transformer


def _build_dit(config: dict) -> DiT3D:
    config = config.get("dit", config)
    in_channels = config["in_channels"]
    return DiT3D(
        in_size=tuple(config["in_size"]),
        patch_size=tuple(config["patch_size"]),
        in_channels=in_channels,
        hidden_size=config["hidden_size"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config.get("mlp_ratio", 4.0),
        num_classes=config["num_classes"],
        label_dropout=config.get("class_dropout_prob", 0.1),
        window_size=config.get("window_size", 0),
        window_blocks=tuple(config.get("window_block_indexes", ())) if config.get("window_size") else (),
        positions="sincos",
        relative_positions=config.get("use_rel_pos", False),
        mask_padding=False,
        out_channels=2 * in_channels if config.get("learn_sigma") else in_channels,
    )


def _build_sized_dit(size: str, config: dict) -> DiT3D:
    return _build_dit(SIZES[size] | config)


def _build_wrapped_dit(config: dict) -> DiT3D:
    """The class that the original's checkpoints hold: the network of a size below the name `model`, two classes."""
    fixed = {"in_size": LATENT_SIZE, "in_channels": 4, "num_classes": 2}
    model = _build_sized_dit(config["model_type"], fixed | config)
    model.upstream_prefix = "model."
    return _with_schedule(model, config)


def _build_dit_and_schedule(config: dict) -> DiT3D:
    return _with_schedule(_build_dit(config), config)


def _with_schedule(model: DiT3D, config: dict) -> DiT3D:
    model.upstream_config = config
    return model


def _schedule(config: dict) -> schedulers.Schedule:
    kind, steps = config.get("schedule_type", "linear"), config.get("time_num", 1000)
    return schedulers.make_schedule(kind, steps, config.get("beta_start", 1e-4), config.get("beta_end", 0.02))


def _run_dit(model: DiT3D, inputs: dict) -> dict:
    with torch.no_grad():
        return {"out": model.eval()(inputs["x"], torch.tensor(inputs["t"]), torch.tensor(inputs["y"]))}


def _run_guided_dit(model: DiT3D, inputs: dict) -> dict:
    """The original guides three of the four channels and returns the others as they are; ours guides all."""
    n = len(inputs["x"]) // 2
    x, t, y = inputs["x"][:n], torch.tensor(inputs["t"]), torch.tensor(inputs["y"])
    with torch.no_grad():
        cond, uncond = model.eval()(x, t[:n], y[:n]), model(x, t[n:], y[n:])
        guided = schedulers.guided(lambda x, t: cond, lambda x, t: uncond, inputs["cfg_scale"])(x, t)
    out = torch.cat([torch.cat([guided[:, :3], rest[:, 3:]], dim=1) for rest in (cond, uncond)])
    return {"out": out, "cond": cond, "uncond": uncond}


def _run_dit_loss(model: DiT3D, inputs: dict) -> dict:
    """Through the loss of diffusion/trainer.py."""
    from neuroldm3d.diffusion import trainer  # here, because it imports this module

    z, noise, schedule = inputs["z"], inputs["noise"], _schedule(model.upstream_config)
    t, label = torch.tensor(inputs["t"]), torch.tensor(inputs["y"])
    if "label_drop_draws" in inputs:
        label = drop_labels(label, torch.tensor(inputs["label_drop_draws"]), 0.1, model.null_label)
    per_sample = trainer.dit_loss(model.train(), schedule, z, label, t, noise, model.upstream_config["loss_type"])
    per_sample.mean().backward()
    out = {"x_t": schedulers.q_sample(schedule, z, t, noise)}
    out |= {"loss_per_sample": per_sample.detach(), "loss": per_sample.detach().mean()}
    return out | _gradients(model)


def _run_dit_sampling(model: DiT3D, inputs: dict) -> dict:
    label = torch.tensor(inputs["label"])  # of length 1 for the whole batch
    with torch.no_grad():
        return _ancestral(lambda x, t: model.eval()(x, t, label), model.upstream_config, inputs)


def _run_label_drop(config: dict, inputs: dict) -> dict:
    label, null, rate = torch.tensor(inputs["labels"]), config["num_classes"], config["dropout_prob"]
    forced = torch.tensor(inputs["force_drop_ids"]) == 1
    return {
        "dropped": drop_labels(label, torch.tensor(inputs["draws"]), rate, null),
        "forced": drop_labels(label, 1.0 - forced.float(), rate, null),
    }


def _run_positions(config: dict, inputs: dict) -> dict:
    t = torch.tensor(inputs["t"])
    # A case names the widths it wants only in its outputs.
    waves = {f"time_{width}": sinusoidal_embedding(t, width, cos_first=True) for width in range(2, 1025)}
    return waves | {"pos_embed": sincos_positions(config["embed_dim"], tuple(config["grid"]))}


def _run_tokens(config: dict, inputs: dict) -> dict:
    shape, dit = inputs["grid_shape"], config["dit"]
    numbers = torch.arange(float(np.prod(shape))).reshape(shape)
    windows, padded = split_windows(numbers, config["window_size"])
    if not torch.equal(merge_windows(windows, padded, tuple(shape[1:4])), numbers):
        raise ValueError("merged windows differ from the grid")
    tokens = torch.arange(float(np.prod(inputs["tokens_shape"]))).reshape(inputs["tokens_shape"])
    grid = tuple(n // p for n, p in zip(dit["in_size"], dit["patch_size"], strict=True))
    return {
        "windows": windows,
        "padded": torch.tensor(padded),
        "volume": unpatchify(tokens, grid, tuple(dit["patch_size"])),
    }


# --------------------------------------------------------------------------------------------------- golden: diffusion

CLIP = 0.5  # the original's bound on the predicted x_0 where it clips


def _analytic_denoiser(x: Tensor, t: Tensor) -> Tensor:
    return 0.3 * x + (0.01 * torch.sin(t.double())).to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def _posterior(schedule: schedulers.Schedule) -> dict[str, Tensor]:
    previous = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_bar[:-1]])
    c_x0, c_xt, variance, _ = schedulers.posterior_coefficients(schedule.alphas_bar, previous)
    return {"prev": previous, "c_x0": c_x0, "c_xt": c_xt, "variance": variance}


def _run_tables(config: dict, inputs: dict) -> dict:
    schedule = _schedule(config)
    bar, posterior = schedule.alphas_bar, _posterior(schedule)
    return {
        "np_betas": schedule.betas,
        "betas": schedule.betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": posterior["prev"],
        "sqrt_alphas_cumprod": bar.sqrt(),
        # From a float32 table as in the original: only for this one do the case's tolerances leave no room for ours.
        "sqrt_one_minus_alphas_cumprod": (1 - bar.float()).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - bar).log(),
        "sqrt_recip_alphas_cumprod": (1 / bar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / bar - 1).sqrt(),
        "posterior_variance": posterior["variance"],
        "posterior_log_variance_clipped": posterior["variance"].clamp(min=1e-20).log(),
        "posterior_mean_coef1": posterior["c_x0"],
        "posterior_mean_coef2": posterior["c_xt"],
    }


def _run_single_steps(config: dict, inputs: dict) -> dict:
    schedule, x, t = _schedule(config), inputs["x"], torch.tensor(inputs["t"])
    table, at = _posterior(schedule), schedulers.at
    x_0 = schedulers.x0_from_eps(schedule, x, t, _analytic_denoiser(x, t))
    out = {"x_t_noised": schedulers.q_sample(schedule, inputs["x0"], t, inputs["noise"]), "x0_pred": x_0}

    def mean(x_0):
        return at(table["c_x0"], t, x) * x_0 + at(table["c_xt"], t, x) * x

    out["mean_clipped"] = mean(x_0.clamp(-CLIP, CLIP))
    variances = {"small": table["variance"], "large": schedule.betas}
    for name, variance in variances.items():
        # Both logarithms are bounded at t = 0: "small" by 1e-20, "large" by the posterior variance of t = 1.
        floor = 1e-20 if name == "small" else table["variance"][1]
        bounded = torch.cat([variance[:1].clamp(min=floor) if name == "small" else floor[None], variance[1:]])
        out[f"mean_fixed{name}"] = mean(x_0)
        out[f"variance_fixed{name}"] = variance[t]
        out[f"logvar_fixed{name}"] = bounded.log()[t]
        samples = zip(x[:, None], t.tolist(), inputs["noise"][:, None], strict=True)
        out[f"step_fixed{name}"] = torch.cat([_one_step(schedule, *sample, name) for sample in samples])
    return out


def _one_step(schedule, x_t: Tensor, t: int, noise: Tensor, variance: str) -> Tensor:
    """x after the ancestral step at t: of a run of two steps, seen between them."""
    seen = []
    end = schedulers.ddpm_sample(
        _analytic_denoiser,
        x_t,
        schedule,
        [t, t - 1] if t else [0],
        variance=variance,
        noise=lambda index, shape: noise,
        callback=lambda index, step, x, x_0: seen.append(x),
    )
    return seen[1] if t else end


def _run_sampling(config: dict, inputs: dict) -> dict:
    return _ancestral(_analytic_denoiser, config, inputs)


def _ancestral(denoise: Callable, config: dict, inputs: dict) -> dict:
    """The last state of the full chain, and the frames the original keeps of it."""
    schedule, frames = _schedule(config), []
    variance = config.get("model_var_type", "fixedsmall").removeprefix("fixed")

    def keep(index, t, x_t, x_0):
        before = t + 1  # the step that led here
        if before == schedule.T or before in (999, 970, 950) or before % 100 == 0:
            frames.append(x_t)

    x = schedulers.ddpm_sample(
        denoise,
        inputs["start"],
        schedule,
        variance=variance,
        noise=lambda index, shape: inputs["noise_<t>"](t=schedule.T - 1 - index),
        callback=keep,
    )
    return {"x": x, "frames": torch.stack([*frames, x])}


def _run_ema(config: dict, inputs: dict) -> dict:
    def average(decay, names):
        raw = nn.ParameterList([inputs["ema0"].clone()])
        ema = EMA(raw, decay)
        for name in names:
            raw[0].data.copy_(inputs[name])
            ema.update(raw)
        return ema.module[0]

    return {"one_step_0.9999": average(0.9999, ["p1"]), "three_steps_0.9": average(0.9, ["p1", "p2", "p3"])}


# ------------------------------------------------------------------------------------------ golden: classifiers


def _build_efficientnet(config: dict) -> EfficientNetV2L:
    slices = 115  # the original's stem takes exactly these
    return EfficientNetV2L(config.get("in_channels", slices), config["dropout_rate"], DROP_PATH)


def _build_cnn3d(config: dict) -> CNN3D:
    return CNN3D(tuple(config["filters"] or FILTERS), config["dropout_rate"], config["num_classes"])


def _run_efficientnet(model: EfficientNetV2L, inputs: dict) -> dict:
    stages = []
    hooks = [stage.register_forward_hook(lambda module, x, y: stages.append(y)) for stage in model.features]
    with torch.no_grad():
        logit = model.eval()(inputs["x"])
    for hook in hooks:
        hook.remove()
    return {
        "logit": logit,
        "features": stages[-1],
        "stage_mean": torch.stack([y.double().mean() for y in stages]),
        "stage_std": torch.stack([y.double().std(correction=0) for y in stages]),
        "stochastic_depth_p": torch.tensor(model.drop_path_rates(), dtype=torch.float64),
    }


def _run_cnn3d(model: CNN3D, inputs: dict) -> dict:
    with torch.no_grad():
        return {"logit": model.eval()(inputs["x"]), "features": model.features.maps(inputs["x"])}


def _run_classifier_loss(model: EfficientNetV2L | CNN3D, inputs: dict) -> dict:
    """Loss and every gradient; cases without dropout are in train mode (batch statistics, no stochastic depth)."""
    model.train(all(m.p == 0 for m in model.modules() if isinstance(m, nn.Dropout)))
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    logit = model(inputs["x"])
    labels = torch.tensor(inputs["labels"], dtype=torch.float32)
    loss = nn.functional.binary_cross_entropy_with_logits(logit[:, 0], labels)
    loss.backward()
    grads = to_upstream(model, {key: p.grad for key, p in model.named_parameters()})
    out = {"logit": logit.detach(), "loss": loss.detach()} | {f"grad:{key}": grad for key, grad in grads.items()}
    for key, value in to_upstream(model).items():
        layer, _, name = key.rpartition(".")
        if name in ("running_mean", "running_var"):
            out[f"{name}_after:{layer}"] = value
    return out


def _run_classification_metrics(config: dict, inputs: dict) -> dict:
    labels = (inputs["labels"] > 0.1).long()
    scores = torch.sigmoid(0.8 * labels.double() - 0.4 + inputs["scores"].double()).numpy().round(2)
    names = ("accuracy", "auc_roc", "auc_pr", "ppv", "sensitivity", "specificity", "precision", "recall", "f1_score")

    def row(threshold):
        found = classifier_metrics.evaluate(labels.numpy(), scores, threshold)
        return [found[name] for name in (*names, "best_threshold")]

    fixed = row(inputs["threshold"])
    return {"fixed": fixed, "youden": row(fixed[-1]), "labels_used": labels, "scores_used": scores}


def _run_delong(config: dict, inputs: dict) -> dict:
    m, labels = classifier_metrics, (inputs["labels"] > 0).long().numpy()
    scores = (0.7 * labels + inputs["scores"].double().numpy()).round(1)
    areas, covariance = m.delong(labels, scores)
    paired = [m.z_test(*m.difference(areas, covariance, i, j)) for i, j in combinations(range(len(scores)), 2)]
    p_values = [p for _, p in paired]
    delta, se = m.difference(areas, covariance, 0, 1)
    called = scores >= 0.35
    return {
        "auc": areas,
        "cov": covariance,
        "ci": m.auc_interval(areas, covariance),
        "paired": paired,
        "holm": m.holm(p_values),
        "bh": m.benjamini_hochberg(p_values),
        "se_diff": se,
        "tost": m.tost(delta, se, inputs["margin"]),
        "non_inferiority": m.non_inferiority(delta, se, inputs["margin"]),
        "mcnemar": m.mcnemar(labels, called[0], called[1]),
        "mde": m.minimum_detectable_effect(se),
        "power": m.power_at(delta, se),
        "bootstrap": m.bootstrap_auc(labels, scores, seed=inputs["bootstrap_seed"], resamples=5),
        "labels_used": labels,
        "scores_used": scores,
    }


def _run_saliency(config: dict, inputs: dict) -> dict:
    """Maps of the analytic classifier of the case; the mean over the sample's entries is part of its formula."""
    from neuroldm3d.classifier import attribution  # here, because captum takes a second to import

    x, w, v = (inputs[name] for name in ("x", "w", "v"))
    axes, n = tuple(range(1, x.ndim)), x[0].numel()

    def network(x):
        linear = 2 * (w * x).sum(axes, keepdim=True) / n**0.5
        return (linear.tanh() + 0.25 * (v * x**2).mean(axes, keepdim=True)).flatten(1)

    out = {"logit": network(x), "logit_zero_input": network(torch.zeros_like(x))}
    for method in ("input_x_gradient", "saliency", "integrated_gradients"):
        out[method] = attribution.attribute(network, x, method)
        out[f"stats:{method}"] = list(attribution.statistics(out[method][0]).values())
    return out


def _run_learning_rates(config: dict, inputs: dict) -> dict:
    settings = {"vae": (1e-4, 5, 2, 5e-6), "classifier": (1e-3, 25, 2, 1e-5)}
    return {name: [training.restart_cosine(epoch, *s) for epoch in range(100)] for name, s in settings.items()}


# ------------------------------------------------------------------------------------------- golden: evaluation
# Imports lie in the functions: whoever loads a checkpoint needs no figures and no Inception network.


def _run_fid(config: dict, inputs: dict) -> dict:
    from common.fid import FeatureStats, frechet_distance

    out = {}
    for i in range(sum(name.startswith("real_") for name in inputs)):
        real, fake = inputs[f"real_{i}"], 1.3 * inputs[f"synthetic_{i}"] + 0.2
        n = min(len(real), len(fake))  # it cuts to the shorter list; per_slice_fid.py draws sets of one size
        real, fake = real[:n], fake[:n]
        out[f"fid_{i}"] = frechet_distance(FeatureStats().update(real), FeatureStats().update(fake))
    return out


def _run_fid_slices(config: dict, inputs: dict) -> dict:
    from neuroldm3d.diffusion.evaluation import Scaling
    from neuroldm3d.diffusion.inception import network_input

    zscore = preprocess.Preparation(norm="zscore")
    scale, scale_8 = (
        Scaling(SimpleNamespace(scaling="minmax", window=(), eight_bit=rounds), zscore) for rounds in (False, True)
    )
    volume = (0.25 + 0.25 * inputs["volume"]).clamp(min=0).numpy()
    prepared = preprocess.prepare(nifti.Volume(volume, np.diag([-1.5, 1.5, 1.5, 1.0])), zscore)
    image = torch.from_numpy(scale_8(inputs["slice"].numpy()))
    return {
        "real_volume": scale(prepared.data),
        "synthetic_volume": scale(inputs["synthetic"].numpy()),
        "inception_input": network_input(image[None], "torchvision")[0],
    }


def _run_memorisation(config: dict, inputs: dict) -> dict:
    from neuroldm3d.diffusion import memorisation

    train, real, fake = inputs["train"], inputs["real"], inputs["fake0"]
    fake = 0.6 * fake + 0.4 * train[torch.arange(len(fake)) % len(train)]
    out = {}
    for name, rows in (("real", real), ("fake", fake)):
        out[f"d_{name}"], out[f"nn_{name}"] = memorisation.nearest(memorisation.distance_matrix(rows, train))
        out[f"self_{name}"] = memorisation.nearest_within(rows)
        out[f"describe_{name}"] = list(memorisation.describe(out[f"d_{name}"]).values())
    found = memorisation.compare(out["d_real"], out["d_fake"])
    below = [found["thresholds"][name] for name in ("min", "5%", "1%")]
    names = ("ks_stat", "ks_p", "mwu_two_sided_p", "mwu_fake_less_p", "median_ratio")
    out["compare"] = [*(found[name] for name in names), *(t["share"] for t in below), below[0]["count"]]
    out["diversity_ratio"] = np.median(out["self_fake"]) / np.median(out["self_real"])
    out["distinct_train_neighbours"] = [len(np.unique(out[f"nn_{name}"])) for name in ("real", "fake")]
    return out


def _run_reconstruction_metrics(config: dict, inputs: dict) -> dict:
    from neuroldm3d.VAE.evaluation import errors, to_unit_range

    real = inputs["real"]
    recon = real + 0.1 * inputs["error"]
    rows = [errors(x[0].numpy(), y[0].numpy(), data_range=1.0) for x, y in zip(real, recon, strict=True)]
    columns = {"mse": "mse", "mae": "mae", "psnr": "psnr_own_range"}
    out = {name: [row[ours] for row in rows] for name, ours in columns.items()}
    out["unit_real"], out["unit_recon"] = to_unit_range(real, recon)
    return out


# ------------------------------------------------------------------------------------------- golden: data


def _from_file(tensor: Tensor) -> nifti.Volume:
    """The volume that a case of preprocessing writes to disk, on a grid in the order of the file."""
    return nifti.Volume((0.25 + 0.25 * tensor).clamp(min=0).numpy(), np.diag([-1.5, 1.5, 1.5, 1.0]))


def _crop(config: dict, first: int, last: int) -> preprocess.Preparation:
    """The original's preparation to its slices first .. last - 1."""
    d, w = config["resize"]
    return preprocess.Preparation(shape=(d, last - first, w), crop_start=first, norm="zscore")


def _run_preprocess_vae(config: dict, inputs: dict) -> dict:
    prep = _crop(config, config["slice_start"], config["slice_end"])
    item = preprocess.prepare(_from_file(inputs["volume"]), prep).data[None]  # (1, D, H, W)
    flips = {"none": (False, False), "h": (False, True), "v": (True, False), "hv": (True, True)}
    return {"item": item} | {f"flip_{name}": dataset.flip(item, *axes) for name, axes in flips.items()}


def _run_preprocess_classifier(config: dict, inputs: dict) -> dict:
    margins = (config["pad"], config["pad"])
    data = preprocess.prepare(_from_file(inputs["volume"]), _crop(config, *config["real_slices"])).data
    synthetic = inputs["synthetic"].numpy()[:, slice(*config["synthetic_slices"])]
    up_down, left_right, turn, _ = inputs["augmentation_draws"]
    flipped = preprocess.frame_slices(dataset.flip(data, left_right < 0.5, up_down < 0.5), margins, "zero")
    return {
        "real": preprocess.frame_slices(data, margins, "zero"),
        "synthetic": preprocess.frame_slices(synthetic, margins, "zero"),
        "real_augmented": preprocess.rotate_slices(flipped, 30 * turn - 15, 0.0),
    }


def _run_affine(config: dict, inputs: dict) -> dict:
    affine = preprocess.prepared_affine(np.array(inputs["affine"]), inputs["shape"], preprocess.Preparation())
    return {"affine_out": affine}


def _run_splits(config: dict, inputs: dict) -> dict:
    from neuroldm3d.data_split import two_parts

    groups = np.repeat(["HC", "left", "right"], inputs["label_counts"])
    groups = groups[np.random.RandomState(0).permutation(len(groups))]
    rows = [dataset.Row(Path(f"{i}.nii"), str(i), dataset.LABEL_OF[g], str(g), str(i)) for i, g in enumerate(groups)]
    train, held_out = two_parts(rows, 0.15, 42)
    test, early_stop = two_parts(held_out, 0.37, 7)

    def numbers(part):
        return [int(row.name) for row in part]

    out = {f"val_{len(held_out)}": numbers(held_out), f"test_{len(test)}": numbers(test)}
    out[f"early_stop_{len(early_stop)}"] = numbers(early_stop)
    for name, part in (("train", train), ("val", held_out)):
        out[f"{name}_counts"] = [sum(row.group == g for row in part) for g in ("HC", "left", "right")]
    for n in (n for n in (500, 1000) if n <= len(train)):
        out[f"subsample_{n}"] = numbers(dataset.subsample(train, n, 1000, exact=False))
    for k, fold in enumerate(dataset.folds(held_out, 5, 7)):
        out[f"fold_test_{k}"] = numbers([held_out[i] for i in fold])
    return out


def _run_loader_counts(config: dict, inputs: dict) -> dict:
    batches = []
    for positive, negative, size in inputs["rows_pos_neg_batch"]:
        labels, once = [1] * positive + [0] * negative, int(positive > negative)  # the class visited once
        try:
            drawn = dataset.balanced_batches(labels, size, epoch=0, seed=0)
        except UserError:  # too few rows for a batch
            drawn = []
        visited = [i for batch in drawn for i in batch if labels[i] == once]
        batches.append([len(drawn), len(visited), len(set(visited))])
    counts = [dataset.synthetic_counts(n, 0.423, exact=False) for n in inputs["synthetic_asked"]]
    return {"batches": np.array(batches), "synthetic_hc_tle": np.array(counts)}


# --------------------------------------------------------------------------------- golden: cases of networks (weights)
# The original's module name -> (function(config) -> our network, function(model, inputs) -> outputs).

NETWORKS: dict[str, tuple[Callable, Callable]] = {
    "VAE_Lite": (_build_vae, _run_vae),
    "VAE_Lite + train_one_epoch": (_build_vae, _run_vae_loss),
    "LPIPSLoss3D": (_build_lpips, _run_lpips),
    "DiT": (_build_dit, _run_dit),
    "DiT_S_4": (partial(_build_sized_dit, "DiT-S/4"), _run_dit),
    "DiT_B_4": (partial(_build_sized_dit, "DiT-B/4"), _run_dit),
    "DiT_XL_2": (partial(_build_sized_dit, "DiT-XL/2"), _run_dit),
    "DiT.forward_with_cfg": (_build_dit, _run_guided_dit),
    "Model": (_build_wrapped_dit, _run_dit_loss),
    "GaussianDiffusion.training_losses + DiT": (_build_dit_and_schedule, _run_dit_loss),
    "DiT + GaussianDiffusion.p_sample_loop": (_build_dit_and_schedule, _run_dit_sampling),
    "MRIClassifier (2D, EfficientNetV2-L backbone)": (_build_efficientnet, _run_efficientnet),
    "MRIClassifier + BCEWithLogitsLoss": (_build_efficientnet, _run_classifier_loss),
    "MRIClassifier (3D CNN)": (_build_cnn3d, _run_cnn3d),
    "MRIClassifier (3D CNN) + BCEWithLogitsLoss": (_build_cnn3d, _run_classifier_loss),
}


# ------------------------------------------------------------------------------ golden: cases of functions (no weights)
# The original's module name -> function(config, inputs) -> outputs.

FUNCTIONS: dict[str, Callable] = {
    "MRIDataset (VAE)": _run_preprocess_vae,
    "MRIDataset (classifier)": _run_preprocess_classifier,
    "preprocessed_affine": _run_affine,
    "train_test_split / MRIDataset sub-sampling / StratifiedKFold": _run_splits,
    "BalancedBatchSampler / MRIDataset": _run_loader_counts,
    "FID": _run_fid,
    "load_real_volumes_batch / preprocess_slice_for_inception": _run_fid_slices,
    "nn_mse / describe / compare": _run_memorisation,
    "voxel_metrics / to_unit_range": _run_reconstruction_metrics,
    "kl_divergence / compute_recon_loss": _run_vae_terms,
    "LabelEmbedder.token_drop": _run_label_drop,
    "get_3d_sincos_pos_embed / TimestepEmbedder.timestep_embedding": _run_positions,
    "window_partition / window_unpartition / DiT.unpatchify": _run_tokens,
    "get_betas / GaussianDiffusion": _run_tables,
    "GaussianDiffusion": _run_single_steps,
    "GaussianDiffusion.p_sample_loop": _run_sampling,
    "update_ema": _run_ema,
    "calculate_metrics": _run_classification_metrics,
    "delong_auc_cov and helpers": _run_delong,
    "SaliencyMapGenerator": _run_saliency,
    "CosineAnnealingWarmRestarts as set up by the trainers": _run_learning_rates,
}


def build(module: str, config: dict):
    """Our network for the original's class `module` and its arguments, or for a function its config; else KeyError."""
    return config if module in FUNCTIONS else NETWORKS[module][0](config)


def run(module: str, model, inputs: dict) -> dict:
    """Named outputs of a reference case; `model` is what `build` gave, `inputs` the drawn tensors and literals."""
    if module in FUNCTIONS:
        return FUNCTIONS[module](model, inputs)
    return NETWORKS[module][1](model, inputs)


def not_reproduced(case: dict) -> dict[str, str]:
    """Outputs of an optional case that our program does not give on purpose, with the reason."""
    names, reason = LEFT_OUT.get(case["module"], ((), ""))
    return {name: reason for name in names if name in case["outputs"]}


LEFT_OUT: dict[str, tuple[tuple[str, ...], str]] = {  # the original's module name -> (its outputs, why)
    "update_ema": (
        ("one_step_0.9999", "three_steps_0.9"),
        "ours rounds the last bit otherwise, and the tolerance is less than a float32 bit",
    ),
}
