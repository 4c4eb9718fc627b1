"""Classifier training: who is trained and tested on, the same result however a run is cut or split, what is written."""

import csv
import json
import math
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from common import checkpoint, runtime
from common.cli import UserError
from neuroldm3d import dataset, preprocess
from neuroldm3d.classifier import composition, metrics, trainer
from neuroldm3d.classifier.config import Config
from neuroldm3d.dataset import Row
from tests.helpers import (
    assert_same_tensors,
    kill_and_resume,
    reached,
    run_script,
    signal_when_ready,
    two_ranks,
)
from tests.neuroldm3d.classifier_tools import (
    PREP,
    TINY,
    add_synthetic,
    call,
    plant_copy,
    rewrite_table,
    run_folder,
    tiny_config,
    trained,  # noqa: F401 - a fixture
)

RT = runtime.Runtime(torch.device("cpu"))
SCRIPT = "neuroldm3d/classifier/train.py"
THREADS = {"OMP_NUM_THREADS": "1"}


def compose(root, **options):
    config = tiny_config(root, **options)
    tables, volumes = composition.read_tables(config), composition.open_volumes(config)
    twins = composition.find_twins(tables, volumes, config, RT)
    return composition.compose(tables, twins, config, RT)


def names(rows):
    return [row.name for row in rows]


def read_json(path):
    return json.loads(path.read_text())


# ---- who


def test_published_numbers_of_batches():
    """Fact 8: 2723 rows in batches of 128 give 24, each half HC and half TLE; so does the stream that is trained on."""
    labels = [0] * 1153 + [1] * 1570
    rows = [Row(Path(f"{i}.nii"), str(i), label, "HC", str(i)) for i, label in enumerate(labels)]
    stream = trainer.BalancedVolumes(None, rows, Config(seed=3))
    assert stream.n_batches == 24
    for step in (0, 23, 24, 1000):
        drawn = [labels[stream.index_at(128 * step + slot)] for slot in range(128)]
        assert sum(drawn) == 64
    first = [stream.index_at(position) for position in range(24 * 128)]
    assert len({i for i in first if labels[i] == 1}) == 24 * 64  # the larger class without repeats
    other = trainer.BalancedVolumes(None, rows, Config(seed=3))  # asked for in another order: the same stream
    assert [other.index_at(p) for p in (5000, 17, 3071)] == [stream.index_at(p) for p in (5000, 17, 3071)]
    with pytest.raises(UserError, match="do not fill one balanced batch"):
        trainer.BalancedVolumes(None, rows[:20] + rows[-20:], Config())


MODES = {"real": ("--num_samples", 8), "mixed": ("--num_samples", 8, "--num_synth_samples", 5),
         "synthetic-only": ("--num_samples", 0, "--num_synth_samples", 9)}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_composition_is_recorded_as_it_is_loaded(study, mode):
    """Fact 32: real, mixed and synthetic-only runs write counts that match what the loader gives."""
    add_synthetic(study)
    printed = call(study, *MODES[mode], "--max_steps", 2)
    record, files = (read_json(run_folder(study) / name) for name in ("parameters.json", "fold_1/files.json"))
    assert record["mode"] == mode and f"{mode}: " in printed
    options = dict(zip([o[2:] for o in MODES[mode][::2]], MODES[mode][1::2], strict=True))
    (fold,) = compose(study, **options)
    assert record["folds"] == [composition.counts(fold)] == [files["counts"]]
    stream = trainer.BalancedVolumes(composition.open_volumes(tiny_config(study)), fold.rows, tiny_config(study))
    assert Counter(stream.labels) == {
        i: sum(record["folds"][0][part][name] for part in ("train_real", "train_synthetic"))
        for i, name in enumerate(dataset.CLASSES)
    }
    counts = [sum(record["folds"][0][part].values()) for part in ("train_real", "train_synthetic")]
    assert counts == [options["num_samples"], options.get("num_synth_samples", 0)]
    listed = {Path(f).name for f in files["train_real"] + files["train_synthetic"]}
    assert listed == {row.file.name for row in fold.rows}
    drawn = [stream.rows[stream.index_at(p)] for p in range(8 * stream.config.batch_size)]
    assert {row.file.name for row in drawn} <= listed
    shown = {Path(f).parts[0] for f in files["train_synthetic"]}
    assert shown <= {"synthetic_data"} and all(Path(f).parts[0] == "data" for f in files["train_real"])
    if mode != "real":
        assert record["generator"]["same_training_table"] is False and "was not trained on" in printed
    saved = checkpoint.load(run_folder(study) / "fold_1" / "best_model.pth")
    assert saved["counts"] == record["folds"][0]
    assert saved["seen"] == sorted(names(fold.train + fold.val))


