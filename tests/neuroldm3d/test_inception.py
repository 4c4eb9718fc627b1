"""Inception-v3 for FID, and MedicalNet: published names and shapes, pooling by closed form, input, weights files."""

import monai.networks.nets
import pytest
import torch

from common.cli import UserError
from neuroldm3d.diffusion import inception, medicalnet
from neuroldm3d.diffusion.inception import InceptionV3, load_inception, network_input, pool3

# Every convolution of the published files: block, then name: out x in x height x width.
STEM = (
    "Conv2d_1a_3x3 32 3 3 3, Conv2d_2a_3x3 32 32 3 3, Conv2d_2b_3x3 64 32 3 3, Conv2d_3b_1x1 80 64 1 1, "
    "Conv2d_4a_3x3 192 80 3 3"
)
A = (
    "branch1x1 64 {c} 1 1, branch5x5_1 48 {c} 1 1, branch5x5_2 64 48 5 5, branch3x3dbl_1 64 {c} 1 1, "
    "branch3x3dbl_2 96 64 3 3, branch3x3dbl_3 96 96 3 3, branch_pool {p} {c} 1 1"
)
B = "branch3x3 384 288 3 3, branch3x3dbl_1 64 288 1 1, branch3x3dbl_2 96 64 3 3, branch3x3dbl_3 96 96 3 3"
C = (
    "branch1x1 192 768 1 1, branch7x7_1 {w} 768 1 1, branch7x7_2 {w} {w} 1 7, branch7x7_3 192 {w} 7 1, "
    "branch7x7dbl_1 {w} 768 1 1, branch7x7dbl_2 {w} {w} 7 1, branch7x7dbl_3 {w} {w} 1 7, branch7x7dbl_4 {w} {w} 7 1, "
    "branch7x7dbl_5 192 {w} 1 7, branch_pool 192 768 1 1"
)
D = (
    "branch3x3_1 192 768 1 1, branch3x3_2 320 192 3 3, branch7x7x3_1 192 768 1 1, branch7x7x3_2 192 192 1 7, "
    "branch7x7x3_3 192 192 7 1, branch7x7x3_4 192 192 3 3"
)
E = (
    "branch1x1 320 {c} 1 1, branch3x3_1 384 {c} 1 1, branch3x3_2a 384 384 1 3, branch3x3_2b 384 384 3 1, "
    "branch3x3dbl_1 448 {c} 1 1, branch3x3dbl_2 384 448 3 3, branch3x3dbl_3a 384 384 1 3, "
    "branch3x3dbl_3b 384 384 3 1, branch_pool 192 {c} 1 1"
)
BLOCKS = {
    "": STEM,
    "Mixed_5b.": A.format(c=192, p=32),
    "Mixed_5c.": A.format(c=256, p=64),
    "Mixed_5d.": A.format(c=288, p=64),
    "Mixed_6a.": B,
    "Mixed_6b.": C.format(w=128),
    "Mixed_6c.": C.format(w=160),
    "Mixed_6d.": C.format(w=160),
    "Mixed_6e.": C.format(w=192),
    "Mixed_7a.": D,
    "Mixed_7b.": E.format(c=1280),
    "Mixed_7c.": E.format(c=2048),
}


def published_shapes(classes):
    """Names and shapes of a published weights file, without the batch counters."""
    shapes = {"fc.weight": (classes, 2048), "fc.bias": (classes,)}
    for block, text in BLOCKS.items():
        for line in text.split(", "):
            name, *shape = line.split()
            shape = tuple(map(int, shape))
            shapes[f"{block}{name}.conv.weight"] = shape
            for part in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{block}{name}.bn.{part}"] = shape[:1]
    return shapes


