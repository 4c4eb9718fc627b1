"""per_slice_fid.py as a user runs it: outputs, selection, baseline, warnings, memory, ranks, whole-volume features."""

import json
import shutil
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import nifti, runtime, training
from common.cli import UserError
from neuroldm3d import dataset, preprocess
from neuroldm3d.classifier.model import CNN3D
from neuroldm3d.diffusion import evaluation, per_slice_fid, per_slice_fid_ignite
from neuroldm3d.preprocess import Preparation
from tests.helpers import ROOT, run_main, run_script, two_ranks
from tests.neuroldm3d.test_inception import make_weights

SMOKE = ("--preset", "smoke", "--device", "cpu", "--bootstrap", 3, "--num_workers", 0)
SHAPE = (32, 40, 32)


def make_synthetic(root, prep, change=lambda v: v, per_class=4, folder="synthetic_data"):
    """`per_class` training volumes of each class, changed, as save_synth.py would have written them."""
    rows = dataset.read_table(root / "data_csvs" / "train.csv")
    volumes = dataset.Volumes(prep, None)
    for label, name in enumerate(dataset.CLASSES):
        for number, row in enumerate([r for r in rows if r.label == label][:per_class]):
            data = preprocess.denormalise(change(volumes.load(row)), prep)
            nifti.save(root / folder / name / f"{name}_{number:05d}.nii.gz", data, volumes.affine(row))
    (root / folder / "synthetic.json").write_text(json.dumps({"preparation": prep.to_dict()}))


def smooth(volume):
    return sum(np.roll(volume, shift, axis) for axis in range(3) for shift in (-2, 0, 2)) / 9


@pytest.fixture(scope="module")
def compared(cohort, tmp_path_factory):
    """A study with smoothed training volumes as synthetic ones, and the results on them."""
    root = tmp_path_factory.mktemp("fid") / "study"
    shutil.copytree(cohort, root)
    make_synthetic(root, Preparation(shape=SHAPE), smooth)
    run_main(per_slice_fid, "--root", root, *SMOKE)
    return root


def results(root, folder="fid_results"):
    return json.loads((root / folder / "fid_results.json").read_text())


def values(root, axis, folder="fid_results"):
    return np.load(root / folder / f"axis{axis}_fids.npy", allow_pickle=False)


# ---- outputs


def test_outputs_of_a_run(compared):
    """Fact 29: one value per position of every axis; means, arrays, summary and picture agree."""
    found, everything = results(compared), []
    for axis, n in enumerate(SHAPE):
        array = values(compared, axis)
        assert array.shape == (n,) and array.dtype == np.float64 and np.isfinite(array).all()
        with np.load(compared / "fid_results" / f"axis{axis}_fids_by_position.npz", allow_pickle=False) as arrays:
            assert arrays["positions"].tolist() == list(range(n))
            np.testing.assert_array_equal(arrays["values"], array)
            assert {"kid", "baseline_values", "coverage"} <= {*arrays, "baseline_values"}
            assert arrays["baseline_fid"].shape == arrays["kid"].shape == (n,)
        part = found["axes"][f"axis{axis}"]
        assert part["name"] == ("sagittal", "coronal", "axial")[axis] and part["positions"] == part["size"] == n
        assert part["synthetic"]["fid"] == pytest.approx(array.mean())
        assert part["fid_max"] == pytest.approx(array.max()) and part["fid_max_at"] == array.argmax()
        everything.append(array)
    everything = np.concatenate(everything)
    assert found["overall"]["synthetic"]["fid"] == pytest.approx(everything.mean())
    assert found["overall"]["positions"] == len(everything) == sum(SHAPE)
    low, high = found["overall"]["synthetic"]["fid_ci95"]
    assert low <= found["overall"]["synthetic"]["fid"] <= high
    assert (compared / "fid_results" / "per_slice_fids.png").stat().st_size > 1000
    assert not list((compared / "fid_results").glob("*.pkl"))


def test_smoothed_volumes_are_told_from_real_ones(compared):
    overall = results(compared)["overall_foreground"]
    assert overall["synthetic"]["fid"] > 2 * overall["baseline"]["fid"]
    assert overall["synthetic"]["kid"] > 0 and overall["synthetic"]["kid"] > 3 * abs(overall["baseline"]["kid"])
    assert overall["fid_above_baseline"] == pytest.approx(overall["synthetic"]["fid"] - overall["baseline"]["fid"])
    assert overall["synthetic"]["coverage"] < overall["baseline"]["coverage"]


