"""Tiny runs of all stages, trained once and shared; and how tests train a stage again, kill it and read its log."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from functools import lru_cache
from pathlib import Path

from lapt import main
from tests.helpers import reached, run_main

SHORT = 4  # steps of runs that are compared
LOOP = (
    "training.batch_size=12 training.accumulate=1 training.log_every=2 training.save_every=3 training.val_every=1 "
    "training.sample_every=0 training.val_items=2 training.patience=0 training.ema_decay=0.9 training.lr=2e-3 "
    "data.augment=plausible"
).split()
VOLUMES = ["data.size=[48,48,8]", "training.batch_size=2"]
UNET = (
    "model.model_channels=32 model.channel_mult=[1] model.num_res_blocks=1 model.attention_resolutions=[1] "
    "model.head_channels=16"
).split()
DIFFUSION = "training.val_times=2 training.ema_start=2 diffusion.sample_steps=2".split()
TINY = {
    "vqgan": ("model.channels=8 model.channel_mult=[1,2,2] model.num_res_blocks=1 model.n_embed=64 model.norm_groups=4 "
              "model.disc_channels=4 model.disc_layers=2 loss.disc_start=3").split(),
    "ldm": [*DIFFUSION, *UNET],
    "guide": [*VOLUMES, *("data.normalisation=quantile data.window=4 model.channels=4 model.channel_mult=[1,2] "
                          "model.num_res_blocks=1 model.norm_groups=2").split()],
    "lapt": [*DIFFUSION, "training.ema_start=0", "training.batch_size=6", "diffusion.floor_steps=2"],
    "ldm3d": [*DIFFUSION, *VOLUMES, *UNET, "model.conditioner_channels=8", "training.checkpointing=false"],
    "lapt3d": [*DIFFUSION, *VOLUMES, "training.ema_start=0", "loss.window=4", "diffusion.floor_steps=2",
               "training.checkpointing=false"],
}  # fmt: skip
STAGES = tuple(TINY)
FULL = {"vqgan": 24, "ldm": 24}  # steps of `trained`: enough for the losses to fall


def words(stage, data, logdir, *more):
    """Command line of a tiny stage, without the script."""
    flags = ["--base", stage, "-t", "--no-test", "--device", "cpu", "--num_workers", 0, "-l", logdir]
    return [str(w) for w in (*flags, f"paths.data={data}", *LOOP, *TINY[stage], f"training.steps={SHORT}", *more)]


def run(stage, data, logdir, *more):
    """Train a tiny stage in this process."""
    run_main(main, *words(stage, data, logdir, *more))


@lru_cache(maxsize=1)
def trained(data: Path) -> Path:
    """Folder with a run of every stage on the prepared data. Not to be changed."""
    runs = data.with_name(f"{data.name}_runs")
    for stage in STAGES:
        run(stage, data, runs, f"training.steps={FULL.get(stage, SHORT)}")
    return runs


def earlier(runs, stage):
    """Options that name the earlier stages' runs, for a run in another folder."""
    names = {"ldm": ["vqgan"], "lapt": ["ldm"], "ldm3d": ["ldm2d", "vqgan"], "lapt3d": ["ldm", "guide"]}
    of = {"ldm2d": "ldm"} | ({"ldm": "ldm3d"} if stage == "lapt3d" else {})
    return [f"paths.{name}={runs / of.get(name, name)}" for name in names.get(stage, [])]


def again(stage, data, runs, logdir, *more):
    """Train a tiny stage once more in this process, in another folder, on the earlier stages' runs."""
    run(stage, data, logdir, *earlier(runs, stage), *more)


def best(runs, stage):
    return Path(runs) / stage / "checkpoints" / "best.ckpt"


def last(runs, stage):
    return Path(runs) / stage / "checkpoints" / "last.ckpt"


def log_rows(runs, stage, kind=None):
    """Rows of the log but for the clock."""
    rows = [json.loads(line) for line in (Path(runs) / stage / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows if kind in (None, row["kind"])]


def interrupted(stage, logdir, command, number, step, delay_s=0.0):
    """Exit status of a forked process that runs `command` and gets signal `number` after the log's row of `step`.

    A fork has everything imported already: it trains at once, so that a kill of every stage costs a second each.
    """
    process = multiprocessing.get_context("fork").Process(target=_run, args=(command,), daemon=True)
    process.start()
    ready, end = reached(Path(logdir) / stage / "log.jsonl", step), time.monotonic() + 120
    while not ready():
        assert process.is_alive() and time.monotonic() < end, f"{stage} ended before step {step}"
        time.sleep(0.002)
    time.sleep(delay_s)
    assert process.is_alive(), f"{stage} ended before the signal"
    os.kill(process.pid, number)
    process.join(120)
    return process.exitcode


def _run(command):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    run_main(main, *command)


def of_another_split(prepared, folder):
    """A copy of the prepared data in which a training and a test patient have changed places in the lists."""
    data = shutil.copytree(prepared, folder)
    lists = {name: json.loads((data / f"splits/{name}_list.json").read_text()) for name in ("train", "test")}
    lists["train"][0], lists["test"][0] = lists["test"][0], lists["train"][0]
    for name, patients in lists.items():
        (data / f"splits/{name}_list.json").write_text(json.dumps(sorted(patients)))
    return data
