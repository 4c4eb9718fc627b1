"""The networks of LDAE. "fact N" is an acceptance fact of the specification."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.blocks3d import sinusoidal_embedding
from common.cli import UserError
from ldae import upstream
from ldae.autoencoder import AutoencoderKL, PatchDiscriminator
from ldae.encoder import (
    CONVNEXT,
    DROP_PATH,
    Block,
    ConvNeXt,
    SemanticEncoder,
    SliceClassifier,
    SliceRegressor,
    axial_slices,
    grey_stem,
    load_backbone,
    to_slices,
)
from ldae.unet import Attention, ResidualBlock, ShiftUNet, Stage, UNet

AEKL = dict(in_channels=1, out_channels=1, channels=(64, 128, 128, 128), latent_channels=3, num_res_blocks=2,
            norm_groups=32)  # fmt: skip
SMALL_AEKL = AEKL | dict(channels=(4, 8), latent_channels=3, num_res_blocks=(1, 2), norm_groups=2)
UNET = dict(in_channels=3, base_channels=256, channel_mult=(1, 2, 3), num_res_blocks=2, attention_resolutions=(2, 4),
            num_heads=1, head_channels=-1, new_attention_order=False, dropout=0.1, isotropic=False)  # fmt: skip
SMALL_UNET = UNET | dict(
    base_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), dropout=0.0
)
ENCODER = dict(
    stages=CONVNEXT["convnext_small"], embed_dim=768, num_heads=8, max_slices=128, dropout=0.1, drop_path=0.4
)
SMALL_ENCODER = dict(stages=((8, 1), (16, 2)), embed_dim=16, num_heads=4, max_slices=12, dropout=0.1, drop_path=0.3)


def count(module, trainable=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def on_meta(kind, *args, **settings):
    with torch.device("meta"):
        return kind(*args, **settings)


@torch.no_grad()
def fill_by_chance(model, seed=0):
    """Nothing stays at the zeros of the initialisation; eval mode."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return model.eval()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys() and first
    for name, value in first.items():
        assert torch.allclose(value, second[name], **tolerance), name


# ---------------------------------------------------------------------------------------------------------- autoencoder


def test_fact_1_autoencoder_and_discriminator():
    aekl, disc = on_meta(AutoencoderKL, **AEKL), on_meta(PatchDiscriminator, in_channels=1, channels=64, layers=3)
    assert count(aekl) == 13_766_248
    assert (count(aekl.encoder), count(aekl.decoder)) == (6_551_235, 7_214_977)
    assert [count(conv) for conv in (aekl.mean, aekl.logvar, aekl.latent)] == [12, 12, 12]
    assert count(disc) == 11_048_769


def test_layers_of_the_paper_s_autoencoder():
    """The table of the specification, 4.1."""
    aekl = on_meta(AutoencoderKL, **AEKL)

    def layers(half):
        return [count(m) for m in (half.conv_in, *half.blocks, half.norm_out, half.conv_out)]

    wide = 885_504
    assert layers(aekl.encoder) == [1_792, 221_568, 221_568, 110_656, 672_512, wide, 442_496, wide, wide, 442_496, wide,
                                    wide, 256, 10_371]  # fmt: skip
    assert layers(aekl.decoder) == [10_496, wide, wide, 442_496, wide, wide, 442_496, wide, wide, 442_496, 340_544,
                                    221_568, 128, 1_729]  # fmt: skip


def test_fact_2_shapes_and_bounds_of_the_autoencoder():
    aekl = on_meta(AutoencoderKL, **AEKL)
    mu, logvar = aekl.encode(torch.empty(1, 1, 128, 160, 128, device="meta"))
    assert mu.shape == logvar.shape == (1, 3, 16, 20, 16)
    assert aekl.decode(mu).shape == (1, 1, 128, 160, 128)
    assert aekl.compression == 8 and aekl.latent_channels == 3
    small = fill_by_chance(AutoencoderKL(**SMALL_AEKL))
    small.logvar.weight.data.mul_(1e6)
    _, logvar = small.encode(torch.randn(2, 1, 8, 8, 8))
    assert (logvar.min(), logvar.max()) == (-30, 20)


