"""The averaging rule against its closed form and against a model that changes buffers."""

import io

import pytest
import torch
from torch import nn

from common.ema import EMA


def model(value=0.0):
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    set_all(net, value)
    return net


@torch.no_grad()
def set_all(net, value):
    for tensor in net.state_dict().values():
        tensor.fill_(value)


def test_copies_then_averages_without_bias_correction():
    """As golden il_cldm/ema_boundary: raw weight (k - 2000) / 100 at call k, decay 0.9999, 2000 copies first."""
    net = nn.Linear(1, 1, bias=False)
    ema = EMA(net, 0.9999, 2000)
    got = {}
    for k in range(1, 3001):
        set_all(net, (k - 2000) / 100)
        ema.update(net)
        got[k] = ema.module.weight.item()
    assert got[1] == pytest.approx(-19.99) and got[1999] == pytest.approx(-0.01) and got[2000] == 0
    average = 0.0  # float64
    for k in range(2001, 3001):
        average = 0.9999 * average + 0.0001 * (k - 2000) / 100
        assert got[k] == pytest.approx(average, abs=2e-5)
    assert got[3000] == pytest.approx(0.48424, abs=1e-4)


def test_buffers_keep_the_last_copied_value():
    """As golden il_cldm/ema_rule: the first calls copy the whole state, then only parameters follow."""
    net = model()
    ema = EMA(net, 0.9, 3)
    for k in range(1, 7):
        set_all(net, k)
        ema.update(net)
    expected = 3.0
    for k in (4, 5, 6):
        expected = 0.9 * expected + 0.1 * k
    for name, tensor in ema.module.state_dict().items():
        buffer = "running" in name or "tracked" in name
        torch.testing.assert_close(tensor.double(), torch.full_like(tensor.double(), 3 if buffer else expected))


def test_from_the_first_step():
    net = model(1.0)
    ema = EMA(net, 0.5)
    set_all(net, 2.0)
    ema.update(net)
    assert (ema.module[0].weight == 1.5).all() and (ema.module[1].running_mean == 1).all()


def test_copy_is_apart_from_the_model():
    net = model(1.0).train()
    ema = EMA(torch.compile(net), 0.5)
    assert not ema.module.training and not any(p.requires_grad for p in ema.module.parameters())
    set_all(net, 2.0)
    assert (ema.module[0].weight == 1).all()
    assert list(ema.module.state_dict()) == list(net.state_dict())
    assert all(p.requires_grad for p in net.parameters()) and net.training


def test_state_round_trip_goes_on_alike():
    def advance(net, ema, steps):
        for k in steps:
            set_all(net, k * 0.1)
            ema.update(net)

    net = model()
    ema = EMA(net, 0.9, 3)
    advance(net, ema, range(2))
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    other = EMA(model(7.0), 0.9, 3)
    other.load_state_dict(torch.load(file, weights_only=True))
    advance(net, ema, range(2, 8))
    advance(net, other, range(2, 8))
    assert other.step == ema.step == 8
    for a, b in zip(ema.module.state_dict().values(), other.module.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError):
        EMA(nn.Linear(2, 2), 0.9).load_state_dict(ema.state_dict())
