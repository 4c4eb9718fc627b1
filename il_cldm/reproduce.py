"""The headline claims of IL-CLDM, tested on phantoms whose truth is known.

    python il_cldm/reproduce.py                  # about half an hour on two CPU cores
    python il_cldm/reproduce.py --preset smoke   # the demo: a few minutes, the same claims on fewer subjects

Two cohorts: in the first, uptake follows label and MRI-visible atrophy; in the second (leak test) nothing in the MRI
tells it. Networks and training are the `smoke` preset of config.py, with the steps below. The paper's tables could not
be obtained, so its column quotes its words. Running it again continues where it stopped. Writes OUT/results.json and
OUT/figures/*.png and prints: claim, pass or fail, ours on the phantom, the paper's number on its data.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root

import numpy as np

from common import cli
from common.cli import CommonOptions, option
from il_cldm.config import PRESETS as MODEL_PRESETS
from il_cldm.config import Config

HERE = Path(__file__).resolve().parent
NC, AD = 0, 3  # label_id of the phantom's mildest and most severe class
SCALES = (0.0, 1.0, 2.0, 3.0, 4.0)


@dataclass
class Options(CommonOptions):
    preset: str = option("phantom", "phantom: the figures of the README; smoke: the demo")
    out: str = option(str(HERE / "result" / "reproduce"), "folder of cohorts, runs, results.json and figures")
    n_train: int = option(256, "training subjects per cohort")
    n_val: int = option(40, "validation subjects per cohort: they select, and calibrate the intervals of d2")
    n_test: int = option(40, "test subjects per cohort")
    shape: tuple[int, ...] = option((28, 32, 28), "grid; 28 32 28 is 6 mm", unit="voxels")
    aae_steps: int = option(2000, "steps of stage 1")
    ldm_steps: int = option(2400, "steps of stage 2, per cohort")
    n_ancestral: int = option(12, "test subjects for the comparison with 999-step ancestral sampling")
    leak: bool = option(True, "train the second cohort and run the leak test")
    samples: int = option(19, "samples per subject for the intervals; 80 % needs 9, 19, 29, ...")
    claim_steps: int = option(20, "DPM-Solver++ steps of each sample of claims b and d")


PRESETS = {
    "phantom": {},
    "smoke": dict(out=str(HERE / "result" / "demo"),
                  n_train=128, n_val=12, n_test=24, aae_steps=700, ldm_steps=950, n_ancestral=2, samples=9,
                  claim_steps=8, leak=False),
}  # fmt: skip


def main() -> None:
    options = cli.parse(Options, description=__doc__, presets=PRESETS)
    if (options.samples + 1) % 10:
        raise cli.UserError(f"--samples {options.samples}: an 80 % interval of order statistics needs 9, 19, 29, ...")
    from common import runtime, training
    from common.runlog import git_revision

    with runtime.start(options.device, options.precision, options.seed) as rt:
        if rt.world_size > 1:
            raise cli.UserError("reproduce.py runs in one process; main.py is what torchrun spreads over GPUs")
        results, started, revision = {}, time.time(), git_revision()
        training.claim_study(options)
        study = train_study(options, rt, "mri", {})
        results |= claim_quality(study)
        results |= claim_guidance(study, options)
        results |= claim_speed(study, options)
        results |= claim_coverage(study, options)
        if options.leak:  # the same PET physics, so one autoencoder serves both cohorts
            aae = {"checkpoint_aae": str(study.config.run_folder / "AAE.pth.tar")}
            results |= claim_no_leak(train_study(options, rt, "independent", aae))
        finish(options, results, time.time() - started, revision)


@dataclass
class Study:
    """A trained cohort with what the claims sample from."""

    config: Config
    rt: object
    trained: object
    autoencoder: object
    report: dict  # of --evaluate
    names: list[str]
    mri: object
    pet: object

    def sample(self, name: str, label: int | None, k: int, **settings) -> np.ndarray:
        """(k, D, H, W) synthetic PET of a subject; sample j always starts from the same noise."""
        from il_cldm import generate

        config = replace(self.config, **{"sampler": "dpm", "steps": 20, "samples": k, **settings})
        mri = self.mri.tensor(name)[None]
        return generate.synthesize(self.trained, self.autoencoder, mri, label, name, config, self.rt)[0]

    def suvrs(self, name: str, volumes) -> list[float]:
        """Composite SUVR of each of a subject's volumes (D, H, W)."""
        from il_cldm import amyloid

        target, reference, _ = amyloid.region_settings(self.config)
        regions = amyloid.load_regions(self.config, name, volumes[0].shape)
        return [amyloid.suvr(volume, regions, target, reference) for volume in volumes]