def test_fact_3_logit_map():
    disc = on_meta(PatchDiscriminator, in_channels=1, channels=64, layers=3)
    assert disc(torch.empty(1, 1, 128, 160, 128, device="meta")).shape == (1, 1, 14, 18, 14)


def test_same_as_monai():
    monai = pytest.importorskip("monai.networks.nets")
    settings = AEKL | dict(channels=(8, 8, 16), num_res_blocks=(1, 2, 1), norm_groups=4)
    ours = fill_by_chance(AutoencoderKL(**settings))
    theirs = monai.AutoencoderKL(
        spatial_dims=3, in_channels=1, out_channels=1, channels=settings["channels"], norm_num_groups=4,
        num_res_blocks=settings["num_res_blocks"], latent_channels=3, attention_levels=(False,) * 3,
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
    ).eval()  # fmt: skip
    theirs.load_state_dict(upstream.rename_upsampling(upstream.to_upstream(ours), "core"))
    x = torch.randn(2, 1, 8, 12, 8)
    mu, sigma = theirs.encode(x)
    mine, logvar = ours.encode(x)
    assert torch.allclose(mine, mu, atol=1e-5) and torch.allclose((0.5 * logvar).exp(), sigma, rtol=1e-5)
    assert torch.allclose(ours.decode(mu), theirs.decode(mu), atol=1e-4)


def test_sampled_latents_and_odd_sizes():
    aekl = fill_by_chance(AutoencoderKL(**SMALL_AEKL))
    mu, logvar = torch.randn(1, 3, 2, 2, 2), torch.full((1, 3, 2, 2, 2), 2 * math.log(3.0))
    eps = torch.randn(mu.shape)
    assert torch.allclose(aekl.sample(mu, logvar, eps), mu + 3 * eps)
    x = torch.randn(1, 1, 9, 12, 7)
    x_hat, mu, _ = aekl(x, torch.zeros(1, 3, 4, 6, 3))
    assert x_hat.shape == (1, 1, 8, 12, 6)  # rounded down
    assert torch.equal(x_hat, aekl.decode(mu))


def test_the_linear_image_adds_what_is_linear_in_the_code():
    """linear_image: 0 at the start, then an image of its own for every entry of the code, wherever z_t is noisy."""
    torch.manual_seed(0)
    C, size = SMALL_UNET["in_channels"], (4, 8, 8)
    decoder = ShiftUNet(UNet(**SMALL_UNET), 3, image_size=size)
    y, z_t, t = torch.randn(2, 3), torch.randn(2, C, *size), torch.tensor([9, 700])
    assert not decoder(z_t, t, y)[1].any()  # as without
    images = torch.randn(3, C, *size)
    decoder.estimator.image.weight.data = images.flatten(1).T.contiguous()
    assert torch.allclose(decoder(z_t, t, y)[1], torch.einsum("bk,kcdhw->bcdhw", y, images), atol=1e-5)
    with pytest.raises(RuntimeError):  # images of one size only
        decoder(torch.randn(2, C, 8, 8, 8), t, y)


def test_widths_and_norm_groups_must_fit():
    with pytest.raises(ValueError, match="width 12 is no multiple of its 8 norm groups"):
        AutoencoderKL(**AEKL | dict(channels=(8, 12), norm_groups=8))
    with pytest.raises(ValueError, match="width 48 is no multiple of 32"):
        UNet(**SMALL_UNET | dict(base_channels=48))
    narrow = ShiftUNet(UNet(**SMALL_UNET | dict(base_channels=48, norm_groups=6)), 16)
    groups = {module.num_groups for module in narrow.modules() if isinstance(module, torch.nn.GroupNorm)}
    assert groups == {6}  # the estimator's half too
    assert upstream.unet_settings(narrow.prior)["norm_groups"] == 6


