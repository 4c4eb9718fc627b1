"""Lossless LMDB store of short-axis slices: written once by lmdb_writer.py, read slice by slice in training.

    "{subject}/{frame:03d}/{slice:03d}"   header (JSON: dtype, shape) and the pixels as acquired
    "length"                              number of slices, ASCII
    "meta"                                JSON: normaliser; by subject affine, shape, frames, intensity limits, source

Pixels are float16 where that holds every value of the subject exactly (integers up to 2048), else float32. Slices
without content are left out; the numbers of the others stay those of the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import lmdb
import numpy as np

from common.cli import UserError
from mgdcr.geometry import Cine, Grid
from mgdcr.intensity import PERCENTILES, Scale

FORMAT = "mgdcr slices 1"
MAP_SIZE = 1 << 26  # bytes at first, doubled when full
DTYPES = ("auto", "float16", "float32")

# One environment per store and process: LMDB forbids a second one, and one that crossed a fork. So all are closed
# before a fork and opened again on next use. A store that was replaced meanwhile has another inode.
_open: dict[str, tuple[tuple, lmdb.Environment]] = {}


def _close_all() -> None:
    for _, env in _open.values():
        env.close()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_close_all)


def key_of(subject: str, frame: int, number: int) -> str:
    return f"{subject}/{frame:03d}/{number:03d}"


# ---- writing --------------------------------------------------------------------------------------------------------


def pack(pixels: np.ndarray) -> bytes:
    """Record of a slice: length of the header, header, raw little-endian pixels."""
    pixels = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<"))
    header = json.dumps({"dtype": pixels.dtype.str, "shape": pixels.shape}).encode()
    return len(header).to_bytes(4, "little") + header + pixels.tobytes()


def unpack(record: bytes) -> np.ndarray:
    """The slice of a record, its own copy."""
    start = 4 + int.from_bytes(record[:4], "little")
    header = json.loads(record[4:start])
    return np.frombuffer(record, header["dtype"], offset=start).reshape(header["shape"]).copy()


def stored_dtype(data: np.ndarray, wanted: str = "auto") -> np.dtype:
    """float16 where it is exact, float32 otherwise; or as wanted."""
    if wanted != "auto":
        return np.dtype(wanted)
    with np.errstate(over="ignore"):
        exact = np.array_equal(data.astype(np.float16).astype(np.float32), data)
    return np.dtype(np.float16 if exact else np.float32)


def write(path: str | Path, cines: Iterable[tuple[str, Cine]], *, percentiles=PERCENTILES, dtype: str = "auto",
          overwrite: bool = False) -> int:  # fmt: skip
    """Write the slices of (subject, cine) pairs to a new store; the number of slices.

    The store appears when it is complete; until then an old one stays. UserError where one exists and `overwrite` is
    not given, for a subject named twice or without content, values that float16 cannot hold, and a full disk.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: replace it with --overwrite, or name another store")
    if path.exists() and not (path / "data.mdb").is_file():
        raise UserError(f"{path} is no store and will not be replaced: move it away, or name another store")
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.tmp")  # fixed name: what a kill leaves goes away the next time
    shutil.rmtree(building, ignore_errors=True)
    try:
        count = _fill(building, cines, percentiles, dtype)
        _replace(path, building)
    except (lmdb.Error, OSError) as error:
        raise UserError(f"cannot write the store ({error}), {path}, free space or name another place") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return count


def _fill(folder: Path, cines, percentiles, dtype: str) -> int:
    env, subjects, count = lmdb.open(str(folder), map_size=MAP_SIZE), {}, 0
    try:
        for subject, cine in cines:
            if subject in subjects or "/" in subject or subject in ("", "length", "meta"):
                raise UserError(f"subject name {subject!r} is taken or cannot be a key, {cine.path}, rename the file")
            records, subjects[subject] = _records(subject, cine, percentiles, dtype)
            _put(env, records)
            count += len(records)
        if not count:
            raise UserError(f"no slices for {folder.name.strip('.').removesuffix('.tmp')}, check the input")
        meta = {"format": FORMAT, "normaliser": {"percentiles": list(percentiles)}, "subjects": subjects}
        _put(env, {"meta": json.dumps(meta, sort_keys=True).encode(), "length": str(count).encode()})
        env.sync(True)
    finally:
        env.close()
    return count


