"""The classifiers' networks: sizes, names, batch norm over ranks, published and original weights."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from common import checkpoint, runtime
from common.cli import UserError
from neuroldm3d import upstream
from neuroldm3d.classifier import trainer
from neuroldm3d.classifier.model import (
    CNN3D,
    DROP_PATH,
    FILTERS,
    EfficientNetV2L,
    StochasticDepth,
    SyncBatchNorm2d,
    check_input_size,
    load_imagenet,
)
from tests.helpers import ROOT

# Parameters of the nine stages and of the head, from the spec's table 4.4.
STAGE_PARAMETERS = (33_184, 37_120, 1_032_320, 2_390_336, 3_553_224, 14_501_728, 54_866_360, 40_030_496, 821_760)


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


def small_2d(in_channels=6):
    return EfficientNetV2L(in_channels, 0.0, 0.2, width=0.125, depth=0.05)


@pytest.fixture(scope="module")
def published():
    with torch.device("meta"):
        return EfficientNetV2L(115, 0.3, DROP_PATH)


def test_published_parameter_counts(published):
    assert n_parameters(published) == 117_267_809
    assert tuple(n_parameters(stage) for stage in published.features) == STAGE_PARAMETERS
    assert n_parameters(published.classifier) == 1281
    with torch.device("meta"):
        assert n_parameters(CNN3D(FILTERS, 0.2)) == 6_451_521


def test_published_shapes_of_the_stages(published):
    x, shapes = torch.zeros(2, 115, 128, 128, device="meta"), []
    for stage in published.features:
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(32, 64, 64), (32, 64, 64), (64, 32, 32), (96, 16, 16), (192, 8, 8), (224, 8, 8), (384, 4, 4),
                      (640, 4, 4), (1280, 4, 4)]  # fmt: skip


def test_drop_path_rises_linearly_over_79_blocks(published):
    rates = published.drop_path_rates()
    assert len(rates) == 79 and rates[0] == 0
    assert rates[-1] == pytest.approx(0.2 * 78 / 79)
    assert torch.tensor(rates, dtype=torch.float64).diff().std() < 1e-12


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    layer, x = StochasticDepth(0.25), torch.ones(4000, 2, 3, 3)
    y = layer.train()(x)
    dropped = (y.flatten(1) == 0).all(1)
    assert ((y.flatten(1) == 0).any(1) == dropped).all()  # never a part of a sample
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.03) and y.mean() == pytest.approx(1, abs=0.04)
    assert torch.equal(layer.eval()(x), x)


def test_stochastic_depth_is_active_in_training_only():
    torch.manual_seed(0)
    network, x = EfficientNetV2L(6, 0.0, 0.5, width=0.125, depth=0.2), torch.randn(8, 6, 32, 32)
    with torch.no_grad():
        assert torch.equal(network.eval()(x), network(x))
        assert not torch.equal(network.train()(x), network(x))


@pytest.mark.parametrize("network, shape", [(small_2d(), (3, 6, 33, 40)), (CNN3D((4, 8), 0.1), (3, 9, 12, 10))])
def test_logits_and_features(network, shape):
    x = torch.randn(shape)
    features = network.eval().features(x if isinstance(network, EfficientNetV2L) else x[:, None])
    assert features.ndim == 2 and len(features) == 3
    assert network(x).shape == (3, 1) and torch.isfinite(network(x)).all()


def test_3d_input_with_and_without_channel_axis():
    """Fact 3: the same stack serves both networks, (S, h, w) and (1, S, h, w)."""
    network, x = CNN3D((4, 8), 0.0).eval(), torch.randn(2, 9, 12, 10)
    assert torch.equal(network(x), network(x[:, None]))


def test_volumes_too_small_for_the_3d_network_are_refused():
    settings = {"model": "3d", "filters": (4, 4, 4, 4)}
    check_input_size(settings, (15, 16, 20))
    assert CNN3D((4, 4, 4, 4), 0.0).eval()(torch.zeros(1, 15, 16, 20)).shape == (1, 1)
    with pytest.raises(UserError, match="15 voxels per axis; give fewer --filters"):
        check_input_size(settings, (14, 16, 20))


def test_batch_norm_of_slices_is_torchs_in_one_process():
    torch.manual_seed(0)
    ours, theirs, x = SyncBatchNorm2d(5, eps=1e-3), nn.BatchNorm2d(5, eps=1e-3), torch.randn(4, 5, 6, 7)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(i) for layer, i in zip((ours, theirs), inputs, strict=True)]
    for y in outputs:
        (y**3).sum().backward()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*[i.grad for i in inputs])
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


# ---- weights from elsewhere


@pytest.fixture
def imagenet(tmp_path):
    """A file with torchvision's names and shapes: another stem, another head; a narrow stand-in for the real one."""
    torch.manual_seed(1)
    state = EfficientNetV2L(3, 0.2, 0.2, width=0.125, depth=0.05).state_dict()
    state |= {"classifier.1.weight": torch.randn(1000, 160), "classifier.1.bias": torch.randn(1000)}
    checkpoint.save(tmp_path / "imagenet.pth", state)
    return tmp_path / "imagenet.pth"


def test_published_weights_fill_everything_but_stem_and_head(imagenet):
    network, published = small_2d(), checkpoint.load(imagenet)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    load_imagenet(network, imagenet)
    fresh = {"features.0.0.weight", "classifier.1.weight", "classifier.1.bias"}
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key] if key in fresh else published[key]), key
    assert not torch.equal(before["features.1.0.block.0.0.weight"], published["features.1.0.block.0.0.weight"])


def test_weights_of_another_network_are_refused(imagenet, tmp_path):
    with pytest.raises(UserError, match="no efficientnet_v2_l weights file of torchvision"):
        load_imagenet(EfficientNetV2L(6, 0.0, 0.2, width=0.25, depth=0.05), imagenet)
    checkpoint.save(tmp_path / "other.pth", {"layer.weight": torch.zeros(2)})
    with pytest.raises(UserError, match="other.pth is no efficientnet"):
        load_imagenet(small_2d(), tmp_path / "other.pth")


def test_backbone_has_torchvisions_names(published):
    """The names of the original's checkpoint are torchvision's behind "backbone.", and ours without it."""
    case = json.loads((ROOT / "tests" / "golden" / "neuroldm3d" / "efficientnet_small_input.json").read_text())
    assert [f"backbone.{key}" for key in published.state_dict()] == list(case["keys"])
    assert {key: list(v.shape) for key, v in upstream.to_upstream(published).items()} == case["keys"]


def test_checkpoints_of_the_original_load(tmp_path):
    """best_model.pth of the original: NumPy scalars beside the weights, so only behind --trust_pickle (D19)."""
    torch.manual_seed(2)
    network = CNN3D((4, 8), 0.2)
    content = {"epoch": 3, "model_state_dict": upstream.to_upstream(network), "optimizer_state_dict": {},
               "metrics": {"auc_roc": np.float64(0.9)}}  # fmt: skip
    torch.save(content, tmp_path / "best_model.pth")
    rt = runtime.Runtime(torch.device("cpu"))
    with pytest.raises(UserError, match="trust_pickle"):
        trainer.load_classifier(tmp_path / "best_model.pth", rt)
    loaded, saved = trainer.load_classifier(tmp_path / "best_model.pth", rt, trust_pickle=True)
    x = torch.randn(2, 9, 12, 10)
    assert torch.equal(loaded(x), network.eval()(x))
    assert saved["preparation"]["norm"] == "zscore" and saved["pad"] == "zero" and saved["seen"] is None
