"""The autoencoder, its losses and the diffusion transformer. "fact N" is an acceptance fact of the specification."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import schedulers
from common.blocks3d import sinusoidal_embedding
from common.cli import UserError
from common.ema import EMA
from common.lpips import LPIPS
from neuroldm3d import upstream
from neuroldm3d.diffusion import model as dit_module
from neuroldm3d.diffusion.model import (
    SIZES,
    Attention,
    Block,
    DiT3D,
    drop_labels,
    merge_windows,
    rotary_angles,
    rotate,
    sincos_positions,
    split_windows,
    unpatchify,
)
from neuroldm3d.VAE import losses
from neuroldm3d.VAE.losses import LPIPS3D, kl_divergence
from neuroldm3d.VAE.model import LOGVAR_RANGE, AutoencoderKL

VAE = dict(channels=(32, 64, 128), num_res_blocks=(1, 1, 1), latent_channels=4, norm_groups=16)
SMALL_VAE = dict(channels=(4, 8), num_res_blocks=(1, 2), latent_channels=3, norm_groups=2)
DIT = dict(
    in_channels=4, mlp_ratio=4.0, num_classes=2, label_dropout=0.1, window_size=0, window_blocks=(), positions="sincos"
)
SMALL = DIT | dict(in_size=(8, 10, 6), patch_size=(4, 2, 2), hidden_size=48, depth=3, num_heads=4)
S4 = DIT | SIZES["DiT-S/4"] | dict(in_size=(28, 34, 28))


def count(module, trainable=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def on_meta(kind, **settings):
    with torch.device("meta"):
        return kind(**settings)


@torch.no_grad()
def fill_by_sine(model):
    """The rule of the specification, appendix A."""
    norms = (nn.GroupNorm,)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if not p.requires_grad:
                continue
            i = torch.arange(1, p.numel() + 1, dtype=torch.float64).view(p.shape)
            if p.ndim >= 2:
                p.copy_(0.02 * i.sin())
            elif isinstance(module, norms) and name == "weight":
                p.copy_(1 + 0.1 * i.cos())
            else:
                p.copy_(0.01 * i.cos())
    return model


@torch.no_grad()
def fill_by_chance(model, seed=0):
    """Nothing stays at the zeros of the initialisation."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return model.eval()


def wave(*shape):
    return (0.01 * torch.arange(math.prod(shape), dtype=torch.float64)).sin().float().view(shape)


# ------------------------------------------------------------------------------------------------------------------ VAE


def test_fact_11_parameters_and_latent_of_the_published_vae():
    vae = on_meta(AutoencoderKL, **VAE)
    assert count(vae) == 2_929_037
    assert (count(vae.encoder), count(vae.decoder)) == (1_049_636, 1_879_361)
    mu, logvar = vae.encode(torch.empty(1, 1, 112, 136, 112, device="meta"))
    assert mu.shape == logvar.shape == (1, 4, 28, 34, 28)
    assert vae.decode(mu).shape == (1, 1, 112, 136, 112)
    assert vae.compression == 4 and vae.latent_channels == 4


def test_layers_of_the_published_vae():
    vae = on_meta(AutoencoderKL, **VAE)

    def layers(half):
        return [count(m) for m in (half.conv_in, *half.blocks, half.norm_out, half.conv_out)]

    assert layers(vae.encoder) == [896, 55_488, 27_680, 168_320, 110_656, 672_512, 256, 13_828]
    assert layers(vae.decoder) == [13_952, 885_504, 442_496, 340_544, 110_656, 85_280, 64, 865]
    assert [count(vae.mean), count(vae.logvar)] == [20, 20]


