"""evaluate.py on images with known errors, the paired test, realism of slices, and a whole run as a user would."""

import csv
import dataclasses
import json
import shutil

import monai.metrics
import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.stats import wilcoxon

from common import metrics, nifti, runtime
from common.cli import UserError
from common.lpips import LPIPS
from common.runlog import write_json
from lapt import dataset, diffusion, evaluate, evaluation, inference, quality, segmentation
from lapt.config import GuideConfig
from tests.helpers import run_main, run_script, two_ranks
from tests.lapt.untrained import RT, untrained_model

CPU = ("--device", "cpu", "--num_workers", 0)


def write_samples(folder, cases, change, n_samples=1):
    """Samples of every case as sample.py would have left them: the real images after `change(images, mask, lesion)`."""
    for case in cases:
        real, mask, lesion = evaluation.load_real(case)
        for j in range(n_samples):
            images = change({name: image.copy() for name, image in real.items()}, mask, lesion)
            for name, image in images.items():
                nifti.save(folder / case.name / f"{name}_sample_{j}.nii.gz", image * mask, case.affine)
        write_json(folder / case.name / inference.SIDECAR, {})
    write_json(folder / inference.RECORD, {"settings": {"model": "0" * 16}, "cases": [case.name for case in cases]})
    return folder


def shifted(by, where=lambda mask, lesion: mask):
    """Change: add `by` to both images in a region."""
    return lambda images, mask, lesion: {name: image + by * where(mask, lesion) for name, image in images.items()}


def measure(prepared, synthetic, *args):
    """The report, and the rows of the three tables, of a run in this process."""
    run_main(evaluate, "--dataroot", prepared, "--synthetic", synthetic, "--figures", 0, *CPU, *args)
    folder = synthetic / "evaluation"
    tables = [rows_of(folder / f"{name}.csv") for name in ("evaluation", "segmentation", "lesions")]
    return json.loads((folder / evaluation.REPORT).read_text(), parse_constant=pytest.fail), *tables


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def cases(prepared):
    return dataset.read_cases(prepared, "train")


@pytest.fixture(scope="module")
def with_and_without(cases):
    """Whether the split has cases with a lesion and cases without."""
    free = [case for case in cases if not case.lesion_ml]
    assert free and len(free) < len(cases) - 3
    return free


# ---- images with known errors ---------------------------------------------------------------------------------------


def test_real_images_have_no_error(prepared, cases, with_and_without, tmp_path):
    report, images, segments, found = measure(prepared, write_samples(tmp_path, cases, shifted(0)), "--split", "train")
    assert len(images) == 2 * len(cases) and report["n_cases"] == len(cases)
    for row in images:
        assert all(float(row[c]) == 0 for c in ("mae", "nmse", "flicker"))
        assert float(row["psnr"]) == 100 and all(float(row[c]) == pytest.approx(1) for c in ("ssim", "ms_ssim"))
        bearing = row["case"] not in {case.name for case in with_and_without}
        for column in ("lesion_mae", "lesion_bias", "lesion_contrast_error", "lesion_nmse"):
            assert row[column] == ("0.0" if bearing else "")  # lesion-free: no number, rather than a good one
    by = {(row["case"], row["method"]): row for row in segments}
    for case in cases:
        ours, real = by[case.name, "synthetic"], by[case.name, "real"]
        assert {k: v for k, v in ours.items() if k != "method"} == {k: v for k, v in real.items() if k != "method"}
    assert report["images"]["synthetic"]["adc"]["lesion_mae"]["n"] == len(cases) - len(with_and_without)
    assert report["segmentation"]["real"]["adc_threshold"]["dice"]["mean"] > 0.5  # the phantom's core is below 620
    assert {row["method"] for row in found} == {"synthetic", "real"}


