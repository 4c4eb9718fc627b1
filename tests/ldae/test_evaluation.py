"""Metrics with pinned definitions, and the reconstruction table with its controls."""

import json
import shutil

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from common import metrics, nifti, runtime
from common.cli import UserError
from ldae import dataset, evaluation, generation, model, representation
from ldae.scripts import config, reconstruction_table
from tests.helpers import run_main, two_ranks
from tests.ldae import stages
from tests.ldae.conftest import SHAPE
from tests.ldae.test_generate import help_without_torch, ready

FAST = "--device cpu --num_workers 0 --table_steps 3 5".split()


def pair(shape=(20, 22, 18)):
    rng = np.random.default_rng(0)
    target = np.clip(rng.normal(0.3, 0.3, shape), 0, 1)
    target[:8] = 0  # background
    return np.clip(target + 0.1 * rng.normal(size=shape), 0, 1), target


# ---- metrics


def test_metrics_are_what_their_definitions_say():
    pred, target = pair()
    found = evaluation.image_metrics(pred, target, upstream=True)
    scikit = structural_similarity(pred, target, data_range=1, gaussian_weights=True, sigma=1.5, win_size=11,
                                   use_sample_covariance=False)  # fmt: skip
    assert found["ssim"] == pytest.approx(scikit, abs=1e-9)
    head = target > 0.02
    assert found["mse"] == pytest.approx(((pred - target) ** 2).mean())
    assert found["mse_masked"] == pytest.approx(((pred - target)[head] ** 2).mean())
    assert found["psnr_masked"] == pytest.approx(-10 * np.log10(found["mse_masked"]))
    assert found["ssim_masked"] != pytest.approx(found["ssim"], abs=1e-3)
    assert set(found) <= set(evaluation.definitions(found))
    assert evaluation.image_metrics(pred, target, lpips=lambda a, b: 0.25)["lpips"] == 0.25
    assert not {"lpips", "ssim_window4"} & evaluation.image_metrics(pred, target).keys()


def test_windows_of_any_size():
    """Odd windows agree with common.metrics; an even one, the original's, with its plain definition."""
    pred, target = pair((9, 8, 7))
    for size in (3, 7):
        expected = metrics.ssim(pred, target, data_range=1, window_size=size)
        assert evaluation.windowed_ssim(pred, target, size) == pytest.approx(expected, abs=1e-12)
    taps = np.exp(-0.5 * (np.array([-1.5, -0.5, 0.5, 1.5]) / 1.5) ** 2)
    window = np.einsum("i,j,k->ijk", taps, taps, taps)
    window /= window.sum()
    values = []
    for d, h, w in np.ndindex(6, 5, 4):
        p, t = (x[d : d + 4, h : h + 4, w : w + 4] for x in (pred, target))
        mp, mt = (window * p).sum(), (window * t).sum()
        vp, vt, cov = (window * p * p).sum() - mp**2, (window * t * t).sum() - mt**2, (window * p * t).sum() - mp * mt
        values.append((2 * mp * mt + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mt**2 + 1e-4) * (vp + vt + 9e-4)))
    assert evaluation.windowed_ssim(pred, target, 4) == pytest.approx(np.mean(values), abs=1e-12)


def test_statistics_of_noise():
    z = torch.randn(3, 16, 20, 16, generator=torch.Generator().manual_seed(0))
    found = evaluation.noise_statistics(2 * z + 1)
    assert found["z_mean"] == pytest.approx(1, abs=0.05) and found["z_std"] == pytest.approx(2, abs=0.05)
    assert abs(found["z_kurtosis"]) < 0.15 and found["z_max_abs"] == pytest.approx((2 * z + 1).abs().max().item())


def test_partners_are_other_subjects():
    subjects = ["A", "A", "B", "C", "C", "C"]
    found = evaluation.partners(subjects)
    assert all(subjects[a] != subjects[b] for a, b in enumerate(found))
    assert evaluation.partners(["A", "A"]) == [-1, -1]


# ---- rows of the table


@pytest.fixture(scope="module")
def ldae():
    return stages.untrained_ldae()


@torch.no_grad()
def latents(ldae, n=2):
    g = torch.Generator().manual_seed(3)
    z_0 = torch.randn(n, *ldae.latent_shape, generator=g)
    return z_0, torch.randn(n, 16, generator=g), torch.randn(n, 16, generator=g), ldae.noise(["a", "b"][:n], 0)


