"""The claims made for LAPT, tested on CT-perfusion phantoms whose lesions are known.

    python lapt/reproduce.py                  # about an hour on two CPU cores
    python lapt/reproduce.py --preset smoke   # the demo: minutes, the same claims on less training

One cohort goes through the documented stages at the `tiny` preset's sizes or below: autoencoder, LDM, then equal extra
steps from the same LDM with the same seed, learning rate, data order, timesteps and noise, once as plain continuation
and once as LAPT; ablations; guide, volume LDM and its post-training. Every arm samples the same test patients from the
same noise. Running it again continues where it stopped. Writes OUT/results.json, OUT/cases.csv and OUT/figures/*.png
and prints: claim, pass or fail, ours on the phantom, the paper's number on its data.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

import numpy as np

from common import cli
from common.cli import CommonOptions, UserError, option
from lapt.config import CONFIGS, PRESETS

HERE = Path(__file__).resolve().parent
BRAIN_MARGIN = 0.02  # (b3) how much worse the whole brain may get, relative to continuation
FLOOR_SHARE = 0.5  # (a2) of the LDM's lesion error
NOISE_ALONE = dict(w_img=0.0, w_les=0.0)
ARMS = {  # of the slice LDM: what differs from the default objective
    "plain": NOISE_ALONE,
    "lapt": {},
    "image": dict(w_les=0.0),
    "lesion": dict(w_img=0.0),
    "recon": dict(target="recon"),
    "release": dict(w_img=0.01, w_les=0.02, target="recon", weighting="none", reduction="batch"),
}
ARMS_3D = {"plain3d": NOISE_ALONE | dict(w_seg=0.0), "lapt3d": dict(w_seg=0.0), "guide3d": {}}


@dataclass
class Options(CommonOptions):
    preset: str = option("phantom", "phantom: the study; smoke: the demo")
    out: str = option(str(HERE / "runs" / "reproduce"), "folder of cohort, runs, results.json and figures")
    n_cases: int = option(120, "patients, one in six without lesion; a quarter of them is the test split")
    shape: tuple[int, int, int] = option((32, 32, 8), "grid of the phantom", unit="voxels")
    vqgan_steps: int = option(4000, "steps of the autoencoder")
    ldm_steps: int = option(5000, "steps of the LDM")
    extra_steps: int = option(300, "steps of each arm")
    guide_steps: int = option(400, "steps of the segmentation guide")
    ldm3d_steps: int = option(500, "steps of the volume LDM")
    extra_steps_3d: int = option(100, "steps of each volume arm")
    maps: tuple[str, ...] = option((), "true perfusion maps that the networks see after the CTP: cbf, mtt, delay")
    maps_only: bool = option(False, "maps instead of the CTP")
    # What a short training of the LDM needs (README). Brain tissue fills this CTP window; of the original, 0 to 200 HU,
    # it is a tenth. And v: an error of the noise predicted at the last step counts 84 times in the estimate of z_0.
    ctp_window: tuple[float, float] = option((20.0, 50.0), "window of the CTP", unit="HU")
    prediction: str = option("v", "what the LDM predicts", choices=("v", "eps"))
    lr: float = option(1e-4, "learning rate of all arms")
    w_img: float = option(1.0, "weight of the image term")
    w_les: float = option(2.0, "weight of the lesion term")
    w_seg: float = option(0.1, "weight of the guide's term")
    seeds: tuple[int, ...] = option((1, 2, 3), "seeds of plain continuation and LAPT")
    ablation_seeds: tuple[int, ...] = option((1,), "seeds of the ablations, each among --seeds")
    sample_steps: int = option(20, "sampling steps of all arms")
    jobs: int = option(2, "arms that train at the same time, each on one thread; 1: in this process", free=True)

    def __post_init__(self):
        if not self.seeds or not set(self.ablation_seeds) <= set(self.seeds) or not self.ablation_seeds:
            raise UserError(f"--seeds {self.seeds}, --ablation_seeds {self.ablation_seeds}: at least one of each, and "
                            "the ablation's among the others: they share the plain continuation")  # fmt: skip
        if self.jobs < 1:
            raise UserError(f"--jobs {self.jobs}: must be at least 1")


PRESETS_HERE = {
    "phantom": {},
    "smoke": dict(out=str(HERE / "runs" / "demo"),
                  n_cases=84, vqgan_steps=1000, ldm_steps=1600, extra_steps=100, guide_steps=60, ldm3d_steps=60,
                  extra_steps_3d=30, seeds=(1, 2), ablation_seeds=(1,), sample_steps=10),
}  # fmt: skip


def main() -> None:
    options = cli.parse(Options, description=__doc__, presets=PRESETS_HERE)
    from common import runtime, training
    from common.runlog import git_revision

    with runtime.start(options.device, options.precision, options.seed) as rt:
        if rt.world_size > 1:
            raise UserError("reproduce.py runs in one process; the stages' own scripts are what torchrun spreads")
        started, revision = time.time(), git_revision()
        training.claim_study(options)
        make_cohort(options)
        train_stages(options, rt)
        folders = run_arms(options)
        tables = measure(options, folders, rt)
        results = claim_start(options, tables)
        results |= claim_benefit(options, tables)
        results |= claim_ablation(options, tables)
        results |= claim_volumes(options, tables)
        draw(options, folders, results, rt)
        finish(options, results, time.time() - started, revision)


# ---- training -------------------------------------------------------------------------------------------------------


def make_cohort(options: Options) -> Path:
    """The prepared phantom cohort OUT/cohort."""
    root = cohort(options)
    if not (root / "phantom.json").is_file():
        run_script(options, "make_phantom.py", "--out", root, "--overwrite", "--shape", *options.shape, "--n_cases",
                   options.n_cases, "--seed", options.seed, *["--maps"] * bool(options.maps))  # fmt: skip
    if not (root / "statistics.json").is_file():
        maps = ["--maps", *options.maps] * bool(options.maps) + ["--maps_only"] * options.maps_only
        run_script(options, "preprocessing.py", "--input_dir", root / "raw", "--output_dir", root, "--overwrite",
                   "--val_size", 0.1, "--test_size", 0.25, *maps)  # fmt: skip
    return root


def run_script(options: Options, name: str, *words) -> None:
    command = [sys.executable, str(HERE / name), "--num_workers", str(options.num_workers), *map(str, words)]
    if subprocess.run(command).returncode:
        raise UserError(f"{name} failed; its message is above")


def cohort(options: Options) -> Path:
    return Path(options.out) / "cohort"


def runs(options: Options) -> Path:
    return Path(options.out) / "runs"


def stage_config(options: Options, stage: str, **more):
    """Options of a stage: the `tiny` preset on the study's folders, validated at the end alone."""
    own = dict(data=str(cohort(options)), logdir=str(runs(options)), seed=options.seed, device=options.device,
               precision=options.precision, num_workers=0, val_every=10**6)  # fmt: skip
    if CONFIGS[stage].volumes:
        own["size"] = options.shape
    if stage != "vqgan" and stage != "guide":
        own |= dict(sample_steps=options.sample_steps)
    return CONFIGS[stage](**(PRESETS[stage]["tiny"] | own | more))


