"""The run folder: config.json, manifest.json, log.jsonl, one CSV per kind of row, TensorBoard events, samples/."""

import csv
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.checkpoint import replacing

PACKAGES = ("torch", "numpy", "scipy", "nibabel", "scikit-image", "scikit-learn", "monai", "diffusers", "lmdb")


class RunLog:
    """Writes what a run does into `folder`; does nothing where `enabled` is false (ranks other than 0).

    log.jsonl is the truth: on resume its rows after `start_step` go, as does a line cut off by a kill, and the CSVs
    are written anew from it, so a resumed log equals an uninterrupted one but for `seconds`. Log before each save.
    """

    def __init__(self, folder, config, *, start_step=0, enabled=True, data_fingerprint=None):
        self.folder, self.enabled, self._csv = Path(folder), enabled, {}
        if not enabled:
            return
        write_json(self.folder / "config.json", config)
        manifest = self.folder / "manifest.json"
        earlier = json.loads(manifest.read_text()) if start_step and manifest.exists() else None
        write_json(manifest, {"start_step": start_step, **_manifest(), "data_fingerprint": data_fingerprint,
                              "earlier_starts": earlier.pop("earlier_starts", []) + [earlier] if earlier else []})
        path = self.folder / "log.jsonl"
        old = list(_complete_rows(path)) if path.exists() else []
        rows = [row for row in old if start_step and row["step"] <= start_step]  # from step 0 on is a new run
        with replacing(path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        for kind in {row["kind"] for row in old}:
            (self.folder / f"{kind}.csv").unlink(missing_ok=True)
        for row in rows:
            self._write_csv(row)
        self._log = open(path, "a")
        self._start = time.time() - (rows[-1]["seconds"] if rows else 0)
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only when a run begins

        # TensorBoard reads files by name, which begins with the second: a resume within it could come before its past.
        while any((self.folder / "tensorboard").glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(0.02)
        self._tensorboard = SummaryWriter(self.folder / "tensorboard", purge_step=start_step + 1 if start_step else 0)

    def log(self, kind, step, **values):
        """One row of scalars after `step` steps; `kind` ("train", ...) names the CSV, its first row the columns."""
        if not self.enabled:
            return
        values = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
        row = {"kind": kind, "step": step, "seconds": round(time.time() - self._start, 3), **values}
        self._log.write(json.dumps(row) + "\n")
        self._log.flush()
        self._write_csv(row)
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        self._tensorboard.flush()  # or a kill loses rows that the checkpoint takes for written

    def _write_csv(self, row):
        kind, values = row["kind"], {name: value for name, value in row.items() if name not in ("kind", "seconds")}
        if kind not in self._csv:
            file = open(self.folder / f"{kind}.csv", "w", newline="")
            self._csv[kind] = file, csv.DictWriter(file, list(values), extrasaction="ignore", lineterminator="\n")
            self._csv[kind][1].writeheader()
        file, writer = self._csv[kind]
        writer.writerow(values)
        file.flush()

    def image(self, name, step, picture):
        """samples/<name>_<step>.png from a PNG file, or an array (H, W) or (H, W, 3), uint8 or float in [0, 1]."""
        if not self.enabled:
            return
        if isinstance(picture, (str, Path)):
            picture = np.asarray(Image.open(picture).convert("RGB"))
        picture = np.asarray(picture)
        if picture.dtype != np.uint8:
            picture = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
        with replacing(self.folder / "samples" / f"{name}_{step}.png") as file:
            Image.fromarray(picture).save(file, format="PNG")
        self._tensorboard.add_image(name, picture, step, dataformats="HW" if picture.ndim == 2 else "HWC")

    def text(self, message):
        """Print a line without breaking a progress bar."""
        if self.enabled:
            tqdm.write(str(message))

    def close(self):
        if self.enabled:
            for file in (self._tensorboard, self._log, *(file for file, _ in self._csv.values())):
                file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Means:
    """Means of losses since the last `pop`; saved with the run, so that a resumed one logs as an uninterrupted one."""

    def __init__(self):
        self.sums, self.counts = {}, {}

    def add(self, values):
        """Take in scalar tensors by name, without waiting for the device."""
        for name, value in values.items():
            wide = torch.float32 if value.device.type == "mps" else torch.float64  # mps has no float64
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().to(wide)
            self.counts[name] = self.counts.get(name, 0) + 1

    def pop(self):
        means = {name: self.sums[name] / self.counts[name] for name in self.sums}
        self.__init__()
        return means

    def share(self, runtime):
        """Give every rank the ranks' mean sums, which leaves their mean as it is; call on all ranks before saving."""
        self.sums = {name: runtime.mean(value) for name, value in self.sums.items()}

    def state_dict(self):
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state):
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


def _complete_rows(path):
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):  # cut off by a kill
            return
        yield json.loads(line)


def write_json(path, value):
    """JSON file, written atomically."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2, default=str) + "\n").encode())


def _manifest():
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "argv": [_portable(word) for word in sys.argv],
            "git_revision": git_revision(), "python": platform.python_version(), "packages": versions,
            "hardware": {"platform": platform.platform(), "cpus": os.cpu_count(), "gpus": gpus}}


def _portable(word):
    """A word of the command line without the folders above an absolute path: they name people and machines."""
    option, equals, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
    return option + equals + (Path(value).name if os.path.isabs(value) else value)


def git_revision():
    """The repository's commit, with "-dirty" where files differ from it, or None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def environment(rt):
    """Hardware, threads, precision and versions, beside which a time means something."""
    info = Path("/proc/cpuinfo")  # Linux; elsewhere the name that Python knows
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else None
    cpu = names[0] if names else platform.processor() or platform.machine()
    return {"device": str(rt.device), "gpu": gpu, "cpu": cpu,
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
            "precision": str(rt.autocast_dtype or torch.float32).removeprefix("torch."), "torch": torch.__version__,
            "python": platform.python_version(), "platform": platform.platform()}  # fmt: skip


def progress(total, initial, description, enabled=True):
    """Progress bar with rate and time left; `total` 0 or None means no end. Rare lines where stderr is a file."""
    return tqdm(total=total or None, initial=initial, desc=description, disable=not enabled, dynamic_ncols=True,
                mininterval=0.2 if sys.stderr.isatty() else 30)