def test_each_row_uses_the_codes_that_it_names(ldae):
    z_0, y, y_other, noise = latents(ldae)
    z_drawn = z_0 + 0.3 * noise
    made = evaluation.reconstruct(ldae, z_0, y, y_other, noise, 4, evaluation.ROWS, z_drawn=z_drawn)
    z_T = ldae.invert(z_0, y, 4)
    expected = {
        "encoded": ldae.decode(z_T, y, 4), "y_only": ldae.decode(noise, y, 4),
        "prior": ldae.decode(ldae.invert(z_0, None, 4), None, 4), "shuffled": ldae.decode(z_T, y_other, 4),
        "shuffled_y_only": ldae.decode(noise, y_other, 4),
        "drawn": ldae.decode(ldae.invert(z_drawn, y, 4), y, 4),
    }  # fmt: skip
    for row, z in expected.items():
        assert torch.equal(made[row][0], z), row
    assert {row for row, (_, z) in made.items() if z is not None} == {"encoded", "drawn", "prior", "untrained"}
    z_hats = [made[row][0] for row in evaluation.ROWS]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(z_hats) for b in z_hats[:i])
    with pytest.raises(ValueError, match="no row"):
        evaluation.reconstruct(ldae, z_0, y, y_other, noise, 4, ["best"])


def test_the_untrained_control_is_an_untrained_network():
    """Fact 16: the row equals a network as it is built, and a model that is one is warned of."""
    lively = stages.untrained_ldae()
    ldae = model.build(lively.settings, schedule=lively.schedule_settings, stats=lively.stats, plane="axial",
                       preparation=lively.preparation, rt=lively.rt)  # fmt: skip
    z_0, y, y_other, noise = latents(ldae)
    for settings in ({}, {"spacing": "nodes", "final": "first", "clip": 1.0}):
        built = ldae.with_sampling(**settings)
        made = evaluation.reconstruct(built, z_0, y, y_other, noise, 5, ["encoded", "untrained"])
        for one, other in zip(made["encoded"], made["untrained"], strict=True):
            assert torch.allclose(one, other, atol=1e-4 * other.abs().max())

    def rows(of):
        made = evaluation.reconstruct(of, z_0, y, y_other, noise, 5, ["encoded", "untrained"])
        return [
            {"scan": str(k), "subject": str(k), "row": row, "steps": 5, "mse": 0.0, "mse_masked": 0.0,
             "latent_rmse": (z[k] - z_0[k]).square().mean().sqrt().item()} | evaluation.noise_statistics(z_T[k])
            for row, (z, z_T) in made.items() for k in range(2)
        ]  # fmt: skip

    lively.decoder.prior.out[-1].weight.mul_(10)
    warning = evaluation.control_warnings(evaluation.summarise(rows(ldae), 0))
    assert len(warning) == 1 and "equals that of an untrained network" in warning[0]
    assert not evaluation.control_warnings(evaluation.summarise(rows(lively), 0))


def test_intervals_draw_subjects():
    """Three scans of a person are not three people: copies of every scan leave the interval as it is."""
    values = np.random.default_rng(0).random(8)

    def table(copies):
        return evaluation.summarise([
            {"scan": f"{k}_{c}", "subject": str(k), "row": "y_only", "steps": 5, "mse": value}
            for k, value in enumerate(values) for c in range(copies)
        ], 0)[0]["mse"]  # fmt: skip

    once, thrice = table(1), table(3)
    assert (once["n"], thrice["n"]) == (8, 24) and thrice["ci95"] == pytest.approx(once["ci95"])
    assert once["ci95"][1] - once["ci95"][0] > 0.2
    curves = {"loss_with": np.repeat(values, 3)[:, None], "loss_without": np.ones((24, 1))}
    gap = representation.summarise_gap(curves, [str(k) for k in range(8) for _ in range(3)])
    alone = representation.summarise_gap({k: v[::3] for k, v in curves.items()}, [str(k) for k in range(8)])
    assert gap["loss_with"]["ci95"] == pytest.approx(alone["loss_with"]["ci95"])
    assert gap["fraction"] == pytest.approx(1 - values.mean())


def test_a_code_that_says_nothing_is_warned_of():
    def entry(row, mse):
        return {"scan": "a", "subject": "a", "row": row, "steps": 5, "mse": mse, "mse_masked": mse}

    table = evaluation.summarise([entry("y_only", 0.2), entry("shuffled_y_only", 0.1)], 0)
    assert "no better than another subject's" in evaluation.control_warnings(table)[0]
    table = evaluation.summarise([entry("y_only", 0.1), entry("shuffled_y_only", 0.2)], 0)
    assert not evaluation.control_warnings(table)


# ---- the command


def run(root, out, *args):
    run_main(reconstruction_table, "--root", root, "--output_dir", out, *FAST, *args)
    return json.loads((out / "reconstruction_table.json").read_text())


