"""VAE trainer: objective, starting points, learning rate, validation, and what is refused before the first step."""

import re
import shutil

import numpy as np
import pytest
import torch

from common import checkpoint, cli, nifti, runtime, training
from common.cli import UserError
from neuroldm3d import dataset, upstream
from neuroldm3d.VAE import latents, trainer
from neuroldm3d.VAE import train as vae_train
from neuroldm3d.VAE.config import PRESETS, Config
from neuroldm3d.VAE.losses import kl_divergence
from neuroldm3d.VAE.model import AutoencoderKL
from tests.helpers import run_main
from tests.neuroldm3d.stages import TINY_VAE, best, last, log_rows, train_vae, trained


@pytest.fixture(scope="session")
def done(cohort):
    return trained(cohort)


def config_of(root, *more):
    return cli.parse(Config, [*TINY_VAE, "--root", str(root), *map(str, more)], description="", presets=PRESETS)


def test_training_from_scratch_lowers_the_loss_and_resumes_at_the_stored_epoch(study):
    """Fact 16: no checkpoint is needed, 20 steps lower the loss; a resume goes on at the stored epoch."""
    options = ("--steps", 20, "--log_every", 1, "--lr_schedule", "constant")
    train_vae(study, *options, "--max_steps", 10)
    train_vae(study, *options)
    rows = log_rows(study, "vae", "train")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[10]["epoch"] == pytest.approx(11 / 3)  # 12 volumes in batches of 4
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert checkpoint.load(last(study, "vae"))["step"] == 20


