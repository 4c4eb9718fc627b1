"""The prior over codes: schedule and loss of the original as options, samples with the moments of the codes."""

import json
import shutil

import numpy as np
import pytest
import torch

from common import checkpoint, schedulers
from common.cli import UserError
from common.runtime import Runtime
from ldae import code_prior, codes
from ldae.scripts import train_code_prior
from tests.helpers import ROOT, assert_same_tensors, run_main, run_script

CPU = Runtime(torch.device("cpu"))
N, DIM = 120, 8
TINY = (
    "--device cpu --width 48 --layers 3 --batch_size 32 --lr 3e-3 --timesteps 200 --ema_decay 0.9 --ema_start 10 "
    "--steps 400 --val_every 100 --log_every 50 --patience 0"
).split()


def synthetic_codes():
    """(N, DIM) correlated codes with means and SDs far from 0 and 1."""
    g = np.random.default_rng(0)
    mixing = g.normal(size=(DIM, DIM)) / DIM**0.5
    return (g.normal(size=(N, DIM)) @ mixing * np.linspace(0.5, 4, DIM) + np.linspace(-5, 5, DIM)).astype(np.float32)


def fill(folder):
    values = synthetic_codes()
    splits = ["train"] * 90 + ["val"] * 20 + ["test"] * 10
    rows = tuple(codes.CodeRow(f"s{i:03d}", f"s{i:03d}", 0, "CN", 70.0, "F", split, "x.nii.gz")
                 for i, split in enumerate(splits))  # fmt: skip
    record = {"maker": {"name": "ema_encoder", "encoder": "e" * 16}, "split": "a" * 16, "complete": True}
    codes.save(folder, codes.Codes(values, rows, record))
    return values


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with codes and a trained prior over them. Not to be changed: copy it."""
    root = tmp_path_factory.mktemp("codes")
    torch.set_num_threads(1)
    fill(root / "codes")
    run_main(train_code_prior, "--root", root, *TINY)
    return root


def best(root):
    return root / "runs" / "code_prior" / "checkpoints" / "best.ckpt"


def test_schedules():
    """The original's constant beta, and its terms at both ends."""
    upstream = code_prior.make_schedule("upstream", 1000)
    assert torch.allclose(upstream.betas, torch.tensor(0.008, dtype=torch.float64)) and upstream.T == 1000
    assert upstream.alphas_bar[999].item() == pytest.approx(0.992**1000)
    assert torch.equal(code_prior.make_schedule("cosine", 50).betas, schedulers.make_schedule("cosine", 50).betas)


