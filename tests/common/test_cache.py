"""The volume cache: hits, staleness, forks, spawned and killed processes, growth, corruption."""

import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import lmdb
import numpy as np
import pytest
import torch

from common import cache
from common.cache import VolumeCache
from common.cli import UserError


class Counter:
    """A compute function that counts its calls."""

    def __init__(self, array):
        self.array, self.calls = array, 0

    def __call__(self):
        self.calls += 1
        return self.array


def never():
    raise AssertionError("computed, though it is in the cache")


def volume(i, size=16):
    return np.random.default_rng(i).standard_normal((size, size, size)).astype(np.float32)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.nii.gz"
    path.write_bytes(b"one")
    return path


@pytest.mark.parametrize("dtype", ["f4", "f8", "i4", "u1", "?", "f2", ">i2"])
def test_hit_returns_the_same_array_without_compute(tmp_path, source, dtype):
    cache, array = VolumeCache(tmp_path / "cache"), np.arange(24).reshape(2, 3, 4).astype(dtype)
    compute = Counter(array)
    for _ in range(3):
        out = cache.get(source, "recipe", compute)
        assert out.dtype == array.dtype and np.array_equal(out, array)
    assert compute.calls == 1


@pytest.mark.parametrize("array", [np.float32(3.5) * np.ones(()), np.zeros((0, 3), np.float32), np.ones((2, 3)).T])
def test_odd_shapes(tmp_path, source, array):
    cache = VolumeCache(tmp_path / "cache")
    cache.get(source, "r", lambda: array)
    out = cache.get(source, "r", never)
    assert out.shape == array.shape and np.array_equal(out, array) and out.flags.c_contiguous


def test_returned_arrays_are_the_callers_own(tmp_path, source):
    cache = VolumeCache(tmp_path / "cache")
    cache.get(source, "r", lambda: np.broadcast_to(np.float32(1), (4, 4)))[:] = 5  # a miss is writable too
    torch.from_numpy(cache.get(source, "r", never)).mul_(7)
    assert (cache.get(source, "r", never) == 1).all()


def test_recipe_path_and_file_state_are_the_key(tmp_path, source, monkeypatch):
    cache, other = VolumeCache(tmp_path / "cache"), tmp_path / "other.nii.gz"
    other.write_bytes(b"one")
    cache.get(source, "a", lambda: np.zeros(1))
    for path, recipe in ((source, "b"), (other, "a")):
        compute = Counter(np.ones(1))
        assert cache.get(path, recipe, compute) == 1 and compute.calls == 1
    monkeypatch.chdir(tmp_path)
    assert cache.get("source.nii.gz", "a", never) == 0  # a relative path is the same file

    stat = source.stat()
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert cache.get(source, "a", lambda: np.full(1, 2.0)) == 2  # touched
    source.write_bytes(b"longer")
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert cache.get(source, "a", lambda: np.full(1, 3.0)) == 3  # other size, same time
    assert cache.get(source, "a", never) == 3
    with lmdb_of(tmp_path / "cache") as env:
        assert env.stat()["entries"] == 3  # stale entries were replaced, not kept


class lmdb_of:
    """Look into a cache from outside, after closing the one of this process as a fork does."""

    def __init__(self, folder):
        cache._close_all()
        cache._lock.release()
        self.env = lmdb.open(str(folder), map_size=1 << 30)

    def __enter__(self):
        return self.env

    def __exit__(self, *_):
        self.env.close()


def test_change_during_compute_is_seen_next_time(tmp_path, source):
    cache = VolumeCache(tmp_path / "cache")

    def compute():
        source.write_bytes(b"changed meanwhile")
        return np.zeros(1)

    cache.get(source, "r", compute)
    assert cache.get(source, "r", lambda: np.ones(1)) == 1