@pytest.mark.parametrize("settings", [VAE, SMALL_VAE])
def test_fact_12_same_as_monai(settings):
    """Mean, sigma and reconstruction of MONAI's AutoencoderKL with the same weights: the same to the last bit."""
    from monai.networks.nets import AutoencoderKL as Monai

    ours = fill_by_chance(AutoencoderKL(**settings))
    theirs = Monai(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        channels=settings["channels"],
        num_res_blocks=settings["num_res_blocks"],
        attention_levels=[False] * len(settings["channels"]),
        latent_channels=settings["latent_channels"],
        norm_num_groups=settings["norm_groups"],
        norm_eps=1e-5,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    ).eval()
    names = {"conv_mean": "quant_conv_mu.conv", "conv_var": "quant_conv_log_sigma.conv"}
    state = {}
    for key, value in upstream.to_upstream(ours).items():
        module, _, rest = key.partition(".")
        state[f"{names.get(module, module)}.{rest}"] = value
    identity = torch.eye(settings["latent_channels"]).reshape(theirs.post_quant_conv.conv.weight.shape)
    state |= {"post_quant_conv.conv.weight": identity, "post_quant_conv.conv.bias": torch.zeros(len(identity))}
    theirs.load_state_dict(state)
    x = torch.randn(1, 1, 16, 24, 20)
    with torch.no_grad():
        mu, logvar = ours.encode(x)
        mu_theirs, sigma_theirs = theirs.encode(x)
        assert torch.equal(mu, mu_theirs)
        assert torch.equal((0.5 * logvar).exp(), sigma_theirs)
        assert torch.equal(ours.decode(mu), theirs.decode(mu))


def test_fact_13_kl():
    ones, zeros = torch.ones(2, 4, 28, 34, 28), torch.zeros(2, 4, 28, 34, 28)
    assert kl_divergence(ones, zeros).item() == 53_312.0
    assert kl_divergence(zeros, zeros).item() == 0.0
    logvar = torch.full((1, 4, 2, 2, 2), 0.7)
    expected = 32 * 0.5 * (math.exp(0.7) - 1 - 0.7)
    assert kl_divergence(torch.zeros_like(logvar), logvar).item() == pytest.approx(expected, rel=1e-6)


def test_fact_14_published_values_of_the_vae():
    vae = fill_by_sine(AutoencoderKL(**VAE)).eval()
    with torch.no_grad():
        mu, logvar = vae.encode(wave(1, 1, 32, 40, 32))
        x_hat = vae.decode(mu)[0, 0]
    near = partial(pytest.approx, abs=1e-4)
    assert torch.equal(mu, logvar)  # same fill
    assert (mu.mean().item(), mu.std().item()) == near((-0.003746, 0.005866))
    assert (mu[0, 0, 0, 0, 0].item(), mu[0, 3, 7, 9, 7].item()) == near((0.006466, -0.005546))
    assert (x_hat.mean().item(), x_hat.std().item()) == near((0.013038, 0.166059))
    assert [x_hat[i].item() for i in ((0, 0, 0), (31, 39, 31), (16, 20, 16))] == near([0.089143, 0.007175, -0.168936])
    assert kl_divergence(mu, logvar).item() == near(0.09293)


def test_odd_axes_come_back_rounded_down():
    vae = AutoencoderKL(**VAE | dict(channels=(4, 4, 4), norm_groups=2))
    x_hat, mu, _ = vae(torch.randn(1, 1, 34, 38, 33), torch.zeros(1, 4, 8, 9, 8))
    assert mu.shape == (1, 4, 8, 9, 8) and x_hat.shape == (1, 1, 32, 36, 32)


def test_latent_is_mean_plus_sigma_eps_and_its_variance_stays_finite():
    vae = fill_by_chance(AutoencoderKL(**SMALL_VAE))
    x, eps = torch.randn(2, 1, 8, 6, 10), torch.randn(2, 3, 4, 3, 5)
    x_hat, mu, logvar = vae(x, eps)
    assert torch.equal(x_hat, vae.decode(mu + (logvar / 2).exp() * eps))
    vae.logvar.bias.data.fill_(1e4)
    assert vae.encode(x)[1].max().item() == LOGVAR_RANGE[1]


def test_checkpointing_changes_no_gradient():
    x, eps, gradients = torch.randn(1, 1, 8, 8, 8), torch.randn(1, 3, 4, 4, 4), []
    for checkpointing in (False, True):
        vae = fill_by_chance(AutoencoderKL(**SMALL_VAE, checkpointing=checkpointing))
        vae(x, eps)[0].square().mean().backward()
        gradients.append([p.grad for p in vae.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_reconstruction_loss():
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 2.0])
    assert losses.reconstruction_loss(x, y, "l1").item() == 1.5
    assert losses.reconstruction_loss(x, y, "mse").item() == 4.5


# ---------------------------------------------------------------------------------------------------------------- LPIPS


