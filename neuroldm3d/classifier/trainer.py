"""Training and evaluation of a classifier: `train` runs every fold, `train_fold` is the loop around `classifier_step`.

Who is trained and tested on is decided in composition.py; the entry script is train.py.
"""

from __future__ import annotations

import csv
import json
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from common import checkpoint, runtime, tables, training
from common.cli import UserError, frozen
from common.runlog import Means, RunLog, git_revision, progress, write_json
from neuroldm3d import dataset, preprocess, upstream
from neuroldm3d.classifier import composition, metrics
from neuroldm3d.classifier.composition import Fold
from neuroldm3d.classifier.config import Config
from neuroldm3d.classifier.model import CNN3D, EfficientNetV2L, build_classifier, check_input_size, load_imagenet
from neuroldm3d.preprocess import Preparation

ARCHITECTURE = ("model", "dropout", "drop_path", "width", "depth", "filters")  # what rebuilds the network of a file
COLUMNS = ("img_path", "predicted_score", "original_label", "predicted_label", "performance_type")  # as published
MORE_COLUMNS = ("name", "group", "fold", "logit", "calibrated_score", "label_at_validation_threshold")
SUMMARY = "all_folds_metrics.json"
THRESHOLD = 0.5


# ---- data -----------------------------------------------------------------------------------------------------------


class BalancedVolumes(Dataset):
    """Classifier inputs (S, h, w) with labels, augmented; an item is asked for by its position in the endless stream.

    The batches are those of `dataset.balanced_batches`, epoch after epoch; everything random depends on the position.
    """

    def __init__(self, volumes: dataset.Volumes, rows: list[dataset.Row], config: Config):
        self.volumes, self.rows, self.config = volumes, rows, config
        self.labels = [row.label for row in rows]
        self.n_batches = len(self.batches(0))  # until the larger class has been seen once

    def batches(self, epoch: int) -> list[list[int]]:
        return dataset.balanced_batches(self.labels, self.config.batch_size, epoch, self.config.seed)

    def __len__(self) -> int:
        return len(self.rows)

    def index_at(self, position: int) -> int:
        """Row number of the sample at a position of the stream."""
        step, slot = divmod(position, self.config.batch_size)
        epoch, number = divmod(step, self.n_batches)
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._batches = epoch, self.batches(epoch)
        return self._batches[number][slot]

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, float]:
        _, position = item  # the stream's own order is not balanced
        row = self.rows[self.index_at(position)]
        x = augmented_input(self.volumes, row, self.config, np.random.default_rng((self.config.seed, position)))
        return torch.from_numpy(x), float(row.label)


def augmented_input(volumes: dataset.Volumes, row: dataset.Row, config: Config, rng) -> np.ndarray:
    """Classifier input (S, h, w) of a row, mirrored and turned at random as the options say."""
    x = volumes.load(row)
    if config.flips != "none":
        x = dataset.augment(x, rng, up_down=config.flips == "both")
    x = preprocess.classifier_input(x, volumes.prep, pad=config.pad)
    if config.rotation:
        degrees = rng.uniform(-config.rotation, config.rotation)
        # Deviation (original code): the corners take the background's value, not 0.
        x = preprocess.rotate_slices(x, degrees, 0.0 if config.pad == "zero" else float(x.min()))
    return x


def input_shape(prep: Preparation) -> tuple[int, int, int]:
    """(S, h, w) of classifier inputs."""
    used, (across, up) = preprocess.classifier_slices(prep), preprocess.classifier_margins(prep)
    return used.stop - used.start, prep.shape[0] + 2 * across, prep.shape[2] + 2 * up


# ---- the network and its file ---------------------------------------------------------------------------------------


def architecture(config: Config) -> dict:
    settings = {name: getattr(config, name) for name in ARCHITECTURE}
    return settings | {"in_channels": input_shape(composition.preparation(config))[0]}


def load_classifier(path: Path, rt: runtime.Runtime, *, trust_pickle: bool = False, option: str = "--model_path"):
    """Frozen classifier of a file, ours or the original's, and the rest of the file's content.

    The content has `preparation`, `pad`, and for ours `seen` (names of training and validation), `threshold`,
    `temperature`. UserError for anything else.
    """
    saved = training.read_network(path, "neuroldm3d classifier", "classifier/train.py", option, trust_pickle)
    if "network" in saved:
        network = build_classifier(saved["config"])
        checkpoint.load_weights(network, saved["state_dict"], path)
    else:
        kind, network = upstream.from_checkpoint(saved, path)
        if not isinstance(network, (EfficientNetV2L, CNN3D)):
            raise UserError(f"{path} holds a {kind}, not a classifier; name one with {option}")
        saved = {"preparation": Preparation(norm="zscore").to_dict(), "pad": "zero", "seen": None}
        saved["hash"] = checkpoint.weights_hash(network.state_dict())
    return runtime.frozen_network(network, rt).to(memory_format=network.fast_layout), saved


