"""save_synth.py: exactly n distinct volumes per class, the same bytes whatever batch, rank or interruption."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from common import checkpoint, nifti, runtime
from common.cli import UserError
from neuroldm3d import dataset, upstream
from neuroldm3d.diffusion import sampling, save_synth
from neuroldm3d.diffusion.model import SIZES, DiT3D
from neuroldm3d.preprocess import Preparation
from neuroldm3d.VAE import latents
from neuroldm3d.VAE.model import AutoencoderKL
from tests.helpers import kill_and_resume, run_main, run_script, two_ranks
from tests.neuroldm3d.stages import COMMON, best, encode, train_dit, trained

STEPS = ("--steps", 4)
SCRIPTS = ("VAE/train", "VAE/infer", "VAE/save_latent", "VAE/generate_synthetic_samples", "diffusion/train",
           "diffusion/save_synth")  # fmt: skip


@pytest.fixture(scope="session")
def done(cohort):
    return trained(cohort)


def synth(root, out, *args):
    run_main(save_synth, "--root", root, "--out", out, *COMMON, *STEPS, *args)
    return contents(out)


def contents(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.suffix in (".gz", ".npz")}


def record_of(out):
    """synthetic.json but for the code version, which another commit beside a running test would change."""
    record = json.loads((out / "synthetic.json").read_text())
    return {key: value for key, value in record.items() if key != "git_revision"}


def test_exactly_n_distinct_volumes_with_the_labels_asked_for(done, tmp_path):
    """Fact 26: n = 10 with batch 4."""
    files = synth(done, tmp_path, "--n_per_class", 10, "--gen_batch", 4)
    expected = [f"{c}/{c}_{k:05d}.nii.gz" for c in ("HC", "TLE") for k in range(10)]
    assert sorted(files) == expected and len(set(files.values())) == 20
    assert record_of(tmp_path)["files"] == {name: int(name.startswith("TLE")) for name in expected}
    rows = dataset.synthetic_rows(tmp_path)
    assert [row.label for row in rows] == [0] * 10 + [1] * 10


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_same_seed_same_bytes_whatever_batch_and_number(done, tmp_path, sampler):
    """Fact 26: also for samplers that draw noise on the way; a larger n adds to what is there."""
    options = ("--sampler", sampler, "--eta", 1.0, "--guidance", 1.5)
    three = synth(done, tmp_path / "a", *options, "--n_per_class", 3, "--gen_batch", 3)
    assert synth(done, tmp_path / "b", *options, "--n_per_class", 1, 3, "--gen_batch", 1).items() <= three.items()
    assert synth(done, tmp_path / "b", *options, "--n_per_class", 3) == three
    other = synth(done, tmp_path / "c", *options, "--n_per_class", 1, 0, "--seed", 1)
    assert list(other) == ["HC/HC_00000.nii.gz"] and other["HC/HC_00000.nii.gz"] != three["HC/HC_00000.nii.gz"]


def test_batches_are_single_on_the_cpu(done, tmp_path, monkeypatch):
    """Batched convolutions round differently on a CPU; --gen_batch is for GPUs."""
    sizes, original = [], sampling.sample_latents

    def spy(dit, label, generators, *args, **settings):
        sizes.append(len(generators))
        return original(dit, label, generators, *args, **settings)

    monkeypatch.setattr(sampling, "sample_latents", spy)
    synth(done, tmp_path, "--n_per_class", 2, "--gen_batch", 2)
    assert sizes == [1] * 4


def test_volumes_lie_on_the_training_grid_in_native_units(done, tmp_path):
    synth(done, tmp_path, "--n_per_class", 0, 2, "--no_clip")
    with runtime.start("cpu") as rt:
        vae, dit = latents.load_vae(best(done, "vae"), rt), sampling.load_dit(best(done, "dit"), rt)
        expected = dict(sampling.synthesize(dit, vae, 1, [0, 1], 0, rt, sampler="dpm", steps=4))
    volumes = dataset.Volumes(vae.preparation, None)
    real = dataset.read_table(done / "data_csvs" / "train.csv")[0]
    for row, x in zip(dataset.synthetic_rows(tmp_path), expected.values(), strict=True):
        assert np.allclose(volumes.load(row), x, atol=1e-5)  # read back in normalised units
        assert np.allclose(volumes.affine(row), volumes.affine(real), atol=1e-4)
        stored = nifti.reorient(nifti.load(row.file).data, nifti.load(row.file).affine, "LAS")[0]
        assert np.allclose(stored, 0.25 * x.numpy(), atol=1e-6)  # grey-matter fraction
    record = record_of(tmp_path)
    assert record["units"] == "GM fraction" and record["preparation"] == vae.preparation.to_dict()
    assert record["vae"] == vae.hash and record["dit"] == dit.hash and record["classes"] == ["HC", "TLE"]
    assert record["training"] == {"label_counts": {"HC": 5, "TLE": 7},
                                  "csv_hash": checkpoint.file_hash(done / "data_csvs" / "train.csv")}  # fmt: skip
    clipped = synth(done, tmp_path / "clipped", "--n_per_class", 0, 1)
    assert len(clipped) == 1
    data = nifti.load(tmp_path / "clipped/TLE/TLE_00000.nii.gz").data
    assert data.min() == 0 and np.allclose(data, np.maximum(nifti.load(tmp_path / "TLE/TLE_00000.nii.gz").data, 0))


def test_classes_differ(done, tmp_path):
    synth(done, tmp_path, "--n_per_class", 1, "--guidance", 3)
    hc, tle = (nifti.load(tmp_path / f"{c}/{c}_00000.nii.gz").data for c in ("HC", "TLE"))
    assert np.abs(hc - tle).max() > 1e-3


def test_finished_volumes_are_kept_and_lost_ones_come_back(done, tmp_path):
    """Fact 26: existing files are not touched."""
    before = synth(done, tmp_path, "--n_per_class", 2)
    (tmp_path / "TLE/TLE_00001.nii.gz").unlink()
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.nii.gz")}
    assert synth(done, tmp_path, "--n_per_class", 2) == before
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())


@pytest.mark.slow
def test_killed_and_on_two_ranks(done, tmp_path):
    """Fact 26: SIGKILL while sampling, the same command again; and two ranks: the same bytes."""
    expected = synth(done, tmp_path / "reference", "--n_per_class", 4, "--sampler", "ddpm", "--steps", 60)
    command = ["neuroldm3d/diffusion/save_synth.py", "--root", done, *COMMON, "--n_per_class", 4, "--sampler", "ddpm",
               "--steps", 60, "--out"]  # fmt: skip
    killed = tmp_path / "killed"
    environment = {"OMP_NUM_THREADS": "1"}
    ended = kill_and_resume([*command, killed], lambda kill: len(list(killed.rglob("*.nii.gz"))) > 2 * kill, kills=2,
                            max_delay_s=0.1, env=environment)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert contents(killed) == expected and record_of(killed) == record_of(tmp_path / "reference")
    ended = two_ranks([*command, tmp_path / "ranks"])
    assert ended.returncode == 0, ended.stderr
    assert contents(tmp_path / "ranks") == expected


def test_other_settings_are_refused_and_overwrite_deletes_only_its_own(done, tmp_path):
    before = synth(done, tmp_path, "--n_per_class", 2, "--npz")
    (tmp_path / "HC" / "notes.nii.gz").write_bytes(b"mine")
    for options, what in ((("--seed", 1), "seed 0 -> 1"), (("--guidance", 2), "guidance 1.0 -> 2.0"),
                          (("--weights", "raw"), "weights ema -> raw")):  # fmt: skip
        with pytest.raises(UserError, match=f"other settings .*{what}.*; name another --out or add --overwrite"):
            synth(done, tmp_path, "--n_per_class", 2, *options)
    assert contents(tmp_path) == before | {"HC/notes.nii.gz": b"mine"}
    now = synth(done, tmp_path, "--n_per_class", 1, 0, "--seed", 1, "--overwrite")
    assert set(now) == {"HC/HC_00000.nii.gz", "HC/notes.nii.gz"} and now["HC/notes.nii.gz"] == b"mine"
    assert now["HC/HC_00000.nii.gz"] != before["HC/HC_00000.nii.gz"]


def test_fewer_volumes_than_there_are_is_no_silent_loss(done, tmp_path):
    before = synth(done, tmp_path, "--n_per_class", 2)
    with pytest.raises(UserError, match="holds 4 volumes of these settings, more than the 3 asked for"):
        synth(done, tmp_path, "--n_per_class", 1, 2)
    assert contents(tmp_path) == before


def test_files_of_somebody_else_are_never_replaced(done, tmp_path):
    path = tmp_path / "HC" / "HC_00001.nii.gz"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    for more in ((), ("--overwrite",)):
        with pytest.raises(UserError, match="HC_00001.nii.gz was not written by this script; name another --out"):
            synth(done, tmp_path, "--n_per_class", 2, *more)
    assert contents(tmp_path) == {"HC/HC_00001.nii.gz": b"mine"} and not (tmp_path / "synthetic.json").exists()


def test_arrays_beside_the_volumes(done, tmp_path):
    synth(done, tmp_path, "--n_per_class", 1)
    files = synth(done, tmp_path, "--n_per_class", 1, "--npz")  # adds them to finished volumes
    assert sorted(files) == ["HC/HC_00000.nii.gz", "HC/HC_00000.npz", "TLE/TLE_00000.nii.gz", "TLE/TLE_00000.npz"]
    with np.load(tmp_path / "TLE/TLE_00000.npz", allow_pickle=False) as arrays:
        stored = nifti.load(tmp_path / "TLE/TLE_00000.nii.gz")
        assert np.array_equal(arrays["image"], nifti.reorient(stored.data, stored.affine, "LAS")[0])
        assert arrays["label"] == 1 and arrays["image"].dtype == np.float32


def test_upstream_preset_is_ancestral_sampling_of_the_raw_weights(done, tmp_path):
    run_main(save_synth, "--root", done, "--out", tmp_path, *COMMON, "--preset", "upstream", "--n_per_class", 1, 0)
    record = record_of(tmp_path)
    assert (record["sampler"], record["steps"], record["weights"], record["clip"]) == ("ddpm", 0, "raw", False)
    with runtime.start("cpu") as rt:
        vae, dit = latents.load_vae(best(done, "vae"), rt), sampling.load_dit(best(done, "dit"), rt, weights="raw")
        ((_, x),) = sampling.synthesize(dit, vae, 0, [0], 0, rt, sampler="ddpm", steps=dit.schedule.T)
    row = dataset.synthetic_rows(tmp_path)[0]
    assert np.allclose(dataset.Volumes(vae.preparation, None).load(row), x, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--n_per_class", 0), "--n_per_class 0 0: give one number for both classes"),
        (("--n_per_class", 1, 2, 3), "--n_per_class 1 2 3: give one number"),
        (("--n_per_class", 1, "--gen_batch", 0), "--gen_batch at least 1"),
        (("--n_per_class", 1, "--steps", 101), "101 sampling steps: choose 1 to 100"),
        (("--n_per_class", 1, "--vae", "nowhere.pth"), "no vae at nowhere.pth"),
    ],
)
def test_bad_requests_write_nothing(done, tmp_path, options, message, capsys):
    with pytest.raises((SystemExit, UserError)) as error:
        synth(done, tmp_path / "out", *options)
    assert message in (str(error.value) if error.type is UserError else capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_vae_and_dit_of_different_trainings_are_refused(done, tmp_path):
    root = shutil.copytree(done, tmp_path / "study")
    state = torch.load(best(root, "vae"), weights_only=True)
    state["state_dict"]["mean.bias"] += 1
    torch.save(state, best(root, "vae"))
    with pytest.raises(UserError, match="the DiT was trained on latents of VAE .*give the matching pair"):
        synth(root, tmp_path / "out", "--n_per_class", 1)


def test_voxel_mean_survives_the_way_to_the_volumes(done, tmp_path):
    root = shutil.copytree(done, tmp_path / "study")
    shutil.rmtree(root / "runs" / "dit")
    encode(root)
    train_dit(root, "--latent_mean", "voxel", "--max_steps", 1)
    synth(root, tmp_path / "out", "--n_per_class", 1, 0)
    x = nifti.load(tmp_path / "out/HC/HC_00000.nii.gz").data
    assert np.isfinite(x).all() and x.max() > 0


def test_nothing_pickled_and_no_absolute_path(done, tmp_path):
    """Facts 38 and 39: NIfTI, npz and JSON only; the record names no folder of this machine."""
    synth(done, tmp_path / "out", "--n_per_class", 1, "--npz")
    assert {p.suffix for p in (tmp_path / "out").rglob("*") if p.is_file()} == {".gz", ".npz", ".json"}
    text = (tmp_path / "out" / "synthetic.json").read_text()
    assert str(done.parent) not in text and str(tmp_path) not in text


# ---- the original's files

SHAPE = (112, 136, 112)


def pickled(path, label, image=None):
    """A volume as the original pickles it; z-scores that differ by file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if image is None:
        image = np.random.default_rng(len(path.stem) + label).standard_normal(SHAPE, dtype=np.float32)
    path.write_bytes(pickle.dumps({"image": image, "label": label}))
    return image


