"""Options from a dataclass: types, precedence, and every mistake in one line with exit status 2."""

import errno
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from common import cli


@dataclass
class Options(cli.TrainOptions):
    lr: float = cli.option(1e-3, "learning rate, 10% warm-up", group="aae")
    channels: tuple[int, ...] = cli.option((16, 32), "channels", group="aae")
    shape: tuple[int, int, int] = cli.option((1, 2, 3), "size", group="aae", unit="voxels")
    out: Path | None = cli.option(None, "output", unit="mm")
    count: int | None = cli.option(None, "count", group="aae", free=True)
    label: str = cli.option("csv", "label", choices=("none", "csv"))
    ema: bool = cli.option(True, "average the weights", group="aae")


PRESETS = {"paper": {}, "smoke": {"lr": 1, "channels": [3, 4], "compile": True, "max_steps": 7}}


def parse(*argv):
    return cli.parse(Options, [str(a) for a in argv], description="A script.", presets=PRESETS)


def test_defaults_and_types():
    assert parse() == Options()
    got = parse("--lr", "1e-4", "--channels", 1, 2, 3, "--shape", 4, 5, 6, "--out", "a b/c", "--count", 5, "--no_ema",
                "--dry_run", "--label", "none", "--device", "cuda:1")
    assert got == Options(lr=1e-4, channels=(1, 2, 3), shape=(4, 5, 6), out=Path("a b/c"), count=5, ema=False,
                          dry_run=True, label="none", device="cuda:1")
    assert parse("--count", "none").count is None


def test_hyphens_are_an_alias_and_values_keep_theirs():
    assert parse("--max-steps", 3, "--no-ema", "--out=x-y").out == Path("x-y")
    assert parse("--max-steps=3", "--out", "x-y").max_steps == 3


def test_precedence(tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"preset": "smoke", "lr": 0.5, "seed": 4, "channels": [9]}))
    assert parse("--preset", "smoke").lr == 1.0
    assert isinstance(parse("--preset", "smoke").lr, float)
    got = parse("--config", file, "--set", "seed=5", "max-steps=8", "--set", "ema=false", "channels=7,8",
                "--max_steps", 9)
    assert (got.compile, got.lr, got.seed, got.max_steps, got.ema, got.channels) == (True, 0.5, 5, 9, False, (7, 8))
    assert parse("--config", file, "--preset", "paper").compile is False
    assert parse("--preset", "smoke", "--no_compile").compile is False


def test_config_of_a_run_comes_back(tmp_path):
    config = parse("--preset", "smoke", "--out", "o", "--seed", 3)
    (tmp_path / "config.json").write_text(json.dumps(cli.to_dict(config)))
    assert parse("--config", tmp_path / "config.json") == config