def test_no_number_stands_alone(compared):
    """n, classes, network and its hash, scaling, real-vs-real floor and the warning are in summary and result."""
    text, found = (compared / "fid_results" / "fid_summary.txt").read_text(), results(compared)
    assert "n = 6 real and 6 synthetic volumes (3 HC, 3 TLE each)" in text
    assert "WARNING: n = 6 is not above the 64 features" in text and "real vs real" in text
    assert "random convolutions" in text and found["features"]["weights_hash"][:16] in text
    assert found["n"] == 6 and found["n_per_class"] == {"HC": 3, "TLE": 3} and found["features"]["width"] == 64
    assert found["warnings"] and "prefer KID" in found["warnings"][0] and "GM fraction" in found["scaling"]
    assert str(compared) not in json.dumps(found)  # fact 39: no absolute path


def test_a_set_with_itself_is_zero_at_every_position(study, prep):
    """Fact 29: FID at most 1e-3, here with the real set in the place of the synthetic one."""
    make_vae_file(study, prep)
    test_csv = study / "data_csvs" / "test.csv"
    run_main(per_slice_fid, "--root", study, *SMOKE, "--synthetic_csv", test_csv, "--max_files", 0)
    for axis in range(3):
        assert np.abs(values(study, axis)).max() <= 1e-3
    assert results(study)["overall"]["synthetic"]["coverage"] == 1
    assert results(study)["selection"]["real"] == results(study)["selection"]["synthetic"]


def make_vae_file(root, prep):
    training.save_network(root / "runs" / "vae" / "best_vae.pth", "neuroldm3d vae", {}, {}, preparation=prep.to_dict())


@pytest.mark.slow
def test_full_size_has_112_136_112_positions(tmp_path):
    """Fact 29 on the paper's grid, all 360 positions."""
    rng = np.random.default_rng(0)
    affine = np.diag([-1.5, 1.5, 1.5, 1.0])
    affine[:3, 3] = 84, -120, -72
    for split in ("test", "train"):
        table = ["file,HC_vs_LTLE_vs_RTLE_string"]
        for i in range(4):
            data = rng.random((113, 137, 113), dtype=np.float32)
            nifti.save(tmp_path / "gm" / f"{split}{i}.nii.gz", data, affine)
            table.append(f"../gm/{split}{i}.nii.gz,{('HC', 'left')[i % 2]}")
        (tmp_path / "data_csvs").mkdir(exist_ok=True)
        (tmp_path / "data_csvs" / f"{split}.csv").write_text("\n".join(table))
    make_vae_file(tmp_path, Preparation())
    csv = tmp_path / "data_csvs" / "test.csv"
    run_main(per_slice_fid, "--root", tmp_path, *SMOKE, "--synthetic_csv", csv, "--bootstrap", 0)
    assert [len(values(tmp_path, axis)) for axis in range(3)] == [112, 136, 112]
    assert max(np.abs(values(tmp_path, axis)).max() for axis in range(3)) <= 1e-3
    assert results(tmp_path)["overall"]["synthetic"]["fid_ci95"] is None


# ---- who is compared


def test_selection_is_seeded_class_matched_and_saved(compared, tmp_path):
    """Fact 30: the same lists on two runs and whatever the directory order; another seed draws others."""
    first = results(compared)["selection"]
    options = per_slice_fid.Options(root=str(compared))
    sets = evaluation.choose_sets(options)
    assert {name: [row.name for row in rows] for name, rows in sets.items()} == first
    for rows in sets.values():
        assert len({row.file for row in rows}) == len(rows) == 6
        assert [row.label for row in rows].count(0) == 3
    assert not {row.file for row in sets["baseline"]} & {row.file for row in sets["real"]}
    shuffled = tmp_path / "synthetic_data"
    for file in reversed(sorted((compared / "synthetic_data").rglob("*.*"))):
        if file.is_file():
            target = shuffled / file.relative_to(compared / "synthetic_data")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    again = evaluation.choose_sets(per_slice_fid.Options(root=str(compared), synthetic_folder=str(shuffled)))
    assert [row.name for row in again["synthetic"]] == first["synthetic"]
    others = [
        evaluation.choose_sets(per_slice_fid.Options(root=str(compared), seed=s))["synthetic"] for s in range(1, 9)
    ]
    assert len({tuple(row.name for row in rows) for rows in others}) > 1