def import_pickles(out, *args):
    run_main(save_synth, "--out", out, *COMMON, *args)


def test_pickled_volumes_of_the_original_become_ordinary_ones(tmp_path):
    """Fact 38: z-scores on the published grid, read back as they were; kept when the command is repeated."""
    images = {f"HC/{n}_0": pickled(tmp_path / f"hc/{n}_0.pkl", 0) for n in (0, 10)}
    images |= {"TLE/3_1": pickled(tmp_path / "tle/3_1.pkl", 1)}
    args = ("--pickles", tmp_path / "hc", tmp_path / "tle", "--trust_pickle")
    import_pickles(tmp_path / "out", *args)
    prep = Preparation(norm="zscore")
    volumes, rows = dataset.Volumes(prep, None), dataset.synthetic_rows(tmp_path / "out")
    assert [(row.name, row.label) for row in rows] == [("0_0", 0), ("10_0", 0), ("3_1", 1)]
    for row in rows:
        assert np.array_equal(volumes.load(row), images[f"{row.file.parent.name}/{row.name}"])
        assert np.allclose(volumes.affine(row)[:3, 3], (83.9933, -118.5, -71.9933), atol=1e-4)
    stamps = {row.file: row.file.stat().st_mtime_ns for row in rows}
    rows[1].file.unlink()
    import_pickles(tmp_path / "out", *args)
    assert rows[1].file.is_file() and stamps[rows[0].file] == rows[0].file.stat().st_mtime_ns


