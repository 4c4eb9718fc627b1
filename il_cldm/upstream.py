"""Checkpoints and reference cases of the original IL-CLDM program in terms of our modules.

`build`, `load`, `run` are what `python -m tests.golden` calls: our network for the original's class name and arguments,
strict loading from the original's keys, and the named outputs of a reference case. `load_checkpoint` reads one of the
original's files (AAE.pth.tar, Unet.pth.tar), `to_upstream` gives our weights under the original's names.
"""

import math
import re
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from common import checkpoint, metrics, schedulers, training
from common.blocks3d import SelfAttention3d, match_size
from common.cli import UserError
from common.ema import EMA
from il_cldm import losses
from il_cldm.model import (
    Autoencoder,
    Decoder,
    Denoiser,
    DenoiserBlock,
    Encoder,
    ImageConditioner,
    PatchDiscriminator,
    ResidualBlock,
    TimeEmbedding,
)

# ------------------------------------------------------------------------------------------------------------ key map
# Our submodule -> the original's. A type that is not listed is a leaf, whose own tensors have the same names there.

NAMES = {
    Autoencoder: {"encoder": "encoder", "decoder": "decoder"},
    Encoder: {
        "conv_in": "model.0",
        "res1": "model.1",
        "down1": "model.2.conv",
        "res2": "model.3",
        "down2": "model.4.conv",
        "res3": "model.5",
        "norm_out": "model.6.gn",
        "conv_out": "model.8",
    },
    Decoder: {
        "conv_in": "model.0",
        "res1": "model.1",
        "res2": "model.2",
        "res3": "model.3",
        "up1": "model.4.conv",
        "res4": "model.5",
        "up2": "model.6.conv",
        "norm_out": "model.7.gn",
        "conv_out": "model.9",
    },
    ResidualBlock: {
        "norm1": "block.0.gn",
        "conv1": "block.2",
        "norm2": "block.3.gn",
        "conv2": "block.5",
        "skip": "channel_up",
    },
    ImageConditioner: {"conv_in": "0", "res": "1", "norm_out": "2.gn", "conv_out": "4"},
    DenoiserBlock: {
        "norm1": "res_block.block1.block.0",
        "conv1": "res_block.block1.block.3",
        "time": "res_block.mlp.1",
        "norm2": "res_block.block2.block.0",
        "conv2": "res_block.block2.block.3",
        "skip": "res_block.res_conv",
        "attention": "attn",
    },
    Denoiser: {
        "projector.time": "time_mlp.0",
        "projector.linear1": "time_mlp.1",
        "projector.linear2": "time_mlp.3",
        "projector.label": "label_emb",
        "norm_out": "final_conv.block.0",
        "conv_out": "final_conv.block.3",
        "extractor": "cond",
    },
}
DERIVED = ("inv_freq", "num_batches_tracked")  # a state dict may lack these: no weights


def _children(module: nn.Module) -> dict[str, str]:
    names = dict(NAMES.get(type(module), {}))
    if isinstance(module, Denoiser):
        for ours, theirs in (("down", "downs"), ("middle", "mid"), ("up", "ups")):
            for i, layer in enumerate(getattr(module, ours)):
                resampler = not isinstance(layer, DenoiserBlock) and (ours, i) != ("down", 0)
                names[f"{ours}.{i}"] = f"{theirs}.{i}" + (".conv" if resampler else "")
    if isinstance(module, PatchDiscriminator):  # a Sequential: conv, act, then (conv, norm, act) each, then conv
        names |= {f"convs.{i}": f"model.{max(3 * i - 1, 0)}" for i in range(len(module.convs))}
        names |= {f"norms.{i}": f"model.{3 * i + 3}" for i in range(len(module.norms))}
    return names


def key_map(model: nn.Module) -> dict[str, str]:
    """Our state-dict key -> the original's key, for every entry of `model`."""
    keys = checkpoint.renamed_keys(model, _children)
    if isinstance(model, DenoiserBlock):  # alone the original's ResnetBlock, inside the U-Net a wrapper around that
        keys = {ours: theirs.removeprefix("res_block.") for ours, theirs in keys.items()}
    return keys


