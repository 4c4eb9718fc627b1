"""Checkpoints and reference cases of the original LAPT programs (2D and volume release) in terms of our modules.

`build`, `load`, `run` are what `python -m tests.golden` calls: our network for the original's class name and arguments,
strict loading from the original's keys, and the named outputs of a reference case. `import_checkpoint` reads a file of
the originals (command: export.py --import_upstream), `to_upstream` gives our weights under the original's names.
Class names that begin with `ldm.` are of the 2D release, with `ldm3d_lapt.` of the volume release.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

import common.checkpoint
from common import blocks3d, runtime, schedulers
from common.blocks3d import sinusoidal_embedding
from common.cli import UserError
from lapt import autoencoder, guide, losses, unet
from lapt.autoencoder import Codebook, PatchDiscriminator, VQAutoencoder
from lapt.conditioner import HalvingBlock, Rescaler, VolumeConditioner
from lapt.dataset import Intensity, window_starts
from lapt.diffusion import LatentModel, build_conditioner, fold, unfold
from lapt.guide import SegmentationGuide
from lapt.unet import PlaneConv, SliceConv, UNet

# -------------------------------------------------------------------------------------------------------- model parts


class VQModel(nn.Module):
    """Everything that the training of the autoencoder holds."""

    def __init__(self, model: VQAutoencoder, discriminator: PatchDiscriminator):
        super().__init__()
        self.model, self.discriminator = model, discriminator


class DiffusionStage(nn.Module):
    """Everything that a diffusion stage holds: the model, the guide and the average of the U-Net (each or None)."""

    def __init__(self, model: LatentModel, guide: SegmentationGuide | None, average: UNet | None):
        super().__init__()
        self.model, self.guide = model, guide
        self._average = [average]  # in a list, because there it is no parameter

    @property
    def average(self) -> UNet | None:
        return self._average[0]


# ------------------------------------------------------------------------------------------------------------ key map
# Our class -> {our submodule or tensor: the original's}. A class that is not listed is a leaf: same names there.


def _plane(ours: str, theirs: str, across: str) -> dict[str, str]:
    """Entries of a PlaneConv, which is two layers in the original."""
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")} | {
        f"{ours}.across": f"{across}.temporal_conv"
    }


BLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "skip": "nin_shortcut"}
MIDDLE = {"middle.0": "mid.block_1", "middle.1": "mid.attn_1", "middle.2": "mid.block_2"}
NAMES: dict[type[nn.Module], dict[str, str]] = {
    VQModel: {"model": "", "discriminator": "loss.discriminator"},
    VQAutoencoder: {
        "encoder": "encoder",
        "to_code": "quant_conv",
        "codebook": "quantize",
        "from_code": "post_quant_conv",
        "decoder": "decoder",
    },
    autoencoder.ResidualBlock: BLOCK,
    guide.ResidualBlock: BLOCK | {"time": "temb_proj"},
    autoencoder.Attention: {"norm": "norm", "q": "q", "k": "k", "v": "v", "out": "proj_out"},
    unet.ResidualBlock: {
        "norm1": "in_layers.0",
        **_plane("conv1", "in_layers.2", "in_layers_tem"),
        "time": "emb_layers.1",
        "norm2": "out_layers.0",
        **_plane("conv2", "out_layers.3", "out_layers_tem"),
        "skip": "skip_connection",
    },
    unet.Attention: {
        "norm": "norm",
        "qkv": "qkv",
        "out": "proj_out",
        "qkv_across": "qkv_tem",
        "out_across": "proj_out_tem",
    },
    unet.Up: _plane("conv", "conv", "conv_tem"),
    Rescaler: {"map": "channel_mapper"},
    HalvingBlock: {
        **_plane("conv1", "in_layers.2", "in_layers_tem"),
        **_plane("conv2", "out_layers.3", "out_layers_tem"),
        "skip": "skip_connection",
    },
    LatentModel: {
        "autoencoder": "first_stage_model",
        "conditioner": "cond_stage_model",
        "unet": "model.diffusion_model",
    },
    DiffusionStage: {"model": "", "guide": "segmentation_model"},
}


def _children(module: nn.Module) -> dict[str, str]:
    if isinstance(module, autoencoder.Encoder | autoencoder.Decoder):
        return _half_names(module)
    if isinstance(module, autoencoder.Level | guide.Level):
        names = {f"blocks.{i}": f"block.{i}" for i in range(len(module.blocks))}
        names |= {f"attentions.{i}": f"attn.{i}" for i in range(len(module.attentions))}
        down = isinstance(module.resample, autoencoder.Down | blocks3d.Down)
        return names | {"resample": "downsample" if down else "upsample"}
    if isinstance(module, PatchDiscriminator):
        n = len(module.convs)  # one list there: convolution, activation, then convolution, norm, activation n times
        names = {"conv_in": "main.0", "conv_out": f"main.{3 * n + 2}"}
        names |= {f"convs.{i}": f"main.{3 * i + 2}" for i in range(n)}
        return names | {f"norms.{i}": f"main.{3 * i + 3}" for i in range(n)}
    if isinstance(module, UNet):
        return _unet_names(module)
    if isinstance(module, VolumeConditioner):
        names = {"rescaler": "", "out": "zero_conv_tem"}
        return names | {f"blocks.{i}": f"res_blocks_tem.{i}" for i in range(len(module.blocks))}
    if isinstance(module, SegmentationGuide):
        n = len(module.down)
        names = {"conv_in": "conv_in", "norm_out": "norm_out", "conv_out": "conv_out"} | MIDDLE
        names |= {f"down.{i}": f"down.{i}" for i in range(n)} | {f"up.{i}": f"up.{n - 1 - i}" for i in range(n)}
        return {ours: f"model.{theirs}" for ours, theirs in names.items()}
    if type(module) is nn.ModuleDict:
        return {name: name for name, _ in module.named_children()}
    return NAMES.get(type(module), {})


def _half_names(module: autoencoder.Encoder | autoencoder.Decoder) -> dict[str, str]:
    names = {"conv_in": "conv_in", "norm_out": "norm_out", "conv_out": "conv_out"} | MIDDLE
    if isinstance(module, autoencoder.Encoder):
        names |= {f"levels.{i}": f"down.{i}" for i in range(len(module.levels))}
        own = "stems"
    else:
        names |= {f"levels.{i}": f"up.{len(module.levels) - 1 - i}" for i in range(len(module.levels))}
        own = "heads"
    for modality in (0, 1):  # each of the two is there if the modalities are separate
        convs = {0: "0.0", 2: "1.0", 4: "2"}
        names |= {f"{own}.{modality}.{i}": f"conv_mod{modality + 1}.{theirs}" for i, theirs in convs.items()}
    return names


def _unet_names(module: UNet) -> dict[str, str]:
    names = {"time1": "time_embed.0", "time2": "time_embed.2", "norm_out": "out.0"}
    names |= _plane("conv_out", "out.2", "out_tem")
    parts = [
        ("input_stages", "input_blocks", module.input_stages),
        ("output_stages", "output_blocks", module.output_stages),
    ]
    stages = [(f"{a}.{i}", f"{b}.{i}", stage) for a, b, both in parts for i, stage in enumerate(both)]
    for ours, theirs, stage in [*stages, ("middle", "middle_block", module.middle)]:
        for i, layer in enumerate(stage):
            if isinstance(layer, PlaneConv):
                names |= _plane(f"{ours}.{i}", f"{theirs}.{i}.op", f"{theirs}.{i}.op_tem")
            else:
                names[f"{ours}.{i}"] = f"{theirs}.{i}"
    return names | _plane("input_stages.0.0", "input_blocks.0.0", "input_blocks.0.1")  # the first convolution


def key_map(model: nn.Module) -> dict[str, str]:
    """Our state-dict key -> the original's key, for every entry of `model` that the original has."""
    return common.checkpoint.renamed_keys(model, _children)