def classifier_step(network, x, labels, *, scale=1.0, autocast=nullcontext) -> dict[str, torch.Tensor]:
    """Accumulate the gradients of one batch; returns detached loss and accuracy.

    x: classifier inputs (B, S, h, w); labels: (B,) 0 or 1. Binary cross-entropy without class weights: the batches
    are balanced.
    """
    with autocast():
        logits = network(x)
    logits = logits.float()[:, 0]
    loss = F.binary_cross_entropy_with_logits(logits, labels)
    (scale * loss).backward()
    return {"loss": loss.detach(), "accuracy": ((logits.detach() >= 0) == (labels > 0.5)).float().mean()}


@torch.inference_mode()
def predict(network, volumes: dataset.Volumes, rows: list[dataset.Row], pad: str, batch: int, rt) -> np.ndarray:
    """Logits (n,) float64 of rows, sharded over ranks; the network's mode is put back afterwards."""
    was_training = network.training
    network.eval()
    mine, logits = rt.shard(range(len(rows))), {}
    for start in range(0, len(mine), batch):
        part = mine[start : start + batch]
        inputs = [preprocess.classifier_input(volumes.load(rows[i]), volumes.prep, pad=pad) for i in part]
        x = torch.from_numpy(np.stack(inputs)).to(rt.device)
        with rt.autocast():
            found = network(x)[:, 0]
        logits |= zip(part, found.double().cpu().tolist(), strict=True)
    network.train(was_training)
    together = {i: logit for shard in rt.gather(logits) for i, logit in shard.items()}
    return np.array([together[i] for i in range(len(rows))])


# ---- training -------------------------------------------------------------------------------------------------------


def train(config: Config, rt: runtime.Runtime, twins: list[list[str]] | None = None) -> dict:
    """Train and test every fold below RUNS/EXP; write all_folds_metrics.json, parameters.json and the predictions.

    Finished folds are kept. `twins`: what `composition.find_twins` gave for these tables, if that is known already.
    Returns the content of all_folds_metrics.json on every rank.
    """
    check_options(config, rt)
    check_input_size(architecture(config), input_shape(composition.preparation(config)))
    tables, volumes = composition.read_tables(config), composition.open_volumes(config)
    twins = composition.find_twins(tables, volumes, config, rt) if twins is None else twins
    folds = composition.compose(tables, twins, config, rt)
    for fold in folds:
        dataset.balanced_batches([row.label for row in fold.rows], config.batch_size, 0, config.seed)  # may be refused
    volumes.fill(composition.all_rows(folds), rt)
    counts = [composition.counts(fold) for fold in folds]
    generator = composition.generator_record(config, rt) if rt.is_main else None
    if config.model == "2d" and not config.weights:
        rt.print("note: EfficientNetV2 starts from scratch, the original's from ImageNet weights (--weights FILE)")
    rt.print(f"{config.mode}: {json.dumps(counts[0])}" + (f" and {len(folds) - 1} more folds" if folds[1:] else ""))
    for fold in folds:
        train_fold(config, rt, fold, volumes)
        evaluate_fold(config, rt, fold, volumes)
    if rt.is_main:  # not before: a run that is refused must leave the record of the finished one
        record = {"options": training.recorded(config), "mode": config.mode, "folds": counts, "generator": generator}
        record["git_revision"] = git_revision()
        write_json(config.folder / "parameters.json", record)
    return summarise(config, rt, folds)


