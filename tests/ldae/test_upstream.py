"""The original's checkpoints. "fact N" is an acceptance fact of the specification."""

import json
from pathlib import Path

import pytest
import torch

from common import checkpoint, runtime
from common.cli import UserError
from ldae import latents, model, posterior_gap, upstream
from ldae.autoencoder import AutoencoderKL, PatchDiscriminator
from ldae.encoder import SemanticEncoder, SliceClassifier, SliceRegressor
from ldae.preprocess import Preparation
from ldae.scripts import import_weights
from ldae.unet import ShiftUNet, UNet
from tests import golden
from tests.helpers import run_main, run_script

GOLDEN = Path(golden.__file__).parent / "ldae"
RT = runtime.Runtime(torch.device("cpu"))
AEKL = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "num_channels": [32, 32, 64], "latent_channels": 3,
        "num_res_blocks": [1, 2, 1], "norm_num_groups": 32, "attention_levels": [False] * 3,
        "with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}  # fmt: skip
UNETS = {"input_channel": 3, "base_channel": 32, "channel_multiplier": [1, 2], "num_residual_blocks_of_a_block": 1,
         "attention_resolutions": [2], "num_heads": 1, "head_channel": -1, "use_new_attention_order": False,
         "dropout": 0.1, "dims": 3}  # fmt: skip
ENCODER = {"backbone": "torchvision ConvNeXt class, stages (in, out, blocks) = (8,16,1), (16,none,2)", "emb_chans": 16,
           "num_heads": 8, "seq_len": 9}  # fmt: skip
DISC = {"in_channels": 1, "num_channels": 8, "num_layers_d": 2}
PUBLISHED = {  # the class names and arguments of the published configuration
    "AutoencoderKL (MONAI generative 0.2.3)": AEKL | {"num_channels": [64, 128, 128, 128], "num_res_blocks": 2},
    "UNet": UNETS | {"base_channel": 256, "channel_multiplier": [1, 2, 3], "num_residual_blocks_of_a_block": 2,
                     "attention_resolutions": [2, 4]},
    "AttentionSemanticEncoder": {"net_class_path": "torchvision.models.convnext_small", "backbone": "ConvNeXt-Small",
                                 "emb_chans": 768, "num_heads": 8, "seq_len": 128},
    "PatchDiscriminator (MONAI generative 0.2.3)": DISC | {"num_channels": 64, "num_layers_d": 3},
}  # fmt: skip
PUBLISHED["ShiftUNet"] = PUBLISHED["UNet"] | {"latent_dim": 768}
MODULES = [
    ("AutoencoderKL (MONAI generative 0.2.3)", AEKL),
    ("PatchDiscriminator (MONAI generative 0.2.3)", DISC),
    ("UNet", UNETS),
    ("ShiftUNet", UNETS | {"latent_dim": 16}),
    ("AttentionSemanticEncoder", ENCODER),
    ("EncoderClassifier", ENCODER | {"num_classes": 3}),
    ("EncoderRegressor", ENCODER | {"age_min": 0.0, "age_max": 1.0}),
    (
        "PerceptualLoss (MONAI generative 0.2.3, lpips 0.1.4, squeeze)",
        {"network_type": "squeeze", "fake_3d_ratio": 0.5},
    ),
]


def made(module, config, seed=0):
    """A network of the original with weights that nothing initialises."""
    network = upstream.build(module, config)
    g = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.data.copy_(0.2 * torch.randn(p.shape, generator=g))
    return network.eval()


def same_weights(a, b):
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


# ----------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(("module", "config"), MODULES)
def test_fact_8_round_trip(module, config):
    network, other = made(module, config), upstream.build(module, config)
    names = upstream.key_map(network)
    assert names.keys() == network.state_dict().keys() and len(set(names.values())) == len(names)
    upstream.load(other, upstream.to_upstream(network))
    assert same_weights(network, other)


def case(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["aekl_full", "disc_full", "unet_full", "sem_encoder_full"])
def test_fact_8_published_keys_and_shapes(name):
    """Every key of the original at the paper's size, and no other."""
    found = case(name)
    with torch.device("meta"):
        network = upstream.build(found["module"], found["config"])
    assert {key: list(value.shape) for key, value in upstream.to_upstream(network).items()} == found["keys"]