def to_upstream(model: nn.Module, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """State dict of `model` (or other values under its keys, for example gradients) under the original's names.

    Of a whole diffusion stage with the noise schedule's tables and the average, as its checkpoints have them.
    """
    names, own = key_map(model), model.state_dict() if state_dict is None else state_dict
    state = {names[key]: value for key, value in own.items() if key in names}
    if isinstance(model, DiffusionStage) and state_dict is None:
        state |= schedule_tables(model.model.schedule)
        if model.average is not None:
            state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(0)}
            state |= {average_key(key): value for key, value in to_upstream(model.average).items()}
    return state


def average_key(key: str) -> str:
    """Name of the average of a parameter of the U-Net, by its name in the original's U-Net: without any dot."""
    return f"model_ema.diffusion_model{key.replace('.', '')}"


def load(model: nn.Module, state_dict: dict[str, Tensor], assign: bool = False) -> nn.Module:
    """Fill `model` from a state dict with the original's keys; returns it.

    Strict: UserError names missing, unexpected and differently shaped entries. Of a diffusion stage the tables of the
    noise schedule must agree too. assign: take over the tensors instead of copying them.
    """
    state = dict(state_dict)
    if isinstance(model, DiffusionStage):
        check_tables(model.model.schedule, {name: state.pop(name) for name in TABLES if name in state})
        averages = {key: state.pop(key) for key in list(state) if key.startswith("model_ema.")}
        if model.average is not None:
            load(model.average, averaged_unet(averages, model.average), assign)
    names = key_map(model)
    common.checkpoint.load_renamed(model, state, names, set(names.values()), assign, partial=True)
    return model


def averaged_unet(averages: dict[str, Tensor], network: UNet) -> dict[str, Tensor]:
    """State dict of the original's U-Net from the `model_ema.` entries of a checkpoint."""
    keys = {average_key(theirs): theirs for theirs in key_map(network).values()}
    rest = averages.keys() - keys.keys() - {"model_ema.decay", "model_ema.num_updates"}
    found = {keys[key]: value for key, value in averages.items() if key in keys}
    return found | {key: averages[key] for key in rest}  # an unexpected one stays visible to the strict loading


# ----------------------------------------------------------------------------------------------------- noise schedule

KINDS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine"}  # the original's name: ours
TABLES = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip


def schedule_tables(schedule: schedulers.Schedule) -> dict[str, Tensor]:
    """The tables that a checkpoint of the original holds, (T,) float32, computed in float64."""
    bar = schedule.alphas_bar
    before = torch.cat([bar.new_ones(1), bar[:-1]])
    c_x0, c_xt, variance, _ = schedulers.posterior_coefficients(bar, before)
    values = (
        schedule.betas, bar, before, bar.sqrt(), (1 - bar).sqrt(), (1 - bar).log(), (1 / bar).sqrt(),
        (1 / bar - 1).sqrt(), variance, variance.clamp(min=1e-20).log(), c_x0, c_xt,
    )  # fmt: skip
    return {name: value.float() for name, value in zip(TABLES, values, strict=True)}


def bound_weights(schedule: schedulers.Schedule) -> Tensor:
    """Weights (T,) of the variational bound that the original logs: beta^2 / (2 sigma^2 alpha (1 - alpha_bar))."""
    tables = schedule_tables(schedule)
    variance = 2 * tables["posterior_variance"] * (1 - schedule.betas).float() * (1 - tables["alphas_cumprod"])
    weights = tables["betas"].square() / variance
    weights[0] = weights[1]
    return weights


def check_tables(schedule: schedulers.Schedule, tables: dict[str, Tensor]) -> None:
    """UserError if tables of a checkpoint are not those of the noise schedule."""
    for name, ours in schedule_tables(schedule).items():
        theirs = tables.get(name)
        if theirs is None or theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-4, atol=1e-6):
            what = "has no" if theirs is None else "has another"
            raise UserError(f"checkpoint {what} table {name} of the noise schedule; check timesteps, beta_start and "
                            "beta_end")  # fmt: skip


def identify_schedule(betas: Tensor) -> dict:
    """Arguments of common.schedulers.make_schedule for the betas of a checkpoint; UserError for an unknown kind."""
    arguments = {"T": len(betas), "beta_start": betas[0].item(), "beta_end": betas[-1].item()}
    for kind in ("scaled_linear", "linear", "cosine"):
        ours = schedulers.make_schedule(kind, **arguments).betas.float()
        if torch.allclose(ours, betas.float(), rtol=1e-4, atol=1e-7):
            return {"kind": kind} | arguments
    raise UserError(
        "the checkpoint's noise schedule is none of scaled_linear, linear and cosine; it cannot be used here"
    )


# ------------------------------------------------------------------------------------------------ the originals' files

# What leaves no trace in the weights: channels per head, slices of a volume, and these.
PUBLISHED_HEADS, PUBLISHED_SLICES = 32, 32
PUBLISHED_VQ = {"norm_groups": 32, "legacy_beta": True, "beta": 0.25}
LEFT_OUT_KEYS = ("loss.perceptual_loss.",)  # the original builds LPIPS even at weight 0


@dataclass
class Imported:
    """What a file of the originals holds, in our networks (on the CPU) and their constructor arguments."""

    kind: str  # "vqgan", "guide" or "ldm" (any diffusion stage)
    networks: dict[str, nn.Module] = field(default_factory=dict)  # "autoencoder", "discriminator", "unet", ...
    settings: dict[str, dict] = field(default_factory=dict)  # by network; of "ldm" also "schedule"
    report: list[str] = field(default_factory=list)  # one line for each part of the file

    def latent_model(self, intensity: Intensity, rt: runtime.Runtime) -> LatentModel:
        """The model that samples, with the original's steps; `intensity`: what the original's files do not hold.

        LDM or post-trained: the original's files do not tell, here the stage is that of the LDM.
        """
        if self.kind != "ldm":
            raise UserError(f"a {self.kind} of the original cannot sample; name a checkpoint of a diffusion stage")
        slices = self.settings["unet"]["slices"] or 0
        stage = "ldm3d" if slices else "ldm"
        settings = {name: self.settings[name] for name in ("autoencoder", "conditioner", "unet", "schedule")}
        sampling = {"spacing": "leading", "offset": 1, "final": "first"}
        settings |= {"sampling": sampling, "stage": stage, "slices": slices}
        parts = (self.networks[name] for name in ("autoencoder", "conditioner", "unet"))
        model = LatentModel(*parts, settings=settings, intensity=intensity, rt=rt)
        model.hash = common.checkpoint.weights_hash(model.state_dict())
        return runtime.frozen_network(model, rt)


def import_checkpoint(
    path,
    *,
    trust_pickle: bool = False,
    weights: str = "ema",
    head_channels: int = PUBLISHED_HEADS,
    slices: int = PUBLISHED_SLICES,
    report: Callable[[str], None] = print,
) -> Imported:
    """Networks of a checkpoint of the originals, whole Lightning file or bare state dict, of any stage.

    Sizes are read from the weights, except head_channels of the U-Net and the number of slices of volume networks.
    weights: "ema" (the U-Net's average where there is one) or "raw". Every tensor must find its place: the parts are
    reported line by line with their numbers and shapes, and a file that fits only partly is a UserError.
    """
    content = common.checkpoint.load(path, trust_pickle=trust_pickle)
    state = content.get("state_dict", content)
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)} if isinstance(state, dict) else {}
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    try:
        if any(key.startswith("model.diffusion_model.") for key in state):
            imported = _import_stage(state, weights, head_channels, slices)
        elif "quantize.embedding.weight" in state:
            imported = _import_vqgan(state)
        elif "model.conv_in.weight" in state:
            imported = Imported("guide")
            _take(imported, "guide", state, "", _identify_guide, SegmentationGuide)
        else:
            raise UserError("none of the original's networks is in it")
        _check_rest(imported, state)
    except (UserError, ValueError, KeyError, IndexError, RuntimeError, ZeroDivisionError) as error:
        what = f"no {error.args[0]}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path} is no checkpoint of the original LAPT that fits: {what}; nothing was imported"
        ) from None
    for line in imported.report:
        report(line)
    return imported


