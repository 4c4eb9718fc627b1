"""Linear probes: what they find, how sure they are of it, and that nothing leaks between people or splits."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm

from common.cli import UserError
from ldae import probes
from ldae.codes import CodeRow, Codes

QUICK = probes.Settings(repeats=2, permutations=0, bootstrap=300)
PLAIN = replace(QUICK, repeats=1, strengths=(1e-2,))


def make_codes(n_subjects=60, *, sessions=1, dim=4, effect=1.5, seed=0, between=0.8, classes=("AD", "CN")):
    """Codes of unit variance: entry 0 is `effect` larger in the first class (half in the third), entry 1 follows age.

    between: SD of what the scans of a person share. Every fifth subject is in val, every fifth in test.
    """
    rng, rows, values = np.random.default_rng(seed), [], []
    shift = {name: effect * part for name, part in zip(classes, (1.0, 0.0, 0.5), strict=False)}
    for s in range(n_subjects):
        diagnosis, age = classes[s % len(classes)], float(rng.uniform(55, 90))
        own, split = rng.normal(size=dim) * between, {3: "val", 4: "test"}.get(s // len(classes) % 5, "train")
        for m in range(sessions):
            code = own + rng.normal(size=dim) * (1 - between**2) ** 0.5
            code[0] += shift[diagnosis]
            code[1] += (age - 72) / 5
            values.append(code)
            rows.append(CodeRow(f"sub-{s:03d}_M{6 * m:03d}", f"sub-{s:03d}", 6 * m, diagnosis, age + m / 2,
                                "FM"[s // 2 % 2], split, f"{s}_{m}.nii.gz"))  # fmt: skip
    maker = {"name": "ema_encoder", "encoder": "e" * 16}
    return Codes(np.array(values, np.float32), tuple(rows), {"maker": maker, "split": "s" * 16, "hash": "c" * 16})


def diagnosis(codes, **options):
    return probes.make_task(codes, "diagnosis", **{"classes": ("AD", "CN"), **options})


def everyone(task):
    """Every row once: the metrics themselves."""
    return np.ones((1, len(task.y)))


def quiet(_):
    pass


# ---- what a probe finds


def test_auc_of_a_known_effect():
    """Fact 30: the classes differ by d SD, so the best AUC is Phi(d / sqrt 2); the probe's interval contains it."""
    task = diagnosis(make_codes(600, effect=1.2))
    result = probes.run(task, {}, QUICK, log=quiet)
    found, best = result.record["cross_validation"]["metrics"]["auc"], norm.cdf(1.2 / 2**0.5)
    assert found["ci95"][0] < best < found["ci95"][1] and abs(found["value"] - best) < 0.03
    assert found["ci95"][1] - found["ci95"][0] < 0.1
    test = result.record["test"]["metrics"]["auc"]
    assert test["ci95"][0] < best < test["ci95"][1]


def test_components_of_one_unit_are_not_blown_up():
    """Many small entries of noise beside a large one that tells: standardised apart they drown it, on one scale not."""
    codes = make_codes(40, dim=64, effect=2.0)
    sizes = np.r_[10.0, np.full(63, 0.5)].astype(np.float32)
    components = replace(codes, values=codes.values * sizes,
                         record=codes.record | {"maker": {"name": "intensity_pca", "encoder": "x"}})  # fmt: skip
    own, apart = diagnosis(components), diagnosis(replace(components, record=codes.record))
    assert own.one_scale and not apart.one_scale
    assert apart.with_values(components).one_scale and not own.with_values(codes).one_scale  # a control by its own rule
    found = {task.one_scale: probes.cross_validate(task, QUICK) for task in (own, apart)}
    auc = {scale: probes.evaluate(own, f.scores, f.folds, everyone(own))["auc"][0] for scale, f in found.items()}
    assert auc[True] > auc[False] + 0.05 and auc[True] > norm.cdf(2 / 2**0.5) - 0.06, auc
    fitted = probes.fit(own, 1e-2, PLAIN)
    assert len(set(fitted.std)) == 1 and fitted.std[0] == pytest.approx(np.sqrt((own.codes.values.std(0) ** 2).mean()))


