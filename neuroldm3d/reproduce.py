"""The claims made for NeuroLDM-3D, tested on grey-matter phantoms whose truth is known.

    python neuroldm3d/reproduce.py                  # about three quarters of an hour on two CPU cores
    python neuroldm3d/reproduce.py --preset smoke   # the demo: minutes, the same claims on fewer subjects

One cohort of controls and patients with an atrophied left or right hippocampus goes through the documented scripts:
VAE, latents, DiT, synthetic volumes, FID, memorisation, classifiers, saliency. Networks and training are the `smoke`
presets with the steps below. Running it again continues where it stopped. Writes OUT/results.json and
OUT/figures/*.png and prints: claim, pass or fail, ours on the phantom, the original's number on its data.
"""

from __future__ import annotations

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
FLOOR_SHARE = 0.1  # (a) the DiT may lie this part of the way from the real-vs-real floor to the VAE prior
METHODS = ("integrated_gradients", "input_x_gradient", "gradient_shap")
ALPHA = 0.05  # (d) of the peaks, binomial against chance
PLANTED = 4  # (e) training maps copied into the synthetic set


@dataclass
class Options(CommonOptions):
    preset: str = option("phantom", "phantom: the figures of the README; smoke: the demo")
    out: str = option(str(HERE / "runs" / "reproduce"), "folder of cohort, runs, results.json and figures")
    n_train: int = option(360, "training subjects")
    n_val: int = option(60, "subjects that select")
    n_test: int = option(160, "test subjects")
    vae_steps: int = option(1500, "steps of the VAE")
    dit_steps: int = option(4000, "steps of the DiT")
    n_synth: int = option(160, "synthetic volumes per class")
    budgets: tuple[int, ...] = option((30, 60, 120), "real training volumes of the classifier study")
    shares: tuple[float, ...] = option((0, 100), "synthetic volumes, in percent of a budget")
    seeds: tuple[int, ...] = option((1, 2, 3, 4, 5), "classifier runs per cell")
    classifier_epochs: int = option(40, "length of a classifier run")
    n_saliency: int = option(60, "test subjects whose attributions are computed")


PRESETS = {
    "phantom": {},
    "smoke": dict(out=str(HERE / "runs" / "demo"),
                  n_train=120, n_val=24, n_test=60, vae_steps=450, dit_steps=1000, n_synth=48, budgets=(40,),
                  seeds=(1, 2), classifier_epochs=15, n_saliency=24),
}  # fmt: skip


def main() -> None:
    options = cli.parse(Options, description=__doc__, presets=PRESETS)
    from common import runtime, training
    from common.runlog import git_revision

    with runtime.start(options.device, options.precision, options.seed) as rt:
        if rt.world_size > 1:
            raise UserError("reproduce.py runs in one process; the stages' own scripts are what torchrun spreads")
        results, started, revision = {}, time.time(), git_revision()
        training.claim_study(options)
        root = make_cohort(options)
        generate(options, root, rt)
        results |= claim_quality(options, root, rt)
        results |= claim_label(options, root)
        results |= claim_augmentation(options, root, rt)
        results |= claim_saliency(options, root, rt)
        results |= claim_memorisation(options, root, rt)
        finish(options, results, time.time() - started, revision)


def make_cohort(options: Options) -> Path:
    """The phantom cohort in OUT/cohort, which is the --root of every stage."""
    root = Path(options.out) / "cohort"
    if not (root / "data" / "phantom.json").is_file():
        sizes = {"n_train": options.n_train, "n_val": options.n_val, "n_test": options.n_test, "seed": options.seed}
        command = [sys.executable, str(HERE / "make_phantom.py"), "--overwrite", "--out", str(root), "--shape", "33",
                   "41", "33", *(f"--{name}={value}" for name, value in sizes.items())]  # fmt: skip
        if subprocess.run(command).returncode:
            raise UserError(f"make_phantom.py failed for {root}")
    return root


