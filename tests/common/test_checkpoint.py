"""Checkpoints: plain, atomic, exact. A toy trainer on `common` alone is killed, stopped, resumed, run on two ranks."""

import errno
import json
import os
import pickle
import random
import signal
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from common import checkpoint
from common.cli import UserError
from tests.helpers import ROOT, assert_same_tensors, kill_and_resume, reached, run_script, signal_when_ready, two_ranks

TRAINER = textwrap.dedent("""
    import sys, time
    from dataclasses import dataclass
    from pathlib import Path
    sys.path.insert(0, {root!r})
    import torch
    from torch import nn
    from common import checkpoint, cli, runlog, runtime
    from common.ema import EMA

    @dataclass
    class Options(cli.TrainOptions):
        out: Path = cli.option(Path("."), "run folder", free=True)
        dropout: float = cli.option(0.3, "dropout rate", group="toy")
        lr: float = cli.option(0.01, "learning rate", group="toy")
        sleep: float = cli.option(0.0, "pause per step", unit="s", free=True)

    class Data:
        def __len__(self):
            return 10
        def __getitem__(self, key):
            index, position = key
            return {{"x": torch.randn(6, generator=runtime.generator(7, "sample", position)) + index}}

    def main():
        config = cli.parse(Options, description="toy")
        frozen = cli.frozen(config, ["toy"])
        path = config.out / "checkpoints" / "last"
        with runtime.start(config.device, config.precision, config.seed) as rt, runtime.StopRequest() as stop:
            model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if config.dropout else nn.Identity(),
                                  nn.Dropout(config.dropout), nn.Linear(8, 6)).to(rt.device)
            optimizer = torch.optim.AdamW(model.parameters(), config.lr)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
            ema = EMA(model, 0.9, 5)
            objects = {{"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule}}
            step, extra = checkpoint.resume_training(path, objects=objects, config=frozen)
            ddp = runtime.wrap_ddp(model, rt)
            batches = runtime.training_batches(Data(), 4, step, config.seed, rt, config.num_workers)
            best = extra.get("best", 1e9)
            with runlog.RunLog(config.out, cli.to_dict(config), start_step=step, enabled=rt.is_main) as log:
                while step < config.max_steps:
                    x = next(batches)["x"]
                    noise = runtime.local_slice(torch.randn(4, 6), rt)
                    loss = (ddp(x + noise) - x).square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    ema.update(ddp)
                    step += 1
                    value = rt.mean(loss).item()
                    best = min(best, value)
                    log.log("train", step, loss=value)
                    stopping = stop.agree(rt)
                    if rt.is_main and (stopping or step % 5 == 0 or step == config.max_steps):
                        extra = {{"best": best}}
                        checkpoint.save_training(path, step=step, objects=objects, config=frozen, extra=extra)
                    if stopping:
                        sys.exit(stop.exit_status)
                    time.sleep(config.sleep)

    if __name__ == "__main__":
        cli.run(main)
""")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy")
    (path / "trainer.py").write_text(TRAINER.format(root=str(ROOT)))
    return path


@pytest.fixture(scope="module")
def trainer(folder):
    return lambda out, steps=40, **options: [
        folder / "trainer.py", "--out", folder / out, "--max_steps", steps, "--device", "cpu", "--num_workers", 0,
        *(word for name, value in options.items() for word in (f"--{name}", value))]


@pytest.fixture(scope="module")
def uninterrupted(folder, trainer):
    result = run_script(trainer("uninterrupted"))
    assert result.returncode == 0, result.stderr
    return folder / "uninterrupted"


def log_without_time(path):
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def last(folder):
    return folder / "checkpoints" / "last"


def test_killed_and_resumed_equals_uninterrupted(trainer, folder, uninterrupted):
    log = folder / "killed" / "log.jsonl"
    done = kill_and_resume(trainer("killed", sleep=0.03), lambda kill: reached(log, (3, 17)[kill])(), kills=2)
    assert done.returncode == 0, done.stderr
    assert_same_tensors(last(uninterrupted), last(folder / "killed"))
    assert log_without_time(log) == log_without_time(uninterrupted / "log.jsonl")
    assert (folder / "killed" / "train.csv").read_bytes() == (uninterrupted / "train.csv").read_bytes()
    state = checkpoint.load(last(folder / "killed"))
    assert state["step"] == 40 and state["ema"]["step"] == 40 and state["extra"]["best"] < 1e9