def train_stages(options: Options, rt) -> None:
    """Autoencoder, LDM, guide and volume LDM, which all arms share: what is done is skipped."""
    from lapt import ldm, segmentation, vqgan

    # Factor 2, not 4: at 6 mm, 4 x 4 pixels of two images hold more anatomy than a code can say. And no adversary,
    # which would start late in a training of this length.
    vqgan.train(stage_config(options, "vqgan", steps=options.vqgan_steps, channel_mult=(1, 2), disc_weight=0.0,
                             l2_weight=10.0, lr=3e-3, revive_every=10), rt)  # fmt: skip
    ldm.train(stage_config(options, "ldm", steps=options.ldm_steps, select="last", batch_size=8,
                           ctp_window=options.ctp_window, prediction=options.prediction), rt)  # fmt: skip
    segmentation.train(stage_config(options, "guide", steps=options.guide_steps), rt)
    ldm.train(stage_config(options, "ldm3d", steps=options.ldm3d_steps, select="last"), rt)


def run_arms(options: Options) -> dict[str, Path]:
    """{arm or arm_seed: folder of its samples of the test patients}, the two starting points among them."""
    tasks = {"ldm": None, "ldm3d": None}
    tasks |= {f"{arm}_{seed}": arm_config(options, arm, seed)
              for seed in options.seeds for arm in ("plain", "lapt")}  # fmt: skip
    others = [arm for arm in (*ARMS, *ARMS_3D) if arm not in ("plain", "lapt")]
    tasks |= {f"{arm}_{seed}": arm_config(options, arm, seed) for seed in options.ablation_seeds for arm in others}
    work = [(options, name, config) for name, config in tasks.items()]
    if options.jobs == 1:
        for task in work:
            run_arm(task)
    else:
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        with one_thread(), ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            list(pool.map(run_arm, work))
    return {name: Path(options.out) / "samples" / name for name in tasks}


