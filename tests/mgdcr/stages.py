"""Tiny runs of all trainings, made once and shared; and how tests train a stage again, kill it and read its log."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

from mgdcr import encode, latent_dpm, lmdb_writer, run_ffhq128, run_ffhq128_ddim
from tests.helpers import reached, run_main

SCRIPTS = {"autoenc": run_ffhq128, "ddim": run_ffhq128_ddim, "latent_dpm": latent_dpm}
FOLDERS = {"autoenc": "cardiac_autoenc", "ddim": "cardiac_ddim", "latent_dpm": "cardiac_latent_dpm"}
STAGES = tuple(SCRIPTS)
BATCH, SAMPLES, STEPS = 4, 22, 6  # the budget is no multiple of the batch: six steps, the last one full
LOOP = (
    f"--device cpu --num_workers 0 --total_samples {SAMPLES} --batch_size {BATCH} --lr 2e-3 --lr_schedule cosine "
    "--warmup_samples 8 --ema_decay 0.9 --ema_start 2 --log_every 2 --val_every_samples 12 --save_every_samples 8"
).split()
UNET = (
    "--image_size 64 --model_channels 8 --channel_mult 1 2 2 --num_res_blocks 1 --attention_resolutions 16 "
    "--embed_channels 16 --dropout 0.1 --augment plausible --val_slices 3 --val_steps 3 --sample_every_samples 16 "
    "--sample_size 2 --sample_steps 2"
).split()
TINY = {
    "autoenc": [*UNET, *"--enc_channel_mult 1 2 2 2 --enc_num_res_blocks 1 --enc_out_channels 12".split()],
    "ddim": UNET,
    "latent_dpm": "--hidden 24 --layers 3 --time_channels 8 --latent_steps 4".split(),
}


def write_store(phantoms: Path) -> Path:
    """Root folder with datasets/cardiac_cine_128.lmdb of a cohort: one subject each to train, validate and test."""
    root = phantoms.with_name("slices")
    run_main(lmdb_writer, "--root", root, "--input", phantoms)
    return root


def store_of(root: Path) -> Path:
    return root / "datasets" / "cardiac_cine_128.lmdb"


def words(stage, data, root, *more):
    """Command line of a tiny training, without the script; `data` has the store, `root` gets the run."""
    paths = ["--root", root]
    if stage != "latent_dpm":
        paths += ["--store", store_of(data)]
    return [str(w) for w in (*paths, *LOOP, *TINY[stage], *more)]


def run(stage, data, root, *more):
    """Train a tiny stage in this process."""
    run_main(SCRIPTS[stage], *words(stage, data, root, *more))


def run_encode(data, root, *more):
    """Codes of the cohort by the prior in `root`."""
    run_main(encode, "--root", root, "--store", store_of(data), "--device", "cpu", *more)


def trained(data: Path) -> Path:
    """Root of a run of every stage on the cohort. Not to be changed."""
    runs = data.with_name(f"{data.name}_runs")
    run("autoenc", data, runs)
    run_encode(data, runs)
    run("ddim", data, runs)
    run("latent_dpm", data, runs)
    return runs


def again(stage, data, runs, root, *more):
    """Train a tiny stage once more in this process, below another root, on the codes of `runs`."""
    run(stage, data, root, *codes(stage, runs), *more)


def codes(stage, runs):
    """Options that name the codes of another root."""
    return ["--latents", runs / "checkpoints" / "cardiac_autoenc" / "latent.ckpt"] if stage == "latent_dpm" else []


def best(root, stage):
    return Path(root) / "checkpoints" / FOLDERS[stage] / "best.ckpt"


def last(root, stage):
    return Path(root) / "checkpoints" / FOLDERS[stage] / "last.ckpt"


def logs(root, stage):
    return Path(root) / "logs" / FOLDERS[stage]


def log_rows(root, stage, kind=None):
    """Rows of the log but for the clock."""
    rows = [json.loads(line) for line in (logs(root, stage) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows if kind in (None, row["kind"])]


def interrupted(stage, root, command, number, step, delay_s=0.0):
    """Exit status of a forked process that runs `command` and gets signal `number` after the log's row of `step`.

    A fork has everything imported already, so that a kill of every stage costs a second each.
    """
    process = multiprocessing.get_context("fork").Process(target=_run, args=(stage, command), daemon=True)
    process.start()
    ready, end = reached(logs(root, stage) / "log.jsonl", step), time.monotonic() + 120
    while not ready():
        assert process.is_alive() and time.monotonic() < end, f"{stage} ended before step {step}"
        time.sleep(0.002)
    time.sleep(delay_s)
    assert process.is_alive(), f"{stage} ended before the signal"
    os.kill(process.pid, number)
    process.join(120)
    return process.exitcode


def _run(stage, command):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    run_main(SCRIPTS[stage], *command)