def test_counts_follow_the_real_shares_and_the_smallest_set():
    def pool(hc, tle):
        return [dataset.Row(Path(f"{i}"), f"{i}", int(i >= hc), "HC", f"{i}") for i in range(hc + tle)]

    real = pool(128, 175)  # the paper's test set
    assert evaluation.matched_counts([real, pool(500, 500)], 0) == {0: 128, 1: 175}
    assert evaluation.matched_counts([real, pool(500, 500)], 100) == {0: 42, 1: 58}
    short = evaluation.matched_counts([real, pool(500, 35)], 0)
    assert short[1] <= 35 and sum(short.values()) == 60
    assert sum(evaluation.matched_counts([real, pool(500, 0)], 0).values()) == 0


def test_sets_that_cannot_be_compared_are_refused(compared, study, prep):
    make_synthetic(study, prep, per_class=1)
    shutil.rmtree(study / "synthetic_data" / "TLE")
    (study / "synthetic_data" / "TLE").mkdir()
    with pytest.raises(UserError, match="too few volumes with the real set's classes .*'HC': 1.* synthetic"):
        evaluation.choose_sets(per_slice_fid.Options(root=str(study)))
    with pytest.raises(UserError, match="no volumes in .*nowhere"):
        evaluation.choose_sets(per_slice_fid.Options(root=str(study), synthetic_folder=str(study / "nowhere")))
    flat = study / "flat"
    flat.mkdir()
    for file in (compared / "synthetic_data").glob("*/*.nii.gz"):
        shutil.copy(file, flat)
    options = per_slice_fid.Options(root=str(study), synthetic_folder=str(flat))
    with pytest.raises(UserError, match="class is unknown.*--no_match_classes"):
        evaluation.choose_sets(options)
    options.match_classes = False
    assert len(evaluation.choose_sets(options)["synthetic"]) == 6


def test_two_folders_and_a_class_folder(compared):
    folder = compared / "synthetic_data"
    options = per_slice_fid.Options(
        root=str(compared), synthetic_folder=str(folder / "HC"), synthetic_folder_2=str(folder / "TLE")
    )
    assert [r.name for r in evaluation.choose_sets(options)["synthetic"]] == results(compared)["selection"]["synthetic"]
    assert evaluation.find_preparation(options).shape == SHAPE


def test_without_baseline_the_result_says_so(compared, capsys):
    run_main(
        per_slice_fid, "--root", compared, *SMOKE, "--baseline_csv", "none", "--output_dir", compared / "bare",
        "--positions_per_pass", 40, "--foreground_only", "--foreground_share", 0.3,
    )  # fmt: skip
    found = results(compared, "bare")
    assert "baseline" not in found["overall"] and "no real-vs-real baseline" in found["warnings"][1]
    assert "WARNING: no real-vs-real baseline" in capsys.readouterr().out
    for axis in range(3):  # --foreground_only: skipped positions are NaN, the rest is what it was
        array, full = values(compared, axis, "bare"), values(compared, axis)
        kept = np.isfinite(array)
        assert 0 < kept.sum() < len(array) and not kept[0] and not kept[-1]
        np.testing.assert_allclose(array[kept], full[kept], rtol=1e-6)
    assert found["overall"]["positions"] == found["overall_foreground"]["positions"]


# ---- scaling


def scaling(prep, **changed):
    return evaluation.Scaling(SimpleNamespace(**(dict(scaling="fixed", window=(), eight_bit=False) | changed)), prep)


def test_scaling_rules():
    volume = np.array([[[0.0, 2.0, 4.0, 6.0]]], np.float32)  # native scale 0.25: fractions 0, 0.5, 1, 1.5
    native = Preparation()
    assert scaling(native)(volume).ravel().tolist() == [0, 0.5, 1, 1]
    assert scaling(native, window=(0.5, 1.5))(volume).ravel().tolist() == [0, 0, 0.5, 1]
    np.testing.assert_allclose(scaling(native, scaling="minmax")(volume).ravel(), [0, 1 / 3, 2 / 3, 1], rtol=1e-6)
    np.testing.assert_allclose(scaling(native, eight_bit=True)(volume).ravel() * 255, [0, 127, 255, 255], rtol=1e-6)
    with pytest.raises(UserError, match="z-scored volumes have no range.*--window"):
        scaling(Preparation(norm="zscore"))
    assert scaling(Preparation(norm="zscore"), scaling="minmax")(volume - 1).max() == 1
    with pytest.raises(UserError, match="--window"):
        scaling(native, window=(1.0, 0.0))