def test_interval_covers_the_truth_as_often_as_it_says():
    """Fact 30: of 200 studies with repeated scans, 95 % intervals hold the true AUC about 190 times, not 120."""
    covered = {True: 0, False: 0}
    best = norm.cdf(1 / 2**0.5)
    for study in range(200):
        task = diagnosis(make_codes(40, sessions=4, dim=2, effect=1.0, seed=study, between=0.95))
        scores, folds = task.codes.values[None, :, :1].astype(float), np.zeros((1, len(task.y)), int)
        alone = tuple(replace(row, subject=row.scan) for row in task.codes.rows)
        single = replace(task, codes=replace(task.codes, rows=alone))
        for by_subject, drawn in ((True, task), (False, single)):
            counts = probes.bootstrap_counts(drawn, 300, study)
            low, high = probes.interval(probes.evaluate(task, scores, folds, counts)["auc"])
            covered[by_subject] += low <= best <= high
    assert 0.88 <= covered[True] / 200 <= 0.99
    assert covered[False] / 200 < 0.8  # drawing scans instead of people would claim too much


def test_both_recalls_and_the_positive_class_are_named():
    """Fact 30: with few of the sick, accuracy hides that they are missed; the record does not."""
    codes = make_codes(200, effect=0.8)
    few = codes.select(np.array([row.diagnosis == "CN" or int(row.subject[4:]) % 10 == 0 for row in codes.rows]))
    record = probes.run(diagnosis(few), {}, QUICK, log=quiet).record
    metrics, data = record["cross_validation"]["metrics"], record["data"]["cross_validation"]
    assert record["positive"] == "AD" and record["negative"] == "CN" and record["classes"] == ["AD", "CN"]
    assert metrics["recall_AD"]["value"] < 0.5 < 0.9 < metrics["recall_CN"]["value"]
    assert metrics["accuracy"]["value"] > 0.75
    recalls = [metrics[f"recall_{name}"]["value"] for name in ("AD", "CN")]
    assert np.isclose(metrics["balanced_accuracy"]["value"], np.mean(recalls))
    assert np.isclose(data["prevalence"]["AD"], data["scans_by_class"]["AD"] / data["scans"])
    balanced = probes.run(diagnosis(few), {}, replace(QUICK, class_weight="balanced"), log=quiet).record
    assert balanced["cross_validation"]["metrics"]["recall_AD"]["value"] > metrics["recall_AD"]["value"] + 0.1
    text = probes.table(record)
    assert "Positive class: AD" in text and "recall_AD" in text and "recall_CN" in text and "Prevalence: AD" in text


def test_the_other_positive_class_swaps_the_recalls():
    a, b = (diagnosis(make_codes(), positive=name) for name in ("AD", "CN"))
    assert (a.name, b.name) == ("diagnosis_AD_vs_CN", "diagnosis_CN_vs_AD")
    found = [probes.evaluate(t, o.scores, o.folds, everyone(t))
             for t, o in ((t, probes.cross_validate(t, PLAIN)) for t in (a, b))]  # fmt: skip
    assert found[0]["recall_AD"] == found[1]["recall_AD"] and found[0]["recall_CN"] == found[1]["recall_CN"]
    assert np.isclose(found[0]["mcc"], found[1]["mcc"]) and found[0]["precision"] != found[1]["precision"]