def arm_config(options: Options, arm: str, seed: int):
    volumes = arm in ARMS_3D
    weights = dict(w_img=options.w_img, w_les=options.w_les) | (dict(w_seg=options.w_seg) if volumes else {})
    own = dict(seed=seed, name=f"{arm}_{seed}", lr=options.lr, select="last", floor_steps=0)
    own |= dict(steps=options.extra_steps_3d if volumes else options.extra_steps)
    own |= dict(cache=str(runs(options) / ("ldm3d" if volumes else "ldm") / "cache"))
    return stage_config(options, "lapt3d" if volumes else "lapt", **(weights | own | (ARMS | ARMS_3D)[arm]))


def run_arm(task: tuple) -> None:
    """Train an arm, where there is one to train, and sample the test patients; in a process of its own."""
    from common import runtime
    from lapt import inference, ldm
    from lapt.diffusion import load_model

    options, name, config = task
    with runtime.start(options.device, options.precision, options.seed) as rt:
        if config is not None:
            ldm.train(config, rt)
        model = load_model(runs(options) / name, rt)
        settings = inference.Settings(steps=options.sample_steps, seed=options.seed, model_id="reproduce")
        cases = inference.prepared_studies(cohort(options), "test")
        inference.sample_folder(model, cases, Path(options.out) / "samples" / name, settings, rt)


class one_thread:
    """Processes started inside use one thread each: several of them share the cores better than their threads do."""

    NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

    def __enter__(self):
        self.before = {name: os.environ.get(name) for name in self.NAMES}
        os.environ.update(dict.fromkeys(self.NAMES, "1"))

    def __exit__(self, *_):
        for name, value in self.before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(options: Options, folders: dict[str, Path], rt) -> dict[str, dict[str, np.ndarray]]:
    """{method: {column: value per test patient}}, NaN where a patient has no lesion; also written to OUT/cases.csv.

    Errors are means of DWI and ADC in percent of the training set's range. auc: -ADC of lesion against all other
    brain; auc_mirrored: the same of the lesion's mirror image, which tells what anatomy alone gives. dice: ADC
    threshold; dice_guide: the guide.
    """
    from common import tables
    from lapt import dataset, evaluation
    from lapt.diffusion import load_model
    from lapt.evaluate import Options as EvaluationOptions
    from lapt.segmentation import load_guide

    cases = dataset.read_cases(cohort(options), "test")
    window = dataset.Intensity.of_folder(cohort(options))
    networks = dict(model=load_model(runs(options) / "ldm", rt), guide=load_guide(runs(options) / "guide", rt))
    how = dict(folders=folders, window=window, options=EvaluationOptions(synthetic="unused")) | networks
    rows: dict[tuple, dict] = {}
    for case in cases:
        images, segments, _ = evaluation.measure_case(case, **how)
        for row in images:
            found = rows.setdefault((row["method"], case.name), {"lesion_ml": case.lesion_ml})
            scale = 100 / window.range(row["modality"]) / 2
            for column in ("mae", "lesion_mae", "lesion_bias", "flicker"):
                value = np.nan if row[column] is None else row[column]
                found[f"{row['modality']}_{column}"] = value
                found[column] = found.get(column, 0.0) + scale * (abs(value) if column == "lesion_bias" else value)
        for row in segments:
            column = "dice" if row["rule"] == "adc_threshold" else "dice_guide"
            rows.setdefault((row["method"], case.name), {})[column] = np.nan if row["dice"] is None else row["dice"]
        _, mask, lesion = evaluation.load_real(case)
        for name, folder in folders.items():
            adc = evaluation.load_samples(folder, case)["adc"]
            rows[name, case.name] |= {
                "auc": auc(-adc, lesion, mask),
                "auc_mirrored": auc(-adc, lesion[::-1] & mask, mask & ~lesion),
            }
    tables.write_csv(Path(options.out) / "cases.csv", table_rows(rows))
    methods = dict.fromkeys(method for method, _ in rows)
    columns = {m: dict.fromkeys(c for (method, _), row in rows.items() if method == m for c in row) for m in methods}
    return {
        m: {c: np.array([rows[m, case.name].get(c, np.nan) for case in cases]) for c in columns[m]} for m in methods
    }