def test_a_synthetic_volume_lines_up_with_its_real_one(study):
    """Fact 3: the same volume from disk and as a synthetic file (already on the grid) is the same classifier item."""
    volumes = dataset.Volumes(PREP, None)
    row = dataset.read_table(study / "data_csvs" / "train.csv")[0]
    add_synthetic(study, n=1)
    from common import nifti

    x = preprocess.denormalise(volumes.load(row), PREP)
    file = study / "synthetic_data" / "HC" / "HC_00000.nii.gz"
    nifti.save(file, x, volumes.affine(row))
    synthetic = dataset.synthetic_rows(study / "synthetic_data", 0)[0]
    config = tiny_config(study, flips="none", rotation=0.0)
    rng = np.random.default_rng(0)
    items = [trainer.augmented_input(volumes, r, config, rng) for r in (row, synthetic)]
    assert items[0].shape == trainer.input_shape(PREP) == (34, 36, 36)
    assert np.abs(items[0] - items[1]).max() < 1e-5
    assert trainer.input_shape(preprocess.Preparation()) == (115, 128, 128)
    inside = volumes.load(row)[:, preprocess.classifier_slices(PREP)]
    assert np.array_equal(items[0][:, 2:-2, 2:-2], inside.transpose(1, 0, 2))


def test_augmentation_keeps_the_background_and_never_turns_heads_over(study):
    """Fact 4: by default only left and right change; with `both`, heads also stand on their head (as published)."""
    volumes, (row, *_) = dataset.Volumes(PREP, None), dataset.read_table(study / "data_csvs" / "train.csv")
    plain = preprocess.classifier_input(volumes.load(row), PREP)
    config = tiny_config(study, rotation=0.0)

    def variants(config):
        items = (trainer.augmented_input(volumes, row, config, np.random.default_rng(i)) for i in range(40))
        return {item.tobytes() for item in items}

    assert variants(config) == {plain.tobytes(), np.ascontiguousarray(plain[:, ::-1]).tobytes()}
    assert len(variants(tiny_config(study, rotation=0.0, flips="both"))) == 4
    shifted = Row(row.file, row.name, row.label, row.group, row.subject)
    zscored = dataset.Volumes(preprocess.Preparation(shape=(32, 40, 32), norm="zscore"), None)
    for pad, corner in (("background", zscored.load(shifted).min()), ("zero", 0.0)):
        config = tiny_config(study, norm="zscore", pad=pad, rotation=15.0, flips="none")
        item = trainer.augmented_input(zscored, shifted, config, np.random.default_rng(0))
        assert item[17, 0, 0] == pytest.approx(corner), pad


