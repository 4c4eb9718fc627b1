
import pytest
import torch
from torch import nn

from common.blocks3d import SelfAttention3d
from common.schedulers import make_schedule
from il_cldm import losses
from il_cldm.config import Config
from il_cldm.model import (
    Autoencoder,
    Denoiser,
    PatchDiscriminator,
    build_autoencoder,
    build_denoiser,
    build_discriminator,
)

# The published network: every label row is a class (no null class).
PAPER = dict(label_dropout=0.0)
SMALL = dict(unet_channels=8, unet_groups=4, unet_mults=(1, 2), unet_res_blocks=1, time_dim=16)


def config(**changes):
    """The defaults of config.py, which are the paper's, but for `changes`."""
    return Config(**(PAPER | changes))


def count(module):
    return sum(p.numel() for p in module.parameters())


def ramp(shape, a, b, w):
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (a + b * torch.sin(w * n)).float().view(shape)


IMAGE = (0.5, 0.5, 0.01)


@torch.no_grad()
def fill_by_sine(model):
    """The rule of the specification, section 11.2."""
    norms = (nn.GroupNorm, nn.BatchNorm3d)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            wave = torch.sin(torch.arange(1, p.numel() + 1, dtype=torch.float64)).view(p.shape)
            if p.ndim >= 2:
                wave = wave / (p.numel() / p.shape[0]) ** 0.5
            elif isinstance(module, norms) and name == "weight":
                wave = 1 + 0.1 * wave
            else:
                wave = 0.1 * wave
            p.copy_(wave)
    return model


def check(x, mean, std, first, last):
    x = x.flatten()
    assert x.mean().item() == pytest.approx(mean, rel=1e-3)
    assert x.std().item() == pytest.approx(std, rel=1e-3)
    assert x[: len(first)].tolist() == pytest.approx(first, rel=1e-3, abs=1e-5)
    assert x[-1].item() == pytest.approx(last, rel=1e-3, abs=1e-5)


@pytest.fixture(scope="module")
def autoencoder():
    return fill_by_sine(build_autoencoder(config())).eval()


@pytest.fixture(scope="module")
def denoiser():
    return fill_by_sine(build_denoiser(config())).eval()


# -------------------------------------------------------------------------------------------- structure (section 11.1)


def test_parameter_counts():
    with torch.device("meta"):
        aae, disc, unet = build_autoencoder(config()), build_discriminator(config()), build_denoiser(config())
        authors = build_denoiser(config(unet_mults=(1, 2, 2, 4), num_classes=2, unet_attn_res=(4,), image_size=40))
        with_null = build_denoiser(config(label_dropout=0.1))
    assert (count(aae), count(aae.encoder), count(aae.decoder)) == (1_396_178, 762_145, 634_033)
    assert count(disc) == 697_809
    assert (count(unet), count(unet.extractor)) == (72_970_130, 16_017)
    assert count(unet.projector) - count(unet.projector.label) == 131_712
    assert (count(unet.down), count(unet.middle), count(unet.up)) == (20_496_384, 7_409_920, 44_911_872)
    assert count(authors) == 204_724_882
    assert count(with_null) - count(unet) == 128
    assert [len(m.state_dict()) for m in (aae, disc, unet)] == [84, 22, 229]


def test_layer_counts():
    with torch.device("meta"):
        aae, disc, unet = build_autoencoder(config()), build_discriminator(config()), build_denoiser(config())
    encoder = [448, 42_176, 65_568, 168_320, 262_208, 221_568, 128, 1_729]
    decoder = [1_792, 221_568, 221_568, 85_280, 65_568, 21_392, 16_400, 32, 433]
    assert [count(m) for m in aae.encoder.children()] == encoder
    assert [count(m) for m in aae.decoder.children() if count(m)] == decoder[:3] + decoder[3:]
    assert [count(m) for m in disc.convs] == [1_040, 32_768, 131_072, 524_288, 8_193]
    assert [count(m) for m in disc.norms] == [64, 128, 256]
    down = [7_040, 902_016, 902_016, 1_048_704, 2_721_536, 3_573_504, 4_194_560, 3_573_504, 3_573_504]
    up = [5_474_816] * 3 + [4_194_560, 5_474_816, 5_474_816, 4_557_056, 4_194_560, 1_836_544, 1_377_536, 1_377_536]
    assert [count(m) for m in unet.down] == down
    assert [count(m) for m in unet.middle] == [3_836_416, 3_573_504]
    assert [count(m) for m in unet.up] == up
    assert count(unet.norm_out) + count(unet.conv_out) == 3_713


