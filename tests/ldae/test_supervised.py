"""Supervised baselines: targets and metrics, the loop, the four verbs, and what is refused."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, matthews_corrcoef, recall_score, roc_auc_score

from common import checkpoint, runtime, tables
from common.cli import UserError
from ldae import dataset, run_cli, supervised
from ldae.encoder import SemanticEncoder
from tests.helpers import assert_same_tensors, kill_and_resume, reached, run_main, run_script, two_ranks
from tests.ldae import stages

TINY = (
    "--shape 16 20 16 --spacing_mm 12 --backbone_depths 1 1 --backbone_widths 8 16 --code_dim 16 --encoder_heads 2 "
    "--max_slices 20 --drop_path 0.1 --batch_size 4 --accumulate 1 --steps 12 --lr 3e-3 --log_every 2 --save_every 5 "
    "--val_every 1 --patience 0 --val_size 0.2 --test_size 0.2 --bootstrap 50"
).split()
STAGES = ("classification", "regression")


def command(stage, verb="fit"):
    return ["ldae/run_cli.py", verb, "--config", stage, *stages.COMMON, *TINY]


def run(stage, root, *args, verb="fit"):
    run_main(run_cli, *command(stage, verb)[1:], "--root", root, *args)


def config_of(stage, root, *args):
    return run_cli.parse([str(word) for word in (*command(stage)[1:], "--root", root, *args)])[1]


def table_without(root, column, scan, name="edited.csv"):
    """The study's table with one blank cell."""
    columns, records = dataset.read_csv(root / "data/dataset.csv")
    rows = dataset.read_table(root / "data/dataset.csv")
    records[next(row.index for row in rows if row.scan == scan)][column] = ""
    tables.write_csv(root / "data" / name, records, columns)
    return root / "data" / name


def part_of(root, part, classes=None):
    subjects = json.loads((root / "split.json").read_text())["subjects"][part]
    return [row for row in dataset.read_table(root / "data/dataset.csv", classes=classes) if row.subject in subjects]


@pytest.fixture(scope="session")
def rows(cohort):
    return dataset.read_table(cohort / "data/dataset.csv")


# ---- targets and metrics --------------------------------------------------------------------------------------------


def test_labels_are_alphabetical_ranks(rows):
    target = supervised.Diagnosis(("MCI", "AD", "CN"), "AD")
    assert target.classes == ("AD", "CN", "MCI")
    assert [target.target(row) for row in rows] == dataset.labels(rows, ("CN", "MCI", "AD")).tolist()


@pytest.mark.parametrize("positive", ["AD", "CN"])
def test_metrics_name_the_positive_class(rows, positive):
    """MCC, AUC, balanced accuracy and both recalls agree with scikit-learn; which class is positive is said."""
    rows = [row for row in rows if row.diagnosis in ("AD", "CN")]
    target = supervised.Diagnosis(("AD", "CN"), positive)
    truth = np.array([target.target(row) for row in rows])
    logits = np.random.default_rng(0).normal(size=(len(rows), 2)) + 0.8 * np.eye(2)[truth]
    report = target.report(logits, rows, 0, 200)
    found = {name: value["value"] for name, value in report["metrics"].items()}
    called, k = logits.argmax(1), target.classes.index(positive)
    assert report["positive"] == positive == report["classes"][0]
    assert found["mcc"] == pytest.approx(matthews_corrcoef(truth, called))
    assert found["auc"] == pytest.approx(roc_auc_score(truth == k, logits[:, k] - logits[:, 1 - k]))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, called))
    for name, rank in (("AD", 0), ("CN", 1)):
        assert found[f"recall_{name}"] == pytest.approx(recall_score(truth, called, pos_label=rank))
    assert report["prevalence"][positive] == pytest.approx(np.mean(truth == k))
    low, high = report["metrics"]["auc"]["ci95"]
    assert low < found["auc"] < high
    assert np.sum(report["confusion"]) == len(rows)


def test_three_classes(rows):
    target = supervised.Diagnosis(("AD", "CN", "MCI"), "AD")
    truth = np.array([target.target(row) for row in rows])
    logits = np.random.default_rng(1).normal(size=(len(rows), 3)) + np.eye(3)[truth]
    report = target.report(logits, rows, 0, 0)
    found = {name: value["value"] for name, value in report["metrics"].items()}
    assert report["positive"] is None and found["mcc"] == pytest.approx(matthews_corrcoef(truth, logits.argmax(1)))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found["macro_auc"] == pytest.approx(roc_auc_score(truth, probabilities, multi_class="ovr"), abs=1e-9)


