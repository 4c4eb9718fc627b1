"""Trainings: exact budget, the same result however a run is cut, killed, resumed or shared by ranks, best by PSNR."""

import math
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from common import checkpoint, runtime
from common.cli import UserError
from mgdcr import dataset, diffusion, trainer
from mgdcr.config import AutoencConfig
from tests.helpers import ROOT, assert_same_tensors, run_script, two_ranks
from tests.mgdcr.stages import (
    BATCH,
    SAMPLES,
    STAGES,
    STEPS,
    again,
    best,
    codes,
    interrupted,
    last,
    log_rows,
    logs,
    store_of,
    words,
)

RT = runtime.Runtime(torch.device("cpu"))
SLICES = ("autoenc", "ddim")
SCRIPT = {"autoenc": "mgdcr/run_ffhq128.py", "ddim": "mgdcr/run_ffhq128_ddim.py", "latent_dpm": "mgdcr/latent_dpm.py"}


def assert_same_run(a, b, stage):
    """Weights, average, optimizer, RNG, best checkpoint and logs agree bit by bit."""
    assert_same_tensors(last(a, stage), last(b, stage))
    assert_same_tensors(best(a, stage), best(b, stage))
    assert log_rows(a, stage) == log_rows(b, stage)
    for kind in ("train", "val"):
        assert (logs(a, stage) / f"{kind}.csv").read_bytes() == (logs(b, stage) / f"{kind}.csv").read_bytes()


def options(data, root="unused", **values):
    """Resolved options of a small autoencoder on the cohort."""
    return AutoencConfig(**{
        "root": str(root), "store": str(store_of(data)), "device": "cpu", "image_size": 64, "model_channels": 8,
        "channel_mult": (1, 2, 2), "enc_channel_mult": (1, 2, 2, 2), "num_res_blocks": 1, "enc_num_res_blocks": 1,
        "embed_channels": 16, "enc_out_channels": 12, "val_steps": 3, "sample_steps": 2, "sample_size": 2,
    } | values)  # fmt: skip


# ---- budget ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_A24_the_sample_budget_is_exact(runs, stage):
    """A24: ceil(samples / batch) steps; validations, the picture and the best checkpoint are written."""
    assert math.ceil(SAMPLES / BATCH) == STEPS
    assert checkpoint.load(last(runs, stage))["step"] == STEPS
    rows = log_rows(runs, stage, "val")
    assert [row["step"] for row in rows] == [3, 6] and [row["samples"] for row in rows] == [12, 24]
    assert [row["step"] for row in log_rows(runs, stage, "train")] == [2, 4, 6]
    assert best(runs, stage).is_file()
    if stage in SLICES:
        size = np.asarray(Image.open(logs(runs, stage) / "samples" / f"samples_{STEPS}.png")).shape
        assert size[:2] == (3 * 64, 2 * 64)  # slice, round trip, drawn from noise; two slices


def test_a_longer_budget_continues_and_a_complete_run_is_left_alone(slices, tmp_path, capsys):
    """A24: with a constant learning rate the same command with more samples goes on; with the same it does nothing."""
    how = ("--lr_schedule", "constant", "--val_every_samples", 8)
    again("autoenc", slices, tmp_path, tmp_path, *how, "--total_samples", 8)
    assert checkpoint.load(last(tmp_path, "autoenc"))["step"] == 2
    before = last(tmp_path, "autoenc").read_bytes()
    again("autoenc", slices, tmp_path, tmp_path, *how, "--total_samples", 8)
    assert last(tmp_path, "autoenc").read_bytes() == before
    again("autoenc", slices, tmp_path, tmp_path, *how, "--total_samples", 9)
    assert checkpoint.load(last(tmp_path, "autoenc"))["step"] == 3


def test_learning_rate(slices):
    """Warm-up in samples, then half a cosine to zero at the end of the budget, or no change."""
    config = options(slices, lr=1.0, batch_size=4, warmup_samples=16, total_samples=400, lr_schedule="constant")
    assert [trainer.learning_rate(config, step) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]
    config = options(slices, lr=1.0, batch_size=4, total_samples=400, lr_schedule="cosine")
    assert trainer.learning_rate(config, 0) == 1 and trainer.learning_rate(config, 50) == pytest.approx(0.5)
    assert trainer.learning_rate(config, 99) < 1e-3