@pytest.mark.slow
def test_rng_matters_in_this_trainer(trainer, folder, uninterrupted):
    """The test above could not fail on lost RNG state if nothing random came from it."""
    assert run_script(trainer("rng", steps=35)).returncode == 0
    checkpoint.save(last(folder / "rng"), {**checkpoint.load(last(folder / "rng")), "rng": checkpoint.rng_state()})
    assert run_script(trainer("rng")).returncode == 0
    with pytest.raises(AssertionError, match="model.*values differ"):
        assert_same_tensors(last(uninterrupted), last(folder / "rng"), skip=("config", "extra", "rng"))


def test_sigterm_saves_and_exits(trainer, folder, uninterrupted):
    """The signal goes to the whole group, loader workers included, as batch systems (and Ctrl-C) send it."""
    args = trainer("stopped", sleep=0.03, num_workers=2)
    stopped = signal_when_ready(args, reached(folder / "stopped" / "log.jsonl", 7), signal.SIGTERM)
    assert stopped.returncode == 143, stopped.stdout
    assert "Traceback" not in stopped.stdout
    step = checkpoint.load(last(folder / "stopped"))["step"]
    assert step == len(log_without_time(folder / "stopped" / "log.jsonl")) < 40
    assert run_script(trainer("stopped")).returncode == 0
    assert_same_tensors(last(uninterrupted), last(folder / "stopped"))


@pytest.mark.slow
def test_two_ranks_equal_one(trainer, folder):
    for result in (run_script(trainer("one", steps=20, dropout=0)), two_ranks(trainer("two", steps=10, dropout=0)),
                   two_ranks(trainer("two", steps=20, dropout=0))):
        assert result.returncode == 0, result.stderr
    one, two = (checkpoint.load(last(folder / run)) for run in ("one", "two"))
    assert one["step"] == two["step"] == 20
    for part in ("model", "ema"):
        a, b = (state[part].get("weights", state[part]) for state in (one, two))
        assert list(a) == list(b)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
    losses = [[row["loss"] for row in log_without_time(folder / run / "log.jsonl")] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_changed_config_is_refused_in_one_line(trainer, uninterrupted):
    changed = run_script(trainer("uninterrupted", lr=0.5))
    assert changed.returncode == 2
    assert changed.stderr.startswith("error: ") and changed.stderr.count("\n") == 1
    assert "lr: 0.01 before, 0.5 now" in changed.stderr and "dropout" not in changed.stderr


@pytest.mark.slow
def test_two_ranks_report_an_error_once(trainer, uninterrupted):
    ranks = two_ranks(trainer("uninterrupted", lr=0.5))
    assert ranks.returncode != 0
    assert ranks.stderr.count("error: ") == 1 and "lr: 0.01 before" in ranks.stderr


# ---- files

STATE = {"weights": {"a": torch.randn(5, dtype=torch.bfloat16), "b": torch.tensor(float("nan"))}, "n": 3,
         "list": [1, (2.5, "x", None, True)], 7: {"odd": torch.nn.Parameter(torch.ones(2))}}


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "new" / "x", STATE)
    loaded = torch.load(tmp_path / "new" / "x", weights_only=True)
    assert loaded["list"] == STATE["list"] and loaded["n"] == 3
    assert torch.equal(loaded["weights"]["a"], STATE["weights"]["a"]) and loaded["weights"]["b"].isnan()
    assert_same_tensors(tmp_path / "new" / "x", tmp_path / "new" / "x")
    assert os.listdir(tmp_path / "new") == ["x"]


@pytest.mark.parametrize("bad", [Path("x"), np.float64(1), np.zeros(2), {1, 2}, torch.float32, lambda: 0, np.int64(3)])
def test_only_plain_values(tmp_path, bad):
    with pytest.raises(TypeError, match=r"outer\.inner\[1\]"):
        checkpoint.save(tmp_path / "x", {"outer": {"inner": [0, bad]}})
    assert os.listdir(tmp_path) == []


def fail(*_, **__):
    raise OSError(errno.EIO, "broken")


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_failure_while_saving_leaves_the_old_file(tmp_path, monkeypatch, function):
    checkpoint.save(tmp_path / "x", {"n": 1})
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="broken"):
        checkpoint.save(tmp_path / "x", {"n": 2})
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "x") == {"n": 1}
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk(tmp_path):
    checkpoint.save(tmp_path / "x", {"n": 1})
    (tmp_path / ".x.tmp").symlink_to("/dev/full")  # a real ENOSPC from the kernel
    with pytest.raises(UserError, match="disk full while writing .*x"):
        checkpoint.save(tmp_path / "x", {"n": torch.zeros(100_000)})
    assert checkpoint.load(tmp_path / "x") == {"n": 1}
    assert os.listdir(tmp_path) == ["x"]