def train_fold(config: Config, rt: runtime.Runtime, fold: Fold, volumes: dataset.Volumes) -> None:
    """Train one fold to RUNS/EXP/fold_K/best_model.pth (lowest validation loss); resumes its checkpoints/last.pt."""
    # ---- data
    stream = BalancedVolumes(volumes, fold.rows, config)
    steps_per_epoch, what = config.steps_per_epoch or stream.n_batches, f"fold {fold.number}"
    total = config.epochs * steps_per_epoch
    last_step = min(total, config.max_steps or total)
    validate_every = config.val_every * steps_per_epoch
    val_labels = np.array([row.label for row in fold.val])

    # ---- model
    torch.manual_seed(config.seed)
    network = build_classifier(architecture(config))
    if config.weights:
        load_imagenet(network, Path(config.weights))
    network.to(rt.device, memory_format=network.fast_layout if config.channels_last else torch.contiguous_format)
    if config.compile:
        network.compile()

    # ---- optimizer
    fused = runtime.fused_optimizer_kwargs(rt.device)
    adam = torch.optim.Adam(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, **fused)
    halving = dict(factor=0.5, patience=config.lr_patience, min_lr=config.lr_min)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, **halving)
    scaler, means = rt.grad_scaler(), Means()

    # ---- resume
    folder = config.folder / f"fold_{fold.number}"
    best_path, last_path = folder / "best_model.pth", folder / "checkpoints" / "last.pt"
    training.claim_run(best_path, last_path, config, rt)
    settings = frozen(config, {"data", "folds", "model", "training"}) | composition.names(fold)
    settings |= {"seed": config.seed, "precision": config.precision, "weights": Path(config.weights).name}
    objects = {"network": network, "optimizer": adam, "plateau": plateau, "scaler": scaler, "means": means}
    step, extra = checkpoint.resume_training(last_path, objects=objects, config=settings)
    best, stale = extra.get("best", math.inf), extra.get("stale", 0)
    if training.is_complete(what, step, last_step, stale, best_path, config, rt):
        return

    def save_last():
        if rt.is_main:
            extra = {"best": best, "stale": stale}
            checkpoint.save_training(last_path, step=step, objects=objects, config=settings, extra=extra)

    def save_best(logits):
        if rt.is_main:
            save_classifier(best_path, network, config, fold, step, steps_per_epoch, val_labels, logits)

    # ---- loop
    model = runtime.wrap_ddp(network, rt)
    batches = runtime.training_batches(stream, config.batch_size, step, config.seed, rt, config.num_workers)
    options = training.recorded(config)
    with (
        RunLog(folder, options, start_step=step, enabled=rt.is_main, data_fingerprint=composition.counts(fold)) as log,
        runtime.StopRequest() as stop,
        progress(last_step, step, what, enabled=rt.is_main) as bar,
    ):
        if step == 0:
            save_last()  # claims the folder, and a disk that is too small shows now
            if rt.is_main:
                write_json(folder / "files.json", composition.files(fold, Path(config.root)))
        while step < last_step and not stop.agree(rt):
            lr = set_learning_rate(config, adam, step // steps_per_epoch)
            x, labels = next(batches)
            x, labels = x.to(rt.device, non_blocking=True), labels.float().to(rt.device, non_blocking=True)
            # dropout and stochastic depth: a function of step and rank, so that no rank copies another's
            torch.manual_seed(runtime.generator(config.seed, "dropout", step, rt.rank).initial_seed())
            adam.zero_grad(set_to_none=True)
            means.add(classifier_step(model, x, labels, scale=scaler.get_scale(), autocast=rt.autocast))
            runtime.update_weights(scaler, config.grad_clip, network=(adam, network))
            step += 1
            bar.update()

            if step % config.log_every == 0 or step % steps_per_epoch == 0 or step == total:
                values = training.mean_losses(what, means, step, rt)
                log.log("train", step, epoch=step / steps_per_epoch, lr=lr, **values)
                bar.set_postfix({name: f"{v:.4f}" for name, v in values.items()})
            if step % validate_every == 0 or step == total:
                logits = predict(network, volumes, fold.val, config.pad, config.eval_batch, rt)
                # Deviation (original code): every volume counts alike, not every batch.
                loss = metrics.log_loss(val_labels, logits)
                if not math.isfinite(loss):
                    raise UserError(f"{what} diverged at step {step}: try a lower --learning_rate or --grad_clip 1, "
                                    "with --restart")  # fmt: skip
                auc = float(metrics.auc(val_labels, logits))
                log.log("val", step, epoch=step / steps_per_epoch, loss=loss, auc=auc)
                if config.scheduler == "plateau":
                    plateau.step(loss)
                stale, worth = stale + 1, loss if config.select == "loss" else -auc
                if worth < best:
                    best, stale = worth, 0
                    save_best(logits)
                save_last()
                if config.patience and stale >= config.patience:
                    rt.print(f"{what}: no improvement in {stale} validations, stopped at step {step}")
                    break
            elif config.save_every and step % config.save_every == 0:
                save_last()

        # ---- finish
        save_last()
        rt.barrier()  # now every rank sees whether there is a best file
        if not best_path.exists():  # cut short before its first validation: still a usable file
            save_best(predict(network, volumes, fold.val, config.pad, config.eval_batch, rt))
        rt.barrier()
    stop.leave(what, step, last_step, rt)


def check_options(config: Config, rt: runtime.Runtime) -> None:
    """UserError for intervals and batch sizes that no loop can use."""
    for name in ("batch_size", "epochs", "log_every", "val_every"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: must be at least 1")
    if config.batch_size % rt.world_size:
        raise UserError(f"--batch_size {config.batch_size} cannot be shared by {rt.world_size} ranks: give a multiple")


def set_learning_rate(config: Config, optimizer: torch.optim.Optimizer, epoch: int) -> float:
    """Set the rate of an epoch and return it; on a plateau schedule the validations set it."""
    if config.scheduler == "plateau":
        return optimizer.param_groups[0]["lr"]
    lr = config.learning_rate
    if config.scheduler == "cosine":
        lr = training.restart_cosine(epoch, lr, config.lr_t0, config.lr_t_mult, config.lr_min)
    return training.set_learning_rate(lr, optimizer)


def save_classifier(path, network, config: Config, fold: Fold, step: int, steps_per_epoch: int, labels, logits) -> None:
    """best_model.pth: weights, settings, whom it has seen, and threshold and temperature chosen on validation."""
    threshold = metrics.youden_threshold(labels, probabilities(logits))
    training.save_network(
        path, "neuroldm3d classifier", network.state_dict(), architecture(config),
        preparation=composition.preparation(config).to_dict(), pad=config.pad, step=step, epoch=step / steps_per_epoch,
        val_loss=metrics.log_loss(labels, logits), temperature=metrics.fit_temperature(labels, logits),
        threshold=threshold if math.isfinite(threshold) else THRESHOLD, counts=composition.counts(fold),
        seen=sorted(row.name for row in fold.train + fold.val),
    )  # fmt: skip


def probabilities(logits) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(logits, dtype=np.float64)))


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluate_fold(config: Config, rt: runtime.Runtime, fold: Fold, volumes: dataset.Volumes) -> None:
    """Test the best weights of a fold: individual_test_performance.csv and fold_metrics.json beside them."""
    folder = config.folder / f"fold_{fold.number}"
    network, saved = load_classifier(folder / "best_model.pth", rt)
    logits = predict(network, volumes, fold.test, config.pad, config.eval_batch, rt)
    if not rt.is_main:
        return
    labels = np.array([row.label for row in fold.test])
    tables.write_csv(folder / "individual_test_performance.csv", prediction_rows(config, fold, logits, saved))
    report = {
        "fold": fold.number,
        "epoch": saved["epoch"],
        "best_val_loss": saved["val_loss"],
        "threshold_from_validation": saved["threshold"],
        "temperature_from_validation": saved["temperature"],
        "composition": composition.counts(fold),
        "test": judge([labels], [probabilities(logits)], THRESHOLD, config),
        "called_tle_by_group": calls_by_group(fold, logits),
        "test_at_validation_threshold": judge([labels], [probabilities(logits)], saved["threshold"], config),
        "calibration": {"raw": metrics.calibration(labels, logits),
                        "temperature": metrics.calibration(labels, logits / saved["temperature"])},
        "site_only": composition.site_only_auc(fold),
    }  # fmt: skip
    report["collapsed"] = min(report["test"]["sensitivity"]["value"], report["test"]["specificity"]["value"]) == 0
    write_json(folder / "fold_metrics.json", json_ready(report))


