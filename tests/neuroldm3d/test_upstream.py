"""The original's checkpoints and pickles. "fact N" is an acceptance fact of the specification."""

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from common import checkpoint, schedulers
from common.cli import UserError
from common.ema import EMA
from neuroldm3d import upstream
from neuroldm3d.diffusion.model import DiT3D
from neuroldm3d.VAE.model import AutoencoderKL
from tests import golden

GOLDEN = Path(golden.__file__).parent / "neuroldm3d"
VAE = {"channels": [4, 8], "num_res_blocks": [1, 2], "latent_channels": 3, "norm_num_groups": 2, "in_channels": 1}
DIT = {
    "in_size": [8, 10, 6],
    "patch_size": [4, 2, 2],
    "in_channels": 4,
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 2,
}
WINDOWS = {"use_rel_pos": True, "window_size": 3, "window_block_indexes": [1]}
MODULES = [
    ("VAE_Lite", VAE),
    ("VAE_Lite", VAE | {"channels": [4, 8, 8], "num_res_blocks": [2, 1, 1]}),
    ("LPIPSLoss3D", {"net": "alex"}),
    ("DiT", DIT),
    ("DiT", DIT | WINDOWS | {"learn_sigma": True, "class_dropout_prob": 0.0}),
    ("Model", DIT | {"model_type": "DiT-S/4"}),
    ("MRIClassifier (3D CNN)", {"num_classes": 1, "dropout_rate": 0.2, "filters": [4, 6]}),
]


@pytest.mark.parametrize(("module", "config"), MODULES)
def test_round_trip(module, config):
    model, other = upstream.build(module, config), upstream.build(module, config)
    for p in model.parameters():
        p.data.normal_()
    theirs = upstream.to_upstream(model)
    names = upstream.key_map(model)
    assert names.keys() == model.state_dict().keys() and len(set(names.values())) == len(names)
    upstream.load(other, theirs)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_key_map_samples():
    names = upstream.key_map(upstream.build("VAE_Lite", VAE))
    assert names["encoder.blocks.1.conv.weight"] == "encoder.blocks.2.conv.conv.weight"
    assert names["encoder.blocks.2.skip.bias"] == "encoder.blocks.3.nin_shortcut.conv.bias"
    assert names["decoder.blocks.2.conv.weight"] == "decoder.blocks.3.postconv.conv.weight"
    assert names["decoder.norm_out.weight"] == "decoder.blocks.5.weight"
    assert names["logvar.bias"] == "conv_var.bias"
    names = upstream.key_map(upstream.build("DiT", DIT | WINDOWS))
    assert names["positions"] == "pos_embed"
    assert names["blocks.1.attention.relative.2"] == "blocks.1.attn.rel_pos_z"
    assert names["modulation_out.bias"] == "final_layer.adaLN_modulation.1.bias"
    lpips = upstream.to_upstream(upstream.build("LPIPSLoss3D", {"net": "vgg"}))
    assert lpips["lpips_fn.lin3.model.1.weight"] is lpips["lpips_fn.lins.3.model.1.weight"]
    assert lpips["lpips_fn.net.slice4.19.weight"].shape == (512, 512, 3, 3)


def test_unknown_module_and_argument():
    with pytest.raises(KeyError):
        upstream.build("VQVAE", {})
    with pytest.raises(KeyError, match="attention_levels"):
        upstream.build("VAE_Lite", VAE | {"attention_levels": [False, True]})
    with pytest.raises(KeyError, match="use_convtranspose"):
        upstream.build("VAE_Lite", VAE | {"use_convtranspose": True})