def test_full_disk_at_fsync(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk full"):
        checkpoint.save(tmp_path / "x", {"n": 1})
    assert os.listdir(tmp_path) == []


class Anything:
    pass


def test_pickle_only_when_trusted(tmp_path):
    torch.save({"weights": torch.ones(2), "args": Anything()}, tmp_path / "zip")
    torch.save({"args": Anything()}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    (tmp_path / "raw").write_bytes(pickle.dumps({"args": Anything()}, protocol=2))
    for name in ("zip", "legacy", "raw"):
        with pytest.raises(UserError, match="--trust_pickle"):
            checkpoint.load(tmp_path / name)
    assert isinstance(checkpoint.load(tmp_path / "zip", trust_pickle=True)["args"], Anything)
    assert isinstance(checkpoint.load(tmp_path / "legacy", trust_pickle=True)["args"], Anything)


def test_unusable_files(tmp_path):
    checkpoint.save(tmp_path / "good", {"w": torch.randn(1000)})
    data = (tmp_path / "good").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("not a checkpoint")
    torch.save([1, 2], tmp_path / "list")
    for name, message in {"missing": "does not exist", "cut": "truncated", "empty": "truncated", "text": "truncated",
                          "list": "holds a list"}.items():
        with pytest.raises(UserError, match=message):
            checkpoint.load(tmp_path / name)
    with pytest.raises(UserError, match="truncated"):
        checkpoint.load(tmp_path / "cut", trust_pickle=True)


def test_rng_state_round_trip(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.normal(size=3).tolist(), torch.randn(3).tolist()

    np.random.normal()  # leaves a cached second value
    checkpoint.save(tmp_path / "rng", checkpoint.rng_state())
    first = draw()
    assert draw() != first
    checkpoint.set_rng_state(checkpoint.load(tmp_path / "rng"))
    assert draw() == first


def make(width=3):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, width)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def test_resume_training(tmp_path):
    path, config = tmp_path / "last", {"lr": 0.1, "size": (1, 2), "folder": Path("x")}
    assert checkpoint.resume_training(path, objects=make(), config=config) == (0, {})
    saved = make()
    checkpoint.save_training(path, step=12, objects=saved, config=config, extra={"best": 0.5})
    fresh = make()
    torch.nn.init.zeros_(fresh["model"].weight)
    assert checkpoint.resume_training(path, objects=fresh, config=config) == (12, {"best": 0.5})
    assert torch.equal(fresh["model"].weight, saved["model"].weight)
    with pytest.raises(UserError, match=r"new: 'absent' before, 1 now; size: \[1, 2\] before, \[1, 3\] now"):
        checkpoint.resume_training(path, objects=fresh, config={**config, "size": [1, 3], "new": 1})
    with pytest.raises(UserError, match="model in .*another model.*size mismatch"):
        checkpoint.resume_training(path, objects=make(width=4), config=config)
    with pytest.raises(UserError, match="has no ema"):
        checkpoint.resume_training(path, objects={**fresh, "ema": fresh["model"]}, config=config)
    with pytest.raises(ValueError, match="differ"):
        checkpoint.save_training(path, step=1, objects={"rng": fresh["model"]}, config={})


def test_file_hash(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, example 1
    assert checkpoint.file_hash(tmp_path / "abc") == sha256[:16]
    assert checkpoint.file_hash(str(tmp_path / "abc"), digits=64) == sha256
    with pytest.raises(UserError, match="absent cannot be read .*; correct the path"):
        checkpoint.file_hash(tmp_path / "absent")


def test_weights_hash():
    a = {"x": torch.arange(3.0), "y": torch.tensor(1, dtype=torch.int64)}
    same = checkpoint.weights_hash({"y": a["y"], "x": torch.arange(6.0)[:3].clone()})
    assert checkpoint.weights_hash(a) == same == "c4aeb35f51854efc"
    for other in ({**a, "x": torch.tensor([0.0, 1.0, 2.0000002])}, {"x": a["x"], "z": a["y"]},
                  {**a, "x": a["x"].half()}, {**a, "x": a["x"][:, None]}):
        assert checkpoint.weights_hash(other) != same
