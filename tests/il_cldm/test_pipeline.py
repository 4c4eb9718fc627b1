"""The commands of the README in order, and what they leave on disk (specification, section 11.3)."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from common import nifti, runtime
from common.cli import UserError
from il_cldm import aae, dataset, ldm, upstream
from il_cldm.config import Config
from tests.il_cldm.conftest import call

MRI, PET = "data/process/whole_MRI_112", "data/process/whole_Abeta_112"
LATENTS, SYN = "data/latent_Abeta/latent_Abeta_112", "data/syn_Abeta"


def names(root, split):
    return (root / "data_info" / f"{split}.txt").read_text().split()


def config_of(root, **options):
    return Config(root=str(root), device="cpu", **options)


def tree(root):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in root.rglob("*")}


def write_random_study(root, shape, counts, seed=0):
    """Noise instead of brains where only sizes matter."""
    rng = np.random.default_rng(seed)
    rows, number = ["filename,label_id"], 0
    (root / "data_info").mkdir(parents=True)
    for split, count in counts.items():
        listed = [f"{number + i:03d}S0001.nii.gz" for i in range(count)]
        number += count
        for name in listed:
            rows.append(f"{name},{len(rows) % 4}")
            for folder in (MRI, PET):
                nifti.save(root / folder / name, rng.random(shape, dtype=np.float32), np.diag([2, 2, 2, 1.0]))
        (root / "data_info" / f"{split}.txt").write_text("\n".join(listed))
    (root / "data_info" / "data_info.csv").write_text("\n".join(rows) + "\n")


def test_readme_order_makes_every_folder_and_keeps_only_best_and_last(trained):
    run = trained / "result" / "exp_1"
    checkpoints = {str(p.relative_to(run)) for p in run.rglob("*.pt*") if p.is_file()}
    assert checkpoints == {"AAE.pth.tar", "Unet.pth.tar", "aae/checkpoints/last.pt", "ldm/checkpoints/last.pt"}
    assert not list(trained.rglob(".*.tmp"))
    for split, folder in (("train", LATENTS), ("test", LATENTS), ("test", SYN)):
        assert all((trained / folder / name).is_file() for name in names(trained, split))
    for stage, columns in (("aae", "step,epoch,lr,loss_rec,loss_adv,loss_disc"), ("ldm", "step,epoch,lr,loss")):
        lines = (run / stage / "train.csv").read_text().splitlines()
        assert lines[0] == columns and sum(line.startswith("step") for line in lines) == 1
        scores = "psnr,ssim,score" if stage == "aae" else "loss,psnr,ssim,score"
        assert (run / stage / "val.csv").read_text().splitlines()[0] == f"step,epoch,{scores}"
    assert json.loads((run / "aae" / "test.json").read_text())["n"] == 3
    assert json.loads((trained / SYN / "evaluation.json").read_text())["n"] == 3


def test_one_validation_subject_at_batch_two_gets_its_true_score(trained):
    """The original dropped it and reported 0: here the best checkpoint's score is that of the subject by hand."""
    run = trained / "result" / "exp_1"
    scores = [json.loads(x) for x in (run / "aae" / "log.jsonl").read_text().splitlines()]
    best = max(row["score"] for row in scores if row["kind"] == "val")
    with runtime.start("cpu") as rt:
        autoencoder, _ = aae.load_autoencoder(config_of(trained), rt)
        x = nifti.load(trained / PET / names(trained, "val")[0]).data
        x_hat = aae.reconstruct(autoencoder, torch.from_numpy(x)[None, None], rt)[0, 0].numpy()
    assert 10 * np.log10(1 / np.mean((x - x_hat) ** 2)) == pytest.approx(
        [row["psnr"] for row in scores if row["kind"] == "val" and row["score"] == best][0], abs=1e-3
    )


def test_outputs_lie_on_their_own_mri(trained):
    for name in names(trained, "test"):
        out, mri = nib.load(trained / SYN / name), nib.load(trained / MRI / name)
        assert out.get_data_dtype() == np.float32 and out.shape == mri.shape
        assert np.array_equal(out.affine, mri.affine)
        values = np.asanyarray(out.dataobj)
        assert values.min() >= 0 and values.max() <= 1 and values.std() > 0


def test_output_affine_is_the_subjects_own(study, tmp_path):
    """An oblique, shifted MRI: its synthetic PET carries that affine, not another subject's."""
    volume = nifti.load(study / MRI / names(study, "test")[0])
    c, s = np.cos(0.3), np.sin(0.3)
    turned = np.array([[c, -s, 0, 11], [s, c, 0, -7.5], [0, 0, 1, 3], [0, 0, 0, 1]]) @ volume.affine
    nifti.save(tmp_path / "scan.nii", volume.data, turned)
    call(study, "--gen", "--mri", tmp_path / "scan.nii", "--out", tmp_path / "out")
    out = nib.load(tmp_path / "out" / "scan.nii")
    assert np.allclose(out.affine, nib.load(tmp_path / "scan.nii").affine, atol=1e-5)
    assert nib.aff2axcodes(out.affine) == ("R", "A", "S")