def train_study(options: Options, rt, coupling: str, extra: dict) -> Study:
    """Make the cohort, then the documented commands in order; every step that is already done is skipped."""
    from il_cldm import aae, checks, dataset, evaluate, generate, ldm

    root = Path(options.out) / coupling
    if not (root / "data_info" / "prepare.json").is_file():
        command = [sys.executable, str(HERE / "make_phantom.py"), "--overwrite", "--shape", *map(str, options.shape)]
        values = {"out": root, "coupling": coupling, "seed": options.seed}
        values |= {"n_train": options.n_train, "n_val": options.n_val, "n_test": options.n_test}
        if subprocess.run([*command, *(f"--{name}={value}" for name, value in values.items())]).returncode:
            raise cli.UserError(f"make_phantom.py failed for {root}")
    model = MODEL_PRESETS["smoke"] | {"aae_steps": options.aae_steps, "ldm_steps": options.ldm_steps}
    model |= {"ldm_val_every": 20}  # there are more validation subjects than the preset thinks of
    config = Config(**(model | extra), root=str(root), seed=options.seed, samples=1)
    checks.check(config, rt)
    if not config.checkpoint_aae:
        aae.train_aae(config, rt)
    aae.encode(config, rt, "train")
    ldm.train_ldm(config, rt)
    generate.generate(config, rt)
    report = evaluate.evaluate(config, rt)
    autoencoder, aae_hash = aae.load_autoencoder(config, rt)
    mri, pet = dataset.open_volumes(config)
    names = dataset.read_list(config.list_path("test"))
    return Study(config, rt, ldm.load_denoiser(config, rt, aae_hash), autoencoder, report, names, mri, pet)


# ---- the claims -----------------------------------------------------------------------------------------------------


def claim_quality(study: Study) -> dict:
    """(a) Synthetic PET beats the mean image, and status is found from MRI alone."""
    table, gain = study.report["metrics"], study.report["synthetic_minus_mean_image"]["mae_mask"]
    values = {method: table[method]["mae_mask"]["mean"] for method in table}
    auc = study.report["amyloid"]["detection"]["SUVR of synthetic PET"]
    baseline = study.report["amyloid"]["detection"].get("MRI-only CNN", {"auc": float("nan")})["auc"]
    return {
        "a1 masked MAE below the mean image's": {
            "paper": "better than five comparison models (no mean-image baseline given)",
            "ours": f"{values['synthetic']:.4f} vs {values['mean_image']:.4f}, difference {interval(gain)}; "
            f"autoencoder ceiling {values['autoencoder']:.4f}",
            "passed": gain["ci95"][1] < 0,
            "values": values | {"difference": gain},
        },
        "a2 amyloid AUC > 0.8, no label given": {
            "paper": "synthetic PET helps classification; independent re-training: balanced accuracy 46 % (chance)",
            "ours": f"AUC {auc['auc']:.3f} [{auc['ci'][0]:.3f}, {auc['ci'][1]:.3f}]; MRI-only CNN {baseline:.3f}",
            "passed": auc["auc"] > 0.8,
            "values": study.report["amyloid"],
        },
    }


def claim_no_leak(study: Study) -> dict:
    """(a) Where the MRI says nothing about uptake, and no label is given, detection must stay at chance."""
    auc = study.report["amyloid"]["detection"]["SUVR of synthetic PET"]
    return {
        "a3 leak test: AUC near 0.5": {
            "paper": "not tested",
            "ours": f"AUC {auc['auc']:.3f} [{auc['ci'][0]:.3f}, {auc['ci'][1]:.3f}]",
            "passed": auc["ci"][0] <= 0.5 <= auc["ci"][1],
            "values": study.report["amyloid"],
        }
    }