def test_a_shift_is_measured_in_the_units_of_the_file(prepared, cases, tmp_path):
    folder = write_samples(tmp_path, cases[:3], shifted(50))
    report, images, _, _ = measure(prepared, folder, *only(prepared, cases[:3], tmp_path))
    window = dataset.Intensity.of_folder(prepared)
    for row in images:
        assert float(row["mae"]) == pytest.approx(50, rel=1e-4) and float(row["flicker"]) == pytest.approx(0, abs=1e-2)
        expected = 20 * np.log10(window.range(row["modality"]) / 50)
        assert float(row["psnr"]) == pytest.approx(expected, abs=1e-3)  # the training set's range, not the pair's
        if row["lesion_bias"]:
            assert float(row["lesion_bias"]) == pytest.approx(50, rel=1e-4)
    assert report["units"]["adc"] == "1e-6 mm^2/s"
    assert report["definitions"]["data_range"]["q0.995 - q0.005"]["adc"] == pytest.approx(window.range("adc"))


def only(prepared, cases, tmp_path):
    """Options that make a folder with these cases alone the data."""
    folder = tmp_path / "only"
    for case in cases:
        shutil.copytree(case.folder, folder / "cases" / case.name)
    for name in ("splits", "statistics.json"):
        source = prepared / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return "--dataroot", folder, "--split", "train"


def test_errors_inside_the_lesion_are_told_apart(cases):
    case = next(case for case in cases if case.lesion_ml)
    real, mask, lesion = evaluation.load_real(case)
    predicted = shifted(-80, lambda mask, lesion: lesion)(real, mask, lesion)["adc"]
    row = evaluation.compare(predicted, real["adc"], mask, lesion, case.affine, 2000.0)
    assert row["lesion_mae"] == pytest.approx(80, rel=1e-4) == -row["lesion_bias"]
    assert row["mae"] == pytest.approx(80 * lesion.sum() / mask.sum(), rel=1e-3)
    assert row["lesion_psnr"] == pytest.approx(20 * np.log10(2000 / 80), abs=1e-2) and row["psnr"] > row["lesion_psnr"]
    assert row["lesion_contrast"] < row["lesion_contrast_real"]


def test_networks_of_another_split_are_told(prepared, cases, intensity, tmp_path):
    """The patients measured may be ones that were trained on; of another hospital's they are not: a note, no error."""
    other = dataclasses.replace(intensity, split_hash="0123456789abcdef")
    for name, known in (("same", intensity), ("other", other)):
        diffusion.save_model(tmp_path / f"{name}.ckpt", untrained_model(time_points=15, intensity=known))
        folder = write_samples(tmp_path / name, cases[:2], shifted(0))
        words = (*only(prepared, cases[:2], tmp_path / name), "--model", tmp_path / f"{name}.ckpt")
        report, *_ = measure(prepared, folder, *words)
        assert report["split_hash"] == intensity.split_hash
        assert ("model: trained with another split" in report["note"]) == (name == "other")
    record = {"settings": {"model": "0" * 16, "normalisation": other.to_dict()}, "cases": [c.name for c in cases[:2]]}
    write_json(tmp_path / "same" / inference.RECORD, record)
    report, *_ = measure(prepared, tmp_path / "same", "--dataroot", tmp_path / "same" / "only", "--split", "train",
                         "--overwrite")  # fmt: skip
    assert report["note"].startswith("synthetic: trained with another split")


def test_flicker_counts_jumps_between_slices_alone(cases):
    real, mask, _ = evaluation.load_real(cases[0])
    adc = real["adc"]
    sign = np.where(np.arange(adc.shape[2]) % 2, 1, -1)
    assert quality.flicker(adc + 25, adc, mask) == pytest.approx(0, abs=1e-3)
    assert quality.flicker(adc + 25 * sign, adc, mask) == pytest.approx(50, rel=1e-4)
    assert quality.flicker(adc, adc, mask & (np.arange(adc.shape[2]) == 3)) is None


def test_the_mean_of_several_samples_is_measured_unless_the_first_is_asked_for(prepared, cases, tmp_path):
    case = cases[0]
    real, mask, _ = evaluation.load_real(case)
    for name in ("sample_0", "sample_1", "mean"):
        for m in dataset.MODALITIES:
            by = {"sample_0": 30, "sample_1": -30, "mean": 0}[name]
            nifti.save(tmp_path / case.name / f"{m}_{name}.nii.gz", (real[m] + by) * mask, case.affine)
    assert np.allclose(evaluation.load_samples(tmp_path, case)["adc"], real["adc"], atol=1e-3)
    assert np.allclose(evaluation.load_samples(tmp_path, case, "first")["adc"], (real["adc"] + 30) * mask, atol=1e-3)