def test_pickled_volumes_that_are_refused(tmp_path, capsys):
    pickled(tmp_path / "a/0_0.pkl", 0)
    with pytest.raises(SystemExit):
        import_pickles(tmp_path / "out", "--pickles", tmp_path / "a")
    assert "add --trust_pickle" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    pickled(tmp_path / "names/first.pkl", 0)
    for folders, words in ((("none",), r"no \*.pkl in"), (("a", "b"), "has the name of"), (("names",), "not named")):
        with pytest.raises(UserError, match=words):
            import_pickles(tmp_path / "out", "--pickles", *(tmp_path / f for f in folders), "--trust_pickle")
        assert not (tmp_path / "out").exists()
    bad = {"label": ((1, None), "label 1"), "shape": ((0, np.zeros((8, 8, 8))), "shape .8, 8, 8."),
           "nan": ((0, np.full(SHAPE, np.nan)), "NaN"), "text": ((0, "image"), "no numbers")}  # fmt: skip
    for name, (content, words) in bad.items():
        pickled(tmp_path / name / "0_0.pkl", *content)
        with pytest.raises(UserError, match=f"0_0.pkl.*{words}"):
            import_pickles(tmp_path / f"out_{name}", "--pickles", tmp_path / name, "--trust_pickle")
        assert not list((tmp_path / f"out_{name}").rglob("*.nii.gz"))


