"""Stage 1: the step's gradients, clipping, resume, ranks, validation, outputs, and what is refused before a step."""

import csv
import json
import shutil
import socket

import numpy as np
import pytest
import torch

from common import checkpoint, nifti, runtime, training
from common.cli import UserError
from ldae import aekl, dataset, latents, run_cli, upstream
from ldae.autoencoder import AutoencoderKL, PatchDiscriminator
from ldae.config import PRESETS, AEKLConfig
from ldae.losses import discriminator_loss, generator_loss, kl_divergence
from tests.helpers import assert_same_tensors, kill_and_resume, reached, run_script, two_ranks
from tests.ldae import stages
from tests.ldae.conftest import SHAPE

ADVERSARY = "--adv_weight 0.025 --disc_channels 4 --disc_layers 2".split()


@pytest.fixture(scope="session")
def done(cohort):
    return stages.trained(cohort)


def config_of(root, *more, verb="fit"):
    words = [str(word) for word in (*stages.command("aekl", verb)[1:], "--root", root, *more)]
    return run_cli.parse(words)[1]


def fit(root, *more):
    stages.run("aekl", root, *more)


def networks():
    torch.manual_seed(0)
    sizes = dict(out_channels=1, channels=(4, 8), latent_channels=2, num_res_blocks=1, norm_groups=2)
    return AutoencoderKL(in_channels=1, **sizes), PatchDiscriminator(in_channels=1, channels=4, layers=2)


def batch(n=2):
    g = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, 16, 16, 16, generator=g), torch.randn(n, 2, 8, 8, 8, generator=g)


def gradients(network):
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def generator_pass(model, discriminator, x, eps, config):
    """The autoencoder's objective written out, with the adversary inside one graph."""
    x_hat, mu, logvar = model(x, eps)
    loss = (x_hat - x).abs().mean() + config.kl_weight * kl_divergence(mu, logvar)
    return loss + config.adv_weight * generator_loss(discriminator(x_hat)), x_hat


# ---- the step -------------------------------------------------------------------------------------------------------


def test_step_is_the_published_objective():
    """L1 + 1e-7 KL + 1e-3 LPIPS + 0.025 LSGAN for the autoencoder, 0.025/2 of both squares for the discriminator."""
    config = config_of("x", *ADVERSARY, "--kl_weight", 1e-3, "--perceptual_weight", 0.5)
    (model, discriminator), (x, eps) = networks(), batch()
    perceptual = lambda a, b, slices: (a - b).square().mean()  # noqa: E731
    losses = aekl.aekl_step(model, training.RealAndFake(discriminator), x, eps, config, lpips=perceptual)
    with torch.no_grad():
        x_hat, mu, logvar = model(x, eps)
        logits = discriminator(x), discriminator(x_hat)
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum() / 2
    adversarial = ((logits[1] - 1) ** 2).mean()
    expected = (x_hat - x).abs().mean() + 1e-3 * kl + 0.5 * (x_hat - x).square().mean() + 0.025 * adversarial
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert losses["adversarial"].item() == pytest.approx(adversarial.item(), rel=1e-5)
    wanted = 0.025 * 0.5 * ((logits[1] ** 2).mean() + ((logits[0] - 1) ** 2).mean())
    assert losses["discriminator"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_generators_pass_leaves_no_gradient_in_the_discriminator():
    """Fact 22: D's gradient is that of its own loss alone; the autoencoder's is that of the whole objective."""
    config = config_of("x", *ADVERSARY)
    x, eps = batch()
    (model, discriminator), (model_b, discriminator_b) = networks(), networks()
    aekl.aekl_step(model, training.RealAndFake(discriminator), x, eps, config)

    loss, x_hat = generator_pass(model_b, discriminator_b, x, eps, config)
    loss.backward()
    stray = gradients(discriminator_b).clone()
    assert torch.allclose(gradients(model), gradients(model_b), rtol=1e-4, atol=1e-8)
    discriminator_b.zero_grad()
    fake, real = discriminator_b(x_hat.detach()), discriminator_b(x)
    (config.adv_weight * discriminator_loss(fake, real)).backward()
    own = gradients(discriminator_b)
    assert torch.allclose(gradients(discriminator), own, rtol=1e-4, atol=1e-9)
    assert stray.norm() > 0.1 * own.norm()  # the original adds this much: the test could fail

    # The discriminator's loss alone off: nothing of the generator's term is in it.
    model, discriminator = networks()
    pair = training.RealAndFake(discriminator)
    aekl.discriminator_loss, kept = (lambda fake, real: 0 * fake.sum()), aekl.discriminator_loss
    try:
        aekl.aekl_step(model, pair, x, eps, config)
    finally:
        aekl.discriminator_loss = kept
    assert gradients(discriminator).abs().max() == 0 and gradients(model).abs().max() > 0


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_gradients_are_unscaled_before_they_are_measured_and_clipped(clip):
    """Fact 23: with a loss scale of 2^16 the logged norm is the true one, and the step that of unscaled gradients."""
    config = config_of("x", *ADVERSARY)
    results = []
    for enabled in (False, True):
        (model, discriminator), (x, eps) = networks(), batch()
        pairs = {"grad_norm": (torch.optim.SGD(model.parameters(), 0.1), model),
                 "grad_norm_d": (torch.optim.SGD(discriminator.parameters(), 0.1), discriminator)}  # fmt: skip
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=enabled)
        scaler.scale(torch.zeros(1))  # sets the scale up
        aekl.aekl_step(model, training.RealAndFake(discriminator), x, eps, config, scale=scaler.get_scale())
        true = gradients(model).norm() / scaler.get_scale()
        norms = runtime.update_weights(scaler, clip, **pairs)
        assert norms["grad_norm"].item() == pytest.approx(true.item(), rel=1e-4) and true > 1e-3
        results.append((norms, torch.nn.utils.parameters_to_vector(model.parameters()).detach()))
    assert results[0][0]["grad_norm_d"].item() == pytest.approx(results[1][0]["grad_norm_d"].item(), rel=1e-3)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)