class Counted(nn.Module):
    """A distance that remembers the slices it saw."""

    def __init__(self):
        super().__init__()
        self.shapes, self.values = [], []

    def forward(self, a, b):
        self.shapes += [tuple(a.shape[1:])] * len(a)
        self.values += a.mean((1, 2, 3)).tolist()
        return (a - b).square().mean((1, 2, 3))


def positive_lpips(net, seed=0):
    """Random weights; heads are positive, as trained ones are."""
    torch.manual_seed(seed)
    return LPIPS(net).eval()


def test_fact_15_all_slices_of_three_axes():
    distance = Counted()
    volume = torch.randn(1, 1, 112, 136, 112)
    got = LPIPS3D(distance)(volume, torch.zeros_like(volume))
    assert len(distance.shapes) == 112 + 136 + 112 == 360
    assert [distance.shapes.count((1, *size)) for size in ((136, 112), (112, 112), (112, 136))] == [112, 136, 112]
    assert got.shape == (1,) and got.item() == pytest.approx(volume.square().mean().item(), rel=1e-5)


def test_fact_15_batched_equals_slice_by_slice():
    """Also the definition: every slice weighs the same, whichever its axis, and each volume has its own distance."""
    lpips = positive_lpips("alex")
    a, b = torch.randn(2, 1, 32, 36, 33), torch.randn(2, 1, 32, 36, 33)
    expected = []
    for x, y in zip(a[:, 0], b[:, 0], strict=True):
        slices = [(x.select(axis, i), y.select(axis, i)) for axis in range(3) for i in range(x.shape[axis])]
        expected.append(torch.stack([lpips(p[None, None], q[None, None])[0] for p, q in slices]).mean().item())
    for slice_batch in (7, 64):
        assert LPIPS3D(lpips, slice_batch=slice_batch)(a, b).tolist() == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_gradient_is_finite_where_activations_vanish():
    lpips = positive_lpips("alex")
    for conv in lpips.features.values():
        conv.bias.data.fill_(-1e3)  # nothing is active
    volume = torch.zeros(1, 1, 32, 32, 32, requires_grad=True)
    LPIPS3D(lpips)(volume, torch.randn(1, 1, 32, 32, 32)).sum().backward()
    assert torch.isfinite(volume.grad).all()


def test_slice_share_is_drawn_by_the_generator_and_unbiased():
    volume = torch.randn(1, 1, 20, 10, 30)
    distance = Counted()
    few = LPIPS3D(distance, slice_fraction=0.3)
    few(volume, torch.zeros_like(volume), torch.Generator().manual_seed(1))
    assert [distance.shapes.count(s) for s in ((1, 10, 30), (1, 20, 30), (1, 20, 10))] == [6, 3, 9]
    assert len(set(distance.values)) == 18  # without replacement
    first = list(distance.values)
    for seed, same in ((1, True), (2, False)):
        distance.values.clear()
        few(volume, torch.zeros_like(volume), torch.Generator().manual_seed(seed))
        assert (distance.values == first) is same
    g = torch.Generator().manual_seed(0)
    draws = torch.cat([few(volume, torch.zeros_like(volume), g) for _ in range(400)])
    assert draws.mean().item() == pytest.approx(volume.square().mean().item(), abs=4 * draws.std().item() / 20)
    with pytest.raises(UserError, match="slice fraction"):
        LPIPS3D(distance, slice_fraction=0.0)


def test_value_range_is_mapped_to_what_lpips_expects():
    lpips = positive_lpips("alex")
    a, b = torch.rand(1, 1, 32, 32, 32), torch.rand(1, 1, 32, 32, 32)
    mapped = LPIPS3D(lpips, value_range=(0.0, 4.0))(4 * a, 4 * b)
    assert torch.allclose(mapped, LPIPS3D(lpips)(2 * a - 1, 2 * b - 1))


def test_lpips_checkpointing_changes_no_gradient():
    lpips, b, gradients = positive_lpips("alex"), torch.randn(1, 1, 32, 32, 32), []
    for checkpointing in (False, True):
        a = wave(1, 1, 32, 32, 32).requires_grad_()
        LPIPS3D(lpips, checkpointing=checkpointing, slice_batch=40)(a, b).sum().backward()
        gradients.append(a.grad)
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)


