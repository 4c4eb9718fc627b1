"""VAE and DiT: the same result however a run is cut, killed, resumed, split over ranks, micro-batches or recomputed."""

import json
import shutil
import signal

import numpy as np
import pytest

from common import checkpoint
from common.cli import UserError
from tests.helpers import ROOT, assert_same_tensors, kill_and_resume, reached, signal_when_ready, two_ranks
from tests.neuroldm3d.stages import COMMAND, TRAIN, best, encode, fresh, last, log_rows, trained

STAGES = ("vae", "dit")
BATCH, RATE, NETWORK = {"vae": "batch_size", "dit": "bs"}, {"vae": "vae_lr", "dit": "lr"}, {"vae": "vae", "dit": "dit"}


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
    """Fact 16, resume: --max_steps cuts at step 5; the next log row still averages over steps before and after it."""
    root = fresh(done, tmp_path, stage, "study")
    TRAIN[stage](root, "--max_steps", 5)
    state = checkpoint.load(last(root, stage))
    assert state["step"] == 5
    assert best(root, stage).is_file()  # usable although nothing was validated yet
    TRAIN[stage](root)
    assert_same_run(done, root, stage)
    epochs = [row["epoch"] for row in log_rows(root, stage, "train")]
    assert epochs == sorted(epochs) and epochs[-1] == 4  # 12 volumes in batches of 4: three steps an epoch


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_kill_and_signal_at_any_moment(done, tmp_path, stage):
    """SIGKILL twice at random moments, and SIGTERM once: bit-identical to a run that was left alone."""
    options = ["--steps", 40, "--val_every", 4]
    options += {"vae": ["--flips", "both", "--ema_decay", 0.8], "dit": ["--saveIter", 3, "--keep", 1]}[stage]
    reference, killed, stopped = (fresh(done, tmp_path, stage, name) for name in ("reference", "killed", "stopped"))
    TRAIN[stage](reference, *options)

    def command(root):
        return [*COMMAND[stage], "--root", root, *options]

    def ready(kill):
        return reached(killed / "runs" / stage / "log.jsonl", (2, 16)[kill])()

    environment = {"OMP_NUM_THREADS": "1"}
    ended = kill_and_resume(command(killed), ready, kills=2, max_delay_s=0.3, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert_same_run(reference, killed, stage)

    log = stopped / "runs" / stage / "log.jsonl"
    ended = signal_when_ready(command(stopped), reached(log, 4), signal.SIGTERM, env=environment)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stdout
    assert "of 40; the same command continues" in ended.stdout
    assert 4 <= checkpoint.load(last(stopped, stage))["step"] < 40
    TRAIN[stage](stopped, *options)
    assert_same_run(reference, stopped, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_other_options_are_refused_and_restart_begins_anew(done, tmp_path, stage):
    root = shutil.copytree(done, tmp_path / "study")
    kept, rate = last(root, stage).read_bytes(), RATE[stage]
    with pytest.raises(UserError, match=f"{rate}: .* before, 0.002 now.*--restart"):
        TRAIN[stage](root, f"--{rate}", 2e-3)
    with pytest.raises(UserError, match="seed: 0 before, 5 now"):
        TRAIN[stage](root, "--seed", 5)
    TRAIN[stage](root, "--num_workers", 1)  # free to change; and the run is complete: nothing happens
    assert last(root, stage).read_bytes() == kept
    TRAIN[stage](root, f"--{rate}", 2e-3, "--restart", "--max_steps", 2)
    assert checkpoint.load(last(root, stage))["step"] == 2
    assert checkpoint.load(best(root, stage))["step"] == 2  # the old best one went with the old run
    TRAIN[stage](root, "--restart")
    assert_same_run(done, root, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_weights_of_somebody_else_are_not_replaced(done, tmp_path, stage):
    root = fresh(done, tmp_path, stage, "study")
    best(root, stage).parent.mkdir()
    shutil.copy(best(done, stage), best(root, stage))
    before = best(root, stage).read_bytes()
    with pytest.raises(UserError, match=f"{best(root, stage).name} was not made by a run that can continue.*--restart"):
        TRAIN[stage](root)
    assert best(root, stage).read_bytes() == before


@pytest.mark.parametrize("stage", STAGES)
def test_patience(done, tmp_path, stage, capsys):
    """At learning rate 0 only the first validation is an improvement."""
    root = fresh(done, tmp_path, stage, "study")
    options = (f"--{RATE[stage]}", 0, "--patience", 2, "--val_every", 1, "--lr_schedule", "constant")
    TRAIN[stage](root, *options)
    assert checkpoint.load(last(root, stage))["step"] == 9  # epochs of 3 steps: best at 3, no better at 6 and 9
    assert checkpoint.load(best(root, stage))["step"] == 3
    before = last(root, stage).read_bytes()
    TRAIN[stage](root, *options)
    assert last(root, stage).read_bytes() == before
    assert "no improvement in 2 validations" in capsys.readouterr().out


def assert_close_states(a, b, rate):
    """Weights after a few Adam steps: equal but for entries whose gradient is rounding noise."""
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key] - b[key]).abs().mean() < 0.02 * rate, key


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_do_not_change_the_step(done, tmp_path, stage):
    a, b = (fresh(done, tmp_path, stage, name) for name in "ab")
    options = ("--max_steps", 4, "--grad_clip", 5)
    TRAIN[stage](a, *options)
    TRAIN[stage](b, *options, "--accumulate", 2, "--checkpointing")
    state_a, state_b = checkpoint.load(last(a, stage)), checkpoint.load(last(b, stage))
    assert_close_states(state_a[NETWORK[stage]], state_b[NETWORK[stage]], 1e-3)
    for row_a, row_b in zip(log_rows(a, stage), log_rows(b, stage), strict=True):
        for key in row_a.keys() - {"kind"}:
            assert row_b[key] == pytest.approx(row_a[key], rel=1e-3, abs=1e-4), key
    with pytest.raises(UserError, match=f"--{BATCH[stage]} 4 cannot be shared .* --accumulate 3: give a multiple of 3"):
        TRAIN[stage](b, *options, "--accumulate", 3)


@pytest.mark.slow
def test_two_ranks_train_and_encode_as_one(done, tmp_path):
    """Same global batch on one and on two ranks: same losses and weights to float tolerance; same latents exactly."""
    one, two = (fresh(done, tmp_path, "vae", name) for name in ("one", "two"))
    for root in (one, two):
        shutil.rmtree(root / "runs" / "dit")
    for stage in STAGES:
        options = ["--max_steps", 4, "--save_every", 0]
        TRAIN[stage](one, *options)
        ended = two_ranks([*COMMAND[stage], "--root", two, *options])
        assert ended.returncode == 0, ended.stderr[-3000:]
        for row_1, row_2 in zip(log_rows(one, stage), log_rows(two, stage), strict=True):
            for key, value in row_1.items():
                assert row_2[key] == (value if key == "kind" else pytest.approx(value, rel=2e-3, abs=2e-3)), key
        a, b = checkpoint.load(last(one, stage)), checkpoint.load(last(two, stage))
        assert_close_states(a[NETWORK[stage]], b[NETWORK[stage]], 1e-3)
        if stage == "vae":  # from here on both have the same VAE
            shutil.copy(best(one, stage), best(two, stage))
            encode(one, "--overwrite")
            ended = two_ranks(["neuroldm3d/VAE/save_latent.py", "--root", two, "--device", "cpu", "--overwrite"])
            assert ended.returncode == 0, ended.stderr[-3000:]
            names = sorted(p.relative_to(one) for p in (one / "latent_data").rglob("*") if p.is_file())
            assert len(names) == 12 + 6 + 1
            for name in names:
                a, b = ((root / name).read_bytes() for root in (one, two))
                if name.suffix == ".json":  # the code version may change beside a running test
                    a, b = (json.loads(text) | {"git_revision": None} for text in (a, b))
                assert a == b, name


@pytest.mark.slow
def test_ranks_agree_and_differ_from_training_apart(done, tmp_path):
    """Fact 28: after 3 steps on two ranks the parameters are equal; without averaging of gradients they are not."""
    states = {}
    for how in ("together", "apart"):
        ended = two_ranks(["-m", "tests.neuroldm3d.ddp_steps", done, tmp_path / how, how], cwd=ROOT)
        assert ended.returncode == 0, ended.stderr[-3000:]
        states[how] = [checkpoint.load(tmp_path / how / f"rank{rank}.pt") for rank in (0, 1)]
    (a, b), (c, d) = states["together"], states["apart"]
    assert all(np.array_equal(a[key], b[key]) for key in a)
    moved = "linear_out.weight"
    assert (c[moved] - d[moved]).abs().max() > 1e-5 and (a[moved] - c[moved]).abs().max() > 1e-5


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("option", ["batch", "accumulate", "log_every", "val_every"])
def test_intervals_of_zero_are_one_error_line(done, stage, option):
    option = BATCH[stage] if option == "batch" else option
    with pytest.raises(UserError, match=f"--{option} 0: must be at least 1"):
        TRAIN[stage](done, f"--{option}", 0)


@pytest.mark.parametrize("stage", STAGES)
def test_changed_data_are_refused_on_resume(done, tmp_path, stage):
    root = shutil.copytree(done, tmp_path / "study")
    table = root / "data_csvs" / "train.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]) + "\n")
    if stage == "dit":
        encode(root)
    with pytest.raises(UserError, match="is of a run with other options .*train_names"):
        TRAIN[stage](root)


@pytest.mark.parametrize("stage", STAGES)
def test_no_pickle_and_no_absolute_path_in_what_is_written(done, stage):
    """Facts 38 and 39, trainers: files load with weights_only; settings name no folder of this machine."""
    for path in (last(done, stage), best(done, stage)):
        checkpoint.load(path)  # weights_only
    for path in (done / "runs" / stage / "config.json", done / "latent_data" / "latents.json"):
        assert str(done) not in path.read_text() and str(done.parent) not in path.read_text()
    assert not list(done.rglob("*.pkl"))