@pytest.mark.parametrize(("argv", "message"), [
    (["--lrr", "1"], "unknown argument --lrr, did you mean --lr?"),
    (["--max-step", "1"], "unknown argument --max-step, did you mean --max_steps?"),  # no abbreviations either
    (["--zzz=1"], "unknown argument --zzz=1"),
    (["word"], "unknown argument word"),
    (["--lr", "fast"], "--lr: expected float, got 'fast'"),
    (["--lr", "nan"], "--lr: expected float, got nan"),
    (["--seed", "1.5"], "--seed: expected int, got '1.5'"),
    (["--seed"], "argument --seed: expected one argument"),
    (["--channels"], "argument --channels: expected at least one argument"),
    (["--shape", "1", "2"], "--shape: expected 3 values, got 2"),
    (["--label", "cvs"], "--label: 'cvs' is not one of none, csv, did you mean csv?"),
    (["--preset", "smok"], "--preset: 'smok' is not one of paper, smoke, did you mean smoke?"),
    (["--set", "lrr=1"], "--set: unknown option lrr, did you mean lr?"),
    (["--set", "lr"], "--set: expected KEY=VALUE, got 'lr'"),
    (["--set", "ema=maybe"], "--set: ema: expected bool, got 'maybe'"),
])
def test_mistakes_are_one_line(capsys, argv, message):
    with pytest.raises(SystemExit) as exit_:
        parse(*argv)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(("values", "message"), [
    ({"lr": "fast"}, "--config: lr: expected float, got 'fast'"),
    ({"lr": True}, "--config: lr: expected float, got True"),
    ({"seed": 1.5}, "--config: seed: expected int, got 1.5"),
    ({"seed": None}, "--config: seed: expected int, got None"),
    ({"seed": "1"}, "--config: seed: expected int, got '1'"),
    ({"ema": 1}, "--config: ema: expected bool, got 1"),
    ({"channels": 3}, "--config: channels: expected a list of int, got 3"),
    ({"channels": [1, "a"]}, "--config: channels: expected int, got 'a'"),
    ({"channel": [1]}, "--config: unknown option channel, did you mean channels?"),
    ({"precision": "fp8"}, "--config: precision: 'fp8' is not one of auto, fp32, bf16, fp16"),
])
def test_wrong_config_values(tmp_path, capsys, values, message):
    (tmp_path / "c.json").write_text(json.dumps(values))
    with pytest.raises(SystemExit):
        parse("--config", tmp_path / "c.json")
    err = capsys.readouterr().err
    assert err.startswith("error: " + message) and err.count("\n") == 1


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_unreadable_config(tmp_path, capsys, content):
    if content:
        (tmp_path / "c.json").write_text(content)
    with pytest.raises(SystemExit):
        parse("--config", tmp_path / "c.json")
    err = capsys.readouterr().err
    assert err.startswith("error: --config: ") and "c.json" in err and err.count("\n") == 1


def test_help_is_complete(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name in vars(Options()):
        assert f"--{name}" in text
    assert "A script." in text and "aae:" in text and "--max-steps" not in text and "--no_compile" not in text
    assert "size [voxels] (default: 1 2 3)" in text and "10% warm-up (default: 0.001)" in text
    assert "{none,csv}" in text and "--no_ema" in text and "--config" in text and "(default: none)" in text


def test_plain_values():
    config = parse("--out", "x", "--count", 3)
    assert cli.to_dict(config)["out"] == "x" and cli.to_dict(config)["channels"] == [16, 32]
    json.dumps(cli.to_dict(config))
    assert cli.frozen(config, ["aae"]) == {"lr": 1e-3, "channels": [16, 32], "shape": [1, 2, 3], "ema": True}
    general = cli.frozen(config, ["general"])
    assert general["seed"] == 0 and not {"device", "num_workers", "max_steps", "restart", "lr"} & set(general)


def test_without_presets():
    assert cli.parse(Options, [], description="").preset == "paper"


def test_imports_no_torch():
    code = "import sys, common.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    root = Path(cli.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def ends_with(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit_:
        cli.run(main)
    return exit_.value.code, capsys.readouterr().err


def test_run_turns_user_errors_into_one_line(capsys):
    assert ends_with(cli.UserError("no data in x:\n run y"), capsys) == (2, "error: no data in x: run y\n")
    full = ends_with(OSError(errno.ENOSPC, "No space left on device", "data/x"), capsys)
    assert full == (2, "error: disk full while writing data/x: free some space and run the same command again\n")
    assert ends_with(KeyboardInterrupt(), capsys)[0] == 130
    for bug in (OSError(errno.EIO, "broken"), ValueError("bug")):
        with pytest.raises(type(bug)):
            ends_with(bug, capsys)
    cli.run(lambda: None)


def test_only_rank_0_speaks_without_a_launcher_store(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert ends_with(cli.UserError("x"), capsys) == (2, "")


def test_a_negative_number_of_workers_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(cli.CommonOptions, ["--num_workers", "-1"], description="")
    assert stop.value.code == 2 and "--num_workers -1" in capsys.readouterr().err
