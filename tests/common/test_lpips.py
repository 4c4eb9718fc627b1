"""LPIPS on its three backbones: sizes, definition, weights from files."""

import pytest
import torch
import torch.nn.functional as F

from common.cli import UserError
from common.lpips import BACKBONES, LPIPS, SCALE, SHIFT, SMALLEST

NETS = sorted(BACKBONES)
SIZES = {"alex": (2_470_848, 1_152), "vgg": (14_716_160, 1_472), "squeeze": (724_736, 2_240)}  # in all, in the heads


def lpips_of(net, seed=0):
    """Random weights; heads are positive, as trained ones are."""
    torch.manual_seed(seed)
    return LPIPS(net).eval()


@pytest.mark.parametrize("net", NETS)
def test_published_sizes_and_nothing_trains(net):
    with torch.device("meta"):
        lpips = LPIPS(net)
    counts = (sum(p.numel() for p in lpips.parameters()), sum(head.numel() for head in lpips.heads))
    assert counts == SIZES[net]
    assert not any(p.requires_grad for p in lpips.parameters())


@pytest.mark.parametrize("net", ["vgg", "squeeze"])
def test_a_distance_of_unit_activations(net):
    lpips = lpips_of(net)
    a, b = torch.randn(2, 1, 20, 24), torch.randn(2, 1, 20, 24)
    assert lpips(a, a).tolist() == [0.0, 0.0]
    assert (lpips(a, b) > 0).all()
    assert torch.allclose(lpips(a, b), lpips(b, a))
    for found in lpips.activations(a):
        length = found.norm(dim=1)
        assert torch.allclose(length[length > 0], torch.ones(()), atol=1e-5)


def test_squeezenet_written_out():
    """SqueezeNet 1.1 layer by layer, and the sum over seven depths."""
    lpips = lpips_of("squeeze")
    weights = lpips.state_dict()

    def conv(x, name, **options):
        return F.relu(F.conv2d(x, weights[f"features.{name}.weight"], weights[f"features.{name}.bias"], **options))

    def fire(x, k):
        h = conv(x, f"{k}.squeeze")
        return torch.cat([conv(h, f"{k}.expand1x1"), conv(h, f"{k}.expand3x3", padding=1)], dim=1)

    def depths(image):
        def pool(x):
            return F.max_pool2d(x, 3, 2, ceil_mode=True)

        shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (SHIFT, SCALE))
        h = conv((image.expand(-1, 3, -1, -1) - shift) / scale, "0", stride=2)
        found = [h]
        h = fire(fire(pool(h), 3), 4)
        found.append(h)
        h = fire(fire(pool(h), 6), 7)
        found.append(h)
        h = pool(h)
        for k in (9, 10, 11, 12):
            h = fire(h, k)
            found.append(h)
        return [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in found]

    a, b = torch.randn(3, 1, 37, 28), torch.randn(3, 1, 37, 28)
    expected = 0
    for x, y, head in zip(depths(a), depths(b), lpips.heads, strict=True):
        expected = expected + ((x - y) ** 2 * head).sum(1).mean((1, 2))
    assert torch.allclose(lpips(a, b), expected, rtol=1e-5)


@pytest.mark.parametrize("net", NETS)
def test_smallest_image(net):
    lpips, side = lpips_of(net), SMALLEST[net]
    assert lpips.smallest == side
    image = torch.randn(1, 1, side, side)
    assert torch.isfinite(lpips(image, -image)).all()
    with pytest.raises(RuntimeError):
        lpips(image[..., 1:, 1:], image[..., 1:, 1:])


def write_files(folder, net):
    """Files as torchvision and the lpips package write them: (LPIPS, backbone, heads, both in one)."""
    lpips = lpips_of(net, seed=3)
    state = {key: value for key, value in lpips.state_dict().items() if key.startswith("features")}
    backbone = state | {"classifier.1.weight": torch.zeros(3, 3)}
    heads = {f"lin{i}.model.1.weight": head.data for i, head in enumerate(lpips.heads)}
    whole = {f"net.slice1.{key.removeprefix('features.')}": value for key, value in state.items()} | heads
    paths = [folder / f"{name}.pth" for name in ("backbone", "heads", "whole")]
    for path, content in zip(paths, (backbone, heads, whole), strict=True):
        torch.save(content, path)
    return lpips, *paths


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_weights_from_two_files_or_one(tmp_path, net):
    lpips, backbone, heads, whole = write_files(tmp_path, net)
    for paths in ([backbone, heads], [heads, backbone], [whole]):
        loaded = LPIPS(net).load(paths)
        for key, value in lpips.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key


def test_files_that_do_not_fit(tmp_path):
    _, backbone, heads, whole = write_files(tmp_path, "squeeze")
    with pytest.raises(UserError, match="no head 0 of squeeze"):
        LPIPS("squeeze").load([backbone])
    with pytest.raises(UserError, match="no backbone 0.weight of squeeze"):
        LPIPS("squeeze").load([heads])
    with pytest.raises(UserError, match="of alex"):
        LPIPS("alex").load([whole])
    with pytest.raises(UserError, match="absent.pth does not exist"):
        LPIPS("squeeze").load([backbone, tmp_path / "absent.pth"])
