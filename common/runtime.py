"""Device, precision, seeds, processes and the endless batch stream; nothing distributed happens in a single process."""

import functools
import gc
import hashlib
import importlib
import inspect
import itertools
import json
import math
import os
import random
import signal
import sys
import threading
import traceback
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.cli import UserError


@dataclass(frozen=True)
class Runtime:
    """Where and how this process computes; `autocast_dtype` None means float32."""

    device: torch.device
    autocast_dtype: torch.dtype | None = None
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    cpu_group: object = field(default=None, repr=False)  # gloo group: control messages never wait for the GPU

    @property
    def is_main(self):
        return self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, self.autocast_dtype) if self.autocast_dtype else nullcontext()

    def grad_scaler(self):
        """Loss scaler, active in fp16 only; its state belongs into the checkpoint."""
        return torch.amp.GradScaler(self.device.type, enabled=self.autocast_dtype == torch.float16)

    def shard(self, items):
        """Every `world_size`-th item, beginning with this rank's."""
        return items[self.rank :: self.world_size]

    def print(self, message):
        """One line on rank 0, without breaking a progress bar."""
        if self.is_main:
            tqdm.write(str(message))

    def barrier(self):
        if self.world_size > 1:
            dist.barrier(group=self.cpu_group)

    def gather(self, obj):
        """The objects of all ranks in rank order, on every rank; must be picklable and on the CPU."""
        objects = [obj] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(objects, obj, group=self.cpu_group)
        return objects

    def mean(self, tensor):
        """The tensor averaged over the ranks, detached."""
        tensor = tensor.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(tensor)
            tensor /= self.world_size
        return tensor


_starts = itertools.count()


@contextmanager
def start(device="auto", precision="auto", seed=0):
    """Runtime for the `with` block: seeds everything, alike on all ranks, and joins the launcher's processes, if any.

    `auto` is CUDA or CPU (mps only on request); under torchrun `cuda` is GPU number LOCAL_RANK. Raises UserError for
    a device or precision that is not there.
    """
    env = os.environ
    launched = "RANK" in env and "WORLD_SIZE" in env
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    rank, world_size, local_rank, local_size = (int(env.get(n, d) if launched else d) for n, d in names.items())
    device = _device(device, local_rank, local_size)
    dtype = _autocast_dtype(device, precision)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32; cuDNN convolutions use it by default
        torch.backends.cudnn.benchmark = True
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)

    group = None
    joins = launched and not dist.is_initialized()  # a nested start shares the outer one's group
    if joins:  # the long timeout lets one rank do slow work alone; a dead rank is noticed by the launcher at once
        importlib.import_module("torch.distributed.nn")  # imported later, its default arguments would keep the group
        store = dist.PrefixStore(f"start/{next(_starts)}", _store())  # else a second start finds old addresses
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2),
                                store=store, rank=rank, world_size=world_size)
    if launched and device.type == "cuda":
        group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
    # oneDNN's bf16 convolutions on a CPU (torch 2.13) now and then give NaN weight gradients: slower kernels instead
    faulty = device.type == "cpu" and dtype is not None
    try:
        with torch.backends.mkldnn.flags(enabled=False) if faulty else nullcontext():
            yield Runtime(device, dtype, rank, world_size, local_rank, group)
    finally:
        if joins:
            _leave_group(sys.exc_info()[1])


@functools.cache
def _store():
    """The launcher's key-value store; rank 0 may be its server and must not close it between two starts."""
    return next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))[0]


def _leave_group(error):
    """End the process group and its threads.

    A gloo thread that lets go of its last tensor while the interpreter shuts down aborts the process. Only a group
    that nobody refers to joins its threads: neither a DDP module in a cycle nor one in a traceback may be left.
    """
    if error is not None:
        traceback.clear_frames(error.__traceback__)
    gc.collect()
    dist.destroy_process_group()


def _device(name, local_rank, local_world_size):
    kind, _, number = name.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "cuda", "mps") or (number and (kind != "cuda" or not number.isdigit())):
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    if kind != "cpu" and not (torch.cuda if kind == "cuda" else torch.backends.mps).is_available():
        raise UserError(f"--device {name}: this machine has no usable {kind} device, use --device cpu")
    if kind != "cuda":
        return torch.device(kind)
    if number and local_world_size > 1:
        raise UserError(f"--device {name}: under torchrun each process takes its own GPU, use --device cuda")
    index, count = int(number or local_rank), torch.cuda.device_count()
    if index >= count:
        raise UserError(f"--device {name}: GPU number {index} asked for, but there are only {count}")
    return torch.device("cuda", index)


def _autocast_dtype(device, precision):
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise UserError(f"--precision {precision}: expected auto, fp32, bf16 or fp16")
    bf16_ok = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not bf16_ok:
        raise UserError("--precision bf16: this GPU does not support it, use fp16 or fp32")
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16: not on the CPU, use bf16 or fp32")
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and bf16_ok else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