def test_autoencoder_and_guide_stand_beside(prepared, cases, intensity, tmp_path):
    """Fact 19: the reconstruction of the real images, the floor of every lesion error, is measured with --model."""
    model = untrained_model(time_points=15, intensity=intensity)
    diffusion.save_model(tmp_path / "model.ckpt", model)
    config = GuideConfig(preset="tiny", channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4)
    torch.manual_seed(0)
    zscore = dataset.Intensity.of_folder(prepared, "zscore")
    segmentation.save_guide(tmp_path / "guide.ckpt", segmentation.build_guide(config), config, zscore)
    few = [case for case in cases if case.lesion_ml][:2]
    words = (*only(prepared, few, tmp_path), "--model", tmp_path / "model.ckpt", "--guide", tmp_path / "guide.ckpt")
    report, images, segments, _ = measure(prepared, write_samples(tmp_path / "s", few, shifted(10)), *words)
    real, mask, lesion = evaluation.load_real(few[0])
    recon = evaluation.reconstruct(model, real, mask, few[0].stats)
    assert not recon["adc"][~mask].any()
    rows = [row for row in images if (row["case"], row["method"]) == (few[0].name, "autoencoder")]
    expected = [metrics.mae(recon[name], real[name], mask=lesion) for name in dataset.MODALITIES]
    assert [float(row["lesion_mae"]) for row in rows] == pytest.approx(expected, rel=1e-6)
    methods, rules = ("synthetic", "autoencoder", "real"), ("adc_threshold", "guide")
    assert {(row["method"], row["rule"]) for row in segments} == {(m, r) for m in methods for r in rules}
    assert "lesion_mae" in report["images"]["autoencoder"]["adc"]


def test_reconstruction_is_that_of_padded_slices(intensity, cases):
    """By hand: normalise, encode, decode, back to units; the latent's scaling goes in and out."""
    model = untrained_model(time_points=15, intensity=intensity)
    case = cases[0]
    real, mask, _ = evaluation.load_real(case)
    found = evaluation.reconstruct(model, real, mask, case.stats)
    mri = torch.from_numpy(intensity.normalise(real["dwi"], real["adc"], mask)).permute(3, 0, 1, 2)
    images = model.autoencoder(mri)[0].clamp(-1, 1).permute(1, 2, 3, 0).numpy()
    for name, expected in zip(dataset.MODALITIES, intensity.denormalise(images), strict=True):
        assert np.allclose(found[name], expected * mask, rtol=1e-4, atol=1e-2)


# ---- similarity of slices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "scales"), [(176, 5), (48, 3), (20, 1)])
def test_ms_ssim_of_slices_is_monais(size, scales):
    rng = np.random.default_rng(0)
    real = ndimage.gaussian_filter(rng.random((size, size + 5, 2)), (2, 2, 0)) * 4
    predicted = real + ndimage.gaussian_filter(rng.normal(0, 0.3, real.shape), (1, 1, 0))
    assert quality.ms_ssim_scales(real.shape[:2]) == scales
    weights = np.array(quality.MS_SSIM_WEIGHTS[:scales])
    weights = tuple(weights / weights.sum()) if scales < 5 else tuple(weights)
    measure = monai.metrics.MultiScaleSSIMMetric(2, data_range=2.0, kernel_size=11, kernel_sigma=1.5, weights=weights)
    pairs = [torch.from_numpy(v).movedim(2, 0)[:, None] for v in (predicted, real)]
    expected = measure(*pairs).flatten().numpy()
    assert np.allclose(quality.ms_ssim_slices(predicted, real, data_range=2.0), expected, atol=1e-4)  # float32 there
    assert expected.max() < 0.99