def write_weights(folder, net):
    """Files as torchvision and the lpips package write them: (LPIPS, backbone, heads, both in one)."""
    lpips = positive_lpips(net, seed=3)
    state = {key: value for key, value in lpips.state_dict().items() if key.startswith("features")}
    backbone = state | {"classifier.1.weight": torch.zeros(3, 3)}
    heads = {f"lin{i}.model.1.weight": head.data for i, head in enumerate(lpips.heads)}
    whole = {f"net.slice1.{key.removeprefix('features.')}": value for key, value in state.items()} | heads
    paths = [folder / f"{net}_{name}.pth" for name in ("backbone", "heads", "whole")]
    for path, content in zip(paths, (backbone, heads, whole), strict=True):
        torch.save(content, path)
    return lpips, *paths


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_weights_from_two_files_or_one(tmp_path, net):
    lpips, backbone, heads, whole = write_weights(tmp_path, net)
    for paths in ([backbone, heads], (str(heads), str(backbone)), whole):
        loaded = LPIPS3D(net, paths).distance
        for key, value in lpips.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key


def test_lpips_files_that_do_not_fit(tmp_path):
    _, backbone, heads, whole = write_weights(tmp_path, "alex")
    for nothing in ((), "", [""]):
        with pytest.raises(UserError, match="--lambda_lpips 0"):
            LPIPS3D("alex", nothing)
    with pytest.raises(UserError, match="absent.pth does not exist"):
        LPIPS3D("alex", [backbone, tmp_path / "absent.pth"])
    with pytest.raises(UserError, match="no head 0 of alex"):
        LPIPS3D("alex", backbone)
    with pytest.raises(UserError, match="no backbone 0.weight of alex"):
        LPIPS3D("alex", heads)
    with pytest.raises(UserError, match="of vgg"):
        LPIPS3D("vgg", whole)


def test_volumes_too_small_for_lpips_are_refused():
    with pytest.raises(UserError, match="32x30x32 is too small"):
        LPIPS3D(positive_lpips("alex"))(torch.zeros(1, 1, 32, 30, 32), torch.zeros(1, 1, 32, 30, 32))
    for net, side in (("alex", 31), ("vgg", 16)):  # the limit is the smallest side that works
        small = torch.randn(1, 1, side, side, side)
        assert torch.isfinite(LPIPS3D(positive_lpips(net))(small, small + 1)).all()


# ------------------------------------------------------------------------------------------------------------------ DiT


def test_fact_18_published_dit():
    dit = DiT3D(**S4)
    assert (count(dit), count(dit, trainable=True)) == (32_881_664, 32_561_792)
    assert dit.grid == (7, 17, 7) and dit.positions.shape == (1, 833, 384)
    assert (dit.null_label, len(dit.label.weight)) == (2, 3)
    z_0, eps = torch.randn(1, 4, 28, 34, 28), torch.randn(1, 4, 28, 34, 28)
    t = torch.tensor([300])
    out = dit(schedulers.q_sample(schedulers.make_schedule("linear", 1000), z_0, t, eps), t, torch.tensor([1]))
    assert not out.any()
    assert F.mse_loss(out, eps).item() == pytest.approx(1.0, abs=0.01)


def test_parts_of_the_published_dit():
    dit = on_meta(DiT3D, **S4)
    assert count(dit.patches) == 49_536
    assert count(dit.time1) + count(dit.time2) == 246_528
    assert count(dit.label) == 1_152
    assert {count(block) for block in dit.blocks} == {2_659_968}
    assert count(dit.modulation_out) + count(dit.linear_out) == 344_960


@pytest.mark.parametrize(
    ("size", "in_size", "total", "trainable"),
    [
        ("DiT-B/4", (28, 32, 28), 130_206_976, 129_905_920),
        ("DiT-XL/2", (28, 34, 28), 677_541_920, 673_703_456),
    ],
)
def test_other_published_sizes(size, in_size, total, trainable):
    dit = on_meta(DiT3D, **DIT | SIZES[size] | dict(in_size=in_size))
    assert (count(dit), count(dit, trainable=True)) == (total, trainable)


def test_every_size_can_be_built():
    assert {f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4)} == SIZES.keys()
    for size in SIZES:
        dit = on_meta(DiT3D, **DIT | SIZES[size] | dict(in_size=(8, 8, 8)))
        x = torch.empty(1, 4, 8, 8, 8, device="meta")
        label = torch.empty(1, dtype=torch.long, device="meta")
        assert dit(x, torch.empty(1, device="meta"), label).shape == x.shape