def _take(
    imported: Imported, name: str, state: dict, prefix: str, identify: Callable, make: Callable, source=None
) -> None:
    """Move the entries below `prefix` out of `state` into a network that takes over their tensors.

    source(network): entries to use instead, once these have been found to fit.
    """
    part = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
    arguments = identify(part)
    with torch.device("meta"):
        network = make(**arguments)
    load(network, part, assign=True)
    imported.networks[name] = load(network, source(network), assign=True) if source else network
    imported.settings[name] = arguments
    numbers = sum(value.numel() for value in part.values())
    shown = ", ".join(f"{key} {value}" for key, value in arguments.items())
    imported.report.append(
        f"{prefix or 'whole file':24} {len(part):5} tensors {numbers:13,} numbers -> {name} ({shown})"
    )


def _import_vqgan(state: dict) -> Imported:
    imported = Imported("vqgan")
    _leave_out(imported, state)
    if any(key.startswith("loss.discriminator.") for key in state):
        _take(imported, "discriminator", state, "loss.discriminator.", _identify_discriminator, PatchDiscriminator)
    _take(imported, "autoencoder", state, "", _identify_autoencoder, VQAutoencoder)
    return imported


def _import_stage(state: dict, weights: str, head_channels: int, slices: int) -> Imported:
    imported = Imported("ldm")
    _leave_out(imported, state)
    averages = {key: state.pop(key) for key in list(state) if key.startswith("model_ema.")}
    use = bool(averages) and weights == "ema"
    source = partial(averaged_unet, averages) if use else None
    _take(imported, "autoencoder", state, "first_stage_model.", _identify_autoencoder, VQAutoencoder)
    identify = partial(_identify_unet, head_channels=head_channels, slices=slices)
    _take(imported, "unet", state, "model.diffusion_model.", identify, UNet, source)
    how = "left out, raw weights were asked for" if averages else "raw weights are used"
    how = "used for the U-Net" if use else how
    imported.report.append(f"{'model_ema.':24} {len(averages):5} tensors of the average: {how}")
    volume = any(key.startswith("cond_stage_model.res_blocks_tem.") for key in state)
    stages = len(imported.settings["autoencoder"]["channel_mult"]) - 1
    identify = partial(_identify_conditioner, stages=stages, slices=slices if volume else None,
                       unet_settings=imported.settings["unet"])  # fmt: skip
    make = VolumeConditioner if volume else Rescaler
    _take(imported, "conditioner", state, "cond_stage_model.", identify, make)
    if any(key.startswith("segmentation_model.") for key in state):
        _take(imported, "guide", state, "segmentation_model.", _identify_guide, SegmentationGuide)
    tables = {name: state.pop(name) for name in TABLES if name in state}
    imported.settings["schedule"] = identify_schedule(tables["betas"])
    check_tables(schedulers.make_schedule(**imported.settings["schedule"]), tables)
    shown = ", ".join(f"{key} {value}" for key, value in imported.settings["schedule"].items())
    imported.report.append(f"{'noise schedule':24} {len(tables):5} tables agree ({shown})")
    return imported


def _leave_out(imported: Imported, state: dict) -> None:
    for prefix in LEFT_OUT_KEYS:
        if found := [key for key in state if key.startswith(prefix)]:
            imported.report.append(
                f"{prefix:24} {len(found):5} tensors left out: a pretrained network that is not used"
            )
        for key in found:
            del state[key]


def _check_rest(imported: Imported, state: dict) -> None:
    if imported.kind == "ldm" and state:
        raise UserError(f"{len(state)} unexpected entries, first {min(state)}")


def _numbered(state: dict, pattern: str) -> int:
    """How many values the number in `pattern` ("{}") takes, counted from 0."""
    found = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
    return 1 + max((int(match.group(1)) for key in state if (match := found.match(key))), default=-1)


def _multipliers(widths: list[int], base: int) -> list[int]:
    if any(width % base for width in widths):
        raise ValueError(f"widths {widths} are no multiples of the first, {base}")
    return [width // base for width in widths]


def _identify_autoencoder(state: dict) -> dict:
    separate = "encoder.conv_mod1.0.0.weight" in state
    n, base = _numbered(state, "encoder.down.{}."), len(state["encoder.conv_in.weight"])
    widths = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(n)]
    stem, head = ("conv_mod1.0.0", "conv_mod1.2") if separate else ("conv_in", "conv_out")
    per_stem = 2 if separate else 1
    return {
        "in_channels": per_stem * state[f"encoder.{stem}.weight"].shape[1],
        "out_channels": per_stem * len(state[f"decoder.{head}.weight"]),
        "channels": base,
        "channel_mult": _multipliers(widths, base),
        "num_res_blocks": _numbered(state, "encoder.down.0.block.{}."),
        "z_channels": len(state["encoder.conv_out.weight"]),
        "embed_dim": len(state["quant_conv.weight"]),
        "n_embed": len(state["quantize.embedding.weight"]),
        "attention_levels": [i for i in range(n) if f"encoder.down.{i}.attn.0.q.weight" in state],
        "modality_separate": separate,
        **PUBLISHED_VQ,
    }


def _identify_discriminator(state: dict) -> dict:
    channels, in_channels = state["main.0.weight"].shape[:2]
    layers = sum(key.endswith(".running_mean") for key in state)
    return {"in_channels": in_channels, "channels": channels, "layers": layers}


def _identify_unet(state: dict, head_channels: int, slices: int) -> dict:
    base, blocks = state["time_embed.0.weight"].shape[1], _numbered(state, "input_blocks.{}.")
    levels = [[]]  # numbers of the residual blocks of each level
    for i in range(1, blocks):
        if f"input_blocks.{i}.0.op.weight" in state:
            levels.append([])
        else:
            levels[-1].append(i)
    firsts = [numbers[0] for numbers in levels]
    attended = [2**level for level, i in enumerate(firsts) if f"input_blocks.{i}.1.qkv.weight" in state]
    return {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": len(state["out.2.weight"]),
        "model_channels": base,
        "channel_mult": _multipliers([len(state[f"input_blocks.{i}.0.in_layers.2.weight"]) for i in firsts], base),
        "num_res_blocks": len(levels[0]),
        "attention_resolutions": attended,
        "head_channels": head_channels,
        "slices": slices if "out_tem.temporal_conv.weight" in state else None,
    }


def _identify_conditioner(state: dict, stages: int, slices: int | None, unet_settings: dict) -> dict:
    condition = unet_settings["in_channels"] - unet_settings["out_channels"]
    mapped = state.get("channel_mapper.weight")
    found = {"in_channels": condition if mapped is None else mapped.shape[1], "stages": stages}
    found["out_channels"] = None if mapped is None else len(mapped)
    if slices is None:
        return found | {"bias": "channel_mapper.bias" in state}
    width = len(state["res_blocks_tem.0.in_layers.2.weight"])
    return found | {"stages": _numbered(state, "res_blocks_tem.{}."), "model_channels": width, "slices": slices}