def test_folds_partition_the_pool_and_keep_groups_whole(study):
    """Fact 33: every volume is tested once; no subject and no duplicate group is in two folds or crosses a fold."""
    twin, copy = plant_copy(study, "train", "val")
    second = dataset.read_csv(study / "data_csvs" / "train.csv")[1][3]
    table = study / "data_csvs" / "train.csv"
    columns, rows = dataset.read_csv(table)
    rows[4]["sbj_nme"] = second["sbj_nme"]  # two scans of one subject
    with open(table, "w", newline="") as file:
        csv.DictWriter(file, columns).writerows([dict(zip(columns, columns, strict=True)), *rows])
    folds = compose(study, folds=3)
    everyone = {row.name: row for split in composition.SPLITS
                for row in dataset.read_table(study / "data_csvs" / f"{split}.csv")}  # fmt: skip
    tested = [name for fold in folds for name in names(fold.test)]
    assert sorted(tested) == sorted(everyone) and len(folds) == 3
    for fold in folds:
        parts = [set(names(rows)) for rows in (fold.train, fold.val, fold.test)]
        assert set.union(*parts) == set(everyone) and sum(map(len, parts)) == len(everyone)
        together = [{row.subject for row in rows} for rows in (fold.train, fold.val, fold.test)]
        assert not (together[0] & together[2] or together[1] & together[2] or together[0] & together[1])
        assert sum({twin, copy} <= part for part in parts) == 1
        assert {row.label for row in fold.test} == {0, 1}
    shares = [Counter(row.group for row in fold.test)["HC"] for fold in folds]
    assert max(shares) - min(shares) <= 1  # stratified
    assert [names(f.test) for f in compose(study, folds=3)] == [names(f.test) for f in folds]
    assert [names(f.test) for f in compose(study, folds=3, split_seed=8)] != [names(f.test) for f in folds]


def test_leave_site_out(study):
    """Each site is tested by a network that saw neither it nor anybody who was also scanned there."""
    seen = Counter()
    for split in composition.SPLITS:  # two sites that share every group, and one person scanned at both
        table = study / "data_csvs" / f"{split}.csv"
        columns, rows = dataset.read_csv(table)
        for row in rows:
            group = row["HC_vs_LTLE_vs_RTLE_string"]
            row["site"] = ("EAST", "WEST")[seen[group] % 2]
            seen[group] += 1
        if split == "train":
            east, west = (next(row for row in rows if row["site"] == site) for site in ("EAST", "WEST"))
            west["sbj_nme"] = east["sbj_nme"]
        with open(table, "w", newline="") as file:
            csv.DictWriter(file, columns).writerows([dict(zip(columns, columns, strict=True)), *rows])
    folds = compose(study, leave_site_out=True)
    assert [{row.covariates["site"] for row in fold.test} for fold in folds] == [{"EAST"}, {"WEST"}]
    assert sum(len(fold.test) for fold in folds) == 24
    for fold in folds:
        others = fold.train + fold.val
        assert not {row.covariates["site"] for row in fold.test} & {row.covariates["site"] for row in others}
        assert not {row.subject for row in fold.test} & {row.subject for row in others}
        assert len(others) + len(fold.test) == 23
    for options, words in ((dict(folds=3), "makes its own folds"), (dict(num_synth_samples=2), "generator")):
        with pytest.raises(UserError, match=words):
            compose(study, leave_site_out=True, **options)
    rows[0]["site"] = ""
    with open(table, "w", newline="") as file:
        csv.DictWriter(file, columns).writerows([dict(zip(columns, columns, strict=True)), *rows])
    with pytest.raises(UserError, match="need a column site"):
        compose(study, leave_site_out=True)


def test_folds_report_a_spread(study):
    """Fact 33: mean, SD > 0 and interval over folds; the pooled predictions cover everyone."""
    call(study, "--folds", 2, "--max_steps", 8)
    summary = read_json(run_folder(study) / "all_folds_metrics.json")
    assert summary["n_folds"] == 2 and summary["n_test"] == 24 == sum(summary["counts"].values())
    spread = [value["std"] for value in summary["overall_results"].values()]
    assert max(spread) > 0 and summary["overall_results"]["auc_roc"]["std"] > 0
    values = [fold["test"]["auc_roc"]["value"] for fold in summary["folds"]]
    assert summary["overall_results"]["auc_roc"]["mean"] == pytest.approx(np.mean(values))
    hashes = {checkpoint.load(run_folder(study) / f"fold_{k}" / "best_model.pth")["hash"] for k in (1, 2)}
    assert len(hashes) == 2