@pytest.mark.slow
def test_fact_19_published_values_of_the_dit():
    windows = dict(window_size=7, window_blocks=(0, 1, 3, 4, 6, 7, 9, 10), mask_padding=False)
    expected = {
        "global": ({}, [0.001099, 0.085407, -0.242657, 0.242169, 0.012659, -0.063740, 0.179127]),
        "window": (windows, [0.001099, 0.085404, -0.242643, 0.242156, 0.012662, -0.063793, 0.179114]),
    }
    x, t = wave(1, 4, 28, 34, 28), torch.tensor([17])
    for settings, values in expected.values():
        dit = fill_by_sine(DiT3D(**S4 | settings)).eval()
        with torch.no_grad():
            out = dit(x, t, torch.tensor([1]))
            got = [out.mean(), out.std(), out.min(), out.max(), out[0, 0, 0, 0, 0], out[0, 3, 27, 33, 27]]
            assert torch.stack([*got, out[0, 1, 13, 16, 9]]).tolist() == pytest.approx(values, abs=2e-6)
            if not settings:
                for label, largest in ((0, 1.944e-2), (2, 1.828e-2)):
                    difference = (out - dit(x, t, torch.tensor([label]))).abs().max().item()
                    assert difference == pytest.approx(largest, rel=1e-3)


def test_fact_19_positions():
    table = sincos_positions(384, (7, 17, 7))
    assert table.double().sum().item() == pytest.approx(153_195.5, abs=0.05)
    places = [(0, 0, 0), (0, 63, 0), (0, 64, 1), (0, 127, 1)]
    places += [(1, 256, 0.841471), (1, 257, 0.761720), (1, 320, 0.540302)]
    places += [(7, 128, 0.841471), (7, 192, 0.540302), (119, 0, 0.841471), (119, 64, 0.540302)]
    for token, column, value in places:
        assert table[token, column].item() == pytest.approx(value, abs=1e-6), (token, column)
    wave17 = sinusoidal_embedding(torch.tensor([17]), 256, cos_first=True)[0]
    values = [-0.275163, -0.993761, 0.999998, -0.961397, -0.111529, 0.001827]
    assert wave17[[0, 1, 127, 128, 129, 255]].tolist() == pytest.approx(values, abs=2e-6)
    dit = on_meta(DiT3D, **SMALL)  # the table is no weight to train
    assert not dit.positions.requires_grad and "positions" in dit.state_dict()
    assert sincos_positions(1024, (2, 2, 2)).shape == (8, 1024)  # DiT-L: a third of 1024 is no even number


def test_fact_21_unpatchify_is_the_exact_inverse_of_cutting():
    tokens = torch.arange(833.0 * 128).view(1, 833, 128)
    volume = unpatchify(tokens, (7, 17, 7), (4, 2, 4))[0]
    values = {(0, 0, 0, 0): 0, (1, 0, 0, 0): 1, (0, 0, 0, 1): 4, (0, 0, 1, 0): 16, (0, 1, 0, 0): 32}
    values |= {(0, 0, 0, 4): 128, (0, 0, 2, 0): 896, (0, 4, 0, 0): 15_232}
    assert {place: volume[place].item() for place in values} == values

    x, patch = torch.randn(2, 4, 8, 10, 6), (4, 2, 2)
    cut = nn.Conv3d(4, 64, patch, stride=patch, bias=False)  # to tokens in the order of unpatchify
    order = torch.eye(64).view(64, *patch, 4).permute(0, 4, 1, 2, 3)
    cut.weight.data.copy_(order)
    tokens = dit_module.tokens_from_patches(cut(x))
    assert torch.equal(unpatchify(tokens, (2, 5, 3), patch), x)


