"""Codes of all slices (latent.ckpt), the diffusion model over them, and slices drawn without a patient."""

import json

import nibabel
import numpy as np
import pytest
import torch

from common import checkpoint, runtime, schedulers
from common.cli import UserError
from mgdcr import code_prior, dataset, diffusion, latent_dpm, latents, trainer
from mgdcr.config import LatentDPMConfig
from mgdcr.latent_net import MLPSkipNet
from mgdcr.store import Store
from tests.helpers import run_main, two_ranks
from tests.mgdcr.stages import best, run_encode, store_of, words

RT = runtime.Runtime(torch.device("cpu"))


@pytest.fixture(scope="session")
def codes(runs):
    return latents.load(latent_file(runs))


def latent_file(root):
    return best(root, "autoenc").with_name("latent.ckpt")


# ---- export ---------------------------------------------------------------------------------------------------------


def test_latent_file_has_a_code_for_every_slice(slices, runs):
    """Keys of the whole store once each, the part of each subject, and the code that the encoder gives."""
    saved, store = checkpoint.load(latent_file(runs)), Store(store_of(slices))
    assert sorted(saved["keys"]) == sorted(store.keys) and saved["conds"].shape == (len(store), 12)
    split = dataset.read_split(store_of(slices).parent / "split.json")
    assert saved["parts"] == [split.part(key.split("/")[0]) for key in saved["keys"]]
    prior = trainer.load_network(best(runs, "autoenc"), RT)
    number = saved["parts"].index("val") + 3
    data = dataset.Slices(store, split.val, 64)
    with torch.no_grad():
        z = prior.model.encode(data[3][None])[0]
    assert data.keys[3] == saved["keys"][number]
    assert torch.allclose(saved["conds"][number], z, atol=1e-5)
    assert saved["prior"] == prior.hash and saved["split"] == split.hash and not saved["conds"].requires_grad


def test_statistics_are_of_training_subjects_only(codes):
    """Mean and SD per entry; the codes of validation subjects do not enter."""
    train = codes.codes[torch.tensor([part == "train" for part in codes.parts])]
    assert torch.allclose(codes.mean, train.mean(0), atol=1e-5) and torch.allclose(codes.std, train.std(0), atol=1e-5)
    assert not torch.allclose(codes.mean, codes.codes.mean(0), atol=1e-7)
    z = codes.standardised("train")
    assert z.mean(0).abs().max() < 1e-3 and torch.allclose(z.std(0), torch.ones(12), atol=1e-3)
    assert torch.allclose(latents.restore(z, codes.mean, codes.std), train, atol=1e-5)


def test_an_entry_that_never_changes_stays_finite():
    z = torch.tensor([[1.0, 5.0], [2.0, 5.0]])
    assert latents.standardise(z, z.mean(0), z.std(0))[:, 1].tolist() == [0, 0]


def test_export_does_not_depend_on_the_batch_and_never_overwrites_silently(slices, runs, tmp_path, codes):
    how = ("--ckpt", best(runs, "autoenc"), "--out", tmp_path / "latent.ckpt")
    run_encode(slices, tmp_path, *how, "--batch_size", 7)
    assert torch.allclose(latents.load(tmp_path / "latent.ckpt").codes, codes.codes, atol=1e-5)
    with pytest.raises(UserError, match="--overwrite"):
        run_encode(slices, tmp_path, *how)
    run_encode(slices, tmp_path, *how, "--overwrite")
    assert latents.load(tmp_path / "latent.ckpt").hash == codes.hash  # same seed, same bytes


def test_export_refuses_another_split(slices, runs, tmp_path):
    """A prior that has trained on what the split calls validation would make the statistics a leak."""
    split = dataset.read_split(store_of(slices).parent / "split.json")
    dataset.write_split(tmp_path / "split.json", dataset.Split(split.val, split.train, split.test))
    with pytest.raises(UserError, match="was trained with split"):
        run_encode(slices, runs, "--split", tmp_path / "split.json", "--out", tmp_path / "latent.ckpt")
    assert not (tmp_path / "latent.ckpt").exists()