def test_shapes_at_full_size_and_the_only_attention():
    tokens = []
    with torch.device("meta"):
        aae, disc, unet = build_autoencoder(config()), build_discriminator(config()), build_denoiser(config())
        attention = [m for m in unet.modules() if isinstance(m, SelfAttention3d)]
        attention[0].register_forward_hook(lambda m, args, out: tokens.append(out[0, 0].numel()))
        x = torch.empty(1, 1, 112, 128, 112)
        z = aae.encode(x)
        eps_pred = unet(z, unet.condition(x), torch.empty(1, dtype=torch.long))
    assert z.shape == eps_pred.shape == unet.condition(x).shape == (1, 1, 28, 32, 28)
    assert aae.decode(z).shape == x.shape and disc(x).shape == (1, 1, 3, 4, 3)
    assert len(attention) == 1 and tokens == [392]
    small = torch.empty(1, 1, 16, 16, 16, device="meta")
    assert aae.encode(small).shape == (1, 1, 4, 4, 4) and aae(small)[0].shape == small.shape


@pytest.mark.parametrize(
    ("image_size", "attn_res", "down", "up"),
    [
        (28, (3,), [0, 0, 0], [0, 0, 0]),
        (28, (28, 7), [1, 0, 1], [1, 0, 1]),
        (30, (15, 7), [0, 1, 1], [1, 0, 0]),  # 30, 15, 7 down but 7, 14, 28 up
        (8, (2, 4), [0, 1, 1], [1, 1, 0]),
    ],
)
def test_level_attention_follows_the_nominal_resolution(image_size, attn_res, down, up):
    sizes = SMALL | dict(unet_mults=(1, 1, 1), image_size=image_size, unet_attn_res=attn_res)
    unet = build_denoiser(config(**sizes))

    def attends(blocks):
        return [int(isinstance(b.attention, SelfAttention3d)) for b in blocks if hasattr(b, "attention")]

    assert attends(unet.down) == down
    assert attends(unet.up) == [a for a in up for _ in range(2)]
    assert attends(unet.middle) == [1, 0]


# -------------------------------------------------------------------------------------- pinned numbers (section 11.2)


@torch.no_grad()
def test_autoencoder_numbers(autoencoder):
    z = autoencoder.encode(ramp((1, 1, 16, 16, 16), *IMAGE))
    check(z, 0.078958, 0.153129, [0.08767, 0.07351, 0.04689, 0.02467], 0.25037)
    check(autoencoder.decode(z), 0.094004, 0.186124, [0.10188, 0.19688, 0.17733, 0.13918], 0.05842)


@torch.no_grad()
def test_stage1_numbers(autoencoder):
    disc, x = fill_by_sine(build_discriminator(config())).train(), ramp((2, 1, 32, 32, 32), *IMAGE)
    logits_real = disc(x)
    assert logits_real.shape == (2, 1, 1, 1, 1)
    assert logits_real.mean().item() == pytest.approx(0.062615, rel=1e-3)
    assert logits_real.flatten().tolist() == pytest.approx([0.06473, 0.06050], rel=1e-3)
    x_hat = autoencoder(x)[0]
    logits_fake = disc(x_hat)
    assert losses.reconstruction_loss(x_hat, x).item() == pytest.approx(0.456673, rel=1e-3)
    assert losses.generator_adversarial_loss(logits_fake).item() == pytest.approx(-0.058355, rel=1e-3)
    assert losses.hinge_discriminator_loss(logits_real, logits_fake).item() == pytest.approx(0.997870, rel=1e-3)


