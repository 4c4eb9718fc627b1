"""Checkpoints and reference cases of the original LDAE program in terms of our modules.

`build`, `load`, `run` are what `python -m tests.golden` calls: our network for the original's class name and arguments,
strict loading from the original's keys, and the named outputs of a reference case. `from_checkpoint` builds a network
of one of the original's files, `import_ldae` a whole LDAE (command: scripts/import_weights.py), and `to_upstream` gives
our weights under the original's names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common.checkpoint
from common import metrics, nifti, runtime, schedulers, training
from common.blocks3d import Down, Half, ResidualBlock, Up, sinusoidal_embedding
from common.cli import UserError
from common.ema import EMA
from common.lpips import LPIPS
from ldae import posterior_gap, unet
from ldae.autoencoder import AutoencoderKL, PatchDiscriminator
from ldae.encoder import (
    CONVNEXT,
    DROP_PATH,
    SemanticEncoder,
    SliceClassifier,
    SliceRegressor,
    SoftAttention,
    grey_stem,
    position_code,
    to_slices,
)
from ldae.losses import SliceLPIPS
from ldae.unet import Attention, GradientEstimator, ShiftUNet, Stage, UNet

# ------------------------------------------------------------------------------------------------------------ key map
POSITIONS = "positional_encoding.pe"  # a fixed table

# Our class -> {our submodule or tensor: the original's}. A class that is not listed is a leaf: same names there.

NAMES: dict[type[nn.Module], dict[str, str]] = {
    AutoencoderKL: {
        "encoder": "encoder",
        "decoder": "decoder",
        "mean": "quant_conv_mu.conv",
        "logvar": "quant_conv_log_sigma.conv",
        "latent": "post_quant_conv.conv",
    },
    ResidualBlock: {
        "norm1": "norm1",
        "conv1": "conv1.conv",
        "norm2": "norm2",
        "conv2": "conv2.conv",
        "skip": "nin_shortcut.conv",
    },
    Down: {"conv": "conv.conv"},
    Up: {"conv": "conv.conv"},
    UNet: {
        "time1": "time_embed.0",
        "time2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "middle": "middle_block",
        "output_stages": "output_blocks",
        "out": "out",
    },
    unet.ResidualBlock: {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time": "emb_layers.1",
        "code": "emb_z_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
    },
    Attention: {"norm": "norm", "qkv": "qkv", "proj": "proj_out"},
    ShiftUNet: {"prior": "", "estimator": ""},
    SemanticEncoder: {
        "backbone": "slice_distributed.module.backbone",
        "soft_attention": "soft_attention",
        "query": "query_projection",
        "key": "key_projection",
        "value": "value_projection",
        "attention": "cross_attention",
        "norm": "layer_norm_after_attention",
        "positions": POSITIONS,
    },
    SliceClassifier: {"encoder": "", "head": "classifier"},
    SliceRegressor: {"encoder": "", "head": "classifier"},
    SliceLPIPS: {"distance": "perceptual_function"},
}
# Second names of tensors that the original registers twice: (what ends a prefix, second name). The first one counts.
TWINS = (("slice_distributed.module.", "backbone."), ("perceptual_function.lins.", "perceptual_function.lin"))


def _children(module: nn.Module) -> dict[str, str]:
    names = dict(NAMES.get(type(module), {}))
    if isinstance(module, Half):  # one list there: the convolution, the blocks, the norm, the convolution
        n = len(module.blocks)
        names = {"conv_in": "blocks.0.conv", "norm_out": f"blocks.{n + 1}", "conv_out": f"blocks.{n + 2}.conv"}
        names |= {f"blocks.{i}": f"blocks.{i + 1}" for i in range(n)}
    if isinstance(module, PatchDiscriminator):
        names = {"conv_in": "initial_conv.conv", "conv_out": "final_conv.conv"}
        names |= {f"convs.{i}": f"{i}.conv" for i in range(len(module.convs))}
        names |= {f"norms.{i}": f"{i}.adn.N" for i in range(len(module.norms))}
    if isinstance(module, UNet):
        names |= {f"input_stages.{i}": f"input_blocks.{i + 1}" for i in range(len(module.input_stages))}
    if isinstance(module, LPIPS):
        names = {"shift": "scaling_layer.shift", "scale": "scaling_layer.scale"}
        for k in map(int, module.features):
            depth = next(i for i, last in enumerate(module.compared, 1) if k <= last)
            names[f"features.{k}"] = f"net.slice{depth}.{k}"
        names |= {f"heads.{i}": f"lins.{i}.model.1.weight" for i in range(len(module.heads))}
    if isinstance(module, Stage | GradientEstimator) or type(module) in (nn.ModuleList, nn.ModuleDict):
        names = {name: name for name, _ in module.named_children()}
    return names


def key_map(model: nn.Module) -> dict[str, str]:
    """Our state-dict key -> the original's key, for every entry of `model`."""
    return common.checkpoint.renamed_keys(model, _children)


def _twin(key: str) -> str | None:
    """The second name of an entry, if the original has one."""
    for name, second in TWINS:
        head, found, rest = key.rpartition(name)
        if found and (not head or head.endswith(".")):
            return head + second + rest
    return None


