"""`make bench` at a small size: each measurement gives sane numbers, the program prints and stores them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common import runtime
from tests.bench import il_cldm, lapt, ldae, mgdcr, neuroldm3d
from tests.bench.measure import ENOUGH_S, measure
from tests.helpers import run_script

ROOT = Path(__file__).resolve().parents[2]
CPU = runtime.Runtime(torch.device("cpu"))
OPTIONS = SimpleNamespace(size="small", batch=1, repeats=1, num_workers=0)


@pytest.mark.parametrize("name", [n for n in il_cldm.ITEMS if "channels_last" in n or n.startswith("loader without")])
def test_items(name):
    result = il_cldm.ITEMS[name](OPTIONS, CPU)
    if "loader" in name:
        assert result["per_second"] > 0
    else:
        assert 0 < result["seconds"] < 60 and result["calls"] == 1 and 0.1 < result["peak_gib"] < 16


ALL = [(paper, name) for paper in (lapt, neuroldm3d, ldae, mgdcr) for name in paper.ITEMS if "contiguous" not in name]


@pytest.mark.parametrize("paper,name", ALL, ids=[f"{paper.__name__}-{name}" for paper, name in ALL])
def test_items_of_other_papers(paper, name):
    result = paper.ITEMS[name](OPTIONS, CPU)
    assert 0 < result["seconds"] < 60 and result["calls"] == 1 and 0.1 < result["peak_gib"] < 16


def test_slow_first_call_is_the_measure(monkeypatch):
    clock = iter([0, ENOUGH_S + 5])
    monkeypatch.setattr("tests.bench.measure.time.perf_counter", lambda: next(clock))
    result = measure(lambda: None, CPU, repeats=5)
    assert result["calls"] == 1 and result["seconds"] == ENOUGH_S + 5


def test_measure_counts_calls(monkeypatch):
    calls, clock = [], iter([0, 5, 10, 13, 20, 24, 30, 39])  # the untimed call, then 3, 4 and 9 seconds
    monkeypatch.setattr("tests.bench.measure.time.perf_counter", lambda: next(clock))
    assert 3 + 4 < ENOUGH_S < 3 + 4 + 9
    result = measure(lambda: calls.append(0), CPU, repeats=5)
    assert len(calls) == 4 and result["calls"] == 3 and result["seconds"] == 3


def test_report_derives_the_cost_of_a_sample_and_names_failures():
    results = {"denoising step, contiguous": {"seconds": 2.0, "peak_gib": 1.0},
               "denoising step, channels_last_3d": {"seconds": 3.0, "peak_gib": 1.0},
               "decode, contiguous": {"seconds": 1.0, "peak_gib": 1.0},
               "loader without workers, .nii.gz": {"per_second": 10.0},
               "loader without workers, cache": {"per_second": 40.0},
               "encode, contiguous": {"failed": "exit status -9: no message; killed for memory?"}}
    text = "\n".join(il_cldm.report(results))
    assert "ancestral 999 steps 1999 s" in text and "20 steps 41.0 s (49 times faster)" in text
    assert "4.0 times as fast" in text and "1.50" in text and "encode, contiguous: failed, exit status -9" in text


@pytest.mark.slow
def test_program(tmp_path):
    out = tmp_path / "bench.json"
    arguments = ["--size", "small", "--device", "cpu", "--repeats", 1, "--only", "decode, contiguous", "--out", out]
    done = run_script(["-m", "tests.bench", *arguments], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"torch {torch.__version__}" in done.stdout and "commit" in done.stdout
    stored = json.loads(out.read_text())
    assert list(stored["results"]["il_cldm"]) == ["decode, contiguous"]
    seconds = stored["results"]["il_cldm"]["decode, contiguous"]["seconds"]
    assert f"{seconds:.3f} s" in done.stdout and stored["environment"]["precision"] == "float32"


def test_wrong_option_is_one_line():
    done = run_script(["-m", "tests.bench", "--size", "huge"], cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: --size") and done.stderr.count("\n") == 1