@pytest.mark.parametrize("kind", ["autoencoder", "unet", "estimator", "encoder"])
def test_checkpointing_changes_no_gradient(kind):
    results = []
    for on in (False, True):
        torch.manual_seed(0)
        if kind == "autoencoder":
            model = fill_by_chance(AutoencoderKL(**SMALL_AEKL, checkpointing=on))
            out = model(torch.randn(1, 1, 8, 8, 8), torch.randn(1, 3, 4, 4, 4))[0]
        elif kind == "encoder":  # a part of the slices at a time
            model = fill_by_chance(SemanticEncoder(**SMALL_ENCODER, slice_batch=3 if on else None))
            out = model(torch.randn(2, 1, 10, 16, 16))
        else:
            model = fill_by_chance(UNet(**SMALL_UNET, checkpointing=on and kind == "unet"))
            if kind == "estimator":
                model = fill_by_chance(ShiftUNet(model, 6, checkpointing=on), seed=1)
            inputs = [torch.randn(2, 3, 3, 4, 4), torch.tensor([3, 900])]
            out = model(*inputs, torch.randn(2, 6))[1] if kind == "estimator" else model(*inputs)
        results.append(gradients(model, (out * torch.randn(out.shape)).mean()))
    assert_same(*results, atol=1e-6, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------- the denoisers


def test_fact_1_prior_and_decoder():
    prior = on_meta(UNet, **UNET)
    assert count(prior) == 486_927_363
    decoder = on_meta(ShiftUNet, prior, 768)
    assert count(decoder) == 865_339_142
    assert count(decoder, trainable=True) == count(decoder.estimator) == 378_411_779
    estimator = decoder.estimator
    groups = (estimator.label_emb, estimator.shift_middle_block, estimator.shift_output_blocks, estimator.shift_out)
    assert [count(group) for group in groups] == [787_456, 72_371_712, 305_231_360, 21_251]


def test_blocks_of_the_paper_s_prior():
    """The table of the specification, 4.3."""
    prior = on_meta(UNet, **UNET)
    assert count(prior.time1) + count(prior.time2) == 1_312_768
    assert [count(stage) for stage in (prior.conv_in, *prior.input_stages)] == [
        20_992, 4_065_280, 4_065_280, 4_065_280, 12_852_224, 16_260_096, 15_208_448, 30_878_464, 35_793_408
    ]  # fmt: skip
    assert count(prior.middle) == 69_222_912
    assert [count(stage) for stage in prior.output_stages] == [
        52_900_608, 52_900_608, 80_824_576, 27_534_336, 23_863_808, 35_401_728, 7_802_112, 5_966_592, 5_966_592
    ]  # fmt: skip
    assert count(prior.out) == 21_251


@pytest.mark.parametrize("isotropic", [False, True])
def test_which_axes_are_resampled(isotropic):
    prior = on_meta(UNet, **UNET | dict(isotropic=isotropic))
    skips, _ = prior.contract(torch.empty(1, 3, 16, 20, 16, device="meta"), torch.zeros(1, device="meta"))
    sizes = [tuple(skip.shape[2:]) for skip in skips]
    first = (8, 4) if isotropic else (16, 16)
    assert sizes == [(16, 20, 16)] * 3 + [(first[0], 10, 8)] * 3 + [(first[1], 5, 4)] * 3
    assert prior(torch.empty(2, 3, 16, 20, 16, device="meta"), torch.zeros(2, device="meta")).shape == (
        2,
        3,
        16,
        20,
        16,
    )


def test_isotropic_by_rule_and_sizes_that_do_not_divide():
    flat, cubic = UNet(**SMALL_UNET), UNet(**SMALL_UNET | dict(isotropic=True))
    assert count(flat) == count(cubic)
    t = torch.tensor([5])
    assert flat(torch.randn(1, 3, 5, 4, 6), t).shape == (1, 3, 5, 4, 6)  # the first axis is free
    with pytest.raises(ValueError, match="latent of 5 x 4 x 6: this U-Net needs multiples of 2 x 2 x 2"):
        cubic(torch.randn(1, 3, 5, 4, 6), t)
    with pytest.raises(ValueError, match="latent of 5 x 5 x 6: this U-Net needs multiples of 1 x 2 x 2"):
        flat(torch.randn(1, 3, 5, 5, 6), t)
    with pytest.raises(ValueError, match="multiples of 4 x 4 x 4"):
        on_meta(UNet, **UNET | dict(isotropic=True)).check_size((8, 10, 8))


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_attention_by_its_formula(new_order, heads):
    """softmax(q k / sqrt(c)) v with 1/c^(1/4) on each of q and k, in both orders of heads and q, k, v."""
    attention = fill_by_chance(Attention(32, heads, new_order))
    x = torch.randn(2, 32, 2, 3, 2)
    qkv = attention.qkv(attention.norm(x).flatten(2))  # (2, 96, 12)
    c, mixed = 32 // heads, []
    for head in range(heads):
        if new_order:
            q, k, v = (qkv[:, part * 32 + head * c :][:, :c] for part in range(3))
        else:
            q, k, v = (qkv[:, head * 3 * c + part * c :][:, :c] for part in range(3))
        weights = torch.einsum("bct,bcs->bts", q * c**-0.25, k * c**-0.25).softmax(-1)
        mixed.append(torch.einsum("bts,bcs->bct", weights, v))
    expected = x + attention.proj(torch.cat(mixed, dim=1)).view(x.shape)
    assert torch.allclose(attention(x), expected, atol=1e-4)


def test_attention_levels_and_heads():
    model = on_meta(UNet, **SMALL_UNET | dict(attention_resolutions=(1,), head_channels=16))
    attended = [any(isinstance(layer, Attention) for layer in stage) for stage in model.input_stages]
    assert attended == [True, False, False]
    assert [layer.heads for layer in model.modules() if isinstance(layer, Attention)] == [2, 4, 2, 2]
    for options in ({"num_heads": 5}, {"head_channels": 24}, {"head_channels": 128}):
        with pytest.raises(ValueError, match="cannot be split"):
            on_meta(UNet, **SMALL_UNET | options)


def test_modulation_by_time_and_code():
    """(1 + s_y) [norm(h) (1 + s_t) + b_t] + b_y, and nothing of y without a code."""
    block = fill_by_chance(ResidualBlock(32, 64, 8, 0.0, code_dim=8))
    x, emb, code = torch.randn(2, 32, 2, 3, 2), torch.randn(2, 8), torch.randn(2, 8)
    h = block.conv1(F.silu(block.norm1(x)))
    s_t, b_t = block.time(F.silu(emb))[..., None, None, None].chunk(2, 1)
    s_y, b_y = block.code(F.silu(code))[..., None, None, None].chunk(2, 1)
    h = (1 + s_y) * (block.norm2(h) * (1 + s_t) + b_t) + b_y
    assert torch.allclose(block(x, emb, code), block.skip(x) + block.conv2(F.silu(h)), atol=1e-4)
    assert ResidualBlock(32, 64, 8, 0.0).code is None


def test_time_enters_as_cosines_and_sines():
    model = fill_by_chance(UNet(**SMALL_UNET))
    z, seen = torch.randn(2, 3, 2, 4, 4), []
    model.time1.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    a, b = model(z, torch.tensor([7, 953])), model(z, torch.tensor([7, 954]))
    assert torch.equal(seen[0], sinusoidal_embedding(torch.tensor([7, 953]), 32, cos_first=True))
    assert seen[0][0, 0] == pytest.approx(math.cos(7)) and seen[0][0, 16] == pytest.approx(math.sin(7))
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


def test_fact_6_zero_at_the_start():
    prior = UNet(**SMALL_UNET)
    z, t = torch.randn(2, 3, 4, 4, 6), torch.tensor([0, 999])
    assert torch.equal(prior(z, t), torch.zeros_like(z))
    eps, G = ShiftUNet(fill_by_chance(prior), 6)(z, t, torch.randn(2, 6))
    assert torch.equal(G, torch.zeros_like(z)) and eps.abs().min() > 0


def test_fact_7_frozen_prior():
    """After steps the prior is bit-identical, has no gradient and no dropout, and all of the estimator moved."""
    prior = UNet(**SMALL_UNET | dict(dropout=0.5))
    fill_by_chance(prior)
    decoder = ShiftUNet(prior, 6)
    before = {key: value.clone() for key, value in decoder.state_dict().items()}
    assert decoder.train().training and not any(m.training for m in decoder.prior.modules())
    z, t, y = torch.randn(2, 3, 4, 4, 6), torch.tensor([40, 700]), torch.randn(2, 6, requires_grad=True)
    optimizer = torch.optim.Adam(decoder.estimator.parameters(), lr=1e-2)
    for _ in range(6):  # what stands before a convolution of zeros moves later
        eps, G = decoder(z, t, y)
        assert not eps.requires_grad and torch.equal(eps, prior(z, t))
        optimizer.zero_grad()
        (1 - eps + 0.5 * G).square().mean().backward()
        optimizer.step()
    assert all(p.grad is None for p in prior.parameters())
    assert all(p.grad is not None for p in decoder.estimator.parameters())
    assert y.grad.abs().max() > 0  # what trains the encoder
    for key, value in decoder.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("prior."), key


def test_the_contracting_half_runs_once():
    decoder, calls = ShiftUNet(UNet(**SMALL_UNET), 6), []
    decoder.prior.conv_in.register_forward_hook(lambda *args: calls.append(1))
    decoder(torch.randn(1, 3, 2, 4, 4), torch.tensor([1]), torch.randn(1, 6))
    assert len(calls) == 1


def test_checkpointed_stages_are_recomputed():
    model = UNet(**SMALL_UNET, checkpointing=True)
    stages = [m for m in model.modules() if isinstance(m, Stage)]
    assert len(stages) == 3 + 1 + 4 and all(stage.checkpointing for stage in stages)
    calls = []
    model.middle[0].register_forward_hook(lambda *args: calls.append(1))
    model(torch.randn(1, 3, 2, 4, 4), torch.tensor([1])).sum().backward()
    assert len(calls) == 2


@pytest.mark.slow
def test_paper_size_decoder_runs_on_cpu():
    """865 million parameters, both decoders on a latent of the paper's size."""
    decoder = on_meta(ShiftUNet, on_meta(UNet, **UNET), 768).to_empty(device="cpu")
    with torch.no_grad():
        for p in decoder.parameters():
            p.fill_(1e-3)
        eps, G = decoder(torch.randn(1, 3, 16, 20, 16), torch.tensor([500]), torch.randn(1, 768))
    assert eps.shape == G.shape == (1, 3, 16, 20, 16)
    assert torch.isfinite(eps).all() and torch.isfinite(G).all()


# ---------------------------------------------------------------------------------------------------------- the encoder


def test_fact_1_encoder_and_baselines():
    encoder = on_meta(SemanticEncoder, **ENCODER)
    assert count(encoder) == 53_588_065
    assert count(encoder.backbone) == 49_451_616
    assert count(encoder.attention) == 2_362_368 and count(encoder.soft_attention) == 769
    assert (count(encoder.query), count(encoder.key), count(encoder.value)) == (590_592,) * 3
    assert count(SliceClassifier(encoder, 2)) == 53_589_603
    assert count(SliceRegressor(encoder)) == 53_588_834


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("convnext_tiny", 28_589_128),
        ("convnext_small", 50_223_688),
        ("convnext_base", 88_591_464),
        ("convnext_large", 197_767_336),
    ],
)
def test_parameters_of_torchvision_s_convnexts(name, published):
    """Its counts are with three input channels and 1000 classes."""
    widths, depths = zip(*CONVNEXT[name], strict=True)
    backbone = on_meta(ConvNeXt, depths, widths, in_channels=3, drop_path=DROP_PATH[name])
    assert count(backbone) + 1000 * (widths[-1] + 1) == published
    rates = [block.drop_path for block in backbone.modules() if isinstance(block, Block)]
    assert len(rates) == sum(depths) and rates[0] == 0 and rates[-1] == DROP_PATH[name]
    assert rates == sorted(rates)