def test_fact_21_indivisible_size_is_refused_or_padded():
    b4 = DIT | SIZES["DiT-B/4"] | dict(in_size=(28, 34, 28))
    with pytest.raises(UserError, match="28x34x28 does not divide into patches of 4x4x4.*--pad_input"):
        DiT3D(**b4)
    padded = on_meta(DiT3D, **b4, pad_input=True)
    assert padded.grid == (7, 9, 7) and count(padded, trainable=True) == 129_905_920

    settings = SMALL | dict(in_size=(7, 9, 5), patch_size=(4, 2, 2), pad_input=True)
    dit = fill_by_chance(DiT3D(**settings))
    t, label = torch.tensor([5]), torch.tensor([1])
    x = torch.randn(1, 4, 7, 9, 5, requires_grad=True)
    out = dit(x, t, label)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert (x.grad != 0).all()  # every voxel is seen
    even = fill_by_chance(DiT3D(**settings | dict(in_size=(8, 10, 6))))
    whole = even(F.pad(x, (0, 1, 0, 1, 0, 1)), t, label)
    assert torch.equal(whole[:, :, :7, :9, :5], out)  # zeros at the end, cut off again
    with pytest.raises(ValueError, match="built for"):
        dit(torch.randn(1, 4, 8, 10, 6), t, label)


def test_fact_20_window_as_large_as_the_grid_is_global_attention():
    """Token grid 2x5x3. Where padding is masked nothing changes; the original's unmasked padding does change it."""
    x, t, label = torch.randn(2, 4, 8, 10, 6), torch.tensor([3, 640]), torch.tensor([0, 2])
    for relative in (False, True):
        whole = fill_by_chance(DiT3D(**SMALL, relative_positions=relative))
        expected = whole(x, t, label)
        for window in (5, 6):
            settings = SMALL | dict(window_size=window, window_blocks=(0, 1, 2), relative_positions=relative)
            masked, unmasked = DiT3D(**settings), DiT3D(**settings, mask_padding=False)
            for dit in (masked, unmasked):
                dit.load_state_dict(whole.state_dict() | window_tables(whole, window))
            assert (masked(x, t, label) - expected).abs().max().item() <= 1e-5 * expected.abs().max().item()
            assert (unmasked(x, t, label) - expected).abs().max().item() > 1e-3


def window_tables(model, window):
    """Relative-position tables of a grid, in the middle of those of a larger window."""
    tables = {}
    for key, table in model.state_dict().items():
        if ".relative." in key:
            add = window - (len(table) + 1) // 2
            tables[key] = F.pad(table, (0, 0, add, add))
    return tables


def test_fact_20_windows_attend_to_their_own_tokens_only():
    """Each window of the grid equals attention over its own tokens alone, however few the end of the grid leaves."""
    block = Block(12, 2, 2.0, (2, 5, 3), 2, False, False, True)
    fill_by_chance(block)
    x = torch.randn(2, 30, 12)
    got = block._attend(x).view(2, 2, 5, 3, 12)
    grid = x.view(2, 2, 5, 3, 12)
    for i, j, k in itertools.product(range(0, 2, 2), range(0, 5, 2), range(0, 3, 2)):
        cube = grid[:, i : i + 2, j : j + 2, k : k + 2]
        expected = block.attention(cube.flatten(1, 3)).view(cube.shape)
        assert torch.allclose(got[:, i : i + 2, j : j + 2, k : k + 2], expected, atol=1e-5)


def test_fact_20_listed_blocks_change_the_result():
    x, t, label = torch.randn(1, 4, 8, 10, 6), torch.tensor([10]), torch.tensor([1])
    outputs = []
    for blocks in ((), (0,), (1,), (0, 2)):
        dit = fill_by_chance(DiT3D(**SMALL | dict(window_size=2, window_blocks=blocks)))
        assert [block.window for block in dit.blocks] == [2 if i in blocks else 0 for i in range(3)]
        outputs.append(dit(x, t, label))
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(outputs, 2))


@pytest.mark.parametrize("grid", [(5, 6, 4), (3, 3, 3), (1, 7, 2)])
def test_windows_split_and_merge(grid):
    x = torch.randn(2, *grid, 3)
    cubes, padded = split_windows(x, 3)
    assert cubes.shape[1:] == (3, 3, 3, 3) and padded == tuple(3 * math.ceil(n / 3) for n in grid)
    assert torch.equal(merge_windows(cubes, padded, grid), x)
    assert cubes.sum().item() == pytest.approx(x.sum().item(), abs=1e-3)  # the rest is zero