def test_rotating_tests_of_one_training_table(study):
    folds = compose(study, folds=2, fold_pool="held_out")
    train = names(dataset.read_table(study / "data_csvs" / "train.csv"))
    assert all(names(fold.train) == train for fold in folds)
    assert set(names(folds[0].test)) == set(names(folds[1].val)) and len(folds[0].test + folds[1].test) == 12


def test_synthetic_volumes_do_not_leak_into_folds(study):
    add_synthetic(study)
    with pytest.raises(UserError, match="the generator of the synthetic volumes was trained on.*held_out"):
        compose(study, folds=3, num_synth_samples=4)
    folds = compose(study, folds=2, fold_pool="held_out", num_synth_samples=4)
    assert all(len(fold.synthetic) == 4 for fold in folds)


def test_a_copy_under_another_id_blocks_the_split(study):
    """Fact 9, in the trainer, too: reported and blocked; or taken out of training; or kept as published."""
    twin, copy = plant_copy(study)
    with pytest.raises(UserError, match=f"{copy} .test. and {twin} .train. are nearly the same image"):
        compose(study)
    (without,) = compose(study, duplicates="exclude")
    assert twin not in names(without.train) and copy in names(without.test) and len(without.train) == 11
    (kept,) = compose(study, duplicates="keep")
    assert twin in names(kept.train) and copy in names(kept.test)


def test_one_subject_in_two_tables_is_refused(study):
    table = study / "data_csvs" / "test.csv"
    columns, rows = dataset.read_csv(table)
    rows[0]["sbj_nme"] = dataset.read_csv(study / "data_csvs" / "train.csv")[1][0]["sbj_nme"]
    with open(table, "w", newline="") as file:
        csv.DictWriter(file, columns).writerows([dict(zip(columns, columns, strict=True)), *rows])
    with pytest.raises(UserError, match="are of one subject; split by subject"):
        compose(study)


def test_site_only_baseline():
    """What the site alone tells: shares of TLE in training, judged on the test rows."""

    def row(k, label, site):
        return Row(Path("x"), str(k), label, "HC", str(k), {"site": site} if site else {})

    train = [row(k, int(k % 4 > 0), "A") for k in range(8)] + [row(8 + k, 0, "B") for k in range(4)]
    test = [row(20 + k, 1, "A") for k in range(3)] + [row(30 + k, 0, "B") for k in range(3)] + [row(40, 0, "C")]
    fold = composition.Fold(1, train, [], train, test)
    found = composition.site_only_auc(fold)
    assert found["auc"] == 1.0 and found["sites"] == 2
    assert composition.site_only_auc(composition.Fold(1, train, [], train, [row(1, 1, ""), row(2, 0, "")])) is None


# ---- training


