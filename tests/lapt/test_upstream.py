"""The originals' checkpoints. "fact N" is an acceptance fact."""

import json
from pathlib import Path

import pytest
import torch

from common import runtime
from common.cli import UserError
from lapt import diffusion, export, segmentation, upstream, vqgan
from lapt.dataset import Intensity
from tests import golden
from tests.helpers import run_main, run_script

GOLDEN = Path(golden.__file__).parent / "lapt"
RT = runtime.Runtime(torch.device("cpu"))
UNIT = {"low": 0.0, "high": 1.0, "mean": 0.5, "sd": 0.2}
INTENSITY = Intensity("quantile", "training", {"dwi": UNIT, "adc": UNIT}, (0, 200), 4)
IDENTITY = {"target": "torch.nn.Identity"}
DD = {"double_z": False, "z_channels": 3, "resolution": 32, "in_channels": 2, "out_ch": 2, "ch": 32, "ch_mult": [1, 2],
      "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
VQ = {"embed_dim": 3, "n_embed": 16, "ddconfig": DD, "lossconfig": IDENTITY}
GAN = {"target": "ldm.modules.losses.VQLPIPSWithDiscriminator",
       "params": {"disc_conditional": False, "disc_in_channels": 2, "disc_start": 3, "disc_weight": 0.2, "disc_ndf": 8,
                  "codebook_weight": 1, "perceptual_weight": 0, "disc_num_layers": 2}}  # fmt: skip
UNETS = {"image_size": 8, "in_channels": 7, "out_channels": 3, "model_channels": 32, "attention_resolutions": [2],
         "num_res_blocks": 1, "channel_mult": [1, 2], "num_head_channels": 32}  # fmt: skip
GUIDE = {"num_classes": 1, "ddconfig": {"resolution": 32, "in_channels": 2, "out_ch": 1, "ch": 16, "ch_mult": [1, 2],
         "num_res_blocks": 1, "attn_resolutions": [16], "dropout": 0.0, "use_timestep": False}}  # fmt: skip
RESCALER = {"n_stages": 1, "in_channels": 4, "out_channels": 4}
SCHEDULE = {"timesteps": 1000, "linear_start": 0.0015, "linear_end": 0.0195}
LDM = SCHEDULE | {
    "use_ema": True,
    "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNETS},
    "first_stage_config": {"target": "ldm.models.autoencoder.VQModelInterface", "params": VQ},
    "cond_stage_config": {"target": "ldm.modules.encoders.modules.SpatialRescaler", "params": RESCALER},
}
LAPT3D = LDM | {
    "unet_config": {"target": "ldm3d_lapt.modules.unet_volume.UNetModel", "params": UNETS | {"temporal_length": 4}},
    "cond_stage_config": {
        "target": "ldm3d_lapt.modules.conditioners_3d.VolumeConditioner",
        "params": RESCALER | {"model_channels": 8, "temporal_length": 4},
    },
    "segmentation_model_config": {"target": "ldm3d_lapt.models.segmentation.SegmentationGuide3D", "params": GUIDE},
}
MODULES = [
    ("ldm.models.autoencoder.VQModelInterface", VQ | {"ddconfig": DD | {"attn_resolutions": [16]}}),
    ("ldm3d_lapt.models.autoencoder.VQModelInterface", VQ | {"modality_separate": True}),
    ("ldm.models.autoencoder.VQModel", VQ | {"lossconfig": GAN}),
    ("ldm.modules.discriminator.model.NLayerDiscriminator", {"input_nc": 2, "ndf": 4, "n_layers": 5}),
    ("ldm.modules.encoders.modules.SpatialRescaler", RESCALER | {"bias": True}),
    (
        "ldm3d_lapt.modules.conditioners_3d.VolumeConditioner",
        RESCALER | {"n_stages": 3, "model_channels": 8, "temporal_length": 2},
    ),
    ("ldm.modules.diffusionmodules.openaimodel.UNetModel", UNETS | {"num_res_blocks": 2, "channel_mult": [1, 2, 2]}),
    ("ldm3d_lapt.modules.unet_volume.UNetModel", UNETS | {"temporal_length": 4}),
    ("ldm3d_lapt.models.segmentation.SegmentationGuide3D", GUIDE),
    ("ldm.models.diffusion.ddpm.LatentDiffusion", LDM),
    ("ldm3d_lapt.models.ddpm_volume_lapt.LatentDiffusionVolumeLAPT", LAPT3D),
]


def made(module, config, seed=0):
    """A network of the original with weights that nothing initialises."""
    network = upstream.build(module, config)
    g = torch.Generator().manual_seed(seed)
    for part in (network, getattr(network, "average", None)):
        for p in part.parameters() if part is not None else ():
            p.data = torch.randn(p.shape, generator=g) * 0.1
    return network


def by_name(name):
    return next((module, config) for module, config in MODULES if module.endswith(name))


def write(path, state, **more):
    """A checkpoint as the original's trainer writes it."""
    torch.save({"epoch": 3, "global_step": 70, "state_dict": state} | more, path)
    return path


def quiet(line):
    pass


# ---- key map


@pytest.mark.parametrize(("module", "config"), MODULES, ids=[module.rpartition(".")[2] for module, _ in MODULES])
def test_every_tensor_has_one_name_there_and_comes_back(module, config):
    network = made(module, config)
    state = upstream.to_upstream(network)
    names = upstream.key_map(network)
    parameters = {name for name, _ in network.named_parameters()}
    assert parameters <= names.keys() and len(set(names.values())) == len(names)
    other = upstream.load(made(module, config, seed=1), state)
    again = upstream.to_upstream(other)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("out.0.bias"), "no out.0.bias"),
        (lambda state: state.update({"label_emb.weight": torch.zeros(3)}), "unexpected label_emb.weight"),
        (lambda state: state.update({"out.0.bias": torch.zeros(5)}), r"out.0.bias has shape \(5,\), expected \(32,\)"),
    ],
)
def test_loading_is_strict(change, message):
    module, config = by_name("openaimodel.UNetModel")
    network = made(module, config)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = dict(upstream.to_upstream(made(module, config, seed=1)))
    change(state)
    with pytest.raises(UserError, match=message):
        upstream.load(network, state)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("VQModelInterface", {"ddconfig": DD | {"double_z": True}}),
        ("openaimodel.UNetModel", {"use_scale_shift_norm": True}),
        ("openaimodel.UNetModel", {"num_classes": 5}),
        ("SpatialRescaler", {"multiplier": 0.25}),
        ("SpatialRescaler", {"blur": True}),
    ],
)
def test_arguments_that_nobody_used_are_refused(name, change):
    module, config = by_name(name)
    with pytest.raises(KeyError, match=next(iter(change)) if "ddconfig" not in change else "double_z"):
        upstream.build(module, config | change)