def test_fact_8_decoder_has_222_tensors_more_than_the_prior():
    with torch.device("meta"):
        prior, decoder = (upstream.to_upstream(upstream.build(name, PUBLISHED[name])) for name in ("UNet", "ShiftUNet"))
    assert prior.keys() < decoder.keys() and len(decoder) - len(prior) == 222
    groups = {key.split(".")[0] for key in decoder.keys() - prior.keys()}
    assert groups == {"label_emb", "shift_middle_block", "shift_output_blocks", "shift_out"}


def test_key_map_samples():
    names = upstream.key_map(upstream.build(*MODULES[0]))
    assert names["encoder.blocks.1.conv.weight"] == "encoder.blocks.2.conv.conv.weight"
    assert names["encoder.blocks.5.skip.bias"] == "encoder.blocks.6.nin_shortcut.conv.bias"
    assert names["decoder.blocks.1.conv.weight"] == "decoder.blocks.2.conv.conv.weight"
    assert names["latent.bias"] == "post_quant_conv.conv.bias"
    names = upstream.key_map(upstream.build("ShiftUNet", UNETS | {"latent_dim": 16}))
    assert names["prior.time1.weight"] == "time_embed.0.weight"
    assert names["prior.input_stages.2.1.qkv.weight"] == "input_blocks.3.1.qkv.weight"
    assert names["estimator.shift_output_blocks.1.2.code.bias"] == "shift_output_blocks.1.2.emb_z_layers.1.bias"
    names = upstream.key_map(upstream.build("EncoderClassifier", ENCODER | {"num_classes": 3}))
    assert names["encoder.positions"] == "positional_encoding.pe" and names["head.bias"] == "classifier.bias"


def test_fact_8_tensors_with_two_names():
    encoder = made("AttentionSemanticEncoder", ENCODER)
    state = upstream.to_upstream(encoder)
    twins = [key for key in state if key.startswith("backbone.backbone.")]
    assert len(twins) == len(encoder.backbone.state_dict())
    assert all(state[key] is state["slice_distributed.module." + key.removeprefix("backbone.")] for key in twins)
    other = upstream.build("AttentionSemanticEncoder", ENCODER)
    upstream.load(other, {key: torch.zeros_like(v) if key in twins else v for key, v in state.items()})
    assert same_weights(encoder, other)  # the second name does not count
    upstream.load(other, {key: value for key, value in state.items() if key not in twins})
    lpips = upstream.to_upstream(upstream.build(*MODULES[-1]))
    assert lpips["perceptual_function.lin6.model.1.weight"] is lpips["perceptual_function.lins.6.model.1.weight"]
    assert lpips["perceptual_function.net.slice2.4.expand3x3.weight"].shape == (64, 16, 3, 3)


def test_fact_8_both_monai_releases():
    """Blocks 3, 6, 9 of the published decoder are `conv.conv` or, in MONAI core, `postconv.conv`."""
    with torch.device("meta"):
        state = upstream.to_upstream(upstream.build(MODULES[0][0], PUBLISHED[MODULES[0][0]]))
    renamed = upstream.rename_upsampling(state, "core")
    assert {key for key in renamed if key not in state} == {
        f"decoder.blocks.{i}.postconv.conv.{what}" for i in (3, 6, 9) for what in ("weight", "bias")
    }
    assert upstream.rename_upsampling(renamed, "generative").keys() == state.keys()
    aekl, other = made(*MODULES[0]), upstream.build(*MODULES[0])
    upstream.load(other, upstream.rename_upsampling(upstream.to_upstream(aekl), "core"))
    assert same_weights(aekl, other)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [("missing", r"no time_embed.2.bias"), ("extra", "unexpected fc.bias"), ("shape", r"out.0.bias has shape \(7,\)")],
)
def test_load_is_strict(spoil, message):
    network = upstream.build("UNet", UNETS)
    state = upstream.to_upstream(network)
    if spoil == "missing":
        del state["time_embed.2.bias"]
    else:
        state["fc.bias" if spoil == "extra" else "out.0.bias"] = torch.zeros(7)
    with pytest.raises(UserError, match=message):
        upstream.load(network, state)


