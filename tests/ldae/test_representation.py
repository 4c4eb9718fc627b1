"""Stage 3: only what should learn learns, the code fills the gap, and the prior is where it should be."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from common import checkpoint, schedulers
from common.cli import UserError
from common.runtime import Runtime
from ldae import dataset, latents, model, posterior_gap, representation
from ldae.encoder import SemanticEncoder
from ldae.unet import ShiftUNet, UNet
from tests.ldae import stages
from tests.ldae.stages import best, fresh, last, log_rows, trained
from tests.ldae.test_prior import opened

STAGE = "ldae_repr_learn"
CPU = Runtime(torch.device("cpu"))
SCHEDULE = schedulers.make_schedule("linear", 1000)


@pytest.fixture(scope="module")
def done(cohort):
    return trained(cohort)


def tiny_learner(prediction="eps"):
    """An untrained encoder and decoder for volumes 16 x 16 x 16 and latents 2 x 4 x 4 x 4."""
    torch.manual_seed(0)
    prior = UNet(in_channels=2, base_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(),
                 num_heads=1, head_channels=-1, new_attention_order=False, dropout=0.0, isotropic=True)  # fmt: skip
    encoder = SemanticEncoder(stages=((8, 1), (16, 1)), embed_dim=16, num_heads=2, max_slices=16, dropout=0.0,
                              drop_path=0.0)  # fmt: skip
    return representation.Learner(encoder, ShiftUNet(prior, 16), "axial").train()


def batch(n, seed):
    """Scans whose bright part ends where their latent lies: x (n, 1, 16, 16, 16), z_0 (n, 2, 4, 4, 4), variance 1."""
    g = torch.Generator().manual_seed(seed)
    level = torch.randn(n, generator=g).view(n, 1, 1, 1, 1)
    pattern = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5)).sign()
    x = (torch.linspace(-2, 2, 16).view(16, 1, 1) < level) + 0.1 * torch.rand(n, 1, 16, 16, 16, generator=g)
    return x, 0.9 * level * pattern + (1 - 0.9**2) ** 0.5 * torch.randn(n, 2, 4, 4, 4, generator=g)


# ---- one step


def test_only_encoder_and_estimator_learn():
    """Fact 7, one step: every tensor of the prior is bit-identical, every tensor that should learn has a gradient."""
    learner = tiny_learner()
    before = {name: p.clone() for name, p in learner.state_dict().items()}
    learned = nn.ModuleDict({"encoder": learner.encoder, "estimator": learner.decoder.estimator})
    optimizer = torch.optim.Adam(learned.parameters(), lr=1e-2)
    for step in range(5):  # zero-initialised layers keep what is before them from learning in the first steps
        x, z_0 = batch(4, step)
        noise, t = torch.randn(z_0.shape), torch.tensor([100, 300, 600, 900])
        losses = representation.gap_losses(learner, SCHEDULE, x, z_0, t, noise, 0.1)
        optimizer.zero_grad()
        losses["loss"].mean().backward()
        optimizer.step()
    changed = {name for name, p in learner.state_dict().items() if not torch.equal(p, before[name])}
    frozen = {name for name in before if name.startswith("decoder.prior.")}
    assert frozen and not changed & frozen
    assert all(p.grad is None and not p.requires_grad for p in learner.decoder.prior.parameters())
    assert {name for name, _ in learner.named_parameters()} - frozen <= changed
    assert not learner.decoder.prior.training and learner.decoder.estimator.training


def test_before_training_the_loss_is_the_prior_s():
    """Fact 6: eps and G are 0, so the gap with the estimator is the gap without, lambda_t mean(noise^2)."""
    learner, (x, z_0) = tiny_learner(), batch(3, 0)
    noise, t = torch.randn(z_0.shape), torch.tensor([0, 475, 999])
    losses = representation.gap_losses(learner, SCHEDULE, x, z_0, t, noise, 0.1)
    weight = posterior_gap.gap_weight(SCHEDULE)[t].float()
    assert torch.allclose(losses["loss"], weight * noise.square().flatten(1).mean(1))
    assert torch.equal(losses["loss"], losses["without"]) and not losses["without"].requires_grad


def test_the_code_fills_the_gap():
    """Fact 25 and the contribution: a scan's own code fills more of the gap of unseen scans than another scan's.

    The prior is an untrained network that predicts v, the ideal denoiser of unit Gaussians; a latent hides one number
    that only the image shows when there is much noise.
    """
    schedule = schedulers.make_schedule("linear", 1000, prediction="v")
    learner = tiny_learner()
    optimizer = torch.optim.Adam([*learner.encoder.parameters(), *learner.decoder.estimator.parameters()], lr=1e-3)
    g, curve = torch.Generator().manual_seed(0), []
    for step in range(115):
        x, z_0 = batch(16, step)
        t, noise = torch.randint(0, 1000, (16,), generator=g), torch.randn(z_0.shape, generator=g)
        loss = representation.gap_losses(learner, schedule, x, z_0, t, noise, 0.1)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert np.mean(curve[-30:]) < 0.8 * np.mean(curve[:30])
    learner.eval()
    x, z_0 = batch(16, 10_000)
    times, noise = torch.tensor([500, 650, 800]), torch.randn((16, 3, *z_0.shape[1:]), generator=g)
    with torch.no_grad():
        y = learner.encoder(representation.to_slices(x, "axial"))
    own = posterior_gap.gap_curve(learner.decoder, z_0, y, schedule, times, noise)
    other = posterior_gap.gap_curve(learner.decoder, z_0, y.roll(1, 0), schedule, times, noise)
    assert own["with"].mean() < 0.7 * own["without"].mean()
    assert own["with"].mean() < 0.8 * other["with"].mean()


def test_quarters_of_the_schedule():
    losses, t = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 249, 250, 999])
    sums = {name: value.item() for name, value in representation.quarter_sums(losses, t, 1000).items()}
    assert [sums[f"sum_q{i}"] for i in range(1, 5)] == [3, 4, 0, 8]
    row = representation.logged({"loss": 3.75, "without": 4.0} | sums)
    assert [row[f"loss_q{i}"] for i in range(1, 5)] == [1.5, 4, None, 8]


def test_decoders_of_one_prior_share_it():
    """Fact 28, in memory: the averaged decoder holds the frozen prior itself, not a copy."""
    decoder = tiny_learner().decoder
    estimator = tiny_learner().decoder.estimator
    other = representation.with_estimator(decoder, estimator)
    assert other.prior is decoder.prior and other.estimator is estimator
    assert not any(p.is_meta for p in other.parameters())


def test_codes_start_standardised(done, prep):
    """--standardise_codes: codes of scans that are nearly alike get mean 0, SD 1; only the last layer norm changes."""
    data, _ = opened(done, "train")
    volumes, encoder = dataset.Volumes(prep, None), tiny_learner().encoder
    x = torch.stack([volumes.tensor(row) for row in data.rows])
    before = {name: p.clone() for name, p in encoder.state_dict().items()}
    with torch.no_grad():
        assert encoder.eval()(representation.to_slices(x, "axial")).std(0).mean() < 0.3
        representation.standardise_codes(encoder.train(), volumes, data.rows, "axial")
        assert encoder.training
        y = encoder.eval()(representation.to_slices(x, "axial"))
    assert y.mean(0).abs().max() < 1e-4 and torch.allclose(y.std(0), torch.ones(16), atol=1e-4)
    assert {name for name, p in encoder.state_dict().items() if not torch.equal(p, before[name])} == {
        "norm.weight", "norm.bias"}  # fmt: skip


def test_encoder_has_a_learning_rate_of_its_own(done, tmp_path):
    states = []
    for name, steps in (("short", 2), ("long", 5)):
        root = fresh(done, tmp_path, STAGE, name)
        stages.run(STAGE, root, "--lr_encoder", 1e-12, "--standardise_codes", "--max_steps", steps)
        states.append(checkpoint.load(last(root, STAGE))["learned"])
    moved = {key for key in states[0] if not torch.allclose(states[0][key], states[1][key], rtol=0, atol=1e-7)}
    assert moved and all(key.startswith("estimator.") for key in moved)


def test_image_and_latent_are_of_the_same_scan(done, prep):
    """Defect 18: a pair comes from one row, and nothing changes the image alone."""
    data, _ = opened(done, "train")
    volumes = dataset.Volumes(prep, None)
    pairs = representation.Pairs(volumes, data, "sample")
    for index, position in ((0, 5), (7, 5), (7, 105)):
        x, z = pairs[index, position]
        assert torch.equal(x, volumes.tensor(data.rows[index]))
        assert torch.equal(z, data.draw((index, position)))


# ---- the trained stage


def test_trained_stage_keeps_the_prior(done):
    """Fact 7 through the command line: the prior in the LDAE is stage 2's, tensor by tensor; the rest has moved."""
    state = checkpoint.load(best(done))["state_dict"]
    prior = checkpoint.load(best(done, "ldae_pretrain"))["state_dict"]
    assert {key.removeprefix("prior.") for key in state if key.startswith("prior.")} == prior.keys()
    assert all(torch.equal(state[f"prior.{key}"], value) for key, value in prior.items())
    assert state["estimator.shift_out.2.weight"].any()
    aekl = latents.load_aekl(best(done, "aekl"), CPU)
    saved = checkpoint.load(best(done))
    assert saved["hashes"] == {"aekl": aekl.hash, "prior": checkpoint.weights_hash(prior)}