def test_slices_have_the_axis_asked_for_and_are_padded_to_squares():
    volume = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4) / 24
    volumes = SimpleNamespace(load=lambda row: volume)
    for axis in range(3):
        found = evaluation.slices_of([None, None], volumes, lambda v: v, axis, [1, 0], square=False)
        assert found.shape[:2] == (2, 2)
        np.testing.assert_array_equal(found[0, 1], np.take(volume, 1, axis))
        square = evaluation.slices_of([None], volumes, lambda v: v, axis, [0], square=True)
        assert square.shape[2] == square.shape[3] == max(found.shape[2:])
        assert square.sum() == pytest.approx(np.take(volume, 0, axis).sum())


# ---- memory and ranks


def test_memory_does_not_grow_with_the_number_of_positions(compared, prep):
    """Fact 29: eight times the positions, the same peak."""
    options = per_slice_fid.Options(root=str(compared), bootstrap=0)
    sets, volumes = evaluation.choose_sets(options), dataset.Volumes(prep, compared / "data" / "cache")
    scale, draws = (
        evaluation.Scaling(options, prep),
        evaluation.resampled_subjects(evaluation.choose_sets(options), options),
    )

    def network(batches, rt):  # 256 wide: covariances of all positions at once would show
        return np.concatenate([b.reshape(len(b), -1)[:, :256] for b in batches])

    peaks = []
    with runtime.start("cpu") as rt:
        for count in (2, 4, 32):  # the first to warm up
            passes = [(1, [i, i + 1]) for i in range(0, count, 2)]
            tracemalloc.start()
            rows, width = evaluation.compare_positions(sets, volumes, scale, network, passes, draws, options, rt)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert len(rows) == count and width == 256
    accumulator = 2 * 256**2 * 8  # bytes of two covariances
    assert peaks[2] - peaks[1] < 28 * accumulator / 100


@pytest.mark.slow
def test_two_ranks_give_the_same_result(compared):
    done = two_ranks(
        ["neuroldm3d/diffusion/per_slice_fid.py", "--root", compared, *SMOKE, "--output_dir", compared / "two"]
    )
    assert done.returncode == 0, done.stderr
    for axis in range(3):
        np.testing.assert_allclose(values(compared, axis, "two"), values(compared, axis), rtol=1e-5, atol=1e-8)
    one, two = (results(compared, f)["overall"]["synthetic"]["fid"] for f in ("fid_results", "two"))
    assert one == pytest.approx(two, rel=1e-6)


# ---- feature networks


def test_inception_by_path_end_to_end(compared, tmp_path, prep):
    """The published network at the fullest position; the file's hash is in the result."""
    weights = make_weights(tmp_path / "pt_inception-2015-12-05-6726825d.pth", 1008)
    options = per_slice_fid.Options(
        root=str(compared), weights=str(weights), output_dir=str(tmp_path / "out"), max_files=3, device="cpu",
        bootstrap=0, foreground_only=True,
    )  # fmt: skip
    with runtime.start("cpu") as rt:
        sets, volumes = evaluation.choose_sets(options), dataset.Volumes(prep, compared / "data" / "cache")
        shares = evaluation.foreground_shares(sets["real"], volumes, evaluation.Scaling(options, prep), rt)
        options.foreground_share = float(max(map(max, shares)))
        result = evaluation.evaluate(options, rt)
    assert result["overall"]["positions"] == 1 and result["features"]["width"] == 2048
    assert len(result["features"]["sha256"]) == 64 and result["features"]["file"] == weights.name
    assert "n = 3 is not above the 2048 features" in result["warnings"][0]
    assert result["overall"]["synthetic"]["fid"] > 0
    assert result["overall"]["synthetic"]["kid_se"] is None and "nan" not in evaluation.summary_text(result)
    json.loads((tmp_path / "out" / "fid_results.json").read_text(), parse_constant=pytest.fail)