def test_training_learns(study):
    """The loss on few volumes falls well below chance; the rest of the loop is the entry script's."""
    call(study, "--epochs", 40, "--flips", "none", "--rotation", 0, "--dropout", 0, "--select", "loss", "--lr_t0", 40)
    with open(run_folder(study) / "fold_1" / "train.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert np.mean(losses[:4]) > 0.5 and np.mean(losses[-8:]) < 0.35


def assert_same_run(a, b):
    """Weights, optimizer, RNG, best checkpoint, logs and predictions agree bit by bit."""
    for name in ("checkpoints/last.pt", "best_model.pth"):
        assert_same_tensors(run_folder(a) / "fold_1" / name, run_folder(b) / "fold_1" / name)
    for name in ("train.csv", "val.csv", "individual_test_performance.csv", "fold_metrics.json"):
        files = [run_folder(root) / "fold_1" / name for root in (a, b)]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def fresh(trained, path):  # noqa: F811
    root = shutil.copytree(trained, path)
    shutil.rmtree(run_folder(root))
    return root


def test_cut_in_the_middle_of_an_epoch_and_continued(trained, tmp_path):  # noqa: F811
    root = fresh(trained, tmp_path / "study")
    call(root, "--max_steps", 5)
    assert checkpoint.load(run_folder(root) / "fold_1/checkpoints/last.pt")["step"] == 5
    printed = call(root)
    assert_same_run(trained, root)
    assert "complete" not in printed and "is complete at step 12" in call(root)


SLICES = ("--model", "2d", "--width", 0.125, "--depth", 0.05, "--drop_path", 0.5)


@pytest.mark.parametrize("options", [("--scheduler", "plateau", "--lr_patience", 0, "--learning_rate", 0.05), SLICES])
def test_other_networks_and_schedules_continue_exactly(trained, tmp_path, options):  # noqa: F811
    """The plateau's state, dropout and stochastic depth are resumed, too."""
    one, two = (fresh(trained, tmp_path / name) for name in ("one", "two"))
    printed = call(one, *options)
    assert ("starts from scratch" in printed) == (options is SLICES)  # without ImageNet weights, said aloud
    call(two, *options, "--max_steps", 6)
    call(two, *options)
    assert_same_run(one, two)
    with open(run_folder(one) / "fold_1" / "train.csv") as file:
        rates = {row["lr"] for row in csv.DictReader(file)}
    assert len(rates) > 1  # both schedules move


@pytest.mark.slow
def test_kill_at_any_moment(trained, tmp_path):  # noqa: F811
    """Kill -9, twice, and SIGTERM: the same command continues to bit-identical weights."""
    options = ["--epochs", 15, "--num_workers", 1]
    reference, killed, stopped = (fresh(trained, tmp_path / name) for name in ("reference", "killed", "stopped"))
    call(reference, *options)

    def command(root):
        return [SCRIPT, "--root", root, *TINY, *options]

    def ready(kill):
        return reached(run_folder(killed) / "fold_1" / "log.jsonl", (2, 20)[kill])()

    done = kill_and_resume(command(killed), ready, kills=2, max_delay_s=0.2, env=THREADS)
    assert done.returncode == 0, done.stderr
    assert_same_run(reference, killed)

    log = run_folder(stopped) / "fold_1" / "log.jsonl"
    ended = signal_when_ready(command(stopped), reached(log, 4), signal.SIGTERM, env=THREADS)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stdout
    assert "of 60; the same command continues" in ended.stdout
    assert not (run_folder(stopped) / "all_folds_metrics.json").exists()
    call(stopped, *options)
    assert_same_run(reference, stopped)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["3d", "2d"])
def test_two_ranks_train_as_one(trained, tmp_path, model):  # noqa: F811
    """Same global batch, batch norm over both ranks: losses, weights and predictions to float tolerance."""
    one, two = (fresh(trained, tmp_path / name) for name in ("one", "two"))
    options = ["--model", model, "--width", 0.125, "--depth", 0.05, "--dropout", 0, "--drop_path", 0, "--max_steps", 4,
               "--batch_size", 8, "--learning_rate", 1e-4]  # fmt: skip
    call(one, *options)
    done = two_ranks([SCRIPT, "--root", two, *TINY, *options])
    assert done.returncode == 0, done.stderr[-3000:]
    rows = []
    for root in (one, two):
        with open(run_folder(root) / "fold_1" / "train.csv") as file:
            rows.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert rows[0] == pytest.approx(rows[1], rel=2e-4)
    a, b = (checkpoint.load(run_folder(root) / "fold_1/checkpoints/last.pt")["network"] for root in (one, two))
    for key in a:  # but biases that a next norm cancels: their gradient is rounding noise, of which Adam makes steps
        if a[key].ndim > 1 or "running" in key:
            assert (a[key] - b[key]).abs().mean() < 0.05 * 1e-4 * 4 + 1e-4 * a[key].abs().mean(), key
    logits = []
    for root in (one, two):
        table = trainer.read_predictions(run_folder(root) / "fold_1" / "individual_test_performance.csv")
        logits.append([row["logit"] for row in table])
    assert logits[0] == pytest.approx(logits[1], abs=2e-3)