def test_losses_and_normalisation():
    y, noise = (torch.randn(3, 12, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    mean, std = y.mean(0), y.std(0)
    z = code_prior.normalise(y, mean, std)
    assert torch.allclose(code_prior.denormalise(z, mean, std), y, atol=1e-6)
    assert z.mean(0).abs().max() < 1e-6 and torch.allclose(z.std(0), torch.ones(12))
    schedule, t = code_prior.make_schedule("upstream", 1000), torch.tensor([0, 345, 999])
    for kind, expected in (("l1", noise.abs()), ("l2", noise.square())):
        silent = code_prior.code_prior_loss(lambda z_t, t: torch.zeros_like(z_t), schedule, z, t, noise, kind)
        assert torch.allclose(silent, expected.mean(1))


def test_network_reads_code_and_time_and_starts_at_zero():
    torch.manual_seed(0)
    mlp = code_prior.CodeMLP(code_dim=12, width=32, layers=3, dropout=0.0)
    z, t = torch.randn(2, 12), torch.tensor([3, 3])
    assert not mlp(z, t).any()
    torch.nn.init.normal_(mlp.out.weight)
    assert not torch.allclose(mlp(z, t), mlp(z, t + 400)) and not torch.allclose(mlp(z, t)[0], mlp(z, t)[1])


def test_samples_have_the_moments_of_the_codes(root):
    prior = code_prior.load_code_prior(best(root), CPU)
    y, train = prior.sample(200, seed=1), torch.from_numpy(synthetic_codes()[:90])
    assert y.shape == (200, DIM) and prior.code_dim == DIM and prior.encoder == "e" * 16
    assert ((y.mean(0) - train.mean(0)) / train.std(0)).abs().max() < 0.4
    assert (y.std(0) / train.std(0)).min() > 0.6 and (y.std(0) / train.std(0)).max() < 1.4
    correlation = [torch.corrcoef(x.T) for x in (y, train)]
    assert (correlation[0] - correlation[1]).abs().mean() < 0.2  # a prior, not noise with the right SD
    noise = torch.randn(200, DIM) * train.std(0) + train.mean(0)
    assert (torch.corrcoef(noise.T) - correlation[1]).abs().mean() > 0.2
    held_out = torch.from_numpy(synthetic_codes()[90:110])
    found = code_prior.compare(*(code_prior.normalise(x, prior.mean, prior.std) for x in (y, train, held_out)))
    assert found["mean_error"] < 0.3 and found["std_error"] < 0.3 and found["nearest"] > 0.5


def test_samples_depend_on_seed_and_number_alone(root):
    prior = code_prior.load_code_prior(best(root), CPU)
    y = prior.sample(4, seed=3)
    assert torch.equal(prior.sample(2, seed=3, first=2), y[2:])
    assert not torch.equal(prior.sample(4, seed=4), y)


def test_copies_are_seen():
    train, held_out = torch.randn(50, 6), torch.randn(30, 6)
    copies = code_prior.compare(train[:20] + 1e-3, train, held_out)
    fresh = code_prior.compare(torch.randn(20, 6), train, held_out)
    assert copies["nearest"] < 0.01 and 0.7 < fresh["nearest"] < 1.4


def test_run_folder_and_file(root):
    """Fact 28 for this file: safe to load; split, codes and encoder are part of it."""
    saved = checkpoint.load(best(root))
    assert saved["network"] == "ldae code_prior" and saved["split"] == "a" * 16 and saved["n"] == 90
    train = torch.from_numpy(synthetic_codes()[:90])  # statistics of the training subjects alone
    assert torch.allclose(saved["mean"], train.mean(0)) and torch.allclose(saved["std"], train.std(0))
    rows = [json.loads(line) for line in (root / "runs/code_prior/log.jsonl").read_text().splitlines()]
    val = [row["loss"] for row in rows if row["kind"] == "val"]
    assert len(val) == 4 and saved["scores"]["loss"] == min(val)


def test_resumed_run_is_the_same_run(root, tmp_path):
    """Fact 26."""
    copy = tmp_path / "study"
    shutil.copytree(root / "codes", copy / "codes")
    run_main(train_code_prior, "--root", copy, *TINY, "--max_steps", 130)
    run_main(train_code_prior, "--root", copy, *TINY)
    for name in ("best", "last"):
        assert_same_tensors(*(folder / f"runs/code_prior/checkpoints/{name}.ckpt" for folder in (root, copy)))
    with pytest.raises(UserError, match="lr: 0.003 before, 0.1 now"):
        run_main(train_code_prior, "--root", copy, *TINY, "--lr", 0.1)


def test_upstream_preset_and_dry_run(tmp_path, capsys):
    fill(tmp_path / "codes")
    options = ("--preset", "upstream", "--width", 16, "--layers", 2, "--steps", 3, "--val_every", 3, "--batch_size", 4)
    run_main(train_code_prior, "--root", tmp_path, "--device", "cpu", *options)
    assert checkpoint.load(best(tmp_path))["schedule"] == {"kind": "upstream", "T": 1000, "prediction": "eps"}
    assert json.loads((tmp_path / "runs/code_prior/config.json").read_text())["loss"] == "l1"
    run_main(train_code_prior, "--root", tmp_path / "none", "--device", "cpu", "--dry_run")
    assert "codes of 768 numbers" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_bad_input(root, tmp_path):
    with pytest.raises(UserError, match="no codes in .*save_semantic_latent.py"):
        run_main(train_code_prior, "--root", tmp_path, *TINY)
    with pytest.raises(UserError, match="no code_prior at .*; train it with `python ldae/scripts/train_code_prior.py`"):
        code_prior.load_code_prior(tmp_path / "none.ckpt", CPU)

    class Other:
        hash = "f" * 16

    with pytest.raises(UserError, match=f"codes of LDAE {'e' * 16}, but this LDAE is {'f' * 16}"):
        code_prior.load_code_prior(best(root), CPU, Other)


def test_command_line():
    ended = run_script(["ldae/scripts/train_code_prior.py", "--help"], cwd=ROOT.parent)
    assert ended.returncode == 0 and "--schedule" in ended.stdout
    ended = run_script(["ldae/scripts/train_code_prior.py", "--layers", "0"])
    assert ended.returncode == 2 and ended.stderr.startswith("error: --width, --layers and --steps")
    for name in ("lr", "max_steps", "patience"):
        with pytest.raises(UserError, match=f"--{name} -1.*: must be 0 or more"):
            train_code_prior.Config(**{name: -1})