def test_attention_equals_its_definition_with_relative_positions():
    """softmax(q k / sqrt(d) + q R_x + q R_y + q R_z) v, the relative terms with the unscaled query."""
    size = (2, 3, 2)
    attention = fill_by_chance(Attention(8, 2, size, True, False))
    x = torch.randn(1, 12, 8)
    q, k, v = attention.qkv(x)[0].view(12, 3, 2, 4).unbind(1)  # (token, head, 4)
    places = list(itertools.product(*map(range, size)))
    expected = torch.zeros(12, 2, 4)
    for head, i in itertools.product(range(2), range(12)):
        logits = []
        for j in range(12):
            rows = [
                table[places[i][axis] - places[j][axis] + size[axis] - 1]
                for axis, table in enumerate(attention.relative)
            ]
            logits.append(q[i, head] @ k[j, head] / 2 + q[i, head] @ sum(rows))
        expected[i, head] = torch.stack(logits).softmax(0) @ v[:, head]
    assert torch.allclose(attention(x)[0], attention.proj(expected.reshape(12, 8)), atol=1e-5)


def test_relative_positions_add_the_published_number_of_parameters():
    settings = dict(window_size=7, window_blocks=(0, 1, 3, 4, 6, 7, 9, 10))
    plain, relative = (on_meta(DiT3D, **S4 | settings, relative_positions=r) for r in (False, True))
    assert count(relative) - count(plain) == 35_072
    dit = DiT3D(**SMALL, relative_positions=True)
    assert not any(table.any() for block in dit.blocks for table in block.attention.relative)


def test_rotary_logits_depend_on_the_displacement_only():
    grid = (3, 4, 5)
    angles = rotary_angles(24, grid).view(*grid, 12)
    q, k = torch.randn(24), torch.randn(24)

    def logit(a, b):
        return (rotate(q, angles[a].cos(), angles[a].sin()) @ rotate(k, angles[b].cos(), angles[b].sin())).item()

    assert logit((0, 0, 0), (1, 2, 1)) == pytest.approx(logit((1, 1, 3), (2, 3, 4)), abs=1e-5)
    assert logit((1, 2, 3), (1, 2, 3)) == pytest.approx((q @ k).item(), abs=1e-5)
    assert len({round(logit((1, 1, 1), b), 4) for b in ((2, 1, 1), (1, 2, 1), (1, 1, 2), (0, 1, 1))}) == 4


def test_rotary_positions_take_the_place_of_the_table():
    rotary = fill_by_chance(DiT3D(**SMALL | dict(positions="rotary")))
    assert rotary.positions is None and count(rotary) == count(rotary, trainable=True)
    assert {key for key in rotary.state_dict() if "cos" in key or "positions" in key} == set()
    t, label = torch.tensor([10]), torch.tensor([1])
    x = torch.randn(1, 4, 8, 10, 6)
    moved = x.roll(2, dims=3)  # by one token: without positions the output would move along
    assert (rotary(x, t, label).roll(2, dims=3) - rotary(moved, t, label)).abs().max() > 1e-3
    for block in rotary.blocks:
        block.attention.cos.fill_(1), block.attention.sin.fill_(0)
    assert torch.allclose(rotary(x, t, label).roll(2, dims=3), rotary(moved, t, label), atol=1e-4)
    windows = DiT3D(**SMALL | dict(positions="rotary", window_size=3, window_blocks=(0, 1)))
    assert windows(x, t, label).shape == x.shape


@pytest.mark.parametrize("windows", [{}, dict(window_size=3, window_blocks=(0, 1, 2))])
@pytest.mark.parametrize("relative_positions", [False, True])
def test_all_attention_goes_through_the_fused_kernel(monkeypatch, windows, relative_positions):
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    monkeypatch.setattr(torch.Tensor, "softmax", None)
    dit = DiT3D(**SMALL | windows | dict(relative_positions=relative_positions))
    dit(torch.randn(1, 4, 8, 10, 6), torch.tensor([1]), torch.tensor([0]))
    assert len(calls) == len(dit.blocks)


def test_blocks_are_the_identity_before_training():
    block = DiT3D(**SMALL).blocks[0]
    x = torch.randn(2, 30, 48)
    assert torch.equal(block(x, torch.randn(2, 48)), x)


