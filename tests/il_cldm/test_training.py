"""Both stages: the same result however a run is cut, resumed, split over ranks, micro-batches or recomputed."""

import copy
import json
import shutil
import signal

import numpy as np
import pytest
import torch

from common import checkpoint, runtime, training
from common.cli import UserError
from il_cldm import aae, ldm
from il_cldm.config import Config
from il_cldm.losses import reconstruction_loss
from il_cldm.model import build_autoencoder, build_denoiser, build_discriminator
from tests.helpers import assert_same_tensors, kill_and_resume, reached, signal_when_ready, two_ranks
from tests.il_cldm.conftest import TINY, call
from tests.il_cldm.test_pipeline import LATENTS, MRI, SYN, names

STAGES = {"aae": ("--train_aae", "AAE.pth.tar"), "ldm": ("--train_ldm", "Unet.pth.tar")}
# Biases that a following normalisation cancels: their gradient is rounding noise, which Adam turns into random steps.
CANCELLED = ("decoder.res4.conv1.bias", "decoder.up2.bias", "extractor.conv_in.bias", "extractor.res.conv1.bias",
             "extractor.res.conv2.bias")  # fmt: skip


def last(root, stage, exp="exp_1"):
    return root / "result" / exp / stage / "checkpoints" / "last.pt"