def test_metrics_agree_with_scikit_learn():
    from sklearn import metrics

    rng = np.random.default_rng(0)
    task = diagnosis(make_codes(50))
    scores = rng.normal(size=(1, 50, 1)).round(1)
    found = {k: v[0] for k, v in probes.evaluate(task, scores, np.zeros((1, 50), int), everyone(task)).items()}
    truth, called = task.y == 0, scores[0, :, 0] > 0
    assert np.isclose(found["auc"], metrics.roc_auc_score(truth, scores[0, :, 0]))
    for name, theirs in (("accuracy", metrics.accuracy_score), ("balanced_accuracy", metrics.balanced_accuracy_score),
                         ("precision", metrics.precision_score), ("f1", metrics.f1_score),
                         ("mcc", metrics.matthews_corrcoef), ("recall_AD", metrics.recall_score)):  # fmt: skip
        assert np.isclose(found[name], theirs(truth, called)), name
    three = probes.make_task(make_codes(60, classes=("AD", "CN", "MCI")), "diagnosis")
    scores = rng.normal(size=(1, 60, 3))
    found = {k: v[0] for k, v in probes.evaluate(three, scores, np.zeros((1, 60), int), everyone(three)).items()}
    p = probes.probabilities(three, scores[0])
    assert np.isclose(found["macro_auc"], metrics.roc_auc_score(three.y, p, multi_class="ovr"))
    assert np.isclose(found["mcc"], metrics.matthews_corrcoef(three.y, p.argmax(1)))
    assert np.isclose(found["f1"], metrics.f1_score(three.y, p.argmax(1), average="macro"))
    age = probes.make_task(make_codes(50), "age")
    predicted = age.y + rng.normal(size=50)
    found = {k: v[0] for k, v in probes.errors(age.y, predicted, everyone(age)).items()}
    assert np.isclose(found["mae"], metrics.mean_absolute_error(age.y, predicted))
    assert np.isclose(found["rmse"], metrics.mean_squared_error(age.y, predicted) ** 0.5)
    assert np.isclose(found["r2"], metrics.r2_score(age.y, predicted))


def test_counts_are_resampled_rows():
    """A row that counts twice is the same as the row given twice, for every metric."""
    task = diagnosis(make_codes(30, sessions=2))
    counts = probes.bootstrap_counts(task, 5, seed=1)
    assert (counts[0] == 1).all() and (counts[:, 0::2] == counts[:, 1::2]).all()  # both scans of a person together
    by_class = [counts[:, task.y == k].sum(1) for k in (0, 1)]
    assert all((n == n[0]).all() for n in by_class)  # classes keep their sizes
    scores = np.random.default_rng(0).normal(size=(1, 60, 1))
    found = probes.evaluate(task, scores, np.zeros((1, 60), int), counts)
    for b in range(1, 6):
        index = np.repeat(np.arange(60), counts[b].astype(int))
        drawn = replace(task, codes=task.codes.select(index), y=task.y[index])
        alone = probes.evaluate(drawn, scores[:, index], np.zeros((1, 60), int), everyone(drawn))
        assert all(np.isclose(found[name][b], alone[name][0]) for name in found)


def test_auc_compares_within_folds_only():
    task = diagnosis(make_codes(60))
    found = probes.cross_validate(task, PLAIN)
    moved = found.scores + 100.0 * found.folds[..., None]  # every fold has its own scale
    before, after = (probes.evaluate(task, s, found.folds, everyone(task))["auc"] for s in (found.scores, moved))
    assert before == after
    pooled = probes.evaluate(task, moved, np.zeros_like(found.folds), everyone(task))["auc"]
    assert abs(pooled - before) > 0.05


def test_roc_curve_has_the_area_that_is_reported():
    task = diagnosis(make_codes(80, sessions=2, effect=1.0))
    found = probes.cross_validate(task, QUICK)
    fpr, tpr = probes.roc(task, found, 0)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1) and (np.diff(tpr) >= 0).all()
    area = probes.evaluate(task, found.scores, found.folds, everyone(task))["auc"].item()
    assert abs(np.trapezoid(tpr, fpr) - area) < 0.01


def test_age():
    """Fact 31: errors over all scans, RMSE >= MAE, better than the mean, which is that of the training subjects."""
    task = probes.make_task(make_codes(120, sessions=2), "age")
    result = probes.run(task, {}, QUICK, log=quiet)
    metrics, mean = result.record["cross_validation"]["metrics"], result.record["mean_predictor"]
    assert 0 < metrics["mae"]["value"] <= metrics["rmse"]["value"] < mean["metrics"]["rmse"]["value"]
    assert metrics["mae"]["value"] < 0.7 * mean["metrics"]["mae"]["value"] and mean["difference"]["ci95"][1] < 0
    assert 3.0 < metrics["rmse"]["value"] < 6.0  # the noise of entry 1 is worth 5 years, less what the prior knows
    errors = result.out_of_fold.scores[..., 0] - result.development.y
    assert np.isclose(metrics["rmse"]["value"], np.sqrt((errors**2).mean(1)).mean())
    test = result.record["test"]
    assert test["metrics"]["mae"]["value"] < test["mean_predictor"]["mae"]["value"]
    without = probes.make_task(make_codes(120, sessions=2).select(np.arange(240) % 7 > 0), "age")
    assert len(without.y) < len(task.y)