def test_without_folder_and_failing_compute(tmp_path, source):
    cache, compute = VolumeCache(None), Counter(np.zeros(3))
    assert [cache.get(source, "r", compute).size for _ in range(2)] == [3, 3] and compute.calls == 2
    cache = VolumeCache(tmp_path / "cache")
    with pytest.raises(AssertionError):
        cache.get(source, "r", never)
    assert cache.get(source, "r", lambda: np.ones(1)) == 1  # nothing was kept of the failure
    with pytest.raises(UserError, match="nowhere.nii"):
        cache.get(tmp_path / "nowhere.nii", "r", never)
    with pytest.raises(TypeError, match="plain"):
        cache.get(source, "objects", lambda: np.array([{}]))


def test_grows_from_a_tiny_map(tmp_path, source):
    cache = VolumeCache(tmp_path / "cache", map_size=1 << 15)
    for i in range(40):  # 16 KiB each
        cache.get(source, str(i), lambda i=i: volume(i))
    cache.get(source, "big", lambda: volume(0, 64))  # 1 MiB, more than a doubling
    for i in range(40):
        assert np.array_equal(cache.get(source, str(i), never), volume(i))
    assert np.array_equal(cache.get(source, "big", never), volume(0, 64))


FILL = """
import sys
from tests.common.test_cache import VolumeCache, volume
folder, source, first, last = sys.argv[1:]
cache = VolumeCache(folder, map_size=1 << 15)
print("ready", flush=True)
sys.stdin.readline()
for i in range(int(first), int(last)):
    cache.get(source, str(i), lambda: volume(i))
    print(i, flush=True)
"""