def test_latents_have_their_own_grid_and_decode_to_the_same_picture(trained):
    with runtime.start("cpu") as rt:
        autoencoder, aae_hash = aae.load_autoencoder(config_of(trained), rt)
        for name in names(trained, "train") + names(trained, "test"):
            latent, pet = nifti.load(trained / LATENTS / name), nifti.load(trained / PET / name)
            assert latent.shape == tuple(s // 4 for s in pet.shape)
            assert np.allclose(latent.spacing_mm, 4 * np.array(pet.spacing_mm))
            corner = np.array([-0.5, -0.5, -0.5, 1])  # both grids begin at the same corner
            assert np.allclose(latent.affine @ corner, pet.affine @ corner, atol=1e-4)
            z = aae.load_latent(trained / LATENTS / name)[None]
            with torch.inference_mode():
                decoded = autoencoder.decode(z).clamp(0, 1)
            in_memory = aae.reconstruct(autoencoder, torch.from_numpy(pet.data)[None, None], rt)
            assert (decoded - in_memory).abs().max() <= 1e-6


def test_latent_statistics_are_those_of_the_training_list(trained):
    config = config_of(trained)
    train, record = names(trained, "train"), json.loads((trained / LATENTS / "latents.json").read_text())
    values = np.concatenate([aae.load_latent(trained / LATENTS / n).numpy().ravel() for n in train])
    assert record["mean"] == pytest.approx([values.mean()], abs=1e-6)
    assert record["std"] == pytest.approx([values.std()], rel=1e-6)
    latents, stats = ldm.load_latents(config, train, (16, 16, 16), record["aae"])
    normalised = torch.stack(list(latents.values()))
    assert abs(normalised.mean()) < 1e-5 and normalised.std(correction=0) == pytest.approx(1, abs=1e-5)
    z = torch.randn(2, 1, 4, 4, 4)
    assert torch.allclose(ldm.denormalise(ldm.normalise(z, stats), stats), z, atol=1e-6)
    config.normalise_latents = False
    raw, _ = ldm.load_latents(config, train, (16, 16, 16), record["aae"])
    assert torch.equal(raw[dataset.stem(train[0])], aae.load_latent(trained / LATENTS / train[0]))


def test_latents_of_another_training_list_or_autoencoder_are_refused(study):
    (study / "data_info" / "train.txt").write_text("\n".join(names(study, "train")[:-1]))
    with pytest.raises(UserError, match="another training list; run --enc again"):
        call(study, "--train_ldm", "--restart")
    call(study, "--train_aae", "--restart", "--aae_steps", 2)
    with pytest.raises(UserError, match="another autoencoder.*--overwrite"):
        call(study, "--enc")
    foreign = study / LATENTS / "mine.nii.gz"
    shutil.copy(study / LATENTS / names(study, "test")[0], foreign)
    call(study, "--enc", "--overwrite")
    assert foreign.exists()  # not in latents.json: not written by --enc
    assert not (study / LATENTS / names(study, "test")[0]).exists()  # of the old autoencoder
    with pytest.raises(UserError, match="trained on latents of autoencoder"):
        call(study, "--gen", "--overwrite")


def test_generation_needs_mri_and_checkpoints_only(study, trained):
    for path in (PET, "data/latent_Abeta", "data/process/regions_112", "data/cache", SYN):
        shutil.rmtree(study / path)
    for file in (study / "data_info").iterdir():
        if file.name != "test.txt":
            file.unlink()
    call(study, "--gen")
    for name in names(study, "test"):
        assert (study / SYN / name).read_bytes() == (trained / SYN / name).read_bytes()


def test_training_never_looks_at_the_test_subjects(data):
    for name in names(data, "test"):
        (data / MRI / name).unlink()
        (data / PET / name).unlink()
    call(data, "--train_aae", "--enc", "--train_ldm", "--aae_steps", 3, "--ldm_steps", 3)


def test_uneven_axes_odd_sets_and_a_batch_larger_than_the_training_set(tmp_path):
    write_random_study(tmp_path, (16, 24, 32), {"train": 3, "val": 2, "test": 1})
    steps = ("--aae_steps", 2, "--ldm_steps", 2, "--batch_size", 4)
    call(tmp_path, "--train_aae", "--test_aae", "--enc", "--train_ldm", "--gen", "--evaluate", *steps)
    name = names(tmp_path, "test")[0]
    assert nifti.load(tmp_path / LATENTS / names(tmp_path, "train")[0]).shape == (4, 6, 8)
    assert nifti.load(tmp_path / SYN / name).shape == (16, 24, 32)


def test_kl_three_channels_augmentation_and_bf16_through_all_stages(data):
    options = ("--kl_weight", 1e-3, "--latent_dim", 3, "--augment_shift", 2, "--augment_flip", "--precision", "bf16",
               "--disc_norm", "group", "--lr_schedule", "cosine", "--clip_grad", 1, "--disc_start", 3,
               "--no_aae_channels_last", "--unet_channels_last")  # fmt: skip
    call(data, "--train_aae", "--test_aae", "--enc", "--train_ldm", "--gen", "--evaluate", *options)
    rows = (data / "result/exp_1/aae/train.csv").read_text().splitlines()
    assert rows[0] == "step,epoch,lr,loss_rec,loss_adv,loss_disc,loss_kl"
    assert rows[1].split(",")[4] == "" and rows[-1].split(",")[4] != ""  # no adversary before --disc_start
    lrs = [float(row.split(",")[2]) for row in rows[1:]]
    assert lrs == sorted(lrs, reverse=True) and lrs[-1] < 0.1 * lrs[0]
    assert aae.load_latent(data / LATENTS / names(data, "train")[0]).shape == (3, 4, 4, 4)
    assert len(json.loads((data / LATENTS / "latents.json").read_text())["std"]) == 3
    out = nifti.load(data / SYN / names(data, "test")[0]).data
    assert out.shape == (16, 16, 16) and 0 <= out.min() < out.max() <= 1


def test_dry_run_touches_nothing(data, capsys):
    before = tree(data)
    call(data, "--train_aae", "--train_ldm", "--gen", "--dry_run")
    assert tree(data) == before
    text = capsys.readouterr().out
    assert "PET and MRI (2, 1, 16, 16, 16) -> latent (2, 1, 4, 4, 4)" in text
    assert "GiB per rank" in text and '"aae_channels": 4' in text


def test_each_stage_says_which_command_comes_first(data):
    for flags, message in (
        (("--enc",), "--train_aae"),
        (("--gen",), "--train_aae"),
        (("--evaluate",), "--gen"),
    ):
        with pytest.raises(UserError, match=message):
            call(data, *flags)
    call(data, "--train_aae", "--aae_steps", 1)
    with pytest.raises(UserError, match="no training latents.*--enc"):
        call(data, "--train_ldm")
    with pytest.raises(UserError, match="no denoiser.*--train_ldm"):
        call(data, "--gen")


def write_original(path, model):
    """A file as the original leaves it: weights with the prefix of DataParallel beside an optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    state = {f"module.{key}": value for key, value in upstream.to_upstream(model).items()}
    torch.save({"state_dict": state, "optimizer": optimizer.state_dict()}, path)


def test_checkpoints_of_the_original_generate(data, tmp_path):
    torch.manual_seed(3)
    autoencoder = upstream.build("AAE", {"config.latent_dim": 1}).eval()
    denoiser = upstream.build("UNet", {"inner_channel": 32, "channel_mults": [1, 2], "res_blocks": 1}).eval()
    write_original(tmp_path / "AAE.pth.tar", autoencoder)
    write_original(tmp_path / "Unet.pth.tar", denoiser)
    files = ("--checkpoint_aae", tmp_path / "AAE.pth.tar", "--checkpoint_unet", tmp_path / "Unet.pth.tar")
    call(data, "--test_aae", "--gen", *files, "--sampler", "ddpm", "--steps", 3)
    name = names(data, "test")[1]
    mri = torch.from_numpy(nifti.load(data / MRI / name).data)[None, None]
    schedule = ldm.noise_schedule(Config())
    noise = [runtime.generator(0, dataset.stem(name), 0)]
    with runtime.start("cpu") as rt, torch.inference_mode():  # no null class: sampled without a label, as there
        z = ldm.sample_latents(denoiser, schedule, denoiser.condition(mri), None, noise, sampler="ddpm", steps=3, rt=rt)
        expected = autoencoder.decode(z)[0, 0].clamp(0, 1).numpy()
    # The program keeps the autoencoder in channels_last_3d, which adds in another order.
    assert np.abs(nifti.load(data / SYN / name).data - expected).max() < 1e-5
    with pytest.raises(UserError, match="holds a UNet, not an autoencoder"):
        call(data, "--test_aae", "--checkpoint_aae", tmp_path / "Unet.pth.tar")