def test_convnext_names_are_torchvision_s():
    names = on_meta(ConvNeXt, (3, 3, 27, 3), (96, 192, 384, 768), in_channels=3, drop_path=0.0).state_dict()
    assert len(names) == 344 - 2  # torchvision's file has the linear layer too
    for name, shape in (
        ("features.0.0.weight", (96, 3, 4, 4)),
        ("features.0.1.bias", (96,)),
        ("features.1.2.layer_scale", (96, 1, 1)),
        ("features.2.0.weight", (96,)),
        ("features.2.1.weight", (192, 96, 2, 2)),
        ("features.5.26.block.0.weight", (384, 1, 7, 7)),
        ("features.5.26.block.2.weight", (384,)),
        ("features.5.26.block.3.weight", (1536, 384)),
        ("features.7.2.block.5.bias", (768,)),
        ("classifier.0.weight", (768,)),
    ):
        assert names[name].shape == shape, name


def test_stochastic_depth_keeps_the_mean():
    block = Block(8, 0.5, 1.0).train()
    x = torch.randn(1, 8, 4, 4).expand(4000, -1, -1, -1)
    branch = (block(x) - x).flatten(1).norm(dim=1)
    kept = branch > 0
    assert 0.45 < kept.float().mean() < 0.55
    whole = (block.eval()(x[:1]) - x[:1]).norm()
    assert torch.allclose(branch[kept], 2 * whole, rtol=1e-4)


