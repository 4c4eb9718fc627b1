"""Networks: sizes, what each layer is there for, and what they refuse. "fact N" is an acceptance fact."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.cli import UserError
from lapt.autoencoder import Codebook, PatchDiscriminator, SyncBatchNorm2d, VQAutoencoder
from lapt.conditioner import Rescaler, VolumeConditioner
from lapt.guide import SegmentationGuide
from lapt.unet import NORM_GROUPS, SliceConv, UNet, inflate, is_between_slices

PAPER_VQ = {"in_channels": 2, "out_channels": 2, "channels": 128, "channel_mult": (1, 2, 4), "num_res_blocks": 2,
            "z_channels": 3, "embed_dim": 3, "n_embed": 8192}  # fmt: skip
PAPER_UNET = {"in_channels": 18, "out_channels": 3, "model_channels": 224, "channel_mult": (1, 4, 8),
              "num_res_blocks": 2, "attention_resolutions": (8, 4, 2), "head_channels": 32}  # fmt: skip
PAPER_GUIDE = {"in_channels": 2, "out_channels": 1, "channels": 64, "channel_mult": (1, 2, 4), "num_res_blocks": 2}
VQ = PAPER_VQ | {"channels": 8, "channel_mult": (1, 2, 2), "num_res_blocks": 1, "n_embed": 64, "norm_groups": 4}
UNETS = PAPER_UNET | {"in_channels": 5, "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1,
                      "attention_resolutions": (2,), "head_channels": 16}  # fmt: skip
GUIDE = PAPER_GUIDE | {"channels": 4, "channel_mult": (1, 2), "num_res_blocks": 1, "norm_groups": 4}


def randomise(network, seed=0):
    """Weights that no initialisation makes special."""
    g = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.data = torch.randn(p.shape, generator=g) * (0.1 if p.ndim < 2 else p[0].numel() ** -0.5)
    return network


def count(network):
    return sum(p.numel() for p in network.parameters())


# ---- paper sizes


@pytest.mark.parametrize(
    ("make", "n"),
    [
        (lambda: VQAutoencoder(**PAPER_VQ), 55_320_477),
        (lambda: VQAutoencoder(**PAPER_VQ, modality_separate=True), 55_740_829),
        (lambda: PatchDiscriminator(in_channels=2), 2_764_609),
        (lambda: Rescaler(in_channels=15, out_channels=15, stages=2), 225),
        (lambda: UNet(**PAPER_UNET), 739_385_251),
        (lambda: UNet(**PAPER_UNET, slices=32), 1_007_827_777),
        (lambda: VolumeConditioner(in_channels=15, out_channels=15, stages=2, model_channels=32, slices=32), 149_904),
        (lambda: SegmentationGuide(**PAPER_GUIDE, timestep_projections=True), 39_909_441),
        (lambda: SegmentationGuide(**PAPER_GUIDE), 39_202_177),
    ],
    ids=["vq", "vq_separate", "discriminator", "rescaler", "unet", "unet3d", "conditioner3d", "guide_theirs", "guide"],
)  # fmt: skip
def test_paper_counts(make, n):
    """fact 1"""
    with torch.device("meta"):
        assert count(make()) == n


def test_paper_shapes():
    """fact 2"""
    with torch.device("meta"):
        vq, x = VQAutoencoder(**PAPER_VQ), torch.zeros(1, 2, 192, 224)
        z = vq.encode(x)
        assert z.shape == (1, 3, 48, 56) and vq.decode(z).shape == x.shape and vq.factor == 4
        unet = UNet(**PAPER_UNET)
        assert unet(torch.zeros(1, 18, 48, 56), torch.zeros(1)).shape == (1, 3, 48, 56) and unet.multiple == 4
        assert PatchDiscriminator(in_channels=2)(x).shape == (1, 1, 22, 26)
        assert Rescaler(in_channels=15, out_channels=15, stages=2)(torch.zeros(1, 15, 192, 224)).shape[2:] == (48, 56)


# ---- autoencoder


@pytest.fixture(scope="module")
def vq():
    torch.manual_seed(0)
    model = VQAutoencoder(**VQ)
    nn.init.normal_(model.codebook.embedding.weight, std=0.5)
    return model


def test_codebook_takes_the_nearest_vector_at_any_precision(vq):
    z = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    codes = vq.codebook.embedding.weight.double()
    distances = (z.movedim(1, -1).double()[..., None, :] - codes).square().sum(-1)  # (2, 5, 7, n_embed)
    z_q, _, indices = vq.quantize(z)
    assert torch.equal(indices, distances.argmin(-1))
    assert torch.allclose(z_q, codes[indices].movedim(-1, 1).float(), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vq.quantize(z)[2], indices)


def test_nearest_in_parts_is_the_same(vq, monkeypatch):
    z = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(2))
    whole = vq.codebook.nearest(z)
    monkeypatch.setattr("lapt.autoencoder.NEAREST_CHUNK", 10)
    assert torch.equal(vq.codebook.nearest(z), whole)


@pytest.mark.parametrize("legacy", [False, True])
def test_beta_weights_commitment_or_codebook(legacy):
    """The two conventions, by hand and by who gets which gradient."""
    codebook = Codebook(1, 2, beta=0.25, legacy_beta=legacy)
    codebook.embedding.weight.data = torch.tensor([[1.0, 2.0]])
    z = torch.zeros(1, 2, 1, 1, requires_grad=True)
    _, loss, _ = codebook(z)
    loss.backward()
    assert loss.item() == pytest.approx(1.25 * (1 + 4) / 2)
    on_code, on_z = (0.25, 1.0) if legacy else (1.0, 0.25)
    assert codebook.embedding.weight.grad.flatten().tolist() == pytest.approx([on_code, 2 * on_code])
    assert z.grad.flatten().tolist() == pytest.approx([-on_z, -2 * on_z])


def test_decoding_snaps_and_lets_gradients_through(vq):
    z = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(3), requires_grad=True)
    snapped = vq.quantize(z)[0]
    with torch.no_grad():
        assert torch.equal(vq.decode(z), vq.decode_codes(snapped))
        assert torch.allclose(vq.decode(z), vq.decode(snapped), atol=1e-6)  # a code is its own nearest
        assert not torch.allclose(vq.decode(z), vq.decode_codes(z), atol=1e-3)
    vq.decode(z).sum().backward()
    assert z.grad.abs().min() > 0


def test_forward_is_encode_quantise_decode(vq):
    x = torch.randn(1, 2, 16, 24, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        z_q, loss, _ = vq.quantize(vq.encode(x))
        x_hat, same = vq(x)
        assert torch.equal(x_hat, vq.decode_codes(z_q)) and same == loss and x_hat.shape == x.shape
    assert vq.last_layer.shape == (2, 8, 3, 3)


def test_separate_modalities_do_not_mix_before_the_first_shared_layer():
    model = randomise(VQAutoencoder(**VQ, modality_separate=True))
    x = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(5))
    other = x.clone()
    other[:, 1] += 1
    stems = model.encoder.stems
    assert torch.equal(stems[0](x[:, :1]), stems[0](other[:, :1]))
    seen = []
    model.encoder.conv_in.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        model.encode(x)
        model.encode(other)
    assert torch.equal(seen[0][:, :4], seen[1][:, :4]) and not torch.equal(seen[0][:, 4:], seen[1][:, 4:])
    assert model(x)[0].shape == x.shape


def test_attention_stands_at_the_levels_named():
    model = VQAutoencoder(**VQ, attention_levels=(1,))
    assert [len(level.attentions) for level in model.encoder.levels] == [0, 1, 0]
    assert [len(level.attentions) for level in model.decoder.levels] == [0, 2, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"norm_groups": 3}, "norm groups"), ({"modality_separate": True, "in_channels": 3}, "even number")],
)
def test_impossible_autoencoders_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VQAutoencoder(**VQ | change)


def test_batch_norm_of_one_process_is_torchs():
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(6))
    ours, theirs = SyncBatchNorm2d(4), nn.BatchNorm2d(4)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert torch.allclose(ours.running_var, theirs.running_var, atol=1e-6)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-6)


# ---- U-Net


def test_untrained_unet_says_zero():
    unet = UNet(**UNETS)
    assert unet(torch.randn(2, 5, 8, 8), torch.tensor([3, 900])).abs().max() == 0


@pytest.fixture(scope="module")
def pair():
    """A 2D network and the volume network made of it."""
    flat = randomise(UNet(**UNETS))
    return flat, inflate(flat.state_dict(), UNet(**UNETS, slices=4))


def test_inflated_network_equals_the_2d_one_slice_by_slice(pair):
    """fact 3"""
    flat, volume = pair
    x, t = torch.randn(8, 5, 8, 12, generator=torch.Generator().manual_seed(7)), torch.tensor([5, 700])
    with torch.no_grad():
        expected = flat(x, t.repeat_interleave(4))
        assert expected.std() > 0.1
        assert (volume(x, t) - expected).abs().max() <= 1e-5
        each = volume(x, t.repeat_interleave(4))  # one step a slice instead of one a volume
        assert torch.allclose(volume(x, t), each, atol=1e-5)


@pytest.mark.parametrize("kind", ["across.weight", "out_across.weight"], ids=["convolutions", "attention"])
def test_layers_between_slices_couple_one_volume_and_no_other(pair, kind):
    """What the volume release adds: without these layers no slice would know of another."""
    volume = inflate(pair[0].state_dict(), UNet(**UNETS, slices=4))
    x, t = torch.randn(8, 5, 8, 8, generator=torch.Generator().manual_seed(8)), torch.tensor([10, 10])
    other = x.clone()
    other[1] += 1  # second slice of the first volume

    def changes():
        with torch.no_grad():
            return (volume(x, t) - volume(other, t)).abs().flatten(1).amax(1)

    assert changes()[[0, 2, 3]].max() == 0
    for name, p in volume.named_parameters():
        if name.endswith(f".{kind}"):
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(9))
    assert changes()[:4].min() > 1e-6 and changes()[4:].max() == 0


def test_slice_conv_is_an_identity_then_a_convolution_along_slices():
    conv = SliceConv(3, slices=5)
    x = torch.randn(10, 3, 2, 4, generator=torch.Generator().manual_seed(10))
    assert torch.equal(conv(x), x)
    randomise(conv)
    volumes = x.view(2, 5, 3, 2, 4).transpose(1, 2)  # (B, C, slices, h, w)
    expected = F.conv3d(volumes, conv.weight[..., None, None], conv.bias, padding=(1, 0, 0)).transpose(1, 2)
    assert torch.allclose(conv(x), expected.reshape(x.shape), atol=1e-6)


def test_inflate_refuses_another_network():
    state = UNet(**UNETS).state_dict()
    with pytest.raises(UserError, match="does not fit"):
        inflate(state, UNet(**UNETS | {"model_channels": 64}, slices=4))
    with pytest.raises(UserError, match="conv_in|time1"):
        inflate({key: value for key, value in state.items() if not key.startswith("time1")}, UNet(**UNETS, slices=4))


@pytest.mark.parametrize("frozen", ["nothing", "2d", "between slices"])
def test_recomputed_activations_give_the_same_gradients_with_frozen_parts(frozen):
    """The original's own recomputation fails as soon as a parameter needs no gradient."""
    network = randomise(UNet(**UNETS, slices=2))
    for name, p in network.named_parameters():
        p.requires_grad_(frozen == "nothing" or is_between_slices(name) != (frozen == "between slices"))
    x, t, found = torch.randn(4, 5, 8, 8), torch.tensor([100, 3]), []
    for on in (False, True):
        network.set_checkpointing(on)
        network.zero_grad()
        network(x, t).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == {n for n, p in network.named_parameters() if p.requires_grad}
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("shape", "steps", "message"),
    [((2, 5, 7, 8), 2, "multiples of 2"), ((3, 5, 8, 8), 3, "2 slices"), ((4, 5, 8, 8), 3, "3 steps")],
)
def test_unet_names_the_rule_that_a_size_breaks(shape, steps, message):
    """fact 4: what padding is there for."""
    with pytest.raises(ValueError, match=message):
        UNet(**UNETS, slices=2)(torch.zeros(shape), torch.zeros(steps))