@torch.no_grad()
def test_conditioning_numbers(denoiser):
    cond_map = denoiser.condition(ramp((1, 1, 32, 32, 32), *IMAGE))
    check(cond_map, 0.121338, 0.114346, [0.17286, 0.20602, 0.24783, 0.25491], -0.04681)
    sinusoid = denoiser.projector.time(torch.tensor([10]))[0, [0, 1, 63, 64, 65, 127]].tolist()
    assert sinusoid == pytest.approx([-0.544021, 0.692634, 0.00115478, -0.839072, -0.721289, 0.9999993], abs=1e-6)
    vector = denoiser.projector(torch.tensor([10]))
    check(vector, 0.005362, 0.418984, [0.65051, -0.47362, 0.57328, -0.62593], 0.51070)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("t", "label", "numbers"),
    [
        (10, None, (0.095708, 1.362227, [-0.17265, -0.43229, -0.41490, -0.24360], 0.68209)),
        (10, 2, (0.093135, 1.659670, [-0.36326, -0.32033, -0.30269, -0.10876], 0.53506)),
        (999, 0, (0.096301, 1.230769, [-0.01845, 0.22534, 0.46902, 0.73403], 0.18130)),
    ],
)
@torch.no_grad()
def test_denoiser_numbers(denoiser, t, label, numbers):
    cond_map = denoiser.condition(ramp((1, 1, 32, 32, 32), *IMAGE))
    label = None if label is None else torch.tensor([label])
    check(denoiser(ramp((1, 1, 8, 8, 8), 0, 1, 0.1), cond_map, torch.tensor([t]), label), *numbers)


def test_schedule_numbers():
    table = make_schedule("linear", 1000).alphas_bar
    known = {0: 0.99990, 1: 0.99978, 10: 0.997806, 100: 0.895141, 249: 0.524085, 500: 0.077797, 999: 4.0358e-5}
    for t, value in known.items():
        assert table[t].item() == pytest.approx(value, abs=1e-6)


# --------------------------------------------------------------------------------------------------- labels and options


@pytest.fixture
def small():
    torch.manual_seed(0)
    return build_denoiser(config(**SMALL, label_dropout=0.1)).eval()


def small_inputs(batch=2):
    g = torch.Generator().manual_seed(3)
    return (
        torch.randn(batch, 1, 8, 6, 4, generator=g),
        torch.randn(batch, 1, 8, 6, 4, generator=g),
        torch.tensor([5, 700][:batch]),
    )


@torch.no_grad()
def test_label_layouts_and_the_null_class(small):
    x, cond, t = small_inputs()
    plain = small(x, cond, t, torch.tensor([1, 3]))
    assert torch.equal(small(x, cond, t, torch.tensor([[1], [3]])), plain)
    assert torch.equal(small(x, cond, t, torch.tensor([[1.9], [3.2]])), plain)
    assert torch.equal(small(x, cond, t, torch.tensor([[2]])), small(x, cond, t, torch.tensor([2, 2])))
    assert small.null_label == 4
    null, none = small(x, cond, t, torch.tensor([4, 4])), small(x, cond, t)
    assert not torch.allclose(null, none)
    small.projector.label.weight[4] = 0.0  # what loading an original checkpoint does
    assert torch.equal(small(x, cond, t, torch.tensor([4, 4])), none)
    without = build_denoiser(config(**SMALL))
    assert without.null_label is None
    with pytest.raises(IndexError):
        without(x, cond, t, torch.tensor([4, 4]))


@torch.no_grad()
def test_denoiser_uses_mri_label_and_time_and_no_other_sample(small):
    x, cond, t = small_inputs()
    label = torch.tensor([1, 3])
    out = small(x, cond, t, label)
    torch.testing.assert_close(small(x[1:], cond[1:], t[1:], label[1:]), out[1:], atol=1e-5, rtol=0)
    for changed in (small(x, cond + 1, t, label), small(x, cond, t + 1, label), small(x, cond, t, label - 1)):
        assert (changed - out).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-3


@torch.no_grad()
def test_odd_latents_come_back_in_their_size():
    unet = build_denoiser(config(**SMALL | dict(unet_mults=(1, 2, 2))))
    x = torch.randn(1, 1, 7, 9, 10)
    assert unet(x, x, torch.tensor([3])).shape == x.shape