def test_rows_without_age_are_left_out():
    codes = make_codes(40)
    rows = tuple(replace(row, age=None) if i % 4 == 0 else row for i, row in enumerate(codes.rows))
    task = probes.make_task(replace(codes, rows=rows), "age")
    assert len(task.y) == 30 and np.isfinite(task.y).all()
    assert len(diagnosis(replace(codes, rows=rows)).y) == 40  # the original drops them for a diagnosis, too


def test_sex_and_three_classes():
    codes = make_codes(150, effect=4.0, classes=("AD", "CN", "MCI"))
    sex = probes.make_task(codes, "sex")
    assert sex.name == "sex_F_vs_M" and sex.positive == "F" and len(sex.y) == 150
    task = probes.make_task(codes, "diagnosis")
    result = probes.run(task, {}, QUICK, log=quiet)
    metrics = result.record["cross_validation"]["metrics"]
    assert task.kind == "multiclass" and metrics["macro_auc"]["value"] > 0.9
    assert metrics["recall_AD"]["value"] > 0.8 and metrics["recall_CN"]["value"] > 0.8
    assert np.isclose(np.sum(result.record["cross_validation"]["confusion"]), 150 * 0.8, atol=0.1)
    found = probes.directions(result)
    names = [f"diagnosis_AD_vs_CN_vs_MCI_{name}{path}" for name in task.classes for path in ("", "_means")]
    assert list(found) == names
    toward_ad = found["diagnosis_AD_vs_CN_vs_MCI_AD"]
    assert toward_ad.positive == "AD" and toward_ad.negative == "rest" and toward_ad.weight[0] > 0.5


def test_confound_is_removed():
    """Only age is in the codes, and the sick are older: the codes seem to know the disease until age is taken out."""
    rng, rows, values = np.random.default_rng(0), [], []
    for s in range(160):
        sick = s % 2
        age = float(rng.normal(80 if sick else 68, 5))
        values.append([(age - 74) / 6 + rng.normal() * 0.3, rng.normal(), rng.normal()])
        rows.append(CodeRow(f"s{s}", f"s{s}", 0, "AD" if sick else "CN", age, "F", "train", ""))
    record = {"maker": {"name": "x", "encoder": None}, "split": None}
    codes = Codes(np.array(values, np.float32), tuple(rows), record)
    raw = probes.run(diagnosis(codes), {}, QUICK, log=quiet).record["cross_validation"]["metrics"]["auc"]
    task = diagnosis(codes, nuisance=("age",))
    clean = probes.run(task, {}, QUICK, log=quiet).record
    assert raw["value"] > 0.85 and task.name == "diagnosis_AD_vs_CN_without_age"
    found = clean["cross_validation"]["metrics"]["auc"]
    assert abs(found["value"] - 0.5) < 0.15 and found["ci95"][0] < 0.55
    alone = clean["controls"]["nuisance alone"]  # what age by itself would say
    assert alone["metrics"]["auc"]["value"] > 0.85 and alone["difference"]["ci95"][1] < -0.2


def test_nuisance_columns():
    codes = make_codes(30, classes=("AD", "CN", "MCI"))
    names, values = probes.nuisance_columns(codes, ("age", "sex", "diagnosis"))
    assert names == ("age", "sex=M", "diagnosis=CN", "diagnosis=MCI") and values.shape == (30, 4)
    assert (values[:, 1] == (codes.column("sex") == "M")).all() and (values[:, 0] == codes.column("age")).all()


# ---- the fit


