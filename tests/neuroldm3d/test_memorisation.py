"""Memorisation audit: distances by hand, exact chances, copies flagged and held-out volumes not, the script."""

import csv
import json
import shutil

import numpy as np
import pytest
from scipy import stats

from common import nifti, training
from common.cli import UserError
from neuroldm3d import dataset, preprocess
from neuroldm3d.classifier.model import CNN3D
from neuroldm3d.diffusion import memorisation
from neuroldm3d.diffusion.memorisation import audit, chance_below, compare, describe, distance_matrix, nearest
from neuroldm3d.VAE import save_latent
from tests.helpers import run_main, two_ranks
from tests.neuroldm3d import stages


def normal(n, d, seed, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal((n, d))).astype(np.float32)


# ---- distances and statistics


def test_distances_in_blocks_equal_the_definition(monkeypatch):
    x, y = normal(7, 50, 0), normal(11, 50, 1)
    brute = ((x[:, None].astype(float) - y[None].astype(float)) ** 2).mean(-1)
    for size in (3, 256):
        monkeypatch.setattr(memorisation, "KEYS_AT_ONCE", size)
        np.testing.assert_allclose(distance_matrix(x, y), brute, rtol=1e-9)
    distance, index = nearest(brute)
    assert index.tolist() == brute.argmin(1).tolist() and np.array_equal(distance, brute.min(1))
    within = memorisation.nearest_within(x)
    own = ((x[:, None].astype(float) - x[None]) ** 2).mean(-1) + np.diag(np.full(7, np.inf))
    np.testing.assert_allclose(within, own.min(1), rtol=1e-6)


def test_description_and_comparison_by_hand():
    found = describe([1, 2, 3, 4])
    assert list(found) == ["n", "mean", "std", "min", "p5", "q1", "median", "q3", "max"]
    assert found["mean"] == 2.5 and found["std"] == pytest.approx(1.25**0.5) and found["q1"] == 1.75
    d_real, d_fake = np.arange(1.0, 101), np.arange(0.25, 51, 0.5)
    found = compare(d_real, d_fake)
    assert found["ks_p"] == stats.ks_2samp(d_real, d_fake).pvalue
    assert found["mwu_fake_less_p"] < 1e-6 < found["mwu_two_sided_p"] * 1e6
    assert found["median_ratio"] == pytest.approx(np.median(d_fake) / 50.5)
    thresholds = found["thresholds"]
    assert thresholds["min"]["distance"] == 1 and thresholds["min"]["count"] == 2
    assert thresholds["1%"]["distance"] == pytest.approx(1.99) and thresholds["1%"]["count"] == 4
    assert thresholds["5%"]["share"] == pytest.approx(12 / 102)


def test_chance_of_lying_below_is_exact():
    """Against simulation: how often 3 or more of 12 fakes lie below the second smallest of 20 reals, all alike."""
    rng = np.random.default_rng(0)
    draws = rng.random((40_000, 32))
    level = np.sort(draws[:, :20], axis=1)[:, 1]
    simulated = ((draws[:, 20:] < level[:, None]).sum(1) >= 3).mean()
    assert chance_below(3, 12, 1, 20) == pytest.approx(simulated, abs=0.006)
    assert chance_below(0, 12, 1, 20) == 1
    assert chance_below(1, 1, 0, 9) == pytest.approx(1 / 10)


def test_preference_for_training_volumes():
    """p is uniform where nobody is preferred, smoothness does not matter, and following training volumes does."""
    rng = np.random.default_rng(0)
    train, real = normal(40, 30, 1), normal(15, 30, 2)

    def p(fake, seed=0):
        return memorisation.training_preference(distance_matrix(fake, train), distance_matrix(fake, real), seed)

    alike = [p(normal(20, 30, 10 + s))["p"] for s in range(40)]
    assert 0.25 < np.mean(alike) < 0.9 and min(alike) > 0.001
    assert p(normal(20, 30, 5, 0.1))["p"] > 0.01  # all in the middle, close to everybody
    follows = train[rng.integers(40, size=20)] + normal(20, 30, 6, 0.7)
    found = p(follows)
    assert found["p"] < 0.01 and found["share"] > found["expected"] == pytest.approx(40 / 55)


# ---- the verdict


@pytest.fixture(scope="module")
def sets():
    return normal(60, 200, 0), normal(30, 200, 1), normal(40, 200, 2)


def test_copies_are_flagged_and_held_out_volumes_are_not(sets):
    """Fact 35."""
    train, real, other = sets
    copied = audit(train, real, train[:20])
    assert copied["verdict"]["memorised"] and copied["copies"] == list(range(20))
    assert copied["verdict"]["text"].startswith("MEMORISED: 20 of 20 synthetic volumes coincide")
    assert copied["compare"]["thresholds"]["min"]["share"] == 1
    for clean in (other, real):  # other held-out volumes, and the held-out set itself
        found = audit(train, real, clean)
        assert not found["verdict"]["memorised"] and found["copies"] == []
        assert found["verdict"]["closer_than_held_out"] == [] and not found["verdict"]["low_diversity"]
        assert found["verdict"]["text"].startswith("no copies found")