def calls_by_group(fold: Fold, logits) -> dict[str, dict]:
    """Of HC, left, right: test volumes, how many are called TLE at 0.5, and that share with Wilson's interval."""
    called, table = probabilities(logits) >= THRESHOLD, {}
    for group in sorted({row.group for row in fold.test}):
        inside = np.array([row.group == group for row in fold.test])
        n, tle = int(inside.sum()), int(called[inside].sum())
        table[group] = {"n": n, "called_tle": tle, "share": tle / n, "ci95": metrics.wilson(tle, n)}
    return table


def judge(labels: list, scores: list, threshold: float, config: Config) -> dict:
    """Metrics of the folds' tests (their mean over folds) with SD over folds and 95 % interval, the counts and n."""
    found = [metrics.evaluate(y, s, threshold) for y, s in zip(labels, scores, strict=True)]
    bounds = metrics.intervals(labels, scores, threshold, seed=config.seed, resamples=config.bootstrap)
    counts = [metrics.counts(y, s, threshold) for y, s in zip(labels, scores, strict=True)]
    total = {cell: sum(c[cell] for c in counts) for cell in counts[0]}
    report = {"threshold": threshold, "n": sum(total.values()), "counts": total}
    for name in found[0]:
        values = [row[name] for row in found]
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        report[name] = {"value": float(np.mean(values)), "sd": sd, "ci95": bounds.get(name)}
    return report