def test_early_stopping_and_best_weights(trained, tmp_path):  # noqa: F811
    root = fresh(trained, tmp_path / "study")
    printed = call(root, "--epochs", 30, "--patience", 2, "--learning_rate", 0.3, "--select", "loss")
    assert "no improvement in 2 validations" in printed
    with open(run_folder(root) / "fold_1" / "val.csv") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 30
    saved = checkpoint.load(run_folder(root) / "fold_1" / "best_model.pth")
    assert saved["step"] == int(rows[best]["step"]) and saved["val_loss"] == pytest.approx(losses[best])
    assert "is complete" in call(root, "--epochs", 30, "--patience", 2, "--learning_rate", 0.3, "--select", "loss")


def test_validation_counts_every_volume_alike(trained):  # noqa: F811
    """D49: the loss does not depend on how the rows fall into batches."""
    network, saved = trainer.load_classifier(run_folder(trained) / "fold_1" / "best_model.pth", RT)
    volumes, rows = dataset.Volumes(PREP, None), dataset.read_table(trained / "data_csvs" / "val.csv")
    logits = [trainer.predict(network, volumes, rows, saved["pad"], batch, RT) for batch in (1, 4, 6)]
    assert logits[0] == pytest.approx(logits[1], abs=1e-5) and logits[0] == pytest.approx(logits[2], abs=1e-5)
    loss = metrics.log_loss([row.label for row in rows], logits[1])
    assert loss == pytest.approx(saved["val_loss"], abs=1e-5)


def test_learning_rates_of_the_schedules():
    network = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    rates = [trainer.set_learning_rate(Config(), optimizer, epoch) for epoch in (0, 12, 24, 25, 74, 75)]
    assert rates[0] == rates[3] == rates[5] == 1e-3 and rates[4] < rates[2] < rates[1] < 1e-3
    assert trainer.set_learning_rate(Config(scheduler="constant"), optimizer, 99) == 1e-3
    optimizer.param_groups[0]["lr"] = 0.025
    assert trainer.set_learning_rate(Config(scheduler="plateau"), optimizer, 99) == 0.025


# ---- what is written