def table_rows(rows: dict[tuple, dict]) -> list[dict]:
    names = dict.fromkeys(column for row in rows.values() for column in row)
    return [
        {"method": method, "case": case} | {c: row.get(c, "") for c in names} for (method, case), row in rows.items()
    ]


def auc(score: np.ndarray, positive: np.ndarray, mask: np.ndarray) -> float:
    """Chance that a positive voxel of the mask has a higher score than another; NaN where there is none of either."""
    from scipy.stats import mannwhitneyu

    inside, outside = score[positive & mask], score[mask & ~positive]
    if not (len(inside) and len(outside)):
        return float("nan")
    return float(mannwhitneyu(inside, outside).statistic / len(inside) / len(outside))


def interval(values, seed: int) -> dict:
    """Mean and bootstrap interval over the patients that have a value."""
    from common import metrics

    values = np.asarray(values)[np.isfinite(values)]
    if not len(values):
        return {"mean": float("nan"), "ci95": (float("nan"),) * 2, "n": 0}
    return {"mean": float(values.mean()), "ci95": metrics.bootstrap_interval(values, seed=seed), "n": len(values)}


def contrast(options: Options, tables: dict, arm: str, reference: str, column: str, seeds) -> dict:
    """Arm minus reference: of each seed (mean over patients), and the mean over seeds with an interval over patients.

    reference: an arm, compared seed by seed, or a starting point, which has no seed.
    """
    pairs = [(tables[f"{arm}_{s}"], tables[reference if reference in tables else f"{reference}_{s}"]) for s in seeds]
    differences = np.array([ours[column] - theirs[column] for ours, theirs in pairs])
    base = np.nanmean([theirs[column] for _, theirs in pairs])
    per_patient = differences.mean(0)
    found = interval(per_patient, options.seed)
    found |= {
        "relative": found["mean"] / base if base else float("nan"),
        "n_lower": int((per_patient < 0).sum()),
        "per_seed": np.nanmean(differences, 1).tolist(),
    }
    found["ours"], found["reference"] = float(np.nanmean([ours[column] for ours, _ in pairs])), float(base)
    return found


def told(found: dict, digits: int = 2) -> str:
    low, high = found["ci95"]
    seeds = ", ".join(f"{value:+.{digits}f}" for value in found["per_seed"])
    share = f"{100 * found['relative']:+.1f} %; " if np.isfinite(found["relative"]) else ""
    return (f"{found['reference']:.{digits}f} -> {found['ours']:.{digits}f}: {found['mean']:+.{digits}f} "
            f"[{low:+.{digits}f}, {high:+.{digits}f}] ({share}by seed {seeds}; lower in {found['n_lower']} of "
            f"{found['n']} patients)")  # fmt: skip


def compared(options: Options, tables: dict, arms, reference: str) -> dict:
    """Contrasts of arms with the continued training, over the seeds of the ablation."""
    columns = ("lesion_mae", "dice", "dice_guide", "mae")
    return {arm: {column: contrast(options, tables, arm, reference, column, options.ablation_seeds)
                  for column in columns} for arm in arms}  # fmt: skip


def effect(found: dict) -> str:
    """Lesion error / Dice / brain error of an arm against continued training."""
    return (f"{100 * found['lesion_mae']['relative']:+.1f} % / {found['dice']['mean']:+.3f} / "
            f"{100 * found['mae']['relative']:+.1f} %")  # fmt: skip


# ---- the claims -----------------------------------------------------------------------------------------------------


def claim_start(options: Options, tables: dict) -> dict:
    """(a) What LAPT starts from: an LDM that sees the lesion in the CTP, on an autoencoder that can show it."""
    ldm, floor = tables["ldm"], tables["autoencoder"]
    found = {name: interval(ldm[name], options.seed) for name in ("auc", "auc_mirrored", "dice", "dice_guide")}
    errors = {name: float(np.nanmean(table["lesion_mae"])) for name, table in (("floor", floor), ("ldm", ldm))}
    dice = {name: float(np.nanmean(tables[name]["dice"])) for name in ("real", "autoencoder")}
    low, high = found["auc"]["ci95"]
    return {
        "a1 the LDM shows the lesion that the CTP holds": {
            "paper": "not measured",
            "ours": f"AUC of low ADC in the lesion {found['auc']['mean']:.3f} [{low:.3f}, {high:.3f}], in its mirror "
            f"image {found['auc_mirrored']['mean']:.3f}; Dice {found['dice']['mean']:.3f}; n = {found['auc']['n']}",
            "passed": low > found["auc_mirrored"]["ci95"][1],
            "values": found,
        },
        "a2 the autoencoder's lesion floor is below half of the LDM's lesion error": {
            "paper": "not measured",
            "ours": f"lesion error {errors['floor']:.2f} % of the range by the autoencoder alone, "
            f"{errors['ldm']:.2f} % by the LDM; Dice {dice['autoencoder']:.3f}, real ADC {dice['real']:.3f}",
            "passed": errors["floor"] < FLOOR_SHARE * errors["ldm"],
            "values": errors | {"dice": dice},
        },
    }  # fmt: skip