def test_without_gradients_there_is_no_step():
    (_, discriminator), scaler = networks(), torch.amp.GradScaler("cpu", enabled=False)
    pairs = {"grad_norm_d": (torch.optim.Adam(discriminator.parameters()), discriminator)}
    assert runtime.update_weights(scaler, 1.0, **pairs) == {}


def test_checkpointing_changes_nothing_but_memory():
    found = []
    for on in ("--checkpointing", "--no_checkpointing"):
        config = config_of("x", on)
        torch.manual_seed(0)
        model = aekl.build_aekl(config)
        x = torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
        aekl.aekl_step(model, None, x, torch.zeros(1, 2, *(n // 4 for n in SHAPE)), config)
        found.append(gradients(model))
    assert torch.allclose(*found, rtol=1e-5, atol=1e-9)


# ---- the loop -------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_logs_what_happened(done):
    rows = stages.log_rows(done, "aekl", "train")
    assert [row["step"] for row in rows][-1] == 12 and rows[-1]["l1"] < 0.8 * rows[0]["l1"]
    assert all(row["grad_norm"] > 0 and row["perceptual"] is None for row in rows)
    saved = checkpoint.load(stages.best(done, "aekl"))
    val = stages.log_rows(done, "aekl", "val")
    assert saved["scores"]["val_loss"] == min(row["val_loss"] for row in val)
    assert {"l1", "psnr", "ssim", "ssim_masked"} <= saved["scores"].keys()
    config = json.loads((done / "runs/aekl/config.json").read_text())
    assert config["stage"] == "aekl" and config["csv_path"] == "data/dataset.csv"


def test_the_adversary_starts_when_it_should(study):
    """--adv_start: until then the discriminator keeps its first weights; the log has its columns from the start."""
    options = (*ADVERSARY, "--adv_start", 4, "--log_every", 1, "--steps", 6, "--val_every", 100)
    torch.manual_seed(42)
    config = config_of(study, *options)
    aekl.build_aekl(config)
    start = aekl.build_discriminator(config).state_dict()
    fit(study, *options, "--max_steps", 4)
    before = checkpoint.load(stages.last(study, "aekl"))["discriminator"]
    assert all(torch.equal(before[key], value) for key, value in start.items())
    fit(study, *options)
    after = checkpoint.load(stages.last(study, "aekl"))["discriminator"]
    assert not torch.equal(after["conv_in.weight"], before["conv_in.weight"])
    rows = stages.log_rows(study, "aekl", "train")
    assert [row["adversarial"] is None for row in rows] == [True] * 4 + [False] * 2
    assert [row["grad_norm_d"] is None for row in rows] == [True] * 4 + [False] * 2


def test_the_average_counts_optimizer_steps(study):
    """Fact 24: with accumulation 4 the average moves once per step, and four micro-batches are one batch."""
    options = ("--steps", 3, "--ema_decay", 0.5, "--val_every", 100, "--save_every", 0)
    fit(study, *options, "--accumulate", 4)
    fit(study, *options, "--run", study / "whole")
    parts, whole = (checkpoint.load(p / "checkpoints/last.ckpt") for p in (study / "runs/aekl", study / "whole"))
    assert parts["ema"]["step"] == 3 == parts["step"]
    for name, value in whole["aekl"].items():
        assert torch.allclose(parts["aekl"][name], value, atol=1e-5), name
    best = checkpoint.load(stages.best(study, "aekl"))["state_dict"]
    assert all(torch.equal(best[name], value) for name, value in parts["ema"]["weights"].items())


def test_two_and_two_epochs_are_four(study):
    """Fact 26, stage 1: adversary, averages, losses of the log and RNG continue exactly."""
    options = (*ADVERSARY, "--steps", 0, "--ema_decay", 0.9, "--batch_size", 10)
    fit(study, *options, "--epochs", 4, "--run", study / "whole")
    fit(study, *options, "--epochs", 2)
    fit(study, *options, "--epochs", 4)
    assert_same_tensors(stages.last(study, "aekl"), study / "whole/checkpoints/last.ckpt")
    assert_same_tensors(stages.best(study, "aekl"), study / "whole/checkpoints/best.ckpt")
    whole = [json.loads(line) for line in (study / "whole/log.jsonl").read_text().splitlines()]
    assert stages.log_rows(study, "aekl") == [{k: v for k, v in row.items() if k != "seconds"} for row in whole]


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(study, tmp_path):
    """kill -9 and the same command again: bit-identical weights, optimizers, log."""
    command = [*stages.command("aekl"), *ADVERSARY, "--log_every", 1]
    other = shutil.copytree(study, tmp_path / "other")
    log = study / "runs/aekl/log.jsonl"
    ready = lambda kill: reached(log, (3, 9)[kill])  # noqa: E731
    done = kill_and_resume([*command, "--root", study], lambda kill: ready(kill)(), kills=2)
    assert done.returncode == 0, done.stderr
    assert run_script([*command, "--root", other]).returncode == 0
    assert_same_tensors(stages.last(study, "aekl"), stages.last(other, "aekl"))
    assert_same_tensors(stages.best(study, "aekl"), stages.best(other, "aekl"))
    assert stages.log_rows(study, "aekl") == stages.log_rows(other, "aekl")


@pytest.mark.slow
def test_two_ranks_train_what_one_does(study, tmp_path):
    """The same global batch on two gloo ranks, batch norm of the adversary over both: the same weights and scores."""
    command = [*stages.command("aekl"), *ADVERSARY, "--steps", 6]
    other = shutil.copytree(study, tmp_path / "other")
    done = two_ranks([*command, "--root", study])
    assert done.returncode == 0, done.stderr
    done = run_script([*command, "--root", other])
    assert done.returncode == 0, done.stderr
    ours, theirs = (checkpoint.load(stages.last(root, "aekl")) for root in (study, other))
    for part in ("aekl", "discriminator"):
        for name, value in theirs[part].items():
            assert torch.allclose(ours[part][name].float(), value.float(), rtol=1e-3, atol=2e-4), name
    ours, theirs = (stages.log_rows(root, "aekl", "val")[-1] for root in (study, other))
    assert ours.pop("kind") == theirs.pop("kind") and ours == pytest.approx(theirs, rel=1e-3)


def test_a_bare_table_is_enough(study):
    """Fact 13: subject and path alone; no diagnosis, latent_path, age or session."""
    table = study / "data" / "bare.csv"
    rows = dataset.read_table(study / "data" / "dataset.csv")
    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "path"])
        writer.writerows([row.subject, row.path] for row in rows)
    fit(study, "--csv_path", table, "--steps", 2)
    assert stages.best(study, "aekl").is_file()


def test_the_perceptual_term_needs_its_files_and_takes_part(study):
    with pytest.raises(UserError, match="--lpips_weights, or switch the term off with --perceptual_weight 0"):
        fit(study, "--perceptual_weight", 1e-3)
    assert not (study / "runs").exists()
    from common.lpips import LPIPS

    torch.manual_seed(0)
    weights = study / "lpips.pth"
    state = {key: value for key, value in LPIPS("squeeze").state_dict().items() if key not in ("shift", "scale")}
    names = {f"heads.{i}": f"lin{i}.model.1.weight" for i in range(7)}
    torch.save({names.get(key, key): value for key, value in state.items()}, weights)
    grid = ("--shape", 20, 20, 20, "--perceptual_weight", 10, "--lpips_weights", weights)
    fit(study, *grid, "--steps", 2, "--log_every", 1)
    rows = stages.log_rows(study, "aekl", "train")
    assert all(row["perceptual"] > 0 for row in rows)
    assert rows[0]["loss"] == pytest.approx(rows[0]["l1"] + 1e-7 * rows[0]["kl"] + 10 * rows[0]["perceptual"], rel=1e-4)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_the_file_rebuilds_the_network(done):
    saved = checkpoint.load(stages.best(done, "aekl"))
    assert saved["network"] == "ldae aekl" and saved["preparation"]["shape"] == list(SHAPE)
    assert saved["split"] == json.loads((done / "split.json").read_text())["hash"]
    with runtime.start("cpu") as rt:
        trained = latents.load_aekl(stages.best(done, "aekl"), rt)
    assert (trained.hash, trained.split_hash) == (saved["hash"], saved["split"])
    assert trained.latent_shape == (2, 4, 5, 4)
    assert not any(p.requires_grad for p in trained.model.parameters()) and not trained.model.training
    last = checkpoint.load(stages.last(done, "aekl"))
    assert set(last) == {"step", "config", "extra", "rng", "aekl", "optimizer", "scaler", "means"}


def test_start_from_given_weights(done, study, tmp_path):
    """--init: ours, and the original's bare state dict or whole checkpoint; the hash of what was taken is recorded."""
    source = checkpoint.load(stages.best(done, "aekl"))
    fit(study, "--init", stages.best(done, "aekl"), "--lr", 0, "--steps", 2)
    state = checkpoint.load(stages.last(study, "aekl"))
    assert state["config"]["init"] == source["hash"]
    assert all(torch.equal(state["aekl"][name], value) for name, value in source["state_dict"].items())
    with pytest.raises(UserError, match="is the file that this run writes"):
        fit(study, "--init", stages.best(study, "aekl"), "--restart")
    with pytest.raises(UserError, match="is of another model"):
        fit(study, "--init", stages.best(done, "aekl"), "--restart", "--latent_channels", 3)
    with pytest.raises(UserError, match="holds a prior, not an aekl"):
        fit(study, "--init", stages.best(done, "ldae_pretrain"), "--restart")

    wide = ("--channels", 32, 32, "--norm_groups", 32)
    model = aekl.build_aekl(config_of("x", *wide))
    bare, prefixed = upstream.to_upstream(model), {}
    for prefix in ("", "model."):
        prefixed = {f"{prefix}{name}": value for name, value in bare.items()}
        path = tmp_path / f"{prefix}weights.pth"
        torch.save({"state_dict": prefixed, "epoch": 3} if prefix else prefixed, path)
        fit(study, *wide, "--init", path, "--lr", 0, "--steps", 1, "--run", study / f"from {prefix}")
        state = checkpoint.load(study / f"from {prefix}/checkpoints/last.ckpt")["aekl"]
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


# ---- validation and outputs -----------------------------------------------------------------------------------------


def test_validation_is_the_same_every_time(done):
    """Fixed noise; mean over scans of each scan's own values; val_loss is of a draw, the rest of the mean latent."""
    rows = dataset.read_table(done / "data/dataset.csv")[:4]
    with runtime.start("cpu") as rt:
        trained = latents.load_aekl(stages.best(done, "aekl"), rt)
        volumes = dataset.Volumes(trained.preparation, None)
        trained.model.train()
        means, each = aekl.evaluate(trained.model, volumes, rows, 0, rt)
        again, _ = aekl.evaluate(trained.model, volumes, rows[::-1], 0, rt)
        assert trained.model.training
        x = volumes.tensor(rows[0])[None]
        x_mean = latents.decode(trained.model, latents.encode(trained.model, x, rt)[0], rt)
    assert means == again and [row["scan"] for row in each] == sorted(row.scan for row in rows)
    assert means["l1"] == pytest.approx(np.mean([row["l1"] for row in each]))
    first = next(row for row in each if row["scan"] == rows[0].scan)
    assert first["l1"] == pytest.approx((x_mean - x).abs().mean().item(), rel=1e-5)
    assert first["val_loss"] != pytest.approx(first["l1"], rel=1e-6)
    assert first["ssim_masked"] != pytest.approx(first["ssim"], rel=1e-6)


def test_validate_test_and_predict(done, tmp_path):
    """Fact 38: the three other verbs; JSON with n, options and split hash; NIfTI on each scan's own grid."""
    root = shutil.copytree(done, tmp_path / "study")
    for verb, part in (("validate", "val"), ("test", "test")):
        stages.run("aekl", root, verb=verb)
        report = json.loads((root / f"runs/aekl/{verb}.json").read_text())
        split = json.loads((root / "split.json").read_text())
        assert report["split"] == split["hash"] and report["subjects"] == len(split["subjects"][part])
        assert report["n"] == len(report["scans"]) == report["scores"]["ssim"]["n"] == 3 * report["subjects"]
        assert report["options"]["stage"] == "aekl" and "sigma 1.5" in report["ssim_definition"]
        with pytest.raises(UserError, match="exists: add --overwrite"):
            stages.run("aekl", root, verb=verb)
    stages.run("aekl", root, "--overwrite", verb="test")

    stages.run("aekl", root, "--part", "val", verb="predict")
    record = json.loads((root / "runs/aekl/predict/predict.json").read_text())
    rows = {row.scan: row for row in dataset.read_table(root / "data/dataset.csv")}
    assert record["part"] == "val" and record["split"] and len(record["files"]) == record["n"] > 0
    for scan, name in record["files"].items():
        source, made = nifti.load(rows[scan].path), nifti.load(root / "runs/aekl/predict" / name)
        assert made.shape == source.shape and np.allclose(made.affine, source.affine, atol=1e-5)
        assert np.corrcoef(made.data.ravel(), source.data.ravel())[0, 1] > 0.5
    with pytest.raises(UserError, match="is not empty"):
        stages.run("aekl", root, verb="predict")


def test_another_split_is_refused(done, tmp_path):
    """A network must not be tested on what it was trained with: the split's hash is part of its file."""
    root = shutil.copytree(done, tmp_path / "study")
    (root / "split.json").unlink()
    with pytest.raises(UserError, match="was trained with split"):
        stages.run("aekl", root, "--split_seed", 7, verb="test")
    stages.run("aekl", root, "--part", "all", "--split", root / "no such file", verb="predict")
    assert not (root / "no such file").exists()


# ---- refused before the first step ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", 16, 20, 18], "every axis must be a multiple of 4"),
        (["--norm_groups", 3], "must be a multiple of --norm_groups 3"),
        ([*ADVERSARY, "--disc_layers", 5], "is too small for a discriminator of --disc_layers 5"),
        (["--shape", 8, 20, 16], "needs 11 voxels"),
        (["--batch_size", 3, "--accumulate", 2], "give a multiple of 2"),
        (["--val_every", 0], "must be at least 1"),
        (["--classes", "AD", "PD"], "no row has diagnosis PD"),
        (["--mask", "file"], "no mask_path"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(study, options, message):
    with pytest.raises(UserError, match=message):
        fit(study, *options)
    assert not (study / "runs").exists()


def test_missing_table_and_changed_options(done, tmp_path):
    """Fact 21: a missing input ends the command with status 2 and a line that names it; so does a changed run."""
    with pytest.raises(UserError, match="no table .*dataset.csv"):
        fit(tmp_path)
    assert not list(tmp_path.iterdir())
    root = shutil.copytree(done, tmp_path / "study")
    with pytest.raises(UserError, match="lr: 0.001 before, 0.01 now"):
        fit(root, "--lr", 0.01)
    (root / "runs/aekl/checkpoints/best.ckpt").unlink()
    with pytest.raises(UserError, match="no aekl at .*best.ckpt; train it with"):
        stages.run("aekl", root, verb="test")


def test_a_bad_scan_is_named(study):
    row = dataset.read_table(study / "data/dataset.csv")[0]
    data = nifti.load(row.path).data.copy()
    data[3, 3, 3] = np.nan
    import nibabel as nib

    nib.save(nib.Nifti1Image(data, nifti.load(row.path).affine), row.path)
    with pytest.raises(UserError, match=row.path.name):
        fit(study)
    assert not (study / "runs").exists()


def test_no_network_is_needed(study, monkeypatch):
    """Fact 27, stage 1: training, encoding and testing with sockets that cannot be opened."""

    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    fit(study, *ADVERSARY, "--steps", 2)
    stages.encode(study)
    stages.run("aekl", study, *ADVERSARY, verb="test")
    assert (study / "latents/latents.json").is_file() and (study / "runs/aekl/test.json").is_file()


def test_posteriors_start_as_narrow_as_asked():
    x = torch.rand(1, 1, 16, 20, 16)
    for logvar in (0.0, -6.0):
        config = AEKLConfig(**(PRESETS["aekl"]["tiny"] | {"posterior_logvar": logvar}))
        found = aekl.build_aekl(config).encode(x)[1]
        assert (found == -6).all() if logvar else found.std() > 0
