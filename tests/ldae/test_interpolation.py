"""Interpolation of codes, and the longitudinal evaluation: its protocol, its baselines, its command."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch

from common import metrics, nifti, runtime
from common.cli import UserError
from ldae import dataset, generation, interpolation, model
from ldae.interpolation import Triple
from ldae.scripts import interpolation_evaluation
from tests.helpers import run_main, run_script
from tests.ldae import stages
from tests.ldae.test_generate import help_without_torch, ready

FAST = "--device cpu --num_workers 0 --steps 4".split()


def codes(seed, n=3):
    return torch.randn(n, 2, 3, 4, 2, generator=torch.Generator().manual_seed(seed))


# ---- mixing


@pytest.mark.parametrize("mix", [interpolation.slerp, interpolation.lerp])
def test_ends_and_equal_inputs(mix):
    """Fact 18: alpha 0 and 1 give the ends bit by bit, equal inputs themselves."""
    a, b = codes(0), codes(1)
    assert torch.equal(mix(a, b, 0.0), a) and torch.equal(mix(a, b, 1.0), b)
    for alpha in (0.0, 0.3, 0.5, 1.0):
        assert torch.allclose(mix(a, a.clone(), alpha), a, atol=1e-6)


def test_slerp_takes_each_sample_by_itself():
    """Fact 18: a batch is its samples; one alpha per sample."""
    a, b = codes(0), codes(1)
    alphas = torch.tensor([0.1, 0.5, 0.8])
    together = interpolation.slerp(a, b, alphas)
    alone = [interpolation.slerp(a[i : i + 1], b[i : i + 1], float(alphas[i])) for i in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    as_one_vector = interpolation.slerp(a.reshape(1, -1), b.reshape(1, -1), 0.5).reshape(a.shape)  # the original's way
    assert (as_one_vector - interpolation.slerp(a, b, 0.5)).abs().max() > 1e-3


def test_slerp_goes_along_the_arc():
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    for alpha in (0.25, 0.5, 0.9):
        angle = alpha * math.pi / 2
        expected = torch.tensor([[2 * math.cos(angle), 2 * math.sin(angle)]])
        assert torch.allclose(interpolation.slerp(a, b, alpha), expected, atol=1e-6)


@pytest.mark.parametrize("other", ["same", "opposite", "zero", "nearly"])
def test_slerp_without_an_arc_is_lerp(other):
    """Defect 21: equal, opposite and zero samples give no NaN; the others of the batch are not touched."""
    a, b = codes(0), codes(1)
    b[1] = {"same": a[1], "opposite": -a[1], "zero": 0 * a[1], "nearly": a[1] * (1 + 1e-7)}[other]
    mixed = interpolation.slerp(a, b, 0.3)
    assert torch.allclose(mixed[1], interpolation.lerp(a, b, 0.3)[1], atol=1e-5)
    assert torch.equal(mixed[0], interpolation.slerp(a[:1], b[:1], 0.3)[0]) and mixed.isfinite().all()


def test_slerp_of_views_and_tensors_that_are_not_contiguous():
    a, b = codes(0).transpose(2, 3), codes(1).transpose(2, 3)
    expected = interpolation.slerp(a.contiguous(), b.contiguous(), 0.4)
    assert torch.allclose(interpolation.slerp(a, b, 0.4), expected, atol=1e-6)


# ---- protocol


def test_triples_and_their_gaps():
    found = interpolation.triples({"A": [0, 6, 12, 24], "B": [0, 12], "C": [12, 0, 36]})
    listed = [(t.subject, t.start, t.end, t.target, t.time_gap, t.prediction_gap, t.position) for t in found]
    assert listed == [
        ("A", 0, 12, 6, 12, 6, 0.5), ("A", 0, 24, 6, 24, 6, 0.2), ("A", 0, 24, 12, 24, 12, 0.5),
        ("A", 6, 24, 12, 18, 6, 0.3), ("C", 0, 36, 12, 36, 12, 0.3),
    ]  # fmt: skip
    assert found[3].alpha == pytest.approx(1 / 3)
    assert [t.nearest for t in found] == [0, 0, 0, 6, 0] and Triple("D", 0, 12, 9).nearest == 12


def test_grouped_statistics():
    rows = [{"gap": gap, "ssim": value} for gap, value in ((12, 0.5), (6, 0.9), (12, 0.7))]
    table = interpolation.grouped(rows, "gap", ["ssim"])
    assert list(table) == ["6", "12"]
    assert table["6"] == {"ssim_mean": 0.9, "ssim_std": None, "ssim_min": 0.9, "ssim_max": 0.9, "ssim_count": 1}
    assert table["12"]["ssim_mean"] == pytest.approx(0.6) and table["12"]["ssim_std"] == pytest.approx(0.2 / 2**0.5)


def test_paired_differences_draw_subjects():
    """A subject with many triples counts once in the interval."""
    rows, rng = [], np.random.default_rng(0)
    for subject, n in (("A", 30), ("B", 1), ("C", 1)):
        for target in range(1, n + 1):
            triple = Triple(subject, 0, 50, target).to_dict()
            level = {"A": 0.5, "B": 0.1, "C": 0.2}[subject]
            rows.append(triple | {"method": "ldae", "ssim": level + 0.001 * rng.normal()})
            rows.append(triple | {"method": "copy_nearest", "ssim": 0.0})
    found = interpolation.paired_differences(rows, "ldae", ["ssim"], seed=0)["copy_nearest"]["ssim"]
    assert (found["n"], found["n_subjects"]) == (32, 3)
    lo, hi = found["ci95"]
    values = [row["ssim"] for row in rows if row["method"] == "ldae"]
    assert hi - lo > 0.2 > 5 * (np.std(values) / 32**0.5)  # scans as if independent: much too narrow


def test_sessions_that_cannot_take_part_are_named():
    def row(subject, session, scan):
        return dataset.Row(0, subject, session, None, None, None, None, scan)

    rows = [row("A", 12, "A_12"), row("A", 0, "A_0"), row("A", None, "A_x"), row("B", 6, "B_6"), row("B", 6, "B_6b")]
    table, problems = interpolation.session_table(rows)
    assert {subject: list(months) for subject, months in table.items()} == {"A": [0, 12], "B": [6]}
    assert len(problems) == 2 and "A_x" in problems[0] and "B_6b" in problems[1]


# ---- the command


def evaluate(root, out, *args):
    run_main(interpolation_evaluation, "--root", root, "--output_dir", out, *FAST, *args)
    return json.loads((out / "interpolation.json").read_text())


def table_of(out):
    with open(out / "interpolation_results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_evaluation_against_the_scan_with_baselines(cohort, tmp_path):
    """Fact 35 (and 38): three sessions, far fewer than 200 rows, the output folder is honoured, trivial baselines."""
    root, out = ready(cohort), tmp_path / "elsewhere"
    result = evaluate(root, out, "--part", "test")
    assert not (root / "evaluation").exists()
    rows = table_of(out)
    assert {row["method"] for row in rows} == set(interpolation.METHODS)
    assert len(rows) == result["n_predictions"] * len(interpolation.METHODS) and result["n_subjects"] >= 3
    assert set(result["grouped"]) == {"time_gap", "prediction_gap", "position"}
    assert set(result["ldae_minus"]) == set(interpolation.METHODS) - {"ldae", "ldae_vs_aekl"}
    assert "window 11" in result["definitions"]["ssim"] and result["split"] and result["model"]

    ldae = model.load_ldae(stages.best(root), runtime.Runtime(torch.device("cpu")))
    volumes = dataset.Volumes(ldae.preparation, None)
    scans = {row.scan: row for row in dataset.read_table(root / "data" / "dataset.csv")}
    subject = rows[0]["subject"]
    start, target, end = (volumes.load(scans[f"{subject}_M{month:03d}"]) for month in (0, 6, 12))
    by_method = {row["method"]: row for row in rows if row["subject"] == subject}
    expected = {"copy_nearest": start, "voxel_blend": (start + end) / 2}
    z_a, z_b, z_t = (ldae.compress(torch.from_numpy(x)[None, None]) for x in (start, end, target))
    expected |= {"latent_blend": next(generation.decompress(ldae, (z_a + z_b) / 2)),
                 "aekl_nearest": next(generation.decompress(ldae, z_a)),
                 "aekl_target": next(generation.decompress(ldae, z_t))}  # fmt: skip
    first, second = (generation.encode(ldae, torch.from_numpy(x)[None], 4) for x in (start, end))
    expected["ldae"], at_start = (x for _, x in generation.interpolate(ldae, first, second, [0.5, 0.0], 4))
    expected["ldae_change"] = (start + expected["ldae"] - at_start).clip(min=0)
    for method, x in expected.items():
        assert float(by_method[method]["mse"]) == pytest.approx(float(((x - target) ** 2).mean()), rel=1e-4), method
        assert float(by_method[method]["ssim"]) == pytest.approx(metrics.ssim(x, target, data_range=1), abs=1e-5)
    against = float(((expected["ldae"] - expected["aekl_target"]) ** 2).mean())
    assert float(by_method["ldae_vs_aekl"]["mse"]) == pytest.approx(against, rel=1e-4)
    for name in ("by_time_gap.csv", "interpolation.md", "ssim_by_position.png", "mse_by_time_gap.png", "example.png"):
        assert (out / name).stat().st_size > 100


def test_evaluation_continues_and_refuses_other_settings(cohort, tmp_path):
    root, out = ready(cohort), tmp_path / "out"
    evaluate(root, out, "--max_subjects", 1)
    part = next((out / "parts").glob("*.json"))
    written = part.stat().st_mtime_ns
    result = evaluate(root, out, "--max_subjects", 2)
    assert part.stat().st_mtime_ns == written and result["n_subjects"] == 2
    with pytest.raises(UserError, match="results of other settings"):
        evaluate(root, out, "--noise_path", "lerp")
    assert evaluate(root, out, "--noise_path", "lerp", "--max_subjects", 1, "--overwrite")["n_subjects"] == 1


def test_a_changed_scan_is_measured_again(cohort, tmp_path):
    """What is on disk counts for the scans that it was made of, not for others of the same name."""
    root, out = shutil.copytree(ready(cohort), tmp_path / "study"), tmp_path / "out"
    first = evaluate(root, out, "--max_subjects", 1)["overall"]["copy_nearest"]["mse"]["mean"]
    subject = table_of(out)[0]["subject"]
    rows = [row for row in dataset.read_table(root / "data" / "dataset.csv") if row.subject == subject]
    volume = nifti.load(rows[1].path)
    nifti.save(rows[1].path, volume.data[::-1], volume.affine)
    assert evaluate(root, out, "--max_subjects", 1)["overall"]["copy_nearest"]["mse"]["mean"] > 2 * first


def test_missing_sessions_are_named_and_short_tables_work(cohort, tmp_path):
    """Defect 37: a path without ses-M, a subject with two sessions; the rest is evaluated. The original's windows."""
    root = ready(cohort)
    rows = [row for row in dataset.read_table(root / "data" / "dataset.csv") if row.subject in ("sub-0001", "sub-0002")]
    plain = shutil.copy(rows[0].path, tmp_path / "plain.nii.gz")
    paths = [plain, *(row.path for row in rows[1:])]
    lines = ["subject,path", *(f"{row.subject},{path}" for row, path in zip(rows, paths, strict=True))]
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    args = "--csv_path", tmp_path / "table.csv", "--part", "all", "--preset", "upstream"
    result = evaluate(root, tmp_path / "out", *args)
    assert result["n_subjects"] == 1 and result["n_predictions"] == 1
    assert all(any(name in line for line in result["left_out"]) for name in ("plain", "sub-0001: 2"))
    assert {"ssim_window3", "ssim_window4"} <= result["overall"]["ldae"].keys()
    (tmp_path / "table.csv").write_text("\n".join(lines[:3]) + "\n")
    with pytest.raises(UserError, match="none of 1 subjects .* has 3 sessions"):
        evaluate(root, tmp_path / "none", *args)
    assert not (tmp_path / "none").exists()


def test_help(tmp_path):
    """Fact 38."""
    shown = help_without_torch(interpolation_evaluation)
    assert shown.returncode == 0, shown.stderr
    assert all(word in shown.stdout for word in ("--model_path", "--csv_path", "--device", "--output_dir"))


@pytest.mark.slow
def test_the_script_as_a_user_runs_it(cohort, tmp_path):
    """Fact 38: the documented command, from another folder."""
    root = ready(cohort)
    words = ["ldae/scripts/interpolation_evaluation.py", "--model_path", stages.best(root), "--csv_path",
             root / "data" / "dataset.csv", "--split", root / "split.json", "--cache", "none", "--device", "cpu",
             "--output_dir", tmp_path / "out", "--steps", 3, "--max_subjects", 1]  # fmt: skip
    done = run_script(words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the nearer scan" in done.stdout and (tmp_path / "out" / "interpolation.json").exists()
    failed = run_script([*words, "--steps", 0], cwd=tmp_path)
    assert failed.returncode == 2 and failed.stderr.startswith("error: --steps") and "Traceback" not in failed.stderr
