import pytest
import torch

from common.cli import UserError
from il_cldm import upstream

UNET = {"inner_channel": 8, "norm_groups": 4, "channel_mults": [1, 2], "res_blocks": 1, "config.time_dim": 16}
MODULES = [
    ("AAE", {"config.latent_dim": 2}),
    ("Encoder", {"image_channels": 2}),
    ("Decoder", {"latent_dim": 3}),
    ("Discriminator", {"channels": [2, 4, 6]}),
    ("Discriminator", {"channels": [2, 3, 4, 5], "image_channels": 2}),
    ("UNet", UNET),
    ("UNet", UNET | {"channel_mults": [1, 1, 2, 3], "res_blocks": 3, "image_size": 16, "attn_res": [8, 2]}),
    ("ResidualBlock", {"in_channels": 16, "out_channels": 16}),
    ("ResnetBlock", {"dim": 8, "dim_out": 4, "time_emb_dim": 6, "norm_groups": 2}),
    ("SelfAttention", {"in_channel": 8, "norm_groups": 2}),
    ("TimeEmbedding", {"dim": 8}),
]


@pytest.mark.parametrize(("module", "config"), MODULES)
def test_round_trip(module, config):
    torch.manual_seed(0)
    model, other = upstream.build(module, config), upstream.build(module, config)
    theirs = upstream.to_upstream(model)
    assert len(theirs) == len(model.state_dict())
    assert len({value.data_ptr() for value in theirs.values()}) == len(theirs)  # each of our tensors once
    upstream.load(other, {f"module.{key}": value for key, value in theirs.items()})
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_key_map_samples():
    names = upstream.key_map(upstream.build("UNet", UNET))
    assert names["projector.time.inv_freq"] == "time_mlp.0.inv_freq"
    assert names["down.0.weight"] == "downs.0.weight"
    assert names["down.2.bias"] == "downs.2.conv.bias"
    assert names["middle.0.attention.qkv.weight"] == "mid.0.attn.qkv.weight"
    assert names["up.1.skip.weight"] == "ups.1.res_block.res_conv.weight"
    assert names["extractor.res.norm2.bias"] == "cond.1.block.3.gn.bias"
    assert names["projector.label.weight"] == "label_emb.weight"


def test_unknown_module_and_argument():
    with pytest.raises(KeyError):
        upstream.build("VQVAE", {})
    with pytest.raises(KeyError, match="depth"):
        upstream.build("UNet", {"depth": 3})
    with pytest.raises(ValueError, match="unknown module"):
        upstream.run("VQVAE", None, {})


@pytest.mark.parametrize(("spoil", "message"), [("missing", "no mid.0"), ("extra", "unexpected"), ("shape", "shape")])
def test_load_is_strict(spoil, message):
    model = upstream.build("UNet", UNET)
    state = upstream.to_upstream(model)
    if spoil == "missing":
        del state["mid.0.attn.out.bias"]
    elif spoil == "extra":
        state["mid.2.attn.out.bias"] = torch.zeros(3)
    else:
        state["label_emb.weight"] = torch.zeros(7, 16)
    with pytest.raises(UserError, match=message):
        upstream.load(model, state)


def write(path, model, prefix="module."):
    """A file as the original writes it: weights with the prefix of DataParallel, and an optimizer with its state."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    state = {prefix + key: value for key, value in upstream.to_upstream(model).items()}
    torch.save({"state_dict": state, "optimizer": optimizer.state_dict()}, path)


@pytest.mark.parametrize(
    ("module", "config"),
    [
        ("AAE", {"latent_dim": 3}),
        ("UNet", UNET | {"norm_groups": 4, "num_classes": 2}),
        ("UNet", UNET | {"channel_mults": [1, 2, 2], "res_blocks": 2, "in_channel": 4, "out_channel": 3}),
        ("UNet", UNET | {"channel_mults": [1, 2, 2], "image_size": 28, "attn_res": [14, 7]}),
    ],
)
def test_checkpoint_file_tells_its_network(tmp_path, module, config):
    torch.manual_seed(1)
    model = upstream.build(module, config).eval()
    write(tmp_path / "x.pth.tar", model)
    found, loaded = upstream.load_checkpoint(tmp_path / "x.pth.tar", **{"norm_groups": 4} if module == "UNet" else {})
    assert found == module
    with torch.no_grad():
        if module == "AAE":
            x = torch.rand(1, 1, 8, 8, 8)
            assert torch.equal(loaded.eval()(x)[0], model(x)[0])
        else:
            x, t = torch.randn(1, config.get("out_channel", 1), 8, 8, 8), torch.tensor([5])
            cond, label = torch.randn(1, 1, 8, 8, 8), torch.tensor([1])
            assert torch.equal(loaded.eval()(x, cond, t, label), model(x, cond, t, label))


def test_paper_checkpoint_is_recognised_from_shapes_alone():
    with torch.device("meta"):
        config = {"channel_mults": [1, 2, 2, 4], "num_classes": 2, "attn_res": [4], "image_size": 40}
        model = upstream.build("UNet", config)
        state = upstream.to_upstream(model)
        module, config = upstream.identify({f"module.{key}": value for key, value in state.items()})
        again = upstream.to_upstream(upstream.build(module, config))
    assert module == "UNet"
    assert (config["channel_mults"], config["res_blocks"], config["num_classes"]) == ([1, 2, 2, 4], 2, 2)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in again.items()}


def test_discriminator_is_recognised():
    state = upstream.to_upstream(upstream.build("Discriminator", {"channels": [2, 4, 6]}))
    assert upstream.identify(state) == ("Discriminator", {"image_channels": 1, "channels": [2, 4, 6]})


def test_null_class_row_of_an_original_checkpoint_is_zero():
    from il_cldm.model import Denoiser

    original = upstream.build("UNet", UNET)
    ours = Denoiser(1, 1, 8, (1, 2), 4, 1, (3,), 28, 0.0, 16, num_classes=4, null_class=True)
    upstream.load(ours, upstream.to_upstream(original))
    assert torch.equal(ours.projector.label.weight[:4], original.projector.label.weight)
    assert not ours.projector.label.weight[4].any()


def test_other_files_are_refused(tmp_path):
    torch.save({"weights": {}}, tmp_path / "a.pt")
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, tmp_path / "b.pt")
    for name, message in (("a.pt", "no state_dict"), ("b.pt", "no IL-CLDM network"), ("c.pt", "c.pt")):
        with pytest.raises(UserError, match=message):
            upstream.load_checkpoint(tmp_path / name)
    write(tmp_path / "d.pt", upstream.build("UNet", UNET))  # width 8 does not divide into the default 32 groups
    with pytest.raises(UserError, match="d.pt.*divisible"):
        upstream.load_checkpoint(tmp_path / "d.pt")