def test_objective_is_the_weighted_sum_of_its_terms():
    config = config_of("x", "--lambda_recon", 2, "--lambda_kl", 1e-3, "--lambda_lpips", 0.5)
    g = torch.Generator().manual_seed(0)
    x, x_hat = torch.rand(2, 1, 8, 8, 8, generator=g), torch.rand(2, 1, 8, 8, 8, generator=g)
    mu, logvar = torch.randn(2, 2, 2, 2, 2, generator=g), torch.randn(2, 2, 2, 2, 2, generator=g)
    perceptual = lambda a, b, slices: (a - b).square().flatten(1).sum(1)  # noqa: E731
    terms = trainer.vae_loss(x_hat, mu, logvar, x, config, perceptual)
    l1, kl = (x_hat - x).abs().mean(), 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum() / 2
    assert terms["recon"] == pytest.approx(l1) and terms["kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert terms["kl"] == kl_divergence(mu, logvar)
    expected = 2 * l1 + 1e-3 * kl + 0.5 * (x_hat - x).square().flatten(1).sum(1).mean()
    assert terms["loss"] == pytest.approx(expected.item(), rel=1e-5)
    mse = trainer.vae_loss(x_hat, mu, logvar, x, config_of("x", "--recon_loss", "mse"))
    assert mse["recon"] == pytest.approx((x_hat - x).square().mean()) and "lpips" not in mse


def test_perceptual_term_needs_its_files(study):
    with pytest.raises(UserError, match="--lpips_weights, or switch the term off with --lambda_lpips 0"):
        train_vae(study, "--lambda_lpips", 0.6)
    assert not (study / "runs").exists()


def test_learning_rate_restarts_after_epochs_5_15_35_75():
    """Published schedule: 1e-4 at each restart, down towards 5e-6, constant within an epoch."""
    config = Config(root="x")
    rates = [trainer.learning_rate(config, step, 0, 10) for step in range(1000)]
    starts = [step for step in range(1000) if rates[step] == 1e-4]
    assert starts == [start + i for start in (0, 50, 150, 350, 750) for i in range(10)]
    assert min(rates) > 5e-6 and rates[740] == pytest.approx(5e-6, abs=2e-7)
    assert training.restart_cosine(2, 1.0, 5, 2, 0.0) == pytest.approx(0.5 * (1 + np.cos(np.pi * 2 / 5)))
    falling = config_of("x", "--lr_schedule", "cosine")
    found = [trainer.learning_rate(falling, step, 8, 3) for step in (0, 4, 8)]
    assert found == pytest.approx([3e-3, 1.5e-3, 0], abs=1e-12)


def test_file_holds_what_rebuilds_the_network(done):
    saved = checkpoint.load(best(done, "vae"))
    assert saved["network"] == "neuroldm3d vae" and saved["preparation"]["shape"] == [16, 20, 16]
    assert saved["label_counts"] == {"HC": 5, "TLE": 7} and saved["init"] is None
    assert saved["train_csv"] == checkpoint.file_hash(done / "data_csvs" / "train.csv")
    with runtime.start("cpu") as rt:
        vae = latents.load_vae(best(done, "vae"), rt)
    assert vae.hash == saved["hash"] and vae.latent_shape == (2, 4, 5, 4)
    assert not any(p.requires_grad for p in vae.model.parameters()) and not vae.model.training


def test_start_from_another_vae(done, study):
    """--init copies the weights (ours or the original's), records their hash, and is never overwritten."""
    source = checkpoint.load(best(done, "vae"))
    train_vae(study, "--init", best(done, "vae"), "--vae_lr", 0, "--max_steps", 2, "--lr_schedule", "constant")
    state = checkpoint.load(last(study, "vae"))
    assert state["config"]["init"] == source["hash"]
    assert all(torch.equal(state["vae"][key], value) for key, value in source["state_dict"].items())
    with pytest.raises(UserError, match="is the file that this run writes"):
        train_vae(study, "--init", best(study, "vae"), "--restart")
    with pytest.raises(UserError, match="is of another model"):
        train_vae(study, "--init", best(done, "vae"), "--restart", "--latent_channels", 3)
    with pytest.raises(UserError, match="holds a dit, not a vae"):
        train_vae(study, "--init", best(done, "dit"), "--restart")


def test_the_originals_vae_file_loads(tmp_path):
    vae = AutoencoderKL(channels=(16, 16, 16), num_res_blocks=(1, 1, 1), latent_channels=4, norm_groups=16)
    content = {"epoch": 68, "vae_state_dict": upstream.to_upstream(vae), "val_loss": 0.1}
    torch.save(content, tmp_path / "best_vae_gan.pth")
    with runtime.start("cpu") as rt:
        again = latents.load_vae(tmp_path / "best_vae_gan.pth", rt)
    assert again.hash == checkpoint.weights_hash(vae.state_dict())
    assert again.preparation.norm == "zscore" and again.latent_shape == (4, 28, 34, 28)


def test_validation_is_the_same_every_time_and_weighs_volumes_alike(done):
    """Held-out loss: fixed noise, mean over volumes; the mean latent's error beside it."""
    config = config_of(done)
    rows = dataset.read_table(done / "data_csvs" / "val.csv")
    volumes = dataset.Volumes(trainer.preparation(config), None)
    with runtime.start("cpu") as rt:
        vae = latents.load_vae(best(done, "vae"), rt).model
        first = trainer.validate(vae, volumes, rows, config, None, rt)
        torch.manual_seed(77)
        assert trainer.validate(vae, volumes, rows[::-1], config, None, rt) == first
        single = [trainer.validate(vae, volumes, [row], config, None, rt) for row in rows]
        x = volumes.tensor(rows[0])[None]
        x_mean = vae.decode(vae.encode(x)[0])
    assert first["loss"] == pytest.approx(np.mean([scores["loss"] for scores in single]))
    assert single[0]["l1_mean"] == pytest.approx((x_mean - x).abs().mean().item(), rel=1e-5)
    best_step = checkpoint.load(best(done, "vae"))["step"]
    logged = next(row for row in log_rows(done, "vae", "val") if row["step"] == best_step)
    assert first == {name: logged[name] for name in first}


def test_average_is_what_is_validated_and_kept(study):
    train_vae(study, "--ema_decay", 0.5)
    state, saved = checkpoint.load(last(study, "vae")), checkpoint.load(best(study, "vae"))
    assert saved["step"] == 12
    average, raw = state["ema"]["weights"], state["vae"]
    assert all(torch.equal(saved["state_dict"][key], average[key]) for key in average)
    assert any(not torch.equal(raw[key], average[key]) for key in raw)


def test_flips_are_seeded_by_position_and_never_upside_down_by_default(study):
    rows = dataset.read_table(study / "data_csvs" / "train.csv")
    volumes = dataset.Volumes(trainer.preparation(config_of(study)), None)
    x = volumes.load(rows[0])
    allowed = {"none": [x], "left_right": [x, x[::-1]], "both": [x, x[::-1], x[..., ::-1], x[::-1, :, ::-1]]}
    assert config_of(study).flips == "left_right"
    for how, variants in allowed.items():
        stream = trainer.TrainingVolumes(volumes, rows, config_of(study, "--flips", how))
        found = [stream[0, position][0].numpy() for position in range(40)]
        seen = {next(i for i, v in enumerate(variants) if np.array_equal(v, y)) for y in found}
        assert seen == set(range(len(variants)))
        assert np.array_equal(stream[0, 3][0], found[3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--channels", 4, 8), "--channels has 2 levels, --num_res_blocks 3"),
        (("--channels", 4, 5, 8), "every width must be a multiple of --norm_groups 2"),
        (("--shape", 16, 18, 16), "--shape .16, 18, 16.: every axis must be a multiple of 4"),
        (("--lr_t0", 0), "--lr_t0 and --lr_t_mult must be at least 1"),
    ],
)
def test_options_that_cannot_be_meant(options, message, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(vae_train, *TINY_VAE, *options)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and err.startswith("error: ") and err.count("\n") == 1


def test_bad_volumes_are_found_before_the_first_step(study):
    row = dataset.read_table(study / "data_csvs" / "val.csv")[0]
    good = nifti.load(row.file)
    for data, message in ((0 * good.data, "every voxel is 0"), (100 * good.data, "grey-matter fractions about 1")):
        nifti.save(row.file, data, good.affine)
        with pytest.raises(UserError, match=f"{row.name}.*{message}"):
            train_vae(study)
        assert not (study / "runs").exists()


def test_dry_run_touches_nothing(study, capsys):
    """Published sizes: 2,929,037 parameters, latents of 4x28x34x28."""
    shutil.rmtree(study / "data_csvs")
    run_main(vae_train, "--root", study, "--dry_run", "--device", "cpu")
    out = capsys.readouterr().out
    assert "2,929,037 parameters" in out and "(2, 4, 28, 34, 28)" in out
    assert not (study / "runs").exists()
