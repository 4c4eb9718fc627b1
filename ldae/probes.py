"""Linear probes of semantic codes: how much of a diagnosis, of age or of sex is in them, with controls and intervals.

Logistic regression (two classes or more) and ridge regression (age) on codes that are standardised with statistics of
the training rows (ldae/codes.py: principal components by one SD). Repeated cross-validation by subject: all scans of a
person are on one side, classes (or ages) are spread evenly over the folds, the penalty is chosen by a further
cross-validation inside the training rows. The test split is used once, by the probe that was fitted on all other rows.

An AUC compares only scans that one and the same fold scored, because every fold has its own model; pairs of all
repeats count alike. 95 % intervals are percentiles of a bootstrap of subjects within classes, with the models held
fixed: they say how far the number depends on who was scanned, not on who trained the probe. `counts` (B, N) says how
often each row is in each of B samples; its first row is the data themselves, all ones.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from common import figures
from common.checkpoint import replacing
from common.cli import UserError
from common.runlog import write_json
from ldae.codes import Codes
from ldae.manipulation import Direction, without_suffix

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)  # L2 penalty per training row, of which the best is chosen
NUISANCE = ("age", "sex", "session", "diagnosis")
AGE_STRATA = 4
UNDEFINED = 0.05  # share of bootstrap samples without a value above which no interval is given
FEWEST = 3  # subjects of a class; with fewer there is nothing to draw from, and no interval


# ---- what is predicted ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A target of a probe over the rows that have it.

    y (N,): 0 for the first of `classes` (the positive one of two), 1 for the second, ...; or years. nuisance (N, k):
    covariates whose linear effect on the codes is removed inside every training set.
    """

    target: str
    kind: str  # "binary", "multiclass" or "regression"
    classes: tuple[str, ...]
    codes: Codes
    y: np.ndarray
    nuisance_names: tuple[str, ...] = ()
    nuisance: np.ndarray | None = None
    suffix: str = ""  # of the output files
    one_scale: bool = False  # of the codes: one SD for all numbers

    @property
    def name(self) -> str:
        """Of the output files: diagnosis_AD_vs_CN, sex_F_vs_M, age."""
        name = self.target if self.kind == "regression" else f"{self.target}_{'_vs_'.join(self.classes)}"
        return name + without_suffix(self.nuisance_names) + (f"_{self.suffix}" if self.suffix else "")

    @property
    def subjects(self) -> np.ndarray:
        return self.codes.column("subject").astype(str)

    @property
    def positive(self) -> str:
        return self.classes[0] if self.kind == "binary" else ""

    @property
    def headline(self) -> str:
        return {"binary": "auc", "multiclass": "macro_auc", "regression": "mae"}[self.kind]

    def select(self, mask: np.ndarray) -> Task:
        """The rows where `mask` (N,) is true."""
        nuisance = None if self.nuisance is None else self.nuisance[mask]
        return replace(self, codes=self.codes.select(mask), y=self.y[mask], nuisance=nuisance)

    def with_values(self, codes: Codes) -> Task:
        """The same rows with the codes of another maker (a control), matched by scan."""
        index = {row.scan: i for i, row in enumerate(codes.rows)}
        missing = [row.scan for row in self.codes.rows if row.scan not in index]
        if missing:
            raise UserError(f"the control {codes.name} lacks {len(missing)} scans, such as {missing[0]}; export it for "
                            "the same table")  # fmt: skip
        values = codes.values[[index[row.scan] for row in self.codes.rows]]
        return replace(self, codes=replace(self.codes, values=values), one_scale=codes.one_scale)


def make_task(
    codes: Codes, target: str, *, classes: Sequence[str] = (), positive: str = "", diagnoses: Sequence[str] = (),
    baseline_only: bool = False, nuisance: Sequence[str] = (),
) -> Task:  # fmt: skip
    """The rows of `codes` that have a target, "diagnosis", "sex" or "age", and its values.

    classes: which to tell apart (none: all there are), `positive` the first of two (by default the first named).
    diagnoses: rows of these alone take part; baseline_only: the first session of each subject. Rows without a nuisance
    value are left out. UserError where nothing can be learnt.
    """
    if target not in ("diagnosis", "sex", "age"):
        raise UserError(f"target {target!r}: choose diagnosis, sex or age")
    column = codes.column(target)
    if target == "age":
        mask = np.isfinite(column)
    else:
        classes = _ordered_classes(column, target, tuple(classes), positive)
        mask = np.isin(column.astype(str), classes) & (column != None)  # noqa: E711 - elementwise
    if diagnoses:
        mask &= np.isin(codes.column("diagnosis").astype(str), diagnoses)
    if baseline_only:
        mask &= _first_sessions(codes)
    for name in nuisance:
        mask &= _known(codes, name, target)
    if not mask.any():
        raise UserError(f"no scan has a known {target}{' and ' + ', '.join(nuisance) if nuisance else ''}; fill in the "
                        "table and export the codes again")  # fmt: skip
    codes, column = codes.select(mask), column[mask]
    names, values = nuisance_columns(codes, nuisance)
    if target == "age":
        kind, classes, y = "regression", (), column.astype(np.float64)
    else:
        kind = "binary" if len(classes) == 2 else "multiclass"
        y = np.array([classes.index(v) for v in column])
    return Task(target, kind, classes, codes, y, names, values, one_scale=codes.one_scale)


