"""The command line: YAML files, dot-list and presets, the original's flags and schema, --help, --dry_run, mistakes."""

import json
import shutil
import sys
from dataclasses import fields
from unittest import mock

import pytest
import yaml

from common import cli
from lapt import main
from lapt.config import CONFIGS, HERE, PRESETS, SECTIONS, STAGES, TARGETS, merge
from tests.helpers import ROOT, run_main, run_script
from tests.lapt.stages import trained, words


def parsed(*argv):
    """The options that a command line means."""
    return main.parse([str(word) for word in argv])[1]


def refused(capsys, *argv):
    """The line that a command ends with."""
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: run_main(main, *argv))
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("stage", STAGES)
def test_yaml_files_hold_the_defaults_in_their_sections(stage):
    """A default lives in one place: the files document it and cannot drift away from it."""
    path = HERE / "configs" / f"{stage}.yaml"
    content = yaml.safe_load(path.read_text())
    assert content.pop("stage") == stage and set(content) <= set(SECTIONS)
    found, values = merge([path], [])
    known = {f.name: f.default for f in fields(CONFIGS[stage])}
    assert found == stage and len(values) > 15
    for name, value in values.items():
        assert (tuple(value) if isinstance(known[name], tuple) else value) == known[name], name
    assert parsed("--base", path) == CONFIGS[stage]()


PAPER = {  # specification 3.4; a batch counts GPUs and accumulated batches
    "vqgan": dict(lr=1.8e-5, batch_size=4, accumulate=2, channels=128, channel_mult=(1, 2, 4), num_res_blocks=2,
                  embed_dim=3, n_embed=8192, disc_start=30001, disc_weight=0.2, codebook_weight=1.0,
                  perceptual_weight=0.0, ema_decay=0.0),
    "guide": dict(lr=3.6e-5, batch_size=8, accumulate=2, epochs=2000, channels=64, channel_mult=(1, 2, 4), window=8,
                  tversky_alpha=0.7, tversky_beta=0.3, focal_gamma=2.0, threshold=0.5),
    "ldm": dict(lr=9.6e-5, batch_size=48, accumulate=1, model_channels=224, channel_mult=(1, 4, 8), head_channels=32,
                attention_resolutions=(8, 4, 2), ema_decay=0.9999, timesteps=1000, beta_start=0.0015, beta_end=0.0195,
                weight_decay=0.01, conditioner="rescaler"),
    "lapt": dict(lr=1.2e-5, batch_size=6, accumulate=1, w_img=0.01, w_les=0.02, patience=50),
    "ldm3d": dict(lr=1.6e-5, batch_size=8, accumulate=8, epochs=200, size=(192, 224, 32), conditioner="volume",
                  conditioner_channels=32, ema_decay=0.9999),
    "lapt3d": dict(lr=1.6e-5, batch_size=8, accumulate=8, epochs=200, w_img=0.01, w_les=0.0001, w_seg=0.001, window=8,
                   tversky_alpha=0.1, tversky_beta=0.9, focal_gamma=3.0),
}  # fmt: skip
BASE_RATES = {"vqgan": 4.5e-6, "guide": 4.5e-6, "ldm": 2e-6, "lapt": 2e-6, "ldm3d": 2e-6, "lapt3d": 2e-6}


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_are_the_published_numbers(stage):
    config = CONFIGS[stage]()
    assert {name: getattr(config, name) for name in PAPER[stage]} == PAPER[stage] and config.seed == 23
    # The original's rule, base rate x batch x GPUs x accumulation, gives the same learning rate.
    by_rule = parsed("--base", stage, f"model.base_learning_rate={BASE_RATES[stage]}")
    assert by_rule.learning_rate == pytest.approx(config.learning_rate) == pytest.approx(PAPER[stage]["lr"])


def test_presets_of_the_3d_release():
    vqgan, flat = parsed("--base", "vqgan", "--preset", "paper3d"), parsed("--base", "ldm", "--preset", "paper3d")
    assert (vqgan.modality_separate, vqgan.normalisation, vqgan.lr, vqgan.batch_size) == (True, "zscore", 1.44e-4, 32)
    assert vqgan.lr == pytest.approx(4.5e-6 * vqgan.batch_size) and flat.epochs == 400
    assert parsed("--base", "ldm3d").volumes and not flat.volumes