def test_missing_weights_end_in_one_line(compared):
    args = ["--root", compared, "--device", "cpu", "--output_dir", compared / "no"]
    done = run_script(["neuroldm3d/diffusion/per_slice_fid.py", *args])
    assert done.returncode == 2 and done.stderr.startswith("error: no Inception weights at ")
    assert len(done.stderr.strip().splitlines()) == 1 and not (compared / "no").exists()
    for features, hint in (("medicalnet", "no MedicalNet weights"), ("classifier", "no classifier at")):
        with pytest.raises(UserError, match=hint):
            run_main(per_slice_fid, *args, "--features", features)


def test_classifier_features_of_whole_volumes(compared, tmp_path, prep):
    torch.manual_seed(0)
    settings = {"model": "3d", "filters": [4, 8], "dropout": 0.0, "in_channels": 34}
    path = tmp_path / "best_model.pth"
    state = CNN3D((4, 8), 0.0).state_dict()
    about = {"preparation": prep.to_dict(), "pad": "background", "seen": []}
    training.save_network(path, "neuroldm3d classifier", state, settings, **about)
    options = per_slice_fid.Options(root=str(compared), features="classifier", weights=str(path), device="cpu",
                                    output_dir=str(tmp_path / "out"), bootstrap=3)  # fmt: skip
    with runtime.start("cpu") as rt:
        result = evaluation.evaluate(options, rt)
    assert result["features"]["network"] == "classifier, 3D CNN" and result["features"]["width"] == 8
    overall = result["overall"]
    assert overall["positions"] == 1 and overall["synthetic"]["fid"] > overall["baseline"]["fid"]
    assert "axes" not in result and not list((tmp_path / "out").glob("axis*"))
    other = Preparation(shape=(28, 40, 32))
    about = {"preparation": other.to_dict(), "pad": "background", "seen": []}
    training.save_network(path, "neuroldm3d classifier", state, settings, **about)
    with runtime.start("cpu") as rt, pytest.raises(UserError, match="was trained on Preparation"):
        evaluation.evaluate(per_slice_fid.Options(root=str(compared), features="classifier", weights=str(path),
                                                  output_dir=str(tmp_path / "other")), rt)  # fmt: skip


def test_random_features_are_seeded_and_react():
    from neuroldm3d.diffusion.features import RandomSlices

    x = torch.rand(3, 20, 24)
    assert torch.equal(RandomSlices(1)(x), RandomSlices(1)(x)) and not torch.equal(
        RandomSlices(1)(x), RandomSlices(2)(x)
    )
    assert RandomSlices(1)(x).std(0).min() >= 0 and RandomSlices(1)(x).std() > 1e-2


# ---- as a user meets it


def test_help_from_another_folder_without_torch(tmp_path):
    """Fact 37, for both names of the script and for the memorisation script."""
    for name in ("per_slice_fid", "per_slice_fid_ignite", "memorisation"):
        path = ROOT / "neuroldm3d" / "diffusion" / f"{name}.py"
        code = (
            f"import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(path)!r}, run_name='__main__')\n"
            "except SystemExit as e: assert not e.code\nassert 'torch' not in sys.modules, 'torch'"
        )
        done = run_script(["-c", code], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "--synthetic_folder" in done.stdout and "(default:" in done.stdout


def test_results_are_not_overwritten_unasked(compared):
    before = (compared / "fid_results" / "fid_results.json").read_bytes()
    with pytest.raises(UserError, match="holds results already.*--overwrite"):
        run_main(per_slice_fid_ignite, "--root", compared, *SMOKE)
    assert (compared / "fid_results" / "fid_results.json").read_bytes() == before


def test_bad_options_end_before_any_work(compared, capsys):
    for wrong, message in ((("--bootstrap", -1), "0 or more"), (("--features", "vgg"), "not one of"),
                           (("--foreground_share", 2.0, "--foreground_only"), "lower --foreground_share")):  # fmt: skip
        with pytest.raises((SystemExit, UserError)) as error:
            run_main(per_slice_fid, "--root", compared, *SMOKE, "--output_dir", compared / "bad", *wrong)
        assert message in str(error.value) + capsys.readouterr().err
    assert not (compared / "bad").exists()
    assert sys.argv  # run_main puts it back


def test_upstream_preset_is_the_originals_measurement():
    assert per_slice_fid.PRESETS["upstream"] == dict(
        features="torchvision", scaling="minmax", aspect="stretch", eight_bit=True
    )
    assert per_slice_fid.Options().max_files == 477