def test_slices_of_three_planes():
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 1, 3, 4, 5)
    assert torch.equal(axial_slices(x)[:, :, 3], x[..., 3])  # (D, H) at one height
    assert torch.equal(to_slices(x, "coronal")[:, :, 2], x[:, :, :, 2])
    assert torch.equal(to_slices(x, "sagittal"), x)
    assert to_slices(torch.empty(1, 1, 128, 160, 128, device="meta"), "axial").shape == (1, 1, 128, 128, 160)
    with pytest.raises(UserError, match="axial, coronal, sagittal"):
        to_slices(x, "oblique")


def test_code_and_attention_over_slices():
    encoder = SemanticEncoder(**SMALL_ENCODER).eval()
    slices = torch.randn(3, 1, 10, 16, 24)
    y, weights = encoder(slices, return_attention=True)
    assert y.shape == (3, 16) and weights.shape == (3, 10)
    assert torch.allclose(weights.sum(1), torch.ones(3)) and (weights > 0).all()
    assert torch.equal(encoder(slices), y)
    assert torch.allclose(y.mean(1), torch.zeros(3), atol=1e-5)  # layer norm at its start
    assert torch.allclose(y.std(1, correction=0), torch.ones(3), atol=1e-2)
    assert torch.allclose(encoder(slices[1:2]), y[1:2], atol=1e-5)  # nothing of another sample