@pytest.mark.parametrize("stage", STAGES)
def test_presets_are_valid_and_upstream_is_the_originals_science(stage):
    assert {"paper", "upstream", "small", "tiny", "smoke"} <= PRESETS[stage].keys()
    for preset, values in PRESETS[stage].items():
        config = parsed("--base", stage, "--preset", preset)
        assert all(getattr(config, name) == value for name, value in values.items()), preset
    upstream = parsed("--base", stage, "--preset", "upstream")
    if stage == "vqgan":
        assert upstream.legacy_beta and upstream.statistics == "case"
    if stage in ("ldm", "ldm3d"):
        assert (upstream.latent_scale, upstream.spacing, upstream.final) == ("none", "leading", "first")
    if stage in ("lapt", "lapt3d"):
        how = (upstream.target, upstream.weighting, upstream.init_weights, upstream.reduction, upstream.select)
        assert how == ("recon", "none", "raw", "batch", "loss")
    if stage == "lapt":
        assert upstream.ema_decay == 0


@pytest.mark.parametrize("preset", ["paper", "paper3d", "small", "tiny", "upstream3d"])
def test_the_guide_sees_the_images_of_the_autoencoder(preset):
    """In every line of presets post-training finds a guide that was trained on the intensities of its own images."""
    autoencoder = parsed("--base", "vqgan", "--preset", preset)
    guide = parsed("--base", "guide", "--preset", preset if preset in PRESETS["guide"] else "upstream")
    assert (autoencoder.normalisation, autoencoder.statistics) == (guide.normalisation, guide.statistics)


def test_files_are_merged_from_left_to_right_then_presets_then_words(tmp_path):
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("stage: vqgan\ntraining: {lr: 1e-2, epochs: 7, batch_size: 2}\n")
    b.write_text("training: {lr: 0.5}\nmodel: {channels: 64}\n")
    config = parsed("--base", a, b, "training.batch_size=6", "-t")
    assert (config.lr, config.epochs, config.batch_size, config.channels) == (0.5, 7, 6, 64)
    assert parsed("--base", a, "-b", b).lr == 0.5  # a repeated flag adds, it does not replace
    tiny = PRESETS["vqgan"]["tiny"]
    config = parsed("--base", a, b, "--preset", "tiny", "training.lr=3")
    assert (config.lr, config.channels, config.epochs, config.preset) == (3.0, tiny["channels"], 7, "tiny")
    assert parsed("--base", a).lr == 0.01  # 1e-2 is a number, without a dot too


@pytest.mark.parametrize(
    "argv",
    [
        "--base vqgan training.lr=0.5 model.channel_mult=[1,2] -t",  # overrides right behind --base
        "-t training.lr=0.5 --base vqgan model.channel_mult=[1,2]",  # and right behind -t
        "--base vqgan -t true --no-test training.lr=0.5 --gpus 0, model.channel_mult=[1,2]",
    ],
)
def test_overrides_may_stand_anywhere(argv):
    args, config = main.parse(argv.split())
    assert args.train is True and config.lr == 0.5 and config.channel_mult == (1, 2) and config.stage == "vqgan"


def test_the_originals_flags():
    args, config = main.parse("-b ldm -n mine -l runs -p Study -s 7 --no-test False --gpus 0,1 -t False".split())
    assert (config.name, config.logdir, config.project, config.seed) == ("mine", "runs", "Study", 7)
    assert args.no_test is False and args.train is False and str(config.run) == "runs/mine"
    assert config.vqgan == "runs/vqgan"  # earlier stages are looked for beside it
    assert main.parse("-b ldm --no-test".split())[0].no_test is True


@pytest.mark.parametrize(
    ("text", "device", "found"),
    [("", "auto", []), ("0", "auto", [0]), ("0,", "auto", [0]), ("0,1", "cpu", [0, 1]), ("2, 3", "cuda", [2, 3])],
)
def test_gpus(text, device, found):
    """One GPU with and without the trailing comma; several."""
    assert main.chosen_devices(text, device) == found


def test_gpus_that_are_not_there_are_told_before_anything_starts():
    argv = ["--base", "vqgan", "-t", "--gpus", "0,1"]
    with (
        mock.patch.object(main.os, "execv") as started,
        mock.patch("torch.cuda.device_count", lambda: 1),
        mock.patch.dict(main.os.environ),
        pytest.raises(cli.UserError, match="--gpus 0,1: this machine has 1 CUDA device"),
    ):
        main.os.environ.pop("RANK", None)
        main.relaunch(*main.parse(argv), argv)
    assert not started.called