def test_step_and_label_reach_the_output():
    dit = fill_by_chance(DiT3D(**SMALL))
    x = torch.randn(1, 4, 8, 10, 6)

    def out(t, label):
        return dit(x, torch.tensor([t]), torch.tensor([label]))

    assert (out(3, 0) - out(4, 0)).abs().max() > 1e-4
    assert len({out(3, label).sum().item() for label in range(3)}) == 3
    both = dit(x.repeat(2, 1, 1, 1, 1), torch.tensor([3, 3]), torch.tensor([1]))  # one label for the whole batch
    assert torch.allclose(both, out(3, 1).expand_as(both), rtol=1e-3, atol=1e-3)


def test_output_channels_and_no_null_label():
    dit = DiT3D(**SMALL | dict(label_dropout=0.0, out_channels=8))
    assert dit.null_label is None and len(dit.label.weight) == 2
    assert dit(torch.randn(1, 4, 8, 10, 6), torch.tensor([1]), torch.tensor([0])).shape == (1, 8, 8, 10, 6)


def test_dit_checkpointing_changes_no_gradient():
    x, gradients = torch.randn(2, 4, 8, 10, 6), []
    for checkpointing in (False, True):
        dit = fill_by_chance(DiT3D(**SMALL, checkpointing=checkpointing))
        dit(x, torch.tensor([1, 2]), torch.tensor([0, 2])).square().mean().backward()
        gradients.append([p.grad for p in dit.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "settings",
    [{}, dict(positions="rotary"), dict(relative_positions=True, window_size=3, window_blocks=(0, 2))],
)
def test_reduced_precision(settings):
    dit = DiT3D(**SMALL | settings)
    for p in dit.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.1)
    args = torch.randn(2, 4, 8, 10, 6), torch.tensor([1, 2]), torch.tensor([0, 1])
    exact = dit(*args)
    with torch.autocast("cpu", torch.bfloat16):
        rough = dit(*args)
    rough.float().sum().backward()
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_heads=5), "5 heads"),
        (dict(positions="learned"), "choose sincos or rotary"),
        (dict(positions="rotary", num_heads=16), "even width"),
        (dict(window_size=2, window_blocks=(0, 3)), "blocks 0 to 2"),
        (dict(window_blocks=(0,)), "window size is 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        DiT3D(**SMALL | settings)


# ----------------------------------------------------------------------------------------- labels, guidance and average


def test_fact_23_rate_of_dropped_labels():
    g = torch.Generator().manual_seed(0)
    label = torch.randint(0, 2, (10_000,), generator=g)
    dropped = drop_labels(label, torch.rand(10_000, generator=g), 0.1, 2)
    assert (dropped == 2).float().mean().item() == pytest.approx(0.10, abs=0.01)
    kept = dropped != 2
    assert torch.equal(dropped[kept], label[kept])
    assert torch.equal(drop_labels(label, torch.rand(10_000, generator=g), 0.0, 2), label)


def test_fact_23_the_network_itself_drops_nothing():
    dit = fill_by_chance(DiT3D(**SMALL))
    args = torch.randn(2, 4, 8, 10, 6), torch.tensor([1, 2]), torch.tensor([0, 1])
    assert torch.equal(dit.train()(*args), dit.eval()(*args))


def test_fact_24_guidance_on_all_channels():
    dit = fill_by_chance(DiT3D(**SMALL))
    x, t = torch.randn(2, 4, 8, 10, 6), torch.tensor([10, 700])
    cond, uncond = (lambda x, t, k=k: dit(x, t, torch.full_like(t, k)) for k in (1, dit.null_label))
    assert torch.equal(schedulers.guided(cond, uncond, 1)(x, t), cond(x, t))
    c, u = cond(x, t), uncond(x, t)
    got = schedulers.guided(cond, uncond, 3.0)(x, t)
    assert torch.allclose(got, u + 3 * (c - u), atol=1e-6)
    assert all((got - c)[:, k].abs().max() > 1e-3 for k in range(4))  # the original leaves the fourth as it is


def test_fact_25_average_after_one_step():
    dit = fill_by_chance(DiT3D(**SMALL))
    old = {key: value.clone() for key, value in dit.state_dict().items()}
    ema = EMA(dit, 0.9)
    fill_by_chance(dit, seed=1)
    ema.update(dit)
    for key, value in ema.module.state_dict().items():
        assert torch.allclose(value, 0.9 * old[key] + 0.1 * dit.state_dict()[key], atol=1e-7), key
    assert torch.equal(ema.module.positions, dit.positions)