@pytest.mark.parametrize(
    ("spoil", "message"), [("missing", "no patch_em"), ("extra", "unexpected"), ("shape", "shape")]
)
def test_load_is_strict(spoil, message):
    model = upstream.build("DiT", DIT)
    state = upstream.to_upstream(model)
    if spoil == "missing":
        del state["patch_embed.proj.bias"]
    elif spoil == "extra":
        state["blocks.2.attn.qkv.bias"] = torch.zeros(3)
    else:
        state["pos_embed"] = torch.zeros(1, 7, 48)
    with pytest.raises(UserError, match=message):
        upstream.load(model, state)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_vae_checkpoint(tmp_path):
    """The file of the original's trainer; widths, blocks and latent channels are read off the weights."""
    for extra in ({}, {"channels": [4, 8, 8], "num_res_blocks": [2, 1, 1]}, {"latent_channels": 5}):
        model = upstream.build("VAE_Lite", VAE | extra)
        state = {f"module.{key}": value for key, value in upstream.to_upstream(model).items()}
        torch.save({"epoch": 68, "vae_state_dict": state, "val_loss": 0.10033}, tmp_path / "best_vae_gan.pth")
        content = checkpoint.load(tmp_path / "best_vae_gan.pth")
        kind, loaded = upstream.from_checkpoint(content, "best_vae_gan.pth", norm_num_groups=2)
        assert kind == "vae" and isinstance(loaded, AutoencoderKL)
        x = torch.randn(1, 1, 8, 8, 8)
        assert torch.equal(loaded.encode(x)[0], model.encode(x)[0])
        assert torch.equal(loaded.decode(loaded.encode(x)[1]), model.decode(model.encode(x)[1]))


def test_published_vae_is_recognised_from_shapes_alone():
    with torch.device("meta"):
        config = VAE | {"channels": [32, 64, 128], "num_res_blocks": [1, 1, 1], "latent_channels": 4}
        state = upstream.to_upstream(upstream.build("VAE_Lite", config))
        assert len(state) == 80
        kind, loaded = upstream.from_checkpoint({"vae_state_dict": state}, "best_vae.pth")
    assert sum(p.numel() for p in loaded.parameters()) == 2_929_037


def dit_file(config=DIT, **more):
    """A checkpoint as the original writes it, and the two networks whose weights it holds."""
    raw, average = upstream.build("DiT", config), upstream.build("DiT", config)
    for model in (raw, average):
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_(std=0.2)
    states = [upstream.to_upstream(model) for model in (raw, average)]
    content = {
        "epoch": 9999,
        "model_state": {f"model.{key}": value for key, value in states[0].items()},
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 2e-4}]},
        "ema_state": {f"module.model.{key}": value for key, value in states[1].items()},
    }
    return content | more, raw, average


def test_fact_25_both_state_sets_of_a_dit_checkpoint(tmp_path):
    content, raw, average = dit_file()
    torch.save(content, tmp_path / "epoch_9999.pth")
    content = checkpoint.load(tmp_path / "epoch_9999.pth")
    x, t, label = torch.randn(1, 4, 8, 10, 6), torch.tensor([9]), torch.tensor([1])
    for options, expected in (({}, average), ({"weights": "raw"}, raw)):
        settings = options | {"in_size": (8, 10, 6), "num_heads": 4}
        kind, loaded = upstream.from_checkpoint(content, "epoch_9999.pth", **settings)
        assert kind == "dit" and loaded.null_label == 2
        assert torch.equal(loaded(x, t, label), expected(x, t, label))
    content = dit_file(ema_state=None)[0]  # a file without an average has its only weights
    upstream.from_checkpoint(content, "x", in_size=(8, 10, 6), num_heads=4)


def test_dit_options_read_off_the_weights():
    config = DIT | {"hidden_size": 384, "num_heads": 6, "mlp_ratio": 2.0, "learn_sigma": True, "use_rel_pos": True}
    _, loaded = upstream.from_checkpoint(dit_file(config)[0], "x", in_size=(8, 10, 6))
    block = loaded.blocks[0]
    assert (loaded.out_channels, block.attention.num_heads, block.fc1.out_features) == (8, 6, 768)
    assert loaded.patch_size == (4, 2, 2) and len(loaded.blocks) == 2 and block.attention.relative is not None
    _, windowed = upstream.from_checkpoint(
        dit_file(DIT | WINDOWS)[0], "x", in_size=(8, 10, 6), num_heads=4, window_size=3, window_block_indexes=[1]
    )
    assert [block.window for block in windowed.blocks] == [0, 3]


def test_published_dit_is_recognised_from_shapes_alone():
    config = {"in_size": (28, 34, 28), "in_channels": 4, "num_classes": 2, "model_type": "DiT-S/4"}
    with torch.device("meta"):
        state = upstream.to_upstream(upstream.build("Model", config))
        assert len(state) == 132 and all(key.startswith("model.") for key in state)
        kind, loaded = upstream.from_checkpoint({"model_state": state}, "epoch_best.pth")
    assert isinstance(loaded, DiT3D) and sum(p.numel() for p in loaded.parameters()) == 32_881_664