def test_loss_falls_and_the_gap_closes_on_held_out_scans(done):
    """Fact 25 through the command line."""
    rows = log_rows(done, STAGE, "train")
    assert rows[-1]["loss"] < rows[0]["loss"]
    val = log_rows(done, STAGE, "val")
    assert val[-1]["loss"] < val[0]["loss"]
    for row in val:
        assert row["loss"] < row["without"] and row["gap_with"] < row["gap_without"] and 0 < row["fraction"] < 1
    assert val[0]["without"] == val[-1]["without"]  # the prior and the table of times and noise are fixed


def test_checkpoints_hold_no_frozen_tensor_twice(done):
    """Fact 28: last.ckpt holds raw, average and optimizer of what learns; best.ckpt everything once; no pickle."""
    state = checkpoint.load(last(done, STAGE))
    assert set(state) == {"step", "config", "extra", "rng", "learned", "ema", "optimizer", "scaler", "means"}
    assert all(key.startswith(("encoder.", "estimator.")) for key in state["learned"])
    assert not any("prior" in key or "aekl" in key for key in (*state["learned"], *state["ema"]["weights"]))
    saved = checkpoint.load(best(done))["state_dict"]
    ldae = model.load_ldae(best(done), CPU)
    parts = (ldae.aekl, ldae.decoder.prior, ldae.decoder.estimator, ldae.encoder)
    assert len(saved) == sum(len(part.state_dict()) for part in parts)
    assert state["ema"]["step"] == state["step"]  # fact 24
    assert all(torch.equal(saved[key], value) for key, value in state["ema"]["weights"].items())