def test_more_latent_channels():
    unet = build_denoiser(config(**SMALL, latent_dim=3))
    x, cond, t = torch.randn(1, 3, 4, 4, 4), torch.randn(1, 1, 4, 4, 4), torch.tensor([3])
    assert unet.down[0].in_channels == 4 and unet(x, cond, t).shape == x.shape
    aae = Autoencoder(1, width=4, latent_dim=3, groups=2)
    assert aae.encode(torch.zeros(1, 1, 18, 21, 23)).shape == (1, 3, 4, 5, 5)  # axes are cut to a multiple of 4


def test_kl_head():
    torch.manual_seed(0)
    aae, x = build_autoencoder(config(aae_channels=4, aae_groups=2, kl_weight=1e-6)), torch.rand(2, 1, 8, 8, 8)
    x_hat, mean, logvar = aae(x)
    assert mean.shape == logvar.shape == (2, 1, 2, 2, 2)
    assert torch.equal(x_hat, aae.decode(aae.encode(x)))
    noise = torch.randn(mean.shape)
    assert torch.equal(aae(x, noise)[0], aae.decode(mean + (0.5 * logvar).exp() * noise))
    plain = build_autoencoder(config(aae_channels=4, aae_groups=2))
    assert plain(x, noise)[2] is None and torch.equal(plain(x, noise)[0], plain(x)[0])
    p = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    exact = torch.distributions.kl_divergence(p, torch.distributions.Normal(0.0, 1.0)).mean()
    assert losses.kl_loss(mean, logvar).item() == pytest.approx(exact.item(), rel=1e-5)


def test_checkpointing_changes_nothing():
    x, cond, t = small_inputs()
    pet = torch.rand(1, 1, 8, 8, 8)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        unet = build_denoiser(config(**SMALL, unet_dropout=0.3, checkpointing=checkpointing))
        aae = build_autoencoder(config(aae_channels=4, aae_groups=2, checkpointing=checkpointing))
        (unet(x, cond, t).square().mean() + aae(pet)[0].square().mean()).backward()
        gradients.append([p.grad for m in (unet, aae) for p in m.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1])


@torch.no_grad()
def test_channels_last_changes_nothing():
    torch.manual_seed(0)
    unet = build_denoiser(config(**SMALL | dict(image_size=8, unet_attn_res=(8,)))).eval()
    x, cond, t = small_inputs()
    before = unet(x, cond, t)
    unet = unet.to(memory_format=torch.channels_last_3d)
    after = unet(*(v.to(memory_format=torch.channels_last_3d) for v in (x, cond)), t)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_discriminator_norms():
    x = torch.rand(2, 1, 16, 16, 16)
    group = PatchDiscriminator(1, (8, 16, 32), norm="group")
    assert group(x).shape == (2, 1, 1, 1, 1)
    torch.testing.assert_close(group(x)[:1], group(x[:1]))
    batch = PatchDiscriminator(1, (8, 16, 32), norm="batch")
    assert not torch.allclose(batch(x)[:1], batch(x[:1]))
    assert {k for k in batch.state_dict() if "running" not in k and "tracked" not in k} == set(group.state_dict())
    with pytest.raises(ValueError, match="norm"):
        PatchDiscriminator(1, (8, 16), norm="instance")


def test_discriminator_loss_gradients_at_the_hinge():
    """Section 11.2, fact 8: where f > -1 the undetached loss would give minus half the adversarial gradient."""
    fake = torch.tensor([-0.5, 0.3, 2.0], requires_grad=True)
    real = torch.tensor([-3.0, 0.9, 1.5])
    (disc,) = torch.autograd.grad(losses.hinge_discriminator_loss(real, fake), fake)
    (adv,) = torch.autograd.grad(losses.generator_adversarial_loss(fake), fake)
    assert torch.equal(disc, -0.5 * adv)
    saturated = torch.tensor([-1.5], requires_grad=True)
    assert torch.autograd.grad(losses.hinge_fake_loss(saturated), saturated)[0].item() == 0
    assert losses.hinge_real_loss(real).item() == pytest.approx((4.0 + 0.1 + 0.0) / 3)


def test_every_parameter_learns():
    torch.manual_seed(0)
    unet = Denoiser(1, 1, 8, (1, 2), 4, 1, (8,), 8, 0.0, 16, 3, True)
    x, _, t = small_inputs()
    mri = torch.rand(2, 1, 32, 24, 16)
    unet(x, unet.condition(mri), t, torch.tensor([3, 0])).square().mean().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []
