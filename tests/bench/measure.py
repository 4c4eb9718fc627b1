"""Time and peak memory of a call."""

import resource
import sys
import time
from pathlib import Path

import torch

ENOUGH_S = 10


def peak_gib(device) -> float:
    """Largest memory of this process so far: CUDA allocator on CUDA, else resident set (libraries included)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def measure(call, rt, repeats) -> dict:
    """Seconds of the fastest of `repeats` calls of `call()`, and the peak memory in GiB.

    The fastest, because other work on the machine only ever adds time. No new call begins after ENOUGH_S. The first
    call, which warms up, does not count, unless it alone takes that long: then nothing more is to be learned.
    """

    def timed():
        start = time.perf_counter()
        call()
        if rt.device.type == "cuda":
            torch.cuda.synchronize(rt.device)
        return time.perf_counter() - start

    first = timed()
    seconds = [first if first >= ENOUGH_S else timed()]
    while len(seconds) < repeats and sum(seconds) < ENOUGH_S:
        seconds.append(timed())
    return {"seconds": min(seconds), "calls": len(seconds), "peak_gib": peak_gib(rt.device)}


LAYOUTS = ("contiguous", "channels_last_3d")


def layout_table(results, names):
    """Lines: seconds and peak memory of each item by memory layout, and the ratio of the two times."""
    yield f"{'':24}{'contiguous':>12}{'peak GiB':>10}{'ch. last':>12}{'peak GiB':>10}{'ratio':>7}"
    for name in names:
        pair = [results.get(f"{name}, {layout}", {}) for layout in LAYOUTS]
        both = all("seconds" in r for r in pair)
        cells = [f"{r['seconds']:10.3f} s{r['peak_gib']:10.2f}" if "seconds" in r else f"{'-':>12}{'-':>10}"
                 for r in pair]
        yield f"{name:24}{cells[0]}{cells[1]}" + (f"{pair[1]['seconds'] / pair[0]['seconds']:7.2f}" if both else "")


def failures(results):
    """A line for each item that failed."""
    return [f"{name}: failed, {r['failed']}" for name, r in results.items() if "failed" in r]