def test_fit_is_that_of_scikit_learn():
    """Also with fewer rows than numbers in a code, where it is done in the rows' own space."""
    from sklearn.linear_model import LogisticRegression, Ridge

    for dim in (5, 100):
        codes = make_codes(40, dim=dim)
        x = (codes.values - codes.values.mean(0, dtype=np.float64)) / codes.values.std(0, dtype=np.float64)
        task = diagnosis(codes)
        found = probes.fit(task, 0.1, PLAIN).scores(codes.values)[:, 0]
        model = LogisticRegression(C=1 / (0.1 * 40), tol=1e-8, max_iter=5000).fit(x, task.y == 0)
        assert np.allclose(found, model.decision_function(x), atol=1e-3)
        age = probes.make_task(codes, "age")
        found = probes.fit(age, 0.1, PLAIN).scores(codes.values)[:, 0]
        assert np.allclose(found, Ridge(alpha=4.0).fit(x, age.y).predict(x), atol=1e-6)


def test_constant_entries_do_no_harm():
    codes = make_codes(40)
    codes = replace(codes, values=np.concatenate([codes.values, np.full((40, 1), 3.0, np.float32)], 1))
    found = probes.fit(diagnosis(codes), 0.1, PLAIN)
    assert np.isfinite(found.weight).all() and found.std[-1] == 1


def test_penalty_is_chosen_by_the_data():
    noise = probes.choose_strength(diagnosis(make_codes(60, dim=30, effect=0.0)), QUICK, [0])
    signal = probes.choose_strength(diagnosis(make_codes(400, dim=3, effect=3.0)), QUICK, [0])
    assert noise >= 1.0 and signal <= 0.01
    assert probes.choose_strength(diagnosis(make_codes(40)), PLAIN, [0]) == 1e-2


# ---- nothing leaks


def test_a_subject_is_on_one_side_and_classes_are_spread():
    """Defect 5: the original splits rows, so that scans of a person are in training and validation."""
    task = diagnosis(make_codes(53, sessions=3))
    for seed in range(5):
        fold = probes.make_folds(task, 5, np.random.default_rng(seed))
        for subject in set(task.subjects):
            assert len(set(fold[task.subjects == subject])) == 1
        sizes = np.array([[(task.y[(fold == k)] == c).sum() / 3 for c in (0, 1)] for k in range(5)])
        assert (np.ptp(sizes, axis=0) <= 1).all() and np.ptp(sizes.sum(1)) <= 1
    again = probes.make_folds(task, 5, np.random.default_rng(4))
    assert (fold == again).all()
    with_control = task.with_values(make_codes(53, sessions=3, seed=9, dim=7))
    assert (probes.cross_validate(with_control, PLAIN).folds == probes.cross_validate(task, PLAIN).folds).all()