def test_gpus_auto_and_wrong():
    assert main.chosen_devices("auto", "cpu") == []
    for text in ("zero", "0,0", "-1"):
        with pytest.raises(cli.UserError, match="--gpus .* expected device numbers"):
            main.chosen_devices(text, "auto")


def test_several_devices_start_torchrun():
    argv = ["--base", "vqgan", "-t", "--device", "cpu", "--gpus", "0,1"]
    args, config = main.parse(argv)
    with mock.patch.object(main.os, "execv") as started, mock.patch.dict(main.os.environ):
        main.os.environ.pop("RANK", None)
        main.relaunch(args, config, argv)
        words = started.call_args.args[1]
        assert words[:2] == [sys.executable, "-m"] and "--nproc_per_node=2" in words and words[-len(argv) :] == argv
        main.os.environ["RANK"] = "0"  # inside torchrun nothing is started again
        started.reset_mock()
        main.relaunch(args, config, argv)
        assert not started.called


def test_schema_of_the_original(tmp_path):
    """Its keys are taken where they mean something; a class is looked up in a table, never imported."""
    path = tmp_path / "theirs.yaml"
    path.write_text(
        "model:\n  base_learning_rate: 4.5e-6\n  target: ldm.models.autoencoder.VQModel\n  params:\n    embed_dim: 4\n"
        "    ddconfig: {ch: 64, ch_mult: [1, 2]}\n    lossconfig: {target: x.Y, params: {disc_start: 5}}\n"
        "data: {target: main.DataModule, params: {batch_size: 3, num_workers: 1}}\n"
        "lightning: {trainer: {max_epochs: 9, accumulate_grad_batches: 2}}\n"
    )
    config = parsed("--base", path)
    assert config.stage == "vqgan" and (config.embed_dim, config.channels, config.channel_mult) == (4, 64, (1, 2))
    assert (config.disc_start, config.epochs, config.accumulate, config.batch_size) == (5, 9, 2, 6)
    assert config.learning_rate == pytest.approx(2.7e-5) and config.num_workers == 1
    assert set(TARGETS.values()) == set(STAGES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {lr: 1}\n", "no stage is named"),
        ("stage: vqgam\n", "stage 'vqgam' is unknown, did you mean vqgan?"),
        ("stage: vqgan\ntrainer: {max_epochs: 3}\n", "did you mean training?"),
        ("stage: vqgan\ntraining: {lrr: 1}\n", "no option training.lrr, did you mean lr?"),
        ("stage: vqgan\nmodel: {lr: 1}\n", "option lr belongs to section training, not model"),
        ("stage: vqgan\nloss: {w_les: 1}\n", "stage vqgan has no option loss.w_les"),
        ("stage: vqgan\ntraining: {lr: fast}\n", "lr: expected float, got 'fast'"),
        ("stage: vqgan\ndata: {normalisation: minmax}\n", "'minmax' is not one of quantile, zscore"),
        ("stage: [vqgan\n", "cannot be read as options"),
        ("- vqgan\n", "holds no options"),
        ("model: {target: os.system}\n", "model.target os.system is unknown"),
        ("stage: vqgan\nmodel: {params: {ckpt_path: x}}\n", "model.params.ckpt_path of the original's schema means"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, capsys, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    line = refused(capsys, "--base", path, "-t", "-l", tmp_path / "runs")
    assert message in line and (str(path) in line or "--config" in line)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("-t", "name a stage with --base"),
        ("--base nosuch.yaml", "no configuration file"),
        ("--base vqgan -t --trane", "unknown argument --trane, did you mean --train?"),
        ("--base vqgan training.lrr=1", "no option training.lrr, did you mean lr?"),
        ("--base vqgan trainin.lr=1", "unknown section 'trainin'"),
        ("--base vqgan -t maybe", "expected true or false"),
        ("--base vqgan --gpus 0,x -t", "expected device numbers"),
        ("--base vqgan --preset large", "invalid choice"),
        ("--base lapt --preset paper3d", "stage lapt has paper, upstream"),
        ("--base lapt loss.snr_gamma=0", "snr_gamma and t_max positive"),
        ("--base lapt3d loss.window=40", "choose 1 to 32"),
        ("--base ldm model.conditioner=volume", "take it with stage ldm3d"),
        ("--base ldm model.trainable=inter_slice", "only the networks of ldm3d"),
        ("--base guide data.window=40", "data.window 40 is to be 1 to its 32 slices"),
        ("--base vqgan model.channel_mult=[]", "model.channel_mult (): sizes of networks are at least 1"),
        ("--base vqgan model.norm_groups=0", "model.norm_groups 0: sizes"),
        ("--base ldm model.head_channels=0", "model.head_channels 0: sizes"),
        ("--base ldm training.lr=-1", "training.lr -1.0: must be above 0"),
        ("--base ldm training.steps=-5", "training.steps -5: must be 0 or more"),
        ("--base ldm --num_workers -1", "--num_workers -1: 0 loads in this process"),
        ("--base ldm training.epochs=0", "are both 0: give the training a length"),
        ("--base ldm3d data.size=[190,224,32] --dry_run --device cpu", "must be multiples of 16"),
        ("--base lapt diffusion.sample_steps=5000 --dry_run --device cpu", "5000 sampling steps: choose 1 to 1000"),
        ("--resume nowhere", "no run folder"),
        ("--base ldm --resume x --name y", "--resume"),
    ],
)  # fmt: skip
def test_a_bad_command_is_one_clear_line(capsys, argv, message):
    assert message in refused(capsys, *argv.split())