def _records(subject: str, cine: Cine, percentiles, dtype: str) -> tuple[dict[str, bytes], dict]:
    """Records of a cine by key, and what `meta` says about the subject."""
    scale = Scale.of(cine.data, cine.valid, percentiles, str(cine.path or subject))
    pixels = cine.data.astype(stored_dtype(cine.data, dtype))
    if not np.isfinite(pixels).all():
        raise UserError(
            f"values up to {np.abs(cine.data).max():g} do not fit float16, {cine.path}, use --dtype float32"
        )
    records = {
        key_of(subject, frame, number): pack(pixels[frame, number])
        for frame, number in np.ndindex(pixels.shape[:2])
        if np.ptp(cine.data[frame, number]) > 0
    }
    return records, {
        "affine": cine.grid.affine.tolist(), "shape": list(cine.grid.shape), "frames": cine.frames,
        "frame_s": cine.frame_s, "limits": scale.to_dict(), "source": cine.path.name if cine.path else "",
        "source_hash": source_hash(cine), "dtype": pixels.dtype.name,
    }  # fmt: skip


def source_hash(cine: Cine) -> str:
    """16 hex digits of the pixels and the affine, whatever file they came in."""
    content = hashlib.sha256(np.ascontiguousarray(cine.data).tobytes())
    content.update(cine.grid.affine.tobytes())
    return content.hexdigest()[:16]


def _put(env, records: dict[str, bytes]) -> None:
    while True:
        try:
            with env.begin(write=True) as txn:
                for key, record in records.items():
                    txn.put(key.encode(), record)
            return
        except lmdb.MapFullError:
            env.set_mapsize(env.info()["map_size"] * 2)


def _replace(path: Path, building: Path) -> None:
    (building / "lock.mdb").unlink(missing_ok=True)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(building, path)
    shutil.rmtree(old, ignore_errors=True)


# ---- reading --------------------------------------------------------------------------------------------------------


class Store:
    """A store to read; picklable, usable before and after fork. UserError where it is missing or damaged.

    keys: all slices, sorted; meta: by subject; normaliser: how intensities become [-1, 1]; hash: of all of it (16 hex
    digits), the same for the same slices wherever the store lies.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "data.mdb").is_file():
            raise UserError(
                f"{self.path} is no store of slices: write it with mgdcr/lmdb_writer.py, or correct the path"
            )
        raw = self._get("meta")
        try:
            meta = json.loads(raw)
            self.normaliser, self.meta = meta["normaliser"], meta["subjects"]
            if meta["format"] != FORMAT:
                raise ValueError(meta["format"])
            length = int(self._get("length"))
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.path} is damaged or of another program: write it with mgdcr/lmdb_writer.py"
            ) from error
        self.hash = hashlib.sha256(raw).hexdigest()[:16]
        self.keys = self._read(lambda txn: [key.decode() for key in txn.cursor().iternext(values=False)])
        self.keys = [key for key in self.keys if key not in ("meta", "length")]
        if len(self.keys) != length:
            raise UserError(f"{self.path} has {len(self.keys)} slices of {length}: write it again with --overwrite")

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def subjects(self) -> tuple[str, ...]:
        return tuple(sorted(self.meta))

    def keys_of(self, subjects: Iterable[str]) -> list[str]:
        """Keys of the slices of these subjects, sorted."""
        wanted = set(subjects)
        return [key for key in self.keys if subject_of(key) in wanted]

    def scale(self, subject: str) -> Scale:
        return Scale(**self.meta[subject]["limits"])

    def grid(self, subject: str) -> Grid:
        return Grid(np.array(self.meta[subject]["affine"]), self.meta[subject]["shape"])

    def __getitem__(self, key: str) -> np.ndarray:
        """The slice (H, W) as stored, float16 or float32; KeyError if there is none."""
        record = self._get(key)
        if record is None:
            raise KeyError(key)
        return unpack(record)

    def _get(self, key: str) -> bytes | None:
        return self._read(lambda txn: txn.get(key.encode()))

    def _read(self, work):
        try:
            with self._environment().begin() as txn:
                return work(txn)
        except (lmdb.Error, OSError) as error:
            raise UserError(f"{self.path} cannot be read ({error}): write it again with --overwrite") from error

    def _environment(self) -> lmdb.Environment:
        name, file = os.path.realpath(self.path), os.stat(self.path / "data.mdb")
        identity, env = _open.get(name, (None, None))
        if identity != (file.st_dev, file.st_ino):
            if env:
                _open.pop(name)[1].close()
            # Read-only and complete: no lock needed, so it may lie on a read-only or network file system.
            env = lmdb.open(str(self.path), readonly=True, lock=False, readahead=False)
            if (
                file.st_size < (env.info()["last_pgno"] + 1) * env.stat()["psize"]
            ):  # reading there would kill the process
                env.close()
                raise lmdb.CorruptedError("data.mdb is truncated")
            _open[name] = (file.st_dev, file.st_ino), env
        return env


def subject_of(key: str) -> str:
    return key.split("/", 1)[0]