def to_upstream(model: nn.Module, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """State dict of `model` (or another one with its keys, for example the average's) under the original's names."""
    names, state_dict = key_map(model), model.state_dict() if state_dict is None else state_dict
    state = {names[key]: value for key, value in state_dict.items()}
    return state | {twin: value for key, value in state.items() if (twin := _twin(key))}


def rename_upsampling(state_dict: dict[str, Tensor], to: str) -> dict[str, Tensor]:
    """Autoencoder keys of another MONAI release: upsampling convolutions are `postconv.conv` in MONAI core ("core",
    1.4 and later), `conv.conv` in the archived monai-generative ("generative") that the original uses.
    """
    old, new = {"core": ("conv.conv", "postconv.conv"), "generative": ("postconv.conv", "conv.conv")}[to]
    pattern = re.compile(rf"(^|\.)(decoder\.blocks\.\d+)\.{re.escape(old)}\.(weight|bias)$")
    return {pattern.sub(rf"\1\2.{new}.\3", key): value for key, value in state_dict.items()}


def load(model: nn.Module, state_dict: dict[str, Tensor], assign: bool = False) -> nn.Module:
    """Fill `model` from a state dict with the original's keys, of either MONAI release; returns it.

    Strict: UserError names missing, unexpected and differently shaped entries. Second names of shared tensors may be
    absent. assign: take over the tensors instead of copying them.
    """
    state, names = rename_upsampling(state_dict, "generative"), key_map(model)
    known = {*names.values(), *filter(None, map(_twin, names.values()))}
    common.checkpoint.load_renamed(model, state, names, known, assign)
    return model


# ------------------------------------------------------------------------------------------------ the original's files

SIGNATURES = {  # a key that only this network has
    "aekl": "quant_conv_mu.conv.weight",
    "unet": "time_embed.0.weight",
    "encoder": "query_projection.weight",
    "discriminator": "initial_conv.conv.weight",
}
LATENT_SCALE = 0.8730  # by which every latent of the original is multiplied
PUBLISHED = {  # what leaves no trace in the weights
    "aekl": {"norm_groups": 32},
    "unet": {"num_heads": 1, "head_channels": -1, "new_attention_order": False, "dropout": 0.1, "isotropic": False},
    "encoder": {"num_heads": 8, "dropout": 0.1, "drop_path": DROP_PATH["convnext_small"]},
    "discriminator": {},
}


def from_checkpoint(content: dict, path, *, want: str | None = None, weights: str = "ema", **overrides):
    """(kind, our network) of a file of the original: bare weights, or a whole Lightning checkpoint.

    want: "aekl", "prior", "decoder" (a ShiftUNet), "encoder", "classifier", "regressor" or "discriminator"; None takes
    the first of these that the file holds. weights: "ema" where there is an average, or "raw". `overrides`: constructor
    arguments that leave no trace in the weights, where they are not the published ones. UserError, naming `path`.
    """
    parts = _parts(content, path, weights)
    kinds = [kind for kind in KINDS if kind in parts]
    if not kinds or (want or kinds[0]) not in kinds:
        found = f"it holds {', '.join(kinds)}" if kinds else "none of its networks is in it"
        raise UserError(f"{path} has no {want or 'weights'} of the original LDAE: {found}; name another file")
    kind = want or kinds[0]
    try:
        return kind, _network(kind, parts[kind], overrides)
    except (UserError, ValueError, KeyError, IndexError, RuntimeError) as error:  # keys of some other network
        what = f"no {error.args[0]}" if isinstance(error, KeyError) else error
        raise UserError(f"checkpoint {path}: {what}") from None


KINDS = ("aekl", "prior", "decoder", "encoder", "classifier", "regressor", "discriminator")


def _parts(content: dict, path, weights: str) -> dict[str, dict[str, Tensor]]:
    """{kind: bare state dict} of everything in a file of the original."""
    state, found = content.get("state_dict", content), {}
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)} if isinstance(state, dict) else {}
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    for name, signature in SIGNATURES.items():
        prefixes = [key.removesuffix(signature) for key in state if re.search(rf"(^|\.){re.escape(signature)}$", key)]
        for prefix in prefixes:
            part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            is_average = prefix.rstrip(".").rpartition(".")[2].startswith("ema_")
            found.setdefault(_kind(name, part), {})[is_average] = part
    order = (True, False) if weights == "ema" else (False, True)
    return {kind: next(sets[flag] for flag in order if flag in sets) for kind, sets in found.items()}


def _kind(name: str, part: dict[str, Tensor]) -> str:
    if name == "unet":
        return "decoder" if "label_emb.weight" in part else "prior"
    if name == "encoder" and "classifier.weight" in part:
        return "regressor" if len(part["classifier.weight"]) == 1 else "classifier"
    return name


def _network(kind: str, state: dict[str, Tensor], overrides: dict) -> nn.Module:
    """A network that takes over the tensors of `state`: built without memory of its own."""
    base = {"prior": "unet", "decoder": "unet", "classifier": "encoder", "regressor": "encoder"}.get(kind, kind)
    identify, make = {
        "aekl": (_identify_aekl, AutoencoderKL),
        "discriminator": (_identify_discriminator, PatchDiscriminator),
        "unet": (_identify_unet, UNet),
        "encoder": (_identify_encoder, SemanticEncoder),
    }[base]
    with torch.device("meta"):
        network = make(**PUBLISHED[base] | identify(state) | overrides)
        if kind == "decoder":
            network = ShiftUNet(network, state["label_emb.weight"].shape[1])
        elif kind == "classifier":
            network = SliceClassifier(network, len(state["classifier.weight"]))
        elif kind == "regressor":
            network = SliceRegressor(network)
    return load(network, state, assign=True)


def aekl_settings(model: AutoencoderKL) -> dict:
    """Constructor arguments of an autoencoder."""
    return _identify_aekl(to_upstream(model)) | {"norm_groups": model.encoder.norm_out.num_groups}


def unet_settings(model: UNet) -> dict:
    """Constructor arguments of a prior."""
    plan = model.plan
    fixed = {"num_heads": plan.num_heads, "head_channels": plan.head_channels, "new_attention_order": plan.new_order}
    fixed |= {"dropout": plan.dropout, "isotropic": plan.factor == unet.factors(True)}
    fixed |= {"norm_groups": plan.norm_groups}
    return _identify_unet(to_upstream(model)) | fixed


def encoder_settings(model: SemanticEncoder) -> dict:
    """Constructor arguments of a semantic encoder; of stochastic depth the published value."""
    fixed = {"num_heads": model.attention.num_heads, "dropout": model.dropout.p}
    return PUBLISHED["encoder"] | fixed | _identify_encoder(to_upstream(model))


def _identify_aekl(state: dict[str, Tensor]) -> dict:
    channels, blocks, i = [], [0], 1
    while f"encoder.blocks.{i}.conv.weight" not in state:  # up to the last convolution
        if f"encoder.blocks.{i}.conv.conv.weight" in state:
            blocks.append(0)
        elif f"encoder.blocks.{i}.conv1.conv.weight" in state:
            channels[len(blocks) - 1 :] = [len(state[f"encoder.blocks.{i}.conv1.conv.weight"])]
            blocks[-1] += 1
        elif f"encoder.blocks.{i}.weight" not in state:  # the norm
            raise KeyError(f"encoder.blocks.{i}")
        i += 1
    last = max(int(key.split(".")[2]) for key in state if key.startswith("decoder.blocks."))
    return {
        "in_channels": state["encoder.blocks.0.conv.weight"].shape[1],
        "out_channels": len(state[f"decoder.blocks.{last}.conv.weight"]),
        "channels": channels,
        "latent_channels": len(state["quant_conv_mu.conv.weight"]),
        "num_res_blocks": blocks,
    }


def _identify_discriminator(state: dict[str, Tensor]) -> dict:
    channels, in_channels = state["initial_conv.conv.weight"].shape[:2]
    layers = sum(key.endswith(".adn.N.weight") for key in state)
    return {"in_channels": in_channels, "channels": channels, "layers": layers}