def test_the_order_of_slices_matters_and_their_number_is_bounded():
    encoder = fill_by_chance(SemanticEncoder(**SMALL_ENCODER))
    slices = torch.randn(1, 1, 12, 16, 16)
    assert not torch.allclose(encoder(slices), encoder(slices.flip(2)), atol=1e-3)
    with pytest.raises(ValueError, match="13 slices: this encoder takes at most 12"):
        encoder(torch.randn(1, 1, 13, 16, 16))
    with pytest.raises(ValueError, match="code of 20 numbers"):
        SemanticEncoder(**SMALL_ENCODER | dict(embed_dim=20))


def test_encoder_by_its_formula():
    """Position code, soft attention as query, projections twice (4.5 of the specification)."""
    encoder = fill_by_chance(SemanticEncoder(**SMALL_ENCODER))
    slices = torch.randn(2, 1, 7, 16, 16)
    x = torch.stack([encoder.backbone(slices[:, :, i]) for i in range(7)], dim=1)
    position, k = torch.arange(7.0)[:, None], torch.arange(8)
    angle = position / 10000 ** (2 * k / 16)
    x[..., 0::2] += angle.sin()
    x[..., 1::2] += angle.cos()
    weights = (x @ encoder.soft_attention.linear.weight[0] + encoder.soft_attention.linear.bias).softmax(1)
    g = (weights[..., None] * x).sum(1, keepdim=True)
    w, b = encoder.attention.in_proj_weight.chunk(3), encoder.attention.in_proj_bias.chunk(3)
    projected = (encoder.query(g), encoder.key(x), encoder.value(x))
    q, k, v = (F.linear(p, *wb).unflatten(2, (4, 4)).transpose(1, 2) for p, *wb in zip(projected, w, b, strict=True))
    mixed = (q @ k.transpose(2, 3) / 2).softmax(-1) @ v  # (2, 4 heads, 1, 4)
    y = encoder.norm(encoder.attention.out_proj(mixed.transpose(1, 2).flatten(1)))
    assert torch.allclose(encoder(slices), y, atol=1e-4)


