"""The claims of LDAE, tested on longitudinal phantoms whose truth is known.

    python ldae/reproduce.py                  # about an hour on one CPU core
    python ldae/reproduce.py --preset smoke   # the demo: minutes, the same claims on fewer subjects

One cohort (AD, CN, MCI; three sessions each) goes through the documented stages at the `tiny` preset's sizes:
autoencoder, latents, prior, representation, codes, probes, edits, interpolation, benchmark. Running it again continues
where it stopped. Writes OUT/results.json and OUT/figures/*.png and prints: claim, pass or fail, ours on the phantom,
the paper's number on its data.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

import numpy as np

from common import cli
from common.cli import CommonOptions, UserError, option

HERE = Path(__file__).resolve().parent
DOSES = (-4.0, -2.0, 2.0, 4.0)  # (c) edits in logits of AD
Z_SD = (0.9, 1.1)  # (a) of z_T, to count as close to a unit Gaussian
AUC = 0.85  # (b)
# (b) Not a control of what training adds, but what a linear model finds in the voxels of this phantom themselves.
LINEAR = "intensity_pca"


@dataclass
class Options(CommonOptions):
    preset: str = option("phantom", "phantom: the figures of the README; smoke: the demo")
    out: str = option(str(HERE / "runs" / "reproduce"), "folder of cohort, runs, results.json and figures")
    n_subjects: int = option(480, "subjects, each with three sessions; a fifth of them is the test split")
    sessions: tuple[int, ...] = option((0, 12, 24), "times of the scans", unit="months")
    progression: float = option(2.0, "factor on the phantom's rates of progression")
    aekl_steps: int = option(4000, "steps of stage 1")
    prior_steps: int = option(6000, "steps of stage 2")
    repr_steps: int = option(10_000, "steps of stage 3")
    table_steps: tuple[int, ...] = option((10, 20, 50, 100), "numbers of sampling steps of the reconstruction table")
    n_table: int = option(36, "test scans of the reconstruction table")
    n_edit: int = option(24, "test scans that are edited")
    n_interpolate: int = option(36, "test subjects whose middle session is predicted")
    steps: int = option(50, "sampling steps of edits and interpolation")
    bench_steps: int = option(20, "sampling steps of the speed comparison")


PRESETS = {
    "phantom": {},
    "smoke": dict(out=str(HERE / "runs" / "demo"),
                  n_subjects=75, aekl_steps=1500, prior_steps=600, repr_steps=1400, table_steps=(10, 50),
                  n_table=12, n_edit=6, n_interpolate=10, steps=20, bench_steps=10),
}  # fmt: skip


def main() -> None:
    options = cli.parse(Options, description=__doc__, presets=PRESETS)
    check(options)
    from common import runtime, training
    from common.runlog import git_revision

    with runtime.start(options.device, options.precision, options.seed) as rt:
        if rt.world_size > 1:
            raise UserError("reproduce.py runs in one process; the stages' own scripts are what torchrun spreads")
        results, started, revision = {}, time.time(), git_revision()
        training.claim_study(options)
        root = make_cohort(options)
        train(options, root, rt)
        results |= claim_reconstruction(options, root, rt)
        results |= claim_probes(options, root, rt)
        results |= claim_manipulation(options, root, rt)
        results |= claim_interpolation(options, root, rt)
        results |= claim_speed(options, root, rt)
        finish(options, results, time.time() - started, revision)


def check(options: Options) -> None:
    """UserError for sizes with which a claim cannot be asked."""
    for name in ("aekl_steps", "prior_steps", "repr_steps", "n_edit", "n_interpolate", "steps", "bench_steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    if len(options.sessions) < 3:
        raise UserError(f"--sessions {' '.join(map(str, options.sessions))}: a session between two others needs three")
    if options.n_table <= len(options.sessions):
        raise UserError(f"--n_table {options.n_table}: give more than the {len(options.sessions)} sessions of a "
                        "subject, so that there is another subject's code to compare with")  # fmt: skip


def make_cohort(options: Options) -> Path:
    """The phantom cohort in OUT/cohort, which is the --root of every stage."""
    root = Path(options.out) / "cohort"
    if not (root / "data" / "phantom.json").is_file():
        command = [sys.executable, str(HERE / "make_phantom.py"), "--overwrite", "--out", str(root),
                   "--shape", "24", "32", "24", "--sessions", *map(str, options.sessions), f"--seed={options.seed}",
                   f"--n_subjects={options.n_subjects}", f"--progression={options.progression}"]  # fmt: skip
        if subprocess.run(command).returncode:
            raise UserError(f"make_phantom.py failed for {root}")
    return root


def train(options: Options, root: Path, rt) -> None:
    """The three stages, the latents and the codes; what is done is skipped."""
    from ldae import aekl, prior, representation
    from ldae.config import CONFIGS, PRESETS
    from ldae.scripts import save_compressed_latent, save_semantic_latent

    def config(stage: str, steps: int):
        split = {"val_size": 0.1, "test_size": 0.2}
        common = {"root": str(root), "seed": options.seed, "steps": steps, **split}
        return CONFIGS[stage](**(PRESETS[stage]["tiny"] | common))

    aekl.train(config("aekl", options.aekl_steps), rt)
    save_compressed_latent.save_latents(save_compressed_latent.Options(root=str(root)), rt)
    prior.train(config("ldae_pretrain", options.prior_steps), rt)
    representation.train(config("ldae_repr_learn", options.repr_steps), rt)
    save_semantic_latent.save_codes(save_semantic_latent.Options(root=str(root), with_controls=True), rt)


# ---- the claims -----------------------------------------------------------------------------------------------------


def claim_reconstruction(options: Options, root: Path, rt) -> dict:
    """(a) Both codes reconstruct better than y alone, one's own y better than another's, and z_T is nearly Gaussian."""
    import pandas as pd

    from ldae.scripts import reconstruction_table
    from ldae.scripts.config import TableOptions

    out = Path(options.out) / "reconstruction"
    settings = TableOptions(root=str(root), seed=options.seed, table_steps=options.table_steps, preset="tiny",
                            max_scans=options.n_table, output_dir=str(out), overwrite=True)  # fmt: skip
    found = reconstruction_table.evaluate(settings, rt)
    keep_figure(options, out / "reconstruction.png", "reconstruction.png")
    steps = max(options.table_steps)
    scans = pd.read_csv(out / "reconstruction_per_scan.csv")
    by_row = {name: part.set_index("scan") for name, part in scans[scans.steps == steps].groupby("row")}
    mean = {name: part.mean(numeric_only=True) for name, part in by_row.items()}
    mean["aekl"] = scans[scans.row == "aekl"].mean(numeric_only=True)
    per_steps = {row: scans[scans.row == row].groupby("steps").z_std.mean() for row in ("drawn", "encoded")}

    def difference(a: str, b: str) -> dict:
        values = by_row[a].ssim_masked - by_row[b].ssim_masked.reindex(by_row[a].index)
        return paired(values.to_numpy(), by_row[a].subject.to_numpy(), options.seed)

    values = {"table": found["table"], "n": found["n"]}
    knows, own = difference("encoded", "y_only"), difference("y_only", "shuffled_y_only")
    ssim = {name: f"{mean[name].ssim_masked:.3f}" for name in ("aekl", "encoded", "y_only", "shuffled_y_only", "prior")}
    z = mean["drawn"].z_std
    by_steps = {row: " / ".join(f"{value:.2f}" for value in found) for row, found in per_steps.items()}
    return {
        "a1 y with its encoded z_T reconstructs better than y alone": {
            "paper": "SSIM .962 against .869 (100 steps, window 3 or 4, background included, no controls)",
            "ours": f"SSIM in the head {ssim['encoded']} against {ssim['y_only']}, difference {interval(knows)}; "
            f"autoencoder {ssim['aekl']}, prior alone {ssim['prior']} (n = {found['n']}, {steps} steps)",
            "passed": knows["ci95"][0] > 0,
            "values": values | {"difference": knows},
        },
        "a2 one's own y reconstructs better than another subject's": {
            "paper": "not measured",
            "ours": f"SSIM in the head {ssim['y_only']} against {ssim['shuffled_y_only']}, difference {interval(own)} "
            "(fixed noise)",
            "passed": own["ci95"][0] > 0,
            "values": own,
        },
        "a3 z_T close to a unit Gaussian, of the trained network only": {
            "paper": "not measured; its clamp gives SD 39",
            "ours": f"SD {z:.3f} (kurtosis {mean['drawn'].z_kurtosis:+.2f}) for draws of the posterior, on which the "
            f"prior was trained; by steps {by_steps['drawn']}; for posterior means {by_steps['encoded']} (kurtosis "
            f"{mean['encoded'].z_kurtosis:+.2f}); untrained control {mean['untrained'].z_std:.3f} (kurtosis "
            f"{mean['untrained'].z_kurtosis:+.2f})",
            "passed": bool(
                Z_SD[0] <= z <= Z_SD[1] and abs(mean["drawn"].z_kurtosis) < abs(mean["untrained"].z_kurtosis)
            ),
            "values": {row: found.to_dict() for row, found in per_steps.items()},
        },
    }


def claim_probes(options: Options, root: Path, rt) -> dict:
    """(b) Linear probes of y tell AD from CN and age, better than every control; permuted subjects are at chance."""
    from ldae.scripts import train_manipulation as script

    settings = script.PRESETS["tiny"] | {"root": str(root), "seed": options.seed, "overwrite": True}
    paths = script.train(script.Options(**settings, targets=("diagnosis", "age", "sex")))
    records = {target: json.loads(path.read_text()) for target, path in paths.items()}
    for target, path in paths.items():
        keep_figure(options, path.with_suffix(".png"), f"probe_{target}.png")
    disease, age = records["diagnosis"]["cross_validation"]["metrics"], records["age"]["cross_validation"]["metrics"]

    def controls(target: str, metric: str) -> str:
        rows = {name: row["metrics"][metric]["value"] for name, row in records[target]["controls"].items()}
        linear = rows.pop(LINEAR)
        return ", ".join(f"{name} {value:.3g}" for name, value in rows.items()) + f"; linear in the voxels {linear:.3g}"

    untrained = records["diagnosis"]["controls"]["untrained"]["difference"]
    chance, mean = records["diagnosis"]["permuted"], records["age"]["mean_predictor"]
    better = [row["metrics"]["mae"]["value"] > age["mae"]["value"] for name, row in records["age"]["controls"].items()
              if name != LINEAR]  # fmt: skip
    test = {target: records[target]["test"]["metrics"] for target in records}
    recalls = ", ".join(f"{name.removeprefix('recall_')} {disease[name]['value']:.2f}" for name in disease
                        if name.startswith("recall"))  # fmt: skip
    return {
        f"b1 AD against CN, AUC of a linear probe at least {AUC}, above an untrained encoder": {
            "paper": "AUC .895, accuracy 83.7 % (positive class CN: recall of AD about 70 %)",
            "ours": f"AUC {span(disease['auc'])} (grouped cross-validation; recall {recalls}), test split "
            f"{span(test['diagnosis']['auc'])}; controls: {controls('diagnosis', 'auc')}; minus untrained "
            f"{untrained['value']:+.3f} [{untrained['ci95'][0]:+.3f}, {untrained['ci95'][1]:+.3f}]",
            "passed": disease["auc"]["value"] >= AUC and untrained["ci95"][0] > 0,
            "values": records["diagnosis"],
        },
        "b2 age error below predicting the mean and below every control": {
            "paper": "MAE 4.16, RMSE 5.23 years",
            "ours": f"MAE {span(age['mae'], 2)}, RMSE {age['rmse']['value']:.2f} years; mean predictor "
            f"{mean['metrics']['mae']['value']:.2f}; controls: {controls('age', 'mae')}",
            "passed": mean["difference"]["ci95"][1] < 0 and all(better),
            "values": records["age"],
        },
        "b3 permuted subjects at chance": {
            "paper": "not measured",
            "ours": f"AUC {chance['mean']:.3f} [{chance['central95'][0]:.3f}, {chance['central95'][1]:.3f}] over "
            f"{chance['permutations']} permutations",
            "passed": chance["central95"][0] <= 0.5 <= chance["central95"][1],
            "values": chance,
        },
        "b4 sex, which does not show in the phantom (a report)": {
            "paper": "not measured",
            "ours": f"AUC {span(records['sex']['cross_validation']['metrics']['auc'])}",
            "passed": None,
            "values": records["sex"],
        },
    }


def claim_manipulation(options: Options, root: Path, rt) -> dict:
    """(c) Edits toward AD enlarge, edits toward CN shrink the measured ventricles, monotonically over the doses."""
    from ldae.scripts import generate
    from ldae.scripts.config import Manipulate

    out = Path(options.out) / "edits"
    settings = Manipulate(
        root=str(root), seed=options.seed, preset="tiny", direction="probes/diagnosis_AD_vs_CN", amounts=DOSES,
        steps=options.steps, max_scans=options.n_edit, labels=str(root / "data" / "labels"),
        label_names=str(root / "data" / "phantom.json"), output_dir=str(out), overwrite=True,
    )  # fmt: skip
    generate.generate(settings, rt)
    reports = sorted(out.glob("*_report.json"))
    keep_figure(options, reports[0].with_suffix(".png"), "edit.png")
    records = [json.loads(path.read_text()) for path in reports]
    doses = np.array(sorted((0.0, *DOSES)))
    volumes = np.array([[record["original"]["ventricle_ml"] if dose == 0 else
                         next(e["ventricle_ml"] for e in record["edits"] if e["amount"] == dose) for dose in doses]
                        for record in records])  # fmt: skip
    slopes = np.polyfit(doses, volumes.T, 1)[0]
    slope = paired(slopes, [record["scan"].rpartition("_M")[0] for record in records], options.seed)
    monotone, means = int((np.diff(volumes, axis=1) > 0).all(1).sum()), volumes.mean(0)
    outside = np.nanmean([edit["share_outside"] for record in records for edit in record["edits"]])
    from common import figures

    lines = {f"scan {i}" if i < len(volumes) else "mean": (doses, row) for i, row in enumerate([*volumes, means])}
    figures.curves(Path(options.out) / "figures" / "ventricles.png", lines, xlabel="edit (logits of AD)",
                   ylabel="measured ventricles (ml)")  # fmt: skip
    return {
        "c edits toward AD enlarge the ventricles, toward CN shrink them": {
            "paper": "pictures; edit strength uncalibrated",
            "ours": "ml at doses " + ", ".join(f"{d:+g}: {m:.1f}" for d, m in zip(doses, means, strict=True))
            + f"; slope {interval(slope)} ml per logit; {monotone} of {len(volumes)} scans monotone; "
            f"{100 * outside:.1f} % of the change outside the brain",
            "passed": bool((np.diff(means) > 0).all() and slope["ci95"][0] > 0),
            "values": {"doses": doses.tolist(), "ventricle_ml": volumes.tolist(), "slope": slope, "monotone": monotone},
        }
    }  # fmt: skip


def claim_interpolation(options: Options, root: Path, rt) -> dict:
    """(d) The middle session from the outer two: better than copying the nearer scan; blends beside it.

    d1 asks it of the decoded volume, which the autoencoder blurs; d2 of the nearer scan plus LDAE's change from it.
    """
    from ldae.scripts import interpolation_evaluation
    from ldae.scripts.config import InterpolationOptions

    out = Path(options.out) / "interpolation"
    settings = InterpolationOptions(root=str(root), seed=options.seed, preset="tiny", steps=options.steps,
                                    max_subjects=options.n_interpolate, output_dir=str(out),
                                    overwrite=True)  # fmt: skip
    found = interpolation_evaluation.evaluate(settings, rt)
    keep_figure(options, out / "example.png", "interpolation.png")
    mse = {name: 1000 * found["overall"][name]["mse_masked"]["mean"] for name in found["overall"]}
    beside = ", ".join(f"{title} {mse[name]:.2f}" for name, title in (
        ("voxel_blend", "voxel blend"), ("latent_blend", "latent blend"),
        ("aekl_target", "autoencoder of the target itself")))  # fmt: skip

    def against_copy(name: str, more: str) -> dict:
        minus = found[f"{name}_minus"]["copy_nearest"]["mse_masked"]
        low, high = (1000 * x for x in minus["ci95"])
        return {
            "paper": "SSIM .969 at a gap of 6 months, against the autoencoder's image; no baselines",
            "ours": f"MSE in the head x 1000: {mse[name]:.2f} against {mse['copy_nearest']:.2f}, difference "
            f"{1000 * minus['mean']:+.2f} [{low:+.2f}, {high:+.2f}]{more}",
            "passed": high < 0,
            "values": {"overall": found["overall"], "minus": found[f"{name}_minus"]},
        }

    return {
        "d1 predicted middle session better than copying the nearer scan": against_copy(
            "ldae", f"; {beside} (n = {found['n_predictions']})"
        ),
        "d2 the same, LDAE's change added to the nearer scan": against_copy("ldae_change", ""),
    }


def claim_speed(options: Options, root: Path, rt) -> dict:
    """(e) Encode and decode by LDAE, autoencoder included, beside a voxel-space autoencoder of equal depth."""
    from ldae.scripts import benchmark
    from ldae.scripts.config import BenchmarkOptions

    found = benchmark.benchmark(
        BenchmarkOptions(size="tiny", steps=options.bench_steps, repeats=3, measure="full", root=str(root),
                         out=str(Path(options.out) / "benchmark.json"), overwrite=True), rt,
    )  # fmt: skip
    seconds, ratio = found["seconds_per_scan"], found["ratios"]["total"]
    return {
        "e faster than a voxel-space diffusion autoencoder of equal depth": {
            "paper": "20 times (no benchmark in its repository)",
            "ours": f"{ratio['median']:.1f} times [{ratio['min']:.1f}, {ratio['max']:.1f}] at 24x32x24 (x4 per axis, "
            f"the paper's x8 saves more): {seconds['ldae']['total']:.2f} against {seconds['voxel']['total']:.2f} s per "
            f"scan, {options.bench_steps} steps each way",
            "passed": ratio["min"] > 1,
            "values": {"seconds_per_scan": seconds, "ratios": found["ratios"], "about": found["about"]},
        }
    }


# ---- helpers --------------------------------------------------------------------------------------------------------


def paired(values, subjects, seed: int) -> dict:
    """Mean of differences and its 95 % interval, drawn by subject."""
    from common import metrics

    return {"mean": float(np.mean(values)), "n": len(values),
            "ci95": metrics.bootstrap_interval(values, seed=seed, groups=list(subjects))}  # fmt: skip


def interval(found: dict) -> str:
    low, high = found["ci95"]
    return f"{found['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def span(metric: dict, digits: int = 3) -> str:
    low, high = metric["ci95"] or (float("nan"),) * 2  # none where too few subjects allow one
    return f"{metric['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def keep_figure(options: Options, source: Path, name: str) -> None:
    folder = Path(options.out) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, folder / name)


def finish(options: Options, results: dict, seconds: float, revision: str | None) -> None:
    """results.json and the table."""
    from common.runlog import write_json

    record = {"options": cli.to_dict(options), "git_revision": revision, "seconds": round(seconds), "data": "phantom"}
    write_json(Path(options.out) / "results.json", record | {"claims": results})
    print(f"\n{'claim':82s}{'result':10s}ours on the phantom\n")
    for name, row in results.items():
        verdict = "reported" if row["passed"] is None else "pass" if row["passed"] else "FAIL"
        print(f"{name:82s}{verdict:10s}{row['ours']}")
        print(f"{'':92s}paper: {row['paper']}")
    print(f"\nresults.json and figures/ in {options.out}; {seconds / 60:.1f} minutes")


if __name__ == "__main__":
    cli.run(main)