def test_the_table(cohort, tmp_path):
    """Fact 36 (and 38): rows for every number of steps and control, columns, definitions, one figure."""
    root, out = ready(cohort), tmp_path / "out"
    result = run(root, out, "--max_scans", 4, "--eval_batch", 3)
    found = {(entry["row"], entry["steps"]): entry for entry in result["table"]}
    assert set(found) == {("aekl", None)} | {(row, steps) for row in evaluation.ROWS for steps in (3, 5)}
    assert result["n"] == 4 and result["n_subjects"] == 2 and result["split"] and result["model"]
    for entry in found.values():
        assert {"ssim", "ssim_masked", "mse", "mse_masked", "psnr"} <= entry.keys()
        assert {"n", "mean", "sd", "ci95"} <= entry["ssim"].keys() and entry["ssim"]["n"] == 4
    assert {"z_mean", "z_std", "z_kurtosis", "z_max_abs", "latent_rmse"} <= found["encoded", 5].keys()
    assert "z_std" not in found["y_only", 5] and "latent_rmse" not in found["aekl", None]
    text = (out / "reconstruction_table.md").read_text()
    assert "not available offline" in text and "SSIM (window 11)" in text and "untrained network" in text
    assert result["definitions"]["lpips"] == "not available offline" and "window 11" in result["definitions"]["ssim"]
    for name in ("reconstruction_table.csv", "reconstruction_per_scan.csv", "reconstruction.png"):
        assert (out / name).stat().st_size > 100

    ldae = model.load_ldae(stages.best(root), runtime.Runtime(torch.device("cpu")))
    options = config.TableOptions(root=str(root), max_scans=1)
    row = generation.select_rows(options, ldae)[0]
    x = dataset.Volumes(ldae.preparation, None).load(row)
    made = generation.reconstruct(ldae, generation.encode(ldae, torch.from_numpy(x)[None]), row.scan, ["y_only"], 0, 5,
                                  "ddim")  # fmt: skip
    part = json.loads((out / "parts" / f"{row.scan}.json").read_text())
    stored = next(entry for entry in part if (entry["row"], entry["steps"]) == ("y_only", 5))
    as_generated = float(((made["y_only"] - x) ** 2).mean())
    assert stored["mse"] == pytest.approx(as_generated, rel=1e-4)


def test_the_table_continues_and_refuses_other_settings(cohort, tmp_path):
    root, out = ready(cohort), tmp_path / "out"
    args = "--max_scans", 2, "--rows", "y_only"
    first = run(root, out, *args)
    parts = sorted((out / "parts").glob("*.json"))
    parts[0].unlink()
    assert run(root, out, *args) == first  # as if it had not been interrupted
    kept = [part.stat().st_mtime_ns for part in parts]
    assert run(root, out, *args) == first and kept == [part.stat().st_mtime_ns for part in parts]
    with pytest.raises(UserError, match="results of other settings"):
        run(root, out, *args, "--seed", 4)
    assert run(root, out, *args, "--seed", 4, "--overwrite")["table"] != first["table"]


def test_a_table_of_other_scans_is_refused(cohort, tmp_path):
    """A scan that was prepared anew under its old name is another one."""
    root, out = shutil.copytree(ready(cohort), tmp_path / "study"), tmp_path / "out"
    args = "--max_scans", 1, "--rows", "y_only"
    first = run(root, out, *args)["table"]
    row = generation.select_rows(config.TableOptions(root=str(root), max_scans=1), stages.untrained_ldae())[0]
    volume = nifti.load(row.path)
    nifti.save(row.path, volume.data[::-1], volume.affine)
    with pytest.raises(UserError, match=r"results of other settings \(scans\)"):
        run(root, out, *args)
    assert run(root, out, *args, "--overwrite")["table"] != first


def test_lpips_by_path(cohort, tmp_path):
    """A function of two volumes where there are weights; a clear error without them or for small volumes."""
    root = ready(cohort)
    with pytest.raises(UserError, match="no file nowhere.pth"):
        run(root, tmp_path / "out", "--lpips_weights", "nowhere.pth")
    from common.lpips import LPIPS

    torch.save(LPIPS("squeeze").state_dict(), tmp_path / "lpips.pth")
    with pytest.raises(UserError, match="too small for LPIPS"):
        run(root, tmp_path / "out", "--lpips_weights", tmp_path / "lpips.pth")
    options = config.TableOptions(lpips_weights=(str(tmp_path / "lpips.pth"),))
    lpips = reconstruction_table.load_lpips(options, (40, 40, 40), runtime.Runtime(torch.device("cpu")))
    x = np.random.default_rng(0).random((36, 36, 36))
    assert lpips(x, x) == pytest.approx(0, abs=1e-6)
    assert reconstruction_table.load_lpips(config.TableOptions(), SHAPE, None) is None


def test_help():
    """Fact 38."""
    shown = help_without_torch(reconstruction_table)
    assert shown.returncode == 0, shown.stderr
    assert "10 20 50 100" in shown.stdout.replace("\n", " ").replace("  ", "")


@pytest.mark.slow
def test_two_ranks_share_the_scans(cohort, tmp_path):
    root = ready(cohort)
    words = ["ldae/scripts/reconstruction_table.py", "--root", root, *FAST, "--max_scans", 3, "--eval_batch", 1]
    done = two_ranks([*words, "--output_dir", tmp_path / "two"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "reconstruction_table.json").read_text())
    assert two["table"] == run(root, tmp_path / "one", "--max_scans", 3, "--eval_batch", 1)["table"]