def test_classifier_checkpoint():
    for module, config in MODULES[-1:]:
        model = upstream.build(module, config)
        content = {"epoch": 3, "model_state_dict": upstream.to_upstream(model), "metrics": {}}
        kind, loaded = upstream.from_checkpoint(content, "best_model.pth")
        assert kind == "classifier" and type(loaded) is type(model)
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": {}}, "not a file of the original NeuroLDM-3D"),
        ({"vae_state_dict": {"fc.weight": torch.zeros(2)}}, "x.pth"),
        ({"model_state": {"fc.weight": torch.zeros(2)}}, "x.pth"),
        ({"model_state_dict": {"fc.weight": torch.zeros(2)}}, "x.pth"),
        (dit_file()[0], "no num_heads"),  # a width of no published size
        (dit_file(DIT | {"hidden_size": 384, "num_heads": 6})[0], "pos_embed has shape"),  # of another latent
    ],
)
def test_other_files_are_refused(content, message):
    with pytest.raises(UserError, match=message):
        upstream.from_checkpoint(content, "x.pth")


# -------------------------------------------------------------------------------------------------------------- pickles


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def latent():
    mu = np.random.default_rng(0).standard_normal((4, 3, 2, 3), dtype=np.float32)
    return {"mu": mu, "logvar": np.asfortranarray(-mu), "label": 1, "score": np.float64(0.25)}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_fact_38_latents_of_the_original_are_read(tmp_path, protocol):
    path = tmp_path / "sub_latent.pkl"
    path.write_bytes(pickle.dumps(latent(), protocol))
    content = upstream.read_pickle(path)
    for key, value in latent().items():
        assert np.array_equal(content[key], value) and type(content[key]) is type(value), key


def test_fact_38_pickles_of_older_numpy_are_read(tmp_path):
    """NumPy 1 wrote the names of its modules without the underscore."""
    data = pickle.dumps({"image": np.ones((2, 3, 2), np.float32), "label": 0}, 2)
    data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert b"numpy.core.multiarray" in data
    (tmp_path / "0_0.pkl").write_bytes(data)
    assert upstream.read_pickle(tmp_path / "0_0.pkl")["image"].shape == (2, 3, 2)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_fact_38_malicious_file_is_refused_before_it_runs(tmp_path, protocol):
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps({"mu": np.zeros(3), "label": Malicious(tmp_path / "made")}, protocol))
    with pytest.raises(UserError, match="bad.pkl is refused: it holds a (posix|nt).mkdir"):
        upstream.read_pickle(path)
    assert not (tmp_path / "made").exists()
    nested = np.array([Malicious(tmp_path / "made")], dtype=object)
    path.write_bytes(pickle.dumps({"mu": nested}, protocol))
    with pytest.raises(UserError, match="refused"):
        upstream.read_pickle(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("attribute", ["load", "fromfile", "f2py.compile", "testing.runstring"])
def test_fact_38_other_functions_of_numpy_are_refused(tmp_path, attribute):
    """Only what arrays are made of is allowed, and no attribute reached through a dotted name."""
    module, _, name = f"numpy.{attribute}".rpartition(".")
    for pair in ((module, name), ("numpy", attribute)):
        stream = io.BytesIO()
        stream.write(b"\x80\x04" + b"".join(b"\x8c" + bytes([len(p)]) + p.encode() for p in pair) + b"\x93.")
        (tmp_path / "x.pkl").write_bytes(stream.getvalue())
        with pytest.raises(UserError, match="refused: it holds a numpy"):
            upstream.read_pickle(tmp_path / "x.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({1: 2}), "holds a dict"),
        (pickle.dumps({"mu": np.array([None, "x"], dtype=object)}), "mu is an array of objects"),
        (pickle.dumps({"mu": torch.zeros(2)}), "it holds a torch"),
        (pickle.dumps(latent())[:-40], "truncated"),
        (b"", "truncated"),
        (b"no pickle at all", "no pickle"),
    ],
)
def test_other_pickles_are_refused(tmp_path, content, message):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        upstream.read_pickle(tmp_path / "x.pkl")