def claim_guidance(study: Study, options: Options) -> dict:
    """(b) Guidance towards a class moves cortical uptake as the class says, further with a larger scale."""
    from common import figures

    names = study.names[: max(6, options.n_ancestral)]

    def mean_suvr(label: int, scale: float) -> float:
        settings = dict(guidance=scale, steps=options.claim_steps)
        return float(np.mean([study.suvrs(n, study.sample(n, label, 1, **settings)) for n in names]))

    curves = {title: [mean_suvr(label, w) for w in SCALES] for title, label in (("NC", NC), ("AD", AD))}
    figures.curves(
        Path(options.out) / "figures" / "guidance.png",
        {f"guided to {title}": (SCALES, values) for title, values in curves.items()},
        xlabel="guidance scale", ylabel="mean composite SUVR", title="label guidance",
    )  # fmt: skip
    up, down = np.diff(curves["AD"]), np.diff(curves["NC"])
    text = "; ".join(f"{title} {' '.join(f'{v:.3f}' for v in values)}" for title, values in curves.items())
    return {
        "b guidance moves uptake monotonically": {
            "paper": "label shapes training only; no guidance",
            "ours": f"SUVR at scale {' '.join(f'{w:g}' for w in SCALES)}: {text}",
            "passed": bool((up > 0).all() and (down < 0).all()),
            "values": curves,
        }
    }


def claim_speed(study: Study, options: Options) -> dict:
    """(c) 20 steps of DPM-Solver++ against 999 ancestral steps: PSNR and time in one run."""
    from common import metrics

    scores, seconds = {}, {}
    for title, settings in (("ddpm", {"sampler": "ddpm", "steps": 0}), ("dpm", {"sampler": "dpm", "steps": 20})):
        study.sample(study.names[0], None, 1, **(settings | {"steps": 2}))  # warm up
        start = time.perf_counter()
        names = study.names[: options.n_ancestral]
        volumes = [study.sample(n, None, 1, **settings)[0] for n in names]
        seconds[title] = (time.perf_counter() - start) / len(names)
        truths = [study.pet.load(n) for n in names]
        scores[title] = [metrics.psnr(v, x, data_range=1.0) for v, x in zip(volumes, truths, strict=True)]
    mean = {title: float(np.mean(values)) for title, values in scores.items()}
    difference = metrics.summary(np.subtract(scores["dpm"], scores["ddpm"]), seed=0)
    return {
        "c 20-step DPM-Solver++ within 0.5 dB of 999 ancestral steps": {
            "paper": "999 ancestral steps only",
            "ours": f"{mean['dpm']:.2f} vs {mean['ddpm']:.2f} dB, difference {interval(difference)}; "
            f"{seconds['ddpm'] / seconds['dpm']:.0f} times faster",
            "passed": mean["dpm"] > mean["ddpm"] - 0.5,
            "values": {"psnr": mean, "seconds_per_sample": seconds, "difference": difference},
        }
    }


