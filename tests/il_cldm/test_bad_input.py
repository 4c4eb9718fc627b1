"""What a user can get wrong ends in one `error:` line, status 2, before any training step, and changes no file."""

import errno
import os
import pickle
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch

from common import checkpoint, nifti
from tests.helpers import ROOT, run_script
from tests.il_cldm.tools import AFFINE, TINY, captured, complaint, files, volume, write_study

MRI, PET = "data/process/whole_MRI_112", "data/process/whole_Abeta_112"
TRAIN = ("--train_aae", "--aae_steps", 2, "--enc", "--train_ldm", "--ldm_steps", 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A study with both stages trained for two steps."""
    root = write_study(tmp_path_factory.mktemp("trained"))
    done = captured("--root", root, *TINY, *TRAIN)
    assert done.status == 0, done.err
    return root


@pytest.fixture
def study(trained, tmp_path):
    """A copy to spoil: data, checkpoints and latents."""
    root = tmp_path / "study"
    shutil.copytree(trained, root, ignore=shutil.ignore_patterns("cache"))
    return root


@pytest.fixture
def fresh(study):
    """The same without anything trained."""
    shutil.rmtree(study / "result")
    shutil.rmtree(study / "data/latent_Abeta")
    return study


def save(path, data):
    nifti.save(path, data, AFFINE)


def spoil_voxel(path, value):
    data = np.asarray(nib.load(path).dataobj).copy()
    data[8, 8, 8] = value
    nib.save(nib.Nifti1Image(data, AFFINE), path)


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


NAME = "100S0002.nii.gz"
STAGE1 = {  # what is done to the study, and words that the message holds beside the subject
    "missing PET": (lambda s: (s / PET / NAME).unlink(), ("100S0002", "no volume")),
    "wrong shape": (lambda s: save(s / PET / NAME, volume((16, 20, 16), 2)), ("100S0002", "shape")),
    "all of a shape not divisible by 4": (
        lambda s: [save(p, volume((16, 18, 16), 2)) for p in (s / PET).iterdir()], ("100S000", "multiple of 4")),
    "values above 1": (lambda s: save(s / PET / NAME, 3 * volume((16, 16, 16), 2)), ("100S0002", "[0, 1]")),
    "values below 0": (lambda s: save(s / PET / NAME, volume((16, 16, 16), 2) - 0.5), ("100S0002", "[0, 1]")),
    "constant": (lambda s: save(s / PET / NAME, np.zeros((16, 16, 16))), ("100S0002",)),
    "NaN voxel": (lambda s: spoil_voxel(s / PET / NAME, np.nan), (NAME, "NaN")),
    "Inf voxel": (lambda s: spoil_voxel(s / PET / NAME, np.inf), (NAME, "Inf")),
    "truncated": (lambda s: cut(s / PET / NAME), (NAME, "truncated")),
    "empty file": (lambda s: (s / PET / NAME).write_bytes(b""), (NAME,)),
    "not gzip": (lambda s: (s / PET / NAME).write_text("no volume"), (NAME,)),
    "two dimensions": (lambda s: nib.save(nib.Nifti1Image(np.zeros((16, 16), "f4"), AFFINE), s / PET / NAME), (NAME,)),
    "validation volume": (lambda s: spoil_voxel(s / PET / "100S0004.nii.gz", np.nan), ("100S0004", "NaN")),
    "no list": (lambda s: (s / "data_info/train.txt").unlink(), ("train.txt", "make_phantom.py")),
    "empty list": (lambda s: (s / "data_info/train.txt").write_text("\n"), ("train.txt", "empty")),
    "empty validation list": (lambda s: (s / "data_info/val.txt").write_text(""), ("val.txt", "empty")),
    "listed twice": (lambda s: edit(s / "data_info/train.txt", "100S0001.nii.gz", "100S0002"), ("100S0002", "twice")),
    "in two lists": (
        lambda s: edit(s / "data_info/test.txt", "100S0005", "100S0001"), ("100S0001", "train", "test")),
    "two scans of one person": (
        lambda s: edit(s / "data_info/test.txt", "100S0005", "100S0001_m24"), ("100S0001", "train", "test")),
    "two sessions of one person": (
        lambda s: [(s / f"data_info/{n}.txt").write_text(f"sub-07_ses-{n}.nii.gz\n") for n in ("train", "val")],
        ("sub-07", "train", "validation")),
}  # fmt: skip


def refused(study, spoil, words, train, steps):
    """Training and --check of a spoilt study end in one line with these words and change no file."""
    spoil(study)
    before = files(study)
    for stage in (train, "--check"):
        line = complaint(captured("--root", study, *TINY, stage, steps, 2))
        assert all(word in line for word in words), line
        assert files(study) == before


@pytest.mark.parametrize("case", STAGE1)
def test_stage_1(fresh, case):
    refused(fresh, *STAGE1[case], "--train_aae", "--aae_steps")


STAGE2 = {
    "missing MRI": (lambda s: (s / MRI / NAME).unlink(), ("100S0002", "no volume")),
    "NaN in the MRI": (lambda s: spoil_voxel(s / MRI / NAME, np.nan), (NAME, "NaN")),
    "MRI out of range": (lambda s: save(s / MRI / NAME, 500 * volume((16, 16, 16), 2)), ("100S0002", "[0, 1]")),
    "MRI of another shape": (lambda s: save(s / MRI / NAME, volume((20, 16, 16), 2)), ("100S0002", "shape")),
    "no table": (lambda s: (s / "data_info/data_info.csv").unlink(), ("data_info.csv", "filename,label_id")),
    "empty table": (lambda s: (s / "data_info/data_info.csv").write_text(""), ("data_info.csv",)),
    "other columns": (lambda s: edit(s / "data_info/data_info.csv", "label_id", "age"), ("data_info.csv", "label_id")),
    "missing label": (lambda s: edit(s / "data_info/data_info.csv", f"{NAME},2\n", ""), ("100S0002",)),
    "duplicate label": (
        lambda s: edit(s / "data_info/data_info.csv", f"{NAME},2", f"{NAME},2\n100S0002,1"), ("100S0002", "two rows")),
    "label out of range": (
        lambda s: edit(s / "data_info/data_info.csv", f"{NAME},2", f"{NAME},4"), ("100S0002", "'4'")),
    "negative label": (lambda s: edit(s / "data_info/data_info.csv", f"{NAME},2", f"{NAME},-1"), ("100S0002", "'-1'")),
    "label no number": (lambda s: edit(s / "data_info/data_info.csv", f"{NAME},2", f"{NAME},MCI"), ("100S0002", "MCI")),
    "label no integer": (
        lambda s: edit(s / "data_info/data_info.csv", f"{NAME},2", f"{NAME},1.5"), ("100S0002", "1.5")),
    "label left out": (lambda s: edit(s / "data_info/data_info.csv", f"{NAME},2", f"{NAME},"), ("100S0002",)),
}  # fmt: skip


@pytest.mark.parametrize("case", STAGE2)
def test_stage_2(study, case):
    shutil.rmtree(study / "result/exp_1/ldm")
    (study / "result/exp_1/Unet.pth.tar").unlink()
    refused(study, *STAGE2[case], "--train_ldm", "--ldm_steps")


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("was_executed",))


def other_model(path):
    """The same kind of file with a weight of another shape."""
    saved = torch.load(path, weights_only=True)
    name = next(n for n, v in saved["state_dict"].items() if v.ndim > 2)
    saved["state_dict"][name] = saved["state_dict"][name][:1, :1]
    torch.save(saved, path)


AAE, UNET = "result/exp_1/AAE.pth.tar", "result/exp_1/Unet.pth.tar"
CHECKPOINTS = {
    "no autoencoder": (lambda s: (s / AAE).unlink(), ("AAE.pth.tar", "--train_aae")),
    "no denoiser": (lambda s: (s / UNET).unlink(), ("Unet.pth.tar", "--train_ldm")),
    "truncated autoencoder": (lambda s: cut(s / AAE), ("AAE.pth.tar", "truncated")),
    "truncated denoiser": (lambda s: cut(s / UNET, 0.9), ("Unet.pth.tar", "truncated")),
    "empty": (lambda s: (s / UNET).write_bytes(b""), ("Unet.pth.tar",)),
    "swapped": (lambda s: shutil.copy(s / AAE, s / UNET), ("Unet.pth.tar",)),
    "swapped the other way": (lambda s: shutil.copy(s / UNET, s / AAE), ("AAE.pth.tar",)),
    "other widths": (lambda s: other_model(s / UNET), ("Unet.pth.tar",)),
    "other autoencoder widths": (lambda s: other_model(s / AAE), ("AAE.pth.tar",)),
    "of something else": (lambda s: torch.save({"weight": torch.zeros(3)}, s / UNET), ("Unet.pth.tar",)),
    "a list": (lambda s: torch.save([1, 2], s / UNET), ("Unet.pth.tar",)),
    "pickled": (lambda s: torch.save({"state_dict": Malicious()}, s / UNET), ("Unet.pth.tar", "--trust_pickle")),
    "plain pickle": (lambda s: (s / UNET).write_bytes(pickle.dumps(Malicious())), ("Unet.pth.tar",)),
    "not of this autoencoder": (
        lambda s: checkpoint.save(s / UNET, checkpoint.load(s / UNET) | {"aae": "0" * 16}), ("Unet.pth.tar", "0000")),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(study, case, monkeypatch):
    monkeypatch.chdir(study)
    spoil, words = CHECKPOINTS[case]
    spoil(study)
    before = files(study)
    line = complaint(captured("--root", study, *TINY, "--gen"))
    assert all(word in line for word in words), line
    assert files(study) == before and not (study / "was_executed").exists()


@pytest.mark.parametrize("stage", ["aae", "ldm"])
@pytest.mark.parametrize("damage", ["truncated", "pickled"])
def test_a_damaged_last_checkpoint_is_not_trained_over(study, stage, damage):
    last = study / "result/exp_1" / stage / "checkpoints/last.pt"
    cut(last) if damage == "truncated" else last.write_bytes(pickle.dumps(Malicious()))
    before = files(study)
    assert "last.pt" in complaint(captured("--root", study, *TINY, f"--train_{stage}", f"--{stage}_steps", 4))
    assert files(study) == before


GENERATION = {
    "NaN voxel": (lambda s: spoil_voxel(s / MRI / "100S0005.nii.gz", np.nan), (), ("100S0005", "NaN")),
    "truncated": (lambda s: cut(s / MRI / "100S0005.nii.gz"), (), ("100S0005", "truncated")),
    "raw intensities": (
        lambda s: save(s / MRI / "100S0005.nii.gz", 900 * volume((16, 16, 16), 1)), (), ("100S0005", "[0, 1]")),
    "odd shape": (
        lambda s: save(s / MRI / "100S0005.nii.gz", volume((16, 17, 16), 1)), (), ("100S0005", "multiple of 4")),
    "no such file": (None, ("--mri", "nowhere.nii.gz"), ("nowhere.nii.gz",)),
    "class": (None, ("--label", "4"), ("--label", "3")),
    "word": (None, ("--label", "AD"), ("--label", "csv")),
    "samples": (None, ("--samples", 0), ("--samples",)),
    "steps": (None, ("--steps", -1), ("--steps",)),
    "over its input": (None, ("--mri", MRI, "--out", MRI), (MRI, "another --out")),
}  # fmt: skip


@pytest.mark.parametrize("case", GENERATION)
def test_generation(study, case, monkeypatch):
    monkeypatch.chdir(study)
    spoil, options, words = GENERATION[case]
    if spoil:
        spoil(study)
    before = files(study)
    line = complaint(captured("--root", study, *TINY, "--gen", *options))
    assert all(word in line for word in words), line
    after = files(study)
    assert {k: v for k, v in after.items() if k in before} == before
    assert not any(k.endswith((".nii.gz", ".tmp")) for k in set(after) - set(before))


def test_evaluation_needs_synthetic_pet_and_latents_need_their_autoencoder(study):
    assert "--gen" in complaint(captured("--root", study, *TINY, "--evaluate"))
    shutil.rmtree(study / "data/latent_Abeta")
    args = ("--root", study, *TINY, "--train_ldm", "--ldm_steps", 4)
    assert "--enc" in complaint(captured(*args))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--train_aea"], "did you mean --train_aae"),
        (["--train_aae", "--batch_size", "two"], "--batch_size: expected int, got 'two'"),
        (["--gen", "--sampler", "dpmm"], "--sampler: 'dpmm' is not one of ddpm, ddim, dpm"),
        (["--gen", "--sampler"], "--sampler"),
        (["--train_aae", "--preset", "large"], "--preset: 'large'"),
        (["--train_aae", "--set", "no_such=1"], "unknown option no_such"),
        (["--train_aae", "--config", "nowhere.json"], "nowhere.json"),
        (["--train_aae", "--batch_size", "0"], "batch_size"),
        (["--train_aae", "--device", "gpu"], "gpu"),
        (["--prepare"], "--raw_mri"),
        ([], "nothing to do"),
    ],
)
def test_command_line(tmp_path, args, words):
    root = write_study(tmp_path / "s")
    before = files(tmp_path)
    assert words in complaint(captured("--root", root, *args))
    assert files(tmp_path) == before


# ---- as real processes


def test_no_data_at_all_says_which_command_makes_some(tmp_path):
    done = run_script(["il_cldm/main.py", "--train_aae", "--root", tmp_path / "nothing"], cwd=tmp_path)
    line = complaint(done)
    assert "python il_cldm/make_phantom.py" in line and "train.txt" in line and not (tmp_path / "nothing").exists()


def test_relative_paths_from_another_directory(fresh):
    (fresh / PET / NAME).unlink()
    before = files(fresh)
    done = run_script(["il_cldm/main.py", "--root", fresh.name, "--train_aae"], cwd=fresh.parent)
    assert "100S0002" in complaint(done) and files(fresh) == before


def test_damaged_pet_and_unknown_flag_as_a_user_sees_them(fresh):
    cut(fresh / PET / NAME)
    before = files(fresh)
    assert NAME in complaint(run_script(["il_cldm/main.py", "--root", fresh, *TINY, "--train_aae"]))
    assert "--traim_aae" in complaint(run_script(["il_cldm/main.py", "--traim_aae"], cwd=fresh))
    assert files(fresh) == before


# ---- places that cannot be written


def test_a_file_where_a_folder_should_be(fresh):
    (fresh / "result").write_text("a file")
    assert "result" in complaint(captured("--root", fresh, *TINY, "--train_aae", "--aae_steps", 2))
    assert (fresh / "result").read_text() == "a file"


@pytest.mark.parametrize("stage", ["--train_aae", "--enc", "--gen", "--prepare"])
def test_an_unwritable_folder(study, stage):
    """The system's refusal is imitated, since the tests may run as root, whom folder permissions do not stop."""
    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    shutil.rmtree(study / "result/exp_1/aae")
    shutil.rmtree(study / "data/latent_Abeta")
    shutil.copytree(study / MRI, study / "raw")
    before = files(study)
    options = ("--raw_mri", study / "raw", "--shape", 16, 16, 16, "--spacing_mm", 8, "--whole_MRI", study / "new",
               "--restart", "--aae_steps", 2)  # fmt: skip
    captured("--root", study, *TINY, "--check")  # fills the cache
    with mock.patch("os.replace", refuse):
        line = complaint(captured("--root", study, *TINY, stage, *(options if stage == "--prepare" else options[-3:])))
    assert "ermission denied" in line
    if stage != "--train_aae":
        assert files(study) == before
    assert not any(".tmp" in name for name in files(study))


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int):
    free = shutil.disk_usage(folder).free
    (folder / "ballast").write_bytes(bytes(max(free - leave, 0)))