def test_missing_pickle(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        upstream.read_pickle(tmp_path / "x.pkl")


# -------------------------------------------------------------------------------------------------------- golden values


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_fact_22_defect_52_posterior_of_the_first_step(kind):
    """Tables in float64: at t = 0 the mean is exactly x_0; the original's float32 tables give 0.99983 of it."""
    tables = upstream.run("get_betas / GaussianDiffusion", {"schedule_type": kind}, {})
    assert tables["posterior_mean_coef1"][0].item() == 1.0 and tables["posterior_mean_coef2"][0].item() == 0.0
    schedule = schedulers.make_schedule(kind, 1000)
    if kind == "linear":
        rows = {
            0: (1e-4, 0.9999, 0, 1, 0),
            100: (2.09199e-3, 0.89514160, 2.05455e-3, 0.018895, 0.981076),
            250: (5.07998e-3, 0.52142304, 5.05172e-3, 0.007684, 0.991908),
            500: (1.005996e-2, 0.07779666, 1.005134e-2, 0.003058, 0.994104),
            999: (2e-2, 4.035830e-5, 1.9999983e-2, 0.000128, 0.989949),
        }
        names = ("np_betas", "alphas_cumprod", "posterior_variance", "posterior_mean_coef1", "posterior_mean_coef2")
        for t, values in rows.items():
            got = [tables[name][t].item() for name in names]  # six digits are listed
            assert got[:3] == pytest.approx(values[:3], rel=3e-6, abs=0) and got[3:] == pytest.approx(
                values[3:], abs=6e-7
            )
        # t = 1 from the definition: the specification lists the original's rounded 0.545357 and 0.454839.
        beta_0, beta_1 = 1e-4, 1e-4 + 0.0199 / 999
        bar_1 = (1 - beta_0) * (1 - beta_1)
        c_x0, c_xt = (1 - beta_0) ** 0.5 * beta_1 / (1 - bar_1), (1 - beta_1) ** 0.5 * beta_0 / (1 - bar_1)
        assert [tables[name][1].item() for name in names[3:]] == pytest.approx((c_x0, c_xt), rel=1e-9)
        assert (c_x0, c_xt) == pytest.approx((0.545357, 0.454839), rel=3e-4)
    else:
        betas = [schedule.betas[t].item() for t in (0, 500, 999)]
        assert betas == pytest.approx([4.12842e-5, 3.15569e-3, 0.999], rel=1e-5)


def test_fact_24_guidance_of_the_original_corrected():
    """u + s (c - u) on all four channels, from the original's own conditional and unconditional outputs."""
    case = json.loads((GOLDEN / "dit_small_cfg.json").read_text())
    with np.load(GOLDEN / "dit_small_cfg.npz") as arrays:
        cond, uncond, theirs = (torch.from_numpy(arrays[name]) for name in ("cond", "uncond", "out"))
    s = case["inputs"]["cfg_scale"]
    ours = schedulers.guided(lambda x, t: cond, lambda x, t: uncond, s)(cond, None)
    assert torch.allclose(ours, uncond + s * (cond - uncond), atol=1e-6)
    assert torch.allclose(ours[:, :3], theirs[:2, :3], atol=1e-4)
    assert torch.allclose(theirs[:2, 3:], cond[:, 3:], atol=1e-4)  # the original's fourth channel is unguided
    assert (ours[:, 3:] - cond[:, 3:]).abs().max() > 0.1


def test_fact_25_average_is_the_originals_but_for_a_rounding():
    """Why the case ema_update is listed as not reproduced: its tolerance is below one bit of these float32 numbers."""
    old, new = torch.randn(50), torch.randn(50)
    raw = torch.nn.ParameterList([old.clone()])
    ema = EMA(raw, 0.9999)
    raw[0].data.copy_(new)
    ema.update(raw)
    assert torch.allclose(ema.module[0], old * 0.9999 + new * (1 - 0.9999), rtol=2e-7, atol=1e-9)
    left_out = upstream.not_reproduced({"module": "update_ema", "outputs": {"one_step_0.9999": [6, 5]}})
    assert (
        list(left_out) == ["one_step_0.9999"]
        and upstream.not_reproduced({"module": "DiT", "outputs": {"out": []}}) == {}
    )