def make_weights(path, classes, **extra):
    """A weights file as published, with random values: old format, no batch counters."""
    g = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in published_shapes(classes).items():
        scale = (2 / torch.Size(shape[1:]).numel()) ** 0.5 if len(shape) > 1 else 0.1
        state[name] = scale * torch.randn(shape, generator=g) + (name.endswith("bn.weight"))
        if name.endswith("running_var"):
            state[name] = 1 + state[name].abs()
    torch.save(state | extra, path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture(scope="module")
def fid_weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05-6726825d.pth", 1008)


@pytest.mark.parametrize(
    ("variant", "classes", "count"), [("fid", 1008, 23_850_960), ("torchvision", 1000, 23_834_568)]
)
def test_names_shapes_and_parameter_count_are_the_published_ones(variant, classes, count):
    network = InceptionV3(variant)
    ours = {k: tuple(v.shape) for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert ours == published_shapes(classes)
    assert len([k for k in ours if k.endswith("conv.weight")]) == 94
    assert sum(p.numel() for p in network.parameters()) == count
    assert all(m.eps == 0.001 for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_weights_file_loads_strictly_and_its_hash_is_recorded(fid_weights, monkeypatch):
    network, record = load_inception("fid", fid_weights)
    state = torch.load(fid_weights, weights_only=True)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in state.items())
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert record["file"] == fid_weights.name and len(record["sha256"]) == 64
    assert record["published_file"] is False  # its digits are in the name of the true one
    monkeypatch.setitem(inception.FILES, "fid", f"any-{record['sha256'][:8]}.pth")
    assert load_inception("fid", fid_weights)[1]["published_file"] is True
    x = torch.rand(2, 40, 32)
    with torch.no_grad():
        features, maps = network(x), network.maps(network_input(x, "fid"))
    assert features.shape == (2, 2048) and maps.shape == (2, 2048, 8, 8) and features.min() >= 0
    assert torch.allclose(features, maps.mean((2, 3))) and not torch.allclose(features[0], features[1])


def test_torchvision_file_with_auxiliary_head_loads(tmp_path):
    path = make_weights(tmp_path / "inception_v3_google-0cc3c7bd.pth", 1000, **{"AuxLogits.fc.bias": torch.zeros(1000)})
    network, _ = load_inception("torchvision", path)
    assert network.variant == "torchvision"


def test_wrong_or_missing_weights_are_named(tmp_path, fid_weights):
    with pytest.raises(UserError, match="no Inception weights at .*none.pth.*6726825d.*--weights"):
        load_inception("fid", tmp_path / "none.pth")
    with pytest.raises(UserError, match="of another model"):
        load_inception("torchvision", fid_weights)  # 1008 classes
    state = torch.load(fid_weights, weights_only=True)
    for change in ("missing", "unexpected"):
        odd = dict(state)
        odd.pop("Mixed_7c.branch_pool.conv.weight") if change == "missing" else odd.update(more=torch.zeros(1))
        torch.save(odd, tmp_path / "odd.pth")
        with pytest.raises(UserError, match="odd.pth is of another model"):
            load_inception("fid", tmp_path / "odd.pth")
    (tmp_path / "cut.pth").write_bytes(fid_weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated, damaged"):
        load_inception("fid", tmp_path / "cut.pth")


def test_pooling_of_constants_and_impulses():
    ones = torch.ones(1, 1, 4, 5)
    assert torch.equal(pool3(ones, "avg_inside"), ones)
    counted = pool3(ones, "avg")[0, 0]
    assert counted[0, 0].item() == pytest.approx(4 / 9) and counted[0, 2].item() == pytest.approx(6 / 9)
    assert counted[2, 2].item() == pytest.approx(1)
    impulse = torch.zeros(1, 1, 5, 5)
    impulse[0, 0, 2, 2] = 1
    assert pool3(impulse, "max").sum() == 9 and pool3(impulse, "avg").sum().item() == pytest.approx(1)
    corner = torch.zeros(1, 1, 5, 5)
    corner[0, 0, 0, 0] = 1
    assert pool3(corner, "avg_inside")[0, 0, 0, 0].item() == pytest.approx(1 / 4)
    assert pool3(-ones, "max").eq(-1).all()  # padding is no zero to the maximum


def pool_branch(block, x):
    """Output of the pooling branch with its convolution made the mean over channels and its norm the identity."""
    conv, bn = block.branch_pool.conv, block.branch_pool.bn
    with torch.no_grad():
        conv.weight.fill_(1 / conv.in_channels)
        bn.weight.fill_(1)
        bn.bias.fill_(0)
        bn.running_mean.fill_(0)
        bn.running_var.fill_(1 - bn.eps)
        return block.eval()(x)[:, -conv.out_channels]


@pytest.mark.parametrize("variant", ["fid", "torchvision"])
def test_each_block_of_each_variant_pools_as_published(variant):
    """A, C and the first E block: averages without padding in the FID network only; its last E block: maxima."""
    network = InceptionV3(variant)
    averaging = ["Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"]
    if variant == "torchvision":
        averaging.append("Mixed_7c")
    corner = 1.0 if variant == "fid" else 4 / 9
    for name in averaging:
        block = network.get_submodule(name)
        channels = block.branch_pool.conv.in_channels
        found = pool_branch(block, torch.ones(1, channels, 5, 5))[0]
        assert found[0, 0].item() == pytest.approx(corner, rel=1e-5), name
        assert found[2, 2].item() == pytest.approx(1, rel=1e-5), name
        impulse = torch.zeros(1, channels, 5, 5)
        impulse[..., 2, 2] = 1
        assert pool_branch(block, impulse)[0, 2, 2].item() == pytest.approx(1 / 9, rel=1e-5), name
    if variant == "fid":
        impulse = torch.zeros(1, 2048, 5, 5)
        impulse[..., 2, 2] = 1
        found = pool_branch(network.Mixed_7c, impulse)[0]
        assert found.sum().item() == pytest.approx(9, rel=1e-5) and found[1, 1].item() == pytest.approx(1, rel=1e-5)


def test_input_range_and_resize():
    low, high = torch.zeros(1, 20, 30), torch.ones(1, 20, 30)
    assert network_input(low, "fid").shape == (1, 3, 299, 299)
    assert network_input(low, "fid").eq(-1).all() and network_input(high, "fid").eq(1).all()
    mean, sd = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(network_input(low, "torchvision")[0, :, 5, 5], -mean / sd)
    assert torch.allclose(network_input(high, "torchvision")[0, :, 5, 5], (1 - mean) / sd)
    # Half-pixel centres: output pixel i looks at (i + 0.5) * 23 / 299 - 0.5, and edges repeat.
    ramp = torch.arange(23.0).expand(1, 17, 23)
    expected = ((torch.arange(299) + 0.5) * 23 / 299 - 0.5).clamp(0, 22)
    assert torch.allclose((network_input(ramp, "fid")[0, 1, 100] + 1) / 2, expected, atol=1e-4)
    colour = torch.rand(2, 3, 10, 10)
    assert network_input(colour, "fid").shape == (2, 3, 299, 299)


# ---- MedicalNet


def monai_reference(depth):
    """MONAI's ResNet with MedicalNet's first stride and dilated last stages."""
    make = {10: monai.networks.nets.resnet10, 18: monai.networks.nets.resnet18, 50: monai.networks.nets.resnet50}[depth]
    reference = make(
        n_input_channels=1, conv1_t_stride=2, shortcut_type="A" if depth == 18 else "B", bias_downsample=False,
        feed_forward=False, spatial_dims=3,
    )  # fmt: skip
    for stage, dilation in (("layer3", 2), ("layer4", 4)):
        for module in reference.get_submodule(stage).modules():
            if isinstance(module, torch.nn.Conv3d):
                module.stride = (1, 1, 1)
                if module.kernel_size == (3, 3, 3):
                    module.dilation = module.padding = (dilation,) * 3
            if hasattr(module, "downsample") and not isinstance(module.downsample, torch.nn.Module):
                module.downsample = zero_channels if module.downsample is not None else None
    return reference.eval()


def zero_channels(x):
    return torch.cat([x, torch.zeros_like(x)], dim=1)


@pytest.mark.parametrize("depth", [10, 18, 50])
def test_medicalnet_equals_monai_with_dilated_stages(depth, tmp_path):
    torch.manual_seed(depth)
    reference = monai_reference(depth)
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    state = {f"module.{k}": v for k, v in reference.state_dict().items()}
    torch.save({"state_dict": state | {"module.conv_seg.0.weight": torch.zeros(1)}}, tmp_path / "resnet.pth")
    network, record = medicalnet.load_medicalnet(tmp_path / "resnet.pth")
    assert record["depth"] == depth and network.width == (2048 if depth == 50 else 512)
    x = torch.rand(2, 1, 24, 20, 28)
    with torch.no_grad():
        expected = reference(medicalnet.standardise(x))  # pooled
        assert expected.std() > 1e-2 and torch.allclose(network(x), expected, atol=1e-4)
        assert torch.allclose(network(3 * x + 1), network(x), atol=1e-4)  # intensities are standardised
    assert network(x).shape == (2, network.width)


def test_medicalnet_weights_missing_or_foreign(tmp_path):
    with pytest.raises(UserError, match="no MedicalNet weights at"):
        medicalnet.load_medicalnet(tmp_path / "none.pth")
    torch.save({"state_dict": {"module.conv1.weight": torch.zeros(64, 1, 7, 7, 7)}}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="odd.pth is of another model"):
        medicalnet.load_medicalnet(tmp_path / "odd.pth")


def test_standardise_uses_the_foreground_only():
    x = torch.zeros(1, 1, 4, 4, 4)
    x[..., 1:3, 1:3, 1:3] = torch.arange(1.0, 9.0).view(2, 2, 2)
    y = medicalnet.standardise(x)
    inside = y[..., 1:3, 1:3, 1:3]
    assert inside.mean().abs() < 1e-6 and inside.var(unbiased=False).item() == pytest.approx(1, rel=1e-5)
    assert y.count_nonzero() <= 8 and medicalnet.standardise(torch.zeros_like(x)).eq(0).all()