@pytest.mark.parametrize("leave", [0, 40_000, 150_000])
@pytest.mark.parametrize("stage", ["--train_aae", "--gen"])
def test_a_full_disk_leaves_nothing_half_written(study, small_disk, stage, leave):
    (small_disk / "old").mkdir()
    fill(small_disk, leave)
    place = {"--train_aae": ("--result", small_disk / "old"), "--gen": ("--out", small_disk / "old")}[stage]
    extra = ("--aae_channels", 16) if stage == "--train_aae" else ()
    ended = captured("--root", study, *TINY, stage, "--aae_steps", 2, "--cache", "none", *place, *extra)
    if ended.status == 0:  # what is left was enough
        assert stage == "--gen" and leave > 0
    else:
        assert "disk full" in complaint(ended)
    for path in small_disk.rglob("*"):
        assert not path.name.endswith(".tmp"), path
        if path.name.endswith(".nii.gz"):
            nifti.load(path)
        if path.suffix in (".tar", ".pt"):
            checkpoint.load(path)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux to tell which file is written")
def test_a_full_disk_keeps_the_checkpoint_that_was_there(study, monkeypatch):
    last = study / "result/exp_1/aae/checkpoints/last.pt"
    before = last.read_bytes()
    real = os.fsync

    def full(number):
        if "last.pt" in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", full)
    line = complaint(captured("--root", study, *TINY, "--train_aae", "--aae_steps", 4))
    assert "disk full" in line and "last.pt" in line
    assert last.read_bytes() == before and not list(last.parent.glob(".*tmp"))


def test_main_is_where_these_tests_think():
    assert (ROOT / "il_cldm/main.py").is_file()