def test_a_single_planted_copy_is_found(sets):
    train, real, other = sets
    fake = other.copy()
    fake[17] = train[5] + normal(1, 200, 3, 0.1)[0]
    found = audit(train, real, fake)
    assert found["copies"] == [17] and found["arrays"]["nn_fake"][17] == 5 and found["verdict"]["memorised"]
    fake[3] = other[3] + 9  # a volume of the training set as it is; what the VAE makes of it lies elsewhere
    found = audit(train, real, fake, direct=(train + other[3] + 9 - train[8], real + 9))
    assert found["copies"] == [3, 17] and found["arrays"]["copy_of"][[3, 17]].tolist() == [8, 5]


def test_noisy_copies_are_found_by_preference(sets):
    train, real, _ = sets
    fake = train[:30] + normal(30, 200, 4, 0.8)
    found = audit(train, real, fake)
    assert found["copies"] == [] and found["training_preference"]["p"] < 0.01 and found["verdict"]["memorised"]


def test_smooth_samples_warn_without_being_copies(sets):
    """The original's later analysis: 91 % below the 5 % point with low diversity (D4, D10)."""
    train, real, other = sets
    found = audit(train, real, 0.5 * other)
    verdict = found["verdict"]
    assert not verdict["memorised"] and verdict["low_diversity"] and "5%" in verdict["closer_than_held_out"]
    assert found["compare"]["thresholds"]["5%"]["share"] > 0.9 and found["diversity_ratio"] < 0.6
    assert "without preferring training volumes" in verdict["text"] and "low diversity" in verdict["text"]


def test_duplicates_in_the_held_out_set_do_not_hide_copies(sets):
    """D1 and D4: with a held-out minimum of 0 nothing ever lies below it; such volumes are left out and reported."""
    train, real, other = sets
    contaminated = np.concatenate([real, train[:4]])
    found = audit(train, contaminated, 0.5 * other)
    assert found["coincident_held_out"] == [30, 31, 32, 33]
    assert found["compare_with_coincident"]["thresholds"]["min"]["count"] == 0
    assert found["compare"]["thresholds"]["min"]["count"] > 0
    with pytest.raises(UserError, match="split anew"):
        audit(train, train[:8], other)
    with pytest.raises(UserError, match="1 synthetic volumes"):
        audit(train, real, other[:1])


def test_ms_ssim_diversity():
    rng = np.random.default_rng(0)
    same = [np.full((24, 26, 22), 0.5)] * 4
    varied = [rng.random((24, 26, 22)) for _ in range(4)]
    found = memorisation.ms_ssim_diversity(same, 1.0, 10, 0)
    assert found["mean"] == pytest.approx(1) and found["pairs"] == 6 and found["scales"] == 2
    assert memorisation.ms_ssim_diversity(varied, 1.0, 10, 0)["mean"] < 0.3
    assert memorisation.ms_ssim_diversity(varied, 1.0, 2, 0)["pairs"] == 2
    assert memorisation.ms_ssim_diversity(varied[:1], 1.0, 2, 0) == {"pairs": 0}


# ---- the script


@pytest.fixture(scope="module")
def with_vae(cohort, tmp_path_factory):
    """A study with a tiny VAE, training latents, and synthetic volumes: two copies and six validation heads."""
    root = tmp_path_factory.mktemp("memorisation") / "study"
    shutil.copytree(cohort, root)
    stages.train_vae(root, "--steps", 40)
    run_main(save_latent, "--root", root, *stages.COMMON)
    saved = training.read_network(root / "runs" / "vae" / "best_vae.pth", "neuroldm3d vae", "", "", False)
    prep = preprocess.Preparation.from_dict(saved["preparation"])
    volumes = dataset.Volumes(prep, None)
    tables = {name: dataset.read_table(root / "data_csvs" / f"{name}.csv") for name in ("train", "val")}
    planted = [next(r for r in tables["train"] if r.label == label) for label in (0, 1)]
    for number, row in enumerate(planted + tables["val"]):
        name = dataset.CLASSES[row.label]
        data = preprocess.denormalise(volumes.load(row), prep)
        path = root / "synthetic_data" / name / f"{name}_{number:05d}.nii.gz"
        nifti.save(path, data, volumes.affine(row))
    (root / "synthetic_data" / "synthetic.json").write_text(json.dumps({"preparation": prep.to_dict()}))
    (root / "planted.txt").write_text("\n".join(row.name for row in planted))
    return root


OPTIONS = ("--device", "cpu", "--num_workers", 0, "--top_pairs", 2, "--ms_ssim_pairs", 2)


