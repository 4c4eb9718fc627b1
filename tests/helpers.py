"""Running scripts as a user would: to the end, killed and resumed, stopped by a signal, on two ranks."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def _command(args, launcher=()):
    """Arguments of the interpreter; a script path counts from the repository root, wherever the test runs."""
    first, *rest = map(str, args)
    script = first if first.startswith("-") else str(ROOT / first)
    return [sys.executable, *launcher, script, *rest]


def run_main(module, *args):
    """`python <module> args...` in this process; UserError and SystemExit come through."""
    before, sys.argv = sys.argv, [module.__file__, *map(str, args)]
    try:
        module.main()
    finally:
        sys.argv = before


def run_script(args, cwd=None, env=None, timeout=600, launcher=()):
    """Run `python args...`; returns CompletedProcess with text output and checks nothing."""
    return subprocess.run(_command(args, launcher), cwd=cwd, env={**os.environ, **(env or {})}, timeout=timeout,
                          capture_output=True, text=True)


def two_ranks(args, cwd=None, env=None, timeout=600):
    """Run a script under torchrun with two processes of one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}")
    return run_script(args, cwd, {"OMP_NUM_THREADS": "1", **(env or {})}, timeout, launcher)


def reached(log, step):
    """For `ready`: whether the file log.jsonl has a row of at least this step."""
    def check():
        lines = Path(log).read_text().splitlines() if Path(log).exists() else []
        try:
            return any(json.loads(line)["step"] >= step for line in lines)
        except ValueError:  # the last line is being written
            return False
    return check


def _stat(path):
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def signal_when_ready(args, ready, number, delay_s=0.0, *, whole_group=True, cwd=None, env=None, timeout=600):
    """Start the script in its own process group and send signal `number` `delay_s` after it is `ready`.

    `ready` is a callable, or a path that must appear or change. Returns CompletedProcess (returncode -9 after
    SIGKILL); AssertionError if the script ended by itself first or was never ready.
    """
    def state():
        return (s.st_mtime_ns, s.st_size, s.st_ino) if (s := _stat(ready)) else None

    before = None if callable(ready) else state()
    ready_now = ready if callable(ready) else lambda: state() not in (None, before)
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(_command(args), cwd=cwd, env={**os.environ, **(env or {})}, stdout=out,
                                   stderr=subprocess.STDOUT, start_new_session=True)

        def output():
            out.seek(0)
            return out.read()

        try:
            end = time.monotonic() + timeout
            while not ready_now():
                assert process.poll() is None, f"ended with {process.returncode} before it was ready:\n{output()}"
                assert time.monotonic() < end, f"not ready after {timeout} s:\n{output()}"
                time.sleep(0.01)
            time.sleep(delay_s)
            assert process.poll() is None, f"ended with {process.returncode} before the signal:\n{output()}"
            (os.killpg if whole_group else os.kill)(process.pid, number)
            process.wait(timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return subprocess.CompletedProcess(process.args, process.returncode, output(), "")


def kill_and_resume(args, ready, *, kills=1, max_delay_s=0.3, cwd=None, env=None, timeout=600):
    """Kill -9 the script `kills` times, each at a random moment after it is `ready`, then run it to the end.

    A callable `ready` gets the number of the kill (0, 1, ...), so that each round can wait for more progress; a path
    must appear or change in each round. Returns CompletedProcess of the last run and checks nothing there.
    """
    for kill in range(kills):
        check = (lambda kill=kill: ready(kill)) if callable(ready) else ready
        delay_s = random.uniform(0, max_delay_s)
        signal_when_ready(args, check, signal.SIGKILL, delay_s, cwd=cwd, env=env, timeout=timeout)
    return run_script(args, cwd, env, timeout)


def assert_same_tensors(path_a, path_b, skip=("config",)):
    """Two checkpoint files agree bit by bit in everything but the top-level entries `skip`."""
    a, b = (torch.load(path, map_location="cpu", weights_only=True) for path in (path_a, path_b))
    _assert_same({k: v for k, v in a.items() if k not in skip}, {k: v for k, v in b.items() if k not in skip}, "")


def _assert_same(a, b, where):
    assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
    if isinstance(a, dict):
        assert list(a) == list(b), f"{where}: keys {list(a)} and {list(b)}"
        for key in a:
            _assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), f"{where}: lengths {len(a)} and {len(b)}"
        for i, pair in enumerate(zip(a, b, strict=True)):
            _assert_same(*pair, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{where}: {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        bits_a, bits_b = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
        difference = (a.double() - b.double()).abs().max() if a.numel() else 0
        assert torch.equal(bits_a, bits_b), f"{where}: values differ by up to {difference:.3g}"
    else:
        assert a == b or a != a and b != b, f"{where}: {a!r} and {b!r}"