def claim_coverage(study: Study, options: Options) -> dict:
    """(d) Order statistics r and k+1-r of k samples should enclose the truth in (k+1-2r)/(k+1) of all cases.

    d1 takes the samples at their word. d2 first widens the intervals by what the validation subjects need:
    conformalised quantile regression (Romano et al., NeurIPS 2019), which covers as promised by any model.
    """
    from common import figures
    from il_cldm import dataset

    k = options.samples
    nominal = np.array([(k + 1 - 2 * r) / (k + 1) for r in range(1, (k + 1) // 2)])
    validation = dataset.read_list(study.config.list_path("validation"))
    low, high, truth, voxels = intervals(study, study.names, options)
    held_out = intervals(study, validation, options)[:3]
    margin = np.array([conformal_margin(*(v[:, j] for v in held_out[:2]), held_out[2], level)
                       for j, level in enumerate(nominal)])  # fmt: skip
    raw = (low <= truth[:, None]) & (truth[:, None] <= high)
    widened = (low - margin <= truth[:, None]) & (truth[:, None] <= high + margin)
    lines = {"composite SUVR": raw.mean(0), "calibrated on validation subjects": widened.mean(0), "voxels": voxels}
    figures.curves(
        Path(options.out) / "figures" / "coverage.png",
        {name: (nominal, share) for name, share in lines.items()},
        xlabel="nominal coverage", ylabel="share of truths inside", title=f"{k} samples", diagonal=True,
    )  # fmt: skip
    at80, n, m = int(np.argmin(np.abs(nominal - 0.8))), len(study.names), len(validation)
    slack = 1.96 * (0.8 * 0.2 / n) ** 0.5  # sampling error of the share if the claim holds
    slack_2 = 1.96 * (0.8 * 0.2 * (1 / n + 1 / (m + 2))) ** 0.5  # the margin is itself estimated, from m subjects

    def row(share, slack, more):
        expected = f"{100 * (0.8 - slack):.0f}-{min(100, 100 * (0.8 + slack)):.0f}"
        return {
            "paper": "no uncertainty given",
            "ours": f"{100 * share:.0f} % of {n} subjects, expected {expected}; {more}",
            "passed": bool(abs(share - 0.8) <= slack),
            "values": {"nominal": nominal.tolist(), "margin": margin.tolist(), "n": n, "k": k, "n_validation": m}
            | {name: share.tolist() for name, share in lines.items()},
        }

    width = (high - low)[:, at80].mean()
    return {
        "d1 80 % interval of the samples holds the true SUVR as often": row(
            raw.mean(0)[at80], slack, f"mean width {width:.3f}; voxels {100 * voxels[at80]:.0f} %"
        ),
        "d2 the same, calibrated on validation subjects": row(
            widened.mean(0)[at80], slack_2, f"widened by {margin[at80]:+.3f} on either side, n = {m}"
        ),
    }


def intervals(study: Study, names: list[str], options: Options):
    """SUVR bounds (n, levels) of the order statistics r and k+1-r, r = 1, 2, ..., true SUVR (n,), voxel coverage."""
    from il_cldm import amyloid

    k, levels = options.samples, (options.samples + 1) // 2 - 1
    bounds, truths, inside = np.zeros((2, len(names), levels)), np.zeros(len(names)), np.zeros((len(names), levels))
    for i, name in enumerate(names):
        samples, truth = study.sample(name, None, k, steps=options.claim_steps), study.pet.load(name)
        mask = amyloid.load_regions(study.config, name, truth.shape) > 0
        *suvrs, truths[i] = study.suvrs(name, [*samples, truth])
        suvrs.sort()
        bounds[:, i] = suvrs[:levels], suvrs[::-1][:levels]
        ordered, true_voxels = np.sort(samples[:, mask], axis=0), truth[mask]
        for j in range(levels):
            inside[i, j] = np.mean((ordered[j] <= true_voxels) & (true_voxels <= ordered[k - 1 - j]))
    return *bounds, truths, inside.mean(0)


def conformal_margin(low, high, truth, level: float) -> float:
    """What to add on either side of intervals [low, high] (n,) so that `level` of new truths fall inside.

    Romano et al. 2019, eq. 6: the ceil((n + 1) level)-th smallest distance outside the interval, negative inside.
    """
    outside = np.sort(np.maximum(low - truth, truth - high))
    return float(outside[min(int(np.ceil((len(outside) + 1) * level)), len(outside)) - 1])


def interval(summary: dict) -> str:
    return f"{summary['mean']:+.4f} [{summary['ci95'][0]:+.4f}, {summary['ci95'][1]:+.4f}]"


def finish(options: Options, results: dict, seconds: float, revision: str | None) -> None:
    """results.json and the table."""
    from common.runlog import write_json

    order = dict(sorted(results.items()))
    record = {"options": cli.to_dict(options), "git_revision": revision, "seconds": round(seconds), "data": "phantom"}
    write_json(Path(options.out) / "results.json", record | {"claims": order})
    print(f"\n{'claim':62s}{'result':8s}ours on the phantom\n")
    for name, row in order.items():
        print(f"{name:62s}{'pass' if row['passed'] else 'FAIL':8s}{row['ours']}")
        print(f"{'':70s}paper: {row['paper']}")
    if not options.leak:
        print("the leak test (a3) needs a second cohort: run without --preset smoke, or add --leak")
    print(f"\nresults.json and figures/ in {options.out}; {seconds / 60:.1f} minutes")


if __name__ == "__main__":
    cli.run(main)