def test_ssim_of_thin_volumes_takes_a_window_that_fits():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 20, 20, 8))
    mask = np.zeros((20, 20, 8), bool)
    mask[5:15, 5:15] = True
    assert [evaluation.ssim_window((20, 20, n)) for n in (1, 7, 8, 11, 32)] == [1, 7, 7, 11, 11]
    expected = metrics.ssim(a, b, data_range=1.0, mask=mask, window_size=7)
    assert evaluation.masked_ssim(a, b, mask, 1.0) == pytest.approx(expected)
    assert evaluation.masked_ssim(a, b, mask & (np.arange(8) == 0), 1.0) is None


# ---- over patients --------------------------------------------------------------------------------------------------


def paired_rows(differences, column="mae", patients=None):
    rows = []
    for i, difference in enumerate(differences):
        for method, value in (("synthetic", 10 + i + difference), ("baseline", 10.0 + i), ("autoencoder", 1.0)):
            patient = f"p{i}" if patients is None else patients[i]
            rows.append({"case": f"c{i}", "patient": patient, "method": method, column: value})
    return rows


def test_paired_test_is_wilcoxon_over_patients():
    """Fact 18's measure: synthetic minus baseline, case by case."""
    differences = np.array([-3.0, -1.0, -2.5, 0.5, -4.0, -0.75, -1.5])
    found = evaluation.paired_test(paired_rows(differences), "mae", seed=0)
    assert found["n_patients"] == 7 and found["mean_difference"] == pytest.approx(differences.mean())
    assert found["wilcoxon_p"] == pytest.approx(wilcoxon(differences).pvalue) and found["wilcoxon_p"] < 0.05
    low, high = found["ci95"]
    assert low < differences.mean() < high < 0 and found["share_improved"] == pytest.approx(6 / 7)
    better = evaluation.paired_test(paired_rows(differences, "psnr"), "psnr", seed=0)
    assert better["share_improved"] == pytest.approx(1 / 7)  # here more is better
    assert "share_improved" not in evaluation.paired_test(
        paired_rows(differences, "lesion_bias"), "lesion_bias", seed=0
    )


def test_cases_of_a_patient_count_once_and_gaps_not_at_all():
    rows = paired_rows([1.0, 3.0, -1.0], patients=["a", "a", "b"])
    found = evaluation.paired_test(rows, "mae", seed=0)
    assert found["n_patients"] == 2 and found["mean_difference"] == pytest.approx(0.5)
    rows[0]["mae"] = None  # such as a lesion-free case
    assert evaluation.paired_test(rows, "mae", seed=0)["mean_difference"] == pytest.approx(1.0)
    assert evaluation.paired_test([row | {"mae": None} for row in rows], "mae", seed=0) is None
    assert evaluation.paired_test(paired_rows([0.0, 0.0]), "mae", seed=0)["wilcoxon_p"] == 1
    assert evaluation.paired_test(paired_rows([2.0]), "mae", seed=0)["wilcoxon_p"] is None


def test_a_better_model_shows_against_the_baseline(prepared, cases, with_and_without, tmp_path):
    """Fact 18: lesion error halved, the rest equal; both the table and the paired difference say so."""
    inside = lambda mask, lesion: lesion  # noqa: E731
    write_samples(tmp_path / "base", cases, shifted(60, inside))
    report, *_ = measure(prepared, write_samples(tmp_path / "ours", cases, shifted(30, inside)), "--split", "train",
                         "--baseline", tmp_path / "base")  # fmt: skip
    found = report["synthetic_minus_baseline"]["images"]["adc"]["lesion_mae"]
    bearing = len(cases) - len(with_and_without)
    assert found["n_patients"] == bearing and found["mean_difference"] == pytest.approx(-30, rel=1e-3)
    assert found["share_improved"] == 1 and found["wilcoxon_p"] == pytest.approx(0.5 ** (bearing - 1))
    assert report["images"]["baseline"]["adc"]["lesion_mae"]["mean"] == pytest.approx(60, rel=1e-3)
    sizes = report["lesion_sizes"]
    assert sum(line["lesions"] for line in sizes["synthetic"]) >= bearing
    for method, expected in (("synthetic", 30), ("baseline", 60), ("real", 0)):
        errors = [line["adc_mae"] for line in sizes[method] if line["lesions"]]
        assert errors == pytest.approx([expected] * len(errors), rel=1e-3)