def test_script_finds_planted_copies_and_nothing_else(with_vae, capsys):
    run_main(memorisation, "--root", with_vae, *OPTIONS)
    out = with_vae / "memorisation_results"
    text = (out / "summary.json").read_text()
    summary = json.loads(text)
    assert summary["memorised"] and summary["spaces"]["latent"]["copies"] == ["HC_00000", "TLE_00001"]
    assert summary["spaces"]["latent"]["n"] == {"training": 12, "held_out": 6, "synthetic": 8}
    assert str(with_vae) not in text and "latent: MEMORISED: 2 of 8" in capsys.readouterr().out
    assert summary["ms_ssim"]["synthetic"]["HC"]["pairs"] == 2 and summary["ms_ssim"]["held_out"]["TLE"]["scales"] == 1
    with open(out / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    flagged = {row["synthetic"]: row["nearest_training"] for row in rows if row["copy"] == "1"}
    assert [flagged[name] for name in ("HC_00000", "TLE_00001")] == (with_vae / "planted.txt").read_text().split()
    assert [float(r["distance_over_limit"]) for r in rows] == sorted(
        float(r["distance_over_limit"]) for r in rows
    ) and len(rows) == 8
    with np.load(out / "distances.npz", allow_pickle=False) as arrays:
        assert arrays["latent_d_real"].shape == (6,) and arrays["latent_d_fake"].shape == (8,)
    assert len(list((out / "pairs").glob("*.png"))) == 2 and (out / "distances.png").is_file()
    with pytest.raises(UserError, match="holds results already"):
        run_main(memorisation, "--root", with_vae, *OPTIONS)


def test_script_passes_clean_samples(with_vae, tmp_path):
    clean = tmp_path / "synthetic_data"
    shutil.copytree(with_vae / "synthetic_data", clean)
    (clean / "HC" / "HC_00000.nii.gz").unlink()
    (clean / "TLE" / "TLE_00001.nii.gz").unlink()
    for extra in ((), ("--no_round_trip",)):
        args = ("--synthetic_folder", clean, "--output_dir", tmp_path / f"out{len(extra)}", *extra)
        run_main(memorisation, "--root", with_vae, *OPTIONS, *args)
        summary = json.loads((tmp_path / f"out{len(extra)}" / "summary.json").read_text())
        assert not summary["memorised"] and summary["spaces"]["latent"]["copies"] == []


def test_feature_space_beside_the_latent_one(with_vae, tmp_path):
    saved = training.read_network(with_vae / "runs" / "vae" / "best_vae.pth", "neuroldm3d vae", "", "", False)
    weights, settings = tmp_path / "best_model.pth", {"model": "3d", "filters": [4, 8], "dropout": 0.0}
    training.save_network(
        weights, "neuroldm3d classifier", CNN3D((4, 8), 0.0).state_dict(), settings, preparation=saved["preparation"],
        pad="background", seen=[],
    )  # fmt: skip
    args = ("--features", "classifier", "--weights", weights, "--output_dir", tmp_path / "out")
    run_main(memorisation, "--root", with_vae, *OPTIONS, *args)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["spaces"]) == {"latent", "features"} and summary["features"]["network"] == "classifier, 3D CNN"
    assert summary["spaces"]["features"]["n"] == summary["spaces"]["latent"]["n"]
    with np.load(tmp_path / "out" / "distances.npz", allow_pickle=False) as arrays:
        assert arrays["features_d_fake"].shape == (8,) and not np.allclose(arrays["features_d_fake"], 0)


@pytest.mark.slow
def test_two_ranks_agree_with_one(with_vae, tmp_path):
    script = "neuroldm3d/diffusion/memorisation.py"
    run_main(memorisation, "--root", with_vae, *OPTIONS, "--output_dir", tmp_path / "one")
    done = two_ranks([script, "--root", with_vae, *OPTIONS, "--output_dir", tmp_path / "two"])
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "one" / "distances.npz") as one, np.load(tmp_path / "two" / "distances.npz") as two:
        for name in one:
            np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-7)


def test_latents_of_another_vae_and_leaked_volumes_are_refused(with_vae, tmp_path):
    train_csv = with_vae / "data_csvs" / "train.csv"
    with pytest.raises(UserError, match="12 held-out volumes are in the training set"):
        run_main(memorisation, "--root", with_vae, *OPTIONS, "--real_csv", train_csv, "--output_dir", tmp_path)
    shutil.copytree(with_vae / "latent_data", tmp_path / "latents")
    record = json.loads((tmp_path / "latents" / "latents.json").read_text())
    (tmp_path / "latents" / "latents.json").write_text(json.dumps(record | {"vae": "0" * 16}))
    with pytest.raises(UserError, match="latents of another VAE"):
        run_main(
            memorisation, "--root", with_vae, *OPTIONS, "--latents", tmp_path / "latents", "--output_dir", tmp_path
        )
