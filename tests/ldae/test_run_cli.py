"""The command line: verbs and option spellings, YAML files and presets, --help, --dry_run, and what is refused."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from common import cli
from ldae import run_cli
from ldae.config import CONFIGS, HERE, PRESETS, SECTIONS, STAGES, read_file
from tests.helpers import ROOT, run_main, run_script

AEKL = str(HERE / "config" / "aekl.yaml")


def parsed(*argv):
    return run_cli.parse([str(word) for word in argv])


def refused(capsys, *argv):
    """The line that a command ends with."""
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: run_main(run_cli, *argv))
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def yaml_file(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("fit --config X --lr 1", ("fit", "X", ["--lr", "1"])),
        ("--config X fit --lr 1", ("fit", "X", ["--lr", "1"])),
        ("--config=X --lr 1 test", ("test", "X", ["--lr", "1"])),
        ("--config X --part test fit", ("fit", "X", ["--part", "test"])),  # the value of an option is no verb
        ("predict --config X --data.part test", ("predict", "X", ["--data.part", "test"])),
        ("--config X --overwrite validate", ("validate", "X", ["--overwrite"])),  # a flag has no value
        ("--config X --paths.no-overwrite test", ("test", "X", ["--paths.no-overwrite"])),
        ("--config X --run=fit", (None, "X", ["--run=fit"])),
    ],
)
def test_verb_before_or_after_config(argv, expected):
    assert run_cli.split_command(argv.split()) == expected


def test_every_spelling_of_an_option_means_the_same():
    """Dotted overrides, `=`, plain keys, either order of verb and file (the README's command fits both)."""
    spellings = [
        ("fit", "--config", AEKL, "--lr", "0.5", "--channels", 32, 64),
        ("--config", AEKL, "fit", "--training.lr", "0.5", "--model.channels", 32, 64),
        ("fit", "--training.lr=0.5", "--config", AEKL, "--model.channels", 32, 64),
        ("--config=aekl", "--lr=0.5", "--channels", 32, 64, "fit"),
    ]
    found = [parsed(*words) for words in spellings]
    assert all(pair == found[0] for pair in found)
    verb, config = found[0]
    assert verb == "fit" and config.lr == 0.5 and config.channels == (32, 64) and config.stage == "aekl"
    assert parsed("fit", "--config", "ldae_pretrain", "--model.no_isotropic")[1].isotropic is False


@pytest.mark.parametrize("stage", STAGES)
def test_yaml_files_hold_the_defaults_in_their_sections(stage):
    """A default lives in one place: the files document it and cannot drift away from it."""
    path = HERE / "config" / f"{stage}.yaml"
    content = yaml.safe_load(path.read_text())
    assert content.pop("stage") == stage and set(content) <= set(SECTIONS)
    found, values = read_file(path)
    known = {f.name: f for f in fields(CONFIGS[stage])}
    assert found == stage and len(values) > 15
    for name, value in values.items():
        default = known[name].default
        assert (tuple(value) if isinstance(default, tuple) else value) == default, name
    assert parsed("fit", "--config", path)[1] == CONFIGS[stage]()


PAPER = {  # specification 3.2; a batch counts GPUs and accumulated batches
    "aekl": dict(
        channels=(64, 128, 128, 128), latent_channels=3, num_res_blocks=2, norm_groups=32, disc_layers=3,
        disc_channels=64, kl_weight=1e-7, adv_weight=0.025, perceptual_weight=1e-3, lpips_net="squeeze",
        lpips_fraction=0.5, lr=5e-5, lr_d=1e-4, batch_size=4, accumulate=4, epochs=100, patience=30,
    ),
    "ldae_pretrain": dict(
        base_channels=256, channel_mult=(1, 2, 3), num_res_blocks=2, attention_resolutions=(2, 4), num_heads=1,
        head_channels=-1, dropout=0.1, timesteps=1000, schedule="linear", lr=2.5e-5, ema_decay=0.999, batch_size=128,
        epochs=500, patience=100, classes=("AD", "CN", "MCI"),
    ),
    "ldae_repr_learn": dict(
        backbone="convnext_small", code_dim=768, encoder_heads=8, drop_path=0.4, gamma=0.1, lr=2.5e-5, ema_decay=0.999,
        batch_size=32, accumulate=4, epochs=400, patience=75,
    ),
    "classification": dict(lr=1e-6, batch_size=8, accumulate=2, epochs=50, patience=5, classes=("AD", "CN")),
    "regression": dict(lr=5e-5, weight_decay=1e-3, batch_size=8, epochs=50, patience=10, classes=("AD", "CN", "MCI")),
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_are_the_papers(stage):
    config = CONFIGS[stage]()
    assert {name: getattr(config, name) for name in PAPER[stage]} == PAPER[stage]
    assert (config.shape, config.spacing_mm, config.grad_clip, config.plane) == ((128, 160, 128), 1.5, 1.0, "axial")
    assert (config.seed, config.test_size) == (42, 0.1)


def test_all_stages_use_one_split():
    """Nothing that makes the split differs between stages: the original's differ, and leak test subjects."""
    configs = [CONFIGS[stage]() for stage in STAGES]
    assert len({(c.split, c.split_seed, c.val_size, c.test_size, c.split_rule) for c in configs}) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_presets_are_complete_and_valid(stage):
    assert list(PRESETS[stage]) == ["paper", "upstream", "small", "tiny", "smoke"]
    assert PRESETS[stage]["smoke"] == PRESETS[stage]["tiny"]
    for preset, values in PRESETS[stage].items():
        config = parsed("fit", "--config", stage, "--preset", preset)[1]
        assert all(getattr(config, name) == value for name, value in values.items()), preset


def test_preset_of_the_command_line_wins_over_the_file_and_options_win_over_all(tmp_path):
    file = yaml_file(tmp_path, "stage: aekl\ntraining: {lr: 0.5, grad_clip: 7.0, lr_d: 1e-2}\n")
    config = parsed("fit", "--config", file, "--preset", "tiny", "--lr_d", 3)[1]
    assert (config.lr, config.grad_clip, config.lr_d) == (PRESETS["aekl"]["tiny"]["lr"], 7.0, 3.0)
    assert parsed("fit", "--config", file)[1].lr_d == 0.01  # 1e-2 is a number, without a dot too
    # A preset that the file names is where the file starts from.
    file = yaml_file(tmp_path, "stage: aekl\ngeneral:\n  preset: tiny\ntraining:\n  lr: 0.5\n")
    config = parsed("fit", "--config", file)[1]
    assert config.lr == 0.5 and config.channels == PRESETS["aekl"]["tiny"]["channels"] and config.preset == "tiny"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {lr: 1}\n", "no stage is named"),
        ("stage: aelk\n", "stage 'aelk' is unknown, did you mean aekl?"),
        ("stage: aekl\nfit: {model: {}}\n", "unknown section 'fit'"),
        ("stage: aekl\ntrainer: {max_epochs: 3}\n", "did you mean training?"),
        ("stage: aekl\ntraining: {lrd: 1}\n", "no option training.lrd, did you mean lr_d?"),
        ("stage: aekl\nmodel: {lr: 1}\n", "option lr belongs to section training, not model"),
        ("stage: aekl\nmodel: {gamma: 1}\n", "stage aekl has no option model.gamma"),
        ("stage: aekl\nmodel: 3\n", "section model holds 3"),
        ("stage: aekl\npaths:\n  csv_path: { INSERT_PATH_TO_CSV }\n", "paths: csv_path is still the placeholder"),
        ("stage: aekl\npaths:\n  csv_path: INSERT_PATH_TO_CSV\n", "still the placeholder INSERT_PATH_TO_CSV"),
        ("stage: aekl\ntraining: {lr: fast}\n", "lr: expected float, got 'fast'"),
        ("stage: aekl\ndata: {order: LPS}\n", "'LPS' is not one of RAS, file"),
        ("stage: [aekl\n", "cannot be read as YAML"),
        ("- aekl\n", "holds no options"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, capsys, text, message):
    """Fact 21's kind of error: names the file, the place, and what to do; a forgotten placeholder too."""
    file = yaml_file(tmp_path, text)
    line = refused(capsys, "fit", "--config", file, "--root", tmp_path)
    assert message in line and (str(file) in line or "--config" in line)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("fit", "name a stage with --config"),
        ("--config aekl", "say what to do: one of fit, validate, test, predict"),
        ("fit --config nowhere.yaml", "no configuration file nowhere.yaml; ours are aekl.yaml"),
        ("fit --config aekl --chanels 3", "unknown argument --chanels, did you mean --channels?"),
        ("fit --config aekl --model.lr 3", "option lr belongs to section training, not model"),
        ("fit --config aekl --trainer.max_epochs 3", "unknown section 'trainer', did you mean training?"),
        ("fit --config aekl --training.lrr 3", "did you mean lr?"),
        ("fit --config aekl --preset papre", "did you mean paper?"),
        ("fit test --config aekl", "unknown argument test"),
        ("fit --config aekl --val_size 0.6 --test_size 0.5", "with a sum below 1"),
        ("fit --config aekl --ema_decay 1", "--ema_decay 1.0"),
        ("fit --config aekl --steps -3", "--steps -3: must be 0 or more"),
        ("fit --config aekl --epochs 0", "--epochs 0: must be at least 1"),
        ("fit --config aekl --lr -1", "--lr -1.0: must be 0 or more"),
        ("fit --config aekl --channels 32 0", "--channels 32 0: must be at least 1"),
        ("fit --config aekl --norm_groups 0", "--norm_groups 0: must be at least 1"),
        ("fit --config ldae_pretrain --head_channels 0", "--head_channels 0: must be -1"),
        ("predict --config ldae_pretrain --n_samples 0", "--n_samples 0: must be at least 1"),
        ("fit --config ldae_pretrain --dropout 1", "--dropout 1.0: must be 0 or more and less than 1"),
        ("fit --config ldae_repr_learn --drop_path 1", "--drop_path 1.0: must be"),
        ("fit --config ldae_repr_learn --encoder_heads 0", "--encoder_heads 0: must be at least 1"),
        ("fit --config regression --weight_decay -1", "--weight_decay -1.0: must be 0 or more"),
        ("fit --config ldae_repr_learn --backbone_depths 1 1", "--backbone_depths and --backbone_widths: give both"),
        ("fit --config classification --positive MCI", "--positive MCI: must be one of --classes AD CN"),
        ("fit --config classification --classes AD", "give at least two diagnoses"),
    ],
)
def test_a_bad_command_is_one_clear_line(capsys, argv, message):
    assert message in refused(capsys, *argv.split())