def generate(options: Options, root: Path, rt) -> None:
    """VAE, latents, DiT, volumes by class and from the VAE's prior: what is done is skipped."""
    from neuroldm3d.diffusion import config as dit_options
    from neuroldm3d.diffusion import save_synth
    from neuroldm3d.diffusion import trainer as dit_trainer
    from neuroldm3d.VAE import config as vae_options
    from neuroldm3d.VAE import generate_synthetic_samples as prior
    from neuroldm3d.VAE import save_latent
    from neuroldm3d.VAE import trainer as vae_trainer

    common = {"root": str(root), "seed": options.seed}
    vae = vae_options.PRESETS["smoke"] | {"steps": options.vae_steps} | common
    vae_trainer.train(vae_options.Config(**vae), rt)
    save_latent.save_latents(save_latent.Options(**common), rt)
    dit = dit_options.PRESETS["smoke"] | {"steps": options.dit_steps} | common
    dit_trainer.train(dit_options.Config(**dit), rt)
    save_synth.save_synth(save_synth.Options(**common, n_per_class=(options.n_synth,), steps=20), rt)
    prior.generate(prior.Options(**common, n_samples=2 * options.n_synth), rt)


# ---- the claims -----------------------------------------------------------------------------------------------------


def claim_quality(options: Options, root: Path, rt) -> dict:
    """(a) DiT samples are closer to real volumes than VAE-prior samples, and close to the real-vs-real floor.

    Real test volumes that went through the VAE tell how much of the distance is its blur, which no DiT can undo.
    """
    from neuroldm3d.diffusion import evaluation, per_slice_fid

    folders = {"DiT": root / "synthetic_data", "through VAE": pass_through_vae(options, root, rt)}
    folders |= {f"prior {kind}": root / "vae_prior" / kind for kind in ("unscaled", "scaled")}
    fid, kid, bounds = {}, {}, {}
    for name, folder in folders.items():
        settings = per_slice_fid.PRESETS["smoke"] | {"root": str(root), "seed": options.seed, "overwrite": True}
        settings |= {"synthetic_folder": str(folder), "match_classes": "prior" not in name}
        settings["output_dir"] = str(Path(options.out) / "fid" / name.replace(" ", "_"))
        found = evaluation.evaluate(per_slice_fid.Options(**settings), rt)
        overall = found["overall"]["synthetic"]
        fid[name], kid[name], bounds[name] = overall["fid"], overall["kid"], overall["fid_ci95"]
        if name == "DiT":  # the floor of the same class mix; samples of the prior have no class
            fid["real"], kid["real"] = (found["overall"]["baseline"][key] for key in ("fid", "kid"))
    prior = min(("prior unscaled", "prior scaled"), key=fid.get)
    above = {name: (v["DiT"] - v["real"]) / (v[prior] - v["real"]) for name, v in (("FID", fid), ("KID", kid))}
    table = ", ".join(f"{name} {fid[name]:.3g} / {kid[name]:.2g}" for name in ("DiT", prior, "through VAE", "real"))
    values = {"fid": fid, "kid": kid, "above_floor": above, "n": found["n"], "features": found["features"]}
    return {
        "a1 DiT samples closer to real volumes than VAE-prior samples": {
            "paper": "per-slice FID 17.5 with n = 477 < 2048 features (biased); no prior, no floor",
            "ours": f"FID / KID against real: {table} (random features, n = {found['n']})",
            "passed": bounds["DiT"][1] < bounds[prior][0],
            "values": values,
        },
        "a2 DiT samples near the real-vs-real floor": {
            "paper": "no floor",
            "ours": f"{100 * above['FID']:.0f} % (FID) and {100 * above['KID']:.0f} % (KID) of the way from floor to "
            f"prior, {100 * FLOOR_SHARE:.0f} % wanted",
            "passed": max(above.values()) < FLOOR_SHARE,
            "values": values,
        },
    }


def pass_through_vae(options: Options, root: Path, rt) -> Path:
    """Test volumes, encoded and decoded, in a folder that reads like synthetic volumes."""
    from neuroldm3d.VAE import infer

    out, folder = Path(options.out) / "reconstructions", Path(options.out) / "through_vae"
    table = str(root / "data_csvs" / "test.csv")
    settings = {"root": str(root), "seed": options.seed, "csv": table, "out": str(out), "arm": str(folder)}
    infer.infer(infer.Options(**settings, overwrite=True), rt)
    return folder