def _ordered_classes(column, target, classes, positive):
    present = Counter(v for v in column if v is not None)
    classes = tuple(dict.fromkeys(classes or sorted(present)))
    unknown = [c for c in (*classes, positive) if c and c not in present]
    if unknown:
        there = ", ".join(f"{name} ({n})" for name, n in sorted(present.items())) or "none"
        raise UserError(f"no scan has {target} {', '.join(dict.fromkeys(unknown))}; there are: {there}")
    if len(classes) < 2:
        raise UserError(f"a probe of {target} needs at least two classes, not {', '.join(classes) or 'none'}")
    if positive and positive not in classes:
        raise UserError(f"positive class {positive} is not one of {', '.join(classes)}; name one of these")
    return (positive, *(c for c in classes if c != positive)) if positive else classes


def _first_sessions(codes):
    first = {}
    for row in codes.rows:
        session = math.inf if row.session is None else row.session
        first[row.subject] = min(first.get(row.subject, math.inf), session)
    taken, mask = set(), []
    for row in codes.rows:
        is_first = (math.inf if row.session is None else row.session) == first[row.subject] and row.subject not in taken
        mask.append(is_first)
        if is_first:
            taken.add(row.subject)
    return np.array(mask)


def _known(codes, name, target):
    if name not in NUISANCE or name == target:
        raise UserError(f"nuisance {name!r}: choose of {', '.join(n for n in NUISANCE if n != target)}")
    return np.isfinite(codes.column(name)) if name == "age" else np.array([v is not None for v in codes.column(name)])