def test_held_out_rows_change_nothing_but_their_own_scores(monkeypatch):
    """Defects 5 and 6: neither targets nor codes of a fold's subjects touch the model that scores the others of it."""
    codes = make_codes(60, sessions=2, dim=6)
    fold = np.repeat(np.arange(60) // 2 % 5, 2)
    monkeypatch.setattr(probes, "make_folds", lambda task, k, rng: fold[: len(task.y)] % k)
    for task in (diagnosis(codes, nuisance=("age",)), probes.make_task(codes, "age")):
        before = probes.cross_validate(task, QUICK).scores
        out, kept = np.flatnonzero(fold == 0)[:8], np.flatnonzero(fold == 0)[8:]
        values, y, nuisance = codes.values.copy(), task.y.copy(), task.nuisance
        values[out] += 1000
        y[out] = 1 - y[out] if task.kind == "binary" else y[out] + 500
        if nuisance is not None:
            nuisance = nuisance.copy()
            nuisance[out] += 300
        changed = replace(task, codes=replace(codes, values=values), y=y, nuisance=nuisance)
        after = probes.cross_validate(changed, QUICK).scores
        assert np.array_equal(before[:, kept], after[:, kept]) and not np.allclose(before[:, out], after[:, out])


def test_the_test_split_changes_nothing_but_its_own_numbers():
    codes = make_codes(80)
    test = np.array([row.split == "test" for row in codes.rows])
    values = codes.values.copy()
    values[test] = np.random.default_rng(1).normal(size=values[test].shape) * 50
    a, b = (probes.run(diagnosis(c), {}, QUICK, log=quiet) for c in (codes, replace(codes, values=values)))
    assert a.record["cross_validation"] == b.record["cross_validation"] and a.record["final"] == b.record["final"]
    for name, direction in probes.directions(a).items():
        other = probes.directions(b)[name]
        assert torch.equal(direction.weight, other.weight) and torch.equal(direction.mean, other.mean)
    assert a.record["test"]["metrics"] != b.record["test"]["metrics"]
    assert a.record["data"]["test"]["subjects"] == test.sum() == 16


# ---- controls


def test_permuted_labels():
    """Fact 32: with the subjects' labels permuted the AUC is 0.5, although they can be told apart perfectly."""
    task = diagnosis(make_codes(60, sessions=3, effect=4.0, dim=3))
    settings = replace(PLAIN, permutations=40)
    found = probes.permuted_control(task, settings, observed=1.0)
    assert abs(found["mean"] - 0.5) < 3 * found["sd"] / 40**0.5 + 0.01 and 0.03 < found["sd"] < 0.15
    assert found["central95"][0] < 0.5 < found["central95"][1] < 0.9 and np.isclose(found["p"], 1 / 41)
    age = probes.permuted_control(probes.make_task(make_codes(60), "age"), replace(PLAIN, permutations=20), 3.0)
    assert age["metric"] == "mae" and age["mean"] > 8 and np.isclose(age["p"], 1 / 21)


def test_permutation_moves_whole_subjects():
    task = diagnosis(make_codes(30, sessions=3))
    moved = probes.permute_targets(task, np.random.default_rng(0))
    assert (moved.y != task.y).any() and sorted(moved.y) == sorted(task.y)
    assert all(len(set(moved.y[task.subjects == s])) == 1 for s in set(task.subjects))
    age = probes.make_task(make_codes(30, sessions=3), "age")
    moved = probes.permute_targets(age, np.random.default_rng(0))
    for s in set(age.subjects):  # the time between scans stays
        assert np.allclose(np.diff(moved.y[age.subjects == s]), np.diff(age.y[age.subjects == s]))
    means = [sorted({round(t.y[age.subjects == s].mean(), 6) for s in age.subjects}) for t in (age, moved)]
    assert np.allclose(*means)


def test_controls_share_the_folds_and_the_draws():
    codes = make_codes(100, effect=1.5)
    noise = replace(make_codes(100, effect=0.0, seed=5, dim=3), record={"maker": {"name": "noise", "encoder": None}})
    shuffled = replace(codes, values=codes.values[::-1].copy(), rows=codes.rows[::-1])  # another order, same scans
    record = probes.run(diagnosis(codes), {"same": shuffled, "noise": noise}, QUICK, log=quiet).record
    same, other = record["controls"]["same"], record["controls"]["noise"]
    assert same["difference"] == {"value": 0.0, "ci95": [0.0, 0.0]}
    assert same["metrics"] == record["cross_validation"]["metrics"]
    value = record["cross_validation"]["metrics"]["auc"]["value"] - other["metrics"]["auc"]["value"]
    assert np.isclose(other["difference"]["value"], value) and other["difference"]["ci95"][0] > 0
    with pytest.raises(UserError, match="the control noise lacks 80 scans.*export it"):
        diagnosis(codes).with_values(noise.select(np.arange(100) < 20))


# ---- rows, errors, files


def test_rows_of_a_task():
    codes = make_codes(30, sessions=3, classes=("AD", "CN", "MCI"))
    assert len(diagnosis(codes).y) == 60 and len(probes.make_task(codes, "age", diagnoses=("CN",)).y) == 30
    first = diagnosis(codes, baseline_only=True)
    assert len(first.y) == 20 and {row.session for row in first.codes.rows} == {0}
    late = codes.select(np.array([row.session > 0 for row in codes.rows]))  # no baseline scan: the first there is
    assert {row.session for row in diagnosis(late, baseline_only=True).codes.rows} == {6}


def test_errors_say_what_to_do():
    codes = make_codes(20)
    with pytest.raises(UserError, match=r"no scan has diagnosis MCI; there are: AD \(10\), CN \(10\)"):
        probes.make_task(codes, "diagnosis", classes=("AD", "MCI"))
    with pytest.raises(UserError, match="needs at least two classes, not AD"):
        probes.make_task(codes, "diagnosis", classes=("AD",))
    with pytest.raises(UserError, match="positive class CN is not one of AD, MCI"):
        both = make_codes(20, classes=("AD", "CN", "MCI"))
        probes.make_task(both, "diagnosis", classes=("AD", "MCI"), positive="CN")
    with pytest.raises(UserError, match="target 'weight': choose diagnosis, sex or age"):
        probes.make_task(codes, "weight")
    with pytest.raises(UserError, match="nuisance 'height': choose of age, sex, session"):
        probes.make_task(codes, "diagnosis", nuisance=("height",))
    nobody = replace(codes, rows=tuple(replace(row, age=None) for row in codes.rows))
    with pytest.raises(UserError, match="no scan has a known age; fill in the table"):
        probes.make_task(nobody, "age")
    one = codes.select(np.array([row.diagnosis == "CN" or row.subject == "sub-000" for row in codes.rows]))
    with pytest.raises(UserError, match=r"a class has 1 subject\(s\), cross-validation needs two"):
        probes.run(diagnosis(one), {}, QUICK, log=quiet)
    with pytest.raises(UserError, match="no scan is in val; choose other --cv_splits"):
        probes.run(diagnosis(codes.select(np.arange(20) < 4)), {}, QUICK, cv_splits=("val",), log=quiet)


def test_too_few_subjects_give_no_interval():
    """A test split with one class has no AUC, one with two subjects of a class no interval; both say so."""
    codes = make_codes(60)
    keep = np.array([row.split != "test" or row.diagnosis == "AD" for row in codes.rows])
    test = probes.run(diagnosis(codes.select(keep)), {}, QUICK, log=quiet).record["test"]
    assert test["metrics"]["auc"] == {"value": None, "ci95": None}
    assert test["reason"] == "no scan of CN in the test split"
    assert test["metrics"]["recall_AD"]["value"] is not None
    few = np.array([row.split != "test" or row.subject < "sub-020" for row in codes.rows])
    test = probes.run(diagnosis(codes.select(few)), {}, QUICK, log=quiet).record["test"]
    assert test["metrics"]["auc"]["value"] is not None and test["metrics"]["auc"]["ci95"] is None
    none = np.array([row.split != "test" for row in codes.rows])
    assert probes.run(diagnosis(codes.select(none)), {}, QUICK, log=quiet).record["test"] is None


def test_files(tmp_path):
    for task in (diagnosis(make_codes(60, sessions=2)), probes.make_task(make_codes(60), "age"),
                 probes.make_task(make_codes(60, classes=("AD", "CN", "MCI")), "diagnosis")):  # fmt: skip
        result = probes.run(task, {}, replace(PLAIN, permutations=2), log=quiet)
        path = probes.write(tmp_path, result)
        assert json.loads(path.read_text()) == json.loads(json.dumps(result.record))
        for suffix in (".md", ".csv", ".png"):
            assert (tmp_path / f"{task.name}{suffix}").stat().st_size > 100
        entries = list(csv.DictReader(io.StringIO((tmp_path / f"{task.name}.csv").read_text())))
        assert {e["scan"] for e in entries} == {row.scan for row in task.codes.rows} and len(entries) == len(task.y)
        assert {e["evaluated"] for e in entries if e["split"] == "test"} == {"test"}
        if task.kind != "regression":
            p = np.array([[float(e[f"p_{name}"]) for name in task.classes] for e in entries])
            assert np.allclose(p.sum(1), 1, atol=1e-4)
        assert "p = " in (tmp_path / f"{task.name}.md").read_text()


def test_same_seed_same_record():
    a, b, c = (probes.run(diagnosis(make_codes(40)), {}, replace(PLAIN, seed=s, permutations=2), log=quiet).record
               for s in (0, 0, 1))  # fmt: skip
    assert a == b and a["cross_validation"] != c["cross_validation"]