def _identify_unet(state: dict[str, Tensor]) -> dict:
    """Every level has as many input blocks as residual blocks and one to go down, and as many output blocks; the last
    output block of a level goes up again, which shows how many there are.
    """
    n_blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("output_blocks."))
    ends = [key.split(".") for key in state if re.match(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", key)]
    per_level = 1 + min((int(parts[1]) for parts in ends), default=n_blocks - 1)
    base = state["time_embed.0.weight"].shape[1]
    firsts = range(1, n_blocks, per_level)  # first residual block of each level
    widths = [len(state[f"input_blocks.{i}.0.in_layers.2.weight"]) for i in firsts]
    attended = [2**level for level, i in enumerate(firsts) if f"input_blocks.{i}.1.qkv.weight" in state]
    return {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "base_channels": base,
        "channel_mult": [width // base for width in widths],
        "num_res_blocks": per_level - 1,
        "attention_resolutions": attended,
    }


def _identify_encoder(state: dict[str, Tensor]) -> dict:
    prefix, depths, widths = "slice_distributed.module.backbone.features.", {}, {}
    for key, value in state.items():
        if (match := re.fullmatch(re.escape(prefix) + r"(\d+)\.(\d+)\.layer_scale", key)) is not None:
            stage, block = map(int, match.groups())
            depths[stage] = max(depths.get(stage, 0), block + 1)
            widths[stage] = len(value)
    return {
        "stages": [[widths[stage], depths[stage]] for stage in sorted(depths)],
        "in_channels": state[f"{prefix}0.0.weight"].shape[1],
        "embed_dim": state["query_projection.weight"].shape[0],
        "max_slices": state[POSITIONS].shape[1],
    }


def import_ldae(paths: Iterable[Path], rt, *, trust_pickle: bool = False, weights: str = "ema", **overrides):
    """A model.LDAE of the original's files: `autoencoderkl.pth`, `decoder.pth`, `encoder.pth`, or a checkpoint of its
    third stage, which holds all three. Latents, preparation and sampling are the original's.

    `overrides`: constructor arguments by network, such as unet={"num_heads": 4}. UserError names what is missing.
    """
    from ldae import model  # here, because it is not needed for a single network
    from ldae.preprocess import Preparation

    networks = {}
    for path in map(Path, paths):
        content = common.checkpoint.load(path, trust_pickle=trust_pickle)
        for kind in {"aekl", "decoder", "encoder"} & _parts(content, path, weights).keys():
            extra = overrides.get("unet" if kind == "decoder" else kind, {})
            networks[kind] = from_checkpoint(content, path, want=kind, weights=weights, **extra)[1]
    if missing := {"aekl", "decoder", "encoder"} - networks.keys():
        files, named = " ".join(map(str, paths)), " and no ".join(sorted(missing))
        raise UserError(f"{files}: no {named} of the original LDAE; give its autoencoderkl.pth, decoder.pth and "
                        "encoder.pth, or a checkpoint of its third stage")  # fmt: skip
    parts = [runtime.frozen_network(networks[kind], rt) for kind in ("aekl", "decoder", "encoder")]
    aekl, decoder, encoder = parts
    settings = {"aekl": aekl_settings(aekl), "unet": unet_settings(decoder.prior), "encoder": encoder_settings(encoder)}
    schedule, channels = {"kind": "linear", "T": 1000}, aekl.latent_channels
    weights_hash = common.checkpoint.weights_hash
    return model.LDAE(
        *parts,
        settings,
        schedulers.make_schedule(**schedule),
        schedule,
        {"mean": [0.0] * channels, "std": [1 / LATENT_SCALE] * channels},
        Preparation.upstream(),
        "axial",
        rt,
        hash=weights_hash(model.state_dict(*parts)),
        hashes={"aekl": weights_hash(aekl.state_dict()), "prior": weights_hash(decoder.prior.state_dict())},
        **posterior_gap.UPSTREAM,
    )


# ----------------------------------------------------------------------------------------- golden: building networks

AEKL_FIXED = {  # arguments of the original with which alone it was ever built
    "spatial_dims": 3,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}
DISC_FIXED = {"spatial_dims": 3, "out_channels": 1, "kernel_size": 4, "norm": "BATCH", "bias": False, "padding": 1}


def _check_fixed(config: dict, fixed: dict) -> None:
    if odd := [name for name, value in fixed.items() if config.get(name, value) != value]:
        raise KeyError(f"{', '.join(odd)}: never used, and not implemented")


def _build_aekl(config: dict) -> AutoencoderKL:
    _check_fixed(config, AEKL_FIXED)
    if any(config.get("attention_levels", ())):
        raise KeyError("attention_levels: never used, and not implemented")
    return AutoencoderKL(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        channels=config["num_channels"],
        latent_channels=config["latent_channels"],
        num_res_blocks=config["num_res_blocks"],
        norm_groups=config["norm_num_groups"],
    )


def _build_discriminator(config: dict) -> PatchDiscriminator:
    _check_fixed(config, DISC_FIXED)
    channels, layers = config["num_channels"], config["num_layers_d"]
    return PatchDiscriminator(in_channels=config["in_channels"], channels=channels, layers=layers)


def _build_aekl_module(config: dict) -> nn.ModuleDict:
    """Autoencoder and discriminator of a training step."""
    discriminator = PatchDiscriminator(
        in_channels=config["aekl_args"]["out_channels"],
        channels=config["disc_num_channels"],
        layers=config["disc_layers"],
    )
    return _with_config(
        nn.ModuleDict({"model": _build_aekl(config["aekl_args"]), "discriminator": discriminator}), config
    )


def _build_unet(config: dict) -> UNet:
    _check_fixed(config, {"dims": 3})
    return UNet(
        in_channels=config["input_channel"],
        base_channels=config["base_channel"],
        channel_mult=config["channel_multiplier"],
        num_res_blocks=config["num_residual_blocks_of_a_block"],
        attention_resolutions=config["attention_resolutions"],
        num_heads=config["num_heads"],
        head_channels=config["head_channel"],
        new_attention_order=config["use_new_attention_order"],
        dropout=config["dropout"],
        isotropic=False,
    )


def _build_prior_and_schedule(config: dict) -> UNet:
    return _with_config(_build_unet(config["unet"]), config)


def _build_shift_unet(config: dict) -> ShiftUNet:
    return ShiftUNet(_build_unet(config), config["latent_dim"])


def _stages(config: dict) -> tuple[tuple[tuple[int, int], ...], float]:
    """Stages and stochastic depth of the 2D backbone that a case describes in words; none for flattened slices."""
    text = config.get("backbone", "")
    if text.startswith("none"):
        return (), 0.0
    if "net_class_path" in config:
        name = config["net_class_path"].rpartition(".")[2]
        return CONVNEXT[name], DROP_PATH[name]
    stages = re.findall(r"\((\d+),\s*(?:\d+|none),\s*(\d+)\)", text)
    return tuple((int(width), int(blocks)) for width, blocks in stages), 0.0


def _build_encoder(config: dict) -> SemanticEncoder:
    width = config.get("emb_chans", config.get("embedding_dim"))
    stages, drop_path = _stages(config)
    encoder = SemanticEncoder(
        stages=stages or ((width, 1),),
        embed_dim=width,
        num_heads=config["num_heads"],
        max_slices=config.get("seq_len", config.get("load_size")),
        dropout=0.1,
        drop_path=drop_path,
    )
    if not stages:
        encoder.backbone = nn.Flatten()
    return encoder


def _build_classifier(config: dict) -> SliceClassifier:
    return SliceClassifier(_build_encoder(config), config["num_classes"])


def _build_regressor(config: dict) -> SliceRegressor:
    return _with_config(SliceRegressor(_build_encoder(config)), config)


def _build_representation(config: dict) -> nn.ModuleDict:
    parts = {"encoder": _build_encoder(config["encoder"]), "decoder": _build_shift_unet(config["decoder"])}
    return _with_config(nn.ModuleDict(parts), config)


def _build_stage(config: dict) -> nn.ModuleDict:
    """Everything that a checkpoint of stage 2 or 3 holds."""
    parts = {"vae": _build_aekl(config["vae_args"])}
    if config["mode"] == "pretrain":
        trained = {"unet": partial(_build_unet, config["unet_args"])}
    else:
        decoder = config["unet_args"] | {"latent_dim": config["enc_args"]["emb_chans"]}
        trained = {
            "encoder": partial(_build_encoder, config["enc_args"]),
            "decoder": partial(_build_shift_unet, decoder),
        }
    parts |= {prefix + name: make() for prefix in ("", "ema_") for name, make in trained.items()}
    return _with_config(nn.ModuleDict(parts), config)


def _build_perceptual(config: dict) -> SliceLPIPS:
    """As the original compares: the sum over axes, of values as they are, of a share of the slices."""
    _check_fixed(config, {"spatial_dims": 3, "is_fake_3d": True})
    net = LPIPS(config["network_type"])
    return SliceLPIPS(net, slice_fraction=config["fake_3d_ratio"], value_range=None, sum_axes=True)


def _build_blocks(config: dict) -> nn.ModuleDict:
    return _with_config(nn.ModuleDict({"soft": SoftAttention(config["d_model"]), "stem": nn.Conv2d(3, 4, 4)}), config)


def _build_probe(config: dict) -> nn.Linear:
    return nn.Linear(config["embedding_dim"], 1)


def _with_config(model: nn.Module, config: dict) -> nn.Module:
    model.upstream_config = config
    return model


# ------------------------------------------------------------------------------------------ golden: running networks


def _gradients(model: nn.Module, prefix: str = "grad__") -> dict[str, Tensor]:
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {f"{prefix}{key}": grad.clone() for key, grad in to_upstream(model, grads).items()}


@torch.no_grad()
def _run_aekl(model: AutoencoderKL, inputs: dict) -> dict:
    mu, logvar = model.eval().encode(inputs["image"])
    z = model.sample(mu, logvar, inputs["noise"])
    scaled = model.decode(z / LATENT_SCALE)
    return {"z_mu": mu, "z_sigma": (0.5 * logvar).exp(), "z": z, "recon": model.decode(z), "recon_scaled": scaled}


@torch.no_grad()
def _run_discriminator(model: PatchDiscriminator, inputs: dict) -> dict:
    """In the mode that the case sets."""
    maps = model.features(inputs["image"])
    out = {f"after__{key}": value for key, value in to_upstream(model).items() if "running" in key}
    return out | {
        "logits": maps[-1],
        "feat_mean": [x.double().mean() for x in maps],
        "feat_std": [x.double().std(correction=0) for x in maps],
        "feature_shapes": [list(x.shape) for x in maps],
    }


def _run_aekl_step(model: nn.ModuleDict, inputs: dict) -> dict:
    """Through the step of aekl.py, without the perceptual term."""
    from ldae import aekl  # here, because it imports this module

    config = model.upstream_config
    weights = SimpleNamespace(kl_weight=config["kl_weight"], adv_weight=config["adv_weight"])
    autoencoder, discriminator = model["model"].train(), model["discriminator"].train()
    pair, history = training.RealAndFake(discriminator), []
    for k in range(sum(name.startswith("image") for name in inputs)):
        x, eps = inputs[f"image{k}"], inputs[f"noise{k}"]
        scale = 1 / config["accumulate_grad_batches"]
        history.append(aekl.aekl_step(autoencoder, pair, x, eps, weights, scale=scale))
    names = {"train_loss_g": "loss", "train_loss_d": "discriminator", "kl_loss": "kl", "train_loss_recons": "l1"}
    out = {theirs: torch.stack([losses[ours] for losses in history]) for theirs, ours in names.items()}
    out |= _gradients(model, "gradG__")
    if len(history) == config["accumulate_grad_batches"]:
        before = {key: value.clone() for key, value in to_upstream(model).items()}
        nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        torch.optim.Adam(autoencoder.parameters(), lr=config["lr_g"]).step()
        out |= {f"delta__{key}": value - before[key] for key, value in to_upstream(model).items()}
    return out


@torch.no_grad()
def _run_unet(model: UNet, inputs: dict) -> dict:
    return {"eps": model.eval()(inputs["z_t"], torch.tensor(inputs["t"]))}


@torch.no_grad()
def _run_shift_unet(model: ShiftUNet, inputs: dict) -> dict:
    eps, G = model.eval()(inputs["z_t"], torch.tensor(inputs["t"]), inputs["y"])
    return {"eps": eps, "G": G}


@torch.no_grad()
def _run_encoder(model: SemanticEncoder, inputs: dict) -> dict:
    y, weights = model.eval()(inputs["volume"], return_attention=True)
    return {"y": y, "slice_weights": weights, "slice_features": model.slice_features(inputs["volume"])}


def _run_classifier(model: SliceClassifier, inputs: dict) -> dict:
    logits, weights = model.eval()(inputs["volume"], return_attention=True)
    loss = F.cross_entropy(logits, torch.tensor(inputs["labels"]))
    loss.backward()
    return {"logits": logits.detach(), "slice_weights": weights.detach(), "loss": loss.detach()} | _gradients(model)


def _run_regressor(model: SliceRegressor, inputs: dict) -> dict:
    """The loss in years, as the original's scaling of ages has it."""
    low, scale = (model.upstream_config[name] for name in ("age_min", "age_max"))
    normalised = model.eval()(inputs["volume"])
    age = torch.tensor([math.nan if age is None else age for age in inputs["age"]])
    known = ~age.isnan()
    error = (normalised[:, 0] * scale + low)[known] - age[known]
    loss = error.square().mean()
    loss.backward()
    return {
        "normalised": normalised.detach(),
        "loss": loss.detach(),
        "mae": error.detach().abs().mean(),
        "rmse": loss.detach().sqrt(),
        "normalised_target": (age - low) / scale,
    } | _gradients(model)


def _run_perceptual(model: SliceLPIPS, inputs: dict) -> dict:
    slices = []
    for axis, n in enumerate(inputs["a"].shape[2:]):
        slices.append(torch.tensor(inputs[f"perm_axis{axis}"])[: int(n * model.slice_fraction)])
    a = inputs["a"].clone().requires_grad_()
    value = model(a, inputs["b"], slices=slices)
    (grad,) = torch.autograd.grad(value, a)
    return {"value": value.detach(), "grad_a": grad, "per_axis": model.per_axis(inputs["a"], inputs["b"], slices)}


class _MeanAndMaximum(nn.Module):
    """Stands for a backbone: two features of an image."""

    def forward(self, images: Tensor) -> Tensor:
        images = images.flatten(1)
        return torch.stack([images.mean(1), images.amax(1)], dim=1)


@torch.no_grad()
def _run_blocks(model: nn.ModuleDict, inputs: dict) -> dict:
    config, x = model.upstream_config, inputs["x"]
    positions = position_code(config["max_length"], config["d_model"])
    encoder = _build_encoder({"backbone": "none", "emb_chans": 8, "num_heads": 1, "seq_len": inputs["vol"].shape[2]})
    encoder.backbone = _MeanAndMaximum()
    mean, weights = model["soft"](x)
    t = torch.tensor(inputs["t"])
    return {
        "pe": positions,
        "added": x + positions[: x.shape[1]],
        "soft_mean": mean,
        "soft_weights": weights,
        "sliced": encoder.slice_features(inputs["vol"]),
        "grey": grey_stem(model["stem"].weight),
    } | {f"temb_{dim}": sinusoidal_embedding(t, dim, cos_first=True) for dim in config["time_dims"]}


# --------------------------------------------------------------------------------------------- golden: training steps


def _schedule(config: dict) -> schedulers.Schedule:
    return schedulers.make_schedule(config["betas_type"], config["timesteps"])


def _run_prior_loss(model: UNet, inputs: dict) -> dict:
    from ldae import prior  # here, because it imports this module by way of latents.py

    schedule, t = _schedule(model.upstream_config), torch.tensor(inputs["t"])
    loss = prior.prior_loss(model.train(), schedule, inputs["z_0"], t, inputs["noise"]).mean()
    loss.backward()
    return {"loss": loss.detach()} | _gradients(model)


def _learner(model: nn.ModuleDict):
    """Encoder (in eval mode, so that nothing is random) and decoder; the cases' volumes are slices already."""
    from ldae import representation

    model["decoder"].train()
    return representation.Learner(model["encoder"].eval(), model["decoder"], "sagittal")


def _run_representation_loss(model: nn.ModuleDict, inputs: dict) -> dict:
    """Through the objective of representation.py."""
    from ldae import representation

    config = model.upstream_config
    schedule, t, learner, made = _schedule(config), torch.tensor(inputs["t"]), _learner(model), {}
    x, z_0, noise = (inputs[name] for name in ("volume", "z_0", "noise"))
    hooks = [
        model["encoder"].register_forward_hook(lambda module, args, y: made.update(y=y.detach())),
        model["decoder"].register_forward_hook(lambda module, args, out: made.update(eps=out[0], G=out[1].detach())),
    ]
    loss = representation.gap_losses(learner, schedule, x, z_0, t, noise, config["gamma"])["loss"].mean()
    loss.backward()
    for hook in hooks:
        hook.remove()
    return {
        "loss": loss.detach(),
        "z_t": schedulers.q_sample(schedule, z_0, t, noise),
        "weight_t": posterior_gap.gap_weight(schedule, config["gamma"])[t],
        "shift_t": -posterior_gap.shift_coefficient(schedule)[t],
        "prior_grad_is_none": all(p.grad is None for p in model["decoder"].prior.parameters()),
    } | made | _gradients(model)  # fmt: skip


def _run_stage(model: nn.ModuleDict, inputs: dict) -> dict:
    """Steps of Adam with clipping and averages, through the losses of prior.py and representation.py."""
    from ldae import prior, representation

    config = model.upstream_config
    schedule, pretrain = _schedule(config), config["mode"] == "pretrain"
    names = ["unet"] if pretrain else ["encoder", "decoder"]
    learner = model["unet"].train() if pretrain else _learner(model)
    averages = []
    for name in names:
        averages.append(EMA(model[name], config["ema_decay"]))
        averages[-1].module = model[f"ema_{name}"]
    if pretrain:
        groups = [list(model["unet"].parameters())]
    else:
        parts = [model["encoder"], *model["decoder"].estimator.children()]
        groups = [list(part.parameters()) for part in parts]
    trained = [p for group in groups for p in group]
    optimizer = torch.optim.Adam(trained, lr=config["lr"])
    before = {key: value.clone() for key, value in to_upstream(model).items()}
    losses, norms = [], []
    for k in range(sum(name.startswith("latent") for name in inputs)):
        z_0, noise, t = LATENT_SCALE * inputs[f"latent{k}"], inputs[f"noise{k}"], torch.tensor(inputs[f"t{k}"])
        if pretrain:
            loss = prior.prior_loss(learner, schedule, z_0, t, noise).mean()
        else:
            terms = representation.gap_losses(
                learner, schedule, inputs[f"volume{k}"], z_0, t, noise, posterior_gap.GAMMA
            )
            loss = terms["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(trained, config["clip_norm"]))
        optimizer.step()
        for average, name in zip(averages, names, strict=True):
            average.update(model[name])
        losses.append(loss.detach())
    out = {"loss": torch.stack(losses), "grad_norm": torch.stack(norms)}
    out["optimised_tensors_per_group"] = [len(group) for group in groups]
    out["optimised_parameters_per_group"] = [sum(p.numel() for p in group) for group in groups]
    if "decode_latent" in inputs:
        with torch.no_grad():
            out["decode"] = model["vae"].eval().decode(inputs["decode_latent"] / LATENT_SCALE)
    return out | {f"delta__{key}": value - before[key] for key, value in to_upstream(model).items()}


# --------------------------------------------------------------------------------------------------- golden: diffusion
# The networks of these cases are formulas.


def _analytic_eps(x: Tensor, t: Tensor) -> Tensor:
    return 0.3 * x + (0.01 * torch.sin(t.double())).to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def _analytic_decoder(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return _analytic_eps(x, t), 0.05 * x + 0.1 * y.mean(1).view(-1, *[1] * (x.ndim - 1))


def _run_gaussian_diffusion(config: dict, inputs: dict) -> dict:
    """Three kinds of cases have this name: tables, ancestral sampling, and the gap of posterior means."""
    if not inputs:
        return _schedule_tables(config)
    return _run_ancestral(config, inputs) if "x_T" in inputs else _run_gap(config, inputs)


def _schedule_tables(config: dict) -> dict:
    schedule = _schedule(config)
    bar, betas = schedule.alphas_bar, schedule.betas
    one, zero = bar.new_ones(1), bar.new_zeros(1)
    before = torch.cat([one, bar[:-1]])
    c_x0, c_xt, variance, _ = schedulers.posterior_coefficients(bar, before)
    return {
        "alphas": 1 - betas,
        "betas": betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": before,
        "alphas_cumprod_next": torch.cat([bar[1:], zero]),
        "log_one_minus_alphas_cumprod": (1 - bar).log(),
        "noise_posterior_mean_x_t_coef": (1 - betas).rsqrt(),
        "noise_posterior_mean_noise_coef": betas / ((1 - betas) * (1 - bar)).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": torch.cat([variance[1:2], variance[1:]]).log(),
        "shift_coef": -posterior_gap.shift_coefficient(schedule),
        "sqrt_alphas_cumprod": bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - bar).sqrt(),
        "sqrt_recip_alphas_cumprod": bar.rsqrt(),
        "sqrt_recip_alphas_cumprod_m1": (1 / bar - 1).sqrt(),
        "weight": posterior_gap.gap_weight(schedule, config["gamma"]),
        "x_0_posterior_mean_x_0_coef": c_x0,
        "x_0_posterior_mean_x_t_coef": c_xt,
    }


def _nodes(schedule: schedulers.Schedule, S: int) -> list[int]:
    """Timesteps of the nodes 0 .. S; as the original has it, more than T - 1 steps are T - 1."""
    return [0, *schedulers.respace(schedule.T, min(S, schedule.T - 1), "nodes")[::-1]]


def _run_grids(config: dict, inputs: dict) -> dict:
    schedule, out = _schedule(config), {}
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for S in inputs["S"]:
        times = _nodes(schedule, S)
        bar = schedule.alphas_bar[times]
        before = torch.cat([one, bar[:-1]])
        out |= {
            f"map_{S}": torch.tensor(times),
            f"betas_{S}": 1 - bar / before,
            f"acp_prev_{S}": before,
            f"acp_next_{S}": torch.cat([bar[1:], zero]),
            f"s1m_{S}": (1 - bar).sqrt(),
            f"recip_{S}": bar.rsqrt(),
            f"recipm1_{S}": (1 / bar - 1).sqrt(),
            f"transitions_{S}": len(times) - 1,
        }
    return out


def _run_gap(config: dict, inputs: dict) -> dict:
    """Everything that posterior_gap.gap_curve is made of, at one time after the other, and its curves."""
    schedule, found = _schedule(config), {}
    z_0, noise, y, times = inputs["x_0"], inputs["noise"], inputs["y"], torch.tensor(inputs["t"])
    c_x0, c_noise = (1 - schedule.betas).rsqrt(), _schedule_tables(config | {"gamma": 0.1})
    for step in times:
        t = step.expand(len(z_0))
        z_t = schedulers.q_sample(schedule, z_0, t, noise)
        eps, G = _analytic_decoder(z_t, t, y)
        guided = posterior_gap.guided_denoiser(_analytic_decoder, y, schedule)(z_t, t)
        parts = {
            "x_t": z_t,
            "pred_x0": schedulers.x0_from_eps(schedule, z_t, t, eps),
            "pred_x0_shifted": schedulers.x0_from_eps(schedule, z_t, t, guided),
            "true_mean": posterior_gap.posterior_mean(schedule, z_0, z_t, t),
            "pred_mean_direct": schedulers.at(c_x0, t, z_t) * z_t
            - schedulers.at(c_noise["noise_posterior_mean_noise_coef"], t, z_t) * eps,
        }
        parts["pred_mean"] = posterior_gap.posterior_mean(schedule, parts["pred_x0"], z_t, t)
        for name, value in parts.items():
            found.setdefault(name, []).append(value)
    curves = posterior_gap.gap_curve(
        _analytic_decoder, z_0, y[:, None], schedule, times, noise[:, None].expand(-1, len(times), *noise.shape[1:])
    )
    gaps = {"gap_plain": curves["without"].mean(0), "gap_shifted": curves["with"].mean(0)}
    return {name: torch.stack(values) for name, values in found.items()} | gaps


def _run_ancestral(config: dict, inputs: dict) -> dict:
    schedule, x_T = _schedule(config), inputs["x_T"]
    guided = posterior_gap.guided_denoiser(_analytic_decoder, inputs["y"], schedule)
    states = []

    def sample(denoise, **how):
        noise = lambda i, shape: inputs[f"noise_{i}"]  # noqa: E731
        return schedulers.ddpm_sample(denoise, x_T, schedule, noise=noise, **how)

    out = {"ddpm_plain": sample(_analytic_eps, callback=lambda i, t, x, x_0: states.append(x))}
    out |= {"ddpm_guided": sample(guided), "traj_plain": torch.stack([*states[1:], out["ddpm_plain"]])}

    # single steps, every sample at its own t
    t = torch.tensor(inputs["t_step"])
    tables, at = _schedule_tables(config | {"gamma": 0.1}), partial(schedulers.at, t=t, like=x_T)
    x_0 = schedulers.x0_from_eps(schedule, x_T, t, _analytic_eps(x_T, t))
    noise = inputs["noise_0"] * at((torch.arange(schedule.T) > 0).double())
    log_small, log_large = tables["posterior_log_variance_clipped"], schedule.betas.log()

    def step(x_0, log_variance):
        mean = at(tables["x_0_posterior_mean_x_0_coef"]) * x_0 + at(tables["x_0_posterior_mean_x_t_coef"]) * x_T
        return mean + (0.5 * log_variance).exp() * noise

    share = (inputs["learned_range_raw"].tanh() + 1) / 2
    learned = share * at(log_large) + (1 - share) * at(log_small)
    return out | {
        "step_noise": step(x_0, at(log_small)),
        "step_noclip": step(x_0, at(log_small)),
        "step_clip": step(x_0.clamp(-1, 1), at(log_small)),
        "step_learned": step(x_0, learned),
        "log_variance_learned": learned,
    }


class _Steps:
    """Sampling and inversion on the original's grid of S steps: posterior_gap.UPSTREAM, with or without the clamp."""

    def __init__(self, config: dict, clamp: bool, schedule: schedulers.Schedule | None = None):
        self.schedule = schedule or _schedule(config)
        self.S = config["S"]
        self.nodes = _nodes(self.schedule, self.S)
        self.how = {"spacing": "nodes", "final": "first", "clip": posterior_gap.UPSTREAM["clip"] if clamp else None}

    def guided(self, y: Tensor, decoder=_analytic_decoder, **options) -> Callable:
        return posterior_gap.guided_denoiser(decoder, y, self.schedule, "sampling", **options)

    def sample(self, denoise: Callable, x: Tensor, **how) -> Tensor:
        return posterior_gap.sample(denoise, x, self.schedule, self.S, **self.how, **how)

    def invert(self, denoise: Callable, x: Tensor) -> Tensor:
        return posterior_gap.invert(denoise, x, self.schedule, self.S, **self.how)

    def states(self, denoise: Callable, x: Tensor) -> Tensor:
        """x after every step of sampling."""
        seen = []
        end = self.sample(denoise, x, callback=lambda i, t, x, x_0: seen.append(x))
        return torch.stack([*seen[1:], end])

    def down(self, denoise: Callable, x: Tensor, i: int) -> Tensor:
        """One step of sampling from node i."""
        final = self.schedule.alphas_bar[self.nodes[i - 1]].item()
        return schedulers.ddim_sample(
            denoise, x, self.schedule, [self.nodes[i]], final=final, clip=self.how["clip"]
        )  # fmt: skip

    def up(self, denoise: Callable, x: Tensor, i: int) -> Tensor:
        """One step of inversion from node i, where ddim_invert would start from t = 0."""
        start, time = self.schedule.alphas_bar[self.nodes[i]].item(), self.nodes[i]
        return schedulers.ddim_invert(
            lambda x, t: denoise(x, torch.full_like(t, time)), x, self.schedule, [self.nodes[i + 1]],
            start=start, clip=self.how["clip"],
        )  # fmt: skip


def _run_ddim(config: dict, inputs: dict) -> dict:
    steps, x_T, x_0 = _Steps(config, config["clamp"]), inputs["x_T"], inputs["x_0"]
    guided = steps.guided(inputs["y"])
    stopped = steps.guided(inputs["y"], stop_percent=config["stop_percent"], timesteps=steps.nodes[:0:-1])
    out = {"sample_stop": steps.sample(stopped, x_T)}
    for name, denoise in (("plain", _analytic_eps), ("guided", guided)):
        out[f"sample_{name}"] = steps.sample(denoise, x_T)
        out[f"encode_{name}"] = steps.invert(denoise, x_0)
        out[f"traj_{name}"] = steps.states(denoise, x_T)
    out["roundtrip_guided"] = steps.sample(guided, out["encode_guided"])
    for i in inputs["step_nodes"]:
        for prefix, denoise in (("", _analytic_eps), ("g", guided)):
            out[f"{prefix}step_sample__{i}"] = steps.down(denoise, x_T, i)
            out[f"{prefix}step_encode__{i - 1}"] = steps.up(denoise, x_0, i - 1)
    return out


# ------------------------------------------------------------------------------------------------ golden: applications
# Imports lie in the functions: whoever loads a checkpoint needs none of these modules.


def _run_interpolation(config: dict, inputs: dict) -> dict:
    from ldae.interpolation import lerp, mix_codes, slerp

    a, b, alphas = inputs["a"], inputs["b"], inputs["alpha"]
    one = torch.ones(1, 4)

    def angle(a, b):
        return F.cosine_similarity(a.flatten(1), b.flatten(1)).acos()

    def over_alphas(mix):
        return torch.stack([mix(alpha) for alpha in alphas])

    def code(volume):
        return volume.mean((1, 2, 3, 4))[:, None] * inputs["u"] + inputs["v"]

    def whole(alpha):  # the original takes a batch for one vector
        return slerp(a.flatten()[None], b.flatten()[None], alpha).view(a.shape)

    # Ours gives the ends themselves where the arc has no length; the formula alone, which the case states, is 0 / 0.
    no_arc = (0.5 * angle(one, one)).sin() / angle(one, one).sin()
    out = {
        "theta_batch": angle(a.flatten()[None], b.flatten()[None])[0],
        "theta_items": angle(a, b),
        "lerp": over_alphas(lambda alpha: lerp(a, b, alpha)),
        "slerp_items": over_alphas(lambda alpha: slerp(a, b, alpha)),
        "slerp_batch": over_alphas(whole),
        "slerp_equal": no_arc * one + no_arc * one,
        "slerp_opposite": slerp(one, -one, 0.5),
        "y1": (y1 := code(inputs["volume_1"])),
        "y2": (y2 := code(inputs["volume_2"])),
    }
    for suffix, clamp in (("", True), ("_unclamped", False)):
        steps = _Steps(config, clamp)
        z1, z2 = steps.invert(steps.guided(y1), a), steps.invert(steps.guided(y2), b)
        flat = [(y, z.flatten()[None]) for y, z in ((y1, z1), (y2, z2))]

        def pipeline(alpha, path, steps=steps, flat=flat):
            y, z_T = mix_codes(*flat, alpha, path)
            return steps.sample(steps.guided(y), z_T.view(a.shape))

        def trajectory(alpha, steps=steps):
            decoder = posterior_gap.mixed_decoder(_analytic_decoder, y1, y2, alpha)
            return steps.sample(steps.guided(None, decoder), inputs["x_T"])

        out |= {f"pipe_{path}{suffix}": over_alphas(partial(pipeline, path=path)) for path in ("slerp", "lerp")}
        out[f"traj_mix{suffix}"] = over_alphas(trajectory)
    return out


def _run_interpolation_protocol(config: dict, inputs: dict) -> dict:
    from ldae.interpolation import grouped, triples

    found = triples(inputs["sessions"], config["min_sessions"])
    scores = zip(found, inputs["ssim"], inputs["mse"], strict=True)
    rows = [triple.to_dict() | {"ssim": ssim, "mse": mse} for triple, ssim, mse in scores]
    names = ("ssim", "mse")
    ends = ("_min", "_max")
    positions = grouped(rows, "position", names)
    return {
        "pairs": [[x.subject, x.start, x.end, x.target, x.alpha, x.time_gap] for x in found],
        "by_time_gap": grouped(rows, "time_gap", names),
        "by_prediction_gap": grouped(rows, "prediction_gap", names),
        "by_position": {at: {key: value for key, value in row.items() if not key.endswith(ends)}
                        for at, row in positions.items()},
    }  # fmt: skip


def _run_manipulation(config: dict, inputs: dict) -> dict:
    from ldae.manipulation import Direction

    z_0, y, n = inputs["z_0"], inputs["y"], inputs["y"].shape[1]
    mean, std = inputs["mean"], 0.5 + inputs["std_raw"].abs()
    direction = Direction(mean, std, inputs["direction"][0], 0.0, "CN", "AD")
    row = Direction(mean, std, inputs["class_weight"][inputs["class_id"]], 0.0, "CN", "AD")
    codes = [direction.edit(y, amount, "upstream") for amount in inputs["scale"]]
    old = row.edit(y, inputs["scale"][0] * (512 / n) ** 0.5, "upstream")  # PDAE's factor belongs to 512 numbers
    out = {"y_normalised": direction.normalise(y), "y_edit": torch.stack(codes), "old_style_y": old}
    for name, clamp in (("edited", True), ("edited_unclamped", False)):
        steps = _Steps(config, clamp)
        z_T = steps.invert(steps.guided(y), z_0)
        out[name] = torch.stack([steps.sample(steps.guided(code), z_T) for code in codes])
    steps = _Steps(config, clamp=True)
    return out | {"old_style": steps.sample(steps.guided(old), inputs["x_T"])}


def _run_code_prior(config: dict, inputs: dict) -> dict:
    from ldae.code_prior import code_prior_loss, normalise

    betas = torch.full((config["timesteps"],), config["beta"], dtype=torch.float64)
    schedule = schedulers.schedule_from_betas(betas)
    z_0 = normalise(inputs["y"], inputs["mean"], 0.5 + inputs["std_raw"].abs())
    t = torch.tensor(inputs["t"])
    free, clamped = (_Steps({"S": 10}, clamp, schedule) for clamp in (False, True))
    bar = schedule.alphas_bar
    return {
        "betas": betas,
        "alphas_cumprod": bar,
        "sqrt_alphas_cumprod": bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - bar).sqrt(),
        "loss": code_prior_loss(_analytic_eps, schedule, z_0, t, inputs["noise"], config["loss"]).mean(),
        "loop_clamped": clamped.sample(_analytic_eps, inputs["z_T"]),
    } | {f"step__{i}": free.down(_analytic_eps, inputs["z_T"], i) for i in inputs["step_nodes"]}


def _run_metrics(config: dict, inputs: dict) -> dict:
    from ldae.evaluation import windowed_ssim

    na, nb = (F.avg_pool3d(3 * inputs[name], 3, stride=1, padding=1) for name in ("a_raw", "b_raw"))
    a = (0.5 + 0.25 * na).clamp(0, 1)
    b = (a + 0.1 * nb).clamp(0, 1)
    pairs = list(zip(a[:, 0].numpy(), b[:, 0].numpy(), strict=True))
    out = {f"ssim_{k}": [[windowed_ssim(x, y, k)] for x, y in pairs] for k in config["ssim_kernel_sizes"]}
    for k in config["ms_ssim_kernel_sizes"]:
        out[f"msssim_{k}"] = [[metrics.ms_ssim(x, y, data_range=1.0, window_size=k)] for x, y in pairs]
    statistics = [value for x in (a, b) for value in (x.mean(), x.std(correction=0))]
    return out | {"mse": F.mse_loss(a, b), "a_mean_std": torch.stack(statistics)}


# -------------------------------------------------------------------------------------------------------- golden: data


def _run_splits(config: dict, inputs: dict) -> dict:
    from ldae.data_split import group_shuffle
    from ldae.dataset import Row, class_index, frequent_classes

    rows = [Row(i, subject, int(session[1:]), Path(f"{i}.nii"), diagnosis, age, None, str(i))
            for i, (subject, session, diagnosis, age) in enumerate(inputs["rows"])]  # fmt: skip
    out = {}
    for name, rule in config["variants"].items():
        parts = group_shuffle(rows, rule["val_size"], rule["test_size"], rule["seed"], rule["classes"])
        out[f"subject_split__{name}"] = [[row.index for row in parts[part]] for part in ("train", "val", "test")]
        out[f"label_index__{name}"] = class_index(rule["classes"] or frequent_classes(rows))
    return out


def _run_preprocessing(config: dict, inputs: dict) -> dict:
    from ldae import preprocess

    stored = inputs["vol"].abs().numpy() * np.float32(inputs["scale_factor"])
    if config["dtype"] != "float32":
        stored = np.round(stored).astype(config["dtype"]).astype(np.float32)
    volume = nifti.Volume(stored, np.array(inputs["affine"], dtype=np.float64))
    prep = preprocess.Preparation.upstream(tuple(config["resize_to"]), config["pixdim"])
    plain = torch.from_numpy(preprocess.prepare(volume, prep).data)[None]
    image = to_slices(plain[None], config["slicing_plane"])[0, 0][None] if config["fake_3d"] else plain
    return {
        "image": image,
        "plain": plain,
        "image_shape": list(image.shape),
        "plain_shape": list(plain.shape),
        "plain_min_max": [plain.min().item(), plain.max().item()],
        "resampled_shape": list(preprocess.plan(volume, prep).shape),
    }


# --------------------------------------------------------------------------------- golden: cases of networks (weights)
# The original's module name -> (function(config) -> our network, function(model, inputs) -> outputs).

NETWORKS: dict[str, tuple[Callable, Callable]] = {
    "AutoencoderKL (MONAI generative 0.2.3)": (_build_aekl, _run_aekl),
    "PatchDiscriminator (MONAI generative 0.2.3)": (_build_discriminator, _run_discriminator),
    "LitAutoencoderKL.training_step": (_build_aekl_module, _run_aekl_step),
    "PerceptualLoss (MONAI generative 0.2.3, lpips 0.1.4, squeeze)": (_build_perceptual, _run_perceptual),
    "PerceptualLoss (MONAI generative 0.2.3, lpips 0.1.4, alex)": (_build_perceptual, _run_perceptual),
    "PerceptualLoss (MONAI generative 0.2.3, lpips 0.1.4, vgg)": (_build_perceptual, _run_perceptual),
    "UNet": (_build_unet, _run_unet),
    "ShiftUNet": (_build_shift_unet, _run_shift_unet),
    "AttentionSemanticEncoder": (_build_encoder, _run_encoder),
    "EncoderClassifier": (_build_classifier, _run_classifier),
    "EncoderRegressor": (_build_regressor, _run_regressor),
    "UNet + GaussianDiffusion.regular_train_one_batch": (_build_prior_and_schedule, _run_prior_loss),
    "AttentionSemanticEncoder + ShiftUNet + GaussianDiffusion.latent_representation_learning_train_one_batch": (
        _build_representation,
        _run_representation_loss,
    ),
    "LatentDiffusionAutoencoders": (_build_stage, _run_stage),
    "PositionalEncoding, timestep_embedding, SoftAttention, SliceDistributed, convert_first_layer_rgb_to_grayscale": (
        _build_blocks,
        _run_blocks,
    ),
    "train_manipulation: train_one_epoch / evaluate / compute_binary_classification_metrics": (_build_probe, None),
}


# ------------------------------------------------------------------------------ golden: cases of functions (no weights)
# The original's module name -> function(config, inputs) -> outputs.

FUNCTIONS: dict[str, Callable] = {
    "GaussianDiffusion": _run_gaussian_diffusion,
    "GaussianDiffusion.get_ddim_betas_and_timestep_map + DDIM": _run_grids,
    "GaussianDiffusion / DDIM": _run_ddim,
    "gaussian_diffusion.slerp / lerp, GaussianDiffusion": _run_interpolation,
    "InterpolationEvaluator": _run_interpolation_protocol,
    "GaussianDiffusion.latent_semantic_manipulation / manipulation_sample": _run_manipulation,
    "GaussianDiffusion (code-prior part)": _run_code_prior,
    "SSIMMetric / MultiScaleSSIMMetric / FIDMetric (MONAI generative 0.2.3)": _run_metrics,
    "BrainMRDataModule": _run_splits,
    "BrainMRDataModule transforms (MONAI 1.3.2)": _run_preprocessing,
    "train_manipulation.main": None,
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
    names = [*case["outputs"], *case.get("expected", {})]
    rules = LEFT_OUT.get(case["module"], {})
    return {name: reason for name in names for pattern, reason in rules.items() if re.match(pattern, name)}


LEFT_OUT: dict[str, dict[str, str]] = {  # the original's module name -> {pattern of its outputs: why}
    "LitAutoencoderKL.training_step": {
        "gradD": "the generator's pass leaves nothing in our discriminator; the original's learns from it",
        "delta__discriminator": "the original's discriminator also learns from the generator's pass",
        "after__": "generated volumes pass our discriminator once a step, the original's twice",
    },
    "LatentDiffusionAutoencoders": {
        "delta__ema_encoder.slice_distributed": "the original averages tensors of two names twice an update",
        "delta__ema_decoder.out": "the frozen prior has no average here, it is stored once",
    },
    "train_manipulation: train_one_epoch / evaluate / compute_binary_classification_metrics": {
        "": "our probes are fitted to convergence under grouped cross-validation, not for some epochs",
    },
    "train_manipulation.main": {
        "": "the original's probes split rows, so that a subject is on both sides, and scale ages with the test set's",
    },
    "SSIMMetric / MultiScaleSSIMMetric / FIDMetric (MONAI generative 0.2.3)": {
        "fid": "no Frechet distance of 2048 features from a few scans here",
    },
}