class StopRequest:
    """Within the `with` block SIGTERM and SIGINT only set `.requested`; a second SIGINT raises KeyboardInterrupt.

    The loop asks `agree(runtime)` after each step, saves, and leaves with `sys.exit(stop.exit_status)`: 143 for
    SIGTERM, 130 for SIGINT, so that neither later stages nor `a && b` in a shell take the run for finished.
    """

    def __init__(self):
        self.requested, self.signal, self._previous = False, signal.SIGTERM, {}

    @property
    def exit_status(self):
        return 128 + self.signal

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def leave(self, what, step, last_step, runtime):
        """After a signal end the program here, so that nothing goes on with half a training; a collective call."""
        if self.agree(runtime):
            runtime.print(f"{what}: stopped on request at step {step} of {last_step}; the same command continues")
            raise SystemExit(self.exit_status)

    def _handle(self, number, _frame):
        if number == signal.SIGINT and self.requested and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self.signal = True, signal.Signals(number)

    def agree(self, runtime):
        """True on all ranks if any rank got a signal; a collective call."""
        if runtime.world_size == 1:
            return self.requested
        flag = torch.tensor([int(self.requested)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=runtime.cpu_group)
        return bool(flag)


def generator(*key):
    """CPU generator of a key of ints and strings, e.g. `generator(seed, "sub-7", k)`, whatever the order and batch."""
    digest = hashlib.sha256(json.dumps(key, default=int).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@functools.lru_cache(maxsize=4)
def _epoch_order(n, epoch, seed):
    return torch.randperm(n, generator=generator(seed, "epoch", epoch)).tolist()


def batch_positions(n, batch_size, step, seed):
    """[(index, position)] of batch `step` (from 0) in an endless stream of shuffled epochs over n items; always full.

    `position` is the running number of the sample: epoch = position // n. Raises UserError for n = 0.
    """
    if n < 1:
        raise UserError("the data set is empty: check the split file and the data folder")
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [(_epoch_order(n, p // n, seed)[p % n], p) for p in positions]


def training_batches(dataset, batch_size, start_step, seed, runtime, num_workers):
    """Endless collated batches from `start_step` on; `batch_size` is global, each rank gets its contiguous slice.

    Calls `dataset[(index, position)]`; randomness there should come from `generator(seed, position)`, then a batch
    depends on its step alone and not on workers, ranks or resuming. Raises UserError if ranks cannot share equally.
    """
    part = _equal_part(batch_size, runtime)

    def batches():
        step = start_step
        while True:
            yield batch_positions(len(dataset), batch_size, step, seed)[part]
            step += 1

    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=batches(), num_workers=num_workers, worker_init_fn=_ignore_signals,
        pin_memory=runtime.device.type == "cuda",
        generator=generator(seed, "workers"))  # else the loader draws from the global one, which resuming would show
    return iter(loader)  # endless, so the workers persist


def _ignore_signals(_worker):
    """Signals reach the whole process group; the workers go on until the main process has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _equal_part(n, runtime):
    if n % runtime.world_size:
        raise UserError(f"batch size {n} cannot be divided among {runtime.world_size} processes: choose a multiple")
    size = n // runtime.world_size
    return slice(runtime.rank * size, (runtime.rank + 1) * size)


def local_slice(tensor, runtime):
    """This rank's slice of a tensor (B, ...) that all ranks drew alike for the whole global batch."""
    return tensor[_equal_part(len(tensor), runtime)]


def wrap_ddp(module, runtime, find_unused_parameters=False):
    """DistributedDataParallel over several ranks, otherwise the module itself.

    Buffers are not broadcast: synchronised norms keep them equal, and a discriminator may run twice per step.
    """
    if runtime.world_size == 1 or not any(p.requires_grad for p in module.parameters()):
        return module
    devices = [runtime.device] if runtime.device.type == "cuda" else None
    # 2.13 warns of the old name, older torch may lack the new one
    new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    no_broadcast = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}
    return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True,
                                   find_unused_parameters=find_unused_parameters, **no_broadcast)


def unwrap(module):
    """The plain module inside DistributedDataParallel and torch.compile, so that names in checkpoints stay the same."""
    while isinstance(module, DistributedDataParallel) or hasattr(module, "_orig_mod"):
        module = module.module if isinstance(module, DistributedDataParallel) else module._orig_mod
    return module


def fused_optimizer_kwargs(device):
    return {"fused": True} if torch.device(device).type == "cuda" else {}


def memory_layout(channels_last):
    return torch.channels_last_3d if channels_last else torch.contiguous_format


def frozen_network(network, runtime, channels_last=False):
    """The network on its device, in eval mode, without gradients."""
    return network.to(runtime.device, memory_format=memory_layout(channels_last)).eval().requires_grad_(False)


def micro_batches(n, *tensors):
    """The tensors (B, ...) in n equal parts, side by side; None stays None."""
    return zip(*([None] * n if x is None else x.chunk(n) for x in tensors), strict=True)


def update_weights(scaler, clip_grad, **pairs):
    """One step of each name=(optimizer, network) that got gradients; their unscaled norms before clipping, by name.

    clip_grad: largest gradient norm, 0 does not clip.
    """
    norms = {}
    for name, (optimizer, network) in pairs.items():
        if any(p.grad is not None for p in network.parameters()):
            scaler.unscale_(optimizer)
            norms[name] = torch.nn.utils.clip_grad_norm_(network.parameters(), clip_grad or math.inf)
            scaler.step(optimizer)
    scaler.update()
    return norms


class SavedBytes:
    """Counts what autograd keeps for the backward pass; on the meta device that costs neither time nor memory."""

    def __enter__(self):
        self.storages = {}
        self.kept = []  # keeps storages alive, so that none is counted under a recycled address
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = tensor.numel() * tensor.element_size()
        self.kept.append(storage)
        return tensor

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    @property
    def total(self):
        return sum(self.storages.values())
