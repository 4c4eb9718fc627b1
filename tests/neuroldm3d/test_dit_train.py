"""DiT trainer: objective and weights, label dropout, average, held-out loss, what the file says, options that count."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from common import checkpoint, cli, runtime, schedulers
from common.cli import UserError
from neuroldm3d.diffusion import sampling, trainer
from neuroldm3d.diffusion.config import PRESETS, Config
from neuroldm3d.diffusion.model import DiT3D, drop_labels
from neuroldm3d.VAE import latents
from tests.neuroldm3d.stages import TINY_DIT, best, fresh, last, log_rows, train_dit, train_vae, trained


@pytest.fixture(scope="session")
def done(cohort):
    return trained(cohort)


def config_of(root, *more):
    return cli.parse(Config, [*TINY_DIT, "--root", str(root), *map(str, more)], description="", presets=PRESETS)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- objective


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_objective_is_the_error_of_what_the_schedule_predicts(prediction, kind):
    schedule = schedulers.make_schedule("linear", 100, 1e-4, 0.1, prediction)
    z_0, eps, t = noise(3, 2, 4, 4, 4), noise(3, 2, 4, 4, 4, seed=1), torch.tensor([0, 40, 99])
    alpha, sigma = (table[t].view(3, 1, 1, 1, 1).float() for table in
                    (schedule.alphas_bar.sqrt(), (1 - schedule.alphas_bar).sqrt()))  # fmt: skip
    target = eps if prediction == "eps" else alpha * eps - sigma * z_0
    seen = {}

    def model(z_t, t, label):
        seen.update(z_t=z_t, t=t, label=label)
        return target + torch.tensor([0.0, 0.1, 2.0]).view(3, 1, 1, 1, 1)

    label = torch.tensor([0, 1, 2])
    losses = trainer.dit_loss(model, schedule, z_0, label, t, eps, kind)
    expected = [0, 0.01, 4] if kind == "mse" else [0, 0.1, 2]
    assert torch.allclose(losses, torch.tensor(expected), atol=1e-5)
    assert torch.allclose(seen["z_t"], alpha * z_0 + sigma * eps) and seen["label"] is label


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_min_snr_weights(prediction):
    """Hang et al. 2023: in x_0 both parameterisations weigh min(SNR, gamma)."""
    schedule = schedulers.make_schedule("linear", 1000, prediction=prediction)
    t = torch.tensor([0, 300, 700, 999])
    snr = schedulers.snr(schedule)[t]
    to_x0 = snr if prediction == "eps" else snr + 1  # squared error in eps (or v) over that in x_0
    assert torch.allclose(trainer.loss_weights(schedule, t, 5.0).double() * to_x0, snr.clamp(max=5.0), rtol=1e-5)
    model = lambda z_t, t, label: torch.zeros_like(z_t)  # noqa: E731
    z_0, eps = noise(4, 1, 2, 2, 2), noise(4, 1, 2, 2, 2, seed=1)
    plain = trainer.dit_loss(model, schedule, z_0, t, t, eps)
    weighted = trainer.dit_loss(model, schedule, z_0, t, t, eps, min_snr=5.0)
    assert torch.allclose(weighted, plain * trainer.loss_weights(schedule, t, 5.0))


def test_first_loss_is_one(done):
    """Fact 18, trainer side: the untrained network predicts zero, so the first loss is E eps² = 1."""
    record = latents.read_record(done / "latent_data")
    stats = latents.statistics(done / "latent_data", record, "channel")
    data = latents.LatentDataset(done / "latent_data", "train", record, stats, seed=0)
    config = config_of(done, "--bs", 512)
    with runtime.start("cpu") as rt:
        dit = DiT3D(**trainer.architecture(config, data.shape))
        t, eps, _ = trainer.draw(config, 0, data.shape, rt)
    z_0 = torch.stack([data[i % 12, i][0] for i in range(512)])
    schedule = sampling.noise_schedule(**trainer.schedule_settings(config))
    loss = trainer.dit_loss(dit, schedule, z_0, torch.zeros(512, dtype=torch.long), t, eps).mean()
    assert loss.item() == pytest.approx(1.0, abs=0.02)
    assert log_rows(done, "dit", "train")[0]["loss"] == pytest.approx(1.0, abs=0.1)


# ---- label dropout, timesteps


def test_share_of_null_labels_in_training_and_none_in_validation(done, monkeypatch):
    """Fact 23: 10 % of 10,000 training draws; held-out losses and pictures always keep the label."""
    config = Config(root="x", bs=1000)
    label, dropped, times = torch.arange(1000) % 2, 0, []
    with runtime.start("cpu") as rt:
        for step in range(10):
            t, _, u = trainer.draw(config, step, (1, 1, 1, 1), rt)
            given = drop_labels(label, u, config.label_dropout, 2)
            assert ((given == label) | (given == 2)).all()
            dropped += int((given == 2).sum())
            times.append(t)
        assert dropped / 10000 == pytest.approx(0.1, abs=0.01)
        t = torch.cat(times)
        assert t.min() == 0 and t.max() == 999 and abs(t.double().mean() - 499.5) < 10  # uniform on 0 .. T-1

        seen, forward = [], DiT3D.forward
        monkeypatch.setattr(DiT3D, "forward", lambda dit, z, t, label: seen.append(label) or forward(dit, z, t, label))
        record = latents.read_record(done / "latent_data")
        stats = latents.statistics(done / "latent_data", record, "channel")
        held_out = latents.LatentDataset(done / "latent_data", "val", record, stats, seed=0)
        dit = sampling.load_dit(best(done, "dit"), rt)
        trainer.validate(dit.model, dit.schedule, held_out, config_of(done), rt)
    assert len(seen) == 6 and sorted(int(x[0]) for x in seen) == sorted(held_out.labels)


def test_dropped_labels_reach_the_network(done, tmp_path, monkeypatch):
    seen = []
    original = DiT3D.forward

    def spy(self, z_t, t, label):
        if self.training:
            seen.extend(label.tolist())
        return original(self, z_t, t, label)

    monkeypatch.setattr(DiT3D, "forward", spy)
    train_dit(fresh(done, tmp_path, "dit", "a"), "--label_dropout", 0.5)
    assert set(seen) == {0, 1, 2} and 0.2 < seen.count(2) / len(seen) < 0.8
    seen.clear()
    root = fresh(done, tmp_path, "dit", "b")
    train_dit(root, "--label_dropout", 0)
    assert set(seen) == {0, 1} and checkpoint.load(best(root, "dit"))["state_dict"]["label.weight"].shape[0] == 2


# ---- average, files


def test_average_after_one_step(done, tmp_path):
    """Fact 25: decay d gives d * old + (1 - d) * new; the best file holds the average and the raw weights."""
    root = fresh(done, tmp_path, "dit", "study")
    train_dit(root, "--ema_start", 0, "--ema_decay", 0.75, "--max_steps", 1)
    torch.manual_seed(0)
    record = latents.read_record(root / "latent_data")
    start = DiT3D(**trainer.architecture(config_of(root), tuple(record["latent_shape"]))).state_dict()
    state, saved = checkpoint.load(last(root, "dit")), checkpoint.load(best(root, "dit"))
    for key, new in state["dit"].items():
        expected = 0.75 * start[key] + 0.25 * new
        assert torch.allclose(state["ema"]["weights"][key], expected, atol=1e-7), key
        assert torch.equal(saved["state_dict"][key], state["ema"]["weights"][key])
        assert torch.equal(saved["raw_state_dict"][key], new)
    assert not torch.equal(start["linear_out.weight"], state["dit"]["linear_out.weight"])


def test_file_says_what_it_was_trained_on(done):
    """Class mix, table and VAE are part of the checkpoint (defect D5 of the original)."""
    saved, record = checkpoint.load(best(done, "dit")), latents.read_record(done / "latent_data")
    assert saved["network"] == "neuroldm3d dit" and saved["label_counts"] == {"HC": 5, "TLE": 7}
    assert saved["csv_hash"] == checkpoint.file_hash(done / "data_csvs" / "train.csv")
    assert saved["vae"] == record["vae"] and saved["affine"] == record["affine"]
    assert saved["latents"] == {"mean": record["mean"], "std": record["std"]}
    assert saved["diffusion"]["schedule"] == {"kind": "linear", "T": 100, "beta_start": 1e-4, "beta_end": 0.1,
                                              "prediction": "eps"}  # fmt: skip
    rows = log_rows(done, "dit", "val")
    chosen = min(rows, key=lambda row: row["loss"])
    assert saved["step"] == chosen["step"] and saved["scores"]["loss"] == chosen["loss"]


def test_old_epoch_files_are_pruned(done, tmp_path):
    root = fresh(done, tmp_path, "dit", "study")
    train_dit(root, "--saveIter", 1, "--keep", 2)
    assert sorted(p.name for p in (root / "runs/dit").glob("*.pth")) == ["epoch_3.pth", "epoch_4.pth", "epoch_best.pth"]
    assert checkpoint.load(root / "runs/dit/epoch_4.pth")["step"] == 12
    train_dit(root, "--saveIter", 0, "--restart", "--max_steps", 2)
    assert [p.name for p in (root / "runs/dit").glob("*.pth")] == ["epoch_best.pth"]


@pytest.mark.parametrize(("how", "step"), [("held_out", 6), ("last", 12)])
def test_what_picks_the_best_weights(done, tmp_path, monkeypatch, how, step):
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(trainer, "validate", lambda *args: {"loss": next(losses)})
    root = fresh(done, tmp_path, "dit", "study")
    train_dit(root, "--select", how)
    assert checkpoint.load(best(root, "dit"))["step"] == step


# ---- validation


def test_held_out_loss_is_fixed_and_by_class(done):
    """Same (t, noise) every time, whatever the order of calls; classes apart, and all volumes alike in the mean."""
    record, config = latents.read_record(done / "latent_data"), config_of(done)
    stats = latents.statistics(done / "latent_data", record, "channel")
    held_out = latents.LatentDataset(done / "latent_data", "val", record, stats, seed=0)
    with runtime.start("cpu") as rt:
        dit = sampling.load_dit(best(done, "dit"), rt)
        scores = trainer.validate(dit.model, dit.schedule, held_out, config, rt)
        torch.manual_seed(5)
        assert trainer.validate(dit.model, dit.schedule, held_out, config, rt) == scores
    assert scores == {name: checkpoint.load(best(done, "dit"))["scores"][name] for name in scores}
    n = [held_out.labels.count(k) for k in (0, 1)]
    mean = (n[0] * scores["loss_HC"] + n[1] * scores["loss_TLE"]) / sum(n)
    assert scores["loss"] == pytest.approx(mean) and scores["loss_HC"] != scores["loss_TLE"]
    assert trainer.validation_items([0, 1, 1, 0, 1, 1], 2) == [0, 1, 2, 3]
    assert trainer.validation_items([0, 1, 1], 0) == [0, 1, 2]


def test_picture_of_samples(done, tmp_path):
    root = fresh(done, tmp_path, "dit", "study")
    train_dit(root, "--sample_every", 4)
    assert [p.name for p in (root / "runs/dit/samples").glob("samples_*.png")] == ["samples_12.png"]
    shutil.rmtree(root / "runs" / "dit")
    (root / "runs" / "vae" / "best_vae.pth").unlink()
    with pytest.raises(UserError, match="no VAE at .*--vae, or add --sample_every 0"):
        train_dit(root, "--sample_every", 4)
    assert not (root / "runs" / "dit").exists()


# ---- options


def test_numbers_and_lists_of_the_command_line_count():
    """Defects D17 and D18 of the original: --beta_end stayed text, block indexes became characters."""
    config = config_of("x", "--beta_end", "0.05", "--window_size", 2, "--window_block_indexes", 0, 1)
    assert config.beta_end == 0.05 and config.window_block_indexes == (0, 1)
    schedule = sampling.noise_schedule(**trainer.schedule_settings(config))
    assert schedule.betas[-1] == pytest.approx(0.05) and schedule.T == 100
    cosine = config_of("x", "--schedule_type", "cosine", "--model_mean_type", "v")
    assert sampling.noise_schedule(**trainer.schedule_settings(cosine)).prediction == "v"
    settings = trainer.architecture(config, (2, 8, 10, 8))
    torch.manual_seed(0)
    windowed = DiT3D(**settings)
    torch.manual_seed(0)
    plain = DiT3D(**trainer.architecture(config_of("x"), (2, 8, 10, 8)))
    assert [block.window for block in windowed.blocks] == [2, 2] and [block.window for block in plain.blocks] == [0, 0]
    for dit in (windowed, plain):  # zero at the start: let the blocks act
        for parameter in dit.parameters():
            parameter.data += 0.05 * noise(*parameter.shape, seed=parameter.numel())
    z, index = noise(1, 2, 8, 10, 8), torch.tensor([1])
    assert (windowed(z, index, index) - plain(z, index, index)).abs().max() > 1e-4


def test_a_patch_that_does_not_fit_is_refused_or_padded(capsys, tmp_path):
    """Fact 21, command line: DiT-B/4 on 28 x 34 x 28."""
    from neuroldm3d.diffusion import train as script
    from tests.helpers import run_main

    common = ("--root", tmp_path, "--dry_run", "--device", "cpu", "--model_type", "DiT-B/4")
    with pytest.raises(UserError, match="28x34x28 does not divide into patches of 4x4x4.*--pad_input"):
        run_main(script, *common)
    run_main(script, *common, "--pad_input")
    out = capsys.readouterr().out
    assert "441 tokens of width 768" in out  # 7 x 9 x 7
    run_main(script, "--root", tmp_path, "--dry_run", "--device", "cpu")
    out = capsys.readouterr().out
    assert "833 tokens of width 384" in out and "32,881,664 parameters (32,561,792 trained)" in out
    assert not any(tmp_path.iterdir())


def test_upstream_preset_leaves_latents_as_they_are(done, tmp_path):
    root = fresh(done, tmp_path, "dit", "study")
    train_dit(root, "--preset", "upstream", "--max_steps", 2)
    assert checkpoint.load(best(root, "dit"))["latents"] == {"mean": [0.0, 0.0], "std": [1.0, 1.0]}
    upstream = cli.parse(Config, ["--preset", "upstream"], description="", presets=PRESETS)
    assert (upstream.ema_start, upstream.mask_padding, upstream.select) == (0, False, "last")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--patch_size", 2, 2), "--patch_size .2, 2.: give three positive numbers"),
        (("--label_dropout", 1), "--label_dropout 1.0: choose 0 or more and less than 1"),
        (("--beta_start", 0.5), "--beta_start <= --beta_end"),
        (("--ema_decay", 1), "--ema_decay 1.0"),
        (("--model_type", "DiT-S/3"), "is not one of"),
    ],
)
def test_options_that_cannot_be_meant(options, message, capsys):
    with pytest.raises(SystemExit) as end:
        config_of("x", *options)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ")
    assert re.search(message, err)


def test_latents_that_are_missing_or_of_another_vae(done, tmp_path):
    root = fresh(done, tmp_path, "dit", "study")
    with pytest.raises(UserError, match="no train latents in .*nothing; encode them with .*save_latent.py"):
        train_dit(root, "--dataroot", tmp_path / "nothing")
    path = root / "latent_data" / "latents.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"splits": {"train": record["splits"]["train"]}}))
    with pytest.raises(UserError, match="no val latents in"):
        train_dit(root)
    path.write_text(json.dumps(record))
    shutil.rmtree(root / "runs" / "vae")
    train_vae(root, "--seed", 3, "--max_steps", 1)
    with pytest.raises(UserError, match="latents are of VAE .* name the matching pair"):
        train_dit(root, "--sample_every", 1)
    assert not (root / "runs" / "dit").exists()


def test_two_gaussian_classes_are_told_apart(tmp_path):
    """Trained on latents whose class is their sign, the held-out loss falls and samples of a class have that sign."""
    folder = tmp_path / "latent_data"
    rng = np.random.default_rng(0)
    labels = [i % 2 for i in range(24)]
    names = [f"s{i}" for i in range(24)]
    for name, label in zip(names, labels, strict=True):
        mu = torch.from_numpy(rng.normal(1.0 if label else -1.0, 0.1, (1, 2, 2, 2)).astype(np.float32))
        for split in ("train", "val"):
            latents.save_latent(latents.latent_path(folder, split, name), mu, torch.full_like(mu, -6.0), label)
    entry = {"names": names, "labels": labels, "label_counts": latents.label_counts(labels), "csv_hash": None}
    record = {"vae": "none", "preparation": {}, "affine": np.eye(4).tolist(), "latent_shape": [1, 2, 2, 2],
              "mean": [0.0], "std": [1.0], "splits": {"train": entry, "val": entry}}  # fmt: skip
    (folder / "latents.json").write_text(json.dumps(record))
    train_dit(tmp_path, "--patch_size", 1, 1, 1, "--bs", 24, "--steps", 150, "--lr", 3e-3, "--model_mean_type", "v",
              "--ema_start", 100, "--val_every", 50)  # fmt: skip
    losses = [row["loss"] for row in log_rows(tmp_path, "dit", "val")]
    assert len(losses) == 3 and losses[-1] < 0.3  # untrained: 1
    with runtime.start("cpu") as rt:
        dit = sampling.load_dit(best(tmp_path, "dit"), rt)
        means = []
        for label in (0, 1):
            g = [runtime.generator("gauss", k) for k in range(16)]
            z = sampling.sample_latents(dit, label, g, rt, sampler="dpm", steps=20)
            means.append(z.mean(dim=(1, 2, 3, 4)))
    assert (means[0] < 0).float().mean() > 0.9 and (means[1] > 0).float().mean() > 0.9
    assert means[1].mean() - means[0].mean() == pytest.approx(2.0, abs=0.5)