# ---- realism --------------------------------------------------------------------------------------------------------


def normal(n, d, seed, shift=0.0, scale=1.0):
    return shift + scale * np.random.default_rng(seed).standard_normal((n, d))


def test_fid_interval_resamples_whole_patients():
    rng = np.random.default_rng(0)
    ids = np.repeat(["a", "b", "c"], [2, 5, 3])
    for _ in range(20):
        rows = quality._resample(ids, rng)
        for start in "abc":
            chosen = rows[ids[rows] == start]
            assert len(chosen) % (ids == start).sum() == 0
    x, y = normal(30, 4, 0), normal(30, 4, 1, 0.5)
    patients = np.repeat(np.arange(10), 3).astype(str)
    found = quality.compare_sets(x, y, (patients, patients), seed=0, resamples=30)
    low, high = found["fid_ci95"]
    assert low < found["fid"] < high and found["n_real"] == 30
    assert quality.compare_sets(x, y, (patients, patients), seed=0, resamples=0)["fid_ci95"] is None


def test_blurred_slices_are_told_from_real_ones(prepared, cases, tmp_path):
    """The distance of real training slices is the floor; result and report name network, hash, n and warning."""

    def blurred(images, mask, lesion):
        return {name: ndimage.gaussian_filter(image, (2, 2, 0)) for name, image in images.items()}

    test = dataset.read_cases(prepared, "test")
    report, *_ = measure(prepared, write_samples(tmp_path, test, blurred), "--features", "random", "--fid_resamples", 5)
    found = report["realism"]
    assert found["synthetic"]["fid"] > found["real_training"]["fid"] and found["synthetic"]["kid"] > 0
    assert found["features"]["name"] == "random" and len(found["features"]["weights_hash"]) == 16
    assert found["features"]["width"] == quality.RANDOM_WIDTH >= found["synthetic"]["n_real"] and "warning" in found
    low, high = found["synthetic"]["fid_ci95"]
    assert low <= found["synthetic"]["fid"] <= high


def test_features_of_the_models_own_encoder(intensity):
    model = untrained_model(time_points=15, intensity=intensity)
    features = quality.load_features("autoencoder", "", RT, model)
    slices = np.random.default_rng(0).uniform(-1, 1, (5, 2, 46, 48)).astype(np.float32)
    found = features(slices, RT)
    assert found.shape == (5, 3 * quality.GRID**2) and found.std(0).min() > 0
    assert np.allclose(found, features(slices, RT, batch=2), atol=1e-5)
    # padded with what is background to the model: 0 for z-scores
    scores = untrained_model(time_points=15, intensity=dataclasses.replace(intensity, normalisation="zscore"))
    features = quality.load_features("autoencoder", "", RT, scores)
    padded = np.pad(slices, ((0, 0), (0, 0), (1, 1), (0, 0)))
    assert np.array_equal(features(slices, RT), features(padded, RT)) and not np.allclose(features(slices, RT), found)
    with pytest.raises(UserError, match="name its run with --model"):
        quality.load_features("autoencoder", "", RT)


def test_features_of_an_imagenet_network_from_its_file(tmp_path):
    torch.manual_seed(0)
    network = LPIPS("alex")
    torch.save({f"features.{k}": v for k, v in network.features.state_dict().items()}, tmp_path / "alexnet.pth")
    features = quality.load_features("alex", tmp_path / "alexnet.pth", RT)
    slices = np.random.default_rng(0).uniform(-1, 1, (3, 2, 40, 48)).astype(np.float32)
    found = features(slices, RT)
    assert found.shape == (3, 2 * 256)
    swapped = features(slices[:, ::-1], RT)  # DWI and ADC each have their half
    assert np.allclose(found[:, :256], swapped[:, 256:], atol=1e-6) and not np.allclose(found, swapped, atol=1e-3)
    again = quality.load_features("alex", tmp_path / "alexnet.pth", RT)
    assert again.record["weights_hash"] == features.record["weights_hash"]
    with pytest.raises(UserError, match="has no features.0.weight of vgg"):
        quality.load_features("vgg", tmp_path / "alexnet.pth", RT)
    with pytest.raises(UserError, match="--features vgg needs --feature_weights"):
        quality.load_features("vgg", "", RT)