def test_reports_follow_from_the_predictions(trained):  # noqa: F811
    folder = run_folder(trained) / "fold_1"
    with open(folder / "individual_test_performance.csv") as file:
        header = file.readline().strip().split(",")
    assert header[:5] == ["img_path", "predicted_score", "original_label", "predicted_label", "performance_type"]
    rows = trainer.read_predictions(folder / "individual_test_performance.csv")
    labels, scores = (np.array([row[key] for row in rows]) for key in ("original_label", "predicted_score"))
    report, summary = read_json(folder / "fold_metrics.json"), read_json(run_folder(trained) / "all_folds_metrics.json")
    threshold = report["threshold_from_validation"]
    for name, cut in (("test", 0.5), ("test_at_validation_threshold", threshold)):
        counts = metrics.counts(labels, scores, cut)
        assert report[name]["counts"] == counts and report[name]["threshold"] == cut
        for key, value in metrics.rates(**counts).items():
            assert report[name][key]["value"] == pytest.approx(value)
    assert report["test"]["auc_roc"]["value"] == pytest.approx(metrics.auc(labels, scores))
    for group, found in report["called_tle_by_group"].items():  # left and right TLE are merged, not lost
        called = [row["predicted_score"] >= 0.5 for row in rows if row["group"] == group]
        assert (found["n"], found["called_tle"], found["share"]) == (len(called), sum(called), np.mean(called))
        assert found["ci95"] == metrics.wilson(sum(called), len(called))
    assert set(report["called_tle_by_group"]) == {"HC", "left", "right"} == {row["group"] for row in rows}
    kinds = Counter(row["performance_type"] for row in rows)
    assert {k.upper(): n for k, n in report["test"]["counts"].items() if n} == dict(kinds)
    temperature = report["temperature_from_validation"]
    assert [r["calibrated_score"] for r in rows] == pytest.approx(
        list(trainer.probabilities(np.array([r["logit"] for r in rows]) / temperature))
    )
    assert {int(r["label_at_validation_threshold"]) for r in rows} <= {0, 1}
    results = summary["overall_results"]
    assert set(results) == set(metrics.NAMES)
    assert results["auc_roc"]["std"] is None and summary["n_folds"] == 1  # one fold has no spread to report
    assert results["accuracy"]["ci95"] == pytest.approx(metrics.wilson(sum(labels == (scores >= 0.5)), len(labels)))
    assert set(report["calibration"]) == {"raw", "temperature"} and report["site_only"]["sites"] > 1
    text = (run_folder(trained) / "all_folds_metrics.json").read_text() + (folder / "fold_metrics.json").read_text()
    assert "NaN" not in text and "Infinity" not in text


def test_a_collapsed_fold_is_named(trained, tmp_path):  # noqa: F811
    """D9: weights that call everybody HC; testing them again says so in both reports."""
    report = read_json(run_folder(trained) / "fold_1" / "fold_metrics.json")
    assert report["collapsed"] == (0 in [report["test"][name]["value"] for name in ("sensitivity", "specificity")])
    root = shutil.copytree(trained, tmp_path / "study")
    path = run_folder(root) / "fold_1" / "best_model.pth"
    saved = checkpoint.load(path)
    saved["state_dict"]["fc2.weight"].zero_()
    saved["state_dict"]["fc2.bias"].fill_(-5)
    checkpoint.save(path, saved)
    call(root)
    report = read_json(path.with_name("fold_metrics.json"))
    assert report["test"]["sensitivity"]["value"] == 0 and report["collapsed"]
    assert read_json(run_folder(root) / "all_folds_metrics.json")["collapsed_folds"] == [1]


def test_threshold_and_temperature_come_from_validation(trained):  # noqa: F811
    network, saved = trainer.load_classifier(run_folder(trained) / "fold_1" / "best_model.pth", RT)
    rows = dataset.read_table(trained / "data_csvs" / "val.csv")
    logits = trainer.predict(network, dataset.Volumes(PREP, None), rows, "background", 16, RT)
    labels = [row.label for row in rows]
    expected = metrics.youden_threshold(labels, trainer.probabilities(logits))
    assert saved["threshold"] == pytest.approx(expected if math.isfinite(expected) else 0.5, abs=1e-6)
    assert saved["temperature"] == pytest.approx(metrics.fit_temperature(labels, logits), rel=1e-3)


def test_no_absolute_path_is_written(trained):  # noqa: F811
    """Fact 39, but for manifest.json, which keeps the command as it was typed."""
    files = [p for p in run_folder(trained).rglob("*") if p.suffix in (".json", ".csv", ".jsonl")]
    assert len(files) > 8
    for path in files:
        if path.name != "manifest.json":
            assert str(trained) not in path.read_text() and '"/' not in path.read_text(), path


def test_checkpoints_need_no_pickle(trained):  # noqa: F811
    """Fact 38: tensors and plain values only."""
    for name in ("best_model.pth", "checkpoints/last.pt"):
        assert torch.load(run_folder(trained) / "fold_1" / name, weights_only=True)


# ---- what is refused


