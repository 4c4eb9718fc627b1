"""Loss terms of the autoencoder."""

import pytest
import torch
from torch import nn

from common.cli import UserError
from common.lpips import LPIPS
from ldae import losses
from ldae.losses import SliceLPIPS


class Counted(nn.Module):
    """A distance that remembers the slices it saw."""

    def __init__(self):
        super().__init__()
        self.shapes, self.values = [], []

    def forward(self, a, b):
        self.shapes += [tuple(a.shape[1:])] * len(a)
        self.values += a.mean((1, 2, 3)).tolist()
        return (a - b).square().mean((1, 2, 3))


def test_reconstruction_and_kl():
    assert losses.reconstruction_loss(torch.tensor([1.0, -3.0]), torch.zeros(2)).item() == 2.0
    shape = (2, 3, 4, 5, 4)
    ones, zeros = torch.ones(shape), torch.zeros(shape)
    assert losses.kl_divergence(zeros, zeros).item() == 0.0
    assert losses.kl_divergence(ones, zeros).item() == pytest.approx(0.5 * 240)  # a sum, averaged over the batch
    q = torch.distributions.Normal(torch.full((1, 7), 0.3), 0.6)
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum()
    assert losses.kl_divergence(q.loc, 2 * q.scale.log()).item() == pytest.approx(expected.item(), rel=1e-6)


def test_least_squares_adversarial_losses():
    fake, real = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([1.0, 0.0])
    assert losses.generator_loss(fake).item() == pytest.approx((1 + 0 + 4) / 3)
    assert losses.discriminator_loss(fake, real).item() == pytest.approx(0.5 * (10 / 3 + 0.5))
    assert losses.discriminator_loss(torch.zeros(4), torch.ones(4)).item() == 0.0


def test_all_slices_of_three_axes_axes_weigh_the_same():
    distance, x = Counted(), torch.randn(2, 1, 6, 9, 4)
    got = SliceLPIPS(distance, value_range=None)(x, torch.zeros_like(x))
    assert [distance.shapes.count((1, *size)) for size in ((9, 4), (6, 4), (6, 9))] == [12, 18, 8]
    assert got.shape == () and got.item() == pytest.approx(x.square().mean().item(), rel=1e-5)
    summed = SliceLPIPS(distance, value_range=None, sum_axes=True)(x, torch.zeros_like(x))
    assert summed.item() == pytest.approx(3 * got.item(), rel=1e-6)


def test_values_are_brought_to_the_range_that_lpips_expects():
    seen = []

    class Seen(nn.Module):
        def forward(self, a, b):
            seen.append((a.min().item(), a.max().item()))
            return (a - b).square().mean((1, 2, 3))

    x = torch.linspace(0, 1, 64).view(1, 1, 4, 4, 4)
    SliceLPIPS(Seen(), slice_batch=999)(x, 1 - x)
    assert seen == [(-1.0, 1.0)] * 3
    seen.clear()
    SliceLPIPS(Seen(), value_range=None)(x, 1 - x)
    assert seen == [(0.0, 1.0)] * 3


def test_share_of_slices_is_drawn_by_the_generator_without_replacement():
    distance, x = Counted(), torch.randn(1, 1, 20, 10, 30)
    half = SliceLPIPS(distance, value_range=None, slice_fraction=0.5)
    half(x, x, torch.Generator().manual_seed(1))
    assert [distance.shapes.count(s) for s in ((1, 10, 30), (1, 20, 30), (1, 20, 10))] == [10, 5, 15]
    first = list(distance.values)
    assert len(set(first)) == 30
    for seed, same in ((1, True), (2, False)):
        distance.values.clear()
        half(x, x, torch.Generator().manual_seed(seed))
        assert (distance.values == first) is same
    fixed = half.draw(x.shape[2:], torch.Generator().manual_seed(1))
    distance.values.clear()
    half(x, x, slices=fixed)
    assert distance.values == first
    with pytest.raises(UserError, match="slice fraction"):
        SliceLPIPS(distance, slice_fraction=0.0)


def test_batches_of_slices_and_checkpointing_change_nothing():
    torch.manual_seed(0)
    lpips, b, results = LPIPS("squeeze").eval(), torch.rand(1, 1, 20, 24, 22), []
    for options in ({}, {"slice_batch": 7}, {"slice_batch": 7, "checkpointing": True}):
        a = b.flip(2).clone().requires_grad_()
        loss = SliceLPIPS(lpips, **options)(a, b)
        loss.backward()
        results.append((loss.item(), a.grad))
    for loss, grad in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert torch.allclose(grad, results[0][1], atol=1e-9, rtol=1e-4)
    assert results[0][1].abs().max() > 0


def test_weights_come_by_path_and_absence_is_said(tmp_path):
    with pytest.raises(UserError, match=r"squeeze and LPIPS weights.*--lpips_weights.*--perceptual_weight 0"):
        SliceLPIPS("squeeze")
    with pytest.raises(UserError, match="absent.pth does not exist"):
        SliceLPIPS("squeeze", [tmp_path / "absent.pth"])
    torch.manual_seed(1)
    lpips = LPIPS("squeeze")
    features = {key.removeprefix("features."): v for key, v in lpips.state_dict().items() if "features" in key}
    state = {f"net.slice1.{key}": value for key, value in features.items()}
    state |= {f"lin{i}.model.1.weight": head.data for i, head in enumerate(lpips.heads)}
    torch.save(state, tmp_path / "all.pth")
    a, b = torch.rand(1, 1, 17, 18, 19), torch.rand(1, 1, 17, 18, 19)
    assert SliceLPIPS("squeeze", tmp_path / "all.pth")(a, b) == SliceLPIPS(lpips)(a, b) > 0
    with pytest.raises(UserError, match="16x18x19 is too small.*17"):
        SliceLPIPS(lpips)(a[:, :, 1:], b[:, :, 1:])