def test_unknown_module_and_argument():
    with pytest.raises(KeyError):
        upstream.build("VQVAE", {})
    for module, config, message in (
        ("AutoencoderKL (MONAI generative 0.2.3)", AEKL | {"attention_levels": [True]}, "attention_levels"),
        ("AutoencoderKL (MONAI generative 0.2.3)", AEKL | {"with_encoder_nonlocal_attn": True}, "nonlocal"),
        ("UNet", UNETS | {"dims": 2}, "dims"),
        ("PatchDiscriminator (MONAI generative 0.2.3)", DISC | {"kernel_size": 3}, "kernel_size"),
    ):
        with pytest.raises(KeyError, match=message):
            upstream.build(module, config)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def lightning(prefixes):
    """A checkpoint as Lightning writes it: networks under their prefixes."""
    state = {prefix + key: v for prefix, net in prefixes.items() for key, v in upstream.to_upstream(net).items()}
    return {
        "epoch": 7,
        "global_step": 900,
        "state_dict": state,
        "optimizer_states": [],
        "hyper_parameters": {"lr": 1e-4},
    }


@pytest.mark.parametrize("core", [False, True])
def test_fact_8_bare_autoencoder(tmp_path, core):
    """autoencoderkl.pth, through the loader of every later stage; widths and blocks are read off the weights."""
    aekl = made(*MODULES[0])
    state = upstream.to_upstream(aekl)
    torch.save(upstream.rename_upsampling(state, "core") if core else state, tmp_path / "autoencoderkl.pth")
    kind, loaded = upstream.from_checkpoint(checkpoint.load(tmp_path / "autoencoderkl.pth"), "autoencoderkl.pth")
    assert kind == "aekl" and same_weights(aekl, loaded)
    assert upstream.aekl_settings(loaded) == dict(
        in_channels=1,
        out_channels=1,
        channels=[32, 32, 64],
        latent_channels=3,
        num_res_blocks=[1, 2, 1],
        norm_groups=32,
    )
    trained = latents.load_aekl(tmp_path / "autoencoderkl.pth", RT)
    assert trained.preparation == Preparation.upstream() and same_weights(aekl, trained.model)
    x = torch.randn(1, 1, 8, 8, 8)
    assert torch.equal(loaded.encode(x)[0], aekl.encode(x)[0])


def test_fact_8_lightning_checkpoint_of_stage_1():
    aekl, disc = made(*MODULES[0]), made(*MODULES[1])
    content = lightning({"model.": aekl, "discriminator.": disc})
    content["state_dict"]["perceptual_loss.perceptual_function.lin0.model.1.weight"] = torch.zeros(1, 64, 1, 1)
    kind, loaded = upstream.from_checkpoint(content, "best.ckpt")
    assert kind == "aekl" and isinstance(loaded, AutoencoderKL) and same_weights(aekl, loaded)
    kind, loaded = upstream.from_checkpoint(content, "best.ckpt", want="discriminator")
    assert kind == "discriminator" and isinstance(loaded, PatchDiscriminator) and same_weights(disc, loaded)


def test_fact_8_lightning_checkpoint_of_stage_2():
    aekl, raw, average = made(*MODULES[0]), made("UNet", UNETS, 1), made("UNet", UNETS, 2)
    content = lightning({"vae.": aekl, "unet.": raw, "ema_unet.": average})
    assert upstream.from_checkpoint(content, "x")[0] == "aekl"
    for options, expected in (({}, average), ({"weights": "raw"}, raw)):
        kind, loaded = upstream.from_checkpoint(content, "x", want="prior", **options)
        assert kind == "prior" and isinstance(loaded, UNet) and same_weights(loaded, expected)
    with pytest.raises(UserError, match="x has no decoder of the original LDAE: it holds aekl, prior"):
        upstream.from_checkpoint(content, "x", want="decoder")


def stage_3():
    parts = {"vae.": made(*MODULES[0])}
    for i, prefix in enumerate(("", "ema_")):
        parts[f"{prefix}encoder."] = made("AttentionSemanticEncoder", ENCODER, i)
        parts[f"{prefix}decoder."] = made("ShiftUNet", UNETS | {"latent_dim": 16}, i)
    return parts


def test_fact_8_lightning_checkpoint_of_stage_3():
    parts = stage_3()
    content = lightning(parts)
    kinds = (("encoder", SemanticEncoder), ("decoder", ShiftUNet))
    for (want, kind), (weights, prefix) in ((k, w) for k in kinds for w in (("ema", "ema_"), ("raw", ""))):
        _, loaded = upstream.from_checkpoint(content, "x", want=want, weights=weights)
        assert isinstance(loaded, kind) and same_weights(loaded, parts[f"{prefix}{want}."])
    decoder = upstream.from_checkpoint(content, "x", want="decoder")[1]
    assert not any(p.requires_grad for p in decoder.prior.parameters())
    assert all(p.requires_grad for p in decoder.estimator.parameters())


