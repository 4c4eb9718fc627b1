"""The run folder: what is written, and that a resumed log equals an uninterrupted one."""

import csv
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.runlog import Means, RunLog, progress

CONFIG = {"lr": 0.1, "out": Path("x"), "channels": (1, 2)}


def write(log, steps):
    for step in steps:
        log.log("train", step, loss=torch.tensor(1 / step), lr=np.float32(0.5), note="a,b")
        if step % 2 == 0:
            log.log("val", step, psnr=20.0 + step / 3)


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_time(folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder)]


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return {tag: values for tag, values in found.items() if values}  # of a purged tag the name remains


def test_files_of_a_run(tmp_path):
    with RunLog(tmp_path / "a", CONFIG, data_fingerprint="abc") as log:
        write(log, range(1, 5))
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == {"lr": 0.1, "out": "x", "channels": [1, 2]}
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["data_fingerprint"] == "abc" and manifest["packages"]["torch"] and manifest["argv"]
    assert {"git_revision", "hardware", "python", "started"} <= set(manifest)
    first, *_ = rows(tmp_path / "a")
    assert {k: first[k] for k in ("kind", "step", "loss", "lr", "note")} == {
        "kind": "train", "step": 1, "loss": 1.0, "lr": 0.5, "note": "a,b"}
    with open(tmp_path / "a" / "train.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["step", "loss", "lr", "note"] and len(table) == 4
    assert float(table[2]["loss"]) == torch.tensor(1 / 3).item() and table[0]["note"] == "a,b"  # full precision
    assert (tmp_path / "a" / "val.csv").read_text().splitlines()[0] == "step,psnr"
    assert scalars(tmp_path / "a")["val/psnr"] == [(2, pytest.approx(20 + 2 / 3)), (4, pytest.approx(20 + 4 / 3))]


def test_resumed_log_equals_uninterrupted(tmp_path):
    with RunLog(tmp_path / "a", CONFIG) as log:
        write(log, range(1, 11))
    killed = RunLog(tmp_path / "b", CONFIG)
    write(killed, range(1, 8))
    killed.log("late", 7, x=1)  # a kind that is lost altogether
    with open(tmp_path / "b" / "log.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # kill -9 in the middle of a line
    with open(tmp_path / "b" / "train.csv", "a") as file:
        file.write("8,0.1")
    with RunLog(tmp_path / "b", CONFIG, start_step=5) as log:
        assert [row["step"] for row in rows(tmp_path / "b")] == [1, 2, 2, 3, 4, 4, 5]
        write(log, range(6, 11))
    assert without_time(tmp_path / "a") == without_time(tmp_path / "b")
    for name in ("train.csv", "val.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not (tmp_path / "b" / "late.csv").exists()
    assert scalars(tmp_path / "a") == scalars(tmp_path / "b")
    seconds = [row["seconds"] for row in rows(tmp_path / "b")]
    assert seconds == sorted(seconds)
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["start_step"] == 5 and [m["start_step"] for m in manifest["earlier_starts"]] == [0]


def test_events_of_a_resume_come_last_even_within_a_second(tmp_path):
    with RunLog(tmp_path, CONFIG) as log:
        write(log, range(1, 4))
    (first,) = (tmp_path / "tensorboard").iterdir()
    late = first.with_name(f"events.out.tfevents.{int(time.time()):010d}.zzz.1.9")  # sorts last in its second
    first.rename(late)
    with RunLog(tmp_path, CONFIG, start_step=2) as log:
        write(log, [3])
    assert sorted((tmp_path / "tensorboard").iterdir())[0] == late
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [1, 2, 3]


def test_from_step_0_is_a_new_log(tmp_path):
    for _ in range(2):
        with RunLog(tmp_path, CONFIG) as log:
            log.log("val", 0, psnr=1.0)
            write(log, range(1, 3))
    assert [(row["kind"], row["step"]) for row in rows(tmp_path)] == [
        ("val", 0), ("train", 1), ("train", 2), ("val", 2)]
    assert json.loads((tmp_path / "manifest.json").read_text())["earlier_starts"] == []


def test_columns_stay_those_of_the_first_row(tmp_path):
    with RunLog(tmp_path, CONFIG) as log:
        log.log("train", 1, a=1, b=2)
        log.log("train", 2, b=3, c=4)
    assert (tmp_path / "train.csv").read_text() == "step,a,b\n1,1,2\n2,,3\n"
    assert rows(tmp_path)[1]["c"] == 4


def test_images(tmp_path):
    floats = np.linspace(-0.5, 1.5, 12).reshape(3, 4)
    Image.fromarray(np.full((2, 2, 3), 7, np.uint8)).save(tmp_path / "given.png")
    with RunLog(tmp_path / "a", CONFIG) as log:
        log.image("plane", 20, floats)
        log.image("given", 20, tmp_path / "given.png")
    plane = np.asarray(Image.open(tmp_path / "a" / "samples" / "plane_20.png"))
    assert np.array_equal(plane, (floats.clip(0, 1) * 255).round())
    assert (np.asarray(Image.open(tmp_path / "a" / "samples" / "given_20.png")) == 7).all()


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    with RunLog(tmp_path / "a", CONFIG, enabled=False) as log:
        write(log, range(1, 3))
        log.image("x", 1, np.zeros((2, 2)))
        log.text("hello")
    assert not (tmp_path / "a").exists() and capsys.readouterr().out == ""
    with RunLog(tmp_path / "b", CONFIG) as log:
        log.text("hello")
    assert capsys.readouterr().out == "hello\n"


def test_progress(capsys):
    with progress(10, 4, "train") as bar:
        bar.update(6)
        assert bar.n == 10 and bar.total == 10
    assert "train" in capsys.readouterr().err
    with progress(0, 0, "quiet", enabled=False) as bar:
        assert bar.total is None and bar.disable


def test_means_go_on_after_a_resume():
    whole, first, second = Means(), Means(), Means()
    for k in range(6):
        losses = {"loss": torch.tensor(0.1 * k), **({"rare": torch.tensor(k)} if k % 2 else {})}
        whole.add(losses)
        (first if k < 3 else second).add(losses)
        if k == 2:
            second.load_state_dict(first.state_dict())
    assert whole.state_dict() == second.state_dict()
    means = second.pop()
    assert means["loss"].item() == pytest.approx(0.25) and means["rare"].item() == 3
    assert second.pop() == {}


def test_shared_means_hold_what_every_rank_added():
    """A run of two ranks is saved by rank 0 alone; the mean that it logs after a resume must count rank 1's losses."""
    ranks = Means(), Means()
    for k, means in enumerate(ranks):
        means.add({"loss": torch.tensor(1.0 + 2 * k)})
    runtime = SimpleNamespace(mean=lambda value: torch.tensor(2.0, dtype=torch.float64))  # of 1 and 3
    for means in ranks:
        means.share(runtime)
    assert ranks[0].state_dict() == ranks[1].state_dict()
    assert ranks[0].pop()["loss"] == 2


def test_the_manifest_keeps_no_folders_of_this_machine(tmp_path, monkeypatch):
    """Records are published with results; an absolute path in them tells who ran it and where."""
    words = [tmp_path / "train.py", "--root", tmp_path / "study", f"--out={tmp_path / 'x.csv'}", "--n", 2, "sub/folder"]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    with RunLog(tmp_path / "run", {}):
        pass
    argv = json.loads((tmp_path / "run" / "manifest.json").read_text())["argv"]
    assert argv == ["train.py", "--root", "study", "--out=x.csv", "--n", "2", "sub/folder"]