def _identify_guide(state: dict) -> dict:
    n, base = _numbered(state, "model.down.{}."), len(state["model.conv_in.weight"])
    widths = [len(state[f"model.down.{i}.block.0.conv1.weight"]) for i in range(n)]
    return {
        "in_channels": state["model.conv_in.weight"].shape[1],
        "out_channels": len(state["model.conv_out.weight"]),
        "channels": base,
        "channel_mult": _multipliers(widths, base),
        "num_res_blocks": _numbered(state, "model.down.0.block.{}."),
        "attention_levels": [i for i in range(n) if f"model.down.{i}.attn.0.q.weight" in state],
        "norm_groups": 16,
        "timestep_projections": "model.mid.block_1.temb_proj.weight" in state,
    }


# ----------------------------------------------------------------------------------------- golden: building networks


def _arguments(config: dict, names: dict[str, str], fixed: dict | None = None, inert=()) -> dict:
    """Our constructor arguments from the original's: renamed; KeyError for those that we do not have.

    fixed: arguments with the value with which alone the original was ever built; inert: without effect there.
    """
    fixed = fixed or {}
    unknown = config.keys() - names.keys() - fixed.keys() - set(inert)
    if odd := [*unknown, *(name for name, value in fixed.items() if config.get(name, value) != value)]:
        raise KeyError(f"{', '.join(sorted(odd))}: never used, and not implemented")
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def _attention_levels(dd: dict) -> list[int]:
    """Levels whose nominal resolution is among those that attend."""
    return [i for i in range(len(dd["ch_mult"])) if dd["resolution"] // 2**i in dd["attn_resolutions"]]


def _vq_arguments(config: dict) -> dict:
    names = {"embed_dim": "embed_dim", "n_embed": "n_embed", "modality_separate": "modality_separate"}
    rest = {key: value for key, value in config.items() if key not in ("ddconfig", "lossconfig")}
    sizes = {"z_channels": "z_channels", "in_channels": "in_channels", "out_ch": "out_channels", "ch": "channels",
             "ch_mult": "channel_mult", "num_res_blocks": "num_res_blocks"}  # fmt: skip
    fixed = {"double_z": False, "dropout": 0, "resamp_with_conv": True}
    found = _arguments(rest, names, inert=("image_key",))
    found |= _arguments(config["ddconfig"], sizes, fixed, inert=("resolution", "attn_resolutions"))
    return found | {"attention_levels": _attention_levels(config["ddconfig"]), "legacy_beta": True}


def _build_vq(config: dict) -> nn.Module:
    model, loss = VQAutoencoder(**_vq_arguments(config)), config["lossconfig"]
    if loss["target"] == "torch.nn.Identity":
        return model
    names = {"disc_in_channels": "in_channels", "disc_ndf": "channels", "disc_num_layers": "layers"}
    inert = ("disc_start", "disc_weight", "codebook_weight")
    fixed = {"disc_conditional": False, "perceptual_weight": 0, "disc_factor": 1.0, "disc_loss": "hinge"}
    discriminator = PatchDiscriminator(**_arguments(loss["params"], names, fixed, inert))
    return _with_config(VQModel(model, discriminator), loss["params"])


def _build_codebook(config: dict) -> Codebook:
    found = _arguments(config, {"n_e": "n_embed", "e_dim": "embed_dim", "beta": "beta", "legacy": "legacy_beta"},
                       inert=("sane_index_shape",))  # fmt: skip
    return _with_config(Codebook(**found), config)


def _build_discriminator(config: dict) -> PatchDiscriminator:
    names = {"input_nc": "in_channels", "ndf": "channels", "n_layers": "layers"}
    return PatchDiscriminator(**_arguments(config, names, {"use_actnorm": False}))


def _rescaler_arguments(config: dict) -> dict:
    names = {"n_stages": "stages", "in_channels": "in_channels", "out_channels": "out_channels", "bias": "bias",
             "method": "method"}  # fmt: skip
    return {"stages": 1, "in_channels": 3, "out_channels": None} | _arguments(config, names, {"multiplier": 0.5})


def _build_rescaler(config: dict) -> nn.Module:
    if all(isinstance(part, dict) for part in config.values()):  # several, numbered
        return nn.ModuleDict({name: Rescaler(**_rescaler_arguments(part)) for name, part in config.items()})
    return Rescaler(**_rescaler_arguments(config))


def _conditioner_arguments(config: dict) -> dict:
    names = {"n_stages": "stages", "in_channels": "in_channels", "out_channels": "out_channels",
             "model_channels": "model_channels", "temporal_length": "slices"}  # fmt: skip
    return _arguments(config, names, {"multiplier": 0.5, "method": "bilinear", "bias": False})


def _build_slice_convs(config: dict) -> nn.ModuleDict:
    """Numbered layers, each under the original's name of it; a kernel of 1 is no layer at all."""

    def make(part):
        names = {"dim": "channels", "temporal_length": "slices", "temporal_kernel_size": "kernel_size"}
        found = _arguments(part, names, inert=("kernel_size",))
        found["kernel_size"] = found.get("kernel_size") or part.get("kernel_size", 3)
        return {"temporal_conv": SliceConv(**found)} if found["kernel_size"] > 1 else {}

    return nn.ModuleDict({name: nn.ModuleDict(make(part)) for name, part in config.items()})


UNET_FIXED = {  # arguments with which alone the original was ever built
    "dropout": 0, "conv_resample": True, "dims": 2, "num_classes": None, "use_scale_shift_norm": False,
    "resblock_updown": False, "use_new_attention_order": False, "use_spatial_transformer": False, "legacy": True,
}  # fmt: skip


def _unet_arguments(config: dict) -> dict:
    same = ("in_channels", "out_channels", "model_channels", "attention_resolutions", "num_res_blocks", "channel_mult")
    names = {name: name for name in same} | {"num_head_channels": "head_channels", "temporal_length": "slices"}
    inert = ("image_size", "use_checkpoint", "use_fp16")
    return {"channel_mult": (1, 2, 4, 8)} | _arguments(config, names, UNET_FIXED, inert)


def _build_guide(config: dict) -> SegmentationGuide:
    names = {"in_channels": "in_channels", "out_ch": "out_channels", "ch": "channels", "ch_mult": "channel_mult",
             "num_res_blocks": "num_res_blocks"}  # fmt: skip
    fixed = {"dropout": 0, "use_timestep": False, "resamp_with_conv": True}
    found = _arguments(config["ddconfig"], names, fixed, inert=("resolution", "attn_resolutions"))
    levels = _attention_levels(config["ddconfig"])
    return SegmentationGuide(**found, attention_levels=levels, timestep_projections=True)


def _schedule(config: dict) -> schedulers.Schedule:
    kind = KINDS[config.get("beta_schedule", "linear")]
    return schedulers.make_schedule(kind, config["timesteps"], config["linear_start"], config["linear_end"])


def _build_stage(config: dict) -> nn.Module | dict:
    """A whole diffusion stage; without networks the config itself, for cases of the schedule and its formulas."""
    if "unet_config" not in config:
        return config
    settings = {
        "autoencoder": _vq_arguments(config["first_stage_config"]["params"]),
        "unet": _unet_arguments(config["unet_config"]["params"]),
        "schedule": {
            "kind": KINDS[config.get("beta_schedule", "linear")], "T": config["timesteps"],
            "beta_start": config["linear_start"], "beta_end": config["linear_end"],
        },
        "sampling": {"spacing": "leading", "offset": 1, "final": "first"},
        "stage": "ldm",
    }  # fmt: skip
    condition = config["cond_stage_config"]
    arguments = {"SpatialRescaler": _rescaler_arguments, "VolumeConditioner": _conditioner_arguments}
    settings["conditioner"] = arguments[condition["target"].rpartition(".")[2]](condition["params"])
    settings["slices"] = settings["unet"].get("slices") or 0
    unit = {"low": 0.0, "high": 1.0, "mean": 0.0, "sd": 1.0}  # of no data
    intensity = Intensity(
        "zscore", "training", {"dwi": unit, "adc": unit}, (0, 200), condition["params"]["in_channels"]
    )
    make_unet = partial(UNet, **settings["unet"])
    model = LatentModel(
        VQAutoencoder(**settings["autoencoder"]), build_conditioner(settings["conditioner"]), make_unet(),
        settings=settings, intensity=intensity, rt=runtime.Runtime(torch.device("cpu")),
    )  # fmt: skip
    segmentation = config.get("segmentation_model_config")
    network = _build_guide(segmentation["params"]) if segmentation else None
    average = make_unet() if config.get("use_ema", True) else None
    return _with_config(DiffusionStage(model, network, average), config)


def _with_config(model: nn.Module, config: dict) -> nn.Module:
    model.upstream_config = config
    return model


# ------------------------------------------------------------------------------------------ golden: running networks


def _gradients(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Gradients under the original's names, which begin with `prefix`; clears them."""
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {f"{prefix}{key}": grad for key, grad in to_upstream(model, grads).items()}


@torch.no_grad()
def _run_vq(model: VQAutoencoder, inputs: dict) -> dict:
    model.eval()
    latent, jitter = model.encode(inputs["x"]), inputs["jitter"]
    codes = model.codebook.embedding.weight
    pixels = latent.movedim(1, -1).flatten(0, 2)
    nearest = torch.cdist(pixels.double(), codes.double()).square().topk(2, largest=False).values
    positions = (37 * torch.arange(len(pixels)) + 11) % len(codes)
    z = model.codebook.entries(positions.view(jitter.shape[0], *jitter.shape[2:])) + jitter
    quantised, _, indices = model.quantize(latent)
    return {
        "latent": latent,
        "indices": indices.flatten(),
        "index_gap": nearest[:, 1] - nearest[:, 0],
        "image_from_codes": model.decode(z),
        "image_unquantised": model.decode_codes(latent),
        "reconstruction": model.decode(latent),
        "quantised": quantised,
    }


def _run_codebook(model: Codebook, inputs: dict) -> dict:
    z, weight = inputs["z"].requires_grad_(), model.embedding.weight
    quantised, loss, indices = model(z)
    grad_z, grad_codes = torch.autograd.grad(loss, (z, weight), retain_graph=True)
    (grad_sum,) = torch.autograd.grad((quantised * inputs["g"]).sum(), z)
    return {
        "quantised": quantised,
        "loss": loss,
        "indices": indices if model.upstream_config["sane_index_shape"] else indices.flatten(),
        "grad_loss_z": grad_z,
        "grad_loss_codebook": grad_codes,
        "grad_sum_z": grad_sum,
        "entries": model.entries(indices),
    }


@torch.no_grad()
def _run_discriminator(model: PatchDiscriminator, inputs: dict) -> dict:
    """In the mode that the case sets."""
    out = {"logits": model(inputs["x"]), "logits_second": model(0.5 * inputs["x"] + 0.1)}
    return out | {f"after:{key}": value for key, value in to_upstream(model).items() if "running" in key}


def _run_vq_losses(model: VQModel, inputs: dict) -> dict:
    """Both steps of the autoencoder's training, before and after the discriminator takes part, and the validation."""
    params, x = model.upstream_config, inputs["x"]
    network, discriminator = model.model, model.discriminator
    weights = {"codebook_weight": params["codebook_weight"], "disc_weight": params["disc_weight"]}
    start = {key: value.clone() for key, value in model.state_dict().items()}
    out = {}

    def generator(takes_part):
        x_hat, codebook_loss = network(x)
        terms = losses.vq_generator_loss(x, x_hat, codebook_loss, discriminator(x_hat), network.last_layer, **weights)
        without = losses.vq_generator_loss(x, x_hat, codebook_loss, None, network.last_layer, **weights)
        return terms | {"x_hat": x_hat, "loss": terms["loss"] if takes_part else without["loss"]}

    def critic(takes_part):
        with torch.no_grad():
            x_hat = network(x)[0]
        real, fake = discriminator(x), discriminator(x_hat)
        loss = takes_part * losses.hinge_discriminator_loss(real, fake)
        return {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}

    def named(terms, takes_part):
        return {
            "total_loss": terms["loss"], "quant_loss": terms["codebook"], "nll_loss": terms["rec"],
            "rec_loss": terms["rec"], "p_loss": torch.zeros(()), "d_weight": terms["d_weight"],
            "disc_factor": torch.tensor(float(takes_part)), "g_loss": terms["adversarial"],
        }  # fmt: skip

    for name, takes_part in (("before", False), ("after", True)):
        model.load_state_dict(start)
        model.train()
        terms = generator(takes_part)
        terms["loss"].backward()
        out |= _gradients(model, f"grad_gen_{name}:")
        values = critic(takes_part)
        values["disc_loss"].backward()
        out |= _gradients(model, f"grad_disc_{name}:")
        out |= {f"gen_{name}:{key}": value.detach() for key, value in named(terms, takes_part).items()}
        out |= {f"disc_{name}:{key}": value.detach() for key, value in values.items()}
        out["reconstruction"] = terms["x_hat"].detach()
    out |= {f"buffers:{key}": value.clone() for key, value in to_upstream(model).items() if "running" in key}
    model.load_state_dict(start)
    model.eval()
    with torch.no_grad():
        out |= {f"val:{key}": value for key, value in (named(generator(True), True) | critic(True)).items()}
    return out


@torch.no_grad()
def _run_many(model: nn.Module, inputs: dict) -> dict:
    """One layer on x, or numbered ones on x0, x1, ..."""
    if not isinstance(model, nn.ModuleDict):
        return {"y": model(inputs["x"])}
    out = {}
    for name, layer in model.items():
        h = inputs[f"x{name}"]
        for part in layer.values() if isinstance(layer, nn.ModuleDict) else [layer]:
            h = part(h)
        out[f"y{name}"] = h
    return out


@torch.no_grad()
def _run_unet(model: UNet, inputs: dict) -> dict:
    statistics = []

    def note(module, args, output):
        statistics.append(torch.stack([output.double().mean(), output.double().std(correction=0)]))

    for stage in (*model.eval().input_stages, model.middle, *model.output_stages):
        stage.register_forward_hook(note)
    y = model(inputs["x"], torch.tensor(inputs["t"]))
    return {"y": y, "stage_stats": torch.stack(statistics)}


def _run_guide(model: SegmentationGuide, inputs: dict) -> dict:
    x, lesion = inputs["x"].requires_grad_(), inputs["lesion"]
    logits = model.eval()(x)
    loss = losses.guide_loss(logits, lesion, alpha=0.1, beta=0.9, gamma=3)
    loss.backward()
    found = logits.detach().sigmoid() > 0.5
    both, either = (found * lesion).sum(), found.sum() + lesion.sum()
    return _gradients(model, "grad:") | {
        "logits": logits.detach(),
        "guide_loss": loss.detach(),
        "training_loss": losses.guide_loss(logits.detach(), lesion, alpha=0.7, beta=0.3, gamma=2),
        "dice": 2 * both / either,
        "iou": both / (either - both),
        "positive_fraction": found.float().mean(),
        "grad_x": x.grad,
        "parameters_without_gradient": sum(not p.requires_grad for p in model.parameters()),
    }


def _run_stage(stage: DiffusionStage | dict, inputs: dict, lapt: bool = False) -> dict:
    if isinstance(stage, dict):
        return _run_schedule(stage, inputs)
    stage.eval()
    if "x_T" in inputs:
        return _run_sampling(stage, inputs)
    return _run_lapt(stage, inputs) if lapt else _run_noise_loss(stage, inputs)


def _noise_terms(model: LatentModel, inputs: dict) -> dict[str, Tensor]:
    """Forward pass of the noise loss from images; volumes are folded, and their slices share a step."""
    mri, ctp, noise = fold(inputs["mri"]), fold(inputs["ctp"]), inputs["noise"]
    t = torch.tensor(inputs["t"]).repeat_interleave(model.slices or 1)
    z_0, c = model.encode(mri), model.condition(ctp)
    z_t = schedulers.q_sample(model.schedule, z_0, t, noise)
    eps_hat = model.denoiser(c)(z_t, t)
    per_item = (eps_hat - noise).square().flatten(1).mean(1)
    return {
        "latent": z_0,
        "condition": c,
        "noised": z_t,
        "noise_prediction": eps_hat,
        "x0_hat": model.predict_clean(z_t, t, eps_hat),
        "loss_simple": per_item.mean(),
        "loss_vlb": (bound_weights(model.schedule)[t] * per_item).mean(),
    }


def _run_noise_loss(stage: DiffusionStage, inputs: dict) -> dict:
    model, raw = stage.model, stage.model.unet
    terms = _noise_terms(model, inputs)
    out = terms | {"loss": terms["loss_simple"]}
    out["loss"].backward()
    out |= _gradients(stage, "grad:")
    if stage.average is not None:
        model.unet = stage.average
        with torch.no_grad():
            averaged = _noise_terms(model, inputs)
        model.unet = raw
        out |= {f"{name}_ema": averaged[name] for name in ("loss_simple", "loss_vlb")}
        out["loss_ema"] = averaged["loss_simple"]
    return {name: value.detach() for name, value in out.items()}


def _run_lapt(stage: DiffusionStage, inputs: dict) -> dict:
    """Post-training loss with the original's choices: its target, reductions and window."""
    config, terms = stage.upstream_config, _noise_terms(stage.model, inputs)
    names = ("original_img_weight", "original_lesion_weight", "img_loss_weight", "lesion_loss_weight")
    image_weight, lesion_weight = [config[name] for name in names if name in config] or (1.0, 10.0)
    weights = {"loss_simple": 1.0, "loss_image": image_weight, "loss_lesion": lesion_weight}
    if stage.guide is None:
        out = terms | _slice_terms(stage.model, terms, inputs)
    else:
        out = terms | _window_terms(stage, terms, inputs)
        weights["loss_seg"] = config["seg_loss_weight"]
    out["loss"] = sum(weight * out[name] for name, weight in weights.items())
    gradients = {}
    for name in ("loss", *weights):
        out[name].backward(retain_graph=True)
        gradients |= _gradients(stage, "grad:" if name == "loss" else f"grad_{name}:")
    nan_terms = [name for name in ("loss_simple", "loss_image", "loss_lesion", "loss") if out[name].isnan()]
    return {name: value.detach() for name, value in out.items()} | gradients | {"nan_terms": nan_terms}


def _slice_terms(model: LatentModel, terms: dict, inputs: dict) -> dict:
    """Through the objective that ldm.py trains with."""
    from lapt import ldm  # here, because it imports every stage

    t, table = torch.tensor(inputs["t"]), losses.timestep_weight(model.schedule, "none")
    options = SimpleNamespace(target="recon", reduction="batch", checkpointing=False)
    z_t, z_0, eps_hat = (terms[name] for name in ("noised", "latent", "noise_prediction"))
    found = ldm.pixel_terms(model, z_t, z_0, eps_hat, t, inputs, [0] * len(t), options, table)
    with torch.no_grad():
        images = {"image_target": model.decode(z_0), "image_hat": model.decode(terms["x0_hat"])}
    return {"loss_image": found["image"], "loss_lesion": found["lesion"]} | images


def _window_terms(stage: DiffusionStage, terms: dict, inputs: dict) -> dict:
    """Of a window of each volume. Our training masks what the guide sees and divides by the window's mask, the original
    neither: hence the terms themselves.
    """
    n = stage.upstream_config["consecutive_slices"]
    chosen = _windows(inputs, n)
    z_0, z_0_hat, lesion = terms["latent"][chosen], terms["x0_hat"][chosen], fold(inputs["lesion"])[chosen]
    with torch.no_grad():
        target = stage.model.decode(z_0)
    image_hat = stage.model.decode(z_0_hat)
    e, logits = (image_hat - target).square(), stage.guide(unfold(image_hat, n))
    return {
        "window_latent": z_0,
        "window_x0_hat": z_0_hat,
        "window_image_hat": image_hat,
        "window_lesion_area": lesion.flatten(1).sum(1),
        "loss_image": losses.image_term(e, fold(inputs["mask"]), reduction="batch"),
        "loss_lesion": losses.lesion_term(e, lesion, reduction="sum"),
        "loss_seg": losses.guide_loss(logits, unfold(lesion, n), alpha=0.1, beta=0.9, gamma=3),
    }


def _windows(inputs: dict, length: int) -> Tensor:
    """Indices of the decoded slices among all folded ones."""
    found, depth = [], inputs["lesion"].shape[-1]
    for volume, (lesion, choice) in enumerate(zip(inputs["lesion"], inputs["window_choice"], strict=True)):
        slices = lesion.sum((0, 1, 2)).nonzero().flatten().tolist()
        start = window_starts(slices, depth, length, rule="upstream")[choice]
        found.append(volume * depth + start + torch.arange(length))
    return torch.cat(found)


@torch.no_grad()
def _run_sampling(stage: DiffusionStage, inputs: dict) -> dict:
    """From the given noise in `ddim_steps` steps, eta 0; with the raw U-Net and with its average."""
    model, raw, out = stage.model, stage.model.unet, {}
    c = model.condition(fold(inputs["ctp"]))
    for name, network in (("", raw), ("_ema", stage.average)):
        model.unet = network
        out[f"latent{name}"] = model.sample(c, inputs["x_T"], inputs["ddim_steps"])
        out[f"image{name}"] = model.decode(out[f"latent{name}"])
    model.unet = raw
    if "means" in inputs:  # volumes: the average alone, in physical units
        out = {"latent": out["latent_ema"], "image": out["image_ema"]}
        mean, sd = (torch.tensor(inputs[key]).view(1, 2, 1, 1, 1) for key in ("means", "stds"))
        out["volume"] = (unfold(out["image"], model.slices) * sd + mean) * inputs["mask"]
    return out


# --------------------------------------------------------------------------------------- golden: schedule and samplers


def _analytic_eps(x: Tensor, t: Tensor) -> Tensor:
    return 0.3 * x + 0.01 * torch.sin(t.float()).view(-1, *[1] * (x.ndim - 1))


def _run_schedule(config: dict, inputs: dict) -> dict:
    """Cases of a diffusion class that need no network."""
    if "lesion_slices" in inputs:
        return _run_windows(config, inputs)
    schedule = _schedule(config)
    if "x_T" in inputs:
        return _run_ancestral(schedule, inputs)
    if "x0" in inputs:
        return _run_formulas(schedule, inputs)
    return schedule_tables(schedule) | {"betas_float64": schedule.betas, "lvlb_weights": bound_weights(schedule)}


def _trajectory(sample: Callable, positions: Sequence[int] | None) -> dict:
    """`positions` (None: all) of what `sample(callback)` goes through."""
    times, states, estimates = [], [], []

    def note(i, t, x_t, x_0):
        times.append(t)
        states.append(x_t)
        estimates.append(x_0)

    final = sample(note)
    after = [*states[1:], final]
    chosen = range(len(times)) if positions is None else positions
    return {
        "timesteps": [times[k] for k in chosen],
        "x": torch.stack([after[k] for k in chosen]),
        "pred_x0": torch.stack([estimates[k] for k in chosen]),
        "final": final,
    }


def _run_ancestral(schedule: schedulers.Schedule, inputs: dict) -> dict:
    T = schedule.T

    def sample(note):
        noise = {"noise": lambda i, shape: inputs["noise"](t=T - 1 - i)}
        return schedulers.ddpm_sample(_analytic_eps, inputs["x_T"], schedule, callback=note, **noise)

    return _trajectory(sample, [0, 1, T - 1 - T // 2, T - 3, T - 2, T - 1])


def _run_formulas(schedule: schedulers.Schedule, inputs: dict) -> dict:
    x_0, noise, eps_hat, t = inputs["x0"], inputs["noise"], inputs["eps_hat"], torch.tensor(inputs["t"])
    tables = schedule_tables(schedule)
    x_t = schedulers.q_sample(schedule, x_0, t, noise)
    row = {name: schedulers.at(table, t, x_0) for name, table in tables.items()}
    last = tables["alphas_cumprod"][-1]
    prior = 0.5 * (-1 - (1 - last).log() + (1 - last) + last * x_0.square())

    def step(i, clip):
        """One ancestral step of sample i from its timestep, with its noise: the state that the next step sees."""
        seen, start = [], int(t[i])
        end = schedulers.ddpm_sample(
            lambda x, t: eps_hat[i : i + 1], x_t[i : i + 1], schedule, [start, start - 1] if start else [0],
            noise=lambda k, shape: noise[i : i + 1], clip=clip, callback=lambda k, t, x, x_0: seen.append(x),
        )  # fmt: skip
        return seen[1] if start else end

    return {
        "x_t": x_t,
        "x0_hat": schedulers.x0_from_eps(schedule, x_t, t, eps_hat),
        "x0_back": schedulers.x0_from_eps(schedule, x_t, t, noise),
        "eps_back": schedulers.eps_from_x0(schedule, x_t, t, x_0),
        "posterior_mean": row["posterior_mean_coef1"] * x_0 + row["posterior_mean_coef2"] * x_t,
        "posterior_variance": row["posterior_variance"],
        "posterior_log_variance": row["posterior_log_variance_clipped"],
        "q_mean": row["sqrt_alphas_cumprod"] * x_0,
        "q_variance": 1 - row["alphas_cumprod"],
        "q_log_variance": row["log_one_minus_alphas_cumprod"],
        "prior_bits": prior.flatten(1).mean(1) / math.log(2),
        "ancestral_step": torch.cat([step(i, None) for i in range(len(t))]),
        "ancestral_step_clipped": torch.cat([step(i, 1.0) for i in range(len(t))]),
    }


def _run_ddim(config: dict, inputs: dict) -> dict:
    schedule, T = _schedule(config), config["timesteps"]
    if isinstance(config["S"], list):
        return _run_ddim_tables(config, schedule)
    S, original = config["S"], config["use_original_steps"]
    steps = None if original else schedulers.respace(T, S, "leading", offset=1)
    how = {"eta": config["eta"], "final": "clean" if original else "first"}

    def noise(i, shape):
        return inputs["noise"](i=i) * config["temperature"]

    def sample(note):
        return schedulers.ddim_sample(_analytic_eps, inputs["x_T"], schedule, steps, noise=noise, callback=note, **how)

    few = None if S <= 50 else [0, 1, 2, S // 2, S - 3, S - 2, S - 1]
    return _trajectory(sample, inputs.get("positions", few))


def _run_ddim_tables(config: dict, schedule: schedulers.Schedule) -> dict:
    T, bar, out = config["timesteps"], schedule.alphas_bar, {}
    for S in config["S"]:
        # One later than every (T // S)-th; of all T steps the last would not exist, where the original's sampler fails.
        out[f"uniform_{S}"] = [step + 1 for step in reversed(schedulers.respace(T, S, "leading"))]
    for S in config["quad"]:
        out[f"quad_{S}"] = (np.linspace(0, np.sqrt(0.8 * T), S) ** 2).astype(int) + 1
    for S in config["S"]:
        times = torch.tensor(out[f"uniform_{S}"])
        if times[-1] >= T:
            continue
        a, b = bar[times], torch.cat([bar[:1], bar[times[:-1]]])
        for eta in config["eta"]:
            sigma = eta * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
            out[f"params_{S}_eta{eta}"] = torch.stack([a, b, sigma, (1 - a).sqrt()])
    return out


def _run_time_embedding(config: dict, inputs: dict) -> dict:
    t, period = torch.tensor(inputs["t"]), config["max_period"]
    return {f"dim{d}": sinusoidal_embedding(t, d, max_period=period, cos_first=True) for d in config["dims"]}


# ------------------------------------------------------------------------------------------------ golden: other cases


def _run_windows(config: dict, inputs: dict) -> dict:
    sizes = (config["temporal_length"], config["consecutive_slices"])
    starts = [window_starts(slices, *sizes, rule="upstream") for slices in inputs["lesion_slices"]]
    return {"start_slices": starts, "number_of_starts": [len(found) for found in starts]}


def _run_segmentation_losses(config: dict, inputs: dict) -> dict:
    p, lesion = inputs["logit"].sigmoid(), inputs["lesion"]
    zero, one, smooth = torch.zeros_like(p), torch.ones_like(p), config["smooth"]
    rows = []
    for truth, q in ((lesion, p), (zero, p), (one, p), (lesion, lesion), (zero, zero), (lesion, 1 - lesion)):
        tversky = [losses.tversky(q, truth, alpha=a, beta=b, smooth=smooth) for a, b in ((0.7, 0.3), (0.1, 0.9))]
        focal = [losses.focal_dice(q, truth, gamma=gamma, smooth=smooth) for gamma in (2, 3)]
        first, second = config["weights"]
        both = [first * a + second * b for a, b in zip(tversky, focal, strict=True)]
        rows.append(torch.stack([*tversky, *focal, *both]))
    return {"table": torch.stack(rows)}


def _run_case_seeds(config: dict, inputs: dict) -> dict:
    from lapt.inference import case_seed

    cases = inputs["cases"]
    return {"seeds": [case_seed(seed, model, f"{a}__{b}__{c}") for seed, model, a, b, c in cases]}


def _study(inputs: dict, mask: np.ndarray):
    from lapt.raw import Study

    dwi, adc = (np.maximum(inputs[name].numpy(), 0) for name in ("dwi", "adc"))
    return Study(inputs["ctp"].numpy(), mask, np.eye(4), dwi, adc, inputs["lesion"].numpy() > 0)


def _intensity(normalisation: str, study, window) -> tuple[Intensity, dict]:
    """Normalisation by the case's own statistics, and these."""
    from lapt.raw import statistics

    stats = {name: statistics(getattr(study, name)[study.mask]) for name in ("dwi", "adc")}
    return Intensity(normalisation, "case", stats, tuple(window), len(study.ctp)), stats


def _items(study, intensity: Intensity, stats: dict, mask: np.ndarray, slices) -> dict:
    mri = intensity.normalise(study.dwi, study.adc, mask, stats)
    ctp = intensity.normalise_ctp(study.ctp, mask)
    out = {}
    for z in slices:
        out |= {f"mri_{z}": mri[..., z], f"ctp_{z}": ctp[..., z], f"mask_{z}": mask[None, ..., z]}
        out[f"raw_dwi_{z}"] = study.dwi[..., z]
    return out


def _run_preprocess_2d(config: dict, inputs: dict) -> dict:
    from lapt.raw import retained_slices

    study = _study(inputs, inputs["mask"].numpy() > 0)
    intensity, stats = _intensity("quantile", study, config["ctp_window"])
    slices = retained_slices(study, min_brain_mm2=0)
    out = {f"{name}_quantiles": [stats[name]["low"], stats[name]["high"]] for name in ("dwi", "adc")}
    return out | _items(study, intensity, stats, study.mask, slices) | {"slice_idx": slices}


def _disk(shape, holes) -> np.ndarray:
    """The mask that the cases of the volume release describe: an ellipse in every slice, with holes."""
    H, W, _ = shape
    y, x = np.mgrid[:H, :W]
    disk = ((y - H / 2 + 0.5) / (0.45 * H)) ** 2 + ((x - W / 2 + 0.5) / (0.4 * W)) ** 2 < 1
    mask = np.repeat(disk[..., None], shape[2], axis=2)
    for hole in holes:
        mask[tuple(hole)] = False
    return mask


def _run_preprocess_slices(config: dict, inputs: dict) -> dict:
    from lapt.raw import fill_holes

    study = _study(inputs, _disk(inputs["dwi"].shape, inputs["holes"]))
    intensity, stats = _intensity("zscore", study, config["ctp_window"])
    out = _items(study, intensity, stats, fill_holes(study.mask), inputs["slice_index"])
    return out | {f"{name}_stats": [stats[name]["mean"], stats[name]["sd"]] for name in ("dwi", "adc")}


def _run_preprocess_volume(config: dict, inputs: dict) -> dict:
    from lapt.dataset import pad_to
    from lapt.raw import fill_holes

    study = _study(inputs, fill_holes(_disk(inputs["dwi"].shape, inputs["holes"])))
    intensity, stats = _intensity("zscore", study, config["ctp_window"])
    images = {
        "mri": (intensity.normalise(study.dwi, study.adc, study.mask, stats), intensity.background),
        "ctp": (intensity.normalise_ctp(study.ctp, study.mask), -1.0),
        "mask": (study.mask[None].astype(np.float32), 0.0),
        "lesion": (study.lesion[None].astype(np.float32), 0.0),
    }
    items = {name: pad_to(image, config["size"], fill) for name, (image, fill) in images.items()}
    box = [[int(i.min()), int(i.max()) + 1] for i in np.nonzero(items["mask"][0])]
    inside = (..., *(slice(a, b) for a, b in box))
    return {
        "stats": [stats[name][key] for name in ("dwi", "adc") for key in ("mean", "sd")],
        "mri_box": items["mri"][inside],
        "mask_box": items["mask"][inside],
        "ctp_box": items["ctp"][:3][inside],
        "moments": [
            [x.mean(dtype=np.float64), x.std(dtype=np.float64)] for x in map(items.get, ("mri", "ctp", "mask"))
        ],
        "mask_bounding_box": box,
        "shapes": {name: list(item.shape) for name, item in items.items()},
        "lesion_sum": float(items["lesion"].sum()),
    }


# --------------------------------------------------------------------------------- golden: cases of networks (weights)
# The original's class without its release -> (function(config) -> our network, function(model, inputs) -> outputs).

NETWORKS: dict[str, tuple[Callable, Callable]] = {
    "models.autoencoder.VQModelInterface": (_build_vq, _run_vq),
    "models.autoencoder.VQModel": (_build_vq, _run_vq_losses),
    "modules.vqvae.quantize.VectorQuantizer2": (_build_codebook, _run_codebook),
    "modules.discriminator.model.NLayerDiscriminator": (_build_discriminator, _run_discriminator),
    "modules.encoders.modules.SpatialRescaler": (_build_rescaler, _run_many),
    "modules.conditioners_3d.VolumeConditioner": (
        lambda config: VolumeConditioner(**_conditioner_arguments(config)),
        _run_many,
    ),
    "modules.unet_volume.PseudoConv3d": (_build_slice_convs, _run_many),
    "modules.diffusionmodules.openaimodel.UNetModel": (lambda config: UNet(**_unet_arguments(config)), _run_unet),
    "modules.unet_volume.UNetModel": (lambda config: UNet(**_unet_arguments(config)), _run_unet),
    "models.segmentation.SegmentationGuide3D": (_build_guide, _run_guide),
    "models.diffusion.ddpm.LatentDiffusion": (_build_stage, _run_stage),
    "models.diffusion.ddpm_ft.LatentDiffusion": (_build_stage, partial(_run_stage, lapt=True)),
    "models.ddpm_volume.LatentDiffusionVolume": (_build_stage, _run_stage),
    "models.ddpm_volume_lapt.LatentDiffusionVolumeLAPT": (_build_stage, partial(_run_stage, lapt=True)),
}

# ------------------------------------------------------------------------------ golden: cases of functions (no weights)
# The same -> function(config, inputs) -> outputs; None: not reproduced, see LEFT_OUT.

FUNCTIONS: dict[str, Callable | None] = {
    "models.diffusion.ddim.DDIMSampler": _run_ddim,
    "modules.diffusionmodules.util.timestep_embedding": _run_time_embedding,
    "models.segmentation (loss functions)": _run_segmentation_losses,
    "data.preprocessing + ldm.data.ctpdwi.CTPDWIValidation": _run_preprocess_2d,
    "data.paired_slices.PairedSliceTest": _run_preprocess_slices,
    "data.paired_volumes.PairedVolumeTest": _run_preprocess_volume,
    "sample.stable_case_seed (3D release)": _run_case_seeds,
    "modules.ema.LitEma": None,
}


def _without_release(module: str) -> str:
    return re.sub(r"^ldm(3d_lapt)?\.", "", module)


def build(module: str, config: dict):
    """Our network for the original's class `module` and its arguments, or for a function its config; else KeyError."""
    name = _without_release(module)
    return config if name in FUNCTIONS else NETWORKS[name][0](config)


def run(module: str, model, inputs: dict) -> dict:
    """Named outputs of a reference case; `model` is what `build` gave, `inputs` the drawn tensors and literals."""
    name = _without_release(module)
    return FUNCTIONS[name](model, inputs) if name in FUNCTIONS else NETWORKS[name][1](model, inputs)


def read_words(case: dict) -> dict:
    """Inputs that a case states in words only."""
    text, found = case.get("call", ""), {}
    if match := re.search(r"(\d+) DDIM steps", text):
        found["ddim_steps"] = int(match[1])
    if match := re.search(r"trajectory positions \[([\d, ]+)\]", text):
        found["positions"] = [int(k) for k in match[1].split(",")]
    return found


def not_reproduced(case: dict) -> dict[str, str]:
    """Outputs of an optional case that our program does not give on purpose, with the reason."""
    names = [*case["outputs"], *case.get("expected", {})]
    rules = dict(LEFT_OUT.get(_without_release(case["module"]), {}))
    if case.get("expected", {}).get("nan_terms"):
        rules |= {"(loss_lesion|loss|nan_terms|gradients_all_nan)$": "a batch without lesion is no 0 / 0 here"}
    return {name: reason for name in names for pattern, reason in rules.items() if re.match(pattern, name)}


STORED = "prepared cases are stored another way here (lapt/dataset.py)"
LEFT_OUT: dict[str, dict[str, str]] = {  # the original's class without its release -> {pattern of its outputs: why}
    "modules.ema.LitEma": {"": "our average has no warm-up of its decay but a start step, and every trained parameter"},
    "data.preprocessing + ldm.data.ctpdwi.CTPDWIValidation": {
        "lesion_": "a lesion outside the brain mask is refused or cut off here",
        "(quantile|dtypes|items|item_)": STORED,
    },
    "data.paired_slices.PairedSliceTest": {"(second_read|dtypes)": STORED},
}