def claim_label(options: Options, root: Path) -> dict:
    """(b) Hippocampal grey matter, by the mean region map, is lower on TLE than on HC samples, as the label asks."""
    from common import figures
    from common.phantom import LABELS
    from neuroldm3d import dataset, regions

    volumes = open_volumes(root)
    real = dataset.read_table(root / "data_csvs" / "test.csv")
    synthetic = dataset.synthetic_rows(root / "synthetic_data")
    train = dataset.read_table(root / "data_csvs" / "train.csv")
    codes = {"hippocampus": [LABELS["hippocampus_left"], LABELS["hippocampus_right"]]}
    paths = [regions.region_path(root / "data" / "regions", row.name) for row in train]
    region = regions.mean_region_map(paths, codes, volumes.prep)
    tables = {"real": regions.region_table(real, volumes, region),
              "synthetic": regions.region_table(synthetic, volumes, region)}  # fmt: skip
    found = {name: regions.group_difference(table, "hippocampus", seed=options.seed) for name, table in tables.items()}
    points = {f"{name} {title}": cumulative([row["hippocampus"] for row in table if row["label"] == label])
              for name, table in tables.items() for label, title in enumerate(dataset.CLASSES)}  # fmt: skip
    figures.curves(Path(options.out) / "figures" / "hippocampus.png", points, xlabel="hippocampal grey matter (mm3)",
                   ylabel="share of volumes not larger", title="asked for by the label")  # fmt: skip
    low, high = found["synthetic"]["difference_ci95"]
    return {
        "b hippocampus smaller on TLE than on HC samples": {
            "paper": "not measured",
            "ours": f"TLE - HC {found['synthetic']['difference']:+.0f} [{low:+.0f}, {high:+.0f}] mm3 on samples, "
            f"{found['real']['difference']:+.0f} on real test maps; effect size "
            f"{found['synthetic']['effect_size']:+.2f} against {found['real']['effect_size']:+.2f}",
            "passed": high < 0,
            "values": found,
        }
    }


def cumulative(values) -> tuple[np.ndarray, np.ndarray]:
    """Points of the cumulative distribution."""
    values = np.sort(values)
    return values, (np.arange(len(values)) + 1) / len(values)


def open_volumes(root: Path):
    from neuroldm3d import dataset, preprocess
    from neuroldm3d.VAE.config import PRESETS as VAE_PRESETS

    prep = preprocess.Preparation(shape=VAE_PRESETS["smoke"]["shape"])
    return dataset.Volumes(prep, root / "data" / "cache")


def claim_augmentation(options: Options, root: Path, rt) -> dict:
    """(c) Real + synthetic against real only, over budgets and seeds: reported as it is, gain or no gain."""
    from neuroldm3d.classifier import config as classifier_options
    from neuroldm3d.classifier import grid

    settings = classifier_options.GRID_PRESETS["smoke"] | {
        "root": str(root), "seed": options.seed, "budgets": options.budgets, "shares": options.shares,
        "seeds": options.seeds, "epochs": options.classifier_epochs, "equal_size": (0.0,), "synthetic_only": (0,),
    }  # fmt: skip
    report = grid.run_grid(classifier_options.GridConfig(**settings), rt)
    lines = []
    for row in report["comparisons"]:
        cells = {cell["cell"]: cell["metrics"]["auc_roc"]["mean"] for cell in report["cells"]}
        low, high = row["over_seeds"]["ci95"] or (float("nan"),) * 2
        lines.append(
            f"{row['baseline']} {cells[row['baseline']]:.3f}, {row['cell']} {cells[row['cell']]:.3f}: "
            f"{row['over_seeds']['mean']:+.3f} [{low:+.3f}, {high:+.3f}], Holm p {row['p_holm']:.2g}"
        )
    gains = [row["over_seeds"]["ci95"] for row in report["comparisons"]]
    return {
        "c real + synthetic against real-only AUC (a report, not a test)": {
            "paper": "0.730 -> 0.801 at 500 real maps (3D CNN, 5 folds), 0.889 -> 0.872 at 2,723; none survives Holm",
            "ours": f"{len(options.seeds)} seeds, {report['n_test']} test subjects; "
            + "; ".join(lines)
            + f"; significant gain in {sum(bool(ci) and ci[0] > 0 for ci in gains)} of {len(gains)}",
            "passed": None,
            "values": report,
        }
    }


