"""The latent cache: files and manifest, statistics of the training split, whose latents are used, and the data set."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from common import checkpoint, nifti, runtime
from common.cli import UserError
from ldae import dataset, latents
from tests.helpers import run_script, two_ranks
from tests.ldae import stages


@pytest.fixture(scope="session")
def done(cohort):
    return stages.trained(cohort)


@pytest.fixture
def encoded(done, tmp_path):
    """A copy of a study with stage 1 and its latents."""
    return shutil.copytree(done, tmp_path / "study", ignore=shutil.ignore_patterns("ldae_*"))


def record_of(root):
    return json.loads((root / "latents/latents.json").read_text())


def rows_of(root, split="train"):
    record = record_of(root)
    return [row for row in dataset.read_table(root / "data/dataset.csv") if record["scans"][row.scan]["split"] == split]


def open_latents(root, **more):
    record = latents.read_record(root / "latents")
    return latents.Latents(root / "latents", rows_of(root), record, latents.statistics(record), seed=0, **more)


def other_aekl(root, path):
    """The same autoencoder but for one number."""
    saved = checkpoint.load(stages.best(root, "aekl"))
    saved["state_dict"]["encoder.conv_in.bias"] += 0.1
    torch.save(saved, path)
    return path


# ---- encoding -------------------------------------------------------------------------------------------------------


def test_encoding_is_deterministic(encoded):
    """Fact 14: two runs write the same bytes, manifest included."""
    stages.encode(encoded, "--output_dir", encoded / "again")
    names = sorted(path.name for path in (encoded / "latents").iterdir())
    assert len(names) == 48 + 2  # scans, manifest, table
    for name in names:
        assert (encoded / "latents" / name).read_bytes() == (encoded / "again" / name).read_bytes(), name


def test_manifest_says_whose_the_latents_are(encoded):
    """Fact 14: shape, autoencoder, preparation, split, and a hash and a split for every scan."""
    record, saved = record_of(encoded), checkpoint.load(stages.best(encoded, "aekl"))
    assert record["latent_shape"] == [2, 4, 5, 4] and record["compression"] == 4
    assert record["aekl"] == saved["hash"] and record["preparation"] == saved["preparation"]
    split = json.loads((encoded / "split.json").read_text())
    assert record["split"] == split["hash"]
    subjects = {row.scan: row.subject for row in dataset.read_table(encoded / "data/dataset.csv")}
    assert set(record["scans"]) == set(subjects)
    for scan, entry in record["scans"].items():
        assert subjects[scan] in split["subjects"][entry["split"]]
        assert entry["hash"] == latents.bytes_hash((encoded / f"latents/{scan}.npz").read_bytes())


def test_files_hold_mean_and_log_variance_of_the_prepared_scan(encoded):
    row = rows_of(encoded)[0]
    with runtime.start("cpu") as rt:
        aekl = latents.load_aekl(stages.best(encoded, "aekl"), rt)
        volumes = dataset.Volumes(aekl.preparation, None)
        expected = latents.encode(aekl.model, volumes.tensor(row)[None], rt)
    found = latents.read_latent(encoded / f"latents/{row.scan}.npz")
    assert all(torch.equal(a, b[0]) for a, b in zip(found, expected, strict=True))
    with np.load(encoded / f"latents/{row.scan}.npz") as arrays:
        affine = arrays["affine"]
    assert np.allclose(affine, nifti.strided_affine(volumes.affine(row), 4))
    # The middle of the latent grid is the middle of the volume.
    assert np.allclose(affine[:3, :3], 4 * volumes.affine(row)[:3, :3])


def test_scale_is_one_over_the_sd_of_drawn_latents(encoded):
    """Fact 14: recomputed from draws of z within 1 %; mean and SD are of the whole training split, and of it alone."""
    record, g = record_of(encoded), torch.Generator().manual_seed(0)
    drawn = []
    for row in rows_of(encoded):
        mu, logvar = latents.read_latent(encoded / f"latents/{row.scan}.npz")
        drawn += [latents.sample(mu, logvar, torch.randn(mu.shape, generator=g)) for _ in range(40)]
    z = torch.stack(drawn).transpose(0, 1).flatten(1).double()  # (C, everything)
    assert record["n_train"] == len(rows_of(encoded))
    assert np.allclose(record["mean"], z.mean(1), atol=0.01 * z.std(1).max())
    assert np.allclose(record["std"], z.std(1), rtol=0.01)
    assert np.allclose(np.array(record["scale"]) * record["std"], 1, rtol=1e-12)


def test_variance_is_that_of_the_means_plus_the_mean_variance():
    """var z = var mu + mean exp(logvar), in closed form, whatever the order of the volumes."""
    g = torch.Generator().manual_seed(0)
    pairs = {str(i): (torch.randn(3, 4, 4, 4, generator=g) + i, torch.randn(3, 4, 4, 4, generator=g)) for i in range(3)}
    sums = {name: latents.channel_sums(*pair) for name, pair in pairs.items()}
    found = latents.channel_statistics(sums)
    mu, logvar = (torch.cat([pair[k].flatten(1) for pair in pairs.values()], 1).double() for k in (0, 1))
    assert np.allclose(found["mean"], mu.mean(1)) and np.allclose(found["scale"], 1 / np.array(found["std"]))
    assert np.allclose(np.square(found["std"]), mu.var(1, correction=0) + logvar.exp().mean(1))
    assert latents.channel_statistics(dict(reversed(sums.items()))) == found


def test_finished_files_are_kept_and_missing_ones_made(encoded):
    """Resumable: a run that was cut short goes on, and ends with what an uninterrupted one writes."""
    folder, before = encoded / "latents", record_of(encoded)
    names = sorted(path.name for path in folder.glob("*.npz"))
    times = {name: os.stat(folder / name).st_mtime_ns for name in names}
    for name in names[:3]:
        (folder / name).unlink()
    unfinished = {key: value for key, value in before.items() if key not in ("mean", "std", "scale", "n_train")}
    (folder / "latents.json").write_text(json.dumps(unfinished))
    with pytest.raises(UserError, match="are not complete; run"):
        latents.read_record(folder)
    stages.encode(encoded)
    assert record_of(encoded) == before
    changed = {name for name in names if os.stat(folder / name).st_mtime_ns != times[name]}
    assert changed == set(names[:3])


@pytest.mark.slow
def test_two_ranks_encode_what_one_does(encoded):
    command = ["ldae/scripts/save_compressed_latent.py", "--root", encoded, *stages.COMMON]
    done = two_ranks([*command, "--output_dir", encoded / "shared"])
    assert done.returncode == 0, done.stderr
    for path in (encoded / "latents").iterdir():
        assert path.read_bytes() == (encoded / "shared" / path.name).read_bytes(), path.name


def test_latents_of_another_autoencoder_are_refused(encoded, tmp_path):
    """Fact 14: the folder belongs to one autoencoder, and later stages check that it is theirs."""
    other = other_aekl(encoded, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="holds latents of another autoencoder .*--overwrite or name another"):
        stages.encode(encoded, "--ae_model_path", other)
    with runtime.start("cpu") as rt:
        record = latents.read_record(encoded / "latents")
        latents.check_maker(record, latents.load_aekl(stages.best(encoded, "aekl"), rt))
        with pytest.raises(UserError, match="name the matching pair"):
            latents.check_maker(record, latents.load_aekl(other, rt))
    before = record_of(encoded)
    (encoded / "latents/notes.txt").write_text("mine")
    stages.encode(encoded, "--ae_model_path", other, "--overwrite")
    assert record_of(encoded)["aekl"] != before["aekl"] and record_of(encoded)["mean"] != before["mean"]
    assert (encoded / "latents/notes.txt").read_text() == "mine"


def test_a_changed_scan_is_encoded_again(encoded):
    """A file that was prepared anew under its old name must not keep its old latent."""
    row, folder = rows_of(encoded)[0], encoded / "latents"
    before, other = record_of(encoded), latents.latent_path(folder, rows_of(encoded)[1].scan)
    kept = os.stat(other).st_mtime_ns
    volume = nifti.load(row.path)
    nifti.save(row.path, volume.data[::-1], volume.affine)
    stages.encode(encoded)
    record = record_of(encoded)
    changed = {scan for scan, entry in record["scans"].items() if entry != before["scans"][scan]}
    assert changed == {row.scan} and record["mean"] != before["mean"] and os.stat(other).st_mtime_ns == kept
    with runtime.start("cpu") as rt:
        aekl = latents.load_aekl(stages.best(encoded, "aekl"), rt)
        x = dataset.Volumes(aekl.preparation, None).tensor(row)[None]
        expected = latents.encode(aekl.model, x, rt)[0][0]
    assert torch.equal(latents.read_latent(latents.latent_path(folder, row.scan))[0], expected)


def test_foreign_files_and_smaller_tables_are_refused(encoded):
    stray = encoded / "fresh" / f"{rows_of(encoded)[0].scan}.npz"
    stray.parent.mkdir()
    stray.write_bytes(b"mine")
    with pytest.raises(UserError, match="was not written by save_compressed_latent.py"):
        stages.encode(encoded, "--output_dir", stray.parent)
    assert stray.read_bytes() == b"mine"
    table = encoded / "data/few.csv"
    table.write_text("".join((encoded / "data/dataset.csv").read_text().splitlines(keepends=True)[:20]))
    with pytest.raises(UserError, match="that the table does not list, such as"):
        stages.encode(encoded, "--csv_path", table)
    assert len(list((encoded / "latents").glob("*.npz"))) == 48


def test_missing_autoencoder_and_damaged_files(encoded, tmp_path):
    """Fact 21: a missing input ends with status 2 and a line that names it."""
    done = run_script(["ldae/scripts/save_compressed_latent.py", "--root", tmp_path / "nowhere"])
    assert done.returncode == 2 and done.stderr.startswith("error: no aekl at") and "fit --config" in done.stderr
    with pytest.raises(UserError, match="holds a prior, not an aekl"):
        saved = checkpoint.load(stages.best(encoded, "aekl")) | {"network": "ldae prior"}
        torch.save(saved, tmp_path / "prior.ckpt")
        stages.encode(encoded, "--ae_model_path", tmp_path / "prior.ckpt")
    path = encoded / f"latents/{rows_of(encoded)[0].scan}.npz"
    good = path.read_bytes()
    for damage in (good[:100], b"", b"not a zip"):
        path.write_bytes(damage)
        with pytest.raises(UserError, match="is damaged or no latent"):
            latents.read_latent(path)
    mu, logvar = torch.zeros(2, 4, 5, 4), torch.zeros(2, 4, 5, 4)
    latents.save_latent(path, mu, logvar, np.eye(4))
    with pytest.raises(UserError, match="has changed since latents.json was written"):
        open_latents(encoded)


# ---- the table ------------------------------------------------------------------------------------------------------


def test_table_with_latents_can_take_the_place_of_the_first(encoded, tmp_path):
    """Columns latent_path and split; paths count from the new folder, and from anywhere once the study has moved."""
    moved = shutil.move(encoded, tmp_path / "moved")
    table = moved / "latents/dataset_with_compressed_latent.csv"
    rows, first = dataset.read_table(table), dataset.read_table(moved / "data/dataset.csv")
    assert [row.scan for row in rows] == [row.scan for row in first]
    for row, old in zip(rows, first, strict=True):
        assert row.path.resolve() == old.path.resolve() and row.latent_path.is_file()
    columns, records = dataset.read_csv(table)
    assert columns[-2:] == ["latent_path", "split"] and {r["split"] for r in records} == {"train", "val", "test"}
    stages.encode(moved, "--csv_path", table)  # its own output as input: nothing to do, one table
    assert [p.name for p in (moved / "latents").glob("*.csv")] == [table.name]


def test_latents_of_the_table_are_used_if_their_manifest_matches(encoded, tmp_path):
    stages.encode(encoded, "--output_dir", encoded / "elsewhere")
    table = encoded / "elsewhere/dataset_with_compressed_latent.csv"
    record = latents.read_record(encoded / "latents")
    rows = [row for row in dataset.read_table(table) if record["scans"][row.scan]["split"] == "val"]
    stats = latents.statistics(record)
    data = latents.Latents(encoded / "latents", rows, record, stats, seed=0)
    assert {path.parent.name for path in data.paths} == {"elsewhere"}
    other = other_aekl(encoded, tmp_path / "other.ckpt")
    stages.encode(encoded, "--output_dir", encoded / "elsewhere", "--ae_model_path", other, "--overwrite")
    with pytest.raises(UserError, match=r"\(column latent_path\) is of autoencoder"):
        latents.Latents(encoded / "latents", rows, record, stats, seed=0)


# ---- the data set ---------------------------------------------------------------------------------------------------


def test_items_are_normalised_posteriors_and_draws_differ_by_position(encoded):
    data = open_latents(encoded)
    mu, logvar = data[3, 17]
    raw = latents.read_latent(data.paths[3])
    std = torch.tensor(data.stats["std"])[:, None, None, None]
    assert torch.allclose(mu, latents.normalise(raw[0], data.stats)) and mu.shape == (2, 4, 5, 4)
    assert torch.allclose((0.5 * logvar).exp(), (0.5 * raw[1]).exp() / std, rtol=1e-5)
    draw = data.draw((3, 17))
    assert torch.equal(draw, data.draw((3, 17))) and not torch.equal(draw, data.draw((3, 18)))
    eps = (draw - mu) / (0.5 * logvar).exp()
    assert abs(eps.mean()) < 0.5 and 0.6 < eps.std() < 1.4
    every = torch.stack([data.draw((i, n * len(data) + i)) for n in range(20) for i in range(len(data))])
    assert every.mean((0, 2, 3, 4)).abs().max() < 0.02 and (every.std((0, 2, 3, 4)) - 1).abs().max() < 0.02


def test_large_sets_are_read_at_every_access(encoded, monkeypatch):
    kept = open_latents(encoded)
    monkeypatch.setattr(latents, "IN_MEMORY", 0)
    read = open_latents(encoded)
    assert kept.kept and read.kept is None
    assert all(torch.equal(a, b) for a, b in zip(kept[5, 0], read[5, 0], strict=True))


def test_normalise_and_back_and_the_originals_constant():
    stats = {"mean": [1.0, -2.0], "std": [0.5, 3.0]}
    z = torch.randn(3, 2, 4, 5, 4, generator=torch.Generator().manual_seed(0))
    x = latents.normalise(z, stats)
    assert torch.allclose(x[:, 1], (z[:, 1] + 2) / 3) and torch.allclose(latents.denormalise(x, stats), z, atol=1e-6)
    assert torch.allclose(latents.normalise(z[0], stats), x[0])  # without a batch axis too
    upstream = latents.statistics(stats, "upstream")
    assert torch.allclose(latents.normalise(z, upstream), 0.8730 * z) and latents.statistics(stats) == stats


def test_a_scan_without_latent_is_named(encoded):
    rows = rows_of(encoded)
    record = latents.read_record(encoded / "latents")
    gone = encoded / f"latents/{rows[2].scan}.npz"
    gone.unlink()
    with pytest.raises(UserError, match=f"no latent .*{gone.name}"):
        open_latents(encoded)
    del record["scans"][rows[2].scan]
    with pytest.raises(UserError, match=f"does not list scan {rows[2].scan}"):
        latents.Latents(encoded / "latents", rows, record, latents.statistics(record), seed=0)
    with pytest.raises(UserError, match="no latents in .*save_compressed_latent.py"):
        latents.read_record(encoded)