@pytest.mark.parametrize("prefix", ["", "model.", "net.module."])
def test_supervised_checkpoints(prefix):
    for (module, config), kind in zip(MODULES[5:7], (SliceClassifier, SliceRegressor), strict=True):
        network = made(module, config)
        found, loaded = upstream.from_checkpoint(lightning({prefix: network}), "best.ckpt")
        assert found == kind.__name__.removeprefix("Slice").lower()
        assert isinstance(loaded, kind) and same_weights(loaded, network)


def test_half_precision_weights_become_float32():
    state = {
        key: v.half() if v.is_floating_point() else v for key, v in upstream.to_upstream(made("UNet", UNETS)).items()
    }
    _, loaded = upstream.from_checkpoint(state, "prior.pth")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "extra",
    [
        {"channel_multiplier": [1, 2, 3], "num_residual_blocks_of_a_block": 2, "attention_resolutions": [2, 4]},
        {"channel_multiplier": [2, 2, 1], "num_residual_blocks_of_a_block": 3, "attention_resolutions": []},
        {"channel_multiplier": [2], "num_residual_blocks_of_a_block": 2, "attention_resolutions": [1]},
        {"channel_multiplier": [1, 1], "num_residual_blocks_of_a_block": 1, "attention_resolutions": [1, 2]},
    ],
)
def test_unet_options_read_off_the_weights(extra):
    with torch.device("meta"):
        state = upstream.to_upstream(upstream.build("ShiftUNet", UNETS | extra | {"latent_dim": 5}))
    _, loaded = upstream.from_checkpoint(state, "decoder.pth")
    assert loaded.code_dim == 5
    assert upstream.unet_settings(loaded.prior) == dict(
        in_channels=3, base_channels=32, channel_mult=extra["channel_multiplier"],
        num_res_blocks=extra["num_residual_blocks_of_a_block"], attention_resolutions=extra["attention_resolutions"],
        num_heads=1, head_channels=-1, new_attention_order=False, dropout=0.1, isotropic=False, norm_groups=32,
    )  # fmt: skip


def test_fact_8_published_networks_are_recognised_from_shapes_alone():
    counts = dict(zip(PUBLISHED, (13_766_248, 486_927_363, 53_588_065, 11_048_769, 865_339_142), strict=True))
    for module, config in PUBLISHED.items():
        with torch.device("meta"):
            state = upstream.to_upstream(upstream.build(module, config))
        _, loaded = upstream.from_checkpoint(state, "x.pth")
        assert sum(p.numel() for p in loaded.parameters()) == counts[module]
        if isinstance(loaded, SemanticEncoder):
            rates = [getattr(m, "drop_path", 0) for m in loaded.backbone.modules()]
            assert max(rates) == 0.4 and upstream.encoder_settings(loaded)["stages"][2] == [384, 27]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": {}}, "x.pth has no weights of the original LDAE: none of its networks"),
        ({"state_dict": {"fc.weight": torch.zeros(2)}}, "x.pth has no weights"),
        ({"state_dict": 3}, "x.pth has no weights"),
        ({"time_embed.0.weight": torch.zeros(8, 2)}, "x.pth"),
        ({"query_projection.weight": torch.zeros(8, 8)}, "x.pth"),
        ({"quant_conv_mu.conv.weight": torch.zeros(3, 3, 1, 1, 1)}, "x.pth"),
    ],
)
def test_other_files_are_refused(content, message):
    with pytest.raises(UserError, match=message):
        upstream.from_checkpoint(content, "x.pth")


# ----------------------------------------------------------------------------------------------------------- whole LDAE


def write_original(folder, parts):
    """The three published files, and the checkpoint they were taken from."""
    for name, prefix in (("autoencoderkl", "vae."), ("decoder", "ema_decoder."), ("encoder", "ema_encoder.")):
        torch.save(upstream.to_upstream(parts[prefix]), folder / f"{name}.pth")
    torch.save(lightning(parts), folder / "last.ckpt")


