"""Checkpoints and reference cases of the original MGDCR program in terms of our modules.

`from_checkpoint` builds our network of one of the original's Lightning checkpoints (`ema_model.*`, `model.*`, `x_T`) or
of a bare state dict, and `to_upstream` gives our weights under the original's names. `build`, `load`, `run` are what
`python -m tests.golden` calls: our network for the original's class name and arguments, strict loading from the
original's keys, and the named outputs of a reference case; `then` is what a case does to an input in words.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from common import checkpoint, schedulers
from common.blocks3d import sinusoidal_embedding
from common.cli import UserError
from common.ema import EMA
from common.runtime import Runtime
from mgdcr import diffusion
from mgdcr.latent_net import Layer, MLPSkipNet
from mgdcr.model import (
    Attention,
    DiffAE,
    Down,
    EncoderBlock,
    ResidualBlock,
    SemanticEncoder,
    Stage,
    UncondUNet,
    UNet,
    Up,
)

# ------------------------------------------------------------------------------------------------------------ key map

BLOCK = {"norm1": "in_layers.0", "conv1": "in_layers.2", "skip": "skip_connection"}

# Our class -> {our submodule: the original's}. A class that is not listed is a leaf: same names there.
NAMES: dict[type[nn.Module], dict[str, str]] = {
    DiffAE: {"encoder": "encoder", "unet": ""},
    UncondUNet: {"unet": ""},
    SemanticEncoder: {"conv_in": "input_blocks.0.0", "middle": "middle_block", "head": "out"},
    UNet: {"conv_in": "input_blocks.0.0", "middle": "middle_block", "output_stages": "output_blocks", "out": "out"},
    EncoderBlock: BLOCK,
    ResidualBlock: BLOCK
    | {"time": "emb_layers.1", "code": "cond_emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3"},
    Attention: {"norm": "norm", "qkv": "qkv", "proj": "proj_out"},
    Down: {"conv": "op"},
    Up: {"conv": "conv"},
    MLPSkipNet: {"time1": "time_embed.0", "time2": "time_embed.2"},
    Layer: {"linear": "linear", "time": "cond_layers.1", "norm": "norm"},
}
# The original registers the time layers of its latent network twice; the first name here is the one in force.
TWIN = (".cond_layers.1.", ".linear_emb.")


def _children(module: nn.Module) -> dict[str, str]:
    names = dict(NAMES.get(type(module), {}))
    if isinstance(module, SemanticEncoder):
        names |= {f"stages.{i}": f"input_blocks.{i + 1}" for i in range(len(module.stages))}
    if isinstance(module, UNet):
        names |= {f"input_stages.{i}": f"input_blocks.{i + 1}" for i in range(len(module.input_stages))}
        time = "time_embed.time_embed" if module.conditional else "time_embed"
        names |= {"time1": f"{time}.0", "time2": f"{time}.2"}
    if isinstance(module, MLPSkipNet):
        names |= {f"layers.{i}": f"layers.{i}" for i in range(len(module.layers))}
        names |= {"out": f"layers.{len(module.layers)}.linear"}
    if isinstance(module, Stage) or type(module) is nn.ModuleList:
        names = {name: name for name, _ in module.named_children()}
    return names


def key_map(model: nn.Module) -> dict[str, str]:
    """Our state-dict key -> the original's key, for every entry of `model`."""
    return checkpoint.renamed_keys(model, _children)