def test_names_of_averages_have_no_dots():
    names = [upstream.average_key(key) for key in upstream.to_upstream(made(*by_name("openaimodel.UNetModel")))]
    assert "model_ema.diffusion_modelinput_blocks10in_layers0weight" in names
    assert len(set(names)) == len(names) and all(name.count(".") == 1 for name in names)


# ---- files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints as the originals write them, by kind, with the networks that are in them."""
    folder = tmp_path_factory.mktemp("originals")
    networks = {"vqgan": made(*by_name(".VQModel")), "guide": made(*by_name("SegmentationGuide3D")),
                "ldm": made(*by_name("ddpm.LatentDiffusion")), "lapt3d": made(*by_name("VolumeLAPT"))}  # fmt: skip
    for name, network in networks.items():
        write(folder / f"{name}.ckpt", upstream.to_upstream(network))
    return folder, networks


def test_an_autoencoder_with_its_discriminator(folder):
    lines = []
    imported = upstream.import_checkpoint(folder[0] / "vqgan.ckpt", report=lines.append)
    assert imported.kind == "vqgan" and imported.networks.keys() == {"autoencoder", "discriminator"}
    settings = imported.settings["autoencoder"]
    assert settings["channel_mult"] == [1, 2] and settings["channels"] == 32 and settings["n_embed"] == 16
    assert settings["legacy_beta"] and not settings["modality_separate"]
    x = torch.randn(1, 2, 8, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(imported.networks["autoencoder"](x)[0], folder[1]["vqgan"].model(x)[0])
    assert len(lines) == 2 and "-> autoencoder" in lines[1] and "channels 32" in lines[1]


def test_weights_of_the_unused_perceptual_network_are_left_out(folder, tmp_path):
    state = upstream.to_upstream(folder[1]["vqgan"]) | {"loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 64)}
    lines = []
    assert upstream.import_checkpoint(write(tmp_path / "a.ckpt", state), report=lines.append).kind == "vqgan"
    assert "left out" in lines[0]


def test_the_guide(folder):
    imported = upstream.import_checkpoint(folder[0] / "guide.ckpt", report=quiet)
    settings = imported.settings["guide"]
    assert imported.kind == "guide" and settings["timestep_projections"] and settings["attention_levels"] == [1]
    x = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(imported.networks["guide"](x), folder[1]["guide"](x))


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_diffusion_model_samples_as_in_the_original(folder, weights):
    """Averages under the names without dots, sizes from the weights, the original's noise schedule and steps."""
    lines, stage = [], folder[1]["ldm"]
    imported = upstream.import_checkpoint(folder[0] / "ldm.ckpt", weights=weights, report=lines.append)
    model = imported.latent_model(INTENSITY, RT)
    assert model.timesteps(2) == [501, 1]  # fact 5
    assert model.settings["schedule"]["kind"] == "scaled_linear" and model.slices == 0
    inputs = {"ctp": torch.randn(2, 4, 16, 16), "x_T": torch.randn(2, 3, 8, 8), "ddim_steps": 3}
    expected = upstream.run("ldm.models.diffusion.ddpm.LatentDiffusion", stage, inputs)
    suffix = "_ema" if weights == "ema" else ""
    found = model.sample(model.condition(inputs["ctp"]), inputs["x_T"], 3)
    assert torch.allclose(found, expected[f"latent{suffix}"], atol=1e-5)
    other = expected["latent" if suffix else "latent_ema"]
    assert not torch.allclose(found, other, atol=1e-2)
    report = "\n".join(lines)
    assert "model_ema." in report and ("used" if suffix else "left out") in report and "12 tables agree" in report


def test_a_volume_model_with_its_guide(folder):
    imported = upstream.import_checkpoint(folder[0] / "lapt3d.ckpt", slices=4, weights="raw", report=quiet)
    assert imported.networks.keys() == {"autoencoder", "unet", "conditioner", "guide"}
    assert imported.settings["unet"]["slices"] == imported.settings["conditioner"]["slices"] == 4
    model, stage = imported.latent_model(INTENSITY, RT), folder[1]["lapt3d"]
    assert model.mode == "3d" and model.stage == "ldm3d"
    ctp, z = torch.randn(4, 4, 16, 16), torch.randn(4, 3, 8, 8)
    t = torch.full((4,), 700)
    with torch.no_grad():
        found = model.denoiser(model.condition(ctp))(z, t)
        expected = stage.model.denoiser(stage.model.condition(ctp))(z, t)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("first_stage_model.quant_conv.bias"), "no quant_conv.bias"),
        (lambda s: s.pop("model_ema.diffusion_modelout0bias"), "no out.0.bias"),
        (lambda s: s.update({"model_ema.extra": torch.zeros(2)}), "unexpected model_ema.extra"),
        (lambda s: s.update({"cond_stage_model.extra": torch.zeros(2)}), "unexpected extra"),
        (lambda s: s.update({"logvar": torch.zeros(2)}), "1 unexpected entries, first logvar"),
        (lambda s: s.update({"betas": torch.linspace(0.1, 0.2, 1000)}), "noise schedule|table"),
        (lambda s: s.pop("posterior_variance"), "no table posterior_variance"),
        (lambda s: s.update({"model.diffusion_model.out.0.bias": torch.zeros(3)}), r"out.0.bias has shape \(3,\)"),
    ],
)
def test_a_file_that_fits_only_partly_is_refused(folder, tmp_path, change, message):
    state = dict(upstream.to_upstream(folder[1]["ldm"]))
    change(state)
    with pytest.raises(UserError, match=message) as caught:
        upstream.import_checkpoint(write(tmp_path / "odd.ckpt", state), report=quiet)
    assert "nothing was imported" in str(caught.value) and "\n" not in str(caught.value)


