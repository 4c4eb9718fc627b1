"""The networks. "A<n>" is an acceptance fact of the specification."""

import pytest
import torch
import torch.nn.functional as F

from mgdcr.latent_net import MLPSkipNet
from mgdcr.model import Attention, DiffAE, EncoderBlock, ResidualBlock, SemanticEncoder, UncondUNet, set_checkpointing

PAPER = {"image_size": 128, "model_channels": 128, "channel_mult": (1, 1, 2, 3, 4), "num_res_blocks": 2,
         "attention_resolutions": (16,), "num_heads": 1, "embed_channels": 512, "dropout": 0.1}  # fmt: skip
PAPER_ENCODER = {"enc_channel_mult": (1, 1, 2, 3, 4, 4), "enc_num_res_blocks": 2, "enc_out_channels": 512}
SMALL = {"image_size": 16, "model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1,
         "attention_resolutions": (8,), "num_heads": 1, "embed_channels": 12, "dropout": 0.0}  # fmt: skip
SMALL_ENCODER = {"enc_channel_mult": (1, 1, 2), "enc_num_res_blocks": 1, "enc_out_channels": 12}


def randomised(network, seed=0):
    """The network with weights that nothing initialises and that keep the size of what passes, in eval mode."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            drawn = torch.randn(p.shape, generator=g)
            p.copy_(drawn * p[0].numel() ** -0.5 if p.ndim > 1 else 0.1 * drawn + name.endswith("weight"))
    return network.eval()


def small(**options):
    return randomised(DiffAE(**SMALL | SMALL_ENCODER | options))


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def count(module):
    return sum(p.numel() for p in module.parameters())


# ---- sizes of the paper


def test_parameters_of_the_paper():
    """A1: 128,538,241 in all, 24,671,232 of the encoder, 98,613,889 without a code; and those of the parts."""
    with torch.device("meta"):
        model, uncond = DiffAE(**PAPER, **PAPER_ENCODER), UncondUNet(**PAPER)
    assert count(model) == 128_538_241 and count(model.encoder) == 24_671_232 and count(uncond) == 98_613_889
    unet = model.unet
    assert count(unet.time1) + count(unet.time2) == 328_704
    assert count(unet.conv_in) + count(unet.input_stages) == 28_629_760
    assert [count(part) for part in (unet.middle, unet.output_stages, unet.out)] == [12_070_912, 62_836_224, 1_409]
    assert count(model.encoder.head) == 263_680 and count(model.encoder.middle) == 5_773_312
    codes = [m.code for m in unet.modules() if isinstance(m, ResidualBlock)]
    assert len(codes) == 35 and sum(code.out_features for code in codes) == 10_240


@pytest.mark.parametrize(("layers", "expected"), [(10, 54_109_696), (20, 117_106_176)])
def test_parameters_of_the_latent_network(layers, expected):
    with torch.device("meta"):
        network = MLPSkipNet(
            num_channels=512, num_hid_channels=2048, num_layers=layers, skip_layers=tuple(range(1, layers))
        )
        assert network(torch.empty(3, 512), torch.empty(3, dtype=torch.long)).shape == (3, 512)
    assert count(network) == expected


def test_shapes_at_the_size_of_the_paper():
    """A2: (B, 1, 128, 128) -> (B, 1, 128, 128), z (B, 512) of a 4 x 4 feature map."""
    with torch.device("meta"):
        model, x, t = DiffAE(**PAPER, **PAPER_ENCODER), torch.empty(2, 1, 128, 128), torch.empty(2, dtype=torch.long)
        z = model.encode(x)
        assert z.shape == (2, 512) and model.encoder.features(x).shape == (2, 512, 4, 4)
        assert model.denoise(x, t, z).shape == model(x, t, x).shape == x.shape


# ---- blocks


def test_the_block_of_the_encoder_is_one_convolution():
    block = randomised(EncoderBlock(4, 6))
    x = drawn(2, 4, 6, 6)
    expected = block.skip(x) + block.conv1(F.silu(block.norm1(x)))
    assert torch.equal(block(x), expected)
    assert count(block) == 2 * 4 + (4 * 9 + 1) * 6 + (4 + 1) * 6


@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_time_scales_and_shifts_then_the_code_scales(resample):
    """Preechakul et al. 2022, equation 7, written out."""
    block = randomised(ResidualBlock(4, 4, 5, 3, 0.5, resample=resample))
    x, emb, z = drawn(2, 4, 6, 6), drawn(2, 5, seed=2), drawn(2, 3, seed=3)

    def sized(v):
        if resample == "down":
            return v.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
        return v.repeat_interleave(2, 2).repeat_interleave(2, 3) if resample == "up" else v

    h = block.norm2(block.conv1(sized(F.silu(block.norm1(x)))))
    a_t, b_t = block.time(F.silu(emb)).split(4, dim=1)
    h = (h * (1 + a_t[..., None, None]) + b_t[..., None, None]) * (1 + block.code(F.silu(z))[..., None, None])
    torch.testing.assert_close(block(x, emb, z), sized(x) + block.conv2(F.silu(h)))


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_is_softmax_over_all_pixels(heads):
    layer, x = randomised(Attention(8, heads)), drawn(2, 8, 3, 4)
    qkv = layer.qkv(layer.norm(x).flatten(2)).view(2, heads, 3, 8 // heads, 12)
    q, k, v = qkv.unbind(2)
    weights = (q.transpose(2, 3) @ k / (8 / heads) ** 0.5).softmax(3)  # (B, heads, queries, keys)
    h = (v @ weights.transpose(2, 3)).reshape(2, 8, 12)
    torch.testing.assert_close(layer(x), x + layer.proj(h).view_as(x))


def test_an_untrained_network_predicts_nothing_and_starts_from_its_skips():
    """The last convolutions start at 0, those of every residual block of the U-Net and of attentions too."""
    model = DiffAE(**SMALL, **SMALL_ENCODER)
    x = drawn(2, 1, 16, 16)
    assert not model(x, torch.tensor([0, 999]), x).any()
    assert model.encode(x).std() > 0
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            assert not module.conv2.weight.any()
        elif isinstance(module, Attention):
            assert not module.proj.weight.any()


# ---- networks


def test_noise_depends_on_step_and_code_sample_by_sample():
    model, x, t = small(), drawn(3, 1, 16, 16), torch.tensor([3, 500, 999])
    z = drawn(3, 12, seed=2)
    eps = model.denoise(x, t, z)
    torch.testing.assert_close(eps[1:2], model.denoise(x[1:2], t[1:2], z[1:2]), atol=1e-5, rtol=1e-4)
    assert (model.denoise(x, t.flip(0), z) - eps)[[0, 2]].abs().amax((1, 2, 3)).min() > 1e-3
    assert (model.denoise(x, t, z.flip(0)) - eps)[[0, 2]].abs().amax((1, 2, 3)).min() > 1e-3


def test_training_reaches_every_parameter():
    """Encoder and U-Net learn together, through one call."""
    model, x = small(), drawn(2, 1, 16, 16)
    model(x, torch.tensor([5, 700]), x.flip(0)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_unconditional_network_ignores_code_and_image():
    model, x, t = randomised(UncondUNet(**SMALL)), drawn(2, 1, 16, 16), torch.tensor([1, 2])
    eps = model.denoise(x, t)
    assert torch.equal(eps, model.denoise(x, t, drawn(2, 12))) and torch.equal(eps, model(x, t, -x))
    assert model.code_dim == 0 and not any("code" in name for name, _ in model.named_parameters())


def test_attention_stands_at_levels_whatever_the_image():
    """attention_resolutions refer to image_size; the encoder has its own list if it is given one."""
    model = small(attention_resolutions=(8,), enc_attention_resolutions=(16, 4))
    found = [[isinstance(layer, Attention) for layer in stage] for stage in model.unet.input_stages]
    assert found == [[False], [False], [False, True]]
    found = [any(isinstance(layer, Attention) for layer in stage) for stage in model.encoder.stages]
    assert found == [True, False, False, False, True]
    assert model(x := drawn(1, 1, 32, 24), torch.tensor([7]), x).shape == x.shape


@pytest.mark.parametrize(("blocks", "expected"), [(1, [1, 1, None, 0, 0, None]), (3, [1, 1, 1, 0, 0, 0])])
def test_the_way_up_takes_the_laterals_that_exist(blocks, expected):
    """With too few on a level the last blocks go without, surplus ones are left."""
    model = small(num_res_blocks=2, num_input_res_blocks=blocks)
    assert model.unet.takes == expected
    x = drawn(2, 1, 16, 16)
    assert model(x, torch.tensor([1, 2]), x).shape == x.shape


def test_resampling_by_convolution():
    model, x = small(resblock_updown=False), drawn(1, 1, 16, 16)
    assert model(x, torch.tensor([3]), x).shape == x.shape
    assert {"Down", "Up"} <= {type(m).__name__ for m in model.modules()}


def test_recomputing_stages_changes_nothing():
    model, x, t = small(), drawn(2, 1, 16, 16), torch.tensor([5, 700])
    found = []
    for on in (False, True):
        set_checkpointing(model, on)
        model.zero_grad()
        model(x, t, x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert DiffAE(**SMALL, **SMALL_ENCODER, checkpointing=True).unet.middle.checkpointing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enc_out_channels": 10}, "10 numbers"),
        ({"cond_channels": 10}, "takes 10"),
        ({"image_size": 15}, "multiple of 4"),
        ({"num_heads": 3}, "3 heads"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        DiffAE(**SMALL | SMALL_ENCODER | change)


def test_an_image_that_cannot_be_halved():
    with pytest.raises(ValueError, match="15 x 16.*multiples of 2"):
        small().denoise(drawn(1, 1, 15, 16), torch.tensor([1]), drawn(1, 12))


def test_the_encoder_alone():
    encoder = SemanticEncoder(
        image_size=16, in_channels=2, model_channels=8, channel_mult=(1, 2), num_res_blocks=1,
        attention_resolutions=(), num_heads=1, out_channels=5, resblock_updown=True,
    )  # fmt: skip
    assert encoder(drawn(3, 2, 16, 16)).shape == (3, 5)


# ---- the network over codes


def test_every_layer_but_the_first_reads_the_code_again():
    """Written out for two hidden layers, one with and one without the code."""
    network = randomised(
        MLPSkipNet(num_channels=4, num_hid_channels=6, num_layers=3, skip_layers=(2,), num_time_emb_channels=8)
    )
    assert [layer.linear.in_features for layer in network.layers] == [4, 6] and network.out.in_features == 10
    z, t = drawn(2, 4), torch.tensor([0, 640])
    angle = t[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    emb = network.time2(F.silu(network.time1(torch.cat([angle.cos(), angle.sin()], dim=1))))
    h = z
    for layer in network.layers:
        h = F.silu(layer.norm(layer.linear(h) * (1 + layer.time(F.silu(emb)))))
    torch.testing.assert_close(network(z, t), network.out(torch.cat([h, z], dim=1)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("layers", "skips"), [(1, ()), (3, (0,)), (3, (3,))])
def test_layers_that_a_latent_network_cannot_have(layers, skips):
    with pytest.raises(ValueError, match="layers"):
        MLPSkipNet(num_channels=4, num_hid_channels=6, num_layers=layers, skip_layers=skips)


def test_norm_groups_of_a_narrow_network():
    """Of one channel each, groups hide from the code how bright a slice is; fewer show it; the weights are the same."""
    flat = torch.stack([torch.full((1, 16, 16), value) for value in (-0.5, 0.5)])
    alone, grouped = small(norm_groups=32), small(norm_groups=2)
    grouped.load_state_dict(alone.state_dict())
    apart = [(codes[0] - codes[1]).abs().mean().item() for codes in (m.encode(flat) for m in (alone, grouped))]
    assert apart[1] > 10 * apart[0]
    assert {m.num_groups for m in grouped.modules() if isinstance(m, torch.nn.GroupNorm)} == {2}
    by_default = [m for m in small().modules() if isinstance(m, torch.nn.GroupNorm)]
    assert all(m.num_groups == min(32, m.num_channels) for m in by_default)