def _with_twins(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return state_dict | {key.replace(*TWIN): value for key, value in state_dict.items() if TWIN[0] in key}


class LitModel(nn.Module):
    """The original's training module as far as inference needs it: the averaged network, and the buffer x_T."""

    def __init__(self, network: nn.Module, x_T: Tensor | None):
        super().__init__()
        self.network = network
        self.register_buffer("x_T", x_T)


def to_upstream(model: nn.Module, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """State dict of `model` (or another one with its keys, for example the average's) under the original's names."""
    if isinstance(model, LitModel):
        network = to_upstream(model.network)
        copies = ("model.", "ema_model.") if model.x_T is not None else ("ema_model.",)
        state = {prefix + key: value for prefix in copies for key, value in network.items()}
        return state | ({} if model.x_T is None else {"x_T": model.x_T})
    names, state_dict = key_map(model), model.state_dict() if state_dict is None else state_dict
    return _with_twins({names[key]: value for key, value in state_dict.items()})


def load(model: nn.Module, state_dict: dict[str, Tensor], assign: bool = False) -> nn.Module:
    """Fill `model` from a state dict with the original's keys; returns it.

    Strict: UserError names missing, unexpected and differently shaped entries. Second names of shared tensors may be
    absent. assign: take over the tensors instead of copying them.
    """
    if isinstance(model, LitModel):
        load(model.network, _below("ema_model.", state_dict), assign)
        return model
    names = key_map(model)
    known = _with_twins(dict.fromkeys(names.values()))
    checkpoint.load_renamed(model, state_dict, names, known, assign)
    return model


def _below(prefix: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


# ------------------------------------------------------------------------------------------------ the original's files

PUBLISHED = {"image_size": 128, "num_heads": 1, "dropout": 0.1}  # what leaves no trace in the weights
KINDS = {"diffae": DiffAE, "ddim": UncondUNet, "latent": MLPSkipNet}


def from_checkpoint(content: dict, path, *, weights: str = "ema", **overrides) -> tuple[str, dict, nn.Module]:
    """(kind, constructor arguments, our network) of a file of the original: a Lightning checkpoint or bare weights.

    kind: "diffae", "ddim" (unconditional) or "latent" (the MLP over codes). weights: "ema", which is what inference
    uses, or "raw"; bare weights are neither. `overrides`: constructor arguments that leave no trace in the weights,
    where they are not the published ones; the number of blocks per level of the encoder is taken to be the U-Net's.
    UserError, naming `path`, if the weights are of something else.
    """
    state = content.get("state_dict", content)
    state = state.items() if isinstance(state, dict) else ()
    state = {key: value.float() for key, value in state if isinstance(value, Tensor)}
    part = _below({"ema": "ema_model.", "raw": "model."}[weights], state)
    if not part and any(key.startswith(("ema_model.", "model.")) for key in state):
        raise UserError(f"{path} has no {weights} weights; ask for the others")
    image_size = {"image_size": state["x_T"].shape[-1]} if "x_T" in state and state["x_T"].ndim == 4 else {}
    part = part or {key: value for key, value in state.items() if key != "x_T"}
    try:
        kind, settings = _identify(part, image_size | overrides)
        with torch.device("meta"):
            network = KINDS[kind](**settings)
        return kind, settings, load(network, part, assign=True)
    except (UserError, ValueError, KeyError, IndexError, TypeError) as error:  # keys of some other network
        what = f"no {error.args[0]}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is no checkpoint of the original MGDCR: {what}; name another file") from None


def _identify(state: dict[str, Tensor], overrides: dict) -> tuple[str, dict]:
    if "layers.0.linear.weight" in state:
        return "latent", _identify_latent(state) | overrides
    published = PUBLISHED | overrides
    settings = published | _identify_unet(state, published["image_size"]) | overrides
    if "encoder.out.3.weight" not in state:
        return "ddim", settings
    blocks = {"enc_num_res_blocks": settings["num_res_blocks"]} | overrides
    encoder = _identify_encoder(_below("encoder.", state), settings, blocks["enc_num_res_blocks"])
    cond = state["middle_block.0.cond_emb_layers.1.weight"].shape[1]
    return "diffae", settings | blocks | encoder | {"cond_channels": cond} | overrides


def _identify_latent(state: dict[str, Tensor]) -> dict:
    hidden, channels = state["layers.0.linear.weight"].shape
    widths = [state[f"layers.{i}.linear.weight"].shape[1] for i in range(_count(state, "layers"))]
    skips = [i for i, width in enumerate(widths) if i > 0 and width == hidden + channels]
    return {
        "num_channels": channels,
        "num_hid_channels": hidden,
        "num_layers": len(widths),
        "skip_layers": skips,
        "num_time_emb_channels": state["time_embed.0.weight"].shape[1],
    }


def _count(state: dict[str, Tensor], name: str) -> int:
    """How many numbered modules `name`.0, `name`.1, ... there are."""
    return 1 + max(int(key.split(".")[1]) for key in state if key.startswith(f"{name}."))


def _identify_unet(state: dict[str, Tensor], image_size: int) -> dict:
    """The last block of each level of the expanding half goes up, which shows how many levels there are."""
    n_in, n_out = _count(state, "input_blocks"), _count(state, "output_blocks")
    ups = sum(bool(re.match(r"output_blocks\.\d+\.[12]\.(in_layers\.2|conv)\.weight", key)) for key in state)
    levels = ups + 1
    per_level = n_in // levels  # with the first convolution, or the way down, in front
    blocks, base = n_out // levels - 1, len(state["input_blocks.0.0.weight"])
    time = "time_embed.time_embed.0.weight" if "time_embed.time_embed.0.weight" in state else "time_embed.0.weight"
    mult, attends = _levels(state, levels, per_level, base)
    return {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": len(state["out.2.weight"]),
        "model_channels": base,
        "channel_mult": mult,
        "num_res_blocks": blocks,
        "num_input_res_blocks": None if per_level - 1 == blocks else per_level - 1,
        "attention_resolutions": [image_size // 2**level for level in attends],
        "embed_channels": len(state[time]),
        "resblock_updown": not any(re.match(r"input_blocks\.\d+\.0\.op\.weight", key) for key in state),
    }


def _identify_encoder(state: dict[str, Tensor], unet: dict, blocks: int) -> dict:
    levels = _count(state, "input_blocks") // (blocks + 1)
    mult, attends = _levels(state, levels, blocks + 1, unet["model_channels"])
    return {
        "enc_channel_mult": mult,
        "enc_attention_resolutions": [unet["image_size"] // 2**level for level in attends],
        "enc_out_channels": len(state["out.3.weight"]),
    }


def _levels(state: dict[str, Tensor], levels: int, per_level: int, base: int) -> tuple[list[int], list[int]]:
    """Width multipliers of the contracting half, and the levels with attention."""
    firsts = [1 + level * per_level for level in range(levels)]  # first residual block of each level
    mult = [len(state[f"input_blocks.{i}.0.in_layers.2.weight"]) // base for i in firsts]
    return mult, [level for level, i in enumerate(firsts) if f"input_blocks.{i}.1.qkv.weight" in state]


# ------------------------------------------------------------------------------------------ golden: building networks

RENAMED = {
    "resnet_cond_channels": "cond_channels",
    "enc_attn_resolutions": "enc_attention_resolutions",
    "enc_num_res_block": "enc_num_res_blocks",
}


def _settings(config: dict, **fixed) -> dict:
    """Our constructor arguments of the original's `config`, of which `fixed` must have the only value that we have."""
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise UserError(f"{name} {config[name]}: only {value} is implemented")
    return {RENAMED.get(name, name): value for name, value in config.items() if name not in fixed}


def _build_diffae(config: dict) -> DiffAE:
    published = {name: PUBLISHED[name] for name in ("num_heads", "dropout")}
    return DiffAE(**published | _settings(config, resnet_two_cond=True, enc_pool="adaptivenonzero"))


def _build_uncond(config: dict) -> UncondUNet:
    return UncondUNet(**_settings(config, resnet_two_cond=False))


def _build_latent(config: dict) -> MLPSkipNet:
    fixed = {"activation": "silu", "use_norm": True, "condition_bias": 1, "last_act": "none", "num_time_layers": 2}
    return MLPSkipNet(**_settings(config, **fixed, time_last_act=False))


def _build_lit(config: dict) -> LitModel:
    config = dict(config)
    size, samples = config["image_size"], config.pop("sample_size")
    return LitModel(_build_diffae(config), torch.zeros(samples, 1, size, size))


def _build_pipeline(config: dict) -> LitModel:
    """Of a reconstruction only the averaged weights are listed."""
    network = {name: value for name, value in config["network"].items() if name != "sample_size"}
    model = LitModel(_build_diffae(network), None)
    model.script = {name: value for name, value in config.items() if name != "network"}
    return model


# ------------------------------------------------------------------------------------------ golden: running networks


class _StageStatistics:
    """Mean and standard deviation of what each stage of networks puts out, in the order in which they first run."""

    def __init__(self, *networks: SemanticEncoder | UNet):
        self.found: dict[nn.Module, list[Tensor]] = {}
        self.hooks = []
        for network in networks:
            stages = network.stages if isinstance(network, SemanticEncoder) else network.input_stages
            after = [] if isinstance(network, SemanticEncoder) else network.output_stages
            for stage in (network.conv_in, *stages, network.middle, *after):
                self.hooks.append(stage.register_forward_hook(self._note))

    def _note(self, stage, inputs, output):
        self.found[stage] = [output.double().mean(), output.double().std(correction=0)]

    def __call__(self) -> Tensor:
        for hook in self.hooks:
            hook.remove()
        return torch.tensor(list(self.found.values()))


@torch.no_grad()
def _run_diffae(model: DiffAE, inputs: dict) -> dict:
    if "noise" in inputs:
        return _run_training(model, inputs)
    t, statistics = torch.tensor(inputs["t"]), _StageStatistics(model.encoder, model.unet)
    z = model.encode(inputs["x_start"])
    out = {"z": z, "pred_z": model.denoise(inputs["x"], t, z), "stage_stats": statistics()}
    return out | {
        "feat2d": model.encoder.features(inputs["x_start"]),
        "pred_cond": model.denoise(inputs["x"], t, inputs["cond"]),
    }


@torch.no_grad()
def _run_uncond(model: UncondUNet, inputs: dict) -> dict:
    if "noise" in inputs:
        return _run_first_step(model, inputs["x_start"], torch.tensor(inputs["t"]), inputs["noise"])
    statistics = _StageStatistics(model.unet)
    return {"pred": model.denoise(inputs["x"], torch.tensor(inputs["t"])), "stage_stats": statistics()}


@torch.no_grad()
def _run_latent(model: MLPSkipNet, inputs: dict) -> dict:
    if "noise" in inputs:
        return _run_latent_training(model, inputs)
    return {"pred": model(inputs["x"], torch.tensor(inputs["t"]))}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return {f"grad:{key}": grad for key, grad in to_upstream(model, grads).items()}


@torch.enable_grad()
def _run_first_step(model: nn.Module, x_0: Tensor, t: Tensor, noise: Tensor) -> dict:
    """Loss and gradients of one batch, through the loss of trainer.py."""
    from mgdcr import trainer  # here, because whoever loads a checkpoint needs no trainer

    model.zero_grad()
    loss = trainer.noise_loss(model, x_0, t, noise)
    loss.mean().backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    return {"loss": loss.detach(), "loss_mean": loss.detach().mean(), "grad_norm": norm} | _gradients(model)


def _run_training(model: DiffAE, inputs: dict) -> dict:
    first, schedule = torch.tensor(inputs["t_first"]), diffusion.SCHEDULE
    x_0, noise = inputs["x_start"](k=0), inputs["noise"](k=0)
    x_t = schedulers.q_sample(schedule, x_0, first, noise)
    out = _run_first_step(model, x_0, first, noise)
    eps = model.denoise(x_t, first, model.encode(x_0))
    out |= {"x_t": x_t, "pred_xstart": schedulers.x0_from_eps(schedule, x_t, first, eps)}

    optimizer, ema = torch.optim.Adam(model.parameters(), inputs["lr"]), EMA(model, inputs["ema_decay"])
    losses, norms, stride = [], [], int(re.search(r"(\d+) ?\* ?k", inputs["t_rule"])[1])
    for k in range(inputs["steps"]):
        t = (first + stride * k) % schedule.T
        losses.append(_run_first_step(model, inputs["x_start"](k=k), t, inputs["noise"](k=k))["loss_mean"])
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), inputs["grad_clip"]))
        optimizer.step()
        ema.update(model)
    out |= {"steps_loss": torch.stack(losses), "steps_grad_norm": torch.stack(norms)}
    out |= {f"after:{key}": value for key, value in to_upstream(model).items()}
    return out | {f"ema:{key}": value for key, value in to_upstream(ema.module).items()}


@torch.enable_grad()
def _run_latent_training(model: MLPSkipNet, inputs: dict) -> dict:
    from mgdcr import code_prior

    schedule, t = _named_schedule(inputs["beta_schedule"], 1000), torch.tensor(inputs["t"])
    z_0 = (inputs["cond"] - inputs["mean"]) / inputs["std"]
    loss = code_prior.code_loss(model, schedule, z_0, t, inputs["noise"], inputs["loss_type"])
    loss.mean().backward()
    out = {"x_start": z_0, "loss": loss.detach(), "loss_mean": loss.detach().mean()}
    return out | {"x_t": schedulers.q_sample(schedule, z_0, t, inputs["noise"])} | _gradients(model)


def _run_lit(model: LitModel, inputs: dict) -> dict:
    network, steps = model.network.eval(), inputs["T"]
    with torch.no_grad():
        z = network.encode(inputs["x"])
        x_T = diffusion.invert(network, inputs["x"], z, steps)
        out = {"z": z, "x_T": x_T, "reconstruction": diffusion.decode(network, x_T, z, steps)}
    x_T, z = inputs["x_T"].clone().requires_grad_(), z.clone().requires_grad_()
    decoded = diffusion.decode(network, x_T, z, steps, checkpointing=True)
    grad_x_T, grad_z = torch.autograd.grad(decoded.square().sum(), [x_T, z])
    return out | {"decode_random": decoded.detach(), "grad_x_T": grad_x_T, "grad_z": grad_z}


# ---------------------------------------------------------------------------------------------------- golden: diffusion


def _named_schedule(name: str, steps: int) -> schedulers.Schedule:
    """The original's named schedule of `steps` steps, whose betas scale with 1000 / steps."""
    scale = 1000 / steps
    if name.startswith("const"):
        return schedulers.schedule_from_betas([scale * float(name.removeprefix("const"))] * steps)
    return schedulers.make_schedule(name, steps, scale * 1e-4, scale * 0.02)


def _run_schedules(config: dict, inputs: dict) -> dict:
    out = {}
    for name, steps in config["named"]:
        schedule = _named_schedule(name, steps)
        out |= {f"betas:{name}:{steps}": schedule.betas, f"alphas_cumprod:{name}:{steps}": schedule.alphas_bar}
    for steps in config["spaced"]:
        out |= {f"{table}:{steps}": values for table, values in _shortened(diffusion.timesteps(steps)[::-1]).items()}
    return out


def _shortened(times: list[int]) -> dict[str, Tensor]:
    """Tables of the process that keeps the increasing steps `times`."""
    bar = diffusion.SCHEDULE.alphas_bar[times]
    before = torch.cat([bar.new_ones(1), bar[:-1]])
    c_x0, c_xt, variance, betas = schedulers.posterior_coefficients(bar, before)
    return {
        "timesteps": torch.tensor(times),
        "betas": betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": before,
        "alphas_cumprod_next": torch.cat([bar[1:], bar.new_zeros(1)]),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": torch.cat([variance[1:2], variance[1:]]).log(),
        "posterior_mean_coef1": c_x0,
        "posterior_mean_coef2": c_xt,
        "fixed_large_log_variance": torch.cat([variance[1:2], betas[1:]]).log(),
    }


def _run_spacing(config: dict, inputs: dict) -> dict:
    def has_stride(steps):
        try:
            return bool(schedulers.respace(1000, steps, "stride"))
        except UserError:
            return False

    out = {f"ddim:{steps}": torch.tensor(diffusion.timesteps(steps)[::-1]) for steps in inputs["ddim"]}
    out["ddim_accepted"] = torch.tensor([steps for steps in range(1, 1001) if has_stride(steps)])
    for total, counts in inputs["sections"]:
        name = f"sections:{total}:{'-'.join(map(str, counts))}"
        out[name] = torch.tensor(_sections(total, counts))
    return out


def _sections(total: int, counts: list[int]) -> list[int]:
    """Increasing steps when `total` steps are cut into equal sections of which `counts` evenly spread ones are kept."""
    sizes = [total // len(counts) + (i < total % len(counts)) for i in range(len(counts))]
    out, start = [], 0
    for size, count in zip(sizes, counts, strict=True):
        stride = (size - 1) / (count - 1) if count > 1 else 1
        # Summed up as there: which of two neighbours a step halfway between them becomes depends on it.
        out += [start + round(t) for t in itertools.accumulate([stride] * (count - 1), initial=0.0)]
        start += size
    return out


class _Analytic:
    """Denoiser 0.3 x + 0.01 sin(t), and everything that it was asked: states, times, clean estimates."""

    def __init__(self, clamp: bool):
        self.clamp, self.states, self.times, self.clean = clamp, [], [], []

    def denoise(self, x_t: Tensor, t: Tensor, z: None = None) -> Tensor:
        eps = 0.3 * x_t + 0.01 * t.float().sin().view(-1, 1, 1, 1)
        x_0 = schedulers.x0_from_eps(diffusion.SCHEDULE, x_t, t, eps).detach()
        self.states.append(x_t.detach())
        self.times.append(int(t[0]))
        self.clean.append(x_0.clamp(-1, 1) if self.clamp else x_0)
        return eps

    def trajectory(self, end: Tensor) -> Tensor:
        """The state after each step, the last of which led to `end`."""
        return torch.stack([*self.states[1:], end.detach()])


def _run_diffusion(config: dict, inputs: dict) -> dict:
    """Four kinds of cases have this name: decoding with and without clamp, inversion, and samplers with noise."""
    if "x_0" in inputs:
        return _run_inversion(config, inputs)
    return _run_stochastic(config, inputs) if "ddim_noise" in inputs else _run_decoding(config, inputs)


def _run_decoding(config: dict, inputs: dict) -> dict:
    clamp, steps, x_T = config["clip_denoised"], config["T"], inputs["x_T"].clone().requires_grad_()
    model, how = _Analytic(clamp), "hard" if clamp else "none"
    x_0 = diffusion.decode(model, x_T, None, steps, how)
    (grad,) = torch.autograd.grad(x_0.square().sum(), x_T)
    out = {"sample": model.trajectory(x_0), "pred_xstart": torch.stack(model.clean)}
    out |= {"t_seen": torch.tensor(model.times), "pred_noise": _predicted_noise(model, inputs["x_T"], steps)}
    up, at = diffusion.timesteps(steps)[::-1], inputs.get("one_step_at", steps // 2)
    middle, final = up[at], diffusion.SCHEDULE.alphas_bar[up[at - 1]].item() if at else 1.0
    one_step = schedulers.ddim_sample(
        model.denoise, inputs["x_T"], diffusion.SCHEDULE, [middle], final=final, clip=1.0 if clamp else None
    )
    return out | {"grad_x_T": grad, "one_step": one_step}


def _predicted_noise(model: _Analytic, x: Tensor, steps: int) -> Tensor:
    """The noise of each step's clamped estimate, on a trajectory that is rounded as the original's is.

    It holds the alpha_bar to which a step leads in float32; the noise of 0.01 that is left at t = 0 is off by 3e-4.
    """
    schedule, out, times = diffusion.SCHEDULE, [], diffusion.timesteps(steps)
    for t, after in itertools.pairwise([*times, None]):

        def note(i, t, x_t, x_0):
            out.append(schedulers.eps_from_x0(schedule, x_t, torch.full((len(x_t),), t), x_0))

        final = 1.0 if after is None else schedule.alphas_bar[after].float().item()
        x = schedulers.ddim_sample(
            model.denoise, x, schedule, [t], final=final, clip=1.0 if model.clamp else None, callback=note
        )
    return torch.stack(out)


def _run_inversion(config: dict, inputs: dict) -> dict:
    model, steps = _Analytic(clamp=True), config["T"]
    x_T = diffusion.invert(model, inputs["x_0"], None, steps)
    out = {"sample_t": model.trajectory(x_T), "xstart_t": torch.stack(model.clean), "t_seen": torch.tensor(model.times)}
    return out | {"round_trip": diffusion.decode(model, x_T, None, steps)}


def _run_stochastic(config: dict, inputs: dict) -> dict:
    def drawn(name):
        return lambda i, shape: inputs[name](k=i)

    schedule, out = diffusion.SCHEDULE, {}
    model, times = _Analytic(clamp=True), diffusion.timesteps(config["ddim_T"])
    x_0 = schedulers.ddim_sample(
        model.denoise, inputs["x_T"], schedule, times, eta=config["eta"], noise=drawn("ddim_noise"), clip=1.0
    )
    tables = _shortened(times[::-1])
    out |= {
        "ddim_sample": model.trajectory(x_0),
        "ddim_sigma": config["eta"] * tables["posterior_variance"].sqrt().flip(0),
    }
    for name, variance in (("ddpm", "large"), ("ddpm_small", "small")):
        model, times = _Analytic(clamp=True), schedulers.respace(schedule.T, config["ddpm_T"], "linspace")
        x_0 = schedulers.ddpm_sample(
            model.denoise, inputs["x_T"], schedule, times, variance=variance, noise=drawn("ddpm_noise"), clip=1.0
        )
        out |= {f"{name}_sample": model.trajectory(x_0), f"{name}_pred_xstart": torch.stack(model.clean)}
        out[f"{name}_t_seen"] = torch.tensor(model.times)
    return out


def _run_time_embedding(config: dict, inputs: dict) -> dict:
    def embed(dim):
        return sinusoidal_embedding(torch.tensor(inputs["t"]), dim, max_period=config["max_period"], cos_first=True)

    return {f"emb:{dim}": embed(dim) for dim in inputs["dims"]}


def _run_quality(config: dict, inputs: dict) -> dict:
    from common import metrics

    pairs = list(zip(inputs["a"][:, 0], inputs["b"][:, 0], strict=True))
    return {
        "psnr": torch.tensor([float(metrics.psnr(a, b, data_range=config["data_range"])) for a, b in pairs]),
        "mse": torch.stack([(a - b).square().mean() for a, b in pairs]),
    }


# ------------------------------------------------------------------------------------------------ golden: the objective
# Imports lie in the functions: whoever loads a checkpoint needs none of these modules.


def _run_seeds(config: dict, inputs: dict) -> dict:
    from mgdcr import objective

    x, z, f, out = inputs["x"], inputs["z"], config["filling"], {}
    for name, schedule in (("legacy", "legacy"), ("exact", "even")):
        out[f"x_{name}"], out[f"z_{name}"] = objective.seeds(x, z, f, schedule)
    out["x_double_gap"], out["z_double_gap"] = objective.seeds(x[:2], z[:2], 2 * f)
    return out | {"slerp_quarter": torch.stack([objective.slerp(x[0], x[1], alpha) for alpha in (0, 0.25, 0.5, 1)])}


def _run_ex8(preset: str) -> Callable:
    """A published script, from our preset of it: terms of given slices and codes, or the whole reconstruction."""

    def run(config: dict, inputs: dict) -> dict:
        if "pred" not in inputs:
            return _run_reconstruction(_Given(inputs["x_observed"], inputs["z_observed"]), preset, config, inputs)
        weights, data, leaves = _goal(preset, config), _frame_data(inputs), _leaves(inputs)
        terms = weights.image_terms(leaves["pred"][:, 0], data) | weights.code_terms(leaves["x"], leaves["z"], data)
        named = {"roi": terms["lax"], "prior": weights.prior * terms["prior"], "smooth": terms["difference"]}
        total = weights.lax * named["roi"] + named["prior"] + weights.difference * named["smooth"]
        out = {f"{name}_losses": value for name, value in named.items()}
        out |= {"loss_per_slice": total, "total_loss": weights.total(terms)}
        return out | _term_gradients(named | {"total": total}, leaves)

    return run


def _goal(preset: str, config: dict):
    """The objective of a published script, with the weights of a case."""
    from mgdcr import objective

    weights = {"lax": config["w_lax"], "prior": config["w_prior"], "difference": config["w_smooth"]}
    return replace(objective.LEGACY[preset], **weights)


def _frame_data(inputs: dict):
    from mgdcr import objective

    painted = objective.Painted(inputs["target"], inputs["mask"])
    return objective.FrameData(inputs["pred"][:1, 0], len(inputs["pred"]), inputs["x0"], inputs["z0"], painted=painted)


def _leaves(inputs: dict) -> dict[str, Tensor]:
    return {name: inputs[name].clone().requires_grad_() for name in ("pred", "x", "z")}


def _term_gradients(terms: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of the sum of each term with respect to every leaf that it depends on."""
    out = {}
    for term, value in terms.items():
        grads = torch.autograd.grad(value.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
        found = {f"grad:{term}:{leaf}": grad for leaf, grad in zip(leaves, grads, strict=True)}
        out |= {name: grad for name, grad in found.items() if grad is not None}
    return out


class _Given:
    """A prior whose codes are given and whose decoder is (tanh(x / 2 + mean(z) / 5) + 1) / 2."""

    def __init__(self, x: Tensor, z: Tensor):
        self.codes, self.rt = (x, z), Runtime(torch.device("cpu"))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.codes

    def decode(self, x: Tensor, z: Tensor) -> Tensor:
        return (torch.tanh(0.5 * x[:, 0] + 0.2 * z.mean(1)[:, None, None]) + 1) / 2


class _Recorded:
    """An objective that keeps the terms (N,) of every iteration."""

    def __init__(self, goal):
        self.goal, self.total, self.rows = goal, goal.total, []

    def code_terms(self, x: Tensor, z: Tensor, data) -> dict[str, Tensor]:
        self.rows.append(self.goal.code_terms(x, z, data))
        return self.rows[-1]

    def image_terms(self, volume: Tensor, data) -> dict[str, Tensor]:
        terms = self.goal.image_terms(volume, data)
        self.rows[-1] = self.rows[-1] | terms
        return terms


def _run_reconstruction(prior, preset: str, config: dict, inputs: dict) -> dict:
    """A published script from volumes to volume, by our loop; it turns the rows round, and back at the end."""
    from mgdcr import inverse

    goal, settings = _goal(preset, config), _legacy_settings(config, inputs)
    sax = (_clipped(inputs["sax"], 98)[inputs["frame"]] + 1) / 2
    frame = inverse.Frame(np.ascontiguousarray(sax[:, ::-1]), inputs["filling"], (1.0, 1.0))
    problem = inverse.Problem(prior, frame, goal, settings)
    problem.data.painted = _painted_target(inputs, match=goal.match == "none")
    problem.goal = recorded = _Recorded(goal)
    optimiser = inverse.optimise(problem, problem.seeds)
    with torch.no_grad():
        volume = problem.images(optimiser.x, optimiser.z).flip(-2)

    def losses(term):
        return torch.stack([row[term].detach() for row in recorded.rows])

    out = {"roi_losses": losses("lax"), "smooth_losses": losses("difference")}
    out["prior_losses"] = goal.prior * losses("prior")
    total = goal.lax * out["roi_losses"] + goal.difference * out["smooth_losses"] + out["prior_losses"]
    out |= {"total_loss": total.sum(1), "n_iterations": torch.tensor(optimiser.iteration), "volume": volume}
    out |= {"x_seed": problem.seeds.x, "z_seed": problem.seeds.z, "x_final": optimiser.x.detach()}
    out |= {"z_final": optimiser.z.detach(), "target": problem.data.painted.values[:, 0]}
    out |= {"mask": problem.data.painted.mask[:, 0]}
    return out | _dense_header(inputs["header"], inputs["filling"], (len(sax), *volume.shape[1:]))


def _legacy_settings(config: dict, inputs: dict):
    from mgdcr import inverse

    names = ("lr", "projection", "step_size", "gamma", "patience", "min_delta")
    own = {name: config[name] for name in names} | {"iterations": inputs["max_iterations"], "schedule": "legacy"}
    steps = {"steps": inputs["T"]} if "T" in inputs else {}
    return inverse.Settings(**inverse.LEGACY_SETTINGS | own | steps)


def _clipped(values: Tensor, percentile: float) -> np.ndarray:
    """All of an array by a percentile of it, in [-1, 1]."""
    from mgdcr import intensity

    return intensity.normalise(values.numpy(), percentiles=(None, percentile))[0]


def _painted_target(inputs: dict, match: bool):
    """The long-axis target of a published script, from views that are painted into the dense grid already."""
    from mgdcr import inverse, objective

    def shown(values):
        return torch.from_numpy((_clipped(values, 99) + 1) / 2).flip(-2)

    lax = inputs["lax"]
    if isinstance(lax, str):  # "60.0 where mask is 1, else 0"
        lax = float(lax.split()[0]) * inputs["mask"]
    mask, values = inputs["mask"].flip(-2), shown(lax)
    if match:
        values = inverse.match_moments(values, shown(inputs["linear_reference"]), mask)
    return objective.Painted(values[:, None], mask[:, None])


def _dense_header(header: dict, factor: int, shape: tuple[int, int, int]) -> dict:
    """Spacing, origin and axes of the dense grid of a stack (Z, H, W), from those of the stack (and time)."""
    from mgdcr import geometry

    n = len(header["spacing"])
    affine, axes = np.eye(4), np.reshape(header["direction"], (n, n))[:3, :3]
    affine[:3, :3], affine[:3, 3] = axes * header["spacing"][:3], header["origin"][:3]
    dense = geometry.dense_grid(geometry.Grid(affine, shape), factor)
    return {
        "spacing": np.array(dense.spacing_mm),
        "origin": dense.affine[:3, 3],
        "direction": dense.axes.ravel(),
    }


def _run_pipeline(model: LitModel, inputs: dict) -> dict:
    """As `_run_reconstruction`, with a network; of the large arrays every fourth slice, and their statistics."""
    from mgdcr import inverse

    config, settings = model.script, _legacy_settings(model.script, inputs)
    prior = inverse.Prior(model.network.eval().requires_grad_(False), settings)
    out = _run_reconstruction(prior, "ex8_norm", config, inputs)
    for name in ("x_seed", "x_final", "volume"):
        whole = out[name]
        out[f"{name}_stats"] = torch.stack([whole.double().mean(), whole.double().std(correction=0)])
        out[name] = whole[::4]
    return out


def _run_normalise(config: dict, inputs: dict) -> dict:
    from mgdcr.intensity import LEGACY, Scale

    sax, lax, mask = inputs["sax"], inputs["lax"], inputs["mask"]

    def top(values, where=None):
        return Scale.of(values.numpy(), where, (None, 99.0)).high

    files = [file.numpy() for file in (sax[0].round(), sax.flatten(0, 1), sax[0, :1].round())]  # volume, cine, slice
    loaded = [Scale.of(file, percentiles=LEGACY).normalise(file) for file in files]
    target = _painted_target(inputs, match=True).values[:, 0]
    plain = _painted_target(inputs, match=False).values[:, 0]
    reference = torch.from_numpy((_clipped(inputs["linear_reference"], 99) + 1) / 2).flip(-2)
    inside = mask.flip(-2) > 0
    moments = [part for v in (reference[inside], plain[inside]) for part in (v.mean(), v.std(correction=0))]
    return {
        "sax": _clipped(sax, 98),
        "sax_percentile": np.array(Scale.of(sax.numpy(), percentiles=LEGACY).high),
        "lax": plain,
        "lax_percentile": np.array(top(lax)),
        "lax_matched": target,
        "match_stats": torch.stack(moments),
        "lax_nan_percentile": np.array(top(lax, mask.numpy() > 0)),
        "loader": np.concatenate(loaded)[:, None],
    }


def _run_laplacian(config: dict, inputs: dict) -> dict:
    from mgdcr import objective

    leaves = _leaves(inputs)
    smooth = objective.curvature_term(leaves["pred"][:, 0]).sum() / (len(inputs["pred"]) - 2)
    prior = config["w_prior"] * objective.prior_term(leaves["x"], leaves["z"], inputs["x0"], inputs["z0"]).mean()
    terms = {"smooth": smooth, "prior": prior}
    return {f"{name}_loss": value for name, value in terms.items()} | _term_gradients(terms, leaves)


# --------------------------------------------------------------------------------------------------- golden: the table

NETWORKS: dict[str, tuple[Callable, Callable]] = {  # the original's class -> (build, run)
    "BeatGANsAutoencModel": (_build_diffae, _run_diffae),
    "BeatGANsUNetModel": (_build_uncond, _run_uncond),
    "MLPSkipNet": (_build_latent, _run_latent),
    "LitModel": (_build_lit, _run_lit),
    "LitModel driven by script ex8_lax_norm_final": (_build_pipeline, _run_pipeline),
}
FUNCTIONS: dict[str, Callable] = {  # functions and scripts: (config, inputs) -> outputs
    "get_named_beta_schedule / SpacedDiffusionBeatGans": _run_schedules,
    "space_timesteps": _run_spacing,
    "SpacedDiffusionBeatGans": _run_diffusion,
    "timestep_embedding": _run_time_embedding,
    "ssim, psnr (prior evaluation)": _run_quality,
    "scripts ex8_lax_norm_final, ex2_just_100, ex10_middle_slice_delete": _run_seeds,
    "script ex8_lax_norm_final": _run_ex8("ex8_norm"),
    "script ex8_multi_optimizer": _run_ex8("ex8_multi"),
    "script ex2_just_100": _run_laplacian,
    "scripts ex8_lax_norm_final, ex8_multi_optimizer; MedicalDataset": _run_normalise,
}


def build(module: str, config: dict):
    """Our network for the original's class `module` and its arguments, or for a function its config; else KeyError."""
    return config if module in FUNCTIONS else NETWORKS[module][0](config)


def run(module: str, model, inputs: dict) -> dict:
    """Named outputs of a reference case; `model` is what `build` gave, `inputs` the drawn tensors and literals."""
    if module in FUNCTIONS:
        return FUNCTIONS[module](model, inputs)
    return NETWORKS[module][1](model, inputs)


def then(words: str, drawn: Tensor, inputs: dict) -> Tensor:
    """A drawn input after the operations that a case states in words; `inputs` are those drawn before it."""
    for step in re.split(r"; |, (?=plus|clamped)", words):
        drawn = _operation(step, drawn, inputs)
    return drawn


def read_words(case: dict) -> dict[str, int]:
    """What a case states in its description only: the kept step that the single step of a decoding starts from."""
    found = re.search(r"spaced index (\d+)", case.get("call", ""))
    return {"one_step_at": int(found[1])} if found else {}


def _operation(words: str, x: Tensor, inputs: dict) -> Tensor:
    numbers = [float(text) for text in re.findall(r"-?\d+(?:\.\d+)?", words)]
    if words.startswith("clamped to"):
        return x.clamp(*numbers)
    if words.startswith("absolute value"):
        x = x.abs()
        x = x * numbers.pop(0) if "times" in words else x
        return x + numbers[0] if "plus" in words else x
    if words.startswith("slices"):
        x[[int(number) for number in numbers[:-1]]] = 0  # the last number is that 0
        return x
    if words.startswith("1 where"):
        return (x > numbers[1]).float()
    if words.startswith("plus"):
        return x + numbers[0]
    if match := re.fullmatch(r"added to (\w+)", words):
        return x + inputs[match[1]]
    if words == "sigmoid":
        return x.sigmoid()
    raise ValueError(f"input operation {words!r} is unknown")


def not_reproduced(case: dict) -> dict[str, str]:
    """Outputs of an optional case that our program does not give on purpose, with the reason."""
    rules, inputs = dict(LEFT_OUT.get(case["module"], {})), case["inputs"]
    if isinstance(inputs.get("mask"), dict) and "set to 0" in inputs["mask"].get("then", ""):
        rules |= EMPTY_LOOP if "max_iterations" in inputs else EMPTY_TERMS
    if isinstance(inputs.get("lax"), str):
        rules |= CONSTANT_TARGET
    return {name: reason for name in case["outputs"] for pattern, reason in rules.items() if re.match(pattern, name)}


# Patterns of the names of outputs, and why they are different here.
LEFT_OUT: dict[str, dict[str, str]] = {
    "ssim, psnr (prior evaluation)": {"ssim": "our SSIM takes windows inside the image only, without padding"},
    "script ex2_just_100": {
        "(per_slice_loss|roi_loss|grad:roi)": "a mean over slices by the count of all of them is a slip"
    },
}
EMPTY_TERMS = {
    "(roi_losses|loss_per_slice|total_loss|grad:roi|grad:total:pred)": "a slice without LAX pixels is not 0 / 0 here"
}
EMPTY_LOOP = {
    "(.*_losses|total_loss|n_iterations|.*_final|volume)": "a slice without LAX pixels (0 / 0 there) ends no loop here"
}
CONSTANT_TARGET = {"x_final": "Adam takes pixels without a gradient wherever rounding points (3e-5 in 3 of 1,088)"}
