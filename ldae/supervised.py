"""Supervised baselines of LDAE: diagnosis or age straight from the scan, by the 2.5D encoder and a linear layer.

Lozupone et al., arXiv 2504.08635. `supervised_step` is the training step, `Diagnosis` and `Age` are the two targets,
`train` the loop around them (entry script: run_cli.py). Subjects are split as in every other stage.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from common import checkpoint, figures, runtime, tables, training
from common.cli import UserError, frozen
from common.ema import EMA
from common.runlog import Means, RunLog, progress, write_json
from ldae import dataset, probes
from ldae.aekl import (
    check_split,
    claim_output,
    fill_cache,
    open_split,
    part_rows,
    preparation,
    report_path,
)
from ldae.config import ClassificationConfig, RegressionConfig, SupervisedConfig
from ldae.encoder import SemanticEncoder, SliceClassifier, SliceRegressor, to_slices
from ldae.preprocess import Preparation
from ldae.representation import build_encoder, encoder_settings

ADAM_EPS = 1e-7
UPSTREAM_AGE = (50.4, 97.3)  # the original's: age' = (age - 50.4) / 97.3, whatever the data


# ---- what is learnt -------------------------------------------------------------------------------------------------


class Diagnosis:
    """Classes as alphabetical ranks; cross-entropy; the best weights have the highest MCC."""

    kind, need = "ldae classification", ("subject", "path", "diagnosis")

    def __init__(self, classes, positive: str, weights=None):
        """weights: of the classes in the loss, by rank; None: all the same."""
        self.classes, self.positive = tuple(sorted(set(classes))), positive
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self.outputs = len(self.classes)

    @classmethod
    def of(cls, config: ClassificationConfig, rows: list[dataset.Row]) -> Diagnosis:
        """With `class_weights`, inverse frequencies among the training rows, of mean 1 over them."""
        labels = dataset.labels(rows, config.classes)
        counts = np.bincount(labels, minlength=len(set(config.classes)))
        if not counts.all():
            absent = sorted(set(config.classes))[int(np.argmin(counts))]
            raise UserError(f"no training scan has diagnosis {absent}; choose other --classes or another --split")
        weights = (len(labels) / (len(counts) * counts)).tolist() if config.class_weights else None
        return cls(config.classes, config.positive, weights)

    def to_dict(self) -> dict:
        weights = None if self.weights is None else self.weights.tolist()
        return {"classes": list(self.classes), "positive": self.positive, "weights": weights}

    def target(self, row: dataset.Row) -> int:
        return self.classes.index(row.diagnosis)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of logits (B, K); weights multiply a sample's term, so that ranks and micro-batches add up."""
        terms = F.cross_entropy(logits, labels, reduction="none")
        return (terms if self.weights is None else terms * self.weights.to(terms.device)[labels]).mean()

    def report(self, logits: np.ndarray, rows: list[dataset.Row], seed: int, resamples: int) -> dict:
        """Metrics with 95 % intervals over subjects; of two classes precision, F1 and AUC are the positive one's."""
        order = [self.positive, *(name for name in self.classes if name != self.positive)]
        logits = logits[:, [self.classes.index(name) for name in order]]
        truth = np.array([order.index(row.diagnosis) for row in rows])
        counts = bootstrap_counts(rows, truth, seed, resamples)
        two, one_fold = len(order) == 2, np.zeros((1, len(rows)), int)
        areas = [probes.auc(truth == k, margin(logits, k)[None], one_fold, counts) for k in range(len(order))]
        found = {"auc": areas[0]} if two else {"macro_auc": np.mean(areas, 0)}
        matrix = probes.confusion(truth, logits.argmax(1), len(order), counts)
        found |= probes.rates(matrix, order, two)
        shares = {name: float(np.mean(truth == k)) for k, name in enumerate(order)}
        return {"positive": self.positive if two else None, "prevalence": shares, "classes": order,
                "confusion": matrix[0].astype(int).tolist(), "metrics": probes.summarise(found)}  # fmt: skip

    def score(self, logits: np.ndarray, rows: list[dataset.Row]) -> tuple[dict[str, float], list[float]]:
        """Scores of a validation, and what is compared between validations, higher is better."""
        found = self.report(logits, rows, 0, 0)["metrics"]
        targets = torch.tensor([self.target(row) for row in rows])
        loss = self.loss(torch.from_numpy(logits).float(), targets).item()
        scores = {"val_loss": loss, "val_mcc": found["mcc"]["value"]}
        scores |= {f"val_{k}": found[k]["value"] for k in ("auc", "macro_auc", "balanced_accuracy") if k in found}
        return scores, [scores["val_mcc"], -loss]  # the loss decides where the MCC is the same, as it is at first

    def columns(self, logits: np.ndarray) -> dict[str, list]:
        """Columns of the table of predictions."""
        probabilities = torch.from_numpy(logits).softmax(1).T.tolist()
        called = [self.classes[k] for k in logits.argmax(1)]
        return {"predicted": called} | {f"probability_{k}": p for k, p in zip(self.classes, probabilities, strict=True)}

    def draw(self, path: Path, logits: np.ndarray, rows: list[dataset.Row]) -> Path:
        """ROC curve of every class against the others."""
        truth = np.array([self.target(row) for row in rows])
        lines = {}
        for k, name in enumerate(self.classes):
            order = np.argsort(-margin(logits, k), kind="stable")
            hit = (truth == k)[order]
            lines[name] = tuple(np.r_[0, np.cumsum(x) / max(1, x.sum())] for x in (~hit, hit))
        return figures.curves(path, lines, xlabel="1 - specificity", ylabel="sensitivity", diagonal=True)