def prediction_rows(config: Config, fold: Fold, logits, saved: dict) -> list[dict]:
    """One record per test volume: the published columns, then ours."""
    rows = []
    for row, logit in zip(fold.test, logits, strict=True):
        score = float(probabilities(logit))
        called = int(score >= THRESHOLD)
        outcome = ("T" if called == row.label else "F") + ("P" if called else "N")
        published = (composition.portable(row.file, Path(config.root)), score, row.label, called, outcome)
        calibrated = float(probabilities(logit / saved["temperature"]))
        more = (row.name, row.group, fold.number, float(logit), calibrated, int(score >= saved["threshold"]))
        rows.append(dict(zip((*COLUMNS, *MORE_COLUMNS), (*published, *more), strict=True)))
    return rows


def read_predictions(path: Path) -> list[dict]:
    """Records of an individual_test_performance.csv; numbers as numbers."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = {"predicted_score": float, "logit": float, "calibrated_score": float, "original_label": int, "fold": int}
    return [row | {name: kind(row[name]) for name, kind in numbers.items()} for row in rows]


def summarise(config: Config, rt: runtime.Runtime, folds: list[Fold]) -> dict:
    """all_folds_metrics.json: means over folds with SD (none for one fold) and intervals; prints the headline."""
    if rt.is_main:
        paths = [config.folder / f"fold_{fold.number}" for fold in folds]
        reports = [json.loads((path / "fold_metrics.json").read_text()) for path in paths]
        rows = [read_predictions(path / "individual_test_performance.csv") for path in paths]
        labels = [np.array([row["original_label"] for row in part]) for part in rows]
        scores = [np.array([row["predicted_score"] for row in part]) for part in rows]
        overall = judge(labels, scores, THRESHOLD, config)
        published = {name: {"mean": value["value"], "std": value["sd"], "ci95": value["ci95"]}
                     for name, value in overall.items() if name in metrics.NAMES}  # fmt: skip
        summary = {
            "overall_results": published,
            "n_folds": len(folds),
            "n_test": overall["n"],
            "counts": overall["counts"],
            "threshold": THRESHOLD,
            "mode": config.mode,
            "seed": config.seed,
            "intervals": "95 %: DeLong per fold (AUC), Wilson (rates of one fold), bootstrap within folds (the rest)",
            "collapsed_folds": [report["fold"] for report in reports if report["collapsed"]],
            "folds": reports,
        }
        write_json(config.folder / SUMMARY, json_ready(summary))
        auc = published["auc_roc"]
        spread = f", SD over {len(folds)} folds {auc['std']:.3f}" if len(folds) > 1 else ""
        rt.print(f"{config.exp}: AUC {auc['mean']:.3f} [{auc['ci95'][0]:.3f}, {auc['ci95'][1]:.3f}]{spread}, "
                 f"accuracy {published['accuracy']['mean']:.3f} (n = {overall['n']})")  # fmt: skip
    rt.barrier()
    return json.loads((config.folder / SUMMARY).read_text())


def json_ready(value):
    """Plain standard JSON: numbers that are not finite become null, tuples lists."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- --dry_run ------------------------------------------------------------------------------------------------------


def dry_run(config: Config, rt: runtime.Runtime) -> None:
    """Print the resolved configuration, parameter count, shapes and an estimate of training memory; write nothing."""
    check_options(config, rt)
    shape = input_shape(composition.preparation(config))
    check_input_size(architecture(config), shape)
    with torch.device("meta"):
        network = build_classifier(architecture(config))
        x = torch.zeros(config.batch_size // rt.world_size, *shape)
        with runtime.SavedBytes() as saved:
            logits = network(x)
    rt.print(json.dumps(training.recorded(config), indent=2))
    rt.print(f"inputs {tuple(x.shape)} -> logits {tuple(logits.shape)}")
    training.print_memory(network, saved, ("weights", "gradients", "Adam", "Adam"), rt)