def test_missing_or_wrong_prior_is_an_error(done, tmp_path):
    """Defect 3: no training on a random frozen network."""
    root = fresh(done, tmp_path, STAGE, "study")
    path = best(root, "ldae_pretrain")
    saved = checkpoint.load(path)
    path.unlink()
    with pytest.raises(UserError, match=r"no prior at .*ldae_pretrain/checkpoints/best.ckpt; train it with .* --prior"):
        stages.run(STAGE, root)
    with pytest.raises(UserError, match="holds a aekl|holds an aekl"):
        stages.run(STAGE, root, "--prior", best(root, "aekl"))
    checkpoint.save(path, saved | {"aekl": "another"})
    with pytest.raises(UserError, match="trained on latents of autoencoder another"):
        stages.run(STAGE, root)
    checkpoint.save(path, saved | {"split": "another"})
    with pytest.raises(UserError, match="was trained with split another"):
        stages.run(STAGE, root)
    short = {key: value for key, value in saved["state_dict"].items() if key != "out.2.weight"}
    checkpoint.save(path, saved | {"state_dict": short})
    with pytest.raises(UserError, match="is of another model .*out.2.weight"):
        stages.run(STAGE, root)
    assert not (root / "runs" / STAGE).exists()  # known before anything is written


def test_another_prior_is_refused_on_resume(done, tmp_path):
    """The prior's hash is part of the run."""
    root = shutil.copytree(done, tmp_path / "study")
    path = best(root, "ldae_pretrain")
    saved = checkpoint.load(path)
    saved["state_dict"]["out.2.bias"] += 1
    checkpoint.save(path, saved)
    with pytest.raises(UserError, match="run with other options .*prior: .* before"):
        stages.run(STAGE, root, "--steps", 20)