@pytest.mark.parametrize("options, message", [
    (("--batch_size", 7), "balanced batches need an even number"),
    (("--batch_size", 64), "do not fill one balanced batch"),
    (("--num_samples", 0), "leave nothing to train on"),
    (("--num_samples", 13), "13 real volumes asked for, the training table has 12"),
    (("--num_synth_samples", 4), "no synthetic volumes in .*save_synth.py"),
    (("--folds", 1), "at least 2 folds"),
    (("--folds", 20), "folds: at least 2, and no more than"),
    (("--filters", *[4] * 7), "too small for 7 stages"),
    (("--shape", 32, 60, 32), "has no coronal slices 1 to 60"),
    (("--model", "2d", "--weights", "w.pth", "--width", 0.5), "--weights are of the full EfficientNetV2-L"),
    (("--val_every", 0), "--val_every 0: must be at least 1"),
    (("--bootstrap", 0), "--bootstrap start at 1"),
    (("--test_csv", "nowhere.csv"), "no table nowhere.csv"),
])  # fmt: skip
def test_bad_options_are_one_line_before_any_training(study, options, message):
    with pytest.raises((UserError, SystemExit)) as raised:
        call(study, *options)
    if raised.type is UserError:
        assert raised.match(message)
        assert not list(study.rglob("*.pt"))
        return
    done = run_script([SCRIPT, "--root", study, *TINY, *options])  # refused while the options are read
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    import re

    assert re.search(message, lines[0])


def test_bad_input_from_the_shell(study):
    """One line, exit status 2, nothing written."""
    rewrite_table(study / "data_csvs" / "test.csv", lambda row: row["HC_vs_LTLE_vs_RTLE_string"] == "HC")
    done = run_script([SCRIPT, "--root", study, *TINY], env=THREADS)
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "it/s" not in line]
    assert done.returncode == 2 and lines[-1].startswith("error: the test set of fold 1 has"), done.stderr
    assert "Traceback" not in done.stderr and not (study / "runs").exists()


def test_other_options_are_not_mixed_into_a_run(trained, tmp_path):  # noqa: F811
    root = shutil.copytree(trained, tmp_path / "study")
    before = (run_folder(root) / "fold_1" / "best_model.pth").read_bytes()
    with pytest.raises(UserError, match="learning_rate: 0.002 before, 0.5 now"):
        call(root, "--learning_rate", 0.5)
    with pytest.raises(UserError, match="names_train_real"):
        call(root, "--num_samples", 8)
    assert (run_folder(root) / "fold_1" / "best_model.pth").read_bytes() == before
    call(root, "--learning_rate", 0.5, "--restart")
    assert (run_folder(root) / "fold_1" / "best_model.pth").read_bytes() != before


def test_weights_of_nobody_are_not_replaced(study):
    folder = run_folder(study) / "fold_1"
    folder.mkdir(parents=True)
    (folder / "best_model.pth").write_bytes(b"mine")
    with pytest.raises(UserError, match="was not made by a run that can continue"):
        call(study)
    assert (folder / "best_model.pth").read_bytes() == b"mine"


def test_dry_run_writes_nothing(study, capsys):
    before = sorted(study.rglob("*"))
    assert "188,945 parameters" in call(study, "--dry_run", "--filters", 16, 32, 64, 64)
    assert sorted(study.rglob("*")) == before


def test_published_sizes_in_a_dry_run(tmp_path):
    done = run_script([SCRIPT, "--dry_run", "--root", tmp_path, "--device", "cpu"])
    assert done.returncode == 0, done.stderr
    assert "inputs (128, 115, 128, 128) -> logits (128, 1)" in done.stdout and "117,267,809 parameters" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train", "run", "generate_saliency_maps", "run_saliency_generation"])
def test_help(name, tmp_path):
    """Fact 37."""
    done = run_script([f"neuroldm3d/classifier/{name}.py", "--help"], cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0 and "usage:" in done.stdout and done.stderr == ""
