"""Stage 2: what it trains on, what it measures, what it writes."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from common import checkpoint, schedulers
from common.cli import UserError
from common.runtime import Runtime
from ldae import data_split, dataset, latents, model, prior
from ldae.config import PretrainConfig
from ldae.unet import UNet
from tests.ldae import stages
from tests.ldae.stages import best, fresh, log_rows, trained

STAGE = "ldae_pretrain"
CPU = Runtime(torch.device("cpu"))


@pytest.fixture(scope="module")
def done(cohort):
    return trained(cohort)


def opened(root, part, stats=None):
    """(Latents of a part, record) of a trained study."""
    split = data_split.read(root / "split.json")
    rows = split.rows(dataset.read_table(root / "data" / "dataset.csv", classes=("AD", "CN", "MCI")), part)
    record = latents.read_record(root / "latents")
    return latents.Latents(root / "latents", rows, record, stats or latents.statistics(record), seed=0), record


def test_loss_is_the_error_of_the_noise():
    z_0, noise = (torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    t = torch.tensor([10, 900])
    schedule = schedulers.make_schedule("linear", 1000)
    silent = prior.prior_loss(lambda z_t, t: torch.zeros_like(z_t), schedule, z_0, t, noise)
    assert torch.allclose(silent, noise.square().flatten(1).mean(1))
    perfect = prior.prior_loss(lambda z_t, t: noise, schedule, z_0, t, noise)
    assert not perfect.any()
    v_schedule = schedulers.make_schedule("linear", 1000, prediction="v")
    v = schedulers.training_target(v_schedule, z_0, t, noise)
    assert not prior.prior_loss(lambda z_t, t: v, v_schedule, z_0, t, noise).any()


def test_every_visit_is_a_fresh_draw_of_the_posterior(done):
    """Defect 11: the cache holds mean and log-variance; a visit draws, alike for the same position of the stream."""
    data, _ = opened(done, "train")
    sampled, means = (prior.TrainingLatents(data, kind) for kind in ("sample", "mean"))
    mu, logvar = data[3]
    first, second = sampled[3, 7], sampled[3, 1007]
    assert torch.equal(first, sampled[3, 7]) and not torch.equal(first, second)
    assert torch.equal(means[3, 7], mu) and torch.equal(means[3, 1007], mu)
    draws = torch.stack([sampled[3, position] for position in range(200)])
    sigma = (0.5 * logvar).exp()
    assert ((draws.mean(0) - mu).abs() < 6 * sigma / 200**0.5).all()
    assert (draws.std(0) / sigma).mean().item() == pytest.approx(1, abs=0.05)


def test_normalised_latents_have_unit_variance(done):
    """Defect 12: the scale comes from the whole training split, per channel."""
    data, record = opened(done, "train")
    z = torch.stack([data.draw((i, i)) for i in range(len(data))]).transpose(0, 1).flatten(1)
    assert z.mean(1).abs().max() < 0.05 and (z.std(1) - 1).abs().max() < 0.05
    assert record["scale"] == pytest.approx([1 / std for std in record["std"]], rel=0.01)


def test_held_out_loss_is_fixed_and_covers_all_scans(done):
    """Defect 13: the same draws and noise every time, over the whole validation split."""
    trained_prior = prior.load_prior(best(done, STAGE), CPU)
    data, _ = opened(done, "val", trained_prior.stats)
    assert len(data) == 9
    config = PretrainConfig(timesteps=100)
    seen = []

    def network(z_t, t):
        seen.append(z_t)
        return trained_prior.model(z_t, t)

    network.train = trained_prior.model.train
    network.eval, network.training = trained_prior.model.eval, False
    with torch.random.fork_rng():
        scores = prior.held_out_loss(network, trained_prior.schedule, data, config, CPU)
        torch.manual_seed(99)  # validation takes nothing from the global generator
        assert prior.held_out_loss(network, trained_prior.schedule, data, config, CPU) == scores
    assert len(seen) == 2 * 9 and all(torch.equal(a, b) for a, b in zip(seen[:9], seen[9:], strict=True))
    quarters = [scores[f"loss_q{i}"] for i in range(1, 5)]
    assert scores["loss"] == pytest.approx(np.mean(quarters)) and quarters[0] > quarters[3]  # noise is easy to see


def test_average_of_the_weights_is_what_is_kept(done):
    """Fact 24: best.ckpt holds the average, which is updated once per optimizer step."""
    state = checkpoint.load(stages.last(done, STAGE))
    assert state["ema"]["step"] == state["step"] == 12
    saved = checkpoint.load(best(done, STAGE))
    assert saved["step"] == 12  # the loss still falls
    assert all(torch.equal(saved["state_dict"][key], value) for key, value in state["ema"]["weights"].items())
    assert any(not torch.equal(saved["state_dict"][key], value) for key, value in state["unet"].items())
    losses = [row["loss"] for row in log_rows(done, STAGE, "val")]
    assert losses == sorted(losses, reverse=True)


def test_file_says_what_the_latents_mean(done):
    found = prior.load_prior(best(done, STAGE), CPU)
    _, record = opened(done, "train")
    assert found.aekl == record["aekl"]
    for name, values in latents.statistics(record).items():
        assert found.stats[name].tolist() == pytest.approx(values)
    assert found.split_hash == data_split.read(done / "split.json").hash
    assert found.latent_shape == (2, 4, 5, 4) and found.schedule.T == 100
    assert not any(p.requires_grad for p in found.model.parameters()) and not found.model.training


def test_measures(done, tmp_path, capsys):
    """Fact 16 in the report of `test`: the zero network's round trip beside the trained one's."""
    root = shutil.copytree(done, tmp_path / "study")
    stages.run(STAGE, root, verb="test")
    result = json.loads((root / "runs" / STAGE / "test.json").read_text())
    assert result["n"] == 9 and result["subjects"] == 3 and result["warning"] == ""
    assert result["scores"]["zero.latent_rmse"]["mean"] < 1e-5 < result["scores"]["lddim.latent_rmse"]["mean"]
    assert {"lddim.ssim", "aekl.ssim", "lddim.z_std", "lddim.z_kurtosis"} <= result["scores"].keys()
    assert result["samples"]["n"] == 9 and result["samples"]["nearest"] > 0 and "no FID" in result["samples_definition"]
    assert result["split"] == data_split.read(root / "split.json").hash
    assert "network that predicts 0" in capsys.readouterr().out
    with pytest.raises(UserError, match="test.json exists: add --overwrite"):
        stages.run(STAGE, root, verb="test")
    stages.run(STAGE, root, "--overwrite", verb="test")
    assert json.loads((root / "runs" / STAGE / "test.json").read_text())["scores"] == result["scores"]
    stages.run(STAGE, root, verb="validate")
    assert json.loads((root / "runs" / STAGE / "validate.json").read_text())["part"] == "val"


def test_untrained_prior_is_called_out(done, tmp_path, capsys):
    """Fact 16: where the network is untrained the report warns."""
    root = shutil.copytree(done, tmp_path / "study")
    saved = checkpoint.load(best(root, STAGE))
    saved["state_dict"] = UNet(**saved["config"]).state_dict()
    checkpoint.save(best(root, STAGE), saved)
    stages.run(STAGE, root, verb="test")
    assert "warning: the network's round trip" in capsys.readouterr().out
    assert "shows no training" in json.loads((root / "runs" / STAGE / "test.json").read_text())["warning"]


def test_synthetic_volumes(done, tmp_path):
    root = shutil.copytree(done, tmp_path / "study")
    stages.run(STAGE, root, "--n_samples", 3, verb="predict")
    folder = root / "runs" / STAGE / "predict"
    volumes = [nib.load(folder / f"synthetic_{i:05d}.nii.gz") for i in range(3)]
    assert volumes[0].shape == stages.SHAPE and volumes[0].header.get_zooms() == (12.0, 12.0, 12.0)
    assert nib.aff2axcodes(volumes[0].affine) == ("R", "A", "S")
    assert not np.array_equal(volumes[0].get_fdata(), volumes[1].get_fdata())
    assert len(json.loads((folder / "predict.json").read_text())["files"]) == 3
    with pytest.raises(UserError, match="predict is not empty: add --overwrite"):
        stages.run(STAGE, root, verb="predict")
    stages.run(STAGE, root, "--n_samples", 1, "--out", root / "again", verb="predict")  # by seed and number alone
    again = nib.load(root / "again" / "synthetic_00000.nii.gz")
    assert np.array_equal(again.get_fdata(), volumes[0].get_fdata())


def test_v_prediction(done, tmp_path):
    """--prediction v is stored with the weights, and stage 3 takes it over."""
    root = fresh(done, tmp_path, STAGE, "study")
    stages.run(STAGE, root, "--prediction", "v", "--max_steps", 3)
    assert prior.load_prior(best(root, STAGE), CPU).schedule.prediction == "v"
    shutil.rmtree(root / "runs" / "ldae_repr_learn")
    stages.run("ldae_repr_learn", root, "--max_steps", 2)
    assert checkpoint.load(best(root))["schedule"]["prediction"] == "v"
    stages.run("ldae_repr_learn", root, verb="test")


def test_mean_latent_image(done, tmp_path):
    """--latent_scale voxel: what brains share is taken out, what differs has unit variance; stage 3 takes it over."""
    root = fresh(done, tmp_path, STAGE, "study")
    stages.run(STAGE, root, "--latent_scale", "voxel", "--max_steps", 2)
    found = prior.load_prior(best(root, STAGE), CPU)
    data, _ = opened(root, "train", found.stats)
    z = torch.stack([data.draw((i, i)) for i in range(len(data))])  # (N, C, d, h, w)
    assert found.stats["mean"].shape == z.shape[1:] and found.stats["std"].shape == (2,)
    assert torch.stack([data[i][0] for i in range(len(data))]).mean(0).abs().max() < 1e-5
    assert (z.transpose(0, 1).flatten(1).std(1) - 1).abs().max() < 0.05
    shutil.rmtree(root / "runs" / "ldae_repr_learn")
    stages.run("ldae_repr_learn", root, "--max_steps", 1)
    ldae = model.load_ldae(best(root), CPU)
    x = torch.rand(1, 1, *stages.SHAPE)
    plain = model.load_ldae(best(done), CPU)
    assert torch.allclose(ldae.decompress(ldae.compress(x)), plain.decompress(plain.compress(x)), atol=1e-4)
    assert torch.equal(ldae.stats["mean"], found.stats["mean"])


def test_networks_that_do_not_fit_are_one_error_line(done, tmp_path):
    root = fresh(done, tmp_path, STAGE, "study")
    with pytest.raises(UserError, match="latent of 4 x 5 x 4: this U-Net needs multiples of 2 x 2 x 2; choose"):
        stages.run(STAGE, root, "--channel_mult", 1, 1)
    with pytest.raises(UserError, match="width 40 is no multiple of 32"):
        stages.run(STAGE, root, "--base_channels", 40)
    with pytest.raises(UserError, match="no prior at .*none.ckpt; train it with `python ldae/run_cli.py fit"):
        stages.run(STAGE, done, "--ckpt_path", tmp_path / "none.ckpt", "--run", tmp_path / "run", verb="test")


def test_dry_run_at_the_size_of_the_paper(tmp_path, capsys):
    """Fact 1 through the command line: 486,927,363 parameters; nothing is written."""
    stages.run_main(stages.run_cli, "fit", "--config", STAGE, "--root", tmp_path / "none", "--device", "cpu",
                    "--dry_run", "--batch_size", 1)  # fmt: skip
    out = capsys.readouterr().out
    assert "486,927,363 parameters" in out and "latents (1, 3, 16, 20, 16)" in out
    assert not (tmp_path / "none").exists()