class Age:
    """Age in years from a normalised output; squared error in years; the best weights have the lowest MAE."""

    kind, need, outputs = "ldae regression", ("subject", "path", "age"), 1

    def __init__(self, mean: float, scale: float):
        self.mean, self.scale = mean, scale

    @classmethod
    def of(cls, config: RegressionConfig, rows: list[dataset.Row]) -> Age:
        """Mean and SD of the training rows, or the original's constants."""
        if config.age_scale == "upstream":
            return cls(*UPSTREAM_AGE)
        ages = dataset.ages(rows).astype(np.float64)
        return cls(float(ages.mean()), float(ages.std()) or 1.0)

    def to_dict(self) -> dict:
        return {"mean": self.mean, "scale": self.scale}

    def target(self, row: dataset.Row) -> float:
        return row.age

    def years(self, output):
        """Output (..., 1) of the network in years (...)."""
        return output[..., 0] * self.scale + self.mean

    def loss(self, output: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
        """Mean squared error in years; rows without an age never get here."""
        return F.mse_loss(self.years(output), ages.float())

    def report(self, output: np.ndarray, rows: list[dataset.Row], seed: int, resamples: int) -> dict:
        """Errors over all rows together with 95 % intervals over subjects, and those of the training mean."""
        # Deviation (original code): not averaged over batches, which makes an RMSE too small.
        truth, predicted = dataset.ages(rows).astype(np.float64), self.years(output.astype(np.float64))
        counts = bootstrap_counts(rows, np.zeros(len(rows), int), seed, resamples)
        mean = probes.errors(truth, np.full_like(truth, self.mean), counts)
        return {"unit": "years", "metrics": probes.summarise(probes.errors(truth, predicted, counts)),
                "mean_predictor": probes.summarise({k: mean[k] for k in ("mae", "rmse")})}  # fmt: skip

    def score(self, output: np.ndarray, rows: list[dataset.Row]) -> tuple[dict[str, float], list[float]]:
        found = self.report(output, rows, 0, 0)["metrics"]
        scores = {f"val_{name}": found[name]["value"] for name in ("mae", "rmse", "mean_error")}
        return scores, [-scores["val_mae"]]

    def columns(self, output: np.ndarray) -> dict[str, list]:
        return {"predicted_age": self.years(output).tolist()}

    def draw(self, path: Path, output: np.ndarray, rows: list[dataset.Row]) -> Path:
        """Predicted against true age."""
        lines = {"scans": (dataset.ages(rows), self.years(output))}
        return figures.curves(path, lines, xlabel="age [years]", ylabel="predicted", diagonal=True, points=True)


TARGETS = {"classification": Diagnosis, "regression": Age}


def margin(logits: np.ndarray, k: int) -> np.ndarray:
    """Log-odds (N,) of class k against the others, of logits (N, K)."""
    others = np.delete(logits, k, axis=1)
    top = others.max(1)
    return logits[:, k] - top - np.log(np.exp(others - top[:, None]).sum(1))


def bootstrap_counts(rows: list[dataset.Row], labels: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """`counts` (1 + resamples, N) for probes' metrics: ones, then subjects drawn within the label of their last row.

    No draws, hence no intervals, where a label has fewer than probes.FEWEST subjects.
    """
    stratum = {row.subject: label for row, label in zip(rows, labels.tolist(), strict=True)}
    names = sorted(stratum)
    resamples = resamples if min(Counter(stratum.values()).values()) >= probes.FEWEST else 0
    rng, drawn = np.random.default_rng([seed, 1]), np.ones((1 + resamples, len(names)))
    for value in sorted(set(stratum.values())):
        members = [i for i, name in enumerate(names) if stratum[name] == value]
        drawn[1:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
    index = {name: i for i, name in enumerate(names)}
    return drawn[:, [index[row.subject] for row in rows]]


# ---- networks and data ----------------------------------------------------------------------------------------------


def with_head(encoder: SemanticEncoder, target: Diagnosis | Age) -> nn.Module:
    """The network of a target around an encoder."""
    return SliceRegressor(encoder) if isinstance(target, Age) else SliceClassifier(encoder, target.outputs)


class TrainingScans(Dataset):
    """Prepared volumes (1, D, H, W) with their targets; asked for by (index, position in the endless stream)."""

    def __init__(self, volumes: dataset.Volumes, rows: list[dataset.Row], target: Diagnosis | Age):
        self.volumes, self.rows, self.target = volumes, rows, target

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, float | int]:
        row = self.rows[item[0]]
        return self.volumes.tensor(row), self.target.target(row)


def supervised_step(network, x, wanted, target, plane, *, scale=1.0, autocast=nullcontext) -> dict[str, torch.Tensor]:
    """Accumulate one batch's gradients; returns the detached loss. x: prepared volumes (B, 1, D, H, W); wanted (B,)."""
    with autocast():
        output = network(to_slices(x, plane))
    loss = target.loss(output.float(), wanted)
    (scale * loss).backward()
    return {"loss": loss.detach()}


@torch.inference_mode()
def outputs(network, volumes: dataset.Volumes, rows: list[dataset.Row], plane: str, what: str, rt) -> np.ndarray:
    """Network outputs (N, K) float64 of rows, sharded over ranks; the network's mode is put back afterwards."""
    was_training = network.training
    network.eval()
    mine, found = rt.shard(range(len(rows))), {}
    with progress(len(mine), 0, what, enabled=rt.is_main and bool(what)) as bar:
        for i in mine:
            with rt.autocast():
                output = network(to_slices(volumes.tensor(rows[i])[None].to(rt.device), plane))
            found[i] = output[0].double().cpu().tolist()
            bar.update()
    network.train(was_training)
    together = {i: values for part in rt.gather(found) for i, values in part.items()}
    return np.array([together[i] for i in range(len(rows))], np.float64)


# ---- training -------------------------------------------------------------------------------------------------------


def train(config: SupervisedConfig, rt: runtime.Runtime) -> None:
    """Train to RUN/checkpoints/best.ckpt (highest val_mcc, lowest val_mae); resumes RUN/checkpoints/last.ckpt."""
    # ---- data
    training.check_options(config, rt)
    kind = TARGETS[config.stage]
    prep = preparation(config)
    split, (rows, held_out) = open_split(config, rt, "train", "val", need=kind.need)
    target = kind.of(config, rows)
    volumes = dataset.Volumes(prep, config.cache_folder)
    fill_cache(volumes, rows + held_out, rt)
    steps_per_epoch = math.ceil(len(rows) / config.batch_size)
    total = config.steps or config.epochs * steps_per_epoch
    last_step = min(total, config.max_steps or total)
    every = {name: getattr(config, name) * steps_per_epoch for name in ("val_every", "sample_every")}

    # ---- model
    torch.manual_seed(config.seed)
    encoder, source = build_encoder(config, prep.shape)
    network = with_head(encoder, target).to(rt.device)
    if config.compile:
        network.compile()

    # ---- optimizer and EMA
    fused = runtime.fused_optimizer_kwargs(rt.device)
    optimizer = torch.optim.Adam(
        network.parameters(), lr=config.lr, eps=ADAM_EPS, weight_decay=config.weight_decay, **fused
    )
    ema = EMA(network, config.ema_decay, start_step=steps_per_epoch) if config.ema_decay else None
    scaler, means = rt.grad_scaler(), Means()

    # ---- resume
    folder, best_path, last_path = Path(config.run), config.best_path, config.last_path
    training.claim_run(best_path, last_path, config, rt)
    fixed = frozen(config, {"data", "model", "loss", "training"})
    fixed |= {"seed": config.seed, "precision": config.precision, "backbone_weights": source}
    fixed |= {"split": split.hash, "scans": [row.scan for row in rows], "targets": [target.target(row) for row in rows]}
    objects = {"network": network, "optimizer": optimizer, "scaler": scaler, "means": means}
    objects |= {"ema": ema} if ema else {}
    step, extra = checkpoint.resume_training(last_path, objects=objects, config=fixed)
    best, stale = extra.get("best", [-math.inf]), extra.get("stale", 0)
    if training.is_complete(config.stage, step, last_step, stale, best_path, config, rt):
        return
    kept = ema.module if ema else network  # what is validated and written

    def save_last():
        means.share(rt)
        if rt.is_main:
            extra = {"best": best, "stale": stale}
            checkpoint.save_training(last_path, step=step, objects=objects, config=fixed, extra=extra)

    def save_best(scores):
        if rt.is_main:
            training.save_network(
                best_path, kind.kind, kept.state_dict(), encoder_settings(config), target=target.to_dict(),
                plane=config.plane, preparation=prep.to_dict(), split=split.hash, step=step, scores=scores,
            )  # fmt: skip

    # ---- loop
    model = runtime.wrap_ddp(network, rt)
    stream = TrainingScans(volumes, rows, target)
    batches = runtime.training_batches(stream, config.batch_size, step, config.seed, rt, config.num_workers)
    fingerprint = {"split": split.hash, "train": len(rows), "val": len(held_out)}
    options = training.recorded(config)
    with (
        RunLog(folder, options, start_step=step, enabled=rt.is_main, data_fingerprint=fingerprint) as log,
        runtime.StopRequest() as stop,
        progress(last_step, step, config.stage, enabled=rt.is_main) as bar,
    ):
        if step == 0:
            save_last()  # claims the folder, and a disk that is too small shows now
        while step < last_step and not stop.agree(rt):
            lr = training.set_learning_rate(config.lr * training.learning_rate_factor(config, step, total), optimizer)
            x_batch, wanted_batch = (x.to(rt.device, non_blocking=True) for x in next(batches))
            optimizer.zero_grad(set_to_none=True)
            for x, wanted in runtime.micro_batches(config.accumulate, x_batch, wanted_batch):
                scale = scaler.get_scale() / config.accumulate
                means.add(supervised_step(model, x, wanted, target, config.plane, scale=scale, autocast=rt.autocast))
            norms = runtime.update_weights(scaler, config.grad_clip, grad_norm=(optimizer, network))
            if ema:
                ema.update(network)
            step += 1
            bar.update()

            if step % config.log_every == 0 or step % steps_per_epoch == 0 or step == total:
                values = training.mean_losses(config.stage, means, step, rt)
                log.log("train", step, epoch=step / steps_per_epoch, lr=lr, **values, **norms)
                bar.set_postfix({name: f"{v:.4g}" for name, v in values.items()})
            if step % every["val_every"] == 0 or step == total:
                found = outputs(kept, volumes, held_out, config.plane, "", rt)
                scores, score = target.score(found, held_out)
                log.log("val", step, epoch=step / steps_per_epoch, **scores)
                if rt.is_main and config.sample_every and (step % every["sample_every"] == 0 or step == total):
                    picture = folder / "samples" / "latest.png"
                    log.image("validation", step, target.draw(picture, found, held_out))
                stale += 1
                if score > best:
                    best, stale = score, 0
                    save_best(scores)
                save_last()
                if config.patience and stale >= config.patience:
                    rt.print(f"{config.stage}: no improvement in {stale} validations, stopped at step {step}")
                    break
            elif config.save_every and step % config.save_every == 0:
                save_last()

        # ---- finish
        save_last()
        if not best_path.exists():
            save_best({})  # cut short before its first validation: still a usable file
        rt.barrier()
    stop.leave(config.stage, step, last_step, rt)


# ---- using the network ----------------------------------------------------------------------------------------------


class Trained:
    """A frozen network of a file with its target, preparation, plane, and hashes of its weights and split."""

    def __init__(self, config: SupervisedConfig, rt: runtime.Runtime):
        kind, path = TARGETS[config.stage], Path(config.ckpt_path)
        command = f"run_cli.py fit --config ldae/config/{config.stage}.yaml"
        saved = training.read_network(path, kind.kind, command, "--ckpt_path", config.trust_pickle)
        if "network" not in saved:
            raise UserError(f"{path} is no network file of this program; name one with --ckpt_path")
        self.target = kind(**saved["target"])
        network = with_head(SemanticEncoder(**saved["config"]), self.target)
        checkpoint.load_weights(network, saved["state_dict"], path)
        self.network = runtime.frozen_network(network, rt)
        if config.stage == "classification":
            if set(config.classes) != set(self.target.classes):
                raise UserError(f"{path} tells {' '.join(self.target.classes)} apart: give these as --classes")
            self.target.positive = config.positive
        self.preparation, self.plane = Preparation.from_dict(saved["preparation"]), saved["plane"]
        self.hash, self.split_hash = saved["hash"], saved["split"]


def validate(config: SupervisedConfig, rt: runtime.Runtime) -> None:
    """Metrics of the validation subjects, to RUN/validate.json."""
    measure(config, rt, "validate", "val")


def test(config: SupervisedConfig, rt: runtime.Runtime) -> None:
    """Metrics of the test subjects, to RUN/test.json."""
    measure(config, rt, "test", "test")


def measure(config: SupervisedConfig, rt: runtime.Runtime, verb: str, part: str) -> None:
    path, trained = report_path(config, verb), Trained(config, rt)
    split, (rows,) = open_split(config, rt, part, need=trained.target.need)
    check_split(trained, split.hash, config)
    volumes = dataset.Volumes(trained.preparation, config.cache_folder)
    found = outputs(trained.network, volumes, rows, trained.plane, verb, rt)
    if rt.is_main:
        report = trained.target.report(found, rows, config.seed, config.bootstrap)
        about = {"stage": config.stage, "part": part, "n": len(rows), "subjects": len({row.subject for row in rows})}
        about |= {"split": split.hash, "network": trained.hash, **report, "options": training.recorded(config)}
        write_json(path, about)
        shown = ", ".join(f"{name} {text(value)}" for name, value in report["metrics"].items())
        rt.print(f"{config.stage} of {len(rows)} scans of {about['subjects']} {part} subjects: {shown} ({path})")


def text(value: dict) -> str:
    """A metric and its interval."""
    if value["value"] is None:
        return "undefined"
    low_high = "" if value["ci95"] is None else f" [{value['ci95'][0]:.3g}, {value['ci95'][1]:.3g}]"
    return f"{value['value']:.3g}{low_high}"


def predict(config: SupervisedConfig, rt: runtime.Runtime) -> None:
    """Probabilities or ages of all scans of --part, whatever is known of them: OUT/predictions.csv and .json."""
    folder, trained = claim_output(config, rt), Trained(config, rt)
    rows, split_hash = part_rows(config, rt)
    check_split(trained, split_hash, config)
    volumes = dataset.Volumes(trained.preparation, config.cache_folder)
    columns = trained.target.columns(outputs(trained.network, volumes, rows, trained.plane, "predict", rt))
    if rt.is_main:
        known = ("scan", "subject", "session", "diagnosis", "age")
        records = [{name: getattr(row, name) for name in known} for row in rows]
        records = [record | {name: values[i] for name, values in columns.items()} for i, record in enumerate(records)]
        tables.write_csv(folder / "predictions.csv", records, [*known, *columns])
        about = {"stage": config.stage, "part": config.part, "n": len(rows), "split": split_hash}
        about |= {"network": trained.hash, "target": trained.target.to_dict(), "options": training.recorded(config)}
        write_json(folder / "predictions.json", about)
        rt.print(f"predictions of {len(rows)} scans: {folder / 'predictions.csv'}")


def dry_run(config: SupervisedConfig, rt: runtime.Runtime) -> None:
    """Print the resolved configuration, parameter count, shapes and an estimate of training memory; write nothing."""
    training.check_options(config, rt)
    local = config.batch_size // rt.world_size // config.accumulate
    target = Age(0, 1) if config.stage == "regression" else Diagnosis(config.classes, config.positive)
    with torch.device("meta"):
        network = with_head(build_encoder(config, config.shape)[0], target)
        slices = to_slices(torch.zeros(local, 1, *config.shape), config.plane)
        with runtime.SavedBytes() as saved:
            output = network(slices)
    rt.print(json.dumps(training.recorded(config), indent=2))
    rt.print(f"slices {tuple(slices.shape)} -> {tuple(output.shape)}")
    copies = ("weights", "gradients", "Adam", "Adam") + (("EMA",) if config.ema_decay else ())
    training.print_memory(network, saved, copies, rt)