# ---- as a user runs it ----------------------------------------------------------------------------------------------


def test_sample_and_evaluate_from_the_command_line(prepared, intensity, tmp_path):
    """Fact 21's model file, the prepared test list, and every output of the evaluation."""
    diffusion.save_model(tmp_path / "model.ckpt", untrained_model(time_points=15, intensity=intensity))
    words = ["--dataroot", prepared, "--split", "test", *CPU]
    done = run_script(["lapt/sample.py", "-r", tmp_path / "model.ckpt", "--steps", 2, *words], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "samples" / "2"
    done = run_script(["lapt/evaluate.py", "--synthetic", out, "--preset", "smoke", *words], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 cases of 3 patients (test)" in done.stdout and "FID" in done.stdout
    files = {p.relative_to(out / "evaluation").as_posix() for p in (out / "evaluation").rglob("*") if p.is_file()}
    assert {"evaluation.csv", "segmentation.csv", "evaluation.json", "figures/core_volume.png"} <= files
    names = [case.name for case in dataset.read_cases(prepared, "test")]
    assert {f"figures/{name}_{m}.png" for name in names for m in dataset.MODALITIES} <= files
    page = (out / "evaluation" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == sum(file.endswith(".png") for file in files)
    assert "research use only" in page.lower() and str(tmp_path) not in page and "://" not in page
    text = (out / "evaluation" / "evaluation.json").read_text()
    assert str(tmp_path) not in text and "NaN" not in text
    assert json.loads(text)["samples"]["synthetic"]["steps"] == 2
    before = (out / "evaluation" / "evaluation.csv").read_bytes()
    with pytest.raises(UserError, match="holds results already; name another --outdir or add --overwrite"):
        run_main(evaluate, "--synthetic", out, *words)
    run_main(evaluate, "--synthetic", out, *words, "--overwrite", "--figures", 0)
    assert (out / "evaluation" / "evaluation.csv").read_bytes() == before


@pytest.mark.slow
def test_two_ranks_measure_the_same(prepared, cases, tmp_path):
    write_samples(tmp_path, cases[:5], shifted(20))
    words = ["lapt/evaluate.py", "--synthetic", tmp_path, *only(prepared, cases[:5], tmp_path), *CPU]
    words += ["--features", "random", "--fid_resamples", 3, "--figures", 0, "--outdir"]
    with runtime.start("cpu", "fp32"):
        run_main(evaluate, *words[1:], tmp_path / "one")
    done = two_ranks([*words, tmp_path / "two"])
    assert done.returncode == 0, done.stderr
    for name in ("evaluation.csv", "segmentation.csv", "lesions.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    reports = [json.loads((tmp_path / part / "evaluation.json").read_text()) for part in ("one", "two")]
    for report in reports:
        report.pop("options")
    assert reports[0] == reports[1]


def test_bad_input_is_told(prepared, cases, tmp_path, capsys):
    with pytest.raises(UserError, match="no samples in .*lapt/sample.py"):
        measure(prepared, tmp_path / "nothing")
    folder = write_samples(tmp_path / "s", cases[:2], shifted(0))
    words = only(prepared, cases[:2], tmp_path)
    path = folder / cases[1].name / "adc_sample_0.nii.gz"
    nifti.save(path, np.zeros(cases[1].shape), cases[1].affine @ np.diag([1, 1, 1.1, 1]))
    with pytest.raises(UserError, match=f"{cases[1].name}: .*different grids"):
        measure(prepared, folder, *words)
    (folder / cases[1].name / inference.SIDECAR).unlink()
    with pytest.raises(UserError, match=f"{cases[1].name}: no finished samples"):
        measure(prepared, folder, *words)
    assert not (folder / "evaluation").exists()
    for words, message in (([], "--synthetic"), (["--synthetic", "x", "--size_edges_ml", 5, 1], "--size_edges_ml")):
        with pytest.raises(SystemExit) as left:
            run_main(evaluate, *words)
        assert left.value.code == 2 and message in capsys.readouterr().err