def to_upstream(model: nn.Module, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """State dict of `model` (or another one with its keys, for example the average's) under the original's names."""
    state_dict = model.state_dict() if state_dict is None else state_dict
    names = key_map(model)
    return {names[key]: value for key, value in state_dict.items()}


def load(model: nn.Module, state_dict: dict[str, Tensor]) -> nn.Module:
    """Fill `model` from a state dict with the original's keys, with or without the prefix "module."; returns the model.

    Strict: UserError names missing, unexpected and differently shaped entries. A denoiser with a null class takes a
    label table without that row; its null row becomes zero, which is the original's "no label".
    """
    if not isinstance(model, nn.Module):
        return model  # schedules and plain functions have no weights
    state = {key.removeprefix("module."): value for key, value in state_dict.items()}
    own, names = model.state_dict(), key_map(model)
    table = state.get("label_emb.weight")
    if isinstance(model, Denoiser) and model.null_label is not None and table is not None:
        if len(table) == model.null_label:
            state["label_emb.weight"] = torch.cat([table, torch.zeros_like(table[:1])])
    derived = {theirs: own[ours] for ours, theirs in names.items() if theirs.endswith(DERIVED)}
    checkpoint.load_renamed(model, derived | state, names, set(names.values()))
    return model


# ------------------------------------------------------------------------------------------------------- checkpoints


def identify(state_dict: dict[str, Tensor]) -> tuple[str, dict]:
    """The original's class name and constructor arguments, as far as key names and shapes tell, of a state dict.

    The number of norm groups leaves no trace; it stays at the original's default.
    """
    state = {key.removeprefix("module."): value for key, value in state_dict.items()}
    if {"encoder.model.0.weight", "encoder.model.8.weight"} <= state.keys():
        image_channels, latent_dim = state["encoder.model.0.weight"].shape[1], state["encoder.model.8.weight"].shape[0]
        return "AAE", {"image_channels": image_channels, "latent_dim": latent_dim}
    if {"model.0.weight", "model.3.running_mean"} <= state.keys():
        convs = [state[key] for key in state if re.fullmatch(r"model\.\d+\.weight", key) and state[key].ndim == 5]
        return "Discriminator", {"image_channels": convs[0].shape[1], "channels": [w.shape[0] for w in convs[:-1]]}
    if not {"downs.0.weight", "label_emb.weight", "final_conv.block.3.weight"} <= state.keys():
        raise UserError("the state dict is of no IL-CLDM network: expected the keys of AAE.pth.tar or Unet.pth.tar")
    width, in_channel = state["downs.0.weight"].shape[:2]
    levels, attending, i = [[]], set(), 1  # levels: output channels of the blocks of each level
    while any(key.startswith(f"downs.{i}.") for key in state):
        if f"downs.{i}.conv.weight" in state:
            levels.append([])
        else:
            levels[-1].append(state[f"downs.{i}.res_block.block1.block.3.weight"].shape[0])
            attending |= {len(levels) - 1} if f"downs.{i}.attn.qkv.weight" in state else set()
        i += 1
    image_size = 2 ** (len(levels) + 1)  # only its halvings matter, and this one halves evenly
    return "UNet", {
        "in_channel": in_channel,
        "out_channel": state["final_conv.block.3.weight"].shape[0],
        "inner_channel": width,
        "channel_mults": [level[0] // width for level in levels],
        "res_blocks": len(levels[0]),
        "image_size": image_size,
        "attn_res": [image_size >> level for level in sorted(attending)],
        "num_classes": state["label_emb.weight"].shape[0],
        "time_dim": state["label_emb.weight"].shape[1],
    }


def load_checkpoint(path, *, trust_pickle: bool = False, **overrides) -> tuple[str, nn.Module]:
    """Read a checkpoint file of the original and build its network; see `from_checkpoint`."""
    return from_checkpoint(checkpoint.load(path, trust_pickle=trust_pickle), path, **overrides)


def from_checkpoint(content: dict, path, **overrides) -> tuple[str, nn.Module]:
    """("AAE" | "UNet" | "Discriminator", our network) of what a file of the original holds, {state_dict, optimizer}.

    `overrides` replace inferred constructor arguments (norm_groups=...). UserError, naming `path`, for anything else.
    """
    state_dict = content.get("state_dict")
    if not isinstance(state_dict, dict) or not state_dict:
        raise UserError(f"checkpoint {path} has no state_dict: it is not a file of the original IL-CLDM")
    try:
        module, config = identify(state_dict)
        return module, load(build(module, config | overrides), state_dict)
    except (UserError, ValueError, KeyError, IndexError) as error:  # the latter: keys of a U-Net that is not like ours
        raise UserError(f"checkpoint {path}: {error}") from None


# ------------------------------------------------------------------------------------------------ golden: building

AAE_WIDTH = AAE_GROUPS = 16  # constants of the original
DEFAULTS = {  # the original's constructor arguments, and the entries of its config module that a class reads
    "AAE": {"image_channels": 1, "latent_dim": 1},
    "Encoder": {"image_channels": 1, "latent_dim": 1},
    "Decoder": {"image_channels": 1, "latent_dim": 1},
    "Discriminator": {"image_channels": 1, "channels": (16, 32, 64, 128)},
    "ResidualBlock": {"in_channels": None, "out_channels": None},
    "ResnetBlock": {"dim": None, "dim_out": None, "time_emb_dim": None, "dropout": 0.0, "norm_groups": 32},
    "SelfAttention": {"in_channel": None, "n_head": 1, "norm_groups": 32},
    "TimeEmbedding": {"dim": None, "also": ()},
    "UNet": {
        "in_channel": 2,
        "out_channel": 1,
        "inner_channel": 128,
        "norm_groups": 32,
        "channel_mults": (1, 2, 2),
        "attn_res": (3,),
        "res_blocks": 2,
        "dropout": 0.0,
        "image_size": 28,
        "num_classes": 4,
        "time_dim": 128,
    },
}
SCHEDULE = {"noise_steps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
LAMBDA = 100.0  # weight of the reconstruction term


def _schedule(config: dict) -> schedulers.Schedule:
    c = SCHEDULE | {key: value for key, value in config.items() if key in SCHEDULE}
    return schedulers.make_schedule("linear", c["noise_steps"], c["beta_start"], c["beta_end"])


def build(module: str, config: dict):
    """Our counterpart of the original's class `module` with its constructor arguments; KeyError for a name we lack.

    Entries "config.<name>" are settings of the original's config module. A module without weights gives what `run`
    needs in its place: a Schedule, the settings themselves.
    """
    config = {key.removeprefix("config."): value for key, value in config.items()}
    if module == "Diffusion":
        return {c["noise_steps"]: _schedule(c) for c in config.get("sets", [SCHEDULE | config])}
    if module.startswith("Diffusion."):
        return _schedule(config)
    if module.startswith("EMA over "):
        ema = {key: config.pop(key) for key in ("beta", "step_start_ema")}
        model = build(module.removeprefix("EMA over "), config)
        model.upstream_config = ema
        return model
    if module in ("EMA", "loss terms") or " (function)" in module:
        return config
    defaults = DEFAULTS[module]
    unknown = config.keys() - defaults.keys() - SCHEDULE.keys()
    if unknown:
        raise KeyError(f"{module} has no argument {', '.join(sorted(unknown))}")
    c = defaults | config
    if module == "AAE":
        model = Autoencoder(c["image_channels"], AAE_WIDTH, c["latent_dim"], AAE_GROUPS)
    elif module in ("Encoder", "Decoder"):
        kind = Encoder if module == "Encoder" else Decoder
        model = kind(c["image_channels"], AAE_WIDTH, c["latent_dim"], AAE_GROUPS)
    elif module == "Discriminator":
        model = PatchDiscriminator(c["image_channels"], tuple(c["channels"]), norm="batch")
    elif module == "ResidualBlock":
        model = ResidualBlock(c["in_channels"], c["out_channels"], AAE_GROUPS)
    elif module == "ResnetBlock":
        sizes = (c["dim"], c["dim_out"], c["time_emb_dim"])
        model = DenoiserBlock(*sizes, c["norm_groups"], c["dropout"], attention=False)
    elif module == "SelfAttention":
        if c["n_head"] != 1:
            raise KeyError("SelfAttention with several heads, which the original never uses")
        model = SelfAttention3d(c["in_channel"], c["norm_groups"])
    elif module == "TimeEmbedding":
        model = TimeEmbedding(c["dim"])
    else:
        model = Denoiser(
            latent_channels=c["in_channel"] - 1,
            out_channels=c["out_channel"],
            channels=c["inner_channel"],
            mults=tuple(c["channel_mults"]),
            groups=c["norm_groups"],
            res_blocks=c["res_blocks"],
            attn_res=tuple(c["attn_res"]),
            image_size=c["image_size"],
            dropout=c["dropout"],
            time_dim=c["time_dim"],
            num_classes=c["num_classes"],
            null_class=False,
        )
    model.upstream_config = c
    return model


# ------------------------------------------------------------------------------------------------- golden: running


def run(module: str, model, inputs: dict) -> dict:
    """Named outputs of a reference case; ValueError for a case that we do not know.

    `model` is what `build` gave, or for a case with several modules a dict of them. `inputs` holds the drawn tensors
    and literal values by name, together with the entries under the case's `extra`; a family of tensors is a function of
    the indices in its seed text, e.g. inputs["noise_i"](i=5).
    """
    if module.startswith("EMA"):
        return _run_ema(module, model, inputs)
    if isinstance(model, nn.Module):
        model.eval()
    if module in ("UNet", "UNet + AAE") and "start" in inputs:
        return _generate(model, inputs)
    if module == "UNet" and "latent_0" in inputs:
        return _train_denoiser(model, inputs)
    if module == "AAE + Discriminator":
        return _train_autoencoder(model, inputs)
    if module == "loss terms":
        return _loss_terms(model, inputs)
    forward = {
        "AAE": lambda x: dict(zip(("recon", "z"), model(x)[:2], strict=True)),
        "Encoder": lambda x: {"z": model(x)},
        "Decoder": lambda z: {"image": model(z)},
        "Discriminator": partial(_discriminate, model),
        "ResidualBlock": lambda x: {"out": model(x)},
        "ResnetBlock": lambda x, time_emb: {"out": model(x, time_emb)},
        "SelfAttention": lambda x: {"out": model(x)},
        "TimeEmbedding": partial(_time_embedding, model),
        "match_to (function)": lambda x, target_size: {"out": match_size(x, target_size)},
        "UNet": partial(_denoise, model),
        "Diffusion": partial(_tables, model),
        "Diffusion.noise_images": lambda x, noise, t: {
            "x_t": schedulers.q_sample(model, x, torch.tensor(t), noise)
        },
        "Diffusion.sample": partial(_sample, model),
        "batch_psnr_ssim_torchmetrics (function)": partial(_metrics, model, dict(window="uniform", border="reflect")),
        "batch_psnr_ssim (function) and direct calls": partial(
            _metrics, model, dict(window="uniform", border="valid", sample_covariance=True)
        ),
    }
    if module not in forward:
        raise ValueError(f"unknown module {module!r}")
    with torch.no_grad():
        return forward[module](**inputs)


def not_reproduced(case: dict) -> dict[str, str]:
    """Outputs of a case that our program does not give on purpose, with the reason."""
    names, reason = [], ""
    if case["module"].startswith("crop"):
        names, reason = list(case["outputs"]), "crop and shift of the first release; the program we follow has neither"
    elif case["module"] == "AAE + Discriminator":
        names = [name for name in case["outputs"] if name.startswith("upstream/")]
        if case.get("variant") == "upstream":
            names = [name for name in case["outputs"] if re.match("grad.*generator", name)]
        reason = "the original's discriminator loss leaks into the autoencoder (defect 15); we detach"
    elif case["module"].startswith("batch_psnr_ssim (function)"):
        names = [name for name in case["outputs"] if name.split("/")[-1] not in ("psnr", "ssim")]
        reason = "the first release guesses the data range from the data and rounds; ours is always explicit"
    return dict.fromkeys(names, reason)


def _discriminate(model, x=None, real=None, fake=None) -> dict:
    if x is not None:
        return {"logits": model(x)}
    model.train()  # batch statistics, and the running ones see real first, fake second
    out = {"logits_real": model(real), "logits_fake": model(fake)}
    return out | _buffers_after(model)


def _buffers_after(model) -> dict:
    return {f"after/{key}": value for key, value in to_upstream(model, dict(model.named_buffers())).items()}


def _time_embedding(model, t) -> dict:
    out = {}
    for dim in (model.dim, *model.upstream_config["also"]):
        embedding = model if dim == model.dim else TimeEmbedding(dim)
        out |= {f"emb_{dim}": embedding(torch.tensor(t)), f"inv_freq_{dim}": embedding.inv_freq}
    return out


def _denoise(model, x, y, t_probe=None, **calls) -> dict:
    cond_map = model.condition(y)
    out = {"cond_map": cond_map}
    if t_probe is not None:
        out["time_vector"] = model.projector(torch.tensor(t_probe))
    for name, call in calls.items():
        if not isinstance(call, dict):
            continue  # an entry of the case's extra
        label = None if call["label"] is None else torch.tensor(call["label"])
        out[name] = model(x, cond_map, torch.tensor(call["t"]), label)
    return out


def _tables(schedules: dict) -> dict:
    out = {}
    for T, schedule in schedules.items():
        tables = {"beta": schedule.betas, "alpha": 1 - schedule.betas, "alpha_hat": schedule.alphas_bar}
        out |= {f"T{T}/{name}": table for name, table in tables.items()}
    return out


def _ancestral(denoise, schedule, start, inputs) -> dict:
    """The original's sampler: T-1 down to 1, variance beta, never to index 0; the states and the last one."""
    states = {}
    times = list(range(schedule.T - 1, 0, -1))

    def noise(index, shape):
        t = times[index]
        return inputs[f"noise_{t}"] if f"noise_{t}" in inputs else inputs["noise_i"](i=t)

    def keep(index, t, x_t, x_0):
        states[t] = x_t

    with torch.no_grad():
        final = schedulers.ddpm_sample(
            denoise, start, schedule, times, variance="large", final="first", noise=noise, callback=keep
        )
    return {"states": torch.stack([states[t] for t in inputs.get("states_at", times)]), "final": final}


def _sample(schedule, **inputs) -> dict:
    def denoise(x, t):
        return 0.3 * x + (0.01 * torch.sin(t.double())).to(x.dtype).view(-1, *[1] * (x.ndim - 1))

    if "start" in inputs:
        return _ancestral(denoise, schedule, inputs["start"], inputs)
    out, table = {}, schedule.alphas_bar.tolist()
    for name, x in inputs.items():
        if not name.startswith("x_"):
            continue
        t = int(name[2:])
        if f"noise_{t}" not in inputs:  # the last step of a run
            out[f"x_after_{t}"] = schedulers.ddpm_sample(
                denoise, x, schedule, [t], variance="large", final=table[t - 1]
            )
        else:  # a run of two steps, looked at between them
            states = []
            schedulers.ddpm_sample(
                denoise,
                x,
                schedule,
                [t, t - 1],
                variance="large",
                final=table[t - 2] if t > 1 else "clean",
                noise=lambda index, shape, t=t: inputs[f"noise_{t}"],
                callback=lambda index, t, x_t, x_0, states=states: states.append(x_t),
            )
            out[f"x_after_{t}"] = states[1]
    return out


def _generate(model, inputs: dict) -> dict:
    """Sampling from an MRI without a label; with an autoencoder also the decoded and the clamped volume."""
    models = list(model.values()) if isinstance(model, dict) else [model]
    denoiser = next(m for m in models if isinstance(m, Denoiser)).eval()
    with torch.no_grad():
        cond_map = denoiser.condition(inputs["mri"])
        out = _ancestral(
            lambda x, t: denoiser(x, cond_map, t), _schedule(denoiser.upstream_config), inputs["start"], inputs
        )
        out["latent"] = out.pop("final")
        for autoencoder in (m for m in models if isinstance(m, Autoencoder)):
            out["decoded"] = autoencoder.decode(out["latent"])
            out["volume"] = out["decoded"].clamp(0, 1).squeeze(1).squeeze(0)
    return out


def _metrics(settings: dict, ssim_options: dict, **pairs) -> dict:
    out, data_range = {}, settings["data_range"]

    def add(name, pred, gt):
        ours = [
            (
                metrics.psnr(p[0], g[0], data_range=data_range, cap_db=math.inf),
                metrics.ssim(p[0], g[0], data_range=data_range, **ssim_options),
            )
            for p, g in zip(pred, gt, strict=True)
        ]
        out[f"{name}/psnr"], out[f"{name}/ssim"] = torch.tensor(ours, dtype=torch.float64).T

    for name, pair in pairs.items():
        gt = (0.5 + 0.25 * pair["gt"]).clamp(0, 1)
        pred = (gt + 0.1 * pair["err"]).clamp(0, 1)
        if empty := re.search(r"zero for index < (\d+)", pair["then"]):
            gt[:, :, : int(empty[1])], pred[:, :, : int(empty[1])] = 0.0, 0.0
        add(name, pred, gt)
        if "identical/psnr" not in out:
            add("identical", gt[:1], gt[:1])
            add("constant", torch.zeros_like(gt[:1]), torch.full_like(gt[:1], 0.1))
    return out


def _run_ema(module: str, model, inputs: dict) -> dict:
    if module == "EMA":  # one weight, (k - 2000) / 100 at call k
        raw = nn.Linear(1, 1, bias=False)
        ema, average = EMA(raw, model["beta"], model["step_start_ema"]), {}
        for k in range(1, max(inputs["calls"]) + 1):
            raw.weight.data.fill_((k - 2000) / 100)
            ema.update(raw)
            average[k] = ema.module.weight.item()
        return {"average": torch.tensor([average[k] for k in inputs["calls"]])}
    family, settings = inputs["step_k"], model.upstream_config
    ema, weights, means = EMA(model, settings["beta"], settings["step_start_ema"]), [], []
    for k in family.values("k"):
        for key, value in to_upstream(model).items():
            if value.is_floating_point():
                value.copy_(family(value.shape, k=k, key=key))
        ema.update(model)
        average = to_upstream(ema.module)
        weights.append(average["model.5.weight"].clone())
        means.append(average["model.3.running_mean"].clone())
    return {"average_weight": torch.stack(weights), "average_running_mean": torch.stack(means)}


def _loss_terms(settings: dict, inputs: dict) -> dict:
    real, fake = (inputs[name].clone().requires_grad_() for name in ("logits_real", "logits_fake"))
    x_hat = inputs["x_hat"].clone().requires_grad_()
    rec = losses.reconstruction_loss(x_hat, inputs["x"])
    generator = settings["lambda"] * rec + losses.generator_adversarial_loss(inputs["logits_fake"])
    disc = losses.hinge_discriminator_loss(real, fake)
    out = {
        "loss_generator": generator,
        "loss_disc": disc,
        "loss_disc_real": losses.hinge_real_loss(real),
        "loss_disc_fake": losses.hinge_fake_loss(fake),
        "loss_rec": rec,
    }
    out["grad/logits_real"], out["grad/logits_fake"] = torch.autograd.grad(disc, (real, fake))
    (out["grad/x_hat"],) = torch.autograd.grad(generator, x_hat)
    return {name: value.detach() for name, value in out.items()}


def _parameters(model) -> dict[str, nn.Parameter]:
    return to_upstream(model, dict(model.named_parameters()))


def _norms(tensors: dict, order, leave_out=()) -> Tensor:
    return torch.stack([tensors[key].detach().double().norm() for key in order if key not in leave_out])


def _train_autoencoder(models: dict, inputs: dict) -> dict:
    """Stage 1 through the training step of il_cldm/aae.py: each network's gradient comes from its own loss only."""
    from il_cldm import aae  # here, because it imports this module

    autoencoder = next(m for m in models.values() if isinstance(m, Autoencoder)).train()
    discriminator = next(m for m in models.values() if isinstance(m, PatchDiscriminator)).train()
    networks = {"generator": _parameters(autoencoder), "disc": _parameters(discriminator)}
    orders = {part: inputs.get(f"grad_norm_order_{part}", list(networks[part])) for part in networks}
    config, logits = SimpleNamespace(Lambda=LAMBDA, kl_weight=0.0), []

    def real_and_fake(x, x_hat):
        logits[:] = training.RealAndFake(discriminator)(x, x_hat)
        return logits

    def gradients_of_step(x):
        autoencoder.zero_grad()
        discriminator.zero_grad()
        out = aae.aae_step(autoencoder, real_and_fake, x, config)
        out["loss_generator"] = LAMBDA * out["loss_rec"] + out["loss_adv"]
        out["loss_disc_real"] = losses.hinge_real_loss(logits[0]).detach()
        out["loss_disc_fake"] = losses.hinge_fake_loss(logits[1]).detach()
        return out

    if "x" in inputs:
        out = gradients_of_step(inputs["x"])
        out |= {"logits_real": logits[0].detach(), "logits_fake": logits[1].detach()} | _buffers_after(discriminator)
        for part, parameters in networks.items():
            grads = {key: p.grad.clone() for key, p in parameters.items()}
            out |= {f"grad/{part}/{key}": grad for key, grad in grads.items()}
            out[f"grad_norms_{part}"] = _norms(grads, orders[part])
        out = {name: value.clone() for name, value in out.items()}  # the next pass moves the buffers
        x_hat = autoencoder(inputs["x"])[0]
        terms = {"100rec": LAMBDA * losses.reconstruction_loss(x_hat, inputs["x"])}
        terms["adv"] = losses.generator_adversarial_loss(discriminator(x_hat))
        terms["disc"] = losses.hinge_discriminator_loss(discriminator(inputs["x"]), discriminator(x_hat))
        for name, term in terms.items():
            grads = torch.autograd.grad(term, list(networks["generator"].values()), retain_graph=True)
            out |= {f"term/{name}/{key}": grad for key, grad in zip(networks["generator"], grads, strict=True)}
        return out

    start = {part: {key: p.detach().clone() for key, p in networks[part].items()} for part in networks}
    optimizers = [torch.optim.Adam(networks[part].values(), lr=1e-4, betas=(0.5, 0.999)) for part in networks]
    history = []
    for k in range(sum(name.startswith("batch_") for name in inputs)):
        history.append(gradients_of_step(inputs[f"batch_{k}"]))
        for optimizer in optimizers:
            optimizer.step()
    out = {f"detached/{name}": torch.stack([step[name] for step in history]) for name in history[0]}
    for part, parameters in networks.items():
        moved = {key: p - start[part][key] for key, p in parameters.items()}
        out[f"detached/moved_{part}"] = _norms(moved, orders[part], inputs.get("no_true_gradient", ()))
    return out


def _train_denoiser(model, inputs: dict) -> dict:
    """Stage 2 through the loss of il_cldm/ldm.py, with given timesteps and noise; AdamW."""
    from il_cldm import ldm  # here, because it imports this module

    model.train()
    schedule, parameters = _schedule(model.upstream_config), _parameters(model)
    order = inputs.get("grad_norm_order", list(parameters))
    start = {key: p.detach().clone() for key, p in parameters.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01)
    out, history, n_subjects = {}, [], 0
    for k in range(sum(name.startswith("latent_") for name in inputs)):
        z, noise, t = inputs[f"latent_{k}"], inputs[f"noise_{k}"], torch.tensor(inputs[f"t_{k}"])
        label = inputs.get(f"label_{k}")
        label = None if label is None else torch.tensor(label)
        predictions = []
        hook = model.register_forward_hook(lambda module, args, output, seen=predictions: seen.append(output.detach()))
        loss = ldm.ldm_loss(ldm.DenoiserWithMri(model), schedule, z, inputs[f"mri_{k}"], label, t, noise)
        hook.remove()
        optimizer.zero_grad()
        loss.backward()
        if k == 0:
            grads = {key: torch.zeros_like(p) if p.grad is None else p.grad.clone() for key, p in parameters.items()}
            out = {"x_t_0": schedulers.q_sample(schedule, z, t, noise), "eps_pred_0": predictions[0]}
            out["grad_norms"] = _norms(grads, order)
            out |= {f"grad/{key}": grad for key, grad in grads.items()}
        optimizer.step()
        history.append(loss.detach())
        n_subjects += len(z)
    moved = {key: p - start[key] for key, p in parameters.items()}
    out["moved"] = _norms(moved, order, inputs.get("no_true_gradient", ()))
    out["loss"] = torch.stack(history)
    # The original's log line of this epoch: its number, the summed loss over the number of subjects (not batches).
    out["csv_row"] = torch.tensor([1.0, out["loss"].double().sum().item() / n_subjects], dtype=torch.float64)
    return out