def log_rows(root, stage, exp="exp_1"):
    """Every row of the log but for the clock."""
    lines = (root / "result" / exp / stage / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def assert_same_run(a, b, stage):
    """Weights, EMA, optimizers, RNG, best checkpoint and logs agree bit by bit."""
    flag, best = STAGES[stage]
    assert_same_tensors(last(a, stage), last(b, stage))
    assert_same_tensors(a / "result" / "exp_1" / best, b / "result" / "exp_1" / best)
    assert log_rows(a, stage) == log_rows(b, stage)
    for kind in ("train", "val"):
        files = [root / "result" / "exp_1" / stage / f"{kind}.csv" for root in (a, b)]
        assert files[0].read_bytes() == files[1].read_bytes()


def fresh(trained, tmp_path, stage, name):
    """The trained study without the run of `stage`, so that it can be trained again."""
    root = shutil.copytree(trained, tmp_path / name)
    shutil.rmtree(root / "result" / "exp_1" / stage)
    (root / "result" / "exp_1" / STAGES[stage][1]).unlink()
    return root


@pytest.mark.parametrize("stage", STAGES)
def test_continued_epochs_equal_one_long_run(trained, tmp_path, stage):
    flag, best = STAGES[stage]
    steps = ("--aae_steps", 0, "--ldm_steps", 0)
    options = (flag, *steps, "--aae_val_every", 1, "--ldm_val_every", 1)
    once, twice = (fresh(trained, tmp_path, stage, name) for name in ("once", "twice"))
    call(once, *options, "--epochs", 4)
    call(twice, *options, "--epochs", 2)
    middle = checkpoint.load(last(twice, stage))["step"]
    call(twice, *options, "--epochs", 4)
    assert (middle, checkpoint.load(last(twice, stage))["step"]) == (6, 12)
    assert_same_run(once, twice, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_stop_in_the_middle_of_an_epoch_and_of_a_log_interval(trained, tmp_path, stage):
    """--max_steps cuts at step 5: the next row of the log still averages over steps before and after the cut."""
    root = fresh(trained, tmp_path, stage, "study")
    call(root, STAGES[stage][0], "--max_steps", 5)
    assert checkpoint.load(last(root, stage))["step"] == 5
    assert (root / "result" / "exp_1" / STAGES[stage][1]).is_file()  # usable although nothing was validated yet
    call(root, STAGES[stage][0])
    assert_same_run(trained, root, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_kill_and_signal_at_any_moment(trained, tmp_path, stage):
    flag, _ = STAGES[stage]
    options = [flag, "--aae_steps", 60, "--ldm_steps", 60, "--aae_val_every", 4, "--ldm_val_every", 4]
    if stage == "aae":
        options += ["--kl_weight", 1e-4, "--augment_shift", 1]  # more randomness that has to be resumed
    else:
        options += ["--unet_dropout", 0.2]
    reference, killed, stopped = (fresh(trained, tmp_path, stage, name) for name in ("reference", "killed", "stopped"))
    call(reference, *options)

    def command(root):
        return ["il_cldm/main.py", "--root", root, *TINY, *options]

    def ready(kill):
        return reached(killed / "result/exp_1" / stage / "log.jsonl", (2, 20)[kill])()

    environment = {"OMP_NUM_THREADS": "1"}
    done = kill_and_resume(command(killed), ready, kills=2, max_delay_s=0.2, env=environment)
    assert done.returncode == 0, done.stderr
    assert_same_run(reference, killed, stage)

    log = stopped / "result/exp_1" / stage / "log.jsonl"
    next_stage = {"aae": "--test_aae", "ldm": "--gen"}[stage]
    ended = signal_when_ready([*command(stopped), next_stage], reached(log, 4), signal.SIGTERM, env=environment)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stdout
    assert "of 60; the same command continues" in ended.stdout
    assert "check test PET" not in ended.stdout and "synthetic PET in" not in ended.stdout  # no later stage ran
    assert 4 <= checkpoint.load(last(stopped, stage))["step"] < 60
    call(stopped, *options)
    assert_same_run(reference, stopped, stage)


def assert_close_states(a, b, learning_rate):
    """Weights after a few Adam steps: equal but for the entries whose gradient is rounding noise."""
    assert a.keys() == b.keys()
    for key in a:
        if key.removeprefix("denoiser.") in CANCELLED or not a[key].is_floating_point():
            continue
        difference = (a[key] - b[key]).abs()
        assert difference.mean() < 0.02 * learning_rate, (key, difference.mean(), difference.max())


@pytest.mark.slow
def test_two_ranks_train_as_one(trained, tmp_path):
    """Same global batch, same losses and weights; then rank-sharded work on these weights."""
    one, two = (fresh(trained, tmp_path, "aae", name) for name in ("one", "two"))
    for root in (one, two):
        shutil.rmtree(root / "result" / "exp_1" / "ldm")
        (root / "result" / "exp_1" / "Unet.pth.tar").unlink()
    options = ["--train_aae", "--enc", "--train_ldm", "--overwrite", "--aae_steps", 5, "--ldm_steps", 5,
               "--save_every", 0]  # fmt: skip
    call(one, *options)
    done = two_ranks(["il_cldm/main.py", "--root", two, *TINY, *options])
    assert done.returncode == 0, done.stderr[-3000:]
    for stage, objects in (("aae", ("autoencoder", "discriminator")), ("ldm", ("denoiser",))):
        for row_1, row_2 in zip(log_rows(one, stage), log_rows(two, stage), strict=True):
            assert row_1.keys() == row_2.keys()
            for key, value in row_1.items():
                assert row_2[key] == (value if key == "kind" else pytest.approx(value, rel=2e-3, abs=2e-3)), (
                    stage,
                    key,
                )
        a, b = checkpoint.load(last(one, stage)), checkpoint.load(last(two, stage))
        for name in objects:
            assert_close_states(a[name], b[name], 1e-3)


@pytest.mark.slow
def test_two_ranks_share_encoding_generation_and_evaluation(trained, study):
    shutil.rmtree(study / "data/latent_Abeta")
    shutil.rmtree(study / SYN)
    done = two_ranks(["il_cldm/main.py", "--root", study, *TINY, "--test_aae", "--enc", "--enc_test", "--gen",
                      "--evaluate"])  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for split, folder in (("train", LATENTS), ("test", LATENTS), ("test", SYN)):
        for name in names(study, split):
            assert (study / folder / name).read_bytes() == (trained / folder / name).read_bytes()
    assert (study / SYN / "evaluation.csv").read_bytes() == (trained / SYN / "evaluation.csv").read_bytes()
    for file in (f"{LATENTS}/latents.json", f"{SYN}/generation.json", "result/exp_1/aae/test.json"):
        a, b = (json.loads((root / file).read_text()) for root in (trained, study))
        for key in a:
            assert b[key] == (pytest.approx(a[key]) if isinstance(a[key], (float, list)) and key != "files" and
                              key != "train_list" else a[key])  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_other_options_are_refused_and_restart_begins_anew(trained, study, stage):
    flag, best = STAGES[stage]
    kept = last(study, stage).read_bytes()
    with pytest.raises(UserError, match="learning_rate: 0.001 before, 0.002 now.*--restart"):
        call(study, flag, "--learning_rate", 2e-3)
    with pytest.raises(UserError, match="seed: 0 before, 5 now"):
        call(study, flag, "--seed", 5)
    assert last(study, stage).read_bytes() == kept
    call(study, flag, "--num_workers", 1)  # free to change; and the run is complete: nothing happens
    assert last(study, stage).read_bytes() == kept
    call(study, flag, "--learning_rate", 2e-3, "--restart", "--max_steps", 4)
    state = checkpoint.load(last(study, stage))
    assert state["step"] == 4 and state["config"]["learning_rate"] == 2e-3
    assert checkpoint.load(study / "result" / "exp_1" / best)["step"] == 4  # the old best one went with the old run
    call(study, flag, "--restart")
    assert_same_run(trained, study, stage)


def test_another_training_list_is_refused(study):
    path = study / "data_info" / "train.txt"
    path.write_text("\n".join(names(study, "train")[:-1]))
    with pytest.raises(UserError, match="train_list"):
        call(study, "--train_aae")


def test_weights_of_somebody_else_are_not_replaced(data, trained):
    target = data / "result" / "exp_1" / "AAE.pth.tar"
    target.parent.mkdir(parents=True)
    shutil.copy(trained / "result" / "exp_1" / "AAE.pth.tar", target)
    before = target.read_bytes()
    with pytest.raises(UserError, match="AAE.pth.tar was not made by a run that can continue.*--restart"):
        call(data, "--train_aae")
    assert target.read_bytes() == before


@pytest.mark.parametrize("stage", STAGES)
def test_patience(trained, tmp_path, stage, capsys):
    """At learning rate 0 only the first validation is an improvement."""
    root = fresh(trained, tmp_path, stage, "study")
    options = (STAGES[stage][0], "--learning_rate", 0, "--patience", 2, "--aae_val_every", 1, "--ldm_val_every", 1)
    call(root, *options)
    assert checkpoint.load(last(root, stage))["step"] == 9  # epochs of 3 steps: best at 3, worse or equal at 6 and 9
    assert checkpoint.load(root / "result" / "exp_1" / STAGES[stage][1])["step"] == 3
    before = last(root, stage).read_bytes()
    call(root, *options)
    assert last(root, stage).read_bytes() == before
    assert "no improvement in 2 validations" in capsys.readouterr().out


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_do_not_change_the_step(trained, tmp_path, stage):
    a, b = (fresh(trained, tmp_path, stage, name) for name in "ab")
    options = (STAGES[stage][0], "--max_steps", 4, "--batch_size", 4, "--disc_norm", "group", "--clip_grad", 5)
    call(a, *options)
    call(b, *options, "--accumulate", 2)
    state_a, state_b = checkpoint.load(last(a, stage)), checkpoint.load(last(b, stage))
    for name in ("autoencoder", "discriminator") if stage == "aae" else ("denoiser",):
        assert_close_states(state_a[name], state_b[name], 1e-3)
    for row_a, row_b in zip(log_rows(a, stage), log_rows(b, stage), strict=True):
        for key in row_a.keys() - {"kind"}:
            assert row_b[key] == pytest.approx(row_a[key], rel=1e-3, abs=1e-4), key
    with pytest.raises(UserError, match="--batch_size 4 cannot be shared .* --accumulate 3: give a multiple of 3"):
        call(b, *options, "--accumulate", 3)


@pytest.mark.parametrize("option", ["batch_size", "accumulate", "log_every", "aae_val_every"])
def test_intervals_of_zero_are_one_error_line(data, option):
    with pytest.raises(UserError, match=f"--{option} 0: must be at least 1"):
        call(data, "--train_aae", f"--{option}", 0)


def test_logged_losses_are_means_over_steps(trained, tmp_path):
    a, b = (fresh(trained, tmp_path, "ldm", name) for name in "ab")
    call(a, "--train_ldm", "--log_every", 1, "--max_steps", 6)
    call(b, "--train_ldm", "--log_every", 3, "--max_steps", 6)
    single = [row["loss"] for row in log_rows(a, "ldm") if row["kind"] == "train"]
    means = [row["loss"] for row in log_rows(b, "ldm") if row["kind"] == "train"]
    assert means == pytest.approx([np.mean(single[:3]), np.mean(single[3:])], rel=1e-6)


def test_unet_file_holds_the_average_and_last_holds_both(trained):
    state = checkpoint.load(last(trained, "ldm"))
    best = checkpoint.load(trained / "result" / "exp_1" / "Unet.pth.tar")
    raw, average = state["denoiser"], state["ema"]["weights"]
    moved = [key for key in raw if not torch.equal(raw[key], average[key])]
    assert "conv_out.weight" in moved and state["ema"]["step"] == 12
    if best["step"] == 12:
        assert all(torch.equal(best["state_dict"][key], average[key]) for key in average)
    assert best["preparation"]["shape"] == [16, 16, 16]


def test_training_lowers_the_loss(trained):
    rows = [row for row in log_rows(trained, "aae") if row["kind"] == "train"]
    assert rows[-1]["loss_rec"] < 0.5 * rows[0]["loss_rec"]


def small_config(**options):
    return Config(
        aae_channels=4, aae_groups=4, disc_channels=(4, 8), unet_channels=8, unet_mults=(1, 2), unet_groups=4,
        unet_res_blocks=1, time_dim=16, **options
    )  # fmt: skip


def gradients(*networks):
    return {f"{i}.{n}": p.grad.clone() for i, net in enumerate(networks) for n, p in net.named_parameters()}


def test_checkpointing_gives_the_same_gradients():
    x, noise = torch.rand(2, 1, 16, 16, 16), torch.randn(2, 1, 4, 4, 4)
    found = []
    for checkpointing in (False, True):
        config = small_config(checkpointing=checkpointing, kl_weight=1e-3)
        torch.manual_seed(0)
        autoencoder, discriminator, denoiser = (
            f(config) for f in (build_autoencoder, build_discriminator, build_denoiser)
        )
        aae.aae_step(autoencoder, training.RealAndFake(discriminator), x, config, noise=noise)
        t, label = torch.tensor([3, 700]), torch.tensor([1, 4])
        model = ldm.DenoiserWithMri(denoiser)
        ldm.ldm_loss(model, ldm.noise_schedule(config), noise, x, label, t, noise.flip(0)).backward()
        found.append(gradients(autoencoder, discriminator, denoiser))
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


def test_the_step_is_two_separate_gradients():
    """Acceptance 8: the autoencoder's gradient is that of its own loss alone, the discriminator's that of the hinge."""
    config, x = small_config(), torch.rand(2, 1, 16, 16, 16)
    torch.manual_seed(0)
    autoencoder, discriminator = build_autoencoder(config), build_discriminator(config)
    other = copy.deepcopy((autoencoder, discriminator))
    losses = aae.aae_step(autoencoder, training.RealAndFake(discriminator), x, config)

    x_hat = other[0](x)[0]
    real, fake = other[1](x), other[1](x_hat)
    generator = 100 * reconstruction_loss(x_hat, x) - fake.mean()
    hinge = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    expected = torch.autograd.grad(generator, list(other[0].parameters()), retain_graph=True)
    expected_disc = torch.autograd.grad(hinge, list(other[1].parameters()))
    for network, grads in ((autoencoder, expected), (discriminator, expected_disc)):
        for parameter, grad in zip(network.parameters(), grads, strict=True):
            assert torch.allclose(parameter.grad, grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max() + 1))
    assert losses["loss_disc"] == pytest.approx(hinge.item(), rel=1e-6)
    assert losses["loss_adv"] == pytest.approx(-fake.mean().item(), rel=1e-5)


def test_draws_skip_step_zero_and_are_split_over_ranks():
    config = Config(batch_size=4, noiseSteps=5, label_dropout=0.5)
    one = runtime.Runtime(torch.device("cpu"))
    ranks = [runtime.Runtime(torch.device("cpu"), rank=r, world_size=2) for r in range(2)]
    seen, dropped = set(), []
    for step in range(200):
        whole = list(ldm.draw(config, step, (1, 2, 2, 2), one))
        halves = [list(ldm.draw(config, step, (1, 2, 2, 2), rt)) for rt in ranks]
        for a, b, c in zip(whole, *halves, strict=True):
            assert torch.equal(a, torch.cat([b, c]))
        seen |= set(whole[0].tolist())
        dropped += whole[2].tolist()
    assert seen == {1, 2, 3, 4}
    assert 0.42 < np.mean(dropped) < 0.58


def test_labels_reach_the_denoiser_only_through_dropout(trained):
    """--label_dropout 0, as the original trained: no null class; else the last row of the table is the null class."""
    state = checkpoint.load(trained / "result" / "exp_1" / "Unet.pth.tar")["state_dict"]
    assert state["projector.label.weight"].shape == (5, 16)
    assert build_denoiser(small_config(label_dropout=0.0)).null_label is None


def test_stage_two_reads_mri_at_training_time(trained, tmp_path):
    """The image condition matters: other MRI, other weights, with latents and noise the same."""
    a, b = (fresh(trained, tmp_path, "ldm", name) for name in "ab")
    swap = names(b, "train")[:2]
    files = [b / MRI / name for name in swap]
    content = [file.read_bytes() for file in files]
    for file, other in zip(files, reversed(content), strict=True):
        file.write_bytes(other)
    for root in (a, b):
        call(root, "--train_ldm", "--max_steps", 3)
    weights = [checkpoint.load(last(root, "ldm"))["denoiser"]["extractor.conv_out.weight"] for root in (a, b)]
    assert not torch.equal(*weights)
