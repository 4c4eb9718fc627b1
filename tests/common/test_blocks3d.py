import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from common.blocks3d import (
    SelfAttention3d,
    SyncBatchNorm3d,
    match_size,
    sinusoidal_embedding,
    sinusoidal_frequencies,
)


@pytest.mark.parametrize("endpoint", [False, True])
def test_frequencies_closed_form(endpoint):
    steps = 63 if endpoint else 64
    exact = [100.0 ** (-k / steps) for k in range(64)]
    assert sinusoidal_frequencies(64, max_period=100.0, endpoint=endpoint).tolist() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("cos_first", [False, True])
@pytest.mark.parametrize("endpoint", [False, True])
@pytest.mark.parametrize("dim", [32, 7])
def test_embedding_agrees_with_diffusers(dim, endpoint, cos_first):
    t = torch.tensor([0, 1, 17, 500, 999])
    ours = sinusoidal_embedding(t, dim, endpoint=endpoint, cos_first=cos_first)
    theirs = get_timestep_embedding(t, dim, flip_sin_to_cos=cos_first, downscale_freq_shift=float(endpoint))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_embedding_blocks_and_own_frequencies():
    t = torch.tensor([3.0, 10.0])
    e = sinusoidal_embedding(t, 5, frequencies=torch.tensor([1.0, 0.5]))
    assert e[1].tolist() == pytest.approx([math.sin(10), math.sin(5), math.cos(10), math.cos(5), 0.0], abs=1e-6)


def test_attention_is_softmax_over_all_voxels():
    torch.manual_seed(0)
    layer, x = SelfAttention3d(8, 4).double(), torch.randn(2, 8, 2, 3, 4, dtype=torch.float64)
    h = F.group_norm(x, 4, layer.norm.weight, layer.norm.bias).flatten(2)  # (B, C, N)
    q, k, v = torch.einsum("oc,bcn->bon", layer.qkv.weight.flatten(1), h).split(8, dim=1)
    weights = (torch.einsum("bci,bcj->bij", q, k) / math.sqrt(8)).softmax(-1)
    mixed = torch.einsum("bij,bcj->bci", weights, v)
    out = torch.einsum("oc,bcn->bon", layer.out.weight.flatten(1), mixed) + layer.out.bias[:, None]
    torch.testing.assert_close(layer(x), x + out.reshape(x.shape))
    assert layer.qkv.bias is None


def test_match_size():
    x = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1)
    assert match_size(x, (2, 1, 1)) is x
    assert match_size(x, torch.Size((4, 1, 1))).flatten().tolist() == [0.0, 0.25, 0.75, 1.0]  # half-pixel centres


def test_batch_norm_alone_is_the_ordinary_one():
    ours, theirs, x = SyncBatchNorm3d(3), nn.BatchNorm3d(3), torch.randn(2, 3, 4, 4, 4)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)


def _inputs(split):
    g = torch.Generator().manual_seed(1)
    x = 5.0 + torch.randn(4, 3, 2, 3, 4, generator=g)
    x[2:] *= 3.0  # so that the halves have other statistics than the whole
    return x, torch.randn(x.shape, generator=g), [slice(0, split), slice(split, 4)]


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(3, 3, 1), SyncBatchNorm3d(3), nn.Tanh())


def _step(model, x, target):
    """Two forward passes (the second moves the running statistics again), gradients of the second."""
    model(x)
    x = x.clone().requires_grad_()
    y = model(x)
    F.mse_loss(y, target).backward()
    return y.detach(), x.grad, [p.grad for p in model.parameters()], [b.clone() for b in model.buffers()]


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for split in (2, 3):
        x, target, shares = _inputs(split)
        y, x_grad, grads, buffers = _step(_network(), x[shares[rank]], target[shares[rank]])
        for grad in grads:
            dist.all_reduce(grad)
            grad /= 2
        torch.save((y, x_grad, grads, buffers), f"{folder}/rank{rank}_{split}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(_rank, args=(str(folder),), nprocs=2, start_method="spawn")
    return folder


@pytest.mark.parametrize("split", [2, 3])
def test_batch_norm_on_two_ranks_equals_the_whole_batch(two_ranks, split):
    ranks = [torch.load(two_ranks / f"rank{rank}_{split}.pt") for rank in range(2)]
    x, target, _ = _inputs(split)
    y, x_grad, grads, buffers = _step(_network(), x, target)
    torch.testing.assert_close(torch.cat([r[0] for r in ranks]), y)
    for rank in ranks:
        torch.testing.assert_close(rank[3], buffers)
        assert rank[3][2] == 2  # passes counted once, not once per rank
    if split == 2:  # equal shares: the mean of both losses is the loss of the whole
        torch.testing.assert_close(torch.cat([r[1] for r in ranks]) / 2, x_grad)
        for rank in ranks:
            torch.testing.assert_close(rank[2], grads, atol=1e-6, rtol=1e-4)
