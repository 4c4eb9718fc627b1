"""Options of the training commands: sizes of the presets, exact lengths, and mistakes that end in one line."""

import json

import pytest
import torch

from common import cli
from common.cli import UserError
from common.training import recorded
from mgdcr import trainer
from mgdcr.config import PRESETS, AutoencConfig, DDIMConfig, EncodeConfig, LatentDPMConfig
from mgdcr.latent_net import MLPSkipNet
from tests.helpers import ROOT, run_script

CONFIGS = {"autoenc": AutoencConfig, "ddim": DDIMConfig, "latent_dpm": LatentDPMConfig}
SCRIPTS = ("run_ffhq128.py", "run_ffhq128_ddim.py", "encode.py", "latent_dpm.py")


def resolved(name, preset="paper", **values):
    return CONFIGS[name](**PRESETS[name][preset] | values)


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def network_of(config):
    with torch.device("meta"):
        return trainer.build_network(trainer.kind_of(config), config.network())


@pytest.mark.parametrize("preset", ["paper", "upstream"])
def test_A1_parameters_of_the_published_networks(preset):
    """A1: the paper's options build networks of exactly the published sizes."""
    model = network_of(resolved("autoenc", preset))
    assert parameters(model) == 128_538_241 and parameters(model.encoder) == 24_671_232
    assert parameters(network_of(resolved("ddim", preset))) == 98_613_889
    with torch.device("meta"):
        assert parameters(MLPSkipNet(**resolved("latent_dpm", preset).network(512))) == 54_109_696


def test_tiny_is_tiny_and_small_is_in_between():
    """At most two million parameters in the preset that a CPU trains."""
    tiny, small = (parameters(network_of(resolved("autoenc", preset))) for preset in ("tiny", "small"))
    assert 100_000 < tiny <= 2_000_000 < small < 128_538_241
    assert parameters(network_of(resolved("ddim", "tiny"))) <= 2_000_000


@pytest.mark.parametrize("name", CONFIGS)
def test_every_preset_is_valid_and_changes_only_options_that_exist(name):
    for preset in PRESETS[name]:
        config = resolved(name, preset)
        assert config.total_steps >= 1 and config.batch_size % config.accumulate == 0
    assert PRESETS[name]["smoke"] == PRESETS[name]["tiny"]


def test_published_values():
    """What the public code states: widths, learning rate, clipping, average, schedule of the codes."""
    config = resolved("autoenc")
    assert (config.image_size, config.model_channels, config.channel_mult) == (128, 128, (1, 1, 2, 3, 4))
    assert config.enc_channel_mult == (1, 1, 2, 3, 4, 4) and config.attention_resolutions == (16,)
    assert (config.batch_size, config.lr, config.grad_clip, config.ema_decay) == (100, 1e-4, 1.0, 0.9999)
    assert (config.dropout, config.weight_decay, config.warmup_samples) == (0.1, 0.0, 0)
    dpm = resolved("latent_dpm")
    assert (dpm.hidden, dpm.layers, dpm.beta, dpm.loss, dpm.weight_decay) == (2048, 10, 0.008, "l1", 0.01)
    assert dpm.network(512)["skip_layers"] == tuple(range(1, 10)) and dpm.batch_size == 256
    assert resolved("autoenc", "upstream").select == "last" and resolved("autoenc", "upstream").augment == "none"


def test_A24_steps_of_a_budget():
    """A24: ceil(samples / batch) for any pair; intervals are never zero steps."""
    for samples, batch, steps in ((1, 100, 1), (100, 100, 1), (101, 100, 2), (68_000_000, 100, 680_000)):
        config = resolved("autoenc", total_samples=samples, batch_size=batch)
        assert config.total_steps == steps
    config = resolved("autoenc", batch_size=100)
    assert config.steps_of(1) == 1 and config.steps_of(500_000) == 5000