def test_help_of_the_program_and_of_every_stage(tmp_path):
    """Complete, from another folder, without data."""
    done = run_script(["lapt/main.py", "--help"], cwd=tmp_path)
    assert done.returncode == 0 and "usage:" in done.stdout and not done.stderr
    assert all(flag in done.stdout for flag in ("--base", "--resume", "--no-test", "--gpus", "--logdir", "--project"))
    for stage in STAGES:
        code = "import sys; from lapt import main; main.main(); assert 'torch' not in sys.modules"
        words = ["lapt/main.py", "--base", stage, "--help"]
        with mock.patch.object(sys, "argv", words), pytest.raises(SystemExit) as end:
            main.main()
        assert end.value.code == 0
    done = run_script(["-c", f"import sys; sys.argv = {words!r}; " + code.replace("main.main();", "")], cwd=ROOT)
    assert done.returncode == 0, done.stderr  # importing the entry script imports no torch
    assert not list(tmp_path.iterdir())


COUNTS = {  # fact 1: networks of the paper's size
    "vqgan": ("55,320,477 parameters", "2,764,609 parameters", "(2, 2, 192, 224) -> latents (2, 3, 48, 56)"),
    "guide": ("39,202,177 parameters",),
    "ldm": (f"{739_385_251 + 225:,} parameters", "latents (48, 3, 48, 56)"),
    "lapt": (f"{739_385_251 + 225:,} parameters", "55,320,477 parameters (0 trained)"),
    "ldm3d": (f"{1_007_827_777 + 149_904:,} parameters", "latents (32, 3, 48, 56)"),
    "lapt3d": (f"{1_007_827_777 + 149_904:,} parameters",),
}


@pytest.mark.parametrize("stage", STAGES)
def test_dry_run_at_the_papers_size(stage, tmp_path, capsys):
    """Parameter counts, shapes and a memory estimate, without data, and nothing is written."""
    run_main(main, "--base", stage, "--dry_run", "--device", "cpu", f"paths.root={tmp_path}")
    out = capsys.readouterr().out
    assert all(text in out for text in COUNTS[stage]) and "GiB per rank" in out and '"batch_size"' in out
    assert not list(tmp_path.iterdir())


def test_resume_takes_the_options_of_the_run(prepared, tmp_path):
    """--resume RUN or a checkpoint in it; the snapshot in configs/ is a file for --base."""
    runs = trained(prepared)
    given = [word for word in words("ldm", prepared, runs) if "=" in word]
    known = json.loads((runs / "ldm" / "config.json").read_text())
    for path in (runs / "ldm", runs / "ldm" / "checkpoints" / "last.ckpt"):
        config = parsed("--resume", path, "--device", "cpu", f"paths.data={prepared}")
        assert config.stage == "ldm" and config.run == (runs / "ldm").resolve()
        assert config.model_channels == known["model_channels"] and config.steps == known["steps"]
    moved = shutil.copytree(runs / "ldm", tmp_path / "runs" / "ldm")  # away from its data
    with pytest.raises(cli.UserError, match="its data, .*, are not in .*: name them with paths.data=FOLDER"):
        parsed("--resume", moved, "--device", "cpu")
    assert parsed("--resume", moved, f"paths.data={prepared}").data == str(prepared)
    snapshot = merge([runs / "ldm" / "configs" / "ldm.yaml"], [])[1]
    asked = merge([], ["stage=ldm", *given])[1]
    assert all(snapshot[name] == value for name, value in asked.items() if name not in ("data", "steps"))