def test_repeated_scans_of_a_subject_do_not_narrow_the_interval(rows):
    """Whole subjects are drawn: three copies of every scan give the interval of one."""
    first = [row for row in rows if row.session == 0]
    target = supervised.Age(75.0, 8.0)
    output = np.random.default_rng(0).normal(size=(len(first), 1))
    once = target.report(output, first, 0, 300)["metrics"]["mae"]
    thrice = target.report(np.repeat(output, 3, 0), [row for row in first for _ in range(3)], 0, 300)["metrics"]["mae"]
    assert thrice["value"] == pytest.approx(once["value"]) and thrice["ci95"] == pytest.approx(once["ci95"])
    alone = supervised.Diagnosis(("AD", "CN"), "AD").report(np.eye(2), two_subjects(rows), 0, 100)
    assert alone["metrics"]["auc"] == {"value": 1.0, "ci95": None}  # too few: no interval rather than a narrow one


def two_subjects(rows):
    return [next(row for row in rows if row.diagnosis == name) for name in ("AD", "CN")]


def test_age_errors_are_global(rows):
    """RMSE over all rows: never below MAE, and not the mean of batches' RMSEs, which is smaller."""
    target = supervised.Age(75.0, 8.0)
    output = np.random.default_rng(0).normal(size=(len(rows), 1))
    found = {k: v["value"] for k, v in target.report(output, rows, 0, 0)["metrics"].items()}
    error = target.years(output) - dataset.ages(rows)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)))
    assert found["mae"] == pytest.approx(np.abs(error).mean()) and found["rmse"] >= found["mae"]
    assert found["rmse"] > 1.02 * np.mean([np.sqrt(np.mean(part**2)) for part in np.array_split(error, len(rows) // 4)])


def test_age_scale(rows, tmp_path):
    """Mean and SD of the training rows, or the original's (age - 50.4) / 97.3; the loss is in years squared."""
    own = supervised.Age.of(config_of("regression", tmp_path), rows)
    ages = dataset.ages(rows).astype(float)
    assert (own.mean, own.scale) == pytest.approx((ages.mean(), ages.std()))
    theirs = supervised.Age.of(config_of("regression", tmp_path, "--age_scale", "upstream"), rows)
    assert theirs.years(np.array([[0.482]])) == pytest.approx(50.4 + 97.3 * 0.482)
    output, wanted = torch.tensor([[0.0], [1.0]]), torch.tensor([own.mean, own.mean])
    assert own.loss(output, wanted).item() == pytest.approx(own.scale**2 / 2, rel=1e-4)


def test_class_weights_have_mean_one(rows, tmp_path):
    rows = [row for row in rows if row.diagnosis != "MCI"][:32]
    target = supervised.Diagnosis.of(config_of("classification", tmp_path, "--class_weights"), rows)
    labels = torch.tensor([target.target(row) for row in rows])
    counts = torch.bincount(labels)
    assert target.weights[labels].mean().item() == pytest.approx(1) and counts[0] != counts[1]
    assert target.weights[0] * counts[0] == pytest.approx((target.weights[1] * counts[1]).item())
    logits = torch.randn(len(rows), 2, generator=torch.Generator().manual_seed(0))
    halves = [target.loss(logits[i::2], labels[i::2]) for i in (0, 1)]  # as two ranks or micro-batches
    assert sum(halves).item() / 2 == pytest.approx(target.loss(logits, labels).item())
    plain = supervised.Diagnosis.of(config_of("classification", tmp_path), rows)
    assert plain.loss(logits, labels).item() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    with pytest.raises(UserError, match="no training scan has diagnosis CN"):
        supervised.Diagnosis.of(config_of("classification", tmp_path), [r for r in rows if r.diagnosis == "AD"])


# ---- the loop and the verbs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_fit_validate_test_predict(study, stage):
    """Facts 38 and 12: all verbs on a table with a missing age; every file carries the hash of the one split."""
    scan = dataset.read_table(study / "data/dataset.csv")[0].scan
    table = table_without(study, "age", scan)
    run(stage, study, "--csv_path", table, "--sample_every", 1, "--steps", 8)
    folder = study / "runs" / stage
    split = json.loads((study / "split.json").read_text())["hash"]
    saved = checkpoint.load(folder / "checkpoints/best.ckpt")
    assert saved["network"] == f"ldae {stage}" and saved["split"] == split and list((folder / "samples").glob("*.png"))
    used = checkpoint.load(folder / "checkpoints/last.ckpt")["config"]["scans"]
    if stage == "regression":  # scaled with ages of training subjects alone
        ages = [row.age for row in part_of(study, "train") if row.scan != scan]
        assert saved["target"]["mean"] == pytest.approx(np.mean(ages), rel=1e-6)
        assert saved["target"]["scale"] == pytest.approx(np.std(ages), rel=1e-6)
    assert stage == "classification" or scan not in used
    for verb, part in (("validate", "val"), ("test", "test")):
        run(stage, study, "--csv_path", table, verb=verb)
        report = json.loads((folder / f"{verb}.json").read_text())
        assert (report["split"], report["part"], report["network"]) == (split, part, saved["hash"])
        known = part_of(study, part, ("AD", "CN") if stage == "classification" else None)
        known = [row for row in known if stage == "classification" or row.scan != scan]
        assert report["n"] == len(known) and report["options"]["stage"] == stage
        with pytest.raises(UserError, match="add --overwrite"):
            run(stage, study, "--csv_path", table, verb=verb)
    run(stage, study, "--csv_path", table, "--part", "all", verb="predict")
    with open(folder / "predict/predictions.csv") as file:
        records = {record["scan"]: record for record in csv.DictReader(file)}
    assert len(records) == 48 and records[scan]["age"] == ""  # whatever is known of them
    if stage == "regression":
        assert all(float(record["predicted_age"]) > 0 for record in records.values())
        assert report["metrics"]["rmse"]["value"] >= report["metrics"]["mae"]["value"]
        assert report["mean_predictor"]["mae"]["value"] > 0
    else:
        sums = [float(r["probability_AD"]) + float(r["probability_CN"]) for r in records.values()]
        assert np.allclose(sums, 1) and {r["predicted"] for r in records.values()} <= {"AD", "CN"}
    assert json.loads((folder / "predict/predictions.json").read_text())["n"] == 48


def test_training_learns_the_phantoms_disease(study):
    """The loss falls and scans of training subjects are told apart: labels and scans belong together."""
    options = "--steps 120 --lr 3e-3 --drop_path 0 --encoder_dropout 0 --batch_size 8 --log_every 8 --val_every 100"
    run("classification", study, *options.split())
    losses = [row["loss"] for row in stages.log_rows(study, "classification", "train")]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    run("classification", study, "--part", "train", verb="predict")
    with open(study / "runs/classification/predict/predictions.csv") as file:
        known = [r for r in csv.DictReader(file) if r["diagnosis"] != "MCI"]
    assert np.mean([r["predicted"] == r["diagnosis"] for r in known]) > 0.8


@pytest.mark.parametrize("stage", STAGES)
def test_two_and_two_epochs_are_four(study, stage):
    """Fact 26's kind, with dropout and stochastic depth: their random numbers continue."""
    options = ("--steps", 0, "--ema_decay", 0.9, "--batch_size", 10, "--encoder_dropout", 0.1)
    run(stage, study, *options, "--epochs", 4, "--run", study / "whole")
    run(stage, study, *options, "--epochs", 2)
    run(stage, study, *options, "--epochs", 4)
    for name in ("last.ckpt", "best.ckpt"):
        assert_same_tensors(study / f"runs/{stage}/checkpoints" / name, study / "whole/checkpoints" / name)


def test_accumulated_parts_are_the_whole_batch(study):
    """Fact 24's kind: four micro-batches make one optimizer step and one update of the average."""
    options = ("--steps", 3, "--drop_path", 0, "--encoder_dropout", 0, "--ema_decay", 0.5, "--val_every", 100)
    run("regression", study, *options, "--accumulate", 4)
    run("regression", study, *options, "--run", study / "whole")
    parts, whole = (checkpoint.load(p / "checkpoints/last.ckpt") for p in (study / "runs/regression", study / "whole"))
    assert parts["ema"]["step"] == 3
    for name, value in whole["network"].items():
        assert torch.allclose(parts["network"][name], value, atol=1e-4), name


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(study, tmp_path):
    words = [*command("classification"), "--log_every", 1]
    other = shutil.copytree(study, tmp_path / "other")
    log = study / "runs/classification/log.jsonl"
    done = kill_and_resume([*words, "--root", study], lambda _: reached(log, 3)())
    assert done.returncode == 0, done.stderr
    assert run_script([*words, "--root", other]).returncode == 0
    for name in ("last.ckpt", "best.ckpt"):
        assert_same_tensors(*(root / "runs/classification/checkpoints" / name for root in (study, other)))


@pytest.mark.slow
def test_two_ranks_train_what_one_does(study, tmp_path):
    words = [*command("classification"), "--class_weights", "--drop_path", 0, "--encoder_dropout", 0, "--steps", 6]
    other = shutil.copytree(study, tmp_path / "other")
    done = two_ranks([*words, "--root", study])
    assert done.returncode == 0, done.stderr
    done = run_script([*words, "--root", other])
    assert done.returncode == 0, done.stderr
    ours, theirs = (checkpoint.load(stages.last(root, "classification"))["network"] for root in (study, other))
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=1e-3, atol=2e-4), name


# ---- files and what is refused --------------------------------------------------------------------------------------


def test_pretrained_backbone_by_path(study, tmp_path):
    """torchvision's key names, RGB stem and classifier included; another backbone is refused before the first step."""
    settings = supervised.encoder_settings(config_of("classification", study))
    torch.manual_seed(1)
    backbone = SemanticEncoder(**settings | {"in_channels": 3}).backbone.state_dict()
    path = tmp_path / "imagenet.pth"
    torch.save(backbone | {"classifier.2.weight": torch.zeros(1000, 16), "classifier.2.bias": torch.zeros(1000)}, path)
    run("classification", study, "--backbone_weights", path, "--lr", 0, "--steps", 1)
    found = checkpoint.load(stages.last(study, "classification"))["network"]
    grey = backbone["features.0.0.weight"].sum(1, keepdim=True)
    assert torch.allclose(found["encoder.backbone.features.0.0.weight"], grey)
    assert torch.equal(found["encoder.backbone.features.1.0.block.0.weight"], backbone["features.1.0.block.0.weight"])
    with pytest.raises(UserError, match="holds other weights than this encoder's backbone"):
        run("regression", study, "--backbone_weights", path, "--backbone_depths", 2, 1)
    assert not (study / "runs/regression").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_slices", 8], "cannot take axial slices"),
        (["--plane", "coronal", "--max_slices", 16], "cannot take coronal slices"),
        (["--classes", "AD", "PD"], "no row has diagnosis PD"),
        (["--batch_size", 3, "--accumulate", 2], "give a multiple of 2"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(study, options, message):
    with pytest.raises(UserError, match=message):
        run("classification", study, *options)
    assert not (study / "runs").exists()


def test_networks_of_other_stages_classes_and_splits_are_refused(study):
    run("classification", study, "--steps", 2)
    with pytest.raises(UserError, match="no regression at .*train it with"):
        run("regression", study, verb="test")
    with pytest.raises(UserError, match="holds a classification, not a regression"):
        run("regression", study, "--ckpt_path", stages.best(study, "classification"), verb="test")
    with pytest.raises(UserError, match="tells AD CN apart: give these as --classes"):
        run("classification", study, "--classes", "CN", "MCI", "--positive", "MCI", verb="test")
    run("classification", study, "--positive", "CN", verb="test")
    assert json.loads((study / "runs/classification/test.json").read_text())["positive"] == "CN"
    (study / "split.json").unlink()
    with pytest.raises(UserError, match="was trained with split"):
        run("classification", study, "--split_seed", 3, "--overwrite", verb="test")
    table = study / "data/ageless.csv"
    columns, records = dataset.read_csv(study / "data/dataset.csv")
    tables.write_csv(table, records, [c for c in columns if c != "age"])
    with pytest.raises(UserError, match="has no column age"):
        run("regression", study, "--csv_path", table)


def test_predictions_do_not_depend_on_ranks_or_order(study, rows):
    run("regression", study, "--steps", 2)
    config = config_of("regression", study)
    with runtime.start("cpu") as rt:
        trained = supervised.Trained(config, rt)
        volumes = dataset.Volumes(trained.preparation, None)
        found = supervised.outputs(trained.network, volumes, rows[:5], "axial", "", rt)
        again = supervised.outputs(trained.network, volumes, rows[:5][::-1], "axial", "", rt)
    assert found.shape == (5, 1) and np.array_equal(found, again[::-1])
    assert not trained.network.training and trained.target.scale > 0