def claim_benefit(options: Options, tables: dict) -> dict:
    """(b) LAPT against plain continuation of the same length, and against the checkpoint it starts from."""
    columns = ("lesion_mae", "dice", "dice_guide", "auc", "mae")
    both = {modality: contrast(options, tables, "lapt", "plain", f"{modality}_lesion_mae", options.seeds)
            for modality in ("adc", "dwi")}  # fmt: skip
    found = {column: contrast(options, tables, "lapt", "plain", column, options.seeds) for column in columns}
    start = {column: contrast(options, tables, "lapt", "ldm", column, options.seeds) for column in columns}
    more = {column: contrast(options, tables, "plain", "ldm", column, options.seeds) for column in columns}
    lesion, dice = np.array(found["lesion_mae"]["per_seed"]), np.array(found["dice"]["per_seed"])
    majority = len(options.seeds) / 2
    return {
        "b1 LAPT: lower lesion error than plain continuation": {
            "paper": "best lesion MAE of all methods; not compared with continued training",
            "ours": f"{told(found['lesion_mae'])} in % of the range, n = {found['lesion_mae']['n']}; "
            f"ADC {told(both['adc'], 1)} in 1e-6 mm²/s; DWI {told(both['dwi'], 1)} in its units",
            "passed": bool(lesion.mean() < 0 and (lesion < 0).sum() > majority),
            "values": found["lesion_mae"] | both,
        },
        "b2 LAPT: higher Dice of the ADC threshold": {
            "paper": "not measured",
            "ours": f"{told(found['dice'], 3)}; guide {told(found['dice_guide'], 3)}; AUC {told(found['auc'], 3)}",
            "passed": bool(dice.mean() > 0 and (dice > 0).sum() > majority),
            "values": {"adc_threshold": found["dice"], "guide": found["dice_guide"], "auc": found["auc"]},
        },
        "b3 LAPT: whole-brain error at most 2 % worse": {
            "paper": "better overall",
            "ours": f"{told(found['mae'])}, n = {found['mae']['n']}",
            "passed": found["mae"]["relative"] < BRAIN_MARGIN,
            "values": found["mae"],
        },
        "b4 gain over the starting LDM (a report)": {
            "paper": "the comparison that it makes",
            "ours": f"lesion error: LAPT {told(start['lesion_mae'])}; plain {told(more['lesion_mae'])}",
            "passed": None,
            "values": {"lapt": start, "plain": more},
        },
    }


def claim_ablation(options: Options, tables: dict) -> dict:
    """(c) Which term does what, and (d) the real image or the autoencoder's reconstruction as the target: a report."""
    names = {"image": "image only", "lesion": "lesion only", "lapt": "both", "recon": "both, target recon",
             "release": "the release's objective"}  # fmt: skip
    found = compared(options, tables, names, "plain")
    lines = {arm: f"{name} {effect(found[arm])}" for arm, name in names.items()}
    head = f"lesion error / Dice / brain error against continuation, {len(options.ablation_seeds)} seed(s): "
    return {
        "c image term, lesion term, both (a report)": {
            "paper": "not available to us",
            "ours": head + "; ".join(lines[arm] for arm in ("image", "lesion", "lapt")),
            "passed": None,
            "values": {arm: found[arm] for arm in ("image", "lesion", "lapt")},
        },
        "d target: real image or reconstruction (a report)": {
            "paper": "reconstruction only",
            "ours": head + "; ".join(lines[arm] for arm in ("lapt", "recon", "release")),
            "passed": None,
            "values": {arm: found[arm] for arm in ("recon", "release")},
        },
    }