def nuisance_columns(codes: Codes, names: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Names and values (N, k) of covariates: numbers as they are, of c classes c - 1 indicators such as "sex=M"."""
    found, columns = [], []
    for name in names:
        column = codes.column(name)
        if name in ("age", "session"):
            found.append(name)
            columns.append(column.astype(np.float64))
        else:
            for value in sorted(set(column))[1:]:
                found.append(f"{name}={value}")
                columns.append((column == value).astype(np.float64))
    return tuple(found), np.stack(columns, 1) if columns else None


# ---- one fit --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How a probe is fitted and cross-validated."""

    folds: int = 5
    repeats: int = 5
    inner_folds: int = 3
    strengths: tuple[float, ...] = STRENGTHS
    iterations: int = 2000  # of the logistic regression's solver, at most
    class_weight: str | None = None  # or "balanced": every class counts alike
    permutations: int = 20
    bootstrap: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Fit:
    """A linear model of codes: scores x @ weight + bias with x = (codes - mean) / std, less the nuisance's share."""

    mean: np.ndarray  # (n,)
    std: np.ndarray
    weight: np.ndarray  # (n, K): K = 1 for two classes (log-odds of the first) and years
    bias: np.ndarray  # (K,)
    nuisance_mean: np.ndarray | None = None  # (k,)
    nuisance_weight: np.ndarray | None = None  # (k, K) score per unit

    def scores(self, values: np.ndarray, nuisance: np.ndarray | None = None) -> np.ndarray:
        """(N, K) of codes (N, n); nuisance (N, k), None takes the training means."""
        scores = (values - self.mean) / self.std @ self.weight + self.bias
        if self.nuisance_weight is not None and nuisance is not None:
            scores = scores - (nuisance - self.nuisance_mean) @ self.nuisance_weight
        return scores


def statistics(values: np.ndarray, one_scale: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population SD (n,) of codes (N, n), float64; the SD of a constant entry is given as 1.

    one_scale: the root mean square of these SDs for all of them.
    """
    values = np.asarray(values, np.float64)
    mean, std = values.mean(0), values.std(0)
    std = np.full_like(std, np.sqrt(np.mean(std**2))) if one_scale else std
    return mean, np.where(std > 1e-8 * np.maximum(1, np.abs(mean)), std, 1.0)


def fit(task: Task, strength: float, settings: Settings) -> Fit:
    """The probe of all rows of a task with one L2 penalty (per row, on standardised codes)."""
    return fit_path(task, (strength,), settings)[0]


def fit_path(task: Task, strengths: Sequence[float], settings: Settings) -> list[Fit]:
    """`fit` with each of several penalties."""
    mean, std = statistics(task.codes.values, task.one_scale)
    x = (task.codes.values - mean) / std
    x, nuisance_mean, slope = without_nuisance(x, task.nuisance)
    # An L2 penalty does not see rotations: with fewer rows than numbers in a code, fit in the rows' own space.
    basis = np.linalg.qr(x.T).Q if x.shape[1] > len(x) else None
    z = x if basis is None else x @ basis
    found = []
    for strength in strengths:
        weight, bias = _solve(task, z, strength, settings)
        weight = weight if basis is None else basis @ weight
        found.append(Fit(mean, std, weight, bias, nuisance_mean, None if slope is None else slope @ weight))
    return found


def _solve(task, z, strength, settings):
    """Weights (m, K) and biases (K,) of centred rows z (N, m)."""
    from sklearn.linear_model import LogisticRegression, Ridge

    if task.kind == "regression":
        model = Ridge(alpha=strength * len(z)).fit(z, task.y)
        return model.coef_[:, None], np.atleast_1d(model.intercept_)
    how = dict(class_weight=settings.class_weight, max_iter=settings.iterations, tol=1e-6)
    model = LogisticRegression(C=1 / (strength * len(z)), **how).fit(z, task.y)
    # Of two classes scikit-learn scores the second one; ours is the first, the positive one.
    sign = -1 if task.kind == "binary" else 1
    return sign * model.coef_.T, sign * model.intercept_


def without_nuisance(x: np.ndarray, nuisance: np.ndarray | None):
    """Normalised codes x (N, n) of zero mean without the linear effect of nuisance (N, k); with its mean and slope."""
    if nuisance is None:
        return x, None, None
    mean = nuisance.mean(0)
    slope = np.linalg.lstsq(nuisance - mean, x, rcond=None)[0]  # (k, n)
    return x - (nuisance - mean) @ slope, mean, slope


def loss(task: Task, scores: np.ndarray) -> float:
    """Mean log loss of classes, mean squared error of years: what the choice of the penalty minimises."""
    if task.kind == "regression":
        return float(np.mean((scores[:, 0] - task.y) ** 2))
    logits = np.concatenate([scores, np.zeros_like(scores)], 1) if task.kind == "binary" else scores
    top = logits.max(1, keepdims=True)
    normaliser = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
    return float(np.mean(normaliser - logits[np.arange(len(logits)), task.y]))


# ---- cross-validation -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutOfFold:
    """Scores of every row by models that have not seen its subject: (R, N, K), with the fold (R, N) of each row."""

    scores: np.ndarray
    folds: np.ndarray
    strengths: tuple[float, ...]  # chosen, one per repeat and fold
    means: np.ndarray  # (R, N) mean target of the training rows: what a predictor without codes would say


def strata(task: Task) -> dict[str, str | int]:
    """Stratum of each subject: the name of its commonest class, or the quarter of ages that it is in."""
    by_subject = {}
    for subject, value in zip(task.subjects, task.y, strict=True):
        by_subject.setdefault(subject, []).append(value)
    if task.kind != "regression":
        return {s: task.classes[Counter(values).most_common(1)[0][0]] for s, values in by_subject.items()}
    ages = {s: float(np.mean(values)) for s, values in by_subject.items()}
    edges = np.quantile(list(ages.values()), np.linspace(0, 1, AGE_STRATA + 1)[1:-1])
    return {s: int(np.searchsorted(edges, age)) for s, age in ages.items()}


def make_folds(task: Task, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Fold (N,) of every row: all rows of a subject in one, each stratum's subjects dealt out evenly."""
    members = {}
    for subject, stratum in sorted(strata(task).items()):
        members.setdefault(stratum, []).append(subject)
    deal, fold_of = int(rng.integers(folds)), {}
    for stratum in sorted(members):
        for i in rng.permutation(len(members[stratum])):
            fold_of[members[stratum][i]] = deal % folds
            deal += 1
    return np.array([fold_of[s] for s in task.subjects])


def possible_folds(task: Task, folds: int) -> int:
    """`folds`, or fewer where a class (or, for ages, everybody together) has fewer subjects."""
    groups = strata(task)
    if task.kind == "regression":
        return min(folds, len(groups))
    counts = Counter(groups.values())
    return min(folds, *(counts[name] for name in task.classes))


def choose_strength(task: Task, settings: Settings, key) -> float:
    """The penalty with the least loss in a cross-validation by subject of these rows alone."""
    folds, strengths = possible_folds(task, settings.inner_folds), settings.strengths
    if len(strengths) == 1 or folds < 2:
        return strengths[len(strengths) // 2]
    fold = make_folds(task, folds, np.random.default_rng(key))
    total = np.zeros(len(strengths))
    for k in range(folds):
        inner, held = task.select(fold != k), task.select(fold == k)
        if not len(held.y) or (task.kind != "regression" and len(set(inner.y)) < len(task.classes)):
            continue
        for i, found in enumerate(fit_path(inner, strengths, settings)):
            total[i] += loss(held, found.scores(held.codes.values, held.nuisance)) * len(held.y)
    return strengths[int(np.argmin(total))]


def cross_validate(task: Task, settings: Settings, repeats: int | None = None) -> OutOfFold:
    """Repeated cross-validation by subject; UserError for fewer than two subjects of a class.

    Folds depend on seed, subjects and strata alone, so that controls have the same ones.
    """
    folds = possible_folds(task, settings.folds)
    if folds < 2:
        raise UserError(f"probe {task.name}: a class has {folds} subject(s), cross-validation needs two; add scans")
    R, N = settings.repeats if repeats is None else repeats, len(task.y)
    scores = np.full((R, N, len(task.classes) if task.kind == "multiclass" else 1), np.nan)
    fold, means, chosen = np.zeros((R, N), int), np.zeros((R, N)), []
    for r in range(R):
        fold[r] = make_folds(task, folds, np.random.default_rng([settings.seed, r]))
        for k in range(folds):
            held = fold[r] == k
            training, test = task.select(~held), task.select(held)
            strength = choose_strength(training, settings, [settings.seed, r, k])
            found = fit(training, strength, settings)
            scores[r, held] = found.scores(test.codes.values, test.nuisance)
            means[r, held] = training.y.mean()
            chosen.append(strength)
    return OutOfFold(scores, fold, tuple(chosen), means)


# ---- metrics --------------------------------------------------------------------------------------------------------


def bootstrap_counts(task: Task, resamples: int, seed: int) -> np.ndarray:
    """`counts` (1 + resamples, N): subjects drawn with replacement within their stratum (age: among all).

    Only the data themselves, (1, N), where a stratum has fewer than FEWEST subjects.
    """
    groups = strata(task)
    names = sorted(groups)
    stratum = np.array([0 if task.kind == "regression" else groups[s] for s in names])
    resamples = 0 if min(Counter(stratum).values()) < FEWEST else resamples
    rng, drawn = np.random.default_rng([seed, 1]), np.ones((1 + resamples, len(names)))
    for value in np.unique(stratum):
        members = np.flatnonzero(stratum == value)
        drawn[1:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
    index = {s: i for i, s in enumerate(names)}
    return drawn[:, [index[s] for s in task.subjects]]


def auc(positive: np.ndarray, scores: np.ndarray, folds: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Area under the ROC curve (B,), ties half, over all pairs of one repeat and fold; nan without such pairs.

    positive: (N,) bool; scores and folds: (R, N).
    """
    a, b = np.flatnonzero(positive), np.flatnonzero(~positive)
    won, pairs = np.zeros(len(counts)), np.zeros(len(counts))
    for s, fold in zip(scores, folds, strict=True):
        same = (fold[a][:, None] == fold[b][None, :]).astype(np.float64)
        wins = (np.sign(s[a][:, None] - s[b][None, :]) + 1) / 2 * same
        won += ((counts[:, a] @ wins) * counts[:, b]).sum(1)
        pairs += ((counts[:, a] @ same) * counts[:, b]).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return won / pairs


def confusion(truth: np.ndarray, called: np.ndarray, classes: int, counts: np.ndarray) -> np.ndarray:
    """(B, K, K) numbers of rows by true class (first) and called class."""
    cells = [[counts[:, (truth == i) & (called == j)].sum(1) for j in range(classes)] for i in range(classes)]
    return np.moveaxis(np.array(cells, np.float64), 2, 0)


def rates(matrix: np.ndarray, classes: Sequence[str], binary: bool) -> dict[str, np.ndarray]:
    """Accuracy, balanced accuracy, recall of every class, MCC, and precision and F1, each (B,), of (B, K, K).

    Precision and F1 are the positive (first) class's of two, else means over classes. MCC: Gorodkin 2004; 0 where
    everything is called the same. Precision and F1 are 0 where nothing is called so; without rows there is no recall.
    """
    hits, true, called = np.einsum("bii->bi", matrix), matrix.sum(2), matrix.sum(1)
    n = true.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = hits / true
        precision = np.where(called > 0, hits / called, 0.0)
        f1 = np.where(true + called > 0, 2 * hits / (true + called), 0.0)
        spread = np.sqrt((n**2 - (called**2).sum(1)) * (n**2 - (true**2).sum(1)))
        mcc = np.where(spread > 0, (hits.sum(1) * n - (true * called).sum(1)) / spread, 0.0)
        found = {"accuracy": hits.sum(1) / n, "balanced_accuracy": recall.mean(1)}
    found |= {f"recall_{name}": recall[:, i] for i, name in enumerate(classes)}
    which = slice(0, 1) if binary else slice(None)
    return found | {"precision": precision[:, which].mean(1), "f1": f1[:, which].mean(1), "mcc": mcc}


def errors(truth: np.ndarray, predicted: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """MAE, RMSE, mean error and R2 over all rows together, each (B,); R2 against the mean of the same rows."""
    # Deviation (original code): over all rows, not averaged over batches, which makes an RMSE too small.
    n, error = counts.sum(1), predicted - truth
    squared = counts @ error**2
    total = counts @ truth**2 - (counts @ truth) ** 2 / n
    with np.errstate(invalid="ignore", divide="ignore"):
        r2 = np.where(total > 1e-12, 1 - squared / total, np.nan)
    return {"mae": counts @ np.abs(error) / n, "rmse": np.sqrt(squared / n), "mean_error": counts @ error / n, "r2": r2}


def called_classes(task: Task, scores: np.ndarray) -> np.ndarray:
    """Class index (N,) of scores (N, K): two classes at probability 0.5, more by the largest score."""
    return np.where(scores[:, 0] > 0, 0, 1) if task.kind == "binary" else scores.argmax(1)


def evaluate(task: Task, scores: np.ndarray, folds: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric, (B,), of scores (R, N, K) from folds (R, N): AUC over all repeats' pairs, others as their mean."""
    if task.kind == "regression":
        return _mean([errors(task.y, s[:, 0], counts) for s in scores])
    K, binary = len(task.classes), task.kind == "binary"
    margins = [np.stack([margin(task, s, k) for s in scores]) for k in range(1 if binary else K)]
    areas = [auc(task.y == k, found, folds, counts) for k, found in enumerate(margins)]
    matrices = [confusion(task.y, called_classes(task, s), K, counts) for s in scores]
    found = {"auc" if binary else "macro_auc": np.mean(areas, 0)}
    return found | _mean([rates(matrix, task.classes, binary) for matrix in matrices])


def _mean(parts):
    return {name: np.mean([part[name] for part in parts], 0) for name in parts[0]}


def margin(task: Task, scores: np.ndarray, k: int) -> np.ndarray:
    """Log-odds (N,) of class k against all others, of scores (N, K)."""
    if task.kind == "binary":
        return scores[:, 0] if k == 0 else -scores[:, 0]
    others = np.delete(scores, k, axis=1)
    top = others.max(1)
    return scores[:, k] - top - np.log(np.exp(others - top[:, None]).sum(1))


def interval(samples: np.ndarray) -> list[float] | None:
    """95 % interval [low, high] of the samples after the first; None where too many have no value."""
    drawn = samples[1:]
    known = drawn[np.isfinite(drawn)]
    if len(known) == 0 or len(known) < (1 - UNDEFINED) * len(drawn):
        return None
    return [float(v) for v in np.quantile(known, [0.025, 0.975])]


def summarise(samples: dict[str, np.ndarray]) -> dict[str, dict]:
    """{metric: {"value", "ci95"}}; None for what is not defined, such as an AUC of one class."""
    return {k: {"value": float(v[0]) if np.isfinite(v[0]) else None, "ci95": interval(v)} for k, v in samples.items()}


def one_line(task: Task, metrics: dict[str, dict]) -> str:
    """The headline metric with its interval, as text."""
    found = metrics[task.headline]
    value = "undefined" if found["value"] is None else f"{found['value']:.3f}"
    return value if found["ci95"] is None else f"{value} [{found['ci95'][0]:.3f}, {found['ci95'][1]:.3f}]"


# ---- controls -------------------------------------------------------------------------------------------------------


def permute_targets(task: Task, rng: np.random.Generator) -> Task:
    """The task with targets moved between subjects: each gets another's class, or mean age, for all of its scans.

    Scans of a person keep belonging together (and keep the time between them), so chance is what it is for such data.
    """
    subjects = task.subjects
    names = sorted(set(subjects))
    if task.kind == "regression":
        own = {s: task.y[subjects == s].mean() for s in names}
    else:
        own = {s: task.classes.index(name) for s, name in strata(task).items()}
    given = dict(zip(names, [own[names[i]] for i in rng.permutation(len(names))], strict=True))
    moved = np.array([given[s] for s in subjects])
    if task.kind == "regression":
        moved = moved + task.y - np.array([own[s] for s in subjects])
    return replace(task, y=moved)


def permuted_control(task: Task, settings: Settings, observed: float) -> dict:
    """The headline metric with permuted targets: mean, SD, central 95 %, and the share at least as good as `observed`.

    p counts the observed arrangement, too (Phipson & Smyth 2010), so it is never below 1 / (permutations + 1).
    """
    ones, values = np.ones((1, len(task.y))), []
    for i in range(settings.permutations):
        shuffled = permute_targets(task, np.random.default_rng([settings.seed, 2, i]))
        found = cross_validate(shuffled, replace(settings, seed=settings.seed + 1 + i), repeats=1)
        values.append(float(evaluate(shuffled, found.scores, found.folds, ones)[task.headline][0]))
    values = np.array(values)
    as_good = (values <= observed) if task.kind == "regression" else (values >= observed)
    return {
        "metric": task.headline,
        "permutations": len(values),
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
        "central95": [float(v) for v in np.quantile(values, [0.025, 0.975])],
        "p": float((1 + as_good.sum()) / (1 + len(values))),
    }


def nuisance_task(task: Task) -> Task:
    """The task with the nuisance covariates in place of the codes: what they alone predict."""
    return replace(task, codes=replace(task.codes, values=task.nuisance), nuisance=None, nuisance_names=())


# ---- a whole probe --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What `run` found: the record (plain values), out-of-fold scores, the final fit, its test scores (N_test, K)."""

    record: dict
    development: Task
    out_of_fold: OutOfFold
    controls: dict[str, OutOfFold]
    test: Task
    test_scores: np.ndarray
    final: Fit
    strength: float
    settings: Settings


def run(task: Task, controls: dict[str, Codes], settings: Settings, *, cv_splits=("train", "val"), log=print) -> Result:
    """Cross-validate a probe and its controls on the rows of `cv_splits`; judge the final one on the other rows."""
    split = task.codes.column("split").astype(str)
    inside = np.isin(split, cv_splits)
    development, test = task.select(inside), task.select(~inside)
    if not len(development.y):
        raise UserError(f"probe {task.name}: no scan is in {' or '.join(cv_splits)}; choose other --cv_splits")

    # ---- cross-validation, controls in the same folds
    log(f"{task.name}: {len(development.y)} scans of {len(set(development.subjects))} subjects")
    counts = bootstrap_counts(development, settings.bootstrap, settings.seed)
    found = cross_validate(development, settings)
    samples = evaluate(development, found.scores, found.folds, counts)
    record = describe(task, development, test, settings, cv_splits)
    metrics = summarise(samples)
    record["cross_validation"] = {
        "metrics": metrics,
        "by_repeat": [evaluate(development, s[None], f[None], counts[:1])[task.headline].item()
                      for s, f in zip(found.scores, found.folds, strict=True)],
        "strengths": {f"{s:g}": n for s, n in sorted(Counter(found.strengths).items())},
    }  # fmt: skip
    if task.kind != "regression":
        K, ones = len(task.classes), counts[:1]
        matrices = [confusion(development.y, called_classes(task, s), K, ones)[0] for s in found.scores]
        record["cross_validation"]["confusion"] = np.mean(matrices, 0).round(2).tolist()  # rows: truth
    log(f"  cross-validation: {task.headline} {one_line(task, metrics)}")

    others, compared = {}, {name: development.with_values(codes) for name, codes in controls.items()}
    if task.nuisance is not None:
        compared["nuisance alone"] = nuisance_task(development)
    record["controls"] = {}
    for name, control in compared.items():
        others[name] = cross_validate(control, settings)
        theirs = evaluate(control, others[name].scores, others[name].folds, counts)
        difference = samples[task.headline] - theirs[task.headline]
        summary = summarise(theirs)
        record["controls"][name] = {"metrics": summary, "difference": summarise({"d": difference})["d"]}
        log(f"  {name}: {task.headline} {one_line(task, summary)}")
    if task.kind == "regression":
        mean = evaluate(development, found.means[..., None], found.folds, counts)
        difference = summarise({"d": samples["mae"] - mean["mae"]})["d"]
        record["mean_predictor"] = {"metrics": summarise(mean), "difference": difference}
        log(f"  predicting the training mean: mae {one_line(task, record['mean_predictor']['metrics'])}")
    if settings.permutations:
        record["permuted"] = permuted_control(development, settings, metrics[task.headline]["value"])
        log(f"  permuted subjects: {task.headline} {record['permuted']['mean']:.3f} (mean of {settings.permutations})")

    # ---- final probe, and the test split, once
    strength = choose_strength(development, settings, [settings.seed, 3])
    final = fit(development, strength, settings)
    scores = final.scores(test.codes.values, test.nuisance)
    record["final"] = {"strength": strength, "fitted_on": list(cv_splits)}
    record["test"] = held_out(test, scores, settings, development.y.mean()) if len(test.y) else None
    if record["test"]:
        log(f"  test split: {task.headline} {one_line(task, record['test']['metrics'])} ({len(test.y)} scans)")
    return Result(record, development, found, others, test, scores, final, strength, settings)


def held_out(test: Task, scores: np.ndarray, settings: Settings, training_mean: float | None = None) -> dict:
    """Metrics of one probe's scores (N, K) on rows that it has not seen; of ages also those of `training_mean`."""
    counts = bootstrap_counts(test, settings.bootstrap, settings.seed)
    folds = np.zeros((1, len(test.y)), int)
    found = {"metrics": summarise(evaluate(test, scores[None], folds, counts))}
    if test.kind == "regression":
        if training_mean is None:
            return found
        mean = np.full((1, len(test.y), 1), training_mean)
        return found | {"mean_predictor": summarise(evaluate(test, mean, folds, counts))}
    matrix = confusion(test.y, called_classes(test, scores), len(test.classes), counts[:1])[0]
    absent = [name for i, name in enumerate(test.classes) if not (test.y == i).any()]
    reason = f"no scan of {', '.join(absent)} in the test split" if absent else ""
    return found | {"confusion": matrix.astype(int).tolist(), "reason": reason}


def describe(task: Task, development: Task, test: Task, settings: Settings, cv_splits) -> dict:
    """What was asked, of which data."""

    def data(part):
        about = {"scans": len(part.y), "subjects": len(set(part.subjects))}
        if task.kind == "regression":
            known = {"mean": float(part.y.mean()), "sd": float(part.y.std())} if len(part.y) else None
            return about | {"years": known}
        by_class = {name: int((part.y == i).sum()) for i, name in enumerate(task.classes)}
        shares = {name: n / max(1, len(part.y)) for name, n in by_class.items()}
        return about | {"scans_by_class": by_class, "prevalence": shares}

    record = {"target": task.target, "name": task.name, "kind": task.kind, "headline": task.headline}
    if task.kind != "regression":
        record["classes"] = list(task.classes)
    if task.kind == "binary":
        record |= {"positive": task.positive, "negative": task.classes[1], "threshold": "probability 0.5"}
    codes = task.codes.record
    return record | {
        "nuisance_removed": list(task.nuisance_names),
        "data": {"cross_validation": data(development), "test": data(test)},
        "cv_splits": list(cv_splits),
        "settings": {name: getattr(settings, name) for name in Settings.__dataclass_fields__},
        "folds_used": possible_folds(development, settings.folds),
        "interval": "95 % percentile bootstrap of subjects, models held fixed",
        "codes": {"maker": codes["maker"], "hash": codes.get("hash"), "split": codes.get("split")},
    }


# ---- directions -----------------------------------------------------------------------------------------------------


def directions(result: Result) -> dict[str, Direction]:
    """Directions to edit along, by file name: the probe's, and "_means" with the path of what goes with the target.

    Of more than two classes: one pair of each class against the rest, fitted with the same penalty.
    """
    task = result.development
    if task.kind != "multiclass":
        return _pair(task, result.final, task.name)
    found = {}
    for k, name in enumerate(task.classes):
        binary = replace(task, kind="binary", classes=(name, "rest"), y=(task.y != k).astype(int))
        found |= _pair(binary, fit(binary, result.strength, result.settings), f"{task.name}_{name}")
    return found


def _pair(task, final, name):
    vector = lambda v: torch.from_numpy(np.asarray(v, np.float32))  # noqa: E731
    x = (task.codes.values - final.mean) / final.std
    nuisance = {}
    if task.nuisance is not None:
        slope = final.nuisance_weight[:, 0].tolist()
        nuisance = dict(nuisance=task.nuisance_names, nuisance_mean=tuple(final.nuisance_mean.tolist()),
                        nuisance_weight=tuple(slope))  # fmt: skip
    record = task.codes.record
    probe = Direction(
        vector(final.mean), vector(final.std), vector(final.weight[:, 0]), float(final.bias[0]),
        positive=task.classes[0] if task.kind == "binary" else "older",
        negative=task.classes[1] if task.kind == "binary" else "younger",
        kind=task.kind, target=task.target, correlation=vector(x.T @ x / len(x)), codes=record.get("hash"),
        encoder=task.codes.encoder, **nuisance,
    )  # fmt: skip
    # Covariance of codes and target: for two classes, the difference of the class means.
    towards = task.y - task.y.mean() if task.kind == "regression" else (task.y == 0) - (task.y == 0).mean()
    x, _, _ = without_nuisance(x, task.nuisance)
    return {name: probe, f"{name}_means": probe.along(vector(towards @ x), "means")}


# ---- files ----------------------------------------------------------------------------------------------------------


def write(folder: Path, result: Result) -> Path:
    """NAME.json (record), .md (table), .csv (predictions), .png (figure), and the .npz directions; returns the first.

    The record is written last: where it is, the others are.
    """
    folder, name = Path(folder), result.development.name
    for stem, direction in directions(result).items():
        direction.save(folder / stem)
    for suffix, text in ((".md", table(result.record)), (".csv", predictions(result))):
        with replacing(folder / f"{name}{suffix}") as file:
            file.write(text.encode())
    figure(folder / f"{name}.png", result)
    write_json(folder / f"{name}.json", result.record)
    return folder / f"{name}.json"


def predictions(result: Result) -> str:
    """CSV of every scan: truth, and prediction out of fold (mean over repeats) or, of test rows, of the final fit."""
    task, text = result.development, io.StringIO()
    parts = (task, "out of fold", result.out_of_fold.scores.mean(0)), (result.test, "test", result.test_scores)
    classes = ["predicted_years"] if task.kind == "regression" else [f"p_{name}" for name in task.classes]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["scan", "subject", "session", "split", "evaluated", "truth", *classes])
    for part, how, scores in parts:
        shown = scores if task.kind == "regression" else probabilities(task, scores)
        for row, truth, values in zip(part.codes.rows, part.y, shown, strict=True):
            truth = float(truth) if task.kind == "regression" else task.classes[truth]
            session = "" if row.session is None else row.session
            writer.writerow([row.scan, row.subject, session, row.split, how, truth, *(f"{v:.6g}" for v in values)])
    return text.getvalue()


def probabilities(task: Task, scores: np.ndarray) -> np.ndarray:
    """(N, number of classes) of scores (N, K)."""
    logits = np.concatenate([scores, np.zeros_like(scores)], 1) if task.kind == "binary" else scores
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def table(record: dict) -> str:
    """Markdown: one line per probe and control, every metric with its interval, and the data they are of."""
    headline, names = record["headline"], list(record["cross_validation"]["metrics"])

    def cell(found):
        if found["value"] is None:
            return "-"
        low_high = f" [{found['ci95'][0]:.3f}, {found['ci95'][1]:.3f}]" if found["ci95"] else ""
        return f"{found['value']:.3f}{low_high}"

    def line(label, metrics, difference=None):
        cells = [cell(metrics[name]) for name in names] + [cell(difference) if difference else ""]
        return f"| {label} | " + " | ".join(cells) + " |"

    columns = ["", *names, f"probe minus this ({headline})"]
    lines = [f"# Probe {record['name']}", "", about(record), ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines.append(line("probe, cross-validated", record["cross_validation"]["metrics"]))
    lines += [line(name, c["metrics"], c["difference"]) for name, c in record["controls"].items()]
    if "mean_predictor" in record:
        mean = record["mean_predictor"]
        lines.append(line("predicting the mean", mean["metrics"], mean["difference"]))
    if record["test"]:
        lines.append(line("probe, test split", record["test"]["metrics"]))
    if "permuted" in record:
        found = record["permuted"]
        low, high = found["central95"]
        lines += ["", f"Subjects permuted ({found['permutations']} times): {headline} {found['mean']:.3f}, central "
                      f"95 % {low:.3f} to {high:.3f}; p = {found['p']:.3g}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def about(record: dict) -> str:
    """A sentence or two on data and reading."""
    data, settings = record["data"]["cross_validation"], record["settings"]
    folds = f"{settings['repeats']} x {record['folds_used']}-fold"
    text = (f"{data['scans']} scans of {data['subjects']} subjects; {folds} cross-validation by subject; in brackets "
            "95 % intervals (bootstrap of subjects). ")  # fmt: skip
    if record["kind"] != "regression":
        text += "Prevalence: " + ", ".join(f"{k} {v:.1%}" for k, v in data["prevalence"].items()) + ". "
    if record["kind"] == "binary":
        text += f"Positive class: {record['positive']} (precision, F1, AUC). "
    if record["nuisance_removed"]:
        text += f"Removed from the codes: {', '.join(record['nuisance_removed'])}. "
    return text.strip()


def figure(path: Path, result: Result) -> Path:
    """ROC curves of probe and controls (more than two classes: each against the rest), or the errors of the ages."""
    task, found = result.development, result.out_of_fold
    if task.kind == "regression":
        lines = {"out of fold": (task.y, found.scores.mean(0)[:, 0] - task.y)}
        if len(result.test.y):
            lines["test split"] = (result.test.y, result.test_scores[:, 0] - result.test.y)
        return figures.curves(path, lines, xlabel="age (years)", ylabel="predicted minus true age (years)",
                              title=task.name, points=True)  # fmt: skip
    if task.kind == "binary":
        areas = {"codes": result.record["cross_validation"]["metrics"]}
        areas |= {name: control["metrics"] for name, control in result.record["controls"].items()}
        sources = {"codes": found} | result.controls
        lines = {f"{name} ({areas[name]['auc']['value']:.2f})": roc(task, s, 0) for name, s in sources.items()}
        rate = f"recall of {task.positive}"
    else:
        lines = {f"{name} against the rest": roc(task, found, k) for k, name in enumerate(task.classes)}
        rate = "true positive rate"
    return figures.curves(path, lines, xlabel="false positive rate", ylabel=rate, title=task.name, diagonal=True)


def roc(task: Task, found: OutOfFold, k: int) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates of class k: the mean of the folds' curves, by their number of pairs.

    The area under it is the AUC of `evaluate`.
    """
    grid, total, pairs = np.linspace(0, 1, 201), np.zeros(201), 0
    for scores, folds in zip(found.scores, found.folds, strict=True):
        odds = margin(task, scores, k)
        for fold in np.unique(folds):
            positive = np.sort(odds[(folds == fold) & (task.y == k)])
            negative = np.sort(odds[(folds == fold) & (task.y != k)])
            weight = len(positive) * len(negative)
            if weight:
                total += weight * _roc_of_one(positive, negative, grid)
                pairs += weight
    return np.concatenate([[0], grid]), np.concatenate([[0], total / pairs])


def _roc_of_one(positive, negative, grid):
    thresholds = np.unique(np.concatenate([positive, negative]))[::-1]
    tpr = 1 - np.searchsorted(positive, thresholds) / len(positive)
    fpr = 1 - np.searchsorted(negative, thresholds) / len(negative)
    tpr, fpr = np.concatenate([[0], tpr]), np.concatenate([[0], fpr])
    # A step has several rates at one false positive rate: the last of them holds from there on.
    return np.interp(grid, fpr + 1e-12 * np.arange(1 - len(fpr), 1), tpr)