def test_paths_hang_off_the_root(tmp_path):
    """The default layout of the README: checkpoints/cardiac_autoenc/latent.ckpt, datasets, logs."""
    root = tmp_path / "r"
    config, dpm = resolved("autoenc", root=str(root)), resolved("latent_dpm", root=str(root))
    assert config.best_path == root / "checkpoints" / "cardiac_autoenc" / "best.ckpt"
    assert config.last_path == root / "checkpoints" / "cardiac_autoenc" / "last.ckpt"
    assert config.store == str(root / "datasets" / "cardiac_cine_128.lmdb")
    assert config.run == str(root / "logs" / "cardiac_autoenc")
    assert EncodeConfig(root=str(root)).out == dpm.latents == str(config.best_path.with_name("latent.ckpt"))
    assert dpm.ckpt == str(config.best_path)
    assert resolved("ddim", root=str(root)).best_path.parent == root / "checkpoints" / "cardiac_ddim"
    assert str(tmp_path) not in json.dumps(recorded(config) | {"root": ""})


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("autoenc", {"total_samples": 0}, "--total_samples 0"),
        ("autoenc", {"image_size": 100}, "--image_size 100: must be a multiple of 16"),
        ("autoenc", {"image_size": 48}, "--enc_channel_mult"),
        ("autoenc", {"lr": 0.0}, "--lr"),
        ("autoenc", {"ema_decay": 1.0}, "--ema_decay 1.0"),
        ("autoenc", {"val_steps": 1001}, "--val_steps 1001"),
        ("autoenc", {"sample_steps": 0}, "--sample_steps 0"),
        ("autoenc", {"val_size": 0.6, "test_size": 0.4}, "--val_size 0.6"),
        ("autoenc", {"channel_mult": ()}, "channel_mult"),
        ("autoenc", {"dropout": 1.0}, "--dropout 1.0"),
        ("autoenc", {"enc_out_channels": 0}, "--enc_out_channels"),
        ("ddim", {"seed": -1}, "--seed -1"),
        ("ddim", {"warmup_samples": -1}, "--warmup_samples"),
        ("latent_dpm", {"layers": 1}, "--layers"),
        ("latent_dpm", {"beta": 1.5}, "--beta 1.5"),
        ("latent_dpm", {"time_channels": 7}, "--time_channels 7"),
        ("latent_dpm", {"latent_steps": 1001}, "--latent_steps 1001"),
    ],
)
def test_impossible_options(name, values, message):
    with pytest.raises(UserError, match=message):
        resolved(name, **values)


def test_impossible_batch_of_encode():
    with pytest.raises(UserError, match="--batch_size 0"):
        EncodeConfig(batch_size=0)


def test_heads_that_no_network_has():
    """What only the network can judge ends in a message that names the options."""
    with pytest.raises(UserError, match="5 heads.*--num_heads"):
        network_of(resolved("autoenc", "tiny", num_heads=5))


def test_mistyped_option_and_config_file(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        cli.parse(AutoencConfig, ["--total_sample", "5"], description="", presets=PRESETS["autoenc"])
    assert left.value.code == 2 and "did you mean --total_samples?" in capsys.readouterr().err
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"total_samples": 7, "channel_mult": [1, 2, 4]}))
    words = ["--preset", "tiny", "--config", str(path), "--lr", "1e-3"]
    config = cli.parse(AutoencConfig, words, description="", presets=PRESETS["autoenc"])
    assert (config.total_samples, config.channel_mult, config.lr, config.image_size) == (7, (1, 2, 4), 1e-3, 64)


@pytest.mark.parametrize("script", SCRIPTS)
def test_A31_help_from_another_folder_needs_no_torch(script, tmp_path):
    """A31: --help answers, lists its options, and imports no torch; a bad path is one line and exit status 2."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    done = run_script([f"mgdcr/{script}", "--help"], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and "--root" in done.stdout, done.stderr
    assert str(ROOT) not in done.stdout.replace(str(ROOT / "mgdcr"), "")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_A31_missing_inputs_are_one_line(script, tmp_path):
    """A31: without store, prior or codes every command says what is missing and how to make it."""
    done = run_script([f"mgdcr/{script}", "--root", tmp_path, "--device", "cpu"], cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert ".py" in done.stderr and not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("name", CONFIGS)
def test_dry_run_prints_and_touches_nothing(name, tmp_path, capsys):
    from common import runtime
    from mgdcr import code_prior

    config = resolved(name, "tiny", root=str(tmp_path), device="cpu", dry_run=True)
    rt = runtime.Runtime(torch.device("cpu"))
    (code_prior if name == "latent_dpm" else trainer).dry_run(config, rt)
    out = capsys.readouterr().out
    assert f"{config.total_steps:,} steps of" in out and "parameters" in out
    assert not list(tmp_path.iterdir())
