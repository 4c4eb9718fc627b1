"""Stages 2 and 3: the same result however a run is cut, killed, resumed, or split over ranks and micro-batches."""

import json
import shutil
import signal
import socket

import pytest
import torch

from common import checkpoint
from common.cli import UserError
from tests.helpers import assert_same_tensors, kill_and_resume, reached, signal_when_ready, two_ranks
from tests.ldae import stages
from tests.ldae.stages import best, fresh, last, log_rows, trained

STAGES = ("ldae_pretrain", "ldae_repr_learn")
NETWORK = {"ldae_pretrain": "unet", "ldae_repr_learn": "learned"}
NOISY = {"ldae_pretrain": ["--dropout", 0.1], "ldae_repr_learn": ["--encoder_dropout", 0.1, "--drop_path", 0.2]}
STILL = {"ldae_pretrain": [], "ldae_repr_learn": ["--encoder_dropout", 0, "--drop_path", 0]}


@pytest.fixture(scope="session")
def done(cohort):
    return trained(cohort)


def assert_same_run(a, b, stage):
    """Weights, average, optimizer, RNG, best checkpoint and logs agree bit by bit."""
    assert_same_tensors(last(a, stage), last(b, stage))
    assert_same_tensors(best(a, stage), best(b, stage))
    assert log_rows(a, stage) == log_rows(b, stage)
    for kind in ("train", "val"):
        assert (a / f"runs/{stage}/{kind}.csv").read_bytes() == (b / f"runs/{stage}/{kind}.csv").read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_stop_in_the_middle_of_an_epoch_and_of_a_log_interval(done, tmp_path, stage):
    """Fact 26: cut at step 5 and continued it is the run that was left alone, bit by bit."""
    root = fresh(done, tmp_path, stage, "study")
    stages.run(stage, root, "--max_steps", 5)
    state = checkpoint.load(last(root, stage))
    assert state["step"] == 5
    assert best(root, stage).is_file()  # usable although nothing was validated yet
    stages.run(stage, root)
    assert_same_run(done, root, stage)
    epochs = [row["epoch"] for row in log_rows(root, stage, "train")]
    assert epochs == sorted(epochs) and epochs[-1] == 1.5  # 30 scans in batches of 4: eight steps an epoch


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_kill_at_any_moment(done, tmp_path, stage):
    """Fact 26: SIGKILL at a random moment: bit-identical to a run that was left alone."""
    options = ["--steps", 40, *NOISY[stage]]
    reference, killed = (fresh(done, tmp_path, stage, name) for name in ("reference", "killed"))
    stages.run(stage, reference, *options)
    command = [*stages.command(stage), "--root", killed, *options]
    ready = reached(killed / "runs" / stage / "log.jsonl", 4)
    ended = kill_and_resume(command, lambda kill: ready(), max_delay_s=0.5, env={"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    assert_same_run(reference, killed, stage)


@pytest.mark.slow
def test_signal(done, tmp_path):
    """SIGTERM ends a run cleanly: its own exit status, what was done is saved, and the same command continues."""
    stage, options = "ldae_repr_learn", ["--steps", 40]
    root = fresh(done, tmp_path, stage, "study")
    command = [*stages.command(stage), "--root", root, *options]
    log = root / "runs" / stage / "log.jsonl"
    ended = signal_when_ready(command, reached(log, 4), signal.SIGTERM, env={"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 128 + signal.SIGTERM, ended.stdout
    assert "of 40; the same command continues" in ended.stdout
    assert 4 <= checkpoint.load(last(root, stage))["step"] < 40


@pytest.mark.parametrize("stage", STAGES)
def test_other_options_are_refused_and_restart_begins_anew(done, tmp_path, stage):
    root = shutil.copytree(done, tmp_path / "study")
    kept = last(root, stage).read_bytes()
    with pytest.raises(UserError, match="lr: .* before, 0.002 now.*--restart"):
        stages.run(stage, root, "--lr", 2e-3)
    with pytest.raises(UserError, match="seed: 42 before, 5 now"):
        stages.run(stage, root, "--seed", 5)
    option, value = {"ldae_pretrain": ("beta_end", 0.2), "ldae_repr_learn": ("gamma", 0.3)}[stage]
    with pytest.raises(UserError, match=f"{option}: .* before, {value} now"):  # the objective is part of a run
        stages.run(stage, root, f"--{option}", value)
    stages.run(stage, root, "--num_workers", 1)  # free to change; and the run is complete: nothing happens
    assert last(root, stage).read_bytes() == kept
    stages.run(stage, root, "--lr", 2e-3, "--restart", "--max_steps", 2)
    assert checkpoint.load(last(root, stage))["step"] == checkpoint.load(best(root, stage))["step"] == 2
    stages.run(stage, root, "--restart")
    assert_same_run(done, root, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_weights_of_somebody_else_are_not_replaced(done, tmp_path, stage):
    root = fresh(done, tmp_path, stage, "study")
    best(root, stage).parent.mkdir(parents=True)
    shutil.copy(best(done, stage), best(root, stage))
    with pytest.raises(UserError, match="best.ckpt was not made by a run that can continue.*--restart"):
        stages.run(stage, root)


@pytest.mark.parametrize("stage", STAGES)
def test_patience(done, tmp_path, stage, capsys):
    """At learning rate 0 only the first validation is an improvement."""
    root = fresh(done, tmp_path, stage, "study")
    options = ("--lr", 0, "--patience", 2, "--steps", 40, "--ema_decay", 0)
    stages.run(stage, root, *options)
    assert checkpoint.load(last(root, stage))["step"] == 24  # epochs of 8 steps: best at 8, no better at 16 and 24
    assert checkpoint.load(best(root, stage))["step"] == 8
    before = last(root, stage).read_bytes()
    stages.run(stage, root, *options)
    assert last(root, stage).read_bytes() == before
    assert "no improvement in 2 validations" in capsys.readouterr().out


def assert_close_states(a, b, rate):
    """Weights after a few Adam steps: equal but for entries whose gradient is rounding noise."""
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key] - b[key]).abs().mean() < 0.02 * rate, key


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_do_not_change_the_step(done, tmp_path, stage):
    """Facts 23 and 24: with --accumulate 4 the same losses, true gradient norms and one average per optimizer step."""
    a, b = (fresh(done, tmp_path, stage, name) for name in "ab")
    options = ("--max_steps", 4, "--grad_clip", 0.05, *STILL[stage])
    stages.run(stage, a, *options)
    stages.run(stage, b, *options, "--accumulate", 4, "--checkpointing")
    state_a, state_b = checkpoint.load(last(a, stage)), checkpoint.load(last(b, stage))
    assert state_a["ema"]["step"] == state_b["ema"]["step"] == state_b["step"] == 4
    assert_close_states(state_a[NETWORK[stage]], state_b[NETWORK[stage]], 1e-3)
    assert_close_states(state_a["ema"]["weights"], state_b["ema"]["weights"], 1e-3)
    for row_a, row_b in zip(log_rows(a, stage), log_rows(b, stage), strict=True):
        for key in row_a.keys() - {"kind"}:
            assert row_b[key] == (row_a[key] and pytest.approx(row_a[key], rel=1e-3, abs=1e-4)), key
    norms = [row["grad_norm"] for row in log_rows(a, stage, "train")]
    assert min(norms) > 0.05  # measured before clipping
    with pytest.raises(UserError, match="--batch_size 4 cannot be shared .* --accumulate 3: give a multiple of 3"):
        stages.run(stage, b, *options, "--accumulate", 3)


@pytest.mark.slow
def test_two_ranks_train_as_one(done, tmp_path):
    """Same global batch on one and on two ranks: same losses, scores and weights to float tolerance."""
    for stage in STAGES:
        one, two = (fresh(done, tmp_path, stage, f"{stage}_{name}") for name in ("one", "two"))
        options = ["--max_steps", 8, "--save_every", 0, *STILL[stage]]
        stages.run(stage, one, *options)
        ended = two_ranks([*stages.command(stage), "--root", two, *options])
        assert ended.returncode == 0, ended.stderr[-3000:]
        for row_1, row_2 in zip(log_rows(one, stage), log_rows(two, stage), strict=True):
            for key, value in row_1.items():
                same = value if key == "kind" or value is None else pytest.approx(value, rel=5e-3, abs=5e-3)
                assert row_2[key] == same, (stage, key)
        a, b = checkpoint.load(last(one, stage)), checkpoint.load(last(two, stage))
        assert_close_states(a[NETWORK[stage]], b[NETWORK[stage]], 5e-3)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("option", ["batch_size", "accumulate", "log_every", "val_every"])
def test_intervals_of_zero_are_one_error_line(done, stage, option):
    with pytest.raises(UserError, match=f"--{option} 0: must be at least 1"):
        stages.run(stage, done, f"--{option}", 0)


@pytest.mark.parametrize("stage", STAGES)
def test_steps_that_no_sampler_has_are_refused_before_the_first_step(done, tmp_path, stage):
    """Pictures and validations sample: what they would fail on after an epoch is said at once."""
    root = fresh(done, tmp_path, stage, "study")
    with pytest.raises(UserError, match="101 sampling steps: choose 1 to 100"):
        stages.run(stage, root, "--sample_steps", 101)
    assert not (root / "runs" / stage).exists()


@pytest.mark.parametrize("stage", STAGES)
def test_missing_inputs_are_named(done, tmp_path, stage):
    """Fact 21: nothing starts without the output of the stage before, and the message says where it was looked for."""
    root = fresh(done, tmp_path, stage, "study")
    shutil.move(root / "latents", root / "elsewhere")
    with pytest.raises(UserError, match=r"no latents in .*study/latents; encode the scans .*save_compressed_latent"):
        stages.run(stage, root)
    stages.run(stage, root, "--latents", root / "elsewhere", "--max_steps", 1)  # each input is taken by its path
    best(root, "aekl").unlink()
    with pytest.raises(UserError, match=r"no aekl at .*runs/aekl/checkpoints/best.ckpt"):
        stages.run(stage, root, "--latents", root / "elsewhere", "--sample_every", 1)


@pytest.mark.parametrize("stage", STAGES)
def test_latents_of_another_split_or_autoencoder_are_refused(done, tmp_path, stage):
    """Fact 14 from the trainers' side."""
    root = fresh(done, tmp_path, stage, "study")
    path = root / "latents" / "latents.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"split": "another"}))
    with pytest.raises(UserError, match="are of split another"):
        stages.run(stage, root)
    path.write_text(json.dumps(record | {"aekl": "another"}))
    with pytest.raises(UserError, match="the latents are of autoencoder another"):
        stages.run(stage, root, "--sample_every", 1)


@pytest.mark.parametrize("stage", STAGES)
def test_networks_of_another_split_are_not_judged(done, tmp_path, stage):
    """Its test subjects may be among those that the network was trained with."""
    root = shutil.copytree(done, tmp_path / "study")
    (root / "split.json").unlink()
    for verb in ("test", "validate"):
        with pytest.raises(UserError, match="was trained with split .*: name the split it belongs to with --split"):
            stages.run(stage, root, "--split_seed", 7, verb=verb)
        assert not (root / "runs" / stage / f"{verb}.json").exists()
    if stage == "ldae_repr_learn":  # the prior's predict takes no scans
        with pytest.raises(UserError, match="was trained with split"):
            stages.run(stage, root, "--split_seed", 7, verb="predict")


@pytest.mark.parametrize("stage", STAGES)
def test_no_pickle_and_no_absolute_path_in_what_is_written(done, stage):
    """Fact 28: files load with weights_only; settings name no folder of this machine."""
    for path in (last(done, stage), best(done, stage)):
        checkpoint.load(path)  # weights_only
    text = (done / "runs" / stage / "config.json").read_text()
    assert str(done) not in text and str(done.parent) not in text
    assert json.loads(text)["stage"] == stage
    assert not list(done.rglob("*.pkl"))


def test_whole_chain_without_network(cohort, tmp_path, monkeypatch):
    """Fact 27: three stages, pictures included, with every socket blocked."""

    def blocked(*args, **kwargs):
        raise OSError("no network in this test")

    root = shutil.copytree(cohort, tmp_path / "study")
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, blocked)
    few = ("--max_steps", 2, "--steps", 2, "--sample_every", 1)
    stages.run("aekl", root, *few)
    stages.encode(root)
    for stage in STAGES:
        stages.run(stage, root, *few)
        assert list((root / "runs" / stage / "samples").glob("*.png"))
    stages.run("ldae_repr_learn", root, verb="test")
    assert best(root).is_file()


@pytest.mark.parametrize("stage", STAGES)
def test_seed_decides(done, tmp_path, stage):
    """Another seed, another run: nothing above passes because nothing is random."""
    root = fresh(done, tmp_path, stage, "study")
    stages.run(stage, root, "--seed", 7, "--max_steps", 2)
    losses = [row["loss"] for row in log_rows(root, stage, "train")]
    assert losses[0] != log_rows(done, stage, "train")[0]["loss"]
    assert all(torch.isfinite(torch.tensor(losses)))