def test_slices_in_parts_bound_the_memory():
    """The backbone never sees more than slice_batch images, and in training keeps no activations of them."""
    sizes = []
    encoder = SemanticEncoder(**SMALL_ENCODER, slice_batch=4).train()
    encoder.backbone.features[0].register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    encoder(torch.randn(2, 1, 5, 16, 16)).sum().backward()
    assert sorted(sizes) == [2, 2, 4, 4, 4, 4]  # twice: recomputed in the backward pass

    def kept(model):
        total = 0

        def pack(x):
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(torch.randn(1, 1, 12, 32, 32))
        return total

    assert kept(encoder) < 0.3 * kept(SemanticEncoder(**SMALL_ENCODER).train())


def test_classifier_and_regressor():
    encoder = SemanticEncoder(**SMALL_ENCODER).eval()
    slices = torch.randn(2, 1, 5, 16, 16)
    for model, outputs in ((SliceClassifier(encoder, 3), 3), (SliceRegressor(encoder), 1)):
        out, weights = model(slices, return_attention=True)
        assert out.shape == (2, outputs) and weights.shape == (2, 5)
        assert torch.equal(out, model.head(encoder(slices))) and torch.equal(model(slices), out)


# ------------------------------------------------------------------------------------------------ weights of a backbone


def torchvision_file(path, stages=SMALL_ENCODER["stages"], classes=7, in_channels=3):
    """A ConvNeXt's weights as torchvision writes them: three input channels and a linear layer."""
    widths, depths = zip(*stages, strict=True)
    backbone = fill_by_chance(ConvNeXt(depths, widths, in_channels=in_channels, drop_path=0.0))
    linear = {"classifier.2.weight": torch.zeros(classes, widths[-1]), "classifier.2.bias": torch.zeros(classes)}
    torch.save(backbone.state_dict() | linear, path)
    return backbone


def test_imagenet_weights_on_grey_slices(tmp_path):
    """A grey image is the same as three equal channels."""
    rgb = torchvision_file(tmp_path / "convnext.pth")
    encoder = SemanticEncoder(**SMALL_ENCODER).eval()
    load_backbone(encoder, tmp_path / "convnext.pth")
    grey = torch.randn(2, 1, 16, 16)
    assert torch.allclose(encoder.backbone(grey), rgb(grey.expand(-1, 3, -1, -1)), atol=1e-4)
    assert grey_stem(rgb.features[0][0].weight).shape == (8, 1, 4, 4)


def test_other_backbones_are_refused(tmp_path):
    encoder = SemanticEncoder(**SMALL_ENCODER)
    before = encoder.backbone.features[0][0].weight.clone()
    cases = itertools.zip_longest(
        [((8, 1), (16, 1)), ((8, 1), (16, 3)), ((8, 1), (24, 2))],
        ["no fitting features.3.1", "unexpected features.3.2", "no fitting features.2.1"],
    )
    for stages, message in cases:
        torchvision_file(tmp_path / "other.pth", stages)
        with pytest.raises(UserError, match=message):
            load_backbone(encoder, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not exist"):
        load_backbone(encoder, tmp_path / "absent.pth")
    assert torch.equal(encoder.backbone.features[0][0].weight, before)


def test_discriminator_starts_as_published_and_counts_all_ranks():
    disc = PatchDiscriminator(in_channels=1, channels=32, layers=3)
    weights = [m.weight.flatten() for m in disc.modules() if isinstance(m, nn.Conv3d)]
    assert torch.cat(weights).std().item() == pytest.approx(0.02, rel=0.02)
    scales = torch.cat([norm.weight for norm in disc.norms])
    assert scales.mean().item() == pytest.approx(1, abs=0.01) and scales.std().item() == pytest.approx(0.02, rel=0.2)
    from common.blocks3d import SyncBatchNorm3d

    assert all(isinstance(norm, SyncBatchNorm3d) for norm in disc.norms)