def test_other_files_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="none of the original's networks"):
        upstream.import_checkpoint(write(tmp_path / "other.ckpt", {"a.weight": torch.zeros(3)}), report=quiet)
    with pytest.raises(UserError, match="does not exist"):
        upstream.import_checkpoint(tmp_path / "absent.ckpt")
    imported = upstream.import_checkpoint(folder[0] / "guide.ckpt", report=quiet)
    with pytest.raises(UserError, match="cannot sample"):
        imported.latent_model(INTENSITY, RT)


class Callback:
    """What Lightning pickles beside the weights."""


def test_pickled_parts_need_trust(folder, tmp_path):
    state = upstream.to_upstream(folder[1]["guide"])
    path = write(tmp_path / "lightning.ckpt", state, callbacks=Callback())
    with pytest.raises(UserError, match="--trust_pickle"):
        upstream.import_checkpoint(path, report=quiet)
    assert upstream.import_checkpoint(path, trust_pickle=True, report=quiet).kind == "guide"


def test_bare_state_dicts_and_half_precision_are_read(folder, tmp_path):
    state = {key: value.half() for key, value in upstream.to_upstream(folder[1]["guide"]).items()}
    torch.save(state, tmp_path / "bare.pt")
    imported = upstream.import_checkpoint(tmp_path / "bare.pt", report=quiet)
    assert {p.dtype for p in imported.networks["guide"].parameters()} == {torch.float32}