@pytest.mark.parametrize(
    ("change", "message"), [({"model_channels": 48}, str(NORM_GROUPS)), ({"head_channels": 24}, "24")]
)
def test_impossible_unets_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNet(**UNETS | change)


# ---- conditioners


def test_rescaler_averages_blocks_and_floors_odd_sizes():
    """Two bilinear halvings are means of 4 x 4 pixels; an odd size loses its last row."""
    rescaler = Rescaler(in_channels=3, out_channels=3, stages=2)
    rescaler.map.weight.data = torch.eye(3)[..., None, None]
    x = torch.randn(1, 3, 8, 12, generator=torch.Generator().manual_seed(11))
    assert torch.allclose(rescaler(x), F.avg_pool2d(x, 4), atol=1e-6)
    assert rescaler(torch.zeros(1, 3, 22, 27)).shape == (1, 3, 5, 6)


def test_volume_conditioner_starts_as_the_rescaler_and_then_sees_neighbouring_slices():
    """fact 3"""
    torch.manual_seed(1)
    conditioner = VolumeConditioner(in_channels=5, out_channels=6, stages=2, model_channels=8, slices=3)
    x = torch.randn(6, 5, 16, 24)
    assert torch.equal(conditioner(x), conditioner.rescaler(x))
    randomise(conditioner)
    other = x.clone()
    other[0] += torch.randn(5, 16, 24)
    change = (conditioner(x) - conditioner(other)).abs().flatten(1).amax(1)
    assert change[:3].min() > 1e-6 and change[3:].max() == 0
    assert conditioner(x).shape == (6, 6, 4, 6)


# ---- guide


def test_guide_keeps_the_size_and_refuses_odd_ones():
    guide = SegmentationGuide(**GUIDE, attention_levels=(1,))
    assert guide(torch.zeros(1, 2, 8, 4, 6)).shape == (1, 1, 8, 4, 6)
    with pytest.raises(ValueError, match="multiples of 2"):
        guide(torch.zeros(1, 2, 8, 5, 6))
    with pytest.raises(ValueError, match="norm groups"):
        SegmentationGuide(**GUIDE | {"norm_groups": 3})


def test_stored_timestep_projections_change_nothing_and_are_not_trained():
    """So that DistributedDataParallel finds no parameter without a gradient."""
    plain, theirs = SegmentationGuide(**GUIDE), SegmentationGuide(**GUIDE, timestep_projections=True)
    missing = theirs.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys and all(".time." in key for key in missing.missing_keys)
    x = torch.randn(1, 2, 4, 4, 4)
    assert torch.equal(plain(x), theirs(x))
    theirs(x).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in theirs.parameters())