def test_fact_8_import_of_the_published_files(tmp_path):
    """As a user does it; both ways give the same LDAE, which samples as the original does."""
    parts = stage_3()
    write_original(tmp_path, parts)
    files = ("autoencoderkl.pth", "decoder.pth", "encoder.pth")
    done = run_script(["ldae/scripts/import_weights.py", *files, "--root", tmp_path], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    best = tmp_path / "runs/ldae_repr_learn/checkpoints/best.ckpt"
    ldae = model.load_ldae(best, RT)
    assert same_weights(ldae.aekl, parts["vae."]) and same_weights(ldae.encoder, parts["ema_encoder."])
    assert same_weights(ldae.decoder, parts["ema_decoder."])
    assert ldae.preparation == Preparation.upstream() and ldae.plane == "axial" and ldae.code_dim == 16
    assert {name: getattr(ldae, name) for name in posterior_gap.UPSTREAM} == posterior_gap.UPSTREAM
    mu = torch.randn(1, 3, 4, 4, 4)
    assert torch.allclose(latents.normalise(mu, ldae.stats), 0.8730 * mu)
    assert ldae.schedule.alphas_bar[999].item() == pytest.approx(4.03583e-5, rel=1e-5)

    before, whole = best.read_bytes(), tmp_path / "last.ckpt"
    with pytest.raises(UserError, match="--overwrite"):
        run_main(import_weights, whole, "--root", tmp_path)
    assert best.read_bytes() == before
    run_main(import_weights, whole, "--root", tmp_path, "--overwrite")
    assert model.load_ldae(best, RT).hash == ldae.hash
    run_main(import_weights, whole, "--output", tmp_path / "raw.ckpt", "--weights", "raw")
    assert model.load_ldae(tmp_path / "raw.ckpt", RT).hash != ldae.hash


def test_import_says_what_is_missing(tmp_path):
    write_original(tmp_path, stage_3())
    (tmp_path / "damaged.pth").write_bytes((tmp_path / "encoder.pth").read_bytes()[:3000])
    for words, message in (
        (("autoencoderkl.pth", "encoder.pth"), "no decoder of the original LDAE"),
        ((), "no files to import"),
        (("absent.pth",), "absent.pth does not exist"),
        (("autoencoderkl.pth", "decoder.pth", "damaged.pth"), "damaged.pth is truncated, damaged"),
    ):
        with pytest.raises(UserError, match=message):
            run_main(import_weights, *(tmp_path / word for word in words), "--output", tmp_path / "out.ckpt")
        assert not (tmp_path / "out.ckpt").exists()


# ------------------------------------------------------------------------------------------------------ reference cases


def test_every_case_left_out_is_optional():
    for path in golden.find_cases([GOLDEN]):
        found = json.loads(path.read_text())
        assert not (found["required"] and upstream.not_reproduced(found)), path.stem


def test_training_mode_comes_from_the_notes(tmp_path):
    """The discriminator's cases differ in nothing else."""
    found = case("disc_small_train")
    found["what"] = found["notes"] = "Evaluation mode."
    (tmp_path / "ldae").mkdir()
    (tmp_path / "ldae/disc.json").write_text(json.dumps(found))
    (tmp_path / "ldae/disc.npz").write_bytes((GOLDEN / "disc_small_train.npz").read_bytes())
    assert golden.run_case(tmp_path / "ldae/disc.json").status == "FAIL"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("disc_small_train", lambda e: e["feature_shapes"][2].__setitem__(0, 3)),
        ("splits", lambda e: e["label_index__paper"].update(CN=2)),
        ("interpolation_protocol", lambda e: e["by_position"]["0.6"].update(ssim_std=0.0)),
        ("interpolation_protocol", lambda e: e["by_time_gap"].pop("12")),
        ("rep_loss_t0", lambda e: e.update(prior_grad_is_none=False)),
    ],
)
def test_expected_results_are_compared(tmp_path, name, change):
    found = case(name)
    change(found["expected"])
    (tmp_path / "ldae").mkdir()
    (tmp_path / f"ldae/{name}.json").write_text(json.dumps(found))
    (tmp_path / f"ldae/{name}.npz").write_bytes((GOLDEN / f"{name}.npz").read_bytes())
    result = golden.run_case(tmp_path / f"ldae/{name}.json")
    assert result.status == "FAIL" and "result" in result.note