def claim_saliency(options: Options, root: Path, rt) -> dict:
    """(d) Attribution mass lies in the hippocampus on the atrophied side, and peaks point there beyond chance."""
    from neuroldm3d.classifier import config as classifier_options
    from neuroldm3d.classifier import saliency, trainer

    common = {"root": str(root), "seed": options.seed}
    model = classifier_options.PRESETS["smoke"] | {"epochs": options.classifier_epochs} | common
    trainer.train(classifier_options.Config(**model, exp="all_real"), rt)
    report = saliency.explain_run(
        classifier_options.RunSaliencyOptions(
            **common, exp="all_real", methods=METHODS, max_samples=options.n_saliency, pictures=4, overwrite=True,
            output_dir=str(Path(options.out) / "saliency"),
        ),
        rt,
    )[0]  # fmt: skip
    found = report["pointing"]
    main = found[METHODS[0]]
    text = "; ".join(
        f"{name} {100 * r['pointing_accuracy']:.0f} % [{100 * r['pointing_ci95'][0]:.0f}, "
        f"{100 * r['pointing_ci95'][1]:.0f}] (chance {100 * r['chance']:.0f} %), mass "
        f"{r['mass_over_volume']['mean']:.1f} [{r['mass_over_volume']['ci95'][0]:.1f}, "
        f"{r['mass_over_volume']['ci95'][1]:.1f}] times its volume" for name, r in found.items()
    )  # fmt: skip
    return {
        "d saliency points at the atrophied hippocampus": {
            "paper": "pictures only",
            "ours": f"{text}; n = {main['n']} TLE; peaks of {METHODS[0]} beyond chance: p {main['p_above_chance']:.2g}",
            "passed": main["mass_over_volume"]["ci95"][0] > 1 and main["p_above_chance"] < ALPHA,
            "values": report,
        }
    }


def claim_memorisation(options: Options, root: Path, rt) -> dict:
    """(e) No synthetic volume is a copy of a training one; copies planted among them are found."""
    import shutil

    from neuroldm3d.diffusion import memorisation

    settings = {"root": str(root), "seed": options.seed, "overwrite": True}
    out = Path(options.out) / "memorisation"
    clean = memorisation.check_memorisation(memorisation.Options(**settings, output_dir=str(out / "samples")), rt)
    planted = Path(options.out) / "planted"
    shutil.rmtree(planted, ignore_errors=True)
    shutil.copytree(root / "synthetic_data", planted)
    plant(planted, root)
    caught = memorisation.check_memorisation(
        memorisation.Options(**settings, synthetic_folder=str(planted), output_dir=str(out / "planted")), rt
    )
    shutil.rmtree(planted)
    copies = {"clean": clean["spaces"]["latent"]["copies"], "planted": caught["spaces"]["latent"]["copies"]}
    new = set(copies["planted"]) - set(copies["clean"])
    return {
        "e memorisation audit clean, planted copies caught": {
            "paper": "its text says none; its own later file: 46.7 % of samples closer than any held-out volume",
            "ours": f"{clean['spaces']['latent']['verdict']['text']}; planted: {len(new)} of {PLANTED} found",
            "passed": not clean["memorised"] and caught["memorised"] and len(new) == PLANTED,
            "values": {"clean": clean["spaces"], "planted": caught["spaces"]},
        }
    }


def plant(folder: Path, root: Path) -> None:
    """Copies of training maps, on the prepared grid, among the synthetic volumes of `folder`."""
    from common import nifti
    from neuroldm3d import dataset, preprocess

    volumes = open_volumes(root)
    for i, row in enumerate(dataset.read_table(root / "data_csvs" / "train.csv")[:PLANTED]):
        data = preprocess.denormalise(volumes.load(row), volumes.prep)
        nifti.save(folder / dataset.CLASSES[row.label] / f"planted_{i}.nii.gz", data, volumes.affine(row))


def finish(options: Options, results: dict, seconds: float, revision: str | None) -> None:
    """results.json and the table."""
    from common.runlog import write_json

    order = dict(sorted(results.items()))
    record = {"options": cli.to_dict(options), "git_revision": revision, "seconds": round(seconds), "data": "phantom"}
    write_json(Path(options.out) / "results.json", record | {"claims": order})
    print(f"\n{'claim':66s}{'result':10s}ours on the phantom\n")
    for name, row in order.items():
        verdict = "reported" if row["passed"] is None else "pass" if row["passed"] else "FAIL"
        print(f"{name:66s}{verdict:10s}{row['ours']}")
        print(f"{'':76s}original: {row['paper']}")
    print(f"\nresults.json and figures/ in {options.out}; {seconds / 60:.1f} minutes")


if __name__ == "__main__":
    cli.run(main)