def test_the_originals_networks_alone_give_volumes_on_the_published_grid(tmp_path, monkeypatch):
    """No latents, no tables: only the two checkpoints (here with a DiT of one block)."""
    vae = AutoencoderKL(channels=(16, 16, 16), num_res_blocks=(1, 1, 1), latent_channels=4, norm_groups=16)
    torch.save({"epoch": 1, "vae_state_dict": upstream.to_upstream(vae), "val_loss": 0.1}, tmp_path / "best_vae.pth")
    dit = DiT3D(**SIZES["DiT-S/4"] | dict(in_size=(28, 34, 28), depth=1, in_channels=4, mlp_ratio=4.0, num_classes=2,
                label_dropout=0.1, window_size=0, window_blocks=(), positions="sincos"))  # fmt: skip
    state = {f"model.{key}": value for key, value in upstream.to_upstream(dit).items()}
    torch.save({"epoch": 9999, "model_state": state}, tmp_path / "epoch_9999.pth")
    files = ("--vae", tmp_path / "best_vae.pth", "--dit", tmp_path / "epoch_9999.pth", "--weights", "raw")
    run_main(save_synth, "--root", tmp_path, *COMMON, *files, "--n_per_class", 1, 0, "--steps", 1)
    record = json.loads((tmp_path / "synthetic_data/synthetic.json").read_text())
    assert record["units"] == "z-score"
    assert np.allclose(np.diag(record["affine"])[:3], (-1.51339, 1.5, 1.51339), atol=1e-4)
    (row,) = dataset.synthetic_rows(tmp_path / "synthetic_data")
    assert dataset.Volumes(Preparation(norm="zscore"), None).load(row).shape == SHAPE


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_torch_and_no_data(script, tmp_path):
    """Fact 37: --help from any folder, with a torch that cannot be imported, no GPU, no network, no data."""
    (tmp_path / "torch.py").write_text("raise ImportError('help must not import torch')\n")
    ended = run_script([f"neuroldm3d/{script}.py", "--help"], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert ended.returncode == 0, ended.stderr
    assert "default:" in ended.stdout and len(ended.stdout.splitlines()) > 20