def test_a_runs_config_json_is_a_configuration_file(tmp_path):
    from common import training

    config = parsed("fit", "--config", "aekl", "--preset", "tiny", "--lr", 0.5, "--root", tmp_path)[1]
    (tmp_path / "config.json").write_text(json.dumps(training.recorded(config)))
    again = parsed("fit", "--config", tmp_path / "config.json", "--root", tmp_path)[1]
    assert (again.stage, again.lr, again.channels, again.preset) == ("aekl", 0.5, config.channels, "tiny")


NO_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code in (0, None), end.code
print("heavy:", sorted({"torch", "numpy", "nibabel", "sklearn"} & set(sys.modules)))
"""


@pytest.mark.parametrize("words", [["--help"], ["fit", "-h"], *(["fit", "--config", s, "--help"] for s in STAGES)])
def test_help_is_complete_and_imports_nothing_heavy(words, tmp_path):
    """Fact 38: --help of every stage, from another folder, lists every option of the stage and imports no torch."""
    command = [sys.executable, "-c", NO_TORCH, str(ROOT / "ldae/run_cli.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.rstrip().endswith("heavy: []"), done.stderr
    stage = words[-2] if "--config" in words else None
    for config in [CONFIGS[stage]] if stage else CONFIGS.values():
        assert all(f"--{f.name}" in done.stdout for f in fields(config))
    assert "usage:" in done.stdout and not list(Path(tmp_path).iterdir())


def test_a_user_sees_one_line_and_status_2(tmp_path):
    done = run_script(["ldae/run_cli.py", "fit", "--config", "aekl", "--root", tmp_path], cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert "lpips_weights" in done.stderr or "no table" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stage", "counts"),
    [
        ("aekl", ("13,766,248 parameters", "11,048,769 parameters", "(1, 3, 16, 20, 16)", "(1, 1, 14, 18, 14)")),
        ("classification", ("53,589,603 parameters", "(4, 1, 128, 128, 160)")),
        ("regression", ("53,588,834 parameters", "(4, 1)")),
    ],
)
def test_dry_run_at_the_papers_size(stage, counts, tmp_path, capsys):
    """Facts 1, 2 and 3: parameter counts and shapes, without data, and nothing is written."""
    run_main(run_cli, "fit", "--config", stage, "--dry_run", "--root", tmp_path, "--device", "cpu")
    out = capsys.readouterr().out
    assert all(text in out for text in counts) and '"batch_size"' in out and "GiB per rank" in out
    assert not list(tmp_path.iterdir())