# ---- the command


def test_an_imported_model_becomes_a_file_that_loads_without_the_original(folder, tmp_path, prepared, capsys):
    """With its report, and the intensities of a prepared folder."""
    options = ("--import_upstream", folder[0] / "ldm.ckpt", "--data", prepared, "--out", tmp_path / "ours.ckpt")
    run_main(export, *options)
    report = capsys.readouterr().out
    assert "-> autoencoder" in report and "-> unet" in report and "12 tables agree" in report
    model = diffusion.load_model(tmp_path / "ours.ckpt", RT)
    expected = upstream.import_checkpoint(folder[0] / "ldm.ckpt", report=quiet).latent_model(model.intensity, RT)
    ours, theirs = model.state_dict(), expected.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and model.timesteps(2) == [501, 1]
    assert model.intensity.statistics == "case"


@pytest.mark.parametrize("kind", ["vqgan", "guide"])
def test_imported_stages_start_others(folder, tmp_path, prepared, kind):
    options = ("--import_upstream", folder[0] / f"{kind}.ckpt", "--data", prepared, "--out", tmp_path / "ours.ckpt")
    run_main(export, *options)
    load, name = {"vqgan": (vqgan.load_vqgan, "autoencoder"), "guide": (segmentation.load_guide, "guide")}[kind]
    loaded = load(tmp_path / "ours.ckpt", RT)
    expected = upstream.import_checkpoint(folder[0] / f"{kind}.ckpt", report=quiet).networks[name].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.model.state_dict().items())


def test_the_command_fails_and_writes_nothing_where_a_tensor_is_missing(folder, tmp_path, prepared):
    state = dict(upstream.to_upstream(folder[1]["guide"]))
    state.pop("model.conv_out.bias")
    path = write(tmp_path / "part.ckpt", state)
    done = run_script(
        ["lapt/export.py", "--import_upstream", path, "--data", prepared, "--out", tmp_path / "ours.ckpt"]
    )
    assert done.returncode == 2 and not (tmp_path / "ours.ckpt").exists()
    assert done.stderr.startswith("error:") and "model.conv_out.bias" in done.stderr and done.stderr.count("\n") == 1


# ---- reference cases


def test_left_out_outputs_are_named_with_a_reason():
    case = json.loads((GOLDEN / "lapt_loss_no_lesion.json").read_text())
    left_out = upstream.not_reproduced(case)
    assert left_out.keys() == {"loss_lesion", "loss", "nan_terms", "gradients_all_nan"}
    result = golden.run_case(GOLDEN / "lapt_loss_no_lesion.json")
    assert result.status == "pass" and "no 0 / 0 here" in result.note


def test_required_outputs_cannot_be_left_out(tmp_path):
    case = json.loads((GOLDEN / "lapt_loss_no_lesion.json").read_text()) | {"required": True}
    folder = tmp_path / "lapt"
    folder.mkdir()
    (folder / "case.json").write_text(json.dumps(case))
    (folder / "case.npz").write_bytes((GOLDEN / "lapt_loss_no_lesion.npz").read_bytes())
    assert golden.run_case(folder / "case.json").status == "FAIL"


def test_what_a_case_says_in_words():
    case = {"call": "Sample with 5 DDIM steps, eta 0.0. Only trajectory positions [0, 1, 7] are stored."}
    assert upstream.read_words(case) == {"ddim_steps": 5, "positions": [0, 1, 7]}
    assert upstream.read_words({}) == {}
