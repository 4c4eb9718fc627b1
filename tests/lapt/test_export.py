"""Exported files: everything in one file, without what only training needs; checkpoints of the original."""

import shutil

import pytest
import torch

from common import checkpoint, runtime
from common.cli import UserError
from lapt import export, ldm, sample, segmentation, upstream, vqgan
from lapt.diffusion import build_model, load_model
from tests.helpers import run_main
from tests.lapt.stages import best, last, trained
from tests.lapt.untrained import untrained_model

RT = runtime.Runtime(torch.device("cpu"))


@pytest.fixture(scope="module")
def runs(prepared):
    return trained(prepared)


def test_an_export_works_after_all_runs_are_deleted(prepared, runs, tmp_path):
    """Fact 17: sampling from the exported file alone, bit-equal to sampling from the run."""
    copy = shutil.copytree(runs, tmp_path / "runs")
    run_main(export, "-r", copy / "lapt", "--out", tmp_path / "lapt.ckpt")
    how = ("--dataroot", prepared, "--split", "test", "--steps", 2, "--device", "cpu", "--end_idx", 1)
    run_main(sample, "-r", copy / "lapt", *how, "--outdir", tmp_path / "a")
    shutil.rmtree(copy)
    run_main(sample, "-r", tmp_path / "lapt.ckpt", *how, "--outdir", tmp_path / "b")
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.nii.gz"))
    assert len(names) == 3
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_what_an_export_holds(runs, tmp_path):
    out = tmp_path / "lapt.ckpt"
    run_main(export, "-r", best(runs, "lapt"), "--out", out)
    a, b = checkpoint.load(best(runs, "lapt")), checkpoint.load(out)
    assert set(a) - set(b) == {"raw_state_dict"} and a["hash"] == b["hash"] == checkpoint.weights_hash(b["state_dict"])
    assert b["floor"]["autoencoder"]["lesion"] > 0 and b["objective"]["w_les"] == 0.02
    assert out.stat().st_size < best(runs, "lapt").stat().st_size < last(runs, "lapt").stat().st_size * 2
    run_main(export, "-r", runs / "lapt", "--out", tmp_path / "raw.ckpt", "--weights", "raw")
    raw = load_model(tmp_path / "raw.ckpt", RT)
    assert torch.equal(raw.unet.time1.weight, a["raw_state_dict"]["unet.time1.weight"])
    for stage, load in (("vqgan", vqgan.load_vqgan), ("guide", segmentation.load_guide)):
        run_main(export, "-r", runs / stage, "--out", tmp_path / f"{stage}.ckpt")
        assert load(tmp_path / f"{stage}.ckpt", RT).hash == checkpoint.load(best(runs, stage))["hash"]


def test_stages_and_sampling_take_exported_files(prepared, runs, tmp_path):
    """A path to a file does where a run folder does."""
    run_main(export, "-r", runs / "ldm", "--out", tmp_path / "ldm.ckpt")
    config = ldm.LAPTConfig(data=str(prepared), ldm=str(tmp_path / "ldm.ckpt"))
    assert ldm.start_model(config, RT).hash == load_model(runs / "ldm", RT).hash


def test_checkpoints_of_the_original_become_files_of_ours(prepared, tmp_path, capsys):
    """Keys of the original in, a model of the same weights out; networks that miss something are refused."""
    tiny = untrained_model(time_points=15)
    widths = {"channels": 32, "norm_groups": 32}  # the original's norms have 32 groups
    settings = tiny.settings | {"autoencoder": tiny.settings["autoencoder"] | widths}
    model = build_model(settings, tiny.intensity, RT)
    state = {f"first_stage_model.{k}": v for k, v in upstream.to_upstream(model.autoencoder).items()}
    state |= {f"model.diffusion_model.{k}": v for k, v in upstream.to_upstream(model.unet).items()}
    state |= {f"cond_stage_model.{k}": v for k, v in upstream.to_upstream(model.conditioner).items()}
    state |= upstream.schedule_tables(model.schedule)
    theirs, ours = tmp_path / "theirs.ckpt", tmp_path / "ours.ckpt"
    checkpoint.save(theirs, {"state_dict": state})
    how = ("--import_upstream", theirs, "--data", prepared, "--head_channels", 16)
    run_main(export, *how, "--out", ours)
    assert "unet" in capsys.readouterr().out
    loaded = load_model(ours, RT)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.settings["sampling"] == {"spacing": "leading", "offset": 1, "final": "first"}
    del state["model.diffusion_model.out.2.bias"]
    checkpoint.save(theirs, {"state_dict": state})
    with pytest.raises(UserError, match="theirs.ckpt"):
        run_main(export, *how, "--out", tmp_path / "other.ckpt")
    assert not (tmp_path / "other.ckpt").exists()


def test_mistakes(runs, tmp_path):
    out = tmp_path / "out.ckpt"
    for argv, message in (
        (["-r", runs / "nowhere", "--out", out], "no network at"),
        (["-r", last(runs, "lapt"), "--out", out], "last.ckpt not"),
        (["-r", runs / "vqgan", "--out", out, "--weights", "raw"], "no raw weights"),
        (["-r", runs / "vqgan", "--out", tmp_path], "is a folder"),
    ):
        with pytest.raises(UserError, match=message):
            run_main(export, *argv)
        assert not out.exists()
    out.write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        run_main(export, "-r", runs / "vqgan", "--out", out)
    assert out.read_text() == "mine"
    run_main(export, "-r", runs / "vqgan", "--out", out, "--overwrite")
    with pytest.raises(UserError, match="checkpoint of the original, or of something else"):
        checkpoint.save(out, {"weights": {}})
        vqgan.load_vqgan(out, RT)
