"""Devices, seeds, signals and the batch stream in one process; processes working together are run under torchrun."""

import os
import random
import signal
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from common import runtime
from common.cli import UserError
from common.runtime import Runtime
from tests.helpers import ROOT, two_ranks

CPU = torch.device("cpu")


class Data:
    def __init__(self, n=10):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        index, position = key
        noise = torch.randn(2, generator=runtime.generator(5, "noise", position))
        return {"index": index, "position": position, "noise": noise, "pair": (torch.tensor([index]), str(index))}


def take(count, start_step=0, num_workers=0, rank=0, world_size=1, seed=3, batch_size=4):
    here = Runtime(CPU, rank=rank, world_size=world_size)
    batches = runtime.training_batches(Data(), batch_size, start_step, seed, here, num_workers)
    return [next(batches) for _ in range(count)]


def same(a, b):
    return all(torch.equal(x["position"], y["position"]) and torch.equal(x["index"], y["index"])
               and torch.equal(x["noise"], y["noise"]) for x, y in zip(a, b, strict=True))


def test_positions_cover_every_epoch_once():
    stream = [pair for step in range(15) for pair in runtime.batch_positions(10, 4, step, seed=1)]
    assert [position for _, position in stream] == list(range(60))
    epochs = [[index for index, position in stream if position // 10 == epoch] for epoch in range(6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert epochs[0] == [1, 8, 2, 4, 0, 6, 3, 7, 5, 9]
    assert runtime.batch_positions(10, 4, 0, seed=2) != stream[:4]


def test_full_batches_from_few_items():
    batch = runtime.batch_positions(3, 8, 1, seed=0)
    assert [position for _, position in batch] == list(range(8, 16))
    assert sorted(index for index, _ in batch[1:4]) == [0, 1, 2]
    with pytest.raises(UserError, match="empty"):
        runtime.batch_positions(0, 8, 0, seed=0)


def test_batches_depend_on_their_step_alone():
    whole = take(6)
    assert whole[0]["noise"].shape == (4, 2) and whole[0]["pair"][0].shape == (4, 1) and len(whole[0]["pair"][1]) == 4
    assert [whole[2]["index"][i].item() for i in range(4)] == [i for i, _ in runtime.batch_positions(10, 4, 2, 3)]
    assert same(take(3, start_step=3), whole[3:])
    assert same(take(6, num_workers=2), whole)
    assert same(take(2, start_step=4, num_workers=1), whole[4:])
    assert not same(take(6, seed=4), whole)


def test_slices_of_ranks_make_the_global_batch():
    parts = [take(5, rank=rank, world_size=2) for rank in range(2)]
    for step, whole in enumerate(take(5)):
        joined = torch.cat([parts[rank][step]["noise"] for rank in range(2)])
        assert torch.equal(joined, whole["noise"])
    with pytest.raises(UserError, match="batch size 4 cannot be divided among 3"):
        take(1, world_size=3)


def test_the_loader_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    first = torch.randn(3)
    torch.manual_seed(0)
    take(2), take(1, num_workers=1)
    assert torch.equal(torch.randn(3), first)


def test_local_slice_and_shard():
    x = torch.arange(8).reshape(4, 2)
    assert torch.equal(torch.cat([runtime.local_slice(x, Runtime(CPU, rank=r, world_size=2)) for r in range(2)]), x)
    assert torch.equal(runtime.local_slice(x, Runtime(CPU)), x)
    assert [Runtime(CPU, rank=r, world_size=3).shard("abcde") for r in range(3)] == ["ad", "be", "c"]


def test_generator_is_a_function_of_its_key():
    def draw(*key):
        return torch.rand(1, generator=runtime.generator(*key)).item()

    assert draw(1, "sub-7", 2) == draw(1, "sub-7", np.int64(2)) == pytest.approx(0.54962486, abs=1e-7)
    assert len({draw(1, "a"), draw(2, "a"), draw("1", "a"), draw(1, "a", 0), draw("a", 1), draw(1, "b")}) == 6


def test_start_seeds_everything():
    def draw(seed):
        with runtime.start("cpu", "fp32", seed) as here:
            assert here.device == CPU and here.world_size == 1 and here.is_main
            return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(3) == draw(3)
    assert all(a != b for a, b in zip(draw(3), draw(4), strict=True))


def test_one_process_touches_nothing_distributed():
    with runtime.start("cpu") as here:
        assert not torch.distributed.is_initialized()
        here.barrier()
        assert here.gather({"a": 1}) == [{"a": 1}]
        assert torch.equal(here.mean(torch.ones(2, requires_grad=True)), torch.ones(2))
        module = nn.Linear(2, 2)
        assert runtime.wrap_ddp(module, here) is module


def test_precision():
    x = nn.Linear(2, 2)
    for name, dtype in {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}.items():
        with runtime.start("cpu", name) as here:
            with here.autocast():
                assert x(torch.ones(1, 2)).dtype == dtype
            assert not here.grad_scaler().is_enabled()


@pytest.mark.parametrize(("device", "precision", "message"), [
    ("gpu", "auto", "expected auto, cpu"), ("cuda:x", "auto", "expected auto, cpu"), ("cpu:1", "auto", "expected auto"),
    ("cpu", "fp16", "not on the CPU"), ("cpu", "fp8", "expected auto, fp32"),
    ("cuda", "auto", "no usable cuda"), ("mps", "auto", "no usable mps"),
])
def test_what_is_not_there(monkeypatch, device, precision, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=message), runtime.start(device, precision):
        pass


def test_choice_of_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runtime._device("auto", 0, 1) == torch.device("cuda", 0)
    assert runtime._device("cuda", 1, 2) == torch.device("cuda", 1)
    assert runtime._device("cuda:1", 0, 1) == torch.device("cuda", 1)
    for name, local_rank, size in (("cuda:2", 0, 1), ("cuda", 2, 3), ("cuda:0", 1, 2)):
        with pytest.raises(UserError, match="--device"):
            runtime._device(name, local_rank, size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda():
    with runtime.start("auto", "fp16") as here:
        assert here.device == torch.device("cuda", 0) and here.grad_scaler().is_enabled()
        assert take(1)[0]["noise"].device == CPU
        assert next(runtime.training_batches(Data(), 4, 0, 0, here, 2))["noise"].is_pinned()
    with runtime.start("cuda:0", "auto") as here, here.autocast():
        assert nn.Linear(2, 2).cuda()(torch.ones(1, 2).cuda()).dtype == torch.bfloat16
    assert runtime.fused_optimizer_kwargs("cuda") == {"fused": True}


def test_stop_request():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with runtime.StopRequest() as stop:
        assert not stop.requested and not stop.agree(Runtime(CPU))
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.agree(Runtime(CPU)) and stop.exit_status == 143
    with runtime.StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and stop.exit_status == 130
        os.kill(os.getpid(), signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_unwrap_and_optimizer_arguments():
    module = nn.Linear(2, 2)
    assert runtime.unwrap(module) is module
    assert runtime.unwrap(torch.compile(module, backend="eager")) is module
    assert runtime.fused_optimizer_kwargs(CPU) == {}


RANKS = textwrap.dedent("""
    import os, sys
    sys.path.insert(0, {root!r})
    import torch
    from common import cli, runtime
    from common.cli import UserError

    def use(here, stop):
        assert here.world_size == 2 and here.rank == int(os.environ["RANK"])
        assert here.gather(("r", here.rank)) == [("r", 0), ("r", 1)]
        assert torch.equal(here.mean(torch.tensor([1.0 + here.rank])), torch.tensor([1.5]))
        assert sum(map(len, here.gather(here.shard(list(range(5)))))) == 5
        draws = here.gather(torch.rand(1).item())
        assert draws[0] == draws[1]
        with runtime.start("cpu") as inner:
            assert inner.rank == here.rank
        here.barrier()
        assert not stop.agree(here)
        stop.requested = here.rank == 1
        assert stop.agree(here)
        torch.manual_seed(here.rank)
        module = torch.nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(module.parameters())
        ddp = runtime.wrap_ddp(module, here)
        assert runtime.unwrap(ddp) is module and ddp is not module
        x = torch.arange(12.0).reshape(4, 3)
        ddp(runtime.local_slice(x, here)).mean().backward()
        assert torch.allclose(module.weight.grad, x.mean(0, keepdim=True))
        optimizer.step()
        stop.leave("use", 1, 2, here)

    def threads():
        return sorted(open(f"/proc/self/task/{{n}}/comm").read().strip() for n in os.listdir("/proc/self/task"))

    def main():
        for attempt in range(2):  # stages follow each other in one process
            try:
                with runtime.start("cpu", "auto", 3) as here, runtime.StopRequest() as stop:
                    use(here, stop)
            except SystemExit:  # as after a signal; the traceback held the DDP module
                assert not torch.distributed.is_initialized()
                if sys.platform == "linux":  # a gloo thread alive at exit may abort the process
                    assert not any("gloo" in name for name in threads()), threads()
            else:
                raise AssertionError("not left")
        print("fine", flush=True)
        with runtime.start("cpu") as here:
            if here.rank == 1:
                raise UserError("only rank 1 saw it")

    cli.run(main)
""")


@pytest.mark.slow
def test_two_ranks(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(root=str(ROOT)))
    result = two_ranks([script])
    assert result.stdout.count("fine") == 2, result.stderr
    assert result.stderr.count("error: only rank 1 saw it") == 1
