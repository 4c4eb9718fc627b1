"""LMDB cache of decoded volumes and latents, shared by DataLoader workers and processes of one machine.

A .nii.gz is decoded and prepared once; afterwards an array is one memory copy out of the page cache. Not for network
file systems (LMDB's locks need a local disk).
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np

from common.cli import UserError

# One environment per folder and process: LMDB forbids a second one, and one that crossed a fork. So all are closed
# before a fork, and opened again on next use; the lock also keeps the map from being resized under a reader.
_open = {}
_lock = threading.Lock()


def _close_all():
    _lock.acquire()
    for env in _open.values():
        env.close()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_close_all, after_in_parent=_lock.release, after_in_child=_lock.release)


class VolumeCache:
    """Arrays kept by source file and recipe; picklable, usable before and after fork, by many processes at once.

    folder: created if missing; None means no cache. map_size: bytes at first, doubled when full.
    UserError when the folder is not a usable cache, or the disk is full.
    """

    def __init__(self, folder: Path | None, map_size: int = 1 << 30):
        self.folder = None if folder is None else os.path.abspath(folder)
        self.map_size = map_size
        if self.folder is not None:
            self._transaction(lambda txn: None)  # a bad folder is known before training

    def get(self, source: Path, recipe: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The array that `compute()` makes of file `source` by `recipe`, from the cache if the file is unchanged.

        `recipe` must name everything that `compute` does with the file. A file with another size or modification
        time is computed again and replaces the old entry. The array is contiguous, writable and the caller's own.
        """
        if self.folder is None:
            return np.require(compute(), requirements=["C", "W"])
        path = os.path.abspath(source)
        try:
            stat = os.stat(path)  # before compute: a change meanwhile is then seen next time
        except OSError as error:
            raise UserError(f"file cannot be read ({error.strerror}), {path}, check the path") from error
        key = hashlib.sha256(json.dumps([path, recipe]).encode()).digest()
        identity = [stat.st_size, stat.st_mtime_ns]
        array = self._transaction(lambda txn: _unpack(txn.get(key), identity))
        if array is None:
            array = np.require(compute(), requirements=["C", "W"])
            if array.dtype.hasobject or array.dtype.names:
                raise TypeError(f"only plain arrays can be cached, not {array.dtype}")
            head = json.dumps([*identity, array.dtype.str, array.shape]).encode()
            record = len(head).to_bytes(4, "little") + head + array.tobytes()
            self._transaction(lambda txn: txn.put(key, record), write=True, room=len(record))
        return array

    def _transaction(self, work, *, write=False, room=0):
        """Run work(txn), opening the environment or enlarging its map as needed."""
        with _lock:
            try:
                while True:
                    env = _open.get(self.folder)
                    try:
                        env = env or self._open_environment()
                        with env.begin(write=write, buffers=True) as txn:
                            return work(txn)
                    except lmdb.MapResizedError:  # another process enlarged it, perhaps while this one was opening it
                        if env:
                            env.set_mapsize(0)
                    except lmdb.MapFullError:
                        env.reader_check()  # readers that were killed keep old pages from being used again
                        env.set_mapsize(env.info()["map_size"] * 2)
            except (lmdb.Error, OSError, ValueError, TypeError) as error:  # last two: bad record
                # LMDB reports a full disk as an input/output error, so look.
                full = write and shutil.disk_usage(self.folder).free < room + (1 << 20)
                what, advice = ("disk full", "free space") if full else ("cache unusable", "delete it, it is rebuilt")
                raise UserError(f"{what} ({error}), {self.folder}, {advice}") from error

    def _open_environment(self):
        os.makedirs(self.folder, exist_ok=True)
        # metasync off may lose the last entries in a power cut, never consistency.
        env = lmdb.open(self.folder, map_size=self.map_size, metasync=False, meminit=False, max_readers=1024)
        pages = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if os.path.getsize(os.path.join(self.folder, "data.mdb")) < pages:  # reading there would kill the process
            env.close()
            raise lmdb.CorruptedError("data.mdb is truncated")
        env.reader_check()
        _open[self.folder] = env
        return env


def _unpack(record, identity):
    """The array of a record, copied; None if there is none, or it is of another state of the file."""
    if record is None:
        return None
    start = 4 + int.from_bytes(record[:4], "little")
    *seen, dtype, shape = json.loads(bytes(record[4:start]))
    if seen != identity:
        return None
    return np.ndarray(shape, dtype, record, start).copy()