def test_encoders_that_do_not_fit_are_one_error_line(done, tmp_path):
    root = fresh(done, tmp_path, STAGE, "study")
    for options, reason in (
        (("--max_slices", 10), "16 slices: this encoder takes at most 10"),
        (("--backbone_depths", 1, 1, 1, 1, "--backbone_widths", 8, 8, 8, 16), "cannot take axial slices"),
    ):
        with pytest.raises(UserError, match=reason):
            stages.run(STAGE, root, *options)


def test_plane(done, tmp_path):
    root = fresh(done, tmp_path, STAGE, "study")
    stages.run(STAGE, root, "--plane", "coronal", "--max_steps", 1)
    ldae = model.load_ldae(best(root), CPU)
    assert ldae.plane == "coronal"
    assert ldae.attention(torch.rand(1, 1, *stages.SHAPE)).shape == (1, stages.SHAPE[1])


def test_measures(done, tmp_path, capsys):
    """The gap over time with, without and with another's code; reconstructions from y, both codes and of controls."""
    root = shutil.copytree(done, tmp_path / "study")
    stages.run(STAGE, root, verb="test")
    run = root / "runs" / STAGE
    result = json.loads((run / "test.json").read_text())
    assert result["n"] == 9 and result["gap"]["loss_with"]["n"] == 9
    gap = result["gap"]
    assert gap["loss_with"]["mean"] < gap["loss_without"]["mean"] and 0 < gap["fraction"] < 1
    assert {entry["row"] for entry in result["table"]} == {"aekl", "y_only", "encoded", "untrained", "shuffled_y_only"}
    with open(run / "test_gap.csv") as file:
        curve = list(csv.DictReader(file))
    assert len(curve) == representation.CURVE_TIMES and {"t", "with", "without", "other"} <= curve[0].keys()
    assert (curve[0]["t"], curve[-1]["t"]) == ("0", "99")
    assert float(curve[0]["with"]) == pytest.approx(float(curve[0]["without"]))  # c_0 = 0
    assert (run / "test_gap.png").stat().st_size > 1000
    assert "of the prior's gap" in capsys.readouterr().out
    with pytest.raises(UserError, match="test.json exists: add --overwrite"):
        stages.run(STAGE, root, verb="test")
    stages.run(STAGE, root, verb="validate")
    validated = json.loads((run / "validate.json").read_text())
    assert validated["part"] == "val" and validated["gap"]["loss_without"] != gap["loss_without"]


def test_codes_and_reconstructions(done, tmp_path):
    """predict: NIfTI on each scan's own grid, codes in the order of the table."""
    root = shutil.copytree(done, tmp_path / "study")
    stages.run(STAGE, root, verb="predict")
    folder = root / "runs" / STAGE / "predict"
    record = json.loads((folder / "predict.json").read_text())
    data, _ = opened(root, "test")
    assert list(record["files"]) == [row.scan for row in data.rows] and record["n"] == 9
    codes = np.load(folder / "codes.npz")
    assert codes["y"].shape == (9, 16) and codes["z_T"].shape == (9, 2, 4, 5, 4)
    assert codes["scans"].tolist() == [row.scan for row in data.rows]
    ldae = model.load_ldae(best(root), CPU)
    volumes = dataset.Volumes(ldae.preparation, None)
    y = ldae.semantic(volumes.tensor(data.rows[0])[None])[0]
    assert torch.equal(torch.from_numpy(codes["y"][0]), y)
    for row in data.rows[:2]:
        for name in record["files"][row.scan]:
            written, source = nib.load(folder / name), nib.load(row.path)
            assert written.shape == source.shape and np.allclose(written.affine, source.affine, atol=1e-4)
    with pytest.raises(UserError, match="predict is not empty"):
        stages.run(STAGE, root, verb="predict")


def test_dry_run_at_the_size_of_the_paper(tmp_path, capsys):
    """Fact 1 through the command line: encoder, estimator and prior of the paper; nothing is written."""
    stages.run_main(stages.run_cli, "fit", "--config", STAGE, "--root", tmp_path / "none", "--device", "cpu",
                    "--dry_run", "--batch_size", 1, "--accumulate", 1)  # fmt: skip
    out = capsys.readouterr().out
    for count in ("53,588,065", "378,411,779", "486,927,363"):
        assert f"{count} parameters" in out
    assert not (tmp_path / "none").exists()