# ---- interruptions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_A23_cut_and_continued(slices, runs, tmp_path, stage):
    """A23: one step and the same command again are the run that was left alone, bit by bit, data order included."""
    again(stage, slices, runs, tmp_path, "--max_steps", 1)
    assert checkpoint.load(last(tmp_path, stage))["step"] == 1
    assert best(tmp_path, stage).is_file()  # usable although nothing was validated yet
    again(stage, slices, runs, tmp_path)
    assert_same_run(runs, tmp_path, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_A23_killed_at_any_moment(slices, runs, tmp_path, stage):
    """A23: SIGKILL at a random moment, during writing too, leaves a checkpoint that continues bit-identically."""
    command = words(stage, slices, tmp_path, *codes(stage, runs), "--save_every_samples", 4)
    delay_s = random.uniform(0, 0.02)
    assert interrupted(stage, tmp_path, command, signal.SIGKILL, 2, delay_s) == -signal.SIGKILL
    assert 1 <= checkpoint.load(last(tmp_path, stage))["step"] <= STEPS
    again(stage, slices, runs, tmp_path, "--save_every_samples", 4)
    assert_same_run(runs, tmp_path, stage)


def test_a_signal_ends_a_run_cleanly(slices, runs, tmp_path):
    """SIGTERM: its own exit status, and what was done is saved."""
    command = words("ddim", slices, tmp_path, "--total_samples", 4000, "--val_every_samples", 4000)
    assert interrupted("ddim", tmp_path, command, signal.SIGTERM, 2) == 128 + signal.SIGTERM
    assert 2 <= checkpoint.load(last(tmp_path, "ddim"))["step"] < 1000


def test_other_options_are_refused_and_restart_begins_anew(slices, runs, tmp_path):
    for name in ("checkpoints", "logs"):
        shutil.copytree(runs / name, tmp_path / name)
    with pytest.raises(UserError, match="lr: 0.002 before, 0.003 now.*--restart"):
        again("autoenc", slices, runs, tmp_path, "--lr", 3e-3)
    with pytest.raises(UserError, match="seed: 0 before, 5 now"):
        again("autoenc", slices, runs, tmp_path, "--seed", 5)
    with pytest.raises(UserError, match=f"total_samples: {SAMPLES} before, 40 now"):  # the cosine depends on it
        again("autoenc", slices, runs, tmp_path, "--total_samples", 40)
    again("autoenc", slices, runs, tmp_path, "--lr", 3e-3, "--restart", "--max_steps", 1)
    assert checkpoint.load(last(tmp_path, "autoenc"))["step"] == checkpoint.load(best(tmp_path, "autoenc"))["step"] == 1


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(slices, runs, tmp_path):
    """Losses that are not finite end the run in one line, and never reach a file."""
    with pytest.raises(UserError, match="diverged"):
        again("autoenc", slices, runs, tmp_path, "--lr", 1e30, "--grad_clip", 0, "--save_every_samples", 4,
              "--lr_schedule", "constant", "--warmup_samples", 0)  # fmt: skip
    state = checkpoint.load(last(tmp_path, "autoenc"))
    assert all(torch.isfinite(value).all() for value in state["network"].values())


# ---- ranks, micro-batches, precision --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_as_one(slices, runs, tmp_path, stage):
    """The same global batch on two ranks: same losses, scores and weights to float tolerance."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = [*codes(stage, runs), "--max_steps", 3, "--log_every", 1, "--dropout", 0]
    again(stage, slices, runs, one, *more)
    done = two_ranks([SCRIPT[stage], *words(stage, slices, two, *more)], cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    for row_1, row_2 in zip(log_rows(one, stage), log_rows(two, stage), strict=True):
        for key, value in row_1.items():
            assert row_2[key] == (value if key == "kind" else pytest.approx(value, rel=5e-3, abs=5e-3)), key
    a, b = (checkpoint.load(last(root, stage))["network"] for root in (one, two))
    assert a.keys() == b.keys()
    for key in a:  # Adam makes a full step of an entry whose gradient is rounding noise
        assert (a[key].float() - b[key].float()).abs().mean() < 1e-3, key


def test_micro_batches_do_not_change_the_step(slices, runs, tmp_path):
    """With accumulation and recomputed activations the same losses, and one average per step."""
    how = ("--max_steps", 2, "--log_every", 1, "--dropout", 0)
    again("autoenc", slices, runs, tmp_path / "a", *how)
    again("autoenc", slices, runs, tmp_path / "b", *how, "--accumulate", 2, "--checkpointing")
    a, b = (checkpoint.load(last(tmp_path / name, "autoenc")) for name in "ab")
    assert a["ema"]["step"] == b["ema"]["step"] == 2
    for row_a, row_b in zip(*(log_rows(tmp_path / name, "autoenc", "train") for name in "ab"), strict=True):
        assert row_b["loss"] == pytest.approx(row_a["loss"], rel=2e-3)


def test_workers_do_not_change_the_run(slices, runs, tmp_path):
    """No worker and one worker: the same run (the original raises without workers)."""
    again("autoenc", slices, runs, tmp_path, "--num_workers", 1)
    assert_same_run(runs, tmp_path, "autoenc")


def test_bf16_trains_nearly_the_same_with_weights_in_float32(slices, runs, tmp_path):
    again("autoenc", slices, runs, tmp_path, "--precision", "bf16", "--max_steps", 2)
    half, full = (log_rows(root, "autoenc", "train")[0] for root in (tmp_path, runs))
    assert half["loss"] == pytest.approx(full["loss"], rel=0.1) and half["loss"] != full["loss"]
    weights = checkpoint.load(last(tmp_path, "autoenc"))["network"].values()
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in weights)


@pytest.mark.slow
def test_A27_the_tiny_preset_trains_without_a_gpu(slices, tmp_path):
    """A27: with no CUDA device the script of a user runs; here its first two steps."""
    args = [SCRIPT["autoenc"], "--preset", "tiny", "--root", tmp_path, "--store", store_of(slices), "--max_steps", 2]
    done = run_script(args, cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert best(tmp_path, "autoenc").is_file()


# ---- what training must do ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_leaves_its_record_without_paths_of_this_machine(runs, stage):
    for path in (best(runs, stage), last(runs, stage)):
        checkpoint.load(path)  # weights_only
    folder = logs(runs, stage)
    assert all((folder / name).is_file() for name in ("config.json", "manifest.json", "log.jsonl", "train.csv"))
    assert str(runs.parent) not in (folder / "config.json").read_text()


def test_the_network_learns(slices, runs, tmp_path):
    """Noise error of held-out subjects falls by half in a short training.

    Not their round trip: an untrained network predicts no noise, and deterministic inversion then undoes itself.
    """
    again("autoenc", slices, runs, tmp_path, "--total_samples", 480, "--val_every_samples", 120, "--lr", 5e-3,
          "--dropout", 0, "--augment", "none", "--val_steps", 10)  # fmt: skip
    rows = log_rows(tmp_path, "autoenc", "val")
    assert rows[-1]["loss"] <= 0.5 * log_rows(runs, "autoenc", "val")[0]["loss"]


def test_best_is_the_average_and_picked_by_rule(slices, runs):
    """best.ckpt holds averaged weights of the validation that the rule picks, and says with which scores."""
    rows, saved = log_rows(runs, "autoenc", "val"), checkpoint.load(best(runs, "autoenc"))
    top = rows[0]
    for row in rows[1:]:
        top = row if trainer.better_round_trip(row, top) else top
    assert saved["step"] == top["step"] and saved["scores"]["psnr"] == top["psnr"]
    state = checkpoint.load(last(runs, "autoenc"))
    assert any(not torch.equal(state["ema"]["weights"][k], v) for k, v in state["network"].items())
    if top["step"] == STEPS:
        assert all(torch.equal(state["ema"]["weights"][k], v) for k, v in saved["state_dict"].items())


class KnowsNothing(torch.nn.Module):
    """The best noise prediction for white images: a share of x_t, whatever the anatomy."""

    def forward(self, x_t, t, x_0=None):
        return (1 - diffusion.SCHEDULE.alphas_bar[t]).sqrt().float()[:, None, None, None] * x_t

    denoise = forward


def test_a_round_trip_without_knowledge_is_not_the_best(slices, runs):
    """It is nearly exact for a network that knows nothing; the rule takes any that has learnt, then the round trip."""
    config = options(slices, runs, val_steps=100)
    store, split = dataset.open_store(config, RT)
    ignorant = trainer.validate(KnowsNothing(), dataset.Slices(store, split.val, 64), [0, 5], config, RT)
    assert ignorant["psnr"] > 36
    learnt = {"psnr": 25.0, "loss": 0.5 * ignorant["loss"]}
    better = trainer.BETTER["psnr"]
    assert better(learnt, ignorant) and not better(ignorant, learnt)
    best = {"psnr": 25.0, "loss": 0.1}
    assert better({"psnr": 26.0, "loss": 0.101}, best) and not better({"psnr": 24.0, "loss": 0.099}, best)
    assert better({"psnr": 24.0, "loss": 0.09}, best) and not better({"psnr": 99.0, "loss": 0.11}, best)
    assert trainer.BETTER["loss"]({"psnr": 1.0, "loss": 0.09}, best) and trainer.BETTER["last"](ignorant, best)


def test_select_last_keeps_the_last(slices, runs, tmp_path):
    """Of the upstream preset: the last validation wins, whatever it scores."""
    again("autoenc", slices, runs, tmp_path, "--select", "last")
    assert checkpoint.load(best(tmp_path, "autoenc"))["step"] == STEPS


def test_validation_is_the_round_trip_of_held_out_subjects(slices, runs):
    """The same twice, equal to inversion and decoding by hand, and never of a subject that is trained on."""
    config = options(slices, runs)
    store, split = dataset.open_store(config, RT)
    assert split.train and split.val and split.test
    assert len({*split.train, *split.val, *split.test}) == len(split.train) + len(split.val) + len(split.test)
    held_out = dataset.Slices(store, split.val, 64)
    network = trainer.load_network(best(runs, "autoenc"), RT)
    assert network.split_hash == split.hash
    a, b = (trainer.validate(network.model, held_out, [0, 5], config, RT) for _ in range(2))
    assert a == b and set(a) == {"psnr", "loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4"}
    with torch.no_grad():
        x_0 = torch.stack([held_out[0], held_out[5]])
        z = network.model.encode(x_0)
        again_ = diffusion.decode(network.model, diffusion.invert(network.model, x_0, z, 3), z, 3)
    error = ((again_ - x_0) / 2).square().flatten(1).mean(1)
    assert a["psnr"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)
    assert x_0.min() >= -1 and x_0.max() <= 1


def test_loss_is_the_error_of_the_predicted_noise(runs):
    """A network that predicts the noise exactly has loss 0; one that predicts 0 the mean square of the noise."""
    x_0, noise = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    t = torch.tensor([0, 999])
    assert trainer.noise_loss(lambda x_t, t, x: noise, x_0, t, noise).tolist() == [0, 0]
    zero = trainer.noise_loss(lambda x_t, t, x: torch.zeros_like(x_t), x_0, t, noise)
    assert torch.allclose(zero, noise.square().flatten(1).mean(1))

    def oracle(x_t, t, x):  # x_t = sqrt(a) x_0 + sqrt(1 - a) noise, solved for the noise
        a = diffusion.SCHEDULE.alphas_bar[t].float().view(-1, 1, 1, 1)
        return (x_t - a.sqrt() * x) / (1 - a).sqrt()

    assert trainer.noise_loss(oracle, x_0, t, noise).max() < 1e-6


def test_weights_of_steps():
    """min(SNR, gamma) / SNR: small where slices are nearly clean, 1 from SNR = gamma on, 1 everywhere by default."""
    t = torch.arange(1000)
    ratio = diffusion.SCHEDULE.alphas_bar / (1 - diffusion.SCHEDULE.alphas_bar)
    assert torch.equal(trainer.step_weights(t, 0.0), torch.ones(1000))
    weights = trainer.step_weights(t, 5.0).double()
    torch.testing.assert_close(weights * ratio, ratio.clamp(max=5), rtol=1e-5, atol=0)
    assert weights[0] < 1e-3 and (weights[ratio <= 5] == 1).all()


def test_encoder_and_unet_learn_together(runs):
    """One step of the loss gives both halves a gradient, although the last layer of the U-Net starts at zero."""
    model = trainer.load_network(best(runs, "autoenc"), RT).model.requires_grad_(True)
    x_0 = torch.rand(2, 1, 64, 64) * 2 - 1
    trainer.noise_loss(model, x_0, torch.tensor([500, 900]), torch.randn_like(x_0)).mean().backward()
    for part in ("encoder", "unet"):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in getattr(model, part).parameters()), part


def test_fine_tuning_starts_from_the_average(slices, runs, tmp_path):
    """--init: the weights of another run's best.ckpt, and an error for a network of other sizes."""
    again("autoenc", slices, runs, tmp_path, "--init", best(runs, "autoenc"), "--max_steps", 1, "--lr", 1e-12)
    saved, origin = checkpoint.load(best(tmp_path, "autoenc")), checkpoint.load(best(runs, "autoenc"))
    assert saved["origin"] == origin["hash"]
    assert all(torch.allclose(saved["state_dict"][k], v, atol=1e-6) for k, v in origin["state_dict"].items())
    with pytest.raises(UserError, match="another model"):
        again("autoenc", slices, runs, tmp_path / "b", "--init", best(runs, "autoenc"), "--model_channels", 16)
    with pytest.raises(UserError, match="holds a diffae, not a ddim"):
        again("ddim", slices, runs, tmp_path / "c", "--init", best(runs, "autoenc"))


def test_files_that_are_no_network(runs, tmp_path):
    with pytest.raises(UserError, match="train it with `python mgdcr/run_ffhq128.py`"):
        trainer.load_network(tmp_path / "best.ckpt", RT)
    torch.save({"state_dict": {}}, tmp_path / "bare.ckpt")
    with pytest.raises(UserError, match="no checkpoint of the original"):
        trainer.load_network(tmp_path / "bare.ckpt", RT)
    network = trainer.load_network(best(runs, "ddim"), RT, trainer.DDIM)
    assert trainer.code_of(network.model, torch.zeros(1, 1, 64, 64)) is None and network.image_size == 64


def test_evenly_spaced_validation_slices():
    assert trainer.evenly(5, 0) == trainer.evenly(5, 9) == [0, 1, 2, 3, 4]
    assert trainer.evenly(100, 4) == [12, 37, 62, 87] and len(set(trainer.evenly(7, 6))) == 6