def start_filling(tmp_path, source, first, last):
    command = [sys.executable, "-c", FILL, str(tmp_path / "cache"), str(source), str(first), str(last)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def test_processes_write_and_grow_at_the_same_time(tmp_path, source):
    cache = VolumeCache(tmp_path / "cache", map_size=1 << 15)
    writers = [start_filling(tmp_path, source, *span) for span in ((0, 30), (20, 50))]
    for process in writers:
        process.stdin.write("go\n")
    for i in range(50, 70):  # and this one; its map must follow the others'
        cache.get(source, str(i), lambda i=i: volume(i))
    assert [process.wait(60) for process in writers] == [0, 0]
    for process in writers:
        process.communicate()
    for i in range(70):
        assert np.array_equal(cache.get(source, str(i), never), volume(i))


def test_map_enlarged_by_another_process_while_this_one_opens(tmp_path, source, monkeypatch):
    """lmdb.open begins a transaction of its own, which loses this race now and then; here it does so for certain."""
    VolumeCache(tmp_path / "cache").get(source, "r", lambda: volume(0))
    cache._close_all()
    cache._lock.release()
    really_open, calls = lmdb.open, []

    def open_late(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise lmdb.MapResizedError("mdb_txn_begin")
        return really_open(*args, **kwargs)

    monkeypatch.setattr(lmdb, "open", open_late)
    assert np.array_equal(VolumeCache(tmp_path / "cache").get(source, "r", never), volume(0))
    assert len(calls) == 2


def test_sigkill_while_writing_loses_nothing_finished(tmp_path, source):
    cache = VolumeCache(tmp_path / "cache")
    finished = 0
    for attempt in range(3):
        process = start_filling(tmp_path, source, finished, finished + 1000)
        process.stdin.write("go\n")
        for _ in range(3 + 4 * attempt):
            finished = int(process.stdout.readline()) + 1
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        for i in range(finished):
            assert np.array_equal(cache.get(source, str(i), never), volume(i))
    assert finished == 3 + 7 + 11


HOLD = """
import sys, time, lmdb
env = lmdb.open(sys.argv[1], map_size=1 << 30)
with env.begin(write=True) as txn:
    txn.put(b"half", bytes(1 << 20))
    print("in the middle", flush=True)
    time.sleep(60)
"""


def test_sigkill_inside_a_transaction_frees_the_write_lock(tmp_path, source):
    cache = VolumeCache(tmp_path / "cache")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "cache")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in the middle\n"
    process.kill()
    process.communicate()
    cache.get(source, "after", lambda: volume(1))  # would hang on a lost lock
    assert np.array_equal(cache.get(source, "after", never), volume(1))
    with lmdb_of(tmp_path / "cache") as env:
        assert env.stat()["entries"] == 1


class Cached(torch.utils.data.Dataset):
    def __init__(self, cache, source, compute):
        self.cache, self.source, self.compute = cache, source, compute

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.from_numpy(self.cache.get(self.source, str(i), self.compute(i)))


def fresh(i):
    return lambda: volume(i, 8)


def from_cache(_i):
    return never


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(tmp_path, source, context):
    cache = VolumeCache(tmp_path / "cache", map_size=1 << 14)
    cache.get(source, "0", fresh(0))  # the environment is open, and used, before the workers start
    wanted = torch.stack([torch.from_numpy(volume(i, 8)) for i in range(12)])
    for compute in (fresh, from_cache):
        data = Cached(cache, source, compute)
        loader = torch.utils.data.DataLoader(data, 3, num_workers=2, multiprocessing_context=context)
        assert torch.equal(torch.cat(list(loader)), wanted)
    assert np.array_equal(cache.get(source, "11", never), volume(11, 8))  # the parent sees what the workers wrote
    cache.get(source, "new", fresh(1))  # and can still write


def test_fork_while_threads_use_the_cache(tmp_path, source):
    cache, stop, failures = VolumeCache(tmp_path / "cache", map_size=1 << 14), threading.Event(), []

    def use(name):
        try:
            for i in range(10**6):
                if stop.is_set():
                    return
                cache.get(source, f"{name} {i % 50}", lambda i=i: volume(i % 50, 4))
                time.sleep(0.001)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        process = context.Process(target=cache.get, args=(source, "child", fresh(3)))
        process.start()
        process.join(30)
        assert process.exitcode == 0
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert np.array_equal(cache.get(source, "child", never), volume(3, 8))


def test_two_objects_share_a_folder_and_pickle(tmp_path, source):
    first, second = VolumeCache(tmp_path / "cache"), VolumeCache(tmp_path / "cache")
    first.get(source, "r", lambda: np.ones(2))
    assert second.get(source, "r", never).sum() == 2
    assert pickle.loads(pickle.dumps(first)).get(source, "r", never).sum() == 2


@pytest.mark.parametrize("damage", ["garbage", "truncated", "a file", "record"])
def test_damaged_folder_is_one_clear_error(tmp_path, source, damage):
    folder = tmp_path / "cache"
    if damage == "a file":
        folder.write_text("not a folder")
    else:
        VolumeCache(folder).get(source, "r", lambda: volume(0, 32))
        with lmdb_of(folder) as env:
            if damage == "record":
                with env.begin(write=True) as txn:
                    txn.put(next(iter(txn.cursor()))[0], b"\x10\0\0\0 nonsense")
        data = folder / "data.mdb"
        if damage == "garbage":
            data.write_bytes(bytes(range(256)) * 64)
        if damage == "truncated":
            data.write_bytes(data.read_bytes()[:16384])
    with pytest.raises(UserError, match="(?s)cache unusable.*cache, delete it"):
        VolumeCache(folder).get(source, "r", never)


def test_failed_write_is_one_clear_error_and_harms_nothing(tmp_path, source, monkeypatch):
    cache, old = VolumeCache(tmp_path / "cache"), resource.getrlimit(resource.RLIMIT_FSIZE)
    cache.get(source, "before", lambda: volume(0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))  # the system lets 100 kB through, like a full disk
    try:
        with pytest.raises(UserError, match="cache unusable"):
            cache.get(source, "large", lambda: volume(1, 64))
        monkeypatch.setattr("common.cache.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(UserError, match="disk full"):
            cache.get(source, "large", lambda: volume(1, 64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert np.array_equal(cache.get(source, "before", never), volume(0))
    cache.get(source, "large", lambda: volume(1, 64))
    assert np.array_equal(cache.get(source, "large", never), volume(1, 64))