def claim_volumes(options: Options, tables: dict) -> dict:
    """(e) The volume LDM flickers less from slice to slice; (f) its post-training with and without the guide."""
    flat, volume = tables["ldm"]["flicker"], tables["ldm3d"]["flicker"]
    flicker = interval(volume - flat, options.seed)
    low, high = flicker["ci95"]
    found = compared(options, tables, ("lapt3d", "guide3d"), "plain3d")
    lines = (f"{name} {effect(found[arm])}" for arm, name in (("lapt3d", "both terms"), ("guide3d", "and guide")))
    return {
        "e less flicker between slices in 3D than in 2D": {
            "paper": "the reason for 3D; not measured",
            "ours": f"{flat.mean():.2f} -> {volume.mean():.2f} % of the range, {flicker['mean']:+.2f} [{low:+.2f}, "
            f"{high:+.2f}]; autoencoder alone {tables['autoencoder']['flicker'].mean():.2f}",
            "passed": high < 0,
            "values": flicker,
        },
        "f 3D LAPT without and with guide (a report)": {
            "paper": "not published yet",
            "ours": "lesion error / Dice / brain error against 3D continuation, "
            f"{len(options.ablation_seeds)} seed(s): " + "; ".join(lines),
            "passed": None,
            "values": found,
        },
    }


# ---- pictures and table ---------------------------------------------------------------------------------------------


def draw(options: Options, folders: dict[str, Path], results: dict, rt) -> None:
    """Of the test patients with the largest and a middling lesion: CTP, truth, before, after, errors; gain per seed."""
    from common import figures
    from lapt import dataset, evaluation
    from lapt.diffusion import load_model

    out, seed = Path(options.out) / "figures", options.seeds[0]
    model = load_model(runs(options) / "ldm", rt)
    cases = sorted((c for c in dataset.read_cases(cohort(options), "test") if c.lesion_ml), key=lambda c: -c.lesion_ml)
    shown = {"autoencoder": None, "before": folders["ldm"], "continued": folders[f"plain_{seed}"],
             "LAPT": folders[f"lapt_{seed}"], "3D": folders["ldm3d"]}  # fmt: skip
    for case in (cases[i] for i in sorted({0, len(cases) // 2}) if cases):
        real, mask, lesion = evaluation.load_real(case)
        z = int(lesion.sum((0, 1)).argmax())
        images = {name: evaluation.load_samples(folder, case) if folder else
                  evaluation.reconstruct(model, real, mask, case.stats) for name, folder in shown.items()}  # fmt: skip
        for modality, unit in (("dwi", "a.u."), ("adc", "1e-6 mm²/s")):
            pictures = {"real": real[modality]} | {name: image[modality] * mask for name, image in images.items()}
            figures.montage(out / f"{case.name}_{modality}.png", pictures, difference_to="real", planes=("axial",),
                            spacing_mm=case.spacing_mm, voxel=(0, 0, z), unit=unit,
                            title=f"{case.name}, {modality.upper()}, lesion {case.lesion_ml:.0f} ml")  # fmt: skip
        if not case.time_points:
            continue
        ctp = case.volume("ctp")[: case.time_points] * mask
        frames = {f"frame {t}": ctp[t] for t in np.linspace(0, len(ctp) - 1, 6).round().astype(int)}
        figures.montage(out / f"{case.name}_ctp.png", frames, planes=("axial",), voxel=(0, 0, z), window=(0, 80),
                        spacing_mm=case.spacing_mm, unit="HU", title=f"{case.name}, CT perfusion")  # fmt: skip
    gains = {name: results[key]["values"]["per_seed"] for name, key in
             (("lesion", "b1 LAPT: lower lesion error than plain continuation"),
              ("brain", "b3 LAPT: whole-brain error at most 2 % worse"))}  # fmt: skip
    figures.curves(out / "gain.png", {name: (list(options.seeds), values) for name, values in gains.items()},
                   xlabel="seed", ylabel="error: LAPT - continuation (% of range)", points=True)  # fmt: skip


def finish(options: Options, results: dict, seconds: float, revision: str | None) -> None:
    """results.json and the table."""
    from common.runlog import write_json
    from lapt.evaluation import plain

    record = {"options": cli.to_dict(options), "git_revision": revision, "seconds": round(seconds), "data": "phantom"}
    write_json(Path(options.out) / "results.json", plain(record | {"claims": results}))
    print(f"\n{'claim':76s}{'result':10s}ours on the phantom\n")
    for name, row in results.items():
        verdict = "reported" if row["passed"] is None else "pass" if row["passed"] else "FAIL"
        print(f"{name:76s}{verdict:10s}{row['ours']}")
        print(f"{'':86s}paper: {row['paper']}")
    print(f"\nresults.json, cases.csv and figures/ in {options.out}; {seconds / 60:.1f} minutes")


if __name__ == "__main__":
    cli.run(main)
