"""Latents on disk: written once per VAE, whole-set statistics, drawn anew each epoch; and what the VAE is used for."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from common import checkpoint, nifti, runtime
from common.cli import UserError
from common.lpips import LPIPS
from neuroldm3d import dataset, preprocess
from neuroldm3d.classifier import train as classifier_train
from neuroldm3d.diffusion import per_slice_fid
from neuroldm3d.VAE import evaluation, generate_synthetic_samples, infer, latents
from neuroldm3d.VAE.losses import LPIPS3D
from tests.helpers import run_main
from tests.neuroldm3d.stages import COMMON, best, encode, train_vae, trained


@pytest.fixture(scope="session")
def done(cohort):
    return trained(cohort)


@pytest.fixture
def copy(done, tmp_path):
    return shutil.copytree(done, tmp_path / "study")


def record_of(root):
    """latents.json but for the code version, which another commit beside a running test would change."""
    record = json.loads((root / "latent_data" / "latents.json").read_text())
    return {key: value for key, value in record.items() if key != "git_revision"}


def files(root):
    folder = root / "latent_data"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.npz")}


def load_vae(root):
    with runtime.start("cpu") as rt:
        return latents.load_vae(best(root, "vae"), rt), rt


def test_both_splits_in_one_command_without_the_decoder(copy, monkeypatch):
    """Fact 17: train and val at once, the decoder is never called, what is read back is what was encoded."""
    shutil.rmtree(copy / "latent_data")
    calls, load = {"encoder": 0, "decoder": 0}, latents.load_vae

    def counting(*args, **kwargs):
        vae = load(*args, **kwargs)
        for name in calls:
            vae.model.get_submodule(name).register_forward_hook(
                lambda *_, name=name: calls.update({name: calls[name] + 1})
            )
        return vae

    monkeypatch.setattr(latents, "load_vae", counting)
    encode(copy)
    assert calls == {"encoder": 18, "decoder": 0}
    monkeypatch.undo()
    vae, rt = load_vae(copy)
    volumes = dataset.Volumes(vae.preparation, None)
    for split in ("train", "val"):
        for row in dataset.read_table(copy / "data_csvs" / f"{split}.csv"):
            mu, logvar = latents.encode(vae.model, volumes.tensor(row)[None], rt)
            found = latents.read_latent(latents.latent_path(copy / "latent_data", split, row.name))
            assert torch.equal(found[0], mu[0]) and torch.equal(found[1], logvar[0]) and found[2] == row.label
            assert found[0].dtype == torch.float32 and found[0].shape == (2, 4, 5, 4)


def test_record_names_vae_table_labels_and_grid(done):
    record, vae = record_of(done), load_vae(done)[0]
    assert record["vae"] == vae.hash and record["preparation"] == vae.preparation.to_dict()
    train = record["splits"]["train"]
    rows = dataset.read_table(done / "data_csvs" / "train.csv")
    assert train["names"] == [row.name for row in rows] and train["labels"] == [row.label for row in rows]
    assert train["label_counts"] == {"HC": 5, "TLE": 7}
    assert train["csv_hash"] == checkpoint.file_hash(done / "data_csvs" / "train.csv")
    assert np.allclose(record["affine"], dataset.Volumes(vae.preparation, None).affine(rows[0]))


def test_statistics_are_those_of_every_voxel_of_the_whole_training_set(done):
    """Analytic mean and SD of z = mu + sigma eps against many explicit draws; normalised latents have unit variance."""
    record = record_of(done)
    names = record["splits"]["train"]["names"]
    paths = [latents.latent_path(done / "latent_data", "train", name) for name in names]
    pairs = [latents.read_latent(path)[:2] for path in paths]
    g = torch.Generator().manual_seed(0)
    draws = [mu + (0.5 * lv).exp() * torch.randn(mu.shape, generator=g) for _ in range(40) for mu, lv in pairs]
    draws = torch.stack(draws)
    assert np.allclose(draws.mean(dim=(0, 2, 3, 4)), record["mean"], atol=0.02)
    assert np.allclose(draws.std(dim=(0, 2, 3, 4)), record["std"], rtol=0.02)
    for how in ("channel", "voxel"):
        stats = latents.statistics(done / "latent_data", record, how)
        normalised = latents.normalise(draws, stats)
        assert normalised.mean(dim=(0, 2, 3, 4)).abs().max() < 0.02
        assert torch.allclose(normalised.square().mean(dim=(0, 2, 3, 4)).sqrt(), torch.ones(2), atol=0.02)
        assert torch.allclose(latents.denormalise(normalised, stats), draws, atol=1e-5)
    mean = torch.stack([mu for mu, _ in pairs]).mean(0)
    assert torch.allclose(stats["mean"], mean, atol=1e-5)
    assert latents.statistics(done / "latent_data", record, "none") == {"mean": [0.0, 0.0], "std": [1.0, 1.0]}


def test_every_epoch_draws_another_latent(done):
    record = record_of(done)
    stats = latents.statistics(done / "latent_data", record, "none")
    data = latents.LatentDataset(done / "latent_data", "train", record, stats, seed=0)
    n = len(data)
    (first, label), (second, _) = data[3, 3], data[3, 3 + n]
    assert n == 12 and label == record["splits"]["train"]["labels"][3] and first.shape == (2, 4, 5, 4)
    assert torch.equal(first, data[3, 3][0]) and not torch.equal(first, second)
    mu, logvar, _ = latents.read_latent(data.paths[3])
    eps = (torch.stack([data[3, 3 + k * n][0] for k in range(50)]) - mu) / (0.5 * logvar).exp()
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02
    mean = latents.LatentDataset(done / "latent_data", "train", record, stats, seed=0, sample=False)
    assert torch.equal(mean[3, 3][0], mu)


def test_large_sets_are_read_at_every_access(done, monkeypatch):
    record = record_of(done)
    stats = latents.statistics(done / "latent_data", record, "channel")
    small = latents.LatentDataset(done / "latent_data", "train", record, stats, seed=0)
    monkeypatch.setattr(latents, "IN_MEMORY", 0)
    large = latents.LatentDataset(done / "latent_data", "train", record, stats, seed=0)
    assert small.kept and large.kept is None
    assert torch.equal(small[5, 5][0], large[5, 5][0])


def test_finished_files_are_kept_and_lost_ones_come_back(copy):
    before, record = files(copy), record_of(copy)
    lost = copy / "latent_data" / sorted(before)[2]
    kept = copy / "latent_data" / sorted(before)[3]
    lost.unlink()
    stamp = kept.stat().st_mtime_ns
    encode(copy, "--splits", "train", "val")
    assert files(copy) == before and record_of(copy) == record and kept.stat().st_mtime_ns == stamp
    encode(copy, "--splits", "test")  # on top of the others; the statistics stay those of the training set
    after = record_of(copy)
    assert set(after["splits"]) == {"train", "val", "test"} and after["mean"] == record["mean"]
    assert files(copy).items() > before.items()


def test_latents_of_another_vae_are_refused_and_overwrite_removes_only_them(copy):
    before = files(copy)
    foreign = copy / "latent_data" / "train" / "notes_latent.npz"
    foreign.write_bytes(b"mine")
    shutil.rmtree(copy / "runs" / "vae")
    train_vae(copy, "--seed", 9, "--max_steps", 1)
    with pytest.raises(UserError, match="holds latents of another VAE .*--overwrite or name another --latents"):
        encode(copy)
    assert files(copy).items() > before.items()
    encode(copy, "--splits", "train", "--overwrite")
    now = files(copy)
    assert set(now) == {name for name in before if name.startswith("train")} | {"train/notes_latent.npz"}
    assert now["train/notes_latent.npz"] == b"mine" and all(now[n] != before[n] for n in now if n in before)


def test_files_that_are_not_ours_are_never_replaced(copy):
    test = dataset.read_table(copy / "data_csvs" / "test.csv")[0]
    path = latents.latent_path(copy / "latent_data", "test", test.name)
    path.parent.mkdir()
    path.write_bytes(b"mine")
    for more in ((), ("--overwrite",)):
        with pytest.raises(UserError, match="was not written by save_latent.py"):
            encode(copy, "--splits", "test", *more)
    assert path.read_bytes() == b"mine"


def test_a_changed_table_is_followed(copy):
    """A relabelled volume is written again, a dropped one removed; the statistics are those of what is listed."""
    table, before, record = copy / "data_csvs" / "train.csv", files(copy), record_of(copy)
    rows = dataset.read_table(table)
    hc = next(row for row in rows if row.label == 0)
    lines = table.read_text().splitlines()
    index = next(i for i, line in enumerate(lines) if hc.name in line)
    header = lines[0].split(",")
    cells = lines[index].split(",")
    cells[header.index(dataset.LABEL_COLUMN)] = "left"
    dropped = [row.name for row in rows if row.label == 1][-1]
    lines[index] = ",".join(cells)
    table.write_text("\n".join(line for line in lines if dropped not in line) + "\n")
    encode(copy)
    now = files(copy)
    assert before.keys() - now.keys() == {f"train/{dropped}_latent.npz"}
    assert latents.read_latent(copy / "latent_data" / f"train/{hc.name}_latent.npz")[2] == 1
    assert record_of(copy)["mean"] != record["mean"]
    assert record_of(copy)["splits"]["train"]["label_counts"] == {"HC": 4, "TLE": 7}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", pickle.dumps({"mu": 1})])
def test_damaged_latents_are_named(copy, content):
    record = record_of(copy)
    path = latents.latent_path(copy / "latent_data", "train", record["splits"]["train"]["names"][0])
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path.name} is damaged or no latent"):
        latents.LatentDataset(copy / "latent_data", "train", record, {"mean": [0], "std": [1]}, seed=0)
    path.unlink()
    with pytest.raises(UserError, match=f"no latent .*{path.name}; run .*save_latent.py"):
        latents.LatentDataset(copy / "latent_data", "train", record, {"mean": [0], "std": [1]}, seed=0)


# ---- the original's pickles


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("malicious_was_here"),)


def write_pickles(root, target):
    for name in files(root):
        arrays = np.load(root / "latent_data" / name)
        path = target / name.replace(".npz", ".pkl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps({"mu": arrays["mu"], "logvar": arrays["logvar"], "label": int(arrays["label"])}))
    return target


def test_pickled_latents_are_imported_only_when_trusted(copy, tmp_path, capsys):
    """Fact 38: the original's latents come in through a reader that refuses anything but arrays and numbers."""
    old, out = write_pickles(copy, tmp_path / "old"), tmp_path / "latents"
    with pytest.raises(SystemExit):
        encode(copy, "--pickles", old, "--latents", out)
    assert "--trust_pickle" in capsys.readouterr().err and not out.exists()
    encode(copy, "--pickles", old, "--latents", out, "--trust_pickle")
    ours, imported = record_of(copy), json.loads((out / "latents.json").read_text())
    assert imported["mean"] == pytest.approx(ours["mean"]) and imported["std"] == pytest.approx(ours["std"])
    names = imported["splits"]["train"]["names"]
    assert sorted(names) == sorted(ours["splits"]["train"]["names"])
    for name in names:
        assert (out / f"train/{name}_latent.npz").read_bytes() == files(copy)[f"train/{name}_latent.npz"]

    for content, words in (({"mu": 0, "label": 1}, "has no logvar"), ({"mu": 0, "logvar": 0, "label": 2}, "label 2"),
                           ({"mu": "a", "logvar": 0, "label": 0}, "no numbers")):  # fmt: skip
        (old / "val" / "x_latent.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=f"x_latent.pkl.*{words}"):
            encode(copy, "--pickles", old, "--latents", tmp_path / "odd", "--trust_pickle")
    (old / "val" / "x_latent.pkl").write_bytes(pickle.dumps({"mu": Malicious(), "logvar": 0, "label": 0}))
    with pytest.raises(UserError, match="x_latent.pkl is refused"):
        encode(copy, "--pickles", old, "--latents", tmp_path / "other", "--trust_pickle")
    assert not Path("malicious_was_here").exists() and not (tmp_path / "other").exists()
    with pytest.raises(UserError, match=r"no \*_latent.pkl in"):
        encode(copy, "--pickles", old, "--latents", out, "--trust_pickle", "--splits", "test")


def test_published_grid_of_what_is_imported():
    """Pickles know no affine; theirs is that of CAT12's maps after preparation (specification, 2.1)."""
    found = preprocess.published_affine(preprocess.Preparation())
    assert np.allclose(np.diag(found)[:3], (-1.51339, 1.5, 1.51339), atol=1e-4)
    assert np.allclose(found[:3, 3], (83.9933, -118.5, -71.9933), atol=1e-4)


# ---- reconstruction and prior


def run_infer(root, *args):
    run_main(infer, "--root", root, *COMMON, *args)


def test_reconstructions_lie_on_the_prepared_grid_with_their_metrics(copy):
    run_infer(copy, "--regions", copy / "data" / "regions")
    vae, rt = load_vae(copy)
    volumes, out = dataset.Volumes(vae.preparation, None), copy / "reconstructions"
    rows = dataset.read_table(copy / "data_csvs" / "val.csv")
    for row in rows:
        stored = [nifti.load(out / f"{row.name}_{kind}.nii.gz") for kind in infer.KINDS]
        ras = nifti.reorient(np.zeros(vae.preparation.shape), volumes.affine(row))[1]
        assert all(np.allclose(v.affine, ras, atol=1e-4) for v in stored)
        original, recon, difference = (nifti.reorient(v.data, v.affine, "LAS")[0] for v in stored)
        x = volumes.tensor(row)
        x_hat = latents.decode(vae.model, latents.encode(vae.model, x[None], rt)[0], rt)[0]
        scale = vae.preparation.norm_scale  # files are in grey-matter fraction
        assert np.allclose(original, scale * x[0], atol=1e-6) and np.allclose(recon, scale * x_hat, atol=1e-6)
        assert np.allclose(difference, recon - original, atol=1e-6)
    table = (out / "per_subject_metrics.csv").read_text().splitlines()
    assert len(table) == 1 + len(rows) and "region_hippocampus_left_mse" in table[0]
    cells = dict(zip(table[0].split(","), table[1].split(","), strict=True))
    row = next(row for row in rows if row.name == cells["name"])
    pair = [nifti.load(out / f"{row.name}_{kind}.nii.gz").data.astype(float) for kind in ("original", "recon")]
    assert float(cells["native_mse"]) == pytest.approx(np.mean((pair[0] - pair[1]) ** 2), rel=1e-4)
    summary = json.loads((out / "summary_metrics.json").read_text())
    assert summary["n"] == 6 and summary["options"]["vae"] == vae.hash


def test_regions_of_another_grid_are_refused(copy):
    maps = copy / "data" / "regions"
    path = maps / dataset.read_table(copy / "data_csvs" / "val.csv")[0].file.name
    labels = nifti.load_labels(path)
    nifti.save(path, labels.data[:-1], labels.affine, dtype=np.int16)
    with pytest.raises(UserError, match="region map .* has shape .*make it on the same grid"):
        run_infer(copy, "--regions", maps)


def test_real_maps_through_the_vae_as_a_control_arm(copy):
    """Defect D23: real maps, as smooth as samples, that every evaluation takes in the place of samples."""
    table, arm = copy / "data_csvs" / "train.csv", copy / "smooth_train"
    run_infer(copy, "--csv", table, "--out", copy / "recon_train", "--arm", arm)
    vae, rt = load_vae(copy)
    volumes, real = dataset.Volumes(vae.preparation, None), dataset.read_table(table)
    rows = {row.name: row for row in dataset.synthetic_rows(arm)}
    assert rows.keys() == {row.name for row in real}
    for row in real:
        x_hat = latents.decode(vae.model, latents.encode(vae.model, volumes.tensor(row)[None], rt)[0], rt)[0]
        found = volumes.load(rows[row.name])
        assert rows[row.name].label == row.label and np.allclose(found, x_hat.clamp(min=0), atol=1e-5)
        assert np.allclose(volumes.affine(rows[row.name]), volumes.affine(row), atol=1e-4)
    smoke = ("--preset", "smoke", "--bootstrap", 0, "--synthetic_folder", arm)
    run_main(per_slice_fid, "--root", copy, *COMMON, *smoke)
    found = json.loads((copy / "fid_results" / "fid_results.json").read_text())
    assert set(found["selection"]["synthetic"]) <= rows.keys()
    small = "--preset smoke --shape 16 20 16 --crop_start 10 --filters 4 8 --batch_size 4 --max_steps 2 --bootstrap 10"
    options = (*small.split(), "--num_samples", 0, "--num_synth_samples", 10, "--synthetic", arm)
    run_main(classifier_train, "--root", copy, *COMMON, *options)
    used = json.loads((copy / "runs/classifier/exp_1/fold_1/files.json").read_text())["train_synthetic"]
    assert len(used) == 10 and all(Path(file).parts[0] == "smooth_train" for file in used)


def test_perceptual_errors_of_reconstructions(copy, tmp_path):
    """Published number (z-scores as they are) and LPIPS on the range it was made for; both 0 for the same volume."""
    torch.manual_seed(0)
    network = LPIPS("alex").eval()
    state = {key: value for key, value in network.state_dict().items() if key.startswith("features")}
    torch.save(state, tmp_path / "backbone.pth")
    heads = {f"lin{i}.model.1.weight": head.data for i, head in enumerate(network.heads)}
    torch.save(heads, tmp_path / "heads.pth")
    shutil.rmtree(copy / "runs" / "vae")
    train_vae(copy, "--shape", 32, 40, 32, "--crop_start", 1, "--max_steps", 1)  # LPIPS needs 31 voxels
    run_infer(copy, "--max_files", 1, "--lpips_weights", tmp_path / "backbone.pth", tmp_path / "heads.pth")
    lines = (copy / "reconstructions" / "per_subject_metrics.csv").read_text().splitlines()
    found = dict(zip(*(line.split(",") for line in lines), strict=True))
    pair = []
    for kind in ("original", "recon"):
        stored = nifti.load(copy / "reconstructions" / f"{found['name']}_{kind}.nii.gz")
        pair.append(nifti.reorient(stored.data, stored.affine, "LAS")[0].astype("f8"))
    source = nifti.load(dataset.read_table(copy / "data_csvs" / "val.csv")[0].file).data.astype("f8")
    real, recon = (torch.from_numpy((x - source.mean()) / source.std())[None, None].float() for x in pair)
    lpips = LPIPS3D(network)
    with torch.no_grad():
        assert float(found["zscored_lpips"]) == pytest.approx(lpips(recon, real).item(), rel=1e-3)
        unit_real, unit_recon = evaluation.to_unit_range(real, recon)
        assert float(found["unit_range_lpips"]) == pytest.approx(lpips(unit_recon, unit_real).item(), rel=1e-3)
        assert evaluation.perceptual_errors(lpips, real, real) == {"zscored_lpips": 0.0, "unit_range_lpips": 0.0}
    assert float(found["zscored_lpips"]) > 0 and float(found["unit_range_lpips"]) != float(found["zscored_lpips"])


def test_reconstructions_of_other_settings_are_refused(copy):
    run_infer(copy, "--max_files", 2)
    before = {p.name: p.read_bytes() for p in (copy / "reconstructions").glob("*.nii.gz")}
    with pytest.raises(UserError, match="other settings .latent mean -> sample.*--overwrite"):
        run_infer(copy, "--latent", "sample")
    run_infer(copy, "--latent", "sample", "--overwrite", "--max_files", 1)
    after = {p.name: p.read_bytes() for p in (copy / "reconstructions").glob("*.nii.gz")}
    assert len(before) == 6 and len(after) == 3
    assert all(before[name] != content for name, content in after.items() if "original" not in name)


def test_prior_samples_scaled_and_unscaled(copy, tmp_path):
    """Decoded N(0, 1) as the original does it, and with the training latents' mean and SD; same seed, same bytes."""
    out = copy / "vae_prior"
    options = ("--root", copy, *COMMON, "--n_samples", 2)
    run_main(generate_synthetic_samples, *options, "--no_clip")
    vae, rt = load_vae(copy)
    record = record_of(copy)
    z = torch.randn(1, *vae.latent_shape, generator=runtime.generator(0, "vae prior", 1))
    scaled = z * torch.tensor(record["std"]).view(1, 2, 1, 1, 1) + torch.tensor(record["mean"]).view(1, 2, 1, 1, 1)
    volumes = dataset.Volumes(vae.preparation, None)
    for scale, latent in (("unscaled", z), ("scaled", scaled)):
        path = out / scale / "synthetic_sample_0001.nii.gz"
        x = volumes.load(dataset.Row(path, "x", 0, "HC", "x"))  # normalised units again
        assert np.allclose(x, latents.decode(vae.model, latent, rt)[0], atol=1e-4)
        assert np.allclose(volumes.affine(dataset.Row(path, "x", 0, "HC", "x")), record["affine"], atol=1e-4)
    assert len(list(out.rglob("*.nii.gz"))) == 4
    before = {p: p.read_bytes() for p in out.rglob("*.nii.gz")}
    run_main(generate_synthetic_samples, *options, "--no_clip", "--out", tmp_path / "again")
    assert all((tmp_path / "again" / p.relative_to(out)).read_bytes() == content for p, content in before.items())
    with pytest.raises(UserError, match="clip False -> True"):
        run_main(generate_synthetic_samples, *options)


def test_only_a_vae_is_taken_for_one(done):
    with runtime.start("cpu") as rt:
        with pytest.raises(UserError, match="holds a dit, not a vae"):
            latents.load_vae(best(done, "dit"), rt)
        with pytest.raises(UserError, match="no vae at .*train it with `python neuroldm3d/VAE/train.py`"):
            latents.load_vae(done / "nothing.pth", rt)