@pytest.mark.slow
def test_two_ranks_export_the_same(slices, runs, tmp_path, codes):
    args = ["mgdcr/encode.py", "--root", runs, "--store", store_of(slices), "--device", "cpu"]
    done = two_ranks([*args, "--out", tmp_path / "latent.ckpt"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(latents.load(tmp_path / "latent.ckpt").codes, codes.codes)


def test_files_that_hold_no_codes(runs, tmp_path):
    with pytest.raises(UserError, match="python mgdcr/encode.py"):
        latents.load(tmp_path / "latent.ckpt")
    with pytest.raises(UserError, match="holds no codes"):
        latents.load(best(runs, "autoenc"))


# ---- the model over codes -------------------------------------------------------------------------------------------


def test_schedule_has_the_same_beta_everywhere():
    schedule = code_prior.make_schedule(0.008)
    assert schedule.T == 1000 and torch.allclose(schedule.betas, torch.full((1000,), 0.008, dtype=torch.float64))
    assert schedule.alphas_bar[-1].item() == pytest.approx(0.992**1000, rel=1e-9)


def test_loss_is_the_mean_magnitude_of_the_error():
    """l1 per code; l2 on request; 0 for the noise itself."""
    z, noise, t = torch.zeros(2, 4), torch.full((2, 4), 2.0), torch.tensor([0, 999])
    schedule = code_prior.make_schedule(0.008)
    for kind, expected in (("l1", 3), ("l2", 9)):
        losses = code_prior.code_loss(lambda z_t, t: noise - 3, schedule, z, t, noise, kind)
        assert losses.tolist() == [expected, expected]
    assert code_prior.code_loss(lambda z_t, t: noise, schedule, z, t, noise, "l1").tolist() == [0, 0]


def test_learns_a_distribution():
    """Codes on a tilted line: what is drawn has their mean, spread and correlation; an untrained network's has not."""
    torch.manual_seed(0)
    u = torch.randn(512, 1)
    z = torch.cat([u, 0.9 * u + 0.44 * torch.randn(512, 1)], 1)
    z = (z - z.mean(0)) / z.std(0)
    schedule = code_prior.make_schedule(0.008)
    network = MLPSkipNet(num_channels=2, num_hid_channels=48, num_layers=4, skip_layers=(1, 2, 3),
                         num_time_emb_channels=32)  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.01)
    for _ in range(600):
        rows = torch.randint(0, len(z), (128,))
        t, noise = torch.randint(0, 1000, (128,)), torch.randn(128, 2)
        optimizer.zero_grad()
        code_prior.code_loss(network, schedule, z[rows], t, noise, "l2").mean().backward()
        optimizer.step()
    with torch.no_grad():
        drawn = code_prior.draw_codes(network.eval(), schedule, 400, 2, 50, 0, RT)
    assert drawn.mean(0).abs().max() < 0.25 and (drawn.std(0) - 1).abs().max() < 0.25
    assert torch.corrcoef(drawn.T)[0, 1] > 0.75


def test_validation_says_when_codes_are_copies(codes):
    """nearest is 0 where the drawn codes are training codes; held-out loss is the same at every call."""
    z = {part: codes.standardised(part) for part in ("train", "val")}
    config, schedule = LatentDPMConfig(latent_steps=3), code_prior.make_schedule(0.008)

    class Memory(torch.nn.Module):  # knows one training code by heart
        def forward(self, z_t, t):
            a = schedule.alphas_bar[t].float()[:, None]
            return (z_t - a.sqrt() * z["train"][0]) / (1 - a).sqrt()

    scores = code_prior.validate(Memory(), schedule, z, config, RT)
    assert scores["nearest"] < 1e-3 and scores["std_error"] > 0.5
    assert scores == code_prior.validate(Memory(), schedule, z, config, RT)


# ---- drawing slices -------------------------------------------------------------------------------------------------


def draw(runs, tmp_path, n, *more, name="s.nii.gz"):
    command = ["--root", runs, "--device", "cpu", "--sample", "--n_samples", n, "--latent_steps", 4, "--steps", 3]
    run_main(latent_dpm, *command, "--out", tmp_path / name, *more)
    return nibabel.load(tmp_path / name).get_fdata(dtype=np.float32)


def test_drawn_slices(runs, tmp_path):
    """A NIfTI of n slices in [0, 1]; a slice depends on the seed and its number alone; nothing is overwritten."""
    two, three = draw(runs, tmp_path, 2), draw(runs, tmp_path, 3, name="t.nii.gz")
    assert three.shape == (64, 64, 3) and three.min() >= 0 and three.max() <= 1
    assert np.allclose(two, three[..., :2], atol=1e-4) and not np.allclose(three[..., 0], three[..., 1], atol=1e-3)
    assert not np.allclose(two, draw(runs, tmp_path, 2, "--seed", 1, name="u.nii.gz"), atol=1e-3)
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["n"] == 2 and record["prior"] == checkpoint.load(best(runs, "autoenc"))["hash"]
    with pytest.raises(UserError, match="--overwrite"):
        draw(runs, tmp_path, 2)
    assert np.array_equal(two, draw(runs, tmp_path, 2, "--overwrite"))  # same seed, same slices


def test_drawn_slices_are_decodings_of_the_drawn_codes(runs, tmp_path):
    """The first slice by hand: draw, restore the scale, decode from its own noise; columns are the first axis."""
    network, saved = code_prior.load_latent_dpm(best(runs, "latent_dpm"), RT)
    prior = trainer.load_network(best(runs, "autoenc"), RT)
    with torch.no_grad():
        z = code_prior.draw_codes(network, code_prior.make_schedule(saved["beta"]), 1, 12, 4, 0, RT)
        z = latents.restore(z, saved["mean"], saved["std"])
        x_T = schedulers.draw_noise(runtime.generator(0, "slice", 0), (1, 1, 64, 64))
        x = (diffusion.decode(prior.model, x_T, z, 3)[0, 0].clamp(-1, 1) + 1) / 2
    assert np.allclose(draw(runs, tmp_path, 1)[..., 0], x.numpy().T, atol=1e-4)


def test_codes_of_another_prior_are_refused(slices, runs, tmp_path):
    saved = checkpoint.load(best(runs, "autoenc"))
    state = {name: value + 1 for name, value in saved["state_dict"].items()}
    other = saved | {"state_dict": state, "hash": checkpoint.weights_hash(state)}
    checkpoint.save(tmp_path / "best.ckpt", other)
    with pytest.raises(UserError, match="give the matching pair"):
        draw(runs, tmp_path, 1, "--ckpt", tmp_path / "best.ckpt")
    assert not (tmp_path / "s.nii.gz").exists()


def test_training_needs_codes_of_train_and_val(slices, runs, tmp_path):
    saved = checkpoint.load(latent_file(runs))
    checkpoint.save(tmp_path / "latent.ckpt", saved | {"parts": ["train"] * len(saved["parts"])})
    with pytest.raises(UserError, match="0 codes of val subjects"):
        run_main(latent_dpm, *words("latent_dpm", slices, tmp_path, "--latents", tmp_path / "latent.ckpt"))
